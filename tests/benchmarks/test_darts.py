"""The DARTS network of the paper has the sites that the paper names."""

from __future__ import annotations

import torch

from benchmarks.darts import DARTSImageNet
from nad_attr import GateSite, find_gate_sites, paper_sites


def test_paper_sites_exist_and_are_the_found_channels() -> None:
    listed = paper_sites("darts")
    assert (len(listed), sum(site.n_channels for site in listed)) == (16, 6624)
    with torch.device("meta"):
        model, large = DARTSImageNet().eval(), torch.zeros(1, 3, 224, 224)
    assert find_gate_sites(model, large, layers=listed) == listed
    # The same tensor as stem0, and the convolution before it.
    expected = [GateSite("stem0.2", 24), GateSite("stem0.4", 48), *listed[1:]]
    assert find_gate_sites(model, large, vectors=False) == expected
