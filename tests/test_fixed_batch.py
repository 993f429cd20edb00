"""Networks that take batches of one size only: batches are filled up, with the same results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from captum.attr import DeepLift, IntegratedGradients, NoiseTunnel, Saliency
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
from nad_attr.bridges.captum import GatedAttribution, infidelity
from nad_attr.bridges.crp import compare_with_condition
from nad_attr.bridges.quantus import SubArchitectureExplainer
from nad_attr.bridges.virelay import export_virelay
from nad_attr.bridges.zennit import SubArchitectureAttributor, named_composite, whole_network
from nad_attr.certainty import certainty, verdict
from nad_attr.concepts.dissection.dissecting import dissect
from nad_attr.data.sources import as_source
from nad_attr.evaluation import errors, evaluate, mosaics, site_costs
from nad_attr.evaluation.rivals import SCORERS
from nad_attr.export import save, summary
from nad_attr.flow import edge_fidelity, information_flow
from nad_attr.pictures import contrast_maps, heat_maps, top_images
from nad_attr.running import Runner
from tests.helpers import assert_model_untouched, fit_briefly

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
        return self.head(self.body(x).view(self.n or x.shape[0], -1))


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
    **{name: {"passes": 40} for name in ("coar", "hard_concrete", "ugs", "iterative")},
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
    with pytest.raises(ValueError, match=r"batches of 8 images only.*wants 10 in one pass"):
        GatedAttribution(DeepLift(fixed), arch).attribute(IMAGES[:5], target=1)
    with pytest.raises(SiteError, match="cannot be run on example_inputs"):
        find_gate_sites(fixed, IMAGES[:, :2])


def _odd(sites: Any, task: int = 0) -> SubArchitecture:
    kept = {site.name: torch.arange(site.n_channels) % 2 == task % 2 for site in sites}
    return SubArchitecture(kept, sites, task=task).with_means(None)


def _flow(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    flow = information_flow(net, arch, (IMAGES, LABELS))
    cut = edge_fidelity(net, flow, (IMAGES, LABELS), sizes=(0.5,))
    return flow.frame().round(6).to_csv(), cut.round(6).to_csv()


def _gated(method: Callable[[nn.Module], Any], **kwargs: Any) -> Callable[..., Tensor]:
    def attribution(net: Fixed, arch: SubArchitecture, folder: Path) -> Tensor:
        found: Tensor = GatedAttribution(method(net), arch).attribute(
            IMAGES[:4], target=1, **kwargs
        )
        return found

    return attribution


def _infidelity(net: Fixed, arch: SubArchitecture, folder: Path) -> Tensor:
    return infidelity(GatedAttribution(Saliency(net), arch), IMAGES[:5], target=1)


def _zennit(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    with SubArchitectureAttributor(net, arch, "epsilon_plus") as attributor:
        many = attributor(IMAGES[:11], LABELS[:11])
        few = attributor(IMAGES[:3], 1)
    return [*many, *few, whole_network(net, named_composite("epsilon_plus"), IMAGES[:9], 1)]


def _crp(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    found = compare_with_condition(net, arch, IMAGES[:5], 1)
    return [found.whole, found.condition, found.gated]


def _quantus(name: str) -> Callable[..., Any]:
    def explained(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
        explain = SubArchitectureExplainer(arch, name)
        return torch.tensor(explain(net, IMAGES[:5].numpy(), LABELS[:5].numpy()))

    return explained


def _virelay(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    path = folder / str(net.n)
    export_virelay(net, [arch], (IMAGES, LABELS * 0), path)
    with h5py.File(next(path.rglob("*attribution*.h5"))) as file:
        return torch.tensor(file["attribution"][:])


def _dissected(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    pixels = torch.randint(0, 3, (21, 8, 8), generator=torch.Generator().manual_seed(1))
    found = dissect(net, list(arch.sites), (IMAGES, pixels), concepts=["a", "b", "c"])
    return found.frame().round(6).to_csv()


def _four(net: Fixed, arch: SubArchitecture) -> tuple[nn.Module, list[SubArchitecture]]:
    """Four classes: the third output stands for two."""
    return _Four(net), [
        SubArchitecture({s.name: one[s.name[4:]] for s in sites}, sites, task=task)
        for task in range(4)
        for one in [_odd(arch.sites, task)]
        for sites in [[replace(s, name=f"net.{s.name}") for s in one.sites]]
    ]


class _Four(nn.Module):
    def __init__(self, net: Fixed) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[:, [0, 1, 2, 2]]


def _mosaics(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    four, archs = _four(net, arch)
    return mosaics(four.eval(), archs, (IMAGES, torch.arange(21) % 4), n=12).summary()


def _errors(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    archs = [_odd(arch.sites, task) for task in range(3)]
    return errors(net, archs, (IMAGES, LABELS)).summary()


def _pictures(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    archs = [arch, _odd(arch.sites, 1)]
    maps = contrast_maps(net, archs, IMAGES[:3])
    return str(maps), str(top_images(net, arch, (IMAGES, LABELS)))


def _certainty(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    run = RunOptions(batch_size=8)
    gates = learn_gates(made(0), (IMAGES, LABELS), tasks=[0], recipe=QUICK, run=run)
    data = (IMAGES, LABELS)
    sure = certainty(net, gates, data, data, pairs=1, alternatives=0, images=8)
    said = verdict(net, gates, data, data, n_images=4)
    return sure.frame().round(5).to_csv(), said.summary()


def _exported(net: Fixed, arch: SubArchitecture, folder: Path) -> Any:
    smaller = arch.export(net, IMAGES[:3])
    path = save(smaller, folder / f"{net.n}.pt2", IMAGES[:1])[0]
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        return [
            smaller(IMAGES[:8]),
            loaded(IMAGES[:8]),
            torch.tensor(summary(smaller).smaller.multiply_adds),
        ]


@pytest.mark.parametrize(
    "use",
    [
        _flow,
        _gated(Saliency),
        _gated(DeepLift),
        _gated(IntegratedGradients, n_steps=5),
        _gated(lambda net: NoiseTunnel(Saliency(net)), nt_samples=3),
        _infidelity,
        _zennit,
        _crp,
        _quantus("gradient"),
        _quantus("lrp"),
        _quantus("integrated_gradients"),
        _virelay,
        _dissected,
        _mosaics,
        _errors,
        _pictures,
        _certainty,
        _exported,
    ],
)
def test_whatever_asks_a_network_takes_one_of_a_fixed_batch_size(
    use: Callable[[Fixed, SubArchitecture, Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fit_briefly(monkeypatch)
    fixed, free = made(8), made(0)
    with assert_model_untouched(fixed):
        ours = use(fixed, _odd(find_gate_sites(free, IMAGES[:1])), tmp_path)
    theirs = use(free, _odd(find_gate_sites(free, IMAGES[:1])), tmp_path)
    if isinstance(ours, (Tensor, list)):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    else:
        assert ours == theirs
