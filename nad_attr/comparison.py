"""The former name of :mod:`nad_attr.concepts`, with the same public names."""

from nad_attr.concepts import *  # noqa: F403
from nad_attr.concepts import __all__ as __all__
