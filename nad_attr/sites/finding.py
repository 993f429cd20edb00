"""Gate sites: the modules of a network at which a gate closes a channel completely.

:func:`find_gate_sites` finds them by the flow of data through one forward pass. A site is a *cut
point*: a tensor through which all data flow from the input to the output passes. Where a network
has none for a stretch, because its cells read two predecessors, the cells are the sites.

If no operator between two cut points forms new channels (an activation, a normalization, a pooling
and a depthwise convolution do not), their channels are the same. They have one site then, the
latest possible: a BatchNorm turns a channel closed before it into a constant.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from nad_attr.sites.calling import Fields, call_with
from nad_attr.sites.coverage import ELSEWHERE, NetworkCheckWarning, poor_coverage
from nad_attr.sites.dataflow import FLOAT, Flow, canonical_axis, channel_axis
from nad_attr.sites.projections import called_projections
from nad_attr.sites.site import UNITS, GateSite, SiteError, resolve_name, unwrap
from nad_attr.sites.tracing import INT8, Call, Trace, trace
from nad_attr.sites.units import check_rows, unit_sites

__all__ = ["find_gate_sites", "paper_sites"]


# How many other sites a module may hold for a site to be named after it.
_MAX_ENCLOSED = 2


Layers: TypeAlias = "str | nn.Module | GateSite | Sequence[str | nn.Module | GateSite]"


def check_kind(model: nn.Module) -> None:
    """Refuse networks on which hooks fail or do nothing; the SiteError says what to do."""
    unwrap(model)  # raises if it is not a module
    for name, module in model.named_modules():
        kind: Any = type(module)
        if problem := _problem_with(kind):
            raise SiteError(f"{f'module {name!r}' if name else 'the network'} {problem}")
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                kind = type(tensor)
                if problem := _problem_with(kind):
                    raise SiteError(f"{f'{name}.{key}'.lstrip('.')!r} {problem}")


@lru_cache(maxsize=1024)  # asked for every module in every pass
def _problem_with(cls: type) -> str:
    """Why hooks do not work on a module or a tensor of a class; empty if they do."""
    kinds = cls.__mro__
    if any(c.__name__ in _SHARDED and c.__module__.startswith(_FSDP) for c in kinds):
        return f"is sharded by FSDP, so no hook sees whole tensors; {_GATHER}"
    if any(c.__module__.startswith("torch.export") for c in kinds):
        return (
            "is a program made by torch.export, whose layers are not modules any more, so hooks "
            "and eval() do not work; give the network that it was exported from"
        )
    if any(c.__name__ == "DTensor" for c in kinds):
        return f"is a DTensor, and this process has only a part of it; {_GATHER}"
    return ""


#: Classes of ``torch.distributed.fsdp`` that sharded modules have, of both versions.
_SHARDED, _FSDP = ("FullyShardedDataParallel", "FSDPModule"), "torch.distributed"


_GATHER = (
    "gather a plain copy: state = torch.distributed.checkpoint.state_dict.get_model_state_dict("
    "model, options=StateDictOptions(full_state_dict=True)) on all ranks, then load_state_dict("
    "state) into a network that is built anew and not sharded, and give that one in eval mode"
)


def find_gate_sites(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...] | Mapping[str, Tensor],
    *,
    layers: Layers | None = None,
    channel_dim: int | Mapping[str, int] | None = None,
    at_input: bool = False,
    additional_forward_args: object = None,
    vectors: bool = True,
    forward_func: Callable[..., object] | None = None,
    units: str | Sequence[str] = "channels",
    groups: Mapping[str, int | Sequence[int]] | None = None,
) -> list[GateSite]:
    """Find the places where a gate really closes a channel, or check given ones.

    The model is run once, on fake tensors that have shapes and no values (on ``example_inputs``
    themselves, without gradients, if it looks at values); nothing about it is changed.

    Without ``layers``, sites are found: see this module's description. Neither the channels of the
    input nor those of the output (logits, probabilities) get a site. Sums that no module returns,
    as in ``x = x + self.block(x)`` in the model's own forward pass, cannot be hooked and get none.

    Args:
        model: The network, in eval mode.
        example_inputs: A tensor or a tuple of tensors the model can be called with, or a dictionary
            of them, handed over by keyword or as it is, as the model takes it; the first axis
            is the batch. One image is enough; where the model does not look at values, a tensor
            on the meta device will do.
        layers: Modules to put gates at, instead of finding them: names, modules or
            :class:`GateSite`, one or several. They need not be cut points.
        channel_dim: Axis of the channels, where it cannot be found or is found wrongly: one number
            for all sites, or a mapping from names. The batch is axis 0; -1 is the last axis.
        at_input: Put the gates of ``layers`` at the modules' inputs instead of their outputs.
        additional_forward_args: One more argument or a tuple of them, as in Captum.
        vectors: Whether layers whose output has no positions, (batch, channels), may be sites.
            False leaves out the hidden fully connected layers of a VGG. Only without ``layers``.
        forward_func: What is called in place of the model, which it runs: for models that take
            keywords, dictionaries or lists.
        units: What gates stand for, one or several: ``"channels"`` of cut points; attention
            ``"heads"``, one gate for each head, at the input of the output projection (closing head
            h is zeroing its columns); ``"neurons"``, the hidden units of MLPs, at the input of the
            second linear layer. Only without ``layers``.
        groups: ``{site name: groups}``: channels that open and close as one gate, as in
            :class:`GateSite`.

    Returns:
        The sites in forward order.

    Raises:
        SiteError: If a layer does not exist, is not called, is called more than once, does not
            return one tensor, shares its tensor with another one, or does not influence the
            output; if the axis of its channels is not known; if the model is in train mode, is
            compiled or scripted or fails on the inputs; if no site is found.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        ...                       nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()
        >>> find_gate_sites(model, torch.zeros(1, 3, 16, 16))
        [GateSite(name='2', n_channels=8, channel_dim=1, at_input=False)]
        >>> find_gate_sites(model, torch.zeros(1, 3, 16, 16), layers=["0", model[3]])[0].name
        '0'
        >>> find_gate_sites(model, torch.zeros(1, 3, 16, 16), groups={"2": 4})[0].n_gates
        4
        >>> layer = nn.TransformerEncoderLayer(6, 2, 8, batch_first=True).eval()
        >>> for site in find_gate_sites(layer, torch.zeros(1, 5, 6), units=["heads", "neurons"]):
        ...     print(site.name, site.n_gates, site.units)
        self_attn.out_proj 2 heads
        linear2 8 neurons
    """
    model = _checked_model(model)
    if isinstance(example_inputs, Mapping):
        fields = Fields(tuple(example_inputs))
        forward_func = call_with(model if forward_func is None else forward_func, fields)
        example_inputs = tuple(example_inputs.values())
    inputs = _checked_inputs(example_inputs)
    asked = None if layers is None else asked_layers(model, layers, at_input)
    if asked is None and at_input:
        raise SiteError("at_input=True needs layers=: the modules at whose inputs to put the gates")
    wanted = _checked_units(units, asked is not None)
    others = [unit for unit in wanted if unit != "channels"]
    called = None if "heads" in others else [a.name for a in asked or ()]
    with called_projections(model, called):
        flow, traced = _traced(model, inputs, additional_forward_args, forward_func)
    if asked is None and not others:
        sites = _found_sites(flow, channel_dim, vectors)
        if vectors and (message := _coverage(model, flow, traced, sites)):
            warnings.warn(message, NetworkCheckWarning, stacklevel=2)
        return grouped(sites, groups)
    if asked is not None:
        sites = _user_sites(flow, asked, channel_dim)
    else:
        found = [pair for unit in others for pair in unit_sites(model, flow, unit)]
        if "channels" in wanted:
            plain = flow
            if "heads" in others:  # projections that are called add to the graph
                plain, _ = _traced(model, inputs, additional_forward_args, forward_func)
            names = {site.name for _, site in found}
            for site in _found_sites(plain, channel_dim, vectors):
                if site.name in names:
                    raise SiteError(
                        f"{site.name!r} is a site of two kinds of units; ask for one kind"
                    )
                found.append((_one_call(flow, site.name).output or 0, site))
        sites = [site for _, site in sorted(found, key=lambda pair: pair[0])]
    rows = {s.name: flow.calls[s.name][0].argument_shape for s in sites if s.units != "channels"}
    windows = [s for s in sites if (rows.get(s.name) or (flow.batch_size,))[0] != flow.batch_size]
    if windows:  # several rows of each image on the first axis
        run = model if forward_func is None else forward_func
        arguments = as_tuple(additional_forward_args)
        check_rows(model, windows, inputs, lambda *images: run(*images, *arguments))
    return grouped(sites, groups)


def _checked_units(units: object, layers: bool) -> list[str]:
    """The kinds of units, in order and once each."""
    listed = [units] if isinstance(units, str) else [*units] if isinstance(units, Iterable) else []
    unknown = [unit for unit in listed if unit not in UNITS]
    if unknown or not listed:
        got = unknown[0] if unknown else units
        raise SiteError(f"units must be one or several of {UNITS}, got {got!r}")
    if layers and listed != ["channels"]:
        raise SiteError(
            "units= finds sites, and layers= names them: give one of the two, or name sites as "
            "GateSite(name, n_channels, -1, at_input=True, groups=n_heads, units='heads')"
        )
    return list(dict.fromkeys(listed))


def grouped(
    sites: Sequence[GateSite], groups: Mapping[str, int | Sequence[int]] | None
) -> list[GateSite]:
    """The sites, with the given groups of channels as one gate."""
    if groups is None:
        return list(sites)
    if not isinstance(groups, Mapping):
        raise SiteError(f"groups must be {{site name: groups}}, got {type(groups).__name__}")
    unknown = [name for name in groups if all(site.name != name for site in sites)]
    if unknown:
        raise SiteError(
            f"groups name {unknown[0]!r}, which is not a site; the sites are "
            f"{', '.join(repr(site.name) for site in sites)}"
        )
    # GateSite checks the groups.
    return [
        dataclasses.replace(site, groups=groups[site.name]) if site.name in groups else site
        for site in sites
    ]


def site_links(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    sites: Sequence[GateSite],
    *,
    additional_forward_args: object = None,
    forward_func: Callable[..., Any] | None = None,
) -> dict[str, tuple[str, ...]]:
    """For each site, the names of the sites that it reads with no other site in between.

    In forward order, ``"output"`` last; the first site reads none. ``sites`` are sites that every
    path passes, the cells of a network of cells, attention heads and hidden neurons. If a path of
    the data leads around one, a SiteError says which sites to take.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2), nn.ReLU(),
        ...                       nn.Linear(2, 2)).eval()
        >>> site_links(model, torch.zeros(1, 2), [GateSite("1", 3), GateSite("3", 2)])
        {'1': (), '3': ('1',), 'output': ('3',)}
    """
    model = _checked_model(model)
    inputs = _checked_inputs(example_inputs)
    with called_projections(model, [site.name for site in sites if site.at_input]):
        flow, _ = _traced(model, inputs, additional_forward_args, forward_func)
    cuts = flow.cut_points()
    cells = {call.output for call in _cells(flow, cuts, set())}
    nodes: dict[int, str] = {}
    for site in sites:
        call, inner = _one_call(flow, site.name), site.units != "channels"
        node = _gated_node(flow, call, site.at_input, windows=inner)
        if node not in cuts and node not in cells and site.units == "channels":
            raise SiteError(
                f"a path of the data leads around gate site {site.name!r} (a parallel branch), "
                f"so not all data flows through it; {_cut_remedy(flow, site.name, cuts)}"
            )
        if site.name == "output":
            raise SiteError(
                "a gate site named 'output' cannot be told from the network's output here; take "
                "another module that returns the same tensor"
            )
        if node in nodes:
            raise SiteError(
                f"gate sites {nodes[node]!r} and {site.name!r} hold the same tensor; leave one out"
            )
        nodes[node] = site.name
    links: dict[str, tuple[str, ...]] = {}
    ends = [(nodes[node], flow.inputs_of(node)) for node in sorted(nodes)]
    for name, waiting in [*ends, ("output", [*flow.sinks])]:
        # The walk back to the input stops at sites.
        seen: set[int] = set()
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                waiting += [] if node in nodes else flow.inputs_of(node)
        links[name] = tuple(nodes[node] for node in sorted(seen & set(nodes)))
    return links


def _traced(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    additional_forward_args: object,
    forward_func: Callable[..., Any] | None = None,
) -> tuple[Flow, Trace]:
    """The flow of data through one forward pass, and its trace."""
    try:
        traced = trace(model, inputs, as_tuple(additional_forward_args), forward_func)
    except Exception as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        arguments = as_tuple(additional_forward_args)
        size = fixed_batch_size(model, inputs, arguments, forward_func, str(error))
        if size is not None:  # sites are the same in any batch
            repeated = tuple(x[[i % len(x) for i in range(size)]] for x in inputs)
            return _traced(model, repeated, additional_forward_args, forward_func)
        remedy = (
            "If the model looks at values, give real tensors instead of meta tensors."
            if any(tensor.is_meta for tensor in inputs)
            else "Give inputs that model(*example_inputs, *additional_forward_args) accepts, or a "
            "forward_func that hands them over."
        )
        raise SiteError(
            f"the model cannot be run on example_inputs of shape {shapes}: "
            f"{type(error).__name__}: {error}. {remedy}"
        ) from error
    times = sum(not call.name for call in traced.calls)
    if times > 1:
        raise SiteError(
            f"forward_func runs the model {times} times, so one gate would stand for several "
            "tensors; run it once and make what is wanted of its one output"
        )
    return Flow(model, traced), traced


def _cut_remedy(flow: Flow, name: str, cuts: Iterable[int]) -> str:
    """Which site to take in place of one that is not a cut."""
    at = {call.output: call.name for call in flow.gateable()}
    named = {at[node] for node in cuts if node in at}
    outer = name
    while "." in outer:
        outer = outer.rpartition(".")[0]
        if outer in named:
            return f"take the module around it, {outer!r}, which every path passes"
    return "take the sites that find_gate_sites(model, images) finds, which every path passes"


def paper_sites(architecture: str) -> list[GateSite]:
    """The gate sites of the NAD paper's authors, by torchvision's module names.

    Source: released code of Hu et al., "Architecture Disentanglement for Deep Neural Networks",
    ICCV 2021 (arXiv 2003.13268). ``"darts"`` is the DARTS_V2 ImageNet network (48 channels, 14
    cells), of which ``benchmarks/darts.py`` has a version with these names.

    Args:
        architecture: ``"vgg16"``, ``"resnet50"``, ``"densenet121"`` or ``"darts"``.

    Returns:
        The sites in forward order.

    Raises:
        SiteError: If the architecture is none of these.

    Example:
        >>> sites = paper_sites("resnet50")
        >>> len(sites), sum(site.n_channels for site in sites)
        (17, 15168)
    """
    channels = _PAPER.get(architecture) if isinstance(architecture, str) else None
    if channels is None:
        known = ", ".join(map(repr, _PAPER))
        raise SiteError(f"the paper has no architecture {architecture!r}; it has {known}")
    return [GateSite(name, n_channels) for name, n_channels in channels.items()]


_PAPER: dict[str, dict[str, int]] = {
    "vgg16": {
        **{"features.1": 64, "features.4": 64, "features.6": 128, "features.9": 128},
        **{f"features.{i}": 256 for i in (11, 13, 16)},
        **{f"features.{i}": 512 for i in (18, 20, 23, 25, 27)},
        "avgpool": 512,
    },
    "resnet50": {
        "maxpool": 64,
        **{
            f"layer{stage}.{block}": 128 * 2**stage
            for stage, n_blocks in ((1, 3), (2, 4), (3, 6), (4, 3))
            for block in range(n_blocks)
        },
    },
    "densenet121": {
        **{"features.pool0": 64, "features.denseblock1": 256, "features.transition1": 128},
        **{"features.denseblock2": 512, "features.transition2": 256},
        **{"features.denseblock3": 1024, "features.transition3": 512, "features": 1024},
    },
    "darts": {
        **{"stem0": 48, "stem1": 48},
        **{f"cells.{i}": 192 if i < 4 else 384 if i < 9 else 768 for i in range(14)},
    },
}


# Layers that the user names


def _checked_model(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise SiteError(
            f"model must be a torch.nn.Module, got {type(model).__name__}; for a function, give "
            "the module that it calls"
        )
    model = unwrap(model)
    check_kind(model)
    for name, module in model.named_modules():
        called = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise SiteError(
                f"{called} is compiled by torch.jit, which hides its data flow and ignores hooks; "
                "give the model it was made from"
            )
        if module.training:
            raise SiteError(f"{called} is in train mode; call model.eval() first")
    if any(torch.nn.parameter.is_lazy(p) for p in (*model.parameters(), *model.buffers())):
        raise SiteError("the model has uninitialized lazy modules; run one forward pass first")
    return model


#: Batch sizes that are often written into a forward pass or an export.
_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 10, 20, 50, 100, 12, 24, 48, 3, 5, 6, 25, 96, 200)


def fixed_batch_size(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    arguments: tuple[object, ...] = (),
    forward_func: Callable[..., object] | None = None,
    error: str = "",
) -> int | None:
    """The batch size that a model runs on, if it fails on that of ``inputs``.

    Numbers in ``error``, the message of that failure, are tried first. None: it fails on other
    sizes as well, or for other reasons.
    """
    if any(not tensor.ndim or not len(tensor) for tensor in inputs):
        return None

    def runs(n: int) -> bool:
        shaped = [torch.empty(n, *x.shape[1:], dtype=x.dtype, device="meta") for x in inputs]
        try:
            trace(model, shaped, arguments, forward_func)  # shapes alone cost next to nothing
        except Exception:
            return False
        return True

    named = [int(n) for n in re.findall(r"\d{1,4}", error)]
    sizes = [n for n in dict.fromkeys((*named, *_BATCH_SIZES)) if 0 < n != len(inputs[0])]
    size = next((n for n in sizes if runs(n)), None)
    # If most sizes work, the size is not fixed: a squeeze() of one image, for example.
    return None if size is None or (runs(size + 1) and runs(size + 2)) else size


def _checked_inputs(example_inputs: object) -> tuple[Tensor, ...]:
    inputs = tuple(example_inputs) if isinstance(example_inputs, list) else example_inputs
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    if not inputs or not all(isinstance(tensor, Tensor) for tensor in inputs):
        kinds = ", ".join(type(item).__name__ for item in inputs) or "nothing"
        raise SiteError(f"example_inputs must be a tensor or a tuple of tensors, got {kinds}")
    return inputs


def as_tuple(arguments: object) -> tuple[Any, ...]:
    """Arguments as a tuple: None is none, a tuple stays, anything else is one."""
    if arguments is None:
        return ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


@dataclass(frozen=True)
class _Asked:
    """A layer that the user asks for; ``site``: the GateSite that names it."""

    name: str
    at_input: bool
    site: GateSite | None = None


def asked_layers(model: nn.Module, layers: Layers, at_input: bool) -> list[_Asked]:
    """Resolve names, modules and sites to canonical names."""
    if isinstance(layers, (str, nn.Module, GateSite)):
        layers = [layers]
    if not isinstance(layers, Iterable):
        raise SiteError(f"layers must be names, modules or GateSites, got {type(layers).__name__}")
    modules = dict(model.named_modules(remove_duplicate=False))
    canonical = {id(module): name for name, module in model.named_modules()}
    asked: list[_Asked] = []
    for layer in layers:
        site = layer if isinstance(layer, GateSite) else None
        if isinstance(layer, nn.Module):
            name = canonical.get(id(unwrap(layer)))
            if name is None:
                raise SiteError(
                    f"layer {_short(layer)} is not part of the model; name a module of "
                    "model.named_modules() (a copy of the model has modules of its own)"
                )
        else:
            written = site.name if site is not None else layer
            if not isinstance(written, str):
                raise SiteError(
                    f"layers must be names, modules or GateSites, got {type(layer).__name__}"
                )
            name = resolve_name(written, modules, canonical)
        if not name:
            raise SiteError("the whole model cannot be a gate site; name a module inside it")
        if any(other.name == name for other in asked):
            raise SiteError(f"layer {name!r} is given twice; give each layer once")
        asked.append(_Asked(name, site.at_input if site is not None else at_input, site))
    if not asked:
        raise SiteError("layers is empty; name at least one layer, or leave it out to find sites")
    return asked


def _short(module: nn.Module) -> str:
    text = repr(module).splitlines()[0]
    return text if text.endswith(")") else type(module).__name__


# Sites that are found


def _found_sites(
    flow: Flow, channel_dim: int | Mapping[str, int] | None, vectors: bool
) -> list[GateSite]:
    if not flow.path and not flow.int8:
        raise SiteError(
            "the output does not depend on the inputs by PyTorch operators, so no site can be "
            f"found; name the layers yourself, with layers={ELSEWHERE}"
        )
    calls_at: dict[int, list[Call]] = {}
    for call in flow.gateable():
        assert call.output is not None
        calls_at.setdefault(call.output, []).append(call)
    cuts = flow.cut_points()
    chosen: dict[int, list[Call]] = {}
    for segment in _segments(flow, cuts):
        index = _site_of_segment(flow, segment, calls_at, channel_dim)
        if index is not None:
            chosen[index] = calls_at[index]
    for cell in _cells(flow, cuts, set(chosen)):
        assert cell.output is not None
        chosen[cell.output] = [cell]
    sites: list[GateSite] = []
    for index in sorted(chosen):
        call = _best_name(flow, chosen[index], set(chosen) - {index})
        assert call.shape is not None
        if vectors or len(call.shape) > 2:
            axes = flow.nodes[index].axes
            if len(axes) != 1:  # of a product of matrices, as attention by convolutions makes
                axes = _axes_from_readers(flow, index) or axes
            sites.append(_site(call.name, call.shape, axes, channel_dim, at_input=False))
    if not sites and flow.int8:
        raise SiteError(f"no gate site found: {flow.int8}")
    if not sites:
        raise SiteError(
            "no gate site found: no module returns a hidden tensor on which all of the output "
            "depends"
            + ("" if vectors else " and which has positions (vectors=False)")
            + f"; name the layers yourself, with layers={ELSEWHERE}"
        )
    _check_names(channel_dim, [site.name for site in sites])
    return sites


def _segments(flow: Flow, cuts: list[int]) -> list[list[int]]:
    """Cut points in runs that share their channels, without those of the input and the output."""
    runs: list[list[int]] = [[-1]]
    for index in [*cuts, len(flow.nodes)]:
        if flow.carries(runs[-1][-1], index):
            runs[-1].append(index)
        else:
            runs.append([index])
    return [run for run in runs if run[0] != -1 and run[-1] != len(flow.nodes)]


def _site_of_segment(
    flow: Flow,
    segment: list[int],
    calls_at: Mapping[int, list[Call]],
    channel_dim: int | Mapping[str, int] | None,
) -> int | None:
    """The cut point of a segment at which a gate closes its channels completely."""
    candidates = [index for index in segment if index in calls_at]
    if not candidates:
        return None
    n_channels: dict[int, int] = {}
    for index in candidates:
        shape = flow.nodes[index].shape
        axis = channel_axis(shape, flow.nodes[index].axes)
        if axis is None:
            axis = _override(channel_dim, [call.name for call in calls_at[index]])
        if axis is not None and -len(shape) <= axis < len(shape):
            n_channels[index] = shape[axis]
    if not n_channels:
        # Naming it raises the error that asks for channel_dim.
        return candidates[-1]
    first = next(iter(n_channels.values()))
    able = [index for index, n in n_channels.items() if n == first]
    # After a squeeze-and-excitation a closed channel would still affect the others' scale.
    able = [i for i in able if not flow.mixing(flow.between(segment[0], i))] or able
    able = [i for i in able if math.prod(flow.nodes[i].shape[1:]) > first] or able
    # Of tensors that hold the same values in another layout, take the one that a block returns.
    same = [able[-1]]
    for earlier in reversed(able[:-1]):
        if not all(flow.nodes[i].moves for i in flow.between(earlier, same[0])):
            break
        same.insert(0, earlier)
    blocks = flow.has_children - flow.plain
    by_block = [i for i in same if any(call.name in blocks for call in calls_at[i])]
    return (by_block or same)[0]


def _cells(flow: Flow, cuts: list[int], chosen: set[int]) -> list[Call]:
    """Modules that are the sites of stretches without cut points.

    If one module makes all channels of a stretch (a residual or dense block), it has no sites
    inside. Otherwise its largest modules are its cells, if they form a chain, or if no module
    encloses the stretch.
    """
    gateable = {call.name for call in flow.gateable()}
    spans = flow.formed()
    cells: list[Call] = []
    for start, stop in itertools.pairwise([-1, *cuts, len(flow.nodes)]):
        stretch = flow.mixing(flow.between(start, stop))
        if len(stretch) < 2 or any(mixing == stretch for _, mixing in spans):
            continue
        inside = [
            (call, mixing)
            for call, mixing in spans
            if mixing and mixing <= stretch
            if call.name in flow.has_children and call.name in gateable
        ]
        largest = [
            call
            for call, mixing in inside
            if not any(
                mixing < other or (mixing == other and outer.entered < call.entered)
                for outer, other in inside
            )
        ]
        enclosed = any(stretch <= mixing for _, mixing in spans)
        if len(largest) < 2 or (enclosed and not _chained(flow, largest)):
            continue
        for call in largest:
            assert call.output is not None
            if call.output not in chosen and not _ends(flow, call.output, stop):
                cells.append(call)
    return cells


def _ends(flow: Flow, index: int, stop: int) -> bool:
    """Whether a cell has the channels of the end of its stretch, or of the output."""
    if stop in flow.on_path and flow.carries(index, stop):
        return True
    return not flow.mixing(flow.after(index))


def _chained(flow: Flow, calls: Sequence[Call]) -> bool:
    """Whether one of the calls reads what another one returned."""
    for first in calls:
        assert first.output is not None
        reached = flow.after(first.output)
        if any(not reached.isdisjoint(flow.inside(call)) for call in calls if call is not first):
            return True
    return False


def _best_name(flow: Flow, calls: Sequence[Call], others: set[int]) -> Call:
    """The call to name a site after, of nested modules that return the same tensor.

    The innermost block; else the innermost subclass of Sequential; else the innermost module.
    Modules that hold many other sites are backbones, not blocks.
    """
    innermost = sorted(calls, key=lambda call: call.entered, reverse=True)
    blocks = [
        call
        for call in innermost
        if call.name in flow.has_children
        and call.name not in flow.plain
        and sum(call.start <= index < call.end for index in others) <= _MAX_ENCLOSED
    ]
    proper = [call for call in blocks if call.name not in flow.sequential]
    return (proper or blocks or innermost)[0]


#: A warning is given from this share and number of layers without a site.
_MIN_UNCOVERED_SHARE, _MIN_UNCOVERED_LAYERS = 0.25, 4


def _coverage(model: nn.Module, flow: Flow, traced: Trace, sites: Sequence[GateSite]) -> str | None:
    """The warning if the sites leave out much of the network."""
    everything = flow.mixing(flow.path)
    at = [(site.name, flow.calls[site.name][0].output or 0) for site in sites]
    spans = [mixing for _, mixing in flow.formed()]
    gaps = []
    for (before, start), (after, stop) in itertools.pairwise(
        [("", -1), *at, ("", len(flow.nodes))]
    ):
        layers = flow.mixing(flow.between(start, stop))
        if len(layers) < max(_MIN_UNCOVERED_LAYERS, _MIN_UNCOVERED_SHARE * len(everything)):
            continue
        # One module that makes all of it is a block: the site after it covers it.
        if any(
            layers <= span and len(span) <= 1.5 * len(layers) < len(everything) for span in spans
        ):
            continue
        inside = [
            call.name
            for call in flow.gateable()
            if call.output is not None and start < call.output < stop
            if channel_axis(call.shape or (), flow.nodes[call.output].axes) is not None
            if flow.mixing(flow.after(call.output))
            if flow.mixing(flow.inside(call)) or flow.nodes[call.output].op.endswith("norm")
        ]
        repeated = {
            name: len(calls)
            for name, calls in flow.calls.items()
            if name and len(calls) > 1
            if 2 * sum(len(layers & flow.mixing(flow.inside(call))) for call in calls) > len(layers)
        }
        gaps.append((before, after, len(layers), inside, repeated))
    missed: list[str] = []
    if traced.on_values:
        reached = {name[:i] for name in flow.calls for i in range(len(name) + 1)}
        missed = [
            name
            for name, module in model.named_modules()
            if name not in reached and name.rpartition(".")[0] in reached
            if any(True for _ in module.parameters())
            if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        ]
    return poor_coverage(gaps, len(everything), missed)


# Sites that are named


def _user_sites(
    flow: Flow, asked: Sequence[_Asked], channel_dim: int | Mapping[str, int] | None
) -> list[GateSite]:
    ordered: list[tuple[int, GateSite]] = []
    outputs: dict[int, str] = {}
    for layer in asked:
        call = _one_call(flow, layer.name)
        units = layer.site.units if layer.site is not None else "channels"
        node = _gated_node(flow, call, layer.at_input, windows=units != "channels")
        shape = call.argument_shape if layer.at_input else call.shape
        assert shape is not None
        if not layer.at_input:
            if node in outputs:
                raise SiteError(
                    f"layers {outputs[node]!r} and {layer.name!r} return the same tensor, which "
                    "would be gated twice; leave one out"
                )
            outputs[node] = layer.name
        axes = flow.nodes[node].axes or (_axes_from_readers(flow, node) if layer.at_input else None)
        given: int | Mapping[str, int] | None = channel_dim
        if layer.site is not None and _override(channel_dim, [layer.name]) is None:
            given = layer.site.channel_dim
        site = _site(layer.name, shape, axes or frozenset(), given, at_input=layer.at_input)
        if layer.site is not None:
            if layer.site.n_channels != site.n_channels:
                raise SiteError(
                    f"site {layer.name!r} is said to have {layer.site.n_channels} channels, but "
                    f"its tensor of shape {shape} has {site.n_channels} on axis {site.channel_dim}"
                )
            site = dataclasses.replace(site, groups=layer.site.groups, units=layer.site.units)
        ordered.append((node, site))
    _check_names(channel_dim, [layer.name for layer in asked])
    return [site for _, site in sorted(ordered, key=lambda pair: pair[0])]


def _one_call(flow: Flow, name: str) -> Call:
    calls = flow.calls.get(name, [])
    remedy = _remedy(flow, name)
    if not calls:
        raise SiteError(
            f"layer {name!r} is never called in the forward pass, so a hook on it does not fire "
            f"(its weights may be used by the module around it, or not at all); {remedy}"
        )
    if len(calls) > 1:
        raise SiteError(
            f"layer {name!r} is called {len(calls)} times in one forward pass, so one gate would "
            f"stand for several tensors; {remedy}"
        )
    return calls[0]


def _gated_node(flow: Flow, call: Call, at_input: bool, *, windows: bool = False) -> int:
    """The node at which a gate of this call acts; an error if no gate is possible there."""
    name, remedy = call.name, _remedy(flow, call.name)
    shape = call.argument_shape if at_input else call.shape
    node = call.argument if at_input else call.output
    verb = "is given" if at_input else "returns"
    if shape is None:
        kind = call.argument_kind if at_input else call.kind
        if kind == INT8:
            raise SiteError(f"layer {name!r} {verb} {kind}; {FLOAT}")
        needed = "input (by position, and no other)" if at_input else "output, of real numbers"
        raise SiteError(
            f"layer {name!r} {verb} {kind}; a gate needs one tensor as {needed}; {remedy}"
        )
    if node is None:
        raise SiteError(f"what layer {name!r} {verb} does not depend on the input; {remedy}")
    if flow.path and node not in flow.on_path:
        raise SiteError(
            f"what layer {name!r} {verb} does not reach the model's output, so a gate there "
            f"changes nothing; {remedy}"
        )
    one = shape[0] == flow.batch_size or (windows and shape[0] % flow.batch_size == 0)
    if len(shape) < 2 or not one:
        raise SiteError(
            f"layer {name!r} {verb} a tensor of shape {shape}, whose first axis is not the "
            f"batch of {flow.batch_size}; a gate needs (batch, ...); {remedy}"
        )
    return node


def _remedy(flow: Flow, name: str) -> str:
    """Which module to gate instead."""
    gateable = {call.name for call in flow.gateable()}
    outer = name
    while "." in outer:
        outer = outer.rpartition(".")[0]
        if outer in gateable:
            return f"gate the module around it, {outer!r}, instead"
    inner = [other for other in gateable if other.startswith(f"{name}.")]
    if inner:
        last = max(inner, key=lambda other: flow.calls[other][0].returned)
        return f"gate a module inside it, such as {last!r}, instead"
    return "leave layers out to have sites found"


def _axes_from_readers(flow: Flow, node: int) -> frozenset[int] | None:
    """The axis on which the operators that read a tensor expect its channels."""
    for reader in (flow.nodes[index] for index in flow.path):
        if node in reader.inputs and ("conv" in reader.op or "batch_norm" in reader.op):
            return frozenset({1})
    return None


# Both


def _site(
    name: str,
    shape: tuple[int, ...],
    axes: frozenset[int],
    channel_dim: int | Mapping[str, int] | None,
    *,
    at_input: bool,
) -> GateSite:
    """A site of a tensor, on the given axis or the one that was found."""
    axis = _override(channel_dim, [name])
    if axis is None:
        axis = channel_axis(shape, axes)
        if axis is None:
            raise SiteError(
                f"the axis of the channels of layer {name!r}, of shape {shape}, is not known; say "
                f"which it is: channel_dim={{{name!r}: 1}}, or -1 if they come last"
            )
    if not isinstance(axis, int):
        raise SiteError(f"channel_dim of layer {name!r} must be a whole number, got {axis!r}")
    if not -len(shape) <= axis < len(shape) or axis % len(shape) == 0:
        raise SiteError(
            f"channel_dim {axis} is not a channel axis of layer {name!r}, of shape {shape}; give "
            f"one from 1 to {len(shape) - 1}, or -1"
        )
    return GateSite(name, shape[axis], canonical_axis(shape, axis), at_input)


def _override(channel_dim: int | Mapping[str, int] | None, names: Sequence[str]) -> int | None:
    if isinstance(channel_dim, Mapping):
        return next((channel_dim[name] for name in names if name in channel_dim), None)
    return channel_dim


def _check_names(channel_dim: int | Mapping[str, int] | None, names: Sequence[str]) -> None:
    if isinstance(channel_dim, Mapping):
        unknown = [name for name in channel_dim if name not in names]
        if unknown:
            raise SiteError(
                f"channel_dim names {unknown[0]!r}, which is not a site; the sites are "
                f"{', '.join(map(repr, names))}"
            )
