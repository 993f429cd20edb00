"""Pixels in which units are active, counted by what they show, without upsampling whole maps.

A unit's activations are upsampled to the labels' resolution bilinearly (``align_corners=False``,
as :func:`torch.nn.functional.interpolate` does it), and a pixel is counted where the result is
above the unit's threshold. Between four neighbouring activations the result cannot exceed the
highest of them: only *cells* with a corner above the threshold, about one in fifty, are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Grid", "active_pixels", "cells", "count_active", "grid"]

#: Rows of pixels that are looked at together: few enough for a processor's cache.
_CHUNK = 2**15


@dataclass(frozen=True)
class Grid:
    """How a map of h x w activations lies under H x W pixels.

    A cell is what lies between 2 x 2 activations, the outermost repeated beyond the edge: there
    are (h + 1) x (w + 1) cells, which hold up to P x Q pixels each.

    Attributes:
        shape: (h, w).
        size: (H, W).
        rows: int64 (h + 1, P), the pixel rows of each row of cells, H where there is none.
        columns: int64 (w + 1, Q), the same for columns, W where there is none.
        down: float (h + 1, P), how far from the upper to the lower corner a pixel lies, in [0, 1).
        right: float (w + 1, Q), the same from left to right.
    """

    shape: tuple[int, int]
    size: tuple[int, int]
    rows: Tensor
    columns: Tensor
    down: Tensor
    right: Tensor


@lru_cache(maxsize=256)
def grid(
    shape: tuple[int, int], size: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Grid:
    """The grid of a map under pixels.

    Example:
        >>> found = grid((1, 2), (1, 4), torch.float32, torch.device("cpu"))
        >>> found.columns, found.right
        (tensor([[0, 4],
                [1, 2],
                [3, 4]]), tensor([[0.7500, 0.0000],
                [0.2500, 0.7500],
                [0.2500, 0.0000]]))
    """
    rows, down = _axis(shape[0], size[0])
    columns, right = _axis(shape[1], size[1])
    return Grid(
        shape,
        size,
        rows.to(device),
        columns.to(device),
        down.to(device, dtype),
        right.to(device, dtype),
    )


def _axis(n: int, n_pixels: int) -> tuple[Tensor, Tensor]:
    where = (torch.arange(n_pixels, dtype=torch.float64) + 0.5) * n / n_pixels - 0.5
    cell = where.floor()
    number = cell.long() + 1  # the first cell begins half a pixel before the map
    counts = torch.bincount(number, minlength=n + 1)
    place = torch.arange(n_pixels) - (counts.cumsum(0) - counts)[number]
    index = torch.full((n + 1, int(counts.max())), n_pixels)
    index[number, place] = torch.arange(n_pixels)
    weight = torch.zeros(index.shape, dtype=torch.float64)
    weight[number, place] = where - cell
    return index, weight


def cells(combination: Tensor, n_combinations: int, grid: Grid) -> Tensor:
    """Combinations of labels of images (B, H, W) by cell: (B * cells, P * Q).

    Where no pixel is, ``n_combinations`` stands.
    """
    n, height, width = combination.shape
    framed = combination.new_full((n, height + 1, width + 1), n_combinations)
    framed[:, :height, :width] = combination
    chosen = framed[:, grid.rows[:, None, :, None], grid.columns[None, :, None, :]]
    return chosen.flatten(3).flatten(0, 2)


def count_active(
    activations: Tensor, thresholds: Tensor, by_cell: Tensor, n_combinations: int, grid: Grid
) -> Tensor:
    """How many pixels of each combination of labels each unit is active in.

    Args:
        activations: (B, h, w, C), of some images.
        thresholds: (C,), of the same type.
        by_cell: (B * cells, P * Q), the images' combinations by :func:`cells`.
        n_combinations: How many there are; this number stands where no pixel is.
        grid: Of the activations under the labels.

    Returns:
        int64 (C, n_combinations).
    """
    n_units, n_codes = activations.shape[3], n_combinations + 1
    cell, unit = _touched(activations > thresholds)
    found: list[Tensor] = []
    codes, (n_rows, n_columns) = by_cell.flatten(), (grid.rows.shape[1], grid.columns.shape[1])
    step = max(1, _CHUNK // n_rows)
    for start in range(0, len(unit), step):
        where, of = cell[start : start + step], unit[start : start + step]
        limit = thresholds[of]
        left, right, column = _vertical(activations, where, of, grid)
        # A row of pixels between two corners is active nowhere if it is not at an end.
        line = torch.nonzero((torch.maximum(left, right) > limit[:, None]).view(-1)).view(-1)
        entry = line // n_rows
        left, right = left.view(-1).index_select(0, line), right.view(-1).index_select(0, line)
        across = grid.right.index_select(0, column.index_select(0, entry))
        values = torch.addcmul(left[:, None], across, (right - left)[:, None])
        pixel = torch.nonzero((values > limit.index_select(0, entry)[:, None]).view(-1)).view(-1)
        chosen = pixel // n_columns
        # Where the row's pixels begin in by_cell, less where they begin among these rows.
        shift = (where * n_rows).index_select(0, entry).add_(line - entry * n_rows)
        shift = shift.sub_(torch.arange(len(entry), device=entry.device)).mul_(n_columns)
        # Which combination each active pixel has; those beyond the edge have a number of their own.
        code = codes.index_select(0, pixel.add_(shift.index_select(0, chosen)))
        start_of = (of * n_codes).index_select(0, entry).index_select(0, chosen)
        found.append(start_of.add_(code))
    every = torch.cat(found) if found else unit.new_zeros(0)
    counts = torch.bincount(every, minlength=n_units * n_codes)
    return counts.reshape(n_units, n_codes)[:, :n_combinations]


def _touched(above: Tensor) -> tuple[Tensor, Tensor]:
    """Cells of all images with a corner above the threshold, and the unit of each: (n,)."""
    n, height, width, n_units = above.shape
    touched = above.new_zeros(n, height + 1, width + 1, n_units)
    for top in (0, 1):
        for left in (0, 1):
            touched[:, top : top + height, left : left + width] |= above
    found = torch.nonzero(touched.view(-1, n_units), as_tuple=True)
    return found[0], found[1]


def _vertical(
    activations: Tensor, cell: Tensor, unit: Tensor, grid: Grid
) -> tuple[Tensor, Tensor, Tensor]:
    """Activations at the left and the right end of each row of pixels of cells: (n, P), (n, P).

    Each step is a + t (b - a), which is a where a = b: a flat map stays what it is, to the bit.
    The third is the cells' column, (n,).
    """
    _, height, width, n_units = activations.shape
    flat = activations.reshape(-1)
    line, column = cell // (width + 1), cell % (width + 1)
    image, row = line // (height + 1), line % (height + 1)
    top = image * (height * width)
    upper = (row - 1).clamp_(min=0).mul_(width).add_(top)
    lower = row.clamp(max=height - 1).mul_(width).add_(top)
    near, far = (column - 1).clamp_(min=0), column.clamp(max=width - 1)
    a, b, c, d = (
        flat.index_select(0, (y + x).mul_(n_units).add_(unit))[:, None]
        for y, x in ((upper, near), (upper, far), (lower, near), (lower, far))
    )
    down = grid.down[row]
    return torch.addcmul(a, down, c - a), torch.addcmul(b, down, d - b), column


def active_pixels(activation: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """Where one unit is active at the labels' resolution, bool (H, W).

    Args:
        activation: (h, w).
        threshold: What to exceed.
        size: (H, W).

    Example:
        >>> active_pixels(torch.tensor([[0.0, 1.0]]), 0.5, (1, 4))
        tensor([[False, False,  True,  True]])
    """
    layout = grid(tuple(activation.shape), size, activation.dtype, activation.device)
    n = layout.rows.shape[0] * layout.columns.shape[0]
    cell = torch.arange(n, device=activation.device)
    left, right, column = _vertical(
        activation[None, :, :, None].contiguous(), cell, torch.zeros_like(cell), layout
    )
    across = layout.right[column][:, None, :]
    values = torch.addcmul(left[:, :, None], across, (right - left)[:, :, None])
    framed = activation.new_zeros(size[0] + 1, size[1] + 1)
    rows = layout.rows[:, None, :, None].expand(-1, len(layout.columns), -1, values.shape[2])
    columns = layout.columns[None, :, None, :].expand(rows.shape)
    framed[rows, columns] = values.reshape(rows.shape)
    return framed[: size[0], : size[1]] > threshold
