"""Frozen BatchNorm layers that keep nothing for the backward pass."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from nad_attr.learning.fast.batchnorm import lean_batchnorm
from tests.helpers import assert_model_untouched


class Net(nn.Module):
    """BatchNorms of several kinds: in front of an in-place ReLU, without weights, called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.plain = nn.BatchNorm2d(4, affine=False)
        self.last = nn.BatchNorm1d(4, eps=0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        x = self.plain(self.plain(x)) * x
        return self.last(x.mean((2, 3)))


@pytest.fixture
def net() -> Net:
    generator = torch.Generator().manual_seed(0)
    net = Net().double().eval().requires_grad_(False)
    for tensor in (*net.parameters(), *net.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return net


@pytest.fixture
def x() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 3, 5, 5, generator=generator, dtype=torch.float64, requires_grad=True)


def _output_and_gradient(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    output = net(x)
    (gradient,) = torch.autograd.grad((output * torch.arange(4)).sum(), x)
    return output, gradient


@pytest.mark.parametrize("channels_last", [False, True])
def test_same_output_and_gradient(net: Net, x: Tensor, channels_last: bool) -> None:
    if channels_last:
        x = x.detach().to(memory_format=torch.channels_last).requires_grad_(True)
    expected = _output_and_gradient(net, x)
    with assert_model_untouched(net), lean_batchnorm(net):
        output, gradient = _output_and_gradient(net, x)
    assert torch.equal(output, expected[0])
    torch.testing.assert_close(gradient, expected[1], rtol=1e-12, atol=1e-14)


def test_the_input_is_not_kept(net: Net, x: Tensor) -> None:
    def graph_holds_input() -> bool:
        inner = torch.cat([x, x[:, :1]], dim=1)
        sizes: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            assert net.norm(inner).requires_grad
        return inner.numel() in sizes

    assert graph_holds_input()
    with lean_batchnorm(net):
        assert not graph_holds_input()


def test_layers_that_learn_are_left_alone(net: Net, x: Tensor) -> None:
    net.norm.requires_grad_(True)
    reference = copy.deepcopy(net)
    for model, lean in ((reference, False), (net, True)):
        if lean:
            with lean_batchnorm(model):
                model(x).sum().backward()
        else:
            model(x).sum().backward()
    assert net.norm.weight.grad is not None
    torch.testing.assert_close(net.norm.weight.grad, reference.norm.weight.grad)


def test_train_mode_is_left_alone(net: Net, x: Tensor) -> None:
    reference = copy.deepcopy(net)
    net.norm.train()
    reference.norm.train()
    with lean_batchnorm(net):
        output, gradient = _output_and_gradient(net, x)
    expected = _output_and_gradient(reference, x)
    assert torch.equal(output, expected[0])
    torch.testing.assert_close(gradient, expected[1])
    assert torch.equal(net.norm.running_mean, reference.norm.running_mean)


def test_undone_after_an_exception(net: Net) -> None:
    with assert_model_untouched(net), pytest.raises(RuntimeError), lean_batchnorm(net):
        net(torch.zeros(1, 2, 5, 5, dtype=torch.float64, requires_grad=True))


def test_under_autocast(x: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval().requires_grad_(False)
    images = x.detach().float().requires_grad_(True)

    def gradient() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = net(images)
        return torch.autograd.grad(output.float().sum(), images)[0]

    expected = gradient()
    with lean_batchnorm(net):
        torch.testing.assert_close(gradient(), expected, rtol=0.02, atol=0.02)
