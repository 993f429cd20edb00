"""Is the same sub-architecture found again, with other seeds and other images?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr.data.labels import Task, patterns
from nad_attr.data.sources import Data, as_source
from nad_attr.evaluation.controls.randomisation import chosen
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray
from nad_attr.system.rng import permutation
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Learn", "Stability", "stability"]

#: Finds a network's sub-architectures: called with network, data and seed.
Learn: TypeAlias = "Callable[[nn.Module, Data, int], TaskGates | Sequence[SubArchitecture]]"


def _per_class(labels: Tensor, seed: int) -> list[Tensor]:
    """The numbers of each class's images in random order."""
    order = permutation(len(labels), "images per class", seed)
    known, place = patterns(labels)
    return [order[place[order] == k] for k in range(len(known))]


def architectures_of(found: TaskGates | Sequence[SubArchitecture]) -> list[SubArchitecture]:
    archs = found.sub_architectures() if isinstance(found, TaskGates) else found
    if not isinstance(archs, Sequence) or not all(isinstance(a, SubArchitecture) for a in archs):
        raise TypeError(
            "learn must return TaskGates or a sequence of SubArchitecture, got "
            f"{type(found).__name__}."
        )
    if not archs or any(arch.task is None for arch in archs):
        raise ValueError("learn must return at least one sub-architecture, each with its task.")
    return list(archs)


def tasks_named(archs: Sequence[SubArchitecture]) -> tuple[Task, ...]:
    return tuple(arch.task for arch in archs if arch.task is not None)


def _kappas(a: Sequence[SubArchitecture], b: Sequence[SubArchitecture]) -> list[float]:
    """For each task, the mean over sites of the overlap corrected for chance."""
    if tasks_named(a) != tasks_named(b):
        raise ValueError(
            f"learn returned the tasks {tasks_named(a)} once and {tasks_named(b)} another time; "
            "name the tasks in it."
        )
    overlaps = [x.overlaps(y, chance_corrected=True) for x, y in zip(a, b, strict=True)]
    return [sum(overlap.values()) / len(overlap) for overlap in overlaps]


@dataclass(frozen=True, eq=False)
class Stability(Result):
    """Overlaps of what was found again: mean over sites of kappa (:func:`nad_attr.kappa`).

    1 means the same channels, 0 what random channels of these sizes share. The table
    (:meth:`frame`) has one row per comparison and task.

    Attributes:
        tasks: T tasks.
        seeds: float64 (pairs of seeds, T), learned on the same images.
        halves: float64 (seeds, T), learned on disjoint halves of each class's images.
        images: ``{images per class: float64 (T,)}``, learned on so many, against all images.
    """

    tasks: tuple[Task, ...]
    seeds: FloatArray
    halves: FloatArray
    images: Mapping[int, FloatArray]

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"tasks": "T", "seeds": "pairs T", "halves": "seeds T", "images": "T"}
    }

    def _derived(self) -> dict[str, Any]:
        return {"means": {name: float(kappa.mean()) for name, kappa in self._rows()}}

    def plot(self, axes: Any = None) -> Figure:
        """Mean kappa of each comparison, with the range of the tasks' means.

        Args:
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_intervals

        tasks = {name: kappa.mean(0) for name, kappa in self._rows()}
        rows = {
            name: (float(k.mean()), float(k.min()), float(k.max())) for name, k in tasks.items()
        }
        return plot_intervals(rows, "kappa: mean over tasks, and their range", at=0.0, axes=axes)

    def _rows(self) -> list[tuple[str, FloatArray]]:
        rows = [("seeds", self.seeds), ("halves of the images", self.halves)]
        rows += [(f"{n} images per class", kappa[None]) for n, kappa in self.images.items()]
        return [(name, kappa) for name, kappa in rows if kappa.size]

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"comparison": name, "draw": i, "task": task, "kappa": kappa[i, t]}
            for name, kappa in self._rows()
            for i in range(len(kappa))
            for t, task in enumerate(self.tasks)
        ]

    def summary(self) -> str:
        """Mean kappa of each comparison, as plain text."""
        lines = [f"  {name:<24} {kappa.mean():6.3f}" for name, kappa in self._rows()]
        return "\n".join(["kappa between sub-architectures of the same task", *map(shown, lines)])


def stability(
    model: nn.Module,
    learn: Learn,
    data: Data,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    halves: bool = True,
    images_per_class: Sequence[int] = (),
) -> Stability:
    """How much of a sub-architecture is found again with other seeds, and other or fewer images.

    Args:
        model: The network, in eval mode; unchanged by anything but ``learn``.
        learn: Called as ``learn(model, data, seed)``; returns task gates or sub-architectures,
            of the same tasks each time.
        data: Images to learn on.
        seeds: Seeds to learn with; each pair is compared.
        halves: Learn also on disjoint halves of each class's images, cut anew for each seed.
        images_per_class: Learn also on so many images of each class, with the first seed.

    Returns:
        The overlaps.

    Raises:
        TypeError: If ``learn`` returns something else.
        ValueError: If there is no seed, one is there twice, a class has not enough images, or
            ``learn`` returns other tasks another time.

    Example:
        >>> from nad_attr import Recipe, learn_gates
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> x = torch.linspace(-1, 1, 80).view(20, 4)
        >>> def learn(model, data, seed):
        ...     return learn_gates(model, data, recipe=Recipe(size=0.5, steps=10), seed=seed)
        >>> result = stability(net, learn, (x, (x[:, 0] > 0).long()), seeds=(0, 1))
        >>> result.seeds.shape, result.halves.shape
        ((1, 2), (2, 2))
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds must be different whole numbers, at least one, got {seeds}.")
    source = as_source(data, any_labels=True)
    least = min(map(len, _per_class(source.labels, 0)))
    several = source.labels.ndim == 2 and source.labels.shape[1] > 1
    if several and images_per_class:
        raise ValueError(
            "images_per_class is for images of one class each; these have several labels. Leave it "
            "out, and compare halves and seeds."
        )
    for n in images_per_class:
        if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= least:
            raise ValueError(
                f"images_per_class: {n!r} is not among 1 to {least}, the images of the smallest "
                "class."
            )
    if halves and least < 2 and not several:
        raise ValueError("a class with one image has no halves; give halves=False.")

    def some(rows: Tensor) -> Data:
        return chosen(data, source, rows, source.labels[rows])

    found = [architectures_of(learn(model, data, seed)) for seed in seeds]
    tasks = tasks_named(found[0])
    between = [_kappas(a, b) for i, a in enumerate(found) for b in found[:i]]
    split = []
    for seed in seeds if halves else []:
        classes = _per_class(source.labels, seed)
        if several:  # every second image in the order of their labels: much the same in both
            every = torch.cat(classes)
            first, second = every[::2], every[1::2]
        else:
            first = torch.cat([numbers[: len(numbers) // 2] for numbers in classes])
            second = torch.cat([numbers[len(numbers) // 2 :] for numbers in classes])
        parts = [architectures_of(learn(model, some(part), seed)) for part in (first, second)]
        split.append(_kappas(*parts))
    fewer = {}
    for n in images_per_class:
        few = torch.cat([numbers[:n] for numbers in _per_class(source.labels, seeds[0])])
        fewer[n] = np.array(_kappas(architectures_of(learn(model, some(few), seeds[0])), found[0]))
    return Stability(
        tasks,
        np.array(between).reshape(-1, len(tasks)),
        np.array(split).reshape(-1, len(tasks)),
        fewer,
    )
