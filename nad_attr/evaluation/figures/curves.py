"""Keep and ablate curves, drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from nad_attr.evaluation.sweeps.curves import Curves
from nad_attr.plots import style as figures
from nad_attr.plots.style import label_of
from nad_attr.stats.tables import FloatArray, intervals, nan_mean, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_curves"]


def _drawn(
    result: Curves, kind: str, measure: str, log: bool
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """x, y and band of a mean curve with its ends; size 0 has no place on a logarithmic axis."""
    xs, values = result.with_ends(kind, measure)
    start = 1 if log else 0
    low, high = intervals(values, 0.95, 2000, 0)
    return xs[start:], nan_mean(values)[start:], low[start:], high[start:]


def _references(axis: Axes, curve: Curves, measure: str) -> None:
    ends = ((curve.full, "--", "whole network"), (curve.empty, ":", "all closed"))
    for values, dash, name in ends:
        value = float(nan_mean(values[measure]))
        if np.isfinite(value):
            axis.axhline(
                value, color=figures.INK, linestyle=dash, linewidth=1.0, label=name, zorder=1.5
            )


def plot_curves(
    results: Curves | Mapping[str, Curves],
    measure: str | None = None,
    *,
    normalised: bool = False,
    log: bool = False,
    axes: Any = None,
) -> Figure:
    """Keep and ablate curves of one or several methods, side by side.

    Args:
        results: Curves, or ``{method: curves}``.
        measure: One of their measures; None: the first method's own.
        normalised: Faithfulness and completeness in place of the measure itself.
        log: Draw sizes on a logarithmic axis.
        axes: Two matplotlib Axes to draw into; None: a new figure.

    Returns:
        A matplotlib figure, not shown: one line per method in each panel, with the 95 % bootstrap
        interval over tasks.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If the results are something else.
        ValueError: If there is no such measure, no method, or the axes are not two.

    Example:
        >>> import torch
        >>> from nad_attr import GateSite
        >>> from nad_attr.evaluation.sweeps.curves import curves
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> data = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), [0, 0, 1, 1]
        >>> result = curves(net, {"0": torch.eye(2)}, data, sites=[GateSite("0", 2, 1)],
        ...                 tasks=[0, 1], sizes=[0.5])
        >>> [axis.get_title(loc="left") for axis in plot_curves({"own": result}).axes]
        ['top channels kept', 'top channels removed']
    """
    named = {"": results} if isinstance(results, Curves) else results
    if not isinstance(named, Mapping) or not all(isinstance(c, Curves) for c in named.values()):
        raise TypeError(f"results must be Curves or {{method: Curves}}, got {results!r:.60}.")
    if not named:
        raise ValueError("there are no curves to draw.")
    first = next(iter(named.values()))
    measure = first._measure(measure)
    kinds = ("faithfulness", "completeness") if normalised else ("keep", "ablate")
    titles = kinds if normalised else ("top channels kept", "top channels removed")
    figure, flat = figures.panels(2, axes, columns=2, sharey=True)
    styles = figures.line_styles(named)
    for axis, kind, title in zip(flat, kinds, titles, strict=True):
        shown: list[float] = []
        for name, result in named.items():
            xs, ys, low, high = _drawn(result, kind, result._measure(measure), log)
            shown += xs.tolist()
            label = name or label_of(measure)
            figures.line(axis, xs, ys, low=low, high=high, label=label, **styles[name])
        if normalised:
            title = f"{title} ({label_of(measure)})"
        else:
            _references(axis, first, measure)
        y = label_of(measure) if axis is flat[0] and not normalised else None
        figures.style(axis, title=title, y=y)
        what = "removed" if kind in ("ablate", "completeness") else "kept"
        figures.size_axis(axis, shown, log=log, label=f"channels {what} (%)")
    figures.legend(figure, flat, own_figure=axes is None)
    return figure


def plot_one(curve: Curves, measure: str, *, log: bool = False, axes: Any = None) -> Figure:
    """Both curves of one ranking in one panel; see :meth:`Curves.plot`."""
    figure, [axis] = figures.panels(1, axes, panel=(4.2, 3.1))
    colours = {"keep": figures.PALETTE[0], "ablate": figures.PALETTE[1]}
    names = {"keep": "top channels kept, S", "ablate": "top channels removed, N"}
    drawn = {}
    for kind, marker in (("keep", "o"), ("ablate", "s")):
        xs, ys, low, high = _drawn(curve, kind, measure, log)
        drawn[kind] = ys
        figures.line(
            axis,
            xs,
            ys,
            low=low,
            high=high,
            label=names[kind],
            color=colours[kind],
            marker=marker,
            linewidth=1.6,
        )
    axis.fill_between(
        xs, drawn["ablate"], drawn["keep"], color=figures.GREY, alpha=0.12, linewidth=0
    )
    _references(axis, curve, measure)
    delta = number(float(nan_mean(curve.delta(measure))))
    figures.style(axis, title=f"{label_of(measure)}: delta {delta}", y=label_of(measure))
    figures.size_axis(axis, xs.tolist(), log=log, label="channels kept or removed (%)")
    figures.legend(figure, [axis], own_figure=axes is None, columns=2)
    return figure
