"""Runs that can be resumed: many tasks learned chunk by chunk into a store.

The sorted list of all tasks is cut into chunks. A chunk is learned as a whole and written when it
is done; it does not depend on chunks learned before, the process or the machine. So a run that was
killed and resumed ends with the gates of an undisturbed run, bit for bit on one kind of CPU.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.fingerprints import data_fingerprint, environment, model_hash
from nad_attr.data.labels import Task, as_task, own_images
from nad_attr.data.sources import Data
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.network_checks import Checks
from nad_attr.learning.session import Session
from nad_attr.running.forward import chunks
from nad_attr.running.options import RunFields, RunOptions, as_options
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.store import GateStore, GateStoreError

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["MAY_DIFFER", "Executor", "InProcess", "Progress", "learn_to_store"]

#: Settings that a resumed run may change, and their keys in the store's provenance.
MAY_DIFFER = {"model": "model_hash", "data": "data_fingerprint"} | {
    name: name for name in ("seed", "amp", "batch_size", "chunk_size")
}
#: Seconds between two calls of ``on_progress`` for steps only.
PROGRESS_SECONDS = 0.5


class Progress(NamedTuple):
    """The progress of a run.

    Example:
        >>> Progress(done=10, total=100, found=0, steps=1000, n_steps=10_000, seconds=50.0)
        ... # doctest: +ELLIPSIS
        Progress(done=10, total=100, ...)
        >>> Progress(10, 100, 0, 1000, 10_000, 50.0).seconds_left
        450.0
    """

    #: Tasks in the store.
    done: int
    #: Tasks that were asked for.
    total: int
    #: Tasks that were in the store when the run began.
    found: int
    #: Task steps that this run has done.
    steps: int
    #: Task steps that this run has to do.
    n_steps: int
    #: Since this run began to learn.
    seconds: float
    #: Workers that were lost, whose chunks were given to others.
    lost: int = 0

    @property
    def seconds_left(self) -> float | None:
        """Until the end, at the present pace; None before the first step."""
        if self.steps == 0:
            return None
        return self.seconds / self.steps * (self.n_steps - self.steps)


class Executor(Protocol):
    """Where the chunks of a run are learned."""

    def session_device(self, device: str | torch.device | None) -> str | torch.device | None:
        """The device on which this process needs the network, if learning runs on ``device``."""
        ...

    def learn(
        self,
        session: Session,
        parts: Sequence[Sequence[Task]],
        means: Mapping[str, Tensor] | None,
        advance: Callable[[int], object],
        device: str | torch.device | None,
    ) -> Iterator[TaskGates]:
        """The gates of each chunk, in any order.

        Args:
            session: Its ``session.learn(part, means=means)`` learns a chunk.
            parts: The tasks of each chunk.
            means: The values of closed channels.
            advance: To be called with the number of task steps that are done.
            device: Where to learn.
        """
        ...

    @property
    def lost(self) -> int:
        """Workers lost so far."""
        ...


class InProcess:
    """Learn one chunk after the other, in this process.

    Example:
        >>> InProcess().session_device("cuda:1")
        'cuda:1'
    """

    lost = 0

    def session_device(self, device: str | torch.device | None) -> str | torch.device | None:
        """The same."""
        return device

    def learn(
        self,
        session: Session,
        parts: Sequence[Sequence[Task]],
        means: Mapping[str, Tensor] | None,
        advance: Callable[[int], object],
        device: str | torch.device | None = None,
    ) -> Iterator[TaskGates]:
        """The gates of each chunk, in order; ``device`` is where the session is."""
        for part in parts:
            yield session.learn(part, means=means, advance=advance)


def learn_to_store(
    model: nn.Module,
    data: Data,
    path: str | PathLike[str],
    tasks: Sequence[object] | Mapping[str, object] | None = None,
    recipe: Recipe | None = None,
    sites: Sequence[GateSite | str | nn.Module] | None = None,
    *,
    seed: int = 0,
    run: RunOptions | None = None,
    chunk_size: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    may_differ: Sequence[str] = (),
    task_names: Mapping[Any, str] | Sequence[str] | None = None,
    augmented: bool | None = None,
    checks: Checks = "refuse",
    provenance: Mapping[str, Any] | None = None,
    executor: Executor | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    **fields: Unpack[RunFields],
) -> Path:
    """Learn task gates into a store, chunk by chunk, so that a killed run can be resumed.

    Every chunk of tasks is in the file as soon as it is learned. After Ctrl-C, an exception, a
    ``kill -9`` or a power cut, the same call with ``resume=True`` learns the missing tasks, with
    the gates of an undisturbed run: bit for bit on the same kind of CPU with the same number of
    threads. Chunks are cut from the sorted list of *all* tasks; a chunk with missing tasks is
    learned whole again and only the missing ones are written. Channel means are computed once, when
    the run begins, and read from the store afterwards.

    Between two runs the gates of a task may differ in rounding if the chunks differ (other tasks,
    ``chunk_size`` or ``batch_size``); within one store this is refused.

    Args:
        model: See :func:`nad_attr.learn_gates`.
        data: See there.
        path: The file.
        tasks: See there.
        recipe: See there.
        sites: See there.
        seed: See there.
        run: How to run the network; see :class:`nad_attr.RunOptions`. Without a device, an
            executor's workers choose theirs. A batch size of "auto" is, on resume, that of the
            store; an executor takes none, as its workers' memory is not known here.
        chunk_size: Tasks in a chunk: the largest loss, and the work of one worker call. None: as
            many as share a pass of the network, ``batch_size // recipe.images_per_step``; on
            resume, that of the store.
        resume: Continue the file if it exists.
        overwrite: Replace the file if it exists.
        may_differ: Settings that a resumed run may change: any of "model", "data", "seed", "amp",
            "batch_size", "chunk_size". With "data" or "amp", only the weights of the network are
            compared. The store says what it was begun with, and under ``resumed/`` in its results,
            which tasks were learned otherwise, and how. Another recipe or other sites need another
            file.
        task_names: ``{class index: name}``, or one name for each of ``tasks`` in that order.
        augmented: See :func:`nad_attr.learn_gates`.
        checks: See there.
        provenance: Further facts to keep in the store, as JSON can hold them.
        executor: Where chunks are learned; None: in this process. See
            :class:`nad_attr.distributed.RayExecutor`.
        on_progress: Called with a :class:`Progress` when a chunk is written, and at intervals.
        **fields: In place of those fields of ``run``.

    Returns:
        The path of the store, for :meth:`nad_attr.TaskGates.load`.

    Raises:
        FileExistsError: If the file exists and neither ``resume`` nor ``overwrite`` is given.
        GateStoreError: If the file is not a store, another process writes it, or it was begun
            with another network (other weights, or other outputs on four of the images), recipe,
            seed, other sites or data (:func:`nad_attr.data.fingerprints.data_fingerprint`).
        SiteError, TypeError, ValueError: See :func:`nad_attr.learn_gates`.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
        >>> data = torch.randn(20, 4), torch.arange(20) % 2
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     recipe = Recipe(size=0.5, steps=20)
        ...     path = learn_to_store(net, data, f"{folder}/gates.h5", recipe=recipe)
        ...     TaskGates.load(path)
        TaskGates(2 tasks, 1 site, 6 channels, 50.0 % kept, closed channels at their best constants)
    """
    options = as_options(run, **fields)
    if not isinstance(path, (str, PathLike)):
        raise TypeError(
            f"path must name a file, got {type(path).__name__}; the order is "
            "learn_to_store(model, data, path)."
        )
    target, auto = Path(path), options.batch_size == "auto"
    _check_options(target, resume, overwrite, may_differ, chunk_size)
    if auto and executor is not None:
        raise ValueError(
            "batch_size='auto' measures the memory of this process, not of the executor's workers; "
            "give a number."
        )
    if auto and resume and target.exists():
        with GateStore.open(target) as begun:
            known = begun.provenance.get("batch_size")
        if known is not None:
            options = replace(options, batch_size=known, memory_limit=None)
    executor = InProcess() if executor is None else executor
    session = Session(
        model,
        data,
        tasks,
        recipe,
        sites,
        seed=seed,
        run=replace(options, device=executor.session_device(options.device)),
        augmented=augmented,
        checks=checks,
    )
    _name_and_sort(session, task_names)
    facts = {
        **(provenance or {}),
        "model": (provenance or {}).get("model", type(unwrap(model)).__name__),
        "model_hash": model_hash(unwrap(model)),
        "data_fingerprint": data_fingerprint(session.source),
        "outputs": session.outputs(),
        "seed": seed,
        "amp": None if session.network.amp is None else str(session.network.amp),
        "batch_size": session.batch_size,
        "n_images": len(session.source.labels),
        "device": str(session.network.device if options.device is None else options.device),
        "n_threads": torch.get_num_threads(),
        "environment": environment(),
    }
    with _store(target, session, facts, chunk_size, resume, overwrite, may_differ) as store:
        size = chunk_size or int(store.provenance["chunk_size"])
        parts = [[session.tasks[i] for i in part] for part in chunks(len(session.tasks), size)]
        parts = [part for part in parts if any(task not in store for task in part)]
        progress = _Run(store, session, parts, executor, on_progress)
        with progress.bar():
            learned = executor.learn(session, parts, store.means, progress.advance, options.device)
            # Closed explicitly, so that workers are given back at once after Ctrl-C.
            with closing(learned):  # type: ignore[type-var]
                for gates in learned:
                    progress.save(gates)
    return target


def _check_options(
    target: Path, resume: bool, overwrite: bool, may_differ: Sequence[str], chunk_size: int | None
) -> None:
    if resume and overwrite:
        raise ValueError("resume keeps what is in the file and overwrite deletes it: choose one.")
    if isinstance(may_differ, str) or not set(may_differ) <= set(MAY_DIFFER):
        raise ValueError(f"may_differ must be a list of some of {list(MAY_DIFFER)}.")
    if chunk_size is not None:
        check_count(chunk_size, "chunk_size")
    if target.exists() and not (resume or overwrite):
        raise FileExistsError(
            f"{target} is there already; resume=True (--resume) goes on with it, overwrite=True "
            "(--overwrite) replaces it."
        )


def _name_and_sort(session: Session, task_names: Mapping[Any, str] | Sequence[str] | None) -> None:
    """Put the tasks into their canonical order, class indices before groups, with their names."""
    tasks, names = session.tasks, session.names
    if task_names is not None:
        if names is not None:
            raise ValueError("the tasks have names already; leave out task_names.")
        if isinstance(task_names, str):
            raise TypeError(f"task_names must be a list of names, got {task_names!r}.")
        if isinstance(task_names, Mapping):
            known = {as_task(task): str(name) for task, name in task_names.items()}
            names = [known.get(task, str(task)) for task in tasks]
        else:
            names = [str(name) for name in task_names]
            if len(names) != len(tasks):
                raise ValueError(f"{len(names)} names for {len(tasks)} tasks.")
    if names is not None and len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} is there twice; tasks need different names.")
    order = sorted(range(len(tasks)), key=lambda i: (isinstance(tasks[i], tuple), tasks[i]))
    session.tasks = [tasks[i] for i in order]
    session.names = None if names is None else [names[i] for i in order]


@contextmanager
def _store(
    target: Path,
    session: Session,
    facts: dict[str, Any],
    chunk_size: int | None,
    resume: bool,
    overwrite: bool,
    may_differ: Sequence[str],
) -> Iterator[GateStore]:
    """The store to write to: a new one, or one that this run may continue."""
    if resume and target.exists():
        with GateStore.open(target, "a") as store:
            _check_resumable(store, session, facts, chunk_size, may_differ)
            yield store
    else:
        facts = {**facts, "chunk_size": chunk_size or session.width}
        # The means are read from the store, which holds float32, now and on resume.
        with GateStore.create(
            target,
            session.sites,
            recipe=session.recipe,
            means=session.means(),
            provenance=facts,
            overwrite=overwrite,
        ) as store:
            yield store


def _check_resumable(
    store: GateStore,
    session: Session,
    facts: Mapping[str, Any],
    chunk_size: int | None,
    may_differ: Sequence[str],
) -> None:
    keys = {MAY_DIFFER[name] for name in may_differ}
    if not keys.isdisjoint({"model_hash", "data_fingerprint", "amp"}):
        keys.add("outputs")  # of another network, on other images or in another precision
    begun = store.provenance
    own = {key: begun.get(key) if key in keys else value for key, value in facts.items()}
    store.check_resumable(sites=session.sites, recipe=session.recipe, provenance=own)
    if "chunk_size" not in begun:
        raise GateStoreError(
            f"{store.path} was not begun by a run that can be resumed; learn into another file "
            "and put both together with merge."
        )
    asked = {**own, "chunk_size": begun["chunk_size"] if chunk_size is None else chunk_size}
    for key in ("amp", "batch_size", "chunk_size"):
        if key not in keys and asked[key] != begun.get(key):
            raise GateStoreError(
                f"{store.path} was begun with {key} {begun.get(key)!r}, not {asked[key]!r}, and "
                "the gates that are missing would differ in rounding from those of one run: give "
                f"the same, or may_differ=[{key!r}] to go on all the same."
            )
    if session.recipe.ablation != "zero" and store.means is None:
        raise GateStoreError(
            f"{store.path} has no channel means, which this recipe needs; learn into another file."
        )
    asked = {**facts, "chunk_size": asked["chunk_size"]}
    differs = [name for name in may_differ if asked[MAY_DIFFER[name]] != begun[MAY_DIFFER[name]]]
    missing = [json.dumps(task) for task in session.tasks if task not in store]
    if differs and missing:
        number = sum(name.startswith("resumed/") for name in store.results)
        store.write_result(
            f"resumed/{number}", {"task": missing}, {"differs": differs, "provenance": asked}
        )


class _Run:
    """Write gates, and report the progress."""

    def __init__(
        self,
        store: GateStore,
        session: Session,
        parts: Sequence[Sequence[Task]],
        executor: Executor,
        on_progress: Callable[[Progress], object] | None,
    ) -> None:
        self.store, self.session, self.executor = store, session, executor
        self.on_progress = on_progress
        self.found = sum(task in store for task in session.tasks)
        self.done = self.found
        self.steps = 0
        self.n_steps = sum(session.n_steps(task) for part in parts for task in part)
        self.began = self.reported = time.monotonic()
        self._bar: Any = None

    @contextmanager
    def bar(self) -> Iterator[None]:
        with self.session.network.bar(self.n_steps, "learning gates", "step") as self._bar:
            self._report()
            yield

    def advance(self, n: int) -> None:
        self.steps += n
        self._bar.update(n)
        if time.monotonic() - self.reported >= PROGRESS_SECONDS:
            self._report()

    def save(self, gates: TaskGates) -> None:
        """Write the missing tasks of a chunk."""
        missing = [task for task in gates.tasks if task not in self.store]
        if missing:
            own = own_images(self.session.source.labels, missing).sum(1).tolist()
            counts = dict(zip(missing, own, strict=True))
            with _interrupts_delayed():
                self.store.append(gates.select(missing), sample_counts=counts)
        self.done += len(missing)
        self._report()

    def _report(self) -> None:
        self.reported = time.monotonic()
        lost, total = self.executor.lost, len(self.session.tasks)
        self._bar.set_postfix_str(
            f"{self.done}/{total} tasks saved" + (f", {lost} workers lost" if lost else "")
        )
        if self.on_progress is not None:
            counts = self.done, total, self.found, self.steps, self.n_steps
            self.on_progress(Progress(*counts, self.reported - self.began, lost))


@contextmanager
def _interrupts_delayed() -> Iterator[None]:
    """Delay Ctrl-C until the block is done, so that learned gates are written."""
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return
    interrupts: list[Any] = []
    signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if interrupts:
            previous(*interrupts[0])
