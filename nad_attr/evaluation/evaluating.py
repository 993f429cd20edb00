"""Evaluate sub-architectures beside the whole network, random channels and rivals of equal size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.labels import Task, other_images, own_images
from nad_attr.data.sources import ChosenSource, Data, Source, as_source
from nad_attr.evaluation.ablation import Ablation, as_ablation
from nad_attr.evaluation.measures import (
    among,
    auc,
    balanced_accuracy,
    constant_up_to_rounding,
    fit_threshold,
    measures_of_rows,
    r_squared,
)
from nad_attr.evaluation.responses import (
    Responses,
    answers,
    as_architectures,
    check_own,
    progress_bar,
    tasks_of_rows,
)
from nad_attr.evaluation.result import Evaluation
from nad_attr.evaluation.sizes import (
    Activity,
    SiteCosts,
    count_costs,
    dead_fraction,
    flop_size,
    parameter_size,
)
from nad_attr.gates.channels import top_k_masks
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.network_checks import Checks, check_option, check_outputs
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunFields, RunOptions, as_options
from nad_attr.running.workers import Workers, in_order
from nad_attr.stats.pairs import overlap_matrix
from nad_attr.stats.tables import FloatArray
from nad_attr.system.rng import permutation, seed_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["evaluate", "random_architectures"]

#: Bytes of answers that are kept at once if the options give no limit.
ANSWER_BYTES = 10**9

#: Bytes that an image takes for one sub-architecture beside its task outputs, while ranks are made.
ROW_BYTES = 128


def random_architectures(
    architectures: Sequence[SubArchitecture], *, draw: int = 0, seed: int = 0
) -> list[SubArchitecture]:
    """Random channels, over all sites together, exactly as many as each sub-architecture keeps.

    A task's channels depend on (seed, draw, task) alone.

    Args:
        architectures: Sub-architectures, each with a task.
        draw: Number of the draw.
        seed: Another series of draws for each seed.

    Returns:
        One for each, with the same task and ablation value.

    Example:
        >>> from nad_attr import GateSite
        >>> arch = SubArchitecture.from_kept({"a": [0, 2]}, [GateSite("a", 4, 1)], task=0)
        >>> random_architectures([arch])[0].n_kept
        2
    """
    result = []
    for arch in architectures:
        generator = torch.Generator().manual_seed(seed_of(seed, "random", draw, arch.task))
        scores = {
            site.name: torch.rand(site.n_channels, generator=generator, device="cpu")
            for site in arch.sites
        }
        masks = top_k_masks(scores, arch.sites, arch.n_kept)
        result.append(arch._with_masks(masks, arch.task))
    return result


def evaluate(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    size: float | None = None,
    ablation: Ablation | str | None = None,
    threshold_data: Data | None = None,
    learned_from: Data | None = None,
    n_random: int = 3,
    rivals: Mapping[str, TaskGates | Sequence[SubArchitecture]] | None = None,
    seed: int = 0,
    run: RunOptions | None = None,
    checks: Checks = "refuse",
    executor: Workers | None = None,
    **fields: Unpack[RunFields],
) -> Evaluation:
    """Measure sub-architectures on held-out images, with random channels and rivals beside them.

    The whole network, random channels of the same sizes and rivals run on the same images, in the
    same batches. An image is run once through the whole network and once for each of T tasks times
    ``1 + n_random + len(rivals)``.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: Task gates, or sub-architectures of the same sites, each of another task.
        data: Images that the gates were not learned on: ``(inputs, labels)`` tensors, a Dataset
            of (input, label) or a DataLoader.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        ablation: What closed channels become, from :func:`nad_attr.evaluation.fit_ablation`, or
            "zero". None: what each sub-architecture says (zero, or its means).
        threshold_data: Training images, to fit the threshold of the detector's balanced accuracy
            on; None: leave that measure out.
        learned_from: Images that the gates were learned from. As many of them, at most, as
            ``data`` holds are measured as well (``learned`` of the result), and the summary says
            which measures differ and what would help. None: they are not measured.
        n_random: Draws of random channels, as many over all sites together as each
            sub-architecture keeps. Those beside task gates are closed at the gates' means.
        rivals: ``{name: sub-architectures}`` of other methods, of the same sites and tasks. Task
            gates are cut to exactly as many channels as the sub-architecture beside them keeps,
            sub-architectures are taken as they are. If the gates have the best constants in place
            of closed channels, give rivals theirs (:func:`nad_attr.fit_constants`).
        seed: Of the random channels.
        run: How to run the network; see :class:`nad_attr.RunOptions`.
        checks: What to do if an image's outputs depend on chance or on the other images of its
            batch (shown on two images; on one with a ``batch_size`` of one): "refuse", "warn", or
            "off" for no check.
        executor: Runs blocks of sub-architectures elsewhere, such as on Ray's workers
            (:class:`nad_attr.distributed.RayExecutor`). Blocks are the same for any number of
            workers, and so is the result bit for bit; beside a run in this process it may differ
            in rounding.
        **fields: In place of those fields of ``run``: ``device``, ``amp``, ``batch_size``,
            ``memory_limit``, ``forward_func``, ``additional_forward_args``, ``show_progress``.

    Returns:
        The measures. A task without own images in the data gets NaN and a warning.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, a sub-architecture has no task, a task is there
            twice, no task has own images, rivals are of other sites or tasks, the ablation does not
            fit, labels or tasks are not a class of the network, or inputs or outputs hold NaN.

    Example:
        >>> from nad_attr import GateSite
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 3.0]])
        >>> keeps_0 = SubArchitecture.from_kept({"0": [0]}, [GateSite("0", 2, 1)], task=0)
        >>> result = evaluate(net, [keeps_0], (images, torch.tensor([0, 0, 1, 1])))
        >>> result.own_auc, result.recall, result.fpr
        (array([1.]), array([1.]), array([1.]))
    """
    archs = as_architectures(architectures, size)
    tasks = tasks_of_rows(archs)
    twice = [task for task in tasks if tasks.count(task) > 1]
    if twice:
        raise ValueError(
            f"task {twice[0]} is there twice; evaluate one sub-architecture per task at a time."
        )
    check_count(n_random, "n_random", least=0)
    options = as_options(run, **fields)
    against = _rivals(rivals, archs, tasks)
    for draw in range(n_random):
        against[draw] = random_architectures(archs, draw=draw, seed=seed)
        if isinstance(architectures, TaskGates):
            # Constants of a task's own were fitted to other channels than these.
            against[draw] = [arch.with_means(architectures.means) for arch in against[draw]]
    chosen = as_ablation(ablation)
    runner = Runner(model, options)
    source = as_source(data, any_labels=True)
    threshold = None if threshold_data is None else as_source(threshold_data, any_labels=True)
    for some in (source, threshold):
        if some is not None:
            runner.fit(some)
    has_own = own_images(source.labels, tasks).any(-1)
    check_own(has_own[:, None], tasks, source.labels, stacklevel=2)
    if checks != "off":
        # In company also where passes hold one image: a pass of two fits beside what that took.
        (first,) = runner.draw(source, [[0]])
        (last,) = runner.draw(source, [[len(source.labels) - 1]])
        together = [] if runner.fixed_batch == 1 else [last]
        images = tuple(torch.cat(pair) for pair in zip(first, *together, strict=True))
        half = runner.amp is not None or any(
            p.dtype in (torch.float16, torch.bfloat16) for p in runner.model.parameters()
        )
        check_outputs(runner.model, runner, images, checks=check_option(checks), half=half)
    names = architectures.task_names if isinstance(architectures, TaskGates) else None
    rows = [*archs, *(arch for rival in against.values() for arch in rival)]
    pass_ = _Measuring(runner, tasks, source, threshold, chosen)
    if executor is None:
        measured = pass_.all_rows(rows)
    else:
        measured = _by_workers(executor, pass_, model, rows)

    common: dict[str, Any] = {
        "tasks": tasks,
        "task_names": tuple(names or [str(task) for task in tasks]),
        "n_images": len(source.labels),
        "n_own": pass_.own.sum(-1).numpy(),
    }
    firing = pass_.activity.firing(tasks)
    assert pass_.activity.example is not None
    costs = count_costs(runner, archs[0].sites, pass_.activity.example)
    full = SubArchitecture.full(archs[0].sites)
    n = len(tasks)
    content = common | pass_.whole() | _sizes([full] * n, costs, firing, has_own)
    whole = Evaluation(**content)
    results: dict[object, Evaluation] = {}
    for i, (name, group) in enumerate([(None, archs), *against.items()]):
        part = {key: values[i * n : (i + 1) * n] for key, values in measured.items()}
        content = common | part | _sizes(group, costs, firing, has_own)
        results[name] = Evaluation(**content, closed=_closed(group, chosen), _whole=whole)
    learned = None
    if learned_from is not None:
        learned = evaluate(
            model,
            archs,
            _some(learned_from, len(source.labels), seed),
            ablation=chosen,
            n_random=0,
            run=options,
            checks="off",
        )
    return replace(
        results[None],
        learned=learned,
        random=tuple(results[draw] for draw in range(n_random)),
        rivals={name: result for name, result in results.items() if isinstance(name, str)},
    )


def _closed(archs: Sequence[SubArchitecture], ablation: Ablation | None) -> str:
    """What replaces closed channels, in words; empty if none is closed."""
    if ablation is not None:
        return str(ablation.kind).replace("_", " ")
    return "; ".join(dict.fromkeys(arch.closed_at for arch in archs if arch.size < 1))


def _some(data: Data, n: int, seed: int) -> Source:
    """At most ``n`` of the images, drawn by the seed."""
    source = as_source(data, any_labels=True)
    if len(source.labels) <= n:
        return source
    rows = permutation(len(source.labels), seed, "learned from")[:n]
    return ChosenSource(source, rows.sort().values)


def _rivals(
    rivals: Mapping[str, TaskGates | Sequence[SubArchitecture]] | None,
    archs: Sequence[SubArchitecture],
    tasks: Sequence[Task],
) -> dict[object, list[SubArchitecture]]:
    """The rivals' sub-architectures in the order of the tasks."""
    if rivals is None:
        return {}
    if not isinstance(rivals, Mapping):
        raise TypeError(
            "rivals must be {name: task gates or sub-architectures}, got "
            f"{type(rivals).__name__}."
        )
    result: dict[object, list[SubArchitecture]] = {}
    for name, rival in rivals.items():
        if not isinstance(name, str):
            raise TypeError(f"a rival's name must be a string, got {name!r}.")
        if isinstance(rival, TaskGates):
            # Gates of further tasks do no harm.
            enough = set(tasks) <= set(rival.tasks)
            given = _cut(rival, archs) if enough else rival.sub_architectures()
        else:
            try:
                given = as_architectures(rival, None)
            except (TypeError, ValueError) as error:
                raise type(error)(f"rival {name!r}: {error}") from None
        known = tasks_of_rows(given)
        if set(known) != set(tasks):
            raise ValueError(
                f"rival {name!r} is of the tasks {list(known[:10])}, not {list(tasks[:10])}."
            )
        if len(known) != len(tasks):
            raise ValueError(f"rival {name!r} has a task twice.")
        by_task = {arch.task: arch for arch in given}
        ordered = [by_task[task] for task in tasks]
        if ordered[0].sites != archs[0].sites:
            raise ValueError(f"rival {name!r} has other gate sites than the sub-architectures.")
        result[name] = ordered
    return result


def _cut(gates: TaskGates, archs: Sequence[SubArchitecture]) -> list[SubArchitecture]:
    """The highest-ranked channels of each task's gates, as many as its sub-architecture keeps."""
    result = []
    for arch in archs:
        if arch.n_kept:
            result.append(gates.sub_architecture(arch.task, arch.size))
        else:
            none = SubArchitecture.from_kept({}, gates.sites, task=arch.task, means=gates.means)
            result.append(none)
    return result


def _sizes(
    archs: Sequence[SubArchitecture], costs: SiteCosts, firing: Mapping[str, Tensor], own: Tensor
) -> dict[str, Any]:
    """The measures that need no answers."""
    masks = {name: torch.stack([arch[name] for arch in archs]) for name in archs[0]}
    sizes = [arch.sizes for arch in archs]
    dead = [
        dead_fraction(arch, {name: fires[k] for name, fires in firing.items()})
        for k, arch in enumerate(archs)
    ]
    return {
        "size": np.array([arch.size for arch in archs]),
        "sizes": {name: np.array([size[name] for size in sizes]) for name in archs[0]},
        "flop_size": np.array([flop_size(arch, costs) for arch in archs]),
        "parameter_size": np.array([parameter_size(arch, costs) for arch in archs]),
        "dead_fraction": np.where(own.numpy(), np.array(dead), np.nan),
        "overlap": overlap_matrix(masks).numpy(),
        "kappa": overlap_matrix(masks, chance_corrected=True).numpy(),
    }


def _array(values: Tensor) -> FloatArray:
    return np.asarray(values.double().cpu().numpy())


#: Sub-architectures that a worker measures at a time.
_ROWS_PER_WORKER = 24

_Shared = tuple[nn.Module, RunOptions, tuple[Any, ...]]


def _by_workers(
    executor: Workers, pass_: _Measuring, model: nn.Module, rows: Sequence[SubArchitecture]
) -> dict[str, FloatArray]:
    """The measures of all rows; the whole network's answers go into ``pass_``."""
    blocks = [
        (k == 0, [rows[i] for i in block])
        for k, block in enumerate(chunks(len(rows), _ROWS_PER_WORKER))
    ]
    options = pass_.runner.options
    given = (pass_.tasks, pass_.source, pass_.threshold, pass_.ablation)
    with pass_.runner.bar(len(blocks), "evaluating", "block") as bar:
        found = executor.map(
            _block_measured,
            (model, options, given),
            blocks,
            begin=_on_worker,
            device=options.device,
            what="sub-architectures",
        )
        parts = in_order(found, lambda number: bar.update())
    pass_.clean, pass_.clean_threshold, pass_.activity = parts[0][1]
    return {name: np.concatenate([part[name] for part, _ in parts]) for name in parts[0][0]}


def _on_worker(shared: _Shared, device: torch.device) -> tuple[Runner, tuple[Any, ...]]:
    model, options, given = shared
    runner = Runner(model, replace(options, device=device, show_progress=False))
    runner.fit(given[1])
    return runner, given


def _block_measured(
    state: tuple[Runner, tuple[Any, ...]], block: tuple[bool, list[SubArchitecture]]
) -> tuple[dict[str, FloatArray], Any]:
    """The measures of a block; the first one also has the whole network's answers."""
    pass_ = _Measuring(state[0], *state[1])
    measured = pass_.all_rows(block[1])
    if not block[0]:
        return measured, None
    pass_.activity.to_cpu()
    return measured, (pass_.clean, pass_.clean_threshold, pass_.activity)


class _Measuring:
    """Runs blocks of rows and reduces each block's answers to measures at once."""

    def __init__(
        self,
        runner: Runner,
        tasks: tuple[Task, ...],
        source: Source,
        threshold: Source | None,
        ablation: Ablation | None,
    ) -> None:
        self.runner, self.tasks = runner, tasks
        self.source, self.threshold, self.ablation = source, threshold, ablation
        self.own = own_images(source.labels, tasks)
        self.known = self.own | other_images(source.labels, tasks)
        # Sorting a large table is quick on a GPU; float64, which mps lacks, is needed.
        self.device = torch.device("cpu") if runner.device.type == "mps" else runner.device
        self.clean: Responses | None = None
        self.clean_threshold: Responses | None = None
        self.activity: Activity

    def all_rows(self, rows: Sequence[SubArchitecture]) -> dict[str, FloatArray]:
        """The measures of all rows: ``{measure: (R,)}``, and the table (R, T)."""
        n = len(self.source.labels)
        n_threshold = 0 if self.threshold is None else len(self.threshold.labels)
        per_row = (4 * len(self.tasks) + ROW_BYTES) * n + ROW_BYTES * n_threshold
        height = max(1, self.runner.options.kept_bytes(ANSWER_BYTES) // per_row)
        blocks = list(chunks(len(rows), height))
        self.activity = Activity(rows[0].sites, self.source.labels, self.runner.device)
        parts = []
        total = len(blocks) * (n + n_threshold)
        with progress_bar(self.runner, len(rows), total) as bar:
            for block in blocks:
                archs = rows[block[0] : block[-1] + 1]
                options: dict[str, Any] = {"bar": bar, "columns": self.tasks}
                options["ablation"] = self.ablation
                found = answers(
                    self.runner,
                    archs,
                    self.source,
                    whole=self.clean,
                    watch=self.activity,
                    **options,
                )
                self.clean = replace(found, gated=torch.empty(0, device="cpu"))
                cuts = None
                if self.threshold is not None:
                    fitted = answers(
                        self.runner,
                        archs,
                        self.threshold,
                        whole=self.clean_threshold,
                        own_only=True,
                        **options,
                    )
                    self.clean_threshold = replace(fitted, gated=torch.empty(0, device="cpu"))
                    cuts = self._thresholds(fitted, fitted.gated[..., 0])
                    del fitted
                parts.append(self._reduced(found, cuts))
                del found  # before the next block's
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _thresholds(self, fitted: Responses, values: Tensor) -> Tensor:
        """The detector's threshold of each row: float64 (R,), from own task outputs (R, N)."""
        column = torch.tensor([self.tasks.index(task) for task in fitted.tasks], device="cpu")
        own = own_images(fitted.labels, self.tasks)[column]
        known = own | other_images(fitted.labels, self.tasks)[column]
        whole = fitted.whole.T[column]
        return among(
            known.to(self.device),
            fit_threshold,
            constant_up_to_rounding(values, whole).to(self.device),
            own.to(self.device),
        )

    def _reduced(self, found: Responses, thresholds: Tensor | None) -> dict[str, FloatArray]:
        """All measures that answers give, row by row."""
        column = torch.tensor([self.tasks.index(task) for task in found.tasks], device=self.device)
        own_by_task = self.own.to(self.device)
        whole_by_task = found.whole.T.to(self.device)
        # One row at a time: the ranks of a whole (R, T, N) array would fill the memory.
        table, explained = [], []
        for values, j in zip(found.gated, column.tolist(), strict=True):
            row = constant_up_to_rounding(values.T.to(self.device), whole_by_task)
            table.append(self._table_row(row, own_by_task))
            explained.append(row[j])
        return {
            "table": _array(torch.stack(table)),
            **self._by_row(
                found.tasks,
                torch.stack(explained),
                whole_by_task[column],
                found.gated_margin.to(self.device),
                found.whole_margin.T.to(self.device)[column],
                found.gated_class.to(self.device),
                own_by_task[column],
                self.known.to(self.device)[column],
                thresholds,
            ),
        }

    def _table_row(self, outputs: Tensor, own: Tensor) -> Tensor:
        """The AUC of each task's output (T, N) for its own images; none for targets."""
        if self.source.targets is not None:
            return torch.full((len(own),), torch.nan, dtype=torch.float64, device=own.device)
        return among(self.known.to(own.device), auc, outputs, own)

    def whole(self) -> dict[str, FloatArray]:
        """The same of the whole network, a row for each task."""
        assert self.clean is not None
        outputs = self.clean.whole.T.to(self.device)
        outputs = constant_up_to_rounding(outputs, outputs)
        own = self.own.to(self.device)
        margin = self.clean.whole_margin.T.to(self.device)
        cuts = None
        if self.clean_threshold is not None:
            by_task = replace(self.clean_threshold, tasks=self.tasks)
            cuts = self._thresholds(by_task, by_task.whole.T)
        row = _array(self._table_row(outputs, own))
        n = len(self.tasks)
        calls = self.clean.whole_class.to(self.device).expand(n, -1)
        return {
            "table": np.tile(row, (n, 1)),
            **self._by_row(
                self.tasks,
                outputs,
                outputs,
                margin,
                margin,
                calls,
                own,
                self.known.to(self.device),
                cuts,
            ),
        }

    def _by_row(
        self,
        tasks: Sequence[Task],
        explained: Tensor,
        whole: Tensor,
        margin: Tensor,
        whole_margin: Tensor,
        calls: Tensor,
        own: Tensor,
        known: Tensor,
        thresholds: Tensor | None,
    ) -> dict[str, FloatArray]:
        """Measures of R rows, all arguments (R, N) but the thresholds, (R,)."""
        targets = self.source.targets
        found = measures_of_rows(
            tasks,
            explained,
            constant_up_to_rounding(whole, whole),
            margin,
            whole_margin,
            calls,
            self.source.labels.to(self.device),
            own,
            known,
            of_targets=targets is not None,
        )
        found["detector_ba"] = torch.full((len(tasks),), torch.nan, device="cpu")
        if targets is None and thresholds is not None:
            ba = among(known, balanced_accuracy, explained > thresholds[:, None], own)
            found["detector_ba"] = torch.where(thresholds.isnan(), torch.nan, ba)
        if targets is not None:
            columns = [task for task in tasks if isinstance(task, int)]
            if len(columns) < len(tasks):
                raise ValueError("targets belong to single outputs; there are no groups of them.")
            wanted = targets.T[columns].to(self.device).nan_to_num()
            found["target_r2"] = among(known, r_squared, wanted, explained)
        return {name: _array(values) for name, values in found.items()}
