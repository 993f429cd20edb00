"""Scorers against independently computed numbers."""

from __future__ import annotations

import copy

import pytest
import torch
from captum import attr
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import GateSite, GatingError, RunOptions, TaskGates, gated, recorded
from nad_attr.evaluation import (
    SCORERS,
    CaptumLayerScorer,
    CDRPScorer,
    CentredEffectScorer,
    GatesScorer,
    GivenScorer,
    GradientXActivationScorer,
    InternalInfluenceScorer,
    LayerActivationScorer,
    LayerConductanceScorer,
    LayerDeepLiftScorer,
    LayerGradientXActivationScorer,
    LayerIntegratedGradientsScorer,
    LRPScorer,
    MagnitudeScorer,
    NeuronMCTScorer,
    OtherTaskScorer,
    RandomScorer,
    TaylorOutputScorer,
    best_variant,
    best_variants,
    evaluate,
    shuffled,
    top_k,
)
from nad_attr.gating.means import channel_means
from tests import helpers
from tests.scorer_contract import NETWORKS, assert_same

F64 = {"dtype": torch.float64}


def per_task(values: Tensor, labels: Tensor) -> Tensor:
    """Means of (N, C) over the images of each class: (3, C)."""
    return torch.stack([values[labels == k].mean(0) for k in range(3)])


# ---------------------------------------------------------------------------------------------
# Effects of the network's own gradient
# ---------------------------------------------------------------------------------------------


class Summed(nn.Module):
    """z = 1 + sum over channels and positions of w_kc a_cp."""

    def __init__(self) -> None:
        super().__init__()
        weights = torch.tensor([[1.0, -2.0], [0.0, 3.0], [1.0, 1.0]], dtype=torch.float64)
        self.register_buffer("weights", weights)

    def forward(self, x: Tensor) -> Tensor:
        return x.sum(-1) @ self.weights.T + 1


SITE = GateSite("0", 2, 1)
IMAGES = torch.tensor(
    [[[1.0, 3.0], [1.0, -2.0]], [[0.0, 2.0], [4.0, 0.0]], [[5.0, -1.0], [0.0, 1.0]]],
    dtype=torch.float64,
)
LABELS = torch.tensor([0, 0, 1])


@pytest.fixture
def linear() -> nn.Module:
    return nn.Sequential(nn.Identity(), Summed()).eval()


def test_taylor_of_the_output_by_hand(linear: nn.Module) -> None:
    # Sums over positions: image 0 (4, -1), image 1 (2, 4), image 2 (4, 1).
    found = TaylorOutputScorer(linear, [SITE])(IMAGES, LABELS, **F64)["0"]
    expected = torch.tensor([[(16 + 4) / 2, 4 * (1 + 16) / 2], [0.0, 9.0]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)


def test_centred_effect_by_hand(linear: nn.Module) -> None:
    # Means over images and positions: (10/6, 4/6), times two positions (10/3, 4/3).
    found = CentredEffectScorer(linear, [SITE])(IMAGES, LABELS, **F64)["0"]
    a, b = 10 / 3, 4 / 3
    expected = [[(4 - a + a - 2) / 2, 2 * (b + 1 + 4 - b) / 2], [0.0, 3 * (b - 1)]]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_centred_effect_is_exact_where_the_network_is_linear() -> None:
    """From the last site on, against really replacing one channel at a time by its mean."""
    model = helpers.build(helpers.TinyResNet)
    site = GateSite("layer2.0", 6, 1)
    images, labels = helpers.labelled_images(9)
    means = {"layer2.0": torch.linspace(-1, 1, 6)}
    found = CentredEffectScorer(model, [site], means=means, signed=True)(images, labels, **F64)
    for channel in range(6):
        gates = torch.ones(6, dtype=torch.float64)
        gates[channel] = 0
        with torch.no_grad():
            whole = model(images)
            with gated(model, {"layer2.0": gates}, sites=[site], means=means):
                change = whole - model(images)
        expected = torch.stack([change[labels == k, k].mean() for k in range(3)])
        torch.testing.assert_close(found["layer2.0"][:, channel], expected)


def test_centred_effect_takes_the_means_of_all_images() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(9)
    means = channel_means(model, sites, [(images,)])
    given = CentredEffectScorer(model, sites, means=means)(images, labels, tasks=[1], **F64)
    # Given means are kept in float32.
    found = CentredEffectScorer(model, sites)(
        images, labels, tasks=[1], run=RunOptions(batch_size=2), **F64
    )
    assert_same(found, given, tolerance=1e-6)


def test_centred_effect_at_zero_is_neuron_mct() -> None:
    make, sites = NETWORKS["tokens"]
    model = helpers.build(make)
    data = helpers.labelled_images(6)
    zeros = {site.name: torch.zeros(site.n_channels) for site in sites}
    found = CentredEffectScorer(model, sites, means=zeros)(*data, **F64)
    assert_same(found, NeuronMCTScorer(model, sites)(*data, **F64))


def test_bad_means() -> None:
    make, sites = NETWORKS["cnn"]
    with pytest.raises(ValueError, match="means lack gate site 'relu1'"):
        CentredEffectScorer(helpers.build(make), sites, means={})


# ---------------------------------------------------------------------------------------------
# Captum
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(NETWORKS))
@pytest.mark.parametrize("include_others", [False, True])
def test_captums_gradient_x_activation_is_ours(name: str, include_others: bool) -> None:
    make, sites = NETWORKS[name]
    model = helpers.build(make)
    data = helpers.labelled_images(6)
    options = {"include_others": include_others, **F64}
    found = LayerGradientXActivationScorer(model, sites, signed=True)(*data, **options)
    assert_same(found, GradientXActivationScorer(model, sites)(*data, **options))
    found = LayerGradientXActivationScorer(model, sites)(*data, **options)
    assert_same(found, NeuronMCTScorer(model, sites)(*data, **options))


def test_sites_on_both_sides_of_modules() -> None:
    """One call for the inputs, one for the outputs; the order stays."""
    model = helpers.build(helpers.TinyCNN)
    sites = [
        GateSite("relu1", 6, 1),
        GateSite("conv2", 6, 1, at_input=True),
        GateSite("relu2", 8, 1),
    ]
    data = helpers.labelled_images(6)
    found = LayerGradientXActivationScorer(model, sites, signed=True)(*data, **F64)
    assert_same(found, GradientXActivationScorer(model, sites)(*data, **F64))


def test_layer_activation_is_the_sum_over_positions() -> None:
    make, sites = NETWORKS["resnet"]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(6)
    found = LayerActivationScorer(model, sites, signed=True)(images, labels, **F64)
    with torch.no_grad(), recorded(model, sites) as activations:
        model(images)
    for site in sites:
        expected = per_task(activations[site.name].sum((2, 3)), labels)
        torch.testing.assert_close(found[site.name], expected)


OUT_OF_PLACE = {
    LayerConductanceScorer: (attr.LayerConductance, {"n_steps": 3}),
    LayerIntegratedGradientsScorer: (attr.LayerIntegratedGradients, {"n_steps": 3}),
    InternalInfluenceScorer: (attr.InternalInfluence, {"n_steps": 3, "method": "riemann_left"}),
    LayerDeepLiftScorer: (attr.LayerDeepLift, {"baselines": torch.full((1, 3, 8, 8), 0.25)}),
}


@pytest.mark.slow
@pytest.mark.parametrize("scorer", list(OUT_OF_PLACE))
def test_captum_called_by_hand(scorer: type[CaptumLayerScorer]) -> None:
    """On a network that Captum can handle by itself: without in-place activations."""
    method, options = OUT_OF_PLACE[scorer]
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    model = helpers.build(helpers.TinyResNet)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    images, labels = helpers.labelled_images(6)
    # Before an in-place ReLU, after one, and at a block.
    sites = [GateSite("bn1", 4, 1), GateSite("relu", 4, 1), GateSite("layer1.1", 4, 1)]
    found = scorer(model, sites, **options)(images, labels, run=RunOptions(batch_size=5), **F64)
    for site in sites:
        layer = plain.get_submodule(site.name)
        reference = method(plain, layer).attribute(images, target=labels, **options)
        expected = per_task(reference.sum((2, 3)).abs().detach(), labels)
        torch.testing.assert_close(found[site.name], expected)


def test_conductance_of_all_positions_adds_up() -> None:
    """Signed conductance at a cut point sums to the change of the output along the path."""
    model = helpers.build(helpers.TinyCNN)
    images, labels = helpers.labelled_images(6)
    scorer = LayerConductanceScorer(model, [GateSite("relu1", 6, 1)], n_steps=400, signed=True)
    found = scorer(images, labels, run=RunOptions(batch_size=401 * 6), **F64)["relu1"].sum(1)
    with torch.no_grad():
        change = model(images) - model(torch.zeros_like(images))
    expected = torch.stack([change[labels == k, k].mean() for k in range(3)])
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.005)


class Overwrites(nn.Module):
    """Writes into its layer's output in place, by a function that no flag reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.next = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x * 1)
        y -= 1
        return F.relu(self.next(y), inplace=True) * 3


@pytest.mark.slow
@pytest.mark.parametrize("at_input", [False, True])
def test_captum_where_the_network_writes_in_place(at_input: bool) -> None:
    sites = [GateSite("layer", 2, 1, at_input=at_input), GateSite("next", 2, 1)]
    images = torch.tensor([[2.0, 0.5], [4.0, 3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1])
    model = Overwrites().eval()
    found = LayerGradientXActivationScorer(model, sites)(images, labels)
    assert found["layer"].tolist() == [[6, 0], [0, 9]]
    assert found["next"].tolist() == [[3, 0], [0, 6]]
    found = LayerActivationScorer(model, sites)(images, labels)
    assert found["layer"].tolist() == [[2, 0.5], [4, 3]]
    assert found["next"].tolist() == [[1, 0.5], [3, 2]]
    # What the output, 3 relu(x - 1), gains from 0 to the image.
    found = LayerIntegratedGradientsScorer(model, sites, n_steps=500)(images, labels)
    exact = torch.tensor([[3.0, 0.0], [0.0, 6.0]])
    torch.testing.assert_close(found["layer"], exact, atol=0.05, rtol=0)


def test_whole_number_inputs() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 3)).double().eval()
    tokens, labels = torch.tensor([[0, 1, 2], [3, 4, 0], [2, 2, 1]]), torch.arange(3)
    site = [GateSite("0", 4, -1)]
    found = LayerGradientXActivationScorer(model, site, signed=True)(tokens, labels, **F64)
    assert_same(found, GradientXActivationScorer(model, site)(tokens, labels, **F64))


def test_groups_are_explained_by_their_logsumexp() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    data = helpers.labelled_images(6)
    options = {"tasks": [(0, 2), 1], **F64}
    found = LayerGradientXActivationScorer(model, sites, signed=True)(*data, **options)
    assert_same(found, GradientXActivationScorer(model, sites)(*data, **options))


def test_no_pass_holds_more_images_than_asked() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    sizes = []

    def forward(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return model(x)

    for scorer in (
        LayerConductanceScorer(model, sites, n_steps=3),
        LayerIntegratedGradientsScorer(model, sites, n_steps=3),
        LayerDeepLiftScorer(model, sites),
    ):
        scorer(*helpers.labelled_images(6), run=RunOptions(batch_size=8, forward_func=forward))
    assert max(sizes) <= 8
    assert sum(sizes) / len(sizes) > 4


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Linear(2, 2), nn.Linear(2, 2), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


def test_deep_lift_refuses_reused_activations() -> None:
    model = helpers.build(Twice)
    scorer = LayerDeepLiftScorer(model, [GateSite("first", 2, 1)])
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="'relu' is call"):
        scorer(torch.ones(2, 2).double(), torch.tensor([0, 1]))


def test_a_method_that_fails_says_where() -> None:
    model = helpers.build(helpers.TinyCNN)
    images, labels = helpers.labelled_images(4)
    scorer = CaptumLayerScorer(model, [GateSite("relu1", 6, 1)], attr.LayerLRP)
    with (
        helpers.assert_model_untouched(model),
        pytest.raises(GatingError, match=r"LayerLRP.*relu1"),
    ):
        scorer(images, labels)
    scorer = CaptumLayerScorer(model, [GateSite("relu1", 6, 1)], attr.LayerGradCam)
    with pytest.raises(GatingError, match="6 channels"):
        scorer(images, labels)


def test_another_of_captums_methods() -> None:
    """Closing one channel at a time, by Captum's layer ablation, against doing so by gates."""
    model = helpers.build(helpers.TinyCNN)
    site = GateSite("relu2", 8, 1)
    images, labels = helpers.labelled_images(3)
    mask = torch.arange(8).reshape(1, 8, 1, 1)
    scorer = CaptumLayerScorer(
        model, [site], attr.LayerFeatureAblation, signed=True, layer_mask=mask
    )
    found = scorer(images, labels, **F64)["relu2"]
    for channel in range(8):
        gates = torch.ones(8, dtype=torch.float64)
        gates[channel] = 0
        with torch.no_grad(), gated(model, {"relu2": gates}, sites=[site]):
            closed = model(images)
        with torch.no_grad():
            change = (model(images) - closed)[range(3), labels]
        # Captum gives the whole change to each of the channel's 16 positions.
        torch.testing.assert_close(found[:, channel], 16 * change)


def test_bad_captum_arguments() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    with pytest.raises(TypeError, match=r"captum\.attr\.LayerConductance"):
        CaptumLayerScorer(model, sites)
    with pytest.raises(TypeError, match="LayerConductance"):
        CaptumLayerScorer(model, sites, torch.relu)
    with pytest.raises(TypeError, match=r"LayerDeepLift\.attribute has no argument 'n_steps'"):
        LayerDeepLiftScorer(model, sites, n_steps=3)
    with pytest.raises(TypeError, match="target is set by the scorer"):
        LayerDeepLiftScorer(model, sites, target=3)


# ---------------------------------------------------------------------------------------------
# Zennit
# ---------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """Convolutions, ReLUs, sum pooling and a linear layer: no biases anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, bias=False)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(8 * 64, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.relu2(self.conv2(self.relu1(self.conv1(x)))).flatten(1))


def epsilon_everywhere():
    from zennit.composites import LayerMapComposite
    from zennit.rules import Epsilon, Pass
    from zennit.types import Activation, Convolution, Linear

    layers = [((Convolution, Linear), Epsilon(1e-12)), (Activation, Pass())]
    return LayerMapComposite(layers)


def test_relevance_sums_to_the_output_at_each_site() -> None:
    model = helpers.build(Plain)
    images, labels = helpers.labelled_images(6)
    sites = [
        GateSite("conv1", 6, 1),
        GateSite("relu1", 6, 1),
        GateSite("conv2", 6, 1, at_input=True),
        GateSite("relu2", 8, 1),
        GateSite("linear", 512, 1, at_input=True),
    ]
    scorer = LRPScorer(model, sites, epsilon_everywhere(), signed=True)
    found = scorer(images, labels, **F64)
    with torch.no_grad():
        outputs = model(images)
    expected = torch.stack([outputs[labels == k, k].mean() for k in range(3)])
    for site in sites[1:]:
        torch.testing.assert_close(found[site.name].sum(1), expected, rtol=1e-6, atol=1e-9)


def test_epsilon_rule_without_biases_is_gradient_x_activation() -> None:
    """With a vanishing epsilon and ReLUs; after the last site it is so by one step of algebra."""
    model = helpers.build(Plain)
    data = helpers.labelled_images(6)
    sites = [GateSite("relu1", 6, 1), GateSite("relu2", 8, 1)]
    found = LRPScorer(model, sites, epsilon_everywhere())(*data, **F64)
    expected = NeuronMCTScorer(model, sites)(*data, **F64)
    assert_same(found, expected, tolerance=1e-6)


def test_positive_rule_by_hand() -> None:
    """z+ shares a relevance out by the positive parts a_j w_ij+."""
    model = nn.Sequential(nn.Identity(), nn.Conv1d(2, 2, 1, bias=False), nn.Flatten()).eval()
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[[1.0], [-2.0]], [[3.0], [1.0]]]))
    image = torch.tensor([[[2.0], [1.0]]])
    from zennit.composites import LayerMapComposite
    from zennit.rules import ZPlus
    from zennit.types import Convolution

    composite = LayerMapComposite([(Convolution, ZPlus())])
    scorer = LRPScorer(model, [GateSite("0", 2, 1)], composite)
    # Outputs: 2 - 2 = 0 and 6 + 1 = 7; the second is shared out as 6 : 1.
    found = scorer(image, torch.tensor([1]))["0"]
    torch.testing.assert_close(found, torch.tensor([[6.0, 1.0]]), rtol=1e-4, atol=1e-4)


def test_batchnorm_is_merged_and_put_back() -> None:
    model = helpers.build(helpers.TinyCNN)
    images, labels = helpers.labelled_images(4)
    merged = copy.deepcopy(model)
    with torch.no_grad():
        scale = model.bn1.weight / (model.bn1.running_var + model.bn1.eps).sqrt()
        merged.conv1.weight.mul_(scale[:, None, None, None])
        merged.conv1.bias.copy_((model.conv1.bias - model.bn1.running_mean) * scale)
        merged.conv1.bias.add_(model.bn1.bias)
        merged.bn1.running_mean.zero_()
        merged.bn1.running_var.fill_(1 - model.bn1.eps)
        merged.bn1.weight.fill_(1)
        merged.bn1.bias.zero_()
    sites = [GateSite("conv1", 6, 1), GateSite("relu1", 6, 1)]
    expected = LRPScorer(merged, sites, canonizers=[])(images, labels, **F64)
    with helpers.assert_model_untouched(model):
        found = LRPScorer(model, sites)(images, labels, **F64)
    # Zennit 0.5 leaves BatchNorm's eps in.
    assert_same(found, expected, tolerance=1e-3)


class Listed(nn.Module):
    """Lists a BatchNorm behind a convolution that it does not follow."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).relu()).mean((2, 3))


def test_canonizers_that_change_the_network() -> None:
    model = helpers.build(Listed)
    data = helpers.labelled_images(3)
    sites = [GateSite("norm", 3, 1)]
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="canonizers"):
        LRPScorer(model, sites)(*data)
    LRPScorer(model, sites, canonizers=[])(*data)


def test_attention_is_refused() -> None:
    make, sites = NETWORKS["tokens"]
    with pytest.raises(ValueError, match=r"no rule for module 'blocks\.0\.norm1'"):
        LRPScorer(helpers.build(make), sites)


def test_bad_composites() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    with pytest.raises(ValueError, match=r"no composite 'lrp'; it has .*'epsilon_plus_flat'"):
        LRPScorer(model, sites, "lrp")
    with pytest.raises(ValueError, match=r"'epsilon_gamma_box' does not go .* make it with them"):
        LRPScorer(model, sites, "epsilon_gamma_box")
    with pytest.raises(TypeError, match="got 3"):
        LRPScorer(model, sites, 3)
    with pytest.raises(TypeError, match="leave out canonizers"):
        LRPScorer(model, sites, epsilon_everywhere(), canonizers=[])


# ---------------------------------------------------------------------------------------------
# Learned for each image
# ---------------------------------------------------------------------------------------------


def test_cdrp_is_a_plain_descent_for_each_image() -> None:
    model = helpers.build(helpers.TinyCNN)
    images, labels = helpers.labelled_images(4)
    site = GateSite("relu2", 8, 1)
    found = CDRPScorer(model, [site], steps=6, penalty=0.3)(images, labels, **F64)["relu2"]
    expected = []
    for image in images:
        with torch.no_grad():
            hidden = model.relu2(model.conv2(model.relu1(model.bn1(model.conv1(image[None])))))
            pooled = hidden.mean((2, 3))
            target = model.linear(pooled).softmax(1)
        gates, velocity = torch.ones(1, 8, dtype=torch.float64), 0.0
        for _ in range(6):
            logits = (gates * pooled) @ model.linear.weight.T + model.linear.bias
            # d cross-entropy / d logits = softmax - target
            slope = (logits.softmax(1) - target) @ model.linear.weight * pooled
            velocity = 0.9 * velocity + slope.detach() + 0.3
            gates = (gates - 0.1 * velocity).clamp(0, 10).detach()
        expected.append(gates[0])
    torch.testing.assert_close(found, per_task(torch.stack(expected), labels))


def test_cdrp_keeps_what_the_prediction_needs() -> None:
    """Of four channels, one decides: its gate stays, and the useless ones close."""
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 2, bias=False)).eval()
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].weight[0, 2] = 4.0
    images, labels = torch.ones(2, 4), torch.tensor([0, 0])
    found = CDRPScorer(model, [GateSite("0", 4, 1)])(images, labels)["0"][0]
    assert found[2] > 0.3
    assert found[[0, 1, 3]].max() < 0.05


@pytest.mark.parametrize(
    ("option", "value"), [("steps", 0), ("learning_rate", -1.0), ("momentum", 1.0), ("highest", 0)]
)
def test_bad_cdrp_options(option: str, value: float) -> None:
    make, sites = NETWORKS["cnn"]
    with pytest.raises(ValueError, match=option):
        CDRPScorer(helpers.build(make), sites, **{option: value})


# ---------------------------------------------------------------------------------------------
# Magnitude
# ---------------------------------------------------------------------------------------------


def filters(module: nn.Module, norm: nn.BatchNorm2d | None = None) -> Tensor:
    size = module.weight.detach().flatten(1).square().sum(1).sqrt()
    if norm is not None:
        size = size * norm.weight.detach().abs() / (norm.running_var + norm.eps).sqrt()
    return size


def test_magnitude_of_plain_layers() -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = [GateSite("conv1", 6, 1), *NETWORKS["cnn"][1], GateSite("pool", 8, 1)]
    found = MagnitudeScorer(model, sites)(*helpers.labelled_images(3), **F64)
    expected = [
        filters(model.conv1),
        filters(model.conv1, model.bn1),
        filters(model.conv2),
        filters(model.conv2) / 16,  # 4 x 4 positions
    ]
    for site, norms in zip(sites, expected, strict=True):
        torch.testing.assert_close(found[site.name], norms.expand(3, -1))


def test_magnitude_along_a_residual_stream() -> None:
    model = helpers.build(helpers.TinyResNet)
    sites = [GateSite("layer1.0", 4, 1), GateSite("layer1.1", 4, 1), GateSite("layer2.0", 6, 1)]
    found = MagnitudeScorer(model, sites)(*helpers.labelled_images(3), **F64)
    stem = filters(model.conv1, model.bn1)
    first, second = (filters(block.conv2, block.bn2) for block in model.layer1)
    block = model.layer2[0]
    expected = [
        (stem**2 + first**2).sqrt(),
        (stem**2 + first**2 + second**2).sqrt(),
        (filters(block.shortcut) ** 2 + filters(block.conv2, block.bn2) ** 2).sqrt(),
    ]
    for site, norms in zip(sites, expected, strict=True):
        torch.testing.assert_close(found[site.name], norms.expand(3, -1))


def test_magnitude_of_a_concatenation() -> None:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 3, padding=1)
            self.cat, self.head = nn.Identity(), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.head(self.cat(torch.cat([self.second(x.relu()), x], 1)).mean((2, 3)))

    model = helpers.build(Dense)
    found = MagnitudeScorer(model, [GateSite("cat", 5, 1)])(*helpers.labelled_images(3), **F64)
    expected = torch.cat([filters(model.second), filters(model.first)]).expand(3, -1)
    torch.testing.assert_close(found["cat"], expected)


def test_magnitude_has_no_filters_for_mixed_channels() -> None:
    model = helpers.build(helpers.TinyViT)
    scorer = MagnitudeScorer(model, [GateSite("norm", 8, -1)])
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="8 of the 8 chan"):
        scorer(*helpers.labelled_images(3))


# ---------------------------------------------------------------------------------------------
# Scores that are there already
# ---------------------------------------------------------------------------------------------

SITES = [GateSite("a", 3, 1), GateSite("b", 2, 1)]
TASKS = [4, 1, (2, 3), 0]


@pytest.fixture
def gates() -> TaskGates:
    generator = torch.Generator().manual_seed(0)
    logits = {s.name: torch.randn(4, s.n_channels, generator=generator) for s in SITES}
    values = {name: value.sigmoid() for name, value in logits.items()}
    return TaskGates(values, SITES, TASKS, logits=logits, task_names=["d", "e", "f", "g"])


def ask(scorer: GivenScorer, *tasks: object) -> dict[str, Tensor]:
    return scorer(torch.zeros(4, 1), torch.tensor([4, 1, 2, 0]), tasks=tasks)


def test_gates_give_the_sub_architectures_of_the_gates(gates: TaskGates) -> None:
    found = ask(GatesScorer(gates), *TASKS)
    for size in (0.2, 0.6, 1.0):
        assert top_k(found, SITES, TASKS, size) == gates.sub_architectures(size)
    assert torch.equal(ask(GatesScorer(gates), (2, 3))["a"][0], gates.logits["a"][2])


def test_gates_of_another_task(gates: TaskGates) -> None:
    scorer = OtherTaskScorer(gates)
    assert scorer.other == {4: 1, 1: (2, 3), (2, 3): 0, 0: 4}
    assert torch.equal(ask(scorer, 0)["b"][0], gates.logits["b"][0])
    seen = set()
    for seed in range(20):
        other = OtherTaskScorer(gates, seed=seed).other
        assert set(other.values()) == set(TASKS)
        assert all(task != given for task, given in other.items())
        seen.add(tuple(other.values()))
    assert len(seen) > 1
    assert OtherTaskScorer(gates, seed=3).other == OtherTaskScorer(gates, seed=3).other
    with pytest.raises(ValueError, match="two tasks"):
        OtherTaskScorer(gates.select([4]))


def test_shuffled(gates: TaskGates) -> None:
    found = shuffled(gates, seed=1)
    assert found.tasks == gates.tasks
    assert found.task_names == gates.task_names
    assert found != gates
    for name in gates:
        torch.testing.assert_close(found[name].sort(1).values, gates[name].sort(1).values)
        torch.testing.assert_close(found.logits[name].sigmoid(), found[name])
    assert [a.sizes for a in found.sub_architectures()] == [
        a.sizes for a in gates.sub_architectures()
    ]
    assert shuffled(gates, seed=1) == found
    assert shuffled(gates, seed=2) != found
    assert torch.equal(shuffled(gates.select([0]), seed=1)["a"], found.select([0])["a"])


def test_bad_given_scores(gates: TaskGates) -> None:
    with pytest.raises(ValueError, match="do not name the same"):
        GivenScorer({}, SITES, TASKS)
    with pytest.raises(ValueError, match=r"\(tasks, channels\)"):
        GivenScorer({name: gates[name] for name in gates}, SITES, [4, 1])
    for maker in (GatesScorer, OtherTaskScorer, shuffled):
        with pytest.raises(TypeError, match="TaskGates"):
            maker({"a": torch.zeros(1, 3)})


# ---------------------------------------------------------------------------------------------
# Each at its best
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_best_variant_is_the_best_of_all() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    scoring, choosing = helpers.labelled_images(12), helpers.labelled_images(15, seed=1)
    scorer = GradientXActivationScorer(model, sites)
    means = channel_means(model, sites, [(scoring[0],)])
    found = best_variants(scorer, scoring, choosing, sizes=[0.3, 0.6], means=means)
    assert list(found) == [0.3, 0.6]
    for size, best in found.items():
        expected = {}
        for include_others in (False, True):
            for signed in (False, True):
                scorer.signed = signed
                scores = scorer(*scoring, include_others=include_others)
                for per_site in (False, True):
                    archs = top_k(scores, sites, [0, 1, 2], size, means=means, per_site=per_site)
                    measured = evaluate(model, archs, choosing, n_random=0)
                    expected[include_others, signed, per_site] = measured.own_auc.mean()
        assert best.tried == pytest.approx(expected)
        assert best.own_auc == max(best.tried.values())
        assert best.tried[best.include_others, best.signed, best.per_site] == best.own_auc
        again = evaluate(model, best.architectures(means=means), choosing, n_random=0)
        assert again.own_auc.mean() == pytest.approx(best.own_auc)
        assert all(abs(arch.size - size) < 0.1 for arch in best.architectures())
        assert best.architectures(0.5)[0].n_kept == 7


def test_best_variant_of_scores_without_variants() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    data = helpers.labelled_images(6)
    best = best_variant(RandomScorer(model, sites), data, data, size=0.5, per_site=[False])
    assert list(best.tried) == [(False, False, False)]
    assert best.name == "own images, absolute, over all sites"


def test_best_variant_needs_something_to_choose_on() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    images, labels = helpers.labelled_images(6)
    one = images, torch.zeros_like(labels)
    with pytest.raises(ValueError, match="no task has both"):
        best_variant(RandomScorer(model, sites), (images, labels), one, size=0.5)
    with pytest.raises(ValueError, match="at least one size"):
        best_variants(RandomScorer(model, sites), (images, labels), (images, labels), sizes=[])


def test_scorers_by_name() -> None:
    make, sites = NETWORKS["cnn"]
    model = helpers.build(make)
    for name, make_scorer in SCORERS.items():
        assert name == name.lower()
        assert make_scorer(model, sites).sites == tuple(sites)
    assert len(SCORERS) == 22
    with pytest.raises(TypeError):
        SCORERS["mine"] = RandomScorer


def test_lrp_undoes_canonizers_that_fail_half_way() -> None:
    class Crossed(nn.Module):
        """BatchNorms that are listed after other layers than those that they follow."""

        def __init__(self) -> None:
            super().__init__()
            self.good = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
            self.conv = nn.Conv2d(6, 2, 1)
            self.norm = nn.BatchNorm2d(6)
            self.wide = nn.Conv2d(4, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(self.wide(self.good(x)))).mean((2, 3))

    model = helpers.build(Crossed)
    for norm in (model.good[1], model.norm):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    scorer = LRPScorer(model, [GateSite("good", 4)])
    images, labels = torch.rand(2, 3, 5, 5, dtype=torch.float64), torch.tensor([0, 1])
    with helpers.assert_model_untouched(model), pytest.raises(GatingError, match="canonizers"):
        scorer(images, labels)
