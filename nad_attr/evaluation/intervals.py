"""Bootstrap intervals of means over tasks, and of differences between two methods."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from nad_attr.evaluation.result import Evaluation

__all__ = ["bootstrap_interval", "paired_interval"]

FloatArray: TypeAlias = "NDArray[np.float64]"


def bootstrap_interval(
    values: FloatArray, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Bootstrap interval of a mean over tasks (percentiles of the means of resampled tasks).

    With several seeds, tasks are drawn first and then, for each task drawn, as many seeds as there
    are: tasks are what differs most, and seeds of one task are not independent of it.

    Args:
        values: (T,), one value per task, or (S, T), one per seed and task. NaN is left out: a task
            counts with the seeds that are known, and not at all without.
        level: Coverage.
        n_draws: Times that tasks are drawn with replacement.
        seed: Of the draws; the global random state is not used.

    Returns:
        Lower and upper end; NaN with fewer than two known tasks.

    Raises:
        ValueError: If an argument makes no sense.

    Example:
        >>> import numpy as np
        >>> bootstrap_interval(np.array([1.0, 1.0, 1.0]))
        (1.0, 1.0)
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, not {level!r}.")
    if isinstance(n_draws, bool) or not isinstance(n_draws, int) or n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, not {n_draws!r}.")
    table = np.asarray(values, dtype=np.float64)
    if table.ndim not in (1, 2):
        raise ValueError(f"values must be (tasks,) or (seeds, tasks), not {table.shape}.")
    table = np.atleast_2d(table)
    known = ~np.isnan(table)
    tasks = np.flatnonzero(known.any(0))
    if len(tasks) < 2:
        return math.nan, math.nan
    table, known = table[:, tasks], known[:, tasks]
    generator = np.random.default_rng(seed)
    n_seeds, n_tasks = table.shape
    # Known seeds of each task come first, so that one is drawn by its place among them.
    order = np.argsort(~known, axis=0, kind="stable")
    counts = known.sum(0)
    drawn = generator.integers(n_tasks, size=(n_draws, n_tasks))
    if n_seeds == 1:
        means = table[0][drawn].mean(1)
    else:
        total = np.zeros(n_draws)
        for _ in range(n_seeds):
            place = np.floor(generator.random(drawn.shape) * counts[drawn]).astype(np.int64)
            total += table[order[place, drawn], drawn].mean(1)
        means = total / n_seeds
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(ends[0]), float(ends[1])


def paired_interval(
    a: Evaluation | Sequence[Evaluation],
    b: Evaluation | Sequence[Evaluation],
    measure: str,
    *,
    level: float = 0.95,
    n_draws: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Bootstrap interval of the mean difference a - b of a measure, task by task.

    Both are measured on the same tasks, so what makes a task hard drops out.

    Args:
        a: The result of one method, or one for each of S seeds.
        b: The result of another on the same tasks, as many.
        measure: One of :data:`nad_attr.evaluation.MEASURES`.
        level: Coverage.
        n_draws: Times that tasks (and, within a task, seeds) are drawn with replacement.
        seed: Of the draws; the global random state is not used.

    Returns:
        Lower and upper end; above 0, a is better beyond chance in which tasks (and seeds) there
        are. NaN with fewer than two tasks that both know.

    Raises:
        ValueError: If there is no such measure, a and b are not equally many, or of other tasks.

    Example:
        >>> import torch
        >>> from nad_attr import GateSite, SubArchitecture
        >>> from nad_attr.evaluation import evaluate
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> data, sites = (torch.eye(2), torch.tensor([0, 1])), [GateSite("0", 2, 1)]
        >>> def result(*kept):
        ...     pairs = enumerate(kept)
        ...     archs = [SubArchitecture.from_kept({"0": [c]}, sites, task=k) for k, c in pairs]
        ...     return evaluate(net, archs, data)
        >>> paired_interval(result(0, 1), result(1, 0), "own_auc")
        (0.5, 0.5)
    """
    first, second = _listed(a), _listed(b)
    if not first or len(first) != len(second):
        raise ValueError(
            f"a and b must be pairs: {len(first)} result(s) came with {len(second)} of the other."
        )
    tasks = first[0].tasks
    for result in (*first, *second):
        if result.tasks != tasks:
            raise ValueError(
                f"the results are of different tasks, {list(tasks[:5])} and "
                f"{list(result.tasks[:5])}; pair results of the same tasks in the same order."
            )
    differences = np.stack(
        [x.values(measure) - y.values(measure) for x, y in zip(first, second, strict=True)]
    )
    return bootstrap_interval(differences, level=level, n_draws=n_draws, seed=seed)


def _listed(results: Evaluation | Sequence[Evaluation]) -> list[Evaluation]:
    return list(results) if isinstance(results, Sequence) else [results]
