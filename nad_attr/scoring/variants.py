"""One variant of a scorer: a choice for each of its options."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nad_attr.data.labels import Task
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.scoring.baselines import top_k
from nad_attr.scoring.scorer import Scores
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result

__all__ = ["Variant"]


@dataclass(frozen=True, eq=False)
class Variant(Result):
    """One way to make sub-architectures of a scorer's numbers, and their quality.

    Attributes:
        include_others: Whether scores are means over own and other images, not over own ones only.
        signed: Whether the sign of each image's score counts.
        per_site: Whether the same share is kept at each site, not the highest of all together.
        size: Share of the channels that is kept.
        own_auc: Mean over tasks of the sub-architectures' own AUC.
        scores: ``{site name: (T, C)}``.
        sites: The gate sites.
        tasks: The T tasks.
        tried: ``{(include_others, signed, per_site): own AUC}`` of all compared variants.
    """

    include_others: bool
    signed: bool
    per_site: bool
    size: float
    own_auc: float
    scores: Scores = field(repr=False)
    sites: tuple[GateSite, ...] = field(repr=False)
    tasks: tuple[Task, ...] = field(repr=False)
    tried: dict[tuple[bool, bool, bool], float] = field(repr=False)

    @property
    def name(self) -> str:
        """In words, for tables: ``"own and other images, signed, per site"``."""
        return _name(self.include_others, self.signed, self.per_site)

    def _records(self) -> list[dict[str, Any]]:
        return [{"variant": _name(*key), "own_auc": auc} for key, auc in self.tried.items()]

    def architectures(
        self, size: float | None = None, *, means: dict[str, Tensor] | None = None
    ) -> list[SubArchitecture]:
        """The sub-architectures of all tasks; see :func:`~nad_attr.evaluation.top_k`.

        Args:
            size: None: the size that the variant was chosen at.
            means: The values of closed channels; None: zero.
        """
        return top_k(
            self.scores,
            self.sites,
            self.tasks,
            self.size if size is None else size,
            means=means,
            per_site=self.per_site,
        )


def _name(include_others: bool, signed: bool, per_site: bool) -> str:
    return ", ".join(
        (
            "own and other images" if include_others else "own images",
            "signed" if signed else "absolute",
            "per site" if per_site else "over all sites",
        )
    )
