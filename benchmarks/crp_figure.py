"""The figure of docs/howto/crp.md: heat-maps under CRP's condition and through the gated network.

    python -m benchmarks.crp_figure          # about a minute on one core

The ResNet-20 of ``benchmarks.cifar``, one held-out photo of each of four classes, EpsilonPlus, and
sub-architectures that were learned for the classes. Prints the outputs where the heat-maps start
and how alike they are.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.cifar import (
    CLASSES,
    MEAN,
    REPOSITORY,
    STD,
    SharedMissingError,
    add_shared_arguments,
    load_cifar10,
    load_resnet,
    site_names,
)
from nad_attr import Recipe, learn_gates
from nad_attr.bridges.crp import CRPComparison, compare_with_condition
from nad_attr.pictures.figures import draw_heat_maps

OUT = REPOSITORY / "docs" / "images" / "crp_condition.png"
SHOWN = ("airplane", "automobile", "dog", "horse")


def main(argv: Sequence[str] | None = None) -> None:
    """Learn, compare, print, draw."""
    parser = argparse.ArgumentParser(description="CRP's condition beside the gated network.")
    parser.add_argument("--size", type=float, default=0.4, help="channels kept (default: 0.4)")
    parser.add_argument("--steps", type=int, default=100, help="of learning (default: 100)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        model = load_resnet(20, args.shared)
        train_x, train_y, val_x, val_y = load_cifar10(args.shared, cache=args.cache)
    except SharedMissingError as missing:
        raise SystemExit(f"skipped: {missing}") from missing
    tasks = [CLASSES.index(name) for name in SHOWN]
    recipe = Recipe(size=args.size, ablation="mean", steps=args.steps)
    gates = learn_gates(model, (train_x, train_y), tasks, recipe, site_names(), seed=args.seed)
    images = torch.stack([val_x[val_y == task][0] for task in tasks])
    found: list[CRPComparison] = []
    print("class: output; gated output; cosine of the condition's and the gated network's heat-map")
    for image, task in zip(images, tasks, strict=True):
        arch = gates.sub_architecture(task)
        one = compare_with_condition(model, arch, image[None], task, "epsilon_plus")
        print(
            f"{CLASSES[task]}: {float(one.output):.2f}; {float(one.gated_output):.2f}; "
            f"{float(one.similarity()):.2f}"
        )
        found.append(one)
    columns = {
        "whole network": torch.cat([one.whole for one in found]),
        "CRP condition": torch.cat([one.condition for one in found]),
        "sub-architecture": torch.cat([one.gated for one in found]),
    }
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, STD))
    figure = draw_heat_maps(
        images, columns, to_pixels=lambda x: (x * std + mean).clamp(0, 1), titles=SHOWN
    )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    main()
