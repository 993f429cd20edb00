"""The verdict: what was asked of each task's sub-architecture, the numbers, and what they say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nad_attr._display import html_table
from nad_attr.data.labels import Task
from nad_attr.stats.held_out import apart
from nad_attr.stats.results import Result
from nad_attr.stats.tables import number, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ANSWERS", "QUESTIONS", "Verdict"]

FloatArray: TypeAlias = NDArray[np.float64]

#: What is asked of a sub-architecture, in this order.
QUESTIONS = ("sufficient", "necessary", "specific", "minimal", "stable")
#: What can be answered. "not asked": what the question needs was not given, or is not there.
ANSWERS = ("holds", "does not", "not asked")

#: Each question's number, in words: what it is, and what the baseline is.
_NUMBERS = {
    "sufficient": ("fidelity", "random channels"),
    "necessary": ("own AUC without them", "without random ones"),
    "specific": ("other tasks' rank fidelity without them", "without random ones"),
    "minimal": ("share of kept channels with an effect", "asked for"),
    "stable": ("agreement with other runs", "random channels"),
}
_YES = {
    "sufficient": "these channels suffice",
    "necessary": "the network needs them for it",
    "specific": "other tasks need them less than random channels",
    "minimal": "hardly any of them is superfluous",
    "stable": "other runs find them again",
}
_NO = {
    "sufficient": "these channels are not shown to suffice",
    "necessary": "the network is not shown to need them",
    "specific": "other tasks are not shown to be spared without them",
    "minimal": "some of them may be superfluous",
    "stable": "other runs do not find enough of them again",
}


def _p(value: float) -> str:
    return "" if np.isnan(value) else f", p = {value:.2g}"


@dataclass(frozen=True, eq=False)
class Verdict(Result):
    """What tests say of each task's sub-architecture. Made by :func:`nad_attr.verdict`.

    Each answer is a test of its own: where nothing is to be found, each question is answered with
    "holds" at most with probability ``level``. So of many tasks some hold by chance.

    Attributes:
        tasks: T tasks.
        task_names: Their names.
        n_kept: int64 (T,), kept channels.
        n_channels: All channels; a group of channels counts once.
        n_images: int64 (T,), held-out images that each task was judged on.
        level: Error rate of each answer.
        n_random: Random architectures that each task was held against.
        answers: T times Q texts, "holds", "does not" or "not asked", for each of ``QUESTIONS``.
        value: float64 (T, Q), each question's number: the fidelity (sufficient); the own AUC of
            the network without these channels (necessary); the mean rank correlation of the other
            tasks' outputs with those of the whole network, without these channels (specific); the
            share of the tested kept channels whose closing has an effect (minimal); agreement with
            other runs, corrected for chance (stable). NaN: not asked.
        low: float64 (T, Q), lower end of its 95 % interval; NaN: unknown.
        high: float64 (T, Q), upper end.
        baseline: float64 (T, Q), what random channels give, as many at each site; for "minimal"
            the share that is asked for.
        p: float64 (T, Q), the largest p-value of the tests that the answer needs; NaN: none.
        measures: ``{name: float64 (T,)}``, further numbers: ``own_auc``, ``own_auc_low``,
            ``own_auc_high``, ``random_own_auc``, ``whole_auc``, and the same on images that the
            gates were learned from: ``learned_own_auc``, ``learned_fidelity``,
            ``learned_whole_auc``; the intervals of the differences, ``own_auc_gap_low``,
            ``own_auc_gap_high``, ``fidelity_gap_low``, ``fidelity_gap_high``; ``learned_n_own``.
        notes: ``{task name: texts}``, why something was not asked.

    Example:
        >>> nan = np.full((1, 5), np.nan)
        >>> value = np.array([[0.8, 0.5, np.nan, np.nan, np.nan]])
        >>> answers = (("holds", "does not", "not asked", "not asked", "not asked"),)
        >>> result = Verdict((3,), ("cat",), np.array([7]), 20, np.array([90]), 0.05, 19, answers,
        ...     value, nan, nan, nan, nan, {}, {})
        >>> result.answer("cat", "sufficient"), result.holds("sufficient").tolist()
        ('holds', [True])
        >>> print(result.sentence("cat"))
        cat (7 of 20 channels): these channels suffice; but the network is not shown to need them.
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    n_kept: NDArray[np.int64]
    n_channels: int
    n_images: NDArray[np.int64]
    level: float
    n_random: int
    answers: tuple[tuple[str, ...], ...]
    value: FloatArray
    low: FloatArray
    high: FloatArray
    baseline: FloatArray
    p: FloatArray
    measures: Mapping[str, FloatArray] = field(default_factory=dict)
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    _AXES: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tasks", "task_names", "n_kept", "n_images", "measures"), "T"),
        "answers": "T",
        **dict.fromkeys(("value", "low", "high", "baseline", "p"), "T Q"),
    }

    def __post_init__(self) -> None:
        for row in self.answers:
            if len(row) != len(QUESTIONS) or not set(row) <= set(ANSWERS):
                raise ValueError(f"answers must be {len(QUESTIONS)} of {ANSWERS}, got {row}.")

    def index(self, task: object) -> int:
        """Row of a task, given as class index, group of class indices, or name.

        Raises:
            KeyError: If there is no such task.
        """
        for known in (self.tasks, self.task_names):
            if task in known:
                return known.index(task)
        raise KeyError(f"no task {task!r}; there are {list(self.task_names[:10])}.")

    def answer(self, task: object, question: str) -> str:
        """One answer.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such question.
        """
        return self.answers[self.index(task)][_column(question)]

    def holds(self, question: str | None = None) -> NDArray[np.bool_]:
        """Bool (T,): whether the answer is "holds"; None: to all questions that were asked.

        Raises:
            ValueError: If there is no such question.
        """
        if question is not None:
            return np.array([row[_column(question)] == "holds" for row in self.answers])
        return np.array(
            ["holds" in row and "does not" not in row for row in self.answers], dtype=np.bool_
        )

    def sentence(self, task: object) -> str:
        """What is to be said of a task, in one sentence.

        Raises:
            KeyError: If there is no such task.
        """
        t = self.index(task)
        row = dict(zip(QUESTIONS, self.answers[t], strict=True))
        yes = [_YES[q] for q, answer in row.items() if answer == "holds"]
        no = [_NO[q] for q, answer in row.items() if answer == "does not"]
        said = "; but ".join(_listed(part) for part in (yes, no) if part)
        about = f"{self.task_names[t]} ({self.n_kept[t]:,} of {self.n_channels:,} channels)"
        return f"{about}: {said or 'nothing could be asked'}."

    def held_out_sentences(self, task: object) -> list[str]:
        """Where measures on images learned from and on held-out ones part, and what would help.

        Raises:
            KeyError: If there is no such task.
        """
        t = self.index(task)
        found = {name: float(values[t]) for name, values in self.measures.items()}
        if "learned_own_auc" not in found:
            return []
        measured = {"own_auc": found["own_auc"], "fidelity": float(self.value[t, 0])}
        return apart(
            {m: found[f"learned_{m}"] for m in measured},
            measured,
            {m: (found[f"{m}_gap_low"], found[f"{m}_gap_high"]) for m in measured},
            whole=(found["learned_whole_auc"], found["whole_auc"]),
            n_own=int(found["learned_n_own"]),
            size=self.n_kept[t] / self.n_channels,
        )

    def frame(self) -> pd.DataFrame:
        """One row per task and question, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        rows = [
            {
                "task": task,
                "name": self.task_names[t],
                "question": question,
                "answer": self.answers[t][q],
                "number": _NUMBERS[question][0],
                **{
                    name: float(getattr(self, name)[t, q])
                    for name in ("value", "low", "high", "baseline", "p")
                },
            }
            for t, task in enumerate(self.tasks)
            for q, question in enumerate(QUESTIONS)
        ]
        return pandas("Verdict.frame()").DataFrame(rows)

    def explained(self, task: object) -> list[str]:
        """A line for each question, with its numbers, for a task.

        Raises:
            KeyError: If there is no such task.
        """
        t = self.index(task)
        lines = []
        for q, question in enumerate(QUESTIONS):
            answer, (what, beside) = self.answers[t][q], _NUMBERS[question]
            if answer == "not asked":
                lines.append(f"{question}: not asked")
                continue
            span = ""
            if not np.isnan(self.low[t, q]):
                span = f" (95 %: {number(self.low[t, q])} to {number(self.high[t, q])})"
            lines.append(
                f"{question}: {answer}; {what} {number(self.value[t, q])}{span}, "
                f"{beside} {number(self.baseline[t, q])}{_p(self.p[t, q])}"
            )
        return lines

    def summary(self, *, max_tasks: int = 20) -> str:
        """Plain sentences: a task after the other, with the numbers below.

        Args:
            max_tasks: Tasks that are listed one by one, at most.
        """
        lines = [
            f"The verdict on {len(self.tasks)} task{'s' * (len(self.tasks) != 1)}, beside "
            f"{self.n_random} random choices of as many channels at each site",
            f"(each answer is wrong by chance in at most {100 * self.level:g} % of cases)",
        ]
        for name in self.task_names[:max_tasks]:
            lines += ["", self.sentence(name)]
            lines += [f"  {line}" for line in self.explained(name)]
            lines += [f"  {line}" for line in self.held_out_sentences(name)]
            lines += [f"  {line}" for line in self.notes.get(name, ())]
        if len(self.tasks) > max_tasks:
            rows = [["question", "holds", "does not", "not asked"]]
            for q, question in enumerate(QUESTIONS):
                given = [row[q] for row in self.answers]
                rows.append([question, *(str(given.count(answer)) for answer in ANSWERS)])
            lines += ["", f"and {len(self.tasks) - max_tasks} more; of all tasks:", *table(rows)]
        return "\n".join(map(shown, lines))

    def plot(self, question: str = "sufficient", axes: Any = None) -> Figure:
        """One question's number for each task with its interval, and beside it random channels'.

        Args:
            question: One of ``QUESTIONS``.
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such question.
        """
        from nad_attr.plots.style import plot_intervals

        q = _column(question)
        rows: dict[str, tuple[float, float, float]] = {}
        for t, name in enumerate(self.task_names):
            value = float(self.value[t, q])
            ends = [float(x[t, q]) for x in (self.low, self.high)]
            low, high = (value if np.isnan(end) else end for end in ends)
            rows[name] = (value, low, high)
            base = float(self.baseline[t, q])
            rows[f"{name}: {_NUMBERS[question][1]}"] = (base, base, base)
        return plot_intervals(rows, _NUMBERS[question][0], axes=axes)

    def _derived(self) -> dict[str, Any]:
        return {
            "questions": list(QUESTIONS),
            "sentences": [self.sentence(task) for task in self.tasks],
            "learned_and_held_out": [self.held_out_sentences(task) for task in self.tasks],
        }

    def _repr_html_(self) -> str:
        """How notebooks show it: an answer for each task and question."""
        rows = [
            [name, f"{kept:,}", *row]
            for name, kept, row in zip(self.task_names, self.n_kept, self.answers, strict=True)
        ]
        return html_table(
            "Verdict",
            ["task", "kept channels", *(f"{question}?" for question in QUESTIONS)],
            rows[:_SHOWN],
            note=" ".join(self.sentence(task) for task in self.tasks[:_SHOWN])
            + (f" And {len(rows) - _SHOWN} more tasks." if len(rows) > _SHOWN else ""),
        )

    def __repr__(self) -> str:
        found = ", ".join(f"{question} {int(self.holds(question).sum())}" for question in QUESTIONS)
        return f"Verdict({len(self.tasks)} tasks; holds: {found})"


#: Tasks that a notebook shows.
_SHOWN = 12


def _column(question: str) -> int:
    if question not in QUESTIONS:
        raise ValueError(f"no question {question!r}; there are {', '.join(QUESTIONS)}.")
    return QUESTIONS.index(question)


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
