"""Task gates: for each task, one number in [0, 1] per channel of every gate site."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nad_attr._checks import check_mapping
from nad_attr._display import MOST_ROWS, html_table
from nad_attr.data.labels import Task, as_task, first_tasks
from nad_attr.gates.channels import (
    budget,
    check_means,
    distinct_sites,
    float_copy,
    n_channels,
    top_k_masks,
)
from nad_attr.gates.history import History
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.sub_architecture import SubArchitecture, fitting, same_tensors
from nad_attr.sites.site import GateSite
from nad_attr.stats.results import Result
from nad_attr.stats.tables import table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Task", "TaskGates", "as_task"]


def _check_listed(tasks: object) -> None:
    if not isinstance(tasks, Iterable) or isinstance(tasks, (str, bytes)):
        raise TypeError(f"tasks must be a list of tasks, got {tasks!r}.")


def _map(
    values: Mapping[str, Tensor] | None, function: Callable[[Tensor], Tensor]
) -> dict[str, Tensor] | None:
    return None if values is None else {name: function(v) for name, v in values.items()}


class TaskGates(Result):
    """The gates of T tasks at all sites.

    Made by :func:`nad_attr.learn_gates`. A channel belongs to a task's sub-architecture iff its
    gate is above one half.

    Args:
        gates: ``{site name: (T, C)}`` in [0, 1].
        sites: The gate sites, in forward order.
        tasks: T class indices or tuples of class indices.
        logits: ``{site name: (T, C)}``, from which the gates were made: they rank the channels when
            another size is asked for. None: the gates rank.
        means: ``{site name: (C,)}``, what replaces a closed channel; None: zero.
        constants: ``{site name: (T, C)}``, what replaces a closed channel for each task, in place
            of ``means``: the best constants, which are learned together with the gates.
        recipe: The recipe that they were learned with.
        history: The learning curves.
        task_names: T names, for display and look-up.
        info: Further numbers, strings and lists of them.

    ``sites``, ``tasks``, ``means``, ``recipe``, ``history``, ``task_names`` and ``info`` are
    attributes too.

    Raises:
        TypeError: If an argument has a wrong type.
        ValueError: If shapes do not fit, a task is there twice or gates leave [0, 1].

    Example:
        >>> import torch
        >>> site = GateSite("layer1", 3, 1)
        >>> gates = TaskGates({"layer1": torch.tensor([[0.9, 0.2, 0.6]])}, [site], [7])
        >>> gates["layer1"].shape
        torch.Size([1, 3])
        >>> gates.sub_architecture(7)["layer1"]
        tensor([ True, False,  True])
        >>> gates.sub_architecture(7, size=1 / 3)["layer1"]
        tensor([ True, False, False])

    Two are equal if sites, tasks, gates, logits, means and constants are. Task names, recipe,
    history and info are not compared.
    """

    _ALONE = True

    def __init__(
        self,
        gates: Mapping[str, Tensor],
        sites: Sequence[GateSite],
        tasks: Sequence[Task],
        *,
        logits: Mapping[str, Tensor] | None = None,
        means: Mapping[str, Tensor] | None = None,
        constants: Mapping[str, Tensor] | None = None,
        recipe: Recipe | None = None,
        history: History | None = None,
        task_names: Sequence[str] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> None:
        self.sites = distinct_sites(sites)
        _check_listed(tasks)
        self.tasks: tuple[Task, ...] = tuple(as_task(task) for task in tasks)
        if not self.sites or not self.tasks:
            raise ValueError("task gates need at least one site and one task.")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"a task is there twice: {self.tasks}.")
        if isinstance(task_names, str):
            raise TypeError(f"task_names must be a list of names, got {task_names!r}.")
        self.task_names = None if task_names is None else tuple(str(name) for name in task_names)
        if self.task_names is not None and len(self.task_names) != len(self.tasks):
            raise ValueError(f"{len(self.task_names)} names for {len(self.tasks)} tasks.")
        for name in self.task_names or ():
            if self.task_names.count(name) > 1:  # type: ignore[union-attr]
                raise ValueError(f"the name {name!r} is there twice.")
        if recipe is not None and not isinstance(recipe, Recipe):
            raise TypeError(f"recipe must be a Recipe, got {type(recipe).__name__}.")
        if history is not None and not isinstance(history, History):
            raise TypeError(f"history must be a History, got {type(history).__name__}.")
        if any(curve.shape[1] != len(self.tasks) for curve in (history or {}).values()):
            raise ValueError(f"the history must be of {len(self.tasks)} tasks.")
        if info is not None and not isinstance(info, Mapping):
            raise TypeError(f"info must be a dictionary, got {type(info).__name__}.")
        self._gates = self._checked(gates, "gates")
        for name, gate in self._gates.items():
            if not bool(((gate >= 0) & (gate <= 1)).all()):
                raise ValueError(f"gates of {name!r} must lie in [0, 1].")
        self._logits = None if logits is None else self._checked(logits, "logits")
        self.means = check_means(means, self.sites)
        self._constants = None if constants is None else self._checked(constants, "constants")
        for name, value in (self._constants or {}).items():
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"constants of {name!r} are not finite.")
        self.recipe = recipe
        self.history = history
        self.info: dict[str, Any] = dict(info or {})

    @classmethod
    def _of_checked(
        cls,
        gates: dict[str, Tensor],
        sites: tuple[GateSite, ...],
        tasks: tuple[Task, ...],
        *,
        logits: dict[str, Tensor] | None,
        means: Mapping[str, Tensor] | None,
        constants: dict[str, Tensor] | None = None,
        recipe: Recipe | None,
        history: History | None,
        task_names: tuple[str, ...] | None,
        info: Mapping[str, Any],
    ) -> TaskGates:
        """Make one from values that a file's reader checked; gates and logits are not copied.

        Another check takes as long as reading them.
        """
        made = cls.__new__(cls)
        made.sites, made.tasks, made.task_names = sites, tasks, task_names
        made._gates, made._logits, made._constants = gates, logits, constants
        made.means = None if means is None else {n: mean.clone() for n, mean in means.items()}
        made.recipe, made.history, made.info = recipe, history, dict(info)
        return made

    def _checked(self, values: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        check_mapping(values, what)
        names = [site.name for site in self.sites]
        if set(values) != set(names):
            raise ValueError(f"{what} are for {list(values)}, the sites are {names}.")
        checked = {}
        for site in self.sites:
            value = float_copy(values[site.name], f"{what} of {site.name!r}")
            expected = (len(self.tasks), site.n_channels)
            if tuple(value.shape) != expected:
                raise ValueError(
                    f"{what} of {site.name!r} have shape {tuple(value.shape)}, not (tasks, "
                    f"channels) = {expected}."
                )
            if bool(value.isnan().any()):
                raise ValueError(f"{what} of {site.name!r} hold NaN.")
            checked[site.name] = value
        return checked

    def __getitem__(self, name: str) -> Tensor:
        """The gates of a site: float32 (T, C)."""
        try:
            return self._gates[name].clone()
        except KeyError:
            raise KeyError(f"no gate site {name!r}; there are {list(self._gates)}.") from None

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self.tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._gates)

    @property
    def _names(self) -> tuple[str, ...]:
        return self.task_names or tuple(map(str, self.tasks))

    def keys(self) -> Iterable[str]:
        """The site names, in forward order."""
        return self._gates.keys()

    @property
    def logits(self) -> dict[str, Tensor] | None:
        """``{site name: float32 (T, C)}`` that rank the channels (copies), or None."""
        return _map(self._logits, Tensor.clone)

    @property
    def constants(self) -> dict[str, Tensor] | None:
        """``{site name: float32 (T, C)}``, the constants of each task (copies), or None."""
        return _map(self._constants, Tensor.clone)

    @property
    def closed_at(self) -> str:
        """What replaces closed channels, in words: zero, their mean, or their best constants."""
        if self._constants is not None:
            return f"at their best constants{fitting(self.fitted_on)}"
        return "zero" if self.means is None else "at their mean"

    @property
    def fitted_on(self) -> int | None:
        """On how many images the constants were learned, if there are any."""
        n_images = self.info.get("n_images")
        return n_images if self._constants is not None and isinstance(n_images, int) else None

    def _means_of(self, rows: int | list[int]) -> Mapping[str, Tensor] | None:
        """What replaces closed channels: (C,) for a row or for all, (rows, C) for several."""
        return self.means if self._constants is None else _map(self._constants, lambda v: v[rows])

    @property
    def n_channels(self) -> int:
        """Channels over all sites."""
        return n_channels(self.sites)

    def index(self, task: object) -> int:
        """Row of a task, given as class index, group of class indices, or task name.

        Raises:
            KeyError: If these gates hold no such task.
        """
        if isinstance(task, str):
            if self.task_names is not None and task in self.task_names:
                return self.task_names.index(task)
        else:
            wanted = as_task(task)
            if wanted in self.tasks:
                return self.tasks.index(wanted)
        known = first_tasks(self.tasks)
        raise KeyError(f"no gates for task {task!r}; learned tasks are {known}.")

    def gates_of(self, task: object) -> dict[str, Tensor]:
        """``{site name: float32 (C,)}`` of one task.

        Raises:
            KeyError: If these gates hold no such task.
        """
        row = self.index(task)
        return {name: gate[row].clone() for name, gate in self._gates.items()}

    def sub_architecture(self, task: object, size: float | None = None) -> SubArchitecture:
        """The channels one task keeps.

        Args:
            task: Class index, group of class indices, or task name.
            size: None: channels with a gate above one half (the default recipe's size, exactly).
                A number in (0, 1]: the ``round(size * channels)`` highest-ranked channels over all
                sites.

        Raises:
            KeyError: If these gates hold no such task.
            ValueError: If ``size`` is not in (0, 1].
        """
        row = self.index(task)
        if size is None:
            masks = {name: gate[row] > 0.5 for name, gate in self._gates.items()}
        else:
            ranks = self._logits if self._logits is not None else self._gates
            scores = {name: value[row] for name, value in ranks.items()}
            masks = top_k_masks(scores, self.sites, budget(size, self.sites))
        return SubArchitecture(
            masks,
            self.sites,
            task=self.tasks[row],
            means=self._means_of(row),
            own_constants=self._constants is not None,
            fitted_on=self.fitted_on,
        )

    def sub_architectures(self, size: float | None = None) -> list[SubArchitecture]:
        """The sub-architecture of every task, in the order of ``tasks``."""
        found: list[SubArchitecture] = []
        for task in self.tasks:
            found.append(self.sub_architecture(task, size))
            if self._constants is None:
                found[-1].means = found[0].means  # one copy for all
        return found

    def select(self, tasks: Sequence[object]) -> TaskGates:
        """The gates of some of the tasks, in the given order.

        Raises:
            KeyError: If these gates hold no such task.
        """
        _check_listed(tasks)
        rows = [self.index(task) for task in tasks]
        return TaskGates(
            {name: gate[rows] for name, gate in self._gates.items()},
            self.sites,
            [self.tasks[row] for row in rows],
            logits=_map(self._logits, lambda value: value[rows]),
            means=self.means,
            constants=_map(self._constants, lambda value: value[rows]),
            recipe=self.recipe,
            history=None if self.history is None else self.history.select(rows),
            task_names=None if self.task_names is None else [self.task_names[r] for r in rows],
            info=self.info,
        )

    def _gating(
        self, tasks: Task | Sequence[Task] | None
    ) -> tuple[Mapping[str, Tensor], tuple[GateSite, ...], Mapping[str, Tensor] | None]:
        if tasks is None:
            if len(self.tasks) > 1:
                raise ValueError(
                    f"these gates are for {len(self.tasks)} tasks; say which with tasks=: one "
                    "task for the whole batch, or a list with one task per image."
                )
            return self.gates_of(self.tasks[0]), self.sites, self._means_of(0)
        if isinstance(tasks, Tensor):
            tasks = tasks.tolist()
        # A tuple is one task if it is a known group of classes, and else one task per image.
        if isinstance(tasks, (int, str)) or (isinstance(tasks, tuple) and tasks in self.tasks):
            return self.gates_of(tasks), self.sites, self._means_of(self.index(tasks))
        if not isinstance(tasks, Iterable):
            raise TypeError(f"tasks must be a task or a list of tasks, got {tasks!r}.")
        rows = [self.index(task) for task in tasks]
        if not rows:
            raise ValueError("tasks is empty; name one task, or one for each image.")
        gates = {name: gate[rows] for name, gate in self._gates.items()}
        return gates, self.sites, self._means_of(rows)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TaskGates):
            return NotImplemented
        return (self.sites, self.tasks) == (other.sites, other.tasks) and all(
            same_tensors(getattr(self, name), getattr(other, name))
            for name in ("_gates", "_logits", "means", "_constants")
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        sizes = [arch.size for arch in self.sub_architectures()]
        mean = 100 * sum(sizes) / len(sizes)
        tasks = f"{len(self)} task" + ("s" if len(self) > 1 else "")
        sites = f"{len(self.sites)} site" + ("s" if len(self.sites) > 1 else "")
        return (
            f"TaskGates({tasks}, {sites}, {self.n_channels:,} channels, {mean:.1f} % kept, "
            f"closed channels {self.closed_at.partition(',')[0]})"
        )

    def _repr_html_(self) -> str:
        archs = self.sub_architectures()
        names = self._names
        mean = sum(arch.size for arch in archs) / len(archs)
        shown = MOST_ROWS // 2
        tasks = html_table(
            f"Task gates: {len(self)} task{'s' * (len(self) != 1)}, {len(self.sites)} "
            f"site{'s' * (len(self.sites) != 1)}, {self.n_channels:,} channels, "
            f"{100 * mean:.1f} % kept",
            ["task", "kept channels"],
            [
                [name, f"{arch.n_kept:,}"]
                for name, arch in zip(names[:shown], archs[:shown], strict=True)
            ],
            bars=[arch.size for arch in archs[:shown]],
            note=f"and {len(self) - shown} more tasks" if len(self) > shown else "",
        )
        sites = self.sites[:shown]
        means = [float((self._gates[s.name] > 0.5).float().mean()) for s in sites]
        rest = len(self.sites) - len(sites)
        closed = f"closed channels {self.closed_at}"
        return tasks + html_table(
            "Mean over tasks",
            ["site", "channels", "kept"],
            [
                [site.name, f"{site.n_channels:,}", f"{100 * share:.0f} %"]
                for site, share in zip(sites, means, strict=True)
            ],
            bars=means,
            note=(f"and {rest} more sites; " if rest else "") + closed,
        )

    def _records(self) -> list[dict[str, Any]]:
        pairs = zip(self._names, self.sub_architectures(), strict=True)
        return [row for name, arch in pairs for row in arch._records(name)]

    def summary(self) -> str:
        """Kept channels of each task, over all sites, as plain text."""
        pairs = zip(self._names, self.sub_architectures(), strict=True)
        cells = [[name, f"{arch.n_kept:,}", f"{arch.size:.3f}"] for name, arch in pairs]
        return "\n".join([repr(self), *table([["task", "kept channels", "size"], *cells])])

    def plot(self, tasks: Sequence[object] = (), axes: Any = None) -> Figure:
        """Draw the share of channels kept at each site.

        Args:
            tasks: Tasks that get a line of their own, beside the mean over tasks.
            axes: One matplotlib Axes; None: a new figure.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        from nad_attr.evaluation.figures.gates import plot_sizes

        return plot_sizes(self, tasks, axes=axes)

    @classmethod
    def _types(cls) -> dict[str, Any]:
        tensors = dict[str, Tensor] | None
        return {
            "gates": dict[str, Tensor], "sites": tuple[GateSite, ...], "tasks": tuple[Any, ...],
            "logits": tensors, "means": tensors, "constants": tensors, "recipe": str | None,
            "history": History | None, "task_names": tuple[str, ...] | None, "info": dict[str, Any],
        }  # fmt: skip

    def _fields(self) -> dict[str, Any]:
        recipe = None if self.recipe is None else self.recipe.to_json()
        made = {"gates": self._gates, "recipe": recipe}
        return {name: made[name] if name in made else getattr(self, name) for name in self._types()}

    @classmethod
    def _of_fields(cls, fields: dict[str, Any]) -> TaskGates:
        text = fields["recipe"]
        return cls(**{**fields, "recipe": None if text is None else Recipe.from_json(text)})

    def _save_hdf5(self, path: str | PathLike[str], group: str | None) -> None:
        from nad_attr.store import write_task_gates

        write_task_gates(self, path)

    @classmethod
    def _load_hdf5(cls, path: str | PathLike[str], group: str | None) -> TaskGates:
        from nad_attr.store import read_task_gates

        return read_task_gates(path)
