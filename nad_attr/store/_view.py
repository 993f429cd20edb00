"""The part of a store that reads."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import h5py
import numpy.typing as npt
import torch
from torch import Tensor

from nad_attr.data.labels import Task, as_task, first_tasks
from nad_attr.gates.channels import n_channels
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store._compare import differences, some
from nad_attr.store._content import Content
from nad_attr.store._errors import GateStoreError, reading
from nad_attr.store._journal import goes_on, journal_path, left_over, read_journal
from nad_attr.store._read import Reader, check_hdf5, hdf5
from nad_attr.store._rows import Row
from nad_attr.store._units import UNITS, Units, unpacked
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import xarray

__all__ = ["Arrays", "StoreView", "opened", "opened_to_read"]

#: Values of a result by name.
Arrays: TypeAlias = "dict[str, npt.NDArray[Any] | list[str]]"
#: How many times a reader looks again, while the writer replaces the file.
_MAX_LOOKS = 100


class StoreView:
    """The part of :class:`GateStore` that reads."""

    path: Path
    _content: Content
    _closed: bool

    def _check_open(self) -> None:
        if self._closed:
            raise GateStoreError(f"{self.path} is closed.")

    # -- what is in it -------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[GateSite, ...]:
        """The gate sites, in forward order."""
        return self._content.head.sites

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks, in the order in which they were appended."""
        return tuple(row.task for row in self._content.rows)

    @property
    def task_names(self) -> tuple[str, ...] | None:
        """Their names, if they have any."""
        names = tuple(row.name for row in self._content.rows if row.name is not None)
        return names or None

    @property
    def sample_counts(self) -> dict[Task, int]:
        """``{task: own images that it was learned from}``, where known."""
        return {row.task: row.n_sample for row in self._content.rows if row.n_sample >= 0}

    @property
    def recipe(self) -> Recipe | None:
        """How gates were learned."""
        return self._content.head.recipe

    @property
    def means(self) -> dict[str, Tensor] | None:
        """``{site name: float32 (C,)}``, the values of closed channels; None: zero."""
        means = self._content.head.means
        return None if means is None else {name: mean.clone() for name, mean in means.items()}

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the gates come from."""
        facts: dict[str, Any] = json.loads(json.dumps(self._content.head.provenance))
        return facts

    @property
    def info(self) -> dict[str, Any]:
        """``TaskGates.info`` of all gates."""
        return dict(self._content.head.info)

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._content.rows)

    def __contains__(self, task: object) -> bool:
        try:
            return as_task(task) in self._content.where
        except (TypeError, ValueError):
            return task in (self.task_names or ()) if isinstance(task, str) else False

    def _rows(self, tasks: Sequence[object] | None) -> Sequence[Row]:
        content = self._content
        if tasks is None:
            return content.rows
        if isinstance(tasks, (str, bytes)) or not hasattr(tasks, "__iter__"):
            raise TypeError(f"tasks must be a list of tasks, got {tasks!r}.")
        rows = []
        names: dict[str | None, Row] = {}
        if any(isinstance(task, str) for task in tasks):
            names = {row.name: row for row in content.rows}
        for task in tasks:
            if isinstance(task, str) and task in names:
                rows.append(names[task])
                continue
            where = None if isinstance(task, str) else content.where.get(as_task(task))
            if where is None:
                known = first_tasks(self.tasks)
                raise KeyError(f"no gates for task {task!r} in {self.path}; it holds {known}.")
            rows.append(content.rows[where])
        return rows

    def read(self, tasks: Sequence[object] | None = None) -> TaskGates:
        """The gates of some tasks, reading no others.

        Args:
            tasks: Class indices, groups of them, or task names; None: all, as they were appended.

        Raises:
            GateStoreError: If there is no task yet, or the file is damaged.
            KeyError: If it holds no such task.
        """
        self._check_open()
        rows = self._rows(tasks)
        if not rows:
            raise GateStoreError(f"{self.path} holds no task yet, or none was asked for.")
        return self._content.read(rows)

    # -- other methods' scores and results -----------------------------------------------------

    @property
    def score_methods(self) -> tuple[str, ...]:
        """The methods with scores."""
        return tuple(self._content.methods)

    def scores(self, method: str) -> dict[str, Tensor]:
        """``{site name: float32 (T, C)}`` in the order of ``tasks``, NaN for tasks without.

        Raises:
            GateStoreError: If there are none of this method.
        """
        self._check_method(method)
        return {n: torch.from_numpy(v) for n, v in self._content.scores(method).items()}

    def score_attributes(self, method: str) -> dict[str, Any]:
        """The attributes of a method's scores, see :meth:`write_scores`.

        Raises:
            GateStoreError: If there are no scores of it.
        """
        self._check_method(method)
        return self._content.score_attributes(method)

    def _check_method(self, method: str) -> None:
        self._check_open()
        if method not in self._content.methods:
            there = ", ".join(self.score_methods) or "none"
            raise GateStoreError(f"{self.path} has no scores of {method!r}; there are {there}.")

    @property
    def results(self) -> tuple[str, ...]:
        """The groups of results, for example "evaluation/heldout"."""
        return tuple(self._content.results)

    def result(self, group: str) -> tuple[Arrays, dict[str, Any]]:
        """Arrays, lists of texts and attributes of a result.

        Raises:
            GateStoreError: If there is no such result.
        """
        self._check_open()
        record = self._content.result(group)
        return {**record.arrays, **record.header["texts"]}, dict(record.header["attributes"])

    @property
    def unit_names(self) -> tuple[str, ...]:
        """Names of the tables of units, see :meth:`GateStore.write_units`."""
        start = f"{UNITS}/"
        return tuple(name[len(start) :] for name in self.results if name.startswith(start))

    def units(self, name: str) -> Units:
        """Tables of units: ``{quantity: {site name: array}}``, concepts and attributes.

        Raises:
            GateStoreError: If there are none of this name, or they are something else.
        """
        return unpacked(*self.result(f"{UNITS}/{name}"), f"{self.path}, '/{UNITS}/{name}'")

    # -- comparing -----------------------------------------------------------------------------

    def check_resumable(
        self,
        *,
        sites: Sequence[GateSite] | None = None,
        recipe: Recipe | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse to go on with another network, other sites, another recipe, data or seed.

        Args:
            sites: The new sites; None: not compared.
            recipe: The new recipe; None: not compared.
            provenance: ``model_hash``, ``data_fingerprint``, ``seed`` and, within rounding,
                ``outputs`` are compared, as far as they are given.

        Raises:
            GateStoreError: Names everything that differs.
        """
        wrong = differences(self._content.head, sites, recipe, provenance or {})
        if wrong:
            raise GateStoreError(
                f"{self.path} was begun with other settings; what differs: {'; '.join(wrong)}. "
                "Go on with what it was begun with, write to another file, or begin anew with "
                "overwrite=True (--overwrite in place of --resume)."
            )

    def describe(self) -> str:
        """The content of the store, for people."""
        head = self._content.head
        constants = "at their best constants" if self._content.has("constant") else None
        head = self._content.head
        lines = [
            f"{self.path}: {len(self):,} task" + "s" * (len(self) != 1),
            f"  sites       {len(head.sites)} with {n_channels(head.sites):,} channels: "
            + some([site.name for site in head.sites]),
            f"  tasks       {some(self.task_names or self.tasks)}",
            "  closed      " + (constants or ("zero" if head.means is None else "at their mean")),
            f"  logits      {'kept' if self._content.has('logit') else 'none'}",
        ]
        for key in ("model", "model_hash", "data", "data_fingerprint", "seed", "device"):
            if (fact := head.provenance.get(key)) is not None:
                lines.append(f"  {key.replace('_', ' '):<11} {str(fact)[:80]}")
        if self.score_methods:
            lines.append(f"  scores      {some(self.score_methods)}")
        if self.results:
            lines.append(f"  results     {some(self.results)}")
        lines.append(f"  written     {head.created} to {head.modified}")
        return "\n".join(map(shown, lines))

    def check_same_gates(self, other: StoreView) -> None:
        both = [task for task in other.tasks if task in self] if other is not self else []
        for start in range(0, len(both), 64):
            part = both[start : start + 64]
            if self.read(part) != other.read(part):
                wrong = next(t for t in part if self.read([t]) != other.read([t]))
                raise GateStoreError(
                    f"{self.path} and {other.path} hold different gates of task {wrong}."
                )

    def to_xarray(self) -> xarray.Dataset:
        """All gates as an ``xarray.Dataset``.

        Variables ``gate/<site>`` and ``logit/<site>`` (if there are logits), over ``task`` and
        ``channel/<site>``; coordinate ``task`` holds class indices (texts, if there are groups of
        classes) and ``task_name`` the names.

        Raises:
            ImportError: If xarray is missing (``pip install xarray``).
        """
        try:
            import xarray
        except ImportError:
            raise ImportError("to_xarray needs xarray: pip install xarray") from None
        gates = self.read()
        variables = {}
        for key, values in (("gate", {n: gates[n] for n in gates}), ("logit", gates.logits)):
            for name, value in (values or {}).items():
                variables[f"{key}/{name}"] = (("task", f"channel/{name}"), value.numpy())
        plain = all(isinstance(task, int) for task in gates.tasks)
        coordinates: dict[str, Any] = {
            "task": list(gates.tasks) if plain else [json.dumps(task) for task in gates.tasks]
        }
        if gates.task_names is not None:
            coordinates["task_name"] = ("task", list(gates.task_names))
        attributes = {"recipe": None if gates.recipe is None else gates.recipe.to_json()}
        return xarray.Dataset(variables, coordinates, attributes)


def opened(path: Path) -> tuple[Content, h5py.File]:
    """The content of the HDF5 file without its journal."""
    check_hdf5(path)
    with reading(path):
        file = hdf5(path)
        try:
            return Content.of_file(path, Reader(file, path, "task_gates")), file
        except BaseException:
            file.close()
            raise


def opened_to_read(path: Path) -> tuple[Content, h5py.File]:
    """The state of a store that may be replaced at any moment: a file and its journal."""
    check_hdf5(path)  # before realpath, which has worse messages for a name with a zero
    # A writer follows a link to the store, so its journal is at the target.
    journal = journal_path(Path(os.path.realpath(path)))
    for _ in range(_MAX_LOOKS):
        before = _identity(path)
        content, file = opened(path)
        head = content.head
        try:
            with reading(path):
                records = read_journal(journal)
            if _identity(path) == before:
                if goes_on(records, head.store, head.revision):
                    for record in records[1:]:
                        content.apply(record)
                elif len(records) > 1 and not content.holds(records):
                    warnings.warn(
                        f"{left_over(journal, records)}. They are not read.",
                        RuntimeWarning,
                        stacklevel=3,
                    )
                return content, file
        except BaseException:
            file.close()
            raise
        file.close()
    raise GateStoreError(f"{path} is replaced faster than it can be read.")


def _identity(path: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return None  # check_hdf5 has the better message
    return found.st_ino, found.st_mtime_ns, found.st_size
