"""Measure the information flow between the channels of a network's sites."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.labels import ReadLabels, Task, as_task, own_images
from nad_attr.data.sources import Data, Inputs, Source, TensorSource, as_source
from nad_attr.flow.blocks import Blocks, Gating, cut_forward, gate_sums, products, whole_gradients
from nad_attr.flow.links import OUTPUT, Link, TaskFlow
from nad_attr.flow.result import InformationFlow
from nad_attr.flow.straight import UNKNOWN, straight_flow
from nad_attr.gates.channels import channels_of, gate_of_channel, open_gates
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import frozen
from nad_attr.running.forward import Runner, check_classes, chunks
from nad_attr.running.options import RunOptions
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.finding import site_links
from nad_attr.sites.site import GateSite

__all__ = ["images_of_tasks", "information_flow"]

#: Largest share of the largest effect by which outflow may miss it before a warning.
_TOLERANCE, _HALF_TOLERANCE = 1e-3, 0.1


def information_flow(
    model: nn.Module,
    architecture: SubArchitecture | TaskGates | Sequence[SubArchitecture],
    images: Data | Tensor | tuple[Tensor, ...],
    *,
    tasks: Any = None,
    receivers: int | None = 64,
    n_images: int | None = None,
    run: RunOptions | None = None,
) -> InformationFlow:
    r"""Measure what flows from each channel of a site to each channel of the next.

    Sites are cuts: every path of the data passes each. With x the tensor of a site, a its constants
    (the means of the sub-architecture, or zero), g the gradient of the task output at the next site
    and J the derivative of the next site by this one, the flow from channel i to channel j of the
    next site is ``F_ij = mean over images of sum over positions of g_j J_ji (x_i - a_i)``: the
    first-order effect of i on the task output, as far as it passes j. So what flows out of a
    channel is its effect, exactly: ``sum_j F_ij = mean of sum of g_i (x_i - a_i)``. What flows into
    a channel is its effect minus its *source*: the part of constants, biases and curvature inside
    the block (0 in a ReLU network without biases whose closed channels are zero).

    The images run through the *sub-architecture*, with its channels closed; for the whole network
    give ``SubArchitecture.full(sites)``. Where cells read two predecessors (as in DARTS), edges
    lead from both. ``straight`` is the part of a flow that takes a shortcut, through identities,
    activations, normalisations and pooling alone (the network runs with the gradient cut behind
    each operator that mixes channels). A shortcut with a convolution of its own is not straight.
    ``straight`` is NaN where a channel's way is unknown (a normalisation over channels on the
    shortcut).

    R receivers cost R + 3 backward passes of the whole network, R + 1 of them in pieces (one
    vector-Jacobian product of one block for each receiver), whatever the number of sites.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architecture: A sub-architecture, two of them to compare, or task gates.
        images: A tensor (or tuple of input tensors): all of these images, for each task. Or
            images with labels, as learning takes them: the own images of each task. Beside a
            tensor, several labels or targets are marked as :class:`nad_attr.Labels`: a second
            tensor (N, K) counts as an input.
        tasks: The class or group of classes whose output is explained, one or two. None: what the
            sub-architectures were found for, or all tasks of task gates that hold one or two.
        receivers: At each site, the channels with the largest effect that are told apart as
            receivers; the others receive as one. None: every kept channel.
        n_images: Of images with labels, at most so many for each task.
        run: How to run the network; see :class:`nad_attr.RunOptions`. ``batch_size`` None: 8. With
            ``amp``, sums are float32 at least, and shortcuts are followed without it.

    Returns:
        The flow; ``edges`` and ``nodes`` are its tables.

    Raises:
        SiteError: If a site is not a cut; the message says which site to take.
        TypeError: If an argument is of another kind.
        ValueError: If it is not clear which task is meant, there is no image of it, the network has
            no output for it, or the network is in train mode or cannot be run.

    Warns:
        RuntimeWarning: If what flows out of a site's channels is not their effect: the network
            gave other values when it was run again.

    Source:
        The flow is this library's definition; its products are the gradient-times-input edges of
        Syed et al., "Attribution patching outperforms automated circuit discovery", 2023, taken
        between channels of cuts, where they add up.

    Example:
        >>> from nad_attr import SubArchitecture, find_gate_sites
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False),
        ...                     nn.ReLU(), nn.Linear(2, 2, bias=False)).eval()
        >>> for layer, weight in ((0, [[1, 0], [0, 1]]), (2, [[1, 2], [0, 1]]), (4, [[1, 1]] * 2)):
        ...     net[layer].weight.data = torch.tensor(weight).float()
        >>> image = torch.tensor([[1.0, 3.0]])
        >>> whole = SubArchitecture.full(find_gate_sites(net, image))
        >>> flow = information_flow(net, whole, image, tasks=0)
        >>> print(flow.edges.query("source_site == '1' and flow != 0").to_string(index=False))
        source_site  source target_site  target  flow  straight
                  1       1           3       0   6.0       0.0
                  1       1           3       1   3.0       0.0
                  1       0           3       0   1.0       0.0
    """
    for what, value in (("receivers", receivers), ("n_images", n_images)):
        if value is not None:
            check_count(value, what)
    runner = Runner(model, run, batch_size=8)
    chosen = _architectures(architecture, tasks)
    meant = [task for task, _, _ in chosen]
    source, rows = images_of_tasks(runner, images, meant, n_images)
    some = next(runner.draw(source, [rows[0][:1]]))
    links = site_links(
        runner.model,
        some,
        chosen[0][1].sites,
        additional_forward_args=runner.options.additional_forward_args,
        forward_func=None if runner.is_plain else runner.call,
    )
    with torch.no_grad():
        check_classes(source.labels, meant, runner(some).shape[1])
    by_name = {site.name: site for site in chosen[0][1].sites}
    sites = tuple(by_name[name] for name in links if name != OUTPUT)
    flows, cost = [], {"forward": 0, "backward": 0, "straight": 0}

    def probe(inputs: Inputs) -> None:
        task, arch, _ = chosen[0]
        one = _OneTask(runner, sites, links, arch, task, receivers, lambda _: None)
        one.measure(lambda: iter([inputs]), "", len(inputs[0]))

    with frozen(runner.model):
        width = runner.images_per_pass(some, probe)
        n_batches = sum(-(-len(own) // width) for own in rows)
        with runner.bar(n_batches * (len(sites) + 1), "information flow", "block") as bar:
            for (task, arch, name), own in zip(chosen, rows, strict=True):
                one = _OneTask(runner, sites, links, arch, task, receivers, bar.update)
                batches = [[own[i] for i in part] for part in chunks(len(own), width)]
                flows.append(one.measure(lambda b=batches: runner.draw(source, b), name, len(own)))  # type: ignore[misc]
                for kind, n in one.cost.items():
                    cost[kind] = max(cost[kind], n)
    conservation = {site.name: max(_missed(flow, site.name) for flow in flows) for site in sites}
    worst = max(conservation, key=lambda name: conservation[name])
    if not conservation[worst] <= (_TOLERANCE if runner.amp is None else _HALF_TOLERANCE):
        warnings.warn(
            f"what flows out of the channels of {worst!r} misses their effect by "
            f"{conservation[worst]:.2g} of the largest: the network gives other values each time "
            "it runs, or computes in low precision (amp=None and float64 are exact).",
            RuntimeWarning,
            stacklevel=2,
        )
    return InformationFlow(tuple(flows), sites, links, conservation, cost)


def _architectures(architecture: Any, tasks: Any) -> list[tuple[Task, SubArchitecture, str]]:
    """(task, sub-architecture, name) of the one or two tasks."""
    if isinstance(architecture, TaskGates):
        gates = architecture
        wanted = list(gates.tasks) if tasks is None else _several(tasks, gates.tasks)
        rows = [gates.index(task) for task in wanted]
        names = gates.task_names or tuple(map(str, gates.tasks))
        found = [(gates.tasks[r], gates.sub_architecture(gates.tasks[r]), names[r]) for r in rows]
    else:
        single = isinstance(architecture, SubArchitecture)
        archs = [architecture] if single else list(architecture)
        if not archs or not all(isinstance(arch, SubArchitecture) for arch in archs):
            raise TypeError(
                "architecture must be a SubArchitecture, two of them, or TaskGates, got "
                f"{type(architecture).__name__}."
            )
        if tasks is None:
            if any(arch.task is None for arch in archs):
                raise ValueError("this sub-architecture has no task; name a class with tasks=.")
            meant = [arch.task for arch in archs]
        else:
            meant = [as_task(task) for task in _several(tasks, ())]
        if len(archs) == 1:
            archs *= len(meant)
        if len(meant) != len(archs):
            raise ValueError(f"{len(archs)} sub-architectures came with {len(meant)} tasks.")
        found = [(task, arch, str(task)) for task, arch in zip(meant, archs, strict=True)]
    if not 1 <= len(found) <= 2:
        raise ValueError(
            f"the flow is of one task, or of two compared, not of {len(found)}; name them: tasks="
        )
    if any(arch.sites != found[0][1].sites for _, arch, _ in found):
        raise ValueError("the two sub-architectures have different gate sites.")
    return found


def _several(tasks: Any, known: Sequence[Task]) -> list[Any]:
    """One task, or a list of them; a tuple is a group of classes, as everywhere."""
    if isinstance(tasks, list):
        return tasks
    if (
        isinstance(tasks, tuple)
        and tasks not in known
        and any(isinstance(t, (str, tuple)) for t in tasks)
    ):
        return list(tasks)
    return [tasks]


def images_of_tasks(
    runner: Runner, images: Any, tasks: Sequence[Task], n_images: int | None = None
) -> tuple[Source, list[list[int]]]:
    """The source of the images, and the numbers of each task's images, at most ``n_images``.

    A ValueError if there is no image, or none of a task.
    """
    inputs: Inputs | None = None
    if isinstance(images, Tensor):
        inputs = (images,)
    elif isinstance(images, tuple) and images and all(isinstance(x, Tensor) for x in images):
        labels = images[-1]
        if len(images) == 1 or labels.ndim != 1 or labels.is_floating_point():
            inputs = images
    if inputs is not None:
        if any(x.ndim == 0 or len(x) == 0 for x in inputs):
            raise ValueError("there is not a single image; images have shape (N, ...).")
        none = torch.zeros(len(inputs[0]), dtype=torch.long, device="cpu")
        every = list(range(len(inputs[0])))[:n_images]
        return TensorSource(inputs, ReadLabels(none)), [every] * len(tasks)
    source = as_source(images, any_labels=True)
    runner.fit(source)
    rows = []
    for task, own in zip(tasks, own_images(source.labels, tasks), strict=True):
        rows.append(own.nonzero().flatten().tolist()[:n_images])
        if not rows[-1]:
            raise ValueError(f"there is no image of task {task} (labels say so).")
    return source, rows


def _missed(flow: TaskFlow, site: str) -> float:
    effect = flow.effects[site]
    missed = float((flow.outflow(site) - effect).abs().max())
    return missed / float(effect.abs().max()) if missed else 0.0


class _OneTask:
    """The flow of one task, summed over batches."""

    def __init__(
        self,
        runner: Runner,
        sites: Sequence[GateSite],
        links: dict[str, tuple[str, ...]],
        architecture: SubArchitecture,
        task: Task,
        receivers: int | None,
        advance: Callable[[int], object],
    ) -> None:
        self.runner, self.sites, self.links = runner, sites, links
        self.by_name = {site.name: site for site in sites}
        self.architecture, self.task = architecture, task
        self.gating = Gating(architecture, runner.device)
        self.receivers, self.advance = receivers, advance
        #: Kept channels, or groups of channels, of each site.
        self.kept = {s.name: open_gates(s, architecture[s.name]).nonzero().flatten() for s in sites}
        self.cost = {"forward": 2, "backward": 1, "straight": 0}

    def measure(
        self, batches: Callable[[], Iterator[Inputs]], name: str, n_images: int
    ) -> TaskFlow:
        effects = self._effects(batches(), n_images)
        targets = {s.name: self._receivers(effects[s.name], s.name) for s in self.sites}
        targets[OUTPUT] = torch.zeros(1, dtype=torch.long, device="cpu")
        self.sums = {
            (source, target): {
                what: torch.zeros(self.by_name[source].n_gates, len(targets[target]) + 1,
                                  dtype=torch.float64, device="cpu")
                for what in ("flow", "strength", "gradient")
            }
            for target, sources in self.links.items()
            for source in sources
        }  # fmt: skip
        self.straight = {key: torch.zeros_like(sums["flow"]) for key, sums in self.sums.items()}
        shortcuts = bool(targets)
        for inputs in batches():
            gradients = self._batch(inputs, targets)
            # The graph of the first batch says whether there are any.
            shortcuts = shortcuts and self._straight(inputs, gradients, targets)
        if shortcuts:
            self.cost["forward"], self.cost["straight"] = 3, 3
        links = tuple(
            self._link(source, target, targets[target], n_images)
            for target, sources in self.links.items()
            for source in sources
        )
        return TaskFlow(self.task, name, self.architecture, links, effects, n_images)

    def _effects(self, batches: Iterator[Inputs], n_images: int) -> dict[str, Tensor]:
        effects = {
            s.name: torch.zeros(s.n_gates, dtype=torch.float64, device="cpu") for s in self.sites
        }
        for inputs in batches:
            found = whole_gradients(self.runner, inputs, self.sites, self.gating, self.task)
            for site in self.sites:
                x, g = found[site.name]
                product = g * self.gating.above(site, x)
                sums = gate_sums(site, product, len(inputs[0]))
                effects[site.name] += sums.sum(0) / n_images
            self.advance(1)
        return effects

    def _receivers(self, effect: Tensor, name: str) -> Tensor:
        kept = self.kept[name]
        order = kept[effect[kept].abs().argsort(descending=True, stable=True)]
        return order[: self.receivers].sort().values

    def _batch(self, inputs: Inputs, targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """Add a batch's flow; returns the gradient at each site."""
        blocks = cut_forward(self.runner, inputs, self.sites, self.gating)
        assert blocks.outputs is not None
        above = {
            site.name: self.gating.above(site, blocks.leaves[site.name].detach())
            for site in self.sites
        }
        gradients: dict[str, Tensor] = {}
        y = task_outputs(blocks.outputs, [self.task]).sum()
        self._block(y, OUTPUT, None, blocks, above, gradients, targets)
        passes = [1]
        for site in reversed(self.sites):
            gradient = gradients.get(site.name)
            if gradient is None:  # the output does not depend on it
                gradient = gradients[site.name] = torch.zeros_like(above[site.name])
            if self.links[site.name]:
                n = self._block(
                    blocks.returned[site.name], site.name, gradient, blocks, above, gradients,
                    targets,
                )  # fmt: skip
                passes.append(n)
            del blocks.returned[site.name], above[site.name]  # this block's graph may go
            self.advance(1)
        # Blocks between cuts are passed one by one. A product around heads and neurons runs through
        # everything before them, the whole network at most.
        inner = any(site.units != "channels" for site in self.sites)
        n_passes = 1 + (sum(passes) if inner else max(passes))
        self.cost["backward"] = max(self.cost["backward"], n_passes)
        return gradients

    def _block(
        self,
        returned: Tensor,
        name: str,
        gradient: Tensor | None,
        blocks: Blocks,
        above: dict[str, Tensor],
        gradients: dict[str, Tensor],
        targets: dict[str, Tensor],
    ) -> int:
        """The products of one block: all receivers together, the rest, and each by itself."""
        leaves = {source: blocks.leaves[source] for source in self.links[name]}
        assert blocks.outputs is not None
        n_images = len(blocks.outputs)

        def add(columns: Sequence[int], got: dict[str, Tensor]) -> None:
            for source, product in got.items():
                site, sums = self.by_name[source], self.sums[source, name]
                per_image = gate_sums(site, product * above[source], n_images, 1)
                sums["flow"][:, columns] += per_image.sum(1).T
                sums["strength"][:, columns] += per_image.abs().sum(1).T
                slopes = gate_sums(site, product, n_images, 1)
                sums["gradient"][:, columns] += slopes.abs().sum(1).T

        def pass_on(got: dict[str, Tensor]) -> None:
            for source, product in got.items():
                known = gradients.get(source)
                gradients[source] = product[0] if known is None else known + product[0]

        if gradient is None:
            one = torch.ones_like(returned)[None]
            for columns, got in products(returned, leaves, lambda _: one):
                add(columns, got)
                pass_on(got)
            return 1
        for _, got in products(returned, leaves, lambda _: gradient[None]):
            pass_on(got)
        site, own = self.by_name[name], targets[name]
        axis = site.channel_dim % gradient.ndim
        n_rest = len(self.kept[name]) - len(own)
        if n_rest:
            told = torch.tensor(channels_of(site, own.tolist()), device=gradient.device)
            others = gradient.index_fill(axis, told, 0)[None]
            for _, got in products(returned, leaves, lambda _: others):
                add([len(own)], got)

        def vectors(numbers: Sequence[int]) -> Tensor:
            vector = gradient.new_zeros((len(numbers), *gradient.shape))
            for row, number in enumerate(numbers):
                for channel in channels_of(site, [int(own[number])]):
                    vector[row].select(axis, channel).copy_(gradient.select(axis, channel))
            return vector

        for columns, got in products(returned, leaves, vectors, len(own)):
            add(columns, got)
        return 1 + bool(n_rest) + len(own)

    def _straight(
        self, inputs: Inputs, gradients: dict[str, Tensor], targets: dict[str, Tensor]
    ) -> bool:
        """Add the flow through shortcuts; returns whether there are any."""
        found = straight_flow(self.runner, inputs, self.sites, self.gating, self.links, gradients)
        for (source, target), (where, flow) in found.items():
            own, reads = targets[target], self.by_name[target]
            # Channels that are not told apart are in the last column; closed ones get nothing.
            column = torch.full((reads.n_gates,), -1, device="cpu")
            column[self.kept[target]] = len(own)
            column[own] = torch.arange(len(own), device="cpu")
            gate = gate_of_channel([reads])
            column = torch.cat([column if gate is None else column[gate], column.new_tensor([-1])])
            at = column[where.clamp_min(-1)]
            rows = ((where >= 0) & (at >= 0)).nonzero().flatten()
            gate = gate_of_channel([self.by_name[source]])
            to = torch.arange(len(where), device="cpu") if gate is None else gate
            straight = self.straight[source, target]
            straight.index_put_((to[rows], at[rows]), flow[rows], accumulate=True)
            straight[to[where == UNKNOWN]] = np.nan
        return bool(found)

    def _link(self, source: str, target: str, targets: Tensor, n_images: int) -> Link:
        kept = self.kept[source]
        n_rest = 0 if target == OUTPUT else len(self.kept[target]) - len(targets)
        sums = {what: value[kept] / n_images for what, value in self.sums[source, target].items()}
        straight = self.straight[source, target][kept] / n_images
        return Link(source, target, kept, targets, n_rest, straight=straight, **sums)
