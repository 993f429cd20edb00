"""How long ``explain`` said it would take, and how long it took.

    python -m benchmarks.explain_time --json benchmarks/results/explain_time.json
    python -m benchmarks.explain_time --full --tasks 2 --json benchmarks/results/explain_time.json
    python -m benchmarks.explain_time --networks cnn --clock wall

Networks: *cnn*, a small one with random weights and noise; *digits*, that of
``digit-recognizer-py`` with scikit-learn's digits (:mod:`benchmarks.found_network`); *resnet20*,
trained on CIFAR-10, with its photos; *lite0*, EfficientNet-Lite0 with photos of ImageNet, whose
tasks are groups of classes. The last two need what lies beside the repository (``--shared``), and
the second two packages; what is missing is left out, and that is said.

The clock counts seconds of this process (``cpu``), for machines on which other programs run beside;
with one thread and nothing beside they are the seconds of a wall clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import found_network, lite0_data
from benchmarks.cifar import SharedMissingError, add_shared_arguments, load_cifar10, load_resnet
from benchmarks.image_data import per_class
from nad_attr import Recipe, explain

__all__ = ["NETWORKS", "main", "measured"]

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
Given = tuple[nn.Module, tuple[Tensor, Tensor], Sequence[Any] | None]


def _cnn(shared: Path) -> Given:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        widths = (3, 16, 24, 32)
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 16, 6)).eval()
        images = torch.randn(300, 3, 32, 32)
    return model, (images, torch.arange(300) % 6), None


def _resnet20(shared: Path) -> Given:
    x, y, *_ = load_cifar10(shared)
    model = load_resnet(20, shared / "models" / "cifar10_resnet20.pt").eval()
    return model, per_class((x, y), 60, 0), None


def _lite0(shared: Path) -> Given:
    if not (shared / "data" / "imagenet-sample").is_dir():
        raise SharedMissingError(f"{shared} has no data/imagenet-sample")
    model, (x, y), (more, labels), groups = lite0_data.load(shared, 96)
    return model, (torch.cat([x, more]), torch.cat([y, labels])), groups[:2]


def _digits(shared: Path) -> Given:
    with tempfile.TemporaryDirectory() as folder:
        found_network.write_pictures(Path(folder))
        model, images, labels = found_network.load(Path(folder))
    return model, (images, labels), None


NETWORKS = {"cnn": _cnn, "digits": _digits, "resnet20": _resnet20, "lite0": _lite0}


def measured(name: str, given: Given, clock: str, **changes: Any) -> dict[str, Any]:
    """One explanation with its promise.

    Args:
        name: Of the network.
        given: Network, images with labels, tasks.
        clock: "cpu" or "wall".
        changes: For :func:`nad_attr.explain`.
    """
    model, data, tasks = given
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "report.html")
        found = explain(model, data, tasks=tasks, out=out, clock=CLOCKS[clock], **changes)
    promised, taken = sum(found.promised.values()), sum(found.taken.values())
    return {
        "network": name,
        "options": {key: str(value) for key, value in changes.items()},
        "tasks": len(found.tasks),
        "certain": len(found.certainty.tasks) if found.certainty else 0,
        "channels": found.verdict.n_channels,
        "images": found.n_learned + found.n_judged,
        "promised": promised,
        "taken": taken,
        "promised_by_taken": promised / taken,
        "steps": {step: [found.promised[step], found.taken[step]] for step in found.taken},
        "clock": clock,
    }


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--clock", default="cpu", choices=list(CLOCKS))
    parser.add_argument("--steps", type=int, help="of learning; None: as the size says")
    parser.add_argument("--full", action="store_true", help="the whole size, not the quick one")
    parser.add_argument("--certainty", action="store_true", help="of all tasks")
    parser.add_argument(
        "--tasks", type=int, help="explain the first so many; None: as explain does"
    )
    parser.add_argument("--json", type=Path)
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    changes: dict[str, Any] = {"quick": not args.full}
    if args.steps:
        changes["recipe"] = Recipe(steps=args.steps)
    if args.certainty:
        changes["certainty"] = True
    rows = []
    for name in args.networks:
        try:
            given = NETWORKS[name](args.shared)
        except (SharedMissingError, ImportError) as missing:
            print(f"skipped: {name} ({missing})", file=sys.stderr, flush=True)
            continue
        if args.tasks:
            tasks = given[2] or sorted(set(given[1][1].tolist()))
            given = (*given[:2], list(tasks)[: args.tasks])
        rows.append(measured(name, given, args.clock, **changes))
        row = rows[-1]
        print(
            f"{name}: promised {row['promised']:.0f} s, took {row['taken']:.0f} s "
            f"({row['promised_by_taken']:.2f}); "
            + ", ".join(f"{step} {a:.1f}/{b:.1f}" for step, (a, b) in row["steps"].items()),
            flush=True,
        )
    if args.json:
        known = json.loads(args.json.read_text()) if args.json.is_file() else {"rows": []}
        key = ("network", "options", "tasks", "clock")
        new = [[row[k] for k in key] for row in rows]
        kept = [row for row in known["rows"] if [row.get(k) for k in key] not in new]
        found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        args.json.write_text(json.dumps({**found, "rows": kept + rows}, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
