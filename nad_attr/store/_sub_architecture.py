"""Files of one sub-architecture."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import h5py
import torch

from nad_attr.data.labels import as_task
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._layout import read_means
from nad_attr.store._read import opened
from nad_attr.store._write import check_target, put_array, put_sites, put_strings, write_file

__all__ = ["read_sub_architecture", "write_sub_architecture"]


def write_sub_architecture(arch: SubArchitecture, path: str | PathLike[str]) -> None:
    """Write one sub-architecture; an existing file is replaced at once.

    Raises:
        GateStoreError: If the place cannot be written to.
    """

    def fill(file: h5py.File) -> None:
        put_strings(file.create_group("task"), "index", [json.dumps(arch.task)])
        if arch.own_constants:
            put_strings(file["task"], "constants", ["own"])
        if arch.fitted_on is not None:
            put_strings(file["task"], "fitted_on", [str(arch.fitted_on)])
        groups = put_sites(file, arch.sites, arch.means)
        for site, group in zip(arch.sites, groups, strict=True):
            put_array(group, "kept", arch[site.name].to(torch.uint8).numpy())

    write_file(check_target(path, replaced=True), "sub_architecture", fill)


def read_sub_architecture(path: str | PathLike[str]) -> SubArchitecture:
    """Read what :func:`write_sub_architecture` wrote.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program.
    """
    source = Path(path)
    with opened(source, "sub_architecture") as reader, reading(source):
        group = reader.group(reader.file, "task")
        texts = reader.strings(group, "index")
        if len(texts) != 1:
            raise GateStoreError(f"{path} names {len(texts)} tasks for one sub-architecture.")
        task = json.loads(texts[0])
        sites = reader.sites()
        means = read_means(reader, sites)
        root = reader.group(reader.file, "site")
        masks = {}
        for order, site in enumerate(sites):
            kept = reader.array(root, f"{order}/kept", "u", (site.n_channels,))
            masks[site.name] = torch.from_numpy(kept) > 0
        fitted_on = reader.strings(group, "fitted_on") if "fitted_on" in group else []
        return SubArchitecture(
            masks,
            sites,
            task=None if task is None else as_task(task),
            means=None if means is None else {n: torch.from_numpy(m) for n, m in means.items()},
            own_constants="constants" in group and reader.strings(group, "constants") == ["own"],
            fitted_on=int(fitted_on[0]) if fitted_on else None,
        )
