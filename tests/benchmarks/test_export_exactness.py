"""Networks of torchvision, cut to arbitrary channels, compute what the gated ones do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.mobilenetv3 import InvertedResidualConfig, MobileNetV3
from torchvision.models.shufflenetv2 import ShuffleNetV2
from torchvision.models.vision_transformer import VisionTransformer

from benchmarks.export_exactness import constants_of, network, varied
from benchmarks.torchvision_sites import seeded
from nad_attr import find_gate_sites, gated
from nad_attr.export.costs import summary
from nad_attr.gates.sub_architecture import SubArchitecture
from tests.test_export import difference

#: torchvision's classes with few blocks; the benchmark does all 80 networks as they are. What is
#: in ResNet, DenseNet and RegNet is in the networks of tests/test_export.py.
SMALL: dict[str, Callable[[], nn.Module]] = {
    "MobileNetV3": lambda: MobileNetV3(
        [
            InvertedResidualConfig(16, 3, 16, 16, True, "RE", 2, 1, 1),
            InvertedResidualConfig(16, 5, 32, 16, True, "HS", 1, 1, 1),
        ],
        64,
    ),
    "ShuffleNetV2": lambda: ShuffleNetV2([2, 1, 1], [8, 16, 32, 64, 128]),
    "ConvNeXt": lambda: ConvNeXt([CNBlockConfig(16, 32, 1), CNBlockConfig(32, None, 1)], 0.0, 1.0),
    "VisionTransformer": lambda: VisionTransformer(64, 16, 1, 4, 32, 64),
}


@pytest.mark.parametrize("name", ["squeezenet1_1", *SMALL])
def test_torchvision(name: str) -> None:
    """Closed at arbitrary constants."""
    if name in SMALL:
        with seeded(0):
            model, x = varied(SMALL[name]().eval()), torch.randn(2, 3, 64, 64).double()
    else:
        model, x = network(name, 0)
    sites = find_gate_sites(model, x[:1])
    generator = torch.Generator().manual_seed(0)
    masks = {s.name: torch.rand(s.n_channels, generator=generator) < 0.4 for s in sites}
    values = constants_of(model, x, sites, 0)["arbitrary"]
    arch = SubArchitecture(masks, sites, task=7, means=values)
    small = arch.export(model, x, head="task")
    with torch.no_grad(), gated(model, arch):
        expected = model(x)[:, [7]]
    assert difference(small(x), expected) < 1e-9
    assert summary(small).smaller.parameters < 0.75 * summary(small).whole.parameters
