"""Everything the library does, on attention heads, hidden neurons and groups of channels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import (
    GateSite,
    GateStore,
    GatingError,
    NADAttribution,
    Recipe,
    TaskGates,
    certainty,
    evaluation,
    find_gate_sites,
    fit_constants,
    information_flow,
    learn_gates,
    verdict,
)
from nad_attr.flow import InformationFlow, agreement
from nad_attr.gates.channels import n_gates, open_gates, to_channels
from nad_attr.report import Report
from nad_attr.store import diff

RECIPE = Recipe(size=0.5, steps=4, images_per_step=4)


class Case(NamedTuple):
    """A transformer with gates at some kind of sites."""

    model: nn.Module
    sites: list[GateSite]
    data: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    gates: TaskGates
    folder: Path


def sites_of(model: nn.Module, images: Tensor, units: str) -> list[GateSite]:
    if units == "groups":
        names = [site.name for site in find_gate_sites(model, images)]
        return find_gate_sites(model, images, groups=dict.fromkeys(names, 4))
    return find_gate_sites(model, images, units=units.split("+"))


@pytest.fixture(
    scope="module",
    params=[
        "channels+heads+neurons",
        "groups",
        pytest.param("heads", marks=pytest.mark.slow),
    ],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    known = evaluation.planted_heads(
        n_classes=4, circuit_width=1, n_heads=8, hidden=8, n_images=40, seed=1
    )
    sites = sites_of(known.model, known.data[0][:1], request.param)
    gates = learn_gates(known.model, known.data, recipe=RECIPE, sites=sites, seed=0)
    folder = tmp_path_factory.mktemp("units")
    return Case(known.model, sites, known.data, known.held_out, gates, folder)


def learning(case: Case) -> None:
    for arch in case.gates.sub_architectures():
        assert arch.n_kept == round(0.5 * n_gates(case.sites))
    (fitted,) = fit_constants(case.model, case.gates.select([0]), case.data, recipe=RECIPE)
    assert fitted.sites == tuple(case.sites)


def stores(case: Case) -> None:
    a, b = case.folder / "a.h5", case.folder / "b.h5"
    case.gates.save(a)
    learn_gates(case.model, case.data, recipe=RECIPE, sites=case.sites, seed=1).save(b)
    with GateStore.open(a) as store:
        assert tuple(store.sites) == tuple(case.sites)
        assert store.read() == case.gates
    found = diff(a, b)
    assert found.equal + len(found.changed) == len(case.gates)
    size = {1 if site.group_of is None else site.n_channels // site.n_gates for site in case.sites}
    assert all(n % min(size) == 0 for n, _ in found.changed.values())


def evaluating(case: Case) -> None:
    found = evaluation.evaluate(case.model, case.gates, case.held_out, n_random=1)
    assert np.isfinite(found.fidelity).all()
    assert found.summary()


def certain(case: Case) -> None:
    gates = case.gates.select([0, 1])
    found = certainty(
        case.model, gates, case.data, case.held_out, pairs=1, alternatives=1, images=12
    )
    for task in gates.tasks:
        table = found.table(task)
        for site in case.sites:
            own = table[table.site == site.name]
            if site.group_of is not None:  # one answer for each group
                group = np.array(site.group_of)[own.channel]
                assert (own.label.groupby(group).nunique() == 1).all()
        assert sum(found.counts(task).values()) == gates.sub_architecture(task).n_kept


def verdicts(case: Case) -> None:
    archs = [arch.with_means(None) for arch in case.gates.sub_architectures()]
    found = verdict(case.model, archs, None, case.held_out, n_random=19, n_images=12)
    assert found.summary()


def flows(case: Case) -> None:
    """Nodes are gates; what leaves a head is its effect, and cutting all of it closes it."""
    arch, x = case.gates.sub_architecture(0), case.held_out[0][:4]
    found = information_flow(case.model, arch, x, tasks=0, receivers=None)
    assert max(found.conservation.values()) < 1e-4
    nodes = found.nodes
    assert list(nodes.site.unique()) == [site.name for site in case.sites]
    for site in case.sites:
        kept = open_gates(site, arch[site.name])
        assert nodes[nodes.site == site.name].channel.tolist() == kept.nonzero().flatten().tolist()
        if not kept.any():
            continue
        gate = int(kept.nonzero()[0])
        masks = arch.masks
        masks[site.name] &= to_channels(torch.arange(site.n_gates) != gate, [site])
        edges = found.edges.query(f"source_site == '{site.name}' and source == {gate}")
        with torch.no_grad():
            with found.cut(case.model, edges):
                cut = case.model(x)[:, 0]
            with arch._with_masks(masks, 0).applied(case.model):
                torch.testing.assert_close(cut, case.model(x)[:, 0], atol=1e-4, rtol=1e-4)
    few = information_flow(case.model, arch, x, tasks=0, receivers=2)
    assert few.nodes.effect.notna().all()
    assert agreement(case.model, found, x, n_edges=3).n_edges.min() >= 1
    found.save(case.folder / "flow.h5")
    assert InformationFlow.load(case.folder / "flow.h5").edges.equals(found.edges)
    found.plot()


def captum(case: Case) -> None:
    nad = NADAttribution(case.model, gates=case.gates)
    x = case.held_out[0][:2]
    assert all(bool(a.isfinite().all()) for a in nad.attribute(x, target=0))
    from nad_attr.bridges.captum import GatedAttribution

    attr = pytest.importorskip("captum.attr")
    gated = GatedAttribution(attr.Saliency(case.model), case.gates, tasks=0)
    assert gated.attribute(x, target=0).shape == x.shape


def zennit(case: Case) -> None:

    from nad_attr.bridges.zennit import SubArchitectureAttributor

    with SubArchitectureAttributor(case.model, case.gates.sub_architecture(0)) as attributor:
        _, relevance = attributor(case.held_out[0][:2], torch.eye(4)[[0, 0]])
    assert relevance.shape == case.held_out[0][:2].shape


def quantus_and_virelay(case: Case) -> None:
    from nad_attr.bridges.quantus import SubArchitectureExplainer
    from nad_attr.bridges.virelay import export_virelay

    x, y = (part[:4] for part in case.held_out)
    maps = SubArchitectureExplainer(case.gates, sum_channels=False)(case.model, x, y)
    assert maps.shape == x.shape
    assert np.isfinite(maps).all()
    project = export_virelay(
        case.model, case.gates, (x, y), case.folder / "virelay", embeddings=["pca"], n_clusters=[]
    )
    assert (project if project.is_file() else project / "project.yaml").is_file()


def reports(case: Case) -> None:
    report = Report(case.gates.select([0, 1]))
    parts = ("evaluation", "curves", "mosaics", "flow", "pictures")
    report.measure(case.model, case.held_out, parts=parts, n_random=1)
    assert not report.results.notes
    report.save(case.folder / "page.html")
    kept, n = case.gates.sub_architecture(0).n_kept, n_gates(case.sites)
    assert f"the gates keep {kept} of {n} " in (case.folder / "page.html").read_text()


def curves(case: Case) -> None:
    found = evaluation.curves(
        case.model, case.gates, case.held_out, sizes=(0.25, 0.5), train_data=case.data
    )
    assert found.summary()


def mosaics(case: Case) -> None:
    found = evaluation.mosaics(case.model, case.gates, case.held_out, n=4)
    assert found.summary()


def export(case: Case) -> None:
    arch = case.gates.sub_architecture(0)
    x = case.held_out[0][:2]
    smaller = arch.export(case.model, x)
    with torch.no_grad(), arch.applied(case.model):
        expected = case.model(x)
    assert torch.allclose(smaller(x), expected, atol=1e-5)


def scorers(case: Case) -> None:
    magnitude = evaluation.SCORERS["magnitude"](case.model, case.sites)
    heads = [site for site in case.sites if site.units == "heads"]
    if heads:
        with pytest.raises(GatingError, match=r"MultiheadAttention holds its weights.*Leave"):
            magnitude(*case.data, tasks=[0, 1])
    else:
        assert magnitude(*case.data, tasks=[0, 1])
    for name in ("energy", "taylor", "centred_effect", "cdrp"):
        scorer = evaluation.SCORERS[name](case.model, case.sites)
        scores = scorer(*case.data, tasks=[0, 1])
        archs = evaluation.top_k(scores, case.sites, [0, 1], 0.5)
        assert archs[0].n_kept == round(0.5 * n_gates(case.sites))


def sweeps(case: Case) -> None:
    found = evaluation.size_sweep(
        case.model,
        {"nad": case.gates},
        case.held_out,
        train_data=case.data,
        sizes=(0.25, 0.5),
        n_random=2,
    )
    assert found.summary()


USES = [learning, stores, evaluating, certain, verdicts, flows, captum, zennit,
        quantus_and_virelay, reports, curves, mosaics, export, scorers, sweeps]  # fmt: skip


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_units_work_everywhere(use: Callable[[Case], Any], case: Case) -> None:
    before = [p.clone() for p in case.model.parameters()]
    use(case)
    assert all(torch.equal(a, b) for a, b in zip(before, case.model.parameters(), strict=True))
