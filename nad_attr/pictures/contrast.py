"""Where does an image hold what one class's sub-architecture needs and another's does not?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nad_attr.data.labels import Task
from nad_attr.data.sources import check_finite, only_images
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.pictures.evidence import (
    Measure,
    SiteMaps,
    check_measure,
    chosen_sites,
    enlarged,
    evidence_maps,
    no_positions,
)
from nad_attr.pictures.pixels import ToPixels
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunOptions
from nad_attr.stats.results import Result
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ContrastMaps", "contrast_maps"]


@dataclass(frozen=True, eq=False)
class ContrastMaps(Result):
    """Maps of images at each site, for the channels that only one of two classes keeps.

    Attributes:
        tasks: The two tasks.
        task_names: Their names.
        first: ``{site name: float32 (N, H, W)}``: channels that only the first keeps, inside its
            sub-architecture, for its output.
        second: The same for the second.
        n_only: ``{site name: (channels that only the first keeps, only the second)}``.
        left_out: ``{site name: why it has no map}``.
        image_size: Height and width of the images.
        measure: "evidence" or "presence".
    """

    tasks: tuple[Task, Task]
    task_names: tuple[str, str]
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    n_only: dict[str, tuple[int, int]]
    left_out: dict[str, str]
    image_size: tuple[int, int]
    measure: Measure

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that have maps, in forward order."""
        return tuple(self.first)

    def scaled(self, site: str | None = None) -> tuple[Tensor, Tensor]:
        """Both classes' maps at the size of the images, each site in its own unit.

        At a site, both maps of an image are divided by the largest absolute value in either.

        Args:
            site: One site, or None: the mean over all sites that have maps.

        Returns:
            Two float32 (N, H, W), values in [-1, 1].

        Raises:
            KeyError: If there is no map of that site.
        """
        pairs = []
        for name in chosen_sites(self.first, site):
            pair = torch.stack([self.first[name], self.second[name]], dim=1)
            pairs.append(enlarged(pair, self.image_size, 1, 2, 3))
        first, second = torch.stack(pairs).mean(0).unbind(1)
        return first, second

    def difference(self, site: str | None = None) -> Tensor:
        """First minus second: above zero where the image holds what only the first class needs.

        Args:
            site: One site, or None: the mean over sites.

        Returns:
            float32 (N, H, W).

        Raises:
            KeyError: If there is no map of that site.
        """
        first, second = self.scaled(site)
        return first - second

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"site": name, "only_first": n, "only_second": m}
            for name, (n, m) in self.n_only.items()
        ]

    def summary(self) -> str:
        """One line per site: channels that only one of the two keeps."""
        a, b = self.task_names
        lines = [f"only {a} / only {b} keeps, by site:"]
        lines += [f"  {name}: {n} / {m} channels" for name, (n, m) in self.n_only.items()]
        lines += [f"  {name}: no map, {why}" for name, why in self.left_out.items()]
        return "\n".join(map(shown, lines))

    def plot(
        self,
        images: Tensor,
        *,
        site: str | None = None,
        to_pixels: ToPixels | None = None,
        titles: Sequence[str] | None = None,
    ) -> Figure:
        """Draw each image, both classes' maps on it, and their difference.

        Args:
            images: The images that the maps are of, (N, C, H, W).
            site: One site, or None: the mean over sites.
            to_pixels: Undoes the network's preprocessing, see :func:`nad_attr.pictures.as_pixels`.
            titles: What to call each image.

        Returns:
            A figure with one row per image.

        Raises:
            ImportError: If matplotlib is missing.
            KeyError: If there is no map of that site.
            ValueError: If the images or titles are not as many as the maps.
        """
        from nad_attr.pictures.figures import draw_contrast

        return draw_contrast(self, images, site=site, to_pixels=to_pixels, titles=titles)


def two_architectures(
    architectures: TaskGates | Sequence[SubArchitecture],
    tasks: tuple[object, object] | None,
    size: float | None,
) -> tuple[list[SubArchitecture], tuple[str, str]]:
    """The two sub-architectures to contrast, and their names."""
    if isinstance(architectures, TaskGates):
        wanted: Sequence[object] = architectures.tasks if tasks is None else tasks
        if len(wanted) != 2:
            raise ValueError(
                f"a contrast is between two tasks, not {len(wanted)}: name them, tasks=(y, other)."
            )
        rows = [architectures.index(task) for task in wanted]
        pair = [architectures.sub_architecture(architectures.tasks[row], size) for row in rows]
        known = architectures.task_names
        names = [str(architectures.tasks[r]) if known is None else known[r] for r in rows]
    else:
        if tasks is not None or size is not None:
            raise ValueError("tasks= and size= need TaskGates.")
        pair = list(architectures)
        if len(pair) != 2 or not all(isinstance(arch, SubArchitecture) for arch in pair):
            raise TypeError("architectures must be TaskGates or two SubArchitecture.")
        names = [str(arch.task) for arch in pair]
    if pair[0].sites != pair[1].sites:
        raise ValueError("the two sub-architectures have different gate sites.")
    if any(arch.task is None for arch in pair) or pair[0].task == pair[1].task:
        raise ValueError(
            "a contrast needs sub-architectures of two different tasks; give them task=..."
        )
    return pair, (names[0], names[1])


def contrast_maps(
    model: nn.Module,
    architectures: TaskGates | Sequence[SubArchitecture],
    images: Tensor,
    tasks: tuple[object, object] | None = None,
    *,
    measure: Measure = "evidence",
    size: float | None = None,
    prefix_tokens: int | None = None,
    run: RunOptions | None = None,
) -> ContrastMaps:
    """Map where images hold what one class's sub-architecture needs and another's does not.

    At each gate site, the channels that y keeps and y' does not are summed, position by position,
    inside y's sub-architecture: with ``measure="evidence"`` as ``(a - m) * dz_y/da``, to first
    order the loss of y's output there without them (``a`` the activation, ``m`` the mean that
    replaces a closed channel, or zero); with ``"presence"`` as ``|a - m|``. The channels that only
    y' keeps are summed in the same way, for the output of y'.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: Task gates, or the two sub-architectures (y's first).
        images: (N, C, H, W).
        tasks: With task gates: y and y'. None: the two that there are.
        measure: "evidence" (signed) or "presence".
        size: Binarise task gates at this share of the channels; None: as they were learned.
        prefix_tokens: Tokens in front of those of the image at sites that hold a list of tokens.
            None: none or one, as their number says.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The maps.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        KeyError: If there are no gates of a task.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If there are not two tasks, no site has positions, the network is in train
            mode, or values are not finite.

    Example:
        >>> from nad_attr.sites import GateSite
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Identity(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        ... ).eval()
        >>> site = GateSite("0", 2, 1)
        >>> archs = [SubArchitecture.from_kept({"0": [k]}, [site], task=k) for k in range(2)]
        >>> image = torch.zeros(1, 2, 2, 2)
        >>> image[0, 0, 0, 0], image[0, 1, 1, 1] = 4.0, 8.0  # top left class 0, bottom right 1
        >>> maps = contrast_maps(net, archs, image)
        >>> maps.difference("0")[0]
        tensor([[ 0.5000,  0.0000],
                [ 0.0000, -1.0000]])
    """
    pair, names = two_architectures(architectures, tasks, size)
    check_measure(measure)
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}.")
    only_images(check_finite((images,)))
    if len(images) == 0:
        raise ValueError("there is no image to map.")
    runner = Runner(model, run, batch_size=32)
    only = [(pair[0] - pair[1]).masks, (pair[1] - pair[0]).masks]
    found: list[dict[str, list[Tensor]]] = [{}, {}]
    left_out: dict[str, str] = {}

    def mapped(arch: SubArchitecture, x: Tensor, channels: Mapping[str, Tensor]) -> SiteMaps:
        assert arch.task is not None
        options: Any = {"measure": measure, "prefix_tokens": prefix_tokens}
        return evidence_maps(runner, arch, arch.task, x, channels, **options)

    width = runner.images_per_pass((images,), lambda x: mapped(pair[0], x[0], only[0]))
    bar = runner.bar(len(images), "contrast maps")
    for part in chunks(len(images), width):
        (x,) = runner.to_device((images[part.start : part.stop],))
        bar.update(len(x))
        for arch, channels, into in zip(pair, only, found, strict=True):
            result = mapped(arch, x, channels)
            left_out = result.left_out
            for name, maps in result.maps.items():
                into.setdefault(name, []).append(maps)
    bar.close()
    if not found[0]:
        raise no_positions(left_out)
    first, second = ({name: torch.cat(parts) for name, parts in into.items()} for into in found)
    task, other = pair[0].task, pair[1].task
    assert task is not None
    assert other is not None
    height, width = images.shape[-2:]
    return ContrastMaps(
        tasks=(task, other),
        task_names=names,
        first=first,
        second=second,
        n_only={n: (int(only[0][n].sum()), int(only[1][n].sum())) for n in first},
        left_out=left_out,
        image_size=(int(height), int(width)),
        measure=measure,
    )
