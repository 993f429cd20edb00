"""Files of format version 1, read as if they were of today's."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from nad_attr.architecture import SubArchitecture, as_task, distinct_sites
from nad_attr.sites import GateSite
from nad_attr.store import _version1
from nad_attr.store._content import Content, Head
from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._journal import Record, unpacked

__all__ = ["content_of_version_1", "sub_architecture_of_version_1"]

#: Seconds for a process to start; it limits its own work to less.
_START = 60


def _record(path: Path, kind: str) -> Record:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    environment.update({"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"})
    try:
        done = subprocess.run(
            [sys.executable, _version1.__file__, os.fspath(path.resolve())],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_START + path.stat().st_size / _version1.PACE,
        )
    except subprocess.TimeoutExpired:
        raise GateStoreError(
            f"{path} is not a readable store of gates: reading it hangs."
        ) from None
    with reading(path):
        records, _ = unpacked(done.stdout)
    if done.returncode != 0 or len(records) != 1:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise GateStoreError(
            f"{path} is not a readable store of gates: HDF5 did not survive reading it "
            f"(exit code {done.returncode}{', ' + said[-1][:200] if said else ''})."
        )
    (record,) = records
    if record.header["kind"] == "refused":
        raise GateStoreError(f"{path} is not a readable store of gates: {record.header['why']}")
    if record.header["kind"] != kind:
        raise GateStoreError(f"{path} holds {record.header['kind']!r}, not {kind!r}.")
    return record


def _sites(record: Record) -> tuple[GateSite, ...]:
    return tuple(GateSite(*values) for values in record.header["sites"])


def content_of_version_1(path: Path) -> Content:
    """A store of version 1, read whole."""
    record = _record(path, "task_gates")
    with reading(path):
        tasks = record.header["tasks"]
        counts = [-1] * len(tasks)
        if not isinstance(record.header["info"], dict):
            raise GateStoreError(f"{path}: attribute 'info' is no dictionary.")
        if not tasks:
            raise GateStoreError(f"{path} holds no task.")
        header = {**record.header, "kind": "append", "n_sample": counts, "finished": float("nan")}
        head = Head(
            distinct_sites(_sites(record)), provenance={"created_by": record.header["created_by"]}
        )
        return Content(path, head, records=[Record(header, record.arrays)])


def sub_architecture_of_version_1(path: Path) -> SubArchitecture:
    """A sub-architecture of version 1."""
    record = _record(path, "sub_architecture")
    with reading(path):
        sites, arrays = _sites(record), record.arrays
        (task,) = record.header["tasks"]
        means = None
        if "mean/0" in arrays:
            means = {
                s.name: torch.tensor(arrays[f"mean/{i}"], device="cpu") for i, s in enumerate(sites)
            }
        masks = {
            s.name: torch.tensor(arrays[f"kept/{i}"], device="cpu") > 0 for i, s in enumerate(sites)
        }
        return SubArchitecture(
            masks, sites, task=None if task is None else as_task(task), means=means
        )
