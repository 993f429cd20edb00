"""Whether a network can be divided: methods of equal size, p-values, differences, the figure."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from nad_attr import RunOptions
from nad_attr.evaluation import (
    EnergyScorer,
    TaylorOutputScorer,
    TaylorScorer,
    best_variants,
    evaluate,
    top_k,
)
from nad_attr.evaluation.sweeps.grid import GRID_MEASURES
from nad_attr.evaluation.sweeps.size_sweep import SizeSweep, size_sweep
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.scoring.rankings import as_ranking, random_ranking
from nad_attr.sites.site import GateSite
from tests import helpers

nan = math.nan

SITES = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]


def scores(seed: int, n_tasks: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {s.name: torch.randn(n_tasks, s.n_channels, generator=generator) for s in SITES}


def gates(
    seed: int, *, means: float | None = None, tasks: tuple[int, ...] = (0, 1, 2)
) -> TaskGates:
    logits = scores(seed, len(tasks))
    return TaskGates(
        {name: value.sigmoid() for name, value in logits.items()},
        SITES,
        tasks,
        logits=logits,
        means=None
        if means is None
        else {s.name: torch.full((s.n_channels,), means) for s in SITES},
        task_names=[f"class {task}" for task in tasks],
    )


def measure(methods, **options) -> SizeSweep:
    options = {"sizes": [0.25, 0.5], "n_random": 2, **options}
    return size_sweep(helpers.build(helpers.TinyCNN), methods, helpers.labelled_images(), **options)


def made(n_sizes: int = 1, n_tasks: int = 2, n_random: int = 3, n_methods: int = 2) -> SizeSweep:
    """A result of made-up numbers."""
    generator = np.random.default_rng(0)
    names = tuple(f"method {i}" for i in range(n_methods))
    return SizeSweep(
        tasks=tuple(range(n_tasks)),
        task_names=tuple(map(str, range(n_tasks))),
        n_images=10,
        sizes=np.linspace(0.1, 0.8, n_sizes),
        requested=tuple(np.linspace(0.1, 0.8, n_sizes).tolist()),
        per_site=False,
        ablation="zero",
        methods=names,
        baselines=names[1:],
        measured={
            n: {m: generator.random((n_sizes, n_tasks)) for m in GRID_MEASURES} for n in names
        },
        random={m: generator.random((n_random, n_sizes, n_tasks)) for m in GRID_MEASURES}
        if n_random
        else {},
        whole={m: generator.random(n_tasks) for m in GRID_MEASURES},
    )


# ---------------------------------------------------------------------------------------------
# What is measured
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_site", [False, True])
def test_measures_are_those_of_evaluate(per_site: bool) -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    learned = gates(0)
    result = measure(
        {"nad": learned, "bare": scores(1)}, per_site=per_site, run=RunOptions(memory_limit=1)
    )
    assert result.methods == ("nad", "bare")
    assert result.task_names == ("class 0", "class 1", "class 2")
    like = as_ranking(learned)
    rankings = {"nad": learned.logits, "bare": scores(1)}
    draws = [random_ranking(like, 0, draw).scores[None] for draw in range(2)]
    for i, size in enumerate([0.25, 0.5]):
        for name, ranks in rankings.items():
            archs = top_k(ranks, SITES, [0, 1, 2], size, per_site=per_site)
            expected = evaluate(model, archs, data, n_random=0)
            assert result.sizes[i] == archs[0].size
            for m in GRID_MEASURES:
                np.testing.assert_allclose(result.values(name, m)[i], expected.values(m))
                np.testing.assert_allclose(result.whole[m], expected.whole.values(m))
        for draw, ranks in enumerate(draws):
            archs = top_k(ranks, SITES, [0, 1, 2], size, per_site=per_site)
            expected = evaluate(model, archs, data, n_random=0)
            for m in GRID_MEASURES:
                np.testing.assert_allclose(result.random[m][draw, i], expected.values(m))


def test_scores_are_closed_as_the_gates_are() -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    means = {s.name: torch.full((s.n_channels,), 0.5) for s in SITES}
    result = measure({"bare": scores(1), "nad": gates(0, means=0.5)}, sizes=[0.5])
    archs = top_k(scores(1), SITES, [0, 1, 2], 0.5, means=means)
    expected = evaluate(model, archs, data, n_random=0)
    np.testing.assert_allclose(result.values("bare", "fidelity")[0], expected.fidelity)
    assert result.ablation == "mean"
    zero = measure({"bare": scores(1), "nad": gates(0, means=0.5)}, sizes=[0.5], ablation="zero")
    archs = top_k(scores(1), SITES, [0, 1, 2], 0.5)
    expected = evaluate(model, archs, data, n_random=0)
    np.testing.assert_allclose(zero.values("bare", "fidelity")[0], expected.fidelity)
    with pytest.raises(ValueError, match="say ablation="):
        measure({"a": gates(0), "b": gates(0, means=0.5)})


def test_scorers_and_standard_baselines() -> None:
    train = helpers.labelled_images(24, seed=3)
    model = helpers.build(helpers.TinyCNN)
    result = measure({"nad": gates(0)}, train_data=train)
    assert result.methods == ("nad", "energy", "Taylor", "NeuronMCT")
    assert result.baselines == ("energy", "Taylor", "NeuronMCT")
    by_hand = TaylorScorer(model, SITES)(*train)
    same = measure({"nad": gates(0), "mine": by_hand})
    assert same.baselines == ()
    for m in GRID_MEASURES:
        np.testing.assert_allclose(result.values("Taylor", m), same.values("mine", m))
    own = measure(
        {"t": TaylorScorer(model, SITES)},
        train_data=torch.utils.data.TensorDataset(*train),
        baselines={},
        sites=SITES,
        tasks=[0, 1, 2],
    )
    np.testing.assert_allclose(own.values("t", "own_auc"), result.values("Taylor", "own_auc"))


def test_gates_for_each_size_and_some_tasks() -> None:
    by_size = {0.25: gates(0), 0.5: gates(1)}
    result = measure({"swept": by_size, "one": gates(0), "other": gates(1)}, tasks=[2, 0])
    assert result.tasks == (2, 0)
    swept = result.values("swept", "fidelity")
    np.testing.assert_array_equal(swept[0], result.values("one", "fidelity")[0])
    np.testing.assert_array_equal(swept[1], result.values("other", "fidelity")[1])
    whole = measure({"one": gates(0)})
    np.testing.assert_allclose(
        result.values("one", "fidelity"), whole.values("one", "fidelity")[:, [2, 0]]
    )
    # A task's random channels are its own, whatever other tasks there are.
    np.testing.assert_allclose(result.random["fidelity"], whole.random["fidelity"][..., [2, 0]])


def test_rivals_at_their_best() -> None:
    model, train = helpers.build(helpers.TinyCNN), helpers.labelled_images(24, seed=3)
    variants = best_variants(TaylorScorer(model, SITES), train, train, [2, 0, 1], sizes=[0.25, 0.5])
    variants[0.25] = replace(variants[0.25], per_site=True)
    variants[0.5] = replace(variants[0.5], per_site=False)
    found = measure({"nad": gates(0), "best": variants})
    for i, size in enumerate([0.25, 0.5]):
        archs = sorted(variants[size].architectures(), key=lambda arch: arch.task)
        expected = evaluate(model, archs, helpers.labelled_images(), n_random=0)
        np.testing.assert_allclose(found.values("best", "fidelity")[i], expected.fidelity)
    with pytest.raises(ValueError, match=r"'best'.*not for 0\.1"):
        measure({"nad": gates(0), "best": variants}, sizes=[0.1])
    with pytest.raises(TypeError, match="for all sizes"):
        measure({"nad": gates(0), "best": {**variants, 0.1: gates(0)}})


def test_batch_size_seed_and_model() -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    options = {"sizes": [0.25, 0.5], "n_random": 2}
    with helpers.assert_model_untouched(model, *data):
        first = size_sweep(model, {"nad": gates(0)}, data, train_data=data, **options)
    second = size_sweep(
        model,
        {"nad": gates(0)},
        data,
        train_data=data,
        run=RunOptions(batch_size=5, memory_limit=1),
        **options,
    )
    other = size_sweep(model, {"nad": gates(0)}, data, seed=1, **options)
    for m in GRID_MEASURES:
        np.testing.assert_allclose(first.random[m], second.random[m], atol=1e-6)
        for name in first.methods:
            np.testing.assert_allclose(first.values(name, m), second.values(name, m), atol=1e-6)
    assert not np.array_equal(first.random["fidelity"], other.random["fidelity"])


def test_perfect_division_is_seen() -> None:
    """Two halves of a network that do not touch: half of the channels is all a task needs."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.site = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            y = self.site(x)
            return torch.stack([y[:, :2].sum(1), y[:, 2:].sum(1)], dim=1)

    levels = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
    images = torch.cat(
        [levels + torch.tensor([3.0, 3, 0, 0]), levels + torch.tensor([0, 0, 3.0, 3])]
    )
    labels = torch.arange(2).repeat_interleave(16)
    site = [GateSite("site", 4, 1)]
    right = torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1]])
    result = size_sweep(
        Halves().eval(),
        {"right": {"site": right}, "wrong": {"site": 1 - right}},
        (images, labels),
        sites=site,
        tasks=[0, 1],
        sizes=[0.5],
        n_random=0,
    )
    assert result.mean("right", "own_auc") == result.mean("right", "fidelity") == 1
    assert result.mean("right", "other_auc") == 0.5
    assert result.mean("right", "disentanglement") == 0.5
    assert result.mean("wrong", "own_auc") == 0.5
    assert result.mean("wrong", "other_auc") == 1
    assert result.whole["disentanglement"].tolist() == [0, 0]
    mean, low, high = result.difference("right", "wrong", "own_auc")
    assert mean == low == high == 0.5
    assert np.isnan(result.p_value("right", "own_auc")).all()


# ---------------------------------------------------------------------------------------------
# p-values, differences, tables
# ---------------------------------------------------------------------------------------------


def with_random(observed: list[float], draws: list[list[float]], measure: str) -> SizeSweep:
    """One method and one size; per draw one value for each task."""
    result = made(n_tasks=len(observed), n_random=len(draws))
    random = {m: np.array(draws)[:, None] if m == measure else v for m, v in result.random.items()}
    values = dict(result.measured["method 0"]) | {measure: np.array([observed])}
    return replace(result, random=random, measured={**result.measured, "method 0": values})


def test_p_values_by_hand() -> None:
    # Means of the draws: .5, .75, .8; observed .75.
    draws = [[0.5, 0.5], [0.9, 0.6], [0.7, 0.9]]
    result = with_random([0.8, 0.7], draws, "own_auc")
    assert result.p_value("method 0", "own_auc").tolist() == [3 / 4]
    assert result.p_value("method 0", "own_auc", per_task=True).tolist() == [[2 / 4, 2 / 4]]
    assert result.mean("random", "own_auc") == pytest.approx((0.5 + 0.75 + 0.8) / 3)
    low = with_random([0.1, 0.2], [[0.1, 0.2], [0.3, 0.1], [0.0, 0.0]], "fpr")
    # Less is better: the first draw is equal, the second is worse, the third is better.
    assert low.p_value("method 0", "fpr").tolist() == [3 / 4]
    best = with_random([1.0, 1.0], draws, "own_auc")
    assert best.p_value("method 0", "own_auc").tolist() == [1 / 4]


def test_p_value_is_nan_where_nothing_is_known() -> None:
    result = with_random([nan, 0.7], [[nan, 0.5], [nan, 0.9]], "own_auc")
    assert result.p_value("method 0", "own_auc").tolist() == [2 / 3]
    found = result.p_value("method 0", "own_auc", per_task=True)
    np.testing.assert_array_equal(found, [[nan, 2 / 3]])
    assert np.isnan(made(n_random=0).p_value("method 0", "own_auc")).all()


def test_p_values_of_random_channels_are_uniform() -> None:
    """Among ten exchangeable values, each rank is as likely as any other: mean p = 11 / 20."""
    generator = np.random.default_rng(0)
    found = []
    for _ in range(400):
        values = generator.random((10, 3))
        result = with_random(values[0].tolist(), values[1:].tolist(), "fidelity")
        found += result.p_value("method 0", "fidelity").tolist()
    counts = np.bincount(np.round(10 * np.array(found)).astype(int), minlength=11)[1:]
    assert counts.sum() == 400
    assert (np.abs(counts - 40) < 4 * math.sqrt(400 * 0.1 * 0.9)).all()


def test_difference_is_paired() -> None:
    result = made(n_tasks=5)
    base = result.measured["method 0"]["own_auc"]
    better = {**result.measured["method 1"], "own_auc": base + 0.1}
    result = replace(result, measured={**result.measured, "method 1": better})
    mean, low, high = result.difference("method 1", "method 0", "own_auc")
    for value in (mean, low, high):
        np.testing.assert_allclose(value, 0.1)
    low, high = result.interval("method 0", "own_auc")
    assert low < result.mean("method 0", "own_auc") < high
    mean, _, _ = result.difference("method 0", "random", "own_auc")
    np.testing.assert_allclose(mean, base.mean() - result.random["own_auc"].mean())


def test_frame() -> None:
    pytest.importorskip("pandas")
    result = made(n_sizes=3, n_tasks=2, n_random=4)
    frame = result.frame()
    assert len(frame) == (2 + 4) * 3 * 2 + 2
    part = frame[(frame.method == "method 1") & (frame.task == 1)]
    np.testing.assert_array_equal(part["size"], result.sizes)
    np.testing.assert_array_equal(part.fpr, result.values("method 1", "fpr")[:, 1])
    draw = frame[(frame.method == "random") & (frame.draw == 2) & (frame.task == 0)]
    np.testing.assert_array_equal(draw.ba, result.random["ba"][2, :, 0])
    whole = frame[frame.method == "whole network"]
    np.testing.assert_array_equal(whole.recall, result.whole["recall"])
    assert whole["size"].tolist() == [1, 1]


def test_dictionary_and_json(tmp_path) -> None:
    result = made(n_sizes=2)
    result.measured["method 0"]["fpr"][0, 0] = nan
    result.save(tmp_path / "whether.json")
    read = json.loads((tmp_path / "whether.json").read_text())
    assert read == result.to_dict()
    assert read["measured"]["method 0"]["fpr"][0][0] is None
    assert read["means"]["method 1"]["ba"]["p"] == result.p_value("method 1", "ba").tolist()
    assert np.array(read["random"]["ba"]).shape == (3, 2, 2)


def test_summary_shows_recall_beside_what_it_needs() -> None:
    result = made(n_sizes=2)
    text = result.summary([0.8])
    header = next(line for line in text.splitlines() if line.startswith("size"))
    for column in ("recall", "FPR", "own AUC", "p"):
        assert column in header
    rows = [line.split("  ")[0] for line in text.splitlines()]
    assert rows.count("method 0") == rows.count("random") == rows.count("whole network") == 1
    assert result.summary().count("whole network") == 2
    with pytest.raises(ValueError, match=r"0\.3 was not measured"):
        result.summary([0.3])


# ---------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "change", "error", "match"),
    [
        ({}, {}, ValueError, "methods is empty"),
        ([1], {}, TypeError, "methods"),
        ({"a": scores(0)}, {}, ValueError, "sites= and tasks="),
        ({"random": gates(0)}, {}, ValueError, "cannot be called 'random'"),
        ({"a": gates(0)}, {"n_random": -1}, ValueError, "n_random"),
        ({"a": gates(0)}, {"sizes": [2]}, ValueError, "sizes"),
        ({"a": gates(0)}, {"baselines": {"a": gates(1)}}, ValueError, "same name"),
        ({"a": gates(0), "b": scores(0, 2)}, {}, ValueError, "'b'.*shape"),
        ({"a": gates(0), "b": gates(0, tasks=(0, 1))}, {}, ValueError, r"'b'.*task 2"),
        ({"a": gates(0)}, {"tasks": [0, 7]}, ValueError, r"'a'.*task 7"),
        ({"a": {0.25: gates(0)}}, {}, ValueError, r"'a'.*not for 0\.5"),
        ({"a": gates(0)}, {"ablation": "noise"}, ValueError, "train_data="),
        ({"a": gates(0), "b": 3}, {}, TypeError, "'b'"),
    ],
)
def test_bad_input(methods, change, error, match: str) -> None:
    with pytest.raises(error, match=match):
        measure(methods, **change)


def test_scorer_without_images() -> None:
    scorer = TaylorScorer(helpers.build(helpers.TinyCNN), SITES)
    with pytest.raises(ValueError, match="'t' is a scorer"):
        measure({"t": scorer}, sites=SITES, tasks=[0])


def test_unknown_names() -> None:
    result = made()
    with pytest.raises(ValueError, match="no method 'x'; there are method 0, method 1, random"):
        result.values("x", "ba")
    with pytest.raises(ValueError, match="no measure 'auc'"):
        result.mean("method 0", "auc")
    with pytest.raises(ValueError, match="no measure 'auc'"):
        result.plot(["auc"])


def test_other_sites_are_refused() -> None:
    other = SubArchitecture.full([GateSite("relu1", 6, 1)])
    few = TaskGates({"relu1": torch.ones(1, 6)}, other.sites, [0])
    with pytest.raises(ValueError, match=r"'b'.*sites"):
        measure({"a": gates(0), "b": few})


# ---------------------------------------------------------------------------------------------
# Training images
# ---------------------------------------------------------------------------------------------


class Loaded(torch.utils.data.Dataset):
    """Images that are made when they are asked for, and differ with each draw of a transform."""

    def __init__(self, n: int, *, random: bool = False) -> None:
        self.targets, self.random, self.asked = [i % 3 for i in range(n)], random, []
        self.images, _ = helpers.labelled_images(n)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        self.asked.append(i)
        image = self.images[i]
        return (image + torch.rand(()) if self.random else image), self.targets[i]


class Largest(TorchDispatchMode):
    """The largest tensor that was made."""

    n_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, Tensor) and not item._is_view():
                self.n_bytes = max(self.n_bytes, item.numel() * item.element_size())
        return result


def test_training_images_are_loaded_a_batch_at_a_time() -> None:
    cnn = helpers.build(helpers.TinyCNN)
    sites = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
    train, held_out = Loaded(600), helpers.labelled_images(12)
    methods = {"energy": EnergyScorer(cnn, sites)}
    options = {"baselines": {}, "sites": sites, "tasks": [0, 1, 2], "n_random": 0, "sizes": [0.5]}
    with Largest() as largest:
        found = size_sweep(
            cnn, methods, held_out, train_data=train, run=RunOptions(batch_size=4), **options
        )
    assert sorted(train.asked) == [0, *range(600)]  # the first one asks what batches it takes
    assert largest.n_bytes < train.images.numel() * train.images.element_size() / 8
    tensors = train.images, torch.tensor(train.targets)
    again = size_sweep(
        cnn, methods, held_out, train_data=tensors, run=RunOptions(batch_size=4), **options
    )
    for measure in found.measures:
        np.testing.assert_array_equal(
            found.values("energy", measure), again.values("energy", measure)
        )


def test_scorers_take_data_and_load_each_image_once() -> None:
    cnn = helpers.build(helpers.TinyCNN)
    scorer = TaylorOutputScorer(cnn, [GateSite("relu1", 6, 1)])
    for random in (False, True):
        train = Loaded(20, random=random)
        found = scorer(train, tasks=[0, 1, 2], include_others=True, run=RunOptions(batch_size=6))
        # Three tasks look at every image; those that a batch's end parts are loaded twice.
        assert len(train.asked) <= 20 + 60 / 6
        again = scorer(train, tasks=[0, 1, 2], include_others=True, run=RunOptions(batch_size=60))
        torch.testing.assert_close(found["relu1"], again["relu1"])
        if not random:
            tensors = scorer(
                train.images, torch.tensor(train.targets), tasks=[0, 1, 2], include_others=True
            )
            torch.testing.assert_close(found["relu1"], tensors["relu1"])
