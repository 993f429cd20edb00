"""Where gates come from: the network, the data and the programs, in a form that can be compared."""

from __future__ import annotations

import hashlib
import os
import platform
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nad_attr._version import __version__
from nad_attr.data import Data, Source, as_source
from nad_attr.sites import unwrap

__all__ = ["data_fingerprint", "environment", "model_hash"]

#: Images that a fingerprint of data looks at, spread evenly over all.
_IMAGES = 8


def model_hash(model: nn.Module) -> str:
    """A fingerprint of a network's parameters and buffers.

    The same for the same numbers, wherever they lie and whatever wraps the network
    (``DataParallel``, ``torch.compile``); another one as soon as a single bit differs.

    Args:
        model: The network; it is only read.

    Returns:
        64 hexadecimal digits: SHA-256 of names, types, shapes and bytes of the state dict.

    Raises:
        TypeError: If it is no module.

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

    Looks at the number of images, all labels, the names of the classes where the dataset has them
    (``classes``), and eight images spread evenly over the data, drawn with a fixed seed. So it
    notices other data, another order and another transform, but not a change in one image.

    Args:
        data: What :func:`nad_attr.learn_gates` takes, or a source made of it.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: If it is no such data.
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
    chosen = np.unique(np.linspace(0, n - 1, _IMAGES).round().astype(int)).tolist()
    for inputs in source.batches([[(number, 0)] for number in chosen]):
        for i, value in enumerate(inputs):
            _update(digest, f"input {i}", value)
    return digest.hexdigest()


def environment() -> dict[str, str]:
    """Versions of what computes, as texts.

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
