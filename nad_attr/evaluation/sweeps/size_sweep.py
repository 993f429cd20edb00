"""Can a network be divided? Every measure at every size, method by method.

This is the paper's first question. A network is divided if a small part of it does for its task
what the whole network does (own AUC, fidelity), says nothing about the others (other AUC), and if
learned gates find such a part where simpler rankings and random channels of the same size do not.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from nad_attr._checks import check_count, check_mapping
from nad_attr.data.labels import Task
from nad_attr.data.sources import Data, as_source
from nad_attr.evaluation.ablation import Ablation
from nad_attr.evaluation.sweeps.curves import closed_at
from nad_attr.evaluation.sweeps.grid import (
    OPTIMAL,
    check_measure,
    fitted,
    fitted_on,
    measure_grid,
    own_constants,
    recipe_of,
)
from nad_attr.gates.sub_architecture import SubArchitecture, fitting
from nad_attr.gates.task_gates import TaskGates
from nad_attr.running.options import RunOptions
from nad_attr.scoring.baselines import EnergyScorer, NeuronMCTScorer, TaylorScorer
from nad_attr.scoring.rankings import (
    SIZES,
    Ranks,
    as_ranking,
    check_sizes,
    kept_shares,
    random_ranking,
)
from nad_attr.scoring.scorer import ChannelScorer
from nad_attr.sites.site import GateSite
from nad_attr.stats.measure_table import MEASURE_TABLE, p_against
from nad_attr.stats.p_values import least_p
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, intervals, nan_mean, number, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["SizeSweep", "size_sweep"]


#: The name of random channels among the methods.
RANDOM = "random"

#: What the figure shows, a panel each.
PANELS = (
    "own_auc",
    "other_auc",
    "disentanglement",
    "fidelity",
    "rank_fidelity",
    "recall",
    "fpr",
    "ba",
)


@dataclass(frozen=True, eq=False, repr=False)
class SizeSweep(Result):
    """Measures of M methods at S sizes for T tasks, beside random channels and the whole network.

    Made by :func:`size_sweep`.

    Attributes:
        tasks: T class indices or groups of them.
        task_names: T names.
        n_images: Images that were measured.
        sizes: (S,), share of the channels that is really kept: budgets are whole channels.
        requested: S sizes as asked for.
        per_site: The share is kept at each site, not of all channels together.
        ablation: What replaces closed channels.
        fitted_on: With "optimal": how many images the constants were fitted on, if known.
        methods: Names of the M methods, baselines last.
        baselines: Which of them are baselines.
        measured: ``{method: {measure: (S, T)}}``.
        random: ``{measure: (D, S, T)}``, D random orders of the channels.
        whole: ``{measure: (T,)}``, the whole network.
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    n_images: int
    sizes: FloatArray
    requested: tuple[float, ...]
    per_site: bool
    ablation: str
    methods: tuple[str, ...]
    baselines: tuple[str, ...]
    measured: Mapping[str, Mapping[str, FloatArray]]
    random: Mapping[str, FloatArray]
    whole: Mapping[str, FloatArray]
    fitted_on: int | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that there are."""
        return tuple(self.whole)

    @property
    def n_random(self) -> int:
        """Random draws at each size."""
        return len(next(iter(self.random.values()))) if self.random else 0

    def values(self, method: str, measure: str) -> FloatArray:
        """A measure of a method, (S, T); of ``"random"``, the mean over its draws.

        Raises:
            ValueError: If there is no such method or measure.
        """
        check_measure(measure, self.whole)
        if method == RANDOM and self.n_random:
            return nan_mean(self.random[measure])
        if method not in self.measured:
            known = [*self.methods, *([RANDOM] if self.n_random else [])]
            raise ValueError(f"no method {method!r}; there are {', '.join(known)}.")
        return self.measured[method][measure].copy()

    def mean(self, method: str, measure: str) -> FloatArray:
        """Mean over the tasks for which it is known, (S,).

        Raises:
            ValueError: If there is no such method or measure.
        """
        return nan_mean(self.values(method, measure).T)

    def interval(
        self, method: str, measure: str, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
    ) -> tuple[FloatArray, FloatArray]:
        """Bootstrap interval of the mean over tasks, (S,) each; NaN with less than two tasks.

        Args:
            method: One of ``methods``, or ``"random"``.
            measure: One of ``measures``.
            level: Coverage, at each size by itself.
            n_draws: Times that T tasks are drawn with replacement.
            seed: Of the draws; the global random state is not used.

        Raises:
            ValueError: If an argument makes no sense.
        """
        return intervals(self.values(method, measure).T, level, n_draws, seed)

    def difference(
        self,
        method: str,
        rival: str,
        measure: str,
        *,
        level: float = 0.95,
        n_draws: int = 2000,
        seed: int = 0,
    ) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Mean over tasks of method minus rival, task by task, with its bootstrap interval.

        An interval above 0 (below 0 for measures of which less is better) says that the method
        wins by more than the choice of tasks explains.

        Args:
            method: One of ``methods``, or ``"random"``.
            rival: Another.
            measure: One of ``measures``.
            level: See :meth:`interval`.
            n_draws: See :meth:`interval`.
            seed: See :meth:`interval`.

        Returns:
            Mean, lower and upper end, (S,) each.

        Raises:
            ValueError: If an argument makes no sense.
        """
        pairs = (self.values(method, measure) - self.values(rival, measure)).T
        low, high = intervals(pairs, level, n_draws, seed)
        return nan_mean(pairs), low, high

    def p_value(self, method: str, measure: str, *, per_task: bool = False) -> FloatArray:
        """How often random channels of the same size do as well.

        ``(1 + number of draws that reach the method's value) / (draws + 1)``, where less is better
        (``"fpr"``, ``"other_auc"``) draws that are as low: n draws give 1 / (n + 1) at best. NaN
        where neither way is better (``"other_accuracy"``).

        Args:
            method: One of ``methods``.
            measure: One of ``measures``.
            per_task: For each task by itself, rather than for the mean over tasks.

        Returns:
            (S,), or (S, T); NaN without draws or where the measure is not known.

        Raises:
            ValueError: If there is no such method or measure.
        """
        observed = self.values(method, measure)
        draws = self.random[measure] if self.n_random else np.empty((0, *observed.shape))
        if not per_task:
            observed = nan_mean(observed.T)
            draws = np.array([nan_mean(draw.T) for draw in draws]).reshape(-1, len(observed))
        return np.asarray(p_against(measure, observed, np.moveaxis(draws, 0, -1)))

    def frame(self) -> pd.DataFrame:
        """One row per method, size and task (and draw), one column per measure, for pandas.

        Columns ``method``, ``draw`` (of random channels; 0 for all others), ``requested`` and
        ``size``, ``task``, ``name``, and the measures. The whole network is the method
        ``"whole network"`` of size 1.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("SizeSweep.frame()")
        parts: list[tuple[str, int, Mapping[str, FloatArray]]] = [
            (method, 0, self.measured[method]) for method in self.methods
        ]
        for draw in range(self.n_random):
            parts.append((RANDOM, draw, {m: v[draw] for m, v in self.random.items()}))
        n_sizes, n_tasks = len(self.sizes), len(self.tasks)
        frames = [
            self._rows(pd, method, draw, self.requested, self.sizes, values)
            for method, draw, values in parts
            if n_sizes and n_tasks
        ]
        whole = {measure: values[None] for measure, values in self.whole.items()}
        frames.append(self._rows(pd, "whole network", 0, (1.0,), np.ones(1), whole))
        return pd.concat(frames, ignore_index=True)

    def _rows(
        self,
        pd: Any,
        method: str,
        draw: int,
        requested: Sequence[float],
        sizes: FloatArray,
        values: Mapping[str, FloatArray],
    ) -> Any:
        n_tasks = len(self.tasks)
        columns: dict[str, Any] = {
            "method": method,
            "draw": draw,
            "requested": np.repeat(requested, n_tasks),
            "size": np.repeat(sizes, n_tasks),
            "task": list(self.tasks) * len(sizes),
            "name": list(self.task_names) * len(sizes),
        }
        return pd.DataFrame(columns | {m: v.ravel() for m, v in values.items()})

    def summary(self, sizes: Sequence[float] | None = None) -> str:
        """Tables as plain text, one for each size: methods, random channels, the whole network.

        Args:
            sizes: Those of ``requested`` to show; None: all.

        Raises:
            ValueError: If a size was not measured.
        """
        wanted = self.requested if sizes is None else check_sizes(sizes)
        heads = {m: MEASURE_TABLE[m].head for m in PANELS if m in self.whole}
        names = [*self.methods, *([RANDOM] if self.n_random else [])]
        how = "at each site" if self.per_site else "over all sites"
        lines = [
            f"{len(self.tasks)} task(s) on {self.n_images} images, share kept {how}, closed "
            f"channels: {self.ablation}{fitting(self.fitted_on)}; p against {self.n_random} random "
            f"draws (least possible {least_p(self.n_random):.3g})"
        ]
        for size in wanted:
            if size not in self.requested:
                raise ValueError(f"size {size:g} was not measured; there are {self.requested}.")
            i = self.requested.index(size)
            rows = [[f"size {self.sizes[i]:.3g}", "own AUC 95 %", "p", *heads.values()]]
            for name in names:
                low, high = (end[i] for end in self.interval(name, "own_auc"))
                p = np.nan if name == RANDOM else self.p_value(name, "own_auc")[i]
                cells = [number(self.mean(name, measure)[i]) for measure in heads]
                rows.append([name, f"{number(low)} to {number(high)}", number(p), *cells])
            whole = [number(float(nan_mean(self.whole[measure]))) for measure in heads]
            rows.append(["whole network", "", "", *whole])
            lines += ["", *table(rows)]
        return "\n".join(map(shown, lines))

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"tasks": "T", "task_names": "T", "sizes": "S", "requested": "S"},
        **{"measured": "S T", "random": "D S T", "whole": "T"},
    }

    def _derived(self) -> dict[str, Any]:
        names = [*self.methods, *([RANDOM] if self.n_random else [])]
        means: dict[str, Any] = {}
        for name, measure in product(names, self.measures):
            means.setdefault(name, {})[measure] = {
                "mean": self.mean(name, measure),
                "interval_95": np.stack(self.interval(name, measure), axis=1),
                **({"p": self.p_value(name, measure)} if name != RANDOM else {}),
            }
        return {"means": means, "p_least": least_p(self.n_random) if self.n_random else None}

    def plot(
        self,
        measures: Sequence[str] | None = None,
        *,
        log: bool = True,
        columns: int = 4,
        axes: Any = None,
    ) -> Figure:
        """One panel per measure: size against it, a line per method, the whole network dashed.

        Bands are 95 % bootstrap intervals over tasks; that of random channels is the range that
        holds 95 % of the draws' means.

        Args:
            measures: Some of ``measures``; None: the eight that the summary shows.
            log: Draw sizes on a logarithmic axis.
            columns: Panels side by side.
            axes: As many matplotlib Axes as measures, to draw into; None: a new figure.

        Returns:
            A matplotlib figure, not shown.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such measure, or the axes are not as many.
        """
        from nad_attr.evaluation.figures.size_sweep import plot_size_sweep

        chosen = [m for m in PANELS if m in self.whole] if measures is None else list(measures)
        for measure in chosen:
            check_measure(measure, self.whole)
        return plot_size_sweep(self, chosen, log=log, columns=columns, axes=axes)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size:.3g}" for size in self.sizes)
        return (
            f"SizeSweep({len(self.tasks)} tasks, methods {', '.join(self.methods)}, sizes {sizes}, "
            f"{self.n_random} random draws)"
        )


def _gates_of(ranks: object) -> TaskGates | None:
    """The task gates, or the first of them where there are some for each size."""
    if isinstance(ranks, Mapping) and ranks:
        ranks = next(iter(ranks.values()))
    return ranks if isinstance(ranks, TaskGates) else None


#: The default baselines; a method of the same name replaces one.
_STANDARD: Mapping[str, Callable[..., ChannelScorer]] = {
    "energy": EnergyScorer,
    "Taylor": TaylorScorer,
    "NeuronMCT": NeuronMCTScorer,
}


def size_sweep(
    model: nn.Module,
    methods: Mapping[str, Ranks | ChannelScorer],
    data: Data,
    *,
    train_data: Data | None = None,
    baselines: Mapping[str, Ranks | ChannelScorer] | None = None,
    sites: Sequence[GateSite] | None = None,
    tasks: Sequence[Task] | None = None,
    task_names: Sequence[str] | None = None,
    sizes: Sequence[float] = SIZES,
    per_site: bool = False,
    ablation: Ablation | str | None = None,
    n_random: int = 19,
    seed: int = 0,
    others: bool = True,
    run: RunOptions | None = None,
) -> SizeSweep:
    """Can the network be divided, and does a method find where? Size against every measure.

    All methods keep exactly the same number of channels at each size, close the others in the same
    way, and are measured on the same images.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        methods: ``{name: task gates}``; ``{name: {size: task gates}}`` where each size was learned
            by itself; ``{name: {size: variant}}``, a rival at its best as
            :func:`nad_attr.evaluation.best_variants` finds it, which may differ in ``per_site``
            (and so by a few channels in size); ``{name: scores}``, ``{site name: (T, C)}``, higher
            = more important; or ``{name: channel scorer}``, which is asked on ``train_data``.
        data: Held-out images, that nothing was learned on: ``(inputs, labels)`` tensors, a Dataset
            of (input, label) or a DataLoader.
        train_data: Images for scorers and for a named ablation.
        baselines: Methods to compare with, in the same forms. None: energy, Taylor and NeuronMCT
            over own images, if there is ``train_data``; ``{}``: none.
        sites: Gate sites in forward order. None: those of the first task gates.
        tasks: The T tasks, in the order of scores' rows. None: those of the first task gates.
        task_names: T names, for display.
        sizes: Shares of the channels, in (0, 1].
        per_site: Keep this share at each site, rather than of all channels together.
        ablation: What replaces closed channels, as in :func:`nad_attr.evaluation.curves`.
            "optimal" fits constants for each method, size and task, and for random orders, with as
            many images and passes as the first task gates' recipe says. None: what the first task
            gates were learned with, also for scores; zero without gates. Gates keep constants of
            their own then, and a warning says so if others have none.
        n_random: Random orders of the channels, for p-values: n give p = 1 / (n + 1) at best.
        seed: Of the random orders.
        others: Measure the outputs of the other tasks as well (other AUC, disentanglement), which
            keeps T times more answers.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The measures. A task without own images in the data gets NaN and a warning.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, methods, sites, tasks and sizes do not fit, a
            scorer has no ``train_data``, gates of some methods close channels at zero and of
            others at their means, or labels or tasks are not a class of the network.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> data = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), [0, 0, 1, 1]
        >>> ranks = {"right": {"0": torch.eye(2)}, "wrong": {"0": 1 - torch.eye(2)}}
        >>> result = size_sweep(net, ranks, data, sites=[GateSite("0", 2, 1)], tasks=[0, 1],
        ...                  sizes=[0.5], n_random=9)
        >>> result.mean("right", "own_auc"), result.mean("wrong", "own_auc")
        (array([1.]), array([0.5]))
        >>> result.difference("right", "wrong", "own_auc")[0]
        array([0.5])
    """
    shares = check_sizes(sizes)
    check_count(n_random, "n_random", least=0)
    check_mapping(methods, "methods")
    if not methods:
        raise ValueError("methods is empty; name at least one.")
    first = next((gates for m in methods.values() if (gates := _gates_of(m)) is not None), None)
    if first is not None:
        sites = first.sites if sites is None else sites
        tasks = list(first.tasks) if tasks is None else tasks
        if task_names is None and list(tasks) == list(first.tasks):
            task_names = first.task_names
    if sites is None or tasks is None:
        raise ValueError(
            "scores and scorers need sites= and tasks=, unless one of the methods is task gates."
        )
    if baselines is None:
        standard = {} if train_data is None else _STANDARD
        baselines = {
            name: new(model, sites) for name, new in standard.items() if name not in methods
        }
    check_mapping(baselines, "baselines")
    named: dict[str, Ranks | ChannelScorer] = {**methods, **baselines}
    for name in named:
        if not isinstance(name, str) or name in (RANDOM, "whole network"):
            raise ValueError(f"a method cannot be called {name!r}; give it another name.")
    if len(named) < len(methods) + len(baselines):
        raise ValueError("a method and a baseline have the same name.")
    scoring = [name for name, ranks in named.items() if isinstance(ranks, ChannelScorer)]
    if scoring and train_data is None:
        raise ValueError(f"{scoring[0]!r} is a scorer: it needs train_data=, images to score on.")

    # Everything given is checked before any network runs.
    found = {
        name: as_ranking(ranks, sites=sites, tasks=tasks, task_names=task_names, what=repr(name))
        for name, ranks in named.items()
        if not isinstance(ranks, ChannelScorer)
    }
    for name, ranking in found.items():
        if lacking := ranking.missing(shares):
            raise ValueError(f"{name!r}: {lacking}")
    gated = [name for name, ranks in named.items() if _gates_of(ranks) is not None]
    if ablation is None and len({found[name].closes_at_means for name in gated}) > 1:
        raise ValueError(
            "some gates close channels at zero and others at their means; say ablation=, so that "
            "all methods are measured alike."
        )
    optimal = ablation == OPTIMAL
    with_constants = [name for name in gated if found[name].closes_at_constants]
    if ablation is None and with_constants and (len(with_constants) < len(named) or n_random):
        warnings.warn(
            f"{with_constants[0]!r} has the best constants in place of its closed channels, and "
            "others have means: that favours it. Give ablation='optimal' and train_data= for "
            "constants of each method's own, or ablation='mean' for means throughout.",
            stacklevel=2,
        )
    prepared = fitted(model, sites, tasks, None if optimal else ablation, train_data, run)
    train = as_source(train_data, any_labels=True) if scoring else None
    for name in scoring:
        scorer = named[name]
        assert isinstance(scorer, ChannelScorer)
        scores = scorer(train, tasks=tasks, run=run)
        found[name] = as_ranking(
            scores, sites=sites, tasks=tasks, task_names=task_names, what=repr(name)
        )

    like = found[gated[0]] if gated else next(iter(found.values()))
    draws = [random_ranking(like, seed, draw) for draw in range(n_random)]
    groups: list[list[SubArchitecture]] = []
    known: list[bool] = []
    for ranking in [*(found[name] for name in named), *draws]:
        for share in shares:
            groups.append(ranking.sub_architectures(share, per_site=per_site, like=like))
            known.append(ranking.has_constants(share))
    if optimal:
        recipe = recipe_of(named[gated[0]]) if gated else None
        groups = own_constants(model, groups, train_data, known, recipe, run)
    grid = measure_grid(model, groups, data, ablation=prepared, others=others, run=run)
    n, n_named = len(shares), len(named)
    blocks = {
        measure: values.reshape(n_named + n_random, n, len(like.tasks))
        for measure, values in grid.values.items()
    }
    return SizeSweep(
        tasks=like.tasks,
        task_names=like.task_names,
        n_images=grid.n_images,
        sizes=kept_shares(shares, like.sites, per_site=per_site),
        requested=shares,
        per_site=per_site,
        ablation=OPTIMAL if optimal else closed_at(prepared, like),
        methods=tuple(named),
        baselines=tuple(baselines),
        measured={
            name: {measure: values[i].copy() for measure, values in blocks.items()}
            for i, name in enumerate(named)
        },
        random={m: values[n_named:].copy() for m, values in blocks.items()} if n_random else {},
        whole=grid.whole,
        fitted_on=fitted_on(groups) if prepared is None else None,
    )
