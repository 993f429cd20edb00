"""What learning and evaluation draw images from: one face for tensors, datasets and loaders.

Every draw is a function of a seed alone. Random transforms of a dataset read the global random
states, so each item is fetched with those states seeded for it and put back afterwards: neither
the caller's random numbers nor the number of loader workers change.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from nad_attr._checks import tensor_of
from nad_attr.system.processes import check_processes
from nad_attr.system.rng import isolated_rng

__all__ = ["Data", "Draw", "Inputs", "Source", "as_source"]


#: Bytes of images that are read into memory where there is no other way to draw from them.
MAX_BYTES = 2**32


#: What learning and evaluation accept.
Data: TypeAlias = "DataLoader[Any] | Dataset[Any] | tuple[Any, Any] | list[Any]"


#: One image to fetch: its number, and the seed of its random transforms.
Draw: TypeAlias = "tuple[int, int]"


#: The network's inputs for a batch; axis 0 of each is the image.
Inputs: TypeAlias = "tuple[Tensor, ...]"


class Source(Protocol):
    """Images with labels, drawn by number."""

    #: int64 (N,)
    labels: Tensor
    #: Whether an image may look different each time it is drawn.
    augmented: bool

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order, on the CPU or where they are."""
        ...


def _check_labels(labels: Any, n: int | None = None) -> Tensor:
    try:
        tensor = tensor_of(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"labels must be class indices, not {labels!r:.60}: {error}.") from None
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        raise ValueError(
            f"labels must be class indices, an integer tensor of shape (N,), not "
            f"{tensor.dtype} of shape {tuple(tensor.shape)}."
        )
    if tensor.dtype == torch.bool:
        raise ValueError("labels must be class indices, not True and False.")
    if n is not None and len(tensor) != n:
        raise ValueError(f"{n} inputs came with {len(tensor)} labels.")
    if len(tensor) == 0:
        raise ValueError("data is empty: there is not a single image to learn from.")
    if int(tensor.min()) < 0:
        raise ValueError(f"labels must be class indices from 0 on, got {int(tensor.min())}.")
    return tensor.detach().to("cpu", torch.int64)


def check_finite(inputs: Inputs) -> Inputs:
    """Refuse NaN and infinity, which would spread over all gates of the batch."""
    for i, value in enumerate(inputs):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            bad = (~torch.isfinite(value.flatten(1)).all(1)).nonzero().flatten().tolist()
            which = f"input {i}: " if len(inputs) > 1 else ""
            raise ValueError(
                f"{which}image(s) {bad[:5]} of a batch of {len(value)} hold NaN or infinity; "
                "clean or leave out those images."
            )
    return inputs


def _as_inputs(value: Any) -> Inputs:
    inputs = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not inputs or not all(isinstance(item, Tensor) for item in inputs):
        kinds = ", ".join(type(item).__name__ for item in inputs) or "nothing"
        raise TypeError(
            f"a batch's inputs must be a tensor or a tuple of tensors, not {kinds}; let the "
            "dataset's transform end in tensors (torchvision's ToTensor, for example)."
        )
    if any(item.ndim == 0 or len(item) != len(inputs[0]) for item in inputs):
        raise ValueError(
            "all inputs need the same number of images on axis 0, got shapes "
            f"{[tuple(item.shape) for item in inputs]}."
        )
    return inputs


class TensorSource:
    """Images that lie in memory."""

    augmented = False

    def __init__(self, inputs: Any, labels: Any) -> None:
        # Tensors made in the caller's inference mode cannot be saved for backward; a copy can.
        with torch.inference_mode(False):
            self.inputs = tuple(
                item.clone() if item.is_inference() else item for item in _as_inputs(inputs)
            )
        self.labels = _check_labels(labels, len(self.inputs[0]))
        check_finite(self.inputs)

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order."""
        for chosen in draws:
            index = torch.tensor([number for number, _ in chosen], dtype=torch.long, device="cpu")
            yield tuple(item.detach()[index.to(item.device)] for item in self.inputs)


class _SeededItems(Dataset[Any]):
    """Items addressed by (number, seed), so that augmentation depends on nothing else."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        number, seed = key
        with isolated_rng(seed):
            return self.dataset[number]


#: What a loader says about how its items are loaded.
_SETTINGS = (
    "num_workers",
    "pin_memory",
    "pin_memory_device",
    "timeout",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class _WorkerInit:
    """A user's ``worker_init_fn``, which finds the user's dataset in ``get_worker_info()``."""

    def __init__(self, function: Callable[[int], object] | None) -> None:
        self.function = function

    def __call__(self, number: int) -> None:
        info = get_worker_info()
        inner = getattr(info.dataset, "dataset", None) if info is not None else None
        if inner is not None:
            object.__setattr__(info, "dataset", inner)  # it lets nobody assign otherwise
        if self.function is not None:
            self.function(number)


def loading(loader: DataLoader[Any] | None) -> dict[str, Any]:
    """How a loader loads its items, as arguments of another one: workers, memory, collating."""
    if loader is None:
        return {}
    options = {name: getattr(loader, name) for name in _SETTINGS}
    if not options["pin_memory_device"]:  # torch warns of whoever names it
        del options["pin_memory_device"]
    return options | {"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn}


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """A loader's pass. It draws a seed by its CPU generator, on the user's default device."""
    with torch.device("cpu"):
        return iter(loader)


class SeededLoader:
    """Loads items of a dataset in any order, each a function of its number and seed.

    Args:
        dataset: A map-style dataset.
        loader: Its settings are used: workers, pinned memory, timeout and so on.
        collate: What makes a batch of items; None: the loader's.
        n_workers: Processes; 0: the loader's.
    """

    def __init__(
        self,
        dataset: Any,
        loader: DataLoader[Any] | None = None,
        *,
        collate: Callable[[list[Any]], Any] | None = None,
        n_workers: int = 0,
    ) -> None:
        self.dataset = dataset
        self.options = loading(loader)
        if collate is not None:
            self.options["collate_fn"] = collate
        if n_workers:
            self.options["num_workers"] = n_workers
        self.options["worker_init_fn"] = _WorkerInit(self.options.get("worker_init_fn"))
        self._lasting: DataLoader[Any] | None = None
        self._busy = False

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lasting": None, "_busy": False}  # processes cannot be sent

    def _open(self, draws: _Draws) -> DataLoader[Any]:
        return DataLoader(
            _SeededItems(self.dataset),
            batch_sampler=draws,
            generator=torch.Generator().manual_seed(0),  # never the global one
            **self.options,
        )

    def __call__(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Any]:
        """A batch for each list of (number, seed)."""
        if not self.options.get("persistent_workers") or self._busy:
            options = self.options
            if self._busy:  # workers that stay serve one at a time
                self.options = options | {"persistent_workers": False}
            try:
                loader = self._open(_Draws(draws))
            finally:
                self.options = options
            yield from started(loader)
            return
        if self._lasting is None:
            self._lasting = self._open(_Draws(()))
        self._busy = True
        try:
            assert isinstance(self._lasting.batch_sampler, _Draws)
            self._lasting.batch_sampler.draws = draws
            yield from started(self._lasting)
        finally:
            self._busy = False


class _Draws:
    """A batch sampler whose batches are given anew for each pass."""

    def __init__(self, draws: Iterable[Sequence[Draw]]) -> None:
        self.draws = draws

    def __iter__(self) -> Iterator[list[Draw]]:
        return map(list, self.draws)


class DatasetSource:
    """Images that a map-style dataset makes on demand."""

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        numbers: Sequence[int] | None = None,
        loader: DataLoader[Any] | None = None,
        augmented: bool = True,
    ) -> None:
        if loader is not None:
            check_processes(loader.num_workers, "num_workers of the loader")
        self.dataset, self.augmented = dataset, augmented
        self._loader = SeededLoader(dataset, loader)
        n = len(dataset)  # type: ignore[arg-type]
        self.numbers = range(n) if numbers is None else list(numbers)
        self.labels = self._labels()

    def _labels(self) -> Tensor:
        known = _known_labels(self.dataset)
        if known is not None:
            return _check_labels(
                known[torch.as_tensor(list(self.numbers), dtype=torch.long, device="cpu")]
            )
        if len(self.numbers) == 0:
            return _check_labels(torch.zeros(0, dtype=torch.long, device="cpu"))
        # Nothing says the labels but the items themselves: read them all once.
        every = ([(i, 0)] for i in range(len(self.numbers)))
        return _check_labels(torch.cat([_check_labels(label) for _, label in self._load(every)]))

    def _load(self, draws: Iterable[Sequence[Draw]]) -> Iterator[tuple[Any, Any]]:
        every = ([(self.numbers[i], s) for i, s in chosen] for chosen in draws)
        for batch in self._collated(self._loader(every)):
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
                raise TypeError(
                    f"the dataset must yield (input, label) pairs; got {type(batch).__name__}"
                    f"{length}. Wrap it in one that does."
                )
            yield batch[0], batch[1]

    @staticmethod
    def _collated(loader: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from loader
        except RuntimeError as error:
            if "stack expects each tensor to be equal size" not in str(error):
                raise
            raise ValueError(
                "the dataset's images differ in shape and cannot go into one batch; let its "
                "transform crop them to one size."
            ) from error

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order, loaded by the workers."""
        for inputs, _ in self._load(draws):
            yield check_finite(_as_inputs(inputs))


def _known_labels(dataset: Any) -> Tensor | None:
    """Labels that a dataset tells without loading an image (``targets``, as torchvision's)."""
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[tensor_of(list(dataset.indices))]
    # A target transform may turn the listed labels into others.
    if getattr(dataset, "target_transform", None) is not None:
        return None
    targets = getattr(dataset, "targets", None)
    try:
        known = tensor_of(targets)
        if known.ndim == 1 and len(known) == len(dataset) and not known.is_floating_point():
            return known
    except (TypeError, ValueError, RuntimeError):
        pass
    return None


def as_source(data: Any, *, augmented: bool | None = None) -> Source:
    """Make a source of a pair of tensors, a dataset, or a loader.

    Args:
        data: ``(inputs, labels)`` with ``inputs`` a tensor or tuple of tensors (axis 0 = images);
            a map-style dataset of (input, label); or a DataLoader, whose dataset, collate
            function, workers with all their settings and choice of images are used, each image
            once (:func:`numbers_of`). Loaders without random access
            (iterable datasets, or any other iterable of batches) are read into memory once, up
            to 4 GB.
        augmented: Whether an image may look different each time it is drawn. None: as the
            dataset's attribute ``augmented`` says, if it has one; else True for datasets (their
            transforms may be random), False for tensors.

    Raises:
        TypeError: If data is something else or yields something else.
        ValueError: If there are no images, labels are no class indices, or there is no random
            access to more images than memory should take.

    Example:
        >>> source = as_source((torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])))
        >>> [x[0].shape for x in source.batches([[(0, 0), (1, 0)], [(3, 0)]])]
        [torch.Size([2, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
    """
    if (
        isinstance(data, DataLoader)
        and not isinstance(data.dataset, IterableDataset)
        and data.batch_sampler is not None  # else the dataset's items are batches
    ):
        return _loader_source(data, augmented)
    if isinstance(data, TensorDataset):
        if len(data.tensors) < 2:
            raise TypeError("a TensorDataset needs inputs and labels.")
        return TensorSource(data.tensors[:-1], data.tensors[-1])
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data, Dataset):
        if isinstance(data[0], (Tensor, tuple, list)) and isinstance(
            data[1], (Tensor, list, np.ndarray)
        ):
            return TensorSource(*data)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if not hasattr(data, "__len__"):
            raise TypeError(f"{type(data).__name__} has no length; wrap it in a DataLoader.")
        return DatasetSource(data, augmented=_augmented(data, augmented))
    if isinstance(data, (tuple, list)) and len(data) and not isinstance(data, Dataset):
        raise TypeError(_not_a_pair(data))
    if isinstance(data, (DataLoader, IterableDataset)) or (
        isinstance(data, Iterable) and not isinstance(data, (Tensor, str, bytes, dict, tuple, list))
    ):
        return _read(data)
    raise TypeError(
        "data must be a pair (inputs, labels) of tensors, a Dataset of (input, label) or a "
        f"DataLoader of such, not {type(data).__name__}."
    )


def _not_a_pair(data: tuple[Any, ...] | list[Any]) -> str:
    """Why a tuple or list is no data, and what to do."""
    if len(data) == 2 and any(isinstance(item, np.ndarray) for item in data):
        kinds = " and ".join(type(item).__name__ for item in data)
        return (
            f"data must be a pair (inputs, labels) whose inputs are a tensor, not {kinds}: "
            "(torch.from_numpy(inputs), labels), float32 as the network takes them."
        )
    if isinstance(data[0], (tuple, list)) and len(data[0]) == 2:
        return (
            "data must be a pair (inputs, labels) of tensors or a Dataset, not a "
            f"{type(data).__name__} of {len(data)} (input, label) pairs: "
            "(torch.stack([x for x, _ in data]), [y for _, y in data])."
        )
    kinds = ", ".join(type(item).__name__ for item in data[:4]) + (" ..." if len(data) > 4 else "")
    return (
        "data must be a pair (inputs, labels) of tensors, a Dataset of (input, label) or a "
        f"DataLoader of such, not a {type(data).__name__} of {len(data)} ({kinds})."
    )


def _loader_source(loader: DataLoader[Any], augmented: bool | None) -> Source:
    if isinstance(loader.dataset, TensorDataset) and loader.collate_fn is not None:
        augmented = False if augmented is None else augmented
    return DatasetSource(
        loader.dataset,
        numbers=numbers_of(loader),
        loader=loader,
        augmented=_augmented(loader.dataset, augmented),
    )


def numbers_of(loader: DataLoader[Any]) -> list[int] | None:
    """The images that a loader has chosen, each once and in rising order; None: all.

    A sampler that leaves images out (``SubsetRandomSampler``, say) means it. One that draws by
    weight, with replacement, leaves out those of weight zero only: what else one pass of it misses
    is chance. Warns where the loader's choice counts images otherwise than they are used.
    """
    batches: Any = loader.batch_sampler
    sampler = getattr(batches, "sampler", None) if type(batches) is BatchSampler else batches
    if isinstance(sampler, (SequentialSampler, RandomSampler)):
        return None
    if type(sampler) is WeightedRandomSampler:
        warnings.warn(
            "the loader's WeightedRandomSampler decides only that images of weight 0 are left out: "
            "each other image is used alike, whatever its weight. Images are balanced between a "
            "task's own and the others anyway; give a loader without the sampler to say so.",
            stacklevel=2,
        )
        return (sampler.weights > 0).nonzero().flatten().tolist()
    with isolated_rng(0):
        if sampler is batches:
            drawn = [int(i) for batch in batches or () for i in batch]
        else:
            drawn = [int(i) for i in sampler or ()]
    numbers = sorted(set(drawn))
    if len(numbers) < len(drawn):
        warnings.warn(
            f"the loader's {type(sampler).__name__} draws some images more than once: a pass of it "
            f"holds {len(numbers):,} of the dataset's {len(loader.dataset):,} images, and only "  # type: ignore[arg-type]
            "these are used, each as often as any other. If that is chance (it draws with "
            "replacement), give a loader with shuffle=True, or the dataset.",
            stacklevel=2,
        )
    return numbers


def _augmented(dataset: Any, augmented: bool | None) -> bool:
    if augmented is not None:
        return augmented
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return bool(getattr(dataset, "augmented", True))


def _read(batches: Iterable[Any]) -> TensorSource:
    inputs: list[Inputs] = []
    labels: list[Tensor] = []
    n_bytes = 0
    with isolated_rng(0):
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise TypeError(
                    f"the loader must yield (inputs, labels) batches, not {type(batch).__name__}."
                )
            if not isinstance(batch[1], (Tensor, list, tuple, np.ndarray)) or (
                isinstance(batch[1], Tensor) and batch[1].ndim == 0
            ):
                raise TypeError(
                    "the data yields single images with their label, not batches; give "
                    "DataLoader(data, batch_size=32), which collects them."
                )
            inputs.append(_as_inputs(batch[0]))
            labels.append(_check_labels(batch[1], len(inputs[-1][0])))
            n_bytes += sum(item.numel() * item.element_size() for item in inputs[-1])
            if n_bytes > MAX_BYTES:
                raise ValueError(
                    f"the loader gives its images in its own order only, and the first "
                    f"{sum(map(len, labels)):,} of them take {n_bytes / 2**30:.1f} GB of memory "
                    "already. Give a map-style Dataset, which has __getitem__ and __len__ and is "
                    "read as it is needed (nad_attr.datasets.ImageFolderData, for example), or a "
                    "TensorDataset if the images should lie in memory."
                )
    if not inputs:
        raise ValueError("data is empty: there is not a single image to learn from.")
    kinds = {tuple((x.shape[1:], x.dtype) for x in batch) for batch in inputs}
    if len(kinds) > 1:
        raise ValueError(
            "the loader's batches hold inputs of different number, shape or type: "
            f"{[tuple(x.shape) for x in inputs[0]]} and others."
        )
    return TensorSource(
        tuple(torch.cat(parts) for parts in zip(*inputs, strict=True)), torch.cat(labels)
    )


def only_images(inputs: Inputs) -> Tensor:
    """Take a batch that is made of images and nothing else.

    Args:
        inputs: All inputs of the network.

    Returns:
        The one input, (B, C, H, W).

    Raises:
        ValueError: If there are several inputs, or one that holds no images; names their shapes.

    Example:
        >>> only_images((torch.zeros(2, 3, 8, 8),)).shape
        torch.Size([2, 3, 8, 8])
    """
    if len(inputs) != 1 or inputs[0].ndim != 4 or not inputs[0].is_floating_point():
        shapes = ", ".join(f"{tuple(x.shape)} {x.dtype}" for x in inputs)
        raise ValueError(
            "images are needed, one floating-point input (images, channels, height, width); got "
            f"{shapes}."
        )
    return inputs[0]
