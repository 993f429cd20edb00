"""``nad-attr export --network``: sub-architectures as a smaller network in a file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nad_attr.cli.messages import UsageError, say
from nad_attr.cli.opening import Opened
from nad_attr.export.combining import combine
from nad_attr.export.costs import Summary, latency, summary
from nad_attr.export.files import FORMATS, check_target, save
from nad_attr.gates.task_gates import TaskGates

__all__ = ["check_network", "write_network"]


def check_network(
    path: Path,
    gates: Path,
    tasks: Sequence[str] | None,
    head: str,
    others: Sequence[Path | None] = (),
) -> None:
    """Refuse a file of a network that cannot be written, before anything is read."""
    if path.suffix not in FORMATS:
        raise UsageError(f"--network takes a file that ends in {', '.join(FORMATS)}, got {path}.")
    if not tasks:
        raise UsageError(
            "--network writes the network of one class, or of several together: name them with "
            "--task."
        )
    if head not in ("task", "whole"):
        raise UsageError(f"--head is task or whole, got {head!r}.")
    check_apart(path, gates, "is the file of the gates")
    for other in others:
        check_apart(path, other, "is written as well")
    try:
        check_target(path)
    except (OSError, ValueError) as error:
        raise UsageError(str(error)) from None


def check_apart(path: Path, other: Path | None, what: str) -> None:
    """Refuse to write a network or its companion files over another file."""
    beside = path.with_name(f"{path.name}.json")
    written = [some.resolve() for some in (path, beside, path.with_suffix(".py"))]
    if other is not None and other.resolve() in written:
        raise UsageError(f"{other} {what}; give --network another name.")


def image_like(opened: Opened, pixels: int | None) -> Tensor:
    """One image as the network's transform makes it, of the size that was asked for."""
    from PIL import Image

    side = pixels or 224
    made = torch.as_tensor(opened.transform.function(Image.new("RGB", (side, side))), device="cpu")
    if pixels is not None and tuple(made.shape[-2:]) != (pixels, pixels):
        raise UsageError(
            f"--pixels {pixels} has no effect, because the transform makes images of "
            f"{made.shape[-2]} x {made.shape[-1]}: --resize {pixels} --crop {pixels} changes that."
        )
    return made[None]


def write_network(
    learned: TaskGates,
    opened: Opened,
    path: Path,
    *,
    size: float | None,
    head: Any,
    pixels: int | None,
    merge_bn: bool,
    how: Any,
    quiet: bool,
) -> Summary:
    """Write the network of the tasks there are, and say what it costs."""
    if opened.loaded.weights is not None:
        check_apart(path, Path(opened.loaded.weights), "holds the network's weights")
    image, model = image_like(opened, pixels), opened.loaded.model
    archs = {task: learned.sub_architecture(task, size) for task in learned.tasks}
    if len(archs) == 1:
        (arch,) = archs.values()
        small = arch.export(model, image, head=head, merge_bn=merge_bn)
    else:
        small = combine(model, archs, image, how=how, merge_bn=merge_bn)
    files = save(small, path, image)
    made = summary(small)
    for line in str(made).splitlines():
        say(line, quiet)
    times = latency({"whole": opened.loaded.model, "smaller": small}, image)
    whole, smaller = 1e3 * times["whole"], 1e3 * times["smaller"]
    said = f"{whole:.1f} ms -> {smaller:.1f} ms here, one image, {whole / smaller:.2f} x"
    say(f"latency         {said}", quiet)
    beside = "gates on hooks" if len(archs) == 1 else "the networks cut, on hooks"
    say(f"difference      {made.difference:.1e} of the largest output, beside {beside}", quiet)
    say(f"written: {', '.join(map(str, files))}", quiet)
    return made
