"""Random numbers from counters: a function of their key, independent of the batch.

A generator gives its numbers in order, so the numbers of an image would depend on the images before
it. Here each number is a hash of its key and its place, for a whole batch and on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nad_attr.system.rng import seed_of

__all__ = ["hashed", "key_of", "mixed", "standard_normal", "unsigned", "words"]

_LOW = 0xFFFFFFFF
_SIGN = 0x80000000


def words(values: Tensor) -> Tensor:
    """The lower 32 bits of whole numbers, as int32, whose products are fast and wrap around."""
    return (((values.long() & _LOW) ^ _SIGN) - _SIGN).int()


def unsigned(bits: Tensor) -> Tensor:
    """32 bits in int32 as a number from 0 on, int64.

    Example:
        >>> unsigned(words(torch.tensor([7, 2**32 - 1])))
        tensor([         7, 4294967295])
    """
    return bits.long() & _LOW


def mixed(x: Tensor) -> Tensor:
    """A hash of 32 bits in int32, the same on every device; x itself is overwritten.

    It is the multiply-xorshift function "lowbias32" (C. Wellons, Hash Function Prospector, 2018),
    whose output bits each depend on all input bits.
    """
    # torch shifts the sign in; the mask removes it.
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def key_of(*parts: object) -> tuple[int, int]:
    """Two numbers of 32 bits: a seed made of anything with a stable ``repr``."""
    seed = seed_of(*parts)
    return seed & _LOW, (seed >> 31) & _LOW


def hashed(counter: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """32 random bits for each counter, under a key of two words; all int32."""
    return mixed(mixed(counter ^ first).add_(second))


def standard_normal(keys: tuple[Tensor, Tensor], n: int) -> Tensor:
    """Standard normal numbers, each row a function of its key (Box and Muller's method).

    ``keys`` are two int32 (B,); the result is float32 (B, n).
    """
    half = (n + 1) // 2
    counter = torch.arange(2 * half, device=keys[0].device, dtype=torch.int32)
    bits = hashed(counter[None], keys[0][:, None], keys[1][:, None])
    # 24 bits fill a float32's mantissa; never 0, whose logarithm is infinite.
    uniform = (bits >> 8).bitwise_and_(0xFFFFFF).add_(1).float().mul_(2.0**-24)
    radius = uniform[:, :half].log().mul_(-2).sqrt_()
    angle = uniform[:, half:].mul_(2 * math.pi)
    torch.mul(radius, angle.cos(), out=uniform[:, :half])
    uniform[:, half:] = angle.sin().mul_(radius)
    return uniform[:, :n]
