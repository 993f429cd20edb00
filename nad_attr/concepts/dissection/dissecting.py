"""Network Dissection: which concepts are the units of a network active on?

D. Bau, B. Zhou, A. Khosla, A. Oliva, A. Torralba: "Network Dissection: Quantifying
Interpretability of Deep Visual Representations", CVPR 2017 (arXiv 1704.05796), section 2. Written
for all sites at once and for streams of images: see :func:`dissect`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm.auto import tqdm

from nad_attr._checks import check_count
from nad_attr.concepts.datasets.label_maps import LabelMaps, as_concepts, label_maps
from nad_attr.concepts.dissection.checkpoint import Checkpoint
from nad_attr.concepts.dissection.labelled_images import Batch, LabelledImages
from nad_attr.concepts.dissection.overlap import (
    Touched,
    above,
    count_active,
    divided,
    grid,
    touched,
)
from nad_attr.concepts.dissection.scratch import Scratch
from nad_attr.concepts.dissection.shown import Shown
from nad_attr.concepts.dissection.thresholds import ExactTail, Tail, TailSketch, not_above
from nad_attr.concepts.unit_concepts import Concept, UnitConcepts
from nad_attr.data.fingerprints import fixed_outputs, model_hash
from nad_attr.data.sources import Inputs
from nad_attr.gating.hooks import channel_shape, installed
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.running.workers import Workers, in_order
from nad_attr.sites.finding import find_gate_sites
from nad_attr.sites.site import GateSite
from nad_attr.sites.tracing import tensors_in

__all__ = ["dissect", "site_maps"]

#: Bytes that the exact mode may keep.
_EXACT_BYTES = 2**33
#: Bytes of activations in a temporary file by default.
_SCRATCH_BYTES = 2**32
#: Images in a batch, at most, where the size is found.
MAX_FOUND = 64
#: Only possible tail activations are written, if that takes fewer bytes, after this many times the
#: tail's values.
_FIRST_SPARSE = 8


def dissect(
    model: nn.Module,
    sites: Sequence[GateSite | str] | None,
    data: Any,
    *,
    quantile: float = 0.005,
    concepts: Sequence[Concept | str] | None = None,
    exact: bool = False,
    ignore_index: int = -1,
    unlabelled: Literal["ignore", "count"] = "ignore",
    iou_threshold: float = 0.04,
    n_bins: int = 2048,
    n_top: int = 10,
    n_images: int | None = None,
    seed: int = 0,
    run: RunOptions | None = None,
    n_workers: int = 0,
    scratch_bytes: int | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int = 256,
    executor: Workers | None = None,
) -> UnitConcepts:
    """Measure the IoU of every unit at every site with every concept.

    Unit k is *active* at a pixel where its activation, upsampled to the labels' resolution
    (bilinear, ``align_corners=False``), is above its threshold T_k, the activation that it exceeds
    at a share ``quantile`` of the positions of all images (of its own map, before upsampling). Then
    IoU(k, c) = sum |M_k and L_c| / sum |M_k or L_c| over all images, where M_k are the pixels in
    which k is active and L_c those that show c (paper, section 2.3, equation 1). Pixels without a
    label of c's category are left out of both: they may show c.

    There are two passes over the images, for the thresholds and for the overlaps, all sites
    together. Memory holds counts, which do not grow with the number of images (unless ``exact``).
    On a CPU, activations that may lie above a threshold are kept in a temporary file in between, up
    to ``scratch_bytes``, and the network runs once over those images; results are the same.

    Thresholds come from a :class:`~nad_attr.concepts.dissection.thresholds.TailSketch`, at most one
    bin above the exact one; a bin is less than 2 / (n_bins - 2) of the range of the unit's
    activations, and ``info["threshold_error"]`` has the widest bin of each site. Everything else is
    exact for these thresholds. A unit that has its highest activation at more than that share of
    positions (a dead ReLU, a saturated ReLU6) is never active; ``info["never_active"]`` counts
    them.

    Args:
        model: The network, in eval mode; unchanged.
        sites: Where: gate sites, or names of modules. None: all of :func:`find_gate_sites`. Tokens
            (B, L, C) are taken as a square grid, less a class token; a site without positions is a
            single one.
        data: Yields (image, labels): a map-style dataset, a DataLoader of one (its choice of
            images, workers and collate function are used), or a pair (images, maps) of tensors.
            Labels are indices of concepts: a map (H, W) of any resolution, covering the same field
            as the image; several maps (L, H, W) or a list of them, which may overlap; an integer
            for the whole image (a scene); or a list of those.
        quantile: Share of a unit's activations above its threshold.
        concepts: What the indices stand for. None: ``data.concepts``.
        exact: Exact thresholds. Keeps that share of all activations in memory: for small data.
        ignore_index: Label of unlabelled pixels; negative labels mean the same.
        unlabelled: "ignore": pixels without a label of a concept's category do not count for it.
            "count": they count as not showing it, in images with a label of that category.
        iou_threshold: A detector's IoU is above it.
        n_bins: Bins of the sketch for each unit.
        n_top: Images to remember for each unit, those with its highest activations.
        n_images: Take only so many images, drawn with the seed. None: all.
        seed: Of that draw, and of random transforms of the dataset.
        run: How to run the network; see :class:`nad_attr.RunOptions`.
        n_workers: Processes that load images; 0: as a loader says, or none.
        scratch_bytes: Bytes of activations in the temporary file at most; 0: none. None: 4 GiB on
            a CPU, none elsewhere. At most half of the disk's free space.
        checkpoint: A file from which an interrupted dissection goes on; removed at the end.
        checkpoint_every: Images between two states of it.
        executor: Dissects a few sites at a time elsewhere, such as on Ray's workers
            (:class:`nad_attr.distributed.RayExecutor`), each of which reads the images. The result
            is the same for any number of workers.

    Returns:
        IoUs, thresholds and top images. A concept that no image shows has IoU NaN.

    Raises:
        GatingError: If a site is not called, is called twice, or is not one tensor.
        GateStoreError: If ``checkpoint`` is another dissection's, or no checkpoint.
        SiteError: If there is no such module.
        TypeError: If an argument is of another kind.
        ValueError: If an argument, an image or a label makes no sense; says which.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten()).eval()
        >>> _ = net[0].weight.data.copy_(torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        >>> image = torch.tensor([[[[0.9, 0.1], [0.2, 0.3]]]])
        >>> labels = torch.tensor([[[0, 1], [1, 1]]])
        >>> units = dissect(
        ...     net, [GateSite("0", 2)], (image, labels),
        ...     quantile=0.25, concepts=["bright", "dark"], exact=True,
        ... )
        >>> units.iou["0"]
        array([[1.        , 0.        ],
               [0.        , 0.33333334]], dtype=float32)
    """
    job = _Dissection(
        model,
        data,
        quantile,
        concepts,
        exact,
        ignore_index=ignore_index,
        unlabelled=unlabelled,
        n_bins=n_bins,
        n_top=n_top,
        n_images=n_images,
        seed=seed,
        n_workers=n_workers,
        runner=Runner(model, run, batch_size=16),
    )
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"iou_threshold must lie in [0, 1], got {iou_threshold!r}.")
    if isinstance(checkpoint_every, bool) or checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be 1 or more, got {checkpoint_every!r}.")
    if scratch_bytes is None:
        scratch_bytes = _SCRATCH_BYTES if job.runner.device.type == "cpu" else 0
    if scratch_bytes < 0:
        raise ValueError(f"scratch_bytes must be 0 or more, got {scratch_bytes!r}.")
    job.begin(sites)
    if executor is not None:
        if checkpoint is not None:
            raise ValueError("checkpoint works in this process only; leave executor out.")
        given = {
            "quantile": quantile, "concepts": concepts, "exact": exact,
            "ignore_index": ignore_index, "unlabelled": unlabelled,
            "iou_threshold": iou_threshold, "n_bins": n_bins, "n_top": n_top,
            "n_images": n_images, "seed": seed, "n_workers": n_workers,
            "scratch_bytes": scratch_bytes,
        }  # fmt: skip
        return _by_workers(executor, model, data, job.sites, job.runner, given)
    with ExitStack() as stack, torch.no_grad():
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, job.identity(), checkpoint_every)
            stack.enter_context(saved)
            job.restore(saved)
        scratch = stack.enter_context(Scratch(scratch_bytes)) if scratch_bytes else None
        bar = stack.enter_context(job.runner.bar(2 * len(job.images), "dissecting"))
        job.find_thresholds(scratch, saved, bar)
        job.count_overlaps(scratch, saved, bar)
        if saved is not None:
            saved.remove()
    return job.result(iou_threshold)


#: Arguments that have to be the same in a checkpoint.
_SETTINGS = ("quantile", "exact", "ignore_index", "unlabelled", "n_bins", "n_top", "seed")
#: Sites that a worker dissects at a time.
_SITES_PER_WORKER = 4
_Shared: TypeAlias = "tuple[nn.Module, Any, RunOptions, dict[str, Any]]"


def _by_workers(
    executor: Workers,
    model: nn.Module,
    data: Any,
    sites: Sequence[GateSite],
    runner: Runner,
    given: dict[str, Any],
) -> UnitConcepts:
    """A dissection whose sites are dissected elsewhere."""
    n, device = _SITES_PER_WORKER, runner.options.device
    parts = [list(sites[i : i + n]) for i in range(0, len(sites), n)]
    with runner.bar(len(parts), "dissecting", "part") as bar:
        shared = (model, data, runner.options, given)
        how: dict[str, Any] = {"begin": _on_worker, "device": device, "what": "sites"}
        done = executor.map(_sites_dissected, shared, parts, **how)
        found = in_order(done, lambda number: bar.update())
    info = dict(found[0].info)
    for name in ("threshold_error", "never_active"):
        info[name] = {site: n for part in found for site, n in part.info[name].items()}
    info["state_bytes"] = sum(part.info["state_bytes"] for part in found)

    def joined(name: str) -> dict[str, Any]:
        return {s: x for part in found for s, x in (getattr(part, name) or {}).items()}

    first = found[0]
    return UnitConcepts(
        joined("iou"),
        first.concepts,
        source=first.source,
        quantile=first.quantile,
        thresholds=joined("thresholds"),
        top_images=joined("top_images"),
        iou_threshold=first.iou_threshold,
        info=info,
    )


def _on_worker(shared: _Shared, device: torch.device) -> _Shared:
    model, data, options, given = shared
    return model, data, replace(options, device=device, show_progress=False), given


def _sites_dissected(shared: _Shared, part: list[GateSite]) -> UnitConcepts:
    model, data, options, given = shared
    return dissect(model, part, data, run=options, **given)


def site_maps(site: GateSite, tensor: Tensor) -> Tensor:
    """A site's activations as (B, h, w, C), at least float32.

    Raises:
        ValueError: If it has no two-dimensional positions.

    Example:
        >>> site_maps(GateSite("a", 3), torch.zeros(2, 3, 4, 5)).shape
        torch.Size([2, 4, 5, 3])
        >>> site_maps(GateSite("a", 3, -1), torch.zeros(2, 17, 3)).shape  # with a class token
        torch.Size([2, 4, 4, 3])
    """
    channel_shape(site, tensor)
    last = tensor.movedim(site.channel_dim, -1)
    if last.ndim == 2:
        last = last[:, None, None, :]
    elif last.ndim == 3:
        n = last.shape[1]
        side = math.isqrt(n)
        if side * side != n:
            side = math.isqrt(n - 1)
            if side * side != n - 1:
                raise ValueError(
                    f"site {site.name!r} has {n} positions, which are not a square (with or "
                    "without a class token); dissect a site whose output has two axes of positions."
                )
            last = last[:, 1:]
        last = last.reshape(len(last), side, side, last.shape[2])
    elif last.ndim != 4:
        raise ValueError(
            f"site {site.name!r} has an output of shape {tuple(tensor.shape)}; expected "
            "(images, channels), (images, positions, channels) or two axes of positions."
        )
    return last.to(torch.promote_types(last.dtype, torch.float32)).contiguous()


class _Dissection:
    """A dissection in progress: its arguments and counts."""

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        quantile: float,
        concepts: Sequence[Concept | str] | None,
        exact: bool,
        *,
        ignore_index: int,
        unlabelled: str,
        n_bins: int,
        n_top: int,
        n_images: int | None,
        seed: int,
        n_workers: int,
        runner: Runner,
    ) -> None:
        if isinstance(quantile, bool) or not 0 < quantile < 1:
            raise ValueError(f"quantile must lie between 0 and 1, got {quantile!r}.")
        if unlabelled not in ("ignore", "count"):
            raise ValueError(f"unlabelled must be 'ignore' or 'count', got {unlabelled!r}.")
        check_count(n_bins, "n_bins", least=8)
        check_count(n_top, "n_top", least=0)
        if isinstance(dataset, (tuple, list)) and len(dataset) == 2:
            if all(isinstance(part, Tensor) for part in dataset):
                if len(dataset[0]) != len(dataset[1]):
                    raise ValueError(
                        f"{len(dataset[0])} images came with {len(dataset[1])} label maps."
                    )
                dataset = TensorDataset(*dataset)
        table = concepts
        if table is None:
            holder = dataset.dataset if isinstance(dataset, DataLoader) else dataset
            table = getattr(holder, "concepts", None)
        if table is None:
            raise ValueError(
                "what the labels' numbers stand for is not known: give concepts=[...], or a "
                "dataset with an attribute 'concepts'."
            )
        self.concepts = as_concepts(table)
        self.images = LabelledImages(dataset, n_images, seed, n_workers)
        self.model, self.runner, self.quantile, self.exact = model, runner, quantile, exact
        self.ignore_index, self.unlabelled = ignore_index, unlabelled
        self.n_bins, self.n_top, self.seed = n_bins, n_top, seed
        categories = list(dict.fromkeys(concept.category for concept in self.concepts))
        #: Which category each concept has.
        self.category = torch.tensor(
            [categories.index(c.category) for c in self.concepts], device="cpu"
        )
        self.n_categories = len(categories)
        #: Images that the first and the second pass have done.
        self.done = [0, 0]

    def begin(self, sites: Sequence[GateSite | str] | None) -> None:
        """Look at the first image: find the sites, and check its labels."""
        first = next(self.images.batches([range(1)]))
        inputs = self.runner.to_device(first.inputs)
        extra = self.runner.options.additional_forward_args
        # Label maps and upsampled activations take memory beside the pass.
        self.batch_size = self.runner.images_per_pass(inputs, most=MAX_FOUND)
        self._labels(first.labels, first)
        known = list(sites) if sites is not None else None
        if known is not None and not known:
            raise ValueError("sites is empty; name at least one, or pass None for all.")
        self.sites = [site for site in known or () if isinstance(site, GateSite)]
        if known is None or len(self.sites) < len(known):
            self.sites = find_gate_sites(
                self.runner.model,
                inputs,
                layers=known,
                additional_forward_args=extra,
                forward_func=None if self.runner.is_plain else self.runner.call,
            )
        device = self.runner.device
        self.shapes: dict[str, tuple[int, int]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.order: list[GateSite] = []

        def look(site: GateSite, tensor: Tensor) -> None:
            maps = site_maps(site, tensor)
            self.shapes[site.name] = int(maps.shape[1]), int(maps.shape[2])
            self.dtypes[site.name] = maps.dtype
            self.order.append(site)

        with installed(self.runner.model, self.sites, look), torch.no_grad():
            self.runner.run(inputs)
        n_kept = 0
        self.tails: dict[str, Tail] = {}
        for site in self.sites:
            height, width = self.shapes[site.name]
            n_values = height * width * len(self.images)
            if self.exact:
                n_kept += 8 * site.n_channels * math.ceil(self.quantile * n_values)
                if n_kept > _EXACT_BYTES:
                    raise ValueError(
                        f"exact=True keeps a share of {self.quantile:g} of all activations, which "
                        f"is more than {_EXACT_BYTES / 2**30:.0f} GiB here; leave it out, or take "
                        "fewer images (n_images) or sites."
                    )
                tail: Tail = ExactTail(site.n_channels, n_values, self.quantile, device=device)
            else:
                tail = TailSketch(
                    site.n_channels, n_values, self.quantile, n_bins=self.n_bins, device=device
                )
            self.tails[site.name] = tail
        n_concepts = len(self.concepts)
        self.both = self._zeros(n_concepts)
        self.active = self._zeros(self.n_categories)
        self.shown = torch.zeros(n_concepts, dtype=torch.int64, device="cpu")
        self.top = {
            site.name: (
                torch.full((site.n_channels, 0), -math.inf, dtype=torch.float64, device=device),
                torch.full((site.n_channels, 0), -1, dtype=torch.int64, device=device),
            )
            for site in self.sites
        }

    def _zeros(self, n: int) -> dict[str, Tensor]:
        return {
            site.name: torch.zeros(site.n_channels, n, dtype=torch.int64, device=self.runner.device)
            for site in self.sites
        }

    def _labels(self, labels: Sequence[Any], batch: Batch) -> list[LabelMaps]:
        return [
            label_maps(
                each,
                len(self.concepts),
                ignore_index=self.ignore_index,
                shape=batch.size,
                where=f"image {number}",
            )
            for each, number in zip(labels, batch.numbers, strict=True)
        ]

    def _places(self, first: int) -> list[range]:
        n = len(self.images)
        return [range(i, min(n, i + self.batch_size)) for i in range(first, n, self.batch_size)]

    def _pass(
        self,
        first: int,
        before: Callable[[Batch], None],
        each: Callable[[GateSite, Tensor, Batch], None],
        after: Callable[[Batch], None],
    ) -> None:
        """Run the network on the images from a place on.

        ``each`` gets a site's activations (B, h, w, C) while the network runs, so that those of
        all sites need not be kept; ``before`` and ``after`` are called around each batch.
        """
        now: list[Batch] = []

        def function(site: GateSite, tensor: Tensor) -> None:
            maps = site_maps(site, tensor)
            if tuple(maps.shape[1:3]) != self.shapes[site.name]:
                raise ValueError(
                    f"site {site.name!r} has {tuple(maps.shape[1:3])} positions for image "
                    f"{now[0].numbers[0]} and {self.shapes[site.name]} for the first one; bring "
                    "all images to one size."
                )
            each(site, maps, now[0])

        places = self._places(first)
        if not places:
            return
        with installed(self.runner.model, self.sites, function):
            for batch in self.images.batches(places):
                now[:] = [batch]
                before(batch)
                self.runner.run(self.runner.to_device(batch.inputs))
                after(batch)

    def find_thresholds(
        self, scratch: Scratch | None, saved: Checkpoint | None, bar: tqdm[Any]
    ) -> None:
        """Go through the images once, for thresholds and top images."""
        bar.update(self.done[0])
        self.first_in_scratch = self.done[0]

        def before(batch: Batch) -> None:
            labels = self._labels(batch.labels, batch)  # refuses wrong ones before any work
            if scratch is not None:
                for each in labels:
                    kind = np.uint8 if len(each.concepts) <= 256 else np.int32
                    scratch.put(each.combination.numpy().astype(kind))
                    scratch.put(each.concepts.numpy())
                    scratch.put(each.n_pixels.numpy())

        def each(site: GateSite, maps: Tensor, batch: Batch) -> None:
            try:
                highest, over = self.tails[site.name].add(maps.flatten(1, 2))
            except ValueError:
                raise ValueError(
                    f"site {site.name!r} holds NaN or infinity for one of the images "
                    f"{batch.numbers[0]} to {batch.numbers[-1]}; the network overflows, or the "
                    "image is broken."
                ) from None
            self._remember(site.name, highest, batch.numbers)
            if scratch is not None:
                self._keep(site.name, maps, over, scratch)

        def after(batch: Batch) -> None:
            if scratch is not None:
                scratch.end()
            self.done[0] += len(batch.numbers)
            bar.update(len(batch.numbers))
            if saved is not None:
                saved.step(len(batch.numbers), self.state)

        self._pass(self.done[0], before, each, after)
        self.thresholds = {name: tail.thresholds() for name, tail in self.tails.items()}
        self.limits = {
            name: not_above(value, self.dtypes[name]) for name, value in self.thresholds.items()
        }

    def _keep(self, name: str, maps: Tensor, over: Tensor, scratch: Scratch) -> None:
        """Write a site's activations to the file; if few of them may matter, only these."""
        tail = self.tails[name]
        n_images, height, width, n_units = maps.shape
        n_places = n_images * (height + 1) * (width + 1) * n_units
        if tail.n_seen >= _FIRST_SPARSE * tail.rank and n_places < 2**31:
            n_bytes = maps.element_size()
            found = touched(maps, over, most=maps.numel() * n_bytes // (4 + 4 * n_bytes))
            if found is not None:
                place = (found.cell * n_units).add_(found.unit)
                scratch.put(place.to(torch.int32).cpu().numpy(), kept=True)
                scratch.put(found.corners.cpu().numpy(), kept=True)
                return
        scratch.put(maps.cpu().numpy())  # the network may write into its own tensor

    def _kept(self, name: str, place: Tensor, corners: Tensor) -> Touched:
        """What :meth:`_keep` wrote, without what is below the threshold."""
        place, corners = place.to(self.runner.device), corners.to(self.runner.device)
        limit = self.limits[name]
        cell = divided(place, len(limit))
        unit = place - cell * len(limit)
        return Touched(cell, unit, corners).above(limit)

    def _remember(self, name: str, highest: Tensor, numbers: Sequence[int]) -> None:
        value, number = self.top[name]
        new = torch.tensor(numbers, device=number.device).expand(len(number), -1)
        value = torch.cat([value, highest.T.double()], 1)
        # Stable: of equal activations the earlier image stays in front.
        value, order = value.sort(dim=1, descending=True, stable=True)
        number = torch.cat([number, new], 1).gather(1, order)
        self.top[name] = value[:, : self.n_top].clone(), number[:, : self.n_top].clone()

    def count_overlaps(
        self, scratch: Scratch | None, saved: Checkpoint | None, bar: tqdm[Any]
    ) -> None:
        """Go through the images again, and count what units and concepts have in common."""
        bar.update(self.done[1])
        now: list[Shown] = []
        rooms: list[list[Tensor]] = []

        def show(labels: Sequence[LabelMaps]) -> None:
            how: dict[str, Any] = {"everywhere": self.unlabelled == "count", "rooms": rooms}
            device = self.runner.device
            now[:] = [Shown(labels, self.category, self.n_categories, device=device, **how)]

        def before(batch: Batch) -> None:
            show(self._labels(batch.labels, batch))

        def each(site: GateSite, maps: Tensor, batch: Batch) -> None:
            found = touched(maps, above(maps, self.limits[site.name]))
            assert found is not None
            self._count(site.name, found, now[0])

        def after(batch: Batch) -> None:
            self.shown += now[0].n_pixels
            self.done[1] += len(batch.numbers)
            bar.update(len(batch.numbers))
            if saved is not None:
                saved.step(len(batch.numbers), self.state)

        if scratch is not None and self.done[1] == self.first_in_scratch:
            for places, parts in zip(self._places(self.done[1]), scratch.records(), strict=False):
                rest = [torch.from_numpy(part) for part in parts]
                numbers = [self.images.numbers[place] for place in places]
                batch = Batch(numbers, (), [], (0, 0))
                show([LabelMaps(rest.pop(0).long(), rest.pop(0), rest.pop(0)) for _ in numbers])
                for site in self.order:
                    if rest[0].ndim == 4:
                        each(site, rest.pop(0).to(self.runner.device), batch)
                    else:
                        found = self._kept(site.name, rest.pop(0), rest.pop(0))
                        self._count(site.name, found, now[0])
                after(batch)
        self._pass(self.done[1], before, each, after)

    def _count(self, name: str, found: Touched, shown: Shown) -> None:
        height, width = self.shapes[name]
        limit = self.limits[name]
        for part in shown.parts:
            own = found
            if len(shown.parts) > 1:
                own = found.of_images(part.place, (height + 1) * (width + 1))
            layout = grid((height, width), part.size, limit.dtype, limit.device)
            # Sums of less than 2^53 pixels: exact.
            counts = count_active(own, limit, part.sums, layout).long()
            n_present = len(part.present)
            self.both[name][:, part.present] += counts[:, :n_present]
            self.active[name] += counts[:, n_present:]

    def _numbers(self, inputs: Inputs) -> Tensor:
        """The network's outputs, of any kind, as one row of numbers per image or pass."""
        outputs = self.runner.run(inputs)
        if isinstance(outputs, Tensor) and outputs.ndim == 2:
            return outputs
        parts = [t.detach().double().flatten().cpu() for t in tensors_in(outputs)]
        return torch.cat(parts)[None] if parts else torch.zeros(1, 1, device="cpu")

    def identity(self) -> dict[str, Any]:
        """What has to be the same in a checkpoint."""
        places = [[0], [len(self.images) - 1]]
        first = (self.runner.to_device(b.inputs) for b in self.images.batches(places))
        return {
            "model_hash": model_hash(self.model),
            "data": self.images.fingerprint(),
            "outputs": fixed_outputs(self._numbers, first),
            "sites": [[s.name, s.n_channels, s.channel_dim, s.at_input] for s in self.sites],
            "concepts": [[concept.name, concept.category] for concept in self.concepts],
            **{name: getattr(self, name) for name in _SETTINGS},
        }

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All counts as arrays, and how far they go."""
        arrays: dict[str, Any] = {"shown": self.shown.numpy()}
        for i, site in enumerate(self.sites):
            name = site.name
            arrays[f"both.{i}"] = self.both[name].cpu().numpy()
            arrays[f"active.{i}"] = self.active[name].cpu().numpy()
            arrays[f"top_value.{i}"] = self.top[name][0].cpu().numpy()
            arrays[f"top_image.{i}"] = self.top[name][1].cpu().numpy()
            for key, value in self.tails[name].state().items():
                arrays[f"tail.{key}.{i}"] = np.asarray(value)
        return arrays, {"done": self.done}

    def restore(self, saved: Checkpoint) -> None:
        """Go on from a checkpoint, if there is one."""
        found = saved.read()
        if found is None:
            return
        arrays, progress = found
        device = self.runner.device
        with saved.checking():
            self.done = [int(n) for n in progress["done"]]
            if len(self.done) != 2 or not 0 <= self.done[1] <= self.done[0] <= len(self.images):
                raise ValueError(f"done with {self.done} images")
            self.shown = _counts(arrays["shown"], self.shown)
            for i, site in enumerate(self.sites):
                name = site.name
                self.both[name] = _counts(arrays[f"both.{i}"], self.both[name])
                self.active[name] = _counts(arrays[f"active.{i}"], self.active[name])
                value = torch.as_tensor(arrays[f"top_value.{i}"], device=device)
                number = torch.as_tensor(arrays[f"top_image.{i}"], device=device)
                if value.shape != number.shape or len(value) != site.n_channels:
                    raise ValueError(f"top images of shape {tuple(number.shape)}")
                self.top[name] = value.double(), number.long()
                prefix, end = "tail.", f".{i}"
                self.tails[name].restore(
                    {
                        key[len(prefix) : -len(end)]: part
                        for key, part in arrays.items()
                        if key.startswith(prefix) and key.endswith(end)
                    }
                )

    @property
    def n_bytes(self) -> int:
        tensors = [*self.both.values(), *self.active.values(), self.shown]
        tensors += [part for pair in self.top.values() for part in pair]
        n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return n_bytes + sum(tail.n_bytes for tail in self.tails.values())

    def result(self, iou_threshold: float) -> UnitConcepts:
        n_top = min(self.n_top, len(self.images))
        iou = {}
        for name, both in self.both.items():
            both = both.cpu()
            union = self.active[name].cpu()[:, self.category] + self.shown - both
            share = both.double() / union.clamp(min=1)
            iou[name] = torch.where(self.shown > 0, share, math.nan).float().numpy()
        info = {
            "n_images": len(self.images),
            "seed": self.seed,
            "exact": self.exact,
            "unlabelled": self.unlabelled,
            "upsampling": "bilinear, align_corners=False",
            "pixels": dict(
                zip(map(str, range(len(self.concepts))), self.shown.tolist(), strict=True)
            ),
            "threshold_error": {n: float(t.errors().max()) for n, t in self.tails.items()},
            "never_active": {
                n: int((value >= self.tails[n].highest).sum())
                for n, value in self.thresholds.items()
            },
            "state_bytes": self.n_bytes,
        }
        return UnitConcepts(
            iou,
            self.concepts,
            source="nad_attr.dissect",
            quantile=self.quantile,
            thresholds={name: value.cpu().numpy() for name, value in self.thresholds.items()},
            top_images={n: number[:, :n_top].cpu().numpy() for n, (_, number) in self.top.items()},
            iou_threshold=iou_threshold,
            info=info,
        )


def _counts(array: Any, like: Tensor) -> Tensor:
    tensor = torch.as_tensor(array, device=like.device)
    if tensor.shape != like.shape or tensor.is_floating_point():
        raise ValueError(f"shape {tuple(tensor.shape)} in place of {tuple(like.shape)}")
    return tensor.long()
