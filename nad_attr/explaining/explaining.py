"""Explain a network's classes: split, learn, judge, follow the flow, draw the page."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from nad_attr.certainty.measuring import certainty as measure_certainty
from nad_attr.certainty.measuring import joined
from nad_attr.certainty.result import ChannelCertainty
from nad_attr.certainty.verdict import verdict
from nad_attr.certainty.verdict_result import Verdict
from nad_attr.data.labels import Task
from nad_attr.data.sources import ChosenSource, Data, Source, as_source
from nad_attr.evaluation.evaluating import evaluate
from nad_attr.evaluation.result import Evaluation
from nad_attr.explaining.parts import SIZES, Size, chosen_tasks, shortened, split
from nad_attr.explaining.promise import (
    CLOSING_IMAGES,
    N_ALTERNATIVES,
    N_PAIRS,
    N_RANDOM,
    N_VERDICT,
    STEPS,
    VERDICT_IMAGES,
    Passes,
    Promise,
    Rates,
    all_else,
    cost,
    measured_rates,
    n_certain,
    passes,
    promised,
)
from nad_attr.explaining.result import Explanation
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.runs import Progress, learn_to_store
from nad_attr.report.report import Report
from nad_attr.running.options import RunOptions
from nad_attr.stats.tables import duration
from nad_attr.store import GateStore, GateStoreError, result_names
from nad_attr.system.files import check_output

__all__ = ["explain"]

#: The name of the arguments in the store's provenance.
_ASKED = "explain"


def explain(
    model: nn.Module,
    data: Data,
    *,
    out: str | PathLike[str] | None = None,
    store: str | PathLike[str] | None = None,
    tasks: Sequence[object] | Mapping[str, object] | None = None,
    recipe: Recipe | None = None,
    quick: bool = False,
    minutes: float | None = None,
    certainty: bool | None = None,
    seed: int = 0,
    overwrite: bool = False,
    task_names: Mapping[Any, str] | None = None,
    provenance: Mapping[str, Any] | None = None,
    run: RunOptions | None = None,
    say: Callable[[str], object] | None = None,
    on_progress: Callable[[Progress], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Explanation:
    """Which channels the network needs for some of its classes, and whether that is true.

    This keeps some images apart, learns the gates of each task on the others
    (:func:`nad_attr.learn_to_store`), judges them on those kept apart
    (:func:`nad_attr.evaluation.evaluate`, :func:`nad_attr.certainty`, :func:`nad_attr.verdict`),
    measures what flows between channels (:func:`nad_attr.information_flow`), and draws a page
    (:class:`nad_attr.report.Report`). First it times a few passes and says how long all will take.

    Every step's result is saved in the store at once. After a crash or Ctrl-C the same call goes
    on; a call with other arguments is refused, and the error says what differs.

    Args:
        model: The network, in eval mode; unchanged afterwards.
        data: Images with labels, as :func:`nad_attr.learn_gates` takes them; they are split here.
        out: The page, HTML; None: none.
        store: The file of the gates; None: "gates.h5" beside the page, or none.
        tasks: Class indices, or ``{name: class index}``; None: the ten classes with the most images
            (fewer where it has to be quick).
        recipe: How gates are learned; None: ``Recipe()``.
        quick: Fewer tasks, steps and images.
        minutes: The largest size that takes no longer than that, by the timed passes.
        certainty: Whether to measure for each kept channel how sure it is and whether it is needed;
            then the verdict also says whether other runs find it again. None: for as many tasks as
            take no longer than all other steps, and for none with ``quick``.
        seed: Of the split and of everything else.
        overwrite: Replace the store if it is there.
        task_names: ``{class index: name}``; None: the dataset's ``classes``, if it has them.
        provenance: Further facts to keep in the store.
        run: How to run the network; see :class:`nad_attr.RunOptions`.
        say: Told what is being done, and how long it will take.
        on_progress: See :func:`nad_attr.learn_to_store`.
        clock: Tells seconds.

    Returns:
        The explanation; ``print(explanation.summary())`` says it in five lines.

    Raises:
        FileExistsError: If the store is there and was not begun by this function.
        GateStoreError: If it was begun with other arguments, or another network or data.
        GatingError, SiteError, TypeError: See :func:`nad_attr.learn_gates`.
        ImportError: If a page is asked for and the libraries that draw it are missing.
        OSError: If the page or the store cannot be written where it is asked for.
        ValueError: See there; also if a class has too few images, or not even the smallest size
            fits into ``minutes``.

    Example:
        >>> from nad_attr.evaluation import planted
        >>> known = planted("plain", n_classes=2, width=24, n_images=40)
        >>> found = explain(known.model, known.data, tasks=[1], recipe=Recipe(size=0.3, steps=10))
        >>> found.summary().splitlines()[0]
        'Asked: which of 72 channels does the network need for one class (1; 1 more left out)?'
    """
    if minutes is not None and (quick or not minutes > 0):
        raise ValueError(
            "quick and minutes are two ways to say the same; give one of them."
            if quick
            else f"minutes must be a number above 0, got {minutes!r}."
        )
    recipe = Recipe() if recipe is None else recipe
    if store is None and out is not None:
        store = Path(out).with_name("gates.h5")
    for path, kind in ((out, "text"), (store, "HDF5")):
        if path is not None:
            check_output(path, kind)
    lacking = [name for name in ("plotly", "PIL") if find_spec(name) is None]
    if out is not None and lacking:
        raise ImportError("a page needs plotly and Pillow: pip install 'nad-attr[report]'")
    if isinstance(tasks, Mapping):
        task_names = {**(task_names or {}), **{task: name for name, task in tasks.items()}}
        tasks = list(tasks.values())
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "gates.h5") if store is None else Path(store)
        source = as_source(data, any_labels=True)
        work = _Work(model, source, file, _names(data, task_names), seed, run, say, clock)
        if overwrite:
            file.unlink(missing_ok=True)
        asked = {
            "tasks": None if tasks is None else [_plain(task) for task in tasks],
            "recipe": recipe.to_json(),
            "quick": quick,
            "minutes": minutes,
            "certainty": certainty,
            "seed": seed,
        }
        begun = work.begun(asked)
        work.wants_certainty = certainty
        promise = work.plan(recipe, tasks, begun, quick, minutes, page=out is not None)
        parts = {"n_left_out": work.n_left_out, "n_learned": len(work.learned.labels)}
        told = {"asked": asked, "size": work.size_name, "split": parts}
        facts = {**(provenance or {}), _ASKED: told}
        work.learn(facts, on_progress)
        evaluation, sure = work.evaluated(), work.certain()
        tested = work.tested(sure)
        work.measure("flow")
        work.measure("pictures", "where")
        if out is not None:
            with work.step("page"):
                Report(file).save(out)
        gates = TaskGates.load(file)
        result = Explanation(
            tested.tasks,
            tested.task_names,
            work.n_left_out,
            len(work.learned.labels),
            len(work.judged.labels),
            evaluation,
            tested,
            promise.seconds,
            work.taken,
            "" if store is None else str(store),
            "" if out is None else str(out),
            gates,
            sure,
        )
        result.save(file)
    return result


def _plain(task: object) -> object:
    return list(task) if isinstance(task, (tuple, list)) else task


def _names(data: Any, given: Mapping[Any, str] | None) -> dict[Any, str]:
    """What is known of the classes' names."""
    if given is not None:
        return dict(given)
    while hasattr(data, "dataset") and not hasattr(data, "classes"):
        data = data.dataset
    return {k: str(name) for k, name in enumerate(getattr(data, "classes", None) or ())}


class _Work:
    """The steps; each looks first whether the store has its result."""

    def __init__(
        self,
        model: nn.Module,
        source: Source,
        file: Path,
        names: dict[Any, str],
        seed: int,
        run: RunOptions | None,
        say: Callable[[str], object] | None,
        clock: Callable[[], float],
    ) -> None:
        self.model, self.source, self.file, self.names = model, source, file, names
        self.seed, self.run, self.clock = seed, run, clock
        self.say = say or (lambda text: None)
        self.taken: dict[str, float] = {}
        self.tasks: list[Task]
        self.n_left_out: int
        self.learned: ChosenSource
        self.judged: ChosenSource
        self.recipe: Recipe
        self.wants_certainty: bool | None = None
        self.sure: list[Task] = []
        self.affordable = 0

    def begun(self, asked: Mapping[str, Any]) -> str | None:
        """The name of the size that the store was begun with; None: there is no store."""
        if not self.file.exists():
            return None
        with GateStore.open(self.file) as store:
            known = store.provenance.get(_ASKED)
        if not isinstance(known, dict) or known.get("size") not in SIZES:
            raise FileExistsError(
                f"{self.file} is there already and was not begun by explain: name another file "
                "(store), or replace it (overwrite)."
            )
        before = known.get("asked") or {}
        other = [name for name in asked if before.get(name) != asked[name]]
        if other:
            said = ", ".join(
                "another recipe"
                if name == "recipe"
                else f"{name} {before.get(name)!r}, not {asked[name]!r}"
                for name in other
            )
            raise GateStoreError(
                f"{self.file} was begun with {said}: ask for the same to go on, name another file "
                "(store), or replace it (overwrite)."
            )
        return str(known["size"])

    def plan(
        self,
        recipe: Recipe,
        tasks: Sequence[object] | None,
        begun: str | None,
        quick: bool,
        minutes: float | None,
        *,
        page: bool,
    ) -> Promise:
        """Choose the size, and say how long it will take."""
        self.size_name = begun or ("quick" if quick else "full")
        self._prepare(self.size_name, recipe, tasks)
        given = (self.model, self.learned, self.tasks, self.recipe)
        rates, n_kept = measured_rates(*given, seed=self.seed, run=self.run, clock=self.clock)
        promise = self._promise(rates, n_kept, page)
        if minutes is not None and begun is None:
            for name in SIZES:
                self.size_name = name
                self._prepare(name, recipe, tasks)
                promise = self._promise(rates, n_kept, page)
                if promise.total <= 60 * minutes:
                    break
            else:
                raise ValueError(
                    f"{minutes:g} minutes are too few: the smallest size takes about "
                    f"{duration(promise.total)}. Give more, or fewer tasks or smaller images."
                )
        named = ", ".join(self.names.get(task, str(task)) for task in self.tasks)
        left = f" (of {len(self.tasks) + self.n_left_out:,})" if self.n_left_out else ""
        self.say(f"explaining: {named}{left}")
        self.say(
            f"learning from {len(self.learned.labels):,} images, judging on "
            f"{len(self.judged.labels):,} others"
        )
        if self.recipe != recipe:
            fewer = f"{self.recipe.steps} steps of learning for each class, not {recipe.steps}"
            runs = f", in {self.recipe.replicas} runs and a last one, not {recipe.replicas} and one"
            self.say(fewer + (runs if self.recipe.replicas < recipe.replicas else ""))
        if len(self.sure) < len(self.tasks) and self.wants_certainty is not False:
            some = f"about {len(self.sure)}" if self.sure else "none"
            self.say(
                f"certainty of {some} of the {len(self.tasks)} classes, to save time "
                "(certainty: of all)"
            )
        steps = ", ".join(f"{step} {duration(s)}" for step, s in promise.seconds.items())
        self.say(
            f"this will take about {duration(promise.total)} ({promise.n_passes:,} images through "
            f"the network): {steps}"
        )
        if self.size_name == "full" and minutes is None and begun is None:
            kept = vars(self).copy()
            self._prepare("quick", recipe, tasks)
            self.size_name = "quick"
            faster = self._promise(rates, n_kept, page).total
            vars(self).update(kept)
            if faster < 0.7 * promise.total:
                self.say(f"a quicker size (quick) would take about {duration(faster)}")
        return promise

    def _prepare(self, name: str, recipe: Recipe, tasks: Sequence[object] | None) -> None:
        size: Size = SIZES[name]
        labels = self.source.labels
        self.tasks, self.n_left_out = chosen_tasks(labels, tasks, size.n_tasks, self.names)
        parts = split(labels, self.tasks, size.n_judged, self.seed)
        self.learned = ChosenSource(self.source, parts.learned)
        self.judged = ChosenSource(self.source, parts.judged)
        self.recipe = shortened(recipe, size.steps)

    def _promise(self, rates: Rates, n_kept: int, page: bool) -> Promise:
        missing: list[Task] = list(self.tasks)
        done: set[str] = set()
        sure: tuple[Task, ...] = ()
        if self.file.exists():
            with GateStore.open(self.file) as store:
                missing = [task for task in self.tasks if task not in store]
            kept = set(result_names(self.file))
            groups = {step: step for step in ("evaluation", "certainty", "verdict")}
            groups |= {step: f"report/{step}" for step in ("flow", "pictures")}
            done = {step for step, group in groups.items() if group in kept}
            if "certainty" in kept and "verdict" not in kept:
                sure = ChannelCertainty.load(self.file, "certainty").tasks

        def every(missing: Sequence[Task], certain: Sequence[Task]) -> dict[str, Passes]:
            return passes(
                self.learned, self.judged, self.tasks, self.recipe, n_kept, missing, certain
            )

        self.sure = [] if self.wants_certainty is False else list(self.tasks)
        if self.wants_certainty is None:
            whole = every(self.tasks, self.tasks)
            self.affordable = all_else(whole)
            n = n_certain(whole, len(self.tasks)) if SIZES[self.size_name].certain else 0
            self.sure = self.tasks[:n]
        unsure = [task for task in self.sure if task not in sure]
        counted = every(missing, unsure)
        skip = done - ({"certainty"} if sure else set())
        skip |= (set() if page else {"page"}) | (set() if unsure else {"certainty"})
        todo = {step: counted[step] for step in STEPS if step not in skip}
        return promised(todo, rates, fits="fit" in counted["verdict"], certain=len(unsure))

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.say(f"{name} ...")
        began = self.clock()
        yield
        self.taken[name] = self.clock() - began

    def learn(
        self, facts: Mapping[str, Any], on_progress: Callable[[Progress], object] | None
    ) -> None:
        """Learn what is missing; check the network and images in any case."""
        names = [self.names.get(task, str(task)) for task in self.tasks]
        # Some classes of ImageNet share a name.
        named = {
            task: name if names.count(name) == 1 else f"{name} ({task})"
            for task, name in zip(self.tasks, names, strict=True)
        }
        with self.step("learning"):
            learn_to_store(
                self.model,
                self.learned,
                self.file,
                self.tasks,
                self.recipe,
                seed=self.seed,
                run=self.run,
                resume=True,
                task_names=named,
                provenance=facts,
                on_progress=on_progress,
            )
        self.gates = TaskGates.load(self.file)

    def evaluated(self) -> Evaluation:
        if "evaluation" in result_names(self.file):
            return Evaluation.load(self.file, "evaluation")
        with self.step("evaluation"):
            found = evaluate(
                self.model, self.gates, self.judged, n_random=N_RANDOM, seed=self.seed, run=self.run
            )
            found.save(self.file, "evaluation")
        return found

    def certain(self) -> ChannelCertainty | None:
        """The certainty of some of the tasks; None: of no task.

        Each task is saved when it is done. The first shows how many closings a task needs; tasks
        follow as long as they cost no more than everything else.
        """
        names = result_names(self.file)
        found = ChannelCertainty.load(self.file, "certainty") if "certainty" in names else None
        grouped = any(site.group_of is not None for site in self.gates.sites)
        if grouped and self.wants_certainty:
            self.say("no certainty: a gate of this network is of several channels")
        if not self.sure or grouped or "verdict" in names or not self.unsure(found):
            return found
        with self.step("certainty"):
            for task in self.unsure(found):
                given = (self.model, self.gates.select([task]), self.learned, self.judged)
                how: dict[str, Any] = {"pairs": N_PAIRS, "images": CLOSING_IMAGES}
                how |= {"alternatives": N_ALTERNATIVES, "seed": self.seed, "run": self.run}
                one = measure_certainty(*given, **how)
                found = one if found is None else joined([found, one])
                found.save(self.file, "certainty")
                if not self.unsure(found):
                    break
        return found

    def unsure(self, found: ChannelCertainty | None) -> list[Task]:
        """The tasks whose certainty is still to be measured."""
        done = () if found is None else found.tasks
        left = [task for task in self.tasks if task not in done]
        if found is None or self.wants_certainty:
            return left
        spent = cost({"learn": found.passes["learning"], "run": found.passes["testing"]})
        return left if spent + spent / len(done) <= self.affordable else []

    def tested(self, sure: ChannelCertainty | None) -> Verdict:
        if "verdict" in result_names(self.file):
            return Verdict.load(self.file, "verdict")
        with self.step("verdict"):
            how: dict[str, Any] = {"n_random": N_VERDICT, "n_images": VERDICT_IMAGES}
            how |= {"certainty": sure, "seed": self.seed, "run": self.run}
            found = verdict(self.model, self.gates, self.learned, self.judged, **how)
            found.save(self.file, "verdict")
        return found

    def measure(self, part: str, *more: str) -> None:
        """A part of the page, and what goes with it."""
        if f"report/{part}" in result_names(self.file):
            return
        with self.step(part):
            how: dict[str, Any] = {"n_images": len(self.judged.labels), "seed": self.seed}
            report = Report(self.file)
            report.measure(self.model, self.judged, parts=[part, *more], run=self.run, **how)
            for note in report.results.notes:
                self.say(note)
            report.keep()
