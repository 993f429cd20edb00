"""What units look for: the IoU of every unit with every concept, from any program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nad_attr.stats.results import Result, is_json
from nad_attr.stats.tables import pandas, table
from nad_attr.store import GateStoreError, read_units, unit_names, write_units
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["CATEGORIES", "Concept", "UnitConcepts"]

FloatArray: TypeAlias = NDArray[np.float32]

#: Kinds of concepts, from low to high level; "" is not known.
CATEGORIES = ("colour", "texture", "material", "part", "object", "scene", "")
_SPELLINGS = {"color": "colour", "colors": "colour", "colours": "colour"}


@dataclass(frozen=True)
class Concept:
    """Something that a unit may look for.

    Attributes:
        name: What it is called.
        category: "colour", "texture", "material", "part", "object", "scene", or "" when unknown.
            "color" becomes "colour"; a data set's own category is taken as it is.

    Raises:
        TypeError: If one of them is not a text.
        ValueError: If the name is empty.

    Example:
        >>> Concept("red", "color")
        Concept(name='red', category='colour')
    """

    name: str
    category: str = ""

    def __post_init__(self) -> None:
        for what, value in (("name", self.name), ("category", self.category)):
            if not isinstance(value, str):
                raise TypeError(f"a concept's {what} must be a text, got {value!r:.60}.")
        if not self.name.strip():
            raise ValueError("a concept needs a name.")
        object.__setattr__(self, "category", _SPELLINGS.get(self.category, self.category))


class UnitConcepts(Result):
    """The IoU of every unit of some sites with every concept: full matrices, read only.

    Made by :func:`nad_attr.concepts.dissect` or by an importer. A unit's *label* is the concept
    that it overlaps most; the unit is a *detector* of it if their IoU is above 0.04 (Bau et al.,
    "Network Dissection", CVPR 2017, section 2.3).

    Args:
        iou: ``{site name: (units, concepts)}``, in forward order; NaN where it is not known (files
            of other programs often tell the best concepts only).
        concepts: The columns.
        source: Where it comes from, in a few words.
        quantile: Share of activations above a unit's threshold; None: not known.
        thresholds: ``{site name: (units,)}``, what a unit's activation has to exceed.
        top_images: ``{site name: (units, k)}``, numbers of the images in which a unit was most
            active, most first; -1: none.
        iou_threshold: What a detector's IoU has to exceed.
        info: Anything else worth knowing, as JSON can hold it.

    Attributes:
        iou: ``{site name: float32 (units, concepts)}``.
        concepts: The columns.
        source: Where it comes from.
        quantile: Share of activations above the thresholds, or None.
        thresholds: ``{site name: float64 (units,)}``, or None.
        top_images: ``{site name: int64 (units, k)}``, or None.
        iou_threshold: What a detector's IoU has to exceed.
        info: What else is known.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If shapes do not fit, or an IoU is not in [0, 1].

    Example:
        >>> units = UnitConcepts(
        ...     {"layer1": [[0.10, 0.02], [0.01, 0.03]]},
        ...     [Concept("road", "object"), Concept("grey", "colour")],
        ...     source="worked example",
        ... )
        >>> index, iou = units.best("layer1")
        >>> index.tolist(), units.detectors("layer1").tolist(), units.unique_detectors()
        ([0, 1], [True, False], {'object': 1})
    """

    def __init__(
        self,
        iou: Mapping[str, ArrayLike],
        concepts: Sequence[Concept],
        *,
        source: str,
        quantile: float | None = None,
        thresholds: Mapping[str, ArrayLike] | None = None,
        top_images: Mapping[str, ArrayLike] | None = None,
        iou_threshold: float = 0.04,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(iou, Mapping) or not iou:
            raise TypeError("iou must be {site name: (units, concepts)} with at least one site.")
        self.concepts = tuple(concepts)
        if not self.concepts or not all(isinstance(c, Concept) for c in self.concepts):
            raise TypeError("concepts must be a list of at least one Concept.")
        if len(set(self.concepts)) < len(self.concepts):
            twice = next(c for c in self.concepts if self.concepts.count(c) > 1)
            raise ValueError(f"the concept {twice.name!r} ({twice.category!r}) is there twice.")
        if not isinstance(source, str):
            raise TypeError(f"source must be a text, got {source!r:.60}.")
        if quantile is not None and not 0 < quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {quantile!r}.")
        if not 0 <= iou_threshold <= 1:
            raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold!r}.")
        self.source, self.quantile = source, quantile
        self.iou_threshold, self.info = float(iou_threshold), dict(info or {})
        self.iou = {name: self._iou(name, value) for name, value in iou.items()}
        self.thresholds = self._per_unit("thresholds", thresholds, np.float64, 1)
        self.top_images = self._per_unit("top_images", top_images, np.int64, 2)

    def _iou(self, site: str, value: ArrayLike) -> FloatArray:
        if not isinstance(site, str) or not site:
            raise TypeError(f"a site is named by a text, not {site!r}.")
        table = np.array(value, np.float32)
        if table.ndim != 2 or table.shape[1] != len(self.concepts) or not len(table):
            raise ValueError(
                f"iou of {site!r} has shape {table.shape}, expected (units, concepts) with "
                f"{len(self.concepts)} concepts."
            )
        if self.measure == "IoU" and bool(((table < 0) | (table > 1)).any()):  # NaN is neither
            raise ValueError(f"iou of {site!r} holds numbers outside [0, 1].")
        if bool(np.isinf(table).any()):
            raise ValueError(f"iou of {site!r} holds infinity.")
        table.setflags(write=False)
        return table

    def _per_unit(
        self, what: str, values: Mapping[str, ArrayLike] | None, kind: Any, ndim: int
    ) -> dict[str, Any] | None:
        if values is None:
            return None
        if not isinstance(values, Mapping) or set(values) != set(self.iou):
            raise ValueError(f"{what} must be given for the sites of iou: {list(self.iou)}.")
        arrays = {}
        for site in self.iou:
            array = np.array(values[site], kind)
            if array.ndim != ndim or len(array) != self.n_units(site):
                raise ValueError(
                    f"{what} of {site!r} has shape {array.shape}; expected one row for each of "
                    f"{self.n_units(site)} units."
                )
            array.setflags(write=False)
            arrays[site] = array
        return arrays

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites, in forward order."""
        return tuple(self.iou)

    @property
    def measure(self) -> str:
        """What ``iou`` holds: "IoU", or what ``info["measure"]`` says, such as "similarity"."""
        return str(self.info.get("measure", "IoU"))

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories that the concepts have: known ones from low to high, then others."""
        there = list(dict.fromkeys(concept.category for concept in self.concepts))
        known = [category for category in CATEGORIES if category in there]
        return tuple(known + [category for category in there if category not in CATEGORIES])

    def __len__(self) -> int:
        return len(self.iou)

    def __iter__(self) -> Iterator[str]:
        return iter(self.iou)

    def __repr__(self) -> str:
        n = sum(map(self.n_units, self.sites))
        return (
            f"UnitConcepts({n:,} units at {len(self)} sites, {len(self.concepts)} concepts, "
            f"source={self.source!r})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, UnitConcepts):
            return NotImplemented
        return (
            self.concepts == other.concepts
            and (self.source, self.quantile) == (other.source, other.quantile)
            and (self.iou_threshold, self.info) == (other.iou_threshold, other.info)
            and self.sites == other.sites
            and all(_same(getattr(self, n), getattr(other, n)) for n in _TABLES)
        )

    __hash__ = None  # type: ignore[assignment]

    def n_units(self, site: str) -> int:
        """Number of units of a site.

        Raises:
            KeyError: If there is no such site.
        """
        return len(self._table(site))

    def concept_index(self, name: str, category: str | None = None) -> int:
        """The column of a concept.

        Args:
            name: Its name.
            category: Its category, where several concepts have one name.

        Raises:
            KeyError: If there is none, or more than one.
        """
        found = [
            i
            for i, concept in enumerate(self.concepts)
            if concept.name == name and category in (None, concept.category)
        ]
        if len(found) != 1:
            how = "no concept is" if not found else f"{len(found)} concepts are"
            raise KeyError(f"{how} called {name!r}" + ("; say the category." if found else "."))
        return found[0]

    def _table(self, site: str) -> FloatArray:
        try:
            return self.iou[site]
        except KeyError:
            raise KeyError(f"no site is called {site!r}; there are {list(self.iou)}.") from None

    def _columns(self, category: str | None) -> NDArray[np.int64]:
        if category is None:
            return np.arange(len(self.concepts))
        wanted = _SPELLINGS.get(category, category)
        return np.array([i for i, c in enumerate(self.concepts) if c.category == wanted], np.int64)

    def best(self, site: str, category: str | None = None) -> tuple[NDArray[np.int64], FloatArray]:
        """The concept that each unit overlaps most.

        Args:
            site: The site.
            category: Among the concepts of this category only.

        Returns:
            Index among all concepts, int64 (units,), the first of equals, -1 where no IoU is
            known; and its IoU, float32 (units,), NaN there.

        Raises:
            KeyError: If there is no such site.
        """
        columns = self._columns(category)
        table = self._table(site)[:, columns]
        if not len(columns):
            return np.full(len(table), -1), np.full(len(table), np.nan, np.float32)
        known = ~np.isnan(table).all(1)
        where = np.where(np.isnan(table), -1.0, table).argmax(1)
        value = np.take_along_axis(table, where[:, None], 1)[:, 0]
        return np.where(known, columns[where], -1), np.where(known, value, np.float32(np.nan))

    def detectors(self, site: str, category: str | None = None) -> NDArray[np.bool_]:
        """Which units have an IoU above ``iou_threshold`` with their best concept: bool (units,).

        No unit is one where values are no IoUs (see :attr:`measure`): a threshold of IoUs says
        nothing about them.

        Raises:
            KeyError: If there is no such site.
        """
        value = self.best(site, category)[1]
        return np.asarray(value > self.iou_threshold) & (self.measure == "IoU")

    def unique_detectors(self, site: str | None = None) -> dict[str, int]:
        """Number of different concepts that have a detector, by category.

        A unit detects its best concept only, as in the paper (section 3.2).

        Args:
            site: Of one site; None: of all together.

        Returns:
            ``{category: number}``, without categories that have none.

        Raises:
            KeyError: If there is no such site.
        """
        found: set[int] = set()
        for name in self.sites if site is None else (site,):
            found |= set(self.best(name)[0][self.detectors(name)].tolist())
        counts = dict.fromkeys(self.categories, 0)
        for i in found:
            counts[self.concepts[i].category] += 1
        return {category: n for category, n in counts.items() if n}

    def select(
        self, sites: Sequence[str] | None = None, concepts: Sequence[str | Concept] | None = None
    ) -> UnitConcepts:
        """The same for some of the sites, or with some of the concepts.

        Args:
            sites: Names, in the order wanted; None: all.
            concepts: Names or concepts; a name stands for all concepts that have it. None: all.

        Raises:
            KeyError: If one of them is not there.
        """
        names = self.sites if sites is None else tuple(sites)
        columns = list(range(len(self.concepts)))
        if concepts is not None:
            columns = [i for c in concepts for i in self._named(c)]
        return UnitConcepts(
            {name: self._table(name)[:, columns] for name in names},
            [self.concepts[i] for i in columns],
            source=self.source,
            quantile=self.quantile,
            thresholds=self.thresholds and {n: self.thresholds[n] for n in names},
            top_images=self.top_images and {n: self.top_images[n] for n in names},
            iou_threshold=self.iou_threshold,
            info=self.info,
        )

    def _named(self, concept: str | Concept) -> list[int]:
        found = [i for i, c in enumerate(self.concepts) if concept in (c, c.name)]
        if not found:
            raise KeyError(f"no concept is called {getattr(concept, 'name', concept)!r}.")
        return found

    def frame(self, *, all_concepts: bool = False) -> Any:
        """A tidy ``pandas.DataFrame``.

        Args:
            all_concepts: One row for each unit and concept whose IoU is known, instead of one row
                for each unit with its best concept. ``detector`` then says whether that IoU is
                above the threshold.

        Returns:
            Columns site, depth (0 for the first site), unit (from 0), concept and category
            (missing where nothing is known), iou, detector.

        Raises:
            ImportError: If pandas is missing.
        """
        pd = pandas("UnitConcepts.frame()")
        names = np.array([c.name for c in self.concepts] + [None], dtype=object)
        categories = np.array([c.category for c in self.concepts] + [None], dtype=object)
        parts = []
        for depth, site in enumerate(self.sites):
            table = self.iou[site]
            if all_concepts:
                unit, column = np.nonzero(~np.isnan(table))
                value = table[unit, column]
            else:
                unit, (column, value) = np.arange(len(table)), self.best(site)
            columns = {
                "site": site,
                "depth": depth,
                "unit": unit,
                "concept": names[column],
                "category": categories[column],
                "iou": value,
                "detector": (value > self.iou_threshold) & (self.measure == "IoU"),
            }
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> str:
        """Units, detectors and their concepts per site, as plain text."""
        categories = [category for category in self.categories if self._columns(category).size]
        header = ["site", "units", "detectors", *(c or "unknown" for c in categories), "median IoU"]
        rows = [header]
        for site in self.sites:
            index, iou = self.best(site)
            chosen = index[self.detectors(site)]
            known = iou[~np.isnan(iou)]
            of = [self.concepts[i].category for i in chosen]
            unique = self.unique_detectors(site)
            rows.append(
                [
                    site,
                    str(len(index)),
                    str(len(chosen)),
                    *(f"{of.count(c)} ({unique.get(c, 0)})" for c in categories),
                    f"{np.median(known):.3f}" if known.size else "-",
                ]
            )
        about = f"{self!r}\nDetectors have an IoU above {self.iou_threshold:g} with their concept; "
        about += "in brackets: different concepts."
        if self.measure != "IoU":
            about = f"{self!r}\nLabelled by {self.measure}, not IoU: no unit counts as a detector."
        return "\n".join(map(shown, [*about.split("\n"), *table(rows)]))

    def plot(self, axes: Any = None) -> Figure:
        """How many units of each site are detectors, by the category of their concept.

        Args:
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_parts

        names = {category: category or "unknown" for category in self.categories}
        parts = {name: [0.0] * len(self) for name in names.values()}
        for s, site in enumerate(self.sites):
            for i in self.best(site)[0][self.detectors(site)]:
                parts[names[self.concepts[i].category]][s] += 1
        return plot_parts(self.sites, parts, "detectors", axes=axes)

    @classmethod
    def _types(cls) -> dict[str, Any]:
        kinds = {"iou": np.float32, "thresholds": np.float64, "top_images": np.int64}
        tables = {name: dict[str, NDArray[kind]] | None for name, kind in kinds.items()}  # type: ignore[valid-type]
        texts = {"source": str, "concepts": tuple[Concept, ...], "info": dict[str, Any]}
        return {**tables, **texts, "quantile": float | None, "iou_threshold": float}

    def _fields(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._types()}

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> UnitConcepts:
        return cls(fields.pop("iou"), fields.pop("concepts"), **fields)

    def save(self, path: str | PathLike[str], name: str | None = None) -> None:
        """Write to JSON, or to the group ``/units/<name>`` of a store or a file of results.

        Beside gates, each site has to be one of the store's, with as many units as it has
        channels. Where there is no file, one is made.

        Args:
            path: The file.
            name: Other names for several of them in one file; None: "dissection".

        Raises:
            OSError: If a JSON file cannot be written.
            GateStoreError: If the file is something else, or sites do not fit.
            TypeError: If ``info`` holds what JSON cannot.
        """
        if is_json(path):
            return super().save(path)
        tables: dict[str, Mapping[str, Any]] = {"iou": self.iou}
        if self.thresholds is not None:
            tables["threshold"] = self.thresholds
        if self.top_images is not None:
            tables["top_image"] = self.top_images
        attributes = {
            "source": self.source,
            "quantile": self.quantile,
            "iou_threshold": self.iou_threshold,
            "info": self.info,
        }
        concepts = [(concept.name, concept.category) for concept in self.concepts]
        write_units(path, name or "dissection", tables, concepts, attributes)

    @classmethod
    def load(cls, path: str | PathLike[str], name: str | None = None) -> UnitConcepts:
        """Read what :meth:`save` wrote.

        Args:
            path: The file.
            name: Which; None: the only one.

        Raises:
            GateStoreError: If the file is missing, damaged or foreign, or holds no such units.
            ValueError: If a JSON file holds no such units.

        Example:
            >>> import tempfile
            >>> units = UnitConcepts({"layer1": [[0.1], [0.2]]}, [Concept("sky")], source="me")
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     units.save(f"{folder}/units.h5")
            ...     UnitConcepts.load(f"{folder}/units.h5") == units
            True
        """
        if is_json(path):
            return super().load(path)
        if name is None:
            names = unit_names(path)
            if len(names) != 1:
                there = ", ".join(map(repr, names)) or "none"
                raise GateStoreError(f"{fspath(path)}: say which units to load; there are {there}.")
            name = names[0]
        tables, concepts, about = read_units(path, name)
        try:
            return cls(
                tables["iou"],
                [Concept(*concept) for concept in concepts],
                source=about["source"],
                quantile=about["quantile"],
                thresholds=tables.get("threshold"),
                top_images=tables.get("top_image"),
                iou_threshold=about["iou_threshold"],
                info=about["info"],
            )
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, GateStoreError):
                raise
            raise GateStoreError(
                f"{fspath(path)}, '/units/{name}' holds no unit concepts: {error!r:.200}."
            ) from None


_TABLES = ("iou", "thresholds", "top_images")


def _same(a: Mapping[str, Any] | None, b: Mapping[str, Any] | None) -> bool:
    if a is None or b is None:
        return a is b
    return all(np.array_equal(a[n], b[n], equal_nan=a[n].dtype.kind == "f") for n in a)
