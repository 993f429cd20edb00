"""Units of a transformer: attention heads, and the hidden units of its MLPs.

Both are closed at the input of a linear layer. The output of head h fills some channels of the
output projection's input: a gate for this group of channels closes the head, as zeroing the
projection's columns does. A hidden unit is one channel of the second layer's input. Sites are found
by the flow of data, not by the names of modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from nad_attr.sites.dataflow import Flow
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.projections import called_projections, uncalled_projections
from nad_attr.sites.site import GateSite, SiteError
from nad_attr.sites.tracing import Call
from nad_attr.system.rng import isolated_rng

__all__ = ["check_rows", "unit_sites"]


def unit_sites(model: nn.Module, flow: Flow, units: str) -> list[tuple[int, GateSite]]:
    """The sites of a network's ``"heads"`` or ``"neurons"``, each with its node.

    The flow has to be traced inside :func:`~nad_attr.sites.projections.called_projections`.


    Raises:
        SiteError: If there are none; says what to do.
    """
    uncalled = uncalled_projections(model)
    readers: dict[int, list[int]] = {}
    for index in flow.path:
        for node in flow.inputs_of(index):
            readers.setdefault(node, []).append(index)
    # The calls that make the outputs of layers, by node.
    made = {
        index: call
        for call in _linear_calls(model, flow)
        for index in flow.mixing(flow.inside(call))
    }
    found = []
    for call in _linear_calls(model, flow):
        at, shape = call.argument, call.argument_shape
        if at is None or shape is None or len(shape) < 2:
            continue
        n = shape[-1]
        if units == "heads" and shape[0] % flow.batch_size == 0:
            n_heads = _n_heads(flow, at, n, uncalled.get(call.name))
            if n_heads is not None:
                site = GateSite(call.name, n, -1, at_input=True, groups=n_heads, units="heads")
                found.append((at, site))
        elif units == "neurons" and _is_hidden(flow, call, at, made, readers):
            if shape[0] != flow.batch_size:
                raise SiteError(
                    f"the hidden neurons that {call.name!r} reads are held in a tensor of shape "
                    f"{shape}, whose first axis is not the batch of {flow.batch_size}; "
                    "build the network with batch_first=True"
                )
            dim = 1 if len(shape) == 2 else -1
            found.append((at, GateSite(call.name, n, dim, at_input=True, units="neurons")))
    if not found:
        raise SiteError(
            "no attention heads found: no nn.Linear that is called once reads what attention "
            "returns. Name the output projections yourself, as "
            "layers=[GateSite('blocks.0.attn.proj', 768, -1, at_input=True, groups=12, "
            "units='heads')]"
            if units == "heads"
            else "no hidden neurons found: no nn.Linear that is called once reads another's output "
            "through an activation alone. Name the second layers yourself, with layers= and "
            "at_input=True"
        )
    return found


def _linear_calls(model: nn.Module, flow: Flow) -> list[Call]:
    """Calls of the linear layers that are called once."""
    return [
        calls[0]
        for name, calls in flow.calls.items()
        if len(calls) == 1 and isinstance(model.get_submodule(name), nn.Linear)
    ]


def _n_heads(flow: Flow, node: int, n: int, attention: nn.Module | None) -> int | None:
    """How many heads a linear layer's input holds side by side; None: it is not attention's."""
    if attention is not None:
        return int(attention.num_heads)  # type: ignore[arg-type]
    n_heads: int | None = None
    # Walk back over operators that form no new channels, to attention's product.
    while True:
        here = flow.nodes[node]
        if len(here.shape) > 2 and here.shape[-1] < n and here.shape[-1] * here.shape[-2] == n:
            n_heads = n_heads or here.shape[-2]
        if "attention" in here.op:
            return n_heads
        if here.mixes:
            return n_heads if here.op in ("bmm", "matmul") and _is_weighted(flow, node) else None
        before = flow.inputs_of(node)
        if len(before) != 1:
            return None
        node = before[0]


def _is_weighted(flow: Flow, product: int) -> bool:
    """Whether a product's factor comes from a softmax, without new channels in between."""
    waiting = list(flow.inputs_of(product))
    while waiting:
        node = flow.nodes[index := waiting.pop()]
        if "softmax" in node.op:
            return True
        if not node.mixes:
            waiting += flow.inputs_of(index)
    return False


def _is_hidden(
    flow: Flow, call: Call, node: int, made: dict[int, Call], readers: dict[int, list[int]]
) -> bool:
    """Whether a linear layer's input is made of other linear layers' outputs, for it alone.

    A residual stream is not: other layers read it as well.
    """
    seen: set[int] = set()
    waiting, layers = [node], set[int]()
    while waiting:
        index = waiting.pop()
        if index in seen:
            continue
        seen.add(index)
        if not flow.nodes[index].mixes:
            before = flow.inputs_of(index)
            if index in flow.sources or not before:
                return False
            waiting += before
        elif index in made:
            layers.add(index)
        else:
            return False
    seen_or_own = seen.union(flow.inside(call))
    return bool(layers) and all(
        reader in seen_or_own for index in seen for reader in readers.get(index, [])
    )


def check_rows(
    model: nn.Module,
    sites: Sequence[GateSite],
    inputs: Sequence[Tensor],
    run: Callable[..., object],
) -> None:
    """Check on two images that an image's windows are side by side at some projections' inputs.

    Windowed attention has the windows of all images on the first axis. An image's own gates meet
    its own windows only if these come image by image.

    Raises:
        SiteError: If they do not, or if the inputs have no values to see it by.
    """
    names = ", ".join(repr(site.name) for site in sites[:3])
    if not all(x.is_floating_point() and not x.is_meta and not x.is_sparse for x in inputs):
        raise SiteError(
            f"the attention at {names} runs on windows, which are matched to images by real "
            "values: give a float tensor with values as example_inputs"
        )
    generator = torch.Generator("cpu").manual_seed(0)
    noise = [torch.randn(2, *x.shape[1:], generator=generator, device="cpu").to(x) for x in inputs]
    seen: list[dict[str, Tensor]] = []
    with called_projections(model), unchanged(model), isolated_rng(), torch.no_grad():
        for pair in ([0, 1], [0, 0], [1, 1]):
            read: dict[str, Tensor] = {}
            handles = [
                model.get_submodule(site.name).register_forward_pre_hook(_keeping(read, site.name))
                for site in sites
            ]
            try:
                run(*(x[pair] for x in noise))
            finally:
                for handle in handles:
                    handle.remove()
            seen.append(read)
    both, first, second = seen
    for name, value in both.items():
        half = len(value) // 2
        expected = torch.cat([first[name][:half], second[name][half:]])
        near = torch.allclose(value, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
        if not near or len(value) % 2:
            raise SiteError(
                f"at {name!r} the windows of an image do not lie side by side on the first axis, "
                "so gates cannot be told from image to image; name other sites, with layers="
            )


def _keeping(read: dict[str, Tensor], name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        read[name] = args[0].detach().clone()

    return hook
