"""Colour concepts that are computed from the image: eleven basic colours by a rule in HSV."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nad_attr.concepts.datasets.label_maps import as_concepts
from nad_attr.concepts.unit_concepts import Concept

__all__ = ["COLOURS", "WithColours", "colour_map"]

#: The basic colour terms of English (Berlin and Kay, 1969), in the order of :func:`colour_map`.
COLOURS = tuple(
    Concept(name, "colour")
    for name in (
        *("black", "blue", "brown", "grey", "green", "orange", "pink", "purple", "red", "white"),
        "yellow",
    )
)
_NUMBER = {concept.name: i for i, concept in enumerate(COLOURS)}
#: Upper end of each hue's range in degrees.
_HUES = (
    *((20.0, "red"), (45.0, "orange"), (70.0, "yellow"), (170.0, "green"), (260.0, "blue")),
    *((310.0, "purple"), (345.0, "pink"), (360.0, "red")),
)


def colour_map(image: Tensor) -> Tensor:
    """Which of eleven basic colours each pixel has.

    A rule, not a perception model, and the same everywhere. With hue h in degrees, saturation s
    and value v in [0, 1] of HSV, the first that holds: black, v < 0.2; achromatic, s < 0.15: white
    where v > 0.8, else grey; brown, h in [10, 45) and v < 0.65; pink, h below 20 or from 310 on,
    v > 0.7 and s < 0.55; else by hue: red up to 20, orange to 45, yellow to 70, green to 170, blue
    to 260, purple to 310, pink to 345, red.

    (The colour concepts of Bau et al. 2017 come from van de Weijer's learned colour names, which
    is another assignment: the two are not to be compared number by number.)

    Args:
        image: RGB, (3, H, W); uint8, or floats in [0, 1].

    Returns:
        int64 (H, W), indices in :data:`COLOURS`.

    Raises:
        ValueError: If it is not such an image.

    Example:
        >>> image = torch.tensor([[[255, 0, 0]], [[0, 0, 128]]], dtype=torch.uint8)
        >>> image = torch.cat([image, torch.zeros(1, 1, 3, dtype=torch.uint8)])
        >>> [COLOURS[i].name for i in colour_map(image)[0].tolist()]
        ['red', 'black', 'green']
    """
    if not isinstance(image, Tensor) or image.ndim != 3 or len(image) != 3:
        shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"a colour image has shape (3, H, W), not {shape}.")
    rgb = image.detach().cpu().double()
    if not image.is_floating_point():
        rgb = rgb / 255
    elif rgb.numel() and not (float(rgb.min()) >= 0 and float(rgb.max()) <= 1):
        raise ValueError(
            "colours need RGB in [0, 1] or uint8, got values outside; give the image from "
            "before the normalisation."
        )
    value = rgb.amax(0)
    span = value - rgb.amin(0)
    red, green, blue = rgb
    safe = span.clamp(min=1e-12)
    sector = torch.where(
        value == red,
        (green - blue) / safe % 6,
        torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4),
    )
    hue = 60 * sector
    saturation = span / value.clamp(min=1e-12)
    found = torch.full(value.shape, _NUMBER["red"], device="cpu")
    for end, name in reversed(_HUES):
        found[hue < end] = _NUMBER[name]
    pale = ((hue < 20) | (hue >= 310)) & (value > 0.7) & (saturation < 0.55)
    found[pale] = _NUMBER["pink"]
    found[(hue >= 10) & (hue < 45) & (value < 0.65)] = _NUMBER["brown"]
    grey = saturation < 0.15
    found[grey] = _NUMBER["grey"]
    found[grey & (value > 0.8)] = _NUMBER["white"]
    found[value < 0.2] = _NUMBER["black"]
    return found


class WithColours:
    """A dataset of (image, labels) with a map of colours added to the labels.

    Args:
        dataset: With ``concepts``.
        mean: What was subtracted from each channel of RGB in [0, 1]; the colours need it undone.
        std: What it was divided by then.

    Attributes:
        concepts: The dataset's, then the eleven of :data:`COLOURS`.

    Example:
        >>> class Red:
        ...     concepts = [Concept("nothing", "object")]
        ...     __len__ = lambda self: 1
        ...     __getitem__ = lambda self, i: (torch.tensor([1.0, 0, 0]).reshape(3, 1, 1), -1)
        >>> data = WithColours(Red())
        >>> [data.concepts[int(part)].name for part in data[0][1][1:]]
        ['red']
    """

    def __init__(
        self,
        dataset: Any,
        *,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
    ) -> None:
        self.dataset = dataset
        self._first = as_concepts(getattr(dataset, "concepts", None), "the dataset's concepts")
        self.concepts = (*self._first, *COLOURS)
        self._mean, self._std = (
            torch.tensor(v, device="cpu").reshape(3, 1, 1) for v in (mean, std)
        )

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> tuple[Tensor, list[Any]]:
        """The image, and its labels with a map of colours of the same size."""
        image, labels = self.dataset[i]
        parts = list(labels) if isinstance(labels, (list, tuple)) else [labels]
        rgb = (image.float() * self._std + self._mean).clamp(0, 1)
        size = next((tuple(p.shape[-2:]) for p in parts if getattr(p, "ndim", 0) >= 2), None)
        if size is not None and size != tuple(rgb.shape[1:]):
            rgb = F.interpolate(
                rgb[None], size, mode="bilinear", antialias=True, align_corners=False
            )[0].clamp(0, 1)
        return image, [*parts, colour_map(rgb) + len(self._first)]
