"""Which channels of a network does it need for a class, and is that true?"""

from nad_attr._version import __version__
from nad_attr.architecture import SubArchitecture
from nad_attr.attribution import NADAttribution
from nad_attr.gates import Task, TaskGates
from nad_attr.gating import GatingError, gated, recorded
from nad_attr.history import History
from nad_attr.learning import learn_gates, learn_sizes
from nad_attr.recipe import PaperRecipe, Recipe
from nad_attr.runs import learn_to_store
from nad_attr.sites import GateSite, SiteError, find_gate_sites, paper_sites
from nad_attr.store import GateStore, GateStoreError

__all__ = [
    "GateSite",
    "GateStore",
    "GateStoreError",
    "GatingError",
    "History",
    "NADAttribution",
    "PaperRecipe",
    "Recipe",
    "SiteError",
    "SubArchitecture",
    "Task",
    "TaskGates",
    "__version__",
    "find_gate_sites",
    "gated",
    "learn_gates",
    "learn_sizes",
    "learn_to_store",
    "paper_sites",
    "recorded",
]
