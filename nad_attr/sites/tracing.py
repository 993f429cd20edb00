"""The data flow of one forward pass, seen below the modules: which tensor was made from which.

:func:`trace` runs a model once, on fake tensors (shapes only) where it can. It records every
operator that reads something that depends on the inputs, with the tensors it read and made, and
every call of a module, with the tensors it got and returned.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from nad_attr.sites.preserving import unchanged
from nad_attr.system.rng import isolated_rng
from nad_attr.system.threads import owned

#: What a layer of static int8 returns, in words.
INT8 = "int8 numbers, which have no gradient"

Axes = frozenset[int]

_NO_AXES: Axes = frozenset()
_CONVOLUTION = re.compile(r"conv(olution|\d|_|$)")
_PRODUCT = re.compile(
    r"(^|_)(mm|addmm|bmm|baddbmm|addbmm|matmul|linear|mv|addmv|dot|vdot|inner|einsum|tensordot|"
    r"bilinear|trilinear|attention|lstm|gru|rnn|cdist|embedding)(_|$)"
)
_NORM = re.compile(r"(batch|group|instance)_norm")
_POOL = re.compile(r"(pool|upsample|pixel_(un)?shuffle|channel_shuffle|grid_sampler)")
# Operators that take only the shape, type or device of what they are given, not its values.
_SHAPE_ONLY = re.compile(r"(_like$|^new_|^sym_|^is_)")
_VIEW = {"view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten", "view_copy"}
_MOVE = _VIEW | {
    *("permute", "transpose", "t", "squeeze", "unsqueeze", "expand", "clone", "detach", "alias"),
    *("contiguous", "_to_copy", "lift_fresh", "permute_copy", "transpose_copy", "numpy_T", "mT"),
}
_REDUCE = {
    *("mean", "sum", "prod", "amax", "amin", "max", "min", "median", "var", "std", "var_mean"),
    *("std_mean", "logsumexp", "norm", "linalg_vector_norm", "any", "all", "argmax", "argmin"),
    *("nansum", "nanmean", "aminmax"),
}


@dataclasses.dataclass(frozen=True)
class Node:
    """A tensor that depends on the inputs, at one moment of the pass.

    Attributes:
        op: Name of the operator that made it; ``"input"`` for an input, ``"alias"`` for a tensor
            changed because another one that shares its memory was written to.
        inputs: Indices of the nodes it was made from, all smaller than its own.
        axes: The axes over which the channels are laid out; empty if unknown.
        mixes: Whether the operator forms new channels (a dense convolution, a matrix product, a
            reduction over channels).
        scales: Whether the operator is a product, so that a zero in one factor stays a zero.
        moves: Whether the operator only moves values (a view, a permutation, a copy).
    """

    op: str
    inputs: tuple[int, ...]
    shape: tuple[int, ...]
    axes: Axes
    mixes: bool = False
    scales: bool = False
    moves: bool = False


@dataclasses.dataclass
class Call:
    """One call of a module.

    Attributes:
        name: Qualified name of the module.
        start: Number of nodes when the module was entered.
        entered: Rank of the call by the time it was entered.
        inputs: Nodes of the tensors among its arguments, None for a constant.
        argument: The node of its only argument, if that is one tensor.
        argument_shape: Shape of that tensor.
        argument_kind: What it was given, in words.
        end: Number of nodes when it returned.
        returned: Rank of the call by the time it returned.
        output: The node it returned; None if it is not one tensor or does not depend on the inputs.
        shape: Shape of its output, None if that is not one tensor.
        floating: Whether it returned floating-point numbers.
        kind: What it returned, in words.
    """

    name: str
    start: int
    entered: int
    inputs: tuple[int | None, ...]
    argument: int | None
    argument_shape: tuple[int, ...] | None
    argument_kind: str
    end: int = -1
    returned: int = -1
    output: int | None = None
    shape: tuple[int, ...] | None = None
    floating: bool = False
    kind: str = "nothing"


@dataclasses.dataclass(frozen=True)
class Trace:
    """The record of one forward pass.

    Attributes:
        nodes: The tensors that depend on the inputs, in the order of creation (topological).
        calls: The finished calls of modules, in the order of entry; the model's own is named "".
        sources: Nodes of the inputs.
        sinks: Nodes of the output.
        batch_size: Length of the first axis of the first input.
        on_values: Whether the network looks at values, so that the real tensors were run: another
            image may take another path.
    """

    nodes: list[Node]
    calls: list[Call]
    sources: tuple[int, ...]
    sinks: tuple[int, ...]
    batch_size: int
    on_values: bool = False


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors in nested sequences, mappings and dataclasses, in order.

    Example:
        >>> len(list(tensors_in({"a": torch.zeros(1), "b": [torch.zeros(2), None]})))
        2
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from tensors_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name, None))


def trace(
    model: nn.Module,
    inputs: Sequence[Tensor],
    additional_forward_args: Sequence[object] = (),
    forward_func: Callable[..., object] | None = None,
) -> Trace:
    """Trace one forward pass of a model in eval mode.

    The pass runs on fake tensors. If the model looks at values, or an operator has no fake version,
    it runs again on the real tensors, under ``no_grad``, with its own errors. The model and the
    random state stay as they were. If every parameter is on the meta device, so is the pass; if
    only inputs are, they give the shapes of tensors. The first axis of the inputs is the batch;
    ``additional_forward_args`` count as constants; ``forward_func`` is called and runs the model.
    """
    run = model if forward_func is None else forward_func
    arguments: tuple[object, ...] = (*inputs, *additional_forward_args)
    parameters = [*model.parameters(), *model.buffers()]
    device = parameters[0].device if parameters else torch.device("cpu")
    on_meta = device.type == "meta" and all(p.is_meta for p in parameters)
    if on_meta:
        arguments = tuple(mapped(arguments, lambda t: t.to("meta")))

    def on_fake_tensors() -> Trace:
        fake = FakeTensorMode(allow_non_fake_inputs=True)

        def faked(tensor: Tensor) -> Tensor:
            if tensor.is_meta and not on_meta:
                # Only a shape is given; the model wants it on its own device.
                with fake:
                    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
            return fake.from_tensor(tensor)

        return _run(model, run, tuple(mapped(arguments, faked)), len(inputs), fake)

    def as_given() -> Trace:
        # Copies, since the model may write into its inputs.
        copies = tuple(mapped(arguments, lambda tensor: tensor.detach().clone()))
        return _run(model, run, copies, len(inputs), None)

    # Meta tensors have no values either, and go through a meta model faster than fake ones.
    first, second = (as_given, on_fake_tensors) if on_meta else (on_fake_tensors, as_given)
    try:
        with _unlogged():
            return first()
    except Exception:
        if not on_meta and any(tensor.is_meta for tensor in tensors_in(arguments)):
            raise
        return dataclasses.replace(second(), on_values=not on_meta)


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep torch from also logging the traceback of an error on fake tensors."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def mapped(value: object, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply a function to the tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: mapped(item, function) for key, item in value.items()}
    if type(value) is list:
        return [mapped(item, function) for item in value]
    if type(value) is tuple:
        return tuple(mapped(item, function) for item in value)
    return value


def _run(
    model: nn.Module,
    run: Callable[..., object],
    arguments: tuple[object, ...],
    n_inputs: int,
    fake: FakeTensorMode | None,
) -> Trace:
    """Run and record one pass, on fake tensors if a mode is given."""
    recorder = _Recorder()
    sources = tuple(
        recorder.add(tensor, Node("input", (), tuple(tensor.shape), _NO_AXES))
        for tensor in tensors_in(arguments[:n_inputs])
    )
    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        stack.enter_context(isolated_rng())
        stack.enter_context(no_attention_fast_path())
        stack.enter_context(eager(model))
        # Inference mode would hand over composite operators undissolved.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if fake is not None:
            stack.enter_context(fake)
        stack.enter_context(_calls_recorded(model, recorder))
        with recorder:
            output = run(*arguments)
    tensors = tensors_in(main_output(output))
    sinks = tuple(dict.fromkeys(recorder.node_of[id(t)] for t in tensors if recorder.knows(t)))
    first = next(tensors_in(arguments[:n_inputs]))
    batch_size = first.shape[0] if first.dim() else 1
    calls = [call for call in recorder.calls if call.returned >= 0]
    return Trace(recorder.nodes, calls, sources, sinks, batch_size)


def main_output(output: object) -> object:
    """The logits of an output that names them, else the whole output."""
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output) if not isinstance(output, Tensor) else output


class _Recorder(TorchDispatchMode):
    """Build the graph of tensors while operators run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.n_returned = 0
        # Node of a tensor by its id; tensors stay alive so that no id is used twice.
        self.node_of: dict[int, int] = {}
        self._sharing: dict[object, list[Tensor]] = {}
        self._seen: set[int] = set()

    def knows(self, tensor: Tensor) -> bool:
        return id(tensor) in self.node_of

    def add(self, tensor: Tensor, node: Node) -> int:
        self._keep(tensor)
        self.nodes.append(node)
        self.node_of[id(tensor)] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def _keep(self, tensor: Tensor) -> None:
        if id(tensor) not in self._seen:
            self._seen.add(id(tensor))
            self._sharing.setdefault(_memory(tensor), []).append(tensor)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = list(tensors_in((args, kwargs)))
        for tensor in given:
            self._keep(tensor)
        bound, written = _bind(func, args, kwargs)
        if (
            func is torch.ops.aten.native_batch_norm.default
            and not bound["training"]
            and isinstance(args[0], FakeTensor)
        ):  # Fake tensors go through twenty operators for one, which takes most of a pass.
            none = args[0].new_empty(0)
            result: Any = (torch.empty_like(args[0]), none, none.clone())
        else:
            result = func(*args, **kwargs)
        made = list(tensors_in(result))
        name = func._schema.name.split("::")[-1]
        base = name.rstrip("_")
        if base in ("copy", "zero", "fill") and written:
            # These overwrite all values, so the old ones do not flow on.
            given = [tensor for tensor in given if all(tensor is not w for w in written)]
        read = [t for t in given if self.knows(t)]
        if not read or _SHAPE_ONLY.search(base):
            for tensor in made:
                self._keep(tensor)
                if any(tensor is w for w in written):
                    self.node_of.pop(id(tensor), None)
            return result
        inputs = tuple(dict.fromkeys(self.node_of[id(t)] for t in read))
        sources = [(t, self.nodes[self.node_of[id(t)]].axes) for t in read]
        for tensor in [*written, *(m for m in made if all(m is not w for w in written))]:
            axes, reduced = propagate_axes(base, bound, sources, tensor)
            node = Node(
                op=name,
                inputs=inputs,
                shape=tuple(tensor.shape),
                axes=axes,
                mixes=reduced or _mixes(func, base, bound),
                scales=base in ("mul", "div") and not (base == "div" and read[0] is not args[0]),
                moves=base in _MOVE,
            )
            index = self.add(tensor, node)
            if any(tensor is w for w in written):
                self._update_aliases(tensor, index)
        return result

    def _update_aliases(self, tensor: Tensor, index: int) -> None:
        """Give new nodes to the tensors that share memory with one just written to."""
        for other in self._sharing[_memory(tensor)]:
            if other is tensor:
                continue
            before = (self.node_of[id(other)],) if self.knows(other) else ()
            axes = self.nodes[before[0]].axes if before else _NO_AXES
            if not axes and other.dim() == tensor.dim():
                axes = self.nodes[index].axes
            self.add(other, Node("alias", (*before, index), tuple(other.shape), axes))


def _memory(tensor: Tensor) -> object:
    """A key that tensors share exactly if they share memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse and other tensors without plain storage
        return ("none", id(tensor))


def _bind(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any], list[Tensor]]:
    """Arguments of an operator by their names, and the tensors that it writes to."""
    bound: dict[str, Any] = {}
    written: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if position < len(args) and not argument.kwarg_only:
            value = args[position]
        elif argument.name in kwargs:
            value = kwargs[argument.name]
        else:
            value = argument.default_value if argument.has_default_value() else None
        bound[argument.name] = value
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.extend(tensors_in(value))
    return bound, written


def _mixes(func: Any, base: str, bound: Mapping[str, Any]) -> bool:
    """Whether an operator forms new channels out of the old ones."""
    if _CONVOLUTION.search(base):
        groups, data = bound.get("groups", 1), next(tensors_in(bound))
        return not (groups > 1 and groups == data.shape[1])
    if _PRODUCT.search(base):
        return True
    # Assume it of operators from outside PyTorch, of which nothing is known.
    return str(func._schema.name).split("::")[0] not in ("aten", "prims", "prim")


def propagate_axes(
    op: str, bound: Mapping[str, Any], read: Sequence[tuple[Tensor, Axes]], made: Tensor
) -> tuple[Axes, bool]:
    """The axes of the channels after an operator (empty: unknown); whether it reduced over them.

    Args:
        op: Name of the operator without namespace, overload and trailing underscore.
        bound: Its arguments by name.
        read: The tensors it reads that depend on the inputs, with the axes of their channels.
        made: The tensor it makes.
    """
    n = made.dim()
    tensor, axes = read[0]
    if n == 0:
        return _NO_AXES, bool(axes)
    if _CONVOLUTION.search(op) or (_NORM.search(op) and n > 1):
        # batch_norm and its kind also return statistics, which are vectors.
        return frozenset({1} if n > 1 else {}), False
    if "layer_norm" in op or "rms_norm" in op:
        normalized = len(bound.get("normalized_shape") or ())
        inside = bool(axes) and all(axis >= n - normalized for axis in axes)
        return axes if inside or normalized > 1 else frozenset({n - 1}), False
    if "attention" in op:
        return axes if tensor.dim() == n else _NO_AXES, False
    if op in ("bmm", "baddbmm", "matmul") and n > 2:
        second = bound.get("mat2", bound.get("batch2", bound.get("other")))
        known = next((a for t, a in read if t is second), _NO_AXES)
        kept = frozenset(a for a in known if a != n - 2)
        return kept or frozenset({n - 1}), False
    if _PRODUCT.search(op):
        return frozenset({n - 1}), False
    if op in _VIEW:
        return _through_view(tuple(tensor.shape), tuple(made.shape), axes), False
    if op in _REDUCE:
        return _through_reduction(bound, tensor, axes, made)
    rearranged = _rearranged(op, bound, tensor, axes, made)
    if rearranged is not None:
        return rearranged, False
    if _POOL.search(op) and not axes and n > 2:
        return frozenset({1}), False
    return _through_broadcast(read, made), False


def _rearranged(
    op: str, bound: Mapping[str, Any], tensor: Tensor, axes: Axes, made: Tensor
) -> Axes | None:
    """Axes after operators that permute, add or drop axes; None for any other operator."""
    n = tensor.dim()
    if op in ("permute", "permute_copy"):
        order = [dim % n for dim in bound["dims"]]
        return frozenset(new for new, old in enumerate(order) if old in axes)
    if op in ("transpose", "transpose_copy", "t", "numpy_T", "mT", "swapaxes", "swapdims"):
        if n < 2:
            return axes
        first, second = (bound.get("dim0", -2) % n, bound.get("dim1", -1) % n)
        swap = {first: second, second: first}
        return frozenset(swap.get(axis, axis) for axis in axes)
    if op in ("select", "unbind", "squeeze"):
        # squeeze without dim drops every axis of length one.
        dropped = bound.get("dim", [d for d in range(n) if tensor.shape[d] == 1])
        dims = {d % n for d in ([dropped] if isinstance(dropped, int) else dropped)} if n else set()
        if op == "squeeze":
            dims = {d for d in dims if tensor.shape[d] == 1}
        return frozenset(a - sum(d < a for d in dims) for a in axes if a not in dims)
    if op in ("unsqueeze", "stack"):
        new = bound["dim"] % made.dim()
        return frozenset(axis + (axis >= new) for axis in axes)
    if op in ("expand", "repeat"):
        return frozenset(axis + made.dim() - n for axis in axes)
    return None


def _through_reduction(
    bound: Mapping[str, Any], tensor: Tensor, axes: Axes, made: Tensor
) -> tuple[Axes, bool]:
    """Axes after a reduction, and whether it ran over channels."""
    n, dims = tensor.dim(), bound.get("dim")
    if "dim" not in bound and "other" in bound:  # the elementwise max and min of two tensors
        return axes if n == made.dim() else _NO_AXES, False
    if dims is None or dims == []:
        return _NO_AXES, True
    gone = {d % n for d in ([dims] if isinstance(dims, int) else dims)}
    kept = frozenset(axis for axis in axes if axis not in gone)
    reduced = bool(axes) and kept != axes
    if made.dim() != n:
        kept = frozenset(axis - sum(d < axis for d in gone) for axis in kept)
    return (_NO_AXES, True) if reduced else (kept, False)


def _through_broadcast(read: Sequence[tuple[Tensor, Axes]], made: Tensor) -> Axes:
    """Axes after an elementwise operator, or one that keeps the layout of its input."""
    n = made.dim()
    for exact in (True, False):
        for tensor, axes in read:
            shift = n - tensor.dim()
            if not axes or shift < 0:
                continue
            moved = frozenset(axis + shift for axis in axes)
            if not exact or all(tensor.shape[a - shift] == made.shape[a] for a in moved):
                return moved
    return _NO_AXES


def _through_view(old: tuple[int, ...], new: tuple[int, ...], axes: Axes) -> Axes:
    """Axes after a view: an axis may be kept, split into several or merged with others.

    Where channels are merged with positions, the merged axis counts.

    Example:
        >>> sorted(_through_view((2, 6, 5, 5), (2, 3, 2, 5, 5), frozenset({1})))
        [1, 2]
        >>> sorted(_through_view((2, 3, 2, 5, 5), (2, 6, 5, 5), frozenset({1, 2})))
        [1]
        >>> sorted(_through_view((2, 6, 5, 5), (2, 150), frozenset({1})))
        [1]
    """
    if not axes or 0 in old:
        return _NO_AXES
    result: set[int] = set()
    i = j = 0
    while i < len(old) and j < len(new):
        first_i, first_j = i, j
        size_i, size_j = old[i], new[j]
        i, j = i + 1, j + 1
        while size_i != size_j:
            if size_i < size_j:
                size_i, i = size_i * old[i], i + 1
            else:
                size_j, j = size_j * new[j], j + 1
        inside = [axis for axis in range(first_i, i) if axis in axes]
        if not inside:
            continue
        before = [axis for axis in range(first_i, i) if old[axis] > 1]
        after = [axis for axis in range(first_j, j) if new[axis] > 1]
        if len(after) <= 1 or all(axis in axes for axis in before):
            # Channels alone, or merged with others into one axis.
            result.update(after or [first_j])
        else:
            ends_old = {math.prod(old[axis + 1 : i]): axis for axis in inside}
            for axis in after:
                source = ends_old.get(math.prod(new[axis + 1 : j]))
                if source is not None and old[source] == new[axis]:
                    result.add(axis)
    # Heads that were merged with the batch come back beside it.
    return frozenset(result - {0} if len(result) > 1 else result)


@contextmanager
def _calls_recorded(model: nn.Module, recorder: _Recorder) -> Iterator[None]:
    """Record the calls of a model's modules."""
    # Calls nest, so those that are open form a stack.
    stack: list[Call] = []

    def entering(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = list(tensors_in((args, kwargs)))
            only = args[0] if args and isinstance(args[0], Tensor) else None
            one = only is not None and len(args) == len(given) == 1
            call = Call(
                name=name,
                start=len(recorder.nodes),
                entered=len(recorder.calls),
                inputs=tuple(recorder.node_of.get(id(t)) for t in given),
                argument=recorder.node_of.get(id(only)) if one else None,
                argument_shape=tuple(only.shape) if one and only is not None else None,
                argument_kind=_words((*args, *kwargs.values())),
            )
            recorder.calls.append(call)
            stack.append(call)

        return hook

    def leaving(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            call = stack.pop()
            while call.name != name:  # left by an exception that the model caught
                call = stack.pop()
            call.end = len(recorder.nodes)
            call.returned = recorder.n_returned
            recorder.n_returned += 1
            call.kind = _words(output)
            if isinstance(output, Tensor):
                if output.is_complex():
                    call.kind = "complex numbers"
                    return
                if output.is_quantized:
                    return
                call.output = recorder.node_of.get(id(output))
                call.shape = tuple(output.shape)
                call.floating = output.is_floating_point()

        return hook

    with owned() as owner, ExitStack() as undone:
        for name, module in model.named_modules():
            before, after = owner.only(entering(name)), owner.only(leaving(name))
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            undone.callback(handle.remove)
            undone.callback(module.register_forward_hook(after).remove)
        yield


def _words(value: object) -> str:
    """Say what a module got or returned."""
    if isinstance(value, Tensor):
        return INT8 if value.is_quantized else "a tensor"
    n = len(list(tensors_in(value)))
    kind = type(value).__name__
    return f"a {kind} with {n} tensor{'' if n == 1 else 's'}"


def graph_nodes(root: Any) -> Iterator[Any]:
    """The nodes of an autograd graph, from its end."""
    seen: set[Any] = set()
    waiting = [root]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [child for child, _ in node.next_functions]
            yield node


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` made or changed a module: it ignores hooks that are added later.

    By ``torch.compile(module)``, in place by ``module.compile()``, or in its ``forward``.

    Example:
        >>> is_compiled(nn.Linear(2, 2))
        False
    """
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    own = hasattr(getattr(module, "forward", None), "_torchdynamo_orig_callable")
    return in_place or own or hasattr(module, "_orig_mod")


def eager(model: nn.Module) -> AbstractContextManager[object]:
    """Run compiled code eagerly: it ignores later hooks, or compiles again for each set of them."""
    # Functions called by a forward pass may be compiled without a sign of it on any module.
    if "torch._dynamo.eval_frame" not in sys.modules:
        return nullcontext()
    set_stance = getattr(torch.compiler, "set_stance", None)
    if set_stance is None and any(map(is_compiled, model.modules())):  # torch < 2.6
        raise RuntimeError(
            "a network made by torch.compile ignores hooks; pass the original module "
            "(compiled._orig_mod), or use torch >= 2.6."
        )
    stance: AbstractContextManager[object] = (set_stance or nullcontext)("force_eager")
    return stance


@contextmanager
def no_attention_fast_path() -> Iterator[None]:
    """Keep attention modules from running as one operator that calls no submodule."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
