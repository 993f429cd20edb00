"""Open what the user names: networks, transforms, data, stores."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nad_attr.cli.messages import UsageError, progress_bar, say
from nad_attr.cli.options import NetworkOptions, PictureOptions, WorkOptions
from nad_attr.data.fingerprints import model_hash
from nad_attr.data.images import (
    ClassMapping,
    ImageFolderData,
    class_folders,
    match_classes,
    read_class_index,
    read_image,
)
from nad_attr.data.labels import Labels, Task
from nad_attr.data.sources import as_source
from nad_attr.gates.task_gates import TaskGates
from nad_attr.running.options import RunOptions
from nad_attr.specs import (
    LoadedData,
    LoadedModel,
    SpecError,
    Transform,
    is_plain_model,
    load_data,
    load_model,
    make_transform,
    n_outputs,
    parse_tasks,
)
from nad_attr.specs.label_table import PhotoTable, read_table
from nad_attr.store import GateStore
from nad_attr.system.files import check_output
from nad_attr.system.rng import isolated_rng


def model_arguments(items: Sequence[str] | None) -> dict[str, Any]:
    """``NAME=VALUE`` options; values are JSON, or else text.

    Example:
        >>> model_arguments(["num_classes=10", "act=relu"])
        {'num_classes': 10, 'act': 'relu'}
    """
    result: dict[str, Any] = {}
    for item in items or ():
        name, equals, value = item.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"--model-arg takes NAME=VALUE, got {item!r}.")
        try:
            result[name] = json.loads(value)
        except json.JSONDecodeError:
            result[name] = value
    return result


def chosen_device(name: str | None) -> str:
    """The device of that name, or CUDA if there is one."""
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=torch.device(name))
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}") from None
    return name


def run_options(work: WorkOptions, *, amp: bool = False) -> RunOptions:
    """How to run the network; progress is shown on a terminal."""
    return RunOptions(
        chosen_device(work.device),
        amp=amp,
        batch_size=work.batch_size,
        show_progress=not work.quiet and sys.stderr.isatty(),
    )


def open_images(
    data: str,
    opened: Opened,
    *,
    class_index: Path | None = None,
    held_out: bool = False,
    allow_empty: bool = False,
    check: bool = False,
    n_workers: int = 0,
    quiet: bool = False,
    labels: Path | None = None,
) -> LoadedData:
    """Open data for a network, and say which folder is which class."""
    loaded, transform = opened.loaded, opened.transform
    n_classes = None
    given = None if class_index is None else read_class_index(class_index)
    if labels is not None:
        return _open_table(labels, data, opened, given, quiet)
    one_output = False
    if Path(data).exists():
        n_classes = n_outputs(loaded.model, _first_image(data, transform))
        if n_classes == 1:
            one_output, n_classes = True, 2
    found = load_data(
        data,
        transform,
        n_classes=n_classes,
        class_index=given,
        known=opened.known,
        class_names=loaded.class_names,
        held_out=held_out,
        allow_empty=allow_empty,
        n_workers=n_workers,
    )
    if found.images is not None:
        say(f"data: {len(found.images):,} images in {data}, {found.mapping}", quiet)
        _check_shapes(found.images, transform)
        if check:  # read all images once and leave out those that cannot be read
            with progress_bar("checking images", len(found.images), quiet) as advance:
                found.images.check(n_workers=n_workers, progress=advance)
    else:
        say(f"data: {data}", quiet)
    say(found.note and f"      {found.note}", quiet)
    if one_output and found.images is not None:
        one = Labels([[label] for label in found.images.targets], kind="several")
        return replace(found, data=(found.data, one), names={0: found.names.get(1, "1")})
    return found


def _open_table(
    labels: Path, folder: str, opened: Opened, given: Mapping[str, int] | None, quiet: bool
) -> LoadedData:
    """Images of a folder with the labels of a table."""
    loaded, transform = opened.loaded, opened.transform
    files, _, _ = read_table(labels, folder)
    photos = PhotoTable(folder, files, transform.function, transform.random)
    n_classes = n_outputs(loaded.model, photos[0][None])
    mapping: ClassMapping | None = None

    def numbered(found: Sequence[str]) -> Mapping[str, int]:
        nonlocal mapping
        mapping = match_classes(
            found, n_classes, class_index=given, known=opened.known, class_names=loaded.class_names
        )
        return mapping.index

    _, read, names = read_table(labels, folder, numbered, one_output=n_classes == 1)
    text = "" if mapping is None else f", {str(mapping).replace(' folder', '', 1)}"
    say(f"data: {len(files):,} images in {folder}, labels in {labels}{text}", quiet)
    _check_shapes(photos, transform)
    if len(as_source((photos, read), any_labels=True).labels.shape) == 1:
        names = {k: str(n) for k, n in enumerate(loaded.class_names or ())} | names
    return LoadedData((photos, read), folder, names, mapping)


#: Files whose sizes are read, and images of different sizes that are compared behind the transform,
#: at most.
HEADS_READ, SIZES_COMPARED = 2000, 8


def _check_shapes(images: ImageFolderData | PhotoTable, transform: Transform) -> None:
    """Refuse pictures that have several sizes after the transform: no batch can hold them."""
    from PIL import Image

    known: dict[tuple[int, int], int] = {}
    if transform.record.get("crop"):
        return
    for number in range(0, len(images), max(1, len(images) // HEADS_READ)):
        try:
            with Image.open(images.path(number)) as picture:  # reads its head only
                known.setdefault(picture.size, number)
        except (OSError, ValueError, Image.DecompressionBombError):
            continue  # another check names it
        if len(known) >= SIZES_COMPARED:
            break
    shapes: dict[tuple[int, ...], Path] = {}
    for number in known.values():
        path = images.path(number)
        with suppress(OSError, ValueError), isolated_rng(0):
            made = transform.function(read_image(path))
            shapes.setdefault(tuple(getattr(made, "shape", ())), path)
    if len(shapes) > 1:
        (a, first), (b, second), *_ = shapes.items()
        raise UsageError(
            f"the pictures come to the network at several sizes, which cannot go into one batch: "
            f"{first} as {' x '.join(map(str, a))}, {second} as {' x '.join(map(str, b))}. Give "
            "--resize and --crop, such as --resize 256 --crop 224, or a --transform that crops."
        )


def check_outputs(
    outputs: Iterable[tuple[Path | None, str]], inputs: Iterable[object] = ()
) -> None:
    """Refuse to write where something would be lost, before any work is done.

    ``outputs`` are files and their kinds, see :func:`nad_attr.system.files.check_output`;
    ``inputs`` are files and folders that are read, also as names of data. None is left out.
    """
    places = [place for given in inputs if given is not None for place in _places(str(given))]
    wanted = [(path, kind) for path, kind in outputs if path is not None]
    for i, (path, kind) in enumerate(wanted):
        try:
            check_output(path, kind, places)
        except OSError as error:
            raise UsageError(str(error)) from None
        if any(os.path.realpath(path) == os.path.realpath(other) for other, _ in wanted[:i]):
            raise UsageError(f"{path} is asked for twice; give each output a file of its own.")


def check_result(out: Path | None, gates: Path, inputs: Iterable[object], *, csv: bool) -> None:
    """Refuse an output file that has an unknown suffix or is also an input.

    An HDF5 file may be that of the gates: the result is written beside them.
    """
    text = (".json", ".csv") if csv else (".json",)
    if out is not None and out.suffix not in (*text, ".h5", ".hdf5"):
        raise UsageError(f"--out writes {', '.join(text)} or .h5, not {out.name!r}.")
    is_text = out is not None and out.suffix in text
    check_outputs([(out, "text" if is_text else "HDF5")], [*inputs, *([gates] if is_text else [])])


def _places(name: str) -> tuple[str, ...]:
    """Where data of that name may lie: a folder, or torchvision's root."""
    _, _, rest = name.partition(":")
    root = rest.partition(":")[2] if name.startswith("torchvision:") else ""
    return tuple(place for place in (name, root, root.rpartition(":")[0]) if place)


def check_folder(data: str, labels: Path | None = None) -> None:
    """Refuse data that can only name a folder, and none is there, before a network is made."""
    if labels is not None:
        if not Path(data).is_dir():
            raise FileNotFoundError(f"there is no folder {data}.")
    elif ":" not in data:
        class_folders(data)


def _first_image(data: str, transform: Transform) -> torch.Tensor:
    """One image of a folder, as the network gets it."""
    folder = ImageFolderData(data, transform.function, allow_empty=True)
    image = folder[0][0]
    if not isinstance(image, torch.Tensor):
        raise SpecError(
            f"the transform makes a {type(image).__name__} of an image, not a tensor; let it end "
            "in one (torchvision's ToTensor, for example)."
        )
    return image[None]


def pick_tasks(
    text: Sequence[str] | None, names: Mapping[int, str], present: Sequence[int]
) -> list[int]:
    """See :func:`nad_attr.specs.parse_tasks`; a wrong text is a wrong option."""
    try:
        return parse_tasks(text, names, present)
    except SpecError as error:
        raise UsageError(f"--tasks: {error}") from None


@dataclass(frozen=True)
class Opened:
    """A network with the transform of its images."""

    loaded: LoadedModel
    transform: Transform
    known: dict[str, int] | None = None  # which folder was which class when gates were learned


def open_model(
    model: str,
    weights: Path | None,
    arguments: Mapping[str, Any],
    pictures: PictureOptions,
    *,
    record: Mapping[str, Any] | None = None,
    data: str | None = None,
    quiet: bool = False,
) -> Opened:
    """Make a network and its transform, and say what was chosen."""
    loaded = load_model(model, weights=weights, arguments=arguments)
    beside = "" if weights is None else f", weights {weights}"
    say(f"model: {loaded.name}{beside}", quiet)
    for note in loaded.notes:
        say(f"       {note}", quiet)
    made = make_transform(
        loaded, factory=pictures.transform, options=pictures.options(), record=record, data=data
    )
    say(f"images: {made.text}", quiet)
    say(made.note and f"        {made.note}", quiet)
    return Opened(loaded, made)


def provenance_of(opened: Opened, data: LoadedData) -> dict[str, Any]:
    """What a store must hold so that network, transform and classes can be made again."""
    loaded = opened.loaded
    return {
        "model": loaded.name,
        "weights": loaded.weights,
        "model_arguments": loaded.arguments,
        "transform": opened.transform.record,
        "data": data.name,
        "folders": None if data.mapping is None else data.mapping.index,
        "class_names": {str(index): name for index, name in data.names.items()},
    }


def rebuilt(
    provenance: Mapping[str, Any], network: NetworkOptions, *, quiet: bool = False
) -> Opened:
    """The network that gates were learned on, made again and compared.

    A file from elsewhere may name any function and any file. Only plain names of architectures
    (:func:`nad_attr.specs.is_plain_model`) and numbers of transforms are taken from it; the command
    line has to say or trust the rest.

    Raises:
        SpecError: If the store does not say how to make it, says more than a file may, or it is
            another network.
    """
    model, weights, pictures = network.model, network.weights, network.pictures
    name, record = model or provenance.get("model"), provenance.get("transform")
    record = record if isinstance(record, dict) else None
    if model is None and (not isinstance(name, str) or ":" not in name):
        raise SpecError(
            "the file does not say how to make its network (it was not written by nad-attr "
            "learn); name it with --model."
        )
    own = model_arguments(network.model_arg)
    named: list[tuple[str, str]] = []
    if model is None:
        known = provenance.get("model_arguments")
        known = known if isinstance(known, dict) else {}
        if not is_plain_model(name, known):
            named.append(("--model", str(name)))
            named += [("--model-arg", f"{k}={json.dumps(v)}") for k, v in known.items()]
        own = {**known, **own}
        file = provenance.get("weights")
        if weights is None and isinstance(file, str):
            weights = Path(file)
            named.append(("--weights", file))
    if record is not None and record.get("kind") == "factory":
        if pictures.transform is None and not pictures.options():
            named.append(("--transform", str(record.get("factory"))))
    check_trust(named, network.trust_file)
    if ("--weights", str(weights)) in named and not Path(str(weights)).is_file():
        raise SpecError(
            f"the network's weights were in {shown(str(weights))}, which is not there now; say "
            "where they are with --weights."
        )
    opened = open_model(str(name), weights, own, network.pictures, record=record, quiet=quiet)
    expected = provenance.get("model_hash")
    if isinstance(expected, str) and model_hash(opened.loaded.model) != expected:
        text = (
            f"this is not the network that the gates were learned on: the weights of {name} "
            "differ from theirs"
        )
        if not network.any_model:
            raise SpecError(
                f"{text}. Name the right one with --model and --weights, or take it "
                "all the same with --any-model."
            )
        say(f"Warning: {text}.", quiet)
    return replace(opened, known=known_folders(provenance))


def check_trust(named: Sequence[tuple[str, str]], trust: bool) -> None:
    """Refuse what a file must not name; if the user trusts it, print that before it is called."""
    if not named:
        return
    said = " ".join(f"{option} {shown(shlex.quote(value))}" for option, value in named)
    if not trust:
        raise SpecError(
            "the file of the gates names functions or files, and a file from elsewhere could name "
            f"any. If these are yours, say so: {said} (or --trust-file, for all that it names)."
        )
    say(f"trusted: the file of the gates says {said}")


def shown(text: str) -> str:
    """A text from a file for a terminal, with unprintable characters written out."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def finished(data: LoadedData, quiet: bool) -> None:
    """Say which images could not be read."""
    if data.images is not None:
        say(data.images.report(), quiet, lines=True)


def opened_gates(
    path: Path, tasks: Sequence[str] | None = None
) -> tuple[TaskGates, dict[str, Any]]:
    """The gates of some tasks of a file, by number or name, and their provenance."""
    with GateStore.open(path) as store:
        return store.read(chosen_tasks(store, tasks)), dict(store.provenance)


class Study:
    """A file of gates in use: its gates, their network made again, and images for it."""

    def __init__(
        self,
        gates: TaskGates,
        provenance: Mapping[str, Any],
        network: NetworkOptions,
        work: WorkOptions,
    ) -> None:
        self.gates, self.provenance, self.work = gates, provenance, work
        self.trust_file = network.trust_file
        self.opened = rebuilt(provenance, network, quiet=work.quiet)
        self.model = self.opened.loaded.model

    def images(self, data: str, labels: Path | None, **how: Any) -> LoadedData:
        """See :func:`open_images`."""
        return open_images(data, self.opened, labels=labels, **self.work.reading(), **how)

    def training_images(
        self,
        data: str | None,
        labels: Path | None,
        held_out_labels: Path | None,
        why: str = "name the images to score channels on",
        option: str = "--train-data",
        **how: Any,
    ) -> LoadedData:
        """Images that the user names, or else those that a trusted file names."""
        if data is None:
            if held_out_labels and not labels:
                table = {"--train-data": "--train-labels", "--data": "--labels"}[option]
                raise SpecError(f"{why} with {option} FOLDER {table} TABLE.csv.")
            said = self.provenance.get("data")
            if not isinstance(said, str):
                raise SpecError(f"{why} with {option}.")
            check_trust([(option, said)], self.trust_file)
            data = said
        return self.images(data, labels, **how)


def chosen_tasks(store: GateStore, tasks: Sequence[str] | None) -> list[Task] | None:
    """The tasks of a store that the user names; None if none are named."""
    if tasks is None:
        return None
    singles = [task for task in store.tasks if isinstance(task, int)]
    names: dict[int, str] = {}
    if store.task_names is not None:
        named = zip(store.tasks, store.task_names, strict=True)
        names = {task: name for task, name in named if isinstance(task, int)}
        # Groups of classes go by their names alone.
        groups = dict(zip(store.task_names, store.tasks, strict=True))
        if all(isinstance(groups.get(text), tuple) for text in tasks):
            return [groups[text] for text in tasks]
    return list(pick_tasks(tasks, names, singles))


def known_folders(provenance: Mapping[str, Any]) -> dict[str, int] | None:
    """Which folder was which class when the gates were learned."""
    folders = provenance.get("folders")
    if not isinstance(folders, dict):
        return None
    return {str(name): int(index) for name, index in folders.items() if isinstance(index, int)}
