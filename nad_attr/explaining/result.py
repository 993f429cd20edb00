"""The result of an explanation, in five lines and in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict_result import Verdict
from nad_attr.data.labels import Task
from nad_attr.evaluation.result import Evaluation
from nad_attr.gates.task_gates import TaskGates
from nad_attr.report.first import first_lines
from nad_attr.stats.results import Result

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Explanation"]

#: Parts that have a place of their own in the store.
_APART = ("gates", "certainty")


@dataclass(frozen=True, eq=False)
class Explanation(Result):
    """Which channels a network needs for some classes, and whether that is true.

    Made by :func:`nad_attr.explain`.

    Attributes:
        tasks: T tasks.
        task_names: Their names.
        n_left_out: Further classes of the data that were not explained.
        n_learned: Images that the gates were learned from.
        n_judged: Images that were kept apart to judge on.
        evaluation: Measures of each task's sub-architecture on these, beside random channels.
        verdict: Five tests of each.
        promised: ``{step: seconds}`` that each step was thought to take in this call; steps that
            an earlier call had done are not there.
        taken: ``{step: seconds}`` that each took.
        store: The file of the gates; empty: none was kept.
        page: The page; empty: none was written.
        gates: The gates; not saved with the result, for they are in ``store``.
        certainty: How sure each kept channel is, of some of the tasks; likewise.

    Example:
        >>> import torch
        >>> from nad_attr import Recipe, explain
        >>> from nad_attr.evaluation import planted
        >>> known = planted("plain", n_classes=2, width=24, n_images=40)
        >>> found = explain(known.model, known.data, recipe=Recipe(size=0.3, steps=4))
        >>> found.task_names, found.n_judged, found.gates.n_channels == found.verdict.n_channels
        (('0', '1'), 12, True)
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    n_left_out: int
    n_learned: int
    n_judged: int
    evaluation: Evaluation
    verdict: Verdict
    promised: Mapping[str, float]
    taken: Mapping[str, float]
    store: str = ""
    page: str = ""
    gates: TaskGates | None = field(default=None, repr=False)
    certainty: ChannelCertainty | None = field(default=None, repr=False)

    _AXES: ClassVar[Mapping[str, str]] = {"tasks": "T", "task_names": "T"}

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return {name: kind for name, kind in super()._types().items() if name not in _APART}

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in super()._fields().items() if name not in _APART}

    def frame(self) -> pd.DataFrame:
        """The verdict's table: one row per task and question.

        Raises:
            ImportError: If pandas is not installed.
        """
        return self.verdict.frame()

    def lines(self) -> list[str]:
        """Five lines: question, answer, certainty, comparison, and next step."""
        verdict = self.verdict
        lines = first_lines(
            self.task_names,
            verdict.n_kept.tolist(),
            verdict.n_channels,
            self.evaluation,
            verdict,
            self.certainty,
            n_left_out=self.n_left_out,
            n_learned=self.n_learned,
        )
        again = next(
            (t for t, row in zip(self.tasks, verdict.answers, strict=True) if "does not" in row),
            None,
        )
        worst = f" First look: {verdict.sentence(again)}" if again is not None else ""
        place = self.page or self.store
        see = f"{place}." if place else "verdict.summary()."
        return [f"{name}: {text}" for name, text in {**lines, "See": see + worst}.items()]

    def summary(self) -> str:
        """The five lines, see :meth:`lines`."""
        return "\n".join(self.lines())

    def plot(self, question: str = "sufficient", axes: Any = None) -> Figure:
        """See :meth:`nad_attr.Verdict.plot`."""
        return self.verdict.plot(question, axes)

    def __repr__(self) -> str:
        return f"Explanation({len(self.tasks)} tasks; {self.verdict!r})"
