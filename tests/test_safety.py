"""What docs/safety.md says: what a file can make us do, what is written, how much is started."""

from __future__ import annotations

import ast
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nad_attr import GateStore, GateStoreError, Recipe, RunOptions, TaskGates, learn_to_store
from nad_attr.data.fingerprints import data_fingerprint
from nad_attr.data.images import ImageFolderData, ImageTransform
from nad_attr.data.sources import as_source
from nad_attr.learning.ray_executor import RayExecutor
from nad_attr.specs import SpecError, is_plain_model, load_data, make_transform
from nad_attr.specs.models import LoadedModel
from nad_attr.system.files import check_output, replacing, what_is, write_text
from nad_attr.system.processes import most_processes
from tests.helpers import invoke

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("typer")

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "safety.md"
CLASSES = ("blue", "red")
MODULE = """
from pathlib import Path

import torch
from torch import nn


def tiny(act="ReLU"):
    Path("called").touch()
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), getattr(nn, act)(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, 2),
    )


def transform():
    Path("called").touch()
    return lambda image: torch.zeros(3, 4, 4)
"""


def refused(code: int, message: str, *arguments: object) -> str:
    """One line of error, and every file is as it was."""
    before = contents(Path())
    outcome = invoke(*arguments)
    text = " ".join(outcome.output.split())
    assert outcome.exit_code == code, outcome.output
    assert message in text, outcome.output
    assert "Traceback" not in text
    assert contents(Path()) == before
    return text


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a module, photos, weights and gates."""
    root = tmp_path_factory.mktemp("user")
    (root / "tiny_nets.py").write_text(MODULE)
    random = np.random.default_rng(0)
    for label, name in enumerate(CLASSES):
        (root / "photos" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 160, (4, 4, 3))
            pixels[:, :, 2 * label] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(root / "photos" / name / f"{i}.png")
    before = os.getcwd()
    os.chdir(root)
    try:
        learned = invoke(*LEARN, "--out", "gates.h5", "-q")
        assert learned.exit_code == 0, learned.output
        import tiny_nets

        torch.save(tiny_nets.tiny().state_dict(), "weights.pt")
    finally:
        os.chdir(before)
    (root / "called").unlink()
    return root


LEARN = (
    *("learn", "--model", "tiny_nets:tiny", "--data", "photos", "--steps", "2", "--resize", "0"),
    *("--crop", "0", "--device", "cpu"),
)


@pytest.fixture
def here(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import shutil

    shutil.copytree(user, tmp_path / "here", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def forged(path: str, **changes: Any) -> None:
    """The gates with another story of where they come from."""
    with GateStore.open("gates.h5") as store:
        options = {"recipe": store.recipe, "means": store.means}
        facts = {**store.provenance, **changes}
        with GateStore.create(path, store.sites, provenance=facts, **options) as other:
            other.append(store.read())


# ---------------------------------------------------------------------------------------------
# Files from elsewhere
# ---------------------------------------------------------------------------------------------

#: Every command that makes a network that a file names.
USERS = {
    "evaluate": ("evaluate", "evil.h5", "--data", "photos", "--device", "cpu"),
    "attribute": ("attribute", "evil.h5", "photos/red/0.png", "--device", "cpu"),
    "report": ("report", "evil.h5", "--data", "photos", "--device", "cpu"),
    "compare": ("compare", "evil.h5", "--with", "energy", "--data", "photos", "--device", "cpu"),
}
EVIL: dict[str, dict[str, Any]] = {
    "--model os:system": {"model": "os:system", "model_arguments": {"command": "touch called"}},
    "--model tiny_nets:tiny": {},
    "--model timm:local-dir:nets": {"model": "timm:local-dir:nets"},
    "--model-arg checkpoint_path": {
        "model": "timm:resnet18",
        "model_arguments": {"checkpoint_path": "weights.pt"},
    },
    "--weights weights.pt": {"model": "torchvision:resnet18:none", "weights": "weights.pt"},
    "--transform tiny_nets:transform": {
        "model": "torchvision:resnet18:none",
        "transform": {"kind": "factory", "factory": "tiny_nets:transform"},
    },
}


@pytest.mark.parametrize("command", USERS)
@pytest.mark.parametrize("said", EVIL)
def test_a_file_names_nothing_to_call_or_read(here: Path, command: str, said: str) -> None:
    forged("evil.h5", **EVIL[said])
    text = refused(1, said.partition(" ")[0], *USERS[command])
    assert said.replace("checkpoint_path", "'checkpoint_path") in text
    assert "--trust-file" in text
    assert not Path("called").exists()


@pytest.mark.parametrize(
    "command",
    [
        (*USERS["evaluate"], "--ablation", "mean"),
        (*USERS["report"], "--with", "energy"),
        USERS["compare"],
    ],
)
def test_a_file_names_no_training_images(here: Path, command: tuple[str, ...]) -> None:
    forged("evil.h5", data="tiny_nets:tiny")
    mine = ("--model", "tiny_nets:tiny")
    before = contents(Path())
    outcome = invoke(*command, *mine)
    assert outcome.exit_code == 1
    assert "--train-data tiny_nets:tiny (or --trust-file" in " ".join(outcome.output.split())
    after = contents(Path())
    assert after.pop("called") == b""  # the network, which the user named
    assert after == before


def test_a_trusted_file_says_first_what_is_called(here: Path) -> None:
    evaluate = (
        "evaluate",
        "gates.h5",
        "--data",
        "photos",
        "--device",
        "cpu",
        "--random",
        "0",
        "-q",
    )
    forged("fails.h5", model="tiny_nets:none_such")
    outcome = invoke("evaluate", "fails.h5", *evaluate[2:], "--trust-file")
    lines = outcome.output.splitlines()
    assert lines[0] == "trusted: the file of the gates says --model tiny_nets:none_such"
    assert lines[1].startswith("Error: tiny_nets has no 'none_such'")
    outcome = invoke(*evaluate, "--trust-file")
    assert outcome.exit_code == 0, outcome.output
    assert "--model tiny_nets:tiny" in outcome.output
    said = invoke(*evaluate, "--model", "tiny_nets:tiny")
    assert said.exit_code == 0
    assert "trusted" not in said.output


def test_what_a_file_names_is_shown_without_control_characters(here: Path) -> None:
    forged("evil.h5", model="a:b\x1b]52;c;x\x07\n\u202ecod.exe")
    text = refused(1, "--model", *USERS["evaluate"])
    assert "\\x1b]52" in text
    assert not set(text) & {"\x1b", "\x07", "\u202e"}


@pytest.mark.parametrize(
    ("name", "arguments", "plain"),
    [
        ("torchvision:resnet50", {}, True),
        ("torchvision:resnet50:IMAGENET1K_V1", {"num_classes": 10}, True),
        ("timm:vit_base_patch16_224.augreg_in21k", {"img_size": [224, 224]}, True),
        ("timm:resnet18:none", {"global_pool": "avg", "drop_rate": 0.1}, True),
        ("os:system", {}, False),
        ("torchvision:resnet50\n", {}, False),
        ("torchvision.models:resnet50", {}, False),
        ("timm:hf-hub:someone/net", {}, False),
        ("timm:hf-hub:net", {}, False),
        ("timm:../nets", {}, False),
        ("timm:resnet18", {"pretrained_cfg": {"file": "x"}}, False),
        ("timm:resnet18", {"pretrained": True}, False),
        ("timm:resnet18", {"cache_dir": "x"}, False),
        ("timm:resnet18", {"anything": "x"}, False),
        ("torchvision:resnet18", {"num_classes": 10**9}, False),
        ("torchvision:resnet18", {"num_classes": [[1]]}, False),
        (7, {}, False),
        ("torchvision:resnet18", [1], False),
    ],
)
def test_plain_names_of_networks(name: Any, arguments: Any, plain: bool) -> None:
    assert is_plain_model(name, arguments) is plain


def test_a_transform_from_a_file_is_checked_numbers() -> None:
    loaded = LoadedModel(nn.Identity(), "m")
    for record in ({"resize": 10**9}, {"mean": ["x", 1, 2]}, {"interpolation": "os:system"}):
        with pytest.raises(SpecError):
            make_transform(loaded, record={"kind": "options", **record})


# ---------------------------------------------------------------------------------------------
# What is written
# ---------------------------------------------------------------------------------------------


def _linked(name: str) -> None:
    os.link("gates.h5", name)


def _hdf5(name: str) -> None:
    Path(name).write_bytes(Path("gates.h5").read_bytes())


def _nothing(name: str) -> None:
    pass


MINE = ("gates.h5", "--trust-file", "--device", "cpu")
#: Commands, what there is at their output's place, and the output.
EATEN: list[tuple[tuple[str, ...], Callable[[str], None], str]] = [
    *(
        (command, make, name)
        for command in (
            ("export", "gates.h5", "--csv"),
            ("export", "gates.h5", "--json"),
            ("attribute", *MINE, "photos/red/0.png", "--csv"),
            ("compare", "gates.h5", "--json"),
            ("report", "gates.h5", "--out"),
            ("sites", "--model", "tiny_nets:tiny", "--input", "3x4x4", "--json"),
        )
        for make, name in (
            (_nothing, "gates.h5"),
            (_linked, "linked.txt"),
            (_hdf5, "other.h5"),
            (_nothing, "gates.h5.journal"),
            (_nothing, "photos/red/0.png"),
            (_nothing, "tiny_nets.py"),
        )
    ),
    (("export", "gates.h5", "--npz"), lambda name: os.link("gates.h5", name), "linked.npz"),
    (("export", "gates.h5", "--csv", "a.csv", "--json"), _nothing, "a.csv"),
    (("evaluate", *MINE, "--data", "photos", "--out"), _linked, "linked.json"),
    (("evaluate", *MINE, "--data", "photos", "--out"), _hdf5, "other.csv"),
    (("attribute", *MINE, "photos/red/0.png", "--hdf5"), _nothing, "photos/red/0.png"),
    (("attribute", *MINE, "photos/red/0.png", "--hdf5"), _nothing, "weights.pt"),
    ((*LEARN, "--weights", "weights.pt", "--overwrite", "--out"), _nothing, "weights.pt"),
    ((*LEARN, "--overwrite", "--out"), _nothing, "photos/red/0.png"),
    ((*LEARN, "--overwrite", "--out"), _hdf5, "photos/red/other.h5"),
    ((*LEARN, "--overwrite", "--out"), _nothing, "tiny_nets.py"),
    (("merge", "gates.h5", "gates.h5", "--overwrite", "--out"), _linked, "linked.h5"),
    (("merge", "gates.h5", "gates.h5", "--overwrite", "--out"), _nothing, "weights.pt"),
]


@pytest.mark.parametrize(("command", "make", "name"), EATEN)
def test_no_output_replaces_an_input_or_a_file_of_another_kind(
    here: Path, command: tuple[str, ...], make: Callable[[str], None], name: str
) -> None:
    make(name)
    refused(2, Path(name).name, *command, name)
    assert not Path("called").exists()  # before any work


def test_what_stands_beside_class_folders_is_replaced(here: Path) -> None:
    for name in ("gates.h5", "tiny_nets.py"):
        Path("photos", name).write_bytes(Path(name).read_bytes())
    os.chdir("photos")
    learn = ("." if word == "photos" else word for word in LEARN)
    outcome = invoke(*learn, "--out", "gates.h5", "--overwrite", "-q")
    assert outcome.exit_code == 0, outcome.output
    assert invoke("report", "gates.h5", "--out", "a.html", "-q").exit_code == 0
    assert invoke("report", "gates.h5", "--out", "a.html", "-q").exit_code == 0


def test_json_inputs_are_not_replaced(here: Path) -> None:
    Path("index.json").write_text('{"blue": 0, "red": 1}')
    os.link("index.json", "out.json")
    index = ("--class-index", "index.json")
    refused(2, "index.json", "evaluate", *MINE, "--data", "photos", *index, "--out", "out.json")


def test_merge_with_a_bad_input_keeps_the_file_that_is_there(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hdf5("a.h5")
    _hdf5("old.h5")
    Path("bad.h5").write_bytes(Path("gates.h5").read_bytes()[:3000])
    refused(1, "bad.h5", "merge", "a.h5", "bad.h5", "--overwrite", "--out", "old.h5")
    refused(1, "none.h5", "merge", "a.h5", "none.h5", "--overwrite", "--out", "old.h5")
    # Damage that comes to light when half is copied.
    before = contents(Path())
    read = GateStore.read

    def fails(store: GateStore, tasks: Any = None) -> TaskGates:
        if tasks is not None and store.path.name == "a.h5" and merging:
            raise GateStoreError("damaged")
        return read(store, tasks)

    merging = True
    monkeypatch.setattr(GateStore, "read", fails)
    monkeypatch.setattr(GateStore, "check_same_gates", lambda *stores: None)
    with pytest.raises(GateStoreError, match="damaged"):
        GateStore.merge(["gates.h5", "a.h5"], "old.h5", overwrite=True)
    merging = False
    assert contents(Path()) == before
    GateStore.merge(["gates.h5", "a.h5"], "old.h5", overwrite=True)
    assert len(TaskGates.load("old.h5")) == 2


def test_a_store_is_not_sliced_onto_itself(here: Path) -> None:
    os.link("gates.h5", "linked.h5")
    before = contents(Path())
    with GateStore.open("gates.h5") as store, pytest.raises(GateStoreError, match="is read"):
        store.slice([0], "linked.h5", overwrite=True)
    assert contents(Path()) == before


def test_gates_replace_hdf5_files_only(here: Path) -> None:
    gates = TaskGates.load("gates.h5")
    before = contents(Path())
    for save in (gates.save, gates.sub_architecture(0).save):
        for name in ("weights.pt", "tiny_nets.py", "photos/red/0.png"):
            with pytest.raises(GateStoreError, match="not an HDF5 file"):
                save(name)
    assert contents(Path()) == before


def _curves() -> Any:
    from nad_attr.evaluation.sweeps.curves import Curves

    return Curves


def test_a_full_disk_truncates_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nad_attr.evaluation import Evaluation, SizeSweep, evaluate
    from nad_attr.evaluation.sweeps.curves import Curves
    from nad_attr.report import Report

    images, labels = torch.rand(6, 3, 4, 4), torch.arange(6) % 2
    import tiny_nets

    gates = TaskGates.load("gates.h5")
    evaluation: Evaluation = evaluate(tiny_nets.tiny().eval(), gates, (images, labels), n_random=0)
    Path("called").unlink()
    monkeypatch.setattr(SizeSweep, "to_dict", lambda self: {})
    monkeypatch.setattr(Curves, "to_dict", lambda self: {})
    writers: dict[str, Callable[[str], Any]] = {
        "a.json": evaluation.save,
        "b.json": object.__new__(SizeSweep).save,
        "c.json": object.__new__(Curves).save,
        "d.html": Report("gates.h5").save,
        "e.h5": gates.save,
        "f.h5": evaluation.save,
        "g.h5": gates.sub_architecture(0).save,
    }
    commands = {
        "h.csv": ("export", "gates.h5", "--csv"),
        "i.json": ("export", "gates.h5", "--json"),
        "j.npz": ("export", "gates.h5", "--npz"),
        "k.json": ("compare", "gates.h5", "--json"),
        "l.json": ("sites", "--model", "tiny_nets:tiny", "--input", "3x4x4", "--json"),
        "m.csv": ("attribute", *MINE, "photos/red/0.png", "--csv"),
        "n.h5": ("merge", "gates.h5", "gates.h5", "--overwrite", "--out"),
    }
    for name, save in writers.items():
        save(name)
    for name, command in commands.items():
        assert invoke(*command, name).exit_code == 0
    before = contents(Path())

    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    for name, save in writers.items():
        with pytest.raises(OSError, match="No space left"):
            save(name)
    for name, command in commands.items():
        outcome = invoke(*command, name)
        assert outcome.exit_code == 1, outcome.output
        assert "No space left" in outcome.output
    assert contents(Path()) == before


def test_nothing_is_written_past_the_one_way_to_write() -> None:
    """Every place that writes a file, found in the source, so that a new one is seen."""
    writes = re.compile(
        r"\.write_(text|bytes)\(|(?<!GateStore\.)(?<!def )\bopen\([^)]*[\"'][wax]b?\+?[\"']"
        r"|\.savefig\(|np\.savez?\w*\("
        r"|torch\.save\(|\.to_(csv|html|json|excel|pickle|parquet)\([^)]|h5py\.File\([^)]*\"[wa]\""
    )
    found = {
        (path.relative_to(ROOT / "nad_attr").as_posix(), line.strip())
        for path in sorted((ROOT / "nad_attr").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if writes.search(line) and not line.strip().startswith((">>>", "...", "#", '"', "``"))
    }
    # Into a file that is not there yet, which replacing() or written() gave, or into the folder
    # that _appearing() moves as a whole.
    allowed = {
        ("system/files.py", r"open\(target, .w"),
        ("system/files.py", r"with replacing\(target\) as scratch, scratch.open\("),
        ("store/_write.py", r"h5py.File\(scratch, "),
        ("cli/messages.py", r"to_csv\(file, "),
        ("cli/stores.py", r"with replacing\(npz_file\) as scratch, scratch.open\("),
        ("cli/stores.py", r"np.savez_compressed\(file, "),
        ("cli/flow.py", r"savefig\(scratch, "),
        ("examples/demo.py", r"figure.savefig\(scratch, "),
        ("bridges/virelay.py", r"\(made / (LABEL_MAP|PROJECT)\).write_text\("),
        ("bridges/virelay.py", r"with h5py.File\(path, .w"),
        ("specs/models.py", r"is not run\. Save the state dict alone"),
    }
    others = [
        (file, line)
        for file, line in found
        if not any(file == known and re.search(text, line) for known, text in allowed)
    ]
    assert not others


def test_what_is_replaced_keeps_its_rights_and_its_links(tmp_path: Path) -> None:
    target, link = tmp_path / "a.txt", tmp_path / "link.txt"
    target.write_text("old")
    target.chmod(0o600)
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    with pytest.raises(RuntimeError, match="half"), replacing(target) as scratch:
        scratch.write_text("half")
        raise RuntimeError("half")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "link.txt"]
    write_text(os.devnull, "x")
    assert what_is(os.devnull) == "device"


def test_a_write_protected_file_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(0o400)
    # The answer that a user gets who is not root.
    monkeypatch.setattr(os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    with pytest.raises(PermissionError, match="write-protected"):
        write_text(target, "new")
    assert contents(tmp_path) == {str(target): b"old"}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "empty"),
        (b"text", "text"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (bytes(512) + b"\x89HDF\r\n\x1a\n", "HDF5"),
        (bytes(2048) + b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"nad_attr journal 1\n", "journal"),
        (b"PK\x03\x04", "archive"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (b"a\0b", "data"),
    ],
)
def test_what_a_file_is(tmp_path: Path, content: bytes, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    assert what_is(path) == kind
    if kind in ("empty", "text"):
        check_output(path)
    else:
        with pytest.raises(FileExistsError, match="not replaced"):
            check_output(path)


def test_virelay_keeps_the_earlier_project_if_a_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nad_attr import GateSite, SubArchitecture
    from nad_attr.bridges import virelay

    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    ).eval()
    archs = [
        SubArchitecture.from_kept({"1": [k, 2]}, [GateSite("1", 4, 1)], task=k) for k in range(2)
    ]

    def export(**options: Any) -> None:
        data = torch.rand(8, 3, 8, 8), torch.arange(8) % 2
        virelay.export_virelay(
            net, archs, data, tmp_path / "p", embeddings=["pca"], n_clusters=[], **options
        )

    export()
    (tmp_path / "p" / "mine.txt").write_text("the user's")
    before = contents(tmp_path)
    replace, calls = os.replace, 0
    for fails_at in range(1, 13):  # six files away, six in

        def failing(source: Any, target: Any, at: int = fails_at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                raise OSError(5, "Input/output error")
            replace(source, target)

        calls = 0
        with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
            patch.setattr(os, "replace", failing)
            export(overwrite=True)
        assert contents(tmp_path) == before, fails_at
        assert [path.name for path in tmp_path.iterdir()] == ["p"]
    export(overwrite=True, project_name="second")
    assert "second" in (tmp_path / "p" / "project.yaml").read_text()
    assert (tmp_path / "p" / "mine.txt").exists()
    # Not onto the gates either.
    TaskGates({"1": torch.rand(2, 4)}, [GateSite("1", 4, 1)], [0, 1]).save(tmp_path / "g.h5")
    os.remove(tmp_path / "p" / "dataset.h5")
    os.link(tmp_path / "g.h5", tmp_path / "p" / "dataset.h5")
    with pytest.raises(FileExistsError, match="file of the gates"):
        virelay.export_virelay(
            net,
            tmp_path / "g.h5",
            (torch.rand(8, 3, 8, 8), torch.arange(8) % 2),
            tmp_path / "p",
            overwrite=True,
        )


# ---------------------------------------------------------------------------------------------
# Runs that go on
# ---------------------------------------------------------------------------------------------


def begun(path: Path, model: nn.Module, data: Any, **options: Any) -> Path:
    settings = {"recipe": Recipe(size=0.5, steps=2, images_per_step=4), "batch_size": 4, **options}
    return learn_to_store(model, data, path, **settings)


def network(activation: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 1), activation, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(*layers).eval()


def test_another_activation_with_the_same_weights_does_not_go_on(tmp_path: Path) -> None:
    data = _labelled()
    path = begun(tmp_path / "gates.h5", network(nn.ReLU()), data, tasks=[0])
    with pytest.raises(GateStoreError, match=r"model \(its weights are the same, but not its out"):
        begun(path, network(nn.GELU()), data, tasks=[0, 1], resume=True)
    begun(path, network(nn.ReLU()), data, tasks=[0, 1], resume=True)
    assert len(TaskGates.load(path)) == 2
    # As the jobs of an array, put together at the end.
    other = begun(tmp_path / "other.h5", network(nn.GELU()), data, tasks=[1])
    with pytest.raises(GateStoreError, match="outputs"):
        GateStore.merge([path, other], tmp_path / "both.h5")
    begun(path, network(nn.GELU()), data, tasks=[0, 1], resume=True, may_differ=["model"])


def _labelled(n: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(n, 3, 4, 4, generator=generator), torch.arange(n) % 2


def photos(folder: Path, n: int = 15) -> ImageFolderData:
    random = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for i in range(n):
            pixels = random.integers(0, 255, (4, 4, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i:02d}.bmp")
    return ImageFolderData(folder, ImageTransform(None, None))


def test_a_folder_in_which_images_were_exchanged_does_not_go_on(tmp_path: Path) -> None:
    data = photos(tmp_path / "photos")
    path = begun(tmp_path / "gates.h5", network(nn.ReLU()), data, tasks=[0])
    grey = np.full((4, 4, 3), 99, np.uint8)
    for number in (1, 3, 8):  # none that is among the eight drawn ones
        kept = data.path(number).read_bytes()
        Image.fromarray(grey).save(data.path(number))
        assert len(kept) == data.path(number).stat().st_size
        with pytest.raises(GateStoreError, match=r"data \(data_fingerprint"):
            begun(path, network(nn.ReLU()), data, tasks=[0, 1], resume=True)
        data.path(number).write_bytes(kept)
    begun(path, network(nn.ReLU()), data, tasks=[0, 1], resume=True)


def test_fingerprints_notice_one_image(tmp_path: Path) -> None:
    images, labels = _labelled(500)
    found = data_fingerprint((images, labels))
    assert found == data_fingerprint(DataLoader(TensorDataset(images, labels), batch_size=7))
    other = images.clone()
    other[123, 0, 2, 1] += 1e-3
    assert found != data_fingerprint((other, labels))

    class Listed(torch.utils.data.Dataset[Any]):
        def __init__(self, images: torch.Tensor) -> None:
            self.images, self.targets = images, labels[: len(images)].tolist()

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, i: int) -> Any:
            return self.images[i], self.targets[i]

    other = images[:60].clone()
    other[23] = 0
    assert data_fingerprint(Listed(images[:60])) != data_fingerprint(Listed(other))
    # Of a part of a folder, its files count alone; names, also where all else is the same.
    data = photos(tmp_path / "photos", 4)
    part = torch.utils.data.Subset(data, [0, 1, 5, 6])
    before, whole = data_fingerprint(part), data_fingerprint(data)
    data.path(2).rename(data.path(2).with_name("022.bmp"))
    again = ImageFolderData(tmp_path / "photos", ImageTransform(None, None))
    assert data_fingerprint(again) != whole
    assert data_fingerprint(torch.utils.data.Subset(again, [0, 1, 5, 6])) == before
    # Elsewhere, the same files are the same data.
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = ImageFolderData(tmp_path / "moved", ImageTransform(None, None))
    assert data_fingerprint(moved) == data_fingerprint(moved)
    assert data_fingerprint(torch.utils.data.Subset(moved, [0, 1, 5, 6])) == before


def test_a_dissection_of_another_network_does_not_go_on(tmp_path: Path) -> None:
    from nad_attr.concepts import Concept, dissect

    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    maps = (images[:, 0] > 0.5).long()
    concepts = [Concept("other", "colour"), Concept("red", "colour")]

    class Breaking(torch.utils.data.Dataset[Any]):
        breaks = True

        def __len__(self) -> int:
            return 6

        def __getitem__(self, i: int) -> Any:
            if self.breaks and i == 4:
                self.seen += 1
                if self.seen > 1:
                    raise OSError("gone")
            return images[i], maps[i]

        seen = 0

    def run(model: nn.Module, data: Any) -> Any:
        return dissect(
            *(model, ["1"], data),
            concepts=concepts,
            checkpoint=tmp_path / "state.h5",
            checkpoint_every=1,
            run=RunOptions(batch_size=1),
        )

    data = Breaking()
    with pytest.raises(OSError, match="gone"):
        run(network(nn.ReLU()), data)
    assert (tmp_path / "state.h5").exists()
    data.breaks = False
    with pytest.raises(GateStoreError, match="outputs differ"):
        run(network(nn.GELU()), data)
    run(network(nn.ReLU()), data)


# ---------------------------------------------------------------------------------------------
# Processes and signals
# ---------------------------------------------------------------------------------------------


def test_far_more_processes_than_cpus_are_refused(here: Path) -> None:
    many = most_processes() + 1
    images, labels = _labelled()
    with pytest.raises(ValueError, match="n_workers must be at most"):
        load_data("photos", make_transform(LoadedModel(nn.Identity(), "m")), n_workers=many)
    with pytest.raises(ValueError, match="n_workers must be at most"):
        ImageFolderData("photos").check(n_workers=many)
    with pytest.raises(ValueError, match="num_workers of the loader must be at most"):
        loader = DataLoader.__new__(DataLoader)
        loader.__dict__.update(DataLoader(TensorDataset(images, labels)).__dict__)
        loader.__dict__["num_workers"] = many
        as_source(loader)
    with pytest.raises(ValueError, match="n_workers must be at most"):
        RayExecutor("local", n_workers=100_000)
    from nad_attr.concepts.dissection.labelled_images import LabelledImages

    with pytest.raises(ValueError, match="n_workers must be at most"):
        LabelledImages(TensorDataset(images, labels), n_workers=many)
    for command in (
        (*LEARN, "--out", "new.h5"),
        ("evaluate", *MINE, "--data", "photos"),
        ("compare", *MINE, "--with", "energy", "--data", "photos"),
        ("report", *MINE, "--data", "photos"),
    ):
        refused(2, "at most", *command, "--workers", "100000")
    refused(2, "at most", *LEARN, "--out", "new.h5", "--ray", "local", "--ray-workers", "100000")


def test_ray_workers_are_counted_against_the_cluster() -> None:
    class Ray:
        @staticmethod
        def nodes() -> list[dict[str, Any]]:
            return [{"Alive": True, "Resources": {"CPU": 8.0}}]

    with pytest.raises(ValueError, match="must be at most"):
        RayExecutor("auto", cpus_per_worker=0.001)._check_room(Ray, 0.001, 1000)
    RayExecutor("auto", n_workers=1000)._check_room(Ray, 1, 1000)  # no more than fit


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")
def test_ctrl_c_while_torch_is_imported_is_a_line_and_130(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import time\nprint('importing', flush=True)\ntime.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "nad_attr.cli", "sites", "--model", "torchvision:resnet18"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "importing"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert errors.strip() == "Stopped."


# ---------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------


def test_every_row_of_the_page_is_held_by_a_test() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for heading in ("## Files from elsewhere", "## What is written", "## What is restored"):
        assert heading in text
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("|")
        and not line.startswith(("|---", "| what", "| who", "| situation |"))
    ]
    assert len(rows) > 15
    for row in rows:
        named = re.findall(r"`(test_\w+)(?:\.py)?::(test_\w+)`", row.split("|")[-2])
        assert named, f"no test is named: {row}"
        for file, name in named:
            tree = ast.parse((ROOT / "tests" / f"{file}.py").read_text(encoding="utf-8"))
            tests = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            assert name in tests, f"{file} has no {name}"
