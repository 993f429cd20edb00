"""Where: do the channels of a task look at the task's image, among four in one mosaic?

Four images of four classes form a 2x2 grid. At each gate site, the sub-architecture of one of the
classes gives a map, the sum over channels of its gated activations; its hit is the share of the
highest 10 % of positions that lie in the quadrant of the class. A map that does not depend on the
class gives exactly 0.25 on average over the four quadrants.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr._checks import check_count
from nad_attr.data.labels import Task
from nad_attr.data.layout import Grid, grid_of
from nad_attr.data.sources import Data, Inputs, as_source, only_images
from nad_attr.evaluation.questions.mosaic_result import MosaicResult
from nad_attr.evaluation.responses import Rows
from nad_attr.evaluation.rows import NamedArchitectures, named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import channel_shape, installed
from nad_attr.running.forward import Runner, check_classes, chunks
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.stats.tables import FloatArray
from nad_attr.system.rng import seed_of

__all__ = ["mosaics", "quadrant_shares"]


#: Maps that vary by less than this share of the activations that they sum are constant: rounding.
ROUNDING = 1e-5


def _halves(n: int) -> Tensor:
    """Which share of each of n equal cells lies in the first and in the second half: (2, n)."""
    first = (n / 2 - torch.arange(n, dtype=torch.float64, device="cpu")).clamp(0, 1)
    return torch.stack([first, 1 - first])


def quadrant_shares(maps: Tensor, *, top: float = 0.1) -> Tensor:
    """Share of the highest positions of a map that lies in each quadrant.

    Positions that are equal at the threshold count by the share of them that is still needed: the
    expected value over all ways to break the tie. A constant map gives the quadrants' areas. The
    number of highest positions is ``top`` times all, whole or not; a position on the line between
    quadrants counts by area. So the four shares always sum to one.

    Args:
        maps: Real numbers (..., H, W), higher counts first.
        top: Share of the positions that count as highest, in (0, 1].

    Returns:
        float64 (..., 4): top left, top right, bottom left, bottom right.

    Raises:
        ValueError: If maps have no positions or hold NaN, or ``top`` is not a share.

    Example:
        >>> a_map = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
        >>> quadrant_shares(a_map, top=0.25)
        tensor([1., 0., 0., 0.], dtype=torch.float64)
        >>> quadrant_shares(a_map, top=0.5)
        tensor([0.5000, 0.0000, 0.2500, 0.2500], dtype=torch.float64)
        >>> quadrant_shares(torch.ones(3, 3))
        tensor([0.2500, 0.2500, 0.2500, 0.2500], dtype=torch.float64)
    """
    _check_top(top)
    if maps.ndim < 2 or maps.shape[-1] == 0 or maps.shape[-2] == 0 or maps.is_complex():
        raise ValueError(f"maps must be real, of shape (..., H, W), got {tuple(maps.shape)}.")
    if bool(maps.isnan().any()):
        raise ValueError("maps hold NaN.")
    height, width = maps.shape[-2:]
    area = torch.einsum("ah,bw->hwab", _halves(height), _halves(width)).reshape(-1, 4)
    flat = maps.detach().flatten(-2)
    # MPS has no float64.
    flat = (flat.cpu() if flat.device.type == "mps" else flat).double()
    n_top = top * flat.shape[-1]
    last = min(max(math.ceil(n_top) - 1, 0), flat.shape[-1] - 1)
    threshold = flat.sort(dim=-1, descending=True).values[..., last : last + 1]
    above, tied = (flat > threshold).double(), (flat == threshold).double()
    wanted = n_top - above.sum(-1, keepdim=True)
    weight = above + tied * (wanted / tied.sum(-1, keepdim=True))
    return (weight / n_top) @ area.to(flat.device)


def _check_top(top: float) -> None:
    if isinstance(top, bool) or not isinstance(top, (int, float)) or not 0 < top <= 1:
        raise ValueError(f"top must be a share of the positions in (0, 1], got {top!r}.")


class _Maps(Rows):
    """Gates by row, and the map of each site: sum over channels of gate * activation."""

    def __init__(
        self,
        architectures: Sequence[SubArchitecture],
        device: torch.device,
        *,
        aspect: float,
        prefix: int | None,
        absolute: bool,
        top: float,
    ) -> None:
        super().__init__(architectures, device)
        self.aspect, self.prefix, self.absolute, self.top = aspect, prefix, absolute, top
        self.grids: dict[str, Grid] = {}
        self.left_out: dict[str, str] = {}
        #: Quadrant shares of the latest pass, ``{site name: float64 (B, 4)}`` on the CPU.
        self.shares: dict[str, Tensor] = {}

    def __call__(self, site: GateSite, tensor: Tensor) -> Tensor | None:
        new = super().__call__(site, tensor)
        if self.rows is None:
            return new
        dim, _ = channel_shape(site, tensor)
        shape = tensor.shape[:dim] + tensor.shape[dim + 1 :]
        if site.name not in self.grids and site.name not in self.left_out:
            grid, reason = grid_of(shape, self.aspect, self.prefix)
            if grid is None:
                self.left_out[site.name] = reason
            else:
                self.grids[site.name] = grid
        if site.name in self.grids:
            # The activation times its gate, without the means of closed channels: these add the
            # same number to all positions, and with it rounding.
            gate = self.gates[site.name].to(tensor.device)[self.rows.to(tensor.device)]
            values = tensor.detach().movedim(dim, -1)
            between = [1] * (values.ndim - 2)
            values = values * gate.to(values.dtype).reshape(len(gate), *between, -1)
            self.shares[site.name] = self._shares(site, values)
        return new

    def _shares(self, site: GateSite, values: Tensor) -> Tensor:
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"gate site {site.name!r} holds NaN or infinity.")
        # Only one number in C is kept of it, so float64 costs little (MPS has none).
        wide = torch.float32 if values.device.type == "mps" else torch.float64
        total = values.abs().sum(-1, dtype=wide)
        sums = total if self.absolute else values.sum(-1, dtype=wide)
        grid = self.grids[site.name]
        maps, scale = grid.maps(sums), grid.maps(total).amax((1, 2), keepdim=True)
        constant = maps.amax((1, 2), keepdim=True) - maps.amin((1, 2), keepdim=True)
        maps = maps.masked_fill(constant <= ROUNDING * scale, 0.0)
        return quadrant_shares(maps, top=self.top).cpu()


def choose(
    labels: Tensor, tasks: Sequence[Task], n: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose tasks and images of each mosaic: a function of the seed and the mosaic's number.

    They are rows of ``tasks`` and numbers of images, int64 (n, 4) each: top left, top right, bottom
    left, bottom right. Tasks without images are passed over.

    Raises:
        ValueError: If tasks share a class, or fewer than four have images.

    Example:
        >>> rows, images = choose(torch.tensor([5, 6, 7, 8]), [5, 6, 7, 8], n=2, seed=0)
        >>> rows.shape, bool((rows == images).all())  # image i is the only one of task i
        ((2, 4), True)
    """
    members = [task if isinstance(task, tuple) else (task,) for task in tasks]
    every = [m for group in members for m in group]
    if len(set(every)) < len(every):
        raise ValueError("tasks share a class, so that an image could belong to two of them.")
    own = [
        torch.isin(labels, labels.new_tensor(group)).nonzero()[:, 0].numpy() for group in members
    ]
    able = np.array([row for row, images in enumerate(own) if len(images)], dtype=np.int64)
    if len(able) < 4:
        raise ValueError(
            f"a mosaic needs images of four tasks; data holds images of {len(able)} of the "
            f"{len(tasks)}."
        )
    chosen, images = np.empty((n, 4), dtype=np.int64), np.empty((n, 4), dtype=np.int64)
    for i in range(n):
        generator = np.random.default_rng(seed_of("mosaic", seed, i))
        chosen[i] = generator.permutation(able)[:4]
        images[i] = [own[row][generator.integers(len(own[row]))] for row in chosen[i]]
    return chosen, images


def assemble(images: Tensor, resize: bool) -> Tensor:
    """Put each four of images (4 B, C, H, W) together in a grid (B, C, 2 H, 2 W).

    The order is top left, top right, bottom left, bottom right; ``resize`` makes mosaics as large
    as an image, by antialiased bilinear interpolation.

    Example:
        >>> assemble(torch.arange(4.0).reshape(4, 1, 1, 1), resize=False)
        tensor([[[[0., 1.],
                  [2., 3.]]]])
    """
    tiles = images.unflatten(0, (-1, 4))
    top = torch.cat([tiles[:, 0], tiles[:, 1]], dim=-1)
    bottom = torch.cat([tiles[:, 2], tiles[:, 3]], dim=-1)
    whole = torch.cat([top, bottom], dim=-2)
    if not resize:
        return whole
    shape = tiles.shape[-2:]
    return F.interpolate(whole, size=shape, mode="bilinear", antialias=True, align_corners=False)


def mosaics(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    data: Data,
    *,
    n: int = 1000,
    top: float = 0.1,
    seed: int = 0,
    size: float | None = None,
    resize: bool = True,
    absolute: bool = False,
    prefix_tokens: int | None = None,
    run: RunOptions | None = None,
) -> MosaicResult:
    """Ask at each gate site whether a task's channels look at the task's quadrant of a mosaic.

    Each mosaic holds images of four tasks, and runs through the sub-architectures of these four
    and through the whole network. The map of a site is the sum over channels of the gated
    activation inside the sub-architecture, behind all gates before it. Closed channels add nothing
    to a map, also if a mean replaces them. A position of the map belongs to the part of the image
    at the same place. A mosaic's images and their order depend on ``seed`` and its number alone.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architectures: Task gates, or sub-architectures of the same sites, each of another task;
            at least four.
        data: Images that the gates were not learned on: ``(inputs, labels)`` tensors, a Dataset
            of (input, label) or a DataLoader. The inputs are images (C, H, W).
        n: Number of mosaics.
        top: Share of the positions that count as highest.
        seed: Of the mosaics.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        resize: Make the mosaic of the images' own size, by antialiased bilinear interpolation.
            False: twice as high and wide, for networks that take any size.
        absolute: Sum the activations' absolute values, for sites where they take both signs.
        prefix_tokens: Tokens in front of those of the image (class token, registers) at sites that
            hold a list of tokens. None: none or one, as the number of tokens says.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The hits. Sites without positions (vectors, tokens that are not a grid of the image's
        shape) are left out, and named.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If the network is in train mode or cannot be run on the mosaics, fewer than
            four tasks have images, tasks share a class, no site has positions, labels or tasks are
            no class of the network, or values are not finite.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Identity(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        ... ).eval()
        >>> site = GateSite("0", 4, 1)
        >>> archs = [SubArchitecture.from_kept({"0": [k]}, [site], task=k) for k in range(4)]
        >>> images = torch.eye(4)[..., None, None].expand(-1, -1, 8, 8)  # class k is in channel k
        >>> result = mosaics(net, archs, (images, torch.arange(4)), n=5, top=0.1)
        >>> result.mean("hit"), result.mean("excess")
        (array([1.]), array([0.75]))
    """
    given = named_architectures(architectures, size, least=4)
    check_count(n, "n")
    _check_top(top)
    if prefix_tokens is not None:
        check_count(prefix_tokens, "prefix_tokens", least=0)
    runner = Runner(model, run)
    source = as_source(data)
    chosen, images = choose(source.labels, given.tasks, n, seed)
    # The whole network as one more row; its task has no effect.
    full = SubArchitecture.full(given.sites).masks
    whole = SubArchitecture(full, given.sites, task=given.tasks[0])
    (one,) = runner.draw(source, [[int(images[0, 0])]])
    height, width = only_images(one).shape[-2:]
    maps = _Maps(
        [*given.architectures, whole],
        runner.device,
        aspect=height / width,
        prefix=prefix_tokens,
        absolute=absolute,
        top=top,
    )
    # The sub-architectures of the four quadrants, and the whole network.
    rows = torch.nn.functional.pad(torch.from_numpy(chosen), (0, 1), value=len(given.tasks))
    shares = _run(runner, maps, source, images, rows, given, resize)
    names = tuple(site.name for site in given.sites if site.name in maps.grids)
    kept = [i for i, site in enumerate(given.sites) if site.name in maps.grids]
    return MosaicResult(
        sites=names,
        depths=np.linspace(0, 1, len(given.sites))[kept],
        grids={name: (maps.grids[name].height, maps.grids[name].width) for name in names},
        left_out=dict(maps.left_out),
        tasks=given.tasks,
        task_names=given.task_names,
        chosen=chosen,
        images=images,
        shares=shares[:, :, :4],
        whole=shares[:, :, 4],
        top=float(top),
        seed=seed,
    )


def _run(
    runner: Runner,
    maps: _Maps,
    source: Any,
    images: NDArray[np.int64],
    rows: Tensor,
    given: NamedArchitectures,
    resize: bool,
) -> FloatArray:
    """Quadrant shares of n mosaics through five networks each: float64 (n, S, 5, 4)."""
    n, n_rows = rows.shape
    shares: FloatArray | None = None

    def probe(inputs: Inputs) -> None:
        whole = assemble(only_images(tuple(torch.cat([x] * 4) for x in inputs)), resize)
        place = torch.zeros(len(whole), dtype=torch.int64, device="cpu")
        maps.gated_pass(runner, (whole,), place, place)

    with (
        runner.bar(n, "mosaics", "mosaic") as bar,
        torch.no_grad(),
        installed(runner.model, maps.sites, maps),
    ):
        batch_size = runner.images_per_pass(source, probe)
        some = list(chunks(n, max(1, batch_size // n_rows)))
        numbers = [images[chosen[0] : chosen[-1] + 1].ravel().tolist() for chosen in some]
        for chosen, inputs in zip(some, runner.draw(source, numbers), strict=True):
            whole = assemble(only_images(inputs), resize)
            for pairs in chunks(len(chosen) * n_rows, batch_size):
                pair = torch.arange(pairs[0], pairs[-1] + 1, device="cpu")
                mosaic, row = pair // n_rows, pair % n_rows
                at = mosaic + chosen[0]
                outputs = maps.gated_pass(
                    runner, (whole[mosaic.to(whole.device)],), rows[at, row], at
                )
                if shares is None:
                    check_classes(source.labels, given.tasks, outputs.shape[1])
                    if not maps.grids:
                        why = "; ".join(f"{k!r}: {v}" for k, v in maps.left_out.items())
                        raise ValueError(f"no gate site has positions to look at ({why}).")
                    shares = np.empty((n, len(maps.grids), n_rows, 4))
                for s, site in enumerate(x for x in maps.sites if x.name in maps.grids):
                    shares[at.numpy(), s, row.numpy()] = maps.shares[site.name].numpy()
            bar.update(len(chosen))
    assert shares is not None
    return shares
