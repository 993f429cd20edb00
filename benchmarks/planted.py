"""Planted circuits: who finds channels that are known to matter?

    python -m benchmarks.planted --seeds 0 1 2 --json benchmarks/results/planted.json

Networks that are built by hand (``nad_attr.evaluation.planted``, and ``planted_heads``: a
transformer whose heads and hidden neurons are known), so that the right answer is known for each
class. Every method is asked for exactly as many channels as there are in a circuit
(``size x 1``), where precision and recall are the same number, and for a fifth more (NAD by its
ranking: it is learned once, at the circuit's size). NAD's closed channels have the best constants
("optimal", the default recipe), or are at their mean or at zero; scores do not depend on it.

Rivals get their best: of all variants of a score (own, or own and other images; signed, or
absolute; over all sites, or per site) the one that is printed has the highest recall of the true
channels. No user could choose so well. "random" takes no such choice. Scores that integrate along
a path, and LRP, get PER_CLASS images of each class and N_STEPS steps, all others all images.

Columns: precision and recall of the planted channels, "whole" the share of tasks of which every
channel of a circuit (of one copy, where there are several) is kept. Means over tasks and seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nad_attr import GatingError, Recipe, learn_gates
from nad_attr.evaluation import (
    PLANTED_KINDS,
    SCORERS,
    PlantedCircuit,
    PlantedScore,
    planted,
    planted_heads,
    top_k,
)

#: Asked for, in units of the circuit's size.
FACTORS = (1.0, 1.2)
MEASURES = ("precision", "recall", "whole")
NAD = "NAD"
PER_CLASS, N_STEPS = 5, 16
#: Options of the slow ones.
SLOW: dict[str, dict[str, Any]] = {
    "layer_integrated_gradients": {"n_steps": N_STEPS},
    "layer_conductance": {"n_steps": N_STEPS},
    "internal_influence": {"n_steps": N_STEPS},
    "lrp": {},
}


def learned(known: PlantedCircuit, ablation: str, seed: int) -> dict[float, PlantedScore]:
    """What NAD finds, for each size; above the circuit's own by its ranking."""
    gates = learn_gates(
        known.model,
        known.data,
        recipe=Recipe(size=known.size, ablation=ablation),
        sites=known.sites,
        seed=seed,
    )
    return {factor: known.score(gates, size=factor * known.size) for factor in FACTORS}


def best_of(
    known: PlantedCircuit, method: str, options: dict[str, Any]
) -> dict[float, PlantedScore]:
    """What a score finds at its best, for each size."""
    scorer = SCORERS[method](known.model, known.sites, **options)
    inputs, labels = known.data
    if method in SLOW:
        few = torch.cat([(labels == k).nonzero()[:PER_CLASS, 0] for k in known.tasks])
        inputs, labels = inputs[few], labels[few]
    variants = scorer.variants(inputs, labels, tasks=known.tasks)
    best = {}
    for factor in FACTORS:
        found = [
            known.score(
                top_k(scores, known.sites, known.tasks, factor * known.size, per_site=per_site)
            )
            for scores in variants.values()
            for per_site in (False, True)
        ]
        best[factor] = (
            found[0] if method == "random" else max(found, key=lambda s: s.mean("recall"))
        )
    return best


def rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each kind, seed, method, ablation value and size."""
    for kind in args.kinds:
        for seed in args.seeds:
            if kind == "heads":
                known = planted_heads(seed=seed)
            else:
                known = planted(kind, seed=seed, **({"width": args.width} if args.width else {}))
            # At zero a constant is part of what the output depends on: there is no right answer.
            for ablation in ("optimal", *known.ablations):
                start = time.perf_counter()
                scores = learned(known, ablation, seed)
                seconds = time.perf_counter() - start
                for factor, score in scores.items():
                    yield row(kind, seed, NAD, ablation, factor, score, seconds)
            for method in args.methods:
                start = time.perf_counter()
                options = {"seed": seed} if method == "random" else SLOW.get(method, {})
                try:
                    best = best_of(known, method, options)
                except (ImportError, ValueError, GatingError) as error:
                    print(f"{method} left out: {error}", file=sys.stderr)
                    continue
                seconds = time.perf_counter() - start
                for factor, score in best.items():
                    yield row(kind, seed, method, "any", factor, score, seconds)


def row(
    kind: str,
    seed: int,
    method: str,
    ablation: str,
    factor: float,
    score: PlantedScore,
    seconds: float,
) -> dict[str, Any]:
    """One result as plain values."""
    return {
        "kind": kind,
        "seed": seed,
        "method": method,
        "ablation": ablation,
        "size_factor": factor,
        **{name: score.mean(name) for name in MEASURES},
        "seconds": round(seconds, 2),
    }


def table(results: Sequence[dict[str, Any]], measure: str, factor: float) -> str:
    """Methods against kinds, means over seeds."""
    chosen = [r for r in results if r["size_factor"] == factor]
    kinds = list(dict.fromkeys(r["kind"] for r in chosen))
    methods = list(dict.fromkeys((r["method"], r["ablation"]) for r in chosen))
    names = [m if a == "any" else f"{m}, {a}" for m, a in methods]
    width = max(map(len, names))
    lines = [" " * width + "".join(f"{kind:>13}" for kind in kinds)]
    for (method, ablation), name in zip(methods, names, strict=True):
        cells = []
        for kind in kinds:
            values = [
                r[measure]
                for r in chosen
                if (r["kind"], r["method"], r["ablation"]) == (kind, method, ablation)
            ]
            cells.append(f"{sum(values) / len(values):13.3f}" if values else f"{'-':>13}")
        lines.append(name.ljust(width) + "".join(cells))
    return "\n".join(lines)


def report(results: Sequence[dict[str, Any]]) -> str:
    """All tables."""
    parts = []
    for factor in FACTORS:
        for measure in MEASURES:
            # At the circuit's own size precision is recall.
            if factor > 1 or measure != "precision":
                parts.append(f"{measure}, size x {factor:g}\n{table(results, measure, factor)}")
    return "\n\n".join(parts)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    kinds = [*PLANTED_KINDS, "heads"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--methods", nargs="+", choices=list(SCORERS), default=list(SCORERS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, help="channels at each site, in place of the default")
    parser.add_argument("--json", type=Path, help="write all rows to this file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print, write."""
    args = arguments(argv)
    torch.set_num_threads(1)
    start = time.perf_counter()
    results = []
    for result in rows(args):
        results.append(result)
        print(
            "{kind:<12} seed {seed}  {method:<28} {ablation:<5} x{size_factor:<4g} "
            "precision {precision:.3f}  recall {recall:.3f}  {seconds:6.1f} s".format(**result),
            flush=True,
        )
    seconds = time.perf_counter() - start
    print(f"\n{report(results)}\n\n{seconds:.0f} s")
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        settings = {"kinds": args.kinds, "seeds": args.seeds, "width": args.width}
        if args.json.is_file():  # what was measured of other kinds stays
            before = json.loads(args.json.read_text(encoding="utf-8"))
            others = [r for r in before["rows"] if r["kind"] not in args.kinds]
            settings["kinds"] = [*dict.fromkeys([r["kind"] for r in others] + args.kinds)]
            results = others + results
        text = json.dumps({"settings": settings, "rows": results}, indent=1)
        args.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
