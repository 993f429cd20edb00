"""Put gates in the right order among hooks of other libraries that rewrite the backward pass.

Captum's DeepLift, LRP, GuidedBackprop and Deconvolution, and every rule of Zennit, replace the
gradient that a module hands down. A gate on that module's output has to act after them, or its
factor is replaced too. Where relevance flows in place of gradients, a gate passes it on as a layer
with one weight per channel does: all of it if open, but for the part of the ablation value.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
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


def _hook_owner(hook: Any) -> object:
    """The object whose method a hook is, also if the hook acts for one owner only."""
    return getattr(inspect.unwrap(hook), "__self__", None)


def _rewrites(hook: Any) -> bool:
    """Whether a forward hook rewrites the gradient or relevance of its module."""
    owner = _hook_owner(hook)
    if _is_instance(owner, "zennit.core", "Hook") or _is_lrp(owner):
        return True
    # Captum's own backward hooks are closures that watch a module's output.
    return getattr(hook, "__module__", None) == "captum._utils.common" and (
        "_register_backward_hook" in getattr(hook, "__qualname__", "")
    )


def move_behind_rewriters(module: nn.Module, function: object) -> None:
    """Move the forward hook that runs ``function`` behind the last one that rewrites gradients.

    Later hooks stay behind it: a layer method of Captum sees the gated value. ``function`` is the
    argument of :func:`nad_attr.gating.installed`, which marks its hooks with it.
    """
    hooks = cast("OrderedDict[int, Any]", module._forward_hooks)
    if len(hooks) < 2:
        return
    order = list(hooks)
    mine = [key for key in order if getattr(hooks[key], "site_function", None) is function]
    if not mine:
        return
    # Gates of outer contexts were registered before, and stay in front.
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


def _hook_owners(model: nn.Module) -> Iterator[object]:
    for module in model.modules():
        yield from map(_hook_owner, module._forward_hooks.values())


def relevance_rules(model: nn.Module) -> list[Callable[[], bool]]:
    """For each relevance rule in a network, a function that says whether it is active.

    Empty when gradients flow back as usual, or rewritten (guided backpropagation).
    """
    found: list[Callable[[], bool]] = []
    for owner in _hook_owners(model):
        if _is_instance(owner, "zennit.core", "BasicHook"):
            found.append(partial(_is_active, weakref.ref(owner)))
        elif _is_lrp(owner):
            found.append(lambda: True)
    return found


def changes_weights(model: nn.Module) -> bool:
    """Whether Captum's LRP runs the network with other weights, so that activations differ."""
    epsilon = "captum.attr._utils.lrp_rules", "EpsilonRule"
    return any(_is_lrp(o) and not _is_instance(o, *epsilon) for o in _hook_owners(model))


def _is_active(reference: weakref.ref[Any]) -> bool:
    """Whether a rule of Zennit still exists and is switched on."""
    rule = reference()
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
        # As a layer of one weight: nothing through a weight of zero, all of it if nothing is added,
        # and otherwise the image's share of the sum.
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
        offset: What is added for the closed part; None: zero.
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
