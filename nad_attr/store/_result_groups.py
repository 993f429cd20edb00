"""Results: groups of arrays, lists of texts and attributes, in stores and in files of their own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np
from h5py import h5g, h5l, h5o
from torch import Tensor

from nad_attr.store._errors import GateStoreError
from nad_attr.store._journal import Record
from nad_attr.store._read import Reader
from nad_attr.store._write import check_name, put_array, put_attribute, put_strings, to_json, utf8

__all__ = [
    "check_result",
    "read_result_group",
    "result_groups",
    "result_record",
    "write_result_group",
]

#: Members of a store that are no results.
RESERVED = ("task", "site", "history", "score", "logit", "mean", "constant")
_MAX_DEPTH = 16
#: Limits for other programs' groups: HDF5 copies them by recursion, and reading each takes time.
_MAX_DEPTH_OF_OTHERS, _MAX_GROUPS = 64, 20_000


def result_record(
    group: str, arrays: Mapping[str, Any], attributes: Mapping[str, Any] | None
) -> Record:
    """The record of a result; names and values that a file cannot hold are refused."""
    _check_group(group)
    if not isinstance(arrays, Mapping) or not isinstance(attributes or {}, Mapping):
        raise TypeError("arrays and attributes must be dictionaries.")
    numbers: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for name, value in arrays.items():
        check_name(name, "an array of a result")
        listed = (
            value.tolist() if isinstance(value, np.ndarray) and value.dtype == object else value
        )
        if isinstance(listed, (list, tuple)) and all(isinstance(text, str) for text in listed):
            texts[name] = list(listed)
            continue
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
        if array.dtype.kind == "U" and array.ndim == 1:
            texts[name] = array.tolist()
        elif array.dtype.kind in "biuf" and array.dtype.itemsize <= 8:
            numbers[name] = array
        else:
            raise GateStoreError(
                f"{name!r} has type {array.dtype} and {array.ndim} axes; a result holds arrays of "
                "numbers and lists of texts."
            )
    for text in [text for each in texts.values() for text in each]:
        utf8(text)
    plain = json.loads(to_json(dict(attributes or {})))
    return Record({"kind": "result", "group": group, "attributes": plain, "texts": texts}, numbers)


def _check_group(group: object) -> None:
    if not isinstance(group, str) or group.split("/")[0] in RESERVED:
        raise GateStoreError(
            f"a result cannot be called {group!r:.60}; the store uses that name itself."
        )
    if group.count("/") >= _MAX_DEPTH:
        raise GateStoreError(f"{group!r:.60} lies too deep.")
    for part in group.split("/"):
        check_name(part, "a result")


def check_result(record: Record) -> None:
    """Refuse a record of a journal that :func:`result_record` would not have made."""
    header = record.header
    _check_group(header["group"])
    texts = header["texts"]
    if not isinstance(header["attributes"], dict) or not isinstance(texts, dict):
        raise GateStoreError(f"the result {header['group']!r} has no attributes or texts.")
    for name in (*record.arrays, *texts):
        check_name(name, "an array of a result")
    if not all(
        isinstance(listed, list) and all(isinstance(text, str) for text in listed)
        for listed in texts.values()
    ):
        raise GateStoreError(f"the result {header['group']!r} has invalid texts.")


def result_groups(reader: Reader) -> list[str]:
    """The groups of a file that are results; too many or too deep groups would crash HDF5."""
    found: list[str] = []
    # Hard links can make circles: no group is visited twice.
    seen = {h5o.get_info(reader.file.id).addr}
    waiting = [("", reader.file.id, 0)]
    while waiting:
        path, parent, depth = waiting.pop()
        if parent.get_num_objs() + len(seen) > _MAX_GROUPS or depth > _MAX_DEPTH_OF_OTHERS:
            raise GateStoreError(
                f"{reader.path}: beside the gates it holds more than {_MAX_GROUPS:,} groups, or "
                f"groups nested deeper than {_MAX_DEPTH_OF_OTHERS} levels, under {path!r:.60}. "
                "Move them to another file."
            )
        for name in parent:
            # Groups that are no results belong to other programs; a link might lead anywhere.
            if depth == 0 and name.decode(errors="replace") in RESERVED:
                continue
            if parent.links.get_info(name).type != h5l.TYPE_HARD:
                continue
            info = h5o.get_info(parent, name)
            if info.type != h5o.TYPE_GROUP or info.addr in seen:
                continue
            seen.add(info.addr)
            group, inside = h5g.open(parent, name), path + name.decode()
            if depth <= _MAX_DEPTH and reader.is_result(h5py.Group(group)):
                found.append(inside)
            waiting.append((f"{inside}/", group, depth + 1))
    return found


def read_result_group(reader: Reader, name: str) -> Record:
    """A result of a file."""
    group = reader.file
    for part in name.split("/"):
        group = reader.group(group, part)
    numbers: dict[str, Any] = {}
    texts: dict[str, list[str]] = {}
    for member in reader.names(group):
        if reader.is_group(group, member):
            continue
        if reader.is_text(group, member):
            texts[member] = reader.strings(group, member)
        else:
            numbers[member] = reader.array(group, member)
    attributes = reader.json(group, "attributes", dict)
    return Record(
        {"kind": "result", "group": name, "attributes": attributes, "texts": texts}, numbers
    )


def write_result_group(file: h5py.File, record: Record) -> None:
    """Put a result into a file."""
    try:
        group = file.require_group(record.header["group"])
        put_attribute(group, "kind", "result")
        put_attribute(group, "attributes", to_json(record.header["attributes"]))
        for name, texts in record.header["texts"].items():
            put_strings(group, name, texts)
        for name, array in record.arrays.items():
            put_array(group, name, array)
    except (TypeError, ValueError) as error:
        if isinstance(error, GateStoreError):
            raise
        raise GateStoreError(
            f"the result {record.header['group']!r} does not fit beside the others: {error}"
        ) from None
