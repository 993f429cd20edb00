"""A smaller network computes what the gated one does, and holds only what that needs."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import GateSite, TaskGates, find_gate_sites, gated
from nad_attr.export.combining import combine, united
from nad_attr.export.costs import latency, summary
from nad_attr.export.exporting import cut
from nad_attr.export.files import save
from nad_attr.export.forgetting import forget
from nad_attr.export.tracing import ExportError, Graph, traced
from nad_attr.gates.sub_architecture import SubArchitecture
from tests.helpers import TinyCNN, TinyResNet, assert_model_untouched, build, images

# ---------------------------------------------------------------------------------------------
# Random small networks
# ---------------------------------------------------------------------------------------------


class Plain(nn.Sequential):
    def __init__(self, draw: random.Random) -> None:
        width = draw.choice([5, 6, 8])
        layers: list[nn.Module] = []
        n_in = 3
        for _ in range(3):
            kernel = draw.choice([1, 3])
            layers += [
                nn.Conv2d(
                    n_in,
                    width,
                    kernel,
                    padding=draw.choice([0, kernel // 2]),
                    stride=draw.choice([1, 1, 2]),
                    bias=draw.random() < 0.5,
                ),
                nn.BatchNorm2d(width) if draw.random() < 0.6 else nn.Identity(),
                draw.choice([nn.ReLU(inplace=True), nn.GELU(), nn.Hardswish(), nn.PReLU(width)]),
            ]
            n_in = width
        layers.append(nn.AvgPool2d(2, 1, 1) if draw.random() < 0.5 else nn.MaxPool2d(2, 1, 1))
        super().__init__(
            *layers,
            nn.AdaptiveAvgPool2d(draw.choice([1, 2])),
            nn.Flatten(),
            nn.LazyLinear(7),
            nn.ReLU(),
            nn.Linear(7, 3),
        )
        self.eval()(torch.zeros(1, 3, 8, 8))


class Residual(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(6, 4, 1, bias=False),
                nn.BatchNorm2d(4),
                nn.ReLU(),
                nn.Conv2d(4, 6, 3, padding=1, groups=draw.choice([1, 2])),
                nn.BatchNorm2d(6),
            )
            for _ in range(2)
        )
        self.ends = nn.ModuleList(draw.choice([nn.ReLU(), nn.Identity()]) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block, end in zip(self.blocks, self.ends, strict=True):
            x = end(x + block(x))
        return self.head(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(5 + 3 * i), nn.ReLU(), nn.Conv2d(5 + 3 * i, 3, 3, padding=1)
            )
            for i in range(2)
        )
        self.transition = nn.Sequential(nn.BatchNorm2d(11), nn.ReLU(), nn.Conv2d(11, 6, 1))
        self.pool = nn.AvgPool2d(2)
        self.last = nn.Sequential(nn.Conv2d(12, 6, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        x = self.pool(self.transition(x))
        x = self.last(torch.cat([x, x.flip(3)], 1))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    """Inverted residuals with squeeze-and-excitation, and channels shuffled."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.grow = nn.Sequential(nn.Conv2d(6, 8, 1), nn.ReLU6())
        times = draw.choice([1, 2])
        self.deep = nn.Conv2d(8, 8 * times, 3, padding=1, groups=8, stride=draw.choice([1, 2]))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(8 * times, 3, 1), nn.ReLU(),
            nn.Conv2d(3, 8 * times, 1), nn.Hardsigmoid(),
        )  # fmt: skip
        self.shrink = nn.Conv2d(8 * times, 6, 1)
        self.grouped = nn.Conv2d(6, 6, 3, padding=1, groups=draw.choice([2, 3]))
        self.act = nn.SiLU()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.deep(self.grow(self.stem(x)))
        x = self.shrink(x * self.squeeze(x))
        b, c, h, w = x.shape
        left, right = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w).chunk(2, 1)
        x = self.act(self.grouped(torch.cat([left, right * 2.0], 1)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, draw: random.Random) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 5, 8))
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(4))
        self.attend = nn.ModuleList(nn.MultiheadAttention(8, 2, batch_first=True) for _ in range(2))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)) for _ in range(2)
        )
        self.ends = nn.ModuleList(nn.Identity() for _ in range(2))
        self.start = nn.Dropout(0.1)
        self.scale = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.places
        x = self.start(x)
        for i in range(2):
            y = self.norms[2 * i](x)
            x = x + self.attend[i](y, y, y, need_weights=False)[0]
            x = self.ends[i](x + self.scale * self.mlps[i](self.norms[2 * i + 1](x)))
        return self.head(x[:, 0])


KINDS = {kind.__name__: kind for kind in (Plain, Residual, Dense, Depthwise, Attention)}


@functools.cache
def random_network(kind: str, seed: int) -> tuple[nn.Module, list[GateSite], Graph]:
    """A network, gates at all modules where one can stand, and its trace."""
    model = build(lambda: KINDS[kind](random.Random(seed)), seed)
    x = images(1)
    calls: dict[str, list[object]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: calls.setdefault(name, []).append(output)
        )
        for name, module in model.named_modules()
        if name not in ("", "head", "7", "14") and not any(module.children())
    ]
    model(x)
    for handle in handles:
        handle.remove()
    # Called once, with one tensor: an Identity returns the very tensor that it is given.
    once = {id(v[0]): n for n, v in reversed(calls.items()) if len(v) == 1}
    names = [n for n, v in calls.items() if isinstance(v[0], Tensor) and n in once.values()]
    seen = find_gate_sites(model, x, layers=names)
    return model, seen, traced(model, seen, (x,))


def difference(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b).abs().max() / b.abs().max().clamp(min=1e-9))


def corners(test: Callable[..., None]) -> Callable[..., None]:
    """One channel kept and all, on every kind of network, whatever else is drawn."""
    for kind in KINDS:
        for share in ("one", "all"):
            test = example(kind=kind, mask_seed=1, share=share, used=1.0, closed="constants")(test)
    return test


@corners
@given(
    kind=st.sampled_from(sorted(KINDS)),
    mask_seed=st.integers(0, 10**6),
    share=st.sampled_from([0.2, 0.5, 0.9, "one", "all", "none"]),
    used=st.sampled_from([0.3, 1.0]),
    closed=st.sampled_from(["zero", "constants"]),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_any_masks_of_any_network(
    kind: str, mask_seed: int, share: float | str, used: float, closed: str
) -> None:
    # Each trace takes nearly a second: two networks of the kinds that differ most.
    model, sites, graph = random_network(kind, mask_seed % 2 * (kind in ("Plain", "Residual")))
    generator = torch.Generator().manual_seed(mask_seed)
    masks, constants = {}, {}
    for site in sites:
        n = site.n_channels
        mask = torch.rand(n, generator=generator) < (share if isinstance(share, float) else -1)
        if share == "all" or float(torch.rand((), generator=generator)) > used:
            mask[:] = True
        elif share == "one":
            mask[int(torch.randint(n, (), generator=generator))] = True
        masks[site.name] = mask
        constants[site.name] = torch.randn(n, generator=generator)
    arch = SubArchitecture(masks, sites, means=constants if closed == "constants" else None)
    x = images(3, seed=mask_seed)
    small = cut(arch, model, (x[:1],), graph, None, check=False)
    with torch.no_grad():
        with gated(model, arch):
            expected = model(x)
        assert difference(small(x), expected) < 1e-9
        assert difference(small(x[:1]), expected[:1]) < 1e-9


# ---------------------------------------------------------------------------------------------
# What is cut
# ---------------------------------------------------------------------------------------------


def half(model: nn.Module, *, task: int | None = 1, means: bool = True) -> SubArchitecture:
    """Every other channel of each site."""
    sites = find_gate_sites(model, images(1).to(next(model.parameters()).dtype))
    masks = {s.name: torch.arange(s.n_channels) % 2 == 0 for s in sites}
    constants = {s.name: torch.linspace(-1, 1, s.n_channels) for s in sites}
    return SubArchitecture(masks, sites, task=task, means=constants if means else None)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def test_blocks_are_cut_between_their_sites_and_the_model_is_untouched() -> None:
    model = build(TinyResNet)
    arch = half(model, means=False)
    with assert_model_untouched(model):
        small = arch.export(model, images(1))
    own = {t.untyped_storage().data_ptr() for t in model.state_dict().values()}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in small.state_dict().values())
    found = shapes(small)
    assert found["conv1.weight"] == (2, 3, 3, 3)
    # What a block reads and what it adds are kept channels; its inside is not gated.
    assert found["layer1.0.conv1.weight"] == (4, 2, 3, 3)
    assert found["layer1.0.conv2.weight"] == (2, 4, 3, 3)
    assert found["layer1.0.bn2.running_var"] == (2,)
    assert found["layer2.0.shortcut.weight"] == (3, 2, 1, 1)
    assert found["linear.weight"] == (3, 3)
    made = summary(small)
    assert made.stays_whole == ()
    assert made.tensors["layer1.0.conv2.weight"] == {
        "of": "layer1.0.conv2.weight",
        "rows": [0, 2],
    }
    assert made.tensors["linear.weight"] == {"of": "linear.weight", "columns": [0, 2, 4]}
    assert made.sites["layer2.0"] == [0, 2, 4]


def test_costs_by_hand() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 5),
    )  # fmt: skip
    net.double().eval()
    arch = SubArchitecture.from_kept({"1": [1, 3]}, [GateSite("1", 4)])
    cost = arch.cost(net, images(1))
    assert (cost.whole.parameters, cost.smaller.parameters) == (4 * 28 + 25, 2 * 28 + 15)
    assert cost.whole.multiply_adds == 4 * 27 * 64 + 20
    assert cost.smaller.multiply_adds == 2 * 27 * 64 + 10
    assert [b.name for b in cost.blocks] == ["1", "output"]
    assert cost.blocks[0].smaller.multiply_adds == 2 * 27 * 64


def test_constants_at_zero_padding() -> None:
    """A closed channel at 1 beside zero padding: the sum differs at the border, by hand."""
    net = nn.Sequential(nn.Identity(), nn.Conv2d(2, 1, 3, padding=1, bias=False)).double().eval()
    nn.init.ones_(net[1].weight)
    arch = SubArchitecture.from_kept(
        {"0": [0]}, [GateSite("0", 2)], means={"0": torch.tensor([0.0, 1.0])}
    )
    small = arch.export(net, torch.zeros(1, 2, 4, 4, dtype=torch.float64))
    edge = torch.tensor([[4, 6, 6, 4], [6, 9, 9, 6], [6, 9, 9, 6], [4, 6, 6, 4]]).double()
    assert torch.equal(small(torch.zeros(1, 2, 4, 4, dtype=torch.float64))[0, 0], edge)
    assert shapes(small)["1.weight"] == (1, 1, 3, 3)
    assert shapes(small)["1.border"] == (1, 1, 2, 2)  # rows that repeat stand there once


def test_inner_widths_that_nothing_reads_are_removed() -> None:
    """Two branches side by side: the second is closed, and gone with its first layer."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv2d(3, 4, 1)
            self.two = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3, padding=2))
            self.join = nn.Identity()
            self.head = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.join(torch.cat([self.one(x), self.two(x)], 1))
            return self.head(x.mean((2, 3)))

    model = build(Branches)
    arch = SubArchitecture.from_kept({"join": [0, 1]}, [GateSite("join", 8)])
    assert shapes(arch.export(model, images(1))) == {
        **{"one.weight": (2, 3, 1, 1), "one.bias": (2,)},
        **{"head.weight": (2, 2), "head.bias": (2,)},
    }


def test_nothing_kept_is_a_constant() -> None:
    model = build(TinyCNN)
    arch = half(model)
    nothing = SubArchitecture.from_kept({}, arch.sites, means=arch.means)
    small = nothing.export(model, images(1))
    with nothing.applied(model), torch.no_grad():
        expected = model(images(4))
    assert torch.allclose(small(images(4)), expected)
    assert summary(small).smaller.multiply_adds == 0


def test_task_column_and_merged_batchnorm() -> None:
    model = build(TinyResNet)
    arch, x = half(model, task=2), images(5)
    with arch.applied(model), torch.no_grad():
        expected = model(x)
    small = arch.export(model, x, head="task", merge_bn=True)
    assert small(x).shape == (5, 1)
    assert torch.allclose(small(x)[:, 0], expected[:, 2], rtol=1e-10)
    assert not any("running" in name or "bn" in name for name in shapes(small))
    assert summary(small).outputs == (2,)


def test_what_has_no_rule_stays_whole_and_is_named() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.head = nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.first(x).sort(-1).values)

    model = build(Sorted)
    arch = SubArchitecture.from_kept({"first": [0, 3, 4]}, [GateSite("first", 6)])
    x = torch.randn(3, 4, dtype=torch.float64)
    small = arch.export(model, x)
    with arch.applied(model), torch.no_grad():
        assert torch.allclose(small(x), model(x))
    assert summary(small).stays_whole == ("sort",)
    assert shapes(small)["first.weight"] == (3, 4)
    assert shapes(small)["head.weight"] == (3, 6)
    assert "stays whole" in str(summary(small))


def test_float32_and_a_summary_that_survives() -> None:
    model = build(TinyCNN).float()
    small = half(model).export(model, images(1).float())
    assert summary(small).difference < 1e-5
    for again in (pickle.loads(pickle.dumps(small)), copy.deepcopy(small)):
        assert summary(again) == summary(small)
    assert "multiply-adds" in summary(small)._repr_html_()
    with pytest.raises(ValueError, match="no summary"):
        summary(nn.Linear(1, 1))


def test_bad_input_is_named() -> None:
    model = build(TinyCNN)
    arch = half(model, task=None)
    with pytest.raises(ValueError, match="no task"):
        arch.export(model, images(1), head="task")
    with pytest.raises(ValueError, match="head must be"):
        arch.export(model, images(1), head="column")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="example_inputs"):
        arch.export(model, ())
    with pytest.raises(ValueError, match="train mode"):
        arch.export(build(TinyCNN).train(), images(1))
    with pytest.raises(ValueError, match="outputs 0 to 2, got 9"):
        half(model, task=9).export(model, images(1), head="task")

    class Looks(TinyCNN):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if float(x.sum()) > 0 else super().forward(-x)

    with pytest.raises(ExportError, match="depends on the images' values"):
        arch.export(build(Looks), images(1))


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def test_files_run_without_this_library(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    model = build(TinyCNN)
    arch, x = half(model), images(4)
    small = arch.export(model, x)
    with arch.applied(model), torch.no_grad():
        expected = model(x)
    assert [p.name for p in save(small, tmp_path / "a.pt2", x)] == ["a.pt2", "a.pt2.json"]
    assert torch.allclose(torch.export.load(tmp_path / "a.pt2").module()(x), expected)
    names = [p.name for p in save(small, tmp_path / "b.safetensors", x)]
    assert names == ["b.py", "b.safetensors", "b.safetensors.json"]
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(small))
    torch.save((x, expected), tmp_path / "x.pt")
    script = """
import sys, pickle, torch, importlib.util
from safetensors.torch import load_file
x, expected = torch.load("x.pt")
spec = importlib.util.spec_from_file_location("b", "b.py")
b = importlib.util.module_from_spec(spec); spec.loader.exec_module(b)
network = b.Network()
network.load_state_dict(load_file("b.safetensors"))
assert torch.allclose(network(x), expected)
assert torch.allclose(pickle.load(open("c.pkl", "rb"))(x), expected)
assert "nad_attr" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)
    content = json.loads((tmp_path / "b.safetensors.json").read_text())
    assert content["sites"]["relu1"] == [0, 2, 4]
    assert content["format"] == "safetensors"
    save(small, tmp_path / "b.safetensors", x)  # its own files are replaced
    (tmp_path / "mine.py").write_text("import torch\n")
    with pytest.raises(FileExistsError, match=r"mine.py would be written beside"):
        save(small, tmp_path / "mine.safetensors", x)
    assert (tmp_path / "mine.py").read_text() == "import torch\n"
    (tmp_path / "a.onnx.json").write_text("[1]")
    with pytest.raises(FileExistsError, match=r"a.onnx.json .* is not replaced"):
        save(small, tmp_path / "a.onnx", x)
    with pytest.raises(ValueError, match="must end in one of"):
        save(small, tmp_path / "c.bin", x)
    with pytest.raises(ValueError, match="no folder"):
        save(small, tmp_path / "d" / "c.pt2", x)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("onnxscript") is None, reason="needs onnxscript")
def test_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = build(TinyCNN).float()
    arch, x = half(model), images(4).float()
    save(arch.export(model, x), tmp_path / "a.onnx", x)
    with arch.applied(model), torch.no_grad():
        expected = model(x)
    session = runtime.InferenceSession(str(tmp_path / "a.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Building blocks
# ---------------------------------------------------------------------------------------------


def two_tasks(model: nn.Module) -> dict[int, SubArchitecture]:
    sites = find_gate_sites(model, images(1))
    return {
        task: SubArchitecture(
            {s.name: torch.arange(s.n_channels) % 3 != task for s in sites},
            sites,
            task=task,
            means={s.name: torch.full((s.n_channels,), 0.1 * task) for s in sites},
        )
        for task in (0, 2)
    }


def test_side_by_side_is_each_tasks_own_network() -> None:
    model, x = build(TinyCNN), images(4)
    archs = two_tasks(model)
    both = combine(model, archs, x, how="side by side")
    with torch.no_grad():
        for i, (task, arch) in enumerate(archs.items()):
            with arch.applied(model):
                assert torch.allclose(both(x)[:, i], model(x)[:, task])
    assert summary(both).outputs == (0, 2)
    assert b"nad_attr" not in pickle.dumps(both)


def test_a_part_of_another_network_stands_beside_those_of_one() -> None:
    model, other, x = build(TinyCNN), build(TinyCNN, 1), images(4)
    arch = two_tasks(model)[0]
    theirs = two_tasks(other)[2].export(other, x, head="task")
    both = combine(model, {0: arch, 2: theirs}, x, how="side by side")
    with arch.applied(model), torch.no_grad():
        assert torch.allclose(both(x)[:, :1], model(x)[:, :1])
        assert torch.allclose(both(x)[:, 1:], theirs(x))
    made = summary(both)
    assert made.sites["part1.relu1"] == summary(theirs).sites["relu1"]
    assert made.whole.parameters == 2 * summary(theirs).whole.parameters
    alone = combine(model, {2: theirs}, x, how="side by side")
    assert torch.equal(alone(x), theirs(x))
    theirs.get_parameter("conv2.weight").data.zero_()  # its own weights, not ours
    assert not torch.equal(alone(x), theirs(x))
    with pytest.raises(ValueError, match="side by side"):
        combine(model, {0: arch, 2: theirs}, x)
    with pytest.raises(ValueError, match="export it with images of that size"):
        combine(model, {2: theirs}, x[..., :4], how="side by side")
    with pytest.raises(ValueError, match="no summary"):
        combine(model, {2: nn.Linear(2, 1)}, x, how="side by side")
    with pytest.raises(TypeError, match="at least one task"):
        combine(model, {}, x)


def test_union_keeps_what_any_task_needs() -> None:
    model, x = build(TinyCNN), images(4)
    archs = two_tasks(model)
    union = united(archs)
    assert torch.equal(union["relu2"], archs[0]["relu2"] | archs[2]["relu2"])
    assert float(union.means["relu2"][0]) == pytest.approx(0.1)
    with union.applied(model), torch.no_grad():
        expected = model(x)[:, [0, 2]]
    assert torch.allclose(combine(model, archs, x)(x), expected)


def test_calibration_makes_logits_comparable() -> None:
    """Outputs whose scales and shifts were spoilt come back in order."""
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 3)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.diag(torch.tensor([5.0, 1.0, 0.2])))
        net[1].bias.copy_(torch.tensor([30.0, 0.0, -4.0]))
    labels = torch.arange(60) % 3
    x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0)).double() * 0.3
    x[torch.arange(60), labels] += 2.0
    site = [GateSite("0", 3)]
    archs = {t: SubArchitecture({"0": torch.ones(3, dtype=torch.bool)}, site) for t in range(3)}
    raw = combine(net, archs, x)
    assert (raw(x).argmax(1) == labels).float().mean() < 0.5
    fitted = combine(net, archs, x, calibration=(x, labels))
    assert (fitted(x).argmax(1) == labels).float().mean() > 0.95
    with pytest.raises(ValueError, match="no image of task"):
        combine(net, archs, x, calibration=(x[labels < 2], labels[labels < 2]))
    group = combine(net, {(0, 2): archs[0], 1: archs[1]}, x, how="side by side")
    assert torch.allclose(group(x)[:, 0], net(x)[:, [0, 2]].logsumexp(1))


def test_forget_closes_what_only_one_class_needs() -> None:
    # Channel c feeds output c alone; channel 3 feeds all.
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 3, bias=False)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.cat([torch.eye(3), torch.ones(3, 1)], 1))
    kept = torch.cat([torch.eye(3), torch.ones(3, 1)], 1) * 0.8 + 0.1
    gates = TaskGates({"0": kept}, [GateSite("0", 4)], [0, 1, 2])
    x = torch.cat([torch.eye(3), torch.ones(3, 1)], 1).double()
    result = forget(net, gates, 1, data=(x, torch.arange(3)))
    assert result.architecture["0"].tolist() == [True, False, True, True]
    assert result.own == (1.0, 0.0)
    assert result.others == (1.0, 1.0)
    assert "1.000 -> 0.000" in str(result)
    assert forget(net, gates, 1, shared_by=2).n_closed == 2
    with pytest.raises(ValueError, match="no channel is kept"):
        forget(net, TaskGates({"0": torch.ones(2, 4)}, [GateSite("0", 4)], [0, 1]), 0)


def test_latency_is_measured_in_turns() -> None:
    times = latency({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}, torch.zeros(1, 2), seconds=0.01)
    assert set(times) == {"a", "b"}
    assert min(times.values()) > 0
