"""What an explanation says, in five lines and in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from nad_attr.certainty.verdict_result import Verdict
from nad_attr.data.labels import Task
from nad_attr.evaluation.result import Evaluation
from nad_attr.gates.task_gates import TaskGates
from nad_attr.stats.results import Result
from nad_attr.stats.tables import number

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Explanation"]

#: Names that a sentence lists at most.
_NAMES = 4


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

    _AXES: ClassVar[Mapping[str, str]] = {"tasks": "T", "task_names": "T"}

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return {name: kind for name, kind in super()._types().items() if name != "gates"}

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in super()._fields().items() if name != "gates"}

    def frame(self) -> pd.DataFrame:
        """The verdict's table: one row per task and question.

        Raises:
            ImportError: If pandas is not installed.
        """
        return self.verdict.frame()

    def lines(self) -> list[str]:
        """Five lines: question, answer, certainty, comparison, and next step."""
        verdict, evaluation = self.verdict, self.evaluation
        n = len(self.tasks)
        listed = ", ".join(self.task_names[:_NAMES])
        listed += f" and {n - _NAMES} more" if n > _NAMES else ""
        left = f"; {self.n_left_out:,} more left out" if self.n_left_out else ""
        kept = float(np.mean(verdict.n_kept))
        counts = []
        for question, text in (
            ("sufficient", "suffice"),
            ("necessary", "are needed"),
            ("specific", "are specific to the class"),
            ("minimal", "are hardly too many"),
            ("stable", "are found again"),
        ):
            given = [row for row in map(lambda t: verdict.answer(t, question), self.tasks)]
            asked = [answer for answer in given if answer != "not asked"]
            if asked:
                counts.append(f"{text} for {asked.count('holds')} of {len(asked)}")
        beside = [draw.mean("own_auc") for draw in evaluation.random]
        random = f"random channels {number(float(np.mean(beside)))}, " if beside else ""
        low, high = evaluation.interval("own_auc")
        apart = [t for t in self.task_names if verdict.held_out_sentences(t)]
        place = self.page or self.store
        again = next(
            (task for task, row in zip(self.task_names, verdict.answers, strict=True)
             if "does not" in row), None
        )  # fmt: skip
        worst = f" First look: {verdict.sentence(again)}" if again is not None else ""
        return [
            f"Asked: which of {verdict.n_channels:,} channels does the network need for "
            f"{'one class' if n == 1 else f'{n} classes'} ({listed}{left})?",
            f"Answer: about {kept:,.0f} channels each ({100 * kept / verdict.n_channels:.0f} %), "
            f"which {', '.join(counts) or 'nothing could be asked of'}.",
            f"How sure: judged on {self.n_judged:,} images kept apart from the {self.n_learned:,} "
            f"learned from; each answer is wrong by chance in at most {100 * verdict.level:g} % of "
            "cases"
            + (f"; on images learned from it looks better for {len(apart)} of {n}." if apart
               else "."),
            f"Compared with: own AUC {number(evaluation.mean('own_auc'))} (95 %: {number(low)} to "
            f"{number(high)}), {random}whole network "
            f"{number(evaluation.whole.mean('own_auc'))} (1: tells the class's images from all "
            "others, 0.5: guesses).",
            (f"See: {place}." if place else "See: verdict.summary().") + worst,
        ]  # fmt: skip

    def summary(self) -> str:
        """The five lines, see :meth:`lines`."""
        return "\n".join(self.lines())

    def plot(self, question: str = "sufficient", axes: Any = None) -> Figure:
        """See :meth:`nad_attr.Verdict.plot`."""
        return self.verdict.plot(question, axes)

    def __repr__(self) -> str:
        return f"Explanation({len(self.tasks)} tasks; {self.verdict!r})"
