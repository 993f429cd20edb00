"""Run images through a network, on a device, batch by batch."""

from __future__ import annotations

from nad_attr.running.forward import Runner, check_classes, chunks, cumulative, sent
from nad_attr.running.options import RunOptions

__all__ = ["RunOptions", "Runner", "check_classes", "chunks", "cumulative", "sent"]
