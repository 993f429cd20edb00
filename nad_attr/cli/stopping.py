"""Stop at a signal."""

from __future__ import annotations

import os

__all__ = ["stop_at_once"]


def stop_at_once(number: int, frame: object) -> None:
    """End with one line: nothing is being written yet, or everything has been."""
    os.write(2, b"\nStopped.\n")
    os._exit(128 + number)
