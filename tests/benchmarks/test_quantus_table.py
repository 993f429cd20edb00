"""The table of Quantus's metrics: its rows and columns, and one value worked out by hand."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from nad_attr.bridges.quantus import SubArchitectureExplainer
from tests import helpers
from tests.test_bridges_quantus import single, task_gates

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def test_the_table() -> None:
    pytest.importorskip("zennit")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of its own imports
        pytest.importorskip("quantus")
    from benchmarks.quantus_table import as_markdown, quantus_table

    model, x, y = single(), helpers.images(4).float().numpy(), np.array([0, 2, 1, 2])
    masks = np.zeros((4, 8, 8), bool)
    masks[:, 2:6, 2:6] = True
    with helpers.assert_model_untouched(model):
        table = quantus_table(model, torch.tensor(x), torch.tensor(y), task_gates(), masks, draws=2)
        again = quantus_table(model, torch.tensor(x), torch.tensor(y), task_gates(), masks, draws=2)
    assert table.equals(again)
    assert list(table.index) == [
        f"{kind}, {where}"
        for kind in ("gradient", "LRP", "integrated gradients")
        for where in ("whole network", "sub-architecture")
    ]
    assert {category for category, _ in table.columns} == {
        "faithfulness",
        "robustness",
        "localisation",
        "randomisation",
        "complexity",
    }
    assert table.notna().all().all()
    assert as_markdown(table).count("\n") >= 7
    inside = SubArchitectureExplainer(task_gates())(model, x, y)
    mass = np.abs(inside)
    expected = (mass * masks[:, None]).sum((1, 2, 3)) / mass.sum((1, 2, 3))
    found = table.loc["gradient, sub-architecture", ("localisation", "relevance mass")]
    np.testing.assert_allclose(found, expected.mean(), rtol=1e-4)
    without = quantus_table(model, x, y, task_gates(), draws=2, attributions=["gradient"])
    assert "localisation" not in {category for category, _ in without.columns}
