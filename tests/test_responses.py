"""Sweeps: margins, mixed precision, reuse of the whole network's answers, and site fidelity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr._checks import GatingError
from nad_attr.data.labels import own_images
from nad_attr.data.sources import as_source
from nad_attr.evaluation.ablation import fit_ablation
from nad_attr.evaluation.responses import _margins, answers, progress_bar, site_fidelity, sweep
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import recorded
from nad_attr.running.forward import Runner
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.site import GateSite
from tests import helpers

CNN_SITES = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
RESNET_SITES = [GateSite("relu", 4, 1), GateSite("layer1.0", 4, 1), GateSite("layer2.0", 6, 1)]
VIT_SITES = [GateSite("blocks.0", 8, -1), GateSite("blocks.1", 8, -1)]
NETWORKS = {
    "cnn": (helpers.TinyCNN, CNN_SITES),
    "resnet": (helpers.TinyResNet, RESNET_SITES),
    "vit": (helpers.TinyViT, VIT_SITES),
}
TASKS = (2, (0, 1), 0, 2)


def architectures(sites: list[GateSite], *, means: bool = False) -> list[SubArchitecture]:
    generator = torch.Generator().manual_seed(2)
    values = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    return [
        SubArchitecture(
            {s.name: torch.rand(s.n_channels, generator=generator) < 0.5 for s in sites},
            sites,
            task=task,
            means=values if means else None,
        )
        for task in TASKS
    ]


@pytest.fixture
def cnn() -> nn.Module:
    return helpers.build(helpers.TinyCNN)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    return helpers.labelled_images(11)


# ---------------------------------------------------------------------------------------------
# Margins
# ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6),
    st.booleans(),
)
def test_margins(rows: list[list[int]], groups: bool) -> None:
    """Many equal outputs; with and without groups of classes."""
    tasks = [3, 0, (1, 2)] if groups else [3, 0, 1]
    outputs = torch.tensor(rows, dtype=torch.float64)
    values = task_outputs(outputs, tasks)
    found = _margins(outputs, values, own_images(torch.arange(4), tasks))
    for i, row in enumerate(rows):
        for j, task in enumerate(tasks):
            own = task if isinstance(task, tuple) else (task,)
            rest = max(x for k, x in enumerate(row) if k not in own)
            assert found[i, j].item() == pytest.approx(values[i, j].item() - rest)


def test_margin_of_a_single_output() -> None:
    outputs = torch.tensor([[2.0]])
    assert _margins(outputs, outputs, torch.tensor([[True]])).tolist() == [[math.inf]]


# ---------------------------------------------------------------------------------------------
# The sweep
# ---------------------------------------------------------------------------------------------


def test_parts_of_a_sweep(cnn: nn.Module, data) -> None:
    """In blocks of rows, with the whole network's answers taken from the first."""
    archs = architectures(CNN_SITES, means=True)
    expected = sweep(cnn, archs, data)
    runner, source = Runner(cnn, RunOptions(batch_size=4)), as_source(data)
    passes = []
    cnn.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    options = {"ablation": None, "columns": expected.columns}
    with progress_bar(runner, 4, 22) as bar:
        first = answers(runner, archs[:3], source, bar=bar, **options)
        assert sum(passes) == 11 * 4
        passes.clear()
        second = answers(runner, archs[3:], source, bar=bar, whole=first, **options)
        assert sum(passes) == 11
        own = answers(runner, archs, source, bar=bar, whole=first, own_only=True, **options)
    for name in ("gated", "gated_class", "gated_margin"):
        both = torch.cat([getattr(first, name), getattr(second, name)])
        torch.testing.assert_close(both, getattr(expected, name))
    for part in (first, second):
        for name in ("whole", "whole_class", "whole_margin"):
            torch.testing.assert_close(getattr(part, name), getattr(expected, name))
    assert own.gated.shape == (4, 11, 1)
    for k, column in enumerate([0, 1, 2, 0]):
        torch.testing.assert_close(own.gated[k, :, 0], expected.gated[k, :, column])


@pytest.mark.parametrize("amp", [True, torch.bfloat16])
def test_mixed_precision(data, amp) -> None:
    model = helpers.build(helpers.TinyCNN).float()
    images, labels = data[0].float(), data[1]
    seen = []
    handle = model.conv1.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    found = sweep(model, architectures(CNN_SITES), (images, labels), run=RunOptions(amp=amp))
    assert set(seen) == {torch.bfloat16}
    seen.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):  # the caller's own plays no part
        exact = sweep(model, architectures(CNN_SITES), (images, labels), run=RunOptions(amp=False))
    assert set(seen) == {torch.float32}
    handle.remove()
    for name in ("whole", "gated", "whole_margin", "gated_margin"):
        assert getattr(found, name).dtype == torch.float32
        torch.testing.assert_close(getattr(found, name), getattr(exact, name), rtol=0.1, atol=0.05)
    assert not torch.equal(found.gated, exact.gated)


@pytest.mark.parametrize("kind", ["mean", "resample", "noise"])
def test_mixed_precision_of_ablations(data, kind: str) -> None:
    model = helpers.build(helpers.TinyCNN).float()
    data = data[0].float(), data[1]
    ablation = fit_ablation(model, CNN_SITES, data, kind=kind)
    archs = architectures(CNN_SITES)
    found = sweep(model, archs, data, ablation=ablation, run=RunOptions(amp=True))
    exact = sweep(model, archs, data, ablation=ablation)
    torch.testing.assert_close(found.gated, exact.gated, rtol=0.1, atol=0.1)


def test_bad_amp(cnn: nn.Module, data) -> None:
    assert [RunOptions(amp=x).dtype for x in (None, False, True, torch.float16)] == [
        None,
        None,
        torch.bfloat16,
        torch.float16,
    ]
    for bad in ("bf16", torch.float32, 1.0):
        for function in (sweep, site_fidelity):
            with pytest.raises(ValueError, match=r"amp must be True, torch\.bfloat16"):
                function(cnn, architectures(CNN_SITES), data, run=RunOptions(amp=bad))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["zero", "mean", "other_mean", "resample", "noise"])
def test_on_a_gpu(cnn: nn.Module, data, kind: str) -> None:
    archs = architectures(CNN_SITES)
    here, there = (
        sweep(
            cnn,
            archs,
            data,
            ablation=fit_ablation(cnn, CNN_SITES, data, kind=kind, run=RunOptions(device=device)),
            run=RunOptions(device=device),
        )
        for device in ("cpu", "cuda")
    )
    torch.testing.assert_close(here.gated, there.gated, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------------------------
# Fidelity of the sites
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("means", [False, True])
def test_site_fidelity(name: str, means: bool, data) -> None:
    """Against activations recorded in one whole and one gated pass for each task."""
    make, sites = NETWORKS[name]
    model = helpers.build(make)
    archs = architectures(sites, means=means)
    with helpers.assert_model_untouched(model, *data):
        found = site_fidelity(model, archs, data, run=RunOptions(batch_size=5))
    assert list(found) == [site.name for site in sites]
    for row, arch in enumerate(archs):
        own = own_images(data[1], [arch.task])[0]
        with torch.no_grad(), recorded(model, sites) as values:
            model(data[0][own])
            whole = dict(values)
        # The recording hooks come after the gates, so they see what flows on.
        with torch.no_grad(), arch.applied(model), recorded(model, sites) as values:
            model(data[0][own])
            gated = dict(values)
        for site in sites:
            error = (gated[site.name] - whole[site.name]).square().sum()
            expected = error / whole[site.name].square().sum()
            assert float(found[site.name][row]) == pytest.approx(float(expected), rel=1e-6)


def test_site_fidelity_of_batches(cnn: nn.Module, data) -> None:
    for kind in (None, "resample", "noise"):
        ablation = None if kind is None else fit_ablation(cnn, CNN_SITES, data, kind=kind)
        archs = architectures(CNN_SITES)
        expected = site_fidelity(cnn, archs, data, ablation=ablation)
        for batch_size in (1, 4, 9):
            found = site_fidelity(
                cnn, archs, data, ablation=ablation, run=RunOptions(batch_size=batch_size)
            )
            for name, values in expected.items():
                torch.testing.assert_close(found[name], values)


def test_site_fidelity_ends() -> None:
    site = GateSite("0", 2, 1)
    model = nn.Sequential(nn.Identity()).eval()
    images = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 0.0]])
    labels = torch.tensor([0, 1, 1])

    def found(kept: list[int], task: int) -> float:
        arch = SubArchitecture.from_kept({"0": kept}, [site], task=task)
        return float(site_fidelity(model, arch, (images, labels))["0"][0])

    assert found([0, 1], 0) == 0
    assert found([], 0) == 1
    assert found([0], 0) == pytest.approx(16 / 25)
    assert found([0], 1) == 0
    assert found([1], 1) == 1
    silent = SubArchitecture.from_kept({"0": [0]}, [site], task=1)
    zeros = site_fidelity(model, silent, (images[2:], labels[2:]))
    assert zeros["0"].isnan().all()
    both = [SubArchitecture.from_kept({}, [site], task=k) for k in (0, 1)]
    some = site_fidelity(model, both, (images[:1], torch.tensor([0])))
    assert some["0"].isnan().tolist() == [False, True]


def test_site_fidelity_bad_input(cnn: nn.Module, data) -> None:
    archs = architectures(CNN_SITES)
    images, labels = data
    with helpers.assert_model_untouched(cnn):
        with pytest.raises(ValueError, match="no image of any of the tasks"):
            site_fidelity(cnn, archs[0], (images, labels * 0))
        with pytest.raises(ValueError, match="there is a label 7"):
            site_fidelity(cnn, archs, (images, torch.where(labels == 1, 7, labels)))
        with pytest.raises(GatingError, match="did not fire"):
            site_fidelity(cnn, archs, data, run=RunOptions(forward_func=lambda x: x.flatten(1)))
        with pytest.raises(ValueError, match="batch_size"):
            site_fidelity(cnn, archs, data, run=RunOptions(batch_size=0))
        with pytest.raises(TypeError, match="TaskGates or a sequence"):
            site_fidelity(cnn, "gates", data)
