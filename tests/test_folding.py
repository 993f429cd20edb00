"""BatchNorm layers merged into convolutions: the same outputs and gradients, or not at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nad_attr import GateSite, Recipe, find_gate_sites, learn_gates
from nad_attr.engine import Network
from nad_attr.folding import folded
from nad_attr.gating import frozen
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


@pytest.mark.parametrize("make", [TinyCNN, TinyResNet])
@pytest.mark.parametrize("mean", [False, True])
def test_outputs_and_gradients_are_the_same(make: Callable[[], nn.Module], mean: bool) -> None:
    model, x = build(make), images(5)
    sites = find_gate_sites(model, x)
    networks = [Network(model, sites), Network(model, sites)]
    with assert_model_untouched(model, x):
        networks[1].fold((x[:2],))
        assert networks[1].model is not model
        assert _norms(networks[1].model) == 0 < _norms(model)
        if mean:
            for network in networks:
                network.set_means({s.name: torch.linspace(-1, 1, s.n_channels) for s in sites})
        expected, found = (_gradient(network, x) for network in networks)
        torch.testing.assert_close(networks[1]((x,)), networks[0]((x,)), rtol=1e-12, atol=1e-12)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_learned_gates_are_the_same(ablation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build(TinyResNet), labelled_images(30)
    recipe = Recipe(size=0.5, steps=12, images_per_step=6, ablation=ablation)  # type: ignore[arg-type]
    found = learn_gates(model, data, recipe=recipe)
    monkeypatch.setattr(Network, "fold", lambda self, inputs: None)
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
    network.fold((x[:2],))
    assert network.model is model
    # Elsewhere they may be merged, and the gate is where it was.
    behind = Network(model, [GateSite("bn", 4, 1)])
    expected = _gradient(behind, x)
    behind.fold((x[:2],))
    assert isinstance(behind.model.get_submodule("bn"), nn.Identity)
    torch.testing.assert_close(_gradient(behind, x), expected, rtol=1e-12, atol=1e-12)


def test_a_gate_on_a_container_between_the_two_stays_there() -> None:
    def forward(net: Any, x: Tensor) -> Tensor:
        return net.bn(net.inner(x))

    model = _plain(forward)
    model.inner = nn.Sequential(model.get_submodule("conv")).eval()
    network = Network(model, [GateSite("inner", 4, 1)])
    network.fold((images(2),))
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


@pytest.mark.parametrize("forward", [_beside, _asks, _twice, _another])
def test_left_alone_where_merging_would_change_something(
    forward: Callable[[Any, Tensor], Tensor],
) -> None:
    model, x = _plain(forward), images(3)
    with assert_model_untouched(model, x):
        assert folded(model, lambda net: net(x)) is None


def test_what_only_other_passes_show_is_seen() -> None:
    """A pass in which nothing tells the two apart is not enough."""
    model, x = _plain(_beside), images(3)
    assert folded(model, lambda net: net(x) * 0) is not None
    assert folded(model, lambda net: net(x) * 0, lambda net: net(x)) is None


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
    assert folded(model, lambda net: net(x)) is None


def test_errors_of_the_network_are_its_own() -> None:
    with pytest.raises(RuntimeError, match="channels"):
        folded(_plain(), lambda net: net(torch.zeros(1, 2, 8, 8, dtype=torch.float64)))


def test_neither_under_autocast_nor_with_a_function_in_between() -> None:
    model, x = _plain(), images(2)
    sites = [GateSite("relu", 4, 1)]
    for options in ({"amp": torch.bfloat16}, {"forward_func": lambda x: model(x)}):
        network = Network(model, sites, **options)  # type: ignore[arg-type]
        network.fold((x,))
        assert network.model is model


def test_float32_and_layout() -> None:
    """Weights keep their layout, and what rounding makes of the outputs is small."""
    model = _plain().float().to(memory_format=torch.channels_last)
    x = images(3, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
    lighter = folded(model, lambda net: net(x))
    assert lighter is not None
    weight: Any = lighter.get_submodule("conv").weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(lighter(x), model(x))
