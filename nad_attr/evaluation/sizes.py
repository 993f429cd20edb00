"""How large a sub-architecture is in multiply-adds and parameters, and which channels ever fire.

Closed channels are counted where they are gated, not by pruning the network: which convolutions
could drop which channels depends on residual sums and concatenations behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nad_attr.data.labels import Task, own_images, patterns
from nad_attr.data.sources import Inputs
from nad_attr.evaluation.measures import ROUNDING
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gating.hooks import channel_shape, installed
from nad_attr.running.forward import Runner
from nad_attr.running.options import RunOptions
from nad_attr.sites.site import GateSite, check_sites, unwrap
from nad_attr.sites.tracing import no_attention_fast_path
from nad_attr.stats.results import Result
from nad_attr.system.threads import owned

__all__ = ["SiteCosts", "flop_size", "parameter_size", "site_costs"]


@dataclass(frozen=True)
class SiteCosts(Result):
    """What it costs to make each gate site's channels: the work since the site before it.

    Attributes:
        flops: ``{site name: multiply-adds}`` of one image.
        parameters: ``{site name: parameters}``.
    """

    flops: dict[str, int]
    parameters: dict[str, int]

    def _records(self) -> list[dict[str, Any]]:
        return [
            {"site": name, "flops": n, "parameters": self.parameters[name]}
            for name, n in self.flops.items()
        ]


def site_costs(
    model: nn.Module, sites: Sequence[GateSite], inputs: Any, *, run: RunOptions | None = None
) -> SiteCosts:
    """Count multiply-adds and parameters between the gate sites, in one forward pass.

    A site's cost is what runs after the site that fires before it (the start, for the first) and
    up to itself. Branches that run side by side count in the order in which they run. What runs
    after the last site (a classifier's last layer) belongs to no site: its output is the classes.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        sites: Gate sites of that network.
        inputs: One or more images, a tensor or tuple of tensors; multiply-adds are those of one.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        Multiply-adds of convolutions and matrix products, as :mod:`torch.utils.flop_counter`
        counts them (biases, normalisation and activations count nothing), and parameters of the
        modules that run; those of a module that is not called by itself, as inside
        MultiheadAttention, go with the module around it.

    Raises:
        GatingError: If a site does not fire or fires twice.
        SiteError: If the network has no such site.
        TypeError: If inputs are not tensors.
        ValueError: If the network is in train mode or cannot be run on the inputs.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 9))
        >>> site_costs(net.eval(), [GateSite("1", 3, 1)], torch.ones(1, 2))
        SiteCosts(flops={'1': 6}, parameters={'1': 9})
    """
    runner = Runner(model, run)
    given = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    if not given or not all(isinstance(x, Tensor) and x.ndim > 0 and len(x) for x in given):
        raise TypeError("inputs must be a tensor, or tuple of tensors, of one image or more.")
    return count_costs(runner, sites, runner.to_device(given))


def count_costs(runner: Runner, sites: Sequence[GateSite], inputs: Inputs) -> SiteCosts:
    """:func:`site_costs` with a runner, on inputs where the network is."""
    sites = check_sites(sites)
    runner.find_batch_size(inputs)
    root = unwrap(runner.model)
    modules = dict(root.named_modules())
    flops: dict[str, int] = {}
    seen: list[int] = [0]  # FLOPs so far at each site that has fired
    segment_of: dict[str, int] = {}  # module name: number of sites that had fired

    def at_site(site: GateSite, tensor: Tensor) -> None:
        total = int(counter.get_total_flops())
        n = runner.fixed_batch or len(inputs[0])
        flops[site.name] = (total - seen[-1]) // (2 * n)  # a multiply-add is two
        seen.append(total)

    def called(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            segment_of.setdefault(name, len(flops))

        return hook

    with owned() as owner, ExitStack() as stack:
        for name, module in modules.items():
            # First of all hooks: a site at this module's input fires after it.
            handle = module.register_forward_pre_hook(owner.only(called(name)), prepend=True)
            stack.callback(handle.remove)
        # In inference mode torch 2.4 calls operators that its counter does not know.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())  # after that, which switches gradients on
        inputs = tuple(
            x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x for x in inputs
        )
        # The counter does not know the one kernel for all of attention.
        stack.enter_context(no_attention_fast_path())
        counter = stack.enter_context(FlopCounterMode(display=False))
        stack.enter_context(installed(runner.model, sites, at_site))
        runner(inputs)

    numbers = dict.fromkeys(range(len(flops) + 1), 0)
    counted: set[int] = set()
    for name, module in modules.items():
        around = name
        while around and around not in segment_of:
            around = around.rpartition(".")[0]
        for parameter in module.parameters(recurse=False):
            if id(parameter) not in counted:
                counted.add(id(parameter))
                numbers[segment_of.get(around, len(flops))] += parameter.numel()
    parameters = {name: numbers[i] for i, name in enumerate(flops)}
    order = [site.name for site in sites]
    return SiteCosts({n: flops[n] for n in order}, {n: parameters[n] for n in order})


def _weighted(arch: SubArchitecture, weights: Mapping[str, int]) -> float:
    kept = arch.sizes
    missing = [name for name in kept if name not in weights]
    if missing:
        raise ValueError(f"costs lack gate site {missing[0]!r}.")
    total = sum(weights[name] for name in kept)
    return sum(weights[name] * kept[name] for name in kept) / total if total else float("nan")


def flop_size(architecture: SubArchitecture, costs: SiteCosts) -> float:
    """Kept share of the channels, each site weighted by the multiply-adds that make its channels.

    The work that remains if each site's closed channels are not computed, and inputs are left
    whole. Not the FLOPs of a pruned network: where the channels before a site are closed as well,
    less is left to do.

    Args:
        architecture: A sub-architecture.
        costs: From :func:`site_costs`.

    Returns:
        In [0, 1]; NaN if no site costs anything.

    Raises:
        ValueError: If the costs lack one of its sites.

    Example:
        >>> sites = [GateSite("a", 2, 1), GateSite("b", 4, 1)]
        >>> arch = SubArchitecture.from_kept({"a": [0], "b": [0, 1, 2, 3]}, sites)
        >>> flop_size(arch, SiteCosts({"a": 300, "b": 100}, {"a": 1, "b": 9}))
        0.625
    """
    return _weighted(architecture, costs.flops)


def parameter_size(architecture: SubArchitecture, costs: SiteCosts) -> float:
    """Kept share of the channels, each site weighted by the parameters that make its channels.

    As :func:`flop_size`, with parameters.

    Args:
        architecture: A sub-architecture.
        costs: From :func:`site_costs`.

    Returns:
        In [0, 1]; NaN if no site has parameters.

    Raises:
        ValueError: If the costs lack one of its sites.

    Example:
        >>> sites = [GateSite("a", 2, 1), GateSite("b", 4, 1)]
        >>> arch = SubArchitecture.from_kept({"a": [0], "b": [0, 1, 2, 3]}, sites)
        >>> parameter_size(arch, SiteCosts({"a": 300, "b": 100}, {"a": 1, "b": 9}))
        0.95
    """
    return _weighted(architecture, costs.parameters)


class Activity:
    """The lowest and highest value of each channel on the images of each class.

    It watches while the sweep runs the whole network, and keeps the first image for
    :func:`count_costs`.
    """

    def __init__(self, sites: Sequence[GateSite], labels: Tensor, device: torch.device) -> None:
        self.classes, self._place = patterns(labels)
        shapes = {site.name: (len(self.classes), site.n_channels) for site in sites}
        self.low = {n: torch.full(s, torch.inf, device=device) for n, s in shapes.items()}
        self.high = {n: torch.full(s, -torch.inf, device=device) for n, s in shapes.items()}
        self.example: Inputs | None = None
        self._rows = torch.empty(0, dtype=torch.int64, device="cpu")

    def begin(self, numbers: range, inputs: Inputs) -> None:
        """Remember the images of the next pass."""
        if self.example is None:
            self.example = tuple(x[:1].clone() for x in inputs)
        self._rows = self._place[numbers[0] : numbers[-1] + 1]

    def __call__(self, site: GateSite, tensor: Tensor) -> None:
        """Take in the tensor of a site."""
        dim, _ = channel_shape(site, tensor)
        values = tensor.detach().movedim(dim, 1).flatten(2) if tensor.ndim > 2 else tensor.detach()
        low, high = torch.aminmax(values, dim=-1) if values.ndim > 2 else (values, values)
        if len(low) != len(self._rows):
            return  # axis 0 is not a batch: the gates refuse it
        for kept, new, how in ((self.low, low, "amin"), (self.high, high, "amax")):
            rows = self._rows.to(new.device)[:, None].expand_as(new)
            kept[site.name].scatter_reduce_(0, rows, new.to(kept[site.name].dtype), how)

    def to_cpu(self) -> None:
        """Move the values to the CPU, so that another process can take them."""
        self.low, self.high = ({n: x.cpu() for n, x in d.items()} for d in (self.low, self.high))
        if self.example is not None:
            self.example = tuple(x.cpu() for x in self.example)

    def firing(self, tasks: Sequence[Task]) -> dict[str, Tensor]:
        """``{site name: bool (T, C)}``: which channels vary over a task's own images."""
        own = own_images(self.classes, tasks)
        result = {}
        for name, low_of in self.low.items():
            low, high = low_of.cpu(), self.high[name].cpu()
            rows = []
            for members in own:
                if not bool(members.any()):
                    rows.append(torch.zeros(low.shape[1], dtype=torch.bool, device="cpu"))
                    continue
                bottom, top = low[members].amin(0), high[members].amax(0)
                rows.append(top - bottom > ROUNDING * torch.maximum(bottom.abs(), top.abs()))
            result[name] = torch.stack(rows)
        return result


def dead_fraction(architecture: SubArchitecture, firing: Mapping[str, Tensor]) -> float:
    """Share of the kept channels that do not fire (masks bool (C,)); NaN if none is kept."""
    if architecture.n_kept == 0:
        return float("nan")
    dead = sum(int((mask & ~firing[name]).sum()) for name, mask in architecture.masks.items())
    return dead / architecture.n_kept
