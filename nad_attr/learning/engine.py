"""A frozen network with gates, and the images of each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.data.labels import Task, other_images, own_images
from nad_attr.data.sources import Draw, Inputs, Source
from nad_attr.gates.channels import n_channels, n_gates, split_sites, to_channels, to_gates
from nad_attr.gating.hooks import channel_shape, frozen, installed, multiply_learned
from nad_attr.gating.prefix import Prefix
from nad_attr.learning.fast.batchnorm import lean_batchnorm
from nad_attr.learning.fast.convolution import lean_convolutions
from nad_attr.learning.fast.light_copy import light_copy
from nad_attr.running.forward import Runner, chunks, sent
from nad_attr.running.options import RunOptions
from nad_attr.running.outputs import own_task_output
from nad_attr.sites.preserving import Copies, unchanged
from nad_attr.sites.site import GateSite
from nad_attr.sites.tracing import graph_nodes
from nad_attr.system.rng import isolated_rng, seed_of

__all__ = ["Batch", "Chunk", "CleanOutputs", "Learned", "Network", "Replica", "TaskImages"]


class Network(Runner):
    """A frozen network with gates for its channels: clean and gated passes.

    Args:
        model: The network, in eval mode.
        sites: Its gate sites; may be set later, for finding them takes the network's place.
        run: See :class:`~nad_attr.running.Runner`.

    Attributes:
        sites: As given.
        batch_size: Images in one pass at most, in :meth:`clean` and :meth:`output_and_gradient`;
            None: all that are given. The number that ``run`` names, if it does.
        dtype: Of gates and outputs: float32, or float64 for a float64 network, whatever the
            activations are.
        means: What closed channels are replaced by, ``{site name: (C,)}``; None: zero.
        recomputes: Whether checkpointed blocks hold sites, which then fire again in backward.
        reentrant: Whether some are checkpointed in the reentrant way, which knows no
            ``autograd.grad``.
    """

    recomputes = False
    reentrant = False

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite] = (),
        run: RunOptions | None = None,
    ) -> None:
        super().__init__(model, run)
        asked = None if run is None else run.batch_size
        self.sites, self.batch_size = tuple(sites), asked if isinstance(asked, int) else None
        parameter = next(self.model.parameters(), None)
        double = parameter is not None and parameter.dtype == torch.float64
        self.dtype = torch.float64 if double else torch.float32
        self.means: dict[str, Tensor] | None = None

    def lighten(self, batches: Iterable[Inputs]) -> None:
        """Run a copy of the network from now on that does the same with less work.

        Where it gives the same outputs, with channels closed as well. Under autocast BatchNorm
        layers stay: rounding the merged weights would be no small matter. See
        :func:`nad_attr.learning.fast.light_copy.light_copy`.

        Args:
            batches: Images to compare them on, each batch in passes of its own: some networks
                choose their layers by what they see. Drawn only if there is something to compare.
        """
        kinds = (nn.modules.batchnorm._BatchNorm, nn.MaxPool2d)
        if self._run is not self.model or not any(
            isinstance(m, kinds) for m in self.model.modules()
        ):
            return
        whole, dtype = self.model, self.dtype

        def run(model: nn.Module, inputs: Inputs, closed: float) -> Tensor:
            self.model = self._run = model
            parameter = next(model.parameters(), None)
            if parameter is not None and parameter.dtype == torch.float64:
                self.dtype = torch.float64
                inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
            images = self.to_device(inputs)
            shape = len(images[0]), n_gates(self.sites)
            generator = torch.Generator().manual_seed(0)
            random = torch.rand(shape, generator=generator, device="cpu")
            try:
                if not closed:
                    return self(images)
                return self.gated(images, (random >= closed).to(self.device, self.dtype))
            finally:
                self.dtype = dtype

        runs = (
            partial(run, inputs=inputs, closed=closed) for inputs in batches for closed in (0.5, 0)
        )
        copied = light_copy(whole, next(runs), runs, folding=self.amp is None)
        self.model = self._run = whole if copied is None else copied
        self._copies = Copies()  # none of the networks that were compared

    @contextmanager
    def lean(self) -> Iterator[None]:
        """Keep nothing for the backward pass that only the gradients of weights need.

        Enter it after the hooks of the gates. See
        :func:`nad_attr.learning.fast.batchnorm.lean_batchnorm` and
        :func:`nad_attr.learning.fast.convolution.lean_convolutions`.
        """
        with lean_batchnorm(self.model), lean_convolutions(self.model):
            yield

    @property
    def half(self) -> bool:
        """Whether it computes in half precision."""
        kinds = {self.amp, *(parameter.dtype for parameter in self.model.parameters())}
        return not kinds.isdisjoint((torch.float16, torch.bfloat16))

    def set_means(self, means: Mapping[str, Tensor]) -> None:
        """Let closed channels be at their mean."""
        self.means = {k: v.to(self.device, self.dtype) for k, v in means.items()}

    def __call__(self, inputs: Inputs) -> Tensor:
        """The network's outputs (B, K) in the gates' dtype, with the hooks that are on it."""
        return super().__call__(inputs).to(self.dtype)

    @torch.no_grad()
    def clean(self, inputs: Inputs) -> Tensor:
        """Outputs (B, K) of the whole network."""
        outputs = [
            self(tuple(item[part.start : part.stop] for item in inputs))
            for part in self._passes(len(inputs[0]))
        ]
        return torch.cat(outputs)

    def _passes(self, n: int) -> list[range]:
        """Images 0 to n - 1 in as many passes as it takes, of about equal size."""
        n_passes = 1 if self.batch_size is None else max(1, -(-n // self.batch_size))
        return list(chunks(n, -(-n // n_passes)))

    @torch.no_grad()
    def clean_recorded(self, inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs of the whole network, and copies of what its sites hold.

        All but the first in forward order: no gate stands before it, so it holds the same in every
        sub-architecture.
        """
        kept: dict[str, Tensor] = {}
        seen: list[str] = []

        def record(site: GateSite, tensor: Tensor) -> None:
            channel_shape(site, tensor)
            if seen:
                kept[site.name] = tensor.clone()  # the network may write into it in place
            seen.append(site.name)

        with installed(self.model, self.sites, record):
            return self(inputs), kept

    def gated(
        self,
        inputs: Inputs,
        gates: Tensor,
        constants: Tensor | None = None,
        shift: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Outputs (B, K) under one gate vector per image.

        Args:
            inputs: B images.
            gates: (B, all gates).
            constants: (B, all channels), what closed channels are replaced by; None: the means.
            shift: (B, all channels) of zeros, which is added to all channels.
            prefix: Keeps this pass up to a site, or has kept one of these images with the same
                gates up to there; without gradients. None: the whole pass.
        """
        with self.gating(gates, constants, shift, prefix):
            return self(inputs)

    @contextmanager
    def gating(
        self,
        gates: Tensor,
        constants: Tensor | None = None,
        shift: Tensor | None = None,
        prefix: Prefix | None = None,
    ) -> Iterator[None]:
        """One gate vector per image, for the passes inside.

        The backward pass belongs inside as well: it runs checkpointed blocks again.

        Args:
            gates: See :meth:`gated`.
            constants: See there.
            shift: See there.
            prefix: See there.
        """
        parts = split_sites(to_channels(gates, self.sites), self.sites)
        of_image = None if constants is None else split_sites(constants, self.sites)
        shifts = None if shift is None else split_sites(shift, self.sites)

        def gate(site: GateSite, tensor: Tensor) -> Tensor:
            closed = self.means if of_image is None else of_image
            mean = None if closed is None else closed[site.name]
            added = None if shifts is None else shifts[site.name]
            if prefix is not None:
                prefix.reached(site.name)
            return multiply_learned(site, tensor, parts[site.name], mean, added)

        if prefix is not None:
            with installed(self.model, prefix.sites(self.sites), gate), prefix.active():
                yield
            return
        with installed(self.model, self.sites, gate), self.lean():
            yield

    def find_checkpoints(self, inputs: Inputs) -> None:
        """See how the network checkpoints, for the backward passes to come.

        Args:
            inputs: An image.
        """
        images = _wanting_gradient(self.to_device(inputs))
        shape = len(images[0]), n_channels(self.sites)
        gates = torch.ones(shape, device=self.device, dtype=self.dtype, requires_grad=True)
        parts = split_sites(gates, self.sites)

        def gate(site: GateSite, tensor: Tensor) -> Tensor:
            return multiply_learned(site, tensor, parts[site.name], None)

        kept = unchanged(self.model), isolated_rng(), frozen(self.model), torch.enable_grad()
        with ExitStack() as stack:
            for context in kept:
                stack.enter_context(context)
            fired = stack.enter_context(installed(self.model, self.sites, gate))
            try:
                output = self(images)
                once = dict(fired)
                names = {type(node).__name__ for node in graph_nodes(output.grad_fn)}
                self.reentrant = "CheckpointFunctionBackward" in names
                if output.requires_grad:
                    self.gate_gradient(output.sum(), gates)
            except (RuntimeError, ValueError):
                return  # no gradient at all, as of inference mode; check_gradients says so
            self.recomputes = fired != once

    def ready(self, inputs: Inputs) -> Inputs:
        """The inputs as :meth:`gate_gradient` needs them."""
        return _wanting_gradient(inputs) if self.reentrant else inputs

    def gate_gradient(self, value: Tensor, gates: Tensor, *, retain: bool = False) -> Tensor:
        """The gradient of a number with respect to the gates, inside :meth:`gating`.

        Args:
            value: Made of the outputs.
            gates: A leaf.
            retain: Keep the graph for another one.
        """
        (gradient,) = self.gradients(value, (gates,), retain=retain)
        return gradient

    def gradients(
        self, value: Tensor, leaves: Sequence[Tensor], *, retain: bool = False
    ) -> list[Tensor]:
        """The gradient of a number with respect to several leaves, inside :meth:`gating`."""
        found: Sequence[Tensor | None]
        if self.reentrant:
            value.backward(retain_graph=retain)
            found = [leaf.grad for leaf in leaves]
            for leaf in leaves:
                leaf.grad = None
        else:
            found = torch.autograd.grad(value, leaves, retain_graph=retain, allow_unused=True)
        pairs = zip(leaves, found, strict=True)
        return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in pairs]

    def output_and_gradient(
        self, inputs: Inputs, gates: Tensor, classes: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Each image's task output, and its gradient with respect to that image's gates.

        An image's gradient is its own, so a batch may be cut into passes as memory asks for.

        Args:
            inputs: B images.
            gates: (B, all gates).
            classes: int64 (B, M), see :func:`own_task_output`.
            valid: bool (B, M).

        Returns:
            (B,) and (B, all gates), detached.
        """
        results = [
            self._output_and_gradient(
                tuple(item[part.start : part.stop] for item in inputs),
                *(item[part.start : part.stop] for item in (gates, classes, valid)),
            )
            for part in self._passes(len(gates))
        ]
        outputs, gradients = zip(*results, strict=True)
        return torch.cat(outputs), torch.cat(gradients)

    def output_and_gradients(
        self, inputs: Inputs, gates: Tensor, constants: Tensor, classes: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`output_and_gradient`, with constants of each image's own.

        Args:
            inputs: B images.
            gates: (B, all gates).
            constants: (B, all channels), what stands in place of closed channels.
            classes: int64 (B, M), see :func:`own_task_output`.
            valid: bool (B, M).

        Returns:
            (B,), the gradient with respect to the gates, (B, all gates), and that with respect
            to something added to each channel, (B, all channels), detached.
        """
        found = []
        for part in self._passes(len(gates)):
            at = slice(part.start, part.stop)
            leaf = gates[at].detach().requires_grad_(True)
            shift = torch.zeros_like(constants[at]).requires_grad_(True)
            images = self.ready(tuple(item[at] for item in inputs))
            with self.gating(leaf, constants[at], shift):
                output = own_task_output(self(images), classes[at], valid[at])
                gradients = self.gradients(output.sum(), (leaf, shift))
            found.append((output.detach(), *gradients))
        output, of_gates, of_shift = map(torch.cat, zip(*found, strict=True))
        return output, of_gates, of_shift

    def _output_and_gradient(
        self, inputs: Inputs, gates: Tensor, classes: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        leaf = gates.detach().requires_grad_(True)
        with self.gating(leaf):
            output = own_task_output(self(self.ready(inputs)), classes, valid)
            if not output.requires_grad:
                raise GatingError(
                    "no gradient leads from the outputs back to the gates: the network (or "
                    "forward_func) detaches its outputs, or runs without gradients itself."
                )
            return output.detach(), self.gate_gradient(output.sum(), leaf)


def _wanting_gradient(inputs: Inputs) -> Inputs:
    return tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)


class TaskImages:
    """An endless, seeded sequence of draws for one task: own and other images.

    The sequence depends on the labels, the task and the seed alone, not on other tasks.

    Args:
        labels: Of all images.
        task: The task.
        seed: Of the run.
        among: int64, the numbers of the images that may be drawn; None: all.
        mirrored: Whether half of the draws are of mirrored images, see
            :class:`~nad_attr.data.sources.MirroredSource`.
    """

    def __init__(
        self,
        labels: Tensor,
        task: Task,
        seed: int,
        among: Tensor | None = None,
        mirrored: bool = False,
    ) -> None:
        self._beyond = len(labels) if mirrored else 0
        (own,), (other,) = own_images(labels, [task]), other_images(labels, [task])
        if among is not None:
            allowed = torch.zeros_like(own)
            allowed[among] = True
            own, other = own & allowed, other & allowed
        self.pools = {"own": own.nonzero().flatten(), "other": other.nonzero().flatten()}
        self._key = (seed, task)
        self._generators = {
            kind: torch.Generator().manual_seed(seed_of(seed, task, kind)) for kind in self.pools
        }
        self._queues: dict[str, list[int]] = {kind: [] for kind in self.pools}
        self._drawn = dict.fromkeys(self.pools, 0)

    def keep_apart(self, share: float, most: int, least: int) -> tuple[list[list[Draw]], bool]:
        """Some own images and as many others, which are not drawn from now on; before any is.

        Args:
            share: Of the kind that has fewer.
            most: How many of each kind, at most.
            least: With fewer images of a kind none can be spared: then they are drawn as well.

        Returns:
            The draws of own and of other images, each in random order, and whether they are apart.
        """
        kept = {}
        kinds = [kind for kind, pool in self.pools.items() if len(pool)]
        apart = all(len(self.pools[kind]) >= least for kind in kinds)
        n = min(len(self.pools[kind]) for kind in kinds)
        n = min(most, round(share * n) if apart else len(self.pools["own"]))
        for kind in kinds:
            pool, key = self.pools[kind], (*self._key, kind, "kept")
            generator = torch.Generator().manual_seed(seed_of(*key))
            order = pool[torch.randperm(len(pool), generator=generator, device="cpu")]
            kept[kind] = [(i, seed_of(*key, i)) for i in order[:n].tolist()]
            if apart:
                self.pools[kind] = order[n:].sort().values
        return list(kept.values()), apart

    def take(self, kind: str, n: int) -> list[Draw]:
        """The next ``n`` draws; every image comes once before any comes again."""
        queue, pool = self._queues[kind], self.pools[kind]
        while len(queue) < n:
            order = torch.randperm(len(pool), generator=self._generators[kind], device="cpu")
            queue.extend(pool[order].tolist())
        numbers, self._queues[kind] = queue[:n], queue[n:]
        first = self._drawn[kind]
        self._drawn[kind] += n
        seeds = [seed_of(*self._key, kind, first + j) for j in range(n)]
        return [(i + self._beyond * (s % 2), s) for i, s in zip(numbers, seeds, strict=True)]

    def epoch(self, kind: str, batch: int) -> list[list[Draw]]:
        """One pass over the images of a kind in random order, cut into batches."""
        draws = self.take(kind, len(self.pools[kind]))
        return [draws[i : i + batch] for i in range(0, len(draws), batch)]


class Replica(NamedTuple):
    """A task that is learned once more: from some of the images, or avoiding some channels."""

    task: Task
    #: Of its own draws.
    seed: int
    #: int64, the numbers of the images to learn from; None: all.
    among: Tensor | None = None
    #: (all channels,), what keeping each channel open costs, in units of the task output's
    #: variance. Tiny random prices decide ties; None: ties go by the channels' order.
    prices: Tensor | None = None


class Learned(NamedTuple):
    """What a recipe returns for the tasks of one chunk."""

    #: (R, all gates) in [0, 1]; a channel is kept iff its gate is above one half
    gates: Tensor
    #: (R, all gates), the gates' logits
    logits: Tensor
    #: Each (steps, R), NaN where a task took no step
    curves: dict[str, Tensor]
    #: (R, all channels), what stands in place of closed ones; None: the network's means
    constants: Tensor | None = None


class Batch(NamedTuple):
    """The images of one step."""

    inputs: Inputs
    #: int64 (B,), the row of the task that each image was drawn for
    rows: Tensor
    #: int64 (B,), each image's own class
    labels: Tensor
    #: Image numbers, on the CPU
    numbers: list[int]
    #: int64 (draws,), where each draw of the step stands among the images
    places: Tensor


class CleanOutputs:
    """The whole network's outputs, computed once per image where images never change.

    Args:
        network: The network.
        source: The data.
    """

    #: Numbers kept at most (float32: 256 MB); above that they are computed anew each time.
    LIMIT = 2**26

    def __init__(self, network: Network, source: Source) -> None:
        self.network = network
        self.n_images = 0 if source.augmented else len(source.labels)
        self._known: Tensor | None = None
        self._have = [False] * self.n_images

    def __call__(self, batch: Batch) -> Tensor:
        """Outputs (B, K) for a batch."""
        if not self.n_images:
            return self.network.clean(batch.inputs)
        new = {number: i for i, number in enumerate(batch.numbers) if not self._have[number]}
        if new:
            device = batch.inputs[0].device
            at = sent(torch.tensor(list(new.values()), device="cpu"), device)
            outputs = self.network.clean(tuple(item[at] for item in batch.inputs))
            if self._known is None:
                if self.n_images * outputs.shape[1] > self.LIMIT:
                    self.n_images = 0
                    return self.network.clean(batch.inputs)
                self._known = outputs.new_zeros(self.n_images, outputs.shape[1])
            self._known[sent(torch.tensor(list(new), device="cpu"), outputs.device)] = outputs
            for number in new:
                self._have[number] = True
        assert self._known is not None
        return self._known[sent(torch.tensor(batch.numbers, device="cpu"), self._known.device)]


class Chunk:
    """Some tasks that are learned together, and the images they are learned from.

    Args:
        network: The network.
        source: The data.
        tasks: R tasks.
        seed: Of the run.
        clean: The whole network's outputs; shared by the chunks of a run.
        advance: Called with a number of task steps that are done, for the progress bar.
        mirrored: For each task whether it sees mirrored images, too; of a source that has them.

    Attributes:
        n_images: Different images, with mirrored ones counted as what they are of.

    Tasks may be given as replicas; then one may be there several times.
    """

    def __init__(
        self,
        network: Network,
        source: Source,
        tasks: Sequence[Task | Replica],
        seed: int,
        *,
        clean: CleanOutputs | None = None,
        advance: Callable[[int], object] = lambda n: None,
        mirrored: Sequence[bool] | None = None,
    ) -> None:
        self.network, self.source = network, source
        self.n_images = getattr(source, "n_plain", len(source.labels))
        replicas = [task if isinstance(task, Replica) else Replica(task, seed) for task in tasks]
        self.tasks = [replica.task for replica in replicas]
        self.seeds = [replica.seed for replica in replicas]
        self.prices: Tensor | None = None
        if any(replica.prices is not None for replica in replicas):
            none = torch.zeros(n_channels(network.sites), device="cpu")
            self.prices = torch.stack([none if r.prices is None else r.prices for r in replicas])
            prices = to_gates(self.prices, network.sites, mean=True)
            self.prices = prices.to(network.device, network.dtype)
        self.clean = CleanOutputs(network, source) if clean is None else clean
        self.advance = advance
        labels = source.labels[: self.n_images]
        self.images = [
            TaskImages(labels, r.task, r.seed, r.among, turned)
            for r, turned in zip(replicas, mirrored or [False] * len(replicas), strict=True)
        ]
        members = [[task] if isinstance(task, int) else list(task) for task in self.tasks]
        width = max(map(len, members))
        padded = [m + [m[0]] * (width - len(m)) for m in members]
        valid = [[True] * len(m) + [False] * (width - len(m)) for m in members]
        self.classes = torch.tensor(padded, device=network.device)
        self.valid = torch.tensor(valid, device=network.device)

    def __len__(self) -> int:
        return len(self.tasks)

    def batches(self, plan: Sequence[Sequence[Sequence[Draw]]]) -> Iterator[Batch]:
        """Fetch what each step needs.

        An image that a task draws twice in a step, because it has few, is fetched and run once,
        unless it may look different each time.

        Args:
            plan: The draws of each row for each step; none for a row that is done.
        """
        device = self.network.device
        distinct = [self._distinct(step) for step in plan]
        fetched = self.source.batches([[draw for _, draw in images] for images, _ in distinct])
        for (images, places), inputs in zip(distinct, fetched, strict=True):
            numbers = [number for _, (number, _) in images]
            yield Batch(
                self.network.to_device(inputs),
                sent(torch.tensor([row for row, _ in images], device="cpu"), device),
                sent(self.source.labels[numbers], device),
                numbers,
                sent(torch.tensor(places, device="cpu"), device),
            )

    def _distinct(self, step: Sequence[Sequence[Draw]]) -> tuple[list[tuple[int, Draw]], list[int]]:
        """The (row, draw) pairs that have to be run, and where each draw stands among them."""
        images: list[tuple[int, Draw]] = []
        places: list[int] = []
        for row, draws in enumerate(step):
            known: dict[int, int] = {}
            for draw in draws:
                place = None if self.source.augmented else known.get(draw[0])
                if place is None:
                    place = known[draw[0]] = len(images)
                    images.append((row, draw))
                places.append(place)
        return images, places

    def own_output(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """The task output of each image for the task it was drawn for: (B,)."""
        return own_task_output(outputs, self.classes[rows], self.valid[rows])
