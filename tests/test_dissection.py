"""Network Dissection: IoUs against counting pixel by pixel, and what must not change them."""

from __future__ import annotations

import errno
import itertools
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import GateSite, RunOptions, TaskGates, find_gate_sites
from nad_attr.concepts import Concept, UnitConcepts, dissect, draw_unit, unit_masks
from nad_attr.concepts.datasets.label_maps import label_maps
from nad_attr.concepts.dissection.dissecting import _Dissection
from nad_attr.concepts.dissection.overlap import (
    active_pixels,
    count_active,
    grid,
    running_sums,
    touched,
)
from nad_attr.gating.hooks import recorded
from nad_attr.running.forward import Runner
from nad_attr.store import GateStore, GateStoreError, read_result, result_names, write_result
from tests.helpers import TinyCNN, TinyResNet, TinyViT, assert_model_untouched, build, images

CONCEPTS = [
    Concept("sky", "object"),
    Concept("road", "object"),
    Concept("street", "scene"),
    Concept("grey", "colour"),
]
SIZE = (11, 9)


def labels(n: int = 12, seed: int = 0) -> Tensor:
    """Two maps that overlap for each image (n, 2, 11, 9): objects, unlabelled here and there; and
    scenes or colours."""
    generator = torch.Generator().manual_seed(seed)
    objects = torch.randint(-1, 2, (n, *SIZE), generator=generator)
    others = torch.randint(2, 4, (n, *SIZE), generator=generator)
    others[: n // 2][others[: n // 2] == 2] = -1  # half of the images have no scene
    return torch.stack([objects, others], 1)


def brute_force(
    activations: Tensor, thresholds: Tensor, maps: Tensor, *, count_all: bool = False
) -> Tensor:
    """IoU of (N, C, h, w) with CONCEPTS, by comparing whole maps pixel by pixel."""
    up = F.interpolate(activations, SIZE, mode="bilinear", align_corners=False)
    active = up > thresholds[:, None, None]
    columns = []
    for k, concept in enumerate(CONCEPTS):
        same = [i for i, other in enumerate(CONCEPTS) if other.category == concept.category]
        shows = (maps == k).any(1)[:, None]
        labelled = torch.stack([maps == i for i in same]).any(0).any(1)[:, None]
        if count_all:
            labelled = labelled.flatten(1).any(1)[:, None, None, None].expand_as(shows)
        both = (active & shows).sum((0, 2, 3))
        either = ((active & labelled) | shows).sum((0, 2, 3))
        columns.append(both.double() / either)
    return torch.stack(columns, 1)


def activations_of(model: nn.Module, sites: list[GateSite], x: Tensor) -> dict[str, Tensor]:
    with recorded(model, sites) as held, torch.no_grad():
        model(x)
    return dict(held)


def exact_threshold(values: Tensor, quantile: float) -> Tensor:
    """The largest value of each unit that at most a share exceeds, by looking at each."""
    flat = values.movedim(1, 0).flatten(1).double()
    found = []
    for unit in flat:
        ordered = unit.sort(descending=True).values
        found.append(next(t for t in ordered.flip(0) if (unit > t).double().mean() <= quantile))
    return torch.stack(found)


# -- the IoU matrix --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("unlabelled", ["ignore", "count"])
@pytest.mark.parametrize("make", [TinyCNN, TinyResNet])
def test_exact_mode_equals_counting_each_pixel(make: Any, unlabelled: str) -> None:
    model, x, maps = build(make), images(), labels()
    sites = find_gate_sites(model, x[:1])
    with assert_model_untouched(model, x, maps):
        units = dissect(
            model,
            sites,
            (x, maps),
            quantile=0.05,
            concepts=CONCEPTS,
            exact=True,
            unlabelled=unlabelled,
        )
    held = activations_of(model, sites, x)
    assert units.sites == tuple(site.name for site in sites)
    for name in units:
        threshold = exact_threshold(held[name], 0.05)
        assert torch.equal(threshold, torch.tensor(units.thresholds[name]))
        expected = brute_force(held[name], threshold, maps, count_all=unlabelled == "count")
        assert np.array_equal(units.iou[name], expected.float().numpy())
        assert units.iou[name].max() > 0.01  # there is something to see


@pytest.mark.slow
def test_streaming_mode_is_within_its_bound() -> None:
    model, x, maps = build(TinyResNet), images(40), labels(40)
    sites = find_gate_sites(model, x[:1])
    n_bins = 64
    units = dissect(model, sites, (x, maps), quantile=0.02, concepts=CONCEPTS, n_bins=n_bins)
    held = activations_of(model, sites, x)
    differs = False
    for name in units:
        exact = exact_threshold(held[name], 0.02)
        given = torch.tensor(units.thresholds[name])
        flat = held[name].movedim(1, 0).flatten(1)
        width = 2 * (flat.amax(1) - flat.amin(1)) / (n_bins - 2)
        assert bool((given >= exact).all())
        assert bool((given - exact <= width).all())
        assert float((given - exact).max()) <= units.info["threshold_error"][name]
        assert float(width.max()) >= units.info["threshold_error"][name]
        # Exactly the IoU of the thresholds given ...
        assert np.array_equal(units.iou[name], brute_force(held[name], given, maps).float().numpy())
        # ... and for each concept between what the ends of the bin allow.
        low = brute_parts(held[name], exact + width, maps)
        high = brute_parts(held[name], exact, maps)
        iou = torch.tensor(units.iou[name])
        assert bool((iou >= (low[0] / high[1] - 1e-6)).all())
        assert bool((iou <= (high[0] / low[1] + 1e-6)).all())
        differs |= not torch.equal(given, exact)
    assert differs  # else nothing was tested


def brute_parts(activations: Tensor, thresholds: Tensor, maps: Tensor) -> tuple[Tensor, Tensor]:
    """Intersections and unions with CONCEPTS."""
    up = F.interpolate(activations, SIZE, mode="bilinear", align_corners=False)
    active = up > thresholds[:, None, None]
    both, either = [], []
    for k, concept in enumerate(CONCEPTS):
        same = [i for i, other in enumerate(CONCEPTS) if other.category == concept.category]
        shows = (maps == k).any(1)[:, None]
        labelled = torch.stack([maps == i for i in same]).any(0).any(1)[:, None]
        both.append((active & shows).sum((0, 2, 3)).double())
        either.append(((active & labelled) | shows).sum((0, 2, 3)).double())
    return torch.stack(both, 1), torch.stack(either, 1)


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        ((7, 7), (224, 224)),
        ((5, 3), (11, 17)),
        ((8, 8), (8, 8)),
        ((9, 6), (4, 5)),
        ((1, 1), (3, 2)),
    ],
)
def test_pixels_are_those_of_interpolate(shape: tuple[int, int], size: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, *shape, 6, generator=generator, dtype=torch.float64)
    limits = torch.linspace(-1, 2, 6, dtype=torch.float64)
    maps = torch.randint(-1, 3, (3, *size), generator=generator)
    put = [label_maps(each, 3, shape=size) for each in maps]
    layout = grid(shape, size, x.dtype, x.device)
    up = F.interpolate(x.permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False)
    active = up > limits[:, None, None]
    for i, each in enumerate(put):
        n = len(each.concepts)
        found = touched(x[i : i + 1], x[i : i + 1] > limits)
        assert found is not None
        sums = running_sums(each.combination[None], torch.eye(n))
        counts = count_active(found, limits, sums, layout)
        for k, u in itertools.product(range(n), range(6)):
            assert int(counts[u, k]) == int((active[i, u] & (each.combination == k)).sum())
        for u in range(6):
            found = active_pixels(x[i, :, :, u], float(limits[u]), size)
            assert torch.equal(found, active[i, u])


def test_pixels_exactly_at_the_threshold_and_flat_maps() -> None:
    # Whole numbers and weights of 64ths: all of it is exact, and the line often meets the limit.
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 3, (2, 7, 7, 5), generator=generator).float()
    x[..., 4] = 1.0
    limits = torch.tensor([1.0, 0.5, 1.5, 1.25, 0.75])
    up = F.interpolate(x.permute(0, 3, 1, 2), (224, 224), mode="bilinear", align_corners=False)
    sums = running_sums(torch.zeros(2, 224, 224, dtype=torch.int64), torch.ones(1, 1))
    found = touched(x, x > limits)
    assert found is not None
    counts = count_active(found, limits, sums, grid((7, 7), (224, 224), x.dtype, x.device))
    assert torch.equal(counts[:, 0].long(), (up > limits[:, None, None]).sum((0, 2, 3)))
    assert counts[4, 0] == 2 * 224 * 224  # flat and above


def test_rounding_where_a_line_crosses_the_threshold() -> None:
    # Two neighbouring numbers: where the line rounds up is not where it crosses.
    low = torch.tensor(1.0)
    high = torch.nextafter(low, torch.tensor(2.0))
    x = torch.where(
        torch.rand(1, 7, 7, 3, generator=torch.Generator().manual_seed(0)) > 0.5, high, low
    )
    limits = low.expand(3)
    found = touched(x, x > limits)
    assert found is not None
    sums = running_sums(torch.zeros(1, 224, 224, dtype=torch.int64), torch.ones(1, 1))
    counts = count_active(found, limits, sums, grid((7, 7), (224, 224), x.dtype, x.device))
    by_pixel = [active_pixels(x[0, :, :, u], 1.0, (224, 224)).sum() for u in range(3)]
    assert counts[:, 0].long().tolist() == [int(n) for n in by_pixel]


def test_a_flat_map_at_its_threshold_is_nowhere_active() -> None:
    # 0.1 has no exact binary form: weights that sum up to more than one would exceed it.
    flat = torch.full((5, 4), 0.1)
    assert not bool(active_pixels(flat, float(flat[0, 0]), (37, 29)).any())


# -- what must not change it -----------------------------------------------------------------------


@pytest.mark.slow
def test_batches_scratch_and_memory_order_change_nothing() -> None:
    model, x, maps = build(TinyResNet), images(13), labels(13)
    sites = find_gate_sites(model, x[:1])

    def units(**how: Any) -> UnitConcepts:
        return dissect(model, sites, (x, maps), quantile=0.1, concepts=CONCEPTS, n_bins=32, **how)

    first = units(run=RunOptions(batch_size=1), scratch_bytes=0)
    for how in (
        {"run": RunOptions(batch_size=5), "scratch_bytes": 0},
        {"run": RunOptions(batch_size=5), "scratch_bytes": 2**24},
        {"run": RunOptions(batch_size=4), "scratch_bytes": 40_000},  # room for some batches only
        {"run": RunOptions(batch_size=13), "n_workers": 1},
    ):
        other = units(**how)
        for name in first:
            np.testing.assert_allclose(other.thresholds[name], first.thresholds[name], rtol=1e-12)
            assert np.array_equal(other.iou[name], first.iou[name])
            assert np.array_equal(other.top_images[name], first.top_images[name])


@pytest.mark.slow
def test_parts_of_activations_and_of_batches_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, maps = build(TinyResNet), images(40), labels(40)
    # Labels of two sizes, so that a batch is counted in parts.
    other = [each[:, ::2, ::2].contiguous() for each in maps[::2]]
    mixed = [(x[i], other[i // 2] if i % 2 == 0 else maps[i]) for i in range(40)]
    sites = find_gate_sites(model, x[:1])
    for data in (list(zip(x, maps, strict=True)), mixed):

        def units(data: Any = data, **how: Any) -> UnitConcepts:
            return dissect(
                model,
                sites,
                data,
                quantile=0.004,
                concepts=CONCEPTS,
                run=RunOptions(batch_size=5),
                **how,
            )

        whole = units(scratch_bytes=0)
        read = []

        def kept(*given: Any, read: list[int] = read, original: Any = _Dissection._kept) -> Any:
            read.append(1)
            return original(*given)

        with monkeypatch.context() as patched:
            patched.setattr(_Dissection, "_kept", kept)
            patched.setattr("nad_attr.concepts.dissection.shown._SUMS_BYTES", 1)  # image by image
            patched.setattr("nad_attr.concepts.dissection.overlap._CHUNK", 64)
            again = units(scratch_bytes=2**24)
        assert read  # some were written down in part
        assert again == whole
        assert any(np.nanmax(iou) > 0 for iou in whole.iou.values())


class Counting(nn.Module):
    """A network that counts the images that it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        Counting.n = 0  # not the module's own, which is put back after each pass

    def forward(self, x: Tensor) -> Tensor:
        Counting.n += len(x)
        return self.relu(x).mean((2, 3))


@pytest.mark.parametrize(("scratch", "passes"), [(0, 2), (2**24, 1)])
def test_the_network_runs_once_with_scratch_and_twice_without(scratch: int, passes: int) -> None:
    model = Counting().eval()
    dissect(
        model,
        [GateSite("relu", 3)],
        (images(), labels()),
        quantile=0.1,
        concepts=CONCEPTS,
        scratch_bytes=scratch,
    )
    assert model.n == 4 + passes * 12  # one to look at, three to ask for the batch size


def test_a_full_disk_costs_passes_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    x, maps = images(20), labels(20)
    sites = [GateSite("relu", 3)]

    def units(model: Counting) -> UnitConcepts:
        return dissect(
            model.eval(),
            sites,
            (x, maps),
            quantile=0.1,
            concepts=CONCEPTS,
            run=RunOptions(batch_size=4),
        )

    expected = units(Counting())
    make = tempfile.TemporaryFile

    def small_disk(*args: Any, **options: Any) -> Any:
        file = make(*args, **options)

        class Full:
            """A file on a disk with room for some batches."""

            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def write(self, data: Any) -> int:
                if file.tell() > 2 * x[:4].nbytes:
                    raise OSError(errno.ENOSPC, "no space left on device")
                return int(file.write(data))

        return Full()

    monkeypatch.setattr("nad_attr.concepts.dissection.scratch.tempfile.TemporaryFile", small_disk)
    model = Counting()
    assert units(model) == expected
    assert 1 + 20 < model.n < 1 + 40  # batches that were written down did not run again


class Stream(torch.utils.data.Dataset[Any]):
    """Any number of images, made when asked for."""

    concepts = CONCEPTS

    def __init__(self, n: int, fail_at: int | None = None) -> None:
        self.n, self.fail_at = n, fail_at

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if i == self.fail_at:
            raise OSError("the disk is gone")
        return images(1, seed=i)[0], labels(2, seed=i)[1]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images() -> None:
    model = build(TinyCNN)
    sizes = []
    for n in (8, 32):
        run = _Dissection(
            model, Stream(n), 0.05, None, False, ignore_index=-1, unlabelled="ignore", n_bins=64,
            n_top=4, n_images=None, seed=0, n_workers=0,
            runner=Runner(model, RunOptions(batch_size=4)),
        )  # fmt: skip
        run.begin(["relu1", "relu2"])
        with torch.no_grad(), _held() as largest:
            bar: Any = _Bar()
            run.find_thresholds(None, None, bar)
            run.count_overlaps(None, None, bar)
        arrays, _ = run.state()
        sizes.append((run.n_bytes, sum(np.asarray(a).nbytes for a in arrays.values()), largest[0]))
    assert sizes[0][:2] == sizes[1][:2]
    assert sizes[1][2] <= 1.5 * sizes[0][2]  # tensors alive at any one time


class _Bar:
    def update(self, n: int) -> None:
        """No bar."""


class _held:
    """The most bytes of tensors that Python holds at the end of a batch."""

    def __enter__(self) -> list[int]:
        import gc

        self.largest = [0]
        self.original = Runner.__call__

        def call(runner: Runner, inputs: Any) -> Tensor:
            out = self.original(runner, inputs)
            alive = [o for o in gc.get_objects() if type(o) is Tensor]
            n = sum(t.numel() * t.element_size() for t in alive)
            self.largest[0] = max(self.largest[0], n)
            return out

        Runner.__call__ = call  # type: ignore[method-assign]
        return self.largest

    def __exit__(self, *error: object) -> None:
        Runner.__call__ = self.original  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("phase", [1, 2])
def test_an_interrupted_dissection_goes_on(tmp_path: Path, exact: bool, phase: int) -> None:
    model, path = build(TinyCNN), tmp_path / "state.h5"
    how: dict[str, Any] = {"run": RunOptions(batch_size=2), "scratch_bytes": 0, "exact": exact}
    whole = dissect(model, ["relu1"], Stream(10), quantile=0.1, **how)
    calls = 0
    original = Stream.__getitem__

    def failing(self: Stream, i: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == (16, 29)[phase - 1]:  # 13 are for the first look and what is compared
            raise OSError("the disk is gone")
        return original(self, i)

    Stream.__getitem__ = failing  # type: ignore[method-assign]
    try:
        with assert_model_untouched(model), pytest.raises(OSError, match="disk is gone"):
            dissect(
                model,
                ["relu1"],
                Stream(10),
                quantile=0.1,
                checkpoint=path,
                checkpoint_every=2,
                **how,
            )
    finally:
        Stream.__getitem__ = original  # type: ignore[method-assign]
    done = read_result(path, "checkpoint")[1]["progress"]["done"] if path.exists() else [0, 0]
    assert done[phase - 1] > 0 or phase == 1
    with pytest.raises(GateStoreError, match="quantile differ"):
        dissect(
            model, ["relu1"], Stream(10), quantile=0.2, checkpoint=path, **how
        ) if path.exists() else (_raise())
    again = dissect(
        model, ["relu1"], Stream(10), quantile=0.1, checkpoint=path, checkpoint_every=2, **how
    )
    assert again == whole
    assert not path.exists()


def _raise() -> None:
    raise GateStoreError("quantile differ")


def test_a_checkpoint_is_a_file_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    write_result(path, "evaluation/heldout", {"auc": [0.5]})
    with pytest.raises(GateStoreError, match="not a checkpoint"):
        dissect(build(TinyCNN), ["relu1"], Stream(3), checkpoint=path)
    assert result_names(path) == ["evaluation/heldout"]


def test_some_images_are_a_seeded_draw() -> None:
    model = build(TinyCNN)
    a, b, c = (
        dissect(model, ["relu1"], Stream(30), quantile=0.1, n_images=5, n_top=5, seed=s)
        for s in (1, 1, 2)
    )
    assert a == b
    assert set(a.top_images["relu1"][0]) != set(c.top_images["relu1"][0])
    assert a.info["n_images"] == 5


# -- sites, labels, top images ---------------------------------------------------------------------


def test_of_a_loader_only_what_it_has_chosen_is_used() -> None:
    """Its sampler, workers and collate function; the images left out are not even touched."""
    x, maps = images(6), torch.arange(6)[:, None, None].expand(6, 8, 8) % 2
    touched: list[int] = []

    class Dicts(torch.utils.data.Dataset[Any]):
        concepts = ("a", "b")

        def __len__(self) -> int:
            return 6

        def __getitem__(self, number: int) -> Any:
            touched.append(number)
            return {"image": x[number], "mask": maps[number]}

    def collate(items: list[Any]) -> Any:
        return torch.stack([i["image"] for i in items]), torch.stack([i["mask"] for i in items])

    net = build(TinyCNN)
    sites = find_gate_sites(net, x[:1])
    chosen = [4, 1, 2]
    loader = torch.utils.data.DataLoader(
        Dicts(), sampler=torch.utils.data.SubsetRandomSampler(chosen), collate_fn=collate
    )
    found = dissect(net, sites, loader, quantile=0.1, exact=True, n_top=2)
    assert sorted(set(touched)) == [1, 2, 4]
    expected = dissect(
        net, sites, (x[[1, 2, 4]], maps[[1, 2, 4]]), quantile=0.1, concepts=["a", "b"], exact=True
    )
    for site in sites:
        np.testing.assert_array_equal(found.iou[site.name], expected.iou[site.name])
    assert {n for (n, _, _) in unit_masks(net, found, sites[0], 0, loader)} <= {1, 2, 4}


@pytest.mark.slow
def test_a_loaders_workers_dissect() -> None:
    x, maps = images(4), torch.zeros(4, 8, 8, dtype=torch.long)

    class Where(torch.utils.data.TensorDataset):
        def __getitem__(self, number: int) -> Any:
            assert torch.utils.data.get_worker_info() is not None
            return super().__getitem__(number)

    loader = torch.utils.data.DataLoader(
        Where(x, maps), num_workers=1, multiprocessing_context="fork"
    )
    net = build(TinyCNN)
    found = dissect(
        net, find_gate_sites(net, x[:1]), loader, quantile=0.1, concepts=["a"], exact=True
    )
    assert found.n_units("relu1") == 6


@pytest.mark.slow
def test_tokens_are_a_square_of_positions() -> None:
    model, x, maps = build(TinyViT), images(), labels()
    units = dissect(model, ["blocks.0"], (x, maps), quantile=0.1, concepts=CONCEPTS, exact=True)
    held = activations_of(model, find_gate_sites(model, x[:1], layers="blocks.0"), x)["blocks.0"]
    square = held.transpose(1, 2).reshape(12, 8, 2, 2)
    expected = brute_force(square, torch.tensor(units.thresholds["blocks.0"]), maps)
    assert np.array_equal(units.iou["blocks.0"], expected.float().numpy())


def test_labels_of_the_whole_image_and_of_different_sizes() -> None:
    model, x = build(TinyCNN), images(4)
    whole = [(image, i % 2) for i, image in enumerate(x)]
    units = dissect(model, ["relu1"], whole, quantile=0.1, concepts=["a", "b"], exact=True)
    full = [(image, torch.full((8, 8), i % 2)) for i, image in enumerate(x)]
    same = dissect(model, ["relu1"], full, quantile=0.1, concepts=["a", "b"], exact=True)
    assert np.array_equal(units.iou["relu1"], same.iou["relu1"])
    mixed = [(image, torch.full((8 + 8 * (i > 1),) * 2, i % 2)) for i, image in enumerate(x)]
    assert np.isfinite(
        dissect(model, ["relu1"], mixed, quantile=0.1, concepts=["a", "b"]).iou["relu1"]
    ).all()


def test_a_concept_that_no_image_shows_is_unknown() -> None:
    units = dissect(
        build(TinyCNN),
        ["relu1"],
        (images(), labels()),
        quantile=0.1,
        concepts=[*CONCEPTS, "unseen"],
    )
    assert np.isnan(units.iou["relu1"][:, 4]).all()
    assert (units.best("relu1")[0] < 4).all()


def test_top_images_are_those_with_the_highest_activations() -> None:
    model, x = build(TinyCNN), images(9)
    units = dissect(model, ["relu2"], (x, labels(9)), quantile=0.05, concepts=CONCEPTS, n_top=3)
    highest = activations_of(model, [GateSite("relu2", 8)], x)["relu2"].amax((2, 3))
    for unit in range(8):
        expected = sorted(range(9), key=lambda i: (-float(highest[i, unit]), i))[:3]
        assert units.top_images["relu2"][unit].tolist() == expected
    with assert_model_untouched(model, x):
        found = unit_masks(model, units, "relu2", 1, (x, labels(9)), n=2)
    up = F.interpolate(
        activations_of(model, [GateSite("relu2", 8)], x)["relu2"][:, 1:2], (8, 8), mode="bilinear"
    )
    for number, image, mask in found:
        assert torch.equal(image, x[number])
        assert torch.equal(mask, up[number, 0] > units.thresholds["relu2"][1])
    pytest.importorskip("matplotlib")
    assert len(draw_unit(model, units, "relu2", 1, (x, labels(9)), n=2).axes) == 2


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"quantile": 0}, "quantile"),
        ({"quantile": 1.0}, "quantile"),
        ({"unlabelled": "leave"}, "unlabelled"),
        ({"n_bins": 2}, "n_bins"),
        ({"n_top": -1}, "n_top"),
        ({"n_images": 99}, "n_images"),
        ({"scratch_bytes": -1}, "scratch_bytes"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"iou_threshold": 2}, "iou_threshold"),
        ({"concepts": ["a", "a"]}, "twice"),
        ({"concepts": ["a", "b"]}, "label of image 0 is"),
        ({"concepts": None}, "concepts"),
        ({"sites": []}, "sites is empty"),
        ({"sites": ["nowhere"]}, "nowhere"),
        ({"dataset": []}, "empty"),
        ({"dataset": (images(3), labels(2))}, "3 images came with 2"),
    ],
)
def test_bad_arguments_are_named(how: dict[str, Any], message: str) -> None:
    given = {"sites": ["relu1"], "dataset": (images(3), labels(3)), "concepts": CONCEPTS} | how
    model = build(TinyCNN)
    with assert_model_untouched(model), pytest.raises((TypeError, ValueError), match=message):
        dissect(model, given.pop("sites"), given.pop("dataset"), **given)


def test_bad_images_and_labels_are_named() -> None:
    model = build(TinyCNN)
    x, maps = images(3), labels(3)
    broken = x.clone()
    broken[1, 0, 0, 0] = float("nan")
    cases: list[tuple[Any, str]] = [
        ((broken, maps), "NaN"),
        ([(x[0], maps[0].float())], "expected integers"),
        ([(x[0], [maps[0, 0], maps[0, 0, :5]])], "differ in size"),
        ([x[0], x[1], x[2]], "not a pair"),
        ([(x[0].numpy(), maps[0])], "not a tensor"),
        ([(x[0], maps[0]), (x[0, :, :6], maps[0])], "shape"),
    ]
    for data, message in cases:
        with assert_model_untouched(model), pytest.raises((TypeError, ValueError), match=message):
            dissect(model, ["relu1"], data, concepts=CONCEPTS)


def test_a_site_without_positions_in_a_square_is_named() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Flatten()).eval()
    with pytest.raises(ValueError, match="not a square"):
        dissect(model, [GateSite("0", 4)], (torch.zeros(2, 3, 7), torch.zeros(2, 3, 7).long()),
                concepts=["a"])  # fmt: skip


# -- unit concepts and files -----------------------------------------------------------------------


@pytest.fixture
def units() -> UnitConcepts:
    iou = np.array([[0.5, 0.1, np.nan], [0.01, 0.03, 0.02], [np.nan] * 3, [0.2, 0.3, 0.3]])
    return UnitConcepts(
        {"a": iou, "b": iou[:2] / 10},
        [Concept("sky", "object"), Concept("red", "color"), Concept("road", "object")],
        source="test",
        quantile=0.005,
        thresholds={"a": range(4), "b": [0.5, 1.5]},
        top_images={"a": [[1, 2]] * 4, "b": [[3, -1]] * 2},
        info={"n_images": 4},
    )


def test_best_detectors_and_unique_detectors(units: UnitConcepts) -> None:
    index, iou = units.best("a")
    assert index.tolist() == [0, 1, -1, 1]
    assert np.array_equal(iou, np.float32([0.5, 0.03, np.nan, 0.3]), equal_nan=True)
    assert units.best("a", "object")[0].tolist() == [0, 2, -1, 2]
    assert units.best("a", "scene")[0].tolist() == [-1] * 4
    assert units.detectors("a").tolist() == [True, False, False, True]
    assert units.unique_detectors("a") == units.unique_detectors() == {"colour": 1, "object": 1}
    assert units.unique_detectors("b") == {"object": 1}
    assert units.categories == ("colour", "object")
    assert units.select(["b"], ["red"]).iou["b"].shape == (2, 1)
    assert "a" in units.summary()


def test_frame_is_tidy(units: UnitConcepts) -> None:
    pytest.importorskip("pandas")
    frame = units.frame()
    assert list(frame) == ["site", "depth", "unit", "concept", "category", "iou", "detector"]
    assert len(frame) == 6
    assert frame.concept.tolist()[:2] == ["sky", "red"]
    assert frame.concept.isna().tolist() == [False] * 2 + [True] + [False] * 3
    assert frame.depth.tolist() == [0] * 4 + [1] * 2
    assert len(units.frame(all_concepts=True)) == 8 + 5


@pytest.mark.slow
def test_files_keep_everything(units: UnitConcepts, tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    sites = [GateSite("first", 2), GateSite("a", 4), GateSite("b", 2)]
    gates = TaskGates({s.name: torch.full((1, s.n_channels), 0.9) for s in sites}, sites, [7])
    gates.save(path)
    units.save(path)
    units.save(path, "again")
    assert UnitConcepts.load(path, "dissection") == units
    assert TaskGates.load(path) == gates
    with GateStore.open(path) as store:
        assert set(store.unit_names) == {"dissection", "again"}
        arrays, _ = store.result("units/dissection")
        # The number of a site is that of the store.
        assert {name for name in arrays if name.startswith("iou")} == {"iou.1", "iou.2"}
        store.slice([7], tmp_path / "part.h5")
    assert UnitConcepts.load(tmp_path / "part.h5", "again") == units
    with pytest.raises(GateStoreError, match="say which"):
        UnitConcepts.load(path)
    with pytest.raises(GateStoreError, match="do not belong"):
        UnitConcepts({"other": [[0.1]]}, [Concept("x")], source="").save(path)
    with pytest.raises(GateStoreError, match="not one row"):
        UnitConcepts({"a": [[0.1]]}, [Concept("x")], source="").save(path)
    units.save(tmp_path / "alone.h5")
    assert UnitConcepts.load(tmp_path / "alone.h5") == units


@pytest.mark.slow
def test_files_with_nonsense_are_refused(units: UnitConcepts, tmp_path: Path) -> None:
    path = tmp_path / "units.h5"
    units.save(path)
    arrays, about = read_result(path, "units/dissection")
    broken: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (arrays, {**about, "format": 9}),
        (arrays, {**about, "what": "evaluation"}),
        (arrays, {**about, "sites": [["a", 5]]}),
        (arrays, {**about, "about": {}}),
        ({**arrays, "iou.0": np.full((4, 3), 7.0)}, about),
        ({**arrays, "iou.0": np.zeros((4, 9))}, about),
        ({**arrays, "concept": ["", "x", "y"]}, about),
        ({**arrays, "threshold.0": np.zeros(3)}, about),
    ]
    for values, attributes in broken:
        write_result(path, "units/dissection", values, attributes)
        with pytest.raises(GateStoreError):
            UnitConcepts.load(path)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"iou": {}}, "at least one"),
        ({"iou": {"a": [[2.0]]}}, "outside"),
        ({"iou": {"a": [[0.1, 0.2]]}}, "shape"),
        ({"concepts": []}, "at least one"),
        ({"concepts": [Concept("x"), Concept("x")]}, "twice"),
        ({"quantile": 3}, "quantile"),
        ({"thresholds": {"b": [1.0]}}, "thresholds"),
        ({"top_images": {"a": [1]}}, "top_images"),
    ],
)
def test_unit_concepts_that_make_no_sense(how: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"iou": {"a": [[0.1]]}, "concepts": [Concept("x")], "source": ""} | how
    with pytest.raises((TypeError, ValueError), match=message):
        UnitConcepts(given.pop("iou"), given.pop("concepts"), **given)
