"""Similarity of the sub-architectures of two tasks: T x T matrices for each gate site."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["chance_overlaps", "cosines", "overlap_matrix", "site_overlaps"]

FloatArray: TypeAlias = NDArray[np.float64]


def overlap_matrix(masks: Mapping[str, Tensor], *, chance_corrected: bool = False) -> Tensor:
    """Overlap of all pairs of sub-architectures, mean over sites.

    The matrix of :meth:`nad_attr.SubArchitecture.overlap`, by matrix products. At a site with C
    channels, ``J = |A and B| / |A or B|``, or with ``chance_corrected`` ``(J - E) / (1 - E)``,
    where ``E = e / (|A| + |B| - e)`` and ``e = |A| |B| / C``. 0/0 is 1.

    Args:
        masks: ``{site name: bool (T, C)}``.
        chance_corrected: Give kappa, which is 0 on average for random masks, in place of J.

    Returns:
        float64 (T, T), symmetric.

    Raises:
        ValueError: If there is no site, or masks are not bool (T, C) with the same T.

    Example:
        >>> masks = {"conv": torch.tensor([[True, True, False, False], [True, False, True, False]])}
        >>> overlap_matrix(masks)
        tensor([[1.0000, 0.3333],
                [0.3333, 1.0000]], dtype=torch.float64)
        >>> overlap_matrix(masks, chance_corrected=True).round(decimals=6)[0, 1]
        tensor(0., dtype=torch.float64)
    """
    if not masks:
        raise ValueError("there is no gate site to compare masks at.")
    total: Tensor | None = None
    for name, mask in masks.items():
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"masks of {name!r} must be bool (T, C), got {mask.dtype} "
                             f"{tuple(mask.shape)}.")  # fmt: skip
        if total is not None and len(mask) != len(total):
            raise ValueError(f"masks of {name!r} are for {len(mask)} tasks, others for "
                             f"{len(total)}.")  # fmt: skip
        values = mask.double()
        n = values.sum(1)
        both = values @ values.T
        union = n[:, None] + n[None, :] - both
        measure = torch.where(union > 0, both / union, 1.0)
        if chance_corrected:
            random = n[:, None] * n[None, :] / mask.shape[1]
            random_union = n[:, None] + n[None, :] - random
            expected = torch.where(random_union > 0, random / random_union, 1.0)
            measure = torch.where(expected < 1, (measure - expected) / (1 - expected), 1.0)
        total = measure if total is None else total + measure
    assert total is not None
    return total / len(masks)


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

    ``E J = e / (|A| + |B| - e)`` with ``e = |A| |B| / C``: the part of the overlap of two
    sub-architectures that follows from their sizes.

    Args:
        masks: ``{site name: bool (T, C)}``.

    Returns:
        float64 (T, T), symmetric.

    Example:
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
