"""Layer-wise relevance propagation by Zennit as a channel scorer (extra ``zennit``)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.data.sources import Source
from nad_attr.gating.hooks import channel_shape, installed
from nad_attr.gating.restore import untouched
from nad_attr.running.forward import Runner
from nad_attr.scoring.scorer import Batch, ChannelScorer, Scores, check_differentiable, positions
from nad_attr.sites.site import GateSite, unwrap

__all__ = ["LRPScorer"]

#: How far canonizers may move an output, as a share of the outputs' spread.
_TOLERANCE = 1e-3
#: What the named composites let pass as if it were an activation, or do not know.
_WITHOUT_RULES = (nn.MultiheadAttention, nn.LayerNorm, nn.GroupNorm)


class LRPScorer(ChannelScorer):
    """E over images of a channel's LRP relevance for the task output, summed over positions.

    The task output z_k starts the relevance, which Zennit's rules pass on to the sites; with
    conserving rules and no biases the relevance of a site sums to z_k. Costs a forward pass and
    about two (epsilon) to four (gamma, alpha-beta) backward passes for each image and task.

    For networks of convolutions, linear layers, BatchNorms, poolings and activations: Zennit's own
    composites have no rules for attention and LayerNorm, and would pass the plain gradient through
    them. Sums of a functional residual connection pass the full relevance to both sides; give
    Zennit's canonizers for them (``zennit.torchvision.ResNetCanonizer``) where they matter. The
    weights that canonizers merge are put back after each batch.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        composite: Name of one of Zennit's composites that need nothing else
            (``"epsilon_plus_flat"``, ``"epsilon_alpha2_beta1_flat"``, ...), or a composite with
            canonizers of its own.
        signed: Keep the sign of each image's relevance; False: its absolute value.
        canonizers: With a name: Zennit's canonizers. None: ``SequentialMergeBatchNorm``, which
            merges each BatchNorm into the layer that is listed before it.

    Raises:
        ImportError: If Zennit is not installed.
        TypeError: If the composite is no composite, or canonizers come with one.
        ValueError: If there is no composite of that name, it needs arguments, or it has no rule
            for a module of the network.

    Called, it also raises :class:`~nad_attr.GatingError` if canonizers change what the network
    computes, as when modules are not listed in the order in which they run.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2, bias=False), torch.nn.ReLU()).eval()
        >>> _ = net[0].weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> images = torch.tensor([[3.0, 1.0], [1.0, 1.0]])
        >>> LRPScorer(net, [GateSite("0", 2, 1)])(images, torch.tensor([0, 1]))
        {'0': tensor([[3., 0.], [0., 2.]])}

    Source:
        Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise
        Relevance Propagation", PLOS ONE 2015; Anders et al., "Software for Dataset-wide XAI: From
        Local Explanations to Global Insights with Zennit, CoRelAy, and ViRelAy", 2021.
    """

    task_specific = True
    has_sign = True

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        composite: Any = "epsilon_plus_flat",
        *,
        signed: bool = False,
        canonizers: Sequence[Any] | None = None,
    ) -> None:
        super().__init__(model, sites)
        self.signed = signed
        self.composite = _composite(composite, canonizers)
        if isinstance(composite, str):
            for name, module in unwrap(model).named_modules():
                if isinstance(module, _WITHOUT_RULES):
                    raise ValueError(
                        f"Zennit's composite {composite!r} has no rule for module {name!r} "
                        f"({type(module).__name__}); give a composite that has one."
                    )

    def prepare(self, runner: Runner, source: Source, batch_size: int) -> None:
        """Check on one image that canonizers leave the network's outputs as they are."""
        for inputs in runner.draw(source, [[0]]):
            with torch.no_grad(), untouched(runner.model):
                before = runner(inputs)
                try:
                    with self._registered(runner.model):
                        after = runner(inputs)
                except torch.cuda.OutOfMemoryError:
                    raise
                except RuntimeError as error:
                    raise GatingError(
                        f"the composite's canonizers fail on this network ({error}): modules are "
                        "not listed in the order in which they run. Give canonizers=[...] that "
                        "fit this network, or canonizers=[]."
                    ) from error
        spread = (before - before.mean()).abs().max() + before.abs().max()
        if not bool((after - before).abs().max() <= _TOLERANCE * spread):
            raise GatingError(
                "the composite's canonizers change the network's outputs: modules are not listed "
                "in the order in which they run, or one is merged that should not be. Give "
                "canonizers=[...] that fit this network, or canonizers=[]."
            )

    def image_scores(self, batch: Batch) -> Scores:
        """The relevance, summed over positions."""
        shifts: dict[str, Tensor] = {}

        def function(site: GateSite, tensor: Tensor) -> Tensor:
            channel_shape(site, tensor)
            shifts[site.name] = tensor.new_zeros(()).expand(tensor.shape).requires_grad_()
            return tensor + shifts[site.name]

        check_weights(batch.model)
        # The sites' hooks come first, so that they stand outside the rules' at a module's input.
        with (
            untouched(batch.model),
            installed(batch.model, self.sites, function),
            self._registered(batch.model),
        ):
            explained = batch.explained(batch.outputs())
            check_differentiable(explained)
            try:
                relevance = torch.autograd.grad(
                    explained,
                    [shifts[site.name] for site in self.sites],
                    grad_outputs=explained.detach(),
                    allow_unused=True,
                    materialize_grads=True,
                )
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise GatingError(f"the composite's rules fail on this network: {error}") from error
        return {
            site.name: positions(value, site).sum(-1)
            for site, value in zip(self.sites, relevance, strict=True)
        }

    def _registered(self, model: nn.Module) -> AbstractContextManager[Any]:
        context: AbstractContextManager[Any] = self.composite.context(model)
        return context


def _composite(composite: Any, canonizers: Sequence[Any] | None) -> Any:
    from zennit.core import Composite  # takes long to load

    if isinstance(composite, Composite):
        if canonizers is not None:
            raise TypeError("a composite brings its own canonizers; leave out canonizers=.")
        return composite
    return composite_named(composite, canonizers, "make it with them and give the composite itself")


def check_weights(model: nn.Module) -> None:
    """Refuse weight and spectral normalisation: relevance rules read and change plain weights.

    Behind a parametrization they change nothing, and relevance comes out several times too large.

    Raises:
        GatingError: Names the layer and how to fold it.
    """
    for name, module in model.named_modules():
        how = ""
        if nn.utils.parametrize.is_parametrized(module):
            first = next(iter(module.parametrizations))
            how = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {first!r})"
        for hook in module._forward_pre_hooks.values():
            if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
                kind = "weight" if type(hook).__name__ == "WeightNorm" else "spectral"
                how = f"torch.nn.utils.remove_{kind}_norm(layer)"
        if how:
            raise GatingError(
                f"layer {name!r} computes its weights anew in each pass (weight or spectral "
                "normalisation), which rules of relevance take for plain ones, so that relevance "
                f"would be wrong; fold them in a copy of the network: {how} for each such layer."
            )


def composite_named(
    name: Any, canonizers: Sequence[Any] | None, remedy: str, **arguments: Any
) -> Any:
    """One of Zennit's composites by its name.

    Args:
        name: A key of ``zennit.composites.COMPOSITES``.
        canonizers: Zennit's canonizers. None: ``SequentialMergeBatchNorm``.
        remedy: What to do where the arguments do not go with the composite.
        **arguments: What the composite needs or allows.

    Raises:
        TypeError: If the name is no string.
        ValueError: If there is no such composite, or its arguments are others.
    """
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import COMPOSITES

    if not isinstance(name, str):
        raise TypeError(f"composite must be a name or a Zennit composite, not {name!r:.60}.")
    if name not in COMPOSITES:
        known = ", ".join(map(repr, COMPOSITES))
        raise ValueError(f"Zennit has no composite {name!r}; it has {known}.")
    chosen = [SequentialMergeBatchNorm()] if canonizers is None else list(canonizers)
    try:
        return COMPOSITES[name](canonizers=chosen, **arguments)
    except TypeError as error:
        raise ValueError(
            f"the composite {name!r} does not go with these arguments ({error}); {remedy}."
        ) from error
