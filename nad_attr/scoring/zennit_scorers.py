"""Layer-wise relevance propagation by Zennit as a channel scorer (extra ``zennit``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.data.sources import Source
from nad_attr.gating.hooks import channel_shape, installed
from nad_attr.gating.restore import untouched
from nad_attr.running.forward import Runner
from nad_attr.scoring.baselines import MeansScorer
from nad_attr.scoring.scorer import Batch, ChannelScorer, Scores, check_differentiable, positions
from nad_attr.sites.site import GateSite, unwrap

__all__ = ["LRPScorer", "RelPScorer"]

#: Largest change of an output by canonizers, as a share of the outputs' spread.
_TOLERANCE = 1e-3
#: Modules that the named composites treat as an activation, or do not know.
_WITHOUT_RULES = (nn.MultiheadAttention, nn.LayerNorm, nn.GroupNorm)


class LRPScorer(ChannelScorer):
    """E over images of a channel's LRP relevance for the task output, summed over positions.

    The relevance starts as the task output z_k, and Zennit's rules pass it on to the sites; with
    conserving rules and no biases the relevance of a site sums to z_k. Costs a forward pass and
    about two (epsilon) to four (gamma, alpha-beta) backward passes for each image and task.

    For networks of convolutions, linear layers, BatchNorms, poolings and activations: Zennit's own
    composites have no rules for attention and LayerNorm, and would pass the plain gradient. Sums of
    a functional residual connection pass the full relevance to both sides; give Zennit's canonizers
    for them (``zennit.torchvision.ResNetCanonizer``) if they matter. Weights that canonizers merge
    are restored after each batch.

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
        TypeError: If ``composite`` is something else, or canonizers come with one.
        ValueError: If there is no composite of that name, it needs arguments, or it has no rule
            for a module of the network.

    A call also raises :class:`~nad_attr.GatingError` if canonizers change the network's outputs, as
    when modules are not listed in the order in which they run.

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
    changes_weights = True

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
            _check_rules(
                model, f"Zennit's composite {composite!r}", "give a composite that has one"
            )

    def prepare(self, runner: Runner, source: Source, batch_size: int) -> Any:
        """Check on one image that canonizers do not change the network's outputs."""
        for inputs in runner.draw(source, [[0]]):
            with torch.no_grad(), untouched(runner.model):
                before = runner(inputs)
                try:
                    with self.composite.context(runner.model):
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
        relevance, _ = self._propagated(batch, lambda explained: explained.detach())
        return {
            site.name: positions(value, site).sum(-1)
            for site, value in zip(self.sites, relevance, strict=True)
        }

    def _propagated(
        self, batch: Batch, start: Callable[[Tensor], Tensor]
    ) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
        """The relevance that the rules pass from the task outputs to each site, and activations."""
        shifts: dict[str, Tensor] = {}
        activations: dict[str, Tensor] = {}

        def function(site: GateSite, tensor: Tensor) -> Tensor:
            channel_shape(site, tensor)
            activations[site.name] = tensor.detach().clone()
            shifts[site.name] = tensor.new_zeros(()).expand(tensor.shape).requires_grad_()
            return tensor + shifts[site.name]

        check_weights(batch.model)
        # The sites' hooks come first, so that at a module's input they are outside the rules'.
        with (
            untouched(batch.model),
            installed(batch.model, self.sites, function),
            self.composite.context(batch.model),
        ):
            explained = batch.explained(batch.outputs())
            check_differentiable(explained)
            try:
                found = torch.autograd.grad(
                    explained,
                    [shifts[site.name] for site in self.sites],
                    grad_outputs=start(explained),
                    allow_unused=True,
                    materialize_grads=True,
                )
            except torch.cuda.OutOfMemoryError:
                raise
            except RuntimeError as error:
                raise GatingError(f"the composite's rules fail on this network: {error}") from error
        return found, activations


class RelPScorer(LRPScorer, MeansScorer):
    """E over images of ``(a - mean)`` times the LRP coefficient: relevance patching (RelP).

    Attribution patching (:class:`~nad_attr.evaluation.CentredEffectScorer`) with the gradient of
    the task output replaced by the coefficient with which layer-wise relevance propagation passes
    relevance back, ``relevance = activation * coefficient``. Its rules, from output to input:

    - convolution and linear layer: gamma, ``c_i = sum_j w'_ij c_j z_j / z'_j`` with
      ``w' = w + gamma max(w, 0)`` (``min`` for outputs below zero) and z' the output with these
      weights and bias; gamma 0 is the 0-rule, ``c_i = sum_j w_ij c_j``;
    - activation f that is not piecewise linear (GELU, SiLU, ...): ``c_i = c_j f(x) / x``; for ReLUs
      that is the gradient;
    - BatchNorm, pooling, sums: the gradient, which is their 0-rule. BatchNorms are merged into the
      layer before them first.

    With gamma 0 on a network of ReLUs this is attribution patching itself. For networks without
    attention and LayerNorm, as :class:`LRPScorer`. Sums of residual connections need no canonizer:
    coefficients, other than relevance, are the same on both sides. One forward pass and about three
    backward passes of each image and task.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        gamma: How much positive weights count beyond others, from 0 on.
        signed: Keep the sign: channels that speak against the task come last.
        means: As for :class:`~nad_attr.evaluation.CentredEffectScorer`.
        canonizers: See :class:`LRPScorer`.

    Raises:
        ImportError: If Zennit is not installed.
        TypeError: If means are not a mapping.
        ValueError: If gamma is negative, means and sites do not fit, or there is no rule for a
            module of the network.

    A call also raises :class:`~nad_attr.GatingError` as :class:`LRPScorer` does.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False)).eval()
        >>> _ = net[1].weight.data.copy_(torch.tensor([[2.0, -1.0], [0.0, 1.0]]))
        >>> site, x = GateSite("0", 2, 1), torch.tensor([[1.0, 1.0], [0.0, 0.0]])
        >>> zero = {"0": torch.zeros(2)}
        >>> RelPScorer(net, [site], gamma=1.0, means=zero)(x, torch.tensor([0, 1]))["0"][0]
        tensor([1.3333, 0.3333])

    Source:
        Rezaei Jafari, Eberle, Khakzar, Nanda, "RelP: Faithful and Efficient Circuit Discovery in
        Language Models via Relevance Patching", 2025, arXiv 2508.21258; the gamma rule: Montavon et
        al., "Layer-Wise Relevance Propagation: An Overview", 2019.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        *,
        gamma: float = 0.25,
        signed: bool = False,
        means: Mapping[str, Tensor] | None = None,
        canonizers: Sequence[Any] | None = None,
    ) -> None:
        if not 0 <= gamma < float("inf"):
            raise ValueError(f"gamma must be 0 or more, got {gamma}.")
        MeansScorer.__init__(self, model, sites, means=means)
        self.signed, self.gamma = signed, gamma
        self.composite = _coefficients(gamma, canonizers)
        _check_rules(model, "RelP", "use CentredEffectScorer or EAPIGScorer there")

    def prepare(self, runner: Runner, source: Source, batch_size: int) -> Any:
        """Check the canonizers; the means."""
        LRPScorer.prepare(self, runner, source, batch_size)
        return MeansScorer.prepare(self, runner, source, batch_size)

    def image_scores(self, batch: Batch) -> Scores:
        """Sum over positions of the difference to the mean times the coefficient."""
        coefficients, activations = self._propagated(batch, torch.ones_like)
        scores = {}
        for site, coefficient in zip(self.sites, coefficients, strict=True):
            a = positions(activations.pop(site.name), site)
            change = a - batch.prepared[site.name].to(a)[:, None]
            scores[site.name] = (change * positions(coefficient, site)).sum(-1)
        return scores


def _coefficients(gamma: float, canonizers: Sequence[Any] | None) -> Any:
    """A composite whose rules pass on coefficients in place of relevance."""
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import LayerMapComposite
    from zennit.core import BasicHook, Hook, Stabilizer
    from zennit.types import Convolution, Linear

    stabilised = Stabilizer.ensure(1e-9)

    def ratio(z: Tensor, ruled: Tensor, side: Tensor) -> Tensor:
        return torch.where(side, z / stabilised(ruled), 0.0)

    class Gamma(BasicHook):  # type: ignore[misc]
        def __init__(self) -> None:
            # For outputs above zero, for those below, and the network's own.
            super().__init__(
                input_modifiers=[torch.clone] * 3,  # each with a gradient of its own
                param_modifiers=[
                    lambda parameter, _: parameter + gamma * parameter.clamp(min=0),
                    lambda parameter, _: parameter + gamma * parameter.clamp(max=0),
                    lambda parameter, _: parameter,
                ],
                gradient_mapper=lambda c, z: (
                    c * ratio(z[2], z[0], z[2] > 0),
                    c * ratio(z[2], z[1], z[2] < 0),
                    torch.zeros_like(c),
                ),
                reducer=lambda inputs, gradients: gradients[0] + gradients[1],
            )

        def copy(self) -> Any:
            return Gamma()

    class Secant(Hook):  # type: ignore[misc]
        def forward(self, module: Any, input: Any, output: Any) -> None:
            self.stored_tensors["ratio"] = output.detach() / stabilised(input[0].detach())

        def backward(self, module: Any, grad_input: Any, grad_output: Any) -> Any:
            return (grad_output[0] * self.stored_tensors["ratio"],)

    smooth: tuple[type[nn.Module], ...] = (nn.GELU, nn.SiLU, nn.Hardswish, nn.ELU, nn.SELU)
    smooth += (nn.CELU, nn.Mish, nn.Tanh, nn.Softplus)
    layers: list[Any] = [(smooth, Secant())]
    if gamma:
        layers.append(((Convolution, Linear), Gamma()))
    chosen = [SequentialMergeBatchNorm()] if canonizers is None else list(canonizers)
    return LayerMapComposite(layer_map=layers, canonizers=chosen)


def _check_rules(model: nn.Module, what: str, remedy: str) -> None:
    for name, module in unwrap(model).named_modules():
        if isinstance(module, _WITHOUT_RULES):
            raise ValueError(
                f"{what} has no rule for module {name!r} ({type(module).__name__}); {remedy}."
            )


def _composite(composite: Any, canonizers: Sequence[Any] | None) -> Any:
    from zennit.core import Composite  # takes long to load

    if isinstance(composite, Composite):
        if canonizers is not None:
            raise TypeError("a composite brings its own canonizers; leave out canonizers=.")
        return composite
    return composite_named(composite, canonizers, "make it with them and give the composite itself")


def check_weights(model: nn.Module) -> None:
    """Refuse weight and spectral normalisation: relevance rules read and change plain weights.

    Behind a parametrization they would change nothing, and relevance would be several times too
    large.
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
                "normalisation), which relevance rules do not support, so relevance would be "
                f"wrong; fold them in a copy of the network: {how} for each such layer."
            )


def composite_named(
    name: Any, canonizers: Sequence[Any] | None, remedy: str, **arguments: Any
) -> Any:
    """One of Zennit's composites by its name, a key of ``zennit.composites.COMPOSITES``.

    ``canonizers`` None is ``SequentialMergeBatchNorm``; ``remedy`` ends the message about arguments
    that do not fit the composite.
    """
    from zennit.canonizers import SequentialMergeBatchNorm
    from zennit.composites import COMPOSITES

    if not isinstance(name, str):
        raise TypeError(f"composite must be a name or a Zennit composite, got {name!r:.60}.")
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
