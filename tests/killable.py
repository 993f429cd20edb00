"""A process that forks runs into stores, so that a test can kill them at any moment.

Importing torch takes seconds and forking takes milliseconds. The process forks before it has run
anything that starts threads, which a test's own process cannot promise.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import h5py
import torch
from torch import Tensor, nn

from nad_attr import Recipe
from nad_attr.learning.engine import Network
from nad_attr.learning.runs import learn_to_store
from nad_attr.learning.session import Session

ROOT = Path(__file__).resolve().parent.parent
N_TASKS = 20
RECIPE = Recipe(size=0.4, steps=2, images_per_step=4)
#: Three tasks in a chunk: seven chunks, the last one of two tasks.
SETTINGS: dict[str, Any] = {"recipe": RECIPE, "seed": 3, "batch_size": 12, "chunk_size": 3}


def network(seed: int = 0) -> nn.Module:
    """Two hidden layers of 12 and 10 channels, 20 outputs, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, N_TASKS)
        ).eval()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Sixty vectors of six numbers, three of each class."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(60, 6, generator=generator), torch.arange(60) % N_TASKS


def _die_at_write(n: int) -> None:
    """Kill this process at the n-th thing that it does to a file."""
    left = n

    def counted(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    for owner, name in (
        (h5py.Dataset, "__setitem__"),
        (h5py.Dataset, "resize"),
        (h5py.Group, "create_dataset"),
        (h5py.AttributeManager, "__setitem__"),
        (h5py.AttributeManager, "create"),
        (h5py.AttributeManager, "modify"),
        (h5py.File, "flush"),
        (h5py.File, "close"),
        (os, "fsync"),
        (os, "replace"),
        (os, "rename"),
        (os, "write"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))


def _child(path: str, slow: float = 0.0, die_at_write: int = 0) -> None:
    def pause(progress: object) -> None:
        time.sleep(slow)

    if die_at_write:
        _die_at_write(die_at_write)
    learn_to_store(network(), data(), path, resume=True, on_progress=pause, **SETTINGS)


def serve() -> None:
    """Read the options of a run from each line, fork it, write its number and how it ended."""
    # What torch imports when it is first needed takes longer than a run. But no backward pass,
    # and the number of threads comes from the environment: what either starts dies in a fork.
    with mock.patch.object(Network, "find_checkpoints"):  # it makes one, and so do the checks
        Session(network(), data(), recipe=RECIPE, checks="off").means()
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            try:
                _child(**json.loads(line))
            except KeyboardInterrupt:
                os._exit(130)
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
                os._exit(1)
            os._exit(0)
        print(pid, flush=True)
        # Until it is waited for, its number is not given to another process.
        sys.stdin.readline()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


class Runs:
    """Runs that can be killed, each in a process of its own."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self.server = server

    def __call__(
        self,
        path: Path,
        *,
        after: float | Callable[[], bool] | None = None,
        how: signal.Signals = signal.SIGKILL,
        **options: Any,
    ) -> int:
        """Start or resume a run and let it end, or kill it ``after`` seconds or an event.

        Returns:
            Its exit code; minus the signal's number if that ended it.
        """
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps({"path": str(path), **options}) + "\n")
        self.server.stdin.flush()
        pid = int(self.server.stdout.readline())
        if after is not None:
            if isinstance(after, float):
                time.sleep(after)
            else:
                latest = time.monotonic() + 60  # a run that has failed never gets there
                while not after() and time.monotonic() < latest:
                    time.sleep(0.01)
            os.kill(pid, how)
        self.server.stdin.write("\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())


@contextmanager
def runs() -> Iterator[Runs]:
    """The process, ended with the block."""
    with subprocess.Popen(
        [sys.executable, "-c", "from tests.killable import serve; serve()"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        try:
            yield Runs(server)
        finally:
            assert server.stdin is not None
            server.stdin.close()
