"""How to run a network: where, in what precision, in what batches, and how it is called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict

import torch

from nad_attr.system.memory import parse_bytes

__all__ = ["FROM_RUN", "RunFields", "RunOptions", "as_options"]


class _FromRun:
    """Marks a keyword that was not given, so that the field of ``run`` counts."""

    def __repr__(self) -> str:
        return "<as in run>"


FROM_RUN: Any = _FromRun()

#: Autocast's dtypes, by the value of ``amp``.
_AMP = {None: None, False: None, True: torch.bfloat16} | {
    dtype: dtype for dtype in (torch.bfloat16, torch.float16)
}


@dataclass(frozen=True, eq=False)
class RunOptions:
    """How to run a network. Everything that runs one takes it as ``run=``.

    Attributes:
        device: Where to run. None: where the network is. Elsewhere, a copy of it is used.
        amp: Mixed precision: a dtype for autocast, True for bfloat16. Gates and answers stay
            float32.
        batch_size: Images in one pass of the network, at most; copies of an image and donors of an
            ablation count as images. "auto": as many as fit into memory, measured with the first
            image (on a CPU or CUDA). None: 64; 32 for pictures, 16 for a dissection, 8 for a flow.
            It changes memory and speed; results change only by rounding.
        memory_limit: Bytes, or a text such as "8GB": the limit of a batch with "auto", and of the
            answers of sub-architectures that are kept at once (at least one's; with too little, the
            data are read several times, with the same results). With both, the answers have a
            quarter. None: half of the free memory on a CPU, 90 % on a GPU; 1 GB of answers, or
            256 MB where many sizes are measured.
        forward_func: Called with the inputs in place of the network, to choose among several
            outputs, for example. It must run the network, and return (B, K), one output per class.
        additional_forward_args: Further arguments of every call, one or a tuple of them, the same
            for all images.
        show_progress: Show a progress bar with the time left.

    Raises:
        TypeError: If ``forward_func`` is not a function.
        ValueError: If another field has no sensible value.

    Example:
        >>> run = RunOptions(batch_size=16, amp=True)
        >>> run
        RunOptions(amp=True, batch_size=16)
        >>> RunOptions(batch_size=0)
        Traceback (most recent call last):
            ...
        ValueError: batch_size must be a whole number from 1 on or 'auto', got 0.
    """

    device: str | torch.device | None = None
    amp: bool | torch.dtype | None = None
    batch_size: int | Literal["auto"] | None = None
    memory_limit: int | str | None = None
    forward_func: Callable[..., Any] | None = None
    additional_forward_args: Any = None
    show_progress: bool = False

    def __post_init__(self) -> None:
        if self.device is not None:
            try:
                torch.device(self.device)
            except (RuntimeError, TypeError, ValueError):
                raise ValueError(
                    f"device must be 'cpu', 'cuda' or the like, got {self.device!r}."
                ) from None
        amp = self.amp
        if not (amp is None or isinstance(amp, (bool, torch.dtype))) or amp not in _AMP:
            raise ValueError(f"amp must be True, torch.bfloat16 or torch.float16, got {amp!r}.")
        n = self.batch_size
        whole = isinstance(n, int) and not isinstance(n, bool) and n > 0
        if not (n is None or n == "auto" or whole):
            raise ValueError(f"batch_size must be a whole number from 1 on or 'auto', got {n!r}.")
        if self.memory_limit is not None:
            parse_bytes(self.memory_limit)
        if self.forward_func is not None and not callable(self.forward_func):
            raise TypeError(f"forward_func must be a function, got {self.forward_func!r:.60}.")
        if not isinstance(self.show_progress, bool):
            raise ValueError(f"show_progress must be True or False, got {self.show_progress!r}.")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that autocast computes in; None: no autocast."""
        return _AMP[self.amp]

    @property
    def arguments(self) -> tuple[Any, ...]:
        """The additional arguments of a call."""
        extra = self.additional_forward_args
        if isinstance(extra, (tuple, list)):
            return tuple(extra)
        return () if extra is None else (extra,)

    @property
    def limit(self) -> int | None:
        """The memory limit in bytes."""
        return None if self.memory_limit is None else parse_bytes(self.memory_limit)

    def kept_bytes(self, default: int) -> int:
        """Bytes of answers that may be kept at once, in addition to a batch."""
        if self.limit is None:
            return default
        return self.limit // 4 if self.batch_size == "auto" else self.limit

    def __repr__(self) -> str:
        said = ((f.name, getattr(self, f.name)) for f in fields(self))
        named = ", ".join(f"{k}={v!r}" for k, v in said if v is not None and v is not False)
        return f"RunOptions({named})"


class RunFields(TypedDict, total=False):
    """Fields of :class:`RunOptions` as keywords of a call, in place of those of its ``run``."""

    device: str | torch.device | None
    amp: bool | torch.dtype | None
    batch_size: int | Literal["auto"] | None
    memory_limit: int | str | None
    forward_func: Callable[..., Any] | None
    additional_forward_args: Any
    show_progress: bool


def as_options(run: RunOptions | None = None, **fields: Any) -> RunOptions:
    """The options, with the given keywords in place of their fields.

    Args:
        run: The options; None: the defaults.
        **fields: Fields of :class:`RunOptions`; ``FROM_RUN`` for one that was not given.

    Raises:
        TypeError: If ``run`` is something else, or there is no such field.
        ValueError: See :class:`RunOptions`.

    Example:
        >>> as_options(RunOptions(device="cpu", batch_size=8), batch_size=2)
        RunOptions(device='cpu', batch_size=2)
    """
    if run is not None and not isinstance(run, RunOptions):
        raise TypeError(f"run must be nad_attr.RunOptions(...), got {run!r:.60}.")
    unknown = [name for name in fields if name not in RunFields.__annotations__]
    if unknown:
        raise TypeError(
            f"there is no argument {unknown[0]!r}; the arguments of a run are "
            f"{', '.join(RunFields.__annotations__)}."
        )
    given = {name: value for name, value in fields.items() if value is not FROM_RUN}
    return replace(run or RunOptions(), **given)
