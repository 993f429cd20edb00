"""The store of a run: appending, crashes, locks, readers, merging, slicing, comparing."""

from __future__ import annotations

import builtins
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import nn

from nad_attr.data.fingerprints import data_fingerprint, environment, model_hash
from nad_attr.gates.history import History
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store import (
    GateStore,
    GateStoreError,
    _gate_store,
    _journal,
    diff,
    merge,
    read_result,
    result_names,
    write_result,
)
from tests import helpers
from tests.stores import assert_same, make_gates

SITES = [GateSite("conv", 5), GateSite("blocks.0", 3, -1)]
RECIPE = Recipe(size=0.4, steps=3)
MEANS = {"conv": torch.arange(5.0), "blocks.0": torch.ones(3)}


def some_gates(tasks: list[Any], **changes: Any) -> TaskGates:
    """Gates that depend on the task only."""
    logits = {}
    for site in SITES:
        rows = [
            torch.randn(
                site.n_channels, generator=torch.Generator().manual_seed(hash(task) % 2**31)
            )
            for task in tasks
        ]
        logits[site.name] = torch.stack(rows)
    loss = np.array([[float(hash(task) % 97) + step for task in tasks] for step in range(3)])
    options = {
        "logits": logits,
        "means": MEANS,
        "recipe": RECIPE,
        "history": History({"loss": loss}),
        "task_names": [f"class {task}" for task in tasks],
        **changes,
    }
    # Row by row: a sigmoid's rounding depends on the place of a number in its tensor.
    own = {name: torch.stack([row.sigmoid() for row in value]) for name, value in logits.items()}
    gates = options.pop("gates", own)
    return TaskGates(gates, SITES, tasks, **options)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a store may be."""
    return tmp_path / "gates.h5"


@contextmanager
def begun(path: Path, tasks: list[Any], **options: Any) -> Iterator[GateStore]:
    """A store open for writing with these tasks, appended one by one."""
    with GateStore.create(path, SITES, recipe=RECIPE, means=MEANS, **options) as store:
        for task in tasks:
            store.append(some_gates([task]))
        yield store


@contextmanager
def forked(function: Any, *arguments: Any) -> Iterator[int]:
    """A forked process that runs a function; ended at the end of the block."""
    pid = os.fork()
    if pid == 0:
        try:
            function(*arguments)
        finally:
            os._exit(0)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")


# ---------------------------------------------------------------------------------------------
# Appending and reading
# ---------------------------------------------------------------------------------------------


def test_what_was_appended_comes_back(path: Path) -> None:
    tasks = [4, (1, 2), 0, 9]
    with begun(path, tasks) as store:
        assert store.tasks == (4, (1, 2), 0, 9)
        assert len(store) == 4
        assert_same(store.read(), some_gates(tasks))
    assert os.listdir(path.parent) == ["gates.h5"]
    with GateStore.open(path) as store:
        assert store.sites == tuple(SITES)
        assert store.recipe == RECIPE
        assert all(torch.equal(store.means[name], mean) for name, mean in MEANS.items())
        assert store.task_names == ("class 4", "class (1, 2)", "class 0", "class 9")
        assert_same(store.read(), some_gates(tasks))
        assert_same(store.read([9, (2, 1)]), some_gates([9, (1, 2)]))
        assert_same(store.read(["class 0"]), some_gates([0]))
        assert 4 in store
        assert (2, 1) in store
        assert "class 9" in store
        assert 5 not in store
        assert "4" not in store
        assert 0.5 not in store
    assert_same(TaskGates.load(path), some_gates(tasks))


@pytest.mark.parametrize("parts", [[5], [1, 4], [2, 2, 1], [1, 1, 1, 1, 1]])
@pytest.mark.parametrize("flush", [False, True])
def test_parts_do_not_matter(path: Path, parts: list[int], flush: bool) -> None:
    gates, start = make_gates_of_five(), 0
    with GateStore.create(path, gates.sites) as store:
        for part in parts:
            store.append(gates.select(gates.tasks[start : start + part]))
            start += part
            assert_same(store.read(), gates.select(gates.tasks[:start]))
            if flush:
                store.flush()
                assert_same(store.read(), gates.select(gates.tasks[:start]))
    assert_same(TaskGates.load(path), gates)


def make_gates_of_five() -> TaskGates:
    """Five tasks with all optional content and histories of different lengths."""
    loss = np.arange(20, dtype=np.float32).reshape(4, 5)
    return some_gates([3, 1, 4, 0, 5], history=History({"loss": loss, "size": loss / 7}))


def test_histories_of_different_lengths_are_filled_with_nan(path: Path) -> None:
    with GateStore.create(path, SITES) as store:
        for task, steps in ((0, 2), (1, 4), (2, 3)):
            curve = np.full((steps, 1), task, np.float32)
            store.append(some_gates([task], history=History({f"q{task // 2}": curve})))
            if task == 1:
                store.flush()
    history = TaskGates.load(path).history
    nan = np.nan
    np.testing.assert_array_equal(
        history["q0"], [[0, 1, nan], [0, 1, nan], [nan, 1, nan], [nan, 1, nan]]
    )
    np.testing.assert_array_equal(
        history["q1"], [[nan, nan, 2], [nan, nan, 2], [nan, nan, 2], [nan, nan, nan]]
    )


def test_what_is_there_is_skipped(path: Path) -> None:
    with begun(path, [1, 2]) as store:
        other = some_gates([1, 2], gates={s.name: torch.ones(2, s.n_channels) for s in SITES})
        assert store.append(other) == ()
        assert store.append(some_gates([2, 3])) == (3,)
        assert_same(store.read(), some_gates([1, 2, 3]))
    assert_same(TaskGates.load(path), some_gates([1, 2, 3]))


def test_the_first_append_says_what_was_left_open(path: Path) -> None:
    with GateStore.create(path, SITES) as store:
        assert store.recipe is None
        assert store.means is None
        with pytest.raises(GateStoreError, match="holds no task"):
            store.read()
        store.append(some_gates([0], info={"seed": 1, "seconds": 2.5, "own": [0], "x": 1}))
        store.append(some_gates([1], info={"seed": 1, "seconds": 1.0, "own": [1], "x": 2}))
        assert store.recipe == RECIPE
    gates = TaskGates.load(path)
    assert gates.recipe == RECIPE
    assert torch.equal(gates.means["conv"], MEANS["conv"])
    assert gates.info == {"seed": 1, "seconds": 3.5, "own": [0, 1]}


def test_counts_and_times(path: Path) -> None:
    before = time.time()
    with GateStore.create(path, SITES, provenance={"model": "net", "seed": 7}) as store:
        store.append(some_gates([0, 1]), sample_counts={1: 130})
        assert store.sample_counts == {1: 130}
    with h5py.File(path) as file:
        assert file["task/n_sample"][:].tolist() == [-1, 130]
        assert (before <= file["task/finished"][:]).all()
        assert (file["task/finished"][:] <= time.time()).all()
    with GateStore.open(path) as store:
        assert store.provenance["seed"] == 7
        assert store.provenance["environment"] == environment()
        assert "2 tasks" in store.describe()
        assert "net" in store.describe()


def test_what_was_read_is_nobody_elses(path: Path) -> None:
    """Numbers read from a file are taken without a copy; changing them changes nothing else."""
    with begun(path, [0, 1]) as store:
        store.flush()
        store.append(some_gates([2]))
        for tasks in ([0], [0, 1], [2], [1, 2], None):
            gates, expected = store.read(tasks), some_gates([0, 1, 2] if tasks is None else tasks)
            assert_same(gates, expected)
            for values in (gates._gates, gates._logits, gates.means):
                for value in values.values():
                    value.zero_()
            assert_same(store.read(tasks), expected)
            # A site does not keep the memory of all other sites.
            size = 4 * len(expected) * SITES[0].n_channels
            assert store.read(tasks)._logits["conv"].untyped_storage().nbytes() == size
        assert all(torch.equal(store.means[name], mean) for name, mean in MEANS.items())


@pytest.mark.slow
def test_two_threads_read_one_store(path: Path) -> None:
    tasks = list(range(12))
    with begun(path, tasks) as store:
        store.flush()

    def read(start: int) -> bool:
        return all(
            store.read([task]) == some_gates([task]) for _ in range(10) for task in tasks[start::3]
        )

    with GateStore.open(path) as store, ThreadPoolExecutor(3) as pool:
        assert all(pool.map(read, range(3)))


def test_extreme_numbers_come_back(path: Path) -> None:
    logits = {
        "conv": torch.tensor([[1e30, -1e-45, 0.0, -0.0, torch.inf]]),
        "blocks.0": torch.ones(1, 3),
    }
    gates = some_gates([0], logits=logits)
    gates.save(path)
    found = TaskGates.load(path).logits["conv"]
    assert found.numpy().tobytes() == logits["conv"].numpy().tobytes()


@pytest.mark.slow
def test_a_large_store_is_written_now_and_then(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that do not read the journal see part of the finished tasks."""
    monkeypatch.setattr(_gate_store, "_JOURNAL_BYTES", 2000)
    seen = []
    with GateStore.create(path, SITES) as store:
        for task in range(60):
            store.append(some_gates([task]))
            with h5py.File(path) as file:
                seen.append(len(file["task/index"]))
            assert len(store) == task + 1
        assert_same(store.read(), some_gates(list(range(60))))
    assert seen == sorted(seen)
    assert len(set(seen)) <= 8  # not for each append
    assert seen[-1] >= 10
    assert_same(TaskGates.load(path), some_gates(list(range(60))))


# ---------------------------------------------------------------------------------------------
# Gates that do not fit the store
# ---------------------------------------------------------------------------------------------


def test_gates_that_do_not_belong_into_the_store(path: Path) -> None:
    with begun(path, [0, 1]) as store:
        for changes, words in (
            ({"recipe": Recipe(size=0.4, steps=4)}, "recipe .*steps is 3 in it, not 4"),
            ({"recipe": Recipe.paper(beta=1)}, "recipe"),
            ({"means": None}, "means"),
            ({"means": {**MEANS, "blocks.0": torch.zeros(3)}}, "means of 'blocks.0'"),
            ({"logits": None}, "logits"),
            ({"task_names": None}, "task names"),
        ):
            with pytest.raises(GateStoreError, match=words):
                store.append(some_gates([2], **changes))
        with pytest.raises(GateStoreError, match="named 'class 1' already"):
            store.append(some_gates([2], task_names=["class 1"]))
        with pytest.raises(GateStoreError, match=r"without blocks.0 and with head"):
            sites = [SITES[0], GateSite("head", 3)]
            values = {s.name: torch.ones(1, s.n_channels) for s in sites}
            store.append(TaskGates(values, sites, [2]))
        with pytest.raises(TypeError, match="TaskGates, got dict"):
            store.append({})
        assert store.tasks == (0, 1)
        store.append(some_gates([2], means={n: m * (1 + 1e-6) for n, m in MEANS.items()}))
    assert TaskGates.load(path).tasks == (0, 1, 2)


def test_going_on_with_something_else_is_refused(path: Path) -> None:
    facts = {"model_hash": "a" * 64, "data_fingerprint": "b" * 64, "seed": 3, "device": "cpu"}
    with begun(path, [0], provenance=facts):
        pass
    with GateStore.open(path) as store:
        store.check_resumable(sites=SITES, recipe=RECIPE, provenance=facts)
        store.check_resumable(provenance={**facts, "device": "cuda"})
        store.check_resumable(provenance={"model": "net"})
        for changes, words in (
            ({"sites": SITES[::-1]}, r"sites \(in another order\)"),
            ({"sites": SITES[:1]}, r"sites \(without blocks.0\)"),
            ({"sites": [SITES[0], GateSite("blocks.0", 4, -1)]}, r"n_channels=3.*n_channels=4"),
            ({"recipe": Recipe(size=0.5, steps=3)}, r"recipe \(size is 0.4 in it, not 0.5\)"),
            ({"provenance": {**facts, "model_hash": "c" * 64}}, r"model \(model_hash is aaaa"),
            ({"provenance": {**facts, "data_fingerprint": "c"}}, r"data \(data_fingerprint"),
            ({"provenance": {**facts, "seed": 4}}, r"seed \(seed is 3 in it, not 4\)"),
        ):
            with pytest.raises(GateStoreError, match=words):
                store.check_resumable(**changes)
        with pytest.raises(GateStoreError, match=r"sites .*; recipe .*; seed"):
            store.check_resumable(sites=SITES[:1], recipe=Recipe(size=0.5), provenance={"seed": 9})


def test_a_file_that_is_there_is_not_overwritten(path: Path) -> None:
    with begun(path, [0]):
        pass
    before = path.read_bytes()
    with pytest.raises(GateStoreError, match="there already"):
        GateStore.create(path, SITES)
    assert path.read_bytes() == before
    with GateStore.create(path, SITES, overwrite=True) as store:
        assert len(store) == 0
    with GateStore.open(path) as store:
        assert len(store) == 0
    with pytest.raises(GateStoreError, match="holds no task"):
        TaskGates.load(path)


def test_wrong_use(path: Path) -> None:
    with pytest.raises(ValueError, match="at least one gate site"):
        GateStore.create(path, [])
    with pytest.raises(TypeError, match="recipe"):
        GateStore.create(path, SITES, recipe={"size": 0.5})
    with pytest.raises(TypeError, match="JSON"):
        GateStore.create(path, SITES, provenance={"model": object()})
    with pytest.raises(GateStoreError, match="there is no file"):
        GateStore.open(path)
    with pytest.raises(GateStoreError, match="there is no file"):
        GateStore.open(path, "a")
    assert os.listdir(path.parent) == []
    with begun(path, [0]):
        pass
    with pytest.raises(ValueError, match="mode"):
        GateStore.open(path, "w")
    with GateStore.open(path) as store:
        with pytest.raises(GateStoreError, match="open for reading"):
            store.append(some_gates([1]))
        with pytest.raises(KeyError, match="no gates for task 8"):
            store.read([8])
        with pytest.raises(KeyError, match="no gates for task 'x'"):
            store.read(["x"])
        with pytest.raises(TypeError, match="list of tasks"):
            store.read(3)
        with pytest.raises(GateStoreError, match="asked for twice"):
            store.read([0, "class 0"])
    with pytest.raises(GateStoreError, match="is closed"):
        store.read()
    store.close()  # a second call does nothing


# ---------------------------------------------------------------------------------------------
# Crashes, locks, readers
# ---------------------------------------------------------------------------------------------


def _append_for_ever(path: Path, fold: int) -> None:
    _gate_store._JOURNAL_BYTES = fold
    with GateStore.open(path, "a") as store:
        for task in range(len(store), 10_000):
            store.append(some_gates([task]))


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("fold", [500, 2**20], ids=["written often", "in the journal"])
def test_killed_at_random_moments(path: Path, fold: int) -> None:
    GateStore.create(path, SITES, recipe=RECIPE, means=MEANS).close()
    dice = random.Random(fold)
    held = rounds = 0
    # A busy machine gets less done in a moment: then there are more of them, and longer ones.
    while rounds < 12 or (held <= 10 and rounds < 200):
        rounds += 1
        with forked(_append_for_ever, path, fold):
            time.sleep(dice.uniform(0.02, 0.12) * (1 + rounds // 12))
        with GateStore.open(path) as store:
            assert len(store) >= held
            held = len(store)
            if held:
                assert_same(store.read(), some_gates(list(range(held))))
    assert held > 10
    with GateStore.open(path, "a") as store:  # its lock is free
        store.append(some_gates([held]))
    assert os.listdir(path.parent) == ["gates.h5"]  # nothing is left of writers that died
    assert_same(TaskGates.load(path), some_gates(list(range(held + 1))))


@pytest.mark.slow
def test_a_journal_cut_off_at_any_byte(path: Path, tmp_path: Path) -> None:
    with begun(path, [0, 1]) as store:
        store.flush()
        begin = store._journal.n_bytes
        lengths = [begin]
        for task in (2, 3):
            store.append(some_gates([task]))
            lengths.append(store._journal.n_bytes)
        content = (path.read_bytes(), _journal.journal_path(path).read_bytes())
    copy = tmp_path / "copy.h5"
    journal = _journal.journal_path(copy)
    for length in range(0, len(content[1]) + 1, 7):
        copy.write_bytes(content[0])
        journal.write_bytes(content[1][:length])
        complete = sum(length >= end for end in lengths[1:])
        assert len(GateStore.open(copy)) == 2 + complete
    # A writer continues after the last complete record.
    copy.write_bytes(content[0])
    journal.write_bytes(content[1][: lengths[2] - 1])
    with GateStore.open(copy, "a") as store:
        assert store.tasks == (0, 1, 2)
        store.append(some_gates([5]))
        with GateStore.open(copy) as reader:
            assert_same(reader.read(), some_gates([0, 1, 2, 5]))
    assert_same(TaskGates.load(copy), some_gates([0, 1, 2, 5]))


def test_journals_of_another_revision_or_store_are_not_read(path: Path, tmp_path: Path) -> None:
    with begun(path, [0]) as store:
        old = _journal.journal_path(path).read_bytes()
        store.flush()
        _journal.journal_path(path).write_bytes(old)  # killed between the two
        assert GateStore.open(path).tasks == (0,)
    with begun(tmp_path / "other.h5", [5]) as store:
        _journal.journal_path(path).write_bytes(_journal.journal_path(store.path).read_bytes())
        with pytest.warns(RuntimeWarning, match="1 finished task of another store"):
            assert GateStore.open(path).tasks == (0,)
    with pytest.warns(RuntimeWarning, match="put aside"):
        store = GateStore.open(path, "a")
    with store:
        assert store.tasks == (0,)
    assert not _journal.journal_path(path).exists()


@pytest.mark.parametrize("where", ["write", "fsync"])
def test_a_failed_append_leaves_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    with begun(path, [0]) as store:
        original = getattr(os, where)

        def fail(*arguments: Any) -> int:
            if where == "write":
                original(arguments[0], bytes(arguments[1][:100]))
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, where, fail)
            with pytest.raises(OSError, match="No space left"):
                store.append(some_gates([1]))
        assert store.tasks == (0,)
        store.append(some_gates([2]))
        with GateStore.open(path) as reader:
            assert_same(reader.read(), some_gates([0, 2]))
    assert_same(TaskGates.load(path), some_gates([0, 2]))


def test_a_disk_that_is_full_at_the_end_loses_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = GateStore.create(path, SITES)
    store.append(some_gates([0]))

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="No space left"):
            store.close()
    assert_same(TaskGates.load(path), some_gates([0]))
    with GateStore.open(path, "a"):
        pass
    assert os.listdir(path.parent) == ["gates.h5"]
    assert_same(TaskGates.load(path), some_gates([0]))


def test_a_file_that_cannot_be_replaced_is_replaced_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise PermissionError(13, "The process cannot access the file")

    with begun(path, [0, 1]) as store:
        store.flush()
        store.append(some_gates([2]))
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", fail)
            with pytest.raises(PermissionError):
                store.flush()
        assert_same(store.read(), some_gates([0, 1, 2]))
        store.append(some_gates([3]))
        assert_same(GateStore.open(path).read(), some_gates([0, 1, 2, 3]))
    assert_same(TaskGates.load(path), some_gates([0, 1, 2, 3]))


def test_files_that_are_no_stores_are_left_alone(path: Path) -> None:
    for content in (b"", b"text", b"\x89HDF\r\n\x1a\n\x03" + bytes(200)):
        path.write_bytes(content)
        for mode in ("r", "a"):
            with pytest.raises(GateStoreError, match="not a readable store"):
                GateStore.open(path, mode)
        assert path.read_bytes() == content
        assert os.listdir(path.parent) == ["gates.h5"]
    write_result(path.with_name("results.h5"), "x", {"a": [1]})
    with pytest.raises(GateStoreError, match="holds 'results'"):
        GateStore.open(path.with_name("results.h5"), "a")
    assert sorted(os.listdir(path.parent)) == ["gates.h5", "results.h5"]


def test_a_journal_that_holds_nonsense(path: Path) -> None:
    """A file with right checksums and wrong content is refused."""
    good = _journal.Record({"kind": "append"}).packed()
    assert _journal.unpacked(_journal.MAGIC + good)[1] == len(_journal.MAGIC + good)
    for header, arrays in (
        ({"kind": "append"}, {}),
        ({"kind": "append", "tasks": ["x"], "names": None, "n_sample": [1]}, {}),
        ({"kind": "score", "method": "m", "tasks": [0]}, {"score/0": np.zeros((1, 9), "f4")}),
        ({"kind": "result"}, {}),
        ({"kind": "exec", "code": "1"}, {}),
        ({"kind": 3}, {}),
    ):
        store = GateStore.create(path, SITES, overwrite=True)
        store.append(some_gates([0]))
        store._journal.append(_journal.Record(header, arrays))
        store._journal.close(remove=False)
        for mode in ("r", "a"):
            with pytest.raises(GateStoreError):
                GateStore.open(path, mode)
    begin = _journal.journal_path(path).read_bytes()
    begin = begin[: begin.index(b"REC1", 30)]
    for shape, kind in (
        ([2**40], "<f4"),
        ([-1], "<f4"),
        ([1], "O"),
        ([1.5], "<f4"),
        (["a"], "<f4"),
    ):
        packed = json.dumps({"kind": "x", "arrays": [["gate/0", kind, shape]]}).encode()
        head = _journal._HEAD.pack(b"REC1", len(packed), 0, zlib.crc32(packed))
        _journal.journal_path(path).write_bytes(begin + head + packed)
        with pytest.raises(GateStoreError):
            GateStore.open(path)


def test_two_writers_are_refused(path: Path) -> None:
    with begun(path, [0]) as store:
        words = f"being written by process {os.getpid()} on "
        for attempt in (
            lambda: GateStore.open(path, "a"),
            lambda: GateStore.create(path, SITES, overwrite=True),
            lambda: some_gates([1]).save(path),
            lambda: write_result(path, "evaluation", {"x": [1]}),
        ):
            with pytest.raises(GateStoreError, match=words):
                attempt()
        store.append(some_gates([1]))
    with GateStore.open(path, "a") as store:
        assert store.tasks == (0, 1)


@needs_fork
def test_two_processes_that_write(path: Path) -> None:
    GateStore.create(path, SITES).close()
    with forked(_append_for_ever, path, 2**20) as pid:
        deadline = time.monotonic() + 200
        while not (_journal.journal_path(path).exists() and len(GateStore.open(path))):
            assert time.monotonic() < deadline
        with pytest.raises(GateStoreError, match=f"being written by process {pid} on "):
            GateStore.open(path, "a")
    GateStore.open(path, "a").close()  # the lock of a dead process does not count


@needs_fork
def test_a_forked_worker_neither_keeps_the_lock_nor_writes(path: Path) -> None:
    def linger(store: GateStore) -> None:
        try:
            store.append(some_gates([1]))
        except GateStoreError:
            time.sleep(60)

    store = GateStore.create(path, SITES)
    store.append(some_gates([0]))
    with forked(linger, store) as pid:
        time.sleep(0.1)
        assert os.waitpid(pid, os.WNOHANG)[0] == 0
        store.close()
        with GateStore.open(path, "a") as again:
            assert again.tasks == (0,)


@pytest.mark.slow
@needs_fork
@pytest.mark.parametrize("fold", [500, 2**20], ids=["written often", "in the journal"])
def test_readers_read_while_a_writer_writes(path: Path, fold: int) -> None:
    GateStore.create(path, SITES, recipe=RECIPE, means=MEANS).close()
    with forked(_append_for_ever, path, fold):
        held, n_seen = 0, 0
        deadline = time.monotonic() + 200
        with GateStore.open(path) as kept:
            until = time.monotonic() + 0.7
            while time.monotonic() < until or (n_seen < 5 and time.monotonic() < deadline):
                with GateStore.open(path) as store:
                    assert len(store) >= held  # never fewer than before
                    n_seen += len(store) > held
                    held = len(store)
                    if held:
                        last = list(range(max(0, held - 3), held))
                        assert_same(store.read(last), some_gates(last))
            assert len(kept) == 0  # an open store does not change
            kept.refresh()
            assert len(kept) >= held
            assert_same(kept.read(), some_gates(list(kept.tasks)))
        assert n_seen >= 5


@pytest.mark.slow
def test_a_reader_in_a_process_of_its_own(path: Path) -> None:
    """With h5py only, as the documentation shows."""
    code = (
        "import h5py, json, sys\n"
        "with h5py.File(sys.argv[1]) as file:\n"
        "    tasks = [json.loads(text) for text in file['task/index'].asstr()]\n"
        "    site = file['site/1']\n"
        "    print(tasks, site.attrs['name'].decode(), site['gate'][tasks.index(7)].tolist())\n"
    )
    with begun(path, [3, 7]) as store:
        store.flush()
        store.append(some_gates([8]))
        out = subprocess.run(
            [sys.executable, "-c", code, str(path)], check=True, capture_output=True, text=True
        ).stdout
    expected = some_gates([7])["blocks.0"][0].tolist()
    assert out.strip() == f"[3, 7] blocks.0 {expected}"


# ---------------------------------------------------------------------------------------------
# Scores and results
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flush", [False, True])
def test_scores_of_other_methods(path: Path, flush: bool) -> None:
    taylor = {s.name: torch.rand(2, s.n_channels) for s in SITES}
    later = {s.name: np.ones((1, s.n_channels)) for s in SITES}
    with begun(path, [0, 1, 2]) as store:
        store.write_scores("taylor", taylor, [2, 0], attributes={"images": 10})
        if flush:
            store.flush()
        store.append(some_gates([3]))
        store.write_scores("taylor", later, [3], attributes={"images": 20})
        store.write_scores("energy", {s.name: torch.zeros(4, s.n_channels) for s in SITES})
        for wrong, words in (
            (lambda: store.write_scores("a/b", taylor, [2, 0]), "without '/'"),
            (lambda: store.write_scores("x", taylor, [2]), "shape"),
            (lambda: store.write_scores("x", taylor, [2, 9]), "no gates for task 9"),
            (lambda: store.write_scores("x", {"conv": taylor["conv"]}, [2, 0]), "sites are"),
        ):
            with pytest.raises(GateStoreError, match=words):
                wrong()

    def check(store: GateStore) -> None:
        assert store.score_methods == ("energy", "taylor")
        assert store.score_attributes("taylor") == {"images": 20}
        found = store.scores("taylor")
        for site in SITES:
            table = found[site.name]
            assert torch.equal(table[[2, 0]], taylor[site.name])
            assert bool(table[1].isnan().all())
            assert bool((table[3] == 1).all())
        assert not store.scores("energy")["conv"][:4].any()
        with pytest.raises(GateStoreError, match=r"no scores of 'lrp'; there are energy, taylor"):
            store.scores("lrp")

    with GateStore.open(path) as store:
        check(store)
    with GateStore.open(path, "a") as store:
        store.append(some_gates([4]))
    with GateStore.open(path) as store:
        check(store)
        assert bool(store.scores("taylor")["conv"][4].isnan().all())
    with h5py.File(path) as file:
        assert file["score/taylor/0"].shape == file["site/0/gate"].shape == (5, 5)
        assert np.isnan(file["score/taylor/0"][1]).all()
        assert np.isnan(file["score/taylor/0"][4]).all()
        np.testing.assert_array_equal(file["score/taylor/1"][2], taylor["blocks.0"][0])


ARRAYS = {
    "auc": np.linspace(0, 1, 6).reshape(2, 3),
    "n": np.arange(4, dtype=np.int32),
    "whole": np.array(0.5),
    "none": np.zeros((0, 3), np.float32),
    "hit": np.array([[True, False]]),
    "random.0.auc": np.array([np.nan, np.inf]),
    "names": ["a", "große", ""],
    "nobody": [],
}
ATTRIBUTES = {"seed": 3, "nested": {"a": [1, None, "x"]}, "long": "y" * 100_000}


def assert_result(found: tuple[dict[str, Any], dict[str, Any]]) -> None:
    arrays, attributes = found
    assert set(arrays) == set(ARRAYS)
    for name, expected in ARRAYS.items():
        if isinstance(expected, list):
            assert arrays[name] == expected
        else:
            np.testing.assert_array_equal(arrays[name], expected)
            assert arrays[name].dtype == expected.dtype
            assert arrays[name].shape == expected.shape
    assert attributes == ATTRIBUTES


def test_results_in_a_file_of_their_own(path: Path) -> None:
    write_result(path, "evaluation/heldout", ARRAYS, ATTRIBUTES)
    assert os.listdir(path.parent) == ["gates.h5"]
    write_result(path, "evaluation", {"x": [1, 2]})
    write_result(path, "attribution", {"x": [3]}, {"np": np.float64(0.5)})
    write_result(path, "attribution", {"y": [4.5]}, {"np": np.float64(0.25)})
    assert result_names(path) == ["attribution", "evaluation", "evaluation/heldout"]
    assert_result(read_result(path, "evaluation/heldout"))
    arrays, attributes = read_result(path, "attribution")
    assert list(arrays) == ["y"]
    assert attributes == {"np": 0.25}
    assert list(read_result(path, "evaluation")[0]) == ["x"]
    with pytest.raises(GateStoreError, match=r"no result 'x'; there are 'attribution'"):
        read_result(path, "x")
    with pytest.raises(GateStoreError, match="holds 'results', not 'task_gates'"):
        TaskGates.load(path)


@pytest.mark.slow
def test_results_beside_gates(path: Path) -> None:
    with begun(path, [0, 1]) as store:
        store.write_result("evaluation/heldout", ARRAYS, ATTRIBUTES)
        assert_result(store.result("evaluation/heldout"))
        with GateStore.open(path) as reader:
            assert_result(reader.result("evaluation/heldout"))
    write_result(path, "evaluation/train", {"auc": [0.5]})
    write_result(path, "evaluation/train", {"auc": [0.75]})
    with GateStore.open(path, "a") as store:
        store.append(some_gates([2]))
    assert result_names(path) == ["evaluation/heldout", "evaluation/train"]
    assert_result(read_result(path, "evaluation/heldout"))
    assert read_result(path, "evaluation/train")[0]["auc"].tolist() == [0.75]
    assert_same(TaskGates.load(path), some_gates([0, 1, 2]))
    with h5py.File(path) as file:
        assert file["evaluation/heldout/auc"].shape == (2, 3)
        assert json.loads(file["evaluation/heldout"].attrs["attributes"])["seed"] == 3


def test_results_that_cannot_be_stored(path: Path) -> None:
    for group, arrays, words in (
        ("site/0", {}, "the store uses that name itself"),
        ("", {}, "without '/'"),
        ("a//b", {}, "without '/'"),
        ("../x", {}, "without '/'"),
        ("x", {"a/b": [1]}, "without '/'"),
        ("x", {"a": np.array([1j])}, "complex128"),
        ("x", {"a": [object()]}, "object"),
        ("x", {"a": ["zero \0 inside"]}, "zero"),
        ("x" + "/x" * 40, {}, "too deep"),
    ):
        with pytest.raises(GateStoreError, match=words):
            write_result(path, group, arrays)
    with pytest.raises(TypeError, match="JSON"):
        write_result(path, "x", {}, {"a": object()})
    assert os.listdir(path.parent) == []
    with begun(path, [0]) as store:
        with pytest.raises(GateStoreError, match="zero"):
            store.write_result("x", {"a": ["zero \0 inside"]})
        assert store.results == ()


def test_what_others_put_into_the_file_stays(path: Path) -> None:
    with begun(path, [0]):
        pass
    with h5py.File(path, "r+") as file:
        file["note/of/mine"] = np.arange(3)
        file["elsewhere"] = h5py.ExternalLink("/etc/hostname", "/x")
    with GateStore.open(path, "a") as store:
        store.append(some_gates([1]))
    with h5py.File(path) as file:
        assert file["note/of/mine"][:].tolist() == [0, 1, 2]
        assert "elsewhere" not in file


# ---------------------------------------------------------------------------------------------
# Merging, cutting, comparing, listing
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_slice_and_merge_give_the_whole_again(path: Path, tmp_path: Path) -> None:
    tasks = [5, 3, (0, 1), 8]
    with begun(path, tasks, provenance={"seed": 3}) as store:
        store.write_scores("taylor", {s.name: torch.rand(4, s.n_channels) for s in SITES})
        scores = store.scores("taylor")
        store.write_result("evaluation", {"x": [1]})
        store.slice([5, "class 3"], tmp_path / "a.h5")
        store.slice([(0, 1), 8, 3], tmp_path / "b.h5")
        with pytest.raises(KeyError, match="no gates for task 77"):
            store.slice([77], tmp_path / "c.h5")
    assert not (tmp_path / "c.h5").exists()
    merged = merge([tmp_path / "a.h5", tmp_path / "b.h5"], tmp_path / "merged.h5")
    assert_same(TaskGates.load(merged), some_gates(tasks))
    with GateStore.open(merged) as store:
        assert store.provenance["seed"] == 3
        assert all(torch.equal(store.scores("taylor")[n], v) for n, v in scores.items())
    found = diff(path, merged)
    assert not found.same
    assert found.equal == 4
    assert found.others == (f"only {path} holds the result 'evaluation'",)
    merge([path, tmp_path / "a.h5"], merged, overwrite=True)
    assert diff(path, merged).same


def test_stores_that_cannot_be_merged(path: Path, tmp_path: Path) -> None:
    with begun(path, [0], provenance={"seed": 3, "model_hash": "a"}):
        pass
    other = tmp_path / "other.h5"
    for options, words in (
        ({"recipe": Recipe(size=0.5, steps=3), "means": MEANS}, "recipe"),
        ({"recipe": RECIPE, "means": None}, "means"),
        ({"recipe": RECIPE, "means": MEANS, "provenance": {"seed": 4}}, "seed"),
        ({"recipe": RECIPE, "means": MEANS, "provenance": {"model_hash": "b"}}, "model"),
    ):
        GateStore.create(other, SITES, overwrite=True, **options).close()
        with pytest.raises(GateStoreError, match=words):
            merge([path, other], tmp_path / "merged.h5")
    with GateStore.create(other, SITES, recipe=RECIPE, means=MEANS, overwrite=True) as store:
        store.append(some_gates([1, 0], gates={s.name: torch.ones(2, s.n_channels) for s in SITES}))
    with pytest.raises(GateStoreError, match="different gates of task 0"):
        merge([path, other], tmp_path / "merged.h5")
    with pytest.raises(TypeError, match="list"):
        merge(path, tmp_path / "merged.h5")
    assert not (tmp_path / "merged.h5").exists()


def test_diff_says_what_differs(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    with begun(path, [0, 1, 2], provenance={"seed": 3}):
        pass
    gates = some_gates([1, 2, 3])
    changed = {name: gates[name] for name in gates}
    changed["conv"][0, 4] = 1 - changed["conv"][0, 4]
    with GateStore.create(
        other, SITES, recipe=Recipe(size=0.4, steps=9), means=MEANS, provenance={"seed": 3}
    ) as store:
        store.append(some_gates([1, 2, 3], gates=changed, recipe=None))
    found = diff(path, other)
    assert found.settings == ("recipe (steps is 3 in it, not 9)",)
    assert found.only_first == (0,)
    assert found.only_second == (3,)
    assert found.equal == 1
    assert list(found.changed) == [1]
    assert found.changed[1][0] == 1
    assert found.changed[1][1] == pytest.approx(abs(2 * float(gates["conv"][0, 4]) - 1), abs=1e-6)
    assert not found.same
    assert "task 1: 1 channels differ" in str(found)
    assert diff(path, path).same


def test_stores_are_listed_by_what_they_hold(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    some_gates([0]).save(tmp_path / "deep" / "a.hdf5")
    make_gates().save(tmp_path / "old.h5")
    write_result(tmp_path / "results.h5", "x", {"a": [1]})
    (tmp_path / "notes.h5").write_text("nothing")
    assert GateStore.list(tmp_path) == [tmp_path / "deep" / "a.hdf5", tmp_path / "old.h5"]


@pytest.mark.slow
def test_xarray(path: Path) -> None:
    pytest.importorskip("xarray")
    with begun(path, [4, 2]) as store:
        data = store.to_xarray()
    gates = some_gates([4, 2])
    assert data["task"].values.tolist() == [4, 2]
    np.testing.assert_array_equal(data["gate/conv"].sel(task=2), gates["conv"][1])
    np.testing.assert_array_equal(data["logit/blocks.0"], gates.logits["blocks.0"])
    assert data["gate/conv"].dims == ("task", "channel/conv")


def test_without_xarray(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "xarray":
            raise ImportError(name)
        return original(name, *arguments, **options)

    with begun(path, [4]) as store, monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", missing)
        with pytest.raises(ImportError, match="pip install xarray"):
            store.to_xarray()


# ---------------------------------------------------------------------------------------------
# Provenance
# ---------------------------------------------------------------------------------------------


def test_hash_of_a_model() -> None:
    model = helpers.build(helpers.TinyCNN)
    found = model_hash(model)
    with helpers.assert_model_untouched(model):
        assert found == model_hash(model) == model_hash(nn.DataParallel(model))
    assert found == model_hash(helpers.build(helpers.TinyCNN))
    assert found != model_hash(helpers.build(helpers.TinyCNN).float())
    for tensor in model.state_dict().values():
        with torch.no_grad():
            kept = tensor.clone()
            tensor.view(-1)[0] += 1
            assert model_hash(model) != found
            tensor.copy_(kept)
    assert model_hash(model) == found
    assert model_hash(nn.Linear(2, 2).bfloat16()) != found


def test_fingerprint_of_data() -> None:
    images, labels = helpers.labelled_images()
    found = data_fingerprint((images, labels))
    assert found == data_fingerprint((images, labels))
    assert found != data_fingerprint((images, labels.roll(1)))
    assert found != data_fingerprint((images.roll(1, 0), labels))
    assert found != data_fingerprint((images[:-1], labels[:-1]))
    assert found == data_fingerprint(torch.utils.data.TensorDataset(images, labels))

    class Named(torch.utils.data.Dataset[Any]):
        def __init__(self, classes: list[str]) -> None:
            self.classes = classes

        def __len__(self) -> int:
            return len(labels)

        def __getitem__(self, number: int) -> Any:
            return images[number] + torch.rand(()), int(labels[number])

    # A random transform is drawn with a fixed seed, and the caller's random numbers stay.
    before = torch.get_rng_state()
    assert data_fingerprint(Named(["a", "b"])) == data_fingerprint(Named(["a", "b"]))
    assert torch.equal(before, torch.get_rng_state())
    assert data_fingerprint(Named(["a", "b"])) != data_fingerprint(Named(["a", "c"]))
