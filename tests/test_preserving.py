"""A network that its forward pass changes is restored, and so are all random states."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization as quantization
from captum.attr import NoiseTunnel, Saliency
from torch import Tensor, nn

from nad_attr import NADAttribution, Recipe, find_gate_sites, learn_gates
from nad_attr.concepts import dissect
from nad_attr.evaluation import evaluate
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import frozen
from nad_attr.gating.means import channel_means
from nad_attr.pictures import heat_maps
from nad_attr.running.forward import Runner
from nad_attr.scoring.baselines import TaylorScorer
from nad_attr.scoring.captum_scorers import LayerIntegratedGradientsScorer
from nad_attr.sites.preserving import Kept, unchanged
from nad_attr.system.rng import isolated_rng
from tests import helpers

RECIPE = Recipe(size=0.5, steps=2, images_per_step=4)


class Changing(nn.Module):
    """Keeps its inputs in every way that a forward pass can."""

    def __init__(self) -> None:
        super().__init__()
        self.body = helpers.build(helpers.TinyCNN)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("ema", torch.ones(3, dtype=torch.float64))
        self.register_buffer("hidden", torch.zeros(2, dtype=torch.float64))  # through .data
        self.register_buffer("strided", torch.zeros(4, 6, dtype=torch.float64).t()[::2])
        self.register_buffer("replaced", torch.zeros(2))
        self.n_calls = 0
        self.shapes: list[Any] = []
        self.cache: dict[str, Any] = {"nested": {"last": []}}
        self.plain = torch.zeros(3)  # a tensor that is not a buffer
        self.generator = torch.Generator().manual_seed(3)
        self.train(False)

    def forward(self, x: Tensor) -> Tensor:
        # Its output depends on its counter: passes must not depend on earlier ones.
        scale = self.ema.reshape(1, -1, 1, 1) * (1 + self.calls + self.n_calls + self.plain[0])
        self.calls += 1
        self.n_calls += 1
        self.ema.mul_(0.9).add_(0.1 * x.detach().mean((0, 2, 3)))
        self.hidden.data.add_(1)
        self.strided.add_(1)
        self.replaced = self.replaced + 1
        self.shapes.append(x.shape)
        self.cache["nested"]["last"].append(x.mean())
        self.cache["features"] = x
        self.plain += 1
        self.latest = x
        torch.rand(1, generator=self.generator)
        return self.body(x * scale)


class _State:
    def __init__(self, model: nn.Module) -> None:
        self.buffers = {
            name: (id(b), b.dtype, b.shape, b.stride(), b.data_ptr(), b.clone())
            for name, b in model.named_buffers()
        }
        assert isinstance(model, Changing)
        nested = model.cache["nested"]
        assert isinstance(nested, dict)
        self.plain = (
            model.n_calls, [*model.shapes], [*model.cache], [*nested["last"]],
            "latest" in vars(model), model.plain.tolist(), id(model.plain),
            model.generator.get_state().tolist(),
        )  # fmt: skip


@contextmanager
def same(model: nn.Module) -> Iterator[None]:
    before = _State(model)
    with helpers.assert_model_untouched(model):
        yield
    after = _State(model)
    assert before.plain == after.plain
    for name, (*facts, value) in before.buffers.items():
        *now, value_now = after.buffers[name]
        assert facts == now, name
        assert torch.equal(value, value_now), name


@pytest.fixture
def changing() -> Changing:
    return Changing()


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return helpers.labelled_images()


@pytest.fixture(scope="module")
def gates() -> TaskGates:
    return learn_gates(Changing(), helpers.labelled_images(), recipe=RECIPE)


USES: dict[str, Callable[[nn.Module, Any, TaskGates], object]] = {
    "find_gate_sites": lambda m, d, g: find_gate_sites(m, d[0][:1]),
    "learn_gates": lambda m, d, g: learn_gates(m, d, recipe=RECIPE),
    "paper": lambda m, d, g: learn_gates(m, d, recipe=Recipe.paper(beta=0.1, epochs=1)),
    "evaluate": lambda m, d, g: evaluate(m, g, d, n_random=1),
    "attribute": lambda m, d, g: NADAttribution(m, gates=g).attribute(d[0], target=1),
    "learn and attribute": lambda m, d, g: NADAttribution(m, recipe=RECIPE).attribute(
        d[0], target=d[1]
    ),
    "heat_maps": lambda m, d, g: heat_maps(m, g, d[0][:2], d[1][:2]),
    "taylor": lambda m, d, g: TaylorScorer(m, g.sites)(*d, tasks=g.tasks),
    "integrated gradients": lambda m, d, g: LayerIntegratedGradientsScorer(m, g.sites)(
        *d, tasks=g.tasks
    ),
    "dissect": lambda m, d, g: dissect(
        m, g.sites, (d[0], torch.zeros(len(d[0]), 8, 8, dtype=torch.long)), concepts=["all"]
    ),
    "channel_means": lambda m, d, g: channel_means(m, g.sites, [(d[0],)]),
    "frozen": lambda m, d, g: _backward(m, d[0]),
}


def _backward(model: nn.Module, x: Tensor) -> None:
    with frozen(model):
        model(x.clone().requires_grad_()).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_whatever_runs_a_network_leaves_it_as_it_was(
    use: str, changing: Changing, data: tuple[Tensor, Tensor], gates: TaskGates
) -> None:
    with same(changing):
        USES[use](changing, data, gates)


def test_every_pass_starts_from_the_same_state(changing: Changing, data: Any) -> None:
    """So results depend on no other pass: neither their number nor their order."""
    expected = copy.deepcopy(changing)(data[0])
    runner = Runner(changing)
    with same(changing):
        for _ in range(3):
            assert torch.equal(runner((data[0],)), expected)
        with torch.no_grad():
            assert torch.equal(runner((data[0],)), expected)


def test_a_graph_keeps_what_its_pass_has_written(data: Any) -> None:
    """Put back at once, the buffer would make the gradient wrong, or fail."""
    changing = Changing()
    x = data[0].clone().requires_grad_()
    (expected,) = torch.autograd.grad(copy.deepcopy(changing)(x).sum(), x)
    runner = Runner(changing)
    with same(changing), frozen(changing):
        for _ in range(2):
            (found,) = torch.autograd.grad(runner((x,)).sum(), x)
            assert torch.equal(found, expected)


def test_what_the_user_does_between_two_calls_stays(data: Any) -> None:
    changing = Changing()
    runner = Runner(changing)
    x = data[0].clone().requires_grad_()
    with frozen(changing):
        runner((x,))
    changing(x)  # the user's own pass
    with same(changing), frozen(changing):
        runner((x,))
    assert changing.n_calls == int(changing.calls) == 1


@pytest.mark.parametrize("where", ["forward", "around"])
def test_also_after_an_exception(where: str, changing: Changing, data: Any) -> None:
    if where == "forward":

        def fail(*_: object) -> None:
            raise KeyError("a hook")

        handle = changing.body.linear.register_forward_hook(fail)
        with same(changing), pytest.raises(KeyError), torch.no_grad():
            Runner(changing)((data[0],))
        handle.remove()
    else:
        with same(changing), pytest.raises(KeyError), unchanged(changing):
            changing(data[0])
            raise KeyError


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_observers_of_a_qat_network(data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    net = nn.Sequential(
        quantization.QuantStub(), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 3), quantization.DeQuantStub(),
    ).train()  # fmt: skip
    net.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    x = data[0].float()
    model = quantization.prepare_qat(net)
    model(x)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with helpers.assert_model_untouched(model):
        gates = learn_gates(model, (x * 3, data[1]), recipe=RECIPE)
        evaluate(model, gates, (x * 3, data[1]), n_random=1)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("how", ["resize_", "data", "t_"])
def test_other_memory_or_another_shape(how: str) -> None:
    net = nn.Identity()
    net.register_buffer("b", torch.arange(6.0).reshape(2, 3))
    b, place = net.b, net.b.data_ptr()
    with unchanged(net):
        if how == "resize_":
            b.resize_(20).fill_(1)
        elif how == "data":
            b.data = torch.ones(4)
        else:
            b.t_()
    assert net.b is b
    assert b.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert b.stride() == (3, 1)
    assert how == "resize_" or b.data_ptr() == place


def test_embeddings_that_scale_their_weights() -> None:
    net = nn.Sequential(nn.Embedding(5, 2, max_norm=0.1), nn.Flatten(), nn.Linear(4, 2)).eval()
    before = net[0].weight.detach().clone()
    with torch.no_grad():
        Runner(net)((torch.tensor([[0, 1], [2, 3]]),))
    assert torch.equal(net[0].weight, before)


def test_a_network_made_in_inference_mode() -> None:
    with torch.inference_mode():
        net = nn.BatchNorm1d(2)  # in train mode, so that it counts
        with unchanged(net):
            net(torch.rand(4, 2))
        assert int(net.num_batches_tracked) == 0
    assert net.running_mean.tolist() == [0, 0]


def test_nothing_is_written_where_a_pass_changes_nothing(data: Any) -> None:
    """Other threads may use such a network, and put hooks on it, at the same time."""
    net = helpers.build(helpers.TinyCNN)
    versions = [b._version for b in net.buffers()]
    fired: list[int] = []

    def hook(*_: object) -> None:
        fired.append(1)

    with unchanged(net):
        thread = threading.Thread(target=lambda: net.register_forward_hook(hook))
        thread.start()
        thread.join()
        net(data[0])
    assert hook in net._forward_hooks.values()
    assert len(fired) == 1
    assert [b._version for b in net.buffers()] == versions


def test_a_network_that_changes_nothing_is_copied_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = helpers.build(helpers.TinyCNN)
    runner = Runner(net)
    x = helpers.images()
    with torch.no_grad():
        runner((x,))
        copied = []
        clone = torch.Tensor.clone
        monkeypatch.setattr(
            torch.Tensor, "clone", lambda self, **k: copied.append(self) or clone(self, **k)
        )
        runner((x,))
    assert copied == []


def test_kept_is_never_part_of_a_pickle(changing: Changing, data: Any) -> None:
    runner = Runner(changing)
    with frozen(changing):
        runner((data[0].clone().requires_grad_(),))
    assert copy.deepcopy(runner)._copies == {}
    Kept(changing, runner._copies).restore()


# -- random states ---------------------------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Generator, ...]:
    """Two devices whose generators are there, though the devices are not."""
    generators = (torch.Generator().manual_seed(5), torch.Generator().manual_seed(6))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    return generators


def _draw(generators: tuple[torch.Generator, ...]) -> list[float]:
    drawn = [float(torch.rand(1, generator=g)) for g in (torch.default_generator, *generators)]
    return [*drawn, random.random(), float(np.random.rand())]  # noqa: NPY002


def test_all_generators_are_seeded_and_put_back(cuda: tuple[torch.Generator, ...]) -> None:
    with isolated_rng(0):
        expected = _draw(cuda)
    states = [g.get_state() for g in cuda]
    with pytest.raises(KeyError), isolated_rng(7):
        _draw(cuda)
        raise KeyError
    with isolated_rng(0):
        assert _draw(cuda) == expected
    assert all(torch.equal(g.get_state(), s) for g, s in zip(cuda, states, strict=True))


def test_without_a_seed_they_are_only_put_back(cuda: tuple[torch.Generator, ...]) -> None:
    with isolated_rng():
        first = _draw(cuda)
    assert _draw(cuda) == first


def test_a_device_that_is_first_used_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(9)
    before = generator.get_state()
    with isolated_rng(0):
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
        torch.rand(1, generator=generator)
    assert torch.equal(generator.get_state(), before)


def test_perturbations_leave_the_devices_generators(cuda: tuple[torch.Generator, ...]) -> None:
    from nad_attr.bridges.captum import sensitivity

    net = helpers.build(helpers.TinyCNN)

    def perturb(x: Tensor) -> Tensor:
        return x + 0.1 * torch.rand(x.shape, generator=cuda[1], dtype=x.dtype)

    states = [g.get_state() for g in cuda]
    found = [
        sensitivity(Saliency(net), helpers.images(3), perturb_func=perturb, target=0)
        for _ in range(2)
    ]
    assert torch.equal(*found)
    assert all(torch.equal(g.get_state(), s) for g, s in zip(cuda, states, strict=True))


def test_noise_tunnel_leaves_the_devices_generators(
    cuda: tuple[torch.Generator, ...], gates: TaskGates, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nad_attr.bridges.captum import GatedAttribution

    normal = torch.normal
    monkeypatch.setattr(torch, "normal", lambda *a, **k: normal(*a, **k, generator=cuda[0]))
    net = helpers.build(helpers.TinyCNN)
    sites = find_gate_sites(net, helpers.images(1))
    gated = GatedAttribution(
        NoiseTunnel(Saliency(net)), {s.name: torch.ones(s.n_channels) for s in sites}, sites=sites
    )
    states = [g.get_state() for g in cuda]
    found = [gated.attribute(helpers.images(2), target=0, stdevs=0.1) for _ in range(2)]
    assert torch.equal(*found)
    assert all(torch.equal(g.get_state(), s) for g, s in zip(cuda, states, strict=True))
