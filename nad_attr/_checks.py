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
    """The values of one site as a tensor; a TypeError if that is not possible."""
    try:
        return tensor_of(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{what} are not a tensor: {error}.") from None


def check_mapping(values: Any, what: str) -> None:
    """Refuse values that are not a mapping from site names."""
    if not isinstance(values, Mapping):
        raise TypeError(f"{what} must be {{site name: tensor}}, got {type(values).__name__}.")


def check_count(value: Any, what: str, *, least: int = 1) -> int:
    """Check that a value is a whole number from ``least`` on, and return it as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{what} must be a whole number from {least} on, got {value!r}.")
    return int(value)
