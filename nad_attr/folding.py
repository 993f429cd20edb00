"""BatchNorm layers merged into the convolutions before them, in a copy of a frozen network.

In eval mode a BatchNorm behind a convolution is part of it: the convolution's weights times one
constant per channel, its bias times that and another added. The passes of learning are then spared
reading and writing each of these tensors once more, forward and backward. The user's network stays
as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ["folded"]

#: Not their subclasses, which may do something else.
_CONVOLUTIONS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
#: Highest difference of outputs that is rounding, over the largest output.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-11}


def folded(
    model: nn.Module, run: Callable[[nn.Module], Tensor], *others: Callable[[nn.Module], Tensor]
) -> nn.Module | None:
    """A copy of a network with BatchNorm layers merged into the convolutions before them.

    Merged are a convolution and a BatchNorm in eval mode that are each called once, the second with
    the very output of the first. Whether that output is used elsewhere as well cannot be seen, so
    the copy is compared with the network, and not used if it gives anything else.

    Args:
        model: The network, in eval mode.
        run: Runs a network, this one or the copy, on some images, with whatever shall be found in
            between (gates, for one, that stand between the two layers), and gives its outputs.
        others: Further ways to run it in which the copy has to give the same outputs.

    Returns:
        The copy, whose layers have the names they had; None where nothing can be merged: no such
        pair, hooks on the network that would see other numbers, a network that cannot be copied,
        or one in another precision than float32 and float64.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), nn.ReLU()).eval()
        >>> x = torch.randn(2, 1, 5)
        >>> lighter = folded(net, lambda model: model(x))
        >>> lighter[1], torch.allclose(lighter(x), net(x), atol=1e-6)
        (Identity(), True)
    """
    if _is_watched(model):
        return None
    with torch.no_grad():
        with _flows(model) as pairs:
            outputs = [run(model)]
        if not pairs or outputs[0].dtype not in _ROUNDING:
            return None
        outputs += [other(model) for other in others]
        try:
            # What a layer's forward asks of its BatchNorm, an Identity may not have.
            lighter = copy.deepcopy(model)
            _fold(lighter, pairs)
            same = [
                _is_rounding(function(lighter), output)
                for function, output in zip((run, *others), outputs, strict=True)
            ]
        except Exception:  # a saving that fails is none
            return None
    return lighter if all(same) else None


def _is_rounding(found: Tensor, expected: Tensor) -> bool:
    bound = _ROUNDING[expected.dtype] * expected.abs().max()
    return found.shape == expected.shape and bool(((found - expected).abs() <= bound).all())


def _is_watched(model: nn.Module) -> bool:
    """Whether anybody stands on the network's layers, or compiled them."""
    return any(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
        or hasattr(module, "_orig_mod")
        or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def _can_fold(convolution: Any, norm: Any) -> bool:
    return (
        type(norm) is _CONVOLUTIONS[type(convolution)]
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and convolution.weight.dtype == norm.running_var.dtype
        and convolution.weight.dtype in _ROUNDING
    )


@contextmanager
def _flows(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Names of the pairs that can be merged, as one pass inside shows them; filled at the end."""
    pairs: list[tuple[str, str]] = []
    outputs: dict[nn.Module, Tensor] = {}
    after: dict[nn.Module, nn.Module] = {}
    calls: dict[nn.Module, int] = {}

    def made(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        outputs[module] = output

    def used(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        for convolution in [c for c, made in outputs.items() if made is args[0]]:
            after[module] = convolution
            del outputs[convolution]  # nothing is held longer than it has to be

    names = {module: name for name, module in model.named_modules()}
    with ExitStack() as stack:
        for module in names:
            if type(module) in _CONVOLUTIONS:
                # Before all others: what they put in the output's place is another tensor.
                handle = module.register_forward_hook(made, prepend=True)
                stack.callback(handle.remove)
            elif type(module) in _CONVOLUTIONS.values():
                # Afterwards, so that the input is what hooks before the layer have made of it.
                stack.callback(module.register_forward_hook(used).remove)
        yield pairs
    pairs += [
        (names[convolution], names[norm])
        for norm, convolution in after.items()
        if calls[norm] == calls[convolution] == 1 and _can_fold(convolution, norm)
    ]


def _fold(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Merge the pairs, in place."""
    for name, norm_name in pairs:
        convolution: Any = model.get_submodule(name)
        norm: Any = model.get_submodule(norm_name)
        weight, bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var,
            norm.eps, norm.weight, norm.bias,
        )  # fmt: skip
        convolution.weight = nn.Parameter(weight.detach(), requires_grad=False)
        convolution.bias = nn.Parameter(bias.detach(), requires_grad=False)
        parent, _, last = norm_name.rpartition(".")
        setattr(model.get_submodule(parent), last, nn.Identity().eval())
