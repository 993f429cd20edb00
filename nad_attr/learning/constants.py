"""Learn gates and the best constants of closed channels together.

A closed channel is replaced by a constant, one number for each task, which carries nothing of the
image. The mean over data is one such number; the best is the one that keeps the task output
(optimal ablation). The Gauss-Newton model of :mod:`nad_attr.learning.selection` gets a further
coordinate for each channel. With m_c the channel's mean, s_c its deviation, g the gradient of image
i's task output at the site, one backward pass gives

    S_ic = sum over positions of g (x - m_c)      closing channel c at its mean takes this away
    G_ic = s_c * sum over positions of g          its constant m_c + s_c b_c adds b_c of this

Let q_i be the difference of the task output from the whole network's if all closed channels C are
at their mean. Constants b with a normal prior of deviation PRIOR around the mean then leave

    min over b of sum_i w_i (q_i + sum over C of G_ic b_c)^2 + |b|^2 / d  =  q' P q,
    P = (W^-1 + d G_C G_C')^-1,      d = PRIOR^2 * images / mean squared residual

which is the loss of the quadratic model in another metric. So channels are chosen by what *no
constant explains*: the residuals and effects of the quadratic model are multiplied by a root of P,
and a channel's effect is reduced by the part that its own constant would mend. Then the constants
move to the minimum, with a second pull to where they are now, as if a step moved them by MOVE.

At the end each task's constants are shrunk towards the means as far as images demand that were not
learned from (:func:`shrinkage`).

Source: Li and Janson, "Optimal ablation for interpretability", NeurIPS 2024, arXiv 2409.09951.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nad_attr.data.sources import Draw
from nad_attr.gates.channels import budget, n_gates, to_channels, to_gates
from nad_attr.gates.recipe import Recipe
from nad_attr.learning.engine import Chunk, Learned
from nad_attr.learning.selection import (
    MIN_CHANNELS_TO_NARROW,
    MIN_VARIANCE,
    SWAPS_PER_STEP,
    QuadraticModel,
    any_of,
    budgets,
    drawn,
    exchanged,
    flip_some,
    ranked,
    steps_in_memory,
)
from nad_attr.running.forward import sent

__all__ = ["ConstantModel", "learn_with_constants"]

#: The prior's deviation: how far constants are from the mean, in the channel's own deviations.
PRIOR = 1.0
#: The same for one step: gradients are good for a small change only.
MOVE = 0.2
#: The charge of each closed channel, in its own squared effect times the share of the channels'
#: correlations that is noise: joint effects are shrunk towards those of single channels. It is more
#: than that share, because gradients of earlier steps err as well.
SHRINK = 8.0
#: Steps for which that share of noise is assumed to be constant.
SHRINK_STEPS = 4
#: Smallest mean squared residual assumed, in units of the task output's variance.
FLOOR = 0.01
#: Shares of the largest diagonal element that are added if rounding leaves no root, in units of a
#: number's rounding.
ADDED_WHERE_ROUNDED = (30.0, 30_000.0)
#: Random projections by which candidates are chosen.
N_PROBES = 16
#: Channels, at most, whose correlations give the share of noise.
MAX_CORRELATED = 512
#: Share of a task's images that are kept apart, the largest number of each kind, and the smallest
#: number of images of a kind with which any are kept apart.
KEPT_SHARE, MAX_KEPT, MIN_TO_KEEP = 0.2, 32, 50
#: Shares of the way from mean to constant that are tried, and the images that this needs.
SHARES_TRIED, MIN_TRIED = (1 / 3, 2 / 3, 1.0), 4
#: Standard errors that are taken off the gain of a share, with images kept apart, and with images
#: that were learned from, which are few and often right by chance.
DOUBT, DOUBT_WHERE_FEW = 0.5, 1.5
#: A quantile of the normal distribution.
ONE_SIDED_95 = 1.645


def noise_share(effects: Tensor, n_images: Tensor) -> Tensor:
    """Share of the squared correlations between channels that is chance, with few images: (R,).

    It is the best weight to shrink a correlation matrix towards the unit matrix. ``effects`` are
    (R, M, n), weighted so that a sum over images is a mean; ``n_images`` (R,) is effective.

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


def rooted(matrices: Tensor) -> Tensor:
    """Cholesky factors of positive definite matrices, (R, M, M), also if rounding disturbs them.

    Sums of added and subtracted products keep the rounding of their largest value. As much as
    needed is added to the diagonal, in the failing rows only. A matrix that still has no root,
    because it is not finite, gets one of NaN, so that the host need not wait for its GPU.
    """
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrices)
    diagonal = matrices.diagonal(dim1=1, dim2=2)
    for share in ADDED_WHERE_ROUNDED:
        if not any_of(failed):
            return root
        added = diagonal.amax(1, keepdim=True) * (share * torch.finfo(matrices.dtype).eps)
        mended = matrices + torch.diag_embed(added * (failed > 0)[:, None].expand_as(diagonal))
        root, failed = torch.linalg.cholesky_ex(mended)
    return torch.where((failed > 0)[:, None, None], torch.full_like(root, math.nan), root)


class Metric(NamedTuple):
    """The metric P of what no constant explains, kept as its parts."""

    #: L with L L' = 1 + d W^1/2 G_C G_C' W^1/2: (R, M, M); L^-1 W^1/2 is a root of P
    root: Tensor
    #: W^1/2, (R, M, 1)
    weight: Tensor
    #: d, (R,)
    freedom: Tensor

    def __call__(self, values: Tensor) -> Tensor:
        """Values of images (R, M, k), transformed so that a sum of their squares is P's."""
        seen: Tensor = torch.linalg.solve_triangular(self.root, values * self.weight, upper=False)
        return seen

    def probes(self, n: int) -> Tensor:
        """Random combinations of images, (R, n, M): sums of their squares are P's, nearly."""
        rows, m = self.root.shape[:2]
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (m, n), generator=generator, device="cpu").to(self.root.dtype)
        signs = sent((2 * signs - 1) / n**0.5, self.root.device).expand(rows, -1, -1)
        found: Tensor = torch.linalg.solve_triangular(self.root.mT, signs, upper=True)
        return (found * self.weight).mT

    def twice(self, values: Tensor) -> Tensor:
        """P times values of images: (R, M) to (R, M)."""
        weighted = self.weight * values[:, :, None]
        return (self.weight * torch.cholesky_solve(weighted, self.root))[:, :, 0]


class ConstantModel:
    """Effects of channels and of their constants, from recent gradients.

    Args:
        like: (R, n), gives the numbers of tasks and channels, dtype and device.
        capacity: M, images kept.

    Attributes:
        gates: (R, n) of zeros and ones, at first all open; see :meth:`move`.
        effects: S, (R, M, n). Those of a wide network are in half precision, as are the slopes:
            both then take no more memory than the gradients of the recipes without constants.
        slopes: G, (R, M, n), in units of the channels' deviations.
        residuals: q, (R, M), with closed channels at their mean.
        numbers: int64 (R, M), of the images; -1 for none.
    """

    def __init__(self, like: Tensor, capacity: int) -> None:
        rows, n = like.shape
        wide = n >= MIN_CHANNELS_TO_NARROW and like.dtype == torch.float32
        dtype = torch.bfloat16 if wide else like.dtype
        self.gates = torch.ones_like(like)
        self.effects = like.new_zeros(rows, capacity, n, dtype=dtype)
        self.slopes = like.new_zeros(rows, capacity, n, dtype=dtype)
        self.residuals = like.new_zeros(rows, capacity)
        self.numbers = torch.full_like(self.residuals, -1, dtype=torch.int64)
        # G_C G_C', updated image by image and flip by flip.
        self._gram = like.new_zeros(rows, capacity, capacity)
        self._next = 0

    def add(
        self, residuals: Tensor, effects: Tensor, slopes: Tensor, numbers: Tensor | None = None
    ) -> None:
        """Add images: (R, b), (R, b, n), (R, b, n) and (R, b); the oldest ones are dropped."""
        b, capacity = residuals.shape[1], self.residuals.shape[1]
        at = (torch.arange(b, device=residuals.device) + self._next) % capacity
        self.effects[:, at] = effects.to(self.effects.dtype)
        self.slopes[:, at] = slopes.to(self.slopes.dtype)
        self.residuals[:, at] = residuals
        if numbers is not None:
            self.numbers[:, at] = numbers
        closed = self.slopes[:, at].to(slopes.dtype) * (1 - self.gates)[:, None, :]
        products = torch.bmm(closed, self._columns("slopes").mT)
        self._gram[:, at] = products
        self._gram[:, :, at] = products.mT
        self._next = (self._next + b) % capacity

    def move(self, gates: Tensor, n_flips: int) -> None:
        """Open and close channels, at most ``n_flips`` in each row; update residuals and metric."""
        change = gates - self.gates
        flipped = change.abs().topk(min(n_flips, gates.shape[1]), dim=1).indices
        sign = change.gather(1, flipped)
        slopes = self._columns("slopes", flipped)
        self._gram -= torch.bmm(slopes * sign[:, None, :], slopes.mT)
        effects = self._columns("effects", flipped)
        self.residuals += torch.bmm(effects, sign[:, :, None])[:, :, 0]
        self.gates = gates

    def present(self, constants: Tensor) -> Tensor:
        """The residuals with closed channels at their constants: (R, M)."""
        return self.residuals + self._along("slopes", (1 - self.gates) * constants)

    def metric(self, shares: Tensor, freedom: Tensor) -> Metric:
        """The metric P, for the weights of images ``shares`` (R, M) and d (R,)."""
        weight = shares.sqrt()[:, :, None]
        inner = self._gram * weight * weight.mT * freedom[:, None, None]
        inner.diagonal(dim1=1, dim2=2).add_(1.0)
        return Metric(rooted(inner), weight, freedom)

    def shrink(self, metric: Metric) -> Tensor:
        """The charge of closed channels on their own squared effect: (R, 1)."""
        rows, n = self.gates.shape
        some = torch.arange(0, n, -(-n // MAX_CORRELATED), device=self.gates.device)
        effects = self._unexplained(metric, some.expand(rows, -1))
        n_images = 1 / metric.weight[:, :, 0].pow(4).sum(1)
        return SHRINK * noise_share(effects, n_images)[:, None]

    def quadratic(
        self,
        metric: Metric,
        residuals: Tensor,
        trust: float,
        shrink: Tensor | float,
        channels: Tensor | None = None,
    ) -> QuadraticModel:
        """The quadratic model of what no constant explains, ready for a round of flips.

        ``residuals``, (R, M), are with closed channels at their mean. ``channels``, int64 (R, K),
        limits the model to these; see :class:`QuadraticModel` for ``trust`` and ``shrink``.
        """
        gates = self.gates if channels is None else self.gates.gather(1, channels)
        model = QuadraticModel(gates, 1, trust, shrink=shrink)
        model.gradients = self._unexplained(metric, channels)
        model.residuals = metric(residuals[:, :, None])[:, :, 0]
        model.begin(torch.ones_like(model.residuals))
        return model

    def candidates(
        self,
        metric: Metric,
        residuals: Tensor,
        trust: float,
        shrink: Tensor,
        flips: tuple[int, int, int],
        prices: Tensor | None = None,
    ) -> tuple[Tensor, int] | None:
        """As :meth:`QuadraticModel.candidates`, without all channels in the metric.

        The linear term of flips is exact; each channel's own squared effect is estimated from a few
        random projections of the images (Johnson and Lindenstrauss 1984), since the exact value
        would need a solution for every channel.

        Args:
            metric: See :meth:`quadratic`, as for the next three.
            residuals: See there.
            trust: See there.
            shrink: See there.
            flips: Numbers of gates that are open, will be closed, and will be exchanged.
            prices: (R, n), the cost of each open channel beside the squared error.
        """
        if self.gates.shape[1] < MIN_CHANNELS_TO_NARROW:
            return None
        probes = metric.probes(N_PROBES)
        effects, slopes = (self._combined(name, probes) for name in ("effects", "slopes"))
        square, both, slope_square = (
            (a * b).sum(1) for a, b in ((effects, effects), (effects, slopes), (slopes, slopes))
        )
        own = both.square() / (1 / metric.freedom[:, None] + slope_square) * self.gates
        trial = QuadraticModel(self.gates, 1, trust, shrink=shrink)
        trial.prices = prices
        trial._square = square - own
        trial._slope = self._over("effects", metric.twice(residuals))
        trial._origin = self.gates
        trial._curvature = trial._penalties()
        return trial.candidates(*flips)

    def best(
        self, shares: Tensor, freedom: Tensor, residuals: Tensor, now: Tensor, move: float
    ) -> Tensor:
        """New constants from those of now: (R, n), zero for open channels.

        Args:
            shares: (R, M), weights of the images.
            freedom: d, (R,).
            residuals: (R, M), with closed channels at their mean.
            now: (R, n).
            move: Deviation of one move, as of ``PRIOR``.
        """
        # Two pulls, to the mean and to the present value, equal one to a point between the two.
        ratio = (PRIOR / move) ** 2
        closed = 1 - self.gates
        start = now * closed * (ratio / (1 + ratio))
        metric = self.metric(shares, freedom / (1 + ratio))
        left = residuals + self._along("slopes", start)
        # As many equations as images, not as channels.
        change = self._over("slopes", metric.twice(left))
        return start - metric.freedom[:, None] * change * closed

    def _unexplained(self, metric: Metric, channels: Tensor | None) -> Tensor:
        """Effects in the metric, without the parts that open channels' own constants would mend."""
        gates = self.gates if channels is None else self.gates.gather(1, channels)
        effects, slopes = (metric(self._columns(name, channels)) for name in ("effects", "slopes"))
        own = (effects * slopes).sum(1) / (1 / metric.freedom[:, None] + slopes.square().sum(1))
        return effects.sub_(slopes.mul_((own * gates)[:, None, :]))

    def _columns(self, name: str, channels: Tensor | None = None) -> Tensor:
        values: Tensor = getattr(self, name)
        if channels is not None:
            values = values.gather(2, channels[:, None, :].expand(-1, values.shape[1], -1))
        return values.to(self.residuals.dtype)

    def _along(self, name: str, values: Tensor) -> Tensor:
        """Sum over channels: (R, n) to (R, M)."""
        return torch.bmm(self._columns(name), values[:, :, None])[:, :, 0]

    def _over(self, name: str, values: Tensor) -> Tensor:
        """Sum over images: (R, M) to (R, n)."""
        return self._combined(name, values[:, None])[:, 0]

    def _combined(self, name: str, values: Tensor) -> Tensor:
        """Several such sums: (R, k, M) to (R, k, n)."""
        return torch.bmm(values, self._columns(name))


class Apart(NamedTuple):
    """Results on images that constants were not fitted to, all (R,)."""

    #: How far from the means constants should be, in [0, 1]
    share: Tensor
    #: The fidelity there, and its upper bound with 95 % confidence; NaN with too few images
    fidelity: Tensor
    highest: Tensor

    def take(self, row: int, share: Tensor, whole: Tensor, change: Tensor) -> None:
        """Set a row's results from images (n,): the standard error is that of targets.bound."""
        error, spread = change.square(), (whole - whole.mean()).square()
        e, v = error.mean(), spread.mean().clamp(min=MIN_VARIANCE)
        ratio = e / v
        deviation = (error / e.clamp(min=MIN_VARIANCE) - spread / v).std() / len(whole) ** 0.5
        self.share[row] = share
        self.fidelity[row] = 1 - ratio
        self.highest[row] = 1 - ratio * torch.exp(-ONE_SIDED_95 * deviation)


def shrinkage(
    chunk: Chunk,
    recipe: Recipe,
    draws: Sequence[Sequence[Sequence[Draw]]],
    gates: Tensor,
    constants: Sequence[Tensor],
    means: Tensor,
    deviations: Tensor,
    apart: Sequence[bool],
) -> Apart:
    """How far from the means constants should be, by images that they were not fitted to.

    Of some shares of the way from means to constants, take the one that reduces the squared change
    of the task output most, minus some doubt: 0 if none does. ``draws`` are each row's images in
    two halves, ``gates`` (R, n) zeros and ones, ``constants`` twice (R, n), one for each half, in
    deviations from the mean, ``means`` and ``deviations`` (channels,); ``apart`` says for each row
    whether its images were kept apart from those learned from.
    """
    network = chunk.network
    (batch,) = chunk.batches([[[draw for half in row for draw in half] for row in draws]])
    halves = [half for row in draws for half, images in enumerate(row) for _ in images]
    second = torch.tensor(halves, device=network.device)[:, None] == 1
    first_half, second_half = (of_half[batch.rows] for of_half in constants)
    offsets = torch.where(second, second_half, first_half)
    offsets = deviations * to_channels(offsets, network.sites)
    clean = chunk.own_output(chunk.clean(batch), batch.rows)
    changes = []
    with torch.no_grad():
        for share in (0.0, *SHARES_TRIED):
            outputs = [
                network.gated(
                    tuple(item[at] for item in batch.inputs),
                    gates[batch.rows[at]],
                    means + share * offsets[at],
                )
                for part in network._passes(len(clean))
                for at in (slice(part.start, part.stop),)
            ]
            changes.append(chunk.own_output(torch.cat(outputs), batch.rows) - clean)
    unknown = torch.full_like(gates[:, 0], math.nan)
    result = Apart(gates.new_zeros(len(chunk)), unknown, unknown.clone())
    tried = gates.new_tensor((0.0, *SHARES_TRIED))
    ends = list(itertools.accumulate(sum(map(len, row)) for row in draws))
    for row, (start, end) in enumerate(itertools.pairwise([0, *ends])):
        n = end - start
        if n < MIN_TRIED:
            continue
        judge = QuadraticModel(gates[:1, :1], n, 0.0)
        if len(chunk.images[row].pools["other"]):
            judge.boundary += recipe.fitting("boundary")
        judge.weights += 1
        judge.whole = clean[None, start:end]
        losses: list[Tensor] = []
        for change in changes:
            judge.residuals = change[None, start:end]
            if not losses:
                shares = judge.shares()
            forgiven = judge.forgiven(recipe.fitting("free_scale"), shares)
            losses.append((judge.residuals - forgiven).square())
        gains = torch.cat(losses[1:]) - losses[0]
        mean = (shares * gains).sum(1)
        error = (shares * (gains - mean[:, None])).square().sum(1) * (n / (n - 1))
        doubt = DOUBT if apart[row] else DOUBT_WHERE_FEW
        least, at = (mean + doubt * error.sqrt()).min(0)
        at = torch.where(least < 0, at + 1, torch.zeros_like(at))
        by_share = torch.stack([change[start:end] for change in changes])
        result.take(row, tried[at], clean[start:end], by_share[at])
    return result


def learn_with_constants(
    chunk: Chunk,
    recipe: Recipe,
    sizes: Sequence[float],
    means: Tensor,
    deviations: Tensor,
    masks: Tensor | None = None,
) -> list[Learned]:
    """Learn gates and constants of a chunk of tasks, as :func:`learn_selection` does gates.

    Args:
        chunk: The tasks.
        recipe: The recipe; its own size is not used.
        sizes: See :func:`nad_attr.learning.selection.learn_selection`.
        means: (channels,).
        deviations: (channels,). The constants of a group move from the means along these together.
        masks: (R, n) of zeros and ones: keep these channels and fit constants only; None: learn
            the gates as well.
    """
    network = chunk.network
    rows, n = len(chunk), n_gates(network.sites)
    like = torch.ones(rows, n, device=network.device, dtype=network.dtype)
    path = [[n] * recipe.steps]
    if masks is None:
        path = budgets(recipe, n, [budget(size, network.sites) for size in sizes])
    steps = [open_after for part in path for open_after in part]
    ends = set(itertools.accumulate(map(len, path)))
    per_task = recipe.images_per_step
    capacity = steps_in_memory(recipe) * per_task
    constants = torch.zeros_like(like)
    closed_at = torch.full_like(like, -1.0)
    kept = [images.keep_apart(KEPT_SHARE, MAX_KEPT, MIN_TO_KEEP) for images in chunk.images]
    halves = [[[d for kind in row for d in kind[i::2]] for i in (0, 1)] for row, _ in kept]
    apart = torch.tensor([is_apart for _, is_apart in kept], device=network.device)[:, None]
    beside = [bool(len(images.pools["other"])) for images in chunk.images]
    # Only for outputs, present residuals and ages of images.
    boundary = recipe.fitting("boundary") * like.new_tensor(beside)
    outputs = QuadraticModel(like[:, :1], capacity, 0.0, boundary)
    model = ConstantModel(like, capacity)
    if masks is not None:
        model.gates = masks.to(like)
    curves: dict[str, list[Tensor]] = {"loss": [], "size": []}
    learned: list[Learned] = []
    n_open, shrink = n, like.new_zeros(rows, 1)
    for t, batch in enumerate(chunk.batches(drawn(chunk, recipe))):
        clean = chunk.own_output(chunk.clean(batch), batch.rows)
        output, effects, slopes = network.output_and_gradients(
            batch.inputs,
            model.gates[batch.rows],
            (means + deviations * to_channels(constants, network.sites))[batch.rows],
            chunk.classes[batch.rows],
            chunk.valid[batch.rows],
        )
        slopes = to_gates(slopes.mul_(deviations), network.sites)
        moved = constants[batch.rows] * slopes
        residual = output - clean
        at_mean = residual - ((1 - model.gates[batch.rows]) * moved).sum(1)
        numbers = torch.tensor(batch.numbers, device="cpu") % chunk.n_images
        numbers = sent(numbers, network.device)

        def by_row(values: Tensor, places: Tensor = batch.places) -> Tensor:
            return values[places].view(rows, per_task, *values.shape[1:])

        outputs.age(recipe.memory)
        outputs.add(by_row(clean), by_row(residual), like.new_zeros(rows, per_task, 1))
        model.add(by_row(at_mean), by_row(effects + moved), by_row(slopes), by_row(numbers))
        seen = min((t + 1) * per_task, capacity)
        variance = outputs.whole[:, :seen].var(dim=1, correction=0).clamp(min=MIN_VARIANCE)
        last = t + 1 in ends
        if steps[t] < n or last or masks is not None:
            outputs.residuals = model.present(constants)
            shares = outputs.shares()
            forgiven = outputs.forgiven(recipe.fitting("free_scale"), shares)
            loss = (shares * (outputs.residuals - forgiven).square()).sum(1)
            spread = PRIOR**2 / torch.maximum(loss, FLOOR * variance)

            def freedom(shares: Tensor, spread: Tensor = spread) -> Tensor:
                # Without any image, as when a task's only one is left out, nothing is explained.
                return spread / shares.square().sum(1).clamp(min=MIN_VARIANCE)

            if masks is None:
                metric = model.metric(shares, freedom(shares))
                if t % SHRINK_STEPS == 0 or n_open == n:
                    shrink = model.shrink(metric)
                before, residuals = model.gates, model.residuals - forgiven
                n_exchanged = exchanged(recipe, t, n, steps[t])
                flips = n_open, n_open - steps[t], n_exchanged
                prices = None if chunk.prices is None else chunk.prices * variance[:, None]
                found = model.candidates(metric, residuals, recipe.trust, shrink, flips, prices)
                channels, n_there = found or (None, n_open)
                part = model.quadratic(metric, residuals, recipe.trust, shrink, channels)
                if prices is not None:
                    part.prices = prices if channels is None else prices.gather(1, channels)
                flip_some(part, recipe, t, n_there, *flips[1:], variance)
                gates = part.gates
                if channels is not None:
                    gates = before.scatter(1, channels, gates)
                model.move(gates, flips[1] + 2 * (n_exchanged + SWAPS_PER_STEP + 2))
                n_open = steps[t]
                closed_at = torch.where(gates < before, torch.full_like(like, t), closed_at)
                if last:
                    if channels is not None:
                        residuals = model.residuals - forgiven
                        part = model.quadratic(metric, residuals, recipe.trust, shrink)
                        part.prices = prices
                    ranks = ranked(part, closed_at)
            residuals = model.residuals - forgiven
            constants = model.best(shares, freedom(shares), residuals, constants, MOVE)
        curves["loss"].append(by_row(residual).square().mean(1) / variance)
        curves["size"].append(model.gates.mean(1))
        chunk.advance(rows)
        if last:
            # A task that can spare no images is judged on those it learns from, with constants
            # fitted to the other half of them.
            fitted = []
            for half in (0, 1) if not bool(apart.all()) else ():
                without = shares.clone()
                for row, parts in enumerate(halves):
                    left_out = torch.tensor([i for i, _ in parts[half]], device=network.device)
                    without[row, torch.isin(model.numbers[row], left_out)] = 0
                without = without / without.sum(1, keepdim=True).clamp(min=MIN_VARIANCE)
                spread_there = freedom(without.clamp(min=0))
                fitted.append(model.best(without, spread_there, residuals, constants, math.inf))
            tried = [torch.where(apart, constants, c) for c in fitted] or [constants] * 2
            judged = shrinkage(
                chunk, recipe, halves, model.gates, tried, means, deviations, apart[:, 0].tolist()
            )
            ranks = model.gates if masks is not None else ranks
            so_far = {name: torch.stack(curve) for name, curve in curves.items()}
            for name in ("fidelity", "highest"):  # known only at the end
                so_far[f"{name}_apart"] = torch.full_like(so_far["loss"], math.nan)
                known = so_far[f"{name}_apart"][-1]
                # Without images kept apart, channels were chosen by the images that judge them.
                known.copy_(torch.where(apart[:, 0], getattr(judged, name), known))
            of_channels = to_channels(judged.share[:, None] * constants, network.sites)
            result = means + deviations * of_channels
            if not bool(torch.isfinite(result).all()):
                raise RuntimeError("the effects of channels on the task output are not finite.")
            learned.append(Learned(ranks, ranks.logit(), so_far, result))
    return learned
