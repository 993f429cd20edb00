"""``nad-attr flow``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from nad_attr.cli import options as opt
from nad_attr.cli.messages import UsageError, guarded, print_table, say
from nad_attr.cli.opening import (
    check_folder,
    chosen_device,
    finished,
    image_options,
    known_folders,
    open_images,
    opened_gates,
    rebuilt,
)
from nad_attr.flow.links import REST
from nad_attr.flow.measuring import information_flow
from nad_attr.flow.result import InformationFlow
from nad_attr.gates.task_gates import TaskGates

__all__ = ["flow"]


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
        int, typer.Option(min=1, help="Receiving channels of each site that are told apart.")
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
        bool, typer.Option("--whole", help="The whole network, with every channel open.")
    ] = False,
    model: opt.OtherModel = None,
    weights: opt.Weights = None,
    model_arg: opt.ModelArg = None,
    any_model: opt.AnyModel = False,
    transform: opt.TransformOption = None,
    resize: opt.Resize = None,
    crop: opt.Crop = None,
    mean: opt.Mean = None,
    std: opt.Std = None,
    interpolation: opt.Interpolation = None,
    class_index: opt.ClassIndex = None,
    device: opt.Device = None,
    batch_size: opt.BatchSize = 8,
    workers: opt.Workers = 0,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Measure what flows between the channels that a class keeps, from site to site.

    An edge's number is the first-order effect of a channel on the class's output, as far as it
    passes the receiving channel; all edges that leave a channel add up to its effect. "others" are
    all receiving channels that are not told apart.

    Examples:
      nad-attr flow gates.h5 --data photos/val --task cat --csv edges.csv
      nad-attr flow gates.h5 --data photos/val --task cat --task dog --plot flow.png
    """
    with guarded(debug):
        for path in (csv_file, plot):
            if path is not None and not path.absolute().parent.is_dir():
                raise UsageError(f"there is no folder {path.parent} to write {path.name} into.")
            if path is not None and path.resolve() == gates.resolve():
                raise UsageError(f"{path} is the file of the gates; write to another one.")
        if plot is not None and plot.suffix not in (".png", ".pdf", ".svg"):
            raise UsageError(f"--plot takes a .png, .pdf or .svg file, not {plot.name}.")
        place = chosen_device(device)
        check_folder(data)
        learned, provenance = opened_gates(gates, tasks)
        if len(learned) > 2:
            raise UsageError(
                f"{gates} holds {len(learned)} tasks; name one with --task, or two to compare them."
            )
        opened = rebuilt(
            provenance,
            model=model,
            weights=weights,
            arguments=model_arg,
            transform=transform,
            options=image_options(resize, crop, mean, std, interpolation),
            any_model=any_model,
            quiet=quiet,
        )
        images = open_images(
            data,
            opened.loaded,
            opened.transform,
            class_index=class_index,
            known=known_folders(provenance),
            held_out=True,
            n_workers=workers,
            quiet=quiet,
        )
        if whole:
            learned = TaskGates(
                {name: torch.ones_like(learned[name]) for name in learned},
                learned.sites,
                learned.tasks,
                task_names=learned.task_names,
                means=learned.means,
            )
        found = information_flow(
            opened.loaded.model,
            learned,
            images.data,
            receivers=receivers,
            n_images=n_images,
            batch_size=batch_size,
            device=place,
            show_progress=not quiet,
        )
        finished(images, quiet)
        _print(found, top)
        if csv_file is not None:
            found.edges.to_csv(csv_file, index=False)
            say(f"written: {csv_file}", quiet)
        if plot is not None:
            found.plot().savefig(plot)
            say(f"written: {plot}", quiet)


def _print(found: InformationFlow, top: int) -> None:
    for flow in found.flows:
        n = flow.n_images
        typer.echo(f"{flow.name}: {n} image{'s' * (n != 1)}; {found.conserved}")
        rows = []
        for link in flow.links:
            numbers = link.numbers
            order = link.flow[:, : len(numbers)].abs().flatten()
            shown = []
            for index in order.argsort(descending=True, stable=True)[:top].tolist():
                i, j = divmod(index, len(numbers))
                target = "others" if numbers[j] == REST else numbers[j]
                shown.append(f"{int(link.sources[i])} > {target} ({float(link.flow[i, j]):.3g})")
            size, straight = float(order.sum()), float(link.straight.abs().sum())
            share = "unknown" if straight != straight else f"{straight / size:.2f}" if size else "-"
            rows.append([f"{link.source_site} > {link.target_site}", share, *shown])
        width = max(map(len, rows))
        header = ["from > to", "straight", *(f"edge {k + 1}" for k in range(width - 2))]
        print_table(header, [row + [""] * (width - len(row)) for row in rows])
