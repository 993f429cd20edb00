"""Export a sub-architecture as a separate network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from nad_attr.export.costs import Block, Cost, Summary, keep_summary, node_costs, total
from nad_attr.export.rewriting import Writer, written
from nad_attr.export.tracing import ExportError, Graph, merge_batchnorm, op_name, traced
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import check_eval, gated
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.site import unwrap
from nad_attr.sites.tracing import main_output
from nad_attr.system.rng import isolated_rng

__all__ = ["export"]

#: Highest difference to the gated network over its largest output.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def export(
    model: nn.Module,
    arch: SubArchitecture,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    head: Literal["whole", "task"] = "whole",
    merge_bn: bool = False,
    check: bool = True,
) -> nn.Module:
    """A plain module that computes the gated network's outputs with fewer channels.

    See :meth:`nad_attr.SubArchitecture.export`.
    """
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    if not inputs or not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) for x in inputs):
        raise TypeError(
            "example_inputs must be a tensor of at least one image, or a tuple of tensors."
        )
    if head not in ("whole", "task"):
        raise ValueError(f"head must be 'whole' or 'task', got {head!r}.")
    columns = None
    if head == "task":
        if arch.task is None:
            raise ValueError(
                "head='task' keeps the task's column of the output, and this sub-architecture has "
                "no task: give it one, SubArchitecture(..., task=7), or keep head='whole'."
            )
        columns = [arch.task] if isinstance(arch.task, int) else list(arch.task)
    check_eval(model)
    traced_network = traced(model, arch.sites, inputs)
    return cut(arch, model, inputs, traced_network, columns, merge_bn, check)


def cut(
    arch: SubArchitecture,
    model: nn.Module,
    inputs: Sequence[Tensor],
    network: Graph,
    columns: list[int] | None,
    merge_bn: bool = False,
    check: bool = True,
) -> fx.GraphModule:
    """A traced network as its sub-architecture; :func:`export` without its checks.

    ``inputs`` are those that it was traced with, ``columns`` those of the output (None: all).
    ``merge_bn`` merges BatchNorm layers in the trace; ``check`` compares the result with the gated
    network.
    """
    (output,) = (n for n in network.graph.nodes if n.op == "output")
    logits = network.shape(output.args[0], 2)
    if len(logits) < 2:
        raise ExportError(f"the network returns a tensor of shape {logits}; logits are (B, K).")
    n_outputs = logits[1]
    for column in columns or ():
        if not 0 <= column < n_outputs:
            raise ValueError(
                f"the task must be one of the network's outputs 0 to {n_outputs - 1}, got {column}."
            )
    whole_costs = node_costs(network.module(), inputs, _passed(network))
    if merge_bn:
        merge_batchnorm(network)
    _, sites, means = arch._gating(None)
    constants = [torch.zeros(s.n_channels, dtype=torch.float64, device="cpu") for s in sites]
    if means is not None:
        constants = [means[site.name].detach().cpu().double() for site in sites]
    module, writer = written(network, sites, [arch[s.name] for s in sites], constants, columns)
    difference = _compared(arch, model, module, inputs, network, columns) if check else None
    made = _summary(arch, module, writer, whole_costs, inputs, columns, n_outputs, difference)
    keep_summary(module, made)
    return module


def _compared(
    arch: SubArchitecture,
    model: nn.Module,
    module: nn.Module,
    inputs: Sequence[Tensor],
    network: Graph,
    columns: list[int] | None,
) -> float:
    """The largest difference to the gated network, on the images and noise around them."""
    n = network.n_images if network.batch is None else 3
    generator = torch.Generator().manual_seed(0)
    given = []
    for x in inputs:
        images = x[:1].expand(n, *x.shape[1:]).detach().clone()
        if images.is_floating_point():
            noise: dict[str, Any] = {
                "generator": generator,
                "dtype": torch.float32,
                "device": "cpu",
            }
            images += torch.randn(images.shape, **noise).to(images)
        given.append(images)
    model = unwrap(model)
    with torch.no_grad(), unchanged(model), isolated_rng():
        with gated(model, arch):
            expected = main_output(model(*given))
        found = module(*given)
    assert isinstance(expected, Tensor)
    if columns is not None:
        expected = expected[:, columns]
    size = float(expected.abs().max())
    difference = float((found - expected).abs().max()) / (size or 1.0)
    bound = _ROUNDING.get(expected.dtype, 0.05)
    if not difference <= bound:
        raise ExportError(
            f"the smaller network differs from the gated one by {difference:.1e} of its largest "
            f"output, more than rounding ({bound:.0e}). The network does something that its graph "
            "does not show (it depends on the number of images, or keeps a state), or its numbers "
            "overflow; keep it masked with arch.applied(model), and please report it."
        )
    return difference


def _summary(
    arch: SubArchitecture,
    module: fx.GraphModule,
    writer: Writer,
    whole: dict[fx.Node, Cost],
    inputs: Sequence[Tensor],
    columns: list[int] | None,
    n_outputs: int,
    difference: float | None,
) -> Summary:
    network = writer.plan.network
    # Sites in the order of the graph; the operators before one belong to its block.
    block_of: dict[str, str] = {}
    names: list[str] = []
    waiting: list[fx.Node] = []
    for node in whole:
        waiting.append(node)
        if op_name(node) == "site":
            names.append(arch.sites[node.args[1]].name)  # type: ignore[index]
            block_of.update((n.name, names[-1]) for n in waiting)
            waiting = []
    names.append("output")
    block_of.update((n.name, "output") for n in waiting)

    smaller = node_costs(module, inputs, _passed(network))
    source = {new.name: old.name for new, old in writer.source.items()}
    parts: dict[str, tuple[list[Cost], list[Cost]]] = {name: ([], []) for name in names}
    for node, cost in whole.items():
        parts[block_of[node.name]][0].append(cost)
    for node, cost in smaller.items():
        parts[block_of.get(source.get(node.name, ""), "output")][1].append(cost)
    stays: dict[str, list[str]] = {name: [] for name in names}
    for node in writer.plan.filled:
        if node in writer.plan.needs:
            stays[block_of.get(node.name, "output")].append(node.meta["module"] or node.name)
    cut_names = {o["of"] for o in writer.origins.values() if "rows" in o or "columns" in o}
    tensors = network.tensors
    gone = set(tensors) - {o["of"] for o in writer.origins.values()}
    n_cut = sum(tensors[n].numel() for n in (cut_names | gone) & network.parameters)
    n_all = sum(tensors[n].numel() for n in network.parameters)
    return Summary(
        task=arch.task,
        outputs=tuple(range(n_outputs) if columns is None else columns),
        whole=total(list(whole.values())),
        smaller=total(list(smaller.values())),
        share_sliced=n_cut / max(1, n_all),
        blocks=tuple(
            Block(name, total(before), total(after), tuple(dict.fromkeys(stays[name])))
            for name, (before, after) in parts.items()
        ),
        sites={name: kept.tolist() for name, kept in arch.kept.items()},
        tensors=writer.origins,
        input_shapes=tuple(tuple(x.shape[1:]) for x in inputs),
        one_image=network.batch is None,
        difference=difference,
        n_images=_passed(network),
    )


def _passed(network: Graph) -> int:
    """The only number of images in a pass; one, where it is free."""
    return network.n_images if network.batch is None else 1
