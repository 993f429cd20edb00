"""Bad input of every kind: a documented error that says what was wrong, and a network as before.

Each case is (what is called, the exact type of the error, words that its message must hold).
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from nad_attr import (
    GateSite,
    GateStoreError,
    GatingError,
    History,
    Recipe,
    RunOptions,
    SiteError,
    SubArchitecture,
    TaskGates,
    find_gate_sites,
    gated,
    learn_gates,
    paper_sites,
    recorded,
)
from nad_attr.attribution import NADAttribution
from nad_attr.evaluation import (
    EnergyScorer,
    NeuronMCTScorer,
    RandomScorer,
    TaylorScorer,
    auc,
    evaluate,
    fidelity,
    r_squared,
    spearman,
    sweep,
    tasks_of,
    top_k,
)
from nad_attr.gating.hooks import site_modules
from nad_attr.gating.means import channel_means
from nad_attr.learning.network_checks import NetworkCheckError
from tests import helpers
from tests.helpers import TinyCNN, assert_model_untouched

NAN, INF = float("nan"), float("inf")
SHORT = Recipe(steps=3, images_per_step=2)
PAPER = Recipe.paper(beta=0.1, epochs=1)
RELU1, RELU2 = GateSite("relu1", 6), GateSite("relu2", 8)


class Context(SimpleNamespace):
    """A network, images, gates and so on, made anew for each case."""


class Branches(nn.Module):
    """Modules at which no gate can stand, and a good one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.twice = nn.Identity()
        self.pair = Pair()
        self.alias = nn.Identity()
        self.dead = nn.Conv2d(4, 4, 1)
        self.unused = nn.Identity()
        self.constant = nn.Identity()
        self.turned = nn.Identity()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        x = self.alias(x)
        self.dead(x)
        x = self.twice(self.twice(x) + 1) + self.constant(torch.ones(1, 4, 1, 1, dtype=x.dtype))
        first, second = self.pair(x)
        x = self.turned((first + second).transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean((2, 3)))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x * 1.0, x * 2.0


class Two(nn.Module):
    """A network of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.head = nn.Linear(4, 2)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(self.relu(a + b))


@pytest.fixture
def c(tmp_path: Path) -> Context:
    """Made once: that each case leaves it as it was is what is tested."""
    context = make_context()
    context.folder = tmp_path
    return context


@functools.cache
def make_context() -> Context:
    x, labels = helpers.labelled_images(6)
    sites = [RELU1, RELU2]
    generator = torch.Generator().manual_seed(0)
    rows = {s.name: torch.rand(3, s.n_channels, generator=generator) for s in sites}
    return Context(
        model=helpers.build(TinyCNN),
        x=x,
        labels=labels,
        data=(x, labels),
        sites=sites,
        rows=rows,
        gates=TaskGates(rows, sites, [0, 1, (0, 2)]),
        one={s.name: torch.ones(s.n_channels) for s in sites},
        masks={s.name: torch.ones(s.n_channels, dtype=torch.bool) for s in sites},
        arch=SubArchitecture.from_kept({"relu1": [0, 1, 2], "relu2": range(5)}, sites, task=0),
        branches=helpers.build(Branches),
        folder=None,
    )


# -- short ways to call things -----------------------------------------------------------------


def run_gated(c: Context, gates: Any, x: Tensor | None = None, **options: Any) -> None:
    with gated(c.model, gates, **options):
        c.model(c.x if x is None else x)


def run_mapping(c: Context, means: Any = None, **changes: Any) -> None:
    run_gated(c, {**c.one, **changes}, sites=c.sites, means=means)


def run_recorded(c: Context, sites: Any, model: Any = None) -> None:
    model = c.model if model is None else model
    with recorded(model, sites):
        model(c.x)


def layer(c: Context, layers: Any, **options: Any) -> Any:
    return find_gate_sites(c.branches, c.x, layers=layers, **options)


def make_gates(c: Context, **changes: Any) -> TaskGates:
    arguments = {"gates": c.rows, "sites": c.sites, "tasks": [0, 1, 2], **changes}
    return TaskGates(**arguments)


def row(c: Context, **changes: Any) -> dict[str, Any]:
    return {**c.rows, **changes}


def mask(c: Context, **changes: Any) -> SubArchitecture:
    return SubArchitecture({**c.masks, **changes}, c.sites)


def learn(c: Context, data: Any = None, **options: Any) -> Any:
    arguments = {"recipe": SHORT, "sites": c.sites, **options}
    model = arguments.pop("model", c.model)
    return learn_gates(model, c.data if data is None else data, **arguments)


def measure(c: Context, archs: Any = None, data: Any = None, **options: Any) -> Any:
    model = options.pop("model", c.model)
    return evaluate(model, c.gates if archs is None else archs, data or c.data, **options)


def score(c: Context, scorer: type = EnergyScorer, **changes: Any) -> Any:
    arguments = {"inputs": c.x, "targets": c.labels, **changes}
    model = arguments.pop("model", c.model)
    sites = arguments.pop("sites", c.sites)
    return scorer(model, sites)(arguments.pop("inputs"), arguments.pop("targets"), **arguments)


def nad(c: Context, layer: Any = None, **options: Any) -> NADAttribution:
    layer = c.model.relu1 if layer is None else layer
    return NADAttribution(options.pop("model", c.model), layer, **{"recipe": SHORT, **options})


def attribute(c: Context, target: Any = 0, inputs: Any = None, **options: Any) -> Any:
    return nad(c, **options).attribute(c.x if inputs is None else inputs, target)


def stored(c: Context, content: bytes | None = None) -> Path:
    path = c.folder / "gates.h5"
    if content is None:
        c.gates.save(path)
    else:
        path.write_bytes(content)
    return path


def train(model: nn.Module, name: str = "") -> nn.Module:
    model.get_submodule(name).train()
    return model


def nan_model() -> nn.Module:
    model = helpers.build(TinyCNN)
    model.linear.bias.data[1] = NAN
    return model


def as_float(model: nn.Module) -> Callable[..., Any]:
    return lambda x: model(x.double())


class Yields(Dataset):
    """A dataset of any items."""

    def __init__(self, item: Any, n: int = 6, **attributes: Any) -> None:
        self.item, self.n = item, n
        vars(self).update(attributes)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, number: int) -> Any:
        return self.item(number) if callable(self.item) else self.item


class NoLength(Dataset):
    def __getitem__(self, number: int) -> Any:
        return torch.ones(3, 8, 8), 0


class Stream(IterableDataset):
    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


IMAGE = torch.ones(3, 8, 8, dtype=torch.float64)

Case = tuple[Callable[[Context], object], type[Exception], str]
CASES: dict[str, Case] = {}


def cases(group: str, table: dict[str, Case]) -> None:
    for name, case in table.items():
        key = f"{group}: {name}"
        assert key not in CASES, key
        CASES[key] = case


cases(
    "GateSite",
    {
        "empty name": (lambda c: GateSite("", 3), SiteError, "name of a module"),
        "name is a number": (lambda c: GateSite(5, 3), SiteError, "name"),
        "name is None": (lambda c: GateSite(None, 3), SiteError, "name"),
        "no channels": (lambda c: GateSite("a", 0), SiteError, "at least one channel"),
        "negative channels": (lambda c: GateSite("a", -4), SiteError, "at least one channel"),
        "channels are text": (lambda c: GateSite("a", "4"), SiteError, "channel"),
        "half a channel": (lambda c: GateSite("a", 4.5), SiteError, "channel"),
        "channels are a tensor": (
            lambda c: GateSite("a", torch.tensor([4, 5])),
            SiteError,
            "channel",
        ),
        "batch axis": (lambda c: GateSite("a", 4, 0), SiteError, "axis 0 is the batch"),
        "axis is text": (
            lambda c: GateSite("a", 4, "1"),
            SiteError,
            "channel_dim must be an int, got .1.",
        ),
        "axis is None": (
            lambda c: GateSite("a", 4, None),
            SiteError,
            "channel_dim must be an int, got None",
        ),
    },
)

cases(
    "find_gate_sites",
    {
        "a function": (lambda c: find_gate_sites(lambda x: x, c.x), SiteError, "torch.nn.Module"),
        "no model": (lambda c: find_gate_sites(None, c.x), SiteError, "torch.nn.Module"),
        "a class": (lambda c: find_gate_sites(TinyCNN, c.x), SiteError, "torch.nn.Module"),
        "train mode": (
            lambda c: find_gate_sites(train(helpers.build(TinyCNN)), c.x),
            SiteError,
            "train mode.*eval()",
        ),
        "one module in train mode": (
            lambda c: find_gate_sites(train(helpers.build(TinyCNN), "bn1"), c.x),
            SiteError,
            "'bn1' is in train mode",
        ),
        "scripted": (
            lambda c: find_gate_sites(torch.jit.trace(c.model, c.x), c.x),
            SiteError,
            "torch.jit",
        ),
        "a scripted part": (
            lambda c: find_gate_sites(nn.Sequential(torch.jit.trace(c.model, c.x)).eval(), c.x),
            SiteError,
            "module '0' is compiled by torch.jit",
        ),
        "lazy": (
            lambda c: find_gate_sites(nn.Sequential(nn.LazyLinear(3)).eval(), c.x),
            SiteError,
            "lazy",
        ),
        "no inputs": (lambda c: find_gate_sites(c.model, ()), SiteError, "example_inputs"),
        "inputs are None": (lambda c: find_gate_sites(c.model, None), SiteError, "NoneType"),
        "inputs are an array": (
            lambda c: find_gate_sites(c.model, c.x.numpy()),
            SiteError,
            "tensor or a tuple of tensors, got ndarray",
        ),
        "inputs are mixed": (
            lambda c: find_gate_sites(c.model, (c.x, 3)),
            SiteError,
            "got Tensor, int",
        ),
        "too few inputs": (
            lambda c: find_gate_sites(helpers.build(Two), c.x),
            SiteError,
            "cannot be run on example_inputs",
        ),
        "too many inputs": (
            lambda c: find_gate_sites(c.model, (c.x, c.x)),
            SiteError,
            "cannot be run on example_inputs",
        ),
        "too many arguments": (
            lambda c: find_gate_sites(c.model, c.x, additional_forward_args=3),
            SiteError,
            "additional_forward_args",
        ),
        "image of other channels": (
            lambda c: find_gate_sites(c.model, c.x[:, :2]),
            SiteError,
            "cannot be run on example_inputs of shape",
        ),
        "a number for an image": (
            lambda c: find_gate_sites(c.model, torch.tensor(1.0)),
            SiteError,
            "cannot be run",
        ),
        "image of another type": (
            lambda c: find_gate_sites(c.model, c.x.long()),
            SiteError,
            "cannot be run",
        ),
        "no such layer": (
            lambda c: find_gate_sites(c.model, c.x, layers="relu3"),
            SiteError,
            "no module 'relu3'; did you mean.*'relu1'",
        ),
        "layer is empty text": (lambda c: layer(c, ""), SiteError, "whole model"),
        "layer is the model": (lambda c: layer(c, c.branches), SiteError, "whole model"),
        "layer is a number": (lambda c: layer(c, [3]), SiteError, "got int"),
        "layers is a number": (lambda c: layer(c, 3), SiteError, "int"),
        "layer is None": (lambda c: layer(c, [None]), SiteError, "NoneType"),
        "no layers": (lambda c: layer(c, []), SiteError, "layers is empty"),
        "layer of another network": (
            lambda c: layer(c, helpers.build(Branches).conv),
            SiteError,
            "not part of the model",
        ),
        "layer given twice": (lambda c: layer(c, ["conv", "conv"]), SiteError, "given twice"),
        "layer given by name and itself": (
            lambda c: layer(c, ["conv", c.branches.conv]),
            SiteError,
            "'conv' is given twice",
        ),
        "layer called twice": (lambda c: layer(c, "twice"), SiteError, "called 2 times"),
        "layer never called": (lambda c: layer(c, "unused"), SiteError, "never called"),
        "layer returns a tuple": (lambda c: layer(c, "pair"), SiteError, "'pair' returns"),
        "layer leads nowhere": (lambda c: layer(c, "dead"), SiteError, "does not reach"),
        "layer of a constant": (lambda c: layer(c, "constant"), SiteError, "does not depend"),
        "layer without batch": (lambda c: layer(c, "turned"), SiteError, "not the batch"),
        "layers of one tensor": (
            lambda c: layer(c, ["conv", "alias"]),
            SiteError,
            "return the same tensor",
        ),
        "site of other channels": (
            lambda c: layer(c, GateSite("conv", 5)),
            SiteError,
            "said to have 5 channels",
        ),
        "site of another axis": (
            lambda c: layer(c, GateSite("conv", 6, 4)),
            SiteError,
            "channel_dim 4",
        ),
        "channel axis is the batch": (
            lambda c: layer(c, "conv", channel_dim=0),
            SiteError,
            "channel_dim 0",
        ),
        "channel axis too high": (
            lambda c: layer(c, "conv", channel_dim=7),
            SiteError,
            "from 1 to 3",
        ),
        "channel axis too low": (lambda c: layer(c, "conv", channel_dim=-4), SiteError, "-4"),
        "channel axis is text": (
            lambda c: layer(c, "conv", channel_dim="1"),
            SiteError,
            "channel_dim",
        ),
        "channel axis of no site": (
            lambda c: layer(c, "conv", channel_dim={"cnov": 1}),
            SiteError,
            "'cnov', which is not a site",
        ),
        "inputs of no layers": (
            lambda c: find_gate_sites(c.model, c.x, at_input=True),
            SiteError,
            "needs layers=",
        ),
        "nothing to gate": (
            lambda c: find_gate_sites(c.branches.head, torch.ones(1, 4, dtype=c.x.dtype)),
            SiteError,
            "no gate site found",
        ),
        "no architecture of the paper": (
            lambda c: paper_sites("vgg19"),
            SiteError,
            "'vgg19'; it has 'vgg16'",
        ),
        "architecture is a number": (lambda c: paper_sites(16), SiteError, "no architecture 16"),
        "architecture is a list": (lambda c: paper_sites(["vgg16"]), SiteError, "vgg16"),
    },
)

cases(
    "gated",
    {
        "no gates": (lambda c: run_gated(c, None), TypeError, "got NoneType"),
        "gates are a tensor": (lambda c: run_gated(c, torch.ones(6)), TypeError, "got Tensor"),
        "gates are a list": (lambda c: run_gated(c, [c.arch]), TypeError, "got list"),
        "empty mapping": (lambda c: run_gated(c, {}, sites=c.sites), ValueError, "empty"),
        "mapping without sites": (lambda c: run_gated(c, c.one), ValueError, "sites="),
        "mapping of an unknown site": (
            lambda c: run_mapping(c, relu3=torch.ones(2)),
            ValueError,
            "'relu3'.*not among the sites",
        ),
        "mapping with tasks": (
            lambda c: run_gated(c, c.one, sites=c.sites, tasks=0),
            ValueError,
            "tasks=",
        ),
        "too many gates": (lambda c: run_mapping(c, relu1=torch.ones(7)), ValueError, "C = 6"),
        "one gate": (lambda c: run_mapping(c, relu1=torch.ones(1)), ValueError, r"shape \(1,\)"),
        "gate is a number": (lambda c: run_mapping(c, relu1=0.5), ValueError, r"shape \(\)"),
        "gates of three axes": (
            lambda c: run_mapping(c, relu1=torch.ones(2, 3, 6)),
            ValueError,
            "relu1.*shape",
        ),
        "gates are NaN": (
            lambda c: run_mapping(c, relu1=torch.full((6,), NAN)),
            ValueError,
            "relu1.*finite",
        ),
        "gates are infinite": (
            lambda c: run_mapping(c, relu1=torch.full((6,), INF)),
            ValueError,
            "relu1.*finite",
        ),
        "gates are complex": (
            lambda c: run_mapping(c, relu1=torch.ones(6, dtype=torch.complex64)),
            ValueError,
            "real",
        ),
        "gates are text": (
            lambda c: run_mapping(c, relu1="open"),
            TypeError,
            "relu1.*not a tensor",
        ),
        "gates are None": (lambda c: run_mapping(c, relu1=None), TypeError, "relu1.*not a tensor"),
        "gates for other images": (
            lambda c: run_mapping(c, relu1=torch.ones(5, 6)),
            GatingError,
            "5 images met a batch of 6",
        ),
        "means lack a site": (
            lambda c: run_mapping(c, means={"relu1": torch.ones(6)}),
            ValueError,
            "means lack gate site 'relu2'",
        ),
        "means of other channels": (
            lambda c: run_mapping(c, means={**c.one, "relu1": torch.ones(8)}),
            ValueError,
            "means of 'relu1'",
        ),
        "means of other images": (
            lambda c: run_mapping(c, means={**c.one, "relu1": torch.ones(5, 5, 6)}),
            ValueError,
            "means of 'relu1'",
        ),
        "means are NaN": (
            lambda c: run_mapping(c, means={**c.one, "relu1": torch.full((6,), NAN)}),
            ValueError,
            "finite",
        ),
        "means are a number": (lambda c: run_mapping(c, means=0.5), TypeError, "means"),
        "means are text": (
            lambda c: run_mapping(c, means={**c.one, "relu1": "x"}),
            TypeError,
            "means of 'relu1'",
        ),
        "which of the tasks": (lambda c: run_gated(c, c.gates), ValueError, "say which with tasks"),
        "unknown task": (lambda c: run_gated(c, c.gates, tasks=7), KeyError, "no gates for task 7"),
        "unknown task of an image": (
            lambda c: run_gated(c, c.gates, tasks=[0, 0, 0, 9, 0, 0]),
            KeyError,
            "no gates for task 9",
        ),
        "unknown name of a task": (
            lambda c: run_gated(c, c.gates, tasks="cat"),
            KeyError,
            "'cat'",
        ),
        "task is not whole": (lambda c: run_gated(c, c.gates, tasks=0.5), TypeError, "0.5"),
        "task is a flag": (lambda c: run_gated(c, c.gates, tasks=[True] * 6), TypeError, "True"),
        "tasks of no image": (lambda c: run_gated(c, c.gates, tasks=[]), ValueError, "tasks"),
        "tasks of other images": (
            lambda c: run_gated(c, c.gates, tasks=[0, 1]),
            GatingError,
            "2 images met a batch of 6",
        ),
        "tasks of a sub-architecture": (
            lambda c: run_gated(c, c.arch, tasks=0),
            ValueError,
            "leave out tasks=",
        ),
        "other sites than the gates'": (
            lambda c: run_gated(c, c.arch, sites=[RELU1]),
            ValueError,
            "leave out sites=",
        ),
        "model is None": (
            lambda c: gated(None, c.arch).__enter__(),
            TypeError,
            "torch.nn.Module",
        ),
        "model is a function": (
            lambda c: gated(c.model.forward, c.arch).__enter__(),
            TypeError,
            "torch.nn.Module",
        ),
        "sites are names": (
            lambda c: run_gated(c, c.one, sites=["relu1", "relu2"]),
            TypeError,
            "GateSite",
        ),
        "site twice": (
            lambda c: run_gated(c, c.one, sites=[RELU1, RELU1, RELU2]),
            SiteError,
            "'relu1' is given twice",
        ),
        "site of another network": (
            lambda c: run_gated(c, {"layer1": torch.ones(4)}, sites=[GateSite("layer1", 4)]),
            SiteError,
            "no module 'layer1'",
        ),
        "site misspelt": (
            lambda c: run_gated(c, {"rleu1": torch.ones(6)}, sites=[GateSite("rleu1", 6)]),
            SiteError,
            "did you mean.*'relu1'",
        ),
        "another network is run": (lambda c: _other_network(c), GatingError, "did not fire"),
        "network is not run": (lambda c: _not_run(c), GatingError, "did not fire"),
        "network of other channels": (
            lambda c: run_gated(c, {"relu2": torch.ones(5)}, sites=[GateSite("relu2", 5)]),
            GatingError,
            "should have 5 channels",
        ),
        "recorded: no such site": (
            lambda c: run_recorded(c, [GateSite("nope", 2)]),
            SiteError,
            "no module 'nope'",
        ),
        "recorded: site twice": (
            lambda c: run_recorded(c, [RELU1, RELU1]),
            SiteError,
            "given twice",
        ),
        "recorded: names": (lambda c: run_recorded(c, ["relu1"]), TypeError, "GateSite"),
        "recorded: one site": (lambda c: run_recorded(c, RELU1), TypeError, "GateSite"),
        "recorded: other channels": (
            lambda c: run_recorded(c, [GateSite("relu1", 7)]),
            GatingError,
            "should have 7 channels",
        ),
        "recorded: other axis": (
            lambda c: run_recorded(c, [GateSite("relu1", 6, 5)]),
            GatingError,
            "channel_dim=5",
        ),
        "recorded: never called": (
            lambda c: run_recorded(c, [GateSite("unused", 4)], c.branches),
            GatingError,
            "'unused' did not fire",
        ),
        "recorded: called twice": (
            lambda c: run_recorded(c, [GateSite("twice", 4)], c.branches),
            GatingError,
            "'twice' was called 2 times",
        ),
        "recorded: a tuple": (
            lambda c: run_recorded(c, [GateSite("pair", 4)], c.branches),
            GatingError,
            "'pair' returned a tuple",
        ),
        "site_modules: no model": (
            lambda c: site_modules(None, c.sites),
            TypeError,
            "torch.nn.Module",
        ),
        "means: train mode": (
            lambda c: channel_means(train(helpers.build(TinyCNN)), c.sites, [(c.x,)]),
            ValueError,
            "train mode",
        ),
        "means: no images": (
            lambda c: channel_means(c.model, c.sites, []),
            ValueError,
            "no images",
        ),
        "means: bare tensors": (
            lambda c: channel_means(c.model, c.sites, [c.x]),
            TypeError,
            r"\(images,\)",
        ),
        "means: NaN": (
            lambda c: channel_means(c.model, c.sites, [(c.x * NAN,)]),
            ValueError,
            "relu1.*not finite",
        ),
    },
)


def _other_network(c: Context) -> None:
    other = helpers.build(TinyCNN)
    with c.arch.applied(c.model):
        other(c.x)


def _not_run(c: Context) -> None:
    with c.arch.applied(c.model):
        pass


cases(
    "TaskGates",
    {
        "no sites": (lambda c: TaskGates({}, [], [0]), ValueError, "at least one site"),
        "no tasks": (lambda c: make_gates(c, tasks=[]), ValueError, "one task"),
        "task twice": (lambda c: make_gates(c, tasks=[0, 1, 0]), ValueError, "twice"),
        "group twice": (lambda c: make_gates(c, tasks=[(1, 2), 1, [2, 1]]), ValueError, "twice"),
        "tasks are a number": (lambda c: make_gates(c, tasks=3), TypeError, "tasks"),
        "tasks are None": (lambda c: make_gates(c, tasks=None), TypeError, "tasks"),
        "task is negative": (lambda c: make_gates(c, tasks=[0, 1, -2]), ValueError, "-2"),
        "task is not whole": (lambda c: make_gates(c, tasks=[0, 1, 2.5]), TypeError, "2.5"),
        "task is text": (lambda c: make_gates(c, tasks=["a", "b", "c"]), TypeError, "'a'"),
        "task is a flag": (lambda c: make_gates(c, tasks=[False, 1, 2]), TypeError, "False"),
        "task is None": (lambda c: make_gates(c, tasks=[None, 1, 2]), TypeError, "NoneType"),
        "task of no classes": (lambda c: make_gates(c, tasks=[(), 1, 2]), ValueError, "no classes"),
        "task of tasks": (lambda c: make_gates(c, tasks=[((1, 2), 3), 1, 2]), TypeError, "flat"),
        "task is a float tensor": (
            lambda c: make_gates(c, tasks=[torch.tensor(1.0), 1, 2]),
            TypeError,
            "class index",
        ),
        "other number of tasks": (
            lambda c: make_gates(c, tasks=[0, 1]),
            ValueError,
            r"shape \(3, 6\), not \(tasks, channels\) = \(2, 6\)",
        ),
        "site twice": (
            lambda c: make_gates(c, gates={"relu1": c.rows["relu1"]}, sites=[RELU1, RELU1]),
            ValueError,
            "'relu1'.*twice",
        ),
        "sites are names": (
            lambda c: make_gates(c, sites=["relu1", "relu2"]),
            TypeError,
            "GateSite",
        ),
        "gates lack a site": (
            lambda c: make_gates(c, gates={"relu1": c.rows["relu1"]}),
            ValueError,
            "relu2",
        ),
        "gates of one site more": (
            lambda c: make_gates(c, gates=row(c, relu3=c.rows["relu1"])),
            ValueError,
            "relu3",
        ),
        "gates are a tensor": (
            lambda c: make_gates(c, gates=c.rows["relu1"]),
            TypeError,
            "gates must be.*Tensor",
        ),
        "gates are text": (lambda c: make_gates(c, gates=row(c, relu1="x")), TypeError, "relu1"),
        "gates are complex": (
            lambda c: make_gates(c, gates=row(c, relu1=c.rows["relu1"] * 1j)),
            ValueError,
            "relu1",
        ),
        "gates of one axis": (
            lambda c: make_gates(c, gates=row(c, relu1=torch.ones(6))),
            ValueError,
            r"relu1.*\(6,\)",
        ),
        "gates above one": (
            lambda c: make_gates(c, gates=row(c, relu1=torch.full((3, 6), 1.01))),
            ValueError,
            r"must lie in \[0, 1\]",
        ),
        "gates below zero": (
            lambda c: make_gates(c, gates=row(c, relu1=torch.full((3, 6), -0.01))),
            ValueError,
            r"must lie in \[0, 1\]",
        ),
        "gates are NaN": (
            lambda c: make_gates(c, gates=row(c, relu1=torch.full((3, 6), NAN))),
            ValueError,
            "NaN",
        ),
        "gates are infinite": (
            lambda c: make_gates(c, gates=row(c, relu1=torch.full((3, 6), INF))),
            ValueError,
            r"must lie in \[0, 1\]",
        ),
        "logits lack a site": (
            lambda c: make_gates(c, logits={"relu1": c.rows["relu1"]}),
            ValueError,
            "logits are for",
        ),
        "logits of another shape": (
            lambda c: make_gates(c, logits=row(c, relu2=torch.ones(3, 9))),
            ValueError,
            "logits of 'relu2'",
        ),
        "logits are NaN": (
            lambda c: make_gates(c, logits=row(c, relu2=torch.full((3, 8), NAN))),
            ValueError,
            "logits of 'relu2' hold NaN",
        ),
        "means lack a site": (lambda c: make_gates(c, means={}), ValueError, "means lack"),
        "means of another shape": (
            lambda c: make_gates(c, means={**c.one, "relu1": torch.ones(3, 6)}),
            ValueError,
            "means of 'relu1'",
        ),
        "means are NaN": (
            lambda c: make_gates(c, means={**c.one, "relu1": torch.full((6,), NAN)}),
            ValueError,
            "6 finite numbers",
        ),
        "means are a list": (lambda c: make_gates(c, means=[1, 2]), TypeError, "means"),
        "means are text": (
            lambda c: make_gates(c, means={**c.one, "relu1": "zero"}),
            TypeError,
            "means of 'relu1'",
        ),
        "too few names": (lambda c: make_gates(c, task_names=["a"]), ValueError, "1 names for 3"),
        "names are one text": (lambda c: make_gates(c, task_names="abc"), TypeError, "task_names"),
        "names are twice": (
            lambda c: make_gates(c, task_names=["a", "b", "a"]),
            ValueError,
            "'a'.*twice",
        ),
        "recipe is text": (lambda c: make_gates(c, recipe="paper"), TypeError, "recipe"),
        "history is a list": (lambda c: make_gates(c, history=[1, 2]), TypeError, "history"),
        "history of other tasks": (
            lambda c: make_gates(c, history=History({"loss": np.ones((2, 5))})),
            ValueError,
            "history",
        ),
        "info is a list": (lambda c: make_gates(c, info=[1, 2]), TypeError, "info"),
        "no such site": (lambda c: c.gates["relu9"], KeyError, "no gate site 'relu9'"),
        "site by number": (lambda c: c.gates[0], KeyError, "no gate site 0"),
        "no such task": (lambda c: c.gates.index(5), KeyError, "no gates for task 5"),
        "no such group": (lambda c: c.gates.gates_of((0, 1)), KeyError, "no gates for task"),
        "no such name": (lambda c: c.gates.index("dog"), KeyError, "'dog'"),
        "index None": (lambda c: c.gates.index(None), TypeError, "NoneType"),
        "index not whole": (lambda c: c.gates.index(1.0), TypeError, "1.0"),
        "index negative": (lambda c: c.gates.index(-1), ValueError, "-1"),
        "index of no classes": (lambda c: c.gates.index([]), ValueError, "no classes"),
        "select nothing": (lambda c: c.gates.select([]), ValueError, "task"),
        "select twice": (lambda c: c.gates.select([0, 0]), ValueError, "twice"),
        "select unknown": (lambda c: c.gates.select([0, 4]), KeyError, "task 4"),
        "select a number": (lambda c: c.gates.select(0), TypeError, "tasks"),
        "size 0": (lambda c: c.gates.sub_architecture(0, 0), ValueError, r"\(0, 1\], got 0"),
        "size above 1": (lambda c: c.gates.sub_architecture(0, 1.5), ValueError, "got 1.5"),
        "size negative": (lambda c: c.gates.sub_architecture(0, -0.5), ValueError, "got -0.5"),
        "size NaN": (lambda c: c.gates.sub_architecture(0, NAN), ValueError, "got nan"),
        "size is text": (lambda c: c.gates.sub_architecture(0, "half"), ValueError, "'half'"),
        "size is a flag": (lambda c: c.gates.sub_architectures(True), ValueError, "True"),
        "size is a tensor": (
            lambda c: c.gates.sub_architecture(0, torch.ones(2)),
            ValueError,
            "size must be",
        ),
        "history of different shapes": (
            lambda c: History({"a": np.ones((2, 2)), "b": np.ones((3, 2))}),
            ValueError,
            "shape",
        ),
        "history of three axes": (
            lambda c: History({"a": np.ones((2, 2, 2))}),
            ValueError,
            "shape",
        ),
        "history of text": (lambda c: History({"a": ["x"]}), ValueError, "curve.*'a'"),
        "history is a number": (lambda c: History(5), TypeError, "curves"),
        "history has no such curve": (lambda c: History({"a": [[1.0]]})["b"], KeyError, "b"),
    },
)

cases(
    "SubArchitecture",
    {
        "no sites": (lambda c: SubArchitecture({}, []), ValueError, "at least one gate site"),
        "mask of numbers": (lambda c: mask(c, relu1=torch.ones(6)), TypeError, "not bool"),
        "mask of text": (lambda c: mask(c, relu1="all"), TypeError, "relu1"),
        "mask is None": (lambda c: mask(c, relu1=None), TypeError, "relu1"),
        "mask of other channels": (
            lambda c: mask(c, relu1=torch.ones(5, dtype=torch.bool)),
            ValueError,
            r"\(5,\), expected \(6,\)",
        ),
        "mask per image": (
            lambda c: mask(c, relu1=torch.ones(2, 6, dtype=torch.bool)),
            ValueError,
            r"\(2, 6\)",
        ),
        "a mask is missing": (
            lambda c: SubArchitecture({"relu1": c.masks["relu1"]}, c.sites),
            ValueError,
            "relu2",
        ),
        "a mask too many": (
            lambda c: mask(c, relu9=c.masks["relu1"]),
            ValueError,
            "relu9",
        ),
        "masks are a tensor": (
            lambda c: SubArchitecture(c.masks["relu1"], c.sites),
            TypeError,
            "masks must be.*Tensor",
        ),
        "sites are names": (
            lambda c: SubArchitecture(c.masks, ["relu1", "relu2"]),
            TypeError,
            "GateSite",
        ),
        "site twice": (
            lambda c: SubArchitecture({"relu1": c.masks["relu1"]}, [RELU1, RELU1]),
            ValueError,
            "'relu1'.*twice",
        ),
        "task is text": (
            lambda c: SubArchitecture(c.masks, c.sites, task="cat"),
            TypeError,
            "'cat'",
        ),
        "task is negative": (
            lambda c: SubArchitecture(c.masks, c.sites, task=-1),
            ValueError,
            "-1",
        ),
        "means lack a site": (
            lambda c: c.arch.with_means({"relu1": torch.ones(6)}),
            ValueError,
            "means lack gate site 'relu2'",
        ),
        "means of other channels": (
            lambda c: c.arch.with_means({**c.one, "relu2": torch.ones(6)}),
            ValueError,
            "means of 'relu2'",
        ),
        "means are infinite": (
            lambda c: c.arch.with_means({**c.one, "relu2": torch.full((8,), INF)}),
            ValueError,
            "finite",
        ),
        "kept of an unknown site": (
            lambda c: SubArchitecture.from_kept({"relu": [0]}, c.sites),
            ValueError,
            "no gate site 'relu'",
        ),
        "kept channel too high": (
            lambda c: SubArchitecture.from_kept({"relu1": [6]}, c.sites),
            ValueError,
            "channels 0 to 5",
        ),
        "kept channel negative": (
            lambda c: SubArchitecture.from_kept({"relu1": [-1]}, c.sites),
            ValueError,
            "channels 0 to 5",
        ),
        "kept channels are not whole": (
            lambda c: SubArchitecture.from_kept({"relu1": [0.5]}, c.sites),
            TypeError,
            "relu1",
        ),
        "kept channels are a mask": (
            lambda c: SubArchitecture.from_kept({"relu1": c.masks["relu1"]}, c.sites),
            TypeError,
            "relu1",
        ),
        "kept channels are text": (
            lambda c: SubArchitecture.from_kept({"relu1": "all"}, c.sites),
            TypeError,
            "relu1",
        ),
        "kept is a list": (lambda c: SubArchitecture.from_kept([0], c.sites), TypeError, "kept"),
        "no such site": (lambda c: c.arch["relu9"], KeyError, "no gate site 'relu9'"),
        "or with a number": (lambda c: c.arch | 3, TypeError, "got int"),
        "and with a mask": (lambda c: c.arch & c.masks, TypeError, "got dict"),
        "minus None": (lambda c: c.arch - None, TypeError, "got NoneType"),
        "or with other sites": (
            lambda c: c.arch | SubArchitecture.full([RELU1]),
            ValueError,
            "different gate sites",
        ),
        "overlap with None": (lambda c: c.arch.overlap(None), TypeError, "got NoneType"),
        "overlap of other sites": (
            lambda c: c.arch.overlap(SubArchitecture.full([RELU2, RELU1])),
            ValueError,
            "different gate sites",
        ),
        "applied to None": (
            lambda c: c.arch.applied(None).__enter__(),
            TypeError,
            "torch.nn.Module",
        ),
        "applied to another network": (
            lambda c: c.arch.applied(c.branches).__enter__(),
            SiteError,
            "no module 'relu1'",
        ),
    },
)

cases(
    "Recipe",
    {
        "size 0": (lambda c: Recipe(size=0), ValueError, "size must be above 0"),
        "size negative": (lambda c: Recipe(size=-0.1), ValueError, "size.*-0.1"),
        "size above 1": (lambda c: Recipe(size=1.1), ValueError, "size.*1.1"),
        "size NaN": (lambda c: Recipe(size=NAN), ValueError, "size.*nan"),
        "size is text": (lambda c: Recipe(size="0.5"), ValueError, "size.*'0.5'"),
        "size is a flag": (lambda c: Recipe(size=True), ValueError, "size.*True"),
        "unknown ablation": (lambda c: Recipe(ablation="noise"), ValueError, "'mean', 'zero'"),
        "ablation is a list": (lambda c: Recipe(ablation=["mean"]), ValueError, "ablation"),
        "no steps": (lambda c: Recipe(steps=0), ValueError, "steps.*0"),
        "half a step": (lambda c: Recipe(steps=1.5), ValueError, "steps.*1.5"),
        "steps are text": (lambda c: Recipe(steps="many"), ValueError, "steps.*'many'"),
        "steps are a flag": (lambda c: Recipe(steps=True), ValueError, "steps.*True"),
        "one image per step": (lambda c: Recipe(images_per_step=1), ValueError, "images_per_step"),
        "removal above 1": (lambda c: Recipe(removal=1.5), ValueError, "removal"),
        "removal negative": (lambda c: Recipe(removal=-1), ValueError, "removal"),
        "memory above 1": (lambda c: Recipe(memory=2), ValueError, "memory"),
        "trust negative": (lambda c: Recipe(trust=-1), ValueError, "trust"),
        "trust infinite": (lambda c: Recipe(trust=INF), ValueError, "trust"),
        "free_scale": (lambda c: Recipe(free_scale=1.1), ValueError, "free_scale"),
        "boundary": (lambda c: Recipe(boundary=-0.1), ValueError, "boundary"),
        "unknown field": (lambda c: Recipe(beta=1), TypeError, "beta"),
        "JSON of nothing": (lambda c: Recipe.from_json(""), ValueError, "not a recipe"),
        "JSON of a list": (lambda c: Recipe.from_json("[]"), ValueError, "not a recipe"),
        "JSON of another kind": (
            lambda c: Recipe.from_json('{"kind": "Cake"}'),
            ValueError,
            "not a recipe",
        ),
        "JSON with more": (
            lambda c: Recipe.from_json('{"kind": "Recipe", "beta": 1}'),
            ValueError,
            "beta",
        ),
        "JSON with a wrong value": (
            lambda c: Recipe.from_json('{"kind": "Recipe", "removal": null}'),
            ValueError,
            "removal",
        ),
        "JSON is None": (lambda c: Recipe.from_json(None), TypeError, "None"),
        "paper: unknown network": (lambda c: Recipe.paper("vgg19"), ValueError, "vgg19.*vgg16"),
        "paper: unknown dataset": (lambda c: Recipe.paper("vgg16", "mnist"), ValueError, "mnist"),
        "paper: network is a number": (lambda c: Recipe.paper(16), ValueError, "16"),
        "paper: dataset is None": (lambda c: Recipe.paper("vgg16", None), ValueError, "None"),
        "paper: neither network nor beta": (lambda c: Recipe.paper(), ValueError, "beta="),
        "paper: size": (lambda c: Recipe.paper(beta=1, size=0.5), ValueError, "beta decides"),
        "paper: mean": (lambda c: Recipe.paper(beta=1, ablation="mean"), ValueError, "zero"),
        "paper: beta negative": (lambda c: Recipe.paper(beta=-1), ValueError, "beta.*-1"),
        "paper: beta NaN": (lambda c: Recipe.paper(beta=NAN), ValueError, "beta.*nan"),
        "paper: beta is None": (lambda c: Recipe.paper(beta=None), ValueError, "beta.*None"),
        "paper: no epochs": (lambda c: Recipe.paper(beta=1, epochs=0), ValueError, "epochs"),
        "paper: no images": (
            lambda c: Recipe.paper(beta=1, images_per_step=0),
            ValueError,
            "images",
        ),
        "paper: learning rate is text": (
            lambda c: Recipe.paper(beta=1, learning_rate="high"),
            ValueError,
            "learning_rate.*'high'",
        ),
        "paper: unknown field": (
            lambda c: Recipe.paper(beta=1, momentum=0.9),
            TypeError,
            "momentum",
        ),
        "paper: rectified sites are a number": (
            lambda c: Recipe.paper(beta=1, rectified_sites=3),
            ValueError,
            "rectified_sites",
        ),
    },
)

cases(
    "learn_gates",
    {
        "model is None": (lambda c: learn(c, model=None), TypeError, "torch.nn.Module"),
        "model is a function": (
            lambda c: learn(c, model=lambda x: x),
            TypeError,
            "goes into forward_func=",
        ),
        "train mode": (
            lambda c: learn(c, model=train(helpers.build(TinyCNN))),
            ValueError,
            "train mode.*model.eval",
        ),
        "one module in train mode": (
            lambda c: learn(c, model=train(helpers.build(TinyCNN), "bn1")),
            ValueError,
            "'bn1'",
        ),
        "model without outputs": (
            lambda c: learn(c, model=nan_model()),
            ValueError,
            "outputs hold NaN",
        ),
        "recipe is text": (lambda c: learn(c, recipe="paper"), TypeError, "must be a Recipe"),
        "recipe is the class": (lambda c: learn(c, recipe=Recipe), TypeError, "must be a Recipe"),
        "seed is not whole": (lambda c: learn(c, seed=0.5), TypeError, "seed.*0.5"),
        "seed is text": (lambda c: learn(c, seed="0"), TypeError, "seed"),
        "seed is None": (lambda c: learn(c, seed=None), TypeError, "seed"),
        "no images at once": (lambda c: learn(c, batch_size=0), ValueError, "batch_size.*0"),
        "negative batch": (lambda c: learn(c, batch_size=-8), ValueError, "batch_size.*-8"),
        "half a batch": (lambda c: learn(c, batch_size=8.5), ValueError, "batch_size.*8.5"),
        "batch is a flag": (lambda c: learn(c, batch_size=True), ValueError, "batch_size"),
        "unknown precision": (lambda c: learn(c, amp="half"), ValueError, "amp.*'half'"),
        "precision of whole numbers": (lambda c: learn(c, amp=torch.int8), ValueError, "amp"),
        "unknown device": (lambda c: learn(c, device="cup"), ValueError, "device.*cup"),
        "device that is not there": (
            lambda c: learn(c, device="xla"),
            ValueError,
            "device xla",
        ),
        "device is not whole": (lambda c: learn(c, device=1.5), ValueError, "device.*1.5"),
        "no data": (lambda c: learn_gates(c.model, None), TypeError, "data must be.*NoneType"),
        "data is a number": (lambda c: learn(c, 5), TypeError, "data must be.*int"),
        "data is text": (lambda c: learn(c, "images/"), TypeError, "data must be.*str"),
        "data is a table": (lambda c: learn(c, {"x": c.x}), TypeError, "data must be.*dict"),
        "data is one tensor": (lambda c: learn(c, c.x), TypeError, "data must be.*Tensor"),
        "data of three": (lambda c: learn(c, (c.x, c.labels, c.x)), TypeError, "data must be"),
        "data of nothing": (lambda c: learn(c, ()), TypeError, "data must be"),
        "arrays of text": (
            lambda c: learn(c, (np.array([["a"]] * 6, dtype=object), c.labels)),
            TypeError,
            "tensor",
        ),
        "no images": (lambda c: learn(c, (c.x[:0], c.labels[:0])), ValueError, "empty"),
        "fewer labels": (lambda c: learn(c, (c.x, c.labels[:5])), ValueError, "6 inputs.*5 labels"),
        "labels of probabilities": (
            lambda c: learn(c, (c.x, torch.linspace(0, 1, 6))),
            ValueError,
            "class indices",
        ),
        "labels one-hot": (
            lambda c: learn(c, (c.x, torch.eye(6, dtype=torch.long))),
            ValueError,
            "label 5.*3 outputs",
        ),
        "labels are flags": (lambda c: learn(c, (c.x, c.labels > 0)), ValueError, "True and False"),
        "labels are complex": (
            lambda c: learn(c, (c.x, c.labels * 1j)),
            ValueError,
            "class indices",
        ),
        "labels are text": (lambda c: learn(c, (c.x, list("abcdef"))), ValueError, "labels"),
        "labels are None": (lambda c: learn(c, (c.x, None)), TypeError, "data must be"),
        "label negative": (lambda c: learn(c, (c.x, c.labels - 1)), ValueError, "-1"),
        "label too high": (
            lambda c: learn(c, (c.x, c.labels + 1), tasks=[1]),
            ValueError,
            "a label 3, but the network has 3 outputs",
        ),
        "image is NaN": (lambda c: learn(c, (c.x * NAN, c.labels)), ValueError, "NaN or infinity"),
        "image is infinite": (lambda c: learn(c, (c.x / 0, c.labels)), ValueError, "NaN or inf"),
        "image of other channels": (
            lambda c: learn(c, (c.x[:, :2], c.labels)),
            ValueError,
            "cannot be run",
        ),
        "image of other channels, sites to find": (
            lambda c: learn(c, (c.x[:, :2], c.labels), sites=None),
            SiteError,
            "cannot be run",
        ),
        "image of another type": (
            lambda c: learn(c, (c.x.float(), c.labels)),
            ValueError,
            "cannot be run",
        ),
        "image of whole numbers": (
            lambda c: learn(c, (c.x.long(), c.labels)),
            ValueError,
            "cannot be run",
        ),
        "images without axes": (
            lambda c: learn(c, (torch.tensor(1.0), torch.tensor([0]))),
            ValueError,
            "axis 0",
        ),
        "two inputs for one": (
            lambda c: learn(c, ((c.x, c.x), c.labels)),
            ValueError,
            "cannot be run",
        ),
        "inputs of different numbers": (
            lambda c: learn(c, ((c.x, c.x[:3]), c.labels)),
            ValueError,
            "same number of images",
        ),
        "inputs of no tensors": (lambda c: learn(c, ([1, 2], [0, 1])), TypeError, "int, int"),
        "tensor dataset without labels": (
            lambda c: learn(c, TensorDataset(c.x)),
            TypeError,
            "inputs and labels",
        ),
        "dataset without length": (lambda c: learn(c, NoLength()), TypeError, "no length"),
        "empty dataset": (lambda c: learn(c, Yields((IMAGE, 0), 0)), ValueError, "empty"),
        "dataset of images": (lambda c: learn(c, Yields(IMAGE)), TypeError, "pairs"),
        "dataset of tables": (
            lambda c: learn(c, Yields({"image": IMAGE, "kind": 0})),
            TypeError,
            "fields image, kind.*none.*pairs",
        ),
        "dataset of triples": (lambda c: learn(c, Yields((IMAGE, 0, 0))), TypeError, "of 3"),
        "dataset with text labels": (
            lambda c: learn(c, Yields((IMAGE, "cat"))),
            ValueError,
            "labels",
        ),
        "dataset of probabilities": (
            lambda c: learn(c, Yields((IMAGE, 0.5))),
            ValueError,
            "class indices",
        ),
        "dataset of text": (
            lambda c: learn(c, Yields(("file.jpg", 0), targets=[0, 1, 2, 0, 1, 2])),
            TypeError,
            "transform end in tensors",
        ),
        "dataset of objects": (
            lambda c: learn(c, Yields((object(), 0))),
            TypeError,
            "batch",
        ),
        "dataset of different sizes": (
            lambda c: learn(c, Yields(lambda i: (torch.ones(3, 8, 8 + i % 2), i % 3))),
            ValueError,
            "batch",
        ),
        "dataset of NaN": (
            lambda c: learn(c, Yields((IMAGE * NAN, 0), targets=[0, 1, 2, 0, 1, 2])),
            ValueError,
            "NaN or infinity",
        ),
        "stream of images": (
            lambda c: learn(c, DataLoader(Stream([IMAGE] * 4))),
            TypeError,
            "pairs",
        ),
        "stream of nothing": (lambda c: learn(c, DataLoader(Stream([]))), ValueError, "empty"),
        "stream of different sizes": (
            lambda c: learn(c, DataLoader(Stream([(IMAGE, 0), (IMAGE[:, :5], 1)]))),
            ValueError,
            "shape",
        ),
        "stream of different inputs": (
            lambda c: learn(c, iter([(c.x, c.labels), ((c.x, c.x), c.labels)])),
            ValueError,
            "input",
        ),
        "loader that leaves all out": (
            lambda c: learn(c, DataLoader(TensorDataset(c.x, c.labels), sampler=[])),
            ValueError,
            "empty",
        ),
        "no tasks": (lambda c: learn(c, tasks=[]), ValueError, "tasks is empty"),
        "no named tasks": (lambda c: learn(c, tasks={}), ValueError, "tasks is empty"),
        "task is text": (lambda c: learn(c, tasks="cat"), TypeError, "'cat'"),
        "tasks are text": (lambda c: learn(c, tasks=["cat"]), TypeError, "'cat'"),
        "task without images": (lambda c: learn(c, tasks=[7]), ValueError, "no image of task 7"),
        "group without images": (
            lambda c: learn(c, tasks=[(7, 8)]),
            ValueError,
            "no image of task",
        ),
        "group with an unknown class": (
            lambda c: learn(c, tasks=[(0, 8)]),
            ValueError,
            "a task 8, but the network has 3 outputs",
        ),
        "task negative": (lambda c: learn(c, tasks=[-1]), ValueError, "-1"),
        "task not whole": (lambda c: learn(c, tasks=[0.5]), TypeError, "0.5"),
        "task is a flag": (lambda c: learn(c, tasks=[True]), TypeError, "True"),
        "task is None": (lambda c: learn(c, tasks=[None]), TypeError, "NoneType"),
        "tasks are a number of halves": (lambda c: learn(c, tasks=0.5), TypeError, "float"),
        "task twice": (lambda c: learn(c, tasks=[0, 1, 0]), ValueError, "twice"),
        "task twice by name": (lambda c: learn(c, tasks={"a": 0, "b": 0}), ValueError, "twice"),
        "task of nothing": (lambda c: learn(c, tasks=[[]]), ValueError, "no classes"),
        "task of tasks": (lambda c: learn(c, tasks=[[0, [1]]]), TypeError, "flat"),
        "named task is text": (lambda c: learn(c, tasks={"cat": "tabby"}), TypeError, "'tabby'"),
        "no sites": (lambda c: learn(c, sites=[]), ValueError, "sites is empty"),
        "unknown site": (lambda c: learn(c, sites=["relu9"]), SiteError, "no module 'relu9'"),
        "unknown gate site": (
            lambda c: learn(c, sites=[GateSite("relu9", 6)]),
            SiteError,
            "no module 'relu9'",
        ),
        "site of other channels": (
            lambda c: learn(c, sites=[GateSite("relu1", 7)]),
            GatingError,
            "should have 7 channels",
        ),
        "site twice": (lambda c: learn(c, sites=[RELU1, RELU1]), SiteError, "given twice"),
        "site is a number": (lambda c: learn(c, sites=[1]), SiteError, "int"),
        "sites are a number": (lambda c: learn(c, sites=1), TypeError, "sites"),
        "site of another network": (
            lambda c: learn(c, sites=[nn.ReLU()]),
            SiteError,
            "not part of the model",
        ),
        "the whole network as a site": (
            lambda c: learn(c, sites=[c.model]),
            SiteError,
            "whole model",
        ),
        "forward_func is a number": (
            lambda c: learn(c, run=RunOptions(forward_func=3)),
            TypeError,
            "forward_func",
        ),
        "forward_func returns a tuple": (
            lambda c: learn(c, run=RunOptions(forward_func=lambda x: (c.model(x),))),
            TypeError,
            "returned tuple.*forward_func",
        ),
        "forward_func returns one number": (
            lambda c: learn(c, run=RunOptions(forward_func=lambda x: c.model(x)[:, 0])),
            ValueError,
            "label 2.*one output",
        ),
        "forward_func returns one image": (
            lambda c: learn(c, run=RunOptions(forward_func=lambda x: c.model(x)[:1])),
            ValueError,
            r"shape \(1, 3\) for 2 images",
        ),
        "forward_func runs another network": (
            lambda c: learn(c, run=RunOptions(forward_func=helpers.build(TinyCNN))),
            GatingError,
            "did not fire",
        ),
        "forward_func detaches": (
            lambda c: learn(c, run=RunOptions(forward_func=lambda x: c.model(x).detach())),
            NetworkCheckError,
            "gradient.*the outputs are detached after",
        ),
        "forward_func returns nothing": (
            lambda c: learn(c, run=RunOptions(forward_func=lambda x: None)),
            TypeError,
            "NoneType",
        ),
        "too many arguments": (
            lambda c: learn(c, run=RunOptions(additional_forward_args=(1, 2))),
            ValueError,
            "cannot be run",
        ),
        "start for the default recipe": (
            lambda c: learn(c, initial_logits=c.rows),
            ValueError,
            "paper's recipe",
        ),
        "start of other tasks": (
            lambda c: learn(c, recipe=PAPER, tasks=[0], initial_logits=c.rows),
            ValueError,
            r"\(3, 6\), not \(tasks, channels\) = \(1, 6\)",
        ),
        "start lacks a site": (
            lambda c: learn(c, recipe=PAPER, initial_logits={"relu1": c.rows["relu1"]}),
            ValueError,
            "relu2",
        ),
        "start is NaN": (
            lambda c: learn(c, recipe=PAPER, initial_logits=row(c, relu1=torch.full((3, 6), NAN))),
            ValueError,
            "NaN",
        ),
        "start is a tensor": (
            lambda c: learn(c, recipe=PAPER, initial_logits=c.rows["relu1"]),
            TypeError,
            "initial_logits",
        ),
        "start is text": (
            lambda c: learn(c, recipe=PAPER, initial_logits=row(c, relu1="open")),
            TypeError,
            "initial_logits",
        ),
    },
)

cases(
    "evaluate",
    {
        "model is None": (lambda c: measure(c, model=None), TypeError, "torch.nn.Module"),
        "train mode": (
            lambda c: measure(c, model=train(helpers.build(TinyCNN))),
            ValueError,
            "train mode",
        ),
        "no architectures": (lambda c: measure(c, []), ValueError, "no sub-architecture"),
        "architectures are None": (
            lambda c: evaluate(c.model, None, c.data),
            TypeError,
            "got NoneType",
        ),
        "architectures are numbers": (lambda c: measure(c, [1, 2]), TypeError, "SubArchitecture"),
        "architectures are text": (lambda c: measure(c, "all"), TypeError, "SubArchitecture"),
        "architecture of no task": (
            lambda c: measure(c, [SubArchitecture.full(c.sites)]),
            ValueError,
            "has no task",
        ),
        "architectures of different sites": (
            lambda c: measure(c, [c.arch, SubArchitecture.from_kept({}, [RELU1], task=1)]),
            ValueError,
            "other gate sites",
        ),
        "task twice": (lambda c: measure(c, [c.arch, ~c.arch]), ValueError, "twice"),
        "task that does not exist": (
            lambda c: measure(
                c,
                [c.arch, SubArchitecture.from_kept({}, c.sites, task=9)],
                (c.x, torch.tensor([0, 9, 0, 9, 0, 9])),
            ),
            ValueError,
            "9.*3 outputs",
        ),
        "no own images": (
            lambda c: measure(c, c.arch, (c.x, torch.ones(6, dtype=torch.long))),
            ValueError,
            "no image of any of the tasks",
        ),
        "label too high": (lambda c: measure(c, data=(c.x, c.labels + 2)), ValueError, "label 4"),
        "labels of probabilities": (
            lambda c: measure(c, data=(c.x, torch.linspace(0, 1, 6))),
            ValueError,
            "class indices",
        ),
        "data is one tensor": (
            lambda c: evaluate(c.model, c.gates, c.x),
            TypeError,
            "data must be",
        ),
        "data is None": (lambda c: evaluate(c.model, c.gates, None), TypeError, "data must be"),
        "images are NaN": (lambda c: measure(c, data=(c.x * NAN, c.labels)), ValueError, "NaN"),
        "images of other channels": (
            lambda c: measure(c, data=(c.x[:, :1], c.labels)),
            ValueError,
            "cannot be run",
        ),
        "outputs are NaN": (lambda c: measure(c, model=nan_model()), ValueError, "NaN for image 0"),
        "no images at once": (
            lambda c: measure(c, run=RunOptions(batch_size=0)),
            ValueError,
            "batch_size",
        ),
        "half a batch": (
            lambda c: measure(c, run=RunOptions(batch_size=2.5)),
            ValueError,
            "batch_size",
        ),
        "unknown device": (
            lambda c: measure(c, run=RunOptions(device="cup")),
            ValueError,
            "device.*cup",
        ),
        "size of sub-architectures": (
            lambda c: measure(c, [c.arch], size=0.5),
            ValueError,
            "size= needs TaskGates",
        ),
        "size 0": (lambda c: measure(c, size=0), ValueError, "size must be"),
        "size is text": (lambda c: measure(c, size="half"), ValueError, "size must be"),
        "site of another network": (
            lambda c: measure(c, model=c.branches),
            SiteError,
            "no module 'relu1'",
        ),
        "site of other channels": (
            lambda c: measure(c, SubArchitecture.from_kept({}, [GateSite("relu1", 4)], task=0)),
            GatingError,
            "should have 4 channels",
        ),
        "forward_func returns a tuple": (
            lambda c: measure(c, run=RunOptions(forward_func=lambda x: (c.model(x),))),
            TypeError,
            "returned tuple",
        ),
        "forward_func returns one number": (
            lambda c: measure(c, run=RunOptions(forward_func=lambda x: c.model(x)[:, 0])),
            ValueError,
            "one output",
        ),
        "forward_func runs nothing": (
            lambda c: measure(c, run=RunOptions(forward_func=lambda x: torch.ones(len(x), 3))),
            GatingError,
            "did not fire",
        ),
        "forward_func is a number": (
            lambda c: measure(c, run=RunOptions(forward_func=3)),
            TypeError,
            "forward_func",
        ),
        "no such measure": (lambda c: measure(c).mean("accuracy"), ValueError, "'accuracy'"),
        "sweep: no architectures": (
            lambda c: sweep(c.model, [], c.data),
            ValueError,
            "no sub-architecture",
        ),
        "auc: NaN": (
            lambda c: auc(torch.tensor([NAN, 1]), torch.tensor([True, False])),
            ValueError,
            "NaN",
        ),
        "auc: positive is a number": (
            lambda c: auc(torch.ones(2), torch.ones(2)),
            TypeError,
            "boolean",
        ),
        "auc: other shapes": (
            lambda c: auc(torch.ones(2), torch.ones(3, dtype=torch.bool)),
            ValueError,
            "do not fit",
        ),
        "auc: a number": (
            lambda c: auc(torch.tensor(1.0), torch.tensor([True])),
            ValueError,
            "last axis",
        ),
        "r_squared: other shapes": (
            lambda c: r_squared(torch.ones(2), torch.ones(3)),
            ValueError,
            "do not fit",
        ),
        "r_squared: negative weights": (
            lambda c: r_squared(
                torch.arange(3.0), torch.arange(3.0), weights=torch.tensor([1, 1, -1])
            ),
            ValueError,
            "negative",
        ),
        "spearman: NaN": (
            lambda c: spearman(torch.tensor([NAN, 1.0]), torch.ones(2)),
            ValueError,
            "NaN",
        ),
        "fidelity: other shapes": (
            lambda c: fidelity(torch.ones(4), torch.ones(4), torch.ones(3, dtype=torch.bool)),
            ValueError,
            "do not fit",
        ),
    },
)

cases(
    "scorers",
    {
        "model is None": (lambda c: score(c, model=None), TypeError, "torch.nn.Module"),
        "no sites": (lambda c: score(c, sites=[]), ValueError, "no gate site"),
        "unknown site": (lambda c: score(c, sites=[GateSite("x", 2)]), SiteError, "no module 'x'"),
        "sites are names": (lambda c: score(c, sites=["relu1"]), TypeError, "GateSite"),
        "site of other channels": (
            lambda c: score(c, TaylorScorer, sites=[GateSite("relu1", 4)]),
            GatingError,
            "should have 4 channels",
        ),
        "train mode": (
            lambda c: score(c, model=train(helpers.build(TinyCNN))),
            ValueError,
            "train mode",
        ),
        "targets not whole": (
            lambda c: score(c, targets=torch.linspace(0, 1, 6)),
            ValueError,
            "class indices",
        ),
        "fewer targets": (lambda c: score(c, targets=[0, 1]), ValueError, "6 inputs.*2 labels"),
        "target too high": (
            lambda c: score(c, NeuronMCTScorer, targets=c.labels + 1),
            ValueError,
            "label 3",
        ),
        "target negative": (lambda c: score(c, targets=c.labels - 1), ValueError, "-1"),
        "targets are text": (
            lambda c: score(c, targets=list("abcdef")),
            ValueError,
            "labels|targets",
        ),
        "targets are None": (lambda c: score(c, targets=None), ValueError, "labels|targets"),
        "task without images": (
            lambda c: score(c, tasks=[7]),
            ValueError,
            "no own image for task 7",
        ),
        "task without other images": (
            lambda c: score(c, tasks=[(0, 1, 2)], include_others=True),
            ValueError,
            "no other image",
        ),
        "task twice": (lambda c: score(c, tasks=[0, 0]), ValueError, "twice"),
        "tasks are text": (lambda c: score(c, tasks="cat"), TypeError, "tasks"),
        "no tasks": (lambda c: score(c, tasks=[]), ValueError, "no task"),
        "images are NaN": (lambda c: score(c, RandomScorer, inputs=c.x * NAN), ValueError, "NaN"),
        "images are text": (lambda c: score(c, inputs=["a"] * 6), TypeError, "tensor"),
        "images of other channels": (
            lambda c: score(c, TaylorScorer, inputs=c.x[:, :2]),
            ValueError,
            "cannot be run",
        ),
        "forward_func detaches": (
            lambda c: score(
                c, TaylorScorer, run=RunOptions(forward_func=lambda x: c.model(x).detach())
            ),
            GatingError,
            "no gradient",
        ),
        "unknown device": (
            lambda c: score(c, run=RunOptions(device="cup")),
            ValueError,
            "device.*cup",
        ),
        "tasks_of: text": (lambda c: tasks_of([0], "ab"), TypeError, "got str"),
        "tasks_of: a number": (lambda c: tasks_of([0], 3), TypeError, "got int"),
        "top_k: NaN": (
            lambda c: top_k(row(c, relu1=torch.full((3, 6), NAN)), c.sites, [0, 1, 2], 0.5),
            ValueError,
            "'relu1' hold NaN",
        ),
        "top_k: other tasks": (
            lambda c: top_k(c.rows, c.sites, [0, 1], 0.5),
            ValueError,
            r"shape \(3, 6\)",
        ),
        "top_k: a site is missing": (
            lambda c: top_k({"relu1": c.rows["relu1"]}, c.sites, [0, 1, 2], 0.5),
            ValueError,
            "relu2",
        ),
        "top_k: scores are a list": (
            lambda c: top_k([1, 2], c.sites, [0, 1, 2], 0.5),
            TypeError,
            "scores",
        ),
        "top_k: scores are text": (
            lambda c: top_k(row(c, relu1="high"), c.sites, [0, 1, 2], 0.5),
            TypeError,
            "relu1",
        ),
        "top_k: size 0": (lambda c: top_k(c.rows, c.sites, [0, 1, 2], 0), ValueError, "size"),
        "top_k: no tasks": (lambda c: top_k(c.rows, c.sites, [], 0.5), ValueError, "no task"),
    },
)

cases(
    "NADAttribution",
    {
        "model is a number": (lambda c: nad(c, model=3), TypeError, "got int"),
        "model is scripted": (
            lambda c: nad(c, model=torch.jit.trace(c.model, c.x)),
            TypeError,
            "torch.jit",
        ),
        "layer is a number": (lambda c: nad(c, layer=3), TypeError, "layer must be"),
        "no layers": (lambda c: nad(c, layer=[]), ValueError, "empty list"),
        "layers are mixed": (
            lambda c: nad(c, layer=[c.model.relu1, None]),
            TypeError,
            "layer must be",
        ),
        "function without layers": (
            lambda c: NADAttribution(as_float(c.model)),
            TypeError,
            "name the layers",
        ),
        "function with names": (
            lambda c: nad(c, layer="relu1", model=as_float(c.model)),
            TypeError,
            "as modules",
        ),
        "unknown scope": (lambda c: nad(c, scope="image"), ValueError, "'image'"),
        "gates are a mapping": (lambda c: nad(c, gates=c.rows), TypeError, "got dict"),
        "gates of images": (lambda c: nad(c, gates=c.gates, scope="example"), ValueError, "scope"),
        "one copy": (lambda c: nad(c, scope="example", n_copies=1), ValueError, "n_copies"),
        "target None": (lambda c: attribute(c, None), AssertionError, "target is None"),
        "target is a tuple": (lambda c: attribute(c, (0, 1)), AssertionError, "two axes"),
        "target is not whole": (lambda c: attribute(c, 0.5), AssertionError, "0.5"),
        "target is text": (lambda c: attribute(c, "cat"), AssertionError, "'cat'"),
        "target is a flag": (lambda c: attribute(c, True), AssertionError, "True"),
        "target too high": (lambda c: attribute(c, 3), AssertionError, "3 outputs"),
        "target negative": (lambda c: attribute(c, -1), AssertionError, "got -1"),
        "too few targets": (
            lambda c: attribute(c, [0, 1]),
            AssertionError,
            "2 class indices for 6",
        ),
        "targets of two axes": (
            lambda c: attribute(c, torch.zeros(6, 2, dtype=torch.long)),
            AssertionError,
            r"shape \(6, 2\)",
        ),
        "targets of probabilities": (
            lambda c: attribute(c, torch.linspace(0, 1, 6)),
            AssertionError,
            "class indices",
        ),
        "inputs are None": (
            lambda c: nad(c).attribute(None, 0),
            TypeError,
            "tensor",
        ),
        "inputs are an array": (lambda c: attribute(c, 0, c.x.numpy()), TypeError, "ndarray"),
        "no images": (lambda c: attribute(c, 0, c.x[:0]), ValueError, "no images"),
        "train mode": (
            lambda c: nad(c, layer="relu1", model=train(helpers.build(TinyCNN))).attribute(c.x, 0),
            ValueError,
            "train mode",
        ),
        "layer of another network": (
            lambda c: attribute(c, layer=nn.ReLU()),
            SiteError,
            "not part of the model",
        ),
        "unknown layer": (lambda c: attribute(c, layer="relu9"), SiteError, "no module 'relu9'"),
        "layer called twice": (
            lambda c: attribute(c, layer="twice", model=c.branches),
            SiteError,
            "called 2 times",
        ),
        "target that was not learned": (
            lambda c: attribute(c, 2, gates=c.gates),
            KeyError,
            "no gates for target 2",
        ),
        "layer that was not learned": (
            lambda c: attribute(c, 0, gates=c.gates, layer="conv1"),
            ValueError,
            "no gates were learned at 'conv1'",
        ),
        "learning paths beforehand": (
            lambda c: nad(c, scope="example").learn(c.data),
            ValueError,
            "scope='task'",
        ),
        "learning from nothing": (lambda c: nad(c).learn(None), TypeError, "data must be"),
        "gates before learning": (lambda c: nad(c).gates(0), RuntimeError, "call learn"),
        "unknown gates": (lambda c: nad(c, gates=c.gates).gates(7), KeyError, "task 7"),
        "size 0": (
            lambda c: nad(c, gates=c.gates).sub_architecture(0, 0),
            ValueError,
            "size must be",
        ),
    },
)

cases(
    "files",
    {
        "load: missing": (lambda c: TaskGates.load("no.h5"), GateStoreError, "no file no.h5"),
        "load: a folder": (lambda c: TaskGates.load(c.folder), GateStoreError, "no file"),
        "load: None": (lambda c: TaskGates.load(None), TypeError, "NoneType"),
        "load: a number": (lambda c: SubArchitecture.load(3), TypeError, "int"),
        "load: a zero in the name": (lambda c: TaskGates.load("a\0b"), GateStoreError, "no file"),
        "load: text": (
            lambda c: TaskGates.load(stored(c, b"open")),
            GateStoreError,
            "not a readable store",
        ),
        "load: empty": (lambda c: TaskGates.load(stored(c, b"")), GateStoreError, "readable store"),
        "load: foreign": (
            lambda c: (
                h5py.File(c.folder / "f.h5", "w").close(),
                TaskGates.load(c.folder / "f.h5"),
            ),
            GateStoreError,
            "not one written by nad_attr",
        ),
        "load: the other kind": (
            lambda c: SubArchitecture.load(stored(c)),
            GateStoreError,
            "holds 'task_gates'",
        ),
        "save: to a folder": (lambda c: c.gates.save(c.folder), GateStoreError, "is a folder"),
        "save: into no folder": (
            lambda c: c.gates.save(c.folder / "no" / "gates.h5"),
            GateStoreError,
            "no folder",
        ),
        "save: to None": (lambda c: c.arch.save(None), TypeError, "NoneType"),
        "save: info of objects": (
            lambda c: make_gates(c, info={"model": c.model}).save(c.folder / "g.h5"),
            TypeError,
            "JSON",
        ),
    },
)


def check(c: Context, case: Case) -> None:
    call, expected, words = case
    with (
        assert_model_untouched(c.model, c.x, c.labels),
        assert_model_untouched(c.branches),
        pytest.raises(Exception) as caught,  # noqa: PT011 (the type is compared exactly)
    ):
        call(c)
    assert type(caught.value) is expected, repr(caught.value)
    message = str(caught.value)
    assert re.search(words, message, re.DOTALL), message
    if c.folder is not None:
        left = {path.name for path in c.folder.iterdir()} - {"gates.h5", "f.h5"}
        assert not left


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_bad_input(c: Context, case: Case) -> None:
    check(c, case)


def test_there_are_many_kinds() -> None:
    assert len(CASES) >= 200
    assert len({key.partition(":")[0] for key in CASES}) >= 9


@pytest.mark.slow
def test_good_input_is_taken(c: Context) -> None:
    """The ways of calling that the cases spoil work when nothing is spoilt."""
    run_mapping(c)
    run_gated(c, c.gates, tasks=[0, 1, 0, 1, 0, (0, 2)])
    layer(c, "conv")
    make_gates(c)
    mask(c)
    learn(c)
    learn(c, recipe=PAPER)
    measure(c)
    measure(c, [c.arch])
    score(c)
    attribute(c)
    assert TaskGates.load(stored(c)) == c.gates


# ---------------------------------------------------------------------------------------------
# Random bad input
# ---------------------------------------------------------------------------------------------

DOCUMENTED = (ValueError, TypeError, KeyError, SiteError, GatingError, GateStoreError)
some = settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
anything = (
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats()
    | st.text(max_size=4)
    | st.binary(max_size=3)
    | st.lists(st.integers(-3, 9) | st.floats(), max_size=4)
    | st.dictionaries(st.text(max_size=2), st.integers(), max_size=2)
    | st.builds(object)
)
NAMES = {name for name, _ in helpers.build(TinyCNN).named_modules()}
dtypes = st.sampled_from(
    [
        *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
        *(torch.int64, torch.uint8, torch.bool, torch.complex64),
    ]
)


def ends_well(c: Context, call: Callable[[], object], must_fail: bool = False) -> None:
    """It works, or ends in a documented error; in both cases the network is as before."""
    failed = False
    with assert_model_untouched(c.model, c.x, c.labels):
        try:
            call()
        except Exception as error:
            failed = True
            assert type(error) in DOCUMENTED, repr(error)  # noqa: PT017
            assert str(error)  # noqa: PT017
    assert failed or not must_fail


@pytest.mark.slow
@some
@given(name=st.text(max_size=12).filter(lambda text: text not in NAMES))
def test_random_names_of_layers(c: Context, name: str) -> None:
    for call in (
        lambda: find_gate_sites(c.model, c.x, layers=name),
        lambda: learn(c, sites=[name]),
        lambda: run_gated(c, {name: torch.ones(6)}, sites=[GateSite(name, 6)]),
        lambda: nad(c, layer=name).attribute(c.x, 0),
        lambda: c.gates[name],
    ):
        ends_well(c, call, must_fail=True)


@pytest.mark.slow
@some
@given(shape=st.lists(st.integers(0, 7), max_size=4), dtype=dtypes, seed=st.integers(0, 9))
def test_random_gates(c: Context, shape: list[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-1, 3, shape, generator=generator).to(dtype)
    ends_well(c, lambda: run_mapping(c, relu1=values))
    ends_well(c, lambda: run_mapping(c, means={**c.one, "relu1": values}))
    ends_well(c, lambda: make_gates(c, gates=row(c, relu1=values)))
    ends_well(c, lambda: mask(c, relu1=values))
    ends_well(c, lambda: c.arch.with_means({**c.one, "relu1": values}))
    ends_well(c, lambda: top_k(row(c, relu1=values), c.sites, [0, 1, 2], 0.5))


@pytest.mark.slow
@some
@given(shape=st.lists(st.integers(0, 9), max_size=5), dtype=dtypes)
def test_random_images(c: Context, shape: list[int], dtype: torch.dtype) -> None:
    images = torch.ones(shape, dtype=dtype)
    labels = torch.zeros(shape[0] if shape else 1, dtype=torch.long)
    for call in (
        lambda: find_gate_sites(c.model, images),
        lambda: learn(c, (images, labels), tasks=[0], amp=None),
        lambda: measure(c, data=(images, labels)),
        lambda: score(c, TaylorScorer, inputs=images, targets=labels),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a single class, of tasks without images
            ends_well(c, call)


@pytest.mark.slow
@some
@given(labels=st.lists(st.integers(-2, 5), min_size=6, max_size=6))
def test_random_labels(c: Context, labels: list[int]) -> None:
    must_fail = min(labels) < 0 or max(labels) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ends_well(c, lambda: learn(c, (c.x, torch.tensor(labels))), must_fail)
        ends_well(c, lambda: measure(c, data=(c.x, torch.tensor(labels))), must_fail)
        ends_well(c, lambda: score(c, NeuronMCTScorer, targets=labels), must_fail)


@pytest.mark.slow
@some
@given(
    places=st.lists(st.tuples(*(st.integers(0, n - 1) for n in (6, 3, 8, 8))), min_size=1),
    bad=st.sampled_from([NAN, INF, -INF]),
)
def test_values_that_are_not_finite_anywhere(
    c: Context, places: list[tuple[int, ...]], bad: float
) -> None:
    images = c.x.clone()
    for place in places:
        images[place] = bad
    named = ", ".join(map(str, sorted({place[0] for place in places})[:5]))
    for call in (
        lambda: learn(c, (images, c.labels)),
        lambda: measure(c, data=(images, c.labels)),
        lambda: score(c, inputs=images),
    ):
        with assert_model_untouched(c.model), pytest.raises(ValueError, match="NaN") as error:
            call()
        assert f"[{named}]" in str(error.value)


@pytest.mark.slow
@some
@given(value=anything)
def test_random_arguments(c: Context, value: Any) -> None:
    for call in (
        lambda: GateSite(value, 3),
        lambda: GateSite("relu1", value),
        lambda: GateSite("relu1", 3, value),
        lambda: find_gate_sites(c.model, value),
        lambda: find_gate_sites(value, c.x),
        lambda: paper_sites(value),
        lambda: run_gated(c, value, sites=c.sites),
        lambda: run_gated(c, c.one, sites=value),
        lambda: run_gated(c, c.gates, tasks=value),
        lambda: run_mapping(c, relu1=value),
        lambda: run_recorded(c, value),
        lambda: make_gates(c, gates=value),
        lambda: make_gates(c, sites=value),
        lambda: make_gates(c, tasks=value),
        lambda: make_gates(c, logits=value),
        lambda: make_gates(c, recipe=value),
        lambda: make_gates(c, history=value),
        lambda: make_gates(c, info=value),
        lambda: c.gates.index(value),
        lambda: c.gates.select(value),
        lambda: c.gates.sub_architecture(0, value),
        lambda: SubArchitecture(value, c.sites),
        lambda: SubArchitecture(c.masks, value),
        lambda: SubArchitecture(c.masks, c.sites, task=value),
        lambda: SubArchitecture.from_kept({"relu1": value}, c.sites),
        lambda: c.arch.overlap(value),
        lambda: Recipe(size=value),
        lambda: Recipe(steps=value),
        lambda: Recipe(ablation=value),
        lambda: Recipe.paper(value),
        lambda: learn(c, tasks=value if value is not None else []),
        lambda: learn(c, sites=value if value is not None else []),
        lambda: learn(c, batch_size=value),
        lambda: learn(c, device=value),
        lambda: learn(c, amp=value),
        lambda: learn(c, (c.x, value)),
        lambda: learn(c, run=RunOptions(forward_func=value)),
        lambda: learn(c, initial_logits=value),
        lambda: evaluate(c.model, value, c.data),
        lambda: evaluate(c.model, c.gates, value),
        lambda: score(c, targets=value),
        lambda: top_k(value, c.sites, [0, 1, 2], 0.5),
        lambda: top_k(c.rows, c.sites, value, 0.5),
        lambda: top_k(c.rows, c.sites, [0, 1, 2], value),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ends_well(c, call)
