"""Ablation values: the values that closed channels get.

Zero and a mean are single numbers per channel. Values of another image and noise keep a channel
varying as the network behind it expects, without the information.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nad_attr._checks import check_count
from nad_attr.data.counters import hashed, key_of, standard_normal, unsigned, words
from nad_attr.data.labels import Labels, Task, as_task, other_images, patterns
from nad_attr.data.sources import Data, Inputs, Source, as_source
from nad_attr.gates.channels import check_means, distinct_sites
from nad_attr.gating.hooks import channel_shape, expand, installed, multiply, site_modules
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import permutation

__all__ = [
    "ABLATIONS",
    "Ablation",
    "Filler",
    "MeanAblation",
    "NoiseAblation",
    "OtherMeanAblation",
    "ResampleAblation",
    "ZeroAblation",
    "as_ablation",
    "fit_ablation",
]

#: The kinds of ablation value that :func:`fit_ablation` prepares.
ABLATIONS = ("zero", "mean", "other_mean", "resample", "noise")

#: About so many numbers of noise are made at once: they fit a processor's cache or fill a GPU.
NOISE_BLOCK = {"cpu": 1 << 17, "cuda": 1 << 24}


class Filler(ABC):
    """An ablation value made ready for R rows (sub-architectures) on a device.

    It is called once per gate site in a forward pass, for all images of the pass.
    """

    def donors(self, rows: Tensor, numbers: Tensor) -> tuple[Inputs, Tensor] | None:
        """Images that must run through the whole network in the same forward pass.

        Args:
            rows: int64 (B,), which row each image of the pass is for.
            numbers: int64 (B,), the images' numbers in the data.

        Returns:
            Inputs of D images, and the donor among them of each of the B images; None without.
        """
        return None

    def is_of_gates_alone(self) -> bool:
        """Whether the values depend on the gates alone: equal rows get equal values."""
        return False

    @abstractmethod
    def __call__(
        self,
        site: GateSite,
        tensor: Tensor,
        gate: Tensor,
        rows: Tensor,
        numbers: Tensor,
        donated: Tensor | None,
    ) -> Tensor:
        """The site's tensor with its closed channels replaced.

        Args:
            site: The gate site.
            tensor: (B, ...), its values.
            gate: (B, C), 1 = kept, 0 = closed.
            rows: int64 (B,), as in :meth:`donors`.
            numbers: int64 (B,), as in :meth:`donors`.
            donated: (B, ...), the site's values on the donors, if there are any.
        """


class Ablation(ABC):
    """The values that closed channels get; made by :func:`fit_ablation`.

    Pass it to :func:`nad_attr.evaluation.sweep` or :func:`nad_attr.evaluation.evaluate`.

    Attributes:
        kind: One of ``ABLATIONS``.
    """

    kind: ClassVar[str]

    @abstractmethod
    def filler(
        self, sites: Sequence[GateSite], tasks: Sequence[Task], device: torch.device
    ) -> Filler:
        """Make it ready for sub-architectures of these sites and tasks, one task per row.

        Raises:
            ValueError: If it was not fitted for such sites or tasks.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class VectorFiller(Filler):
    """One number per channel for each row: ``{site name: (R, C)}``, or (1, C) for all rows.

    Without values, closed channels are zero.
    """

    def __init__(self, values: Mapping[str, Tensor] | None) -> None:
        self.values = values

    def is_of_gates_alone(self) -> bool:
        """See :meth:`Filler.is_of_gates_alone`."""
        return self.values is None or all(len(value) == 1 for value in self.values.values())

    def __call__(
        self,
        site: GateSite,
        tensor: Tensor,
        gate: Tensor,
        rows: Tensor,
        numbers: Tensor,
        donated: Tensor | None,
    ) -> Tensor:
        """See :meth:`Filler.__call__`."""
        if self.values is None:
            return multiply(site, tensor, gate, None)
        values = self.values[site.name].to(tensor.device)
        return multiply(site, tensor, gate, values[rows] if len(values) > 1 else values)


class ZeroAblation(Ablation):
    """Closed channels are zero, as in the paper.

    Example:
        >>> from nad_attr import GateSite, SubArchitecture
        >>> from nad_attr.evaluation import ZeroAblation, sweep
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> arch = SubArchitecture.from_kept({"0": [1]}, [GateSite("0", 2, 1)], task=0)
        >>> sweep(net, arch, (torch.ones(1, 2), torch.tensor([0])), ablation=ZeroAblation()).gated
        tensor([[[0.]]])
    """

    kind = "zero"

    def filler(
        self, sites: Sequence[GateSite], tasks: Sequence[Task], device: torch.device
    ) -> Filler:
        """See :meth:`Ablation.filler`."""
        return VectorFiller(None)


class _Fitted(Ablation):
    """An ablation value that knows its sites."""

    def __init__(self, sites: Sequence[GateSite]) -> None:
        self.sites = distinct_sites(sites)

    def _check(self, sites: Sequence[GateSite]) -> None:
        known = {site.name: site for site in self.sites}
        for site in sites:
            if known.get(site.name) != site:
                raise ValueError(
                    f"the {self.kind} ablation was not fitted for {site}; fit it for the sites of "
                    "the sub-architectures."
                )

    def __repr__(self) -> str:
        n = len(self.sites)
        return f"{type(self).__name__}({n} site{'s' if n > 1 else ''})"


class MeanAblation(_Fitted):
    """A closed channel is its mean over data: one number per channel, the same for all tasks.

    Args:
        sites: Gate sites.
        means: ``{site name: (C,)}``.

    Example:
        >>> from nad_attr import GateSite
        >>> MeanAblation([GateSite("0", 2, 1)], {"0": torch.tensor([0.5, 1.0])})
        MeanAblation(1 site)
    """

    kind = "mean"

    def __init__(self, sites: Sequence[GateSite], means: Mapping[str, Tensor]) -> None:
        super().__init__(sites)
        checked = check_means(means, self.sites)
        assert checked is not None
        self.means = checked

    def filler(
        self, sites: Sequence[GateSite], tasks: Sequence[Task], device: torch.device
    ) -> Filler:
        """See :meth:`Ablation.filler`."""
        self._check(sites)
        return VectorFiller({site.name: self.means[site.name].to(device)[None] for site in sites})


class OtherMeanAblation(_Fitted):
    """A closed channel is its mean over images of other classes than the task's.

    One vector per task: the values that the channel has without the task's images.

    Args:
        sites: Gate sites.
        sums: ``{site name: float64 (L, C)}``, sums over all images and positions of each class.
        counts: ``{site name: int64 (L,)}``, how many numbers these are sums of.
        classes: int64 (L,), the classes.

    Example:
        >>> from nad_attr import GateSite
        >>> sums, counts = {"0": torch.tensor([[4.0], [9.0]])}, {"0": torch.tensor([2, 3])}
        >>> other = OtherMeanAblation([GateSite("0", 1, 1)], sums, counts, torch.tensor([0, 1]))
        >>> other.means(0)
        {'0': tensor([3.])}
    """

    kind = "other_mean"

    def __init__(
        self,
        sites: Sequence[GateSite],
        sums: Mapping[str, Tensor],
        counts: Mapping[str, Tensor],
        classes: Tensor,
    ) -> None:
        super().__init__(sites)
        self.sums, self.counts, self.classes = dict(sums), dict(counts), classes

    def means(self, task: Task) -> dict[str, Tensor]:
        """``{site name: float32 (C,)}`` that a task's closed channels become.

        Raises:
            ValueError: If all images that it was fitted on are the task's own.
        """
        (other,) = other_images(self.classes, [task])
        if not bool(other.any()):
            raise ValueError(
                f"the other_mean ablation saw no image of another class than those of task {task}."
            )
        return {
            name: (total[other].sum(0) / self.counts[name][other].sum()).float()
            for name, total in self.sums.items()
        }

    def filler(
        self, sites: Sequence[GateSite], tasks: Sequence[Task], device: torch.device
    ) -> Filler:
        """See :meth:`Ablation.filler`."""
        self._check(sites)
        means = {task: self.means(task) for task in dict.fromkeys(tasks)}
        return VectorFiller(
            {
                site.name: torch.stack([means[task][site.name] for task in tasks]).to(device)
                for site in sites
            }
        )


class NoiseAblation(_Fitted):
    """A closed channel is normal noise with the channel's mean and standard deviation.

    Each position of each image has its own number. The numbers of an image are a function of
    (seed, image number, task, site) alone, so batch size and other sub-architectures play no part.
    Mean and deviation are taken over all images and positions.

    Args:
        sites: Gate sites.
        means: ``{site name: (C,)}``.
        deviations: ``{site name: (C,)}``, not negative.
        seed: Of the noise.

    Raises:
        ValueError: If a deviation is negative, or shapes do not fit.

    Example:
        >>> from nad_attr import GateSite
        >>> values = {"0": torch.tensor([1.0, 1.0])}
        >>> NoiseAblation([GateSite("0", 2, 1)], values, values, seed=3)
        NoiseAblation(1 site)
    """

    kind = "noise"

    def __init__(
        self,
        sites: Sequence[GateSite],
        means: Mapping[str, Tensor],
        deviations: Mapping[str, Tensor],
        *,
        seed: int = 0,
    ) -> None:
        super().__init__(sites)
        checked, spread = check_means(means, self.sites), check_means(deviations, self.sites)
        assert checked is not None
        assert spread is not None
        for name, value in spread.items():
            if bool((value < 0).any()):
                raise ValueError(f"deviations of {name!r} are negative.")
        self.means, self.deviations, self.seed = checked, spread, seed

    def filler(
        self, sites: Sequence[GateSite], tasks: Sequence[Task], device: torch.device
    ) -> Filler:
        """See :meth:`Ablation.filler`."""
        self._check(sites)
        keys = {}
        for site in sites:
            row = [key_of(self.seed, "noise", task, site.name) for task in tasks]
            keys[site.name] = words(torch.tensor(row, device="cpu")).to(device)
        return _NoiseFiller(self, keys)


class _NoiseFiller(Filler):
    def __init__(self, noise: NoiseAblation, keys: dict[str, Tensor]) -> None:
        self.keys = keys  # {site name: int32 (R, 2)}
        self.means, self.deviations = noise.means, noise.deviations

    def __call__(
        self,
        site: GateSite,
        tensor: Tensor,
        gate: Tensor,
        rows: Tensor,
        numbers: Tensor,
        donated: Tensor | None,
    ) -> Tensor:
        key = self.keys[site.name].to(tensor.device)[rows]
        # The image's number goes into both words, or images of one task would be alike in parts.
        image = words(numbers)
        first = hashed(image, key[:, 0], key[:, 1])
        second = hashed(image, key[:, 1], key[:, 0])
        n = tensor[0].numel()
        mean, deviation = (
            expand(values[site.name].to(tensor.device), site, tensor)
            for values in (self.means, self.deviations)
        )
        closed = expand(gate, site, tensor) < 0.5
        result = torch.empty_like(tensor)
        block = NOISE_BLOCK.get(tensor.device.type, 1 << 22)
        for part in chunks(len(tensor), max(1, block // max(1, n))):
            here = slice(part[0], part[-1] + 1)
            normal = standard_normal((first[here], second[here]), n).reshape(tensor[here].shape)
            value = torch.addcmul(mean, deviation, normal).to(tensor.dtype)
            torch.where(closed[here], value, tensor[here], out=result[here])
        return result


class ResampleAblation(Ablation):
    """A closed channel takes the values that it has on another image, of another class.

    Each pair of an image and a task has one donor: an image from a fixed pool, of a class that the
    task does not hold. The closed channels of all sites get the values that these sites have when
    the whole network sees the donor. The choice of the donor is a function of (seed, image number,
    task) alone. The donors run through the network beside the images, so a pass costs up to twice
    as much.

    Args:
        inputs: The pool's inputs, a tensor or tuple of tensors, P images of the evaluated shape.
        labels: int64 (P,), their classes.
        seed: Of the choice of donors.

    Raises:
        TypeError: If the inputs are not tensors.
        ValueError: If inputs and labels do not fit.

    Example:
        >>> ResampleAblation(torch.zeros(4, 3, 8, 8), torch.tensor([0, 0, 1, 2]))
        ResampleAblation(4 images)
    """

    kind = "resample"

    def __init__(self, inputs: Any, labels: Any, *, seed: int = 0) -> None:
        several = isinstance(labels, Tensor) and labels.ndim == 2
        given = Labels(labels, kind="several") if several else labels
        pool = as_source((inputs, given), any_labels=True)
        n = len(pool.labels)
        (self.inputs,) = pool.batches([[(i, 0) for i in range(n)]])
        self.labels, self.seed = pool.labels, seed

    def filler(
        self, sites: Sequence[GateSite], tasks: Sequence[Task], device: torch.device
    ) -> Filler:
        """See :meth:`Ablation.filler`."""
        different = list(dict.fromkeys(tasks))
        other = other_images(self.labels, different)
        counts = other.sum(1)
        for task, count in zip(different, counts.tolist(), strict=True):
            if count == 0:
                raise ValueError(
                    f"the resample ablation holds no image of another class than those of task "
                    f"{task}."
                )
        # The numbers of the images that may be donors come first.
        table = other.int().argsort(dim=1, descending=True, stable=True)
        row_of = torch.tensor([different.index(task) for task in tasks], device="cpu")
        keys = torch.tensor([key_of(self.seed, "resample", t) for t in different], device="cpu")
        parts = (x.to(device) for x in (table, counts, words(keys), row_of))
        return _DonorFiller(tuple(x.to(device) for x in self.inputs), *parts)

    def __repr__(self) -> str:
        return f"ResampleAblation({len(self.labels)} images)"


class _DonorFiller(Filler):
    def __init__(
        self, pool: Inputs, table: Tensor, counts: Tensor, keys: Tensor, row_of: Tensor
    ) -> None:
        self.pool, self.table, self.counts = pool, table, counts
        self.keys, self.row_of = keys, row_of

    def donors(self, rows: Tensor, numbers: Tensor) -> tuple[Inputs, Tensor]:
        task = self.row_of[rows]
        bits = hashed(words(numbers), self.keys[task, 0], self.keys[task, 1])
        drawn = self.table[task, unsigned(bits) % self.counts[task]]
        chosen, place = drawn.unique(return_inverse=True)
        return tuple(x[chosen] for x in self.pool), place

    def __call__(
        self,
        site: GateSite,
        tensor: Tensor,
        gate: Tensor,
        rows: Tensor,
        numbers: Tensor,
        donated: Tensor | None,
    ) -> Tensor:
        assert donated is not None
        return torch.where(expand(gate, site, tensor) < 0.5, donated, tensor)


def as_ablation(ablation: Ablation | str | None) -> Ablation | None:
    """The ablation value of an argument; None: that of each sub-architecture.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is a kind that has to be fitted to data first, or no kind.

    Example:
        >>> as_ablation("zero")
        ZeroAblation()
    """
    if ablation is None or isinstance(ablation, Ablation):
        return ablation
    if isinstance(ablation, str):
        _check_kind(ablation)
        if ablation == "zero":
            return ZeroAblation()
        raise ValueError(
            f"ablation {ablation!r} needs data: make it with fit_ablation(model, sites, data, "
            f"kind={ablation!r}), with training images, and pass what it returns."
        )
    raise TypeError(
        f"ablation must be an Ablation, as fit_ablation makes it, 'zero' or None, got "
        f"{type(ablation).__name__}."
    )


def _check_kind(kind: Any) -> None:
    if kind not in ABLATIONS:
        raise ValueError(f"there is no ablation {kind!r}; there are {', '.join(ABLATIONS)}.")


def fit_ablation(
    model: nn.Module,
    sites: Sequence[GateSite],
    data: Data,
    *,
    kind: str,
    tasks: Sequence[Task] | None = None,
    seed: int = 0,
    n_donors: int = 256,
    run: RunOptions | None = None,
) -> Ablation:
    """Prepare what closed channels become, from training images.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Gate sites of that network.
        data: Training images, as in :func:`nad_attr.evaluation.evaluate`. "zero" does not look at
            them.
        kind: "zero"; "mean" (of the channel over all images and positions); "other_mean" (over
            images of other classes than the task's); "resample" (the channel's values on another
            image, of another class); "noise" (normal, with the channel's mean and deviation).
        tasks: Tasks that it will be used for: checks at once that there are images of other
            classes; None: this is checked when it is used.
        seed: Of donors and noise.
        n_donors: Images that "resample" keeps in memory to choose from, at most; the same number
            of each class if there are enough.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If there is no such kind, the network is in train mode, the data hold NaN or
            no image of another class than a task's.

    Example:
        >>> from nad_attr import GateSite
        >>> net = torch.nn.Sequential(torch.nn.Identity()).eval()
        >>> data = torch.tensor([[1.0, 8.0], [3.0, 0.0]]), torch.tensor([0, 1])
        >>> fit_ablation(net, [GateSite("0", 2, 1)], data, kind="mean").means
        {'0': tensor([2., 4.])}
    """
    _check_kind(kind)
    sites = distinct_sites(sites)
    site_modules(model, sites)
    check_count(n_donors, "n_donors", least=2)
    runner = Runner(model, run)
    if kind == "zero":
        return ZeroAblation()
    source = as_source(data, any_labels=True)
    runner.fit(source)
    if kind in ("other_mean", "resample") and tasks is not None and len(tasks):
        known = [as_task(task) for task in tasks]
        has_other = other_images(source.labels, known).any(1).tolist()
        for task, has in zip(known, has_other, strict=True):
            if not has:
                raise ValueError(f"data holds no image of another class than those of task {task}.")
    if kind == "resample":
        return _donor_pool(runner, source, n_donors, seed)
    totals = _Totals(sites, source.labels, squares=kind == "noise")
    numbers = list(chunks(len(source.labels), runner.images_per_pass(source)))
    # Every batch is drawn outside the hooks: drawing it may run the network for something else.
    drawn = runner.draw(source, numbers, "fitting the ablation")
    for chosen, inputs in zip(numbers, drawn, strict=True):
        totals.rows = totals.place[chosen[0] : chosen[-1] + 1]
        with torch.no_grad(), installed(runner.model, sites, totals):
            runner.run(inputs)
    if kind == "other_mean":
        return OtherMeanAblation(sites, totals.sums, totals.counts, totals.classes)
    means = totals.means(totals.sums)
    if kind == "mean":
        return MeanAblation(sites, means)
    squares = totals.means(totals.squares)
    deviations = {
        name: (squares[name] - mean.square()).clamp(min=0).sqrt() for name, mean in means.items()
    }
    return NoiseAblation(sites, means, deviations, seed=seed)


class _Totals:
    """Sums over images and positions of each class, channel by channel, in float64."""

    def __init__(self, sites: Sequence[GateSite], labels: Tensor, *, squares: bool) -> None:
        self.classes, self.place = patterns(labels)
        self.sums = {
            site.name: torch.zeros(
                len(self.classes), site.n_channels, dtype=torch.float64, device="cpu"
            )
            for site in sites
        }
        self.squares = {name: torch.zeros_like(t) for name, t in self.sums.items() if squares}
        self.counts = {n: torch.zeros_like(t[:, 0]).long() for n, t in self.sums.items()}
        #: Which classes (rows) the images of the next pass have.
        self.rows = torch.empty(0, dtype=torch.int64, device="cpu")

    def __call__(self, site: GateSite, tensor: Tensor) -> None:
        dim, ndim = channel_shape(site, tensor)
        values = tensor.detach()
        if values.device.type == "mps":  # has no float64
            values = values.cpu()
        over = [axis for axis in range(1, ndim) if axis != dim]
        self.sums[site.name].index_add_(0, self.rows, _summed(values, over))
        if self.squares:
            self.squares[site.name].index_add_(0, self.rows, _summed(values.double() ** 2, over))
        n = values[0].numel() // site.n_channels
        self.counts[site.name] += n * torch.bincount(self.rows, minlength=len(self.classes))

    def means(self, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``{site name: float64 (C,)}`` over all classes."""
        return {name: total.sum(0) / self.counts[name].sum() for name, total in sums.items()}


def _summed(values: Tensor, over: list[int]) -> Tensor:
    """float64 (B, C) on the CPU."""
    summed = values.sum(dim=over, dtype=torch.float64) if over else values.double()
    return summed.cpu()


def _donor_pool(runner: Runner, source: Source, n_donors: int, seed: int) -> ResampleAblation:
    """Images of all classes in turn, in an order that the seed draws."""
    _, labels = patterns(source.labels)
    order = permutation(len(labels), seed, "donors")
    # How many of its class come before each image, in that order.
    same = labels[order].argsort(stable=True)
    ordered = labels[order][same]
    starts = torch.searchsorted(ordered, ordered)
    rank = torch.empty_like(order)
    rank[same] = torch.arange(len(labels), device="cpu") - starts
    chosen = order[rank.argsort(stable=True)][:n_donors].sort().values
    numbers = [chosen[part[0] : part[-1] + 1].tolist() for part in chunks(len(chosen), 64)]
    parts = [tuple(x.cpu() for x in inputs) for inputs in runner.draw(source, numbers)]
    inputs = tuple(torch.cat(items) for items in zip(*parts, strict=True))
    return ResampleAblation(inputs, source.labels[chosen], seed=seed)
