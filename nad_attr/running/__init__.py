"""Run images through a network, on a device, batch by batch."""

from __future__ import annotations

from nad_attr.running.forward import (
    Runner,
    amp_dtype,
    check_batch_size,
    check_classes,
    chunks,
    cumulative,
    sent,
)

__all__ = [
    "Runner",
    "amp_dtype",
    "check_batch_size",
    "check_classes",
    "chunks",
    "cumulative",
    "sent",
]
