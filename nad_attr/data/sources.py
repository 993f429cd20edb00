"""Sources of images for learning and evaluation: tensors, datasets and loaders.

Every draw is a function of a seed alone. Random transforms of a dataset read the global random
states, so each item is fetched with those states seeded for it and restored afterwards: neither the
caller's random numbers nor the number of loader workers have an effect.
"""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

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
    default_collate,
    get_worker_info,
)

from nad_attr._checks import tensor_of
from nad_attr.data.labels import Labels, ReadLabels, only_classes, read_labels
from nad_attr.sites.calling import Fields
from nad_attr.system.processes import check_processes
from nad_attr.system.rng import isolated_rng, seed_all

__all__ = ["Data", "Draw", "Inputs", "Source", "as_source"]


#: Bytes of images that are read into memory if there is no other way to draw from them.
MAX_BYTES = 2**32
#: Items that are searched for one that is not None.
ITEMS_TRIED = 100
#: Data for learning and evaluation.
Data: TypeAlias = "DataLoader[Any] | Dataset[Any] | tuple[Any, Any] | list[Any] | Source"
#: One image to fetch: its number, and the seed of its random transforms.
Draw: TypeAlias = "tuple[int, int]"
#: The network's inputs for a batch; axis 0 of each is the image.
Inputs: TypeAlias = "tuple[Tensor, ...]"


class Source(Protocol):
    """Images with labels, drawn by number."""

    #: int64 (N,) class indices or (N, K) memberships, see :mod:`nad_attr.data.labels`
    labels: Tensor
    #: float64 (N, K), of regression targets
    targets: Tensor | None
    #: The names of the inputs, known with the first of them
    fields: Fields | None
    #: Whether an image may look different each time it is drawn.
    augmented: bool

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order, on the CPU or where they are."""


def check_finite(inputs: Inputs) -> Inputs:
    """Refuse NaN and infinity, which would spread to all gates of the batch."""
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
    if isinstance(value, Mapping):
        value = tuple(value.values())
    inputs = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    inputs = tuple(
        tensor_of(x) if isinstance(x, np.ndarray) and x.dtype != object else x for x in inputs
    )
    if not inputs or not all(isinstance(item, Tensor) for item in inputs):
        kinds = ", ".join(type(item).__name__ for item in inputs) or "nothing"
        raise TypeError(
            f"a batch's inputs must be a tensor or a tuple of tensors, got {kinds}; let the "
            "dataset's transform end in tensors (torchvision's ToTensor, for example)."
        )
    if any(item.ndim == 0 or len(item) != len(inputs[0]) for item in inputs):
        raise ValueError(
            "all inputs need the same number of images on axis 0, got shapes "
            f"{[tuple(item.shape) for item in inputs]}."
        )
    return inputs


#: Names of a row's label, in this order.
LABEL_FIELDS = ("labels", "label", "targets", "target", "y", "class", "cls")


class _Parts(NamedTuple):
    """The parts of a batch, or of an item."""

    inputs: Any
    label: Any
    fields: Fields | None


def _parts(batch: Any) -> _Parts:
    """Inputs and label of an item or batch; a TypeError names what is neither a pair nor a row."""
    if isinstance(batch, Mapping):
        key = next((name for name in LABEL_FIELDS if name in batch), None)
        if key is None:
            raise TypeError(
                f"a row has the fields {', '.join(map(str, batch))}, but none of them is called "
                f"{', '.join(LABEL_FIELDS)}; yield (inputs, label) pairs."
            )
        kept = {k: v for k, v in batch.items() if k != key and not _is_text(v)}
        if not kept:
            raise TypeError(f"a row has no field of numbers beside its {key!r}.")
        return _Parts(kept, batch[key], Fields(tuple(map(str, kept)), row=True))
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        length = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise TypeError(
            f"the dataset must yield (input, label) pairs or rows with a label; got "
            f"{type(batch).__name__}{length}. Give a list or a Dataset of row[0], row[1], without "
            "the rest of each row; several inputs go together: (row[0], row[1]), row[2]."
        )
    return _Parts(batch[0], batch[1], fields_of(batch[0]))


def fields_of(inputs: Any) -> Fields | None:
    """The names of inputs that are a dictionary."""
    return Fields(tuple(map(str, inputs))) if isinstance(inputs, Mapping) else None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], str)
    )


def _labels_of(parts: Sequence[Any], classes: Any) -> ReadLabels:
    if any(map(_is_text, parts)):
        names = [name for part in parts for name in ([part] if isinstance(part, str) else part)]
        listed = list(classes) if isinstance(classes, (list, tuple)) else None
        return read_labels(Labels(names, classes=listed))
    tensors = []
    for part in parts:
        try:
            # Several labels an image, collated label by label.
            columns = isinstance(part, (list, tuple)) and isinstance(part[0], Tensor)
            tensors.append(torch.stack(list(part), dim=-1) if columns else tensor_of(part))
        except (TypeError, ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"labels must be class indices, got {part!r:.60}: {error}.") from None
    if any(t.ndim == 0 or t.shape[1:] != tensors[0].shape[1:] for t in tensors):
        raise ValueError(
            "labels must be class indices, an integer tensor of shape (N,), or rows of one length; "
            f"got shapes {sorted({tuple(t.shape) for t in tensors})[:5]}."
        )
    return read_labels(torch.cat(tensors))


class TensorSource:
    """Images in memory."""

    augmented = False

    def __init__(self, inputs: Any, labels: Any) -> None:
        # Tensors made in the caller's inference mode cannot be saved for backward; copies can.
        with torch.inference_mode(False):
            self.inputs = tuple(
                item.clone() if item.is_inference() else item for item in _as_inputs(inputs)
            )
        self.fields = fields_of(inputs)
        read = (
            labels if isinstance(labels, ReadLabels) else read_labels(labels, len(self.inputs[0]))
        )
        if len(read.labels) != len(self.inputs[0]):
            raise ValueError(f"{len(self.inputs[0])} inputs came with {len(read.labels)} labels.")
        self.labels, self.targets = read.labels, read.targets
        check_finite(self.inputs)

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order."""
        for chosen in draws:
            index = torch.tensor([number for number, _ in chosen], dtype=torch.long, device="cpu")
            yield tuple(item.detach()[index.to(item.device)] for item in self.inputs)


class ChosenSource:
    """The images of another source with the numbers ``rows``, int64 (N,).

    Example:
        >>> whole = as_source((torch.eye(3), torch.tensor([0, 1, 2])))
        >>> some = ChosenSource(whole, torch.tensor([2, 0]))
        >>> some.labels.tolist(), next(some.batches([[(0, 0)]]))[0].tolist()
        ([2, 0], [[0.0, 0.0, 1.0]])
    """

    def __init__(self, source: Source, rows: Tensor) -> None:
        self.source, self.rows = source, rows.tolist()
        self.labels = source.labels[rows]
        self.targets = None if source.targets is None else source.targets[rows]
        self.augmented = source.augmented

    @property
    def fields(self) -> Fields | None:
        """The names of the inputs."""
        return self.source.fields

    @fields.setter
    def fields(self, fields: Fields | None) -> None:
        self.source.fields = fields

    @property
    def dataset(self) -> Dataset[Any]:
        """The dataset that the images come from, if there is one."""
        found: Dataset[Any] = self.source.dataset  # type: ignore[attr-defined]
        return found

    @property
    def numbers(self) -> list[int]:
        """Their numbers in it."""
        numbers: Sequence[int] = getattr(self.source, "numbers", range(len(self.source.labels)))
        return [numbers[row] for row in self.rows]

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order."""
        return self.source.batches([(self.rows[n], key) for n, key in some] for some in draws)


class MirroredSource(ChosenSource):
    """The N pictures (C, H, W) of a source and as many mirrored ones: N + i is picture i mirrored.

    Example:
        >>> whole = as_source((torch.arange(3.0).view(1, 1, 1, 3), torch.tensor([0])))
        >>> next(MirroredSource(whole).batches([[(0, 0), (1, 0)]]))[0].flatten(1).tolist()
        [[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]
    """

    def __init__(self, source: Source) -> None:
        self.n_plain = len(source.labels)
        super().__init__(source, torch.arange(2 * self.n_plain, device="cpu") % self.n_plain)

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order."""
        kept = [list(some) for some in draws]
        for some, (images,) in zip(kept, super().batches(kept), strict=True):
            turned = torch.tensor([number >= self.n_plain for number, _ in some], device="cpu")
            turned = turned.to(images.device).view(-1, 1, 1, 1)
            yield (torch.where(turned, images.flip(-1), images),)


class _SeededItems(Dataset[Any]):
    """Items addressed by (number, seed), so that augmentation depends on nothing else."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self.dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Any:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> list[Any]:
        """The items of a batch; called by torch's loader."""
        items = []
        with isolated_rng():
            for number, seed in keys:
                seed_all(seed)
                item: Any = self.dataset[number]
                items.append(_row(item) if isinstance(item, Mapping) else item)
        return items


def _row(item: Mapping[Any, Any]) -> dict[Any, Any]:
    """A row whose lists of numbers are tensors, from which batches are stacked."""
    lists = {k: v for k, v in item.items() if isinstance(v, list) and not _is_text(v)}
    return dict(item) | {k: torch.as_tensor(v, device="cpu") for k, v in lists.items()}


#: A loader's settings for loading items.
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
            object.__setattr__(info, "dataset", inner)  # it refuses a plain assignment
        if self.function is not None:
            self.function(number)


def loading(loader: DataLoader[Any] | None) -> dict[str, Any]:
    """A loader's settings, as arguments of another one: workers, memory, collating."""
    if loader is None:
        return {}
    options = {name: getattr(loader, name) for name in _SETTINGS}
    if not options["pin_memory_device"]:  # torch warns if it is given
        del options["pin_memory_device"]
    return options | {"collate_fn": loader.collate_fn, "worker_init_fn": loader.worker_init_fn}


def started(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start a loader's pass on the CPU, whose generator draws its seed, for any default device."""
    with torch.device("cpu"):
        return iter(loader)


class SeededLoader:
    """Loads items of a map-style dataset in any order, each a function of its number and seed.

    The loader's settings are used: workers, pinned memory, timeout and so on. ``collate`` and
    ``n_workers`` above 0 replace its own.
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

    def _open(self, draws: _Draws, **changes: Any) -> DataLoader[Any]:
        return DataLoader(
            _SeededItems(self.dataset),
            batch_sampler=draws,
            generator=torch.Generator().manual_seed(0),  # never the global one
            **(self.options | changes),
        )

    def __call__(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Any]:
        """A batch for each list of (number, seed)."""
        if not self.options.get("persistent_workers") or self._busy:
            # Persistent workers serve one pass at a time.
            changes = {"persistent_workers": False} if self._busy else {}
            yield from started(self._open(_Draws(draws), **changes))
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
    """A batch sampler with other batches in each pass."""

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
        labels: Labels | None = None,
    ) -> None:
        if loader is not None:
            check_processes(loader.num_workers, "num_workers of the loader")
        self.dataset, self.augmented = dataset, augmented
        self._loader = SeededLoader(dataset, loader)
        self.fields: Fields | None = None
        n = len(dataset)  # type: ignore[arg-type]
        self.numbers = range(n) if numbers is None else list(numbers)
        if loader is not None and _drops(loader.collate_fn, dataset, self.numbers):
            self.numbers = self._numbers_of_items()
        read = self._labels() if labels is None else read_labels(labels)
        if len(read.labels) != len(self.numbers):
            raise ValueError(f"{len(self.numbers)} inputs came with {len(read.labels)} labels.")
        self._own_labels = labels is None
        self.labels, self.targets = read.labels, read.targets

    def _numbers_of_items(self) -> list[int]:
        """The items that are not None; the collate function would drop None."""
        one_by_one = copy.copy(self._loader)
        one_by_one.options = self._loader.options | {"collate_fn": _is_none}
        every = ([(number, 0)] for number in self.numbers)
        return [n for n, none in zip(self.numbers, one_by_one(every), strict=True) if not none]

    def _labels(self) -> ReadLabels:
        known = _known_labels(self.dataset)
        if known is not None:
            return read_labels(
                known[torch.as_tensor(list(self.numbers), dtype=torch.long, device="cpu")]
            )
        if len(self.numbers) == 0:
            return read_labels(torch.zeros(0, dtype=torch.long, device="cpu"))
        # Only the items have the labels: read them all once.
        every = ([(number, 0)] for number in self.numbers)
        parts = [_parts(batch).label for batch in self._collated(self._loader(every))]
        dataset = self.dataset
        while isinstance(dataset, Subset):
            dataset = dataset.dataset
        return _labels_of(parts, getattr(dataset, "classes", None))

    @staticmethod
    def _collated(loader: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from loader
        except (AttributeError, TypeError, pickle.PicklingError) as error:
            if not re.match(r"(Can't|cannot) pickle|Can't get local", str(error)):
                raise
            raise ValueError(
                f"the loader's workers cannot be started: {error}. What the dataset has must be "
                "defined in a module by name (no lambda, no local class); or give the loader "
                "num_workers=0."
            ) from error
        except RuntimeError as error:
            if "stack expects each tensor to be equal size" not in str(error):
                raise
            raise ValueError(
                "the dataset's images differ in shape and cannot go into one batch; let its "
                "transform crop them to one size."
            ) from error

    def batches(self, draws: Iterable[Sequence[Draw]]) -> Iterator[Inputs]:
        """The inputs of each list of draws, in order, loaded by the workers."""
        kept: list[int] = []

        def noted() -> Iterator[Sequence[Draw]]:
            for chosen in draws:
                kept.append(len(chosen))
                yield chosen

        every = ([(self.numbers[i], s) for i, s in chosen] for chosen in noted())
        for n, batch in enumerate(self._collated(self._loader(every))):
            # With labels given separately a batch may be inputs only.
            alone = not self._own_labels and not (
                isinstance(batch, Mapping) or (isinstance(batch, (tuple, list)) and len(batch) == 2)
            )
            inputs = batch if alone else _parts(batch).inputs
            self.fields = None if alone else _parts(batch).fields
            tensors = check_finite(_as_inputs(inputs))
            if len(tensors[0]) != kept[n]:
                raise ValueError(
                    f"the collate function made {len(tensors[0])} images of {kept[n]} items, so "
                    "it is not known which items they are; leave broken items out (torch.utils."
                    "data.Subset), or let the dataset return None for them."
                )
            yield tensors


def _is_none(items: list[Any]) -> bool:
    return items[0] is None


def _drops(collate: Any, dataset: Any, numbers: Sequence[int]) -> bool:
    """Whether a collate function leaves out items that are None (tried on the first item)."""
    if collate is None or collate is default_collate or not len(numbers):
        return False
    with isolated_rng(0):
        for number in list(numbers[:ITEMS_TRIED]):
            item = dataset[number]
            if item is not None:
                break
        else:
            return True
        try:
            return len(_as_inputs(_parts(collate([None, item])).inputs)[0]) == 1
        except Exception:  # a collate function of others may raise anything for None
            return False


def _known_labels(dataset: Any) -> Tensor | None:
    """Labels that a dataset has without loading an image (``targets``, as torchvision's)."""
    if isinstance(dataset, Subset):
        inner = _known_labels(dataset.dataset)
        return None if inner is None else inner[tensor_of(list(dataset.indices))]
    # A target transform may change the listed labels.
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


def as_source(data: Any, *, augmented: bool | None = None, any_labels: bool = False) -> Source:
    """Make a source of a pair of tensors, a dataset, or a loader.

    Args:
        data: ``(inputs, labels)`` with ``inputs`` a tensor, array, list of images, or a tuple or
            dictionary of tensors (axis 0 = images); a map-style dataset, or a list, of (input,
            label) or of rows, dictionaries that include a label; or a DataLoader, whose dataset,
            collate function, workers with all their settings and choice of images are used, each
            image once (:func:`numbers_of`). Labels are of any kind of
            :class:`~nad_attr.data.labels.Labels`; ``(dataset, Labels)`` replaces a dataset's own.
            Loaders without random access (iterable datasets, or any other iterable of batches or
            items) are read into memory once, up to 4 GB.
        augmented: Whether an image may look different each time it is drawn. None: the dataset's
            attribute ``augmented``, if it has one; else True for datasets (their transforms may be
            random), False for tensors and lists.
        any_labels: Whether labels may be others than one class an image.

    Raises:
        TypeError: If data is something else or yields something else.
        ValueError: If there are no images, labels are of no known kind, or not class indices
            when only these are allowed, or too many images have no random access.

    Example:
        >>> source = as_source((torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 1, 0])))
        >>> [x[0].shape for x in source.batches([[(0, 0), (1, 0)], [(3, 0)]])]
        [torch.Size([2, 3, 8, 8]), torch.Size([1, 3, 8, 8])]
    """
    source = _as_source(data, augmented)
    if not any_labels:
        only_classes(source.labels)
    return source


def _as_source(data: Any, augmented: bool | None) -> Source:
    if isinstance(data, (TensorSource, DatasetSource, ChosenSource)):
        return data
    labels = None
    if isinstance(data, tuple) and len(data) == 2 and isinstance(data[1], Labels):
        if not isinstance(data[0], (Dataset, DataLoader)):
            return TensorSource(_stacked(data[0], len(data[1])), data[1])
        data, labels = data
        if isinstance(data, TensorDataset):
            return TensorSource(data.tensors[: max(1, len(data.tensors) - 1)], labels)
    if (
        isinstance(data, DataLoader)
        and not isinstance(data.dataset, IterableDataset)
        and data.batch_sampler is not None  # else the dataset's items are batches
    ):
        if isinstance(data.dataset, TensorDataset) and data.collate_fn is not None:
            augmented = False if augmented is None else augmented
        return DatasetSource(
            data.dataset,
            numbers=numbers_of(data),
            loader=data,
            augmented=_augmented(data.dataset, augmented),
            labels=labels,
        )
    if isinstance(data, TensorDataset):
        if len(data.tensors) < 2:
            raise TypeError("a TensorDataset needs inputs and labels.")
        return TensorSource(data.tensors[:-1], data.tensors[-1])
    if isinstance(data, (tuple, list)) and len(data) == 2 and not isinstance(data, Dataset):
        if isinstance(data[0], (Tensor, tuple, list, np.ndarray, Mapping)) and isinstance(
            data[1], (Tensor, list, np.ndarray)
        ):
            return TensorSource(_stacked(data[0], len(data[1])), data[1])
    if isinstance(data, list) and data and isinstance(data[0], (tuple, Mapping)):
        data, augmented = _Items(data), bool(augmented)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        if not hasattr(data, "__len__"):
            raise TypeError(f"{type(data).__name__} has no length; wrap it in a DataLoader.")
        return DatasetSource(data, augmented=_augmented(data, augmented), labels=labels)
    if not isinstance(data, Dataset) and hasattr(data, "__getitem__") and hasattr(data, "__len__"):
        if hasattr(data, "features"):  # a datasets.Dataset of Hugging Face is not one of torch
            return DatasetSource(_Items(data), augmented=_augmented(data, augmented), labels=labels)
    if isinstance(data, (tuple, list)) and len(data):
        kinds = ", ".join(type(x).__name__ for x in data[:4]) + (" ..." if len(data) > 4 else "")
        raise TypeError(
            "data must be a pair (inputs, labels) of tensors, a Dataset of (input, label) or a "
            f"DataLoader of such, got a {type(data).__name__} of {len(data)} ({kinds})."
        )
    if isinstance(data, (DataLoader, IterableDataset)) or (
        isinstance(data, Iterable) and not isinstance(data, (Tensor, str, bytes, dict, tuple, list))
    ):
        return _read(data, labels)
    raise TypeError(
        "data must be a pair (inputs, labels) of tensors, a Dataset of (input, label) or a "
        f"DataLoader of such, got {type(data).__name__}."
    )


class _Items(Dataset[Any]):
    """Items in memory, such as a list of pairs or the rows of a table."""

    def __init__(self, items: Any) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, number: int) -> Any:
        return self.items[number]


def _stacked(inputs: Any, n: int) -> Any:
    """A list of n images as one tensor; other inputs unchanged."""
    if not isinstance(inputs, list) or len(inputs) != n or not n:
        return inputs
    if not all(isinstance(x, (Tensor, np.ndarray)) and x.ndim for x in inputs):
        return inputs
    if all(len(x) == n for x in inputs):
        return inputs  # n inputs of n images each
    try:
        return torch.stack([tensor_of(x) for x in inputs])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"the list of images cannot be stacked to one tensor: {error}.") from None


def numbers_of(loader: DataLoader[Any]) -> list[int] | None:
    """The images that a loader has chosen, each once and in rising order; None: all.

    Images that a sampler leaves out (``SubsetRandomSampler``, for example) stay out. A sampler by
    weight, with replacement, leaves out only those of weight zero: its other omissions are chance.
    Warns if the loader's choice counts images otherwise than they are used.
    """
    batches: Any = loader.batch_sampler
    sampler = getattr(batches, "sampler", None) if type(batches) is BatchSampler else batches
    if isinstance(sampler, (SequentialSampler, RandomSampler)):
        return None
    if type(sampler) is WeightedRandomSampler:
        warnings.warn(
            "the loader's WeightedRandomSampler is used only to leave out images of weight 0; "
            "all other images count the same. Images are balanced between a "
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


def _read(batches: Iterable[Any], given: Labels | None = None) -> TensorSource:
    inputs: list[Inputs] = []
    labels: list[Any] = []
    n_bytes = n_images = 0
    fields: Fields | None = None
    with isolated_rng(0):
        for batch in batches:
            parts = _parts(batch)
            if _is_item(parts, isinstance(batches, DataLoader)):
                parts = _parts(default_collate([_row(batch) if parts.fields else batch]))
            fields = parts.fields
            inputs.append(_as_inputs(parts.inputs))
            labels.append(parts.label)
            n_bytes += sum(item.numel() * item.element_size() for item in inputs[-1])
            n_images += len(inputs[-1][0])
            if n_bytes > MAX_BYTES:
                raise ValueError(
                    f"the loader gives its images in its own order only, and the first "
                    f"{n_images:,} of them take {n_bytes / 2**30:.1f} GB of memory "
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
    joined = tuple(torch.cat(parts) for parts in zip(*inputs, strict=True))
    names = getattr(getattr(batches, "dataset", batches), "classes", None)
    read = _labels_of(labels, names) if given is None else given
    source = TensorSource(joined, read)
    source.fields = fields
    return source


def _is_item(parts: _Parts, of_loader: bool) -> bool:
    """Whether it is one image with its label, not a batch of them.

    An image of three axes with as many labels as colours is one, unless a loader made it.
    """
    label = parts.label
    if isinstance(label, (int, float, str)) or np.ndim(label) == 0:
        return True
    first = next(iter(parts.inputs.values())) if isinstance(parts.inputs, Mapping) else parts.inputs
    first = first[0] if isinstance(first, (tuple, list)) and len(first) else first
    if not hasattr(first, "__len__") or len(first) != len(label):
        return hasattr(first, "__len__")
    return not of_loader and np.ndim(first) == 3 and len(first) in (1, 3, 4)


def only_images(inputs: Inputs) -> Tensor:
    """The one input of a network, (B, C, H, W); others are refused.

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
