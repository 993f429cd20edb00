"""Where measures on images learned from and on held-out ones part, and what would help."""

from __future__ import annotations

import math
from collections.abc import Mapping

from nad_attr.stats.tables import number

__all__ = ["PARTS", "apart"]

#: Measures that differ by less than this are together, whatever the intervals say.
PARTS = 0.05
#: Own images of a task below which more of them are the first thing to try.
FEW_IMAGES = 500
#: From this size on a larger one is no help.
LARGE = 0.7

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
    """Sentences where measures part: by how much, why, and what would help; none where they agree.

    Args:
        learned: ``{measure: value}``, on images that the gates were learned from.
        held_out: The same on held-out images.
        gaps: ``{measure: (low, high)}``, the interval of learned less held out; NaN: unknown, and
            the measures have to be twice as far apart.
        whole: The whole network's own AUC on both: where that parts, the images differ.
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
        if not gap > (2 * PARTS if unknown else PARTS) or not (unknown or low > 0):
            continue
        span = "" if unknown else f" (difference {number(low)} to {number(high)})"
        lines.append(
            f"{_NAMES.get(measure, measure)} is {number(learned[measure])} on images learned from "
            f"and {number(held_out[measure])} on held-out ones{span}."
        )
    if not lines:
        return []
    drop = whole[0] - whole[1]
    shifted = not math.isnan(drop) and drop > PARTS
    if shifted:
        lines.append(
            f"The whole network's own AUC falls as well, from {number(whole[0])} to "
            f"{number(whole[1])}: the held-out images are of another kind."
        )
    known = "" if n_own is None else f" ({n_own:,} were learned from)"
    help_ = ["other pictures to learn from, such as the held-out ones"] if shifted else []
    if n_own is None or n_own < FEW_IMAGES or not shifted:
        help_.append(f"more pictures of each class{known}")
    if size < LARGE:
        help_.append("a larger size")
    lines.append(f"What would help: {', or '.join(help_)}.")
    return lines
