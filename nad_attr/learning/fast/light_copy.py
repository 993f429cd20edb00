"""A copy of a frozen network that does the same with less work.

The user's network stays as it is. The copy shares its tensors, and its layers have the same names.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from nad_attr.learning.fast.folding import fold, found_pairs
from nad_attr.learning.fast.pooling import MaxPool2d, is_leaner
from nad_attr.sites.tracing import is_compiled

__all__ = ["light_copy"]

#: Highest difference of outputs that is rounding, over the largest output.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-11}


def light_copy(
    model: nn.Module,
    run: Callable[[nn.Module], Tensor],
    others: Iterable[Callable[[nn.Module], Tensor]] = (),
    *,
    folding: bool = True,
) -> nn.Module | None:
    """A copy of a network in which some layers do the same with less work.

    BatchNorm layers are merged into the convolutions before them
    (:mod:`nad_attr.learning.fast.folding`), maximum pooling of 2 x 2 windows on a CPU keeps less
    (:mod:`nad_attr.learning.fast.pooling`). Not all that a network does can be seen from outside,
    so the copy is compared with it, and not used if it gives anything else.

    Args:
        model: The network, in eval mode.
        run: Runs a network, this one or the copy, on some images, with whatever shall be found in
            it (gates, for one, that stand between two layers), and gives its outputs.
        others: Further ways to run it in which the copy has to give the same outputs. All are asked
            in float64 where the network runs in it.
        folding: Whether BatchNorm layers are merged; that rounds otherwise.

    Returns:
        The copy; None where there is nothing to do, hooks on the network would see other numbers,
        it cannot be copied, or it gives outputs of another precision than float32 and float64.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.MaxPool2d(2)).eval()
        >>> x = torch.randn(2, 1, 4, 4)
        >>> copied = light_copy(net, lambda model: model(x))
        >>> copied[1], torch.allclose(copied(x), net(x), atol=1e-6)
        (Identity(), True)
    """
    if _is_watched(model):
        return None
    with torch.no_grad():
        with found_pairs(model) as pairs:
            outputs = run(model)
        pools = [
            name
            for name, module in model.named_modules()
            if type(module) is nn.MaxPool2d and outputs.device.type == "cpu" and is_leaner(module)
        ]
        if not ((pairs and folding) or pools) or outputs.dtype not in _ROUNDING:
            return None
        try:
            # What a layer's forward asks of its BatchNorm, for one, an Identity may not have.
            copied = _lighter_copy(model, pairs if folding else [], pools)
            same = _agree(model, copied, pairs if folding else [], pools, run, others)
        except Exception:  # a saving that fails is none
            return None
    return copied if same else None


def _lighter_copy(
    model: nn.Module, pairs: Sequence[tuple[str, str]], pools: Sequence[str]
) -> nn.Module:
    copied = _sharing_copy(model)
    fold(copied, pairs)
    for name in pools:
        copied.get_submodule(name).__class__ = MaxPool2d
    return copied


def _agree(
    model: nn.Module,
    copied: nn.Module,
    pairs: Sequence[tuple[str, str]],
    pools: Sequence[str],
    run: Callable[[nn.Module], Tensor],
    others: Iterable[Callable[[nn.Module], Tensor]],
) -> bool:
    """Whether the copy gives the network's outputs.

    Asked in float64 where BatchNorms are merged, as rounding is then far below any difference:
    TF32, which GPUs use unless told otherwise, rounds as coarsely as two networks may differ that
    are not the same. Pooling alone rounds nothing, and weights in float64 take memory.
    """
    compared, same = (copied, model), None
    if pairs:
        with suppress(Exception):  # no float64 on the device, or float32 within the network
            precise = copy.deepcopy(model).double()
            in_float64 = _lighter_copy(precise, pairs, pools), precise
            same, compared = _is_rounding(*map(run, in_float64)), in_float64
    if same is None:
        same = _is_rounding(*map(run, compared))
    return same and all(_is_rounding(*map(other, compared)) for other in others)


def _is_watched(model: nn.Module) -> bool:
    """Whether the network's layers have hooks, or are compiled."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or is_compiled(module)
        for module in model.modules()
    )


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy with the very parameters and buffers of the network."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def _is_rounding(found: Tensor, expected: Tensor) -> bool:
    bound = _ROUNDING[expected.dtype] * expected.abs().max()
    return found.shape == expected.shape and bool(((found - expected).abs() <= bound).all())
