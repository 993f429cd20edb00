"""Mosaics coloured by class: which class's channels have most evidence at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.data.sources import Data, as_source, only_images
from nad_attr.evaluation.questions.mosaics import assemble, choose
from nad_attr.evaluation.rows import named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.pictures.evidence import (
    Measure,
    check_measure,
    chosen_sites,
    enlarged,
    evidence_maps,
    no_positions,
)
from nad_attr.pictures.pixels import ToPixels
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.stats.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ClassMosaics", "class_mosaics"]


@dataclass(frozen=True, eq=False)
class ClassMosaics(Result):
    """Mosaics of four images of four classes, with the map of each class at each site.

    Attributes:
        images: float (M, C, H, W), the mosaics.
        maps: ``{site name: float32 (M, 4, h, w)}``: the map of the class of each quadrant (top
            left, top right, bottom left, bottom right), inside its sub-architecture.
        chosen: int64 (M, 4), which of ``tasks`` each quadrant holds.
        numbers: int64 (M, 4), the images' numbers in the data.
        tasks: All tasks.
        task_names: Their names.
        left_out: ``{site name: why it has no map}``.
        measure: "evidence" or "presence".
    """

    images: Tensor
    maps: dict[str, Tensor]
    chosen: Tensor
    numbers: Tensor
    tasks: tuple[Task, ...]
    task_names: tuple[str, ...]
    left_out: dict[str, str]
    measure: Measure

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that have maps, in forward order."""
        return tuple(self.maps)

    def strengths(self, site: str | None = None) -> Tensor:
        """The evidence for each class at each position, relative to its largest value.

        Negative values count as zero. Each class is scaled by itself, for outputs of different
        classes have different scales.

        Args:
            site: One site, or None: the mean over sites.

        Returns:
            float32 (M, 4, H, W) in [0, 1], at the size of the mosaics.

        Raises:
            KeyError: If there is no map of that site.
        """
        height, width = self.images.shape[-2:]
        names = chosen_sites(self.maps, site)
        large = [enlarged(self.maps[n].clamp_min(0), (height, width), 2, 3) for n in names]
        return torch.stack(large).mean(0)

    def own_share(self, site: str | None = None) -> Tensor:
        """Share of each class's evidence that lies in its own quadrant; 0.25 is chance.

        Args:
            site: One site, or None: the mean over sites.

        Returns:
            float32 (M, 4); NaN for a class without evidence.

        Raises:
            KeyError: If there is no map of that site.
        """
        strengths = self.strengths(site)
        height, width = strengths.shape[-2:]
        rows = (torch.arange(height, device="cpu") >= height / 2).long()
        columns = (torch.arange(width, device="cpu") >= width / 2).long()
        quadrant = rows[:, None] * 2 + columns
        own = torch.stack([strengths[:, q][:, quadrant == q].sum(1) for q in range(4)], dim=1)
        return own / strengths.sum((2, 3))

    def _records(self) -> list[dict[str, Any]]:
        own = {site: self.own_share(site).tolist() for site in self.sites}
        return [
            {"mosaic": str(i), "task": self.task_names[t], "site": site, "own_share": shares[i][q]}
            for site, shares in own.items()
            for i, quadrants in enumerate(self.chosen.tolist())
            for q, t in enumerate(quadrants)
        ]

    def plot(self, *, site: str | None = None, to_pixels: ToPixels | None = None) -> Figure:
        """Draw each mosaic twice: as it is, and coloured by class.

        Each position has the colour of the class with the most evidence there; more evidence gives
        a stronger colour. Frames have the colours of the quadrants' classes.

        Args:
            site: One site, or None: the mean over sites.
            to_pixels: Undoes the network's preprocessing, see :func:`nad_attr.pictures.as_pixels`.

        Returns:
            A figure with one row per mosaic.

        Raises:
            ImportError: If matplotlib is missing.
            KeyError: If there is no map of that site.
        """
        from nad_attr.pictures.figures import draw_class_mosaics

        return draw_class_mosaics(self, site=site, to_pixels=to_pixels)


def class_mosaics(
    model: nn.Module,
    architectures: TaskGates | Sequence[SubArchitecture],
    data: Data,
    *,
    n: int = 1,
    measure: Measure = "evidence",
    exclusive: bool = False,
    seed: int = 0,
    size: float | None = None,
    resize: bool = True,
    prefix_tokens: int | None = None,
    run: RunOptions | None = None,
) -> ClassMosaics:
    """Map what the sub-architectures of four classes find in a mosaic of their images.

    The mosaics are those of :func:`nad_attr.evaluation.mosaics` with the same seed. The maps are
    those of :func:`contrast_maps`, over all channels that a class keeps or, with ``exclusive``,
    those that none of the other three keeps.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: Task gates, or sub-architectures of the same sites, each of another task;
            at least four.
        data: Images of at least four of the tasks.
        n: Number of mosaics.
        measure: "evidence" or "presence", see :func:`contrast_maps`.
        exclusive: Only channels that one of the four classes keeps alone.
        seed: Of the mosaics.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        resize: Make the mosaic of the images' own size. False: twice as high and wide.
        prefix_tokens: As for :func:`contrast_maps`.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The mosaics and their maps.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If fewer than four tasks have images, tasks share a class, no site has
            positions, the network is in train mode, or values are not finite.

    Example:
        >>> from nad_attr.sites import GateSite
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Identity(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        ... ).eval()
        >>> site = GateSite("0", 4, 1)
        >>> archs = [SubArchitecture.from_kept({"0": [k]}, [site], task=k) for k in range(4)]
        >>> images = torch.eye(4)[..., None, None].expand(-1, -1, 8, 8)  # class k is in channel k
        >>> found = class_mosaics(net, archs, (images, torch.arange(4)), resize=False)
        >>> found.own_share()
        tensor([[1., 1., 1., 1.]])
    """
    given = named_architectures(architectures, size, least=4)
    check_count(n, "n")
    check_measure(measure)
    runner = Runner(model, run)
    source = as_source(data)
    chosen, numbers = choose(source.labels, given.tasks, n, seed)
    masks = given.masks
    kept: list[Tensor] = []
    maps: dict[str, list[Tensor]] = {}
    left_out: dict[str, str] = {}
    drawn = runner.draw(source, numbers.tolist(), "mosaics")
    for rows, inputs in zip(chosen, drawn, strict=True):
        mosaic = assemble(only_images(inputs), resize)
        kept.append(mosaic.detach().cpu())
        of_mosaic: dict[str, list[Tensor]] = {}
        for row in rows.tolist():
            others = [other for other in rows.tolist() if other != row]
            channels = {
                name: mask[row] & ~mask[others].any(0) if exclusive else mask[row]
                for name, mask in masks.items()
            }
            arch, task = given.architectures[row], given.tasks[row]
            how: Any = {"measure": measure, "prefix_tokens": prefix_tokens}
            result = evidence_maps(runner, arch, task, mosaic, channels, **how)
            left_out = result.left_out
            for name, one in result.maps.items():
                of_mosaic.setdefault(name, []).append(one[0])
        for name, four in of_mosaic.items():
            maps.setdefault(name, []).append(torch.stack(four))
    if not maps:
        raise no_positions(left_out)
    return ClassMosaics(
        images=torch.cat(kept),
        maps={name: torch.stack(parts) for name, parts in maps.items()},
        chosen=torch.from_numpy(np.ascontiguousarray(chosen)),
        numbers=torch.from_numpy(np.ascontiguousarray(numbers)),
        tasks=given.tasks,
        task_names=given.task_names,
        left_out=left_out,
        measure=measure,
    )
