"""The contents of a page, from the gates, the store and the results, as plain values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np
import torch

from nad_attr._version import __version__
from nad_attr.certainty.verdict_result import Verdict
from nad_attr.evaluation.result import Evaluation
from nad_attr.gates.channels import n_gates
from nad_attr.gates.task_gates import TaskGates
from nad_attr.report.first import Question, first_lines, newcomers_questions
from nad_attr.report.overlaps import overlaps_part
from nad_attr.report.packing import MAX_GATES_OF_EIGHT_BITS, gate_levels, text64
from nad_attr.report.parts import SHOWN, certainty_part, evaluation_part, history_part
from nad_attr.report.results import Results

__all__ = ["BROKEN", "Contents", "Results", "check_parts", "contents", "not_there", "summary"]


#: Errors that malformed results of a file may raise, wherever they are first read.
BROKEN = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


@dataclass(frozen=True)
class Contents:
    """A page's contents: ``data`` for its program, a line of base64 in ``gates`` for each task."""

    title: str
    first: dict[str, str]
    questions: list[Question]
    sentences: list[str]
    verdict: list[list[str]]
    where: list[dict[str, Any]]
    facts: list[tuple[str, str]]
    missing: list[tuple[str, str]]
    data: dict[str, Any]
    gates: list[str]
    statistics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def contents(
    gates: TaskGates,
    results: Results,
    *,
    title: str | None = None,
    file: str | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Contents:
    """Put together what a page says; ``file`` is the store's name for the commands on the page."""
    origin = provenance or {}
    names = [str(name) for name in gates.task_names or map(str, gates.tasks)]
    values = {site.name: gates[site.name] for site in gates.sites}
    masks = {name: value > 0.5 for name, value in values.items()}
    counts = torch.stack([mask.sum(1) for mask in masks.values()], dim=1)
    everything = torch.cat(list(values.values()), dim=1).numpy()
    bits = 8 if everything.size <= MAX_GATES_OF_EIGHT_BITS else 4
    levels = gate_levels(everything, bits)
    evaluation = results.evaluation
    part, sentences = None, summary(gates, None)
    if evaluation is not None:
        try:
            part = evaluation_part(evaluation, gates.tasks)
            sentences = summary(gates, evaluation)
        except BROKEN as error:
            results.notes.append(f"No evaluation: it cannot be shown ({error!r:.200}).")
            part = results.evaluation = None
    sure = None
    if results.certainty is not None:
        try:
            sure = certainty_part(results.certainty, gates)
        except BROKEN as error:
            results.notes.append(f"No certainty: {error}.")
            results.certainty = None
    answers: list[list[str]] = []
    if results.verdict is not None:
        try:
            sentences = [*sentences, *_of_verdict(results.verdict)]
            answers = _answers(results.verdict)
        except BROKEN as error:
            results.notes.append(f"No verdict: it cannot be shown ({error!r:.200}).")
            results.verdict = None
    made = title or _network(origin) or file or "sub-architectures"
    data = {
        "title": made,
        "tasks": names,
        "indices": [json.dumps(task) for task in gates.tasks],
        "sites": [[site.name, site.n_channels] for site in gates.sites],
        "bits": bits,
        "counts": text64(counts.numpy().astype(np.uint32)),
        "measures": SHOWN,
        "evaluation": part,
        "certainty": sure,
        "overlaps": overlaps_part(masks),
        "history": history_part(gates.history, len(gates)),
        "curves": results.curves,
        "mosaics": results.mosaics,
        "errors": results.errors,
        "flow": results.flow,
        "pictures": results.pictures,
        "export": results.export,
        "units": results.units,
    }
    facts = _facts(gates, origin, file, results, bits)
    kept = torch.cat(list(masks.values()), dim=1).sum(1).tolist()
    told = origin.get("explain")
    split = told.get("split") if isinstance(told, dict) else None
    split = split if isinstance(split, dict) else {}
    first = first_lines(
        names,
        kept,
        gates.n_channels,
        results.evaluation,
        results.verdict,
        results.certainty,
        **{key: n for key, n in split.items() if key in _SPLIT and isinstance(n, int)},
    )
    file = file or "GATES.h5"
    lacking = not_there(gates, results, file)
    return Contents(
        made,
        first,
        newcomers_questions(gates, results, first, _how(file)),
        sentences,
        answers,
        results.where or [],
        facts,
        lacking,
        data,
        [text64(row) for row in levels],
        results.statistics,
        results.notes,
    )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _number(value: float) -> str:
    return "unknown" if math.isnan(value) else f"{value:.2f}"


def summary(gates: TaskGates, evaluation: Evaluation | None) -> list[str]:
    """The numbers that matter, in sentences.

    Recall comes with the false-positive rate, and both with what random channels and the best rival
    of the same size reach.

    Example:
        >>> from nad_attr.sites import GateSite
        >>> gates = TaskGates({"a": torch.tensor([[0.9, 0.2]])}, [GateSite("a", 2)], [7])
        >>> print(summary(gates, None)[0])
        For 1 class, the gates keep 1 of 2 channels (50 %) at 1 site.
    """
    kept = [arch.n_kept for arch in gates.sub_architectures()]
    mean, n = sum(kept) / len(kept), n_gates(gates.sites)
    kinds = sorted({site.units for site in gates.sites})
    called = "channels" if n == gates.n_channels and kinds != ["neurons"] else " and ".join(kinds)
    if any(s.units == "channels" and s.groups is not None for s in gates.sites):
        called = "groups of channels" if kinds == ["channels"] else "units"
    what = f"{len(gates):,} class" + ("es" if len(gates) != 1 else "")
    each = "" if len(gates) == 1 else "each of "
    between = "" if min(kept) == max(kept) else f" on average ({min(kept):,} to {max(kept):,})"
    first = (
        f"For {each}{what}, the gates keep {mean:,.0f} of {n:,} {called} "
        f"({_percent(mean / n)}){between} at {len(gates.sites)} "
        f"site{'s' if len(gates.sites) != 1 else ''}."
    )
    if evaluation is None:
        return [first, "Whether these channels do the class's work was not measured."]
    of = "" if len(evaluation.tasks) == len(gates) else f" ({len(evaluation.tasks):,} of them)"

    def compared(measure: str, *, whole: bool) -> str:
        parts = []
        if evaluation.random:
            random = float(np.mean([draw.mean(measure) for draw in evaluation.random]))
            parts.append(f"random channels {_number(random)}")
        rivals = [(r.mean(measure), name) for name, r in evaluation.rivals.items()]
        found = max((rival for rival in rivals if not math.isnan(rival[0])), default=None)
        if found is not None:
            parts.append(f"best rival, {found[1]}, {_number(found[0])}")
        if whole and evaluation.whole is not evaluation:
            parts.append(f"whole network {_number(evaluation.whole.mean(measure))}")
        return f" ({'; '.join(parts)})" if parts else ""

    mean_of = evaluation.mean
    measured_size = mean_of("size")
    if abs(measured_size - mean / n) > 0.005 and not of:
        of = f" and cut at {_percent(measured_size)} of the channels"
    second = (
        f"On {evaluation.n_images:,} held-out images{of}, the class's output still tells its "
        f"images from others with own AUC {_number(mean_of('own_auc'))}"
        f"{compared('own_auc', whole=True)}, and follows the whole network's output with fidelity "
        f"{_number(mean_of('fidelity'))}{compared('fidelity', whole=False)}."
    )
    third = (
        f"As a classifier, recall is {_number(mean_of('recall'))} at a false-positive rate of "
        f"{_number(mean_of('fpr'))}: balanced accuracy {_number(mean_of('ba'))}"
        f"{compared('ba', whole=True)}."
    )
    return [first, second, third, *evaluation.held_out_sentences()]


#: Tasks whose verdict is told in sentences, and in the table, at most.
_JUDGED, _ANSWERED = 12, 200
#: Numbers that ``explain`` stores about its split of the images.
_SPLIT = ("n_left_out", "n_learned")


def _answers(verdict: Verdict) -> list[list[str]]:
    """The name of each class, and yes, no or None for each of the verdict's questions."""
    words = {"holds": "yes", "does not": "not shown", "not asked": "–"}
    return [
        [name, f"{int(kept):,}", *(words[answer] for answer in row)]
        for name, kept, row in zip(
            verdict.task_names[:_ANSWERED], verdict.n_kept, verdict.answers, strict=False
        )
    ]


def _how(file: str) -> dict[str, str]:
    """How to add what a newcomer's question asks for."""
    measured = f"To add it: nad-attr report {file} --data HELD_OUT"
    tests = f"nad-attr verdict {file} --held-out HELD_OUT --out {file}"
    sure = f"nad-attr certainty {file} --held-out HELD_OUT --out {file}"
    return {
        **dict.fromkeys(("pictures", "where", "flow"), measured),
        "verdict": f"To add it: {tests}",
        "certainty": f"to add it: {sure}",
    }


def _of_verdict(verdict: Verdict) -> list[str]:
    """The verdict on each task, and where learned from and held out part."""
    said = [f"The verdict, at an error rate of {_percent(verdict.level)} for each answer:"]
    for task in verdict.tasks[:_JUDGED]:
        numbers = f"In numbers: {'; '.join(verdict.explained(task))}."
        parts = [verdict.sentence(task), *verdict.held_out_sentences(task), numbers]
        said.append(" ".join(parts))
    if len(verdict.tasks) > _JUDGED:
        holding = int(verdict.holds().sum())
        said.append(f"All that was asked holds for {holding} of {len(verdict.tasks):,} classes.")
    return said


def _network(origin: Mapping[str, Any]) -> str:
    """The network's name, with the file of its weights if they came from one."""
    model, weights = str(origin.get("model") or ""), origin.get("weights")
    if not model or not weights:
        return model
    # ":none" says that the library's own weights are not loaded: no news where others are.
    return f"{model.removesuffix(':none')} with {PurePath(str(weights)).name}"


def _facts(
    gates: TaskGates, origin: Mapping[str, Any], file: str | None, results: Results, bits: int
) -> list[tuple[str, str]]:
    environment = origin.get("environment")
    environment = environment if isinstance(environment, dict) else {}
    n_images = origin.get("n_images")
    learned = origin.get("data")
    if learned and isinstance(n_images, int):
        learned = f"{learned} ({n_images:,} images)"
    evaluation = results.evaluation
    found = [
        ("file", file),
        ("network", origin.get("model")),
        ("weights", origin.get("weights")),
        ("hash of the weights", origin.get("model_hash")),
        ("learned from", learned),
        ("hash of the images", origin.get("data_fingerprint")),
        ("recipe", None if gates.recipe is None else repr(gates.recipe)),
        ("closed channels", gates.closed_at),
        ("seed", origin.get("seed")),
        ("device", origin.get("device")),
        (
            "measured",
            None
            if evaluation is None
            else f"{results.evaluation_from or 'evaluation'}: {evaluation.n_images:,} images, "
            f"{len(evaluation.tasks):,} tasks, {len(evaluation.random)} random draws",
        ),
        ("learned with", ", ".join(f"{k} {environment[k]}" for k in environment) or None),
        ("this page", f"nad_attr {__version__}; gates in {bits} bits"),
    ]
    return [(name, str(value)) for name, value in found if value not in (None, "")]


def not_there(gates: TaskGates, results: Results, file: str) -> list[tuple[str, str]]:
    """What a page cannot show, and how to get it."""
    measured = f"nad-attr report {file} --data HELD_OUT"
    with_images = f"--held-out HELD_OUT --out {file}"
    r, evaluation = results, results.evaluation
    parts = (
        (
            evaluation is None,
            "recall, false-positive rate, AUC, fidelity",
            f"nad-attr evaluate {file} --data HELD_OUT --out {file}",
        ),
        (r.verdict is None, "a verdict on each class", f"nad-attr verdict {file} {with_images}"),
        (
            evaluation is not None and not evaluation.rivals,
            "other methods at equal size",
            f"{measured} --with taylor --with neuron-mct",
        ),
        (
            r.certainty is None,
            "how sure each channel is, and whether it is needed",
            f"nad-attr certainty {file} {with_images}",
        ),
        (r.curves is None, "keep and ablate curves", measured),
        (r.mosaics is None and len(gates) >= 4, "mosaics", measured),
        (r.errors is None and len(gates) >= 3, "errors and why they were made", measured),
        (r.flow is None, "what flows between channels", measured),
        (r.pictures is None, "pictures of what channels respond to", measured),
        (r.where is None, "where in the image the kept channels speak for the class", measured),
        (r.export is None, "what a class's network alone costs", measured),
        (
            r.units is None,
            "concepts of channels",
            f'dissect(...).save("{file}") of nad_attr.concepts',
        ),
        (
            not r.statistics,
            "statistics of gates against concepts",
            f'compare("{file}", units).save("{file}") of nad_attr.concepts',
        ),
    )
    return [(what, how) for lacks, what, how in parts if lacks]


def check_parts(found: Mapping[str, Any], names: Sequence[str]) -> None:
    """Refuse a saved part that lacks a name that the page reads.

    Raises:
        ValueError: If it lacks one.
    """
    for name in names:
        if name not in found:
            raise ValueError(f"{name!r} is missing")
