"""The places of gates, logits, constants and means in a file."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from nad_attr.sites.site import GateSite
from nad_attr.store._errors import GateStoreError
from nad_attr.store._read import Reader, Table
from nad_attr.store._write import encoded

__all__ = ["Layout", "raw_rows", "read_means"]

Floats = npt.NDArray[np.float32]


def read_means(reader: Reader, sites: Sequence[GateSite]) -> dict[str, Floats] | None:
    """``{site name: float32 (C,)}``; None if there are none. They must be finite."""
    widths = [site.n_channels for site in sites]
    if not reader.has(reader.file, "mean"):
        return None
    flat = reader.array(reader.file, "mean", "f", (sum(widths),)).astype(np.float32)
    if not np.isfinite(flat).all():
        raise GateStoreError(f"{reader.path}: its means are not finite.")
    ends = itertools.accumulate(widths)
    return {
        s.name: flat[end - s.n_channels : end].copy() for s, end in zip(sites, ends, strict=True)
    }


class Layout:
    """Gates of the tasks of a file, at each site, and logits and constants, in one array each.

    Attributes:
        keys: Of ``"logit"`` and ``"constant"``, those that the file has.
    """

    def __init__(self, reader: Reader, sites: Sequence[GateSite], n_tasks: int) -> None:
        self.reader, self._n_tasks = reader, n_tasks
        self._widths = [site.n_channels for site in sites]
        self._root = reader.group(reader.file, "site")
        self.keys = {key for key in ("logit", "constant") if reader.has(reader.file, key)}

    def _gate(self, order: int) -> Table:
        shape = (self._n_tasks, self._widths[order])
        return self.reader.table(self._root, f"{order}/gate", shape)

    def _all_sites(self, key: str) -> Table:
        return self.reader.table(self.reader.file, key, (self._n_tasks, sum(self._widths)))

    def numbers(self, key: str, rows: Sequence[int]) -> list[Floats]:
        """Gates, logits or constants of some tasks at each site, float32 (rows, C)."""
        if key == "gate":
            return [self._gate(order).rows(rows) for order in range(len(self._widths))]
        return self._all_sites(key).split(rows, self._widths)

    def raw(self, key: str, order: int) -> Iterator[bytes | None]:
        """:func:`encoded` gates of all tasks at one site, or logits or constants at all sites."""
        return raw_rows(self._gate(order) if key == "gate" else self._all_sites(key))


def raw_rows(table: Table, *, sparse: bool = False) -> Iterator[bytes | None]:
    """A table of a file as :func:`encoded` rows; None for rows never written, if sparse."""
    if table.by_task():
        yield from table.raw_rows(sparse=sparse)
    else:
        yield from map(encoded, np.moveaxis(table.whole(), table.axis, 0))
