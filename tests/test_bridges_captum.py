"""Captum's methods on a gated network: equal to the gates in the weights, and nothing left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import captum.attr
import pytest
import torch
from captum.attr import (
    LRP,
    Attribution,
    DeepLift,
    IntegratedGradients,
    LayerActivation,
    NoiseTunnel,
    Saliency,
)
from captum.attr._utils.lrp_rules import GammaRule
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import (
    GateSite,
    GatingError,
    NADAttribution,
    Recipe,
    SiteError,
    SubArchitecture,
    TaskGates,
    gated,
)
from nad_attr.bridges.captum import (
    GatedAttribution,
    gaussian_perturbation,
    heatmap_figure,
    infidelity,
    input_shaped,
    sensitivity,
)
from nad_attr.system.rng import isolated_rng
from tests import helpers
from tests.folded import (
    RESIDUAL_SITES,
    SITES,
    Plain,
    into_next,
    into_same,
    plain,
    random_gates,
    random_means,
    residual,
    with_constants,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

_GRID = torch.arange(4).reshape(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
_MASK = _GRID.expand(1, 3, 8, 8).contiguous()
_BASE = helpers.images(2, seed=9) * 0.1
_NEURON = {"neuron_selector": (7, 1, 1)}

Make = Callable[[Plain], Any]


def _ridge() -> Any:
    from captum._utils.models.linear_model import SkLearnRidge

    return SkLearnRidge(alpha=1e-3)


#: Every input attribution of Captum: how it is made, and what it is called with.
INPUT: dict[str, tuple[Make, dict[str, Any]]] = {
    "Saliency": (captum.attr.Saliency, {}),
    "InputXGradient": (captum.attr.InputXGradient, {}),
    "IntegratedGradients": (IntegratedGradients, {"baselines": _BASE, "n_steps": 5}),
    "DeepLift": (DeepLift, {"baselines": _BASE}),
    "DeepLiftShap": (captum.attr.DeepLiftShap, {"baselines": _BASE}),
    "GradientShap": (captum.attr.GradientShap, {"baselines": _BASE}),
    "GuidedBackprop": (captum.attr.GuidedBackprop, {}),
    "Deconvolution": (captum.attr.Deconvolution, {}),
    "GuidedGradCam": (lambda m: captum.attr.GuidedGradCam(m, m.conv2), {}),
    "FeatureAblation": (captum.attr.FeatureAblation, {"feature_mask": _MASK}),
    "FeaturePermutation": (captum.attr.FeaturePermutation, {"feature_mask": _MASK}),
    "Occlusion": (
        captum.attr.Occlusion,
        {"sliding_window_shapes": (3, 4, 4), "strides": (3, 4, 4)},
    ),
    "ShapleyValueSampling": (
        captum.attr.ShapleyValueSampling,
        {"feature_mask": _MASK, "n_samples": 2},
    ),
    "ShapleyValues": (captum.attr.ShapleyValues, {"feature_mask": _MASK}),
    "KernelShap": (captum.attr.KernelShap, {"feature_mask": _MASK, "n_samples": 8}),
    "Lime": (
        lambda m: captum.attr.Lime(m, interpretable_model=_ridge()),
        {"feature_mask": _MASK, "n_samples": 8},
    ),
    "LimeBase": (
        lambda m: captum.attr.LimeBase(
            m,
            _ridge(),
            similarity_func=lambda x, y, z, **kw: 1.0,
            perturb_func=lambda x, **kw: x + 0.1 * torch.randn_like(x),
            perturb_interpretable_space=False,
            from_interp_rep_transform=None,
            to_interp_rep_transform=lambda x, y, **kw: x.flatten(1),
        ),
        {"n_samples": 4},
    ),
    "LRP": (LRP, {}),
    "NoiseTunnel": (
        lambda m: NoiseTunnel(captum.attr.Deconvolution(m)),
        {"nt_samples": 3, "stdevs": 0.1},
    ),
}
#: Every layer and neuron attribution, at a layer that is not a gate site.
INNER: dict[str, tuple[Make, dict[str, Any]]] = {
    "LayerActivation": (lambda m: LayerActivation(m, m.conv2), {}),
    "LayerConductance": (
        lambda m: captum.attr.LayerConductance(m, m.conv2),
        {"baselines": _BASE, "n_steps": 5},
    ),
    "LayerGradientXActivation": (
        lambda m: captum.attr.LayerGradientXActivation(m, m.conv2),
        {},
    ),
    "LayerGradCam": (lambda m: captum.attr.LayerGradCam(m, m.conv2), {}),
    "InternalInfluence": (
        lambda m: captum.attr.InternalInfluence(m, m.conv2),
        {"baselines": _BASE, "n_steps": 5},
    ),
    "LayerDeepLift": (lambda m: captum.attr.LayerDeepLift(m, m.conv2), {"baselines": _BASE}),
    "LayerDeepLiftShap": (
        lambda m: captum.attr.LayerDeepLiftShap(m, m.conv2),
        {"baselines": _BASE},
    ),
    "LayerGradientShap": (
        lambda m: captum.attr.LayerGradientShap(m, m.conv2),
        {"baselines": _BASE},
    ),
    "LayerIntegratedGradients": (
        lambda m: captum.attr.LayerIntegratedGradients(m, m.conv2),
        {"baselines": _BASE, "n_steps": 5},
    ),
    "LayerLRP": (lambda m: captum.attr.LayerLRP(m, m.conv2), {}),
    "LayerFeatureAblation": (
        lambda m: captum.attr.LayerFeatureAblation(m, m.bn1),
        {"layer_mask": torch.arange(6).reshape(1, 6, 1, 1)},
    ),
    "LayerFeaturePermutation": (
        # Captum 0.9 cannot choose a column here, of no network: choose it beforehand.
        lambda m: captum.attr.LayerFeaturePermutation(lambda x: m(x)[:, 1], m.bn1),
        {"layer_mask": torch.arange(6).reshape(1, 6, 1, 1), "target": None},
    ),
    "NeuronGradient": (lambda m: captum.attr.NeuronGradient(m, m.conv2), _NEURON),
    "NeuronConductance": (
        lambda m: captum.attr.NeuronConductance(m, m.conv2),
        _NEURON | {"baselines": _BASE, "n_steps": 5},
    ),
    "NeuronIntegratedGradients": (
        lambda m: captum.attr.NeuronIntegratedGradients(m, m.conv2),
        _NEURON | {"baselines": _BASE, "n_steps": 5},
    ),
    "NeuronDeepLift": (
        lambda m: captum.attr.NeuronDeepLift(m, m.conv2),
        _NEURON | {"baselines": _BASE},
    ),
    "NeuronDeepLiftShap": (
        lambda m: captum.attr.NeuronDeepLiftShap(m, m.conv2),
        _NEURON | {"baselines": _BASE},
    ),
    "NeuronGradientShap": (
        lambda m: captum.attr.NeuronGradientShap(m, m.conv2),
        _NEURON | {"baselines": _BASE},
    ),
    "NeuronDeconvolution": (lambda m: captum.attr.NeuronDeconvolution(m, m.conv2), _NEURON),
    "NeuronGuidedBackprop": (lambda m: captum.attr.NeuronGuidedBackprop(m, m.conv2), _NEURON),
    "NeuronFeatureAblation": (
        lambda m: captum.attr.NeuronFeatureAblation(m, m.conv2),
        _NEURON | {"feature_mask": _MASK},
    ),
}
#: What explains no image: bases, helpers for data and text.
NOT_FOR_IMAGES = {
    "Attribution",
    "GradientAttribution",
    "LayerAttribution",
    "NeuronAttribution",
    "PerturbationAttribution",
    "DataLoaderAttribution",
    "LLMAttribution",
    "LLMGradientAttribution",
    "RemoteLLMAttribution",
}


def call(make: Make, model: Plain, x: Tensor, options: dict[str, Any]) -> Tensor:
    """One attribution, with all random states seeded alike."""
    method = make(model)
    if isinstance(method, (captum.attr.Lime, captum.attr.LimeBase)):
        pytest.importorskip("sklearn")
    if {"target", "kwargs"} & {*inspect.signature(method.attribute).parameters}:
        options = {"target": 1} | options
    if isinstance(method, captum.attr.LimeBase) and type(method) is captum.attr.LimeBase:
        x = x[:1]
    with isolated_rng(0):
        found = method.attribute(x, **options)
    return found[0] if isinstance(found, tuple) else found


def test_no_method_of_captum_is_forgotten() -> None:
    classes = {
        name
        for name in captum.attr.__all__
        if inspect.isclass(getattr(captum.attr, name))
        and issubclass(getattr(captum.attr, name), Attribution)
    }
    assert classes - NOT_FOR_IMAGES <= {*INPUT, *INNER}


@pytest.mark.slow
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize("name", [*INPUT, *INNER])
def test_equal_to_the_folded_network(name: str, soft: bool) -> None:
    make, options = (INPUT | INNER)[name]
    model, x, gates = plain(), helpers.images(2), random_gates(soft)
    with gated(model, gates, sites=SITES):
        found = call(make, model, x, options)
    expected = call(make, into_next(model, gates), x, options)
    scale = float(expected.abs().max())
    assert scale > 0
    # LRP adds 1e-9 to activations before or after their gate.
    loose = 1e-6 if "LRP" in name else 1e-11
    torch.testing.assert_close(found, expected, rtol=loose, atol=loose * scale)
    if name not in ("NeuronFeatureAblation",):
        whole = call(make, model, x, options)
        assert (found - whole).abs().max() > 1e-3 * scale


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUT)
def test_means_are_biases_of_the_folded_network(name: str) -> None:
    make, options = INPUT[name]
    model, x, gates, means = plain(), helpers.images(2), random_gates(True), random_means()
    with gated(model, gates, sites=SITES, means=means):
        found = call(make, model, x, options)
    expected = call(make, into_next(model, gates, means), x, options)
    scale = float(expected.abs().max())
    loose = 1e-4 if "LRP" in name else 1e-10
    torch.testing.assert_close(found, expected, rtol=loose, atol=loose * scale)


@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(
    "name", ["IntegratedGradients", "Deconvolution", "GuidedBackprop", "DeepLift", "LRP"]
)
def test_residual_networks_with_in_place_functions(name: str, soft: bool) -> None:
    make, options = INPUT[name]
    model, gates, folded = residual(soft)
    shortcut = helpers.build(lambda: nn.Conv2d(4, 4, 1, bias=False))
    for network in (model, folded):  # Captum's LRP has no rule for Identity
        for block in network.layer1:
            block.shortcut = (
                shortcut
                if block is network.layer1[0]
                else helpers.build(lambda: nn.Conv2d(4, 4, 1, bias=False))
            )
    x = helpers.images(2)
    with gated(model, gates, sites=RESIDUAL_SITES):
        found = call(make, model, x, options)
    expected = call(make, folded, x, options)
    loose = 1e-4 if name == "LRP" else 1e-9
    torch.testing.assert_close(
        found, expected, rtol=loose, atol=loose * float(expected.abs().max())
    )


@pytest.mark.parametrize("name", ["LayerActivation", "LayerGradCam", "LayerConductance"])
def test_layer_methods_see_the_gated_value_at_a_site(name: str) -> None:
    kind, model, x, gates = (
        getattr(captum.attr, name),
        plain(),
        helpers.images(2),
        random_gates(True),
    )
    options = {} if name == "LayerActivation" else {"target": 1}
    with gated(model, gates, sites=SITES):
        found = kind(model, model.relu1).attribute(x, **options)
    folded = into_same(model, gates)
    expected = kind(folded, folded.relu1).attribute(x, **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("name", ["NeuronGuidedBackprop", "NeuronDeconvolution", "NeuronDeepLift"])
def test_neurons_at_a_site_are_gated(name: str) -> None:
    kind, model, x, gates = (
        getattr(captum.attr, name),
        plain(),
        helpers.images(2),
        random_gates(True),
    )
    options = {"baselines": _BASE} if name == "NeuronDeepLift" else {}
    with gated(model, gates, sites=SITES):
        found = kind(model, model.relu2).attribute(x, (3, 0, 0), **options)
    folded = into_same(model, gates)
    expected = kind(folded, folded.relu2).attribute(x, (3, 0, 0), **options)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-14)


def test_gates_of_nested_contexts_keep_their_order() -> None:
    model, x = plain(), helpers.images(2)
    outer, inner, mean = random_gates(True, 0), random_gates(True, 1), random_means()
    with gated(model, outer, sites=SITES, means=mean), gated(model, inner, sites=SITES):
        expected = model(x)
        hooked = []

        class Peek(captum.attr.Deconvolution):
            def __init__(self) -> None:
                super().__init__(model)
                self.forward_func = lambda images: hooked.append(model(images)) or hooked[-1]

        Peek().attribute(x, target=0)
    torch.testing.assert_close(hooked[-1], expected)


@pytest.mark.parametrize(
    "site", [GateSite("conv1", 6, 1), GateSite("conv2", 6, 1, at_input=True)], ids=lambda s: s.name
)
@pytest.mark.parametrize("name", ["Deconvolution", "GuidedBackprop", "DeepLift", "LRP"])
def test_gates_on_layers_and_at_inputs(name: str, site: GateSite) -> None:
    make, options = INPUT[name]
    model, x = plain(), helpers.images(2)
    gate = random_gates(True)["relu1"]
    with gated(model, {site.name: gate}, sites=[site]):
        found = call(make, model, x, options)
    folded = plain()
    if site.at_input:
        folded.conv2.weight.data *= gate[:, None, None]
    else:
        folded.conv1.weight.data *= gate[:, None, None, None]
        folded.conv1.bias.data *= gate
    expected = call(make, folded, x, options)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


# ---------------------------------------------------------------------------------------------
# GatedAttribution
# ---------------------------------------------------------------------------------------------


def arch(task: int = 1) -> SubArchitecture:
    return SubArchitecture({n: g > 0 for n, g in random_gates(False).items()}, SITES, task=task)


@pytest.mark.slow
@pytest.mark.parametrize("name", INPUT)
def test_the_object_says_the_same_and_leaves_nothing(name: str) -> None:
    make, options = INPUT[name]
    model, x = plain(), helpers.images(1 if name == "LimeBase" else 2)
    method = GatedAttribution(make(model), arch())
    with helpers.assert_model_untouched(model, x):
        found = method.attribute(x, **options, target=1)
        again = method.attribute(x, **options, target=1)
    torch.testing.assert_close(found, again, rtol=0, atol=0)
    with arch().applied(model):
        expected = call(make, model, x, options)
    if name not in ("GradientShap", "NoiseTunnel", "Lime", "LimeBase", "KernelShap"):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", [LRP, DeepLift, captum.attr.GuidedBackprop])
def test_nothing_is_left_after_an_exception(kind: Any) -> None:
    model, x = plain(), helpers.images(2)

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ArithmeticError("half way")

    model.pool = Fails().eval()
    method = GatedAttribution(kind(model), random_gates(False), sites=SITES)
    with helpers.assert_model_untouched(model, x), pytest.raises((ArithmeticError, TypeError)):
        method.attribute(x, target=1)


def test_it_is_a_method_of_captum() -> None:
    model, x = plain(), helpers.images(2)
    gates = TaskGates({n: g[None] for n, g in random_gates(True).items()}, SITES, [1])
    method = GatedAttribution(IntegratedGradients(model), gates)
    found, delta = method.attribute(x, target=1, n_steps=50, return_convergence_delta=True)
    assert method.has_convergence_delta()
    assert method.multiplies_by_inputs
    assert method.get_name() == "Gated Attribution"
    torch.testing.assert_close(
        method.compute_convergence_delta(found, torch.zeros_like(x), x, target=1), delta
    )
    with gated(model, gates), torch.no_grad():
        difference = (model(x) - model(torch.zeros_like(x)))[:, 1]
    torch.testing.assert_close(found.sum((1, 2, 3)), difference + delta)
    smooth = NoiseTunnel(method).attribute(x, nt_samples=2, stdevs=0.0, target=1, n_steps=50)
    torch.testing.assert_close(smooth, found)


def test_gates_for_each_image_where_images_are_not_repeated() -> None:
    model, x = plain(), helpers.images(2)
    rows = [random_gates(True, seed) for seed in (0, 1)]
    gates = TaskGates(
        {s.name: torch.stack([r[s.name] for r in rows]) for s in SITES}, SITES, [0, 1]
    )
    found = GatedAttribution(Saliency(model), gates, tasks=[0, 1]).attribute(x, target=[0, 1])
    for i in (0, 1):
        one = GatedAttribution(Saliency(model), gates, tasks=i).attribute(x[i : i + 1], target=i)
        torch.testing.assert_close(found[i : i + 1], one)
    with pytest.raises(GatingError, match="gates for 2 images met a batch of"):
        GatedAttribution(IntegratedGradients(model), gates, tasks=[0, 1]).attribute(x, target=0)


def test_what_cannot_work_is_refused() -> None:
    model, x = plain(), helpers.images(2)
    model.conv2.rule = GammaRule()
    method = GatedAttribution(LRP(model), random_gates(False), sites=SITES, means=random_means())
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="Gamma"):
        method.attribute(x, target=1)
    GatedAttribution(LRP(model), random_gates(False), sites=SITES).attribute(x, target=1)
    del model.conv2.rule
    with pytest.raises(TypeError, match="Captum attribution"):
        GatedAttribution(model, arch())
    with pytest.raises(TypeError, match="model="):
        GatedAttribution(Saliency(lambda images: model(images)), arch())
    GatedAttribution(Saliency(lambda images: model(images)), arch(), model=model).attribute(
        x, target=1
    )
    with pytest.raises(SiteError, match="relu1"):
        GatedAttribution(Saliency(helpers.build(helpers.TinyViT)), arch())
    with pytest.raises(ValueError, match="train mode"):
        GatedAttribution(Saliency(plain().train()), arch())
    other = GatedAttribution(Saliency(plain()), arch(), model=model)  # explains another network
    with pytest.raises(GatingError, match="did not fire"):
        other.attribute(x, target=1)


# ---------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """relu(x) w, whose gradient predicts every perturbation that changes no sign."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.linear = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.relu(x.flatten(1)))


def test_infidelity_is_that_of_the_gated_network() -> None:
    model = helpers.build(Linear)
    x = 1 + torch.rand(3, 1, 2, 2, dtype=torch.float64)
    part = SubArchitecture.from_kept({"relu": [0, 2]}, [GateSite("relu", 4, 1)])
    method = GatedAttribution(IntegratedGradients(model, multiply_by_inputs=False), part)
    with helpers.assert_model_untouched(model, x):
        score = infidelity(method, x, target=0, normalize=False)
    assert score.shape == (3,)
    assert score.max() < 1e-20
    # What the whole network does is foretold by its own gradient, not by the part's.
    whole = IntegratedGradients(model, multiply_by_inputs=False)
    assert infidelity(whole, x, target=0, normalize=False).max() < 1e-20
    weight = model.linear.weight[0].detach()
    noise = []

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        noise.append(torch.full_like(inputs, 0.25))
        return noise[-1], inputs - noise[-1]

    class Half(Attribution):
        def attribute(self, inputs: Tensor, **kwargs: Any) -> Tensor:
            return torch.zeros_like(inputs)

    found = infidelity(Half(model), x, perturb, target=0, normalize=False)
    expected = (0.25 * weight.sum()) ** 2
    torch.testing.assert_close(found, expected.expand(3))


@pytest.mark.slow
def test_layer_methods_have_an_infidelity_and_a_sensitivity() -> None:
    model, (x, labels) = helpers.build(helpers.TinyCNN), helpers.labelled_images(6)
    nad = NADAttribution(model, model.relu1, recipe=Recipe(steps=2)).learn((x, labels))
    with helpers.assert_model_untouched(model, x):
        first = infidelity(nad, x, target=labels, seed=1)
        assert torch.equal(first, infidelity(nad, x, target=labels, seed=1))
        assert not torch.equal(first, infidelity(nad, x, target=labels, seed=2))
        several = NADAttribution(model, gates=None, recipe=Recipe(steps=2)).learn((x, labels))
        for method in (nad, several):
            steadiness = sensitivity(method, x, target=labels, n_perturb_samples=3)
            assert steadiness.shape == (6,)
            assert steadiness.isfinite().all()
            assert steadiness.min() > 0
        with pytest.raises(ValueError, match="one layer"):
            infidelity(several, x, target=labels)
    with pytest.raises(TypeError, match="Captum"):
        sensitivity(model, x)


def test_sensitivity_is_captums() -> None:
    model, x = plain(), helpers.images(2)
    method = GatedAttribution(Saliency(model), arch())
    found = sensitivity(method, x, target=1, n_perturb_samples=4, perturb_radius=0.1, seed=7)
    folded = into_next(model, random_gates(False))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        expected = captum.metrics.sensitivity_max(
            Saliency(folded).attribute, x, target=1, n_perturb_samples=4, perturb_radius=0.1
        )
    torch.testing.assert_close(found, expected)
    still = sensitivity(method, x, target=1, perturb_func=lambda inputs: inputs)
    assert not still.any()


def test_layers_in_the_shape_of_images() -> None:
    x = torch.zeros(2, 3, 6, 6)
    maps = torch.rand(2, 5, 3, 3)
    shaped = input_shaped(maps, x)
    torch.testing.assert_close(shaped.sum((1, 2, 3)), maps.sum((1, 2, 3)))
    assert (shaped[:, 0] == shaped[:, 2]).all()
    flat = input_shaped(torch.ones(2, 1, 3, 3), x)
    torch.testing.assert_close(flat, torch.full_like(x, 9 / 108))
    assert input_shaped(x, x) is x
    with pytest.raises(ValueError, match="four axes"):
        input_shaped(torch.ones(2, 5), x)
    with pytest.raises(ValueError, match="above zero"):
        gaussian_perturbation(0.0)


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


def test_figures() -> None:
    pytest.importorskip("matplotlib")
    maps, images = torch.randn(2, 3, 6, 6), torch.rand(2, 3, 6, 6)
    figure = heatmap_figure({"plain": maps, "gated": maps[:, 0] * 0}, images, titles=["a", "b"])
    assert len(figure.axes) == 4
    assert [axis.get_ylabel() for axis in figure.axes[::2]] == ["plain", "gated"]
    assert figure.axes[0].get_title() == "a"
    assert len(heatmap_figure(maps).axes) == 2
    figure.canvas.draw()
    for wrong in (
        {},
        torch.ones(3),
        {"a": maps, "b": maps[:1]},
    ):
        with pytest.raises(ValueError, match=r"attributions"):
            heatmap_figure(wrong)
    with pytest.raises(ValueError, match="images of shape"):
        heatmap_figure(maps, F.pad(images, (0, 1, 0, 1)))
    with pytest.raises(ValueError, match="titles"):
        heatmap_figure(maps, titles=["a"])


def test_constants_of_each_task_are_biases_of_the_folded_network() -> None:
    model, x = plain(), helpers.images(2)
    gates, masks, constants = with_constants()
    for task in (0, 1):
        method = GatedAttribution(captum.attr.IntegratedGradients(model), gates, tasks=task)
        found = method.attribute(x, target=1)
        folded = captum.attr.IntegratedGradients(into_next(model, masks[task], constants[task]))
        torch.testing.assert_close(found, folded.attribute(x, target=1), rtol=1e-8, atol=1e-10)
