"""Checks of arguments, and the error of gating, that every room uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["GatingError", "check_count"]


def tensor_of(values: Any) -> Tensor:
    """Return a tensor unchanged, and other numbers as a tensor on the CPU."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


class GatingError(RuntimeError):
    """A gate was not applied: it did not fire, fired twice, or does not fit its site."""


def as_tensor(value: Any, what: str) -> Tensor:
    """A tensor of what was given for one site.

    Raises:
        TypeError: If it is not a tensor and cannot be made one.
    """
    try:
        return tensor_of(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} are not a tensor: {error}.") from None


def check_mapping(values: Any, what: str) -> None:
    """Refuse what is not a ``{site name: ...}``.

    Raises:
        TypeError: If it is something else.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be {{site name: tensor}}, got {type(values).__name__}.")


def check_count(value: Any, what: str, *, least: int = 1) -> int:
    """A whole number from ``least`` on.

    Raises:
        ValueError: Names it.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{what} must be a whole number from {least} on, got {value!r}.")
    return int(value)
