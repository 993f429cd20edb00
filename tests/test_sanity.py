"""Controls: random weights, shuffled labels, cascades, stability; models stay as they are."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from nad_attr import GateSite, Recipe, RunOptions, SubArchitecture, learn_gates
from nad_attr.data.sources import as_source
from nad_attr.evaluation import (
    Control,
    PlantedCircuit,
    SanityReport,
    cascading_randomisation,
    planted,
    random_weights,
    sanity,
    shuffled_labels,
    stability,
)
from nad_attr.gating.hooks import recorded
from tests import helpers
from tests.helpers import assert_model_untouched


def same(a: nn.Module, b: nn.Module) -> dict[str, bool]:
    """Which tensors of the state are equal."""
    other = b.state_dict()
    return {name: torch.equal(value, other[name]) for name, value in a.state_dict().items()}


# -- Random weights ----------------------------------------------------------------------------


def test_all_parameters_are_drawn_anew_and_the_model_is_untouched(
    tiny_model: nn.Module, tiny_data: tuple[Tensor, Tensor]
) -> None:
    with assert_model_untouched(tiny_model, *tiny_data):
        drawn = random_weights(tiny_model, 1, data=tiny_data)
    equal = same(tiny_model, drawn)
    # LayerNorms start at 1 and 0, where those of the tiny transformer still are.
    assert {name for name, kept in equal.items() if kept} <= {
        name for name in equal if "norm" in name or name.endswith(("bias", "num_batches_tracked"))
    }
    assert not any(module.training for module in drawn.modules())
    assert all(p.grad is None and p.dtype == torch.float64 for p in drawn.parameters())
    assert not any(
        p.data_ptr() == q.data_ptr()
        for p, q in zip(tiny_model.parameters(), drawn.parameters(), strict=True)
    )


def test_untouched_also_after_an_exception(tiny_cnn: nn.Module) -> None:
    wrong = torch.zeros(4, 5, 8, 8, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="cannot be run"), assert_model_untouched(tiny_cnn):
        random_weights(tiny_cnn, data=wrong)
    tiny_cnn.train()
    with pytest.raises(ValueError, match="train mode"), assert_model_untouched(tiny_cnn):
        random_weights(tiny_cnn)


def test_a_seed_is_a_draw_layer_by_layer(tiny_cnn: nn.Module) -> None:
    a, b, c = (random_weights(tiny_cnn, seed) for seed in (0, 0, 1))
    assert all(same(a, b).values())
    assert not same(a, c)["conv1.weight"]
    part = random_weights(tiny_cnn, 0, layers=["conv2"])
    equal, of_all = same(tiny_cnn, part), same(a, part)
    assert [name for name, kept in equal.items() if not kept] == ["conv2.weight", "conv2.bias"]
    assert of_all["conv2.weight"]
    with pytest.raises(ValueError, match="no module 'conv9'"):
        random_weights(tiny_cnn, layers=["conv9"])


def test_batchnorm_statistics_are_those_of_the_data(
    tiny_cnn: nn.Module, tiny_data: tuple[Tensor, Tensor]
) -> None:
    drawn = random_weights(tiny_cnn, data=tiny_data, run=RunOptions(batch_size=12))
    with torch.no_grad():
        before = drawn.conv1(tiny_data[0])
    torch.testing.assert_close(drawn.bn1.running_mean, before.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(drawn.bn1.running_var, before.var(dim=(0, 2, 3)))
    assert drawn.bn1.momentum == tiny_cnn.bn1.momentum == 0.1
    without = random_weights(tiny_cnn)
    assert without.bn1.running_mean.abs().max() == 0


class Scale(nn.Module):
    """A parameter of its own, and no way to reset it."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(2.0, 4.0, 5000).view(50, 100))
        self.one = nn.Parameter(torch.full((3,), 7.0))


def test_without_reset_parameters_it_is_a_normal_of_the_same_mean_and_deviation() -> None:
    model = Scale().eval()
    drawn = random_weights(model)
    assert not torch.equal(drawn.scale, model.scale)
    assert float(drawn.scale.detach().mean()) == pytest.approx(3.0, abs=0.05)
    assert float(drawn.scale.detach().std()) == pytest.approx(
        float(model.scale.detach().std()), rel=0.05
    )
    assert torch.equal(drawn.one, model.one), "what does not vary stays"


def test_weight_normalisation_hides_nothing() -> None:
    with torch.random.fork_rng(devices=[]):
        new = nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)).eval()
    drawn = random_weights(new)
    assert not torch.equal(drawn.weight, new.weight)


# -- Cascade -----------------------------------------------------------------------------------


def test_a_cascade_starts_at_the_output_and_ends_all_random(
    tiny_cnn: nn.Module, tiny_data: tuple[Tensor, Tensor]
) -> None:
    with assert_model_untouched(tiny_cnn, *tiny_data):
        stages = list(cascading_randomisation(tiny_cnn, tiny_data, seed=2))
    assert [name for name, _ in stages] == ["linear", "conv2", "bn1", "conv1"]
    for i, (_, network) in enumerate(stages):
        changed = [n for n, kept in same(tiny_cnn, network).items() if not kept]
        reached = {name.split(".")[0] for name in changed}
        assert reached == {"linear", "conv2", "bn1", "conv1"} & {n for n, _ in stages[: i + 1]}
    assert all(same(stages[-1][1], random_weights(tiny_cnn, 2, data=tiny_data)).values())


class Backwards(nn.Module):
    """Layers that are registered in the other order than they run."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(3, 2), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def test_the_order_is_that_of_the_run() -> None:
    model, data = helpers.build(Backwards).float(), (torch.ones(4, 4), torch.tensor([0, 1, 0, 1]))
    assert [name for name, _ in cascading_randomisation(model, data)] == ["last", "first"]
    assert [name for name, _ in cascading_randomisation(model, data, stages=1)] == ["first"]
    for wrong in (0, 1.5, True):
        with pytest.raises(ValueError, match="stages"):
            cascading_randomisation(model, data, stages=wrong)
    with pytest.raises(ValueError, match="no parameters"):
        cascading_randomisation(nn.Sequential(nn.ReLU()).eval(), data)


# -- Labels ------------------------------------------------------------------------------------


class Numbers(Dataset[tuple[Tensor, int]]):
    """Image i holds the number i."""

    def __init__(self, labels: Sequence[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return torch.full((2,), float(i)), self.labels[i]


@given(labels=st.lists(st.integers(0, 4), min_size=1, max_size=30), seed=st.integers(0, 9))
@settings(max_examples=25)
def test_labels_are_dealt_out_alike_for_every_kind_of_data(labels: list[int], seed: int) -> None:
    x, y = torch.arange(len(labels)).float()[:, None].expand(-1, 2), torch.tensor(labels)
    pair = shuffled_labels((x, y), seed)
    expected = pair[1].tolist()
    assert sorted(expected) == sorted(labels)
    assert torch.equal(pair[0], x)
    kinds = (TensorDataset(x, y), Numbers(labels), DataLoader(Numbers(labels), batch_size=4))
    for data in kinds:
        dealt = shuffled_labels(data, seed)
        assert isinstance(dealt, DataLoader) == isinstance(data, DataLoader)
        source = as_source(dealt)
        assert source.labels.tolist() == expected
        [inputs] = source.batches([[(i, 0) for i in range(len(labels))]])
        assert torch.equal(inputs[0], x)


def test_another_seed_another_deal() -> None:
    data = torch.zeros(60, 1), torch.arange(60) % 3
    deals = [shuffled_labels(data, seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(deals[0], deals[1])
    assert not torch.equal(deals[0], deals[2])
    with pytest.raises(TypeError, match="data must be"):
        shuffled_labels(3)


# -- Stability ---------------------------------------------------------------------------------

SITES = (GateSite("a", 4, 1), GateSite("b", 2, 1))
PAIR = torch.zeros(12, 1), torch.arange(12) % 3


def keeping(**kept: list[int]) -> list[SubArchitecture]:
    """One sub-architecture, of task 1."""
    return [SubArchitecture.from_kept(kept, SITES, task=1)]


def test_kappas_by_hand() -> None:
    calls: list[tuple[int, list[int]]] = []

    def learn(model: nn.Module, data: object, seed: int) -> list[SubArchitecture]:
        labels = as_source(data).labels
        calls.append((seed, labels.bincount().tolist()))
        if len(labels) == 12:
            # Site a: half in common is what chance gives, kappa 0. Site b: equal, kappa 1.
            return keeping(a=[0, 1] if seed == 5 else [1, 2], b=[0])
        return keeping(a=[0, 1], b=[0])

    result = stability(nn.Identity().eval(), learn, PAIR, seeds=(5, 6), images_per_class=(1,))
    assert calls == [
        (5, [4, 4, 4]),
        (6, [4, 4, 4]),
        *[(5, [2, 2, 2])] * 2,
        *[(6, [2, 2, 2])] * 2,
        (5, [1, 1, 1]),
    ]
    assert result.tasks == (1,)
    assert result.seeds.tolist() == [[0.5]]
    assert result.halves.tolist() == [[1.0], [1.0]]
    assert result.images[1].tolist() == [1.0]
    assert len(result.frame()) == 4
    assert "images per class" in result.summary()
    assert json.loads(json.dumps(result.to_dict()))["means"]["seeds"] == 0.5


def test_halves_are_disjoint_and_leave_nothing_out() -> None:
    seen: list[list[float]] = []

    def learn(model: nn.Module, data: object, seed: int) -> list[SubArchitecture]:
        seen.append(data[0].flatten().tolist())
        return keeping(a=[0])

    data = torch.arange(13.0)[:, None], torch.arange(13) % 3
    stability(nn.Identity().eval(), learn, data, seeds=(0, 1))
    for first, second in (seen[2:4], seen[4:6]):
        assert sorted(first + second) == list(range(13))
    assert sorted(seen[2]) != sorted(seen[4]), "another cut for each seed"


def test_stability_refuses() -> None:
    def learn(model: nn.Module, data: object, seed: int) -> list[SubArchitecture]:
        return keeping(a=[0])

    def fickle(model: nn.Module, data: object, seed: int) -> list[SubArchitecture]:
        return [SubArchitecture.from_kept({}, SITES, task=seed)]

    net = nn.Identity().eval()
    for arguments, words in (
        ({"seeds": ()}, "seeds"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"images_per_class": (5,)}, "1 to 4"),
        ({"images_per_class": (0,)}, "1 to 4"),
    ):
        with pytest.raises(ValueError, match=words):
            stability(net, learn, PAIR, **arguments)
    with pytest.raises(ValueError, match="halves=False"):
        stability(net, learn, (torch.zeros(2, 1), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="the tasks"):
        stability(net, fickle, PAIR, seeds=(0, 1))
    with pytest.raises(TypeError, match="learn must return"):
        stability(net, lambda *_: 3, PAIR)
    with pytest.raises(ValueError, match="with its task"):
        stability(net, lambda *_: [SubArchitecture.full(SITES)], PAIR)


# -- The report --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known() -> PlantedCircuit:
    return planted("plain", n_classes=4, circuit_width=2, depth=2, width=12, n_images=80)


@pytest.fixture(scope="module")
def report(known: PlantedCircuit) -> SanityReport:
    def learn(model: nn.Module, data: object, seed: int) -> object:
        recipe = Recipe(size=known.size, steps=24, images_per_step=12)
        return learn_gates(model, data, recipe=recipe, sites=known.sites, seed=seed)

    with assert_model_untouched(known.model, *known.data, *known.held_out):
        return sanity(
            known.model,
            learn,
            known.data,
            known.held_out,
            n_random=4,
            n_networks=2,
            stages=1,
            seeds=(0, 1),
            images_per_class=(5,),
        )


def test_the_gain_is_there_and_vanishes_where_it_has_to(report: SanityReport) -> None:
    trained = report["trained network"]
    assert trained.own_auc.shape == (1, 4)
    assert trained.gain.mean() > 0.3
    assert report.vanishes("trained network") is False
    # Two networks and four tasks cannot show that a gain is within 0.05: that is not "gone".
    assert report.vanishes("random weights") is None
    assert report["random weights"].equivalence_p(0.3) < 0.05
    assert report["random weights"].own_auc.shape == (2, 4)
    assert report.vanishes("labels shuffled for measuring", margin=0.1) is True
    wrong = report["labels shuffled for measuring"]
    assert abs(wrong.own_auc.mean() - 0.5) < 0.1
    # The default recipe keeps what the network computes, whatever the images are called.
    assert report["labels shuffled for learning"].own_auc.mean() > 0.9


def test_the_random_networks_are_those_of_random_weights(
    report: SanityReport, known: PlantedCircuit
) -> None:
    # Independently: AUC of output k by counting pairs, in the networks of the report's seeds.
    from nad_attr.system.rng import seed_of

    x, y = known.held_out
    for d in range(2):
        network = random_weights(known.model, seed_of("sanity", 0, d), data=known.data)
        with torch.no_grad():
            z = network(x)
        for k in known.tasks:
            own, other = z[y == k, k], z[y != k, k]
            pairs = own[:, None] - other[None]
            auc = float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2)
            assert report["random weights"].whole_auc[d, k] == pytest.approx(auc, abs=1e-3)


def test_the_report_in_all_forms(report: SanityReport) -> None:
    names = [control.name for control in report.controls]
    assert names[:4] == [
        "trained network",
        "random weights",
        "labels shuffled for learning",
        "labels shuffled for measuring",
    ]
    assert names[4:] == ["random down to conv1"]
    text = report.summary()
    assert all(name in text for name in names)
    assert "kappa" in text
    frame = report.frame()
    assert len(frame) == (1 + 2 + 2 + 2 + 1) * 4
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert plain["verdicts"]["trained network"]["means"]["gain"] == pytest.approx(
        report["trained network"].gain.mean()
    )
    assert plain["stability"]["means"]["seeds"] > 0.9
    assert "trained network +" in repr(report)
    with pytest.raises(KeyError, match="no control 'none'"):
        report["none"]


def test_gain_and_whether_it_vanishes_by_hand() -> None:
    flat = np.full((1, 3), 0.5)

    def control(name: str, own: list[float]) -> Control:
        return Control(name, flat, np.array([own]), flat, flat, flat)

    nan = float("nan")
    report = SanityReport(
        (0, 1, 2),
        (
            control("all above", [0.6, 0.7, 0.9]),
            control("all below", [0.1, 0.2, 0.3]),
            control("about", [0.4, 0.5, 0.65]),
            control("near", [0.49, 0.5, 0.52]),
            control("equal", [0.5, 0.5, 0.5]),
            control("equally far", [0.6, 0.6, 0.6]),
            control("nothing known", [nan, nan, nan]),
            control("one task known", [0.5, nan, nan]),
        ),
    )
    np.testing.assert_allclose(report["all above"].gain, [[0.1, 0.2, 0.4]])
    expected = {
        "all above": False,
        "all below": False,
        "about": None,  # from -0.1 to 0.15: wide, which shows nothing
        "near": True,
        "equal": True,
        "equally far": False,
        "nothing known": None,
        "one task known": None,
    }
    assert {c.name: report.vanishes(c.name) for c in report.controls} == expected
    # Another margin, another question.
    assert report.vanishes("about", margin=0.5) is True
    assert report.vanishes("near", margin=0.01) is None
    se = np.std([-0.01, 0, 0.02], ddof=1) / np.sqrt(3)
    t = (0.05 - 0.01 / 3) / se
    assert report["near"].equivalence_p() == pytest.approx(stats.t.sf(t, df=2))
    words = {line.split("  ")[0]: line.split()[-1] for line in report.summary().splitlines()}
    assert {words[n] for n, v in expected.items() if v is None} == {"unknown"}
    assert (words["near"], words["all above"]) == ("gone", "there")
    listed = {n: v["vanishes"] for n, v in report.to_dict()["verdicts"].items()}
    assert listed == expected
    assert report.to_dict()["verdicts"]["near"]["margin"] == 0.05
    for margin in (0, -1.0, True, None, nan):
        with pytest.raises(ValueError, match="margin must be"):
            report.vanishes("near", margin=margin)


def test_wide_gains_are_called_gone_in_one_of_twenty_at_most() -> None:
    """Of gains whose true mean lies at the margin, the test says "gone" at its level."""
    generator = np.random.default_rng(0)
    flat = np.zeros((1, 6))
    said = 0
    for _ in range(400):
        gains = 0.05 + 0.02 * generator.normal(size=(1, 6))
        said += Control("", flat, gains, flat, flat, flat).equivalence_p() <= 0.05
    assert said / 400 < 0.08


def test_sanity_refuses(known: PlantedCircuit) -> None:
    def learn(model: nn.Module, data: object, seed: int) -> list[SubArchitecture]:
        raise AssertionError("bad arguments are told before work is done")

    for arguments in ({"n_random": 0}, {"n_networks": 0}, {"stages": -1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            sanity(known.model, learn, known.data, known.held_out, **arguments)
    with pytest.raises(TypeError, match="learn must be a function"):
        sanity(known.model, 3, known.data, known.held_out)
    # What learn raises comes through, and the network is as it was.
    with pytest.raises(AssertionError, match="before work"), assert_model_untouched(known.model):
        sanity(known.model, learn, known.data, known.held_out)


def test_what_learn_sees_is_hook_free(known: PlantedCircuit) -> None:
    networks: list[nn.Module] = []

    def learn(model: nn.Module, data: object, seed: int) -> list[SubArchitecture]:
        networks.append(model)
        return [known.circuit[0]]

    sanity(known.model, learn, known.data, known.held_out, n_random=1, n_networks=1, stages=1)
    # Trained, random, the trained one with shuffled labels, half random.
    assert [network is known.model for network in networks] == [True, False, True, False]
    assert not any(module._forward_hooks for network in networks for module in network.modules())
    with torch.no_grad(), recorded(networks[1], known.sites) as activations:
        networks[1](known.data[0][:2])
    assert set(activations) == {site.name for site in known.sites}
