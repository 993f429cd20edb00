"""The measurements of a report that has the network and images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.data.labels import ReadLabels, own_images, patterns
from nad_attr.data.sources import Source, TensorSource, as_source
from nad_attr.evaluation.evaluating import evaluate
from nad_attr.evaluation.questions.errors import errors
from nad_attr.evaluation.questions.explanation import ErrorExplanation, explain_error
from nad_attr.evaluation.questions.mosaics import mosaics
from nad_attr.evaluation.sweeps.curves import curves
from nad_attr.export.costs import latency
from nad_attr.export.costs import summary as export_summary
from nad_attr.export.exporting import cut
from nad_attr.export.tracing import ExportError, traced
from nad_attr.flow.links import TaskFlow
from nad_attr.flow.measuring import information_flow
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import channel_shape, recorded
from nad_attr.pictures.class_mosaics import class_mosaics
from nad_attr.pictures.figures import coloured_by_class
from nad_attr.report.contents import Results
from nad_attr.report.packing import plain, text64
from nad_attr.report.parts import curves_part, errors_part, flow_part, mosaics_part
from nad_attr.report.pictures import Album, array_picture, encoded
from nad_attr.report.where import where_part
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunOptions
from nad_attr.stats.pairs import overlap_matrix
from nad_attr.system.rng import permutation, seed_of

__all__ = ["PARTS", "Sample", "measure", "sampled"]

#: What can be measured.
PARTS = ("evaluation", "curves", "mosaics", "errors", "flow", "pictures", "where", "export")

#: Sizes of the keep and ablate curves; tasks and images that they are measured on at most.
_SIZES = (0.05, 0.1, 0.2, 0.4, 0.7)
_CURVE_TASKS, _CURVE_IMAGES = 20, 100
#: Classes whose networks are cut out, and seconds that all of them are timed.
_EXPORTED, _SECONDS = 5, 3.0
_MOSAICS, _MOSAIC_PICTURES = 200, 3
#: Pixels of a mosaic's side in the page.
MOSAIC_SIDE = 240
#: Tasks, images of each and receiving channels of each site that the flow is measured on, at most.
FLOW_TASKS, FLOW_IMAGES, FLOW_RECEIVERS = 6, 8, 14
#: Examples of errors, pictures of a channel.
_EXAMPLES, _TOP = 12, 5


class Sample:
    """Some of the images, read into memory once; ``numbers`` are theirs in the source."""

    def __init__(self, source: Source, numbers: list[int], inputs: tuple[Tensor, ...]) -> None:
        self.source, self.numbers, self.inputs = source, numbers, inputs
        rows = torch.tensor(numbers, dtype=torch.long, device="cpu")
        self.labels = source.labels[rows]
        self.targets = None if source.targets is None else source.targets[rows]

    @property
    def data(self) -> TensorSource:
        """The data in the form that evaluation takes."""
        return self._of(slice(None))

    def some(self, n: int) -> TensorSource:
        """At most n of them, evenly over the classes."""
        return self._of(torch.tensor(evenly(self.labels, n, 0), dtype=torch.long, device="cpu"))

    def _of(self, rows: Any) -> TensorSource:
        targets = None if self.targets is None else self.targets[rows]
        read = ReadLabels(self.labels[rows], targets)
        source = TensorSource(tuple(part[rows] for part in self.inputs), read)
        source.fields = self.source.fields
        return source


def evenly(labels: Tensor, n: int, seed: int) -> list[int]:
    """The numbers of at most n images, as many of each class as there are, in turn.

    Example:
        >>> evenly(torch.tensor([0, 0, 0, 1, 0]), 2, seed=0) in ([0, 3], [1, 3], [2, 3], [3, 4])
        True
    """
    turns: list[tuple[int, int, int]] = []
    known, places = patterns(labels)
    for place, label in enumerate(known.tolist() if known.ndim == 1 else range(len(known))):
        own = (places == place).nonzero().flatten()
        order = permutation(len(own), seed, "report", label)
        turns += [(turn, label, int(number)) for turn, number in enumerate(own[order].tolist())]
    return sorted(number for _, _, number in sorted(turns)[:n])


def sampled(data: Any, n_images: int, *, seed: int = 0) -> Sample:
    """Read at most ``n_images`` images, evenly over their classes.

    Raises:
        TypeError: If images cannot come from ``data``.
        ValueError: If it is empty or holds NaN.
    """
    source = as_source(data, any_labels=True)
    if len(source.labels) <= n_images and isinstance(source, TensorSource):
        return Sample(source, list(range(len(source.labels))), source.inputs)
    numbers = evenly(source.labels, n_images, seed)
    draws = [(i, seed_of(seed, "report", i)) for i in numbers]
    parts = list(source.batches(draws[a : a + 64] for a in range(0, len(draws), 64)))
    inputs = tuple(torch.cat(items) for items in zip(*parts, strict=True))
    return Sample(source, numbers, inputs)


def measure(
    model: nn.Module,
    gates: TaskGates,
    sample: Sample,
    results: Results,
    *,
    parts: Sequence[str] = PARTS,
    rivals: Mapping[str, TaskGates | Sequence[SubArchitecture]] | None = None,
    n_random: int = 3,
    seed: int = 0,
    run: RunOptions | None = None,
    say: Callable[[str], object] | None = None,
) -> None:
    """Measure on held-out images and put the results into ``results``.

    A part of :data:`PARTS` that this network or these images do not allow is left out with a note.
    """
    options: dict[str, Any] = {"seed": seed, "run": run}
    tell = say or (lambda text: None)

    def attempt(what: str, make: Callable[[], Any]) -> Any:
        tell(f"measuring {what}")
        try:
            return make()
        except (ExportError, GatingError, TypeError, ValueError) as error:
            results.notes.append(f"No {what.split(' (')[0]}: {' '.join(str(error).split())}")
            return None

    if "evaluation" in parts:
        runs = 1 + n_random + len(rivals or {})
        found = attempt(
            f"evaluation ({len(sample.labels):,} images through {len(gates) * runs:,} "
            "sub-architectures)",
            lambda: evaluate(
                model, gates, sample.data, n_random=n_random, rivals=rivals, **options
            ),
        )
        if found is not None:
            results.evaluation, results.evaluation_from = found, "for this report"
    if "curves" in parts:
        results.curves = attempt("curves", lambda: _curves(model, gates, sample, options))
    if "mosaics" in parts and len(gates) >= 4:
        results.mosaics = attempt(
            "mosaics",
            lambda: mosaics_part(mosaics(model, gates, sample.data, n=_MOSAICS, **options)),
        )
    if "mosaics" in parts and results.mosaics is not None:
        results.mosaics["examples"] = (
            attempt("mosaic pictures", lambda: _mosaic_pictures(model, gates, sample, options))
            or []
        )
    if "flow" in parts:
        results.flow = attempt("flow", lambda: flow_part(_flows(model, gates, sample, run)))
    album = Album(sample.source)
    calls: NDArray[np.int64] | None = None
    if "pictures" in parts or "errors" in parts:
        tell("looking at what channels respond to")
        calls, highest = responses(model, gates, sample, run)
        if "pictures" in parts:
            results.pictures = attempt("pictures", lambda: _pictures(highest, sample, album))
    if "errors" in parts and calls is not None and len(gates) >= 3:
        results.errors = attempt(
            "errors", lambda: _errors(model, gates, sample, calls, album, options)
        )
    if "where" in parts:
        results.where = attempt(
            "places",
            lambda: where_part(
                model, gates, sample.inputs, sample.labels, album, sample.numbers, run
            ),
        )
    if "export" in parts:
        results.export = attempt(
            "classes' networks", lambda: export_part(model, gates, sample.inputs)
        )
    if album.pictures:
        results.pictures = {**(results.pictures or {}), "album": album.pictures}


def export_part(model: nn.Module, gates: TaskGates, inputs: Sequence[Tensor]) -> dict[str, Any]:
    """Costs of classes' networks by themselves, beside the whole one.

    ``seconds`` are of one image, on this machine; ``stays_whole``: modules that could not be cut.
    """
    place = next(model.parameters(), inputs[0])
    image = tuple(x[:1].to(place.device) for x in inputs)
    network = traced(model, gates.sites, image)
    names = gates.task_names or tuple(map(str, gates.tasks))
    modules: dict[str, nn.Module] = {}
    for name, arch in list(zip(names, gates.sub_architectures(), strict=True))[:_EXPORTED]:
        columns = [arch.task] if isinstance(arch.task, int) else list(arch.task or ())
        modules[name] = cut(arch, model, image, network, columns)
    costs = {name: export_summary(module) for name, module in modules.items()}
    whole = "whole network"
    seconds = latency({whole: model, **modules}, image, seconds=_SECONDS)
    every = {whole: next(iter(costs.values())).whole}
    every |= {name: made.smaller for name, made in costs.items()}
    rows = []
    for name, cost in every.items():
        numbers = {"parameters": cost.parameters, "multiply_adds": cost.multiply_adds}
        rows.append({"name": name, **numbers, "seconds": plain(seconds[name])})
    stays = sorted({module for made in costs.values() for module in made.stays_whole})
    return {"rows": rows, "stays_whole": stays, "input": [list(x.shape[1:]) for x in image]}


def _curves(
    model: nn.Module, gates: TaskGates, sample: Sample, options: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = np.unique(np.linspace(0, len(gates) - 1, min(len(gates), _CURVE_TASKS)).round())
    chosen = gates.select([gates.tasks[int(row)] for row in rows])
    generator = torch.Generator().manual_seed(seed_of(options["seed"], "report", "curves"))
    random = {
        site.name: torch.rand(len(chosen), site.n_channels, generator=generator, device="cpu")
        for site in chosen.sites
    }
    name = "random order" if chosen.constants is None else "random order, at means"
    shuffled = TaskGates(random, chosen.sites, chosen.tasks, means=chosen.means)
    data, run = sample.some(_CURVE_IMAGES), options["run"]
    ranked = {"these gates": chosen, name: shuffled}
    return curves_part(
        {n: curves(model, gates, data, sizes=_SIZES, run=run) for n, gates in ranked.items()}
    )


def _flows(
    model: nn.Module, gates: TaskGates, sample: Sample, run: RunOptions | None
) -> list[TaskFlow]:
    """The flow of the first tasks of which there are images."""
    there = own_images(sample.labels, gates.tasks).any(1).tolist()
    chosen = [task for task, has in zip(gates.tasks, there, strict=True) if has][:FLOW_TASKS]
    if not chosen:
        raise ValueError("there is no image of any task.")
    limits: dict[str, Any] = {"receivers": FLOW_RECEIVERS, "n_images": FLOW_IMAGES}
    return [
        information_flow(model, gates, sample.data, tasks=[task], run=run, **limits).flows[0]
        for task in chosen
    ]


def _mosaic_pictures(
    model: nn.Module, gates: TaskGates, sample: Sample, options: dict[str, Any]
) -> list[dict[str, Any]]:
    """Some mosaics, plain and coloured by the class whose channels have most evidence."""
    found = class_mosaics(model, gates, sample.data, n=_MOSAIC_PICTURES, **options)
    shares = found.own_share()
    return [
        {
            "mosaic": encoded(array_picture(plain_picture), MOSAIC_SIDE),
            "coloured": encoded(array_picture(coloured), MOSAIC_SIDE),
            "tasks": [found.task_names[task] for task in chosen],
            "shares": plain(own.tolist(), 3),
        }
        for plain_picture, coloured, chosen, own in zip(
            *coloured_by_class(found), found.chosen.tolist(), shares, strict=True
        )
    ]


def responses(
    model: nn.Module, gates: TaskGates, sample: Sample, run: RunOptions | None
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The whole network's prediction for each image, and the highest value of each channel.

    Returns:
        int64 (N,), and float32 (N, all channels).
    """
    runner = Runner(model, run)
    runner.fields = sample.source.fields
    calls: list[Tensor] = []
    highest: list[Tensor] = []
    with torch.no_grad(), recorded(runner.model, gates.sites) as seen:
        width = runner.images_per_pass(sample.inputs)
        for rows in chunks(len(sample.labels), width):
            batch = slice(rows[0], rows[-1] + 1)
            inputs = runner.to_device(tuple(part[batch] for part in sample.inputs))
            calls.append(runner(inputs).argmax(1).cpu())
            columns = []
            for site in gates.sites:
                value = seen[site.name]
                dim, _ = channel_shape(site, value)
                moved = value.movedim(dim, 1).reshape(len(value), site.n_channels, -1)
                columns.append(moved.amax(-1).float().cpu())
            highest.append(torch.cat(columns, dim=1))
    return torch.cat(calls).numpy(), torch.cat(highest).numpy()


def _pictures(highest: NDArray[np.float32], sample: Sample, album: Album) -> dict[str, Any]:
    """The images that each channel responds to most; -1 for a channel that responds to none."""
    n = min(_TOP, len(highest))
    order = np.argsort(-highest, axis=0, kind="stable")[:n].T
    silent = highest.max(0) <= highest.min(0)
    top = np.full(order.shape, -1, dtype=np.int32)
    for channel, images in enumerate(order.tolist()):
        if not silent[channel]:
            top[channel] = [album.add(sample.numbers[image]) for image in images]
    return {"top": text64(top), "per_channel": n, "n_images": len(highest)}


def _errors(
    model: nn.Module,
    gates: TaskGates,
    sample: Sample,
    calls: NDArray[np.int64],
    album: Album,
    options: dict[str, Any],
) -> dict[str, Any]:
    study = errors(
        model,
        gates,
        sample.data,
        voting=False,  # every image through every sub-architecture, for a number not shown
        **options,
    )
    masks = {site.name: gates[site.name] > 0.5 for site in gates.sites}
    kappa = overlap_matrix(masks, chance_corrected=True).numpy()
    examples = []
    for row in example_rows(sample.labels.numpy(), calls, gates, _EXAMPLES):
        found = explain_error(
            model,
            gates,
            tuple(part[row : row + 1] for part in sample.inputs),
            int(sample.labels[row]),
            similarity=kappa,
            run=options["run"],
        )
        examples.append(_example(found, gates, album.add(sample.numbers[row])))
    return errors_part(study, examples)


def example_rows(
    labels: NDArray[np.int64], calls: NDArray[np.int64], gates: TaskGates, n: int
) -> list[int]:
    """Misclassified images to explain: the first of each pair of classes, frequent pairs first."""
    known = set(gates.tasks)
    pairs: dict[tuple[int, int], list[int]] = {}
    for row, (y, called) in enumerate(zip(labels.tolist(), calls.tolist(), strict=True)):
        if y != called and y in known and called in known:
            pairs.setdefault((y, called), []).append(row)
    order = sorted(pairs.values(), key=lambda rows: (-len(rows), rows[0]))
    return [rows[0] for rows in order[:n]]


def _example(found: ErrorExplanation, gates: TaskGates, picture: int) -> dict[str, Any]:
    best = max(found.sites, key=lambda site: site.kappa)
    return {
        "right": gates.index(found.right),
        "called": gates.index(found.called),
        "picture": picture,
        "rank": plain(found.rank),
        "n_others": found.n_others,
        "overlap": plain(found.overlap),
        "kappa": plain(found.kappa),
        "shared": sum(len(site.shared) for site in found.sites),
        "either": sum(
            len(site.shared) + len(site.only_right) + len(site.only_called) for site in found.sites
        ),
        "best_site": best.name,
        "best_kappa": plain(best.kappa),
        "logits": {name: plain(list(pair)) for name, pair in found.logits.items()},
    }
