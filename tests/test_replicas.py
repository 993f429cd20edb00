"""Gates of a run that is guided by several short ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nad_attr import (
    Recipe,
    TaskGates,
    certainty,
    learn_gates,
    learn_sizes,
    learn_to_store,
    verdict,
)
from nad_attr.evaluation import planted
from nad_attr.learning.engine import Replica, TaskImages
from nad_attr.learning.session import Session
from nad_attr.system.rng import seed_of

RECIPE = Recipe(size=0.25, steps=28, images_per_step=10, replicas=3)


def known(kind: Any = "plain", n_images: int = 150) -> Any:
    return planted(kind, n_classes=2, circuit_width=2, width=8, n_images=n_images)


def flat(gates: TaskGates) -> Tensor:
    return torch.cat([gates[name] for name in gates], dim=1)


def test_steps_are_shared() -> None:
    assert Recipe(replicas=6).replica_steps == (8, 52)
    assert Recipe(replicas=8, ablation="mean").replica_steps == (6, 52)
    assert RECIPE.replica_steps == (4, 16)
    for wrong in (0, 1.5, True, "3"):
        with pytest.raises(ValueError, match="replicas must be a whole number from 1 on"):
            Recipe(replicas=wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="share 100 steps, and each needs 4 at least"):
        Recipe(replicas=40)
    assert Recipe.from_json(RECIPE.to_json()) == RECIPE
    assert "replicas" not in Recipe().to_json()  # as the versions wrote that knew no such field


def test_the_last_run_pays_for_channels_that_the_runs_rank_low() -> None:
    of = known()
    found = learn_gates(of.model, of.data, [0, 1], RECIPE, of.sites, seed=5)
    single = Session(of.model, of.data, recipe=replace(RECIPE, steps=4, replicas=1), sites=of.sites)
    last = Session(of.model, of.data, recipe=replace(RECIPE, steps=16, replicas=1), sites=of.sites)
    for task in (0, 1):
        # An independent account: the runs one by one, from the images that judge no constants.
        images = TaskImages(of.data[1], task, 5)
        images.keep_apart(0.2, 32, 50)
        among = torch.cat([images.pools["own"], images.pools["other"]])
        runs = [Replica(task, seed_of(5, task, "replica", i), among) for i in range(3)]
        rank = torch.cat([single.learn_replicas([run])[0] for run in runs]).mean(0)
        gates, constants = last.learn_replicas([Replica(task, 5, None, 0.02 * (1 - rank))])
        torch.testing.assert_close(flat(found)[task], gates[0])
        assert found.constants is not None
        assert constants is not None
        mine = torch.cat([found.constants[name][task] for name in found.constants])
        torch.testing.assert_close(mine, constants[0])
    assert len(found.history["loss"]) == 4 + 16


@pytest.mark.parametrize("ablation", ["optimal", "mean", "zero"])
def test_a_circuit_is_found(ablation: Any) -> None:
    of = known()
    recipe = replace(RECIPE, size=of.size, ablation=ablation, steps=40)
    gates = learn_gates(of.model, of.data, recipe=recipe, sites=of.sites)
    assert of.score(gates).mean("recall") == 1.0
    assert (gates.constants is not None) == (ablation == "optimal")


def test_the_result_depends_on_no_other_task_and_a_store_says_the_same(tmp_path: Path) -> None:
    of = known()
    both = learn_gates(of.model, of.data, [0, 1], RECIPE, of.sites, seed=2)
    alone = learn_gates(of.model, of.data, [1], RECIPE, of.sites, seed=2, batch_size=20)
    torch.testing.assert_close(flat(both)[1:], flat(alone))
    path = learn_to_store(
        of.model, of.data, tmp_path / "g.h5", [0, 1], RECIPE, of.sites, seed=2, chunk_size=1
    )
    stored = TaskGates.load(path)
    torch.testing.assert_close(flat(stored), flat(both))
    assert stored.recipe == RECIPE


def test_sizes_and_halves_are_guided_as_well() -> None:
    of = known()
    found = learn_sizes(of.model, [0.5, 0.25], of.data, [0], RECIPE, of.sites)
    assert {size: gates.sub_architecture(0).n_kept for size, gates in found.items()} == {
        0.5: 12,
        0.25: 6,
    }
    with pytest.raises(ValueError, match="and each replica has 4"):
        learn_sizes(of.model, [0.9, 0.8, 0.7, 0.6, 0.5], of.data, [0], RECIPE, of.sites)
    said = verdict(of.model, found[0.25], of.data, of.held_out)
    assert said.answers[0][0] == "holds"
    sure = certainty(of.model, found[0.25], of.data, of.held_out, pairs=1, alternatives=0)
    assert sure.passes["learning"] == 2 * 28 * 10
    assert (sure.chosen[0].sum() > 0).all()
