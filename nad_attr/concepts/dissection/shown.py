"""What a batch of images shows, ready to be counted under many units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nad_attr.concepts.datasets.label_maps import LabelMaps
from nad_attr.concepts.dissection.overlap import running_sums

__all__ = ["Shown"]

#: Bytes that the running sums of some images may take together; those of one may take more.
_SUMS_BYTES = 2**27


class _Part:
    """Images of a batch whose label maps have one size.

    Attributes:
        place: int64 (B,), which of these images each of the batch is, -1 for none.
        size: (H, W).
        present: int64 (p,), the concepts that they show.
        sums: Float (W + 1, n * H, p + categories), of these concepts and of the pixels that count
            for each category, as :func:`running_sums` makes them.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[LabelMaps],
        n_images: int,
        category: Tensor,
        n_categories: int,
        everywhere: bool,
        device: torch.device,
        room: list[Tensor],
    ) -> None:
        table = torch.cat([each.concepts for each in labels])
        place = torch.full((n_images,), -1, device="cpu")
        place[images] = torch.arange(len(images), device="cpu")
        self.place = place.to(device)
        self.size = (labels[0].combination.shape[0], labels[0].combination.shape[1])
        present = torch.nonzero(table.any(0)).flatten()
        shows = table[:, present].double()
        member = torch.nn.functional.one_hot(category[present], n_categories).double()
        categories = (shows @ member).clamp(max=1)
        if everywhere:  # in all of an image that has a label of the category
            parts = categories.split([len(each.concepts) for each in labels])
            categories = torch.cat([part.amax(0, keepdim=True).expand_as(part) for part in parts])
        n_pixels = torch.cat([each.n_pixels for each in labels]).double()
        self.n_pixels = torch.zeros(table.shape[1], dtype=torch.int64, device="cpu")
        self.n_pixels[present] = (n_pixels @ shows).long()
        # Combinations of the images have numbers one after the other.
        first = 0
        maps = []
        for each in labels:
            maps.append(each.combination + first)
            first += len(each.concepts)
        self.present = present.to(device)
        counted = torch.cat([shows, categories], 1).to(device)
        self.sums = running_sums(torch.stack(maps).to(device), counted, room)


class Shown:
    """The concepts that a batch of images shows.

    Args:
        labels: Of each image.
        category: int64 (concepts,), the number of each concept's category.
        n_categories: How many there are.
        everywhere: Whether unlabelled pixels count in images with labels of a category.
        device: Where to count.
        rooms: Memory of an earlier batch to use again; a list that grows as needed.

    Attributes:
        parts: Groups of images whose label maps have one size.
        n_pixels: int64 (concepts,), pixels that show each concept.
    """

    def __init__(
        self,
        labels: Sequence[LabelMaps],
        category: Tensor,
        n_categories: int,
        *,
        everywhere: bool,
        device: torch.device,
        rooms: list[list[Tensor]] | None = None,
    ) -> None:
        rooms = [] if rooms is None else rooms
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, each in enumerate(labels):
            by_size.setdefault(tuple(each.combination.shape), []).append(i)
        groups = [
            group for images in by_size.values() for group in _split(images, labels, n_categories)
        ]
        rooms += [[] for _ in range(len(rooms), len(groups))]
        self.parts = [
            _Part(
                torch.tensor(images, device="cpu"),
                [labels[i] for i in images],
                len(labels),
                category,
                n_categories,
                everywhere,
                device,
                room,
            )
            for images, room in zip(groups, rooms, strict=False)
        ]
        self.n_pixels = torch.stack([part.n_pixels for part in self.parts]).sum(0)


def _split(
    images: Sequence[int], labels: Sequence[LabelMaps], n_categories: int
) -> list[list[int]]:
    """Images with labels of one size in groups whose running sums are not too large."""
    height, width = labels[images[0]].combination.shape
    groups: list[list[int]] = []
    there = torch.zeros(0, device="cpu")
    for i in images:
        own = labels[i].concepts.any(0)
        if groups:
            n_shown = int((there | own).sum()) + n_categories
            n_bytes = 4 * (len(groups[-1]) + 1) * height * (width + 1) * n_shown
        if not groups or n_bytes > _SUMS_BYTES:
            groups.append([])
            there = torch.zeros_like(own)
        groups[-1].append(i)
        there = there | own
    return groups
