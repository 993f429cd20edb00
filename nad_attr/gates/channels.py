"""Channels of all sites together: budgets, masks, and the similarity of two masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from nad_attr._checks import as_tensor, check_mapping
from nad_attr.sites.site import GateSite, check_sites

__all__ = ["jaccard", "kappa", "n_channels", "top_k_masks"]


def n_channels(sites: Sequence[GateSite]) -> int:
    """Number of channels of all sites together."""
    return sum(site.n_channels for site in sites)


def n_gates(sites: Sequence[GateSite]) -> int:
    """Number of gates of all sites together: a group of channels has one."""
    return sum(site.n_gates for site in sites)


def gate_of_channel(sites: Sequence[GateSite]) -> Tensor | None:
    """The number of each channel's gate, int64; None: each channel has its own gate."""
    if all(site.groups is None for site in sites):
        return None
    numbers: list[int] = []
    start = 0
    for site in sites:
        numbers += [start + g for g in site.group_of or range(site.n_channels)]
        start += site.n_gates
    return torch.tensor(numbers, device="cpu")


def to_channels(gates: Tensor, sites: Sequence[GateSite]) -> Tensor:
    """The value of each channel's gate: (..., all gates) to (..., all channels).

    Example:
        >>> to_channels(torch.tensor([1.0, 0.0]), [GateSite("a", 4, groups=2)])
        tensor([1., 1., 0., 0.])
    """
    numbers = gate_of_channel(sites)
    return gates if numbers is None else gates[..., numbers.to(gates.device)]


def to_gates(channels: Tensor, sites: Sequence[GateSite], *, mean: bool = False) -> Tensor:
    """The sum (or mean) over the channels of each gate: (..., all channels) to (..., all gates).

    Example:
        >>> to_gates(torch.tensor([1.0, 2.0, 3.0, 4.0]), [GateSite("a", 4, groups=2)])
        tensor([3., 7.])
    """
    numbers = gate_of_channel(sites)
    if numbers is None:
        return channels
    numbers = numbers.to(channels.device)
    total = channels.new_zeros(*channels.shape[:-1], n_gates(sites))
    total = total.index_add(-1, numbers, channels)
    return total / numbers.bincount() if mean else total


def channels_of(site: GateSite, gates: Sequence[int]) -> list[int]:
    """The channels of some gates of a site, gate by gate.

    Example:
        >>> channels_of(GateSite("a", 4, groups=[0, 1, 0, 1]), [1])
        [1, 3]
    """
    group_of = site.group_of
    if group_of is None:
        return list(gates)
    members: dict[int, list[int]] = {}
    for channel, gate in enumerate(group_of):
        members.setdefault(gate, []).append(channel)
    return [channel for gate in gates for channel in members[gate]]


def open_gates(site: GateSite, mask: Tensor) -> Tensor:
    """The open gates of a mask over channels, which has whole groups: bool (..., C) to (..., G)."""
    if site.groups is None:
        return mask
    share = to_gates(mask.float(), [site], mean=True)
    if bool(((share > 0) & (share < 1)).any()):
        raise ValueError(
            f"a mask of {site.name!r} keeps part of a group of channels; a group has one gate, "
            "so keep all of it or nothing."
        )
    return share > 0


def distinct_sites(sites: Sequence[GateSite]) -> tuple[GateSite, ...]:
    """Return the sites as a tuple; check that they are gate sites and differ in name."""
    names = [site.name for site in check_sites(sites)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"gate site {name!r} is there twice.")
    return tuple(sites)


def budget(size: float, sites: Sequence[GateSite]) -> int:
    """Number of gates that a size in (0, 1] keeps: ``round(size * all gates)``, at least one."""
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size <= 1:
        raise ValueError(f"size must be a share of the channels in (0, 1], got {size!r}.")
    return max(1, round(size * n_gates(sites)))


def split_sites(flat: Tensor, sites: Sequence[GateSite]) -> dict[str, Tensor]:
    """Cut a (..., all channels) tensor into ``{site name: (..., C)}``."""
    parts = flat.split([site.n_channels for site in sites], dim=-1)
    return {site.name: part for site, part in zip(sites, parts, strict=True)}


def top_k_masks(
    scores: Mapping[str, Tensor], sites: Sequence[GateSite], k: int
) -> dict[str, Tensor]:
    """Keep exactly the ``k`` highest scores over all sites together.

    A group of channels has one score, the mean of its channels' scores. Equal scores are kept in
    site and channel order, so the result depends on the scores alone.

    Args:
        scores: ``{site name: (..., C)}``, higher is more important; each row of the leading axes
            (tasks) is treated alone.
        sites: Gate sites in forward order.
        k: Gates to keep, over all sites.

    Returns:
        ``{site name: bool (..., C)}`` with ``k`` gates kept in each row.

    Example:
        >>> sites = [GateSite("a", 2, 1), GateSite("b", 2, 1)]
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
        >>> masks = top_k_masks(scores, sites, 3)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([True, True], [False, True])
    """
    flat = to_gates(torch.cat([scores[site.name] for site in sites], dim=-1), sites, mean=True)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order[..., :k], True)
    return split_sites(to_channels(mask, sites), sites)


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A and B| / |A or B| of two boolean masks; 1 if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def kappa(a: Tensor, b: Tensor) -> float:
    """Overlap corrected for chance, ``(J - E J) / (1 - E J)``; 0 for random, 1 for equal masks.

    ``E J = e / (|A| + |B| - e)``, where ``e = |A| |B| / C`` is the expected intersection of random
    masks of these sizes. If both are full or both are empty, it is 1.

    Args:
        a: Boolean mask (C,).
        b: Boolean mask (C,).

    Example:
        >>> a = torch.tensor([True, True, False, False])
        >>> kappa(a, a)
        1.0
        >>> round(kappa(a, torch.tensor([True, False, True, False])), 6)
        0.0
    """
    n_a, n_b = int(a.sum()), int(b.sum())
    both = n_a * n_b / a.numel()
    union = n_a + n_b - both
    expected = both / union if union else 1.0
    return 1.0 if expected == 1.0 else (jaccard(a, b) - expected) / (1 - expected)


def float_copy(values: object, what: str) -> Tensor:
    """A float32 copy of real numbers on the CPU; a ValueError if they are complex."""
    tensor = as_tensor(values, what).detach().cpu()
    if tensor.is_complex():
        raise ValueError(f"{what} are complex.")
    return tensor.float().clone()


def check_means(
    means: Mapping[str, Tensor] | None, sites: Sequence[GateSite]
) -> dict[str, Tensor] | None:
    """Check per-channel means and copy them as float32 (C,) to the CPU; None stays None."""
    if means is None:
        return None
    check_mapping(means, "means")
    checked = {}
    for site in sites:
        if site.name not in means:
            raise ValueError(f"means lack gate site {site.name!r}.")
        mean = float_copy(means[site.name], f"means of {site.name!r}")
        if mean.shape != (site.n_channels,) or not bool(torch.isfinite(mean).all()):
            raise ValueError(
                f"means of {site.name!r} must be {site.n_channels} finite numbers, got shape "
                f"{tuple(mean.shape)}."
            )
        checked[site.name] = mean
    return checked
