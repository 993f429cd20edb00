"""Keep a report's results in the file of the gates, and read them again."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict_result import Verdict
from nad_attr.concepts import Comparison, UnitConcepts
from nad_attr.evaluation.result import Evaluation
from nad_attr.report.concepts import units_part
from nad_attr.report.contents import BROKEN, Results, check_parts
from nad_attr.report.packing import plain
from nad_attr.report.parts import statistics_part
from nad_attr.report.pictures import is_picture
from nad_attr.sites.site import GateSite
from nad_attr.store import GateStoreError, read_result, result_names, unit_names, write_result

__all__ = ["STATISTICS", "found_results", "keep_results"]

#: Names that the page reads from each part that is kept as JSON.
_NEEDED: dict[str, tuple[str, ...]] = {
    "mosaics": ("n", "n_tasks", "top", "sites", "excess", "low", "high", "tasks", "left_out"),
    "errors": ("n_errors", "n_images", "n_others", "similarity", "rows", "confused", "examples"),
    "flow": ("sites", "tasks", "nodes", "links", "drawn", "n_images"),
    "pictures": ("album",),
    "export": ("rows", "stays_whole"),
}
_KEPT = ("curves", "mosaics", "errors", "flow", "pictures", "where", "export")
_CURVE = ("name", "measure", "sizes", "full", "empty", "delta", "keep", "ablate", "n_images")
_COST = ("parameters", "multiply_adds", "seconds")
_EXAMPLE = ("mosaic", "coloured", "tasks", "shares")
FORMAT = 1
#: The title of statistics.
STATISTICS = "Gates against concepts"


def keep_results(path: Path, results: Results) -> list[str]:
    """Write what was measured into the file of the gates; returns the groups that were written.

    Raises:
        GateStoreError: If the file cannot be written.
    """
    written = []
    if results.evaluation is not None and results.evaluation_from == "for this report":
        results.evaluation.save(path, "evaluation")
        written.append("evaluation")
    for name in _KEPT:
        part = getattr(results, name)
        if part is None:
            continue
        text = json.dumps(plain(part, 6), separators=(",", ":")).encode()
        group = f"report/{name}"
        attributes = {"what": f"report {name}", "format": FORMAT}
        write_result(path, group, {"json": np.frombuffer(text, np.uint8)}, attributes)
        written.append(group)
    return written


def found_results(
    path: Path, sites: Sequence[GateSite], *, evaluation: str | None = None
) -> Results:
    """The results in the file of the gates; a part that cannot be read is left out with a note.

    ``evaluation`` names the one to show; None: "evaluation", or else the first.

    Raises:
        GateStoreError: If the file cannot be read, or there is no evaluation of that name.
    """
    results = Results()
    names = result_names(path)

    def head(name: str) -> Mapping[str, Any]:
        try:
            return read_result(path, name)[1]
        except GateStoreError as error:
            results.notes.append(f"Left out: {error}")
            return {}

    heads = {name: head(name) for name in names if name.startswith("evaluation")}
    evaluations = [n for n in names if heads.get(n, {}).get("what") == "evaluation"]
    if evaluation is not None and evaluation not in evaluations:
        heads |= {name: head(name) for name in names if name not in heads}
        evaluations = [n for n in names if heads[n].get("what") == "evaluation"]
        if evaluation not in evaluations:
            there = ", ".join(map(repr, evaluations)) or "none"
            raise GateStoreError(f"{path} has no evaluation {evaluation!r}; there are {there}.")
    if evaluations:
        wanted = evaluation or ("evaluation" if "evaluation" in evaluations else evaluations[0])
        try:
            results.evaluation = Evaluation.load(path, wanted)
            results.evaluation_from = wanted
        except BROKEN as error:
            if evaluation is not None:
                raise
            results.notes.append(f"No evaluation: {error}")
    if "certainty" in names:
        try:
            results.certainty = ChannelCertainty.load(path, "certainty")
        except BROKEN as error:
            results.notes.append(f"No certainty: {error}")
    if "verdict" in names:
        try:
            results.verdict = Verdict.load(path)
        except BROKEN as error:
            results.notes.append(f"No verdict: {error}")
    for name in _KEPT:
        group = f"report/{name}"
        if group in names:
            try:
                setattr(results, name, _part(name, *read_result(path, group)))
            except BROKEN as error:
                results.notes.append(f"No {name}: what is in the file cannot be read ({error})")
    _take_units(path, sites, results)
    for group in names:
        place, _, name = group.partition("/")
        if place != "comparison" or not name:
            continue
        title = STATISTICS if name == "comparison" else f"{STATISTICS}: {name}"
        try:
            results.statistics[title] = statistics_part(Comparison.load(path, name))
        except BROKEN as error:
            results.notes.append(f"No statistics: {error}")
    return results


def _take_units(path: Path, sites: Sequence[GateSite], results: Results) -> None:
    names = unit_names(path)
    if not names:
        return
    chosen = "dissection" if "dissection" in names else names[0]
    try:
        results.units = units_part(UnitConcepts.load(path, chosen), sites)
    except BROKEN as error:
        results.notes.append(f"No concepts: {error}")


def _part(name: str, arrays: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    if attributes.get("format") != FORMAT or attributes.get("what") != f"report {name}":
        raise ValueError(f"format {attributes.get('format')!r} is not known")
    found = json.loads(np.asarray(arrays["json"], np.uint8).tobytes().decode("utf-8"))
    # NaN and infinity, which are not JSON, but Python reads them.
    found = plain(found, 6)
    if name == "curves":
        for curve in found:
            check_parts(curve, _CURVE)
        return found
    if name == "where":
        for row in found if isinstance(found, list) else [{}]:
            check_parts(row, ("task", "site", "images"))
            if not all(is_picture(picture) for pair in row["images"] for picture in pair):
                raise ValueError("it holds an invalid picture")
        return found
    if not isinstance(found, dict):
        raise ValueError("it is not a table")
    check_parts(found, _NEEDED[name])
    if name == "flow":
        _check_flow(found)
    if name == "pictures":
        if not all(map(is_picture, found["album"])):
            raise ValueError("it holds an invalid picture")
        # The page's program reads it as int32 at once.
        if found.get("top") and len(base64.b64decode(found["top"], validate=True)) % 4:
            raise ValueError("the channels' pictures are cut short")
    if name == "errors" and not isinstance(found["examples"], list):
        raise ValueError("its examples are not a list")
    if name == "export":
        for row in found["rows"]:
            check_parts(row, ("name", *_COST))
            if not all(isinstance(row[c], (int, float)) for c in _COST) or not row["seconds"] > 0:
                raise ValueError("a cost in it is not a number")
        if not found["rows"] or not all(isinstance(m, str) for m in found["stays_whole"]):
            raise ValueError("it has no costs")
    if name == "mosaics":
        for example in found.get("examples") or []:
            check_parts(example, _EXAMPLE)
            if not (is_picture(example["mosaic"]) and is_picture(example["coloured"])):
                raise ValueError("it holds an invalid picture")
            if not (
                all(isinstance(task, str) for task in example["tasks"])
                and all(share is None or isinstance(share, float) for share in example["shares"])
            ):
                raise ValueError("it holds an invalid class")
    return found


def _check_flow(found: Mapping[str, Any]) -> None:
    """Refuse a flow whose numbers do not fit."""
    n_tasks, nodes = len(found["tasks"]), found["nodes"]
    for node in nodes:
        check_parts(node, ("site", "channel", "effect", "n"))
        if not (0 <= node["site"] < len(found["sites"]) and len(node["effect"]) == n_tasks):
            raise ValueError("it holds an invalid channel")
    for link in found["links"]:
        check_parts(link, ("task", "from", "to", "flow", "straight"))
        ends = (link["from"], link["to"])
        if not (0 <= link["task"] < n_tasks and all(0 <= end < len(nodes) for end in ends)):
            raise ValueError("it holds an invalid link")
