"""Read a table of images and labels of any kind."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from nad_attr.data.images import read_image
from nad_attr.data.labels import Labels
from nad_attr.specs.names import SpecError

__all__ = ["PhotoTable", "first_file", "read_table"]


class PhotoTable(Dataset[Any]):
    """Photos named in a table; ``augmented`` says whether ``transform`` may be random."""

    def __init__(
        self, root: str, files: Sequence[str], transform: Callable[[Any], Any], augmented: bool
    ) -> None:
        self.root, self.files, self.transform = Path(root), list(files), transform
        self.augmented = augmented

    def __len__(self) -> int:
        return len(self.files)

    def path(self, number: int) -> Path:
        """The file of an image."""
        return self.root / self.files[number]

    def __getitem__(self, number: int) -> Any:
        return self.transform(read_image(self.path(number)))


def read_table(
    path: str | Path,
    root: str,
    numbered: Callable[[Sequence[str]], Mapping[str, int]] | None = None,
    *,
    one_output: bool = False,
) -> tuple[list[str], Labels, dict[int, str]]:
    """Read a CSV file: a head, then a row for each image with its file and its labels.

    The first column is the file, relative to the folder. One more column is a class index, a class
    name, one label of 0 or 1, or a target; several are a label or target for each output, in the
    order of the network's outputs. An empty cell is unknown.

    Args:
        path: The table.
        root: The folder of the images.
        numbered: Gives ``{name: class index}`` of class names. None: they get no numbers.
        one_output: Whether the network has one output: a column of 0 and 1 is its label.

    Returns:
        The files, their labels, and ``{output: name}`` as far as known.

    Raises:
        OSError: If it cannot be read.
        SpecError: If it is not such a table, or names a file that is not there; says the line.
    """
    with open(path, encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file))
    if len(lines) < 2 or len(lines[0]) < 2:
        raise SpecError(
            f"{path} must be a table with a header: a column of files, then one of labels for "
            "each output (or one of class indices or names)."
        )
    head, rows = lines[0], [(i, row) for i, row in enumerate(lines[1:], 2) if any(row)]
    files = []
    for line, row in rows:
        if len(row) != len(head):
            raise SpecError(
                f"{path}, line {line}: {len(row)} cells, but the header has {len(head)}."
            )
        inside = Path(root, row[0]).resolve().is_relative_to(Path(root).resolve())
        if not inside or not Path(root, row[0]).is_file():
            raise SpecError(f"{path}, line {line}: there is no file {row[0]!r} in {root}.")
        files.append(row[0])
    cells = [row[1:] for _, row in rows]
    try:
        numbers = [[float(c) if c.strip() else math.nan for c in row] for row in cells]
    except ValueError:
        return files, *_named(path, [row[0].strip() for row in cells], len(head), numbered)
    if len(head) > 2:
        return files, Labels(numbers), dict(enumerate(head[1:]))
    flat = [row[0] for row in numbers]
    if one_output and all(math.isnan(v) or v in (-1, 0, 1) for v in flat):
        return files, Labels(numbers, kind="several"), {0: head[1]}
    if all(v.is_integer() and v >= 0 for v in flat):
        return files, Labels([int(v) for v in flat]), {}
    return files, Labels(flat), {0: head[1]}


def first_file(path: str | Path) -> str:
    """The file that the first row of a table names."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        named = [row[0] for row in csv.reader(file) if row]
    if len(named) < 2:
        raise SpecError(f"{path} must be a table with a header and a row for each image.")
    return named[1]


def _named(
    path: str | Path,
    names: list[str],
    n_columns: int,
    numbered: Callable[[Sequence[str]], Mapping[str, int]] | None,
) -> tuple[Labels, dict[int, str]]:
    if n_columns > 2:
        raise SpecError(f"{path}: several columns of labels must be numbers, or empty if unknown.")
    found = sorted(set(names))
    if "" in found:
        raise SpecError(f"{path}: an image has no class; leave out its row.")
    if numbered is None:
        return Labels([0] * len(names)), {}
    try:
        numbers = numbered(found)
    except ValueError as error:
        raise SpecError(f"{path}: {str(error).replace('folder', 'name')}") from None
    return Labels([numbers[name] for name in names]), {numbers[name]: name for name in found}
