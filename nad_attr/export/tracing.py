"""Trace a gated network as one graph of operators, with a node for each gate.

``torch.export`` writes the graph. While it runs the network, the gate sites' hooks put a marker
into it, so that the graph holds each gate exactly where :func:`nad_attr.gated` would multiply.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from nad_attr._checks import GatingError
from nad_attr.gating.hooks import installed
from nad_attr.running.forward import Runner
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.sites.tracing import main_output, no_attention_fast_path
from nad_attr.system.rng import isolated_rng

__all__ = ["ExportError", "Graph", "traced"]

aten = torch.ops.aten

_LIBRARY = torch.library.Library("nad_attr", "DEF")
_LIBRARY.define("site(Tensor x, int index) -> Tensor")
torch.library.impl(_LIBRARY, "site", "CompositeExplicitAutograd")(lambda x, index: x.clone())
torch.library.register_fake("nad_attr::site", lambda x, index: torch.empty_like(x), lib=_LIBRARY)
#: The marker of a gate in the graph.
SITE = torch.ops.nad_attr.site.default

#: Operators that change no value in eval mode. Memory layouts go too: every view becomes a reshape.
_NOTHING = {"dropout", "feature_dropout", "alpha_dropout", "clone", "detach", "alias", "contiguous"}
_NOTHING |= {"lift_fresh", "lift_fresh_copy", "_conj", "resolve_conj"}
#: Read the kind of a tensor and none of its values.
_FILLED = {"new_zeros": 0, "zeros_like": 0, "new_ones": 1, "ones_like": 1}
_VIEWS = {"view", "_unsafe_view", "reshape", "view_copy", "_reshape_alias"}
_CONVOLUTIONS = {"conv1d", "conv2d", "conv3d"}


class ExportError(RuntimeError):
    """A network could not be written as a smaller one; the message says why and what to do."""


@dataclass(eq=False)
class Graph:
    """A network as a graph of operators.

    Attributes:
        graph: Placeholders are the network's inputs, ``get_attr`` nodes its tensors.
        tensors: Parameters, buffers and constants by name, the network's own.
        parameters: Which of them are parameters.
        batch: The symbol of the batch; None if the graph is for ``n_images`` images alone.
    """

    graph: fx.Graph
    tensors: dict[str, Tensor]
    parameters: set[str]
    batch: Any
    modules: dict[fx.Node, str] = field(default_factory=dict)
    n_images: int = 1

    def shape(self, node: fx.Node, batch: int) -> tuple[int, ...]:
        """Shape of a node's tensor for a number of images."""
        return tuple(self.size(n, batch) for n in node.meta["val"].shape)

    def size(self, value: Any, batch: int) -> int:
        """A size, which may depend on the number of images."""
        if isinstance(value, int):
            return value
        return int(value.node.expr.subs({self.batch: batch}))

    def depends_on_batch(self, node: fx.Node) -> list[int]:
        """Axes whose length depends on the number of images."""
        return [i for i, n in enumerate(node.meta["val"].shape) if not isinstance(n, int)]

    def module(self) -> fx.GraphModule:
        """The graph, as it is now, as a module that runs."""
        copied, made = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            made[node] = copied.node_copy(node, lambda n: made[n])
        return as_module(copied, self.tensors, self.parameters)


def as_module(
    graph: fx.Graph, tensors: Mapping[str, Tensor], parameters: set[str]
) -> fx.GraphModule:
    """A graph with its tensors, as a module."""
    root = nn.Module()
    for name in dict.fromkeys(node.target for node in graph.nodes if node.op == "get_attr"):
        assert isinstance(name, str)
        tensor = tensors[name].detach()
        *path, last = name.split(".")
        holder = root
        for part in path:
            if not hasattr(holder, part):
                holder.add_module(part, nn.Module())
            holder = getattr(holder, part)
        if name in parameters:
            setattr(holder, last, nn.Parameter(tensor, requires_grad=tensor.is_floating_point()))
        else:
            holder.register_buffer(last, tensor)
    graph.lint()
    return fx.GraphModule(root, graph).eval()


class _Main(nn.Module):
    """A network that returns its logits only."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = False

    def forward(self, *inputs: Tensor) -> Any:
        return main_output(self.network(*inputs))


def traced(model: nn.Module, sites: Sequence[GateSite], inputs: Sequence[Tensor]) -> Graph:
    """The graph of a network with markers at its gate sites.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Where the gates are.
        inputs: What it is called with; the first axis is the batch.

    Raises:
        ExportError: If ``torch.export`` cannot write the network down.
        GatingError: If a site does not fire.
    """
    if not hasattr(torch.export, "Dim") or not hasattr(torch.export.Dim, "DYNAMIC"):
        raise ExportError("a smaller network needs torch 2.6 or later.")
    model = unwrap(model)
    number = {site.name: i for i, site in enumerate(sites)}
    problem: Exception | None = None
    runner = Runner(model)
    runner.find_batch_size(tuple(inputs))
    fixed = runner.fixed_batch  # it stays so
    for n_images in (2, 1) if fixed is None else (fixed,):
        given = tuple(x[:1].expand(n_images, *x.shape[1:]).contiguous() for x in inputs)
        # The inputs of *inputs are one argument for torch.export.
        free = n_images == 2 and fixed is None
        shapes = (tuple({0: torch.export.Dim.DYNAMIC} for _ in given),) if free else None
        try:
            with ExitStack() as stack:
                stack.enter_context(unchanged(model))
                stack.enter_context(isolated_rng())
                stack.enter_context(no_attention_fast_path())
                stack.enter_context(torch.no_grad())
                stack.enter_context(
                    installed(model, sites, lambda site, x: SITE(x, number[site.name]))
                )
                program = torch.export.export(
                    _Main(model), given, dynamic_shapes=shapes, strict=False
                ).run_decompositions({})
            return _normal_form(replace(_lowered(program), n_images=n_images))
        except (GatingError, ExportError):
            raise
        except Exception as error:
            problem = error
    raise ExportError(
        "torch.export cannot write this network as a graph of operators, because its forward "
        "pass depends on the images' values or uses code that is not PyTorch "
        f"({type(problem).__name__}: {str(problem).strip():.300}). Move that part out of the "
        "network, or keep it masked with arch.applied(model)."
    ) from problem


def _without_unit_products(graph: fx.Graph) -> None:
    """Leave out products with the unit matrix, which gates on attention heads put in."""
    for node in list(graph.nodes):
        if op_name(node) == "linear" and op_name(node.args[1]) == "eye":
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _lowered(program: Any) -> Graph:
    """The graph of an exported program, with its tensors as attributes."""
    signature = program.graph_signature
    named = {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }
    outputs = [spec.arg.name for spec in signature.output_specs if spec.kind.name == "USER_OUTPUT"]
    if len(outputs) != 1:
        raise ExportError(
            f"the network returns {len(outputs)} tensors; a smaller network needs one, the logits "
            "(or a dictionary with 'logits')."
        )
    graph, made = fx.Graph(), {}
    tensors: dict[str, Tensor] = {}
    parameters: set[str] = set()
    batch = None
    for node in program.graph.nodes:
        if node.op == "placeholder" and node.name in named:
            name = named[node.name]
            tensor = program.state_dict.get(name, program.constants.get(name))
            name = name.removeprefix("network.")
            tensors[name] = tensor
            if node.name in signature.inputs_to_parameters:
                parameters.add(name)
            made[node] = graph.create_node("get_attr", name)
        elif node.op == "output":
            (logits,) = (a for a in node.args[0] if isinstance(a, fx.Node) and a.name in outputs)
            graph.output(made[logits])
            continue
        else:
            made[node] = graph.node_copy(node, lambda n: made[n])
            if node.op == "placeholder" and batch is None:
                n = node.meta["val"].shape[0]
                batch = None if isinstance(n, int) else n.node.expr
        made[node].meta = {"val": node.meta.get("val"), "module": _module_of(node)}
    _without_unit_products(graph)
    return Graph(graph, tensors, parameters, batch)


def _module_of(node: fx.Node) -> str:
    """Name of the innermost module of an operator."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    name = str(stack[-1][0]) if stack else ""
    return name.removeprefix("network").removeprefix(".")


def op_name(node: fx.Node) -> str:
    """An operator's name without namespace and overload; "" for what is not an operator."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return ""
    return str(node.target._schema.name).split("::")[-1]


def bound(node: fx.Node) -> dict[str, Any]:
    """The arguments of an operator by their names, defaults included."""
    result: dict[str, Any] = {}
    assert isinstance(node.target, torch._ops.OpOverload)
    for i, argument in enumerate(node.target._schema.arguments):
        if i < len(node.args) and not argument.kwarg_only:
            result[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            result[argument.name] = node.kwargs[argument.name]
        else:
            result[argument.name] = argument.default_value
    return result


# Normal form: one way to write each operation


def _normal_form(network: Graph) -> Graph:
    graph = network.graph
    for node in list(graph.nodes):
        name = op_name(node)
        if name in _NOTHING or (name == "_to_copy" and _same_kind(node)):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif name in _VIEWS:
            node.target = aten.reshape.default
        elif name in ("flatten", "unflatten", "squeeze", "unsqueeze"):
            sizes = list(_sizes(network, node))
            if all(size is not None for size in sizes):
                with graph.inserting_before(node):
                    _replace(node, aten.reshape.default, (node.args[0], sizes))
        elif name in _FILLED and not network.depends_on_batch(node):
            like = node.meta["val"]
            with graph.inserting_before(node):
                new = _replace(node, aten.full.default, (list(like.shape), _FILLED[name]))
            new.kwargs = {"dtype": like.dtype, "device": like.device}
        elif node.target is operator.getitem:
            _part(network, node)
        elif name == "slice" and _takes_all(network, node):
            node.replace_all_uses_with(node.args[0])
    graph.eliminate_dead_code()
    for node in list(graph.nodes):
        if op_name(node) == "reshape":
            _shuffle(network, node)
    graph.eliminate_dead_code()
    return network


def _same_kind(node: fx.Node) -> bool:
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bool(before.dtype == after.dtype and before.device == after.device)


def _sizes(network: Graph, node: fx.Node) -> Iterator[int | None]:
    """Sizes for a reshape: -1 for the one that depends on the batch, None if there are more."""
    open_axes = network.depends_on_batch(node)
    for i, n in enumerate(node.meta["val"].shape):
        yield n if isinstance(n, int) else (-1 if open_axes == [i] else None)


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
    new = node.graph.call_function(target, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)
    return new


def _takes_all(network: Graph, node: fx.Node) -> bool:
    x = node.args[0]
    assert isinstance(x, fx.Node)
    return network.shape(x, 10007) == network.shape(node, 10007)


def _part(network: Graph, node: fx.Node) -> None:
    """``getitem`` of an operator that returns several tensors, as an operator that returns one."""
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    name = op_name(source)
    if not name:
        return
    given = bound(source)
    args: tuple[Any, ...]
    with node.graph.inserting_before(node):
        if "batch_norm" in name and index == 0:
            x, weight, bias, mean, var = source.args[:5]
            momentum, eps = given["momentum"], given["eps"]
            args = (x, weight, bias, mean, var, False, momentum, eps, False)
            _replace(node, aten.batch_norm.default, args)
        elif name == "native_layer_norm" and index == 0:
            _replace(node, aten.layer_norm.default, source.args)
        elif name == "native_group_norm" and index == 0:
            args = (given["input"], given["group"], given["weight"], given["bias"], given["eps"])
            _replace(node, aten.group_norm.default, args)
        elif name == "max_pool2d_with_indices" and index == 0:
            _replace(node, aten.max_pool2d.default, source.args)
        elif name in ("split", "split_with_sizes", "chunk"):
            x, dim = source.args[0], given["dim"]
            sizes = [part.shape[dim] for part in source.meta["val"]]
            if all(isinstance(size, int) for size in sizes):
                start = sum(sizes[:index])
                args = (x, dim, start, start + sizes[index])
                _replace(node, aten.slice.Tensor, args)
        elif name == "unbind":
            _replace(node, aten.select.int, (source.args[0], given["dim"], index))


def _shuffle(network: Graph, node: fx.Node) -> None:
    """Channels split in two axes, swapped and joined again: a permutation of channels."""
    swap = node.args[0]
    if not isinstance(swap, fx.Node) or op_name(swap) not in ("transpose", "permute"):
        return
    split = swap.args[0]
    if not isinstance(split, fx.Node) or op_name(split) != "reshape":
        return
    x = split.args[0]
    assert isinstance(x, fx.Node)
    before, wide, after = (network.shape(n, 10007) for n in (x, split, node))
    n = len(before)
    if before != after or len(wide) != n + 1 or n < 2:
        return
    # (B, g, c, ...) with g * c channels, and the two swapped.
    if wide[0] != before[0] or wide[3:] != before[2:] or wide[1] * wide[2] != before[1]:
        return
    if network.shape(swap, 10007) != (wide[0], wide[2], wide[1], *wide[3:]):
        return
    if op_name(swap) == "permute" and [d % (n + 1) for d in swap.args[1]] != [  # type: ignore[operator, union-attr]
        *(0, 2, 1),
        *range(3, n + 1),
    ]:
        return
    order = torch.arange(before[1], device="cpu").view(wide[1], wide[2]).t().flatten()
    name = f"{node.name}_order"
    network.tensors[name] = order
    with node.graph.inserting_before(node):
        index = node.graph.create_node("get_attr", name)
        index.meta = {"val": order, "module": node.meta["module"]}
        _replace(node, aten.index_select.default, (x, 1, index))


def merge_batchnorm(network: Graph) -> int:
    """Write each BatchNorm that alone follows a convolution into its weights; returns how many."""
    graph, merged = network.graph, 0
    for node in list(graph.nodes):
        if op_name(node) != "batch_norm":
            continue
        convolution = node.args[0]
        if op_name(convolution) not in _CONVOLUTIONS or len(convolution.users) > 1:
            continue
        given = bound(convolution)
        # weight, bias, running mean and variance.
        sources = [given["weight"], given["bias"], *node.args[3:5], *node.args[1:3]]
        if any(s is not None and s.op != "get_attr" for s in sources):
            continue
        weight, bias, mean, var, scale, shift = (
            None if s is None else network.tensors[s.target].detach() for s in sources
        )
        if weight is None or mean is None or var is None:
            continue
        fused = fuse_conv_bn_weights(weight, bias, mean, var, node.args[7], scale, shift)
        name = sources[0].target
        made = []
        with graph.inserting_before(convolution):
            for tensor, old in zip(fused, (name, name.rpartition(".")[0] + ".bias"), strict=True):
                # A weight that others use too stays as it is for them.
                new = old if old == name and len(sources[0].users) == 1 else _free(network, old)
                network.tensors[new] = tensor.detach()
                network.parameters.add(new)
                attribute = graph.create_node("get_attr", new)
                attribute.meta = {"val": tensor, "module": convolution.meta["module"]}
                made.append(attribute)
        args = list(convolution.args) + [None] * (3 - len(convolution.args))
        args[1:3] = made
        convolution.args = tuple(args)
        node.replace_all_uses_with(convolution)
        graph.erase_node(node)
        merged += 1
    graph.eliminate_dead_code()
    return merged


def _free(network: Graph, name: str) -> str:
    name = name.lstrip(".")
    new, n = name, 2
    while new in network.tensors:
        new, n = f"{name}_{n}", n + 1
    return new
