"""Which concepts are the channels of a task about? Many tasks and concepts in one go."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nad_attr._checks import check_count
from nad_attr.concepts.comparing.aligned import Aligned, Gates, align
from nad_attr.concepts.comparing.result import Comparison, RowList
from nad_attr.concepts.unit_concepts import UnitConcepts
from nad_attr.stats.bootstrap import bootstrap_interval
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.ranks import standard_ranks
from nad_attr.stats.sentences import ALL_TASKS
from nad_attr.stats.strata import Tables, permutations, with_tail
from nad_attr.stats.tables import FloatArray
from nad_attr.stats.tests import count_test, fisher_interval, normal_interval, normal_p

__all__ = ["concept_enrichment"]


def tables_of(aligned: Aligned, flags: list[NDArray[np.bool_]]) -> Tables:
    """Kept or not against flagged or not, of all tasks at all sites."""
    pairs = list(zip(aligned.kept, flags, strict=True))
    both = np.stack([(kept[:, flag]).sum(1) for kept, flag in pairs], axis=1)
    n_kept = np.stack([kept.sum(1) for kept, _ in pairs], axis=1)
    flagged = np.array([flag.sum() for _, flag in pairs])
    total = np.array([len(flag) for _, flag in pairs])
    cells = (both, n_kept, flagged, total)
    return Tables(*(cell.astype(np.float64) for cell in cells))


def _one_site(tables: Tables, s: int) -> Tables:
    part = slice(s, s + 1)
    return Tables(tables.a[:, part], tables.kept[:, part], tables.flagged[part], tables.total[part])


def odds_columns(tables: Tables, level: float) -> dict[str, Any]:
    """Effect, interval, p and control of one table for each task."""
    effect = tables.odds_ratio
    p, (below, above) = count_test(tables, level)
    unknown = np.isnan(effect)
    return {
        "n": tables.total.sum(),
        "effect": effect,
        "ends": tables.interval(level),
        "p": np.where(unknown, np.nan, p),
        "null": 1.0,
        "controls": (np.where(unknown, np.nan, 1.0), below, above),
    }


def add_detectors(
    rows: RowList, aligned: Aligned, *, per_site: bool, n_random: int, seed: int, level: float
) -> None:
    """Kept AND detector: each task by itself, at each site, and all tasks together."""
    if aligned.detector is None:
        return
    tables = tables_of(aligned, aligned.detector)
    t = len(aligned.tasks)
    rows.add("detectors", t, task=aligned.names, **odds_columns(tables, level))
    if per_site:
        for s, site in enumerate(aligned.sites):
            columns = odds_columns(_one_site(tables, s), level)
            rows.add("detectors", t, task=aligned.names, site=site, **columns)
    if t < 2:
        return
    # All tasks: the mean log odds ratio (Peto's, which is finite where a side is empty). Tasks
    # share channels, so detectors are shuffled among the channels of a site under all of them.
    observed = _log_odds(tables.a.sum(1), tables)
    if np.isnan(observed).all():
        return
    draws = np.zeros((t, n_random))
    indicator = [flag.astype(np.float64) for flag in aligned.detector]
    for where, block in permutations(indicator, n_random, seed, "detectors"):
        for kept, shuffled in zip(aligned.kept, block, strict=True):
            draws[:, where] += kept.astype(np.float64) @ shuffled.T
    shuffled_means = np.nanmean(_log_odds(draws, tables), axis=0)
    mean = float(np.nanmean(observed))
    low, high = bootstrap_interval(observed, level=level, seed=seed)
    ends = np.quantile(shuffled_means, [(1 - level) / 2, (1 + level) / 2])
    centre = float(shuffled_means.mean())
    rows.add(
        "detectors",
        1,
        task=ALL_TASKS,
        n=t,
        effect=np.exp(mean),
        ends=np.exp([low, high]),
        p=with_tail(
            permutation_p(np.array([mean]), shuffled_means[None], tail="both", centre=centre),
            n_random,
            np.array([(mean - centre) / shuffled_means.std()]),
        ),
        null=1.0,
        controls=np.exp([centre, *ends]),
    )


def _log_odds(count: FloatArray, tables: Tables) -> FloatArray:
    """Peto's log odds ratio of counts (T,) or (T, P): (count - expected) / variance."""
    expected, variance = tables.expected, np.where(tables.variance > 0, tables.variance, np.nan)
    if count.ndim == 2:
        expected, variance = expected[:, None], variance[:, None]
    return np.asarray((count - expected) / variance)


def concepts_to_test(
    aligned: Aligned, wanted: Sequence[str] | None, min_units: int, labels: str
) -> tuple[list[int], int]:
    """Columns of the concepts with enough units, or of those named, and the number left out."""
    names = aligned.concept_names
    if wanted is not None:
        if isinstance(wanted, str):
            raise TypeError(f"concepts must be a list of names, got {wanted!r}.")
        plain = [concept.name for concept in aligned.concepts]
        chosen = [i for i in range(len(names)) if names[i] in wanted or plain[i] in wanted]
        lost = [name for name in wanted if name not in names and name not in plain]
        if lost:
            raise ValueError(f"no concept is called {lost[0]!r}; there are {names[:8]} ...")
        return chosen, 0
    counts = np.array(
        [sum(int(f.sum()) for f in aligned.flags(k, labels)) for k in range(len(names))]
    )
    return np.flatnonzero(counts >= min_units).tolist(), int((counts < min_units).sum())


def add_enrichment(
    rows: RowList, aligned: Aligned, concepts: Sequence[int], *, labels: str, level: float
) -> None:
    """The channels of each task against those labelled with each concept, over all sites."""
    names = aligned.concept_names
    for k in concepts:
        columns = odds_columns(tables_of(aligned, aligned.flags(k, labels)), level)
        rows.add("enrichment", len(aligned.tasks), task=aligned.names, concept=names[k], **columns)


def add_rank_correlations(
    rows: RowList, aligned: Aligned, concepts: Sequence[int], *, level: float
) -> int:
    """Gates against the IoU with each concept, within sites, with the exact variance.

    Returns the number of concepts that cannot be tested: some units have no IoU with them.
    """
    if aligned.ranks is None or not len(concepts):
        return 0
    t, columns = len(aligned.tasks), np.asarray(concepts)
    total, weights = np.zeros((t, len(columns))), np.zeros((t, len(columns)))
    room, n = np.zeros((t, len(columns))), np.zeros((t, len(columns)))
    for ranks, iou in zip(aligned.ranks, aligned.iou, strict=True):
        c = len(iou)
        if c < 2:
            continue
        values = iou[:, columns].T.astype(np.float64)
        known = np.asarray(~np.isnan(values).any(1))
        gates = standard_ranks(ranks)
        other = standard_ranks(np.where(known[:, None], values, 0.0))
        varies = np.outer(np.any(gates, axis=1), np.any(other, axis=1))
        total += (c - 1) * (gates @ other.T)
        weights += (c - 1) * varies
        room += max(c - 3, 0) * varies
        n += c * varies
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = np.where(weights > 0, total / weights, np.nan)
        deviation = np.where(weights > 0, 1 / np.sqrt(weights), np.nan)
    names = aligned.concept_names
    untested = 0
    for i, k in enumerate(concepts):
        if not (weights[:, i] > 0).any():
            untested += 1
            continue
        below, above = normal_interval(np.zeros(t), deviation[:, i], level)
        rows.add(
            "rank_correlation",
            t,
            task=aligned.names,
            concept=names[k],
            n=n[:, i],
            effect=rho[:, i],
            ends=fisher_interval(rho[:, i], room[:, i], 1.06, level),
            p=normal_p(rho[:, i] / deviation[:, i]),
            null=0.0,
            controls=(0.0, np.clip(below, -1, 1), np.clip(above, -1, 1)),
        )
    return untested


def check_labels(labels: str) -> None:
    """Refuse any value but ``"best"`` and ``"all"``."""
    if labels not in ("best", "all"):
        raise ValueError(f"labels must be 'best' or 'all', got {labels!r}.")


def concept_enrichment(
    gates: Gates,
    units: UnitConcepts,
    *,
    size: float | None = None,
    tasks: Sequence[object] | None = None,
    concepts: Sequence[str] | None = None,
    labels: str = "best",
    min_units: int = 5,
    site_map: Mapping[str, str] | None = None,
    level: float = 0.95,
) -> Comparison:
    """Which concepts are the sub-architecture of each task enriched in?

    For each task and concept the odds that a channel is kept, if it is a detector of the concept,
    against the odds of the other channels of the same site; see :func:`association`.

    Args:
        gates: Task gates, sub-architectures with a task each, a store, or its path.
        units: What units mean.
        size: Cut task gates at this share of the channels; None: as learned.
        tasks: Only these; None: all.
        concepts: Names of those to test; None: all that ``min_units`` units detect.
        labels: ``"best"``: a unit detects its best concept only, as in Network Dissection;
            ``"all"``: every concept with an IoU above the threshold.
        min_units: Detectors that a concept needs: with few, nothing could be found.
        site_map: ``{gate site: site of the units}`` where names differ.
        level: Coverage of the intervals.

    Returns:
        One row for each task and concept; q-values over all of them.

    Raises:
        ImportError: If SciPy is not installed.
        TypeError: If an argument is of another kind.
        ValueError: If gates and units do not fit together, or an argument makes no sense.

    Example:
        >>> from nad_attr import GateSite, SubArchitecture
        >>> from nad_attr.concepts import Concept
        >>> arch = SubArchitecture.from_kept({"a": range(8)}, [GateSite("a", 16)], task=0)
        >>> iou = [[0.2]] * 7 + [[0.0]] * 9
        >>> units = UnitConcepts({"a": iou}, [Concept("road")], source="example")
        >>> print(concept_enrichment(arch, units).sentences()[0])
        The sub-architecture of 0 is enriched in road: odds ratio infinite (95 % interval ...
    """
    check_labels(labels)
    check_count(min_units, "min_units")
    aligned = align(gates, units, size=size, tasks=tasks, site_map=site_map, methods=())
    chosen, rare = concepts_to_test(aligned, concepts, min_units, labels)
    rows = RowList()
    add_enrichment(rows, aligned, chosen, labels=labels, level=level)
    notes = list(aligned.notes) + rare_note(rare, min_units)
    return Comparison(rows.columns, notes=notes, info={"level": level, "labels": labels})


def rare_note(rare: int, min_units: int) -> list[str]:
    """A note that concepts were left out, if any were."""
    if not rare:
        return []
    return [f"{rare} concept(s) with fewer than {min_units} units were not tested."]
