"""The verdict: does a sub-architecture suffice, is it needed, specific, minimal, found again?

Each question is a hypothesis test whose null is the uninteresting case, and the null's model is a
random choice of as many channels at each site, treated in all else as the channels in question.

Source: Shi et al., "Hypothesis Testing the Circuit Hypothesis in LLMs", NeurIPS 2024, whose tests
of sufficiency, partial necessity and minimality hold a circuit against random ones as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict_result import QUESTIONS, Verdict
from nad_attr.data.labels import Task, other_images, own_images, tasks_in
from nad_attr.data.sources import ChosenSource, Data, Source, as_source
from nad_attr.evaluation.measures import constant_up_to_rounding, spearman
from nad_attr.evaluation.responses import Responses, answers, as_architectures, tasks_of_rows
from nad_attr.gates.channels import channels_of, gate_of_channel, n_gates, open_gates, to_channels
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.session import Session
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.stats.bootstrap import bootstrap_interval, times_drawn
from nad_attr.stats.p_values import least_p, permutation_p
from nad_attr.system.rng import seed_of

__all__ = ["Verdict", "verdict"]

#: Draws of the bootstrap over images, and of random channels where no network is run for them.
N_BOOTSTRAP, N_DEALT = 500, 999
#: Steps in which the constants of each choice of channels are fitted: few, for there are many
#: choices. More move those in question and random ones by less than what lies between them.
FIT_STEPS = 6
#: Kept channels that are closed one by one, at most, and the share that has to have an effect.
N_CLOSED, EFFECTIVE = 40, 0.9
#: What has no effect: less than this share of the task output's variance.
NO_EFFECT = 1e-5
#: How much an own AUC below one half, or a rank correlation below zero, counts, of what one as far
#: above it does.
BROKEN = 0.01
#: Agreement with other runs from which on a sub-architecture is found again.
STABLE = 0.6
#: Other tasks that are looked at, at most.
MAX_OTHERS = 20


class _Claim(NamedTuple):
    """One answer with its numbers."""

    answer: str = "not asked"
    value: float = np.nan
    low: float = np.nan
    high: float = np.nan
    baseline: float = np.nan
    p: float = np.nan


def verdict(
    model: nn.Module,
    gates: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data | None,
    held_out: Data,
    *,
    certainty: ChannelCertainty | None = None,
    replicas: Sequence[TaskGates | Sequence[SubArchitecture]] | None = None,
    size: float | None = None,
    n_random: int = 19,
    n_images: int = 200,
    level: float = 0.05,
    stable: float = STABLE,
    seed: int = 0,
    run: RunOptions | None = None,
) -> Verdict:
    """Test for each task what its sub-architecture is said to be.

    * *sufficient*: with all else closed the task output stays. Its fidelity is above zero and
      above that of random channels; its own AUC is above one half.
    * *necessary*: with these channels closed the own AUC falls, and below where it falls without
      as many random channels.
    * *specific*: with these channels closed, the other tasks' outputs keep their ranking of images
      better than without as many random channels; and better than the task's own output does, by
      more than without random channels.
    * *minimal*: closing any one of them moves the task output away from the whole network's, for
      all but a tenth of them. Some are tested, drawn at random; with ``certainty`` all are.
    * *stable*: other runs chose the same channels, by ``certainty`` or ``replicas``.

    Random channels are as many at each site and closed in the same way. Where the gates have the
    best constants, each choice of channels gets its own, and so that nothing but the choice can
    win, those in question are fitted anew in just the same steps for this comparison. Closed are
    *kept* channels always at what their means are.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        gates: Task gates, or sub-architectures of the same sites, each of another task.
        data: Images that the gates were learned from: constants are fitted on them, and the
            measures on them stand beside those on held-out ones. None: neither; gates with
            constants of their own need them.
        held_out: Images that the gates were not learned from.
        certainty: What :func:`nad_attr.certainty` gave for these gates; None, and for
            tasks that it lacks: minimality is tested on a sample, and stability on ``replicas``.
        replicas: The same tasks' gates of other runs, such as other seeds or halves of the images.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        n_random: Random architectures that each is held against; 1 / level - 1 at least.
        n_images: Held-out images for each task, at most: own ones, and as many others.
        level: Error rate of each answer.
        stable: Agreement, corrected for chance, that stability asks for.
        seed: Of all draws.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The answers. What cannot be asked (no own images, no other task) is "not asked".

    Raises:
        GatingError, SiteError: See :func:`nad_attr.evaluation.evaluate`.
        TypeError: If an argument is of a wrong kind.
        ValueError: See :func:`nad_attr.evaluation.evaluate`; also if ``n_random`` is too small for
            ``level``, gates with constants come without data, or replicas are of other sites or
            lack a task.

    Example:
        >>> from nad_attr.evaluation import planted
        >>> known = planted("plain", n_classes=3, width=24, n_images=60)
        >>> result = verdict(known.model, known.circuit[1], known.data, known.held_out, seed=1)
        >>> result.answers[0]
        ('holds', 'holds', 'holds', 'holds', 'not asked')
    """
    archs = as_architectures(gates, size)
    tasks = tasks_of_rows(archs)
    if len(set(tasks)) < len(tasks):
        raise ValueError("a task is there twice; give one sub-architecture for each task.")
    check_count(n_random, "n_random")
    check_count(n_images, "n_images", least=4)
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}.")
    if least_p(n_random) > level + 1e-12:
        raise ValueError(
            f"{n_random} random architectures cannot give a p below {least_p(n_random):.3g}; level "
            f"{level:g} needs n_random={round(1 / level) - 1} at least."
        )
    others = [_replica(found, archs) for found in replicas or ()]
    source = as_source(held_out, any_labels=True)
    learned = None if data is None else as_source(data, any_labels=True)
    runner = Runner(model, run)
    runner.fit(source)
    drawn = [[_dealt(arch, draw, seed) for arch in archs] for draw in range(n_random)]
    tried, closing = _fitted(model, archs, drawn, learned, gates, seed, run)
    names = gates.task_names if isinstance(gates, TaskGates) else None
    names = tuple(names or map(str, tasks))
    rows: list[list[_Claim]] = []
    measures: list[dict[str, float]] = []
    notes: dict[str, tuple[str, ...]] = {}
    counts = []
    with runner.bar(len(archs), "reaching a verdict", "task") as bar:
        for t, arch in enumerate(archs):
            case = _Case(
                runner,
                arch,
                [group[t] for group in tried],
                closing if arch.own_constants else arch.means,
                tasks,
                source,
                n_images,
                seed,
            )
            said: list[str] = []
            counts.append(len(case.rows))
            if case.lacks:
                said.append(f"Not asked: {case.lacks}.")
                rows.append([_Claim()] * len(QUESTIONS))
                measures.append({})
            else:
                table = None
                if certainty is not None and arch.task in certainty.tasks:
                    table = _table_of(certainty, arch)
                case.measure(one_by_one=table is None)
                claims = [case.sufficient(level), case.necessary(level), case.specific(level, said)]
                claims.append(case.minimal(level) if table is None else _minimal(table, level))
                claims.append(
                    _stable(arch, table, [group[t] for group in others], stable, level, seed)
                )
                rows.append(claims)
                measures.append(case.beside() | case.on_learned(learned, n_images))
            if said:
                notes[names[t]] = tuple(said)
            bar.update()
    numbers = {
        name: np.array([[getattr(claim, name) for claim in row] for row in rows], dtype=np.float64)
        for name in ("value", "low", "high", "baseline", "p")
    }
    known = list(dict.fromkeys(name for found in measures for name in found))
    return Verdict(
        tasks,
        names,
        np.array([arch.n_kept for arch in archs], dtype=np.int64),
        n_gates(archs[0].sites),
        np.array(counts, dtype=np.int64),
        level,
        n_random,
        tuple(tuple(claim.answer for claim in row) for row in rows),
        **numbers,
        measures={n: np.array([found.get(n, np.nan) for found in measures]) for n in known},
        notes=notes,
    )


# -- Random channels, and what stands in place of closed ones --------------------------------------


def _dealt(arch: SubArchitecture, draw: int, seed: int) -> SubArchitecture:
    """Random channels, at each site as many as the sub-architecture keeps there."""
    generator = torch.Generator().manual_seed(seed_of(seed, "verdict", draw, arch.task))
    masks = {}
    for site in arch.sites:
        gates = open_gates(site, arch[site.name])
        order = torch.randperm(len(gates), generator=generator, device="cpu")
        masks[site.name] = to_channels(gates[order], [site])
    return arch._with_masks(masks, arch.task)


def _fitted(
    model: nn.Module,
    archs: list[SubArchitecture],
    drawn: list[list[SubArchitecture]],
    learned: Source | None,
    gates: object,
    seed: int,
    run: RunOptions | None,
) -> tuple[list[list[SubArchitecture]], dict[str, Tensor] | None]:
    """Those in question and the random ones, closed alike.

    Also the means that kept channels are closed at, where closed ones have their own constants.
    """
    groups = [archs, *drawn]
    if not any(arch.own_constants for arch in archs):
        return groups, None
    if learned is None:
        raise ValueError(
            "these gates have constants of their own in place of closed channels: give data, the "
            "images that they were learned from, so that random channels get theirs as well."
        )
    given = getattr(gates, "recipe", None)
    recipe = Recipe() if given is None or isinstance(given, PaperRecipe) else given
    recipe = replace(
        recipe, ablation="optimal", steps=FIT_STEPS, fidelity=None, size=0.5, replicas=1
    )
    tasks = tasks_of_rows(archs)
    session = Session(model, learned, tasks, recipe, archs[0].sites, seed=seed, run=run)
    bar = session.network.bar(len(groups) * len(tasks) * FIT_STEPS, "fitting constants", "step")
    with bar:
        fitted = session.fit([arch for group in groups for arch in group], advance=bar.update)
    return [fitted[a : a + len(tasks)] for a in range(0, len(fitted), len(tasks))], session.means()


def _replica(
    found: TaskGates | Sequence[SubArchitecture], archs: Sequence[SubArchitecture]
) -> list[SubArchitecture]:
    """Another run's sub-architectures of the same tasks, in their order."""
    rows = {arch.task: arch for arch in as_architectures(found, None)}
    for arch in archs:
        if arch.task not in rows:
            raise ValueError(f"a replica lacks task {arch.task}; learn the same tasks.")
        if rows[arch.task].sites != arch.sites:
            raise ValueError("a replica has other gate sites than the gates.")
    return [rows[arch.task] for arch in archs]


# -- One task --------------------------------------------------------------------------------------


class _Resampled:
    """AUC and fidelity of own and other images, as they are and resampled."""

    def __init__(self, own: NDArray[np.bool_], seed: int) -> None:
        self.own, self.other = np.flatnonzero(own), np.flatnonzero(~own)
        parts = []
        for i, rows in enumerate((self.own, self.other)):
            drawn = [times for _, times in times_drawn(len(rows), N_BOOTSTRAP, seed + i)]
            times = np.concatenate([np.ones((1, len(rows))), *drawn])
            parts.append(times / len(rows))
        self.times = parts

    def auc(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """(1 + draws,), the first of the images as they are."""
        high, low = scores[self.own][:, None], scores[self.other][None]
        wins = (high > low) + 0.5 * (high == low)
        found: NDArray[np.float64] = ((self.times[0] @ wins) * self.times[1]).sum(1)
        return found

    def _mean(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        halves = (times @ values[at] for times, at in zip(self.times, self._parts(), strict=True))
        return np.asarray(sum(halves) / 2)

    def _parts(self) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
        return self.own, self.other

    def fidelity(
        self, whole: NDArray[np.float64], gated: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """(1 + draws,), the first of the images as they are; NaN where the output is constant."""
        centred = whole - whole.mean()
        variance = self._mean(centred**2) - self._mean(centred) ** 2
        with np.errstate(divide="ignore", invalid="ignore"):
            found = 1 - self._mean((whole - gated) ** 2) / variance
        return np.where(variance > 0, found, np.nan)


def _ends(draws: NDArray[np.float64]) -> tuple[float, float]:
    """The 95 % interval of draws whose first is the value itself."""
    known = draws[1:][~np.isnan(draws[1:])]
    if not len(known):
        return np.nan, np.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)


class _Case:
    """The tests of one task's sub-architecture.

    Args:
        runner: The network.
        arch: As given.
        tried: As compared: its channels, then random ones.
        closing: What kept channels are closed at.
        tasks: Of all gates.
        source: Held-out images.
        n_images: Of them, at most.
        seed: Of all draws.
    """

    def __init__(
        self,
        runner: Runner,
        arch: SubArchitecture,
        tried: list[SubArchitecture],
        closing: dict[str, Tensor] | None,
        tasks: Sequence[Task],
        source: Source,
        n_images: int,
        seed: int,
    ) -> None:
        assert arch.task is not None
        self.runner, self.arch, self.tried, self.closing = runner, arch, tried, closing
        self.task, self.seed = arch.task, seed_of(seed, "verdict images", arch.task)
        self.rows, self.own = _balanced(source.labels, self.task, n_images, self.seed)
        self.source = ChosenSource(source, self.rows)
        self.others = _others(self.task, tasks, source.labels, self.seed)
        n_own, n = int(self.own.sum()), len(self.own)
        self.lacks = ""
        if arch.size in (0, 1):
            self.lacks = f"it keeps {'no' if arch.n_kept == 0 else 'every'} channel"
        elif n_own < 2 or n - n_own < 2:
            self.lacks = (
                f"the held-out images hold {n_own} of the task and {n - n_own} others, and two of "
                "each are the least"
            )

    def measure(self, *, one_by_one: bool) -> None:
        """Run everything that the tests look at; channels one by one for minimality alone."""
        n_tried = len(self.tried)
        closed = [(~arch).with_means(self.closing) for arch in self.tried]
        names = [
            (site, gate)
            for site in self.arch.sites
            for gate in open_gates(site, self.arch[site.name]).nonzero().flatten().tolist()
        ]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(names), generator=generator, device="cpu")[
            : N_CLOSED * one_by_one
        ]
        one_less = [_without(self.arch, names[i], self.closing) for i in order.tolist()]
        found = self._run([self.arch, *self.tried, *closed, *one_less], self.source)
        own, numbers = self.own.numpy(), found.whole.double().numpy()
        self.whole, self.others_whole = numbers[:, 0], found.whole.T[1:]
        gated = constant_up_to_rounding(found.gated.movedim(2, 1), found.whole.T[None])
        own_output = gated[:, 0].double().numpy()
        self.given = own_output[0]
        self.kept, self.without = own_output[1 : 1 + n_tried], own_output[1 + n_tried :][:n_tried]
        self.one_less = own_output[1 + 2 * n_tried :]
        self.others_without = gated[1 + n_tried : 1 + 2 * n_tried, 1:]
        self.resampled = _Resampled(own, self.seed % 2**32)
        self.whole_auc = self.resampled.auc(self.whole)
        self.given_auc = self.resampled.auc(self.given)
        self.given_fidelity = self.resampled.fidelity(self.whole, self.given)

    def _run(self, archs: list[SubArchitecture], source: Source) -> Responses:
        with self.runner.bar(len(source.labels), "running") as bar:
            bar.disable = True
            columns = (self.task, *self.others)
            return answers(self.runner, archs, source, ablation=None, bar=bar, columns=columns)

    def sufficient(self, level: float) -> _Claim:
        """Whether the task output stays."""
        fidelities = [self.resampled.fidelity(self.whole, one)[0] for one in self.kept]
        against_random = permutation_p(fidelities[0], fidelities[1:])
        own = self.own.numpy()
        tells = float(
            stats.mannwhitneyu(self.given[own], self.given[~own], alternative="greater").pvalue
        )
        low, high = _ends(self.given_fidelity)
        p = max(against_random, tells)
        holds = p <= level and low > 0
        value, base = float(self.given_fidelity[0]), float(np.nanmean(fidelities[1:]))
        return _Claim(_said(holds), value, low, high, base, p)

    def necessary(self, level: float) -> _Claim:
        """Whether closing all that it keeps breaks the task."""
        draws = [self.resampled.auc(one) for one in self.without]
        values = np.array([found[0] for found in draws])
        # At one half and below the task is broken: there, an output that says less is more so.
        left = np.where(values > 0.5, values - 0.5, BROKEN * (0.5 - values))
        p = permutation_p(left[0], left[1:], tail="lower")
        drop, _ = _ends(self.whole_auc - draws[0])
        base = float(np.mean(values[1:]))
        return _Claim(
            _said(p <= level and drop > 0), float(values[0]), *_ends(draws[0]), base, float(p)
        )

    def specific(self, level: float, said: list[str]) -> _Claim:
        """Whether closing it spares the other tasks."""
        if not self.others:
            said.append("Specificity is not asked: there is no other task to look at.")
            return _Claim()
        other = ~self.own
        kept = spearman(self.others_whole[:, other], self.others_without[:, :, other]).numpy()
        kept = np.where(np.isnan(kept), 0.0, kept)  # (tried, others); constant: no ranking left
        values = kept.mean(1)
        own = spearman(torch.from_numpy(self.whole), torch.from_numpy(self.without)).numpy()
        own = np.where(np.isnan(own), 0.0, own)
        # Below zero the task is broken as well: an output that says less is more so.
        more = values - np.where(own > 0, own, -BROKEN * own)
        p = permutation_p(more[0], more[1:])
        low, high = bootstrap_interval(kept[0], seed=self.seed % 2**32)
        base = float(values[1:].mean())
        holds = p <= level and values[0] > base
        return _Claim(_said(holds), float(values[0]), low, high, base, float(p))

    def minimal(self, level: float) -> _Claim:
        """Whether each channel has an effect, tested on a sample of them."""
        error = (self.given - self.whole) ** 2
        least = NO_EFFECT * float(self.whole.var())
        each = level / 5
        n = len(self.one_less)
        seen = 0
        for output in self.one_less:
            more = (output - self.whole) ** 2 - error - least
            if more.std() <= 1e-12 * max(abs(float(more.mean())), least):
                seen += int(more.mean() > 0)
            else:
                seen += int(stats.ttest_1samp(more, 0.0, alternative="greater").pvalue <= each)
        p = _minimality_p(n - seen, n, self.arch.n_kept, each)
        interval = stats.binomtest(seen, n).proportion_ci(method="exact")
        low, high = float(interval.low), float(interval.high)
        return _Claim(_said(p <= level), seen / n, low, high, EFFECTIVE, p)

    def beside(self) -> dict[str, float]:
        """Further numbers."""
        low, high = _ends(self.given_auc)
        return {
            "own_auc": float(self.given_auc[0]),
            "own_auc_low": low,
            "own_auc_high": high,
            "random_own_auc": float(np.mean([self.resampled.auc(x)[0] for x in self.kept[1:]])),
            "whole_auc": float(self.whole_auc[0]),
        }

    def on_learned(self, learned: Source | None, n_images: int) -> dict[str, float]:
        """The measures on images learned from, and how far apart the two are."""
        if learned is None:
            return {}
        rows, own = _balanced(learned.labels, self.task, n_images, self.seed)
        n_own = int(own_images(learned.labels, [self.task])[0].sum())
        if int(own.sum()) < 2 or int((~own).sum()) < 2:
            return {}
        found = self._run([self.arch], ChosenSource(learned, rows))
        gated = constant_up_to_rounding(found.gated[:, :, 0], found.whole.T[:1])[0].double().numpy()
        whole = found.whole[:, 0].double().numpy()
        there = _Resampled(own.numpy(), (self.seed + 1) % 2**32)
        auc, kept = there.auc(gated), there.fidelity(whole, gated)
        result = {
            "learned_own_auc": float(auc[0]),
            "learned_fidelity": float(kept[0]),
            "learned_whole_auc": float(there.auc(whole)[0]),
            "learned_n_own": float(n_own),
        }
        for name, gap in (
            ("own_auc", auc - self.given_auc),
            ("fidelity", kept - self.given_fidelity),
        ):
            result[f"{name}_gap_low"], result[f"{name}_gap_high"] = _ends(gap)
        return result


def _said(holds: object) -> str:
    return "holds" if holds else "does not"


def _without(
    arch: SubArchitecture, which: tuple[GateSite, int], closing: dict[str, Tensor] | None
) -> SubArchitecture:
    """The sub-architecture with one channel, or one group of channels, less."""
    name, channels = which[0].name, channels_of(which[0], [which[1]])
    masks = {n: mask.clone() for n, mask in arch.masks.items()}
    masks[name][channels] = False
    less = arch._with_masks(masks, arch.task)
    if arch.means is None or closing is None:
        return less
    means = {n: value.clone() for n, value in arch.means.items()}
    means[name][channels] = closing[name][channels].to(means[name])
    return less.with_means(means, own_constants=arch.own_constants, fitted_on=arch.fitted_on)


def _balanced(labels: Tensor, task: Task, n_images: int, seed: int) -> tuple[Tensor, Tensor]:
    """Numbers of own images and of as many others, evenly over their labels, and which are own."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator, device="cpu")
    own = own_images(labels, [task])[0][order]
    other = other_images(labels, [task])[0][order]
    n_own = min(int(own.sum()), max(n_images // 2, n_images - int(other.sum())))
    n_other = min(int(other.sum()), n_images - n_own)
    chosen = torch.cat([order[own][:n_own], order[other][:n_other]]).sort().values
    return chosen, own_images(labels, [task])[0][chosen]


def _others(task: Task, tasks: Sequence[Task], labels: Tensor, seed: int) -> tuple[Task, ...]:
    """Other tasks: of the gates, or else the images' other classes."""
    mine = {task} if isinstance(task, int) else set(task)

    def apart(other: Task) -> bool:
        return mine.isdisjoint({other} if isinstance(other, int) else other)

    found: list[Task] = [other for other in tasks if apart(other)]
    if not found:
        found = [other for other in tasks_in(labels) if apart(other)]
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(found), generator=generator, device="cpu")[:MAX_OTHERS]
    return tuple(found[i] for i in chosen.sort().values.tolist())


def _minimality_p(n_unseen: int, n_tested: int, n_kept: int, each: float) -> float:
    """P(so few tested channels without a seen effect), if more than a tenth of all have none.

    A tested channel without an effect is given one with probability ``each``. Tests on the same
    images are dependent, so that of h such channels more than h - n_unseen are mistaken is bounded
    by Markov's inequality.
    """
    n_without = int((1 - EFFECTIVE) * n_kept + 1e-9) + 1
    h = np.arange(min(n_without, n_tested) + 1)
    shares = stats.hypergeom(n_kept, n_without, n_tested).pmf(h)
    wrong = np.where(h <= n_unseen, 1.0, h * each / np.maximum(h - n_unseen, 1))
    return float(min(1.0, (shares * np.minimum(wrong, 1.0)).sum()))


# -- From certainty and other runs -----------------------------------------------------------------


def _table_of(certainty: ChannelCertainty, arch: SubArchitecture) -> dict[str, NDArray[Any]]:
    """The columns of a task's table that are needed, of all channels."""
    table = certainty.table(arch.task, closed=True)
    try:
        found = {n: np.asarray(table[n]) for n in ("site", "channel", "kept", "selection", "label")}
    except (KeyError, ValueError, IndexError) as error:
        raise ValueError(
            f"certainty's table of task {arch.task} lacks a column: {error}."
        ) from None
    kept = {
        (str(site), int(channel))
        for site, channel, is_kept in zip(
            found["site"], found["channel"], found["kept"], strict=True
        )
        if is_kept
    }
    if kept != {(name, c) for name, index in arch.kept.items() for c in index.tolist()}:
        raise ValueError(
            f"certainty is of other channels of task {arch.task} than these gates keep; give the "
            "one that was made from these gates."
        )
    gate = gate_of_channel(arch.sites)
    if gate is None:
        return found
    first = np.unique(gate.numpy(), return_index=True)[1]  # one row for a group of channels
    return {name: column[first] for name, column in found.items()}


def _minimal(table: dict[str, NDArray[Any]], level: float) -> _Claim:
    """Minimality by the labels of all kept channels, of which a share ``level`` may be wrong."""
    labels = table["label"][table["kept"].astype(bool)]
    needed = int((labels == "needed").sum())
    share = needed / len(labels)
    interval = stats.binomtest(needed, len(labels)).proportion_ci(method="exact")
    return _Claim(
        _said(share * (1 - level) >= EFFECTIVE),
        share,
        float(interval.low),
        float(interval.high),
        EFFECTIVE,
    )


def _stable(
    arch: SubArchitecture,
    table: dict[str, NDArray[Any]] | None,
    replicas: list[SubArchitecture],
    stable: float,
    level: float,
    seed: int,
) -> _Claim:
    """Whether other runs chose the same channels: (observed - chance) / (1 - chance)."""
    if table is not None:
        # How often each channel was chosen; the same of random channels, as many at each site.
        chosen = {
            name: table["selection"][table["site"] == name].astype(np.float64) for name in arch
        }
        kept = {name: table["kept"][table["site"] == name].astype(bool) for name in arch}
        each = None
    elif replicas:
        stacked = [np.stack([one[name].numpy() for one in replicas]) for name in arch]
        each = dict(zip(arch, stacked, strict=True))
        chosen = {name: runs.mean(0) for name, runs in each.items()}
        kept = {name: arch[name].numpy() for name in arch}
    else:
        return _Claim()
    n_kept = sum(int(mask.sum()) for mask in kept.values())
    observed = sum(float(chosen[name][mask].sum()) for name, mask in kept.items()) / n_kept
    random = np.random.default_rng(seed_of(seed, "verdict stable", arch.task) % 2**32)
    dealt = np.zeros(N_DEALT)
    for name, mask in kept.items():
        n = int(mask.sum())
        if n:
            order = random.permuted(np.tile(chosen[name], (N_DEALT, 1)), axis=1)
            dealt += order[:, :n].sum(1) / n_kept
    p = permutation_p(observed, dealt)
    chance = sum(float(chosen[name].mean()) * int(mask.sum()) for name, mask in kept.items())
    chance /= n_kept
    value = 1.0 if chance >= 1 else (observed - chance) / (1 - chance)
    low = high = np.nan
    if each is not None and len(replicas) > 1:
        runs = np.array(
            [
                sum(int(runs[r][kept[n]].sum()) for n, runs in each.items())
                for r in range(len(replicas))
            ]
        )
        low, high = (
            float((end - chance) / (1 - chance))
            for end in (runs.min() / n_kept, runs.max() / n_kept)
        )
    return _Claim(_said(p <= level and value >= stable), float(value), low, high, 0.0, float(p))
