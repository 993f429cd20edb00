"""Is it the method or the measure? Controls in which there is little or nothing to find.

A sub-architecture of a trained network has to tell images of its class from others better than
random channels do. With random weights, or with random labels in the measurement, it must not: a
gain that stays comes from the method or the measure, not from the network (Adebayo et al., "Sanity
Checks for Saliency Maps", NeurIPS 2018, for attribution maps). Only gates are trained here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import nn

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.data.sources import Data
from nad_attr.evaluation.controls.randomisation import (
    cascading_randomisation,
    for_copies,
    random_weights,
    shuffled_labels,
)
from nad_attr.evaluation.controls.stability import (
    Learn,
    Stability,
    architectures_of,
    stability,
    tasks_named,
)
from nad_attr.evaluation.evaluating import evaluate
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import check_eval
from nad_attr.running.options import RunOptions
from nad_attr.stats.bootstrap import bootstrap_interval
from nad_attr.stats.results import Result
from nad_attr.stats.tables import FloatArray, nan_mean
from nad_attr.system.rng import seed_of
from nad_attr.system.safe_text import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Control", "SanityReport", "sanity"]

#: The largest gain in own AUC that counts as none, and the level of the test that says so.
MARGIN, ALPHA = 0.05, 0.05
#: Words for what :meth:`SanityReport.vanishes` returns.
_VERDICTS = {True: "gone", False: "there", None: "unknown"}


@dataclass(frozen=True, eq=False)
class Control:
    """Learned sub-architectures against random ones of equal size, in one network.

    Attributes:
        name: "trained network", "random weights", "labels shuffled for learning", "labels
            shuffled for measuring" or "random down to LAYER".
        whole_auc: float64 (D, T), own AUC of the whole network in each of D draws of the control.
        own_auc: float64 (D, T), of the learned sub-architectures.
        random_auc: float64 (D, T), mean over random sub-architectures of the same size.
        fidelity: float64 (D, T), of the learned sub-architectures.
        random_fidelity: float64 (D, T), mean over random ones.
    """

    name: str
    whole_auc: FloatArray
    own_auc: FloatArray
    random_auc: FloatArray
    fidelity: FloatArray
    random_fidelity: FloatArray

    _AXES: ClassVar[Mapping[str, str]] = {
        **dict.fromkeys(("whole_auc", "own_auc", "random_auc"), "D T"),
        **dict.fromkeys(("fidelity", "random_fidelity"), "D T"),
    }

    @property
    def gain(self) -> FloatArray:
        """(D, T), own AUC above that of random channels."""
        return self.own_auc - self.random_auc

    @property
    def interval(self) -> tuple[float, float]:
        """95 % bootstrap interval of the mean gain over tasks; NaN with fewer than two."""
        return bootstrap_interval(self.gain)

    def equivalence_p(self, margin: float = MARGIN) -> float:
        """P-value of "the mean gain over tasks is at least ``margin`` away from zero".

        The larger one of two one-sided t-tests (TOST) over tasks, each task's gain being the mean
        over draws. A small value shows that the gain is within the margin; a large one shows
        nothing.

        Args:
            margin: The largest gain, in AUC and on either side of zero, that counts as none.

        Returns:
            In [0, 1]; NaN with fewer than two tasks whose gain is known.

        Raises:
            ValueError: If the margin is not above zero.

        Source:
            Schuirmann 1987 (two one-sided tests).
        """
        if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not margin > 0:
            raise ValueError(f"margin must be a gain in AUC above 0, got {margin!r}.")
        from scipy import stats  # takes long to load

        gains = nan_mean(self.gain)
        gains = gains[~np.isnan(gains)]
        if len(gains) < 2:
            return math.nan
        if np.ptp(gains) == 0:  # no spread, no t
            return 0.0 if abs(gains[0]) < margin else 1.0
        above = stats.ttest_1samp(gains, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(gains, margin, alternative="less").pvalue
        return float(max(above, below))


@dataclass(frozen=True)
class SanityReport(Result):
    """The gain where there is nothing to be found. See :func:`sanity`.

    Its table (:meth:`frame`) has one row per control, draw and task.

    Attributes:
        tasks: T tasks.
        controls: The trained network first, then the controls.
        stability: See :func:`stability`; None if it was not asked for.
    """

    tasks: tuple[Task, ...]
    controls: tuple[Control, ...]
    stability: Stability | None = field(default=None)

    def __getitem__(self, name: str) -> Control:
        """The control of that name; a KeyError if there is none."""
        for control in self.controls:
            if control.name == name:
                return control
        names = ", ".join(repr(control.name) for control in self.controls)
        raise KeyError(f"no control {name!r}; there are {names}.")

    def vanishes(self, name: str, *, margin: float = MARGIN) -> bool | None:
        """Whether a control's gain is gone: shown to be within a margin of zero.

        A wide interval around zero does not show that there is no gain, so this is an equivalence
        test (:meth:`Control.equivalence_p`, at 5 %).

        Args:
            name: The control's.
            margin: The largest gain, in AUC and on either side of zero, that counts as none.

        Returns:
            True: the gain is within the margin. False: there is one; the 95 % interval leaves out

            zero. None: unknown, because there are too few tasks or they differ too much.

        Raises:
            KeyError: If there is no such control.
            ValueError: If the margin is not above zero.
        """
        control = self[name]
        if control.equivalence_p(margin) <= ALPHA:
            return True
        low, high = control.interval
        return False if low > 0 or high < 0 else None

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"control": control.name, "draw": d, "task": task}
            | {name: getattr(control, name)[d, t] for name in _COLUMNS}
            for control in self.controls
            for d in range(len(control.own_auc))
            for t, task in enumerate(self.tasks)
        ]

    def summary(self) -> str:
        """A table as plain text, means over draws and tasks, with the 95 % interval of the gain."""
        width = max(len(control.name) for control in self.controls)
        head = f"{'':<{width}}  whole  own AUC  random   gain  95 % from     to  fidelity  random"
        head += "  verdict"
        lines = [head, "-" * len(head)]
        for control in self.controls:
            low, high = control.interval
            means = [_mean(getattr(control, name)) for name in _COLUMNS]
            whole, own, random, gain, fidelity, random_fidelity = means
            lines.append(
                f"{control.name:<{width}}  {whole:5.3f}  {own:7.3f}  {random:6.3f}  {gain:+5.3f}  "
                f"{low:+9.3f} {high:+6.3f}  {fidelity:8.3f}  {random_fidelity:6.3f}  "
                f"{_VERDICTS[self.vanishes(control.name)]}"
            )
        level = f"{100 * ALPHA:g} %"
        lines += [
            f"(gone: within {MARGIN:g} of zero by two one-sided t-tests over tasks at {level};",
            " there: the 95 % interval leaves out zero; unknown: neither)",
        ]
        text = "\n".join(map(shown, lines))
        return text if self.stability is None else f"{text}\n\n{self.stability.summary()}"

    def _derived(self) -> dict[str, Any]:
        verdicts = {}
        for control in self.controls:
            means = {name: _mean(getattr(control, name)) for name in _COLUMNS}
            verdicts[control.name] = {
                **{"means": means, "gain_interval_95": control.interval},
                **{"vanishes": self.vanishes(control.name), "margin": MARGIN},
                "equivalence_p": control.equivalence_p(),
            }
        return {"verdicts": verdicts}

    def plot(self, axes: Any = None) -> Figure:
        """The gain in own AUC of each control with its 95 % interval over tasks.

        Args:
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.plots.style import plot_intervals

        rows = {control.name: (_mean(control.gain), *control.interval) for control in self.controls}
        return plot_intervals(rows, "own AUC above that of random channels", at=0.0, axes=axes)

    def __repr__(self) -> str:
        gains = ", ".join(f"{c.name} {_mean(c.gain):+.3f}" for c in self.controls)
        return f"SanityReport(gain in own AUC over random channels: {gains})"


_COLUMNS = ("whole_auc", "own_auc", "random_auc", "gain", "fidelity", "random_fidelity")


def sanity(
    model: nn.Module,
    learn: Learn,
    data: Data,
    held_out: Data,
    *,
    seed: int = 0,
    n_random: int = 10,
    n_networks: int = 3,
    stages: int = 3,
    seeds: Sequence[int] = (),
    images_per_class: Sequence[int] = (),
    run: RunOptions | None = None,
) -> SanityReport:
    """Run the controls: is what ``learn`` finds a fact of the trained network?

    They measure the own AUC of the learned sub-architectures above that of random channels of the
    same size, in

    * the trained network;
    * "random weights": networks with all weights drawn anew. Has to vanish
      (:meth:`SanityReport.vanishes`);
    * "labels shuffled for learning": gates learned with wrong labels, measured with right ones.
      A gain that is left does not come from labels. The default recipe keeps the network's own
      output and uses labels only to choose images, so it may lose little here;
    * "labels shuffled for measuring": the trained network's gates, measured with wrong labels. Has
      to vanish for every method, or the measure is at fault;
    * "random down to LAYER": weights drawn anew from the output down, some layers at a time.

    Args:
        model: The network, in eval mode; unchanged by anything but ``learn``, which gets this
            network and copies of it.
        learn: Called as ``learn(model, data, seed)``; returns task gates or sub-architectures, of
            the same tasks each time. Any method goes, channel scorers included.
        data: Images to learn on.
        held_out: Images to measure on.
        seed: Of weights, labels, random channels and of ``learn``.
        n_random: Random sub-architectures of each task.
        n_networks: Random networks, and deals of labels.
        stages: Networks between the trained and the random one; 0 for none.
        seeds: Two or more: run :func:`stability` with these.
        images_per_class: For :func:`stability`.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The report.

    Raises:
        TypeError: If ``learn`` is not a function or returns something else.
        ValueError: If the network is in train mode, or a number has no sensible value.

    Example:
        >>> from nad_attr.evaluation import EnergyScorer, planted, top_k
        >>> known = planted("plain", n_classes=2, circuit_width=2, width=8, n_images=20)
        >>> def by_energy(model, data, seed):
        ...     scores = EnergyScorer(model, known.sites)(*data)
        ...     return top_k(scores, known.sites, known.tasks, known.size)
        >>> report = sanity(
        ...     known.model, by_energy, known.data, known.held_out, n_networks=1, stages=1
        ... )
        >>> [control.name for control in report.controls][:2]
        ['trained network', 'random weights']
    """
    if not callable(learn):
        raise TypeError(f"learn must be a function of (model, data, seed), got {learn!r:.60}.")
    check_count(n_random, "n_random")
    check_count(n_networks, "n_networks")
    check_count(stages, "stages", least=0)
    check_eval(model)
    run = for_copies(run)

    def found(network: nn.Module, images: Data) -> list[SubArchitecture]:
        return architectures_of(learn(network, images, seed))

    def measured(
        network: nn.Module, archs: Sequence[SubArchitecture], images: Data
    ) -> list[FloatArray]:
        """Own AUC of whole, learned and random, and fidelity of learned and random, each (T,)."""
        result = evaluate(network, archs, images, n_random=n_random, seed=seed, run=run)
        random_auc = np.mean([random.own_auc for random in result.random], axis=0)
        random_fidelity = np.mean([random.fidelity for random in result.random], axis=0)
        found = [result.whole.own_auc, result.own_auc, random_auc, result.fidelity]
        return [*found, random_fidelity]

    archs = found(model, data)
    tasks = tasks_named(archs)
    rows = {"trained network": [measured(model, archs, held_out)]}
    draws = [seed_of("sanity", seed, i) for i in range(n_networks)]
    rows["random weights"] = []
    for draw in draws:
        network = random_weights(model, draw, data=data, run=run)
        rows["random weights"].append(measured(network, found(network, data), held_out))
    rows["labels shuffled for learning"] = [
        measured(model, found(model, shuffled_labels(data, draw)), held_out) for draw in draws
    ]
    rows["labels shuffled for measuring"] = [
        measured(model, archs, shuffled_labels(held_out, draw)) for draw in draws
    ]
    if stages:
        # All of the last one is random: it is measured above.
        options: dict[str, Any] = {"seed": draws[0], "stages": stages + 1, "run": run}
        for layer, network in list(cascading_randomisation(model, data, **options))[:-1]:
            name = f"random down to {layer}"
            rows[name] = [measured(network, found(network, data), held_out)]
    controls = tuple(
        Control(name, *(np.stack(column) for column in zip(*parts, strict=True)))
        for name, parts in rows.items()
    )
    again = None
    if len(seeds) > 1:
        again = stability(model, learn, data, seeds=seeds, images_per_class=images_per_class)
    return SanityReport(tasks, controls, again)


def _mean(values: FloatArray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else math.nan
