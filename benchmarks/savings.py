"""What each of the savings in ``docs/speed.md`` brings.

    python -m benchmarks.speed --sections savings

A step without a saving over the same step with it, in turns in one process, and the same of peak
memory. What brings less than 5 % of both is not worth its code.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from benchmarks.learning_cost import CLOCKS, FEW, MODELS, RECIPES, UPDATES, _Case, peak_memory
from nad_attr import GateSite
from nad_attr.gating.hooks import expand, frozen, multiply, recorded
from nad_attr.learning import constants, engine, paper
from nad_attr.learning.constants import ConstantModel
from nad_attr.learning.engine import Network
from nad_attr.learning.fast import light_copy
from nad_attr.learning.objective import _difference
from nad_attr.learning.selection import QuadraticModel

__all__ = ["SAVINGS", "Saving", "compared", "without"]

#: Above all numbers of channels.
NEVER = 2**62
#: Images and pixels where the update is measured, which does not depend on the images' size.
UPDATE_BATCH, UPDATE_SIZE = 16, 64


class Saving(NamedTuple):
    """Something that makes learning cheaper, and how to do without it.

    Attributes:
        what: Its name.
        part: Of a step, what it makes cheaper: "passes" or "update".
        models: The networks that it is tried on.
        off: Objects, their attributes, and what stands there without the saving.
        recipe: The recipe that has it.
        amp: In bfloat16.
    """

    what: str
    part: str
    models: tuple[str, ...]
    off: tuple[tuple[Any, str, Any], ...]
    recipe: str = "constants"
    amp: bool = False


def _plain_gate(
    site: GateSite, tensor: Tensor, gate: Tensor, mean: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    gated = multiply(site, tensor, gate, mean)
    return gated if shift is None else gated + expand(shift, site, tensor).to(tensor.dtype)


def _plain_difference(
    x: Tensor, gate: Tensor, clean: Tensor, *, rectified: bool = False
) -> tuple[Tensor, Tensor]:
    y = x * gate.to(x.dtype)
    wide = torch.promote_types(x.dtype, torch.float32)
    return y, _difference(y, clean, rectified).to(wide).square().flatten(1).mean(1)


@torch.no_grad()
def _all_recorded(network: Network, inputs: tuple[Tensor, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    with recorded(network.model, network.sites) as kept:
        return network(inputs), kept


def _no_candidates(*args: Any) -> None:
    return None


def _in_single_precision(model: Any, *args: Any, made: Any = ConstantModel.__init__) -> None:
    with mock.patch.object(constants, "MIN_CHANNELS_TO_NARROW", NEVER):
        made(model, *args)


def _moved_anew(
    model: ConstantModel, gates: Tensor, n_flips: int, moved: Any = ConstantModel.move
) -> None:
    moved(model, gates, n_flips)
    closed = model.slopes.to(gates.dtype) * (1 - gates)[:, None, :]
    model._gram = torch.bmm(closed, model._columns("slopes").mT)


SAVINGS = (
    Saving(
        "frozen BatchNorm keeps nothing", "passes", ("densenet121",),
        ((engine, "lean_batchnorm", lambda model: nullcontext()),),
    ),
    Saving(
        "frozen BatchNorm keeps nothing", "passes", ("resnet50",),
        ((engine, "lean_batchnorm", lambda model: nullcontext()),), amp=True,
    ),
    Saving(
        "frozen convolutions keep nothing", "passes", ("resnet50", "vgg16"),
        ((engine, "lean_convolutions", lambda model: nullcontext()),),
    ),
    Saving(
        "BatchNorm merged into convolutions", "passes", ("resnet50", "mobilenet_v2"),
        ((light_copy, "found_pairs", lambda model: nullcontext([])),),
    ),
    Saving(
        "maximum pooling keeps bits", "passes", ("vgg16",),
        ((light_copy, "MaxPool2d", nn.MaxPool2d),),
    ),
    Saving(
        "gate and gradients in one operation", "passes", ("resnet50", "efficientnet_lite0"),
        ((engine, "multiply_learned", _plain_gate),),
    ),
    Saving(
        "candidates of wide networks", "update", ("resnet50", "efficientnet_lite0"),
        (
            (QuadraticModel, "candidates", _no_candidates),
            (ConstantModel, "candidates", _no_candidates),
        ),
    ),
    Saving(
        "gradients of wide networks in half precision", "update", ("efficientnet_lite0",),
        ((ConstantModel, "__init__", _in_single_precision),),
    ),
    Saving(
        "products of gradients follow the flips", "update", ("resnet50", "efficientnet_lite0"),
        ((ConstantModel, "move", _moved_anew),),
    ),
    Saving(
        "first site not copied", "passes", ("resnet50", "vgg16"),
        ((Network, "clean_recorded", _all_recorded),), recipe="paper",
    ),
    Saving(
        "gate and difference in one operation", "passes", ("resnet50", "vgg16"),
        ((paper, "gate_and_difference", _plain_difference),), recipe="paper",
    ),
)  # fmt: skip


@contextmanager
def without(saving: Saving) -> Iterator[None]:
    """Learning without a saving."""
    with ExitStack() as stack:
        for place, name, other in saving.off:
            stack.enter_context(mock.patch.object(place, name, other))
        yield


def _step(case: _Case, n_pretended: int) -> dict[str, float]:
    """Seconds of the passes and the update of a step, after pretended ones."""
    passes: list[float] = []
    updates: list[float] = []
    begun = None

    def after(network: Any) -> None:
        nonlocal begun
        now = case.clock()
        if begun is not None:
            seconds = now - begun
            update = network.parts(seconds)["update"]
            updates.append(update)
            passes.append(seconds - update)
        network.spans.clear()
        begun = case.clock()

    case.learn(1, n_pretended, after)
    return {
        "passes": passes[-1],
        "update": statistics.fmean(updates[-UPDATES:]),
    }


def compared(
    saving: Saving, model: str, batch: int, image_size: int, repeats: int, clock: str, device: Any
) -> dict[str, Any]:
    """Time and peak memory of a step without a saving, over those with it.

    Args:
        saving: The saving.
        model: A key of ``learning_cost.MODELS``.
        batch: Images in a step, all of one task; of the update ``UPDATE_BATCH``.
        image_size: Height and width in pixels; of the update ``UPDATE_SIZE`` at most.
        repeats: Pairs of steps that are timed; which of a pair comes first, alternates.
        clock: A key of ``learning_cost.CLOCKS``.
        device: Where to run.
    """
    if saving.part == "update":
        batch, image_size = UPDATE_BATCH, min(UPDATE_SIZE, image_size)
    network, sites = MODELS[model]()
    network = network.to(device)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, image_size, image_size, generator=generator).to(device)
    recipe = dataclasses.replace(RECIPES[saving.recipe](), images_per_step=batch)
    amp = torch.bfloat16 if saving.amp else None
    case = _Case((network, sites), recipe, images, 10, 1, amp, CLOCKS[clock])
    few = min(FEW, case.n_pretended)
    n_pretended = case.n_pretended if saving.part == "update" else few
    pairs, memory = [], {}
    with frozen(network):
        _step(case, few)  # chooses algorithms, grows the heap
        for i in range(repeats):
            found: dict[bool, dict[str, float]] = {}
            for off in (False, True) if i % 2 else (True, False):
                with without(saving) if off else nullcontext():
                    found[off] = _step(case, n_pretended)
            # The other part is the same with and without.
            pairs.append((found[False], found[False] | {saving.part: found[True][saving.part]}))
        for off in (False, True):
            with without(saving) if off else nullcontext():
                memory[off] = peak_memory(images.device, lambda: case.learn(1, few, _nothing))
    times = [sum(off.values()) / sum(on.values()) for on, off in pairs]
    return {
        "what": saving.what,
        "model": model,
        "recipe": saving.recipe,
        "precision": "bfloat16" if saving.amp else "float32",
        "batch": batch,
        "image_size": image_size,
        "time_ratio": statistics.median(times),
        "time_ratios": [round(time, 4) for time in times],
        "memory_ratio": memory[True] / memory[False],
        "step_seconds": statistics.median(sum(on.values()) for on, _ in pairs),
        "step_mb": memory[False] / 1e6,
    }


def _nothing(network: Any) -> None:
    """After each step."""
