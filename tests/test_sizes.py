"""Sizes in multiply-adds and parameters, channels that never fire, thresholds and overlaps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr._checks import GatingError
from nad_attr.evaluation.evaluating import evaluate
from nad_attr.evaluation.measures import balanced_accuracy, fit_threshold
from nad_attr.evaluation.sizes import SiteCosts, flop_size, parameter_size, site_costs
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.sites.site import GateSite
from nad_attr.stats.pairs import overlap_matrix
from tests import helpers

nan, inf = math.nan, math.inf

# ---------------------------------------------------------------------------------------------
# Costs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 5])
def test_costs_of_a_cnn(n: int) -> None:
    """conv 3 -> 6 on 8 x 8, BatchNorm 6; conv 6 -> 8 to 4 x 4; the last layer counts nowhere."""
    model = helpers.build(helpers.TinyCNN)
    sites = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
    x = helpers.images(n)
    with helpers.assert_model_untouched(model, x):
        costs = site_costs(model, sites, x)
    assert costs.flops == {"relu1": 64 * 27 * 6, "relu2": 16 * 54 * 8}
    assert costs.parameters == {"relu1": 27 * 6 + 6 + 12, "relu2": 54 * 8 + 8}
    # A layer's own output, and the input of the next, are made by the same work.
    for name, at_input in (("conv1", False), ("conv2", True)):
        site = GateSite(name, 6, 1, at_input=at_input)
        early = site_costs(model, [site, sites[1]], x)
        assert early.flops == {name: 64 * 27 * 6, "relu2": 16 * 54 * 8}
    assert site_costs(model, sites[1:], x).flops == {"relu2": 64 * 27 * 6 + 16 * 54 * 8}


def test_costs_of_a_residual_network() -> None:
    model = helpers.build(helpers.TinyResNet)
    sites = [GateSite("relu", 4, 1), GateSite("layer1.1", 4, 1), GateSite("layer2.0", 6, 1)]
    costs = site_costs(model, sites, helpers.images(1))
    conv = 4 * 4 * 9
    last = 4 * 6 * 9 + 6 * 6 * 9 + 4 * 6  # two convolutions and the shortcut, on 4 x 4
    assert costs.flops == {"relu": 64 * 3 * 4 * 9, "layer1.1": 64 * 4 * conv, "layer2.0": 16 * last}
    assert costs.parameters == {
        "relu": 3 * 4 * 9 + 8,
        "layer1.1": 4 * conv + 4 * 8,
        "layer2.0": last + 2 * 12,
    }


def test_costs_of_a_transformer() -> None:
    """Parameters that MultiheadAttention uses by itself count where it is called."""
    model = helpers.build(helpers.TinyViT)
    sites = [GateSite("blocks.0", 8, -1), GateSite("blocks.1", 8, -1)]
    costs = site_costs(model, sites, helpers.images(1))
    block = sum(p.numel() for p in model.blocks[0].parameters())
    patches = sum(p.numel() for p in model.patches.parameters())
    assert costs.parameters == {"blocks.0": patches + block, "blocks.1": block}
    # Four tokens: projections to 3 * 8, from 8, and the two layers of 16; products of attention
    # are 2 heads x 4 x 4 x 4, twice, where the counter knows the fused kernel.
    linear = 4 * (8 * 24 + 8 * 8 + 2 * 8 * 16)
    assert costs.flops["blocks.1"] in (linear, linear + 2 * 2 * 4 * 4 * 4)
    assert costs.flops["blocks.0"] == costs.flops["blocks.1"] + 4 * 48 * 8


def test_costs_of_a_forward_function() -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
    x = helpers.images(2)
    found = site_costs(
        model,
        sites,
        (x, x),
        run=RunOptions(
            forward_func=lambda a, b, scale: model(a + b * scale), additional_forward_args=2.0
        ),
    )
    assert found == site_costs(model, sites, x)


def test_shared_parameters_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    costs = site_costs(Tied().eval(), [GateSite("a", 3, 1), GateSite("b", 3, 1)], torch.ones(1, 3))
    assert costs.parameters == {"a": 12, "b": 3}
    assert costs.flops == {"a": 9, "b": 9}


def test_weighted_sizes() -> None:
    sites = [GateSite("a", 4, 1), GateSite("b", 2, 1)]
    costs = SiteCosts({"a": 100, "b": 300}, {"a": 9, "b": 1})
    arch = SubArchitecture.from_kept({"a": [0], "b": [0, 1]}, sites)
    assert flop_size(arch, costs) == pytest.approx((100 / 4 + 300) / 400)
    assert parameter_size(arch, costs) == pytest.approx((9 / 4 + 1) / 10)
    assert flop_size(SubArchitecture.full(sites), costs) == 1
    assert flop_size(~SubArchitecture.full(sites), costs) == 0
    assert math.isnan(flop_size(arch, SiteCosts({"a": 0, "b": 0}, {})))
    with pytest.raises(ValueError, match="costs lack gate site 'b'"):
        flop_size(arch, SiteCosts({"a": 1}, {}))


def test_bad_costs() -> None:
    model = helpers.build(helpers.TinyCNN)
    x = helpers.images(2)
    with helpers.assert_model_untouched(model, x):
        for inputs in (3, (), torch.ones(0, 3, 8, 8), (x, None)):
            with pytest.raises(TypeError, match="inputs must be a tensor"):
                site_costs(model, [GateSite("relu1", 6, 1)], inputs)
        with pytest.raises(GatingError, match="did not fire"):
            site_costs(
                model,
                [GateSite("relu1", 6, 1)],
                x,
                run=RunOptions(forward_func=lambda x: x.flatten(1)),
            )


# ---------------------------------------------------------------------------------------------
# In an evaluation
# ---------------------------------------------------------------------------------------------


def test_sizes_of_an_evaluation() -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
    archs = [
        SubArchitecture.from_kept({"relu1": [0, 1, 2], "relu2": [3]}, sites, task=0),
        SubArchitecture.from_kept({"relu2": range(8)}, sites, task=2),
    ]
    found = evaluate(model, archs, helpers.labelled_images(9), n_random=1)
    a, b = 64 * 27 * 6, 16 * 54 * 8
    np.testing.assert_allclose(found.flop_size, [(a / 2 + b / 8) / (a + b), b / (a + b)])
    a, b = 27 * 6 + 6 + 12, 54 * 8 + 8
    np.testing.assert_allclose(found.parameter_size, [(a / 2 + b / 8) / (a + b), b / (a + b)])
    np.testing.assert_allclose(found.whole.flop_size, 1)
    np.testing.assert_allclose(found.whole.parameter_size, 1)


def test_dead_fraction() -> None:
    """Channel 1 is zero for class 0, channel 2 constant for all, channel 3 noise of rounding."""
    site = GateSite("0", 4, 1)
    images = torch.tensor(
        [
            [1.0, 0.0, 7.0, 1.0],
            [2.0, 0.0, 7.0, 1.0 + 1e-7],
            [5.0, 3.0, 7.0, 1.0],
            [5.0, 4.0, 7.0, 1.0],
            [5.0, 5.0, 7.0, 9.0],
        ]
    )
    labels = torch.tensor([0, 0, 1, 1, 2])
    model = nn.Sequential(nn.Identity()).eval()

    def dead(kept: list[int], task: object, batch_size: int = 2) -> float:
        arch = SubArchitecture.from_kept({"0": kept}, [site], task=task)
        found = evaluate(model, arch, (images, labels), n_random=0, batch_size=batch_size)
        assert found.whole.dead_fraction[0] == pytest.approx(whole[task])
        return found.dead_fraction[0]

    whole = {0: 3 / 4, 1: 3 / 4, (1, 2): 2 / 4, (0, 1): 2 / 4, 2: 1.0}
    for batch_size in (1, 2, 5):
        assert dead([0, 1], 0, batch_size) == 1 / 2
        assert dead([0, 1], 1, batch_size) == 1 / 2  # now it is channel 0 that stays
        assert dead([1, 2, 3], 0, batch_size) == 1
        assert dead([1, 2, 3], (1, 2), batch_size) == pytest.approx(1 / 3)
        assert dead([0, 1, 3], (0, 1), batch_size) == pytest.approx(1 / 3)
    assert math.isnan(dead([], 1))
    assert dead([0], 2) == 1  # one image, one position: nothing moves


def test_dead_by_position() -> None:
    """A channel that differs between positions of one image fires."""
    site = GateSite("0", 2, 1)
    images = torch.zeros(2, 2, 2, 2)
    images[:, 1, 0, 0] = 1
    model = nn.Sequential(nn.Identity(), nn.Flatten()).eval()
    archs = [SubArchitecture.from_kept({"0": [k]}, [site], task=k) for k in (0, 1)]
    found = evaluate(model, archs, (images, torch.tensor([0, 1])), n_random=0)
    assert found.dead_fraction.tolist() == [1, 0]
    last = GateSite("0", 2, -1)
    tokens = [SubArchitecture.from_kept({"0": [k]}, [last], task=k) for k in (0, 1)]
    images = torch.zeros(2, 3, 2)  # channels last
    images[:, 0, 1] = 1
    found = evaluate(model, tokens, (images, torch.tensor([0, 1])), n_random=0)
    assert found.dead_fraction.tolist() == [1, 0]


# ---------------------------------------------------------------------------------------------
# Thresholds
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([0, 1, 3, 4], [0, 0, 1, 1], 2.0),
        ([3, 4, 0, 1], [1, 1, 0, 0], 2.0),
        ([0, 1, 3, 4], [1, 1, 0, 0], inf),  # the wrong way round: never say yes
        ([0, 1, 2, 3], [0, 1, 0, 1], 2.5),  # BA 3/4 above 2 and above 0: the highest
        ([5, 5, 5], [0, 1, 0], inf),
        ([1, 2, 2, 2], [0, 0, 1, 1], 1.5),  # equal scores stay together
        ([1, 2], [1, 1], nan),
        ([1, 2], [0, 0], nan),
        ([], [], nan),
    ],
)
def test_threshold_by_hand(scores, positive, expected: float) -> None:
    found = fit_threshold(torch.tensor(scores, dtype=torch.float32), torch.tensor(positive).bool())
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, nan_ok=True)


@given(
    st.lists(
        st.tuples(st.integers(-4, 4), st.floats(-1, 1), st.booleans()), min_size=2, max_size=12
    )
)
def test_threshold_is_the_best(triples: list[tuple[int, float, bool]]) -> None:
    """No threshold at all has a higher balanced accuracy; both rows at once."""
    scores = torch.tensor([[t[0] for t in triples], [t[1] for t in triples]], dtype=torch.float64)
    positive = torch.tensor([t[2] for t in triples])
    found = fit_threshold(scores, positive)
    ba = balanced_accuracy(scores > found[:, None], positive)
    if positive.all() or not positive.any():
        assert found.isnan().all()
        return
    for row, value in zip(scores, ba, strict=True):
        every = [
            ((row > t)[positive].double().mean() + (row <= t)[~positive].double().mean()) / 2
            for t in [-inf, *row.tolist()]
        ]
        assert value.item() == pytest.approx(max(float(v) for v in every), abs=1e-12)


def test_neighbouring_numbers() -> None:
    low = 1.0
    high = math.nextafter(low, 2)
    scores = torch.tensor([low, high], dtype=torch.float64)
    assert fit_threshold(scores, torch.tensor([False, True])).item() == low


def test_balanced_accuracy_by_hand() -> None:
    calls = torch.tensor([[True, False, True, False], [True, True, True, True]])
    positive = torch.tensor([True, True, True, False])
    assert balanced_accuracy(calls, positive).tolist() == pytest.approx([(2 / 3 + 1) / 2, 0.5])
    assert balanced_accuracy(calls, torch.ones(4).bool()).isnan().all()
    with pytest.raises(TypeError, match="calls must be boolean"):
        balanced_accuracy(calls.float(), positive)
    with pytest.raises(TypeError, match="positive must be boolean"):
        fit_threshold(calls.float(), positive.int())
    with pytest.raises(ValueError, match="NaN"):
        fit_threshold(torch.tensor([nan, 1.0]), torch.tensor([True, False]))
    with pytest.raises(ValueError, match="do not fit"):
        fit_threshold(torch.ones(3), positive)


# ---------------------------------------------------------------------------------------------
# Overlaps
# ---------------------------------------------------------------------------------------------


@given(st.integers(0, 1000), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_overlaps_equal_those_of_pairs(seed: int, size: float) -> None:
    sites = [GateSite("a", 3, 1), GateSite("b", 7, 1)]
    generator = torch.Generator().manual_seed(seed)
    masks = {s.name: torch.rand(4, s.n_channels, generator=generator) < size for s in sites}
    masks["a"][0], masks["b"][1] = True, False
    archs = [SubArchitecture({n: m[k] for n, m in masks.items()}, sites) for k in range(4)]
    for corrected in (False, True):
        found = overlap_matrix(masks, chance_corrected=corrected)
        assert found.dtype == torch.float64
        expected = [[x.overlap(y, chance_corrected=corrected) for y in archs] for x in archs]
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_kappa_of_random_masks_is_zero_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    n, n_channels = 300, 200
    for kept in (20, 100, 160):
        order = torch.rand(n, n_channels, generator=generator).argsort(1)
        masks = {"a": order < kept}
        off = ~torch.eye(n, dtype=torch.bool)
        kappa = overlap_matrix(masks, chance_corrected=True)[off]
        assert abs(float(kappa.mean())) < 0.003
        assert overlap_matrix(masks)[off].mean() > 0.04  # the overlap itself is not


def test_bad_masks() -> None:
    with pytest.raises(ValueError, match="no gate site"):
        overlap_matrix({})
    with pytest.raises(ValueError, match=r"masks of 'a' must be bool \(T, C\), got torch.float32"):
        overlap_matrix({"a": torch.ones(2, 3)})
    with pytest.raises(ValueError, match="masks of 'b' are for 1 tasks, others for 2"):
        overlap_matrix({"a": torch.ones(2, 3).bool(), "b": torch.ones(1, 3).bool()})
