"""Undo what a forward pass leaves on a network's modules.

Some networks change themselves when they run, in eval mode too: observers of quantisation-aware
training, counters, moving averages, caches of features. This package runs a user's network inside
:func:`unchanged`, or through a ``Runner``, whose passes all start from the state that was handed
over. Nothing is written if a pass has changed nothing, so threads may share such a network.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Copies", "Kept", "unchanged"]

#: Hooks come and go with contexts, also in other threads; no pass adds any.
_HOOKS = frozenset(key for key in vars(nn.Module()) if "hook" in key)
_TABLES = frozenset({"_parameters", "_modules"})
#: The attributes of each module, in this order.
_BASE = list(vars(nn.Module()))
_EMPTY: dict[str, Any] = {}
#: How many contexts have ended.
_EPOCH = [0]
#: How many contexts of other libraries are open, which keep data on modules between passes.
_FOREIGN = [0]
_DICTS = (dict, OrderedDict, defaultdict, Counter)
_CONTAINERS = frozenset({*_DICTS, list, set, deque, tuple})
_PLAIN = frozenset({int, float, bool, str, bytes, type(None), torch.device, torch.dtype})


class Copies(dict[int, "_Snapshot"]):
    """Copies of tensors, reused until the tensors are written to; never pickled.

    Attributes:
        pending: A pass whose graph may still be needed.
        stateful: A pass has changed a tensor. Writes that do not count as versions (through
            ``.data``, or by some observers) are then looked for in each pass, else in the first.
    """

    pending: Kept | None = None
    stateful = False

    def __reduce__(self) -> tuple[Any, ...]:
        return Copies, ()


def _version(tensor: Tensor) -> int:
    """How often a tensor was written to; -1: not counted."""
    return -1 if tensor.is_inference() else int(tensor._version)


def _place(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, for one
        return None


def _same(now: Any, kept: Any) -> bool:
    """Whether two containers of one kind hold the very same objects, in the same order."""
    if len(now) != len(kept):
        return False
    if isinstance(now, dict) and not all(map(is_, now, kept)):
        return False
    if isinstance(now, set):
        return bool(now == kept)
    values = (now.values(), kept.values()) if isinstance(now, dict) else (now, kept)
    return all(map(is_, *values))


class _Snapshot:
    """The memory and the values of one tensor."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.alias, self.copy = tensor, tensor.detach(), tensor.detach().clone()
        self.version, self.place = _version(tensor), _place(tensor)
        self.compared = True
        self.after: int | None = None

    def changed(self) -> bool:
        moved = _version(self.tensor) != self.version or _place(self.tensor) != self.place
        if not moved and self.compared and not self.tensor.is_meta:
            moved = not torch.equal(self.tensor, self.copy)
            self.compared = self.version < 0
        return moved

    def restore(self) -> None:
        tensor, alias = self.tensor, self.alias
        # Leaving inference mode switches gradients on.
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            here = (_place(tensor), tensor.shape, tensor.layout)
            if here != (self.place, alias.shape, alias.layout) or (
                tensor.layout == torch.strided and tensor.stride() != alias.stride()
            ):
                tensor.data = alias
            tensor.copy_(self.copy)


class Kept:
    """What a network's modules hold at this moment.

    Args:
        model: The network.
        copies: Copies of its tensors, reused from one time to the next. Changes that an earlier
            pass has left on them are undone first.

    Example:
        >>> net = nn.BatchNorm1d(2)  # in train mode
        >>> kept = Kept(net)
        >>> _ = net(torch.ones(3, 2))
        >>> kept.restore()
        >>> net.running_mean, net.num_batches_tracked
        (tensor([0., 0.]), tensor(0))
    """

    def __init__(self, model: nn.Module, copies: Copies | None = None) -> None:
        self._copies = Copies() if copies is None else copies
        if self._copies.pending is not None:
            self._copies.pending._finish()
        self._modules: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self._containers: list[tuple[Any, Any]] = []
        self._generators: list[tuple[torch.Generator, Tensor]] = []
        self._seen = set[int]()
        self._snapshots: list[_Snapshot] = []
        for module in model.modules():
            attributes = vars(module)
            kept = dict(attributes)
            self._modules.append((attributes, kept))
            own: Iterable[tuple[str, Any]] = kept.items()
            if [*islice(kept, len(_BASE))] == _BASE:  # nearly always
                own = islice(own, len(_BASE), None)
                for table in (module._parameters, module._modules):
                    self._containers.append((table, table.copy() if table else _EMPTY))
                if module._buffers:
                    self._keep_value(module._buffers)
                else:
                    self._containers.append((module._buffers, _EMPTY))
            for key, value in own:
                kind = type(value)
                if kind in _PLAIN or key in _HOOKS:
                    continue
                if key in _TABLES:
                    if kind in _DICTS:
                        self._containers.append((value, dict(value)))
                else:
                    self._keep_value(value)
            # It scales its weights in its forward pass.
            if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
                self._keep_tensor(module.weight)
        for buffer in model.buffers():  # those of scripted modules are not in a table
            self._keep_tensor(buffer)
        del self._seen

    def _keep_tensor(self, tensor: Tensor) -> None:
        if id(tensor) in self._seen:
            return
        self._seen.add(id(tensor))
        snapshot, stateful = self._copies.get(id(tensor)), self._copies.stateful
        if snapshot is None or snapshot.compared or stateful or snapshot.version != tensor._version:
            if torch.nn.parameter.is_lazy(tensor):
                return
            snapshot = self._copies[id(tensor)] = _Snapshot(tensor)
        self._snapshots.append(snapshot)

    def _keep_value(self, value: Any) -> None:
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                self._keep_tensor(value)
        elif isinstance(value, torch.Generator):
            self._generators.append((value, value.get_state()))
        elif type(value) in _CONTAINERS and id(value) not in self._seen:
            self._seen.add(id(value))
            if type(value) is not tuple:
                copied = dict(value) if isinstance(value, dict) else value.copy()
                self._containers.append((value, copied))
            for inner in value.values() if isinstance(value, dict) else value:
                if type(inner) not in _PLAIN:
                    self._keep_value(inner)

    def restore(self, *, graph: bool = False) -> None:
        """Put back what has changed.

        Args:
            graph: The pass's graph is still needed. Tensors and attributes that it may use are put
                back at the next pass with the same copies, or when an :func:`unchanged` around it
                ends.
        """
        if not graph and not _FOREIGN[0]:
            self._restore_attributes()
        self._snapshots = [snapshot for snapshot in self._snapshots if snapshot.changed()]
        for snapshot in self._snapshots:
            snapshot.after = _version(snapshot.tensor)
        self._copies.stateful |= bool(self._snapshots)
        self._epoch = _EPOCH[0]
        self._copies.pending = self if graph else None
        if not graph:
            self._restore_tensors()

    def _finish(self) -> None:
        """Restore what was kept for the graph, unless an outer context has done so already."""
        if self._epoch == _EPOCH[0] and not _FOREIGN[0]:
            self._restore_attributes()
        self._restore_tensors()

    def _restore_attributes(self) -> None:
        for attributes, kept in self._modules:
            if not _same(attributes, kept):
                for key in [key for key in attributes if key not in kept]:
                    del attributes[key]
                for key, value in kept.items():
                    if attributes.get(key, self) is not value:
                        attributes[key] = value
        for container, copied in self._containers:
            if not _same(container, copied):
                container.clear()
                add = "extend" if isinstance(container, (list, deque)) else "update"
                getattr(container, add)(copied)
        for generator, state in self._generators:
            if not torch.equal(generator.get_state(), state):
                generator.set_state(state)

    def _restore_tensors(self) -> None:
        """Put back the tensors that the pass has written to, unless they were written to since."""
        for snapshot in self._snapshots:
            if _version(snapshot.tensor) == snapshot.after:
                snapshot.restore()
        self._snapshots, self._copies.pending = [], None


@contextmanager
def unchanged(model: nn.Module, *, foreign: bool = False) -> Iterator[None]:
    """Undo what forward passes inside leave on a network's modules, also after an exception.

    It restores buffers and other tensors (values, memory, strides, the objects), attributes such as
    counters and caches, lists and dictionaries of them, and a module's own random generator. It
    does not see weights that a forward pass changes (but ``max_norm`` of embeddings), the inside of
    other objects (a meter, a NumPy array), and anything outside of the network's modules.

    Args:
        model: The network.
        foreign: For other libraries, which keep things on modules from one pass to the next.

    Example:
        >>> class Counting(nn.Identity):
        ...     calls = 0
        ...     def forward(self, x):
        ...         self.calls += 1
        ...         return x
        >>> net = Counting()
        >>> with unchanged(net):
        ...     _ = net(torch.ones(1)), net(torch.ones(1))
        ...     net.calls
        2
        >>> net.calls
        0
    """
    kept = Kept(model)
    _FOREIGN[0] += foreign
    try:
        yield
    finally:
        _FOREIGN[0] -= foreign
        kept.restore()
        _EPOCH[0] += 1
