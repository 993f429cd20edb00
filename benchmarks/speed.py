"""How close learning gates is to what the hardware allows, and how far from the released loop.

    python -m benchmarks.speed --json benchmarks/results/speed.json
    python -m benchmarks.speed --quick
    python -m benchmarks.speed --device cuda --batch 128 --bf16 --channels-last --json gpu.json
    python -m benchmarks.speed --profile --models resnet50

On a CPU, freed memory stays with the process, as in the command line; ``--heap plain`` leaves the
C library as it is.

Sections (``--sections``):

- *steps*: a step of the default recipe against the bare passes of the same batch (clean forward;
  forward and backward to the first gate, weights frozen), measured in turns in one process:
  ``benchmarks.learning_cost`` says how. *kept* is the step without the clean pass, as where images
  do not change and the whole network's outputs are computed once. Images per second, and peak
  memory beyond weights and images.
- *released*: one step of the released loop (``benchmarks.released_loop``) at its batch of 16, in
  turns with bare passes of that batch.
- *captum*: LayerConductance and LayerIntegratedGradients on single images, per site and step of
  the integral.
- *growth*: the step with 1 to 1,000 tasks, with few and many sites, with small and large batches.
- *savings*: what each saving of ``docs/speed.md`` brings (``benchmarks.savings``): time and memory
  without it over those with it, in turns in one process.
- *quality*: on a trained network (CIFAR-10, ResNet-20, beside the repository), the images x passes
  and the seconds that the released loop, Captum's methods and the default recipe take, and the own
  AUC and fidelity that come of them, all at the same size, closed channels zero. An image counts
  once for a forward and once for a backward pass.
- *projection*: hours for 1,000 ImageNet classes, worked out from the rates above and not measured.

On one core the default takes about 45 minutes. What a package is missing for is left out,
and said.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar import SharedMissingError, add_shared_arguments, load_cifar10, load_resnet
from benchmarks.learning_cost import (
    CLOCKS,
    MODELS,
    BarePasses,
    add_heap_argument,
    measure,
    used_heap,
)
from benchmarks.released_loop import BATCH, EPOCHS, ReleasedLoop
from benchmarks.savings import SAVINGS, compared
from nad_attr import GateSite, Recipe, RunOptions, TaskGates, find_gate_sites, learn_gates
from nad_attr.evaluation import evaluate, top_k
from nad_attr.gating.hooks import frozen

__all__ = ["main"]

#: What a row of the result holds.
Row = dict[str, Any]

SECTIONS = ("steps", "released", "captum", "growth", "savings", "quality", "projection")
#: Images in a step, where none are asked for.
BATCHES = {
    "vgg16": 16, "resnet50": 16, "densenet121": 8, "efficientnet_lite0": 8, "mobilenet_v2": 16,
    "vit_b_16": 8,
}  # fmt: skip
#: The paper's beta; others take ResNet50's.
BETAS = {"vgg16": 4.5}
#: What the projection multiplies with: classes, own images of each, and for Captum images and
#: steps of the integral (its default) for each class.
CLASSES, OWN_IMAGES, CAPTUM_IMAGES, CAPTUM_STEPS = 1000, 1300, 50, 50
#: Steps and images per step that the default recipe tries, from little to much.
TRIALS = ((5, 4), (5, 8), (10, 8), (20, 8), (40, 10), (60, 16), (100, 20))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _now(device: torch.device, clock: str) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return CLOCKS[clock]()


class Speed:
    """All sections, for what the command line asks.

    Args:
        args: The command line's arguments.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.rows: dict[str, list[Row]] = {}
        self.skipped: list[str] = []

    def _batch(self, model: str) -> int:
        return self.args.batch[0] if self.args.batch else BATCHES[model]

    def _size(self, model: str) -> int:
        return 224 if model == "vit_b_16" else self.args.image_size

    def _models(self, section: str) -> Iterator[str]:
        for name in self.args.models:
            try:
                MODELS[name]()
            except ImportError as missing:
                self.skip(f"{section}: {name} ({missing})")
                continue
            yield name

    def skip(self, what: str) -> None:
        """Leave something out, and say so."""
        if what not in self.skipped:
            self.skipped.append(what)
            _say(f"skipped: {what}")

    def add(self, section: str, row: Row) -> None:
        """Keep a row."""
        self.rows.setdefault(section, []).append(row)
        _say(f"{section}: " + ", ".join(f"{k} {_cell(v)}" for k, v in row.items()))

    def _measured(self, model: str, **changes: Any) -> Row:
        wanted = {
            "batch": self._batch(model), "tasks": 10, "device": self.device,
            "image_size": self._size(model), "amp": self.args.bf16,
            "channels_last": self.args.channels_last, "repeats": self.args.repeats,
            "clock": self.args.clock, **changes,
        }  # fmt: skip
        row = measure(model, **wanted)
        return {
            "model": model,
            "batch": row["batch"],
            "precision": row["dtype"],
            "channels_last": row["channels_last"],
            "tasks": row["tasks"],
            "sites": row["sites"],
            "bare_images_per_second": row["batch"] / row["bare_seconds"],
            "step_images_per_second": row["batch"] / row["step_seconds"],
            "time_ratio": row["time_ratio"],
            "time_ratios": row["time_ratios"],
            "kept_ratio": row["kept_ratio"],
            "update_share": row["parts"]["update"] / row["step_seconds"],
            "bare_mb": row["bare_memory"] / 1e6,
            "step_mb": row["step_memory"] / 1e6,
            "memory_ratio": row["memory_ratio"],
        }

    # -- The sections -----------------------------------------------------------------------------

    def steps(self) -> None:
        """Our step against the bare passes."""
        for name in self._models("steps"):
            for batch in self.args.batch or [BATCHES[name]]:
                self.add("steps", self._measured(name, batch=batch))
        if "resnet50" in self.args.models and not self.args.bf16 and not self.args.quick:
            for setting in ({"amp": True}, {"amp": True, "channels_last": True}):
                self.add("steps", self._measured("resnet50", **setting))

    def released(self) -> None:
        """A step of the released loop against the bare passes."""
        for name in self._models("released"):
            network, sites = MODELS[name]()
            network = network.to(self.device)
            loop = ReleasedLoop(network, _plain(sites), BETAS.get(name, 0.02), amp=self._amp())
            size = self._size(name)
            images = torch.randn(BATCH, 3, size, size, device=self.device)
            with torch.no_grad():  # random weights may call no image by its name
                labels = network(images).argmax(1)
            bare = BarePasses(network, sites[0], self._amp())
            with frozen(network):
                pairs = self._pairs(
                    lambda bare=bare, images=images, labels=labels: bare(images, labels[:, None]),
                    lambda loop=loop, images=images, labels=labels: loop.step(images, labels),
                    2 if self.args.quick else 3,
                )
            self.add(
                "released",
                {
                    "model": name,
                    "batch": BATCH,
                    "seconds_per_image": statistics.median(b for _, b in pairs) / BATCH,
                    "time_ratio": statistics.median(b / a for a, b in pairs),
                },
            )

    def captum(self) -> None:
        """Captum's layer methods: seconds for an image, a site and a step of the integral."""
        methods = self._captum_methods()
        n_steps = 4
        for name in self._models("captum") if methods else ():
            network, sites = MODELS[name]()
            network = network.to(self.device)
            size = self._size(name)
            image = torch.randn(1, 3, size, size, device=self.device)
            for label, make in methods.items():
                seconds = []
                try:
                    for site in (sites[0], sites[len(sites) // 2], sites[-1]):
                        method = make(network, network.get_submodule(site.name))
                        start = _now(self.device, self.args.clock)
                        method.attribute(image, target=0, n_steps=n_steps)
                        seconds.append(_now(self.device, self.args.clock) - start)
                except (RuntimeError, AssertionError) as error:  # in-place networks, mostly
                    self.skip(f"captum: {label} on {name} ({str(error).splitlines()[0]:.80})")
                    continue
                row = {"model": name, "method": label, "sites": len(sites)}
                each = statistics.fmean(seconds) / n_steps
                self.add("captum", {**row, "seconds_per_image_site_step": each})

    def growth(self) -> None:
        """The step with more tasks, sites and images."""
        name = next((n for n in ("resnet50", *self.args.models) if n in self.args.models), None)
        if name is None:
            return
        batch = 4
        common = {"batch": batch, "repeats": max(2, self.args.repeats)}
        for tasks in (1, 10, 100, 1000):
            self.add("growth", {"grows": "tasks", **self._measured(name, tasks=tasks, **common)})
        total = len(MODELS[name]()[1])
        for n in dict.fromkeys((1, max(1, total // 4), max(1, total // 2))):
            self.add("growth", {"grows": "sites", **self._measured(name, n_sites=n, **common)})
        for b in (2, 4, 8):
            self.add("growth", {"grows": "batch", **self._measured(name, **{**common, "batch": b})})

    def savings(self) -> None:
        """Steps without a saving against steps with it."""
        for name in self._models("savings"):
            for saving in SAVINGS:
                if name in saving.models and self.args.only in saving.what:
                    batch, size = self._batch(name), self._size(name)
                    row = compared(
                        saving, name, batch, size, self.args.repeats, self.args.clock, self.device
                    )
                    self.add("savings", row)

    def quality(self) -> None:
        """What it takes to reach an own AUC."""
        try:
            model = load_resnet(20, self.args.shared).to(self.device)
            train_x, train_y, val_x, val_y = load_cifar10(self.args.shared, cache=self.args.cache)
        except SharedMissingError as missing:
            self.skip(f"quality: {missing}")
            return
        sites = find_gate_sites(model, train_x[:1].to(self.device))
        tasks = list(range(1 if self.args.quick else self.args.quality_tasks))
        # The first of each class.
        held = torch.cat([(val_y == k).nonzero()[:50, 0] for k in range(10)])
        bench = _Quality(self, model, sites, (train_x, train_y), (val_x[held], val_y[held]), tasks)
        epochs = 1 if self.args.quick else EPOCHS
        best = bench.released(self.args.released_images, epochs)
        if not self.args.quick:
            for label in self._captum_methods():
                bench.captum(label)
        reached = False
        for steps, images in TRIALS[:2] if self.args.quick else TRIALS:
            last = (steps, images) == TRIALS[-1]
            if reached and not last:
                continue
            row = bench.ours(steps, images)
            ok = row["own_auc"] >= best["own_auc"] and row["fidelity"] >= best["fidelity"]
            if ok and not reached:
                reached = True
                seconds, passes = (best[k] / row[k] for k in ("seconds", "image_passes"))
                text = (
                    f"equal or better own AUC and fidelity than the released loop's best with "
                    f"{passes:.0f} times fewer images x passes and {seconds:.0f} times less time"
                )
                self.add("equal_quality", {"statement": text, "passes": passes, "time": seconds})

    def projection(self) -> None:
        """Hours for 1,000 ImageNet classes, from the rates that were measured."""
        recipe = Recipe()
        n_images = recipe.steps * recipe.images_per_step
        hours: dict[tuple[str, str], float] = {}
        for row in self.rows.get("steps", ()):
            label = f"default recipe, {row['precision']}"
            label += ", channels last" if row["channels_last"] else ""
            hours[row["model"], label] = n_images / row["step_images_per_second"]
        for row in self.rows.get("released", ()):
            hours[row["model"], "released loop"] = EPOCHS * OWN_IMAGES * row["seconds_per_image"]
        for row in self.rows.get("captum", ()):
            label = f"{row['method']}, {CAPTUM_IMAGES} images"
            each = row["seconds_per_image_site_step"] * row["sites"]
            hours[row["model"], label] = each * CAPTUM_IMAGES * CAPTUM_STEPS
        for (model, what), seconds in sorted(hours.items()):
            row = {"model": model, "what": what, "projected_hours": CLASSES * seconds / 3600}
            self.add("projection", row)

    def profile(self) -> None:
        """Print what a step spends its time on."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        for name in self._models("profile"):
            network, sites = MODELS[name]()
            network = network.to(self.device)
            n, size = self._batch(name), self._size(name)
            x = torch.randn(2 * n, 3, size, size)
            recipe = Recipe(steps=4, images_per_step=max(2, n), removal=1.0)
            labels = torch.arange(2 * n) % 2
            with torch.profiler.profile(activities=activities) as profile:
                learn_gates(
                    network, (x, labels), [0], recipe, sites, batch_size=n,
                    amp=self.args.bf16, augmented=True,
                )  # fmt: skip
            print(f"\n{name}, four steps of {n} images with the means of all channels")
            key = "self_cuda_time_total" if self.device.type == "cuda" else "self_cpu_time_total"
            print(profile.key_averages().table(sort_by=key, row_limit=15))

    # -- What they share --------------------------------------------------------------------------

    def _amp(self) -> torch.dtype | None:
        return torch.bfloat16 if self.args.bf16 else None

    def _pairs(
        self, a: Callable[[], object], b: Callable[[], object], n: int
    ) -> list[tuple[float, float]]:
        """Seconds of two functions in turns; the first turn warms up."""
        pairs = []
        for _ in range(n):
            times = [_now(self.device, self.args.clock)]
            for function in (a, b):
                function()
                times.append(_now(self.device, self.args.clock))
            pairs.append((times[1] - times[0], times[2] - times[1]))
        return pairs[1:]

    def _captum_methods(self) -> dict[str, Callable[..., Any]]:
        try:
            from captum.attr import LayerConductance, LayerIntegratedGradients
        except ImportError as missing:
            self.skip(f"captum: {missing}")
            return {}
        return {
            "LayerConductance": LayerConductance,
            "LayerIntegratedGradients": LayerIntegratedGradients,
        }


def _plain(sites: Sequence[GateSite]) -> list[tuple[str, int, int]]:
    if any(site.at_input for site in sites):
        raise ValueError("the released loop gates outputs only.")
    return [(site.name, site.n_channels, site.channel_dim) for site in sites]


class _Quality:
    """Own AUC at one size, and what it took, by several ways."""

    SIZE = 0.4

    def __init__(
        self,
        speed: Speed,
        model: nn.Module,
        sites: Sequence[GateSite],
        train: tuple[Tensor, Tensor],
        held_out: tuple[Tensor, Tensor],
        tasks: list[int],
    ) -> None:
        self.speed, self.model, self.sites, self.tasks = speed, model, list(sites), tasks
        self.train, self.held_out = train, held_out
        self.device = speed.device

    def _row(self, what: str, seconds: float, passes: int, gates: Any, shown: bool = True) -> Row:
        result = evaluate(self.model, gates, self.held_out, n_random=0, batch_size=250)
        row = {
            "what": what,
            "tasks": len(self.tasks),
            "size": self.SIZE,
            "own_auc": result.mean("own_auc"),
            "fidelity": result.mean("fidelity"),
            "seconds": seconds,
            "image_passes": passes,
        }
        if shown:
            self.speed.add("quality", row)
        return row

    def _scored(self, scores: dict[str, Tensor]) -> Any:
        return top_k(scores, self.sites, self.tasks, self.SIZE)

    def released(self, n_images: int, epochs: int) -> Row:
        """The released loop, class by class; the best of what it had after some of its epochs."""
        x, y = self.train
        looks = sorted({max(1, epochs // 4), max(1, epochs // 2), epochs})
        seconds, passes = dict.fromkeys(looks, 0.0), dict.fromkeys(looks, 0)
        parts: dict[int, list[dict[str, Tensor]]] = {look: [] for look in looks}
        n_used = 0
        for k in self.tasks:
            own = (y == k).nonzero()[:n_images, 0]
            n_used = len(own)
            images, labels = x[own].to(self.device), y[own].to(self.device)
            loop = ReleasedLoop(self.model, _plain(self.sites), 0.02, seed=k)
            generator = torch.Generator().manual_seed(k)
            start = _now(self.device, self.speed.args.clock)
            for epoch in range(1, epochs + 1):
                for chosen in torch.randperm(len(own), generator=generator).split(BATCH):
                    loop.step(images[chosen], labels[chosen])
                if epoch in parts:
                    seconds[epoch] += _now(self.device, self.speed.args.clock) - start
                    passes[epoch] += 3 * epoch * len(own)
                    parts[epoch].append({n: s.cpu() for n, s in loop.scores().items()})
        rows = [
            self._row(
                f"released loop, {n_used} images, {look} epochs",
                seconds[look],
                passes[look],
                self._scored({n: torch.cat([p[n] for p in part]) for n in part[0]}),
            )
            for look, part in parts.items()
        ]
        # What it is compared by is the best of each, at the cost of the whole run.
        return {
            **rows[-1],
            "own_auc": max(row["own_auc"] for row in rows),
            "fidelity": max(row["fidelity"] for row in rows),
        }

    def captum(self, label: str) -> Row:
        """One of Captum's methods, scores over own images."""
        from nad_attr import evaluation

        n_images, n_steps = 10, 20
        x, y = self.train
        chosen = torch.cat([(y == k).nonzero()[:n_images, 0] for k in self.tasks])
        scorer = getattr(evaluation, f"{label}Scorer")(self.model, self.sites, n_steps=n_steps)
        with _counted(self.model) as count:
            start = _now(self.device, self.speed.args.clock)
            scores = scorer(x[chosen], y[chosen], tasks=self.tasks, run=RunOptions(batch_size=200))
            seconds = _now(self.device, self.speed.args.clock) - start
        what = f"Captum {label}, {n_images} images, {n_steps} steps"
        scores = {name: score.cpu() for name, score in scores.items()}
        return self._row(what, seconds, count[0], self._scored(scores))

    def ours(self, steps: int, images: int) -> Row:
        """The default recipe with so many steps and images in a step."""
        recipe = Recipe(size=self.SIZE, ablation="zero", steps=steps, images_per_step=images)
        with _counted(self.model) as count:
            start = _now(self.device, self.speed.args.clock)
            gates: TaskGates = learn_gates(
                self.model, self.train, self.tasks, recipe, self.sites, batch_size=64
            )
            seconds = _now(self.device, self.speed.args.clock) - start
        default = Recipe(size=self.SIZE, ablation="zero")
        what = f"{steps} steps of {images} images" + (" (default)" if recipe == default else "")
        return self._row(f"our recipe, {what}", seconds, count[0], gates)


class _counted:
    """Count images x passes: one for a forward pass, another for the backward pass behind it."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.count = model, [0]

    def __enter__(self) -> list[int]:
        def note(module: nn.Module, args: Any) -> None:
            self.count[0] += len(args[0]) * (2 if torch.is_grad_enabled() else 1)

        self.handle = self.model.register_forward_pre_hook(note)
        return self.count

    def __exit__(self, *exception: object) -> None:
        self.handle.remove()


# -- Tables ---------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return "/".join(_cell(item) for item in value)
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def table(rows: Sequence[Row]) -> str:
    """Rows as text; lists and statements are left to the JSON.

    Example:
        >>> print(table([{"model": "a", "ratio": 1.5}]))
        model  ratio
        a      1.500
    """
    keys = [key for key in rows[0] if not isinstance(rows[0][key], list)]
    lines = [keys, *([_cell(row[key]) for key in keys] for row in rows)]
    lines[0] = [key.replace("_", " ") for key in keys]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if isinstance(rows[0][key], str) else cell.rjust(width)
            for key, cell, width in zip(keys, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


TITLES = {
    "steps": "A step of the default recipe and the bare passes",
    "released": "A step of the released loop, over the bare passes of its batch",
    "captum": "Captum's layer methods",
    "growth": "Growth with tasks, sites and batch",
    "savings": "Without a saving, over with it",
    "quality": "CIFAR-10, ResNet-20: what own AUC and fidelity cost",
    "equal_quality": "Equal quality",
    "projection": f"PROJECTION, not measured: hours for {CLASSES:,} ImageNet classes",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Set OMP_NUM_THREADS=1 on a machine that others use as well.",
    )
    parser.add_argument("--models", nargs="+", choices=list(BATCHES), default=list(BATCHES))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--batch", type=int, nargs="+", help="images in a step (default: 8 or 16)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="autocast to bfloat16 everywhere")
    parser.add_argument("--channels-last", action="store_true")
    add_heap_argument(parser)
    parser.add_argument("--image-size", type=int, default=224, help="pixels (not for ViT)")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of step and bare passes")
    parser.add_argument("--only", default="", help="of the savings, those whose name has this")
    parser.add_argument("--quality-tasks", type=int, default=3)
    parser.add_argument(
        "--released-images", type=int, default=160, help="of each class, for the released loop"
    )
    parser.add_argument(
        "--clock", choices=list(CLOCKS), default="wall", help="cpu: processor seconds"
    )
    parser.add_argument("--quick", action="store_true", help="one small network, few repeats")
    parser.add_argument("--profile", action="store_true", help="print the top costs, nothing else")
    parser.add_argument("--json", help="file for all rows")
    add_shared_arguments(parser)
    return parser


def _command(argv: Sequence[str]) -> str:
    """The command as others would write it: without the folders of this machine."""
    words, skip = ["python -m benchmarks.speed"], False
    for word in argv:
        if not skip and word not in ("--shared", "--cache"):
            words.append(word)
        skip = word in ("--shared", "--cache")
    return " ".join(words)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections that were asked for; print tables, write JSON."""
    args = _parser().parse_args(argv)
    if args.quick:
        args.models, args.image_size, args.repeats = ["efficientnet_lite0"], 64, 1
    heap = used_heap(args)
    speed = Speed(args)
    if args.profile:
        speed.profile()
        return 0
    cuda = speed.device.type == "cuda"
    about = {
        "device": torch.cuda.get_device_name(speed.device) if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "clock": args.clock,
        "heap": heap,
        "command": _command(sys.argv[1:] if argv is None else argv),
    }
    begun = time.perf_counter()
    for section in SECTIONS:
        if section not in args.sections:
            continue
        getattr(speed, section)()
        about["minutes"] = round((time.perf_counter() - begun) / 60, 1)
        if args.json:  # now, for some sections take long
            path = Path(args.json)
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = {**about, "skipped": speed.skipped, **speed.rows}
            path.write_text(json.dumps(whole, indent=1) + "\n")
    for section, rows in speed.rows.items():
        print(f"\n{TITLES[section]}\n{table(rows)}")
    for what in speed.skipped:
        print(f"skipped: {what}")
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
