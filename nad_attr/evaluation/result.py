"""The measures of sub-architectures, random channels, rivals and the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nad_attr._display import html_table
from nad_attr.data.labels import Task
from nad_attr.stats.bootstrap import bootstrap_interval
from nad_attr.stats.held_out import apart
from nad_attr.stats.measure_table import MEASURE_TABLE, MEASURES, p_against
from nad_attr.stats.p_values import least_p, permutation_p
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, nan_mean, number, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["MEASURES", "Evaluation"]


def _none() -> FloatArray:
    return np.empty(0)


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Result):
    """How T sub-architectures do on N images: one number per task for each measure.

    A measure is NaN where it has no meaning: without own (or other) images in the data, or with a
    whole network whose task output does not vary. Outputs that vary by less than 1e-5 of their
    magnitude count as constant (AUC one half, rank fidelity zero): that is rounding.

    Attributes:
        tasks: T class indices or groups of them.
        task_names: T names.
        n_images: N.
        n_own: int64 (T,), own images.
        size: (T,), kept channels / all channels.
        sizes: ``{site name: (T,)}``, the same at each site.
        table: (T, T): ``table[k, j]`` is the AUC of task output j for task j's own images against
            all others, inside the sub-architecture of k.
        fidelity: (T,), see :func:`fidelity`.
        rank_fidelity: (T,), see :func:`fidelity` with ``ranks=True``.
        margin_auc: (T,), AUC of the task output minus the highest output of any other class.
        recall: (T,), share of own images that the sub-architecture calls its task: the class with
            the highest output is the task, or a member of the group.
        fpr: (T,), share of other images that it calls its task.
        other_accuracy: (T,), share of other images that it calls by their own right class.
        flop_size: (T,), kept share weighted by multiply-adds, see
            :func:`nad_attr.evaluation.flop_size`.
        parameter_size: (T,), the same weighted by parameters.
        dead_fraction: (T,), share of the kept channels that are constant (zero, mostly) on all own
            images inside the whole network.
        target_r2: (T,), R^2 of the images' regression targets by the task output, see
            :func:`nad_attr.evaluation.r_squared`; NaN without targets.
        detector_ba: (T,), balanced accuracy of "task output above a threshold", the threshold
            fitted to other images inside the sub-architecture; NaN without such images.
        overlap: (T, T), |A and B| / |A or B| of the sub-architectures, mean over sites.
        kappa: (T, T), the same corrected for chance, see
            :func:`nad_attr.evaluation.overlap_matrix`.
        random: The same measures of random channels, as many as each sub-architecture keeps: one
            result per draw.
        rivals: ``{name: result}``, the same measures of other methods' sub-architectures.
        learned: The same measures on images that the gates were learned from; None: not looked at.
        closed: What replaced closed channels, in words: zero, their mean, or each task's own
            constants and the number of images that these were fitted on. Empty: not known, or no
            channel is closed.
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    n_images: int
    n_own: NDArray[np.int64]
    size: FloatArray
    sizes: dict[str, FloatArray]
    table: FloatArray
    fidelity: FloatArray
    rank_fidelity: FloatArray
    margin_auc: FloatArray
    recall: FloatArray
    fpr: FloatArray
    other_accuracy: FloatArray
    flop_size: FloatArray = field(default_factory=_none)
    parameter_size: FloatArray = field(default_factory=_none)
    dead_fraction: FloatArray = field(default_factory=_none)
    target_r2: FloatArray = field(default_factory=_none)
    detector_ba: FloatArray = field(default_factory=_none)
    overlap: FloatArray = field(default_factory=_none)
    kappa: FloatArray = field(default_factory=_none)
    random: tuple[Evaluation, ...] = ()
    rivals: Mapping[str, Evaluation] = field(default_factory=dict)
    learned: Evaluation | None = None
    closed: str = ""
    _whole: Evaluation | None = field(default=None)

    _AXES: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tasks", "task_names", "n_own", "sizes", "size", "fidelity"), "T"),
        **dict.fromkeys(("flop_size", "parameter_size", "dead_fraction", "rank_fidelity"), "T"),
        "target_r2": "T",
        **dict.fromkeys(("detector_ba", "margin_auc", "recall", "fpr", "other_accuracy"), "T"),
        **dict.fromkeys(("table", "overlap", "kappa"), "T T"),
    }

    def __post_init__(self) -> None:
        n = len(self.tasks)
        for name in ("flop_size", "parameter_size", "dead_fraction", "target_r2", "detector_ba"):
            if getattr(self, name).size == 0:
                object.__setattr__(self, name, np.full(n, np.nan))
        for name in ("overlap", "kappa"):
            if getattr(self, name).size == 0:
                object.__setattr__(self, name, np.full((n, n), np.nan))

    @property
    def whole(self) -> Evaluation:
        """The same measures of the whole network, which is its own whole."""
        return self if self._whole is None else self._whole

    @property
    def is_of_targets(self) -> bool:
        """Whether the images have numbers as targets, and no classes."""
        return not bool(np.isnan(self.whole.target_r2).all())

    @property
    def own_auc(self) -> FloatArray:
        """(T,), the table's diagonal."""
        return self.table.diagonal().copy()

    @property
    def other_auc(self) -> FloatArray:
        """(T,), mean of the table's row off the diagonal, over tasks that have own images."""
        off = self.table.copy()
        np.fill_diagonal(off, np.nan)
        known = ~np.isnan(off)
        total = np.where(known, off, 0.0).sum(1)
        count = known.sum(1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    @property
    def disentanglement(self) -> FloatArray:
        """(T,), own AUC - other AUC."""
        return self.own_auc - self.other_auc

    @property
    def ba(self) -> FloatArray:
        """(T,), balanced accuracy ``(recall + 1 - fpr) / 2``."""
        return np.asarray((self.recall + 1 - self.fpr) / 2)

    def values(self, measure: str) -> FloatArray:
        """A measure of every task, (T,).

        Raises:
            ValueError: If there is no such measure.
        """
        if measure not in MEASURES:
            raise ValueError(f"no measure {measure!r}; there are {', '.join(MEASURES)}.")
        values: FloatArray = getattr(self, measure)
        return values

    def mean(self, measure: str) -> float:
        """Mean of a measure over the tasks for which it is known.

        Raises:
            ValueError: If there is no such measure.
        """
        return float(nan_mean(self.values(measure)))

    def interval(
        self, measure: str, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the mean over tasks (percentiles of resampled means).

        It shows how much the mean depends on the choice of tasks; the images are fixed.

        Args:
            measure: One of ``MEASURES``.
            level: Coverage.
            n_draws: Times that T tasks are drawn with replacement.
            seed: Of the draws; the global random state is not used.

        Returns:
            Lower and upper end; NaN with fewer than two tasks.

        Raises:
            ValueError: If there is no such measure, or an argument makes no sense.
        """
        return bootstrap_interval(self.values(measure), level=level, n_draws=n_draws, seed=seed)

    def p_value(self, measure: str, *, lower: bool | None = None) -> float:
        """How often random channels of the same size do as well, in the mean over tasks.

        ``(1 + number of draws that reach the observed mean) / (draws + 1)``: a valid p-value of
        the hypothesis that the sub-architectures are random channels (permutation test). With few
        draws it cannot be small: n draws give 1 / (n + 1) at best, three of them 0.25, so ask
        :func:`evaluate` for ``n_random=19`` to see 0.05.

        Args:
            measure: One of ``MEASURES``.
            lower: Whether less is better. None: as the measure says (FPR, other AUC and dead
                fraction are better when low).

        Returns:
            In (0, 1]; NaN without random draws, where the measure is not known, or where neither
            way is better (sizes, other-task accuracy).

        Raises:
            ValueError: If there is no such measure.
        """
        observed = self.mean(measure)
        draws = [result.mean(measure) for result in self.random]
        if lower is not None:
            return float(permutation_p(observed, draws, tail="lower" if lower else "higher"))
        return float(p_against(measure, observed, draws))

    def held_out_sentences(self) -> list[str]:
        """Sentences if means on learning images and held-out images differ, and what would help.

        They part where they differ by more than 0.05 and the 95 % interval over tasks leaves out
        zero; of one task, which has no such interval, where they differ by 0.1.
        """
        if self.learned is None:
            return []
        gaps, there, here = {}, {}, {}
        for measure in ("own_auc", "fidelity"):
            both = np.stack([self.learned.values(measure), self.values(measure)])
            both = both[:, ~np.isnan(both).any(0)]
            there[measure], here[measure] = (float(nan_mean(row)) for row in both)
            gaps[measure] = bootstrap_interval(both[0] - both[1])
        return apart(
            there,
            here,
            gaps,
            whole=(self.learned.whole.mean("own_auc"), self.whole.mean("own_auc")),
            n_own=None,
            size=self.mean("size"),
        )

    def frame(self) -> pd.DataFrame:
        """One row per task with all measures, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("Evaluation.frame()")
        # tupleize_cols: a group of classes is one task, not a level of an index each.
        index = pd.Index(list(self.tasks), name="task", tupleize_cols=False)
        columns: dict[str, Any] = {"name": list(self.task_names), "n_own": self.n_own}
        columns |= {name: self.values(name) for name in MEASURES}
        return pd.DataFrame(columns, index=index)

    def summary(self, *, max_tasks: int = 20) -> str:
        """A table as plain text: tasks, their mean with its 95 % interval, and rivals.

        Recall never stands without FPR, own AUC and random channels or rivals of equal size: a
        network that always says k has recall 1. Without those it is left out.

        Args:
            max_tasks: Tasks that are listed one by one, at most.
        """
        main: tuple[str, ...] = (
            "size",
            "own_auc",
            "other_auc",
            "fidelity",
            "detector_ba",
            "recall",
            "fpr",
            "ba",
        )
        if self.is_of_targets:
            main = ("size", "fidelity", "rank_fidelity", "target_r2", "detector_ba")
        head = {name: MEASURE_TABLE[name].head for name in (*main, "other_accuracy")}
        if np.isnan(self.detector_ba).all():
            del head["detector_ba"]
        bare = self._whole is not None and not self.random and not self.rivals
        if self.is_of_targets:
            del head["other_accuracy"]
        elif bare:
            del head["recall"]
        rows = [["task", *head.values()]]
        columns = [self.values(m)[:max_tasks] for m in head]
        for name, cells in zip(self.task_names, zip(*columns, strict=True), strict=False):
            rows.append([name, *map(number, cells)])
        if len(self.tasks) > max_tasks:
            rows.append([f"... {len(self.tasks) - max_tasks} more", *("" for _ in head)])
        n_listed = len(rows)
        rows.append(["mean", *(number(self.mean(m)) for m in head)])
        if len(self.tasks) > 1:
            ends = {m: self.interval(m) for m in head}
            rows.append(["  95 % from", *(number(ends[m][0]) for m in head)])
            rows.append(["  to", *(number(ends[m][1]) for m in head)])
        if self.random:
            means = [_mean_of(self.random, m) for m in head]
            rows.append(["random, same size", *map(number, means)])
        for name, rival in self.rivals.items():
            rows.append([name, *(number(rival.mean(m)) for m in head)])
        if self._whole is not None:
            rows.append(["whole network", *(number(self.whole.mean(m)) for m in head)])
        if self.learned is not None:
            rows.append(["on images learned from", *(number(self.learned.mean(m)) for m in head)])
        names, rule, *lines = table(rows)
        what = "the whole network" if self._whole is None else "sub-architectures"
        title = f"{what} of {len(self.tasks)} task(s) on {self.n_images} images"
        if bare and not self.is_of_targets:
            title += "\n(recall is left out: it says nothing without random channels or rivals)"
        n = n_listed - 1
        listed = [*title.split("\n"), names, rule, *lines[:n], rule, *lines[n:]]
        listed += self._closed_sentences()
        listed += self.held_out_sentences()
        return "\n".join(map(shown, listed))

    def _closed_sentences(self) -> list[str]:
        """What replaced closed channels, here and in the baselines."""
        of = {"sub-architectures": self.closed}
        of |= {"random": self.random[0].closed} if self.random else {}
        of |= {name: rival.closed for name, rival in self.rivals.items()}
        of = {name: closed for name, closed in of.items() if closed}
        if len(set(of.values())) > 1:
            return [f"closed channels, {name}: {closed}" for name, closed in of.items()]
        return [f"closed channels: {closed}" for closed in list(of.values())[:1]]

    def plot(self, measure: str = "own_auc", axes: Any = None) -> Figure:
        """The mean of a measure with its interval over tasks, with random channels and rivals.

        Args:
            measure: One of ``MEASURES``.
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is missing.
            ValueError: If there is no such measure.
        """
        from nad_attr.plots.style import label_of, plot_intervals

        rows = {"sub-architectures" if self._whole is not None else "whole network": self}
        rows |= self.rivals
        if self._whole is not None:
            rows["whole network"] = self.whole
        found = {name: (each.mean(measure), *each.interval(measure)) for name, each in rows.items()}
        if self.random:
            draws = [draw.mean(measure) for draw in self.random]
            found["random, same size"] = (float(np.mean(draws)), min(draws), max(draws))
        return plot_intervals(found, label_of(measure), axes=axes)

    @classmethod
    def _types(cls) -> dict[str, Any]:
        types = super()._types()
        return {**types, "whole": types.pop("_whole")}

    def _fields(self) -> dict[str, Any]:
        fields = super()._fields()
        if fields.pop("_whole") is not None:
            fields["whole"] = self.whole
        fields["random"] = [replace(draw, _whole=None) for draw in self.random]
        fields["rivals"] = {name: replace(r, _whole=None) for name, r in self.rivals.items()}
        return fields

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> Evaluation:
        whole = fields.pop("whole", None)
        if fields["n_images"] < 0:
            raise ValueError(f"{fields['n_images']} images")
        random = tuple(replace(draw, _whole=whole) for draw in fields.pop("random", ()))
        rivals = {n: replace(r, _whole=whole) for n, r in fields.pop("rivals", {}).items()}
        made = super()._of_fields(fields)
        return replace(made, random=random, rivals=rivals, _whole=whole)

    def _derived(self) -> dict[str, Any]:
        found: dict[str, Any] = {name: self.values(name) for name in MEASURES}
        found["means"] = {
            name: {"mean": self.mean(name), "interval_95": self.interval(name)} for name in MEASURES
        }
        if self.random:
            found["p_values"] = {name: self.p_value(name) for name in MEASURES}
            found["p_least"] = least_p(len(self.random))
        return found

    def _stored(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Arrays have the names of the measures: (T,) or (T, T), and "sizes" (sites, T).

        Those of the whole network begin with "whole.", of random draws and of rivals with "random."
        and "rivals.", where the draw or rival is a first axis.
        """
        sites = list(self.sizes)
        arrays = {**_arrays(self, sites), "n_own": self.n_own}
        if self._whole is not None:
            arrays |= {f"whole.{name}": value for name, value in _arrays(self.whole, sites).items()}
        for what, several in (("random", self.random), ("rivals", tuple(self.rivals.values()))):
            parts = [_arrays(part, sites) for part in several]
            for name in parts[0] if parts else ():
                arrays[f"{what}.{name}"] = np.stack([part[name] for part in parts])
        n_learned = None
        if self.learned is not None:
            n_learned = self.learned.n_images
            found = {**_arrays(self.learned, sites), "n_own": self.learned.n_own}
            found |= {f"whole.{n}": v for n, v in _arrays(self.learned.whole, sites).items()}
            arrays |= {f"learned.{name}": value for name, value in found.items()}
        return arrays, {
            "tasks": [list(task) if isinstance(task, tuple) else task for task in self.tasks],
            "task_names": list(self.task_names),
            "n_images": self.n_images,
            "sites": sites,
            "has_whole": self._whole is not None,
            "n_learned": n_learned,
            "n_random": len(self.random),
            "rivals": list(self.rivals),
        }

    @classmethod
    def _of_stored(cls, arrays: Mapping[str, Any], attributes: Mapping[str, Any]) -> Evaluation:
        common = {name: attributes[name] for name in ("tasks", "task_names", "n_images")}

        def part(prefix: str, row: int | None = None) -> dict[str, Any]:
            def field(name: str) -> Any:
                values = arrays[prefix + name]
                return values if row is None else values[row]

            sizes = dict(zip(attributes["sites"], field("sizes"), strict=True))
            # Files of earlier versions have no target_r2.
            there = [name for name in _STORED if name != "target_r2" or prefix + name in arrays]
            found = {name: field(name) for name in there}
            return {**common, **found, "sizes": sizes, "n_own": arrays["n_own"]}

        content = part("")
        if attributes["has_whole"]:
            content["whole"] = part("whole.")
        if attributes.get("n_learned") is not None:
            about = {"n_images": attributes["n_learned"], "n_own": arrays["learned.n_own"]}
            content["learned"] = {**part("learned."), **about}
            content["learned"]["whole"] = {**part("learned.whole."), **about}
        content["random"] = [part("random.", i) for i in range(attributes["n_random"])]
        content["rivals"] = {n: part("rivals.", i) for i, n in enumerate(attributes["rivals"])}
        return super()._of_stored({}, {"fields": content})

    def _repr_html_(self) -> str:
        measures = ["own_auc", "other_auc", "fidelity", "recall", "fpr", "ba"]
        if self.is_of_targets:
            measures = ["fidelity", "rank_fidelity", "target_r2"]
        elif self._whole is not None and not self.random and not self.rivals:
            measures.remove("recall")  # as in summary: alone it says nothing
        columns = [self.values(m)[:_MAX_SHOWN_TASKS] for m in ("size", *measures)]
        rows = [
            [name, *map(number, cells)]
            for name, cells in zip(self.task_names, zip(*columns, strict=True), strict=False)
        ]
        n_listed = len(rows)
        rows.append(["mean", *(number(self.mean(m)) for m in ("size", *measures))])
        others: dict[str, Sequence[Evaluation]] = {}
        if self.random:
            others["random, same size"] = self.random
        others |= {name: [rival] for name, rival in self.rivals.items()}
        if self._whole is not None:
            others["whole network"] = [self._whole]
        for name, each in others.items():
            means = [_mean_of(each, m) for m in ("size", *measures)]
            rows.append([name, *map(number, means)])
        rest = len(self.tasks) - n_listed
        return html_table(
            f"{'Sub-architectures' if self._whole is not None else 'The whole network'}: "
            f"{len(self.tasks)} task{'s' * (len(self.tasks) != 1)} on {self.n_images:,} images",
            ["task", *(MEASURE_TABLE[m].head for m in ("size", *measures))],
            rows,
            rule_before=n_listed,
            note=f"and {rest} more tasks, which the mean counts" if rest > 0 else "",
        )

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self.tasks)} tasks, {self.n_images} images, size "
            f"{number(self.mean('size'))}, own AUC {number(self.mean('own_auc'))}, other AUC "
            f"{number(self.mean('other_auc'))}, fidelity {number(self.mean('fidelity'))})"
        )


#: Fields that are arrays of the HDF5 file: numbers of each task, and of each pair of tasks.
_STORED = (
    *("size", "flop_size", "parameter_size", "dead_fraction", "fidelity", "rank_fidelity"),
    *("target_r2", "detector_ba", "margin_auc", "recall", "fpr", "other_accuracy"),
    *("table", "overlap", "kappa"),
)


def _arrays(result: Evaluation, sites: Sequence[str]) -> dict[str, FloatArray]:
    arrays: dict[str, FloatArray] = {name: getattr(result, name) for name in _STORED}
    sizes = np.array([result.sizes[name] for name in sites], dtype=np.float64)
    return {**arrays, "sizes": sizes.reshape(len(sites), len(result.tasks))}


#: Tasks that a notebook shows.
_MAX_SHOWN_TASKS = 12


def _mean_of(results: Sequence[Evaluation], measure: str) -> float:
    return float(nan_mean(np.array([result.mean(measure) for result in results])))
