"""What is done to images: what the model's weights say, or what the user says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nad_attr.data.images import ImageFolderData, ImageTransform, read_image
from nad_attr.specs.models import LoadedModel
from nad_attr.specs.names import SpecError, call

__all__ = ["Transform", "make_transform"]


@dataclass(frozen=True)
class Transform:
    """The transform of each image before the network.

    Attributes:
        function: From a Pillow image to a tensor.
        record: What it is made from, as JSON knows it.
        text: The same for people.
        random: Whether it may be random.
        note: A note for the user, or nothing.
    """

    function: Callable[[Any], Any]
    record: dict[str, Any]
    text: str
    random: bool = False
    note: str = ""


def make_transform(
    loaded: LoadedModel,
    *,
    factory: str | None = None,
    options: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    data: str | None = None,
) -> Transform:
    """Choose what is done to images.

    This is the factory, if one is named; else the transform of the model's weights, changed by the
    options; else short side 256 and middle 224, or nothing for small images of one size.

    Args:
        loaded: The model.
        factory: ``package.module:factory``, a function without arguments.
        options: Fields of :class:`~nad_attr.datasets.ImageTransform`.
        record: From an earlier transform; made again unless something else is asked for.
        data: The data; a folder's first images say whether they are small ones of one size.

    Raises:
        SpecError: If the factory fails, or options make no sense.
    """
    options = dict(options or {})
    if factory is not None and options:
        raise SpecError(
            "--transform says everything about images; leave out --resize, --crop, --mean, --std "
            "and --interpolation."
        )
    if factory is None and record is not None and record.get("kind") == "factory":
        factory = None if options else str(record.get("factory"))
    if factory is not None:
        function = call(factory, {})
        if not callable(function):
            raise SpecError(f"{factory}() returned a {type(function).__name__}, not a transform.")
        return Transform(function, {"kind": "factory", "factory": factory}, factory, random=True)
    recorded = record is not None and record.get("kind") == "options"
    own = loaded.transform
    if own is not None and not options and not recorded:
        said = f"{_one_line(own)} (the model's own)"
        if loaded.weights is not None and record is None:
            note = (
                f"this is what the published weights need; if {Path(loaded.weights).name} was "
                "trained otherwise, say so with --resize, --crop, --mean, --std or --transform."
            )
            return Transform(own, {"kind": "weights"}, said, note=note)
        return Transform(own, {"kind": "weights"}, said)
    note = ""
    if recorded:
        assert record is not None
        base = {key: value for key, value in record.items() if key != "kind"}
    elif own is not None:
        base = _as_options(own)
    else:
        base = {"resize": 256, "crop": 224}
        size = _common_size(data)
        if size is not None:
            base = {"resize": None, "crop": None}
        if not {"mean", "std"} <= options.keys() or not {"resize", "crop"} & options.keys():
            note = (
                "the model does not say how images are prepared: the usual way is taken. "
                "--resize, --crop, --mean, --std or --transform change it."
            )
    fields = {**base, **options}
    for key in ("mean", "std"):
        if key in fields:
            fields[key] = tuple(fields[key])
    try:
        made = ImageTransform(**fields)
    except (TypeError, ValueError) as error:
        raise SpecError(str(error)) from None
    values = {name: getattr(made, name) for name in made.__dataclass_fields__}
    return Transform(made, {"kind": "options", **values}, str(made), note=note)


def _one_line(transform: object) -> str:
    text = re.sub(r"\s+", " ", repr(transform)).strip()
    return re.sub(r"\( ", "(", text).replace(" )", ")").replace("InterpolationMode.", "")


def _as_options(transform: Any) -> dict[str, Any]:
    """The numbers of torchvision's transform of its weights, or of timm's."""
    found: dict[str, Any] = {}
    steps = getattr(transform, "transforms", None) or [transform]
    for step in steps:
        for ours, theirs in (("resize", "resize_size"), ("crop", "crop_size")):
            value = getattr(step, theirs, None)
            if isinstance(value, Sequence) and value:
                found[ours] = int(value[0])
        kind = type(step).__name__
        size = getattr(step, "size", None)
        if kind in ("Resize", "CenterCrop") and size is not None:
            one = int(size if isinstance(size, int) else size[0])
            found["resize" if kind == "Resize" else "crop"] = one
        for name in ("mean", "std"):
            value = getattr(step, name, None)
            if value is not None:
                found[name] = tuple(float(v) for v in value)
        way = getattr(getattr(step, "interpolation", None), "value", None)
        if way in ("nearest", "bilinear", "bicubic", "lanczos"):
            found["interpolation"] = way
    return found


def _common_size(data: str | None) -> tuple[int, int] | None:
    """The one small size that the first image of every class has, if there is one."""
    if data is None or not Path(data).is_dir():
        return None
    sizes = set()
    try:
        folders = ImageFolderData(data, allow_empty=True)
        first = dict(zip(reversed(folders.targets), reversed(range(len(folders))), strict=True))
        for number in sorted(first.values())[:20]:
            sizes.add(read_image(folders.path(number)).size)
    except (OSError, ValueError):
        return None
    (size,) = sizes if len(sizes) == 1 else [None]
    return size if size is not None and max(size) < 160 else None
