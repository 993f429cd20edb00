"""Scorers that return given scores: gates, or any others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nad_attr.data.labels import Task, first_tasks
from nad_attr.data.sources import Source
from nad_attr.gates.channels import to_channels, to_gates
from nad_attr.gates.task_gates import TaskGates
from nad_attr.running.forward import Runner
from nad_attr.scoring.baselines import check_scores
from nad_attr.scoring.rankings import ranks_of
from nad_attr.scoring.scorer import Scores, TaskScorer
from nad_attr.sites.site import GateSite, check_sites
from nad_attr.system.rng import seed_of

__all__ = ["GatesScorer", "GivenScorer", "OtherTaskScorer", "shuffled"]


class GivenScorer(TaskScorer):
    """Scores from elsewhere, returned by task.

    For example the IoU of each channel with the class's concept from Network Dissection, or any
    file of numbers.

    Args:
        scores: ``{site name: (T, C)}``, higher = more important.
        sites: Gate sites in forward order.
        tasks: The T tasks, in the order of the scores' rows.
        model: The network, to check that it has the sites; needed if sub-architectures of the
            scores are run (:func:`~nad_attr.evaluation.best_variant`).

    Raises:
        SiteError: If the network has no such site.
        TypeError: If scores are no ``{site name: tensor}``.
        ValueError: If scores, sites and tasks do not fit, or scores hold NaN. Called: if there are
            no scores for a task.

    Example:
        >>> scores = {"a": torch.tensor([[0.1, 0.7], [0.5, 0.0]])}
        >>> scorer = GivenScorer(scores, [GateSite("a", 2, 1)], [3, 8])
        >>> scorer(torch.zeros(1, 1), torch.tensor([8]))
        {'a': tensor([[0.5000, 0.0000]])}
    """

    def __init__(
        self,
        scores: Mapping[str, Tensor],
        sites: Sequence[GateSite],
        tasks: Sequence[Task],
        *,
        model: nn.Module | None = None,
    ) -> None:
        if model is None:
            self.model = nn.Identity().eval()
            self.sites = check_sites(sites)
            if not self.sites:
                raise ValueError("there is no gate site to score the channels of.")
        else:
            super().__init__(model, sites)
        self.tasks = tuple(check_scores(scores, self.sites, tasks))
        self._scores = {
            site.name: scores[site.name].detach().cpu().double().clone() for site in self.sites
        }

    def task_scores(self, runner: Runner, source: Source, tasks: Sequence[Task]) -> Scores:
        """The tasks' rows."""
        for task in tasks:
            if task not in self.tasks:
                known = first_tasks(self.tasks)
                raise ValueError(f"there are no scores for task {task}, only for {known}.")
        rows = [self.tasks.index(task) for task in tasks]
        return {name: score[rows] for name, score in self._scores.items()}


class GatesScorer(GivenScorer):
    """Learned task gates as scores, to compare them with rivals.

    The scores are the gates' logits, which rank all channels, or the gates themselves if there are
    no logits. :func:`~nad_attr.evaluation.top_k` makes the same sub-architectures of them as
    ``TaskGates.sub_architecture(task, size)``.

    Args:
        gates: Task gates.
        model: As for :class:`GivenScorer`.

    Example:
        >>> gates = TaskGates({"a": torch.tensor([[0.9, 0.2]])}, [GateSite("a", 2, 1)], [7])
        >>> GatesScorer(gates)(torch.zeros(1, 1), torch.tensor([7]))
        {'a': tensor([[0.9000, 0.2000]])}
    """

    def __init__(self, gates: TaskGates, *, model: nn.Module | None = None) -> None:
        super().__init__(_ranks(gates), gates.sites, gates.tasks, model=model)


class OtherTaskScorer(GivenScorer):
    """The gates of another task in place of each task's own.

    The remaining result does not depend on the class: it shows which channels any class needs. The
    other task is the next one of the gates' tasks (the first for the last), or with a seed the next
    one in a random order; never the task itself.

    Args:
        gates: Task gates of at least two tasks.
        seed: None: in the gates' order.
        model: As for :class:`GivenScorer`.

    Attributes:
        other: ``{task: the task whose gates it gets}``.

    Raises:
        TypeError: If they are not task gates.
        ValueError: If there is only one task.

    Example:
        >>> gates = TaskGates(
        ...     {"a": torch.tensor([[0.9, 0.2], [0.4, 0.6]])}, [GateSite("a", 2, 1)], [7, 8]
        ... )
        >>> OtherTaskScorer(gates)(torch.zeros(1, 1), torch.tensor([7]))
        {'a': tensor([[0.4000, 0.6000]])}
    """

    def __init__(
        self, gates: TaskGates, *, seed: int | None = None, model: nn.Module | None = None
    ) -> None:
        ranks = _ranks(gates)
        n = len(gates.tasks)
        if n < 2:
            raise ValueError("another task's gates need gates of at least two tasks.")
        order = torch.arange(n, device="cpu")
        if seed is not None:
            generator = torch.Generator().manual_seed(seed_of("OtherTaskScorer", seed))
            order = torch.randperm(n, generator=generator, device="cpu")
        # Each one's next in a circle through all of them.
        rows = torch.empty_like(order)
        rows[order] = order.roll(-1)
        moved = {name: rank[rows] for name, rank in ranks.items()}
        super().__init__(moved, gates.sites, gates.tasks, model=model)
        self.other: dict[Task, Task] = {
            task: gates.tasks[row] for task, row in zip(gates.tasks, rows.tolist(), strict=True)
        }


def _reordered(values: Tensor, order: Tensor, site: GateSite) -> Tensor:
    """Values of gates in another order: (T, C)."""
    return to_channels(to_gates(values, [site], mean=True).gather(1, order), [site])


def shuffled(gates: TaskGates, *, seed: int = 0) -> TaskGates:
    """The same gates on other channels: each task's gates of each site in a random order.

    Only the number of channels of each task at each site stays. A task's order depends on the seed,
    the task and the site alone.

    Args:
        gates: Task gates; unchanged.
        seed: Another order for each seed.

    Returns:
        Gates (and logits, in the same order) of the same sites and tasks.

    Raises:
        TypeError: If they are not task gates.

    Example:
        >>> gates = TaskGates({"a": torch.tensor([[0.9, 0.2, 0.4]])}, [GateSite("a", 3, 1)], [7])
        >>> shuffled(gates)["a"].sort().values
        tensor([[0.2000, 0.4000, 0.9000]])
    """
    _check_gates(gates)
    logits = gates.logits
    new_gates, new_logits = {}, {}
    for site in gates.sites:
        orders = []
        for task in gates.tasks:
            generator = torch.Generator().manual_seed(seed_of("shuffled", seed, task, site.name))
            orders.append(torch.randperm(site.n_gates, generator=generator, device="cpu"))
        order = torch.stack(orders)
        new_gates[site.name] = _reordered(gates[site.name], order, site)
        if logits is not None:
            new_logits[site.name] = _reordered(logits[site.name], order, site)
    return TaskGates(
        new_gates,
        gates.sites,
        gates.tasks,
        logits=None if logits is None else new_logits,
        means=gates.means,
        recipe=gates.recipe,
        task_names=gates.task_names,
        info={**gates.info, "shuffled": seed},
    )


def _check_gates(gates: object) -> None:
    if not isinstance(gates, TaskGates):
        raise TypeError(f"gates must be TaskGates, got {type(gates).__name__}.")


def _ranks(gates: TaskGates) -> dict[str, Tensor]:
    _check_gates(gates)
    return ranks_of(gates)
