"""Maximum pooling of 2 x 2 windows that keeps less for the backward pass than PyTorch's own.

PyTorch keeps the whole input and an eight-byte index for each maximum; which of four numbers is the
highest takes three bytes. On a CPU maxima of whole slices of the tensor are faster as well.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["MaxPool2d", "is_leaner"]


def is_leaner(pool: nn.MaxPool2d) -> bool:
    """Whether :class:`MaxPool2d` does something else than PyTorch for a layer's settings."""

    def pair(value: Any) -> tuple[int, int]:
        return (value, value) if isinstance(value, int) else tuple(value)

    settings = [pair(v) for v in (pool.kernel_size, pool.stride, pool.padding, pool.dilation)]
    plain = not pool.ceil_mode and not pool.return_indices
    return plain and settings == [(2, 2), (2, 2), (0, 0), (1, 1)]


class MaxPool2d(nn.MaxPool2d):
    """The same outputs and first derivatives as :class:`torch.nn.MaxPool2d`.

    Windows of 2 x 2 beside each other are taken as maxima of slices where the input lies on a CPU,
    channel by channel; all else is left to PyTorch. Of several equal maxima the first has the
    gradient, as there.

    Example:
        >>> x = torch.randn(1, 2, 7, 7)
        >>> torch.equal(MaxPool2d(2)(x), nn.MaxPool2d(2)(x))
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, height, width)."""
        # A window does not fit into a smaller image: PyTorch says so.
        usual = x.device.type == "cpu" and x.ndim == 4 and min(x.shape[2:]) >= 2
        lean = usual and x.is_contiguous() and is_leaner(self)
        pooled: Tensor = _Pooled.apply(x) if lean else super().forward(x)
        return pooled


class _Pooled(torch.autograd.Function):
    """Maxima of 2 x 2 windows; three bytes for four numbers are kept for the backward pass.

    The maximum of each row's two numbers first, then that of the two rows: so the first of equal
    ones is the first in reading order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        height, width = (n - n % 2 for n in x.shape[2:])
        left, right = x[:, :, :height, 0:width:2], x[:, :, :height, 1:width:2]
        higher = torch.maximum(left, right)
        upper, lower = higher[:, :, 0::2], higher[:, :, 1::2]
        ctx.save_for_backward(left >= right, upper >= lower)
        ctx.shape = x.shape
        return torch.maximum(upper, lower)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        is_left, is_upper = ctx.saved_tensors
        of_rows = grad.new_empty(is_left.shape)
        torch.mul(grad, is_upper, out=of_rows[:, :, 0::2])
        torch.sub(grad, of_rows[:, :, 0::2], out=of_rows[:, :, 1::2])
        height, width = is_left.shape[2], 2 * is_left.shape[3]
        whole = (height, width) == tuple(ctx.shape[2:])
        result = grad.new_empty(ctx.shape) if whole else grad.new_zeros(ctx.shape)
        left = torch.mul(of_rows, is_left)
        result[:, :, :height, 0:width:2] = left
        torch.sub(of_rows, left, out=result[:, :, :height, 1:width:2])
        return result
