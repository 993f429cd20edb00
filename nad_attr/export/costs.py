"""What a smaller network costs beside the whole one, and which channels it was cut from."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nad_attr._display import html_table
from nad_attr.data.labels import Task
from nad_attr.stats.results import Result, decoded

__all__ = ["Block", "Cost", "Summary", "latency", "summary"]

#: Where a module keeps it: as a plain dictionary, so that unpickling does not need this library.
_KEY = "sub_architecture"


@dataclass(frozen=True)
class Cost:
    """What a network costs.

    Attributes:
        parameters: Numbers that it holds: weights, biases, BatchNorm's statistics, and constants
            of closed channels.
        multiply_adds: Of its convolutions and products, for one image.
    """

    parameters: int
    multiply_adds: int


@dataclass(frozen=True)
class Block:
    """The operators between two gate sites.

    Attributes:
        name: The site at its end; "output" for the last one.
        whole: Before.
        smaller: After.
        stays_whole: Modules in it whose operators have no rule and still read all channels.
    """

    name: str
    whole: Cost
    smaller: Cost
    stays_whole: tuple[str, ...] = ()


@dataclass(frozen=True)
class Summary(Result):
    """A smaller network: its channels, costs and inputs.

    Attributes:
        task: The class, or classes, it was found for, if any.
        outputs: The columns of the network's output that it returns.
        whole: Cost of the network it was cut from.
        smaller: Its own.
        share_sliced: Share of the network's parameters in weights that were cut.
        blocks: The operators before each site, and those after the last.
        sites: ``{site name: channels of the network that are kept there}``.
        tensors: For each tensor of the state dict that is cut from one of the network: ``of``, its
            name there, ``rows`` and ``columns`` (axes 0 and 1), the channels that are kept.
        input_shapes: Of one image. The batch is free unless ``one_image``.
        one_image: Whether it takes one number of images alone, as the network's own code does.
        difference: Largest difference to the gated network, over the largest output; None: not
            compared.
        n_images: With ``one_image``: that number.
    """

    task: Any
    outputs: tuple[Task, ...]
    whole: Cost
    smaller: Cost
    share_sliced: float
    blocks: tuple[Block, ...]
    sites: Mapping[str, list[int]]
    tensors: Mapping[str, Mapping[str, Any]]
    input_shapes: tuple[tuple[int, ...], ...]
    one_image: bool
    difference: float | None
    n_images: int = 1

    @property
    def stays_whole(self) -> tuple[str, ...]:
        """Modules that read all channels, closed ones as constants."""
        return tuple(dict.fromkeys(m for block in self.blocks for m in block.stays_whole))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Summary:
        """Make a summary from what :meth:`to_dict` returned."""
        found: Summary = decoded(cls, values)
        return found

    def _records(self) -> list[dict[str, Any]]:
        return [
            {
                "up_to": block.name,
                **{f"{k}_whole": v for k, v in vars(block.whole).items()},
                **{f"{k}_smaller": v for k, v in vars(block.smaller).items()},
            }
            for block in self.blocks
        ]

    def summary(self) -> str:
        """Its cost beside the whole network's, as plain text."""
        return str(self)

    def __str__(self) -> str:
        share = self.smaller.parameters / max(1, self.whole.parameters)
        adds = self.smaller.multiply_adds / max(1, self.whole.multiply_adds)
        lines = [
            f"parameters      {_many(self.whole.parameters)} -> {_many(self.smaller.parameters)} "
            f"({100 * share:.1f} %)",
            f"multiply-adds   {_many(self.whole.multiply_adds)} -> "
            f"{_many(self.smaller.multiply_adds)} ({100 * adds:.1f} %)",
            f"share sliced    {100 * self.share_sliced:.1f} % of the parameters",
        ]
        if self.stays_whole:
            some = ", ".join(self.stays_whole[:5]) + (", ..." if len(self.stays_whole) > 5 else "")
            lines.append(
                f"stays whole     {len(self.stays_whole)} modules read all channels, closed ones "
                f"as constants: {some}"
            )
        if self.one_image:
            number = "one image" if self.n_images == 1 else f"{self.n_images} images"
            number = number.ljust(15)
            lines.append(
                f"{number} the network's own code fixes how many images there are, as len(x) "
                "or x.view(1, ...) does; x.shape[0] does not"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = [
            [
                block.name,
                f"{_many(block.whole.parameters)} -> {_many(block.smaller.parameters)}",
                f"{_many(block.whole.multiply_adds)} -> {_many(block.smaller.multiply_adds)}",
                ", ".join(block.stays_whole),
            ]
            for block in self.blocks
        ]
        return html_table(
            f"A smaller network: {_many(self.smaller.parameters)} of "
            f"{_many(self.whole.parameters)} parameters, {_many(self.smaller.multiply_adds)} of "
            f"{_many(self.whole.multiply_adds)} multiply-adds",
            ["up to", "parameters", "multiply-adds", "stays whole"],
            rows,
        )


def _many(n: int) -> str:
    for size, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if n >= size:
            return f"{n / size:.2f} {name}"
    return str(n)


def summary(module: nn.Module) -> Summary:
    """The summary of an exported module.

    Args:
        module: As :meth:`nad_attr.SubArchitecture.export` returned it, or a copy.

    Raises:
        ValueError: If it is something else.
    """
    # A copy keeps what is in ``meta``, a pickle what is an attribute.
    values = getattr(module, "meta", {}).get(_KEY) or getattr(module, _KEY, None)
    if values is None:
        raise ValueError(
            "this module has no summary; give one that SubArchitecture.export returned."
        )
    return Summary.from_dict(values)


def keep_summary(module: fx.GraphModule, made: Summary) -> None:
    """Put a summary where :func:`summary` finds it."""
    module.meta[_KEY] = made.to_dict()
    setattr(module, _KEY, module.meta[_KEY])


class _Counted(fx.Interpreter):
    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.counts: dict[fx.Node, int] = {}
        self.counter = FlopCounterMode(display=False)

    def run_node(self, n: fx.Node) -> Any:
        before = self.counter.get_total_flops()
        result = super().run_node(n)
        # One multiplication and one addition are two operations.
        self.counts[n] = (self.counter.get_total_flops() - before) // 2
        return result


def node_costs(
    module: fx.GraphModule, inputs: Sequence[Tensor], n_images: int = 1
) -> dict[fx.Node, Cost]:
    """The cost of each node for an image, by a pass of ``n_images`` on tensors without values."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    counted = _Counted(module)
    with torch.no_grad(), mode, counted.counter:
        given = (x[:1].expand(n_images, *x.shape[1:]).contiguous() for x in inputs)
        counted.run(*map(mode.from_tensor, given))
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    costs: dict[fx.Node, Cost] = {}
    for node in module.graph.nodes:
        n_parameters = 0
        for source in node.all_input_nodes:
            if source.op == "get_attr" and source.target in state:
                n_parameters += state.pop(source.target).numel()
        costs[node] = Cost(n_parameters, counted.counts.get(node, 0) // n_images)
    return costs


def total(costs: Sequence[Cost]) -> Cost:
    """The sum."""
    return Cost(sum(c.parameters for c in costs), sum(c.multiply_adds for c in costs))


def latency(
    modules: Mapping[str, nn.Module], inputs: Tensor | Sequence[Tensor], *, seconds: float = 2.0
) -> dict[str, float]:
    """Seconds that a pass takes on this machine, measured in turns.

    Args:
        modules: Networks by name, on the device of the inputs.
        inputs: What they are called with.
        seconds: How long all of them are measured.

    Returns:
        ``{name: seconds}``, the median of its passes.
    """
    given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    device = given[0].device
    times: dict[str, list[float]] = {name: [] for name in modules}

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    with torch.no_grad():
        for module in modules.values():
            module(*given)
        end = time.perf_counter() + seconds
        # In turns, so that other work of the machine slows all of them.
        while time.perf_counter() < end or len(next(iter(times.values()), [0])) < 3:
            for name, module in modules.items():
                wait()
                start = time.perf_counter()
                module(*given)
                wait()
                times[name].append(time.perf_counter() - start)
    return {name: sorted(passes)[len(passes) // 2] for name, passes in times.items()}
