"""Heat-maps for Quantus: which class, which gates, which network; Quantus's metrics as they are."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients, Saliency
from torch import Tensor, nn

from nad_attr import GatingError, SiteError, SubArchitecture, TaskGates, gated
from nad_attr.bridges.quantus import ATTRIBUTIONS, SubArchitectureExplainer, explain_func
from nad_attr.system.rng import isolated_rng
from tests import helpers
from tests.folded import SITES, Plain, into_next, plain, random_gates

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def task_gates() -> TaskGates:
    rows = [random_gates(True, seed) for seed in range(3)]
    return TaskGates(
        {s.name: torch.stack([r[s.name] for r in rows]) for s in SITES}, SITES, [0, 1, 2]
    )


def single() -> Plain:
    """In float32: Quantus knows nothing else."""
    return plain().float()


@pytest.fixture
def batch() -> tuple[np.ndarray, np.ndarray]:
    return helpers.images(4).float().numpy(), np.array([0, 2, 1, 2])


def folded(model: Plain, task: int, soft: bool = False) -> Plain:
    gates = task_gates().gates_of(task)
    if not soft:
        gates = {name: gate > 0.5 for name, gate in gates.items()}
    return into_next(model, {name: gate.float() for name, gate in gates.items()})


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("kind", ["gradient", "integrated_gradients"])
def test_each_image_through_its_own_class(batch: Any, kind: str, soft: bool) -> None:
    model, (x, y) = single(), batch
    options = {"n_steps": 5} if kind == "integrated_gradients" else {}
    explain = SubArchitectureExplainer(task_gates(), kind, soft=soft, sum_channels=False, **options)
    with helpers.assert_model_untouched(model):
        found = explain(model, x, y)
    assert found.shape == x.shape
    assert found.dtype == np.float32
    for i, task in enumerate(y):
        reference, image = folded(model, int(task), soft), torch.tensor(x[i : i + 1])
        if kind == "gradient":
            expected = Saliency(reference).attribute(image, target=int(task), abs=False)
        else:
            expected = IntegratedGradients(reference).attribute(image, target=int(task), n_steps=5)
        np.testing.assert_allclose(
            found[i : i + 1], expected.detach().numpy(), rtol=1e-4, atol=1e-7
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ATTRIBUTIONS)
def test_an_image_does_not_depend_on_the_batch(batch: Any, kind: str) -> None:
    if kind == "lrp":
        pytest.importorskip("zennit")
    model, (x, y) = single(), batch
    explain = SubArchitectureExplainer(task_gates(), kind)
    with helpers.assert_model_untouched(model):
        found = explain(model, x, y)
    order = [2, 0]
    np.testing.assert_allclose(
        explain(model, x[order], y[order]), found[order], rtol=1e-4, atol=1e-7
    )
    whole = SubArchitectureExplainer(None, kind)(model, x, y)
    full = SubArchitectureExplainer(SubArchitecture.full(SITES), kind)(model, x, y)
    np.testing.assert_allclose(full, whole, rtol=1e-4, atol=1e-7)
    assert np.abs(found - whole).max() > 1e-3 * np.abs(whole).max()


def test_predicted_classes_are_those_of_the_whole_network(batch: Any) -> None:
    model, (x, y) = single(), batch
    model.linear.bias.data.copy_(torch.tensor([0.0, 0.0, 5.0]))
    explain = SubArchitectureExplainer(task_gates(), classes="predicted")
    given = SubArchitectureExplainer(task_gates())
    assert np.array_equal(explain(model, x, y), given(model, x, np.full(4, 2)))


def test_own_functions_are_called_inside_the_gates(batch: Any) -> None:
    model, (x, _) = single(), batch
    seen: list[Tensor] = []

    def attribution(network: nn.Module, images: Tensor, classes: Tensor, factor: int) -> Tensor:
        seen.append(network(images).detach())
        return images * factor + torch.randn(images.shape)

    arch = task_gates().sub_architecture(1)
    explain = SubArchitectureExplainer(arch, attribution, factor=2)
    with helpers.assert_model_untouched(model):
        found = explain(model, x, 1)
        assert np.array_equal(found, explain(model, x, 1))
        assert np.array_equal(found[2:3], explain(model, x[2:3], 1))
    with gated(model, arch), torch.no_grad():
        torch.testing.assert_close(torch.cat(seen[:4]), model(torch.tensor(x)))
    assert found.shape == (4, 1, 8, 8)
    every = SubArchitectureExplainer(arch, attribution, factor=2, sum_channels=False)(model, x, 1)
    np.testing.assert_allclose(every.sum(1, keepdims=True), found, rtol=1e-5, atol=1e-6)
    other = SubArchitectureExplainer(arch, attribution, seed=1, factor=2)(model, x, 1)
    assert not np.array_equal(found, other)


def test_the_function_does_the_same(batch: Any) -> None:
    model, (x, y) = single(), batch
    expected = SubArchitectureExplainer(task_gates(), size=0.3)(model, x, y)
    found = explain_func(
        model, x, y, gates=task_gates(), size=0.3, device="cpu", method="what evaluate calls it"
    )
    assert np.array_equal(found, expected)
    by_class = {t: task_gates().sub_architecture(t, 0.3) for t in range(3)}
    assert np.array_equal(explain_func(model, x, y, gates=by_class), expected)


def test_bad_input_is_named(batch: Any) -> None:
    model, (x, y) = single(), batch
    gates = task_gates()
    for arguments, error, message in (
        (([1],), TypeError, "gates"),
        (({0: 1},), TypeError, "gates as a mapping"),
        ((gates, "lime"), ValueError, "'lrp'"),
        ((gates, 3), TypeError, "attribution"),
    ):
        with pytest.raises(error, match=message):
            SubArchitectureExplainer(*arguments)
    for options, message in (
        ({"classes": "all"}, "classes"),
        ({"soft": True, "size": 0.5}, "size"),
        ({"attribution": "lrp", "n_steps": 3}, "composite"),
    ):
        with pytest.raises(ValueError, match=message):
            SubArchitectureExplainer(gates, **options)
    with pytest.raises(ValueError, match="TaskGates"):
        SubArchitectureExplainer(gates.sub_architecture(0), soft=True)
    explain = SubArchitectureExplainer(gates.select([0, 1]))
    with helpers.assert_model_untouched(model):
        with pytest.raises(KeyError, match="2"):
            explain(model, x, y)
        with pytest.raises(ValueError, match="3 classes for 4 images"):
            explain(model, x, y[:3])
        with pytest.raises(ValueError, match="3 outputs"):
            explain(model, x, 3)
        with pytest.raises(TypeError, match="class indices"):
            explain(model, x, 0.5)
        with pytest.raises(ValueError, match="device"):
            explain(model, x, 0, device="nowhere")
        shape = SubArchitectureExplainer(gates, lambda m, images, c: m(images)[:, :1, None, None])
        with pytest.raises(ValueError, match="shape"):
            shape(model, x, y)
        fails = SubArchitectureExplainer(gates, lambda m, images, c: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fails(model, x, y)
        with pytest.raises(GatingError, match="did not fire"):
            SubArchitectureExplainer(gates, lambda m, images, c: images)(model, x, y)
    with pytest.raises(SiteError):
        SubArchitectureExplainer(gates)(helpers.build(helpers.TinyViT), x, y)
    with pytest.raises(ValueError, match="train mode"):
        SubArchitectureExplainer(gates)(copy.deepcopy(model).train(), x, y)


# ---------------------------------------------------------------------------------------------
# Quantus itself
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def quantus() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("quantus", reason="the extra quantus is not installed")


@pytest.mark.slow
def test_metrics_of_every_category_run_unmodified(quantus: Any, batch: Any) -> None:
    model, (x, y) = single(), batch
    masks = np.zeros((4, 1, 8, 8), bool)
    masks[:, :, 2:6, 2:6] = True
    quiet = {"disable_warnings": True, "display_progressbar": False}
    metrics = {
        "faithfulness": quantus.FaithfulnessCorrelation(nr_runs=4, subset_size=8, **quiet),
        "robustness": quantus.MaxSensitivity(nr_samples=2, **quiet),
        "localisation": quantus.RelevanceMassAccuracy(abs=True, **quiet),
        "randomisation": quantus.MPRT(**quiet),
        "random class": quantus.RandomLogit(num_classes=3, **quiet),
        "complexity": quantus.Sparseness(**quiet),
        "axiomatic": quantus.Completeness(**quiet),
    }
    explain = SubArchitectureExplainer(task_gates(), "integrated_gradients", n_steps=3)
    # Quantus draws from NumPy's global state.
    with helpers.assert_model_untouched(model), isolated_rng(0):
        for name, metric in metrics.items():
            scores = metric(
                model=model,
                x_batch=x,
                y_batch=y,
                a_batch=None,
                s_batch=masks,
                explain_func=explain,
                device="cpu",
            )
            assert len(scores) > 0, name
