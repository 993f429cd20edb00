"""Put gates in the right order among hooks of other libraries that rewrite the backward pass.

Captum's DeepLift, LRP, GuidedBackprop and Deconvolution, and every rule of Zennit, replace the
gradient that a module hands down by one of their own. A gate on that module's output has to act
behind them, or its factor is replaced with the rest. And where relevance flows in place of
gradients, a gate hands it down as a layer of one weight for each channel does: all of it through an
open one, save what the ablation value contributed.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

__all__ = ["changes_weights", "gate_relevance", "move_behind_rewriters", "relevance_rules"]


def _is_instance(value: object, module: str, name: str) -> bool:
    """``isinstance`` of a class, without importing its package."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _is_lrp(owner: object) -> bool:
    return _is_instance(owner, "captum.attr._utils.lrp_rules", "PropagationRule")


def _whose(hook: Any) -> object:
    """The object whose method a hook is, also if the hook acts for one owner only."""
    return getattr(inspect.unwrap(hook), "__self__", None)


def _rewrites(hook: Any) -> bool:
    """Whether a forward hook rewrites the gradient or relevance of its module."""
    owner = _whose(hook)
    if _is_instance(owner, "zennit.core", "Hook") or _is_lrp(owner):
        return True
    # Captum's own backward hooks are closures that watch a module's output.
    return getattr(hook, "__module__", None) == "captum._utils.common" and (
        "_register_backward_hook" in getattr(hook, "__qualname__", "")
    )


def move_behind_rewriters(module: nn.Module, function: object) -> None:
    """Move the forward hook that runs ``function`` behind the last one that rewrites gradients.

    Hooks that come later than those stay behind it: a layer method of Captum sees the gated value.

    Args:
        module: The gated module.
        function: What :func:`nad_attr.gating.installed` was given; it marks its hooks with it.
    """
    hooks = cast("OrderedDict[int, Any]", module._forward_hooks)
    if len(hooks) < 2:
        return
    order = list(hooks)
    mine = [key for key in order if getattr(hooks[key], "site_function", None) is function]
    if not mine:
        return
    # Gates of contexts further out were registered before, and stay in front.
    last = max(
        (
            place
            for place, key in enumerate(order)
            if _rewrites(hooks[key]) or (key < mine[0] and hasattr(hooks[key], "site_function"))
        ),
        default=-1,
    )
    if last > order.index(mine[0]):
        for key in (*mine, *(k for k in order[last + 1 :] if k not in mine)):
            hooks.move_to_end(key)


def relevance_rules(model: nn.Module) -> list[Callable[[], bool]]:
    """One function for each relevance rule in a network, which says whether it is active.

    Args:
        model: The network.

    Returns:
        Empty when gradients flow back as usual, or rewritten (guided backpropagation).
    """
    found: list[Callable[[], bool]] = []
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = _whose(hook)
            if _is_instance(owner, "zennit.core", "BasicHook"):
                found.append(_Active(owner))
            elif _is_lrp(owner):
                found.append(_always)
    return found


def changes_weights(model: nn.Module) -> bool:
    """Whether Captum's LRP runs the network with other weights, so that activations differ.

    Args:
        model: The network, while Captum's hooks are on it.
    """
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = _whose(hook)
            if _is_lrp(owner) and not _is_instance(
                owner, "captum.attr._utils.lrp_rules", "EpsilonRule"
            ):
                return True
    return False


def _always() -> bool:
    return True


class _Active:
    """Whether a rule of Zennit is there and switched on; it can be switched off before backward."""

    def __init__(self, rule: Any) -> None:
        self.rule = weakref.ref(rule)

    def __call__(self) -> bool:
        rule = self.rule()
        return rule is not None and bool(rule.active)


class _GateRelevance(torch.autograd.Function):
    """``x * factor + offset``, which passes relevance on like a layer with a bias."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        factor: Tensor,
        offset: Tensor | None,
        rules: Sequence[Callable[[], bool]],
    ) -> Tensor:
        ctx.rules = rules
        ctx.has_offset = offset is not None
        y = x * factor if offset is None else torch.addcmul(offset, x, factor)
        ctx.save_for_backward(x, factor, *(() if offset is None else (offset,)))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        x, factor, *rest = ctx.saved_tensors
        if not any(rule() for rule in ctx.rules):
            return grad * factor, None, None, None
        # As a layer of one weight does: nothing through a weight of zero, all of it where nothing
        # is added, and otherwise what the image's part has in the sum.
        closed = factor == 0
        if not rest:
            return grad.masked_fill(closed, 0), None, None, None
        part, offset = x * factor, rest[0]
        whole = part + offset
        share = part / torch.where(whole == 0, 1, whole)
        share = torch.where(offset == 0, 1, share).masked_fill(closed, 0)
        return grad * share, None, None, None


def gate_relevance(
    x: Tensor, factor: Tensor, offset: Tensor | None, rules: Sequence[Callable[[], bool]]
) -> Tensor:
    """``x * factor (+ offset)``; its backward pass carries relevance while rules are active.

    Args:
        x: A site's tensor.
        factor: Its gates, in a shape that multiplies it.
        offset: What stands for the closed part; None: zero.
        rules: From :func:`relevance_rules`.

    Example:
        >>> x = torch.tensor([1.0, 3.0], requires_grad=True)
        >>> half = torch.tensor([0.5, 0.5])
        >>> y = gate_relevance(x, half, half, [lambda: True])
        >>> torch.autograd.grad(y, x, torch.ones(2))[0]
        tensor([0.5000, 0.7500])
    """
    result: Tensor = _GateRelevance.apply(x, factor, offset, rules)
    return result
