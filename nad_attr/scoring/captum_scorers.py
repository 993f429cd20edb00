"""Captum's layer methods as channel scorers, through Captum's own classes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from captum.attr import (
    InternalInfluence,
    LayerActivation,
    LayerConductance,
    LayerDeepLift,
    LayerGradientXActivation,
    LayerIntegratedGradients,
)
from captum.attr._core.deep_lift import SUPPORTED_NON_LINEAR
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.gating.hooks import installed, site_modules
from nad_attr.gating.restore import Explained, flowing_copies, untouched
from nad_attr.running.outputs import task_outputs
from nad_attr.scoring.scorer import Batch, ChannelScorer, Scores, check_differentiable, positions
from nad_attr.sites.site import GateSite
from nad_attr.system.threads import owned

__all__ = [
    "CaptumLayerScorer",
    "InternalInfluenceScorer",
    "LayerActivationScorer",
    "LayerConductanceScorer",
    "LayerDeepLiftScorer",
    "LayerGradientXActivationScorer",
    "LayerIntegratedGradientsScorer",
]

#: Methods that run an image twice in one pass.
_TWO_ROWS = (LayerDeepLift, LayerConductance)

#: They attribute to a list of layers as to each by itself. (Integrated gradients take a list too,
#: but then move all layers along their paths at once, which is another method.)
_TAKE_LISTS = (LayerActivation, LayerGradientXActivation)
#: Arguments that the scorer sets itself.
_OWN_ARGUMENTS = ("inputs", "target", "additional_forward_args", "attribute_to_layer_input")


class CaptumLayerScorer(ChannelScorer):
    """Any layer method of Captum: E over images of the attribution, summed over positions.

    The method explains the task output of each image. Cost, in passes (forward and backward) for
    each image and task: one for gradient x activation; one without backward, for all tasks
    together, for the activation; and for each site by itself two for DeepLift, and ``n_steps`` (by
    default 50) for methods that integrate along a path.

    Args:
        model: The network.
        sites: Gate sites of that network, in forward order.
        layer_method: A layer method of :mod:`captum.attr`, called with the function and a layer.
            Its result must have the site's shape (``LayerGradCam`` has summed over channels).
        signed: Keep the sign of each image's attribution; False: its absolute value.
        **attribute_kwargs: Further arguments of the method's ``attribute``: ``baselines`` (default
            zero; a number, or a tensor with one row, per input), ``n_steps``,
            ``internal_batch_size``, ``method`` (of integration) and so on.

    Attributes:
        attribute_kwargs: As given.

    Raises:
        SiteError: If the network has no such site.
        TypeError: If the method is none of Captum's, or its ``attribute`` has no such argument.
        ValueError: If there are no sites.

    A call also raises :class:`~nad_attr.GatingError` if the method fails on the network, or its
    result does not have the site's shape. DeepLift is refused if a network calls one activation
    module several times (as torchvision's ResNets do), since its rule is then wrong. DeepLift does
    not see activations that are not modules, and takes their plain gradient.

    Example:
        >>> from captum.attr import LayerGradientShap
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)).eval()
        >>> scorer = CaptumLayerScorer(net, [GateSite("1", 2, 1)], LayerGradientShap,
        ...                            baselines=torch.zeros(1, 2))
        >>> scorer(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))["1"].shape
        torch.Size([2, 2])
    """

    has_sign = True
    #: Captum's class; a subclass names it.
    layer_method: ClassVar[Callable[..., Any] | None] = None

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[GateSite],
        layer_method: Callable[..., Any] | None = None,
        *,
        signed: bool = False,
        **attribute_kwargs: Any,
    ) -> None:
        super().__init__(model, sites)
        chosen: Any = type(self).layer_method if layer_method is None else layer_method
        self._class: Any = chosen.func if isinstance(chosen, partial) else chosen
        attribute = getattr(self._class, "attribute", None)
        if chosen is None or not callable(chosen) or not callable(attribute):
            raise TypeError(
                "layer_method must be a class, such as captum.attr.LayerConductance, "
                f"got {chosen!r:.80}."
            )
        self._make = chosen
        self._name = str(self._class.__name__)
        known = inspect.signature(attribute).parameters
        for name in attribute_kwargs:
            if name in _OWN_ARGUMENTS or name == "return_convergence_delta":
                raise TypeError(f"{name} is set by the scorer; leave it out.")
            if name not in known:
                raise TypeError(f"{self._name}.attribute has no argument {name!r}.")
        self._known = frozenset(known)
        self._steps = 1
        if "n_steps" in known:
            # Conductance takes one more.
            self._steps = 1 + attribute_kwargs.get("n_steps", known["n_steps"].default)
        elif isinstance(self._class, type) and issubclass(self._class, LayerDeepLift):
            self._steps = 2  # the images and their baselines
        self.signed = signed
        self.attribute_kwargs = attribute_kwargs
        self.task_specific = "target" in known

    def images_per_batch(self, batch_size: int) -> int:
        """All steps of a path are run in one pass."""
        return max(1, batch_size // self._steps)

    def image_scores(self, batch: Batch) -> Scores:
        """The attribution, summed over positions."""
        scores: Scores = {}
        n = len(batch.labels)
        batch = self._filled(batch)
        with untouched(batch.model):
            for group in self._groups():
                for site, attribution in zip(group, self._attribute(batch, group), strict=True):
                    tensor = self._checked(batch, site, attribution)
                    scores[site.name] = positions(tensor, site).sum(-1)[:n]
        return {site.name: scores[site.name] for site in self.sites}

    def _filled(self, batch: Batch) -> Batch:
        """The batch, filled with its last image, so that all passes are of a fixed size."""
        n, size = len(batch.labels), batch.fixed_batch
        if size is None:
            return batch
        # DeepLift runs images and baselines in one pass, conductance at least two steps of a path,
        # the others one step.
        two = isinstance(self._class, type) and issubclass(self._class, _TWO_ROWS)
        wanted = size // 2 if two else size
        if n > wanted:
            raise GatingError(
                f"{self._name} runs an image twice in one pass, and the network takes batches of "
                f"{size} image only: write x.shape[0] or -1 in place of the number in forward."
            )
        at = [min(i, n - 1) for i in range(wanted)]
        return replace(
            batch,
            inputs=tuple(x[at] for x in batch.inputs),
            labels=batch.labels[at],
            tasks=[batch.tasks[i] for i in at] if batch.tasks else [],
            targets=None if batch.targets is None else batch.targets[at],
        )

    def _groups(self) -> list[list[GateSite]]:
        """Groups of sites, one for each call of the method."""
        if isinstance(self._class, type) and issubclass(self._class, _TAKE_LISTS):
            sides = [
                [s for s in self.sites if s.at_input == at_input] for at_input in (False, True)
            ]
            return [side for side in sides if side]
        return [[site] for site in self.sites]

    def _attribute(self, batch: Batch, group: Sequence[GateSite]) -> list[Any]:
        modules = site_modules(batch.model, group)
        layers = [modules[site.name] for site in group]
        different, column = batch.columns() if self.task_specific else ([], None)

        def function(*inputs: Tensor) -> Tensor:
            # With frozen weights, backward hooks before the sites need this to have a graph.
            traced = tuple(_traced(item) for item in inputs)
            with flowing_copies(batch.model, group), _called_once(batch.model, self._class):
                outputs = batch.run(traced)
            if torch.is_grad_enabled():
                check_differentiable(outputs)
            return task_outputs(outputs, different) if different else outputs

        arguments = dict(self.attribute_kwargs)
        if batch.fixed_batch and "internal_batch_size" in self._known:
            arguments["internal_batch_size"] = batch.fixed_batch
        if "baselines" in arguments:
            arguments["baselines"] = _on_device(arguments["baselines"], batch.inputs[0].device)
        if "attribute_to_layer_input" in self._known:
            arguments["attribute_to_layer_input"] = group[0].at_input
        elif group[0].at_input:
            raise GatingError(f"{self._name} does not attribute to the input of a layer.")
        if column is not None:
            arguments["target"] = column
        method = self._make(Explained(batch.model, function), layers if layers[1:] else layers[0])
        try:
            with installed(batch.model, group, _as_leaf):
                found = method.attribute(tuple(map(_traced, batch.inputs)), **arguments)
        except (GatingError, torch.cuda.OutOfMemoryError):
            raise
        except (RuntimeError, AssertionError, AttributeError, IndexError) as error:
            names = ", ".join(repr(site.name) for site in group)
            raise GatingError(
                f"Captum's {self._name} fails on this network at {names}: "
                f"{type(error).__name__}: {error}"
            ) from error
        return found if layers[1:] else [found]

    def _checked(self, batch: Batch, site: GateSite, attribution: Any) -> Tensor:
        if isinstance(attribution, (tuple, list)) and len(attribution) == 1:
            attribution = attribution[0]
        if isinstance(attribution, Tensor) and len(attribution) == len(batch.labels):
            return attribution
        what = tuple(attribution.shape) if isinstance(attribution, Tensor) else type(attribution)
        raise GatingError(
            f"Captum's {self._name} returned {what} at gate site {site.name!r} for "
            f"{len(batch.labels)} images; axis 0 must be the images."
        )


@contextmanager
def _called_once(model: nn.Module, method: Any) -> Iterator[None]:
    """Refuse DeepLift if a module whose gradient it changes is called several times."""
    calls: dict[str, int] = {}

    def counter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if calls[name] > 1:
                raise GatingError(
                    f"DeepLift cannot explain this network: its activation {name!r} is called "
                    "several times in one forward pass, and the rule would take the last call for "
                    "all; give each call a module of its own."
                )

        return hook

    with owned() as owner, ExitStack() as stack:
        if isinstance(method, type) and issubclass(method, LayerDeepLift):
            for name, module in model.named_modules():
                if type(module) in SUPPORTED_NON_LINEAR:
                    hook = owner.only(counter(name))
                    stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _traced(tensor: Tensor) -> Tensor:
    """A tensor that keeps gradients, if that is possible."""
    if tensor.requires_grad or not torch.is_grad_enabled() or not tensor.is_floating_point():
        return tensor
    return tensor.detach().requires_grad_()


def _as_leaf(site: GateSite, tensor: Tensor) -> Tensor | None:
    """Start a graph at a site that has none, because the inputs are whole numbers."""
    traced = _traced(tensor)
    return None if traced is tensor else traced


def _on_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, (tuple, list)):
        return tuple(_on_device(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


class LayerGradientXActivationScorer(CaptumLayerScorer):
    """:class:`captum.attr.LayerGradientXActivation`, all sites in one pass.

    Example:
        >>> net = nn.Sequential(nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> LayerGradientXActivationScorer(net, [GateSite("0", 2)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 0.]])}
    """

    layer_method = LayerGradientXActivation


class LayerIntegratedGradientsScorer(CaptumLayerScorer):
    """:class:`captum.attr.LayerIntegratedGradients`: the path is that of the layer itself.

    Example:
        >>> net = nn.Sequential(nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> scorer = LayerIntegratedGradientsScorer(net, [GateSite("0", 2)], n_steps=4)
        >>> scorer(images, torch.tensor([0, 0]))
        {'0': tensor([[2.0000, 0.0000]])}
    """

    layer_method = LayerIntegratedGradients


class LayerConductanceScorer(CaptumLayerScorer):
    """:class:`captum.attr.LayerConductance`: the path is that of the images.

    Example:
        >>> net = nn.Sequential(nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> scorer = LayerConductanceScorer(net, [GateSite("0", 2)], n_steps=1, signed=True,
        ...                                 method="riemann_trapezoid")
        >>> scorer(images, torch.tensor([0, 0]))
        {'0': tensor([[-1., 0.]])}
    """

    layer_method = LayerConductance


class InternalInfluenceScorer(CaptumLayerScorer):
    """:class:`captum.attr.InternalInfluence`: gradients along the path, without activations.

    Example:
        >>> net = nn.Sequential(nn.Identity()).eval()
        >>> scorer = InternalInfluenceScorer(net, [GateSite("0", 2)], n_steps=4)
        >>> scorer(torch.ones(2, 2), torch.tensor([0, 1]))
        {'0': tensor([[1.0000, 0.0000], [0.0000, 1.0000]])}
    """

    layer_method = InternalInfluence


class LayerDeepLiftScorer(CaptumLayerScorer):
    """:class:`captum.attr.LayerDeepLift`, the rescale rule against a baseline.

    Example:
        >>> net = nn.Sequential(nn.Identity(), nn.ReLU()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> LayerDeepLiftScorer(net, [GateSite("0", 2)])(images, torch.tensor([0, 0]))
        {'0': tensor([[0.5000, 0.0000]])}
    """

    layer_method = LayerDeepLift


class LayerActivationScorer(CaptumLayerScorer):
    """:class:`captum.attr.LayerActivation`: how active a channel is.

    Example:
        >>> net = nn.Sequential(nn.Identity()).eval()
        >>> images = torch.tensor([[1.0, 2.0], [-3.0, 0.0]])
        >>> LayerActivationScorer(net, [GateSite("0", 2)])(images, torch.tensor([0, 0]))
        {'0': tensor([[2., 1.]])}
    """

    layer_method = LayerActivation
