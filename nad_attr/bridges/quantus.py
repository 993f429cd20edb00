"""Heat-maps through sub-architectures for Quantus, which measures how good heat-maps are.

Quantus calls ``explain_func(model, inputs, targets, **kwargs)`` with arrays, on copies of the model
of its own making; the sites are found on each by name. Nothing of Quantus is needed to explain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr._checks import tensor_of
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import gated
from nad_attr.gating.restore import Explained, restored
from nad_attr.running.forward import Filled, Runner
from nad_attr.running.options import FROM_RUN, RunOptions, as_options
from nad_attr.system.rng import isolated_rng, seed_of

__all__ = ["ATTRIBUTIONS", "SubArchitectureExplainer", "explain_func"]

Array: TypeAlias = "np.ndarray[Any, Any]"
#: ``(network, images, classes, **options) -> attributions``, called inside the gates.
Attribution: TypeAlias = "Callable[..., Tensor]"
Given: TypeAlias = "TaskGates | SubArchitecture | Mapping[int, SubArchitecture]"


def _of_captum(name: str, **defaults: Any) -> Attribution:
    """One of Captum's attributions, with defaults that differ from Captum's."""

    def attribute(model: nn.Module, images: Tensor, classes: Tensor, **options: Any) -> Tensor:
        from captum import attr  # takes long to load

        given = defaults | options
        if name == "Occlusion":
            side = max(1, min(images.shape[2:]) // 8)
            patch = (images.shape[1], side, side)
            given = {"sliding_window_shapes": patch, "strides": patch} | given
        result: Tensor = getattr(attr, name)(model).attribute(images, target=classes, **given)
        return result

    return attribute


#: The attributions by name; ``"lrp"`` is Zennit's, the others are Captum's.
ATTRIBUTIONS: dict[str, Attribution | None] = {
    "gradient": _of_captum("Saliency", abs=False),
    "input_x_gradient": _of_captum("InputXGradient"),
    "integrated_gradients": _of_captum("IntegratedGradients", n_steps=20),
    "occlusion": _of_captum("Occlusion"),
    "lrp": None,  # its canonizers bring the gates
}


class SubArchitectureExplainer:
    """Explain each image through the sub-architecture of its class, for Quantus.

    Give it to any metric, or to ``quantus.evaluate``, as ``explain_func``. An image's heat-map
    depends on nothing else in the batch.

    Args:
        gates: Task gates, ``{class: sub-architecture}``, or one sub-architecture for all classes.
            None: the whole network, to compare with.
        attribution: One of ``"gradient"``, ``"input_x_gradient"``, ``"integrated_gradients"``,
            ``"occlusion"``, ``"lrp"`` (Zennit), or a function ``(model, images, classes) ->
            attributions`` that is called with the gates in place.
        classes: "given": explain the classes that Quantus hands over, each through its own
            sub-architecture. "predicted": those that the whole network predicts.
        soft: With task gates: their soft values in place of the sub-architectures.
        size: With task gates: a size other than their own.
        sum_channels: One heat-map for each image, (B, 1, H, W), the sum over its colour channels:
            what Quantus's metrics of localisation ask for. False: (B, C, H, W).
        seed: Of an attribution's random numbers.
        run: How to run the network; see :class:`nad_attr.RunOptions`. Quantus's own ``device``
            replaces its field. Images are explained one by one.
        **options: Further arguments of the attribution (``n_steps``, ...); for ``"lrp"``,
            ``composite``: a name or a function that makes one.

    Raises:
        TypeError: If the gates are something else.
        ValueError: If an option is unknown.

    Example:
        >>> from nad_attr import GateSite
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
        >>> gates = TaskGates({"1": torch.tensor([[0.9, 0.1], [0.2, 0.8]])}, [GateSite("1", 2, 1)],
        ...                   [0, 1])
        >>> explain = SubArchitectureExplainer(gates, "integrated_gradients", n_steps=5)
        >>> explain(net, np.ones((3, 1, 4, 4), np.float32), np.array([0, 1, 0])).shape
        (3, 1, 4, 4)

    Source:
        Hedström et al., "Quantus: An Explainable AI Toolkit for Responsible Evaluation of Neural
        Network Explanations and Beyond", JMLR 2023, for the interface.
    """

    def __init__(
        self,
        gates: Given | None,
        attribution: str | Attribution = "gradient",
        *,
        classes: Literal["given", "predicted"] = "given",
        soft: bool = False,
        size: float | None = None,
        sum_channels: bool = True,
        seed: int = 0,
        run: RunOptions | None = None,
        **options: Any,
    ) -> None:
        if not (gates is None or isinstance(gates, (TaskGates, SubArchitecture, Mapping))):
            raise TypeError(
                "gates must be TaskGates, a SubArchitecture, {class: SubArchitecture} or None, got "
                f"{type(gates).__name__}."
            )
        if isinstance(gates, Mapping):
            wrong = [key for key, value in gates.items() if not isinstance(value, SubArchitecture)]
            if wrong or not gates:
                raise TypeError("gates as a mapping must be {class: SubArchitecture}.")
        if (soft or size is not None) and not isinstance(gates, TaskGates):
            raise ValueError("soft= and size= need gates that are TaskGates.")
        if soft and size is not None:
            raise ValueError("soft gates have no size: give one of the two.")
        if classes not in ("given", "predicted"):
            raise ValueError(f"classes must be 'given' or 'predicted', got {classes!r}.")
        if isinstance(attribution, str) and attribution not in ATTRIBUTIONS:
            known = ", ".join(map(repr, ATTRIBUTIONS))
            raise ValueError(f"attribution must be one of {known}, got {attribution!r}.")
        if not (isinstance(attribution, str) or callable(attribution)):
            raise TypeError(f"attribution must be a name or a function, got {attribution!r:.60}.")
        if attribution == "lrp" and set(options) - {"composite"}:
            raise ValueError("'lrp' takes no option but composite=.")
        self.gates = gates
        self.attribution = attribution
        self.classes = classes
        self.soft = soft
        self.size = size
        self.sum_channels = sum_channels
        self.seed = seed
        self.run = as_options(run)
        self.options = options

    def __call__(
        self,
        model: nn.Module,
        inputs: Array | Tensor,
        targets: Array | Tensor | Sequence[int] | int,
        *,
        device: str | torch.device | None = None,
        method: str | None = None,
    ) -> Array:
        """Explain images.

        Args:
            model: The network, in eval mode; unchanged afterwards.
            inputs: Images (B, C, H, W).
            targets: Classes (B,), or one for all.
            device: Where to run; None: where the network is.
            method: Not used; ``quantus.evaluate`` passes it.

        Returns:
            The heat-maps, (B, 1, H, W) or, without ``sum_channels``, (B, C, H, W), float32.

        Raises:
            KeyError: If there are no gates for a class.
            GatingError, SiteError: If the gates do not fit the network.
            TypeError: If images or classes are something else.
            ValueError: If the network is in train mode, or images and classes do not go together.
        """
        place = FROM_RUN if device is None else "cuda" if device == "gpu" else device
        runner = Runner(model, as_options(self.run, device=place))
        if self.attribution == "lrp" and not runner.plain:
            raise ValueError(
                "attribution='lrp' runs the network itself in full precision: leave amp out of "
                "run=, and put forward_func and further arguments into a module's forward."
            )
        images, wanted = _tensors(runner, inputs, targets)
        with torch.no_grad():
            width = runner.images_per_pass((images,))
            outputs = torch.cat([runner((part,)) for part in images.split(width)])
        if self.classes == "predicted":
            wanted = outputs.argmax(1)
        if int(wanted.min()) < 0 or int(wanted.max()) >= outputs.shape[1]:
            raise ValueError(
                f"the classes must be below the network's {outputs.shape[1]} outputs, got "
                f"{wanted.tolist()}."
            )
        # All lookups first: an error comes before the work.
        chosen = {task: self._of(task) for task in sorted(set(wanted.tolist()))}
        found = torch.zeros(images.shape, device="cpu")
        for task, gates in chosen.items():
            rows = (wanted == task).nonzero().flatten()
            part = self._explain(runner, images[rows], task, gates)
            if part.shape != images[rows].shape:
                raise ValueError(
                    f"the attribution returned shape {tuple(part.shape)} for images of shape "
                    f"{tuple(images[rows].shape)}."
                )
            found[rows.cpu()] = part.detach().float().cpu()
        summed = self.sum_channels and found.ndim > 2
        return (found.sum(1, keepdim=True) if summed else found).numpy()

    def _of(self, task: int) -> tuple[Any, Any] | None:
        """The gates of a class, as ``gated`` takes them, with the choice of the task."""
        if self.gates is None:
            return None
        if isinstance(self.gates, SubArchitecture):
            return self.gates, None
        if isinstance(self.gates, TaskGates):
            if self.soft:
                self.gates.index(task)
                return self.gates, task
            return self.gates.sub_architecture(task, self.size), None
        if task not in self.gates:
            raise KeyError(f"no sub-architecture for class {task}; there are {[*self.gates]}.")
        return self.gates[task], None

    def _explain(
        self, runner: Runner, images: Tensor, task: int, gates: tuple[Any, Any] | None
    ) -> Tensor:
        model = runner.model
        seed = seed_of("explaining", self.seed, task)
        if self.attribution == "lrp":
            return _lrp(model, images, task, gates, self.options.get("composite", "epsilon_plus"))
        name = self.attribution
        function = ATTRIBUTIONS[name] if isinstance(name, str) else name
        assert function is not None
        inside = nullcontext() if gates is None else gated(model, gates[0], tasks=gates[1])
        network = model if runner.plain else Explained(model, lambda *inputs: runner(tuple(inputs)))
        if runner.fixed_batch is not None:
            network = Filled(network, runner.fixed_batch)
        parts = []
        with restored(model), inside:
            # Image by image, each with the same seed: random numbers of one must not depend on the
            # others.
            for image in images.split(1):
                with isolated_rng(seed):
                    classes = torch.tensor([task], device=images.device)
                    parts.append(function(network, image.clone(), classes, **self.options).detach())
        return torch.cat(parts)


def _tensors(runner: Runner, inputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Images as the network takes them, and a class for each."""
    try:
        images = tensor_of(inputs)
        classes = tensor_of(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"inputs and targets must be arrays: {error}.") from None
    if images.ndim < 2 or not len(images):
        raise ValueError(f"inputs must be a batch of images, not of shape {tuple(images.shape)}.")
    weight = next((p for p in runner.model.parameters() if p.is_floating_point()), None)
    images = images.detach().to(runner.device, torch.float32 if weight is None else weight.dtype)
    if classes.is_floating_point() and bool((classes != classes.round()).any()):
        raise TypeError(f"targets must be class indices, got {classes.flatten()[:5].tolist()}.")
    classes = classes.long().flatten().to(runner.device)
    if len(classes) not in (1, len(images)):
        raise ValueError(f"{len(classes)} classes for {len(images)} images.")
    return images, classes.expand(len(images))


def _lrp(
    model: nn.Module, images: Tensor, task: int, gates: tuple[Any, Any] | None, composite: Any
) -> Tensor:
    from nad_attr.bridges.zennit import (  # takes long to load
        GateCanonizer,
        SubArchitectureAttributor,
        named_composite,
        whole_network,
    )

    made = named_composite(composite) if isinstance(composite, str) else composite()
    if gates is None:
        return whole_network(model, made, images, task)
    canonizer = GateCanonizer(gates[0], tasks=gates[1])
    relevance: Tensor = SubArchitectureAttributor(model, canonizer, made)(images, task)[1]
    return relevance


def explain_func(
    model: nn.Module,
    inputs: Array | Tensor,
    targets: Array | Tensor | Sequence[int] | int,
    *,
    gates: Given | None,
    attribution: str | Attribution = "gradient",
    device: str | torch.device | None = None,
    method: str | None = None,
    **options: Any,
) -> Array:
    """Explain images through the sub-architectures of their classes: Quantus's ``explain_func``.

    The same as ``SubArchitectureExplainer(gates, attribution, **options)(model, inputs, targets)``,
    with everything in ``explain_func_kwargs``.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        inputs: Images (B, C, H, W).
        targets: Classes (B,).
        gates: As :class:`SubArchitectureExplainer` takes them.
        attribution: As there.
        device: Where to run; None: where the network is.
        method: Not used; ``quantus.evaluate`` passes it.
        **options: As there: ``classes``, ``soft``, ``size``, ``sum_channels``, ``seed``, ``run``,
            and the attribution's own.

    Returns:
        The heat-maps, (B, 1, H, W) or, without ``sum_channels``, (B, C, H, W), float32.

    Raises:
        KeyError, TypeError, ValueError: As :class:`SubArchitectureExplainer`.

    Example:
        >>> from nad_attr import GateSite
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 2)).eval()
        >>> arch = SubArchitecture.from_kept({"1": [0]}, [GateSite("1", 2, 1)])
        >>> explain_func(net, np.ones((2, 1, 4, 4), np.float32), [0, 1], gates=arch).shape
        (2, 1, 4, 4)
    """
    explainer = SubArchitectureExplainer(gates, attribution, **options)
    return explainer(model, inputs, targets, device=device, method=method)
