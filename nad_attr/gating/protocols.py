"""Protocols of the values that gating takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from nad_attr.data.labels import Task
from nad_attr.sites.site import GateSite

__all__ = ["HasGates"]


class HasGates(Protocol):
    """Gates that bring their own sites: :class:`TaskGates` and :class:`SubArchitecture`."""

    def _gating(
        self, tasks: Task | Sequence[Task] | None
    ) -> tuple[Mapping[str, Tensor], tuple[GateSite, ...], Mapping[str, Tensor] | None]:
        """Gates by site, the sites, and the ablation values."""
