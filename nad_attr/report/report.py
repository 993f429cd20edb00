"""A report: gates, their results, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from nad_attr.certainty.verdict_result import Verdict
from nad_attr.concepts import UnitConcepts
from nad_attr.data.sources import Data
from nad_attr.evaluation.questions.error_study import ErrorStudy
from nad_attr.evaluation.questions.mosaic_result import MosaicResult
from nad_attr.evaluation.result import Evaluation
from nad_attr.evaluation.sweeps.curves import Curves
from nad_attr.flow.result import InformationFlow
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.report.concepts import units_part
from nad_attr.report.contents import Contents, Results, contents, not_there
from nad_attr.report.measuring import PARTS, measure, sampled
from nad_attr.report.page import page
from nad_attr.report.parts import curves_part, errors_part, flow_part, mosaics_part, statistics_part
from nad_attr.report.saving import STATISTICS, found_results, keep_results
from nad_attr.running.options import RunOptions
from nad_attr.store import GateStore, GateStoreError
from nad_attr.system.files import check_output, write_text

__all__ = ["Report"]


class Report:
    """One page about the gates of a file.

    The page shows the file's other results (evaluations, concepts of units, results kept by an
    earlier report); results that are given here replace them. The page says in a line how to add
    what is missing.

    Args:
        store: A file written by ``nad-attr learn`` or :class:`nad_attr.GateStore`, an open store,
            or task gates.
        evaluation: Measures of these gates, or the name of an evaluation in the file; None:
            "evaluation", or else the first in the file.
        curves: Keep and ablate curves, by the name of the ranking.
        mosaics: Of these gates.
        errors: Of these gates.
        units: Concepts of the channels.
        comparison: Statistics: a result with ``frame()``, a pandas frame, or several of these by
            their titles.
        flow: Of some of the tasks, one or several flows of the same sites.
        verdict: On these gates, from :func:`nad_attr.verdict`: told on the first screen.
        title: Of the page; None: the network's name.

    Attributes:
        gates: The gates.
        results: What is known beside them.
        provenance: Where they come from.

    Raises:
        GateStoreError: If the file cannot be read, or holds no task or no such evaluation.
        TypeError: If an argument is of another kind.
        ValueError: If concepts are of other sites.

    Example:
        >>> import tempfile
        >>> import torch
        >>> from nad_attr.sites import GateSite
        >>> gates = TaskGates(
        ...     {"layer1": torch.tensor([[0.9, 0.2, 0.6], [0.1, 0.2, 0.7]])},
        ...     [GateSite("layer1", 3)], [0, 1], task_names=["cat", "dog"],
        ... )
        >>> report = Report(gates, title="Cats and dogs")
        >>> report
        Report(2 tasks, 1 site, 3 channels; nothing measured)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report.save(f"{folder}/report.html").name
        'report.html'
    """

    def __init__(
        self,
        store: str | PathLike[str] | GateStore | TaskGates,
        *,
        evaluation: Evaluation | str | None = None,
        curves: Curves | Mapping[str, Curves] | None = None,
        mosaics: MosaicResult | None = None,
        errors: ErrorStudy | None = None,
        units: UnitConcepts | None = None,
        comparison: Any = None,
        flow: InformationFlow | Sequence[InformationFlow] | None = None,
        verdict: Verdict | None = None,
        title: str | None = None,
    ) -> None:
        self._path: Path | None = None
        self.provenance: dict[str, Any] = {}
        self.results = Results()
        named = evaluation if isinstance(evaluation, str) else None
        if isinstance(store, TaskGates):
            if named is not None:
                raise TypeError(
                    "evaluation= names a result in a file, and these gates are not in a file."
                )
            self.gates = store
            self.provenance = dict(store.info)
        elif isinstance(store, GateStore):
            self._read(store, named)
        elif isinstance(store, (str, PathLike)):
            with GateStore.open(store) as opened:
                self._read(opened, named)
        else:
            raise TypeError(
                f"store must be a file, a GateStore or TaskGates, got {type(store).__name__}."
            )
        self.title = title
        results = self.results
        for value, kind in ((mosaics, MosaicResult), (errors, ErrorStudy), (units, UnitConcepts)):
            if value is not None and not isinstance(value, kind):
                raise TypeError(f"expected a {kind.__name__}, got {type(value).__name__}.")
        if isinstance(evaluation, Evaluation):
            results.evaluation, results.evaluation_from = evaluation, "as given"
        elif evaluation is not None and not isinstance(evaluation, str):
            raise TypeError(f"evaluation must be an Evaluation, got {type(evaluation).__name__}.")
        if curves is not None:
            by_name = {"these gates": curves} if isinstance(curves, Curves) else curves
            results.curves = curves_part(by_name)
        if mosaics is not None:
            results.mosaics = mosaics_part(mosaics)
        if errors is not None:
            results.errors = errors_part(errors)
        if units is not None:
            results.units = units_part(units, self.gates.sites)
        if comparison is not None:
            tables = comparison if isinstance(comparison, Mapping) else {STATISTICS: comparison}
            results.statistics = {str(name): statistics_part(t) for name, t in tables.items()}
        if verdict is not None:
            if not isinstance(verdict, Verdict):
                raise TypeError(f"verdict must be a Verdict, got {type(verdict).__name__}.")
            results.verdict = verdict
        if flow is not None:
            flows = [flow] if isinstance(flow, InformationFlow) else list(flow)
            if not all(isinstance(one, InformationFlow) for one in flows):
                raise TypeError("flow must be an InformationFlow, or several of them.")
            results.flow = flow_part(flows)

    def _read(self, store: GateStore, evaluation: str | None) -> None:
        if not len(store):
            raise GateStoreError(f"{store.path}: no task is finished yet.")
        self._path = store.path
        self.gates = store.read()
        self.provenance = {**store.info, **store.provenance}
        self.results = found_results(store.path, self.gates.sites, evaluation=evaluation)

    def measure(
        self,
        model: nn.Module,
        data: Data,
        *,
        parts: Sequence[str] | None = None,
        rivals: Mapping[str, TaskGates | Sequence[SubArchitecture]] | None = None,
        n_images: int = 1000,
        n_random: int = 3,
        seed: int = 0,
        run: RunOptions | None = None,
        say: Callable[[str], object] | None = None,
    ) -> Report:
        """Measure what is not known yet, on held-out images.

        At most ``n_images`` images are read, evenly over the classes, into memory. Curves are
        measured on at most 100 of them and 20 tasks. A part that this network or these images do
        not allow is left out with a note on the page.

        Args:
            model: The network, in eval mode; unchanged afterwards.
            data: Images with labels that the gates were not learned on.
            parts: Of "evaluation", "curves", "mosaics", "errors", "flow", "pictures", "where",
                "export"; None: those that are not known yet.
            rivals: ``{name: sub-architectures}`` of other methods, for the evaluation, which is
                measured anew then.
            n_images: At most.
            n_random: Draws of random channels of equal size.
            seed: Of all random numbers.
            run: How to run the network; see :class:`nad_attr.RunOptions`.
            say: Told what is being done.

        Returns:
            This report.

        Raises:
            TypeError: If an argument is of a wrong kind.
            ValueError: If there is no such part, or no image.
        """
        unknown = [part for part in parts or () if part not in PARTS]
        if unknown:
            raise ValueError(f"no part {unknown[0]!r}; there are {', '.join(PARTS)}.")
        if isinstance(n_images, bool) or not isinstance(n_images, int) or n_images < 1:
            raise ValueError(f"n_images must be a positive whole number, got {n_images!r}.")
        if parts is None:
            parts = [part for part in PARTS if not self._known(part)]
            if rivals and "evaluation" not in parts:
                parts = ["evaluation", *parts]
        if parts:
            sample = sampled(data, n_images, seed=seed)
            how: dict[str, Any] = {"n_random": n_random, "seed": seed, "run": run, "say": say}
            measure(model, self.gates, sample, self.results, parts=parts, rivals=rivals, **how)
        return self

    def _known(self, part: str) -> bool:
        if part == "pictures":
            return "top" in (self.results.pictures or {})
        return getattr(self.results, part) is not None

    def keep(self) -> list[str]:
        """Write this report's results into the file of the gates.

        Returns:
            The groups that were written.

        Raises:
            GateStoreError: If the file cannot be written.
            ValueError: If the gates are not in a file.
        """
        if self._path is None:
            raise ValueError(
                "these gates are not in a file, so there is no place to keep results; save them "
                "first."
            )
        return keep_results(self._path, self.results)

    def contents(self) -> Contents:
        """What the page says, as plain values."""
        file = None if self._path is None else self._path.name
        return contents(
            self.gates, self.results, title=self.title, file=file, provenance=self.provenance
        )

    def missing(self) -> list[str]:
        """The parts that are not on the page."""
        return [what for what, _ in not_there(self.gates, self.results, "GATES.h5")]

    def html(self) -> str:
        """The page.

        Raises:
            ImportError: If plotly is missing.
        """
        return page(self.contents())

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page.

        Args:
            path: The file; replaced if it is there.

        Returns:
            The file.

        Raises:
            ImportError: If plotly is missing.
            OSError: If the file cannot be written, or is not a text: neither the gates'
                file nor another HDF5 file is replaced by a page.
        """
        target = check_output(path, "text", [self._path])
        html = self.html()
        write_text(target, html, [self._path])
        return target

    def __repr__(self) -> str:
        known = [part for part in (*PARTS, "units", "statistics") if self._known(part)]
        known = [part for part in known if getattr(self.results, part)]
        sites = f"{len(self.gates.sites)} site" + "s" * (len(self.gates.sites) != 1)
        return (
            f"Report({len(self.gates):,} task{'s' * (len(self.gates) != 1)}, {sites}, "
            f"{self.gates.n_channels:,} channels; {', '.join(known) or 'nothing measured'})"
        )
