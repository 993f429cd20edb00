"""The parts of results that a page shows: plain lists and numbers, ready for JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.testing import LABELS
from nad_attr.concepts import Comparison
from nad_attr.data.labels import Task
from nad_attr.evaluation.questions.error_study import ErrorStudy
from nad_attr.evaluation.questions.mosaic_result import MosaicResult
from nad_attr.evaluation.result import Evaluation
from nad_attr.evaluation.sweeps.curves import Curves
from nad_attr.flow.links import TaskFlow
from nad_attr.flow.picture import flow_picture
from nad_attr.flow.result import InformationFlow, task_flows
from nad_attr.gates.history import History
from nad_attr.gates.task_gates import TaskGates
from nad_attr.report.packing import plain, text64
from nad_attr.stats.tables import nan_mean

__all__ = [
    "SHOWN",
    "certainty_part",
    "curves_part",
    "errors_part",
    "evaluation_part",
    "flow_part",
    "history_part",
    "mosaics_part",
    "statistics_part",
]

#: Measures that the page shows, and how they are called there.
SHOWN = {
    "size": "size",
    "own_auc": "own AUC",
    "other_auc": "other AUC",
    "fidelity": "fidelity",
    "target_r2": "R² of targets",
    "recall": "recall",
    "fpr": "FPR",
    "ba": "BA",
    "other_accuracy": "other-task accuracy",
    "detector_ba": "detector BA",
}
#: Points of a learning curve at most, and tasks up to which each has its own.
_POINTS, _OWN_CURVES = 150, 50
#: Rows of a table of statistics, and sentences about single tasks, at most.
_STATISTICS, _SENTENCES = 200, 8


def evaluation_part(result: Evaluation, tasks: Sequence[Task]) -> dict[str, Any]:
    """The measures of each of the page's tasks, and the table of means beside baselines.

    ``values`` is ``{measure: one number or None per task}``; ``rows`` have ``name``, ``kind``,
    ``mean`` and ``interval`` per measure, and ``p`` against random channels.
    """
    measures = [name for name in SHOWN if not np.isnan(result.values(name)).all()]
    where = {task: row for row, task in enumerate(result.tasks)}

    def of_page(values: NDArray[Any]) -> list[float | None]:
        return [plain(float(values[where[task]])) if task in where else None for task in tasks]

    def row(name: str, kind: str, each: Sequence[Evaluation]) -> dict[str, Any]:
        means = {m: np.array([one.mean(m) for one in each]) for m in measures}
        intervals = {m: each[0].interval(m) for m in measures} if len(each) == 1 else {}
        return {
            "name": name,
            "kind": kind,
            "mean": {m: plain(float(nan_mean(value))) for m, value in means.items()},
            "interval": plain({m: list(ends) for m, ends in intervals.items()}),
        }

    rows = [row("these gates", "own", [result])]
    rows += [row(name, "rival", [rival]) for name, rival in result.rivals.items()]
    if result.random:
        rows.append(row("random channels, same number", "random", result.random))
    has_whole = result.whole is not result
    if has_whole:
        rows.append(row("whole network", "whole", [result.whole]))
    draws = np.array([draw.own_auc for draw in result.random]).reshape(-1, len(result.tasks))
    return {
        "values": {m: of_page(result.values(m)) for m in measures},
        "random_auc": of_page(nan_mean(draws)) if len(draws) else None,
        "whole_auc": of_page(result.whole.own_auc) if has_whole else None,
        "rows": rows,
        "p": plain({m: result.p_value(m) for m in measures}),
        "n_images": result.n_images,
        "n_tasks": len(result.tasks),
        "n_random": len(result.random),
    }


def certainty_part(result: ChannelCertainty, gates: TaskGates) -> dict[str, Any]:
    """The certainty of the channels of a page's gates.

    ``labels`` (of ``names``) and ``chosen`` (share of the halves, 255: all) are base64 of uint8 (T,
    channels), zero for tasks that were not measured.

    Raises:
        ValueError: If it was measured on other gates.
    """
    if result.sites != gates.sites:
        raise ValueError("it is of other gate sites")
    labels = np.zeros((len(gates), gates.n_channels), np.uint8)
    chosen = np.zeros_like(labels)
    for row, arch in enumerate(gates.sub_architectures()):
        if arch.task not in result.tasks:
            continue
        found = result.tasks.index(arch.task)
        kept = np.concatenate([arch[site.name].numpy() for site in gates.sites])
        if (result.kept[found] != kept).any():
            raise ValueError(f"it is of other gates of task {arch.task}")
        labels[row] = result.label[found]
        chosen[row] = np.rint(255 * result.selection[found])
    return {"names": list(LABELS), "labels": text64(labels), "chosen": text64(chosen)}


def curves_part(results: Mapping[str, Curves]) -> list[dict[str, Any]]:
    """Mean keep and ablate curves of each ranking with their intervals, ends included."""
    parts = []
    for name, result in results.items():
        measure = result.measure
        part: dict[str, Any] = {
            "name": name,
            "measure": measure,
            "sizes": plain([0.0, *result.sizes.tolist(), 1.0]),
            "n_images": result.n_images,
            "n_tasks": len(result.tasks),
            "ablation": result.ablation,
            "full": plain(float(nan_mean(result.full[measure]))),
            "empty": plain(float(nan_mean(result.empty[measure]))),
            "delta": plain(float(nan_mean(result.delta()))),
            "delta_interval": plain(list(result.delta_interval())),
        }
        for kind in ("keep", "ablate"):
            first, last = result.ends(kind)
            low, high = result.interval(kind)
            ends = float(nan_mean(first)), float(nan_mean(last))
            part[kind] = plain([ends[0], *result.mean(kind).tolist(), ends[1]])
            part[f"{kind}_low"] = plain([ends[0], *low.tolist(), ends[1]])
            part[f"{kind}_high"] = plain([ends[0], *high.tolist(), ends[1]])
        parts.append(part)
    return parts


def mosaics_part(result: MosaicResult) -> dict[str, Any]:
    """Excess of the hits over chance at each site, with its interval and single tasks."""
    low, high = result.interval("excess")
    single = result.by_task()["hit"] - 0.25
    return {
        "n": len(result),
        "n_tasks": len(result.tasks),
        "top": result.top,
        "sites": list(result.sites),
        "excess": plain(result.mean("excess")),
        "low": plain(low),
        "high": plain(high),
        "tasks": plain(single, 3) if len(single) <= _OWN_CURVES else [],
        "task_names": list(result.task_names),
        "left_out": dict(result.left_out),
    }


def errors_part(result: ErrorStudy, examples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
    """The ranks of errors by similarity, with chance and controls; frequent errors; examples."""
    rows = []
    for name, ranks in result.statistics.items():
        rows.append(
            {
                "name": name,
                "hits": plain({k: value for k, value in ranks.hits.items()}),
                "intervals": plain({k: list(v) for k, v in ranks.hit_intervals.items()}),
                "null": plain(dict(ranks.hit_null)),
                "p": plain(dict(ranks.hit_p)),
                "mrr": plain(float(ranks.mrr)),
                "mrr_null": plain(float(ranks.mrr_null)),
                "mrr_p": plain(float(ranks.mrr_p)),
            }
        )
    return {
        "n_errors": result.n_errors,
        "n_images": result.n_images,
        "n_others": len(result.tasks) - 1,
        "similarity": result.similarity,
        "rows": rows,
        "confused": [plain(list(row)) for row in result.confused(12)],
        "examples": [dict(example) for example in examples],
    }


def statistics_part(result: Any) -> dict[str, Any]:
    """A table of statistics, the smallest q-values first, and the conclusions from it.

    ``result`` is a :class:`nad_attr.concepts.Comparison`, anything else with ``frame()``, or a
    pandas frame. At most 200 rows are shown; ``n`` is the number of all.

    Raises:
        ImportError: If pandas is missing.
        TypeError: If it is none of these.
    """
    sentences: list[str] = []
    frame: Any = result
    if isinstance(result, Comparison):
        sentences = [*result.conclusions(_SENTENCES), *result.notes]
        frame = result.frame(sentences=False)
    elif callable(getattr(result, "frame", None)):
        frame = result.frame()
    if not hasattr(frame, "itertuples"):
        raise TypeError(
            "comparison must be a result with frame() or a pandas frame, got "
            f"{type(result).__name__}."
        )
    if "q" in frame.columns:
        frame = frame.sort_values("q", kind="stable", na_position="last")
    n = len(frame)
    frame = frame.head(_STATISTICS)
    known = [c for c in frame.columns if not (frame[c].isna() | (frame[c].astype(str) == "")).all()]
    return {
        "columns": [str(name) for name in known],
        "rows": [[plain(value) for value in row] for row in frame[known].itertuples(index=False)],
        "n": n,
        "sentences": sentences,
    }


def flow_part(flows: Sequence[InformationFlow | TaskFlow]) -> dict[str, Any]:
    """The flow of some tasks, as :func:`nad_attr.flow.picture.flow_picture` cuts it down."""
    return dict(plain(flow_picture(task_flows(flows))))


def history_part(history: History | None, n_tasks: int) -> dict[str, Any] | None:
    """Learning curves: mean and the middle 80 % of the tasks; each task's own, if they are few."""
    if not history:
        return None
    n_steps = len(next(iter(history.values())))
    if n_steps < 2:
        return None
    steps = np.unique(np.linspace(0, n_steps - 1, min(n_steps, _POINTS)).round().astype(int))
    quantities = []
    for name, curve in history.items():
        values = np.where(np.isfinite(curve), curve, np.nan)[steps].astype(np.float64)
        if np.isnan(values).all():
            continue
        # A step that no task took has no middle; no warning is needed.
        taken = ~np.isnan(values).all(1)
        ends = np.full((2, len(values)), np.nan)
        ends[:, taken] = np.nanquantile(values[taken], [0.1, 0.9], axis=1)
        quantities.append(
            {
                "name": name,
                "mean": plain(nan_mean(values.T)),
                "low": plain(ends[0]),
                "high": plain(ends[1]),
                "tasks": plain(values.T) if n_tasks <= _OWN_CURVES else [],
            }
        )
    return {"steps": (steps + 1).tolist(), "quantities": quantities} if quantities else None
