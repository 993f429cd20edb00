"""The protocol of everything that scores channels: the score of each channel on one image.

A scorer gives each channel a number per task. A subclass defines the score of each channel on one
image (:meth:`ChannelScorer.image_scores`), or, without images, for one task
(:meth:`TaskScorer.task_scores`); the base class weights the images for each task.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError, tensor_of
from nad_attr.data.labels import Task, as_task, other_images, own_images, tasks_in
from nad_attr.data.sources import Draw, Inputs, Source, TensorSource, as_source
from nad_attr.gates.channels import to_channels, to_gates
from nad_attr.gating.hooks import channel_shape, frozen, installed, site_modules
from nad_attr.gating.restore import own_copy
from nad_attr.running.forward import Runner, check_classes, chunks
from nad_attr.running.options import RunOptions, as_options
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.site import GateSite, check_sites
from nad_attr.system.rng import seed_of

__all__ = ["Batch", "ChannelScorer", "Scores", "TaskScorer", "Variants", "positions", "tasks_of"]

#: For each task (rows) and channel: ``{site name: (T, C)}``.
Scores: TypeAlias = "dict[str, Tensor]"
#: ``{(include_others, signed): scores}``
Variants: TypeAlias = "dict[tuple[bool, bool], Scores]"


def tasks_of(targets: Any, tasks: Sequence[Task] | None = None) -> list[Task]:
    """The tasks of a scorer's rows: as given, or the sorted different targets.

    Raises:
        TypeError: If a task is not a class index or group of them.
        ValueError: If a task is there twice, or there is none.

    Example:
        >>> tasks_of(torch.tensor([2, 0, 2])), tasks_of(torch.tensor([2, 0, 2]), [(0, 2), 2])
        ([0, 2], [(0, 2), 2])
    """
    chosen = tasks_in(tensor_of(targets)) if tasks is None else tasks
    if isinstance(chosen, (str, bytes, Mapping, int)):
        raise TypeError(f"tasks must be a sequence of tasks, got {type(chosen).__name__}.")
    result = [as_task(task) for task in chosen]
    if not result:
        raise ValueError("there is no task to score channels for.")
    if len(set(result)) < len(result):
        raise ValueError(f"a task is there twice: {result}.")
    return result


def positions(values: Tensor, site: GateSite) -> Tensor:
    """A site's tensor as float64 (B, C, P): channels second, all positions (one, if none) last."""
    dim, _ = channel_shape(site, values)
    if values.device.type == "mps":  # has no float64
        values = values.cpu()
    return values.detach().double().movedim(dim, 1).reshape(len(values), site.n_channels, -1)


@dataclass(frozen=True, eq=False)
class Batch:
    """Images to score, and the network to run them through.

    Attributes:
        model: The network, to put hooks on.
        inputs: The network's inputs.
        labels: int64 (B,), the images' own classes, or (B, K), see
            :mod:`nad_attr.data.labels`.
        tasks: The B tasks that the images are scored for; empty for a scorer whose scores do not
            depend on the task.
        run: Runs the network on any number of inputs: float (B, K), checked, with its graph.
        prepared: The result of :meth:`ChannelScorer.prepare`.
        targets: float64 (B, K), the images' regression targets, if they have any.
        fixed_batch: The only number of images that the network takes in a pass; None: any.
    """

    model: nn.Module
    inputs: Inputs
    labels: Tensor
    tasks: list[Task]
    run: Callable[[Inputs], Tensor]
    prepared: Any = None
    targets: Tensor | None = None
    fixed_batch: int | None = None

    def outputs(self) -> Tensor:
        """The network's outputs for these images, (B, K), with their graph."""
        return self.run(self.inputs)

    def columns(self) -> tuple[list[Task], Tensor]:
        """The different tasks, and int64 (B,): which of them each image is scored for."""
        number = {task: i for i, task in enumerate(dict.fromkeys(self.tasks))}
        column = torch.tensor([number[task] for task in self.tasks], device=self.labels.device)
        return list(number), column

    def explained(self, outputs: Tensor) -> Tensor:
        """The task output of each image for the task it is scored for, (B,)."""
        different, column = self.columns()
        return task_outputs(outputs, different).gather(1, column[:, None])[:, 0]

    def summed(self, outputs: Tensor) -> Tensor:
        """The sum of :meth:`explained`, whose gradient is that of each image's own."""
        return self.explained(outputs).sum()


def check_differentiable(value: Tensor) -> None:
    """Refuse outputs that have no gradient; says why there may be none."""
    if not value.requires_grad:
        raise GatingError(
            "no gradient leads from the outputs back to the gate sites: the network (or "
            "forward_func) detaches them, or runs without gradients itself."
        )


def _weights(labels: Tensor, tasks: Sequence[Task], include_others: bool) -> Tensor:
    """The weight of each image for each task: float64 (T, N), rows sum to one."""
    own = own_images(labels, tasks)
    parts = [(own, "own")]
    if include_others:
        parts.append((other_images(labels, tasks), "other"))
    weights = torch.zeros(own.shape, dtype=torch.float64, device="cpu")
    for part, what in parts:
        for task, has in zip(tasks, part.any(-1).tolist(), strict=True):
            if not has:
                raise ValueError(f"there is no {what} image for task {task} among the inputs.")
        weights += part / part.sum(-1, keepdim=True, dtype=torch.float64) / len(parts)
    return weights


def tied(values: Tensor, site: GateSite) -> Tensor:
    """The sum over each group's channels, for each of them: (..., C)."""
    if site.groups is None:
        return values
    return to_channels(to_gates(values, [site]), [site])


class _Scored:
    """Images that are loaded when they are scored, with random transforms of their own."""

    def __init__(self, source: Source) -> None:
        self.source, self.labels, self.augmented = source, source.labels, source.augmented
        self.targets, self.fields = source.targets, source.fields

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        seeded = ([(i, seed_of("scores", i)) for i, _ in some] for some in draws)
        for inputs in self.source.batches(seeded):
            self.fields = self.source.fields
            yield inputs


class ChannelScorer(ABC):
    """Scores the channels of a network for each task; a subclass defines the score on one image.

    The score of a task is the mean of :meth:`image_scores` over its own images, or with
    ``include_others`` over own and other images in equal parts. If these numbers have a sign
    (``has_sign``), ``signed`` keeps it; else the absolute value of each image's number is averaged,
    so that channels for and against the task count. Means are taken in float64, so that neither the
    order of the images nor the batch size matters.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Gate sites of that network, in forward order.

    Raises:
        SiteError: If the network has no such site.
        ValueError: If there are no sites.

    Example:
        >>> from nad_attr import recorded
        >>> class Largest(ChannelScorer):
        ...     def image_scores(self, batch):
        ...         with torch.no_grad(), recorded(batch.model, self.sites) as x:
        ...             batch.outputs()
        ...         return {s.name: positions(x[s.name], s).amax(-1) for s in self.sites}
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 5.0], [3.0, 5.0], [9.0, 0.0]])
        >>> Largest(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0, 1]))
        {'0': tensor([[2., 5.], [9., 0.]])}
    """

    #: Whether an image's scores depend on the task. If not, each image is run once for all tasks.
    task_specific: bool = False
    #: Whether :meth:`image_scores` has a sign that can be kept or left out.
    has_sign: ClassVar[bool] = False
    #: Whether that sign is kept.
    signed: bool = False
    #: Whether it changes weights temporarily, so that it needs a network of its own.
    changes_weights: ClassVar[bool] = False

    def __init__(self, model: nn.Module, sites: Sequence[GateSite]) -> None:
        self.model = model
        self.sites = check_sites(sites)
        if not self.sites:
            raise ValueError("there is no gate site to score the channels of.")
        site_modules(model, self.sites)

    @abstractmethod
    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """The score of each channel on each image by itself: ``{site name: (B, C)}``.

        Called with gradients enabled and the network's parameters frozen. Signed, if the scorer has
        a sign.
        """

    def prepare(self, runner: Runner, source: Source, batch_size: int) -> Any:
        """Compute ``Batch.prepared``, which all batches need, before the first one."""
        return None

    def images_per_batch(self, batch_size: int) -> int:
        """Number of images to score together, so that no pass has more than ``batch_size``."""
        return batch_size

    def __call__(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        tasks: Sequence[Task] | None = None,
        include_others: bool = False,
        run: RunOptions | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Score all channels.

        Args:
            inputs: The network's input or tuple of inputs, axis 0 = N images. Or, without
                ``targets``, data of any kind (a Dataset of (input, label), a DataLoader), of which
                a batch at a time is loaded.
            targets: int (N,), the images' own classes.
            tasks: T class indices or groups of them; None: the sorted different targets (see
                :func:`tasks_of`).
            include_others: Take the mean over own and other images in equal parts, not over own
                images only.
            run: How to run the network; see :class:`nad_attr.RunOptions`.
            dtype: Dtype of the result.

        Returns:
            ``{site name: (T, C)}`` on the CPU, rows in the order of the tasks.

        Raises:
            GatingError: If a site does not fire, fires twice or has another shape.
            TypeError: If an argument is of a wrong kind.
            ValueError: If the network is in train mode, shapes do not fit, values are not finite,
                targets or tasks are not a class of the network, or a task has no own (or, if they
                count, no other) images.
        """
        found = self._scored(inputs, targets, tasks, (include_others,), (self.signed,), run, dtype)
        return found[include_others, self.signed]

    def variants(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        tasks: Sequence[Task] | None = None,
        include_others: Sequence[bool] = (False, True),
        signed: Sequence[bool] | None = None,
        run: RunOptions | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Variants:
        """All ways to average this scorer's numbers, from one pass over the images.

        Args:
            inputs: As in calling the scorer, like all arguments not described here.
            targets: See there.
            tasks: See there.
            include_others: Over which images: own (False), own and other (True).
            signed: Without (False) or with the sign (True); None: both, if there is a sign.
            run: See there.
            dtype: See there.

        Returns:
            ``{(include_others, signed): {site name: (T, C)}}``; scores without a sign are under
            False, scores without images under (False, False) alone.

        Raises:
            GatingError, TypeError, ValueError: As in calling the scorer; also if a sign is asked
                for and the scorer has none.

        Example:
            >>> from nad_attr.evaluation import GradientXActivationScorer
            >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
            >>> scorer = GradientXActivationScorer(net, [GateSite("0", 2, 1)])
            >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0], [5.0, 5.0]])
            >>> found = scorer.variants(images, torch.tensor([0, 0, 1]), tasks=[0])
            >>> for (include_others, signed), scores in found.items():
            ...     print(include_others, signed, scores["0"].tolist())
            False False [[2.0, 0.0]]
            False True [[-1.0, 0.0]]
            True False [[3.5, 0.0]]
            True True [[2.0, 0.0]]
        """
        if signed is None:
            signed = (False, True) if self.has_sign else (False,)
        elif any(signed) and not self.has_sign:
            raise ValueError(
                f"the scores of {type(self).__name__} have no sign; leave out signed=."
            )
        for what, values in (("include_others", include_others), ("signed", signed)):
            if isinstance(values, bool) or not values:
                raise ValueError(f"{what} must list True, False or both, got {values!r}.")
        return self._scored(inputs, targets, tasks, include_others, signed, run, dtype)

    def _scored(
        self,
        inputs: Any,
        targets: Any,
        tasks: Sequence[Task] | None,
        include_others: Sequence[bool],
        signed: Sequence[bool],
        run: RunOptions | None,
        dtype: torch.dtype,
    ) -> Variants:
        private = self.changes_weights and as_options(run).forward_func is None
        runner = Runner(own_copy(self.model) if private else self.model, run)
        # The caller's inference mode would prevent gradients.
        with torch.inference_mode(False), torch.enable_grad(), frozen(runner.model):
            source: Source = (
                TensorSource(inputs, targets)
                if targets is not None or isinstance(inputs, Tensor)
                else _Scored(
                    inputs if hasattr(inputs, "batches") else as_source(inputs, any_labels=True)
                )
            )
            runner.fit(source)
            rows = tasks_of(source.labels, tasks)
            weights = torch.stack([_weights(source.labels, rows, both) for both in include_others])
            totals = self._totals(runner, source, rows, weights, signed)
        for name, total in totals.items():
            if not bool(torch.isfinite(total).all()):
                raise ValueError(f"the scores of gate site {name!r} are not finite.")
        return {
            (both, sign): {name: total[v, s].to(dtype) for name, total in totals.items()}
            for v, both in enumerate(include_others)
            for s, sign in enumerate(signed)
        }

    def _totals(
        self,
        runner: Runner,
        source: Source,
        tasks: Sequence[Task],
        weights: Tensor,
        signed: Sequence[bool],
    ) -> dict[str, Tensor]:
        """Weighted sums of image scores: ``{site name: float64 (V, S, T, C)}`` on the CPU.

        ``weights`` are float64 (V, T, N); ``signed`` says S times whether the sign counts.
        """
        shape = (len(weights), len(signed), len(tasks))
        totals = {
            s.name: torch.zeros(*shape, s.n_channels, device="cpu").double() for s in self.sites
        }
        sites = {site.name: site for site in self.sites}
        counts = weights.any(0)
        # Either every image that counts once, or every (task, image) pair that counts.
        if self.task_specific:
            row, image = counts.nonzero(as_tuple=True)
            if isinstance(source, _Scored):  # one image's tasks together, so that it is loaded once
                order = image.argsort(stable=True)
                row, image = row[order], image[order]
        else:
            row = torch.empty(0, dtype=torch.long, device="cpu")
            image = counts.any(0).nonzero()[:, 0]

        def as_batch(inputs: Inputs, rows: Tensor, chosen: Sequence[int]) -> Batch:
            return Batch(
                runner.model,
                inputs,
                source.labels[chosen].to(runner.device),
                [tasks[r] for r in rows.tolist()],
                partial(self._outputs, runner, source.labels, tasks),
                prepared,
                None if source.targets is None else source.targets[chosen].to(runner.device),
                runner.fixed_batch,
            )

        def probe(inputs: Inputs) -> None:
            n = len(inputs[0])
            self.image_scores(as_batch(inputs, row[:1].expand(n if len(row) else 0), [0] * n))

        whole = runner.images_per_pass(source)
        prepared = self.prepare(runner, source, whole)
        found = runner.options.batch_size == "auto"
        width = runner.images_per_pass(source, probe) if found else self.images_per_batch(whole)
        cuts = list(chunks(len(image), width))
        numbers = [image[cut[0] : cut[-1] + 1].tolist() for cut in cuts]
        once = [list(dict.fromkeys(chosen)) for chosen in numbers]
        images = runner.draw(source, once, f"scoring with {type(self).__name__}")
        for cut, chosen, drawn, inputs in zip(cuts, numbers, once, images, strict=True):
            here = row[cut[0] : cut[-1] + 1]
            if len(drawn) < len(chosen):
                places = {number: place for place, number in enumerate(drawn)}
                inputs = tuple(x[[places[number] for number in chosen]] for x in inputs)
            for name, scores in self.image_scores(as_batch(inputs, here, chosen)).items():
                # The score of a group is the signed sum over its channels.
                values = tied(scores.detach().cpu().double(), sites[name])
                for s, sign in enumerate(signed):
                    kept = values if sign or not self.has_sign else values.abs()
                    for v, weight in enumerate(weights):
                        if self.task_specific:
                            weighted = weight[here, chosen][:, None] * kept
                            totals[name][v, s].index_add_(0, here, weighted)
                        else:
                            totals[name][v, s] += weight[:, chosen] @ kept
        return totals

    @staticmethod
    def _outputs(runner: Runner, labels: Tensor, tasks: Sequence[Task], inputs: Inputs) -> Tensor:
        outputs = runner(inputs)
        check_classes(labels, tasks, outputs.shape[1])
        return outputs

    def effects(
        self,
        batch: Batch,
        objective: Callable[[Tensor], Tensor],
        reduce: Callable[[GateSite, Tensor, Tensor], Tensor],
    ) -> Scores:
        """A function of activation and gradient at every site, reduced over its positions.

        The sum over positions of activation times gradient is the derivative by a gate on that
        channel of that image, at gate 1: ``d objective / d g = sum of a d objective / d a``.

        Args:
            batch: The images.
            objective: A sum over images, of the outputs (B, K).
            reduce: Makes float64 (B, C) of a site, its activations and its gradients, each float64
                (B, C, P) with P positions.

        Returns:
            ``{site name: (B, C)}``.

        Raises:
            GatingError: If no gradient arrives at the sites.
        """
        activations: dict[str, Tensor] = {}
        shifts: dict[str, Tensor] = {}

        def function(site: GateSite, tensor: Tensor) -> Tensor:
            if len(tensor) != len(batch.labels):
                raise GatingError(
                    f"gate site {site.name!r} has {len(tensor)} rows for {len(batch.labels)} "
                    "images; axis 0 must be the images."
                )
            # A copy, which no in-place ReLU can overwrite. The gradient is read at the shift by
            # zero, for which one number is stored.
            activations[site.name] = tensor.detach().clone()
            shifts[site.name] = tensor.new_zeros(()).expand(tensor.shape).requires_grad_()
            return tensor + shifts[site.name]

        with installed(batch.model, self.sites, function):
            value = objective(batch.outputs())
            check_differentiable(value)
            # Inside, because the backward pass may run checkpointed blocks again.
            gradients = torch.autograd.grad(
                value,
                [shifts[site.name] for site in self.sites],
                allow_unused=True,
                materialize_grads=True,
            )
        # Site by site: in float64, all of them together would need most of the memory.
        return {
            site.name: reduce(site, positions(activations.pop(site.name), site), positions(g, site))
            for site, g in zip(self.sites, gradients, strict=True)
        }

    def __repr__(self) -> str:
        channels = sum(site.n_channels for site in self.sites)
        return f"{type(self).__name__}({len(self.sites)} sites, {channels:,} channels)"


class TaskScorer(ChannelScorer):
    """A scorer that uses no images; a subclass defines the score of a channel for a task.

    Images and their labels are checked as by any other scorer, and define the tasks.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Gate sites of that network, in forward order.

    Example:
        >>> class First(TaskScorer):
        ...     def task_scores(self, runner, source, tasks):
        ...         first = [-torch.arange(s.n_channels).double() for s in self.sites]
        ...         return {s.name: f.expand(len(tasks), -1) for s, f in zip(self.sites, first)}
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> First(net, [GateSite("0", 3, 1)])(torch.ones(1, 3), torch.tensor([4]))
        {'0': tensor([[-0., -1., -2.]])}
    """

    @abstractmethod
    def task_scores(self, runner: Runner, source: Source, tasks: Sequence[Task]) -> Scores:
        """The score of each channel for each task: ``{site name: float64 (T, C)}`` on the CPU."""

    def image_scores(self, batch: Batch) -> Scores:
        """Not used: there are no images."""
        raise NotImplementedError(f"{type(self).__name__} scores no images.")

    def variants(
        self,
        inputs: Any,
        targets: Any = None,
        *,
        include_others: Sequence[bool] = (False,),
        **options: Any,
    ) -> Variants:
        """The one way to score: see :meth:`ChannelScorer.variants`."""
        return super().variants(inputs, targets, include_others=include_others, **options)

    def _totals(
        self,
        runner: Runner,
        source: Source,
        tasks: Sequence[Task],
        weights: Tensor,
        signed: Sequence[bool],
    ) -> dict[str, Tensor]:
        scores = self.task_scores(runner, source, tasks)
        return {
            name: score.expand(len(weights), len(signed), *score.shape)
            for name, score in scores.items()
        }
