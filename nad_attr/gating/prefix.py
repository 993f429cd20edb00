"""Keep what a network computes before a gate site, for passes that differ from there on.

A pass up to a site is the same for all sub-architectures that close the same channels before it.
:class:`Prefix` keeps what modules returned in one pass, and returns it in the passes to come.
Operations outside modules run again, on what the modules returned.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.sites.site import GateSite, unwrap
from nad_attr.sites.tracing import is_compiled, mapped

__all__ = ["Prefix"]

_ACTIVE: ContextVar[Prefix | None] = ContextVar("prefix", default=None)
_COUNTING = threading.Lock()
#: The call of all modules as torch has it, once for each context that is open.
_PLAIN: list[Callable[..., Any]] = []


class Prefix:
    """What the modules of a network returned in a pass before it reached a gate site.

    Args:
        model: The network, frozen. Passes inside :meth:`active` are without gradients.
        site: The name of the gate site up to which a pass is kept.
        before: What is kept up to an earlier site, on the same images and gates, where this pass
            may begin; None: it begins with the images.

    Attributes:
        complete: Whether a pass has reached the site.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).eval()
        >>> prefix = Prefix(net, "1")
        >>> hook = net[1].register_forward_hook(lambda *call: prefix.reached("1"))
        >>> with torch.no_grad(), prefix.active():
        ...     first = net(torch.ones(1, 2))
        >>> with torch.no_grad(), prefix.active():  # the first layer returns what it did
        ...     again = net(torch.zeros(1, 2))
        >>> bool(first == again)
        True
    """

    def __init__(self, model: nn.Module, site: str, before: Prefix | None = None) -> None:
        self._root, self._site, self._before = unwrap(model), site, before
        self._modules = frozenset(map(id, self._root.modules()))
        #: Calls that have ended, without those inside of them: the module, what it returned, and
        #: whether anything but the next module of a sequence may need that.
        self._calls: list[tuple[nn.Module, Any, bool]] = []
        self._skipped: set[str] = set() if before is None else set(before._skipped)
        self.complete = False

    @staticmethod
    def possible(model: nn.Module) -> bool:
        """Whether Python calls the network's modules, once for all images of a pass."""
        return not any(
            isinstance(module, (nn.DataParallel, torch.jit.ScriptModule)) or is_compiled(module)
            for module in model.modules()
        )

    def sites(self, sites: Sequence[GateSite]) -> list[GateSite]:
        """The sites that the next pass reaches: those outside of modules that it leaves out."""
        source = self if self.complete else self._before
        return [s for s in sites if source is None or s.name not in source._skipped]

    def reached(self, site: str) -> None:
        """Take note that a pass has come to a gate site."""
        self._reached.append(site)
        if site == self._site:
            self.complete, self._before = True, None

    @contextmanager
    def active(self) -> Iterator[None]:
        """Keep the pass inside, or begin it where an earlier one was kept up to.

        Raises:
            RuntimeError: If the network is called twice inside.
        """
        source = self if self.complete else self._before
        self._waiting: dict[int, deque[tuple[nn.Module, Any, bool]]] = {}
        for entry in () if source is None else source._calls:
            self._waiting.setdefault(id(entry[0]), deque()).append(entry)
        self._open: list[tuple[nn.Module, int]] = [(self._root, 0)]
        self._reached: list[str] = []
        self._is_called = False
        with _intercepted():
            token = _ACTIVE.set(self)
            try:
                yield
            finally:
                _ACTIVE.reset(token)

    def _call(self, module: nn.Module, plain: Callable[[], Any]) -> Any:
        if module is self._root:
            if self._is_called:
                raise RuntimeError("the network is called twice in a pass.")
            self._is_called = True
            return plain()
        waiting = self._waiting.get(id(module))
        if waiting:
            entry = waiting.popleft()
            if not self.complete:
                self._keep(entry)
            # The network may write into it in place.
            return mapped(entry[1], torch.clone) if entry[2] else entry[1]
        if self.complete:
            return plain()
        start, reached = len(self._calls), len(self._reached)
        self._open.append((module, start))
        try:
            output = plain()
        finally:
            self._open.pop()
        if not self.complete:
            del self._calls[start:]
            self._skipped.update(self._reached[reached:])
            self._keep((module, mapped(output, torch.clone), True))
        return output

    def _keep(self, entry: tuple[nn.Module, Any, bool]) -> None:
        parent, start = self._open[-1]
        if type(parent).forward is nn.Sequential.forward and len(self._calls) > start:
            module, output, _ = self._calls[-1]  # only the module of this entry has seen it
            self._calls[-1] = (module, mapped(output, _stand_in), False)
        self._calls.append(entry)


def _stand_in(tensor: Tensor) -> Tensor:
    """A tensor of the same shape that takes no memory."""
    return tensor.new_zeros(()).expand(tensor.shape)


@contextmanager
def _intercepted() -> Iterator[None]:
    """Let calls of all modules ask for the prefix that is active in their context."""
    with _COUNTING:
        plain = _PLAIN[0] if _PLAIN else nn.Module._call_impl
        _PLAIN.append(plain)

        @wraps(plain)
        def call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            prefix = _ACTIVE.get()
            if prefix is None or id(module) not in prefix._modules:
                return plain(module, *args, **kwargs)
            return prefix._call(module, lambda: plain(module, *args, **kwargs))

        nn.Module._call_impl = call  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        with _COUNTING:
            _PLAIN.pop()
            if not _PLAIN:
                nn.Module._call_impl = plain  # type: ignore[method-assign]
