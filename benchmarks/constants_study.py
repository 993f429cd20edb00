"""Gates and constants learned together: what was tried, and rivals with best constants.

    python -m benchmarks.constants_study "SETTINGS"     # Python: s = Setting(...); s.run(...)
    python -m benchmarks.constants_study "agreements()" # one run and eight replicas, every network

Rows go to benchmarks/results/constants_study.jsonl: own AUC and fidelity (held out), squared change
over variance on the fresh images of the last ten steps, kappa between the first two seeds, CPU
seconds.
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import time
from collections.abc import Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import nad_attr.learning.constants
import nad_attr.learning.selection
from benchmarks import lite0_data
from benchmarks.cifar import REPOSITORY
from benchmarks.image_data import load_images, per_class
from benchmarks.networks import DIGITS, PAIRS, load_network
from nad_attr import Recipe, RunOptions, SubArchitecture, TaskGates, find_gate_sites
from nad_attr.data.labels import own_images
from nad_attr.evaluation import NeuronMCTScorer, evaluate, top_k
from nad_attr.gates.channels import kappa
from nad_attr.learning.session import Session

SHARED = REPOSITORY.parent / "shared"
if not SHARED.is_dir():  # from a work tree beside the repository
    SHARED = REPOSITORY.parent.parent / "shared"
OUT = REPOSITORY / "benchmarks" / "results" / "constants_study.jsonl"


def digits() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A network of 224 channels at four sites, 1,000 digits to learn from, and the other 797."""
    data = load_images("digits", SHARED)
    return load_network(DIGITS, data, SHARED), data.train, data.held_out


class Setting:
    """A network, images to learn from, images to judge by, tasks."""

    def __init__(self, pair: str, tasks: Any = None, n_held_out: int = 60) -> None:
        self.pair, self.tasks, self.names = pair, tasks, tasks
        if pair == "lite0":
            self.model, self.train, self.held_out, every = lite0_data.load(SHARED)
            names = list(lite0_data.GROUPS)
            numbers = range(len(names)) if tasks is None else tasks
            self.tasks = [every[i] for i in numbers]
            self.names = [names[i] for i in numbers]
        elif pair == "digits":
            self.model, self.train, self.held_out = digits()
        else:
            data = load_images(pair.partition("/")[2], SHARED)
            self.model = load_network(pair, data, SHARED)
            self.train, self.held_out = data.train, per_class(data.held_out, n_held_out, 0)
        self.sites = find_gate_sites(self.model, self.train[0][:2])

    def fewer(self, n: int) -> Setting:
        """At most ``n`` images of each task to learn from, and the same images of no task."""
        x, y = self.train
        keep = torch.ones(len(y), dtype=torch.bool)
        for own in own_images(y, self.tasks):
            at = own.nonzero()[:, 0]
            order = torch.randperm(len(at), generator=torch.Generator().manual_seed(0))
            keep[at[order[n:]]] = False
        result = copy.copy(self)
        result.train = x[keep], y[keep]
        return result

    def session(self, recipe: Recipe, seed: int, batch: int = 80) -> Session:
        """Ready to learn, in bfloat16."""
        return Session(
            self.model, self.train, self.tasks, recipe, self.sites, seed=seed,
            run=RunOptions(batch_size=batch, amp=True),
        )  # fmt: skip

    def measure(self, archs: TaskGates | Sequence[SubArchitecture], data: Any = None) -> Any:
        """Own AUC and fidelity of each task, held out or on other data."""
        data = self.held_out if data is None else data
        result = evaluate(
            self.model, archs, data, n_random=0, run=RunOptions(batch_size=100, amp=True)
        )
        return result.own_auc, result.fidelity

    def note(self, row: dict[str, Any]) -> None:
        """Print a row and keep it."""
        print(json.dumps(row), flush=True)
        with OUT.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def run(self, name: str, recipe: Recipe, sizes: Sequence[float], seeds: Sequence[int] = (0,),
            batch: int = 80, consts: dict[str, Any] | None = None,
            sel: dict[str, Any] | None = None,
            train_too: bool = False) -> dict[Any, TaskGates]:  # fmt: skip
        """Learn at several sizes and seeds, with other values of the modules' constants."""
        found_of: dict[Any, TaskGates] = {}
        for seed in seeds:
            start = time.process_time()
            with contextlib.ExitStack() as stack:
                for module, values in (
                    (nad_attr.learning.constants, consts),
                    (nad_attr.learning.selection, sel),
                ):
                    if values:
                        stack.enter_context(mock.patch.multiple(module, **values))
                found = self.session(recipe, seed, batch).learn_sizes(sizes)
            spent = time.process_time() - start
            cells = {}
            for size, gates in found.items():
                auc, fid = self.measure(gates)
                found_of[seed, size] = gates
                loss = gates.history["loss"][-10:].mean()
                cells[f"{size:g}"] = [round(float(v), 4) for v in (auc.mean(), fid.mean(), loss)]
                if train_too:
                    cells[f"{size:g}"] += [
                        round(float(v.mean()), 4) for v in self.measure(gates, self.train)
                    ]
                    cells[f"{size:g}"] += [
                        [round(float(v), 3) for v in values] for values in (auc, fid)
                    ]
            row = {
                "pair": self.pair, "tasks": self.names, "variant": name, "seed": seed,
                "cpu": round(spent, 1), "images": recipe.steps * recipe.images_per_step,
                "sizes": cells,
            }  # fmt: skip
            if len(seeds) > 1 and seed != seeds[0]:
                for size in sizes:
                    both = (found_of[s, size].sub_architectures() for s in (seeds[0], seed))
                    row.setdefault("kappa", {})[f"{size:g}"] = round(agreement(*both), 3)
            self.note(row)
        return found_of

    def fitted(self, name: str, archs: Sequence[SubArchitecture], recipe: Recipe, seed: int = 0,
               batch: int = 80) -> list[SubArchitecture]:  # fmt: skip
        """Best constants for given channels; noted beside the means."""
        session = self.session(recipe, seed, batch)
        start = time.process_time()
        result = session.fit(archs)
        spent = time.process_time() - start
        before = self.measure([a.with_means(session.means()) for a in archs])
        after = self.measure(result)
        self.note({
            "pair": self.pair, "variant": name, "seed": seed, "cpu": round(spent, 1),
            "images": recipe.steps * recipe.images_per_step, "size": round(archs[0].size, 3),
            "mean": [round(float(v.mean()), 4) for v in before],
            "constants": [round(float(v.mean()), 4) for v in after],
        })  # fmt: skip
        return result

    def mct(self, size: float, n: int = 100, seed: int = 0) -> list[SubArchitecture]:
        """NeuronMCT top-K, own images."""
        data = per_class(self.train, n, seed)
        scores = NeuronMCTScorer(self.model, self.sites)(
            *data, tasks=self.tasks, include_others=False
        )
        return top_k(scores, self.sites, self.tasks, size)


def agreement(a: Sequence[SubArchitecture], b: Sequence[SubArchitecture]) -> float:
    """Kappa over all sites, mean over tasks."""

    def flat(arch: SubArchitecture) -> torch.Tensor:
        return torch.cat([arch[name] for name in arch])

    return float(np.mean([kappa(flat(x), flat(y)) for x, y in zip(a, b, strict=True)]))


#: Variants of which findings compare the agreement of two seeds.
ONE_RUN, REPLICAS = "one run", "eight replicas"


def agreements() -> None:
    """Two seeds of one run and of eight replicas at 40 %, on every pair, the digits and Lite0."""
    for pair in (*PAIRS, "digits", "lite0"):
        setting = Setting(pair, {"digits": [*range(5)], "lite0": (0, 1)}.get(pair, [0, 3, 5]))
        setting.run(ONE_RUN, Recipe(), [0.4], (0, 1))
        setting.run(REPLICAS, Recipe(replicas=8), [0.4], (0, 1))


if __name__ == "__main__":
    torch.set_num_threads(1)
    exec(sys.argv[1])
