"""One call from a network and its pictures to a verdict and a page."""

from nad_attr.explaining.explaining import explain
from nad_attr.explaining.result import Explanation

__all__ = ["Explanation", "explain"]
