"""Options that several commands have."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import typer

from nad_attr.system.processes import check_processes

Model: TypeAlias = Annotated[
    str,
    typer.Option(
        help="torchvision:NAME[:WEIGHTS], timm:NAME, or package.module:factory, a function that "
        "returns the network.",
    ),
]
OtherModel: TypeAlias = Annotated[
    str | None, typer.Option("--model", help="In place of the network that the gates name.")
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
        help="CSV table with a head: a file of --data in each row, then its class, or a label (0, "
        "1, empty: unknown) or target for each output.",
    ),
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
    typer.Option(help="Class indices, ranges or names: 0-99,207 or cat,dog; all if left out."),
]
Device: TypeAlias = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, mps; left out: cuda if there is one.")
]
BatchSize: TypeAlias = Annotated[
    int, typer.Option(min=1, help="Images in one pass of the network, at most.")
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
Seed: TypeAlias = Annotated[int, typer.Option(help="All random numbers come from it.")]


class ChecksName(str, Enum):
    """What becomes of a doubt about the network."""

    refuse = "refuse"
    warn = "warn"
    off = "off"


Checks: TypeAlias = Annotated[
    ChecksName,
    typer.Option(
        help="What to do if outputs depend on chance or on other images, or gradients do not say "
        "what closing channels does: refuse the network, warn and go on, or do not look.",
    ),
]
Store: TypeAlias = Annotated[
    Path, typer.Argument(metavar="GATES.h5", help="File written by nad-attr learn.")
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only: no notes, no progress.")
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
