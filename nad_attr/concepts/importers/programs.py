"""Unit concepts that other programs have measured.

Nothing is computed here again: what a file says is taken over, numbered from 0, and what it does
not say is NaN. Nothing in a file is unpickled or evaluated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nad_attr.concepts.importers.reading import (
    ImportFileError,
    Row,
    Table,
    as_number,
    check_room,
    read_json,
    read_npz,
    read_table,
)
from nad_attr.concepts.unit_concepts import Concept, UnitConcepts

__all__ = [
    "ImportFileError",
    "import_clip_dissect",
    "import_condi99",
    "import_dissect_report",
    "import_netdissect_lite",
]

StrPath: TypeAlias = "str | PathLike[str]"
FloatArray: TypeAlias = NDArray[np.float32]

#: More units than any layer has.
_MAX_UNITS = 1_000_000
#: More concepts than any data set has.
_MAX_CONCEPTS = 100_000


def _files(paths: Mapping[str, StrPath], what: str) -> dict[str, StrPath]:
    if not isinstance(paths, Mapping) or not paths:
        raise TypeError(
            f"paths must be {{site name: {what}}}, in forward order, with at least one site."
        )
    return dict(paths)


class _Cells:
    """Known IoUs, gathered unit by unit and concept by concept."""

    def __init__(self) -> None:
        self.concepts: dict[Concept, int] = {}
        self.sites: dict[str, dict[int, dict[int, float]]] = {}
        self.zeros: dict[tuple[str, int], set[str | None]] = {}

    def add(self, site: str, unit: int, concept: Concept | None, value: float) -> None:
        cells = self.sites.setdefault(site, {}).setdefault(unit, {})
        if concept is not None and not np.isnan(value):
            cells[self.concepts.setdefault(concept, len(self.concepts))] = value

    def add_zero(self, site: str, unit: int, category: str | None = None) -> None:
        """Set the IoU of every concept (of the category) to 0: the best one is 0."""
        self.zeros.setdefault((site, unit), set()).add(
            None if category is None else Concept("any", category).category
        )

    def units(self, path: StrPath, what: str, **about: Any) -> UnitConcepts:
        """All that was gathered; ``path`` and ``what`` say in an error what is missing where."""
        if not self.concepts:
            raise ImportFileError(f"{fspath(path)}: no unit has {what}.")
        return UnitConcepts(self._tables(path), list(self.concepts), **about)

    def _tables(self, path: StrPath) -> dict[str, FloatArray]:
        n_units = sum(max(units) + 1 for units in self.sites.values())
        check_room(
            n_units * len(self.concepts),
            f"{fspath(path)}: {n_units:,} units with {len(self.concepts):,} different labels",
        )
        columns_of: dict[frozenset[str | None], list[int]] = {}
        result = {}
        for site, units in self.sites.items():
            table = np.full((max(units) + 1, len(self.concepts)), np.nan, np.float32)
            for unit, cells in units.items():
                none = frozenset(self.zeros.get((site, unit), ()))
                if none:
                    if none not in columns_of:
                        columns_of[none] = [
                            i for c, i in self.concepts.items() if none & {None, c.category}
                        ]
                    table[unit, columns_of[none]] = 0.0
                for column, value in cells.items():
                    table[unit, column] = value
            result[site] = table
        return result


def _check_units(path: Any, site: str, units: Sequence[int], first: int) -> None:
    """Check that all units are there once: if one is missing, the file is truncated."""
    there = set(units)
    if len(there) < len(units):
        twice = next(unit for unit in units if units.count(unit) > 1)
        raise ImportFileError(f"{path}: unit {twice} of {site!r} is there twice.")
    missing = next((u for u in range(first, max(units) + 1) if u not in there), None)
    if missing is not None:
        raise ImportFileError(
            f"{path}: unit {missing} of {site!r} is missing ({len(units)} units, up to "
            f"{max(units)}); was the file written to the end?"
        )


def import_netdissect_lite(
    paths: Mapping[str, StrPath],
    *,
    quantile: float | None = 0.005,
    iou_threshold: float = 0.04,
    clean_names: bool = True,
) -> UnitConcepts:
    r"""Read ``tally.csv`` of NetDissect-Lite, one file per layer.

    A line says of a unit (numbered from 1, in the order of the score) its best label overall
    (``category, label, score``) and in each category (``object-label, object-iou`` and so on):
    these IoUs are known, all others are NaN. Where the best IoU of a category is 0, there is no
    label, and all IoUs of the category are known to be 0.

    Args:
        paths: ``{site name: tally.csv}``, in forward order; the program's own layer names do not
            stand in the files.
        quantile: The program's setting QUANTILE.
        iou_threshold: What a detector's IoU exceeds.
        clean_names: Without the marks ``-c`` and ``-s`` of colours and scenes, with blanks for
            underscores, as the program's own report shows them.

    Raises:
        ImportFileError: If a file is missing, foreign, truncated or says what cannot be; names file
            and line.
        TypeError: If ``paths`` is not a dictionary.

    Source:
        The columns are those that NetDissect-Lite (CSAILVision, ``feature_operation.py``) writes.

    Example:
        >>> import tempfile
        >>> lines = "unit,category,label,score,object-label,object-iou,color-label,color-iou",
        >>> lines += "2,object,sky,0.3,sky,0.3,blue-c,0.1", "1,color,red-c,0.05,car,0.01,red-c,0.05"
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open(f"{folder}/tally.csv", "w") as file:
        ...         print(*lines, sep="\n", file=file)
        ...     units = import_netdissect_lite({"conv5": f"{folder}/tally.csv"})
        >>> index, iou = units.best("conv5")
        >>> [units.concepts[i].name for i in index], iou.round(2).tolist()
        (['red', 'sky'], [0.05, 0.3])
    """
    cells = _Cells()
    for site, path in _files(paths, "tally.csv").items():
        needed = ("unit", "category", "label", "score")
        table = read_table(path, needed, "a tally.csv of NetDissect-Lite")
        categories = [
            name[: -len("-label")]
            for name in table.columns
            if name.endswith("-label") and f"{name[: -len('-label')]}-iou" in table.columns
        ]
        units = []
        for row in table:
            unit = row.whole("unit")
            if unit == 0:
                raise row.error("unit must be 1 or more (NetDissect-Lite counts from 1), got 0.")
            if unit > _MAX_UNITS:
                raise row.error(f"unit {unit} is not one of a layer.")
            units.append(unit)
            score = _share(row, "score")
            cells.add(site, unit - 1, None, np.nan)
            best = -1.0
            for category in categories:
                value = _share(row, f"{category}-iou")
                best = max(best, value)
                label = row.text(f"{category}-label")
                if value > 0:
                    cells.add(site, unit - 1, _broden(label, category, clean_names, row), value)
                elif value == 0:
                    cells.add_zero(site, unit - 1, category)
            if categories and not np.isnan(score) and abs(best - score) > 1e-6:
                raise row.error(f"score {score:g} is not the best IoU of the line, {best:g}.")
            if not categories and score > 0:
                concept = _broden(row.text("label"), row.text("category"), clean_names, row)
                cells.add(site, unit - 1, concept, score)
            elif not categories and score == 0:
                cells.add_zero(site, unit - 1)
        _check_units(table.path, site, units, 1)
    return cells.units(
        next(iter(paths.values())),
        "any label",
        source="NetDissect-Lite tally.csv",
        quantile=quantile,
        iou_threshold=iou_threshold,
        info={"known": "best label of each category"},
    )


def _share(row: Row, column: str) -> float:
    value = row.number(column)
    if value < 0 or value > 1:
        raise row.error(f"{column} must be an IoU in [0, 1], got {value:g}.")
    return value


def _broden(label: str, category: str, clean: bool, row: Row) -> Concept:
    if not label:
        raise row.error(f"the label of category {category!r} is empty.")
    name = label
    if clean:
        name = name.removesuffix({"color": "-c", "scene": "-s"}.get(category, ""))
        name = name.replace("_", " ").strip() or label
    return Concept(name, category)


def import_dissect_report(
    paths: Mapping[str, StrPath], *, quantile: float | None = 0.01, iou_threshold: float = 0.04
) -> UnitConcepts:
    """Read ``report.json`` of dissect (Bau et al. 2020), one file per layer.

    It holds the best label of each unit (numbered from 0), its category and IoU; an IoU without a
    number is the text "NaN". All other IoUs are NaN (if the best one is 0: 0); the
    full matrix is in ``condi99.npz``, see :func:`import_condi99`.

    Args:
        paths: ``{site name: report.json}``, in forward order.
        quantile: The program's setting ``--quantile``.
        iou_threshold: The program's setting ``--miniou``.

    Raises:
        ImportFileError: If a file is missing, foreign, truncated or says what cannot be; names file
            and unit.
        TypeError: If ``paths`` is not a dictionary.

    Source:
        The keys are those that dissect (davidbau, ``experiment/dissect_experiment.py``) writes.

    Example:
        >>> import json, tempfile
        >>> units = [{"unit": 0, "iou": 0.2, "label": "tree", "cat": "object"}]
        >>> units += [{"unit": 1, "iou": "NaN", "label": "tree", "cat": "object"}]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open(f"{folder}/report.json", "w") as file:
        ...         json.dump({"header": {"name": "vgg16"}, "units": units}, file)
        ...     units = import_dissect_report({"features.28": f"{folder}/report.json"})
        >>> units.iou["features.28"].round(2).tolist()
        [[0.2], [nan]]
    """
    cells = _Cells()
    for site, path in _files(paths, "report.json").items():
        report = read_json(path)
        if not isinstance(report, dict) or not isinstance(report.get("units"), list):
            raise ImportFileError(
                f"{fspath(path)}: no list of 'units', so it is not a report of dissect."
            )
        if not report["units"]:
            raise ImportFileError(f"{fspath(path)}: the list of units is empty.")
        numbers = []
        for place, entry in enumerate(report["units"]):
            where = f"{fspath(path)}, units[{place}]"
            unit, concept, value = _report_unit(entry, where)
            numbers.append(unit)
            cells.add(site, unit, None, np.nan)
            if value == 0:
                cells.add_zero(site, unit)
            else:
                cells.add(site, unit, concept, value)
        _check_units(fspath(path), site, numbers, 0)
    return cells.units(
        next(iter(paths.values())),
        "an IoU",
        source="dissect report.json",
        quantile=quantile,
        iou_threshold=iou_threshold,
        info={"known": "best label"},
    )


def _report_unit(entry: Any, where: str) -> tuple[int, Concept, float]:
    if not isinstance(entry, dict):
        raise ImportFileError(f"{where}: a unit is an object, not {entry!r:.40}.")
    missing = [key for key in ("unit", "iou", "label", "cat") if key not in entry]
    if missing:
        raise ImportFileError(f"{where}: no {missing[0]!r}; reports of dissect have it.")
    unit, label, category = entry["unit"], entry["label"], entry["cat"]
    if isinstance(unit, bool) or not isinstance(unit, int) or not 0 <= unit < _MAX_UNITS:
        raise ImportFileError(f"{where}: 'unit' must be a number from 0 on, got {unit!r:.40}.")
    if not isinstance(label, str) or not label.strip():
        raise ImportFileError(f"{where}: 'label' must be a text, got {label!r:.40}.")
    if not isinstance(category, str):
        raise ImportFileError(f"{where}: 'cat' must be a text, got {category!r:.40}.")
    value = as_number(entry["iou"], lambda what: ImportFileError(f"{where}: 'iou' {what}"))
    if value < 0 or value > 1:
        raise ImportFileError(f"{where}: 'iou' is {value:g}, which is not an IoU.")
    return unit, Concept(label, category), value


def import_condi99(
    paths: Mapping[str, StrPath],
    concepts: Sequence[Concept | str] | None = None,
    *,
    quantile: float | None = 0.01,
    iou_threshold: float = 0.04,
) -> UnitConcepts:
    """Read ``condi99.npz`` of dissect (Bau et al. 2020): the full matrix, one file per layer.

    The file holds, for condition 0 (every pixel) and for each concept c that was seen, how many
    pixels there were and the share of them at which a unit was above its threshold. From these,
    with n pixels in all and n_c of the concept::

        truth = n_c / n,  both = mean_c * truth,  IoU = both / (mean_0 + truth - both)

    Args:
        paths: ``{site name: condi99.npz}``, in forward order.
        concepts: What the labels are called, from label 0 on (not a concept): the program's
            segmenter knows, the file does not. None: "label 1", "label 2" and so on.
        quantile: Share of activations above the thresholds.
        iou_threshold: What a detector's IoU exceeds.

    Returns:
        IoUs of all labels that occur in any of the files; NaN where a label was not seen.

    Raises:
        ImportFileError: If a file is missing, foreign, truncated or says what cannot be.
        TypeError: If ``paths`` is not a dictionary.
        ValueError: If there are fewer concepts than labels.

    Source:
        The arrays are those of dissect's ``RunningConditionalVariance`` (davidbau,
        ``netdissect/runningstats.py``), the formula that of its ``tally.py``.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/condi99.npz", conditions=[0, 2], **{
        ...         "0.count": 1000, "0.mean": [0.01], "1.count": 100, "1.mean": [0.05]})
        ...     units = import_condi99({"layer4": f"{folder}/condi99.npz"}, ["-", "sky", "tree"])
        >>> units.concepts[0].name, units.iou["layer4"].round(4).tolist()  # .005/.105
        ('tree', [[0.0476]])
    """
    tables, seen = {}, set()
    for site, path in _files(paths, "condi99.npz").items():
        tables[site] = _conditional(path)
        seen |= set(tables[site])
    labels = sorted(seen)
    if not labels:
        raise ImportFileError(f"{next(iter(paths.values()))}: no concept was seen in the images.")
    if concepts is not None and isinstance(concepts, str):
        raise TypeError(f"concepts must be a list of names, got {concepts!r:.40}.")
    if concepts is not None and len(concepts) <= labels[-1]:
        raise ValueError(
            f"{len(concepts)} concepts were named, but the files have label {labels[-1]}; name "
            "all, from label 0 on."
        )
    n_units = sum(len(next(iter(columns.values()))) for columns in tables.values())
    check_room(
        n_units * len(labels),
        f"{fspath(next(iter(paths.values())))}: {n_units:,} units with {len(labels):,} labels",
    )
    iou = {}
    for site, columns in tables.items():
        n_units = len(next(iter(columns.values())))
        table = np.full((n_units, len(labels)), np.nan, np.float32)
        for label, values in columns.items():
            table[:, labels.index(label)] = values
        iou[site] = table
    named = [
        Concept(f"label {k}") if concepts is None else _as_concept(concepts[k]) for k in labels
    ]
    return UnitConcepts(
        iou,
        named,
        source="dissect condi99.npz",
        quantile=quantile,
        iou_threshold=iou_threshold,
        info={"labels": labels},
    )


def _as_concept(value: Concept | str | Sequence[str]) -> Concept:
    if isinstance(value, Concept):
        return value
    return Concept(value) if isinstance(value, str) else Concept(*value)


def _conditional(path: StrPath) -> dict[int, NDArray[np.float64]]:
    """``{label: IoU (units,)}`` of one file."""
    name = fspath(path)
    conditions = np.atleast_1d(read_npz(path, ["conditions"])["conditions"])
    if conditions.dtype.kind not in "iu" or conditions.ndim != 1 or not len(conditions):
        raise ImportFileError(f"{name}: 'conditions' is not a list of labels.")
    if len(conditions) > _MAX_CONCEPTS or conditions.min() < 0:
        raise ImportFileError(f"{name}: 'conditions' holds numbers that are not labels.")
    where = {int(label): i for i, label in enumerate(conditions)}
    if 0 not in where or len(where) < len(conditions):
        raise ImportFileError(f"{name}: 'conditions' needs each label once, and 0, every pixel.")
    wanted = [f"{i}.{key}" for i in where.values() for key in ("count", "mean")]
    arrays = read_npz(path, wanted)
    counts: dict[int, float] = {}
    means: dict[int, NDArray[np.float64]] = {}
    for label, i in where.items():
        count, mean = arrays[f"{i}.count"], arrays[f"{i}.mean"]
        if (
            count.size != 1
            or count.dtype.kind not in "iuf"
            or not 0 < float(count.reshape(())) < np.inf
        ):
            raise ImportFileError(f"{name}: '{i}.count' is not a number of pixels.")
        if mean.ndim != 1 or mean.dtype.kind != "f" or not len(mean):
            raise ImportFileError(f"{name}: '{i}.mean' is not a number per unit.")
        if not bool(((mean >= -1e-6) & (mean <= 1 + 1e-6)).all()):
            raise ImportFileError(
                f"{name}: '{i}.mean' leaves [0, 1], so it is not a share of the pixels."
            )
        counts[label] = float(count.reshape(()))
        means[label] = np.clip(mean.astype(np.float64), 0, 1)
        if len(mean) != len(means[next(iter(means))]):
            raise ImportFileError(f"{name}: '{i}.mean' has {len(mean)} units, others have more.")
    result = {}
    for label, mean in means.items():
        if label == 0:
            continue
        if counts[label] > counts[0]:
            raise ImportFileError(f"{name}: label {label} has more pixels than there are.")
        truth = counts[label] / counts[0]
        both = mean * truth
        result[label] = np.clip(both / np.maximum(means[0] + truth - both, 1e-300), 0, 1)
    return result


def import_clip_dissect(
    path: StrPath,
    layers: Mapping[str, str] | None = None,
    *,
    categories: Mapping[str, str] | None = None,
) -> UnitConcepts:
    r"""Read ``descriptions.csv`` of CLIP-Dissect: one description per unit, layers in one file.

    A description comes with a *similarity*. It depends on the similarity function and is not an
    IoU: ``info["measure"]`` says so, no threshold makes a unit a detector, and
    tests that need one are left out. Similarities rank units of one layer.

    Args:
        path: The file, with columns ``layer, unit, description, similarity``; units from 0 on.
        layers: ``{layer of the file: site name}`` where names differ, in forward order; layers that
            are not named are left out. None: all, under their own names, in the file's order.
        categories: ``{description: category}``, which the program does not know.

    Raises:
        ImportFileError: If the file is missing, foreign, truncated or says what cannot be; names
            file and line.
        ValueError: If a layer is not in the file.

    Source:
        The columns are those that CLIP-Dissect (``describe_neurons.py``) writes.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with open(f"{folder}/descriptions.csv", "w") as file:
        ...         print("layer,unit,description,similarity", file=file)
        ...         print("layer1,0,red,0.26", "layer1,1,zebra,0.15", sep="\n", file=file)
        ...     units = import_clip_dissect(f"{folder}/descriptions.csv")
        >>> units.info["measure"], [units.concepts[i].name for i in units.best("layer1")[0]]
        ('similarity', ['red', 'zebra'])
    """
    needed = ("layer", "unit", "description", "similarity")
    table = read_table(path, needed, "a descriptions.csv of CLIP-Dissect")
    there = list(dict.fromkeys(row.text("layer") for row in table))
    names = {layer: layer for layer in there} if layers is None else dict(layers)
    unknown = [layer for layer in names if layer not in there]
    if unknown:
        raise ValueError(f"{table.path} has no layer {unknown[0]!r}; there are {there}.")
    if len(set(names.values())) < len(names):
        raise ValueError(f"layers maps two layers to one site: {names}.")
    by_layer = _descriptions(table, names, dict(categories or {}))
    cells = _Cells()
    for layer, site in names.items():
        for unit, (concept, value) in sorted(by_layer[layer].items()):
            cells.add(site, unit, None, np.nan)
            cells.add(site, unit, concept, value)
    return cells.units(
        table.path,
        "a similarity",
        source="CLIP-Dissect descriptions.csv",
        iou_threshold=1.0,
        info={"measure": "similarity", "known": "best description"},
    )


def _descriptions(
    table: Table, names: Mapping[str, str], categories: Mapping[str, str]
) -> dict[str, dict[int, tuple[Concept, float]]]:
    found: dict[str, dict[int, tuple[Concept, float]]] = {layer: {} for layer in names}
    for row in table:
        layer, unit, text = row.text("layer"), row.whole("unit"), row.text("description")
        if layer not in found:
            continue
        if not text:
            raise row.error("the description is empty.")
        if unit >= _MAX_UNITS:
            raise row.error(f"unit {unit} is not one of a layer.")
        if unit in found[layer]:
            raise row.error(f"unit {unit} of layer {layer!r} is there twice.")
        concept = Concept(text, categories.get(text, ""))
        found[layer][unit] = (concept, row.number("similarity"))
    for layer, units in found.items():
        _check_units(table.path, layer, list(units), 0)
    return found
