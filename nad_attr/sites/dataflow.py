"""Traces reduced to the nodes between input and output, and the calls of modules there."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator

from torch import nn

from nad_attr.sites.tracing import INT8, Call, Trace

__all__ = ["FLOAT", "Flow", "canonical_axis", "channel_axis"]


#: What to do about a layer of static int8.
FLOAT = "give the float network that it was made from"


class Flow:
    """The nodes of a trace between input and output, and the calls of modules at them."""

    def __init__(self, model: nn.Module, traced: Trace) -> None:
        self.nodes = traced.nodes
        self.batch_size = traced.batch_size
        self.has_children = {
            name for name, m in model.named_modules() if any(True for _ in m.children())
        }
        self.plain = {name for name, m in model.named_modules() if type(m) is nn.Sequential}
        self.sequential = {n for n, m in model.named_modules() if isinstance(m, nn.Sequential)}
        self.calls: dict[str, list[Call]] = {}
        for call in traced.calls:
            self.calls.setdefault(call.name, []).append(call)
        whole = next((c.name for c in traced.calls if c.kind == INT8), None)
        #: Why some layers cannot have a gate; "": no layer is of that kind.
        self.int8 = "" if whole is None else f"layer {whole!r} returns {INT8}; {FLOAT}"
        self.sources = set(traced.sources)
        self.sinks = set(traced.sinks)
        reach = set(self.sources)
        for index, node in enumerate(self.nodes):
            if not reach.isdisjoint(node.inputs):
                reach.add(index)
        needed = set(self.sinks)
        for index in range(len(self.nodes) - 1, -1, -1):
            if index in needed:
                needed.update(self.nodes[index].inputs)
        # In the order of creation, which is topological.
        self.path = sorted(reach & needed)
        self.on_path = set(self.path)

    def cut_points(self) -> list[int]:
        """Nodes on every path from the inputs to the output: no edge jumps over them."""
        position = {index: p for p, index in enumerate(self.path)}
        end = len(self.path)
        edges = [(-1, position[s]) for s in self.sources & self.on_path]
        edges += [(position[s], end) for s in self.sinks & self.on_path]
        for index in self.path:
            edges += [(position[i], position[index]) for i in self.inputs_of(index)]
        # Count the edges over each position that do not end there.
        change = [0] * (end + 2)
        for start, stop in edges:
            if stop - start > 1:
                change[start + 1] += 1
                change[stop] -= 1
        jumps = itertools.accumulate(change)
        return [index for index, n in zip(self.path, jumps, strict=False) if n == 0]

    def inputs_of(self, index: int) -> list[int]:
        """The nodes on the path that a node was made from."""
        return [i for i in self.nodes[index].inputs if i in self.on_path]

    def between(self, start: int, stop: int) -> list[int]:
        """The nodes on the path after one and up to another; -1 and len(nodes) are the ends."""
        return self.path[bisect_right(self.path, start) : bisect_right(self.path, stop)]

    def after(self, start: int) -> set[int]:
        """The nodes on the path that depend on one."""
        reached = {start}
        for index in self.between(start, len(self.nodes)):
            if not reached.isdisjoint(self.nodes[index].inputs):
                reached.add(index)
        return reached - {start}

    def carries(self, start: int, stop: int) -> bool:
        """Whether ``stop`` has the channels of ``start`` (-1: input; len(nodes): output).

        A tensor keeps them if all tensors it was made of have them and the operator forms no new
        channels. For a product one factor is enough, since zeros stay zeros: squeeze-and-excitation
        rescales channels.
        """
        carrying = {start}
        for index in self.between(start, stop):
            node, read = self.nodes[index], self.inputs_of(index)
            if index in self.sources:
                if start == -1:
                    carrying.add(index)
            elif not node.mixes:
                enough = any if node.scales else all
                if enough(i in carrying for i in read):
                    carrying.add(index)
        return stop in carrying or (stop == len(self.nodes) and self.sinks <= carrying)

    def mixing(self, indices: Iterable[int]) -> set[int]:
        """The nodes among some that form new channels."""
        return {index for index in indices if self.nodes[index].mixes}

    def inside(self, call: Call) -> list[int]:
        """The nodes on the path that a call made."""
        return self.between(call.start - 1, call.end - 1)

    def gateable(self) -> Iterator[Call]:
        """Calls whose outputs could have a gate."""
        for call in (calls[0] for name, calls in self.calls.items() if name and len(calls) == 1):
            shape = call.shape or ()
            if call.floating and len(shape) > 1 and shape[0] == self.batch_size:
                if call.output in self.on_path and call.output not in call.inputs:
                    yield call

    def formed(self) -> list[tuple[Call, set[int]]]:
        """Every call inside the model, with the nodes in it that form new channels."""
        named = (calls for name, calls in self.calls.items() if name)
        return [(call, self.mixing(self.inside(call))) for calls in named for call in calls]


def channel_axis(shape: tuple[int, ...], axes: frozenset[int]) -> int | None:
    """The axis of the channels as in GateSite.channel_dim, None if unknown."""
    if len(shape) == 2:
        return 1
    return canonical_axis(shape, next(iter(axes))) if len(axes) == 1 and axes != {0} else None


def canonical_axis(shape: tuple[int, ...], axis: int) -> int:
    """The axis as in GateSite.channel_dim: from the front, or -1 if it is the last of several."""
    axis %= len(shape)
    return -1 if axis == len(shape) - 1 and axis != 1 else axis
