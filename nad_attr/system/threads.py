"""Hooks that act only in forward passes of the thread that put them there.

A service may explain in one thread and predict in another with the very same network. Hooks belong
to the module and run in every thread, so each of ours first asks an :class:`Owner`.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

__all__ = ["Owner", "owned", "stranger"]

_ENTERED: contextvars.ContextVar[tuple[Owner, ...]] = contextvars.ContextVar("entered", default=())
_STRANGER: contextvars.ContextVar[bool] = contextvars.ContextVar("stranger", default=False)


def _task() -> asyncio.Task[Any] | None:
    return asyncio.current_task() if asyncio._get_running_loop() is not None else None


class Owner:
    """The thread that entered a context, and the threads that compute for it.

    That is: the thread itself (of several asyncio tasks in it, the one that entered, as long as it
    lives); what it starts with its own context variables, as :func:`asyncio.to_thread` does; the
    threads of autograd, where a checkpointed block is run again; and DataParallel's replicas.
    Of the last two, which are threads of torch, nobody can say who started them. Any other thread
    is a stranger, and sees the whole network.

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
        """The same hook, for the owner's passes alone; in any other it leaves all as it is."""

        @wraps(hook)
        def mine(module: nn.Module, *args: Any) -> Any:
            return hook(module, *args) if self.acts(module) else None

        return mine


@contextmanager
def stranger() -> Iterator[None]:
    """Passes inside belong to no owner: no hook acts on them."""
    before = _STRANGER.get()
    _STRANGER.set(True)
    try:
        yield
    finally:
        _STRANGER.set(before)


@contextmanager
def owned() -> Iterator[Owner]:
    """The owner of the hooks that are put on inside."""
    owner = Owner()
    _ENTERED.set((*_ENTERED.get(), owner))
    try:
        yield owner
    finally:
        # Not reset by a token: the end may come in another context than the beginning.
        _ENTERED.set(tuple(other for other in _ENTERED.get() if other is not owner))
