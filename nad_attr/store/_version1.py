"""Reads a file of format version 1, in a process of its own, and writes it to standard output.

Those files have neither checksums nor texts of fixed length, so libhdf5 can hang or crash on
damaged ones. Run as a script: it imports nothing of the package, and nothing else takes harm.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import zlib
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

MAX_BYTES = 2**33
HEAD = struct.Struct("<4sIQI")
#: Bytes a second that a file is read with at least.
PACE = 10 * 2**20


class Refused(ValueError):
    """What is wrong with the file."""


class Reader:
    """Checked access to an open file."""

    def __init__(self, file: h5py.File, size: int) -> None:
        self.file = file
        self.left = size
        if self.attribute(file, "format", str, "") != "nad_attr":
            raise Refused("it is an HDF5 file, but not one written by nad_attr.")
        version = self.attribute(file, "format_version", int)
        if version != 1:
            raise Refused(f"it has format version {version}, which never was in such a file.")

    def attribute(self, group: h5py.Group, name: str, kind: type, default: Any = None) -> Any:
        """A single number or text."""
        if name in group.attrs and group.attrs.get_id(name).shape != ():
            raise Refused(f"attribute {name!r} of {group.name} is no {kind.__name__}.")
        value = group.attrs.get(name, default)
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, kind):
            raise Refused(f"attribute {name!r} of {group.name} is missing or no {kind.__name__}.")
        return value

    def member(self, group: h5py.Group, name: str, kind: type) -> Any:
        """A group or dataset inside the file: links to other files or paths are refused."""
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise Refused(f"{group.name}/{name} is missing or a link.")
        value = group[name]
        if not isinstance(value, kind):
            raise Refused(f"{value.name} is not a {kind.__name__}.")
        return value

    def numbers(
        self, group: h5py.Group, name: str, kind: str, shape: tuple[int | None, ...]
    ) -> npt.NDArray[Any]:
        """An array of this kind and shape."""
        data = self.member(group, name, h5py.Dataset)
        if data.dtype.kind != kind or data.external or data.is_virtual:
            raise Refused(f"{data.name} has type {data.dtype}.")
        fits = len(data.shape) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, data.shape, strict=True)
        )
        if not fits:
            raise Refused(f"{data.name} has shape {data.shape}, expected {shape}.")
        # Compressed space that was never written costs nothing on disk and everything in memory.
        stored = data.id.get_storage_size()
        self.left -= stored
        chunk = int(np.prod(data.chunks or (1,), dtype=object)) * data.dtype.itemsize
        if max(data.nbytes, chunk) > min(MAX_BYTES, max(1 << 20, 2000 * stored)) or self.left < 0:
            raise Refused(f"{data.name} claims {data.nbytes:,} bytes but holds {stored:,}.")
        return np.asarray(data[()])

    def strings(self, name: str) -> list[str] | None:
        """A list of texts of the tasks; None if there is none."""
        group = self.member(self.file, "task", h5py.Group)
        if name not in group:
            return None
        data = self.member(group, name, h5py.Dataset)
        if h5py.check_string_dtype(data.dtype) is None or len(data.shape) != 1:
            raise Refused(f"{data.name} is not a list of strings.")
        # They are written uncompressed, with a reference of several bytes for each.
        if data.is_virtual or data.external or data.shape[0] > data.id.get_storage_size():
            raise Refused(f"{data.name} has shape {data.shape}, but holds less.")
        texts: list[str] = []
        for start in range(0, data.shape[0], 100):
            texts += [str(value) for value in data.asstr()[start : start + 100]]
            # Many references to one and the same long text.
            self.left -= sum(map(len, texts[start:]))
            if self.left < 0:
                raise Refused(f"{data.name} holds less than it claims.")
        return texts


def content(file: h5py.File, size: int) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    """Everything in a file: texts and numbers."""
    reader = Reader(file, size)
    kind = reader.attribute(file, "kind", str)
    keys = {"task_gates": ("gate", "logit"), "sub_architecture": ("kept",)}.get(kind)
    if keys is None:
        raise Refused(f"it holds {kind!r}.")
    tasks = [json.loads(text) for text in reader.strings("index") or []]
    arrays: dict[str, npt.NDArray[Any]] = {}
    root = reader.member(file, "site", h5py.Group)
    if not 0 < len(root) <= 100_000:
        raise Refused(f"it has {len(root)} gate sites.")
    sites = []
    for order in range(len(root)):
        group = reader.member(root, str(order), h5py.Group)
        data = reader.member(group, keys[0], h5py.Dataset)
        n = int(data.shape[-1]) if data.shape else 0
        shape = (len(tasks), n) if kind == "task_gates" else (n,)
        sites.append(
            [
                reader.attribute(group, "name", str),
                n,
                reader.attribute(group, "channel_dim", int),
                bool(group.attrs.get("at_input", False)),
            ]
        )
        for key in keys:
            if key == keys[0] or key in group:
                letter = "u" if key == "kept" else "f"
                arrays[f"{key}/{order}"] = reader.numbers(group, key, letter, shape)
        if "mean" in group:
            arrays[f"mean/{order}"] = reader.numbers(group, "mean", "f", (n,))
    if "history" in file:
        group = reader.member(file, "history", h5py.Group)
        for name in group:
            arrays[f"history/{name}"] = reader.numbers(group, name, "f", (None, len(tasks)))
    header = {
        "kind": kind,
        "tasks": tasks,
        "names": reader.strings("name"),
        "sites": sites,
        "recipe": None if "recipe" not in file.attrs else reader.attribute(file, "recipe", str),
        "info": json.loads(reader.attribute(file, "info", str, "{}")),
        "created_by": reader.attribute(file, "created_by", str, ""),
    }
    return header, arrays


def limit(size: int) -> None:
    """Stop this process when it takes too long or too much memory for a file of this size."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, 0.5 + size / PACE)
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        most = used + 160 * 2**20 + 30 * size
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass  # not on this system; the time is limited in any case


def packed(header: dict[str, Any], arrays: dict[str, npt.NDArray[Any]]) -> list[bytes]:
    """A record of a journal."""
    values = {
        name: np.asarray(a, a.dtype.newbyteorder("<"), order="C") for name, a in arrays.items()
    }
    listed = [[name, value.dtype.str, list(value.shape)] for name, value in values.items()]
    head = json.dumps({**header, "arrays": listed}).encode()
    bodies = [value.tobytes() for value in values.values()]
    check = zlib.crc32(head)
    for body in bodies:
        check = zlib.crc32(body, check)
    return [HEAD.pack(b"REC1", len(head), sum(map(len, bodies)), check), head, *bodies]


def main(path: str) -> None:
    """Write the record of a file, or of what is wrong with it."""
    size = os.path.getsize(path)
    limit(size)
    try:
        with h5py.File(path, "r") as file:
            parts = packed(*content(file, size))
    except (OSError, RuntimeError, LookupError, ValueError, TypeError, MemoryError) as error:
        parts = packed({"kind": "refused", "why": (str(error) or type(error).__name__)[:500]}, {})
    sys.stdout.buffer.write(b"nad_attr journal 1\n")
    for part in parts:
        sys.stdout.buffer.write(part)


if __name__ == "__main__":
    main(sys.argv[1])
