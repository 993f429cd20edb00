"""Masks searched for each task by running gated images: rivals that learn masks, too.

All take ``passes``, the number of images that are run with gates for each task, so that all methods
can have the same.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.data.sources import Source
from nad_attr.gates.channels import budget, n_channels, split_sites
from nad_attr.gating.hooks import gated
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.outputs import task_outputs
from nad_attr.scoring.baselines import MeansScorer
from nad_attr.scoring.scorer import check_differentiable
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import seed_of

__all__ = [
    "COARScorer",
    "HardConcreteScorer",
    "IterativeScorer",
    "UGSScorer",
    "component_effects",
    "expected_gate",
    "hard_concrete",
    "open_probability",
    "uniform_gates",
    "window_gradient",
]

#: Hard-concrete gates: temperature, and the ends of the stretched interval (Louizos et al. 2018).
TEMPERATURE, LOW, HIGH = 2 / 3, -0.1, 1.1
#: Largest expected size, since a mask that is certainly open has no gradient.
MAX_EXPECTED_SIZE = 0.99
#: Share of the steps in which the wanted size falls from 1 to the final one.
FALLING_SHARE = 0.5


# -- Formulae ----------------------------------------------------------------------------------


def hard_concrete(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Gates in [0, 1] of uniform numbers in (0, 1); both ends have a positive probability.

    ``clamp(s (1.1 + 0.1) - 0.1, 0, 1)`` with ``s = sigmoid((logit(u) + log_alpha) / (2/3))``.

    Source: Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization",
    ICLR 2018, equations 10 and 11.

    Example:
        >>> hard_concrete(torch.zeros(3), torch.tensor([0.01, 0.5, 0.99]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    stretched = torch.sigmoid((torch.logit(uniform) + log_alpha) / TEMPERATURE) * (HIGH - LOW) + LOW
    return stretched.clamp(0, 1)


def open_probability(log_alpha: Tensor) -> Tensor:
    """Probability that a hard-concrete gate is not zero: the expected L0 (equation 12 there).

    Example:
        >>> open_probability(torch.zeros(1))
        tensor([0.8318])
    """
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-LOW / HIGH))


def expected_gate(log_alpha: Tensor) -> Tensor:
    """The gate of a final mask: ``clamp(1.2 sigmoid(log_alpha) - 0.1, 0, 1)`` (equation 13).

    Example:
        >>> expected_gate(torch.tensor([-9.0, 0.0, 9.0]))
        tensor([0.0000, 0.5000, 1.0000])
    """
    return (torch.sigmoid(log_alpha) * (HIGH - LOW) + LOW).clamp(0, 1)


def uniform_gates(probability: Tensor, uniform: Tensor) -> Tensor:
    """Gates that are 0 or 1, and uniform between with probability ``w = p (1 - p)``.

    With probability ``p - w/2`` one and ``1 - p - w/2`` zero; the mean is p.

    Source: Li and Janson, "Optimal ablation for interpretability", NeurIPS 2024 (uniform gradient
    sampling), and the authors' released code.

    Example:
        >>> uniform_gates(torch.full((3,), 0.5), torch.tensor([0.2, 0.5, 0.9]))
        tensor([1.0000, 0.5000, 0.0000])
    """
    window = probability * (1 - probability)
    return 1 - ((uniform - probability) / window.clamp(min=1e-12) + 0.5).clamp(0, 1)


def window_gradient(gates: Tensor, gradients: Tensor) -> Tensor:
    """Derivative of the expected loss by the channels' probabilities: (B, n) to (n,).

    The mean of the loss's derivative by a gate over those samples in which the gate is uniform:
    ``E[dL/dg | g uniform] = E[L(g = 1) - L(g = 0)]``. Zero where there is no such sample.

    Example:
        >>> gates = torch.tensor([[0.5, 1.0], [0.2, 0.0]])
        >>> window_gradient(gates, torch.tensor([[1.0, 7.0], [3.0, 7.0]]))
        tensor([2., 0.])
    """
    inside = ((gates > 0) & (gates < 1)).to(gradients.dtype)
    return (inside * gradients).sum(0) / inside.sum(0).clamp(min=1)


def component_effects(
    closed: Tensor, change: Tensor, *, ridge: float = 0.0, intercept: bool = True
) -> Tensor:
    """The effect of closing each channel, by linear regression on random ablations.

    Args:
        closed: (M, n), 1 where a channel was closed.
        change: (M,) or (M, k), of the output.
        ridge: Penalty of the squared effects.
        intercept: With a constant, as in the paper. Without, closing nothing has no effect.

    Returns:
        float64 (n,) or (n, k); the shortest of several solutions.

    Source: Shah, Ilyas, Madry, "Decomposing and Editing Predictions by Modeling Model
    Computation", ICML 2024 (COAR).

    Example:
        >>> closed = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
        >>> component_effects(closed, torch.tensor([1.0, -1.0, 4.0, 2.0])).round(decimals=3)
        tensor([-2.,  3.], dtype=torch.float64)
    """
    x, y = closed.double(), change.double()
    if intercept:
        x, y = x - x.mean(0), y - y.mean(0)
    gram = x.mT @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    effects: Tensor = torch.linalg.pinv(gram, hermitian=True) @ (x.mT @ y)
    return effects


# -- The search --------------------------------------------------------------------------------


class Search:
    """One task, and the images that are used for it.

    Attributes:
        task: The task.
        generator: All random numbers of this search.
        variance: Variance of the task output over these images, each kind with the same weight.
    """

    def __init__(
        self,
        scorer: SearchScorer,
        runner: Runner,
        source: Source,
        task: Task,
        pools: Sequence[Tensor],
        clean: Tensor,
        means: Mapping[str, Tensor],
        width: int,
    ) -> None:
        self.task, self._scorer, self._runner, self._source = task, scorer, runner, source
        self._pools, self._clean, self._means, self._width = pools, clean, means, width
        key = task[0] if isinstance(task, tuple) and len(task) == 1 else task
        seed = seed_of(type(scorer).__name__, scorer.seed, key)
        self.generator = torch.Generator().manual_seed(seed)
        self._waiting = [torch.empty(0, dtype=torch.long, device="cpu") for _ in pools]
        centre = torch.stack([clean[pool].mean() for pool in pools]).mean()
        spread = torch.stack([(clean[pool] - centre).square().mean() for pool in pools]).mean()
        self.variance = float(spread) if spread > 1e-12 else 1.0

    def uniform(self, rows: int) -> Tensor:
        """Numbers in (0, 1), one for each image and channel: float64."""
        shape = rows, n_channels(self._scorer.sites)
        drawn = torch.rand(*shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return drawn.clamp(1e-6, 1 - 1e-6)

    def draw(self, n: int) -> Tensor:
        """The numbers of the next n images, of each kind in turn; each kind is shuffled."""
        chosen = []
        for i, pool in enumerate(self._pools):
            wanted = n // len(self._pools) + (i < n % len(self._pools))
            while len(self._waiting[i]) < wanted:
                order = torch.randperm(len(pool), generator=self.generator, device="cpu")
                self._waiting[i] = torch.cat([self._waiting[i], pool[order]])
            chosen.append(self._waiting[i][:wanted])
            self._waiting[i] = self._waiting[i][wanted:]
        return torch.cat(chosen)

    def change(self, numbers: Tensor, gates: Tensor) -> Tensor:
        """The change of the task output of these images by gates (B, n): float64 (B,)."""
        with torch.no_grad():
            found = [now.detach().cpu().double() for now, _, _ in self._passes(numbers, gates)]
        return torch.cat(found) - self._clean[numbers]

    def gradient(self, numbers: Tensor, gates: Tensor, *, of_error: bool) -> Tensor:
        """Gradient by each image's gates, float64 (B, n).

        It is that of the task output, or of the image's squared error over the variance.
        """
        found = []
        for now, leaf, some in self._passes(numbers, gates):
            check_differentiable(now)
            (gradient,) = torch.autograd.grad(now.sum(), leaf)
            gradient = gradient.cpu().double()
            if of_error:
                error = now.detach().cpu().double() - self._clean[numbers[some]]
                gradient = gradient * (2 / self.variance * error)[:, None]
            found.append(gradient)
        return torch.cat(found)

    def _passes(self, numbers: Tensor, gates: Tensor) -> Iterator[tuple[Tensor, Tensor, slice]]:
        cuts = [slice(cut[0], cut[-1] + 1) for cut in chunks(len(numbers), self._width)]
        drawn = self._runner.draw(self._source, [numbers[cut].tolist() for cut in cuts])
        model, sites = self._runner.model, self._scorer.sites
        for cut, inputs in zip(cuts, drawn, strict=True):
            # At least single precision, so that no gate is rounded.
            dtype = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
            dtype = torch.promote_types(dtype, torch.float32)
            leaf = gates[cut].to(self._runner.device, dtype).requires_grad_(torch.is_grad_enabled())
            means = {name: mean.to(leaf) for name, mean in self._means.items()}
            with gated(model, split_sites(leaf, sites), sites=sites, means=means):
                outputs = self._runner(inputs)
                yield task_outputs(outputs, [self.task])[:, 0], leaf, cut


class SearchScorer(MeansScorer):
    """Searches a mask for each task; a subclass defines how.

    Closed channels are at their means. Images count as for every scorer: own images, or with
    ``include_others`` own and other images in equal parts. They are drawn in an order that depends
    on the seed and the task, each kind without repetition before all have been drawn.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        passes: Images that are run with gates, for each task.
        images_per_step: Of these, together.
        means: As for :class:`~nad_attr.evaluation.CentredEffectScorer`.
        seed: Another draw for each seed.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        passes: int = 2000,
        images_per_step: int = 40,
        means: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(model, sites, means=means)
        self.passes = check_count(passes, "passes")
        self.images_per_step = min(check_count(images_per_step, "images_per_step"), passes)
        self.seed = seed

    @abstractmethod
    def search(self, task: Search) -> Tensor:
        """The channels' scores: float64 (n,) of all sites, higher = more important."""

    @property
    def n_steps(self) -> int:
        """Number of steps that the passes allow."""
        return self.passes // self.images_per_step

    def image_scores(self, batch: object) -> dict[str, Tensor]:
        """Not used: a mask is searched with all images together."""
        raise NotImplementedError(f"{type(self).__name__} scores no single images.")

    def _totals(
        self,
        runner: Runner,
        source: Source,
        tasks: Sequence[Task],
        weights: Tensor,
        signed: Sequence[bool],
    ) -> dict[str, Tensor]:
        width = self.images_per_batch(runner.images_per_pass(source))
        means = self.prepare(runner, source, width)
        counting = weights.any(0).any(0).nonzero()[:, 0]
        clean = torch.zeros(weights.shape[1:], dtype=torch.float64, device="cpu")
        numbers = [counting[cut[0] : cut[-1] + 1].tolist() for cut in chunks(len(counting), width)]
        drawn = runner.draw(source, numbers, f"scoring with {type(self).__name__}")
        for chosen, inputs in zip(numbers, drawn, strict=True):
            with torch.no_grad():
                outputs = self._outputs(runner, source.labels, tasks, inputs)
            clean[:, chosen] = task_outputs(outputs, tasks).T.cpu().double()
        found = []
        for weight in weights:
            scores = []
            for t, (task, row) in enumerate(zip(tasks, weight, strict=True)):
                # Images of the same weight are of one kind.
                pools = [(row == w).nonzero()[:, 0] for w in row[row > 0].unique().flip(0)]
                search = Search(self, runner, source, task, pools, clean[t], means, width)
                scores.append(self.search(search))
            found.append(torch.stack(scores))
        every = torch.stack(found)
        shown = [every if sign or not self.has_sign else every.abs() for sign in signed]
        return split_sites(torch.stack(shown, dim=1), self.sites)


# -- Masks learned by gradients ----------------------------------------------------------------


class _Sparse(SearchScorer):
    """Learns a number for each channel by Adam, at a wanted expected size.

    The price of a channel is the one that keeps the expected size: a Lagrange multiplier, solved
    for in each step. Remaining changes of the size by Adam's steps are corrected by adding the same
    value to all numbers. The wanted size falls from 1 in the first half of the steps.
    """

    #: Initial value of the channels' numbers: open with a high probability.
    start: float

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        size: float = 0.4,
        learning_rate: float = 0.2,
        passes: int = 2000,
        images_per_step: int = 40,
        means: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, sites, passes=passes, images_per_step=images_per_step, means=means, seed=seed
        )
        budget(size, self.sites)
        if not 0 < learning_rate < math.inf:
            raise ValueError(f"learning_rate must be above 0, got {learning_rate}.")
        self.size, self.learning_rate = float(size), learning_rate

    @abstractmethod
    def expected(self, numbers: Tensor) -> Tensor:
        """Probability that each channel is open: (n,)."""

    @abstractmethod
    def error_gradient(self, task: Search, numbers: Tensor, images: Tensor) -> Tensor:
        """Derivative of the mean squared error by the channels' numbers: (n,)."""

    def search(self, task: Search) -> Tensor:
        """The channels' numbers after the last step."""
        numbers = torch.full(
            (n_channels(self.sites),), self.start, dtype=torch.float64, device="cpu"
        ).requires_grad_()
        optimiser = torch.optim.Adam([numbers], self.learning_rate)
        for step in range(self.n_steps):
            wanted = 1 - (1 - self.size) * min(1.0, (step + 1) / (FALLING_SHARE * self.n_steps))
            gradient = self.error_gradient(task, numbers.detach(), task.draw(self.images_per_step))
            (by_size,) = torch.autograd.grad(self.expected(numbers).mean(), numbers)
            price = (gradient @ by_size) / (by_size @ by_size).clamp(min=1e-300)
            numbers.grad = gradient - price * by_size
            optimiser.step()
            with torch.no_grad():
                numbers += self._shift(numbers, min(wanted, MAX_EXPECTED_SIZE))
        return numbers.detach()

    def _shift(self, numbers: Tensor, wanted: float) -> float:
        """The value to add to all numbers for an expected size, by bisection."""
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            if float(self.expected(numbers + middle).mean()) < wanted:
                low = middle
            else:
                high = middle
        return (low + high) / 2


class HardConcreteScorer(_Sparse):
    """Hard-concrete L0 masks that keep the task output, learned for an exact size.

    Each image gets gates drawn from the hard-concrete distribution (:func:`hard_concrete`); Adam
    moves their ``log_alpha`` down the squared error of the task output, in units of its variance,
    plus a price of L0 (:func:`open_probability`) that keeps the expected size as asked for. The
    scores are ``log_alpha``; cut them at ``size``.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        size: Share of the channels that the mask is learned for, in (0, 1].
        learning_rate: Of Adam.
        passes: Images that are run with gates, for each task: one forward and one backward pass.
        images_per_step: Of these, together.
        means: The values of closed channels, ``{site name: (C,)}``. None: the means over all images
            that the scorer is called with.
        seed: Another draw for each seed.

    Raises:
        TypeError, ValueError: If an option is out of its range, or means and sites do not fit.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> scorer = HardConcreteScorer(net, [GateSite("0", 3, 1)], size=1 / 3)
        >>> scorer(images, torch.arange(40) % 3)["0"].argmax(1)
        tensor([0, 1, 2])

    Source:
        Louizos, Welling, Kingma, "Learning Sparse Neural Networks through L0 Regularization", ICLR
        2018; a size in place of a penalty by a Lagrangian: Wang, Wohlwend, Lei, "Structured Pruning
        of Large Language Models", EMNLP 2020.
    """

    start = 2.0

    def expected(self, numbers: Tensor) -> Tensor:
        """Probability that the gate is not zero."""
        return open_probability(numbers)

    def error_gradient(self, task: Search, numbers: Tensor, images: Tensor) -> Tensor:
        """Gradient through the gates' formula."""
        leaf = numbers.clone().requires_grad_()
        gates = hard_concrete(leaf, task.uniform(len(images)))
        by_gates = task.gradient(images, gates.detach(), of_error=True) / len(images)
        (gradient,) = torch.autograd.grad(gates, leaf, by_gates)
        return gradient


class UGSScorer(_Sparse):
    """Uniform gradient sampling: the probabilities with which channels are open in a good mask.

    Each image gets gates that are 0, 1 or uniform between (:func:`uniform_gates`). The derivative
    of the expected loss by a channel's probability is the mean of the loss's derivative by its gate
    over uniform gates (:func:`window_gradient`). The loss is the squared error of the task output
    in units of its variance, plus a price for each channel that keeps the expected size as asked
    for (the paper learns one mask for each of several prices). The scores are the probabilities'
    logits; cut them at ``size``.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        size: See :class:`HardConcreteScorer`, as ``learning_rate``, ``passes``,
            ``images_per_step`` and ``seed``.
        means: See there. The paper learns constants with the mask; give the final sub-architecture
            its own with :func:`nad_attr.fit_constants`.

    Raises:
        TypeError, ValueError: See there.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> scorer = UGSScorer(net, [GateSite("0", 3, 1)], size=1 / 3)
        >>> scorer(images, torch.arange(40) % 3)["0"].argmax(1)
        tensor([0, 1, 2])

    Source:
        Li and Janson, "Optimal ablation for interpretability", NeurIPS 2024, arXiv 2409.09951.
    """

    start = 1.0

    def expected(self, numbers: Tensor) -> Tensor:
        """The probability."""
        return numbers.sigmoid()

    def error_gradient(self, task: Search, numbers: Tensor, images: Tensor) -> Tensor:
        """The estimate, as a gradient of the logits."""
        probability = numbers.sigmoid()
        gates = uniform_gates(probability, task.uniform(len(images)))
        by_gates = task.gradient(images, gates, of_error=True)
        return window_gradient(gates, by_gates) * probability * (1 - probability)


# -- Regression, and closing step by step ------------------------------------------------------


class COARScorer(SearchScorer):
    """Component attribution by regression: a linear model of the effects of random ablations.

    Each image is run with a random share of all channels closed; the change of the task output is
    regressed on the closed channels, through zero, because closing none has no effect. The score is
    the output that a channel adds; unsigned, its absolute value. No gradients are needed.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        share: Share of the channels that is closed at once, in (0, 1).
        signed: Keep the sign: channels that speak against the task come last.
        ridge: Penalty of the squared effects, in units of the output's variance over ablations.
        passes: Images that are run, for each task: one forward pass.
        images_per_step: Of these, together.
        means: See :class:`HardConcreteScorer`.
        seed: Another draw for each seed.

    Raises:
        TypeError, ValueError: If an option is out of its range, or means and sites do not fit.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False)).eval()
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, -2.0, 1.0]]))
        >>> site = GateSite("0", 3, 1, at_input=True)
        >>> scorer = COARScorer(net, [site], share=0.4, signed=True, ridge=0.0,
        ...                     means={"0": torch.zeros(3)})
        >>> scorer(torch.ones(2, 3), torch.tensor([1, 0]), tasks=[0])["0"].round(decimals=4)
        tensor([[ 3., -2.,  1.]])

    Source:
        Shah, Ilyas, Madry, "Decomposing and Editing Predictions by Modeling Model Computation",
        ICML 2024, arXiv 2404.11534. There each image has its own regression; here the images of a
        task share one, which is the mean of theirs if all images see all ablations.
    """

    has_sign = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        share: float = 0.1,
        signed: bool = False,
        ridge: float = 1.0,
        passes: int = 2000,
        images_per_step: int = 40,
        means: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, sites, passes=passes, images_per_step=images_per_step, means=means, seed=seed
        )
        if not 0 < share < 1:
            raise ValueError(f"share must be above 0 and below 1, got {share}.")
        if not 0 <= ridge < math.inf:
            raise ValueError(f"ridge must be 0 or more, got {ridge}.")
        self.share, self.signed, self.ridge = share, signed, ridge

    def search(self, task: Search) -> Tensor:
        """Minus the effect of closing each channel."""
        n = n_channels(self.sites)
        count = min(max(1, round(self.share * n)), max(1, n - 1))
        closed, change = [], []
        for _ in range(self.n_steps):
            images = task.draw(self.images_per_step)
            chosen = task.uniform(len(images)).topk(count, dim=1).indices
            mask = torch.zeros(len(images), n, dtype=torch.float64, device="cpu")
            mask.scatter_(1, chosen, 1.0)
            closed.append(mask)
            change.append(task.change(images, 1 - mask))
        return -component_effects(
            torch.cat(closed), torch.cat(change), ridge=self.ridge, intercept=False
        )


class IterativeScorer(SearchScorer):
    """Closes a few channels, scores the others again, until the size is reached.

    In each round the images' task outputs are differentiated by the gates of the present network,
    and the open channels with the least ``E |dz_k/dg|`` are closed: the first-order effect of
    closing, as in :class:`~nad_attr.evaluation.CentredEffectScorer`, which is only the first round.
    The number of open channels falls geometrically. Channels that are closed later score higher, so
    that one run serves all sizes from ``size`` on.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        size: Share of the channels that stay open to the end, in (0, 1].
        rounds: Rounds of scoring. None: as many as there are steps of ``images_per_step``.
        passes: Images that are run with gates, for each task: one forward and one backward pass.
        images_per_step: Of these, together.
        means: See :class:`HardConcreteScorer`.
        seed: Another draw for each seed.

    Raises:
        TypeError, ValueError: If an option is out of its range, or means and sites do not fit.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
        >>> scorer = IterativeScorer(net, [GateSite("0", 3, 1)], size=1 / 3)
        >>> scorer(images, torch.arange(40) % 3)["0"].argmax(1)
        tensor([0, 1, 2])

    Source:
        Iterative pruning by first-order importance: Molchanov et al., "Pruning Convolutional Neural
        Networks for Resource Efficient Inference", ICLR 2017; the schedule of de Jorge et al.,
        "Progressive Skeletonization", ICLR 2021 (iterative SNIP, exponential).
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        size: float = 0.05,
        rounds: int | None = None,
        passes: int = 2000,
        images_per_step: int = 40,
        means: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            model, sites, passes=passes, images_per_step=images_per_step, means=means, seed=seed
        )
        budget(size, self.sites)
        self.size = float(size)
        self.rounds = self.n_steps if rounds is None else check_count(rounds, "rounds")
        if self.rounds > passes:
            raise ValueError(f"{passes} passes are less than one image for {rounds} rounds.")

    def search(self, task: Search) -> Tensor:
        """The round in which a channel was closed, and its score then, below one."""
        n, rounds = n_channels(self.sites), self.rounds
        left = budget(self.size, self.sites)
        gates = torch.ones(n, dtype=torch.float64, device="cpu")
        found = torch.zeros_like(gates)
        per_round = self.passes // rounds
        for number in range(rounds):
            images = task.draw(per_round)
            every = gates.expand(len(images), -1)
            score = task.gradient(images, every, of_error=False).abs().mean(0)
            is_open = gates > 0
            found[is_open] = number + score[is_open] / (score[is_open].max() * 1.001 + 1e-300)
            keep = max(left, round(n * (left / n) ** ((number + 1) / rounds)))
            to_close = int(is_open.sum()) - keep
            if to_close > 0:
                order = torch.where(is_open, found, math.inf).argsort(stable=True)
                gates[order[:to_close]] = 0
            found[gates > 0] += 1
        return found
