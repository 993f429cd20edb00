"""The default recipe against the paper's and against channel scores, at equal size.

    python benchmarks/recipes.py --amp --json benchmarks/results/recipes.json

CIFAR-10, ResNet-20 (both beside the repository, see ``--shared``). Gates and scores come from
training photos, every measure from held-out ones. All methods are cut to exactly the same number
of channels over all sites. Rivals get their best: scores are taken over own images, and over own
and other images, the paper's gates with each of its ``--betas``, and the row that is printed is
the one with the highest own AUC *on the held-out photos*, so the choice favours the rival.

Columns: own AUC, other AUC, fidelity (R^2), its rank correlation, recall, FPR, BA, and
``image_passes``, images through a gated or differentiated network for all tasks together.
"""

from __future__ import annotations

import argparse
import json
import operator
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cifar import SharedMissingError, add_shared_arguments, load_cifar10, load_resnet
from nad_attr import (
    GateSite,
    Recipe,
    RunOptions,
    SubArchitecture,
    TaskGates,
    find_gate_sites,
    learn_gates,
)
from nad_attr.evaluation import (
    ChannelScorer,
    EnergyScorer,
    GradientXActivationScorer,
    NeuronMCTScorer,
    RandomScorer,
    TaylorScorer,
    evaluate,
    top_k,
)

MEASURES = ("own_auc", "other_auc", "fidelity", "rank_fidelity", "recall", "fpr", "ba")
METHODS = ("default", "paper", "scores", "random")
SCORERS = {
    "NeuronMCT": NeuronMCTScorer,
    "Taylor": TaylorScorer,
    "energy": EnergyScorer,
    "gradient x activation": GradientXActivationScorer,
}


def per_class(x: Tensor, y: Tensor, n: int, seed: int) -> tuple[Tensor, Tensor]:
    """``n`` photos of each class, drawn by seed."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(y), generator=generator)
    chosen = torch.cat([order[y[order] == k][:n] for k in range(int(y.max()) + 1)])
    return x[chosen], y[chosen]


class Benchmark:
    """All methods on one network, one seed."""

    def __init__(self, args: argparse.Namespace, model: nn.Module, data: Sequence[Tensor]) -> None:
        self.args, self.model = args, model
        train_x, train_y, val_x, val_y = data
        self.train = (train_x, train_y)
        self.val = per_class(val_x, val_y, args.val_per_class, 0)
        self.sites: list[GateSite] = find_gate_sites(model, train_x[:1])
        self.tasks = list(range(int(train_y.max()) + 1))
        self.means: dict[str, Tensor] | None = None

    def measured(
        self, archs: Sequence[SubArchitecture] | TaskGates, size: float | None = None
    ) -> dict[str, float]:
        """Mean over tasks of every measure on the held-out photos."""
        result = evaluate(self.model, archs, self.val, size=size, n_random=0, batch_size=250)
        return {name: result.mean(name) for name in MEASURES}

    def rows(self, seed: int) -> Iterator[dict[str, Any]]:
        """One row for each method, variant, size and ablation value."""
        scored = per_class(*self.train, self.args.score_images, seed)
        wanted = self.args.methods
        paper = {beta: self._paper(beta, seed) for beta in self.args.betas if "paper" in wanted}
        scored_by = {
            (name, others): self._scores(make(self.model, self.sites), scored, others)
            for name, make in SCORERS.items()
            for others in (False, True)
            if "scores" in wanted
        }
        if "default" not in wanted:
            self.means = self._means(seed)
        for ablation in self.args.ablations:
            for size in self.args.sizes:
                common = {"seed": seed, "size": size, "ablation": ablation}
                if "default" in wanted:
                    yield {**common, **self._default(size, ablation, seed)}
                means = None if ablation == "zero" else self.means
                for beta, (learned, n, spent) in paper.items():
                    archs = [a.with_means(means) for a in learned.sub_architectures(size)]
                    yield {
                        **common, "method": "NAD (paper)", "variant": f"beta {beta:g}",
                        "image_passes": n, "seconds": round(spent, 1), **self.measured(archs),
                    }  # fmt: skip
                for (name, others), (scores, spent) in scored_by.items():
                    archs = top_k(scores, self.sites, self.tasks, size, means=means)
                    n = len(scored[1]) * (len(self.tasks) if others else 1)
                    yield {
                        **common, "method": name,
                        "variant": "own and other" if others else "own",
                        "image_passes": n, "seconds": round(spent, 1), **self.measured(archs),
                    }  # fmt: skip
                for draw in range(self.args.random_draws if "random" in wanted else 0):
                    scores = RandomScorer(self.model, self.sites, seed=1000 * seed + draw)(
                        *scored, tasks=self.tasks
                    )
                    archs = top_k(scores, self.sites, self.tasks, size, means=means)
                    yield {
                        **common, "method": "random", "variant": f"draw {draw}",
                        "image_passes": 0, "seconds": 0.0, **self.measured(archs),
                    }  # fmt: skip

    def _default(self, size: float, ablation: str, seed: int) -> dict[str, Any]:
        recipe = Recipe(size=size, ablation=ablation)
        start = time.perf_counter()
        gates = learn_gates(
            self.model, self.train, self.tasks, recipe, self.sites, seed=seed,
            batch_size=self.args.batch, amp=self.args.amp,
        )  # fmt: skip
        seconds = time.perf_counter() - start
        self.means = gates.means or self.means
        return {
            "method": "NAD (default)",
            "variant": "",
            "image_passes": recipe.steps * recipe.images_per_step * len(self.tasks),
            "seconds": round(seconds, 1),
            **self.measured(gates),
        }

    def _means(self, seed: int) -> dict[str, Tensor]:
        """What closed channels are replaced by: as learning would take them."""
        recipe = Recipe(ablation="mean", steps=1)
        gates = learn_gates(self.model, self.train, [0], recipe, self.sites, seed=seed)
        assert gates.means is not None
        return gates.means

    def _scores(
        self, scorer: ChannelScorer, images: tuple[Tensor, Tensor], others: bool
    ) -> tuple[dict[str, Tensor], float]:
        start = time.perf_counter()
        scores = scorer(
            *images,
            tasks=self.tasks,
            include_others=others,
            run=RunOptions(batch_size=self.args.batch),
        )
        return scores, time.perf_counter() - start

    def _paper(self, beta: float, seed: int) -> tuple[TaskGates, int, float]:
        data = per_class(*self.train, self.args.paper_images, seed)
        recipe = Recipe.paper(beta=beta, epochs=self.args.paper_epochs)
        start = time.perf_counter()
        gates = learn_gates(
            self.model, data, self.tasks, recipe, self.sites, seed=seed,
            batch_size=self.args.batch, amp=self.args.amp,
        )  # fmt: skip
        kept = [arch.size for arch in gates.sub_architectures()]
        natural = self.measured(gates)
        print(
            f"paper's recipe, beta {beta:g}, seed {seed}: keeps {sum(kept) / len(kept):.2f} at its "
            f"own threshold: own AUC {natural['own_auc']:.3f}, recall {natural['recall']:.3f}, "
            f"FPR {natural['fpr']:.3f}",
            file=sys.stderr,
        )
        return gates, recipe.epochs * len(data[1]), time.perf_counter() - start


def best_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, each method with its best variant (random: the mean of its draws)."""
    keys = sorted({(r["ablation"], -r["size"]) for r in rows})
    methods = list(dict.fromkeys(r["method"] for r in rows))
    chosen = []
    for ablation, negative in keys:
        for method in methods:
            mine = [
                r
                for r in rows
                if (r["ablation"], -r["size"], r["method"]) == (ablation, negative, method)
            ]
            variants = {r["variant"] for r in mine} if method != "random" else {None}
            groups = [[r for r in mine if v is None or r["variant"] == v] for v in variants]
            means = [
                {
                    **group[0],
                    "n": len(group),
                    **{m: sum(r[m] for r in group) / len(group) for m in MEASURES},
                }
                for group in groups
            ]
            chosen.append(max(means, key=lambda r: float(r["own_auc"])))
    return chosen


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Readable text."""
    head = f"{'ablation':8} {'size':>4}  {'method':22} {'variant':14}" + "".join(
        f"{name.replace('_', ' '):>14}" for name in (*MEASURES, "image_passes")
    )
    lines = [head, "-" * len(head)]
    last = None
    for row in rows:
        setting = (row["ablation"], row["size"])
        if last not in (None, setting):
            lines.append("")
        last = setting
        variant = "" if row["method"] == "random" else row["variant"]
        lines.append(
            f"{row['ablation']:8} {row['size']:4.2f}  {row['method']:22} {variant:14}"
            + "".join(f"{row[m]:14.3f}" for m in MEASURES)
            + f"{row['image_passes']:14,}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--depth", type=int, choices=(20, 56), default=20, help="of the ResNet")
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.7, 0.4])
    parser.add_argument(
        "--ablations", nargs="+", choices=("mean", "zero"), default=["mean", "zero"]
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--betas", type=float, nargs="*", default=[0.02, 0.5])
    parser.add_argument("--paper-images", type=int, default=160, help="per class")
    parser.add_argument("--paper-epochs", type=int, default=20)
    parser.add_argument("--score-images", type=int, default=300, help="per class, for scores")
    parser.add_argument("--val-per-class", type=int, default=100)
    parser.add_argument("--random-draws", type=int, default=3)
    parser.add_argument("--batch", type=int, default=200, help="images in one pass")
    parser.add_argument(
        "--amp", action="store_true", help="learn in bfloat16 (all measures float32)"
    )
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS),
        help="rows of other methods that the JSON file already holds are kept",
    )  # fmt: skip
    parser.add_argument("--json", metavar="PATH", help="write all rows here; - for stdout")
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    try:
        model = load_resnet(args.depth, args.shared)
        data = load_cifar10(args.shared, cache=args.cache)
    except SharedMissingError as missing:
        parser.exit(0, f"skipped: {missing}\n")
    benchmark = Benchmark(args, model, data)
    path = None if args.json in (None, "-") else Path(args.json)
    rows: list[dict[str, Any]] = []
    if path is not None and path.exists():
        rows = json.loads(path.read_text())
    key = operator.itemgetter("network", "seed", "size", "ablation", "method", "variant")
    for seed in args.seeds:
        for row in benchmark.rows(seed):
            row = {"network": f"ResNet-{args.depth}", **row}
            rows = [r for r in rows if key(r) != key(row)] + [row]
            print(
                f"seed {seed} {row['ablation']} {row['size']:.2f} {row['method']} "
                f"{row['variant']}: own AUC {row['own_auc']:.3f}, fidelity {row['fidelity']:.3f}",
                file=sys.stderr,
                flush=True,
            )
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(best_rows(rows)), file=sys.stderr if args.json == "-" else sys.stdout)
    if args.json == "-":
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
