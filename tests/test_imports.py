"""What importing the package brings in, which module may import which, and the tree of modules."""

from __future__ import annotations

import ast
import functools
import inspect
import json
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nad_attr"

# The rooms from the ground up, with the modules of the root. A room imports from its own line (as
# long as there is no circle) and from lines above it, whenever and for whatever the import happens.
LAYERS = (
    ("_version", "_checks"),
    ("system",),
    ("_display",),
    ("sites",),
    ("data",),
    ("stats",),
    ("plots",),
    ("gating",),
    ("gates",),
    ("store",),
    ("running",),
    ("learning",),
    ("attribution",),
    ("scoring",),
    ("evaluation",),
    ("certainty", "flow", "concepts"),
    ("export",),
    ("pictures",),
    ("bridges",),
    ("specs",),
    ("report",),
    ("explaining",),
    ("__init__",),
    ("examples",),
    ("comparison", "datasets", "demo", "distributed", "memory"),  # the names that users import from
    ("cli", "__main__"),
)
RANKS = {room: rank for rank, layer in enumerate(LAYERS) for room in layer}

#: Modules in the root, at most.
MOST_IN_ROOT = 12

# Methods that may import what writes, reads or draws their object when they are called: neither the
# order of rooms nor the circles count these imports.
LATE_METHODS = {"_save_hdf5", "_load_hdf5", "plot", "draw", "figure", "export", "cost"}

# The only ones of them that go up, with the room that they go to.
LATE_UPWARD = {
    (module, f"{cls}.{method}", "store")
    for module, cls in (
        ("gates.task_gates", "TaskGates"),
        ("gates.sub_architecture", "SubArchitecture"),
    )
    for method in ("_save_hdf5", "_load_hdf5")
} | {("stats.results", f"Result.{method}", "store") for method in ("_save_hdf5", "_load_hdf5")}
LATE_UPWARD |= {
    ("stats.results", "Result.plot", "plots.style"),
    ("stats.tests", "Statistic.plot", "plots.style"),
    ("gates.task_gates", "TaskGates.plot", "evaluation.figures.gates"),
    ("gates.sub_architecture", "SubArchitecture.export", "export.exporting"),
    ("gates.sub_architecture", "SubArchitecture.cost", "export.costs"),
}


@dataclass(frozen=True)
class Import:
    """One import: who, what, where in the file, and when it happens."""

    importer: str  # dotted, below the package: "gates", "evaluation.measures", "__init__"
    imported: str  # dotted and absolute: "nad_attr.store", "torch.nn"
    line: int
    scope: str  # "" at module level, else "Class.method" or "function"
    in_function: bool  # happens when the function is called

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"

    @property
    def is_late(self) -> bool:
        """Whether it happens in a method that is allowed to import late."""
        cls, _, method = self.scope.rpartition(".")
        return self.in_function and bool(cls) and method in LATE_METHODS


class _Collector(ast.NodeVisitor):
    def __init__(self, name: str, is_package: bool, modules: set[str]) -> None:
        self.name = name
        self.modules = modules
        parts = ["nad_attr", *name.split(".")] if name != "__init__" else ["nad_attr", "__init__"]
        self.package = parts[:-1] if not is_package or name == "__init__" else parts
        self.scopes: list[str] = []
        self.in_function = False
        self.found: list[Import] = []

    def _add(self, imported: str, line: int) -> None:
        scope = ".".join(self.scopes)
        self.found.append(Import(self.name, imported, line, scope, self.in_function))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(alias.name, node.lineno)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = self.package[: len(self.package) - node.level + 1] if node.level else []
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            # `from nad_attr import store` imports a module, just as `from .store import load` does.
            full = f"{source}.{alias.name}"
            self._add(full if full in self.modules else source, node.lineno)

    def _scope(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer = self.in_function
        self.in_function = outer or not isinstance(node, ast.ClassDef)
        self.scopes.append(node.name)
        self.generic_visit(node)
        self.scopes.pop()
        self.in_function = outer

    visit_ClassDef = _scope
    visit_FunctionDef = _scope
    visit_AsyncFunctionDef = _scope


def _name(path: Path, package: Path) -> str:
    parts = path.relative_to(package).with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def imports_of(package: Path) -> list[Import]:
    """Return every import in a package that is laid out like nad_attr, typed and late ones too."""
    paths = sorted(package.rglob("*.py"))
    modules = {f"nad_attr.{_name(path, package)}" for path in paths} - {"nad_attr.__init__"}
    found: list[Import] = []
    for path in paths:
        collector = _Collector(_name(path, package), path.name == "__init__.py", modules)
        collector.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        found += collector.found
    return found


@functools.cache
def _own_imports() -> list[Import]:
    return imports_of(PACKAGE)


def _inside(found: list[Import]) -> Iterator[tuple[Import, str, str]]:
    """Yield the imports within the package with both ends' names below it."""
    for item in found:
        top, _, rest = item.imported.partition(".")
        if top == "nad_attr":
            yield item, item.importer, rest or "__init__"


def order_violations(found: list[Import]) -> list[str]:
    """Return the imports that go up, save those of LATE_UPWARD, as messages."""
    wrong = []
    for item, importer, imported in _inside(found):
        low, high = importer.partition(".")[0], imported.partition(".")[0]
        if low not in RANKS or high not in RANKS:
            continue  # test_every_room_has_its_place names these
        if RANKS[high] > RANKS[low] and (importer, item.scope, imported) not in LATE_UPWARD:
            wrong.append(str(item))
    return wrong


def find_circle(found: list[Import]) -> list[str] | None:
    """Return a circle among the modules, if any; the methods' late imports alone do not count."""
    graph: dict[str, set[str]] = {}
    for item, importer, imported in _inside(found):
        if not item.is_late and importer != imported:
            graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


def drawn_tree(package: Path) -> str:
    """The rooms from the ground up, each with the first line of its docstring and its modules."""
    lines = ["nad_attr/"]

    def about(path: Path) -> str:
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        return text.split("\n")[0].rstrip(".")

    def add(folder: Path, depth: int) -> None:
        pad = "  " * depth
        lines.append(f"{pad}{folder.name + '/':<{18 - len(pad)}}{about(folder / '__init__.py')}")
        files = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("__"))
        if files:
            lines.extend(
                textwrap.wrap(
                    ", ".join(files),
                    100,
                    initial_indent=pad + "    ",
                    subsequent_indent=pad + "    ",
                    break_on_hyphens=False,
                )
            )
        for inner in sorted(folder.glob("*/__init__.py")):
            add(inner.parent, depth + 1)

    for layer in LAYERS:
        for room in layer:
            if (package / room / "__init__.py").exists():
                add(package / room, 1)
            elif (package / f"{room}.py").exists() and room != "__init__":
                lines.append(f"  {room + '.py':<16}{about(package / f'{room}.py')}")
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------------------------------------
# The order of imports, and the tree
# ---------------------------------------------------------------------------------------------


def test_every_room_has_its_place() -> None:
    tops = {_name(path, PACKAGE).partition(".")[0] for path in PACKAGE.rglob("*.py")}
    assert tops <= set(RANKS), "give these a place in LAYERS"


def test_root_is_small() -> None:
    in_root = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(in_root) <= MOST_IN_ROOT, f"move something of {in_root} into a room"


def test_imports_run_one_way() -> None:
    assert not order_violations(_own_imports())


def test_imports_have_no_circle() -> None:
    assert find_circle(_own_imports()) is None


def test_allowed_late_imports_are_still_needed() -> None:
    used = {(i.importer, i.scope, i.imported.removeprefix("nad_attr.")) for i in _own_imports()}
    assert used >= LATE_UPWARD


def test_the_page_on_contributing_shows_the_tree() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    drawn = drawn_tree(PACKAGE)
    assert f"```text\n{drawn}```" in page, f"put this into docs/contributing.md:\n{drawn}"


def test_library_never_imports_benchmarks_or_tests() -> None:
    outside = [
        str(item)
        for item in _own_imports()
        if item.imported.partition(".")[0] in ("benchmarks", "tests")
    ]
    assert not outside


def _importers_of_benchmarks(tests: Path) -> list[str]:
    """Return the files of tests that import benchmarks/, save those of tests/benchmarks/."""
    wrong = []
    for path in sorted(tests.rglob("*.py")):
        collector = _Collector("tests", True, set())
        collector.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        if path.relative_to(tests).parts[0] != "benchmarks" and any(
            item.imported.partition(".")[0] == "benchmarks" for item in collector.found
        ):
            wrong.append(str(path.relative_to(tests)))
    return wrong


def test_only_tests_of_benchmarks_import_benchmarks() -> None:
    assert not _importers_of_benchmarks(ROOT / "tests")


def test_importers_of_benchmarks_are_found(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "test_a.py").write_text("from benchmarks import speed")
    (tmp_path / "test_b.py").write_text("def test():\n    from benchmarks.speed import main")
    (tmp_path / "test_c.py").write_text("from tests.benchmarks import x\nimport nad_attr")
    assert _importers_of_benchmarks(tmp_path) == ["test_b.py"]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that breaks and keeps the rules, to test the tests."""
    sources = {
        "__init__": "from nad_attr.attribution import A",
        "sites.__init__": "import torch.nn as nn",
        "gating.__init__": "from ..sites import GateSite\nfrom nad_attr import sites",
        "gates.__init__": "from nad_attr.gates.task_gates import TaskGates",
        "gates.task_gates": (
            "class TaskGates:\n    def _save_hdf5(self):\n        from nad_attr.store import write"
        ),
        "store.__init__": "from nad_attr import gates",
        "attribution": "import nad_attr.gates",
        "evaluation.__init__": "from .measures import evaluate",
        "evaluation.measures": "from ..gates import TaskGates",
    }
    for name, source in sources.items():
        path = (tmp_path / name.replace(".", "/")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        path.write_text(source)
    return tmp_path


def test_allowed_imports_pass(package: Path) -> None:
    found = imports_of(package)
    assert not order_violations(found)
    assert find_circle(found) is None
    assert {(i.importer, i.imported) for i in found if i.importer.startswith("evaluation")} == {
        ("evaluation", "nad_attr.evaluation.measures"),
        ("evaluation.measures", "nad_attr.gates"),
    }


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("sites/new", "from nad_attr.learning import x", "sites.new:1 imports nad_attr.learning"),
        ("sites/new", "from .. import store", "sites.new:1 imports nad_attr.store"),
        ("gates/task_gates", "import nad_attr.store", "gates.task_gates:1 imports nad_attr.store"),
        ("gates/new", "def save():\n    from ..store import x", "gates.new:2 imports"),
        ("gates/new", "def f():\n    from nad_attr import x", "gates.new:2 imports nad_attr"),
        ("store/new", "if TYPE_CHECKING:\n    import nad_attr.attribution", "store.new:2 imports"),
        ("evaluation/measures", "from ..cli import main", "evaluation.measures:1 imports"),
    ],
)
def test_upward_imports_are_found(package: Path, module: str, source: str, message: str) -> None:
    (package / f"{module}.py").write_text(source)
    (wrong,) = order_violations(imports_of(package))
    assert wrong.startswith(message)


_TO_ENGINE = "from nad_attr.learning import engine"
_LATE = "class A:\n    def {}(self):\n        from nad_attr.learning import engine"


@pytest.mark.parametrize(
    "source",
    [_TO_ENGINE, f"if TYPE_CHECKING:\n    {_TO_ENGINE}", f"def save():\n    {_TO_ENGINE}"],
    ids=["plain", "typed", "late"],
)
def test_circles_of_all_kinds_are_found(package: Path, source: str) -> None:
    room = package / "learning"
    room.mkdir()
    (room / "engine.py").write_text("from nad_attr.learning.runs import go")
    (room / "runs.py").write_text(source)
    circle = find_circle(imports_of(package))
    assert set(circle or ()) == {"learning.engine", "learning.runs"}


@pytest.mark.parametrize(
    ("method", "is_allowed"), [("_save_hdf5", True), ("plot", True), ("run", False)]
)
def test_some_methods_may_import_late(package: Path, method: str, is_allowed: bool) -> None:
    room = package / "learning"
    room.mkdir()
    (room / "engine.py").write_text("from nad_attr.learning.runs import go")
    (room / "runs.py").write_text(_LATE.format(method))
    assert (find_circle(imports_of(package)) is None) == is_allowed


# ---------------------------------------------------------------------------------------------
# What `import nad_attr` brings in, and what it offers
# ---------------------------------------------------------------------------------------------

_LIST_MODULES = """
import json, sys

def tops():
    return {name.partition(".")[0] for name in sys.modules}

import nad_attr, nad_attr.cli
light = tops()
import captum.attr
captums = tops()  # matplotlib among them; nad_attr must not add to that
for name in nad_attr.__all__:
    getattr(nad_attr, name)
import nad_attr.concepts, nad_attr.distributed, nad_attr.evaluation
whole = tops()
for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
    del sys.modules[name]
import nad_attr.evaluation.figures.size_sweep as figures
before = "matplotlib" in sys.modules
figures.figures.new_figure()
drawn = [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]
print(json.dumps([sorted(light), sorted(whole - captums), sorted(whole), before, drawn]))
"""


@pytest.fixture(scope="module")
def brought_in() -> list[Any]:
    """Top-level packages: with `import nad_attr`, what all names add to captum's, and all of them.

    Then whether figures import matplotlib before the first is made, and what of it afterwards.
    """
    result = subprocess.run(
        [sys.executable, "-c", _LIST_MODULES],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr
    found: list[Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_package_imports_torch_when_it_is_asked_for(brought_in: list[Any]) -> None:
    assert "torch" not in brought_in[0]
    assert "torch" in brought_in[2]


def test_import_brings_in_neither_torchvision_nor_zennit(brought_in: list[Any]) -> None:
    assert not set(brought_in[2]) & {"torchvision", "zennit", "benchmarks", "tests"}


def test_import_brings_in_no_package_of_the_extras(brought_in: list[Any]) -> None:
    extras = {"matplotlib", "nltk", "pandas", "plotly", "ray", "foolbox"}
    assert not set(brought_in[1]) & {*extras, "efficientnet_lite_pytorch"}
    assert not set(brought_in[0]) & {*extras, "typer", "rich"}


def test_no_pyplot_and_no_matplotlib_before_the_first_figure(brought_in: list[Any]) -> None:
    *_, before, drawn = brought_in
    assert not before
    assert "matplotlib.figure" in drawn
    assert "matplotlib.pyplot" not in drawn


@pytest.fixture(scope="module")
def nad_attr() -> ModuleType:
    """The package itself."""
    return pytest.importorskip("nad_attr")


def test_public_names_exist(nad_attr: ModuleType) -> None:
    assert nad_attr.__all__, "nothing is public"
    assert len(set(nad_attr.__all__)) == len(nad_attr.__all__), "a name is there twice"
    missing = [name for name in nad_attr.__all__ if not hasattr(nad_attr, name)]
    assert not missing


def test_public_names_are_documented_with_examples(nad_attr: ModuleType) -> None:
    undocumented, without_example = [], []
    for name in nad_attr.__all__:
        public = getattr(nad_attr, name)
        if not (inspect.isclass(public) or inspect.isfunction(public)):
            continue
        text = public.__doc__ or ""
        if not text.strip():
            undocumented.append(name)
        elif ">>>" not in text and not (inspect.isclass(public) and issubclass(public, Exception)):
            without_example.append(name)
    assert not undocumented
    assert not without_example


def test_types_are_shipped() -> None:
    assert (PACKAGE / "py.typed").is_file()
