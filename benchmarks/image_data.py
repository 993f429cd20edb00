"""Labelled images for the benchmarks, as tensors: CIFAR-10, 15-Scene, Fashion-MNIST, digits.

Nothing is downloaded; a set that is not on the machine raises :class:`SharedMissingError`, which
says where it was looked for::

    cifar10   SHARED/data/cifar10/{train,val}/CLASS/*.jpg   objects, 32 x 32, ten classes
    scene15   SHARED/data/scene15/{train,val}/CLASS/*.jpg   scenes, grey, here 64 x 64, 15 classes
    fashion   /usr/share/datasets/fashion-mnist/*.gz        clothes, grey, here 32 x 32, ten classes
              (Debian package dataset-fashion-mnist)
    digits    scikit-learn's                                1,797 digits of 8 x 8, one channel
"""

from __future__ import annotations

import gzip
import os
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import lite0_data
from benchmarks.cifar import CLASSES, SharedMissingError, default_cache, load_cifar10

FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    *("T-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
SCENE_PIXELS = 64


@dataclass(frozen=True)
class ImageData:
    """A training and a held-out set.

    Attributes:
        name: Of the set.
        classes: Class names.
        train: Images float32 (N, 3, H, W), normalised, and labels int64 (N,).
        held_out: The same.
        tasks: Groups of classes, where these are the tasks.
    """

    name: str
    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    tasks: tuple[tuple[int, ...], ...] = ()

    @property
    def pixels(self) -> int:
        """Height and width."""
        return self.train[0].shape[-1]


def load_images(name: str, shared: Path, *, cache: Path | None = None) -> ImageData:
    """Load a set by name: "cifar10", "scene15", "fashion", "digits" or "superclasses".

    Raises:
        SharedMissingError: If it is not there.
        ValueError: If there is no such set.
    """
    if name == "cifar10":
        x, y, val_x, val_y = load_cifar10(shared, cache=cache)
        return ImageData(name, CLASSES, (x, y), (val_x, val_y))
    if name == "scene15":
        root = shared / "data" / "scene15"
        classes, train = _grey_folder(root / "train", cache or default_cache())
        _, held_out = _grey_folder(root / "val", cache or default_cache())
        return ImageData(name, classes, train, held_out)
    if name == "fashion":
        return ImageData(name, FASHION_CLASSES, _idx("train"), _idx("t10k"))
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, y = load_digits(return_X_y=True)
        x, labels = (
            torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16,
            torch.tensor(y),
        )
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        learned, held = ((x[at], labels[at]) for at in (order[:1000], order[1000:]))
        return ImageData(name, tuple(map(str, range(10))), learned, held)
    if name == "superclasses":
        groups = tuple(lite0_data.GROUPS.values())
        return ImageData(name, tuple(map(str, range(1000))), *lite0_data.photos(shared), groups)
    raise ValueError(
        f"no set {name!r}; there are cifar10, scene15, fashion, digits and superclasses."
    )


def per_class(images: tuple[Tensor, Tensor], n: int, seed: int) -> tuple[Tensor, Tensor]:
    """At most ``n`` images of each class, drawn by seed."""
    x, y = images
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == k][:n] for k in range(int(y.max()) + 1)])
    return x[chosen], y[chosen]


def _normalised(pixels: np.ndarray) -> Tensor:
    """Grey bytes (N, H, W) -> float32 (N, 3, H, W) with mean about 0 and deviation about 1."""
    images = torch.from_numpy(pixels).float().div_(255.0).sub_(0.45).div_(0.27)
    return images[:, None].expand(-1, 3, -1, -1).contiguous()


def _grey_folder(folder: Path, cache: Path) -> tuple[tuple[str, ...], tuple[Tensor, Tensor]]:
    if not folder.is_dir():
        raise SharedMissingError(f"no scenes at {folder}: say where they are with --shared")
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    files = [(k, p) for k, name in enumerate(classes) for p in sorted((folder / name).glob("*"))]
    stored = cache / f"scene15_{folder.name}_{SCENE_PIXELS}_{len(files)}.npz"
    if not stored.is_file():
        arrays = {
            "pixels": np.stack([_scene(path) for _, path in files]),
            "labels": np.array([k for k, _ in files], dtype=np.int64),
        }
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as part:
            np.savez(part, **arrays)
        os.replace(part.name, stored)
    with np.load(stored, allow_pickle=False) as known:
        return classes, (_normalised(known["pixels"]), torch.from_numpy(known["labels"]))


def _scene(path: Path) -> np.ndarray:
    """The middle square of a photo."""
    from PIL import Image, ImageOps

    with Image.open(path) as image:
        square = ImageOps.fit(image.convert("L"), (SCENE_PIXELS, SCENE_PIXELS))
        return np.asarray(square)


def _idx(split: str) -> tuple[Tensor, Tensor]:
    if not FASHION.is_dir():
        raise SharedMissingError(
            f"no Fashion-MNIST at {FASHION}: install the Debian package dataset-fashion-mnist"
        )
    with gzip.open(FASHION / f"{split}-images-idx3-ubyte.gz") as file:
        _, n, height, width = struct.unpack(">4I", file.read(16))
        pixels = np.frombuffer(file.read(), np.uint8).reshape(n, height, width)
    with gzip.open(FASHION / f"{split}-labels-idx1-ubyte.gz") as file:
        file.read(8)
        labels = np.frombuffer(file.read(), np.uint8).astype(np.int64)
    padded = np.pad(pixels, ((0, 0), (2, 2), (2, 2)))
    return _normalised(padded), torch.from_numpy(labels)
