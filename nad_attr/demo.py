"""The demo on a real network and real photos: the public names of :mod:`nad_attr.examples.demo`."""

from nad_attr.examples.demo import *  # noqa: F403
from nad_attr.examples.demo import __all__ as __all__
