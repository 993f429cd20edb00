"""CIFAR-10 photos and two trained ResNets, for benchmarks.

Nothing here is downloaded. The benchmarks look for a folder (``--shared``, by default ``../shared``
beside the repository) that holds::

    data/cifar10/{train,val}/CLASS/*.jpg    32 x 32 pixels
    models/cifar10_resnet{20,56}.pt         state dicts

Run as a program, this module measures the networks' accuracy::

    python -m benchmarks.cifar --depth 20
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

REPOSITORY = Path(__file__).resolve().parent.parent
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
# The networks were trained with the ImageNet statistics.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)


class SharedMissingError(FileNotFoundError):
    """Raised where the data or the weights that a benchmark needs are not there."""


class Block(nn.Module):
    """Two 3x3 convolutions with a shortcut that has no parameters ("option A").

    Every ReLU is a module of its own, called once, so that each of them and the block itself can
    be a gate site.

    Args:
        in_planes: channels of the input.
        planes: channels of the output; where they double, the shortcut is padded with zeros.
        stride: stride of the first convolution; 2 halves height and width.
    """

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.relu2 = nn.ReLU()
        self.planes = planes
        self.reduces = stride != 1 or in_planes != planes

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_planes, H, W) to (N, planes, H / stride, W / stride)."""
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.reduces:
            pad = self.planes // 4
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
        return self.relu2(out + x)  # type: ignore[no-any-return]


class CifarResNet(nn.Module):
    """ResNet for CIFAR (He et al. 2016, section 4.2): 6n + 2 layers, 16, 32 and 64 channels.

    Args:
        depth: 6n + 2, such as 20 or 56.
        n_classes: outputs.

    Raises:
        ValueError: if the depth is not 6n + 2.
    """

    def __init__(self, depth: int = 20, n_classes: int = 10) -> None:
        super().__init__()
        n_blocks, rest = divmod(depth - 2, 6)
        if rest or n_blocks < 1:
            raise ValueError(f"depth has to be 6n + 2 (8, 14, 20, ...), not {depth}")
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(16, 16, n_blocks)
        self.layer2 = self._stage(16, 32, n_blocks)
        self.layer3 = self._stage(32, 64, n_blocks)
        self.linear = nn.Linear(64, n_classes)

    @staticmethod
    def _stage(in_planes: int, planes: int, n_blocks: int) -> nn.Sequential:
        first = Block(in_planes, planes, stride=planes // in_planes)
        return nn.Sequential(first, *(Block(planes, planes) for _ in range(n_blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 3, 32, 32) to logits (N, n_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))  # type: ignore[no-any-return]


def site_names(depth: int = 20) -> list[str]:
    """Return the modules that the benchmarks gate: the first ReLU and every block.

    Args:
        depth: the network's depth.

    Returns:
        Module names in forward order; for depth 20, 10 sites with 352 channels.
    """
    n_blocks = (depth - 2) // 6
    return ["relu", *(f"layer{i}.{n}" for i in (1, 2, 3) for n in range(n_blocks))]


def load_resnet(depth: int, path: str | os.PathLike[str]) -> CifarResNet:
    """Load a trained network in eval mode.

    Args:
        depth: 20 or 56.
        path: the state dict's file, or the shared folder that holds
            ``models/cifar10_resnet{depth}.pt``.

    Returns:
        The network, float32, on the CPU.

    Raises:
        SharedMissingError: if there is no such file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "models" / f"cifar10_resnet{depth}.pt"
    if not path.is_file():
        raise SharedMissingError(f"no weights at {path}: say where they are with --shared")
    model = CifarResNet(depth)
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return model.eval()


def default_cache() -> Path:
    """Return the folder for decoded images, outside the repository."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "nad_attr_benchmarks"


def load_cifar10(
    root: str | os.PathLike[str], *, cache: str | os.PathLike[str] | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Load the photos as normalised tensors; classes in alphabetical order, as in CIFAR-10.

    Args:
        root: the folder that holds ``train/CLASS/*.jpg`` and ``val/CLASS/*.jpg``, or the shared
            folder that holds ``data/cifar10``.
        cache: folder for the decoded pixels, so that the JPEGs are read only once (about 70 MB);
            ``None`` for :func:`default_cache`. A change of the files' names or sizes makes a new
            cache file.

    Returns:
        Training images (N, 3, 32, 32) float32, their labels (N,) int64, held-out images, labels.

    Raises:
        SharedMissingError: if there are no such folders.
        ValueError: if the classes are not CIFAR-10's, or an image is not 32 x 32.
    """
    root = Path(root)
    if (root / "data" / "cifar10").is_dir():
        root = root / "data" / "cifar10"
    arrays: list[Tensor] = []
    for split in ("train", "val"):
        pixels, labels = _load_split(root / split, Path(cache) if cache else default_cache())
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255.0)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
        arrays += [images.sub_(mean).div_(std).contiguous(), torch.from_numpy(labels)]
    return arrays[0], arrays[1], arrays[2], arrays[3]


def _load_split(folder: Path, cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels (N, 32, 32, 3) uint8 and labels (N,) int64, from the cache if it is valid."""
    if not folder.is_dir():
        raise SharedMissingError(
            f"no CIFAR-10 photos at {folder}: say where they are with --shared"
        )
    found = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    if found != CLASSES:
        raise ValueError(f"{folder} has to hold one folder per class {CLASSES}, found {found}")
    files = [
        (label, path)
        for label, name in enumerate(CLASSES)
        for path in sorted((folder / name).glob("*.jpg"))
    ]
    listing = "\n".join(f"{label} {path.name} {path.stat().st_size}" for label, path in files)
    digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
    stored = cache / f"cifar10_{folder.name}_{digest}.npz"
    if stored.is_file():
        with np.load(stored, allow_pickle=False) as arrays:
            return arrays["pixels"], arrays["labels"]
    pixels = np.stack([_decode(path) for _, path in files])
    labels = np.array([label for label, _ in files], dtype=np.int64)
    cache.mkdir(parents=True, exist_ok=True)
    # Moved into place when whole: an interrupted run leaves no half-written cache behind.
    with tempfile.NamedTemporaryFile(dir=cache, suffix=".part", delete=False) as part:
        try:
            np.savez(part, pixels=pixels, labels=labels)
            part.close()
            os.replace(part.name, stored)
        except BaseException:
            Path(part.name).unlink(missing_ok=True)
            raise
    return pixels, labels


def _decode(path: Path) -> np.ndarray:
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    if pixels.shape != (32, 32, 3):
        raise ValueError(f"{path} is {pixels.shape[1]} x {pixels.shape[0]} pixels, not 32 x 32")
    return pixels


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 500) -> float:
    """Return the share of images (N, ...) that the model gives their label (N,)."""
    right = 0
    for start in range(0, len(labels), batch_size):
        batch = slice(start, start + batch_size)
        right += int((model(images[batch]).argmax(dim=1) == labels[batch]).sum())
    return right / len(labels)


def add_shared_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--shared`` and ``--cache``, the same for every benchmark."""
    parser.add_argument(
        "--shared",
        type=Path,
        default=REPOSITORY.parent / "shared",
        metavar="PATH",
        help="folder with data/ and models/ (default: ../shared beside the repository)",
    )
    parser.add_argument(
        "--cache",
        type=Path,
        default=None,
        metavar="PATH",
        help=f"folder for decoded images (default: {default_cache()})",
    )


def main(argv: list[str] | None = None) -> None:
    """Print the accuracy of a network on the held-out photos."""
    parser = argparse.ArgumentParser(description="Accuracy of a trained CIFAR ResNet.")
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20)
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    try:
        model = load_resnet(args.depth, args.shared)
        train_x, _, val_x, val_y = load_cifar10(args.shared, cache=args.cache)
    except SharedMissingError as missing:
        parser.exit(0, f"skipped: {missing}\n")
    share = accuracy(model, val_x, val_y)
    print(f"ResNet-{args.depth}: accuracy {share:.4f} on {len(val_y)} held-out photos", end=" ")
    print(f"({len(train_x)} training photos)")


if __name__ == "__main__":
    main()
