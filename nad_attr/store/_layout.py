"""Where a file has gates, logits and means: gates at each site, the others in one array each."""

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
    """``{site name: float32 (C,)}``; None if there are none.

    Raises:
        GateStoreError: If they are not finite, or anything else is wrong with them.
    """
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
    """Gates and logits of the tasks of a file.

    Args:
        reader: The file.
        sites: Its gate sites.
        n_tasks: Its tasks.

    Attributes:
        has_logits: Whether there are logits.
        has_constants: Whether closed channels have constants of each task's own.
    """

    def __init__(self, reader: Reader, sites: Sequence[GateSite], n_tasks: int) -> None:
        self.reader, self._n_tasks = reader, n_tasks
        self._widths = [site.n_channels for site in sites]
        self._root = reader.group(reader.file, "site")
        self.has_logits = reader.has(reader.file, "logit")
        self.has_constants = reader.has(reader.file, "constant")

    def _gate(self, order: int) -> Table:
        shape = (self._n_tasks, self._widths[order])
        return self.reader.table(self._root, f"{order}/gate", shape)

    def _all_sites(self, key: str) -> Table:
        return self.reader.table(self.reader.file, key, (self._n_tasks, sum(self._widths)))

    def gates(self, rows: Sequence[int]) -> list[Floats]:
        """Gates of some tasks at each site, float32 (rows, C)."""
        return [self._gate(order).rows(rows) for order in range(len(self._widths))]

    def logits(self, rows: Sequence[int]) -> list[Floats]:
        """Logits of some tasks at each site, float32 (rows, C)."""
        return self._all_sites("logit").split(rows, self._widths)

    def constants(self, rows: Sequence[int]) -> list[Floats]:
        """Constants of some tasks at each site, float32 (rows, C)."""
        return self._all_sites("constant").split(rows, self._widths)

    def raw_constants(self) -> Iterator[bytes | None]:
        """Constants of all tasks at all sites, as :func:`encoded` leaves them."""
        return raw_rows(self._all_sites("constant"))

    def raw_gates(self, order: int) -> Iterator[bytes | None]:
        """Gates of all tasks at one site, as :func:`encoded` leaves them."""
        return raw_rows(self._gate(order))

    def raw_logits(self) -> Iterator[bytes | None]:
        """Logits of all tasks at all sites, as :func:`encoded` leaves them."""
        return raw_rows(self._all_sites("logit"))


def raw_rows(table: Table, *, sparse: bool = False) -> Iterator[bytes | None]:
    """A table of a file as :func:`encoded` rows; None for what was never written, if sparse."""
    if table.by_task():
        yield from table.raw_rows(sparse=sparse)
    else:
        yield from map(encoded, np.moveaxis(table.whole(), table.axis, 0))
