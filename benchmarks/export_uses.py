"""What exported networks are good for: detecting one class, telling several apart, forgetting one.

On CIFAR-10 (``--shared``; skipped where it is absent), with the default recipe's gates.

*Detector*: the 40 % network of a class against rivals that are cut until their multiply-adds are
the same: channels by NeuronMCT and at random, and networks whose widths Torch-Pruning prunes in one
shot, by magnitude or by a Taylor score of the class. Every rival may do what ours may, on the same
images with as many steps: closed channels get their best constants; pruned networks get BatchNorm
statistics estimated anew, or their BatchNorm biases fitted to keep the class's output (a bias is to
a pruned network what a constant is to a masked one). Measured on held-out images: AUC of the
class's output, and balanced accuracy above a threshold that is fitted on training images.

*Together*: three classes' networks as one, by ``combine``: accuracy among the three on held-out
images. Then six classes' random channels side by side, and the weakest class replaced by ours.

*Forgetting*: the channels that only one class keeps are closed, and the same number of others:
those of NeuronMCT by the same rule, the class's highest by NeuronMCT, random ones. ``output only``
is the network with the class's output struck out.

    python -m benchmarks.export_uses --shared ../shared
    python -m benchmarks.export_uses --shared ../shared --pair densenet/cifar10
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar import SharedMissingError
from benchmarks.image_data import load_images, per_class
from benchmarks.networks import load_network
from nad_attr import Recipe, TaskGates, fit_constants, learn_gates
from nad_attr.evaluation import NeuronMCTScorer, top_k
from nad_attr.evaluation.measures import auc
from nad_attr.export import combine
from nad_attr.export.exporting import cut
from nad_attr.export.forgetting import forget
from nad_attr.export.tracing import Graph, traced
from nad_attr.gates.channels import top_k_masks
from nad_attr.gates.sub_architecture import SubArchitecture

PARTS = ("forgetting", "detectors", "together")
RESULTS = Path(__file__).parent / "results" / "export_uses.json"


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """All outputs."""
    with torch.no_grad():
        return torch.cat([model(part) for part in images.split(250)])


def multiply_adds(model: nn.Module, images: Tensor) -> int:
    """For one image."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(images[:1])
    return counter.get_total_flops() // 2


def detector(train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor]) -> dict[str, float]:
    """AUC and balanced accuracy of a score; the threshold is the best on training images.

    Args:
        train: Scores (N,), and which images are the class's own, bool (N,).
        held_out: The same.
    """
    scores, own = train
    best, threshold = -1.0, 0.0
    for candidate in scores.quantile(torch.linspace(0, 1, 201)).tolist():
        above = scores > candidate
        balanced = float(above[own].float().mean() + (~above[~own]).float().mean()) / 2
        if balanced > best:
            best, threshold = balanced, candidate
    scores, own = held_out
    above = scores > threshold
    return {
        "auc": float(auc(scores, own)),
        "balanced_accuracy": float(above[own].float().mean() + (~above[~own]).float().mean()) / 2,
    }


def matched(make: Callable[[float], Any], cost: Callable[[Any], int], target: int) -> Any:
    """What is made with the share kept at which the multiply-adds are nearest to a target."""
    low, high, best = 0.02, 1.0, None
    for _ in range(7):
        share = (low + high) / 2
        made = make(share)
        found = cost(made)
        if best is None or abs(found - target) < abs(best[0] - target):
            best = found, made
        low, high = (share, high) if found < target else (low, share)
    assert best is not None
    return best[1]


def pruned(
    model: nn.Module, share: float, images: Tensor, labels: Tensor, task: int | None
) -> nn.Module:
    """Widths pruned in one shot by Torch-Pruning: by magnitude, or a Taylor score of the task."""
    import torch_pruning as tp

    network = copy.deepcopy(model).requires_grad_(True)
    importance: Any = tp.importance.GroupMagnitudeImportance(p=2)
    if task is not None:
        importance = tp.importance.GroupTaylorImportance()
        logits = network(images[:400])
        own = (labels[:400] == task).float()
        nn.functional.binary_cross_entropy_with_logits(logits[:, task], own).backward()
    pruner = tp.pruner.MetaPruner(
        network,
        images[:1],
        importance=importance,
        global_pruning=True,
        pruning_ratio=1 - share,
        max_pruning_ratio=0.98,
        ignored_layers=[m for m in network.modules() if isinstance(m, nn.Linear)],
    )
    pruner.step()
    return network.requires_grad_(False)


def normalised_anew(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy whose BatchNorm statistics are those of these images."""
    network = copy.deepcopy(model)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.reset_running_stats()
            norm.momentum = None
            norm.train()
    outputs(network, images)
    return network.eval()


def biases_fitted(
    model: nn.Module, wanted: Tensor, images: Tensor, own: Tensor, task: int, seed: int
) -> nn.Module:
    """A copy whose BatchNorm biases keep a task output best; steps and images as for constants."""
    network = copy.deepcopy(model).requires_grad_(False)
    biases = [m.bias for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    recipe, generator = Recipe(), torch.Generator().manual_seed(seed)
    for bias in biases:
        bias.requires_grad_(True)
    optimiser = torch.optim.Adam(biases, 0.05)
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.02, recipe.steps)
    sets = own.nonzero().flatten(), (~own).nonzero().flatten()
    for _ in range(recipe.steps):
        at = torch.cat(
            [
                part[torch.randint(len(part), (recipe.images_per_step // 2,), generator=generator)]
                for part in sets
            ]
        )
        optimiser.zero_grad()
        F.mse_loss(network(images[at])[:, task], wanted[at]).backward()
        optimiser.step()
        schedule.step()
    return network.requires_grad_(False)


def detectors(
    model: nn.Module,
    gates: TaskGates,
    graph: Graph,
    train: Any,
    held_out: Any,
    seed: int,
    n_tasks: int,
) -> dict[str, Any]:
    """Every method's detector of every class, at equal multiply-adds."""
    x, y = train
    tasks = [task for task in gates.tasks[:n_tasks] if isinstance(task, int)]
    scores = NeuronMCTScorer(model, gates.sites)(x, y, tasks=tasks)
    generator = torch.Generator().manual_seed(seed)
    clean = outputs(model, x)

    def network(arch: SubArchitecture) -> nn.Module:
        return cut(arch, model, (x[:1],), graph, [arch.task], check=False)  # type: ignore[list-item]

    def cost(made: SubArchitecture | nn.Module) -> int:
        return multiply_adds(network(made) if isinstance(made, SubArchitecture) else made, x)

    ours = [gates.sub_architecture(task) for task in tasks]
    targets = [cost(arch) for arch in ours]
    archs = {"ours": ours}
    for name in ("NeuronMCT", "random"):
        found = []
        for row, (task, target) in enumerate(zip(tasks, targets, strict=True)):
            values = {
                s.name: torch.rand(s.n_channels, generator=generator)
                if name == "random"
                else torch.as_tensor(scores[s.name][row])
                for s in gates.sites
            }

            def of(
                share: float, task: int = task, values: dict[str, Tensor] = values
            ) -> SubArchitecture:
                masks = top_k_masks(values, gates.sites, max(1, round(share * gates.n_channels)))
                return SubArchitecture(masks, gates.sites, task=task, means=gates.means)

            found.append(matched(of, cost, target))
        archs[name + ", at the mean"] = found
        archs[name] = fit_constants(model, found, train, seed=seed)
    rows: dict[str, list[dict[str, float]]] = {}
    for row, (task, target) in enumerate(zip(tasks, targets, strict=True)):
        made = {name: network(of_method[row]) for name, of_method in archs.items()}
        made["whole network"] = model
        for name, of_task in (("magnitude", None), ("Taylor", task)):
            narrow = matched(
                lambda share, of_task=of_task: pruned(model, share, x, y, of_task), cost, target
            )
            made[f"pruned by {name}"] = narrow
            made[f"pruned by {name}, BatchNorm anew"] = again = normalised_anew(narrow, x)
            made[f"pruned by {name}, biases fitted"] = biases_fitted(
                again, clean[:, task], x, y == task, task, seed
            )
        for name, one in made.items():
            answers = [outputs(one, images) for images in (x, held_out[0])]
            column = [a[:, 0] if a.shape[1] == 1 else a[:, task] for a in answers]
            measured = detector((column[0], y == task), (column[1], held_out[1] == task))
            measured["multiply_adds"] = multiply_adds(one, x)
            measured["parameters"] = sum(p.numel() for p in one.parameters())
            rows.setdefault(name, []).append(measured)
        print(task, {n: round(r[-1]["auc"], 3) for n, r in rows.items()}, flush=True)
    return {
        name: {
            "mean": {key: float(np.mean([r[key] for r in of_method])) for key in of_method[0]},
            "tasks": of_method,
        }
        for name, of_method in rows.items()
    }


def together(
    model: nn.Module,
    methods: dict[str, dict[int, SubArchitecture]],
    train: Any,
    held_out: Any,
    triples: Sequence[tuple[int, ...]],
) -> dict[str, Any]:
    """Accuracy among the classes of a combined network, and one class's part replaced."""

    def accuracy(
        network: nn.Module, classes: Sequence[int], columns: Sequence[int] | slice = slice(None)
    ) -> list[float]:
        """Of each class, among these."""
        parts = [held_out[0][held_out[1] == c] for c in classes]
        found = outputs(network, torch.cat(parts))[:, columns].argmax(1).split([*map(len, parts)])
        return [float((f == i).float().mean()) for i, f in enumerate(found)]

    x = train[0]
    whole = [accuracy(model, classes, list(classes)) for classes in triples]
    rows: dict[str, Any] = {"whole network": {"accuracy": float(np.mean(whole))}}
    for name, archs in methods.items():
        for how in ("union", "side by side"):
            for calibration in (None, train):
                found, shares = [], []
                for classes in triples:
                    parts = {c: archs[c] for c in classes}
                    both = combine(model, parts, x[:1], how=how, calibration=calibration)  # type: ignore[arg-type]
                    found += accuracy(both, classes)
                    shares.append(multiply_adds(both, x) / multiply_adds(model, x))
                key = f"{name}, {how}" + ", calibrated" * (calibration is not None)
                rows[key] = {
                    "accuracy": float(np.mean(found)),
                    "multiply_adds": float(np.mean(shares)),
                }
    parts = dict(methods["random"])
    every = tuple(parts)

    def all_of_them() -> list[float]:
        both = combine(model, parts, x[:1], how="side by side", calibration=train)  # type: ignore[arg-type]
        return accuracy(both, every)

    before = all_of_them()
    weak = int(np.argmin(before))
    parts[every[weak]] = methods["ours"][every[weak]]
    after = all_of_them()
    rows["random parts, the weakest replaced by ours"] = {
        "class": every[weak],
        "its accuracy": [before[weak], after[weak]],
        "all classes": [float(np.mean(before)), float(np.mean(after))],
    }
    return rows


def forgotten(
    model: nn.Module, gates: TaskGates, train: Any, held_out: Any, shared_by: int, seed: int
) -> dict[str, Any]:
    """Each class forgotten by each method, the same number of channels closed."""
    scores = NeuronMCTScorer(model, gates.sites)(*train, tasks=gates.tasks)
    k = round(gates.sub_architecture(gates.tasks[0]).size * gates.n_channels)
    masks = top_k_masks(
        {s.name: torch.as_tensor(scores[s.name]) for s in gates.sites}, gates.sites, k
    )
    by_rival = TaskGates(
        {name: mask.float() for name, mask in masks.items()},
        gates.sites,
        gates.tasks,
        means=gates.means,
    )
    generator = torch.Generator().manual_seed(seed)
    x, y = held_out
    clean = outputs(model, x)
    rows: dict[str, list[dict[str, float]]] = {}

    def add(name: str, task: Any, logits: Tensor, n_closed: int) -> None:
        right = logits.argmax(1) == y
        rows.setdefault(name, []).append(
            {
                "own": float(right[y == task].float().mean()),
                "others": float(right[y != task].float().mean()),
                "n_closed": n_closed,
            }
        )

    def closed(values: dict[str, Tensor], n: int) -> Tensor:
        highest = top_k_masks(values, gates.sites, n)
        arch = SubArchitecture(
            {name: ~mask for name, mask in highest.items()}, gates.sites, means=gates.means
        )
        with arch.applied(model):
            return outputs(model, x)

    for row, task in enumerate(gates.tasks):
        add("whole network", task, clean, 0)
        struck = clean.clone()
        struck[:, task] = -torch.inf
        add("output only", task, struck, 0)
        try:
            ours = forget(model, gates, task, shared_by=shared_by)
        except ValueError:  # no channel is its own: nothing to close
            n, answers = 0, clean
        else:
            n = ours.n_closed
            with ours.architecture.applied(model):
                answers = outputs(model, x)
        add("ours", task, answers, n)
        ranked = {s.name: torch.as_tensor(scores[s.name][row]).float() for s in gates.sites}
        # Own to the class by the same rule, the highest scores first until as many are closed.
        alone = {}
        for site in gates.sites:
            kept = by_rival[site.name] > 0.5
            others = kept.sum(0) - kept[row].long()
            own = kept[row] & (others <= shared_by)
            place = ranked[site.name] / ranked[site.name].max().clamp(min=1e-12)
            alone[site.name] = place + own.float() * 10 - others.float()
        add("NeuronMCT, same rule", task, closed(alone, n), n)
        add("NeuronMCT, highest", task, closed(ranked, n), n)
        noise = {s.name: torch.rand(s.n_channels, generator=generator) for s in gates.sites}
        add("random", task, closed(noise, n), n)
    return {
        name: {key: float(np.mean([r[key] for r in of_method])) for key in of_method[0]}
        for name, of_method in rows.items()
    }


def main() -> None:
    """Learns gates, measures, writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, default=Path("../shared"))
    parser.add_argument("--pair", default="resnet20/cifar10", help="see benchmarks.networks")
    parser.add_argument("--size", type=float, default=0.4)
    parser.add_argument("--images", type=int, default=100, help="of each class, to learn from")
    parser.add_argument("--held-out", type=int, default=300, help="images of each class")
    parser.add_argument("--detectors", type=int, default=5, help="of how many classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="these only")
    parser.add_argument("--gates", type=Path, help="file of gates; written if it is not there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        data = load_images(args.pair.partition("/")[2], args.shared)
        model = load_network(args.pair, data, args.shared).eval()
    except SharedMissingError as error:
        print(f"skipped: {error}")
        return
    train = per_class(data.train, args.images, args.seed)
    held_out = per_class(data.held_out, args.held_out, args.seed)
    tasks = list(range(len(data.classes)))
    recipe = Recipe(size=args.size)
    if args.gates is not None and args.gates.exists():
        gates = TaskGates.load(args.gates)
    else:
        gates = learn_gates(model, train, tasks, recipe, seed=args.seed, show_progress=True)
        if args.gates is not None:
            gates.save(args.gates)
    graph = traced(model, gates.sites, (train[0][:1],))
    settings = {
        k: v for k, v in vars(args).items() if k not in ("shared", "output", "gates", "parts")
    }

    def keep(name: str, rows: Any) -> None:
        every = json.loads(args.output.read_text()) if args.output.exists() else {}
        every["command"] = "python -m benchmarks.export_uses"
        found = every.setdefault(args.pair, {})
        found[name] = {"settings": settings | {"recipe": str(recipe)}, **rows}
        args.output.write_text(json.dumps(every, indent=1) + "\n", encoding="utf-8")
        short = {n: r.get("mean", r) for n, r in rows.items()}
        print(name, json.dumps(short, indent=1), flush=True)

    if "forgetting" in args.parts:
        rows = {
            f"{method}, shared by {n}": row
            for n in (0, 2)
            for method, row in forgotten(model, gates, train, held_out, n, args.seed).items()
        }
        keep("forgetting", rows)
    if "detectors" in args.parts:
        n = args.detectors
        keep("detectors", detectors(model, gates, graph, train, held_out, args.seed, n))
    if "together" in args.parts:
        triples = [(0, 1, 2), (3, 5, 7)]
        classes = [task for triple in triples for task in triple]
        scores = NeuronMCTScorer(model, gates.sites)(*train, tasks=classes)
        generator = torch.Generator().manual_seed(args.seed)
        noise = {
            s.name: torch.rand(len(classes), s.n_channels, generator=generator) for s in gates.sites
        }
        methods = {"ours": {task: gates.sub_architecture(task) for task in classes}}
        for name, values in (("NeuronMCT", scores), ("random", noise)):
            archs = top_k(values, gates.sites, classes, args.size)
            fitted = fit_constants(model, archs, train, seed=args.seed)
            methods[name] = dict(zip(classes, fitted, strict=True))
        keep("together", together(model, methods, train, held_out, triples))


if __name__ == "__main__":
    main()
