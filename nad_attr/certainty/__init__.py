"""How sure is it? Tests of sub-architectures, and of each of their channels.

:func:`nad_attr.certainty` measures channels, :class:`ChannelCertainty` holds what it found;
:func:`nad_attr.verdict` judges each task's channels as a whole. The module itself can be
called, as ``nad_attr.certainty(model, gates, data, held_out)``: it bears the name of its function.
"""

from __future__ import annotations

import inspect
import sys
from types import ModuleType
from typing import Any

from nad_attr.certainty.bounds import exact_interval, false_selections
from nad_attr.certainty.measuring import certainty
from nad_attr.certainty.result import Alternatives, ChannelCertainty
from nad_attr.certainty.verdict import Verdict, verdict

__all__ = [
    "Alternatives",
    "ChannelCertainty",
    "Verdict",
    "certainty",
    "exact_interval",
    "false_selections",
    "verdict",
]


class _Callable(ModuleType):
    """A module that is called as its function: importing it gives the package this attribute."""

    __signature__ = inspect.signature(certainty)

    def __call__(self, *args: Any, **kwargs: Any) -> ChannelCertainty:
        return certainty(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
