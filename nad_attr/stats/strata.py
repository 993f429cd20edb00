"""The arithmetic of stratified tests: many tasks at once, one stratum (gate site) at a time.

Layers differ in the number of channels, in the match of units and concepts, and in the share that a
task keeps. A test over a whole network that ignores this compares layers, not channels. So all
tests here are sums over strata, and permutations never leave a stratum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from nad_attr.system.rng import seed_of

__all__ = [
    "Tables",
    "exact_p",
    "null_counts",
    "pair_counts",
    "permutations",
    "strata_of",
    "with_tail",
]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]
BoolArray: TypeAlias = NDArray[np.bool_]

#: Entries of one block of permuted scores, so that memory stays small (32 MiB of float64).
_BLOCK_ENTRIES = 4_000_000
#: Two tables whose probabilities differ by less than this are equally likely.
_PROBABILITY_TOLERANCE = 1e-7


def strata_of(strata: ArrayLike | None, n: int) -> list[IntArray]:
    """Positions of each stratum, in the order in which strata appear.

    Args:
        strata: (N,) names or numbers; None: all are one stratum.
        n: N.

    Raises:
        ValueError: If there are not N.

    Example:
        >>> [part.tolist() for part in strata_of(["b", "a", "b"], 3)]
        [[0, 2], [1]]
    """
    if strata is None:
        return [np.arange(n)]
    names = np.asarray(strata)
    if names.shape != (n,):
        raise ValueError(f"strata has shape {names.shape}; {n} values need ({n},).")
    _, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return [np.flatnonzero(inverse == k) for k in order]


def permutations(
    parts: Sequence[FloatArray], n_draws: int, seed: int, what: str
) -> Iterator[tuple[slice, list[FloatArray]]]:
    """Scores shuffled within their strata, a block of draws at a time.

    Draw d of stratum s is a function of seed, s, the block and ``what`` only.

    Args:
        parts: For each stratum its scores (C,).
        n_draws: Number of shuffles.
        seed: For the shuffles; the global random state is not used.
        what: Separates the random numbers of different tests.

    Yields:
        Which draws, and for each stratum the shuffled scores (draws, C).
    """
    widest = max((len(part) for part in parts), default=1)
    step = max(1, min(n_draws, _BLOCK_ENTRIES // max(widest, 1)))
    for start in range(0, n_draws, step):
        stop = min(n_draws, start + step)
        block = []
        for number, part in enumerate(parts):
            generator = np.random.default_rng(seed_of(what, seed, number, start))
            rows = np.broadcast_to(part, (stop - start, len(part)))
            block.append(generator.permuted(rows, axis=1))
        yield slice(start, stop), block


def with_tail(p: FloatArray, n_draws: int, z: FloatArray, enough: ArrayLike = True) -> FloatArray:
    """p-values by permutation; the normal approximation resolves the smallest ones.

    If no draw is as extreme as the observed value, the p-value is 1 / (draws + 1) for any distance,
    too much among thousands of tests. Only then the p-value of a sum's normal approximation
    replaces it, if it is smaller.

    Args:
        p: (T,), of :func:`nad_attr.stats.p_values.permutation_p`.
        n_draws: Number of draws.
        z: (T,), observed value less the mean, in standard deviations of its exact null.
        enough: (T,) or one, whether there are enough channels for the approximation.

    Example:
        >>> with_tail(np.array([0.01, 0.01, 0.5]), 99, np.array([5.0, 2.0, 0.7])).round(8)
        array([5.7e-07, 1.0e-02, 5.0e-01])
    """
    lowest = 1 / (n_draws + 1)
    tail = 2 * stats.norm.sf(np.abs(z))
    use = (p <= lowest * (1 + 1e-9)) & np.asarray(enough) & (tail < p)
    return np.asarray(np.where(use, tail, p))


def pair_counts(
    kept: BoolArray, values: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Pairs of a kept and a dropped channel of one stratum, for many tasks.

    Args:
        kept: (T, C).
        values: (C,), finite.

    Returns:
        For each task (T,): the pairs in which the kept one is higher (a tie counts half, Mann and
        Whitney's U), all pairs, the variance of U when kept channels are drawn at random (exact,
        with ties), and DeLong's variance of U / pairs (NaN with fewer than two on a side).
    """
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    k = np.add.reduceat(kept[:, order].astype(np.float64), starts, axis=1)
    size = np.diff(np.concatenate([starts, [len(values)]])).astype(np.float64)
    d = size - k
    n1, n0 = k.sum(1), d.sum(1)
    below = d.cumsum(1) - d / 2  # dropped channels below, half of the equal ones
    above = n1[:, None] - k.cumsum(1) + k / 2  # kept channels above
    u = (k * below).sum(1)
    pairs = n1 * n0
    n = float(len(values))
    ties = (size**3 - size).sum()
    null = pairs / 12 * (n + 1 - ties / (n * (n - 1))) if n > 1 else np.zeros_like(pairs)
    with np.errstate(invalid="ignore", divide="ignore"):
        auc = u / pairs
        first = (k * np.square(below / n0[:, None] - auc[:, None])).sum(1) / (n1 - 1)
        second = (d * np.square(above / n1[:, None] - auc[:, None])).sum(1) / (n0 - 1)
        placed = first / n1 + second / n0
    placed = np.where((n1 > 1) & (n0 > 1), placed, np.nan)
    return u, pairs, np.asarray(null), np.asarray(placed)


class Tables:
    """2 x 2 tables, kept or not against flagged or not, for T tasks in S strata.

    Args:
        both: (T, S), kept and flagged.
        kept: (T, S), kept.
        flagged: (S,).
        total: (S,).

    Example:
        >>> tables = Tables(np.array([[3.0]]), np.array([[4.0]]), np.array([4.0]), np.array([8.0]))
        >>> tables.odds_ratio, tables.expected
        (array([9.]), array([2.]))
    """

    def __init__(
        self, both: FloatArray, kept: FloatArray, flagged: FloatArray, total: FloatArray
    ) -> None:
        self.kept, self.flagged, self.total = kept, flagged, total
        self.a = both
        self.b = kept - both
        self.c = flagged - both
        self.d = total - kept - self.c

    @property
    def expected(self) -> FloatArray:
        """(T,), kept and flagged if kept ones are drawn at random within each stratum."""
        return np.asarray((self.kept * self.flagged / self.total).sum(1))

    @property
    def variance(self) -> FloatArray:
        """(T,), its variance (hypergeometric)."""
        n = self.total
        share = self.flagged / n
        one = self.kept * share * (1 - share) * (n - self.kept) / np.maximum(n - 1, 1)
        return np.asarray(one.sum(1))

    def _sums(self, more: ArrayLike = 0.0) -> tuple[FloatArray, ...]:
        a, b, c, d = (cell + np.asarray(more) for cell in (self.a, self.b, self.c, self.d))
        n = a + b + c + d
        n = np.where(n > 0, n, 1.0)
        r, s = a * d / n, b * c / n
        p, q = (a + d) / n, (b + c) / n
        return r.sum(1), s.sum(1), (p * r).sum(1), (p * s + q * r).sum(1), (q * s).sum(1)

    @property
    def odds_ratio(self) -> FloatArray:
        """(T,), Mantel and Haenszel's; 0 and infinity if a side is empty, NaN if both are."""
        r, s, *_ = self._sums()
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(np.where((r == 0) & (s == 0), np.nan, r / s))

    def interval(self, level: float) -> tuple[FloatArray, FloatArray]:
        """(T,) each, of the odds ratio, by Robins, Breslow and Greenland's variance.

        If the odds ratio is 0 or infinite, half a channel is added to each cell of the informative
        strata.
        """
        informative = (self.kept > 0) & (self.kept < self.total)
        informative &= (self.flagged > 0) & (self.flagged < self.total)
        r, s, *_ = self._sums()
        sparse = (r == 0) | (s == 0)
        r, s, pr, mixed, qs = self._sums(np.where(informative & sparse[:, None], 0.5, 0.0))
        with np.errstate(divide="ignore", invalid="ignore"):
            variance = pr / (2 * r * r) + mixed / (2 * r * s) + qs / (2 * s * s)
            centre = np.log(r / s)
            width = stats.norm.ppf((1 + level) / 2) * np.sqrt(variance)
            low, high = np.exp(centre - width), np.exp(centre + width)
        known = informative.any(1)
        return np.where(known, low, np.nan), np.where(known, high, np.nan)


def null_counts(kept: FloatArray, flagged: FloatArray, total: FloatArray) -> FloatArray:
    """Distribution of the number kept and flagged, if kept ones are drawn within each stratum.

    The convolution of one hypergeometric distribution per stratum.

    Args:
        kept: (T, S), numbers of kept ones.
        flagged: (S,).
        total: (S,).

    Returns:
        (T, M + 1), probability of 0 to M, M = all flagged ones.

    Example:
        >>> null_counts(np.array([[1.0, 1.0]]), np.array([1.0, 1.0]), np.array([2.0, 2.0]))
        array([[0.25, 0.5 , 0.25]])
    """
    whole = np.ones((len(kept), 1))
    # Small ones first, since each convolution passes over the long array.
    for s in np.argsort(flagged, kind="stable"):
        m = int(flagged[s])
        if m:
            part = stats.hypergeom.pmf(np.arange(m + 1)[None], total[s], m, kept[:, s][:, None])
            whole = _convolved(whole, part)
    return np.asarray(whole / whole.sum(1, keepdims=True))


def _convolved(a: FloatArray, b: FloatArray) -> FloatArray:
    """Convolution of each row of a with the same row of b."""
    result = np.zeros((len(a), a.shape[1] + b.shape[1] - 1))
    if len(a) == 1 and min(a.shape[1], b.shape[1]) <= 256:
        return np.asarray(np.convolve(a[0], b[0])[None])
    if min(a.shape[1], b.shape[1]) > 256:
        # Long rows: by Fourier transform; p-values below about 1e-13 are rounding then.
        length = result.shape[1]
        product = np.fft.rfft(a, length, axis=1) * np.fft.rfft(b, length, axis=1)
        fast = np.fft.irfft(product, length, axis=1)
        return np.asarray(np.maximum(fast, 0.0))
    short, long = (a, b) if a.shape[1] <= b.shape[1] else (b, a)
    for shift in range(short.shape[1]):
        result[:, shift : shift + long.shape[1]] += short[:, shift : shift + 1] * long
    return result


def exact_p(count: FloatArray, pmf: FloatArray) -> FloatArray:
    """Two-sided p-value of a count: all outcomes that are at most as likely (as Fisher's test).

    Args:
        count: (T,).
        pmf: (T, M + 1), its distribution without effect.

    Example:
        >>> exact_p(np.array([2.0]), np.array([[0.25, 0.5, 0.25]]))
        array([0.5])
    """
    own = np.take_along_axis(pmf, count.astype(np.int64)[:, None], axis=1)
    return np.asarray(
        np.minimum(1.0, np.where(pmf <= own * (1 + _PROBABILITY_TOLERANCE), pmf, 0.0).sum(1))
    )
