"""What a batch of images shows, ready to be counted under many units."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nad_attr.comparison.concept_maps import LabelMaps
from nad_attr.comparison.overlap import Grid, cells

__all__ = ["Shown"]


class _Part:
    """Images of a batch whose label maps have one size.

    Attributes:
        images: int64 (n,), which of the batch.
        size: (H, W).
        present: int64 (p,), the concepts that they show.
        concepts: float64 (combinations, p), which of those each combination of labels has.
        categories: float64 (combinations, categories), for which categories it counts.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Sequence[LabelMaps],
        category: Tensor,
        n_categories: int,
        everywhere: bool,
        device: torch.device,
    ) -> None:
        table = torch.cat([each.concepts for each in labels])
        self.images = images.to(device)
        self.size = (labels[0].combination.shape[0], labels[0].combination.shape[1])
        present = torch.nonzero(table.any(0)).flatten()
        shows = table[:, present].double()
        member = torch.nn.functional.one_hot(category[present], n_categories).double()
        categories = (shows @ member).clamp(max=1)
        if everywhere:  # in all of an image that has a label of the category
            of_image = categories.split([len(each.concepts) for each in labels])
            categories = torch.cat(
                [part.amax(0, keepdim=True).expand_as(part) for part in of_image]
            )
        n_pixels = torch.cat([each.n_pixels for each in labels]).double()
        self.n_pixels = torch.zeros(table.shape[1], dtype=torch.int64)
        self.n_pixels[present] = (n_pixels @ shows).long()
        # Combinations of the images have numbers one after the other.
        first = 0
        maps = []
        for each in labels:
            maps.append(each.combination + first)
            first += len(each.concepts)
        self._combination = torch.stack(maps).to(device)
        self.present = present.to(device)
        self.concepts, self.categories = shows.to(device), categories.to(device)
        self._by_cell: dict[tuple[int, int], Tensor] = {}

    def by_cell(self, layout: Grid) -> Tensor:
        """Combinations of labels by cell of a site's maps: (images * cells, P * Q)."""
        if layout.shape not in self._by_cell:
            self._by_cell[layout.shape] = cells(self._combination, len(self.concepts), layout)
        return self._by_cell[layout.shape]


class Shown:
    """What a batch of images shows.

    Args:
        labels: Of each image.
        category: int64 (concepts,), the number of each concept's category.
        n_categories: How many there are.
        everywhere: Whether unlabelled pixels count in images with labels of a category.
        device: Where to count.

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
    ) -> None:
        by_size: dict[tuple[int, ...], list[int]] = {}
        for i, each in enumerate(labels):
            by_size.setdefault(tuple(each.combination.shape), []).append(i)
        self.parts = [
            _Part(
                torch.tensor(images),
                [labels[i] for i in images],
                category,
                n_categories,
                everywhere,
                device,
            )
            for images in by_size.values()
        ]
        self.n_pixels = torch.stack([part.n_pixels for part in self.parts]).sum(0)
