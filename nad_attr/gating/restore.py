"""Let another library's attribution run on a network, and leave the network as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from nad_attr.gating.hooks import site_modules
from nad_attr.sites.preserving import unchanged
from nad_attr.sites.projections import called_projections
from nad_attr.sites.site import GateSite, unwrap
from nad_attr.system.rng import isolated_rng
from nad_attr.system.threads import owned

__all__ = ["Explained", "flowing_copies", "restored", "untouched"]


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo all changes of a network's modules at the end, also after an exception.

    As :func:`restored`; nor does anything reach the global random numbers.
    """
    with isolated_rng(0), restored(model):
        yield


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Undo all changes of a network's modules at the end, also after an exception.

    Hooks that were left behind, attributes that were added (as Captum's DeepLift and Zennit's
    canonizers do), parameters that were exchanged.
    """
    # Zennit's canonizers exchange what a parameter holds, and do not put it back when they fail.
    contents = [(parameter, parameter.data) for parameter in unwrap(model).parameters()]
    try:
        with unchanged(unwrap(model), hooks=True):
            yield
    finally:
        for tensor, content in contents:
            if tensor.data_ptr() != content.data_ptr() or tensor.shape != content.shape:
                tensor.data = content


@contextmanager
def flowing_copies(model: nn.Module, sites: Sequence[GateSite]) -> Iterator[None]:
    """Let copies flow on from the sites, for networks that write into them in place.

    Captum's integrated gradients puts a leaf at a site, which must not be written into. For one
    forward pass: enter it when the other hooks are in place, as hooks run in the order they came.
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
    """A network as the function of its inputs that is explained, for methods that want a module.

    Args:
        model: The network.
        function: Returns what is explained, (B, columns); runs the network.
    """

    def __init__(self, model: nn.Module, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.function = function
        self.training = False  # its own flag only: eval() would reach into the network

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return what is explained."""
        return self.function(*inputs)
