"""Pixels in which units are active, counted by what they show, without upsampling whole maps.

A unit's activations are upsampled to the labels' resolution bilinearly (``align_corners=False``,
as by :func:`torch.nn.functional.interpolate`), and a pixel counts if the result is above the unit's
threshold. Between four neighbouring activations the result cannot exceed the highest of them, so
only *cells* with a corner above the threshold, about one in fifty, are computed. Along a row of
pixels of a cell the result rises or falls throughout, so the active pixels are its first or its
last: their labels are the difference of two running sums over the image's row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "Grid",
    "Touched",
    "above",
    "active_pixels",
    "count_active",
    "divided",
    "grid",
    "running_sums",
    "touched",
    "where",
]

#: Rows of pixels that are looked at together: few enough for a processor's cache.
_CHUNK = 2**16
#: Pixels from which on it pays to compute where a line crosses a limit.
_FEW = 8
#: Whole numbers up to this are exact in float32.
_EXACT = 2**24


@dataclass(frozen=True, eq=False)
class Grid:
    """How a map of h x w activations lies under H x W pixels.

    A cell lies between 2 x 2 activations, the outermost repeated beyond the edge: there are
    (h + 1) x (w + 1) cells, which hold up to P x Q pixels each.

    Attributes:
        shape: (h, w).
        size: (H, W).
        rows: int64 (h + 1, P), the pixel rows of each row of cells, H where there is none.
        columns: int64 (w + 1, Q), the same for columns, W where there is none.
        down: float (h + 1, P), a pixel's distance from the upper corner, in [0, 1); NaN (never
            above a threshold) where there is none.
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
                [3, 4]]), tensor([[0.7500,    nan],
                [0.2500, 0.7500],
                [0.2500,    nan]]))
    """
    rows, down = _axis(shape[0], size[0])
    columns, right = _axis(shape[1], size[1])
    weights = (down.to(device, dtype), right.to(device, dtype))
    return Grid(shape, size, rows.to(device), columns.to(device), *weights)


def _axis(n: int, n_pixels: int) -> tuple[Tensor, Tensor]:
    middle = (torch.arange(n_pixels, dtype=torch.float64, device="cpu") + 0.5) * n / n_pixels - 0.5
    cell = middle.floor()
    number = cell.long() + 1  # the first cell begins half a pixel before the map
    counts = torch.bincount(number, minlength=n + 1)
    place = torch.arange(n_pixels, device="cpu") - (counts.cumsum(0) - counts)[number]
    index = torch.full((n + 1, int(counts.max())), n_pixels, device="cpu")
    index[number, place] = torch.arange(n_pixels, device="cpu")
    weight = torch.full(index.shape, torch.nan, dtype=torch.float64, device="cpu")
    weight[number, place] = middle - cell
    return index, weight


def running_sums(combination: Tensor, shows: Tensor, room: list[Tensor] | None = None) -> Tensor:
    """Sums of each row's pixels, from the left edge up to each pixel: float (W + 1, B * H, K).

    Each pixel of ``combination``, int64 (B, H, W), counts for its row of ``shows``, (combinations,
    K). ``room`` is the memory of earlier sums to use again (a tensor, or none yet): fresh memory
    costs as much as the sums themselves.

    Example:
        >>> running_sums(torch.tensor([[[0, 1, 1]]]), torch.eye(2)).tolist()
        [[[0.0, 0.0]], [[1.0, 0.0]], [[1.0, 1.0]], [[1.0, 2.0]]]
    """
    n, height, width = combination.shape
    # All that count_active adds up in one go is at most this many pixels.
    dtype = torch.float32 if height * (width + 1) < _EXACT else torch.float64
    by_column = combination.permute(2, 0, 1).reshape(width, -1)
    shows = shows.to(dtype)
    shape = (width + 1, n * height, shows.shape[1])
    room = [] if room is None else room
    if not room or room[0].numel() < math.prod(shape) or room[0].dtype != dtype:
        room[:] = [shows.new_empty(math.prod(shape))]
    sums = room[0][: math.prod(shape)].view(shape)
    sums[0] = 0
    for x in range(width):
        torch.add(sums[x], shows.index_select(0, by_column[x]), out=sums[x + 1])
    return sums


@dataclass(frozen=True, eq=False)
class Touched:
    """Cells with a corner above a threshold.

    Attributes:
        cell: (n,), numbers over all images, image by image and row by row.
        unit: (n,), the unit of each.
        corners: (n, 4), its activations at the upper left, upper right, lower left, lower right.
    """

    cell: Tensor
    unit: Tensor
    corners: Tensor

    def of_images(self, place: Tensor, n_cells: int) -> Touched:
        """Those of some images of ``n_cells`` each; ``place`` (B,) has new numbers, -1 for none."""
        image = divided(self.cell, n_cells)
        new = place[image]
        chosen = where(new >= 0)
        cell = (self.cell + (new - image) * n_cells)[chosen]
        return Touched(cell, self.unit[chosen], self.corners[chosen])

    def above(self, thresholds: Tensor) -> Touched:
        """Those with a corner above a higher threshold."""
        limit = thresholds.index_select(0, self.unit)
        a, b, c, d = self.corners.unbind(1)
        highest = torch.maximum(torch.maximum(a, b), torch.maximum(c, d))
        chosen = where(highest > limit)
        return Touched(
            self.cell.index_select(0, chosen),
            self.unit.index_select(0, chosen),
            self.corners.index_select(0, chosen),
        )


def touched(activations: Tensor, over: Tensor, most: int | None = None) -> Touched | None:
    """Cells of all images (B, h, w, C), contiguous, with a corner ``over`` the threshold.

    None is returned if there are more than ``most``.

    Example:
        >>> maps = torch.tensor([0.0, 1.0]).reshape(1, 1, 2, 1)
        >>> found = touched(maps, maps > 0.5)
        >>> found.cell, found.corners  # 2 x 3 cells, of which 4 have the second as a corner
        (tensor([1, 2, 4, 5]), tensor([[0., 1., 0., 1.],
                [1., 1., 1., 1.],
                [0., 1., 0., 1.],
                [1., 1., 1., 1.]]))
    """
    n, height, width, n_units = activations.shape
    framed = _either(_either(over.view(activations.shape), 1), 2)
    place = where(framed.view(-1))
    if most is not None and len(place) > most:
        return None
    cell = divided(place, n_units)
    unit = place - cell * n_units
    at = _corners(n, height, width, n_units, activations.device).index_select(0, cell)
    at += unit[:, None]
    corners = activations.reshape(-1).index_select(0, at.view(-1)).view(-1, 4)
    return Touched(cell, unit, corners)


def _either(mask: Tensor, axis: int) -> Tensor:
    """Where a mask, or the mask one place before, is true; one longer along that axis."""
    n = mask.shape[axis]
    found = mask.new_empty(*mask.shape[:axis], n + 1, *mask.shape[axis + 1 :])
    found.narrow(axis, 0, 1).copy_(mask.narrow(axis, 0, 1))
    torch.bitwise_or(
        mask.narrow(axis, 0, n - 1), mask.narrow(axis, 1, n - 1), out=found.narrow(axis, 1, n - 1)
    )
    found.narrow(axis, n, 1).copy_(mask.narrow(axis, n - 1, 1))
    return found


@lru_cache(maxsize=32)
def _corners(n: int, height: int, width: int, n_units: int, device: torch.device) -> Tensor:
    """Where unit 0 is at the corners of each cell of n images, int64 (cells, 4)."""
    row, column = torch.arange(height + 1, device="cpu"), torch.arange(width + 1, device="cpu")
    image = torch.arange(n, device="cpu")[:, None, None] * (height * width)
    found = [
        (image + y[:, None] * width + x).flatten()
        for y in ((row - 1).clamp(min=0), row.clamp(max=height - 1))
        for x in ((column - 1).clamp(min=0), column.clamp(max=width - 1))
    ]
    return torch.stack(found, 1).mul_(n_units).to(device)


def count_active(found: Touched, thresholds: Tensor, sums: Tensor, grid: Grid) -> Tensor:
    """Sums over the pixels in which each unit is active: float64 (C, K), whole numbers.

    ``found`` holds all cells with a corner above the ``thresholds`` (C,), which have the
    activations' type; ``sums`` is from :func:`running_sums`.
    """
    n_units, (_, n_rows, n_shown) = len(thresholds), sums.shape
    (height, width), p = grid.size, grid.rows.shape[1]
    total = torch.zeros(n_units, n_shown, dtype=torch.float64, device=sums.device)
    # One after the other, units are bags of rows of pixels.
    order = _in_order(found.unit, n_units)
    unit, cell = found.unit.index_select(0, order), found.cell.index_select(0, order)
    a, b, c, d = found.corners.index_select(0, order)[:, None].unbind(2)
    limits = thresholds.index_select(0, unit)
    line = divided(cell, grid.shape[1] + 1)
    column = cell - line * (grid.shape[1] + 1)
    image = divided(line, grid.shape[0] + 1)
    row = line - image * (grid.shape[0] + 1)
    pixels = (grid.columns < width).sum(1)
    begin, table = grid.columns[:, 0], sums.view(-1, n_shown)
    step = max(1, min(_CHUNK, _EXACT // (width + 1)) // p)
    signs = _signs(step * p, table.dtype, table.device)
    for start in range(0, len(cell), step):
        part = slice(start, start + step)
        left, right = _vertical(a[part], b[part], c[part], d[part], grid.down[row[part]])
        limit = limits[part]
        # A row of pixels between two ends is active nowhere if it is not at an end.
        bar = where((torch.maximum(left, right) > limit[:, None]).view(-1))
        entry = divided(bar, p)
        left, right = left.view(-1).index_select(0, bar), right.view(-1).index_select(0, bar)
        across = column[part].index_select(0, entry)
        n_active = _n_active(left, right, limit.index_select(0, entry), across, grid)
        # The first ones of the row, or the last.
        skipped = (pixels.index_select(0, across) - n_active).masked_fill_(left > right, 0)
        place = skipped.add_(begin.index_select(0, across)).mul_(n_rows)
        bar -= entry * p
        bar += row[part].index_select(0, entry).mul_(p)
        place += grid.rows.view(-1).index_select(0, bar)
        place += image[part].index_select(0, entry).mul_(height)
        ends = torch.stack([place + n_active * n_rows, place], 1)
        per_unit = torch.bincount(unit[part].index_select(0, entry), minlength=n_units)
        total += functional.embedding_bag(
            ends.view(-1),
            table,
            (per_unit.cumsum(0) - per_unit) * 2,
            mode="sum",
            per_sample_weights=signs[: 2 * len(ends)],
        )
    return total


def _in_order(unit: Tensor, n_units: int) -> Tensor:
    """Places of the units in rising order, int64 (n,); NumPy counts short numbers."""
    if unit.device.type == "cpu" and n_units <= 2**16:
        return torch.from_numpy(unit.numpy().astype(np.uint16).argsort(kind="stable"))
    return unit.to(torch.int32).sort(stable=True).indices


@lru_cache(maxsize=64)
def _signs(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """1 and -1 in turn, n times."""
    return torch.tensor([1.0, -1.0], dtype=dtype, device=device).repeat(n)


def above(values: Tensor, limits: Tensor) -> Tensor:
    """``values > limits`` for limits (C,) of the last axis, which may be short.

    Example:
        >>> above(torch.tensor([[0.0, 1.0], [2.0, 3.0]]), torch.tensor([1.0, 2.0]))
        tensor([[False, False],
                [ True,  True]])
    """
    n = math.gcd(values.numel() // len(limits), 64)
    rows, repeated = values.reshape(-1, n * len(limits)), limits.repeat(n)
    if values.device.type == "cpu":  # NumPy compares up to four times as fast
        return torch.from_numpy(rows.numpy() > repeated.numpy()).view(values.shape)
    return (rows > repeated).view(values.shape)


def where(mask: Tensor) -> Tensor:
    """Where a mask (n,) is true: NumPy is several times quicker where little is.

    Example:
        >>> where(torch.tensor([False, True, True]))
        tensor([1, 2])
    """
    if mask.device.type == "cpu":
        return torch.from_numpy(np.flatnonzero(mask.numpy()))
    return torch.nonzero(mask).view(-1)


def divided(numbers: Tensor, n: int) -> Tensor:
    """Quotients without remainder of numbers from 0 on: NumPy divides by multiplication.

    Example:
        >>> divided(torch.tensor([0, 5, 6]), 3)
        tensor([0, 1, 2])
    """
    if numbers.device.type == "cpu":
        return torch.from_numpy(numbers.numpy() // n)
    return numbers // n


def _vertical(a: Tensor, b: Tensor, c: Tensor, d: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Activations at the left and the right end of rows of pixels, of corners (n, 1): (n, P).

    Each step is a + t (b - a), rounded twice: it never falls where t rises if a < b, and is a
    where a = b, so a flat map stays the same to the bit.
    """
    return (c - a).mul(down).add_(a), (d - b).mul(down).add_(b)


def _n_active(left: Tensor, right: Tensor, limit: Tensor, across: Tensor, grid: Grid) -> Tensor:
    """How many pixels between two ends (n,), one of them above the limit, are active: int64 (n,).

    The line crosses the limit at a computed place, and the two pixels around it are compared: the
    line rises or falls throughout, so if one is above and the other is not, all others are known.
    If rounding breaks this, all pixels are compared. ``across`` has the columns of the cells.
    """
    n_there, q = (grid.columns < grid.size[1]).sum(1), grid.right.shape[1]
    if q < _FEW:
        values = _between(left, right, grid.right.index_select(0, across))
        return (values > limit[:, None]).sum(1)
    # The table gets a column at both ends, so that both neighbours of any crossing can be read.
    first = grid.right[:, 0]
    frame = first.new_full((len(first), 1), torch.nan)
    table = torch.cat([frame, grid.right, frame], 1).view(-1)
    there = n_there.index_select(0, across)
    change = right - left
    share = (limit - left).div_(change)
    # Pixels are at first + i * w / W.
    share -= first.index_select(0, across)
    share *= grid.size[1] / grid.shape[1]
    # Of two equal ends, which are above the limit, this is minus infinity: no pixel is before.
    n_before = share.ceil_().nan_to_num_(0.0).clamp_(0, q).long()
    n_before = torch.minimum(n_before, there)
    at = across * (q + 2) + n_before
    before = table.index_select(0, at).mul_(change).add_(left) > limit
    at += 1
    after = table.index_select(0, at).mul_(change).add_(left) > limit
    rises = change >= 0
    n_active = torch.where(rises, there - n_before, n_before)
    # Beyond an end there is no pixel. NaN is never above, though it should be on one side.
    at_start, at_end = n_before == 0, n_before == there
    right_before = at_start | (before != rises)
    right_after = at_end | (after == rises)
    wrong = where(~(right_before & right_after))
    if len(wrong):
        some = (x.index_select(0, wrong) for x in (left, right, across))
        values = _between(next(some), next(some), grid.right.index_select(0, next(some)))
        n_active[wrong] = (values > limit.index_select(0, wrong)[:, None]).sum(1)
    return n_active


def _between(left: Tensor, right: Tensor, across: Tensor) -> Tensor:
    """Activations between ends (n,) at shares (n, Q) of the way."""
    return ((right - left)[:, None] * across).add_(left[:, None])


def active_pixels(activation: Tensor, threshold: float, size: tuple[int, int]) -> Tensor:
    """Where one unit (h, w) is above a threshold at the labels' resolution: bool (H, W).

    Example:
        >>> active_pixels(torch.tensor([[0.0, 1.0]]), 0.5, (1, 4))
        tensor([[False, False,  True,  True]])
    """
    layout = grid(tuple(activation.shape), size, activation.dtype, activation.device)
    n_rows, n_columns = layout.rows.shape[0], layout.columns.shape[0]
    height, width = layout.shape
    flat, places = activation.reshape(-1), _corners(1, height, width, 1, activation.device)
    a, b, c, d = flat[places][:, None].unbind(2)
    left, right = _vertical(a, b, c, d, layout.down.repeat_interleave(n_columns, 0))
    p, q = left.shape[1], layout.right.shape[1]
    across = layout.right.repeat(n_rows, 1).repeat_interleave(p, 0)
    values = _between(left.reshape(-1), right.reshape(-1), across)
    framed = activation.new_zeros(size[0] + 1, size[1] + 1)
    rows = layout.rows[:, None, :, None].expand(-1, n_columns, -1, q)
    columns = layout.columns[None, :, None, :].expand(rows.shape)
    framed[rows, columns] = values.reshape(rows.shape)
    return framed[: size[0], : size[1]] > threshold
