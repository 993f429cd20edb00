"""p-values by permutation: one definition, and one rule for ties."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["least_p", "permutation_p"]

FloatArray: TypeAlias = NDArray[np.float64]

#: Numbers that differ by less than this share of the largest one are equal, but for rounding.
TIE = 1e-9


def permutation_p(
    observed: ArrayLike,
    draws: ArrayLike,
    *,
    tail: Literal["higher", "lower", "both"] = "higher",
    centre: ArrayLike = 0.0,
) -> Any:
    """P-value ``(1 + number of draws that reach the observed value) / (draws + 1)``.

    A draw that is equal to the observed value, up to rounding (1e-9 of the largest number), reaches
    it. So p is valid, and n draws give at least ``1 / (n + 1)`` (:func:`least_p`).

    Args:
        observed: (...).
        draws: (..., P), the same without any effect; NaN is not a draw.
        tail: Draws that reach it: those as high, as low, or ("both") as far from ``centre``.
        centre: (...) or a number, for "both": the mean of the draws.

    Returns:
        float64 (...), a float for one number; NaN if nothing was observed or drawn.

    Source:
        Phipson and Smyth, "Permutation p-values should never be zero", 2010.

    Example:
        >>> permutation_p(3.0, [1.0, 2.0, 3.0])
        0.5
        >>> permutation_p(1.0, [1.0, 2.0, 3.0], tail="lower")
        0.5
        >>> permutation_p([2.0], [[-2.0, 0.0, 1.0]], tail="both")
        array([0.5])
    """
    value = np.asarray(observed, dtype=np.float64)[..., None]
    drawn = np.asarray(draws, dtype=np.float64)
    known = ~np.isnan(drawn)
    slack = TIE * np.maximum(
        np.abs(value), np.where(known, np.abs(drawn), 0.0).max(-1, keepdims=True, initial=0.0)
    )
    if tail == "both":
        middle = np.asarray(centre, dtype=np.float64)[..., None]
        value, drawn = np.abs(value - middle), np.abs(drawn - middle)
    elif tail == "lower":
        value, drawn = -value, -drawn
    n = known.sum(-1)
    with np.errstate(invalid="ignore"):
        p = (1 + (drawn >= value - slack).sum(-1)) / (n + 1)
    found = np.where(np.isnan(value[..., 0]) | (n == 0), np.nan, p)
    return found if found.ndim else float(found)


def least_p(n_draws: int) -> float:
    """The smallest p-value of this many random draws, ``1 / (n_draws + 1)``.

    Example:
        >>> least_p(3), least_p(19)
        (0.25, 0.05)
    """
    return 1 / (n_draws + 1)
