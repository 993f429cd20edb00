"""The verdict's error rates, on planted and on trained networks; fidelity asked for and reached.

    python -m benchmarks.verdict                      # everything; skips what is done
    python -m benchmarks.verdict --only planted random
    python -m benchmarks.verdict --report             # the tables alone

- planted: circuits of planted networks of each kind, and random channels of their size in the same
  networks, and the circuits with shuffled labels: how often each question holds. Closed channels
  are at their mean.
- planted with constants: the same with the best constants, which are fitted.
- random: random channels of a network trained on digits, size 0.3, closed at their mean.
- random with constants: the same of a smaller network, with the best constants.
- steps: fidelity of two classes' gates and of random channels, by the steps that constants get.
- pairs: the default recipe at size 0.4 on small networks and EfficientNet-Lite0, a class a row.
- fidelity: ``Recipe(fidelity=0.8)`` on three quarters of the digits that a small network was not
  trained on, measured on the rest, which are as many as were kept apart: how often the fidelity
  there is below what was asked for.

Rows go to benchmarks/results/verdict.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import lite0_data
from benchmarks.cifar import REPOSITORY
from benchmarks.constants_study import SHARED, digits
from benchmarks.going_on import Row, go_on, rows_of
from benchmarks.networks import PAIRS, small_pair
from nad_attr import (
    Recipe,
    RunOptions,
    SubArchitecture,
    find_gate_sites,
    fit_constants,
    learn_gates,
    verdict,
)
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
#: What is so of planted circuits: without one copy of two the task stays, half of a shared circuit
#: is another class's as well.
NOT_SO = {"redundant": ("necessary", "specific"), "shared": ("specific",)}
Work = Iterator[tuple[str, Callable[[], Row]]]
RUN = RunOptions(batch_size=800)


def counted(result: Any) -> Row:
    """How many tasks each question holds for."""
    return {"n": len(result.tasks), **{q: int(result.holds(q).sum()) for q in QUESTIONS}}


def of_planted(args: argparse.Namespace, constants: bool = False) -> Work:
    """Networks of each kind."""
    for seed in range(args.networks // 3 if constants else args.networks):
        for kind in PLANTED_KINDS:

            def row(kind: Any = kind, seed: int = seed) -> Row:
                known = planted(
                    kind, n_classes=3, width=32, circuit_width=3, n_images=90, seed=seed
                )
                data = known.data if constants else None
                archs = [known.circuit[task] for task in known.tasks]
                random = random_architectures(archs, seed=1000 + seed)
                if constants:
                    fit = Recipe(steps=20)
                    archs, random = (
                        fit_constants(known.model, given, known.data, recipe=fit, run=RUN)
                        for given in (archs, random)
                    )
                elif "zero" not in known.ablations:
                    means = fit_ablation(known.model, known.sites, known.data, kind="mean").means
                    archs, random = (
                        [arch.with_means(means) for arch in given] for given in (archs, random)
                    )
                tried = {
                    "circuits": (archs, known.held_out),
                    "random": (random, known.held_out),
                    "shuffled labels": (archs, shuffled_labels(known.held_out, seed)),
                }
                return {
                    name: counted(
                        verdict(known.model, given, data, held_out, n_images=60, seed=seed, run=RUN)
                    )
                    for name, (given, held_out) in tried.items()
                }

            yield f"{kind} {seed}", row


def of_random(args: argparse.Namespace, constants: bool = False) -> Work:
    """Random channels of a trained network, closed at their means or at constants."""
    for draw in range(args.draws):

        def row(draw: int = draw) -> Row:
            if constants:
                model, train, held_out = quick_digits()
            else:
                model, train, held_out = known_digits()
            sites = find_gate_sites(model, train[0][:2])
            means = None if constants else fit_ablation(model, sites, train, kind="mean").means
            kept = {s.name: list(range(round(0.3 * s.n_channels))) for s in sites}
            task = draw % 10
            arch = SubArchitecture.from_kept(kept, sites, task=task, means=means)
            (random,) = random_architectures([arch], draw=draw, seed=99)
            if constants:
                (random,) = fit_constants(model, random, train, recipe=Recipe(steps=20), run=RUN)
            data = train if constants else None
            return counted(verdict(model, random, data, held_out, n_images=80, seed=draw, run=RUN))

        yield str(draw), row


def of_steps(args: argparse.Namespace) -> Work:
    """Fidelity of two classes' gates and of random channels, by steps that constants get."""
    for steps in (3, 6, 20, 100):

        def row(steps: int = steps) -> Row:
            model, train, held_out = known_digits()
            gates = learn_gates(model, train, [3, 8], Recipe(size=0.4), run=RUN)
            archs = gates.sub_architectures()
            tried = [archs, *(random_architectures(archs, draw=draw) for draw in range(6))]
            fidelity = [
                evaluate(
                    model,
                    fit_constants(model, given, train, recipe=Recipe(steps=steps), run=RUN),
                    held_out,
                    n_random=0,
                    checks="off",
                ).mean("fidelity")
                for given in tried
            ]
            return {"ours": fidelity[0], "random": float(np.mean(fidelity[1:]))}

        yield str(steps), row


def of_pairs(args: argparse.Namespace) -> Work:
    """The default recipe's gates at 40 %, a task at a time, held against another seed's."""
    for pair in args.pairs:
        for number in range(args.tasks):

            def row(pair: str = pair, number: int = number) -> Row:
                task: Any = number
                if pair == "lite0/imagenet":
                    model, train, held_out, tasks = lite0_data.load(SHARED)
                    task = tasks[number]
                else:
                    model, train, held_out = small_pair(pair, SHARED)
                start = time.process_time()
                recipe = Recipe(size=0.4)
                gates, other = (
                    learn_gates(model, train, [task], recipe, seed=seed) for seed in (0, 1)
                )
                learned = time.process_time()
                found = verdict(
                    model, gates, train, held_out, replicas=[other], n_images=args.images
                )
                return {
                    **counted(found), "learning": (learned - start) / 2,
                    "verdict": time.process_time() - learned,
                    "value": found.value.tolist(), "baseline": found.baseline.tolist(),
                    "own_auc": found.measures["own_auc"].tolist(),
                    "sentences": [found.sentence(task)], "parts": found.held_out_sentences(task),
                }  # fmt: skip

            yield f"{pair} {number}", row


@lru_cache
def known_digits() -> Any:
    """The digits network, once."""
    return digits()


@lru_cache
def quick_digits() -> Any:
    """A small network trained on digits, once, and images to learn from and to judge by."""
    _, (train_x, train_y), held_out = known_digits()
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
    return model.eval(), (train_x, train_y), held_out


def of_fidelity(args: argparse.Namespace) -> Work:
    """Digits that the network was not trained on, cut anew each time."""
    for draw in range(args.halves):

        def row(draw: int = draw) -> Row:
            model, _, (x, y) = quick_digits()
            order = torch.randperm(len(y), generator=torch.Generator().manual_seed(draw))
            n = len(y) // 4  # as many fresh images as are kept apart: a third of the others
            there, here = order[:n], order[n:]
            recipe = Recipe(fidelity=0.8, ablation="mean", steps=70)
            tasks = [draw % 10]
            gates = learn_gates(model, (x[here], y[here]), tasks, recipe, seed=draw)
            found = evaluate(model, gates, (x[there], y[there]), n_random=0, checks="off")
            return {"fidelity": found.fidelity.tolist(), "size": found.size.tolist()}

        yield str(draw), row


PARTS: dict[str, Callable[[argparse.Namespace], Work]] = {
    "planted": of_planted,
    "planted with constants": partial(of_planted, constants=True),
    "random": of_random,
    "random with constants": partial(of_random, constants=True),
    "steps": of_steps,
    "pairs": of_pairs,
    "fidelity": of_fidelity,
}


def share(held: int, n: int) -> str:
    """Holds of n, in percent."""
    return f"{100 * held / max(n, 1):.1f}"


def report() -> str:
    """The tables, for docs/verdict.md."""
    lines = []
    sums: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows_of(OUT):
        closed = ", best constants" * row["part"].endswith("with constants")
        if row["part"].startswith("planted"):
            kind = row["name"].rpartition(" ")[0]
            for name in ("circuits", "random", "shuffled labels"):
                for network in (kind + closed, "all" + closed):
                    for key, value in row[name].items():
                        sums[network, name][key] += value
        elif row["part"].startswith("random"):
            for key in ("n", *QUESTIONS):
                sums["digits, 30 %" + closed, "random"][key] += row[key]
    asked = QUESTIONS[:4]
    lines.append(f"| network | channels | judged | {' | '.join(asked)} |")
    lines.append("|---|---|---|" + "---|" * len(asked))
    for (network, name), found in sums.items():
        not_so = NOT_SO.get(network.partition(",")[0], ()) if name == "circuits" else ()
        if network.startswith("all") and name == "circuits":
            continue  # some have to fail
        cells = [share(found[q], found["n"]) + " (not so)" * (q in not_so) for q in asked]
        lines.append(f"| {network} | {name} | {found['n']} | {' | '.join(cells)} |")
    for row in rows_of(OUT, "steps"):
        lines.append(
            f"\n{row['name']} steps: fidelity {row['ours']:.2f}, random {row['random']:.2f}"
        )
    halves = rows_of(OUT, "fidelity")
    if halves:
        reached = np.array([row["fidelity"] for row in halves]).ravel()
        sizes = np.array([row["size"] for row in halves]).ravel()
        lines.append(
            f"\nfidelity 0.8 asked for, {len(reached)} fresh halves: below it in "
            f"{share(int((reached < 0.8).sum()), len(reached))} % (stated: 5 % at most), median "
            f"{np.median(reached):.3f}; size {sizes.min():.2f} to {sizes.max():.2f}, "
            f"median {np.median(sizes):.2f}"
        )
    pairs = rows_of(OUT, "pairs")
    lines.append(f"\n| network | classes | {' | '.join(QUESTIONS)} | fidelity, random | seconds |")
    lines.append("|---|---|" + "---|" * (len(QUESTIONS) + 2))
    for pair in dict.fromkeys(row["name"].split()[0] for row in pairs):
        of = [row for row in pairs if row["name"].split()[0] == pair]
        cells = [f"{sum(row[q] for row in of)}" for q in QUESTIONS]
        kept = [np.mean([row[k][0][0] for row in of]) for k in ("value", "baseline")]
        spent = [np.mean([row[k] for row in of]) for k in ("learning", "verdict")]
        lines.append(
            f"| {pair} | {len(of)} | {' | '.join(cells)} | {kept[0]:.2f}, {kept[1]:.2f} | "
            f"{spent[0]:.0f}, {spent[1]:.0f} |"
        )
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
    parser.add_argument("--tasks", type=int, default=2, help="of a network, for pairs")
    every = ("digits/digits", *PAIRS, "lite0/imagenet")
    parser.add_argument("--pairs", nargs="*", default=every, choices=every)
    parser.add_argument("--minutes", type=float, default=5.0, help="begin nothing after so many")
    args = parser.parse_args(argv)
    if not args.report:
        go_on(OUT, ((p, *one) for p in args.only for one in PARTS[p](args)), args.minutes)
    print(report())


if __name__ == "__main__":
    main()
