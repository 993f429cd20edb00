"""BatchNorm layers of a frozen network, without keeping what only their weights' gradients need.

In eval mode a BatchNorm multiplies each channel by a constant and adds another, so the gradient of
its input needs that constant alone. PyTorch nevertheless keeps the layer's whole input, in most
networks about half of all that a backward pass holds. Hooks alone, undone at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.learning.fast.lean_layers import lean

__all__ = ["lean_batchnorm"]

#: Not their subclasses, which may do something else.
_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class _Scaled(torch.autograd.Function):
    """``output``, made of ``x`` without a graph, gets one: its gradient times a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        # The very tensor is handed on; a view of it would forbid an in-place ReLU behind.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        shape = (1, -1, *[1] * (grad.ndim - 2))
        return grad * scale.to(grad.dtype).view(shape), None, None


@contextmanager
def lean_batchnorm(model: nn.Module) -> Iterator[None]:
    """Let frozen BatchNorm layers in eval mode keep nothing for the backward pass.

    Outputs stay the same bit for bit, gradients up to rounding; only first derivatives with
    respect to the layers' inputs are possible inside. Layers that are in train mode, have no
    running statistics or have weights that want a gradient are left alone. Enter it after other
    hooks on the layers' inputs, so that those see the graph.

    Args:
        model: The network.

    Example:
        >>> net = nn.BatchNorm2d(2).eval().requires_grad_(False)
        >>> net.running_var.fill_(4.0)
        tensor([4., 4.])
        >>> x = torch.ones(1, 2, 1, 1, requires_grad=True)
        >>> with lean_batchnorm(net):
        ...     y = net(x)
        >>> torch.autograd.grad(y.sum(), x)[0].flatten()
        tensor([0.5, 0.5])
    """

    def ready(module: nn.Module, x: Tensor) -> bool:
        return not module.training and module.running_var is not None

    def attach(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        assert isinstance(module, _KINDS)
        assert module.running_var is not None
        scale = (module.running_var.detach() + module.eps).rsqrt()
        if module.weight is not None:
            scale = scale * module.weight.detach()
        result: Tensor = _Scaled.apply(x, output, scale)
        return result

    with lean(model, lambda module: type(module) in _KINDS, ready, attach):
        yield
