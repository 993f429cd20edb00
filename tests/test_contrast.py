"""Contrast maps and mosaics coloured by class, against sums written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import GateSite, RunOptions, SubArchitecture, TaskGates, find_gate_sites
from nad_attr.evaluation import mosaics
from nad_attr.pictures import class_mosaics, contrast_maps
from tests import helpers
from tests.test_heat_maps import architectures


def by_hand(
    model: nn.Module, arch: SubArchitecture, only: SubArchitecture, x: Tensor, task: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """TinyCNN as a sub-architecture: evidence and presence of some channels at both sites."""
    net: Any = model
    gate = arch.gates(torch.float64)
    assert arch.means is not None
    mean = {name: m.double()[:, None, None] for name, m in arch.means.items()}

    def put(name: str, h: Tensor) -> Tensor:
        g = gate[name][:, None, None]
        return (g * h + (1 - g) * mean[name]).detach().requires_grad_(True)

    # Each site is a leaf of its own; the gradient at the first is chained by hand.
    first = put("relu1", F.relu(net.bn1(net.conv1(x))))
    inner = F.relu(net.conv2(first))
    second = put("relu2", inner)
    z = net.linear(second.mean((2, 3)))[:, task].sum()
    (at_second,) = torch.autograd.grad(z, second)
    (at_first,) = torch.autograd.grad(
        inner, first, grad_outputs=at_second * gate["relu2"][:, None, None]
    )
    evidence, presence = {}, {}
    for name, a, gradient in (("relu1", first, at_first), ("relu2", second, at_second)):
        pick = only[name]
        difference = (a - mean[name]).detach()
        evidence[name] = (difference * gradient)[:, pick].sum(1).float()
        presence[name] = difference.abs()[:, pick].sum(1).float()
    return evidence, presence


@pytest.mark.parametrize("batch_size", [2, 32])
def test_maps_against_sums_written_out(tiny_cnn: nn.Module, batch_size: int) -> None:
    a, b, _ = architectures(tiny_cnn, seed=1)
    images = helpers.images(5)
    for index, measure in enumerate(("evidence", "presence")):
        with helpers.assert_model_untouched(tiny_cnn, images):
            found = contrast_maps(
                tiny_cnn,
                [a, b],
                images,
                measure=measure,  # type: ignore[arg-type]
                run=RunOptions(batch_size=batch_size),
            )
        first = by_hand(tiny_cnn, a, a - b, images, 0)[index]
        second = by_hand(tiny_cnn, b, b - a, images, 1)[index]
        assert found.sites == ("relu1", "relu2")
        for name in found.sites:
            assert found.n_only[name] == (int((a - b)[name].sum()), int((b - a)[name].sum()))
            torch.testing.assert_close(found.first[name], first[name], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.second[name], second[name], rtol=1e-5, atol=1e-6)
        assert any(bool(m.abs().max() > 0) for m in found.first.values())


def test_in_place_relu_after_a_site(tiny_resnet: nn.Module) -> None:
    """The first site feeds an in-place ReLU's block: gradients are of the site's own tensor."""
    net = nn.Sequential(
        nn.Conv2d(3, 2, 1, bias=False),
        nn.Identity(),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ).double()
    net.eval()
    site = GateSite("0", 2, 1)
    archs = [SubArchitecture.from_kept({"0": [k]}, [site], task=k) for k in range(2)]
    images = helpers.images(2)
    found = contrast_maps(net, archs, images)
    with torch.no_grad():
        z = net[0](images)
    torch.testing.assert_close(found.first["0"], (z[:, 0].clamp_min(0) / 64).float())
    torch.testing.assert_close(found.second["0"], (z[:, 1].clamp_min(0) / 64).float())


def test_equal_architectures_have_no_contrast_and_order_swaps_it(tiny_cnn: nn.Module) -> None:
    a, b, _ = architectures(tiny_cnn)
    images = helpers.images(3)
    same = SubArchitecture(a.masks, a.sites, task=1, means=a.means)
    assert not contrast_maps(tiny_cnn, [a, same], images).difference().any()
    one = contrast_maps(tiny_cnn, [a, b], images)
    with torch.inference_mode():
        other = contrast_maps(tiny_cnn, [b, a], images.clone())
    torch.testing.assert_close(one.difference(), -other.difference())
    assert float(one.difference("relu2").abs().max()) > 0
    assert float(one.difference().abs().max()) <= 2
    assert "relu1" in one.summary()


@pytest.mark.slow
def test_gates_names_and_tokens(tiny_vit: nn.Module) -> None:
    sites = find_gate_sites(tiny_vit, helpers.images(1))
    generator = torch.Generator().manual_seed(0)
    values = {s.name: torch.rand(3, s.n_channels, generator=generator) for s in sites}
    gates = TaskGates(values, sites, [0, 1, 2], task_names=["cat", "dog", "bus"])
    images = helpers.images(4)
    with helpers.assert_model_untouched(tiny_vit, images):
        found = contrast_maps(tiny_vit, gates, images, ("bus", 0), size=0.6)
    assert found.task_names == ("bus", "cat")
    assert found.tasks == (2, 0)
    assert all(maps.shape == (4, 2, 2) for maps in found.first.values())
    assert found.difference().shape == (4, 8, 8)
    pair = [gates.sub_architecture(k, 0.6) for k in (2, 0)]
    again = contrast_maps(tiny_vit, pair, images)
    torch.testing.assert_close(found.difference(), again.difference())


def test_nothing_is_left_after_an_exception(tiny_cnn: nn.Module) -> None:
    a, b, _ = architectures(tiny_cnn)
    images = helpers.images(2)

    def fails(x: Tensor) -> Tensor:
        tiny_cnn(x)
        raise RuntimeError("stop")

    with (
        helpers.assert_model_untouched(tiny_cnn, images),
        pytest.raises(Exception, match="stop"),
    ):
        contrast_maps(tiny_cnn, [a, b], images, run=RunOptions(forward_func=fails))


@pytest.mark.parametrize(
    ("case", "error", "message"),
    [
        ("one", TypeError, "two SubArchitecture"),
        ("same task", ValueError, "two different tasks"),
        ("no task", ValueError, "two different tasks"),
        ("measure", ValueError, "'evidence' or 'presence'"),
        ("three tasks", ValueError, "between two tasks, not 3"),
        ("vector", ValueError, "no gate site has positions"),
        ("nan", ValueError, "NaN"),
        ("tasks", ValueError, "need TaskGates"),
        ("no images", ValueError, "no image"),
    ],
)
def test_bad_input(tiny_cnn: nn.Module, case: str, error: type[Exception], message: str) -> None:
    a, b, _ = architectures(tiny_cnn)
    archs: Any = [a, b]
    images, keywords = helpers.images(2), dict[str, Any]()
    if case == "one":
        archs = [a]
    elif case == "same task":
        archs = [a, a]
    elif case == "no task":
        archs = [a, SubArchitecture(b.masks, b.sites)]
    elif case == "measure":
        keywords["measure"] = "energy"
    elif case == "three tasks":
        archs = TaskGates(
            {s.name: torch.rand(3, s.n_channels) for s in a.sites}, a.sites, [0, 1, 2]
        )
    elif case == "vector":
        site = GateSite("pool", 8, 1)
        archs = [SubArchitecture.from_kept({"pool": [k]}, [site], task=k) for k in range(2)]
    elif case == "nan":
        images[0] = float("nan")
    elif case == "tasks":
        keywords["tasks"] = (0, 1)
    elif case == "no images":
        images = images[:0]
    with pytest.raises(error, match=message), helpers.assert_model_untouched(tiny_cnn):
        contrast_maps(tiny_cnn, archs, images, **keywords)


# ---------------------------------------------------------------------------------------------
# Mosaics coloured by class
# ---------------------------------------------------------------------------------------------


@pytest.fixture
def colours() -> tuple[nn.Module, list[SubArchitecture], tuple[Tensor, Tensor]]:
    """Five classes; class k is channel k, but class 4 keeps what the others keep as well."""
    net = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    site = GateSite("0", 5, 1)
    kept = [[k, 4] for k in range(4)] + [[4]]
    archs = [SubArchitecture.from_kept({"0": c}, [site], task=k) for k, c in enumerate(kept)]
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 5, 8, 8, generator=generator) * 0.1
    labels = torch.arange(10) % 5
    images[torch.arange(10), labels] += 1.0
    return net, archs, (images, labels)


def test_mosaics_are_those_of_the_evaluation(
    colours: tuple[nn.Module, list[SubArchitecture], tuple[Tensor, Tensor]],
) -> None:
    net, archs, data = colours
    with helpers.assert_model_untouched(net, *data):
        found = class_mosaics(net, archs, data, n=6, seed=4)
    reference = mosaics(net, archs, data, n=6, seed=4)
    assert found.chosen.tolist() == reference.chosen.tolist()
    assert found.numbers.tolist() == reference.images.tolist()
    assert found.images.shape == (6, 5, 8, 8)
    assert found.maps["0"].shape == (6, 4, 8, 8)
    large = class_mosaics(net, archs, data, n=1, resize=False)
    row = large.numbers[0].tolist()
    for q in range(4):
        part = large.images[0, :, 8 * (q // 2) :, 8 * (q % 2) :][:, :8, :8]
        torch.testing.assert_close(part, data[0][row[q]])
        task = int(large.chosen[0, q])
        # The gradient of the pooled output is one over the number of positions, for its channel.
        torch.testing.assert_close(large.maps["0"][0, q], large.images[0, task] / 256)


def test_own_share_and_exclusive_channels(
    colours: tuple[nn.Module, list[SubArchitecture], tuple[Tensor, Tensor]],
) -> None:
    net, archs, data = colours
    found = class_mosaics(net, archs, data, n=12, resize=False)
    share = found.own_share()
    assert share.shape == (12, 4)
    maps = found.maps["0"]
    expected = torch.stack(
        [maps[:, 0, :8, :8], maps[:, 1, :8, 8:], maps[:, 2, 8:, :8], maps[:, 3, 8:, 8:]], dim=1
    ).sum((2, 3)) / maps.sum((2, 3))
    torch.testing.assert_close(share, expected)
    assert float(share.min()) > 0.7
    alone = class_mosaics(net, archs, data, n=12, resize=False, exclusive=True)
    shared = alone.chosen == 4
    assert shared.any()
    # Class 4 keeps no channel of its own where others are beside it: it says nothing.
    assert alone.own_share()[shared].isnan().all()
    assert not alone.own_share()[~shared].isnan().any()


def test_mosaics_leave_nothing_after_an_exception(
    colours: tuple[nn.Module, list[SubArchitecture], tuple[Tensor, Tensor]],
) -> None:
    net, archs, data = colours
    calls: list[int] = []

    def fails(x: Tensor) -> Tensor:
        out: Tensor = net(x)
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("stop")
        return out

    with (
        helpers.assert_model_untouched(net, *data),
        pytest.raises(Exception, match="stop"),
    ):
        class_mosaics(net, archs, data, n=2, run=RunOptions(forward_func=fails))
    assert len(calls) == 3


def test_too_few_classes(tiny_cnn: nn.Module) -> None:
    with pytest.raises(ValueError, match="at least 4"):
        class_mosaics(tiny_cnn, architectures(tiny_cnn), helpers.labelled_images(6))


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_contrast_figure(tiny_cnn: nn.Module) -> None:
    pytest.importorskip("matplotlib")
    a, b, _ = architectures(tiny_cnn)
    images = helpers.images(2)
    found = contrast_maps(tiny_cnn, [a, b], images)
    figure = found.plot(images, titles=["first", "second"])
    assert len(figure.axes) == 8
    assert figure.axes[0].get_ylabel() == "first"
    assert len(found.plot(images, site="relu1").axes) == 8
    with pytest.raises(KeyError, match="relu9"):
        found.plot(images, site="relu9")
    with pytest.raises(ValueError, match="1 images"):
        found.plot(images[:1])


def test_mosaic_figure(
    colours: tuple[nn.Module, list[SubArchitecture], tuple[Tensor, Tensor]],
) -> None:
    pytest.importorskip("matplotlib")
    net, archs, data = colours
    found = class_mosaics(net, archs, data, n=2)
    figure = found.plot(to_pixels=lambda x: x[:, :3])
    assert len(figure.axes) == 4
    texts = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    names = [found.task_names[k] for k in found.chosen[0].tolist()]
    assert [text.splitlines()[0] for text in texts] == names
    with pytest.raises(KeyError, match="no map of site"):
        found.plot(site="9", to_pixels=lambda x: x[:, :3])
