"""Passes that begin at a gate site give what whole passes give."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from nad_attr import RunOptions, find_gate_sites
from nad_attr.certainty.closing import State, TaskTrial
from nad_attr.data.sources import as_source
from nad_attr.gates.channels import n_channels
from nad_attr.gating.prefix import Prefix
from nad_attr.learning.engine import Network
from tests.helpers import assert_model_untouched

SHAPE = (3, 6, 6)


class Residual(nn.Module):
    """ReLUs in place, a layer that is called twice, functions between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(c, 4, 3, padding=1) for c in (3, 4, 4))
        self.norm = nn.BatchNorm2d(4)
        self.act, self.last, self.pool = nn.ReLU(inplace=True), nn.ReLU(), nn.AvgPool2d(2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.pool(self.first(x)))
        y = self.second(x)
        functional.relu_(y)
        y = self.act(self.norm(y))
        y += x
        return self.head(self.last(self.pool(self.third(y))).mean((2, 3)))


class Unreturned(Residual):
    """Uses what a module has changed in place, and not what it returned."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        y = self.second(x)
        self.act(y)
        return self.head(self.last(self.norm(x) + y).mean((2, 3)))


class Tokens(nn.Module):
    """A transformer whose layers return tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(108, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Tanh())
        self.more = nn.Sequential(nn.Linear(8, 6), nn.ReLU())
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))[:, None] * torch.arange(1.0, 3.0, dtype=x.dtype)[:, None]
        x = x + self.attention(x, x, x)[0]
        return self.head(self.more(self.mlp(x) + x).mean(1))


def plain() -> nn.Module:
    layers: list[nn.Module] = []
    for c in (3, 4, 4, 4):
        layers += [nn.Conv2d(c, 4, 3, padding=1), nn.ReLU(inplace=True)]
    return nn.Sequential(nn.Sequential(*layers), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(4, 3))  # fmt: skip


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = build().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
    return model


def trial_of(model: nn.Module, batch: int | None = 5, **options: Any) -> TaskTrial:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(14, *SHAPE, generator=generator, dtype=torch.float64)
    network = Network(model, find_gate_sites(model, x[:2]), RunOptions(batch_size=batch, **options))
    return TaskTrial(network, as_source((x, torch.arange(14) % 3)), 1, 6, ("test",))


def close_by(trial: TaskTrial) -> tuple[State, list[State]]:
    """A sub-architecture, and each that has one channel, or one constant, less or other."""
    n = n_channels(trial.network.sites)
    generator = torch.Generator().manual_seed(2)
    gates = (torch.rand(n, generator=generator) < 0.7).double()
    base = State(gates, torch.randn(n, generator=generator, dtype=torch.float64))
    others = []
    for c in range(n):
        one = State(gates.clone(), base.constants.clone())
        one.gates[c], one.constants[c] = 0, 1.5
        others.append(one)
    return base, [base, *others]


@pytest.mark.parametrize("batch", [None, 5, 40])
@pytest.mark.parametrize("build", [Residual, Tokens, plain])
def test_passes_from_a_site_on_give_what_whole_passes_give(
    build: Callable[[], nn.Module], batch: int | None
) -> None:
    model = made(build)
    trial = trial_of(model, batch)
    base, states = close_by(trial)
    expected = trial.outputs(states)
    last: list[int] = []
    first: list[int] = []
    modules = list(model.modules())
    handles = [
        of.register_forward_hook(lambda m, args, out, to=to: to.append(1))  # type: ignore[misc]
        for of, to in (
            (next(m for m in modules if not [*m.children()]), first),
            (modules[-1], last),
        )
    ]
    whole = trial.passes
    with assert_model_untouched(model):
        found = trial.outputs(states, near=base)
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
        assert trial._tried
        assert not trial._whole
        some = trial.outputs(states, images=4, near=base)
    np.testing.assert_allclose(some, expected[:, trial.some(4)], rtol=1e-12, atol=1e-12)
    for handle in handles:
        handle.remove()
    assert len(first) < 0.7 * len(last)  # the first layer was left out
    assert trial.passes > whole


def test_what_changes_in_place_behind_the_back_of_modules_is_run_whole() -> None:
    trial = trial_of(made(Unreturned))
    base, states = close_by(trial)
    expected = trial.outputs(states)
    np.testing.assert_allclose(trial.outputs(states, near=base), expected, rtol=1e-12, atol=1e-12)
    assert trial._whole


def test_a_network_that_is_called_twice_for_an_image_is_run_whole() -> None:
    model = made(plain)

    def both(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) + model(x.flip(-1))

    trial = trial_of(model, forward_func=lambda x: both(model, x))
    base, states = close_by(trial)
    expected = trial.outputs(states)
    np.testing.assert_allclose(trial.outputs(states, near=base), expected, rtol=1e-12, atol=1e-12)
    assert trial._whole >= trial._tried
    assert trial._whole


def test_scripted_and_parallel_networks_keep_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 2), torch.jit.script(nn.Linear(2, 2)))
    assert not Prefix.possible(model)
    assert not Prefix.possible(nn.DataParallel(nn.Linear(2, 2)))
    assert Prefix.possible(made(Residual))


def test_nothing_is_left_behind_and_other_threads_see_whole_passes() -> None:
    model, plain_call = made(plain), nn.Module._call_impl
    x, y = torch.randn(2, 1, *SHAPE, dtype=torch.float64)
    prefix = Prefix(model, "0.3")
    seen: list[Tensor] = []
    with torch.no_grad():
        whole = model(y)
        handle = model[0][3].register_forward_hook(  # type: ignore[index]
            lambda *call: prefix.reached("0.3")
        )
        with prefix.active():
            first = model(x)
        with prefix.active():
            thread = threading.Thread(target=lambda: seen.append(model(y).detach()))
            thread.start()
            thread.join()
            assert torch.equal(model(y), first)
            with pytest.raises(RuntimeError, match="twice"):
                model(y)
        handle.remove()
        assert torch.equal(seen[0], whole)
        assert torch.equal(model(y), whole)
    assert nn.Module._call_impl is plain_call
    # Of a sequence only the last output is kept in memory.
    kept = [call[1] for call in prefix._calls]
    assert [max(t.stride()) > 0 for t in kept] == [False, False, True]
