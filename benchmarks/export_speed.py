"""How much smaller and faster is a network of one class? Speed against size, on this machine.

Random weights and random channels, the same share at each site (what is measured depends on how
many are kept, not on which), closed at constants, so that border corrections are paid for. Whole
and smaller networks run in turns in one process, on one thread.

    python -m benchmarks.export_speed
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.export_exactness import constants_of, network
from nad_attr import find_gate_sites
from nad_attr.export.costs import latency, summary
from nad_attr.gates.sub_architecture import SubArchitecture

RESULTS = Path(__file__).parent / "results" / "export_speed.json"
NETWORKS = ("resnet18", "mobilenet_v2", "vgg11_bn", "vit_b_32", "densenet121")


def measured(name: str, sizes: list[float], pixels: int, device: str, seconds: float) -> Any:
    """Rows of one network, one for each size."""
    model, _ = network(name, 0, pixels)
    model = model.float().to(device)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3, pixels, pixels, generator=generator).to(device)
    sites = find_gate_sites(model, x)
    values = constants_of(model, torch.cat([x, -x]), sites, 0)
    archs, modules = {}, dict[str, nn.Module](whole=model)
    for size in sizes:
        masks = {}
        for site in sites:
            masks[site.name] = torch.zeros(site.n_channels, dtype=torch.bool)
            n = max(1, round(size * site.n_channels))
            masks[site.name][torch.randperm(site.n_channels, generator=generator)[:n]] = True
        for closed in ("zero", "mean"):
            archs[size, closed] = SubArchitecture(masks, sites, means=values[closed])
            for merged in (False, True):
                modules[f"{size}, {closed}{', merged' * merged}"] = archs[size, closed].export(
                    model, x, merge_bn=merged
                )
    one = latency(modules, x, seconds=seconds)
    many = latency(modules, x.expand(16, -1, -1, -1).contiguous(), seconds=seconds)
    rows = {"whole": {"one image, ms": 1e3 * one["whole"], "16 images, ms": 1e3 * many["whole"]}}
    for key, module in modules.items():
        if key != "whole":
            made = summary(module)
            rows[key] = {
                "parameters": made.smaller.parameters / made.whole.parameters,
                "multiply_adds": made.smaller.multiply_adds / made.whole.multiply_adds,
                "times as fast, one image": one["whole"] / one[key],
                "times as fast, 16 images": many["whole"] / many[key],
            }
    made = summary(modules[f"{sizes[0]}, zero"])
    rows["whole"] |= {
        "parameters": made.whole.parameters,
        "multiply_adds": made.whole.multiply_adds,
    }
    return rows


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="MODEL", default=NETWORKS)
    parser.add_argument("--sizes", nargs="+", type=float, default=[0.6, 0.4, 0.2, 0.1])
    parser.add_argument("--pixels", type=int, default=224)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each kind of batch")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    for name in args.only:
        key = name if args.device == "cpu" else f"{name}, {args.device}"
        found[key] = measured(name, args.sizes, args.pixels, args.device, args.seconds)
        found["machine"] = f"{platform.machine()}, one thread, torch {torch.__version__}"
        print(key, json.dumps(found[key], indent=1), flush=True)
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
