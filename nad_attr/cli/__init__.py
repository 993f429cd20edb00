"""The command line, ``nad-attr``, made with typer.

One module per command or group of commands. Exit codes: 0 all is well; 1 data, model or file do not
do, with a line that says what to do; 2 options or installation do not fit; 130 after Ctrl-C (143
after a termination signal), with everything finished saved.
"""

from __future__ import annotations

import importlib.util
import signal
import sys
from typing import TYPE_CHECKING

from nad_attr.cli.stopping import stop_at_once

if TYPE_CHECKING:
    import typer

__all__ = ["app", "main"]


def app() -> typer.Typer:
    """The whole command line.

    Example:
        >>> [command.callback.__name__ for command in app().registered_commands][:3]
        ['explain', 'sites', 'learn']
    """
    # Imported here, so that the entry point can say that typer is missing.
    from nad_attr.cli.application import make_app

    return make_app()


def main() -> None:
    """Run the command line; the entry point of ``nad-attr``."""
    # Importing torch takes seconds, in which Ctrl-C would end in a traceback from deep inside.
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop_at_once)
    try:
        _run()
    finally:  # for other programs that call this
        signal.signal(signal.SIGINT, before)


def _run() -> None:
    if importlib.util.find_spec("typer") is None:
        print(
            "nad-attr: the command line needs typer and rich: pip install 'nad-attr[demo]' "
            "(or 'nad-attr[cli]' for the commands without the demo's network and photos)",
            file=sys.stderr,
        )
        sys.exit(2)
    from nad_attr.system.memory import keep_freed_memory

    keep_freed_memory()
    app()(prog_name="nad-attr")
