"""Bootstrap intervals of means."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nad_attr._checks import check_count

__all__ = ["bootstrap_interval", "bootstrap_means", "check_interval", "interval_of", "times_drawn"]


FloatArray: TypeAlias = NDArray[np.float64]


def check_share(value: float, what: str) -> None:
    """Refuse a value that is not between 0 and 1."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
        raise ValueError(f"{what} must lie between 0 and 1, got {value!r}.")


def check_interval(level: float, n_draws: int) -> None:
    """Refuse a coverage outside (0, 1) and less than one draw."""
    check_share(level, "level")
    check_count(n_draws, "n_draws")


def times_drawn(
    n: int, n_draws: int, seed: int | np.random.Generator
) -> Iterator[tuple[slice, FloatArray]]:
    """How many times each of n rows is drawn, when n rows are drawn with replacement.

    Yields some draws at a time, as all at once could be large: which, and (draws, n).

    Example:
        >>> next(times_drawn(3, 2, 0))[1].sum(1)
        array([3., 3.])
    """
    generator = np.random.default_rng(seed)
    step = max(1, 4_000_000 // max(n, 1))
    for start in range(0, n_draws, step):
        size = min(n_draws - start, step)
        drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        times = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        yield slice(start, start + size), times.astype(np.float64)


def bootstrap_means(
    values: ArrayLike, *, n_draws: int = 2000, seed: int = 0, weights: ArrayLike | None = None
) -> FloatArray:
    """Means of resampled rows: the mean that other rows of the same kind could have given.

    Args:
        values: (N, ...), one row per unit that is drawn with replacement; NaN is left out.
        n_draws: Times that N rows are drawn.
        seed: For the draws; the global random state is not used.
        weights: (N, ...), the weight of each value; None: equal.

    Returns:
        float64 (n_draws, ...); NaN for a draw without a known value.

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
    result = np.empty((n_draws, flat.shape[1]))
    for where, times in times_drawn(n, n_draws, seed):
        count = times @ share
        with np.errstate(invalid="ignore"):
            result[where] = np.where(count > 0, times @ weighted, np.nan) / count
    return result.reshape(n_draws, *array.shape[1:])


def interval_of(draws: ArrayLike, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
    """Percentile interval of draws (N, ...) that may hold NaN; NaN if all of them are.

    Example:
        >>> low, high = interval_of(np.arange(101.0), 0.9)
        >>> float(low), float(high)
        (5.0, 95.0)
    """
    array = np.asarray(draws, dtype=np.float64)
    known = ~np.isnan(array).all(0)
    # Zeros if nothing is known, since nanquantile would warn.
    ends = np.nanquantile(np.where(known, array, 0.0), [(1 - level) / 2, (1 + level) / 2], axis=0)
    return np.where(known, ends[0], np.nan), np.where(known, ends[1], np.nan)


def bootstrap_interval(
    values: FloatArray, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of a mean over tasks (percentiles of the means of resampled tasks).

    With several seeds, tasks are drawn first and then, for each drawn task, as many seeds as there
    are: tasks differ most, and seeds of one task are not independent of it.

    Args:
        values: (T,), one value per task, or (S, T), one per seed and task. NaN is left out: a task
            counts with its known seeds, and not at all without.
        level: Coverage.
        n_draws: Times that tasks are drawn with replacement.
        seed: For the draws; the global random state is not used.

    Returns:
        Lower and upper end; NaN with fewer than two known tasks.

    Raises:
        ValueError: If an argument is invalid.

    Example:
        >>> import numpy as np
        >>> bootstrap_interval(np.array([1.0, 1.0, 1.0]))
        (1.0, 1.0)
    """
    check_interval(level, n_draws)
    table = np.asarray(values, dtype=np.float64)
    if table.ndim not in (1, 2):
        raise ValueError(f"values must be (tasks,) or (seeds, tasks), got {table.shape}.")
    table = np.atleast_2d(table)
    known = ~np.isnan(table)
    tasks = np.flatnonzero(known.any(0))
    if len(tasks) < 2:
        return math.nan, math.nan
    table, known = table[:, tasks], known[:, tasks]
    if len(table) == 1:
        low, high = interval_of(bootstrap_means(table[0], n_draws=n_draws, seed=seed), level)
        return float(low), float(high)
    generator = np.random.default_rng(seed)
    n_seeds, n_tasks = table.shape
    # Known seeds of each task come first, so that one is drawn by its place.
    order = np.argsort(~known, axis=0, kind="stable")
    drawn = generator.integers(n_tasks, size=(n_draws, n_tasks))
    total = np.zeros(n_draws)
    for _ in range(n_seeds):
        place = np.floor(generator.random(drawn.shape) * known.sum(0)[drawn]).astype(np.int64)
        total += table[order[place, drawn], drawn].mean(1)
    low, high = interval_of(total / n_seeds, level)
    return float(low), float(high)
