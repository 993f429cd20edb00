"""Images with label maps, drawn one batch after the other."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate, default_convert

from nad_attr.concepts.datasets.label_maps import label_parts
from nad_attr.data.fingerprints import chosen_for_fingerprint
from nad_attr.data.sources import Draw, Inputs, SeededLoader, check_finite, numbers_of
from nad_attr.system.processes import check_processes
from nad_attr.system.rng import permutation, seed_of

__all__ = ["Batch", "LabelledImages"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Some images.

    Attributes:
        numbers: Their numbers in the dataset.
        inputs: What the network takes, (B, ...) each.
        labels: Of each image, as the dataset gives them.
        size: (H, W) of the images.
    """

    numbers: list[int]
    inputs: Inputs
    labels: list[Any]
    size: tuple[int, int]


class LabelledImages:
    """The images of a dataset of (image, labels), or some of them; ``numbers`` are those taken.

    Args:
        dataset: With ``len`` and ``[...]``; or a DataLoader of one: its choice of images, workers
            and collate function (which gets one item at a time) are used.
        n_images: How many to take, drawn with the seed; None: all.
        seed: Of the draw and of random transforms.
        n_workers: Processes that load them; 0: as a loader says, or none.

    Raises:
        TypeError: If it is not such a dataset.
        ValueError: If there are fewer images.

    Example:
        >>> images = LabelledImages([(torch.zeros(3, 4, 4), 0)] * 5, n_images=2)
        >>> len(images), next(images.batches([range(2)])).inputs[0].shape
        (2, torch.Size([2, 3, 4, 4]))
    """

    def __init__(
        self, dataset: Any, n_images: int | None = None, seed: int = 0, n_workers: int = 0
    ) -> None:
        loader = dataset if isinstance(dataset, DataLoader) else None
        if loader is not None:
            dataset = loader.dataset
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset must have a length and items (image, labels), which {type(dataset)} has "
                "not; read a stream into a list, or wrap it in a map-style dataset."
            )
        check_processes(n_workers)
        numbers = None if loader is None or loader.batch_sampler is None else numbers_of(loader)
        self.numbers = list(range(len(dataset))) if numbers is None else numbers
        n = len(self.numbers)
        if not n:
            raise ValueError("the dataset is empty.")
        if n_images is not None:
            if isinstance(n_images, bool) or not isinstance(n_images, int):
                raise TypeError(f"n_images must be a whole number, got {n_images!r}.")
            if not 1 <= n_images <= n:
                raise ValueError(f"n_images must be 1 to {n}, the images that there are.")
            chosen = permutation(n, "dissection images", seed)[:n_images]
            self.numbers = sorted(self.numbers[i] for i in chosen.tolist())
        self._seed = seed
        collate = None if loader is None else loader.collate_fn
        own = collate if collate not in (None, default_collate, default_convert) else None
        self._items = SeededLoader(dataset, loader, collate=_Listed(own), n_workers=n_workers)

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """The images at some places in ``numbers``.

        Raises:
            TypeError: If an item is no (image, labels).
            ValueError: If images differ in shape or hold NaN.
        """
        # Loading runs ahead, so the numbers wait here for their items.
        waiting: deque[list[int]] = deque()

        def draws() -> Iterator[list[Draw]]:
            for chosen in places:
                waiting.append([self.numbers[i] for i in chosen])
                yield [(i, seed_of("dissection", self._seed, i)) for i in waiting[-1]]

        for items in self._items(draws()):
            numbers = waiting.popleft()
            pairs = [_pair(*item) for item in zip(numbers, items, strict=True)]
            shapes = {tuple(tuple(x.shape) for x in inputs) for inputs, _ in pairs}
            if len(shapes) > 1:
                raise ValueError(
                    f"images {numbers[0]} to {numbers[-1]} differ in shape: {sorted(shapes)}; "
                    "bring them to one size."
                )
            inputs = tuple(torch.stack(parts) for parts in zip(*(i for i, _ in pairs), strict=True))
            size = (int(inputs[0].shape[-2]), int(inputs[0].shape[-1]))
            yield Batch(numbers, check_finite(inputs), [labels for _, labels in pairs], size)

    def fingerprint(self) -> str:
        """SHA-256 of the images' numbers, of what is stored of them, and of some with their labels.

        See :func:`nad_attr.data.fingerprints.data_fingerprint`.
        """
        digest = hashlib.sha256(repr(self.numbers).encode())
        places = chosen_for_fingerprint(digest, self._items.dataset, self.numbers)
        for batch in self.batches([[place] for place in places]):
            for part in (*batch.inputs, *label_parts(batch.labels[0], "an image")):
                array = part.detach().cpu().contiguous()
                digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
                digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class _Listed:
    """Items in a list; through a user's collate function one by one, so that none sees others."""

    def __init__(self, collate: Callable[[list[Any]], Any] | None) -> None:
        self.collate = collate

    def __call__(self, items: list[Any]) -> list[Any]:
        if self.collate is None:
            return items
        return [_only(self.collate([item])) for item in items]


def _only(batch: Any) -> Any:
    """The item of a batch of one: (image, labels)."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        return batch  # refused with the item's number
    inputs, labels = batch
    several = isinstance(inputs, (tuple, list))
    named = isinstance(labels, dict)
    one = {key: value[0] for key, value in labels.items()} if named else labels[0]
    return (tuple(x[0] for x in inputs) if several else inputs[0]), one


def _pair(number: int, item: Any) -> tuple[Inputs, Any]:
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        kind = type(item).__name__
        raise TypeError(f"item {number} of the dataset is {kind}, not a pair (image, labels).")
    inputs = tuple(item[0]) if isinstance(item[0], (tuple, list)) else (item[0],)
    if not inputs or not all(isinstance(x, Tensor) for x in inputs):
        raise TypeError(
            f"the image of item {number} is {type(item[0]).__name__}, not a tensor; let the "
            "dataset's transform end in one."
        )
    if inputs[0].ndim < 2:
        raise ValueError(
            f"the image of item {number} has shape {tuple(inputs[0].shape)}; expected (..., H, W)."
        )
    return inputs, item[1]
