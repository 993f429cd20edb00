"""Tables of finished rows, and fewer images to learn from."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.constants_study import Setting
from benchmarks.findings import Pair, comparisons, real


def row(method: str, seed: int, **aucs: list[float]) -> dict[str, Any]:
    cells = {
        {"large": "0.8", "small": "0.02"}[size]: {"own_auc": auc, "fidelity": [0.5] * len(auc)}
        for size, auc in aucs.items()
    }
    return {"method": method, "seed": seed, "ablation": "best", "sizes": cells}


PAIR = Pair(
    "vgg/cifar10",
    [
        row("nad", 0, large=[0.9, 0.9]),
        row("nad", 1, large=[0.7, 0.8], small=[0.8, 0.9]),
        row("ugs", 1, large=[0.6, 0.6], small=[0.6, 0.6]),
    ],
)


def test_seeds_are_aligned_where_some_lack_a_method_or_a_size() -> None:
    table = PAIR.table("best", "own_auc")
    nan = np.nan
    np.testing.assert_equal(table["nad"]["0.02"], [[nan, nan], [0.8, 0.9]])
    np.testing.assert_equal(table["ugs"]["0.8"], [[nan, nan], [0.6, 0.6]])
    found = {size: cell for _, _, size, cell in comparisons([PAIR])}
    # Seed 0 of the default has no partner: .75 of seed 1, not .825 of both.
    assert found["0.8"]["nad"] == pytest.approx(0.75)
    assert found["0.8"]["n_seeds"] == 1
    assert (found["0.8"]["low"], found["0.8"]["high"]) == pytest.approx((0.1, 0.2))


def test_large_networks_have_a_row_for_each_method() -> None:
    lines = [line.split(" | ") for line in real([PAIR]).splitlines()]
    assert lines[0][3:] == ["80%", "2% |"]
    assert lines[2] == ["| vgg/cifar10", "nad", "2", "0.82 / 0.50", "0.85 / 0.50 |"]
    assert lines[3] == ["| vgg/cifar10", "ugs", "1", "0.60 / 0.50", "0.60 / 0.50 |"]


def test_fewer_leaves_images_of_no_task_alone() -> None:
    setting = Setting.__new__(Setting)
    labels = torch.arange(6).repeat(5)
    setting.train, setting.tasks = (torch.arange(30.0), labels), [(0, 1), (3,)]
    x, y = setting.fewer(3).train
    assert torch.bincount(y).tolist()[2:] == [5, 3, 5, 5]
    assert int(torch.isin(y, torch.tensor([0, 1])).sum()) == 3
    assert torch.equal(labels[x.long()], y)  # the same images
    assert len(setting.train[1]) == 30
