"""Gates and best constants learned together: what stands in place of a closed channel is fitted.

A closed channel is replaced by a constant, one number for each task, which can carry nothing of the
image. The mean over data is one such number; the best is the one with which the task output is kept
(optimal ablation). The Gauss-Newton model of :mod:`nad_attr.learning.selection` gets a further
coordinate for each channel. With m_c the channel's mean, s_c its deviation, g the gradient of image
i's task output at the site, one backward pass gives

    S_ic = sum over positions of g (x - m_c)      closing channel c at its mean takes this away
    G_ic = s_c * sum over positions of g          its constant m_c + s_c b_c adds b_c of this

Let q_i be what the task output would lack of the whole network's if all closed channels C were at
their mean. Constants b with a normal prior of deviation PRIOR around the mean then leave

    min over b of sum_i w_i (q_i + sum over C of G_ic b_c)^2 + |b|^2 / d  =  q' P q,
    P = (W^-1 + d G_C G_C')^-1,      d = PRIOR^2 * images / mean squared residual

which is the loss of the quadratic model in another metric. So channels are chosen by what *no
constant explains*: the residuals and effects of the quadratic model are multiplied by a root of P,
and a channel's effect is taken less what its own constant would make good. Then the constants go to
the minimum, where each is held back by where it is now as well, as if a step moved it by MOVE.

Source: Li and Janson, "Optimal ablation for interpretability", NeurIPS 2024, arXiv 2409.09951.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from nad_attr.gates.channels import budget, n_channels
from nad_attr.gates.recipe import Recipe
from nad_attr.learning.engine import Chunk, Learned
from nad_attr.learning.selection import (
    MIN_VARIANCE,
    QuadraticModel,
    budgets,
    drawn,
    flip_round,
    ranked,
    steps_in_memory,
)

__all__ = ["ConstantModel", "learn_with_constants"]

#: How far constants are from the mean, in the channel's own deviations: the prior's deviation.
PRIOR = 1.0
#: The same of what one step moves them by: gradients are good for a small change only.
MOVE = 0.2
#: What each closed channel is charged of its own squared effect, for as long as it is closed, in
#: units of the share of the channels' correlations that is noise: what channels do together is
#: shrunk towards what each does alone. More than that share itself, because gradients of earlier
#: steps, at one point, err as well.
SHRINK = 8.0
#: Mean squared residual that is reckoned with, at least, in units of the task output's variance.
FLOOR = 0.01


def noise_share(effects: Tensor, n_images: Tensor) -> Tensor:
    """Share of the squared correlations between channels that so few images make by chance: (R,).

    The best weight with which to shrink a correlation matrix towards the unit matrix.

    Args:
        effects: (R, M, n), weighted so that a sum over images is a mean.
        n_images: (R,), how many images that is worth.

    Source: Schaefer and Strimmer, "A shrinkage approach to large-scale covariance matrix
    estimation", Statistical Applications in Genetics and Molecular Biology 2005.
    """
    norms = effects.square().sum(1, keepdim=True)
    unit = effects / norms.clamp(min=MIN_VARIANCE).sqrt()
    squares = unit.square()
    n = (squares.sum(1) > 0.5).sum(1)
    gram = torch.bmm(unit, unit.mT)
    # sum over pairs j != k of (sum_i u_ij u_ik)^2, and of sum_i (u_ij u_ik)^2
    total = gram.square().sum((1, 2)) - n
    fourth = squares.sum(2).square().sum(1) - squares.square().sum((1, 2))
    noise = fourth - total / n_images
    return (noise / total.clamp(min=MIN_VARIANCE)).clamp(0, 1)


class ConstantModel:
    """Effects of channels and of their constants, from recent gradients.

    Args:
        like: (R, n), says how many tasks and channels, dtype and device.
        capacity: M, images kept.

    Attributes:
        effects: S, (R, M, n).
        slopes: G, (R, M, n), in units of the channels' deviations.
        residuals: q, (R, M), with closed channels at their mean.
    """

    def __init__(self, like: Tensor, capacity: int) -> None:
        rows, n = like.shape
        self.effects = like.new_zeros(rows, capacity, n)
        self.slopes = like.new_zeros(rows, capacity, n)
        self.residuals = like.new_zeros(rows, capacity)
        self._next = 0

    def add(self, residuals: Tensor, effects: Tensor, slopes: Tensor) -> None:
        """Take in images: (R, b), (R, b, n) and (R, b, n); the oldest make room."""
        b, capacity = residuals.shape[1], self.residuals.shape[1]
        at = (torch.arange(b, device=residuals.device) + self._next) % capacity
        self.effects[:, at], self.slopes[:, at] = effects, slopes
        self.residuals[:, at] = residuals
        self._next = (self._next + b) % capacity

    def present(self, gates: Tensor, constants: Tensor) -> Tensor:
        """The residuals with closed channels at their constants: (R, M)."""
        closed = (1 - gates) * constants
        return self.residuals + torch.bmm(self.slopes, closed[:, :, None])[:, :, 0]

    def root(self, gates: Tensor, shares: Tensor, freedom: Tensor) -> Tensor:
        """L with L L' = 1 + d W^1/2 G_C G_C' W^1/2: (R, M, M).

        L^-1 W^1/2 is the root of the metric P.
        """
        closed = self.slopes * (1 - gates)[:, None, :] * shares.sqrt()[:, :, None]
        inner = torch.bmm(closed, closed.mT) * freedom[:, None, None]
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        root: Tensor = torch.linalg.cholesky(inner)
        return root

    def quadratic(
        self, gates: Tensor, shares: Tensor, freedom: Tensor, residuals: Tensor, trust: float
    ) -> QuadraticModel:
        """The quadratic model of what no constant explains, ready for a round of flips.

        Args:
            gates: (R, n).
            shares: (R, M), how much each image counts.
            freedom: d, (R,).
            residuals: (R, M), with closed channels at their mean.
            trust: See :class:`QuadraticModel`.
        """
        root, weight = self.root(gates, shares, freedom), shares.sqrt()[:, :, None]

        def seen(values: Tensor) -> Tensor:
            found: Tensor = torch.linalg.solve_triangular(root, values * weight, upper=False)
            return found

        effects, slopes = seen(self.effects), seen(self.slopes)
        # Of a channel that is still open, its own constant will make good this much.
        own = (effects * slopes).sum(1) / (1 / freedom[:, None] + slopes.square().sum(1)) * gates
        effects -= slopes * own[:, None, :]
        shrink = SHRINK * noise_share(effects, 1 / shares.square().sum(1))[:, None]
        model = QuadraticModel(gates, 1, trust, shrink=shrink)
        model.gradients, model.residuals = effects, seen(residuals[:, :, None])[:, :, 0]
        model.begin(torch.ones_like(shares))
        return model

    def best(
        self, gates: Tensor, shares: Tensor, freedom: Tensor, residuals: Tensor, now: Tensor
    ) -> Tensor:
        """Where constants go from where they are: (R, n), zero for open channels.

        Args:
            gates: (R, n).
            shares: (R, M).
            freedom: d, (R,).
            residuals: (R, M), with closed channels at their mean.
            now: (R, n).
        """
        # Two pulls, to the mean and to where they are, are one to a point between the two.
        ratio = (PRIOR / MOVE) ** 2
        closed = 1 - gates
        start = now * closed * (ratio / (1 + ratio))
        left = residuals + torch.bmm(self.slopes, start[:, :, None])[:, :, 0]
        freedom = freedom / (1 + ratio)
        weight = shares.sqrt()[:, :, None]
        # As many equations as images, not as there are channels.
        solved = torch.cholesky_solve(weight * left[:, :, None], self.root(gates, shares, freedom))
        change = torch.bmm(self.slopes.mT, weight * solved)[:, :, 0]
        return start - freedom[:, None] * change * closed


def learn_with_constants(
    chunk: Chunk,
    recipe: Recipe,
    sizes: Sequence[float],
    means: Tensor,
    deviations: Tensor,
    masks: Tensor | None = None,
) -> list[Learned]:
    """Learn gates and constants of a chunk of tasks.

    Args:
        chunk: The tasks.
        recipe: The recipe; its own size plays no part.
        sizes: See :func:`nad_attr.learning.selection.learn_selection`.
        means: (n,), of the channels.
        deviations: (n,), of the channels.
        masks: (R, n) of zeros and ones: keep these channels and fit constants alone; None: learn
            the gates as well.

    Returns:
        As :func:`nad_attr.learning.selection.learn_selection`, with the constants.
    """
    network = chunk.network
    rows, n = len(chunk), n_channels(network.sites)
    like = torch.ones(rows, n, device=network.device, dtype=network.dtype)
    gates = like if masks is None else masks.to(like)
    path = (
        [[n] * recipe.steps]
        if masks is not None
        else (budgets(recipe, n, [budget(size, network.sites) for size in sizes]))
    )
    steps = [open_after for part in path for open_after in part]
    ends = set(itertools.accumulate(map(len, path)))
    per_task = recipe.images_per_step
    capacity = steps_in_memory(recipe) * per_task
    constants = torch.zeros_like(like)
    closed_at = torch.full_like(like, -1.0)
    beside = [bool(len(images.pools["other"])) for images in chunk.images]
    # Outputs, present residuals and ages of images alone.
    outputs = QuadraticModel(like[:, :1], capacity, 0.0, recipe.boundary * like.new_tensor(beside))
    model = ConstantModel(like, capacity)
    curves: dict[str, list[Tensor]] = {"loss": [], "size": []}
    learned: list[Learned] = []
    n_open = n
    for t, batch in enumerate(chunk.batches(drawn(chunk, recipe))):
        clean = chunk.own_output(chunk.clean(batch), batch.rows)
        output, effects, slopes = network.output_and_gradients(
            batch.inputs,
            gates[batch.rows],
            (means + deviations * constants)[batch.rows],
            chunk.classes[batch.rows],
            chunk.valid[batch.rows],
        )
        slopes = slopes * deviations
        moved = constants[batch.rows] * slopes
        residual = output - clean
        at_mean = residual - ((1 - gates[batch.rows]) * moved).sum(1)

        def by_row(values: Tensor, places: Tensor = batch.places) -> Tensor:
            return values[places].view(rows, per_task, *values.shape[1:])

        outputs.age(recipe.memory)
        outputs.add(by_row(clean), by_row(residual), like.new_zeros(rows, per_task, 1))
        model.add(by_row(at_mean), by_row(effects + moved), by_row(slopes))
        seen = min((t + 1) * per_task, capacity)
        variance = outputs.whole[:, :seen].var(dim=1, correction=0).clamp(min=MIN_VARIANCE)
        if steps[t] < n or t + 1 in ends or masks is not None:
            outputs.residuals = model.present(gates, constants)
            shares = outputs.shares()
            forgiven = outputs.forgiven(recipe.free_scale, shares)
            loss = (shares * (outputs.residuals - forgiven).square()).sum(1)
            n_images = 1 / shares.square().sum(1)
            freedom = PRIOR**2 * n_images / torch.maximum(loss, FLOOR * variance)
            if masks is None:
                before = gates
                part = model.quadratic(
                    gates, shares, freedom, model.residuals - forgiven, recipe.trust
                )
                flip_round(part, recipe, t, n_open, steps[t], variance)
                gates, n_open = part.gates, steps[t]
                change = torch.bmm(model.effects, (gates - before)[:, :, None])
                model.residuals += change[:, :, 0]
                closed_at = torch.where(gates < before, torch.full_like(like, t), closed_at)
            constants = model.best(gates, shares, freedom, model.residuals - forgiven, constants)
        curves["loss"].append(by_row(residual).square().mean(1) / variance)
        curves["size"].append(gates.mean(1))
        chunk.advance(rows)
        if t + 1 in ends:
            ranks = gates if masks is not None else ranked(part, closed_at)
            so_far = {name: torch.stack(curve) for name, curve in curves.items()}
            found = means + deviations * constants
            learned.append(Learned(ranks, ranks.logit(), so_far, found))
    return learned
