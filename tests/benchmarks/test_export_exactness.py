"""Networks of torchvision, cut to arbitrary channels, compute what the gated ones do."""

from __future__ import annotations

import pytest
import torch

from benchmarks.export_exactness import constants_of, network
from nad_attr import find_gate_sites, gated
from nad_attr.export.costs import summary
from nad_attr.gates.sub_architecture import SubArchitecture
from tests.test_export import difference


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("resnet18", "alexnet", "squeezenet1_1", "mobilenet_v3_small", "shufflenet_v2_x0_5"),
        *("regnet_x_400mf", "convnext_tiny", "vit_b_32", "densenet121", "mnasnet0_5"),
    ],
)
def test_torchvision(name: str) -> None:
    """Closed at arbitrary constants; the benchmark does all 80 networks."""
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
