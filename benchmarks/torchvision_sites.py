"""Finds the gate sites of every classification model of torchvision, and tries them out.

    python -m benchmarks.torchvision_sites                    # writes docs/torchvision_sites.md
    python -m benchmarks.torchvision_sites --check            # and tries every site
    python -m benchmarks.torchvision_sites --only swin_t vgg16 --check --output -

The sites are found on models without weights (on the meta device), at the models' usual resolution.
``--check`` gives every model random weights, and a small resolution where the architecture allows
one, and asks that

- all gates open leave the logits exactly as they are, and
- for each site, one closed channel changes the logits. Behind a ReLU a random channel may be dead
  on the one random image, and then closing it rightly changes nothing: channels are drawn, without
  replacement, until one changes the logits, up to ``MOST_DRAWS``; the table says how many draws
  the worst site took.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from benchmarks.darts import DARTSImageNet
from nad_attr.gating.hooks import gated
from nad_attr.sites.finding import find_gate_sites, paper_sites
from nad_attr.sites.site import GateSite

MOST_DRAWS = 20
BATCH = 16
PAPER = {"vgg16": 4224, "resnet50": 15168, "densenet121": 3776, "darts": 6624}

HEAD = """# Gate sites of torchvision's classification models

Written by `python -m benchmarks.torchvision_sites{arguments}`, torch {torch}, torchvision {vision}.

For each of the {n} models of `torchvision.models.list_models(module=torchvision.models)`: what
`find_gate_sites(model, images)` finds at the model's usual resolution. *Hidden vectors* are the
sites among them without positions, (batch, channels), that `vectors=False` leaves out; *channels
last* are those with `channel_dim=-1`.
"""

CHECKED = """
*Open* says whether the logits with all gates at 1 are equal to the network's own, bit for bit;
*closed* at how many sites closing one channel changes the logits (random weights, one
random image of the size given), and how many channels had to be drawn at the worst site, since a
channel may be dead on that image.
"""

PAPER_HEAD = """
## The paper's sites and the found ones

`paper_sites` lists what the paper's authors gated. Found are the same channels, for DenseNet behind
the BatchNorm and the ReLU that follow a dense block rather than before them (before a BatchNorm, a
channel set to zero comes back as a constant), for VGG16 also the two hidden layers of the
classifier (`vectors=False` leaves them out), and for DARTS also the first convolution of the stem.

| network | paper: sites | channels | found: sites | channels | found but not in the paper |
|---|--:|--:|--:|--:|---|
"""


def usual_size(name: str) -> int:
    """The resolution to find sites at."""
    return 299 if name == "inception_v3" else 224


def small_size(name: str) -> int:
    """A small resolution that the architecture allows."""
    if name == "vit_h_14":
        return 56
    if name == "maxvit_t":
        return 224  # its windows have to divide the feature maps
    if name == "inception_v3":
        return 96
    return 96 if name.startswith(("alexnet", "squeezenet")) else 64


def build(name: str, device: str, size: int | None = None) -> nn.Module:
    """A model without trained weights, in eval mode."""
    options: dict[str, object] = {}
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if name.startswith("vit_") and size is not None:
        options["image_size"] = size
    # RegNet computes its widths with tensors, which need values.
    with torch.device("cpu" if name.startswith("regnet") else device):
        model: nn.Module = torchvision.models.get_model(name, weights=None, **options)
    return model.eval().to(device)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Weights and images of a seed, without touching the global generator for good."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@torch.no_grad()
def check(
    model: nn.Module, image: Tensor, sites: list[GateSite], seed: int
) -> tuple[bool, list[int | None]]:
    """Tries out sites, several in one batch: each copy of the image has one site's channel closed.

    Sites at which nothing changes in float32, where a small change may be lost in rounding, are
    tried again in float64; the model is then left in float64.

    Args:
        model: The network, in float32.
        image: Image (1, 3, H, W).
        sites: Its sites.
        seed: Seed of the channels that are closed.

    Returns:
        Whether open gates leave the logits as they are, and for each site how many channels had to
        be drawn until closing one changed the logits, None if none did.
    """
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(site.n_channels, generator=generator).tolist() for site in sites]
    draws: list[int | None] = [None] * len(sites)
    unchanged = True
    for dtype, most in ((torch.float32, 2), (torch.float64, MOST_DRAWS)):
        left = [i for i, done in enumerate(draws) if done is None]
        if not left:
            break
        model.to(dtype)
        n = min(len(left), BATCH)
        images = image.to(dtype).expand(n, -1, -1, -1).contiguous()
        ones = {site.name: torch.ones(n, site.n_channels, dtype=dtype) for site in sites}
        logits = model(images)
        with gated(model, ones, sites=sites):
            unchanged &= torch.equal(model(images), logits)
        for draw in range(most):
            left = [i for i, done in enumerate(draws) if done is None and draw < len(orders[i])]
            for start in range(0, len(left), n):
                chunk = left[start : start + n]
                gates = {name: gate.clone() for name, gate in ones.items()}
                for position, i in enumerate(chunk):
                    gates[sites[i].name][position, orders[i][draw]] = 0
                with gated(model, gates, sites=sites):
                    changed = (model(images) != logits).any(dim=1)
                for position, i in enumerate(chunk):
                    if changed[position]:
                        draws[i] = draw + 1
    return unchanged, draws


def row(name: str, args: argparse.Namespace) -> tuple[str, bool]:
    """The line of a model in the table, and whether all is well."""
    size = usual_size(name)
    start = time.perf_counter()
    sites = find_gate_sites(build(name, "meta"), torch.zeros(1, 3, size, size, device="meta"))
    seconds = time.perf_counter() - start
    last = sum(site.channel_dim == -1 for site in sites)
    without = n_without_vectors(name, size)
    cells = [
        name,
        str(len(sites)),
        f"{sum(site.n_channels for site in sites):,}",
        str(len(sites) - without),
        str(last),
        f"`{sites[0].name}` ... `{sites[-1].name}`",
    ]
    well = True
    if args.check:
        small = small_size(name)
        with seeded(args.seed):
            model = build(name, "cpu", small)
            for parameter in model.parameters():
                # The heads of vision transformers start at zero, and all logits with them.
                if parameter.dim() > 1 and not parameter.any():
                    nn.init.normal_(parameter, std=0.02)
            images = torch.randn(1, 3, small, small)
        # Some sites depend on the size: a feature map of one position is none of the last choice.
        tried = find_gate_sites(model, images)
        unchanged, draws = check(model, images, tried, args.seed)
        done = [n for n in draws if n is not None]
        well = unchanged and len(done) == len(tried)
        worst = max(done, default=0)
        cells += [
            f"{small} px",
            "yes" if unchanged else "**no**",
            f"{len(done)} of {len(tried)}" + (f" (up to {worst} drawn)" if worst > 1 else ""),
        ]
        for site, n in zip(tried, draws, strict=True):
            if n is None:
                print(f"  {name}: no closed channel of {site.name} changes the output")
    print(f"{name}: {' | '.join(cells[1:])} [{seconds:.1f} s]", flush=True)
    return "| " + " | ".join(cells) + " |", well


def n_without_vectors(name: str, size: int) -> int:
    """How many sites there are without hidden vectors."""
    images = torch.zeros(1, 3, size, size, device="meta")
    return len(find_gate_sites(build(name, "meta"), images, vectors=False))


def paper_rows() -> list[str]:
    """The lines that compare the paper's sites with the found ones."""
    rows = []
    images = torch.zeros(1, 3, 224, 224, device="meta")
    for name, channels in PAPER.items():
        if name == "darts":
            with torch.device("meta"):
                model: nn.Module = DARTSImageNet().eval()
        else:
            model = build(name, "meta")
        listed = paper_sites(name)
        # Raises if the model has no such module or another number of channels.
        find_gate_sites(model, images, layers=listed)
        total = sum(site.n_channels for site in listed)
        assert total == channels, (name, total)
        found = find_gate_sites(model, images)
        names = {site.name for site in listed}
        new = ", ".join(f"`{site.name}`" for site in found if site.name not in names)
        n_found = sum(site.n_channels for site in found)
        rows.append(
            f"| {name} | {len(listed)} | {total:,} | {len(found)} | {n_found:,} | {new or '-'} |"
        )
    return rows


def main() -> int:
    """Writes the table; returns 1 if a check failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="close a channel at every site")
    parser.add_argument("--only", nargs="+", metavar="MODEL", help="these models only")
    parser.add_argument("--seed", type=int, default=0, help="of weights, image and channels")
    default = Path(__file__).resolve().parent.parent / "docs" / "torchvision_sites.md"
    parser.add_argument("--output", default=str(default), help="file to write, - for none")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torchvision")

    names = args.only or torchvision.models.list_models(module=torchvision.models)
    columns = ["model", "sites", "channels", "hidden vectors", "channels last", "first ... last"]
    columns += ["tried at", "open", "closed"] if args.check else []
    rules = ["---", "--:", "--:", "--:", "--:", "---", "--:", "---", "---"][: len(columns)]
    results = [row(name, args) for name in names]
    text = HEAD.format(
        arguments=" --check" if args.check else "",
        torch=torch.__version__.split("+")[0],
        vision=torchvision.__version__.split("+")[0],
        n=len(names),
    )
    text += CHECKED if args.check else ""
    text += f"\n| {' | '.join(columns)} |\n|{'|'.join(rules)}|\n"
    text += "\n".join(line for line, _ in results) + "\n"
    text += PAPER_HEAD + "\n".join(paper_rows()) + "\n"
    if args.output != "-":
        Path(args.output).write_text(text, encoding="utf-8")
    failed = [name for name, (_, well) in zip(names, results, strict=True) if not well]
    print(f"{len(names)} models, {len(failed)} with a failed check {failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
