"""Mosaics: the hit of a map, its null of exactly one quarter, and the run through the network."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr._checks import GatingError
from nad_attr.evaluation.questions.mosaic_result import MosaicResult
from nad_attr.evaluation.questions.mosaics import mosaics, quadrant_shares
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from tests.helpers import TinyViT, assert_model_untouched, build

# -- The measure -------------------------------------------------------------------------------

# Which share of the cells of a 2 x 3 map lies in which quadrant, by hand: the middle column is cut.
AREAS_2x3 = [
    [1, 0, 0, 0],
    [0.5, 0.5, 0, 0],
    [0, 1, 0, 0],
    [0, 0, 1, 0],
    [0, 0, 0.5, 0.5],
    [0, 0, 0, 1],
]


@pytest.mark.parametrize("n_top", [1, 2, 3, 5, 6])
@pytest.mark.parametrize(
    "values", [[3, 1, 2, 0, 5, 4], [1, 1, 0, 1, 1, 0], [2, 2, 2, 2, 2, 2], [9, -1, -1, -1, 9, -1]]
)
def test_ties_count_by_the_mean_over_all_ways_to_break_them(values: list[int], n_top: int) -> None:
    orders = list(itertools.permutations(range(6)))
    expected = np.zeros(4)
    for order in orders:
        best = sorted(order, key=lambda i: -values[i])[:n_top]  # stable: the order breaks ties
        expected += np.mean([AREAS_2x3[i] for i in best], axis=0) / len(orders)
    shares = quadrant_shares(torch.tensor(values).reshape(2, 3), top=n_top / 6)
    assert shares.tolist() == pytest.approx(expected.tolist(), abs=1e-12)


def test_part_of_a_position_counts_as_part() -> None:
    # 1.6 of 4 positions: the highest, and 0.6 of the second.
    shares = quadrant_shares(torch.tensor([[4.0, 3.0], [2.0, 1.0]]), top=0.4)
    assert shares.tolist() == pytest.approx([1 / 1.6, 0.6 / 1.6, 0, 0])


def test_the_middle_of_an_odd_map_belongs_to_all() -> None:
    spot = torch.zeros(3, 3, dtype=torch.float64)
    spot[1, 1] = 1.0
    assert quadrant_shares(spot, top=1 / 9).tolist() == pytest.approx([0.25] * 4, abs=1e-15)
    spot[1, 1], spot[0, 1] = 0.0, 1.0
    assert quadrant_shares(spot, top=1 / 9).tolist() == pytest.approx([0.5, 0.5, 0, 0], abs=1e-15)


@pytest.mark.slow
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    levels=st.integers(1, 4),
    top=st.floats(0.01, 1.0),
    seed=st.integers(0, 1000),
)
def test_null_is_one_quarter_over_the_quadrants_asked_for(
    height: int, width: int, levels: int, top: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randint(levels, (3, height, width), generator=generator)
    shares = quadrant_shares(maps, top=top)
    assert bool((shares >= -1e-12).all())
    assert shares.mean(-1).tolist() == pytest.approx([0.25] * 3, abs=1e-12)


def test_constant_map_gives_the_areas() -> None:
    for shape in ((8, 8), (7, 7), (1, 5), (3, 2)):
        assert quadrant_shares(torch.full(shape, -3.0)).tolist() == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("top", [0.0, 1.1, True, "all"])
def test_top_has_to_be_a_share(top: object) -> None:
    with pytest.raises(ValueError, match="top must be a share"):
        quadrant_shares(torch.zeros(2, 2), top=top)  # type: ignore[arg-type]


def test_maps_have_to_be_maps() -> None:
    with pytest.raises(ValueError, match="NaN"):
        quadrant_shares(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ValueError, match="shape"):
        quadrant_shares(torch.zeros(4))


# -- A network whose maps are known ------------------------------------------------------------

N_CLASSES = 5


class Planes(nn.Module):
    """Each class has an input channel of its own; sites of full, half and odd size, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.full = nn.ReLU()
        self.mid = nn.AvgPool2d(2)
        self.odd = nn.AdaptiveAvgPool2d(3)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.vector = nn.Flatten()
        self.head = nn.Linear(N_CLASSES, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.odd(self.mid(self.full(x)))
        return self.head(self.vector(self.pool(x)))


SITES = [GateSite(name, N_CLASSES, 1) for name in ("full", "mid", "odd", "pool", "vector")]


@pytest.fixture
def planes() -> nn.Module:
    return build(Planes)


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """Two images of each class: channel k is positive for class k, 0 otherwise."""
    labels = torch.arange(2 * N_CLASSES) % N_CLASSES
    generator = torch.Generator().manual_seed(5)
    x = torch.zeros(len(labels), N_CLASSES, 8, 8, dtype=torch.float64)
    brightness = 1 + torch.rand(len(labels), 8, 8, generator=generator, dtype=torch.float64)
    x[torch.arange(len(labels)), labels] = brightness
    return x, labels


def own_channel() -> list[SubArchitecture]:
    """The sub-architecture of k keeps channel k everywhere."""
    kept = [{site.name: [k] for site in SITES} for k in range(N_CLASSES)]
    return [SubArchitecture.from_kept(kept[k], SITES, task=k) for k in range(N_CLASSES)]


def test_own_channels_hit_and_all_channels_do_not(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    with assert_model_untouched(planes, *data):
        result = mosaics(planes, own_channel(), data, n=30)
    assert result.sites == ("full", "mid", "odd")
    assert set(result.left_out) == {"pool", "vector"}
    assert result.grids == {"full": (8, 8), "mid": (4, 4), "odd": (3, 3)}
    assert result.depths.tolist() == [0, 0.25, 0.5]
    # Of the seam, interpolation leaves a little in the neighbour's: never among the highest.
    assert result.mean("hit")[:2] == pytest.approx([1, 1])
    assert result.mean("difference")[:2] == pytest.approx([1, 1])
    # One class's quadrant is one corner of 3 x 3, 0.9 of which is the top 10 %.
    assert result.mean("hit")[2] == pytest.approx(1)
    assert result.interval("excess")[0][0] == pytest.approx(0.75)
    everyone = [SubArchitecture.full(SITES).masks] * N_CLASSES
    full = [SubArchitecture(masks, SITES, task=k) for k, masks in enumerate(everyone)]
    null = mosaics(planes, full, data, n=30)
    # Class-agnostic maps: not about, but exactly one quarter, in every single mosaic.
    assert null.hits.ravel().tolist() == pytest.approx([0.25] * 90, abs=1e-12)
    assert np.allclose(null.mean("excess"), 0, atol=1e-12)
    assert np.allclose(null.mean("difference"), 0, atol=1e-12)
    assert np.array_equal(null.shares[:, :, 0], null.whole)


def test_hit_is_exactly_one_quarter_where_numbers_are_exact(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    full = SubArchitecture.full(SITES).masks
    same = [SubArchitecture(full, SITES, task=k) for k in range(N_CLASSES)]
    result = mosaics(planes, same, data, n=8, top=0.25)  # 16 of 64 positions, no rounding
    assert (result.hits[:, 0] == 0.25).all()


def test_closed_everywhere_is_constant_and_gives_chance(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    means = {site.name: torch.rand(N_CLASSES) for site in SITES}
    for mean in (None, means):
        none = [SubArchitecture.from_kept({}, SITES, task=k, means=mean) for k in range(4)]
        result = mosaics(planes, none, data, n=6)
        assert result.shares.ravel().tolist() == pytest.approx([0.25] * result.shares.size)


def test_maps_are_those_inside_the_sub_architecture(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    # All open at "mid", but only channel k reaches it.
    kept = {"mid": list(range(N_CLASSES)), "odd": list(range(N_CLASSES))}
    archs = [
        SubArchitecture.from_kept(kept | {"full": [k]}, SITES, task=k) for k in range(N_CLASSES)
    ]
    result = mosaics(planes, archs, data, n=10)
    assert result.mean("hit")[:2] == pytest.approx([1, 1])
    assert not np.allclose(result.whole[:, 1], 0.25)


def test_one_mosaic_by_hand(planes: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    x, labels = data
    # Channel k for task k, but task 0 keeps the channel of class 1.
    kept = [1, 1, 2, 3, 4]
    archs = [
        SubArchitecture.from_kept({s.name: [kept[k]] for s in SITES}, SITES, task=k)
        for k in range(N_CLASSES)
    ]
    result = mosaics(planes, archs, data, n=40, resize=False)
    assert result.grids["full"] == (16, 16)
    for i in range(40):
        tasks, images = result.chosen[i], result.images[i]
        assert len(set(tasks.tolist())) == 4
        assert labels[torch.from_numpy(images)].tolist() == tasks.tolist()
        rows = [
            torch.cat([x[images[0]], x[images[1]]], 2),
            torch.cat([x[images[2]], x[images[3]]], 2),
        ]
        whole = torch.cat(rows, 1)
        for r in range(4):
            expected = quadrant_shares(whole[kept[tasks[r]]])
            assert result.shares[i, 0, r].tolist() == pytest.approx(expected.tolist(), abs=1e-12)
        assert result.whole[i, 0].tolist() == pytest.approx(
            quadrant_shares(whole.sum(0)).tolist(), abs=1e-12
        )
    by_task = result.by_task()
    assert by_task["hit"][1:, 0] == pytest.approx([1, 1, 1, 1])
    # The map of task 0 lies in the quadrant of class 1, where there is one, else it is constant.
    with_0 = (result.chosen == 0).any(1)
    without_1 = with_0 & ~(result.chosen == 1).any(1)
    assert by_task["hit"][0, 0] == pytest.approx(0.25 * without_1.sum() / with_0.sum())


def test_difference_is_four_thirds_of_the_excess(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    generator = torch.Generator().manual_seed(0)
    gates = {s.name: torch.rand(5, 5, generator=generator) for s in SITES}
    result = mosaics(planes, TaskGates(gates, SITES, list(range(5))), data, n=12, size=0.5)
    assert np.allclose(result.mean("difference"), 4 / 3 * result.mean("excess"))
    assert result.mean("excess") == pytest.approx(result.hits.mean(0) - 0.25)


# -- Tokens ------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Pixels as tokens (N, prefix + H * W, C), then as (N, H, W, C)."""

    def __init__(self, prefix: int = 1) -> None:
        super().__init__()
        self.prefix = prefix
        self.tokens = nn.Identity()
        self.plane = nn.Identity()
        self.head = nn.Linear(N_CLASSES, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        front = 100 * torch.ones_like(tokens[:, :1]).expand(-1, self.prefix, -1)
        tokens = self.tokens(torch.cat([front, tokens], 1))[:, self.prefix :]
        plane = self.plane(tokens.unflatten(1, x.shape[2:]))
        return self.head(plane.mean((1, 2)))


@pytest.mark.parametrize(("prefix", "given_prefix"), [(0, None), (1, None), (1, 1), (5, 5)])
@pytest.mark.parametrize("shape", [(8, 8), (4, 8)])
def test_tokens_are_laid_out_as_the_image(
    prefix: int, given_prefix: int | None, shape: tuple[int, int], data: tuple[Tensor, Tensor]
) -> None:
    sites = [GateSite("tokens", N_CLASSES, -1), GateSite("plane", N_CLASSES, -1)]
    archs = [
        SubArchitecture.from_kept({"tokens": [k], "plane": [k]}, sites, task=k) for k in range(5)
    ]
    x, labels = data[0][:, :, : shape[0], : shape[1]], data[1]
    model = build(lambda: Tokens(prefix))
    result = mosaics(model, archs, (x, labels), n=8, prefix_tokens=given_prefix)
    assert result.grids == {"tokens": shape, "plane": shape}
    assert result.mean("hit") == pytest.approx([1, 1])


def test_tokens_that_are_no_grid_are_left_out(data: tuple[Tensor, Tensor]) -> None:
    sites = [GateSite("tokens", N_CLASSES, -1), GateSite("plane", N_CLASSES, -1)]
    archs = [SubArchitecture.from_kept({"plane": [k]}, sites, task=k) for k in range(5)]
    result = mosaics(build(lambda: Tokens(3)), archs, data, n=3)
    assert result.sites == ("plane",)
    assert "67 tokens" in result.left_out["tokens"]
    assert "67 tokens" in result.summary()


def test_absolute_counts_both_signs() -> None:
    # Class 0 is negative: its sum is lowest where it is, its absolute sum highest.
    site = GateSite("tokens", N_CLASSES, -1)
    x = torch.zeros(5, N_CLASSES, 8, 8, dtype=torch.float64)
    for k in range(5):
        x[k, k] = -1.0 if k == 0 else 1.0
    archs = [SubArchitecture.from_kept({"tokens": [k]}, [site], task=k) for k in range(5)]
    model, labels = build(Tokens), torch.arange(5)
    signed = mosaics(model, archs, (x, labels), n=20).by_task()["hit"][:, 0]
    absolute = mosaics(model, archs, (x, labels), n=20, absolute=True).by_task()["hit"][:, 0]
    assert signed == pytest.approx([0, 1, 1, 1, 1])
    assert absolute == pytest.approx([1, 1, 1, 1, 1])


def test_vision_transformer_runs() -> None:
    model = build(TinyViT)
    sites = [GateSite("blocks.0", 8, -1), GateSite("norm", 8, -1)]
    model.head = nn.Linear(8, 4).double().eval()
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    archs = [SubArchitecture.from_kept({"blocks.0": [k, 7]}, sites, task=k) for k in range(4)]
    with assert_model_untouched(model, x):
        result = mosaics(model, archs, (x, torch.arange(8) % 4), n=3)
    assert result.grids == {"blocks.0": (2, 2), "norm": (2, 2)}


def test_sum_that_is_constant_up_to_rounding_is_constant() -> None:
    # All channels of a LayerNorm sum to zero but for rounding, which must pick no positions.
    model = build(TinyViT).float()
    model.head = nn.Linear(8, 4).eval()
    site = GateSite("norm", 8, -1)
    full = SubArchitecture.full([site]).masks
    archs = [SubArchitecture(full, [site], task=k) for k in range(4)]
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    result = mosaics(model, archs, (x, torch.arange(4)), n=3)
    assert result.shares.ravel().tolist() == pytest.approx([0.25] * result.shares.size)


# -- A function of model, data and seed --------------------------------------------------------


def random_gates() -> TaskGates:
    generator = torch.Generator().manual_seed(3)
    gates = {s.name: torch.rand(5, 5, generator=generator) for s in SITES}
    names = ["ant", "bee", "cat", "dog", "elk"]
    return TaskGates(gates, SITES, list(range(5)), task_names=names)


@pytest.fixture
def result(planes: nn.Module, data: tuple[Tensor, Tensor]) -> MosaicResult:
    return mosaics(planes, random_gates(), data, n=15)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 3, 5, 17, 1000])
def test_batch_size_plays_no_part(
    planes: nn.Module, data: tuple[Tensor, Tensor], result: MosaicResult, batch_size: int
) -> None:
    other = mosaics(planes, random_gates(), data, n=15, run=RunOptions(batch_size=batch_size))
    assert np.allclose(other.shares, result.shares, atol=1e-12)
    assert np.allclose(other.whole, result.whole, atol=1e-12)


def test_more_mosaics_begin_with_the_same_ones(
    planes: nn.Module, data: tuple[Tensor, Tensor], result: MosaicResult
) -> None:
    more = mosaics(planes, random_gates(), data, n=20)
    assert np.array_equal(more.images[:15], result.images)
    assert np.allclose(more.shares[:15], result.shares, atol=1e-12)
    other = mosaics(planes, random_gates(), data, n=15, seed=1)
    assert not np.array_equal(other.images, result.images)


def test_quadrants_and_tasks_are_drawn_evenly(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    result = mosaics(planes, own_channel(), data, n=400)
    counts = np.stack([np.bincount(result.chosen[:, q], minlength=5) for q in range(4)])
    # Each count is binomial(400, 1/5): mean 80, standard deviation 8.
    assert (abs(counts - 80) < 40).all()


def test_group_tasks_use_the_images_of_their_classes(
    planes: nn.Module, data: tuple[Tensor, Tensor]
) -> None:
    archs = [SubArchitecture.from_kept({"full": [k]}, SITES, task=k) for k in (0, 1, 2)]
    archs.append(SubArchitecture.from_kept({"full": [3, 4]}, SITES, task=(3, 4)))
    result = mosaics(planes, archs, data, n=20)
    labels = data[1].numpy()[result.images]
    assert set(labels[result.chosen == 3].tolist()) == {3, 4}
    assert result.by_task()["hit"][:, 0] == pytest.approx([1, 1, 1, 1])


# -- The result --------------------------------------------------------------------------------


def test_frame_and_dict_and_summary(result: MosaicResult) -> None:
    frame = result.frame()
    assert list(frame.index) == ["full", "mid", "odd"]
    assert frame["excess"].tolist() == pytest.approx(result.mean("excess").tolist())
    assert bool(
        ((frame["excess_low"] <= frame["excess"]) & (frame["excess"] <= frame["excess_high"])).all()
    )
    listed = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert listed["excess"]["mean"] == pytest.approx(result.mean("excess").tolist())
    assert listed["task_names"] == ["ant", "bee", "cat", "dog", "elk"]
    text = result.summary()
    assert "chance: 0.250" in text
    assert "left out: vector" in text
    assert "15 mosaics" in text
    assert "15 mosaics of 5 tasks" in repr(result)


def test_interval_of_the_mean(result: MosaicResult) -> None:
    low, high = result.interval("hit", n_draws=4000)
    # The bootstrap's standard error of a mean is that of the formula.
    error = result.hits.std(0) / np.sqrt(len(result))
    assert (high - low) / (2 * 1.96 * error) == pytest.approx([1, 1, 1], rel=0.15)
    assert np.array_equal(low, result.interval("hit", n_draws=4000)[0])
    tasks_low, tasks_high = result.interval("excess", over="tasks")
    own = result.by_task()["hit"] - 0.25
    assert (tasks_low >= own.min(0) - 1e-12).all()
    assert (tasks_high <= own.max(0) + 1e-12).all()


def test_interval_of_one_mosaic_is_unknown(planes: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    result = mosaics(planes, own_channel(), data, n=1)
    assert np.isnan(result.interval()[0]).all()
    assert None in result.to_dict()["excess"]["low"]
    # The task that stands in no mosaic is unknown, not zero.
    assert np.isnan(result.by_task()["hit"]).any(1).sum() == 1


def test_interval_refuses_nonsense(result: MosaicResult) -> None:
    with pytest.raises(ValueError, match="no measure 'luck'"):
        result.interval("luck")
    with pytest.raises(ValueError, match="level"):
        result.interval(level=1.5)
    with pytest.raises(ValueError, match="over must be"):
        result.interval(over="images")


def test_plot(result: MosaicResult) -> None:
    pytest.importorskip("matplotlib")
    figure = result.plot()
    (axis,) = figure.axes
    assert [t.get_text() for t in axis.get_xticklabels()] == ["full", "mid", "odd"]
    mean = next(line for line in axis.lines if line.get_label().startswith("mean"))
    assert mean.get_ydata() == pytest.approx(result.mean("excess"))


# -- Bad input ---------------------------------------------------------------------------------


def test_bad_input(planes: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    archs = own_channel()
    with pytest.raises(ValueError, match="at least 4"):
        mosaics(planes, archs[:3], data)
    with pytest.raises(ValueError, match="images of 3 of the 5"):
        mosaics(planes, archs, (data[0][:3], data[1][:3]))
    with pytest.raises(ValueError, match="n must be a whole number"):
        mosaics(planes, archs, data, n=0)
    with pytest.raises(ValueError, match="batch_size"):
        mosaics(planes, archs, data, run=RunOptions(batch_size=0))
    with pytest.raises(ValueError, match="top must be"):
        mosaics(planes, archs, data, top=2.0)
    with pytest.raises(ValueError, match="prefix_tokens"):
        mosaics(planes, archs, data, prefix_tokens=-1)
    with pytest.raises(ValueError, match="share a class"):
        both = SubArchitecture.from_kept({}, SITES, task=(0, 1))
        mosaics(planes, [*archs, both], data)
    with pytest.raises(ValueError, match="train mode"):
        mosaics(build(Planes).train(), archs, data)
    with pytest.raises(TypeError, match="architectures must be"):
        mosaics(planes, ["a"], data)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="size= needs TaskGates"):
        mosaics(planes, archs, data, size=0.5)
    with pytest.raises(ValueError, match="one floating-point input"):
        mosaics(planes, archs, (data[0].flatten(1), data[1]))
    with pytest.raises(ValueError, match="5 outputs"):
        mosaics(planes, [*archs, SubArchitecture.from_kept({}, SITES, task=9)], data, n=2)


def test_no_site_with_positions(planes: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    sites = SITES[3:]
    archs = [SubArchitecture.from_kept({}, sites, task=k) for k in range(4)]
    with pytest.raises(ValueError, match=r"no gate site has positions.*'vector': a vector"):
        mosaics(planes, archs, data, n=2)


def test_model_is_as_before_after_an_error(planes: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    wrong = [GateSite("full", 7, 1)]
    archs = [SubArchitecture.from_kept({}, wrong, task=k) for k in range(4)]
    with pytest.raises(GatingError, match="7 channels"), assert_model_untouched(planes):
        mosaics(planes, archs, data, n=2)
