"""Is it true? Measures of sub-architectures, and the baselines that they have to beat."""

from __future__ import annotations

from nad_attr.data.labels import own_images
from nad_attr.evaluation.ablation import (
    ABLATIONS,
    Ablation,
    MeanAblation,
    NoiseAblation,
    OtherMeanAblation,
    ResampleAblation,
    ZeroAblation,
    fit_ablation,
)
from nad_attr.evaluation.controls.planted import PlantedCircuit, PlantedScore, planted
from nad_attr.evaluation.controls.planted_networks import PLANTED_KINDS
from nad_attr.evaluation.controls.planted_transformer import planted_heads
from nad_attr.evaluation.controls.randomisation import (
    cascading_randomisation,
    random_weights,
    shuffled_labels,
)
from nad_attr.evaluation.controls.sanity import Control, SanityReport, sanity
from nad_attr.evaluation.controls.stability import Stability, stability
from nad_attr.evaluation.evaluating import evaluate, random_architectures
from nad_attr.evaluation.figures.curves import plot_curves
from nad_attr.evaluation.figures.gates import plot_architecture, plot_overlap, plot_sizes
from nad_attr.evaluation.measures import (
    auc,
    balanced_accuracy,
    balanced_weights,
    fidelity,
    fit_threshold,
    r_squared,
    spearman,
)
from nad_attr.evaluation.paired import paired_interval
from nad_attr.evaluation.questions.depth import DepthProfile, NetworkProfile, along_depth
from nad_attr.evaluation.questions.error_ranks import (
    PartialCorrelation,
    RankStatistics,
    error_ranks,
    partial_rank_correlation,
)
from nad_attr.evaluation.questions.error_study import ErrorStudy, Voting
from nad_attr.evaluation.questions.errors import SIMILARITIES, errors
from nad_attr.evaluation.questions.explanation import ErrorExplanation, SharedSite, explain_error
from nad_attr.evaluation.questions.mosaic_result import MosaicResult
from nad_attr.evaluation.questions.mosaics import mosaics, quadrant_shares
from nad_attr.evaluation.responses import Responses, site_fidelity, sweep
from nad_attr.evaluation.result import Evaluation
from nad_attr.evaluation.rivals import SCORERS, best_variant, best_variants
from nad_attr.evaluation.sizes import SiteCosts, flop_size, parameter_size, site_costs
from nad_attr.evaluation.sweeps.curves import (
    MIB_SIZES,
    Curves,
    area_under,
    circuit_areas,
    completeness,
    curves,
    faithfulness,
)
from nad_attr.evaluation.sweeps.size_sweep import SizeSweep, size_sweep
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
    CaptumLayerScorer,
    InternalInfluenceScorer,
    LayerActivationScorer,
    LayerConductanceScorer,
    LayerDeepLiftScorer,
    LayerGradientXActivationScorer,
    LayerIntegratedGradientsScorer,
)
from nad_attr.scoring.given_scorers import GatesScorer, GivenScorer, OtherTaskScorer, shuffled
from nad_attr.scoring.learned_scorers import CDRPScorer
from nad_attr.scoring.magnitude import MagnitudeScorer
from nad_attr.scoring.path_scorers import EAPIGScorer
from nad_attr.scoring.scorer import Batch, ChannelScorer, TaskScorer, tasks_of
from nad_attr.scoring.searching import COARScorer, HardConcreteScorer, IterativeScorer, UGSScorer
from nad_attr.scoring.variants import Variant
from nad_attr.scoring.zennit_scorers import LRPScorer, RelPScorer
from nad_attr.stats.bootstrap import bootstrap_interval
from nad_attr.stats.measure_table import MEASURES
from nad_attr.stats.pairs import overlap_matrix

__all__ = [
    "ABLATIONS",
    "MEASURES",
    "MIB_SIZES",
    "PLANTED_KINDS",
    "SCORERS",
    "SIMILARITIES",
    "Ablation",
    "Batch",
    "CDRPScorer",
    "COARScorer",
    "CaptumLayerScorer",
    "CentredEffectScorer",
    "ChannelScorer",
    "Control",
    "Curves",
    "DepthProfile",
    "EAPIGScorer",
    "EnergyScorer",
    "ErrorExplanation",
    "ErrorStudy",
    "Evaluation",
    "GatesScorer",
    "GivenScorer",
    "GradientXActivationScorer",
    "HardConcreteScorer",
    "InternalInfluenceScorer",
    "IterativeScorer",
    "LRPScorer",
    "LayerActivationScorer",
    "LayerConductanceScorer",
    "LayerDeepLiftScorer",
    "LayerGradientXActivationScorer",
    "LayerIntegratedGradientsScorer",
    "MagnitudeScorer",
    "MeanAblation",
    "MosaicResult",
    "NetworkProfile",
    "NeuronMCTScorer",
    "NoiseAblation",
    "OtherMeanAblation",
    "OtherTaskScorer",
    "PartialCorrelation",
    "PlantedCircuit",
    "PlantedScore",
    "RandomScorer",
    "RankStatistics",
    "RelPScorer",
    "ResampleAblation",
    "Responses",
    "SanityReport",
    "SharedSite",
    "SiteCosts",
    "SizeSweep",
    "Stability",
    "TaskScorer",
    "TaylorOutputScorer",
    "TaylorScorer",
    "UGSScorer",
    "Variant",
    "Voting",
    "ZeroAblation",
    "along_depth",
    "area_under",
    "auc",
    "balanced_accuracy",
    "balanced_weights",
    "best_variant",
    "best_variants",
    "bootstrap_interval",
    "cascading_randomisation",
    "circuit_areas",
    "completeness",
    "curves",
    "error_ranks",
    "errors",
    "evaluate",
    "explain_error",
    "faithfulness",
    "fidelity",
    "fit_ablation",
    "fit_threshold",
    "flop_size",
    "mosaics",
    "overlap_matrix",
    "own_images",
    "paired_interval",
    "parameter_size",
    "partial_rank_correlation",
    "planted",
    "planted_heads",
    "plot_architecture",
    "plot_curves",
    "plot_overlap",
    "plot_sizes",
    "quadrant_shares",
    "r_squared",
    "random_architectures",
    "random_weights",
    "sanity",
    "shuffled",
    "shuffled_labels",
    "site_costs",
    "site_fidelity",
    "size_sweep",
    "spearman",
    "stability",
    "sweep",
    "tasks_of",
    "top_k",
]
