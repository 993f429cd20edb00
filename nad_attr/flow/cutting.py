"""Cut edges between channels for real: some channels do not see others.

A channel with cut edges gets what the block makes with their sources closed; all other channels get
what it makes with them open. So the block runs once for each different set of closed sources, on
copies of the images side by side, from its sites on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.flow.blocks import Gating
from nad_attr.flow.links import OUTPUT
from nad_attr.gates.channels import channels_of, open_gates, to_channels
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import expand, installed
from nad_attr.running.forward import chunks
from nad_attr.sites.site import GateSite, unwrap

__all__ = ["Edges", "Machine", "cut_edges", "recentred"]

#: ``{target site: [(source site, source, target), ...]}``
Edges = Mapping[str, Sequence[tuple[str, int, int]]]
#: Images that go through a block at once, with their copies.
IMAGES = 256


class _ReachedError(Exception):
    """A site's tensor is known; the rest of the network need not run."""


@dataclass(eq=False)
class _PassState:
    """What the next pass does at the sites."""

    given: dict[str, Tensor] = field(default_factory=dict)
    closed: dict[str, Tensor] = field(default_factory=dict)
    copies: int = 1
    copied_at: str | None = None
    wanted: str | None = None
    caught: Tensor | None = None


class Machine:
    """Runs a sub-architecture from given tensors, with channels closed, up to a site.

    ``links`` is from :func:`nad_attr.sites.finding.site_links`; ``width`` is the number of images
    that go through a block at once, with their copies, at most.
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: SubArchitecture,
        sites: Sequence[GateSite],
        links: Mapping[str, Sequence[str]],
        width: int = IMAGES,
    ) -> None:
        self.width = width
        self.root = unwrap(model)
        self.model, self.architecture = model, architecture
        self.sites, self.links = sites, links
        self.by_name = {site.name: site for site in sites}
        self.now = _PassState()
        self.inner = False
        self.n_images = -1
        #: What is added to channels that lack some of their sources: ``{site: (C,)}``.
        self.offsets: dict[str, Tensor] = {}
        #: The means that these offsets are to restore; set while they are fitted.
        self.wanted_means: Mapping[str, Tensor] | None = None
        #: The share of the closed channels' values above their constants that is taken away.
        self.share = 1.0
        #: Whether copies of the images go through the whole network, and not from a site on.
        self.from_start = False
        self._gating: Gating | None = None

    def gating(self, tensor: Tensor) -> Gating:
        """The gates on the tensor's device."""
        if self._gating is None or next(iter(self._gating.gates.values())).device != tensor.device:
            self._gating = Gating(self.architecture, tensor.device)
        return self._gating

    def at_site(self, site: GateSite, tensor: Tensor) -> Tensor:
        """The tensor at a site in this pass."""
        now = self.now
        given = now.given.get(site.name)
        x = self.gating(tensor)(site, tensor) if given is None else given
        if now.wanted == site.name:
            now.caught = x
            raise _ReachedError
        if now.copied_at == site.name and given is None:
            x = x.repeat(now.copies, *[1] * (x.ndim - 1))
        closed = now.closed.get(site.name)
        if closed is None:
            return x
        return self.closing(site, x, closed)

    def closing(self, site: GateSite, x: Tensor, closed: Tensor) -> Tensor:
        """The gates of bool (K, gates) replaced by their constants, in K copies of the images."""
        keep = (
            to_channels(~closed, [site])
            .repeat_interleave(len(x) // len(closed), 0)
            .to(x.device, x.dtype)
        )
        above = self.gating(x).above(site, x)
        return x - self.share * above * (1 - expand(keep, site, x))

    def run(
        self,
        call: Callable[[int], Any],
        wanted: str,
        *,
        copies: int = 1,
        given: Mapping[str, Tensor] | None = None,
        closed: Mapping[str, Tensor] | None = None,
        copied_at: str | None = None,
        placed: tuple[str, Tensor] | None = None,
    ) -> Tensor:
        """A site's tensor, or the output.

        Args:
            call: Runs the network on so many copies of the images.
            wanted: The site, or ``"output"``.
            copies: Number of copies of the images side by side.
            given: Tensors that replace those of sites, for one copy.
            closed: ``{site: bool (copies, C)}``.
            copied_at: The site where copies are made; None: of the images.
            placed: A site and its tensor, for all copies.
        """
        late = copied_at is not None or (placed is not None and self.isolates(placed[0]))
        if late and not self.from_start and copies > 1:
            # A network that has noted the number of its images (``x.view(batch_size, -1)``) cannot
            # get more from a site on: the images themselves are copied then.
            try:
                found = self._run(call, wanted, copies, given, closed, copied_at, placed, late=True)
                n_images = len(found) / copies
                if n_images == self.n_images:
                    return found
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                pass
            self.from_start = True
        return self._run(call, wanted, copies, given, closed, copied_at, placed, late=False)

    def _run(
        self,
        call: Callable[[int], Any],
        wanted: str,
        copies: int,
        given: Mapping[str, Tensor] | None,
        closed: Mapping[str, Tensor] | None,
        copied_at: str | None,
        placed: tuple[str, Tensor] | None,
        *,
        late: bool,
    ) -> Tensor:
        before, inner = self.now, self.inner
        self.now = _PassState(
            {
                name: x.repeat(copies, *[1] * (x.ndim - 1))
                if copies > 1 and (not late or name == copied_at)
                else x
                for name, x in (given or {}).items()
            },
            dict(closed or {}),
            copies,
            copied_at if late else None,
            None if wanted == OUTPUT else wanted,
        )
        self.now.given |= dict([placed] if placed else [])
        self.inner = True
        try:
            output = call(1 if late else copies)
            if wanted != OUTPUT:
                raise GatingError(f"gate site {wanted!r} was not reached.")
            return output  # type: ignore[no-any-return]
        except _ReachedError:
            assert self.now.caught is not None
            return self.now.caught
        finally:
            self.now, self.inner = before, inner

    def copied_at(self, target: str) -> str | None:
        """The only site that all later layers read, if there is one."""
        sources = self.links[target]
        return sources[0] if len(sources) == 1 else None

    def isolates(self, name: str) -> bool:
        """Whether no layer after a site reads a tensor from before it."""
        order = list(self.links)
        at = order.index(name)
        return all(order.index(s) >= at for target in order[at + 1 :] for s in self.links[target])

    def without(
        self,
        call: Callable[[int], Any],
        target: str,
        closed: Sequence[Mapping[str, Sequence[int]]],
        given: Mapping[str, Tensor],
    ) -> Iterator[tuple[range, Tensor]]:
        """A block's results with each of several sets of its sources closed.

        Yields numbers of sets, and (len(numbers), B, ...) of the target site.
        """
        sources = [self.by_name[name] for name in self.links[target]]
        if len(sources) > 1:
            # One source may read another: closed there, it is still untouched here.
            given = dict(given)
            for site in sources:
                if site.name not in given:
                    given[site.name] = self.run(call, site.name, given=given)
        for numbers in chunks(len(closed), max(1, self.width // self.n_images)):
            masks = {
                s.name: torch.zeros(len(numbers), s.n_gates, dtype=torch.bool, device="cpu")
                for s in sources
            }
            for row, number in enumerate(numbers):
                for name, channels in closed[number].items():
                    masks[name][row, list(channels)] = True
            found = self.run(
                call, target, copies=len(numbers), given=given, closed=masks,
                copied_at=self.copied_at(target),
            )  # fmt: skip
            yield numbers, found.reshape(len(numbers), -1, *found.shape[1:])

    def tensors(self, call: Callable[[int], Any], edges: Edges) -> dict[str, Tensor]:
        """The sites' tensors, and the output, of those into which edges are cut."""
        given: dict[str, Tensor] = {}
        for target in self.links:
            cut = edges.get(target, ())
            if not cut:
                continue
            lacking: dict[int, dict[str, set[int]]] = {}
            for name, source, channel in cut:
                lacking.setdefault(channel, {}).setdefault(name, set()).add(source)
            sets: dict[Any, list[int]] = {}
            for channel, sources in lacking.items():
                key = tuple(sorted((name, tuple(sorted(own))) for name, own in sources.items()))
                sets.setdefault(key, []).append(channel)
            closed = [dict(key) for key in sets]
            channels = list(sets.values())
            if target == OUTPUT:
                ((_, output),) = self.without(call, target, closed, given)
                given[OUTPUT] = output[0]
                continue
            site = self.by_name[target]
            made = self.run(call, target, given=given)
            axis = site.channel_dim % made.ndim
            pieces = made.movedim(axis, 0).unbind(0)
            columns = list(pieces)
            for numbers, found in self.without(call, target, closed, given):
                for row, number in enumerate(numbers):
                    for channel in channels_of(site, channels[number]):
                        columns[channel] = found[row].select(axis, channel)
            kept = open_gates(site, self.architecture[target])
            for channel in channels_of(site, [gate for gate in lacking if not kept[gate]]):
                columns[channel] = pieces[channel]
            recentred = channels_of(site, [gate for gate in lacking if kept[gate]])
            if self.wanted_means is not None:
                offset = torch.zeros(site.n_channels, dtype=made.dtype, device=made.device)
                for channel in recentred:
                    offset[channel] = self.wanted_means[target][channel] - columns[channel].mean()
                self.offsets[target] = offset
            if target in self.offsets:
                for channel in recentred:
                    columns[channel] = columns[channel] + self.offsets[target][channel]
            given[target] = torch.stack(columns, axis)
        return given

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """With the sites' hooks in place."""

        def function(site: GateSite, tensor: Tensor) -> Tensor:
            return self.at_site(site, tensor)

        with installed(self.model, self.sites, function):
            yield


@torch.no_grad()
def recentred(
    machine: Machine, call: Callable[[int], Any], edges: Edges, n_images: int
) -> dict[str, Tensor]:
    """Constants for receivers that lack sources, which keep each one's mean: ``{site: (C,)}``.

    Each cut edge shifts its receiver a little, and the shifts of many edges add up from site to
    site. The constants undo that; they are fitted site by site, behind the cuts before, to the
    ``n_images`` images that ``call`` runs. They are zero for channels that lack nothing.
    """
    means: dict[str, Tensor] = {}

    def keep(site: GateSite, tensor: Tensor) -> Tensor:
        x = machine.gating(tensor)(site, tensor)
        axis = site.channel_dim % x.ndim
        means[site.name] = x.mean([a for a in range(x.ndim) if a != axis])
        return x

    machine.n_images = n_images
    with installed(machine.model, machine.sites, keep):
        call(1)
    machine.wanted_means = means
    try:
        with machine.hooked():
            given = machine.tensors(call, edges)
            given.pop(OUTPUT, None)
            machine.run(call, OUTPUT, given=given)  # so that sites behind the last cut fire, too
    finally:
        machine.wanted_means = None
    return dict(machine.offsets)


def _copied(value: Any, n_images: int, copies: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == n_images and copies > 1:
        return value.repeat(copies, *[1] * (value.ndim - 1))
    return value


@contextmanager
def cut_edges(
    model: nn.Module,
    architecture: SubArchitecture,
    sites: Sequence[GateSite],
    links: Mapping[str, Sequence[str]],
    edges: Edges,
    width: int = IMAGES,
    offsets: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Run the network as a sub-architecture with edges cut, inside a ``with`` block.

    Args:
        model: The network; unchanged afterwards.
        architecture: The sub-architecture.
        sites: In forward order.
        links: See :func:`nad_attr.sites.finding.site_links`.
        edges: Those that are cut, by the site that they lead to.
        width: Images that go through a block at once, with their copies, at most.
        offsets: Constants of receivers that lack sources, see :func:`recentred`.
    """
    machine = Machine(model, architecture, sites, links, width)
    machine.offsets.update(offsets or {})
    output: list[Tensor] = []

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if machine.inner:
            return
        n_images = next(len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor))

        def call(copies: int) -> Any:
            return module(
                *(_copied(a, n_images, copies) for a in args),
                **{k: _copied(a, n_images, copies) for k, a in kwargs.items()},
            )

        machine.n_images = n_images
        given = machine.tensors(call, edges)
        output[:] = [given.pop(OUTPUT)] if OUTPUT in given else []
        machine.now = _PassState(given)

    def end(module: nn.Module, args: Any, returned: Any) -> Any:
        if machine.inner:
            return None
        machine.now = _PassState()
        return output[0] if output else None

    root = machine.root
    handles = [root.register_forward_pre_hook(begin, with_kwargs=True)]
    try:
        with machine.hooked():
            handles.append(root.register_forward_hook(end))
            yield
    finally:
        for handle in handles:
            handle.remove()
