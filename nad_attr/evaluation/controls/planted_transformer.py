"""A transformer that is built and not trained: the role of each head and neuron is known."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr._checks import check_count
from nad_attr.evaluation.controls.planted import PlantedCircuit
from nad_attr.evaluation.controls.planted_networks import (
    IN_CHANNELS,
    LEAST_EVIDENCE,
    LOGIT_DEVIATION,
    MIX,
    PATCH,
    PATCH_NUMBERS,
    THRESHOLD,
    draw_images,
)
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import isolated_rng, seed_of

__all__ = ["planted_heads"]

#: Numbers that a head writes.
HEAD_WIDTH = 4
#: Lowest and highest gain of a distractor.
LOUDER = (2.0, 4.0)
#: How sharply a head looks at the tokens that hold its evidence.
SHARPNESS = 4.0


class _Tokens(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(IN_CHANNELS, width, PATCH, stride=PATCH)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 8, 8) -> (B, 4, width)."""
        tokens: Tensor = self.patches(x)
        return tokens.flatten(2).transpose(1, 2)


class _Block(nn.Module):
    """Attention and two layers, each with a shortcut; without normalisation, which reads all."""

    def __init__(self, width: int, n_heads: int, hidden: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, n_heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = x + self.mlp(x)
        return out


class _Head(nn.Module):
    """Mean over tokens, then one linear output per class."""

    def __init__(self, width: int, n_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> (B, K)."""
        outputs: Tensor = self.linear(x.mean(1))
        return outputs


class _Draw:
    def __init__(self, *key: object) -> None:
        self.generator = torch.Generator().manual_seed(seed_of("planted heads", *key))

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64, device="cpu")

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        drawn = torch.rand(*shape, generator=self.generator, dtype=torch.float64, device="cpu")
        return low + (high - low) * drawn

    def places(self, n: int) -> list[int]:
        found: list[int] = torch.randperm(n, generator=self.generator, device="cpu").tolist()
        return found


def _set(layer: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight.view_as(layer.weight))  # type: ignore[arg-type, operator]
        layer.bias.zero_() if bias is None else layer.bias.copy_(bias)  # type: ignore[operator]


def planted_heads(
    *,
    n_classes: int = 3,
    depth: int = 2,
    circuit_width: int = 2,
    n_heads: int = 16,
    hidden: int = 32,
    seed: int = 0,
    n_images: int = 240,
    noise: float = 0.1,
) -> PlantedCircuit:
    """Build a transformer whose class-specific attention heads and hidden neurons are known.

    Nothing is trained. In each block each class has ``circuit_width`` heads and as many hidden
    neurons of the MLP: the first block's heads detect a pattern of the class and write it to all
    tokens, the neurons read the heads, the next block's heads read the neurons, and the class's
    logit reads the last neurons. As many *distractor* heads and neurons read the same as those of
    the circuit with two to four times larger activations; no logit reads them. The others are
    background, which reads everything, and which only background reads. The residual stream is
    rotated at random, so none of its channels belongs to one class. There is no LayerNorm: with
    it, each head would change what all others write.

    Args:
        n_classes: Number of classes, at least 2.
        depth: Blocks.
        circuit_width: Heads, and neurons, of a circuit in each block.
        n_heads: Heads of each block.
        hidden: Hidden neurons of each block.
        seed: Another network and other images for each seed.
        n_images: Images in ``data``, and as many in ``held_out``; at least two per class.
        noise: Standard deviation of the images' noise.

    Returns:
        The network with images and its circuits, at the sites that
        ``find_gate_sites(model, images, units=["heads", "neurons"])`` finds; kind "heads".

    Raises:
        ValueError: If an argument has no sensible value, or there are too few heads, neurons or
            channels for what is to be planted.

    Example:
        >>> known = planted_heads(n_classes=2, circuit_width=1, n_heads=8, hidden=8, n_images=20)
        >>> known
        PlantedCircuit('heads', 2 classes, 4 sites of 32 channels, circuits of 4)
    """
    for name, value, least in (
        ("n_classes", n_classes, 2),
        ("depth", depth, 1),
        ("circuit_width", circuit_width, 1),
        ("n_heads", n_heads, 1),
        ("hidden", hidden, 1),
        ("n_images", n_images, 2 * n_classes if isinstance(n_classes, int) else 1),
    ):
        check_count(value, name, least=least)
    n, width = n_classes * circuit_width, n_heads * HEAD_WIDTH
    # Directions of the stream: evidence, then what each block's heads and neurons write.
    known = n * (1 + 2 * depth)
    if min(n_heads, hidden) < 2 * n or known + n > width or n > PATCH_NUMBERS:
        raise ValueError(
            f"{n_classes} classes with circuits of {circuit_width} need {2 * n} heads and neurons "
            f"in each block and {known + n} channels of the stream ({HEAD_WIDTH} a head), for {n} "
            f"of at most {PATCH_NUMBERS} patterns; there are {n_heads} heads and {hidden} neurons."
        )
    draw = _Draw(n_classes, depth, circuit_width, n_heads, hidden, seed)
    turn = torch.linalg.qr(draw.normal(width, width)).Q  # stream = turn @ directions
    background = torch.arange(width, device="cpu") >= known
    templates = torch.linalg.qr(draw.normal(PATCH_NUMBERS, PATCH_NUMBERS)).Q
    with isolated_rng():
        blocks = [(f"block{b}", _Block(width, n_heads, hidden)) for b in range(depth)]
        tokens, head = _Tokens(width), _Head(width, n_classes)
    embedding = torch.zeros(width, PATCH_NUMBERS, dtype=torch.float64, device="cpu")
    embedding[:n] = templates[:n]
    rest = min(width - known, PATCH_NUMBERS - n)
    embedding[known : known + rest] = templates[n : n + rest]
    _set(tokens.patches, turn @ embedding)
    circuits: dict[str, list[int]] = {}  # places of the n circuit units of each site
    decoys: dict[str, list[int]] = {}
    for b, (name, block) in enumerate(blocks):
        for site, start, plant in (
            (f"{name}.attention.out_proj", 2 * b * n, _plant_attention),
            (f"{name}.mlp.2", (2 * b + 1) * n, _plant_mlp),
        ):
            places = draw.places(n_heads if plant is _plant_attention else hidden)
            circuits[site], decoys[site] = places[:n], places[n : 2 * n]
            reads = torch.arange(start, start + n, device="cpu")
            plant(block, draw, turn, places, reads, background, circuit_width)
    readout = torch.zeros(n_classes, width, dtype=torch.float64, device="cpu")
    for k in range(n_classes):
        last = slice(known - n + k * circuit_width, known - n + (k + 1) * circuit_width)
        readout[k, last] = draw.uniform(circuit_width, low=LEAST_EVIDENCE)
    _set(head.linear, readout @ turn.T)
    model = nn.Sequential()
    for name, module in (("tokens", tokens), *blocks, ("head", head)):
        model.add_module(name, module)
    model.eval().requires_grad_(True)
    shown = torch.eye(n_classes, device="cpu").bool().repeat_interleave(circuit_width, 1)
    data, held_out = (
        draw_images(
            templates[:n], shown, n_images, noise,
            torch.Generator().manual_seed(seed_of("planted images", what, "heads", seed)),
        )
        for what in ("data", "held out")
    )  # fmt: skip
    with torch.no_grad():
        scale = LOGIT_DEVIATION / model(data[0]).double().std(0).clamp_min(1e-6)
        head.linear.weight.mul_(scale[:, None])
    sites = tuple(
        GateSite(site, width, -1, at_input=True, groups=n_heads, units="heads")
        if site.endswith("out_proj")
        else GateSite(site, hidden, -1, at_input=True, units="neurons")
        for site in circuits
    )

    def architecture(places: dict[str, list[int]], k: int) -> SubArchitecture:
        own = range(k * circuit_width, (k + 1) * circuit_width)
        size = {site.name: site.n_channels // site.n_gates for site in sites}
        kept = {
            name: [c for i in own for c in range(at[i] * size[name], (at[i] + 1) * size[name])]
            for name, at in places.items()
        }
        return SubArchitecture.from_kept(kept, sites, task=k)

    tasks = tuple(range(n_classes))
    circuit = {k: architecture(circuits, k) for k in tasks}
    return PlantedCircuit(
        "heads", model, sites, data, held_out, tasks,
        circuit=circuit,
        alternatives={k: (arch,) for k, arch in circuit.items()},
        decoys={k: architecture(decoys, k) for k in tasks},
        ablations=("mean", "zero"),
        seed=seed,
    )  # fmt: skip


def _plant_attention(
    block: _Block, draw: _Draw, turn: Tensor, places: list[int], reads: Tensor,
    background: Tensor, circuit_width: int,
) -> None:  # fmt: skip
    """Heads that look where evidence is, and bring it to the n directions after it."""
    n, width, d = len(reads), len(turn), HEAD_WIDTH
    q, k, v = (torch.zeros(width, width, dtype=torch.float64, device="cpu") for _ in range(3))
    out, bias = torch.zeros_like(q), torch.zeros(3 * width, dtype=torch.float64, device="cpu")
    unit = F.normalize(draw.normal(len(places), d), dim=1)
    sizes = 2.0 ** torch.randint(-2, 3, (len(places),), generator=draw.generator, device="cpu")
    louder = draw.uniform(n, low=LOUDER[0], high=LOUDER[1])
    for slot, place in enumerate(places):
        rows = slice(place * d, (place + 1) * d)
        direction = torch.zeros(width, dtype=torch.float64, device="cpu")
        if slot < 2 * n:
            direction[reads[slot % n]] = 1.0
        else:
            direction = draw.normal(width) / width**0.5
        # A key that is high where there is evidence; what a token looks for depends on its own.
        q[rows] = 0.5 * unit[slot][:, None] * direction
        bias[rows] = unit[slot] * d**0.5
        k[rows] = SHARPNESS * unit[slot][:, None] * direction
        v[rows] = sizes[slot] * unit[slot][:, None] * direction
        written = torch.zeros(width, dtype=torch.float64, device="cpu")
        if slot < n:
            written[reads[slot] + n] = 1.0
        else:
            written = F.normalize(draw.normal(width) * background, dim=0)
            written *= louder[slot - n] if slot < 2 * n else 1.0
        out[:, rows] = written[:, None] * unit[slot] / sizes[slot]
    with torch.no_grad():
        block.attention.in_proj_weight.copy_(torch.cat([q, k, v]) @ turn.T)
        block.attention.in_proj_bias.copy_(bias)
    _set(block.attention.out_proj, turn @ out)


def _plant_mlp(
    block: _Block, draw: _Draw, turn: Tensor, places: list[int], reads: Tensor,
    background: Tensor, circuit_width: int,
) -> None:  # fmt: skip
    """Neurons that read the heads of their class, and write to the n directions after them."""
    n, width = len(reads), len(turn)
    first = torch.zeros(len(places), width, dtype=torch.float64, device="cpu")
    second = torch.zeros(width, len(places), dtype=torch.float64, device="cpu")
    bias = torch.full((len(places),), -THRESHOLD, dtype=torch.float64, device="cpu")
    sizes = 2.0 ** torch.randint(-2, 3, (len(places),), generator=draw.generator, device="cpu")
    louder = draw.uniform(n, low=LOUDER[0], high=LOUDER[1])
    for slot, place in enumerate(places):
        if slot < 2 * n:
            start = slot % n // circuit_width * circuit_width
            first[place, reads[start : start + circuit_width]] = draw.uniform(
                circuit_width, high=MIX
            )
            first[place, reads[slot % n]] = 1.0
        else:
            first[place] = draw.normal(width) / width**0.5
        if slot < n:
            second[reads[slot] + n, place] = 1.0
        else:
            written = F.normalize(draw.normal(width) * background, dim=0)
            second[:, place] = written * (louder[slot - n] if slot < 2 * n else 1.0)
        first[place] *= sizes[slot]
        bias[place] *= sizes[slot]
        second[:, place] /= sizes[slot]
    inner, outer = block.mlp[0], block.mlp[2]
    _set(inner, first @ turn.T, bias)
    _set(outer, turn @ second)
