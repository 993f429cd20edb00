"""``nad-attr sites``."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import torch
import typer

from nad_attr.cli.messages import UsageError, guarded, print_table, say
from nad_attr.cli.opening import check_outputs, model_arguments
from nad_attr.cli.options import Debug, Model, ModelArg, Quiet, Units, units_of
from nad_attr.gates.channels import n_gates
from nad_attr.sites.finding import find_gate_sites
from nad_attr.specs import LoadedModel, load_model, make_transform
from nad_attr.system.files import write_text

__all__ = ["sites"]


def sites(
    model: Model,
    model_arg: ModelArg = None,
    layer: Annotated[
        list[str] | None,
        typer.Option(help="Check this module instead of finding sites; repeatable."),
    ] = None,
    units: Units = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input", metavar="CxHxW", help="Shape of an image, such as 3x32x32."),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the sites to this file as well.")
    ] = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """List the gate sites of a network: module, channels, axis.

    Needs no weights and downloads none.

    Examples:
      nad-attr sites --model torchvision:resnet50
      nad-attr sites --model mynets:cifar_resnet20 --input 3x32x32
      nad-attr sites --model torchvision:vit_b_16 --layer encoder.layers.encoder_layer_0
      nad-attr sites --model torchvision:vit_b_16 --units heads,neurons
    """
    with guarded(debug):
        check_outputs([(json_file, "text")])
        shape = None if input_shape is None else _shape(input_shape)
        loaded = load_model(model, arguments=model_arguments(model_arg), trained=False)
        shape = shape or _usual_shape(loaded)
        say(
            f"model: {loaded.name.removesuffix(':none')}, images {'x'.join(map(str, shape))}", quiet
        )
        place = next(loaded.model.parameters(), torch.zeros(0, device="cpu"))
        found = find_gate_sites(
            loaded.model,
            torch.zeros(1, *shape, dtype=place.dtype, device="cpu"),
            layers=layer or None,
            units=units_of(units),
        )
        modules = dict(loaded.model.named_modules())
        rows = []
        for i, site in enumerate(found):
            row = [str(i), site.name, type(modules[site.name]).__name__, f"{site.n_channels:,}"]
            gates = [f"{site.n_gates:,} {site.units}"] if units else []
            rows.append([*row, str(site.channel_dim), *gates])

        total = sum(site.n_channels for site in found)
        gates = [f"{n_gates(found):,}"] if units else []
        rows.append(["", "all", "", f"{total:,}", "", *gates])
        header = ["", "site", "module", "channels", "axis", *(["gates"] if units else [])]
        print_table(header, rows, left=3)
        if json_file is not None:
            entries = [
                {
                    "name": site.name,
                    "module": type(modules[site.name]).__name__,
                    "n_channels": site.n_channels,
                    "channel_dim": site.channel_dim,
                    "units": site.units,
                    "n_gates": site.n_gates,
                }
                for site in found
            ]
            write_text(json_file, json.dumps(entries, indent=1) + "\n")


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4}){0,3}", text):
        raise UsageError(f"--input takes a shape such as 3x224x224, got {text!r}.")
    return tuple(int(part) for part in text.split("x"))


def _usual_shape(loaded: LoadedModel) -> tuple[int, ...]:
    """What the model's own transform makes of a photo, or 3 x 224 x 224."""
    try:
        from PIL import Image
    except ImportError:
        return 3, 224, 224
    image = make_transform(loaded).function(Image.new("RGB", (640, 480)))
    return tuple(image.shape)
