"""Rivals with best constants: what is run, and what is printed of finished rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import benchmarks.disentanglement
from benchmarks.disentanglement import parser, print_paired, read_rows, run_pair
from benchmarks.image_data import ImageData
from nad_attr.evaluation import NeuronMCTScorer


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
    # A seed that was measured at another size.
    rows.append({**rows[0], "seed": 4, "sizes": {"0.01": rows[0]["sizes"]["0.4"]}})
    print_paired("vgg/cifar10", rows)
    assert capsys.readouterr().out.splitlines()[-1].split()[0] == "nad"


@pytest.mark.filterwarnings("ignore:Mean of empty slice")
def test_groups_of_classes_are_tasks_and_scorers_see_mirrored_photos(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As the default recipe does where photos are few: the photo and its mirror, of own labels."""
    generator = torch.Generator().manual_seed(0)
    train, held_out = ((torch.randn(8, 3, 4, 4, generator=generator), torch.arange(8)),) * 2
    data = ImageData("superclasses", tuple("abcdefgh"), train, held_out, ((0, 1, 2), (5, 6)))
    args = parser().parse_args(
        "--constants best --passes 40 --sizes 0.5 --methods neuron_mct --tasks 1 --batch 4 "
        f"--results {tmp_path}".split()
    )
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 8),
    ).eval()  # fmt: skip
    seen: list[torch.Tensor] = []

    class Spy(NeuronMCTScorer):
        def __call__(self, inputs: Any, targets: Any, **options: Any) -> Any:
            seen.append(inputs)
            assert options["tasks"] == [(5, 6)]
            assert sorted(targets.tolist()) == sorted([*range(8)] * 2)
            return super().__call__(inputs, targets, **options)

    monkeypatch.setattr(benchmarks.disentanglement, "SCORERS", {"neuron_mct": Spy})
    run_pair(args, "lite0/superclasses", data, net, 0)
    (found,) = read_rows(tmp_path / "lite0_superclasses.jsonl")
    assert found["tasks"] == [1]
    assert len(found["sizes"]["0.5"]["own_auc"]) == 1
    (images,) = seen
    pixels = images.flatten(1).sort(0).values
    both = torch.cat([train[0], train[0].flip(3)]).flatten(1).sort(0).values
    torch.testing.assert_close(pixels, both)
