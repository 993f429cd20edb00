"""Let another library's attribution run on a network, and leave the network as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nad_attr.gating.hooks import site_modules
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.projections import called_projections
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.system.rng import isolated_rng
from nad_attr.system.threads import alone, guarded, is_owned, owned

__all__ = ["Explained", "flowing_copies", "own_copy", "restored", "untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo all changes of a network's modules and of the global random numbers at the end.

    See :func:`restored`.
    """
    with isolated_rng(0), restored(model):
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo all changes of a network's modules at the end, also after an exception.

    These are left hooks, added attributes (by Captum's DeepLift and Zennit's canonizers) and
    exchanged parameters. Hooks that are registered inside act in this thread only; another thread
    that comes here with the same network waits.
    """
    root = unwrap(model)
    with alone(root):
        # Zennit's canonizers exchange the data of parameters, and leave it so when they fail.
        contents = [(parameter, parameter.data) for parameter in root.parameters()]
        hooks = [
            (table, dict(table))
            for module in root.modules()
            for key, table in vars(module).items()
            if "hook" in key and table and isinstance(table, dict)
        ]
        try:
            with unchanged(root, foreign=True), guarded(root):
                yield
        finally:
            for tensor, content in contents:
                if tensor.data_ptr() != content.data_ptr() or tensor.shape != content.shape:
                    tensor.data = content
            # The user's hooks only: those of other threads come and go.
            lost = {
                key
                for table, kept in hooks
                for key, hook in kept.items()
                if key not in table and callable(hook) and not is_owned(hook)
            }
            for table, kept in hooks:
                if not lost.isdisjoint(kept):
                    later = {k: v for k, v in table.items() if k not in kept}
                    here = {k: v for k, v in kept.items() if k in table or k in lost}
                    table.clear()
                    table.update(here | later)


def own_copy(model: nn.Module, user: Any = None) -> Any:
    """A copy for one thread that changes weights for a while, as Zennit and Captum's LRP do.

    Its modules and parameters are new objects that share the memory of the network's numbers.

    Args:
        model: The network.
        user: An object that has the network, to be copied with it.

    Returns:
        The copy, or the copies of both; the originals if they cannot be copied.

    Example:
        >>> import torch
        >>> net = nn.Linear(2, 2)
        >>> copied = own_copy(net)
        >>> copied.weight.data = copied.weight.data * 2
        >>> torch.equal(copied.weight, 2 * net.weight)
        True
    """
    wanted = model if user is None else (model, user)
    try:
        memo: dict[int, Any] = {
            id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()
        }
        memo |= {id(buffer): buffer.detach() for buffer in model.buffers()}
        return copy.deepcopy(wanted, memo)
    except Exception:  # a lock or a graph on a module, a module of another language
        return wanted


@contextmanager
def flowing_copies(model: nn.Module, sites: Sequence[GateSite]) -> Iterator[None]:
    """Pass copies on from the sites, for networks that write into them in place.

    Captum's integrated gradients puts a leaf at a site, which must not be written into. Enter it
    for one forward pass, after the other hooks are registered: hooks run in that order.
    """

    def output_hook(module: nn.Module, args: Any, output: Any) -> Any:
        return output.clone() if isinstance(output, Tensor) else None

    def input_hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        return tuple(arg.clone() if isinstance(arg, Tensor) else arg for arg in args)

    modules = site_modules(model, sites)
    with owned() as owner, ExitStack() as stack:
        names = [site.name for site in sites]
        stack.enter_context(called_projections(unwrap(model), names))
        for site in sites:
            module = modules[site.name]
            if site.at_input:
                handle = module.register_forward_pre_hook(owner.only(input_hook))
            else:
                handle = module.register_forward_hook(owner.only(output_hook))
            stack.callback(handle.remove)
        yield


class Explained(nn.Module):
    """A function of a network as a module, for methods that want a module.

    Args:
        model: The network.
        function: Returns the explained outputs, (B, columns); runs the network.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.training = False  # its own flag only: eval() would reach into the network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the explained outputs."""
        return self.function(*inputs)
