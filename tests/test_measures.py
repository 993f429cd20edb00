"""Measures by hand, against independent references, and the sweep against naive loops."""

from __future__ import annotations

import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nad_attr import RunOptions
from nad_attr._checks import GatingError
from nad_attr.data.labels import own_images
from nad_attr.evaluation import measures
from nad_attr.evaluation.evaluating import evaluate
from nad_attr.evaluation.measures import auc, balanced_weights, fidelity, r_squared, spearman
from nad_attr.evaluation.responses import sweep
from nad_attr.evaluation.result import Evaluation
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.stats.measure_table import MEASURES
from tests import helpers

nan = math.nan


def double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------
# auc
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "positive", "expected"),
    [
        ([1, 2, 3, 4], [0, 0, 1, 1], 1.0),
        ([1, 2, 3, 4], [1, 1, 0, 0], 0.0),
        ([1, 2, 3, 4], [0, 1, 0, 1], 0.75),  # pairs 2>1, 2<3, 4>1, 4>3
        ([5, 5, 5], [0, 1, 0], 0.5),
        ([1, 2, 2], [0, 1, 0], 0.75),
        ([-math.inf, 0, math.inf], [0, 0, 1], 1.0),
        ([1, 2], [1, 1], nan),
        ([1, 2], [0, 0], nan),
        ([], [], nan),
    ],
)
def test_auc_by_hand(scores, positive, expected: float) -> None:
    found = auc(torch.tensor(scores, dtype=torch.float32), torch.tensor(positive).bool())
    assert found.dtype == torch.float64
    assert found.item() == pytest.approx(expected, abs=1e-15, nan_ok=True)


@pytest.mark.slow
@settings(deadline=None, max_examples=100)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.floats(-1, 1, width=32), st.booleans()),
        min_size=1,
        max_size=25,
    )
)
def test_auc_counts_pairs(triples: list[tuple[int, float, bool]]) -> None:
    """Many ties in the first column, few in the second: both rows at once."""
    scores = torch.tensor([[t[0] for t in triples], [t[1] for t in triples]])
    positive = torch.tensor([t[2] for t in triples])
    found = auc(scores, positive)
    for row, value in zip(scores, found, strict=True):
        wins = [
            1.0 if p > n else 0.5 if p == n else 0.0
            for p in row[positive].tolist()
            for n in row[~positive].tolist()
        ]
        expected = sum(wins) / len(wins) if wins else nan
        assert value.item() == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_auc_leading_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, 20, generator=generator)
    positive = torch.rand(3, 20, generator=generator) > 0.5
    found = auc(scores, positive)
    assert found.shape == (2, 3)
    assert found[1, 2] == auc(scores[1, 2], positive[2])
    # One image with a lone score for all rows of positives.
    assert auc(scores[0, 0], positive).shape == (3,)


def test_auc_bad_input() -> None:
    positive = torch.tensor([True, False])
    with pytest.raises(ValueError, match="NaN"):
        auc(double(1, nan), positive)
    with pytest.raises(TypeError, match="boolean"):
        auc(double(1, 2), torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="do not fit"):
        auc(double(1, 2, 3), positive)
    with pytest.raises(ValueError, match="last axis"):
        auc(torch.tensor(1.0), torch.tensor(True))


# ---------------------------------------------------------------------------------------------
# r_squared, spearman, fidelity
# ---------------------------------------------------------------------------------------------


def test_r_squared_by_hand() -> None:
    whole = double(0, 2)  # mean 1, variance 1
    assert r_squared(whole, whole).item() == 1
    assert r_squared(whole, double(1, 1)).item() == 0
    assert r_squared(whole, double(2, 0)).item() == -3
    assert r_squared(whole, whole + 1).item() == 0
    # Weights 3 and 1: mean 1/2, variance 3/4, squared error 1/4.
    found = r_squared(whole, double(0, 1), weights=double(3, 1))
    assert found.item() == pytest.approx(1 - 0.25 / 0.75)
    assert r_squared(whole, double(0, 1), weights=double(30, 10)).item() == found.item()


def test_r_squared_where_nothing_varies() -> None:
    # Three thirds do not add up to their mean exactly: the test must not be variance > 0.
    third = torch.full((3,), 0.1, dtype=torch.float64)
    assert r_squared(third, third).isnan()
    assert r_squared(double(0, 0, 1), double(0, 0, 0), weights=double(1, 1, 0)).isnan()
    assert r_squared(double(), double()).isnan()


def test_r_squared_rows() -> None:
    whole = torch.stack([double(0, 2), double(5, 5), double(0, 2)])
    found = r_squared(whole, double(0, 2))
    assert torch.equal(found.isnan(), torch.tensor([False, True, False]))
    assert found[0] == found[2] == 1


def test_spearman_by_hand() -> None:
    # Ranks 1 2 3 4 and 2 1 4 3: 1 - 6 * 4 / (4 * 15).
    assert spearman(double(1, 2, 3, 4), double(2, 1, 4, 3)).item() == pytest.approx(0.6)
    assert spearman(double(1, 2, 3), double(1, 10, 1000)).item() == pytest.approx(1)
    assert spearman(double(1, 2, 3), double(3, 2, 1)).item() == pytest.approx(-1)
    assert spearman(double(1, 2, 3), double(1, 1, 1)).isnan()


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(-3, 3), st.integers(-3, 3), st.integers(1, 4)),
        min_size=2,
        max_size=12,
    )
)
def test_spearman_repeats_images(triples: list[tuple[int, int, int]]) -> None:
    a, b, times = (np.array(column, dtype=float) for column in zip(*triples, strict=True))
    n = times.astype(int)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy warns of constant input
        expected = stats.spearmanr(np.repeat(a, n), np.repeat(b, n)).statistic
    found = spearman(torch.tensor(a), torch.tensor(b), weights=torch.tensor(times))
    assert found.item() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    # Weights need not be whole: only their proportions matter.
    found = spearman(torch.tensor(a), torch.tensor(b), weights=torch.tensor(times / 7))
    assert found.item() == pytest.approx(expected, abs=1e-10, nan_ok=True)


def test_balanced_weights() -> None:
    own = torch.tensor([[True, False, False, False, False], [True] * 5, [False] * 5])
    weights = balanced_weights(own)
    assert weights.tolist() == [[4, 1, 1, 1, 1], [0] * 5, [0] * 5]


def test_fidelity_weighs_own_and_others_the_same() -> None:
    own = torch.tensor([True, True, False, False, False, False])
    whole = double(3, 5, 0, 0, 1, 1)
    gated = double(3, 4, 0, 0, 0, 1)
    # Balanced means: own 4, others 1/2, all 9/4.
    variance = (0.75**2 + 2.75**2) / 4 + (2 * 2.25**2 + 2 * 1.25**2) / 8
    error = 1 / 4 + 1 / 8
    found = fidelity(whole, gated, own)
    assert found.item() == pytest.approx(1 - error / variance)
    # The same as with every own image twice.
    twice = torch.cat([torch.arange(6), torch.arange(2)])
    assert r_squared(whole[twice], gated[twice]).item() == pytest.approx(found.item())
    ranks = fidelity(whole, gated, own, ranks=True)
    expected = stats.spearmanr(whole[twice], gated[twice]).statistic
    assert ranks.item() == pytest.approx(expected)


def test_fidelity_needs_own_and_others() -> None:
    values = double(1, 2)
    for own in ([True, True], [False, False]):
        for ranks in (False, True):
            assert fidelity(values, values, torch.tensor(own), ranks=ranks).isnan()


@pytest.mark.parametrize("measure", [r_squared, spearman])
def test_pairs_bad_input(measure) -> None:
    with pytest.raises(ValueError, match="NaN"):
        measure(double(1, nan), double(1, 2))
    with pytest.raises(ValueError, match="do not fit"):
        measure(double(1, 2), double(1, 2, 3))
    with pytest.raises(ValueError, match="negative"):
        measure(double(1, 2), double(1, 2), weights=double(1, -1))


def test_own_images() -> None:
    found = own_images(torch.tensor([3, 0, 5, 3]), [3, (0, 5), 1])
    assert found.int().tolist() == [[1, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]


# ---------------------------------------------------------------------------------------------
# evaluate, by hand: the network gives its input back, one channel per class
# ---------------------------------------------------------------------------------------------

SITE = GateSite("0", 3, 1)
SCORES = torch.tensor(
    [[3.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 3.0, 0.5], [2.0, 1.0, -1.0], [0.0, 1.0, 4.0]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 1, 1, 2])


@pytest.fixture
def identity() -> nn.Module:
    return nn.Sequential(nn.Identity()).eval()


def keeps(*channels: int, task: object, means: list[float] | None = None) -> SubArchitecture:
    values = None if means is None else {"0": torch.tensor(means)}
    return SubArchitecture.from_kept({"0": channels}, [SITE], task=task, means=values)


def test_evaluate_by_hand(identity: nn.Module) -> None:
    archs = [keeps(0, 1, task=0), keeps(1, task=1), keeps(0, 1, 2, task=2)]
    found = evaluate(identity, archs, (SCORES, LABELS))
    assert found.tasks == (0, 1, 2)
    assert found.task_names == ("0", "1", "2")
    assert (found.n_images, found.n_own.tolist()) == (5, [2, 2, 1])
    np.testing.assert_allclose(found.size, [2 / 3, 1 / 3, 1])
    np.testing.assert_allclose(found.sizes["0"], [2 / 3, 1 / 3, 1])

    # Output 0 for class 0: own 3, 1; others 0, 2, 0. Output 1 for class 1: own 3, 1; others 1, 2,
    # 1. Output 2 for class 2 is always right. A closed channel is 0 for all: one half.
    a0, a1 = 5 / 6, (3 + 0.5 + 0 + 0.5) / 6
    table = [[a0, a1, 0.5], [0.5, a1, 0.5], [a0, a1, 1.0]]
    np.testing.assert_allclose(found.table, table)
    np.testing.assert_allclose(found.own_auc, [a0, a1, 1])
    np.testing.assert_allclose(found.other_auc, [(a1 + 0.5) / 2, 0.5, (a0 + a1) / 2])
    np.testing.assert_allclose(found.disentanglement, found.own_auc - found.other_auc)
    np.testing.assert_allclose(found.fidelity, [1, 1, 1])
    np.testing.assert_allclose(found.rank_fidelity, [1, 1, 1])

    # Called classes, with the first of equal outputs: 0 1 1 0 1 | 1 1 1 1 1 | 0 1 1 0 2.
    np.testing.assert_allclose(found.recall, [1 / 2, 1, 1])
    np.testing.assert_allclose(found.fpr, [1 / 3, 1, 0])
    np.testing.assert_allclose(found.ba, [(1 / 2 + 2 / 3) / 2, 1 / 2, 1])
    np.testing.assert_allclose(found.other_accuracy, [1 / 3, 0, 2 / 4])
    # Margins: own 2, -1 against -3, 1, -1 | own 3, 1 against 1, 2, 1 | 4 against the rest.
    np.testing.assert_allclose(found.margin_auc, [(3 + 1.5) / 6, a1, 1])

    whole = found.whole
    np.testing.assert_allclose(whole.table, [[a0, a1, 1]] * 3)
    np.testing.assert_allclose(whole.other_auc, [(a1 + 1) / 2, (a0 + 1) / 2, (a0 + a1) / 2])
    np.testing.assert_allclose(whole.size, 1)
    np.testing.assert_allclose(whole.fidelity, 1)
    np.testing.assert_allclose(whole.recall, [1 / 2, 1 / 2, 1])
    np.testing.assert_allclose(whole.fpr, [1 / 3, 1 / 3, 0])
    np.testing.assert_allclose(whole.other_accuracy, [2 / 3, 2 / 3, 1 / 2])
    assert whole.whole is whole
    assert found.mean("own_auc") == pytest.approx((a0 + a1 + 1) / 3)


def test_fidelity_of_closed_channels(identity: nn.Module) -> None:
    """Closed at zero, the output is 0; closed at its mean, that mean: R^2 by hand."""
    means = [1.5, 0.0, 0.0]
    for arch, value in ((keeps(task=0), 0.0), (keeps(task=0, means=means), 1.5)):
        found = evaluate(identity, [arch], (SCORES, LABELS))
        whole, own = SCORES[:, 0], LABELS == 0
        expected = fidelity(whole, torch.full((5,), value), own)
        np.testing.assert_allclose(found.fidelity, [expected])
        assert found.rank_fidelity[0] == 0
        assert found.own_auc[0] == 0.5


def test_each_sub_architecture_has_its_own_means(identity: nn.Module) -> None:
    archs = [
        keeps(0, task=0, means=[0.0, 7.0, 0.0]),
        keeps(0, task=1),
        keeps(0, task=2, means=[0.0, 0.0, 9.0]),
    ]
    found = sweep(identity, archs, (SCORES, LABELS), run=RunOptions(batch_size=2))
    assert found.gated[0, :, 1].tolist() == [7] * 5
    assert found.gated[1, :, 1].tolist() == [0] * 5
    assert found.gated[2, :, 2].tolist() == [9] * 5


def test_rounding_is_no_evidence() -> None:
    """A constant output with noise in its last bits that goes with the class."""

    class Noisy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 1 + x * torch.tensor([1.0, 1e-7, 1e-3])

    model = nn.Sequential(nn.Identity(), Noisy()).eval()
    images = torch.eye(3).repeat(4, 1)
    archs = [keeps(k, task=k) for k in range(3)]
    found = evaluate(model, archs, (images, torch.arange(3).repeat(4)))
    np.testing.assert_allclose(found.own_auc, [1, 0.5, 1])
    np.testing.assert_allclose(found.whole.own_auc, [1, 0.5, 1])
    # The whole network's output k is constant too, which leaves nothing to be faithful to.
    np.testing.assert_allclose(found.rank_fidelity, [1, nan, 1])

    # Against the whole network's magnitude, not against its own.
    faint = SubArchitecture.from_kept({"0": [0]}, [SITE], task=0)

    def forward(x: Tensor) -> Tensor:
        y = model[0](x)
        return torch.cat([y[:, :1] * 1e-6 + y[:, 1:2], y[:, 1:]], dim=1)

    found = evaluate(
        model, [faint], (images, torch.arange(3).repeat(4)), run=RunOptions(forward_func=forward)
    )
    assert (found.own_auc[0], found.rank_fidelity[0]) == (0.5, 0)


def test_superclass(identity: nn.Module) -> None:
    found = evaluate(identity, [keeps(0, 2, task=(2, 0)), keeps(1, task=1)], (SCORES, LABELS))
    assert found.tasks == ((0, 2), 1)
    assert found.n_own.tolist() == [3, 2]
    gated = SCORES * torch.tensor([1.0, 0.0, 1.0])
    own = torch.tensor([True, True, False, False, True])
    whole_output, output = (x[:, [0, 2]].logsumexp(1) for x in (SCORES, gated))
    np.testing.assert_allclose(found.own_auc[0], auc(output.float(), own))
    np.testing.assert_allclose(found.fidelity[0], fidelity(whole_output, output, own), rtol=1e-6)
    # Called 0 0 2 0 2: all own images and both others.
    assert (found.recall[0], found.fpr[0], found.other_accuracy[0]) == (1, 1, 0)
    # The whole network calls 0 1 1 0 2.
    assert (found.whole.recall[0], found.whole.fpr[0]) == (2 / 3, 1 / 2)
    margin = output - gated[:, 1]
    np.testing.assert_allclose(found.margin_auc[0], auc(margin.float(), own))


def test_margin_without_another_class(identity: nn.Module) -> None:
    found = evaluate(identity, [keeps(0, task=(0, 1, 2))], (SCORES, LABELS))
    assert np.isnan(found.margin_auc[0])
    assert np.isnan(found.own_auc[0])  # no other images
    assert found.recall[0] == 1


def test_always_saying_k_is_not_rewarded() -> None:
    """The fake that high recall alone would praise: constant output, own AUC one half."""
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double().eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(double(5, 0))
    found = evaluate(model, [keeps(0, 1, 2, task=0)], (SCORES, LABELS.clamp(max=1)))
    assert (found.recall[0], found.fpr[0], found.ba[0], found.own_auc[0]) == (1, 1, 0.5, 0.5)
    assert np.isnan(found.fidelity[0])  # the whole network's output does not vary


# ---------------------------------------------------------------------------------------------
# evaluate, against a naive loop over sub-architectures, on real layers
# ---------------------------------------------------------------------------------------------

CNN_SITES = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
RESNET_SITES = [GateSite("relu", 4, 1), GateSite("layer1.0", 4, 1), GateSite("layer2.0", 6, 1)]
VIT_SITES = [GateSite("blocks.0", 8, -1), GateSite("blocks.1", 8, -1)]
NETWORKS = {
    "cnn": (helpers.TinyCNN, CNN_SITES),
    "resnet": (helpers.TinyResNet, RESNET_SITES),
    "vit": (helpers.TinyViT, VIT_SITES),
}
TASKS = (2, (0, 1), 0)


def task_gates(sites: list[GateSite], *, means: bool = False, tasks=TASKS, seed=3) -> TaskGates:
    generator = torch.Generator().manual_seed(seed)
    gates = {s.name: torch.rand(len(tasks), s.n_channels, generator=generator) for s in sites}
    values = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    return TaskGates(gates, sites, tasks, means=values if means else None)


def naive_auc(scores: Tensor, positive: Tensor) -> float:
    pairs = scores[positive][:, None] - scores[~positive][None]
    return ((pairs > 0).double() + 0.5 * (pairs == 0).double()).mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("means", [False, True])
def test_equals_a_naive_loop(name: str, means: bool) -> None:
    make, sites = NETWORKS[name]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(20)
    gates = task_gates(sites, means=means)
    found = evaluate(model, gates, (images, labels), batch_size=7)

    def output_of(task, outputs: Tensor) -> Tensor:
        return outputs[:, task] if isinstance(task, int) else outputs[:, list(task)].logsumexp(1)

    members = [{2}, {0, 1}, {0}]
    own = [torch.tensor([y in group for y in labels.tolist()]) for group in members]
    with torch.no_grad():
        clean = model(images)
        for k, arch in enumerate(gates.sub_architectures()):
            with arch.applied(model):
                outputs = model(images)
            for j, task in enumerate(TASKS):
                expected = naive_auc(output_of(task, outputs).float(), own[j])
                assert found.table[k, j] == pytest.approx(expected, abs=1e-12)
            w = torch.where(own[k], 1 / own[k].sum(), 1 / (~own[k]).sum())
            z, gated = (output_of(TASKS[k], o).numpy() for o in (clean, outputs))
            mse = np.average((z - gated) ** 2, weights=w)
            variance = np.average((z - np.average(z, weights=w)) ** 2, weights=w)
            assert found.fidelity[k] == pytest.approx(1 - mse / variance, rel=1e-5)
            calls = outputs.argmax(1)
            called = torch.tensor([c in members[k] for c in calls.tolist()])
            assert found.recall[k] == pytest.approx(called[own[k]].double().mean())
            assert found.fpr[k] == pytest.approx(called[~own[k]].double().mean())
            right = (calls == labels)[~own[k]].double().mean()
            assert found.other_accuracy[k] == pytest.approx(right)
            assert found.size[k] == arch.size


@pytest.fixture
def cnn() -> nn.Module:
    return helpers.build(helpers.TinyCNN)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return helpers.labelled_images(11)


def assert_same(first: Evaluation, second: Evaluation) -> None:
    assert first.tasks == second.tasks
    for name in MEASURES:
        np.testing.assert_allclose(first.values(name), second.values(name), rtol=1e-6)
    for name in ("table", "overlap", "kappa"):
        np.testing.assert_allclose(getattr(first, name), getattr(second, name), rtol=1e-6)
    for one, other in zip(first.random, second.random, strict=True):
        assert_same(one, other)


class Items(Dataset):
    """A map-style dataset with plain labels, which counts how often an image is loaded."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.targets = images, labels.tolist()
        self.loaded = 0

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.loaded += 1
        return self.images[i], self.targets[i]


@pytest.mark.slow
def test_kinds_of_data(cnn: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    gates = task_gates(CNN_SITES)
    expected = evaluate(cnn, gates, data)
    items = Items(*data)
    with helpers.assert_model_untouched(cnn, *data):
        for kind in (
            list(data),
            TensorDataset(*data),
            items,
            DataLoader(TensorDataset(*data), batch_size=4),
            DataLoader(Items(*data), batch_size=4, shuffle=True),
            iter([(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])]),
        ):
            assert_same(evaluate(cnn, gates, kind, batch_size=5), expected)
    assert items.loaded == len(items) + 2, "each image is loaded once, and two for the checks"


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 11, 100])
def test_batch_size_does_not_matter(cnn: nn.Module, data, batch_size: int) -> None:
    gates = task_gates(CNN_SITES, means=True)
    batches = []
    handle = cnn.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    found = evaluate(cnn, gates, data, batch_size=batch_size, n_random=2)
    handle.remove()
    assert_same(found, evaluate(cnn, gates, data, n_random=2))
    assert max(batches) <= max(batch_size, 2)  # the check wants company
    # One clean pass, one for each of three tasks and as many for each random draw; the
    # multiply-adds are counted on one image. The check runs two images twice and one alone;
    # up to three ask whether the batch size is fixed.
    assert sum(batches) == 5 + min(3, batch_size) + (1 + 3 * 3) * 11 + 1


def test_packing_fills_batches(cnn: nn.Module, data) -> None:
    batches = []
    cnn.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    evaluate(cnn, task_gates(CNN_SITES), data, batch_size=16, n_random=0)
    # What batches it takes is asked first; then outputs are checked: two images twice, one alone.
    assert batches == [3, 2, 2, 1, 11, 16, 16, 1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(NETWORKS))
def test_model_untouched(name: str, data) -> None:
    make, sites = NETWORKS[name]
    model = helpers.build(make)
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    with helpers.assert_model_untouched(model, *data):
        evaluate(model, task_gates(sites), data, batch_size=4)
    bad = data[0].clone()
    bad[-1] = torch.inf
    loader = DataLoader(Items(bad, data[1]), batch_size=4)
    with helpers.assert_model_untouched(model), pytest.raises(ValueError, match="infinity"):
        evaluate(model, task_gates(sites), loader, batch_size=4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_grad_modes(cnn: nn.Module, data, mode) -> None:
    expected = evaluate(cnn, task_gates(CNN_SITES), data)
    with mode():
        images = data[0] * 1
        assert_same(evaluate(cnn, task_gates(CNN_SITES), (images, data[1])), expected)


def test_size_binarises_task_gates(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    found = evaluate(cnn, gates, data, size=0.5)
    np.testing.assert_allclose(found.size, 0.5)
    assert_same(found, evaluate(cnn, gates.sub_architectures(0.5), data))
    assert not np.allclose(evaluate(cnn, gates, data).size, 0.5)


def test_full_sub_architecture_is_the_whole_network(cnn: nn.Module, data) -> None:
    masks = {s.name: torch.ones(s.n_channels, dtype=torch.bool) for s in CNN_SITES}
    archs = [SubArchitecture(masks, CNN_SITES, task=k) for k in range(3)]
    found = evaluate(cnn, archs, data, n_random=0)
    assert_same(found, found.whole)


def test_forward_func_and_arguments(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    images, labels = data

    def forward(a: Tensor, b: Tensor, scale: float) -> Tensor:
        return cnn(a + b) * scale

    found = evaluate(
        cnn,
        gates,
        ((images / 4, images * 3 / 4), labels),
        run=RunOptions(forward_func=forward, additional_forward_args=(1.0,)),
    )
    assert_same(found, evaluate(cnn, gates, data))


def test_wrapped_networks(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    expected = evaluate(cnn, gates, data)
    assert_same(evaluate(nn.DataParallel(cnn).eval(), gates, data), expected)


def test_task_without_own_images(cnn: nn.Module, data) -> None:
    images, labels = data
    some = labels != 2
    gates = task_gates(CNN_SITES, tasks=(0, 1, 2))
    with pytest.warns(UserWarning, match=r"no image of task\(s\) \[2\]"):
        found = evaluate(cnn, gates, (images[some], labels[some]))
    for name in ("own_auc", "fidelity", "rank_fidelity", "recall", "ba", "margin_auc"):
        assert np.isnan(getattr(found, name)).tolist() == [False, False, True], name
    assert not np.isnan(found.fpr).any()
    # Other AUC is the mean over the tasks that can be measured.
    assert found.other_auc[0] == found.table[0, 1]
    assert found.other_auc[2] == pytest.approx(found.table[2, :2].mean())
    assert found.mean("own_auc") == pytest.approx(found.own_auc[:2].mean())
    assert "-" in found.summary()
    with pytest.raises(ValueError, match="no image of any of the tasks"):
        evaluate(cnn, gates.select([2]), (images[some], labels[some]))


def test_one_task_has_no_others(cnn: nn.Module, data) -> None:
    found = evaluate(cnn, task_gates(CNN_SITES).sub_architecture(0), data)
    assert found.table.shape == (1, 1)
    assert np.isnan(found.other_auc[0])
    assert math.isnan(found.mean("other_auc"))
    assert all(math.isnan(end) for end in found.interval("own_auc"))
    assert "95 %" not in found.summary()


def test_sweep_takes_several_of_one_task(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    archs = [*gates.sub_architectures(0.3), *gates.sub_architectures(0.7)]
    found = sweep(cnn, archs, data, run=RunOptions(batch_size=4))
    assert found.tasks == TASKS * 2
    assert found.columns == TASKS
    assert found.gated.shape == (6, 11, 3)
    assert found.gated.dtype == found.whole.dtype == torch.float32
    alone = sweep(cnn, archs[4:5], data)
    torch.testing.assert_close(found.gated[4, :, 1], alone.gated[0, :, 0])
    torch.testing.assert_close(found.gated_margin[4], alone.gated_margin[0])
    torch.testing.assert_close(found.whole_margin[:, 1], alone.whole_margin[:, 0])


def test_half_precision_outputs(data) -> None:
    model = helpers.build(helpers.TinyCNN).bfloat16()
    images, labels = data
    found = sweep(model, task_gates(CNN_SITES), (images.bfloat16(), labels))
    assert found.whole.dtype == torch.float32


# -- bad input ---------------------------------------------------------------------------------


def test_bad_architectures(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    archs = gates.sub_architectures()
    other = SubArchitecture.full(CNN_SITES[:1])
    other.task = 1
    for bad, error, message in (
        ([], ValueError, "no sub-architecture"),
        ("gates", TypeError, "TaskGates or a sequence"),
        ([archs[0], "x"], TypeError, "TaskGates or a sequence"),
        ([SubArchitecture.full(CNN_SITES)], ValueError, "has no task"),
        ([archs[0], archs[0]], ValueError, "twice"),
        ([archs[0], other], ValueError, "other gate sites"),
    ):
        with pytest.raises(error, match=message):
            evaluate(cnn, bad, data)
    with pytest.raises(ValueError, match="size= needs TaskGates"):
        evaluate(cnn, archs, data, size=0.5)
    with pytest.raises(ValueError, match="size must be"):
        evaluate(cnn, gates, data, size=2.0)


def test_bad_network_or_data(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    images, labels = data
    with pytest.raises(ValueError, match="batch_size"):
        evaluate(cnn, gates, data, batch_size=0)
    with pytest.raises(ValueError, match="5, but the network has 3 outputs"):
        evaluate(cnn, gates, (images, torch.where(labels == 1, 5, labels)))
    with pytest.raises(ValueError, match="task 9, but the network"):
        evaluate(cnn, task_gates(CNN_SITES, tasks=(0, 9)), data)
    with pytest.raises(ValueError, match="NaN"):
        evaluate(cnn, gates, (images * nan, labels))
    with pytest.raises(ValueError, match="expected \\(images, classes\\)"):
        evaluate(cnn, gates, data, run=RunOptions(forward_func=lambda x: cnn(x)[0]))
    with pytest.raises(TypeError, match="dict"):
        evaluate(cnn, gates, data, run=RunOptions(forward_func=lambda x: {"logits": cnn(x)}))
    with pytest.raises(GatingError, match="did not fire"):
        evaluate(cnn, gates, data, run=RunOptions(forward_func=lambda x: x.flatten(1)))
    with pytest.raises(ValueError, match="the network gives NaN for image 0"):
        evaluate(cnn, gates, data, run=RunOptions(forward_func=lambda x: cnn(x) * nan))
    cnn.train()
    with helpers.assert_model_untouched(cnn), pytest.raises(ValueError, match="eval"):
        evaluate(cnn, gates, data)


def test_nan_inside_a_sub_architecture(identity: nn.Module) -> None:
    def normalised(x: Tensor) -> Tensor:
        x = identity(x)
        return x / x.norm(dim=1, keepdim=True)

    archs = [keeps(0, 1, 2, task=1), keeps(2, task=2)]
    with pytest.raises(ValueError, match="sub-architecture of task 2 gives NaN for image 0"):
        evaluate(
            identity, archs, (SCORES, LABELS), run=RunOptions(forward_func=normalised), batch_size=3
        )


# ---------------------------------------------------------------------------------------------
# The result's faces
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def result(cnn: nn.Module, data) -> Evaluation:
    return evaluate(cnn, task_gates(CNN_SITES), data)


def test_interval(result: Evaluation) -> None:
    low, high = result.interval("own_auc")
    assert low <= result.mean("own_auc") <= high
    assert (low, high) == result.interval("own_auc")
    assert result.own_auc.min() <= low
    assert high <= result.own_auc.max()
    narrow = result.interval("own_auc", level=0.5)
    assert low <= narrow[0] <= narrow[1] <= high
    for options, message in (({"level": 1.0}, "level"), ({"n_draws": 0}, "n_draws")):
        with pytest.raises(ValueError, match=message):
            result.interval("own_auc", **options)
    for method in (result.mean, result.interval):
        with pytest.raises(ValueError, match="no measure 'auc'"):
            method("auc")


def test_interval_covers() -> None:
    """About the normal interval, for many tasks."""
    values = np.random.default_rng(0).normal(size=400)
    tasks = tuple(range(400))
    zeros = np.zeros(400)
    many = Evaluation(
        tasks=tasks,
        task_names=tuple(map(str, tasks)),
        n_images=400,
        n_own=np.ones(400, dtype=np.int64),
        size=values,
        sizes={},
        table=np.zeros((400, 400)),
        fidelity=zeros,
        rank_fidelity=zeros,
        margin_auc=zeros,
        recall=zeros,
        fpr=zeros,
        other_accuracy=zeros,
    )
    low, high = many.interval("size")
    half = 1.96 * values.std() / 20
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.015)
    lines = many.summary(max_tasks=3).splitlines()
    assert any("397 more" in line for line in lines)
    assert len(lines) == 3 + 4 + 1 + 3  # head, tasks, rule, mean and interval


def test_summary(result: Evaluation) -> None:
    text = result.summary()
    lines = text.splitlines()
    assert "recall" in lines[1]
    assert "FPR" in lines[1]
    assert "own AUC" in lines[1]
    assert any(line.startswith("(0, 1)") for line in lines)
    assert lines[-2].startswith("whole network")
    assert lines[-1] == "closed channels: zero"
    assert max(map(len, lines)) <= 100
    assert f"{result.mean('own_auc'):.3f}" in text
    assert "Evaluation(3 tasks, 11 images" in repr(result)
    assert "whole network" in result.whole.summary()


def test_frame(result: Evaluation) -> None:
    frame = result.frame()
    assert list(frame.index) == list(TASKS)
    assert frame.index.name == "task"
    assert set(MEASURES) < set(frame.columns)
    assert frame["own_auc"].tolist() == result.own_auc.tolist()


def test_frame_without_pandas(result: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'nad-attr\[plot\]'"):
        result.frame()


def test_json(result: Evaluation, tmp_path) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    read = json.loads(path.read_text(encoding="utf-8"))
    assert read == result.to_dict()
    assert read["tasks"] == [2, [0, 1], 0]
    assert read["table"] == result.table.tolist()
    assert read["means"]["fidelity"]["mean"] == result.mean("fidelity")
    assert read["whole"]["own_auc"] == result.whole.own_auc.tolist()
    assert "whole" not in read["whole"]


def test_json_has_no_nan(identity: nn.Module) -> None:
    found = evaluate(identity, [keeps(task=0)], (SCORES, LABELS))
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["other_auc"] == [None]


def test_task_names(cnn: nn.Module, data) -> None:
    gates = task_gates(CNN_SITES)
    named = TaskGates(
        {name: gates[name] for name in gates}, CNN_SITES, TASKS, task_names=["cat", "pets", "dog"]
    )
    found = evaluate(cnn, named, data)
    assert found.task_names == ("cat", "pets", "dog")
    assert "pets" in found.summary()


def test_progress(cnn: nn.Module, data, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(cnn, task_gates(CNN_SITES), data)
    assert capsys.readouterr().err == ""
    evaluate(cnn, task_gates(CNN_SITES), data, show_progress=True)
    assert "11/11" in capsys.readouterr().err


def test_every_measure_is_there(result: Evaluation) -> None:
    for name in MEASURES:
        assert getattr(result, name).shape == (3,)
        assert getattr(result, name).dtype == np.float64
    assert set(measures.__all__) <= set(dir(measures))
