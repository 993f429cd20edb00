"""Results of any kind, in a separate file or in the file of the gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import h5py

from nad_attr.store._errors import GateStoreError
from nad_attr.store._gate_store import GateStore
from nad_attr.store._journal import Record, locked
from nad_attr.store._read import opened
from nad_attr.store._result_groups import (
    read_result_group,
    result_groups,
    result_record,
    write_result_group,
)
from nad_attr.store._units import UNITS, Units, UnitTables, packed, unpacked
from nad_attr.store._view import Arrays
from nad_attr.store._write import check_target, write_file

__all__ = ["read_result", "read_units", "result_names", "unit_names", "write_result", "write_units"]


def write_result(
    path: str | PathLike[str],
    group: str,
    arrays: Mapping[str, Any],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write a result into a group of a file; the group is replaced in one step.

    Everything else in the file stays. If there is no file, one for results is made. The file may be
    a :class:`GateStore`.

    Args:
        path: The file.
        group: Where in it, for example "evaluation/heldout".
        arrays: Arrays of numbers or truth values, and lists of texts, by name.
        attributes: Anything that JSON can hold, by name.

    Raises:
        GateStoreError: If the file is something else, is being written by another process, or a
            name or value cannot be stored.
        TypeError: If ``attributes`` hold what JSON cannot.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/results.h5"
        ...     write_result(path, "evaluation/heldout", {"auc": [0.75, 0.5]}, {"seed": 1})
        ...     read_result(path, "evaluation/heldout")
        ({'auc': array([0.75, 0.5 ])}, {'seed': 1})
    """
    record = result_record(group, arrays, attributes)
    target = check_target(path)
    if target.exists() and _kind(target) == "task_gates":
        with GateStore.open(target, "a") as store:
            store.write_result(group, arrays, attributes)
        return
    with locked(target):
        found: dict[str, Record] = {}
        if target.exists():
            with opened(target, "results") as reader:
                for name in result_groups(reader):
                    reader.begin()
                    found[name] = read_result_group(reader, name)
        found[group] = record

        def fill(file: h5py.File) -> None:
            for each in found.values():
                write_result_group(file, each)

        write_file(target, "results", fill)


def _kind(path: Path) -> str:
    with opened(path, "task_gates", "results", "sub_architecture") as reader:
        return reader.kind


def read_result(path: str | PathLike[str], group: str) -> tuple[Arrays, dict[str, Any]]:
    """Read the arrays, lists of texts and attributes that :func:`write_result` wrote.

    Args:
        path: A file of results, or a :class:`GateStore`.
        group: Where in it.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program, or
            holds no such result.

    Example:
        See :func:`write_result`.
    """
    source = Path(path)
    with opened(source, "task_gates", "results", "sub_architecture") as reader:
        if reader.kind == "results":
            names = result_groups(reader)
            if group not in names:
                there = ", ".join(map(repr, sorted(names))) or "none"
                raise GateStoreError(f"{path} has no result {group!r}; there are {there}.")
            reader.begin()
            record = read_result_group(reader, group)
            return {**record.arrays, **record.header["texts"]}, record.header["attributes"]
    with GateStore.open(source) as store:
        return store.result(group)


def result_names(path: str | PathLike[str]) -> list[str]:
    """The groups of a file that are results.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_result(f"{folder}/results.h5", "evaluation/heldout", {"auc": [0.5]})
        ...     result_names(f"{folder}/results.h5")
        ['evaluation/heldout']
    """
    source = Path(path)
    with opened(source, "task_gates", "results", "sub_architecture") as reader:
        if reader.kind == "results":
            return sorted(result_groups(reader))
    with GateStore.open(source) as store:
        return list(store.results)


def write_units(
    path: str | PathLike[str],
    name: str,
    tables: UnitTables,
    concepts: Sequence[tuple[str, str]],
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """Write tables of units into ``/units/<name>`` of a :class:`GateStore` or a file of results.

    Args:
        path: The file; made if there is none.
        name: Name of the tables; those of the same name are replaced.
        tables: ``{quantity: {site name: array}}``; the first axis is the site's units. Beside
            gates, the sites have to be the store's.
        concepts: Name and category of each concept.
        attributes: Anything that JSON can hold, by name.

    Raises:
        GateStoreError: If the file is something else, or sites or shapes do not fit.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/units.h5"
        ...     write_units(path, "mine", {"iou": {"conv1": [[0.5], [0.25]]}}, [("sky", "object")])
        ...     unit_names(path), read_units(path, "mine")[1]
        (['mine'], [('sky', 'object')])
    """
    target = check_target(path)
    if target.exists() and _kind(target) == "task_gates":
        with GateStore.open(target, "a") as store:
            store.write_units(name, tables, concepts, attributes)
        return
    write_result(target, *packed(name, tables, concepts, attributes, None))


def read_units(path: str | PathLike[str], name: str) -> Units:
    """Read what :func:`write_units` wrote: tables, concepts and attributes.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program, or
            holds no such units.

    Example:
        See :func:`write_units`.
    """
    arrays, attributes = read_result(path, f"{UNITS}/{name}")
    return unpacked(arrays, attributes, f"{path}, '/{UNITS}/{name}'")


def unit_names(path: str | PathLike[str]) -> list[str]:
    """Names of the tables of units in a file.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program.

    Example:
        See :func:`write_units`.
    """
    start = f"{UNITS}/"
    return [group[len(start) :] for group in result_names(path) if group.startswith(start)]
