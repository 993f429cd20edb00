"""torch's default device is the user's: this package names the device of its tensors."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nad_attr import NADAttribution, Recipe, RunOptions, find_gate_sites, learn_gates
from nad_attr.concepts import dissect
from nad_attr.evaluation import evaluate
from nad_attr.flow.measuring import information_flow
from nad_attr.gates.task_gates import TaskGates
from nad_attr.pictures import heat_maps
from nad_attr.scoring.baselines import TaylorScorer
from tests import helpers

PACKAGE = Path(__file__).parent.parent / "nad_attr"
#: What ``torch.set_default_device`` acts on.
FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "normal", "ones", "rand",
    "randint", "randn", "randperm", "scalar_tensor", "tensor", "tril_indices", "triu_indices",
    "zeros",
}  # fmt: skip
RECIPE = Recipe(size=0.5, steps=2, images_per_step=4)


def _without_device(source: str) -> list[str]:
    """Calls of torch's factories that leave the device open."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [
        f"line {call.lineno}: {ast.unparse(call)}"
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not {"device", None} & {keyword.arg for keyword in call.keywords}
    ]


@pytest.mark.slow
def test_every_factory_names_a_device() -> None:
    found = {
        str(path.relative_to(PACKAGE)): calls
        for path in sorted(PACKAGE.rglob("*.py"))
        if (calls := _without_device(path.read_text()))
    }
    assert not found, 'say device="cpu", or where else it shall lie'
    assert _without_device("torch.rand(2, generator=g)")
    assert not _without_device("torch.rand(2, device='cpu')")


def _back() -> None:
    torch.set_default_device(None)
    # torch 2.4 keeps the None, and get_default_device fails on it.
    vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)


@pytest.fixture
def elsewhere() -> Iterator[None]:
    """A default device that holds no numbers: what is made there by mistake fails."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        _back()


MODEL = helpers.build(helpers.TinyCNN)
DATA = helpers.labelled_images(24)
GATES = learn_gates(MODEL, DATA, recipe=RECIPE)

USES: dict[str, Callable[[], Any]] = {
    "find_gate_sites": lambda: find_gate_sites(MODEL, DATA[0][:1]),
    "learn_gates": lambda: learn_gates(MODEL, DATA, recipe=RECIPE)["relu2"],
    "learn from a loader": lambda: learn_gates(
        MODEL, DataLoader(TensorDataset(*DATA), batch_size=5), recipe=RECIPE
    )["relu2"],
    "paper": lambda: learn_gates(MODEL, DATA, recipe=Recipe.paper(beta=0.1, epochs=1))["relu2"],
    "evaluate": lambda: evaluate(MODEL, GATES, DATA, n_random=2).summary(),
    "rival": lambda: TaylorScorer(MODEL, GATES.sites)(*DATA, tasks=GATES.tasks)["relu2"],
    "attribute": lambda: NADAttribution(MODEL, gates=GATES).attribute(DATA[0][:2], target=1),
    "attribute an example": lambda: NADAttribution(MODEL, recipe=RECIPE, scope="example").attribute(
        DATA[0][:1], target=1
    ),
    "information flow": lambda: information_flow(
        MODEL, GATES, DATA, tasks=[0], run=RunOptions(show_progress=False)
    ).edges.to_dict(),
    "a smaller network": lambda: GATES.sub_architectures()[0].export(MODEL, DATA[0][:1])(DATA[0]),
    "heat_maps": lambda: heat_maps(MODEL, GATES, DATA[0][:2], DATA[1][:2]),
    "dissect": lambda: dissect(
        MODEL, GATES.sites, (DATA[0], (DATA[0][:, 0] > 0).long()),
        quantile=0.1, concepts=["a", "b"], exact=True,
    ).iou["relu1"].tolist(),
    "save and load": lambda: TaskGates.load(_saved())["relu1"],
}  # fmt: skip


def _saved() -> Any:
    import tempfile

    path = Path(tempfile.mkdtemp()) / "gates.h5"
    GATES.save(path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_the_core_runs_under_another_default_device(use: str, request: Any) -> None:
    expected = USES[use]()
    request.getfixturevalue("elsewhere")
    found = USES[use]()
    _back()
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, list) and isinstance(expected[0], torch.Tensor):
        assert all(map(torch.equal, found, expected))
    else:
        assert str(found) == str(expected)
