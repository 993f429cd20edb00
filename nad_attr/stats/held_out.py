"""Differences of measures between images learned from and held-out ones, and remedies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from nad_attr.stats.tables import number

__all__ = ["MIN_GAP", "apart", "parted_tasks", "unchecked_tasks"]

#: Smaller differences of measures count as none, whatever the intervals are.
MIN_GAP = 0.05
#: With fewer own images of a task, more of them are the first remedy.
FEW_IMAGES = 500
#: From this size on a larger one is no remedy.
LARGE_SIZE = 0.7

#: Steps at the end, at most, whose images show the fit on images learned from.
LAST_STEPS = 5
#: Fall of fidelity that is warned of while gates are learned.
WARNED_FROM = 0.2

_NAMES = {"own_auc": "own AUC", "fidelity": "fidelity"}


def apart(
    learned: Mapping[str, float],
    held_out: Mapping[str, float],
    gaps: Mapping[str, tuple[float, float]],
    *,
    whole: tuple[float, float],
    n_own: int | None,
    size: float,
) -> list[str]:
    """Sentences about different measures: by how much, why, and remedies; none if they agree.

    Args:
        learned: ``{measure: value}``, on images that the gates were learned from.
        held_out: The same on held-out images.
        gaps: ``{measure: (low, high)}``, the interval of learned less held out; NaN: unknown, and
            the difference has to be twice as large.
        whole: The whole network's own AUC on both: if that differs, the images differ.
        n_own: Own images that were learned from; None: unknown.
        size: Kept channels / all channels.

    Example:
        >>> sentences = apart(
        ...     {"fidelity": 0.9}, {"fidelity": 0.5}, {"fidelity": (0.3, 0.5)},
        ...     whole=(0.99, 0.99), n_own=30, size=0.4,
        ... )
        >>> print(sentences[0])
        fidelity is 0.900 on images learned from and 0.500 on held-out ones (difference ...).
        >>> print(sentences[1])
        What would help: more pictures of each class (30 were learned from), or a larger size.
    """
    lines = []
    for measure, (low, high) in gaps.items():
        gap = learned[measure] - held_out[measure]
        unknown = math.isnan(low)
        if not gap > (2 * MIN_GAP if unknown else MIN_GAP) or not (unknown or low > 0):
            continue
        span = "" if unknown else f" (difference {number(low)} to {number(high)})"
        lines.append(
            f"{_NAMES.get(measure, measure)} is {number(learned[measure])} on images learned from "
            f"and {number(held_out[measure])} on held-out ones{span}."
        )
    if not lines:
        return []
    drop = whole[0] - whole[1]
    shifted = not math.isnan(drop) and drop > MIN_GAP
    if shifted:
        lines.append(
            f"The whole network's own AUC falls as well, from {number(whole[0])} to "
            f"{number(whole[1])}: the held-out images are of another kind."
        )
    known = "" if n_own is None else f" ({n_own:,} were learned from)"
    help_ = ["other pictures to learn from, such as the held-out ones"] if shifted else []
    if n_own is None or n_own < FEW_IMAGES or not shifted:
        help_.append(f"more pictures of each class{known}")
    if size < LARGE_SIZE:
        help_.append("a larger size")
    lines.append(f"What would help: {', or '.join(help_)}.")
    return lines


def parted_tasks(
    curves: Mapping[str, NDArray[np.float32]],
    names: Sequence[str],
    n_own: Sequence[int],
    size: float,
) -> str | None:
    """A warning about tasks whose gates keep the outputs of the images learned from only.

    Args:
        curves: Of a run, (steps, T): "loss", "fidelity_apart" and "highest_apart".
        names: Of the T tasks.
        n_own: Own images of each.
        size: Kept channels / all channels.

    Returns:
        The tasks with both fidelities, the largest fall first, and remedies; None if there is none.

    Example:
        >>> curves = {"loss": np.array([[0.04]]), "fidelity_apart": np.array([[0.3]]),
        ...           "highest_apart": np.array([[0.5]])}
        >>> print(parted_tasks(curves, ["reptile"], [18], 0.4))
        what was learned does not hold on other images: fidelity of 'reptile' is 0.960 on images
        learned from and 0.300 on images kept apart. What would help: more pictures of each class
        (18 were learned from), or a larger size.
    """
    learned = 1 - curves["loss"][-LAST_STEPS:].mean(0)
    found, highest = (curves[f"{name}_apart"][-1] for name in ("fidelity", "highest"))
    # NaN, for too few images, is no gap.
    parts = np.flatnonzero((learned - found > WARNED_FROM) & (highest < learned))
    if not len(parts):
        return None
    parts = parts[np.argsort((found - learned)[parts])]
    shown = [
        f"{names[t]!r} is {number(learned[t])} on images learned from and {number(found[t])} on "
        "images kept apart"
        for t in parts[:3].tolist()
    ]
    (help_,) = apart(
        {"fidelity": 1.0}, {"fidelity": 0.0}, {"fidelity": (1.0, 1.0)},
        whole=(math.nan, math.nan), n_own=n_own[int(parts[0])], size=size,
    )[1:]  # fmt: skip
    more = f", and {len(parts) - 3} more" if len(parts) > 3 else ""
    return (
        "what was learned does not hold on other images: fidelity of "
        f"{'; of '.join(shown)}{more}. {help_}"
    )


def unchecked_tasks(
    names: Sequence[str], n_own: Sequence[int], needed: int, n_images: int, n_constants: int
) -> str | None:
    """A warning about tasks with too few images to check what was learned from them.

    None if there are more images than constants, which then cannot fit by chance alone.

    Args:
        names: Of the tasks without images kept apart.
        n_own: Own images of each.
        needed: Own, and other, images with which some are kept apart.
        n_images: All images, of all tasks.
        n_constants: Closed channels, each with a constant of its own.

    Example:
        >>> print(unchecked_tasks(["reptile"], [18], 50, 90, 3542))
        nothing checked whether what was learned holds on other images: 'reptile' has 18 own and
        72 other images, too few to keep some apart (50 of each are needed), and 3,542 constants
        were learned from them. Judge the gates on pictures that they were not learned from,
        evaluate(model, gates, pictures, learned_from=these), or learn from more pictures.
        >>> unchecked_tasks(["3"], [18], 50, 900, 120) is None
        True
    """
    if not names or n_constants <= n_images:
        return None
    shown = "; ".join(
        f"{name!r} has {own} own and {n_images - own} other images"
        for name, own in list(zip(names, n_own, strict=True))[:3]
    )
    more = f"; and {len(names) - 3} more tasks" if len(names) > 3 else ""
    return (
        f"nothing checked whether what was learned holds on other images: {shown}{more}, too few "
        f"to keep some apart ({needed} of each are needed), and {n_constants:,} constants were "
        "learned from them. Judge the gates on pictures that they were not learned from, "
        "evaluate(model, gates, pictures, learned_from=these), or learn from more pictures."
    )
