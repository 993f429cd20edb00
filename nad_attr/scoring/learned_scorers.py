"""Gates learned for each image alone, then averaged: critical data routing paths."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.gates.channels import n_channels, split_sites
from nad_attr.gating.hooks import gated
from nad_attr.scoring.scorer import Batch, ChannelScorer, Scores, check_differentiable
from nad_attr.sites.site import GateSite

__all__ = ["CDRPScorer"]


class CDRPScorer(ChannelScorer):
    """E over images of gates that are learned for each image alone (CDRP).

    The gates of an image start at one and follow the gradient of ``cross-entropy of the gated
    network's probabilities to the whole network's + penalty * sum of gates``, limited to an
    interval that starts at zero. The scores depend on the task only by its images: for each image
    the network's own prediction is kept. Costs a forward pass, and ``steps`` forward and backward
    passes, of each image; all tasks share them.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        steps: Gradient steps.
        learning_rate: Their length.
        momentum: Share of a step that the next one keeps. Without it, 30 steps would move a gate
            that the outputs do not need by only 0.15.
        penalty: Weight of the sum of gates.
        highest: Highest gate.

    Raises:
        ValueError: If an option is out of its range.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Identity()).eval()
        >>> scorer = CDRPScorer(net, [GateSite("1", 2, 1)], steps=2, penalty=0.0)
        >>> scorer(torch.ones(2, 2), torch.tensor([0, 1]))  # nothing to gain
        {'1': tensor([[1., 1.], [1., 1.]])}

    Source:
        Wang et al., "Interpret Neural Networks by Identifying Critical Data Routing Paths", CVPR
        2018 (distillation guided routing).
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        steps: int = 30,
        learning_rate: float = 0.1,
        momentum: float = 0.9,
        penalty: float = 0.05,
        highest: float = 10.0,
    ) -> None:
        super().__init__(model, sites)
        check_count(steps, "steps")
        for what, value, low, high in (
            ("learning_rate", learning_rate, 0.0, float("inf")),
            ("momentum", momentum, 0.0, 1.0),
            ("penalty", penalty, 0.0, float("inf")),
            ("highest", highest, 1.0, float("inf")),
        ):
            if not low <= value < high:
                raise ValueError(f"{what} must be from {low:g} on and below {high:g}, got {value}.")
        self.steps, self.learning_rate, self.momentum = steps, learning_rate, momentum
        self.penalty, self.highest = penalty, highest

    def image_scores(self, batch: Batch) -> Scores:
        """The gates after the last step."""
        with torch.no_grad():
            target = batch.outputs().softmax(1)
        gates = target.new_ones(len(target), n_channels(self.sites))
        velocity = torch.zeros_like(gates)
        for _ in range(self.steps):
            velocity = self.momentum * velocity + self._gradient(batch, gates, target)
            gates = (gates - self.learning_rate * velocity).clamp(0, self.highest)
        return split_sites(gates, self.sites)

    def _gradient(self, batch: Batch, gates: Tensor, target: Tensor) -> Tensor:
        leaf = gates.detach().requires_grad_()
        with gated(batch.model, split_sites(leaf, self.sites), sites=self.sites):
            outputs = batch.outputs()
            check_differentiable(outputs)
            # A sum over images: each image's gates have its own loss's gradient.
            loss = -(target * outputs.log_softmax(1)).sum()
            (gradient,) = torch.autograd.grad(loss, leaf)
        return gradient + self.penalty
