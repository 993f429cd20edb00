"""A smaller network in a file that other programs run, with a JSON that describes it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from nad_attr.export.costs import summary
from nad_attr.system.files import check_output, replacing, write_text

__all__ = ["FORMATS", "check_target", "save"]

#: First words of the files beside a network; only such files are replaced.
_BEGINS = {".json": '{\n "format": ', ".py": '"""A smaller network, written by nad_attr;'}
_SOURCE = '''"""A smaller network, written by nad_attr; it needs PyTorch alone.

    network = Network()
    network.load_state_dict(safetensors.torch.load_file({weights!r}))
"""

import operator

import torch
from torch import device, inf, nan, nn


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (shape, dtype, is_parameter) in TENSORS.items():
            *path, last = name.split(".")
            holder = self
            for part in path:
                if not hasattr(holder, part):
                    holder.add_module(part, nn.Module())
                holder = getattr(holder, part)
            tensor = torch.empty(shape, dtype=dtype)
            if is_parameter:
                setattr(holder, last, nn.Parameter(tensor, requires_grad=dtype.is_floating_point))
            else:
                holder.register_buffer(last, tensor)
        self.eval()

{forward}

TENSORS = {{
{tensors}
}}
'''


def save(
    module: nn.Module, path: str | os.PathLike[str], example_inputs: Tensor | tuple[Tensor, ...]
) -> list[Path]:
    """Write a smaller network to a file that needs nothing of this library.

    Beside it, ``NAME.json`` (``cat.onnx.json`` beside ``cat.onnx``) says which channels of the
    network each of its own are (:class:`nad_attr.export.Summary`). Each file is written whole or
    not at all.

    Args:
        module: As :meth:`nad_attr.SubArchitecture.export` returned it.
        path: Its ending chooses the kind: ``.pt2``, a program of ``torch.export``
            (``torch.export.load(path).module()`` runs it); ``.onnx``, for ONNX Runtime and others
            (needs the extra ``export``); ``.safetensors``, the state dict, with a ``.py`` file
            beside it of the module that it is for.
        example_inputs: As the module was exported with; the number of images stays free.

    Returns:
        The files that were written.

    Raises:
        FileExistsError: If a file of another kind is there, or beside it.
        ImportError: If a package for this kind of file is missing.
        ValueError: If the ending is another one, or the folder is not there.
    """
    path = Path(path)
    made = summary(module)
    check_target(path)
    write = FORMATS[path.suffix]
    assert isinstance(module, fx.GraphModule)
    inputs = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    inputs = tuple(x[:1].detach() for x in inputs)
    n = made.n_images if made.one_image else 2
    inputs = tuple(x.expand(n, *x.shape[1:]).contiguous() for x in inputs)
    content = {"format": path.suffix[1:], **made.to_dict()}
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        scratch = Path(folder)
        write(module, scratch / path.name, inputs, None if made.one_image else {0: "batch"})
        about = scratch / f"{path.name}.json"
        write_text(about, json.dumps(content, indent=1) + "\n")
        names = sorted(file.name for file in scratch.iterdir())
        for name in names:
            with replacing(path.parent / name) as target:
                os.replace(scratch / name, target)
    return [path.parent / name for name in names]


def check_target(path: Path) -> None:
    """Refuse a place where :func:`save` cannot write, or where a file would be lost.

    Raises:
        FileExistsError: If a file of another kind is there, or beside it.
        ValueError: If the ending is none of a network's, or the folder is not there.
    """
    if path.suffix not in FORMATS:
        raise ValueError(
            f"{path.name} must end in one of {', '.join(FORMATS)}, which says what to write."
        )
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} to write {path.name} into.")
    check_output(path, "archive" if path.suffix == ".pt2" else "data")
    beside = [path.with_name(f"{path.name}.json")]
    if path.suffix == ".safetensors":
        beside.append(path.with_suffix(".py"))
    for file in beside:
        begins = _BEGINS[file.suffix].encode()
        if file.exists() and file.read_bytes()[: len(begins)] not in (b"", begins):
            raise FileExistsError(
                f"{file} would be written beside {path.name}, is there already, and is another "
                "file: it is not replaced. Give the network another name."
            )


def _dynamic(inputs: tuple[Tensor, ...], free: dict[int, str] | None) -> Any:
    """The shapes that stay free, as torch takes them."""
    return None if free is None else tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)


def _program(
    module: fx.GraphModule, path: Path, inputs: tuple[Tensor, ...], free: dict[int, str] | None
) -> None:
    with torch.no_grad():
        program = torch.export.export(
            module, inputs, dynamic_shapes=_dynamic(inputs, free), strict=False
        )
    torch.export.save(program, path)


def _onnx(
    module: fx.GraphModule, path: Path, inputs: tuple[Tensor, ...], free: dict[int, str] | None
) -> None:
    try:
        import onnxscript  # noqa: F401
    except ImportError:
        raise ImportError(
            "an ONNX file needs onnx and onnxscript: pip install 'nad-attr[export]'"
        ) from None
    names = [f"input{i}" if i else "input" for i in range(len(inputs))]
    with torch.no_grad():
        torch.onnx.export(
            module,
            inputs,
            str(path),
            dynamo=True,
            external_data=False,
            verbose=False,
            input_names=names,
            output_names=["output"],
            dynamic_shapes=_dynamic(inputs, free),
        )


def _weights(
    module: fx.GraphModule, path: Path, inputs: tuple[Tensor, ...], free: dict[int, str] | None
) -> None:
    try:
        from safetensors.torch import save_file
    except ImportError:
        raise ImportError(
            "a .safetensors file needs safetensors: pip install 'nad-attr[export]'"
        ) from None
    state = {name: tensor.detach().cpu() for name, tensor in module.state_dict().items()}
    save_file(state, path)
    parameters = {name for name, _ in module.named_parameters()}
    forward = module.graph.python_code("self").src.strip("\n")
    write_text(
        path.with_suffix(".py"),
        _SOURCE.format(
            weights=path.name,
            forward="\n".join(f"    {line}".rstrip() for line in forward.splitlines()),
            tensors="\n".join(
                f"    {name!r}: ({list(t.shape)}, {t.dtype}, {name in parameters}),"
                for name, t in state.items()
            ),
        ),
    )


#: Kinds of files by their ending.
FORMATS: dict[str, Callable[[Any, Path, tuple[Tensor, ...], dict[int, str] | None], None]] = {
    ".pt2": _program,
    ".onnx": _onnx,
    ".safetensors": _weights,
}
