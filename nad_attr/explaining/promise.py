"""How long an explanation will take: images through the network, times measured seconds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import nn

from nad_attr.certainty.testing import TRIED
from nad_attr.certainty.verdict import FIT_STEPS, N_CLOSED
from nad_attr.data.labels import Task, other_images, own_images
from nad_attr.data.sources import ChosenSource, Source, TensorSource
from nad_attr.evaluation.responses import sweep
from nad_attr.gates.channels import budget, top_k_masks
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.learning.constants import KEPT_SHARE, MAX_KEPT, MIN_TO_KEEP, SHARES_TRIED
from nad_attr.learning.session import MEAN_IMAGES, Session
from nad_attr.report.measuring import FLOW_IMAGES, FLOW_RECEIVERS, FLOW_TASKS, evenly
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import seed_of

__all__ = ["STEPS", "Promise", "Rates", "measured_rates", "n_certain", "passes", "promised"]

#: The parts of the work, in this order.
STEPS = ("learning", "evaluation", "certainty", "verdict", "flow", "pictures", "page")
#: Random draws beside the evaluation and the verdict, and images of a task in the verdict.
N_RANDOM, N_VERDICT, VERDICT_IMAGES = 3, 19, 200
#: Pairs of halves that each task is learned from again, alternatives, and images of a kind to close
#: channels on. For each kept channel two constants on ``TRIED`` learning images, and this many
#: closings, alone and in groups, of held-out ones: fewer where most channels do nothing.
N_PAIRS, N_ALTERNATIVES, CLOSING_IMAGES = 2, 1, 32
_CLOSINGS = 1.9
#: The cost of passes in runs of the network; the plan does not depend on a clock.
_COSTS = {"run": 1, "learn": 3, "fit": 3, "back": 2, "read": 0}
#: Images of the timed passes, sub-architectures that they run through, and tasks that are learned.
_IMAGES, _ROWS, _TASKS = 16, 8, 3
#: How often these are run, at most, and seconds after which that is enough.
_TIMED, _WORTH = 5, 0.5
#: Images that timed learning draws from, and steps that are timed after those that close nothing.
_POOL, _STEPS = 64, 4
#: Seconds that each step takes with any network, and the page besides.
_BEGIN, _PAGE = 0.2, 0.1

Passes = dict[str, int]


@dataclass(frozen=True)
class Rates:
    """Measured seconds of one image.

    Attributes:
        run: Through the network.
        learn: Through the gated network and back, with the rest of a learning step.
        fit: The same when constants are fitted to given channels.
        read: Reading it.
        setup: Checks of network and images before learning, in all.
    """

    run: float
    learn: float
    fit: float
    read: float
    setup: float

    def seconds(self, passes: Passes) -> float:
        """For so many passes of each kind."""
        of = {"run": self.run, "learn": self.learn, "fit": self.fit, "read": self.read}
        of["back"] = max(self.learn - self.run, self.run)
        return sum(n * of[kind] for kind, n in passes.items())


@dataclass(frozen=True)
class Promise:
    """How long each step will take.

    Attributes:
        seconds: ``{step: seconds}``, of the steps that are still to do.
        passes: ``{step: {kind: images}}``: "run" through the network, "learn" and "fit" through
            the gated network and back, "back" back alone (for the flow, in pieces), "read".
    """

    seconds: Mapping[str, float]
    passes: Mapping[str, Passes]

    @property
    def total(self) -> float:
        """Seconds in all."""
        return sum(self.seconds.values())

    @property
    def n_passes(self) -> int:
        """Images that pass the network, forward, backward or both."""
        return sum(n for kinds in self.passes.values() for k, n in kinds.items() if k != "read")


def passes(
    learned: Source,
    judged: Source,
    tasks: Sequence[Task],
    recipe: Recipe,
    n_kept: int,
    missing: Sequence[Task],
    certain: Sequence[Task] = (),
) -> dict[str, Passes]:
    """Images that each step runs: see :class:`Promise`.

    Each of the tasks keeps ``n_kept`` channels; ``missing`` ones are still to learn, ``certain``
    ones are learned again, and their channels closed one by one.
    """
    n, n_learned, n_tasks = len(judged.labels), len(learned.labels), len(tasks)
    own, other = (
        dict(zip(tasks, marks(learned.labels, tasks).sum(1).tolist(), strict=True))
        for marks in (own_images, other_images)
    )
    paper, optimal = isinstance(recipe, PaperRecipe), recipe.ablation == "optimal"
    means = 0 if recipe.ablation == "zero" else min(MEAN_IMAGES, n_learned)

    def of_steps(
        steps: int, which: Sequence[Task], constants: bool, times: int = 1
    ) -> tuple[int, int]:
        """Images that pass through the gated network and back, and through the whole network.

        Whole outputs are computed once, however many ``times`` the same tasks are learned.
        """
        half = recipe.images_per_step // 2
        each = {t: min(own[t], recipe.images_per_step - half) + min(other[t], half) for t in which}
        gated = sum(steps * images for images in each.values())
        kept = 0
        for task in which if constants else ():
            fewer = min(own[task], other[task])
            share = round(KEPT_SHARE * fewer) if fewer >= MIN_TO_KEEP else own[task]
            kept += 2 * min(MAX_KEPT, share)
        most = times * steps * half
        first = sum(min(own[t], most) for t in which)
        first += min(n_learned - min(first, n_learned), most * len(which))
        return times * gated, min(first, n_learned) + times * kept * (1 + len(SHARES_TRIED))

    found: dict[str, Passes] = {}
    if paper:
        gated = sum(recipe.epochs * own[task] for task in missing)  # type: ignore[attr-defined]
        beside = gated
    else:
        gated, beside = of_steps(recipe.steps, missing, optimal)
    found["learning"] = {"learn": gated, "run": means + beside, "read": means + gated}
    found["evaluation"] = {"run": n * (1 + n_tasks * (1 + N_RANDOM)), "read": n}
    # Closed at zero, the gates as given and as compared are one network, which runs once; certainty
    # has closed the channels one by one.
    rows = 2 + 2 * (1 + N_VERDICT) - (recipe.ablation == "zero")
    single = min(N_CLOSED, n_kept)
    each_judged = [
        min(VERDICT_IMAGES, own_n + other_n)
        for own_n, other_n in zip(
            own_images(judged.labels, tasks).sum(1).tolist(),
            other_images(judged.labels, tasks).sum(1).tolist(),
            strict=True,
        )
    ]
    each_learned = [min(VERDICT_IMAGES, own[task] + other[task]) for task in tasks]
    again = 2 * N_PAIRS + N_ALTERNATIVES
    if paper:
        gated = beside = again * sum(recipe.epochs * own[task] for task in certain) // 2  # type: ignore[attr-defined]
    else:
        one_by_one = [of_steps(recipe.steps, [task], optimal, again) for task in certain]
        gated, beside = (sum(part) for part in zip((0, 0), *one_by_one, strict=True))
    most = CLOSING_IMAGES
    judged_own = own_images(judged.labels, tasks).sum(1).tolist()
    closings = 0
    for task, own_n in zip(tasks, judged_own, strict=True):
        if task in certain:
            n_judged = min(most, own_n) + min(most, n - own_n)
            seen = min(most, own[task]) + min(most, other[task])
            tried = 2 * min(TRIED, seen)
            closings += round(n_kept * (_CLOSINGS * n_judged + tried)) + 3 * seen
            closings += (again + 2) * n_judged
    again_means = means * len(certain)
    found["certainty"] = {
        "learn": gated,
        "run": again_means + beside + closings,
        "read": again_means + gated,
    }
    found["verdict"] = {
        "run": sum(
            (rows + single * (task not in certain)) * n_judged
            for task, n_judged in zip(tasks, each_judged, strict=True)
        )
        + 2 * sum(each_learned),
        "read": sum(each_judged) + sum(each_learned),
    }
    if optimal and not paper:
        gated, beside = of_steps(FIT_STEPS, tasks, True, 1 + N_VERDICT)
        found["verdict"]["fit"] = gated
        found["verdict"]["run"] += beside + means
        found["verdict"]["read"] += gated + means
    shown = own_images(judged.labels, list(tasks)[:FLOW_TASKS]).sum(1).clamp(max=FLOW_IMAGES)
    images = int(shown.sum())
    found["flow"] = {"run": 3 * images, "back": (FLOW_RECEIVERS + 3) * images, "read": n}
    found["pictures"] = {"run": n, "read": n}
    found["page"] = {}
    return found


def cost(*kinds: Passes) -> int:
    """What passes cost, in runs of the network: the same on every machine.

    Example:
        >>> cost({"learn": 100, "run": 5}, {"run": 2, "read": 50})
        307
    """
    return sum(_COSTS[kind] * n for passes in kinds for kind, n in passes.items())


def all_else(every: Mapping[str, Passes]) -> int:
    """The cost of all steps but certainty."""
    return cost(*(kinds for step, kinds in every.items() if step != "certainty"))


def n_certain(every: Mapping[str, Passes], n_tasks: int) -> int:
    """The number of tasks for which certainty costs no more than all other steps.

    Example:
        >>> n_certain({"learning": {"learn": 100}, "certainty": {"run": 500, "learn": 100}}, 8)
        3
    """
    return min(n_tasks, n_tasks * all_else(every) // max(1, cost(every["certainty"])))


def promised(todo: Mapping[str, Passes], rates: Rates, *, fits: bool, certain: int = 0) -> Promise:
    """The seconds of the steps that are to do; certainty of so many tasks is measured."""
    seconds = {step: _BEGIN + rates.seconds(kinds) for step, kinds in todo.items()}
    for step, times in (("learning", 1), ("certainty", certain), ("verdict", int(fits))):
        if step in seconds:
            seconds[step] += times * rates.setup
    if "page" in seconds:
        seconds["page"] += _PAGE
    return Promise(seconds, dict(todo))


class _EnoughError(Exception):
    """Ends what is timed."""


def measured_rates(
    model: nn.Module,
    learned: Source,
    tasks: Sequence[Task],
    recipe: Recipe,
    *,
    seed: int = 0,
    run: RunOptions | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[Rates, int]:
    """Time a few passes of each kind on the user's network and images.

    Learning really starts, on some of the images, and stops after a few steps. ``clock`` gives
    seconds.

    Returns:
        The rates, and how many channels a sub-architecture will keep.

    Raises:
        SiteError, TypeError, ValueError: If the network cannot be learned on, see
            :func:`nad_attr.learn_gates`.
    """
    some = list(tasks[:_TASKS])
    labels = learned.labels
    rows = [own.nonzero().flatten()[: _POOL // 4] for own in own_images(labels, some)]
    rows.append(torch.tensor(evenly(labels, _POOL, seed), dtype=torch.long, device="cpu"))
    pool = ChosenSource(learned, torch.cat(rows).unique())
    Session(model, pool, some, recipe, seed=seed, run=run)  # the first one loads libraries
    began = clock()
    session = Session(model, pool, some, recipe, seed=seed, run=run)
    setup = clock() - began
    n_kept = (
        sum(site.n_channels for site in session.sites) // 2
        if isinstance(recipe, PaperRecipe)
        else budget(recipe.size, session.sites)
    )
    some = some[: session.width]
    waiting = max(1, min(5, session.n_steps(some[0]) // 10))
    learn = _pace(lambda step: session.learn(some, advance=step), waiting, clock)
    fit = learn
    if recipe.ablation == "optimal":
        short = replace(recipe, steps=FIT_STEPS, replicas=1)
        fitting = Session(model, pool, some, short, session.sites, seed=seed, run=run)
        # The second passes' worth of them: what the whole network says of the images is known then,
        # as it is for nearly all of the verdict's many fits.
        some = [some[i % len(some)] for i in range(fitting.width)]
        masked = [_random(session.sites, n_kept, task, seed) for task in some]
        fit = _pace(
            lambda step: fitting.fit([*masked, *masked], advance=step), FIT_STEPS + 1, clock
        )
    each = recipe.images_per_step
    numbers = list(range(min(_IMAGES, len(pool.labels))))
    began = clock()
    inputs = next(iter(pool.batches([[(number, seed) for number in numbers]])))
    read = (clock() - began) / len(numbers)
    source = TensorSource(inputs, pool.labels[numbers])
    source.fields = pool.fields
    archs = [_random(session.sites, n_kept, some[0], draw) for draw in range(_ROWS)]
    sweep(model, archs[:1], source, run=run)  # to warm up
    times: list[float] = []
    while len(times) < _TIMED and sum(times) < _WORTH:  # short measurements are easily disturbed
        began = clock()
        sweep(model, archs, source, run=run)
        times.append(clock() - began)
    seconds = min(times) / (len(numbers) * (1 + _ROWS))
    return Rates(seconds, learn / each, fit / each, read, setup), n_kept


def _random(sites: Sequence[GateSite], n_kept: int, task: Task, seed: int) -> SubArchitecture:
    generator = torch.Generator().manual_seed(seed_of(seed, "timed"))
    scores = {
        site.name: torch.rand(site.n_channels, generator=generator, device="cpu") for site in sites
    }
    return SubArchitecture(top_k_masks(scores, sites, n_kept), sites, task=task)


def _pace(
    begin: Callable[[Callable[[int], None]], object], waiting: int, clock: Callable[[], float]
) -> float:
    """Seconds for a step of one task, after some passes; each does steps of several tasks.

    Example:
        >>> seconds = iter([1.0, 3.0, 5.0, 7.0]).__next__
        >>> _pace(lambda advance: [advance(8) for _ in range(4)], 1, seconds)
        0.25
    """
    times: list[float] = []
    done: list[int] = []

    def advance(n: int) -> None:
        times.append(clock())
        done.append(n)
        if len(times) > waiting + _STEPS:
            raise _EnoughError

    with suppress(_EnoughError):
        begin(advance)
    first = min(waiting, len(times) - 2)
    return (times[-1] - times[first]) / sum(done[first + 1 :])
