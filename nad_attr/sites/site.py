"""The gate site, and how a network's modules are addressed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn

__all__ = ["UNITS", "GateSite", "SiteError", "unwrap"]

#: Kinds of units that a site's gates close.
UNITS = ("channels", "heads", "neurons")


def check_sites(sites: Sequence[GateSite]) -> tuple[GateSite, ...]:
    """Check that the values are sites."""
    if not isinstance(sites, Iterable) or not all(isinstance(s, GateSite) for s in (*sites,)):
        raise TypeError(
            f"sites must be a list of GateSite, as find_gate_sites returns it, got {sites!r:.80}."
        )
    return tuple(sites)


class SiteError(ValueError):
    """A gate is not possible at this place; the message says where one is possible."""


@dataclass(frozen=True)
class GateSite:
    """A module whose output (or input) tensor gets one gate per channel.

    Attributes:
        name: Qualified name of the module, as in ``model.named_modules()``.
        n_channels: Number of channels.
        channel_dim: Axis of the channels, the batch counted as axis 0: 1 for convolutional and
            (batch, channels) tensors, -1 for channels last.
        at_input: Whether the gate is at the module's input rather than at its output.
        groups: For each channel the number of its group, 0 to G - 1: a group opens and closes as
            one gate. An int G: as many groups of neighbours, equally large. None: each channel is
            a gate of its own.
        units: What a gate stands for: ``"channels"``, the attention ``"heads"`` whose outputs a
            projection takes, or hidden ``"neurons"`` of an MLP.

    Example:
        >>> GateSite("layer1.0", 256)
        GateSite(name='layer1.0', n_channels=256, channel_dim=1, at_input=False)
        >>> GateSite("attn.proj", 6, -1, at_input=True, groups=2, units="heads").groups
        (0, 0, 0, 1, 1, 1)
    """

    name: str
    n_channels: int
    channel_dim: int = 1
    at_input: bool = False
    groups: int | Sequence[int] | None = None
    units: str = "channels"

    def __repr__(self) -> str:
        facts = [f"name={self.name!r}", f"n_channels={self.n_channels}"]
        facts += [f"channel_dim={self.channel_dim}", f"at_input={self.at_input}"]
        if self.group_of is not None:
            facts.append(f"groups={_neighbours(self.group_of) or self.group_of}")
        if self.units != "channels":
            facts.append(f"units={self.units!r}")
        return f"GateSite({', '.join(facts)})"

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise SiteError(
                f"a gate site needs the name of a module inside the model, got {self.name!r}"
            )
        for what, value in (("n_channels", self.n_channels), ("channel_dim", self.channel_dim)):
            if not isinstance(value, int) or isinstance(value, bool):
                raise SiteError(f"site {self.name!r}: {what} must be an int, got {value!r}")
        if self.n_channels < 1:
            raise SiteError(f"site {self.name!r} needs at least one channel, got {self.n_channels}")
        if self.channel_dim == 0:
            raise SiteError(f"site {self.name!r}: axis 0 is the batch and cannot hold the channels")
        if self.units not in UNITS:
            raise SiteError(f"site {self.name!r}: units must be one of {UNITS}, got {self.units!r}")
        if self.groups is not None:
            object.__setattr__(self, "groups", self._checked_groups(self.groups))

    def _checked_groups(self, given: object) -> tuple[int, ...]:
        """The group of each channel."""
        n, called = self.n_channels, f"site {self.name!r}: groups"
        if isinstance(given, int) and not isinstance(given, bool):
            if given < 1 or n % given:
                raise SiteError(f"{called} must be a divisor of its {n} channels, got {given}")
            return tuple(channel // (n // given) for channel in range(n))
        if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
            raise SiteError(f"{called} must be an int or one number a channel, got {given!r}")
        numbers = tuple(given)
        if len(numbers) != n or any(type(number) is not int for number in numbers):
            raise SiteError(f"{called} must be {n} ints, one a channel, got {len(numbers)} values")
        if set(numbers) != set(range(max(numbers) + 1)):
            raise SiteError(f"{called} must be numbered from 0 without a gap")
        return numbers

    @property
    def group_of(self) -> tuple[int, ...] | None:
        """The group of each channel; None: each channel has its own gate."""
        return cast("tuple[int, ...] | None", self.groups)

    @property
    def n_gates(self) -> int:
        """The number of gates. Each group has one, or each channel without groups."""
        return self.n_channels if self.group_of is None else max(self.group_of) + 1


def _neighbours(groups: tuple[int, ...]) -> int | None:
    """Number of groups if they are neighbours and equally large."""
    n = max(groups) + 1
    width = len(groups) // n
    return n if groups == tuple(channel // width for channel in range(len(groups))) else None


def unwrap(model: nn.Module) -> nn.Module:
    """Strip what DataParallel, DistributedDataParallel and torch.compile put around a model.

    Returns:
        The model inside, with the same parameters. Hooks on it fire whichever way it is called,
        except through torch.compile.

    Raises:
        TypeError: If it is not a module.

    Example:
        >>> inner = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(inner)) is inner
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}.")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def resolve_name(
    written: str, modules: Mapping[str, nn.Module], canonical: Mapping[int, str]
) -> str:
    """The canonical name of a module; ``written`` may be an alias or have wrappers' prefixes."""
    name = written
    while name not in modules:
        prefix = next((p for p in ("module.", "_orig_mod.") if name.startswith(p)), None)
        if prefix is None:
            break
        name = name[len(prefix) :]
    if name not in modules:
        near = difflib.get_close_matches(name, list(modules), n=4, cutoff=0.4)
        hint = f"; did you mean {', '.join(map(repr, near))}?" if near else ""
        raise SiteError(f"the model has no module {written!r}{hint}")
    return canonical[id(modules[name])]
