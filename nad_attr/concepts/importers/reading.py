"""Read other programs' text files: within limits, and with errors that name file and line."""

from __future__ import annotations

import csv
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nad_attr.system.safe_files import most_bytes
from nad_attr.system.safe_text import shown

__all__ = ["ImportFileError", "Table", "check_room", "read_json", "read_npz", "read_table"]

StrPath: TypeAlias = "str | PathLike[str]"

#: Larger files are refused: 2,048 units with 100 columns are about 2 MB.
MAX_BYTES = 256 * 2**20
#: A compressed archive may unpack to this much.
MAX_UNPACKED = 4 * 2**30
#: The free memory is not checked for fewer bytes.
_UNCHECKED_BYTES = 2**28


class ImportFileError(ValueError):
    """A file of another program is truncated, foreign or wrong; the message names file and line."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(message))  # it quotes the file


def check_room(n_cells: int, what: str) -> None:
    """Refuse a table that takes more than half of the free memory, before it is made.

    Raises:
        ImportFileError: If it does.
    """
    # The table, its copy of the same type, and where its values are known.
    n_bytes = 9 * n_cells
    if n_bytes > _UNCHECKED_BYTES and n_bytes > most_bytes():
        raise ImportFileError(
            f"{what} make a table that takes {n_bytes / 2**30:.1f} GiB, over half of the memory "
            "that is free; import fewer layers at a time, or fewer labels."
        )


def check_file(path: StrPath) -> Path:
    """Check that a file exists and is not too large."""
    found = Path(fspath(path))
    if not found.is_file():
        raise ImportFileError(f"{found}: there is no such file.")
    size = found.stat().st_size
    if size == 0:
        raise ImportFileError(f"{found}: the file is empty; was it written to the end?")
    if size > MAX_BYTES:
        raise ImportFileError(
            f"{found}: {size / 2**20:.0f} MiB are too large; at most {MAX_BYTES // 2**20} are read."
        )
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ImportFileError(
            f"{path}: not a text file (byte {error.start} is not UTF-8)."
        ) from None


class Table:
    """A CSV file with a header.

    Attributes:
        path: The file.
        columns: Names of the columns.
    """

    def __init__(self, path: Path, columns: list[str], rows: list[tuple[int, list[str]]]) -> None:
        self.path, self.columns, self._rows = path, columns, rows
        self._where = {name: i for i, name in enumerate(columns)}

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        for line, cells in self._rows:
            yield Row(self, line, cells)

    def index(self, column: str) -> int:
        """The place of a column."""
        return self._where[column]


class Row:
    """One line of a table, whose errors name it."""

    def __init__(self, table: Table, line: int, cells: list[str]) -> None:
        self._table, self.line, self._cells = table, line, cells

    def error(self, what: str) -> ImportFileError:
        """An error at this line."""
        return ImportFileError(f"{self._table.path}, line {self.line}: {what}")

    def text(self, column: str) -> str:
        """A cell."""
        return self._cells[self._table.index(column)].strip()

    def whole(self, column: str) -> int:
        """A whole number."""
        text = self.text(column)
        # 12.0 is how a column with gaps is written by pandas.
        number = text[:-2] if text.endswith(".0") else text
        if not (number.isascii() and number.isdigit() and len(number) < 12):
            raise self.error(f"{column} must be a whole number, got {text[:40]!r}.")
        return int(number)

    def number(self, column: str) -> float:
        """A number; NaN for "NaN", "nan" and an empty cell."""
        text = self.text(column)
        return as_number(text, lambda what: self.error(f"{column} {what}"))


def as_number(value: Any, error: Any) -> float:
    """A finite number, or NaN for None, "", "NaN" in any spelling; ``error`` makes the error."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "nan")):
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise error(f"must be a number, got {value!r:.40}.")
    try:
        number = float(value)
    except OverflowError:
        raise error("is too large for a number.") from None
    except ValueError:
        raise error(f"must be a number, got {value!r:.40}.") from None
    if math.isinf(number):
        raise error("is infinite.")
    return number


def read_table(path: StrPath, needed: Sequence[str], what: str) -> Table:
    """Read a CSV file that has the needed columns; ``what`` names it in messages.

    Raises:
        ImportFileError: If it is missing, too large, foreign or truncated.
    """
    found = check_file(path)
    text = _text(found)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = next(reader, [])
        columns = [name.strip() for name in header]
        missing = [name for name in needed if name not in columns]
        if missing:
            raise ImportFileError(
                f"{found}, line 1: no column {missing[0]!r}; {what} has {', '.join(needed)}, this "
                f"file begins with {', '.join(columns)[:80]!r}."
            )
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise ImportFileError(f"{found}, line 1: the column {twice!r} is there twice.")
        rows = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(columns):
                raise ImportFileError(
                    f"{found}, line {reader.line_num}: {len(cells)} cells where the header has "
                    f"{len(columns)}; was the file written to the end?"
                )
            rows.append((reader.line_num, cells))
    except csv.Error as error:
        raise ImportFileError(f"{found}, line {reader.line_num}: {error}.") from None
    if not text.endswith(("\n", "\r")):
        raise ImportFileError(
            f"{found}, line {reader.line_num}: the last line has no end; was the file written to "
            "the end?"
        )
    if not rows:
        raise ImportFileError(f"{found}: it has a header but no units; was it written to the end?")
    return Table(found, columns, rows)


def read_json(path: StrPath) -> Any:
    """Read a JSON file that is neither too large nor too deep.

    Raises:
        ImportFileError: If it is missing, too large, too deep or truncated.
    """
    found = check_file(path)
    text = _text(found)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ImportFileError(
            f"{found}, line {error.lineno}: {error.msg}; was the file written to the end?"
        ) from None
    except RecursionError:
        raise ImportFileError(f"{found}: nested too deep.") from None
    except ValueError as error:  # an integer of thousands of digits
        raise ImportFileError(f"{found}: {error}.") from None


def read_npz(path: StrPath, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Read some arrays of a NumPy archive; nothing in it is unpickled.

    Raises:
        ImportFileError: If it is missing, too large, damaged, or an array is missing.
    """
    found = check_file(path)
    try:
        with zipfile.ZipFile(found) as archive:
            unpacked = sum(item.file_size for item in archive.infolist())
    except (zipfile.BadZipFile, OSError) as error:
        raise ImportFileError(
            f"{found}: not a NumPy archive, or not written to the end ({error})."
        ) from None
    if unpacked > min(MAX_UNPACKED, most_bytes()):
        raise ImportFileError(f"{found}: would unpack to {unpacked / 2**30:.0f} GiB.")
    result = {}
    try:
        with np.load(found, allow_pickle=False) as archive:
            for name in names:
                if name not in archive.files:
                    raise ImportFileError(
                        f"{found}: no array {name!r}; there are {', '.join(archive.files[:8])} ..."
                    )
                result[name] = archive[name]
    except ImportFileError:
        raise
    except (
        ValueError,
        OSError,
        EOFError,
        MemoryError,
        OverflowError,
        KeyError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise ImportFileError(f"{found}: damaged, or holds objects ({error}).") from None
    return result
