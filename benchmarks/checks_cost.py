"""What do the checks of the network cost, in passes of images, beside a default run on ResNet50?

Counts the images of every forward and every backward pass of ``learn_gates`` with the default
recipe, for one class (the more classes, the smaller the share of the checks), with the checks and
without. Passes depend on neither weights nor pixels, so weights are random and images small.

    python -m benchmarks.checks_cost --out benchmarks/results/checks_cost.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from nad_attr import Recipe, learn_gates
from nad_attr.system.files import write_text


def passes(checks: Any, side: int, steps: int) -> dict[str, int]:
    """Images that went forward and backward through the first layer's output."""
    torch.manual_seed(0)
    net = torchvision.models.resnet50(weights=None).eval()
    counted = {"forward": 0, "backward": 0}

    def forward(module: object, args: object, output: Tensor) -> None:
        counted["forward"] += len(output)

    def last(module: object, args: object, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(backward)

    def backward(gradient: Tensor) -> None:
        counted["backward"] += len(gradient)

    handles = [net.conv1.register_forward_hook(forward), net.fc.register_forward_hook(last)]
    images, labels = torch.randn(80, 3, side, side), torch.arange(80) % 2
    recipe = Recipe(steps=steps) if steps else Recipe()
    learn_gates(net, (images, labels), [0], recipe, checks=checks)
    for handle in handles:
        handle.remove()
    return counted


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=32, help="Pixels.")
    parser.add_argument("--steps", type=int, default=0, help="0: as the default recipe says.")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    with_checks, without = (passes(c, given.side, given.steps) for c in ("refuse", "off"))
    checks = {kind: with_checks[kind] - without[kind] for kind in without}
    result = {
        "command": "python -m benchmarks.checks_cost",
        "recipe": repr(Recipe()),
        "run": without,
        "checks": checks,
        "share": sum(checks.values()) / sum(without.values()),
    }
    print(json.dumps(result, indent=1))
    if given.out is not None:
        write_text(given.out, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
