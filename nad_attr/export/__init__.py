"""Sub-architectures as smaller networks, and classes as building blocks."""

from nad_attr.export.combining import combine, united
from nad_attr.export.costs import Block, Cost, Summary, latency, summary
from nad_attr.export.exporting import export
from nad_attr.export.files import save
from nad_attr.export.forgetting import Forgotten, forget
from nad_attr.export.tracing import ExportError

__all__ = [
    "Block",
    "Cost",
    "ExportError",
    "Forgotten",
    "Summary",
    "combine",
    "export",
    "forget",
    "latency",
    "save",
    "summary",
    "united",
]
