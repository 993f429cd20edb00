"""Other ways to rank a network's channels for a task: baselines for learned gates.

They need only the network. :func:`top_k` makes sub-architectures of the highest scores at exactly
the size of the learned ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import check_mapping
from nad_attr.data.labels import Task
from nad_attr.data.sources import Source
from nad_attr.gates.channels import budget, check_means, split_sites, top_k_masks
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import recorded
from nad_attr.gating.means import channel_means
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.outputs import label_loss
from nad_attr.scoring.scorer import Batch, ChannelScorer, Scores, TaskScorer, positions, tasks_of
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import seed_of

__all__ = [
    "Batch",
    "CentredEffectScorer",
    "ChannelScorer",
    "EnergyScorer",
    "GradientXActivationScorer",
    "MeansScorer",
    "NeuronMCTScorer",
    "RandomScorer",
    "TaskScorer",
    "TaylorOutputScorer",
    "TaylorScorer",
    "positions",
    "tasks_of",
    "top_k",
]


class RandomScorer(TaskScorer):
    """Uniform random numbers: random sub-architectures of the same size.

    A task's numbers depend on the seed and the task alone, not on the other tasks, their order, or
    the images.

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

    def task_scores(self, runner: Runner, source: Source, tasks: Sequence[Task]) -> Scores:
        """Uniform in [0, 1)."""
        return random_scores(self.sites, tasks, "RandomScorer", self.seed)


def random_scores(sites: Sequence[GateSite], tasks: Sequence[Task], *key: object) -> Scores:
    """Uniform numbers in [0, 1) for each task and channel, a function of the key and the task."""
    n = sum(site.n_channels for site in sites)
    draws = []
    for task in tasks:
        generator = torch.Generator().manual_seed(seed_of(*key, task))
        draws.append(torch.rand(n, generator=generator, dtype=torch.float64, device="cpu"))
    return split_sites(torch.stack(draws), sites)


class EnergyScorer(ChannelScorer):
    """E[x^2] over images and positions: channels that are active on the task's images.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> EnergyScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[5., 2.]])}
    """

    def image_scores(self, batch: Batch) -> Scores:
        """Mean square over positions."""
        with torch.no_grad(), recorded(batch.model, self.sites) as activations:
            batch.outputs()
        return {
            site.name: positions(activations[site.name], site).square().mean(-1)
            for site in self.sites
        }


class TaylorScorer(ChannelScorer):
    """E[(g dL/dg)^2]: the first-order change of the loss when a channel is closed, squared.

    ``g = 1`` is a gate on one channel of one image, and L the loss of the network's outputs on that
    image's own labels (cross-entropy of classes, see
    :func:`nad_attr.running.outputs.label_loss`), so ``g dL/dg = sum over positions of a dL/da``.
    The mean is over images (Molchanov et al., "Importance Estimation for Neural Network Pruning",
    CVPR 2019, equation 8, with the gate after the layer).

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[0.0, 0.0], [4.0, 4.0]])
        >>> TaylorScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 2.]])}
    """

    def image_scores(self, batch: Batch) -> Scores:
        """Square of the derivative of the image's loss by the gate."""
        return self.effects(
            batch,
            lambda outputs: label_loss(outputs, batch.labels, batch.targets),
            lambda site, a, gradient: (a * gradient).sum(-1).square(),
        )


class GradientXActivationScorer(ChannelScorer):
    """E over images of the sum over positions of ``a dz_k/da``, with z_k the task output.

    Signed by default: channels that speak against the task come last.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        signed: False: the absolute value of each image's sum, which is :class:`NeuronMCTScorer`.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> GradientXActivationScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[-1., 0.]])}
    """

    task_specific = True
    has_sign = True

    def __init__(self, model: nn.Module, sites: Sequence[GateSite], *, signed: bool = True) -> None:
        super().__init__(model, sites)
        self.signed = signed

    def image_scores(self, batch: Batch) -> Scores:
        """Sum over positions of the product."""
        return self.effects(batch, batch.summed, lambda site, a, gradient: (a * gradient).sum(-1))


class NeuronMCTScorer(GradientXActivationScorer):
    """E over images of ``|sum over positions of a dz_k/da|``, with z_k the task output.

    The marginal contribution of a channel as a whole to the task output, to first order, as in
    Khakzar et al., "Neural Response Interpretation through the Lens of Critical Pathways", CVPR
    2021 (NeuronMCT). The absolute value is taken for each image, so both signs count. Taken at each
    position instead, it scores channels of large maps too low and was clearly the weaker rival.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> NeuronMCTScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 0.]])}
    """

    def __init__(self, model: nn.Module, sites: Sequence[GateSite]) -> None:
        super().__init__(model, sites, signed=False)


class TaylorOutputScorer(ChannelScorer):
    """E over images of ``(sum over positions of a dz_k/da)^2``, with z_k the task output.

    This is :class:`TaylorScorer` with the task output in place of the loss, which hardly changes on
    images that the network is sure of. :class:`NeuronMCTScorer` is the same with the absolute
    value; the square gives more weight to the images on which a channel has most effect.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> TaylorOutputScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[5., 0.]])}
    """

    task_specific = True

    def image_scores(self, batch: Batch) -> Scores:
        """Square of the derivative of the task output by the gate."""
        return self.effects(
            batch, batch.summed, lambda site, a, gradient: (a * gradient).sum(-1).square()
        )


class MeansScorer(ChannelScorer):
    """A scorer of closing channels at their means; a subclass defines the score of one image.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        means: ``{site name: (C,)}``, the values of closed channels. None: over all images that the
            scorer is called with, which takes one more forward pass of each.

    Raises:
        TypeError, ValueError: If means and sites do not fit.
    """

    task_specific = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, sites)
        self.means = check_means(means, self.sites)

    def prepare(self, runner: Runner, source: Source, batch_size: int) -> Any:
        """The means."""
        if self.means is not None:
            return {name: mean.double() for name, mean in self.means.items()}
        numbers = [list(cut) for cut in chunks(len(source.labels), batch_size)]
        draws = runner.draw(source, numbers)
        return channel_means(runner.model, self.sites, draws, forward=lambda *x: runner(x))


class CentredEffectScorer(MeansScorer):
    """E over images of ``|sum over positions of (a - mean) dz_k/da|``: attribution patching.

    The first-order change of the task output z_k when a channel is replaced by its mean;
    :class:`NeuronMCTScorer` replaces it by zero. It is exact for single channels if the network is
    linear after the site. It is the strongest of the cheap scores if closed channels are at their
    mean.

    The first-order effect of patching an activation: Nanda, "Attribution Patching", 2023; Syed et
    al., "Attribution Patching Outperforms Automated Circuit Discovery", 2023 (arXiv 2310.10348).
    The gate's derivative in mean ablation: ``d z_k / d g`` at ``x' = g x + (1 - g) mean``.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        signed: Keep the sign: channels that speak against the task come last.
        means: ``{site name: (C,)}``, the values of closed channels. None: over all images that the
            scorer is called with, which takes one more forward pass of each.

    Raises:
        TypeError, ValueError: If means and sites do not fit.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> CentredEffectScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 0.]])}
    """

    has_sign = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        signed: bool = False,
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, sites, means=means)
        self.signed = signed

    def image_scores(self, batch: Batch) -> Scores:
        """Sum over positions of the difference to the mean times the gradient."""
        means: Mapping[str, Tensor] = batch.prepared

        def reduce(site: GateSite, a: Tensor, gradient: Tensor) -> Tensor:
            return ((a - means[site.name].to(a.device)[:, None]) * gradient).sum(-1)

        return self.effects(batch, batch.summed, reduce)


def check_scores(
    scores: Mapping[str, Tensor], sites: Sequence[GateSite], tasks: Sequence[Task]
) -> list[Task]:
    """Check that there is one score for each task and channel, and return the tasks."""
    rows = tasks_of(torch.empty(0, device="cpu"), tasks)
    check_mapping(scores, "scores")
    missing = {site.name for site in sites} ^ set(scores)
    if missing:
        raise ValueError(f"scores and sites do not name the same: {sorted(missing)}.")
    for site in sites:
        score = scores[site.name]
        if not isinstance(score, Tensor):
            raise TypeError(f"scores of {site.name!r} are not a tensor.")
        if tuple(score.shape) != (len(rows), site.n_channels):
            raise ValueError(
                f"scores of {site.name!r} have shape {tuple(score.shape)}, not (tasks, channels) "
                f"= {(len(rows), site.n_channels)}."
            )
        if bool(score.isnan().any()):
            raise ValueError(f"scores of {site.name!r} hold NaN.")
    return rows


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
        means: ``{site name: (C,)}``, the values of closed channels; None: zero.
        per_site: Keep this share at each site, rather than of all channels together. It shows how
            much of a score is in how it spreads channels over the sites.

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
    rows = check_scores(scores, sites, tasks)
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
