"""Planted circuits: networks whose class-specific channels are known, and a score for finding them.

Nobody knows the right sub-architecture of a trained network. These networks are built by hand, each
with a difficulty of its own; precision and recall are those of the planted channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.evaluation.controls.planted_networks import (
    PLANTED_KINDS,
    Kind,
    Plan,
    build_network,
    draw_images,
    layout_of,
    scale_logits,
    scattered,
)
from nad_attr.evaluation.rows import named_architectures
from nad_attr.gates.channels import n_gates
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result
from nad_attr.stats.tables import number, pandas, table
from nad_attr.system.rng import seed_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["PLANTED_KINDS", "PlantedCircuit", "PlantedScore", "planted"]


@dataclass(frozen=True, eq=False)
class PlantedScore(Result):
    """How many of the planted channels sub-architectures keep, and how many others.

    With several copies of a circuit, a sub-architecture is compared with the copy that it keeps
    most of; half of each copy is half of a circuit, not a whole one.

    Attributes:
        tasks: T tasks.
        precision: float64 (T,), share of the kept channels that are of the best copy; 0 where
            nothing is kept.
        recall: float64 (T,), share of the best copy that is kept.
        union_precision: float64 (T,), share of the kept channels that are of any copy.
        whole: bool (T,), whether every channel of a copy is kept.
        copy: int64 (T,), which copy it was compared with.
        size: float64 (T,), kept channels / all channels.

    Example:
        >>> circuit = planted("plain", n_classes=2, circuit_width=2, width=8, n_images=20)
        >>> circuit.score([circuit.circuit[1]]).mean("recall")
        1.0
    """

    tasks: tuple[Task, ...]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    union_precision: NDArray[np.float64]
    whole: NDArray[np.bool_]
    copy: NDArray[np.int64]
    size: NDArray[np.float64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """(T,), harmonic mean of precision and recall; 0 where both are."""
        total = self.precision + self.recall
        return np.asarray(2 * self.precision * self.recall / np.where(total > 0, total, 1.0))

    def mean(self, measure: str) -> float:
        """Mean over tasks of "precision", "recall", "union_precision", "f1", "whole" or "size".

        Raises:
            ValueError: If there is no such measure.
        """
        if measure not in _MEASURES:
            raise ValueError(f"no measure {measure!r}; there are {', '.join(_MEASURES)}.")
        return float(np.asarray(getattr(self, measure), dtype=np.float64).mean())

    def frame(self) -> pd.DataFrame:
        """One row per task, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("PlantedScore.frame()")
        index = pd.Index(list(self.tasks), name="task", tupleize_cols=False)
        columns = {name: getattr(self, name) for name in (*_MEASURES, "copy")}
        return pd.DataFrame(columns, index=index)

    _AXES: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tasks", "precision", "recall", "union_precision"), "T"),
        **dict.fromkeys(("whole", "copy", "size"), "T"),
    }

    def _derived(self) -> dict[str, Any]:
        return {"means": {name: self.mean(name) for name in _MEASURES}, "f1": self.f1}

    def summary(self) -> str:
        """A table as plain text: one line per task, and the means."""
        columns = [np.asarray(getattr(self, name), dtype=np.float64) for name in _MEASURES]
        rows = [["task", *_MEASURES]]
        for t, task in enumerate(self.tasks):
            rows.append([str(task), *(number(column[t]) for column in columns)])
        rows.append(["mean", *(number(self.mean(name)) for name in _MEASURES)])
        return "\n".join(table(rows))

    def plot(self, axes: Any = None) -> Figure:
        """The mean of each measure over tasks, with the range of the tasks.

        Args:
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_intervals

        values = {name: np.asarray(getattr(self, name), dtype=np.float64) for name in _MEASURES}
        rows = {n: (float(v.mean()), float(v.min()), float(v.max())) for n, v in values.items()}
        return plot_intervals(rows, "mean over tasks, and their range", axes=axes)

    def __repr__(self) -> str:
        return (
            f"PlantedScore({len(self.tasks)} tasks, precision {self.mean('precision'):.3f}, "
            f"recall {self.mean('recall'):.3f}, {int(self.whole.sum())} whole)"
        )


_MEASURES = ("precision", "recall", "union_precision", "f1", "whole", "size")


@dataclass(frozen=True, eq=False)
class PlantedCircuit:
    """A network, images, and the channels that each of its outputs depends on. See `planted`.

    Attributes:
        kind: Which difficulty.
        model: The network, float32, in eval mode, on the CPU.
        sites: Its gate sites, in forward order.
        data: Images (N, 3, 8, 8) and labels (N,) to find channels with.
        held_out: As many others.
        tasks: All classes.
        circuit: ``{task: the channels that the task output depends on}``; with copies, the first.
        alternatives: ``{task: each copy}``, the first one included: any of them suffices.
        decoys: ``{task: channels that look as if they mattered, and do not}``.
        ablations: With which of "mean" and "zero" closing all other channels changes nothing.
        seed: What it was drawn from.
    """

    kind: str
    model: nn.Sequential
    sites: tuple[GateSite, ...]
    data: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    tasks: tuple[int, ...]
    circuit: Mapping[int, SubArchitecture]
    alternatives: Mapping[int, tuple[SubArchitecture, ...]]
    decoys: Mapping[int, SubArchitecture]
    ablations: tuple[str, ...]
    seed: int

    @property
    def size(self) -> float:
        """Size of a circuit; the same for all tasks."""
        return self.circuit[self.tasks[0]].size

    def score(
        self,
        architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
        *,
        size: float | None = None,
    ) -> PlantedScore:
        """Precision and recall of the planted channels, over all gate sites together.

        Args:
            architectures: Task gates, or sub-architectures of this network's sites, each of
                another of its tasks; not all tasks need one.
            size: Binarise task gates at this share of the channels; None: as they were learned.

        Returns:
            The scores, in the order of the sub-architectures.

        Raises:
            TypeError: If they are something else.
            ValueError: If sites differ, a task is unknown, missing or there twice, or there is
                none.

        Example:
            >>> known = planted("plain", n_classes=2, circuit_width=2, width=8, n_images=20)
            >>> everything = SubArchitecture.full(known.sites).masks
            >>> score = known.score(SubArchitecture(everything, known.sites, task=0))
            >>> score.precision, score.recall
            (array([0.25]), array([1.]))
        """
        archs = self._checked(architectures, size)
        tasks = tuple(arch.task for arch in archs if arch.task is not None)
        columns = zip(*(self._against_best(arch) for arch in archs), strict=True)
        return PlantedScore(tasks, *map(np.array, columns))

    def _checked(
        self,
        architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
        size: float | None,
    ) -> tuple[SubArchitecture, ...]:
        archs = named_architectures(architectures, size).architectures
        for i, arch in enumerate(archs):
            if arch.task not in self.tasks:
                raise ValueError(
                    f"sub-architecture {i} has task {arch.task!r}; this network's tasks are "
                    f"{list(self.tasks)}."
                )
            if arch.sites != self.sites:
                raise ValueError(
                    f"sub-architecture {i} has gate sites {[s.name for s in arch.sites]}, the "
                    f"planted circuit {[s.name for s in self.sites]}."
                )
        return archs

    def _against_best(self, arch: SubArchitecture) -> tuple[float, float, float, bool, int, float]:
        assert isinstance(arch.task, int)
        copies = self.alternatives[arch.task]
        hits = [(arch & copy).n_kept for copy in copies]
        best = hits.index(max(hits))
        union = copies[0]
        for copy in copies[1:]:
            union = union | copy
        kept = max(arch.n_kept, 1)
        return (
            hits[best] / kept,
            hits[best] / copies[best].n_kept,
            (arch & union).n_kept / kept,
            hits[best] == copies[best].n_kept,
            best,
            arch.size,
        )

    def __repr__(self) -> str:
        what = f"{self.sites[0].n_channels} channels"
        if len({site.n_gates for site in self.sites}) > 1:
            what = f"{n_gates(self.sites)} gates in all"
        return (
            f"PlantedCircuit({self.kind!r}, {len(self.tasks)} classes, {len(self.sites)} sites of "
            f"{what}, circuits of {self.circuit[0].n_kept})"
        )


def planted(
    kind: Kind,
    *,
    n_classes: int = 4,
    depth: int = 3,
    circuit_width: int = 4,
    width: int = 48,
    seed: int = 0,
    n_images: int = 240,
    noise: float = 0.1,
    copies: int = 2,
) -> PlantedCircuit:
    """Build a network whose class-specific channels are known.

    Nothing is trained. Each class has ``circuit_width`` channels at every gate site: at the first
    site each detects a pattern of its own in the image, at the later ones they read each other, and
    the class's logit reads the last, unequally. No other channel reaches that logit, or its effects
    cancel; so its circuit is exactly what the logit depends on, for any image. Positions and
    activation sizes are drawn anew at every site. The other channels are background, which reads
    everything, and which only background reads.

    * "plain": convolutions and ReLUs, no more than that.
    * "residual": a stem and residual blocks; gate sites inside the blocks and after them.
    * "distractors": as many channels as the circuit has fire on images of the class alone, with
      larger activations, and reach no logit; and a third of each circuit (``circuit_width`` from
      3 on) fires on images of *another* class, and lowers this class's logit.
    * "cancelling": pairs of equal channels with opposite weights, three times as large as any in
      the circuit, lead to the class's logit at every site. The gradient of each is larger than the
      circuit's; together they do nothing.
    * "shared": a quarter of the channels (at least one) belong also to the next class, and a
      quarter to the one before.
    * "redundant": ``copies`` circuits compute the same for each class, and the logit is that of
      the highest. Any one suffices.
    * "constant": channels with the same value for every image lead to the logits with large
      weights. They say nothing about the image. Closed at their mean they change nothing, closed
      at zero all.

    Args:
        kind: One of ``PLANTED_KINDS``, as above.
        n_classes: Number of classes, at least 2.
        depth: Layers; a residual network has a stem and ``depth - 1`` blocks.
        circuit_width: Channels of a circuit at each gate site; "shared" needs 2.
        width: Channels at each gate site.
        seed: Another network and other images for each seed.
        n_images: Images in ``data``, and as many in ``held_out``; at least two per class.
        noise: Standard deviation of the images' noise; evidence is 0.6 to 1.6 in own images, and
            0.2 to 0.8 or none in others.
        copies: Copies of each circuit, for "redundant" alone.

    Returns:
        The network with images and its circuits.

    Raises:
        ValueError: If an argument has no sensible value, or ``width`` is too small for what is
            to be planted.

    Example:
        >>> known = planted("cancelling", n_classes=3, width=32, n_images=30)
        >>> known
        PlantedCircuit('cancelling', 3 classes, 3 sites of 32 channels, circuits of 12)
        >>> known.circuit[2]
        SubArchitecture(task 2: 12 of 96 channels (12.5 %) at 3 sites, closed channels zero)
    """
    _check(kind, n_classes, depth, circuit_width, width, n_images, noise, copies)
    n_copies = copies if kind == "redundant" else 1
    layout = layout_of(kind, n_classes, circuit_width, width, n_copies)
    plan = Plan(layout, seed)
    templates, shown = plan.templates()
    model, places = build_network(plan, depth, templates)
    data, held_out = (
        draw_images(
            templates,
            shown,
            n_images,
            noise,
            torch.Generator().manual_seed(seed_of("planted images", what, kind, seed)),
        )
        for what in ("data", "held out")
    )
    scale_logits(model, data[0])
    sites = tuple(GateSite(name, width, 1) for name in places)
    tasks = tuple(range(n_classes))

    def channels(slots: Sequence[int], k: int) -> SubArchitecture:
        return SubArchitecture.from_kept(scattered(places, slots), sites, task=k)

    alternatives = {
        k: tuple(channels(layout.circuit(k, copy), k) for copy in range(n_copies)) for k in tasks
    }
    return PlantedCircuit(
        kind,
        model,
        sites,
        data,
        held_out,
        tasks,
        circuit={k: alternatives[k][0] for k in tasks},
        alternatives=alternatives,
        decoys={k: channels(layout.decoys(k), k) for k in tasks},
        ablations=("mean",) if kind == "constant" else ("mean", "zero"),
        seed=seed,
    )


def _check(
    kind: str,
    n_classes: int,
    depth: int,
    circuit_width: int,
    width: int,
    n_images: int,
    noise: float,
    copies: int,
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(
            f"no planted network of kind {kind!r}; there are {', '.join(PLANTED_KINDS)}."
        )
    for name, value, least in (
        ("n_classes", n_classes, 2),
        ("depth", depth, 2 if kind == "residual" else 1),
        ("circuit_width", circuit_width, 2 if kind == "shared" else 1),
        ("width", width, 1),
        ("n_images", n_images, 2 * n_classes if isinstance(n_classes, int) else 1),
        ("copies", copies, 2 if kind == "redundant" else 1),
    ):
        check_count(value, name, least=least)
    if not isinstance(noise, (int, float)) or not 0 <= noise < math.inf:
        raise ValueError(f"noise must be a finite number from 0 on, got {noise!r}.")
