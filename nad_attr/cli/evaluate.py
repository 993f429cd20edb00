"""``nad-attr evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from nad_attr.cli import options as opt
from nad_attr.cli.messages import (
    UsageError,
    check_size,
    guarded,
    number,
    print_table,
    say,
    write_csv,
)
from nad_attr.cli.opening import (
    Study,
    check_folder,
    check_result,
    finished,
    opened_gates,
    run_options,
)
from nad_attr.evaluation import ABLATIONS, Evaluation, fit_ablation
from nad_attr.evaluation import evaluate as measure

__all__ = ["evaluate", "print_evaluation"]

#: Measures that the table shows, and their headings.
_COLUMNS = {
    "size": "size",
    "own_auc": "own\nAUC",
    "other_auc": "other\nAUC",
    "fidelity": "fidelity",
    "recall": "recall",
    "fpr": "FPR",
    "ba": "BA",
}
#: Rows of tasks that the table shows at most.
_MAX_ROWS = 20


def evaluate(
    gates: opt.Store,
    data: opt.DataOption,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write everything measured: .json, .csv (a row per class) or .h5, which may be "
            "the file of the gates itself.",
        ),
    ] = None,
    tasks: opt.Tasks = None,
    size: opt.Size = None,
    ablation: Annotated[
        str | None,
        typer.Option(
            help=f"What a closed channel becomes: {', '.join(ABLATIONS)}; default: as learned."
        ),
    ] = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            help="Training images, for --ablation and thresholds; default: those that the gates "
            "were learned on, where --ablation needs them."
        ),
    ] = None,
    learned_from: Annotated[
        str | None,
        typer.Option(
            help="Images that the gates were learned from: says where measures on them and on "
            "held-out ones differ, and what would help."
        ),
    ] = None,
    random: Annotated[int, typer.Option(min=0, help="Draws of random channels of equal size.")] = 3,
    labels: opt.LabelTable = None,
    train_labels: opt.TrainLabelTable = None,
    allow_empty: opt.AllowEmpty = False,
    check: Annotated[
        bool,
        typer.Option(
            help="Read all images first and leave out those that cannot be read; without it, the "
            "next image of the class takes the place of one that cannot."
        ),
    ] = True,
    amp: opt.Amp = False,
    checks: opt.Checks = opt.ChecksName.refuse,
    *,
    network: opt.NetworkOptions,
    work: opt.WorkOptions,
) -> None:
    """Measure on held-out images whether sub-architectures do what they should.

    They are measured beside the whole network and random channels of equal size, because high
    recall alone is easy to get. The network is made again as the file says, and is compared.

    Examples:
      nad-attr evaluate gates.h5 --data photos/val --out evaluation.json
      nad-attr evaluate gates.h5 --data photos/val --size 0.2 --tasks cat,dog
      nad-attr evaluate gates.h5 --data photos/val --ablation resample --train-data photos/train
    """
    with guarded(work.debug, stopped=lambda: "Nothing was measured to the end."):
        if ablation is not None and ablation not in ABLATIONS:
            raise UsageError(f"--ablation takes {', '.join(ABLATIONS)}, got {ablation!r}.")
        check_size(size)
        read = [network.weights, work.class_index, labels, train_labels]
        check_result(out, gates, [*read, data, train_data, learned_from], csv=True)
        run = run_options(work, amp=amp)
        check_folder(data, labels)
        study = Study(*opened_gates(gates, tasks), network, work)
        images = study.images(data, labels, held_out=True, allow_empty=allow_empty, check=check)
        training = learned_images = None
        if train_data is not None or ablation not in (None, "zero"):
            why = f"name the training images that --ablation {ablation} needs"
            training = study.training_images(
                train_data, train_labels, labels, why, allow_empty=allow_empty
            ).data
        if learned_from is not None:
            learned_images = study.images(learned_from, train_labels, allow_empty=allow_empty).data
        closed = None
        if ablation is not None:
            closed = fit_ablation(
                study.model,
                study.gates.sites,
                images.data if training is None else training,
                kind=ablation,
                tasks=study.gates.tasks,
                seed=work.seed,
                run=run,
            )
        result = measure(
            study.model,
            study.gates,
            images.data,
            size=size,
            ablation=closed,
            threshold_data=training,
            learned_from=learned_images,
            n_random=random,
            seed=work.seed,
            run=run,
            checks=checks.value,
        )
        finished(images, work.quiet)
        print_evaluation(result)
        if out is not None:
            if out.suffix == ".csv":
                write_csv(result.frame(), out, index=True)
            else:
                result.save(out)
            say(f"written: {out}", work.quiet)


def print_evaluation(result: Evaluation) -> None:
    """Print the measures of tasks, their mean, and the baselines."""
    columns = dict(_COLUMNS)
    if result.is_of_targets:
        columns = {"size": "size", "fidelity": "fidelity", "target_r2": "target\nR²"}
    if not all(value != value for value in result.values("detector_ba")):
        columns["detector_ba"] = "detector\nBA"
    rows = []
    for k, name in enumerate(result.task_names[:_MAX_ROWS]):
        rows.append([name, *(number(float(result.values(m)[k])) for m in columns)])
    if len(result.task_names) > _MAX_ROWS:
        rows.append([f"... {len(result.task_names) - _MAX_ROWS} more", *("" for _ in columns)])
    rows.append(["mean", *(number(result.mean(m)) for m in columns)])
    others: dict[str, Sequence[Evaluation]] = {
        **({"random channels": result.random} if result.random else {}),
        **{name: [rival] for name, rival in result.rivals.items()},
        "whole network": [result.whole],
    }
    for name, evaluations in others.items():
        means = [sum(e.mean(m) for e in evaluations) / len(evaluations) for m in columns]
        rows.append([name, *map(number, means)])
    if result.learned is not None:
        known = [number(result.learned.mean(m)) for m in columns]
        rows.append(["on images learned from", *known])
    print_table([f"{result.n_images:,} images", *columns.values()], rows, bold=("mean",))
    for line in result.held_out_sentences():
        typer.echo(line)
