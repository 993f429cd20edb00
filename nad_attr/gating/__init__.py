"""Multiply gates into a network, record what flows through it, and restore it afterwards."""

from __future__ import annotations

from nad_attr._checks import GatingError
from nad_attr.gating.hooks import check_eval, frozen, gated, installed, recorded, site_modules

__all__ = ["GatingError", "check_eval", "frozen", "gated", "installed", "recorded", "site_modules"]
