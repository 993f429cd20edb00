"""What the store costs beside plain h5py, and how many tasks a minute Ray workers learn.

    python -m benchmarks.store_and_scale --json benchmarks/results/store_and_scale.json

*Store*: gates and logits of 1,000 tasks at the 17 sites of the paper's ResNet50 (15,168 channels),
made up as the default recipe makes them: ranks between 0 and 1, and their logits. The rival is
one plain h5py dataset of exactly those numbers, (tasks, 2 x channels) float32, in chunks of one
task, with the compression that the store's own datasets have, in the same run: written at once,
and row by row as the store is. Rates are of uncompressed bytes, to the closed file (the store also
has it reach the disk, at each append). Every figure is the median of ``--repeats``; reads find
the file in the operating system's cache, for both.

*Scale*: a small convolutional network with random weights, the default recipe, each run into a
store of its own. The cluster is started and every worker has imported torch before the clock
runs. Gates of all runs are compared bit by bit. More workers than cores gain nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import h5py
import numpy as np
import torch
from torch import Tensor, nn

from nad_attr import GateSite, Recipe, TaskGates, paper_sites
from nad_attr.learning.runs import learn_to_store
from nad_attr.store import GateStore

__all__ = ["gates_of_resnet50", "main", "measure_scale", "measure_store", "table"]

#: What a row of the result holds.
Row: TypeAlias = "dict[str, Any]"

N_CLASSES = 24
N_PER_CLASS = 20


def timed(action: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that a call takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


# -- store -----------------------------------------------------------------------------------------


def gates_of_resnet50(n_tasks: int, sites: Sequence[GateSite] | None = None) -> TaskGates:
    """Gates as the default recipe makes them: a random ranking of all channels for each task."""
    sites = paper_sites("resnet50") if sites is None else sites
    widths = [site.n_channels for site in sites]
    n = sum(widths)
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(n, generator=generator) for _ in range(n_tasks)])
    gates = (ranks + 1.0) / (n + 1.0)

    def split(values: Tensor) -> dict[str, Tensor]:
        parts = values.split(widths, dim=1)
        return {site.name: part for site, part in zip(sites, parts, strict=True)}

    return TaskGates(split(gates), sites, range(n_tasks), logits=split(gates.logit()))


def _compression(path: Path) -> dict[str, Any]:
    with h5py.File(path, "r") as file:
        data = file["site/0/gate"]
        return {
            "compression": data.compression,
            "compression_opts": data.compression_opts,
            "shuffle": data.shuffle,
        }


def measure_store(
    folder: Path, gates: TaskGates, *, append: Sequence[int] = (1000, 10, 1), repeats: int = 3
) -> list[Row]:
    """Write and read a store and its rival.

    Args:
        folder: Where to write; to be measured on the disk that matters.
        gates: What to write.
        append: Tasks in an append, a row for each.
        repeats: Of everything.
    """
    assert gates.logits is not None
    logits = gates.logits
    plain = np.concatenate(
        [torch.cat([gates[name] for name in gates], 1), torch.cat([*logits.values()], 1)], axis=1
    )
    n_tasks = len(gates)
    megabytes = plain.nbytes / 1e6
    store, rival = folder / "store.h5", folder / "plain.h5"
    rows: list[Row] = []

    def write_store(part: int) -> None:
        store.unlink(missing_ok=True)
        with GateStore.create(store, gates.sites) as file:
            for start in range(0, n_tasks, part):
                file.append(gates.select(range(start, min(n_tasks, start + part))))

    def write_plain(part: int, options: dict[str, Any]) -> None:
        rival.unlink(missing_ok=True)
        with h5py.File(rival, "w", libver="latest") as file:
            data = file.create_dataset(
                "gates",
                (0, plain.shape[1]),
                "f4",
                chunks=(1, plain.shape[1]),
                **options,
                maxshape=(None, plain.shape[1]),
            )
            for start in range(0, n_tasks, part):
                data.resize(min(n_tasks, start + part), axis=0)
                data[start : start + part] = plain[start : start + part]

    def read_plain() -> None:
        with h5py.File(rival, "r") as file:
            assert file["gates"][()].shape == plain.shape

    def read_plain_task() -> None:
        with h5py.File(rival, "r") as file:
            assert file["gates"][n_tasks // 2].shape == plain.shape[1:]

    def read_store() -> None:
        with GateStore.open(store) as file:
            assert len(file.read()) == n_tasks

    def read_store_task() -> None:
        with GateStore.open(store) as file:
            assert len(file.read([n_tasks // 2])) == 1

    def look_what_is_there() -> None:
        with GateStore.open(store, "a") as file:
            file.check_resumable(sites=gates.sites, recipe=None, provenance={})
            assert all(task in file for task in gates.tasks)

    def seconds(action: Callable[[], Any], n: int = repeats) -> float:
        return statistics.median(timed(action) for _ in range(n))

    write_store(n_tasks)
    options = _compression(store)
    for part in sorted({min(part, n_tasks) for part in append}, reverse=True):
        # Neighbours in time, for the speed of a shared machine's disk comes and goes.
        pairs = [
            (timed(write_store, part), timed(write_plain, part, options))
            for _ in range(repeats if part > 1 else 1)
        ]
        ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        rows.append(_rates(f"write, {part} tasks at a time", ours, theirs, megabytes))
    with GateStore.open(store) as file:
        read = file.read()
    if read != gates or read.logits is None or not _same(read.logits, gates.logits):
        raise RuntimeError("the store does not hold what was written")
    pairs = [(timed(read_store), timed(read_plain)) for _ in range(repeats)]
    ours, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
    rows.append(_rates("read all", ours, theirs, megabytes))
    rows.append(
        _row("open and read one task", seconds(read_store_task, 20), seconds(read_plain_task, 20))
    )
    rows.append(_row("open for writing and see what is there", seconds(look_what_is_there)))
    rows.append(
        {
            "what": "file size",
            "store_megabytes": store.stat().st_size / 1e6,
            "plain_megabytes": rival.stat().st_size / 1e6,
            "uncompressed_megabytes": megabytes,
            **options,
        }
    )
    return rows


def _same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def _row(what: str, ours: float, theirs: float | None = None) -> Row:
    row: Row = {"what": what, "store_seconds": ours}
    if theirs is not None:
        row |= {"plain_seconds": theirs, "rate": theirs / ours}
    return row


def _rates(what: str, ours: float, theirs: float, megabytes: float) -> Row:
    rates = {"store_mb_per_s": megabytes / ours, "plain_mb_per_s": megabytes / theirs}
    return _row(what, ours, theirs) | rates


# -- scale -----------------------------------------------------------------------------------------


def _network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 32, 1), (32, 64, 2), (64, 96, 2)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, N_CLASSES)]
        return nn.Sequential(*layers).eval()


@contextmanager
def _cluster(n_workers: int) -> Iterator[Any]:
    import ray

    before = os.environ.get("RAY_USAGE_STATS_ENABLED")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    n_cpus = n_workers * torch.get_num_threads()
    ray.init(address="local", num_cpus=n_cpus, include_dashboard=False, log_to_driver=False)
    try:
        yield ray
    finally:
        ray.shutdown()
        if before is None:
            del os.environ["RAY_USAGE_STATS_ENABLED"]
        else:
            os.environ["RAY_USAGE_STATS_ENABLED"] = before


def measure_scale(
    folder: Path, workers: Sequence[int] = (1, 2, 4), *, n_tasks: int = N_CLASSES, steps: int = 20
) -> list[Row]:
    """Tasks a minute in this process and on 1, 2, ... Ray workers; 0 workers is this process."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N_CLASSES * N_PER_CLASS) % N_CLASSES
    images = torch.randn(len(labels), 3, 32, 32, generator=generator)
    tasks = list(range(n_tasks))
    recipe = Recipe(size=0.5, steps=steps)
    model = _network()
    rows: list[Row] = []
    gates: list[TaskGates] = []

    def run(name: str, which: Sequence[int], recipe: Recipe, executor: Any) -> float:
        path = folder / f"{name}.h5"
        seconds = timed(
            lambda: learn_to_store(
                model,
                (images, labels),
                path,
                which,
                recipe,
                executor=executor,
                chunk_size=1,
                overwrite=True,
            )
        )
        gates.append(TaskGates.load(path))
        return seconds

    def row(n: int, seconds: float) -> Row:
        same = gates[-1].select(tasks) == gates[0]
        rate = 60 * n_tasks / seconds
        return {
            "what": f"{n} Ray workers" if n else "in this process",
            "workers": n,
            "tasks": n_tasks,
            "seconds": seconds,
            "tasks_per_minute": rate,
            "same_gates": same,
        }

    seconds = run("here", tasks, recipe, None)
    rows.append(row(0, seconds))
    if importlib.util.find_spec("ray") is None:
        return rows + [{"what": f"{n} Ray workers", "skipped": "ray is missing"} for n in workers]
    from nad_attr.learning.ray_executor import RayExecutor

    for n in workers:
        with _cluster(n):
            quick = Recipe(size=0.5, steps=2, images_per_step=2)
            run("warm", tasks, quick, RayExecutor(n_workers=n))
            rows.append(row(n, run(str(n), tasks, recipe, RayExecutor(n_workers=n))))
    return rows


# -- output ----------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """What was measured, for people."""
    lines = []
    for row in result.get("store", []):
        if row["what"] == "file size":
            lines.append(
                f"file size: {row['store_megabytes']:.1f} MB, plain {row['plain_megabytes']:.1f} "
                f"MB, uncompressed {row['uncompressed_megabytes']:.1f} MB "
                f"({row['compression']} {row['compression_opts']}, shuffle {row['shuffle']})"
            )
            continue
        line = f"{row['what']}: {1000 * row['store_seconds']:,.1f} ms"
        if "plain_seconds" in row:
            line += f", plain h5py {1000 * row['plain_seconds']:,.1f} ms ({row['rate']:.0%})"
        if "store_mb_per_s" in row:
            line += f"; {row['store_mb_per_s']:.0f} against {row['plain_mb_per_s']:.0f} MB/s"
        lines.append(line)
    for row in result.get("scale", []):
        if "skipped" in row:
            lines.append(f"{row['what']}: skipped, {row['skipped']}")
        else:
            same = "the same gates" if row["same_gates"] else "OTHER GATES"
            lines.append(
                f"{row['what']}: {row['tasks_per_minute']:.0f} tasks a minute "
                f"({row['tasks']} tasks in {row['seconds']:.1f} s), {same}"
            )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table and write JSON."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Set OMP_NUM_THREADS=1 for the scale: workers have as many threads as this process.",
    )
    parser.add_argument("--tasks", type=int, default=1000, help="tasks in the store")
    parser.add_argument("--append", type=int, nargs="+", default=[1000, 10, 1])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2, 4], help="none: no Ray")
    parser.add_argument("--scale-tasks", type=int, default=N_CLASSES, help=f"up to {N_CLASSES}")
    parser.add_argument("--steps", type=int, default=20, help="learning steps of each task")
    parser.add_argument("--only", choices=["store", "scale"], help="leave out the other half")
    parser.add_argument("--folder", type=Path, help="where the files go (default: a temporary one)")
    parser.add_argument("--json", help="file for the figures; - for standard output")
    arguments = parser.parse_args(argv)
    result: dict[str, Any] = {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        if arguments.only != "scale":
            gates = gates_of_resnet50(arguments.tasks)
            result["store"] = measure_store(
                folder, gates, append=arguments.append, repeats=arguments.repeats
            )
        if arguments.only != "store":
            result["scale"] = measure_scale(
                folder, arguments.workers, n_tasks=arguments.scale_tasks, steps=arguments.steps
            )
    if arguments.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    print(table(result))
    if arguments.json is not None:
        path = Path(arguments.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
