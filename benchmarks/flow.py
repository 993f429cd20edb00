"""Information flow: conservation, cost, agreement with cutting, edges alone, and the shape of it.

    python -m benchmarks.flow --parts conservation cost      # any machine: random weights
    python -m benchmarks.flow --parts agreement edges shape  # small networks, trained here
    python -m benchmarks.flow --parts lite0                  # EfficientNet-Lite0, real photos
    python -m benchmarks.flow --parts causes                 # of the lowest agreements known

Writes ``benchmarks/results/flow.json``, one part at a time; times are CPU seconds of one thread.
The networks of ``agreement``, ``edges`` and ``shape`` are those of ``benchmarks.networks`` and a
small vision transformer, trained on some of CIFAR-10 and kept in the cache folder.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.cifar import accuracy, add_shared_arguments, default_cache, load_resnet
from benchmarks.image_data import ImageData, load_images, per_class
from benchmarks.networks import NETWORKS, train
from benchmarks.torchvision_sites import build, seeded, small_size
from nad_attr import (
    RunOptions,
    SubArchitecture,
    find_gate_sites,
    information_flow,
    paper_sites,
)
from nad_attr.evaluation import SCORERS, top_k
from nad_attr.evaluation.measures import spearman
from nad_attr.flow import edge_drops
from nad_attr.flow.edge_sets import agreement, edge_fidelity
from nad_attr.flow.links import OUTPUT
from nad_attr.flow.shape import flow_shape, flow_sharing, parting_depth
from nad_attr.gating.means import channel_means
from nad_attr.stats.bootstrap import bootstrap_means, interval_of
from nad_attr.system.files import replacing, write_text
from nad_attr.system.rng import seed_of

RESULTS = Path(__file__).parent / "results" / "flow.json"

#: One network of each family of torchvision, the smallest.
FAMILIES = (
    "alexnet", "convnext_tiny", "densenet121", "efficientnet_b0", "efficientnet_v2_s", "googlenet",
    "inception_v3", "maxvit_t", "mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small",
    "regnet_x_400mf", "regnet_y_400mf", "resnet18", "resnet50", "resnext50_32x4d",
    "shufflenet_v2_x0_5", "squeezenet1_1", "swin_t", "swin_v2_t", "vgg11", "vgg16_bn", "vit_b_16",
    "wide_resnet50_2",
)  # fmt: skip
SMALL = ("vgg", "resnet14", "resnet20", "densenet", "darts", "vit")
#: Passes over how many images of each class; the others learn less, so that a run is short.
TRAINED = {"resnet14": (4, 800), "densenet": (4, 800)}


class TokenBlock(nn.Module):
    """Attention and two layers, each beside a shortcut."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) -> the same."""
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class SmallViT(nn.Module):
    """A transformer of four blocks on patches of 4 x 4 pixels."""

    def __init__(self, n_classes: int = 10, stride: int = 1, width: int = 96) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4 * stride, stride=4 * stride)
        self.places = nn.Parameter(torch.randn(1, 64, width) * 0.02)
        self.blocks = nn.Sequential(*(TokenBlock(width, 4) for _ in range(4)))
        self.norm, self.classifier = nn.LayerNorm(width), nn.Linear(width, n_classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, 32, 32) -> (B, n_classes)."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.classifier(self.norm(self.blocks(x)).mean(1))


def kind_of(name: str) -> str:
    """The kind of connections."""
    return {"vit": "transformer", "resnet20": "residual"}.get(name) or NETWORKS[name][0]


def network(name: str, data: ImageData, shared: Path, cache: Path | None) -> nn.Module:
    """A network trained on some of the images, from the cache if it is there."""
    if name == "resnet20":
        return load_resnet(20, shared)
    make: Callable[..., nn.Module] = SmallViT if name == "vit" else NETWORKS[name][1]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make(len(data.classes))
    epochs, n = TRAINED.get(name, (3, 300))
    source = inspect.getsource(make) + inspect.getsource(train) + f"{epochs} {n}"
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    path = (cache or default_cache()) / f"flow_{name}_{digest}.pt"
    if path.is_file():
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return model.eval()
    x, y = per_class(data.train, n, 0)
    some = ImageData(data.name, data.classes, (x, y), data.held_out)
    train(model, some, epochs)
    model.to(memory_format=torch.contiguous_format)
    with replacing(path) as part:
        torch.save(model.state_dict(), part)
    return model


def architecture(
    model: nn.Module, images: tuple[Tensor, Tensor], task: int, size: float
) -> SubArchitecture:
    """The channels with the largest first-order effect on a class, others at their mean."""
    sites = find_gate_sites(model, images[0][:1])
    means = channel_means(model, sites, list(zip(images[0].split(100), strict=True)))
    if size == 1:
        return SubArchitecture.full(sites).with_means(means)
    scores = SCORERS["taylor_output"](model, sites)(*images, tasks=[task])
    return top_k(scores, sites, [task], size, means=means)[0]


def conservation(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Outflow against effect, and what bias, curvature and constants bring, in float64."""
    for name in args.only or FAMILIES:
        with seeded(0):
            model = build(name, "cpu", small_size(name)).double()
            x = torch.rand(1, 3, *[small_size(name)] * 2, dtype=torch.float64)
            for module in model.modules():  # some heads start at zero
                if isinstance(module, nn.Linear) and not bool(module.weight.any()):
                    nn.init.normal_(module.weight, std=0.02)
        sites = find_gate_sites(model, x)
        start = time.process_time()
        found = information_flow(model, SubArchitecture.full(sites), x, tasks=0, receivers=4)
        nodes = found.nodes[found.nodes.site != found.sites[0].name].dropna()
        between = [k for k in found.flows[0].links if k.target_site != "output"]
        size = sum(float(k.flow.abs().sum()) for k in between)
        known = [k for k in between if not bool(k.straight.isnan().any())]
        yield {
            "network": name,
            "sites": len(sites),
            "outflow_error": max(found.conservation.values()),
            "inflow_plus_source_error": float(
                (nodes.inflow + nodes.source - nodes.effect).abs().max() / nodes.effect.abs().max()
            ),
            "source_share": float(nodes.source.abs().sum() / nodes.effect.abs().sum()),
            "straight": sum(float(k.straight.abs().sum()) for k in known) / size,
            "straight_unknown_links": len(between) - len(known),
            "seconds": round(time.process_time() - start, 2),
        }
    model = nn.Sequential(
        *(m for i, o in ((3, 16), (16, 24), (24, 32))
          for m in (nn.Conv2d(i, o, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2))),
        nn.Flatten(), nn.Linear(512, 64, bias=False), nn.ReLU(), nn.Linear(64, 10, bias=False),
    ).double().eval()  # fmt: skip
    x = torch.rand(8, 3, 32, 32, dtype=torch.float64)
    found = information_flow(
        model, SubArchitecture.full(find_gate_sites(model, x)), x, tasks=0, receivers=None
    )
    nodes = found.nodes[found.nodes.site != found.sites[0].name]
    error = float((nodes.inflow - nodes.effect).abs().max() / nodes.effect.abs().max())
    yield {
        "network": "ReLU network without biases",
        "sites": len(found.sites),
        "outflow_error": max(found.conservation.values()),
        "inflow_error": error,
    }


def cost(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Passes and CPU seconds of ResNet50 with 64 receiving channels a site, one class."""
    model = build("resnet50", "cpu").eval()
    x = torch.rand(args.images, 3, 224, 224)
    whole = SubArchitecture.full(paper_sites("resnet50"))
    with torch.no_grad():
        model(x[:4])
        start = time.process_time()
        model(x[:4])
        forward = (time.process_time() - start) / 4
    start, wall = time.process_time(), time.perf_counter()
    run = RunOptions(batch_size=4)
    found = information_flow(model, whole, x, tasks=0, receivers=64, run=run)
    seconds = time.process_time() - start
    yield {
        "network": "resnet50",
        "images": args.images,
        "receivers": 64,
        "passes": found.cost,
        "cpu_seconds": round(seconds, 1),
        "cpu_seconds_for_32": round(seconds / args.images * 32, 1),
        "wall_seconds": round(time.perf_counter() - wall, 1),
        "forward_cpu_seconds": round(forward, 3),
        "outflow_error": max(found.conservation.values()),
        "edges": found.n_edges,
    }


def _opened(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module, ImageData, Any, Any]]:
    data = load_images("cifar10", args.shared, cache=args.cache)
    for name in args.only or SMALL:
        model = network(name, data, args.shared, args.cache)
        held = per_class(data.held_out, 60, 0)
        print(f"{name}: accuracy {accuracy(model, *held):.3f} on {len(held[1])}", flush=True)
        learning, judged = per_class(data.train, 32, 1), per_class(data.held_out, 32, 1)
        yield name, model, data, learning, judged


def agreements(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Flow against cutting single edges, in sub-architectures of 40 % and whole networks."""
    for name, model, _, (x, y), _ in _opened(args):
        for size in (0.4, 1.0):
            for task in args.tasks[:2]:
                arch = architecture(model, (x, y), task, size)
                images = x[y == task][:16]
                found = information_flow(model, arch, images, tasks=task, receivers=None)
                for row in agreement(model, found, images, n_edges=args.edges).to_dict("records"):
                    yield {
                        "network": name,
                        "kind": kind_of(name),
                        "size": size,
                        "task": task,
                        **row,
                    }


def edges(args: argparse.Namespace, constants: bool = False) -> Iterator[dict[str, Any]]:
    """Fidelity of sub-architectures of edges, on held-out images, at equal numbers of edges."""
    for name, model, _, (x, y), judged in _opened(args):
        for task in args.tasks:
            arch = architecture(model, (x, y), task, 0.4)
            # Own and other images, as fidelity is judged on both.
            both = torch.cat([x[y == task][:12], x[y != task][:12]])
            found = information_flow(model, arch, both, tasks=task, receivers=None)
            table = edge_fidelity(
                model, found, judged, sizes=(0.3, 0.6), n_random=2, n_images=24,
                fit_images=both if constants else None,
            )  # fmt: skip
            for row in table.to_dict("records"):
                yield {"network": name, "kind": kind_of(name), "task": task, **row}


def edges_with_constants(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same, and each channel that lacks a source has a constant, whatever ranked the edges."""
    return edges(args, constants=True)


def shape(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Straight share, spread, and what classes share, in the whole network."""
    for name, model, _, (x, y), _ in _opened(args):
        flows = []
        for task in args.tasks:
            arch = architecture(model, (x, y), task, 1.0)
            found = information_flow(model, arch, (x, y), tasks=task, receivers=None, n_images=12)
            flows.append(found.flows[0])
            for row in flow_shape(flows[-1], n_null=20).to_dict("records"):
                yield {"network": name, "kind": kind_of(name), "task": task, "of": "shape", **row}
        sharing = flow_sharing(flows, n_null=5)
        for row in sharing.to_dict("records"):
            yield {"network": name, "kind": kind_of(name), "of": "sharing", **row}
        yield {
            "network": name, "kind": kind_of(name), "of": "parting",
            "depth": parting_depth(sharing),
        }  # fmt: skip


def _lite0() -> tuple[nn.Module, dict[int, Tensor], SubArchitecture]:
    """EfficientNet-Lite0, photos by their class, and the whole network with means."""
    from nad_attr.examples.demo import load_lite0, load_photos

    model = load_lite0()
    labels, photos = zip(*((photo.label, photo.image) for photo in load_photos()), strict=True)
    small = [F.interpolate(photo[None].float(), (128, 128), mode="area") for photo in photos]
    images = (torch.cat(small) - 127) / 128
    sites = find_gate_sites(model, images[:1])
    means = channel_means(model, sites, [(images,)])
    by_class = {label: image[None] for label, image in zip(labels, images, strict=True)}
    return model, by_class, SubArchitecture.full(sites).with_means(means)


def lite0(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """EfficientNet-Lite0 with its ImageNet weights, the photos of foolbox: agreement per link."""
    model, photos, whole = _lite0()
    for task, image in list(photos.items())[: args.photos]:
        found = information_flow(model, whole, image, tasks=task, receivers=24)
        for row in agreement(model, found, image, n_edges=args.edges).to_dict("records"):
            yield {"network": "lite0", "kind": "residual", "task": task, **row}


def causes(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Why cutting does not do what the flow says, at the links where they agree least.

    In float64, so that a small share of an edge can be cut: of all of the network that must do
    what the flow says; with the real block, and only behind it a small share, it says whether the
    block bends; the cut itself adds what the network behind it does.
    """
    known = json.loads(args.known.read_text())
    rows = [r for part in ("agreement", "lite0") for r in known.get(part, {}).get("rows", [])]
    for name in args.only or (*SMALL, "lite0"):
        own = [r for r in rows if r["network"] == name and r["target_site"] != OUTPUT]
        low = sorted(own, key=lambda r: r["spearman"])[: args.lowest]
        if name == "lite0":
            model, photos, whole = _lite0()
        else:
            data = load_images("cifar10", args.shared, cache=args.cache)
            model, learning = (
                network(name, data, args.shared, args.cache),
                per_class(data.train, 32, 1),
            )
        archs = [
            whole if name == "lite0" else architecture(model, learning, r["task"], r["size"])
            for r in low
        ]
        model = model.double()
        for row, arch in zip(low, archs, strict=True):
            task, ends = row["task"], (row["source_site"], row["target_site"])
            x, y = (photos[task], None) if name == "lite0" else learning
            images = (x if y is None else x[y == task][:16]).double()
            receivers = 24 if name == "lite0" else None
            found = information_flow(model, arch, images, tasks=task, receivers=receivers)
            link = next(k for k in found.flows[0].links if (k.source_site, k.target_site) == ends)
            told = [(i, j) for i in range(len(link.sources)) for j in range(len(link.targets))]
            # The draw of ``agreement``: its edges, and more of them.
            generator = torch.Generator().manual_seed(seed_of(0, "agreement", *ends))
            chosen = [told[k] for k in torch.randperm(len(told), generator=generator)[: args.edges]]
            edges = [(ends[0], int(link.sources[i]), ends[1], int(link.targets[j]))
                     for i, j in chosen]  # fmt: skip
            flow = torch.stack([link.flow[i, j] for i, j in chosen])
            falls = {
                "cut": edge_drops(model, found, edges, images),
                "block": edge_drops(model, found, edges, images, share=(1.0, 1e-4)),
                "linear": edge_drops(model, found, edges, images, share=(1e-4, 1e-4)),
            }
            ordered = flow.abs().sort(descending=True).values.cumsum(0)
            strong = flow.abs().argsort(descending=True)[
                : int((ordered < 0.95 * ordered[-1]).sum()) + 1
            ]
            cut = falls["cut"]
            yield {
                "network": name, "size": row.get("size"), "task": task,
                "source_site": ends[0], "target_site": ends[1], "n_edges": len(edges),
                "before": row["spearman"], "before_edges": (n := row["n_edges"]),
                "those_edges": float(spearman(flow[:n], falls["cut"][:n])),
                **{key: float(spearman(flow, fall)) for key, fall in falls.items()},
                "pearson": float(torch.corrcoef(torch.stack([flow, cut]))[0, 1]),
                "linear_error": float((falls["linear"] - flow).abs().max() / flow.abs().max()),
                "strong_edges": len(strong), "strong": float(spearman(flow[strong], cut[strong])),
            }  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "conservation": conservation,
    "cost": cost,
    "agreement": agreements,
    "edges": edges,
    "edges_with_constants": edges_with_constants,
    "shape": shape,
    "lite0": lite0,
    "causes": causes,
}


def summary(part: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The numbers that the documentation names."""
    # Rows of an earlier run come from JSON, which has no NaN.
    rows = [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]
    by: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by.setdefault(row["network"], []).append(row)
    if part in ("agreement", "lite0"):
        return {
            f"{name}{'' if size is None else f', {size:g}'}": {
                "median_spearman": round(float(np.nanmedian(values)), 3),
                "lowest": round(float(np.nanmin(values)), 3),
                "links": len(values),
            }
            for name, own in by.items()
            for size in sorted({row.get("size") for row in own}, key=str)
            if (values := [row["spearman"] for row in own if row.get("size") == size])
        }
    if part.startswith("edges"):
        return {
            f"{rival} at {size:g}": _paired(rows, rival, size)
            for rival in ("random", "gradient", "flow")
            for size in sorted({row["size"] for row in rows})
        }
    if part == "shape":
        return {
            name: {
                "straight": round(float(np.nanmean([r["straight"] for r in shapes])), 3),
                "spread": round(float(np.mean([r["spread"] for r in shapes])), 3),
                "spread_null": round(float(np.mean([r["spread_null"] for r in shapes])), 3),
                "first_and_last_similarity": [
                    round(sharing[i]["similarity"] - sharing[i]["similarity_null"], 3)
                    for i in (0, -1)
                ],
                "reuse": round(float(np.mean([r["reuse"] for r in sharing])), 3),
                "reuse_null": round(float(np.mean([r["reuse_null"] for r in sharing])), 3),
                "parting_depth": next(r["depth"] for r in own if r["of"] == "parting"),
            }
            for name, own in by.items()
            if (shapes := [r for r in own if r["of"] == "shape"])
            and (sharing := [r for r in own if r["of"] == "sharing"])
        }
    if part == "causes":
        return {
            name: {
                key: [round(row.get(key, math.nan), 3) for row in own]
                for key in ("before", "those_edges", "cut", "block", "linear", "strong")
            }
            for name, own in by.items()
        }
    return {"worst_outflow_error": max(row["outflow_error"] for row in rows)}


def _paired(rows: list[dict[str, Any]], rival: str, size: float) -> dict[str, Any]:
    """Mean differences over networks and classes, with their bootstrap intervals."""
    found: dict[str, Any] = {}
    for measure in ("fidelity", "rank_fidelity"):

        def mean(by: str, pair: tuple[str, int], measure: str = measure) -> float:
            # An output that does not vary ranks nothing.
            values = [
                0.0 if math.isnan(r[measure]) else r[measure]
                for r in rows
                if (r["by"], r["network"], r["task"], r["size"]) == (by, *pair, size)
            ]
            return float(np.mean(values))

        pairs = sorted({(r["network"], r["task"]) for r in rows})
        own, other = (np.array([mean(by, p) for p in pairs]) for by in ("strength", rival))
        low, high = interval_of(bootstrap_means((own - other)[:, None], n_draws=2000, seed=0))
        found[measure] = {
            "strength": round(float(own.mean()), 3),
            rival: round(float(other.mean()), 3),
            "difference": round(float((own - other).mean()), 3),
            "interval": [round(float(np.squeeze(end)), 3) for end in (low, high)],
            "pairs": len(pairs),
        }
    return found


def main(argv: list[str] | None = None) -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--only", nargs="+", help="networks")
    parser.add_argument("--tasks", nargs="+", type=int, default=[3, 5])
    parser.add_argument("--images", type=int, default=32, help="of cost")
    parser.add_argument("--edges", type=int, default=40, help="of each link, of agreement")
    parser.add_argument("--photos", type=int, default=4, help="of lite0")
    parser.add_argument("--lowest", type=int, default=2, help="links of each network, of causes")
    parser.add_argument("--known", type=Path, default=RESULTS, help="agreements, for causes")
    parser.add_argument("--json", type=Path, default=RESULTS)
    add_shared_arguments(parser)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    for part in args.parts:
        rows = []
        for row in PARTS[part](args):
            rows.append(row)
            print(part, json.dumps(row), flush=True)
        # Read again: another part may have been written meanwhile.
        known = json.loads(args.json.read_text()) if args.json.is_file() else {}
        if args.only:
            made = {*args.only, *(r["network"] for r in rows)}
            others = known.get(part, {}).get("rows", [])
            rows = [r for r in others if r["network"] not in made] + rows
        known[part] = {"summary": summary(part, rows), "rows": rows}
        write_text(args.json, json.dumps(_rounded(known), indent=1) + "\n")
        print(json.dumps(known[part]["summary"], indent=1), flush=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


if __name__ == "__main__":
    main()
