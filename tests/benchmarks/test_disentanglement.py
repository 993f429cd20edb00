"""The table of rivals with best constants: what is printed of finished rows."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.disentanglement import print_paired


def row(method: str, seed: int, auc: list[float | None], ablation: str = "best") -> dict[str, Any]:
    cell = {"own_auc": auc, "fidelity": [0.5, 0.25]}
    return {"method": method, "seed": seed, "ablation": ablation, "sizes": {"0.4": cell}}


def test_leads_are_paired_by_seed_and_task(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        row("nad", 0, [0.9, 0.8]),
        row("nad", 1, [0.9, 1.0]),
        row("ugs", 0, [0.7, 0.7]),
        row("ugs", 1, [0.7, None]),  # a dead task says nothing
        row("coar", 2, [0.5, 0.5]),  # another seed cannot be paired
        row("nad", 3, [0.1, 0.1], ablation="mean"),
        {"method": "relp", "seed": 0, "ablation": "best", "error": "no rule"},
    ]
    print_paired("vgg/cifar10", rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "vgg/cifar10, 0.4: own AUC, fidelity; lead of nad (95 %)"
    nad, ugs, coar = lines[2:]
    assert nad.split() == ["nad", "0.900", "0.375"]
    # 0.2 and 0.2 of the first task, 0.1 and nothing of the second: 0.2 and 0.1.
    assert ugs.split()[:6] == ["ugs", "0.700", "+0.150", "(+0.100", "to", "+0.200)"]
    assert ugs.split()[6:8] == ["0.375", "+0.000"]
    assert coar.split() == ["coar", "0.500", "0.375"]
