"""Which names of the package are public, and where the reference shows each of them.

A name is public if it stands in ``__all__`` of a module whose path has no part that begins with an
underscore. It is shown once: in the room it is imported from, the shortest module path that exports
it. Imported by the Sphinx extension beside it and by the test that checks that nothing is missing.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

#: What users import, in the order of the reference, with the title of the page.
ROOMS = {
    "nad_attr": "nad_attr: sites, gates, learning, attribution",
    "nad_attr.evaluation": "nad_attr.evaluation: is it true?",
    "nad_attr.concepts": "nad_attr.concepts: units, concepts, statistics",
    "nad_attr.export": "nad_attr.export: smaller networks, classes as building blocks",
    "nad_attr.flow": "nad_attr.flow: what channels give to each other",
    "nad_attr.bridges": "nad_attr.bridges: other libraries",
    "nad_attr.report": "nad_attr.report: pages to look at",
    "nad_attr.store": "nad_attr.store: gates in files",
    "nad_attr.datasets": "nad_attr.datasets: pictures in folders",
    "nad_attr.specs": "nad_attr.specs: networks, data and transforms by name",
    "nad_attr.distributed": "nad_attr.distributed: Ray",
    "nad_attr.demo": "nad_attr.demo: a real network and real photos",
}
#: The page of everything else: for those who extend the library.
INTERNALS = "For those who extend the library"
#: The command line's modules are commands; the other is a former name of nad_attr.concepts.
LEFT_OUT = ("nad_attr.cli", "nad_attr.comparison")


@dataclass(frozen=True)
class PublicName:
    """A public name: where it is exported from, where it is defined, and what it is."""

    module: str
    name: str
    home: str
    value: Any

    @property
    def path(self) -> str:
        """Dotted path of the name as a user writes it."""
        return f"{self.module}.{self.name}"


def modules(package: str = "nad_attr") -> Iterator[ModuleType]:
    """All importable modules without an underscore in their path, the command line left out."""
    root = importlib.import_module(package)
    yield root
    for info in pkgutil.walk_packages(root.__path__, f"{package}."):
        if any(part.startswith("_") for part in info.name.split(".")):
            continue
        if any(info.name == left or info.name.startswith(f"{left}.") for left in LEFT_OUT):
            continue
        yield importlib.import_module(info.name)


def public_names() -> list[PublicName]:
    """Every public name once."""
    exporters: dict[tuple[str, int], list[ModuleType]] = {}
    values: dict[tuple[str, int], Any] = {}
    for module in modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            key = (name, id(value))
            exporters.setdefault(key, []).append(module)
            values[key] = value
    result = []
    for (name, _), found in exporters.items():
        shortest = min(found, key=lambda module: (module.__name__.count("."), module.__name__))
        defined = getattr(values[name, _], "__module__", None)
        homes = [module.__name__ for module in found]
        # Constants do not say where they are from: the deepest module that exports them does.
        home = defined if defined in homes else max(homes, key=lambda path: path.count("."))
        result.append(PublicName(shortest.__name__, name, home, values[name, _]))
    return result


def room_of(name: PublicName) -> str:
    """The page that shows a name: the innermost room that its module lies in, or ``""``."""
    rooms = [
        room
        for room in ROOMS
        if name.module == room or (room != "nad_attr" and name.module.startswith(f"{room}."))
    ]
    return max(rooms, key=len, default="")
