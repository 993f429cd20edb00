"""The recipes benchmark on a tiny network: every method, equal sizes, the best variant chosen."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import recipes
from tests import helpers


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    helpers.learn_briefly(monkeypatch)
    model = helpers.build(helpers.TinyCNN).float()
    (train_x, train_y), (val_x, val_y) = (helpers.labelled_images(18, seed=s) for s in (0, 1))
    args = argparse.Namespace(
        val_per_class=4,
        score_images=4,
        paper_images=4,
        paper_epochs=2,
        betas=[0.1, 1.0],
        sizes=[0.5],
        ablations=["mean", "zero"],
        random_draws=2,
        batch=8,
        amp=False,
        methods=list(recipes.METHODS),
    )
    data = (train_x.float(), train_y, val_x.float(), val_y)
    return [{"network": "tiny", **row} for row in recipes.Benchmark(args, model, data).rows(0)]


def test_all_methods_at_both_ablation_values(rows: list[dict[str, object]]) -> None:
    # Per ablation value: the default, two betas, four scores in two variants, two draws.
    assert len(rows) == 2 * (1 + 2 + 4 * 2 + 2)
    best = recipes.best_rows(rows)
    assert len(best) == 2 * 7
    for row in best:
        same = [r for r in rows if (r["ablation"], r["method"]) == (row["ablation"], row["method"])]
        aucs = [float(str(r["own_auc"])) for r in same]
        expected = sum(aucs) / len(aucs) if row["method"] == "random" else max(aucs)
        assert row["own_auc"] == pytest.approx(expected)
    assert len(recipes.table(best).splitlines()) == 2 + 14 + 1  # head, rule, rows, one blank


def test_photos_that_are_absent_are_said_and_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        recipes.main(["--shared", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    assert stop.value.code == 0
    assert "skipped" in capsys.readouterr().err
    assert not (tmp_path / "rows.json").exists()
