"""Activations of a first pass kept in a temporary file, so that the second needs no network."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Scratch"]

#: Share of the free space of the temporary folder's disk that is never taken.
_SPARED_DISK_SHARE = 0.5
_ALIGNED = 64
#: Arrays that wait for being written at most.
_MAX_WAITING = 4


class Scratch:
    """A temporary file of records, written one after the other and read in the same order.

    It has no name, and is gone when it is closed or the process ends. A thread writes it in the
    background. Records are mapped into memory one at a time, not copied. It takes ``n_bytes`` at
    most, and leaves half of the disk's free space.

    Example:
        >>> with Scratch(2**20) as scratch:
        ...     scratch.put(np.arange(3))
        ...     scratch.put(np.zeros((2, 0)))
        ...     scratch.end()
        ...     [[part.shape for part in record] for record in scratch.records()]
        [[(3,), (2, 0)]]
    """

    def __init__(self, n_bytes: int) -> None:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        self._limit = min(n_bytes, int(free * (1 - _SPARED_DISK_SHARE)))
        # Buffers of the file object would copy megabytes once more.
        self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        self._full = False
        self._writer = ThreadPoolExecutor(1, "scratch")
        self._waiting: deque[Future[None]] = deque()
        self._parts: list[tuple[str, tuple[int, ...]]] = []
        #: (start, kinds and shapes of the parts); the same list for records that are alike.
        self._index: list[tuple[int, list[tuple[str, tuple[int, ...]]]]] = []
        self._start = 0
        self.n_bytes = 0

    @property
    def n_records(self) -> int:
        """Records that are complete."""
        return len(self._index)

    def put(self, part: NDArray[Any], *, kept: bool = False) -> None:
        """Append an array to the present record; nothing more is written once a record is too long.

        ``kept``: the array stays as it is, so it may be read later.
        """
        if self._full:
            return
        if self.n_bytes + part.nbytes + mmap.ALLOCATIONGRANULARITY > self._limit:
            self._full = True
            return
        data = np.ascontiguousarray(part).reshape(-1).view(np.uint8).data
        self._waiting.append(self._writer.submit(self._write, self.n_bytes, data))
        self._wait(_MAX_WAITING if kept else 0)
        self.n_bytes += part.nbytes + -part.nbytes % _ALIGNED
        self._parts.append((part.dtype.str, part.shape))

    def _write(self, place: int, data: Any) -> None:
        try:
            self._file.seek(place)
            view = memoryview(data)
            while len(view):
                view = view[self._file.write(view) :]
        except OSError:  # the disk is full: the network is run again instead
            self._full = True

    def _wait(self, n: int) -> None:
        """Wait until no more than n arrays are still to be written."""
        while len(self._waiting) > n:
            self._waiting.popleft().result()

    def end(self) -> None:
        """End the record: it is complete."""
        self._wait(0)
        if self._full:
            return
        known = self._index[-1][1] if self._index else None
        self._index.append((self._start, known if known == self._parts else self._parts))
        self._parts = []
        self.n_bytes += -self.n_bytes % mmap.ALLOCATIONGRANULARITY
        self._start = self.n_bytes

    def records(self) -> Iterator[list[NDArray[Any]]]:
        """The complete records; each is valid until the next one is asked for."""
        self._writer.shutdown()
        self._file.truncate(max(self._start, 1))
        ends = [start for start, _ in self._index[1:]] + [self._start]
        for (start, parts), end in zip(self._index, ends, strict=True):
            data = mmap.mmap(
                self._file.fileno(), end - start, access=mmap.ACCESS_COPY, offset=start
            )
            found, place = [], 0
            for kind, shape in parts:
                n = int(np.prod(shape))
                part = np.frombuffer(data, kind, n, place) if n else np.zeros(0, kind)
                found.append(part.reshape(shape))
                place += part.nbytes + -part.nbytes % _ALIGNED
            yield found

    def close(self) -> None:
        """Remove the file."""
        self._writer.shutdown()
        self._file.close()

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
