"""The command line, ``nad-attr``, made with typer.

A command is a function of this module with annotated options, named in ``COMMANDS``. Exit code 2
means that the options or the installation do not fit, with a line that says what to do.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from nad_attr._version import __version__
from nad_attr.demo import N_CLASSES, SIZE, STEPS, MissingExtraError, run_demo

# The entry point is there without the extra as well, and has to say then what is missing.
if TYPE_CHECKING or importlib.util.find_spec("typer") is not None:
    import typer

__all__ = ["COMMANDS", "app", "demo", "main"]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Say in one line what does not fit, in place of a traceback."""
    try:
        yield
    except (MissingExtraError, OSError, ValueError) as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"nad-attr {__version__}")
        raise typer.Exit


def _common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Which channels does an image classifier need for each of its classes?"""


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
    seed: Annotated[int, typer.Option(help="Of crops, learning and random channels.")] = 0,
    out: Annotated[
        Path, typer.Option(file_okay=False, help="Folder for gates, tables and pictures.")
    ] = Path("nad_demo"),
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, cuda:1, mps.")] = "cpu",
) -> None:
    """Explain a real ImageNet network on real photos. Downloads nothing; takes some minutes."""
    with _clear_errors():
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
    if importlib.util.find_spec("rich") is None:
        typer.echo(f"{result.table()}\n")
    else:
        for header, rows in (result.class_rows(), result.method_rows()):
            _print_table(header, rows)
    typer.echo(result.explanation())


def _print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, cell in enumerate(header):
        table.add_column(cell, justify="right" if i else "left", vertical="bottom", no_wrap=True)
    for row in rows:
        table.add_row(*row, style="bold" if row[0] in ("mean", "NAD") else None)
    # A pipe counts as 80 columns, and cells would be cut off.
    Console(width=max(Console().width, 120)).print(table)


COMMANDS = (demo,)


def app() -> typer.Typer:
    """The whole command line."""
    result = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)
    result.callback()(_common)
    for command in COMMANDS:
        result.command()(command)
    return result


def main() -> None:
    """Run the command line; the entry point of ``nad-attr``."""
    if importlib.util.find_spec("typer") is None:
        print(
            "nad-attr: the command line needs typer and rich: pip install 'nad-attr[demo]' "
            "(or 'nad-attr[cli]' for the commands without the demo's network and photos)",
            file=sys.stderr,
        )
        sys.exit(2)
    app()(prog_name="nad-attr")


if __name__ == "__main__":
    main()
