"""Learn on many machines: chunks of tasks as Ray tasks (extra ``ray``).

Ray is imported only when a run begins. The network, the images and the rest of a run are packed
once and put into Ray's object store; each worker process unpacks them once. Results stream back to
the one process that writes the store.

Ray's cloudpickle transports objects between the processes of one run, which trust each other as
Ray's own do; no file is read with it.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import random
import uuid
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import reduce
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.gates.task_gates import TaskGates
from nad_attr.system.processes import check_processes, most_processes, n_cpus

if TYPE_CHECKING:
    from nad_attr.learning.session import Session

__all__ = ["RayExecutor", "WorkersLostError"]

#: Seconds that the driver waits for a result at a time.
POLL_SECONDS = 1.0


class WorkersLostError(RuntimeError):
    """A chunk lost its worker several times; the message says which chunk and what to do."""


class RayExecutor:
    """Learn chunks of tasks on the workers of a Ray cluster, or of this machine.

    The gates are the same for any number of workers: a chunk is learned as a whole by one worker,
    with as many threads as this process has, and on CPUs of one kind bit for bit as in this
    process.

    Args:
        address: "auto": the cluster that this machine belongs to. "local": a cluster of this
            machine alone, started and ended with the run. Else a cluster's address, ``HOST:6379``
            from a machine of the cluster or ``ray://HOST:10001`` from outside. A connection that
            this program has made with ``ray.init`` is used, and kept.
        n_workers: Chunks that are learned at the same time, at most; None: as many as fit. At most
            four for each CPU, or sixteen.
        gpus_per_worker: Share of a GPU for each worker, 0 to 1: with 0.5 two workers share one.
            With 0 the workers use CPUs.
        cpus_per_worker: CPUs that are reserved for each worker. None: as many as this process has
            threads, one if workers use GPUs. It does not change the threads of a worker.
        retries: How many times a chunk is given to another worker after its worker was lost.
        runtime_env: Ray's ``runtime_env`` for the workers, for example ``{"working_dir": "."}`` if
            they cannot import the network's module.

    Attributes:
        lost: Workers that were lost so far.

    Raises:
        TypeError, ValueError: If an argument is invalid.

    Example:
        >>> RayExecutor("local", n_workers=2)
        RayExecutor('local', n_workers=2, gpus_per_worker=0)
    """

    def __init__(
        self,
        address: str = "auto",
        *,
        n_workers: int | None = None,
        gpus_per_worker: float = 0,
        cpus_per_worker: float | None = None,
        retries: int = 5,
        runtime_env: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(address, str) or not address:
            raise TypeError(f"address must be 'auto', 'local' or an address, got {address!r}.")
        if n_workers is not None:
            check_count(n_workers, "n_workers")
        check_count(retries, "retries", least=0)
        if not _is_number(gpus_per_worker) or not 0 <= gpus_per_worker <= 1:
            raise ValueError(
                f"gpus_per_worker must be from 0 to 1, got {gpus_per_worker!r}: a worker uses one "
                "GPU or a share of it."
            )
        if cpus_per_worker is not None and (
            not _is_number(cpus_per_worker) or not cpus_per_worker > 0
        ):
            raise ValueError(f"cpus_per_worker must be above 0, got {cpus_per_worker!r}.")
        if address == "local" and n_workers is not None:
            check_processes(n_workers, least=1)
        self.address, self.n_workers = address, n_workers
        self.gpus_per_worker, self.cpus_per_worker = gpus_per_worker, cpus_per_worker
        self.retries = retries
        self.runtime_env = None if runtime_env is None else dict(runtime_env)
        self.lost = 0

    def __repr__(self) -> str:
        return (
            f"RayExecutor({self.address!r}, n_workers={self.n_workers}, "
            f"gpus_per_worker={self.gpus_per_worker})"
        )

    def session_device(self, device: str | torch.device | None) -> str:
        """The CPU, since this process only checks, takes channel means and writes.

        Raises:
            ImportError: If ray is not installed.
            ValueError: If workers without a GPU are asked to learn on one.
        """
        _ray()
        where = self._worker_device(device)
        if where.type == "cuda" and not self.gpus_per_worker:
            raise ValueError(
                f"device {str(where)!r} needs workers with a GPU: give gpus_per_worker "
                "(--gpus-per-worker), 1 or a share such as 0.5."
            )
        return "cpu"

    def _worker_device(self, device: str | torch.device | None) -> torch.device:
        if device is not None:
            return torch.device(device)
        return torch.device("cuda" if self.gpus_per_worker else "cpu")

    def learn(
        self,
        session: Session,
        parts: Sequence[Sequence[Task]],
        means: Mapping[str, Tensor] | None,
        advance: Callable[[int], object],
        device: str | torch.device | None = None,
    ) -> Iterator[TaskGates]:
        """The gates of each chunk, in the order of completion.

        Args:
            session: The session, on the CPU.
            parts: The tasks of each chunk.
            means: The values of closed channels.
            advance: Called with the task steps of each chunk that is done.
            device: Where the workers learn; None: on their GPU if they have one, else their CPU.

        Raises:
            ConnectionError: If there is no such cluster.
            ImportError: If ray is not installed.
            TypeError: If network or data cannot be sent to other processes.
            WorkersLostError: If a chunk loses its worker more often than ``retries``.
        """
        found = self.map(
            _learn_chunk,
            (session, means),
            [list(part) for part in parts],
            begin=_placed,
            device=device,
            idle=lambda: advance(0),
            what="tasks",
        )
        for number, gates in found:
            advance(sum(session.n_steps(task) for task in parts[number]))
            yield gates

    def map(
        self,
        call: Callable[[Any, Any], Any],
        shared: Any,
        items: Sequence[Any],
        *,
        begin: Callable[[Any, torch.device], Any] | None = None,
        device: str | torch.device | None = None,
        idle: Callable[[], object] = lambda: None,
        what: str = "work",
    ) -> Iterator[tuple[int, Any]]:
        """``call(shared, item)`` for each item on the workers, in the order of completion.

        A lost worker's item is given to another, so a call's result must be a function of its
        arguments alone.

        Args:
            call: A function of a module, which workers can import.
            shared: Sent once; each worker process unpacks it once.
            items: The second arguments.
            begin: ``begin(shared, device)``, called once in each worker process; its result
                replaces ``shared`` there.
            device: Where the workers run; None: on their GPU if they have one, else their CPU.
            idle: Called about once in a second.
            what: Word for an item's work in messages.

        Yields:
            An item's number, and its result.

        Raises:
            ConnectionError: If there is no such cluster.
            ImportError: If ray is not installed.
            TypeError: If ``shared`` cannot be sent to other processes.
            WorkersLostError: If an item loses its worker more often than ``retries``.
        """
        self.lost = 0
        if not items:
            return
        ray = _ray()
        lost_errors = (
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.NodeDiedError,
            ray.exceptions.ObjectLostError,
            ray.exceptions.OutOfMemoryError,
        )
        packed, storages = _packed(ray, shared)
        cpus = self.cpus_per_worker
        if cpus is None:
            cpus = 1 if self.gpus_per_worker else torch.get_num_threads()
        with self._cluster(ray, cpus):
            self._check_room(ray, cpus, len(items))
            # A list passes them on as references; each process fetches them when needed.
            shared_at = [ray.put(packed), *map(ray.put, storages)]
            del packed, storages
            how = (uuid.uuid4().hex, call, begin, str(self._worker_device(device)), _settings())
            # Lost workers are counted and retried here, since Ray would do it silently, and not at
            # all for a result that is lost later.
            remote = ray.remote(_work).options(
                num_cpus=cpus, num_gpus=self.gpus_per_worker, max_retries=0, name="nad_attr chunk"
            )
            waiting = deque(range(len(items)))
            running: dict[Any, int] = {}
            lost: Counter[int] = Counter()
            limit = self.n_workers or len(items)

            def result(ref: Any) -> list[tuple[int, Any]]:
                number = running.pop(ref)
                try:
                    return [(number, ray.get(ref))]
                except lost_errors as error:
                    self.lost += 1
                    lost[number] += 1
                    if lost[number] > self.retries:
                        raise WorkersLostError(
                            f"the chunk of {what} {_shown(items[number])} lost its worker "
                            f"{lost[number]} times, the last time by: {_first_line(error)} If "
                            "memory is short, use fewer workers, a smaller batch_size or a "
                            "smaller chunk_size. What is done is saved: resume."
                        ) from error
                    waiting.append(number)
                    return []
                except ray.exceptions.RayTaskError as error:
                    # Raise the worker's error, as if it had been raised here.
                    cause = getattr(error, "cause", None)
                    raise (cause if isinstance(cause, Exception) else error) from error

            try:
                while waiting or running:
                    while waiting and len(running) < limit:
                        number = waiting.popleft()
                        running[remote.remote(shared_at, items[number], *how)] = number
                    # With a limit, so that Ctrl-C works and the bar's clock goes on.
                    ready, _ = ray.wait(list(running), timeout=POLL_SECONDS)
                    idle()
                    for ref in ready:
                        yield from result(ref)
            except KeyboardInterrupt:
                # Results that have come in are handed on before the run ends.
                if running:
                    ready, _ = ray.wait(list(running), num_returns=len(running), timeout=0)
                    for ref in ready:
                        yield from result(ref)
                raise
            finally:
                for ref in running:
                    ray.cancel(ref, force=True)

    @contextmanager
    def _cluster(self, ray: Any, cpus: float) -> Iterator[None]:
        if ray.is_initialized():
            yield
            return
        options: dict[str, Any] = {
            "address": self.address,
            "log_to_driver": False,
            "logging_level": "WARNING",
            "namespace": "nad_attr",
        }
        if self.runtime_env is not None:
            options["runtime_env"] = self.runtime_env
        before = dict(os.environ)
        if self.address == "local":
            here = max(os.cpu_count() or 1, cpus)
            # Ray counts CPUs and does not pin them, so more workers than cores are possible.
            options["num_cpus"] = math.ceil(self.n_workers * cpus if self.n_workers else here)
            options["include_dashboard"] = False
            # A cluster of one program on one machine sends no statistics.
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            try:
                with _random_kept():
                    ray.init(**options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConnectionError(
                    f"there is no Ray cluster to use at {self.address!r}: {_first_line(error)} "
                    "Start one with `ray start --head` (and `ray start --address=HOST:6379` on "
                    "further machines), or use 'local' for this machine alone."
                ) from error
            yield
        finally:
            with _random_kept():
                ray.shutdown()
            for name in set(os.environ) - set(before):
                if name.startswith("RAY_") or name == "PYTHONBREAKPOINT":
                    del os.environ[name]

    def _check_room(self, ray: Any, cpus: float, n_chunks: int) -> None:
        """Refuse far more workers than CPUs, and report if no machine is large enough for one.

        Ray would start workers until memory ends, and wait for a larger machine silently.
        """
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        there = sum(node.get("CPU", 0) for node in nodes)
        wanted = min(self.n_workers or n_chunks, n_chunks, int(there / cpus))
        real = n_cpus() if self.address == "local" else there
        if wanted > most_processes(real):
            raise ValueError(
                f"n_workers must be at most {most_processes(real)} on {real:g} CPUs, got "
                f"{wanted:,}: more only take memory from each other; ask for fewer, or for more "
                "CPUs for each (cpus_per_worker)."
            )
        if any(
            node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= self.gpus_per_worker
            for node in nodes
        ):
            return
        text = (
            f"no machine of the Ray cluster has the {cpus:g} CPUs and {self.gpus_per_worker:g} "
            "GPUs that each worker is to get"
        )
        if self.address == "local":
            raise ValueError(f"{text}; ask for less (gpus_per_worker, cpus_per_worker).")
        # A cluster that grows on demand may still get one.
        warnings.warn(
            f"{text}; waiting for one to join. If none will, ask for less (gpus_per_worker, "
            "cpus_per_worker).",
            stacklevel=4,
        )


@contextmanager
def _random_kept() -> Iterator[None]:
    """Put Python's random state back: Ray draws ports with it."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)


def _ray() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise ImportError(
            "learning on a Ray cluster needs ray: pip install 'nad-attr[ray]'"
        ) from None
    return ray


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _shown(item: Any) -> str:
    parts = item if isinstance(item, (list, tuple)) else [item]
    return ", ".join(f"{part!s:.40}" for part in parts[:5]) + (" ..." if len(parts) > 5 else "")


def _first_line(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), type(error).__name__).strip()
    return line if line.endswith(".") else f"{line}."


def _packed(ray: Any, shared: Any) -> tuple[bytes, list[npt.NDArray[np.uint8]]]:
    """The pickled object, and beside it the numbers of its tensors, which are not copied here.

    Images can fill most of the memory; pickle would hold them two or three times.
    """
    storages: list[npt.NDArray[np.uint8]] = []
    numbers: dict[int, int] = {}

    class Pickler(ray.cloudpickle.CloudPickler):  # type: ignore[misc]
        def persistent_id(self, value: Any) -> tuple[int, torch.dtype | None] | None:
            dtype = None
            if isinstance(value, torch.storage.TypedStorage):
                dtype, value = value.dtype, value._untyped_storage
            if not isinstance(value, torch.UntypedStorage) or value.device.type != "cpu":
                return None
            if not value.nbytes():
                return None
            # Tensors that share memory share it on the worker as well.
            number = numbers.setdefault(value.data_ptr(), len(storages))
            if number == len(storages):
                view = torch.empty(0, dtype=torch.uint8, device="cpu").set_(value)
                storages.append(view.numpy())
            return number, dtype

    file = io.BytesIO()
    try:
        Pickler(file, protocol=pickle.HIGHEST_PROTOCOL).dump(shared)
        return file.getvalue(), storages
    except Exception as error:
        raise TypeError(
            "the network, its forward_func or the data cannot be sent to other processes: "
            f"{type(error).__name__}: {_first_line(error)} Open files and connections, for "
            "example, have to be opened by the dataset when it needs them."
        ) from error


def _unpacked(packed: bytes, storages: Sequence[npt.NDArray[np.uint8]]) -> Any:
    """Unpack what :func:`_packed` packed, into new memory: Ray's is read-only."""
    known: dict[int, torch.UntypedStorage] = {}

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, key: tuple[int, torch.dtype | None]) -> Any:
            number, dtype = key
            if number not in known:
                known[number] = torch.from_numpy(storages[number].copy()).untyped_storage()
            if dtype is None:
                return known[number]
            return torch.storage.TypedStorage(
                wrap_storage=known[number], dtype=dtype, _internal=True
            )

    return Unpickler(io.BytesIO(packed)).load()


#: torch's settings of float32 rounding, in the old form and in that of 2.9: wholes before parts.
_OLD = ("cuda.matmul.allow_tf32", "cudnn.allow_tf32")
_NEW = tuple(
    f"{part}fp32_precision"
    for part in (
        "", "cudnn.", "mkldnn.", "cuda.matmul.", "cudnn.conv.", "cudnn.rnn.", "mkldnn.matmul.",
        "mkldnn.conv.", "mkldnn.rnn.",
    )
)  # fmt: skip


def _float32() -> dict[str, Any]:
    """How this process rounds float32; settings that torch does not tell are left out."""
    found: dict[str, Any] = {}
    for name in (*_OLD, *_NEW):
        # torch does not answer in the old form if the new one was used to set it.
        with suppress(AttributeError, RuntimeError):
            found[name] = attrgetter(name)(torch.backends)
    with suppress(RuntimeError):
        found["matmul"] = torch.get_float32_matmul_precision()
    return found


def _set_float32(wanted: Mapping[str, Any]) -> None:
    """Round float32 as another process does; equal settings are left alone."""
    if "matmul" in wanted:
        torch.set_float32_matmul_precision(wanted["matmul"])
    for name in (*_OLD, *_NEW):
        if name in wanted and _float32().get(name) != wanted[name]:
            *where, last = name.split(".")
            setattr(reduce(getattr, where, torch.backends), last, wanted[name])


def _settings() -> dict[str, Any]:
    """The settings of this process that decide how numbers are rounded."""
    return {
        "threads": torch.get_num_threads(),
        "float32": _float32(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
    }


# -- on the worker ---------------------------------------------------------------------------------

#: The object that this process has unpacked last, by run.
_UNPACKED: dict[str, Any] = {}


def _work(
    shared_at: Sequence[Any],
    item: Any,
    key: str,
    call: Callable[[Any, Any], Any],
    begin: Callable[[Any, torch.device], Any] | None,
    device: str,
    settings: Mapping[str, Any],
) -> Any:
    """One item's result, in a worker process."""
    import ray

    if key not in _UNPACKED:
        _UNPACKED.clear()
        torch.set_num_threads(settings["threads"])
        _set_float32(settings["float32"])
        torch.use_deterministic_algorithms(
            settings["deterministic"], warn_only=settings["warn_only"]
        )
        packed, *storages = ray.get(list(shared_at))
        shared = _unpacked(packed, storages)
        _UNPACKED[key] = shared if begin is None else begin(shared, torch.device(device))
    return call(_UNPACKED[key], item)


_Learning: TypeAlias = "tuple[Session, Mapping[str, Tensor] | None]"


def _placed(shared: _Learning, device: torch.device) -> _Learning:
    """This process's own copy of the network, which a forward_func refers to as well."""
    network = shared[0].network
    network.model.to(device)
    network.device = device
    return shared


def _learn_chunk(shared: _Learning, part: Sequence[Task]) -> TaskGates:
    session, means = shared
    return session.learn(part, means=means)
