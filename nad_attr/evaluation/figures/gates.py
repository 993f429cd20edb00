"""Figures of gates: which channels a task keeps, how many at which depth, what tasks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nad_attr.evaluation.rows import named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.plots import style as figures
from nad_attr.plots.clustering import cluster_order
from nad_attr.stats.pairs import overlap_matrix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_architecture", "plot_overlap", "plot_sizes"]

#: Colours of closed channels, of the first task's, the second's, and of both.
_CLOSED, _FIRST, _SECOND, _BOTH = "#DFE4E8", "#0072B2", "#E69F00", "#15191D"
#: Tasks up to which each has its name on an axis.
_NAMED = 40
#: Cells side by side up to which a line separates them.
_SEPARATED = 150


def _one(value: object, task: object, size: float | None) -> tuple[SubArchitecture, str]:
    if isinstance(value, SubArchitecture):
        if task is not None or size is not None:
            raise TypeError("a sub-architecture is of one task and size already.")
        return value, "kept" if value.task is None else str(value.task)
    if not isinstance(value, TaskGates):
        raise TypeError(f"expected TaskGates or a SubArchitecture, got {type(value).__name__}.")
    if task is None:
        if len(value) > 1:
            raise ValueError(f"these gates are for {len(value)} tasks; say which with task=.")
        task = value.tasks[0]
    names = value.task_names or tuple(map(str, value.tasks))
    return value.sub_architecture(task, size), names[value.index(task)]


def plot_architecture(
    architecture: TaskGates | SubArchitecture,
    task: object = None,
    other: object = None,
    *,
    size: float | None = None,
    axes: Any = None,
) -> Figure:
    """The architecture view: a column for each site, a cell for each channel, kept ones lit.

    Args:
        architecture: Task gates, or one sub-architecture.
        task: Of the gates: class index, group or name; may be left out if there is one only.
        other: A second task of the gates, or a second sub-architecture of the same sites: what
            both keep and what either keeps alone get colours of their own.
        size: Cut task gates at this share of the channels; None: as learned.
        axes: One matplotlib Axes to draw into; None: a new figure.

    Returns:
        A matplotlib figure, not shown.

    Raises:
        ImportError: If matplotlib is missing.
        KeyError: If the gates hold no such task.
        TypeError: If an argument is of another kind.
        ValueError: If it is not clear which task is meant, or sites differ.

    Example:
        >>> from nad_attr import GateSite
        >>> arch = SubArchitecture.from_kept({"a": [0, 2]}, [GateSite("a", 3), GateSite("b", 2)])
        >>> [tick.get_text() for tick in plot_architecture(arch).axes[0].get_xticklabels()]
        ['a', 'b']
    """
    first, name = _one(architecture, task, size)
    second = None
    if other is not None:
        second, other_name = (
            _one(other, None, None)
            if isinstance(other, SubArchitecture)
            else _one(architecture, other, size)
        )
        if second.sites != first.sites:
            raise ValueError("the two sub-architectures have different gate sites.")
    widest = max(site.n_channels for site in first.sites)
    # Columns about four times as high as wide.
    per_row = max(2, round(math.sqrt(widest / 4)))
    height = -(-widest // per_row)
    gap = max(1, per_row // 4)
    n = len(first.sites)
    cells = np.full((height, n * (per_row + gap) - gap), np.nan)
    for s, site in enumerate(first.sites):
        kind = first[site.name].numpy().astype(float)
        if second is not None:
            kind += 2 * second[site.name].numpy()
        place = np.arange(site.n_channels)
        cells[place // per_row, s * (per_row + gap) + place % per_row] = kind
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    width = min(14.0, max(3.4, 0.5 * n + 1.0))
    figure, [axis] = figures.panels(1, axes, panel=(width, 3.0))
    axis.imshow(
        cells,
        cmap=ListedColormap([_CLOSED, _FIRST, _SECOND, _BOTH]),
        vmin=-0.5,
        vmax=3.5,
        aspect="auto",
        interpolation="nearest",
    )
    figures.style(axis, grid=None, x="gate site, in forward order")
    if cells.shape[1] <= _SEPARATED:
        axis.set_xticks(np.arange(0.5, cells.shape[1] - 1), minor=True)
        axis.set_yticks(np.arange(0.5, height - 1), minor=True)
        axis.grid(True, which="minor", color="white", linewidth=0.7)
        axis.tick_params(which="minor", length=0)
        axis.set_axisbelow(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    axis.set_yticks([])
    centres = [s * (per_row + gap) + (per_row - 1) / 2 for s in range(n)]
    longest = max(len(site.name) for site in first.sites)
    axis.set_xticks(
        centres,
        [site.name for site in first.sites],
        rotation=0 if longest * n * 0.075 < width else 90,
    )
    axis.tick_params(length=0)
    share = f"{first.n_kept:,} of {first.n_channels:,} channels"
    if second is None:
        entries = [(_FIRST, "kept"), (_CLOSED, "closed")]
        title = f"{name}: {share}"
    else:
        entries = [(_FIRST, f"only {name}"), (_SECOND, f"only {other_name}")]
        entries += [(_BOTH, "both"), (_CLOSED, "neither")]
        title = f"{name} and {other_name}"
    axis.set_title(
        title, fontsize=figures.TITLE_SIZE, color=figures.INK, loc="left", fontweight="bold"
    )
    handles = [Patch(color=colour, label=label) for colour, label in entries]
    common: dict[str, Any] = {
        "fontsize": figures.TICK_SIZE,
        "labelcolor": figures.INK,
        "frameon": False,
    }
    if axes is None:
        figure.legend(handles=handles, loc="outside lower center", ncols=len(entries), **common)
    else:
        axis.legend(handles=handles, loc="upper left", **common)
    return figure


def plot_sizes(
    gates: TaskGates, tasks: Sequence[object] = (), *, size: float | None = None, axes: Any = None
) -> Figure:
    """The share of channels kept at each site: mean over tasks, the middle 80 %, and some tasks.

    Args:
        gates: The gates.
        tasks: Tasks that get a line of their own.
        size: Cut at this share of the channels; None: as learned.
        axes: One matplotlib Axes to draw into; None: a new figure.

    Returns:
        A matplotlib figure, not shown.

    Raises:
        ImportError: If matplotlib is missing.
        KeyError: If the gates hold no such task.
        TypeError: If ``gates`` are none.

    Example:
        >>> import torch
        >>> from nad_attr import GateSite
        >>> gates = TaskGates(
        ...     {"a": torch.tensor([[0.9, 0.1], [0.8, 0.9]])}, [GateSite("a", 2)], [0, 1]
        ... )
        >>> [line.get_label() for line in plot_sizes(gates, [1]).axes[0].lines]
        ['mean of 2 tasks', '1']
    """
    if not isinstance(gates, TaskGates):
        raise TypeError(f"gates must be TaskGates, got {type(gates).__name__}.")
    rows = [gates.index(task) for task in tasks]
    names = gates.task_names or tuple(map(str, gates.tasks))
    shares = np.array([list(arch.sizes.values()) for arch in gates.sub_architectures(size)])
    n = len(gates.sites)
    places = np.arange(n)
    figure, [axis] = figures.panels(1, axes, panel=(max(3.8, min(12.0, 0.34 * n + 1.4)), 2.9))
    styles = figures.line_styles([names[row] for row in rows])
    if len(gates) > 1:
        low, high = np.quantile(shares, [0.1, 0.9], axis=0)
        figures.line(
            axis,
            places,
            shares.mean(0),
            low=low,
            high=high,
            label=f"mean of {len(gates)} tasks",
            color=figures.GREY,
            linewidth=1.4,
        )
    else:
        rows, styles = [0], figures.line_styles(names[:1])
    for row in rows:
        figures.line(axis, places, shares[row], label=names[row], **styles[names[row]])
    figures.style(
        axis, title="Sizes along depth", x="gate site, in forward order", y="channels kept"
    )
    axis.set_ylim(bottom=0)
    axis.set_xticks(places, [site.name for site in gates.sites], rotation=90)
    figures.legend(figure, [axis], own_figure=axes is None)
    return figure


def plot_overlap(
    architectures: TaskGates | Sequence[SubArchitecture],
    *,
    chance_corrected: bool = True,
    clustered: bool = True,
    size: float | None = None,
    axes: Any = None,
) -> Figure:
    """Draw what each pair of tasks shares, as a matrix with similar tasks side by side.

    Args:
        architectures: Task gates, or sub-architectures of the same sites with a task each.
        chance_corrected: Kappa, 0 for what random channels of these sizes share; else the overlap
            |A and B| / |A or B|. Means over sites.
        clustered: Order tasks by average linkage; else as they are given.
        size: Cut task gates at this share of the channels; None: as learned.
        axes: One matplotlib Axes to draw into; None: a new figure.

    Returns:
        A matplotlib figure, not shown.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If they are something else.
        ValueError: If there are fewer than two tasks.

    Example:
        >>> from nad_attr import GateSite
        >>> site, kept = GateSite("a", 4), [[0, 1], [2, 3], [0, 1]]
        >>> archs = [SubArchitecture.from_kept({"a": kept[k]}, [site], task=k) for k in range(3)]
        >>> figure = plot_overlap(archs, clustered=False)
        >>> figure.axes[0].images[0].get_array().filled(0).round(3).tolist()
        [[0.0, -0.5, 1.0], [-0.5, 0.0, -0.5], [1.0, -0.5, 0.0]]
    """
    given = named_architectures(architectures, size, least=2)
    matrix = overlap_matrix(given.masks, chance_corrected=chance_corrected).numpy()
    order = cluster_order(matrix) if clustered else np.arange(len(matrix))
    shown: NDArray[np.float64] = matrix[np.ix_(order, order)].copy()
    names = [given.task_names[row] for row in order]
    # The diagonal is one by definition: its colours are needed for the rest.
    np.fill_diagonal(shown, np.nan)
    n = len(names)
    side = min(8.0, max(2.8, 0.22 * n + 1.2))
    figure, [axis] = figures.panels(1, axes, panel=(side + 0.7, side))
    least = float(np.nanmin(shown))
    most = max(float(np.nanmax(np.abs(shown))), 1e-9)
    signed = chance_corrected and least < 0
    image = axis.imshow(
        np.ma.masked_invalid(shown),
        # Blue is more than chance.
        cmap="RdBu" if signed else figures.SEQUENTIAL,
        vmin=-most if signed else 0.0,
        vmax=most,
        interpolation="nearest",
    )
    title = "Overlap beyond chance (kappa)" if chance_corrected else "Overlap"
    figures.style(axis, title=title, grid=None)
    if n <= _NAMED:
        axis.set_xticks(range(n), names, rotation=90)
        axis.set_yticks(range(n), names)
    else:
        axis.set_xticks([])
        axis.set_yticks([])
        axis.set_xlabel(
            f"{n} tasks, similar ones side by side", fontsize=figures.LABEL_SIZE, color=figures.INK
        )
    bar = figure.colorbar(image, ax=axis, fraction=0.046, pad=0.03)
    bar.ax.tick_params(labelsize=figures.TICK_SIZE, colors=figures.INK, length=3)
    bar.outline.set_visible(False)
    return figure
