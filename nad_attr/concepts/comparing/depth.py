"""Do deeper layers carry higher semantics? Concepts along the depth of a network.

The second finding of the NAD paper is that they do not always. This module counts, site by site,
how many of the kept channels detect high-level concepts, beside all channels and random ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nad_attr._checks import check_count
from nad_attr.concepts.comparing.aligned import Aligned, Gates, align
from nad_attr.concepts.comparing.result import Comparison, RowList
from nad_attr.concepts.unit_concepts import UnitConcepts
from nad_attr.stats.bootstrap import bootstrap_means, interval_of
from nad_attr.stats.p_values import permutation_p
from nad_attr.stats.ranks import rank_trends
from nad_attr.stats.results import Result
from nad_attr.stats.sentences import DEPTH_MEASURES
from nad_attr.stats.strata import permutations, with_tail
from nad_attr.stats.tables import FloatArray, nan_mean, pandas
from nad_attr.system.rng import seed_of
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["HIGH", "DepthSemantics", "semantics_along_depth"]


#: Categories of concepts that count as high-level; colours, textures and materials are low.
HIGH = ("object", "part", "scene")


@dataclass(frozen=True, eq=False, repr=False)
class DepthSemantics(Result):
    """Concepts along depth, of kept channels, all channels and random ones.

    Attributes:
        sites: S site names, in forward order.
        depths: (S,), 0 for the first gate site and 1 for the last one.
        n_channels: (S,).
        task_names: T names.
        kept: ``{measure: (T, S)}`` of the channels that each task keeps; NaN where it keeps none.
        all: ``{measure: (S,)}`` of all channels.
        random: ``{measure: (draws, S)}``, mean over tasks of random channels, as many as each task
            keeps at each site.
        categories: ``{category: (T, S)}``, share of kept channels that detect a concept of it.
        all_categories: ``{category: (S,)}``.
        high: Categories that count as high-level.
        notes: What was left out.
        seed: Of random channels, permutations and bootstrap.
    """

    sites: tuple[str, ...]
    depths: FloatArray
    n_channels: NDArray[np.int64]
    task_names: tuple[str, ...]
    kept: dict[str, FloatArray]
    all: dict[str, FloatArray]
    random: dict[str, FloatArray]
    categories: dict[str, FloatArray]
    all_categories: dict[str, FloatArray]
    high: tuple[str, ...]
    notes: tuple[str, ...] = ()
    seed: int = 0

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"sites": "S", "depths": "S", "n_channels": "S", "task_names": "T", "kept": "T S"},
        **{"all": "S", "random": "draws S", "categories": "T S", "all_categories": "S"},
    }

    @property
    def measures(self) -> tuple[str, ...]:
        """What is known: ``"high"``, ``"high_of_detectors"``, ``"detectors"``, ``"iou"``."""
        return tuple(self.kept)

    def mean(self, measure: str) -> FloatArray:
        """Of kept channels, mean over tasks at each site: (S,).

        Raises:
            KeyError: If there is no such measure.
        """
        return nan_mean(self.kept[measure])

    def interval(self, measure: str, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Bootstrap interval over tasks of :meth:`mean`, (S,) each; NaN with one task."""
        if len(self.task_names) < 2:
            nothing = np.full(len(self.sites), np.nan)
            return nothing, nothing.copy()
        return interval_of(bootstrap_means(self.kept[measure], seed=self.seed), level)

    def comparison(self, *, n_permutations: int = 9999, level: float = 0.95) -> Comparison:
        """Sites and trends as a table with q-values over all of it.

        Rows of test ``depth`` are sites: kept channels against random ones, p by the random draws.
        Rows of test ``depth_trend`` are Spearman's correlation of a measure with depth: among kept
        channels and among all, p by permuting sites, and for kept minus all, p by random channels:
        do kept channels change more with depth than the network's channels do anyway?

        Args:
            n_permutations: Of the sites.
            level: Coverage of the intervals.
        """
        check_count(n_permutations, "n_permutations")
        rows = RowList()
        for measure in self.measures:
            self._add_sites(rows, measure, level)
            if len(self.sites) > 2:
                self._add_trends(rows, measure, n_permutations, level)
        notes = list(self.notes)
        if len(self.sites) < 3:
            notes.append("a trend with depth needs at least three sites.")
        return Comparison(rows.columns, notes=notes, info={"level": level, "seed": self.seed})

    def _add_sites(self, rows: RowList, measure: str, level: float) -> None:
        mean, draws = self.mean(measure), self.random[measure]
        control, ends = nan_mean(draws), interval_of(draws, level)
        rows.add(
            "depth",
            len(self.sites),
            site=self.sites,
            concept=DEPTH_MEASURES[measure],
            other="kept",
            n=[int((~np.isnan(column)).sum()) for column in self.kept[measure].T],
            effect=mean,
            ends=self.interval(measure, level),
            p=with_tail(
                permutation_p(mean, draws.T, tail="both", centre=control),
                len(draws),
                _standard(mean, draws),
                # Draws of many values have tails that are nearly normal.
                np.array([len(np.unique(c.round(12))) >= 20 for c in draws.T]),
            ),
            null=control,
            controls=(control, *ends),
        )

    def _add_trends(self, rows: RowList, measure: str, n: int, level: float) -> None:
        known = ~np.isnan(self.mean(measure)) & ~np.isnan(self.all[measure])
        if known.sum() < 3:
            return
        depth = self.depths[known]
        mean, whole = self.mean(measure)[known], self.all[measure][known]
        draws = self.random[measure][:, known]
        draws = draws[~np.isnan(draws).any(1)]
        resampled = np.full((1, len(depth)), np.nan)
        if len(self.task_names) > 1:
            resampled = bootstrap_means(self.kept[measure][:, known], seed=self.seed)
        of_random = rank_trends(draws, depth)
        for group, value, boot in (
            ("kept", mean, resampled),
            ("all", whole, np.full((1, len(depth)), np.nan)),
            ("kept - all", mean - whole, resampled - whole),
        ):
            effect = rank_trends(value[None], depth)
            if group == "kept - all":
                null = rank_trends(draws - whole, depth)
                centre = float(nan_mean(null[:, None])[0]) if len(null) else math.nan
            else:
                order = np.random.default_rng(seed_of("depth trend", self.seed))
                shuffled = order.permuted(np.broadcast_to(value, (n, len(value))), axis=1)
                null, centre = rank_trends(shuffled, depth), 0.0
            p = permutation_p(effect, null[None], tail="both", centre=centre)
            # Of kept channels: what random ones have; of all: what sites in random order have.
            shown = of_random if group == "kept" else null
            ends = interval_of(shown, level) if len(shown) else (math.nan, math.nan)
            rows.add(
                "depth_trend",
                1,
                concept=DEPTH_MEASURES[measure],
                other=group,
                n=len(depth),
                effect=effect,
                ends=interval_of(rank_trends(boot, depth), level),
                p=p,
                null=0.0,
                controls=(nan_mean(shown[:, None]) if len(shown) else math.nan, *ends),
            )

    @property
    def sentence(self) -> str:
        """What may be concluded about the share of high-level detectors."""
        return " ".join(self._sentences("high"))

    def _sentences(self, measure: str) -> list[str]:
        table = self.comparison()
        rows = table.where(test="depth_trend", concept=DEPTH_MEASURES[measure])
        if not rows:
            return [
                f"Whether the {DEPTH_MEASURES[measure]} changes with depth is not known: "
                f"{len(self.sites)} sites are too few."
            ]
        return table.sentences(rows)

    def frame(self) -> pd.DataFrame:
        """One row per site, group (kept, all, random) and measure or category.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("DepthSemantics.frame()")
        base = {"site": list(self.sites), "depth": self.depths, "n_channels": self.n_channels}
        unknown = (math.nan, math.nan)
        rows: list[tuple[Any, ...]] = []
        for measure in self.measures:
            random = self.random[measure]
            rows += [
                ("kept", measure, "", self.mean(measure), *self.interval(measure)),
                ("all", measure, "", self.all[measure], *unknown),
                ("random", measure, "", nan_mean(random), *interval_of(random)),
            ]
        for category, shares in self.categories.items():
            whole = self.all_categories[category]
            rows.append(("kept", "share", category, nan_mean(shares), *unknown))
            rows.append(("all", "share", category, whole, *unknown))
        names = ("group", "measure", "category", "value", "low", "high")
        parts = [pd.DataFrame(base | dict(zip(names, row, strict=True))) for row in rows]
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> str:
        """What may be concluded, and the share of high-level detectors site by site."""
        lines = list(self._sentences("high"))
        random = nan_mean(self.random["high"])
        lines.append(f"{'site':<24} {'kept':>7} {'all':>7} {'random':>7}")
        for s, site in enumerate(self.sites):
            values = (self.mean("high")[s], self.all["high"][s], random[s])
            cells = " ".join("      -" if math.isnan(v) else f"{v:7.3f}" for v in values)
            lines.append(f"{site:<24} {cells}")
        lines.append(
            f"share of channels that detect {', '.join(self.high)}; {len(self.task_names)} task(s)"
        )
        lines += [f"Note: {note}" for note in self.notes]
        return "\n".join(map(shown, lines))

    def plot(self, axes: Any = None) -> Figure:
        """A panel per measure over depth: kept with its interval, all, random with its range.

        Args:
            axes: As many matplotlib Axes as there are measures; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots import style as figures

        measures = [m for m in self.measures if not np.isnan(self.mean(m)).all()]
        figure, panels = figures.panels(len(measures), axes, columns=2)
        looks = figures.line_styles(["kept", "all", "random"])
        for axis, measure in zip(panels, measures, strict=True):
            random = self.random[measure]
            for name, values, ends in (
                ("random", nan_mean(random), interval_of(random)),
                ("all", self.all[measure], (None, None)),
                ("kept", self.mean(measure), self.interval(measure)),
            ):
                band = dict(zip(("low", "high"), ends, strict=True))
                figures.line(axis, self.depths, values, label=name, **band, **looks[name])

            title = DEPTH_MEASURES[measure]
            figures.style(axis, title=title[0].upper() + title[1:], x="relative depth")
            axis.set_xlim(-0.03, 1.03)
        figures.legend(figure, panels, own_figure=axes is None, order=("kept", "all", "random"))
        return figure

    def __repr__(self) -> str:
        return f"DepthSemantics({len(self.sites)} sites, {len(self.task_names)} tasks)"


def _standard(mean: FloatArray, draws: FloatArray) -> FloatArray:
    """How many deviations of the draws (P, S) a mean (S,) lies from theirs."""
    centre = nan_mean(draws)
    deviation = np.sqrt(nan_mean(np.square(draws - centre)))
    return np.asarray((mean - centre) / np.where(deviation > 0, deviation, np.nan))


def semantics_along_depth(
    gates: Gates,
    units: UnitConcepts,
    *,
    size: float | None = None,
    tasks: Sequence[object] | None = None,
    high: Sequence[str] = HIGH,
    site_map: Mapping[str, str] | None = None,
    n_random: int = 999,
    seed: int = 0,
) -> DepthSemantics:
    """Do deeper layers carry higher semantics, and do kept channels?

    Args:
        gates: Task gates, sub-architectures with a task each, a store, or its path.
        units: What units mean; with IoUs.
        size: Cut task gates at this share of the channels; None: as learned.
        tasks: Only these; None: all.
        high: Categories of concepts that count as high-level.
        site_map: ``{gate site: site of the units}`` where names differ.
        n_random: Random choices of channels, as many as each task keeps at each site.
        seed: Of the random choices, permutations and bootstrap.

    Returns:
        The shares, with tables, trends, a figure and what may be concluded.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If gates and units do not fit together, or units are not labelled by IoU.

    Example:
        >>> from nad_attr import GateSite, SubArchitecture
        >>> from nad_attr.concepts import Concept
        >>> names, sites = "abc", [GateSite(name, 2) for name in "abc"]
        >>> arch = SubArchitecture.from_kept({name: [0] for name in names}, sites, task=0)
        >>> iou = {"a": [[0, 0.1], [0, 0.1]], "b": [[0.1, 0], [0, 0]], "c": [[0.1, 0], [0.1, 0]]}
        >>> concepts = [Concept("cat", "object"), Concept("red", "colour")]
        >>> units = UnitConcepts(iou, concepts, source="example")
        >>> result = semantics_along_depth(arch, units, n_random=9)
        >>> result.mean("high"), result.all["high"]
        (array([0., 1., 1.]), array([0. , 0.5, 1. ]))
    """
    if isinstance(high, str):
        raise TypeError(f"high must be a list of categories, got {high!r}.")
    check_count(n_random, "n_random")
    aligned = align(gates, units, size=size, tasks=tasks, site_map=site_map, methods=())
    return along_depth_of(aligned, tuple(high), n_random, seed)


def along_depth_of(
    aligned: Aligned, high: tuple[str, ...], n_random: int, seed: int
) -> DepthSemantics:
    """See :func:`semantics_along_depth`."""
    if aligned.detector is None:
        raise ValueError("semantics along depth needs IoUs; these units have no threshold.")
    category = np.array([concept.category for concept in aligned.concepts] + [""])
    kinds = list(dict.fromkeys(concept.category for concept in aligned.concepts))
    wanted = ["colour" if name == "color" else name for name in high]
    n_sites, t = len(aligned.sites), len(aligned.tasks)
    kept = {name: np.full((t, n_sites), np.nan) for name in DEPTH_MEASURES}
    whole = {name: np.full(n_sites, np.nan) for name in DEPTH_MEASURES}
    random = {name: np.full((n_random, n_sites), np.nan) for name in DEPTH_MEASURES}
    shares = {kind: np.full((t, n_sites), np.nan) for kind in kinds}
    all_shares = {kind: np.full(n_sites, np.nan) for kind in kinds}
    for s, masks in enumerate(aligned.kept):
        detector, best = aligned.detector[s], aligned.best[s]
        kind = category[aligned.label[s]]
        is_high = detector & np.isin(kind, wanted)
        known = ~np.isnan(best)
        scores = np.stack(
            [is_high, detector, np.where(known, best, 0.0), known, np.ones(len(best))]
        ).astype(np.float64)
        for name, values in _measures(masks.astype(np.float64) @ scores.T).items():
            kept[name][:, s] = values
        for name, values in _measures(scores.sum(1)[None]).items():
            whole[name][s] = values[0]
        for name in kinds:
            flags = (detector & (kind == name)).astype(np.float64)
            with np.errstate(invalid="ignore"):
                shares[name][:, s] = masks @ flags / masks.sum(1)
            all_shares[name][s] = flags.mean()
        # The channels' numbers are shuffled once for all scores, so that they stay together.
        numbers = np.arange(len(best), dtype=np.float64)
        for where, block in permutations([numbers], n_random, seed, f"depth/{s}"):
            order = block[0].astype(np.int64)
            sums = np.stack([masks @ score[order].T for score in scores], axis=-1)
            for name, values in _measures(sums).items():
                random[name][where, s] = nan_mean(values)
    notes = list(aligned.notes)
    if "" in kinds:
        notes.append("concepts without a category count as low-level.")
    if not set(wanted) & set(kinds):
        notes.append(f"no concept is of a high-level category ({', '.join(wanted)}).")
    return DepthSemantics(
        aligned.sites,
        aligned.depths,
        np.array([len(best) for best in aligned.best], dtype=np.int64),
        aligned.names,
        kept,
        whole,
        random,
        shares,
        all_shares,
        tuple(wanted),
        tuple(notes),
        seed,
    )


def _measures(sums: FloatArray) -> dict[str, FloatArray]:
    """From sums over channels (..., 5) of: high, detector, best IoU, known, one."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return {
            "high": sums[..., 0] / sums[..., 4],
            "high_of_detectors": sums[..., 0] / sums[..., 1],
            "detectors": sums[..., 1] / sums[..., 4],
            "iou": sums[..., 2] / sums[..., 3],
        }
