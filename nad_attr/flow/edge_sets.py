"""Sub-architectures of edges: the strongest alone, and what cutting single edges really does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr.data.sources import Data, as_source
from nad_attr.evaluation.measures import balanced_weights, r_squared, spearman
from nad_attr.flow.cutting import IMAGES, Machine
from nad_attr.flow.result import OUTPUT, InformationFlow, TaskFlow
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.outputs import task_outputs
from nad_attr.stats.tables import pandas
from nad_attr.system.rng import seed_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["RANKINGS", "EdgeSet", "agreement", "edge_drops", "edge_fidelity", "kept_edges"]

#: What edges can be ranked by: mean of the flow's absolute value over images, absolute mean flow,
#: derivative alone, chance.
RANKINGS = ("strength", "flow", "gradient", "random")

Edge = tuple[str, int, str, int]


@dataclass(frozen=True)
class EdgeSet:
    """The edges between sites, cut in two.

    Attributes:
        kept: Those that stay.
        cut: The others.
    """

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
            scores = torch.rand(shape, generator=generator, dtype=torch.float64)
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


def _machine(
    found: InformationFlow, flow: TaskFlow, runner: Runner, inputs: tuple[Tensor, ...]
) -> tuple[Machine, Any]:
    machine = Machine(runner.model, flow.architecture, found.sites, found.links)
    machine.n_images = len(inputs[0])

    def call(copies: int) -> Tensor:
        # Not by the runner: from a site on there may be more copies than images.
        outputs: Tensor = runner.model(*(x.repeat(copies, *[1] * (x.ndim - 1)) for x in inputs))
        return outputs

    return machine, call


@torch.no_grad()
def edge_drops(
    found: InformationFlow,
    model: nn.Module,
    images: Tensor | tuple[Tensor, ...],
    edges: Sequence[Edge],
    task: object = None,
    *,
    batch_size: int = 16,
    device: torch.device | str | None = None,
) -> Tensor:
    """How far the task output falls when each edge is cut by itself.

    Args:
        found: The flow whose edges they are.
        model: Its network; unchanged afterwards.
        images: All of them.
        edges: ``(source site, source, target site, target)``.
        task: Whose; may be left out if there is one.
        batch_size: Images in one pass.
        device: Where to run. None: where the network is.

    Returns:
        float64 (edges,), means over images.
    """
    flow = found._one(task)
    runner = Runner(model, device=device)
    images = images if isinstance(images, tuple) else (images,)
    hops: dict[tuple[str, str], list[int]] = {}
    for number, (site, _, after, _) in enumerate(edges):
        hops.setdefault((site, after), []).append(number)
    drops = torch.zeros(len(edges), dtype=torch.float64)
    for part in chunks(len(images[0]), batch_size):
        inputs = runner.to_device(tuple(x[part.start : part.stop] for x in images))
        machine, call = _machine(found, flow, runner, inputs)
        with machine.hooked():
            base = machine.run(call, OUTPUT)
            whole = task_outputs(base, [flow.task])[:, 0]
            for (site, after), numbers in hops.items():
                outputs = _cut_one_by_one(machine, call, site, after, [edges[i] for i in numbers])
                fallen = whole.sum() - task_outputs(outputs, [flow.task])[:, 0].reshape(
                    len(numbers), -1
                ).sum(1)
                drops[numbers] += fallen.double().cpu() / len(images[0])
    return drops


def _cut_one_by_one(
    machine: Machine, call: Any, site: str, after: str, edges: Sequence[Edge]
) -> Tensor:
    """The outputs with each edge cut: (edges * B, K)."""
    sources = sorted({edge[1] for edge in edges})
    closed = [{site: [source]} for source in sources]
    if after == OUTPUT:
        base = machine.run(call, OUTPUT)
        made = {
            sources[n]: row
            for numbers, rows in machine.without(call, OUTPUT, closed, {})
            for n, row in zip(numbers, rows, strict=True)
        }
        return torch.cat([made[edge[1]] for edge in edges])
    base = machine.run(call, after)
    axis = machine.by_name[after].channel_dim % base.ndim
    rows: dict[int, list[int]] = {}
    for row, edge in enumerate(edges):
        rows.setdefault(edge[1], []).append(row)
    found: dict[int, Tensor] = {}
    for numbers, tensors in machine.without(call, after, closed, {}):
        for number, without in zip(numbers, tensors, strict=True):
            own = rows[sources[number]]
            for part in chunks(len(own), max(1, IMAGES // len(base))):
                x = base.repeat(len(part), *[1] * (base.ndim - 1)).unflatten(0, (len(part), -1))
                for place, i in enumerate(part):
                    channel = edges[own[i]][3]
                    x[place].select(axis, channel).copy_(without.select(axis, channel))
                outputs = machine.run(
                    call, OUTPUT, copies=len(part), placed=(after, x.flatten(0, 1))
                ).unflatten(0, (len(part), -1))
                found.update({own[i]: outputs[place] for place, i in enumerate(part)})
    return torch.cat([found[row] for row in range(len(edges))])


def agreement(
    found: InformationFlow,
    model: nn.Module,
    images: Tensor | tuple[Tensor, ...],
    task: object = None,
    *,
    n_edges: int = 100,
    seed: int = 0,
    batch_size: int = 16,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """Does cutting an edge do what its flow says?

    Some edges of each link are drawn at random and cut, one at a time.

    Args:
        found: The flow.
        model: Its network; unchanged afterwards.
        images: Those that the flow was measured on, or others.
        task: Whose; may be left out if there is one.
        n_edges: Edges of each link, at most.
        seed: Of the draw.
        batch_size: Images in one pass.
        device: Where to run. None: where the network is.

    Returns:
        A pandas frame: ``source_site, target_site, n_edges, spearman, pearson, slope`` (of the
        fall by the flow), a row for each link.
    """
    flow = found._one(task)
    rows = []
    for link in flow.links:
        told = [(i, j) for i in range(len(link.sources)) for j in range(len(link.targets))]
        generator = torch.Generator().manual_seed(
            seed_of(seed, "agreement", link.source_site, link.target_site)
        )
        order = torch.randperm(len(told), generator=generator)[:n_edges].tolist()
        chosen = [told[k] for k in order]
        edges = [
            (link.source_site, int(link.sources[i]), link.target_site, int(link.targets[j]))
            for i, j in chosen
        ]
        if not edges:
            continue
        flows = torch.stack([link.flow[i, j] for i, j in chosen])
        falls = edge_drops(
            found, model, images, edges, flow.task, batch_size=batch_size, device=device
        )
        a, b = flows - flows.mean(), falls - falls.mean()
        rows.append(
            {
                "source_site": link.source_site,
                "target_site": link.target_site,
                "n_edges": len(edges),
                "spearman": float(spearman(flows, falls)),
                "pearson": float((a * b).sum() / (a.norm() * b.norm())),
                "slope": float((flows * falls).sum() / flows.square().sum()),
            }
        )
    return pandas("agreement").DataFrame(rows)


@torch.no_grad()
def edge_fidelity(
    found: InformationFlow,
    model: nn.Module,
    images: Data,
    task: object = None,
    *,
    sizes: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    by: Sequence[str] = RANKINGS,
    n_random: int = 3,
    n_images: int = 64,
    seed: int = 0,
    batch_size: int = 32,
    device: torch.device | str | None = None,
) -> pd.DataFrame:
    """How faithful sub-architectures of edges are, at equal numbers of edges.

    The task output with all other edges cut is compared with that of the sub-architecture that
    the edges are taken from, on own and other images in equal parts.

    Args:
        found: The flow, measured with ``receivers=None``.
        model: Its network; unchanged afterwards.
        images: Images with labels, best those that the flow was not measured on.
        task: Whose; may be left out if there is one.
        sizes: Shares of the edges between sites that stay.
        by: What edges are ranked by.
        n_random: Draws of random edges.
        n_images: Images, half of them own, at most.
        seed: Of all random numbers.
        batch_size: Images in one pass.
        device: Where to run. None: where the network is.

    Returns:
        A pandas frame: ``by, draw, size, n_edges, fidelity, rank_fidelity`` (R² and Spearman).

    Raises:
        ValueError: If there are no own or no other images, or edges are not known one by one.
    """
    flow = found._one(task)
    runner = Runner(model, device=device)
    source = as_source(images)
    members = torch.tensor([flow.task] if isinstance(flow.task, int) else list(flow.task))
    own = torch.isin(source.labels, members)
    half = max(1, n_images // 2)
    chosen = []
    for mask in (own, ~own):
        numbers = mask.nonzero().flatten()
        if not len(numbers):
            raise ValueError(f"fidelity needs images of task {flow.task} and others.")
        generator = torch.Generator().manual_seed(seed_of(seed, "edges", "images", len(numbers)))
        chosen += numbers[torch.randperm(len(numbers), generator=generator)[:half]].tolist()
    weights = balanced_weights(own[chosen])
    batches = list(
        runner.draw(source, [[chosen[i] for i in part] for part in chunks(len(chosen), batch_size)])
    )

    def answers() -> Tensor:
        return torch.cat([task_outputs(runner(x), [flow.task])[:, 0].double() for x in batches])

    with flow.architecture.applied(runner.model):
        base = answers().cpu()
    rows = []
    for name in by:
        for draw in range(n_random if name == "random" else 1):
            for size in sizes:
                edges = kept_edges(flow, float(size), by=name, seed=seed_of(seed, draw))
                with found.cut(runner.model, edges.cut, flow.task):
                    alone = answers().cpu()
                rows.append(
                    {
                        "by": name,
                        "draw": draw,
                        "size": size,
                        "n_edges": len(edges.kept),
                        "fidelity": float(r_squared(base, alone, weights=weights)),
                        "rank_fidelity": float(spearman(base, alone, weights=weights)),
                    }
                )
    return pandas("edge_fidelity").DataFrame(rows)
