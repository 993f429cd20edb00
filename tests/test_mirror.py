"""Mirrored pictures are used if images are few and the network's output allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nad_attr import GateSite, Recipe, learn_gates
from nad_attr.data.sources import MirroredSource, as_source
from nad_attr.learning.engine import TaskImages
from nad_attr.learning.session import Session

RECIPE = Recipe(size=0.5, steps=6, images_per_step=4)


def network(sided: bool) -> nn.Module:
    """Reads means over positions, or the left half alone."""
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 6, 1), nn.ReLU(), nn.Conv2d(6, 2, (4, 4))).double()
    for layer in (net[0], net[2]):
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator).double()
    head = net[2].weight.data
    head[..., 2:] = 0 if sided else head[..., :2].flip(-1)
    return nn.Sequential(*net, nn.Flatten()).eval()


def pictures(n: int, n_own: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(n, 2, 4, 4, generator=generator).double()
    return images, (torch.arange(n) >= n_own).long()


def seen(net: nn.Module, data: Any, tasks: list[int], **settings: Any) -> list[bool]:
    sites = [GateSite("1", 6, 1)]
    recipe = Recipe(size=0.5, steps=6, images_per_step=4, **settings)
    session = Session(net, data, tasks, recipe, sites)
    source, turned = session.mirrored(session.tasks)
    assert isinstance(source, MirroredSource) == any(turned)
    return turned


def test_mirrored_pictures_are_seen_where_images_are_few_and_the_network_does_not_mind() -> None:
    data = pictures(80, 20)
    assert seen(network(sided=False), data, [0, 1]) == [True, False]  # 20 own images, and 60
    assert seen(network(sided=True), data, [0, 1]) == [False, False]
    assert seen(network(sided=True), data, [0, 1], mirror=True) == [True, True]
    assert seen(network(sided=False), data, [0, 1], mirror=False) == [False, False]
    assert seen(network(sided=False), data, [0, 1], ablation="mean") == [False, False]


def test_what_is_no_picture_is_not_mirrored() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    data = torch.randn(12, 5), torch.arange(12) % 2
    assert seen(net, data, [0]) == [False]
    with pytest.raises(ValueError, match="mirror=True needs pictures"):
        seen(net, data, [0], mirror=True)
    with pytest.raises(ValueError, match="mirror must be True, False or None"):
        Recipe(mirror="yes")  # type: ignore[arg-type]
    assert Recipe.from_json(Recipe(mirror=False).to_json()).mirror is False


def test_half_of_the_draws_are_mirrored_and_none_of_those_kept_apart() -> None:
    labels = torch.arange(300) % 3
    images, plain = (TaskImages(labels, 1, 4, mirrored=turned) for turned in (True, False))
    (own, _), _ = images.keep_apart(0.2, most=32, least=50)
    plain.keep_apart(0.2, most=32, least=50)
    draws = images.take("own", 800)
    assert [i % 300 for i, _ in draws] == [i for i, _ in plain.take("own", 800)]
    assert 320 < sum(i >= 300 for i, _ in draws) < 480
    assert not {i for i, _ in own} & {i % 300 for i, _ in draws}
    assert max(i for i, _ in own) < 300


def test_mirrored_images_are_left_for_right() -> None:
    x, labels = pictures(5, 2)
    source = MirroredSource(as_source((x, labels)))
    (found,) = next(source.batches([[(1, 0), (6, 0), (9, 0)]]))
    assert torch.equal(found, torch.stack([x[1], x[1].flip(-1), x[4].flip(-1)]))
    assert source.labels.tolist() == 2 * labels.tolist()


def test_gates_do_not_depend_on_what_is_learned_with_them() -> None:
    net, data, sites = network(sided=False), pictures(80, 20), [GateSite("1", 6, 1)]
    both = learn_gates(net, data, recipe=RECIPE, sites=sites)
    for task in (0, 1):
        alone = learn_gates(net, data, [task], RECIPE, sites)
        assert torch.equal(alone["1"][0], both["1"][task])
        torch.testing.assert_close(alone.constants["1"][0], both.constants["1"][task])
