"""Captum's attributions of the network as a sub-architecture, and Captum's measures and figures.

``with arch.applied(model): IntegratedGradients(model).attribute(images, target=7)`` makes a
heat-map. :class:`GatedAttribution` does the same as an object, and removes what Captum leaves on a
network.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeAlias

import numpy as np
import torch
from captum import metrics
from captum.attr import LRP, Attribution, Deconvolution, DeepLift, LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr.data.labels import Task
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import check_eval, gated, gates_and_sites, site_modules
from nad_attr.gating.restore import own_copy, restored
from nad_attr.running.forward import any_batch
from nad_attr.sites.site import GateSite
from nad_attr.system.rng import isolated_rng

__all__ = [
    "GatedAttribution",
    "gaussian_perturbation",
    "heatmap_figure",
    "infidelity",
    "input_shaped",
    "sensitivity",
]

Gates: TypeAlias = "SubArchitecture | TaskGates | Mapping[str, Tensor]"


class GatedAttribution(Attribution):  # type: ignore[misc]
    """A Captum method on the network as a sub-architecture, as a Captum method itself.

    ``attribute`` takes and returns what the method's own does. The gates are there during the call,
    and everything that Captum leaves on the network (LRP, or a DeepLift that fails) is removed,
    also after an exception. Every input, layer and neuron attribution of Captum works; a layer
    method at a gate site gets the gated value.

    Args:
        method: A Captum attribution of the network, such as ``IntegratedGradients(model)``, or
            ``NoiseTunnel(Saliency(model))``.
        gates: A sub-architecture; task gates (soft), with ``tasks`` unless there is only one; or
            ``{site name: tensor}`` with ``sites``, as :func:`nad_attr.gated` takes them.
        model: The network, if the method was given a function that calls it.
        sites: The gate sites, needed with a mapping.
        tasks: With task gates: one task. One for each image works for methods that run the images
            as they are (Saliency, LRP), not for those that repeat them (IntegratedGradients).
        means: What replaces a closed channel; None: zero, or the gates' own.
        seed: Of a method's random numbers; the global random state is left alone.

    Attributes:
        method: As given.
        model: The network that is gated.

    Raises:
        SiteError: If the network has no such site.
        TypeError: If the method is none of Captum's, or the network is not known.
        ValueError: If gates, sites, tasks or means do not fit together, or the network is in train
            mode.

    ``attribute`` also raises :class:`~nad_attr.GatingError`: if a site does not fire, for gates for
    each image with a method that repeats images, and for closed channels at their mean with the
    Gamma and Alpha-Beta rules of Captum's LRP, which change weights and lose the means' part.

    Example:
        >>> from captum.attr import InputXGradient
        >>> net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
        >>> for layer in (net[0], net[2]):
        ...     _ = nn.init.ones_(layer.weight)
        >>> arch = SubArchitecture.from_kept({"1": [0]}, [GateSite("1", 2, 1)])
        >>> gated_method = GatedAttribution(InputXGradient(net.eval()), arch)
        >>> gated_method.attribute(torch.tensor([[1.0, 3.0]]), target=0).tolist()
        [[1.0, 3.0]]
        >>> InputXGradient(net).attribute(torch.tensor([[1.0, 3.0]]), target=0).tolist()
        [[2.0, 6.0]]
    """

    def __init__(
        self,
        method: Attribution,
        gates: Gates,
        *,
        model: nn.Module | None = None,
        sites: Sequence[GateSite] | None = None,
        tasks: Task | Sequence[Task] | None = None,
        means: Mapping[str, Tensor] | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(method, Attribution):
            raise TypeError(
                "method must be a Captum attribution, such as IntegratedGradients(model), got "
                f"{method!r:.60}."
            )
        self.model = _network(method) if model is None else model
        if not isinstance(self.model, nn.Module):
            raise TypeError("the method was given a function; say which network it calls: model=.")
        check_eval(self.model)
        self.gates, self.sites, self.means = gates_and_sites(gates, sites, tasks, means)
        site_modules(self.model, self.sites)
        super().__init__(method.forward_func)
        self.method = method
        self.seed = seed

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Run the network under the gates inside a ``with`` block."""
        with self._on(self.model):
            yield

    def _on(self, model: nn.Module) -> AbstractContextManager[None]:
        return gated(model, self.gates, sites=self.sites, means=self.means)

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Attribute with the method, on the gated network.

        Args:
            inputs: As the method takes them.
            *args: As the method takes them.
            **kwargs: As the method takes them: ``target``, ``baselines``, ``n_steps``, ...

        Returns:
            What the method returns.

        Raises:
            GatingError: See the class.
        """
        # Captum switches gradients of its inputs on for a while, which other threads would see.
        items = tuple(
            x.detach() if isinstance(x, Tensor) and not x.requires_grad else x
            for x in (inputs if isinstance(inputs, tuple) else (inputs,))
        )
        inputs = items if isinstance(inputs, tuple) else items[0]
        model, method = self.model, self.method
        inner = getattr(method, "attribution_method", method)
        if isinstance(inner, LRP) and isinstance(inner.forward_func, nn.Module):
            model, method = own_copy(model, method)  # some of its rules change weights
        if all(isinstance(x, Tensor) for x in items) and model is _network(method):
            one_pass = isinstance(inner, (DeepLift, LRP, Deconvolution))
            batched = any_batch(model, items, self.model, one_pass=one_pass)
            method = method if batched is model else _with_network(method, batched)
        with isolated_rng(self.seed), restored(model), self._on(model):
            return method.attribute(inputs, *args, **kwargs)

    @property
    def multiplies_by_inputs(self) -> bool:
        """As the method says of itself."""
        return bool(self.method.multiplies_by_inputs)

    def has_convergence_delta(self) -> bool:
        """As the method says of itself."""
        return bool(self.method.has_convergence_delta())

    def compute_convergence_delta(self, *args: Any, **kwargs: Any) -> Tensor:
        """The method's convergence delta, on the gated network."""
        with restored(self.model), self.applied():
            delta: Tensor = self.method.compute_convergence_delta(*args, **kwargs)
        return delta

    @classmethod
    def get_name(cls) -> str:
        """The method's name in plots and tables."""
        return "Gated Attribution"


def _network(method: Any) -> Any:
    """The network that a Captum method explains; None if it is hidden in a function."""
    while hasattr(method, "attribution_method"):  # NoiseTunnel
        method = method.attribution_method
    for candidate in (getattr(method, "model", None), getattr(method, "forward_func", None)):
        if isinstance(candidate, nn.Module):
            return candidate
    return None


def _with_network(method: Any, network: nn.Module) -> Any:
    """A copy of a Captum method that calls another network."""
    method = copy.copy(method)
    if hasattr(method, "attribution_method"):
        method.attribution_method = _with_network(method.attribution_method, network)
    for name in ("model", "forward_func"):
        if isinstance(getattr(method, name, None), nn.Module):
            setattr(method, name, network)
    return method


def _restored(model: nn.Module | None) -> AbstractContextManager[None]:
    return nullcontext() if model is None else restored(model)


def gaussian_perturbation(
    scale: float = 0.05,
) -> Callable[[Tensor | tuple[Tensor, ...]], tuple[Any, Any]]:
    """A perturbation for :func:`infidelity`: subtract normal noise of a standard deviation.

    Returns:
        A function of inputs that returns the noise and the inputs without it, as Captum asks for.

    Example:
        >>> noise, noisy = gaussian_perturbation(0.1)(torch.zeros(2, 3))
        >>> torch.equal(noisy, -noise)
        True
    """
    if not scale > 0:
        raise ValueError(f"scale must be above zero, got {scale!r}.")

    def perturb(inputs: Tensor | tuple[Tensor, ...]) -> tuple[Any, Any]:
        if isinstance(inputs, Tensor):
            noise = torch.randn_like(inputs) * scale
            return noise, inputs - noise
        noises = tuple(torch.randn_like(item) * scale for item in inputs)
        return noises, tuple(x - noise for x, noise in zip(inputs, noises, strict=True))

    return perturb


def infidelity(
    method: Attribution,
    inputs: Tensor,
    perturb_func: Callable[..., Any] | None = None,
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    n_perturb_samples: int = 10,
    max_examples_per_batch: int | None = None,
    normalize: bool = True,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """How badly an attribution predicts the effect of perturbations (Captum's infidelity).

    A :class:`GatedAttribution` is measured on the gated network. The attribution of a layer method
    (:class:`~nad_attr.NADAttribution`, ...) is brought to the input's shape first, see
    :func:`input_shaped`, and measured on the whole network.

    Args:
        method: Attributes one tensor of the inputs, or one layer.
        inputs: Images (B, C, H, W).
        perturb_func: As Captum takes it; None: :func:`gaussian_perturbation`.
        target: The class that is explained.
        additional_forward_args: Passed on to the network.
        n_perturb_samples: Perturbations for each image.
        max_examples_per_batch: As in Captum.
        normalize: Scale each attribution as it fits best (Captum's ``normalize``); attributions of
            a layer have a scale of their own.
        seed: Of the perturbations.
        **options: Further arguments of ``method.attribute``.

    Returns:
        (B,), lower is better.

    Raises:
        TypeError: If the method is none of Captum's.
        ValueError: If it attributes to several layers.

    Example:
        >>> from captum.attr import Saliency
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> arch = SubArchitecture.full([GateSite("1", 2, 1)])
        >>> infidelity(GatedAttribution(Saliency(net), arch), torch.ones(3, 2), target=0).shape
        torch.Size([3])

    Source:
        Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019, def. 2.1.
    """
    _check_method(method)
    options |= {"target": target}
    model = _network(method)
    if additional_forward_args is not None:
        options["additional_forward_args"] = additional_forward_args
    with _restored(model):
        attributions = _one_tensor(method.attribute(inputs, **options))
    if attributions.shape != inputs.shape:
        attributions = input_shaped(attributions, inputs)
    inside = method.applied() if isinstance(method, GatedAttribution) else nullcontext()
    function = method.forward_func
    if isinstance(function, nn.Module) and isinstance(inputs, Tensor):
        function = any_batch(function, (inputs,))
    with isolated_rng(seed), _restored(model), inside:
        result: Tensor = metrics.infidelity(
            function,
            gaussian_perturbation() if perturb_func is None else perturb_func,
            inputs,
            attributions.detach(),
            additional_forward_args=additional_forward_args,
            target=target,
            n_perturb_samples=n_perturb_samples,
            max_examples_per_batch=max_examples_per_batch,
            normalize=normalize,
        )
    return result


def sensitivity(
    method: Attribution,
    inputs: Tensor,
    *,
    perturb_func: Callable[..., Any] | None = None,
    perturb_radius: float = 0.02,
    n_perturb_samples: int = 10,
    norm_ord: Any = "fro",
    max_examples_per_batch: int | None = None,
    seed: int = 0,
    **options: Any,
) -> Tensor:
    """How far an attribution moves at most when the input moves a little (Captum's measure).

    Works for input methods, :class:`GatedAttribution`, and layer methods of one or several layers,
    which ``captum.metrics.sensitivity_max`` does not take as they are.

    Args:
        method: The attribution.
        inputs: Images (B, ...).
        perturb_func: As Captum takes it; None: uniform noise in the cube of that radius.
        perturb_radius: Radius of Captum's own perturbation.
        n_perturb_samples: Perturbations for each image.
        norm_ord: Which norm, as in Captum.
        max_examples_per_batch: As in Captum.
        seed: Of the perturbations.
        **options: Arguments of ``method.attribute``: ``target``, ...

    Returns:
        (B,), lower is steadier.

    Raises:
        TypeError: If the method is none of Captum's.

    Example:
        >>> from captum.attr import LayerActivation
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)).eval()
        >>> sensitivity(LayerActivation(net, net[1]), torch.ones(3, 2)).shape
        torch.Size([3])

    Source:
        Yeh et al., "On the (In)fidelity and Sensitivity of Explanations", NeurIPS 2019, def. 3.1.
    """
    _check_method(method)

    def explain(given: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        if isinstance(given, tuple) and len(given) == 1:
            given = given[0]
        found = method.attribute(given, **kwargs)
        items = (found,) if isinstance(found, Tensor) else tuple(found)
        return tuple(item.detach() for item in items)

    if perturb_func is not None:
        options["perturb_func"] = perturb_func
    with isolated_rng(seed), _restored(_network(method)):
        result: Tensor = metrics.sensitivity_max(
            explain,
            inputs,
            perturb_radius=perturb_radius,
            n_perturb_samples=n_perturb_samples,
            norm_ord=norm_ord,
            max_examples_per_batch=max_examples_per_batch,
            **options,
        )
    return result


def _check_method(method: object) -> None:
    if not isinstance(method, Attribution):
        raise TypeError(f"method must be a Captum attribution, got {type(method).__name__}.")


def _one_tensor(attributions: Any) -> Tensor:
    if isinstance(attributions, Tensor):
        return attributions
    items = tuple(attributions)
    if len(items) != 1:
        raise ValueError(
            f"the method attributes to {len(items)} layers or inputs; infidelity needs one: "
            "give the method one layer."
        )
    only: Tensor = items[0]
    return only


def input_shaped(attributions: Tensor, inputs: Tensor) -> Tensor:
    """A layer's attribution in the shape of the images: channels summed, positions interpolated.

    The sum over an image stays the same; its colour channels get equal parts. Attributions are
    (B, K, h, w) of a layer of channels first, or already (B, C, H, W).

    Raises:
        ValueError: If one has another number of axes.

    Example:
        >>> shaped = input_shaped(torch.ones(1, 5, 2, 2), torch.zeros(1, 3, 8, 8))
        >>> shaped.shape, shaped.sum().item()
        (torch.Size([1, 3, 8, 8]), 20.0)
    """
    if attributions.shape == inputs.shape:
        return attributions
    if attributions.ndim != 4 or inputs.ndim != 4 or len(attributions) != len(inputs):
        raise ValueError(
            f"attributions of shape {tuple(attributions.shape)} cannot be brought to inputs of "
            f"shape {tuple(inputs.shape)}: both need four axes (images, channels, height, width)."
        )
    maps = attributions.sum(1, keepdim=True)
    total = maps.sum((2, 3), keepdim=True)
    resized = LayerAttribution.interpolate(maps, inputs.shape[2:], "bilinear")
    # Interpolation keeps means up to the border; what is missing is spread evenly.
    resized = resized * (maps[0, 0].numel() / inputs[0, 0].numel())
    resized = resized + (total - resized.sum((2, 3), keepdim=True)) / inputs[0, 0].numel()
    shaped: Tensor = (resized / inputs.shape[1]).expand(inputs.shape).contiguous()
    return shaped


def heatmap_figure(
    attributions: Tensor | Mapping[str, Tensor],
    images: Tensor | None = None,
    *,
    method: str | None = None,
    sign: str = "all",
    titles: Sequence[str] | None = None,
    size: float = 2.5,
) -> Any:
    """Heat-maps drawn by ``captum.attr.visualization``: a row for each method, a column an image.

    Args:
        attributions: (B, C, H, W) or (B, H, W), or several of them by name.
        images: (B, C, H, W), drawn under them; each is scaled to its own range.
        method: One of Captum's: ``"heat_map"``, ``"blended_heat_map"``, ``"masked_image"``, ...
            None: blended where there are images.
        sign: ``"all"``, ``"positive"``, ``"negative"`` or ``"absolute_value"``.
        titles: One for each image.
        size: Inches of one picture.

    Returns:
        A ``matplotlib.figure.Figure``, not shown and not known to pyplot.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If shapes do not go together.

    Example:
        >>> figure = heatmap_figure({"plain": torch.rand(2, 3, 8, 8)}, torch.rand(2, 3, 8, 8))
        >>> len(figure.axes)
        2
    """
    try:
        from captum.attr import visualization
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            "figures need matplotlib; install it with: pip install 'nad-attr[plot]'"
        ) from None
    rows = {"": attributions} if isinstance(attributions, Tensor) else dict(attributions)
    if not rows:
        raise ValueError("there are no attributions to draw.")
    maps = {name: _maps(value) for name, value in rows.items()}
    first = next(iter(maps.values()))
    for name, value in maps.items():
        if value.shape[:3] != first.shape[:3]:
            raise ValueError(f"attributions {name!r} have another shape: {tuple(value.shape)}.")
    if images is not None and images.shape[::2] != (len(first), first.shape[1]):
        raise ValueError(
            f"images of shape {tuple(images.shape)} do not fit {len(first)} heat-maps of "
            f"{first.shape[1]} x {first.shape[2]}."
        )
    if titles is not None and len(titles) != len(first):
        raise ValueError(f"{len(titles)} titles for {len(first)} images.")
    style = method or ("heat_map" if images is None else "blended_heat_map")
    figure = Figure(figsize=(size * len(first), size * len(maps)), layout="constrained")
    axes = figure.subplots(len(maps), len(first), squeeze=False)
    for (name, value), line in zip(maps.items(), axes, strict=True):
        for i, axis in enumerate(line):
            image = None if images is None else _picture(images[i])
            flat = not value[i].any()
            # Captum scales by the greatest value and cannot draw a map of zeros.
            drawn = np.full_like(value[i], 1e-12) if flat else value[i]
            how: dict[str, Any] = {"method": style, "sign": sign, "use_pyplot": False}
            visualization.visualize_image_attr(drawn, image, plt_fig_axis=(figure, axis), **how)
        line[0].set_ylabel(name)
    for axis, title in zip(axes[0], titles or (), strict=False):
        axis.set_title(title)
    return figure


def _maps(value: Tensor) -> np.ndarray[Any, Any]:
    """Attributions as (B, H, W, C), as Captum draws them."""
    if value.ndim not in (3, 4) or not len(value):
        raise ValueError(
            f"attributions of shape {tuple(value.shape)} are not of images, (B, C, H, W)."
        )
    value = value.detach().double().cpu()
    value = value[:, None] if value.ndim == 3 else value
    return value.permute(0, 2, 3, 1).numpy()


def _picture(image: Tensor) -> np.ndarray[Any, Any]:
    """An image (C, H, W) as (H, W, 3) in [0, 1]."""
    image = image.detach().double().cpu()
    low, high = image.amin(), image.amax()
    image = (image - low) / (high - low).clamp_min(1e-12)
    image = image.expand(3, -1, -1) if image.shape[0] == 1 else image[:3]
    return F.pad(image, (0, 0, 0, 0, 0, 3 - len(image))).permute(1, 2, 0).numpy()
