"""Show untrusted text so that it cannot harm a terminal or a spreadsheet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ["cell", "members", "shortened", "shown"]

V = TypeVar("V")

#: Joiners inside words and emoji, and wide or fixed blanks.
_HARMLESS = frozenset("\u200c\u200d\u00a0\u3000")
#: A spreadsheet computes a cell that begins with one of these.
_FORMULA = ("=", "+", "-", "@")


def shown(value: object, *, lines: bool = False) -> str:
    r"""``str(value)`` for people, with invisible characters written as Python's escapes.

    These are control characters (ESC starts commands to the terminal, newlines forge lines), C1,
    marks that turn the direction of writing, line and paragraph separators, and invalid characters.

    Args:
        value: Anything.
        lines: Newlines stay, for a text of several lines that this program composed.

    Example:
        >>> print(shown("cat\x1b]52;c;aGk=\x07\nError: none"))
        cat\x1b]52;c;aGk=\x07\nError: none
        >>> shown("großer Hund, 猫")
        'großer Hund, 猫'
    """
    text = str(value)
    if text.isprintable():
        return text
    return "".join(
        c
        if c.isprintable() or c in _HARMLESS or (lines and c == "\n")
        else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def cell(value: object) -> object:
    r"""A cell of a CSV file: :func:`shown`, and never a formula of a spreadsheet.

    An apostrophe is put before a text that a spreadsheet would compute. Numbers, and texts that are
    numbers, stay as they are.

    Example:
        >>> [cell(value) for value in (-0.5, "-0.5", "+1e3", "=1+1", "-cat", "cat")]
        [-0.5, '-0.5', '+1e3', "'=1+1", "'-cat", 'cat']
    """
    if not isinstance(value, str):
        return value
    text = shown(value)
    # A spreadsheet ignores leading blanks.
    if not text.lstrip().startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def members(arrays: Mapping[str, V]) -> dict[str, V]:
    r"""Give values names that are safe in an archive: no name leads out of its folder.

    Example:
        >>> list(members({"gate/layer1.0": 1, "gate/../../x": 2, "/x": 3, "gate/__/__/x": 4}))
        ['gate/layer1.0', 'gate/__/__/x', '_/x', 'gate/__/__/x~2']
    """
    found: dict[str, V] = {}
    for name, value in arrays.items():
        parts = shown(name).replace("\\", "/").replace(":", "_").split("/")
        safe = "/".join("_" * max(1, len(part)) if not part.strip(". ") else part for part in parts)
        tried, number = safe, 1
        while tried in found:
            number += 1
            tried = f"{safe}~{number}"
        found[tried] = value
    return found


def shortened(name: str, longest: int) -> str:
    """A name of at most ``longest`` letters; the middle is left out, since endings differ.

    Example:
        >>> shortened("black_footed_albatross", 12), shortened("cat", 12)
        ('black…atross', 'cat')
    """
    if len(name) <= longest:
        return name
    head = (longest - 1) // 2
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"
