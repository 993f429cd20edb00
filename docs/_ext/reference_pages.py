"""Writes the pages of the reference from what the package exports, so that no name is forgotten.

A page for each room of the library, its names grouped by the modules that define them, each group
under the first line of its module's docstring. Sphinx' autosummary makes a page for each name.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from public_names import INTERNALS, ROOMS, PublicName, public_names, room_of


def _summary(module: str) -> str:
    text = inspect.getdoc(importlib.import_module(module)) or module
    return text.split("\n\n")[0].replace("\n", " ").rstrip(".")


def _heading(text: str, line: str) -> list[str]:
    return [text, line * len(text), ""]


def _table(names: Iterable[PublicName]) -> list[str]:
    """An autosummary table for each module that the names are imported from."""
    by_module: dict[str, list[PublicName]] = {}
    for name in names:
        by_module.setdefault(name.module, []).append(name)
    lines: list[str] = []
    for module, group in sorted(by_module.items()):
        lines += [f".. currentmodule:: {module}", "", ".. autosummary::", "   :toctree: generated"]
        lines += ["   :nosignatures:", ""]
        # Upper case first: constants and classes, then functions.
        lines += [f"   {name.name}" for name in sorted(group, key=lambda name: name.name)]
        lines += [""]
    return lines


def page(title: str, intro: str, names: list[PublicName]) -> str:
    """One page of the reference as reStructuredText."""
    lines = [*_heading(title, "="), intro, ""]
    homes: dict[str, list[PublicName]] = {}
    for name in names:
        homes.setdefault(name.home, []).append(name)
    if len(homes) == 1:
        return "\n".join([*lines, *_table(names)])
    for home in sorted(homes):
        lines += [*_heading(_summary(home), "-"), f"``{home}``", "", *_table(homes[home])]
    return "\n".join(lines)


def pages() -> dict[str, str]:
    """``{file name: text}`` of all pages."""
    shown: dict[str, list[PublicName]] = {}
    for name in public_names():
        shown.setdefault(room_of(name), []).append(name)
    result = {}
    for room, title in ROOMS.items():
        if room in shown:
            intro = _summary(room)
            intro += "" if intro.endswith("?") else "."
            result[f"{room.replace('.', '_')}.rst"] = page(title, intro, shown[room])
    if "" in shown:
        intro = (
            "The modules below the surface, for recipes, scorers and bridges of your own: see "
            ":doc:`../../contributing`. Between minor versions these may change; the changelog "
            "says so."
        )
        result["internals.rst"] = page(INTERNALS, intro, shown[""])
    return result


def _write(app: Any) -> None:
    folder = Path(app.srcdir) / "reference" / "pages"
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for path in folder.glob("*.rst"):
        if path.name not in wanted:
            path.unlink()
    # autosummary's own pages of names that are public no more.
    public = {f"{name.path}.rst" for name in public_names()}
    for path in (folder / "generated").glob("*.rst"):
        if path.name not in public:
            path.unlink()
    for name, text in wanted.items():
        path = folder / name
        # A page that is as it was keeps its time, so that it is not read again.
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def _escape_bars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Let ``|A and B|``, a number of channels, stay text: bars mark substitutions in reST."""
    for i, line in enumerate(lines):
        if "`" not in line and ">>>" not in line:
            lines[i] = re.sub(r"(?<![\\\w])\|(\w[^|]*)\|", r"\\|\1\\|", line)


def _own_words(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """For a value: the comment above it, wherever it is defined, not what its type is."""
    from sphinx.errors import PycodeError
    from sphinx.pycode import ModuleAnalyzer

    known = inspect.getdoc(type(obj)) or ""
    if what != "data" or lines[:1] != known.splitlines()[:1]:
        return
    lines[:] = []
    for module in sorted(m for m in sys.modules if m.partition(".")[0] == "nad_attr"):
        try:
            found = ModuleAnalyzer.for_module(module).find_attr_docs()
        except PycodeError:
            continue
        if ("", name.rpartition(".")[2]) in found:
            lines[:] = found["", name.rpartition(".")[2]]
            return


def setup(app: Any) -> dict[str, Any]:
    """Before Sphinx lists the pages and autosummary looks for what it has to make."""
    app.connect("config-inited", lambda app, config: _write(app))
    app.connect("autodoc-process-docstring", _own_words)
    app.connect("autodoc-process-docstring", _escape_bars)
    return {"version": "1", "parallel_read_safe": True}
