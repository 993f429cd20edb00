"""Constants in place of closed channels: the model, learning them with gates, and fitting them."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import (
    GateSite,
    GateStore,
    GateStoreError,
    Recipe,
    RunOptions,
    SubArchitecture,
    TaskGates,
    fit_constants,
    gated,
    learn_gates,
)
from nad_attr.evaluation import curves, evaluate, planted, size_sweep, top_k
from nad_attr.evaluation.evaluating import random_architectures
from nad_attr.gating.hooks import frozen
from nad_attr.learning import constants as module
from nad_attr.learning.constants import ConstantModel, noise_share, rooted
from nad_attr.learning.engine import Network, TaskImages
from nad_attr.learning.selection import QuadraticModel
from nad_attr.scoring.given_scorers import shuffled
from nad_attr.store import diff
from tests.helpers import assert_model_untouched


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def small() -> tuple[nn.Module, list[GateSite]]:
    """Two gate sites, curved in between, float64."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(12, 2)),
    ).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = drawn(*parameter.shape, seed=10 + i) / 2
    return net.eval(), [GateSite("1", 4, 1), GateSite("3", 3, 1)]


def test_gradients_for_gates_and_constants_are_those_of_autograd() -> None:
    net, sites = small()
    images, gates, constants = drawn(5, 2, 6, 6), torch.rand(5, 7).double(), drawn(5, 7, seed=1)
    network = Network(net, sites, run=RunOptions(batch_size=2))
    classes = torch.tensor([[0], [1], [0], [1], [0]])
    with frozen(net):
        found = network.output_and_gradients(
            (images,), gates, constants, classes, torch.ones_like(classes).bool()
        )
    leaf, shift = gates.clone().requires_grad_(), torch.zeros_like(gates).requires_grad_()
    x = images
    for layer in range(6):
        x = net[layer](x)
        if layer in (1, 3):
            at = slice(0, 4) if layer == 1 else slice(4, 7)
            gate, constant, added = (v[:, at, None, None] for v in (leaf, constants, shift))
            x = gate * x + (1 - gate) * constant + added
    output = x.gather(1, classes)[:, 0]
    expected = (output, *torch.autograd.grad(output.sum(), (leaf, shift)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-12, atol=1e-12)


def filled(rows: int = 2, m: int = 6, n: int = 5) -> tuple[ConstantModel, Tensor, Tensor]:
    gates = torch.ones(rows, n, dtype=torch.float64)
    gates[:, [0, 3]] = 0.0
    model = ConstantModel(gates, m)
    model.gates = gates
    model.add(drawn(rows, m), drawn(rows, m, n, seed=1), drawn(rows, m, n, seed=2))
    shares = drawn(rows, m, seed=3).abs()
    return model, gates, shares / shares.sum(1, keepdim=True)


def least(model: ConstantModel, row: int, share: Tensor, q: Tensor, closed: list[int], d: float):
    """Constants of closed channels and the loss there, by ordinary ridge regression."""
    slopes = model.slopes[row][:, closed]
    normal = slopes.T @ (share[:, None] * slopes) + torch.eye(len(closed)).double() / d
    b = -torch.linalg.solve(normal, slopes.T @ (share * q))
    return b, float((share * (q + slopes @ b).square()).sum() + b.square().sum() / d)


def test_the_metric_leaves_what_no_constant_explains() -> None:
    model, _, shares = filled()
    freedom = torch.tensor([0.7, 3.0]).double()
    metric = model.metric(shares, freedom)
    part = model.quadratic(metric, model.residuals, trust=0.0, shrink=0.0)
    for row in range(2):
        d = float(freedom[row])
        _, expected = least(model, row, shares[row], model.residuals[row], [0, 3], d)
        assert float(part.residuals[row].square().sum()) == pytest.approx(expected, rel=1e-10)
        # Opening a closed channel: its constant has hardly any effect.
        after = model.residuals[row] + model.effects[row, :, 0]
        _, opened = least(model, row, shares[row], after, [0, 3], d)
        predicted = expected + float(part.cost(opening=True)[row, 0])
        assert predicted == pytest.approx(opened, rel=1e-10)
        # Closing a channel: its own constant cancels part of its effect.
        effect = model.effects[row, :, 1]
        own, _ = least(model, row, shares[row], -effect, [0, 3, 1], d)
        left = -effect + own[2] * model.slopes[row, :, 1]
        _, alone = least(model, row, shares[row], left, [0, 3], d)
        assert float(part._square[row, 1]) == pytest.approx(alone, rel=1e-10)


def test_probes_see_what_the_metric_sees() -> None:
    model, _, shares = filled()
    metric = model.metric(shares, torch.tensor([0.7, 3.0]).double())
    seen = metric.probes(20_000) @ model.effects
    expected = metric(model.effects).square().sum(1)
    torch.testing.assert_close(seen.square().sum(1), expected, rtol=0.05, atol=0.0)
    assert torch.equal(metric.probes(4), metric.probes(4))


def test_roots_are_found_though_rounding_says_that_there_are_none() -> None:
    good = torch.tensor([[4.0, 2.0], [2.0, 5.0]])
    spoiled = torch.tensor([[1e6, 1e6 + 0.5], [1e6 + 0.5, 1e6]])  # smaller eigenvalue: -0.5
    both = torch.stack([good, spoiled])
    root = rooted(both)
    torch.testing.assert_close(root[0], torch.tensor([[2.0, 0.0], [1.0, 2.0]]))
    torch.testing.assert_close(root @ root.mT, both, rtol=1e-4, atol=1e-6)
    found = rooted(torch.stack([good, spoiled / 0]))
    assert torch.equal(found[0], root[0])
    assert bool(found[1].isnan().all())


def test_share_of_noise_by_hand() -> None:
    effects = drawn(1, 8, 4) / 8**0.5
    effects[:, :, 3] = 0.0  # a channel that does nothing counts neither way
    unit = effects[0] / effects[0].norm(dim=0).clamp(min=1e-30)
    noise = total = 0.0
    for j in range(3):
        for k in range(3):
            if j != k:
                products = unit[:, j] * unit[:, k]
                total += float(products.sum().square())
                noise += float(products.square().sum() - products.sum().square() / 8)
    found = noise_share(effects, torch.tensor([8.0]))
    assert float(found) == pytest.approx(min(noise / total, 1.0))
    # Channels that rise and fall together for every image leave no doubt.
    signs = torch.tensor([1.0, -1.0] * 50).double()
    sure = signs[None, :, None] * torch.tensor([1.0, -1.0, 2.0]).double() / 10
    assert float(noise_share(sure, torch.tensor([100.0]))) < 0.02


def test_a_charge_that_lasts_is_part_of_every_flip() -> None:
    gates = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0, 1.0]]).double()
    model = QuadraticModel(gates, 1, trust=0.0, shrink=0.4)
    model.gradients, model.residuals = drawn(1, 9, 6), drawn(1, 9, seed=1)
    model.begin(torch.ones(1, 9).double())

    def energy() -> float:
        alone = (model.gradients.square().sum(1) * (1 - model.gates)).sum()
        return float(model.residuals.square().sum() + 0.4 * alone)

    for channel in (0, 2, 4, 0):
        opening = model.gates[0, channel] < 0.5
        predicted, before = float(model.cost(opening=bool(opening))[0, channel]), energy()
        model.flip(torch.tensor([[channel]]))
        assert energy() - before == pytest.approx(predicted)
    assert float(model._loss()) == pytest.approx(energy())


def test_constants_go_to_the_ridge_minimum_unless_they_are_held_back() -> None:
    model, gates, shares = filled()
    freedom, now = torch.tensor([0.7, 3.0]).double(), drawn(2, 5, seed=4) * (1 - gates)
    free = model.best(shares, freedom, model.residuals, now, math.inf)
    for row in range(2):
        args = shares[row], model.residuals[row], [0, 3], float(freedom[row])
        torch.testing.assert_close(free[row, [0, 3]], least(model, row, *args)[0])
    assert torch.equal(free[:, [1, 2, 4]], torch.zeros(2, 3).double())
    still = model.best(shares, freedom, model.residuals, now, 1e-6)
    torch.testing.assert_close(still, now)


def error(net: nn.Module, archs: list[SubArchitecture], images: Tensor) -> list[float]:
    errors = []
    with torch.no_grad():
        for arch in archs:
            with gated(net, arch):
                outputs = net(images)[:, arch.task]
            errors.append(float((outputs - net(images)[:, arch.task]).square().mean()))
    return errors


class Exp(nn.Module):
    """The mean of exp(x) is not exp of the mean of x."""

    def forward(self, x: Tensor) -> Tensor:
        return x.exp()


def test_fitted_constants_keep_the_output_better_than_means_on_other_images() -> None:
    net = nn.Sequential(nn.Identity(), Exp(), nn.Linear(4, 2)).double().eval()
    net[2].weight.data = torch.tensor([[0.5, 1.0, 1.0, 1.0], [2.0, 1.0, 1.0, 1.0]]).double()
    sites = [GateSite("0", 4, 1)]
    images, labels = drawn(400, 4, seed=5), torch.arange(400) % 2
    kept = {"0": [0]}
    archs = [SubArchitecture.from_kept(kept, sites, task=k) for k in (0, 1)]
    recipe = Recipe(steps=30, boundary=0.0, free_scale=0.0)
    with assert_model_untouched(net, images):
        fitted = fit_constants(net, archs, (images[:200], labels[:200]), recipe=recipe)
    assert [a.kept["0"].tolist() for a in fitted] == [[0], [0]]
    means = learn_gates(net, (images[:200], labels[:200]), sites=sites, recipe=recipe).means
    others = images[200:]
    at_means = error(net, [a.with_means(means) for a in archs], others)
    for better, mean in zip(error(net, fitted, others), at_means, strict=True):
        assert better < 0.9 * mean
    again = fit_constants(net, archs[1], (images[:200], labels[:200]), recipe=recipe)
    torch.testing.assert_close(again[0].means, fitted[1].means)  # the same with other tasks


def test_fitting_refuses_what_it_cannot_fit() -> None:
    net, sites = small()
    data = drawn(8, 2, 6, 6), torch.arange(8) % 2
    with pytest.raises(ValueError, match="has no task"):
        fit_constants(net, SubArchitecture.full(sites), data)
    with pytest.raises(TypeError, match="at least one"):
        fit_constants(net, [], data)


@pytest.mark.parametrize("kind", ["plain", "cancelling"])  # the others: tests/test_planted.py
def test_circuits_are_found_with_constants(kind: str) -> None:
    known = planted(kind, n_classes=2, width=32)
    recipe = Recipe(size=known.size, ablation="optimal", steps=40, images_per_step=10)
    gates = learn_gates(known.model, known.data, recipe=recipe, sites=known.sites)
    assert known.score(gates).mean("recall") == 1.0


def test_constants_are_stored_appended_and_compared(tmp_path: Path) -> None:
    _, sites = small()
    values = {"1": drawn(3, 4).float(), "3": drawn(3, 3, seed=1).float()}
    masks = {name: (value > 0).float() for name, value in values.items()}
    means = {"1": torch.zeros(4), "3": torch.zeros(3)}
    gates = TaskGates(masks, sites, [0, 1, 2], means=means, constants=values)
    gates.save(tmp_path / "a.h5")
    back = TaskGates.load(tmp_path / "a.h5")
    assert all(torch.equal(back.constants[name], value) for name, value in values.items())
    with GateStore.create(tmp_path / "b.h5", sites) as store:
        store.append(gates.select([0, 1]))
        with pytest.raises(GateStoreError, match="constants"):
            store.append(TaskGates({n: m[2:] for n, m in masks.items()}, sites, [2], means=means))
    with GateStore.open(tmp_path / "b.h5", "a") as store:
        store.append(gates.select([2]))
        for name, value in store.read([2, 0]).constants.items():
            assert torch.equal(value, values[name][[2, 0]])
    with GateStore.open(tmp_path / "b.h5") as store:
        assert torch.equal(store.read().constants["3"], values["3"])
    values["3"][1, 0] += 1
    TaskGates(masks, sites, [0, 1, 2], means=means, constants=values).save(tmp_path / "c.h5")
    assert diff(tmp_path / "a.h5", tmp_path / "c.h5").settings == ("constants of 1 tasks: 1",)


def test_each_task_has_constants_of_its_own() -> None:
    net, sites = small()
    images = drawn(60, 2, 6, 6, seed=5)
    data = images, net(images).argmax(1)
    recipe = Recipe(size=0.5, ablation="optimal", steps=20)
    gates = learn_gates(net, data, recipe=recipe, sites=sites)
    assert gates.constants is not None
    assert "best constants" in repr(gates)
    first, second = gates.sub_architectures()
    for site in sites:
        assert torch.equal(first.means[site.name], gates.constants[site.name][0])
        # An open channel has none: should it be closed later, it is closed at its mean.
        open_ = first[site.name]
        torch.testing.assert_close(first.means[site.name][open_], gates.means[site.name][open_])
    assert not torch.equal(first.means["3"], second.means["3"])
    with torch.no_grad():
        with gated(net, gates, tasks=[1, 0]):
            mixed = net(images[:2])
        for row, task in ((0, 1), (1, 0)):
            with gated(net, gates, tasks=task):
                torch.testing.assert_close(net(images[row : row + 1])[0], mixed[row])
    assert torch.equal(gates.select([1]).constants["1"][0], gates.constants["1"][1])
    alone = learn_gates(net, data, tasks=[1], recipe=recipe, sites=sites)
    torch.testing.assert_close(alone.constants["1"][0], gates.constants["1"][1])
    with pytest.raises(ValueError, match="not finite"):
        TaskGates({"1": torch.ones(1, 4)}, sites[:1], [0], constants={"1": torch.ones(1, 4) / 0})


def test_rankings_sweeps_and_curves_use_each_tasks_own_constants() -> None:
    net, sites = small()
    images = drawn(80, 2, 6, 6, seed=5)
    labels = net(images).argmax(1)
    train, held_out = (images[:40], labels[:40]), (images[40:], labels[40:])
    recipe = Recipe(size=4 / 7, ablation="optimal", steps=10, images_per_step=8)
    gates = learn_gates(net, train, recipe=recipe, sites=sites)
    expected = evaluate(net, gates, held_out, n_random=1)
    found = curves(net, gates, held_out, sizes=[4 / 7])
    assert found.ablation == "optimal"
    np.testing.assert_allclose(found.keep["fidelity"][:, 0], expected.fidelity)
    # Random channels are at the means, not at constants that were fitted to others.
    random = random_architectures(gates.sub_architectures(), seed=0, draw=0)
    at_means = [arch.with_means(gates.means) for arch in random]
    by_hand = evaluate(net, at_means, held_out, n_random=0)
    np.testing.assert_allclose(expected.random[0].fidelity, by_hand.fidelity)

    scores = {s.name: drawn(2, s.n_channels, seed=7) for s in sites}
    options = {"sizes": [4 / 7], "n_random": 0, "baselines": {}}
    with pytest.warns(UserWarning, match="favours"):
        size_sweep(net, {"gates": gates, "scores": scores}, held_out, **options)
    with pytest.raises(ValueError, match="train_data"):
        curves(net, gates, held_out, sizes=[0.5], ablation="optimal")
    swept = size_sweep(
        net, {"gates": gates, "scores": scores}, held_out, train_data=train, ablation="optimal",
        **options,
    )  # fmt: skip
    assert swept.ablation == "optimal"
    # Gates keep what they were learned with, and scores get theirs, by the same recipe.
    np.testing.assert_allclose(swept.measured["gates"]["fidelity"][0], expected.fidelity)
    archs = fit_constants(net, top_k(scores, sites, gates.tasks, 4 / 7), train, recipe=recipe)
    by_hand = evaluate(net, archs, held_out, n_random=0)
    np.testing.assert_allclose(swept.measured["scores"]["fidelity"][0], by_hand.fidelity)
    # What is removed gets constants of its own as well.
    both = curves(net, gates, held_out, sizes=[4 / 7], ablation="optimal", train_data=train)
    removed = fit_constants(net, [~a for a in gates.sub_architectures()], train, recipe=recipe)
    by_hand = evaluate(net, removed, held_out, n_random=0)
    np.testing.assert_allclose(both.ablate["fidelity"][:, 0], by_hand.fidelity)
    np.testing.assert_allclose(both.keep["fidelity"][:, 0], expected.fidelity)


def test_what_stands_in_place_is_said(tmp_path: Path) -> None:
    net, sites = small()
    data = drawn(20, 2, 6, 6), torch.arange(20) % 2
    arch = SubArchitecture.from_kept({"1": [0]}, sites, task=1)
    (fitted,) = fit_constants(net, arch, data, recipe=Recipe(steps=5))
    said = "at constants of their own, fitted on 20 images"
    assert f"closed channels {said}" in repr(fitted)
    assert said in repr(~fitted)
    assert "at their mean" in repr(fitted.with_means(fitted.means))
    fitted.save(tmp_path / "a.h5")
    back = SubArchitecture.load(tmp_path / "a.h5")
    assert back.own_constants
    assert back.closed_at == said
    # Wherever it is measured.
    at_mean = [arch.with_means(fitted.means)]
    alone, beside = (
        evaluate(net, [fitted], data, n_random=0, rivals=rivals)
        for rivals in (None, {"mean": at_mean})
    )
    assert alone.closed == said
    assert f"\nclosed channels: {said}" in alone.summary()
    assert json.loads(json.dumps(beside.to_dict()))["closed"] == said
    assert beside.rivals["mean"].closed == "at their mean"
    assert (
        f"channels, sub-architectures: {said}\nclosed channels, mean: at their" in beside.summary()
    )
    assert evaluate(net, [fitted], data, n_random=0, ablation="zero").closed == "zero"
    gates = learn_gates(net, data, recipe=Recipe(size=0.5, steps=5), sites=sites)
    assert gates.closed_at == "at their best constants, fitted on 20 images"
    measured = (
        curves(net, gates, data, sizes=[0.5]),
        size_sweep(net, {"nad": gates}, data, sizes=[0.5], n_random=0),
    )
    at_means = curves(net, gates, data, sizes=[0.5], ablation="mean", train_data=data)
    for result in measured:
        assert result.fitted_on == result.to_dict()["fitted_on"] == 20
        assert "channels: optimal, fitted on 20 images" in result.summary()
    assert at_means.fitted_on is None
    assert "channels: mean\n" in at_means.summary()
    assert "zero" in repr(SubArchitecture({n: fitted[n] for n in fitted}, sites))


def test_constants_are_no_worse_than_means_on_other_images(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each image has slopes of its own, so that a few images can be fitted by chance.
    net = nn.Sequential(nn.Identity(), nn.Linear(40, 60), nn.Tanh(), nn.Linear(60, 2)).double()
    for i in (1, 3):
        net[i].weight.data = drawn(*net[i].weight.shape, seed=i) / 4
        net[i].bias.data.zero_()  # odd: the best constants are the means
    sites = [GateSite("0", 40, 1)]
    every = drawn(2000, 40, seed=5)
    arch = SubArchitecture.from_kept({"0": range(10)}, sites, task=1)
    net.eval()
    guarded = {name: getattr(module, name) for name in ("DOUBT", "DOUBT_WHERE_FEW", "SHARES_TRIED")}
    blind = {"DOUBT": -1e9, "DOUBT_WHERE_FEW": -1e9, "SHARES_TRIED": (1.0,)}
    worse, recipe = [], Recipe(steps=40, images_per_step=10)
    for n in (12, 40, 400):
        labels = torch.randint(2, (n,), generator=torch.Generator().manual_seed(n))
        found = []
        for values in (guarded, blind):
            for name, value in values.items():
                monkeypatch.setattr(module, name, value)
            (fitted,) = fit_constants(net, arch, (every[:n], labels), recipe=recipe)
            found += error(net, [fitted], every[1000:])
        (at_these,) = error(net, [arch.with_means({"0": every[:n].mean(0)})], every[1000:])
        assert found[0] <= 1.03 * at_these
        worse.append(found[1] / at_these)
    # Without the guard a dozen images are fitted by chance; 400 are no longer.
    assert worse[0] > 1.1 > 1.02 > worse[2]


def waves(width: int, n: int, seed: int = 2) -> tuple[nn.Module, list[GateSite], Any]:
    """A network of steep waves over independent inputs, of which few images say little."""
    net = nn.Sequential(nn.Identity(), nn.Linear(width, 60), nn.Tanh(), nn.Linear(60, 2)).eval()
    for i in (1, 3):
        weight = net[i].weight
        weight.data = 3 * drawn(*weight.shape, seed=i).float() / weight.shape[1] ** 0.5
        net[i].bias.data.zero_()
    return net, [GateSite("0", width, 1)], (drawn(n, width, seed=seed).float(), torch.arange(n) % 2)


def test_users_are_warned_where_learned_and_kept_apart_images_part() -> None:
    net, sites, data = waves(300, 120)
    recipe = Recipe(size=0.3, steps=40, images_per_step=10)
    with pytest.warns(UserWarning, match="does not hold on other images") as seen:
        gates = learn_gates(net, data, {"a": 0, "b": 1}, recipe, sites)
    (text,) = (str(w.message) for w in seen)
    assert "more pictures of each class (60 were learned from), or a larger size" in text
    # The reported number is close to that on fresh images.
    told = gates.history["fidelity_apart"][-1]
    assert f"{told.min():.3f} on images kept apart" in text
    fresh = drawn(2000, 300, seed=3).float(), torch.arange(2000) % 2
    measured, learned = (
        evaluate(net, gates, d, n_random=0).mean("fidelity") for d in (fresh, data)
    )
    assert learned > measured + 0.2
    assert abs(told.mean() - measured) < abs(told.mean() - learned)


def test_users_are_warned_of_more_constants_than_images_where_none_can_be_kept_apart() -> None:
    net, sites, data = waves(100, 60)
    with pytest.warns(UserWarning, match="nothing checked") as seen:
        learn_gates(net, data, {"a": 0, "b": 1}, Recipe(size=0.3, steps=8), sites)
    (text,) = (str(w.message) for w in seen)
    assert "'a' has 30 own and 30 other images; 'b' has 30 own and 30 other images, too" in text
    assert "and 70 constants were learned from them" in text
    assert "learned_from=" in text


def test_users_are_not_warned_where_they_agree(recwarn: pytest.WarningsRecorder) -> None:
    net, sites, data = waves(12, 600)
    recipe = Recipe(size=0.7, steps=40, images_per_step=10)
    learn_gates(net, data, recipe=recipe, sites=sites)
    # Nine images of a kind can spare none, and nothing is known.
    few = learn_gates(net, tuple(x[:18] for x in data), recipe=recipe, sites=sites)
    assert np.isnan(few.history["fidelity_apart"]).all()
    assert not recwarn.list


def test_settings_follow_the_ablation_wherever_it_is_changed() -> None:
    names = ("free_scale", "boundary")

    def settings(recipe: Recipe) -> tuple[float, ...]:
        return tuple(recipe.fitting(name) for name in names)

    at_mean = Recipe(ablation="mean")
    assert settings(Recipe()) == (0.0, 0.0)
    assert settings(at_mean) == settings(Recipe(ablation="zero")) == (0.3, 0.9)
    assert replace(Recipe(), ablation="mean") == at_mean
    assert replace(at_mean, ablation="optimal") == Recipe()
    # Files keep the given settings.
    assert settings(replace(Recipe.from_json(Recipe().to_json()), ablation="mean")) == (0.3, 0.9)
    asked = Recipe(free_scale=0.2, boundary=0.0)
    assert settings(replace(asked, ablation="mean")) == settings(asked) == (0.2, 0.0)
    net, sites = small()
    data = drawn(12, 2, 6, 6), torch.arange(12) % 2
    for ablation in ("mean", "optimal"):
        left_out = Recipe(ablation=ablation, steps=8, images_per_step=4)
        free_scale, boundary = settings(left_out)
        in_full = replace(left_out, free_scale=free_scale, boundary=boundary)
        a, b = (learn_gates(net, data, sites=sites, recipe=r) for r in (left_out, in_full))
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_images_kept_apart_are_not_learned_from() -> None:
    labels = torch.arange(300) % 3
    images = TaskImages(labels, 1, seed=4)
    draws, apart = images.keep_apart(0.2, most=32, least=50)
    assert apart
    assert [len(kind) for kind in draws] == [20, 20]
    kept = {i for kind in draws for i, _ in kind}
    assert {int(labels[i]) for i, _ in draws[0]} == {1} != {int(labels[i]) for i, _ in draws[1]}
    learned = {i for kind in ("own", "other") for i, _ in images.take(kind, 500)}
    assert not kept & learned
    assert len(kept | learned) == 300
    again, _ = TaskImages(labels, 1, seed=4).keep_apart(0.2, most=32, least=50)
    assert again == draws
    few = TaskImages(labels[:90], 1, seed=4)
    draws, apart = few.keep_apart(0.2, most=32, least=50)
    assert not apart
    assert [len(kind) for kind in draws] == [30, 30]
    assert {i for i, _ in few.take("own", 30)} == {i for i, _ in draws[0]}


def test_slices_and_merges_keep_constants(tmp_path: Path) -> None:
    _, sites = small()
    values = {"1": drawn(3, 4).float(), "3": drawn(3, 3, seed=1).float()}
    masks = {name: (value > 0).float() for name, value in values.items()}
    means = {"1": torch.zeros(4), "3": torch.zeros(3)}
    gates = TaskGates(masks, sites, [0, 1, 2], means=means, constants=values)
    gates.save(tmp_path / "all.h5")
    with GateStore.open(tmp_path / "all.h5") as store:
        store.slice([2, 0], tmp_path / "two.h5")
        store.slice([1], tmp_path / "one.h5")
    assert TaskGates.load(tmp_path / "two.h5") == gates.select([2, 0])
    GateStore.merge([tmp_path / "two.h5", tmp_path / "one.h5"], tmp_path / "merged.h5")
    assert TaskGates.load(tmp_path / "merged.h5").select([0, 1, 2]) == gates
    values["1"][0, 0] += 1
    other = TaskGates(masks, sites, [0, 1, 2], means=means, constants=values)
    assert other != gates
    other.save(tmp_path / "other.h5")
    with pytest.raises(GateStoreError, match="task 0"):
        GateStore.merge([tmp_path / "two.h5", tmp_path / "other.h5"], tmp_path / "m.h5")
    plain = TaskGates(masks, sites, [0, 1, 2], means=means).select([1])
    plain.save(tmp_path / "plain.h5")
    with pytest.raises(GateStoreError, match="constants"):
        GateStore.merge([tmp_path / "two.h5", tmp_path / "plain.h5"], tmp_path / "m.h5")
    assert shuffled(gates).closed_at == "at their mean"


def test_a_single_image_leaves_constants_at_the_means() -> None:
    net, sites = small()
    data = drawn(2, 2, 6, 6), torch.tensor([0, 1])
    arch = SubArchitecture.from_kept({"1": [0]}, sites, task=1)
    (fitted,) = fit_constants(net, arch, data, recipe=Recipe(steps=4, images_per_step=4))
    means = learn_gates(net, data, sites=sites, recipe=Recipe(steps=2)).means
    for name, mean in means.items():
        torch.testing.assert_close(fitted.means[name], mean)
