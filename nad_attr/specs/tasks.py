"""Tasks by number, range or name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from nad_attr.specs.names import SpecError, near

__all__ = ["parse_tasks"]


def parse_tasks(
    text: str | Sequence[str] | None, names: Mapping[int, str], present: Iterable[int]
) -> list[int]:
    """The class indices of a text such as ``0-99,207`` or ``cat,dog``, sorted.

    Args:
        text: Numbers, ranges and names, separated by commas; several such; None: all present.
        names: ``{class index: name}``.
        present: The class indices that there are images (or gates) of.

    Raises:
        SpecError: If a name or number is none of those present, or a range holds none.

    Example:
        >>> parse_tasks("0-2,dog", {5: "dog"}, range(10))
        [0, 1, 2, 5]
    """
    there = sorted(set(present))
    if text is None:
        return there
    by_name: dict[str, list[int]] = {}
    for index, name in names.items():
        if index in there:
            by_name.setdefault(name.casefold(), []).append(index)
    chosen: set[int] = set()
    for item in [text] if isinstance(text, str) else text:
        whole = by_name.get(item.strip().casefold())
        # A name may hold a comma itself.
        parts = [item] if whole is not None else item.split(",")
        for part in (p.strip() for p in parts):
            if part:
                chosen |= _numbers(part, by_name, names, there)
    if not chosen:
        raise SpecError("no tasks are named.")
    return sorted(chosen)


def _numbers(
    part: str, by_name: Mapping[str, list[int]], names: Mapping[int, str], there: Sequence[int]
) -> set[int]:
    found = by_name.get(part.casefold())
    if found is not None:
        if len(found) > 1:
            raise SpecError(f"{part!r} is the name of classes {found}; give the number.")
        return set(found)
    match = re.fullmatch(r"(\d{1,9})(?:\s*-\s*(\d{1,9}))?", part)
    if match is None:
        raise SpecError(f"there is no class {part!r}" + near(part, names.values()))
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise SpecError(f"the range {part} goes backwards; write {last}-{first}.")
    chosen = {index for index in there if first <= index <= last}
    if not chosen or (match[2] is None and first not in there):
        shown = ", ".join(map(str, there[:10])) + (f" ... {there[-1]}" if len(there) > 10 else "")
        raise SpecError(f"there is no class {part}; there are {shown}.")
    return chosen
