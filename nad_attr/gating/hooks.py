"""Multiply gates into a network and record its tensors, by hooks that are removed again.

Everything here is a context manager. Only forward (pre-)hooks are used, since an inserted module
breaks Captum's LRP and Zennit's BatchNorm merging. All products are out of place, because an
in-place ReLU may write into the tensor that a hook has just seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nad_attr._checks import GatingError, as_tensor, check_mapping
from nad_attr.data.labels import Task
from nad_attr.gating.foreign_hooks import (
    changes_weights,
    gate_relevance,
    move_behind_rewriters,
    relevance_rules,
)
from nad_attr.gating.protocols import HasGates
from nad_attr.sites.finding import check_kind
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.projections import called_projections
from nad_attr.sites.site import GateSite, SiteError, check_sites, resolve_name, unwrap
from nad_attr.sites.tracing import eager, no_attention_fast_path, tensors_in
from nad_attr.system.threads import owned

__all__ = ["check_eval", "frozen", "gated", "recorded", "site_modules"]


#: What replaces the tensor at a site: ``(site, tensor) -> tensor or None to leave it``.
SiteFunction = Callable[[GateSite, Tensor], "Tensor | None"]


#: Images of the pass; further rows only fill a batch whose size is fixed. None: all rows.
_N_IMAGES: ContextVar[int | None] = ContextVar("n_images", default=None)


@contextmanager
def filled_batch(n_images: int) -> Iterator[None]:
    """Only the first rows of a pass are images: hooks see, gate and record these only."""
    before = _N_IMAGES.get()
    _N_IMAGES.set(n_images)
    try:
        yield
    finally:
        _N_IMAGES.set(before)


def site_modules(model: nn.Module, sites: Sequence[GateSite]) -> dict[str, nn.Module]:
    """The module of each gate site.

    Args:
        model: The network, or a DataParallel or ``torch.compile`` wrapper of it.
        sites: Gate sites of that network.

    Returns:
        ``{site name: module}`` in the order of ``sites``.

    Raises:
        SiteError: If a name is not a module of the network (close matches are named) or two
            sites share a name.
        TypeError: If the network is not a module or the sites are not gate sites.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU())
        >>> site_modules(net, [GateSite("1", 4, 1)])
        {'1': ReLU()}
    """
    check_sites(sites)
    check_kind(model)
    known = dict(unwrap(model).named_modules(remove_duplicate=False))
    canonical = {id(module): name for name, module in unwrap(model).named_modules()}
    modules: dict[str, nn.Module] = {}
    for site in sites:
        if site.name in modules:
            raise SiteError(
                f"gate site {site.name!r} is given twice; name each site once "
                "(its input and its output cannot both be gated under one name)."
            )
        modules[site.name] = known[resolve_name(site.name, known, canonical)]
    return modules


def check_eval(model: nn.Module) -> None:
    """Refuse a network in train mode: its output depends on the other images of the batch.

    Raises:
        SiteError: If hooks would break it, or do nothing on it.
        ValueError: Names the first module in train mode.
    """
    check_kind(model)
    for name, module in unwrap(model).named_modules():
        if module.training:
            where = f"module {name!r} ({type(module).__name__})" if name else "the network"
            raise ValueError(
                f"{where} is in train mode, where BatchNorm and Dropout make an image's output "
                "depend on chance and on the rest of the batch; call model.eval() first."
            )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Switch ``requires_grad`` off for all parameters, and restore it afterwards.

    No graph is built before the first gate, and no weight gradient is computed. Changes that
    forward passes make on the network's modules are undone too
    (:func:`nad_attr.sites.preserving.unchanged`).

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> with frozen(net):
        ...     net.weight.requires_grad
        False
        >>> net.weight.requires_grad
        True
    """
    thawed = [p for p in model.parameters() if p.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(False)
        with unchanged(model):
            yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


def _only_tensor(value: Any, site: GateSite, what: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise GatingError(
            f"gate site {site.name!r} {what} a {type(value).__name__}, not one tensor; "
            "gate a module inside or around it whose output is one tensor."
        )
    if value.is_complex():
        raise GatingError(
            f"gate site {site.name!r} {what} complex numbers; gate a module of real ones."
        )
    return value


@contextmanager
def installed(
    model: nn.Module, sites: Sequence[GateSite], function: SiteFunction
) -> Iterator[dict[str, int]]:
    """Run ``function`` on the tensor of each site in every forward pass, and check that it ran.

    :func:`gated` and :func:`recorded` are built on it. It checks after each forward pass of
    ``model`` that each site fired exactly once with a single tensor, and at the end that each fired
    at all; else it raises a GatingError. It acts in the thread that entered it, see
    :class:`~nad_attr.system.threads.Owner`. The result of ``function(site, tensor)`` replaces the
    tensor, None leaves it. Yields how often each site has fired so far.
    """
    root = unwrap(model)
    modules = site_modules(root, sites)
    total = dict.fromkeys(modules, 0)
    in_pass: dict[str, int] = {}
    batch: list[int] = []
    n_images: list[int | None] = [None]  # kept for blocks that backward runs again
    # Replicas on several devices, and checkpointed blocks run again in backward, fire more often.
    single = not (isinstance(model, nn.DataParallel) and len(model.device_ids) > 1)

    def fire(site: GateSite, tensor: Tensor) -> Tensor | None:
        total[site.name] += 1
        in_pass[site.name] = in_pass.get(site.name, 0) + 1
        (n,) = n_images
        if n is None:
            return function(site, tensor)
        new = function(site, tensor[:n])
        return None if new is None else torch.cat([new, tensor[n:]])

    def output_hook(site: GateSite) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            return fire(site, _only_tensor(output, site, "returned"))

        setattr(hook, "site_function", function)  # noqa: B010  # for move_behind_rewriters
        return hook

    def input_hook(site: GateSite) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
            if len(args) != 1:
                raise GatingError(
                    f"gate site {site.name!r} takes {len(args)} positional inputs; the input of "
                    "a layer can be gated only where it is one tensor."
                )
            taken = _only_tensor(args[0], site, "takes")
            # Not len(), which would fix the size of the batch in an exported graph.
            n = taken.shape[0]
            rows = batch[0] if batch and site.units != "channels" else n
            if rows == n or not rows or n % rows:
                new = fire(site, taken)
            else:  # an image's windows are side by side, as find_gate_sites has checked
                new = fire(site, taken.reshape(rows, -1, *taken.shape[1:]))
                new = None if new is None else new.flatten(0, 1)
            return None if new is None else (new,)

        return hook

    def begin(module: nn.Module, args: Any, kwargs: Any) -> None:
        in_pass.clear()
        batch[:] = [x.shape[0] for x in tensors_in((args, kwargs)) if x.ndim][:1]
        n_images[0] = _N_IMAGES.get()

    def end(module: nn.Module, args: Any, output: Any) -> None:
        silent = [name for name in total if not in_pass.get(name)]
        if silent:
            raise GatingError(_did_not_fire(silent))
        twice = [name for name, n in in_pass.items() if n > 1]
        if twice and single:
            raise GatingError(
                f"gate site {twice[0]!r} was called {in_pass[twice[0]]} times in one forward "
                "pass, so one gate would act in several places; gate the module around it."
            )

    with ExitStack() as stack:
        owner = stack.enter_context(owned())
        try:
            stack.enter_context(eager(model))
        except RuntimeError as error:
            raise GatingError(str(error)) from None
        if any(isinstance(module, nn.TransformerEncoderLayer) for module in root.modules()):
            # In torch 2.4 its fast path ignores hooks.
            stack.enter_context(no_attention_fast_path())
        stack.enter_context(called_projections(root, [site.name for site in sites]))
        start = root.register_forward_pre_hook(owner.only(begin), with_kwargs=True)
        stack.callback(start.remove)
        for site in sites:
            module = modules[site.name]
            handle = (
                module.register_forward_pre_hook(owner.only(input_hook(site)))
                if site.at_input
                else module.register_forward_hook(owner.only(output_hook(site)))
            )
            stack.callback(handle.remove)
        # After the sites' own hooks, so that a site which is the root itself has fired.
        stack.callback(root.register_forward_hook(owner.only(end)).remove)
        yield total
        # Reached only without an exception: never hide the caller's own.
        silent = [name for name, n in total.items() if n == 0]
        if silent:
            raise GatingError(_did_not_fire(silent))


def _did_not_fire(names: Sequence[str]) -> str:
    listed = ", ".join(repr(n) for n in names[:5]) + (" ..." if len(names) > 5 else "")
    return (
        f"gate site(s) {listed} did not fire: the forward pass does not call the module (its "
        "weights are used directly, as in MultiheadAttention.out_proj, or another network was "
        "run, or this one in another thread than the one that entered the context); take sites "
        "from find_gate_sites and run this network inside the context."
    )


def channel_shape(site: GateSite, tensor: Tensor) -> tuple[int, int]:
    """(channel axis counted from the front, number of axes) of a site's tensor, checked."""
    ndim = tensor.ndim
    dim = site.channel_dim % ndim if -ndim <= site.channel_dim < ndim else 0
    if dim == 0:
        raise GatingError(
            f"gate site {site.name!r}: channel_dim={site.channel_dim} is not a channel axis of an "
            f"output of shape {tuple(tensor.shape)}; axis 0 is the batch."
        )
    if tensor.shape[dim] != site.n_channels:
        raise GatingError(
            f"gate site {site.name!r} should have {site.n_channels} channels on axis "
            f"{site.channel_dim}, but its output has shape {tuple(tensor.shape)}; the sites "
            "belong to another network or input, or channel_dim is wrong."
        )
    return dim, ndim


def expand(gate: Tensor, site: GateSite, tensor: Tensor) -> Tensor:
    """View a gate of shape (C,) or (B, C) so that it multiplies the site's tensor."""
    dim, ndim = channel_shape(site, tensor)
    shape = [1] * ndim
    shape[dim] = gate.shape[-1]
    if gate.ndim == 2:
        if gate.shape[0] != tensor.shape[0]:
            raise GatingError(
                f"gate site {site.name!r}: gates for {gate.shape[0]} images met a batch of "
                f"{tensor.shape[0]}; give one gate vector (or task) per image, or one for all."
            )
        shape[0] = gate.shape[0]
    return gate.reshape(shape)


def multiply(site: GateSite, tensor: Tensor, gate: Tensor, mean: Tensor | None) -> Tensor:
    """``gate * tensor``, or ``gate * tensor + (1 - gate) * mean``, in the tensor's dtype."""
    factor, offset = _terms(site, tensor, gate, mean)
    return tensor * factor if offset is None else torch.addcmul(offset, tensor, factor)


def _terms(
    site: GateSite, tensor: Tensor, gate: Tensor, mean: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The factor and the offset of a site's tensor, in its shape and dtype."""
    # The product is rounded, the gate itself never is: a bfloat16 gate flips at the threshold.
    factor = expand(gate, site, tensor).to(tensor.dtype)
    if mean is None:
        return factor, None
    return factor, expand((1 - gate) * mean.to(gate.dtype), site, tensor).to(tensor.dtype)


class _Gate(torch.autograd.Function):
    """:func:`multiply` for one learned gate vector per image.

    Autograd would make two tensors of the site's size, for the gradients of the gates and of the
    site, and sum over the site once more for the mean's part.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor, mean: Tensor | None, shift: Tensor | None, site: GateSite
    ) -> Tensor:
        ctx.save_for_backward(x, gate, mean)
        ctx.site = site
        return multiply(site, x, gate, mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, mean = ctx.saved_tensors
        dim, ndim = channel_shape(ctx.site, x)
        over = [axis for axis in range(1, ndim) if axis != dim]
        factor = expand(gate, ctx.site, x).to(grad.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return None if factor is None else grad * factor, None, None, None, None
        # The product's memory serves twice.
        grad_x = grad * x
        grad_gate, grad_shift = _summed(grad_x, over, gate.dtype), None
        if mean is not None or ctx.needs_input_grad[3]:
            grad_shift = _summed(grad, over, gate.dtype)
        if mean is not None:
            grad_gate = grad_gate - mean * grad_shift
        if factor is not None:
            torch.mul(grad, factor, out=grad_x)
        return (
            grad_x if factor is not None else None,
            grad_gate,
            None,
            grad_shift if ctx.needs_input_grad[3] else None,
            None,
        )


def _summed(values: Tensor, over: list[int], dtype: torch.dtype) -> Tensor:
    # Rounded as autograd rounds. An empty list of axes would mean all axes; the copy is needed
    # because the memory of the values is used again.
    return values.sum(over).to(dtype) if over else values.to(dtype, copy=True)


def multiply_learned(
    site: GateSite, tensor: Tensor, gate: Tensor, mean: Tensor | None, shift: Tensor | None = None
) -> Tensor:
    """:func:`multiply` with gates (B, C), at less cost if they are learned; first derivatives only.

    ``shift`` is (B, C) of zeros, whose gradient is that of a constant added to each channel.
    """
    result: Tensor = _Gate.apply(tensor, gate, mean, shift, site)
    return result


def _as_mapping(
    gates: HasGates | Mapping[str, Tensor],
    sites: Sequence[GateSite] | None,
    tasks: Task | Sequence[Task] | None,
    means: Mapping[str, Tensor] | None,
) -> tuple[Mapping[str, Tensor], list[GateSite], Mapping[str, Tensor] | None]:
    from_own = getattr(gates, "_gating", None)
    if from_own is not None:
        own_gates, own_sites, own_means = from_own(tasks)
        if sites is not None and [s.name for s in sites] != [s.name for s in own_sites]:
            raise ValueError("these gates bring their own sites; leave out sites=.")
        return own_gates, list(own_sites), own_means if means is None else means
    if tasks is not None:
        raise ValueError(
            "tasks= needs TaskGates; a mapping of gates already says what each image gets."
        )
    if not isinstance(gates, Mapping):
        raise TypeError(
            f"gates must be TaskGates, a SubArchitecture or {{site name: tensor}}, "
            f"got {type(gates).__name__}."
        )
    if not gates:
        raise ValueError("gates is empty; name at least one site.")
    if sites is None:
        raise ValueError(
            "a mapping of gates needs sites= as well (from find_gate_sites), which says where "
            "each site's channels lie."
        )
    by_name = {site.name: site for site in check_sites(sites)}
    unknown = [name for name in gates if name not in by_name]
    if unknown:
        raise ValueError(
            f"gates name {unknown[0]!r}, which is not among the sites {list(by_name)}."
        )
    return gates, [site for site in sites if site.name in gates], means


def gates_and_sites(
    gates: HasGates | Mapping[str, Tensor],
    sites: Sequence[GateSite] | None = None,
    tasks: Task | Sequence[Task] | None = None,
    means: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], list[GateSite], dict[str, Tensor] | None]:
    """The checked arguments of :func:`gated`: gates, sites in the given order, ablation values.

    Gates and values are ``{site name: (C,) or (B, C)}``; None: the value is zero.
    """
    mapping, used, own_means = _as_mapping(gates, sites, tasks, means)
    values = _checked(mapping, used, "gates")
    return values, used, None if own_means is None else _checked(own_means, used, "means")


def _checked(
    gates: Mapping[str, Tensor], sites: Sequence[GateSite], what: str
) -> dict[str, Tensor]:
    check_mapping(gates, what)
    checked = {}
    for site in sites:
        try:
            value = as_tensor(gates[site.name], f"{what} of {site.name!r}")
        except KeyError:
            raise ValueError(f"{what} lack gate site {site.name!r}.") from None
        if value.ndim not in (1, 2) or value.shape[-1] != site.n_channels:
            raise ValueError(
                f"{what} of {site.name!r} have shape {tuple(value.shape)}; expected (C,) or (B, C) "
                f"with C = {site.n_channels}."
            )
        if value.is_complex() or not bool(torch.isfinite(value).all()):
            raise ValueError(f"{what} of {site.name!r} are not finite real numbers.")
        checked[site.name] = value if value.is_floating_point() else value.float()
    return checked


@contextmanager
def gated(
    model: nn.Module,
    gates: HasGates | Mapping[str, Tensor],
    *,
    sites: Sequence[GateSite] | None = None,
    tasks: Task | Sequence[Task] | None = None,
    means: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Run a network with its channels multiplied by gates inside a ``with`` block.

    Gradients flow through the product, to the images and to gates that require them. Contexts
    may be nested: the products apply one after the other. Works under autocast and with
    channels-last memory; a network wrapped by ``torch.compile`` runs eagerly inside the block.
    Gates act in the thread that entered the block, in its backward passes and in threads that it
    starts by ``asyncio.to_thread``; other threads see the whole network.
    Hooks of Captum and Zennit that rewrite the backward pass work as if the gates were part of the
    network's weights, in whatever order they are registered.

    Args:
        model: The network. It is not changed; the hooks are removed at the end, also after an
            exception.
        gates: Task gates (then say which with ``tasks``), a sub-architecture, or
            ``{site name: tensor}``: (C,) for all images, (B, C) for one gate vector per image.
        sites: The gate sites, needed with a mapping.
        tasks: With task gates: one task for the whole batch, or one task for each image.
        means: ``{site name: (C,)}``, or (B, C) for one vector per image, the values of closed
            channels: the site's output becomes ``g * x + (1 - g) * mean``. None: zero, or the
            values that the gates were learned with.

    Raises:
        GatingError: If a site is not called, is called twice, or has another shape.
        SiteError: If the network has no such module.
        TypeError: If ``gates`` is something else.
        ValueError: If gates, sites, tasks or means do not fit together or are not finite.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU()).eval()
        >>> x = torch.ones(1, 2)
        >>> with gated(net, {"1": torch.zeros(3)}, sites=[GateSite("1", 3, 1)]):
        ...     net(x)
        tensor([[0., 0., 0.]], grad_fn=<MulBackward0>)
    """
    values, used, offsets = gates_and_sites(gates, sites, tasks, means)
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        every = [*values.values(), *(offsets or {}).values()]
        if any(value.ndim == 2 for value in every):
            raise GatingError(
                "one gate vector per image cannot be split over DataParallel's devices; pass "
                "model.module, or one task for the whole batch."
            )

    rules: list[Callable[[], bool]] = []

    def function(site: GateSite, tensor: Tensor) -> Tensor:
        gate = values[site.name].to(tensor.device)
        mean = None if offsets is None else offsets[site.name].to(tensor.device)
        if rules and not gate.requires_grad:
            return gate_relevance(tensor, *_terms(site, tensor, gate, mean), tuple(rules))
        return multiply(site, tensor, gate, mean)

    modules = site_modules(model, used)

    def find_place(module: nn.Module, args: Any) -> None:
        rules.clear()
        if torch.is_grad_enabled():
            rules.extend(relevance_rules(module))
            if offsets is not None and rules and changes_weights(module):
                raise GatingError(
                    "Captum's LRP changes weights under its Gamma and Alpha-Beta rules, so that "
                    "what a channel's mean contributes cannot be told: close channels at zero "
                    "(arch.with_means(None)), keep to its Epsilon rule, or use Zennit's composites "
                    "(nad_attr.bridges.zennit)."
                )
            for site in used:
                move_behind_rewriters(modules[site.name], function)

    with owned() as owner, ExitStack() as stack:
        handle = unwrap(model).register_forward_pre_hook(owner.only(find_place))
        stack.callback(handle.remove)
        stack.enter_context(installed(model, used, function))
        yield


@contextmanager
def recorded(
    model: nn.Module, sites: Sequence[GateSite], *, clone: bool = True
) -> Iterator[dict[str, Tensor]]:
    """Keep the tensor of each site in the latest forward pass.

    Args:
        model: The network.
        sites: Where to record.
        clone: Keep detached copies, safe from a later in-place ReLU. False keeps the tensors
            themselves, with their graph: only for networks that write nothing in place.

    Yields:
        A dictionary ``{site name: tensor}`` in forward order, filled by each forward pass.

    Raises:
        GatingError: If a site is not called, is called twice, or is not one tensor.
        SiteError: If the network has no such module.

    Example:
        >>> net = torch.nn.Sequential(torch.nn.Identity(), torch.nn.ReLU(inplace=True)).eval()
        >>> with recorded(net, [GateSite("0", 2, 1)]) as activations:
        ...     _ = net(torch.tensor([[-1.0, 1.0]]))
        >>> activations["0"]
        tensor([[-1.,  1.]])
    """
    activations: dict[str, Tensor] = {}

    def function(site: GateSite, tensor: Tensor) -> None:
        channel_shape(site, tensor)
        activations[site.name] = tensor.detach().clone() if clone else tensor

    with installed(model, sites, function):
        yield activations
