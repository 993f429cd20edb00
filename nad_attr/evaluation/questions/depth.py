"""How: what sub-architectures look like along the depth of a network.

At each gate site, this measures how much of it a task keeps, and how much of that it shares with
other tasks, side by side for networks with other connections (plain, residual, dense, cells).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import numpy as np
from numpy.typing import NDArray

from nad_attr.data.labels import Task
from nad_attr.evaluation.rows import NamedArchitectures, named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.stats.bootstrap import check_interval, interval_of, times_drawn
from nad_attr.stats.pairs import site_overlaps
from nad_attr.stats.ranks import rank_trends
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["DepthProfile", "NetworkProfile", "along_depth"]

Architectures: TypeAlias = "TaskGates | SubArchitecture | Sequence[SubArchitecture]"

#: What a profile knows at each site.
DEPTH_MEASURES = ("size", "jaccard", "kappa", "fidelity")


def _weighted_means(matrix: FloatArray, times: FloatArray) -> FloatArray:
    """Means over pairs of different tasks (N,); a task counts as often as ``times`` (N, T) says.

    A task that was drawn twice makes no pair with itself. NaN where there is no pair.
    """
    off = matrix.copy()
    np.fill_diagonal(off, 0.0)
    total = np.einsum("nt,tu,nu->n", times, off, times, optimize=True)
    count = np.square(times.sum(1)) - np.square(times).sum(1)
    return np.asarray(np.where(count > 0, total, np.nan) / np.where(count > 0, count, 1.0))


@dataclass(frozen=True, eq=False, repr=False)
class NetworkProfile:
    """One network's sub-architectures, site by site.

    Attributes:
        sites: S site names, in forward order.
        n_channels: int64 (S,).
        depths: float64 (S,), 0 for the first gate site and 1 for the last one.
        tasks: T class indices or groups of them.
        task_names: T names.
        sizes: (S, T), kept channels / all channels of the site.
        jaccards: (S, T, T), |A and B| / |A or B| of the masks of two tasks.
        kappas: (S, T, T), the same corrected for chance: 0 for random masks of these sizes.
        fidelities: (S, T), if they were given: see :func:`along_depth`.
    """

    sites: tuple[str, ...]
    n_channels: NDArray[np.int64]
    depths: FloatArray
    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    sizes: FloatArray
    jaccards: FloatArray
    kappas: FloatArray
    fidelities: FloatArray | None = None

    @property
    def measures(self) -> tuple[str, ...]:
        """What is known: ``"size"``, ``"jaccard"``, ``"kappa"``, and ``"fidelity"`` if given."""
        return DEPTH_MEASURES if self.fidelities is not None else DEPTH_MEASURES[:-1]

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"sites": "S", "n_channels": "S", "depths": "S", "tasks": "T", "task_names": "T"},
        **{"sizes": "S T", "jaccards": "S T T", "kappas": "S T T", "fidelities": "S T"},
    }

    def _check(self, measure: str) -> None:
        if measure not in self.measures:
            raise ValueError(f"no measure {measure!r}; there are {', '.join(self.measures)}.")

    def measured(self) -> dict[str, Any]:
        """Mean, interval and trend of each measure, as :meth:`DepthProfile.to_dict` has them."""
        found = {}
        for measure in self.measures:
            low, high = self.interval(measure)
            means = {"mean": self.mean(measure), "low": low, "high": high}
            found[measure] = {**means, "trend": self.trend(measure)}
        return found

    def mean(self, measure: str) -> FloatArray:
        """At each site the mean over tasks, or for overlaps over pairs of tasks: (S,).

        Raises:
            ValueError: If there is no such measure.
        """
        return np.asarray(self._means(measure, np.ones((1, len(self.tasks))))[0])

    def _means(self, measure: str, times: FloatArray) -> FloatArray:
        """Means in which each task counts as often as ``times`` (N, T) says: (N, S)."""
        self._check(measure)
        if measure in ("jaccard", "kappa"):
            matrices = self.jaccards if measure == "jaccard" else self.kappas
            return np.stack([_weighted_means(matrix, times) for matrix in matrices], axis=1)
        values = self.sizes if measure == "size" else self.fidelities
        assert values is not None
        known = ~np.isnan(values.T)
        count = times @ known.astype(np.float64)
        total = times @ np.nan_to_num(values.T)
        return np.asarray(np.where(count > 0, total, np.nan) / np.where(count > 0, count, 1.0))

    def _times(self, n_draws: int, seed: int) -> FloatArray:
        return np.concatenate([times for _, times in times_drawn(len(self.tasks), n_draws, seed)])

    def interval(
        self, measure: str, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
    ) -> tuple[FloatArray, FloatArray]:
        """Bootstrap interval over tasks of :meth:`mean` at each site.

        Args:
            measure: One of :attr:`measures`.
            level: Coverage.
            n_draws: Times that T tasks are drawn with replacement.
            seed: Of the draws; the global random state is not used.

        Returns:
            Lower and upper ends, (S,) each; NaN with fewer than two tasks (for overlaps three).

        Raises:
            ValueError: If there is no such measure, or an argument makes no sense.
        """
        self._check(measure)
        check_interval(level, n_draws)
        if len(self.tasks) < (3 if measure in ("jaccard", "kappa") else 2):
            nothing = np.full(len(self.sites), np.nan)
            return nothing, nothing.copy()
        return interval_of(self._means(measure, self._times(n_draws, seed)), level)

    def trend(
        self, measure: str, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
    ) -> tuple[float, float, float]:
        """Spearman's rank correlation of a measure with depth: does it rise or fall?

        Args:
            measure: One of :attr:`measures`.
            level: Coverage of the bootstrap interval over tasks.
            n_draws: As in :meth:`interval`.
            seed: As in :meth:`interval`.

        Returns:
            The correlation of the mean, and the interval's lower and upper end; NaN if there are
            fewer than three sites or the measure does not vary.

        Raises:
            ValueError: If there is no such measure, or an argument makes no sense.
        """
        mean = self.mean(measure)
        check_interval(level, n_draws)
        if len(self.sites) < 3:
            return math.nan, math.nan, math.nan
        value = float(rank_trends(mean[None], self.depths)[0])
        if np.isnan(self.interval(measure, n_draws=1)[0]).any():
            return value, math.nan, math.nan
        draws = self._means(measure, self._times(n_draws, seed))
        low, high = interval_of(rank_trends(draws, self.depths), level)
        return value, float(low), float(high)


@dataclass(frozen=True, eq=False, repr=False)
class DepthProfile(Result):
    """Sub-architectures along depth, for one or several networks.

    Attributes:
        networks: ``{name: profile}``.
    """

    networks: dict[str, NetworkProfile]

    def __getitem__(self, name: str) -> NetworkProfile:
        """The profile of one network."""
        return self.networks[name]

    @property
    def measures(self) -> tuple[str, ...]:
        """What is known of at least one network."""
        known = {m for profile in self.networks.values() for m in profile.measures}
        return tuple(measure for measure in DEPTH_MEASURES if measure in known)

    def frame(self) -> pd.DataFrame:
        """One row per network and site: each measure with its 95 % interval over tasks.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("DepthProfile.frame()")
        parts = []
        for name, profile in self.networks.items():
            columns: dict[str, Any] = {
                "network": name,
                "site": list(profile.sites),
                "depth": profile.depths,
                "n_channels": profile.n_channels,
            }
            for measure in self.measures:
                known = measure in profile.measures
                low, high = profile.interval(measure) if known else (math.nan, math.nan)
                columns[measure] = profile.mean(measure) if known else math.nan
                columns |= {f"{measure}_low": low, f"{measure}_high": high}
            parts.append(pd.DataFrame(columns))
        return pd.concat(parts, ignore_index=True)

    def summary(self) -> str:
        """A table as plain text: each network's sites, and whether measures rise with depth."""
        lines = []
        for name, profile in self.networks.items():
            rows = [["site", *profile.measures]]
            columns = [(profile.mean(m), *profile.interval(m)) for m in profile.measures]
            for s, site in enumerate(profile.sites):
                rows.append([site, *(_with_interval(m[s], lo[s], hi[s]) for m, lo, hi in columns)])
            trends = [_with_interval(*profile.trend(measure)) for measure in profile.measures]
            rows.append(["with depth", *trends])
            lines += [f"{name}: {len(profile.tasks)} tasks", *table(rows), ""]
        lines.append(
            "mean over tasks (overlaps: over pairs of tasks) with 95 % interval over tasks; with "
            "depth: rank correlation"
        )
        return "\n".join(map(shown, lines))

    def _derived(self) -> dict[str, Any]:
        return {"measured": {name: each.measured() for name, each in self.networks.items()}}

    def plot(self, axes: Any = None) -> Figure:
        """A panel for each measure over relative depth, a line with its interval for each network.

        Args:
            axes: As many matplotlib Axes as there are measures; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots import style as figures

        labels = {
            "size": ("Size", "channels kept"),
            "jaccard": ("Overlap of two tasks", "Jaccard index"),
            "kappa": ("Overlap beyond chance", "kappa"),
            "fidelity": ("Change of activations", "squared change / square"),
        }
        measures = self.measures
        figure, panels = figures.panels(len(measures), axes, columns=2 if len(measures) > 3 else 3)
        looks = figures.line_styles(self.networks, references=())
        for axis, measure in zip(panels, measures, strict=True):
            for name, profile in self.networks.items():
                if measure in profile.measures:
                    low, high = profile.interval(measure)
                    values = profile.mean(measure)
                    figures.line(
                        axis, profile.depths, values, label=name, low=low, high=high, **looks[name]
                    )
            if measure == "kappa":
                axis.axhline(0, color=figures.INK, linewidth=0.8, linestyle="--")
            title, unit = labels[measure]
            figures.style(axis, title=title, x="relative depth", y=unit)
            axis.set_xlim(-0.03, 1.03)
        if len(self.networks) > 1:
            figures.legend(figure, panels, own_figure=axes is None)
        return figure

    def __repr__(self) -> str:
        parts = ", ".join(f"{name}: {len(p.sites)} sites" for name, p in self.networks.items())
        return f"DepthProfile({parts})"


def _with_interval(mean: float, low: float, high: float) -> str:
    if math.isnan(mean):
        return "-"
    if math.isnan(low):
        return f"{mean:.3f}"
    return f"{mean:.3f} [{low:.3f}, {high:.3f}]"


def _fidelities(fidelity: Mapping[str, Any] | None, given: NamedArchitectures) -> FloatArray | None:
    if fidelity is None:
        return None
    if not isinstance(fidelity, Mapping):
        raise TypeError(f"fidelity must be {{site name: (T,)}}, got {type(fidelity).__name__}.")
    names = [site.name for site in given.sites]
    if set(fidelity) != set(names):
        raise ValueError(f"fidelity is for {list(fidelity)[:5]}, the sites are {names[:5]}.")
    rows = []
    for name in names:
        values = np.asarray(fidelity[name], dtype=np.float64)
        if values.shape != (len(given.tasks),):
            raise ValueError(
                f"fidelity of {name!r} has shape {values.shape}, expected ({len(given.tasks)},), "
                "one number per task."
            )
        rows.append(values)
    return np.stack(rows)


def _profile(given: NamedArchitectures, fidelity: Mapping[str, Any] | None) -> NetworkProfile:
    sites = given.sites
    masks = given.masks
    jaccards, kappas = site_overlaps(masks), site_overlaps(masks, chance_corrected=True)
    return NetworkProfile(
        sites=tuple(site.name for site in sites),
        n_channels=np.array([site.n_channels for site in sites], dtype=np.int64),
        depths=np.linspace(0, 1, len(sites)),
        tasks=given.tasks,
        task_names=given.task_names,
        sizes=np.stack([mask.double().mean(1).numpy() for mask in masks.values()]),
        jaccards=np.stack([jaccards[site.name] for site in sites]),
        kappas=np.stack([kappas[site.name] for site in sites]),
        fidelities=_fidelities(fidelity, given),
    )


def along_depth(
    architectures: Architectures | Mapping[str, Architectures],
    *,
    size: float | None = None,
    fidelity: Mapping[str, Any] | None = None,
    name: str = "network",
) -> DepthProfile:
    """Sizes of sub-architectures and overlaps between tasks, site by site.

    The overlap of two tasks at a site is the Jaccard index of the channels that they keep there
    (the paper's similarity, of one site), and kappa, which is 0 for random masks of these sizes.


    Args:
        architectures: Task gates, or sub-architectures of the same sites, each of another task; or
            ``{network name: ...}`` of those, to put networks side by side.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        fidelity: ``{site name: (T,)}`` to show beside, as :func:`nad_attr.evaluation.site_fidelity`
            gives it; with several networks ``{network name: ...}`` of some of these.
        name: The network's name, if there is one without.

    Returns:
        The profiles.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If there are fewer than two tasks, sub-architectures do not fit together, or
            ``fidelity`` fits neither sites nor tasks.

    Example:
        >>> from nad_attr import GateSite
        >>> sites = [GateSite("a", 4, 1), GateSite("b", 2, 1)]
        >>> archs = [
        ...     SubArchitecture.from_kept({"a": [0, 1, 2], "b": [k]}, sites, task=k) for k in (0, 1)
        ... ]
        >>> profile = along_depth(archs)["network"]
        >>> profile.mean("size"), profile.mean("jaccard"), profile.mean("kappa")
        (array([0.75, 0.5 ]), array([1., 0.]), array([ 1. , -0.5]))
    """
    if isinstance(architectures, Mapping):
        if not architectures:
            raise ValueError("there is no network to look at.")
        networks = {str(key): value for key, value in architectures.items()}
        fidelities: Mapping[str, Any] = {} if fidelity is None else fidelity
        if not isinstance(fidelities, Mapping):
            raise TypeError(f"fidelity must be a dictionary, got {type(fidelities).__name__}.")
        unknown = [key for key in fidelities if key not in networks]
        if unknown:
            raise ValueError(
                f"fidelity names {unknown[0]!r}, which is not among the networks {list(networks)}."
            )
    else:
        networks, fidelities = {name: architectures}, {name: fidelity}
    profiles = {}
    for key, archs in networks.items():
        given = named_architectures(archs, size if isinstance(archs, TaskGates) else None, least=2)
        profiles[key] = _profile(given, fidelities.get(key))
    if size is not None and not any(isinstance(archs, TaskGates) for archs in networks.values()):
        raise ValueError("size= needs TaskGates; sub-architectures have their size already.")
    return DepthProfile(profiles)
