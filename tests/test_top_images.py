"""The images that drive kept channels most, against a sort of everything."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr import GateSite, RunOptions, SubArchitecture, find_gate_sites, gated, recorded
from nad_attr.pictures import top_images
from tests import helpers
from tests.test_heat_maps import architectures

NET = nn.Sequential(nn.Identity(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
SITE = GateSite("0", 3, 1)
ARCH = SubArchitecture.from_kept({"0": [0, 2]}, [SITE], task=1)


@given(
    values=st.lists(st.integers(-3, 3), min_size=3 * 4 * 2, max_size=3 * 4 * 11).map(
        lambda v: v[: len(v) // 12 * 12]
    ),
    k=st.integers(1, 5),
    batch_size=st.integers(1, 7),
    pool=st.sampled_from(["max", "mean"]),
)
@settings(max_examples=40)
def test_against_a_sort_of_everything(
    values: list[int], k: int, batch_size: int, pool: Any
) -> None:
    images = torch.tensor(values, dtype=torch.float32).reshape(-1, 3, 2, 2)
    labels = torch.arange(len(images)) % 2
    found = top_images(
        NET, ARCH, (images, labels), k=k, run=RunOptions(batch_size=batch_size), pool=pool
    )
    for row, channel in enumerate((0, 2)):
        flat = images[:, channel].flatten(1)
        scores = (flat.amax(1) if pool == "max" else flat.mean(1)).tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:k]
        missing = k - len(order)
        assert found.images["0"][row].tolist() == order + [-1] * missing
        got = found.values["0"][row]
        assert got[: len(order)].tolist() == pytest.approx([scores[i] for i in order])
        assert got[len(order) :].isnan().all()
        for place, number in enumerate(order):
            y, x = found.positions["0"][row, place].tolist()
            assert images[number, channel, y, x] == images[number, channel].max()
        own = np.array(scores)[labels.numpy() == 1]
        other = np.array(scores)[labels.numpy() == 0]
        spread = np.std(scores)
        expected = (own.mean() - other.mean()) / spread if spread > 1e-12 else 0.0
        assert float(found.selectivity["0"][row]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", ["tiny_cnn", "tiny_vit"])
def test_whole_network_and_inside(request: pytest.FixtureRequest, name: str, inside: bool) -> None:
    model = request.getfixturevalue(name)
    arch = architectures(model)[1]
    images, labels = helpers.labelled_images(12)
    with helpers.assert_model_untouched(model, images, labels):
        found = top_images(
            model, arch, (images, labels), k=3, inside=inside, run=RunOptions(batch_size=5)
        )
    gates = arch.gates(torch.float64) if inside else SubArchitecture.full(arch.sites).gates()
    with (
        torch.no_grad(),
        gated(model, gates, sites=arch.sites, means=arch.means),
        recorded(model, arch.sites) as activations,
    ):
        model(images)
    for site in arch.sites:
        tensor = activations[site.name].movedim(site.channel_dim, -1)
        scores = tensor.flatten(1, -2).amax(1)[:, arch.kept[site.name]]
        assert found.channels[site.name].tolist() == arch.kept[site.name].tolist()
        best = scores.topk(3, dim=0)
        assert found.images[site.name].tolist() == best.indices.T.tolist()
        torch.testing.assert_close(found.values[site.name], best.values.T.float())


def test_maps_are_those_of_the_channel(tiny_cnn: nn.Module) -> None:
    arch = architectures(tiny_cnn)[0]
    data = helpers.labelled_images(8)
    found = top_images(tiny_cnn, arch, data, k=2, sites=["relu2"], channels={"relu2": [5, 1]})
    assert list(found.channels) == ["relu2"]
    with helpers.assert_model_untouched(tiny_cnn, *data):
        images, maps = found.maps(tiny_cnn, "relu2", 1, data)
    torch.testing.assert_close(images, data[0][found.images["relu2"][1]])
    for i in range(2):
        y, x = found.positions["relu2"][1, i].tolist()
        assert maps[i, y, x] == maps[i].max()
        assert float(maps[i].max()) == pytest.approx(float(found.values["relu2"][1, i]), rel=1e-5)
    with pytest.raises(KeyError, match="channel 2"):
        found.maps(tiny_cnn, "relu2", 2, data)
    with pytest.raises(KeyError, match="relu1"):
        found.row("relu1", 0)


def test_vectors_have_no_positions() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    sites = find_gate_sites(net, torch.zeros(1, 1, 2, 2))
    arch = SubArchitecture.full(sites)
    found = top_images(net, arch, (torch.randn(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)), k=2)
    name = sites[0].name
    assert not found.grids
    assert bool((found.positions[name] == -1).all())
    assert found.selectivity[name].isnan().all()  # it says no task
    assert found.most_selective(name, 2) == [0, 1]


def test_nothing_is_left_after_an_exception(tiny_cnn: nn.Module) -> None:
    arch = architectures(tiny_cnn)[0]
    images, labels = helpers.labelled_images(6)
    calls: list[int] = []

    def fails(x: Tensor) -> Tensor:
        out: Tensor = tiny_cnn(x)
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return out

    with (
        helpers.assert_model_untouched(tiny_cnn, images),
        pytest.raises(Exception, match="stop"),
    ):
        top_images(
            tiny_cnn,
            arch,
            (images, labels),
            inside=True,
            run=RunOptions(batch_size=3, forward_func=fails),
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 0}, ValueError, "k"),
        ({"pool": "sum"}, ValueError, "pool"),
        ({"sites": ["9"]}, ValueError, "no gate site '9'"),
        ({"channels": {"0": [3]}}, ValueError, "from 0 to 2"),
        ({"channels": {"0": [0.5]}}, ValueError, "whole numbers"),
        ({"channels": {"0": []}}, ValueError, "no channel"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    data = (torch.zeros(2, 3, 2, 2), torch.tensor([0, 1]))
    with pytest.raises(error, match=message):
        top_images(NET, ARCH, data, **change)
    with pytest.raises(TypeError, match="sub_architecture"):
        top_images(NET, {"0": [1]}, data)  # type: ignore[arg-type]


def test_figure(tiny_cnn: nn.Module) -> None:
    pytest.importorskip("matplotlib")
    arch = architectures(tiny_cnn)[0]
    data = helpers.labelled_images(12)
    found = top_images(tiny_cnn, arch, data, k=3)
    n = min(6, len(arch.kept["relu2"]))
    assert len(found.plot(tiny_cnn, data).axes) == 3 * n
    figure = found.plot(tiny_cnn, data, site="relu1", n_images=2, crop=0.5)
    assert len(figure.axes) == 2 * min(6, len(arch.kept["relu1"]))
    assert figure.axes[0].images[0].get_array().shape == (4, 4, 3)
    for change in ({"crop": 2.0}, {"threshold": 0.0}):
        with pytest.raises(ValueError, match="share"):
            found.plot(tiny_cnn, data, **change)  # type: ignore[arg-type]
