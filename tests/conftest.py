"""Fixtures for all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from tests import helpers

# The networks are tiny: more threads would only wait for each other.
torch.set_num_threads(1)

# Fake tensors ask in every operator whether there is a GPU, and a build for CUDA then looks for the
# driver each time, which takes longer than the operator.
if not torch.cuda.is_available():
    torch.cuda._cached_device_count = 0

# What collecting the tests imports lives until the end: looking at it for garbage again and again
# would take a quarter of that time, and then some in every test.
gc.disable()

# A shell starts what runs in its background deaf to Ctrl-C, and some tests press it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadlines, for machines differ, and the same examples every time: a run must not fail by
# chance. HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))


#: Test functions that took more of the processor than `make quick` has for them, as measured by
#: ``make slow-list``: one of their cases, or all of them together, in seconds.
SLOW = Path(__file__).with_name("slow.txt")
MOST_OF_ONE, MOST_OF_ALL = 0.06, 0.3
_spent: dict[str, list[float]] = {}


def _function(item: pytest.Item) -> str:
    return item.nodeid.partition("[")[0]


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option: write the list of slow tests anew."""
    parser.addoption("--slow-list", action="store_true", help=f"write tests/{SLOW.name} anew")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Count the processor's seconds of each test, with those of the processes that it starts."""
    before = sum(os.times()[:4])
    try:
        return (yield)
    finally:
        _spent.setdefault(_function(item), []).append(sum(os.times()[:4]) - before)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write the list, if asked."""
    if session.config.getoption("--slow-list"):
        slow = [n for n, s in _spent.items() if max(s) > MOST_OF_ONE or sum(s) > MOST_OF_ALL]
        SLOW.write_text("\n".join(sorted(slow)) + "\n", encoding="utf-8")


def pytest_collection_finish() -> None:
    """From here on only what tests make is looked at for garbage, and not often.

    What they import later (plotly, torch's compiler) is large, and looking through it takes a tenth
    of a second each time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 50)
    gc.enable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip ``gpu`` tests where there is no CUDA device; mark the slow ones."""
    slow = set(SLOW.read_text(encoding="utf-8").split())
    for item in items:
        if item.nodeid.startswith("tests/benchmarks/") or _function(item) in slow:
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _short_latencies() -> Iterator[None]:
    """Measure latencies for a moment: no test is about their precision."""
    from nad_attr.export import costs
    from nad_attr.report import measuring

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "_SECONDS", 0.02)
        patch.setitem(costs.latency.__kwdefaults__, "seconds", 0.02)
        yield


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
