"""Pictures in a page: small, as data URIs, each once."""

from __future__ import annotations

import base64
import io
import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nad_attr.data.sources import Source
from nad_attr.system.rng import seed_of

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Album", "array_picture", "encoded", "is_picture", "tensor_picture"]

#: Pixels of the longer side.
SIDE = 72
_URI = re.compile(r"data:image/(jpeg|png);base64,[A-Za-z0-9+/]+={0,2}")


def is_picture(text: object) -> bool:
    """Whether a text is a picture that a page may show: JPEG or PNG, inside the text itself.

    Example:
        >>> is_picture("data:image/png;base64,AAAA"), is_picture("https://example.org/x.png")
        (True, False)
    """
    return isinstance(text, str) and _URI.fullmatch(text) is not None


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("pictures need Pillow: pip install 'nad-attr[report]'") from error
    return Image


def tensor_picture(value: Tensor, low: float, high: float) -> Image:
    """A picture of an input tensor (C, H, W); values from ``low`` to ``high`` become 0 to 255.

    Raises:
        ValueError: If it is not an image.

    Example:
        >>> tensor_picture(torch.ones(3, 2, 4), 0.0, 1.0).size
        (4, 2)
    """
    if value.ndim != 3 or value.shape[0] not in (1, 3):
        raise ValueError(f"an image has shape (1 or 3, H, W), not {tuple(value.shape)}.")
    scaled = (value.detach().cpu().double() - low) / max(high - low, 1e-12)
    pixels = (scaled.clamp(0, 1) * 255).round().to(torch.uint8).expand(3, -1, -1)
    image: Image = _pillow().fromarray(pixels.permute(1, 2, 0).contiguous().numpy())
    return image


def encoded(picture: Image, side: int, *, grow: bool = False) -> str:
    """A picture as a data URI, with at most ``side`` pixels on its longer side; grown to it."""
    picture = picture.convert("RGB")
    if grow and max(picture.size) < side:
        ratio = side / max(picture.size)
        picture = picture.resize((round(picture.width * ratio), round(picture.height * ratio)))
    picture.thumbnail((side, side))
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def array_picture(pixels: NDArray[np.float64]) -> Image:
    """A picture of numbers (H, W, 3) in [0, 1].

    Example:
        >>> array_picture(np.ones((2, 4, 3))).size
        (4, 2)
    """
    image: Image = _pillow().fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))
    return image


class Album:
    """The pictures of a page, numbered in the order of their first use, ``side`` pixels at most.

    They are files if the source has files, else input tensors in the range of a sample of them.
    """

    def __init__(self, source: Source, side: int = SIDE) -> None:
        self._source, self._side = source, side
        self._numbers: dict[int, int] = {}
        self._range: tuple[float, float] | None = None
        self.pictures: list[str] = []

    def add(self, image: int) -> int:
        """The number in this album of an image of the source."""
        if image not in self._numbers:
            self._numbers[image] = len(self.pictures)
            self.pictures.append(self._encoded(image))
        return self._numbers[image]

    def _encoded(self, image: int) -> str:
        from nad_attr.data.images import ImageFolderData, read_image

        data = getattr(self._source, "dataset", None)
        if isinstance(data, ImageFolderData):
            numbers: Any = getattr(self._source, "numbers", range(len(data)))
            with suppress(ValueError):  # another image took its place
                return encoded(read_image(data.path(numbers[image])), self._side)
        return encoded(self.of_tensor(image), self._side)

    def _input(self, image: int) -> Tensor:
        draw = [[(image, seed_of("report", image))]]
        (inputs,) = self._source.batches(draw)
        return inputs[0][0]

    def of_tensor(self, image: int) -> Image:
        """The picture of an image as the network gets it."""
        value = self._input(image)
        if self._range is None:
            n = len(self._source.labels)
            some = np.unique(np.linspace(0, n - 1, min(n, 32)).astype(int)).tolist()
            values = torch.cat([self._input(i).detach().cpu().flatten() for i in some]).double()
            low, high = float(values.min()), float(values.max())
            self._range = (0.0, 1.0) if low >= 0 and high <= 1 else (low, high)
        return tensor_picture(value, *self._range)
