"""Photos with pixel labels as data sets that dissection reads: common folder formats.

Each yields (image, labels) and has a concept table ``concepts``. Whole images are resized to
``size`` without cropping, so that label maps cover the same field. Needs Pillow.
"""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from nad_attr.concepts.datasets.colours import COLOURS, colour_map
from nad_attr.concepts.datasets.label_maps import as_concepts
from nad_attr.concepts.unit_concepts import Concept
from nad_attr.system.safe_files import NotAFileError, check_file
from nad_attr.system.safe_text import shown

__all__ = ["CAMVID", "VOC", "ADE20KData", "BrodenData", "ConceptDataError", "MaskData", "VOCData"]

#: The labels of CamVid in 11 classes (index masks; 11 is unlabelled).
CAMVID = tuple(
    Concept(name, "object")
    for name in (
        *("sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car"),
        *("pedestrian", "bicyclist"),
    )
)
#: The labels of Pascal VOC (255 is unlabelled).
VOC = tuple(
    Concept(name, "object")
    for name in (
        *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat"),
        *("chair", "cow", "dining table", "dog", "horse", "motorbike", "person", "potted plant"),
        *("sheep", "sofa", "train", "tv/monitor"),
    )
)
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp")

Transform = Callable[[Any], Tensor]
Size = int | tuple[int, int] | None


class ConceptDataError(ValueError):
    """A folder does not hold what it should; the message says what is missing, and where."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(message))  # it quotes files


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ImportError("reading photos needs Pillow: pip install pillow") from None
    return Image


def _folder(path: Path, what: str) -> Path:
    if not path.is_dir():
        raise ConceptDataError(f"there is no folder {path}, which should hold {what}.")
    return path


def _text(path: Path, what: str) -> str:
    try:
        check_file(path)
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, NotAFileError) as error:
        raise ConceptDataError(f"{path}, {what}, cannot be read: {error}.") from None


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    """A picture, open; what Pillow cannot read is named."""
    pillow = _pillow()
    try:
        check_file(path)
        with pillow.open(path) as file:
            yield file
    except ConceptDataError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise ConceptDataError(f"{path} is not a readable {what}: {error}.") from None


def _size(size: Size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"size must be pixels a side, or (height, width), got {size!r}.")
    return pair


class _Photos(Dataset[Any]):
    """What the readers share: reading a photo, and colours of it."""

    def __init__(
        self, concepts: Sequence[Concept], size: Size, transform: Transform | None, colours: bool
    ) -> None:
        self.size, self.transform, self.colours = _size(size), transform, colours
        self._n_given = len(concepts)
        self.concepts = (*concepts, *COLOURS) if colours else tuple(concepts)

    def _photo(self, path: Path) -> tuple[Tensor, Any]:
        """The image as the network takes it, and as Pillow read it."""
        with _opened(path, "image") as file:
            photo = file.convert("RGB")
        shown = photo
        if self.size is not None:
            shown = photo.resize(self.size[::-1], _pillow().Resampling.BICUBIC)
        if self.transform is not None:
            image = self.transform(shown)
            if not isinstance(image, Tensor):
                raise TypeError(f"transform must return a tensor, got {type(image).__name__}.")
            return image, photo
        return _pixels(shown).float() / 255, photo

    def _with_colours(self, photo: Any, labels: list[Any]) -> list[Any]:
        if not self.colours:
            return labels
        shape = next((part.shape for part in labels if isinstance(part, Tensor)), None)
        if shape is not None and (shape[1], shape[0]) != photo.size:
            photo = photo.resize((shape[1], shape[0]), _pillow().Resampling.BOX)
        return [*labels, colour_map(_pixels(photo)) + self._n_given]


def _pixels(photo: Any) -> Tensor:
    return torch.from_numpy(np.array(photo)).permute(2, 0, 1)


def _mask(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An index mask, int64 (H, W): palette and grey images as the numbers that they hold."""
    with _opened(path, "label mask") as file:
        if file.mode not in ("P", "L", "1", "I", "I;16"):
            raise ConceptDataError(
                f"{path} is a {file.mode} image; label masks hold one number for each pixel "
                "(palette or grey). Colour-coded labels must be converted first."
            )
        if size is not None:
            file = file.resize(size[::-1], _pillow().Resampling.NEAREST)
        return torch.from_numpy(np.array(file).astype(np.int64))


class _Masked(_Photos):
    """Photos with an index mask each; ``paths`` holds the pairs."""

    paths: list[tuple[Path, Path]]
    #: Number of the first concept in the masks, and what to do about a number beyond the last.
    _first, _hint = 0, "."

    def __init__(
        self,
        concepts: Sequence[Concept],
        ignored: Iterable[int],
        size: Size,
        label_size: Size,
        transform: Transform | None,
        colours: bool,
    ) -> None:
        super().__init__(concepts, size, transform, colours)
        self._ignored, self._label_size = list(ignored), _size(label_size)
        self._n_masked = self._n_given

    def _labels(self, photo: Path) -> list[int]:
        """Concepts of the whole photo."""
        return []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, list[Any]]:
        """The image and its label maps."""
        photo, mask = self.paths[i]
        image, shown = self._photo(photo)
        labels = _mask(mask, self._label_size)
        for number in self._ignored:
            labels[labels == number] = self._first - 1
        if int(labels.max()) >= self._first + self._n_masked:
            raise ConceptDataError(
                f"{mask} holds the label {int(labels.max())}, but there are {self._n_masked} "
                f"concepts, from {self._first} on{self._hint}"
            )
        return image, self._with_colours(shown, [labels - self._first, *self._labels(photo)])


def _pairs(photos: Path, masks: Path) -> list[tuple[Path, Path]]:
    """The photos of a folder, each with its mask of the same name in another."""
    paths = [
        (path, masks / f"{path.stem}.png")
        for path in sorted(photos.iterdir())
        if path.suffix.lower() in _IMAGES
    ]
    if not paths:
        raise ConceptDataError(f"{photos} holds no photos ({', '.join(_IMAGES)}).")
    missing = [mask for _, mask in paths if not mask.is_file()]
    if missing:
        raise ConceptDataError(
            f"{len(missing)} of {len(paths)} photos in {photos} have no mask; the first that is "
            f"missing is {missing[0]}."
        )
    return paths


class MaskData(_Masked):
    """Photos and index masks of the same names in two folders, as CamVid comes.

    Args:
        root: The folder that holds both.
        concepts: What the numbers in the masks stand for; :data:`CAMVID`, for example.
        ignore_index: The number of unlabelled pixels, or several.
        images: Name of the folder of photos.
        labels: Name of the folder of masks (PNG).
        size: Photos are squeezed to this; None: as they are.
        label_size: Masks are brought to this by nearest neighbour; None: as they are.
        transform: Makes a tensor of the Pillow image, after ``size``; it must not crop or flip.
            None: RGB in [0, 1].
        colours: Add the computed :data:`~nad_attr.concepts.COLOURS`.

    Raises:
        ConceptDataError: If a folder or a mask is missing.

    Example:
        >>> MaskData("no/such/folder", CAMVID)
        Traceback (most recent call last):
        ...
        nad_attr.concepts.datasets.readers.ConceptDataError: there is no folder ...
    """

    _hint = "; if that is unlabelled, say so with ignore_index."

    def __init__(
        self,
        root: str | PathLike[str],
        concepts: Sequence[Concept | str],
        *,
        ignore_index: int | Iterable[int] = -1,
        images: str = "images",
        labels: str = "labels",
        size: Size = None,
        label_size: Size = None,
        transform: Transform | None = None,
        colours: bool = False,
    ) -> None:
        ignored = [ignore_index] if isinstance(ignore_index, int) else ignore_index
        super().__init__(as_concepts(concepts), ignored, size, label_size, transform, colours)
        photos = _folder(Path(root) / images, "the photos")
        masks = _folder(Path(root) / labels, "the label masks")
        self.paths = _pairs(photos, masks)


class VOCData(_Masked):
    """Pascal VOC with masks of classes: ``JPEGImages``, ``SegmentationClass``, ``ImageSets``.

    Args:
        root: The folder of a year, such as ``VOCdevkit/VOC2012``.
        split: Name of a list in ``ImageSets/Segmentation``; None: all that have a mask.
        size: As in :class:`MaskData`.
        label_size: As there.
        transform: As there.
        colours: As there.

    Raises:
        ConceptDataError: If something is missing.

    Example:
        >>> VOCData("no/such/folder")
        Traceback (most recent call last):
        ...
        nad_attr.concepts.datasets.readers.ConceptDataError: there is no folder ...
    """

    def __init__(
        self,
        root: str | PathLike[str],
        split: str | None = "val",
        *,
        size: Size = None,
        label_size: Size = None,
        transform: Transform | None = None,
        colours: bool = False,
    ) -> None:
        super().__init__(VOC, [255], size, label_size, transform, colours)
        photos = _folder(Path(root) / "JPEGImages", "the photos")
        masks = _folder(Path(root) / "SegmentationClass", "the masks of classes")
        if split is None:
            names = [path.stem for path in sorted(masks.glob("*.png"))]
        else:
            listed = Path(root) / "ImageSets" / "Segmentation" / f"{split}.txt"
            names = _text(listed, "the list of the split").split()
        self.paths = [(photos / f"{name}.jpg", masks / f"{name}.png") for name in names]
        if not self.paths:
            raise ConceptDataError(f"{root} lists no photos with masks.")
        for pair in self.paths:
            for path in pair:
                if not path.is_file():
                    raise ConceptDataError(f"{path} is listed, but not there.")


class ADE20KData(_Masked):
    """ADE20K as in the scene parsing benchmark (``ADEChallengeData2016``): 150 objects, and scenes.

    ``images/SPLIT/*.jpg``, ``annotations/SPLIT/*.png`` (0 is unlabelled), ``objectInfo150.txt``
    and, for scenes, ``sceneCategories.txt``.

    Args:
        root: The folder.
        split: "training" or "validation".
        size: As in :class:`MaskData`.
        label_size: As there.
        transform: As there.
        colours: As there.

    Raises:
        ConceptDataError: If something is missing.

    Example:
        >>> ADE20KData("no/such/folder")
        Traceback (most recent call last):
        ...
        nad_attr.concepts.datasets.readers.ConceptDataError: there is no folder ...
    """

    _first = 1  # 0 is unlabelled

    def __init__(
        self,
        root: str | PathLike[str],
        split: str = "validation",
        *,
        size: Size = None,
        label_size: Size = None,
        transform: Transform | None = None,
        colours: bool = False,
    ) -> None:
        folder = _folder(Path(root), "ADE20K")
        photos = _folder(folder / "images" / split, "the photos")
        masks = _folder(folder / "annotations" / split, "the label masks")
        rows = _text(folder / "objectInfo150.txt", "the table of objects").strip().split("\n")
        objects = [
            Concept(row.split("\t")[-1].split(",")[0].strip(), "object")
            for row in rows
            if row.split("\t")[0].strip().isdigit()
        ]
        if not objects:
            raise ConceptDataError(
                f"{folder / 'objectInfo150.txt'} has no rows that begin with a number and a tab."
            )
        objects = _distinct(objects)
        listed = folder / "sceneCategories.txt"
        scenes: dict[str, str] = {}
        if listed.is_file():
            pairs = [line.split() for line in _text(listed, "the table of scenes").split("\n")]
            scenes = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
        self.paths = _pairs(photos, masks)
        names = sorted({scenes[p.stem] for p, _ in self.paths if p.stem in scenes})
        concepts = [*objects, *(Concept(name, "scene") for name in names)]
        super().__init__(concepts, [], size, label_size, transform, colours)
        self._n_masked = len(objects)
        self._scene = {
            stem: len(objects) + names.index(n) for stem, n in scenes.items() if n in names
        }

    def _labels(self, photo: Path) -> list[int]:
        return [self._scene[photo.stem]] if photo.stem in self._scene else []


def _distinct(concepts: Sequence[Concept]) -> list[Concept]:
    """Concepts of one name and category told apart by a number."""
    found: list[Concept] = []
    for concept in concepts:
        name, n = concept.name, 1
        while Concept(name, concept.category) in found:
            n += 1
            name = f"{concept.name} ({n})"
        found.append(Concept(name, concept.category))
    return found


class BrodenData(_Photos):
    """Broden, the data set of Network Dissection, in its own folder format.

    ``index.csv`` (image, split, ih, iw, sh, sw, then a column for each category), ``category.csv``
    (name), ``label.csv`` (number, name, category, ...), ``c_CATEGORY.csv`` (code, number, name,
    ...), ``images/``. A cell of a category holds the names of label images, separated by
    semicolons, and numbers that label the whole image. Label images hold label numbers as
    red + 256 green; 0 is unlabelled.

    Args:
        root: The folder, such as ``broden1_224``.
        split: "train" or "val"; None: both.
        categories: Of these categories only; None: all that ``category.csv`` lists.
        size: As in :class:`MaskData`.
        transform: As there.

    Raises:
        ConceptDataError: If a file or a column is missing.

    Example:
        >>> BrodenData("no/such/folder")
        Traceback (most recent call last):
        ...
        nad_attr.concepts.datasets.readers.ConceptDataError: there is no folder ...
    """

    def __init__(
        self,
        root: str | PathLike[str],
        split: str | None = None,
        *,
        categories: Sequence[str] | None = None,
        size: Size = None,
        transform: Transform | None = None,
    ) -> None:
        folder = _folder(Path(root), "Broden")
        self._images = _folder(folder / "images", "Broden's images and labels")
        listed = [row["name"] for row in _table(folder / "category.csv", ["name"])]
        wanted = listed if categories is None else list(categories)
        unknown = [category for category in wanted if category not in listed]
        if unknown:
            raise ConceptDataError(
                f"{folder} has no category {unknown[0]!r}; category.csv lists {listed}."
            )
        named: dict[int, tuple[str, str]] = {}
        for row in _table(folder / "label.csv", ["number", "name", "category"]):
            number = _number(row["number"], folder / "label.csv")
            if number > 0:
                # One label may belong to several categories, as in "part(3);object(12)".
                named[number] = row["name"], row["category"].split(";")[0].split("(")[0].strip()
        #: {category: {label number: index of the concept}}; the same label may be in several.
        self._index: dict[str, Tensor] = {}
        concepts: list[Concept] = []
        for category in wanted:
            path = folder / f"c_{category}.csv"
            if path.is_file():
                numbers = [_number(row["number"], path) for row in _table(path, ["number"])]
            else:
                numbers = [n for n, (_, of) in named.items() if of == category]
            numbers = [n for n in numbers if n > 0]
            missing = [n for n in numbers if n not in named]
            if missing:
                raise ConceptDataError(
                    f"{path} lists the label {missing[0]}, which label.csv does not list."
                )
            table = torch.full((max(named, default=0) + 1,), -1, dtype=torch.int64, device="cpu")
            for number in numbers:
                table[number] = len(concepts)
                concepts.append(Concept(named[number][0], category))
            self._index[category] = table
        if not concepts:
            raise ConceptDataError(f"{folder} lists no labels of {wanted}.")
        super().__init__(_distinct(concepts), size, transform, False)
        rows = _table(folder / "index.csv", ["image", "split", "sh", "sw", *wanted])
        self.rows = [row for row in rows if split is None or row["split"] == split]
        if not self.rows:
            there = sorted({row["split"] for row in rows})
            raise ConceptDataError(f"{folder} has no images of split {split!r}, only {there}.")

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Tensor, list[Any]]:
        """The image, and the labels of each category that it has."""
        row = self.rows[i]
        image, _ = self._photo(self._images / row["image"])
        labels: list[Any] = []
        height, width = (
            _number(row[key], self._images.parent / "index.csv") for key in ("sh", "sw")
        )
        for category, index in self._index.items():
            for entry in filter(None, (row[category] or "").split(";")):
                if entry.strip().isdigit():
                    if int(entry) >= len(index):
                        raise ConceptDataError(
                            f"index.csv labels {row['image']} with {int(entry)}, which label.csv "
                            "does not list."
                        )
                    number = int(index[int(entry)])
                    labels.append(torch.full((height, width), number, device="cpu"))
                    continue
                with _opened(self._images / entry.strip(), "label image") as file:
                    pixels = torch.from_numpy(np.array(file.convert("RGB")).astype(np.int64))
                codes = pixels[:, :, 0] + 256 * pixels[:, :, 1]
                if int(codes.max()) >= len(index):
                    raise ConceptDataError(
                        f"{entry} holds the label {int(codes.max())}, which label.csv does not "
                        "list."
                    )
                labels.append(index[codes])
        return image, labels or [-1]


def _number(text: str, path: Path) -> int:
    try:
        return int(text)
    except (TypeError, ValueError):
        raise ConceptDataError(f"{path} has {text!r} where a whole number belongs.") from None


def _table(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    rows = csv.DictReader(io.StringIO(_text(path, "a table of Broden"), newline=""))
    missing = [column for column in columns if column not in (rows.fieldnames or ())]
    if missing:
        raise ConceptDataError(
            f"{path} has no column {missing[0]!r}; it has {list(rows.fieldnames or ())}."
        )
    found = list(rows)
    short = [row for row in found if any(row[column] is None for column in columns)]
    if short:
        warnings.warn(f"{path}: {len(short)} rows are cut short and left out.", stacklevel=3)
    return [row for row in found if row not in short]
