from __future__ import annotations

import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.helpers import TinyCNN, assert_model_untouched, build, images


def test_tiny_networks(tiny_model: nn.Module, tiny_images: torch.Tensor) -> None:
    logits = tiny_model(tiny_images)
    assert logits.shape == (12, 3)
    assert logits.dtype == torch.float64
    assert not tiny_model.training
    assert logits.std(dim=0).min() > 1e-3


def test_build_is_repeatable_and_leaves_the_generators_alone() -> None:
    with assert_model_untouched(nn.Identity()):
        first, second, other = build(TinyCNN), build(TinyCNN), build(TinyCNN, seed=1)
        images()
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_untouched_accepts_a_forward_and_a_removed_hook(
    tiny_model: nn.Module, tiny_images: torch.Tensor
) -> None:
    with assert_model_untouched(tiny_model, tiny_images):
        module = next(m for n, m in tiny_model.named_modules() if n)
        handle = module.register_forward_hook(lambda *args: None)
        tiny_model(tiny_images)
        handle.remove()


TOUCHES = {
    "weight": lambda m: m.conv1.weight.data[0, 0, 0, 0].add_(1e-12),
    "buffer": lambda m: m.bn1.running_mean[0].add_(1e-12),
    "batch counter": lambda m: m.bn1.num_batches_tracked.fill_(1),
    "new parameter": lambda m: m.register_parameter("p", nn.Parameter(torch.zeros(1))),
    "replaced parameter": lambda m: setattr(
        m.conv1, "weight", nn.Parameter(m.conv1.weight.detach())
    ),
    "replaced module": lambda m: setattr(m, "relu1", nn.ReLU()),
    "training": lambda m: m.bn1.train(),
    "requires_grad": lambda m: m.linear.bias.requires_grad_(False),
    "grad": lambda m: setattr(m.linear.bias, "grad", torch.zeros(3, dtype=torch.float64)),
    "forward hook": lambda m: m.relu1.register_forward_hook(lambda *a: None),
    "forward pre-hook": lambda m: m.relu1.register_forward_pre_hook(lambda *a: None),
    "backward hook": lambda m: m.relu1.register_full_backward_hook(lambda *a: None),
    "tensor hook": lambda m: m.linear.bias.register_hook(lambda g: g),
    "patched forward": lambda m: setattr(m.relu1, "forward", torch.abs),
    "attribute": lambda m: setattr(m, "seen", True),
    "torch's generator": lambda m: torch.rand(1),
    "NumPy's generator": lambda m: np.random.rand(),  # noqa: NPY002
    "Python's generator": lambda m: random.random(),
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_untouched_notices(touch: str, tiny_cnn: nn.Module) -> None:
    with (
        torch.random.fork_rng(devices=[]),
        pytest.raises(AssertionError, match="not as it was"),
        assert_model_untouched(tiny_cnn),
    ):
        TOUCHES[touch](tiny_cnn)


def test_untouched_notices_global_switches(tiny_cnn: nn.Module) -> None:
    try:
        with (
            pytest.raises(AssertionError, match=r"mha.*grad_enabled|grad_enabled.*mha"),
            assert_model_untouched(tiny_cnn),
        ):
            torch.set_grad_enabled(False)
            torch.backends.mha.set_fastpath_enabled(False)
    finally:
        torch.set_grad_enabled(True)
        torch.backends.mha.set_fastpath_enabled(True)


def test_untouched_notices_changed_inputs(tiny_cnn: nn.Module, tiny_images: torch.Tensor) -> None:
    with (
        pytest.raises(AssertionError, match="tensor 0 \\(values\\)"),
        assert_model_untouched(tiny_cnn, tiny_images),
    ):
        tiny_images[0, 0, 0, 0] += 1


def test_untouched_checks_after_an_exception(tiny_cnn: nn.Module) -> None:
    with pytest.raises(KeyError), assert_model_untouched(tiny_cnn):
        raise KeyError("as it was")
    with pytest.raises(AssertionError, match="training"), assert_model_untouched(tiny_cnn):
        tiny_cnn.train()
        raise KeyError("not as it was")


def test_slow_tests_are_there() -> None:
    """A test that is renamed is measured again: `make slow-list`."""
    root = Path(__file__).parent.parent
    for line in (root / "tests" / "slow.txt").read_text(encoding="utf-8").split():
        file, *names = line.split("::")
        text = (root / file).read_text(encoding="utf-8")
        text += (root / "tests" / "scorer_contract.py").read_text(encoding="utf-8")
        for name in names[-1].rpartition(".")[2:] if names[0].startswith("nad_attr.") else names:
            # A module's own examples go by the module's name.
            assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE) or (
                name == Path(file).stem
            ), f"tests/slow.txt: there is no {line}"
