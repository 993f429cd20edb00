"""The journal beside a store: the records appended since the HDF5 file was last written.

Each record has its length and checksum, so that the end of the last complete one is known even if
a write was interrupted. The journal is also the lock: the writer holds it as long as it writes, and
removes it when the HDF5 file has everything.

Layout: the line ``nad_attr journal 1``, then for each record little-endian ``REC1``, uint32 length
of the header, uint64 length of the body, uint32 CRC-32 of both; the header, JSON; the body, the
arrays that the header's ``arrays`` lists as ``[name, dtype, shape]``, one after the other.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import socket
import struct
import sys
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._write import from_json, sweep, to_json
from nad_attr.system.safe_files import NotAFileError, most_bytes, open_file

__all__ = [
    "Journal",
    "Record",
    "goes_on",
    "journal_path",
    "left_over",
    "locked",
    "now",
    "read_journal",
    "unpacked",
]

MAGIC = b"nad_attr journal 1\n"
_HEAD = struct.Struct("<4sIQI")
#: Up to this many bytes of a journal the free memory is not checked.
_UNCHECKED_BYTES = 2**26
_TYPES = ("<f4", "<f8", "<f2", "<i8", "<i4", "<i2", "|i1", "<u8", "<u4", "<u2", "|u1", "|b1")


def now() -> str:
    """The time, as ISO 8601 to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def journal_path(path: Path) -> Path:
    """The place of a store's journal."""
    return path.with_name(path.name + ".journal")


@dataclass(frozen=True)
class Record:
    """One step of a store's history: facts and arrays."""

    header: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]] = field(default_factory=dict)

    def packed(self) -> bytes:
        """The bytes of the record in a journal."""
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
    """The complete records of a journal, and where the last one ends."""
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
    values = from_json(bytes(header))
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


def read_journal(path: Path) -> list[Record]:
    """The records of a journal, its first record included; nothing, if there is no journal."""
    try:
        file = open_file(path, follow=False)
    except (FileNotFoundError, PermissionError):
        return []
    with os.fdopen(file, "rb") as opened:
        return unpacked(_content(opened, path))[0]


def _content(file: BinaryIO, path: Path) -> bytes:
    """All bytes of a journal that fits into memory, as long as it is now."""
    size = os.fstat(file.fileno()).st_size
    if size > _UNCHECKED_BYTES and size > most_bytes():
        raise ValueError(
            f"its journal {path} has {size:,} bytes, more than half of the memory that is free."
        )
    return file.read(size)


def goes_on(records: Sequence[Record], store: str, revision: int) -> bool:
    """Whether a journal continues this revision of a store."""
    begin = records[0].header if records else {}
    found = [begin.get(key) for key in ("kind", "store", "revision")]
    return found == ["begin", store, revision]


def left_over(path: Path, records: Sequence[Record]) -> str:
    """Describe a journal whose file is not there."""
    appended = [r.header.get("tasks") for r in records if r.header["kind"] == "append"]
    n = sum(len(tasks) for tasks in appended if isinstance(tasks, list))
    what = f"{n} finished task{'s' * (n != 1)}" if n else f"{len(records) - 1} results or scores"
    return (
        f"{path} holds {what} of another store than the file beside it (a run that was killed, "
        "and whose file was replaced or moved away)"
    )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Lock a file that is written in one step, without a journal."""
    lock = Journal(path)
    try:
        with reading(path):
            lock.clear()
        yield
    finally:
        lock.close(remove=False)  # an empty one is removed


class Journal:
    """The journal of the one writer of the store at a path, locked while this object is open."""

    def __init__(self, path: Path) -> None:
        self.path = journal_path(path)
        self._file = _locked(self.path, path)
        self._end = 0
        sweep(path)
        _ALL.add(self)

    def resume(
        self, store: str, revision: int, has: Callable[[Sequence[Record]], bool]
    ) -> list[Record]:
        """Return the records of a writer that died, without an incomplete last one.

        ``has`` tells whether the file is of the same store and has all that a journal appends.
        """
        records, end = self._read()
        if goes_on(records, store, revision) and len(records) > 1:
            self._end = end
            os.ftruncate(self._file, end)
            return records[1:]
        # A writer that died between replacing the file and emptying the journal lost nothing.
        if has(records):
            records = []
        self._put_aside(records)
        self.begin(store, revision)
        return []

    def clear(self, replaced: str | None = None) -> None:
        """Make room for another file: the journal of a killed run is put aside.

        ``replaced`` is the name of an existing store that is replaced together with its journal.
        """
        records, _ = self._read()
        # A new store empties the journal of the store that it replaces.
        if replaced is None or not records or records[0].header.get("store") != replaced:
            self._put_aside(records)
            os.ftruncate(self._file, 0)

    def _read(self) -> tuple[list[Record], int]:
        os.lseek(self._file, 0, os.SEEK_SET)
        with os.fdopen(os.dup(self._file), "rb") as file:
            return unpacked(_content(file, self.path))

    def _put_aside(self, records: Sequence[Record]) -> None:
        """Keep a journal that belongs to another file, under another name."""
        if len(records) < 2:
            return
        os.lseek(self._file, 0, os.SEEK_SET)
        for number in itertools.count(1):
            kept = self.path.with_name(f"{self.path.name}.{number}")
            try:
                copy = open_file(kept, os.O_WRONLY | os.O_CREAT | os.O_EXCL, follow=False)
            except (FileExistsError, NotAFileError):
                continue
            break
        # Copied, since the lock stays with the original.
        with os.fdopen(copy, "wb") as target, os.fdopen(os.dup(self._file), "rb") as source:
            shutil.copyfileobj(source, target)
            target.flush()
            os.fsync(copy)
        warnings.warn(
            f"{left_over(self.path, records)}. It is put aside as {kept.name}; put the file that "
            f"it goes on from back and name it {self.path.name} again to use it.",
            RuntimeWarning,
            stacklevel=4,
        )

    def begin(self, store: str, revision: int) -> None:
        """Empty the journal, and write which revision it continues."""
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
        """Add a record; when this returns, it is on the disk; after an error, no part of it is."""
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
        """Whether it is open, and not the journal of the process that this one was forked off."""
        return self._file >= 0

    @property
    def n_bytes(self) -> int:
        """Its length."""
        return self._end

    def close(self, *, remove: bool) -> None:
        """Release the lock; an empty journal is removed in any case."""
        if self._file < 0:
            return
        remove = remove or os.fstat(self._file).st_size == 0
        # Removed while it is locked: another process that waits for it then makes a new one.
        if remove and sys.platform != "win32":
            self.path.unlink(missing_ok=True)
        os.close(self._file)
        self._file = -1
        if remove and sys.platform == "win32":
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Leave the lock to the parent, in a process that was forked off."""
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

        # Far behind the content: Windows does not let others read locked bytes.
        os.lseek(file, 2**40, os.SEEK_SET)
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _locked(path: Path, store: Path) -> int:
    while True:
        try:
            file = open_file(path, os.O_RDWR | os.O_CREAT, follow=False)
        except NotAFileError as error:
            raise GateStoreError(f"{store} cannot be written: {error} Remove it.") from None
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
            if os.path.samestat(os.fstat(file), os.lstat(path)):
                _check_ours(file, path)
                return file
        except FileNotFoundError:
            pass  # its last writer removed it a moment ago
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _check_ours(file: int, path: Path) -> None:
    """Refuse to empty a file that no store has written."""
    start = os.read(file, len(MAGIC))
    if not MAGIC.startswith(start):
        raise GateStoreError(
            f"{path} is not a journal of a store, and would be written over. Move it away, or give "
            "the store another name."
        )
    if os.fstat(file).st_nlink > 1:
        raise GateStoreError(
            f"{path} stands under another name as well (a hard link), and both would be changed. "
            "Replace it by a copy of itself."
        )


def _owner(path: Path) -> str:
    try:
        header: Mapping[str, Any] = read_journal(path)[0].header
        return f"process {header['pid']} on {header['host']} (since {header['time']})"
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return "another process"
