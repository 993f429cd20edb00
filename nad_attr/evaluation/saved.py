"""Evaluations in files: JSON for reading, HDF5 beside the gates that they are about."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike, fspath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nad_attr.data.labels import Task, as_task
from nad_attr.evaluation.result import Evaluation
from nad_attr.stats.measure_table import MEASURES
from nad_attr.stats.p_values import least_p
from nad_attr.stats.tables import plain
from nad_attr.store import GateStoreError, read_result, write_result
from nad_attr.system.files import write_text

__all__ = ["read_hdf5", "read_json", "to_dict", "write_hdf5", "write_json"]

#: Fields of an Evaluation that are numbers per task; other measures are derived from the table.
PER_TASK = (
    "size",
    "flop_size",
    "parameter_size",
    "dead_fraction",
    "fidelity",
    "rank_fidelity",
    "target_r2",
    "detector_ba",
    "margin_auc",
    "recall",
    "fpr",
    "other_accuracy",
)
#: Files of earlier versions lack them.
LATER = ("target_r2",)
PER_PAIR = ("table", "overlap", "kappa")

#: Written into each file, raised when what is in it changes its meaning.
FORMAT = 1


# -- JSON --------------------------------------------------------------------------------------


def to_dict(result: Evaluation) -> dict[str, Any]:
    """Everything as lists, numbers and strings; NaN becomes None."""
    found: dict[str, Any] = {
        "tasks": _listed(result.tasks),
        "task_names": list(result.task_names),
        "n_images": result.n_images,
        "n_own": result.n_own.tolist(),
        "means": {
            name: {
                "mean": plain(result.mean(name)),
                "interval_95": plain(list(result.interval(name))),
            }
            for name in MEASURES
        },
        **{name: plain(result.values(name).tolist()) for name in MEASURES},
        "sizes": {name: plain(size.tolist()) for name, size in result.sizes.items()},
        **{name: plain(getattr(result, name).tolist()) for name in PER_PAIR},
    }
    if result._whole is not None:
        found["whole"] = to_dict(result.whole)
    if result.random:
        found["random"] = [to_dict(replace(draw, _whole=None)) for draw in result.random]
        found["p_values"] = {name: plain(result.p_value(name)) for name in MEASURES}
        found["p_least"] = least_p(len(result.random))
    if result.rivals:
        found["rivals"] = {
            name: to_dict(replace(rival, _whole=None)) for name, rival in result.rivals.items()
        }
    return found


def write_json(result: Evaluation, path: str | PathLike[str]) -> None:
    """Write :func:`to_dict` to a file."""
    text = json.dumps(to_dict(result), indent=1, allow_nan=False)
    write_text(path, text + "\n")


def read_json(path: str | PathLike[str]) -> Evaluation:
    """Read a file of :func:`write_json`."""
    with open(fspath(path), encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{fspath(path)} is no JSON file: {error}.") from None
    try:
        return _from_dict(content)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{fspath(path)} is no evaluation written by save_json: {error!r:.200}."
        ) from None


def _from_dict(content: Mapping[str, Any], whole: Evaluation | None = None) -> Evaluation:
    if "whole" in content:
        whole = _from_dict(content["whole"])
    unknown = [None] * len(content["tasks"])
    content = {**dict.fromkeys(LATER, unknown), **content}
    arrays = {name: _numbers(content[name]) for name in (*PER_TASK, *PER_PAIR)}
    return _made(
        content,
        {**arrays, "n_own": np.asarray(content["n_own"], dtype=np.int64)},
        {name: _numbers(size) for name, size in content["sizes"].items()},
        whole,
        [_from_dict(draw, whole) for draw in content.get("random", [])],
        {name: _from_dict(rival, whole) for name, rival in content.get("rivals", {}).items()},
    )


def _numbers(values: Any) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)  # None becomes NaN


# -- HDF5 --------------------------------------------------------------------------------------


def write_hdf5(result: Evaluation, path: str | PathLike[str], group: str) -> None:
    """Write to a group of a file of :mod:`nad_attr.store`.

    Arrays have the names of the measures: (T,) or (T, T), and "sizes" (sites, T). Those of the
    whole network begin with "whole.", of random draws and of rivals with "random." and "rivals.",
    where the draw or rival is a first axis.
    """
    sites = list(result.sizes)
    arrays = _arrays(result, sites)
    if result._whole is not None:
        arrays |= {f"whole.{name}": value for name, value in _arrays(result.whole, sites).items()}
    for what, several in (("random", result.random), ("rivals", tuple(result.rivals.values()))):
        parts = [_arrays(part, sites) for part in several]
        for name in parts[0] if parts else ():
            arrays[f"{what}.{name}"] = np.stack([part[name] for part in parts])
    attributes = {
        "what": "evaluation",
        "format": FORMAT,
        "tasks": _listed(result.tasks),
        "task_names": list(result.task_names),
        "n_images": result.n_images,
        "sites": sites,
        "has_whole": result._whole is not None,
        "n_random": len(result.random),
        "rivals": list(result.rivals),
    }
    write_result(path, group, {**arrays, "n_own": result.n_own}, attributes)


def _arrays(result: Evaluation, sites: list[str]) -> dict[str, NDArray[np.float64]]:
    arrays = {name: getattr(result, name) for name in (*PER_TASK, *PER_PAIR)}
    sizes = np.array([result.sizes[name] for name in sites], dtype=np.float64)
    return {**arrays, "sizes": sizes.reshape(len(sites), len(result.tasks))}


def read_hdf5(path: str | PathLike[str], group: str) -> Evaluation:
    """Read what :func:`write_hdf5` wrote."""
    arrays, attributes = read_result(path, group)
    where = f"{fspath(path)}, {group!r}"
    if attributes.get("what") != "evaluation":
        raise GateStoreError(f"{where} holds no evaluation.")
    if attributes.get("format") != FORMAT:
        raise GateStoreError(
            f"{where} has format {attributes.get('format')!r}; this version reads {FORMAT}."
        )

    def part(
        prefix: str,
        whole: Evaluation | None,
        row: int | None = None,
        random: Sequence[Evaluation] = (),
        rivals: Mapping[str, Evaluation] | None = None,
    ) -> Evaluation:
        def field(name: str) -> Any:
            if name in LATER and prefix + name not in arrays:
                return np.full(len(attributes["tasks"]), np.nan)
            values = np.asarray(arrays[prefix + name])
            return values if row is None else values[row]

        fields = {name: field(name) for name in (*PER_TASK, *PER_PAIR)}
        sizes = dict(zip(attributes["sites"], field("sizes"), strict=True))
        fields["n_own"] = np.asarray(arrays["n_own"])
        return _made(attributes, fields, sizes, whole, random, rivals or {})

    try:
        whole = part("whole.", None) if attributes["has_whole"] else None
        random = [part("random.", whole, i) for i in range(attributes["n_random"])]
        rivals = {name: part("rivals.", whole, i) for i, name in enumerate(attributes["rivals"])}
        return part("", whole, random=random, rivals=rivals)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise GateStoreError(f"{where} holds no whole evaluation: {error!r:.200}.") from None


# -- Both --------------------------------------------------------------------------------------


def _made(
    about: Mapping[str, Any],
    arrays: Mapping[str, Any],
    sizes: Mapping[str, Any],
    whole: Evaluation | None,
    random: Sequence[Evaluation],
    rivals: Mapping[str, Evaluation],
) -> Evaluation:
    """An evaluation of what a file holds, if all of it fits together."""
    tasks = tuple(as_task(task) for task in about["tasks"])
    names = tuple(about["task_names"])
    n = len(tasks)
    if len(names) != n or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{len(names)} names for {n} tasks")
    n_images = about["n_images"]
    if isinstance(n_images, bool) or not isinstance(n_images, int) or n_images < 0:
        raise ValueError(f"{n_images!r} images")
    shapes = {**dict.fromkeys(PER_TASK, (n,)), **dict.fromkeys(PER_PAIR, (n, n)), "n_own": (n,)}
    for name, shape in shapes.items():
        if np.shape(arrays[name]) != shape:
            raise ValueError(f"{name} has shape {np.shape(arrays[name])}, not {shape}")
    for name, size in sizes.items():
        if not isinstance(name, str) or np.shape(size) != (n,):
            raise ValueError(f"sizes of {name!r} have shape {np.shape(size)}, not {(n,)}")
    fields = {name: np.asarray(arrays[name], dtype=np.float64) for name in (*PER_TASK, *PER_PAIR)}
    return Evaluation(
        tasks=tasks,
        task_names=names,
        n_images=n_images,
        n_own=np.asarray(arrays["n_own"], dtype=np.int64),
        sizes={name: np.asarray(size, dtype=np.float64) for name, size in sizes.items()},
        random=tuple(random),
        rivals=dict(rivals),
        _whole=whole,
        **fields,
    )


def _listed(tasks: tuple[Task, ...]) -> list[Any]:
    return [list(task) if isinstance(task, tuple) else task for task in tasks]
