"""``nad-attr flow``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from nad_attr.cli import options as opt
from nad_attr.cli.messages import UsageError, counted, guarded, print_table, say, write_csv
from nad_attr.cli.opening import (
    Study,
    check_folder,
    check_outputs,
    finished,
    opened_gates,
    run_options,
)
from nad_attr.flow.links import REST
from nad_attr.flow.measuring import information_flow
from nad_attr.flow.result import InformationFlow
from nad_attr.gates.task_gates import TaskGates
from nad_attr.system.files import replacing
from nad_attr.system.safe_text import shown

__all__ = ["flow"]

#: What a picture's ending says of the file.
_PICTURES = {".png": "picture", ".pdf": "picture", ".svg": "text"}


def flow(
    gates: opt.Store,
    data: opt.DataOption,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--task", help="Class whose flow to measure; give it twice to compare two classes."
        ),
    ] = None,
    receivers: Annotated[
        int,
        typer.Option(min=1, help="Receiving channels of each site that have edges of their own."),
    ] = 64,
    n_images: Annotated[
        int, typer.Option("--images", min=1, help="Own images of each class, at most.")
    ] = 32,
    top: Annotated[int, typer.Option(min=1, help="Edges to show between two sites.")] = 3,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", dir_okay=False, help="Write all edges here.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Draw the flow here: .png, .pdf or .svg.")
    ] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Measure the whole network, with every channel open.")
    ] = False,
    labels: opt.LabelTable = None,
    allow_empty: opt.AllowEmpty = False,
    amp: opt.Amp = False,
    *,
    network: opt.NetworkOptions,
    work: opt.WorkOptions,
) -> None:
    """Measure what flows between the channels that a class keeps, from site to site.

    An edge's number is the first-order effect of a channel on the class's output, as far as it
    passes the receiving channel; all edges that leave a channel add up to its effect. "others" are
    all receiving channels that are not told apart.

    Examples:
      nad-attr flow gates.h5 --data photos/val --task cat --csv edges.csv
      nad-attr flow gates.h5 --data photos/val --task cat --task dog --plot flow.png
    """
    with guarded(work.debug, stopped=lambda: "Nothing was measured to the end."):
        if plot is not None and plot.suffix not in _PICTURES:
            raise UsageError(f"--plot takes a .png, .pdf or .svg file, got {plot.name!r}.")
        check_outputs(
            [(csv_file, "text"), (plot, _PICTURES[plot.suffix] if plot else "picture")],
            [gates, network.weights, work.class_index, labels, data],
        )
        run = run_options(work, amp=amp)
        if labels is None:
            check_folder(data)
        learned, provenance = opened_gates(gates, tasks)
        if len(learned) > 2:
            raise UsageError(
                f"{gates} holds {len(learned)} tasks; name one with --task, or two to compare them."
            )
        study = Study(learned, provenance, network, work)
        images = study.images(data, labels, held_out=True, allow_empty=allow_empty)
        if whole:
            learned = TaskGates(
                {name: torch.ones_like(learned[name]) for name in learned},
                learned.sites,
                learned.tasks,
                task_names=learned.task_names,
                means=learned.means,
            )
        found = information_flow(
            study.model, learned, images.data, receivers=receivers, n_images=n_images, run=run
        )
        finished(images, work.quiet)
        _print(found, top)
        if csv_file is not None:
            write_csv(found.edges, csv_file)
            say(f"written: {csv_file}", work.quiet)
        if plot is not None:
            with replacing(plot) as scratch:
                found.plot().savefig(scratch, format=plot.suffix[1:])
            say(f"written: {plot}", work.quiet)


def _print(found: InformationFlow, top: int) -> None:
    for flow in found.flows:
        n_images = counted(flow.n_images, "image")
        typer.echo(shown(f"{flow.name}: {n_images}; {found.conserved}"))
        rows = []
        for link in flow.links:
            numbers = link.numbers
            order = link.flow[:, : len(numbers)].abs().flatten()
            edges = []
            for index in order.argsort(descending=True, stable=True)[:top].tolist():
                i, j = divmod(index, len(numbers))
                target = "others" if numbers[j] == REST else numbers[j]
                edges.append(f"{int(link.sources[i])} > {target} ({float(link.flow[i, j]):.3g})")
            size, straight = float(order.sum()), float(link.straight.abs().sum())
            share = "unknown" if straight != straight else f"{straight / size:.2f}" if size else "-"
            rows.append([f"{link.source_site} > {link.target_site}", share, *edges])
        width = max(map(len, rows))
        header = ["from > to", "straight", *(f"edge {k + 1}" for k in range(width - 2))]
        print_table(header, [row + [""] * (width - len(row)) for row in rows])
