"""Sub-architectures of edges: the strongest alone, and the effect of cutting single edges."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nad_attr.data.labels import other_images, own_images
from nad_attr.data.sources import Data, Inputs, Source, as_source
from nad_attr.evaluation.measures import balanced_weights, r_squared, spearman
from nad_attr.flow.cutting import IMAGES, Machine, cut_edges, recentred
from nad_attr.flow.links import OUTPUT, RANKINGS, REST, Edge, TaskFlow, kept_edges
from nad_attr.flow.measuring import images_of_tasks
from nad_attr.flow.result import InformationFlow
from nad_attr.gates.channels import channels_of
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunOptions
from nad_attr.running.outputs import task_outputs
from nad_attr.stats.tables import pandas
from nad_attr.system.rng import permutation, seed_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["agreement", "edge_drops", "edge_fidelity"]

#: Images of a batch, whose copies go through the blocks side by side.
_BATCH = 32


def _machine(
    found: InformationFlow, flow: TaskFlow, runner: Runner, inputs: Inputs, width: int
) -> tuple[Machine, Any]:
    machine = Machine(runner.model, flow.architecture, found.sites, found.links, width)
    machine.n_images = len(inputs[0])

    def call(copies: int) -> Tensor:
        # From a site on there may be more copies than images, which the runner refuses.
        outputs: Tensor = runner.run(tuple(x.repeat(copies, *[1] * (x.ndim - 1)) for x in inputs))
        outputs = outputs[:, None] if outputs.ndim == 1 else outputs
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    return machine, call


def edge_drops(
    model: nn.Module,
    found: InformationFlow,
    edges: Sequence[Edge],
    images: Data | Tensor | tuple[Tensor, ...],
    task: object = None,
    *,
    share: float | tuple[float, float] = 1.0,
    run: RunOptions | None = None,
) -> Tensor:
    """How far the task output falls when each edge is cut by itself.

    With a small ``share`` this is the flow. Where cutting does something else, ``share`` tells
    whether the block is curved, or the network behind it.

    Args:
        model: The network; unchanged afterwards.
        found: Its flow, whose edges they are.
        edges: ``(source site, source, target site, target)``.
        images: A tensor, or a tuple of input tensors: all of these images. Images with labels: the
            task's own.
        task: Whose; may be left out if there is one.
        share: The share of the source that is taken away, in (0, 1], and the share of the
            receiver's loss that is passed on; one number is for the source alone. Falls are divided
            by both. (1, 0.01): the real block, with the rest of the network made linear; 0.01: all
            of the network made linear.
        run: How to run the network; see :class:`nad_attr.RunOptions`. ``batch_size`` counts the
            copies of the images in which different edges are cut; None: 256.

    Returns:
        float64 (edges,), means over images.

    Raises:
        KeyError: If there is no such task.
        ValueError: If there is no such edge, or no image, or ``share`` is out of range.
    """
    flow = found._one(task)
    shares = share if isinstance(share, tuple) else (share, 1.0)
    if len(shares) != 2 or not all(0 < value <= 1 for value in shares):
        raise ValueError(f"share must be a number in (0, 1], or two of them, got {share!r}.")
    runner = Runner(model, run, batch_size=IMAGES)
    source, (numbers,) = images_of_tasks(runner, images, [flow.task])
    return _drops(found, flow, runner, source, numbers, edges, shares)


@torch.no_grad()
def _drops(
    found: InformationFlow,
    flow: TaskFlow,
    runner: Runner,
    source: Source,
    images: Sequence[int],
    edges: Sequence[Edge],
    shares: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    found.pairs(edges, flow)  # refuses what is not an edge
    if any(target == REST for *_, target in edges):
        raise ValueError(
            "an edge to all receivers that were not told apart (-1) is not one edge; name a "
            "receiving channel, or measure with receivers=None."
        )
    hops: dict[tuple[str, str], list[int]] = {}
    for number, (site, _, after, _) in enumerate(edges):
        hops.setdefault((site, after), []).append(number)
    drops = torch.zeros(len(edges), dtype=torch.float64, device="cpu")
    width = runner.images_per_pass(source, most=IMAGES)
    batches = [[images[i] for i in part] for part in chunks(len(images), min(width, _BATCH))]
    for inputs in runner.draw(source, batches, "cutting edges"):
        machine, call = _machine(found, flow, runner, inputs, width)
        machine.share = shares[0]
        with machine.hooked():
            base = machine.run(lambda _, x=inputs: runner(x), OUTPUT)  # type: ignore[misc]
            whole = task_outputs(base, [flow.task])[:, 0].cpu().double()
            for (site, after), numbers in hops.items():
                own = [edges[i] for i in numbers]
                received = 1.0 if after == OUTPUT else shares[1]
                outputs = _cut_one_by_one(machine, call, site, after, own, received)
                alone = task_outputs(outputs, [flow.task])[:, 0].cpu().double()
                fallen = whole.sum() - alone.reshape(len(numbers), -1).sum(1)
                drops[numbers] += fallen / (len(images) * shares[0] * received)
    return drops


def _cut_one_by_one(
    machine: Machine, call: Any, site: str, after: str, edges: Sequence[Edge], received: float
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
    target = machine.by_name[after]
    axis = target.channel_dim % base.ndim
    rows: dict[int, list[int]] = {}
    for row, edge in enumerate(edges):
        rows.setdefault(edge[1], []).append(row)
    found: dict[int, Tensor] = {}
    for numbers, tensors in machine.without(call, after, closed, {}):
        for number, without in zip(numbers, tensors, strict=True):
            own = rows[sources[number]]
            for part in chunks(len(own), max(1, machine.width // len(base))):
                x = base.repeat(len(part), *[1] * (base.ndim - 1)).unflatten(0, (len(part), -1))
                for place, i in enumerate(part):
                    for channel in channels_of(target, [edges[own[i]][3]]):
                        x[place].select(axis, channel).lerp_(
                            without.select(axis, channel), received
                        )
                outputs = machine.run(
                    call, OUTPUT, copies=len(part), placed=(after, x.flatten(0, 1))
                ).unflatten(0, (len(part), -1))
                found.update({own[i]: outputs[place] for place, i in enumerate(part)})
    return torch.cat([found[row] for row in range(len(edges))])


def agreement(
    model: nn.Module,
    found: InformationFlow,
    images: Data | Tensor | tuple[Tensor, ...],
    task: object = None,
    *,
    n_edges: int = 100,
    seed: int = 0,
    run: RunOptions | None = None,
) -> pd.DataFrame:
    """Does cutting an edge do what its flow says?

    Some edges of each link are drawn at random and cut, one at a time.

    Args:
        model: The network; unchanged afterwards.
        found: Its flow.
        images: Those that the flow was measured on, or others; see :func:`edge_drops`.
        task: Whose; may be left out if there is one.
        n_edges: Edges of each link, at most.
        seed: Of the draw.
        run: How to run the network; see :func:`edge_drops`.

    Returns:
        A pandas frame: ``source_site, target_site, n_edges, spearman, pearson, slope`` (of the
        fall by the flow), a row for each link.
    """
    flow = found._one(task)
    runner = Runner(model, run, batch_size=IMAGES)
    source, (numbers,) = images_of_tasks(runner, images, [flow.task])
    rows = []
    for link in flow.links:
        told = [(i, j) for i in range(len(link.sources)) for j in range(len(link.targets))]
        order = permutation(len(told), seed, "agreement", link.source_site, link.target_site)
        chosen = [told[k] for k in order[:n_edges].tolist()]
        edges = [
            (link.source_site, int(link.sources[i]), link.target_site, int(link.targets[j]))
            for i, j in chosen
        ]
        if not edges:
            continue
        flows = torch.stack([link.flow[i, j] for i, j in chosen])
        falls = _drops(found, flow, runner, source, numbers, edges)
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
    model: nn.Module,
    found: InformationFlow,
    images: Data,
    task: object = None,
    *,
    sizes: Sequence[float] = (0.05, 0.1, 0.2, 0.4),
    by: Sequence[str] = RANKINGS,
    n_random: int = 3,
    n_images: int = 64,
    fit_images: Tensor | tuple[Tensor, ...] | None = None,
    seed: int = 0,
    run: RunOptions | None = None,
) -> pd.DataFrame:
    """How faithful sub-architectures of edges are, at equal numbers of edges.

    The task output with all other edges cut is compared with that of the sub-architecture that
    the edges are taken from, on own and other images in equal parts.

    Args:
        model: The network; unchanged afterwards.
        found: Its flow, measured with ``receivers=None``.
        images: Images with labels, best those that the flow was not measured on.
        task: Whose; may be left out if there is one.
        sizes: Shares of the edges between sites that stay.
        by: What edges are ranked by.
        n_random: Draws of random edges.
        n_images: Images, half of them own, at most.
        fit_images: Those to fit constants of receivers on, as in :meth:`InformationFlow.cut`; not
            those that are judged by. None: no constants.
        seed: Of all random numbers.
        run: How to run the network; see :func:`edge_drops`.

    Returns:
        A pandas frame: ``by, draw, size, n_edges, fidelity, rank_fidelity`` (R² and Spearman).

    Raises:
        ValueError: If there are no own or no other images, or edges are not known one by one.
    """
    flow = found._one(task)
    runner = Runner(model, run, batch_size=IMAGES)
    source = as_source(images, any_labels=True)
    runner.fit(source)
    own, other = (which(source.labels, [flow.task])[0] for which in (own_images, other_images))
    chosen = []
    for mask in (own, other):
        numbers = mask.nonzero().flatten()
        if not len(numbers):
            raise ValueError(f"fidelity needs images of task {flow.task} and others.")
        order = permutation(len(numbers), seed, "edges", "images", len(numbers))
        chosen += numbers[order[: max(1, n_images // 2)]].tolist()
    weights = balanced_weights(own[chosen])
    width = runner.images_per_pass(source, most=IMAGES)
    parts = [[chosen[i] for i in part] for part in chunks(len(chosen), min(width, _BATCH))]

    def answers() -> Tensor:
        drawn = runner.draw(source, parts, "fidelity of edges")
        outputs = [task_outputs(runner(x), [flow.task])[:, 0].cpu().double() for x in drawn]
        return torch.cat(outputs)

    with flow.architecture.applied(runner.model):
        base = answers()
    rows = []
    for name in by:
        for draw in range(n_random if name == "random" else 1):
            for size in sizes:
                edges = kept_edges(flow, float(size), by=name, seed=seed_of(seed, draw))
                cut = found.pairs(edges.cut, flow)
                offsets = None
                if fit_images is not None:
                    fit = (fit_images,) if isinstance(fit_images, Tensor) else fit_images
                    machine, call = _machine(found, flow, runner, fit, width)
                    offsets = recentred(machine, call, cut, len(fit[0]))
                with cut_edges(
                    runner.model, flow.architecture, found.sites, found.links, cut, width, offsets
                ):
                    alone = answers()
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
