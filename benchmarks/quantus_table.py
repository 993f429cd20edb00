"""Quantus's metrics of heat-maps through sub-architectures, beside those of the whole network.

Five of Quantus's categories, on the same images and the same network: faithfulness, robustness,
localisation (where there are masks), randomisation, complexity. Quantus asks the **whole** network
for its outputs, so faithfulness here says how well a heat-map foretells the whole network, be it
through the sub-architecture or not. Needs the extras ``quantus`` and, for LRP, ``zennit``::

    table = quantus_table(model, images, labels, task_gates, masks)
    print(as_markdown(table))

Run by itself, it takes the ResNet-20 of ``benchmarks.cifar`` and held-out photos (which have no
masks; ``benchmarks.heatmaps`` measures localisation)::

    python -m benchmarks.quantus_table --images 20 --steps 600 --json quantus_table.json
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cifar import (
    SharedMissingError,
    add_shared_arguments,
    load_cifar10,
    load_resnet,
    site_names,
)
from nad_attr import Recipe, SubArchitecture, TaskGates, learn_gates
from nad_attr.bridges.quantus import SubArchitectureExplainer
from nad_attr.data import isolated_rng

__all__ = ["as_markdown", "metrics", "quantus_table"]

#: Names in the table: of attributions, and of whose heat-maps they are.
_NAMES = {
    "gradient": "gradient",
    "lrp": "LRP",
    "integrated_gradients": "integrated gradients",
    "input_x_gradient": "input x gradient",
    "occlusion": "occlusion",
}
#: Whether more is better.
HIGHER_IS_BETTER = {
    ("faithfulness", "correlation"): True,
    # Mean output while pixels are taken away, the most relevant first (the area under that curve).
    ("faithfulness", "pixel flipping"): False,
    ("robustness", "max. sensitivity"): False,
    ("localisation", "relevance mass"): True,
    ("localisation", "pointing game"): True,
    ("randomisation", "MPRT similarity"): False,
    ("randomisation", "random class similarity"): False,
    ("complexity", "sparseness"): True,
    ("complexity", "entropy"): False,
}


def metrics(
    shape: tuple[int, int, int], n_classes: int, *, draws: int, with_masks: bool
) -> dict[tuple[str, str], Any]:
    """The metrics: ``{(category, name): a metric of Quantus}``.

    Args:
        shape: (C, H, W) of an image.
        n_classes: Outputs of the network.
        draws: How often is drawn where something is (perturbations, subsets).
        with_masks: Whether objects are marked, as localisation needs.
    """
    import quantus

    quiet = {"disable_warnings": True, "display_progressbar": False}
    n_pixels = shape[1] * shape[2]
    step = max(1, n_pixels // 16)
    while n_pixels % step:  # Quantus takes nothing else
        step -= 1
    chosen: dict[tuple[str, str], Any] = {
        ("faithfulness", "correlation"): quantus.FaithfulnessCorrelation(
            nr_runs=10 * draws,
            subset_size=max(1, n_pixels // 8),
            perturb_baseline="mean",
            return_aggregate=False,
            **quiet,
        ),
        ("faithfulness", "pixel flipping"): quantus.PixelFlipping(
            features_in_step=step, perturb_baseline="mean", **quiet
        ),
        ("robustness", "max. sensitivity"): quantus.MaxSensitivity(
            nr_samples=draws, lower_bound=0.02, **quiet
        ),
    }
    if with_masks:
        chosen |= {
            ("localisation", "relevance mass"): quantus.RelevanceMassAccuracy(abs=True, **quiet),
            ("localisation", "pointing game"): quantus.PointingGame(abs=True, **quiet),
        }
    return chosen | {
        ("randomisation", "MPRT similarity"): quantus.MPRT(
            return_average_correlation=True, layer_order="bottom_up", **quiet
        ),
        ("randomisation", "random class similarity"): quantus.RandomLogit(
            num_classes=n_classes, **quiet
        ),
        ("complexity", "sparseness"): quantus.Sparseness(**quiet),
        ("complexity", "entropy"): quantus.Complexity(**quiet),
    }


def quantus_table(
    model: nn.Module,
    images: Any,
    labels: Any,
    gates: TaskGates | Mapping[int, SubArchitecture],
    masks: Any = None,
    *,
    attributions: Sequence[str] = ("gradient", "lrp", "integrated_gradients"),
    draws: int = 5,
    seed: int = 0,
) -> Any:
    """Measure heat-maps through each image's class, and of the whole network, with Quantus.

    Args:
        model: The network in eval mode, float32 (Quantus knows nothing else).
        images: (B, C, H, W).
        labels: Classes that are explained, (B,).
        gates: Of every class of the network: to randomise the class, Quantus asks for others.
        masks: (B, H, W) or (B, 1, H, W), True on the object; None: no localisation.
        attributions: Names that :class:`SubArchitectureExplainer` knows.
        draws: Perturbations for each image; costs grow with it.
        seed: Of Quantus's perturbations.

    Returns:
        A pandas frame of means over the images: a row for each attribution and network, columns
        (category, metric). NaN where a metric is undefined for all images.

    Raises:
        ImportError: If Quantus is not installed.
        RuntimeError: If one of Quantus's metrics fails; it says which.
    """
    import pandas as pd

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import quantus
    except ImportError:
        raise ImportError(
            "the table needs Quantus; install it with: pip install 'nad-attr[quantus]'"
        ) from None
    x = np.ascontiguousarray(np.asarray(images), np.float32)
    y = np.asarray(labels).astype(np.int64)
    s = None
    if masks is not None:
        s = np.asarray(masks).astype(bool).reshape(len(x), 1, *x.shape[2:])
    methods = {
        f"{_NAMES.get(name, name)}, {where}": SubArchitectureExplainer(used, name)
        for name in attributions
        for where, used in (("whole network", None), ("sub-architecture", gates))
    }
    tasks = gates.tasks if isinstance(gates, TaskGates) else [*gates]
    chosen = metrics(x.shape[1:], len(tasks), draws=draws, with_masks=s is not None)
    rows: dict[str, dict[tuple[str, str], float]] = {name: {} for name in methods}
    for key, metric in chosen.items():
        for name, explain in methods.items():
            # One at a time: quantus.evaluate prints a failing metric's error and stumbles later.
            said = StringIO()
            with (
                isolated_rng(seed),
                warnings.catch_warnings(),
                np.errstate(all="ignore"),
                redirect_stdout(said),
            ):
                warnings.simplefilter("ignore")
                try:
                    found = quantus.evaluate(
                        metrics={"metric": metric},
                        xai_methods={name: explain},
                        model=model,
                        x_batch=x,
                        y_batch=y,
                        s_batch=s,
                        agg_func=_mean,
                        explain_func_kwargs={},
                    )
                except KeyError as error:
                    raise RuntimeError(f"Quantus's {key} fails: {said.getvalue()}") from error
            rows[name][key] = found[name]["metric"]
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.columns = pd.MultiIndex.from_tuples(list(frame.columns), names=["category", "metric"])
    return frame


def _mean(scores: Any) -> float:
    """Mean over images of what is defined."""
    values = np.asarray(scores, dtype=float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def as_markdown(table: Any) -> str:
    """The table for a document, with an arrow towards better."""
    heads = [f"{name} {'↑' if HIGHER_IS_BETTER[c, name] else '↓'}" for c, name in table.columns]
    lines = ["| heat-map | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, values in table.iterrows():
        lines.append(f"| {name} | " + " | ".join(f"{v:.3f}" for v in values) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Learn gates, measure, print, write."""
    parser = argparse.ArgumentParser(description="Quantus's metrics of a ResNet-20's heat-maps.")
    parser.add_argument("--images", type=int, default=20, help="held-out photos (default: 20)")
    parser.add_argument("--size", type=float, default=0.4, help="channels kept (default: 0.4)")
    parser.add_argument("--steps", type=int, default=600, help="of learning (default: 600)")
    parser.add_argument("--draws", type=int, default=5, help="perturbations (default: 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, metavar="PATH", help="write it here")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        model = load_resnet(20, args.shared)
        train_x, train_y, val_x, val_y = load_cifar10(args.shared, cache=args.cache)
    except SharedMissingError as missing:
        parser.exit(0, f"skipped: {missing}\n")
    recipe = Recipe(size=args.size, steps=args.steps)
    gates = learn_gates(model, (train_x, train_y), None, recipe, site_names(), seed=args.seed)
    # The same number of each class, as far as it goes.
    order = torch.cat([(val_y == k).nonzero().flatten()[:, None] for k in range(10)], 1).flatten()
    chosen = order[: args.images]
    table = quantus_table(
        model, val_x[chosen], val_y[chosen], gates, draws=args.draws, seed=args.seed
    )
    seconds = time.perf_counter() - start
    print(as_markdown(table))
    print(f"{len(chosen)} photos, size {args.size}, {seconds:.0f} s")
    if args.json is not None:
        rows = [
            {"heat-map": name, **{": ".join(key): float(v) for key, v in row.items()}}
            for name, row in table.iterrows()
        ]
        settings = {key: getattr(args, key) for key in ("images", "size", "steps", "draws", "seed")}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(
            json.dumps({"settings": settings, "rows": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
