"""Heat-maps through sub-architectures: any input attribution, run on the gated network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeAlias

import torch
from torch import Tensor, nn

from nad_attr._checks import tensor_of
from nad_attr.evaluation.rows import named_architectures
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import frozen
from nad_attr.gating.restore import Explained, untouched
from nad_attr.running.forward import Filled, Runner, chunks
from nad_attr.running.options import RunOptions

__all__ = ["HeatMapMethod", "class_architectures", "gradient_times_input", "heat_maps"]

#: ``(network, inputs (B, ...), target int64 (B,)) -> (B, ...)``: an attribution to the inputs.
HeatMapMethod: TypeAlias = "Callable[[nn.Module, Tensor, Tensor], Tensor]"


def gradient_times_input(model: nn.Module, inputs: Tensor, target: Tensor) -> Tensor:
    """Input times the gradient of the target's output: the default heat-map.

    Exact (it sums to the output) for networks of ReLUs without biases. Shrikumar et al. 2016,
    arXiv 1605.01713.

    Args:
        model: Returns (B, K).
        inputs: (B, ...).
        target: int64 (B,), class indices.

    Returns:
        As ``inputs``.

    Example:
        >>> net = torch.nn.Linear(2, 2, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> gradient_times_input(net, torch.tensor([[10.0, 1.0]]), torch.tensor([1]))
        tensor([[30.,  4.]])
    """
    with torch.enable_grad():
        x = inputs.detach().clone().requires_grad_(True)
        chosen = model(x).gather(1, target[:, None])
        (gradient,) = torch.autograd.grad(chosen.sum(), x)
    return (gradient * x).detach()


def class_architectures(
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture],
    size: float | None = None,
) -> dict[int, SubArchitecture]:
    """The sub-architecture of each class; the classes of a group have the group's.

    Raises:
        ValueError: If a class belongs to two tasks.

    Example:
        >>> from nad_attr.sites import GateSite
        >>> arch = SubArchitecture.from_kept({}, [GateSite("a", 2, 1)], task=(3, 5))
        >>> list(class_architectures(arch))
        [3, 5]
    """
    given = named_architectures(architectures, size)
    found: dict[int, SubArchitecture] = {}
    for task, arch in zip(given.tasks, given.architectures, strict=True):
        for member in task if isinstance(task, tuple) else (task,):
            if member in found:
                raise ValueError(f"class {member} belongs to two tasks; leave one of them out.")
            found[member] = arch
    return found


def as_targets(targets: int | Tensor | Sequence[int], n: int) -> Tensor:
    """One class index for each of n images: int64 (n,)."""
    try:
        chosen = tensor_of(targets)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"targets must be class indices, got {targets!r:.60}.") from error
    wrong = chosen.is_floating_point() or chosen.is_complex() or chosen.dtype == torch.bool
    if wrong or (chosen.numel() and int(chosen.min()) < 0):
        raise ValueError("targets must be class indices, whole numbers from 0 on.")
    chosen = chosen.detach().cpu().long()
    if chosen.ndim == 0:
        chosen = chosen.expand(n)
    if chosen.shape != (n,):
        raise ValueError(
            f"targets have shape {tuple(chosen.shape)} for {n} images; give one class index, or "
            "one for each image."
        )
    return chosen


@contextmanager
def _own_gradients(model: nn.Module) -> Iterator[None]:
    """Let methods change ``.grad`` and ``requires_grad``, and restore them."""
    kept = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in kept:
            parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in kept:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextmanager
def explained(runner: Runner, arch: SubArchitecture | None) -> Iterator[nn.Module]:
    """The network as a module to explain, gated by a sub-architecture and then restored."""
    with ExitStack() as stack:
        stack.enter_context(untouched(runner.model))
        stack.enter_context(_own_gradients(runner.model))
        stack.enter_context(frozen(runner.model))
        if arch is not None:
            stack.enter_context(arch.applied(runner.model))
        # The network itself if possible: methods look for its layers by name or type.
        network = runner.model
        if not runner.plain:
            network = Explained(runner.model, lambda *inputs: runner(tuple(inputs)))
        yield network if runner.fixed_batch is None else Filled(network, runner.fixed_batch)


def run_method(
    runner: Runner, arch: SubArchitecture | None, method: HeatMapMethod, x: Tensor, target: Tensor
) -> Tensor:
    """One batch's heat-maps through one sub-architecture, checked and on the CPU.

    They have the shape of ``x``, or one channel.
    """
    n, fixed = len(x), runner.fixed_batch
    if fixed is not None:
        x, target = runner.filled((x,))[0], target[[min(i, n - 1) for i in range(fixed)]]
    # First of all: tensors made in the caller's inference mode take no part in any gradient.
    with torch.inference_mode(False), torch.enable_grad(), explained(runner, arch) as network:
        # With requires_grad, which some methods check: weights have none now.
        inputs = x.detach().clone().requires_grad_(True)
        result = method(network, inputs, target.to(x.device).clone())
    name = getattr(method, "__name__", type(method).__name__)
    if not isinstance(result, Tensor):
        raise TypeError(
            f"the heat-map method {name} must return a tensor, got {type(result).__name__}."
        )
    result = result.detach().cpu()
    if result.ndim == x.ndim - 1:
        result = result.unsqueeze(1)
    fits = result.ndim == x.ndim and len(result) == len(x) and result.shape[2:] == x.shape[2:]
    if not fits or result.shape[1] not in (1, x.shape[1]):
        raise ValueError(
            f"the heat-map method {name} returned shape {tuple(result.shape)} for inputs of shape "
            f"{tuple(x.shape)}; expected the inputs' shape, or it with one channel or none."
        )
    if not bool(torch.isfinite(result).all()):
        raise ValueError(f"the heat-map method {name} returned NaN or infinity.")
    return result[:n]


def heat_maps(
    model: nn.Module,
    architectures: TaskGates | SubArchitecture | Sequence[SubArchitecture] | None,
    inputs: Tensor,
    targets: int | Tensor | Sequence[int],
    *,
    method: HeatMapMethod = gradient_times_input,
    size: float | None = None,
    run: RunOptions | None = None,
) -> Tensor:
    """Attribute outputs to images, each inside the sub-architecture of its target.

    The attribution explains the output of the gated network, so it shows what reached the output
    through the kept channels. Images of one target run together, so that any method works, also one
    that runs more images than it was given.

    Args:
        model: The network, in eval mode; unchanged afterwards, whatever ``method`` does.
        architectures: Task gates or sub-architectures, one for each target class (a group of
            classes serves all its members); a single sub-architecture: for all images and targets;
            None: the whole network, for comparison.
        inputs: (N, ...).
        targets: Class index of each image, or one for all: the output to explain.
        method: Called as ``method(network, inputs, target)`` in the gated network. Any of
            Captum's, for example ``lambda net, x, y: Saliency(net).attribute(x, target=y)``.
            Random numbers that it draws are the same for every batch.
        size: Binarise task gates at this share of the channels; None: as they were learned.
        run: How to run the network; see :class:`nad_attr.RunOptions`.

    Returns:
        Heat-maps on the CPU, shaped as ``inputs``; axis 1 is 1 if the method has no colours.

    Raises:
        GatingError: If a site does not fire, fires twice or has another shape.
        SiteError: If the network has no such site.
        TypeError: If an argument is of a wrong kind, or the method returns no tensor.
        ValueError: If targets are not class indices, there is no sub-architecture for one, the
            network is in train mode, or the method returns another shape or values that are not
            finite.

    Example:
        >>> from nad_attr.sites import GateSite
        >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(2, 2, bias=False)).eval()
        >>> _ = net[1].weight.data.copy_(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> arch = SubArchitecture.from_kept({"0": [0]}, [GateSite("0", 2, 1)], task=1)
        >>> heat_maps(net, arch, torch.tensor([[10.0, 1.0]]), 1)
        tensor([[30.,  0.]])
    """
    if not callable(method):
        raise TypeError(f"method must be a function, got {method!r:.60}.")
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.ndim < 2:
        raise TypeError("inputs must be one floating-point tensor (images, ...).")
    chosen = as_targets(targets, len(inputs))
    of_class: dict[int, SubArchitecture | None] = {}
    if architectures is None or isinstance(architectures, SubArchitecture):
        if size is not None:
            raise ValueError("size= needs TaskGates.")
        of_class = dict.fromkeys(chosen.unique().tolist(), architectures)
    else:
        of_class.update(class_architectures(architectures, size))
    for target in chosen.unique().tolist():
        if target not in of_class:
            raise ValueError(
                f"there is no sub-architecture for target {target}; there are {list(of_class)}."
            )
    runner = Runner(model, run, batch_size=32)
    maps: list[Tensor] = []
    order: list[Tensor] = []
    bar = runner.bar(len(inputs), "heat-maps")
    for target in chosen.unique().tolist():
        arch = of_class[target]
        numbers = (chosen == target).nonzero().flatten()
        width = runner.images_per_pass(
            (inputs,),
            lambda some, arch=arch, y=target: run_method(  # type: ignore[misc]
                runner, arch, method, some[0], torch.full((len(some[0]),), y, device="cpu")
            ),
        )
        for part in chunks(len(numbers), width):
            some = numbers[part.start : part.stop]
            (x,) = runner.to_device((inputs[some.to(inputs.device)],))
            maps.append(run_method(runner, arch, method, x, chosen[some]))
            order.append(some)
            bar.update(len(some))
    bar.close()
    if not maps:
        return inputs.detach().cpu().clone()
    return torch.cat(maps)[torch.cat(order).argsort()]
