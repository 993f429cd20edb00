"""How alike are the sub-architectures of two tasks: T x T matrices for each gate site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from nad_attr.evaluation.measures import overlap_matrix

__all__ = ["chance_overlaps", "cosines", "site_overlaps"]

FloatArray: TypeAlias = "NDArray[np.float64]"


def site_overlaps(
    masks: Mapping[str, Tensor], *, chance_corrected: bool = False
) -> dict[str, FloatArray]:
    """Overlap of each pair of sub-architectures, site by site.

    Args:
        masks: ``{site name: bool (T, C)}``.
        chance_corrected: Kappa in place of the Jaccard index.

    Returns:
        ``{site name: float64 (T, T)}``, symmetric.

    Example:
        >>> import torch
        >>> masks = {"a": torch.tensor([[True, True, False, False], [True, False, True, False]])}
        >>> site_overlaps(masks)["a"].round(3)
        array([[1.   , 0.333],
               [0.333, 1.   ]])
    """
    return {
        name: np.asarray(overlap_matrix({name: mask}, chance_corrected=chance_corrected).numpy())
        for name, mask in masks.items()
    }


def chance_overlaps(masks: Mapping[str, Tensor]) -> FloatArray:
    """The overlap that random masks of these sizes have, mean over sites.

    ``E J = e / (|A| + |B| - e)`` with ``e = |A| |B| / C``: what the sizes of two sub-architectures
    alone make of their overlap.

    Args:
        masks: ``{site name: bool (T, C)}``.

    Returns:
        float64 (T, T), symmetric.

    Example:
        >>> import torch
        >>> masks = {"a": torch.tensor([[True, True, False, False], [True, False, True, False]])}
        >>> chance_overlaps(masks).round(3)
        array([[0.333, 0.333],
               [0.333, 0.333]])
    """
    total: FloatArray = np.zeros(())
    for mask in masks.values():
        kept = mask.double().sum(1).numpy()
        both = np.outer(kept, kept) / mask.shape[1]
        union = kept[:, None] + kept[None] - both
        # 0/0 = 1: both are empty.
        total = total + np.where(union > 0, both / np.where(union > 0, union, 1.0), 1.0)
    return np.asarray(total / len(masks))


def cosines(rows: FloatArray) -> FloatArray:
    """Cosine of each pair of rows.

    Args:
        rows: (T, C).

    Returns:
        float64 (T, T), symmetric; 0 for a row of zeros.

    Example:
        >>> cosines(np.array([[1.0, 0.0], [3.0, 4.0]]))
        array([[1. , 0.6],
               [0.6, 1. ]])
    """
    length = np.sqrt(np.square(rows).sum(1, keepdims=True))
    unit = rows / np.where(length > 0, length, 1.0)
    return np.asarray(unit @ unit.T)
