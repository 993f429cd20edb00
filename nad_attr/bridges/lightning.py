"""A Lightning callback: learn, measure and log sub-architectures when training ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from nad_attr.data.labels import Labels
from nad_attr.data.sources import Data, as_source, loading, numbers_of
from nad_attr.evaluation import Evaluation, evaluate
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.task_gates import TaskGates
from nad_attr.learning.api import learn_gates
from nad_attr.learning.session import check_recipe
from nad_attr.running.forward import Runner, check_classes
from nad_attr.running.options import RunOptions, as_options

if TYPE_CHECKING:
    _Callback: type[Any] = object
else:
    # The package never imports this module, so Lightning is imported with it alone.
    try:
        from lightning.pytorch import Callback as _Callback
    except ImportError:
        try:
            from pytorch_lightning import Callback as _Callback
        except ImportError:
            _Callback = object

__all__ = ["LearnSubArchitectures"]

#: Images that are tried before training.
N_TRIED = 32
#: Measures that are logged, as means over tasks.
MEASURES = ("size", "own_auc", "other_auc", "fidelity", "recall", "fpr", "ba", "target_r2")


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put all modules into eval mode, and restore each module's mode afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, flag in flags:
            module.training = flag


class LearnSubArchitectures(_Callback):  # type: ignore[misc]  # Lightning is not checked
    """Learn the gates of a network's classes when its training ends, and log their measures.

    A Lightning callback (``lightning`` or ``pytorch_lightning``). It works on the first process
    alone; the others wait, and fail with it. A few images and labels are tried before the first
    training step, unless they come from a stream. Labels are class indices, several labels an
    image, or targets; see :class:`nad_attr.Labels`. The module's weights, flags and hooks are
    unchanged afterwards. The logged numbers are means over tasks on held-out images:
    ``nad/own_auc``, ``nad/fidelity``, ``nad/recall``, ``nad/fpr`` and so on, the random channels'
    own AUC and fidelity (``nad/random/own_auc``), and each task's own AUC
    (``nad/own_auc/<task>``). If images have targets, ``target_r2`` replaces ``own_auc``.


    Args:
        data: What gates are learned from, as for :func:`nad_attr.learn_gates`. None: the trainer's
            training data, which in a run of several processes are this process's share. If they
            are augmented, so are the images that gates are learned from.
        held_out: What they are measured on. None: the trainer's validation data; if it has none,
            gates are learned and nothing is measured.
        tasks: Class indices, groups of them, or ``{name: task}``. None: all classes of the data.
        recipe: How gates are learned. None: the default recipe.
        network: Which module is the classifier: the name of a submodule, or a function of the
            LightningModule. None: the LightningModule itself, whose ``forward`` returns (B, K).
        forward_func: Called as ``forward_func(network, *inputs)`` in place of the network, for
            networks that return something else than (B, K).
        path: Where to save the gates. None: ``gates.h5`` in the first logger's folder (or the
            trainer's root folder). False: nowhere.
        seed: Of learning and measuring.
        run: How to run the network, except for ``forward_func``; see :class:`nad_attr.RunOptions`.

    Attributes:
        gates: The gates, after training; None before, and on all processes but the first.
        evaluation: What they are worth on held-out images, if there are any.

    Raises:
        ImportError: If Lightning is missing.

    Example:
        >>> callback = LearnSubArchitectures(tasks=[0, 1], recipe=Recipe(size=0.4), path=False)
        >>> callback.gates is None
        True
    """

    def __init__(
        self,
        data: Data | None = None,
        held_out: Data | None = None,
        *,
        tasks: Sequence[object] | Mapping[str, object] | None = None,
        recipe: Recipe | None = None,
        network: str | Callable[[Any], nn.Module] | None = None,
        forward_func: Callable[..., Any] | None = None,
        path: str | PathLike[str] | bool | None = None,
        seed: int = 0,
        run: RunOptions | None = None,
    ) -> None:
        if _Callback is object and not TYPE_CHECKING:
            raise ImportError(
                "LearnSubArchitectures needs Lightning: pip install lightning (or "
                "pytorch-lightning)"
            )
        if path is True:
            raise ValueError("path must be a file, None for a default place, or False for none.")
        super().__init__()
        self.data, self.held_out = data, held_out
        self.tasks, self.recipe, self.network = tasks, recipe, network
        self.forward_func, self.path, self.seed = forward_func, path, seed
        self.run = as_options(run)
        if self.run.forward_func is not None:
            raise ValueError(
                "forward_func is an argument of LearnSubArchitectures itself, which calls it with "
                "the network; leave it out of run=."
            )
        self.gates: TaskGates | None = None
        self.evaluation: Evaluation | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Check before the first step what is needed at the end; Lightning calls this.

        Raises:
            RuntimeError: On the other processes, if the first one has failed.
            ValueError: If gates cannot be learned from such images and labels, or of this network.
        """
        _first_alone(trainer, lambda: self._check(trainer, pl_module))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Lightning calls this when training has ended.

        Raises:
            RuntimeError: On the other processes, if the first one has failed.
            ValueError: If there is nothing to learn from, or no such network.
        """
        _first_alone(trainer, lambda: self._run(trainer, pl_module))

    def _check(self, trainer: Any, pl_module: Any) -> None:
        model, forward_func, data, held_out = self._given(trainer, pl_module)
        with torch.inference_mode(False), torch.no_grad(), _eval_mode(pl_module):
            for what, images in (("data", data), ("held_out", held_out)):
                some = None if images is None else _some(images)
                if some is None:
                    continue
                try:
                    source = as_source(some, any_labels=True)
                    runner = Runner(model, replace(self.run, forward_func=forward_func))
                    runner.fit(source)
                    if self.recipe is not None:
                        check_recipe(self.recipe, source.labels)
                    (inputs,) = runner.draw(source, [list(range(len(source.labels)))[:N_TRIED]])
                    check_classes(source.labels, [0], runner(inputs).shape[1])
                except (TypeError, ValueError) as error:
                    where = "the trainer's own" if getattr(self, what) is None else f"{what}="
                    raise ValueError(
                        f"LearnSubArchitectures cannot use {where} "
                        f"{'training' if what == 'data' else 'validation'} images at the end of "
                        f"this training: {error} Give it {what}= with other images or "
                        "labels, network= the classifier, or forward_func=; nothing has been "
                        "trained yet."
                    ) from error

    def _given(self, trainer: Any, pl_module: Any) -> tuple[nn.Module, Any, Data, Data | None]:
        """The network, how it is called, what to learn from and to measure on."""
        model = self._network(pl_module)
        data = self.data if self.data is not None else _only(trainer.train_dataloader, "training")
        held_out = self.held_out
        if held_out is None and trainer.val_dataloaders is not None:
            held_out = _only(trainer.val_dataloaders, "validation")
        if data is None:
            raise ValueError(
                "there are no training data to learn gates from; give LearnSubArchitectures data=."
            )
        forward_func = None
        if self.forward_func is not None:
            given = self.forward_func

            def forward_func(*inputs: Any) -> Any:
                return given(model, *inputs)

        return model, forward_func, data, held_out

    def _run(self, trainer: Any, pl_module: Any) -> None:
        model, forward_func, data, held_out = self._given(trainer, pl_module)
        run = replace(self.run, forward_func=forward_func)
        common: dict[str, Any] = {"seed": self.seed, "run": run}
        with torch.inference_mode(False), torch.enable_grad(), _eval_mode(pl_module):
            self.gates = learn_gates(model, data, self.tasks, self.recipe, **common)
            if held_out is not None:
                self.evaluation = evaluate(model, self.gates, held_out, **common)
        if self.path is not False:
            path = self._path(trainer)
            path.parent.mkdir(parents=True, exist_ok=True)
            self.gates.save(path)
        metrics = self.metrics()
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=trainer.global_step)
            logger.save()

    def _network(self, pl_module: Any) -> nn.Module:
        if self.network is None:
            found = pl_module
        elif isinstance(self.network, str):
            try:
                found = pl_module.get_submodule(self.network)
            except AttributeError as error:
                raise ValueError(f"network={self.network!r}: {error}.") from error
        else:
            found = self.network(pl_module)
        if not isinstance(found, nn.Module):
            raise TypeError(f"network= gave {type(found).__name__}, not a module.")
        return found

    def _path(self, trainer: Any) -> Path:
        if self.path is not None and not isinstance(self.path, bool):
            return Path(self.path)
        folder = next((lg.log_dir for lg in trainer.loggers if getattr(lg, "log_dir", None)), None)
        return Path(folder or trainer.default_root_dir) / "gates.h5"

    def metrics(self) -> dict[str, float]:
        """What was logged: ``{"nad/own_auc": ...}``.

        Raises:
            RuntimeError: If training has not ended yet.
        """
        if self.gates is None:
            raise RuntimeError("training has not ended yet, so there are no gates.")
        archs = self.gates.sub_architectures()
        found = {"nad/size": sum(arch.size for arch in archs) / len(archs)}
        evaluation = self.evaluation
        if evaluation is None:
            return found
        found |= {f"nad/{name}": evaluation.mean(name) for name in MEASURES}
        for name in ("own_auc", "fidelity", "target_r2"):
            draws = [draw.mean(name) for draw in evaluation.random]
            found[f"nad/random/{name}"] = sum(draws) / len(draws)
            found[f"nad/whole/{name}"] = evaluation.whole.mean(name)
        for name in ("own_auc", "target_r2"):
            for task, value in zip(evaluation.task_names, evaluation.values(name), strict=True):
                found[f"nad/{name}/{task}"] = float(value)
        # Loggers take no NaN: what could not be measured is left out.
        return {name: value for name, value in found.items() if value == value}


def _some(data: Any) -> Any:
    """A few images of the data, without reading the rest; None: not possible."""
    labels = None
    if isinstance(data, (tuple, list)):
        if len(data) != 2 or not isinstance(data[1], (Labels, Tensor, list, np.ndarray)):
            return None
        if not isinstance(data[0], (Dataset, DataLoader)) or isinstance(data[0], TensorDataset):
            return data  # in memory
        data, labels = data
    loader = data if isinstance(data, DataLoader) else None
    dataset = data if loader is None else loader.dataset
    if isinstance(dataset, IterableDataset) or (
        loader is not None and loader.batch_sampler is None
    ):
        return None  # the training may lack what is taken from a stream
    if not isinstance(dataset, Dataset) or not hasattr(dataset, "__len__"):
        return None
    numbers = None if loader is None else numbers_of(loader)
    first = list((range(len(dataset)) if numbers is None else numbers)[:N_TRIED])
    few: Any = Subset(dataset, first)
    if loader is not None:
        few = DataLoader(few, batch_size=N_TRIED, **loading(loader))
    if not isinstance(labels, Labels):
        return few
    known = labels.values
    here = known[first] if isinstance(known, (Tensor, np.ndarray)) else [known[i] for i in first]
    return few, replace(labels, values=here)


def _first_alone(trainer: Any, work: Callable[[], None]) -> None:
    """Let the first process work and the others wait for it, also if it fails.

    After a failure a barrier would have them wait forever, or until NCCL gives up. They raise a
    RuntimeError then.
    """
    error: BaseException | None = None
    if trainer.is_global_zero:
        try:
            work()
        except BaseException as failure:
            error = failure
    told: list[Any] = [None if error is None else f"{type(error).__name__}: {error}"]
    if trainer.world_size > 1:
        distributed = torch.distributed
        if distributed.is_available() and distributed.is_initialized():
            # Learning may take longer than any collective of the training.
            group: Any = distributed.new_group(backend="gloo", timeout=timedelta(days=365))
            distributed.broadcast_object_list(told, src=0, group=group)
            distributed.destroy_process_group(group)
        else:
            told = [trainer.strategy.broadcast(told[0], src=0)]
    if error is not None:
        raise error
    if told[0] is not None:
        raise RuntimeError(f"LearnSubArchitectures failed on the first process: {told[0]}")


def _only(loaders: Any, what: str) -> Any:
    """The one loader of a trainer's."""
    if isinstance(loaders, (list, tuple)):
        if len(loaders) == 1:
            return loaders[0]
        raise ValueError(
            f"there are {len(loaders)} {what} loaders; say which images to use with data= and "
            "held_out=."
        )
    return loaders
