"""The benchmark of a learning step's cost runs, and writes what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import learning_cost
from nad_attr.gates.recipe import Recipe
from nad_attr.gating.hooks import frozen
from nad_attr.sites.finding import find_gate_sites
from tests.helpers import TinyCNN

SIZE = 8


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> learning_cost.Gateable:
        model = TinyCNN().eval()
        # A task output per task: the benchmark takes tasks 0, 1, ... of the network's classes.
        model.linear = nn.Linear(8, 4).eval()
        return model, find_gate_sites(model, torch.zeros(1, 3, SIZE, SIZE))

    monkeypatch.setattr(learning_cost, "MODELS", {"tiny": build})
    recipes = {
        "selection": lambda: Recipe(steps=24, ablation="mean"),
        "constants": lambda: Recipe(steps=24, ablation="optimal"),
        "paper": lambda: Recipe.paper(beta=0.02),
    }
    monkeypatch.setattr(learning_cost, "RECIPES", recipes)


def _check(row: learning_cost.Row, tasks: int) -> None:
    assert row["tasks"] == tasks
    assert row["rows"] * row["images_per_step"] == row["batch"] <= 8
    assert row["channels"] == 14
    assert (row["image_size"], row["dtype"]) == (SIZE, "float32")
    assert set(row["parts"]) == {"clean", "gated forward", "backward", "update"}
    assert all(seconds > 0 for seconds in row["parts"].values())
    assert row["step_seconds"] > 0
    assert row["time_ratio"] > 0
    assert len(row["time_ratios"]) == 2
    assert row["memory_ratio"] == row["step_memory"] / row["bare_memory"] > 0


@pytest.mark.parametrize("recipe", ["selection", "constants", "paper"])
def test_rows(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--model tiny --recipe {recipe} --batch 8 --tasks 1 3 --images-per-step 3"
    learning_cost.main(
        [*arguments.split(), "--image-size", str(SIZE), "--repeats", "2", "--json", "-"]
    )
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert [row["recipe"] for row in rows] == [recipe] * 2
    _check(rows[0], 1)
    assert rows[0]["rows"] == 1
    _check(rows[1], 3)
    assert rows[1]["rows"] == 2
    assert "memory ratio" in captured.err


def test_file_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "cost.json"
    learning_cost.main(
        f"--model tiny --recipe paper --batch 4 --image-size {SIZE} --repeats 2 --clock cpu "
        f"--json {path}".split()
    )
    (row,) = json.loads(path.read_text())
    assert row["clock"] == "cpu"
    assert capsys.readouterr().out.splitlines()[0].split()[:2] == ["model", "recipe"]


def test_memory_counts_the_gates_of_all_tasks() -> None:
    few, many = (
        learning_cost.measure(
            "tiny", recipe="paper", batch=4, tasks=tasks, image_size=SIZE, repeats=1
        )
        for tasks in (1, 1001)
    )
    assert many["bare_memory"] == few["bare_memory"]
    assert many["step_memory"] - few["step_memory"] >= 1000 * 14 * 4


def test_peak_memory_is_what_lives_at_once() -> None:
    def work() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        (second * 2).sum()

    assert learning_cost.peak_memory(torch.device("cpu"), work) == pytest.approx(8000, abs=200)


def test_bare_passes_are_the_gradient_at_the_first_site() -> None:
    model, sites = learning_cost.MODELS["tiny"]()
    images = torch.randn(2, 3, SIZE, SIZE)
    classes = torch.tensor([[1], [3]])
    with frozen(model):
        gradient = learning_cost.BarePasses(model, sites[0])(images, classes)
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(sites[0].name).register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    outputs = model(images)
    handle.remove()
    (expected,) = torch.autograd.grad(outputs.gather(1, classes).sum(), seen[-1])
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"tasks": 0}, {"recipe": "best"}])
def test_wrong_arguments(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        learning_cost.measure("tiny", image_size=SIZE, **wrong)  # type: ignore[arg-type]
