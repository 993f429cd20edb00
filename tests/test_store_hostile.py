"""Every file is read or refused; no claim of a file is trusted."""

import contextlib
import json
import time
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store import FORMAT_VERSION, GateStore, GateStoreError
from tests.stores import make_arch, make_gates


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of task gates with all optional content."""
    make_gates().save(tmp_path / "gates.h5")
    return tmp_path / "gates.h5"


LOADERS = [TaskGates.load, SubArchitecture.load]


def refused(
    path: Path,
    load: Callable[[Path], object],
    words: str | None = None,
    memory: int = 50 * 2**20,
) -> None:
    """A documented error, at once and without a large allocation."""
    tracemalloc.start()
    started = time.process_time()
    try:
        with pytest.raises(GateStoreError, match=words) as error:
            load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 5
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
    """A flipped byte causes no other exception and no crash."""
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


def replace_texts(group: h5py.Group, name: str, texts: list[str | bytes]) -> None:
    content = [text if isinstance(text, bytes) else text.encode() for text in texts]
    array = np.array(content, "S") if content else np.array([], "S1")
    options = {"chunks": array.shape, "compression": "gzip"} if content else {}
    replace(group, name, array, **options)


def put(where: str, name: str, value: str) -> Callable[[h5py.File], object]:
    """Give an attribute another text, of fixed length."""
    return lambda f: f[where].attrs.__setitem__(name, np.bytes_(value))


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


def _soft_group(file: h5py.File) -> None:
    file.move("site/0", "elsewhere")
    file["site/0"] = h5py.SoftLink("/elsewhere")


def _external_site(file: h5py.File) -> None:
    del file["site/0"]
    file["site/0"] = h5py.ExternalLink("/etc/hostname", "/site")


def _linked(name: str, link: Any) -> Callable[[h5py.File], None]:
    """A table of all sites is a link."""

    def spoil(file: h5py.File) -> None:
        file.move(name, "elsewhere")
        file[name] = link

    return spoil


def _outside(name: str, *, virtual: bool) -> Callable[[h5py.File], None]:
    """A table of all sites has its content in another file."""

    def spoil(file: h5py.File) -> None:
        shape = file[name].shape
        del file[name]
        if virtual:
            layout = h5py.VirtualLayout(shape, "f4")
            layout[:] = h5py.VirtualSource("/etc/hostname", "x", shape)
            file.create_virtual_dataset(name, layout)
        else:
            outside = [("/etc/hostname", 0, h5py.h5f.UNLIMITED)]
            file.create_dataset(name, shape, "f4", external=outside)

    return spoil


def _huge_mean(file: h5py.File) -> None:
    del file["mean"]
    file.create_dataset("mean", (2**40,), "f4", chunks=(1024,))


def _huge_logits(file: h5py.File) -> None:
    del file["logit"]
    file.create_dataset("logit", (3, 2**28), "f4", chunks=(1, 2**28), compression="gzip")


def _huge_history(file: h5py.File) -> None:
    del file["history/loss"]
    file["history"].create_dataset("loss", (2**32, 3), "f4", chunks=(1024, 3))


def _huge_tasks(file: h5py.File) -> None:
    del file["task/index"]
    file["task"].create_dataset("index", (2**40,), "S8", chunks=(1024,))


def _long_tasks(file: h5py.File) -> None:
    del file["task/index"]
    file["task"].create_dataset("index", (3,), f"S{2**31 - 1}", chunks=(1,))


def _many_tasks(file: h5py.File) -> None:
    del file["task/index"]
    file["task"].create_dataset("index", (9_000_000,), "S8", chunks=(1024,))


def _many_names(file: h5py.File) -> None:
    del file["task/name"]
    file["task"].create_dataset("name", (9_000_000,), "S8", chunks=(1024,))


def _texts_of_variable_length(file: h5py.File) -> None:
    replace(file["task"], "index", ["7", "8", "9"], dtype=h5py.string_dtype())


def _deep_json(file: h5py.File) -> None:
    file.attrs["info"] = np.bytes_("[" * 50_000)


def _deep_task(file: h5py.File) -> None:
    replace_texts(file["task"], "index", ["[" * 50_000, "1", "2"])


HOSTILE: dict[str, tuple[Callable[[h5py.File], object], str]] = {
    "newer version": (
        lambda f: f.attrs.__setitem__("format_version", FORMAT_VERSION + 1),
        f"format version {FORMAT_VERSION + 1}.*newer",
    ),
    "version is text": (lambda f: f.attrs.__setitem__("format_version", "1"), "format_version"),
    "version 0": (
        lambda f: f.attrs.__setitem__("format_version", 0),
        "format version 0, which no release wrote",
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
        lambda f: (replace_texts(f["task"], "index", []), f.__delitem__("task/name")),
        "shape",
    ),
    "no sites": (lambda f: f.__delitem__("site"), "site"),
    "empty sites": (lambda f: [f["site"].__delitem__(k) for k in list(f["site"])], "0 gate sites"),
    "a site is missing": (lambda f: f.__delitem__("site/1"), "/site/1|sites of 2"),
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
    "empty site name": (put("site/0", "name", ""), "name"),
    "site name is bytes": (
        lambda f: f["site/0"].attrs.__setitem__("name", np.void(b"a")),
        "'name'",
    ),
    "site name twice": (
        put("site/0", "name", "head"),
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
    "gates are empty": (lambda f: replace(f["site/0"], "gate", np.zeros((3, 0), "f4")), "shape"),
    "gates of another number of tasks": (
        lambda f: replace(f["site/0"], "gate", np.zeros((2, 3), "f4")),
        r"shape \(2, 3\), expected \(3, 3\)",
    ),
    "logits of another shape": (
        lambda f: replace(f, "logit", np.zeros((3, 10), "f4")),
        r"shape \(3, 10\), expected \(3, 9\)",
    ),
    "logits of fewer tasks": (lambda f: replace(f, "logit", np.zeros((2, 9), "f4")), "shape"),
    "logits are doubles": (lambda f: replace(f, "logit", np.zeros((3, 9), "f8")), "not float32"),
    "logits are text": (
        lambda f: replace(f, "logit", ["a", "b", "c"], dtype=h5py.string_dtype()),
        "type",
    ),
    "logits are a group": (
        lambda f: (f.__delitem__("logit"), f.create_group("logit")),
        "Dataset",
    ),
    "logits are a soft link": (_linked("logit", h5py.SoftLink("/elsewhere")), "link"),
    "logits are an external link": (_linked("logit", h5py.ExternalLink("/etc/x", "/a")), "link"),
    "logits are stored outside": (_outside("logit", virtual=False), "outside"),
    "logits are virtual": (_outside("logit", virtual=True), "outside"),
    "logits with unknown filters": (
        lambda f: replace(f, "logit", np.zeros((3, 9), "f4"), chunks=(1, 9), compression="lzf"),
        "filters",
    ),
    "huge logits": (_huge_logits, "shape|claims"),
    "gates above one": (lambda f: f["site/0/gate"].__setitem__((0, 0), 2), "leave"),
    "gates are NaN": (lambda f: f["site/0/gate"].__setitem__((0, 0), np.nan), "NaN"),
    "logits are NaN": (lambda f: f["logit"].__setitem__((1, 4), np.nan), "'blocks.1' hold NaN"),
    "means are infinite": (lambda f: f["mean"].__setitem__(0, np.inf), "means"),
    "means of another shape": (lambda f: replace(f, "mean", np.zeros(8, "f4")), "shape"),
    "means are whole numbers": (lambda f: replace(f, "mean", np.zeros(9, "i4")), "type int32"),
    "means are a soft link": (_linked("mean", h5py.SoftLink("/elsewhere")), "link"),
    "means are an external link": (_linked("mean", h5py.ExternalLink("/etc/x", "/a")), "link"),
    "means are stored outside": (_outside("mean", virtual=False), "outside"),
    "means are virtual": (_outside("mean", virtual=True), "outside"),
    "a group is a soft link": (_soft_group, "link"),
    "a group is an external link": (_external_site, "link"),
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
    "long tasks": (_long_tasks, "claims"),
    "texts of variable length": (_texts_of_variable_length, "type object"),
    "an attribute of variable length": (
        lambda f: f.attrs.__setitem__("info", "{}"),
        "variable length",
    ),
    "a huge attribute": (
        lambda f: f.attrs.create("info", np.empty((), "S65000"), shape=(), dtype="S65000"),
        "readable",
    ),
    "many tasks that are not there": (_many_tasks, "claims"),
    "many names that are not there": (_many_names, "9000000 texts for 3"),
    "history is a dataset": (
        lambda f: (f.__delitem__("history"), f.create_dataset("history", data=[1.0])),
        "Group",
    ),
    "history of other tasks": (
        lambda f: replace(f["history"], "loss", np.zeros((2, 9), "f4")),
        "shape",
    ),
    "tasks are numbers": (lambda f: replace(f["task"], "index", [7, 8, 9]), "type int64"),
    "tasks are no JSON": (
        lambda f: replace_texts(f["task"], "index", ["x", "1", "2"]),
        "not a readable store",
    ),
    "a task is negative": (
        lambda f: replace_texts(f["task"], "index", ["-1", "1", "2"]),
        "class index",
    ),
    "a task is a table": (
        lambda f: replace_texts(f["task"], "index", ["{}", "1", "2"]),
        "task",
    ),
    "a task is text": (
        lambda f: replace_texts(f["task"], "index", ['"a"', "1", "2"]),
        "class index",
    ),
    "a task is null": (
        lambda f: replace_texts(f["task"], "index", ["null", "1", "2"]),
        "got NoneType",
    ),
    "two tasks in one text": (
        lambda f: replace_texts(f["task"], "index", ["0,1", "2", "3"]),
        "3 texts, 4 tasks",
    ),
    "a task is there twice": (
        lambda f: replace_texts(f["task"], "index", ["1", "1", "2"]),
        "twice",
    ),
    "tasks are nested deep": (_deep_task, "not a readable store"),
    "names of other tasks": (
        lambda f: replace_texts(f["task"], "name", ["a"]),
        "1 texts for 3",
    ),
    "names are no UTF-8": (
        lambda f: replace_texts(f["task"], "name", [b"\xff\xfe"] * 3),
        "utf-8",
    ),
    "info is not JSON": (
        put("/", "info", "x"),
        "not a readable store",
    ),
    "info is a list": (put("/", "info", "[1, 2]"), "info|readable"),
    "info is a number": (lambda f: f.attrs.__setitem__("info", 5), "info"),
    "info is nested deep": (_deep_json, "not a readable store"),
    "recipe is not JSON": (
        put("/", "recipe", "import os"),
        "readable",
    ),
    "recipe of an unknown kind": (
        put("/", "recipe", '{"kind": "os.system"}'),
        "not a recipe",
    ),
    "recipe with unknown fields": (
        put("/", "recipe", '{"kind": "Recipe", "__class__": 1}'),
        "unknown recipe fields",
    ),
    "recipe with a wrong value": (
        put("/", "recipe", '{"kind": "Recipe", "size": "all"}'),
        "size",
    ),
    "recipe's kind is a list": (
        put("/", "recipe", '{"kind": []}'),
        "recipe|readable",
    ),
}


@pytest.mark.parametrize(("spoil", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files(path: Path, spoil: Callable[[h5py.File], object], words: str) -> None:
    with h5py.File(path, "r+") as file:
        del file["site"].attrs["index"]  # else the attributes of the sites would not be read
        spoil(file)
    refused(path, TaskGates.load, words)


#: What is refused whether or not the sites' groups were looked at before.
WITH_INDEX = [name for name in HOSTILE if name.startswith(("a ", "gates ", "logits ", "means "))]


@pytest.mark.parametrize("name", WITH_INDEX)
def test_hostile_files_with_an_index(path: Path, name: str) -> None:
    spoil, words = HOSTILE[name]
    with h5py.File(path, "r+") as file:
        spoil(file)
    refused(path, TaskGates.load, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda index: index[:-1], "lists 2 gate sites of 3"),
        (lambda index: [*index, index[0]], "lists 4 gate sites of 3"),
        (lambda index: {"0": index[0]}, "not of type list"),
        (lambda index: [index[0][:3], *index[1:]], "lists a gate site as"),
        (lambda index: [[0, *index[0][1:]], *index[1:]], "lists a gate site as"),
        (lambda index: [[index[0][0], True, 1, 0], *index[1:]], "lists a gate site as"),
        (lambda index: [7, *index[1:]], "lists a gate site as"),
        (lambda index: [["", *index[0][1:]], *index[1:]], "name"),
        (lambda index: [index[1], *index[1:]], "twice|shape"),
        (lambda index: [[index[0][0], 2**40, 1, 0], *index[1:]], "shape|claims"),
    ],
)
def test_hostile_index_of_sites(path: Path, change: Callable[[Any], Any], words: str) -> None:
    with h5py.File(path, "r+") as file:
        group = file["site"]
        index = json.loads(group.attrs["index"])
        group.attrs["index"] = np.bytes_(json.dumps(change(index)))
    refused(path, TaskGates.load, words)


def test_sites_are_read_from_their_groups_where_there_is_no_index(path: Path) -> None:
    whole = TaskGates.load(path)
    with h5py.File(path, "r+") as file:
        del file["site"].attrs["index"]
    assert TaskGates.load(path) == whole


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
        lambda f: replace_texts(f["task"], "index", ['"a"']),
        "class index",
    ),
    "no task": (lambda f: f.__delitem__("task"), "task"),
    "two tasks": (
        lambda f: replace_texts(f["task"], "index", ["1", "2"]),
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


@pytest.mark.parametrize("size", [2**23, 2**25])
def test_a_chunk_that_goes_on_after_its_end(path: Path, size: int) -> None:
    """Deflate shrinks zeros a thousandfold: the size of a chunk is known beforehand."""
    with h5py.File(path, "r+") as file:
        file["site/0/gate"].id.write_direct_chunk((1, 0), zlib.compress(bytes(size)))
    refused(path, TaskGates.load, r"claims too large a chunk")


@pytest.mark.parametrize("name", ["logit", "site/0/gate"])
def test_a_chunk_that_goes_on_within_its_room(tmp_path: Path, name: str) -> None:
    """As short as a real one, but inflates to a thousand times its length."""
    sites = [GateSite("a", 30_000), GateSite("b", 20_000)]
    logits = {s.name: torch.randn(2, s.n_channels) for s in sites}
    values = {n: v.sigmoid() for n, v in logits.items()}
    TaskGates(values, sites, [0, 1], logits=logits).save(tmp_path / "gates.h5")
    bomb = zlib.compress(bytes(100_000_000))
    with h5py.File(tmp_path / "gates.h5", "r+") as file:
        assert 50_000 < len(bomb) < 4 * file[name].shape[1]
        file[name].id.write_direct_chunk((1, 0), bomb)
    refused(tmp_path / "gates.h5", TaskGates.load, "goes on after its end", 20 * 2**20)


def test_a_damaged_chunk(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        data = file["site/0/gate"].id
        content = bytearray(data.read_direct_chunk((1, 0))[1])
        content[-1] ^= 1
        data.write_direct_chunk((1, 0), bytes(content))
    refused(path, TaskGates.load, "incorrect data check")
    with GateStore.open(path) as store:
        assert store.read([7, 0]) == make_gates().select([7, 0])


def test_more_is_claimed_than_is_stored(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        del file["site"].attrs["index"]
        del file["site/0/gate"], file["logit"], file["mean"], file["site/1"], file["site/2"]
        file["site/0"].attrs["n_channels"] = 2**26
        data = file["site/0"].create_dataset(
            "gate", (3, 2**26), "f4", chunks=(3, 2**20), compression="gzip", fillvalue=0.5
        )
        data[:, : 2**20] = 0
    refused(path, TaskGates.load, "claims")


@pytest.mark.parametrize("chunks", [(1, 2**22), (1, 2**20)], ids=["by task", "otherwise"])
def test_one_dataset_linked_from_many_places(path: Path, chunks: tuple[int, int]) -> None:
    with h5py.File(path, "r+") as file:
        del file["site"].attrs["index"]
        for site in ("site/1", "site/2"):
            del file[site]
        del file["task"], file["history"]
        file["task/index"] = np.array([b"0"])
        file["task/n_sample"] = np.array([1])
        file["task/finished"] = np.array([0.0])
        del file["site/0/gate"], file["logit"], file["mean"]
        file["site/0"].attrs["n_channels"] = 2**22
        data = file["site/0"].create_dataset(
            "gate", (1, 2**22), "f4", chunks=chunks, compression="gzip"
        )
        data[:] = 1
        for i in range(1, 60):
            group = file.create_group(f"site/{i}")
            for name, value in {**file["site/0"].attrs, "name": np.bytes_(f"s{i}")}.items():
                group.attrs[name] = value
            group["gate"] = data
    refused(path, TaskGates.load, "claims", memory=150 * 2**20)


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
        file.attrs["format_version"] = FORMAT_VERSION
    TaskGates.load(path)


def test_groups_in_circles(path: Path) -> None:
    with GateStore.open(path, "a") as store:
        store.write_result("evaluation/heldout", {"x": [1]})
    with h5py.File(path, "r+") as file:
        for i in range(20):
            file[f"evaluation/{i}"] = file["evaluation"]
            file[f"evaluation/heldout/root{i}"] = file["/"]
    started = time.process_time()
    with GateStore.open(path) as store:
        assert store.results == ("evaluation/heldout",)
        assert store.result("evaluation/heldout")[0]["x"].tolist() == [1]
    assert time.process_time() - started < 1
