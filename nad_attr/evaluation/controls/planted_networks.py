"""Networks that are built and not trained, so that the role of each channel is known.

Every channel is one of a named group, and the groups' weights to each other are written down: they
say what a logit depends on. Positions and activation sizes are drawn anew at every gate site, so
that neither tells a group. :mod:`nad_attr.evaluation.controls.planted` makes circuits of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr.system.rng import seed_of

__all__ = [
    "PLANTED_KINDS",
    "Group",
    "Kind",
    "Layout",
    "Plan",
    "build_network",
    "draw_images",
    "layout_of",
]

Kind: TypeAlias = Literal[
    "plain", "residual", "distractors", "cancelling", "shared", "redundant", "constant"
]
PLANTED_KINDS: tuple[Kind, ...] = get_args(Kind)

#: Images are IN_CHANNELS x SIDE x SIDE and hold POSITIONS patches that do not overlap.
IN_CHANNELS, SIDE, PATCH = 3, 8, 4
POSITIONS = (SIDE // PATCH) ** 2
PATCH_NUMBERS = IN_CHANNELS * PATCH**2

#: A channel subtracts this before its ReLU, so that no network is linear.
THRESHOLD = 0.05
#: How much of the other channels of its group a channel reads, at most, against 1 of its own.
MIX = 0.3
#: How much of the neighbouring positions a channel reads, at most.
SPREAD = 0.3
#: Activation sizes are 2 to the power of one of these, those of distractors to one of the others.
#: Powers of two, so that copies compute the same to the last bits.
GAINS = range(-2, 3)
LOUD_GAINS = range(2, 5)
#: Weight of a decoy that is read, against 1 for a channel of the circuit.
DECOY_WEIGHT = 3.0
#: Smallest share of a class's evidence a channel can bring, against 1 for the largest.
LEAST_EVIDENCE = 0.3
#: Standard deviation that every logit has over the data.
LOGIT_DEVIATION = 1.5


@dataclass(frozen=True)
class Group:
    """Channels with one role; the same ones at every gate site (``slots``, before scattering).

    Roles: "circuit" (evidence for class ``of``), "inhibitor" (fires on class ``of``, lowers the
    next class), "shared" (used by class ``of`` and the one before), "distractor" (fires on class
    ``of``, is read by nothing that reaches a logit), "pair" (two equal channels with opposite
    weights after each other), "constant" or "background". ``copy`` numbers copies that each
    suffice.
    """

    role: str
    of: int
    copy: int
    slots: range


@dataclass(frozen=True)
class Layout:
    """The groups at every gate site of a network (together all channels), and the settings."""

    kind: Kind
    n_classes: int
    width: int
    copies: int
    groups: tuple[Group, ...]

    def of(self, *roles: str) -> Iterator[Group]:
        """The groups of some roles."""
        return (group for group in self.groups if group.role in roles)

    def circuit(self, k: int, copy: int = 0) -> list[int]:
        """The slots that logit k depends on, through one copy."""
        before = (k - 1) % self.n_classes
        after = (k + 1) % self.n_classes
        wanted = [g for g in self.of("circuit") if (g.of, g.copy) == (k, copy)]
        wanted += [g for g in self.of("inhibitor") if g.of == before]
        wanted += [g for g in self.of("shared") if g.of in (k, after)]
        return sorted(slot for group in wanted for slot in group.slots)

    def decoys(self, k: int) -> list[int]:
        """The slots that seem to matter for class k, and do not."""
        wanted = [g for g in self.of("distractor", "pair") if g.of == k]
        wanted += self.of("constant")
        return sorted(slot for group in wanted for slot in group.slots)


def layout_of(kind: Kind, n_classes: int, circuit_width: int, width: int, copies: int) -> Layout:
    """Divide the channels of a gate site among groups; a ValueError if there are too few channels.

    Example:
        >>> layout = layout_of("cancelling", 2, 3, 16, 1)
        >>> layout.circuit(1), layout.decoys(1)
        ([3, 4, 5], [8, 9])
    """
    n_inhibitors = circuit_width // 3 if kind == "distractors" else 0
    n_shared = max(1, circuit_width // 4) if kind == "shared" else 0
    sizes: list[tuple[str, int, int, int]] = []
    for copy in range(copies):
        own = circuit_width - n_inhibitors - 2 * n_shared
        sizes += [("circuit", k, copy, own) for k in range(n_classes)]
    for role, n in (
        ("inhibitor", n_inhibitors),
        ("shared", n_shared),
        ("distractor", circuit_width if kind == "distractors" else 0),
        ("pair", 2 * max(1, circuit_width // 2) if kind == "cancelling" else 0),
    ):
        sizes += [(role, k, 0, n) for k in range(n_classes) if n]
    if kind == "constant":
        sizes.append(("constant", 0, 0, circuit_width))
    needed = sum(n for *_, n in sizes)
    if needed > width:
        raise ValueError(
            f"width is {width}, but a {kind!r} network of {n_classes} classes with circuits of "
            f"{circuit_width} channels needs {needed} channels at each gate site; raise width or "
            "lower circuit_width."
        )
    sizes.append(("background", 0, 0, width - needed))
    groups, start = [], 0
    for role, k, copy, n in sizes:
        groups.append(Group(role, k, copy, range(start, start + n)))
        start += n
    return Layout(kind, n_classes, width, copies, tuple(groups))


class PlantedHead(nn.Module):
    """Mean over positions, then one linear output per class; with copies, the highest of them.

    Each of several copies has a threshold that it does not reach when its channels are at their
    means: a copy that is closed, at zero or at its means, leaves the output to the other one.
    """

    def __init__(self, width: int, n_classes: int, copies: int) -> None:
        super().__init__()
        self.copies = copies
        self.linear = _linear(width, copies * n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of maps (B, C, H, W)."""
        outputs: Tensor = self.linear(x.mean(dim=(2, 3)))
        if self.copies == 1:
            return outputs
        highest: Tensor = F.relu(outputs).unflatten(1, (self.copies, -1)).amax(1)
        return highest


class PlantedBlock(nn.Module):
    """``relu(x + conv2(relu(conv1(x))))``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _convolution(width, width, 3, padding=1)
        self.relu1 = nn.ReLU()
        self.conv2 = _convolution(width, width, 3, padding=1)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B, C, H, W) to maps of the same shape."""
        out: Tensor = self.relu2(x + self.conv2(self.relu1(self.conv1(x))))
        return out


def _convolution(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, padding: int = 0
) -> nn.Conv2d:
    """A convolution, made without drawing random numbers: they are set by hand."""
    layer = nn.utils.skip_init(nn.Conv2d, inputs, outputs, kernel, stride=stride, padding=padding)
    assert isinstance(layer, nn.Conv2d)
    return layer


def _linear(inputs: int, outputs: int) -> nn.Linear:
    """A linear layer whose weights are not drawn."""
    layer = nn.utils.skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    return layer


class Plan:
    """Everything that is drawn for a network, in the order in which it is drawn."""

    def __init__(self, layout: Layout, seed: int) -> None:
        self.layout = layout
        shape = (layout.kind, layout.n_classes, layout.width, layout.copies, len(layout.groups))
        self.generator = torch.Generator().manual_seed(seed_of("planted", *shape, seed))

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """float64 numbers in [low, high)."""
        drawn = torch.rand(*shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return low + (high - low) * drawn

    def places(self) -> Tensor:
        """The channel of each slot, int64 (width,)."""
        return torch.randperm(self.layout.width, generator=self.generator, device="cpu")

    def gains(self) -> Tensor:
        """How large each slot's activations are, (width,)."""
        gains = self._powers(GAINS, self.layout.width)
        for group in self.layout.of("distractor"):
            gains[list(group.slots)] = self._powers(LOUD_GAINS, len(group.slots))
        for group in self.layout.of("pair"):  # both of a pair are the same channel
            gains[list(group.slots[1::2])] = gains[list(group.slots[::2])]
        return gains

    def _powers(self, exponents: range, n: int) -> Tensor:
        bounds = exponents.start, exponents.stop
        return 2.0 ** torch.randint(*bounds, (n,), generator=self.generator, device="cpu").double()

    def kernel(self) -> Tensor:
        """How a channel reads the neighbourhood of a position: (3, 3), 1 in the middle."""
        kernel = self.uniform(3, 3, high=SPREAD)
        kernel[1, 1] = 1.0
        return kernel

    def mixture(self, n: int, m: int | None = None) -> Tensor:
        """What n channels read of m: in one group mainly the channel with the same number."""
        weights = self.uniform(n, n if m is None else m, high=MIX)
        return weights if m is not None else weights.fill_diagonal_(1.0)

    def templates(self) -> tuple[Tensor, Tensor]:
        """The patterns that the first gate site detects in a patch, and the classes that have them.

        float64 (width, numbers in a patch) of unit length, and bool (classes, width). Equal slots
        have the same pattern; constants have none.
        """
        layout = self.layout
        n_blocks = -(-layout.width // PATCH_NUMBERS)
        shape = (n_blocks, PATCH_NUMBERS, PATCH_NUMBERS)
        drawn = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        # Orthogonal as far as there is room, so that hardly any evidence looks like another.
        templates = torch.linalg.qr(drawn).Q.flatten(0, 1)[: layout.width].clone()
        shown = torch.zeros(layout.n_classes, layout.width, dtype=torch.bool, device="cpu")
        first = {g.of: list(g.slots) for g in layout.of("circuit") if g.copy == 0}
        for group in layout.groups:
            slots = list(group.slots)
            if group.role == "circuit":
                templates[slots] = templates[first[group.of]]
                # The images hold the evidence once, for the first copy.
                shown[group.of, slots] = group.copy == 0
            elif group.role == "pair":
                templates[slots[1::2]] = templates[slots[::2]]
                shown[group.of, slots[::2]] = True
            elif group.role == "shared":
                shown[group.of, slots] = True
                shown[(group.of - 1) % layout.n_classes, slots] = True
            elif group.role in ("inhibitor", "distractor"):
                shown[group.of, slots] = True
            elif group.role == "constant":
                templates[slots] = 0.0
        return templates, shown

    def bias(self) -> Tensor:
        """(width,)."""
        bias = torch.full((self.layout.width,), -THRESHOLD, dtype=torch.float64, device="cpu")
        for group in self.layout.of("constant"):
            bias[list(group.slots)] = 1.0
        return bias

    def wiring(self) -> tuple[Tensor, Tensor]:
        """Weights of the slots of the site before (width, width), rows read columns, and biases."""
        layout, n = self.layout, self.layout.width
        weights = torch.zeros(n, n, dtype=torch.float64, device="cpu")
        bias = self.bias()
        # Background reads everything, weakly, and only background reads it.
        noise = torch.randn(n, n, generator=self.generator, dtype=torch.float64, device="cpu")
        noise /= n**0.5
        inside: dict[tuple[str, int], Tensor] = {}
        for group in layout.groups:
            rows = torch.tensor(list(group.slots), dtype=torch.long, device="cpu")
            if group.role == "background":
                weights[rows] = noise[rows]
            elif group.role == "pair":
                for i in group.slots[::2]:
                    weights[i : i + 2, i : i + 2] = 0.5
            elif group.role != "constant":
                key = (group.role, group.of)  # copies read the same way
                if key not in inside:
                    inside[key] = self.mixture(len(rows))
                weights[rows[:, None], rows] = inside[key]
        for group in layout.of("circuit"):
            self._read_shared_and_decoys(group, weights, bias)
        return weights, bias

    def _read_shared_and_decoys(self, group: Group, weights: Tensor, bias: Tensor) -> None:
        layout, rows = self.layout, torch.tensor(list(group.slots), dtype=torch.long, device="cpu")
        if not len(rows):
            return
        for shared in layout.of("shared"):
            if shared.of in (group.of, (group.of + 1) % layout.n_classes):
                columns = torch.tensor(list(shared.slots), device="cpu")
                weights[rows[:, None], columns] = self.mixture(len(rows), len(columns))
        for pair in layout.of("pair"):
            if pair.of == group.of:
                for i in pair.slots[::2]:
                    reader = rows[int(self.uniform(1, high=len(rows)))]
                    weights[reader, i], weights[reader, i + 1] = DECOY_WEIGHT, -DECOY_WEIGHT
        for constant in layout.of("constant"):
            for i in constant.slots:
                reader = rows[int(self.uniform(1, high=len(rows)))]
                weights[reader, i] = DECOY_WEIGHT
                bias[reader] -= DECOY_WEIGHT

    def readout(self) -> tuple[Tensor, Tensor]:
        """What the logits read of the last gate site: (copies x classes, width), and the bias."""
        layout = self.layout
        k_total = layout.n_classes
        bias = torch.zeros(layout.copies * k_total, dtype=torch.float64, device="cpu")
        weights = bias[:, None].repeat(1, layout.width)
        evidence: dict[int, Tensor] = {}
        for group in layout.of("circuit", "shared", "inhibitor"):
            n = len(group.slots)
            share = self.uniform(n, low=LEAST_EVIDENCE)
            if group.role == "circuit":
                share = evidence.setdefault(group.of, share)  # the same from every copy
                weights[group.copy * k_total + group.of, list(group.slots)] = share
            elif group.role == "shared":
                weights[group.of, list(group.slots)] = share
                weights[(group.of - 1) % k_total, list(group.slots)] = self.uniform(
                    n, low=LEAST_EVIDENCE
                )
            else:
                weights[(group.of + 1) % k_total, list(group.slots)] = -share
        for pair in layout.of("pair"):
            weights[pair.of, list(pair.slots[::2])] = DECOY_WEIGHT
            weights[pair.of, list(pair.slots[1::2])] = -DECOY_WEIGHT
        for constant in layout.of("constant"):
            weights[:, list(constant.slots)] = DECOY_WEIGHT
            bias -= DECOY_WEIGHT * len(constant.slots)
        return weights, bias


@dataclass(frozen=True, eq=False)
class Scattered:
    """The channels of a gate site's slots, and how large their activations are."""

    places: Tensor
    gains: Tensor

    def rows(self, weights: Tensor) -> Tensor:
        """Weights that write to this site: rows scaled and put in place."""
        shape = (-1, *[1] * (weights.ndim - 1))
        result = torch.empty_like(weights)
        result[self.places] = weights * self.gains.view(shape)
        return result

    def columns(self, weights: Tensor) -> Tensor:
        """Weights that read this site: columns scaled back and put in place."""
        shape = (1, -1, *[1] * (weights.ndim - 2))
        result = torch.empty_like(weights)
        result[:, self.places] = weights / self.gains.view(shape)
        return result


def _set(layer: nn.Conv2d | nn.Linear, weight: Tensor, bias: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        assert layer.bias is not None
        layer.bias.copy_(bias)


def _spread(plan: Plan, weights: Tensor) -> Tensor:
    """(out, in) to (out, in, 3, 3)."""
    kernel = plan.kernel().expand(*weights.shape, 3, 3).clone()
    for group in plan.layout.of("constant"):
        # At the border less of a neighbourhood is inside: only the middle stays constant.
        kernel[:, list(group.slots)] = 0.0
        kernel[:, list(group.slots), 1, 1] = 1.0
    return weights[:, :, None, None] * kernel


def build_network(
    plan: Plan, depth: int, templates: Tensor
) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """The network in float32 and eval mode, its logits not yet scaled, and the slots' channels.

    The channels are int64 (width,) for each gate site, by module name in forward order.
    """
    layout, width = plan.layout, plan.layout.width
    layers: list[tuple[str, nn.Module]] = []
    places: dict[str, Tensor] = {}

    stem = _convolution(IN_CHANNELS, width, PATCH, stride=PATCH)
    here = Scattered(plan.places(), plan.gains())
    patches = templates.view(width, IN_CHANNELS, PATCH, PATCH)
    _set(stem, here.rows(patches), here.rows(plan.bias()))
    layers += [("conv0", stem), ("relu0", nn.ReLU())]
    places["relu0"] = here.places
    for d in range(1, depth):
        if layout.kind == "residual":
            block = PlantedBlock(width)
            inner = Scattered(plan.places(), plan.gains())
            weights, bias = plan.wiring()
            _set(block.conv1, inner.rows(here.columns(_spread(plan, weights))), inner.rows(bias))
            weights, bias = plan.wiring()
            # The stream keeps its places and activation sizes: it is added to.
            _set(block.conv2, here.rows(inner.columns(_spread(plan, weights))), here.rows(bias))
            layers.append((f"block{d}", block))
            places[f"block{d}.relu1"] = inner.places
            places[f"block{d}"] = here.places
        else:
            conv = _convolution(width, width, 3, padding=1)
            there = Scattered(plan.places(), plan.gains())
            weights, bias = plan.wiring()
            _set(conv, there.rows(here.columns(_spread(plan, weights))), there.rows(bias))
            layers += [(f"conv{d}", conv), (f"relu{d}", nn.ReLU())]
            places[f"relu{d}"] = there.places
            here = there
    head = PlantedHead(width, layout.n_classes, layout.copies)
    weights, bias = plan.readout()
    _set(head.linear, here.columns(weights), bias)
    layers.append(("head", head))
    model = nn.Sequential()
    for name, layer in layers:
        model.add_module(name, layer)
    return model.eval(), places


def scale_logits(model: nn.Sequential, images: Tensor) -> None:
    """Give every logit the same deviation over the images, and give copies their thresholds."""
    head = model.head
    assert isinstance(head, PlantedHead)
    linear = head.linear
    with torch.no_grad():
        features = images
        for layer in list(model)[:-1]:
            features = layer(features)
        outputs = linear(features.mean(dim=(2, 3))).double()
        # Copies are the same up to rounding, and stay so with the numbers of the first.
        first = outputs.unflatten(1, (head.copies, -1))[:, 0]
        deviation = first.std(0).clamp(min=1e-6).repeat(head.copies)
        mean = first.mean(0).repeat(head.copies)
        scale = (LOGIT_DEVIATION / deviation)[:, None]
        weight, bias = linear.weight.double(), linear.bias.double()
        if head.copies > 1:
            # A little above the mean, where a copy of closed channels is.
            bias = bias - mean - 0.1 * deviation
        _set(linear, weight * scale, bias * scale[:, 0])


def draw_images(
    templates: Tensor, shown: Tensor, n_images: int, noise: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images with the evidence of their class, and some of others, at random places.

    ``templates`` is float64 (F, numbers in a patch); ``shown``, bool (K, F), says which class's
    images hold which evidence. Classes come equally often, up to one. The images are float32
    (N, 3, 8, 8), the labels int64 (N,).
    """
    n_classes, n_features = shown.shape

    numbers: dict[str, Any] = {"generator": generator, "dtype": torch.float64, "device": "cpu"}

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n_images, n_features, **numbers)

    order = torch.randperm(n_images, generator=generator, device="cpu")
    labels = (torch.arange(n_images, device="cpu") % n_classes)[order]
    own = shown[labels]
    known = shown.any(0)
    strong, weak = uniform(0.6, 1.6), uniform(0.2, 0.8)
    seldom = uniform(0.0, 1.0) < 0.3
    amount = torch.where(own, strong, torch.where(seldom & known, weak, 0.0))
    where = torch.randint(POSITIONS, (n_images, n_features), generator=generator, device="cpu")
    at = F.one_hot(where, POSITIONS).double() * amount[:, :, None]
    patches = torch.einsum("nfp,fd->ndp", at, templates)
    patches = patches + noise * torch.randn((n_images, PATCH_NUMBERS, POSITIONS), **numbers)
    images = F.fold(patches, (SIDE, SIDE), kernel_size=PATCH, stride=PATCH)
    return images.float(), labels


def scattered(places: Mapping[str, Tensor], slots: Sequence[int]) -> dict[str, Tensor]:
    """The channels of some slots at each gate site: ``{site name: int64}``."""
    return {name: place[list(slots)].sort().values for name, place in places.items()}
