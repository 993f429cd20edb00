"""How sure is a number: bootstrap intervals, and p-values by permutation."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["bootstrap_means", "check_count", "check_interval", "interval_of", "permutation_p"]

FloatArray: TypeAlias = "NDArray[np.float64]"


def check_count(value: Any, what: str, *, least: int = 1) -> int:
    """A whole number from ``least`` on.

    Raises:
        ValueError: Names it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{what} must be a whole number from {least} on, not {value!r}.")
    return int(value)


def check_interval(level: float, n_draws: int) -> None:
    """Refuse a coverage outside (0, 1) and less than one draw.

    Raises:
        ValueError: Names it.
    """
    if isinstance(level, bool) or not isinstance(level, (int, float)) or not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level!r}.")
    check_count(n_draws, "n_draws")


def bootstrap_means(
    values: ArrayLike, *, n_draws: int = 2000, seed: int = 0, weights: ArrayLike | None = None
) -> FloatArray:
    """Means of resampled rows: what the mean could have been with other rows of the same kind.

    Args:
        values: (N, ...), one row per unit that is drawn with replacement; NaN is left out.
        n_draws: Times that N rows are drawn.
        seed: Of the draws; the global random state is not used.
        weights: (N, ...), how much each value counts; None: the same.

    Returns:
        float64 (n_draws, ...); NaN where a draw has no known value.

    Example:
        >>> bootstrap_means([[1.0], [1.0]], n_draws=3)[:, 0]
        array([1., 1., 1.])
    """
    array = np.asarray(values, dtype=np.float64)
    n = len(array)
    flat = array.reshape(n, -1)
    share = np.ones_like(flat)
    if weights is not None:
        share = np.broadcast_to(np.asarray(weights, dtype=np.float64), array.shape).reshape(n, -1)
    share = np.where(np.isnan(flat), 0.0, share)
    weighted = share * np.nan_to_num(flat)
    generator = np.random.default_rng(seed)
    result = np.empty((n_draws, flat.shape[1]))
    # How often each row was drawn, some draws at a time: all of them at once could be large.
    step = max(1, 4_000_000 // max(n, 1))
    for start in range(0, n_draws, step):
        stop = min(n_draws, start + step)
        times = generator.multinomial(n, np.full(n, 1 / n), size=stop - start).astype(np.float64)
        count = times @ share
        with np.errstate(invalid="ignore"):
            result[start:stop] = np.where(count > 0, times @ weighted, np.nan) / count
    return result.reshape(n_draws, *array.shape[1:])


def interval_of(draws: ArrayLike, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of draws (N, ...) that may hold NaN; NaN where all of them are.

    Example:
        >>> low, high = interval_of(np.arange(101.0), 0.9)
        >>> float(low), float(high)
        (5.0, 95.0)
    """
    array = np.asarray(draws, dtype=np.float64)
    known = ~np.isnan(array).all(0)
    # A row of zeros where nothing is known: nanquantile would warn.
    ends = np.nanquantile(np.where(known, array, 0.0), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(known, ends[0], np.nan), np.where(known, ends[1], np.nan)


def permutation_p(observed: float, draws: ArrayLike) -> float:
    """P-value ``(1 + #{draws >= observed}) / (draws + 1)``; NaN if nothing was observed.

    Draws that differ from the observed value by rounding alone count as equal to it.

    Example:
        >>> permutation_p(3.0, [1.0, 2.0, 3.0])
        0.5
    """
    if math.isnan(observed):
        return math.nan
    array = np.asarray(draws, dtype=np.float64)
    slack = 1e-12 * max(1.0, abs(observed))
    return float((1 + (array >= observed - slack).sum()) / (len(array) + 1))
