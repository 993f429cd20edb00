"""Read untrusted HDF5 files: check sizes, types and links first, and content afterwards.

Three features of libhdf5 are not used, because a small damaged file can make them crash, hang or
allocate without end: metadata of formats before 1.10, which have no checksums; strings of variable
length; and its own decompression, which goes on for as long as the compressed stream does.
"""

from __future__ import annotations

import itertools
import math
import threading
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import h5py
import numpy as np
import numpy.typing as npt
from h5py import h5a, h5d, h5g, h5l, h5t, h5z

from nad_attr.sites.site import GateSite, SiteError
from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._write import FORMAT_VERSION, UNLOCKED, from_json
from nad_attr.system.safe_files import most_bytes

__all__ = ["Reader", "Table", "check_hdf5", "opened"]

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_BYTES = 2**33  # 8 GB: more than any real store, less than a hostile shape
#: The largest factor by which deflate shrinks data.
_MAX_DEFLATE_RATIO = 1032
_SLACK = 4096
#: Up to this many bytes the free memory is not checked.
_UNCHECKED_BYTES = 2**28
#: Inflating in one go is the fastest way, if the stream is too short to fill the memory.
_AT_ONCE = 2**24 // _MAX_DEFLATE_RATIO
#: Tasks whose chunks are counted one by one; for more, the sizes of all chunks are summed.
_MAX_COUNTED_TASKS = 16
_FILTERS = (h5z.FILTER_DEFLATE, h5z.FILTER_SHUFFLE, h5z.FILTER_FLETCHER32)
_REQUIRED = object()


def check_hdf5(path: Path) -> None:
    """Refuse a file that is not HDF5 with checksums of its metadata, without asking HDF5."""
    if not path.is_file():
        raise GateStoreError(f"there is no file {path}.")
    with reading(path), path.open("rb") as file:
        start = file.read(9)
    if start[:8] != SIGNATURE or len(start) < 9:
        raise GateStoreError(f"{path} is not a readable store of gates: it is not an HDF5 file.")
    if start[8] < 2:
        raise GateStoreError(
            f"{path} is not a readable store of gates: it is an HDF5 file, but not one written by "
            "nad_attr, for its metadata have no checksums (superblock of version 0 or 1)."
        )


def hdf5(path: Path) -> h5py.File:
    """Open for reading, without HDF5's lock if that fails: files are replaced, never changed."""
    # No cache of chunks, which takes time to make for each array: chunks are read directly.
    options: dict[str, Any] = {"rdcc_nbytes": 0, "rdcc_nslots": 1}
    try:
        # HDF5 refuses a file that this process has open with other settings.
        return h5py.File(path, "r", **options)
    except OSError as error:
        if "lock" not in str(error):
            raise
        return h5py.File(path, "r", **options, **UNLOCKED)


@contextmanager
def opened(path: Path, *kinds: str) -> Iterator[Reader]:
    """A checked file of one of these kinds, closed afterwards."""
    check_hdf5(path)
    with reading(path), hdf5(path) as file:
        yield Reader(file, path, *kinds)


class _Budget(threading.local):
    """Bytes that one call may still read and allocate; each thread has its own."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.room = self.whole = min(_MAX_BYTES, _MAX_DEFLATE_RATIO * size + _SLACK)
        self.most: int | None = None


class Reader:
    """Checked access to an open file of today's format.

    Attributes:
        file: The file.
        path: Where it is, for messages.
        size: Its bytes.
        kind: What it holds.
    """

    def __init__(self, file: h5py.File, path: Path, *kinds: str) -> None:
        self.file, self.path = file, path
        self.size = int(file.id.get_filesize())
        self._budget = _Budget(self.size)
        if not self._has_attribute(file, "format") or self.text(file, "format") != "nad_attr":
            raise GateStoreError(f"{path} is an HDF5 file, but not one written by nad_attr.")
        version = self.integer(file, "format_version")
        if version > FORMAT_VERSION:
            raise GateStoreError(
                f"{path} has format version {version}; this nad_attr reads up to "
                f"{FORMAT_VERSION}. Install a newer nad_attr."
            )
        if version < FORMAT_VERSION:
            raise GateStoreError(
                f"{path} has format version {version}, which no release wrote; this nad_attr reads "
                f"{FORMAT_VERSION}. Learn the gates again."
            )
        self.kind: str = self.text(file, "kind")
        if self.kind not in kinds:
            wanted = " or ".join(map(repr, kinds))
            raise GateStoreError(f"{path} holds {self.kind!r}, not {wanted}.")

    def begin(self) -> None:
        """Start another operation, with a new budget."""
        _Budget.__init__(self._budget, self.size)

    # -- attributes ----------------------------------------------------------------------------

    def _has_attribute(self, group: h5py.Group, name: str) -> bool:
        return bool(h5a.exists(group.id, name.encode()))

    def _attribute(self, group: h5py.Group, name: str, kind: type[Any], called: str) -> Any:
        try:
            attribute = h5a.open(group.id, name.encode())
        except KeyError:
            self._refuse(group, name, "is missing")
        found = attribute.get_type()
        # h5py would write an array into the room of one value.
        if isinstance(found, h5t.TypeStringID) and found.is_variable_str():
            self._refuse(group, name, "is a text of variable length")
        if not isinstance(found, kind) or attribute.get_storage_size() != found.get_size():
            self._refuse(group, name, f"is not a single {called}")
        if kind is h5t.TypeStringID:
            size = found.get_size()
            if size > self.size:
                self._refuse(group, name, f"claims {size:,} bytes")
            value = np.empty((), f"S{size}")
        else:
            found, value = h5t.NATIVE_INT64, np.empty((), np.int64)
        attribute.read(value, mtype=found)
        return value.item().decode() if kind is h5t.TypeStringID else value.item()

    def _refuse(self, group: h5py.Group, name: str, why: str) -> NoReturn:
        raise GateStoreError(f"{self.path}: attribute {name!r} of {group.name} {why}.")

    def text(self, group: h5py.Group, name: str, default: Any = _REQUIRED) -> Any:
        """A text; ``default`` if it is not there."""
        if default is not _REQUIRED and not self._has_attribute(group, name):
            return default
        return self._attribute(group, name, h5t.TypeStringID, "text")

    def integer(self, group: h5py.Group, name: str) -> int:
        """A whole number."""
        return int(self._attribute(group, name, h5t.TypeIntegerID, "whole number"))

    def json(self, group: h5py.Group, name: str, kind: type[Any], default: Any = _REQUIRED) -> Any:
        """The value of a text of JSON."""
        text = self.text(group, name, None if default is not _REQUIRED else _REQUIRED)
        if text is None:
            return default
        value = from_json(text)
        if not isinstance(value, kind):
            raise GateStoreError(
                f"{self.path}: attribute {name!r} of {group.name} is not of type {kind.__name__}."
            )
        return value

    # -- members -------------------------------------------------------------------------------

    def is_hard(self, group: h5py.Group, name: str) -> bool:
        """Whether a member and the groups above it are no links."""
        links, path = group.id.links, name.encode()
        end = path.find(b"/")
        try:
            # From above, since a path below a link is looked up where the link leads.
            while end >= 0:
                if links.get_info(path[:end]).type != h5l.TYPE_HARD:
                    return False
                end = path.find(b"/", end + 1)
            return bool(links.get_info(path).type == h5l.TYPE_HARD)
        except (KeyError, RuntimeError):
            return False

    def has(self, group: h5py.Group, name: str) -> bool:
        """Whether there is a member of that name, of any kind."""
        return bool(group.id.links.exists(name.encode()))

    def is_result(self, group: h5py.Group) -> bool:
        """Whether a group has the mark of a result."""
        return self._has_attribute(group, "kind") and self.text(group, "kind") == "result"

    def is_group(self, group: h5py.Group, name: str) -> bool:
        """Whether a member is a group and no link."""
        return self.is_hard(group, name) and isinstance(group[name], h5py.Group)

    def is_text(self, group: h5py.Group, name: str) -> bool:
        """Whether a member is a list of texts of fixed length."""
        return bool(self._open(group, name).dtype.kind == "S")

    def group(self, group: h5py.Group, name: str) -> h5py.Group:
        """A group inside this one; links are refused."""
        if not self.is_hard(group, name):
            raise GateStoreError(f"{self.path}: {_path(group, name)} is missing or a link.")
        try:
            # Three times as fast as group[name], which looks up the kind of the member.
            return h5py.Group(h5g.open(group.id, name.encode()))
        except (KeyError, ValueError):
            raise GateStoreError(f"{self.path}: {_path(group, name)} is not a Group.") from None

    def names(self, group: h5py.Group) -> list[str]:
        """A float32 table from which single tasks can be read; they are along ``axis``."""
        n = group.id.get_num_objs()
        if n > max(100, self.size // 8):
            raise GateStoreError(f"{self.path}: {group.name} claims {n:,} members.")
        return list(group)

    # -- arrays --------------------------------------------------------------------------------

    def array(
        self,
        group: h5py.Group,
        name: str,
        kinds: str = "biuf",
        shape: tuple[int | None, ...] | None = None,
    ) -> npt.NDArray[Any]:
        """A whole array of these kinds of numbers and this shape (None: any)."""
        return self._table(group, name, kinds, shape).whole()

    def strings(self, group: h5py.Group, name: str, n: int | None = None) -> list[str]:
        """A list of texts."""
        return [text.decode() for text in self.raw_strings(group, name, n)]

    def raw_strings(self, group: h5py.Group, name: str, n: int | None = None) -> list[bytes]:
        """A list of texts as they are in the file, UTF-8."""
        table = self._table(group, name, "S", None)
        if len(table.shape) != 1:
            raise GateStoreError(f"{self.path}: {table.name} is not a list of strings.")
        if n is not None and table.shape != (n,):
            raise GateStoreError(f"{self.path}: {table.name} has {table.shape[0]} texts for {n}.")
        texts: list[bytes] = table.whole().tolist()
        return texts

    def table(
        self, group: h5py.Group, name: str, shape: tuple[int | None, int | None], axis: int = 0
    ) -> Table:
        """A float32 table of which single tasks can be read; they lie along ``axis``."""
        table = self._table(group, name, "f", shape)
        if table.dtype.itemsize != 4:
            raise GateStoreError(f"{self.path}: {table.name} has type {table.dtype}, not float32.")
        table.axis = axis
        return table

    def _table(
        self, group: h5py.Group, name: str, kinds: str, shape: tuple[int | None, ...] | None
    ) -> Table:
        table = Table(self, self._open(group, name), group, name)
        if table.dtype.kind not in kinds:
            raise GateStoreError(f"{self.path}: {table.name} has type {table.dtype}.")
        if shape is not None and (
            len(shape) != len(table.shape)
            or any(w not in (None, n) for w, n in zip(shape, table.shape, strict=True))
        ):
            raise GateStoreError(
                f"{self.path}: {table.name} has shape {table.shape}, expected {shape}."
            )
        return table

    def _open(self, group: h5py.Group, name: str) -> Any:
        if not self.is_hard(group, name):
            raise GateStoreError(f"{self.path}: {_path(group, name)} is missing or a link.")
        try:
            return h5d.open(group.id, name.encode())
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise GateStoreError(
                f"{self.path}: {_path(group, name)} is not a readable Dataset: {error}"
            ) from None

    def charge(self, stored: int, claimed: int, table: Table) -> None:
        """Count the bytes that an operation reads: a small file must not become a large array."""
        if claimed > min(_MAX_BYTES, _MAX_DEFLATE_RATIO * stored + _SLACK):
            raise GateStoreError(
                f"{self.path}: {table.name} claims {claimed:,} bytes but holds {stored:,}."
            )
        self._budget.left -= stored
        if self._budget.left < 0:
            raise GateStoreError(
                f"{self.path}: {table.name} claims bytes that stand in several places or nowhere."
            )
        self.reserve(claimed, table)

    def reserve(self, claimed: int, what: str | Table) -> None:
        """Count the bytes that an operation allocates."""
        budget = self._budget
        budget.room -= claimed
        taken = budget.whole - budget.room
        if budget.room >= 0 and taken <= _UNCHECKED_BYTES:
            return
        name = what if isinstance(what, str) else what.name
        if budget.room < 0:
            raise GateStoreError(
                f"{self.path}: {name} claims more bytes than a file of {self.size:,} can hold."
            )
        if budget.most is None:
            budget.most = most_bytes()
        if taken > budget.most:
            raise GateStoreError(
                f"{self.path}: with {name}, {taken:,} bytes would be read at once, over half of "
                "the memory that is free. Read fewer tasks at a time."
            )

    # -- what every kind of file has -----------------------------------------------------------

    def sites(self) -> list[GateSite]:
        """The gate sites in forward order."""
        root = self.group(self.file, "site")
        n = root.id.get_num_objs()
        if not 0 < n <= max(100, self.size // 8):
            raise GateStoreError(f"{self.path}: {n} gate sites.")
        index = self.json(root, "index", list, None)
        if index is not None and len(index) != n:
            raise GateStoreError(f"{self.path}: /site lists {len(index)} gate sites of {n}.")
        sites = []
        for order in range(n):
            if index is None:
                group = self.group(root, str(order))
                facts = (
                    self.text(group, "name"),
                    self.integer(group, "n_channels"),
                    self.integer(group, "channel_dim"),
                    self.integer(group, "at_input"),
                )
            else:
                listed = index[order] if type(index[order]) is list else []
                facts, units = tuple(listed[:4]), listed[4:]
                if [type(fact) for fact in facts] != [str, int, int, int] or not (
                    not units or (len(units) == 2 and type(units[0]) is str)
                ):
                    raise GateStoreError(f"{self.path}: /site lists a gate site as {facts}.")
            name, n_channels, channel_dim, at_input = facts
            kind, groups = units if index is not None and units else ("channels", None)
            if groups is not None and type(groups) is not list:
                raise GateStoreError(f"{self.path}: the groups of site {name!r} are not a list.")
            try:
                site = GateSite(name, n_channels, channel_dim, bool(at_input), groups, kind)
            except SiteError as error:
                raise GateStoreError(f"{self.path}: {error}") from None
            sites.append(site)
        return sites


def _path(group: h5py.Group, name: str) -> str:
    return f"{group.name.rstrip('/')}/{name}"


class Table:
    """An array in a file; everything but its content is checked."""

    def __init__(self, reader: Reader, data: Any, group: h5py.Group, name: str) -> None:
        self.reader, self.data = reader, data
        self._group, self._name = group, name
        self.axis = 0
        self._room = bytearray()
        # The type first: h5py may not know it.
        self.dtype: np.dtype[Any] = data.dtype
        self.shape: tuple[int, ...] = data.shape
        plist = data.get_create_plist()
        layout = plist.get_layout()
        if layout == h5d.VIRTUAL or plist.get_external_count():
            self._refuse("has its content outside: it is virtual or has external storage")
        if self.shape is None:
            self._refuse("has no shape")
        self.chunks: tuple[int, ...] | None = None
        self.filters: tuple[int, ...] = ()
        if layout == h5d.CHUNKED:
            chunks = tuple(plist.get_chunk())
            self.chunks = chunks
            self.filters = tuple([plist.get_filter(i)[0] for i in range(plist.get_nfilters())])
            unknown = [which for which in self.filters if which not in _FILTERS]
            if unknown:
                self._refuse(f"has filters {sorted(unknown)}, which this program does not know")
            if chunks != self.shape and any(
                c > max(1, s) for c, s in zip(chunks, self.shape, strict=True)
            ):
                self._refuse(f"claims chunks {chunks} in shape {self.shape}")
        self.standard = self.filters == (h5z.FILTER_DEFLATE,)

    @property
    def name(self) -> str:
        """Its place in the file."""
        return _path(self._group, self._name)  # HDF5's own answer takes longer

    def _refuse(self, why: str) -> NoReturn:
        raise GateStoreError(f"{self.reader.path}: {self.name} {why}.")

    def by_task(self) -> bool:
        """Whether there is one chunk for each task, with this program's filter."""
        across = 1 - self.axis
        return (
            self.standard
            and self.chunks is not None
            and self.chunks[self.axis] == 1
            and self.chunks[across] == self.shape[across]
        )

    def raw_rows(self, *, sparse: bool = False) -> Iterator[bytes | None]:
        """The stored chunks of all tasks, if :meth:`by_task`; None for missing ones."""
        for i in range(self.shape[self.axis]):
            raw = self._raw(i, sparse=sparse)
            yield None if raw is None else bytes(raw)

    def _raw(self, i: int, *, sparse: bool = False) -> memoryview | None:
        """The chunk of a task, until the next one is read; None: it was never written."""
        offset = (i, 0) if self.axis == 0 else (0, i)
        if not self._room:
            # Deflate makes nothing longer than this: h5py refuses a longer chunk before reading.
            n_bytes = 4 * self.shape[1 - self.axis]
            self._room = bytearray(min(self.reader.size, n_bytes + n_bytes // 500 + 64))
        try:
            mask, content = self.data.read_direct_chunk(offset, out=self._room)
        except ValueError as error:
            self._refuse(f"claims too large a chunk: {error}")
        except (RuntimeError, OSError):
            # Asking first whether it exists would search the list of all chunks.
            if self.data.get_chunk_info_by_coord(offset).byte_offset is not None:
                raise
            if not sparse:
                self._refuse(f"has no content for task number {i}")
            return None
        if mask:
            self._refuse("has chunks without compression")
        return memoryview(content)

    def _contents(self, rows: Sequence[int], *, sparse: bool = False) -> Iterator[bytes | None]:
        n_bytes = 4 * self.shape[1 - self.axis]
        at_once = len(rows) > _MAX_COUNTED_TASKS and not sparse
        if at_once:
            self.reader.charge(self.data.get_storage_size(), len(rows) * n_bytes, self)
        for i in rows:
            raw = self._raw(i, sparse=sparse)
            if raw is None:
                self.reader.reserve(n_bytes, self)
                yield None
                continue
            if not at_once:
                self.reader.charge(len(raw), n_bytes, self)
            yield self._inflated(raw, n_bytes)

    def rows(self, rows: Sequence[int], *, sparse: bool = False) -> npt.NDArray[np.float32]:
        """The numbers of some tasks, float32 (rows, other axis).

        ``sparse``: NaN for tasks that were never written, which are refused otherwise.
        """
        if not self.by_task():
            # Another program has rewritten it: only the whole can be read.
            values = self.whole()
            return np.ascontiguousarray(np.take(values, rows, self.axis).swapaxes(0, self.axis))
        return self.split(rows, [self.shape[1 - self.axis]], sparse=sparse)[0]

    def split(
        self, rows: Sequence[int], widths: Sequence[int], *, sparse: bool = False
    ) -> list[npt.NDArray[np.float32]]:
        """:meth:`rows`, cut into arrays of so many columns, each with memory of its own."""
        ends = list(itertools.accumulate(widths))
        if not self.by_task():
            return [part.copy() for part in np.split(self.rows(rows), ends[:-1], axis=1)]
        parts = [np.empty((0, width), np.float32) for width in widths]
        for i, content in enumerate(self._contents(rows, sparse=sparse)):
            if not i:  # the first of them has proved this width
                parts = [np.empty((len(rows), width), np.float32) for width in widths]
            row = None if content is None else np.frombuffer(content, self.dtype)
            for part, end, width in zip(parts, ends, widths, strict=True):
                part[i] = np.nan if row is None else row[end - width : end]
        return parts

    def whole(self) -> npt.NDArray[Any]:
        """The whole array."""
        n_bytes = math.prod(self.shape) * self.dtype.itemsize
        self.reader.charge(self.data.get_storage_size(), n_bytes, self)
        if self.chunks is None:
            values = np.zeros(self.shape, self.dtype)
            if values.size:
                self.data.read(h5py.h5s.ALL, h5py.h5s.ALL, values, h5t.py_create(self.dtype))
            return values
        grid = [-(-s // c) for s, c in zip(self.shape, self.chunks, strict=True)]
        n_chunks = math.prod(grid)
        if n_chunks != self.data.get_num_chunks():
            self._refuse(f"claims {n_chunks:,} chunks but holds {self.data.get_num_chunks():,}")
        if n_chunks == 1 and self.chunks == self.shape:
            return self._chunk((0,) * len(self.shape)).copy()
        values = np.empty(self.shape, self.dtype)
        for index in np.ndindex(*grid):
            offset = tuple(i * c for i, c in zip(index, self.chunks, strict=True))
            where = tuple(slice(o, o + c) for o, c in zip(offset, self.chunks, strict=True))
            part = self._chunk(offset)
            values[where] = part[tuple(slice(0, n) for n in values[where].shape)]
        return values

    def _chunk(self, offset: tuple[int, ...]) -> npt.NDArray[Any]:
        assert self.chunks is not None
        size = self.dtype.itemsize
        n_bytes = math.prod(self.chunks) * size
        mask, content = self.data.read_direct_chunk(offset)
        for position in reversed(range(len(self.filters))):
            if mask >> position & 1:
                continue
            which = self.filters[position]
            if which == h5z.FILTER_FLETCHER32:
                content = content[:-4]
            elif which == h5z.FILTER_DEFLATE:
                extra = 4 * self.filters[:position].count(h5z.FILTER_FLETCHER32)
                content = self._inflated(content, n_bytes + extra)
            elif len(content) == n_bytes and size > 1:
                content = np.frombuffer(content, np.uint8).reshape(size, -1).T.tobytes()
        if len(content) != n_bytes:
            self._refuse(f"has a chunk of {len(content):,} bytes in place of {n_bytes:,}")
        return np.frombuffer(content, self.dtype).reshape(self.chunks)

    def _inflated(self, content: bytes | memoryview, n_bytes: int) -> bytes:
        if len(content) <= _AT_ONCE:
            found = zlib.decompress(content, zlib.MAX_WBITS, n_bytes)
        else:
            stream = zlib.decompressobj()
            found = stream.decompress(content, n_bytes + 1)
            if not stream.eof:
                self._refuse("has a chunk that goes on after its end")
        if len(found) != n_bytes:
            self._refuse(f"has a chunk of {len(found):,} bytes in place of {n_bytes:,}")
        return found
