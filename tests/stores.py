"""Gates and sub-architectures that hold everything there is, for the tests of their files."""

from __future__ import annotations

import json
from os import PathLike

import h5py
import numpy as np
import torch

from nad_attr.architecture import SubArchitecture
from nad_attr.gates import TaskGates
from nad_attr.history import History
from nad_attr.recipe import Recipe
from nad_attr.sites import GateSite

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


def write_version_1(value: TaskGates | SubArchitecture, path: str | PathLike[str]) -> None:
    """Write a file as format version 1 was written."""
    text = h5py.string_dtype()
    is_gates = isinstance(value, TaskGates)
    with h5py.File(path, "w") as file:
        file.attrs["format"] = "nad_attr"
        file.attrs["format_version"] = 1
        file.attrs["kind"] = "task_gates" if is_gates else "sub_architecture"
        file.attrs["created_by"] = "nad_attr 0.1.0, torch 2.4.0"
        tasks = value.tasks if is_gates else [value.task]
        file.create_dataset("task/index", data=[json.dumps(task) for task in tasks], dtype=text)
        if is_gates and value.task_names is not None:
            file.create_dataset("task/name", data=list(value.task_names), dtype=text)
        for order, site in enumerate(value.sites):
            group = file.create_group(f"site/{order}")
            group.attrs["name"] = site.name
            group.attrs["order"] = order
            group.attrs["channel_dim"] = site.channel_dim
            group.attrs["at_input"] = site.at_input
            if is_gates:
                data = value[site.name].numpy()
                group.create_dataset("gate", data=data, compression="gzip")
                if value.logits is not None:
                    data = value.logits[site.name].numpy()
                    group.create_dataset("logit", data=data, compression="gzip")
            else:
                data = value[site.name].to(torch.uint8).numpy()
                group.create_dataset("kept", data=data, compression="gzip")
            if value.means is not None:
                group.create_dataset("mean", data=value.means[site.name].numpy())
        if is_gates:
            file.attrs["info"] = json.dumps(value.info)
            if value.recipe is not None:
                file.attrs["recipe"] = value.recipe.to_json()
            for name, curve in (value.history or {}).items():
                file.create_dataset(f"history/{name}", data=curve, compression="gzip")


def write_version_2(value: TaskGates | SubArchitecture, path: str | PathLike[str]) -> None:
    """Write a file as format version 2 was written: logits and means at each site."""
    is_gates = isinstance(value, TaskGates)
    tasks = value.tasks if is_gates else [value.task]

    def text(content: str) -> np.ndarray:
        raw = content.encode()
        return np.array(raw, h5py.string_dtype("utf-8", max(1, len(raw))))

    def texts(group: h5py.Group, name: str, content: list[str]) -> None:
        raw = [each.encode() for each in content]
        kind = h5py.string_dtype("utf-8", max([1, *map(len, raw)]))
        compressed(group, name, np.array(raw, kind), (len(raw),))

    def compressed(
        group: h5py.Group, name: str, array: np.ndarray, chunks: tuple[int, ...], **options: object
    ) -> None:
        group.create_dataset(
            name,
            data=array,
            dtype=array.dtype,
            chunks=chunks,
            compression="gzip",
            compression_opts=1,
            **options,
        )

    with h5py.File(path, "w", libver=("v110", "v110")) as file:
        about = {
            "format": "nad_attr",
            "kind": "task_gates" if is_gates else "sub_architecture",
            "created_by": "nad_attr 0.1.0, torch 2.4.0",
        }
        if is_gates:
            about |= {
                "store": "0123456789abcdef",
                "created": "2026-01-01T00:00:00+00:00",
                "modified": "2026-01-01T00:00:00+00:00",
                "info": json.dumps(value.info),
                "provenance": json.dumps({"seed": 3}),
            }
            if value.recipe is not None:
                about["recipe"] = value.recipe.to_json()
            file.attrs["revision"] = np.int64(4)
        for name, content in about.items():
            file.attrs[name] = text(content)
        file.attrs["format_version"] = np.int64(2)
        group = file.create_group("task")
        texts(group, "index", [json.dumps(task) for task in tasks])
        if is_gates:
            if value.task_names is not None:
                texts(group, "name", list(value.task_names))
            compressed(group, "n_sample", np.full(len(tasks), 5), (len(tasks),))
            compressed(group, "finished", np.full(len(tasks), 1.5), (len(tasks),))
        index = []
        for order, site in enumerate(value.sites):
            group = file.create_group(f"site/{order}")
            numbers = [site.n_channels, site.channel_dim, int(site.at_input)]
            index.append([site.name, *numbers])
            group.attrs["name"] = text(site.name)
            group.attrs["order"] = np.int64(order)
            names = ("n_channels", "channel_dim", "at_input")
            for name, number in zip(names, numbers, strict=True):
                group.attrs[name] = np.int64(number)
            width = (site.n_channels,)
            if value.means is not None:
                compressed(group, "mean", value.means[site.name].numpy(), width)
            if is_gates:
                compressed(group, "gate", value[site.name].numpy(), (1, *width))
                if value.logits is not None:
                    compressed(group, "logit", value.logits[site.name].numpy(), (1, *width))
            else:
                compressed(group, "kept", value[site.name].to(torch.uint8).numpy(), width)
        file["site"].attrs["index"] = text(json.dumps(index))
        for name, curve in ((value.history if is_gates else None) or {}).items():
            group = file.require_group("history")
            compressed(group, name, curve, (len(curve), 1), fillvalue=np.nan)
