"""Hooks that act only in forward passes of the thread that registered them.

A service may explain in one thread and predict in another with the same network. PyTorch runs hooks
in every thread, so each hook of this library first asks an :class:`Owner`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

__all__ = ["Owner", "alone", "guarded", "is_owned", "owned", "stranger"]

_ENTERED: contextvars.ContextVar[tuple[Owner, ...]] = contextvars.ContextVar("entered", default=())
_STRANGER: contextvars.ContextVar[bool] = contextvars.ContextVar("stranger", default=False)


def _task() -> asyncio.Task[Any] | None:
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


class Owner:
    """The thread that entered a context, and the threads that compute for it.

    These are the thread itself (of several asyncio tasks in it, the one that entered, as long as it
    lives), threads started with its context variables, as by :func:`asyncio.to_thread`, the threads
    of autograd, which run checkpointed blocks again, and DataParallel's replicas. (Threads of torch
    do not say who started them.) Any other thread sees the network without hooks.

    Example:
        >>> owner = Owner()
        >>> asked = []
        >>> thread = threading.Thread(target=lambda: asked.append(owner.acts(nn.Identity())))
        >>> thread.start(), thread.join(), owner.acts(nn.Identity()), asked
        (None, None, True, [False])
    """

    def __init__(self) -> None:
        self.thread, self.task = threading.get_ident(), _task()

    def acts(self, module: nn.Module) -> bool:
        """Whether a forward pass that calls this module is the owner's."""
        if _STRANGER.get():
            return False
        if threading.get_ident() == self.thread:
            if self.task is None or self.task.done() or _task() is self.task:
                return True
        if self in _ENTERED.get() or getattr(module, "_is_replica", False):
            return True
        # Inside a backward pass, in a thread that Python did not start.
        return torch._C._current_graph_task_id() != -1 and isinstance(
            threading.current_thread(), threading._DummyThread
        )

    def only(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """The same hook, for the owner's passes only."""
        if is_owned(hook):
            return hook

        @wraps(hook)
        def mine(module: nn.Module, *args: Any) -> Any:
            return hook(module, *args) if self.acts(module) else None

        setattr(mine, "is_owned", True)  # noqa: B010
        return mine


def is_owned(hook: object) -> bool:
    """Whether a hook acts for one owner only."""
    return getattr(hook, "is_owned", False) is True


@contextmanager
def stranger() -> Iterator[None]:
    """Passes inside belong to no owner, so no owned hook acts on them."""
    before = _STRANGER.get()
    _STRANGER.set(True)
    try:
        yield
    finally:
        _STRANGER.set(before)


@contextmanager
def owned() -> Iterator[Owner]:
    """The owner of the hooks that are registered inside."""
    owner = Owner()
    _ENTERED.set((*_ENTERED.get(), owner))
    try:
        yield owner
    finally:
        # Not reset by a token: the end may come in another context than the beginning.
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other is not owner))


#: The methods that register hooks on a module.
_REGISTERS = (
    "register_forward_hook",
    "register_forward_pre_hook",
    "register_full_backward_hook",
    "register_full_backward_pre_hook",
    "register_backward_hook",
)
_COUNTING = threading.Lock()
_PLAIN: dict[str, Callable[..., Any]] = {}
_GUARDS = [0]
#: Owners of hooks, the modules, and the handles; the innermost last.
_GUARD: contextvars.ContextVar[tuple[tuple[Owner, frozenset[int], list[Any]], ...]]
_GUARD = contextvars.ContextVar("guard", default=())


def _guarding(plain: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(plain)
    def register(module: nn.Module, hook: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for owner, modules, handles in reversed(_GUARD.get()):
            if id(module) in modules:
                handles.append(plain(module, owner.only(hook), *args, **kwargs))
                return handles[-1]
        return plain(module, hook, *args, **kwargs)

    return register


@contextmanager
def guarded(model: nn.Module) -> Iterator[None]:
    """Bind hooks that another library registers inside to this thread, and remove them at the end.

    Hooks of Captum and Zennit would act in the passes of all threads.
    """
    with owned() as owner:
        guard = owner, frozenset(map(id, model.modules())), list[Any]()
        with _COUNTING:
            _GUARDS[0] += 1
            if _GUARDS[0] == 1:
                _PLAIN.update((name, getattr(nn.Module, name)) for name in _REGISTERS)
                for name, plain in _PLAIN.items():
                    setattr(nn.Module, name, _guarding(plain))
        _GUARD.set((*_GUARD.get(), guard))
        try:
            yield
        finally:
            _GUARD.set(tuple(other for other in _GUARD.get() if other is not guard))
            with _COUNTING:
                _GUARDS[0] -= 1
                if _GUARDS[0] == 0:
                    for name, plain in _PLAIN.items():
                        setattr(nn.Module, name, plain)
            for handle in guard[2]:
                handle.remove()


_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock]
_LOCKS = weakref.WeakKeyDictionary()


@contextmanager
def alone(model: nn.Module) -> Iterator[None]:
    """Let one thread at a time use libraries that keep data on the network's modules."""
    with _COUNTING:
        lock = _LOCKS.setdefault(model, threading.RLock())
    with lock:
        yield
