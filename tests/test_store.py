"""Files of gates: everything comes back, and nothing that a file says is trusted."""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nad_attr
from nad_attr import store
from nad_attr.architecture import SubArchitecture
from nad_attr.gates import TaskGates
from nad_attr.history import History
from nad_attr.recipe import PaperRecipe, Recipe
from nad_attr.sites import GateSite
from nad_attr.store import FORMAT_VERSION, GateStoreError

SITES = [GateSite("layer1.0", 3), GateSite("blocks.1", 2, -1), GateSite("head", 4, at_input=True)]


def make_gates(**changes: object) -> TaskGates:
    generator = torch.Generator().manual_seed(0)
    logits = {s.name: torch.randn(3, s.n_channels, generator=generator) for s in SITES}
    options = {
        "logits": logits,
        "means": {s.name: torch.randn(s.n_channels, generator=generator) for s in SITES},
        "recipe": Recipe(size=0.3, steps=7),
        "history": History(
            {"loss": [[1.0, 2.0, np.nan], [0.5, np.inf, np.nan]], "size": np.ones((2, 3))}
        ),
        "task_names": ["tabby", "großer Hund", "猫"],
        "info": {"seed": 3, "device": "cpu", "list": [1, None, True, 0.5], "inner": {"a": "b"}},
        **changes,
    }
    return TaskGates({n: v.sigmoid() for n, v in logits.items()}, SITES, [7, (1, 2), 0], **options)


def make_arch(**changes: object) -> SubArchitecture:
    masks = {s.name: torch.arange(s.n_channels) % 2 == 0 for s in SITES}
    means = {s.name: torch.arange(float(s.n_channels)) for s in SITES}
    return SubArchitecture(masks, SITES, **{"task": (1, 2), "means": means, **changes})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of task gates that holds everything there is."""
    make_gates().save(tmp_path / "gates.h5")
    return tmp_path / "gates.h5"


def assert_same(a: TaskGates, b: TaskGates) -> None:
    assert a == b
    assert (a.recipe, a.info, a.task_names) == (b.recipe, b.info, b.task_names)
    assert type(a.recipe) is type(b.recipe)
    for first, second in ((a.logits, b.logits), (a.means, b.means), (a.history, b.history)):
        assert (first is None) == (second is None)
        if first is not None:
            assert list(first) == list(second)
            for name in first:
                np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]))


# ---------------------------------------------------------------------------------------------
# Round trips
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"logits": None},
        {"means": None},
        {"recipe": None},
        {"recipe": Recipe.paper("densenet121", "places365", epochs=2)},
        {"recipe": Recipe(size=1, ablation="zero", trust=0)},
        {"history": None},
        {"task_names": None},
        {"task_names": ["", " ", "a/b\n"]},
        {"info": None},
        dict.fromkeys(("logits", "means", "recipe", "history", "task_names", "info")),
    ],
    ids=lambda changes: "+".join(changes) or "everything",
)
def test_task_gates_come_back(tmp_path: Path, changes: dict[str, object]) -> None:
    gates = make_gates(**changes)
    gates.save(tmp_path / "gates.h5")
    again = TaskGates.load(tmp_path / "gates.h5")
    assert_same(gates, again)
    for task in gates.tasks:
        for size in (None, 0.2, 0.7):
            assert again.sub_architecture(task, size) == gates.sub_architecture(task, size)


def test_the_paper_recipe_comes_back_as_such(tmp_path: Path) -> None:
    recipe = Recipe.paper("densenet121")
    make_gates(recipe=recipe).save(tmp_path / "gates.h5")
    again = TaskGates.load(tmp_path / "gates.h5").recipe
    assert isinstance(again, PaperRecipe)
    assert again.rectified_sites == ("features",)


@pytest.mark.parametrize("changes", [{}, {"task": None}, {"task": 3}, {"means": None}], ids=str)
def test_sub_architectures_come_back(tmp_path: Path, changes: dict[str, object]) -> None:
    arch = make_arch(**changes)
    arch.save(tmp_path / "arch.h5")
    again = SubArchitecture.load(tmp_path / "arch.h5")
    assert again == arch
    assert again.task == arch.task
    assert (again.means is None) == (arch.means is None)
    if arch.means is not None:
        assert all(torch.equal(again.means[name], mean) for name, mean in arch.means.items())


def test_paths_may_be_text(tmp_path: Path) -> None:
    name = os.fspath(tmp_path / "gates.h5")
    make_gates().save(name)
    assert TaskGates.load(name) == make_gates()
    SubArchitecture.full(SITES).save(name)
    assert SubArchitecture.load(name) == SubArchitecture.full(SITES)


def test_many_sites_keep_their_order(tmp_path: Path) -> None:
    """In the file's own, alphabetical order, site 10 would stand before site 2."""
    sites = [GateSite(f"s{23 - i}", i + 1) for i in range(23)]
    gates = TaskGates({s.name: torch.rand(1, s.n_channels) for s in sites}, sites, [0])
    gates.save(tmp_path / "gates.h5")
    again = TaskGates.load(tmp_path / "gates.h5")
    assert again.sites == tuple(sites)
    assert again == gates


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    names=st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4, unique=True),
    n_tasks=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_anything_comes_back(tmp_path: Path, names: list[str], n_tasks: int, seed: int) -> None:
    """Site and task names in any script, extreme logits, any number of tasks."""
    try:
        "".join(names).encode()
    except UnicodeEncodeError:
        names = ["surrogates"]
    names = [name.replace("\0", "0") + str(i) for i, name in enumerate(names)]
    generator = torch.Generator().manual_seed(seed)
    sites = [GateSite(name, i + 1) for i, name in enumerate(names)]
    logits = {s.name: 100 * torch.randn(n_tasks, s.n_channels, generator=generator) for s in sites}
    gates = TaskGates(
        {name: value.sigmoid() for name, value in logits.items()},
        sites,
        list(range(n_tasks)),
        logits=logits,
        task_names=[f"{names[0]} {i}" for i in range(n_tasks)],
    )
    gates.save(tmp_path / "gates.h5")
    assert_same(TaskGates.load(tmp_path / "gates.h5"), gates)


def test_any_hdf5_program_can_read_the_file(path: Path) -> None:
    gates = make_gates()
    with h5py.File(path) as file:
        assert file.attrs["format"] == "nad_attr"
        assert file.attrs["format_version"] == FORMAT_VERSION == 1
        assert file.attrs["kind"] == "task_gates"
        assert file.attrs["created_by"].startswith(f"nad_attr {nad_attr.__version__}, torch ")
        assert json.loads(file.attrs["recipe"])["size"] == 0.3
        assert json.loads(file.attrs["info"])["seed"] == 3
        assert [json.loads(t) for t in file["task/index"].asstr()] == [7, [1, 2], 0]
        assert list(file["task/name"].asstr()) == ["tabby", "großer Hund", "猫"]
        assert set(file["site"]) == {"0", "1", "2"}
        for i, site in enumerate(SITES):
            group = file[f"site/{i}"]
            assert dict(group.attrs) == {
                "name": site.name,
                "order": i,
                "channel_dim": site.channel_dim,
                "at_input": site.at_input,
            }
            assert group["gate"].dtype == np.float32
            np.testing.assert_array_equal(group["gate"], gates[site.name])
            np.testing.assert_array_equal(group["logit"], gates.logits[site.name])
            np.testing.assert_array_equal(group["mean"], gates.means[site.name])
        np.testing.assert_array_equal(file["history/loss"], gates.history["loss"])
    make_arch().save(path)
    with h5py.File(path) as file:
        assert file.attrs["kind"] == "sub_architecture"
        assert file["site/0/kept"].dtype == np.uint8
        assert file["site/0/kept"][:].tolist() == [1, 0, 1]


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "_write_sites", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make_gates().save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


def test_info_that_json_cannot_hold_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TypeError, match="JSON"):
        make_gates(info={"model": object()}).save(path)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.skipif(os.name != "posix", reason="modes are POSIX's")
def test_a_new_file_has_the_usual_rights(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        make_gates().save(tmp_path / "gates.h5")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "gates.h5").stat().st_mode) == 0o640


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    for save in (make_gates().save, make_arch().save):
        with pytest.raises(GateStoreError, match="is a folder; name a file"):
            save(tmp_path)
        with pytest.raises(GateStoreError, match=r"there is no folder .*missing"):
            save(tmp_path / "missing" / "gates.h5")
    assert os.listdir(tmp_path) == []


# ---------------------------------------------------------------------------------------------
# Reading what is no such file
# ---------------------------------------------------------------------------------------------

LOADERS = [TaskGates.load, SubArchitecture.load]


def refused(
    path: Path,
    load: Callable[[Path], object],
    words: str | None = None,
    memory: int = 50 * 2**20,
) -> None:
    """A documented error, at once and without a large allocation."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        with pytest.raises(GateStoreError, match=words) as error:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 5
    assert peak < memory
    assert str(path) in str(error.value)


@pytest.mark.parametrize("load", LOADERS)
def test_files_of_another_kind(tmp_path: Path, load: Callable[[Path], object]) -> None:
    refused(tmp_path / "missing.h5", load, "there is no file")
    refused(tmp_path, load, "there is no file")
    for name, content in {
        "empty": b"",
        "text": b"gates: all open\n",
        "pickle": b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00cos\nsystem\n",
        "zip": b"PK\x03\x04" + bytes(100),
        "signature": b"\x89HDF\r\n\x1a\n" + bytes(500),
    }.items():
        file = tmp_path / name
        file.write_bytes(content)
        refused(file, load, "not a readable store")
    with h5py.File(tmp_path / "foreign.h5", "w") as foreign:
        foreign["data"] = np.ones(3)
    refused(tmp_path / "foreign.h5", load, "not one written by nad_attr")


def test_the_other_kind_of_store(path: Path) -> None:
    refused(path, SubArchitecture.load, "holds 'task_gates', not 'sub_architecture'")
    make_arch().save(path)
    refused(path, TaskGates.load, "holds 'sub_architecture', not 'task_gates'")


def test_a_truncated_file(path: Path) -> None:
    whole = path.read_bytes()
    for length in {*range(0, 100, 9), *range(0, len(whole), len(whole) // 60), len(whole) - 1}:
        path.write_bytes(whole[:length])
        refused(path, TaskGates.load)


def test_a_damaged_file_is_read_or_refused(path: Path) -> None:
    """Whatever a flipped byte does, it is never another exception, nor a crash."""
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        for position in random.integers(len(whole), size=random.integers(1, 4)):
            damaged[position] = random.integers(256)
        path.write_bytes(damaged)
        with contextlib.suppress(GateStoreError):
            TaskGates.load(path)


def replace(group: h5py.Group, name: str, value: object, **options: object) -> None:
    del group[name]
    group.create_dataset(name, data=value, **options)


def _object(file: h5py.File) -> None:
    replace(file["site/0"], "gate", ["a", "b", "c"], dtype=h5py.string_dtype())


def _references(file: h5py.File) -> None:
    replace(file["site/0"], "gate", [[file.ref] * 3] * 3, dtype=h5py.ref_dtype)


def _compound(file: h5py.File) -> None:
    replace(file["site/0"], "gate", np.zeros((3, 3), [("x", "f4")]))


def _soft_link(file: h5py.File) -> None:
    del file["site/0/gate"]
    file["site/0/gate"] = h5py.SoftLink("/site/1/gate")


def _external_link(file: h5py.File) -> None:
    del file["site/0/gate"]
    file["site/0/gate"] = h5py.ExternalLink("/etc/hostname", "/gate")


def _external_group(file: h5py.File) -> None:
    del file["site"]
    file["site"] = h5py.ExternalLink("/etc/hostname", "/site")


def _external_storage(file: h5py.File) -> None:
    del file["site/0/gate"]
    file["site/0"].create_dataset(
        "gate", (3, 3), "f4", external=[("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
    )


def _virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3, 3), "f4")
    layout[:] = h5py.VirtualSource("/etc/hostname", "gate", (3, 3))
    del file["site/0/gate"]
    file["site/0"].create_virtual_dataset("gate", layout)


def _virtual_tasks(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((3,), h5py.string_dtype())
    layout[:] = h5py.VirtualSource("/etc/hostname", "index", (3,))
    del file["task/index"]
    file["task"].create_virtual_dataset("index", layout)


def _huge_gates(file: h5py.File) -> None:
    del file["site/0/gate"]
    file["site/0"].create_dataset("gate", (3, 2**40), "f4", chunks=(3, 1024))


def _huge_and_compressed(file: h5py.File) -> None:
    del file["site/0/gate"]
    file["site/0"].create_dataset("gate", (3, 2**28), "f4", chunks=(3, 2**20), compression="gzip")


def _huge_mean(file: h5py.File) -> None:
    del file["site/0/mean"]
    file["site/0"].create_dataset("mean", (2**40,), "f4", chunks=(1024,))


def _huge_history(file: h5py.File) -> None:
    del file["history/loss"]
    file["history"].create_dataset("loss", (2**32, 3), "f4", chunks=(1024, 3))


def _huge_tasks(file: h5py.File) -> None:
    del file["task/index"]
    file["task"].create_dataset("index", (2**40,), h5py.string_dtype(), chunks=(1024,))


def _many_tasks(file: h5py.File) -> None:
    del file["task/index"]
    file["task"].create_dataset("index", (9_000_000,), h5py.string_dtype(), chunks=(1024,))


def _many_names(file: h5py.File) -> None:
    del file["task/name"]
    file["task"].create_dataset("name", (9_000_000,), h5py.string_dtype(), chunks=(1024,))


def _deep_json(file: h5py.File) -> None:
    file.attrs["info"] = "[" * 50_000


def _deep_task(file: h5py.File) -> None:
    replace(file["task"], "index", ["[" * 50_000, "1", "2"], dtype=h5py.string_dtype())


HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "newer version": (
        lambda f: f.attrs.__setitem__("format_version", 2),
        "format version 2.*newer",
    ),
    "version is text": (lambda f: f.attrs.__setitem__("format_version", "1"), "format_version"),
    "version 0": (
        lambda f: f.attrs.__setitem__("format_version", 0),
        "format version 0, which never was",
    ),
    "no version": (lambda f: f.attrs.__delitem__("format_version"), "format_version"),
    "version is an array": (
        lambda f: f.attrs.__setitem__("format_version", [1, 1]),
        "format_version",
    ),
    "no kind": (lambda f: f.attrs.__delitem__("kind"), "kind"),
    "format is a number": (lambda f: f.attrs.__setitem__("format", 1), "format"),
    "no tasks": (lambda f: f.__delitem__("task"), "task"),
    "no task index": (lambda f: f.__delitem__("task/index"), "index|task"),
    "no task at all": (
        lambda f: replace(f["task"], "index", [], dtype=h5py.string_dtype()),
        "shape",
    ),
    "no sites": (lambda f: f.__delitem__("site"), "site"),
    "empty sites": (lambda f: [f["site"].__delitem__(k) for k in list(f["site"])], "0 gate sites"),
    "a site is missing": (lambda f: f.__delitem__("site/1"), "/site/1"),
    "sites are a dataset": (
        lambda f: (f.__delitem__("site"), f.create_dataset("site", data=[1.0])),
        "Group",
    ),
    "a gate is a group": (
        lambda f: (f.__delitem__("site/0/gate"), f.create_group("site/0/gate")),
        "Dataset",
    ),
    "no gate": (lambda f: f.__delitem__("site/0/gate"), "gate"),
    "no site name": (lambda f: f["site/0"].attrs.__delitem__("name"), "'name'"),
    "empty site name": (lambda f: f["site/0"].attrs.__setitem__("name", ""), "name"),
    "site name is bytes": (
        lambda f: f["site/0"].attrs.__setitem__("name", np.void(b"a")),
        "'name'",
    ),
    "site name twice": (
        lambda f: f["site/0"].attrs.__setitem__("name", "head"),
        "head|shape|twice",
    ),
    "channel axis is text": (
        lambda f: f["site/0"].attrs.__setitem__("channel_dim", "1"),
        "channel_dim",
    ),
    "channel axis is the batch": (
        lambda f: f["site/0"].attrs.__setitem__("channel_dim", 0),
        "batch",
    ),
    "at_input is an array": (
        lambda f: f["site/0"].attrs.__setitem__("at_input", [1, 2]),
        "at_input",
    ),
    "gates are whole numbers": (
        lambda f: replace(f["site/0"], "gate", np.zeros((3, 3), "i4")),
        "type int32",
    ),
    "gates are complex": (
        lambda f: replace(f["site/0"], "gate", np.zeros((3, 3), "c8")),
        "complex",
    ),
    "gates are text": (_object, "type"),
    "gates are references": (_references, "type"),
    "gates are records": (_compound, "type"),
    "gates are a number": (lambda f: replace(f["site/0"], "gate", 0.5), "channel|shape"),
    "gates are empty": (lambda f: replace(f["site/0"], "gate", np.zeros((3, 0), "f4")), "channel"),
    "gates of another number of tasks": (
        lambda f: replace(f["site/0"], "gate", np.zeros((2, 3), "f4")),
        r"shape \(2, 3\), expected \(3, 3\)",
    ),
    "logits of another shape": (
        lambda f: replace(f["site/0"], "logit", np.zeros((3, 4), "f4")),
        "shape",
    ),
    "logits at one site only": (lambda f: f.__delitem__("site/1/logit"), "logits"),
    "gates above one": (lambda f: f["site/0/gate"].__setitem__((0, 0), 2), "leave"),
    "gates are NaN": (lambda f: f["site/0/gate"].__setitem__((0, 0), np.nan), "NaN"),
    "logits are NaN": (lambda f: f["site/0/logit"].__setitem__((0, 0), np.nan), "NaN"),
    "means are infinite": (lambda f: f["site/0/mean"].__setitem__(0, np.inf), "means"),
    "means at one site only": (lambda f: f.__delitem__("site/1/mean"), "mean"),
    "means of another shape": (lambda f: replace(f["site/0"], "mean", np.zeros(9, "f4")), "shape"),
    "a soft link": (_soft_link, "link"),
    "an external link": (_external_link, "link"),
    "an external group": (_external_group, "link"),
    "external storage": (_external_storage, "type|extern"),
    "a virtual dataset": (_virtual, "type|virtual"),
    "virtual tasks": (_virtual_tasks, "shape|virtual"),
    "huge gates": (_huge_gates, "shape|claims"),
    "huge gates, compressed": (_huge_and_compressed, "shape|claims"),
    "huge means": (_huge_mean, "shape|claims"),
    "huge history": (_huge_history, "shape|claims"),
    "huge tasks": (_huge_tasks, "shape|claims"),
    "many tasks that are not there": (_many_tasks, "holds less"),
    "many names that are not there": (_many_names, "holds less"),
    "history is a dataset": (
        lambda f: (f.__delitem__("history"), f.create_dataset("history", data=[1.0])),
        "Group",
    ),
    "history of other tasks": (
        lambda f: replace(f["history"], "loss", np.zeros((2, 9), "f4")),
        "shape",
    ),
    "history of different lengths": (
        lambda f: replace(f["history"], "loss", np.zeros((5, 3), "f4")),
        "shape",
    ),
    "tasks are numbers": (lambda f: replace(f["task"], "index", [7, 8, 9]), "strings"),
    "tasks are no JSON": (
        lambda f: replace(f["task"], "index", ["x", "1", "2"], dtype=h5py.string_dtype()),
        "not a readable store",
    ),
    "a task is negative": (
        lambda f: replace(f["task"], "index", ["-1", "1", "2"], dtype=h5py.string_dtype()),
        "class index",
    ),
    "a task is a table": (
        lambda f: replace(f["task"], "index", ["{}", "1", "2"], dtype=h5py.string_dtype()),
        "task",
    ),
    "a task is text": (
        lambda f: replace(f["task"], "index", ['"a"', "1", "2"], dtype=h5py.string_dtype()),
        "class index",
    ),
    "a task is null": (
        lambda f: replace(f["task"], "index", ["null", "1", "2"], dtype=h5py.string_dtype()),
        r"shape \(3, 3\), expected \(2, 3\)",
    ),
    "a task is there twice": (
        lambda f: replace(f["task"], "index", ["1", "1", "2"], dtype=h5py.string_dtype()),
        "twice",
    ),
    "tasks are nested deep": (_deep_task, "not a readable store"),
    "names of other tasks": (
        lambda f: replace(f["task"], "name", ["a"], dtype=h5py.string_dtype()),
        "1 names for 3 tasks",
    ),
    "names are no UTF-8": (
        lambda f: replace(f["task"], "name", [b"\xff\xfe"] * 3, dtype=h5py.string_dtype()),
        "utf-8",
    ),
    "info is no JSON": (lambda f: f.attrs.__setitem__("info", "x"), "not a readable store"),
    "info is a list": (lambda f: f.attrs.__setitem__("info", "[1, 2]"), "info|readable"),
    "info is a number": (lambda f: f.attrs.__setitem__("info", 5), "info"),
    "info is nested deep": (_deep_json, "not a readable store"),
    "recipe is no JSON": (lambda f: f.attrs.__setitem__("recipe", "import os"), "readable"),
    "recipe of an unknown kind": (
        lambda f: f.attrs.__setitem__("recipe", '{"kind": "os.system"}'),
        "not a recipe",
    ),
    "recipe with unknown fields": (
        lambda f: f.attrs.__setitem__("recipe", '{"kind": "Recipe", "__class__": 1}'),
        "unknown recipe fields",
    ),
    "recipe with a wrong value": (
        lambda f: f.attrs.__setitem__("recipe", '{"kind": "Recipe", "size": "all"}'),
        "size",
    ),
    "recipe's kind is a list": (
        lambda f: f.attrs.__setitem__("recipe", '{"kind": []}'),
        "recipe|readable",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files(path: Path, spoil: Callable[[h5py.File], object], words: str) -> None:
    with h5py.File(path, "r+") as file:
        spoil(file)
    refused(path, TaskGates.load, words)


HOSTILE_ARCHS: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "mask is float": (lambda f: replace(f["site/0"], "kept", np.zeros(3, "f4")), "type float32"),
    "mask of two axes": (lambda f: replace(f["site/0"], "kept", np.zeros((1, 3), "u1")), "shape"),
    "mask is a number": (lambda f: replace(f["site/0"], "kept", np.uint8(1)), "channel|shape"),
    "mask is text": (
        lambda f: replace(f["site/0"], "kept", ["a"] * 3, dtype=h5py.string_dtype()),
        "type",
    ),
    "huge mask": (
        lambda f: (
            f.__delitem__("site/0/kept"),
            f["site/0"].create_dataset("kept", (2**32,), "u1", chunks=(2**20,)),
        ),
        "claims|shape",
    ),
    "huge mask that claims little": (
        lambda f: (
            f.__delitem__("site/0/kept"),
            f["site/0"].create_dataset("kept", (2**62,), "u1", chunks=(2**20,)),
        ),
        "claims|shape",
    ),
    "task is text": (
        lambda f: replace(f["task"], "index", ['"a"'], dtype=h5py.string_dtype()),
        "class index",
    ),
    "no task": (lambda f: f.__delitem__("task"), "task"),
    "two tasks": (
        lambda f: replace(f["task"], "index", ["1", "2"], dtype=h5py.string_dtype()),
        "task",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), HOSTILE_ARCHS.values(), ids=HOSTILE_ARCHS.keys())
def test_hostile_sub_architectures(
    path: Path, spoil: Callable[[h5py.File], object], words: str
) -> None:
    make_arch().save(path)
    with h5py.File(path, "r+") as file:
        spoil(file)
    refused(path, SubArchitecture.load, words)


def test_a_compressed_bomb(path: Path) -> None:
    """Zeros that were really written shrink a thousandfold; the claim has to fit the bytes."""
    with h5py.File(path, "r+") as file:
        del file["site/0/gate"]
        data = file["site/0"].create_dataset(
            "gate", (3, 2**26), "f4", chunks=(3, 2**20), compression="gzip", fillvalue=0.5
        )
        data[:, : 2**20] = 0
    refused(path, TaskGates.load, "claims")


def test_one_dataset_linked_from_many_places(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        for site in ("site/1", "site/2"):
            del file[site]
        del file["task/index"], file["task/name"]
        file["task"].create_dataset("index", data=["0"], dtype=h5py.string_dtype())
        del file["site/0/gate"], file["site/0/logit"], file["site/0/mean"]
        data = file["site/0"].create_dataset(
            "gate", (1, 2**22), "f4", chunks=(1, 2**22), compression="gzip"
        )
        data[:] = 1
        for i in range(1, 60):
            group = file.create_group(f"site/{i}")
            for name, value in {**file["site/0"].attrs, "name": f"site{i}"}.items():
                group.attrs[name] = value
            group["gate"] = data
    refused(path, TaskGates.load, "stands in several places", memory=100 * 2**20)


def test_real_large_stores_are_not_taken_for_bombs(tmp_path: Path) -> None:
    """All gates equal: nothing compresses better, and it is still a real store."""
    site = GateSite("features", 5000)
    gates = TaskGates({"features": torch.ones(400, 5000)}, [site], range(400))
    gates.save(tmp_path / "gates.h5")
    assert (tmp_path / "gates.h5").stat().st_size < 200_000
    assert TaskGates.load(tmp_path / "gates.h5") == gates


def test_a_file_is_not_kept_open(path: Path) -> None:
    TaskGates.load(path)
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 99
    for _ in range(2):
        refused(path, TaskGates.load, "newer")
    with h5py.File(path, "r+") as file:
        file.attrs["format_version"] = 1
    TaskGates.load(path)
