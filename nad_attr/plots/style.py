"""What all figures share: colours, sizes, panels, lines with bands, legends.

Figures are plain ``matplotlib.figure.Figure`` objects without a window; pyplot and matplotlib's
defaults are not touched. Matplotlib (extra ``plot``) is imported when the first figure is drawn.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nad_attr.stats.measure_table import MEASURE_TABLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "DIVERGING",
    "GREY",
    "INK",
    "PALETTE",
    "SEQUENTIAL",
    "label_of",
    "legend",
    "line",
    "line_styles",
    "new_figure",
    "panels",
    "size_axis",
    "style",
    "switch_off",
]

#: Colours that differ for all common kinds of colour blindness (Okabe and Ito 2008), without their
#: yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
#: Text, axes.
INK = "#333333"
#: References: random channels, the whole network, chance.
GREY = "#8C8C8C"
GRID = "#E4E4E4"
#: Colour maps for shares, and for values with a middle.
SEQUENTIAL = "cividis"
DIVERGING = "RdBu_r"

#: Font sizes in points.
TITLE_SIZE, LABEL_SIZE, TICK_SIZE = 10.0, 9.0, 8.0
#: Inches of one panel, width and height.
PANEL = (3.1, 2.5)
#: Most rows of a table that are drawn.
_MOST_BARS = 40

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", ":")


def _figure_class() -> type[Figure]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "figures need matplotlib: pip install 'nad-attr[plot]'; the numbers are in frame(), "
            "to_dict() and summary() without it."
        ) from error
    return Figure


def new_figure(
    rows: int = 1,
    columns: int = 1,
    *,
    panel: tuple[float, float] = PANEL,
    extra: tuple[float, float] = (0.0, 0.0),
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, NDArray[np.object_]]:
    """A white figure of equal panels, with room for their labels and legends.

    Args:
        rows: Panels below each other.
        columns: Panels side by side.
        panel: Inches of a panel, width and height.
        extra: Inches added to the figure's width and height, for a legend.
        sharex: Same limits on x for all panels.
        sharey: Same limits on y for all panels.

    Returns:
        The figure, and its axes as an array (rows, columns).

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there is no panel.

    Example:
        >>> figure, axes = new_figure(2, 3)
        >>> axes.shape
        (2, 3)
    """
    if rows < 1 or columns < 1:
        raise ValueError(f"a figure needs at least one panel, got {rows} x {columns}.")
    figure = _figure_class()(
        figsize=(columns * panel[0] + extra[0], rows * panel[1] + extra[1]),
        dpi=150,
        facecolor="white",
        layout="constrained",
    )
    axes = figure.subplots(rows, columns, sharex=sharex, sharey=sharey, squeeze=False)
    return figure, np.asarray(axes, dtype=object)


def panels(
    n: int,
    axes: Any = None,
    *,
    columns: int = 3,
    panel: tuple[float, float] = PANEL,
    extra: tuple[float, float] = (0.0, 0.0),
    sharex: bool = False,
    sharey: bool = False,
) -> tuple[Figure, list[Axes]]:
    """``n`` panels: the given axes, or those of a new figure.

    Args:
        n: Panels.
        axes: One matplotlib Axes, or a sequence or array of exactly ``n``. None: a new figure.
        columns: Most columns of a new figure; unused panels of its last row are removed.
        panel: See :func:`new_figure`.
        extra: See :func:`new_figure`.
        sharex: See :func:`new_figure`.
        sharey: See :func:`new_figure`.

    Returns:
        The figure, and ``n`` axes row by row.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If ``axes`` are not matplotlib's.
        ValueError: If there are not ``n``.

    Example:
        >>> figure, axes = panels(4, columns=3)
        >>> len(axes), len(figure.axes)
        (4, 4)
        >>> panels(2, axes=axes[:2])[1] == axes[:2]
        True
    """
    if n < 1:
        raise ValueError(f"a figure needs at least one panel, got {n}.")
    if axes is None:
        columns = max(1, min(columns, n))
        figure, grid = new_figure(
            -(-n // columns), columns, panel=panel, extra=extra, sharex=sharex, sharey=sharey
        )
        flat: list[Axes] = grid.ravel().tolist()
        for unused in flat[n:]:
            unused.remove()
        return figure, flat[:n]
    _figure_class()
    from matplotlib.axes import Axes

    given = [axes] if isinstance(axes, Axes) else list(np.asarray(axes, dtype=object).flat)
    if not all(isinstance(axis, Axes) for axis in given):
        raise TypeError(f"axes must be matplotlib Axes, one for each panel, got {axes!r:.80}.")
    if len(given) != n:
        raise ValueError(f"{len(given)} axes were given for {n} panels.")
        # A panel in a sub-figure: legends and sizes belong to the whole figure.
    found: Any = given[0].figure
    while found.figure is not found:
        found = found.figure
    return found, given


def style(
    axis: Axes,
    *,
    title: str | None = None,
    x: str | None = None,
    y: str | None = None,
    grid: str | None = "y",
) -> Axes:
    """Give an axis the common look: light grid, two spines, readable text in one size.

    Args:
        axis: A matplotlib Axes.
        title: Written above, to the left.
        x: Label of the x axis.
        y: Label of the y axis.
        grid: ``"x"``, ``"y"``, ``"both"`` or None: which grid lines to draw.

    Returns:
        The axis.

    Example:
        >>> figure, axes = new_figure()
        >>> style(axes[0, 0], title="Own AUC", x="size").get_xlabel()
        'size'
    """
    axis.set_facecolor("white")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(INK)
        axis.spines[side].set_linewidth(0.8)
    axis.tick_params(labelsize=TICK_SIZE, colors=INK, length=3, width=0.8)
    axis.grid(False)
    if grid is not None:
        axis.grid(True, axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    axis.set_axisbelow(True)
    if title is not None:
        axis.set_title(title, fontsize=TITLE_SIZE, color=INK, loc="left", fontweight="bold")
    if x is not None:
        axis.set_xlabel(x, fontsize=LABEL_SIZE, color=INK)
    if y is not None:
        axis.set_ylabel(y, fontsize=LABEL_SIZE, color=INK)
    return axis


def switch_off(axis: Axes, text: str | None = None) -> None:
    """Empty a panel, or show only a note in it.

    Example:
        >>> figure, axes = new_figure()
        >>> switch_off(axes[0, 0], "not measured")
        >>> [text.get_text() for text in axes[0, 0].texts]
        ['not measured']
    """
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.grid(False)
    if text:
        look: dict[str, Any] = {"ha": "center", "va": "center", "transform": axis.transAxes}
        axis.text(0.5, 0.5, textwrap.fill(text, 30), fontsize=LABEL_SIZE, color=GREY, **look)


def line_styles(
    names: Iterable[str], *, references: Iterable[str] = ("random",)
) -> dict[str, dict[str, Any]]:
    """Colour, marker and dash of each line, the same in all panels of a figure.

    A colour is repeated only with another marker and dash, so that lines differ without colour too.

    Args:
        names: Names of the lines, in the order of the legend.
        references: Names of reference lines: grey, without markers.

    Returns:
        ``{name: keyword arguments of matplotlib's plot}``.

    Example:
        >>> styles = line_styles(["nad", "taylor", "random"])
        >>> styles["nad"]["color"], styles["random"]["color"]
        ('#0072B2', '#8C8C8C')
    """
    grey = set(references)
    styles: dict[str, dict[str, Any]] = {}
    number = 0
    for name in names:
        if name in styles:
            continue
        if name in grey:
            styles[name] = {"color": GREY, "linestyle": "-", "marker": "", "linewidth": 1.4}
            continue
        turn, place = divmod(number, len(PALETTE))
        styles[name] = {
            "color": PALETTE[place],
            # The shift gives a repeated colour another marker.
            "marker": MARKERS[(place + turn) % len(MARKERS)],
            "linestyle": DASHES[turn % len(DASHES)],
            "linewidth": 1.6,
        }
        number += 1
    return styles


def line(
    axis: Axes,
    x: ArrayLike,
    y: ArrayLike,
    *,
    label: str,
    low: ArrayLike | None = None,
    high: ArrayLike | None = None,
    **look: Any,
) -> None:
    """A line, and the band between ``low`` and ``high`` behind it; NaN points are left out.

    Args:
        axis: Where to draw.
        x: (N,).
        y: (N,).
        label: For the legend.
        low: (N,), lower end of the band.
        high: (N,), upper end of the band.
        **look: Arguments of matplotlib's ``plot``, as from :func:`line_styles`.

    Example:
        >>> figure, axes = new_figure()
        >>> line(axes[0, 0], [0.1, 0.5], [0.6, 0.9], label="nad", low=[0.5, 0.8], high=[0.7, 1.0])
        >>> len(axes[0, 0].lines), len(axes[0, 0].collections)
        (1, 1)
    """
    xs, ys = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    known = np.isfinite(xs) & np.isfinite(ys)
    look = {"markersize": 3.6, "markeredgewidth": 0.0, **look}
    axis.plot(xs[known], ys[known], label=label, **look)
    if low is None or high is None:
        return
    lows, highs = np.asarray(low, dtype=float), np.asarray(high, dtype=float)
    known &= np.isfinite(lows) & np.isfinite(highs)
    if known.any():
        band: dict[str, Any] = {"color": look.get("color"), "alpha": 0.16, "linewidth": 0}
        axis.fill_between(xs[known], lows[known], highs[known], zorder=1, **band)


def _percent(share: float) -> str:
    return f"{100 * share:.3g}"


def size_axis(
    axis: Axes, sizes: Sequence[float], *, log: bool = True, label: str = "channels kept (%)"
) -> None:
    """Make x the size of sub-architectures, with ticks in per cent at the given sizes.

    Args:
        axis: A matplotlib Axes.
        sizes: The sizes, shares of the channels in [0, 1].
        log: Whether the axis is logarithmic, which shows small sizes better; it omits size 0.
        label: Of the x axis.

    Example:
        >>> figure, axes = new_figure()
        >>> size_axis(axes[0, 0], [0.05, 0.2, 0.8])
        >>> [tick.get_text() for tick in axes[0, 0].get_xticklabels()]
        ['5', '20', '80']
    """
    shown = sorted({float(size) for size in sizes if size > 0 or not log})
    axis.set_xscale("log" if log else "linear")
    if shown:
        places = np.log(shown) if log else np.array(shown)
        span = max(places[-1] - places[0], 1e-9)
        # A label too close to the one before, or to the last, is left out; its tick stays.
        texts, last = [], -np.inf
        for place, size in zip(places, shown, strict=True):
            near = (place - last) / span < 0.09 or 0 < (places[-1] - place) / span < 0.09
            texts.append("" if near else _percent(size))
            last = last if near else place
        axis.set_xticks(shown, texts)
        axis.set_xticks([], minor=True)
    axis.set_xlabel(label, fontsize=LABEL_SIZE, color=INK)


def legend(
    figure: Figure,
    axes: Sequence[Axes],
    *,
    own_figure: bool = True,
    columns: int | None = None,
    order: Sequence[str] = (),
) -> None:
    """One legend for all panels, each name once: below the panels, or in the first given axes.

    Args:
        figure: The figure.
        axes: Its panels, whose names it shows.
        own_figure: Whether :func:`new_figure` made the figure: it gets higher for the legend.
        columns: Columns of the legend; None: as many as fit the figure's width.
        order: Names in the order of the legend; others follow in the order of drawing.

    Example:
        >>> figure, axes = new_figure(1, 2)
        >>> for axis in axes.flat:
        ...     line(axis, [0, 1], [0, 1], label="nad")
        >>> legend(figure, list(axes.flat))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['nad']
    """
    found = chain.from_iterable(
        zip(*axis.get_legend_handles_labels(), strict=True) for axis in axes
    )
    entries: dict[str, Any] = {}
    for handle, name in found:
        entries.setdefault(name, handle)
    entries = {name: entries[name] for name in [*order, *entries] if name in entries}
    if not entries:
        return
    common: dict[str, Any] = {"fontsize": TICK_SIZE, "labelcolor": INK, "frameon": False}
    if not own_figure:
        axes[0].legend(entries.values(), entries.keys(), **common)
        return
    if columns is None:
        # In this size a letter is about 0.075 inches wide, the handle 0.5.
        width = 0.5 + 0.075 * max(len(name) for name in entries)
        columns = max(1, min(len(entries), int(figure.get_figwidth() / width)))
    # The panels keep their height.
    figure.set_figheight(figure.get_figheight() + 0.12 + 0.17 * -(-len(entries) // columns))
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, **common
    )


def plot_intervals(
    rows: Mapping[str, tuple[float, ...]], x: str, *, at: float | None = None, axes: Any = None
) -> Figure:
    """Values with their intervals, ``{name: (value, low, high)}``, one row each; NaN is left out.

    ``x`` is the label of the values, ``at`` the place of a dashed line (the value by chance).

    Example:
        >>> figure = plot_intervals({"nad": (0.9, 0.8, 1.0), "taylor": (0.7, 0.6, 0.8)}, "own AUC")
        >>> [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
        ['nad', 'taylor']
    """
    figure, (axis,) = panels(1, axes, panel=(PANEL[0] * 1.6, 0.8 + 0.28 * max(len(rows), 1)))
    for place, ends in enumerate(np.asarray(list(rows.values()), dtype=float).reshape(-1, 3)):
        axis.plot(ends[1:], [place, place], color=PALETTE[0], linewidth=1.6)
        axis.plot(ends[:1], [place], color=PALETTE[0], marker="o", markersize=4)
    if at is not None:
        axis.axvline(at, color=GREY, linewidth=1.2, linestyle="--")
    style(axis, x=x, grid="x")
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    return figure


def plot_parts(
    names: Sequence[str], parts: Mapping[str, Sequence[float]], y: str, *, axes: Any = None
) -> Figure:
    """Bars with these names, made of ``{part: height in each bar}`` from below; y is their label.

    Example:
        >>> figure = plot_parts(["conv1", "conv2"], {"kept": [3, 4], "closed": [5, 4]}, "channels")
        >>> len(figure.axes[0].patches)
        4
    """
    width = max(PANEL[0] * 1.3, 1.2 + 0.34 * len(names))
    figure, (axis,) = panels(1, axes, panel=(width, PANEL[1] * 1.15))
    below = np.zeros(len(names))
    for i, (part, heights) in enumerate(parts.items()):
        axis.bar(names, heights, bottom=below, label=part, color=PALETTE[i % len(PALETTE)])
        below = below + np.asarray(heights, dtype=float)
    style(axis, y=y)
    axis.set_xticks(range(len(names)), list(names), rotation=90)
    legend(figure, [axis], own_figure=axes is None)
    return figure


def plot_rows(rows: Sequence[Mapping[str, Any]], axes: Any = None) -> Figure:
    """Bars for each column of numbers of a table, one panel each; its texts name the rows.

    Example:
        >>> rows = [{"site": "a", "flops": 6, "parameters": 9}]
        >>> [axis.get_title(loc="left") for axis in plot_rows(rows).axes]
        ['flops', 'parameters']
    """
    rows = rows[:_MOST_BARS]
    first = rows[0] if rows else {}
    numbers = [name for name, value in first.items() if type(value) in (int, float)]
    names = [" ".join(str(v) for k, v in row.items() if k not in numbers) for row in rows]
    figure, panel = panels(
        max(1, len(numbers)), axes, panel=(PANEL[0], max(PANEL[1], 0.6 + 0.2 * len(rows)))
    )
    for axis, column in zip(panel, numbers, strict=True) if numbers else ():
        axis.barh(range(len(rows)), [float(row[column]) for row in rows], color=PALETTE[0])
        axis.set_yticks(range(len(rows)), names)
        axis.invert_yaxis()
        style(axis, title=label_of(column), grid="x")
    return figure


def label_of(measure: str) -> str:
    """How a measure is called in figures.

    Example:
        >>> label_of("own_auc"), label_of("flop_size")
        ('own AUC', 'size in multiply-adds')
    """
    known = MEASURE_TABLE.get(measure)
    return measure.replace("_", " ") if known is None else known.label
