"""How sure each channel is, and whether it is needed: the result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from nad_attr._display import MOST_ROWS, html_table
from nad_attr.certainty.bounds import exact_interval, false_selections
from nad_attr.certainty.testing import CLOSED, LABELS
from nad_attr.data.labels import Task
from nad_attr.gates.channels import gate_of_channel, n_channels, n_gates, split_sites
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result
from nad_attr.stats.tables import number, pandas, table

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["Alternatives", "ChannelCertainty"]

FloatArray: TypeAlias = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Alternatives(Result):
    """Other sub-architectures of a task that are as faithful as its own.

    See :meth:`ChannelCertainty.alternatives`.

    Attributes:
        architectures: Those that share least first.
        overlaps: Share of the task's kept channels that each keeps as well.
        lost: Fidelity that each loses against the task's own; negative where it gains.
        shared: The channels that all of them keep, and the task's own sub-architecture.
        n_tried: How many were tried.
    """

    architectures: tuple[SubArchitecture, ...]
    overlaps: tuple[float, ...]
    lost: tuple[float, ...]
    shared: SubArchitecture
    n_tried: int

    def __len__(self) -> int:
        return len(self.architectures)

    def _records(self) -> list[dict[str, Any]]:
        found = zip(self.architectures, self.overlaps, self.lost, strict=True)
        return [{"n_kept": a.n_kept, "overlap": o, "lost": lost} for a, o, lost in found]

    def __repr__(self) -> str:
        found = f"{len(self)} of {self.n_tried} tried are as faithful"
        if self.overlaps:
            found += f", the most different shares {100 * min(self.overlaps):.0f} % of the channels"
        return f"Alternatives({found}; {self.shared.n_kept} channels are in all)"


@dataclass(frozen=True, eq=False)
class ChannelCertainty(Result):
    """How sure each kept channel of each task is, and whether the task needs it.

    :func:`nad_attr.certainty` makes it. Selection and need are different things: a channel that
    every half of the images chooses may have no effect at all, and one of two copies is chosen by
    half of them though either would do.

    Attributes:
        tasks: T tasks.
        task_names: Their names.
        sites: The gate sites; channels of all sites are counted through in this order.
        gate: float64 (T, n), the gates as they were given.
        chosen: int64 (T, n), in how many of the ``2 * n_pairs`` halves a channel was chosen.
        n_pairs: Complementary pairs of halves.
        n_chosen: float64 (T,), channels that a half chooses, in the mean.
        effect: float64 (T, n), fidelity lost on held-out images if the channel is closed too; NaN
            where it was not closed, because the gradient on learning images says it does no harm.
        p: float64 (T, n), one-sided p-value of the effect; 1 where it was not closed.
        q: float64 (T, n), the least false discovery rate at which the effect is one, among the
            task's kept channels.
        label: int64 (T, n), number in ``LABELS``; 0 for channels that are not kept.
        skipped: int64 (T,), kept channels that were not closed by themselves.
        groups: For each task the groups of channels that cancel: costly one by one, and without
            effect together. An attention head is named by its first channel.
        fidelity: float64 (T,), of the task's sub-architecture on the held-out images.
        other_gates: bool (T, J, n), other sub-architectures that were tried.
        other_lost: float64 (T, J), fidelity that they lose against the task's own.
        as_faithful: bool (T, J), whether that is less than the tolerance, as far as images can say.
        means: float64 (n,), what replaces closed channels; None: zero.
        constants: float64 (T, n), what replaces them for each task; None: the means.
        alpha: Level of the tests.
        tolerance: Loss of fidelity that counts as none.
        passes: Images that were passed through the network: ``learning`` (forward and backward),
            ``testing`` (forward).
        seed: What halves and images were drawn with.

    Example:
        >>> from nad_attr import Recipe, learn_gates
        >>> from nad_attr.evaluation import planted
        >>> from nad_attr.certainty import certainty
        >>> known = planted("plain", n_classes=2, circuit_width=2, width=8, n_images=40)
        >>> recipe = Recipe(size=0.5, steps=10)
        >>> gates = learn_gates(known.model, known.data, [0], recipe, known.sites)
        >>> found = certainty(known.model, gates, known.data, known.held_out, pairs=2)
        >>> list(found.table(0))[:6]
        ['site', 'channel', 'gate', 'kept', 'selection', 'selection_low']
        >>> len(found.core(1.0)) == 1
        True
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    sites: tuple[GateSite, ...]
    gate: FloatArray
    chosen: NDArray[np.int64]
    n_pairs: int
    n_chosen: FloatArray
    effect: FloatArray
    p: FloatArray
    q: FloatArray
    label: NDArray[np.int64]
    skipped: NDArray[np.int64]
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    fidelity: FloatArray
    other_gates: NDArray[np.bool_]
    other_lost: FloatArray
    as_faithful: NDArray[np.bool_]
    means: FloatArray | None
    constants: FloatArray | None
    alpha: float
    tolerance: float
    passes: Mapping[str, int]
    seed: int

    _AXES: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("tasks", "task_names", "n_chosen", "skipped", "groups", "fidelity"), "T"),
        **dict.fromkeys(("gate", "chosen", "effect", "p", "q", "label", "constants"), "T n"),
        **{"other_gates": "T J n", "other_lost": "T J", "as_faithful": "T J", "means": "n"},
    }

    def __post_init__(self) -> None:
        n = n_channels(self.sites)
        if self.gate.shape != (len(self.tasks), n):
            raise ValueError(f"gate has shape {self.gate.shape}, not {(len(self.tasks), n)}")
        if self.label.size and not 0 <= self.label.min() <= self.label.max() < len(LABELS):
            raise ValueError("there is no such label")
        if self.n_pairs < 1 or (
            self.chosen.size
            and not (0 <= self.chosen.min() <= self.chosen.max() <= 2 * self.n_pairs)
        ):
            raise ValueError("channels cannot be chosen so many times")

    # -- what a user asks ----------------------------------------------------------------------

    def index(self, task: object) -> int:
        """Row of a task, given as class index, group or name.

        Raises:
            KeyError: If there is no such task.
        """
        for known in (self.task_names, self.tasks):
            if task in known:
                return known.index(task)
        raise KeyError(f"no task {task!r}; there are {', '.join(self.task_names[:20])}.")

    @property
    def kept(self) -> NDArray[np.bool_]:
        """Whether the task's sub-architecture keeps a channel: bool (T, n)."""
        return np.asarray(self.label != CLOSED)

    @property
    def selection(self) -> FloatArray:
        """Share of the halves that choose a channel: float64 (T, n)."""
        return np.asarray(self.chosen / (2 * self.n_pairs))

    def selection_interval(self, level: float = 0.95) -> tuple[FloatArray, FloatArray]:
        """Clopper and Pearson's interval of the selection probability, twice (T, n)."""
        return exact_interval(self.chosen, 2 * self.n_pairs, level)

    def table(self, task: object, *, closed: bool = False) -> pd.DataFrame:
        """One row for each kept channel of a task, in the order of the sites.

        Columns ``site, channel, gate, kept, selection, selection_low, selection_high, effect, q,
        label``.

        Args:
            task: Class index, group or name.
            closed: The channels that are not kept as well; their label is empty.

        Raises:
            ImportError: If pandas is not installed.
            KeyError: If there is no such task.
        """
        pd = pandas("ChannelCertainty.table()")
        row = self.index(task)
        low, high = self.selection_interval()
        columns = {
            "site": np.repeat([s.name for s in self.sites], [s.n_channels for s in self.sites]),
            "channel": np.concatenate([np.arange(s.n_channels) for s in self.sites]),
            "gate": self.gate[row],
            "kept": self.kept[row],
            "selection": self.selection[row],
            "selection_low": low[row],
            "selection_high": high[row],
            "effect": self.effect[row],
            "q": self.q[row],
            "label": np.array(LABELS, dtype=object)[self.label[row]],
        }
        frame = pd.DataFrame(columns)
        return frame if closed else frame[frame["kept"]].reset_index(drop=True)

    def frame(self) -> pd.DataFrame:
        """All channels of all tasks: ``task``, and the columns of :meth:`table`.

        Raises:
            ImportError: If pandas is not installed.
        """
        pd = pandas("ChannelCertainty.frame()")
        frames = [self.table(task, closed=True) for task in self.tasks]
        for frame, task in zip(frames, self.tasks, strict=True):
            frame.insert(0, "task", [task] * len(frame))
        return pd.concat(frames, ignore_index=True)

    def counts(self, task: object) -> dict[str, int]:
        """How many kept channels of a task have each label; a group of channels counts once."""
        row = self.label[self.index(task)]
        gate = gate_of_channel(self.sites)
        if gate is not None:
            row = row[np.unique(gate.numpy(), return_index=True)[1]]
        return {name: int((row == k).sum()) for k, name in enumerate(LABELS) if k != CLOSED}

    def false_selections(
        self,
        tau: float,
        task: object,
        assumption: Literal["unimodal", "r-concave"] = "r-concave",
    ) -> float:
        """Rarely chosen channels among those of a selection probability from ``tau`` on, at most.

        See :func:`nad_attr.certainty.false_selections`.

        Raises:
            KeyError: If there is no such task.
            ValueError: If ``tau`` is not in (1/2, 1].
        """
        row = self.index(task)
        n = n_gates(self.sites)
        return false_selections(tau, float(self.n_chosen[row]), n, self.n_pairs, assumption)

    def core(self, tau: float = 0.9) -> TaskGates:
        """The channels of each task that are chosen again from ``tau`` of all halves on.

        Task gates whose gates are one and zero, with the constants of the gates given:
        ``core(tau).sub_architecture(task)`` is the sub-architecture of one. Fit its own constants
        with :func:`nad_attr.fit_constants`.

        Args:
            tau: Threshold of the selection probability, in (0, 1].

        Raises:
            ValueError: If ``tau`` is not, or a task has no such channel.
        """
        if isinstance(tau, bool) or not isinstance(tau, (int, float)) or not 0 < tau <= 1:
            raise ValueError(f"tau must be a number above 0 and at most 1, got {tau!r}.")
        kept = self.selection >= tau - 1e-9
        empty = [self.task_names[t] for t in np.flatnonzero(~kept.any(1))]
        if empty:
            raise ValueError(
                f"no channel of task {empty[0]} is chosen in {tau:g} of the halves; the highest "
                f"selection probability is {self.selection.max(1).min():.2f}. Take a lower tau."
            )
        return self._gates(kept.astype(np.float64))

    @property
    def gates(self) -> TaskGates:
        """Task gates that are selection probabilities: a gate of .97 is chosen by 97 % of halves.

        They keep the channels that more than half of the halves choose, and rank all channels.
        """
        # Ties are ranked as the gates were given.
        tie = self.gate / (8 * self.n_pairs + 8)
        return self._gates(self.selection, self.selection + tie)

    def _gates(self, values: FloatArray, ranks: FloatArray | None = None) -> TaskGates:
        def split(array: FloatArray) -> dict[str, torch.Tensor]:
            return split_sites(torch.from_numpy(np.ascontiguousarray(array)).float(), self.sites)

        return TaskGates(
            split(values),
            self.sites,
            self.tasks,
            logits=None if ranks is None else split(ranks),
            means=None if self.means is None else split(self.means),
            constants=None if self.constants is None else split(self.constants),
            task_names=self.task_names,
        )

    def alternatives(self, task: object, max_overlap: float = 1.0) -> Alternatives:
        """Other sub-architectures that are as faithful as the task's own on held-out images.

        Those that halves of the images choose, and those that were learned with a price on the
        channels that the task's own keeps.

        Args:
            task: Class index, group or name.
            max_overlap: Share of the task's kept channels that one may share, at most.

        Raises:
            KeyError: If there is no such task.
            ValueError: If ``max_overlap`` is not in [0, 1].
        """
        if not 0 <= max_overlap <= 1:
            raise ValueError(f"max_overlap must be in [0, 1], got {max_overlap!r}.")
        row = self.index(task)
        own, masks = self.kept[row], self.other_gates[row]
        overlaps = (masks & own).sum(1) / max(int(own.sum()), 1)
        order = [
            int(j)
            for j in np.argsort(overlaps, kind="stable")
            if self.as_faithful[row, j] and overlaps[j] <= max_overlap and (masks[j] != own).any()
        ]

        def architecture(mask: NDArray[np.bool_]) -> SubArchitecture:
            wide = np.zeros_like(self.gate)
            wide[row] = mask
            return self._gates(wide).sub_architecture(self.tasks[row])

        shared = own & masks[order].all(0)
        return Alternatives(
            tuple(architecture(masks[j]) for j in order),
            tuple(float(overlaps[j]) for j in order),
            tuple(float(self.other_lost[row, j]) for j in order),
            architecture(shared),
            len(masks),
        )

    # -- how it shows itself -------------------------------------------------------------------

    def _derived(self) -> dict[str, Any]:
        return {
            "labels": list(LABELS),
            "counts": {n: self.counts(t) for n, t in zip(self.task_names, self.tasks, strict=True)},
        }

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        header = ["task", "kept", *LABELS[1:], "chosen always", "fidelity", "alternatives"]
        rows = []
        for t, (task, name) in enumerate(zip(self.tasks, self.task_names, strict=True)):
            always = int((self.kept[t] & (self.chosen[t] == 2 * self.n_pairs)).sum())
            counts = [str(n) for n in self.counts(task).values()]
            found = self.alternatives(task)
            others = f"{len(found)} of {found.n_tried}"
            kept = str(int(self.kept[t].sum()))
            rows.append([name, kept, *counts, str(always), number(self.fidelity[t]), others])
        return header, rows

    def _note(self) -> str:
        return (
            f"{self.n_pairs} pairs of halves; needed: closing it hurts (q <= {self.alpha:g}) and "
            "all that was tried without it is worse; alternatives: other sub-architectures that "
            f"lose less than {self.tolerance:g} of fidelity. {sum(self.passes.values()):,} images "
            "were passed through the network."
        )

    def summary(self) -> str:
        """How many channels of each task are needed, and how many are not known, as plain text."""
        header, rows = self._cells()
        return "\n".join([*table([header, *rows]), self._note()])

    def plot(self, task: object = None, axes: Any = None) -> Figure:
        """The kept channels of each site by label, of one task or in the mean over all.

        Args:
            task: Class index, group or name; None: the mean over tasks.
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
            KeyError: If there is no such task.
        """
        from nad_attr.certainty.plot import plot_labels

        rows = self.label if task is None else self.label[[self.index(task)]]
        return plot_labels(rows, self.sites, axes)

    def __repr__(self) -> str:
        kept = int(self.kept.sum())
        needed = int((self.label == LABELS.index("needed")).sum())
        return (
            f"ChannelCertainty({len(self.tasks)} task{'s' * (len(self.tasks) != 1)}, {kept:,} kept "
            f"channels, {needed:,} needed, {self.n_pairs} pairs of halves)"
        )

    def _repr_html_(self) -> str:
        header, rows = self._cells()
        shown = rows[:MOST_ROWS]
        more = f"and {len(rows) - len(shown)} more tasks; " if len(rows) > len(shown) else ""
        needed = [int(row[2]) / max(int(row[1]), 1) for row in shown]
        return html_table(repr(self), header, shown, bars=needed, note=more + self._note())
