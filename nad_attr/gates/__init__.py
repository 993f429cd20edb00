"""Gates, sub-architectures and recipes, as values. Nothing here runs a network."""

from __future__ import annotations

from nad_attr.data.labels import Task, as_task
from nad_attr.gates.channels import jaccard, kappa, n_channels, top_k_masks
from nad_attr.gates.history import History
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates

__all__ = [
    "History",
    "PaperRecipe",
    "Recipe",
    "SubArchitecture",
    "Task",
    "TaskGates",
    "as_task",
    "jaccard",
    "kappa",
    "n_channels",
    "top_k_masks",
]
