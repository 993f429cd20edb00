"""The benchmark of speed says what it measured, and compares with the recipe of the paper."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import learning_cost, savings, speed
from benchmarks.released_loop import ReleasedLoop
from nad_attr import Recipe, find_gate_sites, learn_gates
from tests.helpers import TinyCNN, build, labelled_images


def test_released_loop_is_the_papers_recipe() -> None:
    model, (x, _) = build(TinyCNN), labelled_images(40)
    with torch.no_grad():
        labels = model(x).argmax(1)
    k = int(labels.mode().values)
    own = x[labels == k][:8]
    sites = find_gate_sites(model, x)
    loop = ReleasedLoop(model, [(s.name, s.n_channels, s.channel_dim) for s in sites], 0.3)
    loop.logits = [
        torch.linspace(-1, 1, len(z), dtype=torch.float64).requires_grad_(True) for z in loop.logits
    ]
    start = {s.name: z.detach()[None].clone() for s, z in zip(sites, loop.logits, strict=True)}
    for _ in range(3):
        loop.step(own, torch.full((len(own),), k))
    gates = learn_gates(
        model,
        (own, torch.full((len(own),), k)),
        [k],
        Recipe.paper(beta=0.3, epochs=3),
        sites,
        initial_logits=start,
    )
    assert gates.logits is not None
    for name, scores in loop.scores().items():
        # Task gates hold float32.
        torch.testing.assert_close(scores.float(), gates.logits[name], rtol=1e-6, atol=1e-6)


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> learning_cost.Gateable:
        with torch.random.fork_rng(devices=[]):
            model = TinyCNN().eval()
            model.linear = nn.Linear(8, 4).eval()
        return model, find_gate_sites(model, torch.zeros(1, 3, 8, 8))

    def missing() -> learning_cost.Gateable:
        raise ImportError("no such package")

    monkeypatch.setattr(speed, "MODELS", {"resnet50": make, "vgg16": missing})
    for module in (learning_cost, savings):
        monkeypatch.setattr(module, "MODELS", {"resnet50": make})
    monkeypatch.setattr(learning_cost, "RECIPES", {"selection": lambda: Recipe(steps=24)})
    monkeypatch.setattr(speed, "CAPTUM_IMAGES", 3)


@pytest.mark.usefixtures("_tiny")
def test_benchmark_writes_what_it_says(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "speed.json"
    arguments = "--models resnet50 vgg16 --batch 4 --image-size 8 --repeats 1 --clock cpu"
    arguments += f" --sections steps released captum projection --json {path}"
    assert speed.main(arguments.split()) == 0
    found = json.loads(path.read_text())
    assert found["device"] == "cpu"
    assert any("vgg16" in what for what in found["skipped"])
    assert [row["precision"] for row in found["steps"]] == [
        "float32",
        "bfloat16 (autocast)",
        "bfloat16 (autocast)",
    ]
    assert all(row["time_ratio"] > row["kept_ratio"] > 0 for row in found["steps"])
    step = found["steps"][0]
    hours = {row["what"]: row["projected_hours"] for row in found["projection"]}
    recipe = Recipe()
    per_class = recipe.steps * recipe.images_per_step / step["step_images_per_second"]
    assert hours["default recipe, float32"] == pytest.approx(1000 * per_class / 3600)
    conductance = next(row for row in found["captum"] if row["method"] == "LayerConductance")
    expected = conductance["seconds_per_image_site_step"] * 2 * 3 * 50 * 1000 / 3600
    assert hours["LayerConductance, 3 images"] == pytest.approx(expected)
    out = capsys.readouterr().out
    assert "PROJECTION, not measured" in out
    assert "skipped: steps: vgg16" in out


@pytest.mark.usefixtures("_tiny")
def test_benchmark_growth_and_profile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(learning_cost, "peak_memory", lambda device, function: 1)
    arguments = "--models resnet50 --batch 4 --image-size 8 --repeats 1"
    speed.main([*arguments.split(), "--sections", "growth"])
    out = capsys.readouterr().out
    assert out.count("tasks  resnet50") == 4
    speed.main([*arguments.split(), "--profile"])
    assert "aten::" in capsys.readouterr().out


@pytest.mark.usefixtures("_tiny")
def test_benchmark_savings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    quick = {"selection": Recipe(ablation="mean", steps=24), "constants": Recipe(steps=24)}
    quick["paper"] = Recipe.paper(beta=0.3)
    recipes = {name: lambda recipe=recipe: recipe for name, recipe in quick.items()}
    monkeypatch.setattr(savings, "RECIPES", recipes)
    tried = [s for s in savings.SAVINGS if s.what[:10] in ("products o", "gate and d")]
    monkeypatch.setattr(speed, "SAVINGS", tried)
    path = tmp_path / "savings.json"
    arguments = "--models resnet50 --batch 4 --image-size 48 --repeats 2 --clock cpu"
    speed.main([*arguments.split(), "--sections", "savings", "--json", str(path)])
    rows = json.loads(path.read_text())["savings"]
    assert [row["what"] for row in rows] == [saving.what for saving in tried]
    assert all(len(row["time_ratios"]) == 2 and row["time_ratio"] > 0 for row in rows)
    assert [row["batch"] for row in rows] == [savings.UPDATE_BATCH, 4]
    assert rows[1]["memory_ratio"] > 1.05


@pytest.mark.parametrize("saving", savings.SAVINGS, ids=lambda saving: saving.what)
def test_without_a_saving_the_same_is_learned(
    saving: savings.Saving, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place, name, other in saving.off:
        assert getattr(place, name) is not other
    paper = saving.recipe == "paper"
    recipe = Recipe.paper(beta=0.3, epochs=2) if paper else Recipe(size=0.5, steps=8)
    found = []
    for context in (nullcontext(), savings.without(saving)):
        with context:
            found.append(learn_gates(build(TinyCNN), labelled_images(12), [0], recipe))
    for name in found[0]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("_tiny")
def test_benchmark_quality(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    model = build(TinyCNN).float()
    x, y = labelled_images(60)
    data = (x.float(), y, x.float(), y)
    monkeypatch.setattr(speed, "load_resnet", lambda *args: model)
    monkeypatch.setattr(speed, "load_cifar10", lambda *args, **kwargs: data)
    path = tmp_path / "speed.json"
    speed.main(f"--quick --sections quality --json {path}".split())
    rows = json.loads(path.read_text())["quality"]
    assert rows[0]["image_passes"] == 3 * 20  # 20 own images: forward twice, backward once
    # Steps times images, forward and backward, each image clean once; and two looks at the start.
    assert 2 * 5 * 4 < rows[1]["image_passes"] <= 2 * 5 * 4 + 60 + 2 * 2
