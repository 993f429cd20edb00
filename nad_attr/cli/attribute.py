"""``nad-attr attribute``."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor

from nad_attr.attribution import NADAttribution
from nad_attr.cli import options as opt
from nad_attr.cli.messages import UsageError, guarded, print_table, say
from nad_attr.cli.opening import (
    Opened,
    check_outputs,
    chosen_device,
    open_images,
    opened_gates,
    pick_tasks,
    rebuilt,
)
from nad_attr.data.images import EXTENSIONS, read_image
from nad_attr.data.labels import own_images
from nad_attr.data.sources import as_source
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import channel_shape
from nad_attr.sites.site import GateSite
from nad_attr.specs import SpecError
from nad_attr.specs.label_table import first_file
from nad_attr.store import write_result
from nad_attr.system.files import written
from nad_attr.system.safe_text import cell, shown

__all__ = ["attribute"]

#: Channels beside each other in a table; more go into the next one.
CHANNELS_ABREAST = 6


class _Row(NamedTuple):
    image: str
    task: int
    name: str
    output: float
    site: str
    channel: int
    gate: float
    attribution: float


def attribute(
    gates: opt.Store,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    task: Annotated[
        str | None,
        typer.Option(help="Class to explain; default: the most likely of the learned ones."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Channels to show at each site.")] = 3,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", dir_okay=False, help="Write the top channels here.")
    ] = None,
    hdf5_file: Annotated[
        Path | None,
        typer.Option("--hdf5", dir_okay=False, help="Write all channels of all images here."),
    ] = None,
    labels: opt.LabelTable = None,
    device: opt.Device = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
    *,
    network: opt.NetworkOptions,
) -> None:
    """Attribute images to the channels that their class needs: gate times activation.

    A channel's number is the mean over positions, from NADAttribution with the learned gates. With
    --labels, each image is explained for its class in the table.

    Examples:
      nad-attr attribute gates.h5 cat.jpg
      nad-attr attribute gates.h5 photos/val/cat/*.jpg --task cat --top 5 --csv channels.csv
      nad-attr attribute gates.h5 cat.jpg dog.jpg --hdf5 attributions.h5
    """
    with guarded(debug):
        for path in images:
            if path.is_dir():
                raise UsageError(f"{path} is a folder; name image files, as in {path}/*.jpg.")
            if not path.exists():
                raise UsageError(f"there is no file {path}.")
        if labels is not None and task is not None:
            raise UsageError("--labels says what each image is explained for; leave out --task.")
        read = [*images, network.weights, labels]
        check_outputs([(csv_file, "text"), (hdf5_file, "HDF5")], read)
        if csv_file is not None:
            check_outputs([(csv_file, "text")], [gates])
        place = chosen_device(device)
        learned, provenance = opened_gates(gates)
        opened = rebuilt(provenance, network, quiet=quiet)
        tasks = [k for k in learned.tasks if isinstance(k, int)]
        if not tasks:
            raise SpecError(
                f"{gates} holds groups of classes only; attribute needs a task of a single class."
            )
        names = _names(learned)
        wanted = None
        if task is not None:
            (wanted, *more) = pick_tasks([task], names, tasks)
            if more:
                raise UsageError("--task takes one class.")
        own = {} if labels is None else _own_tasks(labels, images, opened, tasks)
        net = opened.loaded.model.to(place)
        nad = NADAttribution(net, gates=learned)
        parameter = next(net.parameters(), torch.zeros(0, device="cpu"))
        rows: list[_Row] = []
        everything: list[dict[str, Tensor]] = []
        explained: list[tuple[str, int, float]] = []
        for path in images:
            say(f"{path}", quiet or len(images) == 1)
            image = opened.transform.function(_read(path))[None].to(place, parameter.dtype)
            with torch.no_grad():
                outputs = net(image).reshape(-1)
            likeliest = max(tasks, key=lambda k: float(outputs[k]))
            for target in own.get(path) or [likeliest if wanted is None else wanted]:
                values = nad.attribute(image, target=target)
                channels = {
                    site.name: _per_channel(site, value)
                    for site, value in zip(learned.sites, values, strict=True)
                }
                everything.append(channels)
                output = float(outputs[target])
                explained.append((str(path), target, output))
                rows += _top(path, target, names[target], output, learned, channels, top)
        _print(rows)
        if csv_file is not None:
            with written(csv_file) as file:
                writer = csv.writer(file)
                writer.writerow(_Row._fields)
                writer.writerows(map(cell, row) for row in rows)
            say(f"written: {csv_file}", quiet)
        if hdf5_file is not None:
            _write(hdf5_file, explained, learned, everything)
            say(f"written: {hdf5_file}", quiet)


def _own_tasks(
    table: Path, images: list[Path], opened: Opened, tasks: list[int]
) -> dict[Path, list[int]]:
    """The learned tasks that each image is an own image of, by a table in a folder above it."""
    first = first_file(table)
    above = dict.fromkeys(parent for path in images for parent in path.resolve().parents)
    folder = next((str(parent) for parent in above if (parent / first).is_file()), None)
    if folder is None:
        raise SpecError(f"{table} names {first!r}, which is not in any folder above {images[0]}.")
    opened_images: Any = open_images(folder, opened, labels=table, quiet=True).data
    photos, _ = opened_images
    read = as_source(opened_images, any_labels=True).labels
    at = {photos.path(i).resolve(): i for i in range(len(photos))}
    missing = [path for path in images if path.resolve() not in at]
    if missing:
        raise SpecError(f"{table} has no row for {missing[0]}.")
    own = own_images(read, tasks)
    return {
        path: [task for task, has in zip(tasks, own[:, at[path.resolve()]], strict=True) if has]
        for path in images
    }


def _names(gates: TaskGates) -> dict[int, str]:
    names = gates.task_names or tuple(map(str, gates.tasks))
    return {k: n for k, n in zip(gates.tasks, names, strict=True) if isinstance(k, int)}


def _read(path: Path) -> object:
    try:
        return read_image(path)
    except ValueError as error:
        kinds = "" if path.suffix.lower() in EXTENSIONS else f" ({path.suffix} is not a picture)"
        raise SpecError(f"{path} cannot be read: {error}{kinds}") from None


def _per_channel(site: GateSite, value: Tensor) -> Tensor:
    dim, _ = channel_shape(site, value)
    return value.detach().movedim(dim, 1).reshape(site.n_channels, -1).float().mean(1).cpu()


def _top(
    path: Path,
    task: int,
    name: str,
    output: float,
    gates: TaskGates,
    channels: dict[str, Tensor],
    top: int,
) -> Iterator[_Row]:
    own = gates.gates_of(task)
    for site, values in channels.items():
        gate = own[site]
        order = values.abs().argsort(descending=True, stable=True)[:top]
        for c in order.tolist():
            of_channel = (site, c, float(gate[c]), float(values[c]))
            yield _Row(str(path), task, name, output, *of_channel)


def _print(rows: list[_Row]) -> None:
    for image, task in dict.fromkeys((row.image, row.task) for row in rows):
        own = [row for row in rows if (row.image, row.task) == (image, task)]
        say("")
        typer.echo(shown(f"{image}: {own[0].name} ({own[0].task}), output {own[0].output:.2f}"))
        table = []
        for site in dict.fromkeys(row.site for row in own):
            at = [row for row in own if row.site == site]
            table.append([site, *(f"{row.channel} ({row.attribution:.3g})" for row in at)])
        width = max(map(len, table))
        table = [row + [""] * (width - len(row)) for row in table]
        for start in range(1, width, CHANNELS_ABREAST):
            columns = range(start, min(width, start + CHANNELS_ABREAST))
            header = ["site", *(f"channel {i}" for i in columns)]
            print_table(header, [[row[0], *(row[i] for i in columns)] for row in table])


def _write(
    path: Path,
    explained: list[tuple[str, int, float]],
    gates: TaskGates,
    everything: list[dict[str, Tensor]],
) -> None:
    image, task, output = map(list, zip(*explained, strict=True))
    arrays: dict[str, Any] = {"image": image, "task": np.array(task), "output": np.array(output)}
    for i, site in enumerate(gates.sites):
        arrays[f"site_{i}"] = torch.stack([part[site.name] for part in everything]).numpy()
    write_result(
        path,
        "attribution",
        arrays,
        {"sites": [site.name for site in gates.sites], "value": "mean of gate x activation"},
    )
