"""Magnitude: the size of the weights that make a channel, without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.data.labels import Task
from nad_attr.data.sources import Source
from nad_attr.gating.hooks import channel_shape, installed
from nad_attr.running.forward import Runner, check_classes
from nad_attr.scoring.scorer import Scores, TaskScorer, positions
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import seed_of
from nad_attr.system.threads import owned

__all__ = ["MagnitudeScorer"]

_FILTERED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
#: Images on which the flow of data is examined, and the noise on them (standard deviations).
_N_IMAGES = 8
_NOISE = 3.0


class MagnitudeScorer(TaskScorer):
    """L2 norm of the filters that make a channel, times the scale of the layers after them.

    A channel's filters are the rows of weights of all Conv and Linear modules whose output reaches
    this channel, and no other of the site, without passing another Conv or Linear: one for a plain
    layer, one for each block that writes into a residual stream, the right one of each layer for a
    concatenation. Each norm is multiplied by the largest slope from the filter's output to the
    channel: ``|weight| / sqrt(running_var + eps)`` of a BatchNorm, 1 through ReLU, maximum pooling
    and sums, ``1 / k`` through an average over k positions. Several filters count as one long
    filter. All tasks get the same scores; they show what data add.

    The first few images are run once, with noise, to examine the flow. This costs one forward and,
    for each site, two backward passes of them.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.

    A call also raises :class:`~nad_attr.GatingError` if a site's channels are made by no filters,
    or each by the same ones (after a LayerNorm or attention, for example).

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU()).eval()
        >>> _ = net[0].weight.data.copy_(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        >>> MagnitudeScorer(net, [GateSite("1", 2, 1)])(torch.ones(1, 2), torch.tensor([0]))
        {'1': tensor([[5., 2.]])}
    """

    def task_scores(self, runner: Runner, source: Source, tasks: Sequence[Task]) -> Scores:
        """The norms, the same for all tasks."""
        n_images = min(_N_IMAGES, len(source.labels))
        (inputs,) = runner.draw(source, [list(range(n_images))])
        spreads: list[Tensor] = []

        def see(module: nn.Module, output: Tensor) -> None:
            spreads.append(_spread(module, output))

        # Hooks are at the sites here as well, because some projections are called only with them.
        with (
            torch.no_grad(),
            _hooked(runner.model, see),
            installed(runner.model, self.sites, lambda site, tensor: None),
        ):
            outputs = runner(inputs)
        check_classes(source.labels, tasks, outputs.shape[1])
        cuts: list[tuple[nn.Module, Tensor]] = []

        def cut(module: nn.Module, output: Tensor) -> Tensor:
            # Everything after this is a function of this one module's output.
            number = len(cuts)
            generator = torch.Generator().manual_seed(seed_of("MagnitudeScorer", number))
            noise = torch.randn(output.shape, generator=generator, device="cpu").to(output)
            leaf = (output.detach() + _NOISE * spreads[number] * noise).requires_grad_()
            cuts.append((module, leaf))
            return leaf.clone()

        found: dict[str, Tensor] = {}

        def keep(site: GateSite, tensor: Tensor) -> Tensor:
            channel_shape(site, tensor)
            found[site.name] = tensor
            return tensor.clone()

        with _hooked(runner.model, cut), installed(runner.model, self.sites, keep):
            runner(inputs)
        return {
            site.name: self._norms(site, found[site.name], cuts).expand(len(tasks), -1)
            for site in self.sites
        }

    def _norms(
        self, site: GateSite, tensor: Tensor, cuts: Sequence[tuple[nn.Module, Tensor]]
    ) -> Tensor:
        """The norms of one site: float64 (C,)."""
        dim, _ = channel_shape(site, tensor)
        shape = [1] * tensor.ndim
        shape[dim] = site.n_channels
        number = torch.arange(1.0, site.n_channels + 1, device="cpu").to(tensor).reshape(shape)
        squares = torch.zeros(site.n_channels, dtype=torch.float64, device="cpu")
        made, mixed = torch.zeros(site.n_channels, dtype=torch.bool, device="cpu"), False
        leaves = [leaf for _, leaf in cuts]
        # The slope of (c + 1) x_c to a filter that reaches only channel c is c + 1 times that of
        # x_c: the ratio identifies the channel, and shows whether there is only one.
        plain = _slopes(tensor.sum(), leaves)
        numbered = _slopes((tensor * number).sum(), leaves)
        for (module, _), one, many in zip(cuts, plain, numbered, strict=True):
            if one is None or many is None:
                continue
            width = _width(module)
            axis = GateSite("filters", width, -1 if isinstance(module, nn.Linear) else 1)
            # (filters, images and positions)
            slope, scaled = (positions(t, axis).transpose(0, 1).flatten(1) for t in (one, many))
            size = slope.abs().amax(1)
            clear = slope.abs() > 1e-3 * size[:, None]
            ratio = torch.where(clear, scaled / torch.where(clear, slope, 1.0), torch.nan)
            lowest = ratio.nan_to_num(nan=torch.inf).amin(1)
            highest = ratio.nan_to_num(nan=-torch.inf).amax(1)
            channel = (lowest.round() - 1).nan_to_num(posinf=0.0).long()
            single = (size > 0) & (highest - lowest < 0.1) & ((lowest - channel - 1).abs() < 0.1)
            single &= (channel >= 0) & (channel < site.n_channels)
            mixed |= bool(((size > 0) & ~single).any())
            weight: Any = module.weight
            norm = weight.detach().flatten(1).double().norm(dim=1).to(size.device)
            squares.index_add_(0, channel[single].cpu(), (norm * size)[single].square().cpu())
            made[channel[single].cpu()] = True
        if not bool(made.all()) and (mixed or not bool(made.any())):
            missing = int((~made).sum())
            raise GatingError(
                f"magnitude has no filters for {missing} of the {site.n_channels} channels of gate "
                f"site {site.name!r}: no Conv or Linear module makes them one by one (after a "
                "LayerNorm or attention, each filter reaches all channels, and "
                "nn.MultiheadAttention holds its weights itself). Leave the site out."
            )
        return squares.sqrt()


def _slopes(value: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not value.requires_grad:
        return [None] * len(leaves)
    return torch.autograd.grad(value, leaves, allow_unused=True, retain_graph=True)


def _width(module: nn.Module) -> int:
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)  # type: ignore[arg-type]


def _spread(module: nn.Module, output: Tensor) -> Tensor:
    """Standard deviation of each channel of a module's output, to broadcast against it."""
    dim = output.ndim - 1 if isinstance(module, nn.Linear) else 1
    over = [axis for axis in range(output.ndim) if axis != dim]
    return output.std(dim=over, keepdim=True, correction=0)


@contextmanager
def _hooked(
    model: nn.Module, function: Callable[[nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call a function at the output of every filter, in the order in which they run."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        return function(module, output)

    with owned() as owner, ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, _FILTERED):
                stack.callback(module.register_forward_hook(owner.only(hook)).remove)
        yield
