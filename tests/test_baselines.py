"""Channel scorers and the sub-architectures made of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import RunOptions
from nad_attr.gating.hooks import gated, recorded
from nad_attr.scoring.baselines import (
    EnergyScorer,
    GradientXActivationScorer,
    NeuronMCTScorer,
    RandomScorer,
    TaylorScorer,
    top_k,
)
from nad_attr.scoring.scorer import ChannelScorer, positions, tasks_of
from nad_attr.sites.site import GateSite
from tests import helpers
from tests.scorer_contract import NETWORKS, ScorerContract, assert_same


class TestRandom(ScorerContract):
    scorer = RandomScorer
    sees_images = False


class TestEnergy(ScorerContract):
    scorer = EnergyScorer
    needs_gradients = False


class TestTaylor(ScorerContract):
    scorer = TaylorScorer


class TestNeuronMCT(ScorerContract):
    scorer = NeuronMCTScorer


class TestGradientXActivation(ScorerContract):
    scorer = GradientXActivationScorer


# ---------------------------------------------------------------------------------------------
# By hand: two channels of two positions, z_k = sum over channels and positions of w_kc a_cp
# ---------------------------------------------------------------------------------------------

WEIGHTS = torch.tensor([[1.0, -2.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
SITE = GateSite("0", 2, 1)


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1) @ WEIGHTS.T


@pytest.fixture
def linear() -> nn.Module:
    return nn.Sequential(nn.Identity(), Summed()).eval()


# Two images of class 0 and one of class 1: (image, channel, position).
IMAGES = torch.tensor(
    [[[1.0, 3.0], [1.0, -2.0]], [[0.0, 2.0], [4.0, 0.0]], [[5.0, -1.0], [0.0, 1.0]]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 1])


def scores(scorer: ChannelScorer, **options: object) -> Tensor:
    return scorer(IMAGES, LABELS, dtype=torch.float64, **options)["0"]


def double(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_energy_by_hand(linear: nn.Module) -> None:
    # Means of squares: (1 + 9 + 0 + 4)/4 and (1 + 4 + 16 + 0)/4; (25 + 1)/2 and (0 + 1)/2.
    expected = double([3.5, 5.25], [13.0, 0.5])
    torch.testing.assert_close(scores(EnergyScorer(linear, [SITE])), expected)
    both = scores(EnergyScorer(linear, [SITE]), include_others=True)
    torch.testing.assert_close(both, ((expected[0] + expected[1]) / 2).expand(2, 2))


def test_gradient_x_activation_by_hand(linear: nn.Module) -> None:
    # Sums over positions: image 0 (4, -1), image 1 (2, 4), image 2 (4, 1).
    expected = double([(4 + 2) / 2, -2 * (-1 + 4) / 2], [0.0, 3.0])
    torch.testing.assert_close(scores(GradientXActivationScorer(linear, [SITE])), expected)


def test_neuron_mct_by_hand(linear: nn.Module) -> None:
    # The same sums, absolute for each image.
    expected = double([3.0, 2 * (1 + 4) / 2], [0.0, 3.0])
    torch.testing.assert_close(scores(NeuronMCTScorer(linear, [SITE])), expected)


def test_neuron_mct_of_other_images_by_hand(linear: nn.Module) -> None:
    """Other images are scored for the task in question, not for their own class."""
    own, other = double([3.0, 5.0]), double([4.0, 2.0])
    found = scores(NeuronMCTScorer(linear, [SITE]), tasks=[0], include_others=True)
    torch.testing.assert_close(found, (own + other) / 2)


def test_taylor_by_hand(linear: nn.Module) -> None:
    # dL/da_c = sum over k of (p_k - [k = label]) w_kc, the same at every position.
    sums = IMAGES.sum(-1)
    p = (sums @ WEIGHTS.T).softmax(1)
    slope = (p - F.one_hot(LABELS, 3)) @ WEIGHTS
    per_image = (sums * slope).square()
    expected = torch.stack([per_image[:2].mean(0), per_image[2]])
    torch.testing.assert_close(scores(TaylorScorer(linear, [SITE])), expected)


def test_group_is_explained_by_its_logsumexp(linear: nn.Module) -> None:
    sums = IMAGES[:2].sum(-1)
    p = (sums @ WEIGHTS[[0, 2]].T).softmax(1)
    expected = (sums * (p @ WEIGHTS[[0, 2]])).mean(0, keepdim=True)
    found = scores(GradientXActivationScorer(linear, [SITE]), tasks=[(0, 2)])
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------------------------------------
# Against other ways to the same number
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
def test_taylor_is_the_gate_derivative(name: str) -> None:
    """E[(g dL/dg)^2] with one gate per channel and image, through the gates themselves."""
    make, sites = NETWORKS[name]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(6)
    gates = {
        s.name: torch.ones(6, s.n_channels, dtype=torch.float64, requires_grad=True) for s in sites
    }
    with gated(model, gates, sites=sites):
        F.cross_entropy(model(images), labels, reduction="sum").backward()
    found = TaylorScorer(model, sites)(images, labels, dtype=torch.float64)
    for site in sites:
        per_image = gates[site.name].grad.square()
        expected = torch.stack([per_image[labels == k].mean(0) for k in range(3)])
        torch.testing.assert_close(found[site.name], expected, rtol=1e-10, atol=1e-14)


def test_gradient_x_activation_adds_up_to_the_output_of_a_linear_part() -> None:
    """z = w a + b after the last site: the scores and b sum to the mean output."""
    model = helpers.build(helpers.TinyCNN)
    images, labels = helpers.labelled_images(9)
    found = GradientXActivationScorer(model, [GateSite("relu2", 8, 1)])(
        images, labels, dtype=torch.float64
    )["relu2"]
    with torch.no_grad():
        outputs = model(images) - model.linear.bias
    expected = torch.stack([outputs[labels == k, k].mean() for k in range(3)])
    torch.testing.assert_close(found.sum(1), expected)


def test_site_that_the_output_does_not_depend_on() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            self.unused(x)
            return self.used(x)

    sites = [GateSite("used", 2, 1), GateSite("unused", 2, 1)]
    found = NeuronMCTScorer(Unused().eval(), sites)(torch.ones(2, 2), torch.tensor([0, 1]))
    assert found["used"].tolist() == [[1, 0], [0, 1]]
    assert found["unused"].tolist() == [[0, 0], [0, 0]]


def test_activations_that_are_overwritten_later() -> None:
    """The input of a gated layer is written into in place after the layer has read it."""

    class Overwrites(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = x * 1
            y = self.layer(x) * 2
            x.zero_()
            return y

    site = GateSite("layer", 2, 1, at_input=True)
    found = GradientXActivationScorer(Overwrites().eval(), [site])(
        torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([0, 1])
    )
    assert found["layer"].tolist() == [[6, 0], [0, 12]]


def test_a_new_scorer_is_a_few_lines() -> None:
    class MeanScorer(ChannelScorer):
        def image_scores(self, batch):
            with recorded(batch.model, self.sites) as activations:
                batch.outputs()
            return {s.name: positions(activations[s.name], s).mean(-1) for s in self.sites}

    make, sites = NETWORKS["tokens"]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(6)
    found = MeanScorer(model, sites)(
        images, labels, run=RunOptions(batch_size=2), dtype=torch.float64
    )
    with torch.no_grad(), recorded(model, sites) as activations:
        model(images)
    expected = torch.stack([activations["blocks.1"][labels == k].mean((0, 1)) for k in range(3)])
    torch.testing.assert_close(found["blocks.1"], expected)


# ---------------------------------------------------------------------------------------------
# Random
# ---------------------------------------------------------------------------------------------


def test_random_depends_on_seed_and_task_alone() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(6)
    first = RandomScorer(model, sites, seed=1)(images, labels)
    assert_same(first, RandomScorer(model, sites, seed=1)(-images, labels))
    alone = RandomScorer(model, sites, seed=1)(images, labels, tasks=[2])
    assert_same({name: value[2:] for name, value in first.items()}, alone)
    other = RandomScorer(model, sites, seed=2)(images, labels)
    assert not torch.equal(first["relu1"], other["relu1"])
    assert not torch.equal(first["relu1"][0], first["relu1"][1])
    group = RandomScorer(model, sites, seed=1)(images, labels, tasks=[(2,)])
    assert not torch.equal(group["relu1"][0], first["relu1"][2])


def test_random_is_uniform() -> None:
    model = nn.Sequential(nn.Identity()).eval()
    found = RandomScorer(model, [GateSite("0", 2000, 1)])(torch.ones(1, 2000), torch.tensor([0]))
    assert 0 <= found["0"].min() < 0.01
    assert 0.99 < found["0"].max() < 1
    assert abs(found["0"].mean() - 0.5) < 0.03


# ---------------------------------------------------------------------------------------------
# tasks_of, top_k
# ---------------------------------------------------------------------------------------------


def test_tasks_of() -> None:
    assert tasks_of([4, 1, 4]) == [1, 4]
    assert tasks_of([4, 1], [(4, 1), 4]) == [(1, 4), 4]
    with pytest.raises(TypeError, match="sequence"):
        tasks_of([1], "1")


SITES = [GateSite("a", 3, 1), GateSite("b", 2, 1)]
SCORES = {
    "a": torch.tensor([[5.0, 1.0, 1.0], [0.0, -1.0, -2.0]]),
    "b": torch.tensor([[1.0, 4.0], [3.0, 2.0]]),
}


def kept(architectures: list) -> list[dict[str, list[int]]]:
    return [{n: c.tolist() for n, c in arch.kept.items()} for arch in architectures]


def test_top_k() -> None:
    found = top_k(SCORES, SITES, [3, (1, 2)], 0.6)
    # Of the three that are equal, the first in site and channel order.
    assert kept(found) == [{"a": [0, 1], "b": [1]}, {"a": [0], "b": [0, 1]}]
    assert [arch.task for arch in found] == [3, (1, 2)]
    assert all(arch.size == 0.6 and arch.means is None for arch in found)
    assert kept(top_k(SCORES, SITES, [0, 1], 1.0)) == [{"a": [0, 1, 2], "b": [0, 1]}] * 2


def test_top_k_per_site() -> None:
    found = top_k(SCORES, SITES, [0, 1], 0.6, per_site=True)
    assert kept(found) == [{"a": [0, 1], "b": [1]}, {"a": [0, 1], "b": [0]}]


def test_top_k_keeps_means() -> None:
    means = {"a": torch.ones(3), "b": torch.zeros(2)}
    [first, _] = top_k(SCORES, SITES, [0, 1], 0.5, means=means)
    assert first.means is not None
    assert torch.equal(first.means["a"], torch.ones(3))


@pytest.mark.parametrize(
    ("scores", "tasks", "size", "message"),
    [
        (SCORES, [0, 1], 0.0, "size"),
        (SCORES, [0, 1], 1.5, "size"),
        (SCORES, [0], 0.5, r"\(tasks, channels\)"),
        (SCORES, [0, 0], 0.5, "twice"),
        ({"a": SCORES["a"]}, [0, 1], 0.5, "'b'"),
        ({**SCORES, "c": SCORES["a"]}, [0, 1], 0.5, "'c'"),
        ({**SCORES, "b": SCORES["b"] * torch.nan}, [0, 1], 0.5, "NaN"),
    ],
)
def test_top_k_bad_input(scores, tasks, size: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        top_k(scores, SITES, tasks, size)
