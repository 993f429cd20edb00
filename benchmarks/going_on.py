"""Measurements that are long: a row at a time into a file, and on from there the next time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.cifar import SharedMissingError

__all__ = ["Row", "go_on", "rows_of"]

Row = dict[str, Any]


def rows_of(out: Path, part: str | None = None) -> list[Row]:
    """What is measured so far, of one part or of all."""
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return [row for row in rows if part in (None, row["part"])]


def go_on(out: Path, work: Iterable[tuple[str, str, Callable[[], Row]]], minutes: float) -> None:
    """Measure what is not in the file yet; what begins within so many minutes comes to its end.

    Args:
        out: A line of JSON for each row.
        work: Part and name of each row, and what measures it.
        minutes: See above.
    """
    end = time.monotonic() + 60 * minutes
    done = {(row["part"], row["name"]) for row in rows_of(out)}
    for part, name, measure in work:
        if time.monotonic() > end:
            return
        if (part, name) in done:
            continue
        try:
            row = {"part": part, "name": name, **measure()}
        except SharedMissingError as missing:
            print(f"{name}: skipped: {missing}", flush=True)
            continue
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
