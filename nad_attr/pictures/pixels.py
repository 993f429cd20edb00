"""Inputs of a network as pictures: normalisation undone, three colours, eight bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["ToPixels", "as_pixels"]

#: Undoes a network's preprocessing: (B, C, H, W) to values in [0, 1], or to uint8 in 0 to 255.
ToPixels: TypeAlias = "Callable[[Tensor], Tensor]"


def as_pixels(images: Tensor, to_pixels: ToPixels | None = None) -> Tensor:
    """Turn a network's inputs into pictures.

    Args:
        images: Float (B, C, H, W), as the network takes them.
        to_pixels: Undoes the preprocessing: returns (B, 1 or 3, H, W), values in [0, 1] (what lies
            outside is clipped) or uint8. None: each image is stretched to its own darkest and
            brightest value, which shows everything but not in its true colours.

    Returns:
        uint8 (B, 3, H, W) on the CPU; grey images have three equal channels.

    Raises:
        TypeError: If ``to_pixels`` is not a function or returns no tensor.
        ValueError: If what should be shown is not one or three channels of finite values.

    Example:
        >>> images = torch.tensor([-1.0, 1.0]).reshape(1, 1, 1, 2)
        >>> as_pixels(images)[0, :, 0].tolist()
        [[0, 255], [0, 255], [0, 255]]
        >>> as_pixels(images, lambda x: (x + 3) / 5)[0, 0, 0].tolist()
        [102, 204]
    """
    if images.ndim != 4:
        raise ValueError(f"images have shape {tuple(images.shape)}, not (B, C, H, W).")
    if to_pixels is not None and not callable(to_pixels):
        raise TypeError(f"to_pixels must be a function, got {to_pixels!r:.60}.")
    images = images.detach().cpu()
    if to_pixels is None:
        flat = images.float().flatten(1)
        low, high = flat.amin(1), flat.amax(1)
        spread = (high - low).clamp_min(torch.finfo(torch.float32).tiny)
        shown: object = (images.float() - low[:, None, None, None]) / spread[:, None, None, None]
    else:
        shown = to_pixels(images)
    if not isinstance(shown, Tensor):
        raise TypeError(f"to_pixels returned {type(shown).__name__}, not a tensor.")
    if shown.ndim != 4 or len(shown) != len(images) or shown.shape[1] not in (1, 3):
        raise ValueError(
            f"pictures have shape {tuple(shown.shape)}, not ({len(images)}, 1 or 3, H, W); give a "
            "to_pixels that makes such of the network's inputs."
        )
    if shown.dtype != torch.uint8:
        if not bool(torch.isfinite(shown).all()):
            raise ValueError("pictures hold NaN or infinity.")
        shown = (shown.detach().float().clamp(0, 1) * 255).round().to(torch.uint8)
    return shown.cpu().expand(-1, 3, -1, -1).contiguous()
