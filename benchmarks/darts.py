"""The DARTS_V2 ImageNet network, with module names that ``paper_sites("darts")`` refers to.

Source: Liu, Simonyan and Yang, "DARTS: Differentiable Architecture Search", ICLR 2019 (arXiv
1806.09055); the genotype is the second-order one of that paper. Names and shapes of the parameters
are those of the authors' released ImageNet model, so that its state dict can be loaded.

    python -m benchmarks.darts    # counts parameters, sites and channels
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nad_attr.sites.finding import find_gate_sites, paper_sites


class Genotype(NamedTuple):
    """A pair of searched cells.

    Attributes:
        normal: Two (operation, input) pairs for each inner tensor of a normal cell. Input 0 and 1
            are the outputs of the two preceding cells, input 2 is the first inner tensor.
        normal_concat: The tensors that a normal cell concatenates.
        reduce: The same of a reduction cell, in which operations on input 0 and 1 have stride 2.
        reduce_concat: The same of a reduction cell.
    """

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


DARTS_V2 = Genotype(
    normal=(
        *(("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        *(("sep_conv_3x3", 0), ("sep_conv_3x3", 1)),
        *(("sep_conv_3x3", 1), ("skip_connect", 0)),
        *(("skip_connect", 0), ("dil_conv_3x3", 2)),
    ),
    normal_concat=(2, 3, 4, 5),
    reduce=(
        *(("max_pool_3x3", 0), ("max_pool_3x3", 1)),
        *(("skip_connect", 2), ("max_pool_3x3", 1)),
        *(("max_pool_3x3", 0), ("skip_connect", 2)),
        *(("skip_connect", 2), ("max_pool_3x3", 1)),
    ),
    reduce_concat=(2, 3, 4, 5),
)


class ReLUConvBN(nn.Module):
    """ReLU, a 1x1 convolution and a BatchNorm."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(), nn.Conv2d(n_in, n_out, 1, bias=False), nn.BatchNorm2d(n_out)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H, W)."""
        return self.op(x)


class SepConv(nn.Module):
    """A depthwise separable 3x3 convolution, twice; the first one has the stride."""

    def __init__(self, n: int, stride: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in (stride, 1):
            layers += [
                nn.ReLU(),
                nn.Conv2d(n, n, 3, stride=step, padding=1, groups=n, bias=False),
                nn.Conv2d(n, n, 1, bias=False),
                nn.BatchNorm2d(n),
            ]
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, n, H / stride, W / stride)."""
        return self.op(x)


class DilConv(nn.Module):
    """A depthwise separable 3x3 convolution with dilation 2."""

    def __init__(self, n: int, stride: int) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(n, n, 3, stride=stride, padding=2, dilation=2, groups=n, bias=False),
            nn.Conv2d(n, n, 1, bias=False),
            nn.BatchNorm2d(n),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, H, W) -> (B, n, H / stride, W / stride)."""
        return self.op(x)


class FactorizedReduce(nn.Module):
    """Halves the resolution by two 1x1 convolutions, one on the even, one on the odd positions."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.relu = nn.ReLU()
        self.conv_1 = nn.Conv2d(n_in, n_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(n_in, n_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(n_out)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n_in, H, W) -> (B, n_out, H / 2, W / 2), for even H and W."""
        x = self.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


def _operation(name: str, n: int, stride: int) -> nn.Module:
    if name == "sep_conv_3x3":
        return SepConv(n, stride)
    if name == "dil_conv_3x3":
        return DilConv(n, stride)
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride=stride, padding=1)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else FactorizedReduce(n, n)
    raise ValueError(f"unknown operation {name!r}")


class Cell(nn.Module):
    """A searched cell: reads the outputs of two cells, concatenates its inner tensors.

    Args:
        genotype: The searched pair of cells.
        n_before: Channels of the cell before the last.
        n_last: Channels of the last cell.
        n: Channels of each inner tensor.
        reduction: Whether this is a reduction cell.
        last_reduced: Whether the last cell halved the resolution, so that the one before it has to
            be halved too.
    """

    def __init__(
        self,
        genotype: Genotype,
        n_before: int,
        n_last: int,
        n: int,
        *,
        reduction: bool,
        last_reduced: bool,
    ) -> None:
        super().__init__()
        entry = FactorizedReduce if last_reduced else ReLUConvBN
        self.preprocess0 = entry(n_before, n)
        self.preprocess1 = ReLUConvBN(n_last, n)
        edges = genotype.reduce if reduction else genotype.normal
        self.concat = genotype.reduce_concat if reduction else genotype.normal_concat
        self.sources = tuple(source for _, source in edges)
        self._ops = nn.ModuleList(
            _operation(name, n, 2 if reduction and source < 2 else 1) for name, source in edges
        )

    @property
    def n_out(self) -> int:
        """How many inner tensors it concatenates."""
        return len(self.concat)

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        """(B, n_before, ...), (B, n_last, ...) -> (B, n_out * n, H, W)."""
        tensors = [self.preprocess0(before), self.preprocess1(last)]
        for i in range(0, len(self._ops), 2):
            (a, b), (source_a, source_b) = self._ops[i : i + 2], self.sources[i : i + 2]
            tensors.append(a(tensors[source_a]) + b(tensors[source_b]))
        return torch.cat([tensors[i] for i in self.concat], dim=1)


class AuxiliaryHead(nn.Module):
    """The second classifier that training adds at two thirds of the depth (14 x 14 positions)."""

    def __init__(self, n: int, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),
            nn.AvgPool2d(5, stride=2, count_include_pad=False),
            nn.Conv2d(n, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            # The released ImageNet model has no BatchNorm here.
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, n, 7, 7) -> (B, num_classes)."""
        return self.classifier(self.features(x).flatten(1))


class DARTSImageNet(nn.Module):
    """The ImageNet network made of searched cells.

    Two stem stages divide the resolution by 8; the cells at one and two thirds of the depth are
    reduction cells, which double the channels.

    Args:
        genotype: The searched pair of cells.
        channels: Channels of the stem and of each inner tensor of the first cells.
        layers: Number of cells.
        num_classes: Number of classes.
        auxiliary: Whether to have the auxiliary head. In train mode the network then returns
            (logits, auxiliary logits), in eval mode always the logits.
    """

    def __init__(
        self,
        genotype: Genotype = DARTS_V2,
        *,
        channels: int = 48,
        layers: int = 14,
        num_classes: int = 1000,
        auxiliary: bool = False,
    ) -> None:
        super().__init__()
        half = channels // 2
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, half, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(),
            nn.Conv2d(half, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.stem1 = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.cells = nn.ModuleList()
        self.auxiliary_at = 2 * layers // 3
        n_before = n_last = n = n_auxiliary = channels
        # The second stem stage halves the resolution, as a reduction cell does.
        last_reduced = True
        for i in range(layers):
            reduction = i in (layers // 3, 2 * layers // 3)
            n = 2 * n if reduction else n
            cell = Cell(
                genotype, n_before, n_last, n, reduction=reduction, last_reduced=last_reduced
            )
            self.cells.append(cell)
            n_before, n_last, last_reduced = n_last, cell.n_out * n, reduction
            if i == self.auxiliary_at:
                n_auxiliary = n_last
        self.auxiliary_head = AuxiliaryHead(n_auxiliary, num_classes) if auxiliary else None
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(n_last, num_classes)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """(B, 3, H, W), H and W multiples of 32 -> (B, num_classes)."""
        before = self.stem0(x)
        last = self.stem1(before)
        auxiliary = None
        for i, cell in enumerate(self.cells):
            before, last = last, cell(before, last)
            if self.training and self.auxiliary_head is not None and i == self.auxiliary_at:
                auxiliary = self.auxiliary_head(last)
        logits = self.classifier(self.global_pooling(last).flatten(1))
        return logits if auxiliary is None else (logits, auxiliary)


def main() -> None:
    """Prints the size of the network and its sites."""
    model = DARTSImageNet().eval()
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    x = torch.zeros(1, 3, 224, 224)
    listed = [site.name for site in paper_sites("darts")]
    for title, layers in (("paper", listed), ("found", None)):
        sites = find_gate_sites(model, x, layers=layers)
        print(f"{title}: {len(sites)} sites, {sum(site.n_channels for site in sites):,} channels")
        print("  " + ", ".join(f"{site.name} {site.n_channels}" for site in sites))


if __name__ == "__main__":
    main()
