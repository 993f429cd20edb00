"""What an image shows where: label maps of one image, put together pixel by pixel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nad_attr._checks import tensor_of
from nad_attr.concepts.unit_concepts import Concept

__all__ = ["LabelMaps", "as_concepts", "label_maps", "label_parts", "show"]


def as_concepts(concepts: Any, what: str = "concepts") -> tuple[Concept, ...]:
    """A concept table from concepts or texts.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty, or holds a concept twice.

    Example:
        >>> as_concepts(["sky", Concept("red", "colour")])
        (Concept(name='sky', category=''), Concept(name='red', category='colour'))
    """
    if isinstance(concepts, (str, bytes)) or not isinstance(concepts, Sequence):
        raise TypeError(f"{what} must be a list of Concept or names, got {concepts!r:.60}.")
    table = tuple(c if isinstance(c, Concept) else Concept(c) for c in concepts)
    if not table:
        raise ValueError(f"{what} is empty: name what the label maps' numbers stand for.")
    if len(set(table)) < len(table):
        twice = next(c for c in table if table.count(c) > 1)
        raise ValueError(f"{what}: {twice.name!r} ({twice.category!r}) is there twice.")
    return table


@dataclass(frozen=True, eq=False)
class LabelMaps:
    """The labels of one image at each pixel.

    Attributes:
        combination: int64 (H, W), which combination of labels a pixel has.
        concepts: bool (combinations, concepts), which concepts are in it.
        n_pixels: int64 (combinations,), how many pixels have it.
    """

    combination: Tensor
    concepts: Tensor
    n_pixels: Tensor


def label_maps(
    labels: Any,
    n_concepts: int,
    *,
    ignore_index: int = -1,
    shape: tuple[int, int],
    where: str = "the image",
) -> LabelMaps:
    """Put the labels of an image together.

    Args:
        labels: Concept indices: a map (H, W), several of them (L, H, W), the index of the whole
            image, or a list of such. All maps of an image have the same size.
        n_concepts: Number of concepts.
        ignore_index: What an unlabelled pixel has; negative numbers mean the same.
        shape: (H, W) where there are labels of the whole image only.
        where: What to call the image in messages.

    Raises:
        TypeError: If labels are something else.
        ValueError: If maps differ in size, or an index is not a concept's.

    Example:
        >>> found = label_maps([torch.tensor([[0, 1], [1, -1]]), 2], 3, shape=(8, 8))
        >>> found.concepts.int().tolist(), found.n_pixels.tolist()
        ([[0, 0, 1], [1, 0, 1], [0, 1, 1]], [1, 1, 2])
    """
    parts = label_parts(labels, where)
    maps = [part for part in parts if part.ndim]
    whole = [int(part) for part in parts if not part.ndim]
    if len({tuple(each.shape) for each in maps}) > 1:
        sizes = ", ".join(str(tuple(each.shape)) for each in maps)
        raise ValueError(f"label maps of {where} differ in size: {sizes}; bring them to one.")
    if maps and not maps[0].numel():
        raise ValueError(f"the label maps of {where} are empty.")

    def checked(lowest: int, highest: int) -> None:
        if highest >= n_concepts:
            raise ValueError(
                f"a label of {where} is {highest}, but there are {n_concepts} concepts (0 to "
                f"{n_concepts - 1}); say which number means unlabelled with ignore_index, or give "
                "the whole concept table."
            )

    flat = torch.zeros(maps[0].shape if maps else shape, dtype=torch.int64, device="cpu")
    table = torch.zeros(1, n_concepts, dtype=torch.bool, device="cpu")
    for each in maps:
        known = torch.where(each == ignore_index, -1, each).clamp(min=-1)
        checked(int(known.min()), int(known.max()))
        # Number the pairs of old combination and new label that there are.
        pair = flat * (n_concepts + 1) + known + 1
        n_pairs = len(table) * (n_concepts + 1)
        there = torch.nonzero(torch.bincount(pair.flatten(), minlength=n_pairs)).flatten()
        number = torch.zeros(n_pairs, dtype=torch.int64, device="cpu")
        number[there] = torch.arange(len(there), device="cpu")
        old, label = there // (n_concepts + 1), there % (n_concepts + 1) - 1
        table = table[old]
        rows = torch.nonzero(label >= 0).flatten()
        table[rows, label[rows]] = True
        flat = number[pair]
    for index in whole:
        if index >= 0 and index != ignore_index:
            checked(index, index)
            table[:, index] = True
    return LabelMaps(flat, table, torch.bincount(flat.flatten(), minlength=len(table)))


def label_parts(labels: Any, where: str) -> list[Tensor]:
    """Label maps (H, W) and labels of the whole image, (), as int64 tensors.

    Raises:
        TypeError: If labels are something else.
        ValueError: If they have another number of axes.
    """
    found: list[Tensor] = []
    for part in labels if isinstance(labels, (list, tuple)) else (labels,):
        tensor = _integers(part, where)
        if tensor.ndim in (0, 2):
            found.append(tensor)
        elif tensor.ndim == 3:
            found += list(tensor)
        else:
            raise ValueError(
                f"labels of {where} have shape {tuple(tensor.shape)}; expected a map (H, W), maps "
                "(L, H, W), or the index of the whole image."
            )
    return found


def _integers(part: Any, where: str) -> Tensor:
    try:
        tensor = tensor_of(np.asarray(part) if not isinstance(part, Tensor) else part)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            f"labels of {where} must be integer tensors or numbers, got {type(part).__name__}."
        ) from None
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(
            f"labels of {where} are {tensor.dtype}; expected integers, the indices of concepts."
        )
    return tensor.detach().to("cpu", torch.int64)


def show(maps: LabelMaps, concept: int) -> Tensor:
    """Where an image shows a concept, bool (H, W).

    Example:
        >>> show(label_maps(torch.tensor([[0, 1]]), 2, shape=(1, 2)), 1)
        tensor([[False,  True]])
    """
    return maps.concepts[:, concept][maps.combination]
