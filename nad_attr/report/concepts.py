"""What a page shows of dissected units: the best concept of each, and whether it is a detector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from nad_attr.report.packing import plain, text64
from nad_attr.sites.site import GateSite

__all__ = ["units_part"]


def units_part(units: Any, sites: Sequence[GateSite]) -> dict[str, Any]:
    """The best concept of each channel, over the page's sites in order.

    ``best`` is base64 of int32 (all channels,), -1 where none is known; ``iou`` of float32,
    ``detector`` of uint8; ``counts`` has the detectors of each category.

    Raises:
        ValueError: If a site has another number of units, or none of the sites was dissected.
    """
    there = set(units.sites)
    if not there & {site.name for site in sites}:
        raise ValueError("the concepts are of units of other sites than the gates.")
    best, overlaps, flags = [], [], []
    for site in sites:
        index = np.full(site.n_channels, -1, np.int32)
        iou = np.zeros(site.n_channels, np.float32)
        flag = np.zeros(site.n_channels, np.uint8)
        if site.name in there:
            if units.n_units(site.name) != site.n_channels:
                raise ValueError(
                    f"the concepts are of {units.n_units(site.name)} units at {site.name!r}, "
                    f"which has {site.n_channels} channels."
                )
            found, values = units.best(site.name)
            index[:] = found
            iou[:] = np.nan_to_num(np.asarray(values, np.float32))
            flag[:] = np.asarray(units.detectors(site.name))
        best.append(index)
        overlaps.append(iou)
        flags.append(flag)
    concepts = [[str(c.name), str(c.category)] for c in units.concepts]
    indices, detects = np.concatenate(best), np.concatenate(flags).astype(bool)
    counts: dict[str, int] = {}
    for number in indices[detects & (indices >= 0)].tolist():
        category = concepts[number][1] or "other"
        counts[category] = counts.get(category, 0) + 1
    return {
        "concepts": concepts,
        "best": text64(indices),
        "iou": text64(np.concatenate(overlaps)),
        "detector": text64(np.concatenate(flags)),
        "sites": [site.name for site in sites if site.name in there],
        "source": str(getattr(units, "source", "")),
        "threshold": plain(float(getattr(units, "iou_threshold", float("nan")))),
        "counts": counts,
    }
