r"""Every claim about GPUs, checked by one command on one large GPU, in less than 12 minutes.

    python -m benchmarks.gpu_check --json benchmarks/results/gpu_check.json
    python -m benchmarks.gpu_check --device cpu --small          # all parts, small, anywhere
    python -m benchmarks.gpu_check --device cpu --parts projection --assume 2500 \
        --rates benchmarks/results/speed.json                    # no GPU needed

Parts, in this order; those of several networks are as many parts. Each is printed and written as
soon as it is done, one that would begin after ``--minutes`` is left out, and one that fails is
named with its error, after which the rest goes on:

- *tests*: the tests marked ``gpu``.
- *steps*: a step of the default recipe over the bare passes of the same batch, and the released
  loop's step in the same run, for ResNet50, VGG16, DenseNet121 and ViT-B/16 in bfloat16, channels
  last, 128 images; peak memory of both.
- *projection*: hours for 1,000 classes from these rates, and with 20 replicas of each. Worked out,
  not measured.
- *batches*: the batch sizes that "auto" finds for learning and for evaluation, and the memory that
  learning takes with such a batch full.
- *replicas*: images a second where certainty learns a task from many halves side by side, beside
  one task alone.

Exit status 1 if a test failed or a part did. Where a command may run for ten minutes only, give
``--minutes 8``: by the number of passes, a large GPU needs about four.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import learning_cost, speed
from nad_attr import GateSite, Recipe, RunOptions
from nad_attr.learning.engine import Replica
from nad_attr.learning.session import Session
from nad_attr.running.forward import Runner

__all__ = ["PARTS", "main"]

NETWORKS = ("resnet50", "vgg16", "densenet121", "vit_b_16")
PARTS = ("tests", "steps", "projection", "batches", "replicas")
#: Parts that are run for each network, and the one that is run for the first.
OF_NETWORKS, OF_FIRST = ("steps", "batches"), "replicas"
#: Seconds after which the tests are given up.
TEST_SECONDS = 240
#: Replicas of a task that certainty learns by default, and steps that are timed.
REPLICAS, STEPS = 19, 8
#: Replicas of each class in the projection.
REPLICATED = 20
Row = dict[str, Any]


class GPUCheck:
    """All parts.

    Args:
        args: The command line's arguments.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        self.cuda = self.device.type == "cuda"
        self.batch, self.pixels = (4, 32) if args.small else (128, 224)
        self.rows: dict[str, Any] = {}
        options = ["--device", args.device, "--models", *args.models, "--batch", str(self.batch)]
        options += ["--image-size", str(self.pixels), "--bf16", "--channels-last"]
        options += ["--quick"] * args.small + ["--repeats", "1" if args.small else "3"]
        self.speed = speed.Speed(speed._parser().parse_args(options))

    def tests(self) -> Row:
        """The tests marked ``gpu``."""
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(
            [*command, *self.args.tests],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=TEST_SECONDS,
        )
        said = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-300:]
        return {"passed": done.returncode == 0, "said": said}

    def steps(self, name: str) -> Row:
        """Our step and the released loop's over the bare passes."""
        given: dict[str, Any] = {
            "recipe": "constants", "batch": self.batch, "tasks": 10, "device": self.device,
            "image_size": self._pixels(name), "amp": True, "channels_last": True,
            "repeats": 1 if self.args.small else 3,
        }  # fmt: skip
        row = learning_cost.measure(name, **given)
        kept = ("model", "batch", "dtype", "time_ratio", "kept_ratio", "memory_ratio")
        found: Row = {key: row[key] for key in kept}
        found["images_per_second"] = row["batch"] / row["step_seconds"]
        found["bare_images_per_second"] = row["batch"] / row["bare_seconds"]
        found["step_mb"], found["bare_mb"] = row["step_memory"] / 1e6, row["bare_memory"] / 1e6
        self._free()
        self.speed.args.models = [name]
        self.speed.released()
        released = self.speed.rows["released"][-1]
        found["released_ratio"] = released["time_ratio"]
        found["released_seconds_per_image"] = released["seconds_per_image"]
        return found

    def projection(self) -> list[Row]:
        """PROJECTION: hours for 1,000 ImageNet classes, alone and with 20 replicas of each."""
        recipe = Recipe()
        n_images = speed.CLASSES * recipe.steps * recipe.images_per_step
        n_released = speed.CLASSES * speed.EPOCHS * speed.OWN_IMAGES
        rates: list[tuple[str, str, float, float | None]] = [
            (
                row["model"],
                "measured in this run",
                row["images_per_second"],
                row["released_seconds_per_image"],
            )
            for row in self.rows.get("steps", ())
        ]
        if self.args.rates:
            known = json.loads(self.args.rates.read_text())
            for row in known["steps"]:
                kind = (
                    f"measured on {known['device']}, {known['threads']} thread, {row['precision']}"
                )
                kind += ", channels last" if row["channels_last"] else ""
                rates.append((row["model"], kind, row["step_images_per_second"], None))
        if self.args.assume:
            kind = f"a GPU that is ASSUMED to pass {self.args.assume:g} images a second and back"
            rates.append(("any", kind, self.args.assume, None))
        if not rates:
            raise ValueError("there are no rates: run the part steps, or give --rates or --assume")
        return [
            {
                "model": model,
                "rates": kind,
                "projected_hours": n_images / rate / 3600,
                f"projected_hours_{REPLICATED}_replicas": REPLICATED * n_images / rate / 3600,
                "projected_hours_released": None if slow is None else n_released * slow / 3600,
                "note": "worked out from rates, not measured",
            }
            for model, kind, rate, slow in rates
        ]

    def batches(self, name: str) -> Row:
        """What "auto" finds, and the memory that is taken where learning fills such a batch."""
        model, sites, images = self._network(name)
        run = RunOptions(
            batch_size="auto", amp=True, memory_limit="400MB" if self.args.small else None
        )
        labels = torch.arange(len(images)) % 2
        recipe = Recipe(steps=2 if self.args.small else STEPS)
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        session = Session(model, (images, labels), [0, 1], recipe, sites, run=run, checks="off")
        row: Row = {"model": name, "learning": session.batch_size, "width": session.width}
        full = min(session.width, 3) if self.args.small else session.width
        session.learn_replicas([Replica(0, seed) for seed in range(full)])
        if self.cuda:
            row["peak_gb"] = torch.cuda.max_memory_allocated(self.device) / 1e9
        row["evaluation"] = Runner(model, run).images_per_pass((images[:1].to(self.device),))
        return row

    def replicas(self, name: str) -> Row:
        """Learning one task alone, and many replicas of it side by side."""
        n = 3 if self.args.small else REPLICAS
        model, sites, images = self._network(name)
        recipe = Recipe(steps=2 if self.args.small else STEPS)
        given = (images, torch.arange(len(images)) % 2)
        width = recipe.images_per_step * n
        run = RunOptions(batch_size=min(width, 4 * self.batch), amp=True)
        session = Session(model, given, [0], recipe, sites, run=run, checks="off")
        row: Row = {"model": name, "replicas": n, "batch": session.batch_size}
        session.learn([0])  # warm
        for what, replicas in (("alone", 1), ("side_by_side", n)):
            began = self._now()
            session.learn_replicas([Replica(0, seed) for seed in range(replicas)])
            images_run = replicas * recipe.steps * recipe.images_per_step
            row[f"{what}_images_per_second"] = images_run / (self._now() - began)
        return row

    def _network(self, name: str) -> tuple[nn.Module, list[GateSite], Tensor]:
        model, sites = learning_cost.MODELS[name]()
        model = model.to(self.device, memory_format=torch.channels_last)
        pixels = self._pixels(name)
        n = 8 if self.args.small else 2 * self.batch
        images = torch.randn(n, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
        return model, sites, images

    def _pixels(self, name: str) -> int:
        return 224 if name == "vit_b_16" else self.pixels  # it takes no other size

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", default=list(NETWORKS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--rates", type=Path, help="JSON of benchmarks.speed to project from, beside this run's"
    )
    parser.add_argument("--assume", type=float, help="images a second to project from as well")
    parser.add_argument("--small", action="store_true", help="small batches and images")
    parser.add_argument("--minutes", type=float, default=11.0, help="no part begins after that")
    parser.add_argument(
        "--tests",
        nargs="+",
        default=["tests/test_learning.py", "tests/test_responses.py", "tests/test_attribution.py"],
        help="files with tests marked gpu",
    )
    parser.add_argument("--json", type=Path)
    return parser


def main(argv: Sequence[str] | None = None, clock: Callable[[], float] = time.monotonic) -> int:
    """Run the parts; print tables, write JSON."""
    args = _parser().parse_args(argv)
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        print("there is no GPU here: --device cpu --small runs all parts small", file=sys.stderr)
        return 2
    began, check = clock(), GPUCheck(args)
    about = {
        "device": torch.cuda.get_device_name(check.device) if check.cuda else "cpu",
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "small": args.small,
    }
    left_out: list[str] = []
    failed: dict[str, str] = {}
    for part in args.parts:
        of = {OF_FIRST: args.models[:1], **dict.fromkeys(OF_NETWORKS, args.models)}
        for name in of.get(part, [""]):
            what = f"{part} {name}".strip()
            if clock() - began > 60 * args.minutes:
                left_out.append(what)
                continue
            try:
                found = getattr(check, part)(*([name] if name else []))
                if name:
                    check.rows.setdefault(part, []).append(found)
                else:
                    check.rows[part] = found
            except Exception as error:  # the machine is dear: the other parts go on
                found = failed[what] = f"{type(error).__name__}: {error}"[:500]
            check._free()
            minutes = round((clock() - began) / 60, 2)
            told = {"minutes": minutes, "left_out": left_out, "failed": failed}
            if args.json:
                args.json.parent.mkdir(parents=True, exist_ok=True)
                args.json.write_text(json.dumps({**about, **told, **check.rows}, indent=1) + "\n")
            rows = [found] if name and isinstance(found, dict) else found
            text = speed.table(rows) if isinstance(rows, list) else rows
            print(f"\n{what} ({minutes} minutes)\n{text}", flush=True)
    for what in left_out:
        print(f"left out, for want of time: {what}")
    return int(bool(failed) or not check.rows.get("tests", {"passed": True})["passed"])


if __name__ == "__main__":
    sys.exit(main())
