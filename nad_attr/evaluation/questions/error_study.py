"""The result of the study of errors: ranks by similarity, controls, chance and a vote."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from nad_attr.evaluation.questions.error_ranks import DECIMALS, PartialCorrelation, RankStatistics
from nad_attr.stats.p_values import least_p, permutation_p
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, number, pandas, table
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ErrorStudy", "Voting"]


@dataclass(frozen=True)
class Voting:
    """Classification by the sub-architectures: each gives the logit of its own class.

    Attributes:
        accuracy: Share of images whose class has the highest logit; equal highest logits count in
            equal parts.
        whole: The same for the whole network's logits of the same classes.
        random: The same for random channels, one number for each draw: as many channels over all
            sites as each sub-architecture keeps.
        agreement: Share of images on which voting and the whole network agree.
        n_images: Images.
    """

    accuracy: float
    whole: float
    random: tuple[float, ...]
    agreement: float
    n_images: int

    @property
    def p_value(self) -> float:
        """``(1 + #{random >= accuracy}) / (draws + 1)``; NaN without draws.

        Three draws give 0.25 at best; ask :func:`errors` for ``n_random=19`` to see 0.05.
        """
        return float(permutation_p(self.accuracy, self.random))


@dataclass(frozen=True, eq=False, repr=False)
class ErrorStudy(Result):
    """Errors of a network, and the similarity of the confused classes.

    Attributes:
        tasks: The K classes.
        task_names: Their names.
        n_images: Images of these classes.
        n_outside: Errors that are left out because the network called another class than these K.
        confusion: int64 (K, K), images of the row's class that were called the column's.
        similarity: What was compared: ``"kappa"``, ``"jaccard"``, ``"gates"`` or ``"given"``.
        similarities: float64 (K, K), the similarity of the sub-architectures.
        ranks: Ranks of the errors by that similarity.
        controls: ``{name: ranks by another similarity}``: the cosine of the rows of
            the classifier, the cosine of the class means of its input, and the overlap that random
            masks of the same sizes have. The fourth control, permuted labels, is in each
            statistic's ``permuted_hits`` and ``permuted_mrr``.
        control_similarities: ``{name: float64 (K, K)}``.
        partial: ``{control: does the sub-architectures' similarity say more}``.
        left_out: ``{control: why it is not there}``.
        voting: If it was asked for.
    """

    tasks: tuple[int, ...]
    task_names: tuple[str, ...]
    n_images: int
    n_outside: int
    confusion: NDArray[np.int64]
    similarity: str
    similarities: FloatArray
    ranks: RankStatistics
    controls: dict[str, RankStatistics]
    control_similarities: dict[str, FloatArray]
    partial: dict[str, PartialCorrelation]
    left_out: dict[str, str]
    voting: Voting | None = None

    @property
    def n_errors(self) -> int:
        """Misclassified images that count."""
        return self.ranks.n_errors

    @property
    def statistics(self) -> dict[str, RankStatistics]:
        """The sub-architectures' ranks and the controls', by name."""
        return {"sub-architectures": self.ranks, **self.controls}

    def confused(self, n: int = 10) -> list[tuple[str, str, int, float]]:
        """The most frequent errors.

        Returns:
            (true class, called class, images, rank of the called class by similarity), most
            frequent first; equally similar classes share the mean of their ranks.
        """
        off = self.confusion.copy()
        np.fill_diagonal(off, 0)
        order = np.argsort(-off, axis=None, kind="stable")[: max(n, 0)]
        found = []
        for y, called in zip(*np.unravel_index(order, off.shape), strict=True):
            if off[y, called]:
                names = self.task_names[y], self.task_names[called]
                rank = rank_among_others(self.similarities, int(y), int(called))
                found.append((*names, int(off[y, called]), rank))
        return found

    def frame(self) -> pd.DataFrame:
        """One row per similarity: hit@n and mean reciprocal rank with intervals and p-values.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("ErrorStudy.frame()")
        rows = []
        for name, ranks in self.statistics.items():
            row = {"similarity": name, **ranks._records()[0]}
            partial = self.partial.get(name)
            row["partial"] = math.nan if partial is None else partial.value
            row["partial_p"] = math.nan if partial is None else partial.p
            rows.append(row)
        return pd.DataFrame(rows).set_index("similarity")

    def summary(self) -> str:
        """The statistics as plain text, with nulls and controls."""
        k_all = list(self.ranks.hits)
        rows = [["ranked by", *(x for k in k_all for x in (f"hit@{k}", "p")), "MRR", "p"]]
        for name, ranks in self.statistics.items():
            label = f"{name} ({self.similarity})" if ranks is self.ranks else name
            cells = [x for k in k_all for x in (number(ranks.hits[k]), number(ranks.hit_p[k]))]
            rows.append([label, *cells, number(ranks.mrr), number(ranks.mrr_p)])
        permuted = [self.ranks.permuted_hits[k].mean() for k in k_all]
        null = [self.ranks.hit_null[k] for k in k_all]
        for name, values in (
            ("permuted labels", [*permuted, self.ranks.permuted_mrr.mean()]),
            ("chance", [*null, self.ranks.mrr_null]),
        ):
            rows.append([name, *(x for value in values for x in (number(float(value)), ""))])
        n_draws = len(self.ranks.permuted_mrr)
        least = least_p(n_draws)
        lines = [
            f"{self.n_errors} errors among {self.n_images} images of {len(self.tasks)} classes"
            + (f"; {self.n_outside} more called other classes" if self.n_outside else "")
            + f"; p from {n_draws} permutations of the classes (least possible {least:.3g})",
            *table(rows),
        ]
        for name, partial in self.partial.items():
            lines.append(
                f"beyond {name}: partial rank correlation {partial.value:.3f} (p {partial.p:.3f}; "
                f"without control {partial.without_control:.3f})"
            )
        lines += [f"left out: {name} ({reason})" for name, reason in self.left_out.items()]
        if self.voting is not None:
            vote, random = self.voting, ""
            if vote.random:
                random = f", random channels {sum(vote.random) / len(vote.random):.3f}"
            lines.append(
                f"voting: accuracy {vote.accuracy:.3f}, whole network {vote.whole:.3f}{random} "
                f"({vote.n_images} images)"
            )
        return "\n".join(map(shown, lines))

    _AXES: ClassVar[Mapping[str, str]] = {
        **{"tasks": "K", "task_names": "K", "confusion": "K K", "similarities": "K K"},
        "control_similarities": "K K",
    }

    def _derived(self) -> dict[str, Any]:
        vote = {} if self.voting is None else {"voting_p": self.voting.p_value}
        if self.voting is not None and self.voting.random:
            vote["voting_p_least"] = least_p(len(self.voting.random))
        return {"n_errors": self.n_errors, **vote}

    def plot(self, axes: Any = None) -> Figure:
        """Two panels: hit@n against n, and mean reciprocal ranks with their intervals.

        Args:
            axes: Two matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots import style as figures

        figure, (left, right) = figures.panels(2, axes, columns=2, panel=(3.6, 2.7))
        looks = figures.line_styles(self.statistics, references=())
        n = np.arange(1, min(10, len(self.tasks) - 1) + 1)
        for name, ranks in self.statistics.items():
            figures.line(left, n, ranks.hit_curve[: len(n)], label=name, **looks[name])
        null = n / (len(self.tasks) - 1)
        figures.line(left, n, null, label="chance", color=figures.GREY, linestyle="--")
        figures.style(left, title="Errors among the n most similar", x="n", y="hit@n")
        left.set_xticks(n if len(n) < 8 else n[::2])
        left.set_ylim(-0.03, 1.03)

        names = list(self.statistics)
        for place, name in enumerate(names):
            ranks = self.statistics[name]
            low, high = ranks.mrr_interval
            color = looks[name]["color"]
            if not math.isnan(low):
                right.plot([low, high], [place, place], color=color, linewidth=1.6)
            right.plot([ranks.mrr], [place], color=color, marker=looks[name]["marker"])
        low, high = np.quantile(self.ranks.permuted_mrr, [0.025, 0.975])
        band: dict[str, Any] = {"color": figures.GREY, "alpha": 0.2, "linewidth": 0}
        right.axvspan(float(low), float(high), label="permuted labels, 95 %", **band)
        right.axvline(self.ranks.mrr_null, color=figures.GREY, linewidth=1.4, linestyle="--")
        figures.style(right, title="Mean reciprocal rank", x="with 95 % interval", grid="x")
        right.set_yticks(range(len(names)), names)
        right.set_ylim(len(names) - 0.5, -0.5)
        figures.legend(figure, [left, right], own_figure=axes is None)
        return figure

    def __repr__(self) -> str:
        ranks = self.ranks
        hits = ", ".join(f"hit@{k} {v:.3f}" for k, v in ranks.hits.items())
        return (
            f"ErrorStudy({ranks.n_errors} errors of {len(self.tasks)} classes by "
            f"{self.similarity}: {hits}, MRR {ranks.mrr:.3f}, p {ranks.mrr_p:.3f})"
        )


def rank_among_others(similarities: FloatArray, y: int, called: int) -> float:
    """Rank of a class among all but y by similarity to y, from 1 on; ties share the mean rank.

    Example:
        >>> rank_among_others(np.array([[1.0, 0.2, 0.7], [0, 0, 0], [0, 0, 0]]), 0, 1)
        2.0
    """
    row = np.round(similarities[y], DECIMALS)
    others = np.delete(row, y)
    above = int((others > row[called]).sum())
    return above + (int((others == row[called]).sum()) + 1) / 2
