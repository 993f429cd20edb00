"""Tests of how gates relate to what units mean, on plain arrays.

With ``strata``, the gate site of each channel, a test compares only channels of the same site and
adds up over sites, so that differences between layers do not matter. p-values are two-sided.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from nad_attr._checks import check_count
from nad_attr.stats.bootstrap import check_share
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.ranks import midranks, standard_ranks
from nad_attr.stats.results import Result
from nad_attr.stats.sentences import MEASURES, sentence_of
from nad_attr.stats.strata import (
    Tables,
    exact_p,
    null_counts,
    pair_counts,
    permutations,
    strata_of,
    with_tail,
)
from nad_attr.stats.tables import pandas

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Statistic", "association", "benjamini_hochberg", "mann_whitney", "rank_correlation"]

FloatArray: TypeAlias = NDArray[np.float64]
BoolArray: TypeAlias = NDArray[np.bool_]

#: With this number of kept and dropped channels a sum of ranks is nearly normal, also in the tails.
MIN_PER_SIDE_FOR_NORMAL = 10


@dataclass(frozen=True)
class Statistic(Result):
    """One number with everything needed to judge it.

    Attributes:
        test: Name of the test.
        n: Number of values (for matrices: pairs of tasks).
        effect: Its size; ``measure`` is its name.
        interval: Low and high end, 95 %; NaN: not known.
        p: Two-sided p-value; NaN: none.
        null: The effect if there were none.
        control: The effect of chance: the mean over random choices of the same size per stratum.
        control_interval: The central 95 % of such choices.
        details: More numbers, by name.
        names: Names in the sentence: ``task``, ``site``, ``concept``, ``other``.

    Example:
        >>> result = Statistic("mantel", 45, 0.4, (0.2, 0.6), 0.01, 0.0)
        >>> result.measure, result.effect
        ("Mantel's r", 0.4)
        >>> result.sentence
        'Tasks that are alike by the other measure share more channels: r = 0.400 over 45 pairs ...
    """

    test: str
    n: int
    effect: float
    interval: tuple[float, float]
    p: float
    null: float
    control: float = math.nan
    control_interval: tuple[float, float] = (math.nan, math.nan)
    details: Mapping[str, float] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def measure(self) -> str:
        """The name of the effect."""
        return MEASURES[self.test]

    def frame(self) -> pd.DataFrame:
        """One row: :meth:`row`, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        return pandas("Statistic.frame()").DataFrame([self.row()])

    def summary(self) -> str:
        """The conclusion: :attr:`sentence`."""
        return self.sentence

    def plot(self, axes: Any = None) -> Figure:
        """The effect with its interval, and that of chance.

        Args:
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_intervals

        rows = {self.test: (self.effect, *self.interval)}
        if not math.isnan(self.control):
            rows["chance"] = (self.control, *self.control_interval)
        return plot_intervals(rows, self.measure, at=self.null, axes=axes)

    def row(self) -> dict[str, Any]:
        """The numbers as a row of a table."""
        names = {key: self.names.get(key, "") for key in ("task", "site", "concept", "other")}
        return {
            "test": self.test,
            **names,
            "n": self.n,
            "effect": self.effect,
            "measure": self.measure,
            "low": self.interval[0],
            "high": self.interval[1],
            "p": self.p,
            "q": math.nan,
            "null": self.null,
            "control": self.control,
            "control_low": self.control_interval[0],
            "control_high": self.control_interval[1],
        }

    @property
    def sentence(self) -> str:
        """The conclusion in words."""
        return sentence_of(self.row())


# -- checks ------------------------------------------------------------------------------------


def _numbers(values: ArrayLike, what: str) -> FloatArray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise ValueError(f"{what} must be one number per channel, not of shape {array.shape}.")
    if np.isinf(array).any():
        raise ValueError(f"{what} hold infinity.")
    return array


def _flags(values: ArrayLike, what: str, n: int | None = None) -> BoolArray:
    array = np.asarray(values)
    if array.dtype != bool or array.ndim != 1:
        raise TypeError(
            f"{what} must be one truth value per channel, got {array.dtype} "
            f"{array.shape}; compare gates with 0.5."
        )
    if n is not None and len(array) != n:
        raise ValueError(f"{what} are {len(array)} for {n} channels.")
    return array


def normal_interval(
    centre: FloatArray, deviation: FloatArray, level: float
) -> tuple[FloatArray, FloatArray]:
    """The central interval of a normal distribution that has probability ``level``."""
    width = stats.norm.ppf((1 + level) / 2) * deviation
    return centre - width, centre + width


def normal_p(z: FloatArray) -> FloatArray:
    """Two-sided p-value of a standard normal value."""
    return np.asarray(2 * stats.norm.sf(np.abs(z)))


# -- kept against dropped ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Mann and Whitney's numbers of T tasks in S strata, (T, S) each."""

    u: FloatArray
    pairs: FloatArray
    null: FloatArray
    placed: FloatArray

    @property
    def auc(self) -> FloatArray:
        with np.errstate(invalid="ignore"):
            return np.asarray(self.u.sum(1) / self.pairs.sum(1))

    @property
    def deviation(self) -> FloatArray:
        """Standard deviation of the pooled AUC, by DeLong; NaN if no stratum has one."""
        known = np.where(np.isnan(self.placed) | (self.pairs == 0), 0.0, self.placed)
        # A stratum with one channel on a side has no own variance: the null's replaces it.
        stand_in = self.null / np.square(np.maximum(self.pairs, 1.0))
        missing = np.isnan(self.placed) & (self.pairs > 0)
        variance = np.where(missing, stand_in, known)
        with np.errstate(invalid="ignore"):
            pooled = (np.square(self.pairs) * variance).sum(1) / np.square(self.pairs.sum(1))
        return np.asarray(np.sqrt(pooled))

    @property
    def null_deviation(self) -> FloatArray:
        with np.errstate(invalid="ignore"):
            return np.asarray(np.sqrt(self.null.sum(1)) / self.pairs.sum(1))


def pairs_of(kept: list[BoolArray], values: list[FloatArray]) -> _Pairs:
    """Pairs of kept and dropped channels: for each stratum masks (T, C) and values (C,)."""
    columns = [pair_counts(mask, value) for mask, value in zip(kept, values, strict=True)]
    u, pairs, null, placed = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
    return _Pairs(u, pairs, null, placed)


def _enough(n_kept: Any, n: Any) -> Any:
    return (n_kept >= MIN_PER_SIDE_FOR_NORMAL) & (n - n_kept >= MIN_PER_SIDE_FOR_NORMAL)


def mann_whitney(
    kept: ArrayLike,
    values: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    n_permutations: int = 9999,
    seed: int = 0,
    level: float = 0.95,
) -> Statistic:
    """Do kept channels have higher values than dropped ones of the same stratum?

    The effect is the AUC: the share of pairs, one kept and one dropped channel of one stratum, in
    which the kept one is higher, ties counting half. Over strata it is the mean of their AUCs
    weighted by kept x dropped; 0.5 means no difference, ``details["rank_biserial"]`` is 2 AUC - 1.
    The p-value shuffles values within strata, which equals drawing as many channels of each stratum
    at random: their AUCs are the control. If no draw is as extreme, and at least ten channels are
    kept and dropped, the normal approximation gives it. The interval is DeLong's.

    Args:
        kept: bool (N,).
        values: (N,), for example best IoUs; channels with NaN are left out.
        strata: (N,), the site of each channel; None: all are of one.
        n_permutations: Random choices; 0: the p-value is that of the normal approximation with the
            exact variance, ties included, and the control is 0.5 with that variance.
        seed: For the permutations.
        level: Coverage of the interval.

    Raises:
        TypeError: If ``kept`` are not truth values.
        ValueError: If shapes or numbers are invalid.

    Source:
        Mann and Whitney 1947; van Elteren 1960 (strata); DeLong et al. 1988 (variance).

    Example:
        >>> kept = [True, True, False, False, False]
        >>> result = mann_whitney(kept, [5.0, 3.0, 1.0, 4.0, 2.0], n_permutations=99)
        >>> round(result.effect, 4), round(result.details["rank_biserial"], 4)  # 5 of 6 pairs
        (0.8333, 0.6667)
    """
    numbers = _numbers(values, "values")
    mask = _flags(kept, "kept", len(numbers))
    check_count(n_permutations, "n_permutations", least=0)
    check_share(level, "level")
    known = ~np.isnan(numbers)
    names = None if strata is None else np.asarray(strata)
    parts = [part[known[part]] for part in strata_of(names, len(numbers))]
    parts = [part for part in parts if len(part)]
    masks, vals = [mask[part][None] for part in parts], [numbers[part] for part in parts]
    n = int(known.sum())
    if not parts:
        return Statistic("mann_whitney", 0, math.nan, (math.nan, math.nan), math.nan, 0.5)
    found = pairs_of(masks, vals)
    auc = found.auc
    low, high = (np.clip(end, 0, 1) for end in normal_interval(auc, found.deviation, level))
    with np.errstate(invalid="ignore", divide="ignore"):
        z = (auc - 0.5) / found.null_deviation
    p_normal = float(normal_p(z)[0])
    if n_permutations and not math.isnan(auc[0]):
        draws = random_aucs(masks, vals, n_permutations, seed)
        kept_in = sum(int(m.sum()) for m in masks)
        p_draws = permutation_p(auc, draws, tail="both", centre=0.5)
        p = float(with_tail(p_draws, n_permutations, z, _enough(kept_in, n))[0])
        control = float(draws.mean())
        ends = np.quantile(draws[0], [(1 - level) / 2, (1 + level) / 2])
    else:
        p, control = p_normal, 0.5
        ends = np.clip(normal_interval(np.full(1, 0.5), found.null_deviation, level), 0, 1)[:, 0]
    return Statistic(
        "mann_whitney",
        n,
        float(auc[0]),
        (float(low[0]), float(high[0])),
        p if not math.isnan(auc[0]) else math.nan,
        0.5,
        control,
        (float(ends[0]), float(ends[1])),
        {
            "rank_biserial": float(2 * auc[0] - 1),
            "u": float(found.u.sum()),
            "pairs": float(found.pairs.sum()),
            "p_normal": p_normal,
        },
    )


def random_aucs(
    kept: list[BoolArray], values: list[FloatArray], n_draws: int, seed: int
) -> FloatArray:
    """Pooled AUCs (T, draws) when values are shuffled among the channels of each stratum.

    All tasks see the same shuffled values, so that a draw has what tasks share.
    """
    ranks = [midranks(value) for value in values]
    masks = [mask.astype(np.float64) for mask in kept]
    us = np.zeros((len(kept[0]), n_draws))
    for where, block in permutations(ranks, n_draws, seed, "mann_whitney"):
        for mask, shuffled in zip(masks, block, strict=True):
            n1 = mask.sum(1)
            us[:, where] += mask @ shuffled.T - (n1 * (n1 + 1) / 2)[:, None]
    pairs = sum(mask.sum(1) * (~mask).sum(1) for mask in kept)
    with np.errstate(invalid="ignore"):
        return us / np.asarray(pairs, dtype=np.float64)[:, None]


# -- gates against values ----------------------------------------------------------------------


def fisher_interval(
    rho: FloatArray, freedom: ArrayLike, factor: float, level: float
) -> tuple[FloatArray, FloatArray]:
    """Interval of a correlation by Fisher's z, whose variance is ``factor / freedom``."""
    room = np.asarray(freedom, dtype=np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        deviation = np.sqrt(factor / np.where(room > 0, room, np.nan))
        centre = np.arctanh(np.clip(rho, -1 + 1e-15, 1 - 1e-15))
    low, high = normal_interval(centre, deviation, level)
    return np.tanh(low), np.tanh(high)


def rank_correlation(
    gates: ArrayLike,
    values: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    n_permutations: int = 9999,
    seed: int = 0,
    level: float = 0.95,
) -> Statistic:
    """Do channels with higher gates have higher values, within the same stratum?

    The effect is Spearman's rho, with strata the mean of theirs weighted by channels - 1, which is
    the inverse of their variance without effect. The p-value shuffles values within strata; if no
    draw is as extreme, with at least 20 channels, the normal approximation gives it.

    Args:
        gates: (N,), gates or other numbers that rank channels.
        values: (N,), for example the IoU with a concept; pairs with NaN are left out.
        strata: (N,), the site of each channel; None: all are of one.
        n_permutations: For the p-value; 0: normal approximation with the exact variance.
        seed: For the permutations.
        level: Coverage of the interval (Fisher's z with Fieller's variance 1.06 / (n - 3)).

    Raises:
        ValueError: If shapes or numbers are invalid.

    Source:
        Spearman 1904; Fieller, Hartley and Pearson 1957 (interval).

    Example:
        >>> result = rank_correlation([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], n_permutations=99)
        >>> round(result.effect, 4)
        0.8
    """
    a, b = _numbers(gates, "gates"), _numbers(values, "values")
    if len(a) != len(b):
        raise ValueError(f"{len(a)} gates came with {len(b)} values.")
    check_count(n_permutations, "n_permutations", least=0)
    check_share(level, "level")
    known = ~np.isnan(a) & ~np.isnan(b)
    parts = [part[known[part]] for part in strata_of(strata, len(a))]
    # Strata in which a side does not vary have no correlation.
    parts = [p for p in parts if len(p) > 1 and np.ptp(a[p]) > 0 and np.ptp(b[p]) > 0]
    n = sum(len(part) for part in parts)
    if not parts:
        nothing = (math.nan, math.nan)
        n_known = int(known.sum())
        return Statistic("rank_correlation", n_known, math.nan, nothing, math.nan, 0.0)
    first = [standard_ranks(a[part]) for part in parts]
    second = [standard_ranks(b[part]) for part in parts]
    weight = np.array([len(part) - 1.0 for part in parts])
    each = np.array([float(x @ y) for x, y in zip(first, second, strict=True)])
    rho = float(weight @ each / weight.sum())
    # Without effect, rho of a stratum has variance 1 / (channels - 1): the same with ties.
    deviation = 1 / math.sqrt(weight.sum())
    p_normal = float(normal_p(np.array([rho / deviation]))[0])
    ends = np.clip(normal_interval(np.zeros(1), np.full(1, deviation), level), -1, 1)[:, 0]
    p, control = p_normal, 0.0
    if n_permutations:
        draws = np.empty((1, n_permutations))
        for where, block in permutations(second, n_permutations, seed, "rank_correlation"):
            sums = sum(w * (y @ x) for w, x, y in zip(weight, first, block, strict=True))
            draws[0, where] = np.asarray(sums) / weight.sum()
        enough = n >= 2 * MIN_PER_SIDE_FOR_NORMAL
        by_draws = permutation_p([rho], draws, tail="both")
        p = float(with_tail(by_draws, n_permutations, np.array([rho / deviation]), enough)[0])
        control = float(draws.mean())
        ends = np.quantile(draws[0], [(1 - level) / 2, (1 + level) / 2])
    room = sum(max(len(part) - 3, 0) for part in parts)
    low, high = fisher_interval(np.array([rho]), room, 1.06, level)
    return Statistic(
        "rank_correlation",
        n,
        rho,
        (float(low[0]), float(high[0])),
        p,
        0.0,
        control,
        (float(ends[0]), float(ends[1])),
        {"p_normal": p_normal, "strata": float(len(parts))},
    )


# -- kept and flagged --------------------------------------------------------------------------


def association(
    kept: ArrayLike,
    flagged: ArrayLike,
    strata: ArrayLike | None = None,
    *,
    level: float = 0.95,
    name: str = "association",
    concept: str = "",
) -> Statistic:
    """Are kept channels flagged more often than dropped ones of the same stratum?

    For example kept AND detector. The effect is Mantel and Haenszel's odds ratio (with one stratum
    the plain one), its interval that of Robins, Breslow and Greenland. The p-value is exact, from
    the number kept and flagged, given the numbers of kept and of flagged ones in each stratum; that
    is without effect a sum of hypergeometric numbers. With one stratum this is Fisher's test.
    ``details`` hold the count, and the one expected of random channels.

    Args:
        kept: bool (N,).
        flagged: bool (N,).
        strata: (N,), the site of each channel; None: all are of one.
        level: Coverage of the interval.
        name: ``"association"``, or ``"enrichment"`` if flagged channels are those of a concept.
        concept: Its name, for the sentence.

    Raises:
        TypeError: If they are not truth values.
        ValueError: If shapes or numbers are invalid.

    Source:
        Mantel and Haenszel 1959; Robins, Breslow and Greenland 1986; Fisher 1935.

    Example:
        >>> kept = [True] * 4 + [False] * 4
        >>> flagged = [True, True, True, False] + [False, False, False, True]
        >>> result = association(kept, flagged)
        >>> result.effect, round(result.p, 4)  # the lady tasting tea
        (9.0, 0.4857)
    """
    flags = _flags(flagged, "flagged")
    mask = _flags(kept, "kept", len(flags))
    check_share(level, "level")
    if name not in ("association", "enrichment", "detectors"):
        raise ValueError(f"name must be 'association', 'detectors' or 'enrichment', got {name!r}.")
    parts = strata_of(strata, len(flags))
    count = np.array([[float((mask & flags)[part].sum()) for part in parts]])
    n_kept = np.array([[float(mask[part].sum()) for part in parts]])
    total = np.array([float(len(part)) for part in parts])
    n_flagged = np.array([float(flags[part].sum()) for part in parts])
    tables = Tables(count, n_kept, n_flagged, total)
    low, high = tables.interval(level)
    p, ends = count_test(tables, level)
    effect = float(tables.odds_ratio[0])
    return Statistic(
        name,
        len(flags),
        effect,
        (float(low[0]), float(high[0])),
        math.nan if math.isnan(effect) else float(p[0]),
        1.0,
        1.0 if not math.isnan(effect) else math.nan,
        (float(ends[0][0]), float(ends[1][0])),
        {
            "count": float(count.sum()),
            "expected": float(tables.expected[0]),
            "kept": float(n_kept.sum()),
            "flagged": float(n_flagged.sum()),
        },
        {"concept": concept},
    )


def count_test(tables: Tables, level: float) -> tuple[FloatArray, tuple[FloatArray, FloatArray]]:
    """Exact p-values (T,), and the interval of odds ratios of random channels, (T,) each.

    A count x becomes an odds ratio by Peto's one step, exp((x - expected) / variance).
    """
    pmf = null_counts(tables.kept, tables.flagged, tables.total)
    p = exact_p(tables.a.sum(1), pmf)
    below = pmf.cumsum(1)
    ends = []
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        for share in ((1 - level) / 2, (1 + level) / 2):
            x = (below < share - 1e-12).sum(1)
            ends.append(np.exp((x - tables.expected) / tables.variance))
    known = tables.variance > 0
    low, high = (np.where(known, end, np.nan) for end in ends)
    return p, (low, high)


# -- many tests --------------------------------------------------------------------------------


def benjamini_hochberg(p: ArrayLike) -> FloatArray:
    """The smallest false discovery rate at which each test counts as a discovery.

    Args:
        p: (N,), p-values; NaN: no test.

    Returns:
        float64 (N,), q-values, NaN where p is.

    Raises:
        ValueError: If a p-value is not in [0, 1].

    Source:
        Benjamini and Hochberg 1995. It holds for independent tests and for those that vary in the
        same direction, as tests of the same channels against several concepts mostly do.

    Example:
        >>> benjamini_hochberg([0.01, 0.04, 0.03, float("nan")])
        array([0.03, 0.04, 0.04,  nan])
    """
    values = np.asarray(p, dtype=np.float64)
    if values.ndim != 1 or ((values < 0) | (values > 1)).any():
        raise ValueError("p must be one list of numbers in [0, 1].")
    q = np.full(len(values), np.nan)
    tested = np.flatnonzero(~np.isnan(values))
    if len(tested):
        q[tested] = stats.false_discovery_control(values[tested])
    return q
