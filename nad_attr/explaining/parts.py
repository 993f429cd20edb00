"""How much is explained: which tasks, which images to learn from, which to judge on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nad_attr.data.labels import Task, as_task, other_images, own_images, patterns, tasks_in
from nad_attr.gates.recipe import PaperRecipe, Recipe, most_replicas
from nad_attr.system.rng import permutation

__all__ = ["SIZES", "Parts", "Size", "chosen_tasks", "shortened", "split"]

#: Own images, and others, that each part needs, and so images that a class needs.
LEAST, FEWEST = 2, 4
#: Share of a class's images that are kept apart, at most.
SHARE_JUDGED = 0.3


@dataclass(frozen=True)
class Size:
    """How much is run.

    Attributes:
        n_tasks: Tasks, where none are named.
        steps: Steps of learning for each task, at most.
        n_judged: Own images that each task is judged on, at most.
        certain: Whether channels are learned again and closed one by one, for as many tasks as
            take no longer than all else.
    """

    n_tasks: int
    steps: int
    n_judged: int
    certain: bool = False


#: From the whole size to the smallest that is of use.
SIZES = {
    "full": Size(10, 10**9, 50, certain=True),
    "large": Size(6, 70, 40, certain=True),
    "quick": Size(4, 40, 24),
    "small": Size(2, 30, 12),
    "smallest": Size(1, 20, 8),
}


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The same recipe with at most so many steps, and the replicas that these have room for.

    Example:
        >>> shortened(Recipe(replicas=8), 40).replicas, shortened(Recipe(), 200).steps
        (4, 100)
    """
    if isinstance(recipe, PaperRecipe) or steps >= recipe.steps:
        return recipe
    return replace(recipe, steps=steps, replicas=min(recipe.replicas, most_replicas(steps)))


def chosen_tasks(
    labels: Tensor, wanted: Sequence[object] | None, most: int, names: Mapping[Any, str]
) -> tuple[list[Task], int]:
    """The tasks to explain, named or those with the most images, and how many more there are.

    Raises:
        ValueError: If a class has too few images to be explained, or there is no other class.

    Example:
        >>> chosen_tasks(torch.tensor([0] * 5 + [1] * 9 + [2] * 9), None, 1, {})
        ([1], 2)
    """
    there = tasks_in(labels)
    if not there:
        raise ValueError("no image has any of the labels: there is nothing to explain.")
    counts = dict(zip(there, own_images(labels, there).sum(1).tolist(), strict=True))
    if wanted is None:
        enough = [task for task in there if counts[task] >= FEWEST]
        if not enough:
            raise ValueError(
                f"no class has {FEWEST} images ({LEAST} to learn from, {LEAST} to judge on); the "
                f"most are {max(counts.values())}. Add images."
            )
        first = sorted(enough, key=lambda task: (-counts[task], task))[:most]
        tasks: list[Task] = sorted(first)
    else:
        tasks = [as_task(task) for task in wanted]
        twice = [task for i, task in enumerate(tasks) if task in tasks[:i]]
        if not tasks or twice:
            raise ValueError(f"task {twice[0]} is there twice." if twice else "tasks is empty.")
    own, other = own_images(labels, tasks).sum(1), other_images(labels, tasks).sum(1)
    for task, n_own, n_other in zip(tasks, own.tolist(), other.tolist(), strict=True):
        name = names.get(task, str(task))
        if n_own < FEWEST:
            raise ValueError(
                f"class {name!r} has {n_own} image{'s' * (n_own != 1)}, and {FEWEST} are the least "
                f"({LEAST} to learn from, {LEAST} to judge on): add some, or leave it out (tasks)."
            )
        if n_other < FEWEST:
            raise ValueError(
                f"there are {n_other} images of other classes than {name!r}, and {FEWEST} are the "
                "least: what a class needs shows beside others. Add a folder of another class."
            )
    return tasks, len(there) - len(set(there) & set(tasks))


@dataclass(frozen=True, eq=False)
class Parts:
    """Numbers of the images of each part: int64 tensors."""

    learned: Tensor
    judged: Tensor


def split(labels: Tensor, tasks: Sequence[Task], n_judged: int, seed: int) -> Parts:
    """Keep images apart to judge on: own ones of each task, and others, evenly over the classes.

    Args:
        labels: See :mod:`nad_attr.data.labels`.
        tasks: From :func:`chosen_tasks`.
        n_judged: Own images for each task, at most; of other classes together twice as many.
        seed: Of the choice.

    Raises:
        ValueError: If a part lacks own or other images of a task.

    Example:
        >>> parts = split(torch.arange(40) % 2, [0, 1], 5, seed=0)
        >>> len(parts.learned), len(parts.judged), set(parts.learned) & set(parts.judged)
        (30, 10, set())
    """
    known, places = patterns(labels)
    of_tasks = own_images(known, tasks).T.tolist()
    counts = places.bincount(minlength=len(known)).tolist()
    # Classes of few images that count for the same tasks are split together.
    pools: dict[object, list[int]] = {}
    for place, (row, n) in enumerate(zip(of_tasks, counts, strict=True)):
        pools.setdefault(place if n >= FEWEST else tuple(row), []).append(place)
    turns: list[tuple[int, int, int]] = []
    judged: list[int] = []
    for pool in pools.values():
        numbers = torch.isin(places, torch.tensor(pool, device="cpu")).nonzero().flatten()
        n, place = len(numbers), pool[0]
        order = numbers[permutation(n, seed, "explain", n, place)].tolist()
        apart = max(round(SHARE_JUDGED * n), min(LEAST, n // 2))
        if any(of_tasks[place]):
            judged += order[: min(apart, n_judged)]
        else:
            turns += [(turn, place, number) for turn, number in enumerate(order[:apart])]
    judged += [number for _, _, number in sorted(turns)[: 2 * n_judged]]
    is_judged = torch.zeros(len(labels), dtype=torch.bool, device="cpu")
    is_judged[judged] = True
    parts = Parts((~is_judged).nonzero().flatten(), is_judged.nonzero().flatten())
    for what, rows in (("learn from", parts.learned), ("judge on", parts.judged)):
        for kind, marks in (
            ("own", own_images(labels[rows], tasks)),
            ("other", other_images(labels[rows], tasks)),
        ):
            few = (marks.sum(1) < LEAST).nonzero().flatten().tolist()
            if few:
                raise ValueError(
                    f"task {tasks[few[0]]} has fewer than {LEAST} {kind} images to {what}: add "
                    f"{'images' if kind == 'own' else 'images of other classes'}."
                )
    return parts
