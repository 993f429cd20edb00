"""Runs into a store: after any interruption they end with the same gates."""

from __future__ import annotations

import itertools
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nad_attr import GateStoreError, Recipe, RunOptions, TaskGates, learn_gates
from nad_attr.learning.runs import Progress, learn_to_store
from nad_attr.learning.session import Session
from nad_attr.store import GateStore
from tests import killable
from tests.helpers import assert_model_untouched

SETTINGS = killable.SETTINGS
N_TASKS = killable.N_TASKS


@pytest.fixture(scope="module")
def runs() -> Iterator[killable.Runs]:
    """Starts runs in processes that may be killed."""
    with killable.runs() as start:
        yield start


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run."""
    path = tmp_path_factory.mktemp("whole") / "gates.h5"
    return learn_to_store(killable.network(), killable.data(), path, **SETTINGS)


def content(path: Path) -> dict[str, Any]:
    """All learned numbers, bit by bit, in the canonical order of tasks."""
    gates = TaskGates.load(path)
    gates = gates.select(sorted(gates.tasks))
    assert gates.logits is not None
    assert gates.means is not None
    assert gates.history is not None
    bits: dict[str, Any] = {"tasks": gates.tasks, "names": gates.task_names}
    for name in gates:
        bits[f"gates of {name}"] = gates[name].numpy().tobytes()
        bits[f"logits of {name}"] = gates.logits[name].numpy().tobytes()
        bits[f"means of {name}"] = gates.means[name].numpy().tobytes()
    for name, curve in gates.history.items():
        bits[f"history of {name}"] = curve.tobytes()
    return bits


def assert_same(path: Path, whole: Path) -> None:
    found, expected = content(path), content(whole)
    assert found.keys() == expected.keys()
    assert [key for key in expected if found[key] != expected[key]] == []


def resume(path: Path, **changes: Any) -> Path:
    settings = {"resume": True, **SETTINGS, **changes}
    model, data = settings.pop("model", killable.network()), settings.pop("data", killable.data())
    return learn_to_store(model, data, path, **settings)


# -- killed ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_at_random_moments(runs: killable.Runs, whole: Path, tmp_path: Path) -> None:
    assert runs(tmp_path / "first.h5") == 0  # the process is there now
    started = time.monotonic()
    assert runs(tmp_path / "timed.h5") == 0
    seconds = time.monotonic() - started
    moments = random.Random(0)
    n_killed = n_stores = 0
    partial = set()
    path = tmp_path / "gates.h5"
    while n_killed < 12 or (len(partial) < 4 and n_killed < 200):
        if n_killed >= 12:  # the machine is slower now
            seconds *= 1.1
        # Early kills happen while opening and checking, late ones while learning and writing.
        code = runs(path, after=moments.uniform(0, 0.7 * seconds))
        assert code in (0, -signal.SIGKILL)
        n_killed += code == -signal.SIGKILL
        partial.add(len(TaskGates.load(path)) if stored(path) else 0)
        if code == 0:
            n_stores += 1
            assert_same(path, whole)
            path = tmp_path / f"gates{n_stores}.h5"
    assert runs(path) == 0
    assert_same(path, whole)
    assert len(partial) >= 4  # they were killed in different chunks


def stored(path: Path) -> bool:
    """Whether the file is there and holds a task; a file that is there can be opened."""
    if not path.exists():
        return False
    with GateStore.open(path) as store:
        return len(store) > 0


def test_killed_at_each_write(runs: killable.Runs, whole: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun.h5"
    with GateStore.open(whole) as store:
        store.slice(range(16), begun)
    # Two chunks are missing, one of them in part. Then there is closing, which writes as well.
    held = set()
    for n in itertools.count(1, 3):
        path = tmp_path / f"{n}.h5"
        path.write_bytes(begun.read_bytes())
        code = runs(path, die_at_write=n)
        assert code in (0, -signal.SIGKILL)
        gates = TaskGates.load(path)
        assert gates == TaskGates.load(whole).select(range(len(gates)))
        held.add(len(gates))
        if code == 0:
            break
        assert runs(path) == 0
        assert_same(path, whole)
        assert [file.name for file in tmp_path.glob(f"{n}.h5*")] == [f"{n}.h5"]
        path.unlink()
    assert held == {16, 18, 20}
    assert n > 8


# -- interrupted -----------------------------------------------------------------------------------


def test_ctrl_c_keeps_what_is_finished(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    model, data = killable.network(), killable.data()

    def stop(progress: Progress) -> None:
        if progress.done == 9:
            signal.raise_signal(signal.SIGINT)

    with assert_model_untouched(model, *data), pytest.raises(KeyboardInterrupt):
        learn_to_store(model, data, path, on_progress=stop, **SETTINGS)
    assert TaskGates.load(path) == TaskGates.load(whole).select(range(9))
    resume(path)  # it is closed, and its lock is free
    assert_same(path, whole)


def test_ctrl_c_during_a_write_waits_for_it(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gates.h5"
    append = GateStore.append
    handler = signal.getsignal(signal.SIGINT)

    def interrupted(self: GateStore, *arguments: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        append(self, *arguments, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(GateStore, "append", interrupted)
        resume(path)
    assert signal.getsignal(signal.SIGINT) is handler
    assert TaskGates.load(path) == TaskGates.load(whole).select(range(3))


def test_ctrl_c_from_the_keyboard(runs: killable.Runs, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    # It waits a while after each chunk, so that it is not done before the signal comes.
    assert runs(path, after=lambda: stored(path), how=signal.SIGINT, slow=0.25) == 130
    held = len(TaskGates.load(path))
    assert 0 < held < N_TASKS
    assert runs(path) == 0
    assert_same(path, whole)


def test_run_outside_the_main_thread(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    thread = threading.Thread(target=resume, args=(path,))
    thread.start()
    thread.join()
    assert_same(path, whole)


def test_failing_data_keeps_what_is_finished(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"

    class Failing(torch.utils.data.Dataset[Any]):
        left = 250  # 60 for the means, 60 for the outputs, then about 60 for each chunk

        def __init__(self) -> None:
            self.x, self.y = killable.data()
            self.targets = self.y.tolist()

        def __len__(self) -> int:
            return len(self.targets)

        def __getitem__(self, i: int) -> Any:
            self.left -= 1
            if self.left < 0:
                raise OSError("the disk is gone")
            return self.x[i], self.targets[i]

    data = Failing()
    model = killable.network()
    settings = {**SETTINGS, "augmented": False}
    with pytest.raises(OSError, match="the disk is gone"), assert_model_untouched(model):
        learn_to_store(model, data, path, **settings)
    held = TaskGates.load(path)
    assert 0 < len(held) < N_TASKS
    data.left = 10**9
    learn_to_store(model, data, path, resume=True, **settings)
    assert_same(path, whole)


# -- chunks ----------------------------------------------------------------------------------------


def test_a_chunk_depends_on_nothing_but_itself(whole: Path) -> None:
    with GateStore.open(whole) as store:
        means = store.means
    session = Session(
        killable.network(),
        killable.data(),
        recipe=killable.RECIPE,
        seed=3,
        run=RunOptions(batch_size=12),
    )
    expected = TaskGates.load(whole)
    for part in ([18, 19], [6, 7, 8], [0, 1, 2]):
        learned = session.learn(part, means=means)
        assert learned == expected.select(part)
        assert learned.logits is not None
        assert expected.logits is not None
        for name, value in learned.logits.items():
            assert torch.equal(value, expected.logits[name][part])


def test_only_what_is_missing_of_a_chunk_is_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gates.h5"
    held = [0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 15, 16, 17, 18]
    with GateStore.open(whole) as store:
        store.slice(held, path)
    learned, written = [], []
    learn, append = Session.learn, GateStore.append

    def noted(self: Session, tasks: Any = None, **options: Any) -> TaskGates:
        learned.append(tasks)
        return learn(self, tasks, **options)

    def noted_append(self: GateStore, gates: TaskGates, **options: Any) -> None:
        written.append(list(gates.tasks))
        append(self, gates, **options)

    monkeypatch.setattr(Session, "learn", noted)
    monkeypatch.setattr(GateStore, "append", noted_append)
    resume(path)
    assert learned == [[3, 4, 5], [12, 13, 14], [18, 19]]
    assert written == [[3, 5], [12, 13, 14], [19]]
    assert_same(path, whole)
    learned.clear()
    resume(path)
    assert learned == []


def test_order_of_the_list_of_tasks_does_not_matter(whole: Path, tmp_path: Path) -> None:
    shuffled = torch.randperm(N_TASKS, generator=torch.Generator().manual_seed(1)).tolist()
    resume(tmp_path / "gates.h5", tasks=shuffled)
    assert_same(tmp_path / "gates.h5", whole)


def test_same_gates_as_learn_gates(whole: Path) -> None:
    options = {k: v for k, v in SETTINGS.items() if k not in ("chunk_size", "recipe")}
    direct = learn_gates(killable.network(), killable.data(), None, SETTINGS["recipe"], **options)
    stored = TaskGates.load(whole)
    assert stored.recipe == direct.recipe
    for site in direct:
        assert torch.equal(stored[site], direct[site])
        assert torch.equal(stored.means[site], direct.means[site])
        # One run keeps the whole network's outputs from chunk to chunk, a store's chunks run them
        # in batches of their own, which round differently; constants show it, yes or no does not.
        torch.testing.assert_close(
            stored.constants[site], direct.constants[site], rtol=1e-6, atol=1e-6
        )


def test_default_chunk_is_what_shares_a_pass_and_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    model, data = killable.network(), killable.data()
    learn_to_store(model, data, path, [0, 1], killable.RECIPE, batch_size=17)
    with GateStore.open(path) as store:
        assert store.provenance["chunk_size"] == 4
    with pytest.raises(GateStoreError, match="chunk_size 4, not 3"):
        learn_to_store(
            model, data, path, None, killable.RECIPE, batch_size=17, chunk_size=3, resume=True
        )
    learn_to_store(model, data, path, None, killable.RECIPE, batch_size=17, resume=True)
    assert TaskGates.load(path).tasks == tuple(range(N_TASKS))


# -- means -----------------------------------------------------------------------------------------


def test_means_are_computed_once_and_read_from_then_on(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gates.h5"
    with GateStore.open(whole) as store:
        store.slice(range(10), path)
        kept = store.means
    computed = Session(killable.network(), killable.data(), recipe=SETTINGS["recipe"], seed=3)
    means = computed.means()
    assert means is not None
    assert kept is not None
    for name, mean in means.items():
        assert torch.equal(kept[name], mean.float())

    def never(self: Session) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(Session, "means", never)
    resume(path)
    assert_same(path, whole)


def test_recipes_without_means(tmp_path: Path) -> None:
    model, data = killable.network(), killable.data()
    for recipe in (
        Recipe(size=0.5, ablation="zero", steps=2, images_per_step=4),
        Recipe.paper(beta=0.1, epochs=2),
    ):
        path = tmp_path / f"{type(recipe).__name__}.h5"
        learn_to_store(model, data, path, [0, 3], recipe)
        assert TaskGates.load(path).means is None
        learn_to_store(model, data, path, [0, 3, 4], recipe, resume=True)
        gates = TaskGates.load(path)
        assert gates.select([0, 3]) == learn_gates(model, data, [0, 3], recipe)
        assert gates.select([4]) == learn_gates(model, data, [0, 3, 4], recipe).select([4])


# -- what a resumed run must not change ------------------------------------------------------------


def some(whole: Path, path: Path) -> Path:
    with GateStore.open(whole) as store:
        store.slice(range(6), path)
    return path


OTHERS: list[tuple[str, dict[str, Any], str]] = [
    ("model", {"model": killable.network(seed=1)}, "model"),
    ("data", {"data": killable.data(seed=1)}, "data"),
    ("seed", {"seed": 4}, "seed"),
    ("batch_size", {"batch_size": 8}, "batch_size 12, not 8"),
    ("chunk_size", {"chunk_size": 5}, "chunk_size 3, not 5"),
    ("amp", {"amp": True}, "amp"),
]


@pytest.mark.parametrize(("name", "changes", "message"), OTHERS, ids=[case[0] for case in OTHERS])
def test_resume_refuses_what_differs_unless_told(
    whole: Path, tmp_path: Path, name: str, changes: dict[str, Any], message: str
) -> None:
    path = some(whole, tmp_path / "gates.h5")
    before = path.read_bytes()
    with pytest.raises(GateStoreError, match=message):
        resume(path, **changes)
    with pytest.raises(GateStoreError, match=message):
        resume(path, **changes, may_differ=[other for other, *_ in OTHERS if other != name])
    assert path.read_bytes() == before
    resume(path, **changes, may_differ=[name])
    gates = TaskGates.load(path)
    assert gates.tasks == tuple(range(N_TASKS))
    assert gates.select(range(6)) == TaskGates.load(whole).select(range(6))
    with GateStore.open(path) as store:
        told, facts = store.result("resumed/0")
    assert told["task"] == [str(task) for task in range(6, N_TASKS)]
    assert facts["differs"] == [name]
    resume(path, **changes, may_differ=[name])  # there is nothing more to do, or to say
    with GateStore.open(path) as store:
        assert store.results == ("resumed/0",)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("sites", {"sites": ["1"]}),
        ("recipe", {"recipe": Recipe(size=0.3, steps=4, images_per_step=4)}),
    ],
)
def test_other_sites_or_recipe_need_another_file(
    whole: Path, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    path = some(whole, tmp_path / "gates.h5")
    with pytest.raises(GateStoreError, match=f"{name}.*another file"):
        resume(path, **changes)
    with pytest.raises(ValueError, match="may_differ must be"):
        resume(path, **changes, may_differ=[name])


def test_existing_file_is_neither_gone_on_with_nor_replaced_unasked(
    whole: Path, tmp_path: Path
) -> None:
    path = some(whole, tmp_path / "gates.h5")
    model, data = killable.network(), killable.data()
    with pytest.raises(FileExistsError, match=r"resume=True.*overwrite=True"):
        learn_to_store(model, data, path, **SETTINGS)
    with pytest.raises(ValueError, match="choose one"):
        resume(path, overwrite=True)
    assert len(TaskGates.load(path)) == 6
    learn_to_store(model, data, path, [3], overwrite=True, **SETTINGS)
    assert TaskGates.load(path).tasks == (3,)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"chunk_size": 0}, ValueError, "chunk_size"),
        ({"chunk_size": True}, ValueError, "chunk_size"),
        ({"may_differ": "seed"}, ValueError, "may_differ"),
        ({"may_differ": ["colour"]}, ValueError, "may_differ"),
        ({"task_names": ["a", "b"]}, ValueError, "2 names for 20 tasks"),
        ({"task_names": "abc"}, TypeError, "task_names"),
        ({"task_names": ["a"] * 20}, ValueError, "'a' is there twice"),
        ({"tasks": {"a": 0}, "task_names": ["b"]}, ValueError, "names already"),
        ({"tasks": [99]}, ValueError, "no image of task 99"),
        ({"recipe": "paper"}, TypeError, "recipe"),
        ({"seed": 0.5}, TypeError, "seed"),
    ],
)
def test_bad_input_leaves_no_file(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = tmp_path / "gates.h5"
    with pytest.raises(error, match=message):
        resume(path, **changes)
    assert list(tmp_path.iterdir()) == []


def test_foreign_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    path.write_text("no store")
    with pytest.raises(GateStoreError):
        resume(path)
    assert path.read_text() == "no store"


# -- names, progress, provenance -------------------------------------------------------------------


def test_tasks_keep_their_names(tmp_path: Path) -> None:
    model, data = killable.network(), killable.data()
    recipe = SETTINGS["recipe"]
    for number, (tasks, names) in enumerate(
        [
            ({"pair": (5, 4), "two": 2, "one": 1}, None),
            ([(4, 5), 2, 1], ["pair", "two", "one"]),
            ([2, (5, 4), 1], {1: "one", 2: "two", (4, 5): "pair", 9: "unused"}),
        ]
    ):
        path = tmp_path / f"{number}.h5"
        learn_to_store(model, data, path, tasks, recipe, task_names=names)
        gates = TaskGates.load(path)
        assert gates.tasks == (1, 2, (4, 5))
        assert gates.task_names == ("one", "two", "pair")


def test_progress_is_told(whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told: list[Progress] = []
    path = some(whole, tmp_path / "gates.h5")
    resume(path, show_progress=True, on_progress=told.append)
    first, last = told[0], told[-1]
    steps = 14 * killable.RECIPE.steps
    assert (first.done, first.found, first.steps, first.seconds_left) == (6, 6, 0, None)
    assert (last.done, last.total, last.found, last.lost) == (20, 20, 6, 0)
    assert (last.steps, last.n_steps, last.seconds_left) == (steps, steps, 0.0)
    assert sorted({progress.done for progress in told}) == [6, 9, 12, 15, 18, 20]
    shown = capfd.readouterr().err
    assert f"{steps}/{steps}" in shown
    assert "20/20 tasks saved" in shown


def test_provenance_says_what_was_run(tmp_path: Path) -> None:
    path = tmp_path / "gates.h5"
    resume(path, provenance={"model": "mynets:mlp", "note": "first try"})
    with GateStore.open(path) as store:
        facts = store.provenance
    assert facts["model"] == "mynets:mlp"
    assert facts["note"] == "first try"
    assert facts["seed"] == 3
    assert facts["n_images"] == 60
    assert facts["device"] == "cpu"
    assert facts["batch_size"] == 12
    assert len(facts["model_hash"]) == 64
    assert facts["data_fingerprint"]
    assert facts["environment"]["torch"] == torch.__version__
    resume(path)  # what was said beside does not have to be said again


def test_a_resumed_run_gives_the_same_constants(tmp_path: Path) -> None:
    recipe = Recipe(size=0.5, ablation="optimal", steps=4, images_per_step=4)
    settings = {**SETTINGS, "recipe": recipe}
    whole = learn_to_store(killable.network(), killable.data(), tmp_path / "a.h5", **settings)
    part = tmp_path / "b.h5"
    tasks = list(range(N_TASKS))
    learn_to_store(killable.network(), killable.data(), part, tasks[:6], **settings)
    assert TaskGates.load(part) != TaskGates.load(whole)
    resume(part, recipe=recipe)
    assert_same(part, whole)
    found, expected = TaskGates.load(part), TaskGates.load(whole)
    found, expected = found.select(tasks), expected.select(tasks)
    assert found.constants is not None
    assert found == expected
    # They equal those of learning in one call.
    at_once = learn_gates(killable.network(), killable.data(), recipe=recipe, seed=3, batch_size=12)
    for name, values in found.constants.items():
        torch.testing.assert_close(values, at_once.constants[name])
