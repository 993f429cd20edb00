"""Make attention modules call their output projection, instead of only reading its weights.

``nn.MultiheadAttention`` and torchvision's shifted window attention hand ``out_proj.weight`` to a
function, so a hook on the projection does not fire. Inside :func:`called_projections` they compute
the heads' outputs with the unit matrix as projection, which changes no number, and then call the
projection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from nad_attr.system.threads import Owner, owned

__all__ = ["called_projections", "uncalled_projections"]

#: Where the projection is, by the name and module of the attention's class.
_PROJECTION = {
    ("MultiheadAttention", "torch.nn.modules.activation"): "out_proj",
    ("ShiftedWindowAttention", "torchvision.models.swin_transformer"): "proj",
    ("ShiftedWindowAttentionV2", "torchvision.models.swin_transformer"): "proj",
}
_LOCK = threading.Lock()


def _projection_of(module: nn.Module) -> str | None:
    """The name of the projection in a module that does not call it; None: another module."""
    for kind in type(module).__mro__:
        child = _PROJECTION.get((kind.__name__, kind.__module__))
        if child is not None:
            # A subclass with a forward pass of its own does not count.
            own: Any = type(module)
            same = own.forward is cast("Any", kind).forward or issubclass(own, _Calling)
            return child if same else None
    return None


def uncalled_projections(model: nn.Module) -> dict[str, nn.Module]:
    """``{name of the projection: the attention module that uses its weights}``.

    Example:
        >>> model = nn.Sequential(nn.MultiheadAttention(4, 2))
        >>> list(uncalled_projections(model))
        ['0.out_proj']
    """
    found = {}
    for name, module in model.named_modules():
        child = _projection_of(module)
        if child is not None:
            found[f"{name}.{child}" if name else child] = module
    return found


class _UnitMatrix(nn.Module):
    """Replaces a projection, and returns its input."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        n = like.shape[1]
        self.weight: Any = torch.eye(n, dtype=like.dtype, device=like.device)
        self.bias: Any = torch.zeros(n, dtype=like.dtype, device=like.device)


class _Calling:
    """The class that is put before an attention module's class."""

    _owners: tuple[Owner, ...]
    _whole: type[nn.Module]

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The module's own forward pass, with the projection called."""
        whole = self._whole
        if not any(owner.acts(self) for owner in self._owners):
            return whole.forward(self, *args, **kwargs)
        name = _projection_of(self)
        assert name is not None
        projection = self._modules[name]
        # Another object with the same weights: no other thread sees the unit matrix.
        shadow: Any = whole.__new__(whole)
        vars(shadow).update(vars(self))
        vars(shadow)["_modules"] = {**self._modules, name: _UnitMatrix(projection.weight)}
        result = whole.forward(shadow, *args, **kwargs)
        heads, *rest = result if isinstance(result, tuple) else (result,)
        # The batch comes first at the projection, as a gate needs it.
        turned = not getattr(self, "batch_first", True) and heads.ndim == 3
        heads = projection(heads.transpose(0, 1) if turned else heads)
        heads = heads.transpose(0, 1) if turned else heads
        return (heads, *rest) if isinstance(result, tuple) else heads


_Owners: TypeAlias = tuple[Owner, ...]


def _set_owners(module: nn.Module, change: Callable[[_Owners], _Owners]) -> None:
    with _LOCK:
        whole = getattr(type(module), "_whole", type(module))
        owners = change(getattr(type(module), "_owners", ()))
        facts = {"_owners": owners, "_whole": whole, "__module__": whole.__module__}
        module.__class__ = type(whole.__name__, (_Calling, whole), facts) if owners else whole


@contextmanager
def called_projections(model: nn.Module, names: Iterable[str] | None = None) -> Iterator[None]:
    """Let attention modules call their output projections, so that hooks on them fire.

    For the passes of the thread that enters it; see :class:`~nad_attr.system.threads.Owner`.

    Args:
        model: The network, not wrapped.
        names: Modules that have to be called. None: all of :func:`uncalled_projections`.

    Example:
        >>> model = nn.MultiheadAttention(4, 2, batch_first=True).eval()
        >>> seen = []
        >>> handle = model.out_proj.register_forward_hook(lambda *call: seen.append(call[2].shape))
        >>> x = torch.zeros(1, 3, 4)
        >>> with called_projections(model):
        ...     _ = model(x, x, x)
        >>> seen, type(model).__mro__[0] is nn.MultiheadAttention
        ([torch.Size([1, 3, 4])], True)
        >>> handle.remove()
    """
    wanted = None if names is None else set(names)
    every = {} if wanted == set() else uncalled_projections(model)
    chosen = [module for name, module in every.items() if wanted is None or name in wanted]
    if not chosen:
        yield
        return
    with owned() as owner, ExitStack() as stack:
        for module in chosen:
            _set_owners(module, lambda owners: (*owners, owner))
            stack.callback(
                _set_owners, module, lambda owners: tuple(o for o in owners if o is not owner)
            )
        yield
