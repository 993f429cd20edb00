"""The part of the flow that takes shortcuts, and which channel each shortcut leads to."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nad_attr.flow.blocks import Gating, cut_forward, gate_sums, products
from nad_attr.running.forward import Runner
from nad_attr.sites.site import GateSite

__all__ = ["NONE", "UNKNOWN", "straight_flow"]

#: A channel that no shortcut passes on, and one that goes to an unknown place.
NONE, UNKNOWN = -1, -2


def straight_flow(
    runner: Runner,
    inputs: tuple[Tensor, ...],
    sites: Sequence[GateSite],
    gating: Gating,
    links: Mapping[str, Sequence[str]],
    gradients: Mapping[str, Tensor],
) -> dict[tuple[str, str], tuple[Tensor, Tensor]]:
    """The flow along paths on which no operator mixes channels, summed over a batch.

    The network runs once with the gradient cut behind every operator that mixes channels (dense
    convolutions, matrix products, attention), without autocast, which is too coarse to count
    channels. A gradient that still reaches a site from the next one came by a shortcut. Two probes
    find which channel of the next site it came from: all weighted equally, and weighted by their
    number; the quotient is the number, if there is one channel only.

    Returns:
        ``{(site, next site): (targets, flow)}`` of the links with a shortcut: int64 (C,), the
        channel of the next site that each channel leads to, ``NONE`` or ``UNKNOWN``; float64 (C,).
        Of channels, also where these are in groups.
    """
    by_name = {site.name: site for site in sites}
    exact = copy.copy(runner)
    exact.amp = None
    blocks = cut_forward(exact, inputs, sites, gating, straight=True)
    found: dict[tuple[str, str], tuple[Tensor, Tensor]] = {}
    for name, sources in links.items():
        if name not in by_name or not sources or not blocks.returned[name].requires_grad:
            continue
        returned, target = blocks.returned[name], by_name[name]
        shape = [1] * returned.ndim
        shape[target.channel_dim] = -1
        number = torch.arange(1, target.n_channels + 1, device=returned.device)
        ones = torch.ones_like(returned)
        vectors = (
            ones,
            ones * number.to(returned.dtype).reshape(shape),
            gradients[name].to(returned.dtype),
        )
        leaves = {source: blocks.leaves[source] for source in sources}
        # One by one: a product of several at once would hold all their memory.
        plain, numbered, own = (
            next(got for _, got in products(returned, leaves, lambda _, v=v: v[None]))  # type: ignore[misc]
            for v in vectors
        )
        for source in plain:
            site = by_name[source]
            targets = _targets(site, plain[source][0], numbered[source][0], target.n_channels)
            above = gating.above(site, leaves[source].detach())
            alone = dataclasses.replace(site, groups=None)
            sums = gate_sums(alone, own[source][0] * above, len(above))
            found[source, name] = targets, sums.sum(0)
    return found


def _targets(site: GateSite, plain: Tensor, numbered: Tensor, n_targets: int) -> Tensor:
    axis = site.channel_dim % plain.ndim
    plain, numbered = (
        t.double().movedim(axis, 0).reshape(site.n_channels, -1).cpu() for t in (plain, numbered)
    )
    total, moment = plain.abs().sum(1), numbered.abs().sum(1)
    number = (moment / total.clamp_min(1e-300)).round().clamp(1, n_targets)
    one = (numbered - number[:, None] * plain).abs().amax(1) <= 1e-3 * plain.abs().amax(1)
    targets = torch.where(one, number.long() - 1, UNKNOWN)
    # A channel that is dead on these images, or that no shortcut passes on, adds nothing.
    return torch.where((total > 0) | (moment > 0), targets, NONE)
