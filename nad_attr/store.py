"""Task gates and sub-architectures in HDF5 files that any HDF5 tool opens.

Layout of a file (format version 1)::

    /            attributes format = "nad_attr", format_version, kind, created_by, recipe, info
    /task/index  T strings, JSON of the class index or of the list of class indices
    /task/name   T strings (if the tasks are named)
    /site/0      attributes name, order, channel_dim, at_input
    /site/0/gate   float32 (T, C)            kind "task_gates"
    /site/0/logit  float32 (T, C), optional
    /site/0/mean   float32 (C,), optional    what replaces a closed channel
    /site/0/kept   uint8 (C,)                kind "sub_architecture"
    /history/*   float32 (steps, T)

Reading trusts nothing: sizes, types and links are checked before anything is allocated, nothing is
unpickled or evaluated.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nad_attr._version import __version__
from nad_attr.architecture import SubArchitecture
from nad_attr.gates import Task, TaskGates
from nad_attr.history import History
from nad_attr.recipe import Recipe
from nad_attr.sites import GateSite

__all__ = [
    "FORMAT_VERSION",
    "GateStoreError",
    "read_sub_architecture",
    "read_task_gates",
    "write_sub_architecture",
    "write_task_gates",
]

FORMAT_VERSION = 1
_MAX_SITES = 100_000
_MAX_BYTES = 2**33  # 8 GB: more than any real store, less than a hostile shape


class GateStoreError(ValueError):
    """A file is not a readable store of gates; the message says what is wrong with it."""


# -- writing -----------------------------------------------------------------------------------


def _write(path: str | PathLike[str], kind: str, fill: Callable[[h5py.File], None]) -> None:
    """Write beside the target and rename, so that a crash never leaves half a file."""
    target = Path(path)
    if target.is_dir():
        raise GateStoreError(f"{target} is a folder; name a file, such as {target / 'gates.h5'}.")
    if not target.parent.is_dir():
        raise GateStoreError(f"there is no folder {target.parent} to write {target.name} into.")
    number, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(number)
    scratch = Path(name)
    try:
        with h5py.File(scratch, "w") as file:
            file.attrs["format"] = "nad_attr"
            file.attrs["format_version"] = FORMAT_VERSION
            file.attrs["kind"] = kind
            file.attrs["created_by"] = f"nad_attr {__version__}, torch {torch.__version__}"
            fill(file)
        # mkstemp makes files that only their owner reads; give the usual rights instead.
        mask = os.umask(0)
        os.umask(mask)
        scratch.chmod(0o666 & ~mask)
        scratch.replace(target)
    finally:
        scratch.unlink(missing_ok=True)


def _write_sites(
    file: h5py.File,
    sites: Sequence[GateSite],
    data: Mapping[str, Mapping[str, Tensor] | None],
    means: Mapping[str, Tensor] | None,
) -> None:
    for order, site in enumerate(sites):
        group = file.create_group(f"site/{order}")
        group.attrs["name"] = site.name
        group.attrs["order"] = order
        group.attrs["channel_dim"] = site.channel_dim
        group.attrs["at_input"] = site.at_input
        for key, values in data.items():
            if values is not None:
                group.create_dataset(key, data=values[site.name].numpy(), compression="gzip")
        if means is not None:
            group.create_dataset("mean", data=means[site.name].numpy())


def _write_tasks(
    file: h5py.File, tasks: Sequence[Task | None], names: Sequence[str] | None
) -> None:
    text = h5py.string_dtype()
    file.create_dataset("task/index", data=[json.dumps(task) for task in tasks], dtype=text)
    if names is not None:
        file.create_dataset("task/name", data=list(names), dtype=text)


def write_task_gates(gates: TaskGates, path: str | PathLike[str]) -> None:
    """Write task gates with everything they carry; an existing file is replaced at once.

    Raises:
        GateStoreError: If the place cannot be written to.
        TypeError: If ``gates.info`` holds what JSON cannot.
    """
    info = json.dumps(gates.info)

    def fill(file: h5py.File) -> None:
        _write_tasks(file, gates.tasks, gates.task_names)
        values = {name: gates[name] for name in gates}
        _write_sites(file, gates.sites, {"gate": values, "logit": gates.logits}, gates.means)
        file.attrs["info"] = info
        if gates.recipe is not None:
            file.attrs["recipe"] = gates.recipe.to_json()
        for name, curve in (gates.history or {}).items():
            file.create_dataset(f"history/{name}", data=curve, compression="gzip")

    _write(path, "task_gates", fill)


def write_sub_architecture(arch: SubArchitecture, path: str | PathLike[str]) -> None:
    """Write one sub-architecture; an existing file is replaced at once.

    Raises:
        GateStoreError: If the place cannot be written to.
    """

    def fill(file: h5py.File) -> None:
        _write_tasks(file, [arch.task], None)
        kept = {name: mask.to(torch.uint8) for name, mask in arch.masks.items()}
        _write_sites(file, arch.sites, {"kept": kept}, arch.means)

    _write(path, "sub_architecture", fill)


# -- reading -----------------------------------------------------------------------------------


@contextmanager
def _reading(path: str | PathLike[str], kind: str) -> Iterator[_Reader]:
    source = Path(path)
    if not source.is_file():
        raise GateStoreError(f"there is no file {source}.")
    try:
        with h5py.File(source, "r") as file:
            yield _Reader(file, source, kind)
    except GateStoreError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, RecursionError) as error:
        # h5py turns the library's complaints into any of these.
        raise GateStoreError(f"{source} is not a readable store of gates: {error}") from error


class _Reader:
    """Checked access to one open file."""

    def __init__(self, file: h5py.File, path: Path, kind: str) -> None:
        self.file, self.path = file, path
        self._read: set[int] = set()
        if self.attribute(file, "format", str, "") != "nad_attr":
            raise GateStoreError(f"{path} is an HDF5 file, but not one written by nad_attr.")
        version = self.attribute(file, "format_version", int)
        if version < 1:
            raise GateStoreError(f"{path} has format version {version}, which never was.")
        if version > FORMAT_VERSION:
            raise GateStoreError(
                f"{path} has format version {version}; this nad_attr reads up to "
                f"{FORMAT_VERSION}. Install a newer nad_attr."
            )
        found = self.attribute(file, "kind", str)
        if found != kind:
            raise GateStoreError(f"{path} holds {found!r}, not {kind!r}.")

    def attribute(self, group: h5py.Group, name: str, kind: type, default: Any = None) -> Any:
        value = group.attrs.get(name, default)
        value = value.item() if isinstance(value, np.generic) else value
        if not isinstance(value, kind):
            raise GateStoreError(
                f"{self.path}: attribute {name!r} of {group.name} is missing or no {kind.__name__}."
            )
        return value

    def member(self, group: h5py.Group, name: str, kind: type) -> Any:
        """A group or dataset inside the file: links to other files or paths are refused."""
        if not isinstance(group.get(name, getlink=True), h5py.HardLink):
            raise GateStoreError(f"{self.path}: {group.name}/{name} is missing or a link.")
        value = group[name]
        if not isinstance(value, kind):
            raise GateStoreError(f"{self.path}: {value.name} is not a {kind.__name__}.")
        return value

    def reading(self, data: h5py.Dataset) -> None:
        # A small file could otherwise claim one large dataset at a thousand sites.
        address = h5py.h5o.get_info(data.id).addr
        if address in self._read:
            raise GateStoreError(f"{self.path}: {data.name} stands in several places.")
        self._read.add(address)

    def numbers(
        self, group: h5py.Group, name: str, kind: str, shape: tuple[int | None, ...]
    ) -> npt.NDArray[Any]:
        data = self.member(group, name, h5py.Dataset)
        if data.dtype.kind != kind or data.external or data.is_virtual:
            raise GateStoreError(f"{self.path}: {data.name} has type {data.dtype}.")
        fits = len(data.shape) == len(shape) and all(
            want is None or want == have for want, have in zip(shape, data.shape, strict=True)
        )
        if not fits:
            raise GateStoreError(
                f"{self.path}: {data.name} has shape {data.shape}, expected {shape}."
            )
        # Compressed space that was never written costs nothing on disk and everything in memory.
        stored = data.id.get_storage_size()
        if data.nbytes > _MAX_BYTES or data.nbytes > max(1 << 20, 2000 * stored):
            raise GateStoreError(
                f"{self.path}: {data.name} claims {data.nbytes:,} bytes but holds {stored:,}."
            )
        self.reading(data)
        return np.asarray(data[()])

    def strings(self, name: str) -> list[str] | None:
        group = self.member(self.file, "task", h5py.Group)
        if name not in group:
            return None
        data = self.member(group, name, h5py.Dataset)
        if h5py.check_string_dtype(data.dtype) is None or len(data.shape) != 1:
            raise GateStoreError(f"{self.path}: {data.name} is not a list of strings.")
        # They are written uncompressed, with a reference of several bytes for each.
        if data.is_virtual or data.external or data.shape[0] > data.id.get_storage_size():
            raise GateStoreError(
                f"{self.path}: {data.name} has shape {data.shape}, but holds less."
            )
        self.reading(data)
        texts: list[str] = []
        left = self.path.stat().st_size
        for start in range(0, data.shape[0], 100):
            texts += [str(value) for value in data.asstr()[start : start + 100]]
            # Many references to one and the same long text.
            left -= sum(map(len, texts[start:]))
            if left < 0:
                raise GateStoreError(f"{self.path}: {data.name} holds less than it claims.")
        return texts

    def tasks(self) -> list[Task | None]:
        tasks: list[Task | None] = []
        for text in self.strings("index") or []:
            value = json.loads(text)
            tasks.append(tuple(value) if isinstance(value, list) else value)
        return tasks

    def sites(self, key: str) -> list[tuple[GateSite, h5py.Group]]:
        root = self.member(self.file, "site", h5py.Group)
        if not 0 < len(root) <= _MAX_SITES:
            raise GateStoreError(f"{self.path}: {len(root)} gate sites.")
        sites = []
        for order in range(len(root)):
            group = self.member(root, str(order), h5py.Group)
            data = self.member(group, key, h5py.Dataset)
            site = GateSite(
                self.attribute(group, "name", str),
                int(data.shape[-1]) if data.shape else 0,
                self.attribute(group, "channel_dim", int),
                bool(group.attrs.get("at_input", False)),
            )
            sites.append((site, group))
        return sites

    def means(self, sites: list[tuple[GateSite, h5py.Group]]) -> dict[str, Tensor] | None:
        if "mean" not in sites[0][1]:
            return None
        return {
            site.name: torch.from_numpy(self.numbers(group, "mean", "f", (site.n_channels,)))
            for site, group in sites
        }


def read_task_gates(path: str | PathLike[str]) -> TaskGates:
    """Read what :func:`write_task_gates` wrote.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program.
    """
    with _reading(path, "task_gates") as reader:
        tasks = [task for task in reader.tasks() if task is not None]
        sites = reader.sites("gate")
        gates, logits = {}, {}
        for site, group in sites:
            shape = (len(tasks), site.n_channels)
            gates[site.name] = torch.from_numpy(reader.numbers(group, "gate", "f", shape))
            if "logit" in group:
                logits[site.name] = torch.from_numpy(reader.numbers(group, "logit", "f", shape))
        curves = {}
        if "history" in reader.file:
            group = reader.member(reader.file, "history", h5py.Group)
            for name in group:
                curves[name] = reader.numbers(group, name, "f", (None, len(tasks)))
        recipe = reader.file.attrs.get("recipe")
        return TaskGates(
            gates,
            [site for site, _ in sites],
            tasks,
            logits=logits or None,
            means=reader.means(sites),
            recipe=None if recipe is None else Recipe.from_json(str(recipe)),
            history=History(curves) if curves else None,
            task_names=reader.strings("name"),
            info=json.loads(reader.attribute(reader.file, "info", str, "{}")),
        )


def read_sub_architecture(path: str | PathLike[str]) -> SubArchitecture:
    """Read what :func:`write_sub_architecture` wrote.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program.
    """
    with _reading(path, "sub_architecture") as reader:
        tasks = reader.tasks()
        if len(tasks) != 1:
            raise GateStoreError(f"{path} names {len(tasks)} tasks for one sub-architecture.")
        sites = reader.sites("kept")
        masks = {
            site.name: torch.from_numpy(reader.numbers(group, "kept", "u", (site.n_channels,))) > 0
            for site, group in sites
        }
        return SubArchitecture(
            masks,
            [site for site, _ in sites],
            task=tasks[0],
            means=reader.means(sites),
        )
