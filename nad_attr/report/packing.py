"""Pack numbers and texts into a page's script, small and safely escaped."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = ["MAX_GATES_OF_EIGHT_BITS", "gate_levels", "plain", "script_json", "text64"]

#: Gates of a page beyond which they get four bits each, not eight.
MAX_GATES_OF_EIGHT_BITS = 4_000_000


def text64(array: NDArray[Any]) -> str:
    """The bytes of an array, little-endian, as base64.

    Example:
        >>> text64(np.array([1, 256], np.uint16))
        'AQAAAQ=='
    """
    array = np.ascontiguousarray(array)
    return base64.b64encode(array.astype(array.dtype.newbyteorder("<")).tobytes()).decode("ascii")


def gate_levels(gates: ArrayLike, bits: int = 8) -> NDArray[np.uint8]:
    """Gates in few bits, such that the upper half of the levels is exactly the kept channels.

    Level q of n = 2^(bits - 1) levels in each half stands for ``q / (n - 1) / 2`` if it is below n,
    else for ``1/2 + (q - n) / (n - 1) / 2``: rounding never moves a channel over the threshold of
    one half. With 4 bits, two neighbours of the last axis share a byte, the first in its upper
    half.

    Raises:
        ValueError: If ``bits`` is neither 4 nor 8.

    Example:
        >>> gate_levels([0.0, 0.5, 0.5001, 1.0]).tolist()
        [0, 127, 128, 255]
        >>> gate_levels([0.0, 0.5, 0.5001, 1.0, 1.0], bits=4).tolist()
        [7, 143, 240]
    """
    if bits not in (4, 8):
        raise ValueError(f"bits must be 4 or 8, got {bits!r}.")
    values = np.asarray(gates, dtype=np.float64)
    n = 2 ** (bits - 1)
    kept = values > 0.5
    level = np.rint((values - np.where(kept, 0.5, 0.0)) * 2 * (n - 1)).clip(0, n - 1)
    levels: NDArray[np.uint8] = (level + np.where(kept, n, 0)).astype(np.uint8)
    if bits == 8:
        return levels
    if levels.shape[-1] % 2:
        levels = np.concatenate([levels, np.zeros_like(levels[..., :1])], axis=-1)
    return np.asarray(levels[..., ::2] << 4 | levels[..., 1::2])


def plain(value: Any, digits: int = 4) -> Any:
    """Lists, texts and numbers with few digits; None where a number is not finite.

    Example:
        >>> plain({"a": np.array([0.123456, np.nan]), 3: (True, np.int64(2))})
        {'a': [0.1235, None], '3': [True, 2]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist(), digits)
    if isinstance(value, (list, tuple)):
        return [plain(item, digits) for item in value]
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    return str(value)


def script_json(value: Any) -> str:
    r"""JSON that is safe inside a ``<script>`` element, for any texts.

    Example:
        >>> print(script_json(["</script>"]))
        ["\u003c/script\u003e"]
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for letter in "<>&":
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return text
