"""Layer-wise relevance propagation through a sub-architecture, with Zennit.

:class:`GateCanonizer` puts the gates into any composite; :class:`SubArchitectureAttributor` does
that for you, checks the outcome and tidies up. Works with Zennit 0.5.1 and 1.0.0.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from itertools import pairwise
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from zennit.attribution import Attributor, Gradient, IntegratedGradients, Occlusion, SmoothGrad
from zennit.canonizers import Canonizer
from zennit.core import Composite, RemovableHandleList, collect_leaves
from zennit.image import gridify, palette
from zennit.types import BatchNorm, Linear

from nad_attr._checks import GatingError, tensor_of
from nad_attr.data.labels import Task
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.foreign_hooks import relevance_rules
from nad_attr.gating.hooks import check_eval, gated, gates_and_sites, site_modules
from nad_attr.gating.restore import own_copy, restored
from nad_attr.running.forward import any_batch
from nad_attr.scoring.zennit_scorers import LRPScorer, check_weights, composite_named
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.system.rng import isolated_rng

__all__ = [
    "ATTRIBUTORS",
    "GateCanonizer",
    "LRPScorer",
    "SubArchitectureAttributor",
    "heatmap_image",
    "named_composite",
    "whole_network",
]

Gates: TypeAlias = "SubArchitecture | TaskGates | Mapping[str, Tensor]"
Target: TypeAlias = "int | Sequence[int] | Tensor | Callable[[Tensor], Tensor]"

#: The inner attributors by name.
ATTRIBUTORS: dict[str, Any] = {
    "gradient": Gradient,
    "smooth_grad": SmoothGrad,
    "integrated_gradients": IntegratedGradients,
    "occlusion": Occlusion,
}
#: How far canonizers may move an output, as a share of the outputs' spread.
_TOLERANCE = 1e-3


class GateCanonizer(Canonizer):  # type: ignore[misc]
    """A Zennit canonizer that runs the network under gates while a composite is registered.

    Put it into ``canonizers=[...]`` of any composite, with any other canonizers. Rules work as if
    the gates were multiplied into the weights: a rule of LRP treats a gate as a layer of one weight
    for each channel and passes all relevance on if closed channels are zero; a mean that replaces
    them keeps its share, as a bias does. Rules that rewrite gradients, and no rules, get the
    gradient times the gate.

    The place in the list matters in one case only: a gate on a layer whose BatchNorm is merged into
    it. Put this canonizer **before** the merging one then. It moves the gate behind the BatchNorm
    and closes a channel at the BatchNorm's output for the ablation value, which is the same
    function. After merging that output is unknown, and the gate is refused.

    Args:
        gates: A sub-architecture; task gates (soft), with ``tasks`` unless there is only one; or
            ``{site name: tensor}`` with ``sites``, as :func:`nad_attr.gated` takes them.
        sites: The gate sites, needed with a mapping.
        tasks: With task gates: one task for the batch, or one for each image.
        means: ``{site name: (C,)}``, what replaces a closed channel; None: zero, or the gates' own.

    Raises:
        TypeError: If ``gates`` is something else.
        ValueError: If gates, sites, tasks or means do not fit together.

    Registering the composite also raises :class:`~nad_attr.SiteError` if the network has no such
    site, and :class:`~nad_attr.GatingError` if a gate is before a BatchNorm that is merged already.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.ones_(layer.weight)
        >>> arch = SubArchitecture.from_kept({"1": [0]}, [GateSite("1", 2, 1)])
        >>> composite = named_composite("epsilon_plus", canonizers=[GateCanonizer(arch)])
        >>> with composite.context(net.eval()) as gated_net:
        ...     print(gated_net(torch.ones(1, 2)).tolist())
        [[2.0]]
        >>> net(torch.ones(1, 2)).tolist()
        [[4.0]]

    Source:
        Anders et al., "Software for Dataset-wide XAI: From Local Explanations to Global Insights
        with Zennit, CoRelAy, and ViRelAy", 2021, for canonizers.
    """

    def __init__(
        self,
        gates: Gates,
        *,
        sites: Sequence[GateSite] | None = None,
        tasks: Task | Sequence[Task] | None = None,
        means: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.gates, self.sites, self.means = gates_and_sites(gates, sites, tasks, means)
        self._stack: ExitStack | None = None

    def apply(self, root_module: nn.Module) -> list[Canonizer]:
        """Put the gates on a network; Zennit calls this when the composite is registered."""
        instance = self.copy()
        instance.register(root_module)
        return [instance]

    def register(self, root_module: nn.Module) -> None:
        """Put the gates on a network, until :meth:`remove`."""
        moved, moved_gates, moved_means = self._behind_batch_norms(root_module)
        here = [site for site in self.sites if site.name not in moved]
        with ExitStack() as stack:
            if moved:
                stack.enter_context(
                    gated(root_module, moved_gates, sites=list(moved.values()), means=moved_means)
                )
                for name, site in moved.items():
                    stack.enter_context(_Connected(root_module, name, site.name))
            if here:
                gates = {site.name: self.gates[site.name] for site in here}
                stack.enter_context(gated(root_module, gates, sites=here, means=self.means))
            self._stack = stack.pop_all()

    def remove(self) -> None:
        """Take the gates off again."""
        stack, self._stack = self._stack, None
        if stack is not None:
            # A composite may be removed before the network was run; each run checks for itself.
            with suppress(GatingError):
                stack.close()

    def copy(self) -> GateCanonizer:
        """Another canonizer with the same gates."""
        return type(self)(self.gates, sites=self.sites, means=self.means)

    def _behind_batch_norms(
        self, root: nn.Module
    ) -> tuple[dict[str, GateSite], dict[str, Tensor], dict[str, Tensor]]:
        """The sites before a BatchNorm: where the gate goes, with what gates and means."""
        modules = site_modules(root, self.sites)
        names = {id(module): name for name, module in unwrap(root).named_modules()}
        leaves = list(collect_leaves(unwrap(root)))
        following = {
            id(first): (first, second)
            for first, second in pairwise(leaves)
            if isinstance(first, Linear) and isinstance(second, BatchNorm)
        }
        following |= {id(second): pair for pair in following.values() for second in pair[1:]}
        moved: dict[str, GateSite] = {}
        gates: dict[str, Tensor] = {}
        means: dict[str, Tensor] = {}
        for site in self.sites:
            layer, norm = following.get(id(modules[site.name]), (None, None))
            before = modules[site.name] is (norm if site.at_input else layer)
            if norm is None or not before or bool((self.gates[site.name] == 1).all()):
                continue
            if _is_merged(layer, norm):
                raise GatingError(
                    f"gate site {site.name!r} stands before BatchNorm {names[id(norm)]!r}, which "
                    "seems to be merged into the layer already, so that its ablation value cannot "
                    "be known: put GateCanonizer before the merging canonizer in the list."
                )
            zero = torch.zeros(site.n_channels, device="cpu")
            mean = zero if self.means is None else self.means[site.name]
            name = names[id(norm)]
            moved[site.name] = GateSite(name, site.n_channels, 1)
            gates[name] = self.gates[site.name]
            means[name] = _normalised(norm, mean)
        return moved, gates, means


def _is_merged(layer: Any, norm: Any) -> bool:
    """Whether a BatchNorm was merged: it does nothing, and the layer before it adds something."""
    values = (norm.running_mean, norm.running_var - 1, norm.weight - 1, norm.bias)
    if any(bool(value.detach().any()) for value in values):
        return False
    # An untrained BatchNorm looks the same; if nothing is added, both give the same.
    return layer.bias is not None and bool(layer.bias.any())


def _normalised(norm: Any, mean: Tensor) -> Tensor:
    """The output of a BatchNorm for a constant in each channel, (C,)."""
    device = norm.running_mean.device
    with torch.no_grad():
        centred = mean.to(device, norm.running_mean.dtype) - norm.running_mean
        scaled = centred * (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scaled = scaled * norm.weight + norm.bias
        constant: Tensor = scaled.detach().clone()
    return constant


class _Connected:
    """Check in each forward pass that one module's output is the next one's input."""

    def __init__(self, root: nn.Module, layer: str, norm: str) -> None:
        modules = dict(unwrap(root).named_modules(remove_duplicate=False))
        # The first may be the BatchNorm itself, gated at its input.
        self.pair = (modules[layer], modules[norm]) if layer != norm else None
        self.message = (
            f"gate site {layer!r} is listed before BatchNorm {norm!r}, but its output is not what "
            "the BatchNorm is given, so that neither can be merged nor moved: gate another module."
        )

    def __enter__(self) -> None:
        self.handles = []
        if self.pair is None:
            return
        latest: list[Tensor] = []

        def after(module: nn.Module, args: Any, output: Any) -> None:
            latest[:] = [output.detach()]

        def before(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not latest or not torch.equal(latest.pop(), args[0].detach()):
                raise GatingError(self.message)

        self.handles = [
            self.pair[0].register_forward_hook(after),
            self.pair[1].register_forward_pre_hook(before),
        ]

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()


def named_composite(
    name: str, *, canonizers: Sequence[Any] | None = None, **arguments: Any
) -> Composite:
    """One of Zennit's composites by its name.

    Args:
        name: A key of ``zennit.composites.COMPOSITES``: ``"epsilon_plus"``,
            ``"epsilon_gamma_box"``, ``"guided_backprop"``, ...
        canonizers: Zennit's canonizers. None: ``SequentialMergeBatchNorm``, which merges each
            BatchNorm into the layer that is listed before it.
        **arguments: What the composite needs or allows, as ``low`` and ``high`` of
            ``"epsilon_gamma_box"`` (the smallest and greatest value that a pixel can have, as
            tensors that broadcast to the images, or numbers).

    Raises:
        TypeError: If the name is not a string.
        ValueError: If there is no such composite, or its arguments are others.

    Example:
        >>> named_composite("epsilon_gamma_box", low=-3.0, high=3.0).__class__.__name__
        'EpsilonGammaBox'
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a composite's name, got {type(name).__name__}.")
    for key in ("low", "high"):
        if isinstance(arguments.get(key), (int, float)):
            arguments[key] = torch.tensor(arguments[key], device="cpu")
    made: Composite = composite_named(
        name, canonizers, "give them by name to named_composite", **arguments
    )
    return made


class SubArchitectureAttributor(Attributor):  # type: ignore[misc]
    """A Zennit attributor of the network as a sub-architecture: heat-maps of its channels.

    Use it as any attributor of Zennit: called by itself, or several times in a ``with`` block. It
    registers the composite with the gates in it, checks with the first images that the composite's
    canonizers do not change the gated network's outputs, runs the inner attributor, and restores
    the network, also after an exception. It works on a copy of the network that shares its weights
    (``model`` in a ``with`` block), so that other threads get the network unchanged; on the network
    itself, if it cannot be copied.

    With conserving relevance rules, no biases and closed channels at zero, the relevance of an
    image sums to its gated output. With biases, or closed channels at their mean (an added
    constant, hence a bias), it sums to the gated output less their part, as LRP always does.

    Args:
        model: The network, in eval mode.
        arch: The sub-architecture, or a :class:`GateCanonizer` of any gates.
        composite: A Zennit composite (a copy of it is used), the name of one
            (:func:`named_composite`), or None for plain gradients.
        attributor: ``"gradient"``, ``"smooth_grad"``, ``"integrated_gradients"``, ``"occlusion"``,
            or a class of Zennit's attributors.
        canonizers: In place of the composite's own. None: those, ``SequentialMergeBatchNorm`` for
            a name; ``[]``: none, as DenseNet needs.
        attr_output: The default target, in place of the sub-architecture's own task.
        seed: Of SmoothGrad's noise; the global random state is left alone.
        **options: Arguments of the inner attributor: ``n_iter``, ``noise_level``, ``window``,
            ``stride``, ``baseline_fn``, ...

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If a name is unknown, or the network is in train mode.

    Called, it also raises :class:`~nad_attr.GatingError` if a site does not fire or the canonizers
    change what the network computes.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.ones_(layer.weight)
        >>> arch = SubArchitecture.from_kept({"1": [0]}, [GateSite("1", 2, 1)], task=0)
        >>> with SubArchitectureAttributor(net.eval(), arch, "epsilon_plus") as attributor:
        ...     output, relevance = attributor(torch.tensor([[1.0, 3.0]]), 0)
        >>> output.tolist(), relevance.round(decimals=3).tolist()
        ([[4.0]], [[1.0, 3.0]])

    Source:
        Bach et al., "On Pixel-Wise Explanations for Non-Linear Classifier Decisions by Layer-Wise
        Relevance Propagation", PLOS ONE 2015, eq. 2 for conservation; Anders et al., 2021.
    """

    def __init__(
        self,
        model: nn.Module,
        arch: SubArchitecture | GateCanonizer,
        composite: Composite | str | None = None,
        attributor: str | type[Attributor] = "gradient",
        *,
        canonizers: Sequence[Any] | None = None,
        attr_output: Target | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if isinstance(arch, GateCanonizer):
            gates, task = arch, None
        elif isinstance(arch, SubArchitecture):
            gates, task = GateCanonizer(arch), arch.task
        else:
            raise TypeError(
                f"arch must be a SubArchitecture or a GateCanonizer, got {type(arch).__name__}; "
                "for soft gates give GateCanonizer(task_gates, tasks=...)."
            )
        check_eval(model)
        if composite is None:
            composite = Composite()
        elif isinstance(composite, str):
            composite = named_composite(composite, canonizers=canonizers)
        elif not isinstance(composite, Composite):
            raise TypeError(
                "composite must be a Zennit composite, the name of one, or None, got "
                f"{composite!r:.60}."
            )
        if isinstance(attributor, str):
            if attributor not in ATTRIBUTORS:
                known = ", ".join(map(repr, ATTRIBUTORS))
                raise ValueError(f"attributor must be one of {known}, got {attributor!r}.")
            kind = ATTRIBUTORS[attributor]
        elif not (isinstance(attributor, type) and issubclass(attributor, Attributor)):
            raise TypeError(f"attributor must be a name or a class, got {attributor!r:.60}.")
        else:
            kind = attributor
        super().__init__(model, composite=_with_gates(composite, gates, canonizers))
        self.gates = gates
        self.default = task if attr_output is None else attr_output
        self.seed = seed
        self.inner = kind(model, **options)
        self._stack: ExitStack | None = None
        self._checked = False

    def __enter__(self) -> SubArchitectureAttributor:
        """Register the composite with the gates in it."""
        if self._stack is not None:
            raise RuntimeError("this attributor is in use already; make another one.")
        check_eval(self.model)
        with ExitStack() as stack:
            stack.callback(self._run_on, self.model)
            self._given = self.model
            self._run_on(own_copy(self.model))  # its canonizers and rules change weights
            stack.enter_context(restored(self.model))
            stack.callback(self.composite.remove)
            try:
                self.composite.register(self.model)
            except GatingError:
                raise
            except RuntimeError as error:
                raise GatingError(_CHANGED.format(f"fail on this network ({error})")) from error
            if relevance_rules(self.model):
                check_weights(self.model)
            self._stack = stack.pop_all()
        self._checked = len(self.composite.canonizers) == 1
        return self

    def _run_on(self, model: nn.Module) -> None:
        self.model = self.inner.model = model

    def __exit__(self, *error: object) -> Literal[False]:
        """Remove the composite and put back whatever it changed."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()
        return False

    def __call__(self, input: Tensor, attr_output: Target | None = None) -> tuple[Tensor, Tensor]:
        """Attribute an output of the gated network to its input.

        Args:
            input: Images (B, ...).
            attr_output: The output to explain. A class index for all images (int, tensor of one
                element) or one for each (list, integer tensor (B,)); one-hot rows, (B, K) or (1,
                K), or a function of the output, from which the backward pass starts exactly as in
                Zennit. None: the default target, or the sub-architecture's own task. For class
                indices, relevance rules and occlusion start from the class's output, gradients from
                one.

        Returns:
            The gated network's output (B, K), and the attribution, of the input's shape.

        Raises:
            GatingError: If a site does not fire, or the canonizers change the outputs.
            TypeError: If the target is of another kind.
            ValueError: If there is no target, or it does not fit the output.
        """
        target = self.default if attr_output is None else attr_output
        if target is None:
            raise ValueError("there is no target: give a class index, one-hot rows or a function.")
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a tensor of images, got {type(input).__name__}.")
        if self._stack is None:
            with self:
                return self._attribute(input, target)
        return self._attribute(input, target)

    def forward(
        self, input: Tensor, attr_output_fn: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Run the inner attributor, without registering anything (as Zennit's own do)."""
        with isolated_rng(self.seed), torch.enable_grad(), unchanged(self.model):
            output, relevance = self.inner.forward(input, attr_output_fn)
        return output, relevance

    def _attribute(self, input: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        self.inner.model = any_batch(self.model, (input,), self._given, one_pass=True)
        return _in_parts(self._attribute_part, self.inner.model, input, target)

    def _attribute_part(self, input: Tensor, target: Any) -> tuple[Tensor, Tensor]:
        if not self._checked:
            self._check(input)
            self._checked = True
        from_output = isinstance(self.inner, Occlusion) or bool(relevance_rules(self.model))
        return self.forward(input, _start(target, len(input), from_output))

    def _check(self, input: Tensor) -> None:
        """Compare the outputs with the gated network's without the other canonizers."""
        with torch.no_grad():
            try:
                with unchanged(self.model):
                    after = self.inner.model(input)
            except GatingError:
                raise
            except RuntimeError as error:
                raise GatingError(_CHANGED.format(f"fail on this network ({error})")) from error
            self.composite.remove()
            with unchanged(self.model), Composite(canonizers=[self.gates]).context(self.model):
                before = self.inner.model(input)
            self.composite.register(self.model)
        spread = (before - before.mean()).abs().max() + before.abs().max()
        if not bool((after - before).abs().max() <= _TOLERANCE * spread):
            raise GatingError(_CHANGED.format("change the gated network's outputs"))


_CHANGED = (
    "the composite's canonizers {}: modules are not listed in the order in which they run, or one "
    "is merged that should not be (DenseNet lists a BatchNorm after a layer that it does not "
    "follow). Pass canonizers=[...] that fit this network, or canonizers=[] for none."
)


def _with_gates(composite: Any, gates: GateCanonizer, canonizers: Sequence[Any] | None) -> Any:
    """A copy of a composite, with the gates before its other canonizers, or the given ones."""
    new = copy.copy(composite)
    new.canonizers = [gates, *(composite.canonizers if canonizers is None else canonizers)]
    # Each composite has its own registered hooks.
    new.handles = RemovableHandleList()
    new.hook_refs = weakref.WeakSet()
    return new


def _in_parts(
    attribute: Callable[[Tensor, Any], tuple[Tensor, Tensor]],
    network: nn.Module,
    images: Tensor,
    target: Any,
) -> tuple[Tensor, Tensor]:
    """Outputs and attributions, of as many images at a time as the network takes."""
    size, n = getattr(network, "size", None), len(images)
    if size is None or n <= size or (callable(target) and not isinstance(target, Tensor)):
        return attribute(images, target)
    each = not isinstance(target, int) and np.ndim(target) > 0 and len(target) == n
    parts = [
        attribute(images[i : i + size], target[i : i + size] if each else target)
        for i in range(0, n, size)
    ]
    outputs, relevances = zip(*parts, strict=True)
    return torch.cat(outputs), torch.cat(relevances)


def _start(target: Any, n_images: int, from_output: bool) -> Callable[[Tensor], Tensor]:
    """The function of the outputs from which the backward pass starts."""
    if callable(target) and not isinstance(target, Tensor):
        function: Callable[[Tensor], Tensor] = target
        return function
    if isinstance(target, tuple):
        raise ValueError(
            f"the target {target} is a group of classes and has several outputs: give one-hot "
            "rows or a function of the output."
        )
    try:
        given = tensor_of(target)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(
            "the target must be a class index, one for each image, one-hot rows or a function of "
            f"the output, got {target!r:.60}."
        ) from None
    whole = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    if given.ndim == 2:
        return lambda output: _rows(given, output)
    if not whole or given.ndim > 1 or given.numel() not in (1, n_images):
        raise ValueError(
            f"the target has shape {tuple(given.shape)} and dtype {given.dtype}; expected a class "
            f"index, {n_images} of them, or rows of the output's shape."
        )

    def start(output: Tensor) -> Tensor:
        if output.ndim != 2:
            raise ValueError(f"the network returned shape {tuple(output.shape)}, not (B, K).")
        indices = given.to(output.device).flatten().expand(len(output))
        if int(indices.min()) < 0 or int(indices.max()) >= output.shape[1]:
            raise ValueError(
                f"the target {given.tolist()} is not a class of a network with {output.shape[1]} "
                "outputs."
            )
        rows = torch.zeros_like(output).scatter(1, indices[:, None], 1)
        return rows * output.detach() if from_output else rows

    return start


def _rows(given: Tensor, output: Tensor) -> Tensor:
    if given.shape[1:] != output.shape[1:] or given.shape[0] not in (1, len(output)):
        raise ValueError(
            f"the target has shape {tuple(given.shape)}, the network's output "
            f"{tuple(output.shape)}; give class indices or rows of that shape."
        )
    return given.to(output).expand_as(output)


def whole_network(model: nn.Module, composite: Composite, images: Tensor, target: Target) -> Tensor:
    """The heat-maps of the whole network, for comparison; cleaned up as those through gates.

    Args:
        model: The network, in eval mode.
        composite: A Zennit composite.
        images: (B, ...).
        target: As :class:`SubArchitectureAttributor` takes it.

    Returns:
        The attribution, of the images' shape.

    Raises:
        TypeError, ValueError: As :class:`SubArchitectureAttributor`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU()).eval()
        >>> _ = nn.init.eye_(net[0].weight)
        >>> images = torch.tensor([[1.0, 3.0]])
        >>> whole_network(net, named_composite("epsilon_plus"), images, 1).round(decimals=3)
        tensor([[0., 3.]])
    """
    check_eval(model)
    copied = own_copy(model)
    network = any_batch(copied, (images,), model, one_pass=True)
    with restored(copied), composite.context(copied), torch.enable_grad():
        if relevance_rules(copied):
            check_weights(copied)
        by_rules = bool(relevance_rules(copied))

        def attribute(part: Tensor, goal: Any) -> tuple[Tensor, Tensor]:
            output, relevance = Gradient(network)(part, _start(goal, len(part), by_rules))
            return output, relevance

        return _in_parts(attribute, network, images, target)[1]


def heatmap_image(
    relevance: Tensor, *, cmap: str = "coldnhot", level: float = 1.0, columns: int | None = None
) -> Any:
    """Heat-maps as a picture, by ``zennit.image``.

    Args:
        relevance: Attributions of images, (B, C, H, W) or (B, H, W); channels are summed. Each
            image is scaled by its own greatest absolute value, and zero has the middle colour.
        cmap: A colour map of ``zennit.image``, or source code for one.
        level: Contrast; more than one saturates.
        columns: Images beside each other; None: all.

    Returns:
        A ``PIL.Image`` (RGB) of all the heat-maps in a grid.

    Raises:
        ValueError: If the attributions are not of images.

    Example:
        >>> heatmap_image(torch.eye(4).expand(2, 3, 4, 4)).size
        (8, 4)
    """
    if relevance.ndim not in (3, 4) or not len(relevance):
        raise ValueError(
            f"relevance must be of images, (B, C, H, W) or (B, H, W), got {tuple(relevance.shape)}."
        )
    maps = relevance.detach().double().cpu()
    maps = maps.sum(1) if maps.ndim == 4 else maps
    maps = maps / maps.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
    n = len(maps)
    columns = n if columns is None else columns
    rows = -(-n // columns)
    filled = np.zeros((rows * columns, *maps.shape[1:]))
    filled[:n] = maps.numpy()
    levels = np.rint((gridify(filled, shape=(rows, columns)) + 1) * 127.5).astype(np.uint8)
    # Not by Zennit's imgify: recent NumPy and Pillow cannot convert its palette images.
    colours = np.frombuffer(bytes(palette(cmap, level)), np.uint8).reshape(-1, 3)
    return Image.fromarray(colours[levels.reshape(levels.shape[:2])])
