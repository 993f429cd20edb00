"""Small networks and checks that several tests need."""

from __future__ import annotations

import contextlib
import functools
import importlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr import cli
from nad_attr.gates.recipe import Recipe

N_CLASSES = 3
IMAGE_SHAPE = (3, 8, 8)


# ---------------------------------------------------------------------------------------------
# Small networks: float64, eval mode, 8 x 8 images of 3 channels, 3 classes
# ---------------------------------------------------------------------------------------------


class TinyCNN(nn.Module):
    """conv-BN-ReLU-conv-ReLU-pool-linear; gate sites relu1 (6 channels) and relu2 (8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.relu2 = nn.ReLU()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.linear = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.conv2(x))
        return self.linear(self.pool(x).flatten(1))


class TinyBlock(nn.Module):
    """A residual block whose last ReLU is functional: only the block itself can be gated there."""

    def __init__(self, in_planes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_planes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_planes != planes:
            self.shortcut = nn.Conv2d(in_planes, planes, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + self.shortcut(x))


class TinyResNet(nn.Module):
    """Two residual stages; gate sites relu, layer1.0, layer1.1 (4 channels each), layer2.0 (6)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(TinyBlock(4, 4), TinyBlock(4, 4))
        self.layer2 = nn.Sequential(TinyBlock(4, 6, stride=2))
        self.linear = nn.Linear(6, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.linear(x.mean(dim=(2, 3)))


class TinyTokenBlock(nn.Module):
    """A pre-norm transformer block on tokens (N, L, C)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class TinyViT(nn.Module):
    """Tokens (N, 4, 8) with channels last: blocks.0, blocks.1 and norm have channel_dim -1."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(TinyTokenBlock(8), TinyTokenBlock(8))
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, N_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(tokens)).mean(dim=1))


def build(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Make a network in float64 and eval mode, the same for every call with the same seed.

    The global random generators are as before afterwards. BatchNorms get running statistics and
    affine parameters that differ between channels, as in a trained network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = make().double().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0.0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                nn.init.uniform_(module.weight, 0.7, 1.3)
                nn.init.normal_(module.bias, 0.1, 0.2)
    return model


def images(n: int = 12, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return images (n, 3, 8, 8) of standard normal noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, *IMAGE_SHAPE, generator=generator, dtype=dtype)


def labelled_images(n: int = 12, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return images (n, 3, 8, 8) and labels (n,), where class k brightens input channel k."""
    labels = torch.arange(n) % N_CLASSES
    x = images(n, seed=seed)
    x[torch.arange(n), labels] += 1.0
    return x, labels


# ---------------------------------------------------------------------------------------------
# "The user's model is as it was"
# ---------------------------------------------------------------------------------------------


class _Is:
    """Equal only to itself; keeps the object alive, so that its id is not given to another."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Is) and self.value is other.value

    __hash__ = None


def _bits(tensor: Tensor) -> bytes:
    """Return a tensor's values bit by bit, so that NaN equals itself and -0.0 is not 0.0."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes()


def _tensor_state(prefix: str, tensor: Tensor) -> dict[str, Any]:
    state: dict[str, Any] = {
        f"{prefix} (object)": _Is(tensor),
        f"{prefix} (storage)": tensor.data_ptr(),
        f"{prefix} (shape, type, place)": (
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
            tensor.device,
        ),
        f"{prefix} (values)": _bits(tensor),
        f"{prefix}.requires_grad": tensor.requires_grad,
    }
    if tensor.is_leaf:
        grad = tensor.grad
        state[f"{prefix}.grad (object)"] = _Is(grad)
        state[f"{prefix}.grad (values)"] = None if grad is None else _bits(grad)
    hooks = list((tensor._backward_hooks or {}).values())
    hooks += list((getattr(tensor, "_post_accumulate_grad_hooks", None) or {}).values())
    state[f"{prefix} (hooks)"] = [_Is(hook) for hook in hooks]
    return state


def _module_state(name: str, module: nn.Module) -> dict[str, Any]:
    where = name or "(the model itself)"
    state: dict[str, Any] = {
        f"{where} (object)": _Is(module),
        f"{where} (class)": type(module),
        f"{where}.training": module.training,
        f"{where} (attributes)": sorted(vars(module)),
        f"{where} (own methods)": {
            key: _Is(value)
            for key, value in vars(module).items()
            if callable(value) and not isinstance(value, nn.Module)
        },
    }
    for key, value in vars(module).items():
        # Every hook dictionary of nn.Module: forward, pre, backward, state dict, and their flags.
        if "hooks" in key and isinstance(value, dict):
            state[f"{where}.{key}"] = [(number, _Is(hook)) for number, hook in value.items()]
    return state


def _global_state() -> dict[str, Any]:
    algorithm, keys, *rest = np.random.get_state()  # noqa: NPY002
    state: dict[str, Any] = {
        "torch's random generator": _bits(torch.get_rng_state()),
        "NumPy's random generator": (algorithm, keys.tobytes(), *rest),
        "Python's random generator": random.getstate(),
        "torch.is_grad_enabled()": torch.is_grad_enabled(),
        "torch.is_inference_mode_enabled()": torch.is_inference_mode_enabled(),
        "torch.is_anomaly_enabled()": torch.is_anomaly_enabled(),
        "torch.are_deterministic_algorithms_enabled()": (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
        "torch.get_default_dtype()": torch.get_default_dtype(),
        "torch.get_num_threads()": torch.get_num_threads(),
        "torch.get_float32_matmul_precision()": torch.get_float32_matmul_precision(),
        "torch.is_autocast_enabled()": (
            torch.is_autocast_enabled("cpu"),
            torch.is_autocast_enabled("cuda"),
        ),
        "torch.backends.mha.get_fastpath_enabled()": torch.backends.mha.get_fastpath_enabled(),
        "torch.backends.cudnn": (
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.benchmark,
            torch.backends.cudnn.deterministic,
        ),
    }
    if torch.cuda.is_initialized():
        state["CUDA's random generators"] = [_bits(s) for s in torch.cuda.get_rng_state_all()]
    for key, value in vars(nn.modules.module).items():
        if key.startswith("_global_") and "hooks" in key and isinstance(value, dict):
            state[f"torch.nn.modules.module.{key}"] = [
                (number, _Is(hook)) for number, hook in value.items()
            ]
    return state


def snapshot(model: nn.Module, *tensors: Tensor) -> dict[str, Any]:
    """Describe everything about a model, further tensors and the process that must not change."""
    state = _global_state()
    for name, module in model.named_modules(remove_duplicate=False):
        state |= _module_state(name, module)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        state |= _tensor_state(name, tensor)
    for number, tensor in enumerate(tensors):
        state |= _tensor_state(f"tensor {number}", tensor)
    return state


@contextlib.contextmanager
def assert_model_untouched(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Fail if the block changes the model, the tensors, random generators or global switches.

    Weights, buffers and gradients are compared bit by bit and by identity, as are training flags,
    ``requires_grad`` and every hook dictionary of every module. A block that raises is checked too:

        with pytest.raises(ValueError), assert_model_untouched(model):
            ...

    Args:
        model: the user's model.
        *tensors: the user's inputs, labels and so on.

    Raises:
        AssertionError: naming all that differs.
    """
    before = snapshot(model, *tensors)
    try:
        yield
    finally:
        after = snapshot(model, *tensors)
        changed = [key for key in before if before[key] != after.get(key, "gone")]
        changed += [f"{key} (new)" for key in after if key not in before]
        # Raised here, this hides an exception of the block, which stays visible as its context.
        assert not changed, "not as it was before: " + "; ".join(changed)


@functools.cache
def command_line() -> Any:
    """The command line, as click has it: made once, which takes 30 ms."""
    return importlib.import_module("typer.main").get_command(cli.app())


def invoke(*arguments: object) -> Any:
    """Run a command in this process."""
    testing = pytest.importorskip("typer.testing")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(testing, "_get_command", lambda app: command_line())
        return testing.CliRunner().invoke(None, [str(part) for part in arguments])


def learn_briefly(patch: pytest.MonkeyPatch, steps: int = 4, images_per_step: int = 20) -> None:
    """Give every recipe of the default kind few steps, and images in each at most."""
    check = Recipe._check

    def brief(self: Any) -> None:
        check(self)
        if isinstance(self, Recipe):
            object.__setattr__(self, "steps", min(self.steps, steps))
            object.__setattr__(self, "images_per_step", min(self.images_per_step, images_per_step))

    patch.setattr(Recipe, "_check", brief)


def fit_briefly(patch: pytest.MonkeyPatch) -> None:
    """Fit constants for a verdict in one step: for tests that do not look at how good they are."""
    for module in ("nad_attr.certainty.verdict", "nad_attr.explaining.promise"):
        patch.setattr(importlib.import_module(module), "FIT_STEPS", 1)
