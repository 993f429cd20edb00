"""How much memory work takes: the public names of :mod:`nad_attr.system.memory`."""

from nad_attr.system.memory import *  # noqa: F403
from nad_attr.system.memory import __all__ as __all__
