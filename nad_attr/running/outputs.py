"""The outputs that are explained: one number per image and task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nad_attr.data.labels import Task

__all__ = ["task_outputs"]


def task_outputs(outputs: Tensor, tasks: Sequence[Task]) -> Tensor:
    """The outputs that are explained: one column per task.

    Args:
        outputs: (B, K), the network's outputs, normally logits.
        tasks: T class indices k, whose task output is ``outputs[:, k]``, or groups of class
            indices, whose task output is the logsumexp over the group: the logit of the
            superclass up to the normalisation that all classes share.

    Returns:
        (B, T).

    Example:
        >>> outputs = torch.tensor([[1.0, 2.0, 2.0]])
        >>> task_outputs(outputs, [0, (1, 2)])
        tensor([[1.0000, 2.6931]])
    """
    if all(isinstance(task, int) for task in tasks):
        return outputs[:, list(tasks)]
    columns = [
        outputs[:, task] if isinstance(task, int) else outputs[:, list(task)].logsumexp(1)
        for task in tasks
    ]
    return torch.stack(columns, dim=1)


def own_task_output(outputs: Tensor, classes: Tensor, valid: Tensor) -> Tensor:
    """The task output of each image for the task it stands in: (B,).

    Args:
        outputs: (B, K).
        classes: int64 (B, M), the classes of each image's task, padded with any class.
        valid: bool (B, M), which of them count.
    """
    members = outputs.gather(1, classes)
    if classes.shape[1] == 1:
        return members[:, 0]
    return members.masked_fill(~valid, -torch.inf).logsumexp(1)
