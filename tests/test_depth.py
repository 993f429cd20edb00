"""Sizes and overlaps along depth, against hand-worked values and against SubArchitecture's own."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy import stats

from nad_attr.evaluation.questions.depth import DepthProfile, along_depth
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite

SITES = [GateSite("a", 4, 1), GateSite("b", 6, 1), GateSite("c", 8, -1)]


def by_hand() -> list[SubArchitecture]:
    kept = [
        {"a": [0, 1], "b": [0, 1, 2], "c": []},
        {"a": [1, 2], "b": [0, 1, 2], "c": []},
        {"a": [0, 1, 2, 3], "b": [3, 4, 5], "c": [0, 1]},
    ]
    return [SubArchitecture.from_kept(k, SITES, task=t) for t, k in enumerate(kept)]


def random_gates(n_tasks: int = 7, seed: int = 0) -> TaskGates:
    generator = torch.Generator().manual_seed(seed)
    gates = {s.name: torch.rand(n_tasks, s.n_channels, generator=generator) for s in SITES}
    return TaskGates(gates, SITES, list(range(n_tasks)))


def test_by_hand() -> None:
    profile = along_depth(by_hand())["network"]
    assert profile.sites == ("a", "b", "c")
    assert profile.n_channels.tolist() == [4, 6, 8]
    assert profile.depths.tolist() == [0, 0.5, 1]
    assert profile.mean("size") == pytest.approx([(2 + 2 + 4) / 12, 0.5, 2 / 24])
    # Pairs (0, 1), (0, 2), (1, 2). At c both empty: 1; one empty: 0.
    assert profile.mean("jaccard") == pytest.approx([(1 / 3 + 1 / 2 + 1 / 2) / 3, 1 / 3, 1 / 3])
    # At a: e = 1 and E J = 1/3 for the first pair, whole network 2/4 = E J for the others.
    # At b: e = 3/2, E J = 1/3: kappa 1, -1/2, -1/2. At c: 1, then J = 0 = E J.
    assert profile.mean("kappa") == pytest.approx([0, 0, 1 / 3], abs=1e-12)


def test_overlaps_are_those_of_sub_architectures() -> None:
    gates = random_gates()
    archs = gates.sub_architectures()
    profile = along_depth(gates)["network"]
    for measure, corrected in (("jaccard", False), ("kappa", True)):
        expected = np.mean(
            [
                list(a.overlaps(b, chance_corrected=corrected).values())
                for a, b in itertools.combinations(archs, 2)
            ],
            axis=0,
        )
        assert profile.mean(measure) == pytest.approx(expected, abs=1e-12)
    sizes = np.mean([list(a.sizes.values()) for a in archs], axis=0)
    assert profile.mean("size") == pytest.approx(sizes)


def test_size_cuts_task_gates() -> None:
    gates = random_gates()
    profile = along_depth(gates, size=0.5)["network"]
    channels = profile.n_channels / profile.n_channels.sum()
    assert float(profile.mean("size") @ channels) == pytest.approx(0.5)


def test_interval_of_sizes_is_the_bootstrap_of_a_mean() -> None:
    profile = along_depth(random_gates(40))["network"]
    low, high = profile.interval("size", n_draws=4000)
    error = profile.sizes.std(1) / math.sqrt(40)
    assert (high - low) / (2 * 1.96 * error) == pytest.approx([1, 1, 1], rel=0.12)
    assert ((low < profile.mean("size")) & (profile.mean("size") < high)).all()
    again = profile.interval("size", n_draws=4000)
    assert np.array_equal(low, again[0])


def test_interval_of_overlaps_makes_no_pair_of_a_task_with_itself() -> None:
    # All pairs overlap by the same: whatever is drawn, the mean is that. With pairs of a task and
    # itself it would be drawn towards 1.
    site = GateSite("a", 6, 1)
    archs = [SubArchitecture.from_kept({"a": [0, k + 1]}, [site], task=k) for k in range(5)]
    profile = along_depth(archs)["network"]
    low, high = profile.interval("jaccard")
    assert (low[0], high[0]) == pytest.approx((1 / 3, 1 / 3))


@pytest.mark.slow
def test_interval_of_overlaps_against_plain_resampling() -> None:
    profile = along_depth(random_gates(12))["network"]
    low, high = profile.interval("kappa", n_draws=3000)
    generator = np.random.default_rng(1)
    draws = []
    while len(draws) < 3000:
        tasks = generator.integers(12, size=12)
        pairs = [(t, u) for t, u in itertools.combinations(tasks, 2) if t != u]
        if pairs:
            draws.append(np.mean([profile.kappas[:, t, u] for t, u in pairs], axis=0))
    expected = np.quantile(draws, [0.025, 0.975], axis=0)
    assert low == pytest.approx(expected[0], abs=0.02)
    assert high == pytest.approx(expected[1], abs=0.02)


def test_two_tasks_have_one_pair_and_no_interval() -> None:
    profile = along_depth(by_hand()[:2])["network"]
    assert profile.mean("jaccard") == pytest.approx([1 / 3, 1, 1])
    assert np.isnan(profile.interval("jaccard")[0]).all()
    assert not np.isnan(profile.interval("size")[0]).any()


def test_kappa_of_random_masks_is_zero_on_average() -> None:
    site = GateSite("a", 40, 1)
    generator = torch.Generator().manual_seed(2)
    means = []
    for _ in range(30):
        gates = TaskGates({"a": torch.rand(12, 40, generator=generator)}, [site], list(range(12)))
        profile = along_depth(gates, size=0.3)["network"]
        means.append(float(profile.mean("kappa")[0]))
        assert float(profile.mean("jaccard")[0]) > 0.1  # which is not a similarity at all
    assert abs(np.mean(means)) < 3 * np.std(means) / math.sqrt(len(means)) + 0.01


def test_trend_is_the_rank_correlation_with_depth() -> None:
    sites = [GateSite(f"s{i}", 10, 1) for i in range(6)]
    generator = torch.Generator().manual_seed(0)
    gates = {s.name: torch.rand(8, 10, generator=generator) for s in sites}
    profile = along_depth(TaskGates(gates, sites, list(range(8))))["network"]
    value, low, high = profile.trend("size")
    assert value == pytest.approx(stats.spearmanr(profile.mean("size"), range(6)).statistic)
    assert low <= value <= high
    # One channel more at each site: rises whichever tasks are drawn.
    rising = [
        SubArchitecture.from_kept(
            {f"s{i}": list(range(i + 1 + (t == 0))) for i in range(6)}, sites, task=t
        )
        for t in range(4)
    ]
    assert along_depth(rising)["network"].trend("size") == pytest.approx((1, 1, 1))
    assert along_depth(by_hand())["network"].trend("size")[0] == pytest.approx(-1)
    two = [SubArchitecture.from_kept({}, SITES[:2], task=t) for t in range(3)]
    assert all(math.isnan(x) for x in along_depth(two)["network"].trend("size"))


def test_fidelity_is_shown_beside() -> None:
    fidelity = {"a": [0.1, 0.2, 0.3], "b": torch.tensor([0.5, math.nan, 0.7]), "c": np.ones(3)}
    profile = along_depth(by_hand(), fidelity=fidelity)["network"]
    assert profile.measures == ("size", "jaccard", "kappa", "fidelity")
    assert profile.mean("fidelity") == pytest.approx([0.2, 0.6, 1])
    with pytest.raises(ValueError, match="no measure 'fidelity'"):
        along_depth(by_hand())["network"].mean("fidelity")


@pytest.fixture
def several() -> DepthProfile:
    fidelity = {"residual": {s.name: torch.full((3,), 0.5) for s in SITES}}
    return along_depth({"plain": random_gates(), "residual": by_hand()}, fidelity=fidelity)


def test_several_networks(several: DepthProfile) -> None:
    frame = several.frame()
    assert frame["network"].tolist() == ["plain"] * 3 + ["residual"] * 3
    assert frame["fidelity"].isna().tolist() == [True] * 3 + [False] * 3
    alone = along_depth(random_gates(), name="plain")["plain"]
    assert frame["kappa"][:3].tolist() == pytest.approx(alone.mean("kappa").tolist())
    listed = json.loads(json.dumps(several.to_dict(), allow_nan=False))
    assert listed["measured"]["residual"]["size"]["mean"] == pytest.approx([8 / 12, 0.5, 1 / 12])
    assert "fidelity" not in listed["measured"]["plain"]
    text = several.summary()
    assert "plain: 7 tasks" in text
    assert "with depth" in text
    assert "residual: 3 sites" in repr(several)


def test_plot(several: DepthProfile) -> None:
    pytest.importorskip("matplotlib")
    figure = several.plot()
    assert [axis.get_title(loc="left") for axis in figure.axes][:2] == [
        "Size",
        "Overlap of two tasks",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    assert lines["residual"].get_ydata() == pytest.approx([8 / 12, 0.5, 1 / 12])
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["plain", "residual"]


def test_bad_input() -> None:
    archs = by_hand()
    with pytest.raises(ValueError, match="at least 2"):
        along_depth(archs[:1])
    with pytest.raises(ValueError, match="there is no network"):
        along_depth({})
    with pytest.raises(ValueError, match="task 0 is there twice"):
        along_depth([archs[0], archs[0]])
    with pytest.raises(TypeError, match="architectures must be"):
        along_depth("archs")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="size= needs TaskGates"):
        along_depth(archs, size=0.5)
    with pytest.raises(ValueError, match="fidelity is for"):
        along_depth(archs, fidelity={"a": [1, 2, 3]})
    with pytest.raises(ValueError, match="one number per task"):
        along_depth(archs, fidelity={name: [1.0] for name in "abc"})
    with pytest.raises(ValueError, match="not among the networks"):
        along_depth({"x": archs}, fidelity={"y": {}})
    with pytest.raises(TypeError, match="fidelity must be"):
        along_depth(archs, fidelity=[1.0])  # type: ignore[arg-type]
    profile = along_depth(archs)["network"]
    with pytest.raises(ValueError, match="no measure 'luck'"):
        profile.interval("luck")
    with pytest.raises(ValueError, match="level"):
        profile.interval("size", level=0.0)
    with pytest.raises(ValueError, match="n_draws"):
        profile.interval("size", n_draws=0)
