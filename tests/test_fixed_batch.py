"""Networks that take batches of one size only: filled up, and the same results as of any size."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nad_attr import (
    GatingError,
    NADAttribution,
    Recipe,
    RunOptions,
    SiteError,
    SubArchitecture,
    find_gate_sites,
    gated,
    learn_gates,
)
from nad_attr.data.sources import as_source
from nad_attr.evaluation import evaluate, site_costs
from nad_attr.evaluation.rivals import SCORERS
from nad_attr.export import ExportError
from nad_attr.pictures import heat_maps
from nad_attr.running import Runner
from tests.helpers import assert_model_untouched

QUICK = Recipe(steps=4, images_per_step=10)
IMAGES = torch.rand(21, 3, 8, 8, generator=torch.Generator().manual_seed(0)).double()
LABELS = torch.arange(21) % 3


class Fixed(nn.Module):
    """Reshapes to a constant number of images; 0: to any."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Linear(6 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).view(self.n or len(x), -1))


def made(n: int) -> Fixed:
    torch.manual_seed(0)
    return Fixed(n).double().eval()


@pytest.mark.parametrize("n", [1, 7, 8])
def test_gates_and_measures_are_those_of_a_network_that_takes_any_batch(n: int) -> None:
    run = RunOptions(batch_size=n)
    found = []
    for net in (made(n), made(0)):
        with assert_model_untouched(net):
            gates = learn_gates(
                net, (IMAGES, LABELS), recipe=QUICK, run=run if net.n == 0 else None
            )
            measured = evaluate(
                net, gates, (IMAGES, LABELS), n_random=1, run=run if net.n == 0 else None
            )
        assert gates.info["batch_size"] == n
        found.append((gates, measured))
    (gates, measured), (gates2, measured2) = found
    for site in gates.sites:
        torch.testing.assert_close(gates[site.name], gates2[site.name], rtol=0, atol=1e-9)
        assert gates.means is not None
        assert gates2.means is not None
        torch.testing.assert_close(gates.means[site.name], gates2.means[site.name])
    assert measured.summary() == measured2.summary()


#: Few steps where the default takes many.
FEW: dict[str, dict[str, Any]] = {
    "lrp": {"canonizers": []},
    **{name: {"passes": 120} for name in ("coar", "hard_concrete", "ugs", "iterative")},
    "layer_integrated_gradients": {"n_steps": 5},
    "layer_conductance": {"n_steps": 5},
    "internal_influence": {"n_steps": 5},
}


@pytest.mark.parametrize("name", [name for name in SCORERS if name != "cdrp"])
def test_scores_are_those_of_a_network_that_takes_any_batch(name: str) -> None:
    fixed, free = made(8), made(0)
    sites = find_gate_sites(fixed, IMAGES[:3])
    assert sites == find_gate_sites(free, IMAGES[:3])
    kwargs = FEW.get(name, {})
    ours = SCORERS[name](fixed, sites, **kwargs)(IMAGES, LABELS)
    theirs = SCORERS[name](free, sites, **kwargs)(IMAGES, LABELS)
    for site in sites:
        torch.testing.assert_close(ours[site.name], theirs[site.name], rtol=1e-6, atol=1e-9)


def test_hooks_see_images_alone_and_gradients_reach_each_images_gates() -> None:
    fixed, free = made(8), made(0)
    site = find_gate_sites(free, IMAGES[:1])
    runner = Runner(fixed)
    runner.find_batch_size((IMAGES[:1],))
    assert runner.fixed_batch == runner.images_per_pass((IMAGES,)) == 8
    gate = torch.rand(3, 6, dtype=torch.float64, requires_grad=True)
    grads = []
    for run in (lambda x: runner((x,)), free):
        with gated(runner.model if run is not free else free, {site[0].name: gate}, sites=site):
            grads.append(torch.autograd.grad(run(IMAGES[:3])[:, 1].sum(), gate)[0])
    torch.testing.assert_close(*grads)
    with pytest.raises(ValueError, match=r"batches of 8 images only.*wants 9"):
        runner((IMAGES[:9],))


def test_other_networks_are_asked_once_and_not_by_hooks() -> None:
    net, passes = made(0), []
    net.register_forward_hook(lambda m, a, o: passes.append(len(o)))
    runner = Runner(net)
    list(runner.draw(as_source((IMAGES, LABELS)), [[0, 1], [2]]))
    Runner(net).find_batch_size((IMAGES,))
    assert passes == [3]
    assert runner.fixed_batch is None


def test_attributions_costs_and_forward_func() -> None:
    fixed, free = made(8), made(0)
    gates = learn_gates(fixed, (IMAGES, LABELS), recipe=QUICK)
    sites = list(gates.sites)
    for images in (IMAGES[:3], IMAGES[:19]):
        ours, theirs = (
            NADAttribution(net, recipe=QUICK).learn((IMAGES, LABELS)).attribute(images, target=1)[0]
            for net in (fixed, free)
        )
        torch.testing.assert_close(ours, theirs)
    saliency, images = heat_maps(fixed, gates, IMAGES[:3], [0, 1, 1]), IMAGES[:3]
    torch.testing.assert_close(saliency, heat_maps(free, gates, images, [0, 1, 1]))
    assert site_costs(fixed, sites, IMAGES[:2]) == site_costs(free, sites, IMAGES[:2])
    run = RunOptions(forward_func=lambda x: fixed(x) * 1.0)
    assert learn_gates(fixed, (IMAGES, LABELS), recipe=QUICK, run=run).sites == gates.sites


def test_what_cannot_be_filled_up_says_why() -> None:
    fixed = made(8)
    with pytest.raises(ValueError, match=r"batches of 8 images only.*images_per_step=8"):
        learn_gates(fixed, (IMAGES, LABELS), recipe=Recipe.paper(beta=0.1, images_per_step=16))
    paper = Recipe.paper(beta=0.1, images_per_step=7, epochs=1)
    assert learn_gates(fixed, (IMAGES, LABELS), recipe=paper).sites
    one = made(1)
    with pytest.raises(GatingError, match=r"twice in one pass.*batches of 1 image only"):
        SCORERS["layer_deep_lift"](one, find_gate_sites(one, IMAGES[:1]))(IMAGES, LABELS)
    arch = SubArchitecture.full(find_gate_sites(fixed, IMAGES[:2]))
    with pytest.raises(ExportError, match=r"batches of 8 images only.*x\.shape\[0\]"):
        arch.export(fixed, IMAGES[:2])
    with pytest.raises(SiteError, match="cannot be run on example_inputs"):
        find_gate_sites(fixed, IMAGES[:, :2])
