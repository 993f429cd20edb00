"""Size from a target: the smallest sub-architecture that keeps a given fidelity.

One run of falling budget passes through the sizes of :data:`PATH`. It learns from two thirds of the
images; each size is tested on the others, kept apart, from the largest down. The first size that is
not shown to keep the fidelity ends it (fixed-sequence testing: for any number of sizes the error
rate is that of one test), and the last one before is taken.

With E the mean squared difference of the task output and V its variance, over own and other images
in equal parts, the fidelity is 1 - E/V, and log(E/V) is nearly normal: its standard error follows
from the share of each image (the delta method). A size passes if the fidelity measured on *as many
fresh images* will be as high as asked for, with the confidence asked for: the bound includes the
chance in the fresh images as well as in those kept apart.

Source: Marcus, Peritz and Gabriel, "On closed testing procedures with special reference to ordered
analysis of variance", Biometrika 1976, for tests in a fixed sequence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from nad_attr.data.labels import Task, other_images, own_images, patterns
from nad_attr.data.sources import Source
from nad_attr.gates.channels import budget, split_sites
from nad_attr.gates.history import History
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.engine import Chunk, CleanOutputs, Network
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import seed_of

__all__ = ["PATH", "Kept", "bound", "reached", "split", "target_sizes"]

#: Sizes that are tried, from the largest down.
PATH = (1.0, 0.85, 0.7, 0.6, 0.5, 0.42, 0.35, 0.28, 0.22, 0.17, 0.13, 0.1, 0.07, 0.05)
#: Share of each class's images that is kept apart.
APART = 1 / 3
#: Images kept apart of a task, own or other: the largest number used, and the smallest needed.
MAX_APART, LEAST = 300, 5


def target_sizes(sites: Sequence[GateSite]) -> list[float]:
    """The sizes of the path that differ in the number of channels, from the largest down."""
    counts = [budget(size, sites) for size in PATH]
    return [size for i, size in enumerate(PATH) if counts[i] not in counts[:i]]


def split(labels: Tensor, tasks: Sequence[Task], seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of the images to learn from, and of a share of each class that is kept apart.

    Raises:
        ValueError: If a task has too few images for that.
    """
    kinds, place = patterns(labels)
    generator = torch.Generator().manual_seed(seed_of(seed, "kept apart"))
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    apart = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    for kind in range(len(kinds)):
        of_kind = order[place[order] == kind]
        apart[of_kind[: round(APART * len(of_kind))]] = True
    pairs = zip(own_images(labels, tasks), other_images(labels, tasks), strict=True)
    for task, (members, others) in zip(tasks, pairs, strict=True):
        for flags, what in ((members, "images"), (others, "images of other classes")):
            n = int((flags & apart).sum())
            if n < LEAST:
                raise ValueError(
                    f"recipe: fidelity needs {LEAST} {what} kept apart for task {task}, and a "
                    f"third of the data holds {n}; give more images, or ask for a size."
                )
    return (~apart).nonzero()[:, 0], apart.nonzero()[:, 0]


class Kept(NamedTuple):
    """The fidelity at a size on images kept apart, and its lower bound on fresh ones."""

    fidelity: float
    bound: float


def bound(whole: Tensor, gated: Tensor, own: Tensor, confidence: float) -> Kept:
    """The fidelity on these images, and a lower bound of it on as many fresh ones.

    Args:
        whole: float64 (N,), the whole network's task output.
        gated: float64 (N,), the sub-architecture's.
        own: bool (N,).
        confidence: Of the bound.

    Example:
        >>> own = torch.arange(40) < 20
        >>> whole = torch.where(own, 2.0, -2.0) + torch.linspace(-1, 1, 40)
        >>> kept = bound(whole.double(), 0.9 * whole.double(), own, 0.95)
        >>> round(kept.fidelity, 3), 0.98 < kept.bound <= 0.99
        (0.99, True)
    """
    groups = [flags.nonzero()[:, 0] for flags in (own, ~own)]
    mean = sum(whole[at].mean() for at in groups) / 2
    error, spread = (whole - gated).square(), (whole - mean).square()
    e, v = (float(sum(values[at].mean() for at in groups) / 2) for values in (error, spread))
    if v <= 0:
        return Kept(math.nan, -math.inf)
    if e <= 0:
        return Kept(1.0, 1.0)
    adds = error / e - spread / v
    variance = sum(float(adds[at].var()) / (4 * len(at)) for at in groups)
    quantile = float(stats.t.ppf(confidence, min(map(len, groups)) - 1))
    worst = math.log(e / v) + quantile * math.sqrt(2 * variance)
    return Kept(1 - e / v, 1 - math.exp(min(worst, 50.0)))


def reached(
    network: Network,
    found: Sequence[TaskGates],
    source: Source,
    apart: Tensor,
    recipe: Recipe,
    seed: int,
) -> TaskGates:
    """Each task's gates at the smallest size that is shown to keep the fidelity.

    Args:
        network: With the means of closed channels, if there are any.
        found: Gates at falling sizes, first those of all channels.
        source: All images.
        apart: int64, the numbers of those kept apart.
        recipe: With the fidelity.
        seed: Of the run.

    Returns:
        The gates. The last step of their history has for each task the fidelity on the images kept
        apart ("fidelity_apart"), and its bound ("bound_apart").
    """
    assert recipe.fidelity is not None
    clean = CleanOutputs(network, source)
    rows, kept = [], []
    for t, task in enumerate(found[0].tasks):
        chunk = Chunk(network, source, [task], seed, clean=clean)
        labels = source.labels[apart]
        generator = torch.Generator().manual_seed(seed_of(seed, "judged apart", task))
        chosen = []
        for kind in (own_images, other_images):
            numbers = apart[kind(labels, [task])[0]]
            order = torch.randperm(len(numbers), generator=generator, device="cpu")
            chosen.append(numbers[order[:MAX_APART]])
        numbers = torch.cat(chosen)
        is_own = torch.arange(len(numbers), device="cpu") < len(chosen[0])
        draws = [(i, seed_of(seed, "apart", i)) for i in numbers.tolist()]
        (batch,) = chunk.batches([[draws]])
        whole = chunk.own_output(chunk.clean(batch), batch.rows).double().cpu()
        last, at = Kept(1.0, 1.0), 0
        for i, gates in enumerate(found[1:], 1):
            gated = _gated(network, gates, t, batch.inputs)
            output = chunk.own_output(gated, batch.rows).double().cpu()
            now = bound(whole, output, is_own, recipe.confidence)
            if not now.bound >= recipe.fidelity:
                break
            last, at = now, i
        rows.append(at)
        kept.append(last)
    return _joined(found, rows, recipe, kept)


@torch.no_grad()
def _gated(network: Network, gates: TaskGates, row: int, inputs: tuple[Tensor, ...]) -> Tensor:
    def of_row(values: Mapping[str, Tensor]) -> Tensor:
        parts = [values[site.name][row] for site in gates.sites]
        return torch.cat(parts).to(network.device, network.dtype)

    mask = (of_row({name: gates[name] for name in gates}) > 0.5).to(network.dtype)
    constants = None if gates.constants is None else of_row(gates.constants)
    outputs = []
    for part in network._passes(len(inputs[0])):
        n = len(part)
        images = tuple(item[part.start : part.stop] for item in inputs)
        closed = None if constants is None else constants.expand(n, -1)
        outputs.append(network.gated(images, mask.expand(n, -1), closed))
    return torch.cat(outputs)


def _joined(
    found: Sequence[TaskGates], rows: Sequence[int], recipe: Recipe, kept: Sequence[Kept]
) -> TaskGates:
    """One set of task gates, those of each task at its own size."""
    first, last = found[0], found[-1]

    def joined(values: Sequence[Mapping[str, Tensor] | None]) -> dict[str, Tensor] | None:
        if values[0] is None:
            return None
        flat = [torch.cat([v[s.name] for s in first.sites], dim=1) for v in values if v]
        return split_sites(torch.stack([flat[i][t] for t, i in enumerate(rows)]), first.sites)

    gates = joined([{name: one[name] for name in one} for one in found])
    assert gates is not None
    assert last.history is not None
    curves = dict(last.history)
    for name in Kept._fields:  # known only at the end
        curve = np.full_like(next(iter(curves.values())), np.nan)
        curve[-1] = [getattr(one, name) for one in kept]
        curves[f"{name}_apart"] = curve
    return TaskGates(
        gates,
        first.sites,
        first.tasks,
        logits=joined([one.logits for one in found]),
        means=first.means,
        constants=joined([one.constants for one in found]),
        recipe=recipe,
        history=History(curves),
        task_names=first.task_names,
        info=first.info,
    )
