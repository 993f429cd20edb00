"""Call a network or a function with named inputs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

__all__ = ["Fields", "call_with"]


class Fields(NamedTuple):
    """The names of inputs that come as a dictionary; ``row``: the label was among them."""

    names: tuple[str, ...]
    row: bool = False


def call_with(function: Callable[..., Any], fields: Fields | None) -> Callable[..., Any]:
    """A function of the inputs' tensors that passes them on as the given function takes them.

    By keyword, where it has parameters of these names; else as one dictionary, where it has one
    parameter (the only field of a row as it is); else in order. Without ``fields``: in order.

    Example:
        >>> fields = Fields(("ids", "mask"))
        >>> call_with(lambda *, mask, ids: (ids, mask), fields)(1, 2)
        (1, 2)
        >>> call_with(lambda batch: batch["mask"], fields)(1, 2)
        2
        >>> call_with(lambda a, b: (a, b), fields)(1, 2)
        (1, 2)
    """
    if fields is None:
        return function
    names, row = fields
    n = len(names)
    try:
        signature = inspect.signature(getattr(function, "forward", function))
        parameters = [*signature.parameters.values()]
    except (TypeError, ValueError):
        parameters = []
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = [p for p in positional if p.default is p.empty]
    known = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    # A wrapper such as DataParallel says only *inputs, **kwargs: keywords go through.
    if set(names) <= known or (takes_any and not needed):

        def by_name(*inputs: Any) -> Any:
            return function(*inputs[n:], **dict(zip(names, inputs[:n], strict=True)))

        return by_name
    if len(needed) == 1 and not (row and n == 1):

        def whole(*inputs: Any) -> Any:
            return function(dict(zip(names, inputs[:n], strict=True)), *inputs[n:])

        return whole
    return function
