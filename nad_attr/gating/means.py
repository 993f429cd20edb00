"""Mean and deviation of each channel over data, which can replace a closed channel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.gating.hooks import channel_shape, check_eval, installed
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.site import GateSite

__all__ = ["channel_means", "channel_moments"]


def channel_means(
    model: nn.Module,
    sites: Sequence[GateSite],
    batches: Iterable[tuple[Tensor, ...]],
    *,
    forward: Callable[..., Any] | None = None,
) -> dict[str, Tensor]:
    """Mean of each channel over all images and positions, in one pass over the data.

    Every position of every image counts the same. Sums are kept in float64, so that the result
    hardly depends on the batches.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Gate sites of that network.
        batches: The inputs of each forward pass, as a tuple of tensors, on the network's device.
        forward: Runs one batch, ``forward(*inputs)``; None: the network itself.

    Returns:
        ``{site name: float64 (C,)}`` on the CPU, in the order of ``sites``.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If a batch is not a tuple of tensors.
        ValueError: If the network is in train mode, there is no batch, or a mean is not finite.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> channel_means(net, [GateSite("0", 2, 1)], [(images,)])
        {'0': tensor([ 2., 20.], dtype=torch.float64)}
    """
    return channel_moments(model, sites, batches, forward=forward)[0]


def channel_moments(
    model: nn.Module,
    sites: Sequence[GateSite],
    batches: Iterable[tuple[Tensor, ...]],
    *,
    forward: Callable[..., Any] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and standard deviation of each channel over all images and positions, in one pass.

    Arguments and errors are those of :func:`channel_means`.

    Returns:
        Twice ``{site name: float64 (C,)}`` on the CPU.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 10.0], [3.0, 30.0]])
        >>> channel_moments(net, [GateSite("0", 2, 1)], [(images,)])[1]
        {'0': tensor([ 1., 10.], dtype=torch.float64)}
    """
    check_eval(model)
    run = model if forward is None else forward
    sums = {
        site.name: torch.zeros(site.n_channels, dtype=torch.float64, device="cpu") for site in sites
    }
    squares = {name: torch.zeros_like(total) for name, total in sums.items()}
    counts = dict.fromkeys(sums, 0)

    def add(site: GateSite, tensor: Tensor) -> None:
        dim, ndim = channel_shape(site, tensor)
        values = tensor.detach()
        if values.device.type == "mps":  # has no float64
            values = values.cpu()
        over = [axis for axis in range(ndim) if axis != dim]
        sums[site.name] += values.sum(dim=over, dtype=torch.float64).cpu()
        norms = torch.linalg.vector_norm(values, dim=over, dtype=torch.float64)
        squares[site.name] += norms.square().cpu()
        counts[site.name] += values.numel() // site.n_channels

    n_batches = 0
    # Batches are drawn outside the hooks: drawing may run the network for another purpose.
    for batch in batches:
        if not isinstance(batch, (tuple, list)) or not all(isinstance(x, Tensor) for x in batch):
            raise TypeError(
                f"a batch must be a tuple of input tensors, got {type(batch).__name__}; "
                "write (images,) for a network with one input."
            )
        with torch.no_grad(), unchanged(model), installed(model, sites, add):
            run(*batch)
        n_batches += 1
    if n_batches == 0 or not all(counts.values()):
        raise ValueError("there are no images to take channel means over.")
    means = {name: total / counts[name] for name, total in sums.items()}
    for name, mean in means.items():
        if not bool(torch.isfinite(mean).all()):
            raise ValueError(
                f"the mean of gate site {name!r} is not finite; look for NaN or infinity in the "
                "images, or for an overflow in half precision."
            )
    deviations = {
        name: (total / counts[name] - means[name].square()).clamp(min=0).sqrt()
        for name, total in squares.items()
    }
    return means, deviations
