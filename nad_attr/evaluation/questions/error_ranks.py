"""Statistics: are images mistaken for classes that are similar to the right one?

Pure functions of a confusion matrix and a similarity matrix of K classes: an error of class y for
class y' is looked up at the rank of y' among the other K - 1 classes, by similarity to y.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nad_attr._checks import check_count
from nad_attr.stats.bootstrap import bootstrap_means, interval_of
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray

__all__ = ["PartialCorrelation", "RankStatistics", "error_ranks", "partial_rank_correlation"]


#: Decimals to which similarities are compared: what differs less is rounding, and a tie.
DECIMALS = 12


@dataclass(frozen=True, eq=False)
class RankStatistics(Result):
    """The ranks of errors among the other K - 1 classes, sorted by similarity.

    Equally similar classes share their ranks: every number is its expected value over all ways to
    break the ties.

    Attributes:
        n_classes: K.
        n_errors: Misclassified images.
        rank_counts: float64 (K - 1,), how many errors are of each rank, from the most similar on.
        hits: ``{n: share of errors among the n most similar classes}``, hit@n.
        hit_null: ``{n: n / (K - 1)}``, hit@n of a similarity that says nothing.
        hit_p: ``{n: p-value by permutation}``: the classes of the similarity matrix are permuted
            (rows and columns together, as in Mantel's test); share of permutations with as high a
            hit@n.
        hit_binomial_p: ``{n: p-value of the binomial test}``, which takes each error for an
            independent draw. Errors of the same two classes are not: it is too small unless they
            are rare, and is here for comparison.
        hit_intervals: ``{n: (low, high)}``, 95 % bootstrap interval over true classes.
        mrr: Mean reciprocal rank.
        mrr_null: ``(1 + 1/2 + ... + 1/(K - 1)) / (K - 1)``.
        mrr_p: P-value by permutation.
        mrr_interval: 95 % bootstrap interval over true classes.
        mean_rank: From 1 to K - 1; K / 2 for a similarity that says nothing.
        permuted_hits: ``{n: float64 (n_permutations,)}``, hit@n with permuted classes.
        permuted_mrr: float64 (n_permutations,).
    """

    n_classes: int
    n_errors: int
    rank_counts: FloatArray
    hits: dict[int, float]
    hit_null: dict[int, float]
    hit_p: dict[int, float]
    hit_binomial_p: dict[int, float]
    hit_intervals: dict[int, tuple[float, float]]
    mrr: float
    mrr_null: float
    mrr_p: float
    mrr_interval: tuple[float, float]
    mean_rank: float
    permuted_hits: dict[int, FloatArray]
    permuted_mrr: FloatArray

    @property
    def hit_curve(self) -> FloatArray:
        """(K - 1,), hit@1 to hit@(K - 1)."""
        return np.asarray(self.rank_counts.cumsum() / self.n_errors)

    def _records(self) -> list[dict[str, Any]]:
        row: dict[str, Any] = {"n_errors": self.n_errors}
        for k, value in self.hits.items():
            low, high = self.hit_intervals[k]
            row |= {f"hit@{k}": value, f"hit@{k}_low": low, f"hit@{k}_high": high}
            row |= {f"hit@{k}_null": self.hit_null[k], f"hit@{k}_p": self.hit_p[k]}
        low, high = self.mrr_interval
        row |= {"mrr": self.mrr, "mrr_low": low, "mrr_high": high, "mrr_null": self.mrr_null}
        return [row | {"mrr_p": self.mrr_p, "mean_rank": self.mean_rank}]


@dataclass(frozen=True)
class PartialCorrelation(Result):
    """Does one similarity say more about errors than another one does already?

    Attributes:
        value: Partial rank correlation of confusions and similarity, given the control.
        p: P-value by permutation, for a correlation above 0.
        without_control: The plain rank correlation of confusions and similarity.
    """

    value: float
    p: float
    without_control: float

    def _records(self) -> list[dict[str, Any]]:
        return [self._fields()]


def checked_similarity(similarity: ArrayLike, n: int, what: str = "similarity") -> FloatArray:
    """Check a similarity matrix of n classes, and round it so that ties are equal."""
    matrix = np.asarray(similarity, dtype=np.float64)
    if matrix.shape != (n, n):
        raise ValueError(f"{what} has shape {matrix.shape}; {n} classes need ({n}, {n}).")
    if np.isnan(matrix[~np.eye(n, dtype=bool)]).any():
        raise ValueError(f"{what} holds NaN.")
    return np.asarray(np.round(matrix, DECIMALS))


def _checked_confusion(confusion: ArrayLike) -> FloatArray:
    counts = np.array(confusion, dtype=np.float64)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or len(counts) < 3:
        raise ValueError(
            f"confusion must be (K, K) with at least three classes, got {counts.shape}: among two, "
            "there is only one class to be mistaken for."
        )
    if not np.isfinite(counts).all() or (counts < 0).any() or (counts % 1 != 0).any():
        raise ValueError("confusion must hold numbers of images, whole and not negative.")
    np.fill_diagonal(counts, 0.0)
    if counts.sum() == 0:
        raise ValueError("confusion holds no error off the diagonal; there is nothing to rank.")
    return counts


def others_above(similarity: FloatArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many other classes are more similar to y than y', and how many, with y', equally.

    int64 (K, K) each, a row for each class y and a column for each y'; the diagonal means nothing.
    """
    from scipy.stats import rankdata  # takes long to load

    off = similarity.copy()
    np.fill_diagonal(off, -np.inf)
    # The class itself comes last in descending order, and counts for nothing before it.
    first, last = (rankdata(-off, method, axis=1).astype(np.int64) for method in ("min", "max"))
    return first - 1, last - first + 1


def binomial_p(successes: float, trials: int, probability: float) -> float:
    """P(X >= successes) of a binomial X; a fraction of a success is rounded down.

    Example:
        >>> binomial_p(2, 2, 0.5)
        0.25
    """
    least = math.floor(successes + 1e-9)
    if least <= 0:
        return 1.0
    from scipy.stats import binomtest  # takes long to load

    return float(binomtest(least, trials, probability, alternative="greater").pvalue)


def error_ranks(
    similarity: ArrayLike,
    confusion: ArrayLike,
    *,
    hits: Sequence[int] = (1, 3, 5),
    n_permutations: int = 1000,
    seed: int = 0,
) -> RankStatistics:
    """Rank the class that each error was called among all wrong classes, by similarity.

    Args:
        similarity: (K, K), higher = more alike; need not be symmetric: row y ranks the others.
        confusion: (K, K), how many images of class y were called y'; the diagonal plays no part.
        hits: The n of hit@n; those of K - 1 and above, which are always 1, are left out.
        n_permutations: Of the classes, for the p-values.
        seed: Of permutations and bootstrap; the global random state is not used.

    Returns:
        The statistics, their nulls and p-values.

    Raises:
        ValueError: If shapes do not fit, there are fewer than three classes or no error, or values
            make no sense.

    Example:
        >>> similarity = [[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]]
        >>> confusion = [[7, 3, 0], [1, 9, 0], [1, 0, 9]]  # 4 times the most similar class
        >>> result = error_ranks(similarity, confusion, hits=[1])
        >>> result.hits, result.hit_null, result.mrr
        ({1: 0.8}, {1: 0.5}, 0.9)
    """
    counts = _checked_confusion(confusion)
    n = len(counts)
    matrix = checked_similarity(similarity, n)
    check_count(n_permutations, "n_permutations")
    wanted = sorted({check_count(k, "hits") for k in hits if check_count(k, "hits") < n - 1})

    above, equal = others_above(matrix)
    harmonic = np.concatenate([[0.0], (1 / np.arange(1, n + 1)).cumsum()])  # 0, 1, 1 + 1/2, ...
    reciprocal = (harmonic[above + equal] - harmonic[above]) / equal
    # What each pair of classes is worth: hit@n for each n, reciprocal rank, rank.
    hit = [np.clip((k - above) / equal, 0.0, 1.0) for k in wanted]  # ties are broken at random
    worth = np.stack([*hit, reciprocal], axis=-1)
    y, called = counts.nonzero()
    times = counts[y, called]
    n_errors = int(times.sum())

    def means(order: NDArray[np.int64]) -> FloatArray:
        return np.asarray(times @ worth[order[y], order[called]] / n_errors)

    observed = means(np.arange(n))
    generator = np.random.default_rng(seed)
    permuted = np.stack([means(generator.permutation(n)) for _ in range(n_permutations)])

    changes = np.zeros(n + 1)
    np.add.at(changes, above[y, called], times / equal[y, called])
    np.add.at(changes, above[y, called] + equal[y, called], -times / equal[y, called])
    rank_counts = np.maximum(changes.cumsum()[: n - 1], 0.0)

    low, high = _over_classes(times[:, None] * worth[y, called], times, y, n, seed)
    mean_rank = float(times @ (above[y, called] + (equal[y, called] + 1) / 2) / n_errors)
    null = {k: k / (n - 1) for k in wanted}
    values = {k: float(observed[i]) for i, k in enumerate(wanted)}
    return RankStatistics(
        n_classes=n,
        n_errors=n_errors,
        rank_counts=np.asarray(rank_counts),
        hits=values,
        hit_null=null,
        hit_p={k: permutation_p(values[k], permuted[:, i]) for i, k in enumerate(wanted)},
        hit_binomial_p={k: binomial_p(values[k] * n_errors, n_errors, null[k]) for k in wanted},
        hit_intervals={k: (float(low[i]), float(high[i])) for i, k in enumerate(wanted)},
        mrr=float(observed[-1]),
        mrr_null=float(harmonic[n - 1] / (n - 1)),
        mrr_p=permutation_p(float(observed[-1]), permuted[:, -1]),
        mrr_interval=(float(low[-1]), float(high[-1])),
        mean_rank=mean_rank,
        permuted_hits={k: permuted[:, i] for i, k in enumerate(wanted)},
        permuted_mrr=permuted[:, -1],
    )


def _over_classes(
    worth: FloatArray, times: FloatArray, y: NDArray[np.int64], n: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Bootstrap interval over true classes of the mean over errors, for each column of worth."""
    total, count = np.zeros((n, worth.shape[1])), np.zeros(n)
    np.add.at(total, y, worth)
    np.add.at(count, y, times)
    with_errors = count > 0
    if with_errors.sum() < 2:
        nothing = np.full(worth.shape[1], np.nan)
        return nothing, nothing.copy()
    total, count = total[with_errors], count[with_errors, None]
    return interval_of(bootstrap_means(total / count, weights=count, seed=seed))


def _row_ranks(matrix: FloatArray) -> FloatArray:
    """Midranks within each row, off the diagonal, centred; 0 on the diagonal."""
    above, equal = others_above(matrix)
    ranks = -(above + (equal - 1) / 2)
    n = len(matrix)
    np.fill_diagonal(ranks, 0.0)
    centred = ranks - ranks.sum(1, keepdims=True) / (n - 1)
    np.fill_diagonal(centred, 0.0)
    return np.asarray(centred)


def _control_columns(control: FloatArray) -> FloatArray:
    """The part of a similarity that a control may explain: (K, K, 4), centred in rows.

    These are its ranks within the row, and a cubic in its ranks over all pairs. Ranks within the
    row alone would leave some of it, so that a mere copy of the control would seem to add more.
    """
    n = len(control)
    off = ~np.eye(n, dtype=bool)
    values = np.sort(control[off])
    below = np.searchsorted(values, control, side="left")
    place = (below + np.searchsorted(values, control, side="right")) / len(values) - 1
    columns = [_row_ranks(control)]
    for power in (1, 2, 3):
        column = np.where(off, place**power, 0.0)
        columns.append(np.where(off, column - column.sum(1, keepdims=True) / (n - 1), 0.0))
    return np.stack(columns, axis=-1)


def _orthonormal(columns: FloatArray) -> FloatArray:
    """An orthonormal basis of the columns (N, M): (N, up to M)."""
    length = np.sqrt(np.square(columns).sum(0))
    left, strength, _ = np.linalg.svd(
        columns / np.where(length > 0, length, 1.0), full_matrices=False
    )
    return np.asarray(left[:, strength > 1e-9])


def _residual(values: FloatArray, basis: FloatArray) -> FloatArray:
    """What is left of values (N,) without what the basis explains."""
    rest = values - basis @ (basis.T @ values)
    nothing = (rest @ rest) <= 1e-18 * (values @ values)
    return np.zeros_like(rest) if nothing else rest


def _correlation(a: FloatArray, b: FloatArray) -> float:
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > 0 else 0.0


def partial_rank_correlation(
    confusion: ArrayLike,
    similarity: ArrayLike,
    control: ArrayLike,
    *,
    n_permutations: int = 1000,
    seed: int = 0,
) -> PartialCorrelation:
    """Rank correlation of confusions with a similarity, beyond what a control explains of both.

    Confusions and similarity are ranked over the other classes within the row of each true class,
    so the number of a class's errors plays no part; classes without errors are left out. The part
    that the control's ranks explain (within the row, and a cubic in those over all pairs) is taken
    away from both; the correlation is that of the residuals. The p-value permutes the classes of
    the similarity's residuals (a partial Mantel test). If a similarity nearly repeats its control,
    small p-values come somewhat too often (in simulations with 20 classes, up to 10 % below 0.05).

    Args:
        confusion: (K, K), see :func:`error_ranks`.
        similarity: (K, K).
        control: (K, K), another similarity.
        n_permutations: Of the classes.
        seed: Of the permutations.

    Raises:
        ValueError: As :func:`error_ranks`.

    Example:
        >>> confusion = [[0, 2, 1, 0], [2, 0, 1, 0], [0, 1, 0, 2], [0, 1, 2, 0]]
        >>> nothing = np.ones((4, 4))
        >>> result = partial_rank_correlation(confusion, confusion, nothing, n_permutations=99)
        >>> round(result.value, 6), result.p < 0.2
        (1.0, True)
    """
    counts = _checked_confusion(confusion)
    n = len(counts)
    check_count(n_permutations, "n_permutations")
    off = ~np.eye(n, dtype=bool)
    used = off & (counts.sum(1, keepdims=True) > 0)
    confused = _row_ranks(counts)[used]
    similar = _row_ranks(checked_similarity(similarity, n))
    columns = _control_columns(checked_similarity(control, n, "control"))

    rest = np.zeros((n, n))
    rest[off] = _residual(similar[off], _orthonormal(columns[off]))
    basis = _orthonormal(columns[used])
    confused_rest = _residual(confused, basis)

    def partial(order: NDArray[np.int64]) -> float:
        return _correlation(confused_rest, _residual(rest[np.ix_(order, order)][used], basis))

    observed = partial(np.arange(n))
    generator = np.random.default_rng(seed)
    draws = [partial(generator.permutation(n)) for _ in range(n_permutations)]
    plain = _correlation(confused, similar[used])
    return PartialCorrelation(observed, permutation_p(observed, draws), plain)
