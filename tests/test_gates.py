"""Task gates: look-up, choice of tasks, sizes, identity."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nad_attr.data.labels import as_task
from nad_attr.evaluation import random_architectures
from nad_attr.gates.channels import budget
from nad_attr.gates.history import History
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.gating.hooks import gated
from nad_attr.sites.site import GateSite
from tests import helpers
from tests.helpers import assert_model_untouched

A, B = GateSite("a", 3), GateSite("b", 2, -1)
SITES = [A, B]


@pytest.fixture
def gates() -> TaskGates:
    """Three tasks: 4, the group (1, 2), 0."""
    return TaskGates(
        {
            "a": torch.tensor([[0.9, 0.2, 0.6], [0.5, 0.51, 0.0], [1.0, 1.0, 1.0]]),
            "b": torch.tensor([[0.7, 0.1], [0.0, 0.0], [0.4, 0.6]]),
        },
        SITES,
        [4, (2, 1), 0],
        means={"a": torch.tensor([1.0, 2, 3]), "b": torch.tensor([4.0, 5])},
        recipe=Recipe(size=0.5),
        history=History({"loss": np.arange(6.0).reshape(2, 3)}),
        task_names=["four", "pair", "zero"],
        info={"seed": 1},
    )


# ---------------------------------------------------------------------------------------------
# Tasks
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_as", "task"),
    [
        (3, 3),
        (np.int64(3), 3),
        (torch.tensor(3), 3),
        ((5, 2), (2, 5)),
        ([5, 2, 5], (2, 5)),
        ({5, 2}, (2, 5)),
        (range(2), (0, 1)),
        (np.array([5, 2]), (2, 5)),
        (torch.tensor([5, 2]), (2, 5)),
        ([7], (7,)),
    ],
)
def test_ways_to_write_a_task(given_as: object, task: object) -> None:
    result = as_task(given_as)
    assert result == task
    members = result if isinstance(result, tuple) else (result,)
    assert all(type(member) is int for member in members)


@pytest.mark.parametrize("task", [(1, 2), [2, 1], {1, 2}, torch.tensor([2, 1]), "pair"])
def test_groups_are_found_in_any_order(gates: TaskGates, task: object) -> None:
    assert gates.index(task) == 1


@pytest.mark.parametrize("task", [4, np.int32(4), torch.tensor(4), "four"])
def test_classes_are_found_by_number_and_name(gates: TaskGates, task: object) -> None:
    assert gates.index(task) == 0
    assert gates.gates_of(task)["a"].tolist() == pytest.approx([0.9, 0.2, 0.6])


@pytest.mark.parametrize("task", [1, 2, (1,), (1, 2, 3), "five", "4", 99])
def test_unknown_tasks_are_answered_with_the_known_ones(gates: TaskGates, task: object) -> None:
    for look_up in (gates.index, gates.gates_of, gates.sub_architecture):
        with pytest.raises(
            KeyError, match=r"no gates for task .*; learned tasks are 4, \(1, 2\), 0"
        ):
            look_up(task)
    with pytest.raises(KeyError, match="learned tasks are"):
        gates.select([4, task])


def test_a_group_of_one_is_not_its_class() -> None:
    gates = TaskGates({"a": torch.ones(2, 3)}, [A], [1, (1,)])
    assert (gates.index(1), gates.index((1,))) == (0, 1)


def test_long_lists_of_tasks_are_cut_short() -> None:
    gates = TaskGates({"a": torch.ones(50, 3)}, [A], range(50))
    with pytest.raises(KeyError, match=r"18, 19 \.\.\.") as error:
        gates.index(50)
    assert "20," not in str(error.value)


# ---------------------------------------------------------------------------------------------
# Access
# ---------------------------------------------------------------------------------------------


def test_access(gates: TaskGates) -> None:
    assert (len(gates), gates.n_channels) == (3, 5)
    assert list(gates) == list(gates.keys()) == list(dict(gates)) == ["a", "b"]
    assert gates.tasks == (4, (1, 2), 0)
    assert gates.task_names == ("four", "pair", "zero")
    assert gates.sites == (A, B)
    assert gates["b"].dtype == torch.float32
    assert gates["b"].shape == (3, 2)
    assert gates.logits is None
    with pytest.raises(KeyError, match=r"no gate site 'c'; there are \['a', 'b'\]"):
        gates["c"]


def test_what_they_give_away_are_copies(gates: TaskGates) -> None:
    for values in (gates["a"], gates.gates_of(4)["a"]):
        values[:] = 0.123
    assert 0.123 not in gates["a"]
    logits = torch.zeros(1, 3)
    kept = TaskGates({"a": torch.ones(1, 3)}, [A], [0], logits={"a": logits})
    logits[:] = 5
    kept.logits["a"][:] = 6
    assert kept.logits["a"].tolist() == [[0.0, 0.0, 0.0]]


def test_sub_architectures_of_all_tasks_hold_one_copy_of_the_means(gates: TaskGates) -> None:
    first, *others = gates.sub_architectures()
    derived = [*others, ~first, first | others[0], *random_architectures([first])]
    for arch in derived:
        assert arch.means is not None
        assert all(arch.means[name] is first.means[name] for name in gates)
    assert all(first.means[name] is not gates.means[name] for name in gates)
    alone = gates.sub_architecture(gates.tasks[0])
    assert alone == first
    assert all(alone.means[name] is not gates.means[name] for name in gates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.bool, torch.int64])
def test_gates_are_kept_in_float32(dtype: torch.dtype) -> None:
    values = torch.tensor([[0, 1, 1]]).to(dtype).requires_grad_(dtype.is_floating_point)
    gates = TaskGates({"a": values}, [A], [0])
    assert gates["a"].dtype == torch.float32
    assert not gates["a"].requires_grad
    assert gates["a"].tolist() == [[0.0, 1.0, 1.0]]


# ---------------------------------------------------------------------------------------------
# Sub-architectures
# ---------------------------------------------------------------------------------------------


def test_a_gate_above_one_half_is_kept(gates: TaskGates) -> None:
    arch = gates.sub_architecture(4)
    assert {name: m.tolist() for name, m in arch.masks.items()} == {
        "a": [True, False, True],
        "b": [True, False],
    }
    assert arch.task == 4
    assert arch.means["b"].tolist() == [4.0, 5.0]
    assert gates.sub_architecture("pair").kept["a"].tolist() == [1]  # a gate of one half is closed
    assert [a.task for a in gates.sub_architectures()] == [4, (1, 2), 0]


def test_another_size_keeps_the_highest_over_all_sites(gates: TaskGates) -> None:
    arch = gates.sub_architecture(4, size=0.4)
    expected = SubArchitecture.from_kept({"a": [0], "b": [0]}, SITES, task=4, means=gates.means)
    assert arch == expected
    assert gates.sub_architecture(0, size=0.6).sizes == {"a": 1.0, "b": 0.0}
    assert [a.n_kept for a in gates.sub_architectures(0.2)] == [1, 1, 1]


def test_logits_rank_where_gates_are_saturated() -> None:
    logits = torch.tensor([[100.0, 300.0, 200.0]])
    gates = TaskGates({"a": logits.sigmoid()}, [A], [0], logits={"a": logits})
    assert gates["a"].tolist() == [[1.0, 1.0, 1.0]]
    assert gates.sub_architecture(0, size=1 / 3).kept["a"].tolist() == [1]
    assert gates.sub_architecture(0, size=2 / 3).kept["a"].tolist() == [1, 2]


@pytest.mark.slow
@settings(max_examples=50)
@given(
    widths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    size=st.floats(1e-6, 1),
    levels=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_every_size_is_met_exactly(widths: list[int], size: float, levels: int, seed: int) -> None:
    """Exact size also with many equal gates; smaller sizes are parts of larger ones."""
    sites = [GateSite(str(i), width) for i, width in enumerate(widths)]
    generator = torch.Generator().manual_seed(seed)
    values = {
        s.name: torch.randint(levels, (2, s.n_channels), generator=generator) / levels
        for s in sites
    }
    gates = TaskGates(values, sites, [0, 1])
    for arch in gates.sub_architectures(size):
        assert arch.n_kept == budget(size, sites) == max(1, round(size * sum(widths)))
        assert arch & gates.sub_architecture(arch.task, 1.0) == arch
        smaller = gates.sub_architecture(arch.task, size / 2)
        assert smaller - arch == SubArchitecture.from_kept({}, sites, task=arch.task)
        lowest = min(float(values[n][arch.task][m].min()) for n, m in arch.masks.items() if m.any())
        closed = [values[n][arch.task][~m] for n, m in arch.masks.items()]
        assert all(bool((v <= lowest).all()) for v in closed)


# ---------------------------------------------------------------------------------------------
# Some of the tasks
# ---------------------------------------------------------------------------------------------


def test_select(gates: TaskGates) -> None:
    some = gates.select(["zero", (2, 1)])
    assert some.tasks == (0, (1, 2))
    assert some.task_names == ("zero", "pair")
    assert torch.equal(some["a"], gates["a"][[2, 1]])
    assert some.history["loss"].tolist() == [[2.0, 1.0], [5.0, 4.0]]
    assert (some.recipe, some.info) == (gates.recipe, gates.info)
    assert some.means["a"].tolist() == gates.means["a"].tolist()
    for task in some.tasks:
        assert some.sub_architecture(task) == gates.sub_architecture(task)
    assert gates.select(gates.tasks) == gates


def test_select_keeps_the_ranking() -> None:
    logits = torch.tensor([[1.0, 2, 3], [3.0, 2, 1]])
    gates = TaskGates({"a": torch.ones(2, 3)}, [A], [0, 1], logits={"a": logits})
    some = gates.select([1])
    assert some.logits["a"].tolist() == [[3.0, 2.0, 1.0]]
    assert some.history is None
    assert some.task_names is None
    assert some.means is None


# ---------------------------------------------------------------------------------------------
# Identity and display
# ---------------------------------------------------------------------------------------------


def test_equal_means_same_sites_tasks_and_gates(gates: TaskGates) -> None:
    values = {name: gates[name] for name in gates}
    rest = {"logits": gates.logits, "means": gates.means}
    assert gates == TaskGates(values, SITES, gates.tasks, **rest, task_names=["x", "y", "z"])
    assert gates.means is not None
    assert gates != TaskGates(values, SITES, gates.tasks, **{**rest, "means": None})
    other = {name: mean + 1 for name, mean in gates.means.items()}
    assert gates != TaskGates(values, SITES, gates.tasks, **{**rest, "means": other})
    for logits in ({"a": values["a"] + 1, "b": values["b"]}, {**values}):
        one = TaskGates(values, SITES, gates.tasks, logits=logits, means=gates.means)
        assert gates != one  # other ranks: another size keeps other channels
        assert one == TaskGates(values, SITES, gates.tasks, logits=logits, means=gates.means)
    assert gates != TaskGates(values, SITES, [4, (1, 2), 1])
    assert gates != TaskGates(values, [A, GateSite("b", 2, 1)], gates.tasks)
    assert gates != TaskGates({**values, "b": values["b"] / 2}, SITES, gates.tasks)
    assert gates != values
    with pytest.raises(TypeError, match="unhashable"):
        hash(gates)


def test_display(gates: TaskGates) -> None:
    # 3, 1 and 4 of 5 channels
    assert repr(gates) == (
        "TaskGates(3 tasks, 2 sites, 5 channels, 53.3 % kept, closed channels at their mean)"
    )
    one = TaskGates({"a": torch.ones(1, 3)}, [A], [0])
    assert repr(one) == "TaskGates(1 task, 1 site, 3 channels, 100.0 % kept, closed channels zero)"


# ---------------------------------------------------------------------------------------------
# On a network
# ---------------------------------------------------------------------------------------------


def test_a_task_for_each_image(tiny_cnn: nn.Module) -> None:
    sites = [GateSite("relu1", 6), GateSite("relu2", 8)]
    generator = torch.Generator().manual_seed(0)
    values = {s.name: torch.rand(3, s.n_channels, generator=generator) for s in sites}
    means = {s.name: torch.rand(s.n_channels, generator=generator) for s in sites}
    gates = TaskGates(values, sites, [0, 1, (0, 2)], means=means)
    x = helpers.images(4)
    chosen = [1, (0, 2), 0, 1]
    with assert_model_untouched(tiny_cnn, x), gated(tiny_cnn, gates, tasks=chosen):
        together = tiny_cnn(x)
    for i, task in enumerate(chosen):
        with gated(tiny_cnn, gates, tasks=task):
            torch.testing.assert_close(tiny_cnn(x[i : i + 1]), together[i : i + 1])


# ---------------------------------------------------------------------------------------------
# History
# ---------------------------------------------------------------------------------------------


def test_history() -> None:
    curves = {"loss": [[1.0, 2.0], [3.0, float("nan")]], "size": np.ones((2, 2))}
    history = History(curves)
    assert (list(history), len(history)) == (["loss", "size"], 2)
    assert history["loss"].dtype == np.float32
    assert history.select([1])["loss"].shape == (2, 1)
    assert repr(history) == "History(2 steps, 2 tasks: loss, size)"
    assert repr(History({})) == "History(0 steps, 0 tasks: )"
    with pytest.raises(ValueError, match="all have shape"):
        History({"loss": np.ones((2, 2)), "size": np.ones((3, 2))})


def test_history_can_be_drawn() -> None:
    pytest.importorskip("matplotlib")
    size, last = [[np.nan, 1.0], [np.nan, 0.5]], [[np.nan] * 2, [0.9, 0.8]]
    curves = {"loss": [[1.0, 2.0], [3.0, np.nan]], "size": size, "fidelity_apart": last}
    figure = History(curves | {"highest_apart": np.full((2, 2), np.nan)}).plot()
    assert [axes.get_title() for axes in figure.axes] == ["loss", "size"]  # the rest are not curves
    assert [len(axes.lines) for axes in figure.axes] == [3, 3]
    assert figure.axes[0].lines[-1].get_ydata().tolist() == [1.5, 3.0]
    gap = History({"loss": [[1.0], [np.nan], [2.0]]}).plot().axes[0].lines[-1].get_ydata()
    np.testing.assert_array_equal(gap, [1.0, np.nan, 2.0])


def test_tensors_and_lists_are_taken_alike() -> None:
    values: dict[str, Tensor] = {"a": [[0.0, 0.5, 1.0]]}
    assert TaskGates(values, [A], [0])["a"].tolist() == [[0.0, 0.5, 1.0]]
