"""The Lightning callback: what it learns, logs and saves, and that it changes nothing else."""

from __future__ import annotations

import contextlib
import csv
import multiprocessing
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Subset, TensorDataset

from nad_attr import Recipe, TaskGates, learn_gates
from nad_attr.bridges.lightning import LearnSubArchitectures, _first_alone
from nad_attr.data.labels import Labels
from nad_attr.evaluation import evaluate
from tests import helpers

lightning = pytest.importorskip("lightning")

RECIPE = Recipe(size=0.5, steps=8, images_per_step=4)


def module(*, inner: bool = False) -> Any:
    """A LightningModule of a TinyCNN in float32, with Dropout that train mode would show."""

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(helpers.build(helpers.TinyCNN).float(), nn.Dropout(0.5))
            self.unused = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Any:
            return {"logits": self.net(x)} if inner else self.net(x)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, number: int) -> None:
            self.log("val", F.cross_entropy(self.net(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    return Module()


def loader(seed: int = 0, n: int = 12) -> DataLoader[Any]:
    images, labels = helpers.labelled_images(n, seed=seed)
    return DataLoader(TensorDataset(images.float(), labels), batch_size=4, shuffle=seed == 0)


def fit(model: Any, callback: Any, folder: Path, *, validate: bool = True) -> Any:
    from lightning.pytorch.loggers import CSVLogger

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(folder),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader(), *([loader(1)] if validate else []))
    return trainer


class Snapshot(LearnSubArchitectures):
    """The callback, that its own work leaves the module untouched."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        assert pl_module.training
        with helpers.assert_model_untouched(pl_module):
            super().on_train_end(trainer, pl_module)


@pytest.mark.slow
def test_learns_measures_logs_and_saves(tmp_path: Path) -> None:
    model = module()
    callback = Snapshot(recipe=RECIPE, network="net")
    trainer = fit(model, callback, tmp_path)
    model.eval()
    expected = learn_gates(model.net, loader(), recipe=RECIPE)
    assert callback.gates == expected
    assert TaskGates.load(Path(trainer.logger.log_dir) / "gates.h5") == expected
    measured = evaluate(model.net, expected, loader(1))
    with open(Path(trainer.logger.log_dir) / "metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    (logged,) = [row for row in rows if row.get("nad/size")]
    assert float(logged["nad/size"]) == pytest.approx(0.5)
    for name in ("own_auc", "fidelity", "recall", "fpr"):
        assert float(logged[f"nad/{name}"]) == pytest.approx(measured.mean(name), abs=1e-6)
    random = [draw.mean("own_auc") for draw in measured.random]
    assert float(logged["nad/random/own_auc"]) == pytest.approx(sum(random) / len(random))
    assert float(logged["nad/own_auc/1"]) == pytest.approx(float(measured.own_auc[1]))


@pytest.mark.slow
def test_module_itself_given_data_names_and_outputs_in_a_dictionary(tmp_path: Path) -> None:
    model = module(inner=True)
    images, labels = helpers.labelled_images(9, seed=5)
    callback = Snapshot(
        (images.float(), labels),
        tasks={"red": 0, "blue": 2},
        recipe=RECIPE,
        forward_func=lambda net, x: net(x)["logits"],
        path=tmp_path / "deep" / "gates.h5",
    )
    fit(model, callback, tmp_path, validate=False)
    gates = TaskGates.load(tmp_path / "deep" / "gates.h5")
    assert gates.task_names == ("red", "blue")
    assert all(name.startswith("net.") for name in gates)
    assert callback.evaluation is None
    assert callback.metrics() == {"nad/size": pytest.approx(0.5)}


def test_failure_leaves_the_module_as_it_was(tmp_path: Path) -> None:
    model = module()
    callback = Snapshot(recipe=RECIPE, tasks=[7], network=lambda m: m.net, path=False)
    with pytest.raises(ValueError, match="7"):
        fit(model, callback, tmp_path)


def test_bad_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="path"):
        LearnSubArchitectures(path=True)
    with pytest.raises(RuntimeError, match="training has not ended"):
        LearnSubArchitectures().metrics()
    with pytest.raises(ValueError, match="network='nothing'"):
        fit(module(), LearnSubArchitectures(network="nothing", path=False), tmp_path)
    with pytest.raises(TypeError, match="not a module"):
        fit(module(), LearnSubArchitectures(network=lambda m: 3, path=False), tmp_path)


def test_missing_lightning_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import nad_attr.bridges.lightning as bridge

    monkeypatch.setattr(bridge, "_Callback", object)
    with pytest.raises(ImportError, match="pip install lightning"):
        LearnSubArchitectures()


SEVERAL = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]]).repeat(4, 1)
PAPER = Recipe.paper("vgg16")
UNSUITABLE: dict[str, tuple[int, Any, Recipe, str]] = {
    "too many classes": (2, torch.arange(12) % 3, RECIPE, "a label 2, but the network has 2 outp"),
    "one logit": (1, torch.arange(12) % 3, RECIPE, "a label 2, but the network has one output"),
    "multi-label": (2, SEVERAL.float(), RECIPE, "each image has 3 labels"),
    "counts": (3, 2 * SEVERAL, RECIPE, "0, 1 or -1"),
    "infinite targets": (1, torch.full((12, 1), torch.inf), RECIPE, "finite"),
    "several, the paper's way": (3, SEVERAL.float(), PAPER, "cross-entropy.*Recipe\\(\\)"),
}


def fit_with(labels: Tensor, n_outputs: int, recipe: Recipe, folder: Path, step: Any) -> Any:
    """Train on these labels; the callback. The same images are held out."""
    model = module()
    model.net[0].linear = nn.Linear(8, n_outputs)
    model.training_step = step
    model.validation_step = lambda *_: None
    callback = LearnSubArchitectures(recipe=recipe, network="net", path=False)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
        callbacks=[callback], num_sanity_val_steps=0,
    )  # fmt: skip
    data = DataLoader(TensorDataset(helpers.images(12).float(), labels), batch_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, data, data)
    return model, data, callback


@pytest.mark.parametrize("kind", UNSUITABLE)
def test_unsuitable_labels_come_to_light_before_the_first_step(kind: str, tmp_path: Path) -> None:
    k, labels, recipe, message = UNSUITABLE[kind]
    steps: list[int] = []
    with pytest.raises(ValueError, match=f"own training images at the end.*{message}"):
        fit_with(labels, k, recipe, tmp_path, lambda *_: steps.append(1))
    assert not steps


@pytest.mark.parametrize(
    ("n_outputs", "labels", "is_target"),
    [
        (3, SEVERAL.float(), False),
        (1, torch.arange(12) % 2, False),
        (1, torch.linspace(-1, 1, 12)[:, None], True),
    ],
    ids=["several labels", "one logit", "regression"],
)
def test_labels_of_every_kind(
    n_outputs: int, labels: Tensor, is_target: bool, tmp_path: Path
) -> None:
    model, data, callback = fit_with(labels, n_outputs, RECIPE, tmp_path, lambda *_: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert callback.gates == learn_gates(model.net.eval(), data, recipe=RECIPE)
    assert callback.gates.tasks == tuple(range(n_outputs))
    metrics, name = callback.metrics(), "target_r2" if is_target else "own_auc"
    assert metrics[f"nad/{name}"] == callback.evaluation.mean(name)
    assert f"nad/{name}/0" in metrics
    assert f"nad/random/{name}" in metrics
    assert all(value == value for value in metrics.values())


def _given_data(form: str, labels: Labels) -> Any:
    images = helpers.images(40).float()
    dataset = TensorDataset(images, torch.zeros(40))
    return {
        "tensor": (images, labels),
        "list": (list(images), labels.values),
        "dictionary": ({"x": images}, labels),
        "dataset": (Subset(dataset, range(40)), labels),
        "loader": (DataLoader(Subset(dataset, range(40)), batch_size=7), labels),
    }[form]


@pytest.mark.parametrize("form", ["tensor", "list", "dictionary", "dataset", "loader"])
def test_data_of_every_form_are_tried_before_the_first_step(form: str) -> None:
    """More of them than are tried, with labels that say what they mean."""
    model = module()
    trainer = SimpleNamespace(train_dataloader=None, val_dataloaders=None)
    for n_classes in (3, 4):
        values = (torch.arange(40) % n_classes).tolist()
        data = _given_data(form, Labels(values, kind="classes"))
        forward_func = (lambda net, x: net(x)) if form == "dictionary" else None
        callback = LearnSubArchitectures(data, network="net", forward_func=forward_func)
        refused = pytest.raises(ValueError, match=r"data= training images.*a label 3, but")
        with refused if n_classes == 4 else contextlib.nullcontext():
            callback._check(trainer, model)


def _one_of_two(rank: int, folder: str, fails: bool) -> None:
    import torch.distributed as distributed

    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    trainer = SimpleNamespace(is_global_zero=rank == 0, world_size=2)

    def work() -> None:
        assert rank == 0
        if fails:
            raise KeyError("nothing to learn from")

    try:
        _first_alone(trainer, work)
        said = "fine"
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    (Path(folder) / str(rank)).write_text(said)
    distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("fails", [False, True])
def test_all_processes_fail_with_the_first(fails: bool, tmp_path: Path) -> None:
    """They used to wait in a barrier, for ever."""
    context = multiprocessing.get_context("fork")
    processes = [
        context.Process(target=_one_of_two, args=(rank, str(tmp_path), fails)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
        assert process.exitcode == 0
    said = [(tmp_path / str(rank)).read_text() for rank in (0, 1)]
    if fails:
        assert said[0] == "KeyError: 'nothing to learn from'"
        assert said[1].startswith("RuntimeError: LearnSubArchitectures failed on the first process")
    else:
        assert said == ["fine", "fine"]
