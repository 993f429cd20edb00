"""Images with labels by name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from nad_attr.data.images import ClassMapping, ImageFolderData, class_folders, match_classes
from nad_attr.data.sources import Data
from nad_attr.specs.names import SpecError, call, first_line, import_object, near, need
from nad_attr.specs.transforms import Transform
from nad_attr.system.processes import check_processes
from nad_attr.system.rng import isolated_rng

__all__ = ["LoadedData", "load_data"]


@dataclass(frozen=True)
class LoadedData:
    """Images made from their name.

    Attributes:
        data: What learning and evaluation take.
        name: As given.
        names: ``{class index: name}``, as far as known.
        mapping: Which folder is which class, for folders.
        images: The folders, for folders: counts unreadable images.
        note: A note for the user, or nothing.
    """

    data: Data
    name: str
    names: dict[int, str]
    mapping: ClassMapping | None = None
    images: ImageFolderData | None = None
    note: str = ""


def load_data(
    name: str,
    transform: Transform,
    *,
    n_classes: int | None = None,
    class_index: Mapping[str, int] | None = None,
    known: Mapping[str, int] | None = None,
    class_names: Sequence[str] | None = None,
    held_out: bool = False,
    allow_empty: bool = False,
    n_workers: int = 0,
) -> LoadedData:
    """Open images with labels.

    Args:
        name: A folder with a folder of images for each class; ``torchvision:NAME:root[:split]``;
            or ``package.module:factory``, a function that returns a Dataset, a DataLoader or
            ``(inputs, labels)`` and is given ``transform=`` if it takes it.
        transform: What is done to each image.
        n_classes: Outputs of the network; None takes the folders' ranks.
        class_index: See :func:`~nad_attr.datasets.match_classes`.
        known: See there.
        class_names: See there.
        held_out: Whether torchvision's data are the test split unless a split is named.
        allow_empty: Accept class folders without images.
        n_workers: Processes that load images; not far more than CPUs.

    Raises:
        OSError: If a folder cannot be read.
        SpecError: If the name leads to nothing.
        ValueError: If it is unclear which folder is which class, or one is empty.
    """
    check_processes(n_workers)
    note, mapping, images = "", None, None
    data: Any
    if name.startswith("torchvision:"):
        data, note = _torchvision_data(name, transform, held_out)
    elif not Path(name).exists() and re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", name):
        factory = import_object(name)
        takes = _parameters(factory)
        data = call(name, {"transform": transform.function} if "transform" in takes else {})
    else:
        folders = class_folders(name)
        if n_classes is None:
            index = {folder: i for i, folder in enumerate(folders)}
            mapping = ClassMapping(index, "in alphabetical order")
        else:
            mapping = match_classes(
                folders, n_classes, class_index=class_index, known=known, class_names=class_names
            )
        data = images = ImageFolderData(
            name,
            transform.function,
            class_index=mapping.index,
            allow_empty=allow_empty,
            augmented=transform.random,
        )
    if mapping is not None:
        names: dict[int, str] = {}
        for folder, label in mapping.index.items():
            names.setdefault(label, folder)
    else:
        listed = getattr(getattr(data, "dataset", data), "classes", None) or ()
        names = {i: str(value) for i, value in enumerate(listed)}
    if not names:
        names = dict(enumerate(class_names or ()))
    if n_workers and isinstance(data, Dataset):
        data = DataLoader(data, batch_size=32, num_workers=n_workers)
    return LoadedData(data, name, names, mapping, images, note)


def _parameters(function: Any) -> Mapping[str, inspect.Parameter]:
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def _torchvision_data(name: str, transform: Transform, held_out: bool) -> tuple[Any, str]:
    need("torchvision", "a torchvision dataset")
    from torchvision import datasets

    _, kind, *rest = name.split(":")
    listed = [n for n in datasets.__all__ if n != "VisionDataset"]
    known = [n for n in listed if "transform" in _parameters(getattr(datasets, n))]
    if kind not in known:
        raise SpecError(f"torchvision has no dataset {kind!r}" + near(kind, known))
    makes = getattr(datasets, kind)
    takes = _parameters(makes)
    options: dict[str, Any] = {"transform": transform.function}
    splits = "train" in takes or "split" in takes
    split = rest.pop() if splits and len(rest) > 1 else ""
    note = ""
    if splits and not split:
        split = "test" if held_out else "train"
        note = f"the {split} split of {kind}; {name}:SPLIT names another."
    if "train" in takes and split:
        if split not in ("train", "test"):
            raise SpecError(f"{kind} has the splits train and test, not {split!r}.")
        options["train"] = split == "train"
    elif split:
        options["split"] = split
    if "root" in takes:
        if not rest:
            raise SpecError(f"say where {kind} lies: torchvision:{kind}:FOLDER.")
        options["root"] = ":".join(rest)
    if "download" in takes:
        options["download"] = False
    try:
        with isolated_rng(0):
            data = makes(**options)
    except Exception as error:
        raise SpecError(
            f"torchvision's {kind} cannot be opened: {first_line(error)} (Nothing is downloaded: "
            f"torchvision.datasets.{kind}(root, download=True) does that, where it can.)"
        ) from error
    data.augmented = transform.random
    return data, note
