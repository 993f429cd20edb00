"""The check of every GPU claim: all its parts run small on a CPU, and its time is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks import gpu_check, learning_cost, speed
from nad_attr.gates.recipe import Recipe
from nad_attr.sites.finding import find_gate_sites
from tests.helpers import TinyCNN


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> learning_cost.Gateable:
        model = TinyCNN().eval()
        model.linear = nn.Linear(8, 12).eval()
        return model, find_gate_sites(model, torch.zeros(1, 3, 32, 32))

    monkeypatch.setattr(learning_cost, "MODELS", {"tiny": build})
    monkeypatch.setattr(speed, "MODELS", {"tiny": build})
    monkeypatch.setitem(speed.BATCHES, "tiny", 4)
    monkeypatch.setitem(learning_cost.RECIPES, "constants", lambda: Recipe(steps=24))


ARGUMENTS = ["--device", "cpu", "--small", "--models", "tiny", "--tests", "tests/test_responses.py"]


def test_all_parts_run_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"passed": True, "said": "1 skipped"}
    monkeypatch.setattr(gpu_check.GPUCheck, "tests", lambda check: said)  # see the next test
    path = tmp_path / "gpu.json"
    assert gpu_check.main([*ARGUMENTS, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert set(gpu_check.PARTS) <= set(found)
    assert (found["failed"], found["left_out"], found["device"]) == ({}, [], "cpu")
    (step,), (hours,) = found["steps"], found["projection"]
    assert step["time_ratio"] > 0
    assert step["released_ratio"] > 0
    assert step["step_mb"] > 0
    default = Recipe()
    images = 1000 * default.steps * default.images_per_step
    assert hours["projected_hours"] == pytest.approx(images / step["images_per_second"] / 3600)
    assert hours["projected_hours_20_replicas"] == pytest.approx(20 * hours["projected_hours"])
    assert "not measured" in hours["note"]
    (batch,), (replicas,) = found["batches"], found["replicas"]
    assert batch["learning"] >= batch["width"] >= 1 <= batch["evaluation"]
    assert replicas["side_by_side_images_per_second"] > 0


@pytest.mark.slow
def test_the_tests_marked_gpu_are_run() -> None:
    check = gpu_check.GPUCheck(gpu_check._parser().parse_args(ARGUMENTS))
    found = check.tests()
    if not torch.cuda.is_available():
        assert "skipped" in found["said"]
    assert found["passed"]


def test_a_part_that_fails_is_named_and_time_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def steps(check: gpu_check.GPUCheck, name: str) -> dict[str, str]:
        if name == "large":
            raise RuntimeError("out of memory")
        return {"model": name}

    monkeypatch.setattr(gpu_check.GPUCheck, "steps", steps)
    times = iter([0.0, 0.0, 1.0, 2.0, 3.0, 100.0])
    arguments = [*ARGUMENTS, "--parts", "steps", "replicas", "--minutes", "1"]
    arguments += ["--models", "large", "tiny"]
    monkeypatch.setitem(speed.BATCHES, "large", 4)
    path = tmp_path / "gpu.json"
    status = gpu_check.main([*arguments, "--json", str(path)], clock=lambda: next(times))
    assert status == 1
    found = json.loads(path.read_text())
    assert found["failed"] == {"steps large": "RuntimeError: out of memory"}
    assert found["steps"] == [{"model": "tiny"}]  # the network that did not fail
    assert "left out, for want of time: replicas large" in capsys.readouterr().out


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 2
    assert "there is no GPU here" in capsys.readouterr().err


def test_a_projection_from_other_rates_says_which(tmp_path: Path) -> None:
    row = {"model": "tiny", "precision": "float32", "channels_last": False}
    rates = {"device": "cpu", "threads": 1, "steps": [{**row, "step_images_per_second": 4.0}]}
    file, path = tmp_path / "speed.json", tmp_path / "gpu.json"
    file.write_text(json.dumps(rates))
    given = ["--parts", "projection", "--rates", str(file), "--assume", "2500"]
    assert gpu_check.main([*ARGUMENTS, *given, "--json", str(path)]) == 0
    measured, assumed = json.loads(path.read_text())["projection"]
    assert measured["rates"] == "measured on cpu, 1 thread, float32"
    assert "ASSUMED" in assumed["rates"]
    assert assumed["projected_hours_20_replicas"] == pytest.approx(40e6 / 2500 / 3600)
    assert gpu_check.main([*ARGUMENTS, "--parts", "projection"]) == 1
