"""Channels of all sites together: budgets, masks, and how alike two masks are."""

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


def distinct_sites(sites: Sequence[GateSite]) -> tuple[GateSite, ...]:
    """The sites, none of them there twice.

    Raises:
        TypeError: If they are something else.
        ValueError: If one is there twice.
    """
    names = [site.name for site in check_sites(sites)]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"gate site {name!r} is there twice.")
    return tuple(sites)


def budget(size: float, sites: Sequence[GateSite]) -> int:
    """Number of channels that a size keeps: ``round(size * all channels)``, at least one.

    Raises:
        ValueError: If ``size`` is not a number in (0, 1].
    """
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size <= 1:
        raise ValueError(f"size must be a share of the channels in (0, 1], not {size!r}.")
    return max(1, round(size * n_channels(sites)))


def split_sites(flat: Tensor, sites: Sequence[GateSite]) -> dict[str, Tensor]:
    """Cut a (..., all channels) tensor into ``{site name: (..., C)}``."""
    parts = flat.split([site.n_channels for site in sites], dim=-1)
    return {site.name: part for site, part in zip(sites, parts, strict=True)}


def top_k_masks(
    scores: Mapping[str, Tensor], sites: Sequence[GateSite], k: int
) -> dict[str, Tensor]:
    """Keep exactly the ``k`` highest scores over all sites together.

    Equal scores are kept in site and channel order, so the result is a function of the scores.

    Args:
        scores: ``{site name: (..., C)}``, higher is more important; leading axes (tasks) are
            treated one by one.
        sites: Gate sites in forward order.
        k: Channels to keep, over all sites.

    Returns:
        ``{site name: bool (..., C)}`` with ``k`` True in each row.

    Example:
        >>> sites = [GateSite("a", 2, 1), GateSite("b", 2, 1)]
        >>> scores = {"a": torch.tensor([3.0, 1.0]), "b": torch.tensor([1.0, 2.0])}
        >>> masks = top_k_masks(scores, sites, 3)
        >>> masks["a"].tolist(), masks["b"].tolist()
        ([True, True], [False, True])
    """
    flat = torch.cat([scores[site.name] for site in sites], dim=-1)
    order = flat.argsort(dim=-1, descending=True, stable=True)
    mask = torch.zeros_like(flat, dtype=torch.bool).scatter(-1, order[..., :k], True)
    return split_sites(mask, sites)


def jaccard(a: Tensor, b: Tensor) -> float:
    """|A and B| / |A or B| of two boolean masks; 1 if both are empty."""
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 1.0


def kappa(a: Tensor, b: Tensor) -> float:
    """Overlap corrected for chance, ``(J - E J) / (1 - E J)``; 0 for random, 1 for equal masks.

    ``E J = e / (|A| + |B| - e)`` with ``e = |A| |B| / C`` the expected intersection of random
    masks of these sizes. 0/0 is 1 (both full or both empty).

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
    if expected == 1.0:
        return 1.0
    return (jaccard(a, b) - expected) / (1 - expected)


def check_means(
    means: Mapping[str, Tensor] | None, sites: Sequence[GateSite]
) -> dict[str, Tensor] | None:
    """Copies of per-channel means as float32 (C,) on the CPU, checked; None stays None."""
    if means is None:
        return None
    check_mapping(means, "means")
    checked = {}
    for site in sites:
        if site.name not in means:
            raise ValueError(f"means lack gate site {site.name!r}.")
        mean = as_tensor(means[site.name], f"means of {site.name!r}").detach().cpu()
        if mean.is_complex():
            raise ValueError(f"means of {site.name!r} are complex.")
        mean = mean.float().clone()
        if mean.shape != (site.n_channels,) or not bool(torch.isfinite(mean).all()):
            raise ValueError(
                f"means of {site.name!r} must be {site.n_channels} finite numbers, got shape "
                f"{tuple(mean.shape)}."
            )
        checked[site.name] = mean
    return checked
