"""Tasks, labels of every kind, and the images of a task.

Labels of all kinds (:func:`read_labels`) become one of two forms, which all other modules read
through :func:`own_images` and :func:`other_images`:

- int64 (N,), *class indices*: an image of class k is task k's own and every other task's other;
- int64 (N, K) of 1, 0 and -1, *memberships*, a column for each output: own, other, unknown. This is
  the form of several labels an image, of the label of a network of one output, and of regression
  targets, which are own above their median.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from nad_attr._checks import tensor_of

__all__ = ["Labels", "Task", "as_task", "other_images", "own_images"]


#: A class index, or several class indices that count as one task (a superclass).
Task: TypeAlias = "int | tuple[int, ...]"

#: Kinds of labels: one class an image, several labels an image, numbers to be predicted.
Kind: TypeAlias = Literal["classes", "several", "targets"]
_KINDS = ("classes", "several", "targets")


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
    if isinstance(value, str):
        raise TypeError(
            f"a task must be a class index or a group of class indices, got {value!r}; for a class "
            "by name give the dataset's index, {name: dataset.class_to_idx[name]}."
        )
    if isinstance(value, (bool, bytes, float)):
        raise TypeError(f"a task must be a class index or a group of class indices, got {value!r}.")
    if hasattr(value, "__index__"):
        index = int(value.__index__())
        if index < 0:
            raise ValueError(f"a task must be a class index from 0 on, got {index}.")
        return index
    if isinstance(value, Iterable):
        members = [as_task(item) for item in value]
        if not members:
            raise ValueError("a task has no classes: name at least one class index.")
        if not all(isinstance(member, int) for member in members):
            raise TypeError(f"a task must be a class index or a flat group of them, got {value!r}.")
        return tuple(sorted({m for m in members if isinstance(m, int)}))
    raise TypeError(
        f"a task must be a class index or a group of class indices, got {type(value).__name__}."
    )


def first_tasks(tasks: Sequence[Task]) -> str:
    """The first 20 of some tasks, for a message."""
    return ", ".join(map(str, tasks[:20])) + " ..." * (len(tasks) > 20)


def own_images(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """The images that are each task's own: those of its class, or of any class of its group.

    Args:
        labels: int64 (N,), or memberships (N, K).
        tasks: T class indices or groups of them.

    Returns:
        bool (T, N).

    Example:
        >>> own_images(torch.tensor([0, 1, 2]), [0, (1, 2)])
        tensor([[ True, False, False],
                [False,  True,  True]])
        >>> own_images(torch.tensor([[1, 0], [-1, 1]]), [0, 1])
        tensor([[ True, False],
                [False,  True]])
    """
    if labels.ndim == 2:
        return torch.stack([(_columns(labels, task) == 1).any(1) for task in tasks])
    return torch.stack([torch.isin(labels, labels.new_tensor(task)) for task in tasks])


def other_images(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """The images that are each task's others: those known not to be its own.

    Args:
        labels: int64 (N,), or memberships (N, K).
        tasks: T class indices or groups of them.

    Returns:
        bool (T, N). An image that is neither own nor other is unknown to the task.

    Example:
        >>> other_images(torch.tensor([[1, 0], [-1, 1]]), [0, 1, (0, 1)])
        tensor([[False, False],
                [ True, False],
                [False, False]])
    """
    if labels.ndim == 1:
        return ~own_images(labels, tasks)
    return torch.stack([(_columns(labels, task) == 0).all(1) for task in tasks])


def _columns(labels: Tensor, task: Task) -> Tensor:
    group = task if isinstance(task, tuple) else (task,)
    if max(group) >= labels.shape[1]:
        raise ValueError(
            f"there is a task {max(group)}, but the labels are those of one output, whose task is "
            "0: its own images have label 1, or a target above the median. For class indices that "
            "are floating-point numbers give labels.long()."
            if labels.shape[1] == 1
            else f"there is a task {max(group)}, but labels for {labels.shape[1]} outputs (0 to "
            f"{labels.shape[1] - 1})."
        )
    return labels[:, list(group)]


@dataclass(frozen=True, eq=False)
class Labels:
    """Labels with their meaning, if shape and type do not define it.

    Used as labels, ``(images, Labels(...))``, or as ``(dataset, Labels(...))``, which replaces the
    labels of a dataset or loader, in the dataset's order.

    Args:
        values: Class indices (N,) or (N, 1); class names (N,); several labels (N, K) of 0 and 1,
            with NaN or -1 for unknown; one-hot rows (N, K); targets (N,) or (N, K), with NaN for
            unknown.
        classes: The names of the classes in the order of the network's outputs, for names.
        kind: "classes", "several" or "targets". None: names and whole numbers (N,) are classes,
            and so are rows that hold a single 1 each and 0 otherwise; other rows of 0, 1 and
            unknown are several labels; all else is targets.
        above: For targets: a number, or one for each output; images whose target is above it are
            the output's own, all others its other images. None: each output's median.

    Raises:
        ValueError: If there is no such kind, or ``above`` is given for another kind.

    Example:
        >>> read_labels(Labels(["cat", "dog", "cat"], classes=["dog", "cat"])).labels
        tensor([1, 0, 1])
        >>> read_labels(Labels(torch.tensor([[0.2], [0.9], [0.4]]), above=0.5)).labels.tolist()
        [[0], [1], [0]]
        >>> rows = torch.tensor([[1, 0], [0, 1]])  # one label each by chance
        >>> read_labels(Labels(rows, kind="several")).labels.tolist(), read_labels(rows).labels
        ([[1, 0], [0, 1]], tensor([0, 1]))
    """

    values: Any
    classes: Sequence[str] | None = None
    kind: Kind | None = None
    above: float | Sequence[float] | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in _KINDS:
            raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {self.kind!r}.")
        if self.above is not None and self.kind not in (None, "targets"):
            raise ValueError(f"above= is for targets; kind is {self.kind!r}.")

    def __len__(self) -> int:
        return len(self.values)


@dataclass(frozen=True, eq=False)
class ReadLabels:
    """Labels in the form that all other code uses.

    Attributes:
        labels: int64 (N,) or (N, K), see this module's description.
        targets: float64 (N, K), NaN for unknown, of regression targets; else None.
    """

    labels: Tensor
    targets: Tensor | None = None


def read_labels(labels: Any, n: int | None = None) -> ReadLabels:
    """Read labels of any kind of :class:`Labels`; ``n`` is the number of images, if known.

    Example:
        >>> read_labels([[1, 0], [1, 1], [0, -1]]).labels.tolist()
        [[1, 0], [1, 1], [0, -1]]
        >>> read_labels([0.5, 1.5, 4.0]).labels.tolist()
        [[0], [0], [1]]
    """
    given = labels if isinstance(labels, Labels) else Labels(labels)
    values = _numbers(given)
    if values.ndim == 2 and values.shape[1] == 1 and given.kind != "several":
        whole = not values.is_floating_point() and not bool((values < 0).any())
        values = values[:, 0] if whole and given.kind != "targets" else values
    if n is not None and len(values) != n:
        raise ValueError(f"{n} inputs came with {len(values)} labels.")
    if len(values) == 0:
        raise ValueError("data is empty: there is not a single image to learn from.")
    kind = given.kind or _kind(values, given.above is not None)
    if kind == "classes":
        return ReadLabels(_classes(values))
    columns = values if values.ndim == 2 else values[:, None]
    if kind == "several":
        return ReadLabels(_memberships(columns))
    return _targets(columns.double(), given.above)


def _numbers(given: Labels) -> Tensor:
    """The values as a tensor (N,) or (N, K) on the CPU."""
    values = given.values
    if isinstance(values, Tensor):
        tensor = values
    else:
        array = np.asarray(values, dtype=object if _is_text(values) else None)
        if array.size and all(isinstance(v, str) for v in array.flat):
            return _named(array, given.classes)
        try:
            tensor = tensor_of(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"labels must be class indices, got {values!r:.60}: {error}."
            ) from None
    if given.classes is not None:
        raise ValueError("classes= names the classes of labels that are names; these are numbers.")
    if tensor.ndim not in (1, 2) or tensor.is_complex() or 0 in tensor.shape[1:]:
        raise ValueError(
            "labels must be class indices, an integer tensor of shape (N,), or (N, K) for several "
            f"labels or targets an image, got {tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    if tensor.dtype == torch.bool:
        if tensor.ndim == 1:
            raise ValueError("labels must be class indices, not True and False.")
        tensor = tensor.long()
    return tensor.detach().to("cpu")


def _is_text(values: Any) -> bool:
    return isinstance(values, (list, tuple)) and any(isinstance(v, str) for v in values)


def _named(names: Any, classes: Sequence[str] | None) -> Tensor:
    if classes is None:
        shown = ", ".join(map(repr, sorted({str(v) for v in names.flat})[:5]))
        raise ValueError(
            f"labels are names ({shown}, ...), and nothing says which output is which: give "
            "nad_attr.Labels(names, classes=[...]) with the classes in the order of the network's "
            "outputs."
        )
    number = {str(name): k for k, name in enumerate(classes)}
    unknown = next((v for v in names.flat if v not in number), None)
    if unknown is not None:
        raise ValueError(f"label {unknown!r} is not one of the {len(number)} classes.")
    if names.ndim != 1:
        raise ValueError(f"names of classes must be a list, one an image, got {names.shape}.")
    return torch.tensor([number[v] for v in names], dtype=torch.int64, device="cpu")


def _kind(values: Tensor, has_threshold: bool) -> Kind:
    if has_threshold:
        return "targets"
    if values.ndim == 1 and not values.is_floating_point():
        return "classes"
    known = values[~values.isnan()] if values.is_floating_point() else values
    if bool(((known == 0) | (known == 1) | (known == -1)).all()):
        hot = (
            values.ndim == 2 and values.shape[1] > 1 and bool(((values == 0) | (values == 1)).all())
        )
        return "classes" if hot and bool((values.sum(1) == 1).all()) else "several"
    if not values.is_floating_point():
        raise ValueError(
            "whole numbers (N, K) must be 0, 1 or -1 (unknown), one for each output; for numbers "
            "to be predicted give labels.float()."
        )
    return "targets"


def _classes(values: Tensor) -> Tensor:
    if values.ndim == 2:
        if not bool(((values == 0) | (values == 1)).all()) or bool((values.sum(1) != 1).any()):
            raise ValueError("rows of classes must hold a single 1 each, and 0 otherwise.")
        return values.argmax(1)
    if values.is_floating_point():
        raise ValueError(f"class indices must be whole numbers, got {values.dtype}: labels.long().")
    if int(values.min()) < 0:
        raise ValueError(
            f"labels must be class indices from 0 on, got {int(values.min())}. Leave out images "
            "without a class; the one label of a network of one output may be unknown (-1) where "
            "labels have shape (N, 1)."
        )
    return values.long()


def _memberships(values: Tensor) -> Tensor:
    known = torch.where(values.isnan(), -1, values) if values.is_floating_point() else values
    if not bool(((known == 0) | (known == 1) | (known == -1)).all()):
        raise ValueError("several labels must be 0, 1, or unknown: NaN or -1.")
    if bool((values == -1).any()) and not bool((known == 0).any()):
        raise ValueError(
            "labels are only 1 and -1, and -1 means unknown: give 0 where a label is absent."
        )
    return known.long()


def _targets(values: Tensor, above: float | Sequence[float] | None) -> ReadLabels:
    if bool(values.isinf().any()):
        raise ValueError("targets must be finite numbers, or NaN where unknown.")
    if above is None:
        cut = values.nanquantile(0.5, dim=0)
        # If more than half have the highest value, those are above and the others are not.
        own = torch.where(cut == values.nan_to_num(-torch.inf).amax(0), values >= cut, values > cut)
    else:
        cut = torch.as_tensor(above, dtype=torch.float64, device="cpu")
        if cut.ndim > 1 or (cut.ndim == 1 and len(cut) != values.shape[1]):
            raise ValueError(
                f"above must be one number, or one for each of {values.shape[1]} outputs, got "
                f"{above!r}."
            )
        own = values > cut
    labels = torch.where(values.isnan(), -1, own.long())
    return ReadLabels(labels, values)


def for_one_output(labels: Tensor) -> Tensor:
    """Class indices 0 and 1 as the label of a network of one output: (N, 1); others are refused.

    Example:
        >>> for_one_output(torch.tensor([0, 1])).tolist()
        [[0], [1]]
    """
    if labels.ndim == 2:
        return labels
    if int(labels.max()) > 1:
        raise ValueError(
            f"there is a label {int(labels.max())}, but the network has one output: its labels are "
            "1 (the output's own images) and 0, or float targets."
        )
    return labels[:, None]


def only_classes(labels: Tensor) -> Tensor:
    """Refuse labels that are not class indices."""
    if labels.ndim != 1:
        raise ValueError(
            "this needs one class for each image, got several labels an image, or targets: give "
            "class indices of shape (N,). Learning, evaluation, curves, scorers, ablations, "
            "stability and top images take the other kinds."
        )
    return labels


def patterns(labels: Tensor) -> tuple[Tensor, Tensor]:
    """The different labels, in order, and the number of each image's label.

    Returns:
        (P,) or (P, K), labels that :func:`own_images` takes, and int64 (N,).

    Example:
        >>> patterns(torch.tensor([[1, 0], [0, 0], [1, 0]]))[1]
        tensor([1, 0, 1])
    """
    dim = None if labels.ndim == 1 else 0
    known, place = torch.unique(labels, return_inverse=True, dim=dim)
    return known, place


def tasks_in(labels: Tensor) -> list[int]:
    """The tasks that have own images, in order.

    Example:
        >>> tasks_in(torch.tensor([2, 0, 2])), tasks_in(torch.tensor([[0, 1], [0, -1]]))
        ([0, 2], [1])
    """
    if labels.ndim == 1:
        return [int(k) for k in labels.unique()]
    return [int(k) for k in (labels == 1).any(0).nonzero()[:, 0]]
