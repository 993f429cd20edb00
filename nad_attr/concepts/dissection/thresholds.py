"""The activation that a unit exceeds at a given share of positions, from a stream of images.

The threshold T of a unit is the largest activation that at most a share q of all its activations
exceeds: with N activations, the (floor(q N) + 1)-th largest (Bau et al. 2017, section 2.2, where
q = 0.005). N is known before the stream begins, so values below that many others can be forgotten,
and only the upper tail is counted: on average q (1 + ln 1/q) of the activations, 3 % if q = 0.005.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nad_attr.concepts.dissection.overlap import above, divided, where

__all__ = ["ExactTail", "Tail", "TailSketch", "n_above", "not_above"]

#: The tail is cut when the stream has so many times the tail's values, and then each time that it
#: has become so much longer.
_FIRST_CUT, _GROWTH = 4, 1.5
_NEVER = -math.inf


def n_above(quantile: float, n: int) -> int:
    """How many of n activations lie above the threshold.

    Example:
        >>> n_above(0.005, 1000), n_above(0.29, 100)
        (5, 29)
    """
    return math.floor(quantile * n + 1e-9)  # 0.29 * 100 is 28.999...


class Tail(ABC):
    """The upper tail of the activations of C units, of which N each will be seen."""

    def __init__(
        self,
        n_units: int,
        n_values: int,
        quantile: float,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        self.n_units, self.n_values, self.quantile = n_units, n_values, quantile
        self.rank = n_above(quantile, n_values) + 1
        #: The threshold is at least this: what is not above it need not be counted.
        self.cut = torch.full((n_units,), _NEVER, dtype=torch.float64, device=device)
        self.n_seen = 0
        self._next_cut = _FIRST_CUT * self.rank
        self._first = True

    def add(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in the activations of some images, (images, positions, C), always as many positions.

        Returns:
            The highest of each image and unit, (images, C), and which may be of the tail, bool,
            as many as there are values, in a row.

        Raises:
            ValueError: If some are NaN or infinite; names the first such image by its place here.
        """
        n_images, n_positions = values.shape[:2]
        highest = values.amax(1)
        wrong = torch.nonzero(~torch.isfinite(highest).all(1)).flatten()
        if len(wrong):
            raise ValueError(f"activations of image {int(wrong[0])} are NaN or infinite")
        done, over = 0, []
        while done < n_images:
            # The tail is cut at fixed numbers of images, so that batches make no difference.
            n = min(n_images - done, max(1, -(-(self._next_cut - self.n_seen) // n_positions)))
            over.append(self._add(values[done : done + n], highest[done : done + n].amax(0)))
            done += n
        return highest, over[0] if len(over) == 1 else torch.cat(over)

    def _add(self, values: Tensor, highest: Tensor) -> Tensor:
        if self._first:
            self._begin(values)
        # Compared in the activations' own type, rounded down so that nothing above it is lost.
        over = above(values, not_above(self.cut, values.dtype)).view(-1)
        place = where(over)
        if len(place):
            unit = place - divided(place, self.n_units) * self.n_units
            found = values.reshape(-1).index_select(0, place)
            self._take(unit, found.to(torch.float64), highest)
        self.n_seen += values.shape[0] * values.shape[1]
        if self.n_seen >= self._next_cut:
            self.cut = torch.maximum(self.cut, self._lower())
            self._next_cut = math.ceil(self.n_seen * _GROWTH)
            self._first = False
        return over

    @abstractmethod
    def _begin(self, values: Tensor) -> None:
        """Look at the first images' activations, (images, positions, C)."""

    @abstractmethod
    def _take(self, unit: Tensor, values: Tensor, highest: Tensor) -> None:
        """Count values, (n,), of units, (n,); the units' highest ones are (C,)."""

    @abstractmethod
    def _lower(self) -> Tensor:
        """A lower bound of the threshold, float64 (C,)."""

    @abstractmethod
    def thresholds(self) -> Tensor:
        """The thresholds, float64 (C,), once all activations were seen."""

    @abstractmethod
    def errors(self) -> Tensor:
        """How much higher than the exact threshold each may be, float64 (C,)."""

    @property
    @abstractmethod
    def highest(self) -> Tensor:
        """The highest activation of each unit, float64 (C,)."""

    @property
    @abstractmethod
    def n_bytes(self) -> int:
        """Bytes of memory that it holds."""

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, as arrays."""
        return {"cut": self.cut.cpu().numpy(), "n": [self.n_seen, self._next_cut, self._first]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.cut = _tensor(state["cut"], self.cut)
        self.n_seen, self._next_cut, first = (int(value) for value in state["n"])
        self._first = bool(first)


def not_above(exact: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest numbers of a type that are not above some float64 ones."""
    rounded = exact.to(dtype)
    too_high = rounded.to(torch.float64) > exact
    return torch.where(
        too_high, torch.nextafter(rounded, torch.full_like(rounded, _NEVER)), rounded
    )


def _tensor(value: Any, like: Tensor) -> Tensor:
    tensor = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    if tensor.shape != like.shape:
        raise ValueError(f"shape {tuple(tensor.shape)} in place of {tuple(like.shape)}")
    return tensor.clone()


class TailSketch(Tail):
    """A histogram of the tail for each unit, in memory that does not depend on the stream's length.

    Bins are [i w, (i + 1) w) with w a power of two for each unit. If an activation lies beyond the
    last of the ``n_bins``, w is doubled until all fit; neighbours merge exactly, so counts are
    those of a histogram that had the final width from the start.

    **Error bound.** The threshold is the upper end of the bin that holds the exact one, T, or the
    unit's highest activation if that is lower. So T <= T' <= T + w, at most a share ``quantile`` of
    the activations lies above it, as above T, and a unit that is stuck at its highest value (a
    saturated ReLU6, a dead ReLU) is never active with either. Here w < 2 (highest - lowest) /
    (n_bins - 2) over the unit's activations (or 2^-29 of the largest absolute value, if that is
    more); :meth:`errors` gives the final w.

    Example:
        >>> tail = TailSketch(1, 1000, 0.005, n_bins=64)
        >>> for part in torch.arange(1000.0).reshape(10, 1, 100, 1):
        ...     _ = tail.add(part)
        >>> tail.thresholds(), tail.errors()  # exact: 994
        (tensor([999.], dtype=torch.float64), tensor([16.], dtype=torch.float64))
    """

    def __init__(
        self,
        n_units: int,
        n_values: int,
        quantile: float,
        *,
        n_bins: int = 2048,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(n_units, n_values, quantile, device=device)
        self.n_bins = n_bins
        kind = torch.int32 if n_values < 2**31 else torch.int64
        self.counts = torch.zeros(n_units, n_bins, dtype=kind, device=device)
        #: The lowest bin's i, and log2 of w.
        self.base = torch.zeros(n_units, dtype=torch.int64, device=device)
        self.exponent = torch.full((n_units,), -1000, dtype=torch.int64, device=device)
        #: The lowest value of the first images, and the highest of all.
        self.low = torch.full((n_units,), math.inf, dtype=torch.float64, device=device)
        self.high = torch.full((n_units,), -math.inf, dtype=torch.float64, device=device)
        self._reach()

    def _begin(self, values: Tensor) -> None:
        self.low = torch.minimum(self.low, values.amin((0, 1)).double())

    def _take(self, unit: Tensor, values: Tensor, highest: Tensor) -> None:
        self.high = torch.maximum(self.high, highest.double())
        self._fit()
        i = (values * _power(-self.exponent).index_select(0, unit)).floor_().long()
        i -= self.base.index_select(0, unit)
        # Values below those of the first images, which fill the tail.
        if bool((i < 0).any()):
            unit, i = unit[i >= 0], i[i >= 0]
        place = (unit * self.n_bins).add_(i)
        if len(place) < self.counts.numel() // 4:
            ones = torch.ones_like(place, dtype=self.counts.dtype)
            self.counts.view(-1).index_add_(0, place, ones)
        else:
            found = torch.bincount(place, minlength=self.counts.numel())
            self.counts += found.reshape(self.counts.shape).to(self.counts.dtype)

    def _fit(self) -> None:
        """Make the bins of all units reach from ``low`` to ``high``."""
        if not bool((self.low < self._from).any() | (self.high >= self._to).any()):
            return
        scale = _power(-self.exponent)
        first, last = (self.low * scale).floor(), (self.high * scale).floor()
        fits = (first >= self.base) & (last < self.base + self.n_bins)
        units = torch.nonzero(~fits).flatten()
        if not len(units):
            return
        low, high, old = self.low[units], self.high[units], self.exponent[units]
        # Twice the next power of two below is the smallest w with (high - low) / w <= n_bins - 2.
        needed = _log2_up((high - low) / (self.n_bins - 2))
        # An index has to be a whole number that float64 and int64 hold.
        needed = torch.maximum(needed, _log2_up(torch.maximum(low.abs(), high.abs())) - 30)
        new = torch.maximum(old, needed)
        inside = (low * _power(-new)).floor().long()
        shift = (new - old).clamp(max=62)
        base = self.base[units]
        # The range of a unit only grows, so the old bins with counts lie within the new ones.
        start = torch.minimum(inside, base >> shift)
        top = (high * _power(-new)).floor().long()
        start = torch.where(top - start >= self.n_bins, inside, start)
        moved = (new != old) | (start != base)
        rows = torch.nonzero(moved).flatten()
        if len(rows) and self.n_seen:  # before, there is nothing in the bins
            bins = torch.arange(self.n_bins, device=base.device)
            target = ((base[rows, None] + bins) >> shift[rows, None]) - start[rows, None]
            counts = self.counts[units[rows]]
            fresh = torch.zeros_like(counts)
            # Empty bins may fall outside; what they would add is nothing.
            fresh.scatter_add_(1, target.clamp(0, self.n_bins - 1), counts)
            self.counts[units[rows]] = fresh
        self.exponent[units], self.base[units] = new, start
        self._reach()

    def _reach(self) -> None:
        """Where the lowest bins begin, and the highest ones end."""
        width = _power(self.exponent)
        self._from = self.base.double() * width
        self._to = (self.base + self.n_bins).double() * width

    def _bin(self) -> Tensor:
        """The i of the bin that holds the threshold."""
        # In or above bin i are all values but those below it.
        below = self.counts.cumsum(1, dtype=self.counts.dtype)
        spare = below[:, -1:] - self.rank
        i = (below <= spare).sum(1)
        return self.base + i.clamp(max=self.n_bins - 1)

    def _lower(self) -> Tensor:
        return self._bin().double() * _power(self.exponent)

    def thresholds(self) -> Tensor:
        """The thresholds, float64 (C,), once all activations were seen."""
        upper = (self._bin() + 1).double() * _power(self.exponent)
        return torch.minimum(upper, self.high)

    def errors(self) -> Tensor:
        """How much higher than the exact threshold each may be: w, float64 (C,)."""
        return _power(self.exponent)

    @property
    def highest(self) -> Tensor:
        """The highest activation of each unit, float64 (C,)."""
        return self.high

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that it holds."""
        parts = (self.counts, self.base, self.exponent, self.low, self.high, self.cut)
        return sum(part.numel() * part.element_size() for part in parts)

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, as arrays."""
        names = ("counts", "base", "exponent", "low", "high")
        return super().state() | {name: getattr(self, name).cpu().numpy() for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        super().restore(state)
        for name in ("counts", "base", "exponent", "low", "high"):
            setattr(self, name, _tensor(state[name], getattr(self, name)))
        self._reach()


def _power(exponent: Tensor) -> Tensor:
    """2^e exactly, for integers from -1022 to 1023: torch's own powers are float32 or rounded."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _log2_up(values: Tensor) -> Tensor:
    """The smallest integer e with 2^e >= value, int64; for 0, -1000."""
    mantissa, exponent = torch.frexp(values)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).long()
    return torch.where(values > 0, exponent, -1000).clamp(min=-1000)


class ExactTail(Tail):
    """The values of the tail themselves: exact, but memory holds a share ``quantile`` of all.

    Example:
        >>> tail = ExactTail(1, 1000, 0.005)
        >>> for part in torch.arange(1000.0).reshape(10, 1, 100, 1):
        ...     _ = tail.add(part)
        >>> tail.thresholds()
        tensor([994.], dtype=torch.float64)
    """

    def __init__(
        self,
        n_units: int,
        n_values: int,
        quantile: float,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(n_units, n_values, quantile, device=device)
        shape = (n_units, self.rank)
        self.values = torch.full(shape, _NEVER, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._n_waiting = 0

    def _begin(self, values: Tensor) -> None:
        """Do nothing: only values are kept."""

    def _take(self, unit: Tensor, values: Tensor, highest: Tensor) -> None:
        self._waiting.append((unit, values))
        self._n_waiting += len(unit)
        if self._n_waiting > max(self.values.numel(), 2**20):
            self._sort()

    def _sort(self) -> None:
        if not self._waiting:
            return
        unit = torch.cat([u for u, _ in self._waiting])
        values = torch.cat([v for _, v in self._waiting])
        self._waiting, self._n_waiting = [], 0
        order = values.argsort(descending=True)
        order = order[unit[order].argsort(stable=True)]
        unit, values = unit[order], values[order]
        count = torch.bincount(unit, minlength=self.n_units)
        place = torch.arange(len(unit), device=unit.device) - (count.cumsum(0) - count)[unit]
        kept = place < self.rank
        fresh = torch.full_like(self.values, _NEVER)
        fresh[unit[kept], place[kept]] = values[kept]
        self.values = torch.cat([self.values, fresh], 1).topk(self.rank, dim=1).values

    def _lower(self) -> Tensor:
        self._sort()
        return self.values[:, -1].clone()

    def thresholds(self) -> Tensor:
        """The thresholds, float64 (C,), once all activations were seen."""
        return self._lower()

    def errors(self) -> Tensor:
        """Zeros, float64 (C,)."""
        return torch.zeros_like(self.cut)

    @property
    def highest(self) -> Tensor:
        """The highest activation of each unit, float64 (C,)."""
        self._sort()
        return self.values[:, 0]

    @property
    def n_bytes(self) -> int:
        """Bytes of memory that it holds."""
        return 8 * (self.values.numel() + self.cut.numel()) + 16 * self._n_waiting

    def state(self) -> dict[str, Any]:
        """Everything that :meth:`restore` needs, as arrays."""
        self._sort()
        return super().state() | {"values": self.values.cpu().numpy()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        super().restore(state)
        self.values = _tensor(state["values"], self.values)
        self._waiting, self._n_waiting = [], 0
