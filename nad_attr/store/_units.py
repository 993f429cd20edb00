"""Tables of units, such as IoUs with concepts, as results on a store's site axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from nad_attr.sites.site import GateSite
from nad_attr.store._errors import GateStoreError
from nad_attr.store._write import check_name

__all__ = ["UNITS", "UnitTables", "Units", "packed", "unpacked"]

#: The group of all tables of units.
UNITS = "units"
_FORMAT = 1

#: {quantity: {site name: array whose first axis is the site's units}}
UnitTables: TypeAlias = "Mapping[str, Mapping[str, Any]]"
#: Such tables, concepts as (name, category), and further facts.
Units: TypeAlias = "tuple[dict[str, dict[str, Any]], list[tuple[str, str]], dict[str, Any]]"


def packed(
    name: str,
    tables: UnitTables,
    concepts: Sequence[tuple[str, str]],
    attributes: Mapping[str, Any] | None,
    sites: Sequence[GateSite] | None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Group, arrays and attributes of a result for a store with these sites."""
    check_name(name, "unit concepts")
    named = [list(table) for table in tables.values()]
    if not named or not named[0] or any(set(each) != set(named[0]) for each in named):
        raise GateStoreError("tables of units must be of the same sites, at least one.")
    known = None if sites is None else {site.name: (i, site) for i, site in enumerate(sites)}
    orders: dict[str, int] = {}
    for position, site_name in enumerate(named[0]):
        if known is not None and site_name not in known:
            raise GateStoreError(
                f"units of {site_name!r} do not belong here: the store's sites are {list(known)}. "
                "Select those, or write to another file."
            )
        orders[site_name] = position if known is None else known[site_name][0]
    arrays: dict[str, Any] = {}
    for quantity, table in tables.items():
        for site_name, value in table.items():
            array = value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)
            n = len(tables[next(iter(tables))][site_name])
            if known is not None:
                n = known[site_name][1].n_channels
            if array.ndim < 1 or len(array) != n:
                raise GateStoreError(
                    f"{quantity} of {site_name!r} has shape {array.shape}, not one row for each of "
                    f"{n} units."
                )
            arrays[f"{check_name(quantity, 'a table of units')}.{orders[site_name]}"] = array
    arrays["concept"] = [concept for concept, _ in concepts]
    arrays["category"] = [category for _, category in concepts]
    about = {
        "what": "units",
        "format": _FORMAT,
        "sites": [[site_name, order] for site_name, order in orders.items()],
        "quantities": list(tables),
        "about": dict(attributes or {}),
    }
    return f"{UNITS}/{name}", arrays, about


def unpacked(arrays: Mapping[str, Any], attributes: Mapping[str, Any], where: str) -> Units:
    """The tables, concepts and attributes that :func:`packed` packed; a GateStoreError if not."""
    if attributes.get("what") != "units":
        raise GateStoreError(f"{where} holds no units.")
    if attributes.get("format") != _FORMAT:
        raise GateStoreError(
            f"{where} has format {attributes.get('format')!r}; this version reads {_FORMAT}."
        )
    try:
        sites = [(str(name), int(order)) for name, order in attributes["sites"]]
        tables = {
            str(quantity): {name: arrays[f"{quantity}.{order}"] for name, order in sites}
            for quantity in attributes["quantities"]
        }
        concepts = list(zip(arrays["concept"], arrays["category"], strict=True))
        if any(not isinstance(text, str) for concept in concepts for text in concept):
            raise TypeError("concepts that are not texts")
        return tables, concepts, dict(attributes["about"])
    except (KeyError, TypeError, ValueError) as error:
        raise GateStoreError(f"{where} holds no whole table of units: {error!r:.200}.") from None
