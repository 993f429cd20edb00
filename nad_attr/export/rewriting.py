"""The smaller network, written operator by operator from what :class:`Plan` found."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from nad_attr.export.mixing import rules_of_mixing
from nad_attr.export.rules import Fallback, rules_of_channels
from nad_attr.export.tracing import Graph, as_module, aten, op_name
from nad_attr.export.values import Plan, chosen, same, squeezed

__all__ = ["Writer", "all_rules"]


def all_rules() -> dict[str, list[Any]]:
    """The rules by operator; where there are several, the first that holds."""
    table: dict[str, list[Any]] = {}
    # A LayerNorm or product along another axis than the channels' leaves channels alone.
    for rules in (rules_of_channels(), rules_of_mixing()):
        for name, found in rules.items():
            table.setdefault(name, []).extend(found)
    return table


@dataclass(eq=False)
class SmallTensor:
    """A tensor in the smaller network: these channels, then the columns."""

    node: fx.Node
    channels: list[int] | None


@dataclass(eq=False)
class Writer:
    """Writes the operators of a smaller network.

    ``origins`` has, for each of its tensors, the one that it was cut from, and its kept rows and
    columns (axes 0 and 1); None: all.
    """

    plan: Plan
    graph: fx.Graph = field(default_factory=fx.Graph)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    parameters: set[str] = field(default_factory=set)
    origins: dict[str, dict[str, Any]] = field(default_factory=dict)
    env: dict[fx.Node, SmallTensor] = field(default_factory=dict)
    #: The old operator that each new one was written for.
    source: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _memo: dict[Any, fx.Node] = field(default_factory=dict)
    _old: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _inputs: list[fx.Node] = field(default_factory=list)
    _now: fx.Node | None = None

    def write(self) -> fx.GraphModule:
        """The whole network."""
        plan = self.plan
        for node in plan.network.graph.nodes:
            self._now = node
            if node.op == "placeholder":
                new = self.graph.placeholder(node.name)
                self.env[node] = SmallTensor(new, None)
                self._old[node] = new
                self._inputs.append(new)
            elif node.op == "output":
                logits, columns = node.args[0], plan.columns
                every = range(plan.shape(logits)[1])
                kept = list(every if columns is None else columns)
                self.graph.output(self.get(logits, kept, axis=1, exact=True))
            elif node in plan.needs and node in plan.rules:
                channels = plan.channels(node)
                if channels != [] or plan.values[node].columns is not None:
                    self.env[node] = plan.rules[node].emit(self, node, channels)
        self.graph.eliminate_dead_code()
        used = {str(n.target) for n in self.graph.nodes if n.op == "get_attr"}
        self.tensors = {name: t for name, t in self.tensors.items() if name in used}
        self.origins = {name: o for name, o in self.origins.items() if name in used}
        return as_module(self.graph, self.tensors, self.parameters)

    # Methods for rules

    def call(
        self, node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] = {}
    ) -> fx.Node:
        """A new operator, written for an old one."""
        new = self.graph.call_function(target, tuple(args), dict(kwargs))
        self.source[new] = node
        return new

    def with_channels(self, node: fx.Node, channels: list[int] | None) -> SmallTensor:
        """What a rule returns: a tensor and the channels that it holds."""
        return SmallTensor(node, channels)

    def whole(self, node: fx.Node) -> fx.Node:
        """A tensor as it was, all channels in their places; or a number."""
        if node in self.plan.numbers:
            return self.operand(node)
        return self.get(node, None, exact=True)

    def operand(self, node: fx.Node) -> fx.Node:
        """A number, or a tensor that depends on no image, as it was."""
        if node not in self._old:
            if node.op == "get_attr":
                whole: fx.Node = self.sliced(node, {})
                return whole
            if node in self.plan.numbers or self.plan.values[node].static:
                inputs = list(node.all_input_nodes)
                if op_name(node) == "sym_size" and inputs[0].op != "placeholder":
                    size: fx.Node = self._size(node.meta["val"])
                    return size
                new = self.graph.node_copy(node, self.operand)
                new.meta = {}
                self.source[new] = node
                self._old[node] = new
            else:
                return self.whole(node)
        return self._old[node]

    def sliced(self, node: fx.Node | None, cut: Mapping[int, list[int]]) -> Any:
        """A parameter, cut along some of its axes."""
        if node is None:
            return None
        if node.op != "get_attr":
            known = self.plan.known(node)
            for axis, index in cut.items():
                if known.shape[axis] > 1:
                    known = chosen(known, axis, index)
            return self.made(node, known, cut)
        tensor = self.plan.network.tensors[str(node.target)].detach()
        cut = {
            axis: index
            for axis, index in cut.items()
            if tensor.dim() > axis and index != list(range(tensor.shape[axis]))
            if tensor.shape[axis] > 1 or max(index, default=0) == 0
        }
        key = ("sliced", node, *((axis, tuple(index)) for axis, index in cut.items()))
        if key not in self._memo:
            for axis, index in cut.items():
                tensor = chosen(tensor, axis, index)
            self._memo[key] = self._attribute(node, tensor.clone(), cut)
        return self._memo[key]

    def made(
        self, node: fx.Node, tensor: Tensor, cut: Mapping[int, list[int]], name: str | None = None
    ) -> fx.Node:
        """A parameter that is not a mere part of an old one, given in float64."""
        like = node.meta["val"]
        return self._attribute(node, tensor.to(like.dtype).to(self._device), cut, name)

    def _constants(self, node: fx.Node, known: Tensor, name: str, axis: int) -> fx.Node:
        """A tensor of constants at a node, in as few numbers as its repeats allow."""
        repeats: dict[int, list[int]] = {}
        for dim in range(known.dim()):
            if dim != axis and known.shape[dim] > 3:
                first, index = _distinct(known.movedim(dim, 0))
                if 2 * len(first) <= known.shape[dim]:
                    known = chosen(known, dim, first)
                    repeats[dim] = index
        like = node.meta["val"]
        name = f"{node.meta['module'] or node.name}.{name}"
        made = self._put(name, known.to(like.dtype).to(self._device), False)
        for dim, index in repeats.items():
            made = self.call(node, aten.index_select.default, (made, dim, self.index(index)))
        return made

    def index(self, values: Sequence[int]) -> fx.Node:
        """Channel numbers as a tensor."""
        key = ("index", *values)
        if key not in self._memo:
            device = self._device
            self._memo[key] = self._put(
                "channels.order", torch.tensor(list(values), dtype=torch.long, device=device), False
            )
        return self._memo[key]

    def get(
        self,
        node: fx.Node,
        channels: list[int] | None,
        *,
        axis: int | None = None,
        columns: bool = False,
        exact: bool = False,
    ) -> fx.Node:
        """A tensor of the old network with these channels (None: all), in this order.

        They lie on ``axis`` (None: where the plan says); ``columns``: the columns come with them;
        ``exact``: constants have their full shape, not one that broadcasts to it.
        """
        value = self.plan.values[node]
        key = ("get", node, None if channels is None else tuple(channels), axis, columns, exact)
        if key not in self._memo:
            if value.constant:
                made = self._constant(node, channels, axis, exact)
            elif value.axis is None or (axis is not None and axis != value.axis):
                made = self._of_another_axis(node, channels, axis)
            else:
                made = self._channels(node, channels, columns)
            self._memo[key] = made
        return self._memo[key]

    # Parts of get

    def _constant(
        self, node: fx.Node, channels: list[int] | None, axis: int | None, exact: bool
    ) -> fx.Node:
        value = self.plan.values[node]
        if value.static and (
            channels is None or axis is None or channels == list(range(self.plan.shape(node)[axis]))
        ):
            return self.operand(node)
        if value.static and node.op == "get_attr" and not exact:
            assert axis is not None
            assert channels is not None
            return self.sliced(node, {axis: channels})  # type: ignore[no-any-return]
        known = self.plan.known(node)
        if channels is not None and axis is not None:
            known = chosen(known, axis, channels)
        return self.filled(node, known, axis, exact)

    def filled(
        self, node: fx.Node, known: Tensor, axis: int | None, exact: bool, name: str = "constant"
    ) -> fx.Node:
        """Constants as a tensor that has, or broadcasts to, a node's shape."""
        sizes = list(node.meta["val"].shape)
        if axis is not None:
            sizes[axis] = known.shape[axis]
        small = squeezed(known, axis) if known.is_floating_point() else known
        made = self._constants(node, small, name, -1 if axis is None else axis)
        times: list[Any] = [1] * len(sizes)
        for dim in self.plan.network.depends_on_batch(node):
            if small.shape[dim] > 1:  # positions beside each other for all images
                times[dim] = self._size(sizes[dim], of=small.shape[dim])
        if times != [1] * len(sizes):
            made = self.call(node, aten.repeat.default, (made, times))
        if exact and list(small.shape) != sizes:
            sizes = [n if isinstance(n, int) else self._size(n) for n in sizes]
            made = self.call(node, aten.expand.default, (made, sizes))
        return made

    def _size(self, size: Any, of: int = 1) -> Any:
        """A size that depends on the number of images, as a number of the new graph."""
        network = self.plan.network
        factor = network.size(size, 1) // of
        images = self._memo.get("images")
        if images is None:
            with self.graph.inserting_after(self._inputs[-1]):
                images = self.graph.call_function(aten.sym_size.int, (self._inputs[0], 0))
            self._memo["images"] = images
        if factor == 1:
            return images
        return self.graph.call_function(operator.mul, (images, factor))

    def _of_another_axis(
        self, node: fx.Node, channels: list[int] | None, axis: int | None
    ) -> fx.Node:
        value = self.plan.values[node]
        whole = self.env[node].node if value.axis is None else self._channels(node, None, False)
        if channels is None or axis is None:
            return whole
        if channels == list(range(self.plan.shape(node)[axis])):
            return whole
        assert self._now is not None
        return self.call(self._now, aten.index_select.default, (whole, axis, self.index(channels)))

    def _channels(self, node: fx.Node, channels: list[int] | None, columns: bool) -> fx.Node:
        value = self.plan.values[node]
        assert value.axis is not None
        assert value.varying is not None
        assert self._now is not None
        channels = list(range(len(value.varying))) if channels is None else channels
        has = self.env.get(node)
        open_channels = [] if has is None else has.channels
        assert open_channels is not None
        place = {channel: i for i, channel in enumerate(open_channels)}
        n_columns = 0 if value.columns is None else value.columns.shape[1]
        lacking = sorted({c for c in channels if c not in place})
        tail = list(range(len(open_channels), len(open_channels) + n_columns)) if columns else []
        made = None if has is None else has.node
        if lacking:
            block = self._closed(node, lacking)
            place.update({c: len(open_channels) + n_columns + i for i, c in enumerate(lacking)})
            if made is None:
                made = block
            else:
                made = self.call(self._now, aten.cat.default, ([made, block], value.axis))
        order = [place[c] for c in channels] + tail
        if order != list(range(len(open_channels) + n_columns + len(lacking))):
            args = (made, value.axis, self.index(order))
            made = self.call(self._now, aten.index_select.default, args)
        assert made is not None
        return made

    def _closed(self, node: fx.Node, channels: list[int]) -> fx.Node:
        """Channels of a node that are constants, or functions of its columns."""
        value = self.plan.values[node]
        assert value.axis is not None
        assert value.known is not None
        known = chosen(value.known, value.axis, channels)
        if value.columns is None:
            return self.filled(node, known, value.axis, exact=True)
        of_columns = value.columns[channels]
        computed = self.env[node]
        assert computed.channels is not None
        start = len(computed.channels)
        part = self.call(
            node, aten.slice.Tensor, (computed.node, value.axis, start, start + of_columns.shape[1])
        )
        last = len(self.plan.shape(node)) - 1
        if value.axis != last:
            part = self.call(node, aten.transpose.int, (part, value.axis, last))
        like = node.meta["val"]
        weight = self._put(
            f"{node.meta['module'] or node.name}.columns",
            of_columns.to(like.dtype).to(self._device),
            False,
        )
        made = self.call(node, aten.linear.default, (part, weight))
        if value.axis != last:
            made = self.call(node, aten.transpose.int, (made, value.axis, last))
        return self.call(
            node, aten.add.Tensor, (made, self.filled(node, known, value.axis, exact=False))
        )

    # Tensors

    @property
    def _device(self) -> torch.device:
        tensors = self.plan.network.tensors.values()
        return next((t.device for t in tensors), torch.device("cpu"))

    def _attribute(
        self, node: fx.Node, tensor: Tensor, cut: Mapping[int, list[int]], name: str | None = None
    ) -> fx.Node:
        old = str(node.target) if node.op == "get_attr" else f"{node.meta['module']}.{node.name}"
        old = old.lstrip(".")
        given = old if name is None else f"{old.rpartition('.')[0]}.{name}".lstrip(".")
        made = self._put(given, tensor, old in self.plan.network.parameters or name is not None)
        origin = {"of": old if name is None or old.endswith(name) else given}
        before = self.plan.network.tensors.get(old)
        whole = {} if before is None else {i: list(range(n)) for i, n in enumerate(before.shape)}
        self.origins[str(made.target)] = origin | {
            kind: cut[axis]
            for axis, kind in enumerate(("rows", "columns"))
            if axis in cut and cut[axis] != whole.get(axis)
        }
        return made

    def _put(self, name: str, tensor: Tensor, parameter: bool) -> fx.Node:
        new, n = name, 2
        while new in self.tensors:
            new, n = f"{name}_{n}", n + 1
        self.tensors[new] = tensor.contiguous()
        if parameter:
            self.parameters.add(new)
        return self.graph.create_node("get_attr", new)


def _distinct(rows: Tensor) -> tuple[list[int], list[int]]:
    """The first of each of the rows that differ, and for every row which of them it is."""
    first: list[int] = []
    index: list[int] = []
    for i, row in enumerate(rows):
        # Neighbours are alike, most often.
        found = next((j for j in reversed(range(len(first))) if same(row, rows[first[j]])), None)
        if found is None:
            found = len(first)
            first.append(i)
        index.append(found)
    return first, index


def written(
    network: Graph,
    sites: Sequence[Any],
    masks: Sequence[Tensor],
    constants: Sequence[Tensor],
    columns: list[int] | None,
) -> tuple[fx.GraphModule, Writer]:
    """A traced network, gated, in as few channels as it can be written."""
    plan = Plan(network, sites, masks, constants, columns)
    plan.make(all_rules(), Fallback())
    writer = Writer(plan)
    return writer.write(), writer
