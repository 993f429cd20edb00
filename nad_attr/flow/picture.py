"""Data for a picture of the flow: the strongest channels, the others as one, some links."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nad_attr.flow.links import OUTPUT, REST, TaskFlow

__all__ = ["flow_picture"]

_UNITS = {"heads": "head", "neurons": "neuron"}


def nodes_of(n_sites: int) -> int:
    """How many channels of each site are drawn, so that many sites stay readable.

    Example:
        >>> nodes_of(3), nodes_of(10), nodes_of(30)
        (14, 10, 6)
    """
    return 14 if n_sites <= 6 else 10 if n_sites <= 15 else 6


def _unit(flow: TaskFlow, name: str) -> str:
    site = next(site for site in flow.architecture.sites if site.name == name)
    return _UNITS.get(site.units, "channel" if site.groups is None else "group")


def flow_picture(
    flows: Sequence[TaskFlow], *, channels: int | None = None, links: int | None = None
) -> dict[str, Any]:
    """Sites as columns, channels as nodes, flows as links: plain values, ready to be drawn.

    For all flows the same ``channels`` of each site are nodes, those with the largest effects on
    any task (None: 14 for few sites, less for many); all other kept channels are one node.
    ``links`` is the number between two sites for each task, the strongest (None: twice as many as
    channels).

    Returns:
        ``sites`` (names, the last "output"), ``units`` (of each site's nodes: channel, head, neuron
        or group), ``tasks`` (names), ``nodes`` (site's number, channel or -1 for the others, effect
        on each task, how many channels), ``links`` (task's number, two nodes' numbers, flow,
        straight part), ``drawn`` (for each task, the share of the absolute flow that its links
        have), ``n_images``.

    Raises:
        ValueError: If there is no flow, sites differ or a number makes no sense.
    """
    if not flows:
        raise ValueError("there is no flow to draw.")
    sites = [*flows[0].effects, OUTPUT]
    if any([*flow.effects, OUTPUT] != sites for flow in flows):
        raise ValueError("the flows are of different sites.")
    for what, value in (("channels", channels), ("links", links)):
        if value is not None and (isinstance(value, bool) or value < 1):
            raise ValueError(f"{what} must be a whole number from 1 on, got {value!r}.")
    n = channels or nodes_of(len(sites) - 1)
    nodes: list[dict[str, Any]] = []
    place: dict[str, Tensor] = {}
    for s, site in enumerate(sites[:-1]):
        effects = torch.stack([flow.effects[site] for flow in flows])
        kept = torch.stack([flow.open(site) for flow in flows])
        # Receivers are told apart; a channel that is not is among the others.
        told = torch.ones_like(kept[0])
        for flow in flows:
            into = [link for link in flow.links if link.target_site == site]
            if into and into[0].n_rest:
                own = torch.zeros_like(told)
                own[into[0].targets] = True
                told &= own | ~flow.open(site)
        largest = (effects.abs() * kept).amax(0).masked_fill(~(told & kept.any(0)), -1)
        order = [c for c in largest.argsort(descending=True, stable=True)[:n].tolist()
                 if largest[c] >= 0]  # fmt: skip
        where = torch.full((effects.shape[1],), -1, device="cpu")
        for c in order:
            where[c] = len(nodes)
            nodes.append({"site": s, "channel": c, "effect": effects[:, c].tolist(), "n": 1})
        others = kept.any(0) & (where < 0)
        if bool(others.any()):
            where[where < 0] = len(nodes)
            nodes.append(
                {
                    "site": s, "channel": REST, "effect": effects[:, others].sum(1).tolist(),
                    "n": int(others.sum()),
                }
            )  # fmt: skip
        place[site] = where
    nodes.append(
        {
            "site": len(sites) - 1, "channel": 0, "n": 1,
            "effect": [sum(float(k.flow.sum()) for k in f.links if k.target_site == OUTPUT)
                       for f in flows],
        }
    )  # fmt: skip
    place[OUTPUT] = torch.tensor([len(nodes) - 1], device="cpu")
    drawn: list[dict[str, Any]] = []
    shares = []
    for t, flow in enumerate(flows):
        size = shown = 0.0
        for link in flow.links:
            rows, columns = place[link.source_site][link.sources], place[link.target_site]
            ends = columns[link.targets]
            if link.n_rest:
                ends = torch.cat([ends, columns.max()[None]])
            both = [
                torch.zeros(len(nodes), len(nodes), dtype=torch.float64, device="cpu").index_put_(
                    (rows[:, None].expand(-1, len(ends)), ends[None].expand(len(rows), -1)),
                    values[:, : len(ends)],
                    accumulate=True,
                )
                for values in (link.flow, link.straight)
            ]
            flat = both[0].abs().flatten()
            strongest = flat.topk(min(links or 2 * n, int((flat > 0).sum()))).indices.tolist()
            size += float(flat.sum())
            shown += float(flat[strongest].sum())
            for index in strongest:
                a, b = divmod(index, len(nodes))
                straight = float(both[1][a, b])
                drawn.append(
                    {
                        "task": t, "from": a, "to": b, "flow": float(both[0][a, b]),
                        "straight": None if straight != straight else straight,
                    }
                )  # fmt: skip
        shares.append(shown / size if size else 1.0)
    return {
        "sites": sites,
        "units": [_unit(flows[0], site) for site in sites[:-1]] + ["output"],
        "tasks": [flow.name for flow in flows],
        "nodes": nodes,
        "links": drawn,
        "drawn": shares,
        "n_images": [flow.n_images for flow in flows],
    }
