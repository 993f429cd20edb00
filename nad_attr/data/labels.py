"""Tasks, and which images belong to them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

__all__ = ["Task", "as_task", "own_images"]


#: A class index, or several class indices that count as one task (a superclass).
Task: TypeAlias = "int | tuple[int, ...]"


def as_task(value: object) -> Task:
    """A class index as int, a group of class indices as sorted tuple.

    Raises:
        TypeError: If it is neither.
        ValueError: If an index is negative or a group is empty.

    Example:
        >>> as_task(torch.tensor(3)), as_task([5, 2])
        (3, (2, 5))
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (bool, str, bytes, float)):
        raise TypeError(f"a task is a class index or a group of class indices, not {value!r}.")
    if hasattr(value, "__index__"):
        index = int(value.__index__())
        if index < 0:
            raise ValueError(f"a task is a class index from 0 on, not {index}.")
        return index
    if isinstance(value, Iterable):
        members = [as_task(item) for item in value]
        if not members:
            raise ValueError("a task of no classes: name at least one class index.")
        if not all(isinstance(member, int) for member in members):
            raise TypeError(f"a task is a class index or a flat group of them, not {value!r}.")
        return tuple(sorted({m for m in members if isinstance(m, int)}))
    raise TypeError(
        f"a task is a class index or a group of class indices, not {type(value).__name__}."
    )


def own_images(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Which images are each task's own: those of its class, or of any class of its group.

    Args:
        labels: int64 (N,).
        tasks: T class indices or groups of them.

    Returns:
        bool (T, N).

    Example:
        >>> own_images(torch.tensor([0, 1, 2]), [0, (1, 2)])
        tensor([[ True, False, False],
                [False,  True,  True]])
    """
    members = [task if isinstance(task, tuple) else (task,) for task in tasks]
    return torch.stack([torch.isin(labels, labels.new_tensor(group)) for group in members])
