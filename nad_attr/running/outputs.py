"""The outputs that are explained: one number per image and task."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from nad_attr.data.labels import Task

__all__ = ["label_loss", "task_outputs"]


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


def label_loss(outputs: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """The loss of outputs against the images' labels, summed over images.

    Args:
        outputs: (B, K).
        labels: int64 (B,) classes: cross-entropy. (B, K) memberships: binary cross-entropy of each
            output (of logits, or of probabilities where all outputs are in [0, 1]) over those that
            are known.
        targets: (B, K), NaN where unknown: the squared difference from these instead.

    Example:
        >>> outputs, labels = torch.tensor([[1.0, 3.0]]), torch.tensor([[1, 0]])
        >>> label_loss(outputs, labels, targets=torch.tensor([[2.0, 1.0]]))
        tensor(5.)
    """
    if labels.ndim == 1:
        return F.cross_entropy(outputs, labels, reduction="sum")
    if targets is not None:
        wanted = targets.to(outputs)
        return (outputs - wanted)[~wanted.isnan()].square().sum()
    known = labels >= 0
    values, wanted = outputs[known], labels[known].to(outputs)
    if bool(((outputs >= 0) & (outputs <= 1)).all()):
        return F.binary_cross_entropy(values, wanted, reduction="sum")
    return F.binary_cross_entropy_with_logits(values, wanted, reduction="sum")


def own_task_output(outputs: Tensor, classes: Tensor, valid: Tensor) -> Tensor:
    """The task output of each image for its own task, by outputs (B, K): (B,).

    ``classes``, int64 (B, M), are the task's, padded; ``valid``, bool (B, M), says which count.
    """
    members = outputs.gather(1, classes)
    if classes.shape[1] == 1:
        return members[:, 0]
    return members.masked_fill(~valid, -torch.inf).logsumexp(1)
