"""What a page can show beside the gates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict_result import Verdict
from nad_attr.evaluation.result import Evaluation

__all__ = ["Results"]


@dataclass
class Results:
    """All results that a page can show with the gates; None is not there.

    Attributes:
        evaluation: See :class:`nad_attr.evaluation.Evaluation`.
        evaluation_from: What it is called.
        certainty: See :class:`nad_attr.ChannelCertainty`.
        verdict: See :func:`nad_attr.verdict`.
        curves: See :func:`nad_attr.report.parts.curves_part`.
        mosaics: See :func:`nad_attr.report.parts.mosaics_part`.
        errors: See :func:`nad_attr.report.parts.errors_part`.
        flow: See :func:`nad_attr.report.parts.flow_part`.
        pictures: See :func:`nad_attr.report.measuring.pictures_part`.
        where: See :func:`nad_attr.report.where.where_part`.
        export: Classes' networks by themselves, see :func:`nad_attr.report.measuring.export_part`.
        units: Concepts of units, see :func:`nad_attr.report.concepts.units_part`.
        statistics: Named tables, see :func:`nad_attr.report.parts.frame_part`.
        notes: What could not be shown, and why.
    """

    evaluation: Evaluation | None = None
    evaluation_from: str = ""
    certainty: ChannelCertainty | None = None
    verdict: Verdict | None = None
    curves: list[dict[str, Any]] | None = None
    mosaics: dict[str, Any] | None = None
    errors: dict[str, Any] | None = None
    flow: dict[str, Any] | None = None
    pictures: dict[str, Any] | None = None
    where: list[dict[str, Any]] | None = None
    export: dict[str, Any] | None = None
    units: dict[str, Any] | None = None
    statistics: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
