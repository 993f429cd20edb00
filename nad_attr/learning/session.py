"""Learn task gates: many tasks in shared batches, with gradients of gates only."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr._checks import check_mapping
from nad_attr._version import __version__
from nad_attr.data.fingerprints import fixed_outputs
from nad_attr.data.labels import Task, as_task, other_images, own_images, patterns, tasks_in
from nad_attr.data.sources import ChosenSource, Data, Inputs, MirroredSource, Source, as_source
from nad_attr.gates.channels import budget, n_gates, open_gates, split_sites, to_channels, to_gates
from nad_attr.gates.history import History
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import frozen
from nad_attr.gating.means import channel_moments
from nad_attr.learning.constants import KEPT_SHARE, MAX_KEPT, MIN_TO_KEEP, learn_with_constants
from nad_attr.learning.engine import Chunk, CleanOutputs, Learned, Network, Replica, TaskImages
from nad_attr.learning.network_checks import Checks, check_gradients, check_option, check_outputs
from nad_attr.learning.paper import learn_paper, paper_steps
from nad_attr.learning.selection import learn_selection, steps_in_memory
from nad_attr.learning.targets import reached, split, target_sizes
from nad_attr.running.forward import check_classes, chunks, most_in_batch, repeated
from nad_attr.running.options import RunOptions, as_options
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.finding import find_gate_sites
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.stats.held_out import parted_tasks, unchecked_tasks
from nad_attr.system.memory import largest_batch
from nad_attr.system.rng import seed_of

__all__ = ["Session", "fit_constants"]


#: Largest number of images for the ablation value "mean".
MEAN_IMAGES = 512
#: Fields of a recipe without fidelity, for given channels.
_ANY_SIZE: dict[str, Any] = {"size": 0.5, "fidelity": None}
#: From this number of own images of a task on, mirrored ones are not needed.
ENOUGH_OWN_IMAGES = 50
#: Own images, and others, on which mirrored ones are tried, and the share of the task output's
#: variance that has to stay.
MIRRORED_TRIED, MIRRORED_KEEPS = 32, 0.8

#: What the last run pays to keep the channel of the lowest rank, in units of the task output's
#: variance, in networks of up to so many channels; in larger ones less, as each matters less.
GUIDANCE, GUIDED_CHANNELS = 0.02, 640
#: Images on which a light copy is compared one by one, and together in one pass.
N_COMPARED = 16


def fit_constants(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    recipe: Recipe | None = None,
    seed: int = 0,
    run: RunOptions | None = None,
    augmented: bool | None = None,
) -> list[SubArchitecture]:
    """Give any method's channels the constants that keep the task output best.

    The values of closed channels decide as much as the choice of channels: compare methods with the
    best constants of each, fitted on the same images with the same number of passes (optimal
    ablation).

    Args:
        model: See :func:`learn_gates`.
        architectures: Task gates, or sub-architectures of the same sites, each with its task. Cut
            scores with :func:`nad_attr.evaluation.top_k` first.
        data: See :func:`learn_gates`; images to fit on, not those to judge by.
        recipe: Gives steps, images of a step and the terms of the task output; its size is not
            used. None: ``Recipe()``.
        seed: See :func:`learn_gates`.
        run: How to run the network; see :class:`nad_attr.RunOptions`.
        augmented: See :func:`learn_gates`.

    Returns:
        The same channels with the new constants, one sub-architecture for each task.

    Raises:
        SiteError, TypeError, ValueError: See :func:`learn_gates`; also if sub-architectures have no
            task, or are of different sites.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> x = torch.randn(20, 4, generator=generator)
        >>> site = GateSite("1", 6, 1)
        >>> arch = SubArchitecture.from_kept({"1": [0, 3]}, [site], task=1)
        >>> fit_constants(net, arch, (x, (x[:, 0] > 0).long()))[0].closed_at
        'at constants of their own, fitted on 20 images'
    """
    if isinstance(architectures, TaskGates):
        archs = architectures.sub_architectures()
    elif isinstance(architectures, SubArchitecture):
        archs = [architectures]
    else:
        archs = list(architectures)
    if not archs or not all(isinstance(arch, SubArchitecture) for arch in archs):
        raise TypeError("architectures must be task gates or sub-architectures, at least one.")
    if any(arch.sites != archs[0].sites for arch in archs):
        raise ValueError("the sub-architectures have different gate sites.")
    tasks = [arch.task for arch in archs if arch.task is not None]
    if len(tasks) < len(archs):
        raise ValueError(
            "a sub-architecture has no task, so it is not known which output its constants keep."
        )
    recipe = Recipe() if recipe is None else recipe
    recipe = dataclasses.replace(recipe, ablation="optimal", **_ANY_SIZE)
    sites = archs[0].sites
    session = Session(model, data, tasks, recipe, sites, seed=seed, run=run, augmented=augmented)
    with session.network.bar(len(archs) * recipe.steps, "fitting constants", "step") as bar:
        return session.fit(archs, advance=bar.update)


class Session:
    """A network, data and a recipe that fit together, ready to learn tasks.

    All checks are made here, before any work is done. The arguments and errors are those of
    :func:`learn_gates`.

    Attributes:
        network: The network with its gate sites.
        source: The images.
        tasks: The tasks, in the order given.
        names: Their names, or None.
        recipe: The recipe.
        seed: The seed.
        batch_size: Images in one pass, at most.
        width: Tasks that are learned together, at most.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> data = torch.randn(20, 4), torch.arange(20) % 2
        >>> session = Session(net, data, run=RunOptions(batch_size=40))
        >>> session.tasks, session.width
        ([0, 1], 2)
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        tasks: Sequence[object] | Mapping[str, object] | None = None,
        recipe: Recipe | None = None,
        sites: Sequence[GateSite | str | nn.Module] | None = None,
        *,
        seed: int = 0,
        run: RunOptions | None = None,
        augmented: bool | None = None,
        checks: Checks = "refuse",
    ) -> None:
        self.recipe = Recipe() if recipe is None else recipe
        if not isinstance(self.recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}.")
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; a function goes "
                "into forward_func= beside the module that it runs."
            )
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(f"seed must be a whole number, got {seed!r}.")
        options = as_options(run)
        _check_batch(options, self.recipe)
        check_option(checks)
        self.seed = seed
        self._known_moments: tuple[dict[str, Tensor], dict[str, Tensor]] | None = None
        self.network = Network(model, run=options)
        # Tensors made in inference mode cannot enter a graph, so it must end before.
        with torch.inference_mode(False):
            self.source = as_source(data, augmented=augmented, any_labels=True)
            both = [(0, 0), (len(self.source.labels) - 1, 0)]
            example = next(iter(self.source.batches([both])))
            self.network.fields = self.source.fields
            self.network.find_batch_size(example)
            example = tuple(item[: self.network.fixed_batch] for item in example)
            _check_fixed(self.network.fixed_batch, self.recipe)
            with suppress(TypeError, ValueError, RuntimeError):  # reported later, with the sites
                self.network.fit(self.source)
            labels = self.source.labels
            check_recipe(self.recipe, labels)
            self.tasks, self.names = _tasks(tasks, labels)
            _check_images(self.tasks, labels, self.recipe)
            #: The images to learn from, and the numbers of the images that are kept apart.
            self.learned_from: Source = self.source
            self.apart: Tensor | None = None
            if self.recipe.fidelity is not None:
                rows, self.apart = split(labels, self.tasks, seed)
                self.learned_from = ChosenSource(self.source, rows)
            self.network.sites = tuple(_sites(self.network, sites, example))
            if self.recipe.fidelity is not None:
                _check_steps(len(target_sizes(self.sites)), self.recipe)
            outputs = _first_outputs(self.network, example, self.tasks, labels)
            images = self.network.to_device(example)
            check_outputs(
                self.network.model,
                self.network,
                images,
                outputs=outputs,
                checks=checks,
                half=self.network.half,
            )
            self.network.lighten(chain([example], self._of_each_task()))
            self.network.find_checkpoints(tuple(item[:1] for item in example))
            if self.network.reentrant and isinstance(self.recipe, PaperRecipe):
                raise ValueError(
                    "the network uses reentrant checkpoints, inside which the paper's loss gets "
                    "no gradient; use checkpoint(..., use_reentrant=False), "
                    "switch checkpointing off, or take the default recipe."
                )
            asked = self.network.options.batch_size
            self.network.batch_size = asked if isinstance(asked, int) else 8
            with frozen(self.network.model):
                check_gradients(self.network, images, more=self._spread_images, checks=checks)
            self.network.batch_size = None
            self.batch_size = asked if isinstance(asked, int) else self._largest_batch(example)
        self.network.batch_size = self.batch_size
        self.width = max(1, self.batch_size // self.recipe.images_per_step)

    def _spread_images(self, n: int) -> Inputs:
        """Images from all over the data, on the network's device."""
        n = min(n, self.network.fixed_batch or n)
        numbers = sorted({i * len(self.source.labels) // n for i in range(n)})
        inputs = next(iter(self.source.batches([[(number, 0) for number in numbers]])))
        return self.network.to_device(inputs)

    def _of_each_task(self) -> Iterator[Inputs]:
        """An image of each task: some alone, and all of them."""
        images = [(first, 0) for first in _first_own(self.source.labels, self.tasks)]
        alone = images[:: max(1, len(images) // N_COMPARED)][:N_COMPARED]
        most = min(N_COMPARED, self.network.fixed_batch or N_COMPARED)
        together = [images[part.start : part.stop] for part in chunks(len(images), most)]
        yield from self.source.batches([[image] for image in alone] + together)

    def _largest_batch(self, example: Inputs) -> int:
        """Images of a step that fit into memory, with the memory that the recipe needs for them."""
        network, recipe = self.network, self.recipe
        n = n_gates(network.sites)
        # learn_selection holds for each image of a batch the gradients of past steps, and those of
        # the candidates, at most a third of all. With constants, it holds their gradients as well,
        # and both in the metric.
        copies = 5 if recipe.ablation == "optimal" else 4 / 3
        numbers = n * copies
        if recipe.ablation == "optimal":  # the metric and its parts
            numbers += 4 * steps_in_memory(recipe) * recipe.images_per_step
        bytes_per_image = steps_in_memory(recipe) * numbers * torch.finfo(network.dtype).bits / 8
        image = network.to_device(tuple(item[:1] for item in example))
        most = max(most_in_batch(network.device, image), recipe.images_per_step)

        def run(n_images: int) -> None:
            batch = repeated(image, n_images)
            gates = torch.ones(n_images, n, device=network.device, dtype=network.dtype)
            classes = torch.zeros(n_images, 1, device=network.device, dtype=torch.int64)
            network.output_and_gradient(batch, gates, classes, torch.ones_like(classes).bool())

        if recipe.ablation != "zero":
            network.set_means(
                {site.name: torch.zeros(site.n_channels, device="cpu") for site in network.sites}
            )
        try:
            with torch.enable_grad(), frozen(network.model):
                found = largest_batch(
                    network.device,
                    run,
                    limit=network.options.limit,
                    fixed=bytes_per_image * recipe.images_per_step,
                    beside=bytes_per_image,
                    most=min(most, recipe.images_per_step * len(self.tasks)),
                )
        finally:
            network.means = None
        return max(found - found % recipe.images_per_step, min(found, recipe.images_per_step))

    @property
    def sites(self) -> tuple[GateSite, ...]:
        """The gate sites, in forward order."""
        return self.network.sites

    def n_steps(self, task: Task) -> int:
        """Steps that a task takes."""
        if isinstance(self.recipe, PaperRecipe):
            return paper_steps(int(own_images(self.source.labels, [task]).sum()), self.recipe)
        return self.recipe.steps

    def means(self) -> dict[str, Tensor] | None:
        """The values of closed channels, ``{site name: float64 (C,)}``; None: zero.

        They are the same for all tasks: means over images of all classes.
        """
        if self.recipe.ablation == "zero":
            return None
        return self._moments()[0]

    def _moments(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Mean and deviation of channels over images of all classes, ``{site: float64 (C,)}``."""
        if self._known_moments is None:
            network, source, seed = self.network, self.learned_from, self.seed
            width = min(32, network.fixed_batch or 32)
            generator = torch.Generator().manual_seed(seed_of(seed, "means"))
            order = torch.randperm(len(source.labels), generator=generator, device="cpu")
            drawn = [(i, seed_of(seed, "means", i)) for i in order[:MEAN_IMAGES].tolist()]
            draws = [drawn[a : a + width] for a in range(0, len(drawn), width)]
            with torch.inference_mode(False), frozen(network.model):
                batches = map(network.to_device, source.batches(draws))
                self._known_moments = channel_moments(
                    network.model, network.sites, batches, forward=lambda *inputs: network(inputs)
                )
        return self._known_moments

    def outputs(self) -> dict[str, Any]:
        """The whole network's outputs on a few fixed images, to tell it from another network."""
        n = len(self.source.labels)
        draws = [[(i, 0)] for i in sorted({0, n // 3, 2 * n // 3, n - 1})]
        with torch.inference_mode(False):
            batches = map(self.network.to_device, self.source.batches(draws))
            return fixed_outputs(self.network.clean, batches)

    def learn(
        self,
        tasks: Sequence[Task] | None = None,
        *,
        means: Mapping[str, Tensor] | None = None,
        start: Tensor | None = None,
        advance: Callable[[int], object] = lambda n: None,
    ) -> TaskGates:
        """Learn the gates of some of the tasks.

        Args:
            tasks: Some of ``self.tasks``; None: all. Tasks that share a pass are fixed by this
                list, so the same list gives the same gates bit by bit, on the same machine.
            means: The values of closed channels; None: computed if the recipe needs them.
            start: (T, all channels), the logits that the paper's recipe starts from.
            advance: Called with a number of task steps that are done.
        """
        if self.apart is None:
            (gates,) = self._learn([None], tasks, means, start, advance)
            return gates
        found = self._learn(target_sizes(self.sites), tasks, means, None, advance)
        with torch.inference_mode(False), frozen(self.network.model):
            return reached(self.network, found, self.source, self.apart, self.recipe, self.seed)

    def learn_sizes(
        self,
        sizes: Sequence[float],
        tasks: Sequence[Task] | None = None,
        *,
        means: Mapping[str, Tensor] | None = None,
        advance: Callable[[int], object] = lambda n: None,
    ) -> dict[float, TaskGates]:
        """Learn the gates of some of the tasks at several sizes, in one run.

        See :func:`learn_sizes` for sizes and errors, :meth:`learn` for the other arguments.
        """
        if isinstance(self.recipe, PaperRecipe):
            raise ValueError(
                "the paper's recipe takes no size; cut its gates with "
                "sub_architecture(task, size=...)."
            )
        if self.apart is not None:
            raise ValueError(
                "recipe: learn_sizes takes sizes and no fidelity, which chooses the size; use "
                "learn_gates."
            )
        wanted = [sizes] if isinstance(sizes, (int, float)) else list(sizes)
        ks = [budget(size, self.sites) for size in wanted]
        if not ks or len(set(ks)) < len(ks):
            raise ValueError(f"sizes must be different numbers of channels, got {wanted}.")
        _check_steps(len(ks), self.recipe)
        falling = sorted(wanted, reverse=True)
        learned = dict(zip(falling, self._learn(falling, tasks, means, None, advance), strict=True))
        return {size: learned[size] for size in wanted}

    def _learn(
        self,
        sizes: Sequence[float | None],
        tasks: Sequence[Task] | None,
        means: Mapping[str, Tensor] | None,
        start: Tensor | None,
        advance: Callable[[int], object],
    ) -> list[TaskGates]:
        """One set of task gates for each size; None: the recipe's own."""
        started = datetime.now(timezone.utc)
        network, source, recipe = self.network, self.learned_from, self.recipe
        wanted = self.tasks if tasks is None else list(tasks)
        parts = self._results(wanted, sizes, means, start, advance)
        self._warn_of_unfit([part[-1] for part in parts], wanted, sizes[-1])
        info = {
            "created_by": f"nad_attr {__version__}, torch {torch.__version__}",
            "model": type(unwrap(network.model)).__name__,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "device": str(network.device),
            "amp": None if network.amp is None else str(network.amp),
            "n_images": len(source.labels),
            "own_images_only": _tasks_without_others(wanted, source.labels, recipe),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(timezone.utc) - started).total_seconds(), 1),
        }
        return [
            self._gates([part[i] for part in parts], wanted, size, info)
            for i, size in enumerate(sizes)
        ]

    def _warn_of_unfit(
        self, learned: Sequence[Learned], tasks: Sequence[Task], size: float | None
    ) -> None:
        """Warn of tasks whose gates do not keep the task output on other images."""
        if self.recipe.ablation != "optimal" or self.apart is not None:
            return
        labels = self.learned_from.labels
        curves = _history([part.curves for part in learned])
        names = self._names_of(tasks) or [f"{task!s:.40}" for task in tasks]
        n_own = own_images(labels, tasks).sum(1).tolist()
        size = self.recipe.size if size is None else size
        unchecked = np.flatnonzero(np.isnan(curves["fidelity_apart"][-1])).tolist()
        n = n_gates(self.sites)
        for found in (
            parted_tasks(curves, names, n_own, size),
            unchecked_tasks(
                [names[t] for t in unchecked], [n_own[t] for t in unchecked], MIN_TO_KEEP,
                len(labels), n - budget(size, self.sites),
            ),
        ):  # fmt: skip
            if found is not None:
                warnings.warn(found, stacklevel=5)

    def learn_replicas(
        self,
        replicas: Sequence[Replica],
        advance: Callable[[int], object] = lambda n: None,
        size: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Learn tasks again: from some of the images, or with a price on channels.

        Args:
            replicas: R of them, side by side in shared passes as tasks are.
            advance: Called with a number of steps that are done.
            size: Their size; None: the recipe's.

        Returns:
            Gates (R, all channels), and the constants of closed channels if the recipe has them.
        """
        found = [part[0] for part in self._results(replicas, [size], None, None, advance)]
        constants = [part.constants for part in found if part.constants is not None]
        gates = to_channels(torch.cat([part.gates for part in found]).cpu(), self.sites)
        return gates, torch.cat(constants).cpu() if constants else None

    def _results(
        self,
        tasks: Sequence[Task | Replica],
        sizes: Sequence[float | None],
        means: Mapping[str, Tensor] | None,
        start: Tensor | None,
        advance: Callable[[int], object],
    ) -> list[list[Learned]]:
        """The results of each chunk at each size, in one run or guided by several."""
        if self.recipe.replicas == 1:
            return self._parts(tasks, sizes, means, start, advance, self.recipe)
        replicas = [t if isinstance(t, Replica) else Replica(t, self.seed) for t in tasks]
        return self._guided(replicas, sizes, means, advance)

    def _parts(
        self,
        tasks: Sequence[Task | Replica],
        sizes: Sequence[float | None],
        means: Mapping[str, Tensor] | None,
        start: Tensor | None,
        advance: Callable[[int], object],
        recipe: Recipe,
        masks: Tensor | None = None,
    ) -> list[list[Learned]]:
        """The results of each chunk at each size; with masks, only constants are learned."""
        network = self.network
        parts: list[list[Learned]] = []
        with torch.inference_mode(False), torch.enable_grad(), frozen(network.model):
            means = self.means() if means is None else means
            if means is not None:
                network.set_means(means)
            for rows, chunk in self._chunks(tasks, advance):
                if isinstance(recipe, PaperRecipe):
                    first = None if start is None else start[rows]
                    parts.append([learn_paper(chunk, recipe, first)])
                else:
                    asked = [recipe.size if size is None else size for size in sizes]
                    given = None if masks is None else masks[rows]
                    parts.append(self._chosen(chunk, asked, recipe, given))
        return parts

    def _guided(
        self,
        replicas: Sequence[Replica],
        sizes: Sequence[float | None],
        means: Mapping[str, Tensor] | None,
        advance: Callable[[int], object],
    ) -> list[list[Learned]]:
        """The results of each chunk in a last run, which prefers channels that short runs keep.

        The images that are kept apart for the constants are learned from in none of the runs.
        """
        each, last = self.recipe.replica_steps
        runs = [
            Replica(r.task, seed_of(r.seed, r.task, "replica", i), among, r.prices)
            for r in replicas
            for among in [self._not_apart(r)]
            for i in range(self.recipe.replicas)
        ]
        short = dataclasses.replace(self.recipe, steps=each, replicas=1)
        parts = self._parts(runs, sizes, means, None, advance, short)
        shape = len(replicas), self.recipe.replicas, -1
        ranks = [torch.cat([part[i].gates for part in parts]) for i in range(len(sizes))]
        rank = torch.stack(ranks).mean(0).view(shape).mean(1)
        most = GUIDANCE * min(1.0, GUIDED_CHANNELS / rank.shape[1])
        prices = to_channels(most * (1 - rank).cpu(), self.sites)
        guided = [
            r._replace(prices=price if r.prices is None else r.prices + price)
            for r, price in zip(replicas, prices, strict=True)
        ]
        long = dataclasses.replace(self.recipe, steps=last, replicas=1)
        found = self._parts(guided, sizes, means, None, advance, long)
        curves = {
            name: torch.cat([part[-1].curves[name] for part in parts], dim=1)
            .view(-1, *shape[:2]).mean(2)
            for name in parts[0][-1].curves
        }  # fmt: skip
        done = 0
        for part in found:
            rows = slice(done, done + len(part[0].gates))
            done = rows.stop
            for i, one in enumerate(part):
                longer = {n: torch.cat([curves[n][:, rows], c]) for n, c in one.curves.items()}
                part[i] = one._replace(curves=longer)
        return found

    def _not_apart(self, replica: Replica) -> Tensor | None:
        """The images that a run may learn from, without those that judge the constants."""
        if self.recipe.ablation != "optimal":
            return replica.among
        images = TaskImages(self.learned_from.labels, replica.task, replica.seed, replica.among)
        images.keep_apart(KEPT_SHARE, MAX_KEPT, MIN_TO_KEEP)
        return torch.cat(list(images.pools.values()))

    def fit(
        self, archs: Sequence[SubArchitecture], advance: Callable[[int], object] = lambda n: None
    ) -> list[SubArchitecture]:
        """The sub-architectures with constants fitted, several of a task side by side.

        See :func:`fit_constants`. Each is fitted on its own task's images, the same for all of a
        task.
        """
        tasks = [arch.task for arch in archs if arch.task is not None]
        masks = torch.stack(
            [torch.cat([open_gates(s, arch[s.name]) for s in self.sites]) for arch in archs]
        )
        found = self._parts(tasks, [1.0], None, None, advance, self.recipe, masks)
        of_all = [part[0].constants for part in found if part[0].constants is not None]
        constants = split_sites(torch.cat(of_all).cpu(), self.sites)
        return [
            arch.with_means(
                {n: v[i] for n, v in constants.items()},
                own_constants=True,
                fitted_on=len(self.source.labels),
            )
            for i, arch in enumerate(archs)
        ]

    def _chunks(
        self, tasks: Sequence[Task | Replica], advance: Callable[[int], object]
    ) -> Iterator[tuple[slice, Chunk]]:
        """Chunks of tasks that are learned side by side, and their places in the list."""
        source, turned = self.mirrored(
            [task.task if isinstance(task, Replica) else task for task in tasks]
        )
        clean = CleanOutputs(self.network, source)
        for part in chunks(len(tasks), self.width):
            rows = slice(part.start, part.stop)
            more: dict[str, Any] = {"clean": clean, "advance": advance, "mirrored": turned[rows]}
            yield rows, Chunk(self.network, source, tasks[rows], self.seed, **more)

    @torch.no_grad()
    def mirrored(self, tasks: Sequence[Task]) -> tuple[Source, list[bool]]:
        """The images to learn from, and for each task whether it gets mirrored ones as well.

        Mirrored images are free new images. They are used if own images are few and the network
        treats them like the originals: their task output keeps 0.8 of its variance.

        Raises:
            ValueError: If the recipe asks for them, and the images are no pictures.
        """
        source, asked = self.learned_from, self.recipe.mirror
        no = source, [False] * len(tasks)
        if asked is False or (asked is None and self.recipe.ablation != "optimal"):
            return no
        (example,) = source.batches([[(0, 0)]])
        pictures = len(example) == 1 and example[0].ndim == 4 and example[0].is_floating_point()
        if not pictures or source.augmented:
            if asked:
                raise ValueError(
                    "recipe: mirror=True needs pictures, one input (images, channels, height, "
                    "width), that look the same each time they are drawn; mirror them in the "
                    "dataset's transform, or leave it out."
                )
            return no
        if asked:
            return MirroredSource(source), [True] * len(tasks)
        different = list(dict.fromkeys(tasks))
        kinds = zip(*(f(source.labels, different) for f in (own_images, other_images)), strict=True)
        turned = {
            task: int(pair[0].sum()) < ENOUGH_OWN_IMAGES
            and self._keeps_mirrored(source, task, pair)
            for task, pair in zip(different, kinds, strict=True)
        }
        if not any(turned.values()):
            return no
        return MirroredSource(source), [turned[task] for task in tasks]

    def _keeps_mirrored(self, source: Source, task: Task, kinds: Sequence[Tensor]) -> bool:
        """Whether mirrored pictures of a task's own and other images get nearly the same output."""
        error, spread = [], []
        for kind in kinds:
            numbers = kind.nonzero()[:, 0]
            numbers = numbers[:: -(-max(1, len(numbers)) // MIRRORED_TRIED)]
            if not len(numbers):
                continue
            (images,) = source.batches([[(i, 0) for i in numbers.tolist()]])
            plain = self.network.to_device(images)
            both = [
                task_outputs(self.network.clean(inputs), [task])[:, 0].double()
                for inputs in (plain, tuple(x.flip(-1) for x in plain))
            ]
            error.append((both[1] - both[0]).square().mean())
            spread.append(both[0])
        centre = torch.stack([values.mean() for values in spread]).mean()
        variance = torch.stack([(values - centre).square().mean() for values in spread]).mean()
        return bool(torch.stack(error).mean() <= (1 - MIRRORED_KEEPS) * variance)

    def _chosen(
        self,
        chunk: Chunk,
        sizes: Sequence[float],
        recipe: Recipe,
        masks: Tensor | None = None,
    ) -> list[Learned]:
        """Gates of a chunk by the default recipe, with the best constants if it has them."""
        if recipe.ablation != "optimal":
            return learn_selection(chunk, recipe, sizes)
        network = self.network
        assert network.means is not None
        means, deviations = (
            torch.cat([values[site.name] for site in self.sites]).to(network.device, network.dtype)
            for values in (network.means, self._moments()[1])
        )
        return learn_with_constants(chunk, recipe, sizes, means, deviations, masks)

    def _gates(
        self,
        learned: Sequence[Learned],
        tasks: Sequence[Task],
        size: float | None,
        info: Mapping[str, Any],
    ) -> TaskGates:
        gates = to_channels(torch.cat([part.gates for part in learned]), self.sites)
        logits = to_channels(torch.cat([part.logits for part in learned]), self.sites)
        constants = [part.constants for part in learned if part.constants is not None]
        return TaskGates(
            split_sites(gates.cpu(), self.sites),
            self.sites,
            tasks,
            logits=split_sites(logits.cpu(), self.sites),
            means=self.network.means,
            constants=split_sites(torch.cat(constants).cpu(), self.sites) if constants else None,
            recipe=self.recipe
            if size is None or self.apart is not None
            else dataclasses.replace(self.recipe, size=size),
            history=_history([part.curves for part in learned]),
            task_names=self._names_of(tasks),
            info=info,
        )

    def _names_of(self, tasks: Sequence[Task]) -> list[str] | None:
        if self.names is None:
            return None
        names = dict(zip(self.tasks, self.names, strict=True))
        return [names[task] for task in tasks]


def _check_steps(n_sizes: int, recipe: Recipe) -> None:
    """Refuse a run that passes through more sizes than it has steps."""
    steps = recipe.steps if recipe.replicas == 1 else recipe.replica_steps[0]
    if n_sizes > steps:
        of = "the recipe" if recipe.replicas == 1 else "each replica"
        raise ValueError(
            f"{n_sizes} sizes need at least as many steps, and {of} has {steps}; "
            "raise recipe.steps."
        )


def _check_batch(run: RunOptions, recipe: Recipe) -> None:
    if run.batch_size != "auto" and run.memory_limit is not None:
        raise ValueError(
            "learning takes a memory_limit with batch_size='auto' only; batch_size is "
            f"{run.batch_size or 64}."
        )
    if run.batch_size == "auto" and isinstance(recipe, PaperRecipe):
        raise ValueError(
            "batch_size='auto' is for the default recipe; give a number for the paper's, whose "
            f"steps take {recipe.images_per_step} images of each task."
        )


def _check_fixed(fixed_batch: int | None, recipe: Recipe) -> None:
    """Refuse the paper's recipe where its steps do not fit into one pass."""
    if fixed_batch and isinstance(recipe, PaperRecipe) and recipe.images_per_step > fixed_batch:
        raise ValueError(
            f"the network takes batches of {fixed_batch} images only, and the paper's loss is one "
            f"of {recipe.images_per_step} images together: images_per_step={fixed_batch} in the "
            "recipe, or the default, Recipe()."
        )


def check_recipe(recipe: Recipe, labels: Tensor) -> None:
    """Refuse labels that the recipe does not learn from; says which recipe does."""
    if isinstance(recipe, PaperRecipe) and labels.ndim == 2:
        raise ValueError(
            "the paper's recipe learns from the cross-entropy of classes; for one output, several "
            "labels an image or targets use the default, Recipe()."
        )


def _tasks(
    tasks: Sequence[object] | Mapping[str, object] | None, labels: Tensor
) -> tuple[list[Task], list[str] | None]:
    if tasks is None:
        present = tasks_in(labels)
        if not present:
            raise ValueError("no image has any of the labels: there is no task to learn.")
        return list(present), None
    if isinstance(tasks, (str, bytes)):
        raise TypeError(f"tasks must be a list of class indices or a dictionary, got {tasks!r}.")
    names = None
    if isinstance(tasks, Mapping):
        names = [str(name) for name in tasks]
        values = list(tasks.values())
    elif isinstance(tasks, int):
        values = [tasks]
    else:
        try:
            values = list(tasks)
        except TypeError:
            raise TypeError(
                f"tasks must be a list of class indices, got {type(tasks).__name__}."
            ) from None
    wanted = [as_task(value) for value in values]
    if not wanted:
        raise ValueError("tasks is empty; name at least one class, or leave it out for all.")
    twice = [task for i, task in enumerate(wanted) if task in wanted[:i]]
    if twice:
        raise ValueError(f"task {twice[0]} is there twice.")
    return wanted, names


def _first_own(labels: Tensor, tasks: Sequence[Task]) -> list[int]:
    """An image of each task: the first of the lowest class of its group that has any."""
    known, places = patterns(labels)
    first = torch.full((len(known),), len(places), device="cpu")
    first = first.scatter_reduce(0, places, torch.arange(len(places), device="cpu"), "amin")
    own = own_images(known, tasks)
    return [int(first[row.nonzero()[0, 0]]) for row in own]


def _check_images(tasks: Sequence[Task], labels: Tensor, recipe: Recipe) -> None:
    known, _ = patterns(labels)
    for task, has in zip(tasks, own_images(known, tasks).any(1).tolist(), strict=True):
        if not has:
            present = tasks_in(labels)
            shown = ", ".join(map(str, present[:20])) + (" ..." * (len(present) > 20))
            said = "its labels are" if labels.ndim == 1 else "the tasks with own images are"
            raise ValueError(
                f"there is no image of task {task} in the data; {said} {shown or 'none'}."
            )
    if isinstance(recipe, PaperRecipe):
        return
    alone = _tasks_without_others(tasks, labels, recipe)
    if alone:
        warnings.warn(
            f"task {alone[0]} has own images only: its gates keep the task output on those, and "
            "nothing says that they do not raise it on other images as well. Add images of other "
            "classes to the data for a sub-architecture that tells classes apart.",
            stacklevel=4,
        )


def _tasks_without_others(tasks: Sequence[Task], labels: Tensor, recipe: Recipe) -> list[Any]:
    """Tasks that are learned from own images alone: all of them with the paper's recipe."""
    if isinstance(recipe, PaperRecipe):
        return list(tasks)
    others = other_images(labels, tasks).any(1).tolist()
    return [task for task, has in zip(tasks, others, strict=True) if not has]


def _sites(
    network: Network, sites: Sequence[GateSite | str | nn.Module] | None, example: Inputs
) -> list[GateSite]:
    if sites is not None:
        if isinstance(sites, (str, nn.Module, GateSite)):
            sites = [sites]
        if not isinstance(sites, Iterable):
            raise TypeError(f"sites must be a list of gate sites, got {sites!r}.")
        sites = list(sites)
        if not sites:
            raise ValueError("sites is empty; leave it out to have them found.")
        if all(isinstance(site, GateSite) for site in sites):
            return [site for site in sites if isinstance(site, GateSite)]
    return find_gate_sites(
        network.model,
        network.to_device(example),
        layers=sites,
        additional_forward_args=network.options.additional_forward_args,
        forward_func=None if network.is_plain else network.call,
    )


def _first_outputs(
    network: Network, example: Inputs, tasks: Sequence[Task], labels: Tensor
) -> Tensor:
    """Run one real pass, to check that sites, inputs and outputs fit."""
    outputs, _ = network.clean_recorded(network.to_device(example))
    check_classes(labels, tasks, outputs.shape[1])
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError(
            "the network's outputs hold NaN or infinity on the first images; check weights, "
            "input range and mixed precision."
        )
    return outputs


def _start(
    logits: Mapping[str, Tensor] | None,
    recipe: Recipe,
    sites: Sequence[GateSite],
    tasks: Sequence[Task],
) -> Tensor | None:
    if logits is None:
        return None
    if not isinstance(recipe, PaperRecipe):
        raise ValueError(
            "initial_logits is a start for the paper's recipe; the default recipe starts from the "
            "whole network."
        )
    check_mapping(logits, "initial_logits")
    parts = []
    for site in sites:
        expected = (len(tasks), site.n_channels)
        value = logits.get(site.name)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"initial_logits of {site.name!r} are not a tensor.")
        if value is None or tuple(value.shape) != expected:
            shape = None if value is None else tuple(value.shape)
            raise ValueError(
                f"initial_logits of {site.name!r} have shape {shape}, not (tasks, channels) = "
                f"{expected}."
            )
        parts.append(value.detach())
    start = to_gates(torch.cat(parts, dim=1), sites, mean=True)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("initial_logits hold NaN or infinity.")
    return start


def _history(curves: Sequence[Mapping[str, Tensor]]) -> History:
    """Join the curves of chunks side by side, shorter ones filled with NaN."""
    steps = max(len(next(iter(part.values()))) for part in curves)
    joined = {}
    for name in curves[0]:
        columns = []
        for part in curves:
            curve = part[name].detach().float().cpu().numpy()
            rest = np.full((steps - len(curve), curve.shape[1]), np.nan, np.float32)
            columns.append(np.concatenate([curve, rest]))
        joined[name] = np.concatenate(columns, axis=1)
    return History(joined)
