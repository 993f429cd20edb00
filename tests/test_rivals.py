"""Rivals of today against brute force and closed forms, on networks of a few channels."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import GateSite, Recipe, fit_constants, gated
from nad_attr.evaluation import (
    MIB_SIZES,
    CentredEffectScorer,
    COARScorer,
    EAPIGScorer,
    HardConcreteScorer,
    IterativeScorer,
    RelPScorer,
    UGSScorer,
    circuit_areas,
    curves,
    top_k,
)
from nad_attr.scoring.searching import (
    component_effects,
    expected_gate,
    hard_concrete,
    open_probability,
    uniform_gates,
    window_gradient,
)
from tests import helpers

F64 = {"dtype": torch.float64}
WEIGHTS = torch.tensor([3.0, -2.0, 1.0, 0.5]).double()


def linear() -> tuple[nn.Module, GateSite]:
    """z_0 = weights . x: closing channel c at its mean changes z_0 by -weight (x - mean)."""
    net = nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False)).double().eval()
    with torch.no_grad():
        net[1].weight.copy_(torch.stack([WEIGHTS, torch.zeros(4)]))
    return net, GateSite("0", 4, 1)


class Bent(nn.Module):
    """Two sites with a ReLU between: channels at 0 change what those at 1 do."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.first, self.act = nn.Linear(4, 4), nn.ReLU()
        self.second, self.act2, self.last = nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self.double().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act2(self.second(self.act(self.first(x)))))


SITES = [GateSite("act", 4, 1), GateSite("act2", 3, 1)]
MEANS = {"act": torch.tensor([0.5, 0.25, 1.0, 0.0]), "act2": torch.tensor([0.5, 1.0, 0.25])}


def some_images(n: int = 6) -> tuple[Tensor, Tensor]:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, torch.arange(n) % 2


def closed(net: nn.Module, x: Tensor, gates: dict[str, Tensor], sites: list[GateSite]) -> Tensor:
    means = {site.name: MEANS[site.name].double() for site in sites}
    with torch.no_grad(), gated(net, gates, sites=sites, means=means):
        return net(x)


@pytest.mark.parametrize(
    ("scorer", "options"),
    [
        (CentredEffectScorer, {}),
        (EAPIGScorer, {"steps": 3}),
        (EAPIGScorer, {"steps": 3, "path": "gates"}),
        (RelPScorer, {"gamma": 0.0}),
        (COARScorer, {"share": 0.5, "ridge": 0.0, "passes": 60, "images_per_step": 20}),
    ],
)
def test_all_agree_on_a_linear_network(scorer, options) -> None:
    """Closing a channel changes the output by weight times (mean - x), whatever else is closed."""
    net, site = linear()
    x = torch.tensor([[1.0, 2.0, -1.0, 4.0], [0.0, 0.0, 0.0, 0.0]]).double()
    means = {"0": torch.tensor([0.5, 0.0, 1.0, 4.0])}
    found = scorer(net, [site], signed=True, means=means, **options)(
        x, torch.tensor([0, 1]), tasks=[0], **F64
    )["0"][0]
    expected = WEIGHTS * (x[0] - means["0"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_eap_ig_of_inputs_on_a_linear_network() -> None:
    """The way starts at the mean image."""
    net, site = linear()
    x = torch.tensor([[1.0, 2.0, -1.0, 4.0], [0.0, 0.0, 3.0, 0.0]]).double()
    scorer = EAPIGScorer(net, [site], path="inputs", steps=2, signed=True)
    found = scorer(x, torch.tensor([0, 1]), tasks=[0], **F64)["0"][0]
    torch.testing.assert_close(found, WEIGHTS * (x[0] - x.mean(0)))


@pytest.mark.parametrize("path", ["activations", "gates"])
def test_eap_ig_is_complete(path: str) -> None:
    """Many steps: a site's scores sum to what closing it changes, or all to what closing all."""
    net = Bent()
    x, y = some_images()
    scores = EAPIGScorer(net, SITES, path=path, steps=300, signed=True, means=MEANS)(
        x, y, tasks=[0], **F64
    )
    own = x[y == 0]
    for group in [[s] for s in SITES] if path == "activations" else [SITES]:
        shut = closed(net, own, {s.name: torch.zeros(s.n_channels).double() for s in group}, group)
        whole = net(own).detach()
        expected = (whole - shut)[:, 0].mean()
        assert abs(expected) > 0.1
        total = sum(scores[s.name].sum() for s in group)
        torch.testing.assert_close(total, expected, rtol=0.02, atol=0.01)


def test_eap_ig_is_the_sum_over_points() -> None:
    """Directly: gradients at j / 3 of the way of one site, times the whole way."""
    net = Bent()
    x, y = some_images(4)
    found = EAPIGScorer(net, SITES[:1], steps=3, signed=True, means=MEANS_FIRST)(
        x, y, tasks=[1], **F64
    )["act"][0]
    whole, start = net.act(net.first(x[y == 1])).detach(), MEANS["act"].double()
    total = torch.zeros(4).double()
    for j in (1, 2, 3):
        point = (start + (whole - start) * j / 3).requires_grad_()
        z = net.last(net.act2(net.second(point)))[:, 1].sum()
        total += ((whole - start) * torch.autograd.grad(z, point)[0]).mean(0) / 3
    torch.testing.assert_close(found, total)


MEANS_FIRST = {"act": MEANS["act"]}


@pytest.mark.parametrize("gamma", [0.0, 0.25, 2.0])
def test_relp_by_loops(gamma: float) -> None:
    """The gamma rule written with loops, for a site behind which there are two layers."""
    net = Bent()
    x, y = some_images()
    found = RelPScorer(net, SITES[:1], gamma=gamma, signed=True, means=MEANS_FIRST)(
        x, y, tasks=[1], **F64
    )["act"][0]

    def back(layer: nn.Linear, a: Tensor, c: Tensor) -> Tensor:
        z = layer(a)
        result = torch.zeros_like(a)
        for j in range(len(z)):
            bend = (lambda w: w.clamp(min=0)) if z[j] > 0 else (lambda w: w.clamp(max=0))
            w = layer.weight[j] + gamma * bend(layer.weight[j])
            bias = layer.bias[j] + gamma * bend(layer.bias[j])
            result += w * c[j] * z[j] / (w @ a + bias)
        return result

    total = torch.zeros(4).double()
    own = x[y == 1]
    with torch.no_grad():
        for image in own:
            a = net.act(net.first(image))
            b = net.act2(net.second(a))
            c = back(net.last, b, torch.tensor([0.0, 1.0]).double()) * (b > 0)
            total += (a - MEANS["act"]) * back(net.second, a, c) / len(own)
    torch.testing.assert_close(found, total, rtol=1e-6, atol=1e-8)


def test_relp_of_smooth_activations() -> None:
    """f(x) / x in the gradient's place."""
    net = nn.Sequential(nn.Identity(), nn.GELU(), nn.Linear(2, 2, bias=False)).double().eval()
    x = torch.tensor([[1.5, -0.5], [0.0, 0.0]]).double()
    zero = {"0": torch.zeros(2)}
    found = RelPScorer(net, [GateSite("0", 2, 1)], gamma=0.0, signed=True, means=zero)(
        x, torch.tensor([0, 1]), tasks=[0], **F64
    )["0"][0]
    expected = nn.functional.gelu(x[0]) * net[2].weight[0].detach()
    torch.testing.assert_close(found, expected)
    with pytest.raises(ValueError, match="gamma must be 0 or more"):
        RelPScorer(net, [GateSite("0", 2, 1)], gamma=-1.0)
    norm = nn.Sequential(nn.LayerNorm(2)).eval()
    with pytest.raises(ValueError, match="RelP has no rule for module '0'"):
        RelPScorer(norm, [GateSite("0", 2, 1)])


# -- COAR --------------------------------------------------------------------------------------


def test_coar_is_least_squares_over_all_ablations() -> None:
    """All 2^7 masks of a network that is not linear: numpy's least squares with a constant."""
    net = Bent()
    x, _ = some_images(1)
    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=7))).double()
    gates = {"act": 1 - masks[:, :4], "act2": 1 - masks[:, 4:]}
    change = closed(net, x.expand(128, -1), gates, SITES)[:, 0]
    design = np.concatenate([masks.numpy(), np.ones((128, 1))], axis=1)
    expected = np.linalg.lstsq(design, change.numpy(), rcond=None)[0][:7]
    np.testing.assert_allclose(component_effects(masks, change), expected, atol=1e-9)


def test_coar_comes_to_the_regression_over_all_ablations_of_its_share() -> None:
    net = Bent()
    x, _ = some_images(2)
    x[1] = x[0]  # one image, and another class that does not count
    scorer = COARScorer(
        net, SITES, share=3 / 7, signed=True, ridge=0.0, passes=6000, images_per_step=2000,
        means=MEANS,
    )  # fmt: skip
    found = scorer(x, torch.tensor([0, 1]), tasks=[0], **F64)
    masks = torch.tensor(
        [[float(c in three) for c in range(7)] for three in itertools.combinations(range(7), 3)]
    ).double()
    gates = {"act": 1 - masks[:, :4], "act2": 1 - masks[:, 4:]}
    change = closed(net, x[:1].expand(len(masks), -1), gates, SITES)[:, 0]
    change = change - net(x[:1]).detach()[0, 0]
    expected = -np.linalg.lstsq(masks.numpy(), change.numpy(), rcond=None)[0]
    flat = torch.cat([found["act"], found["act2"]], 1)[0]
    np.testing.assert_allclose(flat, expected, atol=0.06 * np.abs(expected).max())


# -- Hard-concrete and uniform gates -----------------------------------------------------------


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 2.0])
def test_hard_concrete_gates_have_their_distribution(log_alpha: float) -> None:
    """P(0), P(1) and the whole distribution function, from all quantiles of the uniform number."""
    u = (torch.arange(200_000).double() + 0.5) / 200_000
    gates = hard_concrete(torch.tensor(log_alpha).double(), u)

    def below(value: float) -> float:
        """P(s <= value) of the binary concrete s: equation 24 of Maddison et al."""
        return 1 / (1 + math.exp(log_alpha - (2 / 3) * math.log(value / (1 - value))))

    shut, opened = below(0.1 / 1.2), 1 - below(1.1 / 1.2)
    assert (gates == 0).double().mean() == pytest.approx(shut, abs=1e-5)
    assert (gates == 1).double().mean() == pytest.approx(opened, abs=1e-5)
    for value in (0.2, 0.5, 0.9):
        share = (gates <= value).double().mean()
        assert share == pytest.approx(below((value + 0.1) / 1.2), abs=1e-5)
    assert open_probability(torch.tensor(log_alpha)) == pytest.approx(1 - shut, abs=1e-6)
    middle = min(1.0, max(0.0, 1.2 / (1 + math.exp(-log_alpha)) - 0.1))
    assert expected_gate(torch.tensor(log_alpha)) == pytest.approx(middle, abs=1e-6)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.8])
def test_uniform_gates_have_their_distribution(p: float) -> None:
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    gates = uniform_gates(torch.tensor(p).double(), u)
    window = p * (1 - p)
    assert (gates == 1).double().mean() == pytest.approx(p - window / 2, abs=1e-4)
    assert (gates == 0).double().mean() == pytest.approx(1 - p - window / 2, abs=1e-4)
    assert gates.mean() == pytest.approx(p, abs=1e-4)
    inside = gates[(gates > 0) & (gates < 1)]
    torch.testing.assert_close(
        inside.quantile(torch.tensor([0.25, 0.5, 0.75]).double()),
        torch.tensor([0.25, 0.5, 0.75]).double(), atol=1e-3, rtol=0,
    )  # fmt: skip


def test_ugs_estimates_the_derivative_of_the_expected_loss() -> None:
    """Over all 2^4 masks: d E[loss] / dp = E[loss | open] - E[loss | closed], loss quadratic."""
    p = torch.tensor([0.3, 0.5, 0.8, 0.6]).double()

    def loss(gates: Tensor) -> Tensor:
        return ((gates - 1) @ WEIGHTS).square()

    masks = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4))).double()
    weight = torch.where(masks > 0, p, 1 - p)
    expected = []
    for k in range(4):
        others = torch.cat([weight[:, :k], weight[:, k + 1 :]], 1).prod(1)
        expected.append((others * loss(masks) * (2 * masks[:, k] - 1)).sum())
    u = torch.rand(400_000, 4, generator=torch.Generator().manual_seed(0)).double()
    gates = uniform_gates(p, u).requires_grad_()
    (gradients,) = torch.autograd.grad(loss(gates).sum(), gates)
    found = window_gradient(gates.detach(), gradients)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0.02, atol=0.05)


# -- Learned masks -----------------------------------------------------------------------------


class Twice(nn.Module):
    """z_0 = 2 min(1, x_0 + x_1) + x_2: channels 0 and 1 are two copies of one, x_3 nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.site(x)
        z = 2 * (x[:, 0] + x[:, 1]).clamp(max=1) + x[:, 2]
        return torch.stack([z, -z], 1)


def redundant() -> tuple[nn.Module, GateSite, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(60, 4, generator=generator).double()
    x[:, 1] = x[:, 0] = (torch.arange(60) % 2 == 0).double() * 0.95
    return Twice().double().eval(), GateSite("site", 4, 1), x, torch.arange(60) % 2


def test_closing_step_by_step_keeps_one_of_two_copies() -> None:
    """One score sees no slope at either copy and closes both; closing one gives the other its."""
    net, site, x, y = redundant()
    means = {"site": torch.zeros(4)}
    once = CentredEffectScorer(net, [site], means=means)(x, y, tasks=[0])["site"][0]
    assert sorted(once.topk(2).indices.tolist()) == [2, 3] or once[:2].max() == 0
    scorer = IterativeScorer(net, [site], size=0.25, rounds=4, means=means)
    ranks = scorer(x, y, tasks=[0], include_others=True)["site"][0]
    assert int(ranks[:2].argmax()) == int(ranks.argmax())
    assert ranks[2] > ranks[:2].min()
    assert ranks[:2].max() >= 3 > ranks[3]


@pytest.mark.parametrize("scorer", [HardConcreteScorer, UGSScorer])
def test_learned_masks_find_the_best_pair_of_all(scorer) -> None:
    """Size 2 of 4: the least squared error over all six pairs, by brute force."""
    net, site, x, y = redundant()
    means = {"site": torch.zeros(4)}
    scores = scorer(net, [site], size=0.5, passes=8000, means=means)(
        x, y, tasks=[0], include_others=True
    )["site"][0]
    errors = {}
    for pair in itertools.combinations(range(4), 2):
        gates = torch.zeros(4).double()
        gates[list(pair)] = 1
        errors[pair] = (net(x * gates) - net(x))[:, 0].square().mean()
    best = min(errors, key=errors.__getitem__)
    assert best in ((0, 2), (1, 2))
    found = tuple(sorted(scores.topk(2).indices.tolist()))
    assert errors[found] == pytest.approx(float(errors[best]), abs=1e-9)


@pytest.mark.parametrize("scorer", [HardConcreteScorer, UGSScorer])
def test_the_expected_size_is_the_one_asked_for(scorer) -> None:
    """Of 60 channels that all count a little."""
    net = nn.Sequential(nn.Identity(), nn.Linear(60, 2)).double().eval()
    x = torch.randn(40, 60, generator=torch.Generator().manual_seed(0)).double()
    made = scorer(net, [GateSite("0", 60, 1)], size=0.3, passes=8000)
    numbers = made(x, torch.arange(40) % 2, include_others=True, **F64)["0"]
    torch.testing.assert_close(
        made.expected(numbers).mean(1), torch.full((2,), 0.3).double(), atol=0.03, rtol=0
    )


def test_best_constants_of_every_rival() -> None:
    """Their sub-architectures take constants as any other's, and keep the output better."""
    net, data = Bent(), some_images(60)
    recipe = Recipe(ablation="optimal", steps=4, images_per_step=20)
    for make in (HardConcreteScorer, UGSScorer, COARScorer, IterativeScorer, EAPIGScorer):
        options = {} if make is EAPIGScorer else {"passes": 80}
        scores = make(net, SITES, **options)(*data)
        archs = fit_constants(net, top_k(scores, SITES, [0, 1], 0.4), data, recipe=recipe)
        assert all(arch.own_constants and arch.size == 3 / 7 for arch in archs)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (UGSScorer, {"size": 0.0}, "size"),
        (UGSScorer, {"learning_rate": 0.0}, "learning_rate must be above 0"),
        (HardConcreteScorer, {"passes": 0}, "passes"),
        (COARScorer, {"share": 1.0}, "share must be above 0 and below 1"),
        (COARScorer, {"ridge": -1.0}, "ridge must be 0 or more"),
        (IterativeScorer, {"rounds": 50, "passes": 20}, "less than one image"),
        (EAPIGScorer, {"path": "edges"}, "path must be one of"),
        (EAPIGScorer, {"steps": 0}, "steps"),
    ],
)
def test_bad_options(make, options, message: str) -> None:
    net, site = linear()
    with pytest.raises(ValueError, match=message):
        make(net, [site], **options)


# -- MIB's curves ------------------------------------------------------------------------------


def test_circuit_areas_are_mib_sums() -> None:
    """The published sum, directly: trapezoids over shares, not divided."""
    f = np.array([0.0, 0.1, -0.2, 0.3, 0.9, 1.2, 1.1, 0.8, 0.95, 1.0])
    cpr = cmd = 0.0
    for i in range(9):
        width = MIB_SIZES[i + 1] - MIB_SIZES[i]
        cpr += width * (f[i] + f[i + 1]) / 2
        cmd += width * (abs(1 - f[i]) + abs(1 - f[i + 1])) / 2
    found = circuit_areas(MIB_SIZES, f)
    np.testing.assert_allclose([float(v) for v in found], [cpr, cmd], rtol=1e-12)
    perfect = circuit_areas(MIB_SIZES, np.ones((2, 10)))
    np.testing.assert_allclose(perfect[0], [0.999, 0.999])
    np.testing.assert_allclose(perfect[1], [0.0, 0.0])


def test_curves_give_mib_numbers() -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
    data = helpers.labelled_images(12)
    scores = CentredEffectScorer(model, sites)(*data)
    found = curves(model, scores, data, sites=sites, tasks=[0, 1, 2], sizes=MIB_SIZES)
    cpr, cmd = found.circuit_areas("own_auc")
    f = found.values("faithfulness", "own_auc")
    np.testing.assert_array_equal(cpr, circuit_areas(MIB_SIZES, f)[0])
    assert cmd.shape == (3,)
    assert "CPR" in found.summary()
    assert "CMD" in found.summary()
    fewer = curves(model, scores, data, sites=sites, tasks=[0, 1, 2], sizes=(0.2, 0.5))
    assert "CPR" not in fewer.summary()
