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
    """All results that a page can show with the gates; None: it is not there.

    Parts are as :mod:`nad_attr.report.parts` and its neighbours make them; ``evaluation_from`` is
    the evaluation's name, ``notes`` say what could not be shown, and why.
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
