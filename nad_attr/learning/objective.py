"""The terms of the losses, as pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["gate_and_difference", "paper_loss"]


class _GateAndDifference(torch.autograd.Function):
    """``y = x * gate`` and the mean squared difference of y to the clean x, image by image.

    Autograd would keep y - clean beside x, y and clean at every site, which is most of the memory
    that learning needs.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, clean: Tensor, rectified: bool
    ) -> tuple[Tensor, Tensor]:
        y = x * gate.to(x.dtype)
        ctx.save_for_backward(x, gate, clean)
        ctx.rectified = rectified
        difference = _difference(y, clean, rectified)
        wide = torch.promote_types(x.dtype, torch.float32)
        return y, difference.to(wide).square().flatten(1).mean(1)

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor, grad_square: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, gate, clean = ctx.saved_tensors
        factor = gate.to(x.dtype)
        y = x * factor
        grad = _difference(y, clean, ctx.rectified)
        per_image = (2 / grad[0].numel() * grad_square).to(x.dtype)
        grad = grad.mul_(per_image.reshape(-1, *[1] * (x.ndim - 1)))
        if ctx.rectified:
            grad = grad.masked_fill_(y <= 0, 0)
        grad = grad.add_(grad_y)
        grad_x = grad * factor if ctx.needs_input_grad[0] else None
        grad_gate = None
        if ctx.needs_input_grad[1]:
            over = [d for d in range(x.ndim) if gate.shape[d] == 1 and x.shape[d] != 1]
            product = grad * x
            # An empty list of axes would mean all axes.
            grad_gate = (
                product.sum(over, keepdim=True, dtype=gate.dtype)
                if over
                else product.to(gate.dtype)
            )
        return grad_x, grad_gate, None, None


def _difference(y: Tensor, clean: Tensor, rectified: bool) -> Tensor:
    return y.relu() - clean.relu() if rectified else y - clean


def gate_and_difference(
    x: Tensor, gate: Tensor, clean: Tensor, *, rectified: bool = False
) -> tuple[Tensor, Tensor]:
    """Gate a site and measure its distance from the clean network.

    Args:
        x: The site's output in the gated network, (B, ...).
        gate: Gates that broadcast against ``x``, (B or 1, ..., C, ...).
        clean: The site's output in the whole network, like ``x``.
        rectified: Compare after a ReLU that the network applies by a function call.

    Returns:
        The gated output, like ``x``, and float32 (B,): mean squared difference over channels and
        positions.

    Example:
        >>> x = torch.tensor([[2.0, 4.0]])
        >>> y, difference = gate_and_difference(x, torch.tensor([[1.0, 0.5]]), x)
        >>> y.tolist(), difference.tolist()
        ([[2.0, 2.0]], [2.0])
    """
    y, difference = _GateAndDifference.apply(x, gate, clean, rectified)
    return y, difference


def paper_loss(
    outputs: Tensor,
    labels: Tensor,
    differences: Tensor,
    right: Tensor,
    rows: Tensor,
    gates: Sequence[Tensor],
    beta: float,
) -> tuple[Tensor, Tensor]:
    """The released recipe's loss of each task (DESIGN: the released recipe).

    ``(1/L) [mean over right images of (cross-entropy + sum over sites of the mean squared
    difference)] + (beta/L) sum over sites of the mean over channels of gate^2``.

    Args:
        outputs: (B, K), the gated network's outputs.
        labels: int64 (B,), the images' own classes.
        differences: (B,), summed over sites.
        right: bool (B,), images that the whole network gets right; others do not count.
        rows: int64 (B,), the row of each image's task, 0 to R - 1.
        gates: For each of the L sites (R, C).
        beta: Weight of the size term.

    Returns:
        Losses (R,), zero for a task without a right image, and bool (R,): tasks that have one.
    """
    n_sites = len(gates)
    per_image = F.cross_entropy(outputs, labels, reduction="none") + differences
    per_image = torch.where(right, per_image, torch.zeros_like(per_image))
    count = torch.zeros_like(gates[0][:, 0]).index_add_(0, rows, right.to(gates[0].dtype))
    total = torch.zeros_like(count).index_add(0, rows, per_image.to(count.dtype))
    total = total / count.clamp(min=1)
    size = torch.stack([gate.square().mean(1) for gate in gates]).sum(0)
    active = count > 0
    return torch.where(active, (total + beta * size) / n_sites, torch.zeros_like(total)), active
