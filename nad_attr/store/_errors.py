"""The error of all files that cannot be read or written."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike

from nad_attr.system.safe_text import shown

__all__ = ["GateStoreError", "reading"]


class GateStoreError(ValueError):
    """A file is not a readable store, or cannot be written; the message says what is wrong."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(message))  # it quotes text of the file


#: The errors that h5py, zlib, json and this package's own classes raise for damaged content.
_COMPLAINTS = (
    OSError,
    RuntimeError,  # includes RecursionError
    LookupError,
    ValueError,
    TypeError,
    ArithmeticError,
    MemoryError,
    SystemError,
    zlib.error,
    struct.error,
)


@contextmanager
def reading(path: str | PathLike[str]) -> Iterator[None]:
    """Turn every error inside the block into a :class:`GateStoreError` with the path."""
    try:
        yield
    except GateStoreError:
        raise
    except _COMPLAINTS as error:
        text = str(error) or type(error).__name__
        raise GateStoreError(f"{path} is not a readable store of gates: {text:.500}") from error
