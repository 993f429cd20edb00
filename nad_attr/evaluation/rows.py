"""Sub-architectures from any form, with their tasks and names, each task once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nad_attr.data.labels import Task
from nad_attr.evaluation.responses import as_architectures, tasks_of_rows
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite

__all__ = ["NamedArchitectures", "named_architectures"]


@dataclass(frozen=True)
class NamedArchitectures:
    """T sub-architectures of the same sites, each of another task."""

    architectures: tuple[SubArchitecture, ...]
    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]

    @property
    def sites(self) -> tuple[GateSite, ...]:
        """Their gate sites, in forward order."""
        return self.architectures[0].sites

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which channels they keep: ``{site name: bool (T, C)}``."""
        return {
            site.name: torch.stack([arch[site.name] for arch in self.architectures])
            for site in self.sites
        }


def named_architectures(
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    size: float | None = None,
    *,
    least: int = 1,
) -> NamedArchitectures:
    """Check sub-architectures, in any of the forms that evaluation takes.

    Raises:
        TypeError: If they are something else.
        ValueError: If there are fewer than ``least``, one says no task, a task is there twice, or
            sites differ.

    Example:
        >>> site = GateSite("layer1", 2, 1)
        >>> named_architectures(SubArchitecture.from_kept({}, [site], task=4)).task_names
        ('4',)
    """
    archs = as_architectures(architectures, size)
    tasks = tasks_of_rows(archs)
    for task in tasks:
        if tasks.count(task) > 1:
            raise ValueError(f"task {task} is there twice; give one sub-architecture per task.")
    if len(tasks) < least:
        raise ValueError(f"{len(tasks)} sub-architecture(s) were given; at least {least} needed.")
    names = architectures.task_names if isinstance(architectures, TaskGates) else None
    return NamedArchitectures(tuple(archs), tasks, names or tuple(map(str, tasks)))
