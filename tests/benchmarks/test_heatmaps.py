"""The measures of benchmarks/heatmaps.py, on maps whose numbers are known."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.heatmaps import (
    MARKS,
    RANDOM,
    WHOLE,
    put_into_docs,
    random_like,
    shares,
    summarised,
    tables,
)
from benchmarks.quantus_table import gains, mosaics_with_masks
from nad_attr import GateSite, SubArchitecture
from nad_attr.evaluation import quadrant_shares


def test_shares_of_a_quadrant_are_those_of_the_evaluation() -> None:
    generator = torch.Generator().manual_seed(0)
    heat = torch.randint(-3, 4, (3, 8, 8), generator=generator).float()
    expected = quadrant_shares(heat.sum(0), top=0.1)
    for q in range(4):
        mask = torch.zeros(8, 8, dtype=torch.bool)
        mask[(q // 2) * 4 :, (q % 2) * 4 :][:4, :4] = True
        hit, mass = shares(heat, mask)
        # The evaluation counts 6.4 positions, this measure, which knows no quadrants, 6.
        flat = heat.sum(0).flatten()
        assert abs(hit - float(expected[q])) < 0.2
        positive = flat.clamp_min(0)
        assert mass == pytest.approx(float(positive[mask.flatten()].sum() / positive.sum()))


def test_shares_by_hand() -> None:
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[0, :2] = True
    heat = torch.tensor([[4.0, 0, -9, 1, 0], [0, 0, 0, 0, 3]])[None]
    assert shares(heat, mask) == (1.0, 0.5)
    # All positions tie: each counts by its area.
    assert shares(torch.zeros(1, 2, 5), mask) == pytest.approx((0.2, 0.2))


def test_random_channels_are_as_many_at_each_site() -> None:
    sites = [GateSite("a", 8, 1), GateSite("b", 5, 1)]
    arch = SubArchitecture.from_kept({"a": [0, 1, 2], "b": [4]}, sites, task=3)
    drawn = [random_like(arch, seed) for seed in range(20)]
    assert all(d.sizes == arch.sizes and d.task == 3 for d in drawn)
    assert len(set(drawn)) > 10
    assert random_like(arch, 0) == drawn[0]


def test_summary_takes_differences_mosaic_by_mosaic() -> None:
    rows = [
        {"mosaic": i, "task": k, "network": n, "method": "m", "hit": i / 10 + g, "mass": 0.25}
        for i in range(5)
        for n, gain in ((WHOLE, (0.0, 0.0)), (RANDOM, (0.3, -0.1)))
        for k, g in enumerate(gain)
    ]
    whole, random = summarised(rows)
    assert whole["hit"]["mean"] == pytest.approx(0.2)
    assert random["hit"]["gain"] == pytest.approx(0.1)
    # The mosaics differ, the gain does not.
    assert random["hit"]["gain_interval"] == pytest.approx([0.1, 0.1])
    assert random["hit"]["interval"][1] - random["hit"]["interval"][0] > 0.1
    text = tables([whole, random], [], "A note.")
    assert "| m | random channels | 0.300" in text
    # Class 0 gains, class 1 loses.
    assert random["classes"] == [1, 2]
    assert text.splitlines()[7].endswith("| 1 of 2 |")


def test_tables_go_between_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nold\n{MARKS[1]}\nafter\n")
    put_into_docs(page, "new\n")
    assert page.read_text() == f"before\n{MARKS[0]}\n\nnew\n\n{MARKS[1]}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(SystemExit, match="no marks"):
        put_into_docs(page, "new\n")


def test_masks_lie_on_the_photo_of_the_class_that_is_explained() -> None:
    labels = torch.tensor([5, 3, 8, 0, 7, 5])
    # Each photo is filled with its class.
    images = labels.float()[:, None, None, None].expand(-1, 2, 4, 6)
    mosaics, explained, masks = mosaics_with_masks(images, labels, 8, 0)
    assert mosaics.shape == (8, 2, 8, 12)
    assert masks.sum((1, 2)).tolist() == [24] * 8
    for mosaic, label, mask in zip(mosaics, explained, masks, strict=True):
        assert (mosaic[:, mask] == label).all()
        assert (mosaic[:, ~mask] != label).all()
    # The quadrants take turns.
    assert not (masks[0] & masks[1]).any()
    assert torch.equal(masks[0], masks[4])


def test_gains_know_which_way_is_better() -> None:
    rising, falling = ("complexity", "sparseness"), ("complexity", "entropy")
    values = np.array([1.0, 2.0, 3.0, np.nan])
    scores = {
        "LRP, whole network": {rising: values, falling: values},
        "LRP, sub-architecture": {rising: values + 1, falling: values + 1},
        "LRP, random channels": {
            rising: values - 1,
            falling: values + np.array([1.0, -1.0, 0.0, 0.0]),
        },
    }
    found = {(d["through"], d["metric"]): d for d in gains(scores)}
    assert len(found) == 4
    more = found["sub-architecture", "sparseness"]
    assert (more["gain"], more["interval"], more["images"]) == (1.0, [1.0, 1.0], 3)
    assert more["verdict"] == "better"
    assert found["sub-architecture", "entropy"]["verdict"] == "worse"
    assert found["random channels", "sparseness"]["verdict"] == "worse"
    assert found["random channels", "entropy"]["verdict"] == ""
