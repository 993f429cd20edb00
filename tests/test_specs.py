"""Models, transforms, data and tasks by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from nad_attr.data.images import ImageTransform
from nad_attr.data.sources import as_source
from nad_attr.specs import (
    LoadedModel,
    SpecError,
    import_object,
    load_data,
    load_model,
    load_weights,
    make_transform,
    n_outputs,
    parse_tasks,
)
from tests.helpers import assert_model_untouched

Image = pytest.importorskip("PIL.Image")
NOTHING = nn.Identity()

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

def net(width=4, classes=2):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(width, classes))

def no_net():
    return 3

def fails():
    raise RuntimeError("first line\\nsecond line")

number = 5

class To:
    def __call__(self, image):
        return torch.zeros(3, 5, 5)

def transform():
    return To()

def plain_data():
    return TensorDataset(torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))

class Given:
    classes = ["x", "y"]
    targets = [0, 1]
    def __init__(self, transform): self.transform = transform

def given(transform):
    return torch.stack([transform(None)] * 2), torch.tensor([0, 1])
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a module of the user's, which is the current one."""
    name = "specs_of_a_user"
    (tmp_path / f"{name}.py").write_text(MODULE)
    (tmp_path / "broken_module.py").write_text("import not_there_at_all")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    for module in (name, "broken_module"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    return tmp_path


def photos(root: Path, *names: str, size: tuple[int, int] = (8, 8)) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (255, 0, 0)).save(path)
    return root


# ---------------------------------------------------------------------------------------------
# Names of objects
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("specs_of_user:net", "no module 'specs_of_user'.*did you mean specs_of_a_user"),
        ("specs_of_a_user:nte", "no 'nte'; did you mean net"),
        ("specs_of_a_user.py:net", r"not of the form package.module:name \(without .py\)"),
        ("specs_of_a_user", "not of the form"),
        ("os; import sys:net", "not of the form"),
        ("broken_module:net", "cannot be imported: ModuleNotFoundError: .*not_there_at_all"),
    ],
)
def test_names_that_lead_nowhere(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        import_object(name)


def test_modules_in_the_current_folder_count() -> None:
    assert import_object("specs_of_a_user:number") == 5
    assert import_object("specs_of_a_user:Given.classes") == ["x", "y"]


# ---------------------------------------------------------------------------------------------
# Models
# ---------------------------------------------------------------------------------------------


def test_a_factory_makes_the_same_model_each_time() -> None:
    with assert_model_untouched(NOTHING):
        first = load_model("specs_of_a_user:net", arguments={"classes": 3})
    torch.rand(3)
    second = load_model("specs_of_a_user:net", arguments={"classes": 3})
    assert not first.model.training
    assert first.to_dict() == {
        "name": "specs_of_a_user:net",
        "weights": None,
        "arguments": {"classes": 3},
    }
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert n_outputs(first.model, torch.zeros(1, 3, 8, 8)) == 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", "write torchvision:resnet50, timm:resnet50, or package.module:factory"),
        ("specs_of_a_user:no_net", "returned a int, not a torch.nn.Module"),
        ("specs_of_a_user:number", "is not a function or class but a int"),
        (
            "specs_of_a_user:fails",
            r"failed: RuntimeError: first line\nsecond line \(.*specs_of_a_user\.py, line 14\)$",
        ),
    ],
)
def test_models_that_are_none(name: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        load_model(name)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(SpecError, match=r"net\(depth=3\) failed: TypeError: .*'depth'"):
        load_model("specs_of_a_user:net", arguments={"depth": 3})


def test_models_of_unusual_outputs_are_refused() -> None:
    with pytest.raises(SpecError, match="does not take inputs of shape"):
        n_outputs(nn.Linear(3, 2), torch.zeros(1, 4))
    with pytest.raises(SpecError, match=r"returns \(1, 4, 4\)"):
        n_outputs(nn.Identity(), torch.zeros(1, 4, 4))


def test_torchvision_models() -> None:
    pytest.importorskip("torchvision")
    loaded = load_model("torchvision:SqueezeNet1_1:none")
    assert loaded.name == "torchvision:squeezenet1_1:none"
    assert loaded.notes == ("the weights are random: the network is untrained.",)
    assert loaded.class_names is None
    assert loaded.transform is not None
    # Only looked at: no download, no note.
    assert load_model("torchvision:squeezenet1_1", trained=False).notes == ()
    with pytest.raises(SpecError, match="no classification model 'resnet51'; did you mean resnet5"):
        load_model("torchvision:resnet51")
    with pytest.raises(SpecError, match="no weights 'BEST'; it has IMAGENET1K_V1, and none"):
        load_model("torchvision:alexnet:BEST")
    with pytest.raises(SpecError, match="torchvision cannot make squeezenet1_1"):
        load_model("torchvision:squeezenet1_1:none", arguments={"depth": 3})


def test_weights_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "nowhere")
    with pytest.raises(SpecError, match=r"cannot be downloaded.*\.pth\) with --weights, or write"):
        load_model("torchvision:squeezenet1_1")


def test_torchvision_weights_say_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    torchvision = pytest.importorskip("torchvision")
    entry = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, *a, **k: state)
    loaded = load_model("torchvision:squeezenet1_1")
    assert loaded.name == "torchvision:squeezenet1_1:IMAGENET1K_V1"
    assert loaded.notes == ()
    assert loaded.class_names is not None
    assert loaded.class_names[281] == "tabby"
    made = make_transform(loaded)
    assert made.record == {"kind": "weights"}
    assert "ImageClassification(crop_size=[224] resize_size=[256]" in made.text
    assert made.function(Image.new("RGB", (300, 280))).shape == (3, 224, 224)
    assert not made.random
    assert made.note == ""
    mine = make_transform(replace(loaded, weights="folder/mine.pt"))
    assert "if mine.pt was trained otherwise, say so with --resize" in mine.note
    again = make_transform(replace(loaded, weights="folder/mine.pt"), record=mine.record)
    assert again.note == ""
    changed = make_transform(loaded, options={"crop": 64})
    assert changed.record["resize"] == 256
    assert changed.record["crop"] == 64
    assert changed.record["mean"] == (0.485, 0.456, 0.406)
    again = make_transform(loaded, record=changed.record)
    assert again.function == changed.function


def test_timm_models() -> None:
    pytest.importorskip("timm")
    loaded = load_model("timm:resnet10t:none")
    assert loaded.name == "timm:resnet10t:none"
    assert loaded.notes
    assert make_transform(loaded).function(Image.new("RGB", (300, 280))).shape[0] == 3
    with pytest.raises(SpecError, match="timm has no model 'resnet10tt'; did you mean"):
        load_model("timm:resnet10tt")


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n: None if n in ("timm", "torchvision") else real(n)
    )
    for name in ("timm", "torchvision"):
        with pytest.raises(SpecError, match=f"needs {name}: pip install {name}"):
            load_model(f"{name}:resnet18")
    with pytest.raises(SpecError, match="needs torchvision: pip install torchvision"):
        load_data("torchvision:CIFAR10:root", make_transform(LoadedModel(NOTHING, "x:y")))


# ---------------------------------------------------------------------------------------------
# Weights
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"epoch": 3, "state_dict": state},
        lambda state: {"model": {f"module.{k}": v for k, v in state.items()}, "optimizer": {}},
        lambda state: {f"_orig_mod.{key}": value for key, value in state.items()},
    ],
    ids=["plain", "checkpoint", "parallel checkpoint", "compiled"],
)
def test_state_dicts(here: Path, wrap: object) -> None:
    source = load_model("specs_of_a_user:net").model
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    torch.save(wrap(source.state_dict()), here / "w.pt")
    loaded = load_model("specs_of_a_user:net", weights=here / "w.pt")
    for a, b in zip(loaded.model.parameters(), source.parameters(), strict=True):
        assert torch.equal(a, b)
    assert loaded.weights == str(here / "w.pt")
    wrapped = wrap(source.state_dict()).keys() != source.state_dict().keys()
    assert bool(loaded.notes) == wrapped


def test_safetensors(here: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    source = load_model("specs_of_a_user:net").model
    state = {key: value + 1 for key, value in source.state_dict().items()}
    safetensors.save_file(state, here / "w.safetensors")
    load_weights(source, here / "w.safetensors")
    assert torch.equal(source.state_dict()["0.weight"], state["0.weight"])
    (here / "b.safetensors").write_bytes(b"nothing")
    with pytest.raises(SpecError, match="is not a safetensors file"):
        load_weights(source, here / "b.safetensors")


class Evil:
    """Creates a file when it is unpickled."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("open('evil', 'w')",)


def test_weights_that_do_not_do(here: Path) -> None:
    model = load_model("specs_of_a_user:net").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = model.state_dict()
    torch.save(model, here / "whole.pt")
    torch.save(Evil(), here / "evil.pt")
    torch.save({"a": 1, "b": "x"}, here / "dict.pt")
    torch.save(torch.zeros(3), here / "tensor.pt")
    (here / "text.pt").write_text("no weights")
    torch.save({k: v for k, v in state.items() if k != "4.bias"}, here / "missing.pt")
    torch.save({**state, "extra.bias": torch.zeros(1)}, here / "extra.pt")
    torch.save({**state, "4.bias": torch.zeros(7)}, here / "shape.pt")
    torch.save({**state, "0.bias": torch.zeros(7)}, here / "wide.pt")
    for name, message in {
        "none.pt": "there is no file",
        "whole.pt": "holds more than tensors.*Save the state dict alone",
        "evil.pt": "holds more than tensors",
        "dict.pt": "holds no state dict, but a dictionary of a, b",
        "tensor.pt": "holds a Tensor, not a state dict",
        "text.pt": "text.pt holds",
        "missing.pt": "do not fit the model: missing 4.bias$",
        "extra.pt": "not in the model: extra.bias$",
        "shape.pt": r"4.bias is \(7,\) in the file and \(2,\) in the model.*num_classes=7$",
        "wide.pt": r"0.bias is \(7,\) in the file and \(\d+,\) in the model$",
    }.items():
        with pytest.raises(SpecError, match=message):
            load_weights(model, here / name)
    assert not (here / "evil").exists()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: (v * 9).long(),
            r"0.weight holds whole numbers \(torch.int64\) in the file and fl",
        ),
        (lambda v: v > 0, "0.weight holds truth values"),
        (lambda v: v.to(torch.complex64), "0.weight holds complex numbers"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "holds quantised numbers"),
        (lambda v: v.to_sparse(), r"0.weight is sparse in the file.*to_dense\(\)$"),
        (lambda v: v.to("meta"), "0.weight has no values in the file"),
    ],
    ids=["int", "bool", "complex", "quantised", "sparse", "meta"],
)
def test_weights_of_another_kind_are_refused_in_one_line(
    here: Path, change: Callable[[torch.Tensor], torch.Tensor], message: str
) -> None:
    model = load_model("specs_of_a_user:net").model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = model.state_dict()
    torch.save({**state, "0.weight": change(state["0.weight"])}, here / "w.pt")
    with pytest.raises(SpecError, match=message) as error:
        load_weights(model, here / "w.pt")
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 400
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_weights_of_another_precision_do(here: Path) -> None:
    model = load_model("specs_of_a_user:net").model
    state = {key: value.bfloat16() for key, value in model.state_dict().items()}
    torch.save(state, here / "w.pt")
    assert load_weights(model, here / "w.pt") == ()
    assert torch.equal(model.state_dict()["0.weight"], state["0.weight"].float())


# ---------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------


def plain() -> LoadedModel:
    return LoadedModel(NOTHING, "x:y")


def test_the_usual_way_is_named(here: Path) -> None:
    made = make_transform(plain())
    assert made.function == ImageTransform()
    assert "does not say how images are prepared" in made.note
    small = photos(here / "small", "a/1.png", "b/1.png")
    assert make_transform(plain(), data=str(small)).function == ImageTransform(None, None)
    mixed = photos(here / "small", "c/1.png", size=(9, 8))
    assert make_transform(plain(), data=str(mixed)).function == ImageTransform()
    large = photos(here / "large", "a/1.png", size=(200, 200))
    assert make_transform(plain(), data=str(large)).function == ImageTransform()
    full = make_transform(plain(), options={"resize": 9, "mean": (0, 0, 0), "std": (1, 1, 1)})
    assert full.note == ""
    assert make_transform(plain(), record=full.record).function == full.function


def test_a_factory_of_transforms() -> None:
    made = make_transform(plain(), factory="specs_of_a_user:transform")
    assert made.function(None).shape == (3, 5, 5)
    assert made.random
    assert make_transform(plain(), record=made.record).function(None).shape == (3, 5, 5)
    with pytest.raises(SpecError, match="leave out --resize"):
        make_transform(plain(), factory="specs_of_a_user:transform", options={"crop": 3})
    with pytest.raises(SpecError, match="returned a int, not a transform"):
        make_transform(plain(), factory="specs_of_a_user:no_net")
    with pytest.raises(SpecError, match="crop must be a number"):
        make_transform(plain(), options={"crop": -3})


# ---------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------


def test_folders(here: Path) -> None:
    root = photos(here / "p", "cat/1.png", "dog/1.png", "dog/2.png")
    small = make_transform(plain(), data=str(root))
    loaded = load_data(str(root), small, n_classes=2)
    assert loaded.names == {0: "cat", 1: "dog"}
    assert as_source(loaded.data).labels.tolist() == [0, 1, 1]
    assert not as_source(loaded.data).augmented
    loader = load_data(str(root), small, n_classes=9, class_index={"cat": 3, "dog": 5}, n_workers=1)
    assert isinstance(loader.data, DataLoader)
    assert loader.names == {3: "cat", 5: "dog"}
    random = make_transform(plain(), factory="specs_of_a_user:transform")
    assert as_source(load_data(str(root), random).data).augmented
    with pytest.raises(ValueError, match="2 class folders and the network has 5 outputs"):
        load_data(str(root), small, n_classes=5)


def test_factories_of_data() -> None:
    made = make_transform(plain(), factory="specs_of_a_user:transform")
    assert as_source(load_data("specs_of_a_user:plain_data", made).data).labels.sum() == 2
    inputs, labels = load_data("specs_of_a_user:given", made).data
    assert inputs.shape == (2, 3, 5, 5)
    assert labels.tolist() == [0, 1]
    assert load_data("specs_of_a_user:Given", made).names == {0: "x", 1: "y"}


def test_torchvision_data(here: Path) -> None:
    pytest.importorskip("torchvision")
    made = make_transform(plain(), options={"resize": None, "crop": None})
    loaded = load_data("torchvision:FakeData", made)
    assert loaded.data[0][0].shape == (3, 224, 224)
    for name, message in {
        "torchvision:CIFAR11:x": "no dataset 'CIFAR11'; did you mean CIFAR1",
        "torchvision:CIFAR10": "say where CIFAR10 lies: torchvision:CIFAR10:FOLDER",
        "torchvision:CIFAR10:nowhere": "CIFAR10 cannot be opened.*Nothing is downloaded",
        "torchvision:CIFAR10:nowhere:val": "has the splits train and test, not 'val'",
    }.items():
        with pytest.raises(SpecError, match=message):
            load_data(name, made)
    assert not (here / "nowhere").exists()


def test_data_that_are_not_there(here: Path) -> None:
    made = make_transform(plain())
    photos(here / "photos", "a/1.png")
    with pytest.raises(FileNotFoundError, match="there is no folder phtos; did you mean photos"):
        load_data("phtos", made)


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------

NAMES = {0: "cat", 1: "dog", 2: "hen, white", 5: "Crane", 7: "crane"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, [0, 1, 2, 5, 7]),
        ("0-2, 7", [0, 1, 2, 7]),
        (["7", "0-1"], [0, 1, 7]),
        ("dog,CAT", [0, 1]),
        ("hen, white", [2]),
        (["hen, white", "5"], [2, 5]),
        ("2-99", [2, 5, 7]),
    ],
)
def test_tasks(text: object, expected: list[int]) -> None:
    assert parse_tasks(text, NAMES, NAMES) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "there is no class 3; there are 0, 1, 2, 5, 7"),
        ("8-9", "there is no class 8-9"),
        ("5-2", "the range 5-2 goes backwards; write 2-5"),
        ("dgo", "there is no class 'dgo'; did you mean dog"),
        ("crane", r"'crane' is the name of classes \[5, 7\]; give the number"),
        (",", "no tasks are named"),
        ("-3", "there is no class '-3'"),
    ],
)
def test_tasks_that_are_none(text: str, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        parse_tasks(text, NAMES, NAMES)
