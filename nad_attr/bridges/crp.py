"""Compare concept relevance propagation (CRP) with sub-architectures.

A CRP condition lets relevance flow backward through some channels only, in the unchanged network. A
sub-architecture closes channels on the way forward. :func:`compare_with_condition` computes both
heat-maps, with Zennit alone; zennit-crp takes the conditions of
:meth:`~nad_attr.SubArchitecture.to_crp_condition`, and is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import tensor_of
from nad_attr.bridges.zennit import GateCanonizer, SubArchitectureAttributor
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.foreign_hooks import move_behind_rewriters
from nad_attr.gating.hooks import expand, installed, site_modules
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.stats.results import Result
from nad_attr.system.threads import owned

__all__ = ["CRPComparison", "compare_with_condition", "relevance_masked"]


class _Masked(torch.autograd.Function):
    """The identity, whose backward pass lets through what a mask keeps."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return grad * mask, None


@contextmanager
def relevance_masked(model: nn.Module, arch: SubArchitecture) -> Iterator[None]:
    """Let relevance (or gradients) flow backward through the kept channels only.

    The forward pass is untouched: this is CRP's condition, as a context.

    Args:
        model: The network; unchanged afterwards.
        arch: Which channels let relevance through; its ablation value plays no part.

    Raises:
        GatingError: If a site does not fire or has another shape.
        SiteError: If the network has no such site.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
        >>> _ = nn.init.eye_(net[0].weight), nn.init.zeros_(net[0].bias)
        >>> x = torch.ones(1, 2, requires_grad=True)
        >>> arch = SubArchitecture.from_kept({"1": [0]}, [GateSite("1", 2, 1)])
        >>> with relevance_masked(net, arch):
        ...     y = net(x)
        >>> y.tolist(), torch.autograd.grad(y.sum(), x)[0].tolist()
        ([[1.0, 1.0]], [[1.0, 0.0]])
    """
    masks, modules = arch.gates(), site_modules(model, arch.sites)

    def function(site: GateSite, tensor: Tensor) -> Tensor:
        mask = expand(masks[site.name].to(tensor.device), site, tensor)
        result: Tensor = _Masked.apply(tensor, mask.to(tensor.dtype))
        return result

    def find_place(module: nn.Module, args: Any) -> None:
        for site in arch.sites:
            move_behind_rewriters(modules[site.name], function)

    with owned() as owner:
        handle = unwrap(model).register_forward_pre_hook(owner.only(find_place))
        try:
            with installed(model, arch.sites, function):
                yield
        finally:
            handle.remove()


@dataclass(frozen=True, eq=False)
class CRPComparison(Result):
    """Three heat-maps of the same images and class, (B, C, H, W) each.

    Attributes:
        whole: Relevance in the whole network.
        condition: The same with the condition of CRP: backward through the kept channels only.
        gated: Relevance in the network as the sub-architecture.
        output: The whole network's output for the class, (B,): where ``whole`` and ``condition``
            start.
        gated_output: The sub-architecture's, (B,): where ``gated`` starts.
    """

    whole: Tensor
    condition: Tensor
    gated: Tensor
    output: Tensor
    gated_output: Tensor

    def similarity(self) -> Tensor:
        """Cosine of the two heat-maps of each image, condition and gated: 1 if alike, (B,)."""
        return torch.cosine_similarity(self.condition.flatten(1), self.gated.flatten(1))

    def _records(self) -> list[dict[str, Any]]:
        found = zip(self.output, self.gated_output, self.similarity(), strict=True)
        return [
            {"image": str(i), "output": float(a), "gated_output": float(b), "similarity": float(c)}
            for i, (a, b, c) in enumerate(found)
        ]

    def plot(self, images: Tensor | None = None) -> Any:
        """The heat-maps, as :meth:`figure` draws them."""
        return self.figure(images)

    def figure(self, images: Tensor | None = None) -> Any:
        """The heat-maps in three rows, a column for each of the images (B, C, H, W) under them.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.bridges.captum import heatmap_figure

        rows = {
            "whole network": self.whole,
            "CRP condition": self.condition,
            "sub-architecture": self.gated,
        }
        return heatmap_figure(rows, images)


def compare_with_condition(
    model: nn.Module,
    arch: SubArchitecture,
    images: Tensor,
    target: int | Sequence[int] | Tensor | None = None,
    composite: Any = "epsilon_plus",
) -> CRPComparison:
    """Heat-maps under CRP's condition and through the sub-architecture, of the same channels.

    If all channels are kept they are the same. Otherwise the condition starts from the whole
    network's output and distributes it by the whole network's activations; the relevance of the
    closed channels is dropped, so the heat-map sums to less than the output. The gated network
    computes its own output without them, and its heat-map sums to that.

    Args:
        model: The network, in eval mode.
        arch: The sub-architecture.
        images: (B, C, H, W).
        target: Class index, or one for each image; None: the sub-architecture's own task.
        composite: A Zennit composite of relevance rules, or the name of one.

    Returns:
        The heat-maps and outputs.

    Raises:
        GatingError, SiteError, TypeError, ValueError: As
            :class:`~nad_attr.bridges.zennit.SubArchitectureAttributor`; also if channels are closed
            at sites that a condition cannot name, see
            :meth:`~nad_attr.SubArchitecture.to_crp_condition`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 2, bias=False))
        >>> _ = nn.init.eye_(net[0].weight), nn.init.ones_(net[2].weight)
        >>> arch = SubArchitecture.from_kept({"1": [0]}, [GateSite("1", 2, 1)], task=0)
        >>> found = compare_with_condition(net.eval(), arch, torch.tensor([[1.0, 3.0]]))
        >>> found.output.tolist(), found.gated_output.tolist()
        ([4.0], [1.0])
        >>> found.condition.round(decimals=3).tolist(), found.gated.round(decimals=3).tolist()
        ([[1.0, 0.0]], [[1.0, 0.0]])

    Source:
        Achtibat et al., "From attribution maps to human-understandable explanations through Concept
        Relevance Propagation", Nature Machine Intelligence 2023, for conditions.
    """
    arch.to_crp_condition(0)  # refuses what is not a condition
    explained = arch.task if target is None else target
    full = SubArchitecture.full(arch.sites)
    # All gates are open; the attributor checks and cleans up.
    whole = SubArchitectureAttributor(model, GateCanonizer(full), composite)
    with whole:
        output, everything = whole(images, explained)
        with relevance_masked(whole.model, arch):
            _, condition = whole(images, explained)
    gated_output, gated = SubArchitectureAttributor(model, arch, composite)(images, explained)
    index = tensor_of(explained).to(output.device).flatten().expand(len(output))[:, None]
    return CRPComparison(
        whole=everything.detach(),
        condition=condition.detach(),
        gated=gated.detach(),
        output=output.detach().gather(1, index)[:, 0],
        gated_output=gated_output.detach().gather(1, index)[:, 0],
    )
