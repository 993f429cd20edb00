"""EfficientNet-Lite0 with super-classes: photos of even classes to learn from, odd to judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar import default_cache
from nad_attr.examples.demo import Photo, center_crops, load_lite0

#: Class indices of ImageNet-1k.
GROUPS = {
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "dog": tuple(range(151, 269)),
    "reptile": tuple(range(33, 69)),
    "insect": tuple(range(300, 327)),
    "food": tuple(range(924, 970)),
}


Images = tuple[Tensor, Tensor]


def load(shared: Path, size: int = 128) -> tuple[nn.Module, Images, Images, list[tuple[int, ...]]]:
    """The network, images to learn from and to judge by with ImageNet's labels, and the tasks."""
    cached = default_cache() / f"imagenet_sample_{size}.pt"
    if not cached.is_file():
        from PIL import Image

        photos = []
        for k, folder in enumerate(sorted((shared / "data" / "imagenet-sample").iterdir())):
            with Image.open(next(iter(folder.glob("*.jpg")))) as file:
                pixels = np.array(file.convert("RGB"))
            photos.append(Photo(folder.name, k, torch.from_numpy(pixels).permute(2, 0, 1)))
        images = torch.cat([center_crops([photo], size=size)[0] for photo in photos])
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(images.half(), cached)
    images = torch.load(cached).float().contiguous(memory_format=torch.channels_last)
    labels = torch.arange(1000)
    model: nn.Module = load_lite0()
    return model, (images[0::2], labels[0::2]), (images[1::2], labels[1::2]), list(GROUPS.values())
