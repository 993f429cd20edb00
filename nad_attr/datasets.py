"""Photos in class folders, read one by one: the public names of :mod:`nad_attr.data.images`."""

from nad_attr.data.images import *  # noqa: F403
from nad_attr.data.images import __all__ as __all__
