"""Figures of contrasts, mosaics coloured by class, and top images; need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr.data.sources import Data
from nad_attr.pictures.pixels import ToPixels, as_pixels
from nad_attr.plots.style import INK, LABEL_SIZE, PALETTE, TICK_SIZE, TITLE_SIZE, new_figure
from nad_attr.running.options import RunOptions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from nad_attr.pictures.class_mosaics import ClassMosaics
    from nad_attr.pictures.contrast import ContrastMaps
    from nad_attr.pictures.top_images import TopImages

__all__ = [
    "coloured_by_class",
    "draw_class_mosaics",
    "draw_contrast",
    "draw_heat_maps",
    "draw_top_images",
]

#: Inches of a picture's side.
SIDE = 1.75
#: Share of the picture under a map.
UNDER = 0.35


def _rgb(images: Tensor, to_pixels: ToPixels | None) -> NDArray[np.float64]:
    """(N, H, W, 3) in [0, 1]."""
    return as_pixels(images, to_pixels).permute(0, 2, 3, 1).numpy().astype(np.float64) / 255


def _grey(rgb: NDArray[np.float64]) -> NDArray[np.float64]:
    """Light grey pictures (..., H, W, 3), on which colours stand out."""
    light = rgb @ np.array([0.299, 0.587, 0.114])
    return np.repeat((1 - UNDER + UNDER * light)[..., None], 3, axis=-1)


def _picture(axis: Axes, rgb: Any, title: str | None = None, **look: Any) -> Any:
    shown = axis.imshow(rgb, **look)
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)
    if title is not None:
        axis.set_title(title, fontsize=LABEL_SIZE, color=INK)
    return shown


def _tinted(
    grey: NDArray[np.float64], strength: NDArray[np.float64], colour: str
) -> NDArray[np.float64]:
    """A grey picture with a colour on it, the stronger the more: (H, W, 3)."""
    from matplotlib.colors import to_rgb

    share = np.clip(strength, 0, 1)[..., None]
    mixed: NDArray[np.float64] = grey * (1 - share) + np.array(to_rgb(colour)) * share
    return mixed


def _row_label(axis: Axes, text: str) -> None:
    axis.set_ylabel(text, fontsize=LABEL_SIZE, color=INK)


def _check_titles(titles: Sequence[str] | None, n: int) -> Sequence[str]:
    if titles is None:
        return [""] * n
    if isinstance(titles, str) or len(titles) != n:
        raise ValueError(f"titles must be {n} texts, one for each image.")
    return titles


def _of_title(site: str | None, sites: Sequence[str]) -> str:
    if site is None and len(sites) > 1:
        return f"mean over {len(sites)} sites"
    return f"at {sites[0] if site is None else site}"


def draw_contrast(
    maps: ContrastMaps,
    images: Tensor,
    *,
    site: str | None = None,
    to_pixels: ToPixels | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """See :meth:`nad_attr.pictures.ContrastMaps.plot`."""
    first, second = maps.scaled(site)
    if len(images) != len(first):
        raise ValueError(f"{len(images)} images were given for the maps of {len(first)}.")
    names = _check_titles(titles, len(images))
    rgb = _rgb(images, to_pixels)
    grey = _grey(rgb)
    a, b = maps.task_names
    ratio = maps.image_size[0] / maps.image_size[1]
    figure, axes = new_figure(
        len(images), 4, panel=(SIDE + 0.15, SIDE * ratio + 0.05), extra=(0.5, 0.75)
    )
    blue, red = PALETTE[0], PALETTE[1]
    for i, row in enumerate(axes):
        top = i == 0
        limit = float(max(first[i].abs().max(), second[i].abs().max()))
        limit = limit if limit > 0 else 1.0
        _picture(row[0], rgb[i], "image" if top else None)
        _row_label(row[0], names[i])
        for axis, values, colour, name in (
            (row[1], first, blue, f"only {a} keeps"),
            (row[2], second, red, f"only {b} keeps"),
        ):
            strength = values[i].clamp_min(0).numpy() / limit
            _picture(axis, _tinted(grey[i], strength, colour), name if top else None)
        difference = (first[i] - second[i]).numpy() / limit
        mixed = _tinted(grey[i], np.clip(difference, 0, 1), blue)
        mixed = _tinted(mixed, np.clip(-difference, 0, 1), red)
        _picture(row[3], mixed, "difference" if top else None)
    what = "evidence for its class" if maps.measure == "evidence" else "presence"
    figure.suptitle(
        f"{a} (blue) against {b} (orange): {what}, {_of_title(site, maps.sites)}",
        fontsize=TITLE_SIZE,
        color=INK,
    )
    return figure


def coloured_by_class(
    found: ClassMosaics, *, site: str | None = None, to_pixels: ToPixels | None = None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mosaics as pictures, and coloured: (M, H, W, 3) in [0, 1] each.

    Each position has the colour of the class with the most evidence there.
    """
    colours = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in PALETTE[:4]])
    rgb = _rgb(found.images, to_pixels)
    strengths = found.strengths(site).numpy()
    winner, strength = strengths.argmax(1), strengths.max(1)
    largest = strength.max((1, 2), keepdims=True)
    weight = (strength / np.where(largest > 0, largest, 1.0))[..., None]
    return rgb, _grey(rgb) * (1 - weight) + colours[winner] / 255 * weight


def draw_class_mosaics(
    found: ClassMosaics, *, site: str | None = None, to_pixels: ToPixels | None = None
) -> Figure:
    """See :meth:`nad_attr.pictures.ClassMosaics.plot`."""
    from matplotlib.patches import Rectangle

    shares = found.own_share(site)
    rgb, coloured = coloured_by_class(found, site=site, to_pixels=to_pixels)
    height, width = rgb.shape[1:3]
    side = 2.6
    figure, axes = new_figure(
        len(rgb), 2, panel=(side + 0.1, side * height / width + 0.3), extra=(1.9, 0.4)
    )
    for i, row in enumerate(axes):
        _picture(row[0], rgb[i], "mosaic" if i == 0 else None)
        _picture(row[1], coloured[i], "coloured by class" if i == 0 else None)
        for axis in row:
            for q in range(4):
                corner = ((q % 2) * width / 2 - 0.5, (q // 2) * height / 2 - 0.5)
                thick = 0.014 * width
                axis.add_patch(
                    Rectangle(
                        (corner[0] + thick / 2, corner[1] + thick / 2),
                        width / 2 - thick,
                        height / 2 - thick,
                        fill=False,
                        edgecolor=PALETTE[q],
                        linewidth=2.2,
                    )
                )
        handles = [Rectangle((0, 0), 1, 1, color=PALETTE[q]) for q in range(4)]
        names = [found.task_names[task] for task in found.chosen[i].tolist()]
        texts = [
            f"{name}\n{share:.2f} in its quadrant"
            for name, share in zip(names, shares[i].tolist(), strict=True)
        ]
        legend = row[1].legend(
            handles,
            texts,
            loc="center left",
            bbox_to_anchor=(1.03, 0.5),
            frameon=False,
            fontsize=TICK_SIZE,
            handlelength=1.0,
            handleheight=1.0,
            labelspacing=1.2,
        )
        for text in legend.get_texts():
            text.set_color(INK)
    figure.suptitle(
        f"class with the most evidence, {_of_title(site, found.sites)}; chance: 0.25",
        fontsize=TITLE_SIZE,
        color=INK,
    )
    return figure


def _window(
    position: Sequence[int], grid: tuple[int, int], size: tuple[int, int], crop: float
) -> tuple[slice, slice]:
    """The square around a position of a grid, moved into the image where it would leave it."""
    side = max(1, round(crop * min(size)))
    places = []
    for at, cells, pixels in zip(position, grid, size, strict=True):
        middle = (at + 0.5) / cells * pixels
        start = min(max(0, round(middle - side / 2)), pixels - side)
        places.append(slice(start, start + side))
    return places[0], places[1]


def draw_top_images(
    model: nn.Module,
    found: TopImages,
    data: Data,
    *,
    site: str | None = None,
    channels: Sequence[int] | None = None,
    n_images: int | None = None,
    crop: float | None = None,
    threshold: float = 0.5,
    to_pixels: ToPixels | None = None,
    run: RunOptions | None = None,
) -> Figure:
    """See :meth:`nad_attr.pictures.TopImages.plot`."""
    for name, share in (("crop", 1.0 if crop is None else crop), ("threshold", threshold)):
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise ValueError(f"{name} must be a share in (0, 1], got {share!r}.")
    if site is None:
        if not found.grids:
            raise ValueError("no site that was looked at has positions.")
        site = list(found.grids)[-1]
    shown = found.most_selective(site, 6) if channels is None else list(channels)
    pictures = [found.maps(model, site, channel, data, run=run) for channel in shown]
    k = found.images[site].shape[1] if n_images is None else n_images
    columns = max(1, min(k, max(len(maps) for _, maps in pictures)))
    side = 1.15
    figure, axes = new_figure(
        len(shown), columns, panel=(side + 0.05, side + 0.05), extra=(0.75, 0.35)
    )
    for row, channel, (images, maps) in zip(axes, shown, pictures, strict=True):
        at = found.row(site, channel)
        rgb = _rgb(images, to_pixels)
        size = (images.shape[-2], images.shape[-1])
        large = F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]
        for i, axis in enumerate(row):
            if i >= len(rgb):
                axis.set_axis_off()
                continue
            highest = float(maps[i].max())
            mask = (large[i] > threshold * highest) & (highest > 0)
            picture = np.where(mask.numpy()[..., None], rgb[i], 0.75 + 0.25 * _grey(rgb[i]))
            if crop is not None:
                position = found.positions[site][at, i].tolist()
                rows, cols = _window(position, found.grids[site], size, crop)
                picture = picture[rows, cols]
            _picture(axis, picture)
        selectivity = float(found.selectivity[site][at])
        note = "" if np.isnan(selectivity) else f"\n({selectivity:+.1f} sd)"
        _row_label(row[0], f"{channel}{note}")
    task = found.architecture.task
    whose = "" if task is None else f" kept for task {task}"
    figure.suptitle(
        f"channels of {site}{whose}: images that drive them most", fontsize=TITLE_SIZE, color=INK
    )
    return figure


def draw_heat_maps(
    images: Tensor,
    columns: dict[str, Tensor],
    *,
    to_pixels: ToPixels | None = None,
    titles: Sequence[str] | None = None,
) -> Figure:
    """Draw heat-maps of the same images beside each other, each in its own unit.

    Full colour is the 99.5 % quantile of a heat-map's absolute values.

    Args:
        images: (N, C, H, W).
        columns: ``{title: heat-maps (N, C or 1, H, W)}``; colours are summed.
        to_pixels: Undoes the network's preprocessing, see :func:`nad_attr.pictures.as_pixels`.
        titles: A title for each image.

    Returns:
        A figure with one row per image: the image, then one column for each entry.

    Raises:
        ImportError: If matplotlib is missing.
        ValueError: If there are not as many heat-maps or titles as images.

    Example:
        >>> images = torch.zeros(2, 3, 4, 4)
        >>> figure = draw_heat_maps(images, {"gradient x input": torch.ones(2, 1, 4, 4)})
        >>> len(figure.axes)
        4
    """
    names = _check_titles(titles, len(images))
    rgb = _rgb(images, to_pixels)
    height, width = rgb.shape[1:3]
    figure, axes = new_figure(
        len(rgb),
        1 + len(columns),
        panel=(SIDE + 0.1, SIDE * height / width + 0.1),
        extra=(0.4, 0.3),
    )
    for i, row in enumerate(axes):
        _picture(row[0], rgb[i], "image" if i == 0 else None)
        _row_label(row[0], names[i])
    for j, (title, maps) in enumerate(columns.items(), 1):
        if len(maps) != len(images):
            raise ValueError(
                f"{len(maps)} heat-maps {title!r} were given for {len(images)} images."
            )
        summed = maps.detach().cpu().float().sum(1)
        for i, row in enumerate(axes):
            # A few extreme pixels would hide all others.
            size = summed[i].abs().flatten()
            limit = float(torch.quantile(size, 0.995)) or float(size.max()) or 1.0
            _picture(
                row[j],
                (summed[i].numpy() / limit).clip(-1, 1),
                title if i == 0 else None,
                cmap="RdBu_r",
                vmin=-1,
                vmax=1,
            )
    return figure
