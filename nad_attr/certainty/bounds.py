"""How sure a selection frequency is: its exact interval, and bounds on false selections.

Source: Shah and Samworth, "Variable selection with error control: another look at stability
selection", Journal of the Royal Statistical Society B 75, 2013; the same numbers as R's ``stabs``.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

__all__ = ["exact_interval", "false_selections"]

#: The powers r of the concave tails: of what both halves choose, and of what either does.
CONCAVITY = (-1 / 2, -1 / 4)
#: Where the search for the least concave distribution begins: nearly uniform, and nearly a point.
FLATTEST, STEEPEST = 1e5, 1e-5


def exact_interval(
    counts: ArrayLike, n: int, level: float = 0.95
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Clopper and Pearson's interval of a share.

    Args:
        counts: Successes among ``n``, of any shape.
        n: Trials, at least 1.
        level: Coverage, at least.

    Returns:
        Lower and upper ends, like ``counts``.

    Example:
        >>> low, high = exact_interval([0, 16], 16)
        >>> low.round(3).tolist(), high.round(3).tolist()
        ([0.0, 0.794], [0.206, 1.0])
    """
    k = np.asarray(counts, dtype=np.float64)
    tail = (1 - level) / 2
    low, high = stats.beta.ppf(tail, k, n - k + 1), stats.beta.isf(tail, k + 1, n - k)
    return np.where(k == 0, 0.0, low), np.where(k == n, 1.0, high)


def false_selections(
    tau: float,
    n_chosen: float,
    n_channels: int,
    n_pairs: int,
    assumption: Literal["unimodal", "r-concave"] = "r-concave",
) -> float:
    """How many rarely chosen channels have a selection probability of ``tau`` or more, at most.

    Rarely chosen are those that a half of the images chooses no more often than a channel at
    random, ``n_chosen / n_channels``.

    Args:
        tau: The threshold, in (1/2, 1].
        n_chosen: Channels chosen in one run, in the mean.
        n_channels: All channels.
        n_pairs: Complementary pairs of halves.
        assumption: What is known of the distribution of a rarely chosen channel's selections:
            "unimodal", or "r-concave" beside it, which gives lower bounds; of both the lower.

    Returns:
        A bound on the expected number; ``n_channels``, which says nothing, where there is none.

    Raises:
        ValueError: If an argument has no sensible value.

    Example:
        >>> round(false_selections(0.9, 70, 1408, 8, "unimodal"), 2)
        2.01
        >>> round(false_selections(0.9, 70, 1408, 50), 3)
        0.237
    """
    if not 0.5 < tau <= 1:
        raise ValueError(f"tau must be above 0.5 and at most 1, got {tau!r}.")
    if not 0 < n_chosen <= n_channels or n_pairs < 1:
        raise ValueError(
            f"{n_chosen} channels chosen of {n_channels} in {n_pairs} pairs: no such numbers."
        )
    if assumption not in ("unimodal", "r-concave"):
        raise ValueError(f"assumption must be 'unimodal' or 'r-concave', got {assumption!r}.")
    share = n_chosen / n_channels
    found = float(n_channels)
    if tau > 3 / 4:
        factor = 4 * (1 - tau + 1 / (2 * n_pairs)) / (1 + 1 / n_pairs)
        found = min(found, share * n_chosen * factor)
    elif tau > 0.5 + min(share**2, 1 / (2 * n_pairs) + 0.75 * share**2):
        excess = 2 * (2 * tau - 1 - 1 / (2 * n_pairs))
        found = min(found, share * n_chosen / excess) if excess > 0 else found
    if assumption == "r-concave":
        # Times that a channel is chosen in 2 B halves; the tenth digit is rounding.
        times = math.ceil(float(f"{2 * n_pairs * tau:.10g}"))
        both = _tail(share**2, times - n_pairs, n_pairs, CONCAVITY[0])
        either = _tail(share, times, 2 * n_pairs, CONCAVITY[1])
        found = min(found, n_channels * min(both, either))
    return found


def _tail(mean: float, t: int, n: int, r: float) -> float:
    """The largest P(X >= t / n) of an r-concave X on 0, 1/n, ..., 1 of this mean; 1 if unknown."""
    total, power = mean * n, 1 / r
    first = math.ceil(2 * total) + 1
    if t < first or first >= n:
        return 1.0

    def weights(a: float, k: int) -> NDArray[np.float64]:
        return np.asarray((a + np.arange(k + 1)) ** power)

    def off(a: float, k: int) -> float:
        w = weights(a, k)
        return float(np.arange(k + 1) @ w / w.sum() - total)

    def tail(a: float, k: int) -> float:
        below = (k + 1 - total) * weights(a, t - 1).sum()
        return float(1 - below / ((k + 1 - np.arange(k + 1)) @ weights(a, k)))

    largest, before = 0.0, FLATTEST
    ends: dict[int, float] = {}
    for k in range(first, n + 1):
        before = ends[k] = optimize.brentq(off, STEEPEST, before, args=(k,), xtol=1e-12)
    for k in range(first, n):
        found: Any = optimize.minimize_scalar(
            lambda a, k=k: -tail(a, k), bounds=(ends[k + 1], ends[k]), method="bounded",
            options={"xatol": 1e-12},
        )  # fmt: skip
        largest = max(largest, -float(found.fun), tail(ends[k], k), tail(ends[k + 1], k))
    return largest
