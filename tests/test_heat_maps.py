"""Heat-maps through sub-architectures: any method, each image inside its class's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from captum.attr import IntegratedGradients
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import GateSite, RunOptions, SubArchitecture, TaskGates, find_gate_sites
from nad_attr.pictures import as_pixels, gradient_times_input, heat_maps
from nad_attr.pictures.figures import draw_heat_maps
from tests import helpers


def architectures(model: nn.Module, *, mean: bool = True, seed: int = 0) -> list[SubArchitecture]:
    """One random sub-architecture for each of the three classes."""
    sites = find_gate_sites(model, helpers.images(1))
    generator = torch.Generator().manual_seed(seed)
    means = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    return [
        SubArchitecture(
            {s.name: torch.rand(s.n_channels, generator=generator) > 0.4 for s in sites},
            sites,
            task=k,
            means=means if mean else None,
        )
        for k in range(3)
    ]


def folded(model: nn.Module, arch: SubArchitecture, x: Tensor) -> Tensor:
    """TinyCNN as a sub-architecture, written out."""
    net: Any = model
    gate, mean = arch.gates(torch.float64), arch.means
    assert mean is not None

    def put(name: str, h: Tensor) -> Tensor:
        g, m = gate[name][:, None, None], mean[name].double()[:, None, None]
        return g * h + (1 - g) * m

    h = put("relu1", F.relu(net.bn1(net.conv1(x))))
    h = put("relu2", F.relu(net.conv2(h)))
    out: Tensor = net.linear(h.mean((2, 3)))
    return out


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_each_image_runs_through_its_class(tiny_cnn: nn.Module, batch_size: int) -> None:
    archs = architectures(tiny_cnn)
    images, labels = helpers.labelled_images(9)
    with helpers.assert_model_untouched(tiny_cnn, images, labels):
        found = heat_maps(tiny_cnn, archs, images, labels, run=RunOptions(batch_size=batch_size))
    for i, label in enumerate(labels.tolist()):
        x = images[i : i + 1].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(folded(tiny_cnn, archs[label], x)[0, label], x)
        torch.testing.assert_close(found[i], (gradient * x)[0].detach(), rtol=1e-10, atol=1e-12)


def test_no_architecture_is_the_whole_network_and_one_serves_all(tiny_cnn: nn.Module) -> None:
    archs = architectures(tiny_cnn)
    images, labels = helpers.labelled_images(6)
    whole = heat_maps(tiny_cnn, None, images, labels)
    torch.testing.assert_close(whole, gradient_times_input(tiny_cnn, images, labels))
    full = SubArchitecture.full(archs[0].sites)
    torch.testing.assert_close(heat_maps(tiny_cnn, full, images, labels), whole)
    # One sub-architecture: its own task plays no part.
    through = heat_maps(tiny_cnn, archs[0], images[:1], 2)
    x = images[:1].clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(folded(tiny_cnn, archs[0], x)[0, 2], x)
    torch.testing.assert_close(through, (gradient * x).detach())


def test_captum_methods_that_expand_the_batch(tiny_cnn: nn.Module) -> None:
    archs = architectures(tiny_cnn)
    images, labels = helpers.labelled_images(5)

    def integrated(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        found: Tensor = IntegratedGradients(model).attribute(x, target=target, n_steps=40)
        return found

    with helpers.assert_model_untouched(tiny_cnn, images, labels):
        found = heat_maps(tiny_cnn, archs, images, labels, method=integrated)
    # Complete: sums to the difference of the gated outputs of image and black image.
    for i, label in enumerate(labels.tolist()):
        with torch.no_grad():
            at, base = (
                folded(tiny_cnn, archs[label], x)[0, label]
                for x in (images[i : i + 1], 0 * images[i : i + 1])
            )
        assert float(found[i].sum()) == pytest.approx(float(at - base), abs=0.02)


def test_zennit_rules_conserve_the_gated_output() -> None:
    """LRP of a plain Zennit composite inside ``heat_maps``, on a network without biases."""
    pytest.importorskip("zennit")
    from zennit.attribution import Gradient
    from zennit.composites import EpsilonPlus

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.relu1 = nn.Conv2d(3, 6, 3, bias=False), nn.ReLU()
            self.conv2, self.relu2 = nn.Conv2d(6, 8, 3, bias=False), nn.ReLU()
            self.linear = nn.Linear(8, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = self.relu2(self.conv2(self.relu1(self.conv1(x))))
            out: Tensor = self.linear(h.mean((2, 3)))
            return out

    model = helpers.build(Plain)
    archs = architectures(model, mean=False)
    images, labels = helpers.labelled_images(6)

    def lrp(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        with Gradient(net, composite=EpsilonPlus(epsilon=1e-12)) as attributor:
            one_hot = torch.eye(3, dtype=x.dtype)[target]
            _, relevance = attributor(x, lambda output: output * one_hot)
        return relevance

    with helpers.assert_model_untouched(model, images, labels):
        found = heat_maps(model, archs, images, labels, method=lrp)
    for i, label in enumerate(labels.tolist()):
        with torch.no_grad(), archs[label].applied(model):
            output = model(images[i : i + 1])[0, label]
        # Zennit's rules add a millionth to what they divide by.
        assert float(found[i].sum()) == pytest.approx(float(output), rel=1e-4)


def test_tasks_that_are_groups_and_gates_with_a_size(tiny_cnn: nn.Module) -> None:
    sites = find_gate_sites(tiny_cnn, helpers.images(1))
    values = {s.name: torch.linspace(0, 1, s.n_channels)[None].repeat(2, 1) for s in sites}
    gates = TaskGates(values, sites, [(0, 2), 1])
    images, labels = helpers.labelled_images(6)
    found = heat_maps(tiny_cnn, gates, images, labels, size=0.5)
    arch = gates.sub_architecture(1, 0.5)
    expected = torch.stack(
        [heat_maps(tiny_cnn, arch, images[i], int(labels[i])) for i in range(0)]
        or [heat_maps(tiny_cnn, arch, images[i : i + 1], int(labels[i]))[0] for i in range(6)]
    )
    torch.testing.assert_close(found, expected)  # both tasks have the same gates here


def test_forward_func_and_modes_of_the_caller(tiny_cnn: nn.Module) -> None:
    archs = architectures(tiny_cnn)
    images, labels = helpers.labelled_images(6)
    expected = heat_maps(tiny_cnn, archs, images, labels)

    def forward(x: Tensor, scale: float) -> Tensor:
        out: Tensor = tiny_cnn(x)
        return out * scale

    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = heat_maps(
                tiny_cnn,
                archs,
                images.clone(),
                labels,
                run=RunOptions(forward_func=forward, additional_forward_args=2.0),
            )
        torch.testing.assert_close(found, 2 * expected)


def test_methods_that_leave_traces_or_fail_leave_none(tiny_cnn: nn.Module) -> None:
    archs = architectures(tiny_cnn)
    images, labels = helpers.labelled_images(4)

    def sloppy(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
        model.get_submodule("conv1").register_full_backward_hook(lambda *a: None)
        model.note = 1  # type: ignore[assignment]
        torch.manual_seed(3)
        np.random.seed(3)  # noqa: NPY002
        model.zero_grad()
        model.requires_grad_(True)
        model(x).sum().backward()
        assert x.grad is not None
        if float(target[0]) == 2:
            raise RuntimeError("stop")
        return x.grad

    tiny_cnn(images).sum().backward()  # weights have gradients of the user's
    tiny_cnn.get_submodule("conv2").requires_grad_(False)
    with (
        helpers.assert_model_untouched(tiny_cnn, images, labels),
        pytest.raises(RuntimeError, match="stop"),
    ):
        heat_maps(tiny_cnn, archs, images, labels, method=sloppy)
    with helpers.assert_model_untouched(tiny_cnn, images, labels):
        heat_maps(tiny_cnn, archs, images, labels % 2, method=sloppy)


@pytest.mark.parametrize(
    ("targets", "change", "error", "message"),
    [
        (3, {}, ValueError, "no sub-architecture for target 3"),
        (0.5, {}, ValueError, "class indices"),
        ([0, 1], {}, ValueError, "for 4 images"),
        (-1, {}, ValueError, "from 0 on"),
        (0, {"size": 0.5}, ValueError, "size="),
        (0, {"method": "saliency"}, TypeError, "method"),
    ],
)
def test_bad_input(
    tiny_cnn: nn.Module,
    targets: Any,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        heat_maps(tiny_cnn, architectures(tiny_cnn), helpers.images(4), targets, **change)


def test_class_in_two_tasks(tiny_cnn: nn.Module) -> None:
    archs = architectures(tiny_cnn)
    both = SubArchitecture(archs[1].masks, archs[1].sites, task=(0, 1))
    with pytest.raises(ValueError, match="class 0 belongs to two tasks"):
        heat_maps(tiny_cnn, [archs[0], both], helpers.images(2), 0)


@given(values=st.lists(st.floats(-1e6, 1e6, allow_nan=False, width=32), min_size=12, max_size=12))
def test_pixels_are_stretched_to_the_image_itself(values: list[float]) -> None:
    images = torch.tensor(values).reshape(1, 3, 2, 2)
    shown = as_pixels(images)
    assert shown.dtype == torch.uint8
    low, high = images.min(), images.max()
    if high > low:
        assert int(shown.min()) == 0
        assert int(shown.max()) == 255
        expected = ((images - low) / (high - low) * 255).round()
        assert int((shown.int() - expected.int()).abs().max()) <= 1
    else:
        assert not shown.any()


def test_pixels_of_functions() -> None:
    images = torch.tensor([[-3.0, 0.5, 9.0]]).reshape(1, 1, 1, 3)
    assert as_pixels(images, lambda x: x)[0, 1, 0].tolist() == [0, 128, 255]
    assert as_pixels(images, lambda x: torch.full((1, 3, 1, 3), 7, dtype=torch.uint8)).max() == 7
    for function, error, message in [
        (lambda x: x.numpy(), TypeError, "not a tensor"),
        (lambda x: x[:, :0], ValueError, "1 or 3"),
        (lambda x: x * float("inf"), ValueError, "NaN or infinity"),
        ("mean", TypeError, "a function"),
    ]:
        with pytest.raises(error, match=message):
            as_pixels(images, function)  # type: ignore[arg-type]


def test_heat_map_figure() -> None:
    pytest.importorskip("matplotlib")
    maps = {"a": torch.randn(2, 3, 8, 8), "b": torch.zeros(2, 1, 8, 8)}
    figure = draw_heat_maps(torch.randn(2, 3, 8, 8), maps, titles=["x", "y"])
    assert len(figure.axes) == 6
    shown = figure.axes[1].images[0].get_array()
    summed = maps["a"][0].sum(0)
    limit = np.quantile(summed.abs().numpy(), 0.995)
    np.testing.assert_allclose(shown, (summed.numpy() / limit).clip(-1, 1), rtol=1e-4)
    with pytest.raises(ValueError, match="1 heat-maps 'a'"):
        draw_heat_maps(torch.randn(2, 3, 8, 8), {"a": torch.zeros(1, 1, 8, 8)})
    with pytest.raises(ValueError, match="titles"):
        draw_heat_maps(torch.randn(2, 3, 8, 8), maps, titles=["x"])


def test_sites_that_do_not_fit(tiny_cnn: nn.Module) -> None:
    arch = SubArchitecture.full([GateSite("relu9", 6, 1)])
    with pytest.raises(Exception, match="relu9"), helpers.assert_model_untouched(tiny_cnn):
        heat_maps(tiny_cnn, arch, helpers.images(2), 0)
