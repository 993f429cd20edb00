"""Classes as building blocks: several sub-architectures as one network."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from nad_attr.data.labels import Task, as_task
from nad_attr.export.costs import Summary, keep_summary, summary, total
from nad_attr.export.exporting import cut
from nad_attr.export.tracing import aten, traced
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import check_eval

__all__ = ["combine", "united"]

#: Weight of the squared distance from scale one and shift zero, beside the cross-entropy.
_RIDGE = 1e-3


def united(archs: Mapping[Task, SubArchitecture]) -> SubArchitecture:
    """The channels that any of several tasks needs; closed ones have the mean of their constants.

    Args:
        archs: ``{task: sub-architecture}``, of the same sites.

    Raises:
        ValueError: If the sites differ or there is none.

    Example:
        >>> from nad_attr import GateSite
        >>> sites = [GateSite("1", 3)]
        >>> archs = {t: SubArchitecture.from_kept({"1": [t]}, sites, task=t) for t in (0, 2)}
        >>> united(archs)["1"].tolist()
        [True, False, True]
    """
    archs = _checked(archs)
    every = list(archs.values())
    union = reduce(lambda a, b: a | b, every)
    constants = [arch._gating(None)[2] for arch in every]
    if all(values is None for values in constants):
        return union
    means = {}
    for site in union.sites:
        zero = torch.zeros(site.n_channels, device="cpu")
        each = [zero if values is None else values[site.name].float() for values in constants]
        means[site.name] = torch.stack(each).mean(0)
    return union.with_means(means)


def _checked(archs: Mapping[Task, SubArchitecture]) -> dict[Task, SubArchitecture]:
    if not isinstance(archs, Mapping) or not archs:
        raise TypeError("give {task: sub-architecture} of at least one task.")
    checked = {as_task(task): arch for task, arch in archs.items()}
    first = next(iter(checked.values()))
    for arch in checked.values():
        first._check_same_sites(arch)
    return checked


def combine(
    model: nn.Module,
    archs: Mapping[Task, SubArchitecture | nn.Module],
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    how: Literal["union", "side by side"] = "union",
    calibration: tuple[Tensor, Tensor] | None = None,
    merge_bn: bool = False,
    batch_size: int = 64,
) -> nn.Module:
    """Make one network of several classes' sub-architectures, which tells these classes apart.

    This reuses one class's part of a network in another, adds a class to a network, or replaces a
    weak one: give the sub-architectures that you want. A part of another network is given as it was
    exported there (``head="task"``).

    Args:
        model: The network that the sub-architectures are parts of; unchanged.
        archs: ``{task: sub-architecture}``, of the same sites; side by side also ``{task: module}``
            of an exported network, of which all outputs count for the task. The outputs are in this
            order; a group of classes has the logsumexp of theirs.
        example_inputs: What it is called with.
        how: ``"union"``: one network of all channels that any task needs; ``"side by side"``: each
            task's own network, of which each gives its own output.
        calibration: Images and labels, class indices of the network, on which each output gets a
            scale and a shift, so that logits of different parts can be compared (cross-entropy,
            with a slight pull to scale 1 and shift 0). Images of other classes are left out.
        merge_bn: Whether BatchNorm layers are merged.
        batch_size: Images in one pass when calibrating.

    Returns:
        A plain module, (B, ...) to (B, tasks).

    Raises:
        ExportError: If the network cannot be written as a graph.
        TypeError, ValueError: If arguments do not fit, or a task has no images to calibrate on.

    Example:
        >>> from nad_attr import GateSite
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> archs = {
        ...     t: SubArchitecture.from_kept({"1": [t, 5]}, [GateSite("1", 8)], task=t)
        ...     for t in (0, 2)
        ... }
        >>> both = combine(net, archs, torch.zeros(1, 4))
        >>> both(torch.zeros(5, 4)).shape, summary(both).outputs
        (torch.Size([5, 2]), (0, 2))
    """
    if how not in ("union", "side by side"):
        raise ValueError(f"how must be 'union' or 'side by side', got {how!r}.")
    given = archs if isinstance(archs, Mapping) else {}
    exported = {as_task(task): m for task, m in given.items() if isinstance(m, nn.Module)}
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    own: dict[Task, SubArchitecture] = {}
    if not exported or len(exported) < len(given):
        own = _checked({t: a for t, a in given.items() if not isinstance(a, nn.Module)})
    if exported and how == "union":
        raise ValueError(
            "exported networks are put together with how='side by side': a union is of the "
            "channels of one network."
        )
    for task, module in exported.items():
        shapes = tuple(tuple(x.shape[1:]) for x in inputs)
        if summary(module).input_shapes != shapes:
            raise ValueError(
                f"the network of task {task} takes inputs of {summary(module).input_shapes}, got "
                f"{shapes}: export it with images of that size."
            )
    tasks = [as_task(task) for task in given]
    groups = [(task,) if isinstance(task, int) else task for task in tasks]
    columns = [column for group in groups for column in group]
    parts: list[fx.GraphModule] = []
    if own:
        check_eval(model)
        network = traced(model, next(iter(own.values())).sites, inputs)
    if how == "union":
        parts = [cut(united(own), model, inputs, network, columns, merge_bn)]
        widths = [len(group) for group in groups]
    else:
        for task, group in zip(tasks, groups, strict=True):
            if task in own:
                parts.append(cut(own[task], model, inputs, network, list(group), merge_bn))
            else:
                module = copy.deepcopy(exported[task])
                assert isinstance(module, fx.GraphModule)  # it has a summary
                parts.append(module)
        widths = [len(summary(part).outputs) for part in parts]
    n = len(groups)
    combined = _joined(parts, widths, len(inputs), inputs[0])
    made = _summary(parts, tuple(columns), [task in exported for task in tasks])
    keep_summary(combined, made)
    if calibration is not None:
        images, labels = calibration
        images, targets = _of_tasks(images, labels, groups)
        with torch.no_grad():
            logits = torch.cat([combined(part) for part in images.split(batch_size)])
        scale, shift = _calibrated(logits.double().cpu(), targets.cpu(), n)
        state = combined.state_dict()
        state["scale"].copy_(scale)
        state["shift"].copy_(shift)
    return combined


def _joined(
    parts: list[fx.GraphModule], sizes: list[int], n_inputs: int, like: Tensor
) -> fx.GraphModule:
    """Networks side by side, each task's outputs as one, times a scale and with a shift."""
    root, graph = nn.Module(), fx.Graph()
    given = tuple(graph.placeholder(f"input{i}" if i else "input") for i in range(n_inputs))
    outputs = []
    for i, part in enumerate(parts):
        root.add_module(f"part{i}", part)
        outputs.append(graph.call_module(f"part{i}", given))
    joined = outputs[0]
    if len(parts) > 1:
        joined = graph.call_function(aten.cat.default, (outputs, 1))
    if set(sizes) != {1}:
        pieces, start = [], 0
        for size in sizes:
            piece = graph.call_function(aten.slice.Tensor, (joined, 1, start, start + size))
            pieces.append(graph.call_function(aten.logsumexp.default, (piece, [1], True)))
            start += size
        joined = graph.call_function(aten.cat.default, (pieces, 1))
    first = next(iter(parts[0].parameters()), like)
    for name, value in (("scale", 1.0), ("shift", 0.0)):
        root.register_buffer(
            name, torch.full((len(sizes),), value, dtype=first.dtype, device=first.device)
        )
    scaled = graph.call_function(aten.mul.Tensor, (joined, graph.get_attr("scale")))
    graph.output(graph.call_function(aten.add.Tensor, (scaled, graph.get_attr("shift"))))
    return fx.GraphModule(root, graph).eval()


def _summary(parts: list[fx.GraphModule], columns: tuple[int, ...], foreign: list[bool]) -> Summary:
    """Of all parts; sites of parts of other networks (foreign) are named after the part, too."""
    each = [summary(part) for part in parts]
    sites: dict[str, list[int]] = {}
    for i, (one, other) in enumerate(zip(each, foreign, strict=False)):
        for name, channels in one.sites.items():
            key = f"part{i}.{name}" if other else name
            sites[key] = sorted({*sites.get(key, ()), *channels})
    wholes = [one.whole for one, other in zip(each, foreign, strict=False) if other]
    wholes += [one.whole for one, other in zip(each, foreign, strict=False) if not other][:1]
    tensors = {f"part{i}.{n}": o for i, one in enumerate(each) for n, o in one.tensors.items()}
    return Summary(
        task=None,
        outputs=columns,
        whole=total(wholes),
        smaller=total([one.smaller for one in each]),
        share_sliced=min(one.share_sliced for one in each),
        blocks=tuple(block for one in each for block in one.blocks),
        sites=sites,
        tensors=tensors,
        input_shapes=each[0].input_shapes,
        one_image=each[0].one_image,
        difference=max((one.difference or 0.0) for one in each),
        n_images=each[0].n_images,
    )


def _of_tasks(
    images: Tensor, labels: Tensor, groups: list[tuple[int, ...]]
) -> tuple[Tensor, Tensor]:
    labels = torch.as_tensor(labels, device="cpu")
    if len(images) != len(labels):
        raise ValueError(f"there are {len(images)} images and {len(labels)} labels.")
    targets = torch.full((len(labels),), -1, device="cpu")
    for i, group in enumerate(groups):
        of_group = torch.isin(labels, torch.tensor(group, device="cpu"))
        if not bool(of_group.any()):
            raise ValueError(f"there is no image of task {group} to calibrate its output on.")
        targets[of_group] = i
    known = targets >= 0
    return images[known.to(images.device)], targets[known]


def _calibrated(logits: Tensor, targets: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """A positive scale and a shift for each output, by cross-entropy."""
    log_scale = torch.zeros(n, dtype=torch.float64, device="cpu", requires_grad=True)
    shift = torch.zeros(n, dtype=torch.float64, device="cpu", requires_grad=True)
    weight = 1.0 / torch.bincount(targets, minlength=n).double()
    optimiser = torch.optim.LBFGS([log_scale, shift], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimiser.zero_grad()
        # Each class counts the same, however many images it has.
        loss = F.cross_entropy(logits * log_scale.exp() + shift, targets, weight)
        loss = loss + _RIDGE * (log_scale.square().sum() + shift.square().sum())
        loss.backward()
        return loss

    with torch.enable_grad():
        optimiser.step(closure)
    return log_scale.detach().exp(), shift.detach()
