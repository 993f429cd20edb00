"""One run of falling budget gives gates at every size."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nad_attr import Recipe, TaskGates, find_gate_sites, learn_gates, learn_sizes
from nad_attr.gates.channels import budget, n_channels
from nad_attr.learning.selection import budgets
from tests import helpers

SIZES = [0.3, 0.8, 0.5]
RECIPE = Recipe(steps=9, images_per_step=4)


@pytest.fixture(scope="module")
def found() -> dict[float, TaskGates]:
    model = helpers.build(helpers.TinyCNN)
    return learn_sizes(model, SIZES, helpers.labelled_images(), recipe=RECIPE)


def test_every_size_is_reached_exactly(found: dict[float, TaskGates]) -> None:
    assert list(found) == SIZES
    for size, gates in found.items():
        assert {a.n_kept for a in gates.sub_architectures()} == {budget(size, gates.sites)}
        assert gates.recipe == Recipe(size=size, steps=9, images_per_step=4)


def test_curves_end_where_the_gates_were_taken(found: dict[float, TaskGates]) -> None:
    for size, steps in ((0.8, 3), (0.5, 6), (0.3, 9)):
        history = found[size].history
        assert history is not None
        assert history["size"].shape[0] == steps
        kept = budget(size, found[size].sites) / n_channels(found[size].sites)
        assert history["size"][-1] == pytest.approx([kept] * len(found[size].tasks))


def test_one_size_is_learn_gates() -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    (gates,) = learn_sizes(model, [0.4], data, recipe=RECIPE).values()
    recipe = Recipe(size=0.4, steps=9, images_per_step=4)
    assert gates == learn_gates(model, data, recipe=recipe)


def test_a_task_does_not_depend_on_its_company(found: dict[float, TaskGates]) -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    alone = learn_sizes(model, SIZES, data, tasks=[1], recipe=RECIPE)
    for size, gates in alone.items():
        for name in gates:
            assert torch.equal(gates[name] > 0.5, found[size].select([1])[name] > 0.5)


def test_default_recipe_gives_each_size_its_steps() -> None:
    model, data = helpers.build(helpers.TinyCNN), helpers.labelled_images()
    (gates,) = learn_sizes(model, [0.5], data, tasks=[0]).values()
    assert gates.recipe is not None
    assert gates.recipe.steps == 100


@given(
    n=st.integers(20, 2000),
    shares=st.lists(st.floats(0.01, 1.0), min_size=1, max_size=5, unique=True),
    steps=st.integers(5, 200),
    removal=st.floats(0, 1),
)
def test_budgets_fall_and_end_at_every_size(
    n: int, shares: list[float], steps: int, removal: float
) -> None:
    ks = sorted({max(1, round(n * share)) for share in shares}, reverse=True)
    path = budgets(Recipe(steps=steps, removal=removal), n, ks)
    assert [part[-1] for part in path] == ks
    flat = [k for part in path for k in part]
    assert len(flat) == steps
    assert flat == sorted(flat, reverse=True)


@pytest.mark.parametrize(
    ("sizes", "recipe", "message"),
    [
        ([], RECIPE, "sizes"),
        ([0.5, 0.5], RECIPE, "different"),
        ([0.5, 1.5], RECIPE, "share of the channels"),
        ([0.0], RECIPE, "share of the channels"),
        ([0.5, 0.7], Recipe(steps=1, images_per_step=4), "steps"),
        ([0.5], Recipe.paper(beta=0.1), "takes no size"),
    ],
)
def test_bad_sizes(sizes: list[float], recipe: Recipe, message: str) -> None:
    model = helpers.build(helpers.TinyCNN)
    sites = find_gate_sites(model, helpers.images(1))
    with helpers.assert_model_untouched(model), pytest.raises(ValueError, match=message):
        learn_sizes(model, sizes, helpers.labelled_images(), recipe=recipe, sites=sites)
