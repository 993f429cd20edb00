"""Common parts of written results: means, intervals, plain text, pandas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nad_attr.stats.bootstrap import bootstrap_interval

__all__ = ["intervals", "nan_mean", "number", "pandas", "plain", "table"]

FloatArray: TypeAlias = NDArray[np.float64]


def nan_mean(values: FloatArray) -> FloatArray:
    """Mean of the known values over the first axis; NaN if none is known.

    Example:
        >>> nan_mean(np.array([[1.0, np.nan], [3.0, np.nan]]))
        array([ 2., nan])
    """
    known = ~np.isnan(values)
    count = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def intervals(
    values: FloatArray, level: float, n_draws: int, seed: int
) -> tuple[FloatArray, FloatArray]:
    """Bootstrap interval of the mean over the first axis (tasks), for each column by itself."""
    ends = [
        bootstrap_interval(column, level=level, n_draws=n_draws, seed=seed)
        for column in values.reshape(len(values), -1).T
    ]
    low, high = np.array(ends).T
    return low.reshape(values.shape[1:]), high.reshape(values.shape[1:])


def number(value: float) -> str:
    """Three decimals, or a dash for NaN."""
    return "-" if np.isnan(value) else f"{value:.3f}"


def plain(value: Any) -> Any:
    """Lists and numbers with None in place of NaN and infinity."""
    if isinstance(value, list):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain-text table: the first column to the left, the rest to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        ).rstrip()
        for row in rows
    ]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def pandas(who: str) -> Any:
    """The pandas module; an ImportError if it is not installed."""
    try:
        import pandas as pd
    except ImportError as error:
        raise ImportError(
            f"{who} needs pandas: pip install 'nad-attr[plot]'; summary() and to_dict() do without."
        ) from error
    return pd


def duration(seconds: float) -> str:
    """A duration in words.

    Example:
        >>> duration(8), duration(130), duration(7300)
        ('8 s', '2 min', '2 h 2 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
