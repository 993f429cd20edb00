"""Bootstrap intervals of differences between two methods, task by task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nad_attr.stats.bootstrap import bootstrap_interval

if TYPE_CHECKING:
    from nad_attr.evaluation.result import Evaluation

__all__ = ["bootstrap_interval", "paired_interval"]


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
        Lower and upper end; above 0 (where less is better, as for FPR: below 0), a is better
        beyond chance in which tasks (and seeds) there are. NaN with fewer than two tasks that both
        know.

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
