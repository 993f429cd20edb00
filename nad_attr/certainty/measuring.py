"""Measure how sure each channel is, and whether it is needed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nad_attr._checks import check_count
from nad_attr.certainty.closing import State, TaskTrial
from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.testing import NEEDED, Found, compare, examined
from nad_attr.data.labels import Task, other_images, own_images, tasks_in
from nad_attr.data.sources import Data, Source, as_source
from nad_attr.gates.channels import gate_of_channel, n_gates, to_gates
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import frozen
from nad_attr.learning.engine import Replica
from nad_attr.learning.network_checks import Checks
from nad_attr.learning.session import Session
from nad_attr.running.options import RunFields, RunOptions, as_options
from nad_attr.running.workers import Workers, in_order
from nad_attr.system.rng import seed_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["certainty", "joined"]

#: A random price of this share of the task output's variance decides between equal channels.
TIE = 1e-6
#: What an alternative pays for each channel that seems needed, in units of the task output's
#: variance: the first as much as the whole output is worth, the second what closing the channel
#: costs, each further one by this factor less.
PRICE, CHEAPER = 1.0, 0.3


def certainty(
    model: nn.Module,
    gates: TaskGates,
    data: Data,
    held_out: Data,
    *,
    recipe: Recipe | None = None,
    pairs: int = 3,
    images: int = 64,
    alternatives: int = 1,
    alpha: float = 0.05,
    tolerance: float = 0.02,
    seed: int = 0,
    run: RunOptions | None = None,
    augmented: bool | None = None,
    checks: Checks = "refuse",
    executor: Workers | None = None,
    **fields: Unpack[RunFields],
) -> ChannelCertainty:
    """How sure each kept channel of each task is, and whether the task needs it.

    Two numbers for each channel, which are different things. Its *selection probability* is how
    often the recipe chooses it again from halves of the images: ``pairs`` times each task's own and
    other images are cut into two halves, and the task is learned from both (complementary pairs),
    ties broken at random. Its *effect* is what closing it too costs on held-out images, at its best
    constant: the squared error of the task output is compared image by image, with a one-sided
    test, and Benjamini and Hochberg's false discovery rate over the task's kept channels. Then
    groups are closed, and other sub-architectures are tried: those of the halves, and some that
    are learned with a price on the channels kept. So each channel gets a label:

    * *needed*: closing it hurts, and every other sub-architecture tried that lacks it is worse.
    * *replaceable*: a sub-architecture that lacks it is as faithful, or it matters only once other
      channels are closed, for which it stands in.
    * *no effect seen*: it closes without harm, together with all others of this label; or its
      harm is undone if the channels that it cancels with are closed too.
    * *undecided*: the images do not say.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        gates: Task gates learned on it.
        data: The images that they were learned from; see :func:`nad_attr.learn_gates`.
        held_out: Images that they were not learned from.
        recipe: How to learn from halves; None: as the gates were learned. Where it asks for a
            fidelity, each task's halves keep the size that its gates have, after 100 steps.
        pairs: Complementary pairs of halves. Each costs two runs of the recipe per task.
        images: Own images, and other ones, to test on, at most.
        alternatives: Sub-architectures to learn for each task that avoid the channels that seem
            needed: the first as far as it can, the second as far as it costs less than closing
            them, each further one for less.
        alpha: Level of tests and false discovery rate.
        tolerance: Loss of fidelity that counts as none.
        seed: Draws halves and images, with the task; the same for whatever tasks are beside.
        run: How to run the network; see :class:`nad_attr.RunOptions`.
        augmented: See :func:`nad_attr.learn_gates`.
        checks: See there.
        executor: Measures a task with its replicas at a time elsewhere, such as on Ray's workers
            (:class:`nad_attr.distributed.RayExecutor`): the same for any number of workers.
        **fields: In place of those fields of ``run``.

    Returns:
        The certainty of each channel; its ``passes`` say what it cost.

    Raises:
        SiteError: If the network lacks a gate site.
        TypeError: If an argument is of another kind.
        ValueError: If gates do not say how they were learned and no recipe is given, a task has too
            few images for two halves or none held out, or an argument has no sensible value.

    Source:
        Shah and Samworth, "Variable selection with error control: another look at stability
        selection", 2013; Benjamini and Hochberg 1995.

    Example:
        >>> from nad_attr import Recipe, learn_gates
        >>> from nad_attr.evaluation import planted
        >>> known = planted("plain", n_classes=2, circuit_width=2, width=8, n_images=40)
        >>> recipe = Recipe(size=known.size, steps=10)
        >>> gates = learn_gates(known.model, known.data, [0], recipe, known.sites)
        >>> found = certainty(known.model, gates, known.data, known.held_out, pairs=2)
        >>> found.counts(0)["needed"], known.circuit[0].n_kept
        (6, 6)
    """
    if not isinstance(gates, TaskGates):
        raise TypeError(f"gates must be TaskGates, got {type(gates).__name__}.")
    asked, (recipe, sizes) = recipe, _recipe(gates, recipe)
    check_count(pairs, "pairs")
    check_count(images, "images", least=2)
    check_count(alternatives, "alternatives", least=0)
    for name, value in (("alpha", alpha), ("tolerance", tolerance)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"{name} must be a number in (0, 1), got {value!r}.")
    options = as_options(run, **fields)
    tasks = gates.tasks
    if executor is not None:
        given: dict[str, Any] = {
            "recipe": asked, "pairs": pairs, "images": images, "alternatives": alternatives,
            "alpha": alpha, "tolerance": tolerance, "seed": seed, "augmented": augmented,
            "checks": checks,
        }  # fmt: skip
        return _by_workers(executor, model, gates, data, held_out, options, given)
    session = Session(
        model,
        data,
        tasks,
        recipe,
        gates.sites,
        seed=seed,
        run=options,
        augmented=augmented,
        checks=checks,
    )
    network = session.network
    with torch.inference_mode(False):
        judged = as_source(held_out, augmented=augmented, any_labels=True)
        network.fit(judged)
    for task in tasks:
        if not bool(own_images(judged.labels, [task]).any()):
            raise ValueError(
                f"held_out has no image of task {task}; it has some of "
                f"{tasks_in(judged.labels)[:20]}."
            )

    @contextmanager
    def closing(desc: str) -> Iterator[Callable[[int], object]]:
        with (
            torch.inference_mode(False),
            frozen(network.model),
            network.bar(len(tasks), desc, "task") as bar,
        ):
            yield bar.update

    own = torch.cat([gates[s.name] for s in session.sites], dim=1).double()
    masks = (own > 0.5).double()
    base, spread = _base(gates, session)
    states = [State(*pair) for pair in zip(masks, base, strict=True)]
    groups = gate_of_channel(session.sites)
    levels = {"alpha": alpha, "tolerance": tolerance}
    found, testing = [], 0

    def trial(task: Task, of: Source, what: str) -> TaskTrial:
        return TaskTrial(network, of, task, images, (seed, what))

    with closing("closing channels") as advance:
        for t, task in enumerate(tasks):
            learn, test = trial(task, session.source, "learning"), trial(task, judged, "held out")
            found.append(examined(learn, test, states[t], spread[t], groups, **levels))
            testing += learn.passes + test.passes
            advance(1)

    replicas = [
        replica
        for task, one in zip(tasks, found, strict=True)
        for replica in _replicas(session, task, one, pairs, alternatives)
    ]
    per_task = 2 * pairs + alternatives
    learned, constants = _learned(session, replicas, [s for s in sizes for _ in range(per_task)])
    others = (learned > 0.5).double().view(len(tasks), per_task, -1)
    instead = base[:, None].expand(-1, per_task, -1)
    if constants is not None:
        instead = constants.double().view(len(tasks), per_task, -1)

    with closing("trying others") as advance:
        for t, task in enumerate(tasks):
            test = trial(task, judged, "held out")
            pairs_of = zip(others[t], instead[t], strict=True)
            compare(found[t], test, states[t], [State(*pair) for pair in pairs_of], **levels)
            testing += test.passes
            advance(1)
    halves = others[:, : 2 * pairs]
    of_task = gates._means_of(list(range(len(tasks))))
    return ChannelCertainty(
        tasks=tasks,
        task_names=gates.task_names or tuple(map(str, tasks)),
        sites=session.sites,
        gate=own.numpy(),
        chosen=halves.sum(1).long().numpy(),
        n_pairs=pairs,
        n_chosen=to_gates(halves, session.sites, mean=True).sum(2).mean(1).numpy(),
        effect=np.stack([one.effect for one in found]),
        p=np.stack([one.p for one in found]),
        q=np.stack([one.q for one in found]),
        label=np.stack([one.label for one in found]),
        skipped=np.array([one.skipped for one in found], dtype=np.int64),
        groups=tuple(tuple(one.groups) for one in found),
        fidelity=np.array([one.fidelity for one in found]),
        other_gates=others.numpy() > 0.5,
        other_lost=np.stack([one.lost for one in found]),
        as_faithful=np.stack([one.as_faithful for one in found]),
        means=base[0].numpy() if gates.constants is None and of_task is not None else None,
        constants=base.numpy() if gates.constants is not None else None,
        alpha=float(alpha),
        tolerance=float(tolerance),
        passes={"learning": _images(session, replicas), "testing": testing},
        seed=seed,
    )


_Shared: TypeAlias = "tuple[nn.Module, TaskGates, Data, Data, RunOptions, dict[str, Any]]"


def _by_workers(
    executor: Workers,
    model: nn.Module,
    gates: TaskGates,
    data: Data,
    held_out: Data,
    options: RunOptions,
    given: dict[str, Any],
) -> ChannelCertainty:
    """The certainty of each task, measured elsewhere, as one."""
    shared = (model, gates, data, held_out, options, given)
    with tqdm(total=len(gates), desc="certainty", disable=not options.show_progress) as bar:
        how: dict[str, Any] = {"begin": _on_worker, "device": options.device, "what": "tasks"}
        found = in_order(
            executor.map(_one_task, shared, [[task] for task in gates.tasks], **how),
            lambda number: bar.update(),
        )
    return joined(found)


def joined(found: Sequence[ChannelCertainty]) -> ChannelCertainty:
    """The certainty of several tasks, measured one by one, as one."""
    fields = {f.name: [getattr(one, f.name) for one in found] for f in dataclasses.fields(found[0])}
    whole: dict[str, Any] = {name: values[0] for name, values in fields.items()}
    for name, axes in ChannelCertainty._AXES.items():
        values = fields[name]
        if axes.startswith("T") and values[0] is not None:
            arrays = isinstance(values[0], np.ndarray)
            whole[name] = np.concatenate(values) if arrays else sum(values, ())
    whole["passes"] = {kind: sum(p[kind] for p in fields["passes"]) for kind in whole["passes"]}
    return ChannelCertainty(**whole)


def _on_worker(shared: _Shared, device: torch.device) -> _Shared:
    *rest, options, given = shared
    options = dataclasses.replace(options, device=device, show_progress=False)
    return (*rest, options, given)  # type: ignore[return-value]


def _one_task(shared: _Shared, tasks: list[Task]) -> ChannelCertainty:
    model, gates, data, held_out, options, given = shared
    return certainty(model, gates.select(tasks), data, held_out, run=options, **given)


def _learned(
    session: Session, replicas: Sequence[Replica], sizes: Sequence[float | None]
) -> tuple[Tensor, Tensor | None]:
    """Gates of all replicas, and constants if the recipe has them: those of a size together."""
    rows = [[i for i, own in enumerate(sizes) if own == size] for size in dict.fromkeys(sizes)]
    steps = sum(session.n_steps(replica.task) for replica in replicas)
    with session.network.bar(steps, "learning from halves", "step") as bar:
        found = [
            session.learn_replicas([replicas[i] for i in part], bar.update, sizes[part[0]])
            for part in rows
        ]
    back = torch.tensor([i for part in rows for i in part], device="cpu").argsort()
    constants = [one for _, one in found if one is not None]
    gates = torch.cat([one for one, _ in found])
    return gates[back], torch.cat(constants)[back] if constants else None


def _recipe(gates: TaskGates, recipe: Recipe | None) -> tuple[Recipe, list[float | None]]:
    """How to learn from halves: as the gates were learned, and the size that each task has."""
    found = gates.recipe if recipe is None else recipe
    if found is None:
        raise ValueError(
            "gates do not say how they were learned, so they cannot be learned again from halves "
            "of the images; give recipe=."
        )
    if not isinstance(found, Recipe):
        raise TypeError(f"recipe must be a Recipe, got {type(found).__name__}.")
    if isinstance(found, PaperRecipe):
        return found, [None] * len(gates)
    kept = [arch.n_kept for arch in gates.sub_architectures()]
    if not any(kept):
        raise ValueError("gates keep no channel: there is nothing to be certain of.")
    if found.fidelity is not None:
        steps = min(found.steps, Recipe().steps)
        found = dataclasses.replace(found, fidelity=None, size=0.5, steps=steps)
    elif recipe is not None:
        return found, [None] * len(gates)
    return found, [max(n, 1) / n_gates(gates.sites) for n in kept]


def _replicas(
    session: Session, task: Task, found: Found, pairs: int, alternatives: int
) -> list[Replica]:
    """A task once for each half of its images, and with prices on the channels that seem needed."""
    seems = torch.from_numpy((found.label == NEEDED).astype(np.float64))
    costs = seems * torch.from_numpy(np.nan_to_num(found.effect))
    result = []
    labels, seed = session.source.labels, session.seed

    def ties(key: int) -> Tensor:
        generator = torch.Generator().manual_seed(key)
        return TIE * torch.rand(len(seems), generator=generator, dtype=torch.float64, device="cpu")

    for pair in range(pairs):
        for half, among in enumerate(halved(labels, task, seed_of(seed, task, "halves", pair))):
            key = seed_of(seed, task, "half", pair, half)
            result.append(Replica(task, key, among, ties(key)))
    for i in range(alternatives):
        key = seed_of(seed, task, "alternative", i)
        price = CHEAPER ** (i - 1) * costs if i else PRICE * seems
        result.append(Replica(task, key, None, ties(key) + price))
    return result


def halved(labels: Tensor, task: Task, seed: int) -> tuple[Tensor, Tensor]:
    """A task's own and other images cut into two halves each, at random.

    Args:
        labels: See :func:`nad_attr.data.labels.own_images`.
        task: The task.
        seed: Of this cut.

    Returns:
        Numbers of the images, twice int64.

    Raises:
        ValueError: If there are fewer than two images of a kind.

    Example:
        >>> halves = halved(torch.tensor([0, 0, 1, 1, 1]), 0, seed=3)
        >>> sorted(torch.cat(halves).tolist()), [int((half < 2).sum()) for half in halves]
        ([0, 1, 2, 3, 4], [1, 1])
    """
    generator = torch.Generator().manual_seed(seed)
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for kind, find in (("own", own_images), ("other", other_images)):
        pool = find(labels, [task])[0].nonzero().flatten()
        if len(pool) < 2 and (kind == "own" or len(pool)):
            raise ValueError(
                f"task {task} has {len(pool)} {kind} image{'s' * (len(pool) != 1)} to learn from: "
                "two halves need at least two."
            )
        order = pool[torch.randperm(len(pool), generator=generator, device="cpu")]
        parts[0].append(order[: len(pool) // 2])
        parts[1].append(order[len(pool) // 2 :])
    return torch.cat(parts[0]).sort().values, torch.cat(parts[1]).sort().values


def _base(gates: TaskGates, session: Session) -> tuple[Tensor, Tensor]:
    """What closed channels are for each task, and how far a best constant may be: (T, n) twice."""
    rows = list(range(len(gates)))
    of_task = gates._means_of(rows)
    means, deviations = (
        torch.cat([values[s.name].double().cpu() for s in session.sites])
        for values in session._moments()
    )
    base = torch.zeros(len(rows), len(means), dtype=torch.float64, device="cpu")
    if of_task is not None:
        base = torch.cat([of_task[s.name].double() for s in session.sites], dim=-1)
        base = base.expand(len(rows), -1).clone()
    return base, (deviations.square() + (means - base).square()).sqrt()


def _images(session: Session, replicas: Sequence[Replica]) -> int:
    """Images that learning passed through the gated network, forward and backward."""
    return sum(session.n_steps(r.task) * session.recipe.images_per_step for r in replicas)
