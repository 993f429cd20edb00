"""What ``package.module:name`` names, and what all names have in common."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nad_attr.system.rng import isolated_rng
from nad_attr.system.safe_text import shown

__all__ = ["SpecError", "import_object"]


class SpecError(ValueError):
    """A name does not lead to a model, data or transform; the message says why."""

    def __init__(self, message: object, *, lines: bool = False) -> None:
        # It quotes files; lines: what the user's own code said, line by line.
        super().__init__(shown(message, lines=lines))


def near(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=4, cutoff=0.5)
    return f"; did you mean {', '.join(near)}?" if near else "."


def need(package: str, what: str, install: str | None = None) -> None:
    if importlib.util.find_spec(package) is None:
        raise SpecError(f"{what} needs {package}: pip install {install or package}")


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def place_in_own_code(error: BaseException) -> str:
    """The innermost place of an error in the user's own code, " (file, line 3)", or ""."""
    frames = traceback.extract_tb(error.__traceback__)
    installed = (str(Path(__file__).parents[1]), "site-packages", "<frozen")
    prefixes = (sys.prefix, sys.base_prefix)
    own = [
        f
        for f in frames
        if not any(part in f.filename for part in installed) and not f.filename.startswith(prefixes)
    ]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""


def told(error: BaseException) -> str:
    """The whole message of an error in somebody's own code, with file and line."""
    kind, text = type(error).__name__, str(error).strip()
    if isinstance(error, SyntaxError):
        return f"{kind}: {text}"  # says file and line itself
    return (f"{kind}: {text}" if text else kind) + place_in_own_code(error)


def import_object(name: str) -> Any:
    """What ``package.module:name`` names; modules in the current folder count as well.

    Raises:
        SpecError: If there is no such module, it cannot be imported, or has no such name.

    Example:
        >>> import_object("math:sqrt")(9.0)
        3.0
    """
    module_name, _, attribute = name.partition(":")
    words = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*"
    is_file = module_name.endswith(".py")
    if is_file or not re.fullmatch(words, module_name) or not re.fullmatch(words, attribute):
        hint = " (without .py)" if is_file else ""
        raise SpecError(f"{name!r} is not of the form package.module:name{hint}.")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name + ".").startswith(error.name + "."):
            files = [path.stem for path in Path(here).glob("*.py")]
            raise SpecError(
                f"there is no module {error.name!r}, neither in the current folder nor installed"
                + near(error.name, files)
            ) from None
        raise SpecError(
            f"module {module_name} cannot be imported: {told(error)}", lines=True
        ) from error
    except Exception as error:
        raise SpecError(
            f"module {module_name} cannot be imported: {told(error)}", lines=True
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            names = [n for n in dir(found) if not n.startswith("_")]
            raise SpecError(f"{module_name} has no {attribute!r}" + near(part, names))
        found = getattr(found, part)
    return found


def call(name: str, arguments: Mapping[str, Any]) -> Any:
    factory = import_object(name)
    if not callable(factory):
        raise SpecError(f"{name} is not a function or class but a {type(factory).__name__}.")
    try:
        with isolated_rng(0):
            return factory(**arguments)
    except Exception as error:
        given = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
        raise SpecError(f"{name}({given}) failed: {told(error)}", lines=True) from error
