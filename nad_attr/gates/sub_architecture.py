"""The sub-architecture of one task: for each channel, kept or closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from os import PathLike
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nad_attr._checks import as_tensor, check_mapping
from nad_attr._display import MOST_ROWS, html_table
from nad_attr.data.labels import Task, as_task
from nad_attr.gates.channels import (
    check_means,
    distinct_sites,
    jaccard,
    kappa,
    n_channels,
    n_gates,
    open_gates,
)
from nad_attr.gating.hooks import gated
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result

__all__ = ["SubArchitecture"]


def fitting(n_images: int | None) -> str:
    """The number of images that constants were fitted on, for a text."""
    return "" if n_images is None else f", fitted on {n_images} images"


class SubArchitecture(Result):
    """The channels that are kept for one task, at each gate site.

    Args:
        masks: ``{site name: bool (C,)}``, True = kept.
        sites: The gate sites, in forward order.
        task: The class index, or tuple of class indices, that it was found for, if any.
        means: ``{site name: (C,)}``, what replaces a closed channel; None: zero.
        own_constants: Whether ``means`` are constants fitted to this sub-architecture, rather than
            means over data.
        fitted_on: Number of images they were fitted on, if known.

    Attributes:
        sites: The gate sites, in forward order.
        task: The task, or None.
        means: Float32 copies of the means, on the CPU, or None.
        own_constants: As given; False without means.
        fitted_on: As given; None without ``own_constants``.

    Raises:
        TypeError: If a mask is not boolean, or an argument has a wrong type.
        ValueError: If masks and sites do not fit.

    Example:
        >>> site = GateSite("layer1", 4, 1)
        >>> arch = SubArchitecture({"layer1": torch.tensor([True, False, True, False])}, [site])
        >>> arch.size, arch.kept["layer1"].tolist()
        (0.5, [0, 2])
        >>> arch
        SubArchitecture(2 of 4 channels (50.0 %) at 1 site, closed channels zero)
        >>> arch | ~arch == SubArchitecture.full([site])
        True

    Two are equal if sites, masks, task and means are. Sub-architectures that are made from one
    another, or by one :meth:`TaskGates.sub_architectures`, share their means: do not change them.
    """

    _ALONE = True
    __slots__ = ("_masks", "fitted_on", "means", "own_constants", "sites", "task")

    def __init__(
        self,
        masks: Mapping[str, Tensor],
        sites: Sequence[GateSite],
        *,
        task: Task | None = None,
        means: Mapping[str, Tensor] | None = None,
        own_constants: bool = False,
        fitted_on: int | None = None,
    ) -> None:
        self.sites = distinct_sites(sites)
        if not self.sites:
            raise ValueError("a sub-architecture needs at least one gate site.")
        check_mapping(masks, "masks")
        names = [site.name for site in self.sites]
        if set(names) != set(masks):
            raise ValueError(f"masks are for {list(masks)}, the sites are {names}.")
        self._masks: dict[str, Tensor] = {}
        for site in self.sites:
            mask = as_tensor(masks[site.name], f"masks of {site.name!r}")
            if mask.dtype != torch.bool:
                raise TypeError(
                    f"mask of {site.name!r} has dtype {mask.dtype}, not bool; binarise gates with "
                    "TaskGates.sub_architecture(task) or a comparison."
                )
            if mask.shape != (site.n_channels,):
                raise ValueError(
                    f"mask of {site.name!r} has shape {tuple(mask.shape)}, "
                    f"expected ({site.n_channels},)."
                )
            self._masks[site.name] = mask.detach().cpu().clone()
            open_gates(site, self._masks[site.name])
        self.task: Task | None = None if task is None else as_task(task)
        self.means = check_means(means, self.sites)
        self.own_constants = own_constants and self.means is not None
        self.fitted_on = fitted_on if self.own_constants else None

    @property
    def closed_at(self) -> str:
        """What replaces closed channels, in words, as :attr:`TaskGates.closed_at`."""
        if self.own_constants:
            return f"at constants of their own{fitting(self.fitted_on)}"
        return "zero" if self.means is None else "at their mean"

    @classmethod
    def full(cls, sites: Sequence[GateSite]) -> SubArchitecture:
        """The whole network: every channel kept."""
        return cls(
            {s.name: torch.ones(s.n_channels, dtype=torch.bool, device="cpu") for s in sites}, sites
        )

    @classmethod
    def from_kept(
        cls,
        kept: Mapping[str, Sequence[int] | Tensor],
        sites: Sequence[GateSite],
        *,
        task: Task | None = None,
        means: Mapping[str, Tensor] | None = None,
    ) -> SubArchitecture:
        """Make one from channel numbers; sites without an entry keep nothing.

        Raises:
            TypeError: If channels are not whole numbers.
            ValueError: If a channel or site does not exist.

        Example:
            >>> sites = [GateSite("a", 3, 1), GateSite("b", 2, 1)]
            >>> SubArchitecture.from_kept({"a": [0, 2]}, sites).sizes["b"]
            0.0
        """
        check_mapping(kept, "kept")
        unknown = set(kept) - {site.name for site in sites}
        if unknown:
            raise ValueError(f"no gate site {sorted(unknown)[0]!r}.")
        masks = {}
        for site in sites:
            mask = torch.zeros(site.n_channels, dtype=torch.bool, device="cpu")
            channels = as_tensor(kept.get(site.name, []), f"kept channels of {site.name!r}")
            if channels.numel() == 0:
                channels = channels.long()
            if channels.is_floating_point() or channels.dtype == torch.bool:
                raise TypeError(
                    f"kept channels of {site.name!r} are {channels.dtype}, not whole numbers."
                )
            if bool(((channels < 0) | (channels >= site.n_channels)).any()):
                raise ValueError(
                    f"{site.name!r} has channels 0 to {site.n_channels - 1}, not "
                    f"{channels.tolist()}."
                )
            mask[channels.long()] = True
            masks[site.name] = mask
        return cls(masks, sites, task=task, means=means)

    def __getitem__(self, name: str) -> Tensor:
        """The mask of a site: bool (C,), True = kept."""
        try:
            return self._masks[name].clone()
        except KeyError:
            raise KeyError(f"no gate site {name!r}; there are {list(self._masks)}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def masks(self) -> dict[str, Tensor]:
        """``{site name: bool (C,)}`` in forward order (copies)."""
        return {name: mask.clone() for name, mask in self._masks.items()}

    @property
    def kept(self) -> dict[str, Tensor]:
        """``{site name: channel numbers that are kept, int64}``."""
        return {name: mask.nonzero().flatten() for name, mask in self._masks.items()}

    @property
    def n_kept(self) -> int:
        """Kept channels over all sites; a group of channels counts once."""
        return sum(map(self._kept_at, self.sites))

    @property
    def n_channels(self) -> int:
        """Channels over all sites."""
        return n_channels(self.sites)

    @property
    def size(self) -> float:
        """Kept channels / all channels, over all sites; a group of channels counts once."""
        return self.n_kept / n_gates(self.sites)

    @property
    def sizes(self) -> dict[str, float]:
        """``{site name: kept / all channels}``; a group of channels counts once."""
        return {s.name: self._kept_at(s) / s.n_gates for s in self.sites}

    def _kept_at(self, site: GateSite) -> int:
        """The number of open gates of a site."""
        return int(open_gates(site, self._masks[site.name]).sum())

    def gates(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """The masks as numbers 0 and 1, ``{site name: (C,)}``."""
        return {name: mask.to(dtype) for name, mask in self._masks.items()}

    def applied(self, model: nn.Module) -> AbstractContextManager[None]:
        """Run the network as this sub-architecture inside a ``with`` block.

        Args:
            model: The network; unchanged afterwards.

        Raises:
            GatingError: If a site does not fire or has another shape.
            SiteError: If the network has no such site.
        """
        return gated(model, self)

    def export(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Tensor, ...],
        *,
        head: Literal["whole", "task"] = "whole",
        merge_bn: bool = False,
        check: bool = True,
    ) -> nn.Module:
        """This sub-architecture as a smaller network: a plain module with the same outputs.

        Weights are cut to the kept channels of their sites, and channels inside a block that
        nothing reads are removed. Constants of closed channels go into biases, or into maps of
        border corrections where zero padding makes them differ. An operator that cannot be cut
        still reads all channels, closed ones as constants; the summary says so.

        The result is a ``torch.fx.GraphModule`` of PyTorch's own operators: it can be run, pickled,
        fine-tuned and exported without this library. :func:`nad_attr.export.save` writes it to a
        file, :func:`nad_attr.export.summary` gives its cost and its kept channels.

        Args:
            model: The network, in eval mode; unchanged. It shares nothing with the result.
            example_inputs: Its input, one image or more. The result takes any number of images of
                this size, on the device of the network.
            head: ``"task"`` keeps the task's column of the output alone, (B, 1); a group of classes
                keeps a column each.
            merge_bn: Whether BatchNorm layers are merged into the convolutions before them.
            check: Whether to compare the result with the gated network, on noise.

        Raises:
            ExportError: If ``torch.export`` cannot write the network as a graph, or the result
                differs from the gated network by more than rounding.
            GatingError, SiteError: If the sites are not this network's.
            TypeError, ValueError: If an argument has a wrong type, there is no task for
                ``head="task"``, or the network is in train mode.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
            >>> arch = SubArchitecture.from_kept({"1": [2, 5]}, [GateSite("1", 8)], task=0)
            >>> small = arch.export(net, torch.zeros(1, 4), head="task")
            >>> {name: tuple(tensor.shape) for name, tensor in small.state_dict().items()}
            {'0.weight': (2, 4), '0.bias': (2,), '2.weight': (1, 2), '2.bias': (1,)}
        """
        from nad_attr.export.exporting import export

        return export(model, self, example_inputs, head=head, merge_bn=merge_bn, check=check)

    def cost(
        self, model: nn.Module, example_inputs: Tensor | tuple[Tensor, ...], **options: Any
    ) -> Any:
        """The costs of this sub-architecture as a separate network and of the whole network.

        Args:
            model: The network, in eval mode; unchanged.
            example_inputs: Its input.
            options: ``head`` and ``merge_bn``, as for :meth:`export`.

        Returns:
            A :class:`nad_attr.export.Summary`: parameters and multiply-adds of both, of each
            block, and the share that could be cut.

        Raises:
            ExportError, GatingError, SiteError, TypeError, ValueError: As :meth:`export`.

        Example:
            >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
            >>> arch = SubArchitecture.from_kept({"1": [2, 5]}, [GateSite("1", 8)])
            >>> cost = arch.cost(net, torch.zeros(1, 4))
            >>> cost.whole.parameters, cost.smaller.parameters, cost.smaller.multiply_adds
            (67, 19, 14)
        """
        from nad_attr.export.costs import summary

        return summary(self.export(model, example_inputs, check=False, **options))

    def to_crp_condition(self, target: object = None) -> dict[str, list[int]]:
        """The kept channels as a condition of concept relevance propagation (zennit-crp).

        A condition masks the backward pass of the whole network only; it does not run the network
        as this sub-architecture. :mod:`nad_attr.bridges.crp` shows both side by side.

        Args:
            target: The class index, or several, at which relevance starts; None: the task.

        Returns:
            ``{"y": [class index, ...], site name: [channel, ...], ...}``, sites from last to first,
            as ``crp.attribution.CondAttribution`` of zennit-crp 0.6.0 takes it in its list of
            conditions (with ``ChannelConcept.mask``, its default). Sites where every channel is
            kept are left out: they mask nothing.

        Raises:
            ValueError: If there is no target, or channels are closed at a site that such a
                condition cannot mask: a layer's input, or channels that are not on axis 1.

        Example:
            >>> sites = [GateSite("layer1", 3, 1), GateSite("layer2", 2, 1)]
            >>> arch = SubArchitecture.from_kept({"layer1": [0, 2], "layer2": [1]}, sites, task=7)
            >>> arch.to_crp_condition()
            {'y': [7], 'layer2': [1], 'layer1': [0, 2]}

        Source:
            Achtibat et al., "From attribution maps to human-understandable explanations through
            Concept Relevance Propagation", Nature Machine Intelligence 2023.
        """
        task = self.task if target is None else as_task(target)
        if task is None:
            raise ValueError("there is no target: this sub-architecture has no task; name a class.")
        condition = {"y": [*task] if isinstance(task, tuple) else [task]}
        for site in reversed(self.sites):
            mask = self._masks[site.name]
            if bool(mask.all()):
                continue
            if site.at_input or site.channel_dim != 1:
                where = "the input" if site.at_input else f"axis {site.channel_dim}"
                raise ValueError(
                    f"gate site {site.name!r} has its channels at {where}; a CRP condition masks "
                    "axis 1 of a module's output. Leave that site out of the sub-architecture."
                )
            condition[site.name] = mask.nonzero().flatten().tolist()
        return condition

    def with_means(
        self,
        means: Mapping[str, Tensor] | None,
        *,
        own_constants: bool = False,
        fitted_on: int | None = None,
    ) -> SubArchitecture:
        """The same channels with another ablation value: per-channel means, or None for zero.

        Args:
            means: ``{site name: (C,)}``.
            own_constants: Whether they are constants fitted to this sub-architecture, rather than
                means over data.
            fitted_on: Number of images they were fitted on, if known.
        """
        return SubArchitecture(
            self._masks,
            self.sites,
            task=self.task,
            means=means,
            own_constants=own_constants,
            fitted_on=fitted_on,
        )

    def _with_masks(self, masks: Mapping[str, Tensor], task: Task | None) -> SubArchitecture:
        """Other channels of the same sites, with the same means (not copied)."""
        made = SubArchitecture(masks, self.sites, task=task)
        made.means, made.own_constants = self.means, self.own_constants
        made.fitted_on = self.fitted_on
        return made

    def _gating(
        self, tasks: object
    ) -> tuple[Mapping[str, Tensor], tuple[GateSite, ...], Mapping[str, Tensor] | None]:
        if tasks is not None:
            raise ValueError("a sub-architecture is for one task already; leave out tasks=.")
        return self.gates(), self.sites, self.means

    # -- set algebra ---------------------------------------------------------------------------

    def _check_same_sites(self, other: SubArchitecture) -> None:
        if not isinstance(other, SubArchitecture):
            raise TypeError(f"expected a SubArchitecture, got {type(other).__name__}.")
        if self.sites != other.sites:
            raise ValueError("the two sub-architectures have different gate sites.")

    def _combined(
        self, other: SubArchitecture, function: Callable[[Tensor, Tensor], Tensor]
    ) -> SubArchitecture:
        self._check_same_sites(other)
        masks = {name: function(mask, other._masks[name]) for name, mask in self._masks.items()}
        return self._with_masks(masks, self.task if self.task == other.task else None)

    def __or__(self, other: SubArchitecture) -> SubArchitecture:
        """Channels kept by either."""
        return self._combined(other, torch.logical_or)

    def __and__(self, other: SubArchitecture) -> SubArchitecture:
        """Channels kept by both."""
        return self._combined(other, torch.logical_and)

    def __sub__(self, other: SubArchitecture) -> SubArchitecture:
        """Channels kept by this one and not by the other."""
        return self._combined(other, lambda a, b: a & ~b)

    def __invert__(self) -> SubArchitecture:
        """The complement: channels that this one closes."""
        masks = {name: ~mask for name, mask in self._masks.items()}
        return self._with_masks(masks, self.task)

    def overlaps(
        self, other: SubArchitecture, *, chance_corrected: bool = False
    ) -> dict[str, float]:
        """Overlap with another sub-architecture at each site.

        Args:
            other: A sub-architecture of the same sites.
            chance_corrected: Whether to use :func:`kappa`, which is 0 for random channels of these
                sizes, in place of |A and B| / |A or B|.

        Returns:
            ``{site name: overlap}``.

        Raises:
            ValueError: If the sites differ.
        """
        self._check_same_sites(other)
        measure = kappa if chance_corrected else jaccard
        return {name: measure(mask, other._masks[name]) for name, mask in self._masks.items()}

    def overlap(self, other: SubArchitecture, *, chance_corrected: bool = False) -> float:
        """Mean over sites of the overlap with another sub-architecture (the paper's similarity).

        Large sub-architectures overlap by chance alone: two random ones of size 0.8 have 0.67.
        Compare with ``chance_corrected=True``, which is 0 for them.

        Args:
            other: A sub-architecture of the same sites.
            chance_corrected: See :meth:`overlaps`.

        Raises:
            ValueError: If the sites differ.
        """
        values = self.overlaps(other, chance_corrected=chance_corrected).values()
        return sum(values) / len(values)

    # -- identity, display, files --------------------------------------------------------------

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SubArchitecture):
            return NotImplemented
        return (
            (self.sites, self.task) == (other.sites, other.task)
            and same_tensors(self._masks, other._masks)
            and same_tensors(self.means, other.means)
        )

    def __hash__(self) -> int:
        # Adding zero turns -0 into 0, which is equal to it but has other bytes.
        means = [self.means[site.name] + 0.0 for site in self.sites] if self.means else []
        numbers = [*self._masks.values(), *means]
        bits = b"".join(value.numpy().tobytes() for value in numbers)
        return hash((self.sites, self.task, bits))

    def __repr__(self) -> str:
        sites = f"{len(self.sites)} site" + ("s" if len(self.sites) > 1 else "")
        task = "" if self.task is None else f"task {self.task}: "
        return (
            f"SubArchitecture({task}{self.n_kept:,} of {n_gates(self.sites):,} {self._counted} "
            f"({100 * self.size:.1f} %) at {sites}, closed channels {self.closed_at})"
        )

    @property
    def _counted(self) -> str:
        """What sizes count, in words."""
        return "channels" if all(site.groups is None for site in self.sites) else "gates"

    def _repr_html_(self) -> str:
        shown = self.sites[:MOST_ROWS]
        rows = [[site.name, f"{self._kept_at(site):,} of {site.n_gates:,}"] for site in shown]
        note = f"closed channels {self.closed_at}"
        if len(self.sites) > MOST_ROWS:
            note = f"and {len(self.sites) - MOST_ROWS} more sites; {note}"
        task = "" if self.task is None else f" of task {self.task}"
        return html_table(
            f"Sub-architecture{task}: {self.n_kept:,} of {n_gates(self.sites):,} {self._counted} "
            f"({100 * self.size:.1f} %)",
            ["site", f"kept {self._counted}"],
            rows,
            bars=list(self.sizes.values())[:MOST_ROWS],
            note=note,
        )

    def _records(self, task: str | None = None) -> list[dict[str, Any]]:
        first = {} if task is None else {"task": task}
        return [
            {**first, "site": s.name, "n_channels": s.n_gates, "n_kept": n, "size": n / s.n_gates}
            for s in self.sites
            for n in [self._kept_at(s)]
        ]

    def summary(self) -> str:
        """Kept channels at each site, as plain text."""
        return f"{self!r}\n{super().summary()}"

    @classmethod
    def _types(cls) -> dict[str, Any]:
        return {
            "masks": dict[str, Tensor], "sites": tuple[GateSite, ...], "task": Any,
            "means": dict[str, Tensor] | None, "own_constants": bool, "fitted_on": int | None,
        }  # fmt: skip

    def _fields(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in self._types() if name != "masks"}
        return {"masks": self._masks, **own}

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> SubArchitecture:
        return cls(**fields)

    def _save_hdf5(self, path: str | PathLike[str], group: str | None) -> None:
        from nad_attr.store import write_sub_architecture

        write_sub_architecture(self, path)

    @classmethod
    def _load_hdf5(cls, path: str | PathLike[str], group: str | None) -> SubArchitecture:
        from nad_attr.store import read_sub_architecture

        return read_sub_architecture(path)


def same_tensors(a: Mapping[str, Tensor] | None, b: Mapping[str, Tensor] | None) -> bool:
    """Whether both hold the same sites and numbers, or both are None."""
    if a is None or b is None:
        return a is b
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())
