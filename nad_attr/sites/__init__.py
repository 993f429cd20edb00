"""Gate sites: the places in a network where a gate can close a channel completely."""

from __future__ import annotations

from nad_attr.sites.finding import find_gate_sites, paper_sites
from nad_attr.sites.site import GateSite, SiteError, resolve_name, unwrap

__all__ = ["GateSite", "SiteError", "find_gate_sites", "paper_sites", "resolve_name", "unwrap"]
