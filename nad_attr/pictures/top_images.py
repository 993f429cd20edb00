"""The images that drive each kept channel most, found in one pass over any amount of data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from nad_attr._checks import as_tensor, check_count, check_mapping
from nad_attr.data.labels import other_images, own_images
from nad_attr.data.layout import Grid, grid_of
from nad_attr.data.sources import Data, as_source, only_images
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import channel_shape, recorded
from nad_attr.pictures.pixels import ToPixels
from nad_attr.running.forward import Runner, chunks
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TopImages", "top_images"]

Pool = Literal["max", "mean"]


@dataclass(frozen=True, eq=False)
class TopImages(Result):
    """For each channel that was looked at, the images with its highest activations.

    Attributes:
        architecture: The sub-architecture whose channels these are.
        channels: ``{site name: int64 (n,)}``, the channels looked at.
        images: ``{site name: int64 (n, k)}``, numbers of images in the data, highest first; -1
            where there are fewer than k images.
        values: ``{site name: float32 (n, k)}``, their activation; NaN where there is none.
        positions: ``{site name: int64 (n, k, 2)}``, row and column of the highest activation on
            the site's grid; -1 at sites without positions.
        grids: ``{site name: (rows, columns)}`` of the sites with positions.
        selectivity: ``{site name: float32 (n,)}``: mean over own images minus mean over others,
            in standard deviations over all; NaN if the sub-architecture says no task or the data
            lacks one of the two.
        pool: How an image's activation is read off the channel's positions, "max" or "mean".
        inside: Whether the network ran as the sub-architecture.
    """

    architecture: SubArchitecture
    channels: dict[str, Tensor]
    images: dict[str, Tensor]
    values: dict[str, Tensor]
    positions: dict[str, Tensor]
    grids: dict[str, tuple[int, int]]
    selectivity: dict[str, Tensor]
    pool: Pool
    inside: bool

    def _channels_of(self, site: str) -> Tensor:
        if site not in self.channels:
            raise KeyError(f"no channels of site {site!r}; there are {list(self.channels)}.")
        return self.channels[site]

    def row(self, site: str, channel: int) -> int:
        """The row of a channel in the tables of a site.

        Raises:
            KeyError: If it was not looked at.
        """
        found = (self._channels_of(site) == channel).nonzero().flatten()
        if len(found) == 0:
            raise KeyError(f"channel {channel} of {site!r} was not looked at.")
        return int(found[0])

    def most_selective(self, site: str, n: int) -> list[int]:
        """Channels with the highest selectivity, or the first ones where that is not known.

        Args:
            site: The site.
            n: How many, at most.

        Raises:
            KeyError: If there are no channels of that site.
        """
        known = self._channels_of(site)
        order = self.selectivity[site].nan_to_num(0.0).argsort(descending=True, stable=True)[:n]
        channels: list[int] = known[order].tolist()
        return channels

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "site": site,
                "channel": str(channel),
                "image": str(image),
                "value": value,
                "selectivity": float(self.selectivity[site][row]),
            }
            for site, channels in self.channels.items()
            for row, channel in enumerate(channels.tolist())
            for image, value in zip(
                self.images[site][row].tolist(), self.values[site][row].tolist(), strict=True
            )
            if image >= 0
        ]

    def plot(
        self,
        model: nn.Module,
        data: Data,
        *,
        site: str | None = None,
        channels: Sequence[int] | None = None,
        n_images: int | None = None,
        crop: float | None = None,
        threshold: float = 0.5,
        to_pixels: ToPixels | None = None,
        run: RunOptions | None = None,
    ) -> Figure:
        """Draw the images of some channels, dimmed where the channel does not respond.

        Args:
            model: The network.
            data: The data that the images were found in.
            site: None: the last site with positions.
            channels: None: the six most selective ones.
            n_images: Of each channel. None: all k.
            crop: Show only a square around the highest activation, of this share of the image's
                shorter side. None: the whole image.
            threshold: Not dimmed: where the activation is above this share of its highest one.
            to_pixels: Undoes the network's preprocessing, see :func:`nad_attr.pictures.as_pixels`.
            run: How to run the network; see :class:`nad_attr.RunOptions`.

        Returns:
            A figure with one row per channel.

        Raises:
            ImportError: If matplotlib is missing.
            KeyError: If a site or channel was not looked at.
            ValueError: If crop or threshold are not shares, or no site has positions.
        """
        from nad_attr.pictures.figures import draw_top_images

        return draw_top_images(
            model,
            self,
            data,
            site=site,
            channels=channels,
            n_images=n_images,
            crop=crop,
            threshold=threshold,
            to_pixels=to_pixels,
            run=run,
        )

    def maps(
        self,
        model: nn.Module,
        site: str,
        channel: int,
        data: Data,
        *,
        run: RunOptions | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A channel's images and its activation on them, computed once more.

        Args:
            model: The network.
            site: The site, one with positions.
            channel: The channel.
            data: The data that the images were found in.
            run: How to run the network; see :class:`nad_attr.RunOptions`.

        Returns:
            The images (k', C, H, W) as the network takes them, and the activations float32
            (k', h, w), highest image first.

        Raises:
            KeyError: If the channel was not looked at.
            ValueError: If the site has no positions.
        """
        row = self.row(site, channel)
        if site not in self.grids:
            raise ValueError(f"site {site!r} has no positions to look at.")
        runner = Runner(model, run)
        numbers = [i for i in self.images[site][row].tolist() if i >= 0]
        (inputs,) = runner.draw(as_source(data, any_labels=True), [numbers])
        images = only_images(inputs)
        (at,) = [s for s in self.architecture.sites if s.name == site]
        with torch.no_grad(), ExitStack() as stack:
            stack.enter_context(_network(runner, self.architecture, self.inside))
            activations = stack.enter_context(recorded(runner.model, [at]))
            runner.run(inputs)
        values, grid, _ = _by_channel(at, activations[site], images.shape[-2] / images.shape[-1])
        assert grid is not None
        return images.cpu(), grid.maps(values[..., channel]).float().cpu()


def _network(runner: Runner, arch: SubArchitecture, inside: bool) -> AbstractContextManager[None]:
    return arch.applied(runner.model) if inside else nullcontext()


def _by_channel(
    site: GateSite, tensor: Tensor, aspect: float
) -> tuple[Tensor, Grid | None, tuple[int, ...]]:
    """A site's tensor with the channels last, its grid and the shape of its positions."""
    dim, _ = channel_shape(site, tensor)
    shape = tensor.shape[:dim] + tensor.shape[dim + 1 :]
    grid, _ = grid_of(shape, aspect, None)
    return tensor.movedim(dim, -1), grid, tuple(shape[1:])


class _Best:
    """The k highest values of each channel of a site so far; equal values: the earlier image."""

    def __init__(self, site: GateSite, channels: Tensor, k: int, pool: Pool) -> None:
        self.site, self.channels, self.k, self.pool = site, channels, k, pool
        n = len(channels)
        self.values = torch.full((n, k), float("nan"), device="cpu")
        self.images = torch.full((n, k), -1, dtype=torch.int64, device="cpu")
        self.where = torch.full((n, k), -1, dtype=torch.int64, device="cpu")
        self.grid: tuple[int, int] | None = None
        # Sums over own, over other images, of squares over both.
        self.own, self.other, self.squares = (
            torch.zeros(n, dtype=torch.float64, device="cpu") for _ in range(3)
        )

    def add(
        self, tensor: Tensor, numbers: Tensor, own: Tensor, other: Tensor, aspect: float
    ) -> None:
        values, grid, _ = _by_channel(self.site, tensor, aspect)
        values = values[..., self.channels.to(values.device)].float()
        if not bool(torch.isfinite(values).all()):
            raise ValueError(f"gate site {self.site.name!r} holds NaN or infinity.")
        if grid is not None:
            self.grid = (grid.height, grid.width)
            skipped = grid.n_prefix
            flat = values.flatten(1, -2) if skipped is None else values[:, skipped:]
        else:
            flat = values.flatten(1, -2) if values.ndim > 2 else values[:, None]
        highest, where = flat.max(dim=1)  # (B, n)
        scores = highest if self.pool == "max" else flat.mean(1)
        scores, where = scores.cpu(), where.cpu()
        wide = scores.double()
        self.own += wide[own].sum(0)
        self.other += wide[other].sum(0)
        self.squares += wide[own | other].square().sum(0)
        if grid is None:
            where = torch.full_like(where, -1)
        candidates = torch.cat([self.values, scores.T], dim=1)
        images = torch.cat([self.images, numbers.expand(len(self.channels), -1)], dim=1)
        places = torch.cat([self.where, where.T], dim=1)
        # Empty places come last; the sort is stable, and images come in order.
        order = candidates.nan_to_num(-float("inf")).argsort(dim=1, descending=True, stable=True)
        order = order[:, : self.k]
        self.values, self.images = candidates.gather(1, order), images.gather(1, order)
        self.where = places.gather(1, order)

    def positions(self) -> Tensor:
        """Row and column of the highest activations: int64 (n, k, 2)."""
        width = 1 if self.grid is None else self.grid[1]
        rows = self.where.div(width, rounding_mode="floor")
        found = torch.stack([rows, self.where % width], dim=-1)
        return torch.where(self.where[..., None] < 0, -1, found)

    def selectivity(self, n_own: int, n_other: int) -> Tensor:
        """Own mean minus other mean, in standard deviations over both: float32 (n,)."""
        if not n_own or not n_other:
            return torch.full((len(self.channels),), float("nan"), device="cpu")
        n = n_own + n_other
        difference = self.own / n_own - self.other / n_other
        mean = (self.own + self.other) / n
        spread = (self.squares / n - mean.square()).clamp_min(0).sqrt()
        return torch.where(spread > 0, difference / spread, torch.zeros((), device="cpu")).float()


def _chosen_channels(
    arch: SubArchitecture, sites: Sequence[str] | None, channels: Mapping[str, Any] | None
) -> dict[str, Tensor]:
    known = {site.name: site.n_channels for site in arch.sites}
    wanted = list(known) if sites is None else list(sites)
    if channels is not None:
        check_mapping(channels, "channels")
        wanted = [name for name in wanted if name in channels] if sites is None else wanted
    for name in [*wanted, *(channels or {})]:
        if name not in known:
            raise ValueError(f"no gate site {name!r}; there are {list(known)}.")
    kept, chosen = arch.kept, {}
    for name in wanted:
        if channels is None or name not in channels:
            chosen[name] = kept[name]
            continue
        numbers = as_tensor(channels[name], f"channels of {name!r}")
        whole = not (numbers.is_floating_point() or numbers.dtype == torch.bool)
        if numbers.numel() and not (
            whole and int(numbers.min()) >= 0 and int(numbers.max()) < known[name]
        ):
            raise ValueError(
                f"channels of {name!r} must be whole numbers from 0 to {known[name] - 1}."
            )
        chosen[name] = numbers.flatten().long()
    chosen = {name: numbers for name, numbers in chosen.items() if len(numbers)}
    if not chosen:
        raise ValueError("there is no channel to look at: the sub-architecture keeps none there.")
    return chosen


def top_images(
    model: nn.Module,
    architecture: SubArchitecture,
    data: Data,
    *,
    k: int = 9,
    sites: Sequence[str] | None = None,
    channels: Mapping[str, Any] | None = None,
    pool: Pool = "max",
    inside: bool = False,
    run: RunOptions | None = None,
) -> TopImages:
    """Find the images in which each kept channel is most active.

    One pass over the data, in which ``k`` numbers per channel are kept, so the data may be of any
    size. Of images with equal activations, the first counts.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        architecture: The sub-architecture.
        data: Images: ``(inputs, labels)`` tensors, a Dataset of (input, label) or a DataLoader.
        k: Images of each channel.
        sites: Names of the sites to look at; None: all, or those named in ``channels``.
        channels: ``{site name: channel numbers}``; None, or a site left out: those that the
            sub-architecture keeps.
        pool: "max": an image's activation is the highest over positions; "mean": their mean.
        inside: Run the network as the sub-architecture. False: the whole network, in which a
            channel means the same for all classes.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        The images' numbers, activations and positions, and each channel's selectivity.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind.
        ValueError: If there is nothing to look at, the network is in train mode, or values are
            not finite.

    Example:
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Identity(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
        ... ).eval()
        >>> arch = SubArchitecture.from_kept({"0": [1]}, [GateSite("0", 2, 1)], task=0)
        >>> images = torch.zeros(3, 2, 4, 4)
        >>> images[2, 1, 0, 3], images[0, 1, 2, 2] = 5.0, 3.0
        >>> found = top_images(net, arch, (images, torch.tensor([0, 1, 0])), k=2)
        >>> found.images["0"], found.values["0"], found.positions["0"].tolist()
        (tensor([[2, 0]]), tensor([[5., 3.]]), [[[0, 3], [2, 2]]])
    """
    if not isinstance(architecture, SubArchitecture):
        raise TypeError(
            f"architecture must be a SubArchitecture, got {type(architecture).__name__}; take "
            "gates.sub_architecture(task)."
        )
    check_count(k, "k")
    if pool not in ("max", "mean"):
        raise ValueError(f"pool must be 'max' or 'mean', got {pool!r}.")
    chosen = _chosen_channels(architecture, sites, channels)
    runner = Runner(model, run)
    source = as_source(data, any_labels=True)
    with suppress(TypeError, ValueError):  # the network need not be a classifier
        runner.fit(source)
    at = [site for site in architecture.sites if site.name in chosen]
    best = {site.name: _Best(site, chosen[site.name], k, pool) for site in at}
    n, task = len(source.labels), architecture.task
    none = torch.zeros(n, dtype=torch.bool, device="cpu")
    own = none if task is None else own_images(source.labels, [task])[0]
    other = none if task is None else other_images(source.labels, [task])[0]
    parts = [list(part) for part in chunks(n, runner.images_per_pass(source))]
    with torch.no_grad(), ExitStack() as stack:
        stack.enter_context(_network(runner, architecture, inside))
        activations = stack.enter_context(recorded(runner.model, at))
        for part, inputs in zip(parts, runner.draw(source, parts, "top images"), strict=True):
            images = only_images(inputs)
            runner.run(inputs)
            numbers = torch.tensor(part, device="cpu")
            for name, keeper in best.items():
                aspect = images.shape[-2] / images.shape[-1]
                keeper.add(activations[name], numbers, own[numbers], other[numbers], aspect)
    return TopImages(
        architecture=architecture,
        channels=chosen,
        images={name: keeper.images for name, keeper in best.items()},
        values={name: keeper.values for name, keeper in best.items()},
        positions={name: keeper.positions() for name, keeper in best.items()},
        grids={name: keeper.grid for name, keeper in best.items() if keeper.grid is not None},
        selectivity={n_: b.selectivity(int(own.sum()), int(other.sum())) for n_, b in best.items()},
        pool=pool,
        inside=inside,
    )
