"""The tasks of a store, one row each, and checks of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from nad_attr.data.labels import Task, as_task
from nad_attr.sites.site import GateSite

__all__ = ["TOO_LARGE", "Row", "Rows", "finite", "in_range", "no_nan", "stored_task", "wrong_sites"]

Floats = npt.NDArray[np.float32]


#: Numbers of a file below this fit into int64.
TOO_LARGE = 2**63


def stored_task(value: object) -> Task:
    """A task of a file; an error if it is none, or a class index that fits into no array."""
    task = as_task(value)
    if (task if isinstance(task, int) else max(task)) >= TOO_LARGE:
        raise ValueError(f"{task} is not a class index.")
    return task


class Row(NamedTuple):
    """A task, and where its gates are: in the file, or in one of the records."""

    task: Task
    name: str | None
    n_sample: int  # -1: not known
    finished: float  # seconds since 1970, NaN: not known
    record: int  # -1: the file
    row: int


class Rows(Sequence[Row]):
    """The tasks of a file, whose rows are made on access, and the rows of its records."""

    def __init__(
        self,
        tasks: Sequence[Task] = (),
        names: Sequence[str | None] = (),
        counts: Sequence[int] = (),
        finished: Sequence[float] = (),
    ) -> None:
        self.tasks, self.names = tasks, names
        self._counts, self._finished = counts, finished
        self._more: list[Row] = []

    def __len__(self) -> int:
        return len(self.tasks) + len(self._more)

    @overload
    def __getitem__(self, i: int) -> Row: ...

    @overload
    def __getitem__(self, i: slice) -> list[Row]: ...

    def __getitem__(self, i: int | slice) -> Row | list[Row]:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        n = len(self.tasks)
        if i >= n:
            return self._more[i - n]
        return Row(self.tasks[i], self.names[i], self._counts[i], self._finished[i], -1, i)

    def append(self, row: Row) -> None:
        """Add a row of a record."""
        self._more.append(row)


def in_range(values: Floats) -> bool:
    """Whether all are in [0, 1]; NaN is not."""
    return bool(np.minimum.reduce(values, None) >= 0 and np.maximum.reduce(values, None) <= 1)


def finite(values: Floats) -> bool:
    """Whether none is NaN or infinite."""
    return bool(np.isfinite(values).all())


def no_nan(values: Floats) -> bool:
    """Whether none is NaN."""
    return not np.isnan(np.minimum.reduce(values, None))


def wrong_sites(
    well: Callable[[Floats], bool], values: Sequence[Floats], sites: Sequence[GateSite]
) -> Iterator[tuple[GateSite, Floats]]:
    """The sites whose values fail a check."""
    # The values of few tasks are joined: a call takes longer than the check of one site.
    if len(values[0]) > 16 or not well(np.concatenate(values, axis=None)):
        for site, value in zip(sites, values, strict=True):
            if not well(value):
                yield site, value
