"""Models by name, and weights from files."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nad_attr.running.forward import what_came
from nad_attr.sites.finding import fixed_batch_size
from nad_attr.sites.preserving import unchanged
from nad_attr.specs.names import SpecError, call, first_line, near, need
from nad_attr.system.rng import isolated_rng

__all__ = ["LoadedModel", "is_plain_model", "load_model", "load_weights", "n_outputs"]

#: Where checkpoints keep the state dict, if it is not all that they hold.
_CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "net", "weights")
#: Prefixes that wrappers add to each name.
_PREFIXES = ("module.", "_orig_mod.", "model.")
_NO_WEIGHTS = ("none", "random", "untrained")
#: Arguments for which timm takes a word of a list of its own.
_NAMED_LAYERS = ("act_layer", "global_pool", "norm_layer")
#: Largest number that a file may give to an architecture, so that it cannot ask for all memory.
_MAX_NUMBER = 100_000


@dataclass(frozen=True)
class LoadedModel:
    """A model made from its name.

    Attributes:
        model: In eval mode, on the CPU.
        name: Its name in full, with the weights that were chosen: makes the same model again.
        weights: The file of its weights, if they came from one.
        arguments: What its factory was called with.
        class_names: Names of its outputs, if its weights say them.
        transform: What its weights want done to images, if they say so.
        notes: Notes for the user, such as that it is untrained.
    """

    model: nn.Module
    name: str
    weights: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    class_names: tuple[str, ...] | None = None
    transform: Callable[[Any], Tensor] | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """What is needed to make it again, as JSON knows it."""
        return {"name": self.name, "weights": self.weights, "arguments": self.arguments}


def load_model(
    name: str,
    *,
    weights: str | os.PathLike[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    trained: bool = True,
) -> LoadedModel:
    """Make a model in eval mode.

    Args:
        name: ``torchvision:NAME[:WEIGHTS]`` (WEIGHTS as in torchvision, ``none`` for random ones;
            left out: torchvision's default ones), ``timm:NAME[:none]``, or
            ``package.module:factory``, a function without arguments that returns the model.
        weights: A state dict, ``.pt``, ``.pth`` or ``.safetensors``.
        arguments: Given to the factory by name, ``{"num_classes": 10}`` for example.
        trained: False leaves the weights random where they would have to be downloaded: enough to
            look at the architecture.

    Returns:
        The model with what is known of it. Random weights are always the same ones.

    Raises:
        SpecError: If it cannot be made; says why and what to do.

    Example:
        >>> load_model("torch.nn:Linear", arguments={"in_features": 2, "out_features": 3}).model
        Linear(in_features=2, out_features=3, bias=True)
    """
    options = dict(arguments or {})
    source, _, rest = name.partition(":")
    if not rest:
        raise SpecError(
            f"{name!r} is not a model: write torchvision:{name}, timm:{name}, or package.module:"
            "factory for a function of yours that returns the model."
        )
    if source == "torchvision":
        loaded = _torchvision_model(rest, options, trained and weights is None)
    elif source == "timm":
        loaded = _timm_model(rest, options, trained and weights is None)
    else:
        model = call(name, options)
        if not isinstance(model, nn.Module):
            raise SpecError(f"{name} returned a {type(model).__name__}, not a torch.nn.Module.")
        loaded = LoadedModel(model, name, arguments=options)
    model = loaded.model.eval()
    notes: tuple[str, ...] = ()
    if weights is not None:
        notes = load_weights(model, weights)
    elif trained and source in ("torchvision", "timm") and _untrained(name):
        notes = ("the weights are random: the network is untrained.",)
    file = None if weights is None else os.fspath(weights)
    return replace(loaded, model=model, weights=file, arguments=options, notes=notes)


def is_plain_model(name: object, arguments: object = None) -> bool:
    """Whether a name from elsewhere can do no more than make a published architecture.

    Plain are ``torchvision:NAME[:WEIGHTS]`` and ``timm:NAME[:none]`` with the package's own
    weights, and arguments that are numbers, truth values, lists of them, or the names of a few
    kinds of layers. A function, file, folder or other repository (``timm:hf-hub:...``,
    ``checkpoint_path=...``) is not plain.

    Example:
        >>> is_plain_model("timm:resnet18.a1_in1k", {"num_classes": 10})
        True
        >>> is_plain_model("os:system"), is_plain_model("timm:local-dir:nets")
        (False, False)
        >>> is_plain_model("timm:resnet18", {"checkpoint_path": "r18.pt"})
        False
    """
    if not isinstance(name, str) or not re.fullmatch(
        r"torchvision:\w+(:\w*)?|timm:[A-Za-z][\w.-]*(:(none|random|untrained))?", name, re.ASCII
    ):
        return False
    given = {} if arguments is None else arguments
    return isinstance(given, Mapping) and all(
        isinstance(key, str) and _is_plain(key, value) for key, value in given.items()
    )


def _is_plain(key: str, value: object) -> bool:
    if not key.isidentifier() or re.search("pretrained|weights|path|file|dir|url|cache", key):
        return False
    if isinstance(value, str):
        return key in _NAMED_LAYERS and value.isidentifier()
    values = value if isinstance(value, (list, tuple)) else [value]
    return len(values) <= 32 and all(
        item is None or (isinstance(item, (bool, int, float)) and abs(item) <= _MAX_NUMBER)
        for item in values
    )


def _untrained(name: str) -> bool:
    return name.rpartition(":")[2].lower() in _NO_WEIGHTS


def _torchvision_model(rest: str, options: dict[str, Any], trained: bool) -> LoadedModel:
    need("torchvision", "a torchvision model")
    from torchvision import models

    name, _, wanted = rest.partition(":")
    known = models.list_models(module=models)
    if name.lower() not in known:
        raise SpecError(f"torchvision has no classification model {name!r}" + near(name, known))
    name = name.lower()
    choices = models.get_model_weights(name)
    by_name = {entry.name.lower(): entry for entry in choices}
    if wanted.lower() in ("", "default"):
        entry = choices.DEFAULT
    elif wanted.lower() in _NO_WEIGHTS:
        entry = None
    elif wanted.lower() in by_name:
        entry = by_name[wanted.lower()]
    else:
        raise SpecError(
            f"torchvision's {name} has no weights {wanted!r}; it has "
            f"{', '.join(e.name for e in choices)}, and none."
        )
    use = entry if trained else None
    try:
        with isolated_rng(0):
            model = models.get_model(name, weights=use, **options)
    except OSError as error:
        raise SpecError(
            f"the weights of {name} cannot be downloaded: {first_line(error)}. Give them as a "
            f"file ({getattr(entry, 'url', '')}) with --weights, or write torchvision:{name}:none "
            "for random ones."
        ) from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise SpecError(f"torchvision cannot make {rest}: {first_line(error)}") from error
    # With a file of weights, the images are most likely meant as for torchvision's own.
    meta = entry if entry is not None else choices.DEFAULT
    names = tuple(entry.meta["categories"]) if entry is not None and trained else None
    full = f"torchvision:{name}:{'none' if use is None else use.name}"
    return LoadedModel(model, full, class_names=names, transform=meta.transforms())


def _timm_model(rest: str, options: dict[str, Any], trained: bool) -> LoadedModel:
    need("timm", "a timm model")
    import timm

    name, last = rest, ""
    if _untrained(f":{rest}"):
        name, _, last = rest.rpartition(":")
    trained = trained and not last
    if ":" not in name and not timm.is_model(name):
        others = near(name.partition(".")[0], timm.list_models())
        raise SpecError(f"timm has no model {name!r}" + others)
    try:
        with isolated_rng(0):
            model = timm.create_model(name, pretrained=trained, **options)
    except Exception as error:
        raise SpecError(
            f"timm cannot make {name}: {first_line(error)}. (Its weights are downloaded: "
            f"timm:{name}:none makes it with random ones, --weights FILE reads a file.)"
        ) from error
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config, is_training=False)
    full = f"timm:{name}" + ("" if trained else ":none")
    return LoadedModel(model, full, transform=transform)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> tuple[str, ...]:
    """Load a state dict into a model, all of it or nothing.

    Args:
        model: Changed in place.
        path: ``.pt``, ``.pth`` or ``.safetensors``; also a checkpoint that holds the state dict
            under a usual key, and one of a model in a wrapper.

    Returns:
        Notes: what was looked through.

    Raises:
        SpecError: If the file cannot be read without running code in it, or does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"there is no file {path} with weights.")
    state: Any
    if path.suffix == ".safetensors":
        need("safetensors", "a .safetensors file")
        from safetensors.torch import load_file

        try:
            state = load_file(path)
        except Exception as error:
            raise SpecError(f"{path} is not a safetensors file: {first_line(error)}") from error
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise SpecError(
                f"{path} holds more than tensors, such as a whole pickled model, which is code and "
                "is not run. Save the state dict alone: torch.save(model.state_dict(), path)."
            ) from error
        except Exception as error:
            raise SpecError(f"{path} holds no weights: {first_line(error)}") from error
    notes: list[str] = []
    state = _unpacked(state, path, notes)
    own = model.state_dict()
    state = _network_inside(state, own, path, notes)
    for prefix in _PREFIXES:
        if all(key.startswith(prefix) for key in state) and not any(
            key.startswith(prefix) for key in own
        ):
            state = {key[len(prefix) :]: value for key, value in state.items()}
            notes.append(f"names in {path.name} were taken without their prefix {prefix!r}.")
    # A counter without effect in eval mode; older files lack it.
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    extra = [key for key in state if key not in own]
    wrong = [
        f"{key} is {tuple(state[key].shape)} in the file and {tuple(value.shape)} in the model"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ] or [
        f"{key} {why}"
        for key, value in own.items()
        if key in state and (why := _other_kind(state[key], value))
    ]
    problems = [
        f"{what} {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("not in the model:", extra), ("", wrong[:1]))
        if names
    ]
    if problems:
        raise SpecError(
            f"the weights in {path} do not fit the model: "
            + "; ".join(p.strip() for p in problems)
            + ("" if missing or extra else _other_classes(state, own))
        )
    model.load_state_dict(state, strict=False)  # compared above
    return tuple(notes)


def _network_inside(
    state: dict[str, Tensor], own: Mapping[str, Tensor], path: Path, notes: list[str]
) -> dict[str, Tensor]:
    """The network's weights from the state of a larger module, such as a Lightning module."""
    needed = [key for key in own if not key.endswith("num_batches_tracked")]
    if not needed or all(key in state for key in needed):
        return state
    ends = [key for key in state if key.endswith(f".{needed[0]}")]
    prefixes = [key[: -len(needed[0])] for key in ends]
    fitting = [prefix for prefix in prefixes if all(prefix + key in state for key in needed)]
    if not fitting:
        return state
    if len(fitting) > 1:
        raise SpecError(
            f"{path} holds {len(fitting)} such networks, under {', '.join(map(repr, fitting))}; "
            "save the one you mean: torch.save(module.NAME.state_dict(), path)."
        )
    (prefix,) = fitting
    rest = [key for key in state if not key.startswith(prefix)]
    notes.append(f"names in {path.name} were taken without their prefix {prefix!r}.")
    if rest:
        listed = ", ".join(rest[:3]) + (f" and {len(rest) - 3} more" if len(rest) > 3 else "")
        be, past = ("is", "was") if len(rest) == 1 else ("are", "were")
        notes.append(f"{listed} in {path.name} {be} beside the network and {past} left out.")
    return {key[len(prefix) :]: v for key, v in state.items() if key.startswith(prefix)}


def _other_kind(given: Tensor, own: Tensor) -> str:
    """Why values cannot take the place of others of the same shape; empty if they can."""
    if given.device.type == "meta":
        return "has no values in the file (device meta); save the weights after they were made"
    if given.layout != torch.strided and own.layout == torch.strided:
        return f"is sparse in the file ({given.layout}); save value.to_dense()"
    if _kind(given) != _kind(own):
        # load_state_dict would cut them to what fits, without a warning.
        return (
            f"holds {_kind(given)} ({given.dtype}) in the file and {_kind(own)} ({own.dtype}) in "
            "the model; save it as the model holds it"
        )
    return ""


def _kind(value: Tensor) -> str:
    if value.is_quantized:
        return "quantised numbers"
    if value.is_complex():
        return "complex numbers"
    if value.is_floating_point():
        return "floating-point numbers"
    return "truth values" if value.dtype == torch.bool else "whole numbers"


def _other_classes(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> str:
    """What to do where nothing but the number of classes differs."""
    last = list(own)[-1].rpartition(".")[0]
    wrong = [key for key in own if state[key].shape != own[key].shape]
    sizes = {len(state[key]) for key in wrong if state[key].ndim}
    rest = all(state[key].shape[1:] == own[key].shape[1:] for key in wrong)
    if len(sizes) != 1 or not rest or any(key.rpartition(".")[0] != last for key in wrong):
        return ""
    n = sizes.pop()
    return f". A network of {n} classes is made with --model-arg num_classes={n}"


def _unpacked(state: Any, path: Path, notes: list[str]) -> dict[str, Tensor]:
    def is_state(value: Any) -> bool:
        return (
            isinstance(value, Mapping)
            and bool(value)
            and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
        )

    if is_state(state):
        return dict(state)
    if isinstance(state, Mapping):
        for key in _CHECKPOINT_KEYS:
            if is_state(state.get(key)):
                notes.append(f"the weights are those under {key!r} in {path.name}.")
                return dict(state[key])
        keys = ", ".join(map(str, list(state)[:6]))
        raise SpecError(f"{path} holds no state dict, but a dictionary of {keys}.")
    raise SpecError(f"{path} holds a {type(state).__name__}, not a state dict.")


def n_outputs(model: nn.Module, inputs: Tensor) -> int:
    """How many classes a model tells apart.

    Raises:
        SpecError: If the model does not take such inputs, or gives no (N, classes).

    Example:
        >>> n_outputs(nn.Linear(2, 5).eval(), torch.zeros(1, 2))
        5
    """
    place = next(model.parameters(), None)
    inputs = inputs if place is None else inputs.to(place.device, place.dtype)
    try:
        with torch.no_grad(), unchanged(model):
            outputs = model(inputs)
    except (RuntimeError, TypeError, ValueError, AssertionError) as error:
        size = fixed_batch_size(model, (inputs,), error=str(error))
        if size is not None and size > len(inputs):
            return n_outputs(model, inputs[:1].expand(size, *inputs.shape[1:]))
        raise SpecError(
            f"the model does not take inputs of shape {tuple(inputs.shape)}: {first_line(error)}. "
            "Check --resize, --crop or --transform."
        ) from error
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        what = what_came(outputs).replace("give a forward_func", "wrap it in a module")
        raise SpecError(
            f"the model returns {what.replace('Give a forward_func', 'Wrap it in one')}"
        )
    if outputs.ndim == 1 and len(outputs) == len(inputs):
        return 1
    if outputs.ndim != 2:
        raise SpecError(
            f"the model returns {tuple(outputs.shape)} for one image, not a tensor (images, "
            "classes); wrap it in a module that does."
        )
    return outputs.shape[1]
