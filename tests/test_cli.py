"""The command line: every command on a tiny network and tiny photos; what is wrong in a line."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import nad_attr
from nad_attr import ChannelCertainty, Recipe, TaskGates, Verdict, cli
from nad_attr.evaluation import Evaluation
from nad_attr.learning import runs
from nad_attr.store import GateStore, read_result
from tests.helpers import fit_briefly, invoke, learn_briefly

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("typer")

ROOT = Path(__file__).resolve().parent.parent
CLASSES = ("blue", "green", "red")

MODULE = '''
import torch
from torch import nn


class Colours(nn.Module):
    """Calls a photo by its strongest colour."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 1, bias=False)
        self.relu = nn.ReLU()
        self.mix = nn.Conv2d(6, 6, 1, bias=False)
        self.relu2 = nn.ReLU()
        self.linear = nn.Linear(6, 3, bias=False)
        with torch.no_grad():
            eye = torch.eye(3)
            self.conv.weight.copy_(torch.cat([eye, -eye])[:, :, None, None])
            self.mix.weight.copy_(torch.eye(6)[:, :, None, None])
            self.linear.weight.copy_(gain * torch.cat([eye, -eye], dim=1).flip(0))

    def forward(self, x):
        x = self.relu2(self.mix(self.relu(self.conv(x))))
        return self.linear(x.mean((2, 3)))


def colours(gain=1.0):
    return Colours(gain)


class Tokens(nn.Module):
    """Attention among the pixels of a photo, and an MLP."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 6, 4, stride=4)
        self.layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(self.first(x).flatten(2).transpose(1, 2)).mean(1))


def tokens():
    torch.manual_seed(0)
    return Tokens()


def fails():
    raise RuntimeError("out of luck")


def noisy():
    net = colours()
    relu2 = net.relu2
    net.relu2 = torch.nn.Sequential(relu2, Noise())
    return net


class Noise(torch.nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


def transform():
    return lambda image: torch.zeros(3, 4, 4)


def grey():
    return lambda image: torch.zeros(1, 4, 4)


def number():
    return lambda image: 5


class Reds(Colours):
    """One output, or one number: how red a photo is."""

    def forward(self, x):
        return super().forward(x)[:, 2]


def reds():
    return Reds()


def maps():
    return torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), torch.nn.ReLU())


def as_it_is():
    import numpy as np
    return lambda image: torch.as_tensor(np.array(image)).permute(2, 0, 1) / 255
'''


def succeeds(*arguments: object) -> str:
    outcome = invoke(*arguments)
    assert outcome.exit_code == 0, outcome.output
    return outcome.output


def fails(code: int, message: str, *arguments: object) -> None:
    """One readable line, no traceback."""
    outcome = invoke(*arguments)
    text = " ".join(outcome.output.split())
    assert outcome.exit_code == code, outcome.output
    assert message in text, outcome.output
    assert "Traceback" not in text
    assert sum(line.startswith("Error") for line in outcome.output.splitlines()) <= 1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a user's module, photos to learn from, held-out ones, and gates."""
    root = tmp_path_factory.mktemp("user")
    (root / "colour_nets.py").write_text(MODULE)
    random = np.random.default_rng(0)
    for split, n in (("train", 8), ("val", 5)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 160, (8, 8, 3))
                pixels[:, :, 2 - label] += 70
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    torch.save(torch.nn.Linear(2, 2).state_dict(), root / "other.pt")
    (root / "text.h5").write_text("no store")
    before = os.getcwd()
    os.chdir(root)
    try:
        succeeds(*LEARN, "--out", "gates.h5")
        succeeds(*LEARN, "--out", "red.h5", "--tasks", "red", "-q")
        succeeds(*LEARN, "--out", "rest.h5", "--tasks", "0-1", "-q")
    finally:
        os.chdir(before)
    return root


MODEL = ("--model", "colour_nets:colours")
LEARN = ("learn", *MODEL, "--data", "train", "--size", "0.5", "--steps", "4", "--device", "cpu")
NEW = (*LEARN, "--out", "new.h5")
MINE = ("gates.h5", "--trust-file")
EVALUATE = ("evaluate", *MINE, "--data", "val")


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


# ---------------------------------------------------------------------------------------------
# A user's session
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_help_has_examples_for_every_command() -> None:
    text = succeeds("--help")
    for command in cli.app().registered_commands:
        name = command.callback.__name__
        assert f"  {name} " in text
        lines = [line.strip() for line in succeeds(name, "--help").splitlines()]
        assert any(line.startswith(f"nad-attr {name}") for line in lines), lines
    assert "--install-completion" in text


@pytest.mark.slow
def test_sites() -> None:
    text = succeeds("sites", *MODEL, "--input", "3x8x8", "--json", "sites.json")
    assert [line.split()[:4] for line in text.splitlines() if "ReLU" in line] == [
        ["0", "relu", "ReLU", "6"],
        ["1", "relu2", "ReLU", "6"],
    ]
    assert "12" in text
    entries = json.loads(Path("sites.json").read_text())
    assert [entry["name"] for entry in entries] == ["relu", "relu2"]
    assert "mix" in succeeds("sites", *MODEL, "--layer", "mix", "-q")


def test_heads_and_neurons(here: Path) -> None:
    model = ("--model", "colour_nets:tokens")
    text = succeeds("sites", *model, "--input", "3x8x8", "--units", "heads,neurons")
    for part in ("layer.self_attn.out_proj", "2 heads", "8 neurons"):
        assert part in text
    learn = ["learn", *model, *LEARN[3:], "--units", "heads, neurons", "--out", "heads.h5"]
    succeeds(*learn)
    gates = TaskGates.load("heads.h5")
    assert [site.units for site in gates.sites] == ["heads", "neurons"]
    assert all(arch.n_kept == 5 for arch in gates.sub_architectures())
    text = succeeds("evaluate", "heads.h5", "--data", "val", "--trust-file")
    assert "0.500" in text
    message = "--units takes channels, heads, neurons, got 'head'."
    fails(2, message, "sites", *model, "--units", "head")
    fails(2, "give one of the two", *learn, "--layer", "layer", "--overwrite")


@pytest.mark.slow
def test_sites_of_torchvision() -> None:
    pytest.importorskip("torchvision")
    text = succeeds("sites", "--model", "torchvision:resnet18")
    assert "images 3x224x224" in text
    assert "layer4.1" in text
    assert "1,984" in text


@pytest.mark.slow
def test_a_network_that_is_refused_can_be_gone_on_with(here: Path) -> None:
    learn = (*LEARN, "--out", "doubt.h5", "--model", "colour_nets:noisy")
    fails(1, "(--checks warn) to go on", *learn)
    assert not Path("doubt.h5").exists()
    assert "Warning: the network gives another output each time" in succeeds(
        *learn, "--checks", "warn"
    )
    evaluate = ("evaluate", "doubt.h5", "--trust-file", "--data", "val")
    fails(1, "(--checks warn) to go on", *evaluate)
    assert "another output" not in succeeds(*evaluate, "--checks", "off")


@pytest.mark.slow
def test_learn_says_what_it_chose(here: Path) -> None:
    text = succeeds(*LEARN, "--out", "noisy.h5", "--tasks", "green")
    for part in (
        "model: colour_nets:colours",
        "images: as they are, mean 0.485 0.456 0.406",
        "--resize, --crop, --mean, --std or --transform change it",
        "24 images in train, 3 class folders: blue = 0, green = 1, red = 2",
        "noisy.h5: 1 task, 2 sites, 12 channels (1 learned in",
        "nad-attr evaluate noisy.h5",
    ):
        assert part in text, text
    assert succeeds(*LEARN, "--out", "quiet.h5", "--tasks", "1", "-q").strip() == ""


def test_learned_gates_are_those_of_the_library(here: Path) -> None:
    gates = TaskGates.load("gates.h5")
    assert gates.tasks == (0, 1, 2)
    assert gates.task_names == CLASSES
    assert gates.recipe is not None
    assert (gates.recipe.size, gates.recipe.steps) == (0.5, 4)
    assert all(arch.n_kept == 6 for arch in gates.sub_architectures())
    with GateStore.open("gates.h5") as store:
        facts = store.provenance
    assert facts["model"] == "colour_nets:colours"
    assert facts["folders"] == {"blue": 0, "green": 1, "red": 2}
    assert facts["transform"]["kind"] == "options"
    # The same whatever else was learned, and with loader workers.
    assert TaskGates.load("red.h5").gates_of("red").keys() == gates.gates_of("red").keys()


def test_constants_of_each_task_and_of_each_rival(here: Path) -> None:
    succeeds(*LEARN, "--out", "constants.h5", "--ablation", "optimal", "--size", "0.5", "-q")
    gates = TaskGates.load("constants.h5")
    assert gates.constants is not None
    assert "best constants" in succeeds("inspect", "constants.h5")
    text = succeeds(
        *("compare", "constants.h5", "--trust-file", "--with", "taylor", "--data", "val"),
        *("--images", "4"),
    )
    assert "fitting constants: taylor" in text


def test_size_from_a_target(here: Path) -> None:
    wanted = ("learn", *MODEL, "--device", "cpu", "--steps", "16", "--fidelity", "0.5")
    fails(1, "5 images kept apart for task 0", *wanted, "--data", "train", "--out", "new.h5")
    for path in (here / "train").glob("*/*.png"):  # twice as many
        for name in ("a", "b"):
            copy = here / "more" / path.parent.name / f"{name}{path.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    succeeds(*wanted, "--data", "more", "--out", "target.h5", "--tasks", "red", "-q")
    assert TaskGates.load("target.h5").recipe == Recipe(fidelity=0.5, steps=16)
    assert "fidelity=0.5" in succeeds("inspect", "target.h5")


def test_the_published_recipe(here: Path) -> None:
    succeeds(
        *("learn", *MODEL, "--data", "train", "--out", "paper.h5", "--device", "cpu"),
        *("--recipe", "paper", "--beta", "0.5", "--epochs", "2", "--tasks", "red"),
    )
    recipe = TaskGates.load("paper.h5").recipe
    assert type(recipe).__name__ == "PaperRecipe"
    assert (recipe.beta, recipe.epochs) == (0.5, 2)


def test_a_verdict_and_its_place_in_the_report(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("plotly")
    fit_briefly(monkeypatch)
    learn_briefly(monkeypatch, images_per_step=4)
    (here / "judged.h5").write_bytes((here / "gates.h5").read_bytes())
    (here / "other.h5").write_bytes((here / "gates.h5").read_bytes())
    red = ("judged.h5", "--trust-file", "--held-out", "val", "--tasks", "red")
    mine = (*red[:-1], "red,blue")
    text = succeeds(
        *("verdict", *mine, "--images", "10", "--replica", "other.h5", "--out", "judged.h5")
    )
    for part in ("The verdict on 2 tasks", "sufficient: ", "stable: holds; agreement", "red ("):
        assert part in text, text
    found = Verdict.load("judged.h5")
    assert set(found.task_names) == {"red", "blue"}
    assert found.value[:, 4].tolist() == [1, 1]
    succeeds("verdict", *red, "--images", "10", "--out", "verdict.json", "-q")
    assert Verdict.load("verdict.json").answer("red", "stable") == "not asked"
    succeeds("report", "judged.h5", "--out", "judged.html", "-q")
    page = (here / "judged.html").read_text()
    assert found.sentence("red") in page
    made = sys.modules["colour_nets"].colours().eval()
    data = torch.rand(30, 3, 8, 8), torch.arange(30) % 3
    gates = TaskGates.load("judged.h5")
    sure = nad_attr.certainty(made, gates, data, data, pairs=1, alternatives=0)
    sure.save("judged.h5")
    succeeds("verdict", *red, "--images", "10", "--out", "verdict.json", "-q")
    needed = (sure.table("red")["label"] == "needed").mean()
    judged = Verdict.load("verdict.json")
    assert judged.value[judged.index("red"), 3] == pytest.approx(needed)
    assert judged.answer("red", "stable") != "not asked"
    fails(2, "--out writes .json or .h5", "verdict", *mine, "--out", "verdict.txt")
    fails(1, "--trust-file", "verdict", "judged.h5", "--held-out", "val")


@pytest.mark.slow
def test_evaluate_and_its_files(here: Path) -> None:
    text = succeeds("evaluate", *MINE, "--data", "val", "--out", "evaluation.json")
    for part in ("15 images", "own", "fidelity", "recall", "FPR", "random channels", "whole netw"):
        assert part in text, text
    assert "as when the gates were learned" in text
    content = json.loads((here / "evaluation.json").read_text())
    assert content == Evaluation.load("evaluation.json").to_dict()
    succeeds(
        *("evaluate", *MINE, "--data", "val", "--out", "evaluation.csv", "-q"),
        *("--tasks", "red", "--size", "0.25", "--random", "0", "--ablation", "zero"),
    )
    with open("evaluation.csv", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["size"]) == 0.25


@pytest.mark.slow
def test_evaluate_with_training_images(here: Path) -> None:
    text = succeeds("evaluate", *MINE, "--data", "val", "--ablation", "resample")
    assert "24 images in train" in text
    assert "detector" in text


@pytest.mark.slow
def test_evaluate_needs_the_same_network(here: Path) -> None:
    other = ("evaluate", *MINE, "--data", "val", "--model-arg", "gain=2")
    fails(1, "this is not the network that the gates were learned on", *other)
    text = succeeds(*other, "--any-model")
    assert "Warning: this is not the network" in text


def test_inspect(here: Path) -> None:
    text = succeeds("inspect", "gates.h5")
    for part in ("colour_nets:colours", "train (24 images)", "Recipe(size=0.5", "red", "relu2"):
        assert part in text, text
    content = json.loads(succeeds("inspect", "gates.h5", "--json", "--tasks", "red,blue"))
    assert [task["name"] for task in content["tasks"]] == ["blue", "red"]
    assert content["tasks"][0]["size"] == 0.5
    assert content["recipe"]["steps"] == 4


@pytest.mark.slow
def test_export(here: Path) -> None:
    gates = TaskGates.load("gates.h5")
    succeeds(
        *("export", "gates.h5", "--csv", "gates.csv"),
        *("--json", "gates.json", "--npz", "gates.npz"),
    )
    with open("gates.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 12
    kept = {(row["name"], row["site"], int(row["channel"])) for row in rows if row["kept"] == "1"}
    arch = gates.sub_architecture("green")
    for site, channels in arch.kept.items():
        assert {c for n, s, c in kept if (n, s) == ("green", site)} == set(channels.tolist())
    first = rows[0]
    assert float(first["gate"]) == pytest.approx(float(gates["relu"][0, 0]), rel=1e-5)
    content = json.loads(Path("gates.json").read_text())
    assert content["tasks"][1]["kept"]["relu"] == arch.kept["relu"].tolist()
    with np.load("gates.npz", allow_pickle=False) as arrays:
        assert np.array_equal(arrays["gate/relu"], gates["relu"].numpy())
    lines = succeeds("export", "gates.h5", "--csv", "-", "--tasks", "red", "--kept-only").split()
    assert lines[0] == "task,name,site,channel,gate,logit,kept"
    assert len(lines) == 1 + 6
    smaller = succeeds("export", "gates.h5", "--csv", "-", "--size", "0.25", "--kept-only").split()
    assert len(smaller) == 1 + 3 * 3


def test_export_several_classes_as_one_network(here: Path) -> None:
    given = ("export", *MINE, "--task", "red", "--task", "blue", "--pixels", 8)
    text = succeeds(*given, "--network", "two.pt2")
    assert "written: two.pt2, two.pt2.json" in text
    both = torch.export.load("two.pt2").module()
    gates = TaskGates.load("gates.h5")
    tasks = [gates.sub_architecture(name).task for name in ("red", "blue")]
    outputs = json.loads(Path("two.pt2.json").read_text())["outputs"]
    assert sorted(outputs) == sorted(tasks)
    assert both(torch.rand(3, 3, 8, 8)).shape == (3, 2)
    apart = succeeds(*given, "--network", "apart.pt2", "--side-by-side")
    x = torch.rand(3, 3, 8, 8)
    found = torch.export.load("apart.pt2").module()(x)
    for column, task in enumerate(outputs):
        succeeds("export", *MINE, "--task", task, "--pixels", 8, "--network", "one.pt2")
        alone = torch.export.load("one.pt2").module()(x)
        torch.testing.assert_close(found[:, column], alone[:, 0], rtol=1e-4, atol=1e-5)
    assert "the networks cut" in apart


def test_a_size_that_is_no_number_is_said_plainly(here: Path) -> None:
    fails(2, "'--size': must be a number.", *NEW, "--size", "abc")


def test_export_a_smaller_network(here: Path) -> None:
    text = succeeds("export", *MINE, "--task", "red", "--network", "red.pt2", "--pixels", 8)
    assert "parameters" in text
    assert "latency" in text
    assert "written: red.pt2, red.pt2.json" in text
    arch = TaskGates.load("gates.h5").sub_architecture("red")
    content = json.loads(Path("red.pt2.json").read_text())
    assert content["sites"]["relu"] == arch.kept["relu"].tolist()
    assert content["outputs"] == [arch.task]
    sys.path.insert(0, str(here))
    try:
        from colour_nets import Colours  # type: ignore[import-not-found]
    finally:
        sys.path.remove(str(here))
    network, x = Colours().eval(), torch.rand(5, 3, *content["input_shapes"][0][1:])
    small = torch.export.load("red.pt2").module()
    with arch.applied(network), torch.no_grad():
        assert torch.allclose(small(x)[:, 0], network(x)[:, arch.task], atol=1e-5)


def test_merge_puts_tasks_together(here: Path) -> None:
    text = succeeds("merge", "rest.h5", "red.h5", "--out", "merged.h5", "--overwrite")
    assert "3 tasks of 2 files" in text
    merged = TaskGates.load("merged.h5")
    for name, alone in (("red", "red.h5"), ("blue", "rest.h5")):
        for site, gate in TaskGates.load(alone).gates_of(name).items():
            assert torch.equal(merged.gates_of(name)[site], gate)


def test_compare_tasks_and_files(here: Path) -> None:
    text = succeeds("compare", "gates.h5", "--json", "within.json")
    assert "blue - green" in text
    gates = TaskGates.load("gates.h5")
    pairs = json.loads(Path("within.json").read_text())["pairs"]
    found = next(p for p in pairs if (p["first"], p["second"]) == ("blue", "red"))
    blue, red = (gates.sub_architecture(name) for name in ("blue", "red"))
    assert found["overlap"] == pytest.approx(blue.overlap(red))
    assert found["kappa"] == pytest.approx(blue.overlap(red, chance_corrected=True))
    succeeds("compare", "gates.h5", "gates.h5", "--json", "two.json")
    numbers = json.loads(Path("two.json").read_text())
    assert [task["overlap"] for task in numbers["tasks"]] == [1.0] * 3
    assert numbers["sites"]["relu"]["kappa"] == 1.0


@pytest.mark.slow
def test_compare_with_another_method(here: Path) -> None:
    text = succeeds(
        *("compare", *MINE, "--with", "taylor", "--with", "energy"),
        *("--data", "val"),
        *("--images", "4", "--json", "rivals.json"),
    )
    assert "scoring: taylor, 12 images" in text
    content = json.loads(Path("rivals.json").read_text())
    assert set(content["sites"]) == {"taylor", "energy"}
    assert set(content["evaluation"]["rivals"]) == {"taylor", "energy"}


def test_certainty(here: Path) -> None:
    asked = ("certainty", *MINE, "--held-out", "val", "--data", "train", "--tasks", "red")
    quick = ("--pairs", "1", "--alternatives", "1", "-q")
    text = succeeds(*asked, *quick, "--out", "channels.csv")
    assert "needed  replaceable  no effect seen  undecided" in text
    with open("channels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    kept = TaskGates.load("gates.h5").sub_architecture("red").n_kept
    assert sum(row["kept"] == "True" for row in rows) == kept
    assert {row["task"] for row in rows} == {"red"}
    shutil.copy("gates.h5", "mine.h5")
    succeeds("certainty", "mine.h5", *asked[2:], *quick, "--out", "mine.h5")
    found = ChannelCertainty.load("mine.h5", "certainty")
    assert found.kept.sum() == kept
    assert TaskGates.load("mine.h5") == TaskGates.load("gates.h5")
    fails(2, "--out writes .json", *asked, "--out", "x.txt")


def test_flow(here: Path) -> None:
    text = succeeds(
        *("flow", *MINE, "--data", "val", "--task", "red", "--task", "blue", "--images", "3"),
        *("--receivers", "1", "--csv", "edges.csv", "--plot", "flow.png"),
    )
    assert "red: 3 images; outflow equals effect" in text
    assert "relu > relu2" in text
    assert Path("flow.png").stat().st_size > 1000
    with open("edges.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["task"] for row in rows} == {"red", "blue"}
    assert "-1" in {row["target"] for row in rows}
    kept = TaskGates.load("gates.h5").sub_architecture("red").kept["relu"].tolist()
    own = {int(r["source"]) for r in rows if (r["task"], r["source_site"]) == ("red", "relu")}
    assert own == set(kept)
    text = succeeds("flow", *MINE, "--data", "val", "--task", "red", "--whole", "-q")
    assert "red: 5 images" in text
    fails(2, "holds 3 tasks; name one", "flow", "gates.h5", "--data", "val")
    fails(2, "--plot takes a", *("flow", "gates.h5", "--data", "val", "--plot", "flow.txt"))
    fails(
        2,
        "would replace gates.h5, which is read",
        *("flow", "gates.h5", "--data", "val", "--csv", "gates.h5"),
    )
    fails(2, "which is read", *("flow", "gates.h5", "--data", "val", "--plot", "val/red/0.png"))
    fails(
        2,
        "asked for twice",
        *("flow", "gates.h5", "--data", "val", "--csv", "a.svg", "--plot", "a.svg"),
    )
    for _ in range(2):  # a picture replaces the one before
        drawn = ("--task", "red", "--images", "1", "--batch-size", "1", "--amp", "--plot")
        succeeds("flow", *MINE, "--data", "val", *drawn, "flow.pdf")
    assert Path("flow.pdf").read_bytes().startswith(b"%PDF")


def test_attribute(here: Path) -> None:
    text = succeeds(
        *("attribute", *MINE, "val/red/0.png", "val/blue/1.png"),
        *("--csv", "top.csv", "--hdf5", "all.h5"),
    )
    assert "val/red/0.png: red (2)" in text
    assert "val/blue/1.png: blue (0)" in text
    with open("top.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["image"] == "val/red/0.png"]
    arrays, facts = read_result("all.h5", "attribution")
    assert facts["sites"] == ["relu", "relu2"]
    best = int(np.abs(arrays["site_0"][0]).argmax())
    assert (rows[0]["site"], int(rows[0]["channel"])) == ("relu", best)
    # By hand: gate times the mean of relu(normalised colour).
    from nad_attr.data.images import ImageTransform, read_image

    pixels = ImageTransform(None, None)(read_image("val/red/0.png"))
    expected = torch.cat([pixels.relu().mean((1, 2)), (-pixels).relu().mean((1, 2))])
    expected = expected * TaskGates.load("gates.h5").gates_of("red")["relu"]
    np.testing.assert_allclose(arrays["site_0"][0], expected.numpy(), rtol=1e-5, atol=1e-7)
    assert "red (2)" in succeeds("attribute", *MINE, "val/blue/1.png", "--task", "red")


@pytest.mark.slow
def test_broken_images_are_counted_and_listed(here: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree("val", tmp_path / "val")
    (tmp_path / "val" / "red" / "3.png").write_bytes(b"broken")
    text = succeeds("evaluate", *MINE, "--data", tmp_path / "val", "--random", "0")
    assert "1 image could not be read (1 left out):" in text
    assert "red/3.png: no image that Pillow knows" in text.replace(os.sep, "/")
    assert "14 images" in text
    text = succeeds(
        *(
            "evaluate",
            "gates.h5",
            "--trust-file",
            "--data",
            tmp_path / "val",
            "--random",
            "0",
            "--no-check",
        )
    )
    assert "1 replaced by the next image of the class" in text
    assert "15 images" in text


# ---------------------------------------------------------------------------------------------
# What is wrong
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "arguments"),
    [
        (1, "write torchvision:resnet50", ("sites", "--model", "resnet50")),
        (1, "no module 'colournets'", ("sites", "--model", "colournets:colours")),
        (1, "failed: RuntimeError: out of luck", ("sites", "--model", "colour_nets:fails")),
        (2, "--input takes a shape", ("sites", *MODEL, "--input", "big")),
        (1, "cannot be run on", ("sites", *MODEL, "--input", "8")),
        (1, "no module 'rleu'; did you mean 'relu'", ("sites", *MODEL, "--layer", "rleu")),
        (2, "--model-arg takes NAME=VALUE", ("sites", *MODEL, "--model-arg", "gain")),
        (2, "No such option", ("sites", *MODEL, "--nonsense")),
        (2, "Missing option '--model'", ("learn", "--data", "train")),
        (2, "No such command", ("lern",)),
        (1, "there is no folder trian; did you mean train?", (*NEW, "--data", "trian")),
        (1, "holds no folders", (*NEW, "--data", "val/red")),
        (1, "do not fit the model: missing conv.weight", (*NEW, "--weights", "other.pt")),
        (1, "there is no file none.pt", (*NEW, "--weights", "none.pt")),
        (2, "there is no class 7; there are 0, 1, 2", (*NEW, "--tasks", "7")),
        (2, "no class 'rde'; did you mean red", (*NEW, "--tasks", "rde")),
        (2, "goes backwards", (*NEW, "--tasks", "2-0")),
        (2, "above 0, up to 1, got 0", (*NEW, "--size", "0")),
        (2, "device 'nowhere' cannot be used", (*NEW, "--device", "nowhere")),
        (2, "give one of them", (*NEW, "--fidelity", "0.9")),
        (2, "--size belongs to the default recipe", (*NEW, "--recipe", "paper")),
        (2, "--beta belongs to the published recipe", (*NEW, "--beta", "1")),
        (
            2,
            "a network other than torchvision's vgg16, resnet50",
            ("learn", *MODEL, "--data", "train", "--recipe", "paper", "--out", "new.h5"),
        ),
        (2, "is there already: --resume goes on", (*LEARN, "--out", "gates.h5")),
        (2, "--resume keeps", (*NEW, "--resume", "--overwrite")),
        (2, "there is no folder nowhere", (*LEARN, "--out", "nowhere/gates.h5")),
        (2, "--may-differ takes", (*NEW, "--resume", "--may-differ", "weather")),
        (2, "is for Ray: add --ray", (*NEW, "--ray-workers", "2")),
        (2, "--mean takes three numbers", (*NEW, "--mean", "1,2")),
        (1, "interpolation must be", (*NEW, "--interpolation", "magic")),
        (1, "the class index has no entry", (*NEW, "--class-index", "classes.json")),
        (1, "no 'gray'; did you mean grey", (*NEW, "--transform", "colour_nets:gray")),
        (1, "transform makes a int of an image", (*NEW, "--transform", "colour_nets:number")),
        (1, "not take inputs of shape (1, 1, 4, 4)", (*NEW, "--transform", "colour_nets:grey")),
        (1, "there is no file none.h5", ("inspect", "none.h5")),
        (1, "text.h5", ("inspect", "text.h5")),
        (1, "text.h5", ("evaluate", "text.h5", "--data", "val")),
        (2, "there is no class 'purple'", ("inspect", "gates.h5", "--tasks", "purple")),
        (2, "--out writes .json, .csv or .h5", (*EVALUATE, "--out", "a.txt")),
        (2, "--ablation takes zero", (*EVALUATE, "--ablation", "x")),
        (2, "--size takes a share", (*EVALUATE, "--size", "-2")),
        (2, "for 40 % write 0.4", (*EVALUATE, "--size", "40")),
        (2, "for 40 % write 0.4", (*NEW, "--size", "40")),
        (2, "for 40 % write 0.4", ("demo", "--size", "40")),
        (2, "say what to write", ("export", "gates.h5")),
        (2, "--size takes a share", ("export", "gates.h5", "--csv", "-", "--size", "0")),
        (2, "ends in .pt2, .onnx", ("export", "gates.h5", "--network", "a.pth", "--task", "red")),
        (2, "name them with --task", ("export", "gates.h5", "--network", "a.pt2")),
        (
            2,
            "a.pt2.json is written as well",
            ("export", "gates.h5", "--network", "a.pt2", "--task", "red", "--json", "a.pt2.json"),
        ),
        (
            2,
            "2 are chosen",
            ("export", *MINE, "--network", "a.pt2", "--task", "red,blue", "--head", "whole"),
        ),
        (
            2,
            "colour_nets.py would be written beside",
            ("export", *MINE, "--network", "colour_nets.safetensors", "--task", "red"),
        ),
        (
            2,
            "--pixels 8 has no effect",
            ("export", *MINE, "--network", "a.pt2", "--task", "red", "--pixels", "8",
             "--crop", "16"),
        ),
        (2, "merge takes two files", ("merge", "gates.h5", "--out", "m.h5")),
        (2, "red.h5 is there already", ("merge", "red.h5", "rest.h5", "--out", "red.h5")),
        (1, "text.h5", ("merge", "red.h5", "text.h5", "--out", "m.h5")),
        (2, "--with takes", ("compare", "gates.h5", "--with", "magic", "--data", "val")),
        (2, "use --with and --data together", ("compare", "gates.h5", "--with", "taylor")),
        (1, "no task in common", ("compare", "red.h5", "rest.h5")),
        (2, "one file or two", ("compare", "red.h5", "rest.h5", "gates.h5")),
        (2, "there is no file none.png", ("attribute", "gates.h5", "none.png")),
        (2, "is a folder; name image files", ("attribute", "gates.h5", "val")),
        (1, "cannot be read", ("attribute", *MINE, "colour_nets.py")),
    ],
)  # fmt: skip
def test_wrong_input_is_a_line_and_a_code(
    here: Path, code: int, message: str, arguments: tuple[str, ...]
) -> None:
    (here / "classes.json").write_text('{"blue": 0}')
    before = sorted(here.iterdir())
    fails(code, message, *arguments)
    assert sorted(here.iterdir()) == before


EXPLAIN = ("explain", *MODEL, "--out", "page.html", "--device", "cpu", "--size", "0.5")


@pytest.fixture(scope="module")
def wrong(place: Path) -> Path:
    """Folders of pictures as people have them, in which something is wrong."""
    for name in CLASSES:
        for kind in ("one", "empty", "texts", "single"):
            (place / kind / name).mkdir(parents=True)
        if name != CLASSES[0]:
            shutil.copytree(place / "train" / name, place / "empty" / name, dirs_exist_ok=True)
        shutil.copy(place / "train" / name / "0.png", place / "one" / name)
        (place / "texts" / name / "notes.txt").write_text("no picture")
        for i in range(6):
            (place / "single" / name / f"{i}.png").write_text("no picture either")
    return place


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("there is no folder trian; did you mean train?", ("--data", "trian")),
        ("holds no folders", ("--data", "val/red")),
        ("blue holds no images", ("--data", "empty")),
        ("no class has 4 images (2 to learn from", ("--data", "one", "--store", "g.h5")),
        ("in texts hold no images", ("--data", "texts")),
        ("none of the 6 images of class folder single/blue", ("--data", "single")),
        ("do not fit the model: missing conv.weight", ("--data", "train", "--weights", "other.pt")),
        ("there is no file none.pt", ("--data", "train", "--weights", "none.pt")),
        ("write torchvision:resnet50", ("--data", "train", "--model", "resnet50")),
        ("no module 'colournets'", ("--data", "train", "--model", "colournets:colours")),
        ("no class 'rde'; did you mean red", ("--data", "train", "--tasks", "rde")),
        ("text.h5", ("--data", "train", "--store", "text.h5")),
        ("there is no folder nowhere", ("--data", "train", "--out", "nowhere/page.html")),
        ("both say how much to run", ("--data", "train", "--quick", "--minutes", "5")),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_is_explained(
    wrong: Path, message: str, arguments: tuple[str, ...]
) -> None:
    before = sorted(wrong.rglob("*"))
    outcome = invoke(*EXPLAIN, *arguments)
    fails(outcome.exit_code or -1, message, *EXPLAIN, *arguments)
    assert sorted(wrong.rglob("*")) == before


@pytest.mark.slow
def test_one_command_from_photos_to_a_verdict(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    fit_briefly(monkeypatch)
    learn_briefly(monkeypatch, images_per_step=4)
    out = tmp_path / "page.html"
    given = ("--data", "train", "--tasks", "red", "--quick", "--certainty")
    text = succeeds(*EXPLAIN[:-4], *EXPLAIN[-2:], "--out", out, *given)
    assert text.index("this will take about") < text.index("Asked: which of 12 channels")
    assert "red" in text[text.index("Asked") :]
    assert out.is_file()
    assert (tmp_path / "gates.h5").is_file()


@pytest.mark.slow
def test_a_transform_of_the_users(here: Path) -> None:
    succeeds(*LEARN, "--out", "t.h5", "--transform", "colour_nets:transform", "--tasks", "0", "-q")
    with GateStore.open("t.h5") as store:
        assert store.provenance["transform"]["factory"] == "colour_nets:transform"


def test_debug_shows_the_traceback() -> None:
    outcome = invoke("sites", "--model", "resnet50", "--debug")
    assert outcome.exit_code == 1
    assert "Traceback" in outcome.output


@pytest.mark.slow
def test_resume_refuses_other_settings(here: Path) -> None:
    other = [*LEARN, "--out", "gates.h5", "--resume"]
    fails(1, "seed", *other, "--seed", "5")
    fails(1, "recipe", *other, "--steps", "5")
    assert "0 learned" in succeeds(*other)


# ---------------------------------------------------------------------------------------------
# Stopping
# ---------------------------------------------------------------------------------------------


def test_interrupted_before_anything_is_saved(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("nad_attr.cli.learn.learn_to_store", stop)
    outcome = invoke(*LEARN, "--out", "never.h5")
    assert outcome.exit_code == 130
    assert "Stopped. Nothing was saved yet." in outcome.output
    assert "Traceback" not in outcome.output


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_in_the_middle_and_resumed(
    here: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    out = f"stopped{int(number)}.h5"
    arguments = [*LEARN, "--out", out, "--chunk-size", "1"]
    saved = runs._Run.save

    def save_and_stop(run: object, gates: TaskGates) -> None:
        # Comes in the middle of writing, and must wait for its end.
        monkeypatch.setattr(runs._Run, "save", saved)
        saved(run, gates)
        os.kill(os.getpid(), number)

    monkeypatch.setattr(runs._Run, "save", save_and_stop)
    monkeypatch.setattr(sys, "argv", ["nad-attr", *map(str, arguments)])
    outcome = invoke(*arguments)
    assert outcome.exit_code == 128 + number, outcome.output
    assert f"1 of 3 tasks are saved in {out}. To go on:" in outcome.output
    assert f"nad-attr learn {' '.join(LEARN[1:])} --out {out} --chunk-size 1 --resume" in (
        " ".join(outcome.output.split())
    )
    assert "2 learned" in succeeds(*arguments, "--resume")
    assert TaskGates.load(out) == TaskGates.load("gates.h5").select([0, 1, 2])


@pytest.mark.slow
def test_ctrl_c_in_a_terminal(here: Path) -> None:
    """The whole program, as its entry point starts it."""
    command = [sys.executable, "-m", "nad_attr.cli", *LEARN, "--out", "ctrl.h5"]
    command += ["--steps", "30", "--chunk-size", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path[1:]])}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    try:
        end = time.monotonic() + 200
        while time.monotonic() < end and process.poll() is None:
            try:
                with GateStore.open("ctrl.h5") as store:
                    if len(store):
                        break
            except ValueError:
                pass
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 130, output
    assert "of 3 tasks are saved in ctrl.h5. To go on:" in output
    assert "Traceback" not in output
    with GateStore.open("ctrl.h5") as store:
        assert 1 <= len(store) < 3


# -- Labels in a table, pictures of several sizes, long names ------------------------------------


def table(path: Path, rows: list[list[object]]) -> Path:
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def files_of(split: str) -> list[tuple[str, int]]:
    return [
        (f"{name}/{path.name}", label)
        for label, name in enumerate(CLASSES)
        for path in sorted(Path(split, name).iterdir())
    ]


@pytest.mark.parametrize("kind", ["classes", "names", "several", "one", "target"])
def test_labels_from_a_table(here: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fit_briefly(monkeypatch)
    learn_briefly(monkeypatch, images_per_step=4)
    files = files_of("val")
    rows: list[list[object]] = {
        "classes": [["file", "class"], *([f, k] for f, k in files)],
        "names": [["file", "class"], *([f, CLASSES[k]] for f, k in files)],
        "several": [
            ["file", *CLASSES],
            *([f, *("" if f == files[3][0] else int(j == k) for j in range(3))] for f, k in files),
            [files[0][0], 1, 1, 0],
        ],
        "one": [["file", "red"], *([f, int(k == 2)] for f, k in files)],
        "target": [["file", "redness"], *([f, k / 3] for f, k in files)],
    }[kind]  # fmt: skip
    model = "colour_nets:reds" if kind in ("one", "target") else "colour_nets:colours"
    given = ("--data", "val", "--labels", table(here / f"{kind}.csv", rows))
    plain = ("--mean", "0", "--std", "1", "--resize", "0", "--crop", "0")
    out = f"{kind}.h5"
    succeeds("learn", "--model", model, *given, *plain, "--out", out, "--steps", 3, "--overwrite")
    with GateStore.open(out) as store:
        assert len(store.tasks) == (1 if kind in ("one", "target") else 3)
        names = store.task_names
    expected = {"several": CLASSES, "names": CLASSES, "one": ("red",), "target": ("redness",)}
    assert kind == "classes" or tuple(names or ()) == expected[kind]
    text = succeeds("evaluate", out, *given, "--trust-file", "--random", 0)
    assert ("R²" in text) == (kind == "target"), text
    path = Path("val", files[0][0])
    own = succeeds("attribute", out, path, "--labels", here / f"{kind}.csv", "--trust-file")
    assert own.count("output") == (2 if kind == "several" else 1)  # the image is there twice
    if kind == "names":  # from here on they are numbers
        return
    training = ("--train-data", "val", "--train-labels", here / f"{kind}.csv", "--trust-file")
    text = succeeds("compare", out, "--with", "taylor", *given, *training)
    assert "taylor" in text
    succeeds("report", out, "--out", "labels.html", "--with", "taylor", *given, *training)
    assert "taylor" in Path("labels.html").read_text().lower()
    bare = (*given, "--trust-file")
    fails(1, "--train-labels TABLE.csv", "compare", out, "--with", "taylor", *bare)
    task = "red" if kind == "one" else "redness" if kind == "target" else 0
    text = succeeds("flow", out, *given, "--trust-file", "--task", task)
    assert "image" in text, text
    held_out = ("--held-out", "val", "--held-out-labels", here / f"{kind}.csv", "--trust-file")
    few = ("--pairs", 1, "--alternatives", 0, "--images", 4, "--tasks", task)
    text = succeeds("certainty", out, *few, *given, *held_out)
    assert "needed" in text, text
    fails(1, "--data FOLDER --labels TABLE.csv", "certainty", out, *held_out)
    if kind in ("several", "target"):
        text = succeeds("verdict", out, "--tasks", task, "--images", 4, *given, *held_out)
        assert "does not" in text or "holds" in text, text
        fails(1, "--data FOLDER --labels TABLE.csv", "verdict", out, *held_out)
    if kind == "target":
        quick = ("--quick", "--out", "explained.html", "--store", "explained.h5", "--tasks", task)
        assert "explained.html" in succeeds("explain", "--model", model, *given, *plain, *quick)


def test_tables_that_do_not_fit_are_named(here: Path) -> None:
    for rows, message in (
        ([["file", "a"], ["gone.png", 1]], "line 2: there is no file 'gone.png'"),
        ([["file", "a"], ["../text.h5", 1]], "line 2: there is no file"),
        ([["file", "a"], [files_of("val")[0][0], "cat"]], "--class-index"),
        ([["file", "a", "b"], [files_of("val")[0][0], 1]], "line 2: 2 cells, but the header has 3"),
        ([["file"]], "must be a table with a head"),
    ):
        path = table(here / "bad.csv", rows)
        given = ("--data", "val", "--labels", path, "--out", "never.h5")
        fails(1, message, "learn", "--model", "colour_nets:colours", *given)


def test_class_folders_of_a_network_of_one_output(here: Path) -> None:
    for name in ("no", "yes"):
        (here / "two" / name).mkdir(parents=True)
        source = Path("val", "red" if name == "yes" else "blue")
        for path in source.iterdir():
            (here / "two" / name / path.name).write_bytes(path.read_bytes())
    plain = ("--mean", "0", "--std", "1", "--resize", "0", "--crop", "0")
    given = ("--model", "colour_nets:reds", "--data", "two", *plain)
    succeeds("learn", *given, "--out", "folders.h5", "--steps", 3)
    with GateStore.open("folders.h5") as store:
        assert (tuple(store.tasks), tuple(store.task_names or ())) == ((0,), ("yes",))


def test_outputs_that_are_no_scores_are_named_on_the_command_line(here: Path) -> None:
    (here / "other_nets.py").write_text(
        "import colour_nets\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, last):\n"
        "        super().__init__()\n"
        "        self.net, self.last = colour_nets.colours(), last\n"
        "    def forward(self, x):\n"
        "        return self.last(self.net(x))\n"
        "def classes(): return Net(lambda y: y.argmax(1)).eval()\n"
        "def boxes(): return Net(lambda y: [{'boxes': y, 'labels': y}]).eval()\n"
    )
    given = ("--data", "val", "--resize", 8, "--crop", 8, "--out", "never.h5")
    fails(1, "class indices from argmax", "learn", "--model", "other_nets:classes", *given)
    fails(1, "as detection models do", "learn", "--model", "other_nets:boxes", *given)
    assert not Path("never.h5").exists()


def test_pictures_of_several_sizes_are_seen_before_learning(here: Path) -> None:
    for name in CLASSES:
        (here / "sizes" / name).mkdir(parents=True)
        for i in range(2):
            picture = Image.new("RGB", (8 + 4 * i, 8))
            picture.save(here / "sizes" / name / f"{i}.png")
    given = ("--model", "colour_nets:colours", "--data", "sizes", "--out", "sizes.h5")
    as_it_is = ("--transform", "colour_nets:as_it_is")
    fails(2, "--resize 256 --crop 224", "learn", *given, *as_it_is)
    fails(2, "1.png as 3 x 8 x 12", "learn", *given, *as_it_is)
    assert not Path("sizes.h5").exists()
    succeeds("learn", *given, "--resize", 8, "--crop", 8, "--steps", 2)


def test_tables_shorten_names_and_never_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    from nad_attr.cli.messages import print_table

    name = "x" * 300 + "_end"
    numbers = [f"{i}.123" for i in range(20)]
    print_table(
        ["task", *(f"measure {i}" for i in range(20))], [[name, *numbers], ["cat", *numbers]]
    )
    text = capsys.readouterr().out
    assert all(text.count(f" {number}") == 2 for number in numbers)
    assert "…" in text
    assert "_end" in text
    assert name not in text
    assert "cat" in text


def test_many_channels_keep_their_numbers(here: Path) -> None:
    photo = next(Path("val", "red").iterdir())
    text = succeeds("attribute", *MINE, photo, "--top", 20)
    assert "channel 6" in text
    assert "…" not in text


def test_main_leaves_the_handler_of_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["nad-attr", "--version"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        cli.main()
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------------------------------------
# explain
# ---------------------------------------------------------------------------------------------

EXPLAIN_TRAIN = ("explain", *MODEL, "--data", "train", "--device", "cpu")


@pytest.mark.slow
def test_explain_goes_from_photos_to_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("plotly")
    fit_briefly(monkeypatch)
    learn_briefly(monkeypatch, steps=20, images_per_step=4)
    page = tmp_path / "report.html"
    given = "--tasks", "red,blue", "--minutes", "60", "--replicas", "2"
    text = succeeds(*EXPLAIN_TRAIN, "--out", page, *given)
    for said in ("this will take about", "learning from", "Asked: which of 12 channels", "See: "):
        assert said in text, text
    assert len([line for line in text.splitlines() if line.startswith("Answer: ")]) == 1
    store = GateStore.open(tmp_path / "gates.h5")
    assert store.task_names == ("blue", "red")
    assert store.recipe.replicas == 2
    assert "verdict" in page.read_text()
    again = succeeds(*EXPLAIN_TRAIN, "--out", page, *given)
    assert "verdict ..." not in again
    plain = *EXPLAIN_TRAIN, "--out", page, *given[:2]
    fails(1, "begun with another recipe, minutes 60.0, not None", *plain)
    fails(1, "was not begun by explain", *EXPLAIN_TRAIN, "--store", "gates.h5", "--out", page)


@pytest.mark.parametrize(
    ("code", "message", "more"),
    [
        (1, "nowhere", ("--data", "nowhere")),
        (2, "--tasks: there is no class 'purple'", ("--tasks", "purple")),
        (2, "is there already and is", ("--out", "other.pt")),
        (2, "there is no folder", ("--out", "no/where/report.html")),
        (2, "--quick and --minutes", ("--quick", "--minutes", "3")),
        (2, "--size takes a share", ("--size", "40")),
        (2, "20 replicas share 100 steps, and each needs 4", ("--replicas", "20")),
        (1, "--class-index", ("--data", "alone")),
        (1, "not a tensor (images, classes)", ("--model", "colour_nets:maps")),
        (1, "4 are the least", ("--data", "few", "--tasks", "red")),
    ],
)
def test_explain_says_in_a_line_what_is_wrong(
    code: int, message: str, more: tuple[str, ...], place: Path, tmp_path: Path
) -> None:
    if more[-1] == "alone" or "few" in more:
        for name, n in {"alone": (("red", 5),), "few": (("blue", 5), ("green", 5), ("red", 2))}[
            more[1]
        ]:
            for i in range(n):
                target = place / more[1] / name / f"{i}.png"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes((place / "train" / name / f"{i}.png").read_bytes())
    page = () if "--out" in more else ("--out", tmp_path / "report.html")
    fails(code, message, *EXPLAIN_TRAIN, *page, *more)
