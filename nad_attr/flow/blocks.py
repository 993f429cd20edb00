"""One forward pass of a network cut into blocks at its sites, and products with their Jacobians.

Each site gets a leaf: a copy of the site's tensor without history. So the graph of each block ends
at the sites that it reads, and a vector-Jacobian product runs one block backward.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nad_attr.data.labels import Task
from nad_attr.gates.channels import to_gates
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import channel_shape, expand, installed, multiply
from nad_attr.running.forward import Runner
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.site import GateSite
from nad_attr.sites.tracing import _CONVOLUTION, _PRODUCT

__all__ = ["Blocks", "Gating", "cut_forward", "gate_sums", "products", "whole_gradients"]

#: Elements of a block's output that one batched product may hold on all its vectors.
_MAX_BATCHED_ELEMENTS = 2**21


class Gating:
    """The gates and constants of a sub-architecture at its sites, where the network runs."""

    def __init__(self, architecture: SubArchitecture, device: torch.device) -> None:
        self.gates = {name: g.to(device) for name, g in architecture.gates().items()}
        self.means = (
            None
            if architecture.means is None
            else {name: m.to(device) for name, m in architecture.means.items()}
        )

    def __call__(self, site: GateSite, tensor: Tensor) -> Tensor:
        """The site's tensor in the sub-architecture."""
        mean = None if self.means is None else self.means[site.name]
        return multiply(site, tensor, self.gates[site.name].to(tensor.dtype), mean)

    def above(self, site: GateSite, x: Tensor) -> Tensor:
        """``x - a``: what there is above the constants."""
        if self.means is None:
            return x
        return x - expand(self.means[site.name].to(x.dtype), site, x)


@dataclass(eq=False)
class Blocks:
    """A forward pass in pieces: leaves, gated results, and the outputs (B, K) of the network."""

    leaves: dict[str, Tensor] = field(default_factory=dict)
    returned: dict[str, Tensor] = field(default_factory=dict)
    outputs: Tensor | None = None


class _StraightOnly(TorchFunctionMode):
    """Pass gradients only where channels are passed on, not through what mixes channels."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if _CONVOLUTION.search(name):
            # A depthwise convolution keeps channels apart.
            weight = next((t for t in args[1:2] if isinstance(t, Tensor)), None)
            if weight is not None and weight.shape[1] == 1 and args[0].shape[1] > 1:
                return result
        elif not _PRODUCT.search(name):
            return result
        if isinstance(result, Tensor):
            return result.detach()
        if isinstance(result, tuple):
            return tuple(r.detach() if isinstance(r, Tensor) else r for r in result)
        return result


def cut_forward(
    runner: Runner,
    inputs: tuple[Tensor, ...],
    sites: Sequence[GateSite],
    gating: Gating,
    *,
    straight: bool = False,
) -> Blocks:
    """Run a batch through the sub-architecture with a leaf at each site.

    With ``straight``, graphs keep only those paths that mix no channels.
    """
    blocks = Blocks()

    def function(site: GateSite, tensor: Tensor) -> Tensor:
        channel_shape(site, tensor)
        gated = gating(site, tensor)
        blocks.returned[site.name] = gated
        leaf = gated.detach().requires_grad_()
        blocks.leaves[site.name] = leaf
        return leaf.clone()  # what follows may write into it

    mode = _StraightOnly() if straight else nullcontext()
    with torch.enable_grad(), installed(runner.model, sites, function), mode:
        blocks.outputs = runner(inputs)
    return blocks


def whole_gradients(
    runner: Runner,
    inputs: tuple[Tensor, ...],
    sites: Sequence[GateSite],
    gating: Gating,
    task: Task,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Each site's tensor and the gradient of the task output there, by one plain backward pass."""
    leaves: dict[str, Tensor] = {}

    def function(site: GateSite, tensor: Tensor) -> Tensor:
        x = gating(site, tensor)
        leaves[site.name] = x if x.requires_grad else x.detach().requires_grad_()
        return leaves[site.name].clone()

    with torch.enable_grad(), installed(runner.model, sites, function):
        y = task_outputs(runner(inputs), [task]).sum()
    grads = torch.autograd.grad(y, list(leaves.values()))
    return {name: (x.detach(), g) for (name, x), g in zip(leaves.items(), grads, strict=True)}


def gate_sums(site: GateSite, values: Tensor, n_images: int, leading: int = 0) -> Tensor:
    """Sums over positions, and over the channels of a group: float64 (leading..., B, gates).

    On the CPU. Where windows of the images are on the first axis, an image's are summed as well.
    """
    ndim = values.ndim - leading
    dim = leading + site.channel_dim % ndim
    moved = values.movedim(dim, leading + 1)
    over = list(range(leading + 2, values.ndim))
    # PyTorch sums by pairs, so that float32 loses nothing that the products had.
    wide = torch.promote_types(values.dtype, torch.float32)
    sums = (moved.sum(over, dtype=wide) if over else moved.to(wide)).cpu().double()
    if sums.shape[leading] != n_images:
        sums = sums.unflatten(leading, (n_images, -1)).sum(leading + 1)
    return to_gates(sums, [site])


def products(
    returned: Tensor,
    leaves: Mapping[str, Tensor],
    vectors: Callable[[Sequence[int]], Tensor],
    n: int = 1,
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Vector-Jacobian products of one block, several at a time.

    The n vectors are ``numbers -> (len(numbers), *returned.shape)``. Yields some numbers, and
    ``{site name: products}`` with these numbers on axis 0, without sites that the block does not
    read.
    """
    size = max(1, min(n, _MAX_BATCHED_ELEMENTS // max(1, returned.numel()))) if n > 1 else 1
    start = 0
    while start < n:
        numbers = list(range(start, min(n, start + size)))
        vector = vectors(numbers)
        batched = len(numbers) > 1
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*performance drop.*")
                grads = torch.autograd.grad(
                    returned,
                    list(leaves.values()),
                    vector if batched else vector[0],
                    is_grads_batched=batched,
                    retain_graph=True,
                    allow_unused=True,
                )
        except RuntimeError:
            if not batched:
                raise
            size = 1  # an operator that cannot be batched, or memory: one by one
            continue
        found = {
            name: g if batched else g[None]
            for name, g in zip(leaves, grads, strict=True)
            if g is not None
        }
        yield numbers, found
        start = numbers[-1] + 1
