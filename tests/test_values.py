"""Values are equal if all that they hold is equal, and a set merges no different ones."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import pkgutil
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import nad_attr
from nad_attr import GateSite, Recipe
from nad_attr.evaluation import evaluate
from nad_attr.evaluation.controls.stability import Stability
from nad_attr.gates.history import History
from nad_attr.gates.recipe import PaperRecipe
from nad_attr.gates.task_gates import TaskGates

NAN = float("nan")


def test_histories_are_equal_by_their_numbers() -> None:
    curves = {"loss": np.array([[1.0, 2.0], [0.5, NAN]])}
    history = History(curves)
    assert history == History(curves)
    assert history != History({"loss": np.array([[1.0, 2.0], [0.5, 0.0]])})
    assert history != History({"loss": curves["loss"][:1]})
    assert history != History({"other": curves["loss"]})
    assert history != History({**curves, "other": curves["loss"]})
    assert history != History({})
    assert history != 3
    with pytest.raises(TypeError, match="unhashable"):
        hash(history)


def _other(value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value / 2 if isinstance(value, float) else value + 1
    if isinstance(value, str):
        others = {"optimal": "mean", "mean": "zero", "zero": "mean", "channels": "heads"}
        return others.get(value, value + "x")
    assert isinstance(value, tuple)
    return (*value, "features")


@pytest.mark.parametrize(
    "value", [Recipe(), Recipe.paper("vgg16"), GateSite("a", 4, 1)], ids=lambda v: type(v).__name__
)
def test_each_field_of_a_plain_value_counts(value: Recipe | GateSite) -> None:
    others = []
    for field in dataclasses.fields(value):
        now = getattr(value, field.name)
        if field.init and now is not None:
            if isinstance(value, PaperRecipe) and field.name == "ablation":
                continue  # has one value only
            others.append(dataclasses.replace(value, **{field.name: _other(now)}))
    assert len(others) > 3
    assert dataclasses.replace(value) == value
    assert all(a != b for a, b in itertools.combinations([value, *others], 2))
    assert len({value, *others, dataclasses.replace(value)}) == len(others) + 1


def _value_classes() -> Iterator[type]:
    for module in pkgutil.walk_packages(nad_attr.__path__, "nad_attr."):
        if any(part.startswith("_") for part in module.name.split(".")):
            continue
        try:
            found = importlib.import_module(module.name)
        except ImportError:  # of an extra
            continue
        for value in vars(found).values():
            if inspect.isclass(value) and value.__module__ == found.__name__:
                if dataclasses.is_dataclass(value):
                    yield value


def test_no_result_compares_arrays_as_if_they_were_numbers() -> None:
    """== of a generated dataclass asks an array for one truth value, and hash for its hash.

    Results that hold arrays are equal to themselves alone (eq=False), so that == and sets work.
    """
    wrong = [
        f"{cls.__module__}.{cls.__name__}.{field.name}"
        for cls in _value_classes()
        if cls.__dataclass_params__.eq  # type: ignore[attr-defined]
        for field in dataclasses.fields(cls)
        if re.search(r"Array|Tensor|Inputs|Scores", re.sub(r"Callable\[.*\]", "", str(field.type)))
    ]
    assert not wrong
    assert len(list(_value_classes())) > 40


def test_results_can_be_compared_and_put_into_sets() -> None:
    tables = np.ones((2, 2)), np.ones((2, 2))
    one, other = (Stability((0,), *tables, {}) for _ in range(2))
    assert one == one
    assert one != other
    assert len({one, other, one}) == 2


def test_sizes_are_counted_once_for_each_sub_architecture(monkeypatch) -> None:
    """Not once for each of them and each site: that is quadratic in the sites."""
    from nad_attr.gates.sub_architecture import SubArchitecture

    n_sites = 12
    model = torch.nn.Sequential(*(torch.nn.Identity() for _ in range(n_sites))).eval()
    sites = [GateSite(str(i), 2, 1) for i in range(n_sites)]
    data = torch.eye(2), torch.tensor([0, 1])
    counted = []
    counts = SubArchitecture.sizes.fget
    assert counts is not None

    def sizes(self: SubArchitecture) -> dict[str, float]:
        counted.append(1)
        return counts(self)

    monkeypatch.setattr(SubArchitecture, "sizes", property(sizes))
    gates = TaskGates({s.name: torch.ones(2, 2) for s in sites}, sites, [0, 1])
    result = evaluate(model, gates, data, n_random=3)
    assert list(result.sizes) == [site.name for site in sites]
    # The whole network, the gates and three draws, of two tasks each, by channels, multiply-adds
    # and parameters.
    assert len(counted) <= 3 * 2 * (1 + 1 + 3)
