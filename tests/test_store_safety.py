"""Any file beside a store or in it: nothing hangs, is lost or overwritten."""

import json
import os
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store import GateStore, GateStoreError, diff, read_result, write_result
from nad_attr.store import _journal as journals
from nad_attr.store import _read as reads
from nad_attr.system import safe_files as _safe_files
from tests.stores import SITES, assert_same, make_arch, make_gates

posix = pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and devices as on POSIX")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    make_gates().save(tmp_path / "gates.h5")
    return tmp_path / "gates.h5"


def beside(path: Path) -> Path:
    return path.with_name(path.name + ".journal")


def killed(path: Path, n: int = 2) -> None:
    """A run that was killed: the file, and a journal with n tasks."""
    path.unlink(missing_ok=True)
    store = GateStore.create(path, SITES)
    for task in make_gates().tasks[:n]:
        store.append(make_gates().select([task]))
    copies = {p: p.read_bytes() for p in (path, beside(path))}
    store.close()
    for name, content in copies.items():
        name.write_bytes(content)


# -- what a journal is ---------------------------------------------------------------------------


def _link(journal: Path, other: Path) -> None:
    journal.symlink_to(other)


def _dangling(journal: Path, other: Path) -> None:
    journal.symlink_to(other.with_name("nowhere"))


def _hard_link(journal: Path, other: Path) -> None:
    other.write_bytes(b"")
    os.link(other, journal)


def _pipe(journal: Path, other: Path) -> None:
    os.mkfifo(journal)


def _endless(journal: Path, other: Path) -> None:
    journal.symlink_to("/dev/zero")


def _foreign(journal: Path, other: Path) -> None:
    journal.write_text("a diary\n")


def _folder(journal: Path, other: Path) -> None:
    journal.mkdir()


NO_JOURNALS = [_link, _dangling, _pipe, _endless, _folder]


@posix
@pytest.mark.parametrize("make", [*NO_JOURNALS, _hard_link, _foreign])
@pytest.mark.parametrize("write", ["open", "create", "save", "results"])
def test_what_is_no_journal_is_refused_and_stays(
    path: Path, make: Callable[[Path, Path], None], write: str
) -> None:
    other = path.with_name("other.txt")
    other.write_text("precious")
    make(beside(path), other)
    kept, file = other.read_bytes(), path.read_bytes()
    if write == "results":
        path.unlink()
    with pytest.raises(GateStoreError, match=r"gates\.h5\.journal"):
        if write == "open":
            GateStore.open(path, "a")
        elif write == "create":
            GateStore.create(path, SITES, overwrite=True)
        elif write == "save":
            make_gates().save(path)
        else:
            write_result(path, "evaluation/x", {"a": [1.0]})
    assert other.read_bytes() == kept
    assert not other.with_name("nowhere").exists()
    assert write == "results" or path.read_bytes() == file
    assert make is not _foreign or beside(path).read_text() == "a diary\n"


@posix
@pytest.mark.parametrize("make", NO_JOURNALS)
def test_readers_ask_what_a_journal_is(path: Path, make: Callable[[Path, Path], None]) -> None:
    other = path.with_name("other.txt")
    other.write_text("precious")
    make(beside(path), other)
    with pytest.raises(GateStoreError, match="not an ordinary file"):
        GateStore.open(path)
    assert GateStore.list(path.parent) == []


@posix
def test_a_store_is_no_device_or_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5")
    for target in (tmp_path / "pipe.h5", Path("/dev/null")):
        for save in (make_gates().save, make_arch().save):
            with pytest.raises(GateStoreError, match="device or a pipe"):
                save(target)
        for load in (TaskGates.load, SubArchitecture.load):
            with pytest.raises(GateStoreError, match="no file"):
                load(target)
    assert Path("/dev/null").is_char_device()


def test_a_journal_has_to_fit_into_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sparse file of a terabyte costs nothing on the disk."""
    with beside(path).open("wb") as file:
        file.write(journals.MAGIC)
        file.truncate(2**40)
    for mode in ("r", "a"):
        with pytest.raises(GateStoreError, match="half of the memory"):
            GateStore.open(path, mode)
    assert beside(path).stat().st_size == 2**40


# -- whose a journal is --------------------------------------------------------------------------


def _other_file(path: Path) -> None:
    other = path.with_name("other.h5")
    make_gates().save(other)
    other.rename(path)


@pytest.mark.parametrize("how", ["open", "save", "overwrite", "create", "results"])
def test_tasks_of_another_store_are_put_aside_and_counted(path: Path, how: str) -> None:
    killed(path, 2)
    old, journal = path.read_bytes(), beside(path).read_bytes()
    if how in ("create", "results"):
        path.unlink()
    elif how != "save":
        _other_file(path)
    write = {
        "open": lambda: GateStore.open(path, "a").close(),
        "save": lambda: make_gates().save(path),
        "results": lambda: write_result(path, "evaluation/x", {"a": [1.0]}),
        "create": lambda: GateStore.create(path, SITES).close(),
        "overwrite": lambda: GateStore.create(path, SITES, overwrite=True).close(),
    }[how]
    with pytest.warns(RuntimeWarning, match=r"2 finished tasks.*put aside as gates.h5.journal.1"):
        write()
    kept = path.with_name("gates.h5.journal.1")
    assert kept.read_bytes() == journal
    # The remedy of the message.
    path.write_bytes(old)
    kept.rename(beside(path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(TaskGates.load(path), make_gates().select([7, (1, 2)]))


def test_two_of_them_do_not_replace_each_other(path: Path) -> None:
    for number in (1, 2):
        killed(path, number)
        with pytest.warns(RuntimeWarning, match=f"journal.{number}"):
            make_gates().save(path)
    assert sorted(os.listdir(path.parent)) == [
        "gates.h5",
        "gates.h5.journal.1",
        "gates.h5.journal.2",
    ]


def test_readers_name_the_tasks_that_they_do_not_read(path: Path) -> None:
    killed(path, 2)
    journal = beside(path).read_bytes()
    _other_file(path)
    with pytest.warns(RuntimeWarning, match="2 finished tasks of another store.*not read"):
        GateStore.open(path).close()
    assert beside(path).read_bytes() == journal


def test_a_writer_that_died_before_it_emptied_its_journal_lost_nothing(path: Path) -> None:
    killed(path, 2)
    journal = beside(path).read_bytes()
    with GateStore.open(path, "a") as store:
        store.write_result("evaluation/x", {"a": [1.0]})
    beside(path).write_bytes(journal)  # of the revision before, and all of it is in the file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(TaskGates.load(path)) == 2
        GateStore.open(path, "a").close()
    assert os.listdir(path.parent) == ["gates.h5"]


def test_an_older_copy_of_the_file_does_not_cost_the_newer_tasks(path: Path) -> None:
    """The same store: put back from a copy while the journal has gone on."""
    killed(path, 1)
    old = path.read_bytes()
    with GateStore.open(path, "a") as store:
        store.flush()
        store.append(make_gates())
        newer = beside(path).read_bytes()
    path.write_bytes(old)
    beside(path).write_bytes(newer)
    with pytest.warns(RuntimeWarning, match="2 finished tasks"):
        GateStore.open(path, "a").close()


def test_overwriting_replaces_a_store_with_its_journal(path: Path) -> None:
    killed(path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        GateStore.create(path, SITES, overwrite=True).close()
    assert os.listdir(path.parent) == ["gates.h5"]


def test_overwriting_that_fails_keeps_the_journal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(path)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space"):
            GateStore.create(path, SITES, overwrite=True)
    assert len(TaskGates.load(path)) == 2


@posix
def test_a_link_to_a_store_shows_its_journal(path: Path, tmp_path: Path) -> None:
    killed(path, 2)
    (tmp_path / "latest.h5").symlink_to(path)
    assert len(TaskGates.load(tmp_path / "latest.h5")) == 2


# -- threads and locks ---------------------------------------------------------------------------


def test_several_threads_read_one_store(tmp_path: Path) -> None:
    site = GateSite("conv", 2000)
    gates = TaskGates({"conv": torch.rand(64, 2000)}, [site], range(64))
    gates.save(tmp_path / "gates.h5")
    start, found = threading.Barrier(4), []

    def read(store: GateStore) -> None:
        start.wait()
        try:
            for _ in range(5):
                found.append(store.read() == gates)
        except BaseException as error:
            found.append(error)

    with GateStore.open(tmp_path / "gates.h5") as store:
        threads = [threading.Thread(target=read, args=(store,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert found == [True] * 20


@posix
def test_a_locked_file_is_read_and_written(path: Path) -> None:
    """Another program, or a network file system without locks, has removed it."""
    import fcntl

    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert_same(TaskGates.load(path), make_gates())
        with GateStore.open(path, "a") as store:
            store.write_result("evaluation/x", {"a": [1.0]})
    assert read_result(path, "evaluation/x")[0]["a"].tolist() == [1.0]


# -- bounds --------------------------------------------------------------------------------------


def nest(file: h5py.File, levels: int) -> None:
    group = h5py.h5g.create(file.id, b"deep")
    for _ in range(levels - 1):
        group = h5py.h5g.create(group, b"g")


def test_groups_nested_so_deep_that_hdf5_crashes_are_refused(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        nest(file, 12_000)
    for mode in ("r", "a"):
        with pytest.raises(GateStoreError, match="nested deeper than 64"):
            GateStore.open(path, mode)
    with pytest.raises(GateStoreError, match="nested deeper"):
        write_result(path, "evaluation/x", {"a": [1.0]})


def test_groups_of_others_stay(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        nest(file, 50)
    write_result(path, "evaluation/x", {"a": [1.0]})
    with h5py.File(path) as file:
        assert "deep" + "/g" * 49 in file
        assert "deep" + "/g" * 50 not in file


def test_a_hundred_thousand_groups_are_not_looked_at(path: Path) -> None:
    looked = []
    with h5py.File(path, "r+") as file:
        others = h5py.h5g.create(file.id, b"others")
        for i in range(20_001):
            h5py.h5g.create(others, b"%d" % i)
    original = reads.Reader.is_result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reads.Reader, "is_result", lambda self, group: looked.append(1) or original(self, group)
        )
        with pytest.raises(GateStoreError, match="more than 20,000 groups"):
            GateStore.open(path)
    assert len(looked) < 20


def test_no_more_is_read_than_half_of_the_free_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that compress a thousandfold: a small file is a large array."""
    monkeypatch.setattr(reads, "_UNCHECKED_BYTES", 2**18)
    monkeypatch.setattr(_safe_files, "available", lambda device: 2**20)
    site = GateSite("features", 5000)
    TaskGates({"features": torch.ones(60, 5000)}, [site], range(60)).save(tmp_path / "gates.h5")
    with GateStore.open(tmp_path / "gates.h5") as store:
        with pytest.raises(GateStoreError, match=r"half of the memory.*fewer tasks"):
            store.read()
        assert len(store.read(range(20))) == 20
    monkeypatch.setattr(_safe_files, "available", lambda device: 2**24)
    assert len(TaskGates.load(tmp_path / "gates.h5")) == 60


@pytest.mark.parametrize("revision", [2**63 - 1, 2**62, -1])
def test_revisions_that_nobody_could_count_on(path: Path, revision: int) -> None:
    with h5py.File(path, "r+") as file:
        file.attrs["revision"] = np.int64(revision)
    with pytest.raises(GateStoreError, match="not a number of writes"):
        GateStore.open(path, "a")


def _replace_text(file: h5py.File, where: str, name: str, text: str) -> None:
    file[where].attrs[name] = np.bytes_(text.encode())


@pytest.mark.parametrize("name", ["provenance", "info"])
def test_integers_of_hundreds_of_digits_are_refused(path: Path, name: str) -> None:
    with h5py.File(path, "r+") as file:
        _replace_text(file, "/", name, f'{{"seed": {"9" * 400}}}')
    with pytest.raises(GateStoreError, match="integer of 400 digits"):
        TaskGates.load(path)


@pytest.mark.parametrize("task", [2**63, [1, 2**64]])
def test_classes_that_fit_into_no_array_are_refused(path: Path, task: object) -> None:
    with h5py.File(path, "r+") as file:
        del file["task/index"]
        texts = [json.dumps(task).encode(), b"1", b"2"]
        file["task"].create_dataset("index", data=np.array(texts, "S"))
    with pytest.raises(GateStoreError, match="not a class index"):
        TaskGates.load(path)


def test_nothing_is_written_that_would_not_be_read(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match="400 digits"):
        make_gates(info={"hash": int("9" * 400)}).save(path)
    assert path.read_bytes() == before
    make_gates(info={"hash": 2**128, "text": "9" * 400}).save(path)
    assert TaskGates.load(path).info == {"hash": 2**128, "text": "9" * 400}


def _record(header: dict[str, object]) -> journals.Record:
    return journals.Record(header)


@pytest.mark.parametrize(
    "change",
    [
        {"n_sample": [float("inf")]},
        {"n_sample": [2**64]},
        {"tasks": [2**70]},
        {"finished": [[1]]},
        {"names": 5},
    ],
    ids=str,
)
def test_records_that_say_what_cannot_be(path: Path, change: dict[str, object]) -> None:
    killed(path, 1)
    records, _ = journals.unpacked(beside(path).read_bytes())
    records[1].header.update(change)
    beside(path).write_bytes(journals.MAGIC + b"".join(r.packed() for r in records))
    for mode in ("r", "a"):
        with pytest.raises(GateStoreError):
            GateStore.open(path, mode)


@pytest.mark.parametrize(
    "header",
    [
        {"kind": "result", "group": "../x", "attributes": {}, "texts": {}},
        {"kind": "result", "group": "site/0", "attributes": {}, "texts": {}},
        {"kind": "result", "group": 5, "attributes": {}, "texts": {}},
        {"kind": "result", "group": "x", "attributes": [], "texts": {}},
        {"kind": "result", "group": "x", "attributes": {}, "texts": {"a": [1]}},
        {"kind": "score", "method": "..", "tasks": [], "attributes": {}},
        {"kind": "score", "method": "a/b", "tasks": [], "attributes": {}},
    ],
    ids=str,
)
def test_results_of_a_journal_stay_where_results_belong(
    path: Path, header: dict[str, object]
) -> None:
    killed(path, 1)
    records, _ = journals.unpacked(beside(path).read_bytes())
    arrays = {}
    if header["kind"] == "score":
        arrays = {f"score/{i}": np.zeros((0, s.n_channels), "f4") for i, s in enumerate(SITES)}
    records.append(journals.Record(header, arrays))
    beside(path).write_bytes(journals.MAGIC + b"".join(r.packed() for r in records))
    with pytest.raises(GateStoreError):
        GateStore.open(path)


# -- what is shown -------------------------------------------------------------------------------

EVIL = "cat\x1b]52;c;aGk=\x07\u202e\x9b2J\u2028\nError: forged"


def test_names_and_provenance_are_shown_without_control_characters(tmp_path: Path) -> None:
    sites = [GateSite(f"layer{EVIL}", 2)]
    for name, value in (("a.h5", 0.9), ("b.h5", 0.1)):
        gates = TaskGates(
            {sites[0].name: torch.tensor([[value, 0.2]])}, sites, [3], task_names=[EVIL]
        )
        facts = {"model": EVIL, "seed": name, "model_hash": name + EVIL, "data": EVIL}
        with GateStore.create(tmp_path / name, sites, provenance=facts) as store:
            store.append(gates)
            store.write_scores(EVIL, {sites[0].name: torch.ones(1, 2)})
            store.write_result(f"{name}{EVIL}", {"a": [1.0]})
    with GateStore.open(tmp_path / "a.h5") as store:
        described = store.describe()
        with pytest.raises(GateStoreError) as error:
            store.scores("x\x1b[2J")
    assert r"cat\x1b]52;c;aGk=\x07\u202e\x9b2J\u2028\nError: forged" in described
    found = diff(tmp_path / "a.h5", tmp_path / "b.h5")
    for text in (described, str(found), str(error.value)):
        assert text.replace("\n", "").isprintable()
        assert not any(line.startswith("Error") for line in text.splitlines())
