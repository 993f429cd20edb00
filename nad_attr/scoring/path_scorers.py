"""Attribution patching with gradients averaged along a path: EAP-IG for channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError, check_count
from nad_attr.data.sources import Inputs, Source
from nad_attr.gates.channels import n_channels, split_sites
from nad_attr.gating.hooks import gated, recorded
from nad_attr.running.forward import Runner, chunks
from nad_attr.scoring.baselines import MeansScorer
from nad_attr.scoring.scorer import Batch, Scores, check_differentiable, positions
from nad_attr.sites.site import GateSite

__all__ = ["EAPIGScorer"]

PATHS = ("activations", "gates", "inputs")


class EAPIGScorer(MeansScorer):
    """E over images of ``(a - mean)`` times the gradient averaged along a path (EAP-IG, for nodes).

    The gradient of the task output z_k is taken at ``steps`` points ``j / steps`` of the way from
    closed to whole, j = 1 to ``steps``, multiplied by the channel's change over the whole way, and
    summed over positions. If the gradient changes along the way, as behind a ReLU that closing
    switches off, this is closer to the effect of closing than
    :class:`~nad_attr.evaluation.CentredEffectScorer`, which uses only the last point.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        path: The path. ``"activations"``: the channels of one site at a time, from their means,
            ``steps`` passes for each site; with many steps each site's scores sum to the effect of
            closing the whole site. ``"gates"``: the channels of all sites at once, ``steps`` passes
            in all; the scores of all sites sum to the effect of closing all. ``"inputs"``: the
            images, from the mean image; the difference is to the activations of the mean image.
        steps: Points on the path.
        signed: Keep the sign: channels that speak against the task come last.
        means: As for :class:`~nad_attr.evaluation.CentredEffectScorer`; not used for inputs.

    Raises:
        TypeError, ValueError: If an option is out of its range, or means and sites do not fit.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU()).eval()
        >>> images = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> scorer = EAPIGScorer(net, [GateSite("0", 2, 1)], steps=4, signed=True,
        ...                      means={"0": torch.tensor([-2.0, 0.0])})
        >>> scorer(images, torch.tensor([0, 1]))["0"][0]  # 4, and half of the way (0 is not above)
        tensor([2., 0.])

    Source:
        Hanna, Pezzelle, Belinkov, "Have Faith in Faithfulness: Going Beyond Circuit Overlap When
        Finding Model Mechanisms", COLM 2024, arXiv 2403.17806 (inputs); the path of activations and
        scores of nodes: Mueller et al., "MIB", ICML 2025, arXiv 2504.13151.
    """

    has_sign = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        path: str = "activations",
        steps: int = 5,
        signed: bool = False,
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__(model, sites, means=means)
        if path not in PATHS:
            raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}.")
        self.path, self.steps, self.signed = path, check_count(steps, "steps"), signed

    @property
    def passes_per_image(self) -> int:
        """How often an image is run, forward and backward, for each task."""
        return self.steps * (len(self.sites) if self.path == "activations" else 1)

    def prepare(self, runner: Runner, source: Source, batch_size: int) -> Any:
        """The means, or the mean image."""
        if self.path != "inputs":
            return super().prepare(runner, source, batch_size)
        numbers = [list(cut) for cut in chunks(len(source.labels), batch_size)]
        total: list[Tensor] = []
        for inputs in runner.draw(source, numbers):
            if not all(x.is_floating_point() for x in inputs):
                raise GatingError(
                    "inputs that are whole numbers have no path from one image to another; "
                    "choose path='activations'."
                )
            sums = [x.double().sum(0, keepdim=True) for x in inputs]
            total = [a + b for a, b in zip(total, sums, strict=True)] if total else sums
        return [x / len(source.labels) for x in total]

    def image_scores(self, batch: Batch) -> Scores:
        """The mean over the points of the path."""
        if self.path == "inputs":
            return self._along_inputs(batch)
        groups = [[site] for site in self.sites] if self.path == "activations" else [self.sites]
        scores: Scores = {}
        for group in groups:
            for j in range(1, self.steps + 1):
                for name, score in self._at(batch, group, j / self.steps).items():
                    scores[name] = scores.get(name, 0) + score / self.steps
        return scores

    def _at(self, batch: Batch, group: Sequence[GateSite], share: float) -> Scores:
        """Derivative of the task output by the gates of some sites at a point of the path."""
        floats = (x.dtype for x in batch.inputs if x.is_floating_point())
        dtype = torch.promote_types(next(floats, torch.get_default_dtype()), torch.float32)
        shape = (len(batch.labels), n_channels(group))
        leaf = torch.full(shape, share, dtype=dtype, device=batch.labels.device).requires_grad_()
        means = {site.name: batch.prepared[site.name].to(leaf) for site in group}
        with gated(batch.model, split_sites(leaf, group), sites=group, means=means):
            explained = batch.explained(batch.outputs())
            check_differentiable(explained)
            (gradient,) = torch.autograd.grad(explained.sum(), leaf)
        return split_sites(gradient.double(), group)

    def _along_inputs(self, batch: Batch) -> Scores:
        start: Inputs = tuple(
            mean.to(x).expand_as(x) for x, mean in zip(batch.inputs, batch.prepared, strict=True)
        )
        with torch.no_grad(), recorded(batch.model, self.sites) as closed:
            batch.run(start)
        with torch.no_grad(), recorded(batch.model, self.sites) as whole:
            batch.outputs()
        scores: Scores = {}
        for j in range(1, self.steps + 1):
            inputs = tuple(
                a + (x - a) * (j / self.steps) for x, a in zip(batch.inputs, start, strict=True)
            )
            moved = Batch(batch.model, inputs, batch.labels, batch.tasks, batch.run)

            def reduce(site: GateSite, a: Tensor, gradient: Tensor) -> Tensor:
                change = positions(whole[site.name], site) - positions(closed[site.name], site)
                return (change * gradient).sum(-1)

            found = self.effects(moved, batch.summed, reduce)
            for name, score in found.items():
                scores[name] = scores.get(name, 0) + score / self.steps
        return scores
