"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, TypeAlias

import typer

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
Workers: TypeAlias = Annotated[int, typer.Option(min=0, help="Processes that load images.")]
Seed: TypeAlias = Annotated[int, typer.Option(help="All random numbers come from it.")]
Store: TypeAlias = Annotated[
    Path, typer.Argument(metavar="GATES.h5", help="File written by nad-attr learn.")
]
Quiet: TypeAlias = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only: no notes, no progress.")
]
Debug: TypeAlias = Annotated[
    bool, typer.Option("--debug", help="Show where in the code an error comes from.")
]


AnyModel: TypeAlias = Annotated[
    bool,
    typer.Option(
        "--any-model", help="Go on even if the network's weights are not those of the gates."
    ),
]
