"""What units mean, measured or imported, and how gates relate to it."""

from nad_attr.concepts.comparing.comparing import compare
from nad_attr.concepts.comparing.depth import DepthSemantics, semantics_along_depth
from nad_attr.concepts.comparing.enrichment import concept_enrichment
from nad_attr.concepts.comparing.result import Comparison
from nad_attr.concepts.comparing.semantics import (
    classifier_similarity,
    confusion_similarity,
    mantel,
    wordnet_similarity,
)
from nad_attr.concepts.datasets.colours import COLOURS, WithColours, colour_map
from nad_attr.concepts.datasets.readers import (
    CAMVID,
    VOC,
    ADE20KData,
    BrodenData,
    ConceptDataError,
    MaskData,
    VOCData,
)
from nad_attr.concepts.dissection.dissecting import dissect
from nad_attr.concepts.dissection.unit_pictures import draw_unit, unit_masks
from nad_attr.concepts.importers.programs import (
    import_clip_dissect,
    import_condi99,
    import_dissect_report,
    import_netdissect_lite,
)
from nad_attr.concepts.importers.reading import ImportFileError
from nad_attr.concepts.unit_concepts import Concept, UnitConcepts
from nad_attr.stats.agreement import (
    kendall,
    overlap_above_chance,
    rank_agreement,
    rank_biased_overlap,
    rbo_weight,
)
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
