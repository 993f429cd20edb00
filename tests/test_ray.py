"""Runs on a Ray cluster of this machine: the same gates as in this process, also after crashes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from nad_attr import ChannelCertainty, Recipe, TaskGates, certainty, learn_gates
from nad_attr.concepts import dissect
from nad_attr.evaluation import evaluate, planted
from nad_attr.learning.ray_executor import RayExecutor, WorkersLostError
from nad_attr.learning.runs import Progress, learn_to_store
from tests import killable
from tests.helpers import assert_model_untouched

pytestmark = pytest.mark.slow
# Ray's workers give way to all other programs otherwise, and seem to hang on a busy machine.
os.environ.setdefault("RAY_worker_niceness", "0")
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is missing")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Two CPUs of this machine, shared by the tests: starting takes seconds."""
    ray = pytest.importorskip("ray")
    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 * 2**20,
    )
    try:
        yield ray
    finally:
        ray.shutdown()
        if before is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        else:
            os.environ["RAY_USAGE_STATS_ENABLED"] = before


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> TaskGates:
    """The gates of an undisturbed run in this process."""
    path = tmp_path_factory.mktemp("whole") / "gates.h5"
    learn_to_store(killable.network(), killable.data(), path, **killable.SETTINGS)
    return TaskGates.load(path)


@needs_ray
def test_tensors_are_not_copied_to_be_packed() -> None:
    """Pickle would hold the images two or three times; they go to Ray's store as they are."""
    import ray

    from nad_attr.learning.ray_executor import _packed, _unpacked

    images = torch.rand(50, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    weight = torch.nn.Parameter(torch.rand(4, 4, dtype=torch.float64))
    half, nothing = torch.rand(9).bfloat16(), torch.zeros(0)
    given = {
        "images": images,
        "some": images[3:5],
        "tied": [weight, weight],
        "half": half,
        "nothing": nothing,
        "rest": "text",
    }
    means = {"a": torch.arange(3.0)}
    packed, storages = _packed(ray, (given, means))
    assert len(packed) < 5000 < images.numel() * 4
    n_bytes = sum(4 * x.numel() for x in (images, means["a"])) + 8 * 16 + 2 * 9
    assert sum(storage.nbytes for storage in storages) == n_bytes
    assert storages[0].__array_interface__["data"][0] == images.untyped_storage().data_ptr()
    for storage in storages:
        storage.flags.writeable = False  # as Ray hands them out
    found, found_means = _unpacked(packed, storages)
    assert torch.equal(found["images"], images)
    assert found["images"].stride() == images.stride()
    assert torch.equal(found["some"], images[3:5])
    assert found["some"].untyped_storage().data_ptr() == found["images"].data_ptr()
    assert found["images"].data_ptr() != images.data_ptr()
    found["images"].zero_()
    assert images.abs().sum() > 0 == found["some"].abs().sum()
    assert found["tied"][0] is found["tied"][1]
    assert isinstance(found["tied"][0], torch.nn.Parameter)
    assert torch.equal(found["tied"][0], weight)
    assert torch.equal(found["half"], half)
    assert (found["nothing"].shape, found["rest"]) == ((0,), "text")
    assert torch.equal(found_means["a"], means["a"])


def assert_same_bits(one: TaskGates, other: TaskGates) -> None:
    """The same tasks, in whatever order, with gates, logits and means equal bit by bit."""
    assert set(one.tasks) == set(other.tasks)
    other = other.select(one.tasks)
    assert one.logits is not None
    assert other.logits is not None
    for name in one:
        assert one[name].numpy().tobytes() == other[name].numpy().tobytes()
        assert one.logits[name].numpy().tobytes() == other.logits[name].numpy().tobytes()
        assert one.means is not None
        assert other.means is not None
        assert one.means[name].numpy().tobytes() == other.means[name].numpy().tobytes()


class Deadly(Dataset[tuple[Tensor, int]]):
    """Images; one that has a mark in a folder kills the worker that reads it, once for each."""

    def __init__(self, marks: Path) -> None:
        self.x, self.y = killable.data()
        self.targets = self.y.tolist()
        self.marks = marks
        self.driver = os.getpid()

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if os.getpid() != self.driver:
            for mark in sorted(self.marks.glob(f"{i}-*")):
                mark.unlink()
                if mark.suffix == ".error":
                    raise OSError("the disk is gone")
                os.kill(os.getpid(), signal.SIGKILL)
        return self.x[i], self.targets[i]


# -- without ray -----------------------------------------------------------------------------------


def test_ray_is_not_imported_until_it_is_used_and_missed_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # what imports it fails
    model, data = killable.network(), killable.data()
    with pytest.raises(ImportError, match=r"pip install 'nad-attr\[ray\]'"):
        learn_to_store(model, data, tmp_path / "a.h5", executor=RayExecutor("local"))
    learn_to_store(model, data, tmp_path / "b.h5", **killable.SETTINGS)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"address": ""}, TypeError, "address"),
        ({"address": None}, TypeError, "address"),
        ({"n_workers": 0}, ValueError, "n_workers"),
        ({"n_workers": True}, ValueError, "n_workers"),
        ({"gpus_per_worker": 2}, ValueError, "one GPU or a share"),
        ({"gpus_per_worker": -0.5}, ValueError, "gpus_per_worker"),
        ({"cpus_per_worker": 0}, ValueError, "cpus_per_worker"),
        ({"retries": -1}, ValueError, "retries"),
    ],
)
def test_options_are_checked(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        RayExecutor(**options)


@needs_ray
def test_a_gpu_has_to_be_asked_for() -> None:
    with pytest.raises(ValueError, match="gpus_per_worker"):
        RayExecutor("local").session_device("cuda")
    assert RayExecutor("local", gpus_per_worker=0.5).session_device(None) == "cpu"


# -- with ray --------------------------------------------------------------------------------------


@needs_ray
def test_local_cluster_is_started_and_ended_and_one_worker_gives_the_same_bits(
    uninterrupted: TaskGates, tmp_path: Path
) -> None:
    import ray

    model, data = killable.network(), killable.data()
    path = tmp_path / "gates.h5"
    # There is none that this machine belongs to; the store is begun all the same.
    with pytest.raises(ConnectionError, match="ray start --head"):
        learn_to_store(model, data, path, executor=RayExecutor(), **killable.SETTINGS)
    before = dict(os.environ)
    with assert_model_untouched(model, *data):
        executor = RayExecutor("local", n_workers=1)
        learn_to_store(model, data, path, resume=True, executor=executor, **killable.SETTINGS)
    assert not ray.is_initialized()
    assert dict(os.environ) == before
    assert_same_bits(uninterrupted, TaskGates.load(path))


@needs_ray
def test_two_workers_give_the_same_bits(
    cluster: Any, uninterrupted: TaskGates, tmp_path: Path
) -> None:
    told: list[Progress] = []
    path = learn_to_store(
        killable.network(),
        killable.data(),
        tmp_path / "gates.h5",
        executor=RayExecutor(n_workers=2),
        on_progress=told.append,
        **killable.SETTINGS,
    )
    assert_same_bits(uninterrupted, TaskGates.load(path))
    assert (told[-1].done, told[-1].total, told[-1].lost) == (20, 20, 0)
    assert told[-1].steps == told[-1].n_steps == 20 * killable.RECIPE.steps
    assert cluster.is_initialized()  # the run did not start it


@needs_ray
def test_killed_workers_do_not_change_a_bit(
    cluster: Any, uninterrupted: TaskGates, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    # Images of the own classes of tasks of the first, middle and last chunk; one kills twice. Each
    # worker that takes a killed one's place imports torch: seconds, so that four are enough.
    for n, image in enumerate((0, 29, 58, 58)):
        (marks / f"{image}-{n}").touch()
    executor = RayExecutor(n_workers=2, retries=10)
    path = tmp_path / "gates.h5"
    data = Deadly(marks)
    # The tensors' fingerprint and choice of images, so that the gates have to be the same.
    learn_to_store(
        killable.network(), data, path, executor=executor, augmented=False, **killable.SETTINGS
    )
    assert executor.lost == 4
    assert not list(marks.iterdir())
    assert_same_bits(uninterrupted, TaskGates.load(path))


@needs_ray
def test_what_is_done_is_saved_when_a_chunk_fails_for_good(
    cluster: Any, uninterrupted: TaskGates, tmp_path: Path
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    path = tmp_path / "gates.h5"
    model, data = killable.network(), Deadly(marks)

    def run(retries: int = 5, **options: Any) -> None:
        settings = {**killable.SETTINGS, "augmented": False, "resume": True, **options}
        executor = RayExecutor(n_workers=1, retries=retries)
        learn_to_store(model, data, path, executor=executor, **settings)

    with pytest.raises(WorkersLostError, match=r"lost its worker 1 times.*resume"):
        for image in range(60):
            (marks / f"{image}-0").touch()
        run(retries=0)
    for mark in marks.iterdir():
        mark.unlink()

    def break_disk(progress: Progress) -> None:
        if progress.done == 6:
            for image in range(60):
                (marks / f"{image}-0.error").touch()

    with pytest.raises(OSError, match="the disk is gone"):
        run(on_progress=break_disk)
    saved = TaskGates.load(path)
    assert saved.tasks == (0, 1, 2, 3, 4, 5)
    for mark in marks.iterdir():
        mark.unlink()
    run()
    assert_same_bits(uninterrupted, TaskGates.load(path))


# -- evaluation, dissection and certainty ----------------------------------------------------------


class DeadlyTensors(Deadly):
    """Given images."""

    def __init__(self, x: Tensor, y: Tensor, marks: Path) -> None:
        super().__init__(marks)
        self.x, self.y, self.targets = x, y, y.tolist()


class DeadlyImages(Dataset[tuple[Tensor, Tensor]]):
    """Images of a folder of marks, see :class:`Deadly`, with label maps for a dissection."""

    concepts = ("one", "two")

    def __init__(self, marks: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.rand(12, 3, 8, 8, generator=generator)
        self.maps = torch.randint(0, 2, (12, 8, 8), generator=generator)
        self.marks, self.driver = marks, os.getpid()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        if os.getpid() != self.driver:
            for mark in sorted(self.marks.glob(f"{i}-*")):
                mark.unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        return self.images[i], self.maps[i]


def same_fields(one: Any, other: Any) -> None:
    """All arrays of two results, equal bit by bit."""
    fields = one._fields()
    assert fields.keys() == other._fields().keys()
    for name, value in fields.items():
        if isinstance(value, np.ndarray):
            assert value.tobytes() == other._fields()[name].tobytes(), name


@needs_ray
def test_evaluation_is_the_same_for_any_number_of_workers(
    cluster: Any, uninterrupted: TaskGates, tmp_path: Path
) -> None:
    model, marks = killable.network(), tmp_path / "marks"
    marks.mkdir()
    data = Deadly(marks)
    here = evaluate(model, uninterrupted, data, n_random=1)
    with assert_model_untouched(model):
        one = evaluate(model, uninterrupted, data, n_random=1, executor=RayExecutor(n_workers=1))
    (marks / "13-0").touch()
    executor = RayExecutor(n_workers=2, retries=10)
    two = evaluate(model, uninterrupted, data, n_random=1, executor=executor)
    assert executor.lost == 1
    same_fields(one, two)
    same_fields(one.random[0], two.random[0])
    same_fields(one.whole, two.whole)
    assert one.frame().equals(two.frame())
    np.testing.assert_allclose(one.table, here.table, rtol=1e-5)
    np.testing.assert_allclose(one.fidelity, here.fidelity, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(one.dead_fraction, here.dead_fraction)


@needs_ray
def test_dissection_is_the_same_for_any_number_of_workers(cluster: Any, tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()]
        for _ in range(5):  # six sites: two parts
            layers += [nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 2)).eval()
    marks = tmp_path / "marks"
    marks.mkdir()
    data = DeadlyImages(marks)
    here = dissect(model, None, data, quantile=0.2)
    one = dissect(model, None, data, quantile=0.2, executor=RayExecutor(n_workers=1))
    (marks / "7-0").touch()
    executor = RayExecutor(n_workers=2, retries=10)
    two = dissect(model, None, data, quantile=0.2, executor=executor)
    assert executor.lost == 1
    assert one.sites == two.sites == here.sites
    for site in one.sites:
        for found in (two, here):
            assert one.iou[site].tobytes() == found.iou[site].tobytes()
            assert one.thresholds[site].tobytes() == found.thresholds[site].tobytes()
            assert one.top_images[site].tobytes() == found.top_images[site].tobytes()
    assert one.info == two.info
    assert one.info.keys() == here.info.keys()
    with pytest.raises(ValueError, match="checkpoint"):
        dissect(model, None, data, checkpoint=tmp_path / "a", executor=executor)


@needs_ray
def test_certainty_is_the_same_for_any_number_of_workers(cluster: Any, tmp_path: Path) -> None:
    known = planted("plain", n_classes=2, width=24, n_images=40)
    recipe = Recipe(size=0.3, steps=4, ablation="mean")
    gates = learn_gates(known.model, known.data, recipe=recipe)
    marks = tmp_path / "marks"
    marks.mkdir()
    given: dict[str, Any] = {"pairs": 1, "images": 8, "alternatives": 1}
    data = DeadlyTensors(*known.data, marks)

    def found(n_workers: int) -> tuple[ChannelCertainty, int]:
        executor = RayExecutor(n_workers=n_workers, retries=10)
        run = (known.model, gates, data, known.held_out)
        return certainty(*run, augmented=False, executor=executor, **given), executor.lost

    one, lost = found(1)
    assert lost == 0
    (marks / "1-0").touch()
    two, lost = found(2)
    assert lost == 1
    assert one.tasks == two.tasks == gates.tasks
    assert one.groups == two.groups
    assert one.passes == two.passes
    same_fields(one, two)
    here = certainty(known.model, gates, known.data, known.held_out, **given)
    assert (here.chosen == one.chosen).mean() > 0.9
    np.testing.assert_allclose(one.fidelity, here.fidelity, rtol=1e-4)
