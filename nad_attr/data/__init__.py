"""Images, labels and random numbers: one interface for tensors, datasets, loaders and folders."""

from __future__ import annotations

from nad_attr.data.sources import Data, Draw, Inputs, Source, as_source
from nad_attr.system.rng import isolated_rng, seed_of

__all__ = ["Data", "Draw", "Inputs", "Source", "as_source", "isolated_rng", "seed_of"]
