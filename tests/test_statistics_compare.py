"""Gates, unit concepts and channel methods compared in one call, and concepts along depth."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import nad_attr
from nad_attr import GateSite, SubArchitecture, TaskGates
from nad_attr.concepts import (
    Comparison,
    Concept,
    UnitConcepts,
    association,
    compare,
    concept_enrichment,
    import_clip_dissect,
    kendall,
    mann_whitney,
    overlap_above_chance,
    rank_agreement,
    rank_correlation,
    semantics_along_depth,
)
from nad_attr.evaluation import top_k
from nad_attr.store import GateStore, GateStoreError

SITES = [GateSite("a", 16), GateSite("b", 24), GateSite("c", 20)]
CONCEPTS = [Concept("road", "object"), Concept("grey", "colour"), Concept("road", "scene")]


def make_gates(n_tasks: int = 4, seed: int = 0) -> TaskGates:
    generator = torch.Generator().manual_seed(seed)
    logits = {s.name: torch.randn(n_tasks, s.n_channels, generator=generator) for s in SITES}
    gates = {name: value.sigmoid() for name, value in logits.items()}
    names = ["highway", "forest", "street", "coast"][:n_tasks]
    return TaskGates(gates, SITES, list(range(n_tasks)), logits=logits, task_names=names)


def make_units(seed: int = 0, **options: object) -> UnitConcepts:
    generator = np.random.default_rng(seed)
    iou = {s.name: generator.gamma(1.5, 0.02, (s.n_channels, 3)) for s in SITES}
    return UnitConcepts(iou, CONCEPTS, source="simulated", **options)


STRATA = np.repeat(["a", "b", "c"], [16, 24, 20])


def _flat(values) -> np.ndarray:
    return np.concatenate([np.asarray(values[site.name]) for site in SITES])


@pytest.fixture(scope="module")
def store_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("store") / "gates.h5"
    gates = make_gates()
    generator = torch.Generator().manual_seed(9)
    near = {
        name: value + 0.3 * torch.randn(value.shape, generator=generator)
        for name, value in gates.logits.items()
    }
    with GateStore.create(path, SITES) as store:
        store.append(gates)
        store.write_scores("taylor", near)
        far = {s.name: torch.rand(2, s.n_channels, generator=generator) for s in SITES}
        store.write_scores("energy", far, tasks=[0, 2])
    return path


@pytest.fixture(scope="module")
def result(store_path):
    generator = np.random.default_rng(3)
    similarity = generator.random((4, 4))
    return compare(
        store_path,
        make_units(),
        similarities={"WordNet": similarity + similarity.T},
        min_units=3,
        n_random=199,
    )


def _row(result, **wanted):
    (number,) = result.where(**{"site": "", "concept": "", "other": "", **wanted})
    return result.row(number)


# -- rows are those of the single tests --------------------------------------------------------


@pytest.mark.parametrize("task", [0, 1, 2, 3])
def test_rows_are_those_of_the_tests_on_arrays(result, task):
    gates, units = make_gates(), make_units()
    name = gates.task_names[task]
    kept = _flat(gates.sub_architecture(task).masks)
    best = _flat({site.name: units.best(site.name)[1] for site in SITES})
    detector = _flat({site.name: units.detectors(site.name) for site in SITES})

    row = _row(result, test="mann_whitney", task=name)
    single = mann_whitney(kept, best, STRATA, n_permutations=4999)
    assert row["effect"] == pytest.approx(single.effect)
    assert (row["low"], row["high"]) == pytest.approx(single.interval)
    assert row["p"] == pytest.approx(single.p, abs=0.12)
    assert row["control"] == pytest.approx(0.5, abs=0.02)
    at_b = STRATA == "b"
    row = _row(result, test="mann_whitney", task=name, site="b")
    assert row["effect"] == pytest.approx(mann_whitney(kept[at_b], best[at_b]).effect)

    row = _row(result, test="detectors", task=name)
    single = association(kept, detector, STRATA)
    assert row["effect"] == pytest.approx(single.effect)
    assert row["p"] == pytest.approx(single.p)
    assert (row["low"], row["high"]) == pytest.approx(single.interval)
    row = _row(result, test="detectors", task=name, site="c")
    at_c = STRATA == "c"
    assert row["p"] == pytest.approx(association(kept[at_c], detector[at_c]).p, nan_ok=True)

    # Two concepts are called road: they are told apart.
    for k, concept in enumerate(["road (object)", "grey", "road (scene)"]):
        label = _flat({s.name: (units.best(s.name)[0] == k) for s in SITES}) & detector
        row = _row(result, test="enrichment", task=name, concept=concept)
        single = association(kept, label, STRATA, name="enrichment", concept=concept)
        assert row["p"] == pytest.approx(single.p)
        assert row["effect"] == pytest.approx(single.effect)
        row = _row(result, test="rank_correlation", task=name, concept=concept)
        logits = _flat({s.name: gates.logits[s.name][task] for s in SITES})
        values = _flat({s.name: units.iou[s.name][:, k] for s in SITES})
        single = rank_correlation(logits, values, STRATA, n_permutations=0)
        assert row["effect"] == pytest.approx(single.effect)
        assert row["p"] == pytest.approx(single.p)
        assert (row["low"], row["high"]) == pytest.approx(single.interval)
        assert (row["control_low"], row["control_high"]) == pytest.approx(single.control_interval)


def test_agreement_rows_are_those_of_the_tests_on_arrays(result, store_path):
    gates = make_gates()
    with GateStore.open(store_path) as store:
        scores = {name: value.double() for name, value in store.scores("taylor").items()}
    for task, name in enumerate(gates.task_names):
        ours = _flat({s.name: gates.logits[s.name][task].double() for s in SITES})
        theirs = _flat({s.name: scores[s.name][task] for s in SITES})
        row = _row(result, test="rbo", task=name, other="taylor")
        single = rank_agreement(ours, theirs, STRATA, n_random=199)
        assert row["effect"] == pytest.approx(single.effect)
        assert row["control"] == pytest.approx(single.control)
        assert row["p"] == pytest.approx(single.p)
        row = _row(result, test="kendall", task=name, other="taylor")
        single = kendall(ours, theirs, STRATA)
        assert (row["effect"], row["p"]) == pytest.approx((single.effect, single.p))
        kept = gates.sub_architecture(task)
        parts = []
        for site in SITES:
            own = {site.name: scores[site.name][task : task + 1]}
            size = int(kept[site.name].sum()) / site.n_channels
            parts.append(top_k(own, [site], [task], size, per_site=True)[0][site.name].numpy())
        row = _row(result, test="overlap", task=name, other="taylor")
        single = overlap_above_chance(_flat(kept.masks), np.concatenate(parts), STRATA)
        assert (row["effect"], row["p"]) == pytest.approx((single.effect, single.p))
        assert row["q"] < 0.05


def test_tasks_that_a_method_does_not_know_are_left_out(result):
    tasks = {result["task"][i] for i in result.where(test="kendall", other="energy")}
    assert tasks == {"highway", "street", "all tasks"}
    assert "energy has no scores of 2 task(s)." in result.notes


def test_mantel_row(result):
    (number,) = result.where(test="mantel")
    row = result.row(number)
    overlap = nad_attr.evaluation.measures.overlap_matrix(
        {s.name: torch.stack([a[s.name] for a in make_gates().sub_architectures()]) for s in SITES},
        chance_corrected=True,
    ).numpy()
    generator = np.random.default_rng(3)
    similarity = generator.random((4, 4))
    similarity = similarity + similarity.T
    upper = np.triu_indices(4, 1)
    rho = stats.spearmanr(overlap[upper], similarity[upper]).statistic
    assert row["effect"] == pytest.approx(rho)
    assert (row["n"], row["other"]) == (6, "WordNet")
    assert abs(row["control"]) < 0.6


def test_all_tasks_row_is_their_mean(result):
    row = _row(result, test="mann_whitney", task="all tasks")
    names = make_gates().task_names
    effects = [_row(result, test="mann_whitney", task=name)["effect"] for name in names]
    assert row["effect"] == pytest.approx(np.mean(effects))
    assert row["n"] == 4
    assert row["low"] <= row["effect"] <= row["high"]


def test_q_values_are_over_all_rows(result):
    p = np.array(result["p"])
    known = ~np.isnan(p)
    np.testing.assert_allclose(
        np.array(result["q"])[known], stats.false_discovery_control(p[known])
    )
    assert known.sum() > 60


# -- a function of gates, units and seed -------------------------------------------------------


def test_a_task_has_the_same_numbers_in_any_company(store_path):
    units = make_units()
    options = {"n_random": 49, "min_units": 3}
    all_tasks = compare(store_path, units, **options)
    alone = compare(store_path, units, tasks=[2, 0], **options)
    for test in ("mann_whitney", "detectors", "enrichment", "kendall", "rbo", "overlap"):
        for name in ("street", "highway"):
            many, few = (
                [
                    {k: v for k, v in r.row(i).items() if k != "q"}
                    for i in r.where(test=test, task=name)
                ]
                for r in (all_tasks, alone)
            )
            assert len(many) == len(few) > 0
            for one, other in zip(many, few, strict=True):
                assert one == pytest.approx(other, nan_ok=True)


def test_same_seed_same_result(result, store_path):
    units = make_units()
    first = compare(store_path, units, n_random=19, seed=4)
    torch.manual_seed(5)
    np.random.seed(6)  # noqa: NPY002
    assert compare(store_path, units, n_random=19, seed=4) == first
    assert compare(store_path, units, n_random=19, seed=5) != first


def test_forms_of_gates(store_path):
    units, gates = make_units(), make_gates()
    options = {"n_random": 19, "min_units": 3, "methods": []}
    of_store = compare(store_path, units, **options)
    of_gates = compare(gates, units, n_random=19, min_units=3)
    for name in ("effect", "p", "q", "control"):
        np.testing.assert_array_equal(of_gates[name], of_store[name])
    archs = compare(gates.sub_architectures(), units, n_random=19, min_units=3)
    assert not archs.where(test="rank_correlation")  # masks rank nothing
    assert archs["task"][0] == "0"
    cut = compare(gates, units, size=0.2, n_random=19, per_site=False)
    assert cut.info["size"] == 0.2
    assert not [site for site, t in zip(cut["site"], cut["test"], strict=True) if site]


def test_sites_of_other_names_and_missing_sites():
    units, gates = make_units(), make_gates()
    renamed = UnitConcepts(
        {"module.a": units.iou["a"], "b": units.iou["b"], "z": units.iou["c"]},
        CONCEPTS,
        source="simulated",
    )
    result = compare(gates, renamed, site_map={"a": "module.a"}, n_random=19)
    assert {site for site in result["site"] if site} == {"a", "b"}
    assert any("1 gate site(s): c" in note for note in result.notes)
    assert any("1 site(s) of the units: z" in note for note in result.notes)
    nothing = UnitConcepts({"x": units.iou["a"]}, CONCEPTS, source="simulated")
    with pytest.raises(ValueError, match="no site in common"):
        compare(gates, nothing)
    with pytest.raises(ValueError, match="site 'a' has 16 channels, the units of 'b' are 24"):
        compare(gates, units, site_map={"a": "b"})
    with pytest.raises(ValueError, match="site_map names 'q'"):
        compare(gates, units, site_map={"q": "a"})


def test_best_labels_only_and_labels_of_all_concepts():
    units, gates = make_units(), make_gates()
    partial = {}
    for name, table in units.iou.items():
        best = table == table.max(1, keepdims=True)
        partial[name] = np.where(best, table, np.nan)
    result = compare(gates, UnitConcepts(partial, CONCEPTS, source="x"), n_random=19, min_units=3)
    assert not result.where(test="rank_correlation")
    assert any("3 concept(s)" in note for note in result.notes)
    full = compare(gates, units, n_random=19, min_units=3)
    for test in ("mann_whitney", "detectors", "enrichment"):
        a, b = ([r["effect"][i] for i in r.where(test=test)] for r in (result, full))
        np.testing.assert_array_equal(a, b)
    every = concept_enrichment(gates, units, labels="all", concepts=["grey"])
    flagged = _flat({s.name: units.iou[s.name][:, 1] > 0.04 for s in SITES})
    kept = _flat(gates.sub_architecture(1).masks)
    assert every["effect"][1] == pytest.approx(association(kept, flagged, STRATA).effect)
    with pytest.raises(ValueError, match="no concept is called 'sky'"):
        concept_enrichment(gates, units, concepts=["sky"])


def test_similarities_in_place_of_ious(tmp_path):
    path = tmp_path / "descriptions.csv"
    lines = ["layer,unit,description,similarity"]
    for site in SITES:
        for unit in range(site.n_channels):
            lines.append(f"{site.name},{unit},{'road' if unit % 3 else 'sky'},{1 + unit * 0.1}")
    path.write_text("\n".join(lines) + "\n")
    result = compare(make_gates(), import_clip_dissect(path), n_random=19)
    assert set(result["test"]) == {"mann_whitney", "enrichment"}
    assert any("no threshold for detectors" in note for note in result.notes)
    assert "best similarity" in result.sentences()[0]
    with pytest.raises(ValueError, match="no threshold"):
        semantics_along_depth(make_gates(), import_clip_dissect(path))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"labels": "some"}, ValueError, "labels"),
        ({"n_random": 0}, ValueError, "n_random"),
        ({"level": 1.0}, ValueError, "level"),
        ({"persistence": 1.0}, ValueError, "persistence"),
        ({"min_units": 0}, ValueError, "min_units"),
        ({"concepts": "road"}, TypeError, "list of names"),
        ({"high": "object"}, TypeError, "list of categories"),
        ({"similarities": np.eye(4)}, TypeError, "similarities"),
        ({"similarities": {"x": np.eye(3)}}, ValueError, "shape"),
        ({"save_as": "x"}, ValueError, "store"),
        ({"methods": ["taylor"]}, ValueError, "scores of a store"),
        ({"tasks": [17]}, KeyError, "17"),
    ],
)
def test_bad_options_are_named(options, error, message):
    with pytest.raises(error, match=message):
        compare(make_gates(), make_units(), **options)


def test_unknown_methods_and_units_are_named(store_path):
    with pytest.raises(ValueError, match=r"no scores of 'lrp'; there are energy, taylor"):
        compare(store_path, make_units(), methods=["lrp"])
    with pytest.raises(TypeError, match="UnitConcepts"):
        compare(make_gates(), {"a": 3})


def test_one_task_that_keeps_everything():
    arch = SubArchitecture.full(SITES)
    arch = SubArchitecture(arch.masks, SITES, task=0)
    result = compare(arch, make_units(), n_random=19)
    assert math.isnan(_row(result, test="mann_whitney", task="0")["effect"])
    assert math.isnan(_row(result, test="mann_whitney", task="0")["p"])
    assert "Nothing can be said" in result.sentences(result.where(test="mann_whitney"))[0]


# -- what is made of it ------------------------------------------------------------------------


def test_frame_is_tidy(result):
    frame = result.frame()
    assert list(frame.columns) == [
        *("test", "task", "site", "concept", "other", "n", "effect", "measure", "low", "high"),
        *("p", "q", "control", "control_low", "control_high", "sentence"),
    ]
    assert len(frame) == len(result)
    assert frame["sentence"].str.len().min() > 20
    assert frame.loc[frame["p"].notna(), "control"].notna().all()
    assert "sentence" not in result.frame(sentences=False)


def test_summary_says_what_was_found_and_left_out(result):
    text = result.summary()
    assert "discoveries at q < 0.05" in text
    assert "NAD and taylor order the channels, in the mean over tasks, more alike" in text
    assert "Note: energy has no scores of 2 task(s)." in text


def test_saved_beside_the_gates(store_path, tmp_path):
    made = compare(store_path, make_units(), n_random=19, save_as="street concepts")
    assert Comparison.load(store_path, "street concepts") == made
    with GateStore.open(store_path, "a") as store:
        again = compare(store, make_units(), n_random=19, save_as="again")
        assert "comparison/again" in store.results
    assert Comparison.load(store_path, "again").columns["effect"] == pytest.approx(
        again.columns["effect"], nan_ok=True
    )
    with pytest.raises(GateStoreError, match="no result"):
        Comparison.load(store_path, "nothing")
    nad_attr.store.write_result(tmp_path / "x.h5", "comparison/x", {"test": ["quack"]}, {})
    with pytest.raises(GateStoreError, match="holds no comparison"):
        Comparison.load(tmp_path / "x.h5", "x")


# -- concepts along depth ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def along():
    """Four sites of four channels; channels 0 and 1 are kept."""
    sites = [GateSite(f"s{i}", 4) for i in range(4)]
    high, low, none = [0.1, 0.0], [0.0, 0.2], [0.01, 0.02]
    iou = {
        "s0": [low, low, low, none],
        "s1": [high, low, low, none],
        "s2": [high, high, low, none],
        "s3": [high, high, high, high],
    }
    archs = [
        SubArchitecture.from_kept({s.name: [0, 1] for s in sites}, sites, task=0),
        SubArchitecture.from_kept({s.name: [0] for s in sites[:3]}, sites, task=1),
    ]
    concepts = [Concept("car", "object"), Concept("red", "colour")]
    units = UnitConcepts(iou, concepts, source="worked example")
    return semantics_along_depth(archs, units, n_random=499)


def test_shares_along_depth_by_hand(along):
    np.testing.assert_allclose(along.depths, [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(along.kept["high"], [[0, 0.5, 1, 1], [0, 1, 1, np.nan]])
    np.testing.assert_allclose(along.mean("high"), [0, 0.75, 1, 1])
    np.testing.assert_allclose(along.all["high"], [0, 0.25, 0.5, 1])
    np.testing.assert_allclose(along.all["high_of_detectors"], [0, 1 / 3, 2 / 3, 1])
    np.testing.assert_allclose(along.all["detectors"], [0.75, 0.75, 0.75, 1])
    np.testing.assert_allclose(along.mean("iou"), [0.2, 0.125, 0.1, 0.1], rtol=1e-6)
    np.testing.assert_allclose(along.all_categories["colour"], [0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(along.random["high"].mean(0), along.all["high"], atol=0.06)


def test_trends_along_depth(along):
    table = along.comparison(n_permutations=999)
    trend = {
        table["other"][i]: table.row(i)
        for i in table.where(test="depth_trend", concept="share of high-level detectors")
    }
    assert trend["all"]["effect"] == pytest.approx(1)
    # Two of the 24 orders of the sites are as far from 0.
    assert trend["all"]["p"] == pytest.approx(2 / 24, abs=0.03)
    kept = stats.spearmanr([0, 0.75, 1, 1], [0, 1, 2, 3]).statistic
    assert trend["kept"]["effect"] == pytest.approx(kept)
    difference = stats.spearmanr([0, 0.5, 0.5, 0], [0, 1, 2, 3]).statistic
    assert trend["kept - all"]["effect"] == pytest.approx(difference, abs=1e-12)
    (site,) = table.where(test="depth", site="s1", concept="share of high-level detectors")
    assert table["effect"][site] == 0.75


def test_depth_says_what_may_be_concluded(along):
    assert "cannot be concluded" in along.sentence
    assert "share of channels that detect object, part, scene; 2 task(s)" in along.summary()
    few = semantics_along_depth(
        SubArchitecture.from_kept({"a": [0]}, SITES[:1], task=0),
        make_units().select(["a"]),
        n_random=9,
    )
    assert "1 sites are too few" in few.sentence
    assert any("three sites" in note for note in few.comparison().notes)


def test_depth_frame_and_figure(along):
    frame = along.frame()
    assert set(frame["group"]) == {"kept", "all", "random"}
    chosen = frame[(frame["group"] == "all") & (frame["measure"] == "high")]
    np.testing.assert_allclose(chosen["value"], [0, 0.25, 0.5, 1])
    figure = along.plot()
    assert [axis.get_title(loc="left") for axis in figure.axes][:1] == [
        "Share of high-level detectors"
    ]
    assert {line.get_label() for line in figure.axes[0].lines} == {"kept", "all", "random"}
    axis = nad_attr.plots.style.new_figure(2, 2)[1]
    along.plot(axis)


def test_kept_channels_follow_the_network(along):
    """Where kept channels are all channels, nothing is left beyond those."""
    units = make_units()
    arch = SubArchitecture(SubArchitecture.full(SITES).masks, SITES, task=0)
    table = semantics_along_depth(arch, units, n_random=19).comparison(n_permutations=19)
    rows = table.where(test="depth_trend", other="kept - all")
    assert all(math.isnan(table["effect"][i]) for i in rows)


# -- the page about it -------------------------------------------------------------------------


def test_every_snippet_of_the_page_runs(capsys):
    page = Path(__file__).parents[1] / "docs" / "statistics.md"
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S)
    assert len(blocks) >= 7
    for block in blocks:
        exec(compile(block, str(page), "exec"), names)
    printed = capsys.readouterr().out
    for shown in re.findall(r"```text\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.S):
        for line in shown.splitlines():
            assert line.partition(" ...")[0] in printed
    wrong, right = (line for line in printed.splitlines() if line.startswith("Channels kept have"))
    assert "higher" in wrong
    assert "lower" in right
