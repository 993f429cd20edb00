"""``nad-attr explain``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from nad_attr.cli import options as opt
from nad_attr.cli.learn import recipe_of, shown_progress
from nad_attr.cli.messages import UsageError, check_size, duration, guarded, say
from nad_attr.cli.opening import (
    check_folder,
    check_outputs,
    chosen_device,
    finished,
    model_arguments,
    open_images,
    open_model,
    pick_tasks,
    provenance_of,
)
from nad_attr.data.labels import tasks_in
from nad_attr.data.sources import as_source
from nad_attr.explaining import explain as explained
from nad_attr.gates.recipe import Recipe
from nad_attr.running.options import RunOptions
from nad_attr.system.safe_text import shown

__all__ = ["explain"]


def explain(
    model: opt.Model,
    data: opt.DataOption,
    out: Annotated[
        Path, typer.Option(dir_okay=False, help="The page to write; an existing one is replaced.")
    ] = Path("report.html"),
    store: Annotated[
        Path | None,
        typer.Option(dir_okay=False, help="File of the gates. [gates.h5 beside the page]"),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Class indices, ranges or names: 0-99,207 or cat,dog; default: the ten classes "
            "with the most pictures."
        ),
    ] = None,
    size: Annotated[
        float | None,
        typer.Option(help="Share of the channels that each class keeps, above 0, up to 1. [0.5]"),
    ] = None,
    replicas: opt.Replicas = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: fewer classes, steps and pictures.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="The largest size that takes no longer.")
    ] = None,
    certainty: Annotated[
        bool | None,
        typer.Option(
            "--certainty/--no-certainty",
            help="Learn each class again from halves and close its channels one by one. [for as "
            "many classes as take no longer than all else]",
        ),
    ] = None,
    weights: opt.Weights = None,
    model_arg: opt.ModelArg = None,
    labels: opt.LabelTable = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Begin again if the file of the gates exists.")
    ] = False,
    *,
    pictures: opt.PictureOptions,
    work: opt.WorkOptions,
) -> None:
    """Go from a network and a folder of pictures to a verdict and a page, in one command.

    Keeps some pictures of each class apart, learns on the others which channels each class needs,
    judges that on the ones kept apart, says how sure each channel is, measures what flows between
    channels, and writes the page and the file of the gates. It says first how long that will take.
    After Ctrl-C or a crash the same command goes on.

    Examples:
      nad-attr explain --model torchvision:resnet18 --data photos --out report.html
      nad-attr explain --model torchvision:resnet18 --data photos --quick
      nad-attr explain --model mynets:net --weights net.pt --data photos --tasks cat,dog
    """
    again = shlex.join(["nad-attr", *(word for word in sys.argv[1:] if word != "--overwrite")])
    with guarded(work.debug, stopped=lambda: f"What is finished is saved. To go on:\n  {again}"):
        check_size(size)
        if quick and minutes is not None:
            raise UsageError("--quick and --minutes both say how much to run; give one of them.")
        recipe = recipe_of(Recipe, size=size, replicas=replicas)
        file = out.with_name("gates.h5") if store is None else store
        check_outputs([(out, "text"), (file, "HDF5")], [weights, work.class_index, labels, data])
        run = RunOptions(device=chosen_device(work.device), batch_size=work.batch_size)
        if labels is None:
            check_folder(data)
        arguments, folder = model_arguments(model_arg), data if labels is None else None
        opened = open_model(model, weights, arguments, pictures, data=folder, quiet=work.quiet)
        images = open_images(data, opened, check=True, labels=labels, **work.reading())
        present = tasks_in(as_source(images.data, any_labels=True).labels)
        with shown_progress(work.quiet, lambda progress: None) as on_progress:
            result = explained(
                opened.loaded.model,
                images.data,
                out=out,
                store=file,
                tasks=None if tasks is None else pick_tasks(tasks, images.names, present),
                recipe=recipe,
                quick=quick,
                minutes=minutes,
                certainty=certainty,
                seed=work.seed,
                overwrite=overwrite,
                task_names=images.names,
                provenance=provenance_of(opened, images),
                run=run,
                say=lambda text: say(text, work.quiet),
                on_progress=on_progress,
            )
        finished(images, work.quiet)
        taken = sum(result.taken.values())
        say(f"written: {out} and {file} ({duration(taken)})", work.quiet)
        typer.echo(shown(result.summary(), lines=True))
