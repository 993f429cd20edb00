"""Gate sites: found by the data flow, checked if named, refused with a remedy."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr.gating.hooks import gated
from nad_attr.sites.finding import find_gate_sites, paper_sites
from nad_attr.sites.site import GateSite, SiteError, unwrap
from nad_attr.sites.tracing import Node, _Recorder, _through_view, tensors_in, trace
from tests import helpers

IMAGE = torch.zeros(1, *helpers.IMAGE_SHAPE, dtype=torch.float64)


def names(sites: list[GateSite]) -> list[str]:
    return [site.name for site in sites]


def described(sites: list[GateSite]) -> list[tuple[str, int, int]]:
    return [(site.name, site.n_channels, site.channel_dim) for site in sites]


# ---------------------------------------------------------------------------------------------
# Networks of every family
# ---------------------------------------------------------------------------------------------


def plain() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)),
        *(nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2)),
        *(nn.Flatten(), nn.Linear(24, 10), nn.ReLU(), nn.Dropout(), nn.Linear(10, 3)),
    )


class DenseBlock(nn.Module):
    def __init__(self, n: int, growth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(n + i * growth),
                nn.ReLU(),
                nn.Conv2d(n + i * growth, growth, 3, padding=1),
            )
            for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], dim=1)
        return x


class Dense(nn.Module):
    """Its last ReLU is functional."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = DenseBlock(4, 2)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.block(self.stem(x)))).mean((2, 3)))


class Branches(nn.Module):
    """Two branches side by side, as in an Inception block."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(n, 3, 1), nn.ReLU())
        self.three = nn.Sequential(
            nn.Conv2d(n, 2, 1), nn.ReLU(), nn.Conv2d(2, 4, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.one(x), self.three(x)], dim=1)


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Branches(3), Branches(7)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.second(self.first(x))).mean((2, 3)))


class SearchedCell(nn.Module):
    def __init__(self, before: int, last: int) -> None:
        super().__init__()
        self.before, self.last = nn.Conv2d(before, 2, 1), nn.Conv2d(last, 3, 1)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        return torch.cat([F.relu(self.before(before)), F.relu(self.last(last))], dim=1)


class Searched(nn.Module):
    """Cells that read two predecessors: after the stem, only the last one is a cut point."""

    def __init__(self) -> None:
        super().__init__()
        self.stem0 = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4))
        self.stem1 = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
        self.cells = nn.ModuleList([SearchedCell(4, 4), SearchedCell(4, 5), SearchedCell(5, 5)])
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.stem0(x)
        last = self.stem1(before)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.head(last.mean((2, 3)))


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        n = 2 * n_in
        self.skip = n_in == n_out
        self.expand = nn.Sequential(nn.Conv2d(n_in, n, 1), nn.BatchNorm2d(n), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(n, n, 3, padding=1, groups=n), nn.Hardswish())
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, n, 1), nn.Sigmoid())
        self.project = nn.Sequential(nn.Conv2d(n, n_out, 1), nn.BatchNorm2d(n_out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = self.project(y * self.squeeze(y))
        return x + y if self.skip else y


class Mobile(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(InvertedResidual(3, 4), InvertedResidual(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x).mean((2, 3)))


class Merging(nn.Module):
    """Channels last, with positions merged into channels as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 4, 2, stride=2)
        self.norm = nn.LayerNorm(4)
        self.wide_norm = nn.LayerNorm(16)
        self.reduction = nn.Linear(16, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.embed(x).permute(0, 2, 3, 1))
        corners = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
        x = F.gelu(self.reduction(self.wide_norm(torch.cat(corners, -1))))
        return self.head(x.mean((1, 2)))


class TwoInputs(nn.Module):
    """Late fusion of two images, a constant as third argument, a mapping as output."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.fused = nn.Sequential(nn.Linear(8, 5), nn.ReLU())
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        z = torch.cat([self.left(x), self.right(y)], dim=1).mean((2, 3))
        return {"features": z, "logits": self.head(self.fused(z)) * scale}


def convolutional(dim: int) -> nn.Module:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dim - 1]
    pool = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)[dim - 1]
    return nn.Sequential(
        conv(2, 4, 3), norm(4), nn.ReLU(), conv(4, 5, 3), nn.ReLU(), pool(1), nn.Flatten(),
        nn.Linear(5, 3),
    )  # fmt: skip


class Normalized(nn.Module):
    """Normalizes images before the network they are for."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((3, 1, 1), 0.5))
        self.backbone = backbone

    def forward(self, x: Tensor) -> Any:
        return self.backbone((x - self.mean) / 2)


FAMILIES: dict[str, tuple[Callable[[], nn.Module], list[tuple[str, int, int]]]] = {
    "plain": (plain, [("3", 4, 1), ("6", 6, 1), ("9", 10, 1)]),
    "cnn": (helpers.TinyCNN, [("relu1", 6, 1), ("relu2", 8, 1)]),
    "residual": (
        helpers.TinyResNet,
        [("relu", 4, 1), ("layer1.0", 4, 1), ("layer1.1", 4, 1), ("layer2.0", 6, 1)],
    ),
    "dense": (Dense, [("stem", 4, 1), ("norm", 10, 1)]),
    "inception": (Inception, [("first", 7, 1), ("pool", 7, 1)]),
    # The in-place ReLU of stem1 overwrites what stem0 returned.
    "cells": (
        Searched,
        [("stem1.0", 4, 1), ("stem1", 4, 1), *((f"cells.{i}", 5, 1) for i in range(3))],
    ),
    "depthwise": (
        Mobile,
        [("blocks.0.depthwise.1", 6, 1), ("blocks.0", 4, 1), ("blocks.1", 4, 1)],
    ),
    "transformer": (helpers.TinyViT, [("patches", 8, 1), ("blocks.0", 8, -1), ("norm", 8, -1)]),
    "channels last": (Merging, [("norm", 4, -1), ("reduction", 6, -1)]),
}


@pytest.fixture(params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> tuple[nn.Module, list[tuple[str, int, int]]]:
    make, expected = FAMILIES[request.param]
    return helpers.build(make), expected


def test_families_get_their_sites(
    family: tuple[nn.Module, list[tuple[str, int, int]]],
) -> None:
    model, expected = family
    assert described(find_gate_sites(model, IMAGE)) == expected
    # The pass on real tensors sees the same as the one on fake tensors.
    assert described(find_gate_sites(RealOnly(model).eval(), IMAGE)) == [
        (f"inner.{name}", n, dim) for name, n, dim in expected
    ]


def test_closed_gates_change_the_output_and_open_gates_do_not(
    family: tuple[nn.Module, list[tuple[str, int, int]]],
) -> None:
    model, _ = family
    images = helpers.images(4)
    sites = find_gate_sites(model, images)
    with torch.no_grad():
        logits = model(images)
        ones = {s.name: torch.ones(s.n_channels, dtype=torch.float64) for s in sites}
        with gated(model, ones, sites=sites):
            assert torch.equal(model(images), logits)
        for site in sites:
            changed = 0
            for channel in range(site.n_channels):
                gate = ones[site.name].clone()
                gate[channel] = 0
                with gated(model, {site.name: gate}, sites=[site]):
                    changed += not torch.equal(model(images), logits)
            # A channel may be dead behind a ReLU on these four images.
            assert changed >= site.n_channels / 2, site


def test_a_closed_site_cuts_the_output_off_from_the_input(
    family: tuple[nn.Module, list[tuple[str, int, int]]],
) -> None:
    model, _ = family
    images = helpers.images(2)
    for site in find_gate_sites(model, images):
        if site.name.startswith(("cells.0", "cells.1", "stem1")):
            continue  # others run past these
        with gated(model, {site.name: torch.zeros(site.n_channels)}, sites=[site]):
            first, second = model(images)
        assert torch.equal(first, second), site


class RealOnly(nn.Module):
    """Looks at values, which fake tensors do not have."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x) if bool(x.sum() > -1e9) else x


# ---------------------------------------------------------------------------------------------
# Other shapes of networks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_convolutions_of_every_dimension(dim: int) -> None:
    sites = find_gate_sites(convolutional(dim).eval(), torch.zeros(2, 2, *(9,) * dim))
    assert described(sites) == [("2", 4, 1), ("4", 5, 1)]


def test_mlp_and_no_vectors() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3), nn.Softmax(1)).eval()
    assert described(find_gate_sites(model, torch.zeros(1, 5))) == [("1", 4, 1)]
    with pytest.raises(SiteError, match="vectors=False"):
        find_gate_sites(model, torch.zeros(1, 5), vectors=False)
    sites = find_gate_sites(plain().eval(), torch.zeros(1, 3, 8, 8), vectors=False)
    assert names(sites) == ["3", "6"]


def test_tokens_with_a_linear_embedding() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval()
    tokens = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    sites = find_gate_sites(model, tokens)
    assert names(sites) == [
        "0", "1.layers.0.norm1", "1.layers.0", "1.layers.1.norm1", "1.layers.1",
    ]  # fmt: skip
    assert all(site.channel_dim == -1 for site in sites)
    # These blocks have a fast path that calls no submodule: gates inside must fire all the same.
    with torch.no_grad(), gated(model, {s.name: torch.zeros(8) for s in sites}, sites=sites):
        assert torch.equal(model(tokens), model[2].bias.expand(2, 7, 3))


def test_wrappers_in_front_change_only_the_names(
    family: tuple[nn.Module, list[tuple[str, int, int]]],
) -> None:
    model, expected = family
    wrapped = Normalized(model).double().eval()
    assert described(find_gate_sites(wrapped, IMAGE)) == [
        (f"backbone.{name}", n, dim) for name, n, dim in expected
    ]


def test_several_inputs_constants_and_a_mapping_as_output() -> None:
    model = TwoInputs().eval()
    images = (torch.zeros(1, 3, 6, 6), torch.zeros(1, 3, 6, 6))
    assert names(find_gate_sites(model, images)) == ["left", "right", "fused.1"]
    same = find_gate_sites(model, images, additional_forward_args=2.0)
    assert names(same) == ["left", "right", "fused.1"]
    # A tensor given as a further argument is a constant, not an input to cut off.
    assert names(find_gate_sites(model, images[0], additional_forward_args=images[1])) == [
        "left.1", "fused.1",
    ]  # fmt: skip


@dataclass
class Output:
    scores: Tensor
    hidden: tuple[Tensor, ...] = ()


class Structured(nn.Module):
    """Returns a dataclass with a hidden tensor beside the scores."""

    def __init__(self, *, hidden: bool) -> None:
        super().__init__()
        self.conv, self.relu, self.last = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3)
        self.head, self.hidden = nn.Linear(5, 3), hidden

    def forward(self, x: Tensor) -> Output:
        hidden = self.relu(self.conv(x))
        scores = self.head(F.relu(self.last(hidden)).mean((2, 3)))
        return Output(scores, (hidden,) if self.hidden else ())


def test_every_tensor_of_a_structured_output_counts() -> None:
    image = torch.zeros(1, 3, 8, 8)
    assert names(find_gate_sites(Structured(hidden=False).eval(), image)) == ["relu", "last"]
    # The hidden tensor leaves before the last convolution.
    assert names(find_gate_sites(Structured(hidden=True).eval(), image)) == ["relu"]


class TupleBlock(nn.Module):
    """A block that returns a tuple, as those of Hugging Face's transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.output = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.output(x + self.inner(x)),)


class TupleBlocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.blocks = nn.ModuleList([TupleBlock(), TupleBlock()])
        self.head = nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            (x,) = block(x)
        return self.head(x[:, 0])


def test_blocks_that_return_tuples_are_gated_inside() -> None:
    model, ids = TupleBlocks().eval(), torch.zeros(2, 5, dtype=torch.long)
    assert described(find_gate_sites(model, ids)) == [
        ("embed", 4, -1), ("blocks.0.output", 4, -1), ("blocks.1.output", 4, -1),
    ]  # fmt: skip
    with pytest.raises(SiteError, match=r"inside it, such as 'blocks.0.output', instead"):
        find_gate_sites(model, ids, layers="blocks.0")


class Twice(nn.Module):
    """One block called twice, and one layer whose weights only are used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU())
        self.outer = nn.ModuleDict({"unused": nn.Conv2d(4, 4, 1)})
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.block(self.stem(x)))
        x = F.conv2d(x, self.outer["unused"].weight)
        return self.head(x.mean((2, 3)))


def test_modules_called_twice_are_no_sites() -> None:
    assert names(find_gate_sites(Twice().eval(), torch.zeros(1, 3, 8, 8))) == ["stem"]


class Views(nn.Module):
    """Writes into views and slices, so that other tensors change too."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        self.relu(x.view(-1))  # changes x, which is used later
        out = torch.zeros_like(x)
        out[:, :, 1:] = self.second(x)[:, :, 1:]
        out[:, :, :1] = x[:, :, :1]
        return self.head(self.third(out).mean((2, 3)))


def test_writes_into_views_are_followed() -> None:
    model = Views().double().eval()
    sites = find_gate_sites(model, IMAGE)
    # conv and relu share their channels, but relu returns a flat view without channels.
    assert described(sites) == [("conv", 4, 1), ("third", 6, 1)]


# ---------------------------------------------------------------------------------------------
# Named layers
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def vit() -> nn.Module:
    return helpers.build(helpers.TinyViT)


def test_named_layers_come_in_forward_order(vit: nn.Module) -> None:
    layers = ["norm", vit.get_submodule("blocks.0.norm1"), GateSite("patches", 8)]
    assert described(find_gate_sites(vit, IMAGE, layers=layers)) == [
        ("patches", 8, 1), ("blocks.0.norm1", 8, -1), ("norm", 8, -1),
    ]  # fmt: skip
    assert names(find_gate_sites(vit, IMAGE, layers="blocks")) == ["blocks"]
    assert names(find_gate_sites(vit, IMAGE, layers=vit.get_submodule("blocks.1"))) == ["blocks.1"]


def test_found_sites_can_be_given_back(
    family: tuple[nn.Module, list[tuple[str, int, int]]],
) -> None:
    model, _ = family
    sites = find_gate_sites(model, IMAGE)
    assert find_gate_sites(model, IMAGE, layers=sites[::-1]) == sites
    assert find_gate_sites(model, IMAGE, layers=names(sites)) == sites


def test_at_input(vit: nn.Module) -> None:
    sites = find_gate_sites(vit, IMAGE, layers=["blocks.1", "norm", "patches"], at_input=True)
    assert sites == [
        GateSite("patches", 3, 1, True),
        GateSite("blocks.1", 8, -1, True),
        GateSite("norm", 8, -1, True),
    ]
    assert find_gate_sites(vit, IMAGE, layers=sites) == sites
    images = helpers.images(2)
    with gated(vit, {"norm": torch.zeros(8)}, sites=sites[2:]):
        first, second = vit(images)
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("block.0", "no module 'block.0'; did you mean 'blocks.0'"),
        ("blocks.0.attention", "returns a tuple with 1 tensor.*around it, 'blocks.0', instead"),
        (["blocks.1", "blocks"], "'blocks.1' and 'blocks' return the same tensor"),
        (["norm", "norm"], "'norm' is given twice"),
        ([], "layers is empty"),
        ("", "the whole model cannot be a gate site"),
        (nn.ReLU(), re.escape("layer ReLU() is not part of the model")),
        (3, "names, modules or GateSites, got int"),
        ([3], "names, modules or GateSites, got int"),
        (GateSite("norm", 9, -1), "said to have 9 channels, .* has 8 on axis -1"),
    ],
)
def test_layers_are_refused_with_a_remedy(vit: nn.Module, layers: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        find_gate_sites(vit, IMAGE, layers=layers)


def test_layers_called_twice_never_or_unheard_are_refused() -> None:
    model, image = Twice().eval(), torch.zeros(1, 3, 8, 8)
    with pytest.raises(SiteError, match=r"'block.1' is called 2 times .*sites found"):
        find_gate_sites(model, image, layers="block.1")
    with pytest.raises(SiteError, match=r"'outer.unused' is never called"):
        find_gate_sites(model, image, layers="outer.unused")
    model = TwoInputs().eval()
    with pytest.raises(SiteError, match="'right' returns does not depend on the input"):
        find_gate_sites(model, image, layers="right", additional_forward_args=image + 1)


def test_attention_has_no_single_input(vit: nn.Module) -> None:
    with pytest.raises(SiteError, match=r"is given a tuple with 3 tensors.*'blocks.1', instead"):
        find_gate_sites(vit, IMAGE, layers="blocks.1.attention", at_input=True)
    with pytest.raises(SiteError, match="at_input=True needs layers="):
        find_gate_sites(vit, IMAGE, at_input=True)


class BatchSecond(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x.transpose(0, 1)).mean(0))


def test_the_batch_must_come_first() -> None:
    with pytest.raises(SiteError, match=r"shape \(7, 2, 4\), whose first axis is not"):
        find_gate_sites(BatchSecond().eval(), torch.zeros(2, 7, 5), layers="embed")


class Unclear(nn.Module):
    """Nothing says which axis of its one hidden tensor holds the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.head = nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.relu(x).flatten(1))


def test_unknown_axes_are_asked_for() -> None:
    model, image = Unclear().eval(), torch.zeros(1, 3, 4, 4)
    with pytest.raises(SiteError, match=re.escape("channel_dim={'relu': 1}, or -1")):
        find_gate_sites(model, image, layers="relu")
    for dim, site in [
        (1, GateSite("relu", 3, 1)),
        ({"relu": -1}, GateSite("relu", 4, -1)),
        (3, GateSite("relu", 4, -1)),
        (-2, GateSite("relu", 4, 2)),
    ]:
        assert find_gate_sites(model, image, layers="relu", channel_dim=dim) == [site]
    with pytest.raises(SiteError, match="channel_dim 0 is not a channel axis"):
        find_gate_sites(model, image, layers="relu", channel_dim=0)
    with pytest.raises(SiteError, match="channel_dim names 'rel', which is not a site"):
        find_gate_sites(model, image, layers="relu", channel_dim={"relu": 1, "rel": 1})


class Folded(nn.Module):
    """Lays out the outputs of a matrix product over three axes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(24, 48))
        self.relu = nn.ReLU()
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x.flatten(1), self.weight).view(-1, 4, 3, 2)
        return self.head(self.relu(x).flatten(1))


def test_unknown_axes_of_found_sites_are_asked_for() -> None:
    model, image = Folded().eval(), torch.zeros(1, 3, 4, 4)
    with pytest.raises(SiteError, match=re.escape("channel_dim={'relu': 1}, or -1")):
        find_gate_sites(model, image)
    sites = find_gate_sites(model, image, channel_dim={"relu": 1})
    assert described(sites) == [("relu", 4, 1)]


def test_channel_dim_overrides_what_is_found(vit: nn.Module) -> None:
    sites = find_gate_sites(vit, IMAGE, channel_dim={"norm": 1})
    assert described(sites) == [("patches", 8, 1), ("blocks.0", 8, -1), ("norm", 4, 1)]


# ---------------------------------------------------------------------------------------------
# Models and inputs
# ---------------------------------------------------------------------------------------------


def test_wrapped_models(vit: nn.Module) -> None:
    expected = find_gate_sites(vit, IMAGE)
    for wrapped in (nn.DataParallel(vit), torch.compile(vit), nn.DataParallel(torch.compile(vit))):
        assert unwrap(wrapped) is vit
        assert find_gate_sites(wrapped, IMAGE) == expected
        for prefix in ("module.", "_orig_mod.", "module._orig_mod."):
            assert names(find_gate_sites(wrapped, IMAGE, layers=f"{prefix}norm")) == ["norm"]


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.train(), r"the model is in train mode; call model.eval\(\) first"),
        (lambda m: m.norm.train() and m, "module 'norm' is in train mode"),
        (lambda m: torch.jit.trace(nn.ReLU().eval(), IMAGE), "torch.jit"),
        (lambda m: nn.Sequential(nn.LazyConv2d(3, 1), m).eval(), "uninitialized"),
        (lambda m: m.forward, "must be a torch.nn.Module, got method"),
        (lambda m: nn.Linear(7, 3).eval(), "cannot be run on example_inputs of shape"),
        (lambda m: nn.Identity().eval(), "no gate site found.*layers="),
        (lambda m: nn.Linear(8, 3).double().eval(), "no gate site found.*layers="),
    ],
)
def test_models_are_refused_with_a_remedy(
    vit: nn.Module, change: Callable[[nn.Module], Any], message: str
) -> None:
    with pytest.raises(SiteError, match=message):
        find_gate_sites(change(vit), IMAGE)


@pytest.mark.parametrize("inputs", [3, (), (IMAGE, None), {"x": None}])
def test_inputs_must_be_tensors(vit: nn.Module, inputs: Any) -> None:
    with pytest.raises(SiteError, match="example_inputs must be a tensor or a tuple of tensors"):
        find_gate_sites(vit, inputs)


class Detached(nn.Module):
    """Uses NumPy inside its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.relu(x).mean((2, 3)).numpy())


def test_a_broken_flow_of_data_is_said() -> None:
    with pytest.raises(SiteError, match="does not depend on the inputs by PyTorch operators"):
        find_gate_sites(Detached().eval(), torch.zeros(1, 3, 4, 4))
    sites = find_gate_sites(
        Detached().eval(), torch.zeros(1, 3, 4, 4), layers="relu", channel_dim=1
    )
    assert names(sites) == ["relu"]


def test_meta_tensors_do(vit: nn.Module) -> None:
    expected = find_gate_sites(vit, IMAGE)
    assert find_gate_sites(vit, IMAGE.to("meta")) == expected
    with torch.device("meta"):
        bare = helpers.TinyViT().eval()
    assert find_gate_sites(bare, torch.zeros(1, 3, 8, 8)) == expected
    with pytest.raises(SiteError, match="give real tensors instead of meta tensors"):
        find_gate_sites(RealOnly(vit).eval(), IMAGE.to("meta"))


class Keeping(nn.Module):
    """Keeps tensors, writes into its input and a buffer, draws numbers, all in eval mode."""

    def __init__(self, *, looks: bool) -> None:
        super().__init__()
        self.register_buffer("n_calls", torch.zeros(1))
        self.inner, self.looks = helpers.TinyCNN(), looks
        self.kept: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.n_calls += 1
        x.add_(1)
        self.kept.append(x)
        self.last = x
        self.new = x
        if self.looks and bool(x.isnan().any()):
            raise ValueError("nan")
        return self.inner(x + torch.rand_like(x))


@pytest.mark.parametrize("looks", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_changed(
    looks: bool, fails: bool, assert_model_untouched: Callable[..., Any]
) -> None:
    model = helpers.build(lambda: Keeping(looks=looks))
    image = torch.full_like(IMAGE, torch.nan) if fails and looks else IMAGE
    image = image[:, :2] if fails and not looks else image
    state, drawn = torch.get_rng_state(), random.getstate()
    attributes = {key: value for key, value in vars(model).items() if key != "kept"}
    fast_path = torch.backends.mha.get_fastpath_enabled()
    with assert_model_untouched(model, image):
        if fails:
            with pytest.raises(SiteError):
                find_gate_sites(model, image)
        else:
            assert names(find_gate_sites(model, image)) == ["inner.relu1", "inner.relu2"]
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == drawn
    assert model.kept == []
    assert model.last is None
    assert not hasattr(model, "new")
    assert all(vars(model)[key] is value for key, value in attributes.items())
    assert not model.n_calls.any()
    assert torch.backends.mha.get_fastpath_enabled() is fast_path
    assert image.grad_fn is None


def test_it_works_within_inference_mode_and_autocast(vit: nn.Module) -> None:
    expected = find_gate_sites(vit, IMAGE)
    with torch.inference_mode():
        assert find_gate_sites(vit, IMAGE) == expected
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_gate_sites(vit, IMAGE) == expected


def test_gate_sites_check_themselves() -> None:
    for wrong in (("", 3, 1), ("a", 0, 1), ("a", 3, 0)):
        with pytest.raises(SiteError):
            GateSite(*wrong)
    assert issubclass(SiteError, ValueError)
    assert len({GateSite("a", 3), GateSite("a", 3), GateSite("a", 3, -1)}) == 2


# ---------------------------------------------------------------------------------------------
# The trace
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "axes", "expected"),
    [
        ((2, 6, 5, 5), (2, 6, 25), {1}, {1}),
        ((2, 6, 5, 5), (2, 150), {1}, {1}),
        ((2, 6, 1, 1), (2, 6), {1}, {1}),
        ((2, 6), (2, 6, 1, 1), {1}, {1}),
        ((2, 6, 4, 4), (2, 2, 3, 4, 4), {1}, {1, 2}),
        ((2, 3, 2, 4, 4), (2, 6, 4, 4), {1, 2}, {1}),
        ((1, 7, 8), (7, 8), {2}, {1}),
        ((7, 8), (1, 7, 8), {1}, {2}),
        ((2, 7, 8), (2, 7, 2, 4), {2}, {2, 3}),
        ((2, 4, 7, 3), (8, 7, 3), {1, 3}, {2}),
        ((2, 8, 8, 6), (2, 2, 4, 2, 4, 6), {3}, {5}),
        ((2, 6, 5), (2, 6, 5), set(), set()),
        ((0, 6), (6, 0), {1}, set()),
    ],
)
def test_channels_are_followed_through_views(
    old: tuple[int, ...], new: tuple[int, ...], axes: set[int], expected: set[int]
) -> None:
    assert _through_view(old, new, frozenset(axes)) == expected


def traced_axes(function: Callable[[Tensor], Tensor]) -> tuple[set[int], bool]:
    """Axes of the channels after a function of a convolution's output, and whether it mixes."""
    x = F.conv2d(torch.zeros(2, 3, 6, 6), torch.zeros(8, 3, 3, 3))

    class Model(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            return function(F.conv2d(image, torch.zeros(8, 3, 3, 3)))

    traced = trace(Model().eval(), (torch.zeros(2, 3, 6, 6),))
    (sink,) = traced.sinks
    assert traced.nodes[sink].shape == tuple(function(x).shape)
    # The convolution in front mixes too.
    return set(traced.nodes[sink].axes), sum(node.mixes for node in traced.nodes) > 1


@pytest.mark.parametrize(
    ("function", "axes", "mixes"),
    [
        (lambda x: x.relu_().mul(2).add(x), {1}, False),
        (lambda x: x.permute(0, 2, 3, 1), {3}, False),
        (lambda x: x.flatten(2).transpose(1, 2), {2}, False),
        (lambda x: x.mean((2, 3)), {1}, False),
        (lambda x: x.mean((2, 3), keepdim=True), {1}, False),
        (lambda x: x.permute(0, 2, 3, 1)[:, 0], {2}, False),
        (lambda x: x.mean(1, keepdim=True), set(), True),
        (lambda x: x.amax(), set(), True),
        (lambda x: x[:, :, ::2].unsqueeze(1).squeeze(1), {1}, False),
        (lambda x: torch.stack([x, x], dim=1), {2}, False),
        (lambda x: torch.cat([x, x], dim=1), {1}, False),
        (lambda x: x.flatten(2).mT @ torch.zeros(8, 5), {2}, True),
        (lambda x: F.linear(x.mean((2, 3)), torch.zeros(5, 8)), {1}, True),
        (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (8,)), {3}, False),
        (lambda x: F.layer_norm(x, x.shape[1:]), {1}, False),
        (lambda x: F.group_norm(x, 2), {1}, False),
        (lambda x: F.conv2d(x, torch.zeros(8, 1, 3, 3), groups=8), {1}, False),
        (lambda x: F.conv2d(x, torch.zeros(8, 4, 3, 3), groups=2), {1}, True),
        (lambda x: F.channel_shuffle(x, 2), {1}, False),
        (lambda x: F.interpolate(F.max_pool2d(x, 2), scale_factor=2), {1}, False),
        (lambda x: F.pad(x, (1, 1)).softmax(1).chunk(2, 1)[0], {1}, False),
        (lambda x: x.max(dim=3).values.roll(1, 2), {1}, False),
        (lambda x: torch.maximum(x, x.sigmoid()).expand(3, 2, 8, 4, 4), {2}, False),
        (lambda x: F.scaled_dot_product_attention(*[x.flatten(2).mT[:, None]] * 3), {3}, True),
    ],
)
def test_channels_are_followed_through_operators(
    function: Callable[[Tensor], Tensor], axes: set[int], mixes: bool
) -> None:
    assert traced_axes(function) == (axes, mixes)


def test_tensors_are_found_in_structures() -> None:
    a, b, c = torch.zeros(1), torch.ones(1), torch.ones(2)
    assert list(tensors_in({"x": (a, [None, b])})) == [a, b]
    assert list(tensors_in(Output(a, (b, c)))) == [a, b, c]
    assert list(tensors_in("text")) == []


def test_recorder_forgets_overwritten_values() -> None:
    recorder = _Recorder()
    x = torch.ones(2, 3)
    recorder.add(x, Node("input", (), (2, 3), frozenset()))
    y = torch.zeros(2, 3)
    with recorder:
        y.copy_(x)
        assert recorder.knows(y)
        y.zero_()
        assert not recorder.knows(y)
        z = torch.zeros_like(x)
    assert not recorder.knows(z)


# ---------------------------------------------------------------------------------------------
# The paper's networks and torchvision's
# ---------------------------------------------------------------------------------------------

PAPER = {
    "vgg16": (13, 4224),
    "resnet50": (17, 15168),
    "densenet121": (8, 3776),
}
LARGE = torch.zeros(1, 3, 224, 224, device="meta")


def on_meta(architecture: str) -> nn.Module:
    with torch.device("meta"):
        torchvision = pytest.importorskip("torchvision")
        return torchvision.models.get_model(architecture, weights=None).eval()


@pytest.mark.parametrize("architecture", list(PAPER))
def test_paper_sites_exist_and_are_the_found_channels(architecture: str) -> None:
    listed = paper_sites(architecture)
    assert (len(listed), sum(site.n_channels for site in listed)) == PAPER[architecture]
    model = on_meta(architecture)
    assert find_gate_sites(model, LARGE, layers=listed) == listed
    found = find_gate_sites(model, LARGE, vectors=False)
    if architecture == "densenet121":
        # Behind the BatchNorm and ReLU after a dense block, rather than before them.
        later = {f"features.denseblock{i}": f"features.transition{i}.relu" for i in (1, 2, 3)}
        later["features"] = "features.norm5"
        expected = [GateSite(later.get(s.name, s.name), s.n_channels) for s in listed]
    else:
        expected = listed
    assert found == expected


def test_unknown_paper_architectures_are_refused() -> None:
    with pytest.raises(SiteError, match="'alexnet'; it has 'vgg16', 'resnet50'"):
        paper_sites("alexnet")


@pytest.mark.parametrize(
    ("architecture", "n_sites", "n_channels", "some"),
    [
        ("alexnet", 7, 9344, [("features.2", 64, 1), ("classifier.5", 4096, 1)]),
        ("googlenet", 12, 5808, [("inception3a", 256, 1), ("maxpool4", 832, 1)]),
        ("mobilenet_v2", 25, 5168, [("features.2.conv.1", 96, 1), ("features.3", 24, 1)]),
        ("shufflenet_v2_x0_5", 18, 2776, [("stage2.0", 48, 1)]),
        ("convnext_tiny", 22, 8064, [("features.1.0", 96, 1), ("features.2.1", 192, 1)]),
        ("swin_t", 16, 5856, [("features.1.0", 96, -1), ("features.2", 192, -1)]),
        ("vit_b_32", 13, 9984, [("conv_proj", 768, 1), ("encoder.ln", 768, -1)]),
    ],
)
def test_torchvision_models(
    architecture: str, n_sites: int, n_channels: int, some: list[tuple[str, int, int]]
) -> None:
    sites = find_gate_sites(on_meta(architecture), LARGE)
    assert (len(sites), sum(site.n_channels for site in sites)) == (n_sites, n_channels)
    assert set(some) <= set(described(sites))


class _Attention(nn.Module):
    """Attention by convolutions: its values, a product of matrices, are read by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.act, self.proj = nn.Conv2d(3, 12, 1), nn.Hardswish(), nn.Conv2d(4, 8, 1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(2).chunk(3, 1)
        mixed = (v @ (q.transpose(1, 2) @ k).softmax(-1).transpose(1, 2)).view(-1, 4, *x.shape[2:])
        return self.head(self.proj(self.act(mixed)).mean((2, 3)))


def test_the_axis_that_a_product_leaves_open_is_that_of_the_convolution_behind_it() -> None:
    sites = find_gate_sites(_Attention().eval(), torch.rand(2, 3, 6, 6))
    assert ("act", 4, 1) in [(site.name, site.n_channels, site.channel_dim) for site in sites]
