"""What flows between the channels of a network's sites: the result, its tables and its checks."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from nad_attr._display import html_table
from nad_attr.flow.cutting import Machine, cut_edges, recentred
from nad_attr.flow.links import OUTPUT, REST, TaskFlow, kept_edges
from nad_attr.flow.stored import StoredFlow, StoredSite
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result
from nad_attr.stats.tables import pandas, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["InformationFlow", "stacked", "task_flows"]


@dataclass(frozen=True, eq=False)
class InformationFlow(Result):
    """What flows between the channels of neighbouring gate sites, for one task or two compared.

    :func:`information_flow` makes it; see there for what the numbers mean.

    Attributes:
        flows: One for each task.
        sites: In forward order.
        links: ``{site name or "output": the sites it reads}``.
        conservation: ``{site name: largest |outflow - effect| / largest |effect|}`` over channels
            and tasks.
        cost: Passes of the whole network for each batch of images and task: ``forward``,
            ``backward``, and ``straight``, backward passes of the shortcuts alone.

    Example:
        >>> import torch
        >>> from nad_attr import SubArchitecture, find_gate_sites, information_flow
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(),
        ...                     nn.Linear(6, 3)).eval()
        >>> images = torch.rand(8, 4)
        >>> whole = SubArchitecture.full(find_gate_sites(net, images))
        >>> found = information_flow(net, whole, images, tasks=1)
        >>> found
        InformationFlow(task 1: 2 sites, 36 edges of 8 images; outflow equals effect)
        >>> list(found.edges)
        ['source_site', 'source', 'target_site', 'target', 'flow', 'straight']
    """

    flows: tuple[TaskFlow, ...]
    sites: tuple[GateSite, ...]
    links: dict[str, tuple[str, ...]]
    conservation: dict[str, float]
    cost: dict[str, int] = field(default_factory=dict)

    def frame(self) -> pd.DataFrame:
        """:attr:`edges`."""
        return self.edges

    def summary(self) -> str:
        """The links of each task with their flow, as plain text."""
        columns = ["task", "from → to", "channels", "sum of |flow|", "straight share"]
        return "\n".join([repr(self), *table([columns, *self._rows()])])

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return {
            "flows": tuple[StoredFlow, ...],
            "sites": tuple[StoredSite, ...],
            "links": dict[str, tuple[str, ...]],
            "conservation": dict[str, float],
            "cost": dict[str, int],
        }

    def _fields(self) -> dict[str, Any]:
        return {
            "flows": tuple(map(StoredFlow.of, self.flows)),
            "sites": tuple(map(StoredSite.of, self.sites)),
            "links": self.links,
            "conservation": self.conservation,
            "cost": self.cost,
        }

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> InformationFlow:
        sites = tuple(site.made() for site in fields["sites"])
        flows = tuple(flow.made(sites) for flow in fields["flows"])
        known = {site.name for site in sites}
        named = {OUTPUT, *known}.issuperset([*fields["links"], *sum(fields["links"].values(), ())])
        if not flows or not named or not known.issuperset(fields["conservation"]):
            raise ValueError("flows, sites and conservation do not fit")
        facts = (fields[name] for name in ("links", "conservation", "cost"))
        return cls(flows, sites, *facts)

    def __getitem__(self, task: object) -> TaskFlow:
        """The flow of a task, by class, group or name."""
        for flow in self.flows:
            if task in (flow.task, flow.name):
                return flow
        raise KeyError(f"no flow of {task!r}; there are {[flow.task for flow in self.flows]}.")

    @property
    def edges(self) -> pd.DataFrame:
        """All edges, strongest first.

        Columns ``source_site, source, target_site, target, flow, straight``, with two tasks
        ``task`` before them. ``target`` -1 is all receiving channels that are not told apart.
        """
        pd = pandas("edges")
        frames = []
        for flow in self.flows:
            for link in flow.links:
                numbers = link.numbers
                n = len(numbers)
                frame: dict[str, Any] = {"task": flow.name} if len(self.flows) > 1 else {}
                frame |= {
                    "source_site": link.source_site,
                    "source": np.repeat(link.sources.numpy(), n),
                    "target_site": link.target_site,
                    "target": np.tile(np.array(numbers, dtype=np.int64), len(link.sources)),
                    "flow": link.flow[:, :n].reshape(-1).numpy(),
                    "straight": link.straight[:, :n].reshape(-1).numpy(),
                }
                frames.append(pd.DataFrame(frame))
        frames = [f for f in frames if len(f)] or frames
        every = pd.concat(frames, ignore_index=True)
        return every.sort_values("flow", key=abs, ascending=False, kind="stable", ignore_index=True)

    @property
    def nodes(self) -> pd.DataFrame:
        """The kept channels of each site.

        Columns ``site, channel, effect, inflow, outflow, source``, with two tasks ``task`` before
        them. A channel is a group where channels are in groups, as a head's are. ``source`` is what
        the block before adds by itself: ``effect - inflow``. Channels that are not told apart as
        receivers have no inflow of their own (NaN); the row of channel -1 has that of all of them.
        """
        pd = pandas("nodes")
        rows: list[dict[str, Any]] = []
        for flow in self.flows:
            label = {"task": flow.name} if len(self.flows) > 1 else {}
            for site in self.sites:
                effect, out = flow.effects[site.name], flow.outflow(site.name)
                inflow, rest = flow.inflow(site.name)
                kept = flow.kept(site.name)
                rows += [
                    {
                        **label, "site": site.name, "channel": c, "effect": float(effect[c]),
                        "inflow": float(inflow[c]), "outflow": float(out[c]),
                        "source": float(effect[c] - inflow[c]),
                    }
                    for c in kept
                ]  # fmt: skip
                others = [c for c in kept if bool(inflow[c].isnan())]
                if others:
                    total = float(effect[others].sum())
                    rows.append(
                        {
                            **label, "site": site.name, "channel": REST, "effect": total,
                            "inflow": rest, "outflow": float(out[others].sum()),
                            "source": total - rest,
                        }
                    )  # fmt: skip
        return pd.DataFrame(rows)

    def cut(
        self,
        model: nn.Module,
        edges: Any,
        task: object = None,
        *,
        images: Tensor | tuple[Tensor, ...] | None = None,
    ) -> AbstractContextManager[None]:
        """Run the network as the task's sub-architecture with some edges cut.

        Channel j of the next site gets what the block makes with channel i closed; all other
        channels get what it makes with i as it is.

        Args:
            model: The network that the flow was measured on; unchanged afterwards.
            edges: Rows of :attr:`edges`, or ``(source site, source, target site, target)``, one or
                several.
            task: Whose sub-architecture; may be left out if there is one.
            images: Some to fit on: a constant is added to each channel that lacks a source, so
                that its mean over them stays what it is without cuts. None: nothing is added.

        Raises:
            KeyError: If there is no such task.
            ValueError: If there is no such edge.
        """
        flow = self._one(task)
        pairs, offsets = self.pairs(edges, flow), None
        if images is not None:
            inputs = (images,) if isinstance(images, Tensor) else tuple(images)
            machine = Machine(model, flow.architecture, self.sites, self.links)

            def call(copies: int) -> Any:
                return model(*(x.repeat(copies, *[1] * (x.ndim - 1)) for x in inputs))

            offsets = recentred(machine, call, pairs, len(inputs[0]))
        return cut_edges(model, flow.architecture, self.sites, self.links, pairs, offsets=offsets)

    def keep_edges(
        self,
        model: nn.Module,
        n: int | float,
        task: object = None,
        *,
        by: str = "strength",
        images: Tensor | tuple[Tensor, ...] | None = None,
    ) -> AbstractContextManager[None]:
        """Run the network with only the strongest edges between sites; all others are cut.

        Args:
            model: The network that the flow was measured on; unchanged afterwards.
            n: How many edges, or their share in (0, 1).
            task: Whose; may be left out if there is one.
            by: "strength" or "flow", "gradient", "random".
            images: See :meth:`cut`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If channels were not told apart as receivers, or there are not so many.
        """
        flow = self._one(task)
        return self.cut(model, kept_edges(flow, n, by=by).cut, flow.task, images=images)

    def _one(self, task: object) -> TaskFlow:
        if task is not None:
            return self[task]
        if len(self.flows) > 1:
            raise ValueError(
                f"this is the flow of {[f.task for f in self.flows]}; say which with task=."
            )
        return self.flows[0]

    def pairs(self, edges: Any, flow: TaskFlow) -> dict[str, list[tuple[str, int, int]]]:
        """Edges by the site that they lead to: ``{target site: [(site, source, target), ...]}``.

        Raises:
            TypeError: If they are not edges.
            ValueError: If there is no such edge.
        """
        columns = ("source_site", "source", "target_site", "target")
        if hasattr(edges, "itertuples"):
            edges = list(edges[list(columns)].itertuples(index=False, name=None))
        elif hasattr(edges, "index") and hasattr(edges, "loc"):
            edges = [tuple(edges[list(columns)])]
        elif isinstance(edges, tuple) and len(edges) == 4 and isinstance(edges[0], str):
            edges = [edges]
        widths = {site.name: site.n_gates for site in self.sites} | {OUTPUT: 1}
        rest = {
            (link.source_site, link.target_site): sorted(
                set(flow.kept(link.target_site)) - set(link.targets.tolist())
            )
            for link in flow.links
            if link.target_site != OUTPUT
        }
        found: dict[str, list[tuple[str, int, int]]] = {}
        for edge in edges:
            try:
                site, source, after, target = edge
                source, target = int(source), int(target)
            except (TypeError, ValueError):
                raise TypeError(
                    "an edge is (source site, source, target site, target), as in the rows of "
                    f"edges, not {edge!r:.80}."
                ) from None
            if site not in self.links.get(after, ()):
                raise ValueError(f"no link leads from {site!r} to {after!r}.")
            targets = rest.get((site, after), [0]) if target == REST else [target]
            if not 0 <= source < widths[site] or any(not 0 <= t < widths[after] for t in targets):
                raise ValueError(f"there is no edge {tuple(edge)!r}: no such channel.")
            found.setdefault(after, []).extend((site, source, t) for t in targets)
        return found

    def plot(self, **options: Any) -> Figure:
        """The flow, drawn: see :func:`nad_attr.flow.plot_flow`."""
        from nad_attr.flow.plot import plot_flow

        return plot_flow(self, **options)

    @property
    def n_edges(self) -> int:
        """All edges of all tasks."""
        return sum(len(link.sources) * len(link.numbers) for f in self.flows for link in f.links)

    @property
    def conserved(self) -> str:
        """Whether the outflow is the effect of each channel, in words."""
        worst = max(self.conservation.values())
        if worst < 1e-3:
            return "outflow equals effect"
        return f"outflow is off its effect by up to {100 * worst:.2g} %"

    def __repr__(self) -> str:
        names = " and ".join(flow.name for flow in self.flows)
        n = sorted({flow.n_images for flow in self.flows})
        images = " and ".join(map(str, n)) + f" image{'s' * (n[-1] != 1)}"
        return (
            f"InformationFlow(task{'s' * (len(self.flows) > 1)} {names}: {len(self.sites)} "
            f"site{'s' * (len(self.sites) != 1)}, {self.n_edges:,} edges of {images}; "
            f"{self.conserved})"
        )

    def _rows(self) -> list[list[str]]:
        rows = []
        for flow in self.flows:
            for link in flow.links:
                size = float(link.flow.abs().sum())
                straight = float(link.straight.abs().sum())
                share = "unknown" if np.isnan(straight) else f"{straight / max(size, 1e-300):.2f}"
                rows.append(
                    [flow.name, f"{link.source_site} → {link.target_site}",
                     f"{len(link.sources)} → {len(link.targets) + link.n_rest}",
                     f"{size:.3g}", share]
                )  # fmt: skip
        return rows

    def _repr_html_(self) -> str:
        columns = ["task", "from → to", "channels", "sum of |flow|", "straight share"]
        return html_table(repr(self), columns, self._rows()[:40])


def task_flows(flows: Sequence[TaskFlow | InformationFlow]) -> list[TaskFlow]:
    """The flows of single tasks."""
    return [
        one
        for flow in flows
        for one in (flow.flows if isinstance(flow, InformationFlow) else (flow,))
    ]


def stacked(flows: Sequence[TaskFlow], site: str, after: str) -> NDArray[np.float64]:
    """The flows of several tasks between two sites over all their channels: (T, C, C')."""
    matrices = []
    for flow in flows:
        n_targets = 1 if after == OUTPUT else len(flow.effects[after])
        full = np.zeros((len(flow.effects[site]), n_targets))
        for link in flow.links:
            if (link.source_site, link.target_site) == (site, after):
                full[np.ix_(link.sources.numpy(), link.targets.numpy())] = link.flow[:, :-1].numpy()
        matrices.append(full)
    return np.array(matrices)
