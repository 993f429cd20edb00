"""Gating and recording against products by hand and other references; everything is undone."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import check_eval, frozen, gated, recorded, site_modules
from nad_attr.sites.site import GateSite, SiteError
from tests import helpers
from tests.helpers import assert_model_untouched

F64 = torch.float64


class Passing(nn.Module):
    """Three channels that pass through the module `mid` unchanged."""

    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.mid(x) + 0.0


MID = GateSite("mid", 3)
X = torch.tensor([[1.0, -2.0, 4.0], [8.0, 16.0, -32.0]], dtype=F64)


def random_gates(sites: list[GateSite], n: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lead = () if n is None else (n,)
    return {
        site.name: torch.rand(*lead, site.n_channels, generator=generator, dtype=F64)
        for site in sites
    }


def sites_of(model: nn.Module) -> list[GateSite]:
    """Return the sites that find_gate_sites finds, without looking for them each time."""
    return {
        "TinyCNN": [GateSite("relu1", 6), GateSite("relu2", 8)],
        "TinyResNet": [
            *(GateSite(name, 4) for name in ("relu", "layer1.0", "layer1.1")),
            GateSite("layer2.0", 6),
        ],
        "TinyViT": [GateSite(name, 8, -1) for name in ("blocks.0", "blocks.1", "norm")],
    }[type(model).__name__]


# ---------------------------------------------------------------------------------------------
# By hand
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "mean", "expected"),
    [
        ([1, 1, 1], None, [[1, -2, 4], [8, 16, -32]]),
        ([0, 1, 0.5], None, [[0, -2, 2], [0, 16, -16]]),
        ([[1, 0, 0], [0, 0.25, 1]], None, [[1, 0, 0], [0, 4, -32]]),
        ([0, 1, 0.5], [10, 20, 30], [[10, -2, 17], [10, 16, -1]]),
        ([[1, 0, 0], [0, 0.25, 1]], [10, 20, 40], [[1, 20, 40], [10, 19, -32]]),
        ([1, 1, 1], [10, 20, 30], [[1, -2, 4], [8, 16, -32]]),
    ],
    ids=["open", "one for all", "per image", "means", "means per image", "open with means"],
)
def test_products_by_hand(gate: list, mean: list | None, expected: list) -> None:
    model = Passing().eval()
    means = None if mean is None else {"mid": torch.tensor(mean, dtype=F64)}
    with (
        assert_model_untouched(model, X),
        gated(model, {"mid": torch.tensor(gate, dtype=F64)}, sites=[MID], means=means),
    ):
        out = model(X)
    assert torch.equal(out, torch.tensor(expected, dtype=F64))
    assert torch.equal(model(X), X)


@pytest.mark.parametrize("kind", [int, bool, float])
def test_gates_may_be_whole_numbers_and_flags(kind: type) -> None:
    model = Passing().eval()
    gate = torch.tensor([kind(0), kind(1), kind(1)])
    with gated(model, {"mid": gate}, sites=[MID]):
        assert torch.equal(model(X), X * torch.tensor([0.0, 1, 1], dtype=F64))


def test_a_gate_of_an_image_reaches_no_other_image(tiny_model: nn.Module) -> None:
    x, sites = helpers.images(4), sites_of(tiny_model)
    gates = random_gates(sites, 4)
    with assert_model_untouched(tiny_model, x), gated(tiny_model, gates, sites=sites):
        together = tiny_model(x)
    for i in range(4):
        one = {name: gate[i] for name, gate in gates.items()}
        with gated(tiny_model, one, sites=sites):
            torch.testing.assert_close(tiny_model(x[i : i + 1]), together[i : i + 1])


def test_gates_at_one_change_no_bit(tiny_model: nn.Module) -> None:
    x, sites = helpers.images(4), sites_of(tiny_model)
    plain = tiny_model(x)
    ones = {site.name: torch.ones(site.n_channels) for site in sites}
    means = random_gates(sites)
    for given_means in (None, means):
        with gated(tiny_model, ones, sites=sites, means=given_means):
            assert torch.equal(tiny_model(x), plain)


def test_some_of_the_sites_may_be_gated(tiny_cnn: nn.Module) -> None:
    sites = sites_of(tiny_cnn)
    gates = random_gates(sites[:1])
    with gated(tiny_cnn, gates, sites=sites):
        partly = tiny_cnn(helpers.images(2))
    with gated(tiny_cnn, gates, sites=sites[:1]):
        assert torch.equal(tiny_cnn(helpers.images(2)), partly)


# ---------------------------------------------------------------------------------------------
# Other ways to the same result
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_means", [False, True])
def test_gates_equal_weights_folded_into_the_next_layer(
    tiny_cnn: nn.Module, with_means: bool
) -> None:
    """relu1 is read by conv2 alone: a gate on it scales conv2's input channels."""
    x = helpers.images(4)
    gate = random_gates([GateSite("relu1", 6)])["relu1"]
    folded = copy.deepcopy(tiny_cnn)
    means = None
    with torch.no_grad():
        folded.conv2.weight *= gate[None, :, None, None]
    if with_means:
        means = {"relu1": torch.linspace(-1, 1, 6, dtype=F64)}
        # conv2 pads with zeros, where there is no mean: add what the means give, as an image.
        offset = ((1 - gate) * means["relu1"])[None, :, None, None].expand(1, 6, 8, 8)
        response = nn.functional.conv2d(offset, tiny_cnn.conv2.weight, stride=2, padding=1)
        folded.conv2.register_forward_hook(lambda m, a, out: out + response)
    sites = [GateSite("relu1", 6)]
    with (
        assert_model_untouched(tiny_cnn, x),
        gated(tiny_cnn, {"relu1": gate}, sites=sites, means=means),
    ):
        out = tiny_cnn(x)
    torch.testing.assert_close(out, folded(x))


def test_hard_gates_equal_a_narrower_network(tiny_cnn: nn.Module) -> None:
    keep = torch.tensor([True, False, True, True, False, False])
    narrow = copy.deepcopy(tiny_cnn)
    narrow.conv2.weight = nn.Parameter(tiny_cnn.conv2.weight[:, keep])
    narrow.conv1.weight = nn.Parameter(tiny_cnn.conv1.weight[keep])
    narrow.conv1.bias = nn.Parameter(tiny_cnn.conv1.bias[keep])
    narrow.bn1 = nn.BatchNorm2d(3).double().eval()
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(narrow.bn1, name).data = getattr(tiny_cnn.bn1, name).data[keep]
    arch = SubArchitecture({"relu1": keep}, [GateSite("relu1", 6)])
    with arch.applied(tiny_cnn):
        torch.testing.assert_close(tiny_cnn(helpers.images(3)), narrow(helpers.images(3)))


def test_an_in_place_relu_after_a_site() -> None:
    def make(inplace: bool) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Conv2d(3, 5, 3), nn.ReLU(inplace=inplace), nn.Conv2d(5, 2, 3)]
            return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32, 3)).double().eval()

    writing, pure = make(True), make(False)
    sites = [GateSite("0", 5)]
    gates, means = random_gates(sites, 4), {"0": torch.linspace(-2, 2, 5, dtype=F64)}
    x = helpers.images(4)
    for given_means in (None, means):
        with (
            assert_model_untouched(writing, x),
            gated(writing, gates, sites=sites, means=given_means),
        ):
            out = writing(x)
        with gated(pure, gates, sites=sites, means=given_means):
            assert torch.equal(out, pure(x))
    with assert_model_untouched(writing, x), recorded(writing, sites) as seen:
        writing(x)
    assert torch.equal(seen["0"], writing[0](x))
    assert bool((seen["0"] < 0).any())


def test_channels_on_the_last_axis() -> None:
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2)).double().eval()
    x = torch.randn(2, 4, 5, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    gate = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.0, 0.0]], dtype=F64)
    with gated(model, {"0": gate}, sites=[GateSite("0", 3, -1)]):
        torch.testing.assert_close(model(x), model[1](x * gate[:, None, None, :]))


@pytest.mark.parametrize("channel_dim", [1, 2, 3, -1, -2, -3])
def test_channels_on_any_axis(channel_dim: int) -> None:
    x = torch.ones(2, 3, 3, 3)
    model = Passing().eval()
    with gated(model, {"mid": torch.tensor([1.0, 0, 0])}, sites=[GateSite("mid", 3, channel_dim)]):
        out = model(x)
    assert out.select(channel_dim, 0).eq(1).all()
    assert out.sum() == 18


def test_channels_last_memory_format(tiny_cnn: nn.Module) -> None:
    x, sites = helpers.images(4), sites_of(tiny_cnn)
    gates, means = random_gates(sites, 4), random_gates(sites, seed=1)
    with gated(tiny_cnn, gates, sites=sites, means=means):
        expected = tiny_cnn(x)
    model = copy.deepcopy(tiny_cnn).to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    formats = []
    model.conv2.register_forward_pre_hook(
        lambda m, a: formats.append(a[0].is_contiguous(memory_format=torch.channels_last))
    )
    with assert_model_untouched(model, x), gated(model, gates, sites=sites, means=means):
        torch.testing.assert_close(model(x), expected)
    assert formats == [True]


@pytest.mark.parametrize("means", [None, {"1": torch.ones(4)}])
def test_autocast_keeps_the_activations_type(means: dict[str, Tensor] | None) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Identity()).eval()
    x = torch.ones(2, 4)
    gate = torch.full((4,), 0.5 + 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(x)
        with (
            assert_model_untouched(model, x),
            gated(model, {"1": gate}, sites=[GateSite("1", 4)], means=means),
        ):
            out = model(x)
    assert plain.dtype == out.dtype == torch.bfloat16


def test_a_gate_near_the_threshold_is_not_rounded() -> None:
    """In bfloat16, 0.5 + 1e-4 would be 0.5: closed, not open."""
    gate = torch.tensor([0.5 + 1e-4, 0.5 - 1e-4])
    site = GateSite("mid", 2)
    gates = TaskGates({"mid": gate[None].to(F64)}, [site], [0])
    assert gates["mid"].dtype == torch.float32
    assert gates.sub_architecture(0)["mid"].tolist() == [True, False]
    model = Passing().to(torch.bfloat16).eval()
    with gated(model, {"mid": gate}, sites=[site], means={"mid": torch.tensor([256.0, 256.0])}):
        out = model(torch.zeros(1, 2, dtype=torch.bfloat16))
    # (1 - gate) * mean is computed in float32, then rounded once: 127.97 and 128.03.
    assert out.dtype == torch.bfloat16
    assert out.tolist() == torch.tensor([[127.9744, 128.0256]]).to(torch.bfloat16).tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("gate_dtype", [torch.float16, torch.float32, F64])
def test_outputs_keep_the_networks_type(dtype: torch.dtype, gate_dtype: torch.dtype) -> None:
    model = Passing().eval()
    gate = torch.tensor([1, 0.5, 0], dtype=gate_dtype)
    for means in (None, {"mid": torch.ones(3)}):
        with gated(model, {"mid": gate}, sites=[MID], means=means):
            assert model(X.to(dtype)).dtype == dtype


# ---------------------------------------------------------------------------------------------
# Wrappers
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."]
)
def test_prefixes_of_wrappers_are_looked_through(tiny_cnn: nn.Module, prefix: str) -> None:
    site = GateSite(f"{prefix}relu1", 6)
    assert site_modules(tiny_cnn, [site]) == {site.name: tiny_cnn.relu1}
    x = helpers.images(2)
    gate = torch.rand(6, generator=torch.Generator().manual_seed(0))
    with gated(tiny_cnn, {"relu1": gate}, sites=[GateSite("relu1", 6)]):
        expected = tiny_cnn(x)
    with gated(tiny_cnn, {site.name: gate}, sites=[site]):
        assert torch.equal(tiny_cnn(x), expected)


def test_a_module_that_is_really_called_module() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = nn.Sequential(nn.Identity())
            self.other = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.other(self.module(x))

    model = Odd().eval()
    assert site_modules(model, [GateSite("module.0", 3)]) == {"module.0": model.module[0]}


@pytest.mark.parametrize("inside", [False, True], ids=["wrapper is run", "inner is run"])
def test_data_parallel(tiny_cnn: nn.Module, inside: bool) -> None:
    x, sites = helpers.images(4), sites_of(tiny_cnn)
    gates = random_gates(sites, 4)
    with gated(tiny_cnn, gates, sites=sites):
        expected = tiny_cnn(x)
    wrapped = nn.DataParallel(tiny_cnn)  # without CUDA devices: just calls the module
    prefixed = [GateSite(f"module.{s.name}", s.n_channels, s.channel_dim) for s in sites]
    renamed = {f"module.{name}": gate for name, gate in gates.items()}
    with assert_model_untouched(wrapped, x), gated(wrapped, renamed, sites=prefixed):
        assert torch.equal((tiny_cnn if inside else wrapped)(x), expected)
    with recorded(wrapped, sites) as seen:
        wrapped(x)
    assert list(seen) == [site.name for site in sites]


NEEDS_STANCE = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="needs torch >= 2.6"
)


@pytest.mark.skipif(hasattr(torch.compiler, "set_stance"), reason="torch >= 2.6 can run eagerly")
def test_compiled_network_is_refused_where_it_cannot_run_eagerly(tiny_cnn: nn.Module) -> None:
    compiled = torch.compile(tiny_cnn, backend="eager")
    gates, sites = {"relu1": torch.zeros(6)}, [GateSite("relu1", 6)]
    with pytest.raises(GatingError, match="_orig_mod"), gated(compiled, gates, sites=sites):
        compiled(helpers.images(2))


@pytest.mark.slow
@NEEDS_STANCE
def test_compiled_network_runs_eagerly_inside(tiny_cnn: nn.Module) -> None:
    compiled = torch.compile(tiny_cnn, backend="eager")
    x, sites = helpers.images(4), sites_of(tiny_cnn)
    plain = compiled(x)  # compiled now, without hooks
    gates = random_gates(sites, 4)
    with gated(tiny_cnn, gates, sites=sites):
        expected = tiny_cnn(x)
    with gated(compiled, gates, sites=sites):
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), plain)
    with recorded(compiled, sites) as seen:
        compiled(x)
    assert list(seen) == [site.name for site in sites]


@pytest.mark.slow
@NEEDS_STANCE
def test_network_compiled_in_place_runs_eagerly_inside(tiny_cnn: nn.Module) -> None:
    sites = [GateSite("relu1", 6)]
    tiny_cnn.compile(backend="eager")
    x = helpers.images(2)
    plain = tiny_cnn(x)
    with gated(tiny_cnn, {"relu1": torch.zeros(6)}, sites=sites):
        assert not torch.allclose(tiny_cnn(x), plain)
    torch.testing.assert_close(tiny_cnn(x), plain)


@NEEDS_STANCE
def test_compiled_part_of_a_network(tiny_cnn: nn.Module) -> None:
    x = helpers.images(2)
    gate = torch.rand(6, dtype=F64, generator=torch.Generator().manual_seed(0))
    with gated(tiny_cnn, {"relu1": gate}, sites=[GateSite("relu1", 6)]):
        expected = tiny_cnn(x)
    tiny_cnn.relu1 = torch.compile(tiny_cnn.relu1, backend="eager")
    tiny_cnn(x)
    with gated(tiny_cnn, {"relu1": gate}, sites=[GateSite("relu1", 6)]):
        torch.testing.assert_close(tiny_cnn(x), expected)


# ---------------------------------------------------------------------------------------------
# Gradients
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("with_means", [False, True])
def test_gradients_agree_with_finite_differences(per_image: bool, with_means: bool) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 2, 2), nn.Tanh(), nn.Flatten()]
        model = nn.Sequential(*layers).double().eval()
    sites = [GateSite("1", 3), GateSite("3", 2)]
    gates = random_gates(sites, 2 if per_image else None)
    means = random_gates(sites, seed=3) if with_means else None
    x = torch.randn(2, 2, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(1))

    def run(images: Tensor, first: Tensor, second: Tensor) -> Tensor:
        with gated(model, {"1": first, "3": second}, sites=sites, means=means):
            return model(images)

    leaves = [t.requires_grad_() for t in (x, gates["1"], gates["3"])]
    with assert_model_untouched(model), frozen(model):
        assert torch.autograd.gradcheck(run, leaves)


def test_frozen_networks_get_no_gradient(tiny_resnet: nn.Module) -> None:
    tiny_resnet.linear.bias.requires_grad_(False)
    tiny_resnet.conv1.weight.grad = torch.ones_like(tiny_resnet.conv1.weight)
    x, sites = helpers.images(2), sites_of(tiny_resnet)
    gates = {name: gate.requires_grad_() for name, gate in random_gates(sites).items()}
    with assert_model_untouched(tiny_resnet, x):
        for _ in range(2):
            with frozen(tiny_resnet), gated(tiny_resnet, gates, sites=sites):
                assert not any(p.requires_grad for p in tiny_resnet.parameters())
                tiny_resnet(x).sum().backward()
        with pytest.raises(ZeroDivisionError), frozen(tiny_resnet):
            raise ZeroDivisionError
    assert all(gate.grad is not None for gate in gates.values())


# ---------------------------------------------------------------------------------------------
# Nesting and undoing
# ---------------------------------------------------------------------------------------------


def test_nested_contexts_multiply(tiny_cnn: nn.Module) -> None:
    x, sites = helpers.images(4), sites_of(tiny_cnn)
    first, second = random_gates(sites), random_gates(sites, 4, seed=1)
    with assert_model_untouched(tiny_cnn, x):
        with gated(tiny_cnn, first, sites=sites), gated(tiny_cnn, second, sites=sites):
            out = tiny_cnn(x)
        with gated(tiny_cnn, {n: first[n] * second[n] for n in first}, sites=sites):
            torch.testing.assert_close(tiny_cnn(x), out)


def test_a_recorder_sees_what_the_gates_before_it_left() -> None:
    model = Passing().eval()
    half = {"mid": torch.full((3,), 0.5, dtype=F64)}
    with gated(model, half, sites=[MID]), recorded(model, [MID]) as seen:
        model(X)
    assert torch.equal(seen["mid"], X / 2)
    with recorded(model, [MID]) as seen, gated(model, half, sites=[MID]):
        model(X)
    assert torch.equal(seen["mid"], X)


def test_the_inner_context_may_end_first() -> None:
    model = Passing().eval()
    half = {"mid": torch.full((3,), 0.5, dtype=F64)}
    with gated(model, half, sites=[MID]):
        with gated(model, half, sites=[MID]):
            assert torch.equal(model(X), X / 4)
        assert torch.equal(model(X), X / 2)
    assert torch.equal(model(X), X)


def test_undone_after_an_exception_inside_the_block(tiny_model: nn.Module) -> None:
    sites = sites_of(tiny_model)
    with assert_model_untouched(tiny_model):
        for run in (True, False):
            with (
                pytest.raises(ZeroDivisionError),
                gated(tiny_model, random_gates(sites), sites=sites),
            ):
                if run:
                    tiny_model(helpers.images(2))
                raise ZeroDivisionError
        with pytest.raises(ZeroDivisionError), recorded(tiny_model, sites):
            raise ZeroDivisionError


def test_undone_after_an_exception_inside_forward(tiny_cnn: nn.Module) -> None:
    def fail(module: nn.Module, args: object) -> None:
        raise ZeroDivisionError

    handle = tiny_cnn.relu2.register_forward_pre_hook(fail)
    sites = [GateSite("relu1", 6), GateSite("relu2", 8)]
    with (
        assert_model_untouched(tiny_cnn),
        pytest.raises(ZeroDivisionError),
        gated(tiny_cnn, random_gates(sites), sites=sites),
    ):
        tiny_cnn(helpers.images(2))
    handle.remove()
    with gated(tiny_cnn, random_gates(sites), sites=sites):
        tiny_cnn(helpers.images(2))


def test_a_failed_pass_does_not_spoil_the_next(tiny_cnn: nn.Module) -> None:
    sites = sites_of(tiny_cnn)
    with gated(tiny_cnn, random_gates(sites), sites=sites):
        with pytest.raises(RuntimeError):
            tiny_cnn(torch.zeros(2, 4, 8, 8, dtype=F64))
        assert tiny_cnn(helpers.images(2)).shape == (2, 3)


def test_undone_when_a_later_hook_cannot_be_put_on(tiny_cnn: nn.Module) -> None:
    sites = [GateSite("relu1", 6), GateSite("nowhere", 8)]
    with (
        assert_model_untouched(tiny_cnn),
        pytest.raises(SiteError, match="nowhere"),
        gated(tiny_cnn, random_gates(sites), sites=sites),
    ):
        pass


def test_hooks_of_the_user_stay_in_place(tiny_cnn: nn.Module) -> None:
    seen: list[Tensor] = []
    tiny_cnn.relu1.register_forward_hook(lambda m, a, out: seen.append(out))
    sites = [GateSite("relu1", 6)]
    with assert_model_untouched(tiny_cnn), gated(tiny_cnn, {"relu1": torch.zeros(6)}, sites=sites):
        tiny_cnn(helpers.images(2))
    tiny_cnn(helpers.images(2))
    assert torch.equal(seen[0], seen[1])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
def test_gradient_modes(tiny_model: nn.Module, mode: type) -> None:
    x, sites = helpers.images(2), sites_of(tiny_model)
    gates = random_gates(sites, 2)
    with gated(tiny_model, gates, sites=sites):
        expected = tiny_model(x)
    with assert_model_untouched(tiny_model, x), mode(), gated(tiny_model, gates, sites=sites):
        torch.testing.assert_close(tiny_model(x), expected, check_stride=False)


# ---------------------------------------------------------------------------------------------
# Inputs of layers
# ---------------------------------------------------------------------------------------------


def test_a_gate_at_the_input_of_a_layer(tiny_cnn: nn.Module) -> None:
    """conv2 reads relu1: its input gated is relu1's output gated."""
    x = helpers.images(3)
    gate = random_gates([GateSite("conv2", 6)], 3)["conv2"]
    at_input = [GateSite("conv2", 6, at_input=True)]
    with gated(tiny_cnn, {"relu1": gate}, sites=[GateSite("relu1", 6)]):
        expected = tiny_cnn(x)
    with assert_model_untouched(tiny_cnn, x), gated(tiny_cnn, {"conv2": gate}, sites=at_input):
        assert torch.equal(tiny_cnn(x), expected)
    with recorded(tiny_cnn, at_input) as seen, recorded(tiny_cnn, [GateSite("relu1", 6)]) as before:
        tiny_cnn(x)
    assert torch.equal(seen["conv2"], before["relu1"])


def test_the_input_of_an_in_place_layer_is_recorded_before_it_writes() -> None:
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)).eval()
    x = X.clone()
    with recorded(model, [GateSite("1", 3, at_input=True)]) as seen:
        model(x)
    assert torch.equal(seen["1"], X)


class Adding(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b


class Twofold(nn.Module):
    """Two inputs (`add`), two calls (`twice`), a tuple (`pair`), and a layer that is `unused`."""

    def __init__(self) -> None:
        super().__init__()
        self.add = Adding()
        self.twice = nn.Identity()
        self.unused = nn.Identity()
        self.pair = Pair()
        self.keyword = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.keyword(input=x)
        return self.pair(self.add(self.twice(x), self.twice(x)))[0]


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (GateSite("unused", 3), "'unused'.* did not fire.*find_gate_sites"),
        (GateSite("twice", 3), "'twice' was called 2 times.*module around it"),
        (GateSite("pair", 3), "'pair' returned a tuple, not one tensor"),
        (GateSite("add", 3, at_input=True), "'add' takes 2 positional inputs"),
        (GateSite("keyword", 3, at_input=True), "'keyword' takes 0 positional inputs"),
        (GateSite("add", 4), r"'add' should have 4 channels on axis 1.*\(2, 3\)"),
        (GateSite("add", 3, 2), "channel_dim=2 is not a channel axis"),
        (GateSite("add", 2, -2), "channel_dim=-2 is not a channel axis.*axis 0 is the batch"),
        (GateSite("add", 3, -5), "channel_dim=-5 is not a channel axis"),
    ],
)
def test_sites_that_cannot_be_gated_are_named(site: GateSite, words: str) -> None:
    model = Twofold().eval()
    with assert_model_untouched(model), pytest.raises(GatingError, match=words):
        with gated(model, {site.name: torch.ones(site.n_channels)}, sites=[site]):
            model(X)
        with pytest.raises(GatingError, match=words), recorded(model, [site]):
            model(X)


def test_running_another_network_inside_is_noticed(tiny_cnn: nn.Module) -> None:
    sites = sites_of(tiny_cnn)
    with (
        pytest.raises(GatingError, match=r"'relu1', 'relu2' did not fire.*another network"),
        gated(tiny_cnn, random_gates(sites), sites=sites),
    ):
        copy.deepcopy(Passing())(X)


def test_modules_without_a_network_pass(tiny_cnn: nn.Module) -> None:
    """A caller may run parts of a network; each site must still fire once."""
    with recorded(tiny_cnn, [GateSite("relu1", 6)]) as seen:
        tiny_cnn.relu1(torch.ones(1, 6))
    assert list(seen) == ["relu1"]


def test_gates_for_another_number_of_images(tiny_cnn: nn.Module) -> None:
    with (
        assert_model_untouched(tiny_cnn),
        pytest.raises(GatingError, match="3 images met a batch of 2"),
        gated(tiny_cnn, {"relu1": torch.ones(3, 6)}, sites=[GateSite("relu1", 6)]),
    ):
        tiny_cnn(helpers.images(2))


def test_weights_used_directly(tiny_vit: nn.Module) -> None:
    site = GateSite("unused", 8, -1)
    tiny_vit.unused = nn.Linear(8, 8).eval()
    with pytest.raises(GatingError, match="'unused' did not fire"), recorded(tiny_vit, [site]):
        tiny_vit(helpers.images(2))


def test_attention_calls_its_projection_where_a_gate_stands(tiny_vit: nn.Module) -> None:
    x, site = helpers.images(2), GateSite("blocks.0.attention.out_proj", 8, -1)
    whole = tiny_vit(x)
    with assert_model_untouched(tiny_vit, x), recorded(tiny_vit, [site]) as seen:
        assert torch.allclose(tiny_vit(x), whole, atol=1e-12)
    assert seen[site.name].shape == (2, 4, 8)


# ---------------------------------------------------------------------------------------------
# Recording
# ---------------------------------------------------------------------------------------------


def test_recorded_values_are_copies_without_graph(tiny_resnet: nn.Module) -> None:
    x, sites = helpers.images(3), sites_of(tiny_resnet)
    with assert_model_untouched(tiny_resnet, x), recorded(tiny_resnet, sites) as seen:
        tiny_resnet(x)
        first = dict(seen)
        tiny_resnet(x + 1)
    assert list(seen) == [site.name for site in sites]
    for site in sites:
        assert not seen[site.name].requires_grad
        assert not torch.equal(first[site.name], seen[site.name])


def test_recorded_tensors_with_their_graph(tiny_cnn: nn.Module) -> None:
    x = helpers.images(3).requires_grad_()
    with recorded(tiny_cnn, [GateSite("relu2", 8)], clone=False) as seen:
        out = tiny_cnn(x)
    (grad,) = torch.autograd.grad(out[:, 0].sum(), seen["relu2"])
    expected = tiny_cnn.linear.weight[0][None, :, None, None] / 16
    torch.testing.assert_close(grad, expected.expand(3, 8, 4, 4))


# ---------------------------------------------------------------------------------------------
# Task gates and sub-architectures
# ---------------------------------------------------------------------------------------------


def test_tasks_choose_the_rows() -> None:
    rows = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    gates = TaskGates({"mid": rows}, [MID], [4, (0, 2), 7], task_names=["a", "b", "c"])
    model = Passing().eval()

    def run(tasks: object) -> list[list[float]]:
        with gated(model, gates, tasks=tasks):
            return model(X).ne(0).tolist()

    first, group, last = ([row, row] for row in rows.bool().tolist())
    assert run(4) == run("a") == run([4, 4]) == run(("a", "a")) == first
    assert run((0, 2)) == run("b") == run([(0, 2), [2, 0]]) == group
    assert run([7, 4]) == run(["c", 4]) == run(torch.tensor([7, 4])) == [last[0], first[0]]
    assert run(torch.tensor(7)) == last


def test_gates_of_a_single_task_need_no_tasks() -> None:
    gates = TaskGates(
        {"mid": torch.tensor([[0.0, 1.0, 0.5]])}, [MID], [1], means={"mid": torch.ones(3)}
    )
    model = Passing().eval()
    with gated(model, gates):
        out = model(X)
    torch.testing.assert_close(out[0], torch.tensor([1.0, -2.0, 2.5], dtype=F64))
    with gated(model, gates, means={"mid": torch.zeros(3)}):
        torch.testing.assert_close(model(X)[0], torch.tensor([0.0, -2.0, 2.0], dtype=F64))


def test_check_eval_names_the_module(tiny_cnn: nn.Module) -> None:
    check_eval(tiny_cnn)
    tiny_cnn.bn1.train()
    with pytest.raises(ValueError, match=r"'bn1' \(BatchNorm2d\).*model.eval"):
        check_eval(tiny_cnn)
    with pytest.raises(ValueError, match="the network is in train mode"):
        check_eval(nn.Linear(1, 1))


@pytest.mark.slow
@settings(max_examples=40)
@given(
    data=st.data(),
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5).map(tuple),
    per_image=st.booleans(),
    with_means=st.booleans(),
    seed=st.integers(0, 100),
)
def test_gating_equals_the_formula(
    data: st.DataObject, shape: tuple[int, ...], per_image: bool, with_means: bool, seed: int
) -> None:
    dim = data.draw(st.integers(1, len(shape) - 1))
    channel_dim = data.draw(st.sampled_from([dim, dim - len(shape)]))
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=F64)
    n = shape[dim]
    gate = torch.rand(*((shape[0],) if per_image else ()), n, generator=generator, dtype=F64)
    mean = torch.randn(n, generator=generator, dtype=F64)
    model = Passing().eval()
    means = {"mid": mean} if with_means else None
    with gated(model, {"mid": gate}, sites=[GateSite("mid", n, channel_dim)], means=means):
        out = model(x)
    gates = gate if per_image else gate.expand(shape[0], n)
    for index in (
        torch.cartesian_prod(*(torch.arange(s) for s in shape)).reshape(-1, len(shape)).tolist()
    ):
        g = gates[index[0], index[dim]]
        expected = g * x[tuple(index)] + ((1 - g) * mean[index[dim]] if with_means else 0)
        assert abs(out[tuple(index)] - expected) < 1e-12
