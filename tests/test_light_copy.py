"""Copies that do the same with less work: the same outputs and gradients, or no copy at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nad_attr import GateSite, Recipe, RunOptions, find_gate_sites, learn_gates
from nad_attr.gating.hooks import frozen
from nad_attr.learning.engine import Network
from nad_attr.learning.fast.light_copy import light_copy
from nad_attr.learning.fast.pooling import MaxPool2d
from nad_attr.learning.session import Session
from tests.helpers import (
    TinyCNN,
    TinyResNet,
    assert_model_untouched,
    build,
    images,
    labelled_images,
)


def _norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def _plain(forward: Callable[[Any, Tensor], Tensor] | None = None) -> nn.Module:
    """conv - bn - relu - pool - linear, and what a subclass does in between."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.bn = nn.BatchNorm2d(4)
            self.relu = nn.ReLU(inplace=True)
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(self.conv(x)) if forward is None else forward(self, x)
            return self.linear(self.relu(x).mean((2, 3)))

    return build(Net)


def _gradient(network: Network, x: Tensor, *, seed: int = 1) -> tuple[Tensor, Tensor]:
    n = sum(site.n_channels for site in network.sites)
    gates = torch.rand(len(x), n, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
    classes = torch.arange(len(x))[:, None] % 3
    with frozen(network.model):
        return network.output_and_gradient((x,), gates, classes, torch.ones_like(classes).bool())


@pytest.mark.slow
@pytest.mark.parametrize("make", [TinyCNN, TinyResNet])
@pytest.mark.parametrize("mean", [False, True])
def test_outputs_and_gradients_are_the_same(make: Callable[[], nn.Module], mean: bool) -> None:
    model, x = build(make), images(5)
    sites = find_gate_sites(model, x)
    networks = [Network(model, sites), Network(model, sites)]
    with assert_model_untouched(model, x):
        networks[1].lighten([(x[:2],)])
        assert networks[1].model is not model
        assert _norms(networks[1].model) == 0 < _norms(model)
        if mean:
            for network in networks:
                network.set_means({s.name: torch.linspace(-1, 1, s.n_channels) for s in sites})
        expected, found = (_gradient(network, x) for network in networks)
        torch.testing.assert_close(networks[1]((x,)), networks[0]((x,)), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_learned_gates_are_the_same(ablation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(TinyResNet), labelled_images(30)
    recipe = Recipe(size=0.5, steps=12, images_per_step=6, ablation=ablation)  # type: ignore[arg-type]
    found = learn_gates(model, data, recipe=recipe)
    monkeypatch.setattr(Network, "lighten", lambda self, inputs: None)
    expected = learn_gates(model, data, recipe=recipe)
    for site in expected.sites:
        assert torch.equal(found[site.name], expected[site.name])


@pytest.mark.parametrize(
    "site",
    [GateSite("conv", 4, 1), GateSite("bn", 4, 1, at_input=True)],
    ids=["behind the convolution", "before the BatchNorm"],
)
def test_a_gate_between_the_two_stays_there(site: GateSite) -> None:
    model, x = _plain(), images(4)
    network = Network(model, [site])
    network.lighten([(x[:2],)])
    assert network.model is model
    # Elsewhere they may be merged, and the gate is where it was.
    behind = Network(model, [GateSite("bn", 4, 1)])
    expected = _gradient(behind, x)
    behind.lighten([(x[:2],)])
    assert isinstance(behind.model.get_submodule("bn"), nn.Identity)
    torch.testing.assert_close(_gradient(behind, x), expected, rtol=1e-12, atol=1e-12)


def test_a_gate_on_a_container_between_the_two_stays_there() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.bn(net.inner(x))

    model = _plain(forward)
    model.inner = nn.Sequential(model.get_submodule("conv")).eval()
    network = Network(model, [GateSite("inner", 4, 1)])
    network.lighten([(images(2),)])
    assert network.model is model


def _beside(net: Any, x: Tensor) -> Tensor:
    made = net.conv(x)
    return net.bn(made) + made.abs()


def _asks(net: Any, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.bn.running_mean.sum()


def _twice(net: Any, x: Tensor) -> Tensor:
    return net.bn(net.conv(x)) + net.bn(net.conv(x.flip(3)))


def _another(net: Any, x: Tensor) -> Tensor:
    return net.bn(2 * net.conv(x))


def _by_name(net: Any, x: Tensor) -> Tensor:
    return net.bn(input=net.conv(x))


@pytest.mark.parametrize("forward", [_beside, _asks, _twice, _another, _by_name])
def test_left_alone_where_merging_would_change_something(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    model, x = _plain(forward), images(3)
    with assert_model_untouched(model, x):
        assert light_copy(model, lambda net: net(x)) is None


def test_what_only_other_passes_show_is_seen() -> None:
    """A pass in which nothing tells the two apart is not enough."""
    model, x = _plain(_beside), images(3)
    assert light_copy(model, lambda net: net(x) * 0) is not None
    assert light_copy(model, lambda net: net(x) * 0, [lambda net: net(x)]) is None


def _chosen() -> nn.Module:
    """Bright images go through another BatchNorm."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)
            self.dark, self.bright = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.relu = nn.ReLU()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            norm = self.bright if x.mean() > 1 else self.dark
            return self.linear(self.relu(norm(self.conv(x))).mean((2, 3)))

    return build(Net)


def test_a_batchnorm_that_other_images_choose_is_seen() -> None:
    model, (x, labels) = _chosen(), labelled_images(24)
    x[labels == 1] += 3  # neither the first nor the last image
    assert labels[0] != 1 != labels[-1]
    with assert_model_untouched(model, x):
        session = Session(model, (x, labels), [0, 1], recipe=Recipe(size=0.5, steps=2))
    assert session.network.model is model
    dark = Session(model, (x, labels), [0, 2], recipe=Recipe(size=0.5, steps=2))
    assert dark.network.model is not model


class _Coarse(TorchDispatchMode):
    """Convolutions of float32 as on a GPU with TF32: their inputs have 10 bits of mantissa."""

    n = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "convolution" in func.name() and args[0].dtype == torch.float32:
            _Coarse.n += 1
            args = (*(_rounded(a) for a in args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))


def _rounded(x: Tensor) -> Tensor:
    return ((x.detach().view(torch.int32) + 4096) & ~8191).view(torch.float32)


@pytest.mark.slow
def test_tf32_does_not_keep_from_merging() -> None:
    """Its rounding is above any bound that would tell two networks apart."""
    model, x = build(TinyResNet).float(), 3 * images(4, dtype=torch.float32)
    network = Network(model, find_gate_sites(model, x))
    with assert_model_untouched(model, x), _Coarse():
        network.lighten([(x,)])
        assert _Coarse.n
        merged = network((x,))
        expected = Network(model, network.sites)((x,))
    assert _norms(network.model) == 0
    assert network.dtype == next(network.model.parameters()).dtype == torch.float32
    difference = float((merged - expected).abs().max() / expected.abs().max())
    assert 1e-4 < difference < 1e-2, "as coarse as TF32 is"
    assert not network._copies


def test_a_network_that_has_to_be_in_float32_is_compared_as_it_is() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.bn(net.conv(x)) @ torch.eye(6)

    model, x = _plain(forward).float(), images(2, dtype=torch.float32)
    network = Network(model, [GateSite("relu", 4, 1)])
    network.lighten([(x,)])
    assert _norms(network.model) == 0


def _hooked(model: nn.Module) -> nn.Module:
    model.get_submodule("bn").register_forward_hook(lambda module, args, output: None)
    return model


def _uncopyable(model: nn.Module) -> nn.Module:
    model.generator = (i for i in range(3))  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("change", [_hooked, _uncopyable, nn.Module.half])
def test_networks_that_are_left_alone(change: Callable[[nn.Module], nn.Module]) -> None:
    model, x = change(_plain()), images(3)
    x = x.to(next(model.parameters()).dtype)
    assert light_copy(model, lambda net: net(x)) is None


def test_errors_of_the_network_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        light_copy(_plain(), lambda net: net(torch.zeros(1, 2, 8, 8, dtype=torch.float64)))


def test_no_copy_with_a_function_in_between() -> None:
    model, x = _plain(), images(2)
    network = Network(
        model, [GateSite("relu", 4, 1)], run=RunOptions(forward_func=lambda x: model(x))
    )
    network.lighten([(x,)])
    assert network.model is model


def test_autocast_keeps_batchnorm() -> None:
    model, x = _pooling().float(), images(2, dtype=torch.float32)
    network = Network(model, [GateSite("2", 4, 1)], run=RunOptions(amp=torch.bfloat16))
    expected = network((x,))
    network.lighten([(x,)])
    assert [type(m) for m in network.model][:4] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, MaxPool2d]  # type: ignore[arg-type]
    assert torch.equal(network((x,)), expected)


def _pooling() -> nn.Module:
    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
            nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1), nn.Flatten(), nn.Linear(16, 3),
        )  # fmt: skip

    return build(make)


def test_tensors_are_shared() -> None:
    model, x = _pooling(), images(2)
    copied: Any = light_copy(model, lambda net: net(x))
    assert copied[4].weight is model.get_submodule("4").weight
    assert copied[0].weight is not model.get_submodule("0").weight
    assert isinstance(copied[3], MaxPool2d)


def test_pooling_alone_needs_no_weights_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of VGG16 take more memory than a step does."""
    model, x, copies, plain = _pooling(), images(2), [], nn.Module.double
    monkeypatch.setattr(nn.Module, "double", lambda self: copies.append(self) or plain(self))
    for folding, n in ((False, 0), (True, 1)):
        copied: Any = light_copy(model, lambda net: net(x), folding=folding)
        assert isinstance(copied[3], MaxPool2d)
        assert len(copies) == n


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2},
        {"kernel_size": (2, 2), "stride": [2, 2]},
        {"kernel_size": 3, "stride": 2, "padding": 1},
        {"kernel_size": 3, "stride": 1},
        {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
        {"kernel_size": 2, "stride": 2, "padding": 1},
        {"kernel_size": 2, "ceil_mode": True},
        {"kernel_size": 2, "dilation": 2},
        {"kernel_size": 5, "stride": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 9, 7), (3, 8, 8)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_pooling_is_pytorchs_bit_by_bit(
    options: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """Many numbers are equal, as behind a ReLU: the first of the highest has the gradient."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 4, shape, generator=generator).to(dtype)
    if x.ndim == 4:
        x = x.to(memory_format=layout)
    ours, torchs = MaxPool2d(**options), nn.MaxPool2d(**options)
    expected = torchs(x)
    assert torch.equal(ours(x), expected)
    weights = torch.randn(expected.shape, generator=generator).to(dtype)
    gradients = []
    for pool in (ours, torchs):
        leaf = x.clone().requires_grad_(True)
        outputs = pool(leaf)
        assert torch.equal(outputs, expected)
        gradients += torch.autograd.grad(outputs, leaf, weights)
    assert torch.equal(*gradients)


def test_pooling_keeps_three_bytes_for_four_numbers() -> None:
    """As bytes: whether the left, and whether the upper one is the higher."""
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        MaxPool2d(2)(x)
    assert sum(t.numel() * t.element_size() for t in kept) == 3 * x.numel() // 4
    assert all(t.dtype == torch.bool for t in kept)


def test_pooling_refuses_what_pytorch_refuses() -> None:
    for x in (torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 4, 1, requires_grad=True)):
        with pytest.raises(RuntimeError, match="size is too small"):
            MaxPool2d(2)(x)


def test_pooling_returns_indices_as_asked() -> None:
    x = torch.randn(1, 2, 4, 4)
    for one, other in zip(
        MaxPool2d(2, return_indices=True)(x), nn.MaxPool2d(2, return_indices=True)(x), strict=True
    ):
        assert torch.equal(one, other)


def test_float32_and_layout() -> None:
    """Weights keep their layout, and what rounding makes of the outputs is small."""
    model = _plain().float().to(memory_format=torch.channels_last)
    x = images(3, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    copied = light_copy(model, lambda net: net(x))
    assert copied is not None
    weight: Any = copied.get_submodule("conv").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(copied(x), model(x))
