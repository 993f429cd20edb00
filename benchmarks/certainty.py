"""Is what certainty says of channels true, and what does it cost?

    python -m benchmarks.certainty                    # everything; skips what is done
    python -m benchmarks.certainty --only planted --minutes 5
    python -m benchmarks.certainty --report           # the tables alone

- planted: networks whose channels are known, 100 of each kind: two classes, 16 channels at each of
  three sites, gates of one and a half times the circuit's size. Of the channels called *needed*,
  how many are not? Of those that are needed, how many are found? With redundant copies none is
  needed: which share of a whole copy that is kept is called *replaceable*?
- null: networks of random weights, each with eight channels that may be closed without changing
  the squared error in the mean. Their p-values should be uniform (Kolmogorov and Smirnov).
- pair: networks trained on digits and on CIFAR-10 photos (beside the repository, see ``--shared``):
  the default recipe, two seeds. Labels; kappa between the two seeds' gates, and between their
  cores; own AUC and fidelity of a core against the gates cut at its size, both with constants
  fitted alike.
- cost: learning, certainty and verdict with all their defaults for classes of a ResNet-20 in one
  run (``--tasks 10`` for all): seconds of the processor and passes.

Rows go to benchmarks/results/certainty.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from benchmarks.cifar import REPOSITORY, add_shared_arguments, default_cache
from benchmarks.going_on import Row, go_on, rows_of
from benchmarks.networks import small_pair
from nad_attr import (
    ChannelCertainty,
    GateSite,
    Recipe,
    RunOptions,
    TaskGates,
    certainty,
    fit_constants,
    learn_gates,
    verdict,
)
from nad_attr.certainty.testing import LABELS
from nad_attr.evaluation import PLANTED_KINDS, evaluate, planted
from nad_attr.gates.channels import kappa

OUT = REPOSITORY / "benchmarks" / "results" / "certainty.jsonl"
FACTOR = 1.5
#: Of gates whose cores are looked at.
SIZE = 0.4
RUN = RunOptions(batch_size=800)
#: Thresholds of the core.
TAUS = (0.5, 0.75, 0.875, 1.0)
#: Channels of a null network that may be closed, and images on each side.
N_NULL, NULL_IMAGES = 8, 256


def of_planted(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """One row for each network."""
    for seed in range(args.networks):
        for kind in args.kinds:

            def row(kind: Any = kind, seed: int = seed) -> Row:
                known = planted(kind, n_classes=2, width=16, circuit_width=3, seed=seed)
                ablation = "mean" if "mean" in known.ablations else known.ablations[0]
                # Fewer steps keep parts of both copies.
                steps = 100 if kind == "redundant" else 40
                recipe = Recipe(size=FACTOR * known.size, ablation=ablation, steps=steps)
                gates = learn_gates(
                    known.model, known.data, [0], recipe, known.sites, seed=seed, run=RUN
                )
                found = certainty(
                    known.model, gates, known.data, known.held_out, pairs=2, alternatives=2,
                    seed=seed, run=RUN,
                )  # fmt: skip
                copies = [
                    torch.cat([copy[s.name] for s in known.sites]).numpy()
                    for copy in known.alternatives[0]
                ]
                truth = copies[0] if len(copies) == 1 else np.zeros_like(copies[0])
                label = found.label[0]
                needed = label == LABELS.index("needed")
                whole = [copy for copy in copies if found.kept[0][copy].all()]
                replaceable = label == LABELS.index("replaceable")
                return {
                    "needed": int(needed.sum()), "false": int((needed & ~truth).sum()),
                    "truth": int(truth.sum()), "kept": int((found.kept[0] & truth).sum()),
                    "found": int((needed & truth).sum()),
                    "replaceable": float(replaceable[whole[0]].mean())
                    if len(copies) > 1 and whole else None,
                    "passes": sum(found.passes.values()),
                }  # fmt: skip

            yield f"{kind} {seed}", row


class Null(nn.Module):
    """Random weights, and channels that closing neither helps nor hurts in the mean.

    The output is the sum of all channels: of u_1 ... u_n, odd random functions of inputs of their
    own, of -u_1 / 2 ... -u_n / 2, and of others. Kept are u_1 ... u_n. With one closed as well the
    residual's part of it is -u / 2 in place of u / 2, and u is as often positive as negative.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.site = nn.Identity()
        for name, shape in (("first", (N_NULL + 2, 4, 6)), ("second", (N_NULL + 2, 6, 1))):
            self.register_buffer(name, torch.randn(*shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        """Two logits."""
        parts = x.view(len(x), -1, 1, 4) @ self.first
        u = (parts.tanh() @ self.second).flatten(1)
        channels = self.site(torch.cat([u[:, :N_NULL], -u[:, :N_NULL] / 2, u[:, N_NULL:]], dim=1))
        return torch.stack([channels.sum(1), -channels.sum(1)], dim=1)


def of_null(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The p-values of one network in each row."""
    for seed in range(args.networks):

        def row(seed: int = seed) -> Row:
            model = Null(seed).eval()
            generator = torch.Generator().manual_seed(1000 + seed)
            x = torch.randn(2 * NULL_IMAGES, 4 * (N_NULL + 2), generator=generator)
            data = [(part, torch.arange(len(part)) % 2) for part in x.split(NULL_IMAGES)]
            gates = TaskGates(
                {"site": (torch.arange(2 * N_NULL + 2) < N_NULL).float()[None]},
                [GateSite("site", 2 * N_NULL + 2, 1)], [0],
                means={"site": torch.zeros(2 * N_NULL + 2)},
                recipe=Recipe(steps=1, images_per_step=2, ablation="mean"),
            )  # fmt: skip
            found = certainty(
                model, gates, *data, pairs=1, alternatives=0, images=NULL_IMAGES, run=RUN
            )
            tested = ~np.isnan(found.effect[0])
            return {
                "p": found.p[0][tested].tolist(), "skipped": int(found.skipped[0]),
                "needed": found.counts(0)["needed"],
            }  # fmt: skip

        yield str(seed), row


def sure_of(pair: str, task: int, seed: int, n_pairs: int, args: argparse.Namespace) -> Any:
    """Certainty of one task's gates, from a file beside the cached images or measured now."""
    folder = args.cache or default_cache()
    name = f"{pair.replace('/', '_')}_{task}_{seed}_{n_pairs}{said_of(args)}"
    file = folder / f"certainty_{name}.json"
    if file.exists():
        return ChannelCertainty.load(file)
    model, data, held_out = small_pair(pair, args.shared, cache=args.cache)
    recipe = Recipe(size=SIZE, replicas=args.replicas)
    gates = learn_gates(model, data, [task], recipe, seed=seed)
    found = certainty(model, gates, data, held_out, pairs=n_pairs, alternatives=0, seed=seed)
    folder.mkdir(parents=True, exist_ok=True)
    found.save(file)
    return found


def said_of(args: argparse.Namespace) -> str:
    """Of a row's name: how many replicas guide the gates."""
    return "" if args.replicas == 1 else f"_r{args.replicas}"


def of_pair(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """One row for each task and number of pairs of halves."""
    for pair in args.pairs:
        for n_pairs in args.halves:
            for task in range(args.tasks):

                def row(pair: str = pair, task: int = task, n_pairs: int = n_pairs) -> Row:
                    found = [sure_of(pair, task, seed, n_pairs, args) for seed in (0, 1)]
                    model, data, held_out = small_pair(pair, args.shared, cache=args.cache)
                    cores: dict[str, Row] = {}
                    for tau in TAUS:
                        masks = [one.selection[0] >= tau - 1e-9 for one in found]
                        if not all(mask.any() for mask in masks):
                            continue
                        core = found[0].core(tau).sub_architecture(task)
                        cut = found[0]._gates(found[0].gate).sub_architecture(task, core.size)
                        fitted = [
                            one for arch in (core, cut) for one in fit_constants(model, arch, data)
                        ]
                        judged = [
                            evaluate(model, one, held_out, n_random=0, checks="off")
                            for one in fitted
                        ]
                        cores[f"{tau:g}"] = {
                            "size": core.size, "kappa": kappa_of(*masks),
                            "own_auc": [one.mean("own_auc") for one in judged],
                            "fidelity": [one.mean("fidelity") for one in judged],
                            "bound": found[0].false_selections(tau, task) if tau > 0.5 else None,
                        }  # fmt: skip
                    return {
                        "pair": pair + said_of(args), "n_pairs": n_pairs,
                        "labels": found[0].counts(task),
                        "gates": kappa_of(*(one.kept[0] for one in found)), "cores": cores,
                    }  # fmt: skip

                yield f"{pair} {task} {n_pairs}{said_of(args)}", row


def kappa_of(first: np.ndarray, second: np.ndarray) -> float:
    """Overlap over all sites together, corrected for chance."""
    return float(kappa(torch.from_numpy(first), torch.from_numpy(second)))


def of_cost(args: argparse.Namespace) -> Iterator[tuple[str, Callable[[], Row]]]:
    """Classes of the ResNet-20 in one run, with all defaults."""
    tasks = list(range(args.tasks))

    def row() -> Row:
        model, data, held_out = small_pair("resnet20/cifar10", args.shared, cache=args.cache)
        seconds, start = [], time.process_time()

        def spent() -> None:
            nonlocal start
            seconds.append(time.process_time() - start)
            start = time.process_time()

        gates = learn_gates(model, data, tasks)
        spent()
        found = certainty(model, gates, data, held_out)
        spent()
        said = verdict(model, gates, data, held_out, certainty=found)
        spent()
        return {
            **dict(zip(("learning", "certainty", "verdict"), seconds, strict=True)),
            "classes": len(tasks), "labels": [found.counts(task) for task in tasks],
            "passes": dict(found.passes), "answers": said.answers,
        }  # fmt: skip

    yield f"{args.tasks} classes", row


PARTS = {"planted": of_planted, "null": of_null, "pair": of_pair, "cost": of_cost}


def report() -> str:
    """The tables, for docs/certainty.md."""
    lines = [
        "| kind | networks | called *needed* | of these false | found of the needed | found of "
        "those kept | whole copy kept: *replaceable* | images passed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind in PLANTED_KINDS:
        of = [row for row in rows_of(OUT, "planted") if row["name"].split()[0] == kind]
        if not of:
            continue
        sums = {n: sum(row[n] for row in of) for n in ("needed", "false", "found", "truth", "kept")}
        said = [row["replaceable"] for row in of if row["replaceable"] is not None]
        cells = [
            kind, f"{len(of)}", f"{sums['needed']:,}", f"{sums['false']}",
            *(f"{sums['found'] / sums[n]:.3f}" if sums[n] else "" for n in ("truth", "kept")),
            f"{np.mean(said):.2f} of {len(said)}" if said else "",
            f"{np.mean([row['passes'] for row in of]):,.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    null = rows_of(OUT, "null")
    if null:
        p = np.concatenate([row["p"] for row in null])
        test = stats.kstest(p, "uniform")
        lines.append(
            f"\n{len(null)} random networks: {len(p)} p-values, KS distance {test.statistic:.3f} "
            f"(p = {test.pvalue:.2f}), {100 * np.mean(p < 0.05):.1f} % below .05; "
            f"{sum(row['needed'] for row in null)} called needed"
        )
    lines += [
        "\n| network | pairs | core | size | kappa of cores | of gates | own AUC: core, cut | "
        "fidelity: core, cut | rarely chosen, at most |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    pairs = rows_of(OUT, "pair")
    for pair, n in dict.fromkeys((row["pair"], row["n_pairs"]) for row in pairs):
        of = [row for row in pairs if (row["pair"], row["n_pairs"]) == (pair, n)]
        for tau in map("{:g}".format, TAUS):
            cores = [row["cores"][tau] for row in of if tau in row["cores"]]
            if not cores:
                continue
            mean = {
                k: np.mean([c[k] for c in cores], axis=0)
                for k in ("size", "kappa", "own_auc", "fidelity")
            }
            bounds = [c["bound"] for c in cores if c["bound"] is not None]
            cells = [
                f"{pair} ({len(cores)} tasks)", f"{n}", tau, f"{mean['size']:.2f}",
                f"{mean['kappa']:.2f}", f"{np.mean([row['gates'] for row in of]):.2f}",
                *("{:.3f}, {:.3f}".format(*mean[k]) for k in ("own_auc", "fidelity")),
                f"{np.mean(bounds):.1f}" if bounds else "",
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    for row in rows_of(OUT, "cost"):
        parts = ("learning", "certainty", "verdict")
        lines.append(
            f"\nResNet-20, {row['classes']} classes in one run, seconds of one core: "
            + ", ".join(f"{part} {row[part]:.0f}" for part in parts)
            + f"; {sum(row[part] for part in parts) / 60:.1f} minutes; images passed: "
            + ", ".join(f"{k} {v:,}" for k, v in row["passes"].items())
        )
    return "\n".join(lines)


def main() -> None:
    """Measures what is not measured yet, and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--report", action="store_true", help="the tables alone")
    parser.add_argument("--networks", type=int, default=100, help="planted, of each kind")
    parser.add_argument("--kinds", nargs="+", choices=PLANTED_KINDS, default=PLANTED_KINDS)
    parser.add_argument("--pairs", nargs="*", default=["digits/digits", "resnet20/cifar10"])
    parser.add_argument("--halves", nargs="+", type=int, default=[4, 16], help="pairs of halves")
    parser.add_argument("--tasks", type=int, default=4)
    parser.add_argument("--replicas", type=int, default=1, help="of the recipe, for pairs")
    parser.add_argument("--minutes", type=float, default=5.0, help="begin nothing after so many")
    add_shared_arguments(parser)
    args = parser.parse_args()
    work = ((part, *one) for part in args.only for one in PARTS[part](args))
    if not args.report:
        go_on(OUT, work, args.minutes)
    print(report())


if __name__ == "__main__":
    main()
