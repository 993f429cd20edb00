"""Take a class out of a network: close the channels that only it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.data.labels import Task
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import check_eval
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.tracing import main_output
from nad_attr.stats.results import Result
from nad_attr.system.rng import isolated_rng

__all__ = ["Forgotten", "forget"]


@dataclass(frozen=True)
class Forgotten(Result):
    """A network without one of its classes.

    Attributes:
        task: The class.
        architecture: The network with the class's own channels closed; its ``applied`` and
            ``export`` give the network that forgot.
        n_closed: How many channels that are.
        before: ``{class index: share of its images that the whole network gets right}``.
        after: The same of the network that forgot.
        n_images: ``{class index: images measured}``.
    """

    task: Task
    architecture: SubArchitecture
    n_closed: int
    before: Mapping[int, float] = field(default_factory=dict)
    after: Mapping[int, float] = field(default_factory=dict)
    n_images: Mapping[int, int] = field(default_factory=dict)

    def _mean(self, values: Mapping[int, float], own: bool) -> float:
        members = {self.task} if isinstance(self.task, int) else set(self.task)
        chosen = [v for label, v in values.items() if (label in members) == own]
        return sum(chosen) / len(chosen) if chosen else float("nan")

    @property
    def own(self) -> tuple[float, float]:
        """Accuracy on the class's own images, before and after."""
        return self._mean(self.before, True), self._mean(self.after, True)

    @property
    def others(self) -> tuple[float, float]:
        """Mean accuracy of the other classes, before and after."""
        return self._mean(self.before, False), self._mean(self.after, False)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"class": str(c), "n_images": self.n_images[c], "before": v, "after": self.after[c]}
            for c, v in self.before.items()
        ]

    def summary(self) -> str:
        """How many channels were closed, and what that did to the accuracies, in a line."""
        return str(self)

    def __str__(self) -> str:
        text = (
            f"class {self.task}: {self.n_closed:,} of {self.architecture.n_channels:,} channels "
            "closed"
        )
        if not self.before:
            return f"{text}; not measured: give images"
        (own, own_after), (others, others_after) = self.own, self.others
        worst = max(
            (self.before[c] - self.after[c], c)
            for c in self.before
            if c not in ({self.task} if isinstance(self.task, int) else set(self.task))
        )
        return (
            f"{text}; its accuracy {own:.3f} -> {own_after:.3f}, the others' mean {others:.3f} -> "
            f"{others_after:.3f}, at most -{worst[0]:.3f} (class {worst[1]})"
        )


def forget(
    model: nn.Module,
    gates: TaskGates,
    task: Task | str,
    *,
    shared_by: int = 0,
    size: float | None = None,
    data: tuple[Tensor, Tensor] | None = None,
    batch_size: int = 64,
) -> Forgotten:
    """Close the channels that only one class needs, and measure what that costs the others.

    Args:
        model: The network; unchanged.
        gates: Gates of this task and of all others that are to stay: a channel that no task of
            these keeps but this one is closed.
        task: The class to forget.
        shared_by: How many other tasks may keep a channel that is closed all the same.
        size: Share of the channels that counts as needed by each task; None: as learned.
        data: Held-out images and labels (class indices of the network) to measure on.
        batch_size: Images in one pass.

    Raises:
        KeyError: If the gates have no such task.
        ValueError: If there are no other tasks, no channel is the class's own, or images and
            labels do not fit.

    Example:
        >>> from nad_attr import GateSite
        >>> kept = torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.9, 0.9]])
        >>> gates = TaskGates({"1": kept}, [GateSite("1", 3)], [0, 1])
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
        >>> forget(net, gates, 0).architecture["1"].tolist()
        [False, True, True]
    """
    check_eval(model)
    row = gates.index(task)
    if len(gates.tasks) < 2:
        raise ValueError("to tell what only this class needs, the gates must have other tasks too.")
    if isinstance(shared_by, bool) or not isinstance(shared_by, int) or shared_by < 0:
        raise ValueError(f"shared_by must be a number of tasks from 0 on, got {shared_by!r}.")
    archs = gates.sub_architectures(size)
    own = archs[row]
    masks = {}
    for site in gates.sites:
        kept = torch.stack([arch[site.name] for arch in archs])
        others = kept.sum(0) - kept[row].long()
        masks[site.name] = ~(kept[row] & (others <= shared_by))
    _, _, means = own._gating(None)
    rest = SubArchitecture(masks, gates.sites, means=means)
    n_closed = rest.n_channels - rest.n_kept
    if n_closed == 0:
        raise ValueError(
            f"no channel is kept by {task!r} and by at most {shared_by} other tasks: give a "
            "smaller size, or a larger shared_by."
        )
    if data is None:
        return Forgotten(gates.tasks[row], rest, n_closed)
    images, labels = data[0], torch.as_tensor(data[1], device="cpu")
    if len(images) != len(labels) or not len(images):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels.")
    right = _right(model, images, labels, batch_size)
    with rest.applied(model):
        right_after = _right(model, images, labels, batch_size)
    classes = [int(c) for c in labels.unique()]
    return Forgotten(
        gates.tasks[row],
        rest,
        n_closed,
        before={c: float(right[labels == c].float().mean()) for c in classes},
        after={c: float(right_after[labels == c].float().mean()) for c in classes},
        n_images={c: int((labels == c).sum()) for c in classes},
    )


def _right(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> Tensor:
    with torch.no_grad(), unchanged(model), isolated_rng():
        found = [main_output(model(part)).argmax(1).cpu() for part in images.split(batch_size)]  # type: ignore[attr-defined]
    return torch.cat(found) == labels
