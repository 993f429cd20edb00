"""How sure is a channel, and is it needed: on networks whose channels are known, and by hand."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn

import nad_attr
from nad_attr import (
    ChannelCertainty,
    GateSite,
    Recipe,
    RunOptions,
    SubArchitecture,
    TaskGates,
    learn_gates,
)
from nad_attr.certainty import exact_interval, false_selections
from nad_attr.certainty.bounds import _tail
from nad_attr.certainty.closing import compared
from nad_attr.certainty.measuring import halved
from nad_attr.certainty.testing import LABELS
from nad_attr.evaluation import PlantedCircuit, planted
from nad_attr.learning.engine import Replica
from nad_attr.learning.session import Session
from tests.helpers import assert_model_untouched

RUN = RunOptions(batch_size=800)

# q, p, tau, B, and what R's stabs 0.6-4 says: q^2 / p / um_const(tau, B, q / p), and p * minD(...)
# with both terms, its optimiser asked for 1e-12 (by default it stops short, by up to 3 %).
STABS = [
    (3, 10, 0.8, 50, 0.7411764706, 0.2682875093),
    (2, 9, 0.93, 50, 0.1394335512, 0.02961573902),
    (50, 1000, 0.9, 50, 1.078431373, 0.1704955758),
    (70, 1408, 0.9, 8, 2.010732323, 0.3965853366),
    (141, 352, 0.9, 50, 24.36397059, 8.842982159),
    (33, 1000, 0.6, 50, 2.865789474, 1.090617673),
    (10, 200, 0.75, 25, 0.5208333333, 0.145889661),
    (18, 352, 0.95, 16, 0.2815508021, 0.03970956355),
    (5, 100, 1.0, 10, 0.04545454545, 0.009227958286),
]


@pytest.mark.parametrize(("q", "p", "tau", "pairs", "unimodal", "concave"), STABS)
def test_bounds_are_those_of_stabs(
    q: int, p: int, tau: float, pairs: int, unimodal: float, concave: float
) -> None:
    assert false_selections(tau, q, p, pairs, "unimodal") == pytest.approx(unimodal, rel=1e-9)
    assert false_selections(tau, q, p, pairs) == pytest.approx(concave, rel=1e-5)


def test_bounds_that_say_nothing_and_those_that_make_no_sense() -> None:
    assert false_selections(0.6, 90, 100, 8) == 100
    # The design's two examples: 2 of 99 channels at a size of 5 %, 137 of 794 at 40 %.
    assert round(false_selections(0.9, 70, 1408, 8, "unimodal")) == 2
    assert round(false_selections(0.9, 563, 1408, 8, "unimodal"), -1) == 130
    for wrong in ((0.5, 3, 10, 5), (1.1, 3, 10, 5), (0.9, 0, 10, 5), (0.9, 11, 10, 5)):
        with pytest.raises(ValueError, match=r"tau must|no such numbers"):
            false_selections(*wrong)
    with pytest.raises(ValueError, match="assumption"):
        false_selections(0.9, 3, 10, 5, "none")  # type: ignore[arg-type]
    # The uniform distribution is r-concave: a tail is no less than its.
    assert _tail(0.25, 9, 20, -0.5) >= 3 / 11 - 1e-9


def test_the_interval_covers_as_the_binomial_says() -> None:
    low, high = exact_interval(np.arange(17), 16)
    for k in range(17):
        found = stats.binomtest(k, 16).proportion_ci(method="exact")
        assert (low[k], high[k]) == pytest.approx((found.low, found.high))


def test_strata_count_equally_and_the_p_value_is_welchs() -> None:
    rng = np.random.default_rng(0)
    differences, own = rng.normal(0.2, 1, (3, 30)), np.arange(30) < 9
    found = compared(differences, own, 0.9)
    for row, mean, high, p in zip(differences, *found, strict=True):
        # Minus the others: then Welch's difference of means is the sum.
        test = stats.ttest_ind(row[own], -row[~own], equal_var=False, alternative="greater")
        assert mean == pytest.approx((row[own].mean() + row[~own].mean()) / 2)
        assert p == pytest.approx(test.pvalue)
        assert stats.t.sf((high - mean) / (mean / test.statistic), test.df) == pytest.approx(0.1)
    one_kind = compared(differences, np.ones(30, bool))
    test = stats.ttest_1samp(differences, 0, axis=1, alternative="greater")
    assert one_kind.p == pytest.approx(test.pvalue)


def test_nothing_and_certainty_have_no_spread() -> None:
    own = np.arange(4) < 2
    found = compared(np.array([[0.0] * 4, [1.0] * 4, [-1.0] * 4]), own)
    assert found.p.tolist() == [1.0, 0.0, 1.0]
    assert compared(np.ones((1, 3)), np.array([True, False, False])).p.tolist() == [1.0]


def test_halves_are_disjoint_and_hold_both_kinds() -> None:
    labels = torch.arange(25) % 3
    first, second = halved(labels, 1, seed=4)
    assert sorted(torch.cat([first, second]).tolist()) == list(range(25))
    for half in (first, second):
        assert int((labels[half] == 1).sum()) == 4
        assert int((labels[half] != 1).sum()) in (8, 9)
    with pytest.raises(ValueError, match="task 0 has 1 own image to learn from"):
        halved(torch.tensor([0, 1, 1]), 0, seed=0)


def circuit(kind: Any, seed: int = 0, **more: Any) -> PlantedCircuit:
    return planted(kind, seed=seed, n_classes=2, width=24, **more)


STEPS = 24


def certain(known: PlantedCircuit, steps: int = STEPS, **options: Any) -> ChannelCertainty:
    recipe = Recipe(size=1.5 * known.size, steps=steps, images_per_step=10)
    gates = learn_gates(known.model, known.data, [0], recipe, known.sites, run=RUN)
    options = {"pairs": 2, "run": RUN, **options}
    return nad_attr.certainty(known.model, gates, known.data, known.held_out, **options)


def flat(arch: SubArchitecture) -> np.ndarray:
    return torch.cat([arch[site.name] for site in arch.sites]).numpy()


def labelled(found: ChannelCertainty, label: str) -> np.ndarray:
    return np.asarray(found.label[0] == LABELS.index(label))


@functools.cache
def found_in(kind: str) -> tuple[PlantedCircuit, ChannelCertainty]:
    """A circuit and its certainty, measured once for all tests."""
    known = circuit(kind)
    return known, certain(known)


@pytest.fixture(scope="module")
def plain() -> tuple[PlantedCircuit, ChannelCertainty]:
    return found_in("plain")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["residual", "distractors", "cancelling", "shared", "constant"])
def test_what_is_needed_is_called_so_and_nothing_else(kind: str) -> None:
    known, found = found_in(kind)
    truth = flat(known.circuit[0])
    needed = labelled(found, "needed")
    assert not (needed & ~truth).any()
    assert (needed & truth).sum() >= 0.9 * truth.sum()


def test_a_plain_circuit_is_needed_and_the_rest_has_no_effect(
    plain: tuple[PlantedCircuit, ChannelCertainty],
) -> None:
    known, found = plain
    truth = flat(known.circuit[0])
    assert (labelled(found, "needed") == truth).all()
    assert (labelled(found, "no effect seen") == (found.kept[0] & ~truth)).all()
    assert found.fidelity[0] > 0.99
    assert (found.selection[0][truth] == 1).all()
    # Ties are broken at random: no channel without effect is chosen each time at this size.
    assert found.selection[0][~truth].max() <= 0.75
    others = found.alternatives(0)
    assert len(others) >= 4
    assert (flat(others.shared) >= truth).all()
    assert others.overlaps == tuple(sorted(others.overlaps))
    assert len(found.alternatives(0, max_overlap=0.0)) == 0


@pytest.mark.slow
def test_pairs_that_cancel_are_told_as_a_group() -> None:
    _, found = found_in("cancelling")
    assert found.groups[0]
    for group in found.groups[0]:
        assert labelled(found, "no effect seen")[list(group)].all()
        # One by one they look as if nothing mattered more.
        assert (found.q[0][list(group)] <= 0.05).any()


@pytest.mark.slow
def test_a_pair_that_cancels_is_found_where_each_alone_would_take_another_constant() -> None:
    known = planted("cancelling", n_classes=2, width=16, circuit_width=3, seed=9)
    recipe = Recipe(size=1.5 * known.size, ablation="mean", steps=40)
    gates = learn_gates(known.model, known.data, [0], recipe, known.sites, seed=9, run=RUN)
    given = known.model, gates, known.data, known.held_out
    found = nad_attr.certainty(*given, pairs=1, alternatives=0, seed=9, run=RUN)
    assert found.groups[0]
    assert not (labelled(found, "needed") & ~flat(known.circuit[0])).any()


def test_redundant_copies_are_replaceable() -> None:
    known = circuit("redundant")
    found = certain(known, steps=60)
    copies = [flat(copy) for copy in known.alternatives[0]]
    assert not labelled(found, "needed").any()
    whole = [copy for copy in copies if found.kept[0][copy].all()]
    assert whole
    assert labelled(found, "replaceable")[whole[0]].all()
    # Both copies kept whole: neither is missed by itself.
    union = known.alternatives[0][0] | known.alternatives[0][1]
    means = learn_gates(known.model, known.data, [0], Recipe(steps=2), known.sites).means
    kept = {s.name: union[s.name][None].float() for s in known.sites}
    both = TaskGates(kept, known.sites, [0], means=means)
    found = nad_attr.certainty(
        known.model, both, known.data, known.held_out, recipe=Recipe(size=0.5, steps=10), pairs=1,
        alternatives=0, run=RUN,
    )  # fmt: skip
    assert (found.q[0][found.kept[0]] > 0.05).all()
    assert labelled(found, "replaceable")[copies[0] | copies[1]].mean() > 0.9


class Mirrored(nn.Module):
    """z = f + h / 2: channel 0 holds h, channel 1 minus half of it; 2 is f and 3 nothing."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.site = nn.Identity()
        self.register_buffer("first", torch.randn(3, 4, generator=generator, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        h, f, _ = (x[:, i * 4 : i * 4 + 4] @ self.first[i] for i in range(3))
        c = self.site(torch.stack([h, -h / 2, f, 0 * f], dim=1))
        return torch.stack([c.sum(1), -c.sum(1)], dim=1)


def test_p_values_are_uniform_where_closing_changes_nothing_in_the_mean() -> None:
    """Random weights; kept: channel 0, half of which the closed channel 1 should take back.

    So the residual is h / 2 - f, and with channel 0 closed -h / 2 - f: the same mean squared error
    for independent h and f, as each image's sign is as likely as the other.
    """
    recipe = Recipe(size=0.25, steps=1, images_per_step=2)
    ps = []
    for seed in range(80):
        model = Mirrored(seed).double().eval()
        generator = torch.Generator().manual_seed(1000 + seed)
        x = torch.randn(160, 12, generator=generator, dtype=torch.double)
        data = [(part, torch.arange(80) % 2) for part in x.split(80)]
        site = GateSite("site", 4, 1)
        gates = TaskGates(
            {"site": torch.tensor([[1.0, 0.0, 0.0, 0.0]])}, [site], [0],
            means={"site": torch.zeros(4)}, recipe=recipe,
        )  # fmt: skip
        from nad_attr.certainty import testing

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(testing, "PREFILTER", 1.0)
            patch.setattr(testing, "PRIOR", 1e-6)  # at the mean: another constant is another test
            found = nad_attr.certainty(
                model, gates, *data, pairs=1, alternatives=0, checks="off", run=RUN
            )
        ps.append(found.p[0, 0])
    assert stats.kstest(ps, "uniform").pvalue > 0.01
    assert np.mean(np.array(ps) < 0.05) < 0.12


def test_a_channel_that_was_not_closed_counts_as_a_test() -> None:
    _, found = found_in("plain")
    skipped = found.kept[0] & np.isnan(found.effect[0])
    assert skipped.sum() == found.skipped[0] > 0
    assert (found.p[0][skipped] == 1).all()
    tested = found.p[0][found.kept[0]]
    assert found.q[0][found.kept[0]] == pytest.approx(stats.false_discovery_control(tested))


def test_table_core_and_gates(plain: tuple[PlantedCircuit, ChannelCertainty]) -> None:
    known, found = plain
    table = found.table(0)
    assert list(table) == [
        "site", "channel", "gate", "kept", "selection", "selection_low", "selection_high",
        "effect", "q", "label",
    ]  # fmt: skip
    assert table.kept.all()
    assert len(table) == found.kept.sum()
    assert len(found.table(0, closed=True)) == 72
    assert (table.selection_low <= table.selection).all()
    assert (table.selection <= table.selection_high).all()
    core = found.core(1.0)
    assert isinstance(core, TaskGates)
    assert (flat(core.sub_architecture(0)) == (found.chosen[0] == 4)).all()
    assert torch.equal(
        torch.cat([found.gates[s.name] for s in known.sites], 1).double(),
        torch.from_numpy(found.selection).float().double(),
    )
    assert found.false_selections(1.0, 0) < found.false_selections(0.8, 0)
    with pytest.raises(ValueError, match="tau must be"):
        found.core(0.0)
    with pytest.raises(KeyError, match="no task 7; there are 0"):
        found.table(7)


def test_what_is_found_is_a_function_of_the_task(
    plain: tuple[PlantedCircuit, ChannelCertainty],
) -> None:
    """Of no other task, no batch size, and nothing changes the network."""
    known, alone = plain
    recipe = Recipe(size=1.5 * known.size, steps=STEPS, images_per_step=10)
    gates = learn_gates(known.model, known.data, [1, 0], recipe, known.sites, run=RUN)
    with assert_model_untouched(known.model):
        both = nad_attr.certainty(
            known.model, gates, known.data, known.held_out, pairs=2, batch_size=100
        )
    np.testing.assert_array_equal(both.label[1], alone.label[0])
    np.testing.assert_array_equal(both.chosen[1], alone.chosen[0])
    np.testing.assert_allclose(both.effect[1], alone.effect[0], rtol=1e-3, atol=1e-6)


def test_passes_are_counted() -> None:
    known = circuit("plain", n_images=40)
    seen: list[int] = []
    handle = known.model[-1].register_forward_hook(lambda m, args, out: seen.append(len(out)))
    recipe = Recipe(size=known.size, steps=4, images_per_step=6)
    gates = learn_gates(known.model, known.data, [0], recipe, known.sites, run=RUN)
    options: dict[str, Any] = {"pairs": 1, "alternatives": 1, "checks": "off", "run": RUN}
    seen.clear()
    found = nad_attr.certainty(known.model, gates, known.data, known.held_out, **options)
    handle.remove()
    counted = sum(found.passes.values())
    # Beside them: the whole network's outputs and means, a few images that checks look at, and the
    # four shares of constants that are judged on the 40 images, and on the 20 of each half.
    assert counted <= sum(seen) <= counted + 8 * 40 + 4 * (40 + 20 + 20)
    assert found.passes["learning"] == 3 * 4 * 6


def test_replicas_learn_from_their_images_alone_and_shun_what_costs() -> None:
    known = circuit("plain")
    recipe = Recipe(size=known.size, steps=30, images_per_step=10)
    session = Session(known.model, known.data, [0], recipe, known.sites, run=RUN)
    truth = torch.from_numpy(flat(known.circuit[0]))
    first, second = halved(known.data[1], 0, 1)
    alone, _ = session.learn_replicas([Replica(0, 5, first)])
    beside, _ = session.learn_replicas([Replica(0, 6, second), Replica(0, 5, first)])
    assert torch.equal(alone[0] > 0.5, beside[1] > 0.5)
    images, labels = known.data
    spoilt = images.clone()
    spoilt[second] = 0
    other = Session(known.model, (spoilt, labels), [0], session.recipe, known.sites, run=RUN)
    other._known_moments = session._moments()
    assert torch.equal(other.learn_replicas([Replica(0, 5, first)])[0] > 0.5, alone > 0.5)
    assert not (other.learn_replicas([Replica(0, 6, second)])[0] > 0.5)[0][truth].all()
    priced, _ = session.learn_replicas([Replica(0, 5, first, truth.double())])
    assert not (priced[0] > 0.5)[truth].any()


def test_what_cannot_be_asked_is_refused() -> None:
    known = circuit("plain", n_images=20)
    gates = learn_gates(known.model, known.data, [0], Recipe(steps=2), known.sites)
    bare = TaskGates(dict(gates._gates), gates.sites, gates.tasks)
    call = nad_attr.certainty
    for changed, options, error, message in [
        (bare, {}, ValueError, "do not say how they were learned"),
        (gates.sub_architecture(0), {}, TypeError, "must be TaskGates, got SubArchitecture"),
        (gates, {"pairs": 0}, ValueError, "pairs must be a whole number from 1 on"),
        (gates, {"alpha": 1.5}, ValueError, r"alpha must be a number in \(0, 1\), got 1.5"),
        (gates, {"tolerance": 0}, ValueError, "tolerance must be"),
        (gates, {"recipe": 3}, TypeError, "recipe must be a Recipe"),
    ]:
        with pytest.raises(error, match=message):
            call(known.model, changed, known.data, known.held_out, **options)  # type: ignore[arg-type]
    images, labels = known.held_out
    with pytest.raises(ValueError, match="held_out has no image of task 0"):
        call(known.model, gates, known.data, (images[labels != 0], labels[labels != 0]))


def test_halves_keep_the_size_that_each_task_has() -> None:
    known = circuit("shared", n_images=90)
    recipe = Recipe(fidelity=0.8, ablation="mean", steps=30)
    gates = learn_gates(known.model, known.data, None, recipe, known.sites, run=RUN)
    first, second = gates.sub_architectures()
    other = second._with_masks(SubArchitecture.full(known.sites).masks, 1)  # keeps all
    uneven = TaskGates(
        {s.name: torch.stack([first[s.name], other[s.name]]).float() for s in known.sites},
        known.sites, [0, 1], means=gates.means, recipe=recipe,
    )  # fmt: skip
    found = nad_attr.certainty(
        known.model, uneven, known.data, known.held_out, pairs=1, alternatives=1, run=RUN
    )
    assert found.other_gates.sum(2).tolist() == [[first.n_kept] * 3, [72] * 3]
    alone = nad_attr.certainty(
        known.model, uneven.select([0]), known.data, known.held_out, pairs=1, alternatives=1,
        run=RUN,
    )  # fmt: skip
    np.testing.assert_array_equal(alone.other_gates[0], found.other_gates[0])


def test_a_group_of_channels_is_closed_as_one() -> None:
    """Two equal channels with opposite weights: each costs much, and both together nothing."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)).eval()
    net[0].weight.data = torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
    net[1].weight.data = torch.tensor([[5.0, -5, 1, 1], [-5, 5, -1, -1]])
    x = torch.randn(80, 3, generator=torch.Generator().manual_seed(0))
    data = x, (x[:, 1] + x[:, 2] < 0).long()
    recipe = Recipe(steps=2, images_per_step=4, ablation="zero", size=1.0)
    for groups, needed in ((None, [True] * 4), (2, [False, False, True, True])):
        site = GateSite("0", 4, 1, groups=groups)
        gates = TaskGates({"0": torch.ones(1, 4)}, [site], [0], recipe=recipe)
        found = nad_attr.certainty(net, gates, data, data, pairs=1, alternatives=0, run=RUN)
        assert (found.q[0] < 0.05).tolist() == needed
        if groups:
            assert found.effect[0, 2] == found.effect[0, 3] == pytest.approx(1.0)
            assert found.counts(0) == {
                "needed": 1, "replaceable": 0, "no effect seen": 1, "undecided": 0
            }  # fmt: skip


@pytest.mark.parametrize("recipe", [
    Recipe(size=0.3, steps=6, ablation="optimal"),
    Recipe(size=0.3, steps=6, ablation="zero"),
    Recipe.paper(beta=0.2, epochs=1),
], ids=["constants", "zero", "paper"])  # fmt: skip
def test_every_recipe_learns_from_halves(recipe: Recipe) -> None:
    known = circuit("plain", n_images=60)
    gates = learn_gates(known.model, known.data, None, recipe, known.sites, run=RUN)
    found = nad_attr.certainty(
        known.model, gates, known.data, known.held_out, pairs=1, alternatives=1, run=RUN
    )
    assert (found.constants is None) == (recipe.ablation != "optimal")
    assert (found.means is None) == (recipe.ablation != "mean")
    assert found.kept.sum(1).tolist() == [arch.n_kept for arch in gates.sub_architectures()]
    core = found.core(0.5)
    # Gates know on how many images constants were fitted, too.
    assert gates.sub_architecture(0).closed_at.startswith(core.sub_architecture(0).closed_at)


def test_the_name_is_a_function_and_a_room() -> None:
    import inspect
    from importlib import import_module

    room = import_module("nad_attr.certainty")
    assert callable(room)
    assert "held_out" in inspect.signature(nad_attr.certainty).parameters
    assert inspect.signature(room) == inspect.signature(room.certainty)
