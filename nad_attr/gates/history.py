"""Learning curves: one number per step and task for each quantity."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nad_attr.stats.results import Result
from nad_attr.stats.tables import nan_mean, number, pandas, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["History"]


class History(Result, Mapping[str, npt.NDArray[np.float32]]):
    """Learning curves, ``{quantity: float32 (steps, T)}``.

    A task with fewer steps than others has NaN in the rest of its column.

    Args:
        curves: The curves, all of one shape.

    Raises:
        TypeError: If ``curves`` is not a mapping.
        ValueError: If the curves have different shapes or are not numbers.

    Example:
        >>> history = History({"loss": np.array([[1.0, 2.0], [0.5, 1.5]])})
        >>> history["loss"][-1].tolist()
        [0.5, 1.5]
        >>> history
        History(2 steps, 2 tasks: loss)
    """

    def __init__(self, curves: Mapping[str, npt.ArrayLike]) -> None:
        if not isinstance(curves, Mapping):
            raise TypeError(f"curves must be {{quantity: numbers}}, got {type(curves).__name__}.")
        self._curves = {}
        for name, curve in curves.items():
            try:
                self._curves[name] = np.atleast_2d(np.asarray(curve, np.float32))
            except (TypeError, ValueError) as error:
                raise ValueError(f"curve {name!r} is not a table of numbers: {error}.") from None
        shapes = {curve.shape for curve in self._curves.values()}
        if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"curves must all have shape (steps, tasks), got {sorted(shapes)}.")

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        return self._curves[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._curves)

    def __len__(self) -> int:
        return len(self._curves)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, History):
            return NotImplemented
        return self._curves.keys() == other._curves.keys() and all(
            np.array_equal(curve, other[name], equal_nan=True)
            for name, curve in self._curves.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def select(self, rows: Sequence[int]) -> History:
        """The curves of some of the tasks."""
        return History({name: curve[:, list(rows)] for name, curve in self._curves.items()})

    def frame(self) -> pd.DataFrame:
        """One row per step and task, one column per quantity, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        steps, tasks = self._shape
        columns = {"step": np.repeat(np.arange(steps), tasks), "task": [*range(tasks)] * steps}
        curves = {name: curve.ravel() for name, curve in self.items()}
        return pandas("History.frame()").DataFrame(columns | curves)

    def summary(self) -> str:
        """The mean over tasks of each quantity at the first and the last step, as plain text."""
        rows = [["mean over tasks", "first step", "last step"]]
        for name, curve in self.items():
            ends = nan_mean(curve[[0, -1]].T.astype(np.float64)) if len(curve) else (np.nan,) * 2
            rows.append([name, *map(number, ends)])
        return "\n".join([repr(self), *table(rows)])

    @property
    def _shape(self) -> tuple[int, int]:
        steps, tasks = next(iter(self._curves.values())).shape if self._curves else (0, 0)
        return steps, tasks

    @classmethod
    def _kind(cls) -> str:
        return "learning_history"  # stores use "history" for the history of each task

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return {"curves": dict[str, npt.NDArray[np.float32]]}

    def _fields(self) -> dict[str, Any]:
        return {"curves": self._curves}

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> History:
        return cls(fields["curves"])

    def plot(self) -> Figure:
        """Draw one panel per quantity: one line per task, and their mean in black.

        Quantities that are known at one step only are left out.

        Returns:
            A matplotlib figure, not shown.

        Raises:
            ImportError: If matplotlib is missing (``pip install nad-attr[plot]``).
        """
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise ImportError("plotting needs matplotlib: pip install 'nad-attr[plot]'") from None
        # A quantity that is known only at the end has no curve.
        shown = {
            name: curve
            for name, curve in self._curves.items()
            if np.isfinite(curve).any(axis=1).sum() >= min(2, len(curve))
        }
        figure = Figure(figsize=(4 * max(1, len(shown)), 3), layout="constrained")
        for i, (name, curve) in enumerate(shown.items()):
            axes = figure.add_subplot(1, len(shown), i + 1)
            axes.plot(curve, color="0.75", linewidth=0.8)
            axes.plot(nan_mean(curve.T.astype(np.float64)), color="black", linewidth=1.5)
            axes.set_xlabel("step")
            axes.set_title(name.replace("_", " "))
        return figure

    def __repr__(self) -> str:
        steps, tasks = self._shape
        return f"History({steps} steps, {tasks} tasks: {', '.join(self._curves)})"
