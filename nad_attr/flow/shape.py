"""The shape of a flow: how much goes straight, how far it spreads, where classes part.

These are numbers for the paper's third question, "how does the type of connection change the flow
of information?", each beside a null in which channels are permuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
import torch

from nad_attr.flow.links import OUTPUT, TaskFlow
from nad_attr.flow.result import InformationFlow, stacked, task_flows
from nad_attr.stats.tables import FloatArray, pandas
from nad_attr.system.rng import seed_of

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["flow_shape", "flow_sharing", "parting_depth"]


def spread(flow: FloatArray) -> float:
    """How evenly each channel's flow spreads over the next site, 0 (one channel) to 1 (all alike).

    For a flow (channels, channels of the next site), this is the entropy of each row's absolute
    flows over the logarithm of their number, weighted by the row's sum.

    Example:
        >>> spread(np.array([[1.0, -1.0], [0.0, 0.0]])), spread(np.array([[2.0, 0.0]]))
        (1.0, 0.0)
    """
    size = np.abs(flow)
    total = size.sum(1)
    if size.shape[1] < 2 or total.sum() == 0:
        return math.nan
    share = size[total > 0] / total[total > 0, None]
    entropy = -(share * np.log(np.where(share > 0, share, 1.0))).sum(1) / math.log(size.shape[1])
    return float(np.average(entropy, weights=total[total > 0])) + 0.0


def similarity(one: FloatArray, other: FloatArray) -> float:
    """Sum of the smaller over sum of the larger absolute flows, flows of unlike signs as unlike.

    Example:
        >>> similarity(np.array([1.0, -2.0]), np.array([1.0, 2.0]))
        0.2
    """
    one, other = (values / max(float(np.abs(values).sum()), 1e-300) for values in (one, other))
    low = np.where(one * other > 0, np.minimum(np.abs(one), np.abs(other)), 0.0).sum()
    return float(low / (np.abs(one).sum() + np.abs(other).sum() - low))


def _generator(seed: int, *parts: object) -> np.random.Generator:
    return np.random.default_rng(seed_of(seed, "flow", *parts))


def flow_shape(flow: TaskFlow, *, n_null: int = 100, seed: int = 0) -> pd.DataFrame:
    """How the flow of a task goes from site to site.

    Args:
        flow: Measured with ``receivers=None``, so that spread is over single channels.
        n_null: Draws of the null: the sources of each receiving channel permuted, each channel's
            by itself, which leaves how much each receives and from how many.
        seed: Of the draws.

    Returns:
        A pandas frame, a row for each link between sites: ``source_site, target_site, depth``
        (0 to 1 over sites), ``size`` (sum of absolute flow), ``straight`` (the share of it that
        takes shortcuts; NaN if unknown), ``spread``, ``spread_null`` (mean), ``spread_p`` (share
        of draws as low, with one added to both).

    Raises:
        ValueError: If channels were not told apart as receivers.
    """
    order = list(flow.effects)
    rows = []
    for link in flow.links:
        if link.target_site == OUTPUT:
            continue
        if link.n_rest:
            raise ValueError(
                f"{link.n_rest} receiving channels of {link.target_site!r} were not told apart; "
                "measure with receivers=None."
            )
        values = link.flow[:, :-1].numpy()
        size = float(np.abs(values).sum())
        straight = link.straight[:, :-1].numpy()
        own = spread(values)
        generator = _generator(seed, link.source_site, link.target_site)
        null = [spread(generator.permuted(values, axis=0)) for _ in range(n_null)]
        rows.append(
            {
                "source_site": link.source_site,
                "target_site": link.target_site,
                "depth": order.index(link.target_site) / max(1, len(order) - 1),
                "size": size,
                "straight": float(np.abs(straight).sum()) / size if size else math.nan,
                "spread": own,
                "spread_null": float(np.mean(null)) if null else math.nan,
                "spread_p": (1 + sum(draw <= own for draw in null)) / (1 + n_null),
            }
        )
    return pandas("flow_shape").DataFrame(rows)


def flow_sharing(
    flows: Sequence[TaskFlow | InformationFlow],
    *,
    top: float = 0.05,
    n_null: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """What the flows of several classes share, from site to site.

    Args:
        flows: Of the same network and sites, measured with ``receivers=None``.
        top: The share of a class's edges that counts as its own.
        n_null: Draws of the null: the channels of both sites permuted, each class's by itself.
        seed: Of the draws.

    Returns:
        A pandas frame, a row for each link: ``source_site, target_site, depth, similarity`` (mean
        over pairs of classes; 1 for equal flows), ``similarity_null``, ``reuse`` (of a class's
        strongest edges, those that are among the strongest of at least half of the other classes),
        ``reuse_null``.

    Raises:
        ValueError: If there are less than two classes, or their sites differ.
    """
    every = task_flows(flows)
    if len(every) < 2:
        raise ValueError(f"sharing is between two classes or more, not {len(every)}.")
    pairs = [(link.source_site, link.target_site) for link in every[0].links]
    if any([(k.source_site, k.target_site) for k in f.links] != pairs for f in every):
        raise ValueError("the flows are of different sites.")
    order = list(every[0].effects)
    rows = []
    for site, after in pairs:
        if after == OUTPUT:
            continue
        values = stacked(every, site, after)
        generator = _generator(seed, "sharing", site, after)
        null = []
        for _ in range(n_null):
            orders = ([generator.permutation(n) for n in v.shape] for v in values)
            moved = [v[a][:, b] for v, (a, b) in zip(values, orders, strict=True)]
            null.append(_shared(np.array(moved), top))
        own = _shared(values, top)
        low = np.mean(null, axis=0) if null else np.full(2, math.nan)
        rows.append(
            {
                "source_site": site,
                "target_site": after,
                "depth": order.index(after) / max(1, len(order) - 1),
                "similarity": own[0],
                "similarity_null": float(low[0]),
                "reuse": own[1],
                "reuse_null": float(low[1]),
            }
        )
    return pandas("flow_sharing").DataFrame(rows)


def _shared(values: FloatArray, top: float) -> tuple[float, float]:
    flat = torch.from_numpy(values.reshape(len(values), -1))
    alike = [
        similarity(flat[a].numpy(), flat[b].numpy()) for a, b in combinations(range(len(flat)), 2)
    ]
    k = max(1, round(top * flat.shape[1]))
    strongest = torch.zeros_like(flat, dtype=torch.bool).scatter(
        1, flat.abs().topk(k, dim=1).indices, True
    )
    others = strongest.sum(0) - strongest.int()
    reused = strongest & (others >= math.ceil((len(flat) - 1) / 2)) & (others > 0)
    return float(np.mean(alike)), float((reused.sum(1) / k).double().mean())


def parting_depth(sharing: pd.DataFrame) -> float:
    """The depth, 0 to 1, from which on two classes share less than half of what they shared first.

    Args:
        sharing: See :func:`flow_sharing`. What the null shares is taken off first.

    Returns:
        Linear between sites; NaN if they never part so far.
    """
    above = (sharing.similarity - sharing.similarity_null).to_numpy()
    depth = sharing.depth.to_numpy()
    half = above[0] / 2
    for i in range(1, len(above)):
        if above[i] < half:
            share = (above[i - 1] - half) / max(above[i - 1] - above[i], 1e-300)
            return float(depth[i - 1] + share * (depth[i] - depth[i - 1]))
    return math.nan
