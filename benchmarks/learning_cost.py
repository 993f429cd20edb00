"""What a learning step costs, against the passes that no way of learning gates can do without.

    python benchmarks/learning_cost.py --model resnet50 --batch 16 --tasks 10 --json -
    python benchmarks/learning_cost.py --device cuda --amp

The bare passes are, for one batch of images: a forward pass of the whole network without a graph,
a forward pass whose graph begins at the first gate site (weights frozen), and the backward pass of
the summed task outputs to that site. Nothing of ``nad_attr`` runs in them.

A learning step is what :func:`nad_attr.learn_gates` does for one batch, run by the very functions
of the library: fetching the batch, clean pass, gated pass with each image under the gates of its
own task, backward pass to the gates, update. ``learn_gates`` learns as many tasks together as fit
into a batch (``rows``; each with ``images_per_step`` images) and keeps the gates of all the others
on the device meanwhile. The whole network's outputs are computed in every step, as for augmented
images; for fixed images the library keeps them, which saves about a third of the step.

- *selection* (closed channels at their mean) and *constants* (at the best constants, which are
  learned as well) are measured in the middle of removing channels, the memory
  of the quadratic model full. That is reached by pretended steps, in which random numbers stand in
  for outputs and gradients. Some updates do more than others, so the mean of the last
  ``UPDATES`` pretended ones stands in for the update of each step that is timed.
- *paper* is the released recipe, with the squared differences of all sites.

Time: steps and bare passes alternate; ``time_ratio`` is the median of the ratios of neighbours,
``kept_ratio`` the same without the clean pass, as for fixed images whose outputs are kept;
``bare_seconds``, ``step_seconds`` and ``parts`` are medians. Memory, in runs of its own: the
highest sum of live tensor bytes, weights and images not counted. On a CPU it comes from the
profiler's record of every allocation (exact, but without what oneDNN allocates by itself), on CUDA
from the allocator. All that a step keeps for the next one counts: the gates of all tasks and the
quadratic model's gradients.

Weights are random: they change neither time nor memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

import torch
from torch import Tensor, nn

from nad_attr import RunOptions
from nad_attr.data.sources import Draw, Inputs
from nad_attr.gates.recipe import PaperRecipe, Recipe
from nad_attr.gating.hooks import frozen
from nad_attr.learning.constants import learn_with_constants
from nad_attr.learning.engine import Chunk, Network
from nad_attr.learning.paper import learn_paper
from nad_attr.learning.selection import learn_selection
from nad_attr.running.outputs import own_task_output
from nad_attr.sites.finding import find_gate_sites, paper_sites
from nad_attr.sites.site import GateSite
from nad_attr.system.memory import keep_freed_memory
from nad_attr.system.memory import peak_memory as allocated_memory

__all__ = ["MODELS", "RECIPES", "BarePasses", "main", "measure", "table"]

#: A network in eval mode and its gate sites.
Gateable: TypeAlias = "tuple[nn.Module, list[GateSite]]"
#: What a row of the result holds.
Row: TypeAlias = "dict[str, Any]"

#: Updates of the default recipe that are averaged.
UPDATES = 10
#: Pretended steps where only memory is measured; channels are closed by then.
FEW = 6

PARTS = ("clean", "gated forward", "backward", "update")


def _torchvision(name: str) -> Gateable:
    import torchvision

    return torchvision.models.get_model(name, weights=None).eval(), paper_sites(name)


def _efficientnet_lite0() -> Gateable:
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0").eval()
    return model, find_gate_sites(model, torch.zeros(1, 3, 224, 224))


def _found(name: str) -> Gateable:
    import torchvision

    model = torchvision.models.get_model(name, weights=None).eval()
    return model, find_gate_sites(model, torch.zeros(1, 3, 224, 224))


#: How each network is made, with random weights; the paper's sites where it has the network.
MODELS: dict[str, Callable[[], Gateable]] = {
    "vgg16": lambda: _torchvision("vgg16"),
    "resnet50": lambda: _torchvision("resnet50"),
    "densenet121": lambda: _torchvision("densenet121"),
    "efficientnet_lite0": _efficientnet_lite0,
    "mobilenet_v2": lambda: _found("mobilenet_v2"),
    "vit_b_16": lambda: _found("vit_b_16"),
}

RECIPES: dict[str, Callable[[], Recipe]] = {
    "selection": lambda: Recipe(ablation="mean"),
    "constants": lambda: Recipe(ablation="optimal"),
    "paper": lambda: Recipe.paper(beta=0.02),
}


#: "cpu" counts the processor time of this program's threads, so that other programs on the same
#: machine do not disturb; on one thread of an idle machine both are the same.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


class RandomImages:
    """Images of T classes in turn; every batch is made of the same few random images."""

    augmented = True  # so that the whole network's outputs are computed in each step

    def __init__(self, images: Tensor, n_tasks: int) -> None:
        self.images = images
        # Two classes at least, so that each has other images.
        self.labels = torch.arange(max(2, n_tasks)).repeat(len(images))

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """As many images as are drawn, for each list of draws."""
        for chosen in draws:
            yield (self.images[: len(chosen)],)


class _Clock:
    """Times on the device: CUDA work is queued, so events mark when it is done."""

    def __init__(self, device: torch.device, seconds: Callable[[], float]) -> None:
        self.cuda = device.type == "cuda"
        self.seconds = seconds

    def now(self) -> Any:
        if not self.cuda:
            return self.seconds()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(self, start: Any, stop: Any) -> float:
        """Seconds."""
        if not self.cuda:
            return float(stop - start)
        stop.synchronize()
        return float(start.elapsed_time(stop)) / 1000


class _MeasuredNetwork(Network):
    """A network that notes when its passes begin and end, and pretends the first ``n_pretended``.

    Args:
        n_pretended: Steps whose passes are random numbers.
        seconds: The clock.
        **arguments: Of :class:`nad_attr.learning.engine.Network`.
    """

    def __init__(
        self, *args: Any, n_pretended: int, seconds: Callable[[], float], **arguments: Any
    ) -> None:
        super().__init__(*args, **arguments)
        self.clock = _Clock(self.device, seconds)
        self.spans: list[tuple[str, Any, Any]] = []
        self.n_pretended = n_pretended
        self.n_classes = 0
        self._generator = torch.Generator(self.device).manual_seed(0)

    def __call__(self, inputs: Inputs) -> Tensor:
        start = self.clock.now()
        outputs = super().__call__(inputs)
        name = "gated forward" if torch.is_grad_enabled() else "clean"
        self.spans.append((name, start, self.clock.now()))
        self.n_classes = outputs.shape[1]
        return outputs

    def clean(self, inputs: Inputs) -> Tensor:
        if self.n_pretended > 0:
            return self._pretended(len(inputs[0]), self.n_classes)
        return super().clean(inputs)

    def output_and_gradient(
        self, inputs: Inputs, gates: Tensor, classes: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.n_pretended > 0:
            return self._pretended(len(gates)), self._pretended(*gates.shape)
        return super().output_and_gradient(inputs, gates, classes, valid)

    def output_and_gradients(
        self, inputs: Inputs, gates: Tensor, constants: Tensor, classes: Tensor, valid: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.n_pretended > 0:
            shapes = (gates.shape[:1], gates.shape, gates.shape)
            output, of_gates, of_shift = (self._pretended(*shape) for shape in shapes)
            return output, of_gates, of_shift
        return super().output_and_gradients(inputs, gates, constants, classes, valid)

    def _pretended(self, *shape: int) -> Tensor:
        start = self.clock.now()
        numbers = torch.randn(
            shape, generator=self._generator, device=self.device, dtype=self.dtype
        )
        self.spans.append(("clean", start, self.clock.now()))
        return numbers

    @contextmanager
    def noting_backward(self) -> Iterator[None]:
        """Note the backward passes as well; the recipes call :func:`torch.autograd.grad`."""
        grad = torch.autograd.grad

        def noted(*args: Any, **arguments: Any) -> Any:
            start = self.clock.now()
            result = grad(*args, **arguments)
            self.spans.append(("backward", start, self.clock.now()))
            return result

        with mock.patch.object(torch.autograd, "grad", noted):
            yield

    def parts(self, step_seconds: float) -> dict[str, float]:
        """Seconds of each part of the step that has just ended."""
        seconds = dict.fromkeys(PARTS, 0.0)
        for name, start, stop in self.spans:
            seconds[name] += self.clock.between(start, stop)
        self.spans.clear()
        seconds["update"] = step_seconds - sum(seconds.values())
        return seconds


class BarePasses:
    """Clean forward, and forward and backward to the first gate site; plain PyTorch.

    Args:
        model: The network, frozen.
        first: Its first gate site.
        amp: Autocast dtype, or None.
    """

    def __init__(self, model: nn.Module, first: GateSite, amp: torch.dtype | None = None) -> None:
        self.model, self.first, self.amp = model, first, amp

    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """Gradient of the summed task outputs with respect to the first site's tensor.

        Args:
            images: (B, ...).
            classes: int64 (B, 1), the class of each image's task.
        """
        cut: list[Tensor] = []

        def begin(tensor: Tensor) -> Tensor:
            cut.append(tensor.detach().requires_grad_(True))
            # An in-place ReLU may follow, which autograd forbids on a leaf.
            return cut[0].view_as(cut[0]) if self.first.at_input else cut[0]

        with torch.autocast(images.device.type, dtype=self.amp, enabled=self.amp is not None):
            with torch.no_grad():
                self.model(images)
            module = self.model.get_submodule(self.first.name)
            if self.first.at_input:
                handle = module.register_forward_pre_hook(lambda module, args: (begin(args[0]),))
            else:
                handle = module.register_forward_hook(lambda module, args, output: begin(output))
            try:
                outputs = self.model(images)
            finally:
                handle.remove()
        output = own_task_output(outputs, classes, torch.ones_like(classes, dtype=torch.bool))
        (gradient,) = torch.autograd.grad(output.sum(), cut[0])
        return gradient


class _EnoughError(Exception):
    """Ends learning when all steps that were wanted are done."""


class _Case:
    """One network, recipe, batch size and number of tasks, ready to be run."""

    def __init__(
        self,
        gateable: Gateable,
        recipe: Recipe,
        images: Tensor,
        n_tasks: int,
        rows: int,
        amp: torch.dtype | None,
        clock: Callable[[], float],
    ) -> None:
        self.clock = clock
        self.model, self.sites = gateable
        self.recipe, self.images, self.amp, self.n_tasks = recipe, images, amp, n_tasks
        self.source = RandomImages(images, n_tasks)
        self.rows = rows
        self.n_images = rows * recipe.images_per_step
        self.bare = BarePasses(self.model, self.sites[0], amp)
        self.classes = torch.arange(rows, device=images.device).repeat_interleave(
            recipe.images_per_step
        )[:, None]
        self.n_pretended = (
            0
            if isinstance(recipe, PaperRecipe)
            else max(1, round(recipe.removal * recipe.steps / 2))
        )

    def run_bare(self) -> None:
        """The bare passes, once."""
        self.bare(self.images[: self.n_images], self.classes)

    def learn(
        self, n_steps: int, n_pretended: int, after: Callable[[_MeasuredNetwork], None]
    ) -> None:
        """Run learning for a number of steps.

        Args:
            n_steps: How many.
            n_pretended: How many come before them.
            after: Called after each, and before the first, with ``network.n_pretended`` still
                to come.
        """
        network = _MeasuredNetwork(
            self.model,
            self.sites,
            run=RunOptions(amp=self.amp),
            n_pretended=n_pretended,
            seconds=self.clock,
        )
        network.lighten([(self.images[:2],)])
        network.spans.clear()
        n_channels = sum(site.n_channels for site in self.sites)
        # What learn_gates holds while the last tasks are learned: the logits of all others.
        others = torch.zeros(
            self.n_tasks - self.rows, n_channels, device=network.device, dtype=network.dtype
        )
        left = n_steps

        def advance(n: int) -> None:
            nonlocal left
            if network.n_pretended > 0:
                network.n_pretended -= 1
            else:
                left -= 1
            after(network)
            if left == 0:
                raise _EnoughError

        if self.recipe.ablation != "zero":
            network.set_means({site.name: torch.zeros(site.n_channels) for site in self.sites})
        network.n_classes = self.n_tasks + 1
        chunk = Chunk(
            network,
            self.source,
            range(self.rows),
            seed=0,
            advance=advance,
        )
        after(network)
        try:
            with network.noting_backward():
                if isinstance(self.recipe, PaperRecipe):
                    learn_paper(chunk, self.recipe)
                elif self.recipe.ablation == "optimal":
                    moments = torch.zeros(2, n_channels, device=network.device)
                    learn_with_constants(
                        chunk, self.recipe, [self.recipe.size], moments[0], moments[1] + 1
                    )
                else:
                    learn_selection(chunk, self.recipe, [self.recipe.size])
        except _EnoughError:
            pass
        del others


def _seconds(case: _Case, repeats: int) -> Row:
    """Time of steps and bare passes, alternating."""
    device = case.images.device
    steps: list[float] = []
    bares: list[float] = []
    parts: list[dict[str, float]] = []
    updates: list[float] = []
    begun = 0.0
    real = False

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return case.clock()

    def after(network: _MeasuredNetwork) -> None:
        nonlocal begun, real
        seconds = now() - begun
        if real:
            steps.append(seconds)
            parts.append(network.parts(seconds))
        elif begun:
            updates.append(network.parts(seconds)["update"])
        real = network.n_pretended == 0
        if not real:
            begun = now()
            return
        if len(steps) > repeats:
            return
        begun = now()
        case.run_bare()
        bares.append(now() - begun)
        network.spans.clear()  # the bare pass's own
        begun = now()

    # The first pair also chooses algorithms and grows the heap.
    case.learn(repeats + 1, case.n_pretended, after)
    if updates:
        mean = statistics.fmean(updates[-UPDATES:])
        steps = [step - part["update"] + mean for step, part in zip(steps, parts, strict=True)]
        parts = [{**part, "update": mean} for part in parts]
    pairs = list(zip(bares[1:], steps[1:], strict=True))
    return {
        "bare_seconds": statistics.median(bare for bare, _ in pairs),
        "step_seconds": statistics.median(step for _, step in pairs),
        "time_ratio": statistics.median(step / bare for bare, step in pairs),
        "time_ratios": [round(step / bare, 4) for bare, step in pairs],
        "kept_ratio": statistics.median(
            (step - part["clean"]) / bare
            for (bare, step), part in zip(pairs, parts[1:], strict=True)
        ),
        "parts": {name: statistics.median(part[name] for part in parts[1:]) for name in PARTS},
    }


def peak_memory(device: torch.device, function: Callable[[], object]) -> int:
    """Highest number of tensor bytes that a function holds at any time, beyond those before it.

    Example:
        >>> peak_memory(torch.device("cpu"), lambda: torch.zeros(1000)) // 1000
        4
    """
    if device.type == "cuda":
        return allocated_memory(device, function)
    gc.collect()
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    results = profile.profiler.kineto_results
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.events()
        if event.name() == "[memory]"
    ]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def _bytes(case: _Case) -> Row:
    """Peak memory of a step and of the bare passes."""
    device = case.images.device
    few = min(FEW, case.n_pretended)
    bare = peak_memory(device, case.run_bare)
    step = peak_memory(device, lambda: case.learn(1, few, lambda network: None))
    return {"bare_memory": bare, "step_memory": step, "memory_ratio": step / bare}


def measure(
    model: str,
    *,
    recipe: str = "selection",
    batch: int = 16,
    tasks: int = 10,
    images_per_step: int | None = None,
    device: str | torch.device = "cpu",
    image_size: int = 224,
    amp: bool = False,
    channels_last: bool = False,
    n_sites: int | None = None,
    repeats: int = 5,
    clock: str = "wall",
) -> Row:
    """Measure one learning step against the bare passes.

    Args:
        model: A key of ``MODELS``.
        recipe: A key of ``RECIPES``.
        batch: Images in a step at most.
        tasks: T, tasks that are learned in all.
        images_per_step: Images of each task in a step. None: the recipe's number, at most
            ``batch``; with fewer, several tasks share the step.
        device: Where to run.
        image_size: Height and width in pixels.
        amp: Autocast to bfloat16.
        channels_last: Keep weights and images with their channels on the last axis in memory.
        n_sites: Gate so many sites, spread evenly, the first among them. None: all.
        repeats: Pairs of a step and bare passes that are timed.
        clock: A key of ``CLOCKS``.

    Returns:
        What was measured (seconds, bytes, ratios) and how, ready for JSON.

    Raises:
        ValueError: If a number is below 1, or a name is not known.
    """
    for name, value in {"batch": batch, "tasks": tasks, "repeats": repeats}.items():
        if value < 1:
            raise ValueError(f"{name} must be a whole number from 1 on, not {value}.")
    for what, name, known in (
        ("model", model, MODELS),
        ("recipe", recipe, RECIPES),
        ("clock", clock, CLOCKS),
    ):
        if name not in known:
            raise ValueError(f"{what} {name!r} is not known; choose one of {sorted(known)}.")
    target = torch.device(device)
    network, sites = MODELS[model]()
    network = network.to(target)
    if n_sites is not None:
        sites = [sites[i * len(sites) // n_sites] for i in range(min(n_sites, len(sites)))]
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator).to(target)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
        images = images.to(memory_format=torch.channels_last)
    settings = RECIPES[recipe]()
    per_step = min(batch, settings.images_per_step if images_per_step is None else images_per_step)
    rows = min(tasks, batch // per_step)
    settings = dataclasses.replace(settings, images_per_step=batch // rows)
    if isinstance(settings, PaperRecipe):
        settings = dataclasses.replace(settings, epochs=repeats + 2)
    case = _Case(
        (network, sites),
        settings,
        images,
        tasks,
        rows,
        torch.bfloat16 if amp else None,
        CLOCKS[clock],
    )
    with frozen(network):
        times = _seconds(case, repeats)
        memory = _bytes(case)
    return {
        "model": model,
        "recipe": recipe,
        "device": torch.cuda.get_device_name(target) if target.type == "cuda" else target.type,
        "batch": case.n_images,
        "tasks": tasks,
        "rows": case.rows,
        "images_per_step": settings.images_per_step,
        "sites": len(sites),
        "channels": sum(site.n_channels for site in sites),
        "channels_last": channels_last,
        "image_size": image_size,
        "dtype": "bfloat16 (autocast)" if amp else "float32",
        "clock": clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **times,
        **memory,
    }


def table(rows: Sequence[Row]) -> str:
    """Rows as text.

    Example:
        >>> print(table([]))
        no rows
    """
    if not rows:
        return "no rows"
    head: tuple[str, ...] = ("model", "recipe", "batch", "tasks", "bare s", "step s", "time ratio")
    head += ("kept", "bare MB", "step MB", "memory ratio", *PARTS)
    lines = [head]
    for row in rows:
        lines.append(
            (
                row["model"],
                row["recipe"],
                f"{row['rows']} x {row['images_per_step']}",
                str(row["tasks"]),
                f"{row['bare_seconds']:.3f}",
                f"{row['step_seconds']:.3f}",
                f"{row['time_ratio']:.3f}",
                f"{row['kept_ratio']:.3f}",
                f"{row['bare_memory'] / 1e6:.0f}",
                f"{row['step_memory'] / 1e6:.0f}",
                f"{row['memory_ratio']:.3f}",
                *(f"{row['parts'][name]:.3f}" for name in PARTS),
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def add_heap_argument(parser: argparse.ArgumentParser) -> None:
    """Let the command line say what becomes of freed memory; :func:`used_heap` reads it."""
    parser.add_argument(
        "--heap",
        choices=("kept", "plain"),
        default="kept",
        help="kept: freed memory stays with the process (nad_attr.memory.keep_freed_memory)",
    )


def used_heap(arguments: argparse.Namespace) -> str:
    """Do what the command line says of freed memory; "kept" or "plain", as it then is."""
    return "kept" if arguments.heap == "kept" and keep_freed_memory() else "plain"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog="Set OMP_NUM_THREADS=1 on a machine that others use as well.",
    )
    parser.add_argument("--model", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--recipe", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--batch", type=int, default=16, help="images in a step")
    parser.add_argument("--tasks", type=int, nargs="+", default=[10], help="tasks learned in all")
    parser.add_argument(
        "--images-per-step",
        type=int,
        help="images of each task in a step; with fewer than the batch, tasks share it "
        "(default: the recipe's, at most the batch)",
    )
    parser.add_argument("--device", default="cpu")
    add_heap_argument(parser)
    parser.add_argument("--image-size", type=int, default=224, help="pixels")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--repeats", type=int, default=5, help="pairs of step and bare passes")
    parser.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="cpu: processor seconds of all threads, for a CPU that others use as well",
    )
    parser.add_argument("--json", help="file for the rows; - for standard output")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every combination that was asked for; print a table and write JSON."""
    arguments = _parser().parse_args(argv)
    heap = used_heap(arguments)
    rows: list[Row] = []
    path = None if arguments.json in (None, "-") else Path(arguments.json)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    for model in arguments.model:
        for recipe in arguments.recipe:
            for tasks in arguments.tasks:
                row = measure(
                    model,
                    recipe=recipe,
                    batch=arguments.batch,
                    tasks=tasks,
                    images_per_step=arguments.images_per_step,
                    device=arguments.device,
                    amp=arguments.amp,
                    image_size=arguments.image_size,
                    repeats=arguments.repeats,
                    clock=arguments.clock,
                )
                row["heap"] = heap
                rows.append(row)
                print(table([row]), file=sys.stderr, flush=True)
                if path is not None:  # now, for some of these take long
                    path.write_text(json.dumps(rows, indent=1) + "\n")
    print(json.dumps(rows, indent=1) if arguments.json == "-" else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
