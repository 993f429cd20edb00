"""Channels in order of importance for each task, by scores or by learned gates."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nad_attr._checks import check_mapping
from nad_attr.data.labels import Task
from nad_attr.gates.channels import budget, n_gates
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.scoring.baselines import random_scores, top_k
from nad_attr.scoring.scorer import tasks_of
from nad_attr.scoring.variants import Variant
from nad_attr.sites.site import GateSite, check_sites

__all__ = ["SIZES", "Ranking", "Ranks", "as_ranking", "check_sizes", "random_ranking"]

#: A ranking of channels: task gates, scores ``{site name: (T, C)}``, or for each size task gates or
#: a variant of a scorer, as :func:`nad_attr.evaluation.best_variants` chooses it.
Ranks: TypeAlias = (
    "TaskGates | Mapping[float, TaskGates] | Mapping[float, Variant] | Mapping[str, Tensor]"
)

#: Shares of the channels at which methods are compared.
SIZES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)


def check_sizes(sizes: Sequence[float]) -> tuple[float, ...]:
    """Shares of the channels, from small to large.

    Raises:
        TypeError: If they are not a sequence of numbers.
        ValueError: If there is none, one is there twice, or one is not in (0, 1].

    Example:
        >>> check_sizes([0.4, 0.1])
        (0.1, 0.4)
    """
    if isinstance(sizes, (str, bytes, Mapping)) or not isinstance(sizes, (Sequence, np.ndarray)):
        raise TypeError(f"sizes must be a list of shares of the channels, got {sizes!r:.60}.")
    checked = []
    for size in sizes:
        number = isinstance(size, (int, float, np.floating)) and not isinstance(size, bool)
        if not number or not 0 < size <= 1:
            raise ValueError(f"sizes must be shares of the channels in (0, 1], got {size!r}.")
        checked.append(float(size))
    if not checked:
        raise ValueError("sizes is empty; name at least one share of the channels.")
    if len(set(checked)) < len(checked):
        raise ValueError(f"a size is there twice: {checked}.")
    return tuple(sorted(checked))


def ranks_of(gates: TaskGates) -> dict[str, Tensor]:
    """The numbers that rank the channels of task gates: their logits, or the gates themselves."""
    logits = gates.logits
    return {name: gates[name] for name in gates} if logits is None else logits


@dataclass(frozen=True, eq=False)
class Ranking:
    """An order of the channels for each of T tasks.

    Attributes:
        sites: Gate sites in forward order.
        tasks: T class indices or groups of them.
        task_names: T names.
        scores: ``{size: {site name: (T, C)}}``; under the key None those for any other size.
        means: The values of closed channels, under the same keys; None for a key: zero. None for
            all: the ranking does not define them, as scores do not.
        per_site: Under the same keys: whether the share is kept at each site. None: not defined.
        learned: Under the same keys: the task gates that this is the order of.
    """

    sites: tuple[GateSite, ...]
    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    scores: Mapping[float | None, Mapping[str, Tensor]]
    means: Mapping[float | None, Mapping[str, Tensor] | None] | None = None
    per_site: Mapping[float | None, bool] | None = None
    learned: Mapping[float | None, TaskGates] | None = None

    def _key(self, size: float) -> float | None:
        for key in self.scores:
            if key is not None and math.isclose(key, size, rel_tol=1e-9):
                return key
        if None not in self.scores:
            raise ValueError(f"there are no gates for size {size:g}; {self.missing([size])}")
        return None

    def missing(self, sizes: Sequence[float]) -> str:
        """Names the sizes that have no gates; empty if all have."""
        if None in self.scores:
            return ""
        known = [key for key in self.scores if key is not None]
        lacking = [s for s in sizes if not any(math.isclose(s, k, rel_tol=1e-9) for k in known)]
        if not lacking:
            return ""
        listed = ", ".join(f"{size:g}" for size in lacking)
        return f"gates were given for sizes {sorted(known)}, not for {listed}."

    def means_at(self, size: float) -> Mapping[str, Tensor] | None:
        """The values of channels that are closed at this size; None: zero."""
        return None if self.means is None else self.means[self._key(size)]

    def has_constants(self, size: float) -> bool:
        """Whether each task has constants that were learned for this size."""
        if not self.closes_at_constants or self.learned is None:
            return False
        gates = self.learned[self._key(size)]
        if gates.constants is None:
            return False
        kept = [int(arch.n_kept) for arch in gates.sub_architectures()]
        return kept == [budget(size, self.sites)] * len(kept)

    def sub_architectures(
        self, size: float, *, per_site: bool = False, like: Ranking | None = None
    ) -> list[SubArchitecture]:
        """The sub-architectures of the highest-ranked channels, see :func:`top_k`.

        Args:
            size: Share of the channels to keep.
            per_site: At each site, rather than of all channels together, if the ranking does not
                define it.
            like: The ranking whose values of closed channels are used if this one has none.
        """
        teller = like if self.means is None and like is not None else self
        key = self._key(size)
        found = top_k(
            self.scores[key],
            self.sites,
            self.tasks,
            size,
            means=teller.means_at(size),
            per_site=per_site if self.per_site is None else self.per_site[key],
        )
        gates = None if self.learned is None else self.learned[key]
        own = None if gates is None else gates.constants
        if gates is None or own is None:
            return found
        return [
            arch.with_means(
                {name: v[row] for name, v in own.items()},
                own_constants=True,
                fitted_on=gates.fitted_on,
            )
            for row, arch in enumerate(found)
        ]

    @property
    def closes_at_constants(self) -> bool:
        """Whether each task has constants of its own for closed channels."""
        return any(gates.constants is not None for gates in (self.learned or {}).values())

    @property
    def closes_at_means(self) -> bool:
        """Whether closed channels are at their means, and not at zero."""
        return any(mean is not None for mean in (self.means or {}).values())


def as_ranking(
    ranks: Ranks,
    *,
    sites: Sequence[GateSite] | None = None,
    tasks: Sequence[Task] | None = None,
    task_names: Sequence[str] | None = None,
    what: str = "scores_or_gates",
) -> Ranking:
    """The checked order of channels by scores or gates.

    Args:
        ranks: Task gates (ranked by their logits); ``{size: task gates}``, each size learned by
            itself, or ``{size: variant}`` of :func:`best_variants`; or ``{site name: (T, C)}``,
            higher = more important.
        sites: Gate sites in forward order; those of gates have to be these.
        tasks: The T tasks, in the order of the scores' rows; of gates: a selection. None: all of
            the gates'.
        task_names: T names, for display; None: the gates', or the tasks.
        what: Name of ``ranks`` in messages.

    Raises:
        TypeError: If it is something else.
        ValueError: If sites or tasks do not fit, or scores hold NaN.

    Example:
        >>> site = GateSite("layer1", 3, 1)
        >>> scores = {"layer1": torch.tensor([[3.0, 1.0, 2.0]])}
        >>> ranking = as_ranking(scores, sites=[site], tasks=[7])
        >>> ranking.sub_architectures(2 / 3)[0]["layer1"].tolist()
        [True, False, True]
    """
    by_size: dict[float | None, TaskGates] = {}
    variants: dict[float | None, Variant] = {}
    if isinstance(ranks, TaskGates):
        by_size[None] = ranks
    elif isinstance(ranks, Mapping):
        for key, value in ranks.items():
            if isinstance(value, TaskGates):
                by_size[check_sizes([key])[0]] = value  # type: ignore[list-item]
            elif isinstance(value, Variant):
                variants[check_sizes([key])[0]] = value  # type: ignore[list-item]
    if not by_size and not variants:
        return _of_scores(ranks, sites, tasks, task_names, what)
    given: dict[float | None, Any] = {**by_size, **variants}
    if len(given) < len(ranks if isinstance(ranks, Mapping) else given) or (by_size and variants):
        raise TypeError(f"{what} must hold task gates for all sizes, or variants for all sizes.")
    first = next(iter(given.values()))
    rows = list(first.tasks) if tasks is None else tasks_of(torch.empty(0, device="cpu"), tasks)
    wanted = first.sites if sites is None else check_sites(sites)
    for value in given.values():
        if value.sites != wanted:
            raise ValueError(
                f"{what}: gates of sites {[s.name for s in value.sites]} are to be compared at "
                f"sites {[s.name for s in wanted]}."
            )
        lacking = [task for task in rows if task not in value.tasks]
        if lacking:
            raise ValueError(f"{what} has no task {lacking[0]}; it has {value.tasks}.")
    if variants:
        at = {key: [v.tasks.index(task) for task in rows] for key, v in variants.items()}
        return Ranking(
            first.sites,
            tuple(rows),
            _names(task_names, rows),
            {
                key: {name: score[at[key]] for name, score in variant.scores.items()}
                for key, variant in variants.items()
            },
            per_site={key: variant.per_site for key, variant in variants.items()},
        )
    chosen = {key: gates.select(rows) for key, gates in by_size.items()}
    names = next(iter(chosen.values())).task_names if task_names is None else task_names
    return Ranking(
        first.sites,
        tuple(rows),
        _names(names, rows),
        {key: ranks_of(gates) for key, gates in chosen.items()},
        {key: gates.means for key, gates in chosen.items()},
        learned=chosen,
    )


def _names(names: Sequence[str] | None, tasks: Sequence[Task]) -> tuple[str, ...]:
    if names is None:
        return tuple(str(task) for task in tasks)
    if isinstance(names, str) or len(names) != len(tasks):
        raise ValueError(f"task_names must be {len(tasks)} names, got {names!r:.80}.")
    return tuple(str(name) for name in names)


def _of_scores(
    scores: Any,
    sites: Sequence[GateSite] | None,
    tasks: Sequence[Task] | None,
    task_names: Sequence[str] | None,
    what: str,
) -> Ranking:
    check_mapping(scores, what)
    if not scores:
        raise ValueError(f"{what} is empty.")
    if sites is None or tasks is None:
        raise ValueError(
            f"{what}: scores need sites= and tasks=, which say what their entries, rows and "
            "columns are; task gates bring theirs."
        )
    rows = tasks_of(torch.empty(0, device="cpu"), tasks)
    try:
        top_k(scores, sites, rows, 1.0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{what}: {error}") from None
    kept = {site.name: scores[site.name].detach().cpu() for site in sites}
    return Ranking(tuple(sites), tuple(rows), _names(task_names, rows), {None: kept})


def random_ranking(like: Ranking, seed: int, draw: int) -> Ranking:
    """A random order of the channels for each task, at the sites and for the tasks of another.

    A task's order is a function of seed, draw and task: not of the other tasks, nor of the size.

    Example:
        >>> scores = {"layer1": torch.tensor([[3.0, 1.0, 2.0]])}
        >>> ranking = as_ranking(scores, sites=[GateSite("layer1", 3, 1)], tasks=[7])
        >>> random_ranking(ranking, seed=0, draw=1).scores[None]["layer1"].shape
        torch.Size([1, 3])
    """
    scores = random_scores(like.sites, like.tasks, "random ranking", seed, draw)
    return Ranking(like.sites, like.tasks, like.task_names, {None: scores})


def kept_share(size: float, sites: Sequence[GateSite], *, per_site: bool) -> float:
    """The exact share of channels that a size keeps: budgets are whole channels, at least one."""
    groups = [[site] for site in sites] if per_site else [list(sites)]
    kept = sum(budget(size, group) for group in groups)
    return kept / n_gates(sites)


def kept_shares(
    sizes: Sequence[float], sites: Sequence[GateSite], *, per_site: bool
) -> NDArray[np.float64]:
    """:func:`kept_share` of each size, (S,)."""
    return np.array([kept_share(size, sites, per_site=per_site) for size in sizes])
