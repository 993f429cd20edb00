"""``nad-attr verdict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict import verdict as judge
from nad_attr.cli import options as opt
from nad_attr.cli.messages import check_size, guarded, say
from nad_attr.cli.opening import (
    Study,
    check_folder,
    check_result,
    finished,
    opened_gates,
    run_options,
)
from nad_attr.store import result_names

__all__ = ["verdict"]


def verdict(
    gates: opt.Store,
    held_out: Annotated[
        str, typer.Option(help="Images that the gates were not learned from; named as for --data.")
    ],
    data: Annotated[
        str | None,
        typer.Option(
            help="Images that the gates were learned from; default: those that the file names."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Write the verdict: .json or .h5, which may be the file of the gates itself, for "
            "its report.",
        ),
    ] = None,
    tasks: opt.Tasks = None,
    size: opt.Size = None,
    replica: Annotated[
        list[str] | None,
        typer.Option(
            help="File of gates of another run, such as another seed, for stability; repeatable."
        ),
    ] = None,
    random: Annotated[
        int, typer.Option(min=19, help="Random choices of as many channels at each site.")
    ] = 19,
    n_images: Annotated[
        int, typer.Option("--images", min=4, help="Held-out images for each class, at most.")
    ] = 200,
    labels: opt.LabelTable = None,
    held_out_labels: opt.HeldOutLabelTable = None,
    *,
    network: opt.NetworkOptions,
    work: opt.WorkOptions,
) -> None:
    """Test each class's channels: do they suffice, are they needed, specific, minimal, stable?

    Each question is answered with "holds", "does not" or "not asked", beside random channels. If
    the file holds a certainty, it is used. The network is made again as the file says, and is
    compared.

    Examples:
      nad-attr verdict gates.h5 --data photos/train --held-out photos/val
      nad-attr verdict gates.h5 --held-out photos/val --replica seed1.h5 --out gates.h5
    """
    with guarded(work.debug, stopped=lambda: "No verdict was reached."):
        check_size(size)
        others = [Path(name) for name in replica or ()]
        tables = [labels, held_out_labels]
        read = [network.weights, work.class_index, held_out, data, *tables, *others]
        check_result(out, gates, read, csv=False)
        run = run_options(work)
        check_folder(held_out, held_out_labels)
        given = opened_gates(gates, tasks)
        replicas = [opened_gates(path, tasks)[0] for path in others]
        study = Study(*given, network, work)
        images = study.images(held_out, held_out_labels, held_out=True)
        why = "name the images that the gates were learned from"
        training = study.training_images(data, labels, held_out_labels, why, "--data")
        sure = None
        if size is None and ChannelCertainty._kind() in result_names(gates):
            found = ChannelCertainty.load(gates)
            sure = found if set(study.gates.tasks) <= set(found.tasks) else None
        result = judge(
            study.model,
            study.gates,
            training.data,
            images.data,
            certainty=sure,
            replicas=replicas,
            size=size,
            n_random=random,
            n_images=n_images,
            seed=work.seed,
            run=run,
        )
        finished(images, work.quiet)
        typer.echo(result.summary())
        if out is not None:
            result.save(out)
            say(f"written: {out}", work.quiet)
