"""What was tried for the default recipe, and what it gives.

    python -m benchmarks.recipe_study                      # skips what is done
    python -m benchmarks.recipe_study --report             # the table alone

Each variant learns all tasks of a network at five sizes in one run of falling budget, from the
same images and with the same number of passes as the default recipe, and is measured on held-out
images as in ``benchmarks.disentanglement``. A variant is the default recipe with other settings
(of :class:`nad_attr.Recipe` or of :mod:`nad_attr.learning.selection`), or another way to learn
altogether:

- forgiving the same throughout: ``free_scale`` of a difference of scale and offset is forgiven,
  however much of the task output's variance no scale and offset can mend.
- straight-through: logits by Adam, gates the highest of them at exactly the budget of the step, the
  gradient of the squared change of the output passed straight through.
- annealed sigmoid: the same with soft gates whose temperature falls from 1 to 0.05, moved so that
  their sum is the budget.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.cifar import REPOSITORY, SharedMissingError
from benchmarks.disentanglement import Cell, parser
from benchmarks.image_data import load_images
from benchmarks.networks import load_network
from nad_attr import Recipe, learn_sizes
from nad_attr.data.sources import Draw
from nad_attr.evaluation import evaluate
from nad_attr.gates.channels import budget, n_channels
from nad_attr.learning.engine import Chunk, Learned, TaskImages
from nad_attr.learning.selection import budgets

RESULTS = REPOSITORY / "benchmarks" / "results" / "recipe_study.jsonl"
PAIRS = ("vgg/cifar10", "resnet14/scene15")
MEASURES = ("own_auc", "disentanglement", "fidelity", "rank_fidelity")
LEARNING_RATE = 0.1
COLDEST = 0.05

#: {name: (settings of the recipe, constants of nad_attr.learning.selection)}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "default": ({}, {}),
    "free_scale 0": ({"free_scale": 0.0}, {}),
    "free_scale 0.5": ({"free_scale": 0.5}, {}),
    "free_scale 0.8": ({"free_scale": 0.8}, {}),
    "free_scale 1": ({"free_scale": 1.0}, {}),
    "forgiving the same throughout": ({}, {"SCALE_POWER_DROP": 0.0}),
    "all images the same (boundary 0)": ({"boundary": 0.0}, {}),
    "boundary 0.5": ({"boundary": 0.5}, {}),
    "boundary to the end": ({}, {"BOUNDARY_FADING_POWER": 1000}),
    "values of all images (free_scale 0, boundary 0)": ({"free_scale": 0.0, "boundary": 0.0}, {}),
    "no exchange": ({}, {"MAX_EXCHANGED_SHARE": 0.0}),
    "exchange 10 %": ({}, {"MAX_EXCHANGED_SHARE": 0.1}),
    "no single swaps": ({}, {"SWAPS_PER_STEP": 0}),
    "no trust charge": ({"trust": 0.0}, {}),
    "memory 0.8": ({"memory": 0.8}, {}),
    "closing to the end": ({"removal": 1.0}, {}),
    "half the images": ({"images_per_step": 10}, {}),
    "twice the images": ({"images_per_step": 40}, {}),
}


def adam(soft: bool) -> Callable[[Chunk, Recipe, Sequence[float]], list[Learned]]:
    """Logits by Adam in place of the quadratic model; gates soft or straight-through."""

    def learn(chunk: Chunk, recipe: Recipe, sizes: Sequence[float]) -> list[Learned]:
        network, rows = chunk.network, len(chunk)
        n = n_channels(network.sites)
        path = budgets(recipe, n, [budget(size, network.sites) for size in sizes])
        steps = list(itertools.chain(*path))
        ends = set(itertools.accumulate(map(len, path)))
        per_task = recipe.images_per_step

        def draws(images: TaskImages) -> list[Draw]:
            return images.take("own", per_task - per_task // 2) + images.take(
                "other", per_task // 2
            )

        plan = [[draws(images) for images in chunk.images] for _ in range(recipe.steps)]
        logits = torch.full((rows, n), 2.0, requires_grad=True)
        optimiser = torch.optim.Adam([logits], lr=LEARNING_RATE)
        learned = []
        losses = []
        for t, batch in enumerate(chunk.batches(plan)):
            cold = COLDEST ** (t / max(recipe.steps - 1, 1))
            k = steps[t]
            values = logits.detach()
            if soft:
                gates = torch.sigmoid((values - shift(values / cold, k) * cold) / cold)
                slope = gates * (1 - gates) / cold
            else:
                gates = torch.zeros_like(values).scatter_(1, values.topk(k, dim=1).indices, 1.0)
                slope = torch.ones_like(values)
            clean = chunk.own_output(chunk.clean(batch), batch.rows)
            output, gradient = network.output_and_gradient(
                batch.inputs, gates[batch.rows], chunk.classes[batch.rows], chunk.valid[batch.rows]
            )
            residual = (output - clean)[batch.places].view(rows, per_task)
            variance = clean[batch.places].view(rows, per_task).var(dim=1, correction=0)
            scaled = residual / variance.clamp(min=1e-12)[:, None]
            gradients = gradient[batch.places].view(rows, per_task, n)
            logits.grad = 2 * torch.einsum("rm,rmn->rn", scaled, gradients) / per_task * slope
            optimiser.step()
            losses.append(residual.square().mean(1) / variance.clamp(min=1e-12))
            chunk.advance(rows)
            if t + 1 in ends:
                order = logits.detach().argsort(dim=1, stable=True).argsort(dim=1)
                share = (order + 1) / (n + 1)
                ranks = (share - (n - k) / (n + 1) + 0.5 / (n + 1)) / 2 + 0.5
                ranks = ranks.clamp(1e-3, 1 - 1e-3)
                curves = {"loss": torch.stack(losses)}
                learned.append(Learned(ranks, ranks.logit(), curves))
        return learned

    return learn


def shift(values: Tensor, k: int) -> Tensor:
    """What is to be taken from logits so that the sum of their sigmoids is ``k``: (R, 1)."""
    low = values.min(dim=1, keepdim=True).values - 20
    high = values.max(dim=1, keepdim=True).values + 20
    for _ in range(40):
        middle = (low + high) / 2
        over = torch.sigmoid(values - middle).sum(1, keepdim=True) > k
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    return (low + high) / 2


OTHERS = {"straight-through": adam(soft=False), "annealed sigmoid": adam(soft=True)}
VARIANTS = (*SETTINGS, *OTHERS)


@contextmanager
def variant(name: str) -> Iterator[dict[str, Any]]:
    """Inside, learning is the variant's; gives the settings of its recipe."""
    if name in OTHERS:
        with mock.patch("nad_attr.learning.session.learn_selection", OTHERS[name]):
            yield {}
        return
    recipe, constants = SETTINGS[name]
    import nad_attr.learning.selection

    # patch.multiple wants at least one name.
    with mock.patch.multiple(
        nad_attr.learning.selection,
        **(constants or {"SWAPS_PER_STEP": nad_attr.learning.selection.SWAPS_PER_STEP}),
    ):
        yield recipe


def row(cell: Cell, name: str, ablation: str) -> dict[str, Any]:
    """One variant on one network."""
    sizes = cell.args.sizes
    start = time.process_time()
    with variant(name) as settings:
        recipe = Recipe(ablation=ablation, steps=cell.args.steps * len(sizes), **settings)
        found = learn_sizes(
            cell.model, sizes, cell.data.train, cell.tasks, recipe, cell.sites,
            seed=cell.seed, amp=True, run=cell.options,
        )  # fmt: skip
    seconds = time.process_time() - start
    measured = {}
    for size, gates in found.items():
        result = evaluate(cell.model, gates, cell.held_out, amp=True, n_random=0, run=cell.options)
        measured[f"{size:g}"] = {name: round(result.mean(name), 4) for name in MEASURES}
    return {
        "pair": cell.pair, "ablation": ablation, "variant": name, "seed": cell.seed,
        "cpu_seconds": round(seconds, 1), "sizes": measured,
    }  # fmt: skip


def report(rows: Sequence[dict[str, Any]]) -> str:
    """Own AUC / fidelity, mean over seeds, as a Markdown table for each network."""
    parts = []
    for pair, ablation in dict.fromkeys((r["pair"], r["ablation"]) for r in rows):
        chosen = [r for r in rows if (r["pair"], r["ablation"]) == (pair, ablation)]
        sizes = list(chosen[0]["sizes"])
        head = ["variant", *(f"{float(size):.0%}" for size in sizes), "CPU s"]
        lines = [f"| {' | '.join(head)} |", f"| --- |{' --: |' * (len(sizes) + 1)}"]
        for name in dict.fromkeys(r["variant"] for r in chosen):
            same = [r for r in chosen if r["variant"] == name]
            cells = [
                " / ".join(
                    f"{np.mean([r['sizes'][size][measure] for r in same]):.{digits}f}"
                    for measure, digits in (("own_auc", 3), ("fidelity", 2))
                )
                for size in sizes
            ]
            seconds = f"{np.mean([r['cpu_seconds'] for r in same]):.0f}"
            lines.append(f"| {' | '.join([name, *cells, seconds])} |")
        parts.append(
            f"{pair}, closed channels at {ablation}: own AUC / fidelity\n\n" + "\n".join(lines)
        )
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing, prints the table."""
    options = parser()
    options.description = __doc__.split("\n\n")[0]
    options.set_defaults(pairs=list(PAIRS), seeds=[0], ablations=["mean"], results=RESULTS)
    options.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options.add_argument("--report", action="store_true", help="only print what is there")
    args: argparse.Namespace = options.parse_args(argv)
    path: Path = args.results
    rows = [json.loads(line) for line in path.open()] if path.is_file() else []
    if not args.report:
        torch.set_num_threads(1)
        done = {(r["pair"], r["ablation"], r["variant"], r["seed"]) for r in rows}
        for pair in args.pairs:
            try:
                data = load_images(pair.partition("/")[2], args.shared, cache=args.cache)
                model = load_network(pair, data, args.shared, cache=args.cache)
            except SharedMissingError as missing:
                print(f"{pair}: skipped: {missing}", file=sys.stderr)
                continue
            for seed, ablation, name in itertools.product(
                args.seeds, args.ablations, args.variants
            ):
                if (pair, ablation, name, seed) in done:
                    continue
                rows.append(row(Cell(args, pair, data, model, seed), name, ablation))
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    print(report(rows))


if __name__ == "__main__":
    main()
