"""Which channels of a network does it need for a class, and is that true?"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from nad_attr._version import __version__

if TYPE_CHECKING:
    from nad_attr._checks import GatingError
    from nad_attr.attribution import NADAttribution
    from nad_attr.certainty.measuring import certainty
    from nad_attr.certainty.result import ChannelCertainty
    from nad_attr.certainty.verdict import verdict
    from nad_attr.certainty.verdict_result import Verdict
    from nad_attr.data.labels import Labels, Task
    from nad_attr.explaining.explaining import explain
    from nad_attr.explaining.result import Explanation
    from nad_attr.flow.measuring import information_flow
    from nad_attr.flow.result import InformationFlow
    from nad_attr.gates.history import History
    from nad_attr.gates.recipe import PaperRecipe, Recipe
    from nad_attr.gates.sub_architecture import SubArchitecture
    from nad_attr.gates.task_gates import TaskGates
    from nad_attr.gating.hooks import gated, recorded
    from nad_attr.learning.api import learn_gates, learn_sizes
    from nad_attr.learning.runs import learn_to_store
    from nad_attr.learning.session import fit_constants
    from nad_attr.running.options import RunOptions
    from nad_attr.sites.finding import find_gate_sites, paper_sites
    from nad_attr.sites.site import GateSite, SiteError
    from nad_attr.store import GateStore, GateStoreError

__all__ = [
    "ChannelCertainty",
    "Explanation",
    "GateSite",
    "GateStore",
    "GateStoreError",
    "GatingError",
    "History",
    "InformationFlow",
    "Labels",
    "NADAttribution",
    "PaperRecipe",
    "Recipe",
    "RunOptions",
    "SiteError",
    "SubArchitecture",
    "Task",
    "TaskGates",
    "Verdict",
    "__version__",
    "certainty",
    "explain",
    "find_gate_sites",
    "fit_constants",
    "gated",
    "information_flow",
    "learn_gates",
    "learn_sizes",
    "learn_to_store",
    "paper_sites",
    "recorded",
    "verdict",
]

#: Where the names are from. They are imported when they are asked for: torch takes seconds, in
#: which the command line could not answer Ctrl-C.
_HOMES = {
    "gates.sub_architecture": ("SubArchitecture",),
    "attribution": ("NADAttribution",),
    "certainty": ("ChannelCertainty", "certainty"),
    "certainty.verdict": ("Verdict", "verdict"),
    "explaining": ("Explanation", "explain"),
    "flow": ("InformationFlow", "information_flow"),
    "gates": ("Task", "TaskGates"),
    "gating": ("GatingError", "gated", "recorded"),
    "data.labels": ("Labels",),
    "gates.history": ("History",),
    "learning": ("fit_constants", "learn_gates", "learn_sizes"),
    "gates.recipe": ("PaperRecipe", "Recipe"),
    "learning.runs": ("learn_to_store",),
    "running.options": ("RunOptions",),
    "sites": ("GateSite", "SiteError", "find_gate_sites", "paper_sites"),
    "store": ("GateStore", "GateStoreError"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(importlib.import_module(f"nad_attr.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    # nad_attr.store and other modules, as after an import of all names.
    if not name.startswith("__") and importlib.util.find_spec(f"nad_attr.{name}") is not None:
        return importlib.import_module(f"nad_attr.{name}")
    raise AttributeError(f"module 'nad_attr' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
