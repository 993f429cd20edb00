"""Ranks, and trends of rows of numbers."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["midranks", "rank_trends", "standard_ranks"]

FloatArray: TypeAlias = NDArray[np.float64]


def midranks(values: ArrayLike) -> FloatArray:
    """Ranks from 1 along the last axis; equal values share the mean of their ranks.

    Example:
        >>> midranks([10.0, 30.0, 10.0])
        array([1.5, 3. , 1.5])
    """
    from scipy.stats import rankdata  # takes long to load

    return np.asarray(rankdata(values, axis=-1), dtype=np.float64)


def standard_ranks(values: ArrayLike) -> FloatArray:
    """Midranks along the last axis with mean 0 and sum of squares 1; 0 if nothing varies."""
    ranks = midranks(values)
    centred = ranks - ranks.mean(-1, keepdims=True)
    length = np.sqrt(np.square(centred).sum(-1, keepdims=True))
    return np.asarray(centred / np.where(length > 0, length, 1.0))


def rank_trends(rows: FloatArray, along: FloatArray) -> FloatArray:
    """Spearman's correlation of each row with other numbers.

    Args:
        rows: (N, S); differences by rounding (in the 12th decimal) do not count.
        along: (S,), for example depths.

    Returns:
        (N,); NaN for a row that holds NaN, or if a side does not vary.

    Example:
        >>> rank_trends(np.array([[1.0, 3.0, 2.0], [1.0, 1.0, 1.0]]), np.arange(3.0))
        array([0.5, nan])
    """
    known = np.asarray(~np.isnan(rows).any(1))
    ranks = standard_ranks(np.where(known[:, None], np.round(rows, 12), 0.0))
    other = standard_ranks(along)
    return np.asarray(np.where(known & ranks.any(1) & other.any(), ranks @ other, np.nan))
