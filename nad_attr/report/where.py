"""Where in its images a class's kept channels have evidence for it: coloured pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from nad_attr.data.labels import own_images
from nad_attr.gates.task_gates import TaskGates
from nad_attr.pictures.evidence import evidence_maps
from nad_attr.report.pictures import Album, array_picture, encoded
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions

__all__ = ["where_part"]

#: Tasks, images of each, pixels of a picture's side.
_TASKS, _IMAGES, _SIDE = 8, 3, 104
#: Blue, and the share of the grey picture under it.
_COLOUR, _UNDER = np.array([0.0, 0.45, 0.7]), 0.55


def where_part(
    model: nn.Module,
    gates: TaskGates,
    inputs: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    album: Album,
    numbers: list[int],
    run: RunOptions | None = None,
) -> list[dict[str, Any]]:
    """Pictures of some tasks, plain and with the evidence for the task coloured.

    Evidence is, to first order, the loss of the output without the kept channels at a place, at the
    last gate site that has places; evidence against the task is left out. ``numbers`` are those of
    the images (N, C, H, W) in the album's source.

    Returns:
        For each task ``task``, ``site`` and ``images``, each a pair of data URIs.

    Raises:
        ValueError: If the inputs are no images, or no site has positions.
    """
    if len(inputs) != 1 or inputs[0].ndim != 4 or inputs[0].shape[1] not in (1, 3):
        raise ValueError("the inputs are not images, so there are no places to show.")
    runner = Runner(model, run, batch_size=_IMAGES)
    own = own_images(labels, gates.tasks)
    found: list[dict[str, Any]] = []
    for arch, mask, name in zip(
        gates.sub_architectures(), own, gates.task_names or map(str, gates.tasks), strict=True
    ):
        rows = mask.nonzero().flatten()[:_IMAGES]
        if arch.task is None or not len(rows) or len(found) == _TASKS:
            continue
        (x,) = runner.to_device((inputs[0][rows],))
        maps = evidence_maps(runner, arch, arch.task, x, arch.masks)
        wide = [site for site, values in maps.maps.items() if min(values.shape[1:]) > 2]
        if not wide:
            raise ValueError("no gate site has positions to look at.")
        values = maps.maps[wide[-1]].clamp(min=0)[:, None]
        values = F.interpolate(values, x.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
        images = []
        for row, heat in zip(rows.tolist(), values.numpy(), strict=True):
            picture = album.of_tensor(numbers[row])
            pixels = np.asarray(picture, dtype=np.float64) / 255
            grey = (1 - _UNDER + _UNDER * pixels @ np.array([0.299, 0.587, 0.114]))[..., None]
            share = (heat / max(float(heat.max()), 1e-12))[..., None]
            coloured = grey * (1 - 0.85 * share) + _COLOUR * 0.85 * share
            both = (picture, array_picture(coloured))
            images.append([encoded(each, _SIDE, grow=True) for each in both])

        found.append({"task": str(name), "site": wide[-1], "images": images})
    if not found:
        raise ValueError("there is no image of any task.")
    return found
