"""All methods on all networks: who keeps a task's evidence with few channels?

    python -m benchmarks.disentanglement --quick             # one network, 5 minutes on 2 cores
    python -m benchmarks.disentanglement                     # everything that is not done yet
    python -m benchmarks.disentanglement --data imagenet:/path/to/imagenet    # the paper's networks

Networks of the paper's four kinds on objects, scenes and clothes (``benchmarks.networks``,
``benchmarks.image_data``). For each network x data set, seed, ablation value and size, gates and
scores come from training images; each rival is at its best (own, or own and other images; signed
or absolute; per site or over all: chosen on images kept apart, from seed 0); all are cut to exactly
the same number of channels and measured on held-out images that neither saw.

    python -m benchmarks.disentanglement --constants best --sizes 0.4 0.2 0.1

With ``--constants best`` every method's channels get constants of their own (``fit_constants``, as
many images as ``--passes``), and rivals of today take part. The default recipe learns constants
along with gates from ``--passes`` gated images for each task and size; a rival is given as many to
score or search with, and as many again for its constants. Searched rivals and paths use own and
other images. Rows have ablation "best", and the paired differences to the default recipe.
``--pairs lite0/superclasses lite2/superclasses`` are two large networks with super-classes of
ImageNet as tasks (``benchmarks.lite0_data``).

Finished cells are appended to ``benchmarks/results/disentanglement/NETWORK_SET.jsonl`` and skipped
the next time, so a run may be stopped at any moment. ``python -m benchmarks.findings`` makes the
tables, figures and the documentation's page of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import nad_attr.learning.paper
import nad_attr.learning.selection
from benchmarks.cifar import REPOSITORY, SharedMissingError, add_shared_arguments, default_cache
from benchmarks.image_data import ImageData, load_images, per_class
from benchmarks.networks import DIGITS, PAIRS, REAL, load_network
from nad_attr import (
    GateSite,
    Recipe,
    RunOptions,
    SubArchitecture,
    Task,
    TaskGates,
    find_gate_sites,
    fit_constants,
    learn_gates,
    learn_sizes,
)
from nad_attr.evaluation import SCORERS, ChannelScorer, RandomScorer, best_variants, top_k
from nad_attr.evaluation.sweeps.grid import measure_grid
from nad_attr.stats.bootstrap import bootstrap_interval
from nad_attr.stats.tables import nan_mean

RESULTS = REPOSITORY / "benchmarks" / "results" / "disentanglement"
SIZES = (0.8, 0.4, 0.2, 0.1, 0.05)
#: Kept for each task; of the others the mean over tasks.
PER_TASK = ("own_auc", "disentanglement", "fidelity")
MEANS = ("other_auc", "rank_fidelity", "recall", "fpr", "ba", "other_accuracy")
#: Scores of these need several passes for each image, so they get fewer images.
COSTLY: dict[str, dict[str, Any]] = {
    "layer_integrated_gradients": {"n_steps": 4},
    "layer_conductance": {"n_steps": 4},
    "internal_influence": {"n_steps": 4},
    "cdrp": {},
    "lrp": {},
    "layer_deep_lift": {},
}
#: Options of the rivals that are given ``--passes``: those that learn a mask for each size, one
#: whose order of closing serves all, and those whose score does.
SEARCHED = ("hard_concrete", "ugs", "iterative", "coar")
FOR_EACH_SIZE = ("hard_concrete", "ugs")
PATH: dict[str, dict[str, Any]] = {"eap_ig": {"path": "gates", "steps": 5}, "relp": {}}
#: Networks in which a BatchNorm does not follow the convolution listed before it: RelP's rules
#: cannot merge the two, and take the gradient of the BatchNorm, which is its 0-rule.
UNMERGED = ("densenet", "darts")
TODAY = ("nad", "random", "neuron_mct", "centred_effect", *SEARCHED, *PATH)
#: Of these, scores over own images alone: several passes for each site, image and task.
OWN_ONLY = (
    "layer_integrated_gradients",
    "layer_conductance",
    "internal_influence",
    "layer_deep_lift",
)
#: Magnitude tells channels apart by their numbers, and LRP checks that merging BatchNorms changes
#: no output: both are too fine for bfloat16.
FLOAT32 = ("magnitude", "lrp")
#: The same numbers as gradient x activation (a test holds them to it).
SAME = {"layer_gradient_x_activation": "gradient_x_activation"}
RIVALS = tuple(name for name in SCORERS if name not in ("random", *SAME))
METHODS = ("nad", "random", "other_task", "nad_paper", *RIVALS)


class Cell:
    """One network x data set with one seed."""

    def __init__(
        self, args: argparse.Namespace, pair: str, data: ImageData, model: nn.Module, seed: int
    ) -> None:
        self.args, self.pair, self.seed = args, pair, seed
        self.data = data
        self.model = model.to(memory_format=torch.channels_last)
        self.sites: list[GateSite] = find_gate_sites(model, data.train[0][:1])
        self.numbers = args.tasks or list(range(len(data.tasks or data.classes)))
        self.tasks: list[Task] = [data.tasks[i] if data.tasks else i for i in self.numbers]
        self.held_out = per_class(data.held_out, args.val_per_class, seed)
        self.choice = per_class(data.held_out, args.choice_per_class, 999)
        self.options = RunOptions(batch_size=args.batch)
        self._means: dict[str, Tensor] | None = None
        self._scorers: dict[str, ChannelScorer] = {}
        self._nad: dict[str, dict[float, TaskGates]] = {}

    def autocast(self, x: Tensor) -> Tensor:
        """Outputs computed in bfloat16, as for learning."""
        with torch.autocast("cpu", torch.bfloat16):
            outputs: Tensor = self.model(x)
        return outputs.float()

    def nad(self, ablation: str) -> dict[float, TaskGates]:
        """The default recipe at all sizes, from the cache where it is there."""
        if ablation not in self._nad:
            recipe = Recipe(ablation=ablation, steps=self.args.steps * len(self.args.sizes))
            run = "-".join(f"{size:g}" for size in self.args.sizes)  # one run goes through them all
            paths = {
                size: self._kept_gates(
                    recipe, nad_attr.learning.selection, f"{ablation}_{size:g}_of_{run}"
                )
                for size in self.args.sizes
            }
            if all(path.is_file() for path in paths.values()):
                self._nad[ablation] = {size: TaskGates.load(p) for size, p in paths.items()}
            else:
                found = learn_sizes(
                    self.model, self.args.sizes, self.data.train, self.tasks, recipe, self.sites,
                    seed=self.seed, amp=True, run=self.options,
                )  # fmt: skip
                for size, gates in found.items():
                    gates.save(paths[size])
                self._nad[ablation] = found
        return self._nad[ablation]

    def means(self, ablation: str) -> dict[str, Tensor] | None:
        """What closed channels of a rival are replaced by: as for the gates."""
        if ablation == "zero":
            return None
        if self._means is None:
            recipe = Recipe(ablation="mean", steps=1)
            gates = learn_gates(
                self.model,
                self.data.train,
                self.tasks[:1],
                recipe,
                self.sites,
                seed=self.seed,
                run=self.options,
            )
            self._means = gates.means
        return self._means

    def architectures(
        self, method: str, ablation: str, variants: dict[str, str]
    ) -> Iterator[tuple[float, list[SubArchitecture], str]]:
        """(size, sub-architectures of all tasks, which variant) of a method."""
        if ablation == "best":
            yield from self._with_constants(method)
            return
        means, sizes = self.means(ablation), self.args.sizes
        if method in ("nad", "other_task"):
            for size, gates in self.nad(ablation).items():
                archs = gates.sub_architectures()
                if method == "other_task":
                    archs = [
                        SubArchitecture(
                            archs[(i + 1) % len(archs)].masks,
                            self.sites,
                            task=arch.task,
                            means=arch.means,
                        )
                        for i, arch in enumerate(archs)
                    ]
                yield size, archs, ""
        elif method == "random":
            scores = RandomScorer(self.model, self.sites, seed=self.seed)(
                *self.choice, tasks=self.tasks
            )
            for size in sizes:
                yield size, top_k(scores, self.sites, self.tasks, size, means=means), ""
        elif method == "nad_paper":
            gates = self._paper()
            for size in sizes:
                archs = gates.sub_architectures(size)
                yield size, [arch.with_means(means) for arch in archs], "beta 0.02"
        else:
            yield from self._rival(method, ablation, variants)

    def _with_constants(self, method: str) -> Iterator[tuple[float, list[SubArchitecture], str]]:
        """A method's channels with constants of their own, at each size."""
        sizes, passes = self.args.sizes, self.args.passes
        recipe = Recipe(ablation="optimal")
        recipe = replace(recipe, steps=max(1, passes // recipe.images_per_step))
        if method == "nad":
            found = learn_sizes(
                self.model, sizes, self.data.train, self.tasks,
                replace(recipe, steps=recipe.steps * len(sizes)), self.sites, seed=self.seed,
                amp=True, run=self.options,
            )  # fmt: skip
            for size, gates in found.items():
                yield size, gates.sub_architectures(), ""
            return
        scores: dict[str, Tensor] = {}
        for size in sizes:
            if not scores or method in FOR_EACH_SIZE:
                scores = self._scores_today(method, size)
            archs = top_k(scores, self.sites, self.tasks, size)
            fitted = fit_constants(
                self.model, archs, self.data.train, recipe=recipe, seed=self.seed,
                run=replace(self.options, amp=True),
            )  # fmt: skip
            yield size, fitted, ""

    def _scores_today(self, method: str, size: float) -> dict[str, Tensor]:
        """Scores from as many gated images for each task as the default recipe has."""
        passes = self.args.passes * (1 if method in FOR_EACH_SIZE else len(self.args.sizes))
        options: dict[str, Any] = dict(PATH.get(method, {}))
        images = self.data.train
        if self.data.tasks:  # photos are few; the default recipe sees them mirrored as well
            images = torch.cat([images[0], images[0].flip(3)]), images[1].repeat(2)
        if method in SEARCHED:
            options |= {"passes": passes, "seed": self.seed, "means": self.means("mean")}
            images = per_class(images, min(200, passes // 2), self.seed)
            if method in FOR_EACH_SIZE:
                options["size"] = size
                if self.args.learning_rate is not None:
                    options["learning_rate"] = self.args.learning_rate
            elif method == "iterative":
                options["size"] = min(self.args.sizes)
        elif method == "random":
            return RandomScorer(self.model, self.sites, seed=self.seed)(
                *self.choice, tasks=self.tasks
            )
        else:
            each = passes // len(self.data.classes) // options.get("steps", 1)
            images = per_class(images, max(1, each), self.seed)
        if method == "relp" and self.pair.partition("/")[0] in UNMERGED:
            options["canonizers"] = []
        # Its rules merge BatchNorms, which bfloat16 is too coarse for.
        run = self.options if method == "relp" else replace(self.options, amp=True)
        scorer = SCORERS[method](self.model, self.sites, **options)
        return scorer(*images, tasks=self.tasks, include_others=True, run=run)

    def _paper(self) -> TaskGates:
        recipe = Recipe.paper(beta=0.02, epochs=self.args.paper_epochs)
        path = self._kept_gates(recipe, nad_attr.learning.paper, f"{self.args.paper_images}_paper")
        if path.is_file():
            return TaskGates.load(path)
        images = per_class(self.data.train, self.args.paper_images, self.seed)
        gates = learn_gates(
            self.model, images, self.tasks, recipe, self.sites, seed=self.seed, amp=True,
            run=self.options,
        )  # fmt: skip
        gates.save(path)
        return gates

    def _kept_gates(self, recipe: Recipe, code: ModuleType, rest: str) -> Path:
        """Where gates are kept between runs: elsewhere for another recipe, or other code of it."""
        folder: Path = (self.args.cache or default_cache()) / "gates"
        folder.mkdir(parents=True, exist_ok=True)
        source = Path(str(code.__file__)).read_bytes()
        key = hashlib.sha256(recipe.to_json().encode() + source).hexdigest()[:8]
        return folder / f"{self.pair.replace('/', '_')}_{self.seed}_{key}_{rest}.h5"

    def _scorer(self, method: str) -> ChannelScorer:
        """A rival that scores the same images once for all ablation values."""
        if method not in self._scorers:
            scorer = SCORERS[method](self.model, self.sites, **COSTLY.get(method, {}))
            known: dict[Any, Any] = {}
            score = scorer.variants

            def variants(inputs: Any, targets: Any, **options: Any) -> Any:
                key = (options.get("include_others"), options.get("signed"))
                text = repr(key)
                if text not in known:
                    known[text] = score(inputs, targets, **options)
                return known[text]

            scorer.variants = variants  # type: ignore[method-assign]
            self._scorers[method] = scorer
        return self._scorers[method]

    def _rival(
        self, method: str, ablation: str, variants: dict[str, str]
    ) -> Iterator[tuple[float, list[SubArchitecture], str]]:
        scorer = self._scorer(method)
        n = self.args.costly_images if method in COSTLY else self.args.score_images
        images = per_class(self.data.train, n, self.seed)
        means = self.means(ablation)
        run = self.options
        if method not in FLOAT32:
            run = replace(run, forward_func=self.autocast)
        known = variants.get(f"{method}/{ablation}")
        if known is None:  # the first seed chooses
            found = best_variants(
                scorer, images, self.choice, self.tasks, sizes=self.args.choice_sizes,
                means=means, run=run,
            )  # fmt: skip
            keys = {size: (v.include_others, v.signed, v.per_site) for size, v in found.items()}
            scores = {(v.include_others, v.signed): v.scores for v in found.values()}
        else:
            keys = {
                float(size): tuple(letter == "1" for letter in code)  # type: ignore[misc]
                for size, _, code in (part.partition("=") for part in known.split())
            }
            wanted = sorted({key[:2] for key in keys.values()})
            scores = {}
            for others, signed in wanted:
                scores |= scorer.variants(
                    *images, tasks=self.tasks, include_others=(others,), signed=(signed,), run=run
                )
        code = " ".join(
            f"{size:g}={''.join(str(int(flag)) for flag in key)}" for size, key in keys.items()
        )
        variants[f"{method}/{ablation}"] = code
        for size in self.args.sizes:
            nearest = min(keys, key=lambda s: abs(np.log(s / size)))
            others, signed, per_site = keys[nearest]
            archs = top_k(
                scores[others, signed], self.sites, self.tasks, size, means=means,
                per_site=per_site,
            )  # fmt: skip
            yield size, archs, code

    def rows(
        self, done: set[tuple[Any, ...]], variants: dict[str, str]
    ) -> Iterator[dict[str, Any]]:
        """The rows of all methods and ablation values that are not done."""
        best = self.args.constants == "best"
        for ablation in ("best",) if best else self.args.ablations:
            for method in self.args.methods or (TODAY if best else METHODS):
                if (self.seed, ablation, method) in done:
                    continue
                start = time.process_time()
                common: dict[str, Any] = {"seed": self.seed, "ablation": ablation, "method": method}
                if best:
                    common |= {"tasks": self.numbers, "passes": self.args.passes}
                try:
                    found = list(self.architectures(method, ablation, variants))
                except (ValueError, TypeError, RuntimeError, AssertionError) as error:
                    # A rival that cannot be run on this network is a finding, too.
                    yield {**common, "error": f"{type(error).__name__}: {str(error)[:200]}"}
                    continue
                learned = time.process_time()
                grid = measure_grid(
                    self.model, [archs for _, archs, _ in found], self.held_out,
                    run=replace(self.options, amp=True),
                )  # fmt: skip
                seconds = [round(learned - start, 1), round(time.process_time() - learned, 1)]
                whole = {name: round(float(np.nanmean(grid.whole[name])), 4) for name in PER_TASK}
                yield {
                    **common,
                    "variant": found[0][2],
                    "cpu_seconds": seconds,
                    "n_images": grid.n_images,
                    "whole": whole,
                    "sizes": {
                        f"{size:g}": {
                            **{m: _rounded(grid.values[m][i]) for m in PER_TASK},
                            **{m: round(float(np.nanmean(grid.values[m][i])), 4) for m in MEANS},
                        }
                        for i, (size, _, _) in enumerate(found)
                    },
                }


def _rounded(values: Any) -> list[float | None]:
    return [None if np.isnan(v) else round(float(v), 4) for v in values]


def results_file(folder: Path, pair: str) -> Path:
    """The rows of a network x data set."""
    return folder / f"{pair.replace('/', '_')}.jsonl"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The finished rows of a file; none if there is no such file."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def run_pair(
    args: argparse.Namespace, pair: str, data: ImageData, model: nn.Module, seed: int
) -> None:
    """Append what is missing for one network x data set and seed."""
    path = results_file(args.results, pair)
    rows = read_rows(path)
    done = {(row["seed"], row["ablation"], row["method"]) for row in rows}
    variants = {f"{r['method']}/{r['ablation']}": r["variant"] for r in rows if r.get("variant")}
    cell = Cell(args, pair, data, model, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    for row in cell.rows(done, variants):
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        text = row.get("error") or " ".join(
            f"{size}: {np.nanmean([v for v in m['own_auc'] if v is not None]):.3f}/"
            f"{np.nanmean([v for v in m['fidelity'] if v is not None]):.2f}"
            for size, m in row["sizes"].items()
        )
        print(
            f"{pair} seed {seed} {row['ablation']:4} {row['method']:27} {text} "
            f"{row.get('cpu_seconds', '')}",
            file=sys.stderr,
            flush=True,
        )


def print_paired(pair: str, rows: list[dict[str, Any]]) -> None:
    """Own AUC and fidelity with best constants, and the default recipe's lead over each rival.

    The interval is a bootstrap over tasks of the paired difference, each the mean over seeds.
    """
    rows = [row for row in rows if row["ablation"] == "best" and "sizes" in row]
    for size in dict.fromkeys(size for row in rows for size in row["sizes"]):
        print(f"\n{pair}, {size}: own AUC, fidelity; lead of nad (95 %)")
        found = {
            method: {
                row["seed"]: row["sizes"][size]
                for row in rows
                if row["method"] == method and size in row["sizes"]
            }
            for method in dict.fromkeys(row["method"] for row in rows if size in row["sizes"])
        }
        nad = found.get("nad", {})
        for method, cells in found.items():
            text = f"{method:15}"
            for m in ("own_auc", "fidelity"):
                values = np.array([cell[m] for cell in cells.values()], dtype=float)
                text += f"  {np.nanmean(values):6.3f}"
                both = [seed for seed in cells if seed in nad]
                if method != "nad" and both:
                    lead = np.array([nad[s][m] for s in both], dtype=float) - np.array(
                        [cells[s][m] for s in both], dtype=float
                    )
                    low, high = bootstrap_interval(lead)
                    text += f" {nan_mean(nan_mean(lead)):+.3f} ({low:+.3f} to {high:+.3f})"
            print(text)


def imagefolder_data(
    spec: str, args: argparse.Namespace
) -> Iterator[tuple[str, ImageData, nn.Module]]:
    """The paper's networks with torchvision's weights on the user's ImageNet or Places365.

    ``spec`` is "imagenet:PATH" or "places365:PATH"; PATH holds ``train/CLASS/*`` and
    ``val/CLASS/*``. ImageNet networks are torchvision's; for Places365 give a state dict of a
    torchvision network with 365 outputs as ``--weights vgg16=FILE``.
    """
    from PIL import Image
    from torchvision import models, transforms

    name, _, root = spec.partition(":")
    if name not in ("imagenet", "places365") or not root:
        raise SystemExit(f"--data must be imagenet:PATH or places365:PATH, not {spec!r}.")
    folder = Path(root)
    classes = sorted(p.name for p in (folder / "train").iterdir() if p.is_dir())
    chosen = classes[:: max(1, len(classes) // args.classes)][: args.classes]
    transform = transforms.Compose(
        [
            transforms.Resize(256),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )

    def read(split: str, n: int) -> tuple[Tensor, Tensor]:
        images, labels = [], []
        for k, wnid in enumerate(chosen):
            for path in sorted((folder / split / wnid).iterdir())[:n]:
                with Image.open(path) as image:
                    images.append(transform(image.convert("RGB")))
                labels.append(k)
        return torch.stack(images), torch.tensor(labels)

    data = ImageData(name, tuple(chosen), read("train", args.train_per_class), read("val", 50))
    index = torch.tensor([classes.index(wnid) for wnid in chosen])
    weights = dict(part.split("=", 1) for part in args.weights)
    for network in ("vgg16", "resnet50", "densenet121"):
        build: Callable[..., nn.Module] = getattr(models, network)
        if name == "imagenet" and network not in weights:
            model = build(weights="DEFAULT")
        elif network in weights:
            model = build(num_classes=len(classes))
            state = torch.load(weights[network], map_location="cpu", weights_only=True)
            model.load_state_dict(state)
        else:
            print(f"{network}: skipped, no --weights {network}=FILE", file=sys.stderr)
            continue
        yield f"{network}/{name}", data, Chosen(model, index).eval()


class Chosen(nn.Module):
    """A network of which only some classes' outputs are looked at."""

    def __init__(self, network: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("classes", classes)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, len(classes))."""
        return self.network(x)[:, self.classes]


def parser() -> argparse.ArgumentParser:
    """The options."""
    result = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    result.add_argument("--pairs", nargs="+", choices=(*PAIRS, *REAL, DIGITS), default=list(PAIRS))
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    result.add_argument("--sizes", type=float, nargs="+", default=list(SIZES))
    result.add_argument(
        "--ablations", nargs="+", choices=("mean", "zero"), default=["mean", "zero"]
    )
    result.add_argument("--methods", nargs="+", choices=METHODS, help="all by itself")
    result.add_argument(
        "--constants", choices=("ablation", "best"), default="ablation",
        help="best: constants of each method's own, fitted alike",
    )  # fmt: skip
    result.add_argument(
        "--passes", type=int, default=2000, help="with best constants: gated images a task and size"
    )
    result.add_argument(
        "--learning-rate", type=float, help="of hard-concrete masks and UGS; theirs by itself"
    )
    result.add_argument("--tasks", type=int, nargs="+", help="classes or groups; all by itself")
    result.add_argument("--steps", type=int, default=25, help="of the default recipe, per size")
    result.add_argument("--val-per-class", type=int, default=12)
    result.add_argument("--choice-per-class", type=int, default=4)
    result.add_argument("--choice-sizes", type=float, nargs="+", default=[0.4, 0.1])
    result.add_argument("--score-images", type=int, default=30, help="per class")
    result.add_argument("--costly-images", type=int, default=8, help="per class")
    result.add_argument("--paper-images", type=int, default=100, help="per class")
    result.add_argument("--paper-epochs", type=int, default=16)
    result.add_argument("--batch", type=int, default=200, help="images in one pass")
    result.add_argument("--results", type=Path, default=RESULTS)
    result.add_argument("--quick", action="store_true", help="one small network, few methods")
    result.add_argument(
        "--data", nargs="*", default=[], metavar="NAME:PATH",
        help="imagenet:PATH or places365:PATH in place of the small sets",
    )  # fmt: skip
    result.add_argument("--weights", nargs="*", default=[], metavar="NETWORK=FILE")
    result.add_argument(
        "--classes", type=int, default=20, help="with --data: classes, evenly spaced"
    )
    result.add_argument("--train-per-class", type=int, default=100, help="with --data")
    add_shared_arguments(result)
    return result


def quick(args: argparse.Namespace) -> None:
    """Settings that finish in five minutes on two cores."""
    args.pairs, args.seeds, args.ablations = ["resnet14/scene15"], [0], ["mean"]
    args.sizes, args.choice_sizes, args.steps = [0.4, 0.1], [0.4], 20
    args.methods = ["nad", "random", "taylor", "neuron_mct", "centred_effect"]
    args.val_per_class, args.score_images = 10, 15
    if args.results == RESULTS:
        args.results = Path("disentanglement_quick")
    args.cache = args.cache or default_cache() / "quick"


def main(argv: list[str] | None = None) -> None:
    """Runs what is missing."""
    args = parser().parse_args(argv)
    if args.quick:
        quick(args)
    # A dead rival at 5 % has nothing to divide by; its measures say so.
    warnings.filterwarnings("ignore", message="Mean of empty slice")
    if args.data:
        for spec in args.data:
            for pair, data, model in imagefolder_data(spec, args):
                for seed in args.seeds:
                    run_pair(args, pair, data, model, seed)
        return
    known: dict[str, ImageData] = {}
    models: dict[str, nn.Module] = {}
    skipped: set[str] = set()
    for seed in args.seeds:
        for pair in args.pairs:
            if pair in skipped:
                continue
            name = pair.partition("/")[2]
            try:
                if name not in known:
                    known[name] = load_images(name, args.shared, cache=args.cache)
                if pair not in models:
                    models[pair] = load_network(pair, known[name], args.shared, cache=args.cache)
            except SharedMissingError as missing:
                print(f"{pair}: skipped: {missing}", file=sys.stderr)
                skipped.add(pair)
                continue
            run_pair(args, pair, known[name], models[pair], seed)
    if args.constants == "best":
        for pair in args.pairs:
            print_paired(pair, read_rows(results_file(args.results, pair)))
    print(f"results in {args.results}")


if __name__ == "__main__":
    main()
