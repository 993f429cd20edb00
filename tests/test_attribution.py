"""The Captum interface: attributions are gate times activation and behave as Captum's methods."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import LayerActivation, LayerAttribution, NoiseTunnel
from captum.concept import TCAV, Classifier, Concept
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

import nad_attr.attribution as attribution_module
from nad_attr._checks import GatingError
from nad_attr.attribution import NADAttribution
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.api import learn_gates
from nad_attr.running import RunOptions
from nad_attr.sites.site import GateSite, SiteError
from tests.helpers import TinyCNN, assert_model_untouched, build, images, labelled_images, snapshot

try:
    from captum.testing.attr.helpers.gen_test_utils import get_target_layer, parse_test_config
    from captum.testing.attr.helpers.test_config import config as captum_configs
except ModuleNotFoundError:  # shipped from captum 0.8 on
    captum_configs = []

RECIPE = Recipe(size=0.5, steps=1)

# Batches of a single class are intended here; their warning has a test of its own.
pytestmark = pytest.mark.filterwarnings("ignore:task .* has own images only")


def expanded(gate: Tensor, activation: Tensor) -> Tensor:
    """Gates (C,) or (N, C) on channel axis 1, expanded to a layer's size."""
    gate = gate.to(activation.dtype)
    gate = gate if gate.ndim == 2 else gate[None]
    return gate.reshape(*gate.shape, *[1] * (activation.ndim - 2)).expand_as(activation)


class TwoInputs(nn.Module):
    """Takes two inputs and further arguments: sums them and runs the tiny CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.net = TinyCNN()

    def forward(
        self, x: Tensor, y: Tensor, flag: object = None, shift: Tensor | float = 0.0
    ) -> Tensor:
        assert flag in (None, "a flag")
        return self.net(x + y + shift)


@pytest.fixture(scope="module")
def learned() -> tuple[nn.Module, TaskGates]:
    """A network and its gates for the classes 0, 1 and 2."""
    model = build(TinyCNN)
    return model, learn_gates(model, labelled_images(), recipe=RECIPE)


@pytest.fixture
def no_learning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make any further learning fail."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("learned something")

    monkeypatch.setattr(attribution_module, "learn_gates", refuse)


# -- what comes out ----------------------------------------------------------------------------


@pytest.mark.slow
def test_learns_from_the_images_alone(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    y[y == 1] = 2
    nad = NADAttribution(tiny_cnn, recipe=RECIPE, seed=5)
    with assert_model_untouched(tiny_cnn, x, y):
        attributions = nad.attribute(x, target=y)

    assert [a.shape for a in attributions] == [(12, 6, 8, 8), (12, 8, 4, 4)]
    assert [site.name for site in nad.sites] == ["relu1", "relu2"]
    reference = learn_gates(tiny_cnn, (x, y), [0, 2], RECIPE, seed=5)
    assert nad.task_gates is None
    for k in (0, 2):
        for name, gate in nad.gates(k).items():
            assert gate.dtype == torch.float32
            torch.testing.assert_close(gate, reference.gates_of(k)[name], rtol=0, atol=0)
    for attribution, name in zip(attributions, ("relu1", "relu2"), strict=True):
        activation = LayerActivation(tiny_cnn, getattr(tiny_cnn, name)).attribute(x)
        gate = reference[name][(y == 2).long()]
        torch.testing.assert_close(attribution, expanded(gate, activation) * activation)


@pytest.mark.slow
def test_is_a_function_of_its_arguments(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    nad = NADAttribution(tiny_cnn, tiny_cnn.relu2, recipe=RECIPE)
    first = nad.attribute(x, y)
    nad.attribute(x + 1, y.flip(0))
    assert torch.equal(nad.attribute(x, y), first)
    assert torch.equal(NADAttribution(tiny_cnn, "relu2", recipe=RECIPE).attribute(x, y), first)


@pytest.mark.slow
def test_learn_makes_it_a_lookup(tiny_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = labelled_images()
    nad = NADAttribution(tiny_cnn)
    assert nad.learn((x, y), tasks=range(2), recipe=RECIPE) is nad
    gates = nad.task_gates
    assert gates is not None
    assert gates.tasks == (0, 1)
    assert gates == learn_gates(tiny_cnn, (x, y), [0, 1], RECIPE)

    monkeypatch.setattr(attribution_module, "learn_gates", None)
    new = images(5, seed=3)
    together = nad.attribute(new, target=[1, 0, 1, 1, 0])
    for i, k in enumerate([1, 0, 1, 1, 0]):
        for attribution, all_of_them in zip(
            nad.attribute(new[i : i + 1], target=k), together, strict=True
        ):
            torch.testing.assert_close(attribution, all_of_them[i : i + 1])
    assert nad.task_gates is gates
    with pytest.raises(KeyError, match=r"no gates for target 2; learned tasks are 0, 1\."):
        nad.attribute(new, target=2)
    with pytest.raises(KeyError, match="no gates for task 2"):
        nad.gates(2)


@pytest.mark.slow
def test_learn_takes_options_and_superclasses(tiny_cnn: nn.Module) -> None:
    data = labelled_images()
    nad = NADAttribution(tiny_cnn, recipe=RECIPE, seed=3).learn(
        data, {"one": 1, "rest": (0, 2)}, batch_size=64
    )
    assert nad.task_gates == learn_gates(tiny_cnn, data, {"one": 1, "rest": (0, 2)}, RECIPE, seed=3)
    assert nad.gates("rest").keys() == nad.gates((0, 2)).keys() == {"relu1", "relu2"}
    seeded = NADAttribution(tiny_cnn, recipe=RECIPE).learn(data, seed=3)
    assert seeded.task_gates == learn_gates(tiny_cnn, data, recipe=RECIPE, seed=3)
    with pytest.raises(TypeError, match="no_such_option"):
        nad.learn(data, no_such_option=1)
    with pytest.raises(TypeError, match="first argument of NADAttribution"):
        nad.learn(data, run=RunOptions(forward_func=tiny_cnn))


@pytest.mark.usefixtures("no_learning")
def test_gates_are_taken_as_given(learned: tuple[nn.Module, TaskGates]) -> None:
    model, gates = learned
    nad = NADAttribution(model, gates=gates)
    x = images(2)
    attributions = nad.attribute(x, target=1)
    assert len(attributions) == 2
    architecture = nad.sub_architecture(1)
    assert isinstance(architecture, SubArchitecture)
    assert architecture == gates.sub_architecture(1)
    assert nad.sub_architecture(1, size=0.25).n_kept == round(0.25 * 14)
    # One of the layers: the same gates.
    of_layer = NADAttribution(model, model.relu2, gates=gates).attribute(x, target=1)
    assert torch.equal(of_layer, attributions[1])


@pytest.mark.parametrize(
    "layer",
    ["relu2", GateSite("relu2", 8), lambda model: model.relu2],
    ids=["name", "site", "module"],
)
def test_one_layer_gives_a_tensor(
    learned: tuple[nn.Module, TaskGates], layer: str | GateSite | Callable[[nn.Module], nn.Module]
) -> None:
    model, gates = learned
    layer = layer(model) if callable(layer) else layer
    attribution = NADAttribution(model, layer, gates=gates).attribute(images(2), target=0)
    assert attribution.shape == (2, 8, 4, 4)
    many = NADAttribution(model, [layer], gates=gates).attribute(images(2), target=0)
    assert isinstance(many, list)
    assert torch.equal(many[0], attribution)


@pytest.mark.slow
def test_layers_come_in_the_order_asked_for(tiny_cnn: nn.Module) -> None:
    """As in Captum 0.9; gates are learned alike whatever the order."""
    x, y = labelled_images()
    nad = NADAttribution(tiny_cnn, [tiny_cnn.relu2, "conv1"], recipe=RECIPE)
    attributions = nad.attribute(x, y)
    assert [site.name for site in nad.sites] == ["relu2", "conv1"]
    assert [a.shape[1] for a in attributions] == [8, 6]
    theirs = LayerActivation(tiny_cnn, [tiny_cnn.relu2, tiny_cnn.conv1]).attribute(x)
    assert [a.shape for a in theirs] == [a.shape for a in attributions]
    # Learned gates are a mapping, in forward order.
    assert [*nad.learn((x, y)).gates(0)] == ["conv1", "relu2"]
    assert [site.name for site in nad.sites] == ["relu2", "conv1"]
    forward = NADAttribution(tiny_cnn, ["conv1", tiny_cnn.relu2], recipe=RECIPE)
    for again in (nad.attribute(x, y), forward.attribute(x, y)[::-1]):
        for one, other in zip(again, attributions, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("options", [{}, {"channel_dim": 1}])
def test_layers_of_equal_width_are_not_swapped(options: dict[str, int]) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU())
    model = nn.Sequential(*model, nn.Flatten(), nn.Linear(16, 2)).double().eval()
    x, y = torch.rand(6, 1, 4, 4, dtype=torch.float64), torch.tensor([0, 1] * 3)
    order = [model[3], model[1]]
    nad = NADAttribution(model, order, recipe=RECIPE, **options)
    for together in (nad.attribute(x, y), nad.learn((x, y)).attribute(x, y)):
        for layer, site, found in zip(order, nad.sites, together, strict=True):
            gate = torch.stack([nad.gates(k)[site.name] for k in range(2)])[y]
            activation = LayerActivation(model, layer).attribute(x)
            torch.testing.assert_close(found, expanded(gate, activation) * activation)


def test_attributing_copies_the_rows_it_needs_and_no_more() -> None:
    """Cloning the gates of 1,000 tasks at 15,000 channels would be 60 MB in each call."""
    n_tasks, width = 1000, 50
    model = nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, n_tasks)).eval()
    gates = torch.rand(n_tasks, width)
    nad = NADAttribution(
        model, "1", gates=TaskGates({"1": gates}, [GateSite("1", width, 1)], range(n_tasks))
    )

    aten = torch.ops.aten

    class Copied(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func in (aten.clone.default, aten._to_copy.default, aten.index.Tensor):
                self.n_bytes += result.numel() * result.element_size()
            return result

    targets = torch.tensor([7, 993])
    with Copied() as copied:
        found = nad.attribute(torch.rand(2, 3), target=targets)
    assert found.shape == (2, width)
    assert copied.n_bytes < gates.numel() * 4 / 4


def test_bare_gates(learned: tuple[nn.Module, TaskGates]) -> None:
    model, gates = learned
    nad = NADAttribution(model, "relu1", gates=gates, multiply_by_inputs=False)
    assert nad.multiplies_by_inputs is False
    assert NADAttribution(model).multiplies_by_inputs is True
    attribution = nad.attribute(images(3), target=torch.tensor([2, 0, 2]))
    expected = expanded(gates["relu1"][[2, 0, 2]], torch.empty(3, 6, 8, 8, dtype=torch.float64))
    assert torch.equal(attribution, expected)
    assert attribution.is_contiguous()


@pytest.mark.slow
def test_attribute_to_layer_input(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    nad = NADAttribution(tiny_cnn, tiny_cnn.conv2, recipe=RECIPE)
    attribution = nad.attribute(x, y, attribute_to_layer_input=True)
    activation = LayerActivation(tiny_cnn, tiny_cnn.conv2).attribute(
        x, attribute_to_layer_input=True
    )
    gate = torch.stack([nad.gates(k)["conv2"] for k in range(3)])[y]
    torch.testing.assert_close(attribution, expanded(gate, activation) * activation)

    nad.learn((x, y), attribute_to_layer_input=True)
    assert torch.equal(nad.attribute(x, y, attribute_to_layer_input=True), attribution)
    with pytest.raises(ValueError, match="were learned for the layer's input"):
        nad.attribute(x, y)
    nad.layer = None
    with pytest.raises(ValueError, match="the same attribute_to_layer_input"):
        nad.attribute(x, y)
    assert torch.equal(nad.attribute(x, y, attribute_to_layer_input=True)[0], attribution)
    nad.learn((x, y))
    with pytest.raises(ValueError, match="were learned for the layer's output"):
        nad.attribute(x, y, attribute_to_layer_input=True)


@pytest.mark.slow
def test_a_gate_site_says_itself_where_it_stands(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    site = GateSite("conv2", 6, at_input=True)
    expected = NADAttribution(tiny_cnn, "conv2", recipe=RECIPE).attribute(
        x, y, attribute_to_layer_input=True
    )
    nad = NADAttribution(tiny_cnn, site, recipe=RECIPE, channel_dim=1)
    assert torch.equal(nad.attribute(x, y), expected)
    assert torch.equal(nad.learn((x, y)).attribute(x, y), expected)


def test_in_place_relu_does_not_reach_the_attribution() -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(144, 2)
        )

    model = build(make)
    site = GateSite("0", 4)
    gates = TaskGates({"0": torch.tensor([[1.0, 0.0, 0.75, 0.5]])}, [site], [1])
    x = images(3)
    attribution = NADAttribution(model, model[0], gates=gates).attribute(x, target=1)
    expected = model[0](x).detach() * torch.tensor([1.0, 0.0, 0.75, 0.5]).double()[:, None, None]
    torch.testing.assert_close(attribution, expected)
    assert (attribution < 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_activation_dtype(dtype: torch.dtype) -> None:
    model = build(TinyCNN).to(dtype)
    gates = TaskGates({"relu2": torch.linspace(0, 1, 8)[None]}, [GateSite("relu2", 8)], [0])
    x = images(2).to(dtype)
    for multiply in (True, False):
        nad = NADAttribution(model, gates=gates, multiply_by_inputs=multiply)
        assert nad.attribute(x, target=0)[0].dtype == dtype


@pytest.mark.slow
def test_every_tiny_network(tiny_model: nn.Module) -> None:
    x, y = labelled_images()
    nad = NADAttribution(tiny_model, recipe=RECIPE)
    with assert_model_untouched(tiny_model, x, y):
        nad.learn((x, y))
        attributions = nad.attribute(x, y)
    for site, attribution in zip(nad.sites, attributions, strict=True):
        activation = LayerActivation(tiny_model, tiny_model.get_submodule(site.name)).attribute(x)
        gate = torch.stack([nad.gates(k)[site.name] for k in range(3)])[y].double()
        if site.channel_dim == -1:
            torch.testing.assert_close(attribution, activation * gate[:, None])
        else:
            torch.testing.assert_close(attribution, activation * gate[:, :, None, None])


@pytest.mark.slow
def test_channel_axis_may_be_spelt_out(tiny_vit: nn.Module) -> None:
    x, y = labelled_images()
    nad = NADAttribution(tiny_vit, "blocks.0", recipe=RECIPE, channel_dim=1)
    assert nad.attribute(x, y).shape == (12, 4, 8)
    assert nad.sites[0].n_channels == 4
    assert nad.learn((x, y)).gates(0)["blocks.0"].shape == (4,)


# -- targets -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_learning")
@pytest.mark.parametrize(
    "target",
    [2, np.int64(2), torch.tensor(2), torch.tensor([2]), torch.tensor([[2]]), [2, 2, 2],
     torch.tensor([2, 2, 2]), torch.tensor([2, 2, 2], dtype=torch.int32)],
    ids=str,
)  # fmt: skip
def test_forms_of_a_target(learned: tuple[nn.Module, TaskGates], target: Any) -> None:
    model, gates = learned
    nad = NADAttribution(model, "relu2", gates=gates)
    activation = LayerActivation(model, model.relu2).attribute(images(3))
    expected = expanded(gates.gates_of(2)["relu2"], activation) * activation
    torch.testing.assert_close(nad.attribute(images(3), target=target), expected)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (None, r"target is None; say which output .* \(N, 1\), needs no target"),
        ((1, 0), r"target=\(1, 0\) picks from .* forward_func return \(N, classes\)"),
        ((9999,) * 20, "forward_func return"),
        ([(1, 0), (0, 0), (1, 1)], "forward_func return"),
        (3, "one of the network's 3 outputs, 0 to 2, got 3"),
        (-1, "network's 3 outputs, 0 to 2, got -1"),
        ([0, 1, 7], "got 7"),
        (torch.tensor([0, 1, 9999]), "got 9999"),
        ([0, 1], "2 class indices for 3 images"),
        ([], "0 class indices for 3 images"),
        (torch.tensor([0, 1]), r"shape \(2,\) for 3 images"),
        (torch.zeros(3, 1, dtype=torch.long), r"shape \(3, 1\) for 3 images"),
        (torch.zeros(3), "must hold class indices, got torch.float32"),
        (torch.tensor([True, False, True]), "got torch.bool"),
        (True, "True is bool"),
        (1.0, "1.0 is float"),
        ("cat", "'cat' is str"),
        (["cat"] * 3, "'cat' is str"),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_gates", [True, False])
def test_wrong_targets(
    learned: tuple[nn.Module, TaskGates], target: Any, message: str, with_gates: bool
) -> None:
    model, gates = learned
    nad = NADAttribution(model, "relu2", recipe=RECIPE, gates=gates if with_gates else None)
    x = images(3)
    with pytest.raises(AssertionError, match=message), assert_model_untouched(model, x):
        nad.attribute(x, target=target)


# -- refusals ----------------------------------------------------------------------------------


def doubled(x):  # type: ignore[no-untyped-def]
    return 2 * x


def test_refuses_scripted_and_traced_networks(tiny_cnn: nn.Module) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        traced = torch.jit.trace(tiny_cnn, images(1))
        scripted = torch.jit.script(nn.ReLU())
        function = torch.jit.script(doubled)
    for forward_func in (traced, scripted, function):
        with pytest.raises(TypeError, match=r"torch\.jit.*pass the original nn\.Module"):
            NADAttribution(forward_func)
    with pytest.raises(TypeError, match=r"layer is scripted or traced"):
        NADAttribution(tiny_cnn, scripted)


def test_refuses_train_mode(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    tiny_cnn.bn1.train()
    for layer in (None, tiny_cnn.relu2):
        nad = NADAttribution(tiny_cnn, layer, recipe=RECIPE)
        with pytest.raises(ValueError, match=r"'bn1'.*model\.eval\(\)"):
            nad.attribute(x, y)
        with pytest.raises(ValueError, match=r"'bn1'.*model\.eval\(\)"):
            nad.learn((x, y))
    of_function = NADAttribution(lambda x: tiny_cnn(x), tiny_cnn.bn1, recipe=RECIPE)
    with pytest.raises(ValueError, match=r"'layer0' \(BatchNorm2d\) is in train mode"):
        of_function.attribute(x, y)
    assert tiny_cnn.bn1.training


def test_refuses_bad_construction(learned: tuple[nn.Module, TaskGates]) -> None:
    model, gates = learned
    with pytest.raises(TypeError, match="network or a function, got str"):
        NADAttribution("resnet")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"pass the network itself, or name the layers"):
        NADAttribution(lambda x: model(x))
    with pytest.raises(TypeError, match="pass them as modules"):
        NADAttribution(lambda x: model(x), "relu1")
    with pytest.raises(ValueError, match="pass the DataParallel network itself"):
        NADAttribution(lambda x: model(x), model.relu1, [0, 1])
    with pytest.raises(TypeError, match=r"layer must be a module, .* got 3"):
        NADAttribution(model, 3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer must be a module"):
        NADAttribution(model, ["relu1", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="layer is an empty list"):
        NADAttribution(model, [])
    with pytest.raises(ValueError, match="'task' or 'example', got 'class'"):
        NADAttribution(model, scope="class")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="gates must be TaskGates"):
        NADAttribution(model, gates={"relu1": torch.ones(6)})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="leave out gates="):
        NADAttribution(model, gates=gates, scope="example")
    with pytest.raises(ValueError, match="n_copies must be at least 2"):
        NADAttribution(model, scope="example", n_copies=1)


def test_refuses_bad_inputs(learned: tuple[nn.Module, TaskGates]) -> None:
    model, gates = learned
    nad = NADAttribution(model, gates=gates)
    with pytest.raises(TypeError, match="tensor or a tuple of tensors, got list"):
        nad.attribute([1.0], target=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got nothing"):
        nad.attribute((), target=0)
    with pytest.raises(ValueError, match=r"same number of images on dim 0.*\(2, 3.*\(1, 3"):
        nad.attribute((images(2), images(1)), target=0)
    with pytest.raises(ValueError, match="hold no images"):
        nad.attribute(images(0), target=0)


def test_refuses_bad_outputs(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    layer = tiny_cnn.relu2
    with pytest.raises(TypeError, match=r"returned a dict.*\.logits"):
        NADAttribution(lambda x: {"logits": tiny_cnn(x)}, layer).attribute(x, y)
    with pytest.raises(AssertionError, match=r"network's 1 outputs, 0 to 0, got 1"):
        NADAttribution(lambda x: tiny_cnn(x)[:, 0], layer).attribute(x, 1)
    with pytest.raises(AssertionError, match=r"shape \(12, 3, 1\)"):
        NADAttribution(lambda x: tiny_cnn(x)[:, :, None], layer).attribute(x, y)


def test_refuses_what_was_not_learned(learned: tuple[nn.Module, TaskGates]) -> None:
    model, gates = learned
    with pytest.raises(RuntimeError, match=r"no gates yet; call learn\(data\), or attribute"):
        NADAttribution(model).gates(0)
    with pytest.raises(RuntimeError, match="no gates yet"):
        NADAttribution(model).sub_architecture(0)
    assert NADAttribution(model).sites == ()
    with pytest.raises(ValueError, match="no gates were learned at 'conv1', only at relu1, relu2"):
        NADAttribution(model, model.conv1, gates=gates).attribute(images(1), target=0)
    other = TaskGates({"relu1": torch.ones(1, 5)}, [GateSite("relu1", 5)], [0])
    with pytest.raises(ValueError, match="for 5 channels, the layer has 6"):
        NADAttribution(model, model.relu1, gates=other).attribute(images(1), target=0)
    with pytest.raises(GatingError, match="should have 5 channels"):
        NADAttribution(model, gates=other).attribute(images(1), target=0)
    with pytest.raises(ValueError, match=r"learns the gates of each image in attribute\(\)"):
        NADAttribution(model, scope="example").learn(labelled_images())


def test_refuses_layers_that_cannot_be_gated(tiny_cnn: nn.Module) -> None:
    with pytest.raises(SiteError, match="'relu3'"):
        NADAttribution(tiny_cnn, "relu3").attribute(images(2), target=0)
    with pytest.raises(SiteError, match="not part of the model"):
        NADAttribution(tiny_cnn, nn.ReLU()).attribute(images(2), target=0)


def test_errors_of_the_network_come_out_as_they_are(tiny_cnn: nn.Module) -> None:
    nad = NADAttribution(tiny_cnn, "relu2", recipe=RECIPE)
    x = images(2)[:, :2]
    with pytest.raises(RuntimeError, match="channels"), assert_model_untouched(tiny_cnn):
        nad.attribute(x, target=0)
    with pytest.raises(RuntimeError, match="channels"), assert_model_untouched(tiny_cnn):
        nad.learn((x, torch.tensor([0, 1])))


def test_one_target_warns(tiny_cnn: nn.Module) -> None:
    with pytest.warns(UserWarning, match="task 1 has own images only"):
        NADAttribution(tiny_cnn, recipe=RECIPE).attribute(images(4), target=1)


# -- the forward function and its arguments ------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("bound", [False, True])
def test_functions_with_layers(tiny_resnet: nn.Module, bound: bool) -> None:
    x, y = labelled_images()
    layers = [tiny_resnet.layer1[1], tiny_resnet.layer2]
    expected = NADAttribution(tiny_resnet, layers, recipe=RECIPE).attribute(x, y)
    function = tiny_resnet.forward if bound else (lambda x: tiny_resnet(x))
    nad = NADAttribution(function, layers, recipe=RECIPE)
    with assert_model_untouched(tiny_resnet, x, y):
        attributions = nad.attribute(x, y)
        nad.learn((x, y))
    assert [site.name for site in nad.sites] == ["layer0", "layer1"]
    for one, two, reference in zip(attributions, nad.attribute(x, y), expected, strict=True):
        torch.testing.assert_close(one, reference)
        torch.testing.assert_close(two, reference)


@pytest.mark.slow
def test_functions_with_a_layer_without_parameters(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    expected = NADAttribution(tiny_cnn, tiny_cnn.relu2, recipe=RECIPE).attribute(x, y)
    nad = NADAttribution(lambda x: tiny_cnn(x), tiny_cnn.relu2, recipe=RECIPE)
    torch.testing.assert_close(nad.attribute(x, y), expected)
    torch.testing.assert_close(nad.learn((x, y)).attribute(x, y), expected)
    in_loader = DataLoader(list(zip(x, y, strict=True)), batch_size=5)  # type: ignore[arg-type]
    nad.learn(in_loader)
    assert nad.attribute(x, y).shape == expected.shape


def test_function_whose_target_is_not_a_logit(tiny_cnn: nn.Module) -> None:
    x, _ = labelled_images()
    nad = NADAttribution(lambda x: tiny_cnn(x).softmax(1)[:, 1:], tiny_cnn.relu2, recipe=RECIPE)
    assert nad.attribute(x, target=[0, 1] * 6).shape == (12, 8, 4, 4)
    with pytest.raises(AssertionError, match="network's 2 outputs, 0 to 1, got 2"):
        nad.attribute(x, target=2)


@pytest.mark.slow
def test_wrapped_networks_are_looked_through(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    expected = NADAttribution(tiny_cnn, recipe=RECIPE).attribute(x, y)
    for wrapped in (nn.DataParallel(tiny_cnn), torch.compile(tiny_cnn, backend="eager")):
        nad = NADAttribution(wrapped, device_ids=[0], recipe=RECIPE)
        for one, reference in zip(nad.attribute(x, y), expected, strict=True):
            assert torch.equal(one, reference)
        assert [site.name for site in nad.sites] == ["relu1", "relu2"]
        assert NADAttribution(wrapped, tiny_cnn.relu1, recipe=RECIPE).attribute(x, y).shape[1] == 6


@pytest.mark.slow
def test_several_inputs() -> None:
    model = build(TwoInputs)
    x, y = labelled_images()
    half = images(12, seed=9)
    expected = NADAttribution(model.net, recipe=RECIPE).attribute(x, y)
    nad = NADAttribution(model, recipe=RECIPE)
    with assert_model_untouched(model, x, half, y):
        attributions = nad.attribute((x - half, half), y)
    for one, reference in zip(attributions, expected, strict=True):
        torch.testing.assert_close(one, reference)
    for one, reference in zip(
        nad.learn(((x - half, half), y)).attribute((x - half, half), y), expected, strict=True
    ):
        torch.testing.assert_close(one, reference)


@pytest.mark.slow
@pytest.mark.parametrize("as_function", [False, True])
def test_additional_forward_args(as_function: bool) -> None:
    model = build(TwoInputs)
    x, y = labelled_images()
    zero = torch.zeros(())
    # One shift for each image: learning must keep them together, in any order of drawing.
    shift = torch.linspace(-2, 2, 12, dtype=torch.float64)[:, None, None, None]
    forward_func = (lambda *args: model(*args)) if as_function else model
    expected = NADAttribution(model.net, model.net.relu2, recipe=RECIPE).attribute(x + shift, y)
    nad = NADAttribution(forward_func, model.net.relu2, recipe=RECIPE)
    with assert_model_untouched(model, x, shift):
        attribution = nad.attribute(x, y, additional_forward_args=(zero, "a flag", shift))
    torch.testing.assert_close(attribution, expected)
    by_image = NADAttribution(forward_func, model.net.relu2, recipe=RECIPE, scope="example")
    two = by_image.attribute(x[:2], y[:2], (zero, "a flag", shift[:2]))
    one = by_image.attribute(x[1:2], y[1:2], (zero, "a flag", shift[1:2]))
    torch.testing.assert_close(two[1:], one)
    # One number for all images; a single argument needs no tuple.
    plain = NADAttribution(model, model.net.relu2, recipe=RECIPE)
    torch.testing.assert_close(
        plain.attribute(x, y, additional_forward_args=zero),
        NADAttribution(model.net, model.net.relu2, recipe=RECIPE).attribute(x, y),
    )
    plain.learn(((x, shift.expand_as(x)), y), additional_forward_args="a flag")
    with pytest.raises(AssertionError, match="must be one of"):
        plain.attribute(x, 3, additional_forward_args=zero)


class Jittered(Dataset[tuple[Tensor, int]]):
    """Augmented images that draw from torch's global generator; labels are read item by item."""

    def __init__(self) -> None:
        self.x, self.y = labelled_images()
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.x[i] + 0.01 * torch.randn(self.x[i].shape), int(self.y[i])


@pytest.mark.slow
@pytest.mark.parametrize("in_loader", [False, True])
def test_learns_at_inputs_from_any_data(tiny_cnn: nn.Module, in_loader: bool) -> None:
    dataset = Jittered()
    data = DataLoader(dataset, batch_size=4, shuffle=True) if in_loader else dataset
    nad = NADAttribution(tiny_cnn, "conv2", recipe=RECIPE)
    with assert_model_untouched(tiny_cnn):
        nad.learn(data, attribute_to_layer_input=True)
    assert nad.sites == (GateSite("conv2", 6, 1, at_input=True),)


def test_learns_at_inputs_from_data_read_once(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        yield x[:5], y[:5]
        yield x[5:], y[5:]

    nad = NADAttribution(tiny_cnn, "conv2", recipe=RECIPE)
    nad.learn(batches(), attribute_to_layer_input=True)  # type: ignore[arg-type]
    gates = nad.task_gates
    assert gates == nad.learn((x, y), attribute_to_layer_input=True).task_gates


@pytest.mark.slow
def test_inference_mode(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    expected = NADAttribution(tiny_cnn, "relu2", recipe=RECIPE).attribute(x, y)
    with torch.inference_mode():
        nad = NADAttribution(tiny_cnn, "relu2", recipe=RECIPE)
        assert torch.equal(nad.attribute(x.clone(), y.clone()), expected)
        scaled = NADAttribution(lambda x, a: tiny_cnn(x) * a, tiny_cnn.relu2, recipe=RECIPE)
        one = torch.ones(1, 1, dtype=torch.float64)
        assert torch.equal(scaled.attribute(x, y, additional_forward_args=one), expected)


@pytest.mark.gpu
def test_on_the_gpu(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images()
    expected = NADAttribution(tiny_cnn, "relu2", recipe=RECIPE).attribute(x, y)
    on_gpu = copy.deepcopy(tiny_cnn).cuda()
    nad = NADAttribution(on_gpu, on_gpu.relu2, recipe=RECIPE)
    attribution = nad.attribute(x.cuda(), y.cuda())
    assert attribution.is_cuda
    torch.testing.assert_close(attribution.cpu(), expected)
    torch.testing.assert_close(nad.learn((x, y)).attribute(x.cuda(), y).cpu(), expected)
    function = NADAttribution(lambda x: on_gpu(x), on_gpu.relu2, recipe=RECIPE)
    torch.testing.assert_close(function.attribute(x.cuda(), y).cpu(), expected)
    # DataParallel accepts inputs on any device.
    parallel = NADAttribution(nn.DataParallel(on_gpu), "relu2", recipe=RECIPE)
    torch.testing.assert_close(parallel.attribute(x, y).cpu(), expected)


# -- a path for each image ---------------------------------------------------------------------


@pytest.mark.slow
def test_paths_of_single_images(tiny_cnn: nn.Module) -> None:
    x, y = labelled_images(4)
    nad = NADAttribution(tiny_cnn, recipe=RECIPE, scope="example", n_copies=10)
    with warnings.catch_warnings(), assert_model_untouched(tiny_cnn, x, y):
        warnings.simplefilter("error")
        together = nad.attribute(x, y)
    assert nad.task_gates is None
    paths = [nad.gates(i) for i in range(4)]
    for i in range(4):
        alone = nad.attribute(x[i : i + 1], int(y[i]))
        for one, all_of_them, site in zip(alone, together, nad.sites, strict=True):
            torch.testing.assert_close(one, all_of_them[i : i + 1])
            assert torch.equal(nad.gates(0)[site.name], paths[i][site.name])
            activation = LayerActivation(tiny_cnn, site.name and getattr(tiny_cnn, site.name))
            torch.testing.assert_close(
                one, activation.attribute(x[i : i + 1]) * expanded(paths[i][site.name], one)
            )
    # Images 0 and 3 are of one class and have different paths.
    assert any(not torch.equal(paths[0][name], paths[3][name]) for name in paths[0])
    assert nad.sub_architecture(0).task == y[3]
    with pytest.raises(KeyError, match="images 0 to 0"):
        nad.gates(4)


def planted() -> nn.Module:
    """Four inputs are four channels; class 0 adds up the first two, class 1 the rest."""

    def make() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))

    model = build(make)
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(4))
        model[0].bias.zero_()
        model[2].weight.copy_(torch.tensor([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]))
    return model


def test_finds_the_channels_of_each_class() -> None:
    x = torch.rand(40, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [0, 1] * 20
    nad = NADAttribution(planted(), recipe=Recipe(size=0.5, steps=20))
    (attribution,) = nad.attribute(x, targets)
    assert nad.sub_architecture(0)["1"].tolist() == [True, True, False, False]
    assert nad.sub_architecture(1)["1"].tolist() == [False, False, True, True]
    shares = attribution / x
    assert (shares[0::2, :2] > 0.5).all()
    assert (shares[0::2, 2:] < 0.5).all()
    assert (shares[1::2, :2] < 0.5).all()
    assert (shares[1::2, 2:] > 0.5).all()


@pytest.mark.slow
def test_finds_the_path_of_each_image() -> None:
    # Class 2 needs all four channels, each of its images only those that it excites.
    x = torch.tensor([[1.0, 2, 0, 0], [0, 0, 2, 1], [0, 1, 1, 0]], dtype=torch.float64)
    nad = NADAttribution(planted(), recipe=Recipe(size=0.5, steps=20), scope="example")
    nad.attribute(x, target=2)
    for i in range(3):
        assert torch.equal(nad.sub_architecture(i)["1"], x[i] > 0)


@pytest.mark.slow
def test_paths_are_learned_from_versions_of_the_image(
    tiny_cnn: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[tuple[Tensor, ...], Tensor]] = []

    def spy(model: nn.Module, data: Any, *args: Any, **kwargs: Any) -> TaskGates:
        seen.append(data)
        return learn_gates(model, data, *args, **kwargs)

    monkeypatch.setattr(attribution_module, "learn_gates", spy)
    x = images(2)
    NADAttribution(tiny_cnn, recipe=RECIPE, scope="example", n_copies=400).attribute(x, [2, 1])
    ((first,), labels), ((second,), _) = seen
    assert first.shape == (400, 3, 8, 8)
    assert labels.tolist() == [2] * 400
    assert torch.equal(first[0], x[0])
    noise = (first[1:200] - x[0]) / (x[0].max() - x[0].min())
    assert noise.std().item() == pytest.approx(0.1, rel=0.02)
    assert abs(noise.mean().item()) < 0.002
    scale = first[200:].flatten(1).sum(1) / x[0].sum()
    torch.testing.assert_close(scale, (torch.arange(200, dtype=torch.float64) + 0.5) / 200)
    torch.testing.assert_close(first[200:], scale[:, None, None, None] * x[0])
    # Each image gets the same noise at any place in the batch.
    torch.testing.assert_close((second[1:200] - x[1]) / (x[1].max() - x[1].min()), noise)


def test_paths_leave_arguments_alone_that_are_as_long_as_there_are_copies() -> None:
    model = planted()
    x = torch.tensor([[1.0, 2, 0, 0], [0, 0, 2, 1]], dtype=torch.float64)
    weights = torch.arange(1.0, 5.0, dtype=torch.float64)
    recipe = Recipe(size=0.5, steps=4)
    nad = NADAttribution(
        lambda x, w: model(x * w), model[1], recipe=recipe, scope="example", n_copies=4
    )
    nad.attribute(x, 2, additional_forward_args=weights)
    for i in range(2):
        assert torch.equal(nad.sub_architecture(i)["layer0"], x[i] > 0)


def test_paths_need_something_to_vary() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).eval()
    tokens = torch.tensor([[0, 1, 2], [3, 4, 0]])
    nad = NADAttribution(model, model[0], recipe=RECIPE, scope="example", channel_dim=-1)
    with pytest.raises(ValueError, match="no input is a floating-point tensor"):
        nad.attribute(tokens, target=0)
    by_task = NADAttribution(model, model[0], recipe=RECIPE, channel_dim=-1)
    assert by_task.attribute(tokens, target=[0, 1]).shape == (2, 3, 4)


# -- beside Captum -----------------------------------------------------------------------------


def test_is_a_layer_attribution(tiny_cnn: nn.Module) -> None:
    nad = NADAttribution(tiny_cnn, tiny_cnn.relu2, [0])
    assert isinstance(nad, LayerAttribution)
    assert (nad.forward_func, nad.layer, nad.device_ids) == (tiny_cnn, tiny_cnn.relu2, [0])
    assert NADAttribution.get_name() == "NAD"
    assert nad.has_convergence_delta() is False
    assert callable(NADAttribution.attribute.__wrapped__)


def test_interpolate(learned: tuple[nn.Module, TaskGates]) -> None:
    model, gates = learned
    attribution = NADAttribution(model, "relu2", gates=gates).attribute(images(2), target=0)
    resized = NADAttribution.interpolate(attribution, (8, 8))
    assert resized.shape == (2, 8, 8, 8)
    assert torch.equal(resized[:, :, ::2, ::2], attribution)


@pytest.mark.parametrize("batch_size", [None, 2])
def test_noise_tunnel(learned: tuple[nn.Module, TaskGates], batch_size: int | None) -> None:
    model, gates = learned
    nad = NADAttribution(model, model.relu2, gates=gates)
    x, y = images(4), [0, 2, 1, 1]
    smooth = NoiseTunnel(nad).attribute(
        x, nt_samples=3, nt_samples_batch_size=batch_size, stdevs=0.0, target=y
    )
    torch.testing.assert_close(smooth, nad.attribute(x, y))
    # It squares gates too, so they must be contiguous tensors.
    bare = NADAttribution(model, model.relu2, gates=gates, multiply_by_inputs=False)
    squared = NoiseTunnel(bare).attribute(
        x, nt_type="smoothgrad_sq", nt_samples=2, stdevs=0.5, target=torch.tensor(y)
    )
    torch.testing.assert_close(squared, bare.attribute(x, y) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("scope", ["task", "example"])
def test_noise_tunnel_learns_too(tiny_cnn: nn.Module, scope: Any) -> None:
    x, y = labelled_images(4)
    nad = NADAttribution(tiny_cnn, "relu2", recipe=RECIPE, scope=scope, n_copies=6)
    torch.random.default_generator.manual_seed(0)
    smooth = NoiseTunnel(nad).attribute(x, nt_samples=2, stdevs=0.1, target=y)
    assert smooth.shape == (4, 8, 4, 4)


class MeanDifference(Classifier):
    """The concept's direction is the difference of the two means: quick and exact."""

    def __init__(self) -> None:
        self.direction = torch.zeros(0)

    def train_and_eval(self, dataloader: Any, **kwargs: Any) -> None:
        features, labels = (torch.cat(parts) for parts in zip(*dataloader, strict=True))
        self.direction = features[labels == 0].mean(0) - features[labels == 1].mean(0)

    def weights(self) -> Tensor:
        return torch.stack([self.direction, -self.direction])

    def classes(self) -> list[int]:
        return [0, 1]


@pytest.mark.slow
@pytest.mark.parametrize("learn_first", [True, False])
def test_tcav(tiny_cnn: nn.Module, tmp_path: Any, learn_first: bool) -> None:
    x, y = labelled_images()
    nad = NADAttribution(tiny_cnn, None, recipe=RECIPE)
    if learn_first:
        nad.learn((x, y))
    concepts = [
        Concept(i, f"concept{i}", DataLoader(images(4, seed=i) + i, batch_size=2))  # type: ignore[arg-type]
        for i in range(2)
    ]
    tcav = TCAV(
        tiny_cnn,
        ["relu1", "relu2"],
        layer_attr_method=nad,
        classifier=MeanDifference(),
        save_path=str(tmp_path),
    )
    scores = tcav.interpret(x, [concepts], target=1)
    for name in ("relu1", "relu2"):
        # What TCAV should have found, from the gates and Captum's activations.
        layer = LayerActivation(tiny_cnn, getattr(tiny_cnn, name))
        means = [layer.attribute(images(4, seed=i) + i).flatten(1).mean(0) for i in range(2)]
        activation = layer.attribute(x)
        if learn_first:
            gate = nad.gates(1)[name]
        else:
            alone = NADAttribution(tiny_cnn, name, recipe=RECIPE)
            alone.attribute(x, target=1)
            gate = alone.gates(1)[name]
        product = (activation * expanded(gate, activation)).flatten(1) @ (means[0] - means[1])
        found = scores["0-1"][name]["sign_count"]
        assert found[0].item() == pytest.approx((product > 0).double().mean().item())


# Captum's generated tests, with its own configurations. NAD's gates for one image must not depend
# on the other images of the batch, so they are learned once, from fixed data.


class LearnsOnce(NADAttribution):
    """Learns from fixed images at the first call: gates are a function of the class alone."""

    @log_usage()
    def attribute(
        self,
        inputs: Any,
        target: Any = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
    ) -> Any:
        if self.task_gates is None:
            given = inputs if isinstance(inputs, tuple) else (inputs,)
            extra = additional_forward_args
            extra = () if extra is None else extra if isinstance(extra, tuple) else (extra,)
            shapes = [item.shape[1:] for item in (*given, *extra) if isinstance(item, Tensor)]
            generator = torch.Generator().manual_seed(0)
            fixed = tuple(5 * torch.randn(12, *shape, generator=generator) for shape in shapes)
            rest = tuple(item for item in extra if not isinstance(item, Tensor))
            self.learn(
                (fixed, torch.arange(12) % 2), recipe=RECIPE, additional_forward_args=rest or None
            )
        return NADAttribution.attribute.__wrapped__(
            self, inputs, target, additional_forward_args, attribute_to_layer_input
        )


class Failing(nn.Module):
    """A layer that fails when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        raise AssertionError("this module always fails")


def _configs() -> Iterator[Any]:
    for config in captum_configs:
        _, _, args, layer, noise_tunnel, _ = parse_test_config(config)
        known = {"inputs", "target", "additional_forward_args", "attribute_to_layer_input"}
        if layer is not None and "target" in args and set(args) <= known and not noise_tunnel:
            yield pytest.param(config, id=config["name"])


def _prepared(config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any], Any]:
    """Copies of the network (the shipped ones are in train mode) and the arguments."""
    _, model, args, layer, _, _ = parse_test_config(config)
    return copy.deepcopy(model).eval(), copy.deepcopy(args), layer


def _explains(config: dict[str, Any]) -> bool:
    """Whether gates support this kind of target and layer."""
    args, layer = config["attribute_args"], config["layer"]
    target = args["target"]
    tuples = isinstance(target, tuple) or (
        isinstance(target, list) and isinstance(target[0], tuple)
    )
    return not tuples and "multi_relu" not in layer


def _hooks(model: nn.Module) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


@pytest.mark.skipif(not captum_configs, reason="captum.testing is not shipped")
def test_captums_configurations_are_there() -> None:
    names = [param.id for param in _configs() if _explains(param.values[0])]
    assert len(names) >= 5
    assert {"conv_layer_single_target", "basic_layer_multi_input"} <= set(names)


@pytest.mark.slow
@pytest.mark.parametrize("config", list(_configs()))
@pytest.mark.parametrize("mode", ["normal", "incorrect_target", "invalid_module"])
def test_captum_hook_removal(config: dict[str, Any], mode: str) -> None:
    model, args, layer = _prepared(config)
    if mode == "invalid_module":
        name = layer if isinstance(layer, str) else layer[0]
        outer, _, inner = name.rpartition(".")
        setattr(model.get_submodule(outer), inner, Failing().eval())
    method = LearnsOnce if _explains(config) else NADAttribution
    nad = method(model, get_target_layer(model, layer))
    if mode == "incorrect_target":
        args["target"] = (9999,) * 20
    before = snapshot(model)
    if mode == "normal" and _explains(config):
        nad.attribute(**args)
    else:
        # Tuple targets are refused as wrong ones are, layers of several tensors as sites.
        with pytest.raises((AssertionError, SiteError)) as error:
            nad.attribute(**args)
        if _explains(config):
            assert error.type is AssertionError
    assert _hooks(model) == 0
    assert snapshot(model) == before


@pytest.mark.parametrize("config", [p for p in _configs() if _explains(p.values[0])])
def test_captum_targets(config: dict[str, Any]) -> None:
    model, args, layer = _prepared(config)
    inputs, targets = args["inputs"], args["target"]
    n = len(inputs) if isinstance(inputs, Tensor) else len(inputs[0])
    each = isinstance(targets, (list, Tensor)) and len(targets) == n
    nad = LearnsOnce(model, get_target_layer(model, layer))
    together = nad.attribute(**args)
    for i in range(n):
        one = dict(args)
        one["inputs"] = (
            inputs[i : i + 1]
            if isinstance(inputs, Tensor)
            else tuple(item[i : i + 1] for item in inputs)
        )
        if "additional_forward_args" in args:
            one["additional_forward_args"] = tuple(
                item[i : i + 1] if isinstance(item, Tensor) else item
                for item in args["additional_forward_args"]
            )
        for target in [targets[i], targets[i : i + 1]] if each else [targets]:
            one["target"] = target
            alone = nad.attribute(**one)
            if isinstance(layer, str):
                alone, expected = [alone], [together[i : i + 1]]
            else:
                expected = [item[i : i + 1] for item in together]
            torch.testing.assert_close(alone, expected)


@pytest.mark.skipif(not captum_configs, reason="captum.testing is not shipped")
def test_captum_list_of_layers() -> None:
    config = next(p.values[0] for p in _configs() if p.id == "basic_layer_multiple_target")
    model, args, _ = _prepared(config)
    nad = LearnsOnce(model, get_target_layer(model, ["relu", "linear1", "linear0"]))
    together = nad.attribute(**args)
    assert [item.shape[1] for item in together] == [4, 4, 3]  # the order asked for
    for i, target in enumerate(args["target"]):
        alone = nad.attribute(args["inputs"][i : i + 1], target=target)
        torch.testing.assert_close(alone, [item[i : i + 1] for item in together])


def test_single_image_without_a_batch_dimension() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(1))
    network = network.append(nn.Linear(4 * 36, 2)).eval()
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gates = learn_gates(network, (images, torch.arange(8) % 2), [0], RECIPE, ["2"])
    with pytest.raises(ValueError, match=r"expected 4D.*image\[None\]"):
        NADAttribution(network, gates=gates).attribute(images[0], target=0)


def test_what_an_attribution_is_shows(tiny_cnn: nn.Module) -> None:
    assert repr(NADAttribution(tiny_cnn)) == "NADAttribution(TinyCNN, no gates yet, scope='task')"
