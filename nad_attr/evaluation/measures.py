"""Is a sub-architecture true? What it still computes, as a detector and as a classifier.

Three layers: measures as pure functions of tensors (:func:`auc`, :func:`r_squared`,
:func:`spearman`, :func:`fidelity`), the sweep of data through all sub-architectures
(:func:`sweep`), and the result that puts them together (:func:`evaluate`).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from nad_attr.architecture import SubArchitecture
from nad_attr.data import Data, Source, as_source
from nad_attr.gates import Task, TaskGates, as_task
from nad_attr.gating import installed, multiply
from nad_attr.objective import task_outputs
from nad_attr.running import Runner, check_batch_size, check_classes, chunks
from nad_attr.sites import GateSite

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "MEASURES",
    "Evaluation",
    "Responses",
    "auc",
    "balanced_weights",
    "evaluate",
    "fidelity",
    "own_images",
    "r_squared",
    "spearman",
    "sweep",
]

FloatArray: TypeAlias = "NDArray[np.float64]"

#: Names that :meth:`Evaluation.mean` and :meth:`Evaluation.interval` know: one number per task.
MEASURES = (
    "size",
    "own_auc",
    "other_auc",
    "disentanglement",
    "fidelity",
    "rank_fidelity",
    "margin_auc",
    "recall",
    "fpr",
    "ba",
    "other_accuracy",
)


# -- Measures as functions ---------------------------------------------------------------------


def _numbers(values: Any, what: str) -> Tensor:
    tensor = torch.as_tensor(values).detach()
    if tensor.ndim == 0 or tensor.is_complex():
        raise ValueError(f"{what} must be real numbers with the images on the last axis.")
    tensor = tensor.double()
    if bool(tensor.isnan().any()):
        raise ValueError(f"{what} hold NaN; leave those images out.")
    return tensor


def _together(*tensors: Tensor) -> tuple[Tensor, ...]:
    try:
        return tuple(torch.broadcast_tensors(*tensors))
    except RuntimeError:
        shapes = " and ".join(str(tuple(t.shape)) for t in tensors)
        raise ValueError(f"shapes {shapes} do not fit; the last axis is the images.") from None


def _midranks(values: Tensor, weights: Tensor | None = None) -> Tensor:
    """The weight of all smaller values plus half the weight of equal ones, on the last axis."""
    values = values.contiguous()
    ordered, order = values.sort(dim=-1)
    below = torch.searchsorted(ordered, values)
    up_to = torch.searchsorted(ordered, values, right=True)
    if weights is None:
        return (below + up_to).double() / 2
    total = torch.nn.functional.pad(weights.gather(-1, order).cumsum(-1), (1, 0))
    return (total.gather(-1, below) + total.gather(-1, up_to)) / 2


def auc(scores: Tensor, positive: Tensor) -> Tensor:
    """Area under the ROC curve: P(score of a positive > of a negative) + P(equal) / 2.

    Args:
        scores: (..., N), higher = more positive; infinite scores are allowed.
        positive: bool (..., N); leading axes broadcast against those of ``scores``.

    Returns:
        float64 (...); NaN where there is no positive or no negative.

    Raises:
        TypeError: If ``positive`` is not boolean.
        ValueError: If scores hold NaN or the shapes do not fit.

    Example:
        >>> auc(torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([False, False, True, True]))
        tensor(0.8750, dtype=torch.float64)
    """
    positive = torch.as_tensor(positive)
    if positive.dtype != torch.bool:
        raise TypeError(f"positive must be boolean, not {positive.dtype}.")
    scores, positive = _together(_numbers(scores, "scores"), positive)
    n_positive = positive.sum(-1, dtype=torch.float64)
    n_negative = positive.shape[-1] - n_positive
    # Mann and Whitney's U. A rank counts from 1, a midrank as above from one half.
    ranks = torch.where(positive, _midranks(scores), 0.0).sum(-1)
    return (ranks - n_positive.square() / 2) / (n_positive * n_negative)


def _shares(weights: Tensor | None, like: Tensor) -> Tensor:
    """Weights that sum to one over the images; NaN where they sum to zero."""
    if weights is None:
        weights = torch.ones_like(like)
    weights = weights.expand_as(like)
    if bool((weights < 0).any()):
        raise ValueError("weights must not be negative.")
    return weights / weights.sum(-1, keepdim=True)


def _varies(values: Tensor, weights: Tensor | None) -> Tensor:
    """Whether there are two different values among those that count (exact, no rounding)."""
    if values.shape[-1] == 0:
        return torch.zeros(values.shape[:-1], dtype=torch.bool, device=values.device)
    counts = torch.ones_like(values, dtype=torch.bool) if weights is None else weights > 0
    low = values.masked_fill(~counts, torch.inf).amin(-1)
    return values.masked_fill(~counts, -torch.inf).amax(-1) > low


def _prepared(
    a: Any, b: Any, names: tuple[str, str], weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    first, second = _numbers(a, names[0]), _numbers(b, names[1])
    if weights is None:
        first, second = _together(first, second)
        return first, second, None
    first, second, weights = _together(first, second, _numbers(weights, "weights"))
    return first, second, weights


def r_squared(whole: Tensor, gated: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """1 - mean squared difference / variance of the whole network's values.

    Not a correlation: 1 means equal values, 0 as good as always giving the mean, and below 0
    worse than that.

    Args:
        whole: (..., N), values of the whole network.
        gated: (..., N), values of the gated network.
        weights: (..., N), how much each image counts, in the mean as in the variance; None:
            all the same.

    Returns:
        float64 (...); NaN where ``whole`` does not vary.

    Raises:
        ValueError: If values hold NaN, weights are negative, or the shapes do not fit.

    Example:
        >>> r_squared(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 1.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    whole, gated, weights = _prepared(whole, gated, ("whole", "gated"), weights)
    share = _shares(weights, whole)
    mean = (share * whole).sum(-1, keepdim=True)
    variance = (share * (whole - mean).square()).sum(-1)
    error = (share * (whole - gated).square()).sum(-1)
    return torch.where(_varies(whole, weights), 1 - error / variance, torch.nan)


def spearman(a: Tensor, b: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Spearman's rank correlation: Pearson's correlation of the midranks.

    With whole-numbered weights it is exactly the rank correlation of the larger set in which each
    image stands as often as its weight says.

    Args:
        a: (..., N).
        b: (..., N).
        weights: (..., N), how often each image counts; None: once.

    Returns:
        float64 (...) in [-1, 1]; NaN where ``a`` or ``b`` does not vary.

    Raises:
        ValueError: If values hold NaN, weights are negative, or the shapes do not fit.

    Example:
        >>> spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0, 30.0, 20.0]))
        tensor(0.5000, dtype=torch.float64)
    """
    a, b, weights = _prepared(a, b, ("a", "b"), weights)
    share = _shares(weights, a)
    x, y = _midranks(a, weights), _midranks(b, weights)
    x = x - (share * x).sum(-1, keepdim=True)
    y = y - (share * y).sum(-1, keepdim=True)
    covariance = (share * x * y).sum(-1)
    # The square root of each by itself: equal rankings give 1 up to rounding, never above.
    scale = (share * x * x).sum(-1).sqrt() * (share * y * y).sum(-1).sqrt()
    known = _varies(a, weights) & _varies(b, weights)
    return torch.where(known, (covariance / scale).clamp(-1, 1), torch.nan)


def balanced_weights(own: Tensor) -> Tensor:
    """Weights with which own and other images count the same in all.

    Each own image counts as often as there are other images, and the other way round: whole
    numbers, so that a rank correlation with them is that of a balanced set.

    Args:
        own: bool (..., N).

    Returns:
        float64 (..., N); all zero where there are no own or no other images.

    Example:
        >>> balanced_weights(torch.tensor([True, False, False, False]))
        tensor([3., 1., 1., 1.], dtype=torch.float64)
    """
    n_own = own.sum(-1, keepdim=True, dtype=torch.float64)
    n_other = own.shape[-1] - n_own
    empty = (n_own == 0) | (n_other == 0)
    return torch.where(empty, 0.0, torch.where(own, n_other, n_own))


def fidelity(whole: Tensor, gated: Tensor, own: Tensor, *, ranks: bool = False) -> Tensor:
    """How well the gated network keeps a task output, over own and other images in equal parts.

    Args:
        whole: (..., N), the task output of the whole network.
        gated: (..., N), the task output of the sub-architecture.
        own: bool (..., N), which images are the task's own.
        ranks: False: :func:`r_squared`; True: :func:`spearman`; both with
            :func:`balanced_weights`.

    Returns:
        float64 (...); NaN where there are no own or no other images, or the whole network's
        output does not vary. A gated output that does not vary has no ranking: 0 with ``ranks``.

    Raises:
        ValueError: If values hold NaN or the shapes do not fit.

    Example:
        >>> own = torch.tensor([True, False, False])
        >>> fidelity(torch.tensor([4.0, 0.0, 0.0]), torch.tensor([2.0, 0.0, 0.0]), own)
        tensor(0.5000, dtype=torch.float64)
    """
    weights = balanced_weights(own)
    if not ranks:
        return r_squared(whole, gated, weights=weights)
    # Not NaN: a dead sub-architecture would drop out of the mean, and so improve it.
    whole, gated, weights = _together(whole, gated, weights)
    dead = _varies(whole, weights) & ~_varies(gated, weights)
    return torch.where(dead, 0.0, spearman(whole, gated, weights=weights))


def own_images(labels: Tensor, tasks: Sequence[Task]) -> Tensor:
    """Which images are each task's own: those of its class, or of any class of its group.

    Args:
        labels: int64 (N,).
        tasks: T class indices or groups of them.

    Returns:
        bool (T, N).

    Example:
        >>> own_images(torch.tensor([0, 1, 2]), [0, (1, 2)])
        tensor([[ True, False, False],
                [False,  True,  True]])
    """
    members = [task if isinstance(task, tuple) else (task,) for task in tasks]
    return torch.stack([torch.isin(labels, labels.new_tensor(group)) for group in members])


# -- Running the network -----------------------------------------------------------------------


@dataclass(frozen=True)
class Responses:
    """What the whole network and R sub-architectures answered to N images.

    Attributes:
        labels: int64 (N,), the images' classes.
        tasks: The R sub-architectures' tasks.
        columns: The J different tasks among them, whose task outputs are kept.
        whole: float32 (N, J), task outputs of the whole network.
        gated: float32 (R, N, J), task outputs of the sub-architectures.
        whole_class: int32 (N,), the class that the whole network calls (argmax of its outputs).
        gated_class: int32 (R, N), the class that each sub-architecture calls.
        whole_margin: float32 (N, J), task output minus the highest output of any other class.
        gated_margin: float32 (R, N), the same for each sub-architecture's own task.
    """

    labels: Tensor
    tasks: tuple[Task, ...]
    columns: tuple[Task, ...]
    whole: Tensor
    gated: Tensor
    whole_class: Tensor
    gated_class: Tensor
    whole_margin: Tensor
    gated_margin: Tensor


class _Gates:
    """The gates of R sub-architectures, put on images by row number inside one set of hooks."""

    def __init__(self, architectures: Sequence[SubArchitecture], device: torch.device) -> None:
        first = architectures[0]
        self.sites = first.sites
        self.gates = {
            name: torch.stack([arch[name] for arch in architectures]).to(device, torch.float32)
            for name in first
        }
        self.means: dict[str, Tensor] | None = None
        if any(arch.means is not None for arch in architectures):
            self.means = {
                site.name: torch.stack(
                    [
                        torch.zeros(site.n_channels)
                        if arch.means is None
                        else arch.means[site.name]
                        for arch in architectures
                    ]
                ).to(device)
                for site in self.sites
            }
        #: Row of each image of the next pass; None: the whole network.
        self.rows: Tensor | None = None

    def __call__(self, site: GateSite, tensor: Tensor) -> Tensor | None:
        if self.rows is None:
            return None
        rows = self.rows.to(tensor.device)
        gate = self.gates[site.name].to(tensor.device)[rows]
        mean = None if self.means is None else self.means[site.name].to(tensor.device)[rows]
        return multiply(site, tensor, gate, mean)


def _as_architectures(
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture], size: float | None
) -> list[SubArchitecture]:
    if isinstance(architectures, TaskGates):
        return architectures.sub_architectures(size)
    if size is not None:
        raise ValueError("size= goes with TaskGates; sub-architectures have their size already.")
    if isinstance(architectures, SubArchitecture):
        architectures = [architectures]
    if not isinstance(architectures, Sequence) or not all(
        isinstance(arch, SubArchitecture) for arch in architectures
    ):
        raise TypeError(
            "architectures must be TaskGates or a sequence of SubArchitecture, not "
            f"{type(architectures).__name__}."
        )
    if not architectures:
        raise ValueError("there is no sub-architecture to evaluate.")
    for i, arch in enumerate(architectures):
        if arch.task is None:
            raise ValueError(
                f"sub-architecture {i} says no task; make it with SubArchitecture(..., task=k)."
            )
        if arch.sites != architectures[0].sites:
            raise ValueError(
                f"sub-architecture {i} has other gate sites than the first; evaluate those of "
                "different sites by themselves."
            )
    return list(architectures)


def _tasks(architectures: Sequence[SubArchitecture]) -> tuple[Task, ...]:
    return tuple(as_task(arch.task) for arch in architectures)


def _margin(outputs: Tensor, values: Tensor, members: Tensor) -> Tensor:
    """Task output minus the highest output of any class outside the task; infinite without."""
    return values - outputs.masked_fill(members, -torch.inf).amax(-1)


def sweep(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    size: float | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    show_progress: bool = False,
    forward_func: Callable[..., Any] | None = None,
    additional_forward_args: Any = None,
) -> Responses:
    """Run data through the whole network and through each sub-architecture, in one pass over it.

    Each image is loaded once. Its repetitions for the R sub-architectures are packed into full
    batches, with one gate vector per image. The answers, not the images, are kept: about
    ``4 R N J`` bytes on the CPU. Several sub-architectures may have the same task.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: As in :func:`evaluate`.
        data: As in :func:`evaluate`.
        size: As in :func:`evaluate`.
        batch_size: Images in a forward pass, at most.
        device: Where to run. None: where the network is. Elsewhere, a copy of it is used.
        show_progress: Show a bar of the images done (tqdm).
        forward_func: Called with the inputs in place of the network; has to run the network.
        additional_forward_args: Further arguments of every call, the same for all images.

    Returns:
        The answers, in the order of the data and of ``architectures``.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, a sub-architecture says no task, labels or
            tasks are no class of the network, or inputs or outputs hold NaN.
    """
    archs = _as_architectures(architectures, size)
    check_batch_size(batch_size)
    runner = Runner(
        model,
        device=device,
        forward_func=forward_func,
        additional_forward_args=additional_forward_args,
    )
    return _sweep(runner, archs, as_source(data), batch_size, show_progress)


def _sweep(
    runner: Runner,
    archs: Sequence[SubArchitecture],
    source: Source,
    batch_size: int,
    show_progress: bool,
) -> Responses:
    labels = source.labels
    tasks = _tasks(archs)
    columns = tuple(dict.fromkeys(tasks))
    n, n_rows, n_columns = len(labels), len(tasks), len(columns)
    column_of = torch.tensor([columns.index(task) for task in tasks])

    whole = torch.empty(n, n_columns)
    gated = torch.empty(n_rows, n, n_columns)
    whole_class = torch.empty(n, dtype=torch.int32)
    gated_class = torch.empty(n_rows, n, dtype=torch.int32)
    whole_margin = torch.empty(n, n_columns)
    gated_margin = torch.empty(n_rows, n)

    gates = _Gates(archs, runner.device)
    numbers = list(chunks(n, batch_size))
    bar = tqdm(
        total=n,
        unit="image",
        desc=f"evaluating {n_rows} sub-architectures",
        disable=not show_progress,
    )
    with bar, torch.no_grad(), installed(runner.model, gates.sites, gates):
        members: Tensor | None = None
        for chosen, inputs in zip(numbers, runner.draw(source, numbers), strict=True):
            here = slice(chosen[0], chosen[-1] + 1)

            gates.rows = None
            outputs = runner(inputs)
            if members is None:
                check_classes(labels, tasks, outputs.shape[1])
                members = own_images(torch.arange(outputs.shape[1]), columns).to(outputs.device)
            if bool(outputs.isnan().any()):
                bad = int(outputs.isnan().any(1).nonzero()[0])
                raise ValueError(f"the network gives NaN for image {chosen[bad]}.")
            values = task_outputs(outputs, columns)
            whole[here] = values.cpu()
            whole_class[here] = outputs.argmax(1).to("cpu", torch.int32)
            for j in range(n_columns):
                whole_margin[here, j] = _margin(outputs, values[:, j], members[j]).cpu()

            for pairs in chunks(n_rows * len(chosen), batch_size):
                pair = torch.arange(pairs[0], pairs[-1] + 1)
                rows, images = pair // len(chosen), pair % len(chosen)
                gates.rows = rows
                outputs = runner(tuple(x[images.to(x.device)] for x in inputs))
                if bool(outputs.isnan().any()):
                    bad = int(outputs.isnan().any(1).nonzero()[0])
                    who = f"the sub-architecture of task {tasks[int(rows[bad])]}"
                    raise ValueError(f"{who} gives NaN for image {chosen[int(images[bad])]}.")
                values = task_outputs(outputs, columns)
                column = column_of[rows].to(values.device)
                own = values.gather(1, column[:, None])[:, 0]
                at = images + chosen[0]
                gated[rows, at] = values.to("cpu", torch.float32)
                gated_class[rows, at] = outputs.argmax(1).to("cpu", torch.int32)
                margin = _margin(outputs, own, members[column])
                gated_margin[rows, at] = margin.to("cpu", torch.float32)
            bar.update(len(chosen))
    return Responses(
        labels=labels,
        tasks=tasks,
        columns=columns,
        whole=whole,
        gated=gated,
        whole_class=whole_class,
        gated_class=gated_class,
        whole_margin=whole_margin,
        gated_margin=gated_margin,
    )


# -- The result --------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """How T sub-architectures do on N images: one number per task for each measure.

    A measure is NaN where it has no meaning: without own (or other) images in the data, or with a
    whole network whose task output does not vary. Outputs that vary by less than 1e-5 of their
    magnitude count as constant (AUC one half, rank fidelity zero): that is rounding.

    Attributes:
        tasks: T class indices or groups of them.
        task_names: T names.
        n_images: N.
        n_own: int64 (T,), own images.
        size: (T,), kept channels / all channels.
        sizes: ``{site name: (T,)}``, the same at each site.
        table: (T, T): ``table[k, j]`` is the AUC of task output j for task j's own images against
            all others, inside the sub-architecture of k.
        fidelity: (T,), see :func:`fidelity`.
        rank_fidelity: (T,), see :func:`fidelity` with ``ranks=True``.
        margin_auc: (T,), AUC of the task output minus the highest output of any other class.
        recall: (T,), share of own images that the sub-architecture calls its task: the class with
            the highest output is the task, or a member of the group.
        fpr: (T,), share of other images that it calls its task.
        other_accuracy: (T,), share of other images that it calls by their own right class.
    """

    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    n_images: int
    n_own: NDArray[np.int64]
    size: FloatArray
    sizes: dict[str, FloatArray]
    table: FloatArray
    fidelity: FloatArray
    rank_fidelity: FloatArray
    margin_auc: FloatArray
    recall: FloatArray
    fpr: FloatArray
    other_accuracy: FloatArray
    _whole: Evaluation | None = field(default=None)

    @property
    def whole(self) -> Evaluation:
        """The same measures of the whole network, which is its own whole."""
        return self if self._whole is None else self._whole

    @property
    def own_auc(self) -> FloatArray:
        """(T,), the table's diagonal."""
        return self.table.diagonal().copy()

    @property
    def other_auc(self) -> FloatArray:
        """(T,), mean of the table's row off the diagonal, over tasks that have own images."""
        off = self.table.copy()
        np.fill_diagonal(off, np.nan)
        known = ~np.isnan(off)
        total = np.where(known, off, 0.0).sum(1)
        count = known.sum(1)
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    @property
    def disentanglement(self) -> FloatArray:
        """(T,), own AUC - other AUC."""
        return self.own_auc - self.other_auc

    @property
    def ba(self) -> FloatArray:
        """(T,), balanced accuracy ``(recall + 1 - fpr) / 2``."""
        return np.asarray((self.recall + 1 - self.fpr) / 2)

    def _values(self, name: str) -> FloatArray:
        if name not in MEASURES:
            raise ValueError(f"no measure {name!r}; there are {', '.join(MEASURES)}.")
        values: FloatArray = getattr(self, name)
        return values

    def mean(self, name: str) -> float:
        """Mean of a measure over the tasks for which it is known.

        Raises:
            ValueError: If there is no such measure.
        """
        values = self._values(name)
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else math.nan

    def interval(
        self, name: str, *, level: float = 0.95, n_draws: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """Bootstrap interval of the mean over tasks (percentiles of resampled means).

        Says how much the mean hangs on which tasks were looked at; the images are taken as given.

        Args:
            name: One of ``MEASURES``.
            level: Coverage.
            n_draws: Times that T tasks are drawn with replacement.
            seed: Of the draws; the global random state is not used.

        Returns:
            Lower and upper end; NaN with fewer than two tasks.

        Raises:
            ValueError: If there is no such measure, or an argument makes no sense.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, not {level!r}.")
        if n_draws < 1:
            raise ValueError(f"n_draws must be at least 1, not {n_draws!r}.")
        values = self._values(name)
        values = values[~np.isnan(values)]
        if len(values) < 2:
            return math.nan, math.nan
        drawn = np.random.default_rng(seed).integers(len(values), size=(n_draws, len(values)))
        ends = np.quantile(values[drawn].mean(1), [(1 - level) / 2, (1 + level) / 2])
        return float(ends[0]), float(ends[1])

    def frame(self) -> pd.DataFrame:
        """One row per task with all measures, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError(
                "Evaluation.frame() needs pandas (pip install pandas); summary(), to_dict() and "
                "save_json() do without."
            ) from error
        # tupleize_cols: a group of classes is one task, not a level of an index each.
        index = pd.Index(list(self.tasks), name="task", tupleize_cols=False)
        columns: dict[str, Any] = {"name": list(self.task_names), "n_own": self.n_own}
        columns |= {name: self._values(name) for name in MEASURES}
        return pd.DataFrame(columns, index=index)

    def summary(self, *, max_tasks: int = 20) -> str:
        """A table as plain text: tasks, their mean with its 95 % interval, and the whole network.

        Recall never stands without FPR and own AUC: a network that always says k has recall 1.

        Args:
            max_tasks: Tasks that are listed one by one, at most.
        """
        head = {
            "size": "size",
            "own_auc": "own AUC",
            "other_auc": "other AUC",
            "fidelity": "fidelity",
            "recall": "recall",
            "fpr": "FPR",
            "ba": "BA",
            "other_accuracy": "other acc.",
        }
        rows = [["task", *head.values()]]
        for k, name in enumerate(self.task_names[:max_tasks]):
            rows.append([name, *(_number(self._values(m)[k]) for m in head)])
        if len(self.tasks) > max_tasks:
            rows.append([f"... {len(self.tasks) - max_tasks} more", *("" for _ in head)])
        n_listed = len(rows)
        rows.append(["mean", *(_number(self.mean(m)) for m in head)])
        if len(self.tasks) > 1:
            ends = {m: self.interval(m) for m in head}
            rows.append(["  95 % from", *(_number(ends[m][0]) for m in head)])
            rows.append(["  to", *(_number(ends[m][1]) for m in head)])
        if self._whole is not None:
            rows.append(["whole network", *(_number(self.whole.mean(m)) for m in head)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
            ).rstrip()
            for row in rows
        ]
        rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
        what = "the whole network" if self._whole is None else "sub-architectures"
        title = f"{what} of {len(self.tasks)} task(s) on {self.n_images} images"
        return "\n".join([title, lines[0], rule, *lines[1:n_listed], rule, *lines[n_listed:]])

    def to_dict(self) -> dict[str, Any]:
        """Everything as lists, numbers and strings; NaN becomes None, as JSON has no NaN."""
        result: dict[str, Any] = {
            "tasks": [list(task) if isinstance(task, tuple) else task for task in self.tasks],
            "task_names": list(self.task_names),
            "n_images": self.n_images,
            "n_own": self.n_own.tolist(),
            "means": {
                name: {
                    "mean": _plain(self.mean(name)),
                    "interval_95": _plain(list(self.interval(name))),
                }
                for name in MEASURES
            },
            **{name: _plain(self._values(name).tolist()) for name in MEASURES},
            "sizes": {name: _plain(size.tolist()) for name, size in self.sizes.items()},
            "table": _plain(self.table.tolist()),
        }
        if self._whole is not None:
            result["whole"] = self._whole.to_dict()
        return result

    def save_json(self, path: str | PathLike[str]) -> None:
        """Write :meth:`to_dict` to a JSON file.

        Raises:
            OSError: If the file cannot be written.
        """
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        with open(fspath(path), "w", encoding="utf-8") as file:
            file.write(text + "\n")

    def __repr__(self) -> str:
        return (
            f"Evaluation({len(self.tasks)} tasks, {self.n_images} images, size "
            f"{_number(self.mean('size'))}, own AUC {_number(self.mean('own_auc'))}, other AUC "
            f"{_number(self.mean('other_auc'))}, fidelity {_number(self.mean('fidelity'))})"
        )


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _share(flags: Tensor, among: Tensor) -> FloatArray:
    """Share of True in ``flags`` among the images that count; NaN where none does."""
    count = among.sum(-1, dtype=torch.float64)
    return _array((flags & among).sum(-1, dtype=torch.float64) / count)


def _array(values: Tensor) -> FloatArray:
    return np.asarray(values.double().numpy())


def _classifier(
    calls: Tensor, labels: Tensor, own: Tensor, tasks: Sequence[Task]
) -> dict[str, Any]:
    """Recall, FPR and other-task accuracy from the classes that are called, (T, N)."""
    called = torch.stack(
        [own_images(call, [task])[0] for call, task in zip(calls, tasks, strict=True)]
    )
    return {
        "recall": _share(called, own),
        "fpr": _share(called, ~own),
        "other_accuracy": _share(calls == labels, ~own),
    }


#: Outputs that vary by less than this share of their magnitude are equal up to rounding.
ROUNDING = 1e-5


def _levelled(values: Tensor, whole: Tensor) -> Tensor:
    """Make outputs (..., N) constant that vary by rounding alone, measured by the whole network's.

    Where channels are closed at their means, a dead sub-architecture gives the same output for all
    images up to rounding, which depends on an image's place in its batch, and so on its class if
    the data are in order. Rank measures would take that for evidence.
    """
    if values.shape[-1] == 0:
        return values
    scale = torch.maximum(values.abs().amax(-1), whole.abs().amax(-1))
    constant = values.amax(-1) - values.amin(-1) <= ROUNDING * scale
    return torch.where(constant[..., None], values[..., :1], values)


def _margin_auc(margins: Tensor, whole: Tensor, own: Tensor) -> FloatArray:
    # With no other class at all the margin is infinite for every image, and says nothing.
    values = _array(auc(_levelled(margins, whole), own))
    return np.where(_array(torch.isfinite(margins).any(-1)) > 0, values, np.nan)


def _measured(
    responses: Responses, archs: Sequence[SubArchitecture], names: Sequence[str]
) -> Evaluation:
    """All measures, from the answers alone. Rows and columns of the answers are the same tasks."""
    tasks, labels = responses.tasks, responses.labels
    own = own_images(labels, tasks)
    n_tasks = len(tasks)
    common: dict[str, Any] = {
        "tasks": tasks,
        "task_names": tuple(names),
        "n_images": len(labels),
        "n_own": own.sum(-1).numpy(),
    }
    whole = _levelled(responses.whole.T, responses.whole.T)
    row = _array(auc(whole, own))
    margin = responses.whole_margin.T
    whole_calls = responses.whole_class.expand(n_tasks, -1)
    whole_result = Evaluation(
        **common,
        size=np.ones(n_tasks),
        sizes={name: np.ones(n_tasks) for name in archs[0]},
        table=np.tile(row, (n_tasks, 1)),
        fidelity=_array(fidelity(whole, whole, own)),
        rank_fidelity=_array(fidelity(whole, whole, own, ranks=True)),
        margin_auc=_margin_auc(margin, margin, own),
        **_classifier(whole_calls, labels, own, tasks),
    )
    gated = responses.gated
    explained = _levelled(torch.stack([gated[k, :, k] for k in range(n_tasks)]), whole)
    return Evaluation(
        **common,
        size=np.array([arch.size for arch in archs]),
        sizes={name: np.array([arch.sizes[name] for arch in archs]) for name in archs[0]},
        # One task at a time: the ranks of a whole (T, T, N) array would fill the memory.
        table=np.stack([_array(auc(_levelled(gated[k].T, whole), own)) for k in range(n_tasks)]),
        fidelity=_array(fidelity(whole, explained, own)),
        rank_fidelity=_array(fidelity(whole, explained, own, ranks=True)),
        margin_auc=_margin_auc(responses.gated_margin, margin, own),
        **_classifier(responses.gated_class, labels, own, tasks),
        _whole=whole_result,
    )


def evaluate(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    size: float | None = None,
    batch_size: int = 64,
    device: torch.device | str | None = None,
    show_progress: bool = False,
    forward_func: Callable[..., Any] | None = None,
    additional_forward_args: Any = None,
) -> Evaluation:
    """Measure sub-architectures on held-out images, beside the whole network on the same ones.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: Task gates, or sub-architectures of the same sites, each of another task.
            A closed channel becomes what they say: zero, or their means.
        data: Images that the gates were not learned on: ``(inputs, labels)`` tensors, a Dataset
            of (input, label) or a DataLoader.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        batch_size: Images in a forward pass, at most.
        device: Where to run. None: where the network is. Elsewhere, a copy of it is used.
        show_progress: Show a bar of the images done (tqdm).
        forward_func: Called with the inputs in place of the network; has to run the network.
            Returns (B, K), one output per class.
        additional_forward_args: Further arguments of every call, the same for all images.

    Returns:
        The measures. A task without own images in the data gets NaN and a warning.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, a sub-architecture says no task, a task is
            there twice, no task has own images, labels or tasks are no class of the network, or
            inputs or outputs hold NaN.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> keeps_0 = SubArchitecture.from_kept({"0": [0]}, [GateSite("0", 2, 1)], task=0)
        >>> result = evaluate(net, [keeps_0], (images, torch.tensor([0, 0, 1, 1])))
        >>> result.own_auc, result.recall, result.fpr
        (array([1.]), array([1.]), array([1.]))
    """
    archs = _as_architectures(architectures, size)
    tasks = _tasks(archs)
    twice = [task for task in tasks if tasks.count(task) > 1]
    if twice:
        raise ValueError(
            f"task {twice[0]} is there twice; evaluate one sub-architecture per task at a time."
        )
    check_batch_size(batch_size)
    runner = Runner(
        model,
        device=device,
        forward_func=forward_func,
        additional_forward_args=additional_forward_args,
    )
    source = as_source(data)
    has_own = own_images(source.labels, tasks).any(-1)
    if not bool(has_own.any()):
        raise ValueError(
            f"data holds no image of any of the tasks {list(tasks[:10])}; its labels are "
            f"{source.labels.unique().tolist()[:10]}."
        )
    responses = _sweep(runner, archs, source, batch_size, show_progress)
    missing = [task for task, has in zip(tasks, has_own.tolist(), strict=True) if not has]
    if missing:
        warnings.warn(
            f"data holds no image of task(s) {missing[:10]}: their measures are NaN.",
            stacklevel=2,
        )
    names = architectures.task_names if isinstance(architectures, TaskGates) else None
    return _measured(responses, archs, names or [str(task) for task in tasks])
