"""The method with Captum's interface: task gates times activations, as a layer attribution."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from captum.attr import LayerAttribution
from captum.log import log_usage
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from nad_attr.data.labels import Labels, first_tasks
from nad_attr.data.sources import Data, TensorSource, as_source, loading, numbers_of
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import check_eval, expand, multiply, recorded
from nad_attr.learning.api import learn_gates
from nad_attr.running.options import FROM_RUN, RunOptions, as_options
from nad_attr.sites.finding import as_tuple, asked_layers, find_gate_sites, fixed_batch_size
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.site import GateSite, SiteError, unwrap

__all__ = ["NADAttribution"]

#: A layer: a module, as in Captum, or a site's name, or a site with its channel axis.
Layer: TypeAlias = "nn.Module | str | GateSite"
Target: TypeAlias = "int | Sequence[int] | Tensor"

#: Versions of an image that its path is learned from, and their noise as a share of its range.
_N_COPIES = 32
_NOISE = 0.1
#: Start of learn_gates' warning that there are no other images.
_ONE_CLASS = r"task \d+ has own images only"


class NADAttribution(LayerAttribution):  # type: ignore[misc]
    """Attribute a network's output to the channels that its class needs, as a Captum method.

    A channel's attribution is its activation times the gate of the target class, a number in
    [0, 1] that is above one half for the channels of the class's sub-architecture. Without
    :meth:`learn`, :meth:`attribute` learns the gates of the targets from the images it explains;
    after it, attributing is a look-up and one forward pass.

    It works where Captum's layer methods do: under ``NoiseTunnel`` (with one layer; call
    :meth:`learn` first, or gates are learned from the noisy images of each draw), in ``TCAV``, and
    with ``interpolate``, which resizes an attribution to the image.

    Args:
        forward_func: The network, in eval mode, with output (N, K), one column per class; or, if
            ``layer`` is given as modules, any function of the inputs that calls it. DataParallel
            and ``torch.compile`` wrappers are removed: the network inside runs, on its own device.
        layer: The gated layer: a module, a site's name or a :class:`~nad_attr.GateSite`
            (then ``attribute`` returns a tensor), or a list of these (then it returns a list, in
            the same order, as in Captum). None: all gate sites that the data flow shows (a list,
            in forward order).
        device_ids: As in Captum. A function that spreads its batch over several devices is
            refused; the DataParallel network itself is not.
        recipe: How gates are learned; None: the default :class:`~nad_attr.Recipe`.
        scope: "task": one set of gates for each class. "example": one for each image, its
            path through the network; see :meth:`attribute`.
        multiply_by_inputs: True: gate times activation. False: the bare gate, expanded to the
            layer's size.
        channel_dim: Channel axis of the layers (1 for convolutions, -1 for tokens), or
            ``{name: axis}``, where the data flow does not show it.
        seed: Seed of learning.
        gates: Task gates learned before, in place of :meth:`learn`.
        n_copies: Versions of an image that its path is learned from; ``scope="example"`` only.
        run: How the network is run for learning; see :class:`nad_attr.RunOptions`, whose fields
            ``device``, ``amp``, ``batch_size`` and ``show_progress`` may be given by themselves.
            Attributing is one pass on the network's device in its precision, as in Captum.

    Attributes:
        task_gates: The gates that :meth:`learn` learned or that were given; None before.

    Raises:
        TypeError: If ``forward_func`` or ``layer`` has a wrong type, or is scripted or traced.
        ValueError: If options are unknown or do not go together.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
        >>> generator = torch.Generator().manual_seed(0)
        >>> images = torch.randn(8, 1, 4, 4, generator=generator)
        >>> labels = torch.tensor([0, 1] * 4)
        >>> nad = NADAttribution(net.eval(), net[1], recipe=Recipe(steps=5))
        >>> nad.attribute(images, target=labels).shape  # learns from these images
        torch.Size([8, 4, 2, 2])
        >>> attributions = nad.learn((images, labels)).attribute(images, target=1)  # looks up
        >>> nad.gates(1)["1"].shape
        torch.Size([4])
        >>> nad.sub_architecture(1).n_channels
        4
        >>> nad.interpolate(attributions, (4, 4)).shape
        torch.Size([8, 4, 4, 4])

    Source:
        Hu et al., Architecture Disentanglement for Deep Neural Networks, ICCV 2021
        (arXiv:2003.13268). The interface is Captum's. The idea of a path for each image: Wang et
        al., Interpret Neural Networks by Identifying Critical Data Routing Paths, CVPR 2018;
        here it is learned by the recipe.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: Layer | Sequence[Layer] | None = None,
        device_ids: list[int] | None = None,
        *,
        recipe: Recipe | None = None,
        scope: Literal["task", "example"] = "task",
        multiply_by_inputs: bool = True,
        channel_dim: int | Mapping[str, int] | None = None,
        seed: int = 0,
        gates: TaskGates | None = None,
        n_copies: int = _N_COPIES,
        run: RunOptions | None = None,
        device: str | torch.device | None = FROM_RUN,
        amp: bool | torch.dtype | None = FROM_RUN,
        batch_size: int | Literal["auto"] | None = FROM_RUN,
        show_progress: bool = FROM_RUN,
    ) -> None:
        if scope not in ("task", "example"):
            raise ValueError(f"scope must be 'task' or 'example', got {scope!r}.")
        if gates is not None and not isinstance(gates, TaskGates):
            raise TypeError(
                "gates must be TaskGates (from learn_gates or TaskGates.load), got "
                f"{type(gates).__name__}."
            )
        if gates is not None and scope == "example":
            raise ValueError(
                "scope='example' learns the gates of each image from that image; leave out "
                "gates=, or use scope='task'."
            )
        if n_copies < 2:
            raise ValueError(f"n_copies must be at least 2, got {n_copies}.")
        _check_forward_func(forward_func, layer, device_ids)
        super().__init__(forward_func, layer, device_ids)
        self.run = _checked(
            as_options(
                run, device=device, amp=amp, batch_size=batch_size, show_progress=show_progress
            )
        )
        self.recipe = recipe
        self.scope = scope
        self.channel_dim = channel_dim
        self.seed = seed
        self.n_copies = n_copies
        self.task_gates = gates
        self._multiply_by_inputs = multiply_by_inputs
        # Gates that the latest attribute() learned: for all classes, or for each image.
        self._latest: TaskGates | list[TaskGates] | None = None
        # The key of the sites, the sites in forward order, and in the order of ``layer``.
        self._found: tuple[object, tuple[GateSite, ...], tuple[GateSite, ...]] | None = None

    # -- learning ------------------------------------------------------------------------------

    def learn(
        self,
        data: Data,
        tasks: Sequence[object] | Mapping[str, object] | None = None,
        recipe: Recipe | None = None,
        *,
        attribute_to_layer_input: bool = False,
        additional_forward_args: Any = None,
        run: RunOptions | None = None,
        **options: Any,
    ) -> NADAttribution:
        """Learn the gates once and keep them in ``task_gates``.

        Args:
            data: Images with labels, as :func:`~nad_attr.learn_gates` takes them.
            tasks: Class indices, groups of them, or named groups; None: all that the labels name.
            recipe: In place of the constructor's, for this call.
            attribute_to_layer_input: Put the gates on the inputs of the layers.
            additional_forward_args: Arguments of every call, the same for all images; an
                argument with a value for each image is one more of the data's inputs.
            run: In place of the constructor's, for this call.
            **options: Further arguments of :func:`~nad_attr.learn_gates` (``seed``, ``device``,
                ``batch_size``, ...).

        Returns:
            This object.

        Raises:
            SiteError, TypeError, ValueError: As ``learn_gates``; also if ``scope`` is
                "example". The network's own errors are raised unchanged.
        """
        if self.scope == "example":
            raise ValueError(
                "scope='example' learns the gates of each image in attribute(); use scope='task' "
                "to learn them beforehand."
            )
        run = _checked(self.run if run is None else as_options(run))
        if additional_forward_args is not None:
            run = replace(run, additional_forward_args=additional_forward_args)
        _check_forward_func(self.forward_func, self.layer, self.device_ids)
        example: tuple[Tensor, ...] = ()
        look = self.channel_dim is not None or attribute_to_layer_input
        if look or not isinstance(self.forward_func, nn.Module):
            example, data = _first_images(data)
        root, layers = self._root(example)
        check_eval(root)
        sites: Sequence[Layer] | None = layers  # learn_gates finds or checks them
        if look:
            place = next(root.parameters(), None)
            if place is not None:
                example = tuple(item.to(place.device) for item in example)
            sites = self._find(root, layers, example, run.arguments, attribute_to_layer_input)
        if not isinstance(self.forward_func, nn.Module):
            # Refuses another device: the network behind a function cannot be copied to one.
            run = replace(run, forward_func=root)
        options.setdefault("seed", self.seed)
        with _own_errors():
            self.task_gates = learn_gates(
                root, data, tasks, recipe or self.recipe, sites, run=run, **options
            )
        self._keep_found(root, layers, self.task_gates.sites, attribute_to_layer_input)
        self._latest = None
        return self

    def _learn_from(
        self,
        root: nn.Module,
        sites: Sequence[GateSite],
        own: Sequence[int],
        one_output: bool,
        inputs: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        targets: Sequence[int],
    ) -> TaskGates:
        """Learn the gates of the targets that occur, from exactly these images.

        ``own`` are the positions of the extra arguments that have a value for each image.
        """
        # A tensor made in inference mode cannot take part in learning.
        with torch.inference_mode(False):
            tensors, forward = _bind(root, inputs, extra, own)
            labels = torch.tensor(targets, device="cpu")
            # With one output, each image is an own image.
            given = Labels(torch.ones_like(labels)[:, None], kind="several")
            return learn_gates(
                root,
                (tensors, given if one_output else labels),
                sorted(set(targets)),
                self.recipe,
                list(sites),
                seed=self.seed,
                run=replace(self.run, forward_func=forward, additional_forward_args=None),
            )

    def _learn_paths(
        self,
        learn: Callable[..., TaskGates],
        own: Sequence[int],
        inputs: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        targets: Sequence[int],
    ) -> list[TaskGates]:
        """Learn the gates of each image from versions of that image alone."""
        paths = []
        n = self.n_copies
        for i, target in enumerate(targets):
            copies = _copies(tuple(item[i : i + 1].detach() for item in inputs), n, self.seed)
            args = list(extra)
            for k in own:
                args[k] = extra[k][i : i + 1].expand(n, *extra[k].shape[1:])
            with warnings.catch_warnings():
                # Here there are only own images.
                warnings.filterwarnings("ignore", message=_ONE_CLASS)
                paths.append(learn(copies, tuple(args), [target] * n))
        return paths

    # -- attributing ---------------------------------------------------------------------------

    @log_usage(part_of_slo=True)  # type: ignore[untyped-decorator]
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target | None = None,
        additional_forward_args: object = None,
        attribute_to_layer_input: bool = False,
    ) -> Tensor | list[Tensor]:
        """Attribute the target outputs to the channels of the layers.

        With ``scope="task"`` and no gates learned before, the gates of the targets that occur
        are learned from these images, each an own image of its target and an other image of the
        other targets. They depend on network, images, targets, recipe and seed alone, and the next
        call learns again. A single image or target gives little to learn from (a warning says
        so): learn from more images with :meth:`learn`.

        With ``scope="example"``, each image is a task: its gates are learned for its target output
        from ``n_copies`` versions of it. Half of them have Gaussian noise of 10 % of its range
        (one has none), half are scaled by factors evenly spread from 0 to 1. Inputs that are not
        floating-point numbers stay as they are. An image's result depends on nothing else in the
        batch. Each image takes one run of learning: choose a short recipe.

        Args:
            inputs: Images, dim 0 = examples; a tuple for a network of several inputs.
            target: Class index for all images (int or tensor of one element), or one for each
                image (list of int, or tensor (N,)). None: the only output of a network that has
                one, (N,) or (N, 1).
            additional_forward_args: Passed to ``forward_func`` after the inputs. Tensors with
                N on dim 0 belong to the images one by one.
            attribute_to_layer_input: Gate the inputs of the layers in place of their outputs.

        Returns:
            Gate times activation, of the layer's output size, dtype and device; one tensor for
            one layer, otherwise a list with one tensor for each of ``sites``: in the order of
            ``layer``, or in forward order where no layers were named.

        Raises:
            AssertionError: If the target is None where there are several outputs, is a tuple, or
                is no class index of the output.
            KeyError: If gates were learned before, but not for this target.
            SiteError: If a layer cannot be gated.
            TypeError: If inputs or outputs are not tensors.
            ValueError: If the network is in train mode, or the images differ in number.
        """
        _check_forward_func(self.forward_func, self.layer, self.device_ids)
        images, extra = _check_inputs(inputs), as_tuple(additional_forward_args)
        n = len(images[0])
        targets = [0] * n if target is None else _read_target(target, n)
        if isinstance(self.forward_func, nn.DataParallel) and self.forward_func.device_ids:
            # DataParallel moves its inputs to its own device.
            home = self.forward_func.src_device_obj
            images = tuple(item.to(home) for item in images)
            extra = tuple(arg.to(home) if isinstance(arg, Tensor) else arg for arg in extra)
        root, layers = self._root(images)
        check_eval(root)
        if self.layer is None and self.task_gates is not None:
            sites = self.task_gates.sites
        else:
            sites = self._find(root, layers, images, extra, attribute_to_layer_input)
        own = [i for i, x in enumerate(extra) if isinstance(x, Tensor) and x.shape[:1] == (n,)]
        with torch.no_grad(), unchanged(root):
            outputs, activations = _run(root, sites, *_bind(root, images, extra, own))
        if isinstance(outputs, Tensor) and tuple(outputs.shape) == (n,):
            outputs = outputs[:, None]
        if target is None and isinstance(outputs, Tensor) and outputs.shape[1:] != (1,):
            raise AssertionError(
                "target is None; say which output is explained, as in target=7 (a network with one "
                "output for each image, (N,) or (N, 1), needs no target)."
            )
        _check_outputs(outputs, targets)
        learn = partial(self._learn_from, root, sites, own, outputs.shape[1] == 1)
        if self.task_gates is not None:
            at_input = attribute_to_layer_input if self.layer is None else None
            _check_learned(self.task_gates, sites, targets, at_input)
            gates = _rows(self.task_gates, sites, targets)
        elif self.scope == "task":
            self._latest = learn(images, extra, targets)
            gates = _rows(self._latest, sites, targets)
        else:
            self._latest = self._learn_paths(learn, own, images, extra, targets)
            gates = {s.name: torch.cat([path[s.name] for path in self._latest]) for s in sites}

        attributions = []
        with torch.no_grad():
            for site in self.sites:
                activation = activations[site.name]
                gate = gates[site.name].to(activation.device)
                if self._multiply_by_inputs:
                    attributions.append(multiply(site, activation, gate, None))
                else:
                    full = expand(gate, site, activation).expand_as(activation)
                    attributions.append(full.to(activation.dtype, copy=True).contiguous())
        one = isinstance(self.layer, (nn.Module, str, GateSite))
        return attributions[0] if one else attributions

    # -- results -------------------------------------------------------------------------------

    @property
    def sites(self) -> tuple[GateSite, ...]:
        """The gate sites of the latest call, in the order of its results; empty before the first.

        The order is that of ``layer``, or forward order where no layers were named.
        """
        if self.layer is None and self.task_gates is not None:
            return self.task_gates.sites
        return () if self._found is None else self._found[2]

    def gates(self, target: object) -> dict[str, Tensor]:
        """The gates behind the attributions: ``{site name: float32 (C,)}``.

        Args:
            target: A learned task (class index, group of them, or its name); with
                ``scope="example"`` the position of the image in the latest batch.

        Raises:
            KeyError: If no gates were learned for it.
            RuntimeError: If nothing has been learned yet.
        """
        of_task, task = self._gates_behind(target)
        return of_task.gates_of(task)

    def sub_architecture(self, target: object, size: float | None = None) -> SubArchitecture:
        """The channels that a target keeps.

        Args:
            target: As for :meth:`gates`.
            size: As for :meth:`TaskGates.sub_architecture <nad_attr.TaskGates.sub_architecture>`.

        Raises:
            KeyError: If no gates were learned for it.
            RuntimeError: If nothing has been learned yet.
            ValueError: If ``size`` is not in (0, 1].
        """
        of_task, task = self._gates_behind(target)
        return of_task.sub_architecture(task, size)

    def _gates_behind(self, target: object) -> tuple[TaskGates, object]:
        latest = self._latest if self.task_gates is None else self.task_gates
        if latest is None:
            raise RuntimeError("no gates yet; call learn(data), or attribute(images, target).")
        if isinstance(latest, TaskGates):
            return latest, target
        try:
            number = operator.index(target)  # type: ignore[arg-type]
            path = latest[number]
        except (TypeError, IndexError):
            raise KeyError(
                f"no gates for image {target!r}; the latest batch had images 0 to "
                f"{len(latest) - 1} (scope='example')."
            ) from None
        return path, path.tasks[0]

    # -- what Captum asks of a method ------------------------------------------------------------

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether attributions are gate times activation, not the bare gate."""
        return self._multiply_by_inputs

    def has_convergence_delta(self) -> bool:
        """False: gated activations need not sum to the output."""
        return False

    def __repr__(self) -> str:
        network = type(self.forward_func).__name__
        if not isinstance(self.forward_func, nn.Module):
            network = getattr(self.forward_func, "__name__", network)
        learned = "no gates yet" if self.task_gates is None else repr(self.task_gates)
        return f"NADAttribution({network}, {learned}, scope={self.scope!r})"

    @classmethod
    def get_name(cls) -> str:
        """The method's name in plots and tables."""
        return "NAD"

    # -- sites -----------------------------------------------------------------------------------

    def _root(self, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, list[Layer] | None]:
        """The module that is run and hooked, and the layers as it knows them."""
        layers = _as_layers(self.layer)
        if isinstance(self.forward_func, nn.Module):
            return unwrap(self.forward_func), layers
        function = _Function(self.forward_func, layers or [], inputs)
        return function, [f"layer{i}" for i in range(len(layers or []))]

    def _key(self, at_input: bool) -> object:
        """Everything that the sites depend on; TCAV changes ``layer`` between calls."""
        # Modules and functions equal only themselves, and the key keeps them alive.
        layers = _as_layers(self.layer)
        return self.forward_func, layers and tuple(layers), self.channel_dim, at_input

    def _find(
        self,
        root: nn.Module,
        layers: list[Layer] | None,
        inputs: tuple[Tensor, ...],
        extra: tuple[Any, ...],
        at_input: bool,
    ) -> tuple[GateSite, ...]:
        """The sites in forward order; they are searched for again only with another key."""
        key = self._key(at_input)
        if self._found is None or self._found[0] != key:
            with _own_errors():
                sites = find_gate_sites(
                    root,
                    inputs,
                    layers=layers,
                    channel_dim=self.channel_dim,
                    at_input=at_input,
                    additional_forward_args=extra or None,
                )
            self._keep_found(root, layers, sites, at_input)
        assert self._found is not None
        return self._found[1]

    def _keep_found(
        self, root: nn.Module, layers: list[Layer] | None, sites: Sequence[GateSite], at_input: bool
    ) -> None:
        forward = asked = tuple(sites)
        if layers is not None:
            by_name = {site.name: site for site in sites}
            asked = tuple(by_name[layer.name] for layer in asked_layers(root, layers, at_input))
        self._found = self._key(at_input), forward, asked


class _Function(nn.Module):
    """A function and the layers it calls, as a module for sites, hooks and learning.

    The layers are not changed; their names are ``layer0``, ``layer1``, ... in the given order.
    """

    place: Tensor | None

    def __init__(
        self, function: Callable[..., Any], layers: Sequence[Layer], inputs: tuple[Tensor, ...]
    ) -> None:
        super().__init__()
        self.function = function
        for i, layer in enumerate(layers):
            assert isinstance(layer, nn.Module)
            self.add_module(f"layer{i}", layer)
        floating = [item for item in inputs if item.is_floating_point()]
        if floating and next(self.parameters(), None) is None:
            # Without parameters, device and dtype are those of the images.
            with torch.inference_mode(False):
                nothing = torch.empty(0, dtype=floating[0].dtype, device=floating[0].device)
            self.register_parameter("place", nn.Parameter(nothing, requires_grad=False))
        # Not eval(), which would change the layers.
        self.training = False

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


@contextmanager
def _own_errors() -> Iterator[None]:
    """Raise the network's own errors unchanged, as Captum's methods do."""
    try:
        yield
    except SiteError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from error


def _checked(run: RunOptions) -> RunOptions:
    if run.forward_func is not None:
        raise TypeError(
            "forward_func is the first argument of NADAttribution; leave it out of run=."
        )
    return run


def _check_forward_func(forward_func: object, layer: object, device_ids: object) -> None:
    if isinstance(forward_func, (torch.jit.ScriptModule, torch.jit.ScriptFunction)):
        raise TypeError(
            "forward_func is scripted or traced by torch.jit, where hooks do not work; pass the "
            "original nn.Module."
        )
    if not callable(forward_func):
        raise TypeError(
            f"forward_func must be a network or a function, got {type(forward_func).__name__}."
        )
    layers = _as_layers(layer)  # type: ignore[arg-type]
    for item in layers or []:
        if isinstance(item, torch.jit.ScriptModule):
            raise TypeError(
                "layer is scripted or traced by torch.jit, where hooks do not work; script "
                "nothing before attributing."
            )
    if isinstance(forward_func, nn.Module):
        return
    if layers is None:
        raise TypeError(
            "forward_func is a function, which does not show its layers; pass the network itself, "
            "or name the layers with layer=[model.layer3, ...]."
        )
    if not all(isinstance(item, nn.Module) for item in layers):
        raise TypeError(
            "forward_func is a function, which knows no layers by name; pass them as modules, "
            "layer=model.layer3."
        )
    if isinstance(device_ids, Sequence) and len(device_ids) > 1:
        raise ValueError(
            f"device_ids={list(device_ids)}: a function that spreads its batch over several "
            "devices calls each layer once on each of them; pass the DataParallel network itself."
        )


def _as_layers(layer: Layer | Sequence[Layer] | None) -> list[Layer] | None:
    if layer is None:
        return None
    if isinstance(layer, (nn.Module, str, GateSite)):
        return [layer]
    if not isinstance(layer, Sequence) or not all(
        isinstance(item, (nn.Module, str, GateSite)) for item in layer
    ):
        raise TypeError(
            "layer must be a module, a site's name, a GateSite or a list of these, "
            f"got {layer!r:.80}."
        )
    if not layer:
        raise ValueError("layer is an empty list; leave it out to take all gate sites.")
    return list(layer)


def _check_inputs(inputs: object) -> tuple[Tensor, ...]:
    images = as_tuple(inputs)
    if not images or not all(isinstance(item, Tensor) for item in images):
        kinds = ", ".join(type(item).__name__ for item in images) or "nothing"
        raise TypeError(f"inputs must be a tensor or a tuple of tensors, got {kinds}.")
    if any(item.ndim == 0 or len(item) != len(images[0]) for item in images):
        raise ValueError(
            "all inputs need the same number of images on dim 0, got shapes "
            f"{[tuple(item.shape) for item in images]}."
        )
    if len(images[0]) == 0:
        raise ValueError("inputs hold no images.")
    return images


def _read_target(target: object, n: int) -> list[int]:
    """One class index for each of n images."""
    if isinstance(target, tuple) or (
        isinstance(target, list) and any(isinstance(item, tuple) for item in target)
    ):
        raise AssertionError(
            f"target={target!r:.60} picks from an output of more than two axes; let forward_func "
            "return (N, classes), for example lambda x: model(x)[:, :, 0], and give the class "
            "index."
        )
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise AssertionError(f"target must hold class indices, got {target.dtype}.")
        if target.numel() == 1:
            return [int(target)] * n
        if target.ndim != 1 or len(target) != n:
            raise AssertionError(
                f"target has shape {tuple(target.shape)} for {n} images; give one class index, "
                "or a tensor (N,) with one for each image."
            )
        return [int(index) for index in target.tolist()]
    if isinstance(target, list):
        if len(target) != n:
            raise AssertionError(f"target lists {len(target)} class indices for {n} images.")
        return [_index(item) for item in target]
    return [_index(target)] * n


def _index(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise AssertionError(
            f"target must be a class index, a list of them or a tensor of them; {value!r:.60} is "
            f"{type(value).__name__}."
        )
    return operator.index(value)


def _check_outputs(outputs: object, targets: Sequence[int]) -> None:
    if not isinstance(outputs, Tensor):
        raise TypeError(
            f"forward_func returned a {type(outputs).__name__}; let it return the tensor (N, "
            "classes) that is explained, for example lambda x: model(x).logits (then name the "
            "layers with layer=)."
        )
    if outputs.ndim != 2 or len(outputs) != len(targets):
        raise AssertionError(
            f"forward_func returned shape {tuple(outputs.shape)} for {len(targets)} images; a "
            "target needs an output of shape (N, classes)."
        )
    wrong = [index for index in targets if not 0 <= index < outputs.shape[1]]
    if wrong:
        raise AssertionError(
            f"target must be one of the network's {outputs.shape[1]} outputs, 0 to "
            f"{outputs.shape[1] - 1}, got {wrong[0]}."
        )


def _check_learned(
    gates: TaskGates, sites: Sequence[GateSite], targets: Sequence[int], at_input: bool | None
) -> None:
    """Refuse sites and targets that the gates do not cover; ``at_input`` None: see the sites."""
    learned = {site.name: site for site in gates.sites}
    for site in sites:
        if site.name not in learned:
            raise ValueError(
                f"no gates were learned at {site.name!r}, only at {', '.join(learned)}; call "
                "learn() with this layer."
            )
        known = learned[site.name]
        # The gates of heads and neurons are always at an input.
        says = site.at_input if at_input is None or known.units != "channels" else at_input
        if known.at_input != says:
            raise ValueError(
                f"the gates at {site.name!r} were learned for the layer's "
                f"{'input' if known.at_input else 'output'}; call attribute() and learn() with "
                "the same attribute_to_layer_input."
            )
        if known.n_channels != site.n_channels:
            raise ValueError(
                f"the gates at {site.name!r} are for {known.n_channels} channels, the layer has "
                f"{site.n_channels}; they were learned on another network."
            )
    missing = sorted(set(targets) - set(gates.tasks))
    if missing:
        raise KeyError(
            f"no gates for target {missing[0]}; learned tasks are {first_tasks(gates.tasks)}. "
            "Name it among the tasks of learn()."
        )


def _rows(gates: TaskGates, sites: Sequence[GateSite], targets: Sequence[int]) -> dict[str, Tensor]:
    """``{site name: (C,) for all images, or (N, C)}``, of these rows only."""
    one = len(set(targets)) == 1
    found, _, _ = gates._gating(targets[0] if one else list(targets))
    return {site.name: found[site.name] for site in sites}


def _run(
    root: nn.Module,
    sites: Sequence[GateSite],
    inputs: tuple[Tensor, ...],
    forward: Callable[..., Any] | None,
) -> tuple[Any, dict[str, Tensor]]:
    """The outputs for images, and the tensors at the sites."""
    function = root if forward is None else forward
    with recorded(root, sites) as activations:
        try:
            return function(*inputs), activations
        except (RuntimeError, ValueError) as error:
            size = fixed_batch_size(root, inputs, forward_func=forward, error=str(error))
            # BatchNorm's message does not mention images.
            if size is None and isinstance(error, ValueError) and inputs[0].ndim == 3:
                raise ValueError(
                    f"the network takes no inputs of shape {tuple(inputs[0].shape)} ({error}); "
                    "a single image needs a batch dimension: image[None]."
                ) from error
            if size is None:
                raise
        found: list[dict[str, Tensor]] = []
        outputs = []
        for start in range(0, len(inputs[0]), size):
            part = tuple(x[start : start + size] for x in inputs)
            n = len(part[0])
            out = function(*(torch.cat([x, x[-1:].expand(size - n, *x.shape[1:])]) for x in part))
            if not isinstance(out, Tensor):
                return out, activations  # refused by _check_outputs
            outputs.append(out[:n])
            found.append({name: tensor[:n] for name, tensor in activations.items()})
        return torch.cat(outputs), {k: torch.cat([one[k] for one in found]) for k in activations}


def _bind(
    root: nn.Module, inputs: tuple[Tensor, ...], extra: tuple[Any, ...], own: Sequence[int]
) -> tuple[tuple[Tensor, ...], Callable[..., Any] | None]:
    """The inputs with a value for each image, and a function of them (None: the network)."""
    if not extra:
        return inputs, None
    fixed = [
        arg.detach().clone() if isinstance(arg, Tensor) and i not in own else arg
        for i, arg in enumerate(extra)
    ]

    def forward(*tensors: Tensor) -> Any:
        args = list(fixed)
        for i, tensor in zip(own, tensors[len(inputs) :], strict=True):
            args[i] = tensor
        return root(*tensors[: len(inputs)], *args)

    return (*inputs, *(extra[i] for i in own)), forward


def _copies(image: tuple[Tensor, ...], n: int, seed: int) -> tuple[Tensor, ...]:
    """``n`` versions of one image: (1, ...) to (n, ...) for each input."""
    if not any(item.is_floating_point() for item in image):
        raise ValueError(
            "scope='example' varies the image itself, but no input is a floating-point tensor; "
            "use scope='task', or attribute from the embedding on."
        )
    n_scaled = n // 2
    scale = torch.ones(n, dtype=torch.float64, device="cpu")
    factors = torch.arange(n_scaled, dtype=torch.float64, device="cpu") + 0.5
    scale[n - n_scaled :] = factors / n_scaled
    generator = torch.Generator().manual_seed(seed)
    copies = []
    for item in image:
        shape = [n] + [1] * (item.ndim - 1)
        if not item.is_floating_point():
            copies.append(item.expand(n, *item.shape[1:]))
            continue
        noise = torch.randn((n, *item.shape[1:]), generator=generator, device="cpu")
        noise[0] = 0
        noise[n - n_scaled :] = 0
        spread = _NOISE * (item.max() - item.min())
        copies.append(scale.reshape(shape).to(item) * item + spread * noise.to(item))
    return tuple(copies)


def _first_images(data: Data) -> tuple[tuple[Tensor, ...], Data]:
    """One or two images, to find the sites with, and the data to learn from."""
    dataset = data.dataset if isinstance(data, DataLoader) else data
    if (
        isinstance(dataset, Dataset)
        and not isinstance(dataset, (IterableDataset, TensorDataset))
        and hasattr(dataset, "__len__")
    ):
        numbers = None
        if isinstance(data, DataLoader) and data.batch_sampler is not None:
            numbers = numbers_of(data)
        few: Any = Subset(dataset, (range(len(dataset)) if numbers is None else numbers)[:2])
        if isinstance(data, DataLoader):
            few = DataLoader(few, **loading(data))
        source = as_source(few, any_labels=True)
    else:
        source = as_source(data, any_labels=True)
        if isinstance(source, TensorSource):
            # The data may be readable only once, and it has been read now.
            data = source
    draws = [(number, 0) for number in range(min(2, len(source.labels)))]
    return next(iter(source.batches([draws]))), data
