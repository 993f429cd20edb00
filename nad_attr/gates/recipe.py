"""Recipes: how gates are learned, as plain values that can be stored and compared."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["PaperRecipe", "Recipe"]

#: Weight of the size term for each (architecture, dataset) of the released code.
_PAPER_BETA = {
    ("vgg16", "imagenet"): 4.5,
    ("vgg16", "places365"): 5.0,
    ("resnet50", "imagenet"): 0.02,
    ("resnet50", "places365"): 0.02,
    ("densenet121", "imagenet"): 0.02,
    ("densenet121", "places365"): 0.02,
    ("darts", "imagenet"): 0.45,
    ("darts", "places365"): 0.20,
}

#: Settings whose default depends on the ablation, and the default unless it is "optimal".
FOLLOWING: dict[Literal["free_scale", "boundary"], float] = {"free_scale": 0.3, "boundary": 0.9}


#: Of the steps, the share of all replicas together, and the fewest of one.
REPLICAS_SHARE, LEAST_STEPS = 0.48, 4


def most_replicas(steps: int) -> int:
    """As many replicas as so many steps have room for; one at least.

    Example:
        >>> most_replicas(100), most_replicas(40)
        (12, 4)
    """
    return max(1, int(REPLICAS_SHARE * steps) // LEAST_STEPS)


def _check_number(name: str, value: object, low: float, high: float = math.inf) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not ok or not math.isfinite(value):  # type: ignore[arg-type]
        limit = f"from {low:g}" + (f" to {high:g}" if high < math.inf else " on")
        raise ValueError(f"recipe: {name} must be a number {limit}, got {value!r}.")


def _check_count(name: str, value: object, low: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"recipe: {name} must be a whole number from {low} on, got {value!r}.")


def _settable(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init]


@dataclass(frozen=True)
class Recipe:
    """How gates are learned: the default recipe.

    It minimises the mean squared difference of the task output between sub-architecture and whole
    network, with exactly the asked number of channels, over as many own as other images. Images
    near the boundary between own and other count most, and part of a difference in scale and
    offset is forgiven. A sub-architecture that always answers the class has a high loss, and so
    has one whose output hardly changes. Channels are closed one by one, by a quadratic model of
    what closing does (see :mod:`nad_attr.learning.selection`).

    Attributes:
        size: Kept channels / all channels over all sites, in (0, 1]; reached exactly. None: 0.5,
            or with ``fidelity`` the smallest that keeps it.
        ablation: What replaces a closed channel: its "mean" over data, "zero", or the "optimal"
            constant of each task, which is learned together with the gates.
        steps: Steps per task. None: 100, with ``fidelity`` 350.
        images_per_step: Images per task and step, half of them own images. ``steps *
            images_per_step`` images pass the gated network for each task.
        removal: Share of the steps in which channels are closed; later steps exchange channels.
        memory: Weight of earlier steps' images, per step. With 1 nothing is forgotten, and memory
            grows with ``steps``.
        trust: Penalty on a change of gates, because the model is estimated from gradients.
        free_scale: Share of a difference in scale and offset alone that is forgiven, in [0, 1].
            The more of the task output's variance no scale can mend, the more is forgiven (0.3
            becomes 0.9). 0: the values of the task output count (highest fidelity); 1: only what
            rises and falls with it. None: by the ablation, see :meth:`fitting`.
        boundary: How much less images count that are far from the class's boundary, in [0, 1].
            0: all count the same (highest fidelity). None: by the ablation.

        fidelity: In place of ``size``: the fidelity to keep, in (0, 1). Each task gets the smallest
            size that keeps it on a third of the images, which are not learned from, so that
            another measurement on as many fresh images reaches it with the probability
            ``confidence``. One run tries 14 sizes from 1 to 0.05
            (:mod:`nad_attr.learning.targets`). A task for which no size below 1 is shown to keep
            it keeps all channels.
        confidence: Of ``fidelity``.
        mirror: Whether mirrored images (left for right) are used as well. None: with the optimal
            constants, for tasks with fewer than 50 own images, if the network gives mirrored
            images nearly the same task output
            (:meth:`nad_attr.learning.session.Session.mirrored`).

        replicas: Short runs of each task that share half of the steps. A last run takes the other
            half and prefers the channels that they rank high. With 8, runs with other seeds agree
            much better, at the same cost and nearly the same quality (docs/findings.md). 1: one
            run.

    Raises:
        ValueError: If a field has no sensible value.

    Example:
        >>> Recipe(size=0.3)
        Recipe(size=0.3, ablation='optimal', steps=100, images_per_step=20)
    """

    size: float = None  # type: ignore[assignment]
    ablation: Literal["mean", "zero", "optimal"] = "optimal"
    steps: int = None  # type: ignore[assignment]
    images_per_step: int = 20
    removal: float = field(default=0.6, repr=False)
    memory: float = field(default=0.9, repr=False)
    trust: float = field(default=0.3, repr=False)
    free_scale: float | None = field(default=None, repr=False)
    boundary: float | None = field(default=None, repr=False)

    fidelity: float | None = field(default=None, repr=False)
    confidence: float = field(default=0.95, repr=False)
    mirror: bool | None = field(default=None, repr=False)
    replicas: int = field(default=1, repr=False)

    def __post_init__(self) -> None:
        self._check()

    def __repr__(self) -> str:
        named = [f.name for f in dataclasses.fields(self) if f.repr]
        if self.fidelity is not None:
            named = ["fidelity", "confidence", *named[1:]]
        return f"Recipe({', '.join(f'{name}={getattr(self, name)!r}' for name in named)})"

    def _check(self) -> None:
        _check_number("confidence", self.confidence, 0, 1)
        if self.confidence in (0, 1):
            raise ValueError("recipe: confidence must lie between 0 and 1.")
        if self.fidelity is None:
            self._default("size", 0.5)
            _check_number("size", self.size, 0, 1)
        else:
            _check_number("fidelity", self.fidelity, 0, 1)
            if self.fidelity in (0, 1):
                raise ValueError("recipe: fidelity must lie between 0 and 1.")
            if self.size is not None:
                raise ValueError(
                    "recipe: fidelity and size cannot both be given, got "
                    f"fidelity={self.fidelity:g} and size={self.size:g}; give one of them "
                    "(size=None leaves it out)."
                )
        if self.size == 0:
            raise ValueError("recipe: size must be above 0: something has to be kept.")
        self._default("steps", 100 if self.fidelity is None else 350)
        if self.ablation not in ("mean", "zero", "optimal"):
            raise ValueError(
                f"recipe: ablation must be 'mean', 'zero' or 'optimal', got {self.ablation!r}."
            )
        _check_count("steps", self.steps)
        _check_count("images_per_step", self.images_per_step, 2)
        _check_number("removal", self.removal, 0, 1)
        _check_number("memory", self.memory, 0, 1)
        _check_number("trust", self.trust, 0)
        for name in FOLLOWING:
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name), 0, 1)
        if self.mirror not in (None, True, False):
            raise ValueError(f"recipe: mirror must be True, False or None, got {self.mirror!r}.")
        _check_count("replicas", self.replicas)
        if self.replicas > most_replicas(self.steps):
            raise ValueError(
                f"recipe: {self.replicas} replicas share {self.steps} steps, and each needs "
                f"{LEAST_STEPS} at least; raise steps or lower replicas."
            )

    @property
    def replica_steps(self) -> tuple[int, int]:
        """Steps of each replica, and of the last run, which follows them.

        Example:
            >>> Recipe(replicas=6).replica_steps
            (8, 52)
        """
        each = int(REPLICAS_SHARE * self.steps) // self.replicas
        return each, self.steps - each * self.replicas

    def fitting(self, name: Literal["free_scale", "boundary"]) -> float:
        """A setting as a number; None is replaced by the default for the ablation.

        ``free_scale`` and ``boundary`` are 0.3 and 0.9 with the ablations "mean" and "zero", and 0
        with "optimal", where a sub-architecture can keep the values of all images. The field
        itself stays None, so that ``dataclasses.replace`` can change the ablation.

        Example:
            >>> Recipe().fitting("boundary"), Recipe(ablation="mean").fitting("boundary")
            (0.0, 0.9)
        """
        value: float | None = getattr(self, name)
        if value is None:
            return 0.0 if self.ablation == "optimal" else FOLLOWING[name]
        return value

    def _default(self, name: str, value: object) -> None:
        if getattr(self, name) is None:
            object.__setattr__(self, name, value)

    @staticmethod
    def paper(
        architecture: str | None = None, dataset: str = "imagenet", **overrides: Any
    ) -> PaperRecipe:
        """The released NAD recipe, exactly (DESIGN 2.1).

        Args:
            architecture: "vgg16", "resnet50", "densenet121" or "darts": the weight ``beta`` of
                the size term that was used for it. Another network needs ``beta=``.
            dataset: "imagenet" or "places365".
            **overrides: Any field of :class:`PaperRecipe`.

        Raises:
            TypeError: If an override is not a field of the paper's recipe.
            ValueError: If the pair is not among the published ones and no ``beta`` is given, or a
                field has no sensible value.

        Example:
            >>> Recipe.paper("vgg16").beta
            4.5
            >>> Recipe.paper(beta=0.5, epochs=2).epochs
            2
        """
        rectified: tuple[str, ...] = ()
        if architecture is not None:
            key = (str(architecture).lower(), str(dataset).lower())
            if key not in _PAPER_BETA:
                known = ", ".join(f"{a} / {d}" for a, d in _PAPER_BETA)
                raise ValueError(
                    f"the paper has no recipe for {architecture} / {dataset}; it has {known}. "
                    "For another network give beta=."
                )
            overrides.setdefault("beta", _PAPER_BETA[key])
            if key[0] == "densenet121":
                # Its last ReLU is a function, called after the module `features`.
                rectified = ("features",)
        elif "beta" not in overrides:
            raise ValueError(
                "Recipe.paper() needs an architecture ('vgg16', 'resnet50', 'densenet121', "
                "'darts') or the weight of the size term, beta=."
            )
        overrides.setdefault("rectified_sites", rectified)
        return PaperRecipe(**overrides)

    def to_json(self) -> str:
        """All fields as JSON, with the kind of recipe."""
        values = {name: getattr(self, name) for name in _settable(type(self))}
        # Without these fields' defaults, earlier versions read the text.
        newer = {"fidelity": None, "confidence": 0.95, "mirror": None, "replicas": 1}
        values = {k: v for k, v in values.items() if k not in newer or v != newer[k]}
        return json.dumps({"kind": type(self).__name__, **values})

    @staticmethod
    def from_json(text: str) -> Recipe:
        """The recipe that :meth:`to_json` wrote.

        Raises:
            ValueError: If it is not such a text.

        Example:
            >>> Recipe.from_json(Recipe(size=0.3).to_json()) == Recipe(size=0.3)
            True
        """
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a recipe written by nad_attr: {error}.") from None
        kinds: dict[str, type[Recipe]] = {"Recipe": Recipe, "PaperRecipe": PaperRecipe}
        if not isinstance(fields, dict) or fields.get("kind") not in kinds:
            raise ValueError("not a recipe written by nad_attr.")
        kind = kinds[fields.pop("kind")]
        known = _settable(kind)
        if set(fields) - set(known):
            raise ValueError(f"unknown recipe fields {sorted(set(fields) - set(known))}.")
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
        if kind is Recipe:  # in earlier versions all images counted the same
            fields.setdefault("boundary", 0.0)
        return kind(**fields)


@dataclass(frozen=True)
class PaperRecipe(Recipe):
    """The released NAD recipe; make it with :meth:`Recipe.paper`.

    Gates are sigmoids of logits drawn from N(0, 1), learned on own images alone. The loss is the
    cross-entropy, plus the squared difference of each site to the whole network, on images that the
    whole network gets right, plus ``beta`` times the mean squared gate. Steps have length 0.1 per
    site. A channel is kept iff its logit is positive, so ``beta`` decides the size.

    Use it for comparison only: it reaches a high recall easily, see the documentation on false
    positives.

    Source: Hu et al., Architecture Disentanglement for Deep Neural Networks, ICCV 2021
    (arXiv 2003.13268), released code.

    Attributes:
        beta: Weight of the size term.
        epochs: Passes over the task's own images.
        images_per_step: Own images per step.
        learning_rate: Length of a step, for each site's logits.
        rectified_sites: Sites whose ReLU is a function that the network calls after them.

    Raises:
        ValueError: If a field has no sensible value.

    Example:
        >>> Recipe.paper("resnet50", "places365").beta
        0.02
    """

    size: float | None = None  # type: ignore[assignment]
    ablation: Literal["mean", "zero", "optimal"] = "zero"
    images_per_step: int = 16
    beta: float = 0.02
    epochs: int = 20
    learning_rate: float = 0.1
    rectified_sites: tuple[str, ...] = ()
    # Fields of the default recipe that have no meaning here.
    steps: None = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    removal: None = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    memory: None = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    trust: None = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    fidelity: None = field(default=None, init=False, repr=False)
    confidence: None = field(default=None, init=False, repr=False)  # type: ignore[assignment]
    mirror: None = field(default=None, init=False, repr=False)
    replicas: int = field(default=1, init=False, repr=False)
    free_scale: None = field(default=None, init=False, repr=False)
    boundary: None = field(default=None, init=False, repr=False)

    def _check(self) -> None:
        if self.size is not None:
            raise ValueError(
                "the paper's recipe takes no size, because beta decides it; cut its gates with "
                "sub_architecture(task, size=...), or use Recipe(size=...)."
            )
        if self.ablation != "zero":
            raise ValueError(
                "the paper's closed channels are zero; give the finished sub-architecture another "
                "ablation value with sub_architecture(task).with_means(means)."
            )
        _check_number("beta", self.beta, 0)
        _check_number("learning_rate", self.learning_rate, 0)
        _check_count("epochs", self.epochs)
        names = self.rectified_sites
        if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"recipe: rectified_sites must be a tuple of names, got {names!r}.")
        _check_count("images_per_step", self.images_per_step)
