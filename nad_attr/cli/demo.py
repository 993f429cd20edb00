"""``nad-attr demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nad_attr.cli.evaluate import print_evaluation
from nad_attr.cli.messages import check_size, guarded
from nad_attr.cli.options import Debug
from nad_attr.examples.demo import N_CLASSES, SIZE, STEPS, run_demo

__all__ = ["demo"]


def demo(
    size: Annotated[
        float, typer.Option(help="Share of the channels that each class keeps, above 0, up to 1.")
    ] = SIZE,
    classes: Annotated[
        int, typer.Option(min=1, help="How many of the photos' classes; time grows with it.")
    ] = N_CLASSES,
    steps: Annotated[
        int, typer.Option(min=1, help="Learning steps for each class; time grows with it.")
    ] = STEPS,
    seed: Annotated[int, typer.Option(help="Seed of crops, learning and random channels.")] = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for gates, tables and pictures.")
    ] = Path("nad_demo"),
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
    debug: Debug = False,
) -> None:
    """Explain a real ImageNet network on real photos. Downloads nothing; takes some minutes.

    Examples:
      nad-attr demo
      nad-attr demo --classes 4 --steps 30 --out quick
    """
    # Only options and the installation can be wrong here.
    with guarded(debug, code=2):
        check_size(size)
        result = run_demo(
            out,
            n_classes=classes,
            size=size,
            steps=steps,
            seed=seed,
            device=device,
            show_progress=True,
            say=typer.echo,
        )
    typer.echo()
    print_evaluation(result.evaluation)
    typer.echo(result.explanation())
