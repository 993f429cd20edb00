"""Keep and ablate curves: by hand, on a network whose curve is known, and against evaluate()."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr.evaluation import ABLATIONS, evaluate, fit_ablation
from nad_attr.evaluation.sweeps.curves import Curves, area_under, completeness, curves, faithfulness
from nad_attr.evaluation.sweeps.grid import GRID_MEASURES, measure_grid
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from tests import helpers

nan = math.nan

CNN_SITES = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]

# Output 0 is 4 a + 2 b + c + d, output 1 the negative. The images are all signs of a, b, c and d,
# the class is their product: within each class every two of them are uncorrelated, so that the
# variances 16, 4, 1 and 1 add up, and zero is the mean.
WEIGHTS = torch.tensor([4.0, 2.0, 1.0, 1.0])
SIGNS = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=4)))
LABELS = (SIGNS.prod(1) > 0).long()
SITE = [GateSite("0", 4, 1)]


def linear() -> nn.Module:
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([WEIGHTS, -WEIGHTS]))
    return net


def random_scores(n_tasks: int = 3, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        site.name: torch.rand(n_tasks, site.n_channels, generator=generator) for site in CNN_SITES
    }


# ---------------------------------------------------------------------------------------------
# Pure functions
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "values", "expected"),
    [
        ([0, 1], [0, 1], 0.5),
        ([0, 0.25, 1], [1, 1, 1], 1.0),
        ([0, 0.25, 1], [0, 1, 0], 0.5),
        ([0, 0.2, 0.2, 1], [0, 0, 1, 1], 0.8),  # a step
        ([1, 3], [2, 4], 3.0),  # divided by the range
        ([0, 0.5, 1], [0, nan, 1], nan),
    ],
)
def test_area_by_hand(sizes, values, expected: float) -> None:
    assert area_under(sizes, values) == pytest.approx(expected, abs=1e-15, nan_ok=True)


def test_area_of_rows() -> None:
    assert area_under([0, 1], [[0, 1], [1, 1]]).tolist() == [0.5, 1.0]


@pytest.mark.parametrize(
    ("sizes", "values"),
    [([0, 1], [1]), ([1, 0], [1, 1]), ([0.5], [1]), ([0, 0], [1, 1]), ([[0, 1]], [[1, 1]])],
)
def test_area_refuses(sizes, values) -> None:
    with pytest.raises(ValueError, match="sizes"):
        area_under(sizes, values)


def test_faithfulness_and_completeness_by_hand() -> None:
    assert faithfulness([0.5, 0.75, 1.0, 0.25], 0.5, 1.0).tolist() == [0, 0.5, 1, -0.5]
    assert completeness([0.5, 0.75, 1.0], 0.5, 1.0).tolist() == [1, 0.5, 0]
    # Where less is better, full below empty: half-way is half-way.
    assert faithfulness(0.3, 0.5, 0.1) == pytest.approx(0.5)


def test_faithfulness_has_no_scale_where_nothing_is_lost() -> None:
    found = faithfulness([[0.7, 0.5], [0.7, 0.5]], [[0.5], [0.9]], [[0.5], [0.7]])
    assert np.isnan(found[0]).all()
    assert found[1].tolist() == pytest.approx([1.0, 2.0])
    assert np.isnan(faithfulness(0.5, 0.5, 0.5 + 1e-12))
    assert np.isnan(completeness(nan, 0.5, 1.0))
    assert np.isnan(faithfulness(0.5, nan, 1.0))


@pytest.mark.slow
@given(st.lists(st.floats(-1, 1), min_size=1, max_size=5), st.floats(-1, 0), st.floats(0.1, 1))
def test_faithfulness_does_not_depend_on_the_unit(values, empty: float, full: float) -> None:
    first = faithfulness(values, empty, full)
    second = faithfulness(3 * np.array(values) - 2, 3 * empty - 2, 3 * full - 2)
    np.testing.assert_allclose(first, second, atol=1e-9)


# ---------------------------------------------------------------------------------------------
# A network whose curve is known
# ---------------------------------------------------------------------------------------------


def known(scores: Tensor = WEIGHTS, **options: object) -> Curves:
    options = {"sizes": [0.25, 0.5, 0.75], "measure": "fidelity", **options}
    ranks = {"0": torch.stack([scores, scores])}
    return curves(linear(), ranks, (SIGNS, LABELS), sites=SITE, tasks=[0, 1], **options)


def test_known_curve() -> None:
    result = known()
    for k in range(2):
        np.testing.assert_allclose(result.values("keep")[k] * 22, [16, 20, 21], atol=1e-5)
        np.testing.assert_allclose(result.values("ablate")[k] * 22, [6, 2, 1], atol=1e-5)
    np.testing.assert_allclose(result.empty["fidelity"], 0, atol=1e-6)
    np.testing.assert_allclose(result.full["fidelity"], 1)
    # (0 + 2 * (16 + 20 + 21) + 22) / 8 / 22 and, with 22 less each, its complement.
    np.testing.assert_allclose(result.area("keep"), 17 / 22, atol=1e-6)
    np.testing.assert_allclose(result.area("ablate"), 5 / 22, atol=1e-6)
    np.testing.assert_allclose(result.delta(), 12 / 22, atol=1e-6)
    np.testing.assert_allclose(result.values("faithfulness")[0] * 22, [16, 20, 21], atol=1e-4)
    np.testing.assert_allclose(result.values("completeness")[0] * 22, [16, 20, 21], atol=1e-4)
    assert (np.diff(result.mean("keep")) > 0).all()


def test_wrong_order_is_the_mirror_image() -> None:
    right, wrong = known(), known(-WEIGHTS)
    np.testing.assert_allclose(wrong.delta(), -right.delta(), atol=1e-6)
    np.testing.assert_allclose(wrong.values("keep")[:, ::-1], right.values("ablate"), atol=1e-6)


def test_ties_are_kept_in_channel_order() -> None:
    np.testing.assert_allclose(known(torch.ones(4)).values("keep"), known().values("keep"))


def test_sizes_are_whole_channels_and_sorted() -> None:
    result = known(sizes=[0.7, 0.01])
    assert result.requested == (0.01, 0.7)
    assert result.sizes.tolist() == [0.25, 0.75]
    np.testing.assert_allclose(result.values("keep")[0] * 22, [16, 21], atol=1e-5)


def test_size_one_is_the_whole_network() -> None:
    result = known(sizes=[1.0])
    np.testing.assert_allclose(result.values("keep"), 1)
    np.testing.assert_allclose(result.values("ablate"), 0, atol=1e-6)
    np.testing.assert_allclose(result.delta(), 0, atol=1e-6)


def test_nan_where_the_whole_network_knows_nothing() -> None:
    # The product of four signs is not a sum of them: AUC one half, with all channels or none.
    result = known(measure="own_auc")
    np.testing.assert_allclose(result.full["own_auc"], 0.5)
    assert np.isnan(result.values("faithfulness")).all()
    assert np.isnan(result.area("completeness")).all()
    assert np.isnan(result.mean("faithfulness")).all()
    assert not np.isnan(result.delta()).any()
    assert "-" in result.summary()


def test_mean_ablation_of_shifted_channels_is_zero_ablation_of_centred_ones() -> None:
    shifted = (SIGNS + 5, LABELS)
    ranks = {"0": torch.stack([WEIGHTS, WEIGHTS])}
    options = {"sites": SITE, "tasks": [0, 1], "sizes": [0.25, 0.5], "measure": "fidelity"}
    net = linear()
    mean = curves(net, ranks, shifted, ablation="mean", train_data=shifted, **options)
    np.testing.assert_allclose(mean.values("keep")[0] * 22, [16, 20], atol=1e-4)
    assert mean.ablation == "mean"
    zero = curves(net, ranks, shifted, ablation="zero", **options)
    assert zero.ablation == "zero"
    # Without channels b, c and d the output is off by (2 + 1 + 1) * 5 = 20 on average.
    assert zero.values("keep")[0, 0] == pytest.approx(1 - (6 + 400) / 22, abs=1e-4)
    gates = TaskGates(
        {"0": torch.full((2, 4), 0.9)},
        SITE,
        [0, 1],
        logits=ranks,
        means={"0": torch.full((4,), 5.0)},
    )
    own = curves(net, gates, shifted, sizes=[0.25, 0.5], measure="fidelity")
    np.testing.assert_allclose(own.values("keep"), mean.values("keep"), atol=1e-6)
    assert own.ablation == "mean"


def test_gates_learned_for_each_size() -> None:
    def gates(scores: Tensor) -> TaskGates:
        logits = {"0": torch.stack([scores, scores])}
        return TaskGates({"0": logits["0"].sigmoid()}, SITE, [0, 1], logits=logits)

    by_size = {0.25: gates(-WEIGHTS), 0.5: gates(WEIGHTS)}
    found = curves(linear(), by_size, (SIGNS, LABELS), sizes=[0.5, 0.25], measure="fidelity")
    np.testing.assert_allclose(found.values("keep")[0] * 22, [1, 20], atol=1e-5)
    with pytest.raises(ValueError, match=r"not for 0\.3"):
        curves(linear(), by_size, (SIGNS, LABELS), sizes=[0.3, 0.25])


def test_per_site_budgets() -> None:
    scores = {"relu1": torch.ones(3, 6), "relu2": torch.zeros(3, 8)}
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    options = {"sites": CNN_SITES, "tasks": [0, 1, 2], "sizes": [0.5]}
    spread = curves(model, scores, data, per_site=True, **options)
    joint = curves(model, scores, data, **options)
    assert spread.sizes.tolist() == joint.sizes.tolist() == [0.5]
    for result, kept in (
        (spread, {"relu1": range(3), "relu2": range(4)}),
        (joint, {"relu1": range(6), "relu2": range(1)}),
    ):
        archs = [
            SubArchitecture.from_kept({n: list(c) for n, c in kept.items()}, CNN_SITES, task=k)
            for k in range(3)
        ]
        expected = evaluate(model, archs, data, n_random=0)
        for measure in GRID_MEASURES:
            np.testing.assert_allclose(result.keep[measure][:, 0], expected.values(measure))


# ---------------------------------------------------------------------------------------------
# The grid against evaluate(), batch size, memory
# ---------------------------------------------------------------------------------------------


def masks(seed: int, tasks: list[object]) -> list[SubArchitecture]:
    generator = torch.Generator().manual_seed(seed)
    return [
        SubArchitecture(
            {s.name: torch.rand(s.n_channels, generator=generator) > 0.4 for s in CNN_SITES},
            CNN_SITES,
            task=task,
        )
        for task in tasks
    ]


@pytest.mark.slow
@pytest.mark.parametrize("memory", [1, "250MB"])
def test_grid_measures_what_evaluate_measures(memory: int | str) -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    tasks = [2, (0, 1), 0]
    groups = [masks(seed, tasks) for seed in range(4)]
    grid = measure_grid(model, groups, data, run=RunOptions(memory_limit=memory, batch_size=7))
    for g, group in enumerate(groups):
        expected = evaluate(model, group, data, n_random=0)
        for measure in GRID_MEASURES:
            np.testing.assert_allclose(grid.values[measure][g], expected.values(measure))
            np.testing.assert_allclose(grid.whole[measure], expected.whole.values(measure))


def test_without_others() -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    groups = [masks(seed, [0, 1, 2]) for seed in range(3)]
    full = measure_grid(model, groups, data)
    part = measure_grid(model, groups, data, others=False, run=RunOptions(memory_limit=1))
    assert set(full.values) - set(part.values) == {"other_auc", "disentanglement"}
    for measure, values in part.values.items():
        np.testing.assert_array_equal(values, full.values[measure])
        np.testing.assert_array_equal(part.whole[measure], full.whole[measure])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ABLATIONS)
def test_batch_size_and_memory_play_no_part(kind: str) -> None:
    model = helpers.build(helpers.TinyCNN)
    data, train = helpers.labelled_images(), helpers.labelled_images(seed=1)
    ablation = fit_ablation(model, CNN_SITES, train, kind=kind)
    options = {"sites": CNN_SITES, "tasks": [0, 1, 2], "sizes": [0.2, 0.6], "ablation": ablation}
    first = curves(model, random_scores(), data, **options)
    second = curves(
        model, random_scores(), data, run=RunOptions(batch_size=5, memory_limit=1), **options
    )
    named = {**options, "ablation": kind, "train_data": train}
    third = curves(model, random_scores(), data, **named)
    assert first.ablation == third.ablation == kind
    for other in (second, third):
        for measure in GRID_MEASURES:
            for a, b in ((first.keep, other.keep), (first.ablate, other.ablate)):
                np.testing.assert_allclose(a[measure], b[measure], atol=1e-6)


@pytest.mark.slow
def test_model_is_left_alone(tiny_model: nn.Module) -> None:
    from nad_attr import find_gate_sites

    data = helpers.labelled_images()
    sites = find_gate_sites(tiny_model, data[0][:1])
    scores = {s.name: torch.rand(3, s.n_channels, generator=torch.Generator()) for s in sites}
    options = {"sites": sites, "tasks": [0, 1, 2], "sizes": [0.5]}
    with helpers.assert_model_untouched(tiny_model, *data):
        curves(tiny_model, scores, data, **options)
    broken = (data[0].clone(), data[1])
    broken[0][-1] = nan
    with pytest.raises(ValueError, match="NaN"), helpers.assert_model_untouched(tiny_model):
        curves(tiny_model, scores, broken, **options)


def test_tasks_without_images_are_nan() -> None:
    model, (images, labels) = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    keep = labels != 2
    with pytest.warns(UserWarning, match=r"\[2\]"):
        result = curves(
            model,
            random_scores(),
            (images[keep], labels[keep]),
            sites=CNN_SITES,
            tasks=[0, 1, 2],
            sizes=[0.5],
        )
    assert np.isnan(result.delta()).tolist() == [False, False, True]
    assert not np.isnan(result.mean("keep")).any()


# ---------------------------------------------------------------------------------------------
# The result
# ---------------------------------------------------------------------------------------------


def test_frame_has_the_ends() -> None:
    pytest.importorskip("pandas")
    result = known(task_names=["even", "odd"])
    frame = result.frame()
    assert len(frame) == 2 * 2 * 5
    part = frame[(frame.task == 1) & (frame.curve == "ablate")]
    assert part["size"].tolist() == [0, 0.25, 0.5, 0.75, 1]
    np.testing.assert_allclose(part.fidelity * 22, [22, 6, 2, 1, 0], atol=1e-5)
    assert set(part.name) == {"odd"}
    for task, delta in enumerate(result.delta()):
        areas = [
            area_under(rows["size"], rows["fidelity"])
            for kind in ("keep", "ablate")
            for rows in [frame[(frame.task == task) & (frame.curve == kind)]]
        ]
        assert areas[0] - areas[1] == pytest.approx(delta)


def test_dictionary_and_json(tmp_path) -> None:
    result = known()
    result.save(tmp_path / "curves.json")
    read = json.loads((tmp_path / "curves.json").read_text())
    assert read == result.to_dict()
    assert read["delta"]["fidelity"]["mean"] == pytest.approx(12 / 22)
    assert read["faithfulness"]["own_auc"] == [[None] * 3] * 2


def test_interval_and_summary() -> None:
    result = known()
    low, high = result.interval()
    np.testing.assert_allclose(low, result.mean(), atol=1e-6)
    np.testing.assert_allclose(high, result.mean(), atol=1e-6)
    text = result.summary()
    assert "0.727 (0.727 to 0.727)" in text
    assert "delta 0.545 (0.545 to 0.545)" in text
    assert "Curves(2 tasks" in repr(result)
    with pytest.raises(ValueError, match="level"):
        result.interval(level=2)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"sizes": []}, ValueError, "sizes is empty"),
        ({"sizes": [0.0]}, ValueError, r"\(0, 1\]"),
        ({"sizes": [0.5, 0.5]}, ValueError, "twice"),
        ({"sizes": "0.5"}, TypeError, "sizes"),
        ({"measure": "auc"}, ValueError, "no measure 'auc'"),
        ({"measure": "other_auc", "others": False}, ValueError, "others=True"),
        ({"sites": None}, ValueError, "sites= and tasks="),
        ({"tasks": [0]}, ValueError, r"shape \(2, 4\)"),
        ({"tasks": [5, 6]}, ValueError, r"no image of any of the tasks \[5, 6\]"),
        ({"ablation": "mean"}, ValueError, "train_data="),
        ({"ablation": "none"}, ValueError, "no ablation 'none'"),
        ({"task_names": ["a"]}, ValueError, "task_names"),
    ],
)
def test_bad_input(change, error, match: str) -> None:
    options = {"sites": SITE, "tasks": [0, 1], "sizes": [0.5], **change}
    with pytest.raises(error, match=match):
        curves(linear(), {"0": torch.eye(4)[:2]}, (SIGNS, LABELS), **options)


def test_bad_scores_and_names() -> None:
    options = {"sites": SITE, "tasks": [0, 1], "sizes": [0.5]}
    for scores, match in (
        ({"0": torch.full((2, 4), nan)}, "NaN"),
        ({"1": torch.eye(4)[:2]}, "sites"),
        ({}, "empty"),
    ):
        with pytest.raises(ValueError, match=match):
            curves(linear(), scores, (SIGNS, LABELS), **options)
    with pytest.raises(TypeError, match="scores_or_gates"):
        curves(linear(), 3, (SIGNS, LABELS), **options)
    result = known()
    with pytest.raises(ValueError, match="no curve 'kept'"):
        result.values("kept")
    with pytest.raises(ValueError, match="no measure 'size'"):
        result.delta("size")
