"""Draw the flow with matplotlib: sites as columns, channels as nodes, flows as links."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from nad_attr.flow.picture import flow_picture
from nad_attr.flow.result import InformationFlow
from nad_attr.plots import style as figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plot_flow"]

#: The two classes.
_COLOURS = ("#0072B2", "#D55E00")


def plot_flow(
    flow: InformationFlow,
    *,
    channels: int | None = None,
    links: int | None = None,
    axes: Any = None,
) -> Figure:
    """Draw what flows between the strongest channels of each site.

    Each site is a column, with its channels from the largest effect down and all others together
    at the bottom. The area of a node is its effect, the width of a link its flow (both relative to
    their site, links to their class). Links for the class are solid, those against it dashed. Two
    classes are drawn over each other in two colours.

    Args:
        flow: The flow.
        channels: Of each site, at most. None: 14 for few sites, less for many.
        links: Between two sites and for each class, at most. None: twice as many as channels.
        axes: One matplotlib Axes to draw into; None: a new figure.

    Returns:
        A matplotlib figure, not shown.

    Raises:
        ImportError: If matplotlib is missing.
        TypeError: If it is not a flow.
        ValueError: If a number makes no sense.
    """
    if not isinstance(flow, InformationFlow):
        raise TypeError(f"expected an InformationFlow, got {type(flow).__name__}.")
    found = flow_picture(flow.flows, channels=channels, links=links)
    nodes, n_sites = found["nodes"], len(found["sites"])
    rows: list[list[int]] = [[] for _ in range(n_sites)]
    for number, node in enumerate(nodes):
        rows[node["site"]].append(number)
    most = max(map(len, rows))
    figure, [axis] = figures.panels(
        1, axes, panel=(min(30.0, max(4.5, 0.95 * n_sites + 1.2)), max(2.8, 0.32 * most + 1.3))
    )
    from matplotlib.lines import Line2D
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    at = {
        number: (s, -(place + (most - len(own)) / 2) / most)
        for s, own in enumerate(rows)
        for place, number in enumerate(own)
    }
    # Outputs of two classes have no common unit: each is drawn against its own largest.
    largest: dict[tuple[int, int, int], float] = {}
    for link in found["links"]:
        ends = nodes[link["from"]], nodes[link["to"]]
        hop = link["task"], ends[0]["site"], ends[1]["site"]
        # The flow of all other channels together would make every single one look thin.
        single = all(end["channel"] >= 0 for end in ends)
        largest[hop] = max(largest.get(hop, 1e-300), abs(link["flow"]) if single else 0.0)
    for link in sorted(found["links"], key=lambda k: abs(k["flow"])):
        hop = link["task"], nodes[link["from"]]["site"], nodes[link["to"]]["site"]
        strength = min(1.0, abs(link["flow"]) / largest[hop])
        (x0, y0), (x1, y1) = at[link["from"]], at[link["to"]]
        # Two classes side by side: the second a little lower.
        shift = 0.12 * (link["task"] - 0.5) / most if len(found["tasks"]) > 1 else 0.0
        middle = (x0 + x1) / 2
        points = [(x0, y0 - shift), (middle, y0 - shift), (middle, y1 - shift), (x1, y1 - shift)]
        axis.add_patch(
            PathPatch(
                Path(points, [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4]),
                facecolor="none",
                edgecolor=_COLOURS[link["task"]],
                linewidth=0.4 + 4.0 * strength,
                linestyle="-" if link["flow"] >= 0 else (0, (2.2, 1.4)),
                alpha=0.25 + 0.6 * strength,
                zorder=1 + strength,
            )
        )
    for own in filter(None, rows):
        sizes = {k: max(abs(effect) for effect in nodes[k]["effect"]) for k in own}
        told = [size for k, size in sizes.items() if nodes[k]["channel"] >= 0]
        top = max(told or sizes.values()) or 1.0
        for number in own:
            node, (x, y) = nodes[number], at[number]
            size = min(1.0, sizes[number] / top)
            axis.scatter(
                [x], [y], s=14 + 150 * size, zorder=4, linewidth=0.8, edgecolor=figures.INK,
                color="white" if node["channel"] < 0 else "#DFE4E8",
                marker="s" if node["channel"] < 0 else "o",
            )  # fmt: skip
            last = node["site"] == n_sites - 1
            text = "" if last else f"{node['n']} more" if node["channel"] < 0 else node["channel"]
            axis.annotate(
                str(text), (x, y), (0, -9 - 3 * size), textcoords="offset points", ha="center",
                va="center", fontsize=6.5, color=figures.INK, zorder=5,
                bbox={"boxstyle": "round,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.75},
            )  # fmt: skip
    figures.style(axis, grid=None)
    axis.set_xlim(-0.5, n_sites - 0.5)
    axis.set_ylim(-1 - 0.6 / most, 0.5 / most)
    axis.set_yticks([])
    axis.spines["left"].set_visible(False)
    upright = n_sites > 8 or max(map(len, found["sites"])) > 14
    slanted: dict[str, Any] = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
    axis.set_xticks(range(n_sites), found["sites"], **(slanted if upright else {}))
    axis.tick_params(axis="x", length=0)
    handles = [
        Line2D([], [], color=_COLOURS[t], linewidth=3, label=name)
        for t, name in enumerate(found["tasks"])
    ]
    handles += [
        Line2D([], [], color=figures.INK, label="for the class"),
        Line2D([], [], color=figures.INK, linestyle=(0, (2.2, 1.4)), label="against it"),
    ]
    share = " and ".join(f"{100 * drawn:.0f} %" for drawn in found["drawn"])
    axis.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=4, frameon=False,
        fontsize=8, title=f"Links drawn carry {share} of the flow", title_fontsize=8,
        alignment="left",
    )  # fmt: skip
    return figure
