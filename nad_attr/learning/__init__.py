"""Learn gates: in this process, run by run into a store, or on a cluster."""

from __future__ import annotations

from nad_attr.learning.api import learn_gates, learn_sizes
from nad_attr.learning.session import Session, fit_constants

__all__ = ["Session", "fit_constants", "learn_gates", "learn_sizes"]
