"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from tests import helpers

# The networks are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# A shell starts what runs in its background deaf to Ctrl-C, and some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines, for machines differ, and the same examples every time: a run must not fail by
# chance. HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where there is no CUDA device; tests of benchmarks are slow."""
    for item in items:
        if item.nodeid.startswith("tests/benchmarks/"):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def tiny_cnn() -> nn.Module:
    """conv-BN-ReLU-conv-ReLU-pool-linear in float64, eval mode."""
    return helpers.build(helpers.TinyCNN)


@pytest.fixture
def tiny_resnet() -> nn.Module:
    """A residual network with functional and in-place ReLUs, float64, eval mode."""
    return helpers.build(helpers.TinyResNet)


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A transformer on tokens with channels last, float64, eval mode."""
    return helpers.build(helpers.TinyViT)


@pytest.fixture(params=["tiny_cnn", "tiny_resnet", "tiny_vit"])
def tiny_model(request: pytest.FixtureRequest) -> nn.Module:
    """Each of the tiny networks in turn."""
    model: nn.Module = request.getfixturevalue(request.param)
    return model


@pytest.fixture
def tiny_images() -> Tensor:
    """Images (12, 3, 8, 8) float64."""
    return helpers.images()


@pytest.fixture
def tiny_data() -> tuple[Tensor, Tensor]:
    """Images (12, 3, 8, 8) float64 and labels (12,), four images of each class."""
    return helpers.labelled_images()


@pytest.fixture
def assert_model_untouched() -> Callable[..., AbstractContextManager[None]]:
    """Return the context manager :func:`tests.helpers.assert_model_untouched`."""
    return helpers.assert_model_untouched
