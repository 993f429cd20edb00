"""``nad-attr certainty``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nad_attr.certainty.measuring import certainty as measure
from nad_attr.certainty.result import ChannelCertainty
from nad_attr.cli import options as opt
from nad_attr.cli.messages import guarded, say, write_csv
from nad_attr.cli.opening import (
    Study,
    check_folder,
    check_result,
    finished,
    opened_gates,
    run_options,
)
from nad_attr.system.safe_text import shown

__all__ = ["certainty"]


def certainty(
    gates: opt.Store,
    held_out: Annotated[
        str, typer.Option("--held-out", help="Images that the gates were not learned on.")
    ],
    data: Annotated[
        str | None,
        typer.Option("--data", help="Images that the gates were learned on; default: as then."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write everything measured: .json, .csv (a row per channel) or .h5, which may be "
            "the file of the gates itself, for its report.",
        ),
    ] = None,
    tasks: opt.Tasks = None,
    pairs: Annotated[
        int, typer.Option(min=1, help="Pairs of halves of the images to learn from.")
    ] = 3,
    n_images: Annotated[
        int, typer.Option("--images", min=2, help="Own images, and others, to test on, at most.")
    ] = 64,
    alternatives: Annotated[
        int, typer.Option(min=0, help="Sub-architectures to learn that avoid what seems needed.")
    ] = 1,
    alpha: Annotated[float, typer.Option(help="False discovery rate.")] = 0.05,
    tolerance: Annotated[float, typer.Option(help="Loss of fidelity that counts as none.")] = 0.02,
    labels: opt.LabelTable = None,
    held_out_labels: opt.HeldOutLabelTable = None,
    allow_empty: opt.AllowEmpty = False,
    amp: opt.Amp = False,
    checks: opt.Checks = opt.ChecksName.refuse,
    *,
    network: opt.NetworkOptions,
    work: opt.WorkOptions,
) -> None:
    """Say for each kept channel how sure it is, and whether its class needs it.

    Learns each class again from halves of the images, closes each kept channel on held-out images,
    and tries other sub-architectures. A channel's label is needed, replaceable, no effect seen, or
    undecided.

    Examples:
      nad-attr certainty gates.h5 --data photos/train --held-out photos/val --out channels.csv
      nad-attr certainty gates.h5 --held-out photos/val --tasks cat --pairs 16 --out gates.h5
    """
    with guarded(work.debug, stopped=lambda: "Nothing was measured to the end."):
        read = [network.weights, work.class_index, data, held_out, labels, held_out_labels]
        check_result(out, gates, read, csv=True)
        run = run_options(work, amp=amp)
        check_folder(held_out, held_out_labels)
        study = Study(*opened_gates(gates, tasks), network, work)
        images = study.training_images(
            data,
            labels,
            held_out_labels,
            "name the images that the gates were learned on",
            "--data",
            allow_empty=allow_empty,
        )
        others = study.images(held_out, held_out_labels, held_out=True, allow_empty=allow_empty)
        found = measure(
            study.model,
            study.gates,
            images.data,
            others.data,
            pairs=pairs,
            images=n_images,
            alternatives=alternatives,
            alpha=alpha,
            tolerance=tolerance,
            seed=work.seed,
            run=run,
            checks=checks.value,
        )
        finished(images, work.quiet)
        finished(others, work.quiet)
        typer.echo(shown(found.summary(), lines=True))
        if out is not None:
            _write(found, out)
            say(f"written: {out}", work.quiet)


def _write(found: ChannelCertainty, out: Path) -> None:
    if out.suffix == ".csv":
        frame = found.frame()
        names = dict(zip(found.tasks, found.task_names, strict=True))
        frame["task"] = [names[task] for task in frame["task"]]
        write_csv(frame, out)
    else:
        found.save(out, None if out.suffix == ".json" else "certainty")
