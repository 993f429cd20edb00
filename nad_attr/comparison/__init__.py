"""What units mean, measured or imported, and how gates relate to it."""

from nad_attr.comparison.agreement import (
    kendall,
    overlap_above_chance,
    rank_agreement,
    rank_biased_overlap,
    rbo_weight,
)
from nad_attr.comparison.colours import COLOURS, WithColours, colour_map
from nad_attr.comparison.comparing import compare
from nad_attr.comparison.concept_data import (
    CAMVID,
    VOC,
    ADE20KData,
    BrodenData,
    ConceptDataError,
    MaskData,
    VOCData,
)
from nad_attr.comparison.depth import DepthSemantics, semantics_along_depth
from nad_attr.comparison.dissection import dissect
from nad_attr.comparison.enrichment import concept_enrichment
from nad_attr.comparison.importers import (
    ImportFileError,
    import_clip_dissect,
    import_condi99,
    import_dissect_report,
    import_netdissect_lite,
)
from nad_attr.comparison.result import Comparison
from nad_attr.comparison.semantics import (
    classifier_similarity,
    confusion_similarity,
    mantel,
    wordnet_similarity,
)
from nad_attr.comparison.unit_concepts import Concept, UnitConcepts
from nad_attr.comparison.unit_pictures import draw_unit, unit_masks
from nad_attr.stats.tests import (
    Statistic,
    association,
    benjamini_hochberg,
    mann_whitney,
    rank_correlation,
)

__all__ = [
    "CAMVID",
    "COLOURS",
    "VOC",
    "ADE20KData",
    "BrodenData",
    "Comparison",
    "Concept",
    "ConceptDataError",
    "DepthSemantics",
    "ImportFileError",
    "MaskData",
    "Statistic",
    "UnitConcepts",
    "VOCData",
    "WithColours",
    "association",
    "benjamini_hochberg",
    "classifier_similarity",
    "colour_map",
    "compare",
    "concept_enrichment",
    "confusion_similarity",
    "dissect",
    "draw_unit",
    "import_clip_dissect",
    "import_condi99",
    "import_dissect_report",
    "import_netdissect_lite",
    "kendall",
    "mann_whitney",
    "mantel",
    "overlap_above_chance",
    "rank_agreement",
    "rank_biased_overlap",
    "rank_correlation",
    "rbo_weight",
    "semantics_along_depth",
    "unit_masks",
    "wordnet_similarity",
]
