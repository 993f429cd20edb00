"""``nad-attr learn``."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from nad_attr.cli import options as opt
from nad_attr.cli.messages import UsageError, check_size, counted, duration, guarded, say
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
from nad_attr.gates.recipe import Recipe
from nad_attr.learning.runs import MAY_DIFFER, Executor, Progress, learn_to_store
from nad_attr.running.options import RunOptions
from nad_attr.sites.finding import find_gate_sites
from nad_attr.sites.site import GateSite
from nad_attr.specs import LoadedData, is_plain_model
from nad_attr.store import GateStore

__all__ = ["learn", "shown_progress"]

#: Seconds between two lines of progress where there is no terminal.
_SECONDS_BETWEEN_LINES = 30.0
#: Architectures whose weight of the size term the paper's authors published.
_PUBLISHED = ("vgg16", "resnet50", "densenet121")


class RecipeName(str, Enum):
    """Which recipe."""

    default = "default"
    paper = "paper"


class Ablation(str, Enum):
    """What a closed channel becomes."""

    mean = "mean"
    zero = "zero"
    optimal = "optimal"


def learn(
    model: opt.Model,
    data: opt.DataOption,
    out: Annotated[Path, typer.Option(dir_okay=False, help="HDF5 file to write.")] = Path(
        "gates.h5"
    ),
    tasks: opt.Tasks = None,
    size: Annotated[
        float | None,
        typer.Option(help="Share of the channels that each class keeps, above 0, up to 1. [0.5]"),
    ] = None,
    fidelity: Annotated[
        float | None,
        typer.Option(
            help="In place of --size: each class gets the smallest size that keeps this "
            "fidelity, between 0 and 1, on a third of the images, which is kept apart."
        ),
    ] = None,
    weights: opt.Weights = None,
    model_arg: opt.ModelArg = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Put gates at this module instead of finding sites; repeatable."),
    ] = None,
    units: opt.Units = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an existing file.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    may_differ: Annotated[
        list[str] | None,
        typer.Option(help=f"With --resume, what may have changed: {', '.join(MAY_DIFFER)}."),
    ] = None,
    seed: opt.Seed = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Learning steps for each class. [100; with --fidelity 350]"),
    ] = None,
    images_per_step: Annotated[
        int | None, typer.Option(min=1, help="Images for each class and step. [20]")
    ] = None,
    replicas: opt.Replicas = None,
    ablation: Annotated[
        Ablation | None, typer.Option(help="What a closed channel becomes. [optimal]")
    ] = None,
    recipe: Annotated[
        RecipeName, typer.Option(help="The default recipe, or the published one.")
    ] = RecipeName.default,
    beta: Annotated[
        float | None, typer.Option(help="Weight of the size term of the published recipe.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over own images, published recipe. [20]")
    ] = None,
    class_index: opt.ClassIndex = None,
    labels: opt.LabelTable = None,
    allow_empty: opt.AllowEmpty = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Read all images first and leave out those that cannot be read. Without it, the "
            "next image of the class takes the place of one that cannot.",
        ),
    ] = False,
    device: opt.Device = None,
    amp: opt.Amp = False,
    batch_size: opt.LearningBatch = 64,
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help="Memory for --batch-size auto, such as 8GB. [half of the free memory; GPU: 90 %]",
        ),
    ] = None,
    checks: opt.Checks = opt.ChecksName.refuse,
    workers: opt.Workers = 0,
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Classes that are learned and saved together.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Spread classes over Ray: auto, local, or a cluster's address."),
    ] = None,
    gpus_per_worker: Annotated[
        float | None, typer.Option(min=0, help="Share of a GPU for each Ray worker.")
    ] = None,
    ray_workers: Annotated[
        int | None, typer.Option(min=1, help="Ray workers at most; default: as many as fit.")
    ] = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
    *,
    pictures: opt.PictureOptions,
) -> None:
    """Learn which channels a network needs for each class, and save the gates in a file.

    Every class is saved as soon as it is learned: after Ctrl-C or a crash, the same command with
    --resume goes on, and ends with the same gates.

    Examples:
      nad-attr learn --model torchvision:resnet50 --data photos/train --tasks 0-9 --size 0.4
      nad-attr learn --model mynets:cifar_resnet20 --weights r20.pt --data photos/train --resume
      nad-attr learn --model torchvision:vgg16 --data photos/train --recipe paper --out paper.h5
      nad-attr learn --model timm:resnet18.a1_in1k --data photos/train --ray local
    """
    done: list[Progress] = []

    def stopped() -> str:
        if not done or not out.exists():
            return "Nothing was saved yet."
        saved = f"{done[-1].done} of {done[-1].total} tasks are saved in {out}."
        return f"{saved} To go on:\n  {_again()}"

    with guarded(debug, stopped=stopped):
        budget = {"size": size, "fidelity": fidelity, "steps": steps, "replicas": replicas}
        made = _recipe(model, recipe, budget, images_per_step, ablation, beta, epochs)
        executor = _executor(ray, gpus_per_worker, ray_workers)
        unknown = [name for name in may_differ or () if name not in MAY_DIFFER]
        if unknown:
            raise UsageError(f"--may-differ takes {', '.join(MAY_DIFFER)}, got {unknown[0]!r}.")
        kinds = opt.units_of(units)
        if units is not None and layer:
            raise UsageError("--units finds sites, and --layer names them: give one of the two.")
        if resume and overwrite:
            raise UsageError("--resume keeps what is in the file, --overwrite replaces it.")
        if out.exists() and not (resume or overwrite):
            raise UsageError(
                f"{out} is there already: --resume goes on with it, --overwrite replaces it."
            )
        check_outputs([(out, "HDF5")], [weights, class_index, labels, None if resume else data])
        place = None if executor is not None and device is None else chosen_device(device)
        check_folder(data, labels)
        arguments, folder = model_arguments(model_arg), data if labels is None else None
        opened = open_model(model, weights, arguments, pictures, data=folder, quiet=quiet)
        images = open_images(
            data,
            opened,
            class_index=class_index,
            allow_empty=allow_empty,
            check=check,
            n_workers=workers,
            quiet=quiet,
            labels=labels,
        )
        wanted, names = _tasks(images, tasks)
        sites: list[str] | list[GateSite] | None = layer or None
        if units is not None:
            source = as_source(images.data, any_labels=True)
            example = next(iter(source.batches([[(0, 0)]])))
            sites = find_gate_sites(opened.loaded.model, example, units=kinds)
        with shown_progress(quiet, done.append) as on_progress:
            learn_to_store(
                opened.loaded.model,
                images.data,
                out,
                wanted,
                made,
                sites,
                seed=seed,
                device=place,
                amp=amp or None,
                batch_size=batch_size,
                run=RunOptions(memory_limit=memory_limit),
                chunk_size=chunk_size,
                checks=checks.value,
                resume=resume,
                overwrite=overwrite,
                may_differ=tuple(may_differ or ()),
                task_names=names,
                provenance=provenance_of(opened, images),
                executor=executor,
                on_progress=on_progress,
            )
        finished(images, quiet)
        if quiet:
            return
        with GateStore.open(out) as store:
            last = done[-1]
            learned = last.done - last.found
            channels = sum(site.n_channels for site in store.sites)
            say(
                f"{out}: {counted(len(store.tasks), 'task')}, {counted(len(store.sites), 'site')}, "
                f"{counted(channels, 'channel')} ({learned} learned in {duration(last.seconds)})"
            )
            # The reader has to trust a file that names functions or weights.
            plain = weights is None and pictures.transform is None
            plain = plain and is_plain_model(opened.loaded.name, opened.loaded.arguments)
            trusted = "" if plain else " --trust-file"
            say(f"next: nad-attr evaluate {shlex.quote(str(out))} --data HELD_OUT_PHOTOS{trusted}")


def _again() -> str:
    words = list(sys.argv[1:])
    if "--overwrite" in words:
        words.remove("--overwrite")
    if "--resume" not in words:
        words.append("--resume")
    return shlex.join(["nad-attr", *words])


def _recipe(
    model: str,
    kind: RecipeName,
    budget: dict[str, Any],
    images_per_step: int | None,
    ablation: Ablation | None,
    beta: float | None,
    epochs: int | None,
) -> Recipe:
    check_size(budget["size"])
    fields: dict[str, Any] = {**budget, "beta": beta, "epochs": epochs}
    fields["ablation"] = None if ablation is None else ablation.value
    other: tuple[str, ...] = ("beta", "epochs")
    belongs = "published"
    if kind is RecipeName.paper:
        other, belongs = ("size", "fidelity", "steps", "replicas", "ablation"), "default"
    for name in other:
        if fields.pop(name) is not None:
            raise UsageError(
                f"--{name} belongs to the {belongs} recipe, not to --recipe {kind.value}."
            )
    fields["images_per_step"] = images_per_step
    if kind is RecipeName.default:
        return recipe_of(Recipe, **fields)
    name = model.partition(":")[2].partition(":")[0].lower()
    if name in _PUBLISHED and model.startswith("torchvision:"):
        return recipe_of(partial(Recipe.paper, name), **fields)
    if beta is None:
        raise UsageError(
            "the published recipe needs --beta, the weight of its size term, for a network "
            f"other than torchvision's {', '.join(_PUBLISHED)}."
        )
    return recipe_of(Recipe.paper, **fields)


def recipe_of(make: Callable[..., Recipe], **options: Any) -> Recipe:
    """The recipe of those options that were given; the error of a wrong one names it."""
    given = {name: value for name, value in options.items() if value is not None}
    try:
        return make(**given)
    except ValueError as error:
        raise UsageError(str(error).removeprefix("recipe: ")) from None


def _executor(ray: str | None, gpus: float | None, workers: int | None) -> Executor | None:
    if ray is None:
        for name, value in (("--gpus-per-worker", gpus), ("--ray-workers", workers)):
            if value is not None:
                raise UsageError(f"{name} is for Ray: add --ray auto, local or ADDRESS.")
        return None
    from nad_attr.learning.ray_executor import RayExecutor

    wanted = {"gpus_per_worker": gpus, "n_workers": workers}
    given: dict[str, Any] = {name: n for name, n in wanted.items() if n is not None}
    try:
        executor: Executor = RayExecutor(ray, **given)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return executor


def _tasks(images: LoadedData, text: list[str] | None) -> tuple[list[int], dict[int, str]]:
    labels = tasks_in(as_source(images.data, any_labels=True).labels)
    wanted = pick_tasks(text, images.names, labels)
    names = {k: images.names.get(k, str(k)) for k in wanted}
    # Some classes of ImageNet share a name.
    once = list(names.values())
    return wanted, {k: n if once.count(n) == 1 else f"{n} ({k})" for k, n in names.items()}


@contextmanager
def shown_progress(
    quiet: bool, also: Callable[[Progress], object]
) -> Iterator[Callable[[Progress], object]]:
    """Progress with the time left: a bar on a terminal, a line now and then elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if quiet:
        yield also
        return
    if not console.is_terminal:
        said = [time.monotonic(), -1.0]

        def line(progress: Progress) -> None:
            also(progress)
            if time.monotonic() - said[0] >= _SECONDS_BETWEEN_LINES:
                said[0] = time.monotonic()
                say(_text(progress))

        yield line
        return
    columns = (
        TextColumn("learning"),
        BarColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
    )
    with Bar(*columns, console=console) as bar:
        task = bar.add_task("", total=None)

        def update(progress: Progress) -> None:
            also(progress)
            bar.update(
                task, total=progress.n_steps, completed=progress.steps, description=_text(progress)
            )

        yield update


def _text(progress: Progress) -> str:
    left = progress.seconds_left
    parts = [f"{progress.done}/{progress.total} tasks saved"]
    if left is not None and progress.steps < progress.n_steps:
        parts.append(f"{duration(left)} left")
    if progress.lost:
        parts.append(f"{progress.lost} workers lost")
    return ", ".join(parts)
