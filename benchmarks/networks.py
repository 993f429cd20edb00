"""Small networks of the paper's four kinds, trained here and cached.

    python -m benchmarks.networks                      # trains what is missing, prints accuracies
    python -m benchmarks.networks --only vgg/cifar10

Plain (VGG), residual (ResNet-14, and the given ResNet-20 and ResNet-56), dense (DenseNet) and
searched cells (DARTS_V2 genotype). All read 3 x 32 x 32 images, with ``stride=2`` in the stem
3 x 64 x 64 ones. Training is seeded; the weights go to the cache folder, not into the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import lite0_data
from benchmarks.cifar import (
    Block,
    SharedMissingError,
    accuracy,
    add_shared_arguments,
    default_cache,
    load_resnet,
)
from benchmarks.darts import DARTS_V2, Cell
from benchmarks.image_data import ImageData, load_images, per_class


def _conv(n_in: int, n_out: int, stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(n_out),
        nn.ReLU(),
    ]


class SmallVGG(nn.Module):
    """Plain: five convolutions of 64 to 256 channels, pooled in between."""

    def __init__(self, n_classes: int = 10, stride: int = 1) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_conv(3, 64, stride),
            nn.MaxPool2d(2),
            *_conv(64, 64),
            nn.MaxPool2d(2),
            *_conv(64, 128),
            *_conv(128, 128),
            nn.MaxPool2d(2),
            *_conv(128, 256),
        )
        self.classifier = nn.Linear(256, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, n_classes)."""
        return self.classifier(self.features(x).mean((2, 3)))


class ResNet14(nn.Module):
    """Residual: six blocks of 32 to 128 channels, shortcuts without parameters."""

    def __init__(self, n_classes: int = 10, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(*_conv(3, 32, 2 * stride))
        widths = (32, 32, 64, 64, 128, 128)
        before = (32, *widths[:-1])
        self.blocks = nn.Sequential(
            *(Block(a, b, stride=b // a) for a, b in zip(before, widths, strict=True))
        )
        self.classifier = nn.Linear(128, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, n_classes)."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class DenseLayer(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution, whose output joins its input."""

    def __init__(self, n_in: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(n_in)
        self.relu = nn.ReLU()
        self.conv = nn.Conv2d(n_in, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_in + growth, H, W)."""
        return torch.cat([x, self.conv(self.relu(self.norm(x)))], 1)


class SmallDenseNet(nn.Module):
    """Dense: three blocks of four layers, 16 channels added by each."""

    def __init__(self, n_classes: int = 10, stride: int = 1, growth: int = 16) -> None:
        super().__init__()
        n = 2 * growth
        self.stem = nn.Sequential(*_conv(3, n, 2 * stride))
        self.blocks = nn.ModuleList()
        self.transitions = nn.ModuleList()
        for i in range(3):
            self.blocks.append(
                nn.Sequential(*(DenseLayer(n + growth * j, growth) for j in range(4)))
            )
            n += 4 * growth
            last: list[nn.Module] = [nn.BatchNorm2d(n), nn.ReLU()]
            if i < 2:
                last += [nn.Conv2d(n, n // 2, 1, bias=False), nn.AvgPool2d(2)]
                n //= 2
            self.transitions.append(nn.Sequential(*last))
        self.classifier = nn.Linear(n, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, n_classes)."""
        x = self.stem(x)
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            x = transition(block(x))
        return self.classifier(x.mean((2, 3)))


class SmallDARTS(nn.Module):
    """Searched cells: five cells of the DARTS_V2 genotype, two of which halve the resolution."""

    def __init__(self, n_classes: int = 10, stride: int = 1, channels: int = 16) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 2 * channels, 3, stride=2 * stride, padding=1, bias=False),
            nn.BatchNorm2d(2 * channels),
        )
        self.cells = nn.ModuleList()
        before = last = 2 * channels
        n, reduced = channels, False
        for i in range(5):
            reduction = i in (1, 3)
            n = 2 * n if reduction else n
            cell = Cell(DARTS_V2, before, last, n, reduction=reduction, last_reduced=reduced)
            self.cells.append(cell)
            before, last, reduced = last, cell.n_out * n, reduction
        self.classifier = nn.Linear(last, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, n_classes)."""
        before = last = self.stem(x)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.classifier(last.mean((2, 3)))


#: name -> (kind of connections, network)
NETWORKS: dict[str, tuple[str, Callable[..., nn.Module]]] = {
    "vgg": ("plain", SmallVGG),
    "resnet14": ("residual", ResNet14),
    "densenet": ("dense", SmallDenseNet),
    "darts": ("cells", SmallDARTS),
}
GIVEN = {"resnet20": 20, "resnet56": 56}
#: Passes over the training images.
EPOCHS = {"cifar10": 8, "scene15": 40, "fashion": 2}
#: A pair that anybody has, and two large networks with weights from a package.
DIGITS = "cnn/digits"
REAL = ("lite0/superclasses", "lite2/superclasses")
#: In the order in which the benchmarks run them.
PAIRS = (
    "resnet14/scene15",
    "vgg/cifar10",
    "resnet20/cifar10",
    "densenet/cifar10",
    "darts/scene15",
    "resnet14/cifar10",
    "vgg/scene15",
    "densenet/scene15",
    "vgg/fashion",
    "resnet14/fashion",
    "darts/cifar10",
    "resnet56/cifar10",
)


def kind_of(network: str) -> str:
    """The kind of connections: plain, residual, dense or cells."""
    return "residual" if network in GIVEN else NETWORKS[network][0]


def _augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Half of them mirrored, the whole batch shifted by up to an eighth of its width."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None], images.flip(3), images)
    pixels = images.shape[-1]
    room = pixels // 8
    padded = F.pad(images, (room,) * 4, mode="reflect")
    parts = []
    for part in padded.chunk(4):
        top, left = torch.randint(2 * room + 1, (2,), generator=generator).tolist()
        parts.append(part[:, :, top : top + pixels, left : left + pixels])
    return torch.cat(parts)


def train(model: nn.Module, data: ImageData, epochs: int, *, seed: int = 0) -> nn.Module:
    """SGD with one cycle of the learning rate, in bfloat16 where that is faster."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.train
    batch = 64 if len(y) < 5_000 else 128
    steps = epochs * (len(y) // batch)
    optimiser = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 0.1, total_steps=steps, pct_start=0.2)
    model.to(memory_format=torch.channels_last).train()
    for _ in range(epochs):
        order = torch.randperm(len(y), generator=generator)
        for i in range(len(y) // batch):
            chosen = order[i * batch : (i + 1) * batch]
            with torch.autocast("cpu", torch.bfloat16):
                outputs = model(_augmented(x[chosen], generator))
            loss = F.cross_entropy(outputs.float(), y[chosen], label_smoothing=0.05)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    return model.eval()


def digits_network(data: ImageData) -> nn.Module:
    """224 channels at four sites for the digits, trained now, in seconds."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for n_in, n_out in ((1, 32), (32, 64), (64, 64), (64, 64)):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if n_out == 64 and n_in == 32 else []
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            for at in torch.randperm(1000).split(50):
                optimiser.zero_grad()
                F.cross_entropy(model(data.train[0][at]), data.train[1][at]).backward()
                optimiser.step()
    return model.eval()


def load_network(
    pair: str, data: ImageData, shared: Path, *, cache: Path | None = None, seed: int = 0
) -> nn.Module:
    """A trained network in eval mode: from the cache, or trained now.

    Args:
        pair: "NETWORK/SET", such as "vgg/cifar10".
        data: The set.
        shared: Folder with the given ResNets.
        cache: Folder for the weights.
        seed: Of weights and order of training.
    """
    name, _, set_name = pair.partition("/")
    if pair == DIGITS:
        return digits_network(data)
    if name in GIVEN:
        return load_resnet(GIVEN[name], shared)
    if pair in REAL:
        return lite0_data.network(name)
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}; there are {', '.join((*NETWORKS, *GIVEN))}.")
    build = NETWORKS[name][1]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = build(len(data.classes), stride=data.pixels // 32)
    epochs = EPOCHS[set_name]
    # Another way of training, or another network, is another file.
    source = inspect.getsource(build) + inspect.getsource(train) + str(epochs)
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    path = (cache or default_cache()) / f"{name}_{set_name}_{seed}_{digest}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()
    start = time.perf_counter()
    train(model, data, epochs, seed=seed)
    model.to(memory_format=torch.contiguous_format)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(f".{os.getpid()}.part")
    torch.save(model.state_dict(), part)
    os.replace(part, path)
    print(f"trained {pair} in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return model


def small_pair(
    pair: str, shared: Path, *, cache: Path | None = None, n: int = 160, n_held_out: int = 60
) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A network, some images of each class to learn from, and some to judge by.

    Args:
        pair: See :func:`load_network`; or "digits/digits", trained now.
        shared: See there.
        cache: See there.
        n: Images of a class to learn from, at most.
        n_held_out: Images of a class to judge by, at most.
    """
    if pair == "digits/digits":
        from benchmarks.constants_study import digits

        return digits()
    data = load_images(pair.partition("/")[2], shared, cache=cache)
    model = load_network(pair, data, shared, cache=cache)
    return model, per_class(data.train, n, 0), per_class(data.held_out, n_held_out, 0)


def main(argv: list[str] | None = None) -> None:
    """Trains what is missing and prints each network's sites and accuracy."""
    from nad_attr import find_gate_sites

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seed", type=int, default=0)
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    for pair in args.only:
        try:
            data = load_images(pair.partition("/")[2], args.shared, cache=args.cache)
            model = load_network(pair, data, args.shared, cache=args.cache, seed=args.seed)
        except SharedMissingError as missing:
            print(f"{pair}: skipped: {missing}")
            continue
        sites = find_gate_sites(model, data.train[0][:1])
        x, y = (part[:: max(1, len(data.held_out[1]) // 1000)] for part in data.held_out)
        print(
            f"{pair}: accuracy {accuracy(model, x, y):.3f} on {len(y)} held-out images, "
            f"{len(sites)} sites, {sum(s.n_channels for s in sites)} channels",
            flush=True,
        )


if __name__ == "__main__":
    main()
