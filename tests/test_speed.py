"""What makes learning fast changes no result: each saving against a plain step."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nad_attr import GateSite, Recipe, RunOptions, SubArchitecture, find_gate_sites, learn_gates
from nad_attr.evaluation import fit_ablation, sweep
from nad_attr.gating.hooks import frozen
from nad_attr.learning import constants, engine, selection
from nad_attr.learning.engine import Network
from nad_attr.learning.fast.convolution import lean_convolutions
from nad_attr.learning.paper import initial_logits  # noqa: F401 (the recipe's own start, for comparison)
from nad_attr.learning.session import Session
from tests.helpers import (
    TinyCNN,
    TinyResNet,
    TinyViT,
    assert_model_untouched,
    build,
    images,
    labelled_images,
)

MAKERS = (TinyCNN, TinyResNet, TinyViT)


# -- The step -------------------------------------------------------------------------------------


def _plain_step(
    model: nn.Module,
    sites: list[GateSite],
    x: Tensor,
    gates: Tensor,
    classes: Tensor,
    means: dict[str, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Image by image, autograd doing it all: the task output, and its gradient."""
    outputs, gradients = [], []
    for image, row, k in zip(x, gates, classes, strict=True):
        leaf = row.clone().requires_grad_(True)
        pieces = leaf.split([s.n_channels for s in sites])
        parts = dict(zip([s.name for s in sites], pieces, strict=True))
        handles = []
        for site in sites:

            def gate(module: Any, args: Any, output: Tensor, site: GateSite = site) -> Tensor:
                shape = [1] * output.ndim
                shape[site.channel_dim] = -1
                g = parts[site.name].view(shape)  # noqa: B023
                rest = 0 if means is None else (1 - g) * means[site.name].view(shape)
                return output * g + rest

            handles.append(model.get_submodule(site.name).register_forward_hook(gate))
        output = model(image[None])[0, k]
        for handle in handles:
            handle.remove()
        outputs.append(output.detach())
        gradients.append(torch.autograd.grad(output, leaf)[0])
    return torch.stack(outputs), torch.stack(gradients)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("mean", [False, True])
def test_step_is_the_plain_one(make: Callable[[], nn.Module], mean: bool) -> None:
    model, x = build(make), images(5)
    sites = find_gate_sites(model, x)
    n = sum(site.n_channels for site in sites)
    generator = torch.Generator().manual_seed(1)
    gates = torch.rand(5, n, generator=generator, dtype=torch.float64)
    means = {s.name: torch.linspace(-1, 1, s.n_channels, dtype=torch.float64) for s in sites}
    network = Network(model, sites)
    if mean:
        network.set_means(means)
    classes = torch.tensor([0, 1, 2, 1, 0])
    expected = _plain_step(model, sites, x, gates, classes, means if mean else None)
    with assert_model_untouched(model, x), frozen(model):
        found = network.output_and_gradient(
            (x,), gates, classes[:, None], torch.ones(5, 1, dtype=torch.bool)
        )
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels_last", [False, True])
def test_bfloat16_step_within_three_percent(channels_last: bool) -> None:
    """Against the float32 step: activations are rounded, gates and sums over positions are not."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = _wide().eval()
        x = torch.randn(8, 3, 16, 16)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        x = x.to(memory_format=torch.channels_last)
    sites = [GateSite("1", 64, 1), GateSite("3", 64, 1)]
    gates = (torch.rand(8, 128, generator=torch.Generator().manual_seed(2)) > 0.3).float()
    arguments = ((x,), gates, torch.zeros(8, 1, dtype=torch.int64), torch.ones(8, 1).bool())
    with frozen(model):
        _, expected = Network(model, sites).output_and_gradient(*arguments)
        _, found = Network(model, sites, run=RunOptions(amp=torch.bfloat16)).output_and_gradient(
            *arguments
        )
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.03 * expected.norm()


def _wide() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 32, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 3),
    )


@contextlib.contextmanager
def _plainly(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Learn without what was written for speed."""
    from nad_attr.gating.hooks import expand, multiply

    def plain(
        site: GateSite,
        tensor: Tensor,
        gate: Tensor,
        mean: Tensor | None,
        shift: Tensor | None = None,
    ) -> Tensor:
        gated = multiply(site, tensor, gate, mean)
        return gated if shift is None else gated + expand(shift, site, tensor).to(tensor.dtype)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "multiply_learned", plain)
        patch.setattr(Network, "lean", lambda self: contextlib.nullcontext())
        patch.setattr(Network, "lighten", lambda self, inputs: None)
        yield


@pytest.mark.parametrize("make", MAKERS)
def test_learned_gates_are_those_of_the_plain_step(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = build(make), labelled_images(18)
    recipe = Recipe(size=0.5, steps=8, images_per_step=4)
    found = learn_gates(model, data, recipe=recipe)
    with _plainly(monkeypatch):
        expected = learn_gates(model, data, recipe=recipe)
    for site in found.sites:
        torch.testing.assert_close(found[site.name], expected[site.name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_bfloat16_gates_are_those_of_the_plain_step(
    ablation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On all channels: what is rounded is rounded in the same places."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, x = _wide().eval(), torch.randn(24, 3, 8, 8)
    data = x, torch.arange(24) % 3
    recipe = Recipe(size=0.6, ablation=ablation, steps=10, images_per_step=6)
    found = learn_gates(model, data, [1], recipe, run=RunOptions(amp=True))
    with _plainly(monkeypatch):
        expected = learn_gates(model, data, [1], recipe, run=RunOptions(amp=True))
    assert all(torch.equal(found[s.name], expected[s.name]) for s in found.sites)


# -- Convolutions ---------------------------------------------------------------------------------

LAYERS = (
    nn.Conv2d(4, 6, 3),
    nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False),
    nn.Conv2d(4, 8, (1, 3), dilation=(1, 2), groups=2),
    nn.Conv2d(4, 6, 4, padding="same"),
    nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
    nn.Conv1d(4, 5, 3, stride=2),
    nn.Conv3d(4, 2, 2, padding=1),
)


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lean_convolutions_are_the_same_bit_by_bit(layer: nn.Module, dtype: torch.dtype) -> None:
    net = nn.Sequential(layer, nn.ReLU(inplace=True)).to(dtype).requires_grad_(False)
    n_axes = layer.weight.ndim - 2
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *[7] * n_axes, generator=generator, dtype=dtype, requires_grad=True)

    def run() -> tuple[Tensor, Tensor]:
        y = net(x * 2)
        (gradient,) = torch.autograd.grad((y * torch.arange(y[0].numel()).view_as(y[0])).sum(), x)
        return y, gradient

    expected = run()
    with assert_model_untouched(net), lean_convolutions(net):
        found = run()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    net.to(torch.float32)


def test_lean_convolutions_leave_those_that_learn_alone() -> None:
    layer = nn.Conv2d(2, 2, 1)
    x = torch.ones(1, 2, 1, 1, requires_grad=True)
    with lean_convolutions(layer):
        layer(x).sum().backward()
    assert layer.weight.grad is not None
    layer.requires_grad_(False)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 2, 1)).requires_grad_(False)
    expected = torch.autograd.grad(parametrized(x).sum(), x)
    with lean_convolutions(parametrized):
        assert torch.equal(torch.autograd.grad(parametrized(x).sum(), x)[0], expected[0])


def _kept(function: Callable[[], Any], weights: nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in weights.parameters()}
    storages: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(storages.values())


def test_a_gated_site_is_not_held_twice() -> None:
    """On a plain network, whose convolutions are all that would keep the gated values."""
    model = _wide().eval()
    sites = [GateSite("1", 64, 1), GateSite("4", 64, 1), GateSite("6", 32, 1)]
    x = torch.randn(4, 3, 16, 16)
    gates = torch.ones(4, 160, requires_grad=True)
    network = Network(model, sites)
    with frozen(model):
        step = _kept(lambda: network.gated((x,), gates), model)
        start = model[:2](x).requires_grad_(True)
        bare = _kept(lambda: model[2:](start), model)
    assert step <= 1.15 * bare


# -- The loop -------------------------------------------------------------------------------------


class _Reads(TorchDispatchMode):
    """Counts what makes a host wait for its GPU: numbers read, and results of unknown size."""

    WAITING = ("_local_scalar_dense", "nonzero", "is_nonzero", "item", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.n += func.overloadpacket.__name__ in self.WAITING
        return func(*args, **(kwargs or {}))


def _reads(steps: int, recipe: str) -> int:
    data = labelled_images(8)
    wanted = (
        Recipe.paper(beta=0.1, epochs=steps)
        if recipe == "paper"
        else Recipe(size=0.5, steps=steps, images_per_step=4, ablation=recipe)
    )
    with _Reads() as reads:
        learn_gates(build(TinyResNet), data, tasks=[0, 1], recipe=wanted)
    return reads.n


@pytest.mark.parametrize("width", ["", "narrowed"])
@pytest.mark.parametrize("recipe", ["optimal", "mean", "paper"])
def test_no_step_waits_for_the_device(
    recipe: str, width: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (selection, constants):
        monkeypatch.setattr(module, "any_of", lambda values: True)  # as on a GPU
    if width == "narrowed":  # as on a wide network
        for name, value in {"MAX_PAIR_CANDIDATES": 2, "SPARE_CANDIDATES": 1}.items():
            monkeypatch.setattr(selection, name, value)
        for module in (selection, constants):
            monkeypatch.setattr(module, "MIN_CHANNELS_TO_NARROW", 1)
    assert _reads(8, recipe) == _reads(4, recipe)


def test_reads_are_counted() -> None:
    """On a CPU, where looking costs nothing, rounds of exchanges end when nothing is gained."""
    assert all(_reads(8, recipe) > _reads(4, recipe) for recipe in ("mean", "optimal"))


def test_looking_or_not_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(size=0.5, steps=12, images_per_step=4)
    expected = learn_gates(build(TinyCNN), labelled_images(12), recipe=recipe)
    monkeypatch.setattr(selection, "any_of", lambda values: True)
    found = learn_gates(build(TinyCNN), labelled_images(12), recipe=recipe)
    assert all(torch.equal(found[s.name], expected[s.name]) for s in found.sites)


def test_hundreds_of_steps_leave_nothing_behind() -> None:
    recipe = Recipe(size=0.5, steps=150, images_per_step=2)
    net = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    x, labels = labelled_images(12)
    session = Session(net, (x[:, :, 0, 0].float(), labels), [0], recipe)
    counts: dict[int, int] = {}
    done = 0

    def look(n: int) -> None:
        nonlocal done
        done += n
        if done in (50, 100):  # the last step also ranks the channels
            gc.collect()
            counts[done] = sum(isinstance(item, Tensor) for item in gc.get_objects())

    session.learn(advance=look)
    # Two numbers a step are handed out at the end: the curves.
    assert counts[100] - counts[50] == 2 * 50


@pytest.mark.parametrize("n_tasks", [1, 2, 3])
def test_images_passed(n_tasks: int) -> None:
    """Each image of each step once through the gated network, once ever through the whole one."""
    model, data = build(TinyCNN), labelled_images(12)
    recipe = Recipe(size=0.5, ablation="zero", steps=5, images_per_step=4)
    sites = find_gate_sites(model, data[0])
    seen = {True: 0, False: 0}

    def note(module: nn.Module, args: Any) -> None:
        seen[torch.is_grad_enabled()] += len(args[0])

    session = Session(model, data, list(range(n_tasks)), recipe, sites)
    with contextlib.ExitStack() as stack:
        stack.callback(session.network.model.register_forward_pre_hook(note).remove)
        session.learn()
    assert seen[True] == n_tasks * 5 * 4
    assert seen[False] <= 12


# -- Evaluation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ablation", [None, "other_mean"])
def test_equal_networks_are_run_once(ablation: str | None) -> None:
    model, data = build(TinyCNN), labelled_images(12)
    sites = find_gate_sites(model, data[0])
    kept = [{"relu1": [0, 1], "relu2": [2, 3, 5]}, {"relu1": [4], "relu2": []}]
    archs = [
        SubArchitecture.from_kept(kept[i], sites, task=k)
        for i, k in ((0, 0), (1, 1), (0, 1), (0, 2), (1, 0))
    ]
    fitted = None if ablation is None else fit_ablation(model, sites, data, kind=ablation)
    sweep(model, archs[:1], data)  # once for each network it is asked what batches it takes
    n_run = 0

    def note(module: nn.Module, args: Any) -> None:
        nonlocal n_run
        n_run += len(args[0])

    handle = model.register_forward_pre_hook(note)
    found = sweep(model, archs, data, ablation=fitted, run=RunOptions(batch_size=5))
    handle.remove()
    # What stands in place of a channel differs from task to task with other_mean.
    assert n_run == 12 * (1 + (2 if ablation is None else 5))
    for row, arch in enumerate(archs):
        alone = sweep(model, arch, data, ablation=fitted)
        column = found.columns.index(arch.task)
        torch.testing.assert_close(found.gated[row, :, column], alone.gated[0, :, 0])
        torch.testing.assert_close(found.gated_margin[row], alone.gated_margin[0])
        assert torch.equal(found.gated_class[row], alone.gated_class[0])


# -- The page -------------------------------------------------------------------------------------


def test_documentation_runs() -> None:
    from pathlib import Path

    text = (Path(__file__).parents[1] / "docs" / "speed.md").read_text()
    blocks = text.split("```python\n")[1:]
    assert blocks
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(block.split("```")[0], {})
