"""The default recipe: close channels one by one, those first whose loss the output feels least.

Gates are yes or no from the beginning to the end, so nothing is trained soft and judged hard. Each
step runs a few own and other images through the network as it is now and takes, for each image,
the gradient of the task output with respect to every gate. To first order these say what closing
or opening any set of channels does to the task output of each image: the squared change of the
task output becomes a quadratic function of the gates, interactions included (a Gauss-Newton model,
as in Optimal Brain Surgeon, but for the outputs of channels). The gates then move to what that
model likes best at the step's budget, which shrinks from all channels to the size asked for.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nad_attr.architecture import budget, n_channels
from nad_attr.data import Draw
from nad_attr.engine import Chunk, Learned, TaskImages
from nad_attr.recipe import Recipe

__all__ = ["QuadraticModel", "budgets", "learn_selection"]

#: Steps whose images the quadratic model holds; older ones hardly count any more.
MEMORY = 30
#: Steps before the first channel closes, at most: fewer images are no base for a choice.
WAIT = 5
#: Swaps of an open for a closed channel in each step (one in the last fifth of the steps).
SWAPS = 4
#: What a swap must gain, in units of the task output's variance.
LEAST_GAIN = 1e-4
#: Channels are closed in groups of at least 1/GROUPS of those that are still to close in a step.
GROUPS = 8
#: Steps between attempts to jump to the relaxed optimum.
JUMP = 5
RELAXED_ITERATIONS = 60
POWER_ITERATIONS = 8
#: Images of the quadratic model that are squared at a time.
BLOCK = 32
#: Stands in for the variance of a task output that is the same for all images.
TINY = 1e-12


def budgets(recipe: Recipe, n: int, k: int) -> list[int]:
    """Channels that are open after each step: from ``n`` geometrically down to ``k``.

    The first steps close nothing. What they leave open is not made up for at once: the gradients
    are good for a small change of the network only.

    Example:
        >>> budgets(Recipe(steps=10, removal=0.8), 100, 10)
        [75, 56, 42, 32, 24, 18, 13, 10, 10, 10]
    """
    first = max(1, min(WAIT, recipe.steps // 10)) - 1
    last = max(first + 1, round(recipe.removal * recipe.steps))
    done = [min(max((t + 1 - first) / (last - first), 0.0), 1.0) for t in range(recipe.steps)]
    return [round(n * (k / n) ** share) for share in done]


class QuadraticModel:
    """What the task output would do if gates were flipped, from recent gradients.

    Holds for each task (row) the last M images: the gradient S of the image's task output with
    respect to the gates, and the residual r, its present difference to the whole network's.
    Flipping gate c by d (closing: -1, opening: +1) moves the residuals to ``r + d S[:, c]``; the
    loss is the weighted mean of their squares.

    Args:
        gates: (R, n) of zeros and ones.
        capacity: M, images kept.
        trust: Share of a channel's own squared effect that a flip is charged on top, since the
            gradient is only local.
    """

    def __init__(self, gates: Tensor, capacity: int, trust: float) -> None:
        rows, n = gates.shape
        self.gates = gates.clone()
        self.trust = trust
        self.gradients = gates.new_zeros(rows, capacity, n)
        self.residuals = gates.new_zeros(rows, capacity)
        self.weights = gates.new_zeros(capacity)
        self._next = 0

    def age(self, factor: float) -> None:
        """Make all images that are held count less."""
        self.weights *= factor

    def add(self, residuals: Tensor, gradients: Tensor) -> None:
        """Take in images that were run under the present gates; the oldest make room.

        Args:
            residuals: (R, b).
            gradients: (R, b, n).
        """
        b = residuals.shape[1]
        at = (torch.arange(b, device=residuals.device) + self._next) % len(self.weights)
        self.gradients[:, at] = gradients
        self.residuals[:, at] = residuals
        self.weights[at] = 1.0
        self._next = (self._next + b) % len(self.weights)
        self._newest = at

    def begin(self) -> None:
        """Compute what a round of flips needs, once."""
        self._share = self.weights / self.weights.sum()
        # A few images at a time: a second buffer as large as the gradients is never made.
        self._square = torch.zeros_like(self.gates)
        for share, part in zip(
            self._share.split(BLOCK), self.gradients.split(BLOCK, dim=1), strict=True
        ):
            self._square += torch.einsum("m,rmn->rn", share, part.square())
        self._slope = self._over_images(self.residuals)
        self._origin = self.gates.clone()
        self._origin_residuals = self.residuals.clone()
        self._curvature = self._charged()

    def _over_images(self, values: Tensor, share: Tensor | None = None) -> Tensor:
        """Weighted mean over images of a value times the gradients: (R, M) to (R, n)."""
        share = self._share if share is None else share
        return torch.bmm((values * share)[:, None, :], self.gradients)[:, 0]

    def _charged(self) -> Tensor:
        """Each channel's own squared effect, with what distrust adds to the next flip: (R, n)."""
        # A flip back to where the gradients were taken has nothing to distrust.
        moved = (self.gates != self._origin).to(self.gates.dtype)
        return self._square * (1 + self.trust * (1 - 2 * moved))

    def cost(self, opening: bool) -> Tensor:
        """Predicted change of the loss for each flip of one gate: (R, n), inf where impossible."""
        cost = torch.add(self._curvature, self._slope, alpha=2 if opening else -2)
        return cost.masked_fill_(self.gates == (1.0 if opening else 0.0), math.inf)

    def flip(self, channels: Tensor) -> None:
        """Flip some gates in each row.

        Args:
            channels: int64 (R, g), different ones in a row.
        """
        step = 1 - 2 * self.gates.gather(1, channels)
        self.gates.scatter_add_(1, channels, step)
        # What was a charge for the flip is a discount for the flip back, and the other way round.
        turned = 2 * self._square.gather(1, channels) - self._curvature.gather(1, channels)
        self._curvature.scatter_(1, channels, turned)
        over_images = channels[:, None, :].expand(-1, self.residuals.shape[1], -1)
        change = torch.bmm(self.gradients.gather(2, over_images), step[:, :, None])[:, :, 0]
        self.residuals += change
        self._slope += self._over_images(change)

    def close(self, n: int) -> None:
        """Close the ``n`` gates of each row that cost least, by small groups."""
        while n > 0:
            group = max(1, n // GROUPS)
            cost = self.cost(opening=False)
            if group > 1:
                # Channels that each make good the same residual would overshoot together, so
                # within a group what closing gains is not counted, only what it costs.
                cost = torch.maximum(cost, self._curvature.masked_fill(cost.isinf(), math.inf))
            # A stable sort: channels that cost exactly the same close in their order.
            cheapest = cost.argsort(dim=1, stable=True)[:, :group]
            # As flip() does, but all in one direction.
            self.gates.scatter_(1, cheapest, 0.0)
            over_images = cheapest[:, None, :].expand(-1, self.residuals.shape[1], -1)
            change = self.gradients.gather(2, over_images).sum(2)
            self.residuals -= change
            self._slope -= self._over_images(change)
            n -= group
        self._curvature = self._charged()

    def swap(self, least_gain: Tensor) -> bool:
        """Open one gate and close another in each row, where that gains more than a minimum.

        Args:
            least_gain: (R,), in squared units of the task output.

        Returns:
            Whether any row swapped. If none did, another try would end the same way.
        """
        before = [x.clone() for x in (self.gates, self.residuals, self._slope, self._curvature)]
        opened, channel = self.cost(opening=True).min(dim=1)
        self.flip(channel[:, None])
        closed, channel = self.cost(opening=False).min(dim=1)
        keep = (opened + closed < -least_gain)[:, None]
        swapped = bool(keep.any())
        if swapped:
            self.flip(channel[:, None])
            after = (self.gates, self.residuals, self._slope, self._curvature)
            before = [torch.where(keep, new, old) for new, old in zip(after, before, strict=True)]
        self.gates, self.residuals, self._slope, self._curvature = before
        return swapped

    def relaxed(self, k: int, share: Tensor) -> Tensor:
        """Gates in [0, 1] with sum ``k`` that the model likes best: (R, n).

        A convex problem, solved by accelerated projected gradient descent. Unlike closing one by
        one it sees that channels which cancel each other can go together.

        Args:
            k: The sum.
            share: (M,), what each image counts.
        """
        gradients = self.gradients
        # The largest eigenvalue of the quadratic bounds the step (power iteration, with a margin).
        vector = torch.ones_like(self.gates)
        for _ in range(POWER_ITERATIONS):
            vector = self._over_images(torch.einsum("rmn,rn->rm", gradients, vector), share)
            norm = vector.norm(dim=1, keepdim=True).clamp(min=TINY)
            vector = vector / norm
        step = 1 / (1.5 * norm)
        gates = look = project(self.gates, k)
        momentum = 1.0
        for _ in range(RELAXED_ITERATIONS):
            residual = self.residuals + torch.einsum("rmn,rn->rm", gradients, look - self.gates)
            new = project(look - step * self._over_images(residual, share), k)
            next_momentum = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
            look = new + (momentum - 1) / next_momentum * (new - gates)
            gates, momentum = new, next_momentum
        return gates

    def jump(self, k: int, least_gain: Tensor) -> None:
        """Take the ``k`` highest relaxed gates in place of the present ones where that is better.

        With more channels than images some gates fit any images perfectly. So the newest images
        are kept out of the relaxed problem, and they alone say whether its solution is better.

        Args:
            k: Open channels, as many as now.
            least_gain: (R,), see :meth:`swap`.
        """
        judge = torch.zeros_like(self.weights)
        judge[self._newest] = 1 / len(self._newest)
        share = self.weights * (judge == 0)
        # Of equal relaxed gates the open one stays.
        wish = self.relaxed(k, share / share.sum().clamp(min=TINY)) + 1e-6 * self.gates
        order = wish.argsort(dim=1, descending=True, stable=True)
        gates = torch.zeros_like(self.gates).scatter_(1, order[:, :k], 1.0)
        residuals = self.residuals + torch.einsum("rmn,rn->rm", self.gradients, gates - self.gates)
        gain = self._loss(self.residuals, judge) - self._loss(residuals, judge)
        better = (gain > least_gain)[:, None]
        self.gates = torch.where(better, gates, self.gates)
        self.residuals = torch.where(better, residuals, self.residuals)
        self._slope = self._over_images(self.residuals)
        self._curvature = self._charged()

    def _loss(self, residuals: Tensor, share: Tensor) -> Tensor:
        # Here trust is charged on the joint effect: channels that cancel have a large one each.
        guess = (residuals - self._origin_residuals).square()
        return ((residuals.square() + self.trust * guess) * share).sum(1)


def project(values: Tensor, k: int) -> Tensor:
    """The nearest point in [0, 1] with sum ``k`` in each row.

    That is ``clamp(values - t, 0, 1)`` for the t that makes the sum right. The sum falls with t,
    linearly between the values and the values less one, so t is computed and not searched: an
    iterative search would cost a GPU more in launches than all the rest of a step.

    Example:
        >>> project(torch.tensor([[2.0, 1.0, 0.5, -1.0]]), 2)
        tensor([[1.0000, 0.7500, 0.2500, 0.0000]])
    """
    n = values.shape[1]
    exact = values.dtype if values.device.type == "mps" else torch.float64  # MPS has no float64
    ordered = values.sort(dim=1).values.to(exact)
    sums = torch.nn.functional.pad(ordered.cumsum(1), (1, 0))
    kinks = torch.cat([ordered - 1, ordered], dim=1)

    # At t, values up to `low` are at 0, from `high` on at 1.
    low = torch.searchsorted(ordered, kinks, right=True)
    high = torch.searchsorted(ordered, kinks + 1, right=True)
    total = n - high + sums.gather(1, high) - sums.gather(1, low) - (high - low) * kinks
    # t lies between the last kink where the sum is k or more (n at the first) and the next one.
    reached = total >= k
    reached[:, 0] = True
    left, at_left = kinks.masked_fill(~reached, -math.inf).max(dim=1, keepdim=True)
    right, at_right = kinks.masked_fill(reached, math.inf).min(dim=1, keepdim=True)
    above, below = total.gather(1, at_left), total.gather(1, at_right)
    t = left + ((above - k) / (above - below)).clamp(0, 1) * (right - left)
    t = torch.where(right.isinf(), left, t)
    return (values - t.to(values.dtype)).clamp(0, 1)


def learn_selection(chunk: Chunk, recipe: Recipe) -> Learned:
    """Learn the gates of a chunk of tasks with the default recipe.

    Args:
        chunk: The tasks.
        recipe: The recipe.

    Returns:
        Gates and logits, and the curves "loss" (squared change of the task output over its
        variance, on the images of a step before its flips) and "size".
    """
    network = chunk.network
    rows, n = len(chunk), n_channels(network.sites)
    steps = budgets(recipe, n, budget(recipe.size, network.sites))
    per_task = recipe.images_per_step
    capacity = min(recipe.steps, MEMORY) * per_task
    gates = torch.ones(rows, n, device=network.device, dtype=network.dtype)
    closed_at = torch.full_like(gates, -1.0)
    whole = gates.new_zeros(rows, capacity)
    model = QuadraticModel(gates, capacity, recipe.trust)
    curves: dict[str, list[Tensor]] = {"loss": [], "size": []}

    def draws(images: TaskImages) -> list[Draw]:
        n_other = per_task // 2 if len(images.pools["other"]) else 0
        return images.take("own", per_task - n_other) + images.take("other", n_other)

    plan = [[draws(images) for images in chunk.images] for _ in range(recipe.steps)]
    n_open = n
    for t, batch in enumerate(chunk.batches(plan)):
        clean = chunk.own_output(chunk.clean(batch), batch.rows)
        output, gradient = network.output_and_gradient(
            batch.inputs,
            model.gates[batch.rows],
            chunk.classes[batch.rows],
            chunk.valid[batch.rows],
        )
        residual = (output - clean)[batch.places].view(rows, per_task)
        model.age(recipe.memory)
        model.add(residual, gradient[batch.places].view(rows, per_task, n))
        seen = min(t + 1, MEMORY) * per_task
        whole = torch.cat([clean[batch.places].view(rows, per_task), whole], dim=1)[:, :capacity]
        variance = whole[:, :seen].var(dim=1, correction=0).clamp(min=TINY)
        if steps[t] < n or t == recipe.steps - 1:  # the last step also ranks what is open
            before = model.gates.clone()
            model.begin()
            model.close(n_open - steps[t])
            n_open = steps[t]
            if t % JUMP == 0 and n_open < n:
                model.jump(n_open, LEAST_GAIN * variance)
            for _ in range(SWAPS if t < 0.8 * recipe.steps else 1):
                if not model.swap(LEAST_GAIN * variance):
                    break
            closed_at = torch.where(model.gates < before, torch.full_like(gates, t), closed_at)
        curves["loss"].append(residual.square().mean(1) / variance)
        curves["size"].append(model.gates.mean(1))
        chunk.advance(rows)
    gates = ranked(model, closed_at)
    return Learned(
        gates, gates.logit(), {name: torch.stack(curve) for name, curve in curves.items()}
    )


def ranked(model: QuadraticModel, closed_at: Tensor) -> Tensor:
    """Gates that keep what is open, and rank both the open and the closed channels.

    Open channels by what closing them would cost, closed ones by when they were closed last.
    They are evenly spaced above and below one half.
    """
    kept = model.gates > 0.5
    n = model.gates.shape[1]
    cost = model.cost(opening=False).masked_fill(~kept, -math.inf)
    gain = -model.cost(opening=True).masked_fill(kept, math.inf)
    late = closed_at + gain.argsort(dim=1, stable=True).argsort(dim=1) / n
    score = torch.where(kept, cost, late.masked_fill(kept, -math.inf))
    rank_kept = score.masked_fill(~kept, -math.inf).argsort(dim=1, stable=True).argsort(dim=1)
    rank_closed = score.masked_fill(kept, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
    n_kept = kept.sum(1, keepdim=True)
    n_closed = n - n_kept
    above = 0.5 + 0.5 * (rank_kept - n_closed + 1) / (n_kept + 1)
    below = 0.5 * (rank_closed + 1) / (n_closed + 1)
    return torch.where(kept, above, below)
