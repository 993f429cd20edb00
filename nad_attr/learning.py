"""Learn task gates: many tasks in shared batches, gradients to gates alone."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nad_attr._version import __version__
from nad_attr.architecture import split_sites
from nad_attr.data import Data, Inputs, Source, as_source, seed_of
from nad_attr.engine import Chunk, CleanOutputs, Learned, Network
from nad_attr.gates import Task, TaskGates, as_task
from nad_attr.gating import (
    check_mapping,
    frozen,
)
from nad_attr.history import History
from nad_attr.means import channel_means
from nad_attr.paper import learn_paper, paper_steps
from nad_attr.recipe import PaperRecipe, Recipe
from nad_attr.running import check_batch_size, check_classes
from nad_attr.selection import learn_selection
from nad_attr.sites import GateSite, find_gate_sites, unwrap

__all__ = ["learn_gates"]

#: Images that the ablation value "mean" is taken over, at most.
MEAN_IMAGES = 512


def learn_gates(
    model: nn.Module,
    data: Data,
    tasks: Sequence[object] | Mapping[str, object] | None = None,
    recipe: Recipe | None = None,
    sites: Sequence[GateSite | str | nn.Module] | None = None,
    *,
    seed: int = 0,
    device: str | torch.device | None = None,
    amp: bool | torch.dtype | None = None,
    batch_size: int = 64,
    augmented: bool | None = None,
    forward_func: Callable[..., Any] | None = None,
    additional_forward_args: Any = None,
    initial_logits: Mapping[str, Tensor] | None = None,
    show_progress: bool = False,
) -> TaskGates:
    """Learn which channels of a network each task needs.

    The network itself is not changed, not even for the time of learning in a way that an exception
    could leave behind. The result is a function of network, data, recipe and seed: a task's gates
    do not depend on which tasks are learned with it, in what order, or on the batch size (beyond
    the rounding of the arithmetic).

    Args:
        model: A classifier in eval mode, on any device. DataParallel and ``torch.compile``
            wrappers are looked through.
        data: Images with labels: ``(inputs, labels)`` tensors, a Dataset of (input, label), or a
            DataLoader of such (its dataset, workers and choice of images are used; the order is
            drawn anew). ``inputs`` may be a tuple of tensors for networks that take several.
        tasks: Class indices; groups of class indices (a superclass is one task, its output the
            logsumexp over the group); or ``{name: class index or group}``. None: every class that
            the data holds.
        recipe: How to learn; None is ``Recipe()``. See :class:`nad_attr.Recipe`.
        sites: Gate sites, module names or modules; None: found by
            :func:`nad_attr.find_gate_sites`.
        seed: Any whole number; each task draws from a generator of (seed, task).
        device: Where to learn. None: where the network is. Elsewhere, a copy of it is used.
        amp: Mixed precision: a dtype for autocast, True for bfloat16. Gates stay float32.
        batch_size: Images in one pass of the network at most (a task's images of one step always
            go together). Changes memory and speed, not the result.
        augmented: Whether the same image may look different each time it is drawn. None: yes for
            datasets and loaders, no for tensors. False lets the whole network's outputs be
            computed once per image and kept.
        forward_func: What is called with the inputs in place of the model, to choose among
            several outputs, for example; must run ``model``.
        additional_forward_args: Further arguments of every call, one or a tuple of them.
        initial_logits: ``{site name: (T, C)}``, the paper recipe's starting point in place of
            N(0, 1).
        show_progress: Show a progress bar with the time left.

    Returns:
        The gates, with history and everything needed to repeat the run in ``info``.

    Raises:
        SiteError: If sites cannot be gated; says which and what to do.
        TypeError: If data, tasks or recipe are of another kind.
        ValueError: If data is empty or holds NaN, a class is unknown or without images, the
            network is in train mode, or an argument has no sensible value.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> x = torch.randn(20, 4, generator=generator)
        >>> labels = (x[:, 0] > 0).long()
        >>> gates = learn_gates(net, (x, labels), tasks=[1], recipe=Recipe(size=0.5))
        >>> gates
        TaskGates(1 task, 1 site, 6 channels, 50.0 % kept, closed channels at their mean)
        >>> gates["1"].shape
        torch.Size([1, 6])
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(recipe, Recipe):
        raise TypeError(f"recipe must be a Recipe, not {type(recipe).__name__}.")
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a torch.nn.Module, not {type(model).__name__}; a function goes into "
            "forward_func= beside the module that it runs."
        )
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed must be a whole number, not {seed!r}.")
    check_batch_size(batch_size)
    network = Network(
        model,
        device=device,
        forward_func=forward_func,
        additional_forward_args=additional_forward_args,
        amp=_amp_dtype(amp),
    )
    started = datetime.now(timezone.utc)

    # Tensors made in inference mode cannot enter a graph, so its mode must end before any is made.
    with torch.inference_mode(False), torch.enable_grad():
        source = as_source(data, augmented=augmented)
        wanted, names = _tasks(tasks, source.labels)
        _check_images(wanted, source.labels, recipe)
        example = next(iter(source.batches([[(0, 0), (len(source.labels) - 1, 0)]])))
        found = _sites(network, sites, example, additional_forward_args)
        network.sites = tuple(found)
        _check_outputs(network, example, wanted, source.labels)
        start = _start(initial_logits, recipe, found, wanted)

        per_task = recipe.images_per_step
        width = max(1, batch_size // per_task)
        groups = [range(i, min(i + width, len(wanted))) for i in range(0, len(wanted), width)]
        total = sum(_steps(task, source.labels, recipe) for task in wanted)
        learned: list[Learned] = []
        clean = CleanOutputs(network, source)
        with ExitStack() as stack:
            stack.enter_context(frozen(network.model))
            if recipe.ablation == "mean":
                network.set_means(_means(network, source, seed))
            bar = stack.enter_context(
                tqdm(total=total, desc="learning gates", unit="step", disable=not show_progress)
            )
            for group in groups:
                chunk = Chunk(
                    network,
                    source,
                    [wanted[i] for i in group],
                    seed,
                    clean=clean,
                    advance=bar.update,
                )
                if isinstance(recipe, PaperRecipe):
                    learned.append(
                        learn_paper(chunk, recipe, None if start is None else start[list(group)])
                    )
                else:
                    learned.append(learn_selection(chunk, recipe))

    gates = torch.cat([part.gates for part in learned])
    logits = torch.cat([part.logits for part in learned])
    return TaskGates(
        split_sites(gates.cpu(), found),
        found,
        wanted,
        logits=split_sites(logits.cpu(), found),
        means=network.means,
        recipe=recipe,
        history=_history([part.curves for part in learned]),
        task_names=names,
        info={
            "created_by": f"nad_attr {__version__}, torch {torch.__version__}",
            "model": type(unwrap(network.model)).__name__,
            "seed": seed,
            "device": str(network.device),
            "amp": None if network.amp is None else str(network.amp),
            "n_images": len(source.labels),
            "own_images_only": _own_only(wanted, source.labels, recipe),
            "started": started.isoformat(timespec="seconds"),
            "seconds": round((datetime.now(timezone.utc) - started).total_seconds(), 1),
        },
    )


def _amp_dtype(amp: bool | torch.dtype | None) -> torch.dtype | None:
    if amp is None or amp is False:
        return None
    if amp is True:
        return torch.bfloat16
    if amp in (torch.bfloat16, torch.float16):
        return amp
    raise ValueError(f"amp must be True, torch.bfloat16 or torch.float16, not {amp!r}.")


def _tasks(
    tasks: Sequence[object] | Mapping[str, object] | None, labels: Tensor
) -> tuple[list[Task], list[str] | None]:
    if tasks is None:
        return [int(k) for k in labels.unique()], None
    if isinstance(tasks, (str, bytes)):
        raise TypeError(f"tasks must be a list of class indices or a dictionary, not {tasks!r}.")
    names = None
    if isinstance(tasks, Mapping):
        names = [str(name) for name in tasks]
        values = list(tasks.values())
    elif isinstance(tasks, int):
        values = [tasks]
    else:
        try:
            values = list(tasks)
        except TypeError:
            raise TypeError(
                f"tasks must be a list of class indices, not {type(tasks).__name__}."
            ) from None
    wanted = [as_task(value) for value in values]
    if not wanted:
        raise ValueError("tasks is empty; name at least one class, or leave it out for all.")
    twice = [task for i, task in enumerate(wanted) if task in wanted[:i]]
    if twice:
        raise ValueError(f"task {twice[0]} is there twice.")
    return wanted, names


def _members(task: Task) -> Tensor:
    return torch.tensor([task] if isinstance(task, int) else task)


def _check_images(tasks: Sequence[Task], labels: Tensor, recipe: Recipe) -> None:
    present = labels.unique()
    for task in tasks:
        if not bool(torch.isin(_members(task), present).any()):
            shown = ", ".join(map(str, present[:20].tolist())) + (" ..." * (len(present) > 20))
            raise ValueError(
                f"there is no image of task {task} in the data; its labels are {shown}."
            )
    if isinstance(recipe, PaperRecipe):
        return
    alone = _own_only(tasks, labels, recipe)
    if alone:
        warnings.warn(
            f"task {alone[0]} has own images only: its gates keep the task output on those, and "
            "nothing says that they do not raise it on other images as well. Add images of other "
            "classes to the data for a sub-architecture that tells classes apart.",
            stacklevel=3,
        )


def _own_only(tasks: Sequence[Task], labels: Tensor, recipe: Recipe) -> list[Any]:
    """Tasks that are learned from own images alone: all of them with the paper's recipe."""
    if isinstance(recipe, PaperRecipe):
        return list(tasks)
    return [task for task in tasks if bool(torch.isin(labels, _members(task)).all())]


def _sites(
    network: Network,
    sites: Sequence[GateSite | str | nn.Module] | None,
    example: Inputs,
    additional_forward_args: Any,
) -> list[GateSite]:
    if sites is not None:
        if isinstance(sites, (str, nn.Module, GateSite)):
            sites = [sites]
        if not isinstance(sites, Iterable):
            raise TypeError(f"sites must be a list of gate sites, not {sites!r}.")
        sites = list(sites)
        if not sites:
            raise ValueError("sites is empty; leave it out to have them found.")
        if all(isinstance(site, GateSite) for site in sites):
            return [site for site in sites if isinstance(site, GateSite)]
    return find_gate_sites(
        network.model,
        network.to_device(example),
        layers=sites,
        additional_forward_args=additional_forward_args,
    )


def _check_outputs(
    network: Network, example: Inputs, tasks: Sequence[Task], labels: Tensor
) -> None:
    """One real pass: do sites, inputs and outputs fit, before hours are spent?"""
    outputs, _ = network.clean_recorded(network.to_device(example))
    check_classes(labels, tasks, outputs.shape[1])
    if not bool(torch.isfinite(outputs).all()):
        raise ValueError(
            "the network's outputs hold NaN or infinity on the first images; check weights, "
            "input range and mixed precision."
        )


def _start(
    logits: Mapping[str, Tensor] | None,
    recipe: Recipe,
    sites: Sequence[GateSite],
    tasks: Sequence[Task],
) -> Tensor | None:
    if logits is None:
        return None
    if not isinstance(recipe, PaperRecipe):
        raise ValueError(
            "initial_logits is a start for the paper's recipe; the default recipe starts from the "
            "whole network."
        )
    check_mapping(logits, "initial_logits")
    parts = []
    for site in sites:
        expected = (len(tasks), site.n_channels)
        value = logits.get(site.name)
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"initial_logits of {site.name!r} are no tensor.")
        if value is None or tuple(value.shape) != expected:
            shape = None if value is None else tuple(value.shape)
            raise ValueError(
                f"initial_logits of {site.name!r} have shape {shape}, not (tasks, channels) = "
                f"{expected}."
            )
        parts.append(value.detach())
    start = torch.cat(parts, dim=1)
    if not bool(torch.isfinite(start).all()):
        raise ValueError("initial_logits hold NaN or infinity.")
    return start


def _steps(task: Task, labels: Tensor, recipe: Recipe) -> int:
    if isinstance(recipe, PaperRecipe):
        return paper_steps(int(torch.isin(labels, _members(task)).sum()), recipe)
    return recipe.steps


def _means(network: Network, source: Source, seed: int) -> dict[str, Tensor]:
    """Mean of each channel over images of all classes, whichever tasks are learned."""
    n = len(source.labels)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed_of(seed, "means")))
    chosen = order[:MEAN_IMAGES].tolist()
    draws = [
        [(i, seed_of(seed, "means", i)) for i in chosen[a : a + 32]]
        for a in range(0, len(chosen), 32)
    ]
    batches = (network.to_device(inputs) for inputs in source.batches(draws))
    return channel_means(
        network.model, network.sites, batches, forward=lambda *inputs: network(inputs)
    )


def _history(curves: Sequence[Mapping[str, Tensor]]) -> History:
    """Join the curves of chunks side by side, shorter ones filled with NaN."""
    steps = max(len(next(iter(part.values()))) for part in curves)
    joined = {}
    for name in curves[0]:
        columns = []
        for part in curves:
            curve = part[name].detach().float().cpu().numpy()
            rest = np.full((steps - len(curve), curve.shape[1]), np.nan, np.float32)
            columns.append(np.concatenate([curve, rest]))
        joined[name] = np.concatenate(columns, axis=1)
    return History(joined)
