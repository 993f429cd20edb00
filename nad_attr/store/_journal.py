"""The journal beside a store: what was appended since the HDF5 file was last written.

A journal is a sequence of records, each with its length and checksum, so that the end of the last
complete one is known whatever happened during a write. It is also the lock: the one writer holds
it as long as it writes, and removes it when the HDF5 file holds everything.

Layout: the line ``nad_attr journal 1``, then for each record little-endian ``REC1``, uint32 length
of the header, uint64 length of the body, uint32 CRC-32 of both; the header, JSON; the body, the
arrays that the header's ``arrays`` lists as ``[name, dtype, shape]``, one after the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import struct
import sys
import warnings
import weakref
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from nad_attr.store._errors import GateStoreError
from nad_attr.store._write import sweep, to_json

__all__ = ["Journal", "Record", "journal_path", "now", "read_journal", "unpacked"]

MAGIC = b"nad_attr journal 1\n"
_HEAD = struct.Struct("<4sIQI")
_TYPES = ("<f4", "<f8", "<f2", "<i8", "<i4", "<i2", "|i1", "<u8", "<u4", "<u2", "|u1", "|b1")


def now() -> str:
    """The time, as ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def journal_path(path: Path) -> Path:
    """Where the journal of a store is."""
    return path.with_name(path.name + ".journal")


@dataclass(frozen=True)
class Record:
    """One step of a store's history: what happened, and numbers."""

    header: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def packed(self) -> bytes:
        """As it stands in a journal."""
        arrays, listed = [], []
        for name, array in self.arrays.items():
            value = np.asarray(array, order="C")
            value = value.astype(value.dtype.newbyteorder("<"), copy=False)
            if value.dtype.str not in _TYPES:
                raise GateStoreError(f"{name!r} has type {value.dtype}, which is not stored.")
            arrays.append(value.tobytes())
            listed.append([name, value.dtype.str, list(value.shape)])
        header = to_json({**self.header, "arrays": listed}).encode()
        body = b"".join(arrays)
        check = zlib.crc32(body, zlib.crc32(header))
        return _HEAD.pack(b"REC1", len(header), len(body), check) + header + body


def unpacked(content: bytes | memoryview) -> tuple[list[Record], int]:
    """The complete records of a journal, and where the last one ends.

    Raises:
        ValueError: If a complete record holds what none can.
    """
    view = memoryview(content)
    if bytes(view[: len(MAGIC)]) != MAGIC:
        return [], 0
    records, end = [], len(MAGIC)
    while end + _HEAD.size <= len(view):
        mark, n_header, n_body, check = _HEAD.unpack_from(view, end)
        start = end + _HEAD.size
        stop = start + n_header + n_body
        if mark != b"REC1" or stop > len(view) or zlib.crc32(view[start:stop]) != check:
            break
        records.append(_record(view[start : start + n_header], view[start + n_header : stop]))
        end = stop
    return records, end


def _record(header: memoryview, body: memoryview) -> Record:
    values = json.loads(bytes(header))
    arrays, start = {}, 0
    for name, kind, shape in values.pop("arrays"):
        if kind not in _TYPES or not all(isinstance(n, int) and n >= 0 for n in shape):
            raise ValueError(f"the journal holds an array of type {kind!r:.20}.")
        stop = start + math.prod(shape) * np.dtype(kind).itemsize
        if stop > len(body):
            raise ValueError("the journal claims more numbers than it holds.")
        arrays[str(name)] = np.frombuffer(body[start:stop], kind).reshape(shape)
        start = stop
    if not isinstance(values.get("kind"), str):
        raise ValueError("the journal holds a record of no kind.")
    return Record(values, arrays)


def read_journal(path: Path, store: str, revision: int) -> list[Record]:
    """What was appended to this revision of a store; nothing, if the journal is of another."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, PermissionError):
        return []
    records, _ = unpacked(content)
    return _of(records, store, revision)


def _of(records: list[Record], store: str, revision: int) -> list[Record]:
    if not records:
        return []
    begin = records[0].header
    if (begin.get("kind"), begin.get("store"), begin.get("revision")) != ("begin", store, revision):
        return []
    return records[1:]


class Journal:
    """The journal of the one writer of a store, locked while this object is open.

    Args:
        path: The store's path.

    Raises:
        GateStoreError: If another process, or another object of this one, writes the store.
    """

    def __init__(self, path: Path) -> None:
        self.path = journal_path(path)
        self._file = _locked(self.path, path)
        self._end = 0
        sweep(path)
        _ALL.add(self)

    def resume(self, store: str, revision: int) -> list[Record]:
        """What a writer that died had appended; what it had not finished is cut off."""
        os.lseek(self._file, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._file), "rb") as file:
            content = file.read()
        records, end = unpacked(content)
        found = _of(records, store, revision)
        if found:
            self._end = end
            os.ftruncate(self._file, end)
        else:
            self.begin(store, revision)
        return found

    def begin(self, store: str, revision: int) -> None:
        """Empty it, and start with what revision it goes on from."""
        os.ftruncate(self._file, 0)
        self._end = 0
        header = {
            "kind": "begin",
            "store": store,
            "revision": revision,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "time": now(),
        }
        self._write(MAGIC + Record(header).packed())

    def append(self, record: Record) -> None:
        """Add a record; when this returns, it is on the disk.

        Raises:
            OSError: If it cannot be written; then nothing of it is left.
        """
        self._write(record.packed())

    def _write(self, content: bytes) -> None:
        if self._file < 0:
            raise GateStoreError(f"{self.path} is closed, or belongs to the process before fork.")
        try:
            os.lseek(self._file, self._end, os.SEEK_SET)
            view = memoryview(content)
            while view:
                view = view[os.write(self._file, view) :]
            os.fsync(self._file)
        except BaseException:
            # Also Ctrl-C: half a record would hide everything that is appended after it.
            os.ftruncate(self._file, self._end)
            raise
        self._end += len(content)

    @property
    def mine(self) -> bool:
        """Whether it is open, and not the one of the process that this one was forked off."""
        return self._file >= 0

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self._end

    def close(self, *, remove: bool) -> None:
        """Give the lock back; a journal of nothing is removed in any case."""
        if self._file < 0:
            return
        remove = remove or os.fstat(self._file).st_size == 0
        # Removed while it is locked: whoever waits for it sees that it is gone, and makes another.
        if remove and sys.platform != "win32":
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        if remove and sys.platform == "win32":
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def forget(self) -> None:
        """In a process that was forked off: the lock is its parent's."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


_ALL: weakref.WeakSet[Journal] = weakref.WeakSet()


def _forget_all() -> None:
    for journal in list(_ALL):
        journal.forget()


if hasattr(os, "register_at_fork"):
    # A worker that outlives a killed writer would keep the lock.
    os.register_at_fork(after_in_child=_forget_all)


def _lock(file: int) -> None:
    if sys.platform == "win32":
        import msvcrt

        # Far behind the content: locked bytes cannot be read there.
        os.lseek(file, 2**40, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(path: Path, store: Path) -> int:
    while True:
        flags = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        file = os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        try:
            try:
                _lock(file)
            except (BlockingIOError, PermissionError):
                raise GateStoreError(
                    f"{store} is being written by {_owner(path)}: two writers would undo each "
                    "other's work. Wait for it, stop it, or write to another file and merge."
                ) from None
            except OSError as error:
                warnings.warn(
                    f"the file system of {store} has no locks ({error}): make sure that nothing "
                    "else writes to it.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass  # its last writer removed it a moment ago
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _owner(path: Path) -> str:
    try:
        records, _ = unpacked(path.read_bytes())
        header: Mapping[str, Any] = records[0].header
        return f"process {header['pid']} on {header['host']} (since {header['time']})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another process"
