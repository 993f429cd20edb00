"""The commands, put together."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nad_attr._version import __version__
from nad_attr.cli.attribute import attribute
from nad_attr.cli.certainty import certainty
from nad_attr.cli.compare import compare
from nad_attr.cli.demo import demo
from nad_attr.cli.evaluate import evaluate
from nad_attr.cli.explain import explain
from nad_attr.cli.flow import flow
from nad_attr.cli.learn import learn
from nad_attr.cli.options import flat
from nad_attr.cli.report import report
from nad_attr.cli.sites import sites
from nad_attr.cli.stores import export, merge
from nad_attr.cli.stores import inspect as inspect_command
from nad_attr.cli.verdict import verdict

__all__ = ["COMMANDS", "make_app"]

COMMANDS = (
    explain,
    sites,
    learn,
    evaluate,
    certainty,
    verdict,
    attribute,
    compare,
    flow,
    report,
    inspect_command,
    merge,
    export,
    demo,
)


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


class _Plain(TyperGroup):
    """Say in plain words what a value should be, in place of typer's own words."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except Exception as error:
            message = getattr(error, "message", None)
            if isinstance(message, str):
                found = re.match(r"Input should be a valid (number|integer)", message)
                kind = {"number": "a number", "integer": "a whole number"}
                error.message = f"must be {kind[found[1]]}." if found else message  # type: ignore[attr-defined]
            raise


def make_app() -> typer.Typer:
    """The whole command line."""
    result = typer.Typer(
        cls=_Plain,
        no_args_is_help=True,
        add_completion=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    result.callback()(_common)
    for command in COMMANDS:
        result.command(help=_help(command), no_args_is_help=command is not demo)(flat(command))
    return result


def _help(command: Callable[..., None]) -> str:
    """The docstring, whose examples click must not join into one line."""
    return (inspect.getdoc(command) or "").replace("Examples:\n", "\b\nExamples:\n")
