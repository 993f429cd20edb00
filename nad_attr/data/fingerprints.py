"""The origin of gates, in a form that can be compared: network, data and programs."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from nad_attr._version import __version__
from nad_attr.data.sources import Data, Inputs, Source, as_source
from nad_attr.sites.site import unwrap
from nad_attr.system.rng import isolated_rng

__all__ = [
    "chosen_for_fingerprint",
    "data_fingerprint",
    "environment",
    "fixed_outputs",
    "model_hash",
    "same_outputs",
]

#: Images that a fingerprint draws, spread evenly over all: of files and tensors, which it reads as
#: well, and of other data.
_IMAGES, _IMAGES_ALONE = 8, 64
#: Files whose sizes and contents it reads, at most, and bytes at the start, middle and end of each.
_SIZES, _CONTENTS, _SAMPLE = 2**16, 2**10, 2**14
#: Bytes of tensors that it reads, at most.
_BYTES = 2**30
#: Sums that are kept of the outputs of an image.
_SUMS = 8
#: Largest difference between two runs, as a share of the outputs' size: on CPUs, and with a GPU,
#: whose convolutions round to ten bits (TF32).
_ROUNDING, _ROUNDING_GPU = 1e-4, 1e-2


def model_hash(model: nn.Module) -> str:
    """A fingerprint of a network's parameters and buffers.

    It depends on the numbers only, not on their place or a wrapper (``DataParallel``,
    ``torch.compile``); a single different bit changes it.

    Args:
        model: The network; it is only read.

    Returns:
        64 hexadecimal digits: SHA-256 of names, types, shapes and bytes of the state dict.

    Raises:
        TypeError: If it is not a module.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> before = model_hash(layer)
        >>> with torch.no_grad():
        ...     _ = layer.bias.add_(1)
        >>> len(before), before == model_hash(layer)
        (64, False)
    """
    digest = hashlib.sha256()
    for name, value in sorted(unwrap(model).state_dict().items()):
        if isinstance(value, Tensor):
            _update(digest, name, value)
    return digest.hexdigest()


def _update(digest: Any, name: str, value: Tensor) -> None:
    dense = value.detach()
    if dense.layout != torch.strided:
        dense = dense.to_dense()
    if dense.is_quantized:
        dense = dense.dequantize()
    dense = dense.cpu().contiguous().reshape(-1)
    digest.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
    if dense.numel():
        digest.update(dense.view(torch.uint8).numpy().data)


def data_fingerprint(data: Data | Source) -> str:
    """A fingerprint of labelled images that does not read them all.

    It reads the number of images, all labels, the names of the classes if the dataset has them
    (``classes``), and eight images spread evenly over the data, drawn with a fixed seed. For data
    in files (:class:`~nad_attr.datasets.ImageFolderData`, torchvision's folders) it also reads all
    names, the sizes of 65,536 files and the start, middle and end of 1,024, and for tensors 1 GiB:
    all of them if there are no more, else spread evenly. From other datasets it draws 64 images. So
    it changes with other data, another order, another transform, and one changed or exchanged
    image, unless that one is among very many.

    Args:
        data: The data of :func:`nad_attr.learn_gates`, or a source made of it.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: If the data are of another kind.
        ValueError: If it is empty or holds NaN.

    Example:
        >>> images, labels = torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])
        >>> data_fingerprint((images, labels)) == data_fingerprint((images, labels))
        True
        >>> data_fingerprint((images, labels)) == data_fingerprint((images + 1, labels))
        False
    """
    source: Any = data if hasattr(data, "batches") and hasattr(data, "labels") else None
    source = as_source(data) if source is None else source
    digest = hashlib.sha256()
    _update(digest, "labels", source.labels)
    dataset: Any = getattr(source, "dataset", None)
    while hasattr(dataset, "dataset") and not hasattr(dataset, "classes"):
        dataset = dataset.dataset
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, (list, tuple)):
        digest.update(repr([str(name) for name in classes]).encode())
    n = len(source.labels)
    tensors = getattr(source, "inputs", None)
    stored: Any = getattr(source, "dataset", None)
    if tensors is not None:
        stored = TensorDataset(*tensors, source.labels)
    chosen = chosen_for_fingerprint(digest, stored, getattr(source, "numbers", range(n)))
    for inputs in source.batches([[(number, 0)] for number in chosen]):
        for i, value in enumerate(inputs):
            _update(digest, f"input {i}", value)
    return digest.hexdigest()


def _spread(n: int, most: int) -> list[int]:
    """At most that many of 0 to n - 1, evenly, including the first and the last."""
    return [int(i) for i in np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(np.int64))]


def chosen_for_fingerprint(digest: Any, dataset: Any, numbers: Sequence[int]) -> list[int]:
    """Add the content of a dataset's files or tensors to a fingerprint.

    Args:
        digest: A hash.
        dataset: A dataset of tensors; one whose ``path(number)`` or ``samples`` name its files; or
            another one.
        numbers: Its items that count.

    Returns:
        Places in ``numbers`` of images to be drawn in addition: fewer if files or tensors were
        read.
    """
    n = len(numbers)
    while isinstance(dataset, Subset):
        numbers = [int(dataset.indices[i]) for i in numbers]
        dataset = dataset.dataset
    if isinstance(dataset, TensorDataset):
        for i, tensor in enumerate(dataset.tensors):
            rows = _spread(n, max(1, _BYTES // max(1, tensor[:1].nbytes)))
            # In parts, so that no copy of all is made.
            for part in range(0, len(rows), 1024):
                at = [int(numbers[row]) for row in rows[part : part + 1024]]
                _update(digest, f"tensor {i}", tensor[torch.tensor(at, device=tensor.device)])
        return _spread(n, _IMAGES)
    files = _files(dataset, numbers)
    if files is None:
        return _spread(n, _IMAGES_ALONE)
    root = os.path.join(os.fspath(getattr(dataset, "root", "")), "")
    for name in files:
        digest.update(name.removeprefix(root).replace(os.sep, "/").encode("utf-8", "replace"))
        digest.update(b"\n")
    for i in _spread(n, _SIZES):
        digest.update(f"{os.stat(files[i]).st_size}\n".encode())
    for i in _spread(n, _CONTENTS):
        with open(files[i], "rb") as file:
            size = os.fstat(file.fileno()).st_size
            for place in (0, size // 2, size - _SAMPLE):
                file.seek(max(0, place))
                digest.update(file.read(_SAMPLE))
    return _spread(n, _IMAGES)


def _files(dataset: Any, numbers: Sequence[int]) -> list[str] | None:
    """The files of a dataset's items; None: not known, or not plain files."""
    path, samples = getattr(dataset, "path", None), getattr(dataset, "samples", None)
    try:
        if callable(path):
            files = [os.fspath(path(i)) for i in numbers]
        elif isinstance(samples, (list, tuple)):
            files = [os.fspath(samples[i][0]) for i in numbers]
        else:
            return None
        known = all(isinstance(name, str) for name in files)
        return files if files and known and os.path.isfile(files[0]) else None
    except (TypeError, ValueError, LookupError, OSError):
        return None


def fixed_outputs(run: Callable[[Inputs], Tensor], batches: Iterable[Inputs]) -> dict[str, Any]:
    """A network's outputs on a few fixed images, for JSON: eight fixed sums of each.

    The weights alone do not define the outputs: GELU in place of ReLU has the same weights.

    Args:
        run: Gives outputs (B, K).
        batches: The images.

    Example:
        >>> layer = nn.Linear(2, 3)
        >>> found = fixed_outputs(lambda inputs: layer(*inputs), [(torch.ones(1, 2),)])
        >>> len(found["sums"][0]), found["device"]
        (8, 'cpu')
    """
    with isolated_rng(0), torch.no_grad():
        outputs = torch.cat([run(inputs) for inputs in batches])
    flat = outputs.detach().cpu().double().flatten(1)
    generator = torch.Generator("cpu").manual_seed(0)
    signs = torch.randint(2, (flat.shape[1], _SUMS), generator=generator, device="cpu")
    sums = flat @ (2 * signs - 1).double() / max(1, flat.shape[1]) ** 0.5
    return {"device": outputs.device.type, "sums": sums.tolist()}


def same_outputs(known: Any, given: Any) -> bool:
    """Whether two runs' :func:`fixed_outputs` are the same within rounding; unknown ones are.

    Example:
        >>> one = {"device": "cpu", "sums": [[1.0, -1.0]]}
        >>> same_outputs(one, {"device": "cpu", "sums": [[1.00001, -1.0]]})
        True
        >>> same_outputs(one, {"device": "cpu", "sums": [[1.1, -1.0]]})
        False
    """
    if known is None or given is None:
        return True
    try:
        a, b = (np.asarray(side["sums"], dtype=np.float64) for side in (known, given))
        on_cpu = known["device"] == given["device"] == "cpu"
    except (TypeError, ValueError, LookupError):
        return False
    size = float(np.sqrt(np.mean(np.square(a)))) if a.size else 0.0
    least = (_ROUNDING if on_cpu else _ROUNDING_GPU) * size + 1e-12
    return a.shape == b.shape and bool(np.allclose(a, b, rtol=0, atol=least, equal_nan=True))


def environment() -> dict[str, str]:
    """Versions of the programs and devices that compute, as texts.

    Example:
        >>> sorted(environment())
        ['device', 'h5py', 'nad_attr', 'numpy', 'platform', 'python', 'torch']
    """
    import h5py

    if torch.cuda.is_available():
        device = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    else:
        device = platform.processor() or platform.machine()
    return {
        "nad_attr": __version__,
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": f"{device}, {os.cpu_count()} CPUs",
    }
