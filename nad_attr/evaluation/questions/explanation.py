"""Why this error: one misclassified image, and what the two sub-architectures share."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nad_attr.data.labels import as_task
from nad_attr.data.sources import as_source
from nad_attr.evaluation.questions.error_study import rank_among_others
from nad_attr.evaluation.questions.errors import Architectures, similarity_of, single_classes
from nad_attr.evaluation.rows import named_architectures
from nad_attr.gating.hooks import gated
from nad_attr.running.forward import Runner, check_classes
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = ["ErrorExplanation", "SharedSite", "explain_error"]


@dataclass(frozen=True)
class SharedSite:
    """What two sub-architectures keep at one site.

    Attributes:
        name: Of the gate site.
        n_channels: Channels of the site.
        shared: Channels that both keep.
        only_right: Channels that only the right class's sub-architecture keeps.
        only_called: Channels that only the called class's keeps.
        jaccard: Shared channels / channels that either keeps.
        kappa: The same beyond what random channels of these numbers share.
    """

    name: str
    n_channels: int
    shared: tuple[int, ...]
    only_right: tuple[int, ...]
    only_called: tuple[int, ...]
    jaccard: float
    kappa: float


@dataclass(frozen=True)
class ErrorExplanation(Result):
    """One misclassified image.

    Attributes:
        right: The image's class y.
        called: The class y' that the network called.
        right_name: Name of y.
        called_name: Name of y'.
        sites: What the two sub-architectures share, site by site.
        similarity: What classes are compared by.
        value: Similarity of y and y'.
        rank: Rank of y' among the other classes, by similarity to y; ties share their mean.
        n_others: Number of other classes.
        overlap: Jaccard index of the two sub-architectures, mean over sites.
        kappa: The same beyond chance.
        logits: ``{network: (output y, output y')}`` for the image: in ``"whole network"``, and in
            the sub-architectures ``"of the right class"`` and ``"of the called class"``.
    """

    right: int
    called: int
    right_name: str
    called_name: str
    sites: tuple[SharedSite, ...]
    similarity: str
    value: float
    rank: float
    n_others: int
    overlap: float
    kappa: float
    logits: dict[str, tuple[float, float]]

    def __str__(self) -> str:
        right, called = _full(self.right, self.right_name), _full(self.called, self.called_name)
        lines = textwrap.wrap(
            f"Called {called} instead of {right}: by {self.similarity} of their sub-architectures, "
            f"{called} is number {self.rank:g} of {self.n_others} in similarity to {right} "
            f"({self.value:.3f}). Over all sites they overlap by {self.overlap:.3f} "
            f"(Jaccard), {self.kappa:.3f} beyond chance (kappa).",
            width=88,
        )
        width = max(len(name) for name in self.logits)
        lines += ["", f"{'outputs'.ljust(width)}  {'right':>8}  {'called':>8}"]
        for name, (own, other) in self.logits.items():
            lines.append(f"{name.ljust(width)}  {own:8.3f}  {other:8.3f}")
        lines += ["", "The sub-architectures share these channels:"]
        for site in self.sites:
            lines.append(
                f"{site.name}: {len(site.shared)} of {site.n_channels} shared "
                f"(Jaccard {site.jaccard:.3f}, kappa {site.kappa:.3f}); "
                f"{len(site.only_right)} only right, {len(site.only_called)} only called"
            )
            if site.shared:
                lines.append(f"    {_listed(site.shared)}")
        return "\n".join(map(shown, lines))

    def summary(self) -> str:
        """The explanation as plain text: the same as ``str``."""
        return str(self)

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                **{"site": site.name, "n_channels": site.n_channels},
                **{part: len(getattr(site, part)) for part in _PARTS},
                **{"jaccard": site.jaccard, "kappa": site.kappa},
            }
            for site in self.sites
        ]

    def frame(self) -> pd.DataFrame:
        """One row per site: how many channels the two sub-architectures share, for pandas.

        Raises:
            ImportError: If pandas is not installed.
        """
        return super().frame().set_index("site")

    def plot(self, axes: Any = None) -> Figure:
        """Channels at each site that both sub-architectures keep, and that only one keeps.

        Args:
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_parts

        names = ("both", f"only {self.right_name}", f"only {self.called_name}")
        parts = {
            name: [len(getattr(site, part)) for site in self.sites]
            for name, part in zip(names, _PARTS, strict=True)
        }
        return plot_parts([site.name for site in self.sites], parts, "channels kept", axes=axes)


_PARTS = ("shared", "only_right", "only_called")


def _full(task: int, name: str) -> str:
    return name if name == str(task) else f"{name} ({task})"


def _listed(channels: Sequence[int], most: int = 16) -> str:
    text = ", ".join(map(str, channels[:most]))
    return text + (f" and {len(channels) - most} more" if len(channels) > most else "")


def _one(image: Any) -> tuple[Tensor, ...]:
    """The image as inputs of a batch of one."""
    inputs = tuple(image) if isinstance(image, (tuple, list)) else (image,)
    if not inputs or not all(isinstance(x, Tensor) and x.ndim > 0 for x in inputs):
        raise TypeError(f"image must be a tensor (or a tuple of them), got {image!r:.60}.")
    # (1, H, W) is a grey image, (1, C, H, W) and (1, F) are batches.
    return tuple(x if len(x) == 1 and x.ndim in (2, 4) else x[None] for x in inputs)


def explain_error(
    model: nn.Module,
    architectures: Architectures,
    image: Any,
    label: int,
    *,
    similarity: str | Any = "kappa",
    size: float | None = None,
    run: RunOptions | None = None,
) -> ErrorExplanation:
    """Explain one misclassified image: what the right and the predicted class have in common.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: As in :func:`nad_attr.evaluation.errors`; the right and the called class
            have to be among them.
        image: The image (C, H, W), or a batch (1, C, H, W) of it; a tuple for several inputs.
        label: Its class.
        similarity: As in :func:`nad_attr.evaluation.errors`.
        size: As in :func:`nad_attr.evaluation.errors`.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The explanation; ``str()`` makes it readable.

    Raises:
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network calls the image right, there is no sub-architecture of the right
            or the called class, or as :func:`nad_attr.evaluation.errors`.

    Example:
        >>> from nad_attr import GateSite, SubArchitecture
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> site, kept = GateSite("0", 3, 1), [[0, 1], [0, 1], [2]]
        >>> archs = [SubArchitecture.from_kept({"0": kept[k]}, [site], task=k) for k in range(3)]
        >>> found = explain_error(net, archs, torch.tensor([0.0, 1.0, 0.0]), label=0)
        >>> found.called, found.rank, found.sites[0].shared
        (1, 1.0, (0, 1))
        >>> print(found)
        Called 1 instead of 0: by kappa of their sub-architectures, 1 is number 1 of 2 in
        similarity to 0 (1.000). Over all sites they overlap by 1.000 (Jaccard), 1.000 beyond
        chance (kappa).
        <BLANKLINE>
        outputs                 right    called
        whole network           0.000     1.000
        of the right class      0.000     1.000
        of the called class     0.000     1.000
        <BLANKLINE>
        The sub-architectures share these channels:
        0: 2 of 3 shared (Jaccard 1.000, kappa 1.000); 0 only right, 0 only called
            0, 1
    """
    given = named_architectures(architectures, size, least=3)
    tasks = single_classes(given)
    what, similarities = similarity_of(architectures, given, similarity)
    y = as_task(label)
    if not isinstance(y, int):
        raise TypeError(f"label must be one class index, got {label!r}.")
    if y not in tasks:
        raise ValueError(
            f"there is no sub-architecture of class {y}; there are {list(tasks[:20])}. Learn gates "
            f"of task {y} as well."
        )
    inputs = _one(image)
    as_source((inputs, torch.tensor([y], device="cpu")))  # refuses NaN and what is not an image
    runner = Runner(model, run)
    inputs = runner.to_device(inputs)
    with torch.no_grad():
        outputs = runner(inputs)[0].cpu()
        check_classes(torch.tensor([y], device="cpu"), tasks, len(outputs))
        if bool(outputs.isnan().any()):
            raise ValueError("the network gives NaN for the image.")
        called = int(outputs.argmax())
        if called == y:
            raise ValueError(
                f"the network calls the image {y}, which is right: there is no error to explain."
            )
        if called not in tasks:
            raise ValueError(
                f"the network calls the image {called}, and there is no sub-architecture of "
                f"{called}; there are "
                f"{list(tasks[:20])}. Learn gates of task {called} as well, or take an image that "
                "the network calls one of these."
            )
        rows = tasks.index(y), tasks.index(called)
        right, wrong = (given.architectures[row] for row in rows)
        logits = {"whole network": (float(outputs[y]), float(outputs[called]))}
        for name, arch in (("of the right class", right), ("of the called class", wrong)):
            with gated(runner.model, arch):
                inside = runner(inputs)[0].cpu()
            logits[name] = float(inside[y]), float(inside[called])
    jaccards, kappas = right.overlaps(wrong), right.overlaps(wrong, chance_corrected=True)
    parts = [part.kept for part in (right & wrong, right - wrong, wrong - right)]

    def shared_at(site: GateSite) -> SharedSite:
        name, n = site.name, site.n_channels
        shared, only_right, only_called = (tuple(kept[name].tolist()) for kept in parts)
        return SharedSite(name, n, shared, only_right, only_called, jaccards[name], kappas[name])

    return ErrorExplanation(
        right=y,
        called=called,
        right_name=given.task_names[rows[0]],
        called_name=given.task_names[rows[1]],
        sites=tuple(map(shared_at, given.sites)),
        similarity=what,
        value=float(similarities[rows]),
        rank=rank_among_others(similarities, *rows),
        n_others=len(tasks) - 1,
        overlap=right.overlap(wrong),
        kappa=right.overlap(wrong, chance_corrected=True),
        logits=logits,
    )
