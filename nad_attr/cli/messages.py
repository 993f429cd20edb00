"""What the user sees: notes, errors, tables and progress."""

from __future__ import annotations

import importlib.util
import os
import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import typer

from nad_attr.cli.stopping import stop_at_once
from nad_attr.stats.tables import duration as duration
from nad_attr.system.files import written
from nad_attr.system.safe_text import cell, shortened, shown

if TYPE_CHECKING:
    import pandas


class UsageError(ValueError):
    """Options do not fit; ends the program with exit code 2."""


def check_size(size: float | None) -> None:
    """Refuse a size that is no share of the channels, before anything is read."""
    if size is None or 0 < size <= 1:
        return
    hint = f"; for {size:g} % write {size / 100:g}" if 1 < size <= 100 else ""
    raise UsageError(f"--size takes a share of the channels, above 0, up to 1, got {size:g}{hint}.")


def write_csv(frame: pandas.DataFrame, path: Path, *, index: bool = False) -> None:
    """A table as a CSV file, whole or not at all, without formulas of a spreadsheet."""
    frame = frame.rename(index=cell, columns=cell).apply(lambda column: column.map(cell))
    with written(path) as file:
        frame.to_csv(file, index=index, lineterminator="\n")


class Stopped(KeyboardInterrupt):
    """The process was asked to end by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def say(text: str, quiet: bool = False, *, lines: bool = False) -> None:
    """Print a note to the user, apart from the results; ``lines``: it has several lines."""
    if text and not quiet:
        typer.echo(shown(text, lines=lines), err=True)


@contextmanager
def guarded(
    debug: bool = False, *, code: int = 1, stopped: Callable[[], str] | None = None
) -> Iterator[None]:
    """Print an error as one line, and not as a traceback.

    ``code`` is the exit code for errors of data, model and files; ``stopped`` gives the text after
    Ctrl-C; ``debug`` shows the traceback as well.
    """
    with _plain_warnings(), _signals():
        try:
            yield
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            number = error.number if isinstance(error, Stopped) else int(signal.SIGINT)
            typer.echo("\nStopped. " + (stopped() if stopped is not None else ""), err=True)
            raise typer.Exit(128 + number) from None
        except (UsageError, ImportError) as error:
            _fail(error, 2, debug)
        except Exception as error:
            if isinstance(error, BrokenPipeError):
                # The reader of our output has closed it, as head does.
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                raise typer.Exit(0) from None
            _fail(error, code, debug)


def _fail(error: Exception, code: int, debug: bool) -> NoReturn:
    if debug:
        typer.echo(shown("".join(traceback.format_exception(error)), lines=True), err=True)
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = " ".join(text.split())
    expected = isinstance(error, (ValueError, TypeError, OSError, ImportError, KeyError))
    from nad_attr.specs.names import place_in_own_code  # torch is imported with it

    place = place_in_own_code(error)
    if not expected or not text or place:
        text = f"{type(error).__name__}: {text}{place}"
        if not debug and not place:
            text += " (--debug shows where it comes from)"
    typer.echo(f"Error: {shown(text)}", err=True)
    raise typer.Exit(code) from error


@contextmanager
def _plain_warnings() -> Iterator[None]:
    said: set[str] = set()

    def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        text = " ".join(str(message).split())
        if text not in said:
            said.add(text)
            typer.echo(f"Warning: {shown(text)}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        warnings.showwarning = show
        yield


@contextmanager
def _signals() -> Iterator[None]:
    """Let a request to terminate, such as a scheduler's, end the program as Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is stop_at_once:  # and not ignored, as by nohup
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, interrupt)


def print_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, bold: Sequence[str] = (), left: int = 1
) -> None:
    """A table of text: the first ``left`` columns to the left, the rest to the right."""
    if importlib.util.find_spec("rich") is None:
        raise ImportError("tables need rich: pip install 'nad-attr[cli]'")
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, head in enumerate(header):
        side: Literal["left", "right"] = "left" if i < left else "right"
        title = Text(shown(head, lines=True))
        table.add_column(title, justify=side, vertical="bottom", no_wrap=True)
    # A pipe counts as 80 columns. Names are shortened to what the numbers leave, which never are.
    width = max(Console().width, 120)
    cells = [[shown(cell) for cell in row] for row in rows]
    wanted = [
        max(map(len, [line for cell in column for line in cell.split("\n")]))
        for column in zip(header, *cells, strict=True)
    ]
    spare = width - sum(wanted[left:]) - 3 * len(wanted)
    longest = max(SHORTEST_NAME, spare // max(1, left))
    for original, row in zip(rows, cells, strict=True):
        named = [shortened(cell, longest) for cell in row[:left]]
        # As Text: names of classes may hold rich's markup.
        table.add_row(
            *(Text(cell) for cell in (*named, *row[left:])),
            style="bold" if original[0] in bold else None,
        )
    needed = sum(min(w, longest) for w in wanted[:left]) + sum(wanted[left:]) + 3 * len(wanted)
    Console(width=max(width, needed), highlight=False).print(table)


#: Letters that a name in a table keeps, however many numbers are beside it.
SHORTEST_NAME = 24


def counted(n: int, what: str) -> str:
    """A number with its noun.

    Example:
        >>> counted(1, "task"), counted(2000, "image")
        ('1 task', '2,000 images')
    """
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def number(value: float) -> str:
    """Three digits, or a dash for what has no value."""
    return "-" if value != value else f"{value:.3f}"


@contextmanager
def progress_bar(text: str, total: int, quiet: bool) -> Iterator[Callable[[int], object]]:
    """A bar with the time left, on a terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda n: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(text, total=total)
        yield lambda n: bar.advance(task, n)
