"""Images with label maps, drawn one batch after the other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nad_attr._processes import check_processes
from nad_attr.comparison.concept_maps import label_parts
from nad_attr.data import Inputs, check_finite, isolated_rng, seed_of
from nad_attr.provenance import chosen_for_fingerprint

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


class _Seeded(Dataset[Any]):
    """Items whose random transforms depend on seed and number alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, number: int) -> Any:
        with isolated_rng(seed_of("dissection", self.seed, number)):
            return number, self.dataset[number]


class LabelledImages:
    """The images of a dataset of (image, labels), or some of them.

    Args:
        dataset: With ``len`` and ``[...]``.
        n_images: How many to take, drawn with the seed; None: all.
        seed: Of the draw and of random transforms.
        n_workers: Processes that load them.

    Attributes:
        numbers: The images' numbers in the dataset, rising.

    Raises:
        TypeError: If it is no such dataset.
        ValueError: If there are fewer images.

    Example:
        >>> images = LabelledImages([(torch.zeros(3, 4, 4), 0)] * 5, n_images=2)
        >>> len(images), next(images.batches([range(2)])).inputs[0].shape
        (2, torch.Size([2, 3, 4, 4]))
    """

    def __init__(
        self, dataset: Any, n_images: int | None = None, seed: int = 0, n_workers: int = 0
    ) -> None:
        if isinstance(dataset, DataLoader):
            dataset = dataset.dataset
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"dataset must have a length and items (image, labels), which {type(dataset)} has "
                "not; read a stream into a list, or wrap it in a map-style dataset."
            )
        check_processes(n_workers)
        n = len(dataset)
        if not n:
            raise ValueError("the dataset is empty.")
        self.numbers = list(range(n))
        if n_images is not None:
            if isinstance(n_images, bool) or not isinstance(n_images, int):
                raise TypeError(f"n_images must be a whole number, not {n_images!r}.")
            if not 1 <= n_images <= n:
                raise ValueError(f"n_images must be 1 to {n}, the images that there are.")
            generator = torch.Generator().manual_seed(seed_of("dissection images", seed))
            self.numbers = sorted(torch.randperm(n, generator=generator)[:n_images].tolist())
        self._items, self._n_workers = _Seeded(dataset, seed), n_workers

    def __len__(self) -> int:
        return len(self.numbers)

    def batches(self, places: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """The images at some places in ``numbers``.

        Raises:
            TypeError: If an item is no (image, labels).
            ValueError: If images differ in shape or hold NaN.
        """
        loader: DataLoader[Any] = DataLoader(
            self._items,
            batch_sampler=([self.numbers[i] for i in chosen] for chosen in places),
            collate_fn=_listed,
            num_workers=self._n_workers,
            generator=torch.Generator().manual_seed(0),  # never the global one
        )
        for items in loader:
            numbers = [number for number, _ in items]
            pairs = [_pair(number, item) for number, item in items]
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

        See :func:`nad_attr.provenance.data_fingerprint`.
        """
        digest = hashlib.sha256(repr(self.numbers).encode())
        places = chosen_for_fingerprint(digest, self._items.dataset, self.numbers)
        for batch in self.batches([[place] for place in places]):
            for part in (*batch.inputs, *label_parts(batch.labels[0], "an image")):
                array = part.detach().cpu().contiguous()
                digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
                digest.update(array.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _listed(items: list[Any]) -> list[Any]:
    return items


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
