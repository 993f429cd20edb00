"""How operators that form new channels from old ones are cut: convolutions, products, LayerNorm.

The part of constant channels in each output is computed once: a bias if it is the same at all
positions, a map of border corrections if zero padding makes it differ.
"""

# what the three methods of a rule do is said once, in values.Rule
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from nad_attr.export.rules import Fallback, _masked
from nad_attr.export.tracing import aten, bound, op_name
from nad_attr.export.values import Plan, Rule, Value, chosen, flags, squeezed

__all__ = ["rules_of_mixing"]


class Mixing:
    """``linear`` and convolutions with one group: weights' columns are inputs, rows outputs."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        x, axis = self._input(plan, node)
        value = plan.seen(x, columns=True)
        given = bound(node)
        n = len(plan.shape(node))
        if given.get("groups", 1) != 1 or any(
            not plan.values[given[p]].static for p in ("weight", "bias") if given[p] is not None
        ):
            return None
        weight = _weight(plan, node)
        if value.axis != axis:  # nothing is constant, or not on this axis
            if value.partial or (value.axis is not None and op_name(node) == "linear"):
                return None
            return Value(axis, torch.ones(plan.shape(node)[axis], dtype=torch.bool, device="cpu"))
        assert value.varying is not None
        live = (weight[:, value.varying] != 0).flatten(1).any(1)
        if value.columns is not None:
            live |= (_of_columns(weight, value.columns) != 0).flatten(1).any(1)
        known = None
        if value.partial or not bool(live.all()):
            plan.offsets[node] = offset = plan.evaluate(node)
            known = _masked(offset, live, axis % n) if not bool(live.all()) else None
        return Value(axis, live, known)

    @staticmethod
    def _input(plan: Plan, node: fx.Node) -> tuple[fx.Node, int]:
        x: Any = node.args[0]
        n = len(plan.shape(x))
        return x, n - 1 if op_name(node) == "linear" else 1

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        x, axis = self._input(plan, node)
        value = plan.values[x]
        if value.axis != axis:
            return {x: None}
        return {x: (_weight(plan, node)[need] != 0).transpose(0, 1).flatten(1).any(1)}

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        plan: Plan = out.plan
        x, axis = self._input(plan, node)
        value = plan.values[x]
        assert channels is not None
        weight_node = bound(node)["weight"]
        if value.axis != axis:
            inputs, given = list(range(plan.shape(x)[axis])), out.get(x, None)
        else:
            need = self.backward(plan, node, flags(plan.shape(node)[axis], channels))[x]
            assert need is not None
            assert value.varying is not None
            inputs = (need & value.varying).nonzero().flatten().tolist()
            given = out.get(x, inputs, columns=True)
        if value.columns is None:
            weight = out.sliced(weight_node, {0: channels, 1: inputs})
        else:
            whole = _weight(plan, node)[channels]
            extra = _of_columns(whole, value.columns)
            weight = out.made(
                weight_node, torch.cat([whole[:, inputs], extra], 1), {0: channels, 1: inputs}
            )
        return _with_offset(out, node, channels, given, weight, axis, 1)


def _weight(plan: Plan, node: fx.Node) -> Tensor:
    weight: Tensor = plan.known(bound(node)["weight"])
    return weight


def _of_columns(weight: Tensor, columns: Tensor) -> Tensor:
    """Weights (O, C, ...) of columns (C, r): (O, r, ...)."""
    return torch.einsum("oc...,cr->or...", weight, columns)


def _with_offset(
    out: Any, node: fx.Node, channels: list[int], given: Any, weight: Any, axis: int, groups: int
) -> Any:
    """The operator with the part of the constant channels: in its bias, or as a map behind it."""
    bias, border = None, None
    bias_node, offset = bound(node)["bias"], out.plan.offsets.get(node)
    if offset is None:
        bias = None if bias_node is None else out.sliced(bias_node, {0: channels})
    else:
        rest = chosen(offset, axis, channels)
        if squeezed(rest, axis).numel() > len(channels):
            border = out.filled(node, rest, axis, exact=False, name="border")
        elif bias_node is not None or bool(rest.any()):
            source = bias_node if bias_node is not None else bound(node)["weight"]
            bias = out.made(source, squeezed(rest, axis).flatten(), {0: channels}, name="bias")
    args = list(node.args)
    args[:3] = [given, weight, bias]
    if len(args) > 6:
        args[6] = groups
    done = out.call(node, node.target, tuple(args), node.kwargs)
    if border is not None:
        done = out.call(node, aten.add.Tensor, (done, border))
    return out.with_channels(done, channels)


class Depthwise:
    """A convolution with groups: each output reads the channels of its group."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        x: Any = node.args[0]
        given = bound(node)
        value = plan.seen(x)
        if given["groups"] == 1 or any(
            not plan.values[given[p]].static for p in ("weight", "bias") if given[p] is not None
        ):
            return None
        if value.axis != 1 or value.varying is None:
            if value.partial:
                return None
            return Value(1, torch.ones(plan.shape(node)[1], dtype=torch.bool, device="cpu"))
        live = (self._reads(plan, node) & value.varying).any(1)
        known = None
        if value.partial or not bool(live.all()):
            plan.offsets[node] = offset = plan.evaluate(node)
            known = _masked(offset, live, 1) if not bool(live.all()) else None
        return Value(1, live, known)

    @staticmethod
    def _reads(plan: Plan, node: fx.Node) -> Tensor:
        """(O, C): whether an output reads an input."""
        weight = _weight(plan, node)
        groups = bound(node)["groups"]
        n_out, n_in = len(weight), weight.shape[1]
        reads = torch.zeros(n_out, groups * n_in, dtype=torch.bool, device="cpu")
        start = torch.arange(n_out, device="cpu") // (n_out // groups) * n_in
        used = (weight != 0).flatten(2).any(2)
        return reads.scatter(1, start[:, None] + torch.arange(n_in, device="cpu"), used)

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        x: Any = node.args[0]
        return {x: None if plan.values[x].axis != 1 else self._reads(plan, node)[need].any(0)}

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        plan: Plan = out.plan
        x: Any = node.args[0]
        assert channels is not None
        value, weight = plan.seen(x), _weight(plan, node)
        groups, n_in = bound(node)["groups"], weight.shape[1]
        per_group = len(weight) // groups
        every = torch.ones(groups * n_in, device="cpu")
        varying = every if value.varying is None else value.varying
        reads = self._reads(plan, node)
        outs: dict[int, list[int]] = {}
        for channel in channels:
            outs.setdefault(channel // per_group, []).append(channel)
        ins = {}
        for group, rows in outs.items():
            needed = reads[rows].any(0) & varying.bool()
            ins[group] = needed.nonzero().flatten().tolist()
        wide_in, wide_out = max(map(len, ins.values())), max(map(len, outs.values()))
        # Groups of unequal numbers are filled up: any channel, at weight zero.
        inputs, rows = [], []
        shape = (len(outs) * wide_out, wide_in, *weight.shape[2:])
        cut = torch.zeros(shape, dtype=weight.dtype, device="cpu")
        for i, group in enumerate(outs):
            inputs += ins[group] + ins[group][:1] * (wide_in - len(ins[group]))
            rows += [i * wide_out + j for j in range(len(outs[group]))]
            local = [c - group * n_in for c in ins[group]]
            for j, channel in enumerate(outs[group]):
                cut[i * wide_out + j, : len(local)] = weight[channel, local]
        given = out.get(x, inputs, axis=1) if value.axis == 1 else out.get(x, None)
        if value.axis != 1 and inputs != list(range(groups * n_in)):
            given = out.call(node, aten.index_select.default, (given, 1, out.index(inputs)))
        source = bound(node)["weight"]
        filled = len(rows) < len(outs) * wide_out
        if n_in == 1 and not filled:
            kernel = out.sliced(source, {0: channels})
        elif len(channels) == len(weight) and all(len(read) == n_in for read in ins.values()):
            kernel = out.sliced(source, {})
        else:
            kernel = out.made(source, cut, {0: channels, 1: inputs})
        if not filled:
            return _with_offset(out, node, channels, given, kernel, 1, len(outs))
        args = [*node.args, *[None] * (3 - len(node.args))]
        args[:3], args[6:] = [given, kernel, None], [len(outs)]
        done = out.call(node, node.target, tuple(args), {})
        done = out.call(node, aten.index_select.default, (done, 1, out.index(rows)))
        rest = plan.offsets.get(node)
        if rest is None and bound(node)["bias"] is not None:
            rest = plan.known(bound(node)["bias"]).view(1, -1, *[1] * (weight.dim() - 2))
        if rest is not None:
            rest = chosen(rest, 1, channels)
            border = out.filled(node, rest, 1, exact=False, name="border")
            done = out.call(node, aten.add.Tensor, (done, border))
        return out.with_channels(done, channels)


class LayerNorm:
    """Over the channels: mean and deviation of all; the part of the constant ones is known.

    A constant channel c becomes (c - mean) / deviation: a linear function of two numbers per
    position, which stay as *columns* until a product takes them into its weights.
    """

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        x: Any = node.args[0]
        value, given = plan.seen(x), bound(node)
        n = len(plan.shape(x))
        if value.axis != n - 1 or len(given["normalized_shape"]) != 1 or value.varying is None:
            return None
        if not value.partial:
            return Value(value.axis, value.varying)
        constants = squeezed(plan.known(x).movedim(-1, 0)[~value.varying].movedim(0, -1), n - 1)
        parameters = [given[p] for p in ("weight", "bias")]
        if constants.numel() > constants.shape[-1] or any(
            p is not None and not plan.values[p].static for p in parameters
        ):
            return None
        c = constants.flatten()
        scale, shift = (None if p is None else plan.known(p) for p in parameters)
        closed = ~value.varying
        centred = c - c.mean()
        shape = (len(closed), 1 + bool(centred.any()))
        columns = torch.zeros(shape, dtype=torch.float64, device="cpu")
        columns[closed, 0] = 1.0
        columns[closed, 1:] = centred[:, None]
        if scale is not None:
            columns *= scale[:, None]
        known = torch.zeros(len(closed), dtype=torch.float64, device="cpu")
        if shift is not None:
            known[closed] = shift[closed]
        plan.constants_of_norms[node] = c
        return Value(value.axis, value.varying, known.expand(plan.shape(node)), columns)

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        return dict.fromkeys(node.args[:1])  # type: ignore[arg-type]

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        plan: Plan = out.plan
        x: Any = node.args[0]
        if node not in plan.constants_of_norms:
            return Fallback().emit(out, node, channels)
        c, given, varying = plan.constants_of_norms[node], bound(node), plan.values[x].varying
        assert channels is not None
        assert varying is not None
        open_ = varying.nonzero().flatten().tolist()
        n, n_closed, middle = len(varying), len(c), float(c.mean())
        spread = float(((c - middle) ** 2).sum())

        def call(target: Any, *args: Any) -> Any:
            return out.call(node, target, args)

        kept = out.get(x, open_)
        mean = call(aten.sum.dim_IntList, kept, [-1], True)
        mean = call(aten.mul.Tensor, call(aten.add.Tensor, mean, float(c.sum())), 1 / n)
        centred = call(aten.sub.Tensor, kept, mean)
        squares = call(aten.sum.dim_IntList, call(aten.mul.Tensor, centred, centred), [-1], True)
        away = call(aten.rsub.Scalar, mean, middle)  # of the constants' mean from the mean of all
        closed = call(aten.mul.Tensor, call(aten.mul.Tensor, away, away), float(n_closed))
        variance = call(aten.add.Tensor, call(aten.add.Tensor, squares, closed), spread)
        variance = call(aten.add.Tensor, call(aten.mul.Tensor, variance, 1 / n), given["eps"])
        rate = call(aten.rsqrt.default, variance)
        normal = call(aten.mul.Tensor, centred, rate)
        if channels != open_:
            index = out.index([open_.index(channel) for channel in channels])
            normal = call(aten.index_select.default, normal, len(plan.shape(x)) - 1, index)
        for target, name in ((aten.mul.Tensor, "weight"), (aten.add.Tensor, "bias")):
            if given[name] is not None:
                normal = call(target, normal, out.sliced(given[name], {0: channels}))
        parts = [normal, call(aten.mul.Tensor, away, rate)]
        if plan.values[node].columns.shape[1] == 2:  # type: ignore[union-attr]
            parts.append(rate)
        return out.with_channels(call(aten.cat.default, parts, -1), channels)


def rules_of_mixing() -> dict[str, list[Rule]]:
    """The rules of this module by operator."""
    table: dict[str, list[Rule]] = {"linear": [Mixing()], "layer_norm": [LayerNorm()]}
    for name in ("conv1d", "conv2d", "conv3d"):
        table[name] = [Mixing(), Depthwise()]
    return table
