"""Results of mosaics: hits of sub-architectures in the quadrants of their classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nad_attr.data.labels import Task
from nad_attr.stats.bootstrap import bootstrap_means, check_interval, interval_of
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, number, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["MosaicResult"]


#: What :meth:`MosaicResult.mean` and :meth:`MosaicResult.interval` know: one number per site.
MOSAIC_MEASURES = ("hit", "excess", "difference")


@dataclass(frozen=True, eq=False, repr=False)
class MosaicResult(Result):
    """Hits of sub-architectures in n mosaics, at the S sites that have positions.

    Attributes:
        sites: The S names, in forward order.
        depths: float64 (S,), 0 for the network's first gate site and 1 for its last one.
        grids: ``{site name: (rows, columns)}`` of its map.
        left_out: ``{site name: reason}`` of the sites without a map.
        tasks: T class indices or groups of them.
        task_names: T names.
        chosen: int64 (n, 4), for each mosaic the rows of the tasks in its quadrants: top left, top
            right, bottom left, bottom right.
        images: int64 (n, 4), the numbers of the images there.
        shares: float64 (n, S, 4, 4): ``shares[i, s, r, q]`` is the share of the highest positions
            that lies in quadrant q, in the map of the sub-architecture of the class in quadrant r.
            Sums to one over q.
        whole: float64 (n, S, 4), the same for the whole network, without gates.
        top: Share of the positions that counts as highest.
        seed: That the mosaics were drawn with.
    """

    sites: tuple[str, ...]
    depths: FloatArray
    grids: dict[str, tuple[int, int]]
    left_out: dict[str, str]
    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    chosen: NDArray[np.int64]
    images: NDArray[np.int64]
    shares: FloatArray
    whole: FloatArray
    top: float
    seed: int

    def __len__(self) -> int:
        """Number of mosaics."""
        return len(self.chosen)

    @property
    def hits(self) -> FloatArray:
        """(n, S), share of the highest positions in the own quadrant, mean over the four tasks."""
        return np.asarray(np.einsum("nsqq->ns", self.shares) / 4)

    @property
    def other_hits(self) -> FloatArray:
        """(n, S), the share that the other three tasks' maps have in a quadrant, mean over all."""
        return np.asarray((self.shares.sum((2, 3)) / 4 - self.hits) / 3)

    def _values(self, measure: str) -> FloatArray:
        if measure == "hit":
            return self.hits
        if measure == "excess":
            return np.asarray(self.hits - 0.25)
        if measure == "difference":
            return np.asarray(self.hits - self.other_hits)
        raise ValueError(f"no measure {measure!r}; there are {', '.join(MOSAIC_MEASURES)}.")

    def mean(self, measure: str = "excess") -> FloatArray:
        """Mean over mosaics at each site, (S,).

        Args:
            measure: ``"hit"``; ``"excess"``, hit - 0.25, which is 0 for any map that does not
                depend on the class; ``"difference"``, own gates' hit minus that of the other three
                tasks' gates for the same quadrant. Because the shares of a map sum to one, the
                difference over whole mosaics is 4/3 of the excess; task by task
                (:meth:`by_task`) it says more.

        Raises:
            ValueError: If there is no such measure.
        """
        return np.asarray(self._values(measure).mean(0))

    def interval(
        self,
        measure: str = "excess",
        *,
        level: float = 0.95,
        n_draws: int = 2000,
        seed: int = 0,
        over: str = "mosaics",
    ) -> tuple[FloatArray, FloatArray]:
        """Bootstrap interval of :meth:`mean` at each site.

        Args:
            measure: As in :meth:`mean`.
            level: Coverage.
            n_draws: Times that mosaics, or tasks, are drawn with replacement.
            seed: Of the draws; the global random state is not used.
            over: ``"mosaics"``: over the mosaics that were made, for the given images and tasks;
                ``"tasks"``: over the tasks (of their means).

        Returns:
            Lower and upper ends, (S,) each; NaN with fewer than two mosaics or tasks.

        Raises:
            ValueError: If there is no such measure, or an argument makes no sense.
        """
        check_interval(level, n_draws)
        if over == "mosaics":
            rows = self._values(measure)
        elif over == "tasks":
            own, others, _ = self._by_task()
            self._values(measure)
            rows = {"hit": own, "excess": own - 0.25, "difference": own - others}[measure]
            rows = rows[~np.isnan(rows).all(1)]
        else:
            raise ValueError(f'over must be "mosaics" or "tasks", got {over!r}.')
        if len(rows) < 2:
            nothing = np.full(len(self.sites), np.nan)
            return nothing, nothing.copy()
        return interval_of(bootstrap_means(rows, n_draws=n_draws, seed=seed), level)

    def _by_task(self) -> tuple[FloatArray, FloatArray, FloatArray]:
        """Own, others' and the whole network's share in the quadrant of each task, (T, S) each."""
        shape = (len(self.tasks), len(self.sites))
        own, others, whole = np.zeros(shape), np.zeros(shape), np.zeros(shape)
        count = np.zeros(len(self.tasks))
        everyone = self.shares.sum(2)
        for q in range(4):
            at, mine = self.chosen[:, q], self.shares[:, :, q, q]
            np.add.at(own, at, mine)
            np.add.at(others, at, (everyone[:, :, q] - mine) / 3)
            np.add.at(whole, at, self.whole[:, :, q])
            np.add.at(count, at, 1)
        n = np.where(count > 0, count, np.nan)[:, None]
        return own / n, others / n, whole / n

    def by_task(self) -> dict[str, FloatArray]:
        """Means over the quadrants of each task, (T, S) each; NaN if in none.

        Returns:
            ``"hit"``: share of the highest positions in the task's quadrant, with its own gates;
            ``"others"``: with the gates of the other three tasks; ``"whole"``: without gates,
            how much the task's images stand out to the network anyway; ``"difference"``
            and ``"gain"``: hit minus others, hit minus whole.
        """
        own, others, whole = self._by_task()
        return {
            "hit": own,
            "others": others,
            "whole": whole,
            "difference": own - others,
            "gain": own - whole,
        }

    def frame(self) -> pd.DataFrame:
        """One row per site: hit, excess and difference with their 95 % intervals over mosaics.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("MosaicResult.frame()")
        columns: dict[str, Any] = {
            "depth": self.depths,
            "rows": [self.grids[name][0] for name in self.sites],
            "columns": [self.grids[name][1] for name in self.sites],
            "hit": self.mean("hit"),
        }
        for measure in ("excess", "difference"):
            low, high = self.interval(measure)
            columns |= {measure: self.mean(measure), f"{measure}_low": low, f"{measure}_high": high}
        return pd.DataFrame(columns, index=pd.Index(list(self.sites), name="site"))

    def summary(self) -> str:
        """A table as plain text: one line per site."""
        rows = [["site", "map", "hit", "excess", "95 % from", "to", "own - others"]]
        low, high = self.interval("excess")
        hit, excess, difference = (self.mean(measure) for measure in MOSAIC_MEASURES)
        for s, name in enumerate(self.sites):
            height, width = self.grids[name]
            numbers = (hit[s], excess[s], low[s], high[s], difference[s])
            rows.append([name, f"{height}x{width}", *map(number, numbers)])
        title = (
            f"highest {100 * self.top:g} % of positions in the own quadrant of {len(self)} mosaics "
            f"of {len(self.tasks)} tasks (chance: 0.250)"
        )
        left = [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        return "\n".join(map(shown, [title, *table(rows), *left]))

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"sites": "S", "depths": "S", "tasks": "T", "task_names": "T"},
        **{"chosen": "n 4", "images": "n 4", "shares": "n S 4 4", "whole": "n S 4"},
    }

    def _derived(self) -> dict[str, Any]:
        found: dict[str, Any] = {"n": len(self), "by_task": self.by_task()}
        for measure in MOSAIC_MEASURES:
            low, high = self.interval(measure)
            found[measure] = {"mean": self.mean(measure), "low": low, "high": high}
        return found

    def plot(self, axes: Any = None) -> Figure:
        """Excess over chance along depth: the mean with its interval, and each task as a dot.

        Args:
            axes: One matplotlib Axes to draw in; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots import style as figures

        width = max(figures.PANEL[0] * 1.5, 0.34 * len(self.sites) + 1.2)
        figure, (axis,) = figures.panels(1, axes, panel=(width, figures.PANEL[1] * 1.15))
        places = np.arange(len(self.sites))
        low, high = self.interval("excess")
        single = self.by_task()["hit"] - 0.25
        spread = np.random.default_rng(0).uniform(-0.12, 0.12, len(single))
        axis.plot(
            (places[None] + spread[:, None]).ravel(),
            single.ravel(),
            linestyle="",
            marker="o",
            markersize=2.4,
            markeredgewidth=0,
            color=figures.GREY,
            alpha=0.7,
            label="one task",
        )
        figures.line(
            axis,
            places,
            self.mean("excess"),
            low=low,
            high=high,
            label="mean, 95 % interval",
            color=figures.PALETTE[0],
            marker="o",
            linewidth=1.6,
            zorder=3,
        )
        axis.axhline(0, color=figures.INK, linewidth=0.8, linestyle="--")
        figures.style(
            axis, title="Hits beyond chance", x="gate site, in forward order", y="hit - 0.25"
        )
        axis.set_xticks(places, list(self.sites), rotation=90)
        figures.legend(figure, [axis], own_figure=axes is None)
        return figure

    def __repr__(self) -> str:
        excess = self.mean("excess")
        best = int(excess.argmax())
        return (
            f"MosaicResult({len(self)} mosaics of {len(self.tasks)} tasks, {len(self.sites)} "
            f"sites, highest excess {excess[best]:.3f} at {self.sites[best]!r})"
        )
