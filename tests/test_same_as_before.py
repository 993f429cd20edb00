"""Gates, evaluations and stores are the same as in version 0.1.0.

``tests/stored/`` holds what that version computed. ``python -m tests.test_same_as_before FOLDER``
computes it anew; do so only when a change of results is meant, and say so in the changelog.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import PaperRecipe, Recipe, TaskGates, learn_gates, learn_sizes
from nad_attr.evaluation import evaluate
from tests.helpers import TinyResNet

STORED = Path(__file__).parent / "stored"
RECIPES: dict[str, Recipe | PaperRecipe] = {
    "mean": Recipe(size=0.4, ablation="mean", steps=12, images_per_step=8),
    "zero": Recipe(size=0.6, ablation="zero", steps=12, images_per_step=8, boundary=0.0),
    "paper": PaperRecipe(beta=0.5, epochs=2),
}
ALL = [*RECIPES, "sizes"]
MEASURES = (
    *("size", "table", "fidelity", "rank_fidelity", "margin_auc", "recall", "fpr"),
    *("other_accuracy", "flop_size", "parameter_size", "dead_fraction", "detector_ba"),
    *("overlap", "kappa"),
)


def network() -> nn.Module:
    """A residual network whose weights come from NumPy, the same with every version of torch."""
    model = TinyResNet().double().eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = max(parameter[0].numel(), 1) if parameter.ndim > 1 else 4
            values = rng.standard_normal(tuple(parameter.shape)) / size**0.5
            parameter.copy_(torch.from_numpy(values))
    return model


def data(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images that differ by class in one colour, and their labels."""
    rng = np.random.default_rng(seed)
    images = rng.random((n, 3, 8, 8))
    labels = np.arange(n) % 3
    images[np.arange(n), labels] += 0.5
    return torch.from_numpy(images), torch.from_numpy(labels)


def learned(name: str) -> TaskGates:
    """Gates of three tasks, by one of the recipes, or "sizes": the smaller of two from one run."""
    if name == "sizes":
        recipe = Recipe(ablation="mean", steps=12, images_per_step=8)
        return learn_sizes(network(), [0.7, 0.3], data(36, 1), recipe=recipe)[0.3]
    return learn_gates(network(), data(36, 1), recipe=RECIPES[name])


def measured(gates: TaskGates) -> dict[str, Any]:
    """The measures of an evaluation, and of its random channels, as plain numbers."""
    result = evaluate(network(), gates, data(30, 2), threshold_data=data(36, 1), n_random=2)
    return {
        who: {name: np.asarray(getattr(part, name)).tolist() for name in MEASURES}
        for who, part in {"own": result, "random": result.random[0], "whole": result.whole}.items()
    }


@pytest.mark.parametrize("name", ALL)
def test_gates_are_the_same(name: str) -> None:
    gates, before = learned(name), TaskGates.load(STORED / f"{name}.h5")
    assert (gates.tasks, gates.sites) == (before.tasks, before.sites)
    for site in gates:
        if name == "paper":  # soft gates: processors round differently
            torch.testing.assert_close(gates[site], before[site], rtol=0, atol=1e-6)
        else:
            assert torch.equal(gates[site], before[site])


@pytest.mark.parametrize("name", ALL)
def test_evaluations_are_the_same(name: str) -> None:
    before = json.loads((STORED / "evaluations.json").read_text())[name]
    found = measured(TaskGates.load(STORED / f"{name}.h5"))
    assert {who: set(part) for who, part in found.items()} == {
        who: set(part) for who, part in before.items()
    }
    for who, part in before.items():
        for key, value in part.items():
            np.testing.assert_allclose(found[who][key], value, rtol=1e-9, atol=1e-12)


def test_a_store_of_before_is_read_whole_and_written_the_same(tmp_path: Path) -> None:
    def contents(path: Path) -> dict[str, Any]:
        found: dict[str, Any] = {}

        def visit(name: str, node: Any) -> None:
            found[name] = {key: np.asarray(value).tolist() for key, value in node.attrs.items()}
            if isinstance(node, h5py.Dataset):
                found[name]["values"] = np.asarray(node[()]).tolist()

        with h5py.File(path) as file:
            file.visititems(visit)
            found["/"] = {key: np.asarray(value).tolist() for key, value in file.attrs.items()}
        for name in ("created", "created_by", "modified", "provenance", "store"):
            del found["/"][name]  # when, where, and by which version
        del found["task/finished"]["values"]
        return found

    before = STORED / "mean.h5"
    TaskGates.load(before).save(tmp_path / "again.h5")
    assert contents(tmp_path / "again.h5") == contents(before)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    evaluations = {}
    for each in ALL:
        found = learned(each)
        found.save(folder / f"{each}.h5")
        evaluations[each] = measured(found)
    (folder / "evaluations.json").write_text(json.dumps(evaluations))
