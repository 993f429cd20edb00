"""How much the tasks' sub-architectures share: all pairs, clustered, and the nearest of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nad_attr.plots.clustering import cluster_order
from nad_attr.report.packing import plain, text64
from nad_attr.stats.pairs import overlap_matrix

__all__ = ["MAX_TASKS_WITH_PAIRS", "block_means", "overlaps_part"]

#: Tasks up to which each pair has a cell of its own; beyond, neighbours share one.
MAX_TASKS_WITH_PAIRS = 250
_NEAREST = 8


def block_means(
    matrix: NDArray[np.float64], most: int = MAX_TASKS_WITH_PAIRS
) -> NDArray[np.float64]:
    """A smaller matrix whose cells are means over neighbouring rows and columns, ``most`` of each.

    The diagonal does not count, unless a cell has nothing else.

    Example:
        >>> block_means(np.arange(16.0).reshape(4, 4), 2)
        array([[ 2.5,  4.5],
               [10.5, 12.5]])
    """
    n = len(matrix)
    step = -(-n // most)
    starts = np.arange(0, n, step)

    def sums(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(np.add.reduceat(np.add.reduceat(values, starts, 0), starts, 1))

    counted = 1.0 - np.eye(n)
    last = n - starts[-1]
    if last == 1:
        counted[-1, -1] = 1.0
    if step == 1:
        np.fill_diagonal(counted, 1.0)
    return sums(matrix * counted) / sums(counted)


def overlaps_part(masks: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Kappa of all pairs of tasks (masks bool (T, C)), in cluster order, and each one's nearest.

    ``cells`` is base64 of uint8, where kappa -1 is 0 and 1 is 254, with ``step`` tasks per cell;
    ``nearest`` has rows of (task, kappa). None for a single task.
    """
    kappa = overlap_matrix(masks, chance_corrected=True).numpy()
    n = len(kappa)
    if n < 2:
        return None
    order = cluster_order(kappa)
    step = -(-n // MAX_TASKS_WITH_PAIRS)
    small = block_means(kappa[np.ix_(order, order)]) if step > 1 else kappa[np.ix_(order, order)]
    cells = np.rint((small.clip(-1, 1) + 1) * 127).astype(np.uint8)
    off = kappa.copy()
    np.fill_diagonal(off, -np.inf)
    nearest = np.argsort(-off, axis=1, kind="stable")[:, : min(_NEAREST, n - 1)]
    pairs = kappa[np.triu_indices(n, 1)]
    return {
        "order": order.tolist(),
        "step": step,
        "n": len(small),
        "cells": text64(cells),
        "nearest": [
            [[int(j), plain(float(off[i, j]), 3)] for j in row] for i, row in enumerate(nearest)
        ],
        "mean": plain(float(pairs.mean())),
        "low": plain(float(pairs.min())),
        "high": plain(float(pairs.max())),
    }
