"""What a comparison of gates with unit concepts found: a tidy table, and what may be concluded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np

from nad_attr.stats.results import Result, is_json
from nad_attr.stats.sentences import (
    ALL_TASKS,
    DEPTH_MEASURES,
    MEASURES,
    SIGNIFICANCE_LEVEL,
    sentence_of,
)
from nad_attr.stats.tables import pandas
from nad_attr.stats.tests import Statistic, benjamini_hochberg
from nad_attr.store import GateStoreError, read_result, write_result
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ALL_TASKS", "Comparison", "RowList"]


_TEXTS = ("test", "task", "site", "concept", "other")
_CONTROL = ("control", "control_low", "control_high")
_NUMBERS = ("n", "effect", "low", "high", "p", "q", "null", *_CONTROL)
_COLUMNS = (*_TEXTS, "n", "effect", "measure", "low", "high", "p", "q", *_CONTROL)


class RowList:
    """Rows of a table, gathered column by column."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {name: [] for name in (*_TEXTS, *_NUMBERS)}

    def add(
        self,
        test: str,
        n_rows: int,
        *,
        ends: Iterable[Any] = (np.nan, np.nan),
        controls: Iterable[Any] = (np.nan, np.nan, np.nan),
        **columns: Any,
    ) -> None:
        """Add rows of one test; columns that are not named are empty, or NaN.

        ``ends`` are those of the effect's interval; ``controls`` are its value and its two ends.
        """
        given = dict(zip(("low", "high", *_CONTROL), (*ends, *controls), strict=True))
        columns = given | columns
        for name in _TEXTS:
            value = test if name == "test" else columns.get(name, "")
            self.columns[name] += [value] * n_rows if isinstance(value, str) else list(value)
        for name in _NUMBERS:
            value = np.broadcast_to(columns.get(name, np.nan), (n_rows,))
            self.columns[name] += np.asarray(value, dtype=np.float64).tolist()

    def add_statistic(self, statistic: Statistic, **names: str) -> None:
        """Add one statistic, under other names if they are given."""
        row = {**statistic.row(), **names}
        test, _ = row.pop("test"), row.pop("measure")
        self.add(test, 1, **{k: [v] if k in _TEXTS else v for k, v in row.items()})


class Comparison(Result):
    """A table of statistics with q-values over all of it, and sentences.

    Made by :func:`nad_attr.concepts.compare`.

    Args:
        columns: Columns of equal length: texts ``test, task, site, concept, other`` and numbers
            ``n, effect, low, high, p, null, control, control_low, control_high``. q-values are
            computed here, over all rows that have a p-value.
        notes: What was left out and why, in sentences.
        info: How it was made; as JSON can hold it. ``level`` is the coverage of the intervals.

    Attributes:
        columns: ``{name: list}``.
        notes: As given.
        info: As given.

    Raises:
        ValueError: If columns are missing or of different length.

    Example:
        >>> from nad_attr.concepts import mann_whitney
        >>> kept, iou = [True] * 8 + [False] * 8, list(range(16, 0, -1))
        >>> result = Comparison.of([mann_whitney(kept, iou, n_permutations=999)])
        >>> len(result), result.columns["effect"], result.columns["q"][0] < 0.01
        (1, [1.0], True)
        >>> print(result.sentences()[0])
        Channels kept have a higher best IoU than dropped ones: in 100.0 % of pairs ...
    """

    def __init__(
        self,
        columns: Mapping[str, Sequence[Any]],
        *,
        notes: Sequence[str] = (),
        info: Mapping[str, Any] | None = None,
    ) -> None:
        missing = [n for n in (*_TEXTS, *_NUMBERS) if n not in columns and n != "q"]
        if missing:
            raise ValueError(f"the column {missing[0]!r} is missing.")
        length = len(columns["test"])
        self.columns: dict[str, list[Any]] = {}
        for name in _TEXTS:
            self.columns[name] = [str(value) for value in columns[name]]
        for name in _NUMBERS:
            if name == "q":
                self.columns[name] = benjamini_hochberg(
                    np.asarray(columns["p"], dtype=np.float64)
                ).tolist()
            else:
                self.columns[name] = [float(value) for value in columns[name]]
        self.columns["n"] = [int(value) for value in self.columns["n"]]
        wrong = [name for name, values in self.columns.items() if len(values) != length]
        if wrong:
            raise ValueError(f"the column {wrong[0]!r} has not {length} rows as the others.")
        self.notes = tuple(notes)
        self.info: dict[str, Any] = dict(info or {})

    @classmethod
    def of(cls, statistics: Iterable[Statistic], *, notes: Sequence[str] = ()) -> Comparison:
        """The table of single statistics, with q-values over all of them."""
        rows = RowList()
        for statistic in statistics:
            rows.add_statistic(statistic)
        return cls(rows.columns, notes=notes)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.columns["test"])

    def __repr__(self) -> str:
        tests = ", ".join(f"{n} {name}" for name, n in self._counts().items())
        return f"Comparison({tests or 'empty'})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Comparison):
            return NotImplemented
        same = all(self.columns[n] == other.columns[n] for n in _TEXTS) and all(
            np.array_equal(self.columns[n], other.columns[n], equal_nan=True) for n in _NUMBERS
        )
        return same and (self.notes, self.info) == (other.notes, other.info)

    __hash__ = None  # type: ignore[assignment]

    def _counts(self) -> dict[str, int]:
        return {name: self.columns["test"].count(name) for name in dict.fromkeys(self["test"])}

    def __getitem__(self, name: str) -> list[Any]:
        """A column."""
        return self.columns[name]

    def row(self, i: int) -> dict[str, Any]:
        """One row, as a dictionary."""
        return {name: values[i] for name, values in self.columns.items()}

    def where(self, **wanted: str) -> list[int]:
        """Numbers of the rows whose texts are these, ``where(test="enrichment", task="7")``.

        Raises:
            KeyError: If there is no such column of texts.
        """
        for name in wanted:
            if name not in _TEXTS:
                raise KeyError(f"no column of texts is called {name!r}; there are {_TEXTS}.")
        return [
            i for i in range(len(self)) if all(self.columns[n][i] == v for n, v in wanted.items())
        ]

    def sentences(self, rows: Sequence[int] | None = None) -> list[str]:
        """What may be concluded from each row, judged by its q-value.

        Args:
            rows: Numbers of rows, as from :meth:`where`; None: all.
        """
        numbers = range(len(self)) if rows is None else rows
        level = float(self.info.get("level", 0.95))
        return [sentence_of(self.row(i), level) for i in numbers]

    def frame(self, *, sentences: bool = True) -> pd.DataFrame:
        """One row per statistic, tidy.

        Args:
            sentences: With a column of what may be concluded; without, large tables are faster.

        Returns:
            Columns test, task, site, concept, other (the other method, similarity or group), n,
            effect, measure (what the effect is called), low, high, p, q, control, control_low,
            control_high (random choices of the same size at each site), sentence.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("Comparison.frame()")
        columns: dict[str, Any] = {**self.columns, "measure": [MEASURES[t] for t in self["test"]]}
        table = {name: columns[name] for name in _COLUMNS}
        if sentences:
            table["sentence"] = self.sentences()
        return pd.DataFrame(table)

    def conclusions(self, limit: int = 20) -> list[str]:
        """The largest differences, in sentences.

        First all rows about all tasks, Mantel's tests and high-level detectors along depth; then
        those of the smallest q-values below 0.05.

        Args:
            limit: How many of the latter at most.
        """
        level = DEPTH_MEASURES["high"]
        general = [
            i
            for i in range(len(self))
            if not self["site"][i]
            and (
                self["task"][i] == ALL_TASKS
                or self["test"][i] == "mantel"
                or (self["test"][i] == "depth_trend" and self["concept"][i] == level)
            )
        ]
        mentioned = set(general)
        q = np.asarray(self["q"], dtype=np.float64)
        found = [
            i
            for i in np.argsort(np.where(np.isnan(q), np.inf, q), kind="stable").tolist()
            if q[i] < SIGNIFICANCE_LEVEL and i not in mentioned and not self["site"][i]
        ]
        return self.sentences([*general, *found[:limit]])

    def summary(self, limit: int = 10) -> str:
        """The numbers of tests and of discoveries, the largest differences, and what was left out.

        Args:
            limit: Sentences about single tasks, at most.
        """
        q = np.asarray(self["q"], dtype=np.float64)
        tests = np.asarray(self["test"])
        lines = [
            f"{len(self)} statistics; discoveries at q < {SIGNIFICANCE_LEVEL:g} over all of them:"
        ]
        for name, count in self._counts().items():
            mine = tests == name
            tested = int((~np.isnan(q[mine])).sum())
            lines.append(
                f"  {name:<17} {int((q[mine] < SIGNIFICANCE_LEVEL).sum()):>6} of {tested} "
                f"tested, {count} reported ({MEASURES[name]})"
            )
        lines += [f"- {sentence}" for sentence in self.conclusions(limit)]
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(map(shown, lines))

    def plot(self, test: str | None = None, *, limit: int = 20, axes: Any = None) -> Figure:
        """Effects of one test with their intervals, those of the smallest q-values.

        Args:
            test: Which; None: that of the first row.
            limit: Rows, at most.
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If there is no row of such a test.
        """
        from nad_attr.plots.style import plot_intervals

        rows = self.where(test=test or next(iter(self["test"]), ""))
        if not rows:
            raise ValueError(f"no row is of test {test!r}; there are {[*self._counts()]}.")
        rows = sorted(rows, key=lambda i: (np.isnan(self["q"][i]), self["q"][i]))[:limit]
        found = {
            " ".join(self[name][i] for name in _TEXTS[1:] if self[name][i]) or str(i): tuple(
                float(self[name][i]) for name in ("effect", "low", "high")
            )
            for i in rows
        }
        return plot_intervals(found, MEASURES[self["test"][rows[0]]], axes=axes)

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return {"columns": dict[str, list[Any]], "notes": tuple[str, ...], "info": dict[str, Any]}

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._types()}

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> Comparison:
        if unknown := set(fields["columns"]["test"]) - set(MEASURES):
            raise ValueError(f"there is no test {sorted(unknown)[0]!r}.")
        columns = {n: [np.nan if v is None else v for v in c] for n, c in fields["columns"].items()}
        return cls(columns, notes=fields["notes"], info=fields["info"])

    def save(self, path: str | PathLike[str], name: str | None = None) -> None:
        """Write to JSON, or to the group ``/comparison/<name>`` of a store or a file of results.

        Args:
            path: The file; see :meth:`nad_attr.stats.results.Result.save`.
            name: Of the comparison; None: "comparison".

        Raises:
            GateStoreError: If the file is something else or cannot be written.
            OSError: If a JSON file cannot be written.
        """
        if is_json(path):
            return super().save(path)
        name = name or "comparison"
        write_result(path, f"comparison/{name}", *self.stored())

    def stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and attributes as :func:`nad_attr.store.write_result` takes them."""
        arrays: dict[str, Any] = {n: self.columns[n] for n in _TEXTS}
        arrays |= {n: np.asarray(self.columns[n], dtype=np.float64) for n in _NUMBERS if n != "q"}
        return arrays, {"notes": list(self.notes), "info": self.info}

    @classmethod
    def load(cls, path: str | PathLike[str], name: str | None = None) -> Comparison:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: If a JSON file holds no comparison.
            GateStoreError: If the file is missing, damaged or foreign, or holds no such result.

        Example:
            >>> import tempfile
            >>> from nad_attr.concepts import association
            >>> result = Comparison.of([association([True, False], [True, False])])
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     result.save(f"{folder}/results.h5")
            ...     Comparison.load(f"{folder}/results.h5") == result
            True
        """
        if is_json(path):
            return super().load(path)
        name = name or "comparison"
        arrays, about = read_result(path, f"comparison/{name}")
        try:
            columns = {key: list(value) for key, value in arrays.items()}
            return cls._of_fields({"columns": columns, **about})
        except (KeyError, TypeError, ValueError) as error:
            raise GateStoreError(
                f"{path}, '/comparison/{name}' holds no comparison: {error!r:.200}."
            ) from None
