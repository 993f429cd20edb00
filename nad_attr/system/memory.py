"""How much memory work takes, the largest batch that fits, and memory that is not given back."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["available", "keep_freed_memory", "largest_batch", "parse_bytes", "peak_memory"]

#: Share of the free memory that a batch may take. A CPU's memory also holds data and programs.
USABLE_SHARE = {"cpu": 0.5, "cuda": 0.9}
#: Share of it that the measured need may fill: libraries take scratch space, the heap has gaps.
MAX_FILLED = 0.8
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "KI": 2**10, "MI": 2**20, "GI": 2**30}

#: Where the system's files are; another folder in tests.
_ROOT = Path("/")
#: Constants of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
#: Turns off giving back the heap's end; the largest int would still give back what exceeds 2 GB.
_NEVER = -1


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensors of this process.

    Otherwise glibc returns each large tensor to the system, and a CPU spends a tenth to a third of
    its passes on new memory pages. Programs call it early, as the command line does.

    Returns:
        Whether it was done: only on Linux with glibc, without ``MALLOC_`` variables or
        ``GLIBC_TUNABLES``.

    Source: mallopt(3).

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    own = [key for key in os.environ if key.startswith("MALLOC_") or key == "GLIBC_TUNABLES"]
    if own or not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):  # another C library
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _NEVER))


def parse_bytes(value: int | float | str) -> int:
    """A number of bytes, or a text such as "8GB", "500 MB" or "6GiB".

    Raises:
        ValueError: If it is none of these, or not above 0.

    Example:
        >>> parse_bytes("1.5GB"), parse_bytes("2 KiB"), parse_bytes(10)
        (1500000000, 2048, 10)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", str(value), re.IGNORECASE)
    n = float(found[1]) * _UNITS.get((found[2] or "").upper(), 0) if found is not None else 0
    if n < 1:
        raise ValueError(
            f"memory_limit must be a number of bytes or a text such as '8GB', got {value!r}."
        )
    return int(n)


def available(device: torch.device) -> int:
    """Bytes that are free on a device.

    Raises:
        ValueError: If it is not known; a limit has to be given then.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The memory that torch reserves for later tensors is free for these.
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free + reserved)
    if device.type == "cpu" and (ram := _free_ram()) is not None:
        return ram
    raise ValueError(
        f"the free memory on {device} is not known: give memory_limit=, such as '8GB'."
    )


def _free_ram() -> int | None:
    """Bytes of main memory that are free for this process; None: unknown."""
    free = []
    meminfo = _ROOT / "proc/meminfo"
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s*(\d+) kB", meminfo.read_text())
        if found:
            free.append(int(found[1]) * 1024)
    elif "SC_AVPHYS_PAGES" in getattr(os, "sysconf_names", {}):  # not on Windows
        free.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    free += _cgroup_rooms()  # containers and batch systems allow less than the machine has
    return max(0, min(free)) if free else None


#: Files of a memory cgroup: limit, use, and the lines of memory.stat about reclaimable memory.
_Files: TypeAlias = tuple[str, str, tuple[str, ...]]
_V2: _Files = ("memory.max", "memory.current", ("inactive_file", "slab_reclaimable"))
_V1: _Files = ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file",))


def _cgroup_rooms() -> list[int]:
    """Bytes that are free in each memory cgroup of this process, nested ones included.

    Source: "Control Group v2" and "Memory Resource Controller" in the Linux kernel's documentation.
    """
    try:
        groups = (_ROOT / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    rooms = []
    for line in groups:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            files, kind = _V2, "cgroup2"
        elif "memory" in controllers.split(","):
            files, kind = _V1, "cgroup"
        else:
            continue
        for root, top in _mounts(kind):
            # In a container the mount may show only a part of the tree, and the path may lead out.
            parts = [part for part in Path(path).parts if part not in ("/", "..")]
            shown = [part for part in Path(root).parts if part not in ("/", "..")]
            if shown and parts[: len(shown)] == shown:
                parts = parts[len(shown) :]
            for depth in range(len(parts) + 1):
                room = _room(top.joinpath(*parts[:depth]), *files)
                if room is not None:
                    rooms.append(room)
    return rooms


def _mounts(kind: str) -> list[tuple[str, Path]]:
    """Mounts of cgroups of a kind: the part of the tree that each shows, and its place."""
    try:
        lines = (_ROOT / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        lines = []
    found = []
    for line in lines:
        fields, _, rest = line.partition(" - ")
        if rest.split(" ")[0] == kind and (kind == "cgroup2" or "memory" in re.split("[ ,]", rest)):
            root, place = (part.replace("\\040", " ") for part in fields.split(" ")[3:5])
            found.append((root, _ROOT / place.lstrip("/")))
    usual = "sys/fs/cgroup" if kind == "cgroup2" else "sys/fs/cgroup/memory"
    return found or [("/", _ROOT / usual)]


def _room(group: Path, limit: str, used: str, reclaimable: Sequence[str]) -> int | None:
    """Bytes that are free in one cgroup; None: it has no limit."""
    try:
        allowed, taken = (int((group / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # no such file; "max" is not a limit
        return None
    with suppress(OSError, ValueError):
        # Cached files are given back when memory is needed.
        stat = dict(line.split(" ", 1) for line in (group / "memory.stat").read_text().splitlines())
        taken -= sum(int(stat.get(name, 0)) for name in reclaimable)
    return allowed - max(0, taken)


class _Live(TorchDispatchMode):
    """Add up the sizes of the tensors that operations make, while they exist."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.in_use = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            place, size = storage.data_ptr(), storage.nbytes()
            if size == 0 or place in given or place in self._known:  # a view, or in place
                continue
            self._known[place] = size
            self.in_use += size
            self.peak = max(self.peak, self.in_use)
            weakref.finalize(storage, self._freed, place)
        return result

    def _freed(self, place: int) -> None:
        self.in_use -= self._known.pop(place)


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


def peak_memory(device: torch.device, function: Callable[[], object]) -> int:
    """Highest number of tensor bytes that a function adds at any time; it is run once.

    On CUDA the allocator counts. Elsewhere the tensors that operations return are counted, without
    scratch space inside an operation.

    Example:
        >>> peak_memory(torch.device("cpu"), lambda: torch.zeros(1000) + torch.ones(1000))
        12000
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _Live() as live:
        function()
    return int(live.peak)


def largest_batch(
    device: torch.device,
    run: Callable[[int], object],
    *,
    limit: int | None = None,
    fixed: float = 0.0,
    beside: float = 0.0,
    most: int = 512,
) -> int:
    """The largest batch, from 1 to ``most``, whose pass fits into memory.

    One image and then two are run and measured: each further image adds what the second added.

    Args:
        device: Where it runs.
        run: Runs a batch of so many images.
        limit: Bytes; None: half of the free memory on a CPU, 90 % on a GPU.
        fixed: Bytes that are taken beside all batches.
        beside: Bytes that each image of a batch takes beside its pass.
        most: The largest batch allowed.

    Raises:
        ValueError: If one image does not fit, or the free memory is not known.

    Example:
        >>> largest_batch(torch.device("cpu"), lambda n: torch.zeros(n, 1000), limit=10**6)
        200
    """
    if limit is None:
        free = available(device)  # refuses other kinds of device
        limit = int(USABLE_SHARE[device.type] * free)
    run(1)  # the first run also chooses algorithms
    one, two = (peak_memory(device, lambda n=n: run(n)) for n in (1, 2))  # type: ignore[misc]
    each = max(two - one, 0) + beside
    room = MAX_FILLED * limit - fixed - max(2 * one - two, 0)
    if each > room:
        raise ValueError(
            f"a batch of one image takes {(MAX_FILLED * limit - room + each) / 1e6:,.1f} MB beside "
            f"the weights, and {MAX_FILLED * limit / 1e6:,.1f} MB may be filled: raise "
            "memory_limit, or use smaller images, amp=True or fewer images per step."
        )
    return min(most, math.floor(room / each)) if each > 0 else most
