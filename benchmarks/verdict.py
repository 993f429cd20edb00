"""The verdict's error rates, on planted and on trained networks; fidelity asked for and reached.

    python -m benchmarks.verdict                      # everything; skips what is done
    python -m benchmarks.verdict --only planted random
    python -m benchmarks.verdict --report             # the tables alone

- planted: circuits of planted networks of each kind, and random channels of their size in the same
  networks, and the circuits with shuffled labels: how often each question holds.
- random: random channels of a network trained on digits (10 tasks at each draw), size 0.3.
- pairs: the default recipe on small networks, with the verdict of each task.
- fidelity: ``Recipe(fidelity=0.8)`` on three quarters of the digits that a small network was not
  trained on, measured on the rest, which are as many as were kept apart: how often the fidelity
  there is below what was asked for.

Rows go to benchmarks/results/verdict.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.cifar import REPOSITORY, SharedMissingError
from benchmarks.constants_study import SHARED, digits
from benchmarks.image_data import load_images, per_class
from benchmarks.networks import load_network
from nad_attr import Recipe, SubArchitecture, find_gate_sites, learn_gates, verdict
from nad_attr.certainty.verdict_result import QUESTIONS
from nad_attr.evaluation import (
    PLANTED_KINDS,
    evaluate,
    fit_ablation,
    planted,
    random_architectures,
    shuffled_labels,
)

OUT = REPOSITORY / "benchmarks" / "results" / "verdict.jsonl"
PAIRS = ("resnet20/cifar10",)
Row = dict[str, Any]


def counted(result: Any) -> Row:
    """How many tasks each question holds for."""
    return {"n": len(result.tasks), **{q: int(result.holds(q).sum()) for q in QUESTIONS}}


def of_planted(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Networks of each kind."""
    for kind in PLANTED_KINDS:
        for seed in range(args.networks):

            def row(kind: Any = kind, seed: int = seed) -> Row:
                known = planted(
                    kind, n_classes=3, width=32, circuit_width=3, n_images=90, seed=seed
                )
                archs = [known.circuit[task] for task in known.tasks]
                if "zero" not in known.ablations:
                    means = fit_ablation(known.model, known.sites, known.data, kind="mean").means
                    archs = [arch.with_means(means) for arch in archs]
                tried = {
                    "circuits": (archs, known.held_out),
                    "random": (random_architectures(archs, seed=1000 + seed), known.held_out),
                    "shuffled labels": (archs, shuffled_labels(known.held_out, seed)),
                }
                return {
                    name: counted(
                        verdict(known.model, given, None, held_out, n_images=60, seed=seed)
                    )
                    for name, (given, held_out) in tried.items()
                }

            yield f"{kind} {seed}", row


def of_random(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Random channels of a trained network, closed at their means."""
    model, train, held_out = digits()
    sites = find_gate_sites(model, train[0][:2])
    means = fit_ablation(model, sites, train, kind="mean").means
    whole = SubArchitecture.full(sites)
    kept = {s.name: list(range(round(0.3 * s.n_channels))) for s in sites}
    for draw in range(args.draws):

        def row(draw: int = draw) -> Row:
            task = draw % 10
            arch = SubArchitecture.from_kept(kept, whole.sites, task=task, means=means)
            (random,) = random_architectures([arch], draw=draw, seed=99)
            return counted(verdict(model, random, None, held_out, n_images=80, seed=draw))

        yield str(draw), row


def of_pairs(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The default recipe's gates at 40 %, with the best constants and at the mean."""
    for pair in (*("digits/digits",), *args.pairs):
        for ablation in ("mean", "optimal"):

            def row(pair: str = pair, ablation: Any = ablation) -> Row:
                if pair == "digits/digits":
                    model, train, held_out = digits()
                else:
                    data = load_images(pair.partition("/")[2], SHARED)
                    model = load_network(pair, data, SHARED)
                    train = per_class(data.train, 160, 0)
                    held_out = per_class(data.held_out, 60, 0)
                tasks = list(range(min(4, int(train[1].max()) + 1)))
                start = time.process_time()
                gates = learn_gates(model, train, tasks, Recipe(size=0.4, ablation=ablation))
                learned = time.process_time()
                other = learn_gates(
                    model, train, tasks, Recipe(size=0.4, ablation=ablation), seed=1
                )
                begun = time.process_time()
                found = verdict(
                    model, gates, train, held_out, replicas=[other], n_images=args.images
                )
                return {
                    **counted(found),
                    "learning": learned - start,
                    "verdict": time.process_time() - begun,
                    "value": found.value.tolist(),
                    "baseline": found.baseline.tolist(),
                    "own_auc": found.measures["own_auc"].tolist(),
                    "sentences": [found.sentence(t) for t in tasks],
                    "parts": [found.held_out_sentences(t) for t in tasks],
                }

            yield f"{pair} {ablation}", row


def of_fidelity(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Digits that the network was not trained on, cut anew each time."""
    _, (train_x, train_y), (x, y) = digits()
    with torch.random.fork_rng():  # quick, so that there can be many halves
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 48), nn.ReLU(),
            nn.Linear(48, 10),
        )  # fmt: skip
        optimiser = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(300):
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(train_x), train_y).backward()
            optimiser.step()
        model.eval()
    for draw in range(args.halves):

        def row(draw: int = draw) -> Row:
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(draw))
            n = len(y) // 4  # as many fresh images as are kept apart: a third of the others
            there, here = order[:n], order[n:]
            recipe = Recipe(fidelity=0.8, ablation="mean", steps=70)
            tasks = [draw % 10]
            gates = learn_gates(model, (x[here], y[here]), tasks, recipe, seed=draw)
            found = evaluate(model, gates, (x[there], y[there]), n_random=0, checks="off")
            return {"fidelity": found.fidelity.tolist(), "size": found.size.tolist()}

        yield str(draw), row


PARTS = {
    "planted": of_planted, "random": of_random, "pairs": of_pairs, "fidelity": of_fidelity,
}  # fmt: skip


def rows() -> list[Row]:
    """What is measured so far."""
    return [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.exists() else []


def share(held: int, n: int) -> str:
    """Holds of n, in percent."""
    return f"{100 * held / max(n, 1):.1f}"


def report() -> str:
    """The tables, for docs/verdict.md."""
    lines = []
    sums: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows():
        if row["part"] == "planted":
            for name in ("circuits", "random", "shuffled labels"):
                for key, value in row[name].items():
                    sums[row["name"].rpartition(" ")[0], name][key] += value
        elif row["part"] == "random":
            for key in ("n", *QUESTIONS):
                sums["digits, 30 %", "random"][key] += row[key]
    asked = QUESTIONS[:4]
    lines.append(f"| network | channels | judged | {' | '.join(asked)} |")
    lines.append("|---|---|---|" + "---|" * len(asked))
    for (network, name), found in sums.items():
        cells = [share(found[q], found["n"]) for q in asked]
        lines.append(f"| {network} | {name} | {found['n']} | {' | '.join(cells)} |")
    halves = [row for row in rows() if row["part"] == "fidelity"]
    if halves:
        reached = np.array([row["fidelity"] for row in halves]).ravel()
        sizes = np.array([row["size"] for row in halves]).ravel()
        lines.append(
            f"\nfidelity 0.8 asked for, {len(reached)} fresh halves: below it in "
            f"{share(int((reached < 0.8).sum()), len(reached))} % (stated: 5 % at most), median "
            f"{np.median(reached):.3f}; size {sizes.min():.2f} to {sizes.max():.2f}, "
            f"median {np.median(sizes):.2f}"
        )
    for row in rows():
        if row["part"] == "pairs":
            cells = [f"{row[q]} of {row['n']}" for q in QUESTIONS]
            spent = f"{row['learning']:.0f}, {row['verdict']:.0f}"
            lines.append(f"| {row['name']} | {' | '.join(cells)} | {spent} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measures what is not measured yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--report", action="store_true", help="the tables alone")
    parser.add_argument("--networks", type=int, default=15, help="planted, of each kind")
    parser.add_argument("--draws", type=int, default=200, help="random channels")
    parser.add_argument("--halves", type=int, default=200)
    parser.add_argument("--images", type=int, default=100, help="of a task, for pairs")
    parser.add_argument("--pairs", nargs="*", default=list(PAIRS))
    parser.add_argument("--minutes", type=float, default=7.0, help="stop after so many")
    args = parser.parse_args(argv)
    end = time.monotonic() + 60 * args.minutes
    done = {(row["part"], row["name"]) for row in rows()}
    for part in () if args.report else args.only:
        for name, measure in PARTS[part](args):
            if (part, name) in done or time.monotonic() > end:
                continue
            try:
                row = {"part": part, "name": name, **measure()}
            except SharedMissingError as missing:
                print(f"{name}: skipped: {missing}", flush=True)
                continue
            with OUT.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(report())


if __name__ == "__main__":
    main()
