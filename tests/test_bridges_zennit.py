"""Zennit's heat-maps of a sub-architecture: what they equal, what they sum to, what they leave."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

pytest.importorskip("zennit", reason="the extra zennit is not installed")

from zennit.attribution import Gradient, IntegratedGradients, Occlusion, SmoothGrad
from zennit.canonizers import AttributeCanonizer, CompositeCanonizer, SequentialMergeBatchNorm
from zennit.composites import (
    COMPOSITES,
    EpsilonPlus,
    LayerMapComposite,
    NameMapComposite,
    layer_map_base,
)
from zennit.layer import Sum
from zennit.rules import Epsilon, Pass
from zennit.types import Activation, Linear

from nad_attr import GateSite, GatingError, SubArchitecture, TaskGates, gated
from nad_attr.bridges.zennit import (
    GateCanonizer,
    SubArchitectureAttributor,
    heatmap_image,
    named_composite,
)
from nad_attr.scoring.zennit_scorers import LRPScorer
from tests import helpers
from tests.folded import (
    RESIDUAL_SITES,
    SITES,
    into_next,
    into_same,
    plain,
    random_gates,
    random_means,
    residual,
    with_constants,
)

SMALL = 1e-12
#: The names of all composites that Zennit has, and what they need.
NEEDED: dict[str, dict[str, Any]] = {
    "epsilon_gamma_box": {
        "low": torch.tensor(-6.0, dtype=torch.float64),
        "high": torch.tensor(6.0, dtype=torch.float64),
    }
}


def epsilon(canonizers: list[Any] | None = None) -> LayerMapComposite:
    """Epsilon rule for every layer, with so small an epsilon that nothing is lost."""
    layers = [*layer_map_base(SMALL), (Linear, Epsilon(epsilon=SMALL))]
    return LayerMapComposite(layers, canonizers=canonizers)


def one_hot(output: Tensor, target: int) -> Tensor:
    return F.one_hot(torch.tensor([target] * len(output)), output.shape[1]).to(output)


def reference(model: nn.Module, x: Tensor, composite: Any, target: int = 1) -> Tensor:
    """Zennit's own heat-map of a network, begun at the target's output."""
    with Gradient(copy.deepcopy(model), composite) as attributor:
        return attributor(x, lambda output: output.detach() * one_hot(output, target))[1]


def through_gates(
    model: nn.Module, x: Tensor, composite: Any, gates: GateCanonizer, target: int = 1
) -> Tensor:
    with SubArchitectureAttributor(model, gates, composite) as attributor:
        return attributor(x, lambda output: output.detach() * one_hot(output, target))[1]


# ---------------------------------------------------------------------------------------------
# Equal to a network with the gates in its weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", [*COMPOSITES])
def test_every_composite_meets_the_folded_network(name: str, soft: bool) -> None:
    model, x, gates = plain(), helpers.images(4), random_gates(soft)
    make = lambda: named_composite(name, **NEEDED.get(name, {}))  # noqa: E731
    found = through_gates(model, x, make(), GateCanonizer(gates, sites=SITES))
    expected = reference(into_next(model, gates), x, make())
    whole = reference(model, x, make())
    # The stabilisers are added to other numbers: an activation before or after its gate.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))
    assert (found - whole).abs().max() > 0.05 * whole.abs().max()


@pytest.mark.parametrize("name", [n for n in COMPOSITES if n != "beta_smooth"])
def test_gates_in_the_layer_itself_give_the_same(name: str) -> None:
    # Beta-smooth looks at the ReLU's input, which this folding changes.
    model, x, gates = plain(), helpers.images(4), random_gates(True)
    make = lambda: named_composite(name, **NEEDED.get(name, {}))  # noqa: E731
    found = through_gates(model, x, make(), GateCanonizer(gates, sites=SITES))
    expected = reference(into_same(model, gates), x, make())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("with_means", [False, True], ids=["zero", "means"])
def test_exact_where_nothing_is_stabilised(soft: bool, with_means: bool) -> None:
    model, x, gates = plain(), helpers.images(4), random_gates(soft)
    means = random_means() if with_means else None
    canonizer = GateCanonizer(gates, sites=SITES, means=means)
    folded = into_next(model, gates, means)
    for canonizers in ([], [SequentialMergeBatchNorm()]):
        found = through_gates(model, x, epsilon(canonizers), canonizer)
        expected = reference(folded, x, epsilon(canonizers))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    for inner, kind, options in (
        ("gradient", Gradient, {}),
        ("integrated_gradients", IntegratedGradients, {"n_iter": 5}),
        ("occlusion", Occlusion, {"window": 4, "stride": 4}),
    ):
        attributor = SubArchitectureAttributor(model, canonizer, None, inner, **options)
        output, found = attributor(x, 2)
        start = (lambda o: o * one_hot(o, 2)) if kind is Occlusion else (lambda o: one_hot(o, 2))
        expected_output, expected = kind(folded, **options)(x, start)
        torch.testing.assert_close(output, expected_output, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "name",
    # Flat rules give a closed channel's first layer relevance in spite of its weights of zero.
    [n for n in COMPOSITES if n != "beta_smooth" and not n.endswith("_flat")],
)
def test_residual_networks_with_rules_on_neither_sums_nor_functions(name: str, soft: bool) -> None:
    model, gates, folded = residual(soft)
    x = helpers.images(2)
    make = lambda: named_composite(name, **NEEDED.get(name, {}))  # noqa: E731
    found = through_gates(model, x, make(), GateCanonizer(gates, sites=RESIDUAL_SITES))
    expected = reference(folded, x, make())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["epsilon_plus", "deconvnet", "guided_backprop"])
def test_zennits_own_attributor_inside_applied_gates(name: str) -> None:
    model, x, gates = plain(), helpers.images(2), random_gates(True)
    expected = reference(into_next(model, gates), x, named_composite(name))
    start = lambda output: output.detach() * one_hot(output, 1)  # noqa: E731
    with gated(model, gates, sites=SITES), Gradient(model, named_composite(name)) as attributor:
        found = attributor(x, start)[1]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))


def test_smooth_grad_has_its_own_seed() -> None:
    model, x, gates = plain(), helpers.images(2), random_gates(True)
    attributor = SubArchitectureAttributor(
        model, GateCanonizer(gates, sites=SITES), None, "smooth_grad", n_iter=4, seed=3
    )
    with helpers.assert_model_untouched(model, x):
        first, again = attributor(x, 0)[1], attributor(x, 0)[1]
    assert torch.equal(first, again)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        smooth = SmoothGrad(into_next(model, gates), n_iter=4)
        expected = smooth(x, lambda output: one_hot(output, 0))[1]
    torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-14)
    other = SubArchitectureAttributor(
        model, GateCanonizer(gates, sites=SITES), None, "smooth_grad", n_iter=4, seed=4
    )
    assert not torch.equal(first, other(x, 0)[1])


@pytest.mark.parametrize("order", ["first", "last"])
@pytest.mark.parametrize("name", ["epsilon_plus", "deconvnet"])
def test_a_users_own_composite_in_either_order(name: str, order: str) -> None:
    model, x, gates = plain(), helpers.images(4), random_gates(True)
    canonizers: list[Any] = [SequentialMergeBatchNorm()]
    canonizers.insert(0 if order == "first" else 1, GateCanonizer(gates, sites=SITES))
    found = reference(model, x, COMPOSITES[name](canonizers=canonizers))
    expected = reference(into_next(model, gates), x, named_composite(name))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5 * float(expected.abs().max()))


def test_rules_by_name_too() -> None:
    # No map of types would give such a composite a rule for a gate.
    model, x, gates = plain(bias=False), helpers.images(3), random_gates(True)
    layers = [(["conv1", "conv2", "linear"], Epsilon(epsilon=SMALL)), (["relu1", "relu2"], Pass())]
    canonizers = [CompositeCanonizer([SequentialMergeBatchNorm()])]
    composite = NameMapComposite(layers, canonizers=canonizers)
    with SubArchitectureAttributor(model, GateCanonizer(gates, sites=SITES), composite) as a:
        output, relevance = a(x, 1)
    torch.testing.assert_close(relevance.sum((1, 2, 3)), output[:, 1], rtol=1e-9, atol=1e-9)


def test_rules_switched_off_leave_the_gated_gradient() -> None:
    model, x, gates = plain(), helpers.images(2).requires_grad_(), random_gates(True)
    composite = epsilon([GateCanonizer(gates, sites=SITES)])
    with composite.context(model):
        output = model(x)[:, 1].sum()
        with composite.inactive():
            found = torch.autograd.grad(output, x)[0]
    expected = torch.autograd.grad(into_next(model, gates)(x)[:, 1].sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


# ---------------------------------------------------------------------------------------------
# Conservation
# ---------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block without biases, whose sum is a module that a rule can be put on."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n, n, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(n)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(n, n, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(n)
        self.sum = Sum()
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(self.sum(torch.stack([x, y], dim=-1)))


def residual_blocks() -> nn.Module:
    model = helpers.build(
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1, bias=False),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            Block(4),
            Block(4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3, bias=False),
        )
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.bias.data.zero_()
            module.running_mean.zero_()
            module.eps = 1e-30
    return model


CASES = {
    "plain": (lambda: plain(bias=False), SITES, ()),
    "merged": (lambda: plain(bias=False), SITES, (SequentialMergeBatchNorm,)),
    "residual": (
        residual_blocks,
        [GateSite("2", 4, 1), GateSite("3", 4, 1), GateSite("4", 4, 1)],
        (SequentialMergeBatchNorm,),
    ),
    "inside a block": (
        residual_blocks,
        [GateSite("3.relu1", 4, 1), GateSite("3.bn2", 4, 1), GateSite("4.relu2", 4, 1)],
        (SequentialMergeBatchNorm,),
    ),
}


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("case", CASES)
def test_relevance_sums_to_the_gated_logit(case: str, soft: bool) -> None:
    make, sites, canonizers = CASES[case]
    model, x = make(), helpers.images(4)
    generator = torch.Generator().manual_seed(5)
    gates = {
        site.name: torch.rand(site.n_channels, generator=generator, dtype=torch.float64)
        for site in sites
    }
    if not soft:
        gates = {name: (gate >= gate.median()).double() for name, gate in gates.items()}
    with gated(model, gates, sites=sites), torch.no_grad():
        logits = model(x)[:, 1]
    composite = epsilon([kind() for kind in canonizers])
    with SubArchitectureAttributor(model, GateCanonizer(gates, sites=sites), composite) as a:
        output, relevance = a(x, 1)
    torch.testing.assert_close(output[:, 1].detach(), logits, rtol=1e-9, atol=1e-12)
    assert logits.abs().max() > 1e-2
    torch.testing.assert_close(relevance.sum((1, 2, 3)), logits, rtol=1e-9, atol=1e-9)


def test_closed_channels_at_their_mean_keep_their_share() -> None:
    # The network is homogeneous in images and means together: the logit is the sum of both shares.
    model, x, gates, means = plain(bias=False), helpers.images(4), random_gates(False), {}
    means = {name: mean.requires_grad_() for name, mean in random_means().items()}
    with gated(model, gates, sites=SITES, means=means):
        logits = model(x)[:, 1]
        rows = []
        for logit in logits:
            grads = torch.autograd.grad(logit, list(means.values()), retain_graph=True)
            rows.append(sum((m * g).sum() for m, g in zip(means.values(), grads, strict=True)))
    shares = torch.stack(rows).detach()
    constants = {name: mean.detach() for name, mean in means.items()}
    canonizer = GateCanonizer(gates, sites=SITES, means=constants)
    output, relevance = SubArchitectureAttributor(model, canonizer, epsilon())(x, 1)
    torch.testing.assert_close(
        relevance.sum((1, 2, 3)), logits.detach() - shares, rtol=1e-9, atol=1e-9
    )
    assert shares.abs().min() > 1e-3
    assert torch.allclose(output[:, 1], logits)


# ---------------------------------------------------------------------------------------------
# Gates before a BatchNorm
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_means", [False, True], ids=["zero", "means"])
@pytest.mark.parametrize("at_input", [False, True], ids=["output of conv1", "input of bn1"])
def test_gate_before_a_merged_batch_norm(at_input: bool, with_means: bool) -> None:
    model, x = plain(), helpers.images(4)
    site = GateSite("bn1" if at_input else "conv1", 6, 1, at_input)
    gate = torch.tensor([1, 0, 0.3, 1, 0, 0.8], dtype=torch.float64)
    mean = torch.linspace(-1, 1, 6, dtype=torch.float64)
    means = {site.name: mean} if with_means else None
    canonizer = GateCanonizer({site.name: gate}, sites=[site], means=means)
    composite = epsilon([SequentialMergeBatchNorm()])
    with SubArchitectureAttributor(model, canonizer, composite) as attributor:
        output, relevance = attributor(x, 1)

    folded = copy.deepcopy(model)
    folded.conv1.weight.data *= gate[:, None, None, None]
    folded.conv1.bias.data = folded.conv1.bias.data * gate + (
        (1 - gate) * mean if with_means else 0
    )
    torch.testing.assert_close(output, folded(x), rtol=1e-12, atol=1e-12)
    # What the merged layer adds is its bias, gated or not.
    expected = reference(folded, x, epsilon([SequentialMergeBatchNorm()]))
    torch.testing.assert_close(relevance, expected, rtol=1e-8, atol=1e-10)


def test_gate_behind_the_merge_is_refused_where_it_cannot_be_known() -> None:
    model, x = plain(), helpers.images(2)
    gate = {"conv1": torch.tensor([1.0, 0, 0, 1, 1, 1])}
    canonizer = GateCanonizer(gate, sites=[GateSite("conv1", 6, 1)])
    composite = EpsilonPlus(canonizers=[SequentialMergeBatchNorm(), canonizer])
    with pytest.raises(GatingError, match="put GateCanonizer before the merging canonizer"):
        composite.register(model)
    composite.remove()
    composite = EpsilonPlus(canonizers=[canonizer, SequentialMergeBatchNorm()])
    with composite.context(model):
        found = model(x)
    with gated(model, gate, sites=[GateSite("conv1", 6, 1)]):
        torch.testing.assert_close(found, model(x))


class OutOfOrder(nn.Module):
    """Lists a BatchNorm behind a layer that it does not read."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.bn = nn.BatchNorm2d(3)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.bn(x)))


def test_modules_listed_out_of_order_are_refused() -> None:
    model, x = helpers.build(OutOfOrder), helpers.images(2)
    closed = SubArchitecture.from_kept({"conv": [0]}, [GateSite("conv", 3, 1)])
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="listed before"):
        SubArchitectureAttributor(model, closed, "epsilon_plus")(x, 1)
    pooled = SubArchitecture.from_kept({"head.0": [0]}, [GateSite("head.0", 3, 1)])
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="canonizers"):
        SubArchitectureAttributor(model, pooled, "epsilon_plus")(x, 1)
    composite = named_composite("epsilon_plus", canonizers=[])
    with helpers.assert_model_untouched(model):
        SubArchitectureAttributor(model, pooled, composite)(x, 1)


# ---------------------------------------------------------------------------------------------
# Targets
# ---------------------------------------------------------------------------------------------


def test_every_kind_of_target() -> None:
    model, x = plain(), helpers.images(3)
    arch = SubArchitecture(
        {name: gate > 0 for name, gate in random_gates(False).items()}, SITES, task=2
    )
    with SubArchitectureAttributor(model, arch, epsilon()) as attributor:
        output, own = attributor(x)
        for target in (2, torch.tensor(2), torch.tensor([2]), [2, 2, 2], torch.tensor([2, 2, 2])):
            assert torch.equal(attributor(x, target)[1], own)
        rows = one_hot(output, 2)
        assert torch.equal(attributor(x, rows * output.detach())[1], own)
        assert torch.equal(attributor(x, lambda o: o.detach() * rows)[1], own)
        unit = attributor(x, rows.long())[1]
        torch.testing.assert_close(unit, own / output.detach()[:, 2, None, None, None])
        mixed = attributor(x, [0, 1, 2])[1]
        for i in range(3):
            torch.testing.assert_close(mixed[i : i + 1], attributor(x[i : i + 1], i)[1])
        for wrong, error in (
            (3, ValueError),
            (-1, ValueError),
            ([0, 1], ValueError),
            ((0, 1), ValueError),
            (1.5, ValueError),
            ("cat", TypeError),
            (torch.ones(3, 2), ValueError),
        ):
            with pytest.raises(error, match=r"target"):
                attributor(x, wrong)
    # A gradient begins with one.
    gradient = SubArchitectureAttributor(model, arch)(x)[1]
    with arch.applied(model):
        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(model(leaf)[:, 2].sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected)
    with pytest.raises(ValueError, match="no target"):
        SubArchitectureAttributor(model, GateCanonizer(arch))(x)
    assert SubArchitectureAttributor(model, GateCanonizer(arch), attr_output=0)(x)[1].any()


def test_task_gates_and_one_gate_vector_for_each_image() -> None:
    model, x = plain(), helpers.images(2)
    rows = [random_gates(True, seed) for seed in (0, 1)]
    gates = TaskGates(
        {s.name: torch.stack([r[s.name] for r in rows]) for s in SITES}, SITES, [0, 1]
    )
    both = SubArchitectureAttributor(model, GateCanonizer(gates, tasks=[0, 1]), "epsilon_plus")
    found = both(x, [0, 1])[1]
    for i in range(2):
        one = SubArchitectureAttributor(model, GateCanonizer(gates, tasks=i), "epsilon_plus")
        torch.testing.assert_close(found[i : i + 1], one(x[i : i + 1], i)[1])


# ---------------------------------------------------------------------------------------------
# Nothing is left behind
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["epsilon_plus", "epsilon_gamma_box", "deconvnet", None])
def test_the_model_is_left_as_it_was(name: str | None) -> None:
    model, x, gates = plain(), helpers.images(2), random_gates(False)
    composite = None if name is None else named_composite(name, **NEEDED.get(name, {}))
    attributor = SubArchitectureAttributor(model, GateCanonizer(gates, sites=SITES), composite)
    with helpers.assert_model_untouched(model, x):
        attributor(x, 1)
        with attributor:
            attributor(x, 1)
            attributor(x, 0)
        with attributor:
            pass  # not run at all
    with (
        helpers.assert_model_untouched(model, x),
        pytest.raises(RuntimeError, match="mine"),
        attributor,
    ):
        attributor(x, 1)
        raise RuntimeError("mine")
    with helpers.assert_model_untouched(model, x), pytest.raises(RuntimeError):
        attributor(x[:, :1], 1)  # no image of three colours


def test_a_canonizer_that_fails_leaves_nothing() -> None:
    def fails(name: str, module: nn.Module) -> None:
        raise ArithmeticError(name)

    model, x = plain(), helpers.images(2)
    canonizers = [SequentialMergeBatchNorm(), AttributeCanonizer(fails)]
    gates = GateCanonizer(random_gates(False), sites=SITES)
    attributor = SubArchitectureAttributor(model, gates, EpsilonPlus(canonizers=canonizers))
    with helpers.assert_model_untouched(model, x), pytest.raises(ArithmeticError):
        attributor(x, 1)


def test_the_users_composite_is_left_as_it_was() -> None:
    model, x = plain(), helpers.images(2)
    composite = named_composite("epsilon_plus")
    before = list(composite.canonizers)
    SubArchitectureAttributor(model, GateCanonizer(random_gates(False), sites=SITES), composite)(
        x, 1
    )
    assert composite.canonizers == before
    assert not composite.handles
    # The same composite serves again, without gates.
    assert torch.equal(
        reference(model, x, composite), reference(model, x, named_composite("epsilon_plus"))
    )


def test_a_canonizer_of_its_own_removes_its_hooks() -> None:
    model, x = plain(), helpers.images(2)
    composite = LayerMapComposite([(Activation, Pass())])
    composite.canonizers = [GateCanonizer(random_gates(True), sites=SITES)]
    with helpers.assert_model_untouched(model, x):
        with composite.context(model):
            model(x)
        composite.register(model)
        composite.remove()


# ---------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------


def test_bad_input_is_named() -> None:
    model = plain()
    arch = SubArchitecture.full(SITES)
    with pytest.raises(ValueError, match="'epsilon_plus'"):
        SubArchitectureAttributor(model, arch, "epsilon")
    with pytest.raises(ValueError, match="low"):
        SubArchitectureAttributor(model, arch, "epsilon_gamma_box")
    with pytest.raises(ValueError, match="'occlusion'"):
        SubArchitectureAttributor(model, arch, attributor="lime")
    with pytest.raises(TypeError, match="GateCanonizer"):
        SubArchitectureAttributor(model, {"relu1": torch.ones(6)})
    with pytest.raises(TypeError, match="composite"):
        SubArchitectureAttributor(model, arch, 3)
    with pytest.raises(ValueError, match="sites"):
        GateCanonizer({"relu1": torch.ones(6)})
    with pytest.raises(ValueError, match="train mode"):
        SubArchitectureAttributor(copy.deepcopy(model).train(), arch)
    with pytest.raises(TypeError, match="tensor"):
        SubArchitectureAttributor(model, arch)([[1.0]], 0)
    attributor = SubArchitectureAttributor(model, arch)
    with attributor, pytest.raises(RuntimeError, match="in use"):
        attributor.__enter__()


# ---------------------------------------------------------------------------------------------
# Channels and pictures
# ---------------------------------------------------------------------------------------------


def test_channel_relevance_of_the_gated_network_is_a_scorer() -> None:
    from nad_attr.scoring.scorer import ChannelScorer

    assert issubclass(LRPScorer, ChannelScorer)


def test_heatmap_images() -> None:
    relevance = torch.zeros(3, 2, 4, 5)
    relevance[0, :, 1, 2] = 2.0
    relevance[1, :, 0, 0] = -1e-3
    picture = heatmap_image(relevance, cmap="bwr")
    assert picture.size == (15, 4)
    assert picture.convert("RGB").getpixel((2, 1)) == (255, 0, 0)
    assert picture.convert("RGB").getpixel((5, 0)) == (0, 0, 255)
    assert heatmap_image(relevance[:, 0], columns=2).size == (10, 8)
    with pytest.raises(ValueError, match="images"):
        heatmap_image(relevance[0, 0])


def test_constants_of_each_task_are_its_own_in_a_mixed_batch() -> None:
    model, x = plain(), helpers.images(4)
    gates, masks, constants = with_constants()
    mixed = through_gates(model, x, epsilon(), GateCanonizer(gates, tasks=[0, 1, 1, 0]))
    for row, task in enumerate([0, 1, 1, 0]):
        expected = reference(
            into_next(model, masks[task], constants[task]), x[row : row + 1], epsilon()
        )
        torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-8, atol=1e-9)
        alone = SubArchitectureAttributor(model, gates.sub_architecture(task), epsilon())
        found = alone(x[row : row + 1], 1)[1]
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
