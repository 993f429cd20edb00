"""Measure many groups of sub-architectures on the same images, a block of them at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from nad_attr.data.labels import Task, other_images, own_images
from nad_attr.data.sources import Data, as_source
from nad_attr.evaluation.ablation import ABLATIONS, Ablation, as_ablation, fit_ablation
from nad_attr.evaluation.measures import among, auc, constant_up_to_rounding, measures_of_rows
from nad_attr.evaluation.responses import (
    Responses,
    answers,
    as_architectures,
    check_own,
    progress_bar,
)
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.session import fit_constants
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.stats.tables import FloatArray

__all__ = ["GRID_MEASURES", "Grid", "fitted", "measure_grid"]


#: What is measured at every size, as in :class:`nad_attr.evaluation.Evaluation`.
GRID_MEASURES = (
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

#: Bytes of answers that are kept at once if the options give no limit.
GRID_BYTES = 2**28

#: Those that need the outputs of the other tasks as well.
OF_OTHERS = ("other_auc", "disentanglement")


def check_measure(name: Any, known: Collection[str] = GRID_MEASURES) -> str:
    """A measure's name; a ValueError if there is no such measure."""
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"no measure {name!r}; there are {', '.join(known)}.")
    return name


#: The ablation value that is fitted to each sub-architecture.
OPTIMAL = "optimal"


def recipe_of(ranks: Any) -> Recipe | None:
    """The recipe for constants with as many images and passes as gates were learned with."""
    gates = next(iter(ranks.values()), None) if isinstance(ranks, Mapping) else ranks
    recipe = gates.recipe if isinstance(gates, TaskGates) else None
    if recipe is None or isinstance(recipe, PaperRecipe) or recipe.ablation == OPTIMAL:
        return None if isinstance(recipe, PaperRecipe) else recipe
    steps, images = recipe.steps, recipe.images_per_step
    return Recipe(steps=steps, images_per_step=images)


def fitted_on(groups: Sequence[Sequence[SubArchitecture]]) -> int | None:
    """On how many images the sub-architectures' own constants were fitted, if it is one number."""
    numbers = {arch.fitted_on for group in groups for arch in group if arch.own_constants}
    return numbers.pop() if len(numbers) == 1 else None


def own_constants(
    model: nn.Module,
    groups: Sequence[Sequence[SubArchitecture]],
    train_data: Data | None,
    known: Sequence[bool],
    recipe: Recipe | None,
    run: RunOptions | None,
) -> list[list[SubArchitecture]]:
    """Each sub-architecture with the constants that keep its task output best.

    The G groups are T sub-architectures each, of the same tasks in the same order; those that are
    ``known`` have their constants already.
    """
    if train_data is None:
        raise ValueError(
            f"ablation {OPTIMAL!r} needs train_data=, images to fit constants to, other than those "
            "that are measured."
        )
    return [
        list(group)
        # Where nothing is closed there is nothing to fit.
        if has or all(arch.size == 1 for arch in group)
        else fit_constants(model, group, train_data, recipe=recipe, run=run)
        for group, has in zip(groups, known, strict=True)
    ]


def fitted(
    model: nn.Module,
    sites: Sequence[GateSite],
    tasks: Sequence[Task],
    ablation: Ablation | str | None,
    train_data: Data | None,
    run: RunOptions | None,
) -> Ablation | None:
    """The ablation value of an argument, fitted to training images if necessary.

    Raises:
        ValueError: If there is no such kind, or images are needed and not given.
    """
    if not isinstance(ablation, str) or ablation == "zero" or ablation not in ABLATIONS:
        return as_ablation(ablation)
    if train_data is None:
        raise ValueError(
            f"ablation {ablation!r} needs train_data=, images to fit it to, other than those that "
            "are measured; or pass what fit_ablation(model, sites, data, ...) returns."
        )
    return fit_ablation(model, sites, train_data, kind=ablation, tasks=tasks, run=run)


@dataclass(frozen=True, eq=False)
class Grid:
    """Measures of G groups of T sub-architectures, and of the whole network.

    Attributes:
        values: ``{measure: (G, T)}``.
        whole: ``{measure: (T,)}``.
        n_images: Images that were measured.
    """

    values: Mapping[str, FloatArray]
    whole: Mapping[str, FloatArray]
    n_images: int


def _array(values: Tensor) -> FloatArray:
    return np.asarray(values.double().cpu().numpy())


def _measured(
    outputs: Tensor,
    explained: Tensor,
    margins: Tensor,
    calls: Tensor,
    own: Tensor,
    known: Tensor,
    of_targets: bool,
    columns: Sequence[int],
    responses: Responses,
) -> dict[str, FloatArray]:
    """All measures of R rows, each of a task (``columns``: numbers among the J tasks).

    Outputs are (R, N, J), with J = 0 if other tasks are not measured; ``explained``, each row's own
    output, margins and calls (R, N); ``own`` and ``known`` bool (J, N). Fidelity and rounding refer
    to the whole network's ``responses``.
    """
    at = list(columns)
    clean = responses.whole.T
    mine, counts, whole = own[at], known[at], clean[at]
    level = constant_up_to_rounding(explained, whole)
    tasks = [responses.columns[column] for column in at]
    labels, whole_margins = responses.labels, responses.whole_margin.T[at]
    found = measures_of_rows(
        tasks, level, whole, margins, whole_margins, calls, labels, mine, counts, of_targets
    )
    result = {name: _array(values) for name, values in found.items()}
    own_auc = among(counts, auc, level, mine)
    result["own_auc"] = np.full(len(at), np.nan) if of_targets else _array(own_auc)
    result["ba"] = (result["recall"] + 1 - result["fpr"]) / 2
    if outputs.shape[-1]:
        others = []
        # One row at a time: the ranks of a whole (R, J, N) array would fill the memory.
        for values, column in zip(outputs, at, strict=True):
            row = _array(among(known, auc, constant_up_to_rounding(values.T, clean), own))
            if of_targets:
                row[:] = np.nan
            row[column] = np.nan
            there = row[~np.isnan(row)]
            others.append(there.mean() if len(there) else math.nan)
        result["other_auc"] = np.array(others)
        result["disentanglement"] = result["own_auc"] - result["other_auc"]
    return {name: result[name] for name in GRID_MEASURES if name in result}


def measure_grid(
    model: nn.Module,
    groups: Sequence[Sequence[SubArchitecture]],
    data: Data,
    *,
    ablation: Ablation | str | None = None,
    others: bool = True,
    run: RunOptions | None = None,
) -> Grid:
    """The measures of :func:`nad_attr.evaluation.evaluate` for many groups at once.

    The G groups are T sub-architectures each, all of the same sites and of the same tasks in the
    same order. With ``others``, the outputs of the other tasks are measured as well. The result is
    a function of the sub-architectures and the images alone: not of ``run.memory_limit`` or the
    other groups.

    Raises:
        GatingError, SiteError, TypeError, ValueError: As :func:`nad_attr.evaluation.evaluate`.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> data = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0, 1])
        >>> keeps = [SubArchitecture.from_kept({"0": [0]}, [GateSite("0", 2, 1)], task=0)]
        >>> measure_grid(net, [keeps, [~keeps[0]]], data).values["own_auc"].tolist()
        [[1.0], [0.5]]
    """
    archs = as_architectures([arch for group in groups for arch in group], None)
    tasks = tuple(_task(arch) for arch in groups[0])
    if any(tuple(_task(arch) for arch in group) != tasks for group in groups):
        raise ValueError("groups must be of the same tasks in the same order.")
    chosen = as_ablation(ablation)
    runner = Runner(model, run)
    source = as_source(data, any_labels=True)
    runner.fit(source)
    own = own_images(source.labels, tasks)
    check_own(own, tasks, source.labels, stacklevel=3)
    known, of_targets = own | other_images(source.labels, tasks), source.targets is not None

    n = len(source.labels)
    kept = runner.options.kept_bytes(GRID_BYTES)
    per_row = 4 * n * (len(tasks) if others else 1)
    blocks = list(chunks(len(archs), max(1, kept // per_row)))
    column_of = {task: j for j, task in enumerate(tasks)}
    columns = [column_of[_task(arch)] for arch in archs]
    parts: list[dict[str, FloatArray]] = []
    whole: dict[str, FloatArray] = {}
    responses: Responses | None = None
    with progress_bar(runner, len(archs), n * len(blocks)) as bar:
        for block in blocks:
            responses = answers(
                runner,
                archs[block[0] : block[-1] + 1],
                source,
                ablation=chosen,
                bar=bar,
                columns=tasks,
                whole=responses,
                own_only=not others,
            )
            if not whole:
                whole = _whole(responses, own, known, of_targets, others)
            at = columns[block[0] : block[-1] + 1]
            gated = responses.gated
            parts.append(
                _measured(
                    gated if others else gated[..., :0],
                    gated[range(len(at)), :, at] if others else gated[..., 0],
                    responses.gated_margin,
                    responses.gated_class,
                    own,
                    known,
                    of_targets,
                    at,
                    responses,
                )
            )
    values = {
        name: np.concatenate([part[name] for part in parts]).reshape(len(groups), len(tasks))
        for name in parts[0]
    }
    return Grid(values=values, whole=whole, n_images=n)


def _task(arch: SubArchitecture) -> Task:
    assert arch.task is not None  # as_architectures has refused those without
    return arch.task


def _whole(
    responses: Responses, own: Tensor, known: Tensor, of_targets: bool, others: bool
) -> dict[str, FloatArray]:
    """The same measures of the whole network, once for each task."""
    clean = responses.whole.T
    n_tasks = len(clean)
    # One row for all tasks: the outputs are the same for each.
    every = responses.whole[None].expand(n_tasks, -1, -1)
    return _measured(
        every if others else every[..., :0],
        clean,
        responses.whole_margin.T,
        responses.whole_class.expand(n_tasks, -1),
        own,
        known,
        of_targets,
        range(n_tasks),
        responses,
    )
