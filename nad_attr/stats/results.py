"""One interface for all results: a table, a text, a figure, a dictionary, files and notebooks.

A result is a dataclass (or defines its fields). Its fields are its content, also in files: JSON
holds them as lists and numbers, with derived numbers beside them, and HDF5 as arrays. Table, text
and figure follow from its rows, unless a result defines better ones. Values that are read must have
the declared types of the fields; a file names no class and calls nothing.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping
from os import PathLike, fspath
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeAlias,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import numpy as np
import torch
from torch import Tensor

from nad_attr._display import MOST_ROWS, html_text
from nad_attr.data.labels import as_task
from nad_attr.stats.tables import number, pandas, table
from nad_attr.system.files import write_text
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from typing_extensions import Self

__all__ = ["Result", "decoded", "is_json"]

Array: TypeAlias = "np.ndarray[Any, Any]"

#: Written into each file; raised when the meaning of the content changes.
FORMAT = 1
#: The errors that :meth:`Result.load` gets from a file that is not such a result.
_WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError)
#: Dtypes of tensors in files.
_DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")


class Result:
    """The common methods of all results.

    Example:
        >>> import tempfile
        >>> from nad_attr.evaluation import Stability
        >>> one = np.ones((1, 2))
        >>> result = Stability((0, 1), seeds=one, halves=one, images={})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     result.save(f"{folder}/stability.json")
        ...     result.save(f"{folder}/results.h5")
        ...     Stability.load(f"{folder}/stability.json").seeds.tolist()
        [[1.0, 1.0]]
    """

    #: Axes of the fields, such as ``"T S"``: the same letter is the same length everywhere.
    _AXES: ClassVar[Mapping[str, str]] = {}
    #: Whether an HDF5 file holds only one of them, in no group.
    _ALONE: ClassVar[bool] = False
    __slots__ = ()

    def frame(self) -> pd.DataFrame:
        """A tidy table, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        return pandas(f"{type(self).__name__}.frame()").DataFrame(self._records())

    def summary(self) -> str:
        """The result as plain text."""
        rows = self._records()
        cells = [
            [number(v) if isinstance(v, float) else shown(str(v)) for v in row.values()]
            for row in rows[:MOST_ROWS]
        ]
        lines = table([[name.replace("_", " ") for name in rows[0]], *cells]) if rows else ["empty"]
        more = len(rows) - len(cells)
        return "\n".join([*lines, *([f"and {more:,} more rows"] if more else [])])

    def plot(self, *args: Any, **options: Any) -> Figure:
        """Draw the numbers of the table, a panel for each column; this needs matplotlib.

        Args:
            *args: ``axes``, matplotlib Axes, one for each column of numbers; none: a new figure.
            **options: The same by its name.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_rows

        return plot_rows(self._records(), *args, **options)

    def to_dict(self) -> dict[str, Any]:
        """All fields, and derived numbers, as lists, numbers and strings.

        NaN becomes None, as JSON has no NaN, and infinity the text "inf".
        """
        found: dict[str, Any] = _encoded(self, lambda name, array: _listed(array), True)
        return found

    def save(self, path: str | PathLike[str], group: str | None = None) -> None:
        """Write to a JSON file, or to a group of an HDF5 file, whose other content stays.

        Args:
            path: The file. One that ends in ".json" gets :meth:`to_dict`; any other is HDF5: a new
                file, or one with gates or other results.
            group: Name of the result in an HDF5 file, such as "evaluation/held_out"; an existing
                one is replaced. None: the name of the class, such as "size_sweep".

        Raises:
            GateStoreError: If the HDF5 file cannot be written, or is not one of nad_attr.
            OSError: If the JSON file cannot be written, or would replace something else.
            ValueError: If a group is named for gates, which have a file of their own.
        """
        if is_json(path):
            write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")
        else:
            self._check_group(path, group)
            self._save_hdf5(path, group)

    @classmethod
    def _check_group(cls, path: str | PathLike[str], group: str | None) -> None:
        if cls._ALONE and group is not None:
            raise ValueError(f"{fspath(path)} holds nothing else: leave out group={group!r}.")

    def _save_hdf5(self, path: str | PathLike[str], group: str | None) -> None:
        from nad_attr.store import write_result

        arrays, attributes = self._stored()
        about = {"what": self._kind(), "format": FORMAT, **attributes}
        write_result(path, group or self._kind(), arrays, about)

    @classmethod
    def load(cls, path: str | PathLike[str], group: str | None = None) -> Self:
        """Read what :meth:`save` wrote; code in the file is never run.

        Args:
            path: The file.
            group: Name of the result in an HDF5 file; None: the name of the class.

        Raises:
            GateStoreError: If the HDF5 file or the group is not such a thing.
            OSError: If a JSON file cannot be read.
            ValueError: If a JSON file holds no such result.
        """
        if is_json(path):
            return cls._of_json(path)
        cls._check_group(path, group)
        return cls._load_hdf5(path, group)

    @classmethod
    def _load_hdf5(cls, path: str | PathLike[str], group: str | None) -> Self:
        from nad_attr.store import GateStoreError, read_result

        group = group or cls._kind()
        arrays, about = read_result(path, group)
        where = f"{fspath(path)}, {group!r}"
        if about.get("what") != cls._kind():
            raise GateStoreError(f"{where} holds no {cls._kind()}.")
        if about.get("format") != FORMAT:
            raise GateStoreError(
                f"{where} has format {about.get('format')!r}; this version reads {FORMAT}."
            )
        try:
            return cls._of_stored(arrays, about)
        except _WRONG as error:
            raise GateStoreError(f"{where} holds no whole {cls._kind()}: {error!r:.200}.") from None

    def _repr_html_(self) -> str:
        return html_text(self.summary())

    # -- the content of a result -------------------------------------------------------------------

    def _records(self) -> list[dict[str, Any]]:
        """The rows of the table: texts and numbers by the names of the columns."""
        raise NotImplementedError

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return _types_of(cls)

    def _fields(self) -> dict[str, Any]:
        return _fields_of(self)

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> Self:
        """A result of the fields that a file holds, if they fit together."""
        found: Self = _made(cls, fields)
        return found

    def _derived(self) -> dict[str, Any]:
        """Numbers that follow from the fields and are written beside them, such as means."""
        return {}

    def _stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays and attributes of the HDF5 file."""
        arrays: dict[str, Any] = {}

        def put(name: str, array: Array) -> dict[str, str]:
            key = name if not set(name) & {"/", "\0"} and name not in arrays else str(len(arrays))
            arrays[key] = array
            return {"array": key}

        return arrays, {"fields": _encoded(self, put, False)}

    @classmethod
    def _of_stored(cls, arrays: Mapping[str, Any], attributes: Mapping[str, Any]) -> Self:
        """The result from the output of :meth:`_stored`."""

        def array(value: Any) -> Any:
            return arrays[value["array"]] if isinstance(value, Mapping) else value

        found: Self = decoded(cls, attributes["fields"], array)
        return found

    @classmethod
    def _of_json(cls, path: str | PathLike[str]) -> Self:
        with open(fspath(path), encoding="utf-8") as file:
            try:
                content = json.load(file)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{fspath(path)} is not a JSON file: {error}.") from None
        try:
            found: Self = decoded(cls, content)
            return found
        except _WRONG as error:
            raise ValueError(
                f"{fspath(path)} was not written by {cls.__name__}.save: {error!r:.200}."
            ) from None

    @classmethod
    def _kind(cls) -> str:
        return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", cls.__name__).lower()


def is_json(path: str | PathLike[str]) -> bool:
    """Whether a file's name says that it is JSON."""
    return Path(path).suffix.lower() == ".json"


# -- Fields ------------------------------------------------------------------------------------


def _types_of(cls: type[Any]) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _fields_of(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


def _made(cls: type[Any], fields: dict[str, Any]) -> Any:
    result = cls(**fields)
    lengths: dict[str, int] = {}
    for name, axes in getattr(cls, "_AXES", {}).items():
        for shape in _shapes(getattr(result, name)):
            wanted = tuple(
                int(axis) if axis.isdecimal() else lengths.setdefault(axis, n)
                for axis, n in zip(axes.split(), shape, strict=True)
            )
            if shape != wanted:
                raise ValueError(f"{name} has shape {shape}, not {wanted}")
    return result


def _shapes(value: Any) -> list[tuple[int, ...]]:
    if isinstance(value, Mapping):
        return [shape for part in value.values() for shape in _shapes(part)]
    if value is None:
        return []
    return [tuple(value.shape) if isinstance(value, (np.ndarray, Tensor)) else (len(value),)]


# -- To and from lists, numbers and strings ------------------------------------------------------


def _listed(array: Array) -> Any:
    # A list without numbers does not show how many axes follow the first.
    return _plain(array.tolist()) if array.size or array.ndim == 1 else {"shape": [*array.shape]}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _encoded(value: Any, put: Callable[[str, Array], Any], derived: bool, name: str = "") -> Any:
    """A value of a field for JSON; ``put`` replaces arrays."""
    if dataclasses.is_dataclass(value) or isinstance(value, Result):
        fields = value._fields() if isinstance(value, Result) else _fields_of(value)
        more = value._derived() if derived and isinstance(value, Result) else {}
        value = {**fields, **more}
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        array = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        return {"dtype": str(array.dtype), "values": put(name, array)}
    if isinstance(value, np.ndarray):
        return put(name, value)
    if isinstance(value, PathLike):
        return fspath(value)
    if isinstance(value, Mapping):
        return {
            (text := json.dumps(key) if isinstance(key, tuple) else str(key)): _encoded(
                part, put, derived, f"{name}.{text}" if name else text
            )
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_encoded(part, put, derived, f"{name}.{i}") for i, part in enumerate(value)]
    return _plain(value.item() if isinstance(value, np.generic) else value)


def decoded(
    kind: Any, value: Any, array: Callable[[Any], Any] = lambda value: value, name: str = ""
) -> Any:
    """A value of a type from the output of :meth:`Result.to_dict`; ``array`` finds arrays.

    Raises:
        TypeError, ValueError, KeyError: If it is of another type.
    """
    origin, args = get_origin(kind), get_args(kind)
    if name == "tasks":
        return tuple(as_task(task) for task in value)
    if name == "task":
        return None if value is None else as_task(value)
    if kind is Any or (origin is Literal and value in args):
        return value
    if kind == int | tuple[int, ...]:  # a task
        return as_task(value)
    if origin in (Union, UnionType):
        if value is None and NoneType in args:
            return None
        (kind,) = (arg for arg in args if arg is not NoneType)
        return decoded(kind, value, array)
    if origin is np.ndarray:
        return _array(array(value), np.dtype(get_args(args[1])[0]))
    if kind is Tensor:
        dtype = np.dtype(_DTYPES[_DTYPES.index(value["dtype"])])
        return torch.from_numpy(_array(array(value["values"]), dtype))
    if kind is Path:
        return Path(value)
    result = kind if isinstance(kind, type) and issubclass(kind, Result) else None
    if result or dataclasses.is_dataclass(kind):
        types = result._types() if result else _types_of(kind)
        fields = {
            key: decoded(of, value[key], array, key) for key, of in types.items() if key in value
        }
        return result._of_fields(fields) if result else _made(kind, fields)
    if origin is not None and issubclass(origin, Mapping):
        key_of, of = args

        def key_from(text: str) -> Any:
            return (
                key_of(text) if key_of in (str, int) else decoded(key_of, json.loads(text), array)
            )

        return {key_from(key): decoded(of, part, array) for key, part in value.items()}
    if origin in (tuple, list):
        if not isinstance(value, list):
            raise TypeError(f"{value!r:.60} in place of a list")
        kinds = args if origin is tuple and Ellipsis not in args else args[:1] * len(value)
        return origin(decoded(k, v, array) for k, v in zip(kinds, value, strict=True))
    if kind is float and value is None:
        return math.nan
    if kind is float and (value in ("inf", "-inf") or isinstance(value, int)) and value is not True:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r:.60} in place of {getattr(kind, '__name__', kind)}")
    return value


def _array(values: Any, dtype: np.dtype[Any]) -> Array:
    if isinstance(values, Mapping):
        return np.empty((0,), dtype).reshape(values["shape"])
    if dtype.kind == "f":
        return np.asarray(values, dtype=dtype)  # None becomes NaN
    found = np.asarray(values)
    if found.size and found.dtype.kind != dtype.kind:
        raise TypeError(f"{found.dtype} in place of {dtype}")
    return found.astype(dtype)
