"""Information flow: what each channel gives to the channels of the next site, tested by cutting.

:func:`information_flow` measures it, :class:`InformationFlow` holds it; :func:`agreement` cuts
single edges and compares, :func:`edge_fidelity` keeps the strongest edges alone; :func:`flow_shape`
and :func:`flow_sharing` say how the flow goes and what classes share.
"""

from nad_attr.flow.edge_sets import agreement, edge_drops, edge_fidelity
from nad_attr.flow.links import Link, TaskFlow, kept_edges
from nad_attr.flow.measuring import information_flow
from nad_attr.flow.plot import plot_flow
from nad_attr.flow.result import InformationFlow
from nad_attr.flow.shape import flow_shape, flow_sharing, parting_depth

__all__ = [
    "InformationFlow",
    "Link",
    "TaskFlow",
    "agreement",
    "edge_drops",
    "edge_fidelity",
    "flow_shape",
    "flow_sharing",
    "information_flow",
    "kept_edges",
    "parting_depth",
    "plot_flow",
]
