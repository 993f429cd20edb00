"""The default recipe: close the channels that matter least, one by one.

Gates are zero or one all the time, so nothing is trained soft and judged hard. Each step runs a few
own and other images through the present network and takes, for each image, the gradient of the task
output with respect to every gate. To first order these predict how closing or opening any set of
channels changes the task output of each image: its squared change becomes a quadratic function of
the gates, interactions included (a Gauss-Newton model, as in Optimal Brain Surgeon, but for the
outputs of channels). The gates then move to the best point of that model at the step's budget,
which shrinks from all channels to the size asked for.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nad_attr.data.sources import Draw
from nad_attr.gates.channels import budget, n_gates
from nad_attr.gates.recipe import Recipe
from nad_attr.learning.engine import Chunk, Learned, TaskImages
from nad_attr.running.forward import cumulative

__all__ = ["QuadraticModel", "budgets", "learn_selection"]

#: Images of a step are dropped once their weight is e to the power of minus this.
FORGETTING_EXPONENT = 3
#: Steps before the first channel closes, at most: fewer images are no base for a choice.
MAX_WAITING_STEPS = 5
#: Swaps of an open for a closed channel in each step (one in the last fifth of the steps).
SWAPS_PER_STEP = 4
#: Open channels, at most, among which two are sought that may close together.
MAX_PAIR_CANDIDATES = 256
#: Share of the open channels that each step may exchange for closed ones: a few swaps are not
#: enough for a wide network.
MAX_EXCHANGED_SHARE = 0.02
#: Share of the steps after which only single channels are swapped, and fewer of them.
SETTLING_SHARE = 0.8
#: By how much the power of ``free_scale`` falls, so that 0.3 becomes 0.9, as the part of the task
#: output's variance that no other scale explains rises to MAX_UNEXPLAINED. If the output varies
#: little, a constant is closest in value to the whole network's; a larger free scale prevents it.
#: If another scale explains nearly all, as in one of two redundant copies, the power stays.
SCALE_POWER_DROP, MAX_UNEXPLAINED = 0.9, 0.15
#: How fast the weight of images falls with their distance from the boundary, in ranks (0.1: half).
BOUNDARY_SHARPNESS = 9.0
#: The power of the lost share of the variance with which the boundary fades: if nearly all is lost,
#: the few images near it are not enough.
BOUNDARY_FADING_POWER = 8
#: Straight lines flatter or steeper than these are not trusted.
TRUSTED_SLOPES = (0.3, 3.0)
#: The smallest gain of a swap, in units of the task output's variance.
MIN_SWAP_GAIN = 1e-4
#: Channels are closed in groups of at least 1/N_GROUPS of those that are still to close in a step.
N_GROUPS = 8
#: From this number of channels on a step considers only candidates: those that are cheapest to
#: close and to open, and those with the largest effect. Each flip costs a pass over the gradients
#: of all candidates, and most channels of a wide network are far from being flipped.
MIN_CHANNELS_TO_NARROW = 2048
#: Candidates for each flip that a step makes, and candidates beside them.
CANDIDATES_PER_FLIP, SPARE_CANDIDATES = 2, 256
#: Replaces the variance of a task output that is the same for all images.
MIN_VARIANCE = 1e-12


def budgets(recipe: Recipe, n: int, ks: Sequence[int]) -> list[list[int]]:
    """Channels that are open after each step: from ``n`` geometrically down to each of ``ks``.

    The first steps close nothing, and this is not caught up at once: the gradients are good only
    for a small change of the network. The steps are shared equally among the sizes, and the last
    ones of each share close nothing more.

    Args:
        recipe: Gives the number of steps, and the share of them that closes channels.
        n: All channels.
        ks: Channels to keep, falling.

    Example:
        >>> budgets(Recipe(steps=10, removal=0.8), 100, [10])
        [[75, 56, 42, 32, 24, 18, 13, 10, 10, 10]]
        >>> budgets(Recipe(steps=10, removal=0.8), 100, [40, 10])
        [[80, 63, 50, 40, 40], [28, 20, 14, 10, 10]]
    """
    cuts = [round(recipe.steps * i / len(ks)) for i in range(len(ks) + 1)]
    result = []
    before = n
    for start, end, k in zip(cuts[:-1], cuts[1:], ks, strict=True):
        first = max(1, min(MAX_WAITING_STEPS, recipe.steps // 10)) - 1 if start == 0 else 0
        last = max(first + 1, round(recipe.removal * (end - start)))
        done = [min(max((t + 1 - first) / (last - first), 0.0), 1.0) for t in range(end - start)]
        result.append([round(before * (k / before) ** share) for share in done])
        before = k
    return result


def steps_in_memory(recipe: Recipe) -> int:
    """Steps whose images the quadratic model holds; older ones hardly count.

    Example:
        >>> steps_in_memory(Recipe(memory=0.9)), steps_in_memory(Recipe(memory=1.0))
        (30, 100)
    """
    if recipe.memory == 1:
        return recipe.steps
    return min(recipe.steps, round(FORGETTING_EXPONENT / (1 - recipe.memory)))


def lowest(cost: Tensor, n: int) -> Tensor:
    """Indices int64 (R, n) of the ``n`` lowest costs of each row, rising; of equal ones, the first.

    Example:
        >>> lowest(torch.tensor([[3.0, 1.0, 2.0, 1.0, 2.0]]), 3)
        tensor([[1, 3, 2]])
    """
    return cost.argsort(dim=1, stable=True)[:, :n]


def any_of(values: Tensor) -> bool:
    """Whether any is true; on a GPU always True, since a look would wait for it."""
    return values.device.type != "cpu" or bool(values.any())


class QuadraticModel:
    """The predicted task output after flips of gates, from recent gradients.

    It holds for each task (row) the last M images: the gradient S of the image's task output with
    respect to the gates, and the residual r, its difference from the whole network's.
    Flipping gate c by d (closing: -1, opening: +1) moves the residuals to ``r + d S[:, c]``; the
    loss is the weighted mean of their squares.

    Args:
        gates: (R, n) of zeros and ones.
        capacity: M, images kept.
        trust: Extra charge of a flip, as a share of the channel's own squared effect, since the
            gradient is only local.
        boundary: (R,), how much less the images count whose task output is far from the median;
            None: all count the same.
        shrink: Charge of each closed channel, as a share of its own squared effect, one or (R, 1):
            joint effects are shrunk towards those of single channels.
    """

    def __init__(
        self,
        gates: Tensor,
        capacity: int,
        trust: float,
        boundary: Tensor | None = None,
        shrink: float | Tensor = 0.0,
    ) -> None:
        rows, n = gates.shape
        self.gates = gates.clone()
        self.trust, self.shrink = trust, shrink
        #: (R, n), the cost of each open channel beside the squared error; None: nothing.
        self.prices: Tensor | None = None
        self.boundary = gates.new_zeros(rows) if boundary is None else boundary
        self.gradients = gates.new_zeros(rows, capacity, n)
        self.residuals = gates.new_zeros(rows, capacity)
        self.whole = gates.new_zeros(rows, capacity)
        self.weights = gates.new_zeros(capacity)
        self._next = 0

    def age(self, factor: float) -> None:
        """Make all present images count less."""
        self.weights *= factor

    def add(self, whole: Tensor, residuals: Tensor, gradients: Tensor) -> None:
        """Add images that were run under the present gates; the oldest ones are dropped.

        Args:
            whole: (R, b), the whole network's task output.
            residuals: (R, b).
            gradients: (R, b, n).
        """
        b = residuals.shape[1]
        at = (torch.arange(b, device=residuals.device) + self._next) % len(self.weights)
        self.gradients[:, at] = gradients
        self.residuals[:, at] = residuals
        self.whole[:, at] = whole
        self.weights[at] = 1.0
        self._next = (self._next + b) % len(self.weights)

    def candidates(self, n_open: int, n_close: int, n_exchange: int) -> tuple[Tensor, int] | None:
        """Candidates for a round of flips; after :meth:`begin`.

        Args:
            n_open: Open gates in each row.
            n_close: Gates that will be closed.
            n_exchange: Further gates that will be opened, and closed.

        Returns:
            int64 (R, K), rising, and how many of each row's K are open; None: all channels.
        """
        n = self.gates.shape[1]
        n_effect = min(MAX_PAIR_CANDIDATES, n_open)
        n_cheap = min(
            CANDIDATES_PER_FLIP * (n_close + n_exchange) + SPARE_CANDIDATES, n_open - n_effect
        )
        n_closed = min(CANDIDATES_PER_FLIP * n_exchange + SPARE_CANDIDATES, n - n_open)
        # A copy of many columns would cost more than it saves.
        if n < MIN_CHANNELS_TO_NARROW or n_effect + n_cheap + n_closed > n // 3:
            return None
        effect = lowest(-self._square.masked_fill(self.gates < 0.5, -1.0), n_effect)
        cheap = lowest(self.cost(opening=False).scatter_(1, effect, math.inf), n_cheap)
        closed = lowest(self.cost(opening=True), n_closed)
        channels = torch.cat([effect, cheap, closed], dim=1).sort(dim=1).values
        return channels, n_effect + n_cheap

    def narrowed(self, channels: Tensor) -> QuadraticModel:
        """The same model for channels int64 (R, K) of each row; see :meth:`widened`."""
        part = copy.copy(self)
        over_images = channels[:, None, :].expand(-1, self.residuals.shape[1], -1)
        part.gradients = self.gradients.gather(2, over_images)
        for name in ("gates", "_square", "_slope", "_origin", "_curvature"):
            setattr(part, name, getattr(self, name).gather(1, channels))
        part.prices = None if self.prices is None else self.prices.gather(1, channels)
        part.residuals = self.residuals.clone()
        return part

    def widened(self, part: QuadraticModel, channels: Tensor) -> None:
        """Take over the flips that were made in :meth:`narrowed`."""
        self.gates = self.gates.scatter(1, channels, part.gates)
        self.residuals = part.residuals
        self._slope = self._over_images(self.residuals)
        self._curvature = self._penalties()

    def shares(self) -> Tensor:
        """The weight of each image in the loss: (R, M), summing to 1 in each row.

        Recent images count more, and those whose rank by the whole network's task output is close
        to one half: with as many own as other images these are next to the boundary, where it is
        decided which images the sub-architecture tells apart.
        """
        weights = (self.weights / self.weights.sum()).expand_as(self.residuals)
        mean = (self.whole * weights).sum(1, keepdim=True)
        full = ((self.whole - mean).square() * weights).sum(1, keepdim=True).clamp(min=MIN_VARIANCE)
        loss = (self.residuals.square() * weights).sum(1, keepdim=True)
        lost = (loss / full).clamp(max=1)
        order = self.whole.argsort(dim=1, stable=True)
        rising = weights.gather(1, order)
        rank = torch.empty_like(rising).scatter_(1, order, cumulative(rising) - rising / 2)
        near = torch.cosh(BOUNDARY_SHARPNESS * (rank - 0.5)).square().reciprocal()
        counted = weights * (
            1 - self.boundary[:, None] * (1 - lost**BOUNDARY_FADING_POWER) * (1 - near)
        )
        return counted / counted.sum(1, keepdim=True)

    def begin(self, shares: Tensor | None = None) -> None:
        """Compute the terms of a round of flips; ``shares`` (R, M) replace :meth:`shares`."""
        self._share = self.shares() if shares is None else shares
        self._square = torch.bmm(self._share[:, None, :], self.gradients.square())[:, 0]
        self._slope = self._over_images(self.residuals)
        self._origin = self.gates.clone()
        self._curvature = self._penalties()

    def forgiven(self, share: float, shares: Tensor | None = None) -> Tensor:
        """The part of the residuals, (R, M), that another scale and offset would mend.

        With z the whole network's output, y the gated one's and a y + b the straight line through
        (y, z), an image's residual y - z is y - (z - b) / a, which no scale and offset can mend,
        and the rest.

        Args:
            share: How much of the rest is forgiven if it is everything, in [0, 1]; it grows with
                the part of the variance of z that no scale and offset can mend.
            shares: (R, M), in place of :meth:`shares`.
        """
        weights = self.shares() if shares is None else shares
        gated = self.residuals + self.whole
        mean_whole = (self.whole * weights).sum(1, keepdim=True)
        mean_gated = (gated * weights).sum(1, keepdim=True)
        centred, centred_whole = gated - mean_gated, self.whole - mean_whole
        covariance = (centred * centred_whole * weights).sum(1, keepdim=True)
        variance = (centred.square() * weights).sum(1, keepdim=True).clamp(min=MIN_VARIANCE)
        slope = (covariance / variance).clamp(*TRUSTED_SLOPES)
        aim = mean_gated + centred_whole / slope
        full = (centred_whole.square() * weights).sum(1, keepdim=True).clamp(min=MIN_VARIANCE)
        unexplained = (1 - covariance.square() / (variance * full)).clamp(0, MAX_UNEXPLAINED)
        return share ** (1 - SCALE_POWER_DROP * unexplained / MAX_UNEXPLAINED) * (aim - self.whole)

    def _over_images(self, values: Tensor) -> Tensor:
        """Weighted mean over images of a value times the gradients: (R, M) to (R, n)."""
        return torch.bmm((values * self._share)[:, None, :], self.gradients)[:, 0]

    def _penalties(self) -> Tensor:
        """Each channel's own squared effect, with the charge of the next flip: (R, n)."""
        # A flip back to where the gradients were taken is not charged.
        moved = (self.gates != self._origin).to(self.gates.dtype)
        kept = self.shrink * (2 * self.gates - 1)
        return self._square * (1 + kept + self.trust * (1 - 2 * moved))

    def cost(self, opening: bool) -> Tensor:
        """Predicted change of the loss for each flip of one gate: (R, n), inf where impossible."""
        cost = torch.add(self._curvature, self._slope, alpha=2 if opening else -2)
        if self.prices is not None:
            cost.add_(self.prices, alpha=1 if opening else -1)
        return cost.masked_fill_(self.gates == (1.0 if opening else 0.0), math.inf)

    def flip(self, channels: Tensor) -> None:
        """Flip gates, int64 (R, g), different ones in a row."""
        step = 1 - 2 * self.gates.gather(1, channels)
        self.gates.scatter_add_(1, channels, step)
        # The charge for the flip is a discount for the flip back, and the other way round.
        turned = 2 * self._square.gather(1, channels) - self._curvature.gather(1, channels)
        self._curvature.scatter_(1, channels, turned)
        over_images = channels[:, None, :].expand(-1, self.residuals.shape[1], -1)
        change = torch.bmm(self.gradients.gather(2, over_images), step[:, :, None])[:, :, 0]
        self.residuals += change
        self._slope += self._over_images(change)

    def close(self, n: int, least: int = 1) -> None:
        """Close the ``n`` gates of each row that cost least, in groups of at least ``least``."""
        while n > 0:
            group = max(min(least, n), n // N_GROUPS)
            cost = self.cost(opening=False)
            if group > 1:
                # Channels that each mend the same residual would overshoot together, so within a
                # group only the cost of closing counts, not its gain.
                alone = self._curvature
                if self.prices is not None:
                    alone = alone - self.prices
                cost = torch.maximum(cost, alone.masked_fill(cost.isinf(), math.inf))
            self.flip(lowest(cost, group))
            n -= group
        self._curvature = self._penalties()

    def _loss(self) -> Tensor:
        """The predicted loss, with charges: (R,)."""
        moved = (self.gates != self._origin).to(self.gates.dtype)
        charged = self.trust * moved + self.shrink * (1 - self.gates)
        guess = (self._square * charged).sum(1)
        if self.prices is not None:
            guess = guess + (self.gates * self.prices).sum(1)
        return (self.residuals.square() * self._share).sum(1) + guess

    def _copy(self) -> tuple[Tensor, ...]:
        """Copies of the tensors that flips change; see :meth:`_restore`."""
        return tuple(x.clone() for x in (self.gates, self.residuals, self._slope, self._curvature))

    def _restore(self, before: tuple[Tensor, ...], rows: Tensor | None = None) -> None:
        """Undo all flips since a copy, in some rows (R,) or in all."""
        after = (self.gates, self.residuals, self._slope, self._curvature)
        if rows is not None:
            before = tuple(
                torch.where(rows[:, None], old, new) for new, old in zip(after, before, strict=True)
            )
        self.gates, self.residuals, self._slope, self._curvature = before

    def exchange(self, n: int, least_gain: Tensor) -> None:
        """Open ``n`` gates and close as many in each row, in groups, if that gains enough."""
        before = self._copy()
        loss = self._loss()
        # Each group costs a pass over all gradients, so a wide network has few groups.
        left, least = n, max(1, n // (2 * N_GROUPS))
        while left > 0:
            group = max(min(least, left), left // N_GROUPS)
            self.flip(lowest(self.cost(opening=True), group))
            left -= group
        self.close(n, least)
        keep = self._loss() < loss - least_gain
        self._restore(before, ~keep)

    def swap(self, least_gain: Tensor) -> bool:
        """Open one gate and close another in each row, if that gains ``least_gain`` (R,).

        Returns:
            Whether any row swapped. If none did, another try would end the same way.
        """
        before = self._copy()
        opened, channel = self.cost(opening=True).min(dim=1)
        self.flip(channel[:, None])
        closed, channel = self.cost(opening=False).min(dim=1)
        keep = opened + closed < -least_gain
        swapped = any_of(keep)
        if swapped:
            self.flip(channel[:, None])
        self._restore(before, ~keep if swapped else None)
        return swapped

    def swap_pair(self, least_gain: Tensor, n_open: int | None = None) -> bool:
        """Open two gates, then close the two that cost least *together*, if that gains enough.

        Channels that cancel each other cost much one by one and nothing together. Opening comes
        first, or channels of different pairs would be closed to fit the residual. ``n_open`` is the
        number of open gates in each row; None: they are counted.

        Returns:
            Whether any row swapped.
        """
        n_open = int(self.gates[0].sum()) if n_open is None else n_open
        if n_open < 2 or n_open + 2 > self.gates.shape[1]:
            return False
        before = self._copy()
        total = torch.zeros_like(least_gain)
        for _ in range(2):
            cost, channel = self.cost(opening=True).min(dim=1)
            self.flip(channel[:, None])
            total = total + cost
        # Those with the largest own effect, which look as if they were needed.
        m = min(n_open + 2, MAX_PAIR_CANDIDATES)
        chosen = self._square.masked_fill(self.gates < 0.5, -1.0).topk(m, dim=1).indices
        over_images = chosen[:, None, :].expand(-1, self.residuals.shape[1], -1)
        gradients = self.gradients.gather(2, over_images)
        products = gradients.mT @ (gradients * self._share[:, :, None])
        alone = self.cost(opening=False).gather(1, chosen)
        shrink = torch.as_tensor(self.shrink, device=products.device).to(products)[..., None]
        charge = 1 + self.trust + shrink
        joint = alone[:, :, None] + alone[:, None, :] + 2 * charge * products
        joint.diagonal(dim1=1, dim2=2).fill_(math.inf)
        cost, at = joint.flatten(1).min(dim=1)
        pair = torch.stack([at // m, at % m], dim=1)
        keep = total + cost < -least_gain
        swapped = any_of(keep)
        if swapped:
            self.flip(chosen.gather(1, pair))
        self._restore(before, ~keep if swapped else None)
        return swapped


def drawn(chunk: Chunk, recipe: Recipe) -> list[list[list[Draw]]]:
    """The draws of each task for each step: half own images, half others, if there are any."""

    def draws(images: TaskImages) -> list[Draw]:
        n_other = recipe.images_per_step // 2 if len(images.pools["other"]) else 0
        return images.take("own", recipe.images_per_step - n_other) + images.take("other", n_other)

    return [[draws(images) for images in chunk.images] for _ in range(recipe.steps)]


def flip_round(
    model: QuadraticModel, recipe: Recipe, t: int, n_open: int, n_after: int, variance: Tensor
) -> None:
    """Close channels from ``n_open`` to ``n_after`` in each row in step ``t``, and exchange some.

    The model comes from :meth:`QuadraticModel.begin`; ``variance`` (R,) is the task output's.
    """
    n_exchanged = exchanged(recipe, t, model.gates.shape[1], n_after)
    n_close = n_open - n_after
    chosen = model.candidates(n_open, n_close, n_exchanged)
    channels, n_open_there = chosen or (None, n_open)
    part = model if channels is None else model.narrowed(channels)
    flip_some(part, recipe, t, n_open_there, n_close, n_exchanged, variance)
    if channels is not None:
        model.widened(part, channels)


def exchanged(recipe: Recipe, t: int, n: int, n_after: int) -> int:
    """How many of ``n_after`` open channels step ``t`` may exchange for closed ones."""
    if t >= SETTLING_SHARE * recipe.steps:
        return 0
    return min(round(MAX_EXCHANGED_SHARE * n_after), n - n_after)


def flip_some(
    part: QuadraticModel,
    recipe: Recipe,
    t: int,
    n_open: int,
    n_close: int,
    n_exchanged: int,
    variance: Tensor,
) -> None:
    """The flips of :func:`flip_round` among the candidates."""
    settling, least_gain = t >= SETTLING_SHARE * recipe.steps, MIN_SWAP_GAIN * variance
    part.close(n_close)
    if not settling:
        part.exchange(n_exchanged, least_gain)
    part.swap_pair(least_gain, n_open - n_close)
    for _ in range(1 if settling else SWAPS_PER_STEP):
        if not part.swap(least_gain):
            break


def learn_selection(chunk: Chunk, recipe: Recipe, sizes: Sequence[float]) -> list[Learned]:
    """Learn the gates of a chunk of tasks with the default recipe.

    Args:
        chunk: The tasks.
        recipe: The recipe; its own size is not used.
        sizes: The sizes of the gates to return, falling: the run passes through all of them.

    Returns:
        For each size gates and logits, and the curves of the run so far: "loss" (squared change of
        the task output over its variance, on the images of a step before its flips) and "size".
    """
    network = chunk.network
    rows, n = len(chunk), n_gates(network.sites)
    path = budgets(recipe, n, [budget(size, network.sites) for size in sizes])
    steps = [open_after for part in path for open_after in part]
    ends = set(itertools.accumulate(map(len, path)))
    per_task = recipe.images_per_step
    capacity = steps_in_memory(recipe) * per_task
    gates = torch.ones(rows, n, device=network.device, dtype=network.dtype)
    closed_at = torch.full_like(gates, -1.0)
    # Own images alone have no boundary.
    beside = [bool(len(images.pools["other"])) for images in chunk.images]
    boundary = recipe.fitting("boundary") * gates.new_tensor(beside)
    model = QuadraticModel(gates, capacity, recipe.trust, boundary)
    curves: dict[str, list[Tensor]] = {"loss": [], "size": []}

    learned: list[Learned] = []
    n_open = n
    for t, batch in enumerate(chunk.batches(drawn(chunk, recipe))):
        clean = chunk.own_output(chunk.clean(batch), batch.rows)
        output, gradient = network.output_and_gradient(
            batch.inputs,
            model.gates[batch.rows],
            chunk.classes[batch.rows],
            chunk.valid[batch.rows],
        )
        residual = (output - clean)[batch.places].view(rows, per_task)
        model.age(recipe.memory)
        whole = clean[batch.places].view(rows, per_task)
        model.add(whole, residual, gradient[batch.places].view(rows, per_task, n))
        seen = min((t + 1) * per_task, capacity)
        variance = model.whole[:, :seen].var(dim=1, correction=0).clamp(min=MIN_VARIANCE)
        if steps[t] < n or t + 1 in ends:  # the last step also ranks the open channels
            before = model.gates.clone()
            shares = model.shares()
            forgiven = model.forgiven(recipe.fitting("free_scale"), shares)
            model.residuals -= forgiven
            if chunk.prices is not None:
                model.prices = chunk.prices * variance[:, None]
            model.begin(shares)
            flip_round(model, recipe, t, n_open, steps[t], variance)
            n_open = steps[t]
            model.residuals += forgiven
            closed_at = torch.where(model.gates < before, torch.full_like(gates, t), closed_at)
        curves["loss"].append(residual.square().mean(1) / variance)
        curves["size"].append(model.gates.mean(1))
        chunk.advance(rows)
        if t + 1 in ends:
            ranks = ranked(model, closed_at)
            so_far = {name: torch.stack(curve) for name, curve in curves.items()}
            learned.append(Learned(ranks, ranks.logit(), so_far))
    return learned


def in_order(score: Tensor, kept: Tensor) -> Tensor:
    """Gates that keep some channels: (R, n), evenly spaced above and below one half by their score.

    Example:
        >>> in_order(torch.tensor([[0.2, 0.9, 0.4]]), torch.tensor([[False, True, False]]))
        tensor([[0.1667, 0.7500, 0.3333]])
    """
    rank_kept = score.masked_fill(~kept, -math.inf).argsort(dim=1, stable=True).argsort(dim=1)
    rank_closed = score.masked_fill(kept, math.inf).argsort(dim=1, stable=True).argsort(dim=1)
    n_kept = kept.sum(1, keepdim=True)
    n_closed = score.shape[1] - n_kept
    above = 0.5 + 0.5 * (rank_kept - n_closed + 1) / (n_kept + 1)
    return torch.where(kept, above, 0.5 * (rank_closed + 1) / (n_closed + 1))


def ranked(model: QuadraticModel, closed_at: Tensor) -> Tensor:
    """Gates that keep the open channels, and rank both the open and the closed ones.

    Open channels are ranked by the cost of closing them, closed ones by the step of their last
    closing. Gates are evenly spaced above and below one half.
    """
    kept = model.gates > 0.5
    n = model.gates.shape[1]
    cost = model.cost(opening=False).masked_fill(~kept, -math.inf)
    gain = -model.cost(opening=True).masked_fill(kept, math.inf)
    late = closed_at + gain.argsort(dim=1, stable=True).argsort(dim=1) / n
    score = torch.where(kept, cost, late.masked_fill(kept, -math.inf))
    return in_order(score, kept)
