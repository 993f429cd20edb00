"""Write HDF5 files whole: into a new file, which then replaces the target.

Nothing is left without a checksum: the metadata is of format 1.10, strings have fixed length, and
every array is compressed in chunks (deflate ends in an Adler-32).
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch

from nad_attr._version import __version__
from nad_attr.sites.site import GateSite
from nad_attr.store._errors import GateStoreError
from nad_attr.system.files import PART, replacing, what_is

__all__ = [
    "FORMAT_VERSION",
    "UNLOCKED",
    "check_name",
    "check_target",
    "encoded",
    "from_json",
    "put_array",
    "put_attribute",
    "put_columns",
    "put_rows",
    "put_sites",
    "put_strings",
    "sweep",
    "to_json",
    "utf8",
    "write_file",
]

FORMAT_VERSION = 3
#: Faster than the usual 4 and within a percent of its size on logits, which hardly compress. The
#: shuffle filter would save 3 % more and double the time of reading.
LEVEL = 1
_CHUNK = 2**20
#: Longer integers fit into no float and no array.
_MAX_DIGITS = 100
_LONG = re.compile(rf"\d{{{_MAX_DIGITS}}}")
#: Locks of HDF5 fail on many network file systems, and files are replaced, never changed.
UNLOCKED: dict[str, Any] = (
    {"locking": False} if hasattr(h5py.h5p.PropFAID, "set_file_locking") else {}
)


def to_json(value: Any) -> str:
    """JSON, with NumPy's numbers and arrays as Python's; a TypeError for other objects."""

    def plain(item: Any) -> Any:
        if isinstance(item, (np.generic, np.ndarray)):
            return item.tolist()
        raise TypeError(f"JSON cannot hold {type(item).__name__}.")

    text = json.dumps(value, default=plain)
    if _LONG.search(text):
        from_json(text)  # a text that could not be read is not written
    return text


def from_json(text: str | bytes) -> Any:
    """The value of a JSON text; a ValueError for integers that are too long to compute with."""
    return json.loads(text, parse_int=_whole)


def _whole(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits)} digits, more than {_MAX_DIGITS}.")
    return int(digits)


def check_name(name: object, what: str) -> str:
    """A name that is possible in an HDF5 file; a GateStoreError for others."""
    if not isinstance(name, str) or not name or name in (".", "..") or set(name) & {"/", "\0"}:
        raise GateStoreError(f"{what} needs a name without '/', got {name!r}.")
    utf8(name)
    return name


def check_target(path: str | PathLike[str], *, replaced: bool = False) -> Path:
    """Check that a file can be written; return it, or the target of a symbolic link.

    If it is ``replaced``, an existing one must be HDF5 or empty.
    """
    target = Path(os.path.realpath(Path(path)))
    if target.is_dir():
        raise GateStoreError(f"{target} is a folder; name a file, such as {target / 'gates.h5'}.")
    if not target.parent.is_dir():
        raise GateStoreError(f"there is no folder {target.parent} to write {target.name} into.")
    if target.exists() and not target.is_file():
        raise GateStoreError(f"{target} is a device or a pipe; name a file.")
    if target.exists() and not os.access(target, os.W_OK):
        raise GateStoreError(f"{target} is write-protected; write to another file.")
    if replaced and target.exists() and what_is(target) not in ("HDF5", "empty"):
        raise GateStoreError(
            f"{target} is there already and is not an HDF5 file: it is not replaced. Write to "
            "another file."
        )
    return target


def sweep(target: Path) -> None:
    """Remove the incomplete files of killed writers; the caller holds the lock."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.*{PART}*"):
        with contextlib.suppress(OSError):
            path.unlink()


def write_file(
    target: Path,
    kind: str,
    fill: Callable[[h5py.File], None],
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Write a file that appears, or replaces another, in one step and only when complete.

    ``fill`` writes the content; ``ready`` is called before the target is replaced.
    """
    # Format 1.10 has checksums of its metadata; older programs cannot read later formats.
    with (
        replacing(target, ready) as scratch,
        h5py.File(scratch, "w", libver=("v110", "v110"), **UNLOCKED) as file,
    ):
        put_attribute(file, "format", "nad_attr")
        put_attribute(file, "format_version", FORMAT_VERSION)
        put_attribute(file, "kind", kind)
        put_attribute(file, "created_by", f"nad_attr {__version__}, torch {torch.__version__}")
        fill(file)


def utf8(text: str) -> bytes:
    """A text as a file holds it; a GateStoreError if it cannot."""
    if "\0" in text:
        raise GateStoreError(f"a file cannot hold the zero in the text {text!r:.60}.")
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise GateStoreError(f"a file cannot hold the text {text!r:.60}: {error}.") from None


def put_attribute(group: h5py.Group, name: str, value: str | int | float) -> None:
    """A text as UTF-8 of fixed length, a number as int64 or float64."""
    if isinstance(value, str):
        content = utf8(value)
        kind = h5py.string_dtype("utf-8", max(1, len(content)))
        group.attrs.create(name, np.array(content, dtype=kind))
    else:
        group.attrs.create(name, value, dtype="<f8" if isinstance(value, float) else "<i8")


def put_strings(group: h5py.Group, name: str, texts: Sequence[str]) -> None:
    """A list of texts, as UTF-8 of the longest one's length."""
    content = [utf8(text) for text in texts]
    length = max([1, *map(len, content)])
    if length * len(content) > 2**28:
        raise GateStoreError(f"the texts of {name!r} are too long for a file.")
    kind = h5py.string_dtype("utf-8", length)
    _put(group, name, np.array(content, dtype=kind))


def put_array(group: h5py.Group, name: str, array: npt.ArrayLike) -> None:
    """Numbers or truth values of any shape, compressed; a GateStoreError for others."""
    values = np.asarray(array)
    if values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
        raise GateStoreError(f"{name!r} has type {values.dtype}; numbers and texts can be stored.")
    if values.dtype.byteorder == ">":
        values = values.astype(values.dtype.newbyteorder("<"))
    _put(group, name, values)


def _put(group: h5py.Group, name: str, values: npt.NDArray[Any]) -> None:
    if values.size == 0 or values.ndim == 0:
        group.create_dataset(name, data=values, dtype=values.dtype)
        return
    row = values.nbytes // values.shape[0]
    chunks = (min(values.shape[0], max(1, _CHUNK // max(1, row))), *values.shape[1:])
    group.create_dataset(
        name,
        data=values,
        dtype=values.dtype,
        chunks=chunks,
        compression="gzip",
        compression_opts=LEVEL,
    )


def encoded(row: npt.NDArray[np.float32]) -> bytes:
    """A task's row of a float32 table as HDF5's deflate filter stores it."""
    return zlib.compress(np.ascontiguousarray(row, dtype="<f4").data, LEVEL)


def put_rows(
    group: h5py.Group,
    name: str,
    shape: tuple[int, int],
    rows: Iterable[bytes | None],
    *,
    axis: int = 0,
    fill: float | None = None,
) -> None:
    """A float32 table with one chunk per task, from :func:`encoded`; None is left out."""
    if 0 in shape:
        group.create_dataset(name, shape, dtype="<f4")
        return
    chunks = (1, shape[1]) if axis == 0 else (shape[0], 1)
    data = group.create_dataset(
        name,
        shape,
        dtype="<f4",
        chunks=chunks,
        compression="gzip",
        compression_opts=LEVEL,
        fillvalue=fill,
    ).id
    for i, row in enumerate(rows):
        if row is not None:
            data.write_direct_chunk((i, 0) if axis == 0 else (0, i), row)


def put_sites(
    file: h5py.File, sites: Sequence[GateSite], means: Mapping[str, Any] | None
) -> list[h5py.Group]:
    """The groups of gate sites, and the means."""
    groups = []
    for order, site in enumerate(sites):
        group = file.create_group(f"site/{order}")
        put_attribute(group, "name", site.name)
        put_attribute(group, "order", order)
        put_attribute(group, "channel_dim", site.channel_dim)
        put_attribute(group, "at_input", int(site.at_input))
        put_attribute(group, "n_channels", site.n_channels)
        groups.append(group)
    # All of it again in one place, since reading the attributes of many groups takes time.
    index = [[s.name, s.n_channels, s.channel_dim, int(s.at_input), *_units(s)] for s in sites]
    put_attribute(file["site"], "index", json.dumps(index))
    if means is not None:
        put_array(file, "mean", np.concatenate([np.asarray(means[s.name], "<f4") for s in sites]))
        put_columns(file["mean"], sites)
    return groups


def _units(site: GateSite) -> list[Any]:
    """A site's kind of units and groups, unless each channel has a gate."""
    plain = site.units == "channels" and site.groups is None
    return [] if plain else [site.units, None if site.group_of is None else list(site.group_of)]


def put_columns(data: h5py.Dataset, sites: Sequence[GateSite]) -> None:
    """Write the columns of each site in an array of all channels."""
    ends = np.cumsum([site.n_channels for site in sites]).tolist()
    columns = [[s.name, end - s.n_channels, end] for s, end in zip(sites, ends, strict=True)]
    put_attribute(data, "columns", json.dumps(columns))
