"""Why errors: ranks by hand, nulls by simulation, the run through a network, one image."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr._checks import GatingError
from nad_attr.evaluation.questions.error_ranks import (
    binomial_p,
    error_ranks,
    partial_rank_correlation,
)
from nad_attr.evaluation.questions.error_study import ErrorStudy
from nad_attr.evaluation.questions.errors import errors
from nad_attr.evaluation.questions.explanation import explain_error
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from tests.helpers import assert_model_untouched, build

# -- Ranks by hand -----------------------------------------------------------------------------

SIMILARITY = np.array(
    [
        [1.0, 0.8, 0.5, 0.1],
        [0.8, 1.0, 0.3, 0.3],
        [0.5, 0.3, 1.0, 0.9],
        [0.1, 0.1, 0.1, 1.0],
    ]
)


def test_ranks_by_hand() -> None:
    confusion = [[9, 2, 1, 0], [0, 9, 1, 0], [0, 0, 9, 3], [1, 0, 0, 9]]
    result = error_ranks(SIMILARITY, confusion, hits=(1, 2, 3, 7), n_permutations=50)
    # 0 -> 1: rank 1 (twice); 0 -> 2: rank 2; 1 -> 2: 2 or 3; 2 -> 3: 1 (3 times); 3 -> 0: 1 to 3.
    assert result.n_errors == 8
    assert result.n_classes == 4
    assert result.rank_counts == pytest.approx([2 + 3 + 1 / 3, 1 + 1 / 2 + 1 / 3, 1 / 2 + 1 / 3])
    assert set(result.hits) == {1, 2}  # hit@3 of three is always 1
    assert result.hits[1] == pytest.approx((5 + 1 / 3) / 8)
    assert result.hits[2] == pytest.approx((5 + 1 + 1 / 2 + 2 / 3) / 8)
    assert result.hit_curve == pytest.approx([result.hits[1], result.hits[2], 1])
    third = (1 + 1 / 2 + 1 / 3) / 3
    assert result.mrr == pytest.approx((5 + 1 / 2 + (1 / 2 + 1 / 3) / 2 + third) / 8)
    assert result.mean_rank == pytest.approx((5 * 1 + 2 + 2.5 + 2) / 8)
    assert result.hit_null == {1: pytest.approx(1 / 3), 2: pytest.approx(2 / 3)}
    assert result.mrr_null == pytest.approx(third)


def test_constant_similarity_gives_exactly_the_null() -> None:
    generator = np.random.default_rng(0)
    confusion = generator.integers(0, 4, size=(9, 9))
    result = error_ranks(np.zeros((9, 9)), confusion, n_permutations=20)
    for n in (1, 3, 5):
        assert result.hits[n] == pytest.approx(n / 8)
    assert result.mrr == pytest.approx(sum(1 / r for r in range(1, 9)) / 8)
    assert result.mrr == pytest.approx(result.mrr_null)
    assert result.mean_rank == pytest.approx(4.5)
    assert result.mrr_p == 1.0
    assert result.hit_p[3] == 1.0


def test_rounding_makes_no_rank() -> None:
    # Equal up to the order in which three numbers were added.
    similarity = np.zeros((3, 3))
    similarity[0] = [1, 0.1 + 0.2 + 0.3, 0.3 + 0.2 + 0.1]
    assert similarity[0, 1] != similarity[0, 2]
    result = error_ranks(similarity, [[0, 1, 0], [0, 0, 0], [0, 0, 0]], hits=[1])
    assert result.hits[1] == 0.5


def random_similarity(generator: np.random.Generator, n: int) -> NDArray[np.float64]:
    half = generator.random((n, n))
    return half + half.T


def random_confusion(generator: np.random.Generator, n: int) -> NDArray[np.int64]:
    counts = generator.poisson(generator.gamma(0.5, 4.0, size=(n, n)))
    counts[0, 1] += 1
    return counts


@pytest.mark.slow
def test_mean_over_all_permutations_is_exactly_the_null() -> None:
    n = 5
    generator = np.random.default_rng(3)
    similarity, confusion = random_similarity(generator, n), random_confusion(generator, n)
    similarity[0, 1] = similarity[0, 2]  # with a tie
    every = [
        error_ranks(similarity[np.ix_(p, p)], confusion, hits=(1, 2, 3), n_permutations=1)
        for p in map(list, itertools.permutations(range(n)))
    ]
    for k in (1, 2, 3):
        assert np.mean([r.hits[k] for r in every]) == pytest.approx(k / (n - 1))
    assert np.mean([r.mrr for r in every]) == pytest.approx(every[0].mrr_null)


@pytest.mark.slow
def test_random_similarity_has_hit_n_of_the_null_on_average() -> None:
    generator = np.random.default_rng(4)
    confusion = random_confusion(generator, 10)
    found = [
        error_ranks(random_similarity(generator, 10), confusion, n_permutations=1)
        for _ in range(150)
    ]
    for n in (1, 3, 5):
        values = np.array([r.hits[n] for r in found])
        assert abs(values.mean() - n / 9) < 4 * values.std() / math.sqrt(150)
    reciprocal = np.array([r.mrr for r in found])
    assert abs(reciprocal.mean() - found[0].mrr_null) < 4 * reciprocal.std() / math.sqrt(150)


@pytest.mark.slow
def test_p_values_are_uniform_under_the_null() -> None:
    generator = np.random.default_rng(5)
    mrr, hit, partial = [], [], []
    for i in range(200):
        confusion = random_confusion(generator, 12)
        similarity, control = (random_similarity(generator, 12) for _ in range(2))
        result = error_ranks(similarity, confusion, n_permutations=99, seed=i)
        mrr.append(result.mrr_p)
        hit.append(result.hit_p[3])
        partial.append(
            partial_rank_correlation(confusion, similarity, control, n_permutations=99, seed=i).p
        )
    for values in (mrr, hit, partial):
        assert stats.kstest(values, "uniform").pvalue > 0.01
        assert np.mean(np.array(values) <= 0.05) < 0.1


@pytest.mark.slow
def test_p_values_are_uniform_where_similarity_repeats_the_control() -> None:
    # Errors follow the control, so does the similarity, with noise of its own: it adds nothing.
    generator = np.random.default_rng(6)
    partial, plain = [], []
    for i in range(120):
        control = random_similarity(generator, 12)
        similarity = control + 0.5 * random_similarity(generator, 12)
        confusion = generator.poisson(np.exp(3 * control - 3))
        found = partial_rank_correlation(confusion, similarity, control, n_permutations=99, seed=i)
        partial.append(found.p)
        plain.append(error_ranks(similarity, confusion, n_permutations=99, seed=i).mrr_p)
    assert stats.kstest(partial, "uniform").pvalue > 0.01
    assert np.mean(plain) < 0.05  # which the plain statistic takes for evidence


def test_power_where_errors_follow_the_similarity() -> None:
    generator = np.random.default_rng(7)
    similarity, control = (random_similarity(generator, 12) for _ in range(2))
    confusion = generator.poisson(np.exp(4 * similarity - 4))
    result = error_ranks(similarity, confusion, n_permutations=199)
    assert result.mrr_p == 1 / 200
    assert result.hits[3] > result.hit_null[3]
    low, high = result.hit_intervals[3]
    assert result.hit_null[3] < low < result.hits[3] < high
    found = partial_rank_correlation(confusion, similarity, control, n_permutations=199)
    assert found.p == 1 / 200
    assert found.value > 0.3


def test_partial_correlation_against_a_regression_written_out() -> None:
    generator = np.random.default_rng(8)
    n = 7
    confusion = random_confusion(generator, n)
    confusion[4] = 0  # a class without errors plays no part
    similarity, control = (random_similarity(generator, n) for _ in range(2))
    place = stats.rankdata(control[~np.eye(n, dtype=bool)])
    pairs = [(y, z) for y in range(n) for z in range(n) if y != z]
    among_all = {pair: (2 * r - 1) / len(pairs) - 1 for pair, r in zip(pairs, place, strict=True)}
    confused, similar, regressors = [], [], []
    for y in range(n):
        others = [z for z in range(n) if z != y]
        if y != 4:
            confused.append(stats.rankdata(confusion[y, others]))
            similar.append(stats.rankdata(similarity[y, others]))
            u = np.array([among_all[y, z] for z in others])
            within = stats.rankdata(control[y, others])
            regressors.append(np.stack([within, u, u**2, u**3], axis=1))
    # A mean of its own for each row.
    own = np.kron(np.eye(n - 1), np.ones((n - 1, 1)))
    design = np.hstack([own, np.concatenate(regressors)])

    def rest(values: list[NDArray[np.float64]], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
        flat = np.concatenate(values)
        return flat - matrix @ np.linalg.lstsq(matrix, flat, rcond=None)[0]

    found = partial_rank_correlation(confusion, similarity, control, n_permutations=9)
    expected = stats.pearsonr(rest(confused, design), rest(similar, design)).statistic
    assert found.value == pytest.approx(expected)
    expected = stats.pearsonr(rest(confused, own), rest(similar, own)).statistic
    assert found.without_control == pytest.approx(expected)


def test_nothing_is_added_to_itself() -> None:
    generator = np.random.default_rng(9)
    confusion, similarity = random_confusion(generator, 8), random_similarity(generator, 8)
    found = partial_rank_correlation(confusion, similarity, similarity, n_permutations=99)
    assert found.value == pytest.approx(0, abs=1e-6)


def test_interval_is_over_true_classes() -> None:
    # Each class's errors are all hits or none: the interval is that of 6 draws, not of 600.
    n = 6
    similarity = np.tile(np.arange(n, 0, -1.0), (n, 1))
    confusion = np.zeros((n, n), dtype=int)
    for y in range(n):
        confusion[y, (0 if y else 1) if y % 2 else n - 1 - (y == n - 1)] = 100
    result = error_ranks(similarity, confusion, hits=[1])
    low, high = result.hit_intervals[1]
    assert result.hits[1] == pytest.approx(0.5)
    assert high - low > 0.6


def test_binomial_is_that_of_scipy() -> None:
    for k, n, p in ((3, 10, 0.2), (0, 5, 0.5), (40, 200, 0.15), (5, 5, 0.1)):
        expected = stats.binomtest(k, n, p, alternative="greater").pvalue
        assert binomial_p(k, n, p) == pytest.approx(expected)
    assert binomial_p(2.7, 10, 0.2) == binomial_p(2, 10, 0.2)


def test_ranks_do_not_hang_on_the_global_generator() -> None:
    confusion = [[0, 2, 1, 0], [1, 0, 1, 0], [0, 0, 0, 3], [1, 0, 0, 0]]
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    first = error_ranks(SIMILARITY, confusion, n_permutations=30)
    second = error_ranks(SIMILARITY, confusion, n_permutations=30)
    assert np.array_equal(first.permuted_mrr, second.permuted_mrr)
    assert np.array_equal(before, np.random.get_state()[1])  # noqa: NPY002
    other = error_ranks(SIMILARITY, confusion, n_permutations=30, seed=1)
    assert not np.array_equal(first.permuted_mrr, other.permuted_mrr)


def test_bad_matrices() -> None:
    confusion = [[0, 1, 0], [0, 0, 1], [1, 0, 0]]
    good = np.eye(3)
    with pytest.raises(ValueError, match="at least three classes"):
        error_ranks(np.eye(2), [[0, 1], [1, 0]])
    with pytest.raises(ValueError, match=r"3 classes need \(3, 3\)"):
        error_ranks(np.eye(4), confusion)
    with pytest.raises(ValueError, match="no error off the diagonal"):
        error_ranks(good, np.eye(3))
    with pytest.raises(ValueError, match="whole and not negative"):
        error_ranks(good, -np.array(confusion))
    with pytest.raises(ValueError, match="whole and not negative"):
        error_ranks(good, np.array(confusion) / 2)
    with pytest.raises(ValueError, match="similarity holds NaN"):
        error_ranks(np.full((3, 3), np.nan), confusion)
    with pytest.raises(ValueError, match="n_permutations"):
        error_ranks(good, confusion, n_permutations=0)
    with pytest.raises(ValueError, match="hits"):
        error_ranks(good, confusion, hits=[0])
    with pytest.raises(ValueError, match="control has shape"):
        partial_rank_correlation(confusion, good, np.eye(2))


# -- A network whose errors are known ----------------------------------------------------------

N_CLASSES = 4


class Reader(nn.Module):
    """Reads its 4 inputs off as its 4 outputs; two sites, and a hidden Linear beside the head."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(4, 4, bias=False)
        self.relu = nn.ReLU()
        self.second = nn.ReLU()
        self.head = nn.Linear(4, N_CLASSES, bias=False)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(4))
            self.head.weight.copy_(torch.eye(4) + torch.diag(torch.tensor([0.5, 0, 0.0]), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.relu(self.hidden(x))))


SITES = [GateSite("relu", 4, 1), GateSite("second", 4, 1)]
# 0 and 1 keep the same, 2 and 3 share one of two.
KEPT = [[0, 1], [0, 1], [2, 3], [3, 0]]


@pytest.fixture
def reader() -> nn.Module:
    return build(Reader)


def archs() -> list[SubArchitecture]:
    return [
        SubArchitecture.from_kept({"relu": kept, "second": kept}, SITES, task=k)
        for k, kept in enumerate(KEPT)
    ]


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """One image of each class that is right, and errors 0 -> 1 (twice), 2 -> 3, 3 -> 1."""
    shown = [0, 1, 2, 3, 1, 1, 3, 1]
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 2, 3])
    x = 0.1 * torch.rand(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[torch.arange(8), shown] += 1 + torch.arange(8) / 10
    return x, labels


def test_study_by_hand(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with assert_model_untouched(reader, *data):
        study = errors(reader, archs(), data, similarity="jaccard", n_permutations=23, hits=(1, 2))
    expected = [[1, 2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 1]]
    assert study.confusion.tolist() == expected
    assert (study.n_images, study.n_errors, study.n_outside) == (8, 4, 0)
    jaccard = [[1, 1, 0, 1 / 3], [1, 1, 0, 1 / 3], [0, 0, 1, 1 / 3], [1 / 3, 1 / 3, 1 / 3, 1]]
    assert np.allclose(study.similarities, jaccard)
    # 0 -> 1: rank 1 twice. 2 -> 3: 1. 3 -> 1: three equal ones.
    assert study.ranks.hits[1] == pytest.approx((3 + 1 / 3) / 4)
    assert study.ranks.hits[2] == pytest.approx((3 + 2 / 3) / 4)
    assert study.confused(2) == [("0", "1", 2, 1.0), ("2", "3", 1, 1.0)]
    assert study.confused(9)[-1] == ("3", "1", 1, 2.0)

    # The controls. Masks all have the same size: exactly the null.
    assert set(study.controls) == {"classifier rows", "class-mean features", "mask size"}
    assert study.controls["mask size"].hits[1] == pytest.approx(1 / 3)
    weight = reader.head.weight.detach()
    cosine = torch.nn.functional.cosine_similarity(weight[:, None], weight[None], dim=-1)
    assert np.allclose(study.control_similarities["classifier rows"], cosine)
    # Features: over the images that are right, one of each class.
    features = data[0][:4]
    cosine = torch.nn.functional.cosine_similarity(features[:, None], features[None], dim=-1)
    assert np.allclose(study.control_similarities["class-mean features"], cosine)
    assert set(study.partial) == set(study.controls)
    assert not study.left_out


@pytest.mark.slow
def test_kappa_and_gates(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    study = errors(reader, archs(), data, voting=False)
    assert study.voting is None
    expected = [[a.overlap(b, chance_corrected=True) for b in archs()] for a in archs()]
    assert np.allclose(study.similarities, expected)
    generator = torch.Generator().manual_seed(0)
    values = {s.name: torch.rand(4, 4, generator=generator) for s in SITES}
    gates = TaskGates(values, SITES, [0, 1, 2, 3], task_names=["a", "b", "c", "d"])
    study = errors(reader, gates, data, similarity="gates", voting=False)
    cosine = [
        torch.nn.functional.cosine_similarity(v[:, None], v[None], dim=-1) for v in values.values()
    ]
    assert np.allclose(study.similarities, (cosine[0] + cosine[1]) / 2, atol=1e-6)
    assert study.confused(1)[0][:2] == ("a", "b")
    matrix = np.arange(16.0).reshape(4, 4)
    given = errors(reader, archs(), data, similarity=matrix, voting=False)
    assert given.similarity == "given"
    assert np.array_equal(given.similarities, matrix)


@pytest.mark.slow
def test_voting_by_hand(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, labels = data
    study = errors(reader, archs(), data, n_random=2)
    assert study.voting is not None
    votes = torch.stack(
        [
            (x.double() * arch["relu"].double()) @ reader.head.weight.detach()[k]
            for k, arch in enumerate(archs())
        ],
        dim=1,
    )
    assert study.voting.accuracy == pytest.approx(
        float((votes.argmax(1) == labels).double().mean())
    )
    whole = reader(x).argmax(1)
    assert study.voting.whole == pytest.approx(float((whole == labels).double().mean()))
    agree = (votes.argmax(1) == whole).double().mean()
    assert study.voting.agreement == pytest.approx(float(agree))
    assert len(study.voting.random) == 2
    assert study.voting.p_value in (1 / 3, 2 / 3, 1)
    none = errors(reader, archs(), data, n_random=0).voting
    assert none is not None
    assert math.isnan(none.p_value)


def test_equal_votes_count_in_parts(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    closed = [SubArchitecture.from_kept({}, SITES, task=k) for k in range(4)]
    study = errors(reader, closed, data, n_random=0)
    assert study.voting is not None
    assert study.voting.accuracy == pytest.approx(0.25)


def test_some_classes_only(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    study = errors(reader, [archs()[k] for k in (3, 0, 2)], data, n_permutations=9)
    # Class 1's image is left out, and so are errors for class 1.
    assert study.tasks == (3, 0, 2)
    assert study.n_images == 7
    assert study.n_outside == 3
    assert study.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert study.voting is not None
    assert study.voting.n_images == 7
    assert "3 more called other classes" in study.summary()


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batch_size_plays_no_part(
    reader: nn.Module, data: tuple[Tensor, Tensor], batch_size: int
) -> None:
    first = errors(reader, archs(), data, n_permutations=19).to_dict()
    other = errors(
        reader, archs(), data, n_permutations=19, run=RunOptions(batch_size=batch_size)
    ).to_dict()
    assert json.dumps(_rounded(first)) == json.dumps(_rounded(other))


def _rounded(value: object) -> object:
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return round(value, 9) + 0.0 if isinstance(value, float) else value


class NoLinear(Reader):
    """Uses its head's weights without calling it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.relu(x)) @ self.head.weight.T


def test_controls_that_cannot_be_had_are_left_out(data: tuple[Tensor, Tensor]) -> None:
    model = build(NoLinear)
    study = errors(model, archs(), data, voting=False, n_permutations=9)
    assert set(study.left_out) == {"classifier rows", "class-mean features"}
    assert set(study.controls) == {"mask size"}
    assert "'head' cannot be read" in study.summary()
    with pytest.raises(GatingError), assert_model_untouched(model):
        errors(model, archs(), data, classifier="head")


def test_classifier_by_name(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    study = errors(reader, archs(), data, voting=False, n_permutations=9, classifier="hidden")
    assert np.allclose(study.control_similarities["classifier rows"], np.eye(4))
    with pytest.raises(ValueError, match="no module of the network"):
        errors(reader, archs(), data, classifier="nowhere")
    with pytest.raises(ValueError, match="a ReLU of the network"):
        errors(reader, archs(), data, classifier="relu")


@pytest.fixture
def study(reader: nn.Module, data: tuple[Tensor, Tensor]) -> ErrorStudy:
    return errors(reader, archs(), data, n_permutations=19, hits=(1, 2))


def test_frame_and_summary(study: ErrorStudy) -> None:
    frame = study.frame()
    assert list(frame.index) == ["sub-architectures", *study.controls]
    assert frame.loc["sub-architectures", "hit@1"] == study.ranks.hits[1]
    assert frame.loc["mask size", "mrr"] == pytest.approx(study.ranks.mrr_null)
    assert math.isnan(frame.loc["sub-architectures", "partial"])
    text = study.summary()
    for part in ("4 errors among 8 images of 4 classes", "chance", "permuted labels", "voting"):
        assert part in text
    json.dumps(study.to_dict(), allow_nan=False)
    assert "4 errors of 4 classes by kappa" in repr(study)


def test_plot(study: ErrorStudy) -> None:
    pytest.importorskip("matplotlib")
    figure = study.plot()
    left, right = figure.axes
    line = next(line for line in left.lines if line.get_label() == "sub-architectures")
    assert line.get_ydata() == pytest.approx(study.ranks.hit_curve)
    assert [t.get_text() for t in right.get_yticklabels()] == list(study.statistics)


def test_bad_input(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        errors(reader, archs()[:2], data)
    group = SubArchitecture.from_kept({}, SITES, task=(0, 1))
    with pytest.raises(ValueError, match="group of classes"):
        errors(reader, [*archs()[1:], group], data)
    with pytest.raises(ValueError, match="no similarity 'size'"):
        errors(reader, archs(), data, similarity="size")
    with pytest.raises(ValueError, match="needs TaskGates"):
        errors(reader, archs(), data, similarity="gates")
    with pytest.raises(TypeError, match="similarity must be"):
        errors(reader, archs(), data, similarity=object())
    with pytest.raises(ValueError, match=r"4 classes need"):
        errors(reader, archs(), data, similarity=np.eye(3))
    with pytest.raises(ValueError, match="no error to study"):
        errors(reader, archs(), (data[0][:4], data[1][:4]))
    with pytest.raises(ValueError, match="no image of any"):
        errors(reader, archs(), (data[0], torch.full((8,), 9)))
    with pytest.raises(ValueError, match="4 outputs"):
        errors(reader, [*archs(), SubArchitecture.from_kept({}, SITES, task=8)], data)
    with pytest.raises(ValueError, match="train mode"):
        errors(build(Reader).train(), archs(), data)
    with pytest.raises(ValueError, match="n_permutations"):
        errors(reader, archs(), data, n_permutations=0)
    with pytest.raises(ValueError, match="n_random"):
        errors(reader, archs(), data, n_random=-1)
    with pytest.raises(ValueError, match="hits"):
        errors(reader, archs(), data, hits=[0])


# -- One image ---------------------------------------------------------------------------------


def test_explain_one_error(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    image = data[0][6]  # of class 2, called 3
    with assert_model_untouched(reader, image):
        found = explain_error(reader, archs(), image, 2, similarity="jaccard")
    assert (found.right, found.called) == (2, 3)
    assert (found.rank, found.n_others) == (1.0, 3)
    assert found.value == found.overlap == pytest.approx(1 / 3)
    for site in found.sites:
        assert (site.shared, site.only_right, site.only_called) == ((3,), (2,), (0,))
        assert site.jaccard == pytest.approx(1 / 3)
        assert site.kappa == pytest.approx(0)
    whole = reader(image[None])[0].detach()
    assert found.logits["whole network"] == pytest.approx((float(whole[2]), float(whole[3])))
    head = reader.head.weight.detach()
    for name, kept in (("of the right class", [2, 3]), ("of the called class", [3, 0])):
        x = torch.zeros(4, dtype=torch.float64)
        x[kept] = image[kept]
        inside = head @ x
        assert found.logits[name] == pytest.approx((float(inside[2]), float(inside[3])))
    text = str(found)
    assert "Called 3 instead of 2" in text
    assert "relu: 1 of 4 shared" in text
    assert max(map(len, text.splitlines())) <= 100
    json.dumps(found.to_dict(), allow_nan=False)
    batch = explain_error(reader, archs(), image[None], 2, similarity="jaccard")
    assert batch == found


def test_explain_by_name_and_with_ties(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    values = {s.name: torch.zeros(4, 4) for s in SITES}
    for k, kept in enumerate(KEPT):
        for value in values.values():
            value[k, kept] = 1.0
    gates = TaskGates(values, SITES, [0, 1, 2, 3], task_names=["ant", "bee", "cat", "dog"])
    found = explain_error(reader, gates, data[0][7], 3, similarity="jaccard")
    assert found.rank == 2.0  # all three equally similar
    assert "Called bee (1) instead of dog (3)" in str(found)


def test_explain_refuses(reader: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, _ = data
    with pytest.raises(ValueError, match="no error to explain"):
        explain_error(reader, archs(), x[0], 0)
    with pytest.raises(ValueError, match="no sub-architecture of class 1"):
        explain_error(reader, [archs()[k] for k in (0, 2, 3)], x[1], 1)
    with pytest.raises(ValueError, match="calls the image 1, and there is no sub-architecture"):
        explain_error(reader, [archs()[k] for k in (0, 2, 3)], x[4], 0)
    with pytest.raises(TypeError, match="image must be a tensor"):
        explain_error(reader, archs(), "photo.jpg", 0)
    with pytest.raises(TypeError, match="one class index"):
        explain_error(reader, archs(), x[4], (0, 1))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="NaN or infinity"), assert_model_untouched(reader):
        explain_error(reader, archs(), torch.full((4,), math.nan), 0)
    with pytest.raises(ValueError, match="cannot be run"), assert_model_untouched(reader):
        explain_error(reader, archs(), torch.zeros(7, dtype=torch.float64), 0)
