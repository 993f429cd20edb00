"""Check on a network, before learning, whether gates learned from it can be true.

Learning assumes three things that a network may break without any error:

- an image's outputs are a function of the image alone (:func:`check_outputs`): not of chance, nor
  of the other images of the batch;
- the gradient of each gate predicts what closing channels does (:func:`check_gradients`);
- the gate sites that were found cover the network (:func:`poor_coverage`).

The first two run the network a few times, on two images. They change neither the network nor a
global random state.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from nad_attr._checks import GatingError
from nad_attr.sites.coverage import NetworkCheckWarning
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.tracing import graph_nodes, tensors_in
from nad_attr.system.rng import isolated_rng, random_states
from nad_attr.system.threads import owned

if TYPE_CHECKING:
    from nad_attr.learning.engine import Network

__all__ = [
    "Checks",
    "NetworkCheckError",
    "NetworkCheckWarning",
    "check_gradients",
    "check_option",
    "check_outputs",
]


#: The effect of a doubt: an error, a warning, or no check at all.
Checks: TypeAlias = Literal["refuse", "warn", "off"]
_Inputs: TypeAlias = "tuple[Tensor, ...]"

#: Random combinations of the outputs for which gradients are compared.
_N_OUTPUTS = 4
#: How far gates are moved, as a share of them; the first one always, the others after a doubt.
_STEPS = (0.02, 0.005, 0.2, 0.7)
#: Difference of predicted and real change, over the larger of the two: a doubt, and a fault.
_DOUBT, _FAULT = 0.4, 0.5
#: Largest distance of the gates from open.
_JITTER = 0.2
#: Images, after a doubt.
_N_IMAGES = 16
#: Effect of channels without a gradient, over that of as many with one, that is a fault.
_SILENT = 0.25
#: More directions, after a doubt.
_N_DIRECTIONS = 4
#: Operators whose gradient is zero wherever it exists.
_FLAT = ("Round", "Sign", "Sgn", "Floor", "Ceil", "Trunc", "Heaviside", "Zeros")


class NetworkCheckError(GatingError, ValueError):
    """Gates learned from this network would not be true; the message says why."""


def check_option(checks: object) -> Checks:
    """Check that a value is one of "refuse", "warn" and "off"."""
    if checks not in ("refuse", "warn", "off"):
        raise ValueError(f"checks must be 'refuse', 'warn' or 'off', got {checks!r}.")
    return checks


def _doubt(message: str, checks: Checks) -> None:
    if checks == "refuse":
        raise NetworkCheckError(
            f"{message} Pass checks='warn' (--checks warn) to go on nevertheless."
        )
    warnings.warn(message, NetworkCheckWarning, stacklevel=4)


def _fake_quantised(module: nn.Module) -> bool:
    """Whether it rounds as an int8 layer would, with the gradient of a layer without rounding."""
    return hasattr(module, "fake_quant_enabled") or "FakeQuant" in type(module).__name__


# Outputs


@torch.no_grad()
def check_outputs(
    model: nn.Module,
    run: Callable[[_Inputs], Tensor],
    inputs: _Inputs,
    *,
    outputs: Tensor | None = None,
    checks: Checks = "refuse",
    half: bool = False,
) -> None:
    """Refuse a network whose outputs for an image depend on chance, or on the rest of the batch.

    Runs the images twice, and the first of them alone: for two images, five image passes.

    Args:
        model: The network.
        run: Runs it: gives the outputs (B, K) for a batch.
        inputs: A few images, best two.
        outputs: The outputs of these images, if they are known.
        checks: "refuse" raises, "warn" warns, "off" does nothing.
        half: Whether the network computes in half precision, where rounding depends on the batch
            size.

    Raises:
        NetworkCheckError: Names the responsible module, if it is known.

    Example:
        >>> class Noisy(nn.Module):
        ...     def forward(self, x):
        ...         return x + torch.rand_like(x)
        >>> check_outputs(Noisy().eval(), lambda inputs: Noisy()(*inputs), (torch.zeros(2, 3),))
        Traceback (most recent call last):
        ...
        nad_attr.learning.network_checks.NetworkCheckError: the network gives another output ...
    """
    if checks == "off":
        return
    # Eight bits are coarser still; an active observer moves their range a little in each pass.
    half = half or any(map(_fake_quantised, model.modules()))
    with unchanged(model), isolated_rng():
        before: tuple[object, ...] = random_states()
        first = run(inputs) if outputs is None else outputs
        second = run(inputs)
        again = 0
        while _close(first, second, 1e-5) and random_states() != before and again < 8:
            # Random numbers were drawn; the outputs of one pass need not depend on them.
            before, again = random_states(), again + 1
            second = run(inputs)
        if not _close(first, second, 1e-5):
            where = _differing_module(run, model, inputs, inputs)
            _doubt(
                f"the network gives another output each time it is run on the same image: {where} "
                "draws random numbers in eval mode too (dropout or noise in forward, stochastic "
                "depth), so gates learned twice from one seed would differ. Switch it off for "
                "the explanation.",
                checks,
            )
            return
        if len(inputs[0]) < 2:
            return
        alone = tuple(item[:1] for item in inputs)
        try:
            single = run(alone)
        except (TypeError, ValueError) as error:
            message = f"the network runs on {len(inputs[0])} images and not on one alone: {error}"
            warnings.warn(message, NetworkCheckWarning, stacklevel=3)
            return
        if not _close(single, first[:1], 5e-2 if half else 1e-3, scale=first):
            where = _differing_module(run, model, alone, inputs)
            _doubt(
                f"the network's output for an image depends on the other images of its batch: "
                f"{where} mixes them (BatchNorm without running statistics, a mean over the "
                "batch), so no output is a property of its image. Let it use fixed statistics.",
                checks,
            )


def _close(a: Tensor, b: Tensor, tolerance: float, scale: Tensor | None = None) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    if not a.is_floating_point():
        return bool(torch.equal(a, b))
    size = (a if scale is None else scale.detach()).abs().max() if a.numel() else 0
    # NaN is close to NaN only.
    return bool((((a - b).abs() <= tolerance * size) | (a == b) | (a.isnan() & b.isnan())).all())


def _differing_module(
    run: Callable[[_Inputs], Tensor], model: nn.Module, inputs: _Inputs, others: _Inputs
) -> str:
    """The innermost module that made different tensors from equal ones, in words."""
    n = len(inputs[0])
    tolerance = 1e-5 if n == len(others[0]) else 1e-3
    calls: list[tuple[str, nn.Module, list[Tensor], list[Tensor]]] = []
    entered: list[list[Tensor]] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        entered.append([t.detach().clone() for t in tensors_in((args, kwargs))])

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            made = [t.detach().clone() for t in tensors_in(output)]
            calls.append((name, module, entered.pop(), made))

        return hook

    with owned() as owner, ExitStack() as stack:
        for name, module in model.named_modules():
            hooks = owner.only(before), owner.only(after(name))
            handle = module.register_forward_pre_hook(hooks[0], with_kwargs=True)
            stack.callback(handle.remove)
            handle = module.register_forward_hook(hooks[1], with_kwargs=True)
            stack.callback(handle.remove)
        run(inputs)
        one, calls = calls, []
        run(others)
    for (name, module, given, made), (other, _, given2, made2) in zip(one, calls, strict=False):
        if name != other or len(given) != len(given2) or len(made) != len(made2):
            break
        same_inputs = all(map(_same_rows, given, given2, [tolerance] * len(given)))
        if same_inputs and not all(map(_same_rows, made, made2, [tolerance] * len(made))):
            statistics = isinstance(module, nn.modules.batchnorm._BatchNorm)
            if statistics and module.running_mean is None:
                return f"module {name!r} ({type(module).__name__}, without running statistics)"
            kind = type(module).__name__
            if "quantized.dynamic" in type(module).__module__:
                return f"module {name!r} (int8 {kind}: its scale is taken over the batch)"
            if _fake_quantised(module):
                switch = "model.apply(torch.ao.quantization.disable_observer) switches it off"
                return f"module {name!r} ({kind}, whose observer follows the batch: {switch})"
            own = "the forward of " if any(True for _ in module.children()) else ""
            return f"{own}module {name!r} ({kind})" if name else f"the network ({kind}) itself"
    return "something in its forward pass (the module is not known)"


def _same_rows(a: Tensor, b: Tensor, tolerance: float) -> bool:
    """Whether the first tensor is the beginning of the second; True if that cannot be told."""
    if a.ndim != b.ndim or a.shape[1:] != b.shape[1:] or not a.ndim or len(a) > len(b):
        return True
    return _close(a, b[: len(a)], tolerance, scale=b)


# Gradients


def check_gradients(
    network: Network,
    inputs: _Inputs,
    *,
    more: Callable[[int], _Inputs] | None = None,
    checks: Checks = "refuse",
) -> None:
    """Refuse a network whose gradient is wrong about closing channels at some gate site.

    One backward pass on two images gives the gradient of every gate. At each site a few channels
    are then moved a little, and the change is compared with the prediction: an image pass for each
    site, and one for all channels without any gradient. After a doubt, more directions, other steps
    and more images decide.

    Args:
        network: The network with its sites.
        inputs: A few images, best two, where the network is.
        more: Gives as many other images: on two, all channels after a site may be dead.
        checks: "refuse" raises, "warn" warns, "off" does nothing.

    Raises:
        NetworkCheckError: Names the sites and the likely cause.
    """
    if checks == "off":
        return
    means, amp = network.means, network.amp
    network.means, network.amp = None, None
    try:
        with unchanged(network.model), isolated_rng(), torch.enable_grad():
            probe = _Probe(network, tuple(item[:2] for item in inputs))
            faults = probe.faults(list(probe.columns))
            if faults and more is not None:
                probe = _Probe(network, more(_N_IMAGES))
                faults = probe.faults(list(faults))
            if faults:
                cause = probe.cause()
    finally:
        network.means, network.amp = means, amp
    if not faults:
        return
    n, named = len(network.sites), list(faults.items())
    listed = "; ".join(f"{name!r} ({what})" for name, what in named[:6])
    rest = f" and {len(named) - 6} more" if len(named) > 6 else ""
    sound = [site.name for site in network.sites if site.name not in faults]
    only = f" name sound sites only, sites={sound[:4]}{'...' if len(sound) > 4 else ''}," * bool(
        sound
    )
    _doubt(
        f"the gradient that gates are learned by is wrong at {len(named)} of {n} gate sites: "
        f"{listed}{rest}. {cause} Let the gradient through (no torch.no_grad, detach, NumPy, "
        f"rounding or int8 layers between a site and the outputs; float weights),{only} or use a "
        "score that needs no gradient.",
        checks,
    )


class _Probe:
    """The gradient of each gate of a network, and the real effect of moving gates."""

    def __init__(self, network: Network, images: _Inputs) -> None:
        self.network, self.images = network, images
        self.n = len(images[0])
        widths = [site.n_gates for site in network.sites]
        ends = [*itertools.accumulate(widths)]
        self.columns = {
            site.name: slice(end - width, end)
            for site, width, end in zip(network.sites, widths, ends, strict=True)
        }
        self.generator = torch.Generator("cpu").manual_seed(0)
        # Not quite open: there a network may have a kink, where no gradient is right.
        jitter = torch.rand(self.n, ends[-1], generator=self.generator, device="cpu")
        self.gates = (1 - _JITTER * jitter).to(network.device, network.dtype)
        self.graph: Any = None
        self.gradient = self._gradients()

    def _gradients(self) -> Tensor:
        """(images, outputs, all channels)."""
        leaf = self.gates.clone().requires_grad_(True)
        passing: list[tuple[str, bool, bool, bool]] = []
        with ExitStack() as stack:
            owner = stack.enter_context(owned())
            for name, module in self.network.model.named_modules():
                if not any(True for _ in module.children()):
                    hook = owner.only(_passes(name, type(module).__name__, passing))
                    stack.callback(module.register_forward_hook(hook).remove)
            stack.enter_context(self.network.gating(leaf))
            try:
                outputs = self.network(self.network.ready(self.images))
            except ValueError as error:
                if "nference tensor" not in str(error):
                    raise
                # Made under torch.inference_mode inside forward: no graph can contain it.
                self.passing, self.error = passing, str(error)
                self._set_outputs(self.network.clean(self.images))
                return leaf.new_zeros(self.n, self.weights.shape[1], leaf.shape[1])
            self.passing = passing
            self._set_outputs(outputs)
            self.graph = outputs.grad_fn
            values = (outputs @ self.weights).sum(0)
            if not outputs.requires_grad:
                return leaf.new_zeros(self.n, len(values), leaf.shape[1])
            gradients = [self.network.gate_gradient(v, leaf, retain=True) for v in values]
            return torch.stack(gradients, dim=1)

    def _set_outputs(self, outputs: Tensor) -> None:
        shape = outputs.shape[1], _N_OUTPUTS
        weights = torch.randn(shape, generator=self.generator, dtype=torch.float64, device="cpu")
        self.weights = weights.to(outputs) / shape[0] ** 0.5
        self.values = (outputs.detach() @ self.weights)[:, None]
        coarse = self.network.half or any(map(_fake_quantised, self.network.model.modules()))
        rounding = 2e-2 if coarse else 1e-5 if outputs.dtype == torch.float32 else 1e-10
        self.noise = rounding * outputs.detach().abs().max()

    @torch.no_grad()
    def _change(self, rows: Sequence[tuple[int, Tensor]]) -> Tensor:
        """(rows, outputs): the change by moves of the gates of images."""
        changes = []
        size = max(1, self.network.batch_size or len(rows))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            at = [image for image, _ in part]
            gates = self.gates[at] + torch.stack([move for _, move in part])
            with self.network.gating(gates):
                outputs = self.network(tuple(item[at] for item in self.images))
            changes.append(outputs @ self.weights - self.values[at, 0])
        return torch.cat(changes)

    def _direction(self, name: str, *, silent: bool) -> Tensor:
        """Some of a site's channels are closed by the whole step, the others opened."""
        columns = self.columns[name]
        width = columns.stop - columns.start
        signs = torch.randint(2, (width,), generator=self.generator, device="cpu") * 2 - 1
        move = torch.zeros(self.gates.shape[1], dtype=self.gates.dtype, device="cpu")
        move[columns] = signs.to(move)
        move = move.to(self.gates.device)
        if silent:
            move[columns] = -self._silent(name).to(move)
        return move

    def faults(self, names: Sequence[str]) -> dict[str, str]:
        """``{site name: fault}`` for some of the sites."""
        rows: list[tuple[str, int, Tensor, str]] = []
        silent: list[str] = []
        for name in names:
            here = self.gradient[:, :, self.columns[name]]
            if not bool(here.any()):
                rows += [(name, i, self._whole(name, i), "none") for i in range(self.n)]
                continue
            # The image with the largest gradient: on another, all channels after it may be dead.
            image = int(here.flatten(1).norm(dim=1).argmax())
            rows.append((name, image, self._direction(name, silent=False), "all"))
            silent += [name] * bool(self._silent(name).any())
        if silent and self._silent_have_effect(silent):
            rows += [
                (name, i, self._direction(name, silent=True), "silent")
                for name in silent
                for i in range(self.n)
            ]
        step = {"none": 1.0, "all": _STEPS[0], "silent": _STEPS[0]}
        moved = [(image, step[what] * move) for _, image, move, what in rows]
        change = self._change(moved)
        doubts: dict[str, set[str]] = {}
        for (name, image, move, what), real in zip(rows, change, strict=True):
            if self._error(image, step[what] * move, real) > (_DOUBT if what == "all" else 0):
                doubts.setdefault(name, set()).add(what)
        found = {name: self._fault_of(name, kinds) for name, kinds in doubts.items()}
        return {name: what for name, what in found.items() if what}

    def _silent(self, name: str) -> Tensor:
        """The channels of a site without any gradient: bool (C,)."""
        return (self.gradient[:, :, self.columns[name]] == 0).all(0).all(0)

    def _silent_have_effect(self, names: Sequence[str]) -> bool:
        """Whether closing such channels has an effect, at all of these sites in one pass."""
        moves = [
            (i, _STEPS[0] * torch.stack([self._direction(n, silent=True) for n in names]).sum(0))
            for i in range(self.n)
        ]
        real = self._change(moves)
        return any(
            self._error(i, move, change) > 0 for (i, move), change in zip(moves, real, strict=True)
        )

    def _whole(self, name: str, image: int) -> Tensor:
        move = torch.zeros_like(self.gates[image])
        move[self.columns[name]] = -self.gates[image, self.columns[name]]
        return move

    def _error(self, image: int, move: Tensor, real: Tensor) -> float:
        """Difference of predicted and real change over the larger of the two; 0 if it is noise."""
        predicted = self.gradient[image] @ move
        difference = (predicted - real).norm()
        if difference <= self.noise:
            return 0.0
        return float(difference / torch.maximum(predicted.norm(), real.norm()))

    def _error_of_many(self, name: str, step: float, n_directions: int) -> float:
        """The same for random directions at a site together; 1 if the step is too small."""
        moves = [
            (i, step * self._direction(name, silent=False))
            for _ in range(n_directions)
            for i in range(self.n)
        ]
        real = self._change(moves)
        predicted = torch.stack([self.gradient[i] @ move for i, move in moves])
        difference = (real - predicted).norm()
        if difference <= self.noise * len(moves) ** 0.5:
            return 0.0 if step == _STEPS[-1] else 1.0
        return float(difference / torch.maximum(real.norm(), predicted.norm()))

    def _fault_of(self, name: str, kinds: set[str]) -> str:
        """The fault of a doubtful site; empty if it has none."""
        columns = self.columns[name]
        if "none" in kinds:
            return "no gradient arrives, though closing it changes the outputs"
        if "silent" in kinds:
            shares: list[float] = []
            for step in _STEPS[1:]:
                moves = [(i, step * self._direction(name, silent=True)) for i in range(self.n)]
                here = self.gradient[:, :, columns]
                n_silent = sum(float((move != 0).sum()) for _, move in moves) / self.n
                typical = step * float(here[here != 0].abs().median()) * max(n_silent, 1) ** 0.5
                real = float(self._change(moves).abs().median())
                shares.append(real / typical if real > self.noise else 0.0)
                if shares[-1] <= _SILENT:
                    break
            else:
                zero = int(self._silent(name).sum())
                return f"no gradient arrives at {zero} channels, though closing them matters"
        if "all" in kinds:
            errors: list[float] = []
            # One direction is often enough to prove a site right, and never to prove it wrong.
            for n_directions, step in itertools.product((1, _N_DIRECTIONS), _STEPS[1:]):
                errors.append(self._error_of_many(name, step, n_directions))
                if errors[-1] <= _FAULT:
                    return ""
            return f"the gradient differs from what closing channels does by {min(errors):.0%}"
        return ""

    def cause(self) -> str:
        for name, module in self.network.model.named_modules():
            if "nn.quantized" in type(module).__module__:
                kind = type(module).__name__
                return f"Likely cause: module {name!r} (int8 {kind}) passes on no gradient."
        before = ""
        for label, given, made, enabled in self.passing:
            if not enabled:
                return (
                    f"Likely cause: {label} is run without gradients (torch.no_grad, inference_mode"
                    " or a reentrant checkpoint in forward)."
                )
            if given and not made:
                return f"Likely cause: {label} passes on no gradient."
            if before and not given and not made:
                return (
                    f"Likely cause: between {before} and {label} the gradient is cut (torch.no_grad"
                    ", detach, NumPy, or an operator without a gradient)."
                )
            before = label if made else before
        if before and self.graph is None:
            return (
                f"Likely cause: the outputs are detached after {before}, in the network's forward "
                "or in forward_func."
            )
        names = _nodes(self.graph)
        for name in names:
            if name.startswith(_FLAT):
                operator = name.partition("Backward")[0].lower()
                return f"Likely cause: the operator {operator!r}, whose gradient is zero."
        own = [name.partition("Backward")[0] for name in names if name.startswith("own:")]
        if own:
            return f"Likely cause: the autograd function {own[0][4:]!r} and its own backward."
        return "Likely cause: an operator without a gradient, or with one of its own."


def _passes(
    name: str, kind: str, passing: list[tuple[str, bool, bool, bool]]
) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        given = any(t.requires_grad for t in tensors_in(args))
        made = any(t.requires_grad for t in tensors_in(output))
        label = f"module {name!r} ({kind})"
        passing.append((label, given, made, torch.is_grad_enabled()))

    return hook


def _nodes(graph: Any) -> list[str]:
    """Names of the operators of an autograd graph; a user's own functions begin with "own:"."""
    names = []
    for node in graph_nodes(graph):
        kind = type(node)
        own = hasattr(node, "_forward_cls")
        module = getattr(getattr(node, "_forward_cls", None), "__module__", "")
        if own and module.startswith(("nad_attr.", "torch.")):
            continue
        names.append(f"own:{kind.__name__}" if own else kind.__name__)
    return names
