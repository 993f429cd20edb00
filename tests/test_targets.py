"""Size from a target: the smallest size that keeps the fidelity, on images not learned from."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nad_attr import (
    GateSite,
    GateStore,
    Recipe,
    TaskGates,
    learn_gates,
    learn_sizes,
    learn_to_store,
)
from nad_attr.evaluation import evaluate, fidelity, planted
from nad_attr.evaluation.controls.planted import PlantedCircuit
from nad_attr.learning import session
from nad_attr.learning.targets import APART, PATH, bound, split, target_sizes

RECIPE = Recipe(fidelity=0.9, steps=60, images_per_step=10)


@pytest.fixture(scope="module")
def known() -> PlantedCircuit:
    return planted("plain", n_classes=2, width=16, circuit_width=3, n_images=90)


@pytest.fixture(scope="module")
def gates(known: PlantedCircuit) -> TaskGates:
    return learn_gates(known.model, known.data, recipe=RECIPE)


def test_each_task_gets_the_smallest_size_that_keeps_it(
    known: PlantedCircuit, gates: TaskGates
) -> None:
    assert gates.recipe == RECIPE
    held_out = evaluate(known.model, gates, known.held_out, n_random=0)
    assert (held_out.fidelity >= 0.9).all()
    assert (held_out.size < 0.6).all()  # of which a circuit is 3/16
    assert gates.history is not None
    bounds = gates.history["bound_apart"][-1]
    assert (bounds >= 0.9).all()
    assert (gates.history["fidelity_apart"][-1] >= bounds).all()
    # The next size of the path does not keep it, or is not shown to.
    path = [round(size * gates.n_channels) for size in PATH]
    assert {arch.n_kept for arch in gates.sub_architectures()} <= set(path)


def test_nothing_is_learned_from_images_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "reached", lambda network, found, *rest: found[6])
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(60, 10, generator=generator), torch.arange(60) % 2
    net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(10, 2)).eval()
    net[1].weight.data = torch.randn(2, 10, generator=generator)
    _, apart = split(labels, [0, 1], 0)
    others = x.clone()
    others[apart] = torch.randn(len(apart), 10, generator=generator) ** 3
    sites = [GateSite("0", 10, 1)]
    a, b = (learn_gates(net, (some, labels), recipe=RECIPE, sites=sites) for some in (x, others))
    assert torch.equal(a["0"], b["0"])
    assert torch.equal(a.constants["0"], b.constants["0"])


def test_tasks_have_their_own_sizes_whatever_is_learned_with_them() -> None:
    # Output 0 reads one channel, output 1 the sum of all: it needs nearly all.
    net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(10, 2, bias=False)).eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([torch.eye(10)[0] * 3, torch.ones(10)]))
    x = torch.randn(240, 10, generator=torch.Generator().manual_seed(0))
    data = x, (x[:, 0] > 0).long()
    recipe = Recipe(fidelity=0.95, steps=40, ablation="mean")
    gates = learn_gates(net, data, recipe=recipe, sites=[GateSite("0", 10, 1)])
    first, second = gates.sub_architectures()
    assert first.kept["0"].tolist() == [0]
    assert second.n_kept == 10
    alone = learn_gates(net, data, [1], recipe=recipe, sites=[GateSite("0", 10, 1)])
    assert alone.sub_architecture(1) == second


def test_bound_by_hand() -> None:
    own = torch.tensor([True] * 3 + [False] * 3)
    whole = torch.tensor([1.0, 2.0, 3.0, -1.0, -2.0, -3.0], dtype=torch.float64)
    gated = whole + torch.tensor([0.1, 0.2, 0.0, 0.1, 0.0, 0.3], dtype=torch.float64)
    kept = bound(whole, gated, own, 0.9)
    assert kept.fidelity == pytest.approx(fidelity(whole, gated, own).item())
    e, v = 0.15 / 6, 28 / 6
    errors, spread = (whole - gated).square().numpy(), whole.square().numpy()
    adds = errors / e - spread / v
    variance = adds[:3].var(ddof=1) / 12 + adds[3:].var(ddof=1) / 12
    t = 1.885618083164127  # 90 % of Student's t with two degrees of freedom
    worst = math.log(e / v) + t * math.sqrt(2 * variance)
    assert kept.bound == pytest.approx(1 - math.exp(worst))
    assert bound(whole, whole, own, 0.9) == (1, 1)
    assert bound(torch.ones(6, dtype=torch.float64), gated, own, 0.9).bound == -math.inf


def test_bound_is_violated_by_fresh_images_at_the_stated_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.arange(60) < 30
    missed = 0
    for _ in range(400):
        whole = torch.randn(2, 60, generator=generator, dtype=torch.float64) + 2.0 * own
        noise = torch.randn(2, 60, generator=generator, dtype=torch.float64)
        gated = whole + 0.3 * noise * (1 + whole.abs()) / 2
        limit = bound(whole[0], gated[0], own, 0.9).bound
        missed += int(fidelity(whole[1], gated[1], own).item() < limit)
    assert 0.06 < missed / 400 < 0.14  # of .1, four standard errors of .015 and less


def test_images_are_kept_apart_of_each_class_by_the_seed_alone() -> None:
    labels = torch.tensor([0, 1, 2] * 30)
    rows, apart = split(labels, [0, 1], 0)
    assert sorted([*rows.tolist(), *apart.tolist()]) == list(range(90))
    assert labels[apart].bincount().tolist() == [round(APART * 30)] * 3
    assert torch.equal(apart, split(labels, [2], 0)[1])
    assert not torch.equal(apart, split(labels, [2], 1)[1])
    with pytest.raises(ValueError, match=r"5 images kept apart for task 0.* holds 3"):
        split(torch.tensor([0] * 9 + [1] * 90), [0], 0)


def test_fewer_steps_than_sizes_are_refused(known: PlantedCircuit) -> None:
    with pytest.raises(ValueError, match=r"sizes need at least as many steps, .* has 5; raise"):
        learn_gates(known.model, known.data, recipe=replace(RECIPE, steps=5))


def test_sizes_of_the_path_are_different_numbers_of_channels() -> None:
    assert target_sizes([GateSite("a", 1000, 1)]) == list(PATH)
    few = target_sizes([GateSite("a", 4, 1)])
    assert few[0] == 1
    assert [round(4 * size) or 1 for size in few] == [4, 3, 2, 1]


def test_it_is_kept_in_stores(known: PlantedCircuit, gates: TaskGates, tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    written = learn_to_store(known.model, known.data, path, recipe=RECIPE, chunk_size=1)
    with GateStore.open(path) as store:
        read = store.read()
        assert store.recipe == RECIPE
    assert written is not None
    assert read.sub_architectures() == gates.sub_architectures()
    assert read.history is not None
    assert np.isfinite(read.history["bound_apart"][-1]).all()
    learn_to_store(known.model, known.data, path, recipe=RECIPE, chunk_size=1, resume=True)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fidelity": 0.9, "size": 0.5}, "give one of them"),
        ({"fidelity": 1.0}, "between 0 and 1"),
        ({"fidelity": 0.9, "confidence": 1}, "confidence must lie between"),
        ({"fidelity": "high"}, "fidelity must be a number"),
    ],
)
def test_wrong_settings_are_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(**fields)  # type: ignore[arg-type]


def test_recipes_say_what_they_ask_for(known: PlantedCircuit) -> None:
    assert repr(Recipe(fidelity=0.9)).startswith("Recipe(fidelity=0.9, confidence=0.95, ")
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert Recipe().size == 0.5
    assert (Recipe().steps, Recipe(fidelity=0.5).steps) == (100, 350)
    back = replace(Recipe(fidelity=0.9), fidelity=None, size=0.3)
    assert back.size == 0.3
    with pytest.raises(TypeError, match="fidelity"):
        Recipe.paper("vgg16", fidelity=0.9)
    with pytest.raises(ValueError, match="takes sizes and no fidelity"):
        learn_sizes(known.model, [0.5], known.data, recipe=RECIPE)
