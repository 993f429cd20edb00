"""The state of a long computation in a file, so that an interrupted one can go on."""

from __future__ import annotations

import contextlib
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

from nad_attr.data.fingerprints import same_outputs
from nad_attr.store import GateStoreError, read_result, result_names, write_result

__all__ = ["Checkpoint"]

_GROUP = "checkpoint"
_FORMAT = 1

#: Arrays, and how far they go.
State: TypeAlias = "tuple[dict[str, Any], dict[str, Any]]"


class Checkpoint:
    """A file with the latest state of a computation and nothing else, removed when all is done.

    Each state replaces the one before in one step, so the file is complete at any time. A state
    with another ``identity`` (values that JSON can hold) is refused. ``every`` is the number of
    images between two states.

    Raises:
        GateStoreError: If there is another file in its place.
    """

    def __init__(self, path: str | PathLike[str], identity: Mapping[str, Any], every: int) -> None:
        self.path, self.every = Path(path), every
        self.identity = json.loads(json.dumps(dict(identity)))
        self._since = 0
        if self.path.exists() and result_names(self.path) != [_GROUP]:
            raise GateStoreError(f"{path} is not a checkpoint; name another file.")

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def read(self) -> State | None:
        """The latest state, or None; a GateStoreError if it is of something else, or damaged."""
        if not self.path.exists():
            return None
        arrays, about = read_result(self.path, _GROUP)
        if about.get("format") != _FORMAT or not isinstance(about.get("identity"), dict):
            raise GateStoreError(f"{self.path} is not a checkpoint of this version.")
        there = about["identity"]
        same = {"outputs": same_outputs}
        wrong = [
            key
            for key, value in self.identity.items()
            if not same.get(key, operator.eq)(there.get(key), value)
        ]
        if wrong:
            raise GateStoreError(
                f"{self.path} is of another dissection: {', '.join(wrong)} differ. Go on with what "
                "it was begun with, or remove it."
            )
        return dict(arrays), dict(about.get("progress") or {})

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Say that the file is damaged if its content does not fit."""
        try:
            yield
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise GateStoreError(
                f"{self.path} holds an incomplete state: {error!r:.200}."
            ) from None

    def step(self, n: int, state: Callable[[], State]) -> None:
        """Say that n more images are done; a state is written when it is time."""
        self._since += n
        if self._since >= self.every:
            arrays, progress = state()
            about = {"format": _FORMAT, "identity": self.identity, "progress": progress}
            write_result(self.path, _GROUP, arrays, about)
            self._since = 0

    def remove(self) -> None:
        """Remove the file: all is done."""
        self.path.unlink(missing_ok=True)
