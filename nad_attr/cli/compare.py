"""``nad-attr compare``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from nad_attr.cli import options as opt
from nad_attr.cli.evaluate import print_evaluation
from nad_attr.cli.messages import UsageError, check_size, guarded, number, print_table, say
from nad_attr.cli.opening import (
    Study,
    check_folder,
    check_outputs,
    finished,
    opened_gates,
    run_options,
)
from nad_attr.cli.rivals import METHODS, check_methods, rivals_of
from nad_attr.evaluation import evaluate
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.specs import SpecError
from nad_attr.system.files import write_text

__all__ = ["compare"]

#: Rows of a table at most.
_MAX_ROWS = 20


def compare(
    files: Annotated[
        list[Path], typer.Argument(metavar="GATES.h5 [GATES.h5]", help="One file or two.")
    ],
    tasks: opt.Tasks = None,
    size: opt.Size = None,
    rival: Annotated[
        list[str] | None,
        typer.Option("--with", help=f"Score channels by: {', '.join(METHODS)}; repeatable."),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Held-out images to measure on, for --with.")
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(help="Images to score channels on; default: those gates were learned on."),
    ] = None,
    n_images: Annotated[
        int, typer.Option("--images", min=1, help="Images of each class to score on, at most.")
    ] = 50,
    json_file: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Write the numbers here as well.")
    ] = None,
    labels: opt.LabelTable = None,
    train_labels: opt.TrainLabelTable = None,
    *,
    network: opt.NetworkOptions,
    work: opt.WorkOptions,
) -> None:
    """Compare two files task by task, the tasks of one file, or gates with other methods.

    Overlap is |A and B| / |A or B|, mean over sites; kappa is the same corrected for chance, 0 for
    random channels of these sizes. With --with and --data, other methods' channels of equal size
    are measured on the same held-out images.

    Examples:
      nad-attr compare gates.h5
      nad-attr compare seed0.h5 seed1.h5
      nad-attr compare gates.h5 --with taylor --with neuron-mct --data photos/val
    """
    with guarded(work.debug):
        if len(files) > 2:
            raise UsageError(f"compare takes one file or two, got {len(files)}.")
        check_size(size)
        check_outputs(
            [(json_file, "text")],
            [*files, network.weights, work.class_index, labels, train_labels, data, train_data],
        )
        methods = check_methods(rival)
        if bool(methods) != (data is not None):
            raise UsageError("use --with and --data together: methods are measured on images.")
        if methods and len(files) > 1:
            raise UsageError("--with compares the gates of one file with other methods.")
        if len(files) == 2:
            result = _two_files(files, tasks, size)
        elif not methods:
            result = _within(files[0], tasks, size)
        else:
            assert data is not None
            run = run_options(work)
            check_folder(data, labels)
            study = Study(*opened_gates(files[0], tasks), network, work)
            training = study.training_images(train_data, train_labels, labels)
            held_out = study.images(data, labels, held_out=True)
            archs = study.gates.sub_architectures(size)
            rivals = rivals_of(study, methods, archs, training.data, n_images=n_images, run=run)
            measured = evaluate(
                study.model,
                study.gates,
                held_out.data,
                size=size,
                rivals=rivals,
                seed=work.seed,
                run=run,
            )
            finished(training, work.quiet)
            finished(held_out, work.quiet)
            print_evaluation(measured)
            shares = {method: _overlaps(archs, found) for method, found in rivals.items()}
            _per_site(shares)
            result = {"evaluation": measured.to_dict(), "sites": shares}
        if json_file is not None:
            write_text(json_file, json.dumps(result, indent=1) + "\n")
            say(f"written: {json_file}", work.quiet)


def _names(gates: TaskGates) -> list[str]:
    return list(gates.task_names or map(str, gates.tasks))


def _overlaps(
    a: Sequence[SubArchitecture], b: Sequence[SubArchitecture]
) -> dict[str, dict[str, float]]:
    """``{site: {"overlap", "kappa"}}``, means over tasks."""
    pairs = list(zip(a, b, strict=True))
    plain = [one.overlaps(other) for one, other in pairs]
    fair = [one.overlaps(other, chance_corrected=True) for one, other in pairs]
    kinds = {"overlap": plain, "kappa": fair}
    return {
        site: {kind: float(np.mean([v[site] for v in values])) for kind, values in kinds.items()}
        for site in plain[0]
    }


def _per_site(methods: dict[str, dict[str, dict[str, float]]]) -> None:
    sites, columns = list(next(iter(methods.values()))), {}
    for name, found in methods.items():
        for kind in ("overlap", "kappa"):
            values = [found[site][kind] for site in sites]
            head = f"{name}\n{kind}" if name else kind
            columns[head] = [*map(number, values), number(float(np.mean(values)))]
    rows = [list(row) for row in zip([*sites, "mean"], *columns.values(), strict=True)]
    print_table(["site", *columns], rows, bold=("mean",))


def _two_files(files: Sequence[Path], tasks: list[str] | None, size: float | None) -> Any:
    (first, _), (second, _) = (opened_gates(path, tasks) for path in files)
    shared = [task for task in first.tasks if task in second.tasks]
    if not shared:
        raise SpecError(f"{files[0]} and {files[1]} have no task in common.")
    if first.sites != second.sites:
        raise SpecError(f"{files[0]} and {files[1]} have different sites; see nad-attr inspect.")
    names = _names(first)
    a, b = ([g.sub_architecture(task, size) for task in shared] for g in (first, second))
    rows, numbers = [], []
    for one, other in zip(a, b, strict=True):
        assert one.task is not None
        name = names[first.index(one.task)]
        values = [one.size, other.size, one.overlap(other)]
        values.append(one.overlap(other, chance_corrected=True))
        rows.append([name, *map(number, values)])
        numbers.append([name, *values])
    shown = rows[:_MAX_ROWS]
    if len(rows) > _MAX_ROWS:
        shown.append([f"... {len(rows) - _MAX_ROWS} more", "", "", "", ""])
    means = [number(float(np.mean([row[i] for row in numbers]))) for i in range(1, 5)]
    header = ["task", f"size in\n{files[0].name}", f"size in\n{files[1].name}", "overlap", "kappa"]
    print_table(header, [*shown, ["mean", *means]], bold=("mean",))
    sites = _overlaps(a, b)
    _per_site({"": sites})
    keys = ("task", "size_first", "size_second", "overlap", "kappa")
    return {"tasks": [dict(zip(keys, row, strict=True)) for row in numbers], "sites": sites}


def _within(file: Path, tasks: list[str] | None, size: float | None) -> Any:
    gates, _ = opened_gates(file, tasks)
    if len(gates) < 2:
        raise SpecError(f"{file} holds one task of those; name another file, or --with and --data.")
    names, archs = _names(gates), gates.sub_architectures(size)
    pairs = []
    for i, one in enumerate(archs):
        for j in range(i):
            both = one.overlap(archs[j]), one.overlap(archs[j], chance_corrected=True)
            pairs.append((names[j], names[i], *both))
    pairs.sort(key=lambda pair: -pair[3])
    rows = [[f"{a} - {b}", number(overlap), number(fair)] for a, b, overlap, fair in pairs]
    shown = rows
    if len(rows) > _MAX_ROWS:
        half = _MAX_ROWS // 2
        shown = [*rows[:half], [f"... {len(rows) - 2 * half} more", "", ""], *rows[-half:]]
    means = [number(float(np.mean([pair[i] for pair in pairs]))) for i in (2, 3)]
    print_table(["tasks", "overlap", "kappa"], [*shown, ["mean", *means]], bold=("mean",))
    upper = [(i, j) for i in range(len(archs)) for j in range(i)]
    sites = _overlaps([archs[i] for i, _ in upper], [archs[j] for _, j in upper])
    _per_site({"": sites})
    keys = ("first", "second", "overlap", "kappa")
    return {"pairs": [dict(zip(keys, pair, strict=True)) for pair in pairs], "sites": sites}
