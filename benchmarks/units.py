"""Which units serve a transformer best: heads and hidden neurons, or channels of the stream?

    python -m benchmarks.units --seeds 0 1 2

For each seed a small vision transformer (three blocks of four heads, 32 channels) is trained on
scikit-learn's digits. Sub-architectures of two digits are learned with the default
recipe, of heads and hidden neurons and of channels of the residual stream, at equal share of the
blocks' parameters, and judged on held-out digits beside random ones of the same units.

What a head takes with it: its rows of the query, key and value projections, and its columns of the
output projection; a neuron its row of the first layer and its column of the second. Channels of the
stream are counted as if a closed one took all weights along that touch it between its site and the
next. No network can be cut so far, because attention and MLP write to it again; what
``SubArchitecture.cost`` says an exported network really holds stands beside it. Heads
and neurons are cut at the same share each; all get their constants fitted at the end. A last
comparison is by what is really held: channels against the heads and neurons whose exported network
is no larger.

Writes ``benchmarks/results/units.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar import default_cache
from benchmarks.flow import SmallViT, TokenBlock
from nad_attr import (
    GateSite,
    Recipe,
    SubArchitecture,
    TaskGates,
    find_gate_sites,
    fit_constants,
    learn_gates,
)
from nad_attr.evaluation import evaluate
from nad_attr.gates.channels import n_gates, open_gates, to_channels, top_k_masks
from nad_attr.system.files import replacing, write_text

RESULTS = Path(__file__).parent / "results" / "units.json"
WIDTH, HEADS, BLOCKS, EPOCHS = 32, 4, 3, 10
KINDS: dict[str, tuple[str, ...]] = {
    "heads and neurons": ("heads", "neurons"),
    "channels": ("channels",),
}
KIND = "heads and neurons"

Pair = tuple[Tensor, Tensor]


def digits(seed: int) -> tuple[Pair, Pair]:
    """1200 digits to train and learn on, and the others."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    labels = torch.tensor(found.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    images, labels = images[order], labels[order]
    return (images[:1200], labels[:1200]), (images[1200:], labels[1200:])


class DigitViT(SmallViT):
    """The transformer of :mod:`benchmarks.flow`, for images of 8 x 8 pixels."""

    def __init__(self) -> None:
        super().__init__(10, width=WIDTH)
        self.patches = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.places = nn.Parameter(torch.randn(1, 16, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(TokenBlock(WIDTH, HEADS) for _ in range(BLOCKS)))


def trained(train: Pair, seed: int) -> nn.Module:
    """The network of a seed, from the cache folder if it is there."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = DigitViT()
        path = default_cache() / f"digits_vit_{seed}_{EPOCHS}.pt"
        if path.is_file():
            model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
            return model.eval()
        optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(EPOCHS):
            for batch in torch.randperm(len(train[1])).split(50):
                loss = F.cross_entropy(model(train[0][batch]), train[1][batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    with replacing(path) as part:
        torch.save(model.state_dict(), part)
    return model.eval()


def weights_of(site: GateSite) -> int:
    """Numbers that one gate's unit takes along."""
    if site.units == "heads":
        width = site.n_channels // site.n_gates
        return 4 * width * WIDTH + 3 * width
    return 2 * WIDTH + 1 if site.units == "neurons" else 1


def share(arch: SubArchitecture) -> float:
    """Share of the blocks' parameters, or of the channels, that a sub-architecture keeps."""
    kept = [int(open_gates(site, arch[site.name]).sum()) * weights_of(site) for site in arch.sites]
    return sum(kept) / sum(site.n_gates * weights_of(site) for site in arch.sites)


def cut(gates: TaskGates, task: int, target: float) -> SubArchitecture:
    """The top of a task's ranking: of heads, of neurons and of channels each the same share."""
    own, n = gates.select([task]), n_gates(gates.sites)
    # The number of gates at which each gate comes in.
    ranks = {site.name: torch.full((site.n_gates,), n + 1) for site in gates.sites}
    for k in range(n, 0, -1):
        arch = own.sub_architectures(k / n)[0]
        for site in gates.sites:
            ranks[site.name][open_gates(site, arch[site.name])] = k
    masks: dict[str, Tensor] = {}
    for kind in {site.units for site in gates.sites}:
        sites = [site for site in gates.sites if site.units == kind]
        scores = {s.name: to_channels(-ranks[s.name].double(), [s]) for s in sites}
        masks |= top_k_masks(scores, sites, round(target * n_gates(sites)))
    return own.sub_architecture(task)._with_masks(masks, task)


def rows_of(
    seed: int, sizes: list[float], tasks: list[int], known: list[dict[str, Any]]
) -> Iterator[list[dict[str, Any]]]:
    """The rows of one kind of units at one size, a row for each task; known ones are left out."""
    done = {(row["seed"], row["units"], row["size"]) for row in known}
    waiting = [(kind, size) for size in sizes for kind in KINDS if (seed, kind, size) not in done]
    if not waiting:
        return
    train, held_out = digits(seed)
    model = trained(train, seed)
    with torch.no_grad():
        accuracy = float((model(held_out[0]).argmax(1) == held_out[1]).float().mean())
    print(f"seed {seed}: {accuracy:.3f} of the held-out digits are right", flush=True)
    for kind, size in waiting:
        sites = find_gate_sites(model, train[0][:1], units=KINDS[kind])
        gates = learn_gates(model, train, tasks, Recipe(size=size), sites, seed=seed)
        archs = fit_constants(model, [cut(gates, t, size) for t in tasks], train, seed=seed)
        found = evaluate(model, archs, held_out, n_random=1, seed=seed)
        # What an exported network holds: asked once, as it takes a while.
        cost = archs[0].cost(model, train[0][:1]) if seed == 0 else None
        yield [
            {
                "seed": seed, "accuracy": accuracy, "units": kind, "size": size, "task": task,
                "gates_kept": arch.size, "parameters_kept": share(arch),
                "own_auc": float(found.own_auc[t]), "fidelity": float(found.fidelity[t]),
                "rank_fidelity": float(found.rank_fidelity[t]),
                "random_own_auc": float(found.random[0].own_auc[t]),
                "random_fidelity": float(found.random[0].fidelity[t]),
                "exported": None if cost is None or t
                else cost.smaller.parameters / cost.whole.parameters,
            }
            for t, (task, arch) in enumerate(zip(tasks, archs, strict=True))
        ]  # fmt: skip


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Means, and the differences over seeds and tasks with their range over seeds."""
    result: dict[str, Any] = {}
    for size in sorted({row["size"] for row in rows}, reverse=True):
        at = [row for row in rows if row["size"] == size]
        found: dict[str, Any] = {}
        for kind in KINDS:
            own = [row for row in at if row["units"] == kind]
            found[kind] = {
                name: round(float(np.mean(values)), 3)
                for name in ("gates_kept", "parameters_kept", "exported", "own_auc", "fidelity",
                             "rank_fidelity", "random_own_auc", "random_fidelity")
                if (values := [r[name] for r in own if r[name] is not None])
            }  # fmt: skip
        pair = ((KIND, size), ("channels", size))
        found |= differences(rows, *pair)
        result[f"{size:g}"] = found
    # At what a network that is cut out really holds: the most that holds less than the channels.
    for size in sorted({row["size"] for row in rows}, reverse=True):
        limit = result[f"{size:g}"].get("channels", {}).get("exported", 0.0)
        fitting = [k for k, v in result.items() if v.get(KIND, {}).get("exported", 1) <= limit]
        if fitting:
            larger = max(float(k) for k in fitting)
            result[f"channels at {size:g}, {KIND} at {larger:g}, by what is exported"] = (
                differences(rows, (KIND, larger), ("channels", size))
            )
    return result


def differences(
    rows: list[dict[str, Any]], one: tuple[str, float], other: tuple[str, float]
) -> dict[str, list[float]]:
    """By seed, what one kind of units at its size has over another kind at its size."""
    found: dict[str, list[float]] = {}
    for seed in sorted({row["seed"] for row in rows}):
        at = [[r for r in rows if (r["seed"], r["units"], r["size"]) == (seed, *k)]
              for k in (one, other)]  # fmt: skip
        if all(at):
            for measure in ("own_auc", "fidelity"):
                inner, stream = (float(np.mean([r[measure] for r in part])) for part in at)
                key = f"{measure}, heads and neurons minus channels, by seed"
                found.setdefault(key, []).append(round(inner - stream, 3))
    return found


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.5, 0.3])
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 8])
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    rows = json.loads(args.json.read_text())["rows"] if args.json.is_file() else []
    for seed in args.seeds:
        for found in rows_of(seed, args.sizes, args.tasks, rows):
            print(json.dumps(found), flush=True)
            rows += [
                {k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}
                for row in found
            ]
            # A run that is stopped goes on where it was.
            made = {"summary": summary(rows), "rows": rows}
            write_text(args.json, json.dumps(made, indent=1) + "\n")
    print(json.dumps(summary(rows), indent=1))


if __name__ == "__main__":
    main()
