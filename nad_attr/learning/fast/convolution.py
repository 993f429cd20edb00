"""Convolutions of a frozen network, without keeping what only their weights' gradients need.

The gradient of a convolution's input needs the weights and the shape of the input, not the input
itself. PyTorch nevertheless keeps it. Behind a gate nothing else does, so that each gated site
would be held twice: as it was, for the gate's gradient, and gated. Hooks alone, undone at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.learning.fast.lean_layers import lean

__all__ = ["lean_convolutions"]

#: Not their subclasses, which may do something else.
_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _Convolved(torch.autograd.Function):
    """``output``, a convolution of ``x`` made without a graph, gets one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, output: Tensor, weight: Tensor, module: Any) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.strides, ctx.dtype = x.shape, x.stride(), x.dtype
        ctx.settings = (module.stride, module.padding, module.dilation, module.groups)
        # The very tensor is handed on; a view of it would forbid an in-place ReLU behind.
        ctx.mark_dirty(output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        # Stands for the input, whose shape and layout are asked for and whose values are not.
        shape = torch.empty_strided(ctx.shape, ctx.strides, dtype=grad.dtype, device=grad.device)
        found = torch.ops.aten.convolution_backward(
            grad,
            shape,
            weight.to(grad.dtype),  # autocast has convolved in another
            None,
            stride,
            padding,
            dilation,
            False,
            [0] * len(stride),
            groups,
            [True, False, False],
        )
        return found[0].to(ctx.dtype), None, None, None


def _can_be_lean(module: nn.Module) -> bool:
    return (
        type(module) in _KINDS
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)  # "same" may pad one side more than the other
    )


@contextmanager
def lean_convolutions(model: nn.Module) -> Iterator[None]:
    """Let frozen convolutions keep nothing of their input for the backward pass.

    Outputs and gradients stay the same bit for bit; only first derivatives with respect to the
    layers' inputs are possible inside. Layers whose weights want a gradient, or that pad in
    another way than with a number of zeros on both sides, are left alone. Enter it after other
    hooks on the layers' inputs, so that those see the graph.

    Args:
        model: The network.

    Example:
        >>> net = nn.Conv1d(1, 1, 2).requires_grad_(False)
        >>> net.weight.copy_(torch.tensor([[[1.0, 2.0]]])).flatten()
        tensor([1., 2.])
        >>> x = torch.ones(1, 1, 3, requires_grad=True)
        >>> with lean_convolutions(net):
        ...     y = net(x)
        >>> torch.autograd.grad(y.sum(), x)[0].flatten()
        tensor([1., 3., 2.])
    """

    def ready(module: nn.Module, x: Tensor) -> bool:
        # An input without a batch axis, or a parametrised weight, is left alone.
        weight = module._parameters.get("weight")
        return weight is not None and x.ndim == weight.ndim

    def attach(module: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        result: Tensor = _Convolved.apply(x, output, module.weight, module)
        return result

    with lean(model, _can_be_lean, ready, attach):
        yield
