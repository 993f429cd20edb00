"""Run images through a network: where, in what batches, and with what checks."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from nad_attr._checks import GatingError
from nad_attr.data.labels import Task, for_one_output
from nad_attr.data.sources import Inputs, Source, check_finite
from nad_attr.gating.hooks import check_eval, filled_batch
from nad_attr.running.options import RunOptions, as_options
from nad_attr.sites.calling import Fields, call_with
from nad_attr.sites.finding import fixed_batch_size
from nad_attr.sites.preserving import Copies, Kept
from nad_attr.sites.site import unwrap
from nad_attr.sites.tracing import eager, mapped
from nad_attr.system.memory import largest_batch
from nad_attr.system.rng import isolated_rng, seed_of
from nad_attr.system.threads import stranger

__all__ = [
    "Filled",
    "Runner",
    "any_batch",
    "check_classes",
    "chunks",
    "cumulative",
    "most_in_batch",
    "sent",
    "what_came",
]

#: Images in a batch at most, where the size is found: more are hardly faster.
MAX_FOUND_BATCH = 512
#: A CPU is slower if a batch's activations do not fit into its caches: with CIFAR's images on a
#: ResNet-20, 200 images at a time take 1.2 times the time of 40 to 64. So a batch has at most this
#: many images, or this many numbers in small images.
MAX_ON_CPU, NUMBERS_ON_CPU = 64, 64 * 3 * 32 * 32


#: The fixed batch sizes of networks that were examined; see :meth:`Runner.find_batch_size`.
_FIXED: weakref.WeakKeyDictionary[nn.Module, int | None] = weakref.WeakKeyDictionary()


def chunks(n: int, size: int) -> Iterator[range]:
    """0 to n - 1, cut into ranges of at most ``size``.

    Example:
        >>> list(chunks(5, 2))
        [range(0, 2), range(2, 4), range(4, 5)]
    """
    for start in range(0, n, size):
        yield range(start, min(n, start + size))


def check_classes(labels: Tensor, tasks: Sequence[Task], n_classes: int) -> None:
    """Refuse labels and tasks for which the network has no output; names the highest one."""
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


def copied_to(model: nn.Module, device: torch.device) -> nn.Module:
    """A copy of the network on another device; a ValueError if there is no such device."""
    try:
        return copy.deepcopy(model).to(device)
    except torch.cuda.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # NotImplementedError is a RuntimeError
        raise ValueError(f"the network cannot be copied to device {device}: {error}") from error


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without making the host wait for the copy to a GPU."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def cumulative(values: Tensor) -> Tensor:
    """``values.cumsum(-1)``, also under deterministic algorithms.

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
    """Raise a ValueError that names the inputs, in place of torch's errors for wrong inputs."""
    try:
        yield
    except (GatingError, torch.cuda.OutOfMemoryError):
        raise
    except (RuntimeError, TypeError) as error:
        kinds = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(
            f"the network cannot be run on inputs of shape {kinds}: {type(error).__name__}: {error}"
        ) from error


def what_came(outputs: object) -> str:
    """Describe a result that is not a tensor of outputs, and say what to do."""
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
            f"a list of dictionaries ({keys}), as detection models do: boxes, not outputs of an "
            "image. Give a forward_func that returns one score for each image and class, "
            "(images, classes), such as the highest score of each label."
        )
    return (
        f"{type(outputs).__name__}, not a tensor of outputs; give a forward_func that picks it, "
        "such as lambda x: model(x).logits."
    )


class Runner:
    """A network in eval mode with the device it runs on and the way it is called.

    Each pass leaves the network's modules as it found them (:mod:`nad_attr.sites.preserving`), so
    no pass depends on an earlier one. With gradients, the buffers that a pass changes are put back
    by the next pass, and by the ``frozen`` around all passes.

    Args:
        model: The network. Wrappers that spread a batch over devices are taken off, since one gate
            vector per image cannot be spread.
        run: How it is run. None: the defaults of :class:`~nad_attr.RunOptions`.
        batch_size: The meaning of ``run.batch_size`` None.

    Attributes:
        model: The network to put hooks on.
        device: Where the inputs are sent.
        options: How it is run.
        amp: Autocast dtype; None: none.
        fields: The names of the inputs, if they have any; set by :meth:`draw`.
        fixed_batch: The only number of images that the network takes in a pass; None: any. Smaller
            passes are filled up with the last image, which hooks do not see and whose outputs are
            dropped. Set by :meth:`find_batch_size`.

    Raises:
        TypeError: If the network is not a module, or ``run`` is something else.
        ValueError: If the network is in train mode, or cannot be run where it should.

    Example:
        >>> runner = Runner(torch.nn.Linear(2, 3).eval())
        >>> runner((torch.ones(4, 2),)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self, model: nn.Module, run: RunOptions | None = None, *, batch_size: int = 64
    ) -> None:
        options = as_options(run)
        if options.batch_size is None:
            options = replace(options, batch_size=batch_size)
        self.options, self.amp = options, options.dtype
        device, forward_func = options.device, options.forward_func
        check_eval(model)
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
        self.device = here if device is None else torch.device(device)
        # "cuda" is the CUDA device on which the network is.
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
        self._extra = options.arguments
        self.fields: Fields | None = None
        self.fixed_batch: int | None = None
        self._asked = unwrap(model) if forward_func is None and not options.arguments else None
        self._is_asked = False

    def precision(self) -> AbstractContextManager[Any]:
        """The context of passes: autocast, or none even inside another autocast."""
        if self.amp is None and not torch.amp.is_autocast_available(self.device.type):
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None)

    @property
    def plain(self) -> bool:
        """Whether a call of the network itself, with an image's inputs, does the same."""
        return self.is_plain and not self._extra and self.amp is None

    def bar(self, total: int, desc: str, unit: str = "image") -> tqdm[Any]:
        """A progress bar, if one is wanted."""
        return tqdm(total=total, desc=desc, unit=unit, disable=not self.options.show_progress)

    @property
    def is_plain(self) -> bool:
        """Whether the network itself is called, with its inputs in order."""
        return self._run is self.model and self.fields is None

    def call(self, *inputs: Any) -> Any:
        """What the network or ``forward_func`` returns for inputs and further arguments."""
        return call_with(self._run, self.fields)(*inputs)

    def fit(self, source: Source) -> None:
        """Read class indices 0 and 1 as the labels of one output, if the network has one.

        If the labels leave open whether it has one output or two, one image is run.
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

    def find_batch_size(self, inputs: Inputs) -> None:
        """Find out, with three images, whether the network takes batches of one size only."""
        if self._is_asked or any(not x.ndim or not len(x) for x in inputs):
            return
        self._is_asked = True
        asked, network = self.options.batch_size, self._asked
        if network is not None and network in _FIXED:
            self.fixed_batch = _FIXED[network]
        else:
            few = repeated(self.to_device(inputs), min(3, asked) if isinstance(asked, int) else 3)
            try:
                with stranger(), isolated_rng(), torch.no_grad():
                    self.run(few)
            except Exception as error:  # the real run reports other errors
                function = None if self.is_plain else self.call
                size = fixed_batch_size(self.model, few, self._extra, function, str(error))
                self.fixed_batch = size
            if network is not None and (self.fixed_batch or len(few[0]) > 2):
                _FIXED[network] = self.fixed_batch
        if self.fixed_batch is not None:
            self.options = replace(self.options, batch_size=self.fixed_batch)

    def run(self, inputs: Inputs) -> Any:
        """Run the network and return its result unchecked, for callers that only read its sites.

        Raises:
            ValueError: If the network cannot be run on them.
        """
        n, size = len(inputs[0]), self.fixed_batch
        if size is None or n == size:
            return self._run_once(inputs)
        if n > size:
            raise ValueError(
                f"the network takes batches of {size} images only, a size that is fixed in its "
                f"forward pass, and this wants {n} in one pass: write x.shape[0] or -1 in place "
                "of the number in forward."
            )
        with filled_batch(n):
            outputs = self._run_once(self.filled(inputs))
        return mapped(outputs, lambda x: x[:n] if x.ndim and len(x) == size else x)

    def filled(self, inputs: Inputs) -> Inputs:
        """The inputs, filled up with the last image to the number that the network takes."""
        n = (self.fixed_batch or len(inputs[0])) - len(inputs[0])
        return tuple(torch.cat([x, x[-1:].expand(n, *x.shape[1:])]) for x in inputs)

    def _run_once(self, inputs: Inputs) -> Any:
        outputs = None
        kept = Kept(self.model, self._copies)
        try:
            with self.precision(), network_errors(inputs), eager(self.model):
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
            raise TypeError(f"the network returned {what_came(outputs)}")
        if outputs.ndim == 1 and len(outputs) == len(inputs[0]):
            outputs = outputs[:, None]
        if outputs.ndim != 2 or len(outputs) != len(inputs[0]):
            raise ValueError(
                f"the network returned shape {tuple(outputs.shape)} for {len(inputs[0])} images; "
                "expected (images, classes). Give a forward_func that returns that."
            )
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def draw(
        self, source: Source, numbers: Sequence[Sequence[int]], desc: str = ""
    ) -> Iterator[Inputs]:
        """The images of each list of numbers, on the network's device.

        A random transform gives the same image in every evaluation. ``desc``: the progress bar.

        Raises:
            ValueError: If an image holds NaN or infinity.
        """
        # One batch at a time: the draws of a large data set would fill the memory.
        draws = ([(i, seed_of("evaluation", i)) for i in chosen] for chosen in numbers)
        shown = bool(desc) and self.options.show_progress
        with tqdm(total=sum(map(len, numbers)), desc=desc, unit="image", disable=not shown) as bar:
            for chosen, inputs in zip(numbers, source.batches(draws), strict=True):
                self.fields = source.fields
                self.find_batch_size(inputs)
                yield self.to_device(check_finite(inputs))
                bar.update(len(chosen))

    def images_per_pass(
        self,
        images: Source | Inputs,
        probe: Callable[[Inputs], object] | None = None,
        most: int | None = None,
    ) -> int:
        """Images in a pass: as many as were asked for, or as fit into memory.

        Args:
            images: The first image is used to measure the need of memory.
            probe: Handles a batch; None: a pass without gradients.
            most: Upper limit of a number that is found; None: :func:`most_in_batch`.

        Raises:
            ValueError: If one image does not fit, or the free memory is unknown.
        """
        if isinstance(self.options.batch_size, int) and self._is_asked:
            return self.options.batch_size
        given = images if isinstance(images, tuple) else next(self.draw(images, [[0]]))
        self.find_batch_size(given)
        asked = self.options.batch_size
        if isinstance(asked, int):
            return asked

        def without_gradients(inputs: Inputs) -> None:
            with torch.no_grad():
                self(inputs)

        image = self.to_device(tuple(x[:1] for x in given))
        limit = self.options.limit
        return largest_batch(
            self.device,
            lambda n: (probe or without_gradients)(repeated(image, n)),
            limit=None if limit is None else limit - self.options.kept_bytes(0),
            most=most_in_batch(self.device, image) if most is None else most,
        )


def most_in_batch(device: torch.device, image: Inputs) -> int:
    """Largest batch size that is found automatically, for images like the first of a batch."""
    if device.type != "cpu":
        return MAX_FOUND_BATCH
    numbers = max(1, image[0][0].numel())
    return min(MAX_FOUND_BATCH, max(MAX_ON_CPU, NUMBERS_ON_CPU // numbers))


def repeated(image: Inputs, n: int) -> Inputs:
    """A batch of the first image ``n`` times."""
    return tuple(x[:1].expand(n, *x.shape[1:]).contiguous() for x in image)


class Filled(nn.Module):
    """A network whose batch size is fixed, as one that takes any, for other libraries.

    Args:
        network: Takes batches of one size only.
        size: That size.
        one_pass: Refuse more images, for methods that keep data of a pass on the network's modules.

    Example:
        >>> class Fixed(nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x.view(4, 2))
        >>> Filled(Fixed(2, 3), 4)(torch.ones(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(self, network: nn.Module, size: int, one_pass: bool = False) -> None:
        super().__init__()
        self.network, self.size, self.one_pass = network, size, one_pass
        self.training = False  # its own flag only: eval() would reach into the network

    def forward(self, *inputs: Any) -> Tensor:
        """The network's outputs for any number of images."""
        n = len(inputs[0])
        if self.one_pass and n > self.size:
            raise ValueError(
                f"the network takes batches of {self.size} images only, and this wants {n} in one "
                "pass (images and baselines together): explain fewer at a time, or write "
                "x.shape[0] or -1 in place of the number in forward."
            )
        parts = []
        for images in chunks(n, self.size):
            rows = [min(i, n - 1) for i in range(images.start, images.start + self.size)]
            with filled_batch(len(images)):
                batched = (isinstance(x, Tensor) and x.ndim and len(x) == n for x in inputs)
                outputs = self.network(
                    *(x[rows] if cut else x for x, cut in zip(inputs, batched, strict=True))
                )
            parts.append(outputs[: len(images)])
        return torch.cat(parts)


def any_batch(
    model: nn.Module, inputs: Inputs, asked: nn.Module | None = None, *, one_pass: bool = False
) -> nn.Module:
    """A network that takes any number of images: itself, if its batch size is not fixed.

    ``asked`` is the network to examine in place of a copy, since results of that are kept;
    ``one_pass``: see :class:`Filled`.
    """
    runner = Runner(model if asked is None else asked)
    runner.find_batch_size(inputs)
    size = runner.fixed_batch
    return model if size is None else Filled(model, size, one_pass)
