"""Gates and unit concepts brought onto the same channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from nad_attr.concepts.unit_concepts import Concept, UnitConcepts
from nad_attr.data.labels import Task
from nad_attr.evaluation.rows import named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.scoring.rankings import ranks_of
from nad_attr.stats.tables import FloatArray
from nad_attr.store import GateStore

__all__ = ["Aligned", "Gates", "align"]

#: Sources of the channels that tasks keep.
Gates: TypeAlias = (
    "TaskGates | SubArchitecture | Sequence[SubArchitecture] | GateStore | str | PathLike[str]"
)


@dataclass(frozen=True, eq=False)
class Aligned:
    """T tasks, S sites, K concepts.

    Attributes:
        depths: (S,), relative depth among all gate sites, 0 to 1.
        kept: For each site bool (T, C).
        ranks: For each site float32 (T, C), the ranks of channels; None: only masks are known.
        iou: For each site float32 (C, K).
        label: For each site int64 (C,), index of the best concept, -1: not known.
        best: For each site float64 (C,), the IoU with it, NaN: not known.
        detector: For each site bool (C,); None: values are no IoUs, so there is no threshold.
        threshold: A detector's IoU is above it.
        measure: The kind of values in ``iou``, "IoU" or another name.
        scores: ``{method: for each site (T, C)}``, NaN for tasks that it does not know.
        notes: What was left out.
    """

    tasks: tuple[Task, ...]
    names: tuple[str, ...]
    sites: tuple[str, ...]
    depths: FloatArray
    kept: list[NDArray[np.bool_]]
    ranks: list[NDArray[np.float32]] | None
    iou: list[NDArray[np.float32]]
    label: list[NDArray[np.int64]]
    best: list[FloatArray]
    detector: list[NDArray[np.bool_]] | None
    concepts: tuple[Concept, ...]
    threshold: float
    measure: str = "IoU"
    scores: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def concept_names(self) -> list[str]:
        """Different names for all concepts: with the category if a name occurs twice."""
        names = [concept.name for concept in self.concepts]
        return [
            f"{c.name} ({c.category})" if names.count(c.name) > 1 else c.name for c in self.concepts
        ]

    def flags(self, concept: int, labels: str) -> list[NDArray[np.bool_]]:
        """For each site, which channels carry a concept: bool (C,)."""
        if labels == "best" or self.detector is None:
            found = [label == concept for label in self.label]
            if self.detector is None:
                return found
            return [a & b for a, b in zip(found, self.detector, strict=True)]
        return [np.asarray(iou[:, concept] > self.threshold) for iou in self.iou]


def _gates_of(
    gates: Gates, size: float | None, tasks: Sequence[object] | None, methods: Sequence[str] | None
) -> tuple[Any, TaskGates | None, dict[str, dict[str, torch.Tensor]]]:
    if isinstance(gates, (str, PathLike)):
        with GateStore.open(gates) as store:
            return _gates_of(store, size, tasks, methods)
    scores: dict[str, dict[str, torch.Tensor]] = {}
    if isinstance(gates, GateStore):
        read = gates.read(tasks)
        known = gates.score_methods
        unknown = [name for name in methods or () if name not in known]
        if unknown:
            there = ", ".join(known) or "none"
            raise ValueError(f"{gates.path} has no scores of {unknown[0]!r}; there are {there}.")
        rows = [gates.tasks.index(task) for task in read.tasks]
        for name in known if methods is None else methods:
            scores[name] = {site: value[rows] for site, value in gates.scores(name).items()}
        return named_architectures(read, size), read, scores
    if methods:
        raise ValueError("methods= names scores of a store; give the store, or its path.")
    if isinstance(gates, TaskGates):
        chosen = gates if tasks is None else gates.select(tasks)
        return named_architectures(chosen, size), chosen, scores
    if tasks is not None:
        raise ValueError(
            "tasks= needs task gates or a store; give the sub-architectures that you want."
        )
    return named_architectures(gates, size), None, scores


def align(
    gates: Gates,
    units: UnitConcepts,
    *,
    size: float | None = None,
    tasks: Sequence[object] | None = None,
    site_map: Mapping[str, str] | None = None,
    methods: Sequence[str] | None = None,
) -> Aligned:
    """Bring gates and unit concepts onto the sites that both have; see :func:`compare`.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If no site is common to both, or one has another number of channels.

    Example:
        >>> from nad_attr import GateSite
        >>> site = GateSite("layer1", 2)
        >>> arch = SubArchitecture.from_kept({"layer1": [1]}, [site], task=7)
        >>> units = UnitConcepts({"layer1": [[0.1], [0.0]]}, [Concept("road")], source="example")
        >>> aligned = align(arch, units)
        >>> aligned.kept[0].tolist(), aligned.detector[0].tolist()
        ([[False, True]], [True, False])
    """
    if not isinstance(units, UnitConcepts):
        raise TypeError(f"units must be UnitConcepts, got {type(units).__name__}.")
    named, task_gates, scores = _gates_of(gates, size, tasks, methods)
    names = [site.name for site in named.sites]
    mapping = dict(site_map or {})
    for ours, theirs in mapping.items():
        if ours not in names:
            raise ValueError(f"site_map names {ours!r}; the gate sites are {names}.")
        if theirs not in units.sites:
            raise ValueError(f"site_map names {theirs!r}; the units' sites are {units.sites}.")
    pairs = [(name, mapping.get(name, name)) for name in names]
    common = [(ours, theirs) for ours, theirs in pairs if theirs in units.sites]
    if not common:
        raise ValueError(
            f"gates and units have no site in common: {names[:5]} and {list(units.sites[:5])}; "
            "say site_map={gate site: site of the units}."
        )
    for ours, theirs in common:
        n = named.sites[names.index(ours)].n_channels
        if units.n_units(theirs) != n:
            raise ValueError(
                f"site {ours!r} has {n} channels, the units of {theirs!r} are "
                f"{units.n_units(theirs)}."
            )
    notes = []
    lost = [name for name in names if name not in dict(common)]
    if lost:
        notes.append(f"nothing is known of units at {len(lost)} gate site(s): {_some(lost)}.")
    unused = [site for site in units.sites if site not in dict((b, a) for a, b in common)]
    if unused:
        notes.append(f"there are no gates at {len(unused)} site(s) of the units: {_some(unused)}.")
    measure = units.measure
    is_iou = measure == "IoU"
    if not is_iou:
        notes.append(
            f"units are labelled by {measure}, which is not an IoU: there is no threshold for "
            "detectors, every unit counts with its label."
        )
    masks = named.masks
    places = np.linspace(0, 1, len(names)) if len(names) > 1 else np.zeros(1)
    best = [units.best(theirs) for _, theirs in common]
    partial = any(np.isnan(units.iou[theirs]).any() for _, theirs in common)
    if partial:
        notes.append("of some units only the best concepts are known (NaN in the matrix).")
    ranks = None
    if task_gates is not None:
        found = ranks_of(task_gates)
        ranks = [found[ours].numpy() for ours, _ in common]
    return Aligned(
        tasks=named.tasks,
        names=named.task_names,
        sites=tuple(ours for ours, _ in common),
        depths=np.array([places[names.index(ours)] for ours, _ in common]),
        kept=[masks[ours].numpy() for ours, _ in common],
        ranks=ranks,
        iou=[units.iou[theirs] for _, theirs in common],
        label=[index for index, _ in best],
        best=[value.astype(np.float64) for _, value in best],
        detector=[units.detectors(theirs) for _, theirs in common] if is_iou else None,
        concepts=units.concepts,
        threshold=units.iou_threshold,
        measure=measure,
        scores={
            method: [score[ours].float().numpy() for ours, _ in common]
            for method, score in scores.items()
        },
        notes=tuple(notes),
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (" ..." if len(names) > 5 else "")


def describe(gates: Gates) -> str:
    """Where gates come from, in a few words."""
    if isinstance(gates, GateStore):
        return gates.path.name
    return Path(gates).name if isinstance(gates, (str, PathLike)) else type(gates).__name__
