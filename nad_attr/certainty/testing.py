"""Is a kept channel needed? Closings on held-out images: alone, in groups, and against others.

For one task, with A its sub-architecture:

1. Each kept channel is closed too, at its best constant, and the squared error of the task output
   compared image by image (:func:`single`).
2. Channels whose closing hurts may cancel: pairs and small groups are closed together
   (:func:`cancelling`).
3. Channels whose closing does not hurt may stand in for each other: they are closed one after the
   other for as long as that does no harm (:func:`standing_in`).
4. Other sub-architectures of the size, learned from halves or to avoid what seems needed, show what
   A could do without (:func:`compare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nad_attr.certainty.closing import FloatArray, State, TaskTrial, compared
from nad_attr.stats.tests import benjamini_hochberg

__all__ = ["LABELS", "Found", "compare", "examined"]

#: What a channel may be, as numbers in files; "" is a channel that is closed.
LABELS = ("", "needed", "replaceable", "no effect seen", "undecided")
CLOSED, NEEDED, REPLACEABLE, NO_EFFECT, UNDECIDED = range(5)

#: A channel is not closed on held-out images if learning images say, to first order, that closing
#: it does not hurt: a one-sided p-value above this. It counts as a test with p = 1.
PREFILTER = 0.5
#: How far from the channel's mean a best constant may be expected, and at most, in deviations.
PRIOR, FURTHEST = 1.0, 3.0
#: Learning images on which a constant is tried before it is used.
TRIED = 32
#: Channels, at most, that are closed together because they seem to cancel.
LARGEST_GROUP = 4
#: A group cancels if it costs no more than this share of what its costliest channel does alone.
CANCELLED = 0.5


@dataclass(eq=False)
class Found:
    """What the tests of one task say, each (all channels,); NaN where nothing was tested."""

    effect: FloatArray
    p: FloatArray
    q: FloatArray
    label: NDArray[np.int64]
    #: Channels that were not closed because the gradient says it does not hurt.
    skipped: int = 0
    #: Groups of channels that cancel.
    groups: list[tuple[int, ...]] = field(default_factory=list)
    #: Of each candidate: fidelity lost against A, and whether it is as faithful.
    lost: FloatArray = field(default_factory=lambda: np.zeros(0))
    as_faithful: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=bool))
    fidelity: float = float("nan")


class _Closer:
    """One task's sub-architecture, with the best constant of each channel that may be closed."""

    def __init__(
        self,
        learn: TaskTrial,
        held_out: TaskTrial,
        base: State,
        spread: Tensor,
        groups: NDArray[np.int64] | None = None,
    ) -> None:
        self.learn, self.held_out, self.base = learn, held_out, base
        self.kept = base.gates.nonzero().flatten().numpy()
        self.groups = groups
        output, effects, slopes = learn.gradients(base)
        residual, weights = output - learn.whole, learn.weights[:, None]
        effects, slopes = effects[:, self.kept], slopes[:, self.kept]
        deviation = spread.double().numpy()[self.kept]
        summed, n_of = effects, np.ones(1)
        if groups is not None:
            # A group goes by its first channel, closes as one, and shares out what it mends.
            _, first, of, n = np.unique(
                groups[self.kept], return_index=True, return_inverse=True, return_counts=True
            )
            summed, n_of = _together(effects, of)[:, of], n[of].astype(np.float64)
        # The least squares of one number, held near the mean as a normal prior would.
        loss = max(float(learn.weights @ residual**2), 0.01 * learn.variance)
        with np.errstate(divide="ignore", invalid="ignore"):
            pull = loss / (len(residual) * (PRIOR * deviation) ** 2)
            left = residual[:, None] - summed
            offset = -(weights * slopes * left).sum(0) / ((weights * slopes**2).sum(0) + pull)
            offset = offset / n_of
        offset = np.where(deviation > 0, np.nan_to_num(offset), 0.0)
        offset = np.clip(offset, -FURTHEST * deviation, FURTHEST * deviation)
        #: What closing each kept channel takes from the output of each learning image.
        self.change = effects - slopes * offset
        self.residual = residual
        self.offset = torch.zeros_like(base.constants, dtype=torch.float64)
        self.offset[self.kept] = torch.from_numpy(offset)
        if groups is not None:
            self.change, self.kept = _together(self.change, of), self.kept[first]
        self.place = {int(c): i for i, c in enumerate(self.kept)}
        #: Share of the way to its constant at which each channel does best when closed alone, and
        #: at which groups do for which :meth:`better` was asked.
        self.shares = torch.zeros_like(self.offset)
        self.share_of: dict[tuple[int, ...], float] = {}
        self.errors: dict[tuple[int, ...], FloatArray] = {}
        self.before = held_out.outputs([base])[0]

    def predicted(self, places: Sequence[int]) -> FloatArray:
        """Growth of the squared error of learning images, to first order, for places in kept."""
        after = self.residual - self.change[:, list(places)].sum(1)
        return np.asarray((after**2 - self.residual**2) / self.learn.variance)

    def closed(self, group: tuple[int, ...], share: float | None = None) -> State:
        """The sub-architecture without some channels, at a share of the way to their constants.

        None: at the group's own share, if it has one, else at each channel's.
        """
        gates, constants = self.base.gates.clone(), self.base.constants.clone()
        share = self.share_of.get(group) if share is None else share
        at = list(group)
        if self.groups is not None:
            at = np.flatnonzero(np.isin(self.groups, self.groups[at])).tolist()
        gates[at] = 0
        moved = self.offset[at] * (self.shares[at] if share is None else share)
        constants[at] += moved.to(constants.dtype)
        return State(gates, constants)

    def better(self, groups: Sequence[tuple[int, ...]]) -> list[float]:
        """Whether each group, closed together, does better at its constants (1) or at the means."""
        tried = [self.closed(group, share) for group in groups for share in (0.0, 1.0)]
        some = self.learn.outputs(tried, TRIED, self.base)
        numbers = self.learn.some(TRIED) if len(self.learn.own) > TRIED else slice(None)
        errors = (some - self.learn.whole[numbers]) ** 2 @ self.learn.weights[numbers]
        best: list[float] = np.argmin(errors.reshape(-1, 2), axis=1).astype(float).tolist()
        return best

    def choose_alone(self) -> None:
        """The better share for each kept channel, closed alone."""
        alone = self.better([(int(c),) for c in self.kept])
        self.shares[self.kept] = torch.tensor(alone, dtype=torch.float64, device="cpu")
        if self.groups is not None:  # all channels of a group as its first
            _, first, of = np.unique(self.groups, return_index=True, return_inverse=True)
            self.shares = self.shares[first[of]]

    def outputs(self, groups: Sequence[tuple[int, ...]], near: tuple[int, ...] = ()) -> FloatArray:
        """Outputs of held-out images with each group closed, at whichever constants are better.

        ``near`` is a group from which most differ in few channels.
        """
        new = [group for group in dict.fromkeys(groups) if group not in self.errors]
        if new:
            states = [self.closed(group) for group in new]
            for group, output in zip(
                new, self.held_out.outputs(states, near=self.closed(near)), strict=True
            ):
                self.errors[group] = output
        return np.stack([self.errors[group] for group in groups])

    def added(
        self, groups: Sequence[tuple[int, ...]], before: FloatArray | None = None
    ) -> FloatArray:
        """Growth of each held-out image's squared error, (groups, images)."""
        start = self.before if before is None else before
        return self.held_out.added(self.outputs(groups), start)


def _together(values: FloatArray, of: NDArray[Any]) -> FloatArray:
    """The sums over the columns of each group: (images, channels) to (images, groups)."""
    total = np.zeros((int(of.max()) + 1 if len(of) else 0, len(values)))
    np.add.at(total, of, values.T)
    return total.T


def single(closer: _Closer, found: Found) -> None:
    """Close each kept channel by itself; see the module's description."""
    kept, trial = closer.kept, closer.held_out
    closer.choose_alone()
    predicted = np.stack([closer.predicted([i]) for i in range(len(kept))])
    worth = compared(predicted, closer.learn.own).p <= PREFILTER
    found.skipped = int((~worth).sum())
    found.p[kept] = 1.0
    tested = kept[worth]
    if len(tested):
        result = compared(closer.added([(int(c),) for c in tested]), trial.own)
        found.effect[tested], found.p[tested] = result.mean, result.p
    found.q[kept] = benjamini_hochberg(found.p[kept])


def cancelling(
    closer: _Closer, found: Found, harmful: Sequence[int], tolerance: float, alpha: float
) -> set[int]:
    """Channels that cost much one by one and nothing together; see the module's description."""
    place, weights = closer.place, closer.learn.weights
    squares = weights @ closer.change**2
    candidates: set[tuple[int, ...]] = set()
    for channel in harmful:
        places = [place[channel]]
        alone = float(weights @ closer.predicted(places))
        while len(places) < min(LARGEST_GROUP, len(place)):
            left = closer.residual - closer.change[:, places].sum(1)
            cost = squares - 2 * (weights * left) @ closer.change
            cost[places] = np.inf
            places.append(int(cost.argmin()))
            if float(weights @ closer.predicted(places)) <= CANCELLED * alone:
                candidates.add(tuple(sorted(int(closer.kept[i]) for i in places)))
                break
    result: set[int] = set()
    if not candidates:
        return result
    # Small groups first: what they explain needs no larger one.
    groups = sorted(candidates, key=lambda group: (len(group), group))
    # What fits each alone need not cancel.
    closer.share_of.update(zip(groups, closer.better(groups), strict=True))
    for group, grown in zip(groups, closer.added(groups), strict=True):
        members = set(group) & set(harmful)
        if members <= result:
            continue
        costliest = max(float(found.effect[c]) for c in members)
        high = compared(grown, closer.held_out.own, 1 - alpha).high
        if high < min(tolerance, CANCELLED * costliest):
            found.groups.append(group)
            result |= members
    return result


def standing_in(
    closer: _Closer, harmless: Sequence[int], tolerance: float, alpha: float
) -> tuple[set[int], set[int]]:
    """Channels that matter once others are closed, and those that all close without harm.

    Args:
        closer: The sub-architecture.
        harmless: Channels whose closing does not hurt, those first that matter least.
        tolerance: Loss of fidelity that is no harm.
        alpha: Level of the tests.

    Returns:
        The first kind, and the second.
    """
    own = closer.held_out.own

    def no_harm(group: tuple[int, ...]) -> bool:
        return bool(compared(closer.added([group])[0], own, 1 - alpha).high < tolerance)

    def foreseen(group: tuple[int, ...]) -> bool:
        """Whether learning images foresee harm: then parts of the group are tried at once."""
        harm = closer.learn.weights @ closer.predicted([closer.place[c] for c in group])
        return bool(harm >= tolerance)

    def eliminate(order: Sequence[int]) -> tuple[list[int], list[int]]:
        closed: list[int] = []
        resisting: list[int] = []
        waiting = [list(order)]
        while waiting:
            group = waiting.pop()
            if not group:
                continue
            together = tuple(sorted([*closed, *group]))
            if (len(group) == 1 or not foreseen(together)) and no_harm(together):
                closed += group
            elif len(group) == 1:
                resisting += group
            else:
                half = (len(group) + 1) // 2
                waiting += [group[half:], group[:half]]
        return closed, resisting

    def needing(closed: list[int], resisting: list[int]) -> list[int]:
        """The channels whose closing costs more among others than it did alone."""
        if not closed or not resisting:
            return []
        those = tuple(sorted(closed))
        now = closer.outputs([tuple(sorted([*closed, c])) for c in resisting], those)
        before = closer.outputs([those])[0]
        more = closer.held_out.added(now, before) - closer.added([(c,) for c in resisting])
        q = benjamini_hochberg(compared(more, own).p)
        return [c for c, small in zip(resisting, q <= alpha, strict=True) if small]

    # What may do harm alone will not be shown to do none among others: nothing is tried for that.
    doubtful = [c for c in harmless if (c,) in closer.errors and not no_harm((c,))]
    alone = [c for c in harmless if c not in doubtful]
    closed, resisting = eliminate(alone)
    standing = needing(closed, resisting + doubtful)
    free = set(closed)
    if standing:
        # Close these first, and those that they stood in for become the ones that matter.
        closed, resisting = eliminate([*(c for c in standing if c not in doubtful), *closed])
        standing += needing(closed, resisting)
    return set(standing), free - set(standing)


def examined(
    learn: TaskTrial,
    held_out: TaskTrial,
    base: State,
    spread: Tensor,
    groups: Tensor | None = None,
    *,
    alpha: float,
    tolerance: float,
) -> Found:
    """Closings of one task: alone, and in groups. :func:`compare` adds what others show.

    Args:
        learn: Learning images.
        held_out: Held-out images.
        base: The sub-architecture.
        spread: (all channels,), how far each one's best constant may be expected.
        groups: int64 (all channels,), the gate of each, where several channels have one; they are
            closed together, and all that is found of a group is said of each of its channels.
        alpha: Level of the tests, and of false discoveries.
        tolerance: Loss of fidelity that counts as none.
    """
    n = len(base.gates)
    nan = np.full(n, np.nan)
    found = Found(nan.copy(), nan.copy(), nan.copy(), np.zeros(n, dtype=np.int64))
    closer = _Closer(learn, held_out, base, spread, None if groups is None else groups.numpy())
    error = held_out.weights @ (closer.before - held_out.whole) ** 2
    found.fidelity = float(1 - error / held_out.variance)
    kept = closer.kept
    if not len(kept):
        return found
    single(closer, found)
    harmful = [int(c) for c in kept if found.q[c] <= alpha]
    cancelled = cancelling(closer, found, harmful, tolerance, alpha)
    size = np.full(n, np.nan)
    size[kept] = learn.weights @ closer.change**2
    harmless = sorted((int(c) for c in kept if found.q[c] > alpha), key=lambda c: (size[c], c))
    standing, free = standing_in(closer, harmless, tolerance, alpha)
    found.label[kept] = UNDECIDED
    found.label[[c for c in harmful if c not in cancelled]] = NEEDED  # until another does as well
    found.label[list(cancelled | free)] = NO_EFFECT
    found.label[list(standing)] = REPLACEABLE
    if closer.groups is not None:
        _, first, of = np.unique(closer.groups, return_index=True, return_inverse=True)
        for name in ("effect", "p", "q", "label"):
            setattr(found, name, getattr(found, name)[first[of]])
    return found


def compare(
    found: Found,
    held_out: TaskTrial,
    base: State,
    others: Sequence[State],
    *,
    alpha: float,
    tolerance: float,
) -> None:
    """Hold a task's sub-architecture against others: what they do without may be replaceable.

    Args:
        found: What :func:`examined` found; its labels are brought to their end.
        held_out: See there.
        base: See there.
        others: Other sub-architectures of about the size.
        alpha: See there.
        tolerance: See there.
    """
    found.lost, found.as_faithful = np.zeros(len(others)), np.zeros(len(others), dtype=bool)
    if not others:
        return
    before, *outputs = held_out.outputs([base, *others])
    grown = held_out.added(np.stack(outputs), before)
    result = compared(grown, held_out.own, 1 - alpha)
    found.lost, found.as_faithful = result.mean, result.high < tolerance
    lacking = ~np.stack([other.gates.numpy() > 0.5 for other in others])
    replaced = lacking[found.as_faithful].any(0)
    doubted = lacking[result.p > alpha].any(0)
    label = found.label
    label[np.isin(label, (NEEDED, UNDECIDED)) & replaced] = REPLACEABLE
    label[(label == NEEDED) & doubted] = UNDECIDED
