"""The interface of executors that run parts of a job elsewhere, such as Ray's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch

__all__ = ["Workers", "in_order"]


class Workers(Protocol):
    """Runs a function on workers; :class:`nad_attr.distributed.RayExecutor` does."""

    def map(
        self,
        call: Callable[[Any, Any], Any],
        shared: Any,
        items: Sequence[Any],
        *,
        begin: Callable[[Any, torch.device], Any] | None = None,
        device: str | torch.device | None = None,
        what: str = "work",
    ) -> Iterator[tuple[int, Any]]:
        """``call(shared, item)`` for each item: its number and the result, in any order.

        Args:
            call: A function of a module.
            shared: Sent once.
            items: The second arguments.
            begin: Called once on each worker; its result replaces ``shared`` there.
            device: Where to run.
            what: Word for an item's work in messages.
        """
        ...


def in_order(found: Iterator[tuple[int, Any]], advance: Callable[[int], object]) -> list[Any]:
    """All results, in the order of the items.

    Example:
        >>> in_order(iter([(1, "b"), (0, "a")]), print)
        1
        0
        ['a', 'b']
    """
    results = {}
    for number, result in found:
        results[number] = result
        advance(number)
    return [results[number] for number in sorted(results)]
