"""How sure is a channel, and is it needed? Selection probability, necessity, alternatives.

:func:`nad_attr.certainty` measures it, :class:`ChannelCertainty` holds it. The module itself can be
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

__all__ = ["Alternatives", "ChannelCertainty", "certainty", "exact_interval", "false_selections"]


class _Callable(ModuleType):
    """A module that is called as its function: importing it gives the package this attribute."""

    __signature__ = inspect.signature(certainty)

    def __call__(self, *args: Any, **kwargs: Any) -> ChannelCertainty:
        return certainty(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
