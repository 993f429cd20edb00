"""Learn on many machines with Ray: the public names of :mod:`nad_attr.learning.ray_executor`."""

from nad_attr.learning.ray_executor import *  # noqa: F403
from nad_attr.learning.ray_executor import __all__ as __all__
