"""How many processes are too many."""

from __future__ import annotations

import os

__all__ = ["check_processes", "most_processes", "n_cpus"]


def n_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def most_processes(cpus: float | None = None) -> int:
    """Processes at most: four for each CPU, and at least sixteen.

    Loaders that wait for a network share need more processes than CPUs.

    Example:
        >>> most_processes(2), most_processes(64)
        (16, 256)
    """
    return max(16, int(4 * (n_cpus() if cpus is None else cpus)))


def check_processes(n: object, what: str = "n_workers", least: int = 0) -> None:
    """Refuse values that are no number of processes, and far more processes than CPUs.

    Raises:
        ValueError: Says how many there may be.

    Example:
        >>> check_processes(2)
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < least:
        raise ValueError(f"{what} must be a whole number from {least} on, got {n!r}.")
    most = most_processes()
    if n > most:
        raise ValueError(
            f"{what} must be at most {most} on this machine ({n_cpus()} CPUs), got {n:,}: more "
            "processes only take memory from each other."
        )
