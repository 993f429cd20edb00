"""What an exported network is good for: a detector of one class, and a network without one.

On CIFAR-10 and ResNet-20 (``--shared``; skipped where they are absent), gates of all ten classes.

*Detector*: the 40 % network of a class against rivals that are cut until their multiply-adds are
the same: channels by NeuronMCT and at random, and networks whose widths Torch-Pruning prunes in one
shot, by magnitude or by a Taylor score of the class. Every rival may do what ours may: closed
channels at their means, or, for pruned widths, BatchNorm statistics estimated anew on the same
training images. Measured on held-out images: AUC of the class's output, and balanced accuracy above
a threshold that is fitted on training images.

*Forgetting*: the channels that only one class keeps are closed, and the same number of others:
those of NeuronMCT by the same rule, the class's highest by NeuronMCT, random ones. ``output only``
is the network with the class's output struck out.

    python -m benchmarks.export_uses --shared ../shared
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.cifar import SharedMissingError, load_resnet
from benchmarks.image_data import load_images, per_class
from nad_attr import Recipe, TaskGates, learn_gates
from nad_attr.evaluation import NeuronMCTScorer
from nad_attr.evaluation.measures import auc
from nad_attr.export.exporting import cut
from nad_attr.export.forgetting import forget
from nad_attr.export.tracing import Graph, traced
from nad_attr.gates.channels import top_k_masks
from nad_attr.gates.sub_architecture import SubArchitecture

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


def matched(make: Callable[[float], nn.Module], target: int, images: Tensor) -> nn.Module:
    """The network of the share kept at which the multiply-adds are nearest to a target."""
    low, high, best = 0.02, 1.0, None
    for _ in range(7):
        share = (low + high) / 2
        made = make(share)
        cost = multiply_adds(made, images)
        if best is None or abs(cost - target) < abs(best[0] - target):
            best = cost, made
        low, high = (share, high) if cost < target else (low, share)
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
        ignored_layers=[network.linear],
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
    scores = NeuronMCTScorer(model, gates.sites)(x, y, tasks=gates.tasks)
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[dict[str, float]]] = {}
    for row, task in enumerate(gates.tasks[:n_tasks]):
        assert isinstance(task, int)
        ours = gates.sub_architecture(task)
        small = cut(ours, model, (x[:1],), graph, [task], check=False)
        target = multiply_adds(small, x)
        noise = {s.name: torch.rand(s.n_channels, generator=generator) for s in gates.sites}
        ranked = {s.name: torch.as_tensor(scores[s.name][row]) for s in gates.sites}

        def of(values: dict[str, Tensor], share: float, task: int = task) -> nn.Module:
            k = max(1, round(share * gates.n_channels))
            masks = top_k_masks(values, gates.sites, k)
            arch = SubArchitecture(masks, gates.sites, task=task, means=gates.means)
            return cut(arch, model, (x[:1],), graph, [task], check=False)

        made = {
            "ours": small,
            "NeuronMCT": matched(lambda share, v=ranked: of(v, share), target, x),
            "random": matched(lambda share, v=noise: of(v, share), target, x),
            "whole network": model,
        }
        for name, of_task in (("magnitude", None), ("Taylor", task)):
            narrow = matched(lambda share, t=of_task: pruned(model, share, x, y, t), target, x)
            made[f"pruned by {name}"] = narrow
            made[f"pruned by {name}, BatchNorm anew"] = normalised_anew(narrow, x)
        for name, network in made.items():
            answers = [outputs(network, images) for images in (x, held_out[0])]
            column = [a[:, 0] if a.shape[1] == 1 else a[:, task] for a in answers]
            found = detector((column[0], y == task), (column[1], held_out[1] == task))
            found["multiply_adds"] = multiply_adds(network, x)
            found["parameters"] = sum(p.numel() for p in network.parameters())
            rows.setdefault(name, []).append(found)
        print(task, {n: round(r[-1]["auc"], 3) for n, r in rows.items()}, flush=True)
    return {
        name: {
            "mean": {key: float(np.mean([r[key] for r in of_method])) for key in of_method[0]},
            "tasks": of_method,
        }
        for name, of_method in rows.items()
    }


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
        ours = forget(model, gates, task, shared_by=shared_by)
        with ours.architecture.applied(model):
            add("ours", task, outputs(model, x), ours.n_closed)
        n = ours.n_closed
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
    parser.add_argument("--size", type=float, default=0.4)
    parser.add_argument("--images", type=int, default=100, help="of each class, to learn from")
    parser.add_argument("--held-out", type=int, default=300, help="images of each class")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--detectors", type=int, default=5, help="of how many classes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    try:
        model = load_resnet(20, args.shared / "models" / "cifar10_resnet20.pt").eval()
        data = load_images("cifar10", args.shared)
    except SharedMissingError as error:
        print(f"skipped: {error}")
        return
    train = per_class(data.train, args.images, args.seed)
    held_out = per_class(data.held_out, args.held_out, args.seed)
    gates = learn_gates(
        model,
        train,
        list(range(10)),
        Recipe(size=args.size, ablation="mean", steps=args.steps),
        seed=args.seed,
        show_progress=True,
    )
    graph = traced(model, (train[0][:1],), gates.sites)
    found = {
        "command": "python -m benchmarks.export_uses",
        "settings": {k: v for k, v in vars(args).items() if k not in ("shared", "output")},
        "forgetting": {
            str(n): forgotten(model, gates, train, held_out, n, args.seed) for n in (0, 2)
        },
    }
    print(json.dumps(found["forgetting"], indent=1), flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    found["detectors"] = detectors(model, gates, graph, train, held_out, args.seed, args.detectors)
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({n: r["mean"] for n, r in found["detectors"].items()}, indent=1))


if __name__ == "__main__":
    main()
