"""Does memory grow with the number of images?

    python -m benchmarks.streaming_memory --json benchmarks/results/streaming_memory.json

For each number a folder of noise pictures is made, and a fresh process learns the gates of two
classes from it and evaluates them on all of it, through :class:`nad_attr.datasets.ImageFolderData`
and a DataLoader. Printed is the highest resident memory of that process, and how much of it came
after everything was imported.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PIXELS = 96


def make_pictures(folder: Path, n: int) -> None:
    """``n`` JPEG files in two class folders."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(n):
        path = folder / f"class_{i % 2}" / f"{i:06d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(256, size=(PIXELS // 8, PIXELS // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((PIXELS, PIXELS)).save(path)


def _peak() -> float:
    """MB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path, workers: int) -> dict[str, Any]:
    """Learn and evaluate in this process."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision import transforms

    from nad_attr import Recipe, learn_gates
    from nad_attr.data.images import ImageFolderData
    from nad_attr.evaluation import evaluate

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2)
    ).eval()
    model(torch.zeros(1, 3, PIXELS, PIXELS))
    data = ImageFolderData(folder, transform=transforms.ToTensor())
    loader = DataLoader(data, batch_size=64, num_workers=workers)
    before = _peak()
    gates = learn_gates(model, loader, recipe=Recipe(size=0.5, steps=20))
    learned = _peak()
    evaluate(model, gates, loader, n_random=1)
    return {
        "n_images": len(data),
        "peak_mb": round(_peak(), 1),
        "learning_mb": round(learned - before, 1),
        "evaluation_mb": round(_peak() - learned, 1),
    }


def main(argv: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, nargs="+", default=[500, 5000, 20000])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        print(json.dumps(measure(args.child, args.workers)))
        return
    rows = []
    for n in args.images:
        with tempfile.TemporaryDirectory() as name:
            make_pictures(Path(name), n)
            command = [sys.executable, "-m", "benchmarks.streaming_memory", "--child", name]
            done = subprocess.run(
                [*command, "--workers", str(args.workers)],
                check=True,
                capture_output=True,
                text=True,
            )
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(
            "{n_images:>7,} images: peak {peak_mb:,.0f} MB, of which learning {learning_mb:.0f}, "
            "evaluation {evaluation_mb:.0f}".format(**rows[-1]),
            flush=True,
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
