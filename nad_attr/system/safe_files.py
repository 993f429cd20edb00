"""Open files of unknown origin: only ordinary files, and never a pipe or a device."""

from __future__ import annotations

import os
import stat
from os import PathLike
from pathlib import Path

import torch

from nad_attr.system.memory import available

__all__ = ["NotAFileError", "check_file", "check_file_kind", "most_bytes", "open_file"]

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISLNK, "a symbolic link"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_UNKNOWN = 2**33


class NotAFileError(ValueError):
    """A path leads to a folder, link, named pipe, socket or device where a file belongs."""


def check_file(path: str | PathLike[str]) -> None:
    """Refuse a path that is not an ordinary file or a link to one.

    Raises:
        NotAFileError: Says what it is.
        OSError: If it does not exist.
    """
    found = os.stat(path)
    if not stat.S_ISDIR(found.st_mode):  # opening a folder fails, with the system's own error
        check_file_kind(path, found)


def check_file_kind(path: str | PathLike[str], found: os.stat_result) -> None:
    """Refuse a path whose status is not that of an ordinary file; says what it is."""
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "something else")
        raise NotAFileError(f"{os.fspath(path)} is {kind}, not an ordinary file.")


def open_file(path: str | PathLike[str], flags: int = os.O_RDONLY, *, follow: bool = True) -> int:
    """Open an ordinary file and nothing else, without waiting for the writer of a pipe.

    Args:
        path: The file.
        flags: As of ``os.open``.
        follow: Whether it may be a link to such a file.

    Raises:
        NotAFileError: If it is something else; a link too, if links are not followed.
        OSError: If it cannot be opened.
    """
    try:
        # First of all, since opening a device can already change something.
        check_file_kind(path, os.stat(path) if follow else os.lstat(path))
    except FileNotFoundError:
        if not flags & os.O_CREAT:
            raise
    for name in ("O_CLOEXEC", "O_BINARY", "O_NONBLOCK", *(() if follow else ("O_NOFOLLOW",))):
        flags |= getattr(os, name, 0)
    try:
        file = os.open(path, flags, 0o666)
    except OSError:
        if not follow and Path(path).is_symlink():  # put there a moment ago
            raise NotAFileError(f"{os.fspath(path)} is a symbolic link.") from None
        raise
    try:
        check_file_kind(path, os.fstat(file))
    except BaseException:
        os.close(file)
        raise
    return file


def most_bytes() -> int:
    """Bytes that reading one file may take: half of the free memory, or 8 GB if it is unknown."""
    try:
        return available(torch.device("cpu")) // 2
    except ValueError:
        return _UNKNOWN
