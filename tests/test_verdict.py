"""The verdict holds for channels that are known to be needed, and by chance at its stated rate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import nad_attr
from nad_attr import (
    GateSite,
    Recipe,
    RunOptions,
    SubArchitecture,
    Verdict,
    learn_gates,
    verdict,
)
from nad_attr.certainty.verdict import _dealt, _minimality_p, _Resampled
from nad_attr.certainty.verdict_result import QUESTIONS
from nad_attr.evaluation import auc, fidelity, fit_ablation, planted, shuffled_labels
from nad_attr.evaluation.controls.planted import PlantedCircuit
from nad_attr.learning.session import Session
from nad_attr.stats.held_out import apart

from .helpers import assert_model_untouched, fit_briefly

HOLDS = ("holds", "holds", "holds", "holds", "not asked")


@pytest.fixture(scope="module")
def known() -> PlantedCircuit:
    return planted("plain", n_classes=3, width=24, n_images=60)


def test_a_planted_circuit_holds(known: PlantedCircuit) -> None:
    circuits = [known.circuit[task] for task in known.tasks]
    with assert_model_untouched(known.model):
        result = verdict(known.model, circuits, known.data, known.held_out, n_images=60)
    assert result.answers == (HOLDS,) * 3
    assert np.allclose(result.value[:, 0], 1, atol=1e-5)  # nothing else reaches the logits
    assert np.allclose(result.value[:, 1], 0.5)
    assert np.allclose(result.value[:, 2:4], 1)
    assert (result.p[:, :3] == 1 / 20).all()
    assert result.holds().all()
    assert "these channels suffice, the network needs them" in result.sentence(1)
    assert result.held_out_sentences(1) == []


@pytest.mark.parametrize("question", QUESTIONS[:4])
def test_what_is_not_so_does_not_hold(known: PlantedCircuit, question: str) -> None:
    circuit = known.circuit[1]
    some = {name: mask.clone() for name, mask in circuit.masks.items()}
    first = circuit.sites[0].name
    if question == "sufficient":  # the circuit of another class
        some = known.circuit[2].masks
    elif question == "necessary":  # one channel of each other circuit, none of its own
        some = {name: torch.zeros_like(mask) for name, mask in some.items()}
        for task in (0, 2):
            some[first][known.circuit[task].kept[first][0]] = True
    elif question == "specific":  # another circuit whole
        some = (circuit | known.circuit[2]).masks
    else:  # as many channels again that nothing reads
        rest = ~(known.circuit[0] | circuit | known.circuit[2])[first]
        some[first][rest.nonzero()[:4, 0]] = True
    arch = circuit._with_masks(some, 1)
    result = verdict(known.model, arch, known.data, known.held_out, n_images=60)
    assert result.answer(1, question) == "does not"


def test_wrong_labels_fail(known: PlantedCircuit) -> None:
    wrong = shuffled_labels(known.held_out, 1)
    circuits = [known.circuit[task] for task in known.tasks]
    result = verdict(known.model, circuits, known.data, wrong, n_images=60)
    assert not result.holds("sufficient").any()
    assert not result.holds("necessary").any()


@pytest.mark.slow
def test_random_channels_hold_at_the_stated_rate() -> None:
    # 12 of 24 channels: each question but minimality has a chance to hold.
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    x = torch.randn(60, 6, generator=generator)
    with torch.no_grad():
        data = x, net(x).argmax(1)
    whole = SubArchitecture.from_kept({"1": range(12)}, [GateSite("1", 24, 1)], task=0)
    task = int(data[1].mode().values)
    archs = [_dealt(whole._with_masks(whole.masks, task), draw, 9) for draw in range(60)]
    found = [verdict(net, arch, None, data, n_images=40, seed=i) for i, arch in enumerate(archs)]
    rates = np.array([[a == "holds" for a in result.answers[0]] for result in found]).mean(0)
    # at a rate of .05, more than 8 of 60 have a chance of .003
    assert (rates <= 8 / 60).all()
    p = np.array([result.p[0, 2] for result in found])
    assert 0.3 < p.mean() < 0.75  # of a uniform p on 20 steps: .525


def test_learned_gates_with_constants_are_held_against_random_ones_with_constants() -> None:
    known = planted("plain", n_classes=2, width=16, circuit_width=3, n_images=60)
    recipe = Recipe(size=known.size, ablation="optimal", steps=30, images_per_step=10)
    gates = learn_gates(known.model, known.data, recipe=recipe)
    result = verdict(known.model, gates, known.data, known.held_out, n_images=40)
    assert result.holds("sufficient").all()
    assert result.holds("necessary").all()
    assert (result.baseline[:, 0] > -0.5).all()  # constants: random ones are no worse than a mean
    with pytest.raises(ValueError, match="give data"):
        verdict(known.model, gates, None, known.held_out)


def test_constants_of_many_choices_are_fitted_side_by_side_as_each_alone() -> None:
    known = planted("plain", n_classes=2, width=16, circuit_width=3, n_images=60)
    recipe = Recipe(ablation="optimal", steps=5)
    session = Session(
        known.model, known.data, [0, 1], recipe, known.sites, run=RunOptions(batch_size=200)
    )
    choices = [_dealt(known.circuit[task], draw, 3) for draw in range(2) for task in (0, 1)]
    together = session.fit(choices)
    for arch, one in zip(choices, together, strict=True):
        (alone,) = session.fit([arch])
        assert one.task == arch.task
        assert one.means is not None
        assert alone.means is not None
        for name in arch:
            assert torch.equal(one[name], arch[name])
            torch.testing.assert_close(one.means[name], alone.means[name], rtol=1e-3, atol=1e-5)


def test_a_task_that_is_broken_is_no_more_so_the_worse_it_ranks_images() -> None:
    """One channel of a cancelling pair closed at random turns the task output upside down."""
    known = planted("cancelling", n_classes=3, width=32, circuit_width=3, n_images=90, seed=4)
    means = fit_ablation(known.model, known.sites, known.data, kind="mean").means
    archs = [known.circuit[task].with_means(means) for task in known.tasks]
    result = verdict(known.model, archs, None, known.held_out, n_images=60, seed=4)
    assert result.holds("specific").all()


def test_stability_is_agreement_beyond_chance(known: PlantedCircuit) -> None:
    arch = known.circuit[0]
    other = _dealt(arch, 0, 5)

    def stable(*replicas: SubArchitecture) -> Verdict:
        given = [[one] for one in replicas]
        return verdict(known.model, arch, known.data, known.held_out, n_images=20, replicas=given)

    assert stable(arch, arch).answer(0, "stable") == "holds"
    assert stable(arch, arch).value[0, 4] == 1
    assert stable(other).answer(0, "stable") == "does not"
    # by hand: kept 4 of 24 at each site, share of them in the replicas
    share = (arch & other).n_kept / arch.n_kept / 2 + 0.5
    wanted = (share - 4 / 24) / (1 - 4 / 24)
    assert stable(arch, other).value[0, 4] == pytest.approx(wanted)


class _Certain:
    """A table as certainty gives it."""

    def __init__(self, arch: SubArchitecture, labels: list[str]) -> None:
        self.arch, self.labels, self.tasks = arch, labels, (arch.task,)

    def table(self, task: object, *, closed: bool) -> dict[str, np.ndarray]:
        sites = [(s.name, c) for s in self.arch.sites for c in range(s.n_channels)]
        kept = np.array([bool(self.arch[name][c]) for name, c in sites])
        label = np.full(len(sites), "", dtype=object)
        label[kept] = self.labels
        return {
            "site": np.array([name for name, _ in sites]),
            "channel": np.array([c for _, c in sites]),
            "kept": kept,
            "selection": kept.astype(float),
            "label": label,
        }


def test_certainty_answers_minimality_and_stability(known: PlantedCircuit) -> None:
    arch, data = known.circuit[0], (known.data, known.held_out)
    n = arch.n_kept
    sure = verdict(known.model, arch, *data, n_images=20, certainty=_Certain(arch, ["needed"] * n))
    assert sure.answers[0][3:] == ("holds", "holds")
    half = ["needed", "replaceable"] * (n // 2)
    doubt = verdict(known.model, arch, *data, n_images=20, certainty=_Certain(arch, half))
    assert doubt.answer(0, "minimal") == "does not"
    assert doubt.value[0, 3] == 0.5
    with pytest.raises(ValueError, match="other channels"):
        other = _dealt(arch, 0, 5)
        verdict(known.model, arch, *data, certainty=_Certain(other, ["needed"] * n))


def test_what_certainty_gives_is_taken(
    known: PlantedCircuit, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_briefly(monkeypatch)
    recipe = Recipe(size=known.size, steps=20, images_per_step=10)
    gates = learn_gates(known.model, known.data, [0], recipe=recipe)
    data = known.data, known.held_out
    sure = nad_attr.certainty(known.model, gates, *data, pairs=2, alternatives=0)
    result = verdict(known.model, gates, *data, n_images=20, certainty=sure)
    assert "not asked" not in result.answers[0]
    counted: list[int] = []
    handle = known.model[0].register_forward_hook(lambda m, args, out: counted.append(len(out)))
    for given in (sure, None):
        counted.append(0)
        verdict(known.model, gates, *data, n_images=20, certainty=given)
    handle.remove()
    # What certainty says of single channels is not measured again.
    with_it, without = np.split(np.array(counted), [counted.index(0, 1)])
    assert without.sum() - with_it.sum() == 20 * min(40, int(sure.kept.sum()))
    table = sure.table(0)
    assert result.value[0, 3] == pytest.approx((table["label"] == "needed").mean())


def test_measures_are_those_of_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(40, generator=generator) > 0.7
    whole, gated = torch.randn(2, 40, generator=generator, dtype=torch.float64).round(decimals=1)
    found = _Resampled(own.numpy(), 3)
    assert found.auc(gated.numpy())[0] == pytest.approx(auc(gated, own).item())
    wanted = fidelity(whole, gated, own).item()
    assert found.fidelity(whole.numpy(), gated.numpy())[0] == pytest.approx(wanted)


def test_p_of_minimality_by_hand() -> None:
    # 12 kept, all tested: more than a tenth is two at least, both falsely seen: 2 a / 2.
    assert _minimality_p(0, 12, 12, 0.01) == pytest.approx(0.01)
    assert _minimality_p(1, 12, 12, 0.01) == pytest.approx(0.02)
    assert _minimality_p(2, 12, 12, 0.01) == 1
    # 100 kept, 11 of them without effect, 40 tested: that none of these is among the tested
    none = np.prod([(89 - i) / (100 - i) for i in range(40)])
    assert _minimality_p(0, 40, 100, 0.0) == pytest.approx(none)


def test_where_learned_and_held_out_part_is_said_with_a_remedy() -> None:
    values = {"fidelity": 0.9}
    same = {"whole": (0.9, 0.9), "n_own": 30, "size": 0.4}
    assert apart(values, {"fidelity": 0.88}, {"fidelity": (0.01, 0.03)}, **same) == []
    assert apart(values, {"fidelity": 0.6}, {"fidelity": (-0.1, 0.7)}, **same) == []
    text = " ".join(apart(values, {"fidelity": 0.6}, {"fidelity": (0.2, 0.4)}, **same))
    assert "0.900 on images learned from and 0.600 on held-out" in text
    assert "more pictures of each class (30 were learned from), or a larger size" in text
    shift = {"whole": (0.99, 0.8), "n_own": 3000, "size": 0.9}
    text = " ".join(apart(values, {"fidelity": 0.6}, {"fidelity": (0.2, 0.4)}, **shift))
    assert "another kind" in text
    assert text.endswith("other pictures to learn from, such as the held-out ones.")


def test_images_of_another_kind_show_in_the_verdict(known: PlantedCircuit) -> None:
    images, labels = known.held_out
    arch = known.circuit[1]
    lacking = {n: m.clone() for n, m in arch.masks.items()}
    first = arch.sites[0].name
    lacking[first][arch.kept[first][0]] = False
    noisy = images + 2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    result = verdict(
        known.model, arch._with_masks(lacking, 1), known.data, (noisy, labels), n_images=60
    )
    text = " ".join(result.held_out_sentences(1))
    assert "another kind" in text
    assert text in " ".join(result.summary().split("\n  "))


def test_a_task_that_cannot_be_judged_is_not_asked(known: PlantedCircuit) -> None:
    images, labels = known.held_out
    some: Tensor = labels != 1
    circuits = [known.circuit[0], known.circuit[1]]
    held_out = images[some], labels[some]
    result = verdict(known.model, circuits, known.data, held_out, n_images=20)
    assert result.answers[1] == ("not asked",) * 5
    assert "0 of the task" in result.notes["1"][0]
    assert result.sentence(1).endswith("nothing could be asked.")
    full = SubArchitecture.full(known.sites)
    full = full._with_masks(full.masks, 0)
    found = verdict(known.model, full, known.data, known.held_out, n_images=20)
    assert "every channel" in found.notes["0"][0]


def test_results_do_not_depend_on_the_company_of_a_task(known: PlantedCircuit) -> None:
    both = [known.circuit[0], known.circuit[1], known.circuit[2]]
    options = {"n_images": 20, "seed": 3}
    first = verdict(known.model, both, known.data, known.held_out, **options)
    second = verdict(known.model, both[::-1], known.data, known.held_out, **options)
    assert np.allclose(first.value[:, :2], second.value[::-1, :2])
    assert np.array_equal(first.p[:, :2], second.p[::-1, :2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_random": 18}, "n_random=19 at least"),
        ({"level": 1.5}, "level must lie between 0 and 1"),
        ({"n_images": 3}, "n_images"),
        ({"replicas": [[]]}, "no sub-architecture"),
    ],
)
def test_wrong_arguments_are_named(
    known: PlantedCircuit, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        verdict(known.model, known.circuit[0], known.data, known.held_out, **options)
