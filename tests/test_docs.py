"""README and docs: every code block runs, every public name is in the reference, links resolve.

The blocks run on small stand-ins for what a reader has: photos of ten classes, a network of their
own, torchvision's networks. All that is replaced stands in ``stand_ins`` and ``shop``.
Tutorials (and all ``{code-cell}`` blocks) are run by ``make docs``, docs/howto by
``tests/test_howto.py``. A block that cannot run says why in a comment before it:
``<!-- not run: it needs SLURM -->``.
"""

from __future__ import annotations

import ast
import glob
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import nad_attr
from nad_attr import Recipe, learn_gates
from nad_attr.explaining.parts import SIZES
from tests.helpers import command_line, fit_briefly, invoke, learn_briefly
from tests.stores import make_gates

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

#: Blocks of a page that go on from something: what the page takes for granted.
GIVEN = {
    "docs/cluster.md": ("model", "data"),
    "docs/contributing.md": ("model", "gates", "images", "labels"),
}
#: The ten classes of the command line's page, and of all stand-ins.
CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
SHELL = ("console", "sh", "bash", "shell")
#: Languages whose blocks show something and are not code.
SHOWN = ("text",)
#: Commands that a reader needs and a test must not run: they make environments and go there.
SET_UP = re.compile(r"(python3? -m venv|\. \.venv/|source |cd |export )")


# ---------------------------------------------------------------------------------------------
# The blocks
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    reason: str | None  # why it is not run

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str) -> list[Block]:
    lines, found, i = text.splitlines(), [], 0
    while i < len(lines):
        opening = re.match(r"^(\s*)(`{3,}|:{3,})\s*(.*)$", lines[i])
        if not opening:
            i += 1
            continue
        indent, fence, info = opening.groups()
        start = i
        i += 1
        while i < len(lines) and lines[i].strip() != fence:
            i += 1
        assert i < len(lines), f"{page}:{start + 1}: the block does not end"
        body = [line[len(indent) :] for line in lines[start + 1 : i]]
        above = next((line for line in reversed(lines[:start]) if line.strip()), "")
        reason = re.search(r"<!--\s*not run:\s*(.+?)\s*-->", above)
        language = info.split()[0] if info.split() else ""
        found.append(
            Block(page, start + 1, language, "\n".join(body), reason[1] if reason else None)
        )
        i += 1
    return found


def pages() -> list[Path]:
    left_out = (DOCS / "_build", DOCS / "reference" / "pages", DOCS / "howto")
    found = [
        path
        for path in sorted(DOCS.rglob("*.md"))
        if not any(folder in path.parents for folder in left_out)
    ]
    return [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *found]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


BLOCKS = {
    name_of(path): blocks_of(path.read_text(encoding="utf-8"), name_of(path)) for path in pages()
}


def test_blocks_are_found() -> None:
    text = """
<!-- not run: it needs a moon -->
```python
rocket()
```

- a list

  ```console
  $ nad-attr sites
  ```

```{toctree}
index
```
"""
    found = blocks_of(text, "page.md")
    assert [block.language for block in found] == ["python", "console", "{toctree}"]
    assert [block.reason for block in found] == ["it needs a moon", None, None]
    assert found[1].text == "$ nad-attr sites"
    assert found[0].line == 3


@pytest.mark.parametrize("page", BLOCKS)
def test_every_block_is_run_or_says_why_not(page: str) -> None:
    for block in BLOCKS[page]:
        built = block.language.startswith("{")  # by Sphinx
        run = block.language == "python" or block.language in SHELL
        if page.startswith("docs/tutorials/"):
            run = False  # there, only cells are
        assert built or run or block.reason or block.language in SHOWN, (
            f"{block.where}: a block of {block.language or 'no language'} that nobody runs; say "
            "why in a comment before it, <!-- not run: ... -->"
        )


# ---------------------------------------------------------------------------------------------
# What a reader has
# ---------------------------------------------------------------------------------------------

MYNETS = '''
import torch
from torch import nn


def cifar_resnet20(num_classes=10):
    """Not that, but as small as can be."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.Conv2d(8, 10, 3, padding=1, stride=2), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(10, num_classes),
        )


small = net = cifar_resnet20
'''


def small_network(num_classes: int = 10) -> nn.Module:
    names: dict[str, Any] = {}
    exec(MYNETS, names)
    network: nn.Module = names["cifar_resnet20"](num_classes)
    return network.eval()


def write_photos(root: Path, n: int, names: tuple[str, ...] = CLASSES) -> None:
    image = pytest.importorskip("PIL.Image")
    random = np.random.default_rng(0)
    for k, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(n):
            pixels = random.integers(0, 120, (16, 16, 3))
            pixels[:, :, k % 3] += 8 * k
            image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:04}.jpg")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, networks and gates, to be copied for each page."""
    root = tmp_path_factory.mktemp("shop")
    write_photos(root / "photos" / "train", 4)
    write_photos(root / "photos" / "val", 3)
    write_photos(root / "pets", 2, ("cat", "dog"))
    (root / "mynets.py").write_text(MYNETS)
    for name in ("resnet20.pt", "resnet18.pt", "net.pt", "small.pt"):
        torch.save(small_network().state_dict(), root / name)
    return root


def data_of(root: Path) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(40) % 10
    return torch.randn(40, 3, 16, 16, generator=generator), labels


def given_to(page: str, root: Path) -> dict[str, Any]:
    """The names that a page takes for granted, and the files."""
    if page == "docs/file_format.md":
        make_gates().save(root / "gates.h5")
    if page not in GIVEN:
        return {}
    model = small_network()
    images, labels = data = data_of(root)
    gates = learn_gates(model, data, tasks=[0, 3], recipe=Recipe(size=0.4))
    if page == "docs/cluster.md":
        recipe, scratch = Recipe(size=0.4), root / "scratch"
        scratch.mkdir()
        for i, part in enumerate(([0, 1, 2], [3, 4, 5])):
            nad_attr.learn_to_store(model, data, scratch / f"gates-{i}.h5", part, recipe)
    names = {"model": model, "data": data, "gates": gates, "images": images, "labels": labels}
    return {name: names[name] for name in GIVEN[page]}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks of torchvision are small, nothing is downloaded, learning is short."""
    torchvision = pytest.importorskip("torchvision")
    models = torchvision.models
    true_make = models.get_model

    def make(name: str, *, weights: Any = None, **options: Any) -> nn.Module:
        assert name in models.list_models(module=models)
        if weights is None and not options:
            return true_make(name, weights=None)  # `:none` in a command
        return small_network(**options)

    def no_download(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"a download: {args}")

    monkeypatch.setattr(models, "get_model", make)
    for name in ("resnet18", "resnet50"):

        def build(*, weights: Any = None, **options: Any) -> nn.Module:
            return small_network(**options)

        monkeypatch.setattr(models, name, build)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", no_download)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_download)
    from torchvision.transforms import _presets

    kind = _presets.ImageClassification
    true_init = kind.__init__

    def small_images(self: Any, **options: Any) -> None:
        true_init(self, **{**options, "crop_size": 32, "resize_size": 32})

    monkeypatch.setattr(kind, "__init__", small_images)
    # What is learned is not looked at here.
    learn_briefly(monkeypatch, steps=4, images_per_step=4)
    fit_briefly(monkeypatch)
    for name, size in SIZES.items():
        monkeypatch.setitem(SIZES, name, replace(size, n_tasks=2, n_judged=8))
    monkeypatch.setenv("COLUMNS", "100")


# ---------------------------------------------------------------------------------------------
# Running them
# ---------------------------------------------------------------------------------------------


def commands_of(block: Block) -> list[tuple[str, str]]:
    """(command, output as shown) of a shell block."""
    lines = block.text.splitlines()
    prompted = any(line.startswith("$ ") for line in lines)
    found: list[tuple[str, str]] = []
    i = 0
    while i < len(lines):
        line = lines[i]
        if prompted and not line.startswith("$ "):
            if found:
                found[-1] = (found[-1][0], f"{found[-1][1]}{line}\n")
            i += 1
            continue
        command = line.removeprefix("$ ") if prompted else line
        while command.endswith("\\"):
            i += 1
            command = f"{command[:-1].rstrip()} {lines[i].strip()}"
        if command.strip() and not command.lstrip().startswith("#"):
            found.append((command.strip(), ""))
        i += 1
    return found


def test_commands_are_found() -> None:
    block = Block("x.md", 1, "console", "$ a b \\\n    --c d\nout\n$ e   # why\n", None)
    assert commands_of(block) == [("a b --c d", "out\n"), ("e   # why", "")]
    assert commands_of(Block("x.md", 1, "sh", "# first\nmake x\n\nls", None)) == [
        ("make x", ""),
        ("ls", ""),
    ]


def arguments_of(command: str) -> list[str]:
    found = []
    for word in shlex.split(os.path.expandvars(command), comments=True):
        matches = sorted(glob.glob(word)) if any(c in word for c in "*?[") else []
        found += matches or [word]
    return found


def without_breaks(text: str) -> str:
    return " ".join(text.split())


def run_nad_attr(command: str, shown: str, where: str) -> None:
    result = invoke(*arguments_of(command)[1:])
    output = result.output
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{where}: {command}\n{output}") from result.exception
    error = re.search(r"^Error: (.*?)(?=^\S|\Z)", shown, re.MULTILINE | re.DOTALL)
    if error:
        assert result.exit_code != 0, f"{where}: {command}\nshould fail, and says\n{output}"
        assert without_breaks(error[0]) in without_breaks(output), f"{where}: {command}\n{output}"
    else:
        assert result.exit_code == 0, f"{where}: {command}\n{output}"


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([\w-]+) = \[", table, re.MULTILINE))


def targets() -> set[str]:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(re.findall(r"^([a-z][\w-]*):", makefile, re.MULTILINE))


#: Commands that explain, of all pages so far. README and start page have the same one, and each
#: takes seconds; no page goes on from what they write.
EXPLAINED: set[tuple[str, str]] = set()


def check_command(command: str, shown: str, where: str) -> None:
    """Run a command of a page, or check what can be checked of it."""
    words = shlex.split(command, comments=True)
    if words[0] == "nad-attr":
        if words[1] == "demo":  # minutes: tests/test_demo.py runs it
            return
        if (command, shown) in EXPLAINED:
            return
        run_nad_attr(command, shown, where)
        if words[1] == "explain":
            EXPLAINED.add((command, shown))
    elif words[0] == "make":
        wanted = [word for word in words[1:] if "=" not in word]
        assert set(wanted) <= targets(), f"{where}: no such target: {command}"
    elif words[0] == "pip":
        for named in re.findall(r"\[([\w,-]+)\]", command):
            assert set(named.split(",")) <= extras(), f"{where}: no such extra: {command}"
    elif words[0] == "python" and words[1] == "-m" and words[2].startswith("benchmarks."):
        check_benchmark(words[2:], where)
    elif words[0] in ("head", "ls", "cat"):
        subprocess.run(words, check=True, capture_output=True)
    elif not SET_UP.match(command):
        pytest.fail(f"{where}: nobody knows how to run {command!r}")


def check_benchmark(words: list[str], where: str) -> None:
    """A benchmark takes hours: that it is there, and takes these options."""
    path = ROOT / (words[0].replace(".", "/") + ".py")
    assert path.exists(), f"{where}: there is no {words[0]}"
    text = path.read_text(encoding="utf-8")
    # Some share their options with another benchmark.
    for other in re.findall(r"^from benchmarks\.(\w+) import .*\bparser\b", text, re.MULTILINE):
        text += (path.parent / f"{other}.py").read_text(encoding="utf-8")
    for option in (word for word in words[1:] if word.startswith("--")):
        assert f'"{option}"' in text, f"{where}: {words[0]} takes no {option}"


def check_python(block: Block, names: dict[str, Any]) -> None:
    code = "\n" * block.line + block.text  # so that errors name the page's line
    exec(compile(code, str(ROOT / block.page), "exec"), names)


def run_page(page: str, blocks: list[Block], root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", str(root / "scratch"))
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    names = {"__name__": "__main__", **given_to(page, root)}
    for block in blocks:
        # README and start page read a folder of classes, not one that is split into two.
        flat = block.language == "python" and "ImageFolder(" in block.text
        flat = flat or "--data photos " in block.text
        monkeypatch.chdir(root / "flat" if flat else root)
        if block.language == "python":
            check_python(block, names)
        elif block.language in SHELL:
            for command, shown in commands_of(block):
                check_command(command, shown, block.where)


def runnable(page: str) -> list[Block]:
    if page.startswith("docs/tutorials/"):
        return []
    kinds = ("python", *SHELL)
    return [b for b in BLOCKS[page] if b.language in kinds and b.reason is None]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in BLOCKS if runnable(page)])
def test_code_runs(
    page: str,
    shop: Path,
    tmp_path: Path,
    stand_ins: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path / "here"
    shutil.copytree(shop, root)
    shutil.copytree(shop / "photos" / "train", root / "flat" / "photos")
    loaded = set(sys.modules)
    try:
        run_page(page, runnable(page), root, monkeypatch)
    finally:
        for name in set(sys.modules) - loaded:
            if name in ("mynets",):
                del sys.modules[name]


def test_a_block_that_fails_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = Block("x.md", 3, "python", "import nad_attr\nnad_attr.no_such_thing", None)
    with pytest.raises(AttributeError, match="no_such_thing"):
        run_page("x.md", [bad], tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match="No such option"):
        run_nad_attr("nad-attr sites --colour red", "", "x.md:1")
    with pytest.raises(AssertionError, match="no such target"):
        check_command("make tea", "", "x.md:1")
    with pytest.raises(pytest.fail.Exception, match="nobody knows"):
        check_command("rm -rf /", "", "x.md:1")


def options_of_commands() -> dict[str, set[str]]:
    return {
        name: {option for parameter in command.params for option in parameter.opts}
        for name, command in command_line().commands.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", BLOCKS)
def test_commands_that_are_not_run_have_options_that_exist(page: str) -> None:
    pytest.importorskip("typer")
    known = options_of_commands()
    for block in BLOCKS[page]:
        cells = block.language == "{code-cell}"
        if not (cells or (block.reason and block.language in SHELL)):
            continue
        text = block.text.replace("\\\n", " ")
        for match in re.finditer(r"nad-attr (\w+)([^\n]*)", text):
            assert match[1] in known, f"{block.where}: no command {match[1]}"
            options = set(re.findall(r"(?<!\S)--[\w-]+", match[2]))
            assert options <= known[match[1]], f"{block.where}: {options - known[match[1]]}"
        if text.startswith("#!/bin/bash") and shutil.which("bash"):
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


# An indented block is code as well: the commands of the benchmarks.
@pytest.mark.parametrize("page", BLOCKS)
def test_indented_commands_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in BLOCKS[page]:
        text = text.replace(block.text, "")
    for line in re.findall(r"(?<=\n\n)((?:    \S[^\n]*\n)+)", text):
        for command in line.replace("\\\n", " ").strip().splitlines():
            check_command(command.strip(), "", page)


# ---------------------------------------------------------------------------------------------
# Reference, links, spelling
# ---------------------------------------------------------------------------------------------


def load(name: str) -> ModuleType:
    if str(DOCS / "_ext") not in sys.path:
        sys.path.insert(0, str(DOCS / "_ext"))
    return importlib.import_module(name)


def declared() -> Iterator[tuple[str, str]]:
    """(module, name) of every ``__all__``, read from the files: not by the code under test."""
    for path in sorted((ROOT / "nad_attr").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if any(part.startswith("_") for part in parts) or parts[:2] == ("nad_attr", "cli"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "__all__" for target in node.targets
            ):
                for name in ast.literal_eval(node.value):
                    yield ".".join(parts), name


@pytest.fixture(scope="module")
def entries() -> set[tuple[str, str]]:
    """(module, name) of what the pages of the reference list."""
    found = set()
    for text in load("reference_pages").pages().values():
        module = ""
        listing = False
        for line in text.splitlines():
            if line.startswith(".. currentmodule:: "):
                module = line.removeprefix(".. currentmodule:: ")
            if line.startswith(".. autosummary::"):
                listing = True
            elif line and not line.startswith(" "):
                listing = False
            elif listing and re.match(r"   [A-Za-z_]\w*$", line):
                found.add((module, line.strip()))
    return found


@pytest.mark.slow
def test_reference_has_every_public_name(entries: set[tuple[str, str]]) -> None:
    shown = {(name, id(getattr(importlib.import_module(module), name))) for module, name in entries}
    every = list(declared())
    assert len(every) > 250
    missing = [
        f"{module}.{name}"
        for module, name in every
        if (name, id(getattr(importlib.import_module(module), name))) not in shown
    ]
    assert not missing


@pytest.mark.slow
def test_reference_lists_no_name_twice(entries: set[tuple[str, str]]) -> None:
    names = load("public_names").public_names()
    assert len(entries) == len(names)
    assert {("nad_attr", "learn_gates"), ("nad_attr.evaluation", "evaluate")} <= entries
    assert ("nad_attr.learning", "learn_gates") not in entries


@pytest.mark.slow
def test_every_public_name_is_documented() -> None:
    undocumented = [
        name.path
        for name in load("public_names").public_names()
        if (isinstance(name.value, type) or callable(name.value))
        and getattr(name.value, "__module__", "").startswith("nad_attr")
        and not (getattr(name.value, "__doc__", None) or "").strip()
    ]
    assert not undocumented


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and MyST make it."""
    text = re.sub(r"[`*_]|\[|\]\([^)]*\)", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def anchors(path: Path) -> set[str]:
    text = path.read_text(encoding="utf-8")
    for block in blocks_of(text, path.name):
        text = text.replace(block.text, "")
    return {slug(heading) for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


@pytest.mark.parametrize("path", [*pages(), *sorted((DOCS / "howto").glob("*.md"))], ids=name_of)
def test_links_resolve(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for block in blocks_of(text, path.name):
        if not block.language.startswith("{figure}"):
            text = text.replace(block.text, "")
    for target in re.findall(r"\]\(<?([^)\s>]+)>?\)", text):
        if re.match(r"\w+:", target):
            assert target.startswith(("https://", "mailto:")), f"{path.name}: {target}"
            continue
        file, _, anchor = target.partition("#")
        other = (path.parent / file).resolve() if file else path
        assert other.exists(), f"{path.name}: there is no {target}"
        if anchor and other.suffix == ".md":
            assert anchor in anchors(other), f"{path.name}: no heading for {target}"
    for role, target in re.findall(
        r"\{(doc|mod|func|class|meth)\}`~?(?:[^`<]*<)?([^`>]+)>?`", text
    ):
        if role == "doc":
            assert (path.parent / f"{target}.md").exists(), f"{path.name}: there is no {target}"
        else:
            resolve(target)


def resolve(dotted: str) -> object:
    parts = dotted.strip("()").split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AssertionError(f"there is no {dotted}")


@pytest.mark.slow
def test_spelling() -> None:
    if importlib.util.find_spec("codespell_lib") is None:
        pytest.skip("codespell is not installed: make spelling")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_citation_has_the_version() -> None:
    text = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {nad_attr.__version__}\n" in text
    assert "2003.13268" in text


# ---------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------


def _exceptions() -> set[str]:
    """Exceptions that a user can meet: those of all modules but the command line."""
    defined = {
        name
        for path in (ROOT / "nad_attr").rglob("*.py")
        if "cli" not in path.parts
        for name in re.findall(r"^class (\w+Error)\(", path.read_text(encoding="utf-8"), re.M)
    }
    return {name for name in defined if not name.startswith("_")}


def test_every_exception_has_a_page() -> None:
    pages = {path.stem for path in (DOCS / "errors").glob("*.md")} - {"index"}
    assert pages == _exceptions()
    index = (DOCS / "errors" / "index.md").read_text(encoding="utf-8")
    assert not [name for name in pages if f"({name}.md)" not in index]
