"""The content of a store: an HDF5 file, and the records that came after it was written."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nad_attr.data.labels import Task
from nad_attr.gates.channels import distinct_sites
from nad_attr.gates.history import History
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._journal import Record, now
from nad_attr.store._layout import Layout, raw_rows, read_means
from nad_attr.store._read import Reader, Table
from nad_attr.store._result_groups import (
    check_result,
    read_result_group,
    result_groups,
    write_result_group,
)
from nad_attr.store._rows import (
    TOO_LARGE,
    Row,
    Rows,
    finite,
    in_range,
    no_nan,
    stored_task,
    wrong_sites,
)
from nad_attr.store._write import (
    check_name,
    encoded,
    from_json,
    put_array,
    put_attribute,
    put_columns,
    put_rows,
    put_sites,
    put_strings,
    to_json,
    utf8,
    write_file,
)

__all__ = ["Content", "Head", "append_record"]

Floats = npt.NDArray[np.float32]


@dataclass
class Head:
    """The facts that all tasks of a store share."""

    sites: tuple[GateSite, ...]
    recipe: Recipe | None = None
    means: dict[str, Tensor] | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    store: str = field(default_factory=lambda: uuid.uuid4().hex)
    revision: int = 0
    created: str = field(default_factory=now)
    modified: str = field(default_factory=now)


def append_record(
    gates: TaskGates, rows: Sequence[int], counts: Sequence[int], finished: float | None = None
) -> Record:
    """The record of some of the tasks of gates at the store's sites."""
    chosen = (
        gates
        if list(rows) == list(range(len(gates)))
        else gates.select([gates.tasks[row] for row in rows])
    )
    for name in chosen.task_names or ():
        utf8(name)
    values = {
        "gate": chosen,
        "logit": chosen.logits,
        "constant": chosen.constants,
        "mean": chosen.means,
    }
    arrays: dict[str, Any] = {
        f"{key}/{i}": value[site.name].numpy()
        for i, site in enumerate(chosen.sites)
        for key, value in values.items()
        if value is not None
    }
    for name, curve in (chosen.history or {}).items():
        arrays[f"history/{check_name(name, 'a quantity of the history')}"] = curve
    header = {
        "kind": "append",
        "tasks": chosen.tasks,
        "names": chosen.task_names,
        "n_sample": list(counts),
        "finished": time.time() if finished is None else finished,
        "recipe": None if chosen.recipe is None else chosen.recipe.to_json(),
        "info": chosen.info,
    }
    return Record(header, arrays)


class Content:
    """A store, read on demand: an HDF5 file (None: there is none yet), and later records."""

    def __init__(
        self, path: Path, head: Head, reader: Reader | None = None, records: Sequence[Record] = ()
    ) -> None:
        self.path, self.head, self.reader = path, head, reader
        self.records: list[Record] = []
        self.rows = Rows()
        self.where: dict[Task, int] = {}
        self._n_file = 0
        self._layout: Layout | None = None
        #: {method: {task: (record, row)}}, scores of records, which replace those of the file.
        self._scores: dict[str, dict[Task, tuple[int, int]]] = {}
        self._results: dict[str, Record | None] = {}
        if reader is not None:
            self._take(self._rows_of_file(reader))
            self._n_file = len(self.rows)
            self._layout = Layout(reader, head.sites, self._n_file)
            if reader.has(reader.file, "score"):
                root = reader.group(reader.file, "score")
                self._scores = {name: {} for name in reader.names(root)}
            self._results = dict.fromkeys(result_groups(reader))
        for record in records:
            self.apply(record)

    @classmethod
    def of_file(cls, path: Path, reader: Reader) -> Content:
        """The content of an HDF5 file without records."""
        file = reader.file
        sites = reader.sites()
        means = read_means(reader, sites)
        recipe = reader.text(file, "recipe", None)
        revision = reader.integer(file, "revision")
        if not 0 <= revision < TOO_LARGE // 2:
            raise GateStoreError(f"{path}: {revision} is not a number of writes.")
        head = Head(
            distinct_sites(sites),
            None if recipe is None else Recipe.from_json(recipe),
            None if means is None else {n: torch.from_numpy(mean) for n, mean in means.items()},
            reader.json(file, "provenance", dict, {}),
            reader.json(file, "info", dict, {}),
            reader.text(file, "store"),
            revision,
            reader.text(file, "created"),
            reader.text(file, "modified"),
        )
        return cls(path, head, reader)

    @staticmethod
    def _rows_of_file(reader: Reader) -> Rows:
        group = reader.group(reader.file, "task")
        texts = reader.raw_strings(group, "index")
        tasks = from_json(b"[%b]" % b",".join(texts))
        n = len(tasks)
        if n != len(texts):
            raise GateStoreError(f"{reader.path}: /task/index holds {len(texts)} texts, {n} tasks.")
        names: Sequence[str | None] = [None] * n
        if reader.has(group, "name"):
            names = reader.strings(group, "name", n)
        counts = reader.array(group, "n_sample", "i", (n,)).tolist()
        finished = reader.array(group, "finished", "f", (n,)).tolist()
        if set(map(type, tasks)) != {int} or min(tasks) < 0:
            tasks = [stored_task(task) for task in tasks]
        elif max(tasks) >= TOO_LARGE:
            raise GateStoreError(f"{reader.path}: {max(tasks)} is not a class index.")
        return Rows(tasks, names, counts, finished)

    def _take(self, rows: Rows) -> None:
        """Take the rows of the file; only if one is twice or lacks a name, check each of them."""
        where = {task: i for i, task in enumerate(rows.tasks)}
        names = set(rows.names) - {None}
        if len(where) == len(rows) and len(names) in (0, len(rows)):
            self.where, self.rows = where, rows
        else:
            self._add(rows)

    def _add(self, rows: Sequence[Row]) -> None:
        # Only names that exist are compared, since there may be many rows.
        named = rows[0].name is not None if rows else False
        known = {row.name for row in self.rows} if named else set()
        for row in rows:
            if row.task in self.where:
                if row.record < 0:
                    raise GateStoreError(f"{self.path}: task {row.task} is there twice.")
                continue
            if row.name is not None and row.name in known:
                raise GateStoreError(f"{self.path}: the name {row.name!r} is there twice.")
            if self.rows and (row.name is None) != (self.rows[0].name is None):
                raise GateStoreError(f"{self.path}: some of its tasks have names and some do not.")
            known.add(row.name)
            self.where[row.task] = len(self.rows)
            self.rows.append(row)

    # -- records -------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        """Add a record; a GateStoreError if it does not fit."""
        with reading(self.path):
            number = len(self.records)
            kind = record.header["kind"]
            if kind == "append":
                self._apply_append(record, number)
            elif kind == "score":
                where = {
                    stored_task(task): (number, i) for i, task in enumerate(record.header["tasks"])
                }
                method = check_name(record.header["method"], "a method")
                if not isinstance(record.header["attributes"] or {}, dict):
                    raise GateStoreError(f"{self.path}: attributes of scores are not a dictionary.")
                self._check_arrays(record, "score/", len(where))
                if any(task not in self.where for task in where):
                    raise GateStoreError(f"{self.path}: scores of tasks that it does not hold.")
                self._scores.setdefault(method, {}).update(where)
            elif kind == "result":
                check_result(record)
                self._results[record.header["group"]] = record
            else:
                raise GateStoreError(f"{self.path}: its journal holds {kind!r:.20}.")
            self.records.append(record)

    def _apply_append(self, record: Record, number: int) -> None:
        header = record.header
        tasks = [stored_task(task) for task in header["tasks"]]
        n = len(tasks)
        names = [None] * n if header["names"] is None else [str(name) for name in header["names"]]
        counts = [int(count) for count in header["n_sample"]]
        if not n or len(names) != n or len(counts) != n or max(counts) >= TOO_LARGE:
            raise GateStoreError(f"{self.path}: its journal has other names for {n} tasks.")
        self._check_arrays(record, "gate/", n)
        for key in ("logit", "constant"):
            has = f"{key}/0" in record.arrays
            if has:
                self._check_arrays(record, f"{key}/", n)
            if self.rows and has != self.has(key):
                raise GateStoreError(f"{self.path}: some of its tasks have {key}s and some do not.")
        for name, curve in record.arrays.items():
            if name.startswith("history/"):
                check_name(name.removeprefix("history/"), "a quantity of the history")
            if name.startswith("history/") and (curve.ndim != 2 or curve.shape[1] != n):
                raise GateStoreError(f"{self.path}: its history is not one of {n} tasks.")
        head = self.head
        first = not self.rows
        self._add(
            [
                Row(task, name, count, float(header["finished"]), number, i)
                for i, (task, name, count) in enumerate(zip(tasks, names, counts, strict=True))
            ]
        )
        if first and head.recipe is None and header["recipe"] is not None:
            head.recipe = Recipe.from_json(header["recipe"])
        if first and head.means is None and "mean/0" in record.arrays:
            head.means = {}
            for i, site in enumerate(head.sites):
                mean = np.array(record.arrays[f"mean/{i}"], np.float32)
                if mean.shape != (site.n_channels,):
                    raise GateStoreError(f"{self.path}: the means of {site.name!r} do not fit.")
                head.means[site.name] = torch.from_numpy(mean)
        info = dict(header["info"] or {})
        head.info = info if first and not head.info else _joined(head.info, info)
        head.modified = now()

    def _check_arrays(self, record: Record, prefix: str, n: int) -> None:
        for i, site in enumerate(self.head.sites):
            array = record.arrays[f"{prefix}{i}"]
            if array.shape != (n, site.n_channels) or array.dtype != np.float32:
                raise GateStoreError(
                    f"{self.path}: {prefix}{i} has shape {array.shape} and type {array.dtype}, "
                    f"expected float32 {(n, site.n_channels)}."
                )

    def holds(self, records: Sequence[Record]) -> bool:
        """Whether this store has all that a journal appends.

        Then its writer died after it had replaced the file, before it emptied the journal.
        """
        if not records or records[0].header.get("store") != self.head.store:
            return False
        with reading(self.path):
            for record in records[1:]:
                header = record.header
                if header["kind"] == "append":
                    there = all(stored_task(task) in self.where for task in header["tasks"])
                else:
                    there = header.get("method") in self._scores
                    there = there or header.get("group") in self._results
                if not there:
                    return False
        return True

    # -- gates ---------------------------------------------------------------------------------

    def has(self, key: str) -> bool:
        """Whether tasks have a ``"logit"``, or a ``"constant"``, for each channel."""
        if not self.rows:
            return False
        if self.rows[0].record >= 0:
            return f"{key}/0" in self.records[self.rows[0].record].arrays
        assert self._layout is not None
        return key in self._layout.keys

    def _quantities(self) -> dict[str, int]:
        """``{quantity of the history: steps}``."""
        found: dict[str, int] = {}
        if self.reader is not None and self.reader.has(self.reader.file, "history"):
            root = self.reader.group(self.reader.file, "history")
            for name in self.reader.names(root):
                found[name] = self.reader.table(root, name, (None, self._n_file), 1).shape[0]
        for record in self.records:
            for key, curve in record.arrays.items():
                if key.startswith("history/"):
                    name = key.removeprefix("history/")
                    found[name] = max(found.get(name, 0), curve.shape[0])
        return found

    def _numbers(self, key: str, rows: Sequence[Row]) -> list[Floats]:
        """float32 (rows, C) of each site."""
        there = [i for i, row in enumerate(rows) if row.record < 0]
        parts: list[Floats] = []
        if there:
            assert self._layout is not None
            parts = self._layout.numbers(key, [rows[i].row for i in there])
            if len(there) == len(rows):
                return parts
        for order, site in enumerate(self.head.sites):
            values = np.empty((len(rows), site.n_channels), np.float32)
            for i, row in enumerate(rows):
                if row.record >= 0:
                    values[i] = self.records[row.record].arrays[f"{key}/{order}"][row.row]
            if there:
                values[there], parts[order] = parts[order], values
            else:
                parts.append(values)
        return parts

    def _tensors(self, values: Sequence[Floats]) -> dict[str, Tensor]:
        return {
            site.name: torch.from_numpy(value)
            for site, value in zip(self.head.sites, values, strict=True)
        }

    def read(self, rows: Sequence[Row]) -> TaskGates:
        """The gates of some tasks."""
        head = self.head
        with reading(self.path):
            if self.reader is not None:
                self.reader.begin()
            tasks = tuple(row.task for row in rows)
            if len(set(tasks)) < len(tasks):
                raise GateStoreError(f"{self.path}: a task is asked for twice: {tasks[:20]}.")
            gates = self._numbers("gate", rows)
            for site, value in wrong_sites(in_range, gates, head.sites):
                what = "hold NaN" if np.isnan(value).any() else "leave [0, 1]"
                raise GateStoreError(f"{self.path}: gates of {site.name!r} {what}.")
            kept: dict[str, dict[str, Tensor]] = {}
            checks = (("logit", no_nan, "hold NaN"), ("constant", finite, "are not finite"))
            for key, check, wrong in checks:
                if self.has(key):
                    values = self._numbers(key, rows)
                    for site, _ in wrong_sites(check, values, head.sites):
                        raise GateStoreError(f"{self.path}: {key}s of {site.name!r} {wrong}.")
                    kept[key] = self._tensors(values)
            names = tuple(row.name for row in rows if row.name is not None)
            return TaskGates._of_checked(
                self._tensors(gates),
                head.sites,
                tasks,
                logits=kept.get("logit"),
                means=head.means,
                constants=kept.get("constant"),
                recipe=head.recipe,
                history=self._history(rows),
                task_names=names or None,
                info=head.info,
            )

    def _history(self, rows: Sequence[Row]) -> History | None:
        quantities = self._quantities()
        if not quantities:
            return None
        steps = max(quantities.values())
        if self.reader is not None:
            self.reader.reserve(4 * steps * len(rows) * len(quantities), "/history")
        curves = {}
        for name in quantities:
            curve = np.full((steps, len(rows)), np.nan, np.float32)
            table = self._history_table(name)
            filed = [i for i, row in enumerate(rows) if row.record < 0]
            if filed and table is not None:
                found = table.rows([rows[i].row for i in filed], sparse=True)
                curve[: table.shape[0], filed] = found.T
            for i, row in enumerate(rows):
                if row.record >= 0:
                    own = self.records[row.record].arrays.get(f"history/{name}")
                    if own is not None:
                        curve[: own.shape[0], i] = own[:, row.row]
            curves[name] = curve
        return History(curves)

    def _filed(self, root: str, name: str) -> tuple[Reader, h5py.Group] | None:
        """A group of the file that has a member of this name; None: there is no such member."""
        if self.reader is None or not self.reader.has(self.reader.file, root):
            return None
        group = self.reader.group(self.reader.file, root)
        return (self.reader, group) if self.reader.has(group, name) else None

    def _history_table(self, name: str) -> Table | None:
        if (found := self._filed("history", name)) is None:
            return None
        reader, group = found
        return reader.table(group, name, (None, self._n_file), 1)

    # -- scores --------------------------------------------------------------------------------

    @property
    def methods(self) -> list[str]:
        """The methods with scores."""
        return sorted(self._scores)

    def _score_table(self, method: str, order: int) -> Table | None:
        if (found := self._filed("score", method)) is None:
            return None
        reader, group = found
        shape = (self._n_file, self.head.sites[order].n_channels)
        return reader.table(reader.group(group, method), str(order), shape)

    def scores(self, method: str) -> dict[str, Floats]:
        """``{site name: float32 (T, C)}``, NaN for tasks without."""
        with reading(self.path):
            if self.reader is not None:
                self.reader.begin()
            found = {}
            for order, site in enumerate(self.head.sites):
                table = self._score_table(method, order)
                if self.reader is not None:
                    claimed = 4 * len(self.rows) * site.n_channels
                    self.reader.reserve(claimed, f"/score/{method}")
                values = np.full((len(self.rows), site.n_channels), np.nan, np.float32)
                if table is not None and self._n_file:
                    values[: self._n_file] = table.rows(range(self._n_file), sparse=True)
                for task, (record, i) in self._scores[method].items():
                    values[self.where[task]] = self.records[record].arrays[f"score/{order}"][i]
                found[site.name] = values
            return found

    def score_attributes(self, method: str) -> dict[str, Any]:
        """The attributes of a method's scores; the latest ones."""
        for record in reversed(self.records):
            if record.header["kind"] == "score" and record.header["method"] == method:
                return dict(record.header["attributes"] or {})
        assert self.reader is not None
        with reading(self.path):
            group = self.reader.group(self.reader.group(self.reader.file, "score"), method)
            return dict(self.reader.json(group, "attributes", dict, {}))

    # -- results -------------------------------------------------------------------------------

    @property
    def results(self) -> list[str]:
        """The groups of results."""
        return sorted(self._results)

    def result(self, group: str) -> Record:
        """A result; a GateStoreError if there is none of this name."""
        if group not in self._results:
            there = ", ".join(map(repr, self.results)) or "none"
            raise GateStoreError(f"{self.path} has no result {group!r}; there are {there}.")
        record = self._results[group]
        if record is None:
            assert self.reader is not None
            with reading(self.path):
                self.reader.begin()
                return read_result_group(self.reader, group)
        return record

    # -- writing -------------------------------------------------------------------------------

    def write(self, target: Path, ready: Callable[[], None] = lambda: None) -> None:
        """Put everything into one HDF5 file, which replaces the old one in one step."""
        head = self.head
        revision = head.revision + 1
        if self.reader is not None:
            self.reader.begin()

        def fill(file: h5py.File) -> None:
            put_attribute(file, "store", head.store)
            put_attribute(file, "revision", revision)
            put_attribute(file, "created", head.created)
            put_attribute(file, "modified", head.modified)
            put_attribute(file, "info", to_json(head.info))
            put_attribute(file, "provenance", to_json(head.provenance))
            if head.recipe is not None:
                put_attribute(file, "recipe", head.recipe.to_json())
            self._write_tasks(file)
            groups = put_sites(file, head.sites, head.means)
            n = len(self.rows)
            for order, (site, group) in enumerate(zip(head.sites, groups, strict=True)):
                put_rows(group, "gate", (n, site.n_channels), self._encoded("gate", [order]))
            shape = (n, sum(site.n_channels for site in head.sites))
            for key in ("logit", "constant"):
                if self.has(key):
                    put_rows(file, key, shape, self._encoded(key, range(len(head.sites))))
                    put_columns(file[key], head.sites)
            self._write_history(file)
            self._write_scores(file)
            for name in self._results:
                write_result_group(file, self.result(name))
            self._copy_the_rest(file)

        write_file(target, "task_gates", fill, ready)
        head.revision = revision

    def _write_tasks(self, file: h5py.File) -> None:
        group = file.create_group("task")
        put_strings(group, "index", [json.dumps(row.task) for row in self.rows])
        names = [row.name for row in self.rows if row.name is not None]
        if names:
            put_strings(group, "name", names)
        put_array(group, "n_sample", np.array([row.n_sample for row in self.rows], np.int64))
        put_array(group, "finished", np.array([row.finished for row in self.rows], np.float64))

    def _encoded(self, key: str, orders: Sequence[int]) -> Iterator[bytes | None]:
        """The rows of gates at one site, or of logits or constants at all sites."""
        if self._layout is not None and self._n_file:
            yield from self._layout.raw(key, orders[0])
        for row in self.rows[self._n_file :]:
            arrays = self.records[row.record].arrays
            yield encoded(np.concatenate([arrays[f"{key}/{order}"][row.row] for order in orders]))

    def _write_history(self, file: h5py.File) -> None:
        quantities = self._quantities()
        if not quantities:
            return
        group = file.create_group("history")
        steps = max(quantities.values())
        shape = (steps, len(self.rows))
        for name in quantities:
            put_rows(group, name, shape, self._curves(name, steps), axis=1, fill=math.nan)

    def _curves(self, name: str, steps: int) -> Iterator[bytes | None]:
        table = self._history_table(name)
        if table is None:
            yield from [None] * self._n_file
        elif table.shape[0] == steps:
            yield from raw_rows(table, sparse=True)
        else:
            for curve in table.rows(range(self._n_file), sparse=True):
                yield encoded(_padded(curve, steps))
        for row in self.rows[self._n_file :]:
            own = self.records[row.record].arrays.get(f"history/{name}")
            yield None if own is None else encoded(_padded(own[:, row.row], steps))

    def _write_scores(self, file: h5py.File) -> None:
        for method in self._scores:
            group = file.create_group(f"score/{method}")
            put_attribute(group, "attributes", to_json(self.score_attributes(method)))
            for order, site in enumerate(self.head.sites):
                shape = (len(self.rows), site.n_channels)
                put_rows(group, str(order), shape, self._score_rows(method, order), fill=math.nan)

    def _score_rows(self, method: str, order: int) -> Iterator[bytes | None]:
        table = self._score_table(method, order)
        filed = iter(()) if table is None or not self._n_file else raw_rows(table, sparse=True)
        for row in self.rows:
            before = next(filed, None)
            record, i = self._scores[method].get(row.task, (None, 0))
            if record is None:
                yield before
            else:
                yield encoded(self.records[record].arrays[f"score/{order}"][i])

    def _copy_the_rest(self, file: h5py.File) -> None:
        """Keep the members that other programs have added, except links."""
        if self.reader is None:
            return
        for name in self.reader.names(self.reader.file):
            if name not in file and self.reader.is_hard(self.reader.file, name):
                h5py.h5o.copy(self.reader.file.id, name.encode(), file.id, name.encode())


def _padded(curve: Floats, steps: int) -> Floats:
    padded = np.full(steps, np.nan, np.float32)
    padded[: len(curve)] = curve
    return padded


def _joined(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """The info of both parts of a run: equal entries, times added, lists joined."""
    joined: dict[str, Any] = {}
    for key in [key for key in a if key in b]:
        if key == "seconds":
            joined[key] = round(a[key] + b[key], 3)
        elif a[key] == b[key]:
            joined[key] = a[key]
        elif key == "started":
            joined[key] = min(a[key], b[key])
        elif isinstance(a[key], list) and isinstance(b[key], list):
            joined[key] = a[key] + [item for item in b[key] if item not in a[key]]
    return joined
