"""What is known about each tensor of a gated network before any image is seen.

A gate makes its closed channels constants. :class:`Plan` follows them through the graph: forward,
which channels depend on the images and what the others hold; backward, which of those that do are
needed by anything that reaches the output. The rules of :mod:`nad_attr.export.rules` say how.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from nad_attr.export.tracing import Graph, op_name
from nad_attr.sites.site import GateSite

__all__ = ["Plan", "Rule", "Value", "same"]

#: Over the largest value: what is less is rounding (constants are computed in float64).
_ROUNDING = 1e-13


@dataclass(eq=False)
class Value:
    """One tensor.

    Attributes:
        axis: Where its channels are; None: not known, and nothing of it is constant.
        varying: bool (C,), the channels that depend on the images.
        known: The tensor for one image, of use where a channel does not vary.
        columns: (C, r): further r numbers per position of which the channels that do not vary are
            linear functions (a LayerNorm's mean and deviation); None: there are none.
        constant: Nothing depends on the images.
        static: Nothing depends on a gate, so that the network's own operators can stay.
    """

    axis: int | None = None
    varying: Tensor | None = None
    known: Tensor | None = None
    columns: Tensor | None = None
    constant: bool = False
    static: bool = False

    @property
    def partial(self) -> bool:
        """Whether some channels vary and some do not."""
        return self.varying is not None and not bool(self.varying.all())


class Rule(Protocol):
    """How one kind of operator treats channels."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        """What is known of the output; None: the rule does not hold here."""

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        """Channels of each input that these channels of the output need; None: all."""

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        """Write the operator for these channels of its output."""


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of float64."""
    scale = float(torch.maximum(a.abs().max(), b.abs().max())) if a.numel() else 0.0
    return bool(((a - b).abs() <= _ROUNDING * scale).all())


def chosen(tensor: Tensor, axis: int, numbers: Sequence[int]) -> Tensor:
    """These channels of a tensor, in this order."""
    index = torch.tensor(numbers, dtype=torch.long, device=tensor.device)
    return tensor.index_select(axis, index)


def flags(n: int, numbers: Any) -> Tensor:
    """Flags of n channels, bool (n,): true at these."""
    result = torch.zeros(n, dtype=torch.bool, device="cpu")
    result[numbers] = True
    return result


def squeezed(known: Tensor, axis: int | None = None) -> Tensor:
    """A tensor cut to length one along each axis on which it does not change."""
    for dim in range(known.dim()):
        if dim != axis and known.shape[dim] > 1:
            first = known.narrow(dim, 0, 1)
            if same(known, first.expand_as(known)):
                known = first
    return known


@dataclass(eq=False)
class Plan:
    """Which channels of which tensor are computed, and the values of the others.

    ``masks`` (bool (C,)) says which channels each site keeps, ``constants`` (float64 (C,)) the
    values of the others, ``columns`` the output columns that are wanted (None: all).
    """

    network: Graph
    sites: Sequence[GateSite]
    masks: Sequence[Tensor]
    constants: Sequence[Tensor]
    columns: list[int] | None
    values: dict[fx.Node, Value] = field(default_factory=dict)
    numbers: dict[fx.Node, Any] = field(default_factory=dict)
    rules: dict[fx.Node, Rule] = field(default_factory=dict)
    needs: dict[fx.Node, Tensor | None] = field(default_factory=dict)
    #: Operators without a rule, to which closed channels have to be given as constants.
    filled: list[fx.Node] = field(default_factory=list)
    #: What the constant channels add to the outputs of an operator that mixes channels.
    offsets: dict[fx.Node, Tensor] = field(default_factory=dict)
    #: The constants among the channels that a LayerNorm reads.
    constants_of_norms: dict[fx.Node, Tensor] = field(default_factory=dict)
    _known: dict[fx.Node, Any] = field(default_factory=dict)

    def make(self, rules: Mapping[str, Sequence[Rule]], fallback: Rule) -> None:
        """Follow the channels through the network, forward and backward."""
        for node in self.network.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = Value()
            elif node.op == "get_attr":
                self.values[node] = Value(constant=True, static=True)
            elif node.op == "call_function":
                self._forward(node, rules, fallback)
        (output,) = (n for n in self.network.graph.nodes if n.op == "output")
        logits = output.args[0]
        self._want(logits, self._wanted(logits))
        for node in reversed(self.network.graph.nodes):
            if node in self.needs and node in self.rules:
                for source, need in self.rules[node].backward(self, node, self.needs[node]).items():
                    self._want(source, need)

    def _forward(self, node: fx.Node, rules: Mapping[str, Sequence[Rule]], fallback: Rule) -> None:
        if not isinstance(node.meta["val"], (Tensor, tuple, list)):
            self.numbers[node] = self.evaluate(node)
            return
        inputs = [n for n in node.all_input_nodes if n in self.values]
        if all(self.values[n].static for n in inputs):
            self.values[node] = Value(constant=True, static=True)
            return
        if all(self.values[n].constant for n in inputs) and op_name(node) != "site":
            self.values[node] = Value(constant=True, known=self.evaluate(node))
            return
        for rule in rules.get(op_name(node), ()):
            value = rule.forward(self, node)
            if value is not None:
                break
        else:
            rule, value = fallback, Value()
            if any(self.values[n].partial for n in inputs):
                self.filled.append(node)
        if value.axis is not None and value.varying is not None and not bool(value.varying.any()):
            value = Value(constant=True, known=value.known)
        self.values[node], self.rules[node] = value, rule

    def _wanted(self, logits: fx.Node) -> Tensor | None:
        value = self.values[logits]
        if self.columns is None or value.axis != 1:
            return None
        assert value.varying is not None
        return flags(len(value.varying), self.columns)

    def _want(self, node: fx.Node, need: Tensor | None) -> None:
        value = self.values[node]
        if value.constant:
            return
        if value.axis is None:
            self.needs[node] = None
            return
        assert value.varying is not None
        need = value.varying if need is None else need & value.varying
        before = self.needs.get(node)
        self.needs[node] = need.clone() if before is None else before | need

    def seen(self, node: fx.Node, *, columns: bool = False) -> Value:
        """What a rule sees of an input; if it does not support columns, all varies."""
        value = self.values[node]
        if value.columns is None or columns:
            return value
        assert value.varying is not None
        return Value(value.axis, torch.ones_like(value.varying))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Shape of a node's tensor for one image."""
        return self.network.shape(node, 1)

    def known(self, node: fx.Node) -> Any:
        """A node's tensor for one image; zero where it varies."""
        if node in self.numbers:
            return self.numbers[node]
        value = self.values[node]
        if value.known is not None:
            return value.known
        if not value.constant:
            return torch.zeros(self.shape(node), dtype=_fine(node.meta["val"].dtype), device="cpu")
        if node.op == "get_attr":  # not kept: these are all of the weights
            tensor = self.network.tensors[str(node.target)].detach().cpu()
            return tensor.to(_fine(tensor.dtype))
        if node not in self._known:
            self._known[node] = self.evaluate(node)
        return self._known[node]

    def evaluate(self, node: fx.Node) -> Any:
        """Run one operator for one image, in float64."""
        if op_name(node) == "sym_size":
            x, axis = node.args
            return self.network.shape(x, 1)[axis]  # type: ignore[arg-type, index]
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.known)
        kwargs = dict[str, Any](kwargs)
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        if isinstance(kwargs.get("dtype"), torch.dtype):
            kwargs["dtype"] = _fine(kwargs["dtype"])  # type: ignore[arg-type]
        with torch.no_grad():
            result = node.target(*args, **kwargs)  # type: ignore[operator]
        return result.to(_fine(result.dtype)) if isinstance(result, Tensor) else result

    def channels(self, node: fx.Node) -> list[int] | None:
        """The channels of a node's tensor that are computed; None: all there is."""
        need = self.needs[node]
        return None if need is None else need.nonzero().flatten().tolist()


def _fine(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype
