"""Write files whole or not at all, and never over something that is not an earlier output.

All files are written beside their target, flushed to the disk, and then take its place.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import IO

__all__ = [
    "PART",
    "check_output",
    "contains",
    "replacing",
    "sync",
    "what_is",
    "write_text",
    "written",
]

#: Ending of the names of files that are not complete.
PART = ".part"
_HDF5 = b"\x89HDF\r\n\x1a\n"
_JOURNAL = b"nad_attr journal "
_STARTS = {
    _JOURNAL: "journal",
    b"PK\x03\x04": "archive",
    b"PK\x05\x06": "archive",
    b"\x89PNG\r\n": "picture",
    b"%PDF-": "picture",
}


def what_is(path: str | PathLike[str]) -> str:
    """The kind of a file, by its first bytes; only plain files are opened.

    Returns:
        "folder", "device" (or pipe), "empty", "HDF5", "journal" (of a store), "archive" (zip: .npz,
        .pt), "picture" (PNG, PDF), "program" (Python), "text" or "data".

    Raises:
        OSError: If there is nothing, or it cannot be read.

    Example:
        >>> what_is(os.devnull), what_is(tempfile.gettempdir())
        ('device', 'folder')
    """
    mode = os.stat(path).st_mode
    if not stat.S_ISREG(mode):
        return "folder" if stat.S_ISDIR(mode) else "device"
    with open(path, "rb") as file:
        head = file.read(8192)
        size = os.fstat(file.fileno()).st_size
        place = 0
        while place + len(_HDF5) <= size:  # a user's block of any power of two may come before it
            file.seek(place)
            if file.read(len(_HDF5)) == _HDF5:
                return "HDF5"
            place = 2 * place or 512
    if not head:
        return "empty"
    for start, kind in _STARTS.items():
        if head.startswith(start):
            return kind
    if b"\0" in head:
        return "data"
    return "program" if str(path).lower().endswith((".py", ".pyi")) else "text"


def check_output(
    path: str | PathLike[str], kind: str = "text", inputs: Iterable[str | PathLike[str] | None] = ()
) -> Path:
    """Refuse to write where something would be lost.

    Args:
        path: Where to write.
        kind: "text" (CSV, JSON, HTML), "HDF5", "archive" or "picture". Only a file of the same
            kind, or an empty one, is replaced. Text may also go to a device.
        inputs: Files that are read, by any of their names, and folders of class folders: they are
            not replaced, nor any file in them. Missing ones and None do not count.

    Returns:
        The path.

    Raises:
        OSError: Says what is there, or that there is no folder to write into.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = Path(folder, "gates.h5")
        ...     _ = file.write_bytes(bytes.fromhex("894844460d0a1a0a"))
        ...     try:
        ...         check_output(file)
        ...     except FileExistsError as error:
        ...         print(str(error).partition("gates.h5 ")[2])
        is there already and is HDF5, not text: it is not replaced. Write to another file.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {target.parent} to write {target.name} into.")
    store = target.with_name(target.name.removesuffix(".journal"))
    if store != target and store.is_file() and what_is(store) == "HDF5":
        raise FileExistsError(
            f"{target} is where the journal of {store.name} goes; write to another file."
        )
    if not target.exists():
        return target
    found = what_is(target)
    if found == "folder":
        raise IsADirectoryError(f"{target} is a folder; name a file in it.")
    for given in inputs:
        if given is not None and os.path.exists(given):
            if os.path.samefile(target, given):
                other = "" if Path(given) == target else f" by its other name {target}"
                raise FileExistsError(
                    f"this would replace {given}{other}, which is read: write to another file."
                )
            if os.path.isdir(given) and contains(given, target.parent):
                raise FileExistsError(
                    f"{target} is in a folder of {given}, which is read: write to another file."
                )
    if found not in (kind, "empty") and not (kind == "text" and found == "device"):
        raise FileExistsError(
            f"{target} is there already and is {_WORDS[found]}, not {_WORDS[kind]}: it is not "
            "replaced. Write to another file."
        )
    return target


_WORDS = {
    "HDF5": "HDF5",
    "archive": "an archive (.npz, .pt)",
    "data": "data of another kind",
    "device": "a device or pipe",
    "journal": "the journal of a store",
    "picture": "a picture",
    "program": "a Python module",
    "text": "text",
}


def contains(folder: str | PathLike[str], path: str | PathLike[str]) -> bool:
    """Whether a path is in a folder or below it, links resolved."""
    return any(os.path.samefile(folder, parent) for parent in Path(os.path.realpath(path)).parents)


@contextmanager
def replacing(
    path: str | PathLike[str], ready: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A new file, which takes the target's place when the block ends well; else it is removed.

    The target of a symbolic link is replaced, not the link. The rights of the file stay.

    Args:
        path: The target.
        ready: Called before the target is replaced. Windows replaces no file that is open.

    Raises:
        OSError: If there is no such folder, or the target is write-protected.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(f"{folder}/a.txt") as scratch:
        ...         _ = scratch.write_text("whole")
        ...         print(os.path.exists(f"{folder}/a.txt"))
        ...     Path(folder, "a.txt").read_text()
        False
        'whole'
    """
    target = Path(os.path.realpath(path))
    try:
        mode = stat.S_IMODE(os.stat(target).st_mode)
        if not os.access(target, os.W_OK):
            raise PermissionError(errno.EACCES, "the file is write-protected", str(target))
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        mode = 0o666 & ~mask  # mkstemp's files are for their owner alone
    number, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=PART, dir=target.parent)
    os.close(number)
    scratch = Path(name)
    try:
        yield scratch
        scratch.chmod(mode)
        sync(scratch, os.O_RDWR if mode & stat.S_IWUSR else os.O_RDONLY)
        ready()
        os.replace(scratch, target)
        if sys.platform != "win32":
            sync(target.parent, os.O_RDONLY)
    finally:
        scratch.unlink(missing_ok=True)


def sync(path: Path, flags: int) -> None:
    """Wait until a file, or the content of a folder, is on the disk."""
    number = os.open(path, flags)
    try:
        os.fsync(number)
    finally:
        os.close(number)


@contextmanager
def written(
    path: str | PathLike[str], inputs: Iterable[str | PathLike[str] | None] = ()
) -> Iterator[IO[str]]:
    """A text file to write to, which appears or replaces another when it is complete.

    Arguments and errors are those of :func:`check_output`.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with written(f"{folder}/a.csv") as file:
        ...         _ = file.write("a,b")
        ...     Path(folder, "a.csv").read_text()
        'a,b'
    """
    target = check_output(path, "text", inputs)
    if target.exists() and what_is(target) == "device":
        with open(target, "w", newline="", encoding="utf-8") as file:
            yield file
        return
    with replacing(target) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
        yield file


def write_text(
    path: str | PathLike[str], text: str, inputs: Iterable[str | PathLike[str] | None] = ()
) -> None:
    """Write a text file, see :func:`written`."""
    with written(path, inputs) as file:
        file.write(text)
