"""The flow of one task: its links from site to site, their sums, and their strongest edges."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nad_attr.data.labels import Task
from nad_attr.gates.channels import open_gates
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.system.rng import seed_of

__all__ = ["OUTPUT", "RANKINGS", "REST", "Edge", "EdgeSet", "Link", "TaskFlow", "kept_edges"]

#: The name of the task output as a site, and the number of "all other channels together".
OUTPUT, REST = "output", -1
#: What edges can be ranked by: mean of the flow's absolute value over images, absolute mean flow,
#: derivative alone, chance.
RANKINGS = ("strength", "flow", "gradient", "random")

Edge = tuple[str, int, str, int]


@dataclass(frozen=True, eq=False)
class Link:
    """The flow from the kept channels of one site to those of a site that reads it.

    Where channels are in groups (attention heads), a channel here is a group.

    Attributes:
        source_site: Where it comes from.
        target_site: Where it goes, ``"output"`` for the task output.
        sources: int64 (S,), kept channels of the first.
        targets: int64 (R,), the receiving channels that are told apart; 0 for the output.
        n_rest: How many more kept channels receive, all in the last column.
        flow: float64 (S, R + 1), means over images.
        strength: float64 (S, R + 1), means over images of the flow's absolute value.
        straight: float64 (S, R + 1), the part that no operator mixed; NaN where that is unknown.
        gradient: float64 (S, R + 1), means over images of the absolute derivative alone, summed
            over positions: the flow without the size of the activations.
    """

    source_site: str
    target_site: str
    sources: Tensor
    targets: Tensor
    n_rest: int
    flow: Tensor
    strength: Tensor
    straight: Tensor
    gradient: Tensor

    @property
    def numbers(self) -> list[int]:
        """The receiving channels, column by column."""
        return [*self.targets.tolist(), *([REST] if self.n_rest else [])]


@dataclass(frozen=True, eq=False)
class TaskFlow:
    """The flow of one task.

    Attributes:
        task: The class, or group of classes.
        name: What it is called.
        architecture: The sub-architecture that the images ran through.
        links: In forward order.
        effects: ``{site name: float64 (C,)}``, first-order effect of each channel (or group of
            them) on the task output, found by a plain backward pass of the whole network.
        n_images: How many images the means are over.
    """

    task: Task
    name: str
    architecture: SubArchitecture
    links: tuple[Link, ...]
    effects: dict[str, Tensor]
    n_images: int

    def open(self, site: str) -> Tensor:
        """Bool (C,): whether the sub-architecture keeps each channel (or group) of a site."""
        found = next(s for s in self.architecture.sites if s.name == site)
        return open_gates(found, self.architecture[site])

    def kept(self, site: str) -> list[int]:
        """Those that it keeps."""
        kept: list[int] = self.open(site).nonzero().flatten().tolist()
        return kept

    def outflow(self, site: str) -> Tensor:
        """float64 (C,): all that leaves each channel of a site."""
        total = torch.zeros_like(self.effects[site])
        for link in self.links:
            if link.source_site == site:
                total[link.sources] += link.flow.sum(1)
        return total

    def inflow(self, site: str) -> tuple[Tensor, float]:
        """float64 (C,): the sum that arrives at each channel, NaN in the rest; its sum."""
        into = [link for link in self.links if link.target_site == site]
        total = torch.full_like(self.effects[site], torch.nan)
        if not into:
            return torch.zeros_like(total), 0.0
        total[into[0].targets] = sum(link.flow[:, :-1].sum(0) for link in into)
        return total, float(sum(link.flow[:, -1].sum() for link in into))


@dataclass(frozen=True, eq=False)
class EdgeSet:
    """The edges between sites: those that stay, and those that are cut."""

    kept: list[Edge]
    cut: list[Edge]


def _scored(flow: TaskFlow, by: str, seed: int) -> list[tuple[Edge, float]]:
    if by not in RANKINGS:
        raise ValueError(f"by must be one of {', '.join(RANKINGS)}, got {by!r}.")
    found: list[tuple[Edge, float]] = []
    for link in flow.links:
        if link.target_site == OUTPUT:
            continue
        if link.n_rest:
            raise ValueError(
                f"{link.n_rest} receiving channels of {link.target_site!r} were not told apart, so "
                "their edges are not known one by one; measure with receivers=None."
            )
        if by == "random":
            generator = torch.Generator().manual_seed(
                seed_of(seed, "edges", link.source_site, link.target_site)
            )
            shape = (len(link.sources), len(link.targets))
            scores = torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        else:
            scores = getattr(link, by)[:, :-1].abs()
        for i, row in zip(link.sources.tolist(), scores.tolist(), strict=True):
            for j, score in zip(link.targets.tolist(), row, strict=True):
                found.append(((link.source_site, i, link.target_site, j), score))
    return found


def kept_edges(flow: TaskFlow, n: int | float, *, by: str = "strength", seed: int = 0) -> EdgeSet:
    """The strongest edges between the sites of a task's sub-architecture, and the others.

    Edges to the output are not counted; they all stay.

    Args:
        flow: Measured with ``receivers=None``.
        n: How many edges stay, or their share in (0, 1).
        by: "strength", "flow", "gradient" or "random".
        seed: Of "random".

    Raises:
        ValueError: If there are not so many edges, or some are not known one by one.
    """
    scored = _scored(flow, by, seed)
    share = isinstance(n, float) and 0 < n < 1
    if not share and (isinstance(n, bool) or n != int(n) or not 0 <= n <= len(scored)):
        raise ValueError(f"n must be a share in (0, 1) or from 0 to {len(scored):,}, got {n!r}.")
    k = round(n * len(scored)) if share else int(n)
    order = np.argsort([-score for _, score in scored], kind="stable")
    return EdgeSet([scored[i][0] for i in order[:k]], [scored[i][0] for i in order[k:]])
