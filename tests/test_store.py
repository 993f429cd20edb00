"""Files of gates and of sub-architectures are read back completely, also those of old versions."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nad_attr
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.store import FORMAT_VERSION, GateStore, GateStoreError
from tests.stores import (
    SITES,
    assert_same,
    make_arch,
    make_gates,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of task gates with all optional content."""
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
    """In the alphabetical order of the file, site 10 comes before site 2."""
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
        assert file.attrs["format_version"] == FORMAT_VERSION == 3
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
        columns = json.loads(file["logit"].attrs["columns"])
        assert columns == [["layer1.0", 0, 3], ["blocks.1", 3, 5], ["head", 5, 9]]
        assert json.loads(file["mean"].attrs["columns"]) == columns
        assert file["logit"].chunks == (1, 9)
        assert file["mean"].shape == (9,)
        for data in (file["logit"], file["mean"]):
            assert data.dtype == np.float32
            assert data.compression == "gzip"
        for i, site in enumerate(SITES):
            group = file[f"site/{i}"]
            assert dict(group.attrs) == {
                "name": site.name.encode(),
                "order": i,
                "channel_dim": site.channel_dim,
                "at_input": site.at_input,
                "n_channels": site.n_channels,
            }
            assert set(group) == {"gate"}
            assert group["gate"].dtype == np.float32
            assert group["gate"].chunks == (1, site.n_channels)
            assert group["gate"].compression == "gzip"
            np.testing.assert_array_equal(group["gate"], gates[site.name])
            name, start, end = columns[i]
            assert name == site.name
            np.testing.assert_array_equal(file["logit"][:, start:end], gates.logits[site.name])
            np.testing.assert_array_equal(file["mean"][start:end], gates.means[site.name])
        np.testing.assert_array_equal(file["history/loss"], gates.history["loss"])
        assert file["history/loss"].chunks == (2, 1)
    make_arch().save(path)
    with h5py.File(path) as file:
        assert file.attrs["kind"] == b"sub_architecture"
        assert file["site/0/kept"].dtype == np.uint8
        assert file["site/0/kept"][:].tolist() == [1, 0, 1]
        assert file["mean"][:].tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3]


def repacked(path: Path, other: Path, options: dict[str, Any]) -> None:
    """Rewrite a file as h5repack does, tables with other chunks and filters."""

    def copy(old: h5py.Group, new: h5py.Group) -> None:
        new.attrs.update(old.attrs)
        for name, item in old.items():
            if isinstance(item, h5py.Group):
                copy(item, new.create_group(name))
            elif item.dtype.kind == "f":
                table = dict(options) if item.ndim == 2 else {}
                if isinstance(table.get("chunks"), tuple):
                    table["chunks"] = tuple(np.minimum(table["chunks"], item.shape).tolist())
                data = new.create_dataset(name, data=item, fillvalue=item.fillvalue, **table)
                data.attrs.update(item.attrs)
            else:
                old.copy(name, new)

    with h5py.File(path) as old, h5py.File(other, "w", libver=("v110", "v110")) as new:
        copy(old, new)


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
        repacked(path, other, options)
        assert_same(TaskGates.load(other), make_gates())
        with GateStore.open(other) as store:
            assert store.read([0]) == make_gates().select([0])
        # Earlier reading does not count towards the limit.
        more = make_gates(task_names=["a", "b", "c"])
        more.tasks = (4, 5, 6)
        with GateStore.open(other, "a") as store:
            store.read()
            assert store.append(more) == (4, 5, 6)
        assert_same(TaskGates.load(other).select(make_gates().tasks), make_gates())
        assert_same(TaskGates.load(other).select([4, 5, 6]), more)
    with h5py.File(other, "a") as file:
        data = file["site/0/gate"][:]
        del file["site/0/gate"]
        file["site/0"].create_dataset("gate", data=data, compression="lzf")
    with pytest.raises(GateStoreError, match="filters"):
        TaskGates.load(other)
