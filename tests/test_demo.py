"""The demo and the command line, with a tiny network and tiny photos; Lite0 once."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nad_attr
from nad_attr import SubArchitecture, TaskGates, cli
from nad_attr.examples import demo as demo_module
from nad_attr.examples.demo import (
    DemoResult,
    MissingExtraError,
    Photo,
    center_crops,
    check_extra,
    choose_classes,
    draw_photo,
    load_lite0,
    load_photos,
    random_crops,
    run_demo,
    strongest_channels,
)
from tests.helpers import invoke

pytest.importorskip("matplotlib")
pytest.importorskip("typer")

PIXELS = 16


class Colours(nn.Module):
    """Calls a photo by its strongest colour: three classes, two sites."""

    def __init__(self) -> None:
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
            self.linear.weight.copy_(torch.cat([eye, -eye], dim=1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.mix(self.relu(self.conv(x))))
        return self.linear(x.mean((2, 3)))


@pytest.fixture(scope="module")
def colours() -> nn.Module:
    return Colours().eval()


@pytest.fixture(scope="module")
def colour_photos() -> list[Photo]:
    generator = torch.Generator().manual_seed(0)
    photos = []
    for label, name in enumerate(["red", "green", "blue"]):
        image = torch.randint(0, 160, (3, 40, 48), generator=generator)
        image[label] += 80
        photos.append(Photo(name, label, image.to(torch.uint8)))
    return photos


@pytest.fixture(scope="module")
def result(
    tmp_path_factory: pytest.TempPathFactory, colours: nn.Module, colour_photos: list[Photo]
) -> DemoResult:
    return run_demo(
        tmp_path_factory.mktemp("demo") / "out",
        n_classes=3,
        steps=3,
        size=0.5,
        model=colours,
        photos=colour_photos,
        image_size=PIXELS,
    )


# ---------------------------------------------------------------------------------------------
# Photos and crops
# ---------------------------------------------------------------------------------------------


def test_center_crop_takes_the_middle() -> None:
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 16:48, 32:64] = 255  # the middle half
    images, labels = center_crops([Photo("box", 5, image)], size=56)
    assert images.shape == (1, 3, 56, 56)
    assert labels.tolist() == [5]
    # Short side 64 stays 64, and 4 pixels go at each end: the box covers 12 to 44.
    assert images[0, 0, 12:44, 12:44].min() == (255 - 127) / 128
    assert images[0, 0, :11].max() == (0 - 127) / 128


def test_random_crops_depend_on_the_seed_alone(colour_photos: list[Photo]) -> None:
    before = torch.get_rng_state()
    a, labels = random_crops(colour_photos, 4, seed=1, size=PIXELS)
    b, _ = random_crops(colour_photos, 4, seed=1, size=PIXELS)
    c, _ = random_crops(colour_photos, 4, seed=2, size=PIXELS)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert len({crop.numpy().tobytes() for crop in a}) == 12
    assert torch.equal(torch.get_rng_state(), before)
    assert -127 / 128 <= float(a.min()) <= float(a.max()) <= 1


def test_crops_keep_to_their_scale() -> None:
    # Brightness rises from left to right, so the range of a crop says how wide it is.
    ramp = torch.arange(200, dtype=torch.uint8).expand(3, 100, 200)
    images, _ = random_crops([Photo("ramp", 0, ramp)], 50, size=100, scale=(0.25, 0.25))
    width = (images[:, 0].amax((1, 2)) - images[:, 0].amin((1, 2))) * 128 + 1
    assert 50 * 0.75**0.5 - 2 <= float(width.min()) < float(width.max()) <= 50 * (4 / 3) ** 0.5 + 2


def test_classes_that_the_network_gets_wrong_are_left_out(
    colours: nn.Module, colour_photos: list[Photo]
) -> None:
    wrong = Photo("green", 1, colour_photos[0].image)
    chosen = choose_classes(colours, [*colour_photos, wrong], 2, size=PIXELS)
    assert chosen == {"red": 0, "blue": 2}
    with pytest.raises(ValueError, match="must be 1 to 2"):
        choose_classes(colours, [*colour_photos, wrong], 3, size=PIXELS)


# ---------------------------------------------------------------------------------------------
# The whole run
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_writes_what_it_says(result: DemoResult) -> None:
    assert set(result.files) == {"gates.h5", "table.txt", "table.json", "sizes.png", "photo.png"}
    assert all(path.stat().st_size > 0 for path in result.files.values())
    assert sorted(path.name for path in result.out.iterdir()) == sorted(result.files)
    assert TaskGates.load(result.files["gates.h5"]) == result.gates
    table = result.files["table.txt"].read_text()
    assert table.startswith(result.table() + "\n")
    # Where the numbers stand, it is said what they are measured on.
    assert "measured on other crops of the" in table
    assert "no test on new photos" in result.files["table.json"].read_text()
    content = json.loads(result.files["table.json"].read_text())
    assert set(content["evaluation"]["rivals"]) == {"Taylor"}
    assert len(content["evaluation"]["random"]) == 3
    assert content["recipe"]["steps"] == 3


def test_all_methods_have_the_same_size(result: DemoResult) -> None:
    assert result.gates.n_channels == 12
    for part in (result.evaluation, result.evaluation.rivals["Taylor"], *result.evaluation.random):
        assert part.size.tolist() == [0.5] * 3


def test_learned_channels_tell_the_colours_apart(result: DemoResult) -> None:
    assert result.evaluation.whole.mean("own_auc") == 1.0
    assert result.evaluation.mean("own_auc") > 0.9


def test_the_table_holds_every_class_and_method(result: DemoResult) -> None:
    text = result.table()
    for name in ("red", "green", "blue", "mean", "Taylor", "random", "whole network"):
        assert re.search(rf"^{name}[ ,]", text, re.MULTILINE), name
    # Recall never without the false-positive rate.
    assert text.count("recall") == text.count("FPR") == 1


@pytest.mark.slow
def test_printed_code_works(
    result: DemoResult,
    colours: nn.Module,
    colour_photos: list[Photo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    images, labels = center_crops(colour_photos, size=PIXELS)
    for module in (demo_module, importlib.import_module("nad_attr.demo")):
        monkeypatch.setattr(module, "load_lite0", lambda: colours)
        monkeypatch.setattr(module, "center_crops", lambda: (images, labels))
    names: dict[str, Tensor] = {}
    exec(result.code(), names)
    with result.gates.sub_architecture("red").applied(colours):
        expected = colours(images)
    assert torch.equal(names["outputs"], expected)
    assert result.code().splitlines()[-1].strip() in result.explanation()


@pytest.mark.slow
def test_same_seed_same_gates_into_the_same_folder(
    result: DemoResult, colours: nn.Module, colour_photos: list[Photo]
) -> None:
    again = run_demo(
        result.out,
        n_classes=3,
        steps=3,
        size=0.5,
        model=colours,
        photos=colour_photos,
        image_size=PIXELS,
    )
    assert again.gates == result.gates
    assert again.table() == result.table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0.0}, "size"),
        ({"steps": 0}, "steps"),
        ({"n_classes": 4}, "must be 1 to 3"),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used here"),
    ],
)
def test_bad_arguments_are_named(
    tmp_path: Path,
    colours: nn.Module,
    colour_photos: list[Photo],
    arguments: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        run_demo(tmp_path, model=colours, photos=colour_photos, image_size=PIXELS, **arguments)


# ---------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------


def test_strongest_channel_is_the_photos_colour() -> None:
    model = Colours().eval()
    sites = nad_attr.find_gate_sites(model, torch.zeros(2, 3, 4, 4), layers=["relu", "relu2"])
    full = SubArchitecture.full(sites)
    gates = TaskGates({s.name: full.gates()[s.name][None] for s in sites}, sites, [1])
    image = torch.zeros(3, 4, 4)
    image[1, 2, 3] = 1.0
    found = strongest_channels(model, gates, 1, image)
    assert [(c.site, c.channel, c.gate) for c in found] == [("relu", 1, 1.0), ("relu2", 1, 1.0)]
    assert torch.equal(found[0].map, image[1])


def test_closed_channels_are_not_shown() -> None:
    model = Colours().eval()
    sites = nad_attr.find_gate_sites(model, torch.zeros(2, 3, 4, 4), layers=["relu", "relu2"])
    gates = TaskGates({"relu": torch.zeros(1, 6), "relu2": torch.ones(1, 6)}, sites, [1])
    found = strongest_channels(model, gates, 1, torch.ones(3, 4, 4))
    assert [c.site for c in found] == ["relu2"]


def test_photo_figure_has_one_panel_per_channel(
    result: DemoResult, colours: nn.Module, colour_photos: list[Photo]
) -> None:
    figure = draw_photo(colours, result.gates, colour_photos[1], size=PIXELS)
    titles = [axes.get_title() for axes in figure.axes if axes.get_title()]
    assert "sub-architecture" in titles[0]
    assert len(titles) == 1 + len(
        strongest_channels(
            colours,
            result.gates,
            1,
            center_crops(colour_photos[1:2], size=PIXELS)[0][0],
        )
    )


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------


def test_version() -> None:
    outcome = invoke("--version")
    assert outcome.exit_code == 0
    assert outcome.output.strip() == f"nad-attr {nad_attr.__version__}"


def test_help_names_the_commands_and_options() -> None:
    assert "demo" in invoke("--help").output
    text = invoke("demo", "--help").output
    for option in ("--size", "--classes", "--steps", "--seed", "--out", "--device"):
        assert option in text


@pytest.mark.slow
def test_demo_command(
    tmp_path: Path,
    colours: nn.Module,
    colour_photos: list[Photo],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_module, "load_lite0", lambda: colours)
    monkeypatch.setattr(demo_module, "load_photos", lambda: colour_photos)
    monkeypatch.setattr(run_demo, "__kwdefaults__", {**run_demo.__kwdefaults__, "image_size": 16})
    out = tmp_path / "a folder"
    outcome = invoke("demo", "--classes", "2", "--steps", "2", "--size", "0.4", "--out", str(out))
    assert outcome.exit_code == 0, outcome.output
    for part in ("own AUC", "Taylor", "random", "red", "whole network", "held-out", "gates.h5"):
        assert part in outcome.output
    assert TaskGates.load(out / "gates.h5").sub_architecture("red").n_kept == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size", "1.5"), "for 1.5 % write 0.015"),
        (("--size", "0"), "above 0, up to 1, got 0"),
        (("--device", "nowhere"), "device 'nowhere' cannot be used here"),
        (("--classes", "0"), "--classes"),
        (("--steps", "many"), "--steps"),
    ],
)
def test_bad_options_exit_with_2(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = invoke("demo", "--out", str(tmp_path / "out"), *arguments)
    assert outcome.exit_code == 2
    assert message in outcome.output
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file_exits_with_2(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    assert invoke("demo", "--out", str(path)).exit_code == 2


def test_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "foolbox" else real(name)
    )
    with pytest.raises(MissingExtraError, match=r"foolbox: pip install 'nad-attr\[demo\]'"):
        check_extra()
    outcome = invoke("demo")
    assert outcome.exit_code == 2
    assert "pip install 'nad-attr[demo]'" in outcome.output


def test_missing_typer_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "typer" else real(name)
    )
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "pip install 'nad-attr[demo]'" in capsys.readouterr().err


def test_entry_point(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["nad-attr", "--version"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    assert nad_attr.__version__ in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------
# The real network and photos
# ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_lite0_on_two_photos() -> None:
    pytest.importorskip("efficientnet_lite_pytorch")
    before = torch.get_rng_state()
    model = load_lite0()
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    photos = load_photos()
    assert len(photos) == 20
    assert len({photo.label for photo in photos}) == 19
    chosen = [photo for photo in photos if photo.name in ("strawberry", "folding chair")]
    images, labels = center_crops(chosen)
    with torch.no_grad():
        assert model(images).argmax(1).tolist() == labels.tolist()
    data = random_crops(chosen, 3, size=64)
    gates = nad_attr.learn_gates(model, data, recipe=nad_attr.Recipe(steps=2, images_per_step=4))
    assert gates.n_channels == 5904
    assert gates.sub_architecture(949).n_kept == 2952
