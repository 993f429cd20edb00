"""The differences between a store and gates that should fit it, in words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nad_attr.data.fingerprints import same_outputs
from nad_attr.gates.recipe import FOLLOWING, Recipe
from nad_attr.sites.site import GateSite
from nad_attr.store._content import Head

__all__ = ["differences", "different_means", "some"]

#: Entries of the provenance that must be the same for a run to continue.
_COMPARED = ("model_hash", "data_fingerprint", "seed")


def some(items: Sequence[object]) -> str:
    """The first of many items."""
    if len(items) <= 6:
        return ", ".join(map(str, items)) or "none"
    return f"{', '.join(map(str, items[:4]))}, ... {items[-1]}"


def differences(
    head: Head,
    sites: Sequence[GateSite] | None,
    recipe: Recipe | None,
    provenance: Mapping[str, Any],
) -> list[str]:
    """The differences in sites, recipe, model, data and seed."""
    wrong = []
    if sites is not None and tuple(sites) != head.sites:
        wrong.append(f"sites ({different_sites(head.sites, tuple(sites))})")
    if recipe is not None and head.recipe is not None and recipe != head.recipe:
        if type(recipe) is not type(head.recipe):
            wrong.append(f"recipe (it has {head.recipe!r}, not {recipe!r})")
        else:
            # A field that is left to the ablation equals the number that the ablation gives.
            asked, had = (
                dataclasses.asdict(r) | {name: r.fitting(name) for name in FOLLOWING}
                for r in (recipe, head.recipe)
            )
            fields = [
                f"{name} is {had[name]!r} in it, not {value!r}"
                for name, value in asked.items()
                if value != had[name]
            ]
            wrong += [f"recipe ({', '.join(fields)})"] if fields else []
    names = {"model_hash": "model", "data_fingerprint": "data"}
    for key in _COMPARED:
        known, given = head.provenance.get(key), provenance.get(key)
        if known is not None and given is not None and known != given:
            wrong.append(f"{names.get(key, key)} ({key} is {known!s:.16} in it, not {given!s:.16})")
    amp, outputs = ((head.provenance.get(key), provenance.get(key)) for key in ("amp", "outputs"))
    if not wrong and amp[0] == amp[1] and not same_outputs(*outputs):
        wrong.append(
            "model (its weights are the same, but not its outputs on the same images: another "
            "activation, pooling or the like in its code, or other settings of torch)"
        )
    return wrong


def different_sites(known: Sequence[GateSite], given: Sequence[GateSite]) -> str:
    names, others = [s.name for s in known], [s.name for s in given]
    if names != others:
        only = [name for name in names if name not in others]
        new = [name for name in others if name not in names]
        parts = [f"without {some(only)}"] if only else []
        parts += [f"with {some(new)}"] if new else []
        return " and ".join(parts) or "in another order"
    a, b = next((a, b) for a, b in zip(known, given, strict=True) if a != b)
    return f"{a} in it, not {b}"


def different_means(
    known: Mapping[str, Tensor] | None, given: Mapping[str, Tensor] | None
) -> list[str]:
    """The first site whose means differ, if there is one."""
    if known is None or given is None:
        return [] if known is None and given is None else ["means (one has none)"]
    # Another device or batch size rounds the same means differently.
    for name, mean in known.items():
        if not torch.allclose(mean, given[name], rtol=1e-3, atol=1e-5):
            return [f"means of {name!r}"]
    return []
