"""How operators treat channels that are constant: the operators that form no new channels.

Each rule says which channels of its output vary, what the others hold (by running the operator on
the constants, in float64), which channels of its inputs it needs, and how it is written for some
of its channels only. An operator without a rule gets all channels, closed ones as the constants
they are: exact, only not smaller.
"""

# ruff: noqa: D102  # what the three methods of a rule do is said once, in values.Rule
from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from nad_attr.export.tracing import aten, bound, op_name
from nad_attr.export.values import Plan, Rule, Value, flags, squeezed

__all__ = ["Fallback", "rules_of_channels"]

#: Work on each number by itself.
_POINTWISE = {
    *("relu", "relu6", "gelu", "silu", "hardswish", "hardsigmoid", "hardtanh", "sigmoid", "tanh"),
    *("elu", "selu", "celu", "leaky_relu", "mish", "softplus", "softsign", "log_sigmoid", "clamp"),
    *("clamp_min", "clamp_max", "threshold", "hardshrink", "softshrink", "tanhshrink", "neg"),
    *("exp", "log", "log1p", "sqrt", "rsqrt", "abs", "square", "reciprocal", "erf", "sin", "cos"),
    *("round", "floor", "ceil", "sign", "expm1", "_to_copy", "nan_to_num", "logical_not"),
}
#: On each channel by itself, over the positions on the last axes.
_POOLS = {
    *("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
    *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool2d"),
    *("_adaptive_avg_pool2d", "lp_pool2d", "upsample_nearest2d", "upsample_bilinear2d"),
    *("upsample_bicubic2d", "upsample_nearest1d", "upsample_linear1d", "_upsample_nearest_exact2d"),
}
#: Over the axes that are named, which must not be the channels'.
_ALONG = {
    *("mean", "sum", "amax", "amin", "prod", "var", "std", "softmax", "log_softmax", "_softmax"),
    *("roll", "flip", "cumsum", "logsumexp", "narrow", "slice", "select", "linalg_vector_norm"),
}
_PADS = {"pad", "constant_pad_nd", "reflection_pad2d", "replication_pad2d"}
_PERMUTE = {"permute", "transpose", "t", "numpy_T", "mT", "swapaxes"}
_AXES = {"unsqueeze", "squeeze"}
#: Linear functions of columns stay linear functions of them.
_LINEAR = {
    *_PERMUTE,
    *_AXES,
    *("reshape", "slice", "select", "narrow", "roll", "flip", "expand", "mean", "sum", "neg"),
    *("avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d"),
}
_ELEMENTWISE = {
    *("add", "sub", "rsub", "mul", "div", "maximum", "minimum", "pow", "where", "masked_fill"),
    *("addcmul", "lerp", "fmod", "atan2", "eq", "ne", "lt", "le", "gt", "ge", "true_divide"),
}


class Fallback:
    """An operator that needs all channels of its inputs, and whose output is not known."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        return Value()

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        return dict.fromkeys(n for n in node.all_input_nodes if n in plan.values)

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        args, kwargs = fx.map_arg((node.args, node.kwargs), out.whole)
        varying = out.plan.values[node].varying  # None: the channels' axis is not known
        every = None if varying is None else list(range(len(varying)))
        return out.with_channels(out.call(node, node.target, args, kwargs), every)


class Channelwise:
    """Each channel of the output is made of one channel of the input."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        x = node.args[0]
        if not isinstance(x, fx.Node) or x not in plan.values:
            return None
        if any(
            not plan.values[n].static
            for n in node.all_input_nodes
            if n in plan.values and n is not x
        ):
            return None
        value = plan.seen(x, columns=_keeps_columns(node))
        if value.axis is None or value.varying is None:
            return None
        found = _axis_after(plan, node, value.axis)
        if found is None:
            return None
        axis, order = found
        if value.columns is not None and order is not None:
            value = plan.seen(x)
            assert value.varying is not None
        varying: Any = value.varying if order is None else value.varying[order]  # type: ignore[index]
        known = None
        if value.partial:
            known = _masked(plan.evaluate(node), varying, axis)
        return Value(axis, varying, known, value.columns)

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        x: Any = node.args[0]
        axis = plan.values[x].axis
        assert axis is not None
        assert need is not None
        _, order = _axis_after(plan, node, axis)  # type: ignore[misc]
        if order is None:
            return {x: need}
        return {x: flags(plan.shape(x)[axis], order[need])}

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        plan: Plan = out.plan
        x: Any = node.args[0]
        axis = plan.values[x].axis
        assert axis is not None
        assert channels is not None
        new_axis, order = _axis_after(plan, node, axis)  # type: ignore[misc]
        columns = plan.values[node].columns is not None
        wanted, made = channels, channels
        if order is not None:
            wanted = sorted(set(order[channels].tolist()))
            made = [i for i, channel in enumerate(order.tolist()) if channel in {*wanted}]
        given = out.get(x, wanted, columns=columns)
        name = op_name(node)
        last = {"batch_norm": 5, "prelu": 2}.get(name, 1)
        args = [out.sliced(p, {0: channels}) for p in node.args[1:last]]
        args += fx.map_arg(node.args[last:], lambda n: given if n is x else out.operand(n))
        args.insert(0, given)
        n_made = len(made) + (plan.values[node].columns.shape[1] if columns else 0)  # type: ignore[union-attr]
        if name == "reshape":
            args[1] = _resized(args[1], new_axis, n_made)
        elif name == "expand":
            args[1] = _resized(args[1], new_axis, -1)
        kwargs = fx.map_arg(node.kwargs, out.operand)
        return out.with_channels(out.call(node, node.target, tuple(args), kwargs), made)


def _keeps_columns(node: fx.Node) -> bool:
    name = op_name(node)
    if name in _PADS:
        given = bound(node)
        return given.get("mode", "constant") == "constant" and not given.get("value")
    return name in _LINEAR


def _resized(sizes: Any, axis: int, n: int) -> list[Any]:
    return [*sizes[:axis], n, *sizes[axis + 1 :]]


def _masked(known: Tensor, varying: Tensor, axis: int) -> Tensor:
    """Zero where it varies; without a copy of what does not change along an axis."""
    shape = [1] * known.dim()
    shape[axis] = -1
    return squeezed(known.masked_fill(varying.view(shape), 0.0), axis).expand(known.shape)


def _axis_after(plan: Plan, node: fx.Node, axis: int) -> tuple[int, Tensor | None] | None:
    """The channels' axis after an operator, and the input's channel of each channel.

    None in its place: the same channels. None: the operator does not leave channels alone.
    """
    name = op_name(node)
    x: Any = node.args[0]
    before, after = plan.shape(x), plan.shape(node)
    n = len(before)
    if name in _POINTWISE:
        return axis, None
    if name in _ELEMENTWISE:  # of one tensor and numbers
        alone = len(node.all_input_nodes) == 1
        return (axis, None) if alone and len(after) == n else None
    if name in _POOLS:
        positions = next((int(c) for c in name if c in "123"), 2)
        return (axis, None) if axis < n - positions else None
    if name == "linear":
        return (axis, None) if axis < n - 1 else None
    if name == "layer_norm":
        return (axis, None) if axis < n - len(bound(node)["normalized_shape"]) else None
    if name in ("batch_norm", "prelu"):
        return (axis, None) if axis == 1 else None
    if name in _PADS:
        pad = bound(node)["pad"] if name in ("pad", "constant_pad_nd") else bound(node)["padding"]
        padded = {n - 1 - i // 2 for i, width in enumerate(pad) if width}
        return None if axis in padded else (axis, None)
    if name in _ALONG:
        return _along(node, axis, n, len(after))
    if name in _PERMUTE:
        order = _order(node, n)
        return order.index(axis), None
    if name == "unsqueeze":
        dim = bound(node)["dim"] % (n + 1)
        return axis + (dim <= axis), None
    if name == "squeeze":
        dims = bound(node).get("dim", [d for d in range(n) if before[d] == 1])
        gone = {d % n for d in ([dims] if isinstance(dims, int) else dims)}
        gone = {d for d in gone if before[d] == 1}
        return None if axis in gone else (axis - sum(d < axis for d in gone), None)
    if name == "expand":
        new = axis + len(after) - n
        return (new, None) if after[new] == before[axis] else None
    if name == "reshape":
        return _reshaped(plan, x, node, axis)
    return None


def _along(node: fx.Node, axis: int, n: int, n_after: int) -> tuple[int, None] | None:
    given = bound(node)
    dims = given.get("dim", given.get("dims"))
    if dims is None or dims == []:
        return None
    gone = {d % n for d in ([dims] if isinstance(dims, int) else dims)}
    if axis in gone:
        return None
    return axis - (sum(d < axis for d in gone) if n_after < n else 0), None


def _order(node: fx.Node, n: int) -> list[int]:
    """The input's axis of each axis after a permutation."""
    given = bound(node)
    if "dims" in given:
        return [d % n for d in given["dims"]]
    order = list(range(n))
    if op_name(node) == "numpy_T":
        return order[::-1]
    a = given.get("dim0", given.get("axis0", -2)) % n
    b = given.get("dim1", given.get("axis1", -1)) % n
    order[a], order[b] = order[b], order[a]
    return order


def _reshaped(plan: Plan, x: fx.Node, node: fx.Node, axis: int) -> tuple[int, Tensor | None] | None:
    # With so many images, no other size is a multiple of theirs.
    old, new = plan.network.shape(x, 10007), plan.network.shape(node, 10007)
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        i, j = i + 1, j + 1
        while math.prod(old[first_i:i]) != math.prod(new[first_j:j]):
            if math.prod(old[first_i:i]) < math.prod(new[first_j:j]):
                i += 1
            else:
                j += 1
        if first_i <= axis < i:
            break
    else:
        return None
    wide_old = [d for d in range(first_i, i) if old[d] > 1]
    wide_new = [d for d in range(first_j, j) if new[d] > 1]
    if wide_old == [axis] and len(wide_new) == 1:
        return wide_new[0], None
    if not wide_old and i - first_i == 1 and j - first_j == 1:  # one channel
        return first_j, None
    if len(wide_new) != 1 or axis not in wide_old or 10007 in new[first_j:j]:
        return None
    if any(old[d] % 10007 == 0 for d in wide_old):
        return None
    # Channels and positions become one axis.
    shape = [old[d] if d == axis else 1 for d in wide_old]
    index = torch.arange(old[axis], device="cpu").view(shape).expand([old[d] for d in wide_old])
    return wide_new[0], index.flatten()


class Elementwise:
    """Several tensors, number by number, or side by side along positions (``cat``)."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        after = plan.shape(node)
        inputs = [n for n in node.all_input_nodes if n in plan.values]
        values = {n: plan.seen(n) for n in inputs}
        axis = _common_axis(plan, node, values)
        if axis is None:
            return None
        joined = op_name(node) in ("cat", "stack")
        if joined and (op_name(node) == "stack" or bound(node)["dim"] % len(after) == axis):
            return None
        varying = torch.zeros(after[axis], dtype=torch.bool, device="cpu")
        zero = varying.clone()
        for n in inputs:
            value, own = values[n], _own_axis(plan, n, axis, len(after))
            if value.constant:
                if own is not None and op_name(node) == "mul":
                    zero |= _is_zero(plan.known(n), own)
                continue
            if own is None or own != value.axis or value.varying is None:
                varying[:] = True
                continue
            varying |= value.varying
            name = op_name(node)
            if value.partial and (name == "mul" or (name == "div" and n is node.args[0])):
                zero |= _is_zero(plan.known(n), own) & ~value.varying
        varying &= ~zero
        known = None
        if not bool(varying.all()):
            known = plan.evaluate(node)
            known = known if known.is_floating_point() else known.double()
            known = _masked(known.nan_to_num(0.0), varying, axis)
        return Value(axis, varying, known)

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        axis, n = plan.values[node].axis, len(plan.shape(node))
        assert axis is not None
        wanted: dict[fx.Node, Tensor | None] = {}
        for source in node.all_input_nodes:
            if source in plan.values:
                own = _own_axis(plan, source, axis, n)
                wanted[source] = need if own == plan.values[source].axis else None
        return wanted

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        axis, n = out.plan.values[node].axis, len(out.plan.shape(node))
        exact = op_name(node) == "cat"

        def given(source: fx.Node) -> Any:
            if source not in out.plan.values:
                return out.operand(source)
            own = _own_axis(out.plan, source, axis, n)
            return out.get(source, None if own is None else channels, axis=own, exact=exact)

        args, kwargs = fx.map_arg((node.args, node.kwargs), given)
        return out.with_channels(out.call(node, node.target, args, kwargs), channels)


def _is_zero(known: Tensor, axis: int) -> Tensor:
    return (known.movedim(axis, 0).reshape(known.shape[axis], -1) == 0).all(1)


def _own_axis(plan: Plan, source: fx.Node, axis: int, n: int) -> int | None:
    """A tensor's axis that meets the channels of what it is broadcast to; None: it has none."""
    shape = plan.shape(source)
    own = axis - (n - len(shape))
    return None if own < 0 or shape[own] == 1 else own


def _common_axis(plan: Plan, node: fx.Node, values: Mapping[fx.Node, Value]) -> int | None:
    """The channels' axis after an operator on several tensors; None: they disagree."""
    after = plan.shape(node)
    partial, others = set[int](), list[int]()
    for source, value in values.items():
        if value.axis is None or value.constant:
            continue
        shape = plan.shape(source)
        axis = value.axis + len(after) - len(shape)
        if shape[value.axis] == 1 and after[axis] != 1:
            continue
        (partial.add if value.partial else others.append)(axis)
    if len(partial) > 1:
        return None
    return partial.pop() if partial else next(iter(others), None)


class Side:
    """``cat`` along the channels."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        axis = bound(node)["dim"] % len(plan.shape(node))
        varying = []
        for x in node.args[0]:  # type: ignore[union-attr]
            value = plan.seen(x)  # type: ignore[arg-type]
            count = plan.shape(x)[axis]  # type: ignore[arg-type]
            if value.partial and value.axis != axis:
                return None
            own = value.varying if value.axis == axis else None
            all_of_it = torch.full((count,), not value.constant, device="cpu")
            varying.append(all_of_it if own is None or value.constant else own)
        joined = torch.cat(varying)
        if bool(joined.all()):
            return Value(axis, joined)
        return Value(axis, joined, _masked(plan.evaluate(node), joined, axis))

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        wanted: dict[fx.Node, Tensor | None] = {}
        for x, part in self._parts(plan, node, need):
            if not bool(part.any()):
                continue
            if plan.values[x].axis != plan.values[node].axis:
                wanted[x] = None
            elif wanted.get(x, part) is not None:
                wanted[x] = part | wanted.get(x, part)  # type: ignore[operator]
        return wanted

    @staticmethod
    def _parts(plan: Plan, node: fx.Node, need: Any) -> list[tuple[fx.Node, Tensor]]:
        axis: Any = plan.values[node].axis
        sources: Any = node.args[0]
        return list(zip(sources, need.split([plan.shape(x)[axis] for x in sources]), strict=True))

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        axis = out.plan.values[node].axis
        need = flags(out.plan.shape(node)[axis], channels)
        parts = [
            out.get(x, part.nonzero().flatten().tolist(), axis=axis, exact=True)
            for x, part in self._parts(out.plan, node, need)
            if bool(part.any())
        ]
        if len(parts) == 1:
            return out.with_channels(parts[0], channels)
        return out.with_channels(out.call(node, aten.cat.default, (parts, axis)), channels)


class Chosen:
    """Some of the channels, in some order: ``slice`` and ``index_select`` along them."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        x: Any = node.args[0]
        value = plan.seen(x)
        order = self._order(plan, node)
        if order is None or value.varying is None:
            return None
        known = plan.evaluate(node) if value.partial else None
        return Value(value.axis, value.varying[order], known)

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        x: Any = node.args[0]
        n = plan.shape(x)[plan.values[x].axis]  # type: ignore[index]
        return {x: flags(n, self._order(plan, node)[need])}  # type: ignore[index]

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        order = self._order(out.plan, node)
        assert order is not None
        return out.with_channels(out.get(node.args[0], order[channels].tolist()), channels)

    @staticmethod
    def _order(plan: Plan, node: fx.Node) -> Tensor | None:
        x: Any = node.args[0]
        given = bound(node)
        axis = plan.values[x].axis
        shape = plan.shape(x)
        if axis is None or given["dim"] % len(shape) != axis:
            return None
        every = torch.arange(shape[axis], device="cpu")
        if op_name(node) == "index_select":
            index = given["index"]
            return plan.known(index) if plan.values[index].static else None
        start, end, step = given["start"] or 0, given["end"], given["step"]
        if not all(isinstance(s, int) or s is None for s in (start, end, step)):
            return None
        return every[start:end:step]


class Site:
    """A gate: closed channels are constants from here on, and not needed before."""

    def forward(self, plan: Plan, node: fx.Node) -> Value | None:
        x, index = node.args
        site, mask, constant = plan.sites[index], plan.masks[index], plan.constants[index]  # type: ignore[index]
        n = len(plan.shape(node))
        axis = site.channel_dim % n
        value = plan.seen(x)  # type: ignore[arg-type]
        shape = [1] * n
        shape[axis] = -1
        open_ = mask.view(shape)
        if value.constant:
            kept = torch.where(open_, plan.known(x), constant.view(shape))  # type: ignore[arg-type]
            return Value(constant=True, known=kept)
        varying = mask.clone()
        known = torch.where(open_, 0.0, constant.view(shape)).expand(plan.shape(node))
        if value.axis == axis and value.varying is not None:
            varying &= value.varying
            if value.partial:
                known = torch.where(open_, plan.known(x), constant.view(shape))  # type: ignore[arg-type]
        return Value(axis, varying, known)

    def backward(
        self, plan: Plan, node: fx.Node, need: Tensor | None
    ) -> Mapping[fx.Node, Tensor | None]:
        x: Any = node.args[0]
        return {x: need if plan.values[x].axis == plan.values[node].axis else None}

    def emit(self, out: Any, node: fx.Node, channels: list[int] | None) -> Any:
        given = out.get(node.args[0], channels, axis=out.plan.values[node].axis)
        return out.with_channels(given, channels)


def rules_of_channels() -> dict[str, list[Rule]]:
    """The rules of this module by operator."""
    channelwise, elementwise, chosen = Channelwise(), Elementwise(), Chosen()
    named = {*_POINTWISE, *_POOLS, *_ALONG, *_PADS, *_PERMUTE, *_AXES}
    named |= {"linear", "layer_norm", "batch_norm", "prelu", "expand", "reshape"}
    table: dict[str, list[Rule]] = {name: [channelwise] for name in named}
    for name in _ELEMENTWISE:
        table[name] = [channelwise, elementwise]
    table["slice"] = [channelwise, chosen]
    table["index_select"] = [chosen]
    table["cat"] = [elementwise, Side()]
    table["site"] = [Site()]
    return table
