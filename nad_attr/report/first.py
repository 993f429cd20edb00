"""The first screen: question, answer, certainty, comparison; and ten questions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict_result import QUESTIONS, Verdict
from nad_attr.evaluation.result import Evaluation
from nad_attr.gates.task_gates import TaskGates
from nad_attr.report.results import Results
from nad_attr.stats.tables import number

__all__ = ["NEWCOMERS", "Question", "first_lines", "newcomers_questions"]

#: A newcomer's questions, in this order: (name, question).
NEWCOMERS = (
    ("channel", "What is a channel, and what is a sub-architecture?"),
    ("which", "Which channels does the network need for a class?"),
    ("enough", "Are these channels enough?"),
    ("needed", "Does the class break without them?"),
    ("sure", "How sure is that?"),
    ("beside", "Compared with what?"),
    ("respond", "What do the kept channels respond to?"),
    ("place", "Where in the picture do they look?"),
    ("feeds", "Which channel feeds which?"),
    ("limits", "What can I not conclude, and how do I repeat this?"),
)
#: What channels "are shown to" do, "for so many classes".
_HOLDS = {
    "sufficient": "suffice",
    "necessary": "be needed",
    "specific": "be specific to the class",
    "minimal": "have few superfluous ones",
    "stable": "be found again",
}
#: Names that a sentence lists at most.
_NAMES = 4


class Question(NamedTuple):
    """A newcomer's question, its answer in words, and the section that shows it; empty: none."""

    name: str
    question: str
    answer: str
    section: str


def _counted(verdict: Verdict, question: str) -> str:
    """For how many of the classes that were asked an answer holds; empty: none was asked."""
    asked = [a for t in verdict.tasks if (a := verdict.answer(t, question)) != "not asked"]
    return f"{asked.count('holds'):,} of {len(asked):,}" if asked else ""


def _closed_one_by_one(found: ChannelCertainty, n_tasks: int) -> str:
    counts = np.sum([list(found.counts(task).values()) for task in found.tasks], axis=0)
    shares = (
        f"{100 * k / max(1, counts.sum()):.0f} % {name}"
        for name, k in zip(found.counts(found.tasks[0]), counts, strict=True)
    )
    few = len(found.tasks) < n_tasks
    of = f" of {len(found.tasks):,} of {n_tasks:,} classes" if few else ""
    return f"closed one by one, the kept channels{of} are {', '.join(shares)}"


def first_lines(
    names: Sequence[str],
    n_kept: Sequence[int],
    n_channels: int,
    evaluation: Evaluation | None,
    verdict: Verdict | None,
    certainty: ChannelCertainty | None,
    *,
    n_left_out: int = 0,
    n_learned: int | None = None,
) -> dict[str, str]:
    """The question, the answer, how sure it is, and what it was compared with: a sentence each.

    ``names`` and ``n_kept`` are of T classes; results are None if they were not measured.

    Example:
        >>> first_lines(["cat"], [3], 12, None, None, None)["Asked"]
        'which of 12 channels does the network need for one class (cat)?'
    """
    n = len(names)
    listed = ", ".join(names[:_NAMES]) + (f" and {n - _NAMES:,} more" if n > _NAMES else "")
    left = f"; {n_left_out:,} more left out" if n_left_out else ""
    kept = float(np.mean(n_kept))
    answer = f"about {kept:,.0f} channels each ({100 * kept / n_channels:.0f} %), which "
    if verdict is not None:
        counts = [f"{text} for {k}" for q, text in _HOLDS.items() if (k := _counted(verdict, q))]
        answer += f"are shown to {', to '.join(counts)}." if counts else "could not be tested."
    elif evaluation is not None:
        auc = number(evaluation.mean("own_auc"))
        answer += f"alone still tell the class's images from others (own AUC {auc})."
    else:
        answer += "were not measured: whether they do the class's work is not known."
    learned = f" kept apart from the {n_learned:,} learned from" if n_learned else ""
    sure = "no image was looked at."
    if evaluation is not None:
        sure = f"judged on {evaluation.n_images:,} images{learned}; "
        if verdict is None:
            sure += "nothing was tested."
        else:
            apart = [task for task in verdict.tasks if verdict.held_out_sentences(task)]
            sure += f"each answer is wrong by chance in at most {100 * verdict.level:g} % of cases"
            if apart:
                sure += f"; on images learned from it looks better for {len(apart):,} of {n:,}"
            if certainty is not None:
                sure += f"; {_closed_one_by_one(certainty, n)}"
            sure += "."
    beside = "nothing yet."
    if evaluation is not None:
        low, high = evaluation.interval("own_auc")
        draws = [draw.mean("own_auc") for draw in evaluation.random]
        random = f"random channels {number(float(np.mean(draws)))}, " if draws else ""
        beside = (
            f"own AUC {number(evaluation.mean('own_auc'))} (95 %: {number(low)} to "
            f"{number(high)}), {random}whole network "
            f"{number(evaluation.whole.mean('own_auc'))} (1: tells the class's images from all "
            "others, 0.5: guesses)."
        )
    return {
        "Asked": f"which of {n_channels:,} channels does the network need for "
        f"{'one class' if n == 1 else f'{n:,} classes'} ({listed}{left})?",
        "Answer": answer,
        "How sure": sure,
        "Compared with": beside,
    }


def newcomers_questions(
    gates: TaskGates, results: Results, lines: Mapping[str, str], missing: Mapping[str, str]
) -> list[Question]:
    """The ten questions with what this page knows of them.

    ``lines`` is from :func:`first_lines`, ``missing`` is ``{section: how to add it}``.
    """
    verdict, evaluation, sure = results.verdict, results.evaluation, results.certainty
    n = len(gates)

    def tested(question: str, what: str, value: str, base: str) -> str:
        if verdict is None or not (counted := _counted(verdict, question)):
            return f"Not tested. {missing['verdict']}"
        q = QUESTIONS.index(question)
        of = [t for t, row in enumerate(verdict.answers) if row[q] != "not asked"]
        mine, theirs = (
            number(float(np.nanmean(x[of, q]))) for x in (verdict.value, verdict.baseline)
        )
        return f"{what} for {counted} classes: {value} {mine}, {base} {theirs}, in the mean."

    fidelity = " Fidelity is the share of the changes of the class's output that stays (1: all)."
    answers = {
        "channel": "A channel is one feature map of a layer: the answers of one learned detector "
        "at every place of the picture. A sub-architecture is the network with only some channels "
        "open. Every other channel is closed: one number replaces it, its mean, zero, or the "
        "best constant.",
        "which": f"{lines['Answer'][0].upper()}{lines['Answer'][1:]} The architecture view shows "
        "them, class by class.",
        "enough": tested(
            "sufficient",
            "With all other channels closed, the class's output is shown to stay",
            "fidelity",
            "with random channels",
        )
        + fidelity,
        "needed": tested(
            "necessary",
            "With these channels closed and all others open, the class is shown to break",
            "own AUC",
            "without as many random channels",
        ),
        "sure": f"{lines['How sure'][0].upper()}{lines['How sure'][1:]}"
        + (
            " Point at a kept channel in the architecture view to see how often it is chosen again."
            if sure is not None
            else f" Single channels: {missing['certainty']}"
        ),
        "beside": f"{lines['Compared with'][0].upper()}{lines['Compared with'][1:]} There are as "
        "many random channels. Other methods are shown if they were run.",
        "respond": "The images that each kept channel responds to most are below, class by class."
        if "top" in (results.pictures or {})
        else f"Not looked at. {missing['pictures']}",
        "place": "Some of its images are coloured where the kept channels speak for the class."
        if results.where
        else f"Not looked at. {missing['where']}",
        "feeds": "Choose a channel in the flow to trace what feeds it and what it feeds."
        if results.flow is not None
        else f"Not measured. {missing['flow']}",
        "limits": "You cannot conclude that no other set of channels works as well, that a channel "
        "means what its pictures show, or that the same holds for pictures of another kind. "
        "A class that is judged on few images is judged roughly. The end of the page says "
        "where everything comes from, and has the commands that add what is missing.",
    }
    sections = {
        "which": "architecture",
        "enough": "numbers",
        "needed": "numbers",
        "sure": "numbers" if evaluation is not None else "",
        "beside": "measured" if evaluation is not None else "",
        "respond": "channels" if results.pictures is not None else "",
        "place": "where" if results.where else "",
        "feeds": "flow" if results.flow is not None else "",
        "limits": "provenance",
        "channel": "architecture" if n else "",
    }
    return [Question(name, said, answers[name], sections[name]) for name, said in NEWCOMERS]
