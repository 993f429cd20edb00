"""The figure of a certainty: how many channels of each site have each label."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nad_attr.certainty.testing import LABELS
from nad_attr.plots import style as figures
from nad_attr.sites.site import GateSite

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "plot_labels"]

#: Of closed, needed, replaceable, no effect seen, undecided: told apart without colour vision.
COLOURS = ("#DFE4E8", "#0072B2", "#E69F00", "#9AA5AE", "#CC79A7")


def plot_labels(labels: NDArray[np.int64], sites: Sequence[GateSite], axes: Any = None) -> Figure:
    """A bar for each site, its channels by label.

    Args:
        labels: (T, channels of all sites), numbers in ``LABELS``.
        sites: The gate sites, in forward order.
        axes: One matplotlib Axes; None: a new figure.
    """
    n_sites = len(sites)
    figure, [axis] = figures.panels(1, axes, panel=(5.2, max(1.8, 0.28 * n_sites + 1.0)))
    ends = np.cumsum([site.n_channels for site in sites])
    parts = np.split(labels, ends[:-1], axis=1)
    left = np.zeros(n_sites)
    order = (*range(1, len(LABELS)), 0)
    for k in order:
        share = np.array([(part == k).mean() for part in parts])
        name = LABELS[k] or "closed"
        axis.barh(range(n_sites), share, left=left, height=0.72, color=COLOURS[k], label=name)
        left += share
    figures.style(axis, grid=None)
    axis.set_yticks(range(n_sites), [site.name for site in sites])
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.set_xlabel("share of the site's channels")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, frameon=False, fontsize=8)
    return figure
