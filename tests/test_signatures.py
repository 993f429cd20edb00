"""One order of arguments: the model, what it is about, the data; options follow."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "docs" / "_ext"))
from public_names import PublicName, public_names

MODEL = {"model", "network"}
DATA = {"data", "dataset", "images", "image", "inputs", "example_inputs", "photos", "batches"}
#: What belongs to the images, and where the outcome goes, may stand behind the images.
WITH_DATA = {"held_out", "label", "labels", "numbers", "target", "targets"}
LAST = {"album", "folder", "path", "run"}
#: Words that have one name each: the limit of memory, and the number that is asked for.
FORMER = {"memory_budget", "max_memory", "budget_bytes", "memory", "metric", "metrics"}


def calls(name: PublicName) -> Iterator[tuple[str, list[inspect.Parameter]]]:
    """A function, or a class's constructor and public methods, with what they take."""
    value: Any = name.value
    found = [] if dataclasses.is_dataclass(value) else [(name.path, value)]
    if inspect.isclass(value):
        found += [
            (f"{name.path}.{key}", getattr(value, key))
            for key in vars(value)
            if not key.startswith("_") and callable(getattr(value, key))
        ]
    for path, function in found:
        if callable(function) and not (inspect.isclass(function) and function is not value):
            try:
                given = inspect.signature(function).parameters.values()
            except ValueError:  # of a built-in type
                continue
            yield path, [p for p in given if p.name != "self"]


CALLS = dict(sorted(call for name in public_names() for call in calls(name)))


def test_the_public_calls_are_found() -> None:
    assert len(CALLS) > 500
    for path in ("nad_attr.learn_gates", "nad_attr.GateStore.append", "nad_attr.flow.agreement"):
        assert path in CALLS


def required(path: str) -> list[str]:
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [p.name for p in CALLS[path] if p.default is p.empty and p.kind in kinds]


@pytest.mark.parametrize("path", [path for path in CALLS if MODEL & {*required(path)}])
def test_the_model_then_what_it_is_about_then_the_data(path: str) -> None:
    names = required(path)
    assert names[0] in MODEL
    at = [i for i, name in enumerate(names) if name in DATA]
    if at:
        assert {*names[at[0] :]} <= DATA | WITH_DATA | LAST


def test_memory_and_measures_have_one_word() -> None:
    """The metric of learning's model is one of geometry."""
    assert not [
        path
        for path, given in CALLS.items()
        if "learning.constants" not in path and FORMER & {p.name for p in given}
    ]
