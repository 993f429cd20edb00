"""How an information flow is written to a file: as arrays, numbers and texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nad_attr.data.labels import as_task
from nad_attr.flow.links import OUTPUT, Link, TaskFlow
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.sites.site import GateSite

__all__ = ["StoredFlow", "StoredSite"]

_NUMBERS = ("flow", "strength", "straight", "gradient")


@dataclass
class StoredSite:
    """A gate site."""

    name: str
    n_channels: int
    channel_dim: int
    at_input: bool
    groups: tuple[int, ...] | None
    units: str

    @classmethod
    def of(cls, site: GateSite) -> StoredSite:
        """As it is written."""
        facts = (site.name, site.n_channels, site.channel_dim, site.at_input)
        return cls(*facts, site.group_of, site.units)

    def made(self) -> GateSite:
        """As it was."""
        return GateSite(**vars(self))


@dataclass(eq=False)
class StoredLink:
    """A :class:`~nad_attr.flow.links.Link` of arrays."""

    source_site: str
    target_site: str
    n_rest: int
    sources: NDArray[np.int64]
    targets: NDArray[np.int64]
    flow: NDArray[np.float64]
    strength: NDArray[np.float64]
    straight: NDArray[np.float64]
    gradient: NDArray[np.float64]

    @classmethod
    def of(cls, link: Link) -> StoredLink:
        """As it is written."""
        arrays = {n: getattr(link, n).numpy() for n in ("sources", "targets", *_NUMBERS)}
        return cls(link.source_site, link.target_site, link.n_rest, **arrays)

    def made(self, arch: SubArchitecture) -> Link:
        """As it was, if its arrays fit the sites."""
        shape = len(self.sources), len(self.targets) + 1
        widths = {site.name: site.n_gates for site in arch.sites} | {OUTPUT: 1}
        for what, numbers, site in (
            ("sources", self.sources, self.source_site),
            ("targets", self.targets, self.target_site),
        ):
            if numbers.ndim != 1 or any(not 0 <= c < widths[site] for c in numbers.tolist()):
                raise ValueError(f"{what} are not channels of {site!r}")
        for name in _NUMBERS:
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} has shape {getattr(self, name).shape}, not {shape}")
        arrays = {n: _tensor(getattr(self, n)) for n in ("sources", "targets", *_NUMBERS)}
        return Link(self.source_site, self.target_site, n_rest=self.n_rest, **arrays)


@dataclass(eq=False)
class StoredFlow:
    """A :class:`~nad_attr.flow.links.TaskFlow` of arrays."""

    task: Any
    name: str
    n_images: int
    own_constants: bool
    masks: Mapping[str, NDArray[np.bool_]]
    means: Mapping[str, NDArray[np.float64]] | None
    effects: Mapping[str, NDArray[np.float64]]
    links: tuple[StoredLink, ...]
    fitted_on: int | None = None

    @classmethod
    def of(cls, flow: TaskFlow) -> StoredFlow:
        """As it is written."""
        arch, means = flow.architecture, flow.architecture.means
        return cls(
            list(flow.task) if isinstance(flow.task, tuple) else flow.task,
            flow.name,
            flow.n_images,
            arch.own_constants,
            {name: mask.numpy() for name, mask in arch.masks.items()},
            None if means is None else {n: m.double().numpy() for n, m in means.items()},
            {name: effect.numpy() for name, effect in flow.effects.items()},
            tuple(map(StoredLink.of, flow.links)),
            arch.fitted_on,
        )

    def made(self, sites: tuple[GateSite, ...]) -> TaskFlow:
        """As it was, if its arrays fit the sites."""
        task = as_task(tuple(self.task) if isinstance(self.task, list) else self.task)
        arch = SubArchitecture(
            {name: _tensor(mask) for name, mask in self.masks.items()},
            sites,
            task=task,
            means=None if self.means is None else {n: _tensor(m) for n, m in self.means.items()},
            own_constants=self.own_constants,
            fitted_on=self.fitted_on,
        )
        for site in sites:
            if self.effects[site.name].shape != (site.n_gates,):
                raise ValueError(f"effects do not fit the channels of {site.name!r}")
        effects = {name: _tensor(effect) for name, effect in self.effects.items()}
        links = tuple(link.made(arch) for link in self.links)
        return TaskFlow(task, self.name, arch, links, effects, self.n_images)


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array))
