"""Other ways to rank a network's channels for a task: what learned gates have to beat.

A scorer gives each channel a number per task; :func:`top_k` makes sub-architectures of the highest
at exactly the size of the learned ones. A new scorer says what one image gives each channel
(:meth:`ChannelScorer.image_scores`); which images count for which task, and how much, is the base
class's work.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr.architecture import SubArchitecture, budget, split_sites, top_k_masks
from nad_attr.data import Inputs, Source, TensorSource, seed_of
from nad_attr.evaluation.measures import own_images
from nad_attr.gates import Task, as_task
from nad_attr.gating import (
    GatingError,
    channel_shape,
    check_mapping,
    check_sites,
    frozen,
    installed,
    recorded,
    site_modules,
)
from nad_attr.objective import task_outputs
from nad_attr.running import Runner, check_batch_size, check_classes, chunks
from nad_attr.sites import GateSite

__all__ = [
    "Batch",
    "ChannelScorer",
    "EnergyScorer",
    "GradientXActivationScorer",
    "NeuronMCTScorer",
    "RandomScorer",
    "TaylorScorer",
    "tasks_of",
    "top_k",
]


def tasks_of(targets: Any, tasks: Sequence[Task] | None = None) -> list[Task]:
    """The tasks that a scorer's rows stand for: as given, or the sorted different targets.

    Raises:
        TypeError: If a task is no class index or group of them.
        ValueError: If a task is there twice, or there is none.

    Example:
        >>> tasks_of(torch.tensor([2, 0, 2])), tasks_of(torch.tensor([2, 0, 2]), [(0, 2), 2])
        ([0, 2], [(0, 2), 2])
    """
    chosen = torch.as_tensor(targets).unique().tolist() if tasks is None else tasks
    if isinstance(chosen, (str, bytes, Mapping, int)):
        raise TypeError(f"tasks must be a sequence of tasks, not {type(chosen).__name__}.")
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


@dataclass(frozen=True)
class Batch:
    """Images to score, and the network to run them through.

    Attributes:
        model: The network, to put hooks on.
        inputs: The network's inputs.
        labels: int64 (B,), the images' own classes.
        tasks: The B tasks that the images are scored for; empty for a scorer whose scores do not
            depend on the task.
        outputs: Runs the network: float (B, K), checked, with its graph.
    """

    model: nn.Module
    inputs: Inputs
    labels: Tensor
    tasks: list[Task]
    outputs: Callable[[], Tensor]

    def explained(self, outputs: Tensor) -> Tensor:
        """The task output of each image for the task it is scored for, (B,)."""
        different = list(dict.fromkeys(self.tasks))
        column = torch.tensor([different.index(task) for task in self.tasks])
        column = column.to(outputs.device)
        return task_outputs(outputs, different).gather(1, column[:, None])[:, 0]


class ChannelScorer(ABC):
    """Scores the channels of a network for each task; a subclass says what one image gives.

    The score of a task is the mean of :meth:`image_scores` over its own images, or with
    ``include_others`` over own and other images in equal parts. Means are taken in float64, so
    that neither the order of the images nor the batch size matters.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Gate sites of that network, in forward order.

    Raises:
        SiteError: If the network has no such site.
        ValueError: If there are no sites.

    Example:
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
    task_specific: ClassVar[bool] = False

    def __init__(self, model: nn.Module, sites: Sequence[GateSite]) -> None:
        self.model = model
        self.sites = check_sites(sites)
        if not self.sites:
            raise ValueError("there is no gate site to score the channels of.")
        site_modules(model, self.sites)

    @abstractmethod
    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """What each image gives each channel: ``{site name: (B, C)}``, images by themselves.

        Called with gradients enabled and the network's parameters frozen.
        """

    def __call__(
        self,
        inputs: Any,
        targets: Any,
        *,
        tasks: Sequence[Task] | None = None,
        include_others: bool = False,
        batch_size: int = 64,
        device: torch.device | str | None = None,
        forward_func: Callable[..., Any] | None = None,
        additional_forward_args: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> dict[str, Tensor]:
        """Score all channels.

        Args:
            inputs: The network's input or tuple of inputs, axis 0 = N images.
            targets: int (N,), the images' own classes.
            tasks: T class indices or groups of them; None: the sorted different targets (see
                :func:`tasks_of`).
            include_others: Take the mean over own and other images in equal parts, not over own
                images only.
            batch_size: Images in a forward (and backward) pass, at most.
            device: Where to run. None: where the network is. Elsewhere, a copy of it is used.
            forward_func: Called with the inputs in place of the network; has to run the network.
                Returns (B, K), one output per class.
            additional_forward_args: Further arguments of every call, the same for all images.
            dtype: Of the result.

        Returns:
            ``{site name: (T, C)}`` on the CPU, rows in the order of the tasks.

        Raises:
            GatingError: If a site does not fire, fires twice or has another shape.
            TypeError: If an argument is of a wrong kind.
            ValueError: If the network is in train mode, shapes do not fit, values are not finite,
                targets or tasks are no class of the network, or a task has no own (or, where
                they count, no other) images.
        """
        runner = Runner(
            self.model,
            device=device,
            forward_func=forward_func,
            additional_forward_args=additional_forward_args,
        )
        # A caller's inference mode would leave nothing to differentiate.
        with torch.inference_mode(False), torch.enable_grad(), frozen(runner.model):
            source = TensorSource(inputs, targets)
            rows = tasks_of(source.labels, tasks)
            weights = self._weights(source.labels, rows, include_others)
            check_batch_size(batch_size)
            totals = self._totals(runner, source, rows, weights, batch_size)
        for name, total in totals.items():
            if not bool(torch.isfinite(total).all()):
                raise ValueError(f"the scores of gate site {name!r} are not finite.")
        return {name: total.to(dtype) for name, total in totals.items()}

    def _weights(self, labels: Tensor, tasks: Sequence[Task], include_others: bool) -> Tensor:
        """How much each image counts for each task: float64 (T, N), rows sum to one."""
        own = own_images(labels, tasks)
        parts = [(own, "own")]
        if include_others:
            parts.append((~own, "other"))
        weights = torch.zeros(own.shape, dtype=torch.float64)
        for part, what in parts:
            for task, has in zip(tasks, part.any(-1).tolist(), strict=True):
                if not has:
                    raise ValueError(f"there is no {what} image for task {task} among the inputs.")
            weights += part / part.sum(-1, keepdim=True, dtype=torch.float64) / len(parts)
        return weights

    def _totals(
        self,
        runner: Runner,
        source: Source,
        tasks: Sequence[Task],
        weights: Tensor,
        batch_size: int,
    ) -> dict[str, Tensor]:
        """The weighted sums of image scores, ``{site name: float64 (T, C)}`` on the CPU."""
        totals = {
            s.name: torch.zeros(len(tasks), s.n_channels, dtype=torch.float64) for s in self.sites
        }
        # Either every image that counts once, or every (task, image) pair that counts.
        if self.task_specific:
            row, image = weights.nonzero(as_tuple=True)
        else:
            row, image = torch.empty(0, dtype=torch.long), weights.any(0).nonzero()[:, 0]
        cuts = list(chunks(len(image), batch_size))
        numbers = [image[cut[0] : cut[-1] + 1].tolist() for cut in cuts]
        for cut, chosen, inputs in zip(cuts, numbers, runner.draw(source, numbers), strict=True):
            here = row[cut[0] : cut[-1] + 1]
            batch = Batch(
                runner.model,
                inputs,
                source.labels[chosen].to(runner.device),
                [tasks[r] for r in here.tolist()],
                partial(self._outputs, runner, inputs, source.labels, tasks),
            )
            for name, scores in self.image_scores(batch).items():
                values = scores.detach().cpu().double()
                if self.task_specific:
                    weight = weights[here, chosen][:, None]
                    totals[name].index_add_(0, here, weight * values)
                else:
                    totals[name] += weights[:, chosen] @ values
        return totals

    @staticmethod
    def _outputs(runner: Runner, inputs: Inputs, labels: Tensor, tasks: Sequence[Task]) -> Tensor:
        outputs = runner(inputs)
        check_classes(labels, tasks, outputs.shape[1])
        return outputs

    def products(
        self,
        batch: Batch,
        objective: Callable[[Tensor], Tensor],
        reduce: Callable[[Tensor], Tensor],
    ) -> dict[str, Tensor]:
        """Activation times gradient at every site, reduced over its positions.

        Summed over its positions, a channel's product is the derivative by a gate on that channel
        of that image, at gate 1: ``d objective / d g = sum over positions of a d objective / d a``.

        Args:
            batch: The images.
            objective: Of the outputs (B, K), a number that is a sum over images.
            reduce: Makes float64 (B, C) of a site's products, float64 (B, C, P) with P positions.

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
            # A copy, which no in-place ReLU can overwrite. The shift by zero is where the gradient
            # is read; one number is stored for all of it.
            activations[site.name] = tensor.detach().clone()
            shifts[site.name] = tensor.new_zeros(()).expand(tensor.shape).requires_grad_()
            return tensor + shifts[site.name]

        with installed(batch.model, self.sites, function):
            value = objective(batch.outputs())
        if not value.requires_grad:
            raise GatingError(
                "no gradient leads from the outputs back to the gate sites: the network (or "
                "forward_func) detaches them, or runs without gradients itself."
            )
        gradients = torch.autograd.grad(
            value,
            [shifts[site.name] for site in self.sites],
            allow_unused=True,
            materialize_grads=True,
        )
        # Site by site: in float64, all products together would be the largest thing in memory.
        return {
            site.name: reduce(positions(activations.pop(site.name), site) * positions(grad, site))
            for site, grad in zip(self.sites, gradients, strict=True)
        }

    def __repr__(self) -> str:
        channels = sum(site.n_channels for site in self.sites)
        return f"{type(self).__name__}({len(self.sites)} sites, {channels:,} channels)"


class RandomScorer(ChannelScorer):
    """Uniform random numbers: what a sub-architecture of the same size is worth by itself.

    A task's numbers depend on the seed and the task alone, not on which other tasks are scored, in
    what order, or on the images.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        seed: Another draw for each seed.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> scorer = RandomScorer(net, [GateSite("0", 4, 1)], seed=3)
        >>> scorer(torch.ones(2, 4), torch.tensor([0, 1]))["0"].shape
        torch.Size([2, 4])
    """

    def __init__(self, model: nn.Module, sites: Sequence[GateSite], *, seed: int = 0) -> None:
        super().__init__(model, sites)
        self.seed = seed

    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Nothing: images play no part."""
        return {s.name: torch.zeros(len(batch.labels), s.n_channels) for s in self.sites}

    def _totals(
        self,
        runner: Runner,
        source: Source,
        tasks: Sequence[Task],
        weights: Tensor,
        batch_size: int,
    ) -> dict[str, Tensor]:
        n = sum(site.n_channels for site in self.sites)
        draws = []
        for task in tasks:
            generator = torch.Generator().manual_seed(seed_of("RandomScorer", self.seed, task))
            draws.append(torch.rand(n, generator=generator, dtype=torch.float64))
        return split_sites(torch.stack(draws), self.sites)


class EnergyScorer(ChannelScorer):
    """E[x^2] over images and positions: channels that are active on the task's images.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> EnergyScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[5., 2.]])}
    """

    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Mean square over positions."""
        with torch.no_grad(), recorded(batch.model, self.sites) as activations:
            batch.outputs()
        return {
            site.name: positions(activations[site.name], site).square().mean(-1)
            for site in self.sites
        }


class TaylorScorer(ChannelScorer):
    """E[(g dL/dg)^2]: the first-order change of the loss when a channel is closed, squared.

    ``g = 1`` is a gate on one channel of one image, and L the cross-entropy of the network's
    outputs on that image's own label, so ``g dL/dg = sum over positions of a dL/da``. The mean is
    over images (Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019,
    equation 8, with the gate after the layer).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
        >>> TaylorScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 2.]])}
    """

    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Square of the derivative of the image's loss by the gate."""
        return self.products(
            batch,
            lambda outputs: F.cross_entropy(outputs, batch.labels, reduction="sum"),
            lambda product: product.sum(-1).square(),
        )


class GradientXActivationScorer(ChannelScorer):
    """E over images of the sum over positions of ``a dz_k/da``, with z_k the task output.

    Signed: channels that speak against the task come last (:class:`NeuronMCTScorer` takes the
    absolute value).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> GradientXActivationScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[-1., 0.]])}
    """

    task_specific = True

    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Sum over positions of the product."""
        return self.products(
            batch,
            lambda outputs: batch.explained(outputs).sum(),
            lambda product: product.sum(-1),
        )


class NeuronMCTScorer(GradientXActivationScorer):
    """E over images of ``|sum over positions of a dz_k/da|``, with z_k the task output.

    The marginal contribution of a channel as a whole to the task output, to first order, as in
    Khakzar et al., "Neural Response Interpretation through the Lens of Critical Pathways", CVPR
    2021 (NeuronMCT). The absolute value is taken for each image, so channels count that speak for
    or against the task. Taking it at each position instead scores channels of large maps too low
    and was clearly the weaker rival.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> NeuronMCTScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 0.]])}
    """

    def image_scores(self, batch: Batch) -> dict[str, Tensor]:
        """Absolute value of the sum over positions."""
        return {name: total.abs() for name, total in super().image_scores(batch).items()}


def top_k(
    scores: Mapping[str, Tensor],
    sites: Sequence[GateSite],
    tasks: Sequence[Task],
    size: float,
    *,
    means: Mapping[str, Tensor] | None = None,
    per_site: bool = False,
) -> list[SubArchitecture]:
    """The sub-architectures of the highest-scored channels, at exactly the wanted size.

    Args:
        scores: ``{site name: (T, C)}``, higher = more important.
        sites: Gate sites in forward order.
        tasks: The T tasks, in the order of the scores' rows (:func:`tasks_of`).
        size: Share of the channels to keep, in (0, 1].
        means: ``{site name: (C,)}``, what replaces a closed channel; None: zero.
        per_site: Keep this share at each site, rather than of all channels together. Says how
            much of a score lies in how it spreads channels over the sites.

    Returns:
        T sub-architectures; equal scores are kept in site and channel order.

    Raises:
        ValueError: If scores, sites and tasks do not fit, scores hold NaN, or the size is not in
            (0, 1].

    Example:
        >>> sites = [GateSite("a", 2, 1), GateSite("b", 2, 1)]
        >>> scores = {"a": torch.tensor([[4.0, 3.0]]), "b": torch.tensor([[1.0, 2.0]])}
        >>> [arch] = top_k(scores, sites, [7], 0.5)
        >>> arch.sizes
        {'a': 1.0, 'b': 0.0}
        >>> [arch] = top_k(scores, sites, [7], 0.5, per_site=True)
        >>> arch.sizes
        {'a': 0.5, 'b': 0.5}
    """
    rows = tasks_of(torch.empty(0), tasks)
    check_mapping(scores, "scores")
    missing = {site.name for site in sites} ^ set(scores)
    if missing:
        raise ValueError(f"scores and sites do not name the same: {sorted(missing)}.")
    for site in sites:
        score = scores[site.name]
        if not isinstance(score, Tensor):
            raise TypeError(f"scores of {site.name!r} are no tensor.")
        if tuple(score.shape) != (len(rows), site.n_channels):
            raise ValueError(
                f"scores of {site.name!r} have shape {tuple(score.shape)}, not (tasks, channels) "
                f"= {(len(rows), site.n_channels)}."
            )
        if bool(score.isnan().any()):
            raise ValueError(f"scores of {site.name!r} hold NaN.")
    groups = [[site] for site in sites] if per_site else [list(sites)]
    masks: dict[str, Tensor] = {}
    for group in groups:
        masks |= top_k_masks({s.name: scores[s.name] for s in group}, group, budget(size, group))
    return [
        SubArchitecture(
            {name: mask[row] for name, mask in masks.items()}, sites, task=task, means=means
        )
        for row, task in enumerate(rows)
    ]
