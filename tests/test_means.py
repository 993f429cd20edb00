"""Channel means."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.gating.hooks import recorded
from nad_attr.gating.means import channel_means
from nad_attr.sites.site import GateSite, SiteError
from tests import helpers

CNN_SITES = [GateSite("bn1", 6, 1), GateSite("relu2", 8, 1)]
VIT_SITES = [GateSite("blocks.0", 8, -1), GateSite("blocks.1", 8, -1)]
RESNET_SITES = [GateSite("bn1", 4, 1), GateSite("layer1.1", 4, 1)]


@pytest.mark.parametrize(
    ("make", "sites"),
    [
        (helpers.TinyCNN, CNN_SITES),
        (helpers.TinyViT, VIT_SITES),
        (helpers.TinyResNet, RESNET_SITES),  # an in-place ReLU follows the first site
    ],
)
def test_mean_over_images_and_positions(make, sites) -> None:
    model = helpers.build(make)
    images = helpers.images(7)
    with helpers.assert_model_untouched(model, images):
        found = channel_means(model, sites, [(images[:1],), (images[1:5],), (images[5:],)])
    with torch.no_grad(), recorded(model, sites) as activations:
        model(images)
    assert list(found) == [site.name for site in sites]
    for site in sites:
        over = [d for d in range(activations[site.name].ndim) if d != site.channel_dim % 4]
        if site.channel_dim == -1:
            over = [0, 1]
        expected = activations[site.name].mean(over)
        torch.testing.assert_close(found[site.name], expected, rtol=1e-12, atol=1e-14)


def test_positions_weigh_the_same_in_images_of_different_size() -> None:
    model = nn.Sequential(nn.Identity()).eval()
    small, large = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 3, 1)
    assert channel_means(model, [GateSite("0", 1, 1)], [(small,), (large,)])["0"].item() == 0.25


def test_float32_sums_do_not_drift() -> None:
    """Adding 1 to 2^24 in float32 changes nothing."""
    model = nn.Sequential(nn.Identity()).eval()
    batches = [(torch.tensor([[2.0**24]]),), *[(torch.ones(1, 1),)] * 3]
    found = channel_means(model, [GateSite("0", 1, 1)], batches)["0"]
    assert found.dtype == torch.float64
    assert found.item() == (2**24 + 3) / 4


def test_forward() -> None:
    model = nn.Sequential(nn.Identity()).eval()
    x = torch.tensor([[1.0, 2.0]])

    def forward(a: Tensor, b: Tensor) -> Tensor:
        return model(a + b)

    found = channel_means(model, [GateSite("0", 2, 1)], iter([(x, x)]), forward=forward)
    assert found["0"].tolist() == [2, 4]


def test_hooks_are_off_while_batches_are_drawn() -> None:
    model = nn.Sequential(nn.Identity()).eval()

    def batches():
        model(torch.full((1, 5), 100.0))  # the wrong shape for the site, too
        yield (torch.ones(1, 2),)

    assert channel_means(model, [GateSite("0", 2, 1)], batches())["0"].tolist() == [1, 1]


def test_bad_input() -> None:
    model = helpers.build(helpers.TinyCNN)
    images = helpers.images(2)
    with pytest.raises(ValueError, match="no images"):
        channel_means(model, CNN_SITES, [])
    with pytest.raises(ValueError, match="no images"):
        channel_means(model, CNN_SITES, [(images[:0],)])
    with pytest.raises(TypeError, match=r"\(images,\)"):
        channel_means(model, CNN_SITES, [images])
    with pytest.raises(ValueError, match="'bn1' is not finite"):
        channel_means(model, CNN_SITES, [(images / 0,)])
    with pytest.raises(GatingError, match="5 channels"):
        channel_means(model, [GateSite("bn1", 5, 1)], [(images,)])
    with pytest.raises(SiteError, match="bn9"):
        channel_means(model, [GateSite("bn9", 5, 1)], [(images,)])
    model.train()
    with helpers.assert_model_untouched(model), pytest.raises(ValueError, match="eval"):
        channel_means(model, CNN_SITES, [(images,)])
