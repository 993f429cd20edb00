"""Networks whose gates are multiplied into their weights: what gated heat-maps have to equal."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from tests import helpers

SITES = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]


class Plain(nn.Module):
    """conv-BN-ReLU-conv-ReLU-pool-linear without padding, so that a constant folds into a bias."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, bias=bias)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, bias=bias)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, 3, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.linear(self.pool(x).flatten(1))


def plain(bias: bool = True) -> Plain:
    """A Plain network in float64; with ``bias=False`` no layer adds anything."""
    model = helpers.build(lambda: Plain(bias))
    # Zennit 0.5 merges a BatchNorm up to a factor sqrt(1 + eps).
    model.bn1.eps = 1e-30
    if not bias:
        model.bn1.bias.data.zero_()
        model.bn1.running_mean.zero_()
    return model


def random_gates(soft: bool, seed: int = 0) -> dict[str, Tensor]:
    """Half of the channels of each site closed, the others open; soft: any number in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    gates = {}
    for site in SITES:
        gate = torch.rand(site.n_channels, generator=generator, dtype=torch.float64)
        gates[site.name] = gate if soft else (gate > gate.median()).double()
    return gates


def random_means(seed: int = 1) -> dict[str, Tensor]:
    """Positive means for each channel."""
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: torch.rand(site.n_channels, generator=generator, dtype=torch.float64)
        for site in SITES
    }


def with_constants() -> tuple[TaskGates, list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Gates of two tasks with constants of their own, and both task by task in float64."""
    masks = [random_gates(False, seed) for seed in (0, 7)]
    values = [random_means(1), random_means(9)]
    gates = TaskGates(
        {s.name: torch.stack([mask[s.name] for mask in masks]).float() for s in SITES},
        SITES,
        [0, 1],
        means=random_means(3),
        constants={s.name: torch.stack([value[s.name] for value in values]) for s in SITES},
    )
    held = gates.constants
    assert held is not None
    return gates, masks, [{name: v[k].double() for name, v in held.items()} for k in (0, 1)]


def into_next(
    model: Plain, gates: dict[str, Tensor], means: dict[str, Tensor] | None = None
) -> Plain:
    """The gates in the weights of the layers that read the gated channels."""
    folded = copy.deepcopy(model)
    for layer, site in ((folded.conv2, "relu1"), (folded.linear, "relu2")):
        weight, gate = layer.weight.data, gates[site]
        if means is not None:
            constant = (1 - gate) * means[site]
            per_channel = weight.flatten(2).sum(2) if weight.ndim == 4 else weight
            added = per_channel @ constant
            if layer.bias is None:
                layer.bias = nn.Parameter(added)
            else:
                layer.bias.data = layer.bias.data + added
        layer.weight.data = weight * gate.reshape(1, -1, *[1] * (weight.ndim - 2))
    return folded


def into_same(model: Plain, gates: dict[str, Tensor]) -> Plain:
    """The gates in the layers that make the gated channels: relu(g z) = g relu(z)."""
    folded = copy.deepcopy(model)
    g1, g2 = gates["relu1"], gates["relu2"]
    folded.bn1.weight.data = folded.bn1.weight.data * g1
    folded.bn1.bias.data = folded.bn1.bias.data * g1
    folded.conv2.weight.data = folded.conv2.weight.data * g2[:, None, None, None]
    if folded.conv2.bias is not None:
        folded.conv2.bias.data = folded.conv2.bias.data * g2
    return folded


RESIDUAL_SITES = [GateSite("relu", 4, 1), GateSite("layer2.0", 6, 1)]


def residual(soft: bool) -> tuple[nn.Module, dict[str, Tensor], nn.Module]:
    """A residual network with in-place and functional ReLUs, gates, and both in one."""
    model = helpers.build(helpers.TinyResNet)
    generator = torch.Generator().manual_seed(3)
    gates = {
        site.name: torch.rand(site.n_channels, generator=generator, dtype=torch.float64)
        for site in RESIDUAL_SITES
    }
    if not soft:
        gates = {name: (gate > gate.median()).double() for name, gate in gates.items()}
    folded = copy.deepcopy(model)
    stem, block = gates["relu"], gates["layer2.0"]
    for norm, gate in ((folded.bn1, stem), (folded.layer2[0].bn2, block)):
        norm.weight.data *= gate
        norm.bias.data *= gate
    folded.layer2[0].shortcut.weight.data *= block[:, None, None, None]
    for network in (model, folded):
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-30
    return model, gates, folded
