"""Networks that break an assumption of learning are refused, with the cause, before any work."""

from __future__ import annotations

import itertools
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nad_attr import NADAttribution, Recipe, find_gate_sites, learn_gates, learn_to_store
from nad_attr.evaluation import SCORERS, evaluate
from nad_attr.gating.hooks import frozen, multiply_learned
from nad_attr.learning.engine import Network
from nad_attr.learning.network_checks import NetworkCheckError, check_gradients, check_outputs
from nad_attr.learning.session import Session
from nad_attr.sites.coverage import NetworkCheckWarning
from nad_attr.sites.site import GateSite, SiteError

QUICK = Recipe(size=0.5, steps=3, images_per_step=4)
Change = Callable[[Tensor], Tensor]


class Net(nn.Module):
    """A backbone, a head, and something between the two."""

    def __init__(self, between: Change = lambda f: f) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(self.backbone(x)))


class Quiet(Net):
    """Its backbone runs without gradients."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features = self.backbone(x)
        return self.head(features)


class Sharp(torch.autograd.Function):
    """A straight-through trick: a step forward, the identity backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > x.mean()).to(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def half_detached(f: Tensor) -> Tensor:
    return torch.cat([f[:, :6].detach(), f[:, 6:]], 1)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(12, 3, 12, 12, generator=generator), torch.arange(12) % 3


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------

BROKEN = {
    "no_grad": (lambda: Quiet(), "module 'backbone.0' .* is run without gradients"),
    "detach": (lambda: Net(lambda f: f.detach()), "between .* and module 'head.0'"),
    "round": (lambda: Net(lambda f: torch.round(f * 64) / 64), "the operator 'round'"),
    "sign": (lambda: Net(lambda f: torch.sign(f - f.mean())), "the operator 'sign'"),
    "straight-through": (lambda: Net(Sharp.apply), "the autograd function 'Sharp'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BROKEN)
def test_a_gradient_that_does_not_arrive_is_refused(kind: str, data: tuple[Tensor, Tensor]) -> None:
    make, cause = BROKEN[kind]
    with pytest.raises(NetworkCheckError, match=r"wrong at 2 of 3 gate sites: 'backbone.1'") as e:
        learn_gates(make().eval(), data, recipe=QUICK)
    message = str(e.value)
    assert "'backbone.3'" in message
    assert "sites=['head.1']" in message
    assert re.search(cause, message), message
    with pytest.warns(NetworkCheckWarning, match="wrong at 2 of 3"):
        learn_gates(make().eval(), data, recipe=QUICK, checks="warn")
    sound = learn_gates(make().eval(), data, recipe=QUICK, sites=["head.1"])  # as it says
    assert list(sound) == ["head.1"]


@pytest.mark.slow
def test_a_gradient_that_arrives_at_some_channels_only_is_refused(
    data: tuple[Tensor, Tensor],
) -> None:
    with pytest.raises(NetworkCheckError, match=r"'backbone.3' \(no gradient arrives at 6 chan"):
        learn_gates(Net(half_detached).eval(), data, recipe=QUICK)


@pytest.mark.filterwarnings("ignore")
def test_int8_layers_are_named(data: tuple[Tensor, Tensor]) -> None:
    import torch.ao.quantization as quantization

    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("no quantized kernels here")
    net = quantization.quantize_dynamic(Net(), {nn.Linear}, dtype=torch.qint8).eval()
    network = Network(net, find_gate_sites(net, data[0][:1]))
    with pytest.raises(NetworkCheckError, match=r"\(int8 Linear\) passes on no gradient"):
        check_gradients(network, (data[0][:2],))
    # It is also true that an image's outputs depend on the range of the others' activations.
    with pytest.raises(NetworkCheckError, match=r"int8 Linear: its scale is taken over the batch"):
        learn_gates(net, data, recipe=QUICK)


@pytest.mark.filterwarnings("ignore")
def test_static_int8_networks_are_refused_for_what_they_are(data: tuple[Tensor, Tensor]) -> None:
    import torch.ao.quantization as quantization

    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("no quantized kernels here")
    net = nn.Sequential(quantization.QuantStub(), Net(), quantization.DeQuantStub()).eval()
    net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(net)
    prepared(data[0])
    int8 = quantization.convert(prepared).eval()
    with pytest.raises(SiteError, match=r"found: layer '0' returns int8 .*the float network"):
        find_gate_sites(int8, data[0][:1])
    with pytest.raises(SiteError, match=r"layer '1\.head\.1' returns int8 .*the float network"):
        learn_gates(int8, data, recipe=QUICK, sites=["1.head.1"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "layer", [nn.ReLU, nn.GELU, nn.Hardswish, nn.ELU, nn.Sigmoid, nn.Softplus, nn.ReLU6]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sound_networks_pass(layer: type[nn.Module], dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), layer(), nn.MaxPool2d(2), nn.Conv2d(8, 6, 3),
            layer(), nn.Flatten(), nn.Linear(54, 10), nn.LayerNorm(10), layer(), nn.Linear(10, 3),
            nn.Softmax(1),
        ).eval().to(dtype)  # fmt: skip
        x = torch.randn(2, 3, 12, 12, dtype=dtype)
        network = Network(net, find_gate_sites(net, x))
        with frozen(net), warnings.catch_warnings():
            warnings.simplefilter("error")
            check_gradients(network, (x,))
            check_outputs(net, network, (x,))


def test_gradient_of_a_vector_site_closed_at_zero_is_that_of_the_product() -> None:
    # The memory of the gate's gradient was used again before it was read.
    x = torch.tensor([[2.0, -3.0]], requires_grad=True)
    gate = torch.tensor([[0.5, 1.0]], requires_grad=True)
    y = multiply_learned(GateSite("a", 2, 1), x, gate, None)
    of_x, of_gate = torch.autograd.grad(y, (x, gate), torch.tensor([[10.0, 100.0]]))
    assert of_gate.tolist() == [[20.0, -300.0]]
    assert of_x.tolist() == [[5.0, 100.0]]


# ---------------------------------------------------------------------------------------------
# Chance and company
# ---------------------------------------------------------------------------------------------


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, 0.5, training=True)


class OverBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def with_layer(layer: nn.Module) -> nn.Module:
    net = Net()
    net.backbone[1] = nn.Sequential(layer, nn.ReLU())
    return net.eval()


STRANGE = {
    "dropout in forward": (lambda: with_layer(Noise()), r"another output.*'backbone.1.0' \(Noise"),
    "noise between": (lambda: Net(lambda f: f + torch.rand_like(f)), r"the network \(Net\) itself"),
    "BatchNorm": (
        lambda: with_layer(nn.BatchNorm2d(8, track_running_stats=False)),
        r"depends on the other images.*'backbone.1.0' \(BatchNorm2d, without running statistics",
    ),
    "a mean over the batch": (
        lambda: with_layer(OverBatch()),
        r"depends on the other images.*'backbone.1.0' \(OverBatch\)",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", STRANGE)
def test_outputs_that_depend_on_chance_or_company_are_refused_by_name(
    kind: str, data: tuple[Tensor, Tensor]
) -> None:
    make, message = STRANGE[kind]
    net = make().eval()
    with pytest.raises(NetworkCheckError, match=message):
        learn_gates(net, data, recipe=QUICK)
    with pytest.raises(NetworkCheckError, match=message):
        NADAttribution(net, recipe=QUICK).learn(data)
    gates = learn_gates(Net().eval(), data, recipe=QUICK, sites=["head.1"])
    with pytest.raises(NetworkCheckError, match=message):
        evaluate(net, gates, data)
    with pytest.warns(NetworkCheckWarning, match=message):
        evaluate(net, gates, data, checks="warn", n_random=0)


def test_stores_are_refused_too_and_nothing_is_written(
    data: tuple[Tensor, Tensor], tmp_path: Any
) -> None:
    with pytest.raises(NetworkCheckError):
        learn_to_store(Quiet().eval(), data, tmp_path / "gates.h5", recipe=QUICK)
    assert not list(tmp_path.iterdir())


def test_random_numbers_that_change_nothing_are_no_chance() -> None:
    net = Net(lambda f: f + 0 * torch.rand_like(f)).eval()
    x = torch.rand(2, 3, 12, 12)
    check_outputs(net, lambda inputs: net(*inputs), (x,))


def test_an_image_that_cannot_be_run_alone_is_warned_of() -> None:
    net = nn.Sequential(Net(), nn.Flatten()).eval()

    def run(inputs: tuple[Tensor, ...]) -> Tensor:
        if len(inputs[0]) == 1:
            raise ValueError("of shape (3,)")
        return net(*inputs)

    with pytest.warns(NetworkCheckWarning, match=r"2 images and not on one alone: of shape \(3,\)"):
        check_outputs(net, run, (torch.rand(2, 3, 12, 12),))


def test_checks_must_be_one_of_three(data: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="checks must be 'refuse', 'warn' or 'off', got True"):
        learn_gates(Net().eval(), data, recipe=QUICK, checks=True)  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------
# What the checks cost, and leave alone
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_results_are_the_same_bit_by_bit_and_nothing_is_changed(
    data: tuple[Tensor, Tensor],
) -> None:
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    net, x = Counting().eval(), data[0][:2]
    network = Network(net, find_gate_sites(net, x))
    state, calls = torch.get_rng_state(), float(net.calls)
    check_outputs(net, network, (x,))
    with frozen(net):
        check_gradients(network, (x,))
    assert float(net.calls) == calls
    assert torch.equal(torch.get_rng_state(), state)
    plain = Net().eval()
    assert learn_gates(plain, data, recipe=QUICK) == learn_gates(
        plain, data, recipe=QUICK, checks="off"
    )


@pytest.mark.slow
def test_checks_cost_at_most_two_percent_of_a_default_run_on_resnet50(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    net = models.resnet50(weights=None).eval()
    data = torch.randn(4, 3, 32, 32), torch.tensor([0, 0, 1, 1])
    passes: list[int] = []
    backward = Network.gate_gradient

    def counted(self: Network, value: Tensor, gates: Tensor, *, retain: bool = False) -> Tensor:
        passes.append(len(gates))
        return backward(self, value, gates, retain=retain)

    monkeypatch.setattr(Network, "gate_gradient", counted)
    net.conv1.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    counts = []
    for checks in ("off", "refuse"):
        passes.clear()
        session = Session(net, data, [0], checks=checks)
        counts.append(sum(passes))
    assert len(session.sites) == 17
    default = Recipe()
    # Image passes, forward and backward. The checks' own, and one image to see whether the network
    # checkpoints; beside what one task takes, its clean passes and means left out.
    checks_take = counts[1] - counts[0] + 2
    # Even of the forward passes alone.
    assert 0 < checks_take <= 0.02 * default.steps * default.images_per_step


# ---------------------------------------------------------------------------------------------
# Coverage
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_traced_network_is_covered_poorly_and_the_warning_can_be_followed() -> None:
    models = pytest.importorskip("torchvision").models
    traced = torch.fx.symbolic_trace(models.resnet18(weights=None)).eval()
    x = torch.randn(1, 3, 32, 32)
    with pytest.warns(NetworkCheckWarning, match="no site covers the .* layers between") as caught:
        assert len(find_gate_sites(traced, x)) < 4
    message = str(caught[0].message)
    named = message[message.index("[") + 1 : message.index("]")].replace("'", "").split(", ")
    assert len(find_gate_sites(traced, x, layers=named)) == len(named) > 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(find_gate_sites(models.resnet18(weights=None).eval(), x)) == 9


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8, 8)]
        self.tower = nn.Sequential(*itertools.chain(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.head(torch.cat([self.tower(a), self.tower(b)], 1))


def test_a_siamese_network_is_told_why_its_towers_have_no_sites() -> None:
    x = torch.rand(1, 3, 8, 8)
    with pytest.warns(NetworkCheckWarning, match=r"'tower\S*' is called 2 times in a pass"):
        sites = find_gate_sites(Siamese().eval(), (x, x))
    assert [site.name for site in sites] == ["head.1"]


class EarlyExit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        self.exit = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        self.rest = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU())
        self.last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        early = self.exit(x)
        return early if float(x.sum()) > -1 else self.last(self.rest(x))


def test_an_early_exit_network_is_told_that_its_sites_are_of_one_path() -> None:
    with pytest.warns(NetworkCheckWarning, match="did not call 'rest', 'last' for this image"):
        find_gate_sites(EarlyExit().eval(), torch.rand(1, 3, 8, 8))


# ---------------------------------------------------------------------------------------------
# Gradient checkpointing
# ---------------------------------------------------------------------------------------------


class Checkpointed(Net):
    reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.reentrant is None:
            return super().forward(x)
        run = checkpoint(self.backbone, x, use_reentrant=self.reentrant)
        return checkpoint(self.head, run, use_reentrant=self.reentrant)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["taylor", "taylor_output", "neuron_mct", "cdrp"])
def test_scores_of_rivals_are_the_same_on_a_checkpointed_network(
    name: str, data: tuple[Tensor, Tensor]
) -> None:
    net = Checkpointed().eval()
    scorer = SCORERS[name](net, find_gate_sites(net, data[0][:1]))
    plain = scorer(*data)
    net.reentrant = False
    found = scorer(*data)
    assert all(torch.equal(plain[site], found[site]) for site in plain)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [QUICK, Recipe.paper(beta=0.1, epochs=1)], ids=["own", "paper"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*requires_grad=True:UserWarning")
def test_checkpointed_networks_learn_the_same_gates(
    reentrant: bool, recipe: Recipe, data: tuple[Tensor, Tensor]
) -> None:
    net = Checkpointed().eval()
    sites = find_gate_sites(net, data[0][:1])
    plain = learn_gates(net, data, recipe=recipe, sites=sites)
    net.reentrant = reentrant
    if reentrant and recipe is not QUICK:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            learn_gates(net, data, recipe=recipe, sites=sites)
        return
    found = learn_gates(net, data, recipe=recipe, sites=find_gate_sites(net, data[0][:1]))
    assert found == plain
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_judging_one_image_at_a_time_is_checked_in_company_too(
    data: tuple[Tensor, Tensor],
) -> None:
    class Mixing(Net):
        mixes = False

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) if self.mixes else x)

    net = Mixing().eval()
    gates = learn_gates(net, data, recipe=QUICK)
    net.mixes = True
    with pytest.raises(NetworkCheckError, match="depends on the other images of its batch"):
        evaluate(net, gates, data, batch_size=1, n_random=0)
