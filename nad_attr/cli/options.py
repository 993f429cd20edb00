"""Options that several commands have."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin, get_type_hints

import typer

from nad_attr.cli.messages import UsageError
from nad_attr.sites.site import UNITS
from nad_attr.system.processes import check_processes

Model: TypeAlias = Annotated[
    str,
    typer.Option(
        help="torchvision:NAME[:WEIGHTS], timm:NAME, or package.module:factory, a function that "
        "returns the network."
    ),
]
OtherModel: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", help="Network to use in place of the one that the gates name."),
]
Weights: TypeAlias = Annotated[
    Path | None, typer.Option(help="State dict for the network: .pt, .pth or .safetensors.")
]
ModelArg: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=VALUE", help="For the network's factory, such as num_classes=10; repeatable."
    ),
]
DataOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--data",
        help="Folder with a folder of images per class, torchvision:CIFAR10:ROOT[:SPLIT], or "
        "package.module:factory.",
    ),
]
ClassIndex: TypeAlias = Annotated[
    Path | None,
    typer.Option(help='JSON file that says which class each folder is: {"folder": 7, ...}.'),
]
LabelTable: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--labels",
        help="CSV table with a header: a file of --data in each row, then its class, or a label "
        "(0, 1, empty: unknown) or target for each output.",
    ),
]
TrainLabelTable: TypeAlias = Annotated[
    Path | None, typer.Option("--train-labels", help="The same for --train-data.")
]
HeldOutLabelTable: TypeAlias = Annotated[
    Path | None, typer.Option("--held-out-labels", help="The same for --held-out.")
]
AllowEmpty: TypeAlias = Annotated[
    bool, typer.Option("--allow-empty", help="Accept class folders without images.")
]
TransformOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--transform", metavar="MODULE:FACTORY", help="Function that returns the transform."
    ),
]
Resize: TypeAlias = Annotated[
    int | None, typer.Option(min=0, help="Short side in pixels; 0 leaves it as it is.")
]
Crop: TypeAlias = Annotated[
    int | None, typer.Option(min=0, help="Middle square in pixels; 0 takes all.")
]
Mean: TypeAlias = Annotated[str | None, typer.Option(metavar="R,G,B", help="Of values 0 to 1.")]
Std: TypeAlias = Annotated[str | None, typer.Option(metavar="R,G,B", help="Of values 0 to 1.")]
Interpolation: TypeAlias = Annotated[
    str | None, typer.Option(help="nearest, bilinear, bicubic or lanczos.")
]
Tasks: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(help="Class indices, ranges or names: 0-99,207 or cat,dog; default: all."),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; default: cuda if there is one.")
]
Amp: TypeAlias = Annotated[bool, typer.Option("--amp", help="Mixed precision, bfloat16.")]
Size: TypeAlias = Annotated[
    float | None,
    typer.Option(help="Cut the gates at this share of the channels; default: as learned."),
]
BatchSize: TypeAlias = Annotated[
    int | None,
    typer.Option(
        min=1, help="Images in one pass of the network, at most; default: 64, or 8 for flow."
    ),
]


def batch_or_auto(value: str | int) -> int | str:
    """A number of images, or "auto".

    Example:
        >>> batch_or_auto("32"), batch_or_auto("auto")
        (32, 'auto')
    """
    text = str(value)
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text!r} is neither a whole number from 1 on nor auto.")
    return int(text)


LearningBatch: TypeAlias = Annotated[
    Any,
    typer.Option(
        parser=batch_or_auto,
        metavar="N|auto",
        help="Images in one pass of the network, at most; auto: as many as fit into memory.",
    ),
]


def few_processes(n: int) -> int:
    """Refuse far more processes than CPUs, before anything is read."""
    try:
        check_processes(n, "it")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    return n


Workers: TypeAlias = Annotated[
    int, typer.Option(min=0, callback=few_processes, help="Processes that load images.")
]
Units: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="What gates stand for, with a comma between several: channels, attention heads, "
        "hidden neurons. [channels]"
    ),
]
Seed: TypeAlias = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Replicas: TypeAlias = Annotated[
    int | None,
    typer.Option(min=1, help="Short runs that guide a last one, so that seeds agree. [1]"),
]


def units_of(text: str | None) -> list[str]:
    """The kinds of units that an option lists."""
    listed = ["channels"] if text is None else [part.strip() for part in text.split(",")]
    for unit in listed:
        if unit not in UNITS:
            raise UsageError(f"--units takes {', '.join(UNITS)}, got {unit!r}.")
    return listed


class ChecksName(str, Enum):
    """What happens if a check of the network fails."""

    refuse = "refuse"
    warn = "warn"
    off = "off"


Checks: TypeAlias = Annotated[
    ChecksName,
    typer.Option(
        help="What to do if outputs depend on chance or on other images, or if gradients are "
        "wrong about closing channels: refuse the network, warn and go on, or do not check."
    ),
]
Store: TypeAlias = Annotated[
    Path, typer.Argument(metavar="GATES.h5", help="File written by nad-attr learn.")
]
Quiet: TypeAlias = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Print results and errors only: no notes, no progress."),
]
Debug: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Show where in the code an error comes from.")
]


TrustFile: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--trust-file",
        help="Call and read what the file of the gates names: functions, weights, folders. They "
        "are printed first.",
    ),
]
AnyModel: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--any-model", help="Go on even if the network's weights are not those of the gates."
    ),
]


@dataclass(frozen=True)
class PictureOptions:
    """How images are prepared for the network."""

    transform: TransformOption = None
    resize: Resize = None
    crop: Crop = None
    mean: Mean = None
    std: Std = None
    interpolation: Interpolation = None

    def options(self) -> dict[str, Any]:
        """Those that were given, as :class:`nad_attr.datasets.ImageTransform` takes them."""
        options: dict[str, Any] = {}
        for name, pixels in (("resize", self.resize), ("crop", self.crop)):
            if pixels is not None:
                options[name] = pixels or None
        for name, text in (("mean", self.mean), ("std", self.std)):
            if text is not None:
                try:
                    parts = text.replace(" ", ",").split(",")
                    values = tuple(float(part) for part in parts if part)
                except ValueError:
                    values = ()
                if len(values) not in (1, 3):
                    raise UsageError(f"--{name} takes three numbers R,G,B, got {text!r}.")
                options[name] = values * 3 if len(values) == 1 else values
        if self.interpolation is not None:
            options["interpolation"] = self.interpolation
        return options


@dataclass(frozen=True)
class NetworkOptions:
    """The network that a file of gates names, or another in its place."""

    model: OtherModel = None
    weights: Weights = None
    model_arg: ModelArg = None
    any_model: AnyModel = False
    trust_file: TrustFile = False
    pictures: PictureOptions = PictureOptions()


@dataclass(frozen=True)
class WorkOptions:
    """How a file of gates is used: images, random numbers, device, and notes."""

    class_index: ClassIndex = None
    seed: Seed = 0
    device: Device = None
    batch_size: BatchSize = None
    workers: Workers = 0
    quiet: Quiet = False
    debug: Debug = False

    def reading(self) -> dict[str, Any]:
        """What opening images takes."""
        return {"class_index": self.class_index, "n_workers": self.workers, "quiet": self.quiet}


def flat(command: Callable[..., None]) -> Callable[..., None]:
    """Make a command with single options, as typer needs, from one with groups of options.

    Args:
        command: Groups are keyword-only parameters, of types that are dataclasses.

    Example:
        >>> def show(*, pictures: PictureOptions) -> None:
        ...     print(pictures.options())
        >>> flat(show)(resize=256)
        {'resize': 256}
    """

    def hints_of(function: Any) -> dict[str, Any]:
        # Python 3.10 wraps a hint in Optional where the default is None: typer would not see what
        # the option is called.
        hints = get_type_hints(function, include_extras=True)
        for name, hint in hints.items():
            first, *_ = get_args(hint) or [None]
            if get_origin(hint) is Union and get_origin(first) is Annotated:
                hints[name] = first
        return hints

    def parameters(function: Any) -> list[inspect.Parameter]:
        hints = hints_of(function)
        found = []
        for name, parameter in inspect.signature(function).parameters.items():
            if is_dataclass(hints[name]):
                found += parameters(hints[name])
            else:
                found.append(parameter.replace(annotation=hints[name]))
        return found

    def gathered(function: Any, given: dict[str, Any]) -> dict[str, Any]:
        hints = hints_of(function)
        return {
            name: hints[name](**gathered(hints[name], given))
            if is_dataclass(hints[name])
            else given[name]
            for name in inspect.signature(function).parameters
        }

    wanted = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters(command)]
    signature = inspect.Signature(wanted)

    def run(**given: Any) -> None:
        bound = signature.bind(**given)
        bound.apply_defaults()
        command(**gathered(command, bound.arguments))

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = signature  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in wanted}
    return run
