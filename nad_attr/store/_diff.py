"""The differences between two stores."""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from nad_attr.data.labels import Task
from nad_attr.gates.sub_architecture import same_tensors
from nad_attr.stats.results import Result
from nad_attr.store._compare import differences, different_means, some
from nad_attr.store._gate_store import GateStore
from nad_attr.system.safe_text import shown

__all__ = ["StoreDiff", "diff"]


@dataclass(frozen=True)
class StoreDiff(Result):
    """How two stores differ.

    Attributes:
        paths: The two files.
        settings: Different settings: sites, recipe, model, data, seed, means.
        only_first: Tasks of the first file only.
        only_second: Tasks of the second file only.
        changed: ``{task: (channels that only one of them keeps, largest difference of a gate)}``
            for tasks whose gates differ.
        equal: Number of tasks with the same gates, bit for bit.
        others: Scores and results of one file only.

    Example:
        See :func:`diff`.
    """

    paths: tuple[Path, Path]
    settings: tuple[str, ...]
    only_first: tuple[Task, ...]
    only_second: tuple[Task, ...]
    changed: dict[Task, tuple[int, float]]
    equal: int
    others: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Whether settings, tasks, gates, and the names of scores and results are the same."""
        return not (
            self.settings or self.only_first or self.only_second or self.changed or self.others
        )

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"task": str(task), "n_channels": n, "largest_difference": largest}
            for task, (n, largest) in self.changed.items()
        ]

    def summary(self) -> str:
        """The differences, as plain text: settings, tasks, gates, scores and results."""
        return str(self)

    def __str__(self) -> str:
        first, second = self.paths
        lines = [f"{first} and {second}: {self.equal} tasks with the same gates"]
        lines += [f"  otherwise set: {text}" for text in self.settings]
        for path, tasks in ((first, self.only_first), (second, self.only_second)):
            if tasks:
                lines.append(f"  only {path} holds {len(tasks)} tasks: {some(tasks)}")
        for task, (n, largest) in list(self.changed.items())[:20]:
            lines.append(f"  task {task}: {n} channels differ, gates by {largest:.3g} at most")
        if len(self.changed) > 20:
            lines.append(f"  ... {len(self.changed)} tasks with other gates in all")
        lines += [f"  {text}" for text in self.others]
        return "\n".join(map(shown, lines))


def diff(a: str | PathLike[str], b: str | PathLike[str]) -> StoreDiff:
    """Compare two stores.

    Args:
        a: The first file.
        b: The second file.

    Raises:
        GateStoreError: If one of them is not a readable store.

    Example:
        >>> import tempfile
        >>> from nad_attr import GateSite, TaskGates
        >>> site = GateSite("layer1", 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     a, b = f"{folder}/a.h5", f"{folder}/b.h5"
        ...     TaskGates({"layer1": torch.tensor([[0.75, 0.25]])}, [site], [7]).save(a)
        ...     TaskGates({"layer1": torch.tensor([[0.75, 0.75]])}, [site], [7]).save(b)
        ...     found = diff(a, b)
        >>> found.same, found.changed
        (False, {7: (1, 0.5)})
    """
    with GateStore.open(a) as first, GateStore.open(b) as second:
        settings = differences(first._content.head, second.sites, second.recipe, second.provenance)
        both = [task for task in first.tasks if task in second]
        changed: dict[Task, tuple[int, float]] = {}
        equal = 0
        moved: list[Task] = []
        if same_sites := first.sites == second.sites:
            settings += different_means(first.means, second.means)
        for start in range(0, len(both) if same_sites else 0, 64):
            part = both[start : start + 64]
            ours, theirs = first.read(part), second.read(part)
            constants = ours.constants or {}, theirs.constants or {}
            for i, task in enumerate(part):
                if not same_tensors(*({n: v[i] for n, v in c.items()} for c in constants)):
                    moved.append(task)
                pairs = [(ours[name][i], theirs[name][i]) for name in ours]
                if all(torch.equal(x, y) for x, y in pairs):
                    equal += 1
                else:
                    n = sum(int(((x > 0.5) != (y > 0.5)).sum()) for x, y in pairs)
                    changed[task] = (n, max(float((x - y).abs().max()) for x, y in pairs))
        if moved:
            settings.append(f"constants of {len(moved)} tasks: {some(moved)}")
        others = []
        for kind in ("score_methods", "results"):
            ours_there, theirs_there = set(getattr(first, kind)), set(getattr(second, kind))
            what = "scores of" if kind == "score_methods" else "the result"
            for name in sorted(ours_there ^ theirs_there):
                others.append(f"only {a if name in ours_there else b} holds {what} {name!r}")
        return StoreDiff(
            (first.path, second.path),
            tuple(settings),
            tuple(task for task in first.tasks if task not in second),
            tuple(task for task in second.tasks if task not in first),
            changed,
            equal,
            tuple(others),
        )
