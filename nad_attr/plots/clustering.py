"""An order of tasks that puts similar ones side by side."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["cluster_order"]

_MAX_OPTIMAL = 200  # tasks up to which the best of all orders of the tree is searched for


def cluster_order(similarity: NDArray[np.float64]) -> NDArray[np.int64]:
    """An order that puts similar tasks side by side: the leaves of average linkage.

    Args:
        similarity: (T, T), symmetric, at most 1.

    Returns:
        int64 (T,), a permutation.

    Example:
        >>> like = np.eye(4)
        >>> like[0, 2] = like[2, 0] = like[1, 3] = like[3, 1] = 0.9
        >>> order = cluster_order(like).tolist()
        >>> abs(order.index(0) - order.index(2)), abs(order.index(1) - order.index(3))
        (1, 1)
    """
    from scipy.cluster.hierarchy import leaves_list, linkage  # takes long to load
    from scipy.spatial.distance import squareform

    n = len(similarity)
    if n < 3:
        return np.arange(n)
    distance = np.clip(1 - similarity, 0, None)
    np.fill_diagonal(distance, 0)
    tree = linkage(
        squareform((distance + distance.T) / 2, checks=False),
        method="average",
        optimal_ordering=n <= _MAX_OPTIMAL,
    )
    return np.asarray(leaves_list(tree), dtype=np.int64)
