"""Planted circuits: that they are what they are said to be, and that the method finds them."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nad_attr import Recipe, SubArchitecture, TaskGates, find_gate_sites, learn_gates
from nad_attr.evaluation import (
    PLANTED_KINDS,
    EnergyScorer,
    GradientXActivationScorer,
    NeuronMCTScorer,
    PlantedCircuit,
    TaylorScorer,
    planted,
    planted_heads,
    top_k,
)
from nad_attr.gates.channels import open_gates, to_channels
from nad_attr.gating.hooks import gated, recorded
from nad_attr.gating.means import channel_means
from nad_attr.learning import constants, selection
from nad_attr.learning.selection import QuadraticModel
from tests.helpers import assert_model_untouched

#: What a float64 network may differ by where sums cancel.
EXACT = 1e-10
RIVALS = (NeuronMCTScorer, GradientXActivationScorer, TaylorScorer, EnergyScorer)


def doubled(known: PlantedCircuit) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Make the network float64; return held-out images, its outputs and its channels' means."""
    model, images = known.model.double(), known.held_out[0].double()
    means = channel_means(model, known.sites, [(known.data[0].double(),)])
    with torch.no_grad():
        return images, model(images), means


def output(known: PlantedCircuit, arch: SubArchitecture, images: Tensor) -> Tensor:
    """The task output of a sub-architecture."""
    with torch.no_grad(), gated(known.model, arch):
        outputs: Tensor = known.model(images)
    return outputs[:, arch.task]


def ablated(
    known: PlantedCircuit, arch: SubArchitecture, means: dict[str, Tensor]
) -> list[SubArchitecture]:
    """The sub-architecture with each ablation value that is to be exact."""
    values = {"mean": means, "zero": None}
    return [arch.with_means(values[name]) for name in known.ablations]


def flips(arch: SubArchitecture) -> list[SubArchitecture]:
    """All sub-architectures with one channel less."""
    result = []
    for name, channels in arch.kept.items():
        for channel in channels.tolist():
            masks = arch.masks
            masks[name][channel] = False
            result.append(SubArchitecture(masks, arch.sites, task=arch.task))
    return result


# -- The construction --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PLANTED_KINDS)
def test_all_else_closed_changes_nothing(kind: str) -> None:
    known = planted(kind, n_images=40)
    images, whole, means = doubled(known)
    for k in known.tasks:
        for copy in known.alternatives[k]:
            for arch in ablated(known, copy, means):
                difference = (output(known, arch, images) - whole[:, k]).abs().max()
                assert difference <= EXACT * whole[:, k].abs().max(), (k, arch)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PLANTED_KINDS)
def test_each_planted_channel_is_needed(kind: str) -> None:
    known = planted(kind, n_images=40)
    images, whole, means = doubled(known)
    k = 1
    # With copies, a channel of one is missed as soon as the others are closed.
    for less in flips(known.circuit[k]):
        for arch in ablated(known, less, means):
            difference = (output(known, arch, images) - whole[:, k]).abs().max()
            assert difference > 1e-4 * whole[:, k].abs().max(), less


@pytest.mark.parametrize("kind", ["plain", "residual", "distractors", "shared", "cancelling"])
def test_in_the_whole_network_each_planted_channel_is_needed_too(kind: str) -> None:
    known = planted(kind, n_classes=2, circuit_width=3, width=20, n_images=20)
    images, whole, means = doubled(known)
    for name, channels in known.circuit[0].kept.items():
        for channel in channels.tolist():
            masks = SubArchitecture.full(known.sites).masks
            masks[name][channel] = False
            arch = SubArchitecture(masks, known.sites, task=0, means=means)
            assert (output(known, arch, images) - whole[:, 0]).abs().max() > 1e-4


@pytest.mark.slow
def test_either_copy_suffices_and_neither_is_needed() -> None:
    known = planted("redundant", copies=3, n_images=40)
    images, whole, means = doubled(known)
    full = SubArchitecture.full(known.sites)
    for k in known.tasks:
        copies = known.alternatives[k]
        assert len(copies) == 3
        assert all((a & b).n_kept == 0 for a in copies for b in copies if a is not b)
        for copy in copies:
            masks = (full - copy).masks
            for arch in ablated(known, SubArchitecture(masks, known.sites, task=k), means):
                assert (output(known, arch, images) - whole[:, k]).abs().max() < EXACT
        nothing = full
        for copy in copies:
            nothing = nothing - copy
        without = SubArchitecture(nothing.masks, known.sites, task=k, means=means)
        assert output(known, without, images).abs().max() < EXACT


def test_decoys_of_a_pair_matter_alone_and_not_together() -> None:
    known = planted("cancelling", n_images=40)
    images, whole, means = doubled(known)
    k = 0
    circuit, decoys = known.circuit[k], known.decoys[k]
    weight = known.model.head.linear.weight[k].detach()
    last = known.sites[-1].name
    pairs = decoys.kept[last].tolist()
    assert len(pairs) == 4
    assert float(weight[pairs].sum().abs()) < EXACT
    assert float(weight[pairs].abs().min() / weight[circuit.kept[last]].abs().max()) > 0.1
    masks = SubArchitecture.full(known.sites).masks
    masks[last][pairs[0]] = False
    alone = output(known, SubArchitecture(masks, known.sites, task=k, means=means), images)
    weakest = min(
        float((output(known, less.with_means(means), images) - whole[:, k]).square().mean())
        for less in flips(circuit)
    )
    assert float((alone - whole[:, k]).square().mean()) > 5 * weakest


def test_pairs_are_always_equal_up_to_where_they_stand() -> None:
    known = planted("cancelling", n_images=40)
    images, _, _ = doubled(known)
    with torch.no_grad(), recorded(known.model, known.sites) as activations:
        known.model(images)
    for site in known.sites:
        maps = activations[site.name][:, known.decoys[2].kept[site.name]].flatten(2)
        same = [
            sum(torch.allclose(maps[:, i], maps[:, j], rtol=1e-9) for j in range(maps.shape[1]))
            for i in range(maps.shape[1])
        ]
        assert same == [2] * 4


def test_distractors_are_louder_than_the_circuit_on_own_images() -> None:
    known = planted("distractors", n_images=80)
    images, labels = known.held_out
    with torch.no_grad(), recorded(known.model, known.sites) as activations:
        known.model(images)
    for k in known.tasks:
        for site in known.sites:
            size = activations[site.name][labels == k].square().mean(dim=(0, 2, 3))
            decoys, circuit = known.decoys[k][site.name], known.circuit[k][site.name]
            assert size[decoys].median() > size[circuit].median()


def test_inhibitors_fire_on_another_class_and_speak_against_this_one() -> None:
    known = planted("distractors", circuit_width=3, n_images=80)
    last = known.sites[-1].name
    images, labels = known.held_out
    with torch.no_grad(), recorded(known.model, known.sites) as activations:
        known.model(images)
    mean = activations[last].mean(dim=(2, 3))
    for k in known.tasks:
        channels = known.circuit[k].kept[last]
        against = channels[known.model.head.linear.weight[k, channels] < 0]
        assert len(against) == 1
        before = (k - 1) % 4
        assert mean[labels == before][:, against].mean() > 2 * mean[labels == k][:, against].mean()


def test_constants_are_the_same_for_every_image() -> None:
    known = planted("constant", n_images=20)
    with torch.no_grad(), recorded(known.model, known.sites) as activations:
        known.model(known.held_out[0])
    assert known.ablations == ("mean",)
    for site in known.sites:
        maps = activations[site.name][:, known.decoys[0].kept[site.name]]
        assert maps.shape[1] == 4
        assert float(maps.min()) > 0
        assert torch.equal(maps, maps[:1, :, :1, :1].expand_as(maps))


@pytest.mark.parametrize("kind", PLANTED_KINDS)
def test_the_network_is_a_classifier_whose_sites_the_finder_accepts(kind: str) -> None:
    known = planted(kind)
    images, labels = known.held_out
    with torch.no_grad():
        assert float((known.model(images).argmax(1) == labels).float().mean()) > 0.9
    names = [site.name for site in known.sites]
    assert find_gate_sites(known.model, images[:2], layers=names) == list(known.sites)
    assert not known.model.training
    assert images.dtype == torch.float32
    assert {arch.n_kept for arch in known.circuit.values()} == {4 * len(names)}
    assert known.size == 4 / 48


def test_sharing_is_with_both_neighbours() -> None:
    known = planted("shared", n_classes=5, width=64, n_images=20)
    shared = [[(a & b).n_kept for b in known.circuit.values()] for a in known.circuit.values()]
    # A circuit has 4 channels at 3 sites: 2 own, and 1 with each neighbour.
    assert shared[0] == [12, 3, 0, 0, 3]
    assert all(
        shared[0][1] == (known.circuit[k] & known.circuit[(k + 1) % 5]).n_kept for k in range(5)
    )


def test_a_seed_is_a_network_and_global_random_numbers_play_no_part() -> None:
    torch.default_generator.manual_seed(1)
    a = planted("shared", seed=3, n_images=10)
    with assert_model_untouched(a.model, *a.data):
        b = planted("shared", seed=3, n_images=10)
    c = planted("shared", seed=4, n_images=10)
    state = a.model.state_dict()
    assert all(torch.equal(v, b.model.state_dict()[n]) for n, v in state.items())
    assert torch.equal(a.data[0], b.data[0])
    assert a.circuit == b.circuit
    assert not torch.equal(a.data[0], c.data[0])
    assert a.circuit != c.circuit
    assert not torch.equal(a.data[0], a.held_out[0])
    positions = {tuple(a.circuit[0].kept[site.name].tolist()) for site in a.sites}
    assert len(positions) == len(a.sites), "positions tell nothing"


@pytest.mark.slow
@settings(max_examples=20)
@given(
    kind=st.sampled_from(PLANTED_KINDS),
    n_classes=st.integers(2, 4),
    depth=st.integers(2, 3),
    circuit_width=st.integers(2, 5),
    spare=st.integers(0, 9),
    seed=st.integers(0, 2**40),
    copies=st.integers(2, 3),
)
def test_any_arguments(
    kind: str, n_classes: int, depth: int, circuit_width: int, spare: int, seed: int, copies: int
) -> None:
    known = planted(
        kind,
        n_classes=n_classes,
        depth=depth,
        circuit_width=circuit_width,
        width=12 * circuit_width + spare,
        seed=seed,
        n_images=2 * n_classes,
        copies=copies,
    )
    images, whole, means = doubled(known)
    assert bool(torch.isfinite(whole).all())
    score = known.score([known.alternatives[k][-1] for k in known.tasks])
    assert score.precision.tolist() == score.recall.tolist() == [1.0] * n_classes
    for k in known.tasks:
        arch = known.alternatives[k][-1]
        assert arch.n_kept == circuit_width * len(known.sites)
        for exact in ablated(known, arch, means):
            assert (output(known, exact, images) - whole[:, k]).abs().max() < EXACT


# -- The score ---------------------------------------------------------------------------------


def small() -> PlantedCircuit:
    return planted("plain", n_classes=2, circuit_width=2, depth=1, width=10, n_images=8)


def test_precision_and_recall_by_hand() -> None:
    known = small()
    [site] = known.sites
    first, second = known.circuit[0].kept[site.name].tolist()
    wrong = [c for c in range(10) if not known.circuit[0][site.name][c]]
    kept = [first, *wrong[:3]]
    score = known.score(SubArchitecture.from_kept({site.name: kept}, known.sites, task=0))
    assert score.tasks == (0,)
    assert score.precision.tolist() == [0.25]
    assert score.recall.tolist() == [0.5]
    assert score.f1.tolist() == [pytest.approx(1 / 3)]
    assert score.whole.tolist() == [False]
    assert score.size.tolist() == [0.4]
    both = SubArchitecture.from_kept({site.name: [first, second, wrong[0]]}, known.sites, task=0)
    score = known.score([both])
    assert score.precision.tolist() == [2 / 3]
    assert score.recall.tolist() == [1.0]
    assert score.whole.tolist() == [True]
    nothing = known.score(SubArchitecture.from_kept({}, known.sites, task=1))
    assert nothing.precision.tolist() == nothing.recall.tolist() == nothing.f1.tolist() == [0.0]


def test_copies_by_hand() -> None:
    known = planted("redundant", n_classes=2, circuit_width=4, depth=1, width=20, n_images=8)
    [site] = known.sites
    a, b = (copy.kept[site.name].tolist() for copy in known.alternatives[1])
    kept = [a[0], *b[:3]]
    score = known.score(SubArchitecture.from_kept({site.name: kept}, known.sites, task=1))
    assert score.copy.tolist() == [1]
    assert score.recall.tolist() == [0.75]
    assert score.precision.tolist() == [0.75]
    assert score.union_precision.tolist() == [1.0]
    assert score.whole.tolist() == [False]
    score = known.score(SubArchitecture.from_kept({site.name: [*a, b[0]]}, known.sites, task=1))
    assert score.copy.tolist() == [0]
    assert score.whole.tolist() == [True]
    assert score.precision.tolist() == [0.8]
    assert score.union_precision.tolist() == [1.0]


def test_score_of_gates_at_any_size_and_as_table() -> None:
    known = small()
    [site] = known.sites
    values = torch.stack([known.circuit[k][site.name].float() for k in (1, 0)])
    gates = TaskGates({site.name: 0.1 + 0.8 * values}, known.sites, [1, 0])
    assert known.score(gates).mean("recall") == 1.0
    larger = known.score(gates, size=0.4)
    assert larger.tasks == (1, 0)
    assert larger.precision.tolist() == [0.5, 0.5]
    assert larger.mean("whole") == 1.0
    frame = larger.frame()
    assert list(frame.index) == [1, 0]
    assert frame.loc[0, "precision"] == 0.5
    assert json.loads(json.dumps(larger.to_dict()))["means"]["size"] == 0.4
    assert "precision 0.500" in repr(larger)


def test_score_refuses_what_it_cannot_score() -> None:
    known, other = small(), planted("plain", n_classes=2, circuit_width=2, width=8, n_images=8)
    arch = known.circuit[0]
    for wrong, kind, words in (
        ([], ValueError, "no sub-architecture"),
        ([arch, arch], ValueError, "task 0 is there twice"),
        (other.circuit[0], ValueError, "gate sites"),
        (SubArchitecture.full(known.sites), ValueError, "has no task"),
        (SubArchitecture(arch.masks, arch.sites, task=7), ValueError, "task 7"),
        ({"relu0": 1}, TypeError, "SubArchitecture, got dict"),
        ([1], TypeError, "SubArchitecture"),
    ):
        with pytest.raises(kind, match=words):
            known.score(wrong)
    with pytest.raises(ValueError, match="TaskGates"):
        known.score(arch, size=0.2)
    with pytest.raises(ValueError, match="no measure 'auc'"):
        known.score(arch).mean("auc")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "easy"}, "no planted network of kind 'easy'"),
        ({"n_classes": 1}, "n_classes must be a whole number from 2"),
        ({"depth": 0}, "depth must be a whole number from 1"),
        ({"kind": "residual", "depth": 1}, "depth must be a whole number from 2"),
        ({"kind": "shared", "circuit_width": 1}, "circuit_width must be a whole number from 2"),
        ({"circuit_width": 2.0}, "circuit_width"),
        ({"width": 15}, "needs 16 channels"),
        ({"kind": "cancelling", "width": 31}, "needs 32 channels"),
        ({"n_images": 7}, "n_images must be a whole number from 8"),
        ({"noise": -0.1}, "noise"),
        ({"noise": float("nan")}, "noise"),
        ({"kind": "redundant", "copies": 1}, "copies must be a whole number from 2"),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        planted(**{"kind": "plain", **arguments})


# -- Finding them ------------------------------------------------------------------------------


STEPS = 40


def recall_of(known: PlantedCircuit, steps: int = STEPS) -> float:
    """Of less work than the default, asked for the circuits' size: then precision is the same."""
    recipe = Recipe(size=known.size, steps=steps, images_per_step=10)
    gates = learn_gates(known.model, known.data, recipe=recipe, sites=known.sites, seed=0)
    score = known.score(gates)
    assert np.array_equal(score.precision, score.recall)
    return score.mean("recall")


def best_rival(known: PlantedCircuit) -> float:
    """The highest recall of any scorer, own or own and other images, over all or per site."""
    return max(
        known.score(top_k(scores, known.sites, known.tasks, known.size, per_site=apart)).mean(
            "recall"
        )
        for scorer in RIVALS
        for others in (False, True)
        for scores in [scorer(known.model, known.sites)(*known.data, include_others=others)]
        for apart in (False, True)
    )


@pytest.fixture(scope="module")
def heads() -> PlantedCircuit:
    return planted_heads(n_classes=2, n_heads=12, hidden=16, n_images=60)


def test_planted_heads_are_all_that_a_logit_depends_on(heads: PlantedCircuit) -> None:
    images, labels = heads.held_out
    found = find_gate_sites(heads.model, images[:1], units=["heads", "neurons"])
    assert found == list(heads.sites)
    assert {arch.n_kept for arch in heads.circuit.values()} == {2 * len(heads.sites)}
    means = channel_means(heads.model, heads.sites, [(images,)])
    with torch.no_grad():
        whole = heads.model(images)
        assert float((whole.argmax(1) == labels).float().mean()) > 0.9
    for k in heads.tasks:
        for arch in ablated(heads, heads.circuit[k], means):
            # Weights are float32, so the turned stream leaks a little.
            assert (output(heads, arch, images) - whole[:, k]).abs().max() < 1e-4
            for site in heads.sites:  # and each is needed
                gates = open_gates(site, arch[site.name])
                for gate in gates.nonzero().flatten().tolist():
                    masks = arch.masks
                    masks[site.name] &= to_channels(torch.arange(len(gates)) != gate, [site])
                    less = arch._with_masks(masks, k)
                    assert (output(heads, less, images) - whole[:, k]).abs().max() > 1e-2
        # Distractors are heads that hear the same and write more, where no logit reads.
        assert heads.decoys[k].n_kept == 2 * len(heads.sites)
        closed = SubArchitecture.full(heads.sites) - heads.decoys[k]
        one = SubArchitecture(closed.masks, heads.sites, task=k, means=means)
        assert (output(heads, one, images) - whole[:, k]).abs().max() < 1e-4


def test_planted_heads_are_found(heads: PlantedCircuit) -> None:
    recipe = Recipe(size=heads.size, steps=STEPS, images_per_step=10)
    gates = learn_gates(heads.model, heads.data, [0], recipe, heads.sites, seed=0)
    score = heads.score(gates)
    assert min(score.mean("precision"), score.mean("recall")) >= 0.95


@pytest.mark.slow
def test_planted_heads_of_more_classes_are_found() -> None:
    known = planted_heads()
    assert recall_of(known) >= 0.95
    # Activations do not tell them from the louder ones.
    scores = EnergyScorer(known.model, known.sites)(*known.data)
    energy = known.score(top_k(scores, known.sites, known.tasks, known.size))
    assert energy.mean("recall") < 0.7


def test_too_few_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="need 12 heads and neurons in each block"):
        planted_heads(n_classes=3, n_heads=8)
    with pytest.raises(ValueError, match="depth must be a whole number from 1"):
        planted_heads(depth=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "residual", "distractors", "shared"])
def test_circuits_are_found(kind: str) -> None:
    known = planted(kind, n_classes=2, circuit_width=3, width=32)
    assert recall_of(known) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["redundant", "constant"])
def test_circuits_are_found_that_scores_miss(kind: str) -> None:
    # Precision and recall are against the best copy: one, then, is found as a whole.
    known = planted(kind, n_classes=2, width=32)
    assert recall_of(known, 100) == 1.0
    assert best_rival(known) < 0.95


@pytest.fixture(scope="module")
def cancelling() -> tuple[float, float]:
    """What the default recipe and the best score find of circuits among cancelling decoys."""
    known = planted("cancelling", n_classes=3, width=32)
    return recall_of(known), best_rival(known)


@pytest.mark.slow
def test_cancelling_channels_deceive_scores_more_than_learning(
    cancelling: tuple[float, float],
) -> None:
    learned, best = cancelling
    assert learned > best + 0.1


def test_cancelling_channels_are_seen_through(cancelling: tuple[float, float]) -> None:
    assert cancelling[0] >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind",
    [
        "redundant",
        "cancelling",
        "distractors",
    ],
)
def test_candidates_alone_are_enough(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What spares wide networks most of the work loses no circuit."""
    known = planted(kind, n_classes=2, width=80)
    narrowed = []
    candidates = QuadraticModel.candidates

    def noted(self: QuadraticModel, *numbers: int) -> tuple[Tensor, int] | None:
        found = candidates(self, *numbers)
        narrowed.append(found is not None)
        return found

    monkeypatch.setattr(QuadraticModel, "candidates", noted)
    for name, value in {
        "MIN_CHANNELS_TO_NARROW": 1,
        "MAX_PAIR_CANDIDATES": 16,
        "SPARE_CANDIDATES": 8,
    }.items():
        monkeypatch.setattr(selection, name, value)
    monkeypatch.setattr(constants, "MIN_CHANNELS_TO_NARROW", 1)
    assert recall_of(known, 60) >= 0.95
    assert sum(narrowed) > len(narrowed) / 2
