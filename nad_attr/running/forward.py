"""Run images through a network: where, in what batches, and with what checks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.data.labels import Task, for_one_output
from nad_attr.data.sources import Inputs, Source, check_finite
from nad_attr.gating.hooks import check_eval
from nad_attr.sites.calling import Fields, call_with
from nad_attr.sites.preserving import Copies, Kept
from nad_attr.sites.site import unwrap
from nad_attr.sites.tracing import eager
from nad_attr.system.rng import seed_of

__all__ = [
    "Runner",
    "amp_dtype",
    "check_batch_size",
    "check_classes",
    "chunks",
    "cumulative",
    "sent",
]


def check_batch_size(batch_size: object, auto: bool = False) -> None:
    """Refuse what is no whole number from 1 on.

    Args:
        batch_size: As given by the user.
        auto: "auto" would have been taken as well.

    Raises:
        ValueError: Names it.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        or_auto = " or 'auto'" if auto else ""
        raise ValueError(
            f"batch_size must be a whole number from 1 on{or_auto}, not {batch_size!r}."
        )


def amp_dtype(amp: bool | torch.dtype | None) -> torch.dtype | None:
    """The dtype that autocast computes in: True is bfloat16, None and False are none.

    Raises:
        ValueError: If it is something else.
    """
    if amp is None or amp is False:
        return None
    if amp is True:
        return torch.bfloat16
    if amp in (torch.bfloat16, torch.float16):
        return amp
    raise ValueError(f"amp must be True, torch.bfloat16 or torch.float16, not {amp!r}.")


def chunks(n: int, size: int) -> Iterator[range]:
    """0 to n - 1, cut into ranges of at most ``size``.

    Example:
        >>> list(chunks(5, 2))
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    for start in range(0, n, size):
        yield range(start, min(n, start + size))


def check_classes(labels: Tensor, tasks: Sequence[Task], n_classes: int) -> None:
    """Refuse labels and tasks that the network has no output for.

    Raises:
        ValueError: Names the highest one.
    """
    named = [m for task in tasks for m in (task if isinstance(task, tuple) else (task,))]
    if labels.ndim == 2 and labels.shape[1] != n_classes:
        given = "one label" if labels.shape[1] == 1 else f"{labels.shape[1]} labels or targets"
        raise ValueError(
            f"each image has {given}, but the network has {n_classes} outputs: give one for each "
            "output, or a forward_func that picks the outputs. For class indices that are "
            "floating-point numbers give labels.long()."
        )
    highest_label = -1 if labels.ndim == 2 else int(labels.max())
    for what, highest in (("label", highest_label), ("task", max(named))):
        if highest >= n_classes:
            if n_classes == 1:
                raise ValueError(
                    f"there is a {what} {highest}, but the network has one output, whose task is "
                    "0: its own images are those with label 1, the others have 0."
                )
            raise ValueError(
                f"there is a {what} {highest}, but the network has {n_classes} outputs "
                f"(classes 0 to {n_classes - 1})."
            )


def as_device(device: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: If there is no such kind of device.
    """
    try:
        return torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        raise ValueError(f"device must be 'cpu', 'cuda' or the like, not {device!r}.") from None


def copied_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the network on another device.

    Raises:
        ValueError: If that device is not there.
    """
    try:
        return copy.deepcopy(model).to(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(f"the network cannot be copied to device {device}: {error}") from error


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; the way to a GPU is not waited for.

    Without that, each batch would have the host wait until all that the GPU has queued is done.
    """
    return tensor.to(device, non_blocking=device.type == "cuda")


def cumulative(values: Tensor) -> Tensor:
    """``values.cumsum(-1)``, also where deterministic algorithms are asked for.

    On a GPU torch has none for floating-point numbers. Source: Hillis and Steele 1986.

    Example:
        >>> cumulative(torch.tensor([1.0, 2.0, 3.0]))
        tensor([1., 3., 6.])
    """
    if not torch.are_deterministic_algorithms_enabled():
        return values.cumsum(-1)
    step = 1
    while step < values.shape[-1]:
        moved = values[..., step:] + values[..., :-step]
        values, step = torch.cat([values[..., :step], moved], dim=-1), 2 * step
    return values


@contextmanager
def network_errors(inputs: Sequence[Tensor]) -> Iterator[None]:
    """Say which inputs a network was given that cannot be run on them.

    Raises:
        ValueError: In place of the errors that torch raises for wrong shapes and types.
    """
    try:
        yield
    except (GatingError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError) as error:
        kinds = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(
            f"the network cannot be run on inputs of shape {kinds}: {type(error).__name__}: {error}"
        ) from error


def _what(outputs: object) -> str:
    """What a network returned in place of outputs, and what to do."""
    if isinstance(outputs, Tensor):
        if outputs.is_complex():
            return f"complex numbers ({outputs.dtype}); give a forward_func that returns real ones."
        return (
            f"{outputs.dtype} numbers of shape {tuple(outputs.shape)}, such as class indices from "
            "argmax, which have no gradient; give a forward_func that returns the scores before."
        )
    if isinstance(outputs, (list, tuple)) and outputs and isinstance(outputs[0], dict):
        keys = ", ".join(map(str, outputs[0]))
        return (
            f"a list of dictionaries ({keys}), as detection models do: boxes, which are no outputs "
            "of an image. Give a forward_func that returns one score for each image and class, "
            "(images, classes), such as the highest score of each label."
        )
    return (
        f"{type(outputs).__name__}, not a tensor of outputs; give a forward_func that picks it, "
        "such as lambda x: model(x).logits."
    )


class Runner:
    """A network in eval mode with the device it runs on and the way it is called.

    Each pass leaves the network's modules as it found them (:mod:`nad_attr.sites.preserving`), so
    what a pass gives depends on no pass before it. Where gradients are wanted, the buffers that a
    pass changes are put back by the next pass, and by the ``frozen`` around all of them.

    Args:
        model: The network. Wrappers that spread a batch over devices are looked through: one gate
            vector per image cannot be spread.
        device: Where to run. None: where the network is. Elsewhere, a copy of it is used.
        forward_func: Called with the inputs in place of the network; has to run the network.
        additional_forward_args: Further arguments of every call, the same for all images.

    Attributes:
        model: The network to put hooks on.
        device: Where the inputs are sent.
        fields: The names of the inputs, if they have any; set by :meth:`draw`.

    Raises:
        TypeError: If the network is no module or ``forward_func`` no function.
        ValueError: If the network is in train mode, or cannot be run where it should.

    Example:
        >>> runner = Runner(torch.nn.Linear(2, 3).eval())
        >>> runner((torch.ones(4, 2),)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        device: torch.device | str | None = None,
        forward_func: Callable[..., Any] | None = None,
        additional_forward_args: Any = None,
    ) -> None:
        check_eval(model)
        if forward_func is not None and not callable(forward_func):
            raise TypeError(f"forward_func must be a function, not {forward_func!r:.60}.")
        root = unwrap(model)
        tensors = [*root.parameters(), *root.buffers()]
        places = [tensor.device for tensor in tensors]
        if any(tensor.is_meta for tensor in tensors):
            raise ValueError(
                "the network is on the meta device, where weights have shapes and no values: "
                "model.to_empty(device='cpu') and model.load_state_dict(...) give it some."
            )
        frozen_for_good = any(tensor.is_inference() for tensor in tensors)
        if frozen_for_good and forward_func is not None:
            raise ValueError(
                "the network was made in torch.inference_mode, so no gradient passes its weights; "
                "run copy.deepcopy(model), made outside of it, in forward_func."
            )
        here = places[0] if places else torch.device("cpu")
        self.device = here if device is None else as_device(device)
        # "cuda" is wherever on CUDA the network is.
        same = here.type == self.device.type and self.device.index in (None, here.index)
        if same:
            self.device = here
        elif self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device.")
        elif forward_func is not None and places:
            raise ValueError(
                f"forward_func runs the network where it is, not on {device!r}; move the network "
                "there with model.to(...) and leave out device=."
            )
        elif places:
            root = copied_to(root, self.device)
        if same and frozen_for_good:
            with torch.inference_mode(False):
                root = copied_to(root, self.device)
        self.model = root if forward_func is None else model
        self._copies = Copies()
        self._run = root if forward_func is None else forward_func
        self.fields: Fields | None = None
        self._adapted: tuple[object, ...] | None = None
        extra = additional_forward_args
        if extra is None:
            extra = ()
        self._extra = tuple(extra) if isinstance(extra, (tuple, list)) else (extra,)

    @property
    def is_plain(self) -> bool:
        """Whether the network itself is called, with its inputs in order."""
        return self._run is self.model and self.fields is None

    def call(self, *inputs: Any) -> Any:
        """What the network or ``forward_func`` returns for inputs and further arguments."""
        key = self._run, self.fields
        if self._adapted is None or self._adapted[0] != key:
            self._adapted = key, call_with(self._run, self.fields)
        function: Any = self._adapted[1]
        return function(*inputs)

    def fit(self, source: Source) -> None:
        """Read class indices 0 and 1 as the labels of one output, if the network has one.

        Runs one image where the labels leave open whether the network has one output or two.
        """
        if source.labels.ndim == 1 and int(source.labels.max()) <= 1:
            (inputs,) = self.draw(source, [[0]])
            with torch.no_grad():
                n_outputs = self(inputs).shape[1]
            if n_outputs == 1:
                source.labels = for_one_output(source.labels)

    def to_device(self, inputs: Inputs) -> Inputs:
        """The inputs where the network is, without their graph."""
        return tuple(sent(x.detach(), self.device) for x in inputs)

    def run(self, inputs: Inputs) -> Any:
        """Whatever the network returns, for those who look at its sites alone."""
        outputs = None
        kept = Kept(self.model, self._copies)
        try:
            with network_errors(inputs), eager(self.model):
                outputs = self.call(*inputs, *self._extra)
        finally:
            kept.restore(graph=isinstance(outputs, Tensor) and outputs.requires_grad)
        return outputs

    def __call__(self, inputs: Inputs) -> Tensor:
        """The network's outputs (B, K), at least float32: float16 has few values to rank by.

        Raises:
            TypeError: If the network returns no floating-point tensor.
            ValueError: If it returns another shape.
        """
        outputs = self.run(inputs)
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            raise TypeError(f"the network returned {_what(outputs)}")
        if outputs.ndim == 1 and len(outputs) == len(inputs[0]):
            outputs = outputs[:, None]
        if outputs.ndim != 2 or len(outputs) != len(inputs[0]):
            raise ValueError(
                f"the network returned shape {tuple(outputs.shape)} for {len(inputs[0])} images; "
                "expected (images, classes). Give a forward_func that returns that."
            )
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def draw(self, source: Source, numbers: Sequence[Sequence[int]]) -> Iterator[Inputs]:
        """The images of each list of numbers, where the network is.

        A random transform gives the same image in every evaluation.

        Raises:
            ValueError: If an image holds NaN or infinity.
        """
        # One batch at a time: all draws of a large data set would fill the memory.
        draws = ([(i, seed_of("evaluation", i)) for i in chosen] for chosen in numbers)
        for inputs in source.batches(draws):
            self.fields = source.fields
            yield self.to_device(check_finite(inputs))
