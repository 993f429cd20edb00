"""Frozen layers that keep less for the backward pass than PyTorch would. Hooks alone, undone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.system.threads import owned

__all__ = ["lean"]


@contextmanager
def lean(
    model: nn.Module,
    fits: Callable[[nn.Module], bool],
    ready: Callable[[nn.Module, Tensor], bool],
    attach: Callable[[nn.Module, Tensor, Tensor], Tensor],
) -> Iterator[None]:
    """Run some layers without a graph, and attach a leaner one to their outputs.

    Layers whose weights want a gradient, and passes without gradients, are left alone.

    Args:
        model: The network.
        fits: Which layers, looked at once.
        ready: Whether a layer can be lean for an input, looked at in each pass.
        attach: Makes of a layer, its input and its output without a graph an output with one.
    """
    waiting: dict[nn.Module, Tensor] = {}

    def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        waiting.pop(module, None)
        if len(args) != 1 or not isinstance(args[0], Tensor) or not args[0].requires_grad:
            return None
        if not torch.is_grad_enabled() or any(p.requires_grad for p in module.parameters()):
            return None
        if not ready(module, args[0]):
            return None
        waiting[module] = args[0]
        return (args[0].detach(),)

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = waiting.pop(module, None)
        return None if x is None else attach(module, x, output)

    with owned() as owner, ExitStack() as stack:
        for module in model.modules():
            if fits(module):
                stack.callback(module.register_forward_pre_hook(owner.only(before)).remove)
                # First of all, so that a gate on the layer's output stands behind it.
                handle = module.register_forward_hook(owner.only(after), prepend=True)
                stack.callback(handle.remove)
        yield
