"""Quantus's metrics of heat-maps through sub-architectures, beside those of the whole network.

Five of Quantus's categories, on the same images and the same network: faithfulness, robustness,
localisation (where there are masks), randomisation, complexity. Quantus asks the **whole** network
for its outputs, so faithfulness here says how well a heat-map predicts the whole network, be it
through the sub-architecture or not. Needs the extras ``quantus`` and, for LRP, ``zennit``::

    table = quantus_table(model, images, labels, task_gates, masks)
    print(as_markdown(table))

Run by itself, it takes the ResNet-20 of ``benchmarks.cifar`` and held-out photos, and explains the
class that the network predicts, through that class's own sub-architecture (five to eight minutes
on one core)::

    python -m benchmarks.quantus_table --docs      # writes the table into docs/heatmaps.md, too

Photos have no masks, so localisation is measured on 2 x 2 mosaics of photos that the network calls
what they are, each photo as large as the network knows them: the mask is the quadrant of the class
that is explained. As many random channels as the class keeps, at each site, are the control.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar import (
    REPOSITORY,
    SharedMissingError,
    add_shared_arguments,
    load_cifar10,
    load_resnet,
    site_names,
)
from benchmarks.heatmaps import DOCS, put_into_docs, random_like
from nad_attr import Recipe, SubArchitecture, TaskGates, __version__, learn_gates
from nad_attr.bridges.quantus import SubArchitectureExplainer
from nad_attr.evaluation import bootstrap_interval
from nad_attr.evaluation.questions.mosaics import assemble, choose
from nad_attr.system.rng import isolated_rng

__all__ = ["as_markdown", "metrics", "quantus_scores", "quantus_table"]

OUT = REPOSITORY / "benchmarks" / "results" / "heatmaps"
MARKS = ("<!-- begin quantus -->", "<!-- end quantus -->")
#: Whose heat-maps they are.
WHOLE, OWN, RANDOM = "whole network", "sub-architecture", "random channels"
#: What a metric gave for each image: ``{heat-map: {(category, metric): (images,)}}``.
Scores = dict[str, dict[tuple[str, str], "np.ndarray[Any, Any]"]]
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
    # Rank correlation with the heat-map of the network with all its weights drawn anew.
    ("randomisation", "random network similarity"): False,
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
        # The last of MPRT's networks, of which no layer is left. All of them would be as many
        # heat-maps for each image as there are layers.
        ("randomisation", "random network similarity"): quantus.MPRT(
            return_last_correlation=True, skip_layers=True, layer_order="bottom_up", **quiet
        ),
        ("randomisation", "random class similarity"): quantus.RandomLogit(
            num_classes=n_classes, **quiet
        ),
        ("complexity", "sparseness"): quantus.Sparseness(**quiet),
        ("complexity", "entropy"): quantus.Complexity(**quiet),
    }


@contextmanager
def _quiet() -> Iterator[StringIO]:
    """Keep what Quantus says."""
    said = StringIO()
    with warnings.catch_warnings(), np.errstate(all="ignore"), redirect_stdout(said):
        warnings.simplefilter("ignore")
        yield said


def quantus_scores(
    model: nn.Module,
    images: Any,
    labels: Any,
    gates: TaskGates | Mapping[int, SubArchitecture],
    masks: Any = None,
    *,
    attributions: Sequence[str] = ("gradient", "lrp", "integrated_gradients"),
    categories: Sequence[str] | None = None,
    controls: Mapping[str, Mapping[int, SubArchitecture]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    draws: int = 5,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Scores:
    """Measure heat-maps through each image's class, and of the whole network, image by image.

    Args:
        model: The network in eval mode, float32 (Quantus knows nothing else).
        images: (B, C, H, W).
        labels: Classes that are explained, (B,).
        gates: Of every class of the network: to randomise the class, Quantus asks for others.
        masks: (B, H, W) or (B, 1, H, W), True on the object; None: no localisation.
        attributions: Names that :class:`SubArchitectureExplainer` knows.
        categories: Those to measure; None: all.
        controls: More sub-architectures to compare with, ``{name: {class: sub-architecture}}``.
        options: Further arguments of attributions, ``{name: {argument: value}}``.
        draws: Perturbations for each image; costs grow with it.
        seed: Of Quantus's perturbations.
        report: Called with a line for each metric that is done.

    Returns:
        ``{heat-map: {(category, metric): (images,)}}``, NaN where a metric is undefined.

    Raises:
        ImportError: If Quantus is not installed.
        RuntimeError: If one of Quantus's metrics fails; it says which.
    """
    try:
        with _quiet():
            import quantus  # noqa: F401  (metrics takes it; here, to say how to get it)
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
        f"{_NAMES.get(name, name)}, {where}": SubArchitectureExplainer(
            used, name, **(options or {}).get(name, {})
        )
        for name in attributions
        for where, used in {WHOLE: None, OWN: gates, **(controls or {})}.items()
    }
    tasks = gates.tasks if isinstance(gates, TaskGates) else [*gates]
    chosen = metrics(x.shape[1:], len(tasks), draws=draws, with_masks=s is not None)
    scores: Scores = {}
    for name, explain in methods.items():
        start = time.perf_counter()
        scores[name] = {}
        # Once for all metrics; those that perturb images or networks ask for more themselves.
        with _quiet():
            heatmaps = explain(model, x, y)
        for key, metric in chosen.items():
            if categories is not None and key[0] not in categories:
                continue
            with isolated_rng(seed), _quiet() as said:
                try:
                    found = metric(
                        model=model,
                        x_batch=x,
                        y_batch=y,
                        a_batch=heatmaps.copy(),
                        s_batch=s,
                        explain_func=explain,
                        device="cpu",
                    )
                    # A curve counts with its mean.
                    per_image = np.asarray(found, dtype=float).reshape(len(x), -1).mean(1)
                except Exception as error:
                    said_too = f" It printed: {said.getvalue()}" if said.getvalue() else ""
                    raise RuntimeError(f"Quantus's {key} fails: {error}.{said_too}") from error
            scores[name][key] = np.where(np.isfinite(per_image), per_image, np.nan)
        report(f"{name}: {time.perf_counter() - start:.0f} s")
    return scores


def quantus_table(
    model: nn.Module,
    images: Any,
    labels: Any,
    gates: TaskGates | Mapping[int, SubArchitecture],
    masks: Any = None,
    **options: Any,
) -> Any:
    """Means over images of :func:`quantus_scores`, which says what the arguments are.

    Returns:
        A pandas frame: a row for each attribution and network, columns (category, metric). NaN
        where a metric is undefined for all images.

    Raises:
        ImportError, RuntimeError: As :func:`quantus_scores`.
    """
    return frame_of(quantus_scores(model, images, labels, gates, masks, **options))


def frame_of(scores: Scores) -> Any:
    """Means over images, as a pandas frame."""
    import pandas as pd

    means = {name: {key: _mean(v) for key, v in row.items()} for name, row in scores.items()}
    frame = pd.DataFrame.from_dict(means, orient="index")
    frame.columns = pd.MultiIndex.from_tuples(list(frame.columns), names=["category", "metric"])
    return frame


def gains(scores: Scores) -> list[dict[str, Any]]:
    """Differences from the whole network's heat-maps, image by image, with 95 % intervals."""
    found = []
    for name, row in scores.items():
        attribution, where = name.rsplit(", ", 1)
        if where == WHOLE:
            continue
        for key, values in row.items():
            gain = values - scores[f"{attribution}, {WHOLE}"][key]
            known = gain[np.isfinite(gain)]
            low, high = bootstrap_interval(known) if len(known) > 1 else (np.nan, np.nan)
            sign = 1 if HIGHER_IS_BETTER[key] else -1
            verdict = "better" if sign * low > 0 < sign * high else ""
            verdict = "worse" if sign * low < 0 > sign * high else verdict
            found.append(
                {
                    "heat-map": attribution,
                    "through": where,
                    "category": key[0],
                    "metric": key[1],
                    "images": len(known),
                    "gain": _mean(gain),
                    "interval": [float(low), float(high)],
                    "verdict": verdict,
                }
            )
    return found


def _mean(scores: Any) -> float:
    """Mean over images of what is defined."""
    values = np.asarray(scores, dtype=float)
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def as_markdown(table: Any, differences: Sequence[Mapping[str, Any]] = ()) -> str:
    """The table for a document, with an arrow towards better.

    Args:
        table: As :func:`quantus_table` returns it.
        differences: As :func:`gains` returns them: what differs from the whole network gets a plus
            where that is better, a minus where it is worse.
    """
    marks = {"better": " +", "worse": " −", "": ""}
    verdicts = {
        (f"{d['heat-map']}, {d['through']}", d["category"], d["metric"]): marks[d["verdict"]]
        for d in differences
    }
    heads = [f"{name} {'↑' if HIGHER_IS_BETTER[c, name] else '↓'}" for c, name in table.columns]
    lines = ["| heat-map | " + " | ".join(heads) + " |", "|---|" + "--:|" * len(heads)]
    for name, values in table.iterrows():
        cells = (f"{v:.3f}{verdicts.get((name, *key), '')}" for key, v in values.items())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -- The ResNet-20 -----------------------------------------------------------------------------


def mosaics_with_masks(
    images: Tensor, labels: Tensor, n: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """2 x 2 mosaics, the class of one of the photos in each, and its quadrant.

    Args:
        images: (N, C, H, W).
        labels: (N,).
        n: Number of mosaics; the quadrants take turns.
        seed: Of the mosaics.

    Returns:
        (n, C, 2 H, 2 W), int64 (n,), bool (n, 2 H, 2 W).
    """
    classes = sorted(set(labels.tolist()))
    rows, numbers = choose(labels, classes, n, seed)
    whole = assemble(images[torch.from_numpy(numbers).flatten()], resize=False)
    height, width = images.shape[-2:]
    masks = torch.zeros(n, 2 * height, 2 * width, dtype=torch.bool)
    explained = torch.empty(n, dtype=torch.long)
    for i in range(n):
        q = i % 4
        explained[i] = classes[rows[i, q]]
        top, left = (q // 2) * height, (q % 2) * width
        masks[i, top : top + height, left : left + width] = True
    return whole, explained, masks


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Quantus's metrics of a ResNet-20's heat-maps.")
    parser.add_argument("--images", type=int, default=40, help="held-out photos (default: 40)")
    parser.add_argument("--mosaics", type=int, default=40, help="for localisation (default: 40)")
    parser.add_argument("--size", type=float, default=0.4, help="channels kept (default: 0.4)")
    parser.add_argument("--steps", type=int, default=100, help="of learning (default: 100)")
    parser.add_argument("--draws", type=int, default=4, help="perturbations (default: 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--docs", type=Path, nargs="?", const=DOCS, help="put the table there")
    add_shared_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Learn gates, measure, print, write."""
    args = arguments(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    try:
        model = load_resnet(20, args.shared)
        train_x, train_y, val_x, val_y = load_cifar10(args.shared, cache=args.cache)
    except SharedMissingError as missing:
        raise SystemExit(f"skipped: {missing}") from missing

    def say(line: str) -> None:
        print(f"{time.perf_counter() - start:4.0f} s  {line}", flush=True)

    recipe = Recipe(size=args.size, ablation="mean", steps=args.steps)
    gates = learn_gates(model, (train_x, train_y), None, recipe, site_names(), seed=args.seed)
    say("gates learned")
    with torch.no_grad():
        predicted = torch.cat([model(x).argmax(1) for x in val_x.split(500)])
    # As many of each class, in turn.
    order = torch.stack([(val_y == k).nonzero().flatten()[: args.images] for k in range(10)], 1)
    photos = order.flatten()[: args.images]
    random = {RANDOM: {k: random_like(gates.sub_architecture(k), args.seed + k) for k in range(10)}}
    options: dict[str, Any] = {
        # Few steps, for Quantus asks for many heat-maps.
        "options": {"integrated_gradients": {"n_steps": 10}},
        "controls": random,
        "draws": args.draws,
        "seed": args.seed,
        "report": say,
    }
    scores = quantus_scores(model, val_x[photos], predicted[photos], gates, **options)
    right = predicted == val_y
    mosaics = mosaics_with_masks(val_x[right], val_y[right], args.mosaics, args.seed)
    where = quantus_scores(
        model, mosaics[0], mosaics[1], gates, mosaics[2], categories=["localisation"], **options
    )
    scores = {name: {**row, **where[name]} for name, row in scores.items()}
    table, differences = frame_of(scores), gains(scores)
    seconds = time.perf_counter() - start
    agree = int(right[photos].sum())
    note = (
        f"ResNet-20 on CIFAR-10; {len(photos)} held-out photos ({agree} predicted right), "
        f"{args.mosaics} mosaics for localisation; sub-architectures of the predicted class (of "
        f"the quadrant's, in mosaics) at {100 * args.size:g} % of the channels; {args.draws} "
        f"perturbations; {seconds:.0f} s. A + is better, a − worse than the whole network's "
        "heat-map by the same attribution: 95 % bootstrap interval, over images, of the difference."
    )
    text = f"{note}\n\n{as_markdown(table, differences)}"
    print(f"\n{text}")
    settings = {
        key: getattr(args, key) for key in ("images", "mosaics", "size", "steps", "draws", "seed")
    }
    result = {
        "settings": settings,
        "version": __version__,
        "torch": torch.__version__,
        "seconds": round(seconds, 1),
        "means": {
            name: {": ".join(key): _number(v) for key, v in row.items()}
            for name, row in table.iterrows()
        },
        "gains": differences,
        "scores": {
            name: {": ".join(key): [_number(v) for v in values] for key, values in row.items()}
            for name, row in scores.items()
        },
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "quantus.json").write_text(
        json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    (args.out / "quantus.md").write_text(text, encoding="utf-8")
    if args.docs is not None:
        put_into_docs(args.docs, text, MARKS)


def _number(value: float) -> float | None:
    """JSON knows no NaN."""
    return round(float(value), 6) if np.isfinite(value) else None


if __name__ == "__main__":
    main()
