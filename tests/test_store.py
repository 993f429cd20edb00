"""Files of gates and of sub-architectures: everything comes back, from version 1 as well."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nad_attr
from nad_attr.architecture import SubArchitecture
from nad_attr.gates import TaskGates
from nad_attr.recipe import PaperRecipe, Recipe
from nad_attr.sites import GateSite
from nad_attr.store import FORMAT_VERSION, GateStore, GateStoreError, _content
from tests.stores import SITES, assert_same, make_arch, make_gates, write_version_1


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of task gates that holds everything there is."""
    make_gates().save(tmp_path / "gates.h5")
    return tmp_path / "gates.h5"


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
        assert file.attrs["format"] == b"nad_attr"
        assert file.attrs["format_version"] == FORMAT_VERSION == 2
        assert file.attrs["kind"] == b"task_gates"
        assert file.attrs["created_by"].startswith(
            f"nad_attr {nad_attr.__version__}, torch ".encode()
        )
        assert json.loads(file.attrs["recipe"])["size"] == 0.3
        assert json.loads(file.attrs["info"])["seed"] == 3
        assert set(json.loads(file.attrs["provenance"])["environment"]) >= {"torch", "python"}
        assert [json.loads(t) for t in file["task/index"].asstr()] == [7, [1, 2], 0]
        assert list(file["task/name"].asstr()) == ["tabby", "großer Hund", "猫"]
        assert file["task/n_sample"][:].tolist() == [-1, -1, -1]
        assert file["task/finished"].dtype == np.float64
        assert set(file["site"]) == {"0", "1", "2"}
        for i, site in enumerate(SITES):
            group = file[f"site/{i}"]
            assert dict(group.attrs) == {
                "name": site.name.encode(),
                "order": i,
                "channel_dim": site.channel_dim,
                "at_input": site.at_input,
                "n_channels": site.n_channels,
            }
            for key in ("gate", "logit"):
                assert group[key].dtype == np.float32
                assert group[key].chunks == (1, site.n_channels)
                assert group[key].compression == "gzip"
            np.testing.assert_array_equal(group["gate"], gates[site.name])
            np.testing.assert_array_equal(group["logit"], gates.logits[site.name])
            np.testing.assert_array_equal(group["mean"], gates.means[site.name])
        np.testing.assert_array_equal(file["history/loss"], gates.history["loss"])
        assert file["history/loss"].chunks == (2, 1)
    make_arch().save(path)
    with h5py.File(path) as file:
        assert file.attrs["kind"] == b"sub_architecture"
        assert file["site/0/kept"].dtype == np.uint8
        assert file["site/0/kept"][:].tolist() == [1, 0, 1]


def test_files_that_another_program_wrote_anew(path: Path, tmp_path: Path) -> None:
    """As h5repack does: other chunks, other filters, none at all."""
    for i, options in enumerate(
        (
            {},
            {"chunks": (2, 2)},
            {"chunks": (3, 2), "compression": "gzip", "shuffle": True, "fletcher32": True},
            {"chunks": True, "fletcher32": True},
        )
    ):
        other = tmp_path / f"{i}.h5"
        with h5py.File(path) as old, h5py.File(other, "w", libver=("v110", "v110")) as new:
            new.attrs.update(old.attrs)
            for group in ("task", "history"):
                old.copy(group, new)
            for number in old["site"]:
                group = new.create_group(f"site/{number}")
                group.attrs.update(old[f"site/{number}"].attrs)
                for key, data in old[f"site/{number}"].items():
                    group.create_dataset(key, data=data, **(options if data.ndim == 2 else {}))
        assert_same(TaskGates.load(other), make_gates())
        with GateStore.open(other) as store:
            assert store.read([0]) == make_gates().select([0])
    with h5py.File(other, "a") as file:
        data = file["site/0/gate"][:]
        del file["site/0/gate"]
        file["site/0"].create_dataset("gate", data=data, compression="lzf")
    with pytest.raises(GateStoreError, match="filters"):
        TaskGates.load(other)


# ---------------------------------------------------------------------------------------------
# Version 1
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"logits": None, "means": None, "history": None}])
def test_files_of_version_1_are_read(tmp_path: Path, changes: dict[str, object]) -> None:
    gates, path = make_gates(**changes), tmp_path / "gates.h5"
    write_version_1(gates, path)
    before = path.read_bytes()
    assert_same(TaskGates.load(path), gates)
    with GateStore.open(path) as store:
        assert store.tasks == gates.tasks
        assert store.read([0]) == gates.select([0])
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["gates.h5"]


def test_sub_architectures_of_version_1_are_read(tmp_path: Path) -> None:
    write_version_1(make_arch(), tmp_path / "arch.h5")
    again = SubArchitecture.load(tmp_path / "arch.h5")
    assert again == make_arch()
    assert again.task == (1, 2)
    assert all(torch.equal(again.means[n], m) for n, m in make_arch().means.items())
    with pytest.raises(GateStoreError, match="holds 'sub_architecture', not 'task_gates'"):
        TaskGates.load(tmp_path / "arch.h5")


def test_writing_to_a_file_of_version_1_makes_it_one_of_version_2(tmp_path: Path) -> None:
    gates, path = make_gates(), tmp_path / "gates.h5"
    write_version_1(gates.select([7, 0]), path)
    with GateStore.open(path, "a") as store:
        assert store.append(gates) == ((1, 2),)
    with h5py.File(path) as file:
        assert file.attrs["format_version"] == 2
    assert os.listdir(tmp_path) == ["gates.h5"]
    assert_same(TaskGates.load(path).select(gates.tasks), gates)


# ---------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_content, "put_sites", interrupt)
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
