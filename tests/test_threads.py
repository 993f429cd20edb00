"""Hooks act in the thread that registered them; other threads see the whole network."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from captum.attr import LRP, DeepLift, GuidedBackprop, LayerIntegratedGradients
from captum.attr._utils.lrp_rules import EpsilonRule, GammaRule
from torch import Tensor, nn

from nad_attr import GatingError, Recipe, SubArchitecture, find_gate_sites, learn_gates, recorded
from nad_attr.bridges.captum import GatedAttribution
from nad_attr.bridges.zennit import SubArchitectureAttributor, named_composite, whole_network
from nad_attr.evaluation import SCORERS, site_costs
from tests import helpers

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


@pytest.fixture
def net() -> nn.Module:
    return helpers.build(helpers.TinyCNN)


@pytest.fixture
def arch(net: nn.Module) -> SubArchitecture:
    sites = find_gate_sites(net, helpers.labelled_images(1)[0])
    return SubArchitecture({s.name: torch.arange(s.n_channels) % 2 == 0 for s in sites}, sites)


def elsewhere(function: Callable[[], Tensor]) -> Tensor:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_other_threads_see_the_whole_network(net: nn.Module, arch: SubArchitecture) -> None:
    x, _ = helpers.labelled_images(4)
    with torch.no_grad():
        clean = net(x)
        with arch.applied(net), recorded(net, arch.sites) as activations:
            gated = net(x)
            kept = {name: value.clone() for name, value in activations.items()}
            assert torch.equal(elsewhere(lambda: net(x)), clean)
            assert all(torch.equal(activations[name], value) for name, value in kept.items())
            assert torch.equal(net(x), gated)
    assert not torch.equal(gated, clean)


def test_predictions_of_a_service_are_its_own_while_another_thread_learns(net: nn.Module) -> None:
    x, y = helpers.labelled_images(12)
    clean = net(x).detach()
    wrong, errors, stop = [], [], threading.Event()

    def predict() -> None:
        while not stop.is_set():
            try:
                out = net(x)  # with gradients, as a thread that trains would
                (gradient,) = torch.autograd.grad(out.sum(), [next(net.parameters())])
                wrong.append(not torch.equal(out, clean) or not bool(gradient.any()))
            except Exception as error:
                errors.append(error)

    recipe = Recipe(size=0.5, steps=4, images_per_step=4)
    expected = learn_gates(net, (x, y), recipe=recipe)
    thread = threading.Thread(target=predict, daemon=True)
    thread.start()
    try:
        while len(wrong) + len(errors) < 3:
            pass
        for _ in range(5):
            find_gate_sites(net, x[:1])
            with expected.sub_architecture(0).applied(net):
                net(x)
    finally:
        stop.set()
        thread.join()
    assert not errors
    assert not any(wrong)
    assert learn_gates(net, (x, y), recipe=recipe) == expected


def test_several_threads_may_learn_on_one_network(net: nn.Module) -> None:
    x, y = helpers.labelled_images(12)
    recipe = Recipe(size=0.5, steps=3, images_per_step=4)
    expected = learn_gates(net, (x, y), recipe=recipe)
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: learn_gates(net, (x, y), recipe=recipe), range(3)))
    assert found == [expected] * 3


def test_a_network_run_in_another_thread_only_is_said_not_to_have_fired(
    net: nn.Module, arch: SubArchitecture
) -> None:
    x, _ = helpers.labelled_images(2)
    message = "in another thread than the one that entered"
    with pytest.raises(GatingError, match=message), arch.applied(net):
        elsewhere(lambda: net(x))


def test_tasks_of_one_event_loop_are_told_apart(net: nn.Module, arch: SubArchitecture) -> None:
    x, _ = helpers.labelled_images(2)

    async def explain(entered: asyncio.Event, leave: asyncio.Event) -> tuple[Tensor, Tensor]:
        with arch.applied(net):
            entered.set()
            await leave.wait()
            return net(x), await asyncio.to_thread(net, x)

    async def both() -> tuple[Tensor, Tensor, Tensor]:
        entered, leave = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(explain(entered, leave))
        await entered.wait()
        other = net(x)
        leave.set()
        return other, *await task

    clean = net(x)
    with arch.applied(net):
        gated = net(x)
    other, mine, handed_on = asyncio.run(both())
    assert torch.equal(other, clean)
    assert torch.equal(mine, gated)
    assert torch.equal(handed_on, gated)


def test_replicas_of_data_parallel_are_gated_in_their_threads(
    net: nn.Module, arch: SubArchitecture
) -> None:
    x, _ = helpers.labelled_images(2)
    with arch.applied(net):
        gated = net(x)
        # What DataParallel makes of a network for each device, and runs in a thread of its own.
        replicas = {name: m._replicate_for_data_parallel() for name, m in net.named_modules()}
        for name, module in replicas.items():
            for child in module._modules:
                module._modules[child] = replicas[f"{name}.{child}".lstrip(".")]
        replica = replicas[""]
        for name, parameter in net.named_parameters():
            owner, _, last = name.rpartition(".")
            setattr(replicas[owner], last, parameter.detach())
        assert torch.equal(elsewhere(lambda: replica(x)), gated)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(
            "costs",
            marks=pytest.mark.skipif(
                TORCH < (2, 6), reason="torch 2.4's own counter trips over other threads"
            ),
        ),
        "magnitude",
    ],
)
def test_rivals_and_costs_do_not_see_the_passes_of_other_threads(net: nn.Module, use: str) -> None:
    x, y = helpers.labelled_images(6)
    sites = find_gate_sites(net, x[:1])

    def measured() -> dict[str, Tensor]:
        if use == "costs":
            return {name: torch.tensor(n) for name, n in site_costs(net, sites, x).flops.items()}
        scorer = SCORERS["magnitude"](net, sites)
        return dict(scorer(x, y))

    alone = measured()
    main, intrusions = threading.get_ident(), []

    def intrude(module: nn.Module, args: object) -> None:
        if threading.get_ident() == main:
            elsewhere(lambda: net(x[:2]))
            intrusions.append(1)

    # In the middle of each pass, another thread makes one of its own.
    handle = net.conv2.register_forward_pre_hook(intrude)
    together = measured()
    handle.remove()
    assert intrusions
    assert all(torch.equal(alone[name], together[name]) for name in alone)


class Plain(nn.Sequential):
    """What all methods of Captum and Zennit can explain."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Conv2d(4, 4, 3),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64, 3),
        )


def _captum(method: Callable[[nn.Module], Any]) -> Callable[[nn.Module, SubArchitecture], Any]:
    def attribute(net: nn.Module, arch: SubArchitecture) -> Any:
        x, _ = helpers.labelled_images(2)
        return GatedAttribution(method(net), arch).attribute(x, target=1)

    return attribute


def _gamma(net: nn.Module) -> LRP:
    for layer in (net[0], net[3], net[6]):
        layer.rule = GammaRule()
    net[5].rule = EpsilonRule()
    return LRP(net)


def _scores(name: str) -> Callable[[nn.Module, SubArchitecture], Any]:
    def score(net: nn.Module, arch: SubArchitecture) -> Any:
        return SCORERS[name](net, arch.sites)(*helpers.labelled_images(6))["2"]

    return score


def _heat_map(net: nn.Module, arch: SubArchitecture) -> Any:
    x, _ = helpers.labelled_images(2)
    with SubArchitectureAttributor(net, arch, "epsilon_plus") as attributor:
        return attributor(x, 1)[1]


def _whole(net: nn.Module, arch: SubArchitecture) -> Any:
    x, _ = helpers.labelled_images(2)
    return whole_network(net, named_composite("epsilon_gamma_box", low=-3.0, high=3.0), x, 1)


@pytest.mark.parametrize(
    "explain",
    [
        _captum(DeepLift),
        _captum(GuidedBackprop),
        _captum(_gamma),
        _captum(lambda net: LayerIntegratedGradients(net, net[3])),
        _scores("layer_deep_lift"),
        _scores("layer_conductance"),
        _scores("lrp"),
        _scores("relp"),
        _heat_map,
        _whole,
    ],
)
def test_other_threads_do_not_meet_the_hooks_and_weights_of_captum_and_zennit(
    explain: Callable[[nn.Module, SubArchitecture], Any],
) -> None:
    net = helpers.build(Plain)
    x, _ = helpers.labelled_images(3)
    sites = find_gate_sites(net, x[:1], layers=["2", "4"])
    arch = SubArchitecture({s.name: torch.arange(s.n_channels) % 2 == 0 for s in sites}, sites)
    arch = arch.with_means(None)

    def seen() -> list[Tensor]:
        given = x.clone().requires_grad_()
        out = net(given)
        return [out.detach(), *torch.autograd.grad(out[:, 1].sum(), [given])]

    clean, alone = seen(), explain(net, arch)
    main, met = threading.get_ident(), []

    def meet(_: object = None) -> None:
        if threading.get_ident() == main:
            with ThreadPoolExecutor(1) as pool:
                met.append(all(map(torch.equal, pool.submit(seen).result(), clean)))

    def in_the_middle(module: nn.Module, args: object, output: Tensor) -> None:
        meet()
        if output.requires_grad and threading.get_ident() == main:
            output.register_hook(meet)

    handle = net[3].register_forward_hook(in_the_middle)
    with helpers.assert_model_untouched(net):
        together = explain(net, arch)
    handle.remove()
    assert len(met) > 1
    assert all(met)
    assert torch.equal(alone, together)


def test_two_threads_explain_one_network_with_captum() -> None:
    net = helpers.build(Plain)
    x, _ = helpers.labelled_images(3)
    arch = SubArchitecture.full(find_gate_sites(net, x[:1], layers=["2", "4"]))

    def explain(target: int) -> Tensor:
        result: Tensor = GatedAttribution(DeepLift(net), arch).attribute(x, target=target)
        return result

    alone = [explain(i) for i in range(3)]
    plain = nn.Module.register_forward_hook
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(explain, [0, 1, 2] * 5))
    assert all(map(torch.equal, found, alone * 5))
    assert nn.Module.register_forward_hook is plain


def test_hooks_of_ones_own_stay_while_captum_is_at_work(net: nn.Module) -> None:
    x, _ = helpers.labelled_images(2)
    arch = SubArchitecture.full(find_gate_sites(net, x[:1]))
    other, kept = helpers.build(helpers.TinyCNN), []

    class Rude(GuidedBackprop):
        def attribute(self, *args: Any, **kwargs: Any) -> Any:
            net._modules["conv1"]._forward_hooks.clear()
            kept.append(other.register_forward_hook(lambda m, a, o: None))
            return super().attribute(*args, **kwargs)

    handle = net.get_submodule("conv1").register_forward_hook(lambda m, a, o: None)
    GatedAttribution(Rude(net), arch).attribute(x, target=1)
    assert handle.id in net.get_submodule("conv1")._forward_hooks
    assert kept[0].id in other._forward_hooks
