"""The store of one network, one set of data and one recipe."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TypeAlias

import h5py
import numpy as np
import numpy.typing as npt
from torch import Tensor

from nad_attr.data.fingerprints import environment
from nad_attr.data.labels import Task, as_task
from nad_attr.gates.channels import check_means, distinct_sites, n_channels
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store._compare import differences, different_means
from nad_attr.store._content import Content, Head, append_record
from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._journal import Journal, Record, locked, now
from nad_attr.store._read import check_hdf5
from nad_attr.store._result_groups import result_record
from nad_attr.store._rows import Row
from nad_attr.store._units import UNITS, UnitTables, packed
from nad_attr.store._view import StoreView, opened, opened_to_read
from nad_attr.store._write import check_name, check_target, sweep, to_json
from nad_attr.system.files import replacing

__all__ = ["GateStore", "read_task_gates", "write_task_gates"]

#: A name for the annotation of GateStore.list, inside which ``list`` is the method.
Paths: TypeAlias = "list[Path]"

#: The HDF5 file is rewritten when the journal is this many times longer than the file, and longer
#: than this many bytes: so the cost of rewriting stays small.
_JOURNAL_TIMES, _JOURNAL_BYTES = 3, 2**20


class GateStore(StoreView):
    """The gates of many tasks in one HDF5 file, written task by task.

    Made by :meth:`create` or :meth:`open`, used as a context manager::

        with GateStore.create("gates.h5", sites, recipe=recipe) as store:
            store.append(gates)

        with GateStore.open("gates.h5") as store:
            gates = store.read([3, 207])

    Appended gates go to a journal beside the file (``gates.h5.journal``) and are safe when
    :meth:`append` returns: a crash at any byte leaves every complete append readable. The HDF5 file
    itself is never changed but replaced by a newer one, now and then and at :meth:`close`, which
    also removes the journal. Readers may open the store at any time and see the complete state of
    that moment. There is one writer at a time; a writer that died blocks nobody.

    Attributes:
        path: The file.
        mode: "r" or "a".

    Example:
        >>> import tempfile
        >>> import torch
        >>> site = GateSite("layer1", 3)
        >>> gates = TaskGates({"layer1": torch.tensor([[0.9, 0.2, 0.6]])}, [site], [7])
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/gates.h5"
        ...     with GateStore.create(path, [site], recipe=Recipe(size=0.5)) as store:
        ...         store.append(gates)
        ...     with GateStore.open(path) as store:
        ...         store.tasks, 7 in store, store.read([7]) == gates
        (7,)
        ((7,), True, True)
    """

    def __init__(
        self,
        path: Path,
        mode: Literal["r", "a"],
        content: Content,
        file: h5py.File | None,
        journal: Journal | None,
    ) -> None:
        self.path, self.mode = path, mode
        self._content = content
        self._file = file
        self._journal = journal
        self._closed = False

    # -- opening and closing -------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        path: str | PathLike[str],
        sites: Sequence[GateSite],
        *,
        recipe: Recipe | None = None,
        means: Mapping[str, Tensor] | None = None,
        provenance: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> GateStore:
        """Make a store that holds no task yet, and write to it.

        Args:
            path: The file.
            sites: The gate sites, in forward order.
            recipe: How gates are learned. None: the first append's.
            means: ``{site name: (C,)}``, the values of closed channels. None: the first append's.
            provenance: Where the gates come from, as JSON can hold it. ``model_hash``,
                ``data_fingerprint`` and ``seed`` are compared by :meth:`check_resumable`; versions
                are added if ``environment`` is missing.
            overwrite: Replace an existing file.

        Raises:
            GateStoreError: If there is a file already, another process writes it, or nothing can
                be written there.
            TypeError: If an argument is of another kind.
            ValueError: If sites or means do not fit.
        """
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}.")
        if not isinstance(provenance or {}, Mapping):
            raise TypeError(f"provenance must be a dictionary, got {type(provenance).__name__}.")
        known = distinct_sites(sites)
        if not known:
            raise ValueError("a store needs at least one gate site.")
        facts = {"environment": environment(), **(provenance or {})}
        head = Head(known, recipe, check_means(means, known), json.loads(to_json(facts)))
        target = check_target(path, replaced=True)
        if target.exists() and not overwrite:
            raise GateStoreError(
                f"{target} is there already; open it with mode 'a' to go on with it, or say "
                "overwrite=True."
            )
        journal = Journal(target)
        try:
            if target.exists() and not overwrite:
                raise GateStoreError(f"{target} was made by another process just now.")
            with reading(target):
                journal.clear(_store_name(target))
            content = Content(target, head)
            content.write(target)
            journal.begin(head.store, head.revision)
            return cls(target, "a", *opened(target), journal)
        except BaseException:
            journal.close(remove=journal.n_bytes > 0)  # else it is not this store's
            raise

    @classmethod
    def open(cls, path: str | PathLike[str], mode: Literal["r", "a"] = "r") -> GateStore:
        """Open a store.

        Args:
            path: The file.
            mode: "r" to read the complete state of this moment, see :meth:`refresh`. "a" to append
                as well.

        Raises:
            GateStoreError: If the file is missing, damaged, foreign or newer than this program;
                with mode "a", if another process is writing it.
        """
        if mode == "r":
            source = Path(path)
            content, file = opened_to_read(source)
            return cls(source, mode, content, file, None)
        if mode != "a":
            raise ValueError(f"mode must be 'r' or 'a', got {mode!r}.")
        target = check_target(path)
        check_hdf5(target)  # before a journal is made beside it
        journal = Journal(target)
        # The journal of a writer that died may be all that is left of its work.
        needed = True
        try:
            content, file = opened(target)
            head = content.head
            with reading(target):
                records = journal.resume(head.store, head.revision, content.holds)
            needed = bool(records)
            for record in records:
                content.apply(record)
            return cls(target, mode, content, file, journal)
        except BaseException:
            journal.close(remove=not needed)
            raise

    def close(self) -> None:
        """End writing: put everything into the one HDF5 file, and let others write.

        Raises:
            OSError: If the file cannot be written. Then the appended gates stay in the journal, for
                readers and for the next writer.
        """
        if self._closed:
            return
        journal = self._journal
        done = False
        try:
            if journal is not None and self._content.records and journal.mine:
                self._fold()
            done = True
        finally:
            self._closed = True
            if journal is not None:
                journal.close(remove=done)
            self._release()

    def __enter__(self) -> GateStore:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def refresh(self) -> None:
        """Read the latest state, if the store was opened for reading."""
        self._check_open()
        if self._journal is None:
            content, file = opened_to_read(self.path)
            if self._file is not None:
                self._file.close()
            self._content, self._file = content, file

    def _writer(self) -> Journal:
        self._check_open()
        if self._journal is None:
            raise GateStoreError(f"{self.path} is open for reading; open it with mode 'a'.")
        return self._journal

    # -- appending -----------------------------------------------------------------------------

    def append(
        self, gates: TaskGates, *, sample_counts: Mapping[Any, int] | None = None
    ) -> tuple[Task, ...]:
        """Add those tasks that are not there yet.

        When this returns, they are on the disk; when it is interrupted, none of them is.

        Args:
            gates: Gates at the store's sites, learned with its recipe, with its means.
            sample_counts: ``{task: own images that it was learned from}``.

        Returns:
            The tasks that were added.

        Raises:
            GateStoreError: If the gates do not belong into this store; says why.
            OSError: If they cannot be written, for example because the disk is full.
        """
        journal = self._writer()
        if not isinstance(gates, TaskGates):
            raise TypeError(f"gates must be TaskGates, got {type(gates).__name__}.")
        self._check_fits(gates)
        counts = {as_task(task): int(n) for task, n in (sample_counts or {}).items()}
        new = [i for i, task in enumerate(gates.tasks) if task not in self._content.where]
        if not new:
            return ()
        tasks = tuple(gates.tasks[i] for i in new)
        self._save(journal, append_record(gates, new, [counts.get(task, -1) for task in tasks]))
        return tasks

    def _check_fits(self, gates: TaskGates) -> None:
        head = self._content.head
        wrong = differences(head, gates.sites, gates.recipe, {})
        if len(self):
            names = self.task_names
            if (gates.task_names is None) != (names is None):
                wrong.append("task names (either all tasks have one or none)")
            for key, values in (("logit", gates.logits), ("constant", gates.constants)):
                if (values is None) == self._content.has(key):
                    wrong.append(f"{key}s (either all tasks have them or none)")
        if gates.sites == head.sites and not (len(self) == 0 and head.means is None):
            wrong += different_means(head.means, gates.means)
        if wrong:
            raise GateStoreError(
                f"these gates do not belong into {self.path}, they differ in {'; '.join(wrong)}. "
                "Write them to another file."
            )
        if gates.task_names is not None:
            there = {row.name: row.task for row in self._content.rows}
            for task, name in zip(gates.tasks, gates.task_names, strict=True):
                if there.get(name, task) != task:
                    raise GateStoreError(
                        f"{self.path} has a task named {name!r} already: {there[name]}."
                    )

    def _save(self, journal: Journal, record: Record) -> None:
        size = 0 if self._content.reader is None else self._content.reader.size
        if journal.n_bytes > max(_JOURNAL_BYTES, _JOURNAL_TIMES * size):
            self._fold()
        journal.append(record)
        self._content.apply(record)

    def flush(self) -> None:
        """Put everything into the HDF5 file now, for programs that do not read the journal."""
        self._writer()
        if self._content.records:
            self._fold()

    def _fold(self) -> None:
        """Replace the HDF5 file by one with everything, and empty the journal."""
        assert self._journal is not None
        old, head = self._content, self._content.head
        head.modified = now()
        try:
            old.write(self.path, self._release)
        except BaseException:
            if self._file is None:
                # The old file is still there, and the new records are in the journal.
                self._content, self._file = opened(self.path)
                for record in old.records:
                    self._content.apply(record)
            raise
        # Until this is done, the journal belongs to an older revision and is ignored.
        self._journal.begin(head.store, head.revision)
        self._content, self._file = opened(self.path)

    def _release(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    # -- other methods' scores and results -----------------------------------------------------

    def write_scores(
        self,
        method: str,
        scores: Mapping[str, Tensor | npt.NDArray[Any]],
        tasks: Sequence[object] | None = None,
        *,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep another method's scores of channels, under the same tasks and sites.

        Args:
            method: Its name.
            scores: ``{site name: (T', C)}``.
            tasks: The T' tasks, all of them in this store; None: all, in the order of ``tasks``.
            attributes: Further facts, as JSON can hold them.

        Raises:
            GateStoreError: If a task is not there, or shapes do not fit.
        """
        journal = self._writer()
        check_name(method, "a method")
        try:
            wanted = [row.task for row in self._rows(tasks)]
        except KeyError as error:
            raise GateStoreError(f"scores are of tasks with gates: {error.args[0]}") from None
        if set(scores) != {site.name for site in self.sites}:
            raise GateStoreError(
                f"scores are for {list(scores)}, the sites are {[s.name for s in self.sites]}."
            )
        arrays = {}
        for order, site in enumerate(self.sites):
            value = scores[site.name]
            table = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
            table = np.array(table, np.float32)
            if table.shape != (len(wanted), site.n_channels):
                raise GateStoreError(
                    f"scores of {site.name!r} have shape {table.shape}, not (tasks, channels) = "
                    f"{(len(wanted), site.n_channels)}."
                )
            arrays[f"score/{order}"] = table
        plain = json.loads(to_json(dict(attributes or {})))
        header = {"kind": "score", "method": method, "tasks": wanted, "attributes": plain}
        self._save(journal, Record(header, arrays))

    def write_result(
        self, group: str, arrays: Mapping[str, Any], attributes: Mapping[str, Any] | None = None
    ) -> None:
        """Keep a result beside the gates, see :func:`write_result`.

        Raises:
            GateStoreError: If a name or value cannot be stored.
        """
        self._save(self._writer(), result_record(group, arrays, attributes))

    def write_units(
        self,
        name: str,
        tables: UnitTables,
        concepts: Sequence[tuple[str, str]],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep tables of units, such as IoUs with concepts, under the same sites.

        See :func:`write_units`; used by :meth:`nad_attr.concepts.UnitConcepts.save`.

        Raises:
            GateStoreError: If a site is not there, or shapes do not fit.
        """
        self.write_result(*packed(name, tables, concepts, attributes, self.sites))

    # -- copies --------------------------------------------------------------------------------

    def slice(
        self, tasks: Sequence[object], out: str | PathLike[str], *, overwrite: bool = False
    ) -> Path:
        """Write some of the tasks, with their scores, to another store.

        Results are about all tasks and are not copied; units are.

        Args:
            tasks: Class indices, groups of them, or task names.
            out: The new file.
            overwrite: Replace an existing file.

        Raises:
            GateStoreError: If the new file cannot be written, or is this one.
            KeyError: If there is no such task.
        """
        self._check_open()
        rows = self._rows(list(tasks))
        return _copied([(self, rows)], out, overwrite=overwrite, results=False)

    @staticmethod
    def merge(
        paths: Sequence[str | PathLike[str]], out: str | PathLike[str], *, overwrite: bool = False
    ) -> Path:
        """Join stores of one network, recipe and data.

        A task that several of them hold must have the same gates in all of them.

        Args:
            paths: The stores.
            out: The new file; none of them.
            overwrite: Replace an existing file.

        Raises:
            GateStoreError: If they do not fit together; says why. An existing file is then
                unchanged.
        """
        if isinstance(paths, (str, PathLike)) or not paths:
            raise TypeError("paths must be a list of at least one file.")
        stores: list[GateStore] = []
        try:
            for path in paths:
                store = GateStore.open(path)
                stores.append(store)
                first = stores[0]
                first.check_resumable(
                    sites=store.sites, recipe=store.recipe, provenance=store.provenance
                )
                wrong = different_means(first._content.head.means, store._content.head.means)
                if wrong:
                    raise GateStoreError(f"{first.path} and {store.path} differ in {wrong[0]}.")
                first.check_same_gates(store)
            return _copied(
                [(s, s._content.rows) for s in stores], out, overwrite=overwrite, results=True
            )
        finally:
            for store in stores:
                store.close()

    @staticmethod
    def list(folder: str | PathLike[str]) -> Paths:
        """The stores in a folder and the folders in it, found by their content.

        Example:
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     GateStore.create(f"{folder}/gates.h5", [GateSite("layer1", 3)]).close()
            ...     [path.name for path in GateStore.list(folder)]
            ['gates.h5']
        """
        found = []
        for path in sorted(Path(folder).rglob("*")):
            try:
                if path.is_file():
                    GateStore.open(path).close()
                    found.append(path)
            except (GateStoreError, OSError):
                continue
        return found

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"mode {self.mode!r}"
        return (
            f"GateStore({str(self.path)!r}, {state}: {len(self)} tasks, {len(self.sites)} sites, "
            f"{n_channels(self.sites):,} channels)"
        )


def _store_name(path: Path) -> str | None:
    """Name of the store at a path, if there is one."""
    try:
        content, file = opened(path)
    except GateStoreError:
        return None
    file.close()
    return content.head.store


def _copied(
    parts: Sequence[tuple[GateStore, Sequence[Row]]],
    out: str | PathLike[str],
    *,
    overwrite: bool,
    results: bool,
) -> Path:
    first = parts[0][0]
    head = first._content.head
    target = check_target(out, replaced=True)
    for store, _ in parts:
        if target.exists() and os.path.samefile(target, store.path):
            raise GateStoreError(f"{out} is {store.path}, which is read; write to another file.")
    lock = Journal(target)
    try:
        if target.exists() and not overwrite:
            raise GateStoreError(f"{target} is there already; overwrite=True replaces it.")
        with replacing(target) as scratch:
            _fill(scratch, head, parts, results)
    finally:
        sweep(target)
        lock.close(remove=True)
    return target


def _fill(
    path: Path, head: Head, parts: Sequence[tuple[GateStore, Sequence[Row]]], results: bool
) -> None:
    """Copy tasks, their scores and the results into a file."""
    first = parts[0][0]
    with GateStore.create(
        path,
        head.sites,
        recipe=head.recipe,
        means=head.means,
        provenance=head.provenance,
        overwrite=True,
    ) as copy:
        for store, rows in parts:
            counts = {row.task: row.n_sample for row in rows}
            # In parts, since the gates of a large store may not fit into memory.
            for start in range(0, len(rows), 128):
                part = rows[start : start + 128]
                copy.append(store.read([row.task for row in part]), sample_counts=counts)
        for store, rows in parts:
            for method in store.score_methods:
                scores = store.scores(method)
                where = [store._content.where[row.task] for row in rows]
                there = [
                    i for i in where if not all(bool(s[i].isnan().all()) for s in scores.values())
                ]
                if there:
                    copy.write_scores(
                        method,
                        {name: score[there] for name, score in scores.items()},
                        [store.tasks[i] for i in there],
                        attributes=store.score_attributes(method),
                    )
            for name in store.results:
                if not results and not name.startswith(f"{UNITS}/"):
                    continue
                if name in copy.results:
                    raise GateStoreError(f"both {first.path} and {store.path} hold {name!r}.")
                copy.write_result(name, *store.result(name))


def write_task_gates(gates: TaskGates, path: str | PathLike[str]) -> None:
    """Write task gates with everything that belongs to them; an existing file is replaced at once.

    Raises:
        GateStoreError: If the place cannot be written to, or another process is writing it.
        TypeError: If ``gates.info`` holds what JSON cannot.
    """
    record = append_record(gates, range(len(gates)), [-1] * len(gates))
    record = Record(json.loads(to_json(record.header)), record.arrays)
    target = check_target(path, replaced=True)
    content = Content(target, Head(gates.sites, provenance={"environment": environment()}))
    content.apply(record)
    with locked(target):
        content.write(target)


def read_task_gates(path: str | PathLike[str]) -> TaskGates:
    """Read all gates of a store.

    Raises:
        GateStoreError: If the file is missing, damaged, foreign or newer than this program, or
            holds no task.
    """
    with GateStore.open(path) as store:
        return store.read()
