"""An evaluation beside its rivals: random channels, p-values, detectors, blocks, files."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr.evaluation import evaluating
from nad_attr.evaluation.ablation import fit_ablation
from nad_attr.evaluation.evaluating import evaluate, random_architectures
from nad_attr.evaluation.paired import paired_interval
from nad_attr.evaluation.result import Evaluation
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.stats.bootstrap import bootstrap_interval
from nad_attr.stats.measure_table import MEASURES
from nad_attr.store import GateStoreError
from tests import helpers

nan = math.nan
SITES = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
TASKS = (2, (0, 1), 0)
FIELDS = (*MEASURES, "table", "overlap", "kappa", "n_own")


def task_gates(seed: int = 3, tasks=TASKS, means: bool = False) -> TaskGates:
    generator = torch.Generator().manual_seed(seed)
    gates = {s.name: torch.rand(len(tasks), s.n_channels, generator=generator) for s in SITES}
    values = {s.name: torch.rand(s.n_channels, generator=generator) for s in SITES}
    return TaskGates(gates, SITES, tasks, means=values if means else None)


@pytest.fixture
def cnn() -> nn.Module:
    return helpers.build(helpers.TinyCNN)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return helpers.labelled_images(11)


def assert_equal(first: Evaluation, second: Evaluation, *, exact: bool = True) -> None:
    """All that a result holds is the same, also inside the results that it holds."""
    assert first.tasks == second.tasks
    assert first.task_names == second.task_names
    assert first.n_images == second.n_images
    for name in FIELDS:
        a, b = getattr(first, name), getattr(second, name)
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0 if exact else 1e-6, err_msg=name)
    assert list(first.sizes) == list(second.sizes)
    for name, size in first.sizes.items():
        np.testing.assert_array_equal(size, second.sizes[name])
    assert (first._whole is None) == (second._whole is None)
    assert list(first.rivals) == list(second.rivals)
    inner = [(first.whole, second.whole)] if first._whole is not None else []
    inner += list(zip(first.random, second.random, strict=True))
    inner += [(rival, second.rivals[name]) for name, rival in first.rivals.items()]
    for a, b in inner:
        assert_equal(a, b, exact=exact)


def made(values: list[float] | np.ndarray, **more) -> Evaluation:
    """A result of which only the fidelity matters."""
    values = np.asarray(values, dtype=np.float64)
    tasks = tuple(range(len(values)))
    zeros = np.zeros(len(values))
    return Evaluation(
        tasks=tasks,
        task_names=tuple(map(str, tasks)),
        n_images=7,
        n_own=np.ones(len(values), dtype=np.int64),
        size=zeros,
        sizes={},
        table=np.zeros((len(values), len(values))),
        fidelity=values,
        rank_fidelity=zeros,
        margin_auc=zeros,
        recall=zeros,
        fpr=zeros,
        other_accuracy=zeros,
        **more,
    )


# ---------------------------------------------------------------------------------------------
# Random channels
# ---------------------------------------------------------------------------------------------


def test_random_architectures() -> None:
    archs = task_gates(means=True).sub_architectures()
    archs.append(SubArchitecture.from_kept({}, SITES, task=1))
    archs.append(SubArchitecture(SubArchitecture.full(SITES).masks, SITES, task=5))
    drawn = random_architectures(archs, draw=2, seed=7)
    for arch, other in zip(archs, drawn, strict=True):
        assert (other.n_kept, other.task, other.sites) == (arch.n_kept, arch.task, arch.sites)
        assert (other.means is None) == (arch.means is None)
    assert torch.equal(drawn[0].means["relu1"], archs[0].means["relu1"])
    # A task's draw does not depend on the other tasks; seeds and draws differ.
    assert random_architectures(archs[1:2], draw=2, seed=7)[0] == drawn[1]
    for options in ({"draw": 1, "seed": 7}, {"draw": 2, "seed": 8}):
        assert random_architectures(archs, **options)[0] != drawn[0]
    assert drawn[0].masks["relu1"].tolist() != drawn[2].masks["relu1"].tolist()
    assert drawn[0] != archs[0]


@pytest.mark.slow
def test_random_channels_are_uniform() -> None:
    arch = SubArchitecture.from_kept({"relu1": [0, 1], "relu2": [0, 1, 2]}, SITES, task=0)
    n = 2000
    counts = sum(
        torch.cat(list(random_architectures([arch], draw=i)[0].masks.values())).int()
        for i in range(n)
    )
    p = 5 / 14
    z = (counts / n - p) / math.sqrt(p * (1 - p) / n)
    assert z.abs().max() < 4


def test_random_results_are_those_of_random_architectures(cnn: nn.Module, data) -> None:
    gates = task_gates(means=True)
    found = evaluate(cnn, gates, data, n_random=2, seed=5, batch_size=6)
    assert len(found.random) == 2
    for draw, result in enumerate(found.random):
        archs = random_architectures(gates.sub_architectures(), draw=draw, seed=5)
        alone = evaluate(cnn, archs, data, n_random=0)
        for name in FIELDS:
            np.testing.assert_allclose(getattr(result, name), getattr(alone, name), rtol=1e-6)
        np.testing.assert_array_equal(result.size, found.size)
        assert result.whole is found.whole
        assert not result.random
    assert not np.allclose(found.random[0].own_auc, found.random[1].own_auc)


# ---------------------------------------------------------------------------------------------
# Rivals
# ---------------------------------------------------------------------------------------------


def test_rivals(cnn: nn.Module, data) -> None:
    gates = task_gates()
    archs = gates.sub_architectures()
    other = task_gates(seed=8, tasks=(0, 1, 2, (0, 1)))  # in another order, and one more
    rivals = {"gates": other, "list": list(reversed(task_gates(seed=9).sub_architectures(0.3)))}
    found = evaluate(cnn, gates, data, rivals=rivals, n_random=1)
    assert list(found.rivals) == ["gates", "list"]
    cut = [other.sub_architecture(a.task, a.n_kept / a.n_channels) for a in archs]
    for name, expected in (
        ("gates", evaluate(cnn, cut, data, n_random=0)),
        ("list", evaluate(cnn, task_gates(seed=9), data, size=0.3, n_random=0)),
    ):
        rival = found.rivals[name]
        for field in FIELDS:
            a, b = getattr(rival, field), getattr(expected, field)
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=field)
        assert rival.whole is found.whole
    np.testing.assert_array_equal(found.rivals["gates"].size, found.size)
    np.testing.assert_allclose(found.rivals["list"].size, 4 / 14)


def test_rival_of_nothing(cnn: nn.Module, data) -> None:
    nothing = [SubArchitecture.from_kept({}, SITES, task=k) for k in (0, 2)]
    found = evaluate(cnn, nothing, data, rivals={"gates": task_gates(tasks=(0, 2))}, n_random=1)
    assert found.rivals["gates"].size.tolist() == found.random[0].size.tolist() == [0, 0]
    np.testing.assert_allclose(found.rivals["gates"].own_auc, 0.5)


def test_bad_rivals(cnn: nn.Module, data) -> None:
    gates = task_gates()
    archs = gates.sub_architectures()
    site = [GateSite("relu1", 6, 1)]
    elsewhere = [SubArchitecture.from_kept({}, site, task=a.task) for a in archs]
    for rivals, error, message in (
        ([gates], TypeError, "rivals must be"),
        ({1: gates}, TypeError, "a rival's name"),
        ({"x": 3}, TypeError, "rival 'x': architectures must be"),
        ({"x": []}, ValueError, "rival 'x': there is no"),
        ({"x": archs[:2]}, ValueError, "rival 'x' is of the tasks"),
        ({"x": gates.select([0, 2])}, ValueError, "rival 'x' is of the tasks"),
        ({"x": [*archs, archs[0]]}, ValueError, "rival 'x' has a task twice"),
        ({"x": elsewhere}, ValueError, "rival 'x' has other gate sites"),
    ):
        with helpers.assert_model_untouched(cnn), pytest.raises(error, match=message):
            evaluate(cnn, gates, data, rivals=rivals)


def test_bad_options(cnn: nn.Module, data) -> None:
    gates = task_gates()
    for value in (-1, 1.5, True, None, "3"):
        with pytest.raises(ValueError, match="n_random must be a whole number"):
            evaluate(cnn, gates, data, n_random=value)
    with pytest.raises(TypeError, match="data must be"):
        evaluate(cnn, gates, data, threshold_data=3)
    with pytest.raises(ValueError, match="label 8"):
        evaluate(cnn, gates, data, threshold_data=(data[0], data[1] + 6))


# ---------------------------------------------------------------------------------------------
# p-values
# ---------------------------------------------------------------------------------------------


def test_p_value_by_hand() -> None:
    draws = tuple(made([x, x]) for x in (0.1, 0.5, 0.7, nan))
    for value, expected in ((0.9, 1 / 4), (0.7, 2 / 4), (0.6, 2 / 4), (0.3, 3 / 4), (0.0, 1.0)):
        found = made([value, value], random=draws)
        assert found.p_value("fidelity") == expected
    assert made([0.1, 0.1], random=draws).p_value("fidelity", lower=True) == 2 / 4
    assert math.isnan(made([0.1, 0.2]).p_value("fidelity"))
    assert math.isnan(made([nan, nan], random=draws).p_value("fidelity"))
    with pytest.raises(ValueError, match="no measure 'luck'"):
        made([0.1], random=draws).p_value("luck")


@pytest.mark.slow
def test_p_values_are_uniform_for_random_channels(cnn: nn.Module, data) -> None:
    """Where the sub-architectures are random channels themselves."""
    n_draws, n = 4, 60
    gates = task_gates()
    archs = gates.sub_architectures(0.5)
    found = []
    for i in range(n):
        observed = random_architectures(archs, draw=0, seed=1000 + i)
        result = evaluate(cnn, observed, data, n_random=n_draws, seed=i, batch_size=256)
        found.append(result.p_value("fidelity"))
    counts = np.bincount(np.round(np.array(found) * 5).astype(int), minlength=6)[1:]
    assert counts.sum() == n
    chi_square = ((counts - n / 5) ** 2 / (n / 5)).sum()
    assert chi_square < 18.5  # 0.1 % of four degrees of freedom


# ---------------------------------------------------------------------------------------------
# Detector
# ---------------------------------------------------------------------------------------------


def test_detector_by_hand() -> None:
    """The network gives its input back; thresholds 1.5 (own 2, 3 above 0, 1) and 4 for class 1."""
    site = GateSite("0", 2, 1)
    model = nn.Sequential(nn.Identity()).eval()
    training = (
        torch.tensor([[2.0, 9.0], [3.0, 3.0], [0.0, 5.0], [1.0, 6.0]]),
        torch.tensor([0, 0, 1, 1]),
    )
    held_out = (
        torch.tensor([[1.6, 0.0], [1.4, 0.0], [9.0, 0.0], [0.0, 4.1], [1.7, 3.9], [0.0, 9.0]]),
        torch.tensor([0, 0, 0, 1, 1, 1]),
    )
    archs = [SubArchitecture.from_kept({"0": [k]}, [site], task=k) for k in (0, 1)]
    found = evaluate(model, archs, held_out, threshold_data=training, batch_size=4)
    # 0: own 1.6, 9 of three above; of the others 1.7. 1: above 4 lie 4.1, 9.0 and none other.
    np.testing.assert_allclose(found.detector_ba, [(2 / 3 + 2 / 3) / 2, (2 / 3 + 1) / 2])
    np.testing.assert_allclose(found.whole.detector_ba, found.detector_ba)
    assert "det. BA" in found.summary()
    # A closed channel is a constant: the detector says nothing.
    swapped = [SubArchitecture.from_kept({"0": [1 - k]}, [site], task=k) for k in (0, 1)]
    dead = evaluate(model, swapped, held_out, threshold_data=training)
    np.testing.assert_allclose(dead.detector_ba, 0.5)
    assert np.isnan(evaluate(model, archs, held_out).detector_ba).all()


def test_detector_without_own_training_images(cnn: nn.Module, data) -> None:
    some = data[1] != 2
    found = evaluate(cnn, task_gates(), data, threshold_data=(data[0][some], data[1][some]))
    assert np.isnan(found.detector_ba).tolist() == [True, True, False]  # all others are (0, 1)
    assert np.isnan(found.whole.detector_ba).tolist() == [True, True, False]


# ---------------------------------------------------------------------------------------------
# Blocks of rows
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", [None, "resample"])
def test_blocks_do_not_matter(cnn: nn.Module, data, kind, monkeypatch) -> None:
    gates = task_gates(means=True)
    training = helpers.labelled_images(8, seed=4)
    options = {
        "threshold_data": training,
        "rivals": {"other": task_gates(seed=6)},
        "ablation": None if kind is None else fit_ablation(cnn, SITES, training, kind=kind),
    }
    expected = evaluate(cnn, gates, data, **options)
    heights = []
    original = evaluating.answers

    def counted(runner, archs, *args, **kwargs):
        heights.append(len(archs))
        return original(runner, archs, *args, **kwargs)

    monkeypatch.setattr(evaluating, "answers", counted)
    row = (4 * 3 + 128) * 11 + 128 * 8
    for max_bytes, height in ((1, 1), (2 * row, 2), (5 * row, 5), (10**9, 15)):
        heights.clear()
        assert_equal(
            evaluate(cnn, gates, data, run=RunOptions(memory_limit=max_bytes), **options), expected
        )
        assert max(heights) == height
        assert sum(heights) == 2 * 15  # data and threshold data, 3 tasks x (1 + 3 + 1)


def test_the_whole_network_runs_once(cnn: nn.Module, data) -> None:
    passes = []
    cnn.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    evaluate(cnn, task_gates(), data, run=RunOptions(memory_limit=1), n_random=1)
    # And one image for the multiply-adds, five to check that outputs are their images' own, and
    # three to ask whether the batch size is fixed.
    assert sum(passes) == 11 * (1 + 6) + 1 + 5 + 3


# ---------------------------------------------------------------------------------------------
# Overlaps, summary
# ---------------------------------------------------------------------------------------------


def test_overlaps(cnn: nn.Module, data) -> None:
    gates = task_gates()
    found = evaluate(cnn, gates, data, n_random=1)
    archs = gates.sub_architectures()
    for name, corrected in (("overlap", False), ("kappa", True)):
        expected = [[a.overlap(b, chance_corrected=corrected) for b in archs] for a in archs]
        np.testing.assert_allclose(getattr(found, name), expected, atol=1e-12)
        np.testing.assert_array_equal(getattr(found.whole, name), 1)


def test_recall_is_never_alone(cnn: nn.Module, data) -> None:
    gates = task_gates()
    bare = evaluate(cnn, gates, data, n_random=0).summary()
    assert "recall is left out" in bare
    assert "recall" not in bare.splitlines()[2]
    assert "FPR" in bare.splitlines()[2]
    rival = evaluate(cnn, gates, data, n_random=0, rivals={"Taylor": task_gates(seed=5)})
    lines = rival.summary().splitlines()
    assert "recall" in lines[1]
    assert [line.split("  ")[0] for line in lines[-3:-1]] == ["Taylor", "whole network"]
    assert lines[-1] == "closed channels: zero"
    assert not any(line.startswith("random") for line in lines)
    both = evaluate(cnn, gates, data, rivals={"Taylor": task_gates(seed=5)}, threshold_data=data)
    lines = both.summary().splitlines()
    assert all(word in lines[1] for word in ("recall", "FPR", "own AUC", "BA"))
    assert [line.split("  ")[0] for line in lines[-4:-1]] == [
        "random, same size",
        "Taylor",
        "whole network",
    ]
    mean = sum(draw.mean("recall") for draw in both.random) / 3
    assert f"{mean:.3f}" in lines[-4]
    assert max(map(len, lines)) <= 100
    assert "recall" in both.whole.summary().splitlines()[1]  # beside it there is nothing


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def result(cnn: nn.Module, data) -> Evaluation:
    """With NaN in it, groups of classes, rivals with awkward names."""
    named = task_gates()
    gates = TaskGates(
        {s.name: named[s.name] for s in SITES}, SITES, TASKS, task_names=["Katze", "🐕/x", "c d"]
    )
    return evaluate(
        cnn,
        gates,
        data,
        n_random=2,
        rivals={"a/b.c": task_gates(seed=5), "random.0": task_gates(seed=6)},
    )


def test_json(result: Evaluation, tmp_path) -> None:
    path = tmp_path / "result.json"
    result.save(path)
    read = Evaluation.load(path)
    assert_equal(read, result)
    assert np.isnan(read.detector_ba).all()
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content == read.to_dict()
    assert content["p_values"]["own_auc"] == result.p_value("own_auc")
    assert content["kappa"] == result.kappa.tolist()
    assert read.whole is read.random[0].whole
    result.whole.save(path)
    assert_equal(Evaluation.load(path), result.whole)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"tasks": [0]}', "null", "[" * 100_000],
)
def test_bad_json(text: str, tmp_path) -> None:
    path = tmp_path / "result.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"result\.json (is not a JSON file|was not written by Evaluation)"
    ):
        Evaluation.load(path)
    with pytest.raises(OSError, match="nothing"):
        Evaluation.load(tmp_path / "nothing.json")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tasks", [0, 1]),
        ("tasks", [0, 1, -2]),
        ("task_names", ["a", "b", 3]),
        ("n_images", "many"),
        ("n_own", [1, 2]),
        ("table", [[0.5]]),
        ("fpr", [0.1, 0.2, "x"]),
        ("sizes", {"relu1": [1.0]}),
        ("whole", {}),
        ("random", [{}]),
        ("rivals", []),
    ],
)
def test_spoilt_json(result: Evaluation, key: str, value: object, tmp_path) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({**result.to_dict(), key: value}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"was not written by Evaluation\.save"):
        Evaluation.load(path)


@pytest.mark.slow
def test_hdf5(result: Evaluation, cnn: nn.Module, data, tmp_path) -> None:
    path = tmp_path / "results.h5"
    result.save(path)
    assert_equal(Evaluation.load(path), result)
    bare = evaluate(cnn, task_gates(), data, n_random=0)
    bare.save(path, "evaluation_of/other")
    result.whole.save(path, "evaluation_of/whole")
    assert_equal(Evaluation.load(path, "evaluation_of/other"), bare)
    assert_equal(Evaluation.load(path, "evaluation_of/whole"), result.whole)
    assert_equal(Evaluation.load(path), result)
    bare.save(path)  # replaced
    assert_equal(Evaluation.load(path), bare)
    with pytest.raises(GateStoreError):
        Evaluation.load(path, "nothing")
    with pytest.raises(GateStoreError):
        Evaluation.load(tmp_path / "no.h5")


def test_hdf5_of_something_else(tmp_path) -> None:
    from nad_attr.store import write_result

    path = tmp_path / "results.h5"
    write_result(path, "a", {"x": np.zeros(3)}, {"what": "curves"})
    with pytest.raises(GateStoreError, match="holds no evaluation"):
        Evaluation.load(path, "a")
    write_result(path, "a", {"x": np.zeros(3)}, {"what": "evaluation", "format": 99})
    with pytest.raises(GateStoreError, match="format 99"):
        Evaluation.load(path, "a")
    write_result(path, "a", {"x": np.zeros(3)}, {"what": "evaluation", "format": 1})
    with pytest.raises(GateStoreError, match="no whole evaluation"):
        Evaluation.load(path, "a")


def test_frame(result: Evaluation) -> None:
    frame = result.frame()
    assert list(frame.index) == list(TASKS)
    assert frame["flop_size"].tolist() == result.flop_size.tolist()
    assert set(MEASURES) < set(frame.columns)


# ---------------------------------------------------------------------------------------------
# Paired intervals
# ---------------------------------------------------------------------------------------------


def test_paired_interval_sees_what_is_paired() -> None:
    """Tasks differ widely, the difference of two methods hardly."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=50) * 10
    difference = 1 + generator.normal(size=50) * 0.5
    a, b = made(base + difference), made(base)
    low, high = paired_interval(a, b, "fidelity")
    half = 1.96 * 0.5 / math.sqrt(50)
    assert low == pytest.approx(difference.mean() - half, abs=0.05)
    assert high == pytest.approx(difference.mean() + half, abs=0.05)
    reverse = paired_interval(b, a, "fidelity")
    assert reverse == pytest.approx((-high, -low), abs=0.02)
    assert paired_interval(a, a, "fidelity") == (0, 0)
    narrow = paired_interval(a, b, "fidelity", level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert paired_interval(a, b, "fidelity", seed=1) != (low, high)


def test_paired_interval_of_seeds() -> None:
    generator = np.random.default_rng(1)
    n_tasks, n_seeds = 40, 4
    of_task = generator.normal(size=n_tasks)
    table = 2 + of_task + generator.normal(size=(n_seeds, n_tasks))
    pairs = [made(row) for row in table], [made(0 * row) for row in table]
    low, high = paired_interval(*pairs, "fidelity")
    # Of a task's mean: what differs between tasks, and seeds drawn again within each of them.
    within = table.var(0).mean() / n_seeds
    spread = math.sqrt((table.mean(0).var() + within) / n_tasks)
    assert low == pytest.approx(table.mean() - 1.96 * spread, abs=0.06)
    assert high == pytest.approx(table.mean() + 1.96 * spread, abs=0.06)
    # Equal seeds add nothing: the interval of one.
    same = paired_interval([pairs[0][0]] * 3, [pairs[1][0]] * 3, "fidelity", n_draws=20_000)
    alone = paired_interval(pairs[0][0], pairs[1][0], "fidelity", n_draws=20_000)
    assert same == pytest.approx(alone, abs=0.02)


def test_intervals_leave_out_what_is_not_known() -> None:
    known = np.array([1.0, 2.0, 3.0])
    assert bootstrap_interval(np.array([nan, *known])) == bootstrap_interval(known)
    assert all(math.isnan(x) for x in bootstrap_interval(np.array([1.0, nan])))
    assert all(math.isnan(x) for x in bootstrap_interval(np.array([])))
    # The first task is known with one seed only, so that it always has that value.
    table = np.array([[5.0, 1.0], [nan, 1.0]])
    low, high = bootstrap_interval(table)
    assert (low, high) == (1, 5)
    all_drawn = bootstrap_interval(np.array([[5.0, 5.0], [nan, 5.0], [nan, nan]]))
    assert all_drawn == (5, 5)


def test_bad_pairs() -> None:
    a = made([1.0, 2.0])
    with pytest.raises(ValueError, match=r"2 result\(s\) came with 1"):
        paired_interval([a, a], a, "fidelity")
    with pytest.raises(ValueError, match=r"0 result\(s\)"):
        paired_interval([], [], "fidelity")
    with pytest.raises(ValueError, match="different tasks"):
        paired_interval(a, made([1.0, 2.0, 3.0]), "fidelity")
    with pytest.raises(ValueError, match="no measure 'luck'"):
        paired_interval(a, a, "luck")
    with pytest.raises(ValueError, match="level"):
        paired_interval(a, a, "fidelity", level=1.5)
    with pytest.raises(ValueError, match="n_draws"):
        paired_interval(a, a, "fidelity", n_draws=0)
    with pytest.raises(ValueError, match=r"\(seeds, tasks\)"):
        bootstrap_interval(np.zeros((1, 2, 3)))


def test_images_learned_from_stand_beside_held_out_ones() -> None:
    # Output 0 is what channel 0 holds; its noise is larger in the held-out images.
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    noise = torch.randn(200, 2, generator=generator)
    clean = torch.stack([1.0 - labels, labels], dim=1) * 2 - 1
    net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[1.0, -0.3], [-0.3, 1.0]]))
    sites = [GateSite("0", 2, 1)]
    archs = [SubArchitecture.from_kept({"0": [k]}, sites, task=k) for k in (0, 1)]
    here = clean * torch.tensor([1.0, 1.0]) + 2 * noise, labels
    there = clean + 0.1 * noise, labels
    result = evaluate(net, archs, here, learned_from=there, n_random=0)
    alone = evaluate(net, archs, there, n_random=0)
    assert result.learned is not None
    assert np.array_equal(result.learned.own_auc, alone.own_auc)
    (first, *_, last) = result.held_out_sentences()
    assert first.startswith("own AUC is 1.000 on images learned from and 0.")
    assert "other pictures" in last  # the whole network is worse as well
    assert last in result.summary()
    assert "on images learned from" in result.summary()
    assert evaluate(net, archs, there, learned_from=there, n_random=0).held_out_sentences() == []
    few = evaluate(net, archs, (there[0][:50], labels[:50]), learned_from=there, n_random=0)
    assert few.learned is not None
    assert few.learned.n_images == 50
