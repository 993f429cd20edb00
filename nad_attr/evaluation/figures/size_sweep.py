"""Figures of every measure against size: whether a network can be divided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nad_attr.evaluation.sweeps.size_sweep import RANDOM, SizeSweep
from nad_attr.plots import style as figures
from nad_attr.plots.style import label_of
from nad_attr.stats.tables import nan_mean

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_size_sweep(
    result: SizeSweep, measures: Sequence[str], *, log: bool, columns: int, axes: Any
) -> Figure:
    """See :meth:`nad_attr.evaluation.SizeSweep.plot`."""
    if not measures:
        raise ValueError("measures is empty; name at least one.")
    panel = (2.6, 2.2) if len(measures) > 1 else (4.2, 3.1)
    figure, flat = figures.panels(len(measures), axes, columns=columns, panel=panel)
    styles = figures.line_styles([*result.methods, RANDOM])
    n_panels_wide = min(columns, len(measures)) if axes is None else len(measures)
    for i, (axis, measure) in enumerate(zip(flat, measures, strict=True)):
        if result.n_random:
            means = np.array([nan_mean(draw.T) for draw in result.random[measure]])
            known = ~np.isnan(means).any(0)
            ends = np.quantile(np.where(known, means, 0.0), [0.025, 0.975], axis=0)
            low, high = (np.where(known, end, np.nan) for end in ends)
            figures.line(
                axis,
                result.sizes,
                result.mean(RANDOM, measure),
                low=low,
                high=high,
                label=f"random ({result.n_random} draws)",
                **styles[RANDOM],
            )
        # The first method is the one that matters: drawn last, on top of the others.
        for name in reversed(result.methods):
            low, high = result.interval(name, measure)
            figures.line(
                axis,
                result.sizes,
                result.mean(name, measure),
                low=low,
                high=high,
                label=name,
                **styles[name],
            )
        whole = float(nan_mean(result.whole[measure]))
        if np.isfinite(whole):
            axis.axhline(
                whole, color=figures.INK, linestyle="--", linewidth=1.0, label="whole network"
            )
        figures.style(axis, title=label_of(measure))
        lowest = i + n_panels_wide >= len(measures)
        label = "channels kept (%)" if lowest else ""
        figures.size_axis(axis, result.sizes.tolist(), log=log, label=label)
    order = [*result.methods, f"random ({result.n_random} draws)", "whole network"]
    figures.legend(figure, flat, own_figure=axes is None, order=order)
    return figure
