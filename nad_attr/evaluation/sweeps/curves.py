"""Keep and ablate curves: the top channels alone, and the network without them.

S(p) keeps the top share p of the channels, N(p) removes it. A good ranking has S high and N low
from small p on: delta is the area between the two.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import ArrayLike
from torch import nn

from nad_attr.data.labels import Task
from nad_attr.data.sources import Data
from nad_attr.evaluation.ablation import Ablation
from nad_attr.evaluation.sweeps.grid import (
    OF_OTHERS,
    OPTIMAL,
    check_measure,
    fitted,
    fitted_on,
    measure_grid,
    own_constants,
    recipe_of,
)
from nad_attr.gates.sub_architecture import SubArchitecture, fitting
from nad_attr.running.options import RunOptions
from nad_attr.scoring.rankings import SIZES, Ranking, Ranks, as_ranking, check_sizes
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, intervals, nan_mean, number, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "MIB_SIZES",
    "Curves",
    "area_under",
    "circuit_areas",
    "completeness",
    "curves",
    "faithfulness",
]


#: What :meth:`Curves.values` knows: two measured curves, and the same two on a common scale.
KINDS = ("keep", "ablate", "faithfulness", "completeness")

#: Sizes at which MIB draws its curves; see :func:`circuit_areas`.
MIB_SIZES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)

#: A measure that differs by less between the whole and the empty network is the same for both.
MIN_DIFFERENCE = 1e-9


def area_under(sizes: ArrayLike, values: ArrayLike) -> FloatArray:
    """Area under a curve by the trapezoid rule, divided by the range of sizes: a mean height.

    Args:
        sizes: (S,), not falling.
        values: (..., S).

    Returns:
        float64 (...); NaN where a value is.

    Raises:
        ValueError: If shapes do not fit, sizes fall, or span nothing.

    Example:
        >>> area_under([0.0, 0.5, 1.0], [0.0, 1.0, 1.0]).item()
        0.75
    """
    x, y = np.asarray(sizes, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if x.ndim != 1 or y.ndim < 1 or y.shape[-1] != len(x):
        raise ValueError(f"sizes of shape {x.shape} and values of shape {y.shape} do not fit.")
    widths = np.diff(x)
    if len(x) < 2 or not (widths >= 0).all() or x[-1] == x[0]:
        raise ValueError(f"sizes must rise, got {x.tolist()}.")
    area = (widths * (y[..., 1:] + y[..., :-1]) / 2).sum(-1) / (x[-1] - x[0])
    return np.asarray(area)


def faithfulness(values: ArrayLike, empty: ArrayLike, full: ArrayLike) -> FloatArray:
    """Normalised faithfulness ``F = (M(g) - M(empty)) / (M(full) - M(empty))``.

    0: no better than a network with all channels closed; 1: as good as the whole network. Also for
    measures of which less is better.

    Args:
        values: M of the sub-architectures.
        empty: M with all channels closed; broadcasts.
        full: M of the whole network; broadcasts.

    Returns:
        float64, of the broadcast shape; NaN where the whole network is as good as the empty one
        (to 1e-9), so that there is nothing to keep.

    Example:
        >>> faithfulness([0.9, 0.5], 0.5, 1.0).tolist()
        [0.8, 0.0]
    """
    value, low, high = np.broadcast_arrays(
        *(np.asarray(v, dtype=np.float64) for v in (values, empty, full))
    )
    scale = high - low
    known = ~(np.abs(scale) <= MIN_DIFFERENCE)
    return np.where(known, (value - low) / np.where(known, scale, 1.0), np.nan)


def circuit_areas(sizes: ArrayLike, faithful: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """MIB's two numbers of a circuit: CPR, the area of f(k), and CMD, the area of ``|1 - f(k)|``.

    By the trapezoid rule over the sizes as they are (shares, on a linear axis), not divided by
    their range: from .1 to 100 % a curve that is 1 everywhere has a CPR of .999. CPR (circuit
    performance ratio) is better the higher, CMD (circuit-model distance) the lower; 0 is best.

    Args:
        sizes: (S,) shares of the channels, rising; MIB's are :data:`MIB_SIZES`.
        faithful: (..., S), :func:`faithfulness` of the circuits.

    Returns:
        CPR and CMD, float64 (...); NaN where a value is.

    Raises:
        ValueError: If shapes do not fit, sizes fall, or span nothing.

    Source: Mueller et al., "MIB: A Mechanistic Interpretability Benchmark", ICML 2025, arXiv
    2504.13151; the sum as in its published evaluation.

    Example:
        >>> cpr, cmd = circuit_areas([0.0, 0.5, 1.0], [0.0, 1.5, 1.0])
        >>> cpr.item(), cmd.item()
        (1.0, 0.5)
    """
    f = np.asarray(faithful, dtype=np.float64)
    cpr, cmd = area_under(sizes, f), area_under(sizes, np.abs(1 - f))
    x = np.asarray(sizes, dtype=np.float64)
    span = x[-1] - x[0]
    return np.asarray(cpr * span), np.asarray(cmd * span)


def completeness(complement: ArrayLike, empty: ArrayLike, full: ArrayLike) -> FloatArray:
    """Completeness ``1 - F(complement)``: 1 if without the channels nothing of the task is left.

    Args:
        complement: M of the network without the sub-architecture's channels.
        empty: M with all channels closed; broadcasts.
        full: M of the whole network; broadcasts.

    Returns:
        float64, of the broadcast shape; NaN as in :func:`faithfulness`.

    Example:
        >>> completeness([0.5, 0.9], 0.5, 1.0).round(6).tolist()
        [1.0, 0.2]
    """
    return np.asarray(1 - faithfulness(complement, empty, full))


@dataclass(frozen=True, eq=False, repr=False)
class Curves(Result):
    """Keep and ablate curves of T tasks at S sizes, for every measure.

    Made by :func:`curves`. Each method below takes ``measure``, one of the measures; None: the one
    that was asked for.

    Attributes:
        tasks: T class indices or groups of them.
        task_names: T names.
        n_images: Images that were measured.
        measure: The measure that is shown where none is named.
        sizes: (S,), share of the channels that is really kept, or removed: budgets are whole
            channels, at least one.
        requested: S sizes as asked for.
        per_site: The share is kept (removed) at each site, not of all channels together.
        ablation: What replaces closed channels.
        fitted_on: With "optimal": how many images the constants were fitted on, if known.
        keep: ``{measure: (T, S)}``, the top channels alone.
        ablate: ``{measure: (T, S)}``, the network without them.
        empty: ``{measure: (T,)}``, all channels closed.
        full: ``{measure: (T,)}``, the whole network.
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    n_images: int
    measure: str
    sizes: FloatArray
    requested: tuple[float, ...]
    per_site: bool
    ablation: str
    keep: Mapping[str, FloatArray]
    ablate: Mapping[str, FloatArray]
    empty: Mapping[str, FloatArray]
    full: Mapping[str, FloatArray]
    fitted_on: int | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """The measures that there are."""
        return tuple(self.keep)

    def _measure(self, measure: str | None) -> str:
        return check_measure(self.measure if measure is None else measure, self.keep)

    def values(self, kind: str = "keep", measure: str | None = None) -> FloatArray:
        """One of the curves, (T, S).

        Args:
            kind: ``"keep"``: the measure of S(p); ``"ablate"``: of N(p); ``"faithfulness"``:
                :func:`faithfulness` of S(p); ``"completeness"``: of S(p), whose complement is N(p).
            measure: One of ``measures``.

        Raises:
            ValueError: If there is no such curve or measure.
        """
        if kind not in KINDS:
            raise ValueError(f"no curve {kind!r}; there are {', '.join(KINDS)}.")
        measure = self._measure(measure)
        measured = (self.keep if kind in ("keep", "faithfulness") else self.ablate)[measure]
        if kind in ("keep", "ablate"):
            return measured.copy()
        scaled = faithfulness if kind == "faithfulness" else completeness
        return scaled(measured, self.empty[measure][:, None], self.full[measure][:, None])

    def ends(self, kind: str = "keep", measure: str | None = None) -> tuple[FloatArray, FloatArray]:
        """The curve's ends at size 0 and size 1, (T,) each: the empty and the whole network."""
        measure = self._measure(measure)
        self.values(kind, measure)
        low, high = self.empty[measure], self.full[measure]
        if kind == "keep":
            return low.copy(), high.copy()
        if kind == "ablate":
            return high.copy(), low.copy()
        return faithfulness(low, low, high), faithfulness(high, low, high)

    def with_ends(self, kind: str, measure: str | None = None) -> tuple[FloatArray, FloatArray]:
        """The sizes from 0 to 1, (S + 2,), and the curve with its ends, (T, S + 2)."""
        first, last = self.ends(kind, measure)
        values = np.concatenate([first[:, None], self.values(kind, measure), last[:, None]], axis=1)
        return np.concatenate([[0.0], self.sizes, [1.0]]), values

    def area(self, kind: str = "keep", measure: str | None = None) -> FloatArray:
        """Area under a curve from size 0 to size 1 (:func:`area_under`), (T,).

        Raises:
            ValueError: If there is no such curve or measure.
        """
        return area_under(*self.with_ends(kind, measure))

    def delta(self, measure: str | None = None) -> FloatArray:
        """Area under S minus area under N, (T,).

        For measures in [0, 1] it lies in [-1, 1]. About 0 for a random order, and the higher the
        better for measures where more is better.

        Raises:
            ValueError: If there is no such measure.
        """
        return np.asarray(self.area("keep", measure) - self.area("ablate", measure))

    def circuit_areas(self, measure: str | None = None) -> tuple[FloatArray, FloatArray]:
        """MIB's CPR and CMD of the kept channels, (T,) each; see :func:`circuit_areas`.

        Over the sizes as asked for, from the first to the last; MIB's are :data:`MIB_SIZES`. The
        smallest have at least one channel.

        Raises:
            ValueError: If there is no such measure, or only one size.
        """
        return circuit_areas(self.requested, self.values("faithfulness", measure))

    def mean(self, kind: str = "keep", measure: str | None = None) -> FloatArray:
        """Mean curve over the tasks for which it is known, (S,)."""
        return nan_mean(self.values(kind, measure))

    def interval(
        self,
        kind: str = "keep",
        measure: str | None = None,
        *,
        level: float = 0.95,
        n_draws: int = 2000,
        seed: int = 0,
    ) -> tuple[FloatArray, FloatArray]:
        """Bootstrap interval of the mean curve over tasks, (S,) each; NaN with less than two.

        Args:
            kind: See :meth:`values`.
            measure: One of ``measures``.
            level: Coverage, at each size by itself.
            n_draws: Times that T tasks are drawn with replacement.
            seed: Of the draws; the global random state is not used.

        Raises:
            ValueError: If an argument makes no sense.
        """
        return intervals(self.values(kind, measure), level, n_draws, seed)

    def delta_interval(
        self, measure: str | None = None, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the mean :meth:`delta` over tasks; see :meth:`interval`."""
        low, high = intervals(self.delta(measure), level, n_draws, seed)
        return float(low), float(high)

    def frame(self) -> pd.DataFrame:
        """One row per task, size and curve, one column per measure, for pandas.

        Columns ``task``, ``name``, ``curve`` ("keep" or "ablate"), ``size`` and the measures.
        Sizes 0 and 1, the empty and the whole network, are among the rows.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("Curves.frame()")
        n_tasks, n_sizes = len(self.tasks), len(self.sizes) + 2
        parts = []
        for kind in ("keep", "ablate"):
            columns: dict[str, Any] = {
                "task": [task for task in self.tasks for _ in range(n_sizes)],
                "name": np.repeat(self.task_names, n_sizes),
                "curve": kind,
                "size": np.tile(np.concatenate([[0.0], self.sizes, [1.0]]), n_tasks),
            }
            measured = {m: self.with_ends(kind, m)[1].ravel() for m in self.measures}
            parts.append(pd.DataFrame(columns | measured))
        return pd.concat(parts, ignore_index=True)

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"tasks": "T", "task_names": "T", "sizes": "S", "requested": "S"},
        **{"keep": "T S", "ablate": "T S", "empty": "T", "full": "T"},
    }

    def _derived(self) -> dict[str, Any]:
        found: dict[str, Any] = {"delta": {}}
        for m in self.measures:
            each = self.delta(m)
            row = {"mean": nan_mean(each), "interval_95": self.delta_interval(m), "tasks": each}
            found["delta"][m] = row
        if self.requested == MIB_SIZES:
            areas = {m: self.circuit_areas(m) for m in self.measures}
            for i, name in enumerate(("cpr", "cmd")):
                found[name] = {m: area[i] for m, area in areas.items()}
        for kind in ("faithfulness", "completeness"):
            found[kind] = {m: self.values(kind, m) for m in self.measures}
        return found

    def summary(self, measure: str | None = None) -> str:
        """A table as plain text: the mean curves with their 95 % intervals, and delta."""
        measure = self._measure(measure)
        rows = [["size", *(f"{kind} (95 %)" for kind in ("keep", "ablate")), "faithf.", "compl."]]
        means = {kind: self.mean(kind, measure) for kind in KINDS}
        ends = {kind: self.interval(kind, measure) for kind in ("keep", "ablate")}
        rows.append(["0", *self._end_cells(measure, 0)])
        for i, size in enumerate(self.sizes):
            cells = [
                f"{number(means[kind][i])} ({number(ends[kind][0][i])} to "
                f"{number(ends[kind][1][i])})"
                for kind in ("keep", "ablate")
            ]
            shares = [number(means[kind][i]) for kind in ("faithfulness", "completeness")]
            rows.append([f"{size:.3g}", *cells, *shares])
        rows.append(["1", *self._end_cells(measure, 1)])
        low, high = self.delta_interval(measure)
        how = "at each site" if self.per_site else "of all channels"
        title = (
            f"{measure} of {len(self.tasks)} task(s) on {self.n_images} images, top share {how}, "
            f"closed channels: {self.ablation}{fitting(self.fitted_on)}"
        )
        delta = number(float(nan_mean(self.delta(measure))))
        foot = f"delta {delta} ({number(low)} to {number(high)})"
        if self.requested == MIB_SIZES:
            cpr, cmd = (number(float(nan_mean(v))) for v in self.circuit_areas(measure))
            foot += f", CPR {cpr}, CMD {cmd}"
        return "\n".join(map(shown, [title, *table(rows), foot]))

    def _end_cells(self, measure: str, end: int) -> list[str]:
        return [number(float(nan_mean(self.ends(kind, measure)[end]))) for kind in KINDS]

    def plot(self, measure: str | None = None, *, log: bool = False, axes: Any = None) -> Figure:
        """Both curves in one panel, delta as the area between them; see :func:`plot_curves`.

        Args:
            measure: One of ``measures``.
            log: Draw sizes on a logarithmic axis.
            axes: One matplotlib Axes to draw into; None: a new figure.

        Returns:
            A matplotlib figure, not shown.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such measure, or the axes are not one.
        """
        from nad_attr.evaluation.figures.curves import plot_one

        return plot_one(self, self._measure(measure), log=log, axes=axes)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{size:.3g}" for size in self.sizes)
        delta = number(float(nan_mean(self.delta())))
        return f"Curves({len(self.tasks)} tasks, sizes {sizes}; {self.measure}: delta {delta})"


def closed_at(ablation: Ablation | None, ranking: Ranking) -> str:
    """The name of the values that closed channels get."""
    if ablation is not None:
        return ablation.kind
    if ranking.closes_at_constants:
        return OPTIMAL
    return "mean" if ranking.closes_at_means else "zero"


def curves(
    model: nn.Module,
    scores_or_gates: Ranks,
    data: Data,
    *,
    sites: Sequence[GateSite] | None = None,
    tasks: Sequence[Task] | None = None,
    task_names: Sequence[str] | None = None,
    sizes: Sequence[float] = SIZES,
    measure: str = "own_auc",
    per_site: bool = False,
    ablation: Ablation | str | None = None,
    train_data: Data | None = None,
    others: bool = True,
    run: RunOptions | None = None,
) -> Curves:
    """Keep the top channels of a ranking, and remove them, at several sizes.

    All sizes of all tasks, the empty network and the whole one are measured on the same images, in
    as few passes over them as ``run.memory_limit`` allows.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        scores_or_gates: Task gates, ``{size: task gates}`` where each size was learned by itself,
            ``{size: variant}`` of :func:`nad_attr.evaluation.best_variants`, or the scores of any
            method, ``{site name: (T, C)}``, higher = more important. Equal scores are taken in
            site and channel order.
        data: Images that the ranking was not made on: ``(inputs, labels)`` tensors, a Dataset of
            (input, label) or a DataLoader.
        sites: Gate sites in forward order; task gates bring theirs.
        tasks: The T tasks, in the order of the scores' rows; of gates: those wanted (None: all).
        task_names: T names, for display.
        sizes: Shares of the channels, in (0, 1].
        measure: The measure that is shown where none is named; all are measured.
        per_site: Keep (remove) this share at each site, rather than of all channels together.
        ablation: What replaces closed channels: an ablation of
            :func:`nad_attr.evaluation.fit_ablation`, or the name of a kind (``"zero"``, ``"mean"``,
            ``"other_mean"``, ``"resample"``, ``"noise"``), fitted to ``train_data``. "optimal": for
            each size and task the constants that keep the task output best, of kept and of removed
            channels alike (:func:`nad_attr.fit_constants`, with the gates' own recipe); those that
            gates were learned with stay. None: what the gates were learned with, zero for scores.
        train_data: Images to fit a named ablation to, other than ``data``.
        others: Measure the outputs of the other tasks as well (other AUC, disentanglement), which
            keeps T times more answers.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The curves. A task without own images in the data gets NaN and a warning.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, scores, sites, tasks and sizes do not fit, or
            labels or tasks are not a class of the network.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> data = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), [0, 0, 1, 1]
        >>> result = curves(net, {"0": torch.eye(2)}, data, sites=[GateSite("0", 2, 1)],
        ...                 tasks=[0, 1], sizes=[0.5])
        >>> result.values("keep").T, result.values("ablate").T
        (array([[1., 1.]]), array([[0.5, 0.5]]))
        >>> result.delta()  # S is 1/2, 1, 1 and N is 1, 1/2, 1/2 at 0, 1/2 and 1
        array([0.25, 0.25])
    """
    shares = check_sizes(sizes)
    if check_measure(measure) in OF_OTHERS and not others:
        raise ValueError(f"measure {measure!r} needs others=True.")
    ranking = as_ranking(scores_or_gates, sites=sites, tasks=tasks, task_names=task_names)
    if lacking := ranking.missing(shares):
        raise ValueError(lacking)
    optimal = ablation == OPTIMAL
    kind = None if optimal else ablation
    prepared = fitted(model, ranking.sites, ranking.tasks, kind, train_data, run)
    kept = [ranking.sub_architectures(share, per_site=per_site) for share in shares]
    groups: list[list[SubArchitecture]] = [[arch & ~arch for arch in kept[0]]]
    groups += [group for archs in kept for group in (archs, [~arch for arch in archs])]
    if optimal:
        known = [False, *(k for share in shares for k in (ranking.has_constants(share), False))]
        groups = own_constants(model, groups, train_data, known, recipe_of(scores_or_gates), run)
    grid = measure_grid(model, groups, data, ablation=prepared, others=others, run=run)
    return Curves(
        tasks=ranking.tasks,
        task_names=ranking.task_names,
        n_images=grid.n_images,
        measure=measure,
        sizes=np.array([archs[0].size for archs in kept]),
        requested=shares,
        per_site=per_site,
        ablation=OPTIMAL if optimal else closed_at(prepared, ranking),
        keep={name: values[1::2].T.copy() for name, values in grid.values.items()},
        ablate={name: values[2::2].T.copy() for name, values in grid.values.items()},
        empty={name: values[0].copy() for name, values in grid.values.items()},
        full=grid.whole,
        fitted_on=fitted_on(groups) if prepared is None else None,
    )
