"""Without effect p-values are uniform, with a planted one they are small: for each test."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

from nad_attr import GateSite, SubArchitecture, TaskGates
from nad_attr.concepts import (
    Concept,
    UnitConcepts,
    association,
    benjamini_hochberg,
    compare,
    kendall,
    mann_whitney,
    mantel,
    overlap_above_chance,
    rank_agreement,
    rank_correlation,
    semantics_along_depth,
)

#: Simulated experiments, and permutations in each: p-values are on a grid of 1 / 200.
N, PERMUTATIONS = 200, 199
SIZES = (30, 50, 20)
STRATA = np.repeat(["a", "b", "c"], SIZES)
#: Strata differ in everything: a test that forgot them would see an effect where there is none.
SHIFT = np.repeat([0.0, 1.5, 3.0], SIZES)
KEPT = np.repeat([0.2, 0.5, 0.8], SIZES)


def _mann_whitney(generator, effect):
    kept = generator.random(len(SHIFT)) < KEPT
    values = SHIFT + generator.normal(size=len(SHIFT)) + effect * kept
    return mann_whitney(kept, values, STRATA, n_permutations=PERMUTATIONS, seed=_seed(generator)).p


def _mann_whitney_normal(generator, effect):
    kept = generator.random(len(SHIFT)) < KEPT
    values = np.round(SHIFT + generator.normal(size=len(SHIFT)) + effect * kept)  # with ties
    return mann_whitney(kept, values, STRATA, n_permutations=0).p


def _seed(generator):
    return int(generator.integers(2**31))


def _rank_correlation(generator, effect):
    gates = SHIFT + generator.normal(size=len(SHIFT))
    values = SHIFT + generator.normal(size=len(SHIFT)) + effect * (gates - SHIFT)
    seed = _seed(generator)
    return rank_correlation(gates, values, STRATA, n_permutations=PERMUTATIONS, seed=seed).p


def _rank_correlation_normal(generator, effect):
    gates = SHIFT + generator.normal(size=len(SHIFT))
    values = SHIFT + generator.normal(size=len(SHIFT)) + effect * (gates - SHIFT)
    return rank_correlation(gates, values, STRATA, n_permutations=0).p


def _association(generator, effect):
    strata = np.repeat([0, 1, 2], 2000)
    kept = generator.random(6000) < 0.2 + 0.25 * strata
    flagged = generator.random(6000) < 0.1 + 0.2 * strata + 0.1 * effect * kept
    return association(kept, flagged, strata).p


def _kendall(generator, effect):
    a = SHIFT + generator.normal(size=len(SHIFT))
    return kendall(a, SHIFT + generator.normal(size=len(SHIFT)) + effect * (a - SHIFT), STRATA).p


def _rank_agreement(generator, effect):
    a = generator.normal(size=len(SHIFT))
    b = generator.normal(size=len(SHIFT)) + 4 * effect * a
    # The draws are those of the seed: the same for all simulations, as they are kept in memory.
    return rank_agreement(a, b, STRATA, p=0.9, n_random=1999, seed=0).p


def _overlap(generator, effect):
    strata = np.repeat([0, 1], 3000)
    a = generator.random(6000) < 0.2 + 0.3 * strata
    b = generator.random(6000) < 0.3 + 0.3 * strata + 0.1 * effect * a
    return overlap_above_chance(a, b, strata).p


def _mantel(generator, effect):
    a, b = generator.normal(size=(2, 12, 2))
    near_a = -np.linalg.norm(a[:, None] - a[None], axis=-1)
    b = b + 3 * effect * a
    near_b = -np.linalg.norm(b[:, None] - b[None], axis=-1)
    seed = _seed(generator)
    return mantel(near_a, near_b, n_permutations=PERMUTATIONS, n_bootstrap=0, seed=seed).p


TESTS: dict[str, tuple[Callable[[np.random.Generator, float], float], int]] = {
    "mann_whitney": (_mann_whitney, N),
    "mann_whitney, normal, ties": (_mann_whitney_normal, N),
    "rank_correlation": (_rank_correlation, N),
    "rank_correlation, normal": (_rank_correlation_normal, N),
    "association": (_association, 150),
    "kendall": (_kendall, 150),
    "rank_agreement": (_rank_agreement, 150),
    "overlap_above_chance": (_overlap, 120),
    "mantel": (_mantel, 150),
}


@pytest.mark.parametrize("name", TESTS)
def test_p_values_are_uniform_without_effect(name):
    test, n = TESTS[name]
    generator = np.random.default_rng(10)
    p = np.array([test(generator, 0.0) for _ in range(n)])
    assert stats.kstest(p, "uniform").pvalue > 0.01
    assert (p < 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / n)


@pytest.mark.parametrize("name", TESTS)
def test_planted_effects_are_found(name):
    test, _ = TESTS[name]
    generator = np.random.default_rng(11)
    p = np.array([test(generator, 1.3) for _ in range(20)])
    assert (p < 0.05).mean() > 0.9


# -- the tests of a whole comparison -----------------------------------------------------------

SITES = [GateSite("a", 24), GateSite("b", 40), GateSite("c", 32), GateSite("d", 20)]
CONCEPTS = [Concept("road", "object"), Concept("grey", "colour")]


def _units(generator, masks=None, effect=0.0):
    """Units whose IoUs rise with depth, and for kept channels by the effect."""
    iou = {}
    for depth, site in enumerate(SITES):
        table = generator.gamma(1.5, 0.012 + 0.008 * depth, (site.n_channels, 2))
        if masks is not None:
            table[:, 0] += effect * 0.1 * masks[site.name].mean(0)
        iou[site.name] = np.clip(table, 0, 1)
    return UnitConcepts(iou, CONCEPTS, source="simulated")


def _gates(generator, n_tasks=4):
    """Tasks that share channels, and keep more of deeper sites."""
    logits = {}
    for depth, site in enumerate(SITES):
        shared = generator.normal(size=(1, site.n_channels))
        own = generator.normal(size=(n_tasks, site.n_channels))
        logits[site.name] = torch.tensor(shared + own + 0.5 * (depth - 1.5)).float()
    gates = {name: value.sigmoid() for name, value in logits.items()}
    return TaskGates(gates, SITES, list(range(n_tasks)), logits=logits)


def _simulated(effect, n, n_random=99):
    """p-values of each kind of row: one row of a kind in each simulation, for they go together."""
    generator = np.random.default_rng(12)
    found: dict[tuple[str, str, str], list[float]] = {}
    for _ in range(n):
        gates = _gates(generator)
        masks = {name: (gates[name] > 0.5).double().numpy() for name in gates}
        units = _units(generator, masks, effect)
        result = compare(
            gates, units, n_random=n_random, seed=_seed(generator), per_site=False, min_units=3
        )
        for i in range(len(result)):
            row = result.row(i)
            if row["task"] in ("", "0", "all tasks"):
                kind = row["test"], row["task"], row["concept"] + row["other"]
                found.setdefault(kind, []).append(row["p"])
    return found


@pytest.fixture(scope="module")
def null_rows():
    return _simulated(0.0, 40)


def test_rows_of_a_comparison_are_uniform_without_effect(null_rows):
    checked = 0
    for kind, values in null_rows.items():
        p = np.array(values)
        p = p[~np.isnan(p)]
        # IoUs do rise with depth, among kept channels and among all.
        if len(p) < 30 or (kind[0] == "depth_trend" and "kept - all" not in kind[2]):
            continue
        # Of four sites there are 24 orders: a trend is coarse; exact p-values of counts are, too.
        coarse = kind[0] in ("depth_trend", "detectors", "enrichment")
        checked += 1
        # Never too many small p-values.
        for level in (0.05, 0.1, 0.2, 0.5):
            room = 3.3 * np.sqrt(level * (1 - level) / len(p))
            assert (p <= level + 0.01).mean() < level + 0.01 + room, (kind, level)
        if not coarse:
            assert stats.kstest(p, "uniform").pvalue > 0.001, kind
    assert checked >= 10


def test_rows_of_a_comparison_find_a_planted_effect():
    found = _simulated(1.0, 10)
    for kind in (
        ("mann_whitney", "all tasks", ""),
        ("mann_whitney", "0", ""),
        ("detectors", "all tasks", ""),
        ("rank_correlation", "0", "road"),
        ("enrichment", "0", "road"),
    ):
        p = np.array(found[kind])
        assert (p < 0.05).mean() > 0.8, kind


def test_sites_along_depth_are_uniform_without_effect():
    generator = np.random.default_rng(13)
    p: list[float] = []
    for _ in range(50):
        gates, units = _gates(generator), _units(generator)
        along = semantics_along_depth(gates, units, n_random=99, seed=_seed(generator))
        table = along.comparison(n_permutations=99)
        rows = table.where(test="depth", site="b", concept="mean best IoU")
        p += [table["p"][i] for i in rows]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_kept_channels_that_deepen_faster_than_the_network_are_found():
    generator = np.random.default_rng(14)
    sites = [GateSite(f"s{i}", 60) for i in range(8)]
    found = {}
    for planted in (False, True):
        p = []
        for _ in range(12):
            kept, iou = {}, {}
            for depth, site in enumerate(sites):
                high = generator.random(60) < 0.4
                iou[site.name] = np.where(high[:, None], [0.1, 0.0], [0.0, 0.1])
                weight = 1 + 8 * planted * high * (depth - 2) / 7
                chance = np.clip(weight, 0.1, None)
                kept[site.name] = generator.choice(60, 20, False, chance / chance.sum()).tolist()
            arch = SubArchitecture.from_kept(kept, sites, task=0)
            units = UnitConcepts(iou, CONCEPTS, source="simulated")
            along = semantics_along_depth(arch, units, n_random=199, seed=_seed(generator))
            table = along.comparison(n_permutations=199)
            (row,) = table.where(
                test="depth_trend", other="kept - all", concept="share of high-level detectors"
            )
            p.append(table["p"][row])
        found[planted] = np.array(p)
    assert (found[True] < 0.05).mean() > 0.8
    assert (found[False] < 0.05).mean() < 0.34


def test_false_discoveries_stay_as_rare_as_asked_for():
    generator = np.random.default_rng(15)
    shares = []
    for _ in range(300):
        z = generator.normal(size=100)
        z[:20] += 3.5
        found = benjamini_hochberg(2 * stats.norm.sf(np.abs(z))) < 0.1
        shares.append(found[20:].sum() / max(found.sum(), 1))
    assert np.mean(shares) < 0.1
    assert np.mean(shares) > 0.05  # 0.08: q-values are not too large


def test_p_values_below_the_draws_are_as_rare_as_they_say():
    """19 draws: below 1 / 20 the normal approximation is used."""
    generator = np.random.default_rng(16)
    strata = np.repeat([0, 1], 20)
    kept = np.tile([True, False], 20)
    p = []
    for i in range(800):
        values = generator.exponential(size=40) + 3 * strata
        p.append(mann_whitney(kept, values, strata, n_permutations=19, seed=i).p)
    for level in (0.002, 0.005, 0.01, 0.02, 0.05, 0.1):
        room = 3.3 * np.sqrt(level * (1 - level) / len(p))
        assert (np.array(p) <= level).mean() < level + room
    assert min(p) < 0.005
