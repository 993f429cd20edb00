"""BatchNorm layers merged into the convolutions before them.

In eval mode a BatchNorm behind a convolution is part of it: the convolution's weights times one
constant per channel, its bias times that and another added. The passes of learning are then spared
reading and writing each of these tensors once more, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nad_attr.system.threads import owned

__all__ = ["fold", "found_pairs"]

#: Not their subclasses, which may do something else.
_CONVOLUTIONS = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
#: Coarser weights would be rounded once more, which is no small matter.
_FINE = (torch.float32, torch.float64)


def _can_fold(convolution: Any, norm: Any) -> bool:
    return (
        type(norm) is _CONVOLUTIONS[type(convolution)]
        and not norm.training
        and norm.running_mean is not None
        and norm.running_var is not None
        and convolution.weight.dtype == norm.running_var.dtype
        and convolution.weight.dtype in _FINE
    )


@contextmanager
def found_pairs(model: nn.Module) -> Iterator[list[tuple[str, str]]]:
    """Find convolutions and BatchNorm layers that may be one, by a pass inside the context.

    Each is called once, in eval mode, the second with the very output of the first: a gate between
    the two would have put another tensor there. Whether that output is used elsewhere as well
    cannot be seen.

    Args:
        model: The network.

    Yields:
        Names of the pairs; filled at the end.

    Example:
        >>> net = nn.Sequential(nn.Conv1d(1, 1, 1), nn.BatchNorm1d(1), nn.ReLU()).eval()
        >>> with found_pairs(net) as pairs:
        ...     _ = net(torch.ones(2, 1, 5))
        >>> pairs
        [('0', '1')]
    """
    pairs: list[tuple[str, str]] = []
    outputs: dict[nn.Module, Tensor] = {}
    after: dict[nn.Module, nn.Module] = {}
    calls: dict[nn.Module, int] = {}

    def made(module: nn.Module, args: Any, output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        outputs[module] = output

    def used(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls[module] = calls.get(module, 0) + 1
        for convolution in [c for c, made in outputs.items() if args and made is args[0]]:
            after[module] = convolution
            del outputs[convolution]  # nothing is held longer than it has to be

    names = {module: name for name, module in model.named_modules()}
    with owned() as owner, ExitStack() as stack:
        for module in names:
            if type(module) in _CONVOLUTIONS:
                # Before all others: what they put in the output's place is another tensor.
                handle = module.register_forward_hook(owner.only(made), prepend=True)
                stack.callback(handle.remove)
            elif type(module) in _CONVOLUTIONS.values():
                # Afterwards, so that the input is what hooks before the layer have made of it.
                stack.callback(module.register_forward_hook(owner.only(used)).remove)
        yield pairs
    pairs += [
        (names[convolution], names[norm])
        for norm, convolution in after.items()
        if calls[norm] == calls[convolution] == 1 and _can_fold(convolution, norm)
    ]


def fold(model: nn.Module, pairs: Sequence[tuple[str, str]]) -> None:
    """Merge pairs, in place: other weights in the convolution, an Identity after it.

    Args:
        model: A copy of the network that the pairs were found in. Tensors are replaced, not
            changed, so it may share them with the network.
        pairs: Their names.
    """
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
