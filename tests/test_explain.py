"""One call from a network and its pictures to a verdict: split, promise, resume, command line."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nad_attr import Explanation, Recipe, RunOptions, TaskGates, explain
from nad_attr.data.labels import own_images
from nad_attr.data.sources import ChosenSource, as_source
from nad_attr.evaluation import Evaluation
from nad_attr.explaining import explaining
from nad_attr.explaining.parts import SIZES, chosen_tasks, split
from nad_attr.explaining.promise import Rates, cost, n_certain, passes, promised
from nad_attr.store import GateStoreError, result_names
from tests.helpers import assert_model_untouched, fit_briefly

SEEN: Counter[str] = Counter()
TWO: list[Any] = [0, 2]


class Counting(nn.Module):
    """A small network that counts the images that pass it."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(6, 12), nn.Linear(12, 10)
            self.last = nn.Linear(10, 3)
        self.relu, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        SEEN["run"] += len(x)
        return self.last(self.relu2(self.second(self.relu(self.first(x)))))


def data(n: int = 120, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 6, generator=generator), torch.arange(n) % classes


class StopError(Exception):
    """Ends what a test has seen enough of."""


def stopping(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """Let explanations end before a step."""
    step = explaining._Work.step

    def stopped(self: Any, name: str) -> Any:
        if name == at:
            raise StopError
        return step(self, name)

    monkeypatch.setattr(explaining._Work, "step", stopped)


QUICK = Recipe(size=0.5, steps=6, images_per_step=8, ablation="mean")
NAMES = {0: "cat", 1: "a\tdog"}


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Explanation:
    """A whole explanation with its page and store."""
    pytest.importorskip("plotly")
    page = tmp_path_factory.mktemp("explained") / "report.html"
    given: dict[str, Any] = {"out": page, "task_names": NAMES, "run": RunOptions(batch_size=16)}
    given |= {"recipe": QUICK, "certainty": True}
    with pytest.MonkeyPatch.context() as patch:
        fit_briefly(patch)
        return explain(Counting().eval(), data(), tasks=TWO, **given)


# ---------------------------------------------------------------------------------------------
# Which tasks, which images
# ---------------------------------------------------------------------------------------------


def test_the_classes_with_most_images_are_explained() -> None:
    labels = torch.tensor([0] * 4 + [1] * 9 + [2] * 3 + [3] * 9 + [4] * 6)
    assert chosen_tasks(labels, None, 2, {}) == ([1, 3], 3)
    assert chosen_tasks(labels, None, 10, {}) == ([0, 1, 3, 4], 1)
    assert chosen_tasks(labels, [4, (0, 1)], 1, {}) == ([4, (0, 1)], 4)


@pytest.mark.parametrize(
    ("labels", "tasks", "match"),
    [
        ([0, 0, 0, 1, 1, 1], None, "no class has 4 images .* the most are 3"),
        ([0] * 9, None, "0 images of other classes than 'cat', .* Add a folder of another class"),
        ([0] * 9 + [1], None, "1 images? of other classes than 'cat'|there are 1 images of other"),
        ([0] * 9 + [1] * 3, [1], "class '1' has 3 images, and 4 are the least"),
        ([0] * 9 + [1] * 9, [7], "class '7' has 0 images"),
        ([0] * 9 + [1] * 9, [1, 1], "task 1 is there twice"),
        ([0] * 9 + [1] * 9, [], "tasks is empty"),
    ],
)
def test_what_is_missing_is_said(labels: list[int], tasks: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        chosen_tasks(torch.tensor(labels), tasks, 10, {0: "cat"})


@pytest.mark.parametrize("n_classes", [2, 5, 1000])
def test_parts_are_apart_and_seeded(n_classes: int) -> None:
    labels = torch.arange(n_classes * 10) % n_classes
    tasks, _ = chosen_tasks(labels, None, 10, {})
    parts = split(labels, tasks, 50, seed=3)
    assert not set(parts.learned.tolist()) & set(parts.judged.tolist())
    assert len(parts.learned) + len(parts.judged) == len(labels)
    assert own_images(labels[parts.judged], tasks).sum(1).tolist() == [3] * len(tasks)
    assert len(parts.judged) <= 3 * len(tasks) + 100
    assert torch.equal(split(labels, tasks, 50, seed=3).judged, parts.judged)
    assert not torch.equal(split(labels, tasks, 50, seed=4).judged, parts.judged)


def test_few_and_several_labels() -> None:
    parts = split(torch.tensor([0] * 4 + [1] * 4), [0, 1], 50, seed=0)
    assert (len(parts.learned), len(parts.judged)) == (4, 4)
    # Groups of classes with one image each are split as groups, and so are all other classes.
    group, others = (*range(30),), torch.arange(30, 100)
    one_each = torch.cat([torch.arange(30), others])
    parts = split(one_each, [group], 50, seed=0)
    assert [int((part < 30).sum()) for part in (parts.learned, parts.judged)] == [21, 9]
    assert [int((part >= 30).sum()) for part in (parts.learned, parts.judged)] == [49, 21]
    several = torch.tensor([[1, 0], [1, 1], [0, 1], [0, 0]]).repeat(6, 1)
    assert len(split(several, [0, 1], 50, seed=0).judged) == 8


# ---------------------------------------------------------------------------------------------
# The promise
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ablation",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("mean", "zero")), "optimal"],
)
def test_the_passes_that_are_promised_are_run(
    ablation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside the promised ones, only checks on a few images run."""
    run: dict[str, int] = {}
    step = explaining._Work.step

    def counted(self: Any, name: str) -> Any:
        run[name] = -SEEN["run"]
        ends.append(name)
        return step(self, name)

    ends: list[str] = []
    monkeypatch.setattr(explaining._Work, "step", counted)
    model, images = Counting().eval(), data()
    recipe = Recipe(size=0.5, steps=10, images_per_step=4, ablation=ablation)
    with assert_model_untouched(model):
        found = explain(model, images, tasks=TWO, recipe=recipe, certainty=True)
    starts = [-run[name] for name in ends] + [SEEN["run"]]
    taken = dict(zip(ends, np.diff(starts).tolist(), strict=True))
    source = as_source(images)
    parts = split(source.labels, TWO, SIZES["full"].n_judged, 0)
    learned, judged = ChosenSource(source, parts.learned), ChosenSource(source, parts.judged)
    said = passes(learned, judged, TWO, recipe, 11, TWO, TWO)
    for name, real in taken.items():
        kinds = {kind: n for kind, n in said[name].items() if kind not in ("read", "back")}
        wanted = sum(kinds.values())
        # How many channels are worth a test shows when they are tested.
        low, high = (0.25, 2) if name == "certainty" else (0.99, 1.03)
        assert low * wanted <= real <= high * wanted + 120, (name, wanted, real)
    assert found.n_judged == len(parts.judged)


def test_seconds_are_passes_times_rates() -> None:
    rates = Rates(run=0.1, learn=0.4, fit=0.5, read=0.01, setup=3.0)
    todo = {"learning": {"learn": 10, "run": 5, "read": 15}, "flow": {"run": 3, "back": 20}}
    promise = promised(todo, rates, fits=False)
    assert promise.seconds["learning"] == pytest.approx(0.2 + 4 + 0.5 + 0.15 + 3)
    assert promise.seconds["flow"] == pytest.approx(0.2 + 0.3 + 20 * 0.3)
    assert promise.total == pytest.approx(sum(promise.seconds.values()))
    assert promise.n_passes == 38


def test_time_is_said_first_with_a_quicker_size(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    stopping(monkeypatch, "learning")
    with pytest.raises(StopError):
        explain(
            Counting().eval(), data(600, 3), tasks=[0], recipe=Recipe(steps=200), say=said.append
        )
    assert said[0] == "explaining: 0 (of 3)"
    (line,) = (text for text in said if text.startswith("this will take about"))
    assert "images through the network): learning" in line
    assert any(text.startswith("a quicker size (quick) would take about") for text in said)


def test_a_smaller_size_says_what_it_leaves_of_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    stopping(monkeypatch, "learning")
    said: list[str] = []
    given = {"tasks": [0], "quick": True, "say": said.append}
    with pytest.raises(StopError):
        explain(Counting().eval(), data(), recipe=Recipe(replicas=8), **given)
    fewer = "40 steps of learning for each class, not 100"
    assert f"{fewer}, in 4 runs and a last one, not 8 and one" in said
    said.clear()
    with pytest.raises(StopError):
        explain(Counting().eval(), data(), **given)
    assert fewer in said
    said.clear()
    with pytest.raises(StopError):
        explain(Counting().eval(), data(), recipe=QUICK, **given)
    assert not [text for text in said if "steps of learning" in text]


def test_minutes_choose_the_size(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(np.arange(10**6) * 0.5).__next__  # each look at the clock is half a second later
    with pytest.raises(ValueError, match="minutes are too few: the smallest size takes about"):
        explain(Counting().eval(), data(), minutes=0.001, clock=lambda: float(clock()))
    with pytest.raises(ValueError, match="quick and minutes"):
        explain(Counting().eval(), data(), minutes=1, quick=True)
    with pytest.raises(ValueError, match="minutes must be a number above 0, got 0"):
        explain(Counting().eval(), data(), minutes=0)
    stopping(monkeypatch, "learning")
    said: list[str] = []
    with pytest.raises(StopError):
        explain(Counting().eval(), data(), minutes=60, recipe=QUICK, say=said.append)
    assert said[0] == "explaining: 0, 1, 2"


def test_certainty_takes_no_longer_than_all_else() -> None:
    """By counted passes, which are the same on every machine."""
    rest = {"learning": {"learn": 100}, "verdict": {"run": 300}}
    for runs, n in ((60, 8), (600, 8), (1200, 4), (48_000, 0)):
        assert n_certain({**rest, "certainty": {"run": runs}}, 8) == n


# ---------------------------------------------------------------------------------------------
# Results, and going on
# ---------------------------------------------------------------------------------------------


def test_five_lines_and_files(explained: Explanation) -> None:
    lines = explained.summary().splitlines()
    assert len(lines) == 5
    assert [line.partition(":")[0] for line in lines] == [
        "Asked", "Answer", "How sure", "Compared with", "See",
    ]  # fmt: skip
    assert "22 channels" in lines[0]
    assert "about 11 channels each (50 %)" in lines[1]
    assert "closed one by one, the kept channels are" in lines[2]
    assert explained.page in lines[4]
    store = Path(explained.store)
    assert store == Path(explained.page).with_name("gates.h5")
    results = set(result_names(store))
    assert {"evaluation", "certainty", "verdict", "explanation", "report/flow"} <= results
    assert TaskGates.load(store).tasks == explained.gates.tasks
    assert explained.gates.info["batch_size"] == 16
    assert Evaluation.load(store, "evaluation").n_images == explained.n_judged
    assert explained.certainty.tasks == (0, 2)
    assert "not asked" not in [explained.verdict.answer(task, "stable") for task in TWO]
    again = Explanation.load(store)
    assert again.summary().splitlines()[3:] == explained.summary().splitlines()[3:]
    assert "random channels" in Path(explained.page).read_text()


@pytest.mark.parametrize(
    "stop",
    [*(pytest.param(one, marks=pytest.mark.slow) for one in ("learning", "page")), "verdict"],
)
def test_stopped_between_steps_it_goes_on(
    stop: str, tmp_path: Path, explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_briefly(monkeypatch)
    model, images = Counting().eval(), data()
    given: dict[str, Any] = {"recipe": QUICK, "tasks": TWO, "task_names": NAMES}
    given |= {"out": tmp_path / "page.html", "run": RunOptions(batch_size=16), "certainty": True}
    with monkeypatch.context() as patch:
        stopping(patch, stop)
        with pytest.raises(StopError):
            explain(model, images, **given)
    found = explain(model, images, **given)
    order = ["evaluation", "certainty", "verdict", "flow", "pictures", "page"]
    # There are no pictures of rows of numbers, so that step is tried again.
    left = order if stop == "learning" else order[min(order.index(stop), 4) :]
    assert list(found.taken) == ["learning", *left]
    assert list(found.promised) == ["learning", *left]
    assert found.verdict.answers == explained.verdict.answers
    assert found.summary().splitlines()[:4] == explained.summary().splitlines()[:4]


def test_other_arguments_are_named(
    tmp_path: Path, explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model = tmp_path / "gates.h5", Counting().eval()
    shutil.copy(explained.store, store)
    given: dict[str, Any] = {"store": store, "recipe": QUICK, "tasks": TWO, "certainty": True}
    for change, match in (
        ({"quick": True}, "begun with quick False, not True"),
        ({"seed": 5}, "begun with seed 0, not 5"),
        ({"tasks": [1]}, r"begun with tasks \[0, 2\], not \[1\]"),
        ({"certainty": False}, "begun with certainty True, not False"),
        ({"recipe": Recipe(steps=3)}, "begun with another recipe"),
    ):
        with pytest.raises(GateStoreError, match=match):
            explain(model, data(), **{**given, **change})
    with pytest.raises(GateStoreError, match="data"):
        explain(model, (data()[0] + 1, data()[1]), **given)
    explained.gates.save(tmp_path / "other.h5")
    with pytest.raises(FileExistsError, match="was not begun by explain"):
        explain(model, data(), **{**given, "store": tmp_path / "other.h5"})
    stopping(monkeypatch, "learning")
    with pytest.raises(StopError):
        explain(model, data(), **given, quick=True, overwrite=True)
    assert not store.exists()


def test_certainty_goes_on_with_the_next_task(
    tmp_path: Path, explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit_briefly(monkeypatch)
    model, images = Counting().eval(), data()
    given: dict[str, Any] = {"recipe": QUICK, "tasks": TWO, "certainty": True}
    given |= {"store": tmp_path / "gates.h5", "run": RunOptions(batch_size=16)}
    given["task_names"] = NAMES
    measure, seen = explaining.measure_certainty, []

    def once(model: nn.Module, gates: TaskGates, *args: Any, **kwargs: Any) -> Any:
        if seen:
            raise StopError
        seen.append(gates.tasks)
        return measure(model, gates, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(explaining, "measure_certainty", once)
        with pytest.raises(StopError):
            explain(model, images, **given)
    assert seen == [(0,)]
    assert "certainty" in result_names(given["store"])
    found = explain(model, images, **given)
    assert found.certainty is not None
    assert explained.certainty is not None
    assert found.certainty.to_dict() == explained.certainty.to_dict()
    assert "certainty" in found.promised
    once_more = explain(model, images, **given)
    assert list(once_more.taken) == ["learning", "pictures"]


def test_certainty_of_as_many_tasks_as_are_paid_for(
    explained: Explanation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What closings cost shows when they are done; passes decide, and no clock."""
    sure = explained.certainty
    assert sure is not None
    work = object.__new__(explaining._Work)
    work.tasks, work.wants_certainty = [*TWO, 1], None
    spent = cost({"learn": sure.passes["learning"], "run": sure.passes["testing"]})
    for affordable, left in ((spent, []), (1.5 * spent, [1]), (2 * spent, [1])):
        work.affordable = int(affordable)
        assert work.unsure(sure) == left
    work.affordable, work.wants_certainty = 0, True
    assert work.unsure(sure) == [1]
    assert work.unsure(None) == work.tasks
