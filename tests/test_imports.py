"""What importing the package brings in, and which module may import which."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "nad_attr"

# From the bottom up. A module may import from its own line (as long as there is no circle) and
# from the lines above it, never from below.
LAYERS = (
    ("_version", "_safe_text"),
    (
        "_files",
        "_processes",
        "display",
        "sites",
        "preserving",
        "_trace",
        "_foreign_hooks",
        "gating",
        "_lean",
        "batchnorm",
        "convolution",
        "folding",
        "pooling",
        "lighter",
        "gates",
        "recipe",
        "history",
        "objective",
        "architecture",
        "data",
        "means",
        "running",
        "memory",
        "_safe_files",
        "provenance",
    ),
    ("engine", "paper", "selection", "learning", "runs", "store"),
    ("attribution",),
    ("stats",),
    ("evaluation", "comparison"),
    ("__init__",),
    ("bridges", "pictures"),
    ("report", "datasets", "distributed", "specs", "demo", "cli", "__main__"),
)
RANKS = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

# The one way up: saving and loading, from inside the method, so that nothing is imported early.
LAZY_UPWARD = {
    (module, f"{cls}.{method}", "store")
    for module, cls in (("gates", "TaskGates"), ("architecture", "SubArchitecture"))
    for method in ("save", "load")
}


@dataclass(frozen=True)
class Import:
    """One import: who, what, where in the file, and when it happens."""

    importer: str  # dotted, below the package: "gates", "evaluation.measures", "__init__"
    imported: str  # dotted and absolute: "nad_attr.store", "torch.nn"
    line: int
    scope: str  # "" at module level, else "Class.method" or "function"
    in_function: bool  # happens when the function is called
    for_types: bool  # under `if TYPE_CHECKING`

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


class _Collector(ast.NodeVisitor):
    def __init__(self, name: str, is_package: bool, modules: set[str]) -> None:
        self.name = name
        self.modules = modules
        parts = ["nad_attr", *name.split(".")] if name != "__init__" else ["nad_attr", "__init__"]
        self.package = parts[:-1] if not is_package or name == "__init__" else parts
        self.scopes: list[str] = []
        self.in_function = False
        self.for_types = False
        self.found: list[Import] = []

    def _add(self, imported: str, line: int) -> None:
        scope = ".".join(self.scopes)
        self.found.append(
            Import(self.name, imported, line, scope, self.in_function, self.for_types)
        )

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

    def visit_If(self, node: ast.If) -> None:
        is_for_types = ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        outer, self.for_types = self.for_types, self.for_types or is_for_types
        for child in node.body:
            self.visit(child)
        self.for_types = outer
        for child in node.orelse:
            self.visit(child)

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
    """Return every import in a package that is laid out like nad_attr."""
    paths = sorted(package.rglob("*.py"))
    modules = {f"nad_attr.{_name(path, package)}" for path in paths} - {"nad_attr.__init__"}
    found: list[Import] = []
    for path in paths:
        collector = _Collector(_name(path, package), path.name == "__init__.py", modules)
        collector.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        found += collector.found
    return found


def _inside(found: list[Import]) -> Iterator[tuple[Import, str, str]]:
    """Yield the imports within the package with both ends' names below it."""
    for item in found:
        top, _, rest = item.imported.partition(".")
        if top == "nad_attr":
            yield item, item.importer, rest or "__init__"


def order_violations(found: list[Import]) -> list[str]:
    """Return the imports that go up, save those of LAZY_UPWARD, as messages."""
    wrong = []
    for item, importer, imported in _inside(found):
        low, high = importer.partition(".")[0], imported.partition(".")[0]
        if low not in RANKS or high not in RANKS:
            continue  # test_every_module_has_its_place names these
        if RANKS[high] > RANKS[low] and (importer, item.scope, imported) not in LAZY_UPWARD:
            wrong.append(str(item))
    return wrong


def find_circle(found: list[Import]) -> list[str] | None:
    """Return a circle among the imports that happen when modules are loaded, if there is one."""
    graph: dict[str, set[str]] = {}
    for item, importer, imported in _inside(found):
        if not item.for_types and not item.in_function and importer != imported:
            graph.setdefault(importer, set()).add(imported)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return None


# ---------------------------------------------------------------------------------------------
# The order of imports
# ---------------------------------------------------------------------------------------------


def test_every_module_has_its_place() -> None:
    tops = {_name(path, PACKAGE).partition(".")[0] for path in PACKAGE.rglob("*.py")}
    assert tops <= set(RANKS), "give these a place in LAYERS"


def test_imports_run_one_way() -> None:
    assert not order_violations(imports_of(PACKAGE))


def test_imports_have_no_circle() -> None:
    assert find_circle(imports_of(PACKAGE)) is None


def test_library_never_imports_benchmarks_or_tests() -> None:
    outside = [
        str(item)
        for item in imports_of(PACKAGE)
        if item.imported.partition(".")[0] in ("benchmarks", "tests")
    ]
    assert not outside


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package that breaks and keeps the rules, to test the tests."""
    sources = {
        "__init__": "from nad_attr.attribution import A",
        "sites": "import torch.nn as nn",
        "gating": "from .sites import GateSite\nfrom nad_attr import sites",
        "gates": "class TaskGates:\n    def save(self):\n        from nad_attr.store import write",
        "store": "from nad_attr import gates",
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
        ("sites", "from nad_attr.learning import x", "sites:1 imports nad_attr.learning"),
        ("sites", "from . import store", "sites:1 imports nad_attr.store"),
        ("gates", "import nad_attr.store", "gates:1 imports nad_attr.store"),
        ("gates", "def save():\n    from .store import x", "gates:2 imports nad_attr.store"),
        ("recipe", "def f():\n    from nad_attr import x", "recipe:2 imports nad_attr"),
        ("store", "if TYPE_CHECKING:\n    import nad_attr.attribution", "store:2 imports"),
        ("evaluation/measures", "from ..cli import main", "evaluation.measures:1 imports"),
    ],
)
def test_upward_imports_are_found(package: Path, module: str, source: str, message: str) -> None:
    (package / f"{module}.py").write_text(source)
    (wrong,) = order_violations(imports_of(package))
    assert wrong.startswith(message)


def test_circles_are_found(package: Path) -> None:
    (package / "sites.py").write_text("from nad_attr.gating import gated")
    assert set(find_circle(imports_of(package)) or ()) == {"sites", "gating"}


# ---------------------------------------------------------------------------------------------
# What `import nad_attr` brings in, and what it offers
# ---------------------------------------------------------------------------------------------

needs_init = pytest.mark.skipif(
    not (PACKAGE / "__init__.py").exists(), reason="nad_attr/__init__.py is not there"
)

_LIST_MODULES = """
import json, sys
{first}
before = set(sys.modules)
import nad_attr
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}})))
"""


def _brought_in(first: str = "") -> set[str]:
    """Return the top-level packages that `import nad_attr` adds to those that `first` imports."""
    result = subprocess.run(
        [sys.executable, "-c", _LIST_MODULES.format(first=first)],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.splitlines()[-1]))


@needs_init
def test_import_brings_in_neither_torchvision_nor_zennit() -> None:
    assert not _brought_in() & {"torchvision", "zennit", "benchmarks", "tests"}


@needs_init
def test_import_brings_in_no_package_of_the_extras() -> None:
    # captum.attr imports matplotlib by itself; nad_attr must not add to that.
    extras = {"matplotlib", "pandas", "typer", "rich", "foolbox", "efficientnet_lite_pytorch"}
    assert not _brought_in("import captum.attr") & extras


@pytest.fixture(scope="module")
def nad_attr() -> ModuleType:
    """The package itself."""
    return pytest.importorskip("nad_attr")


@needs_init
def test_public_names_exist(nad_attr: ModuleType) -> None:
    assert nad_attr.__all__, "nothing is public"
    assert len(set(nad_attr.__all__)) == len(nad_attr.__all__), "a name is there twice"
    missing = [name for name in nad_attr.__all__ if not hasattr(nad_attr, name)]
    assert not missing


@needs_init
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
