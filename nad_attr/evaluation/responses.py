"""Run images through the whole network and many sub-architectures at once, and keep the answers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nad_attr.data.labels import Task, as_task, own_images, tasks_in
from nad_attr.data.sources import Data, Inputs, Source, as_source
from nad_attr.evaluation.ablation import Ablation, Filler, VectorFiller, as_ablation
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import installed
from nad_attr.running.forward import Runner, check_classes, chunks
from nad_attr.running.options import RunOptions
from nad_attr.running.outputs import task_outputs
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result

__all__ = ["Responses", "site_fidelity", "sweep"]


@dataclass(frozen=True, eq=False)
class Responses(Result):
    """What the whole network and R sub-architectures answered to N images.

    Attributes:
        labels: int64 (N,), the images' classes, or (N, K), see :mod:`nad_attr.data.labels`.
        tasks: The R sub-architectures' tasks.
        columns: The J different tasks among them, whose task outputs are kept.
        whole: float32 (N, J), task outputs of the whole network.
        gated: float32 (R, N, J), task outputs of the sub-architectures.
        whole_class: int32 (N,), the class that the whole network calls (argmax of its outputs).
        gated_class: int32 (R, N), the class that each sub-architecture calls.
        whole_margin: float32 (N, J), task output minus the highest output of any other class.
        gated_margin: float32 (R, N), the same for each sub-architecture's own task.

    Where labels are not classes, no class is called (-1), and the margin is the task output minus
    the threshold from which on an output says yes: one half where all outputs of the whole
    network are in [0, 1] (probabilities), else zero (logits).
    """

    labels: Tensor
    tasks: tuple[Task, ...]
    columns: tuple[Task, ...]
    whole: Tensor
    gated: Tensor
    whole_class: Tensor
    gated_class: Tensor
    whole_margin: Tensor
    gated_margin: Tensor

    def _records(self) -> list[dict[str, Any]]:
        columns = [self.columns.index(task) for task in self.tasks]
        return [
            {
                "task": str(task),
                "image": str(i),
                "whole": float(self.whole[i, column]),
                "gated": float(self.gated[r, i, column]),
                "whole_margin": float(self.whole_margin[i, column]),
                "gated_margin": float(self.gated_margin[r, i]),
            }
            for r, (task, column) in enumerate(zip(self.tasks, columns, strict=True))
            for i in range(len(self.labels))
        ]


class Rows:
    """R sub-architectures of the same sites: their gates, put on images by row number.

    The hook function of :func:`nad_attr.gating.installed`. A pass holds, in this order, donors
    (images that run clean because others take values from them), then the images themselves.
    """

    def __init__(
        self,
        architectures: Sequence[SubArchitecture],
        device: torch.device,
        ablation: Ablation | None = None,
    ) -> None:
        self.sites = architectures[0].sites
        self.tasks = tasks_of_rows(architectures)
        self.gates = {
            site.name: torch.stack([arch._masks[site.name] for arch in architectures]).to(device)
            for site in self.sites
        }
        self.filler: Filler
        if ablation is not None:
            self.filler = ablation.filler(self.sites, self.tasks, device)
        else:
            self.filler = VectorFiller(_own_means(architectures, device))
        #: Row and number in the data of each image of the next pass; rows None: the whole network.
        self.rows: Tensor | None = None
        self.numbers: Tensor = torch.empty(0, dtype=torch.int64, device="cpu")
        self.n_clean = 0
        self.donor: Tensor | None = None
        #: Looks on at the sites while the whole network runs.
        self.watch: Callable[[GateSite, Tensor], None] | None = None

    def __call__(self, site: GateSite, tensor: Tensor) -> Tensor | None:
        if self.rows is None:
            if self.watch is not None:
                self.watch(site, tensor)
            return None
        clean, own = tensor[: self.n_clean], tensor[self.n_clean :]
        rows, numbers = self.rows.to(tensor.device), self.numbers.to(tensor.device)
        gate = self.gates[site.name].to(tensor.device)[rows].float()
        donated = None if self.donor is None else clean[self.donor.to(tensor.device)]
        gated = self.filler(site, own, gate, rows, numbers, donated)
        return torch.cat([clean, gated]) if self.n_clean else gated

    def gated_pass(
        self, run: Callable[[Inputs], Tensor], images: Inputs, rows: Tensor, numbers: Tensor
    ) -> Tensor:
        """Outputs (B, K) of images, each inside the sub-architecture of its row.

        Args:
            run: Runs the network.
            images: The inputs, B images.
            rows: int64 (B,), which row each image is for.
            numbers: int64 (B,), the images' numbers in the data.
        """
        donors = self.filler.donors(rows, numbers)
        self.n_clean, self.donor = 0, None
        if donors is not None:
            given, self.donor = donors
            self.n_clean = len(given[0])
            images = tuple(_joined(d, x) for d, x in zip(given, images, strict=True))
        self.rows, self.numbers = rows, numbers
        try:
            return run(images)[self.n_clean :]
        finally:
            self.rows = None

    def width(self, batch_size: int) -> int:
        """Images in a pass: with their donors at most ``batch_size``, and at least one.

        A single image and its donor are two.
        """
        index = torch.zeros(1, dtype=torch.int64, device=next(iter(self.gates.values())).device)
        return batch_size if self.filler.donors(index, index) is None else max(1, batch_size // 2)


class DistinctNetworks:
    """Rows that are the same network: they need one pass for all of them.

    In curves, these are the empty sub-architectures of all tasks, and the rankings of a method
    that is the same for every task. ``first`` is int64 (U,), one row of each different network.
    """

    def __init__(self, rows: Rows) -> None:
        n_rows = len(rows.tasks)
        self.of = list(range(n_rows))
        if rows.filler.is_of_gates_alone():
            gates = torch.cat([gate.flatten(1) for gate in rows.gates.values()], dim=1)
            known: dict[bytes, int] = {}
            self.of = [known.setdefault(row.tobytes(), len(known)) for row in gates.cpu().numpy()]
        device = next(iter(rows.gates.values())).device
        of = torch.tensor(self.of, device="cpu")
        self._members = of.argsort(stable=True).to(device)
        counts = of.bincount()
        self._counts, self._start = counts.to(device), (counts.cumsum(0) - counts).to(device)
        self.first = self._members[self._start]

    def members(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Where in ``which`` each row's network is, and the row, for U numbers of networks.

        Both are int64 (M,), M >= len(which).
        """
        if len(self.first) == len(self.of):
            return torch.arange(len(which), device=which.device), self._members[which]
        counts = self._counts[which]
        at = torch.arange(len(which), device=which.device).repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        number = torch.arange(len(at), device=which.device) - before[at]
        return at, self._members[self._start[which[at]] + number]


def _joined(donors: Tensor, images: Tensor) -> Tensor:
    if donors.shape[1:] != images.shape[1:]:
        raise ValueError(
            f"the ablation's donor images have shape {tuple(donors.shape[1:])}, the images to "
            f"evaluate {tuple(images.shape[1:])}; fit it on images of the same shape."
        )
    return torch.cat([donors.to(images.dtype), images])


def _own_means(
    architectures: Sequence[SubArchitecture], device: torch.device
) -> dict[str, Tensor] | None:
    """The means that each sub-architecture has for closed channels; None: zero for all."""
    if all(arch.means is None for arch in architectures):
        return None
    first = architectures[0].means
    if first is not None and all(arch.means is first for arch in architectures):
        return {name: mean.to(device)[None] for name, mean in first.items()}
    return {
        site.name: torch.stack(
            [
                torch.zeros(site.n_channels, device="cpu")
                if arch.means is None
                else arch.means[site.name]
                for arch in architectures
            ]
        ).to(device)
        for site in architectures[0].sites
    }


def as_architectures(
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture], size: float | None
) -> list[SubArchitecture]:
    """Sub-architectures of the same sites, each with a task.

    Raises:
        TypeError: If they are something else.
        ValueError: If there is none, one has no task, or their sites differ.
    """
    if isinstance(architectures, TaskGates):
        return architectures.sub_architectures(size)
    if size is not None:
        raise ValueError("size= needs TaskGates; sub-architectures have their size already.")
    if isinstance(architectures, SubArchitecture):
        architectures = [architectures]
    if not isinstance(architectures, Sequence) or not all(
        isinstance(arch, SubArchitecture) for arch in architectures
    ):
        raise TypeError(
            "architectures must be TaskGates or a sequence of SubArchitecture, got "
            f"{type(architectures).__name__}."
        )
    if not architectures:
        raise ValueError("there is no sub-architecture to evaluate.")
    for i, arch in enumerate(architectures):
        if arch.task is None:
            raise ValueError(
                f"sub-architecture {i} has no task; make it with SubArchitecture(..., task=k)."
            )
        if arch.sites != architectures[0].sites:
            raise ValueError(
                f"sub-architecture {i} has other gate sites than the first; evaluate those of "
                "different sites by themselves."
            )
    return list(architectures)


def tasks_of_rows(architectures: Sequence[SubArchitecture]) -> tuple[Task, ...]:
    """The task of each sub-architecture."""
    return tuple(as_task(arch.task) for arch in architectures)


def _margins(outputs: Tensor, values: Tensor, members: Tensor) -> Tensor:
    """Task outputs (B, J) minus the highest output (B, K) of any class that is no member (J, K)."""
    n_members = members.sum(1)
    if outputs.shape[1] > 1 and bool((n_members == 1).all()):
        # The highest other output is the highest, or the second where the class itself is that.
        top, place = outputs.topk(2, dim=1)
        classes = members.int().argmax(1)
        is_first = place[:, :1] == classes[None]
        return values - torch.where(is_first, top[:, 1:], top[:, :1])
    return torch.stack(
        [_margin(outputs, values[:, j], members[j]) for j in range(len(members))], dim=1
    )


def _margin(outputs: Tensor, values: Tensor, members: Tensor) -> Tensor:
    """(B,), as :func:`_margins`, for one task, or one for each image."""
    return values - outputs.masked_fill(members, -torch.inf).amax(-1)


def sweep(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    size: float | None = None,
    ablation: Ablation | str | None = None,
    run: RunOptions | None = None,
) -> Responses:
    """Run data through the whole network and through each sub-architecture, in one pass over it.

    Each image is loaded once. Its repetitions for the R sub-architectures are packed into full
    batches, with one gate vector per image. The answers, not the images, are kept: about
    ``4 R N J`` bytes on the CPU. Several sub-architectures may have the same task.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: As in :func:`nad_attr.evaluation.evaluate`.
        data: As in :func:`nad_attr.evaluation.evaluate`.
        size: As in :func:`nad_attr.evaluation.evaluate`.
        ablation: What closed channels become, from :func:`nad_attr.evaluation.fit_ablation`, or
            "zero". None: what each sub-architecture says (zero, or its means).
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The answers, in the order of the data and of ``architectures``.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode, a sub-architecture has no task, the ablation
            does not fit, labels or tasks are not a class of the network, or inputs or outputs hold
            NaN.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> arch = SubArchitecture.from_kept({"0": [1]}, [GateSite("0", 2, 1)], task=1)
        >>> sweep(net, arch, (torch.tensor([[3.0, 2.0]]), torch.tensor([0]))).gated
        tensor([[[2.]]])
    """
    archs = as_architectures(architectures, size)
    chosen = as_ablation(ablation)
    runner = Runner(model, run)
    source = as_source(data, any_labels=True)
    runner.fit(source)
    with progress_bar(runner, len(archs), len(source.labels)) as bar:
        return answers(runner, archs, source, ablation=chosen, bar=bar)


def progress_bar(runner: Runner, n_rows: int, n_images: int) -> tqdm[Any]:
    """A bar of the images done, if one is wanted."""
    return runner.bar(n_images, f"evaluating {n_rows} sub-architectures")


class Watch(Protocol):
    """Looks on while the whole network runs."""

    def begin(self, numbers: range, inputs: Inputs) -> None:
        """Remember the images of the next pass."""

    def __call__(self, site: GateSite, tensor: Tensor) -> None:
        """Take in the tensor of a site."""


def answers(
    runner: Runner,
    archs: Sequence[SubArchitecture],
    source: Source,
    *,
    ablation: Ablation | None,
    bar: tqdm[Any],
    columns: tuple[Task, ...] | None = None,
    whole: Responses | None = None,
    own_only: bool = False,
    watch: Watch | None = None,
) -> Responses:
    """The sweep itself.

    Args:
        runner: The network.
        archs: R sub-architectures.
        source: The images.
        ablation: What closed channels become.
        bar: Advanced by the images done.
        columns: J tasks whose outputs are kept; None: the different tasks of the rows.
        whole: Answers to the same images for the same columns: the whole network's are taken from
            there, and it is not run again.
        own_only: Keep each row's own task output alone: ``gated`` is (R, N, 1).
        watch: Looks on while the whole network runs.
    """
    labels, n = source.labels, len(source.labels)
    tasks = tasks_of_rows(archs)
    columns = tuple(dict.fromkeys(tasks)) if columns is None else columns
    n_rows, n_kept = len(tasks), 1 if own_only else len(columns)

    gated = torch.empty(n_rows, n, n_kept, device="cpu")
    gated_class = torch.empty(n_rows, n, dtype=torch.int32, device="cpu")
    gated_margin = torch.empty(n_rows, n, device="cpu")
    if whole is None:
        clean = torch.empty(n, len(columns), device="cpu")
        clean_class = torch.empty(n, dtype=torch.int32, device="cpu")
        clean_margin = torch.empty(n, len(columns), device="cpu")
    else:
        clean, clean_class = whole.whole, whole.whole_class
        clean_margin = whole.whole_margin

    device = runner.device
    column_of = torch.tensor([columns.index(task) for task in tasks], device=device)
    rows_of = Rows(archs, device, ablation)
    rows_of.watch = watch
    distinct = DistinctNetworks(rows_of)
    members: Tensor | None = None

    def run(inputs: Inputs) -> Tensor:
        nonlocal members
        outputs = runner(inputs)
        if members is None:
            check_classes(labels, (*tasks, *columns), outputs.shape[1])
            members = own_images(torch.arange(outputs.shape[1], device="cpu"), columns).to(
                outputs.device
            )
        return outputs

    def probe(inputs: Inputs) -> None:
        some = tuple(x[: rows_of.width(len(x))] for x in inputs)
        place = torch.arange(len(some[0]), device=device)
        rows_of.gated_pass(run, some, torch.zeros_like(place), place)

    with torch.no_grad(), installed(runner.model, rows_of.sites, rows_of):
        batch_size = runner.images_per_pass(source, probe)
        width, numbers = rows_of.width(batch_size), list(chunks(n, batch_size))
        for chosen, inputs in zip(numbers, runner.draw(source, numbers), strict=True):
            here = slice(chosen[0], chosen[-1] + 1)
            if whole is None:
                if watch is not None:
                    watch.begin(chosen, inputs)
                outputs = run(inputs)
                _check_outputs(outputs.isnan().any(1)[None], chosen, None)
                assert members is not None
                values = task_outputs(outputs, columns)
                clean[here] = values.cpu()
                clean_class[here] = outputs.argmax(1).to("cpu", torch.int32)
                clean_margin[here] = _margins(outputs, values, members).cpu()

            # Gathered where the network is: each copy to the CPU would wait for it.
            n_here = len(chosen)
            block = torch.empty(n_rows, n_here, n_kept, device=device)
            called = torch.empty(n_rows, n_here, dtype=torch.int32, device=device)
            margin = torch.empty(n_rows, n_here, device=device)
            undefined = torch.zeros(n_rows, n_here, dtype=torch.bool, device=device)
            for pairs in chunks(len(distinct.first) * n_here, width):
                pair = torch.arange(pairs[0], pairs[-1] + 1, device=device)
                which, run_images = pair // n_here, pair % n_here
                outputs = rows_of.gated_pass(
                    run,
                    tuple(x[run_images] for x in inputs),
                    distinct.first[which],
                    run_images + chosen[0],
                )
                assert members is not None
                values = task_outputs(outputs, columns)
                calls, unknown = outputs.argmax(1).int(), outputs.isnan().any(1)
                all_at, all_rows = distinct.members(which)
                # As many at a time as in a pass, however many rows share a network.
                for at, rows in zip(all_at.split(width), all_rows.split(width), strict=True):
                    images, column = run_images[at], column_of[rows]
                    own = values[at].gather(1, column[:, None])
                    block[rows, images] = (own if own_only else values[at]).float()
                    called[rows, images] = calls[at]
                    margin[rows, images] = _margin(outputs[at], own[:, 0], members[column]).float()
                    undefined[rows, images] = unknown[at]
            _check_outputs(undefined, chosen, tasks)
            gated[:, here], gated_class[:, here] = block.cpu(), called.cpu()
            gated_margin[:, here] = margin.cpu()
            bar.update(n_here)
    if labels.ndim == 2:
        says_yes = 0.5 if bool((clean >= 0).all() and (clean <= 1).all()) else 0.0
        clean_class, gated_class = clean_class.fill_(-1), gated_class.fill_(-1)
        clean_margin = clean - says_yes
        at = torch.zeros_like(column_of) if own_only else column_of
        gated_margin = gated[torch.arange(n_rows, device="cpu"), :, at.cpu()] - says_yes
    return Responses(
        labels=labels,
        tasks=tasks,
        columns=columns,
        whole=clean,
        gated=gated,
        whole_class=clean_class,
        gated_class=gated_class,
        whole_margin=clean_margin,
        gated_margin=gated_margin,
    )


def check_own(own: Tensor, tasks: Sequence[Task], labels: Tensor, stacklevel: int) -> None:
    """Refuse data without own images of any task; warn where some tasks have none."""
    has = own.any(-1).tolist()
    if not any(has):
        raise ValueError(
            f"data holds no image of any of the tasks {list(tasks[:10])}; its labels are "
            f"{tasks_in(labels)[:10]}."
        )
    missing = [task for task, known in zip(tasks, has, strict=True) if not known]
    if missing:
        warnings.warn(
            f"data holds no image of task(s) {missing[:10]}: their measures are NaN.",
            stacklevel=stacklevel + 1,
        )


def _check_outputs(undefined: Tensor, chosen: range, tasks: Sequence[Task] | None) -> None:
    """Refuse NaN among the outputs: bool (R, B), R = 1 for the whole network (tasks None)."""
    if bool(undefined.any()):
        row, image = undefined.nonzero()[0].tolist()
        name = "the network" if tasks is None else f"the sub-architecture of task {tasks[row]}"
        raise ValueError(f"{name} gives NaN for image {chosen[image]}.")


class _Differences(Rows):
    """Runs images and their gated copies, and adds up how far apart these are."""

    def __init__(
        self,
        architectures: Sequence[SubArchitecture],
        device: torch.device,
        ablation: Ablation | None,
    ) -> None:
        super().__init__(architectures, device, ablation)
        n = len(architectures)
        self.error, self.energy = (
            {site.name: torch.zeros(n, dtype=torch.float64, device="cpu") for site in self.sites}
            for _ in range(2)
        )

    def __call__(self, site: GateSite, tensor: Tensor) -> Tensor | None:
        result = super().__call__(site, tensor)
        if result is None or self.rows is None:
            return result
        n = len(self.rows)
        if len(tensor) < 2 * n:
            return result  # Rows has refused it, or axis 0 is not a batch
        wide = torch.promote_types(tensor.dtype, torch.float32)
        whole = tensor[self.n_clean - n : self.n_clean].to(wide)
        rows = self.rows.cpu()
        for total, values in (
            (self.error, result[self.n_clean :].to(wide) - whole),
            (self.energy, whole),
        ):
            per_image = values.flatten(1).square().sum(1).double().cpu()
            total[site.name].index_add_(0, rows, per_image)
        return result

    def gated_pass(
        self, run: Callable[[Inputs], Tensor], images: Inputs, rows: Tensor, numbers: Tensor
    ) -> Tensor:
        """As :meth:`Rows.gated_pass`, with donors, then clean copies, then the images."""
        donors = self.filler.donors(rows, numbers)
        self.donor, given = None, tuple(x[:0] for x in images)
        if donors is not None:
            given, self.donor = donors
        self.n_clean = len(given[0]) + len(rows)
        self.rows, self.numbers = rows, numbers
        both = tuple(_joined(d, torch.cat([x, x])) for d, x in zip(given, images, strict=True))
        try:
            return run(both)[self.n_clean :]
        finally:
            self.rows = None


def site_fidelity(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    size: float | None = None,
    ablation: Ablation | str | None = None,
    run: RunOptions | None = None,
) -> dict[str, Tensor]:
    """How far each site's values are from the whole network's, on own images.

    ``sum (x~ - x)^2 / sum x^2``, where x is a site's value in the whole network and x~ its value
    in the sub-architecture, behind the gate of that site and all gates before it; sums over a
    task's own images, channels and positions. 0: nothing is lost; 1: as much as with zeros.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: As in :func:`nad_attr.evaluation.evaluate`; several may have one task.
        data: As in :func:`nad_attr.evaluation.evaluate`; only own images are run.
        size: As in :func:`nad_attr.evaluation.evaluate`.
        ablation: As in :func:`sweep`.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        ``{site name: float64 (R,)}``, in forward order; NaN for a task without own images and
        where the whole network's values are all zero.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: As :func:`sweep`, or no task has own images.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> arch = SubArchitecture.from_kept({"0": [1]}, [GateSite("0", 2, 1)], task=0)
        >>> site_fidelity(net, arch, (torch.tensor([[3.0, 4.0]]), torch.tensor([0])))
        {'0': tensor([0.3600], dtype=torch.float64)}
    """
    archs = as_architectures(architectures, size)
    chosen = as_ablation(ablation)
    runner = Runner(model, run)
    source = as_source(data, any_labels=True)
    runner.fit(source)
    own = own_images(source.labels, tasks_of_rows(archs))
    if not bool(own.any()):
        raise ValueError("data holds no image of any of the tasks.")
    rows_of = _Differences(archs, runner.device, chosen)
    batch_size = runner.images_per_pass(source)
    width = max(1, rows_of.width(batch_size) // 2)
    used = own.any(0).nonzero()[:, 0]
    cuts = [used[part[0] : part[-1] + 1] for part in chunks(len(used), batch_size)]
    drawn = runner.draw(source, [cut.tolist() for cut in cuts], "fidelity of sites")

    def forward(inputs: Inputs) -> Tensor:
        outputs = runner(inputs)
        check_classes(source.labels, rows_of.tasks, outputs.shape[1])
        return outputs

    with torch.no_grad(), installed(runner.model, rows_of.sites, rows_of):
        for cut, inputs in zip(cuts, drawn, strict=True):
            rows, images = own[:, cut].nonzero(as_tuple=True)
            for part in chunks(len(rows), width):
                here = slice(part[0], part[-1] + 1)
                at = images[here].to(runner.device)
                rows_of.gated_pass(
                    forward,
                    tuple(x[at] for x in inputs),
                    rows[here].to(runner.device),
                    cut[images[here]].to(runner.device),
                )
    return {
        site.name: rows_of.error[site.name] / rows_of.energy[site.name] for site in rows_of.sites
    }
