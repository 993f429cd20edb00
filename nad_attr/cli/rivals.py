"""Other methods' channels, for the commands that measure them beside gates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from nad_attr import evaluation
from nad_attr.cli.messages import UsageError, say
from nad_attr.cli.opening import Study
from nad_attr.data.labels import Labels, Task, patterns
from nad_attr.data.sources import Data, Source, as_source
from nad_attr.evaluation import own_images, top_k
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.learning.session import fit_constants
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.specs import SpecError
from nad_attr.system.rng import permutation, seed_of

__all__ = ["METHODS", "check_methods", "rivals_of"]

#: Ways to score channels, by the names of their classes in nad_attr.evaluation.
METHODS = {
    "energy": "EnergyScorer",
    "taylor": "TaylorScorer",
    "gradient-x-activation": "GradientXActivationScorer",
    "neuron-mct": "NeuronMCTScorer",
    "magnitude": "MagnitudeScorer",
    "conductance": "LayerConductanceScorer",
    "integrated-gradients": "LayerIntegratedGradientsScorer",
    "internal-influence": "InternalInfluenceScorer",
    "deep-lift": "LayerDeepLiftScorer",
    "lrp": "LRPScorer",
    "relp": "RelPScorer",
    "cdrp": "CDRPScorer",
    "eap-ig": "EAPIGScorer",
    "coar": "COARScorer",
    "hard-concrete": "HardConcreteScorer",
    "ugs": "UGSScorer",
    "iterative": "IterativeScorer",
}


def check_methods(names: Sequence[str] | None) -> list[str]:
    """The methods of ``--with``."""
    unknown = [name for name in names or () if name not in METHODS]
    if unknown:
        raise UsageError(f"--with takes {', '.join(METHODS)}, got {unknown[0]!r}.")
    return list(names or ())


def rivals_of(
    study: Study,
    names: Sequence[str],
    archs: Sequence[SubArchitecture],
    data: Data,
    *,
    n_images: int,
    run: RunOptions,
) -> dict[str, list[SubArchitecture]]:
    """Each method's sub-architectures, of the sizes that those given have.

    Channels are scored on the images, ``n_images`` of each class at most; constants are fitted to
    them if those given have their own, with as many images and passes as the gates' recipe had.
    """
    model, seed, quiet = study.model, study.work.seed, study.work.quiet
    tasks = [arch.task for arch in archs if arch.task is not None]
    source = as_source(data, any_labels=True)
    Runner(model, run).fit(source)
    inputs, labels = _some(source, tasks, n_images, seed)
    found = {}
    for name in names:
        say(f"scoring: {name}, {len(labels)} images", quiet)
        # Learned for the size that is wanted.
        size = sum(arch.size for arch in archs) / len(archs)
        options = {"size": size} if name in ("hard-concrete", "ugs", "iterative") else {}
        scores = getattr(evaluation, METHODS[name])(model, study.gates.sites, **options)(
            inputs, labels, tasks=tasks, include_others=True, run=run
        )
        found[name] = _same_sizes(scores, archs)
        if any(arch.own_constants for arch in archs):
            say(f"fitting constants: {name}", quiet)
            found[name] = fit_constants(
                model, found[name], data, recipe=study.gates.recipe, seed=seed, run=run
            )
    return found


def _some(source: Source, tasks: Sequence[Task], n: int, seed: int) -> tuple[Any, Any]:
    """At most n images of each class (or kind of labels), as scorers take them: in memory."""
    chosen: list[int] = []
    known, place = patterns(source.labels)
    for kind in range(len(known)):
        label = int(known[kind]) if known.ndim == 1 else tuple(known[kind].tolist())
        numbers = (place == kind).nonzero().flatten()
        chosen += numbers[permutation(len(numbers), seed, "compare", label)[:n]].tolist()
    labels = source.labels[chosen]
    missing = [t for t, own in zip(tasks, own_images(labels, tasks), strict=True) if not own.any()]
    if missing:
        raise SpecError(f"there is no image of task {missing[0]} to score channels on.")
    seeded = [(i, seed_of(seed, "compare", i)) for i in chosen]
    parts = list(source.batches(seeded[a : a + 32] for a in range(0, len(seeded), 32)))
    inputs = tuple(torch.cat(items) for items in zip(*parts, strict=True))
    # Rows of a single 1 each would be read as classes.
    given = Labels(labels, kind="several") if labels.ndim == 2 else labels
    return (inputs[0] if len(inputs) == 1 else inputs), given


def _same_sizes(
    scores: dict[str, torch.Tensor], archs: Sequence[SubArchitecture]
) -> list[SubArchitecture]:
    result = []
    for row, arch in enumerate(archs):
        assert arch.task is not None
        own = {name: value[row : row + 1] for name, value in scores.items()}
        result += top_k(own, arch.sites, [arch.task], arch.size, means=arch.means)
    return result
