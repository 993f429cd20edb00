"""All statistics of gates and unit concepts, in one call."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from nad_attr._checks import check_count
from nad_attr.concepts.comparing.aligned import Aligned, Gates, align, describe
from nad_attr.concepts.comparing.depth import HIGH, along_depth_of
from nad_attr.concepts.comparing.enrichment import (
    add_detectors,
    add_enrichment,
    add_rank_correlations,
    check_labels,
    concepts_to_test,
    rare_note,
)
from nad_attr.concepts.comparing.result import Comparison, RowList
from nad_attr.concepts.comparing.semantics import mantel
from nad_attr.concepts.unit_concepts import UnitConcepts
from nad_attr.stats.agreement import (
    PERSISTENCE,
    kappas,
    kendall_parts,
    normal_control,
    places,
    pooled_tau,
    random_kappas,
    random_rbo,
    rbo_of_places,
)
from nad_attr.stats.bootstrap import bootstrap_interval, bootstrap_means, interval_of
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.pairs import overlap_matrix
from nad_attr.stats.ranks import midranks
from nad_attr.stats.sentences import ALL_TASKS
from nad_attr.stats.strata import Tables, permutations, with_tail
from nad_attr.stats.tables import FloatArray
from nad_attr.stats.tests import (
    MIN_PER_SIDE_FOR_NORMAL,
    count_test,
    fisher_interval,
    normal_interval,
    normal_p,
    pairs_of,
)
from nad_attr.store import GateStore
from nad_attr.system.rng import seed_of

__all__ = ["compare"]


#: Random sub-architectures of all tasks whose overlaps are compared with a similarity.
_RANDOM_OVERLAPS = 20


def compare(
    gates: Gates,
    units: UnitConcepts,
    *,
    size: float | None = None,
    tasks: Sequence[object] | None = None,
    concepts: Sequence[str] | None = None,
    labels: str = "best",
    min_units: int = 5,
    similarities: Mapping[str, ArrayLike] | None = None,
    methods: Sequence[str] | None = None,
    persistence: float = PERSISTENCE,
    high: Sequence[str] = HIGH,
    per_site: bool = True,
    site_map: Mapping[str, str] | None = None,
    n_random: int = 999,
    seed: int = 0,
    level: float = 0.95,
    save_as: str | None = None,
) -> Comparison:
    """All statistics of how gates relate to what units mean, in one table.

    - ``mann_whitney``: do kept channels have a higher best IoU than dropped ones? Per task and
      site, per task pooled over sites, and over all tasks.
    - ``detectors``: are kept channels detectors more often? The same three.
    - ``enrichment``: per task and concept, are its detectors among the kept channels?
    - ``rank_correlation``: per task and concept, do gates correlate with its IoU?
    - ``rbo``, ``kendall``, ``overlap``: per task and channel method with scores in the same store,
      do NAD and the method rank the same channels first, order them alike, and (at equal size at
      each site) keep the same ones?
    - ``mantel``: do tasks that are similar by each of ``similarities`` share channels?
    - ``depth``, ``depth_trend``: concepts along depth, see :func:`semantics_along_depth`.

    All tests compare channels of the same site and sum over sites, so that differences between
    layers play no part. Random choices of as many channels at each site are the control in every
    row, and give the p-values of pooled tests; q-values (Benjamini and Hochberg) are over all rows.

    Args:
        gates: Task gates, sub-architectures with a task each, a store, or its path.
        units: What units mean.
        size: Cut task gates at this share of the channels; None: as learned.
        tasks: Only these; None: all.
        concepts: Names of the concepts to test one by one; None: all that ``min_units`` units
            carry; an empty list: none.
        labels: ``"best"``: a unit has its best concept only; ``"all"``: every concept with an
            IoU above the threshold.
        min_units: Units that a concept needs to be tested.
        similarities: ``{name: (T, T)}`` of the tasks, see :func:`wordnet_similarity`,
            :func:`classifier_similarity`, :func:`confusion_similarity`.
        methods: Scores of the store to compare with; None: all that are there.
        persistence: Of rank-biased overlap, see :func:`rank_biased_overlap`.
        high: Categories of concepts that count as high-level.
        per_site: With rows for each site; without, the table is shorter and q-values smaller.
        site_map: ``{gate site: site of the units}`` where names differ.
        n_random: Random choices of channels, and permutations. If none is as extreme as the
            observed value, p is from the normal approximation; for ``mantel``, ``depth_trend``,
            ``rbo`` and where fewer than ten channels are kept or dropped, it is 1 / (n_random + 1).

        seed: Of everything random; the global random state is not used.
        level: Coverage of the intervals.
        save_as: Keep the result in the store as ``/comparison/<save_as>``.

    Returns:
        The table, with ``frame()``, ``summary()`` and ``save()``.

    Raises:
        ImportError: If SciPy is not installed.
        TypeError: If an argument is of another kind.
        ValueError: If gates and units do not fit together, or an argument makes no sense.

    Example:
        >>> from nad_attr import GateSite, SubArchitecture
        >>> from nad_attr.concepts import Concept
        >>> site = GateSite("layer1", 40)
        >>> arch = SubArchitecture.from_kept({"layer1": range(20)}, [site], task=7)
        >>> iou = [[0.2 if unit < 15 else 0.01] for unit in range(40)]
        >>> units = UnitConcepts({"layer1": iou}, [Concept("road", "object")], source="example")
        >>> result = compare(arch, units, per_site=False)
        >>> print(result.sentences(result.where(test="enrichment"))[0])
        The sub-architecture of 7 is enriched in road: odds ratio infinite (95 % interval ...
    """
    check_labels(labels)
    check_count(min_units, "min_units")
    check_count(n_random, "n_random")
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level!r}.")
    if not 0 < persistence < 1:
        raise ValueError(f"persistence must lie between 0 and 1, got {persistence!r}.")
    if save_as is not None and not isinstance(gates, (str, PathLike, GateStore)):
        raise ValueError("save_as= keeps the result in a store: give the store, or its path.")
    if isinstance(high, str):
        raise TypeError(f"high must be a list of categories, got {high!r}.")
    aligned = align(gates, units, size=size, tasks=tasks, site_map=site_map, methods=methods)
    matrices = _checked(similarities, len(aligned.tasks))
    chosen, rare = concepts_to_test(aligned, concepts, min_units, labels)

    notes = [*aligned.notes, *rare_note(rare, min_units)]
    rows = RowList()
    _add_pairs(rows, aligned, per_site=per_site, n_random=n_random, seed=seed, level=level)
    add_detectors(rows, aligned, per_site=per_site, n_random=n_random, seed=seed, level=level)
    add_enrichment(rows, aligned, chosen, labels=labels, level=level)
    untested = add_rank_correlations(rows, aligned, chosen, level=level)
    if untested:
        notes.append(
            f"gates were not correlated with the IoU of {untested} concept(s), which at no site is "
            "known of every unit."
        )
    for method, scores in aligned.scores.items():
        left_out = _add_agreement(
            rows, aligned, method, scores, persistence, n_random=n_random, seed=seed, level=level
        )
        if left_out:
            notes.append(f"{method} has no scores of {left_out} task(s).")
    for name, matrix in matrices.items():
        _add_mantel(rows, aligned, name, matrix, n_random=n_random, seed=seed, level=level)
    if aligned.detector is not None:
        along = along_depth_of(aligned, tuple(high), n_random, seed)
        depth = along.comparison(n_permutations=n_random, level=level)
        keep = [i for i in range(len(depth)) if per_site or depth["test"][i] == "depth_trend"]
        for i in keep:
            for name, column in depth.columns.items():
                rows.columns[name].append(column[i])
        notes += [note for note in depth.notes if note not in notes]
    info = {
        "gates": describe(gates),
        "units": units.source,
        "size": size,
        "labels": labels,
        "iou_threshold": units.iou_threshold,
        "persistence": persistence,
        "n_random": n_random,
        "seed": seed,
        "level": level,
    }
    result = Comparison(rows.columns, notes=notes, info=info)
    if save_as is not None:
        if isinstance(gates, GateStore) and gates.mode == "a":
            gates.write_result(f"comparison/{save_as}", *result.stored())
        else:
            path: Any = gates.path if isinstance(gates, GateStore) else gates
            result.save(path, save_as)
    return result


def _checked(similarities: Mapping[str, ArrayLike] | None, n: int) -> dict[str, FloatArray]:
    if similarities is None:
        return {}
    if not isinstance(similarities, Mapping):
        raise TypeError("similarities must be {name: (tasks, tasks)}.")
    result = {}
    for name, matrix in similarities.items():
        array = np.asarray(matrix, dtype=np.float64)
        if array.shape != (n, n):
            raise ValueError(
                f"similarity {name!r} has shape {array.shape}; {n} tasks need ({n}, {n})."
            )
        result[str(name)] = array
    return result


def _add_pairs(
    rows: RowList, aligned: Aligned, *, per_site: bool, n_random: int, seed: int, level: float
) -> None:
    """Best IoU of kept against dropped channels."""
    known = [~np.isnan(best) for best in aligned.best]
    masks = [mask[:, there] for mask, there in zip(aligned.kept, known, strict=True)]
    values = [best[there] for best, there in zip(aligned.best, known, strict=True)]
    used = [s for s, value in enumerate(values) if len(value)]
    if not used:
        return
    t, tails = len(aligned.tasks), [(1 - level) / 2, (1 + level) / 2]
    # The sentence says what was compared where it is not an IoU.
    other = "" if aligned.measure == "IoU" else f"best {aligned.measure}"
    found = pairs_of([masks[s] for s in used], [values[s] for s in used])
    pooled = np.zeros((t, n_random))
    later: list[dict[str, Any]] = []
    for column, s in enumerate(used):
        mask = masks[s].astype(np.float64)
        n1 = mask.sum(1)
        draws = np.empty((t, n_random))
        # The same shuffled values for all tasks: what tasks share, they share in each draw.
        for where, block in permutations([midranks(values[s])], n_random, seed, f"pairs/{s}"):
            draws[:, where] = mask @ block[0].T - (n1 * (n1 + 1) / 2)[:, None]
        pooled += draws
        if not per_site:
            continue
        single = pairs_of([masks[s]], [values[s]])
        auc = single.auc
        ends = normal_interval(auc, single.deviation, level)
        pairs = np.where(found.pairs[:, column] > 0, found.pairs[:, column], np.nan)
        random = draws / pairs[:, None]
        later.append(
            {
                "task": aligned.names,
                "site": aligned.sites[s],
                "other": other,
                "n": len(values[s]),
                "effect": auc,
                "ends": np.clip(ends, 0, 1),
                "p": with_tail(
                    permutation_p(auc, random, tail="both", centre=0.5),
                    n_random,
                    (auc - 0.5) / single.null_deviation,
                    (n1 >= MIN_PER_SIDE_FOR_NORMAL)
                    & (len(values[s]) - n1 >= MIN_PER_SIDE_FOR_NORMAL),
                ),
                "null": 0.5,
                "controls": (random.mean(1), *np.quantile(random, tails, axis=1)),
            }
        )
    auc = found.auc
    pairs = found.pairs.sum(1)
    n_kept = np.sum([mask.sum(1) for mask in masks], axis=0)
    enough = (n_kept >= MIN_PER_SIDE_FOR_NORMAL) & (
        sum(len(value) for value in values) - n_kept >= MIN_PER_SIDE_FOR_NORMAL
    )
    pooled /= np.where(pairs > 0, pairs, np.nan)[:, None]
    ends = normal_interval(auc, found.deviation, level)
    rows.add(
        "mann_whitney",
        t,
        task=aligned.names,
        other=other,
        n=sum(len(value) for value in values),
        effect=auc,
        ends=np.clip(ends, 0, 1),
        p=with_tail(
            permutation_p(auc, pooled, tail="both", centre=0.5),
            n_random,
            (auc - 0.5) / found.null_deviation,
            enough,
        ),
        null=0.5,
        controls=(pooled.mean(1), *np.quantile(pooled, tails, axis=1)),
    )
    for columns in later:
        rows.add("mann_whitney", t, **columns)
    there = ~np.isnan(auc)
    if there.sum() > 1:
        means = pooled[there].mean(0)
        mean = np.array([auc[there].mean()])
        rows.add(
            "mann_whitney",
            1,
            task=ALL_TASKS,
            other=other,
            n=int(there.sum()),
            effect=mean,
            ends=bootstrap_interval(auc, level=level, seed=seed),
            # The deviation of the draws themselves: tasks share channels.
            p=with_tail(
                permutation_p(mean, means[None], tail="both", centre=0.5),
                n_random,
                (mean - 0.5) / means.std(),
                bool(enough.all()),
            ),
            null=0.5,
            controls=(means.mean(), *np.quantile(means, tails)),
        )


def _add_agreement(
    rows: RowList,
    aligned: Aligned,
    method: str,
    scores: list[NDArray[np.float32]],
    persistence: float,
    *,
    n_random: int,
    seed: int,
    level: float,
) -> int:
    """NAD against a channel method; returns how many tasks the method does not know."""
    known = np.flatnonzero(~np.any([np.isnan(score).any(1) for score in scores], axis=0))
    left_out = len(aligned.tasks) - len(known)
    if not len(known) or aligned.ranks is None:
        return left_out
    names = [aligned.names[i] for i in known]
    tasks = [aligned.tasks[i] for i in known]
    n_sites, t = len(scores), len(known)
    rbo, tau, spread = (np.full((t, n_sites), np.nan) for _ in range(3))
    counts = np.zeros((4, t, n_sites))
    for s, (ranks, score, kept) in enumerate(zip(aligned.ranks, scores, aligned.kept, strict=True)):
        ours, theirs = (x[known].astype(np.float64) for x in (ranks, score))
        # Their seeds are not the same: ties of the two are broken apart.
        place = places(theirs, seed, f"{method}/{s}", tasks)
        rbo[:, s] = rbo_of_places(places(ours, seed, f"NAD/{s}", tasks), place, persistence)
        for row in range(t):
            tau[row, s], spread[row, s] = kendall_parts(ours[row], theirs[row])
        n_kept = kept[known].sum(1)
        chosen = place < n_kept[:, None]
        both = (chosen & kept[known]).sum(1)
        counts[:, :, s] = [both, n_kept, chosen.sum(1), np.full(t, kept.shape[1])]
    common: dict[str, Any] = {"task": names, "other": method}
    n = int(counts[3, 0].sum())

    p_of_rbo = float(persistence)
    widths = [score.shape[1] for score in scores]
    draws = [random_rbo(width, p_of_rbo, n_random, seed, s) for s, width in enumerate(widths)]
    random, tails = np.mean(draws, axis=0), [(1 - level) / 2, (1 + level) / 2]
    control, ends = float(random.mean()), np.quantile(random, tails)
    effect, over_sites = rbo.mean(1), _over_sites(rbo, seed, level)
    p = permutation_p(effect, np.broadcast_to(random, (t, n_random)), tail="both", centre=control)
    common["n"] = n
    chance = (control, *ends)
    rows.add("rbo", t, **common, effect=effect, ends=over_sites, p=p, null=control, controls=chance)
    _add_mean(rows, "rbo", method, effect, control, ends, seed, level)

    effect, deviation = pooled_tau(tau, spread)
    room = sum(max(score.shape[1] - 4, 0) for score in scores)
    width = normal_control(deviation, level)
    rows.add(
        "kendall",
        t,
        **common,
        effect=effect,
        ends=fisher_interval(effect, room, 0.437, level),
        p=normal_p(effect / deviation),
        null=0.0,
        controls=(0.0, -width, width),
    )
    middle = float(np.nanmean(width)) if not np.isnan(width).all() else math.nan
    _add_mean(rows, "kendall", method, effect, 0.0, (-middle, middle), seed, level)

    each = kappas(*counts)
    effect, over_sites = each.mean(1), _over_sites(each, seed, level)
    tables = [Tables(a[None], b[None], c, d) for a, b, c, d in zip(*counts, strict=True)]
    p = np.array([count_test(table, level)[0][0] for table in tables])
    drawn = random_kappas(counts, n_random, seed, method, tasks)
    ends = np.quantile(drawn, tails, axis=1)
    chance = (drawn.mean(1), *ends)
    rows.add("overlap", t, **common, effect=effect, ends=over_sites, p=p, null=0.0, controls=chance)
    _add_mean(rows, "overlap", method, effect, float(drawn.mean()), ends.mean(1), seed, level)
    return left_out


def _over_sites(values: FloatArray, seed: int, level: float) -> tuple[FloatArray, FloatArray]:
    """Bootstrap interval over sites of each task's mean; values (T, S)."""
    if values.shape[1] < 2:
        nothing = np.full(len(values), np.nan)
        return nothing, nothing.copy()
    return interval_of(bootstrap_means(values.T, seed=seed), level)


def _add_mean(
    rows: RowList,
    test: str,
    method: str,
    effect: FloatArray,
    control: float,
    ends: Sequence[float] | FloatArray,
    seed: int,
    level: float,
) -> None:
    """The row about all tasks: mean and bootstrap interval over tasks; the interval judges.

    Tasks share channels, so their p-values do not add up to one of all tasks.
    """
    there = ~np.isnan(effect)
    if there.sum() < 2:
        return
    rows.add(
        test,
        1,
        task=ALL_TASKS,
        other=method,
        n=int(there.sum()),
        effect=effect[there].mean(),
        ends=bootstrap_interval(effect, level=level, seed=seed),
        null=control,
        controls=(control, *ends),
    )


def _add_mantel(
    rows: RowList,
    aligned: Aligned,
    name: str,
    similarity: FloatArray,
    *,
    n_random: int,
    seed: int,
    level: float,
) -> None:
    """Overlap of sub-architectures against a similarity of tasks."""
    overlap = _overlap(aligned.kept)
    found = mantel(overlap, similarity, n_permutations=n_random, seed=seed, level=level, other=name)
    row = {k: v for k, v in found.row().items() if k not in ("test", "measure", "q")}
    if not math.isnan(found.effect):
        draws = []
        # Many tasks: fewer draws are enough, and take long.
        for draw in range(_RANDOM_OVERLAPS if len(aligned.tasks) <= 200 else 5):
            # As many channels of each task, drawn at random for each task.
            random = [
                np.random.default_rng(seed_of("random overlap", seed, draw, s)).permuted(
                    kept, axis=1
                )
                for s, kept in enumerate(aligned.kept)
            ]
            chance = mantel(_overlap(random), similarity, n_permutations=1, n_bootstrap=0)
            draws.append(chance.effect)
        row["control"] = float(np.nanmean(draws)) if not np.isnan(draws).all() else math.nan
    rows.add("mantel", 1, **row)


def _overlap(kept: list[NDArray[np.bool_]]) -> FloatArray:
    masks = {str(s): torch.from_numpy(mask) for s, mask in enumerate(kept)}
    return np.asarray(overlap_matrix(masks, chance_corrected=True).numpy(), dtype=np.float64)
