"""All rivals by name, and each of them at its best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from nad_attr.data.labels import Task, other_images, own_images
from nad_attr.data.sources import Data, as_source
from nad_attr.evaluation.measures import among, auc
from nad_attr.evaluation.responses import sweep
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.scoring.baselines import (
    CentredEffectScorer,
    EnergyScorer,
    GradientXActivationScorer,
    NeuronMCTScorer,
    RandomScorer,
    TaylorOutputScorer,
    TaylorScorer,
    top_k,
)
from nad_attr.scoring.captum_scorers import (
    InternalInfluenceScorer,
    LayerActivationScorer,
    LayerConductanceScorer,
    LayerDeepLiftScorer,
    LayerGradientXActivationScorer,
    LayerIntegratedGradientsScorer,
)
from nad_attr.scoring.learned_scorers import CDRPScorer
from nad_attr.scoring.magnitude import MagnitudeScorer
from nad_attr.scoring.path_scorers import EAPIGScorer
from nad_attr.scoring.scorer import ChannelScorer, Variants, tasks_of
from nad_attr.scoring.searching import COARScorer, HardConcreteScorer, IterativeScorer, UGSScorer
from nad_attr.scoring.variants import Variant
from nad_attr.scoring.zennit_scorers import LRPScorer, RelPScorer

__all__ = ["SCORERS", "best_variant", "best_variants"]


#: Every rival by the name that benchmarks and the command line know it by; each is called as
#: ``SCORERS[name](model, sites, **options)``.
SCORERS: MappingProxyType[str, Callable[..., ChannelScorer]] = MappingProxyType(
    {
        "random": RandomScorer,
        "magnitude": MagnitudeScorer,
        "energy": EnergyScorer,
        "taylor": TaylorScorer,
        "taylor_output": TaylorOutputScorer,
        "neuron_mct": NeuronMCTScorer,
        "gradient_x_activation": GradientXActivationScorer,
        "centred_effect": CentredEffectScorer,
        "layer_activation": LayerActivationScorer,
        "layer_gradient_x_activation": LayerGradientXActivationScorer,
        "layer_integrated_gradients": LayerIntegratedGradientsScorer,
        "layer_conductance": LayerConductanceScorer,
        "internal_influence": InternalInfluenceScorer,
        "layer_deep_lift": LayerDeepLiftScorer,
        "lrp": LRPScorer,
        "relp": RelPScorer,
        "cdrp": CDRPScorer,
        "eap_ig": EAPIGScorer,
        "coar": COARScorer,
        "hard_concrete": HardConcreteScorer,
        "ugs": UGSScorer,
        "iterative": IterativeScorer,
    }
)


def best_variant(
    scorer: ChannelScorer, scoring: Any, choosing: Data, *, size: float, **options: Any
) -> Variant:
    """The variant of a scorer with the highest own AUC at one size; see :func:`best_variants`.

    Args:
        scorer: The rival.
        scoring: See :func:`best_variants`.
        choosing: See there.
        size: Share of the channels to keep, in (0, 1].
        **options: Further arguments of :func:`best_variants`.

    Example:
        >>> from nad_attr import GateSite
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> images = torch.tensor([[2.0, -9.0], [1.0, -9.0], [0.0, 1.0], [0.0, 3.0]])
        >>> scorer = NeuronMCTScorer(net, [GateSite("0", 2, 1)])
        >>> data = images, torch.tensor([0, 0, 1, 1])
        >>> best = best_variant(scorer, data, data, size=0.5)
        >>> best.name, best.own_auc, len(best.tried)
        ('own images, absolute, over all sites', 1.0, 8)
    """
    return best_variants(scorer, scoring, choosing, sizes=[size], **options)[size]


def best_variants(
    scorer: ChannelScorer,
    scoring: Any,
    choosing: Data,
    tasks: Sequence[Task] | None = None,
    *,
    sizes: Sequence[float],
    means: dict[str, Tensor] | None = None,
    include_others: Sequence[bool] | None = None,
    signed: Sequence[bool] | None = None,
    per_site: Sequence[bool] = (False, True),
    run: RunOptions | None = None,
    **sweep_options: Any,
) -> dict[float, Variant]:
    """A rival at its best: for each size, the variant of its scores with the highest own AUC.

    Scores over own images, or over own and other images; absolute or signed, where they have a
    sign; kept over all sites together or at each site. All scores come from one pass over the
    scoring images, all sub-architectures of a size are run in one pass over the choosing images.
    Choose on other images than the result is reported on, or the rival is flattered.

    Args:
        scorer: The rival.
        scoring: ``(inputs, targets)`` that the scores are made from, as the scorer takes them.
        choosing: Images that the variants are compared on, as :func:`~nad_attr.evaluation.sweep`
            takes them.
        tasks: T tasks; None: the scoring images' classes.
        sizes: Shares of the channels to keep, in (0, 1].
        means: ``{site name: (C,)}``, what replaces a closed channel; None: zero.
        include_others: Which of the two; None: both, as far as they differ.
        signed: Which of the two; None: both, as far as there is a sign.
        per_site: Which of the two.
        run: How to run the network; see :class:`nad_attr.RunOptions`.
        **sweep_options: Further arguments of :func:`~nad_attr.evaluation.sweep`.

    Returns:
        ``{size: variant}``. Of equal ones the first: own images, absolute, over all sites.

    Raises:
        GatingError, SiteError, TypeError, ValueError: As the scorer and ``sweep``; also if there
            are not sizes, or no task has own and other images to choose on.
    """
    if not sizes or not per_site:
        raise ValueError("name at least one size and one way to keep channels (per_site).")
    inputs, targets = scoring
    rows = tasks_of(targets, tasks)
    choice: dict[str, Any] = {} if include_others is None else {"include_others": include_others}
    variants: Variants = scorer.variants(
        inputs, targets, tasks=rows, signed=signed, run=run, **choice
    )
    source = as_source(choosing, any_labels=True)
    Runner(scorer.model, run).fit(source)
    own, others = own_images(source.labels, rows), other_images(source.labels, rows)
    if not bool((own.any(1) & others.any(1)).any()):
        raise ValueError("no task has both own and other images among those to choose on.")
    keys = [(*key, apart) for key in variants for apart in per_site]
    best: dict[float, Variant] = {}
    for size in sizes:
        archs = [
            arch
            for others, sign, apart in keys
            for arch in top_k(
                variants[others, sign], scorer.sites, rows, size, means=means, per_site=apart
            )
        ]
        responses = sweep(scorer.model, archs, choosing, run=run, **sweep_options)
        column = [responses.columns.index(arch.task) for arch in archs if arch.task is not None]
        gated = responses.gated[torch.arange(len(archs), device="cpu"), :, column]
        known = (own | others).repeat(len(keys), 1)
        values = among(known, auc, gated, own.repeat(len(keys), 1))
        means_of = values.reshape(len(keys), len(rows)).nanmean(1).tolist()
        tried = dict(zip(keys, means_of, strict=True))
        key = max(keys, key=lambda k: tried[k])
        best[size] = Variant(
            *key,
            size=size,
            own_auc=tried[key],
            scores=variants[key[0], key[1]],
            sites=scorer.sites,
            tasks=tuple(rows),
            tried=tried,
        )
    return best
