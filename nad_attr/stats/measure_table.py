"""The measures of a sub-architecture: their names, and the better direction."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from nad_attr.stats.p_values import permutation_p

__all__ = ["MEASURES", "MEASURE_TABLE", "Measure", "p_against"]


class Measure(NamedTuple):
    """The names of a measure, and its better direction.

    Attributes:
        head: In the head of a table.
        label: In a figure.
        better: "higher" or "lower"; None: neither, so that there is no p-value.
    """

    head: str
    label: str
    better: Literal["higher", "lower"] | None


#: All measures of one task, in the order of lists. No direction is better for sizes, and for
#: other-task accuracy: always answering the class makes it 0, closing nothing 1.
MEASURE_TABLE = {
    "size": Measure("size", "size", None),
    "flop_size": Measure("FLOP size", "size in multiply-adds", None),
    "parameter_size": Measure("par. size", "size in parameters", None),
    "dead_fraction": Measure("dead", "dead fraction", "lower"),
    "own_auc": Measure("own AUC", "own AUC", "higher"),
    "other_auc": Measure("other AUC", "other AUC", "lower"),
    "disentanglement": Measure("disent.", "disentanglement", "higher"),
    "fidelity": Measure("fidelity", "fidelity (R²)", "higher"),
    "rank_fidelity": Measure("rank fid.", "rank fidelity", "higher"),
    "target_r2": Measure("target R²", "R² of the targets", "higher"),
    "detector_ba": Measure("det. BA", "detector BA", "higher"),
    "margin_auc": Measure("margin AUC", "margin AUC", "higher"),
    "recall": Measure("recall", "recall", "higher"),
    "fpr": Measure("FPR", "FPR", "lower"),
    "ba": Measure("BA", "balanced accuracy", "higher"),
    "other_accuracy": Measure("other acc.", "other-task accuracy", None),
}

#: Their names, for :meth:`Evaluation.mean` and :meth:`Evaluation.interval`.
MEASURES = tuple(MEASURE_TABLE)


def p_against(measure: str, observed: ArrayLike, draws: ArrayLike) -> np.ndarray | float:
    """p-value of a measure against random channels, by ``permutation_p``.

    Args:
        measure: A name of ``MEASURE_TABLE``.
        observed: (...).
        draws: (..., P), of random channels.

    Returns:
        (...), a float for one number; NaN for a measure without a better direction.

    Example:
        >>> p_against("own_auc", 0.9, [0.5, 0.6, 0.7]), p_against("fpr", 0.9, [0.5, 0.6, 0.7])
        (0.25, 1.0)
    """
    better = MEASURE_TABLE[measure].better
    if better is None:
        nothing = np.full(np.shape(observed), np.nan)
        return nothing if nothing.ndim else float(nothing)
    found: np.ndarray | float = permutation_p(observed, draws, tail=better)
    return found
