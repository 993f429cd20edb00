"""Do two ways to choose or order channels agree, beyond what chance gives?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from nad_attr._checks import check_count
from nad_attr.stats.bootstrap import bootstrap_interval, check_share
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.strata import Tables, strata_of
from nad_attr.stats.tests import Statistic, count_test, fisher_interval, normal_p
from nad_attr.system.rng import seed_of

__all__ = ["kendall", "overlap_above_chance", "rank_agreement", "rank_biased_overlap", "rbo_weight"]

FloatArray: TypeAlias = NDArray[np.float64]

#: Persistence of rank-biased overlap: the first 50 ranks have 85 % of the weight.
PERSISTENCE = 0.98
#: Random choices of channels with which one overlap is compared.
_N_RANDOM = 999


def rbo_weight(p: float, depth: int) -> float:
    """Share of the weight of rank-biased overlap that the first ranks have.

    Args:
        p: Persistence in (0, 1): the larger, the more lower ranks count.
        depth: Number of ranks.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> round(rbo_weight(0.9, 10), 4)
        0.8556
    """
    check_share(p, "p")
    d = check_count(depth, "depth")
    i = np.arange(1, d)
    rest = math.log(1 / (1 - p)) - float((p**i / i).sum())
    return 1 - p ** (d - 1) + (1 - p) / p * d * rest


def rank_biased_overlap(a: Sequence[Any], b: Sequence[Any], p: float = PERSISTENCE) -> float:
    """Rank-biased overlap of two rankings, extrapolated: agreement in which top ranks count most.

    It is the expected share of common items among the first d, where d is the depth of a reader who
    continues after each rank with probability p. Rankings may have other items and lengths.

    Args:
        a: Items, the first one highest; none twice.
        b: The same of another ranking.
        p: Persistence in (0, 1), see :func:`rbo_weight`.

    Returns:
        In [0, 1]: 1 for equal rankings, 0 for those without a common item.

    Raises:
        ValueError: If a ranking is empty or has an item twice, or p is invalid.

    Source:
        Webber, Moffat and Zobel 2010, equation 32.

    Example:
        >>> round(rank_biased_overlap("abcdefg", "bacdefg", p=0.9), 3)
        0.9
    """
    check_share(p, "p")
    for items in (a, b):
        if len(items) == 0 or len(set(items)) < len(items):
            raise ValueError("a ranking must hold at least one item, and none twice.")
    short, long = sorted((list(a), list(b)), key=len)
    s, n = len(short), len(long)
    place = {item: d for d, item in enumerate(short, start=1)}
    met = np.zeros(n + 1)  # items that both have by this depth for the first time
    for d, item in enumerate(long, start=1):
        if item in place:
            met[max(d, place[item])] += 1
    common = met.cumsum()[1:]
    depth = np.arange(1, n + 1, dtype=np.float64)
    weight = p**depth
    total = float((weight * common / depth).sum())
    at_short, at_long = common[s - 1], common[-1]
    deeper = depth[s:]
    total += float((weight[s:] * at_short * (deeper - s) / (s * deeper)).sum())
    return float((1 - p) / p * total + ((at_long - at_short) / n + at_short / s) * p**n)


def rbo_of_places(first: NDArray[np.int64], second: NDArray[np.int64], p: float) -> FloatArray:
    """Rank-biased overlap of two orders of the same C channels, for many tasks: (T,).

    ``first`` and ``second`` are (T, C), the place of each channel, from 0 on.

    Example:
        >>> place = np.array([[0, 1, 2, 3, 4, 5, 6]])
        >>> rbo_of_places(place, place[:, [1, 0, 2, 3, 4, 5, 6]], 0.9).round(3)
        array([0.9])
    """
    n_tasks, n = first.shape
    met = np.maximum(first, second) + n * np.arange(n_tasks)[:, None]
    common = np.bincount(met.ravel(), minlength=n * n_tasks).reshape(n_tasks, n).cumsum(1)
    depth = np.arange(1, n + 1, dtype=np.float64)
    weight = p**depth
    return np.asarray((1 - p) / p * (common / depth) @ weight + p**n)


def places(
    scores: FloatArray, seed: int, what: str, tasks: Sequence[object] | None = None
) -> NDArray[np.int64]:
    """Place of each channel by its score (T, C), the highest 0: int64 (T, C).

    Ties are broken at random: in the order of the channels, two methods with many equal scores
    would agree. The random numbers depend on seed, method (``what``) and task; None: on the row.
    """
    result = np.empty(scores.shape, dtype=np.int64)
    numbers = np.arange(scores.shape[1])
    for row, score in enumerate(scores):
        key = row if tasks is None else tasks[row]
        shuffled = np.random.default_rng(seed_of(what, seed, key)).permutation(len(score))
        order = shuffled[np.argsort(-score[shuffled], kind="stable")]
        result[row, order] = numbers
    return result


@lru_cache(maxsize=256)
def random_rbo(n: int, p: float, n_draws: int, seed: int, part: int) -> FloatArray:
    """Rank-biased overlap of random orders of n channels: (n_draws,)."""
    generator = np.random.default_rng(seed_of("random rbo", n, p, n_draws, seed, part))
    result = np.empty(n_draws)
    step = max(1, 2_000_000 // n)
    for start in range(0, n_draws, step):
        stop = min(n_draws, start + step)
        rows = np.broadcast_to(np.arange(n), (stop - start, n))
        result[start:stop] = rbo_of_places(rows, generator.permuted(rows, axis=1), p)
    return result


def _pair(a: ArrayLike, b: ArrayLike) -> tuple[FloatArray, FloatArray]:
    first, second = (np.asarray(values, dtype=np.float64) for values in (a, b))
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"two scores per channel are needed, not {first.shape}, {second.shape}.")
    if np.isnan(first).any() or np.isnan(second).any():
        raise ValueError("scores hold NaN; leave out channels that a method does not know.")
    return first, second


def rank_agreement(
    a: ArrayLike,
    b: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    p: float = PERSISTENCE,
    n_random: int = 999,
    seed: int = 0,
    other: str = "",
) -> Statistic:
    """Do two methods put the same channels of a site first? Mean rank-biased overlap over strata.

    The control and the p-value come from random orders of as many channels, whose overlap is not 0.
    The interval is a bootstrap over strata.

    Args:
        a: (N,), scores of the channels by one method.
        b: (N,), by another.
        strata: (N,), the site of each channel; None: all are of one.
        p: Persistence, see :func:`rank_biased_overlap`.
        n_random: Random orders.
        seed: For the random orders, and for breaking ties.
        other: Name of the other method, for the sentence.

    Raises:
        ValueError: If shapes or numbers are invalid.

    Example:
        >>> result = rank_agreement([5.0, 4, 3, 2, 1], [4.0, 5, 3, 2, 1], p=0.9)
        >>> round(result.effect, 3)
        0.9
    """
    first, second = _pair(a, b)
    check_share(p, "p")
    check_count(n_random, "n_random")
    parts = strata_of(strata, len(first))
    each = np.empty(len(parts))
    for s, part in enumerate(parts):
        one = places(first[None, part], seed, f"a{s}")
        each[s] = rbo_of_places(one, places(second[None, part], seed, f"b{s}"), p)[0]
    draws = np.mean(
        [random_rbo(len(part), float(p), n_random, seed, s) for s, part in enumerate(parts)], axis=0
    )
    effect, control = float(each.mean()), float(draws.mean())
    found = permutation_p(np.array([effect]), draws[None], tail="both", centre=control)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Statistic(
        "rbo",
        len(first),
        effect,
        bootstrap_interval(each, seed=seed),
        float(found[0]),
        control,
        control,
        (float(low), float(high)),
        {"persistence": p, "strata": float(len(parts))},
        {"other": other},
    )


def kendall_parts(first: FloatArray, second: FloatArray) -> tuple[float, float]:
    """Kendall's tau-b of two scores, and its variance without effect, ties included.

    Source:
        Kendall 1970, equation 4.3 (variance with ties on both sides).
    """
    n = float(len(first))
    ties = [np.unique(x, return_counts=True)[1].astype(np.float64) for x in (first, second)]
    pairs = n * (n - 1) / 2
    level = [float((t * (t - 1) / 2).sum()) for t in ties]
    room = (pairs - level[0]) * (pairs - level[1])
    if n < 2 or room <= 0:
        return math.nan, math.nan
    tau = float(stats.kendalltau(first, second, method="asymptotic").statistic)
    odd = [float((t * (t - 1) * (2 * t + 5)).sum()) for t in ties]
    triple = [float((t * (t - 1) * (t - 2)).sum()) for t in ties]
    variance = (n * (n - 1) * (2 * n + 5) - odd[0] - odd[1]) / 18
    variance += 2 * level[0] * level[1] / (n * (n - 1))
    if n > 2:
        variance += triple[0] * triple[1] / (9 * n * (n - 1) * (n - 2))
    return tau, variance / room


def kendall(
    a: ArrayLike,
    b: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    level: float = 0.95,
    other: str = "",
) -> Statistic:
    """Do two methods put the channels of a site in the same order?

    The effect is Kendall's tau-b; over strata the mean, weighted by the inverse of its variance
    without effect. The p-value is that of the normal approximation with this variance (good from
    about ten channels on), the interval Fieller's.

    Args:
        a: (N,), scores of the channels by one method.
        b: (N,), by another.
        strata: (N,), the site of each channel; None: all are of one.
        level: Coverage of the interval.
        other: Name of the other method, for the sentence.

    Raises:
        ValueError: If shapes or numbers are invalid.

    Source:
        Kendall 1970; Fieller, Hartley and Pearson 1957 (interval, variance 0.437 / (n - 4)).

    Example:
        >>> round(kendall([1, 2, 3, 4], [1, 3, 2, 4]).effect, 4)
        0.6667
    """
    first, second = _pair(a, b)
    parts = strata_of(strata, len(first))
    found = np.array([kendall_parts(first[part], second[part]) for part in parts])
    room = [max(len(part) - 4, 0) for part in parts]
    tau, deviation = pooled_tau(found[None, :, 0], found[None, :, 1])
    low, high = fisher_interval(tau, sum(room), 0.437, level)
    ends = np.clip(normal_control(deviation, level), -1, 1)
    return Statistic(
        "kendall",
        len(first),
        float(tau[0]),
        (float(low[0]), float(high[0])),
        float(normal_p(tau / deviation)[0]),
        0.0,
        0.0,
        (-float(ends[0]), float(ends[0])),
        {"strata": float(len(parts))},
        {"other": other},
    )


def normal_control(deviation: FloatArray, level: float) -> FloatArray:
    """How far from its mean a normal value lies with probability ``level`` at most."""
    return np.asarray(stats.norm.ppf((1 + level) / 2) * deviation)


def pooled_tau(tau: FloatArray, variance: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Mean over strata weighted by inverse variance, and its deviation; (T, S) to (T,)."""
    with np.errstate(invalid="ignore", divide="ignore"):
        weight = np.where(np.isnan(tau), 0.0, 1 / variance)
        total = weight.sum(1)
        total = np.where(total > 0, total, np.nan)
        return np.nansum(weight * tau, axis=1) / total, 1 / np.sqrt(total)


def kappas(both: FloatArray, a: FloatArray, b: FloatArray, total: FloatArray) -> FloatArray:
    """Overlap corrected for chance, as :func:`nad_attr.kappa`, from counts (all the same shape)."""
    union = a + b - both
    by_chance = a * b / total
    chance_union = a + b - by_chance
    with np.errstate(invalid="ignore", divide="ignore"):
        overlap = np.where(union > 0, both / union, 1.0)
        expected = np.where(chance_union > 0, by_chance / chance_union, 1.0)
        corrected = (overlap - expected) / (1 - expected)
    return np.asarray(np.where(expected == 1, 1.0, corrected))


def random_kappas(
    counts: FloatArray, n_random: int, seed: int, method: str, tasks: Sequence[object] | None = None
) -> FloatArray:
    """Mean kappa over sites of random channels, as many as both keep: (T, draws).

    ``counts`` (4, T, S) are the channels kept by both (not used), by one, by the other, and all.
    The draws depend on seed, method and task (None: its number).
    """
    _, ours, theirs, total = counts
    result = np.empty((ours.shape[0], n_random))
    for row, (a, b, n) in enumerate(zip(ours, theirs, total, strict=True)):
        key = row if tasks is None else tasks[row]
        generator = np.random.default_rng(seed_of("random kappa", seed, method, key))
        good, bad = a.astype(np.int64), (n - a).astype(np.int64)
        both = generator.hypergeometric(good, bad, b.astype(np.int64), (n_random, len(a)))
        result[row] = kappas(both.astype(np.float64), a, b, n).mean(1)
    return result


def overlap_above_chance(
    a: ArrayLike,
    b: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    level: float = 0.95,
    seed: int = 0,
    other: str = "",
) -> Statistic:
    """Do two methods keep the same channels of a site, beyond what chance explains?

    The effect is kappa (:func:`nad_attr.kappa`), its mean over strata; the p-value is exact, from
    the number of channels that both keep, as in :func:`association`; the interval is a bootstrap
    over strata. The control comes from random choices of as many channels in each stratum.

    Args:
        a: bool (N,), kept by one method.
        b: bool (N,), kept by another.
        strata: (N,), the site of each channel; None: all are of one.
        level: Coverage of the intervals.
        seed: For the bootstrap.
        other: Name of the other method, for the sentence.

    Raises:
        TypeError: If they are not truth values.
        ValueError: If shapes do not fit.

    Example:
        >>> kept = [True, True, False, False]
        >>> overlap_above_chance(kept, kept).effect
        1.0
    """
    first, second = np.asarray(a), np.asarray(b)
    if first.dtype != bool or second.dtype != bool:
        raise TypeError("kept channels must be truth values; compare gates with 0.5.")
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"masks of {first.shape} and {second.shape} channels cannot be compared.")
    parts = strata_of(strata, len(first))
    counts = np.array(
        [
            [(first & second)[part].sum(), first[part].sum(), second[part].sum(), len(part)]
            for part in parts
        ],
        dtype=np.float64,
    )
    both, n_a, n_b, total = counts.T
    each = kappas(both, n_a, n_b, total)
    tables = Tables(both[None], n_a[None], n_b, total)
    p, _ = count_test(tables, level)
    drawn = random_kappas(counts.T[:, None], _N_RANDOM, seed, other)[0]
    ends = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Statistic(
        "overlap",
        len(first),
        float(each.mean()),
        bootstrap_interval(each, level=level, seed=seed),
        float(p[0]),
        0.0,
        float(drawn.mean()),
        (float(ends[0]), float(ends[1])),
        {"both": float(both.sum()), "expected": float(tables.expected[0])},
        {"other": other},
    )
