"""The paper's questions and the controls, on the gates that ``benchmarks.disentanglement`` learned.

    python -m benchmarks.questions

Where (mosaics), how (sizes and overlaps along depth), why errors (misclassifications against null
and controls, voting), stability across seeds, also with longer runs, and halves of the data, keep
and ablate curves with all five ablation values, and what is left with random weights and shuffled
labels. One JSON file for each network x data set in ``benchmarks/results/questions``; what is there
is kept.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar import REPOSITORY, SharedMissingError
from benchmarks.disentanglement import Cell, parser
from benchmarks.image_data import load_images, per_class
from benchmarks.networks import load_network
from nad_attr import Recipe, RunOptions, TaskGates, learn_gates
from nad_attr.evaluation import (
    ABLATIONS,
    NeuronMCTScorer,
    along_depth,
    curves,
    errors,
    mosaics,
    sanity,
    site_fidelity,
)
from nad_attr.evaluation.sweeps.grid import measure_grid

RESULTS = REPOSITORY / "benchmarks" / "results" / "questions"
SIZE = 0.4
_MANY = {"steps": 50, "images_per_step": 200}
_CAREFUL = {**_MANY, "memory": 1.0, "trust": 1.0, "removal": 0.9}
#: Recipes of runs whose seeds are compared: more steps, more images, nothing forgotten, changes of
#: gates charged more and made over more of the steps, and asked for the output's values alone.
CONVERGENCE: tuple[dict[str, Any], ...] = (
    {"steps": 50},
    {"steps": 200},
    _MANY,
    {"steps": 50, "memory": 1.0},
    {**_MANY, "memory": 1.0},
    _CAREFUL,
    {**_CAREFUL, "images_per_step": 400, "trust": 3.0},
    {**_CAREFUL, "boundary": 0.0, "free_scale": 0.0},
)
#: Those that learn anew, or run many sub-architectures, on these alone by default.
SANITY = ("resnet14/scene15", "vgg/scene15", "resnet14/cifar10")
CURVES = ("resnet14/scene15", "resnet14/cifar10", "vgg/scene15", "densenet/cifar10")
CONVERGING = ("resnet14/scene15", "vgg/scene15", "vgg/cifar10")


def where(cell: Cell) -> dict[str, Any]:
    """Mosaics of held-out images."""
    gates = cell.nad("mean")[SIZE]
    result = mosaics(
        cell.model,
        gates,
        cell.data.held_out,
        n=cell.args.mosaics,
        run=RunOptions(batch_size=cell.args.batch),
    )
    single = ("chosen", "images", "shares", "whole")  # of each mosaic
    return _plain({key: value for key, value in result.to_dict().items() if key not in single})


def how(cell: Cell) -> dict[str, Any]:
    """Sizes, overlaps and fidelity of the sites along depth."""
    gates = cell.nad("mean")[SIZE]
    own = per_class(cell.data.held_out, 5, cell.seed)
    lost = site_fidelity(cell.model, gates, own, run=RunOptions(batch_size=cell.args.batch))
    profile = along_depth({cell.pair: gates}, fidelity={cell.pair: lost})
    return _plain({n: {"sites": p.sites, **p.measured()} for n, p in profile.networks.items()})


def why(cell: Cell) -> dict[str, Any]:
    """Misclassified images, and voting."""
    gates = cell.nad("mean")[SIZE]
    images = per_class(cell.data.held_out, cell.args.error_images, 0)
    found = {}
    for similarity in ("kappa", "gates"):
        study = errors(
            cell.model, gates, images, similarity=similarity, n_random=2,
            voting=similarity == "kappa", run=RunOptions(batch_size=cell.args.batch),
        ).to_dict()  # fmt: skip
        study["statistics"] = {"sub-architectures": study.pop("ranks"), **study.pop("controls")}
        found[similarity] = _plain(study)
    return found


def seeds(cell: Cell) -> dict[str, Any]:
    """Overlap of a task's sub-architectures from different seeds, at every size."""
    found: dict[str, Any] = {}
    for ablation in cell.args.ablations:
        runs = []
        for seed in cell.args.seeds:
            cell.seed, cell._nad = seed, {}
            runs.append(cell.nad(ablation))
        for size in cell.args.sizes:
            found[f"{ablation}/{size:g}"] = _seed_kappa([run[size] for run in runs])
    return found


def convergence(cell: Cell) -> dict[str, Any]:
    """Do three seeds agree better with other recipes, and what is kept then? For five classes."""
    tasks = cell.tasks[:5]
    held_out = per_class(cell.data.held_out, cell.args.val_per_class, 0)
    rows = []
    for fields in CONVERGENCE:
        recipe = Recipe(size=SIZE, ablation="mean", **fields)
        runs = [
            learn_gates(
                cell.model, cell.data.train, tasks, recipe, cell.sites, seed=seed, amp=True,
                run=cell.options,
            )
            for seed in (0, 1, 2)
        ]  # fmt: skip
        archs = [gates.sub_architectures() for gates in runs]
        grid = measure_grid(cell.model, archs, held_out, run=replace(cell.options, amp=True))
        rows.append(
            {
                "recipe": fields,
                "kappa": _seed_kappa(runs),
                **{m: float(np.nanmean(grid.values[m])) for m in ("own_auc", "fidelity")},
            }
        )
        print(cell.pair, rows[-1], file=sys.stderr, flush=True)
    return _plain({"size": SIZE, "n_tasks": len(tasks), "rows": rows})


def _seed_kappa(runs: list[TaskGates]) -> float:
    values = []
    for task in runs[0].tasks:
        archs = [gates.sub_architecture(task) for gates in runs]
        for i, a in enumerate(archs):
            for b in archs[i + 1 :]:
                overlaps = a.overlaps(b, chance_corrected=True)
                values.append(np.mean(list(overlaps.values())))
    return round(float(np.mean(values)), 4)


def keep_and_ablate(cell: Cell) -> dict[str, Any]:
    """Curves of NAD's ranks and NeuronMCT's scores with every ablation value."""
    held_out = per_class(cell.data.held_out, 8, 0)
    train = per_class(cell.data.train, 30, 0)
    scores = NeuronMCTScorer(cell.model, cell.sites)(
        *train,
        tasks=cell.tasks,
        run=RunOptions(batch_size=cell.args.batch, forward_func=cell.autocast),
    )
    result: dict[str, Any] = {}
    for ablation in ABLATIONS:
        for name, what in (
            ("nad", cell.nad("zero" if ablation == "zero" else "mean")[SIZE]),
            ("neuron_mct", scores),
        ):
            found = curves(
                cell.model, what, held_out, sites=cell.sites, tasks=cell.tasks,
                sizes=cell.args.sizes, ablation=ablation, train_data=train,
                run=RunOptions(amp=True, batch_size=cell.args.batch),
            )  # fmt: skip
            result[f"{ablation}/{name}"] = _plain(found.to_dict())
    return result


def controls(cell: Cell) -> dict[str, Any]:
    """Random weights, shuffled labels, a cascade of random layers; seeds and halves of the data."""

    def learn(model: Any, data: Any, seed: int) -> TaskGates:
        recipe = Recipe(size=SIZE, steps=50)
        return learn_gates(
            model, data, cell.tasks, recipe, cell.sites, seed=seed, amp=True,
            batch_size=cell.args.batch,
        )  # fmt: skip

    report = sanity(
        cell.model, learn, per_class(cell.data.train, 60, 0), per_class(cell.data.held_out, 10, 0),
        n_random=5, n_networks=1, stages=2, seeds=(0, 1),
        run=RunOptions(batch_size=cell.args.batch),
    )  # fmt: skip
    print(report.summary(), file=sys.stderr)
    found = report.to_dict()
    found["controls"] = [{"name": n, **verdict} for n, verdict in found["verdicts"].items()]
    return _plain(found)


def _plain(value: Any) -> Any:
    """Numbers with four digits, as JSON can hold them."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (float, np.floating)):
        return round(float(value), 4) if np.isfinite(value) else None
    return value


PARTS: dict[str, Callable[[Cell], dict[str, Any]]] = {
    "where": where,
    "how": how,
    "why": why,
    "seeds": seeds,
    "convergence": convergence,
    "curves": keep_and_ablate,
    "sanity": controls,
}


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing."""
    options = parser()
    options.description = __doc__.split("\n\n")[0]
    options.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    options.add_argument("--everywhere", action="store_true", help="costly parts on all networks")
    options.add_argument("--mosaics", type=int, default=1000)
    options.add_argument("--error-images", type=int, default=100, help="per class")
    args: argparse.Namespace = options.parse_args(argv)
    folder: Path = RESULTS if args.results.name == "disentanglement" else args.results
    folder.mkdir(parents=True, exist_ok=True)
    for pair in args.pairs:
        path = folder / f"{pair.replace('/', '_')}.json"
        done: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        try:
            data = load_images(pair.partition("/")[2], args.shared, cache=args.cache)
            model = load_network(pair, data, args.shared, cache=args.cache)
        except SharedMissingError as missing:
            print(f"{pair}: skipped: {missing}", file=sys.stderr)
            continue
        for part in args.parts:
            costly = {"sanity": SANITY, "curves": CURVES, "convergence": CONVERGING}.get(part)
            if part in done or (costly and pair not in costly and not args.everywhere):
                continue
            start = time.process_time()
            done[part] = PARTS[part](Cell(args, pair, data, model, args.seeds[0]))
            path.write_text(json.dumps(done) + "\n")
            spent = time.process_time() - start
            print(f"{pair} {part}: {spent:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
