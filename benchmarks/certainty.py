"""Is what certainty says of channels true, and what does it cost?

    python -m benchmarks.certainty planted --seeds 100 --json planted.json
    python -m benchmarks.certainty pair --json pair.json

"planted": networks whose channels are known, ``--seeds`` of each kind, two classes, gates of one
and a half times the circuit's size. Of the channels called *needed*, how many are not? Of those
that are needed, how many are found? With redundant copies none is needed: which share of a whole
copy that is kept is called *replaceable*? A run takes one to three seconds.

"pair": a ResNet-20 on CIFAR-10 photos (beside the repository, see ``--shared``): the default
recipe, two seeds. Labels; kappa between the two seeds' gates, and between their cores; own AUC and
fidelity of a core against the gates cut at its size, both with constants fitted alike; passes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cifar import add_shared_arguments, load_cifar10, load_resnet
from benchmarks.recipes import per_class
from nad_attr import ChannelCertainty, Recipe, RunOptions, certainty, fit_constants, learn_gates
from nad_attr.certainty.testing import LABELS
from nad_attr.evaluation import PLANTED_KINDS, evaluate, planted
from nad_attr.gates.channels import kappa
from nad_attr.system.files import write_text

FACTOR = 1.5
RUN = RunOptions(batch_size=800)
#: Thresholds of the core.
TAUS = (0.75, 0.9, 1.0)


def planted_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each network."""
    for seed in range(args.first, args.first + args.seeds):
        for kind in args.kinds:
            known = planted(kind, n_classes=2, width=24, seed=seed)
            ablation = "mean" if "mean" in known.ablations else known.ablations[0]
            recipe = Recipe(size=FACTOR * known.size, ablation=ablation)
            gates = learn_gates(
                known.model, known.data, [0], recipe, known.sites, seed=seed, run=RUN
            )
            start = time.perf_counter()
            found = certainty(
                known.model, gates, known.data, known.held_out, pairs=args.pairs, seed=seed, run=RUN
            )
            copies = [
                torch.cat([copy[s.name] for s in known.sites]).numpy()
                for copy in known.alternatives[0]
            ]
            truth = copies[0] if len(copies) == 1 else np.zeros_like(copies[0])
            label = found.label[0]
            needed = label == LABELS.index("needed")
            whole = [copy for copy in copies if found.kept[0][copy].all()]
            replaceable = (
                (label == LABELS.index("replaceable"))[whole[0]].mean()
                if len(copies) > 1 and whole
                else None
            )
            yield {
                "kind": kind, "seed": seed, "needed": int(needed.sum()),
                "false": int((needed & ~truth).sum()), "truth": int(truth.sum()),
                "found": int((needed & truth).sum()),
                "replaceable": None if replaceable is None else float(replaceable),
                "always": int((found.chosen[0] == 2 * args.pairs)[~np.any(copies, axis=0)].sum()),
                "passes": sum(found.passes.values()),
                "seconds": round(time.perf_counter() - start, 1),
            }  # fmt: skip


def planted_table(rows: list[dict[str, Any]]) -> str:
    """Rates of each kind."""
    lines = [f"{'':<12} networks  needed, false  found of needed  copies replaceable  passes"]
    for kind in dict.fromkeys(row["kind"] for row in rows):
        of = [row for row in rows if row["kind"] == kind]
        sums = {
            name: sum(row[name] for row in of) for name in ("needed", "false", "found", "truth")
        }
        share = sums["false"] / sums["needed"] if sums["needed"] else 0.0
        found = f"{sums['found'] / sums['truth']:.3f}" if sums["truth"] else "-"
        said = [row["replaceable"] for row in of if row["replaceable"] is not None]
        copies = f"{np.mean(said):.3f} ({len(said)})" if said else "-"
        passes = np.mean([row["passes"] for row in of])
        lines.append(
            f"{kind:<12} {len(of):>8}  {sums['needed']:>6}, {share:.3f}  {found:>15}  "
            f"{copies:>18}  {passes:>6,.0f}"
        )
    return "\n".join(lines)


def kappas(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap over all sites together, corrected for chance, mean over tasks."""
    pairs = zip(torch.from_numpy(first), torch.from_numpy(second), strict=True)
    return float(np.mean([kappa(a, b) for a, b in pairs]))


def pair_rows(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row for each threshold, and one for the labels."""
    model = load_resnet(20, args.shared)
    train_x, train_y, val_x, val_y = load_cifar10(args.shared, cache=args.cache)
    data, held_out = per_class(train_x, train_y, 160, 0), per_class(val_x, val_y, 100, 0)
    tasks = list(range(args.tasks))
    found: list[ChannelCertainty] = []
    start = time.perf_counter()
    for seed in (0, 1):
        gates = learn_gates(model, data, tasks, Recipe(size=args.size), seed=seed)
        found.append(certainty(model, gates, data, held_out, pairs=args.pairs, seed=seed))
    yield {
        "seconds": round((time.perf_counter() - start) / 2, 1), "passes": dict(found[0].passes),
        "labels": {name: float(np.mean([found[0].counts(t)[name] for t in tasks]))
                   for name in LABELS[1:]},
        "kappa of gates": kappas(found[0].kept, found[1].kept),
        "fidelity": float(found[0].fidelity.mean()),
    }  # fmt: skip
    for tau in TAUS:
        cores = [one.core(tau) for one in found]
        masks = [one.selection >= tau - 1e-9 for one in found]
        archs = cores[0].sub_architectures()
        cuts = [gates_of(found[0]).sub_architecture(a.task, a.size) for a in archs]
        fitted = {
            name: evaluate(model, fit_constants(model, part, data), held_out, n_random=0)
            for name, part in (("core", archs), ("cut", cuts))
        }
        yield {
            "tau": tau, "size": float(np.mean([a.size for a in archs])), "kappa": kappas(*masks),
            "bound": [found[0].false_selections(tau, t) for t in tasks] if tau > 0.5 else None,
            **{f"{name} {m}": result.mean(m) for name, result in fitted.items()
               for m in ("own_auc", "fidelity")},
        }  # fmt: skip


def gates_of(found: ChannelCertainty) -> Any:
    """The gates that a certainty was measured of, to be cut at another size."""
    return found._gates(found.gate)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("planted", "pair"))
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kinds", nargs="+", default=list(PLANTED_KINDS), choices=PLANTED_KINDS)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--size", type=float, default=0.4)
    add_shared_arguments(parser)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for row in planted_rows(args) if args.what == "planted" else pair_rows(args):
        rows.append(row)
        if args.what == "pair":
            print(row, flush=True)
        if args.json is not None:
            write_text(args.json, json.dumps(rows, indent=1) + "\n")
    if args.what == "planted":
        print(planted_table(rows))


if __name__ == "__main__":
    main()
