"""Maps of what some channels of a sub-architecture do for its task, position by position."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from nad_attr.data.labels import Task
from nad_attr.data.layout import grid_of
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import channel_shape, frozen, installed, multiply
from nad_attr.running.forward import Runner
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.site import GateSite

__all__ = ["Measure", "SiteMaps", "check_measure", "evidence_maps"]

#: What a map sums over channels: ``(activation - mean) * gradient``, or ``|activation - mean|``.
Measure: TypeAlias = Literal["evidence", "presence"]


@dataclass(frozen=True, eq=False)
class SiteMaps:
    """Maps of a batch, float32 (B, H, W) on the CPU, and why other sites have none."""

    maps: dict[str, Tensor]
    left_out: dict[str, str]


def check_measure(measure: str) -> None:
    """Check the name of a measure.

    Raises:
        ValueError: If there is no such measure.
    """
    if measure not in ("evidence", "presence"):
        raise ValueError(f"measure must be 'evidence' or 'presence', got {measure!r}.")


def chosen_sites(maps: Mapping[str, Tensor], site: str | None) -> tuple[str, ...]:
    """The site, or all sites that have maps."""
    names = tuple(maps) if site is None else (site,)
    if names[0] not in maps:
        raise KeyError(f"no map of site {site!r}; there are {list(maps)}.")
    return names


def enlarged(maps: Tensor, size: tuple[int, int], *over: int) -> Tensor:
    """Maps (N, C, h, w) at a size, divided by their largest absolute values over some axes."""
    largest = maps.abs().amax(over, keepdim=True)
    unit = torch.where(largest > 0, largest, torch.ones_like(largest))
    return F.interpolate(maps / unit, size, mode="bilinear", align_corners=False)


def no_positions(left_out: Mapping[str, str]) -> ValueError:
    """The error if no site has a map."""
    why = "; ".join(f"{k!r}: {v}" for k, v in left_out.items())
    return ValueError(f"no gate site has positions to look at ({why}).")


class _Recorder:
    """Gates a network and keeps the gated tensors, with their graph."""

    def __init__(self, arch: SubArchitecture, device: torch.device) -> None:
        self.gates = {name: gate.to(device) for name, gate in arch.gates().items()}
        self.means = (
            None if arch.means is None else {n: m.to(device) for n, m in arch.means.items()}
        )
        self.tensors: dict[str, Tensor] = {}

    def __call__(self, site: GateSite, tensor: Tensor) -> Tensor:
        channel_shape(site, tensor)
        gate = self.gates[site.name].to(tensor.device)
        mean = None if self.means is None else self.means[site.name].to(tensor.device)
        self.tensors[site.name] = multiply(site, tensor, gate, mean)
        # Pass on a copy: a later in-place ReLU would change the tensor whose gradient is taken.
        return self.tensors[site.name].clone()


def evidence_maps(
    runner: Runner,
    arch: SubArchitecture,
    task: Task,
    images: Tensor,
    channels: Mapping[str, Tensor],
    *,
    measure: Measure = "evidence",
    prefix_tokens: int | None = None,
) -> SiteMaps:
    """Maps of a batch inside one sub-architecture, summed over some channels at each site.

    ``evidence``: ``sum over channels of (a - m) * dz/da``, with ``a`` the activation inside the
    sub-architecture, ``m`` its value if it were closed (its mean, or zero) and ``z`` the task
    output: to first order, the loss of the output without the channel at this position. Of either
    sign. ``presence``: ``sum of |a - m|``, without an output.

    Args:
        runner: The network and how it is called.
        arch: The sub-architecture.
        task: Whose output.
        images: (B, C, H, W), where the network is.
        channels: ``{site name: bool (C,)}``, which channels to sum over; other sites have no map.
        measure: See above.
        prefix_tokens: Tokens without a position, before the others. None: none or one, as their
            number says.
    """
    check_measure(measure)
    sites = [site for site in arch.sites if site.name in channels]
    maps: dict[str, Tensor] = {}
    left_out: dict[str, str] = {}
    aspect = images.shape[-2] / images.shape[-1]
    # Gradients of activations and not of weights, in any mode of the caller.
    with frozen(runner.model), torch.inference_mode(False), torch.enable_grad():
        recorder = _Recorder(arch, runner.device)
        x = images.detach().clone().requires_grad_(measure == "evidence")
        with installed(runner.model, arch.sites, recorder):
            output = task_outputs(runner((x,)), [task]).sum()
        grids = {}
        for site in sites:
            shape = recorder.tensors[site.name].shape
            dim, _ = channel_shape(site, recorder.tensors[site.name])
            grid, reason = grid_of(shape[:dim] + shape[dim + 1 :], aspect, prefix_tokens)
            if grid is None:
                left_out[site.name] = reason
            else:
                grids[site.name] = grid
        tensors = [recorder.tensors[name] for name in grids]
        found: tuple[Tensor | None, ...] = (None,) * len(tensors)
        if measure == "evidence" and tensors:
            found = torch.autograd.grad(output, tensors, allow_unused=True)
    by_name = {site.name: site for site in sites}
    for name, tensor, gradient in zip(grids, tensors, found, strict=True):
        dim, _ = channel_shape(by_name[name], tensor)
        values = tensor.detach().movedim(dim, -1)
        if recorder.means is not None:
            values = values - recorder.means[name].to(values)
        if measure == "presence":
            values = values.abs()
        elif gradient is None:
            values = torch.zeros_like(values)
        else:
            values = values * gradient.movedim(dim, -1)
        summed = values[..., channels[name].to(values.device)].sum(-1)
        maps[name] = grids[name].maps(summed).float().cpu()
        if not bool(torch.isfinite(maps[name]).all()):
            raise ValueError(f"the map of gate site {name!r} holds NaN or infinity.")
    return SiteMaps(maps, left_out)
