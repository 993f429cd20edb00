"""Is it true? Measures of sub-architectures, and the baselines that they have to beat."""

from __future__ import annotations

from nad_attr.evaluation.baselines import (
    ChannelScorer,
    EnergyScorer,
    GradientXActivationScorer,
    NeuronMCTScorer,
    RandomScorer,
    TaylorScorer,
    tasks_of,
    top_k,
)
from nad_attr.evaluation.measures import (
    MEASURES,
    Evaluation,
    Responses,
    auc,
    balanced_weights,
    evaluate,
    fidelity,
    own_images,
    r_squared,
    spearman,
    sweep,
)

__all__ = [
    "MEASURES",
    "ChannelScorer",
    "EnergyScorer",
    "Evaluation",
    "GradientXActivationScorer",
    "NeuronMCTScorer",
    "RandomScorer",
    "Responses",
    "TaylorScorer",
    "auc",
    "balanced_weights",
    "evaluate",
    "fidelity",
    "own_images",
    "r_squared",
    "spearman",
    "sweep",
    "tasks_of",
    "top_k",
]
