"""The positions of a site's tensor as parts of the image."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def _token_grid(n_tokens: int, aspect: float, prefix: int | None) -> tuple[int, int, int] | None:
    """(tokens without a position, rows, columns) of a list of tokens, if it is a grid."""
    for skipped in (0, 1) if prefix is None else (prefix,):
        n = n_tokens - skipped
        if n < 1:
            continue
        height = round(math.sqrt(n * aspect))
        if height and n % height == 0 and math.isclose(height / (n // height), aspect):
            return skipped, height, n // height
    return None


@dataclass(frozen=True)
class Grid:
    """The layout of the positions of a site's tensor.

    Attributes:
        height: Rows of positions.
        width: Columns of positions.
        n_prefix: Tokens before those of the image, if positions are a list of tokens. None:
            height and width are axes of the tensor.

    Example:
        >>> Grid(2, 2, 1).maps(torch.arange(5.0)[None])  # the first is a class token
        tensor([[[1., 2.],
                 [3., 4.]]])
    """

    height: int
    width: int
    n_prefix: int | None

    def maps(self, values: Tensor) -> Tensor:
        """Lay out sums over channels, (B, H, W) or (B, tokens), as maps (B, H, W)."""
        if self.n_prefix is None:
            return values
        maps: Tensor = values[:, self.n_prefix :].unflatten(1, (self.height, self.width))
        return maps


def grid_of(shape: torch.Size, aspect: float, prefix: int | None) -> tuple[Grid | None, str]:
    """The layout of a site's positions and "", or None and the reason.

    Args:
        shape: Shape of the site's tensor, without the axis of channels: (B, ...).
        aspect: Height of the image divided by its width, as of a grid of tokens.
        prefix: Tokens before those of the image; None: none or one, by their number.

    Example:
        >>> grid_of(torch.Size([1, 17]), 1.0, None)
        (Grid(height=4, width=4, n_prefix=1), '')
        >>> grid_of(torch.Size([1, 11]), 1.0, None)
        (None, "its 11 tokens are not a grid of the image's shape")
    """
    axes = shape[1:]
    if len(axes) == 0:
        return None, "a vector has no positions"
    if len(axes) == 1:
        found = _token_grid(axes[0], aspect, prefix)
        if found is None:
            return None, f"its {axes[0]} tokens are not a grid of the image's shape"
        grid = Grid(found[1], found[2], found[0])
    elif len(axes) == 2:
        grid = Grid(axes[0], axes[1], None)
    else:
        return None, f"its positions have {len(axes)} axes, not two"
    if grid.height < 2 or grid.width < 2:
        return None, f"{grid.height} x {grid.width} position(s) tell no quadrants apart"
    return grid, ""
