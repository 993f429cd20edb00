"""The benchmark of store and workers, on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import store_and_scale
from nad_attr import GateSite


def test_gates_are_those_of_resnet50() -> None:
    gates = store_and_scale.gates_of_resnet50(2)
    assert len(gates.sites) == 17
    assert gates.n_channels == 15_168
    assert [arch.n_kept for arch in gates.sub_architectures()] == [15_168 // 2] * 2


def test_store_rows(tmp_path: Path) -> None:
    sites = [GateSite("a", 30), GateSite("b", 50)]
    gates = store_and_scale.gates_of_resnet50(12, sites)
    rows = store_and_scale.measure_store(tmp_path, gates, append=(12, 5, 1000), repeats=1)
    names = [row["what"] for row in rows]
    assert names[:2] == ["write, 12 tasks at a time", "write, 5 tasks at a time"]
    assert len(rows) == 6
    for row in rows[:-1]:
        assert row["store_seconds"] > 0
    assert rows[0]["store_mb_per_s"] == pytest.approx(
        2 * 4 * 12 * 80 / 1e6 / rows[0]["store_seconds"]
    )
    assert rows[-1]["uncompressed_megabytes"] == pytest.approx(2 * 4 * 12 * 80 / 1e6)


def test_scale_without_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store_and_scale.importlib.util, "find_spec", lambda name: None)
    path = tmp_path / "out.json"
    options = ["--only", "scale", "--scale-tasks", "2", "--steps", "1", "--workers", "2"]
    assert store_and_scale.main([*options, "--json", str(path)]) == 0
    here, skipped = json.loads(path.read_text())["scale"]
    assert here["tasks_per_minute"] == pytest.approx(120 / here["seconds"])
    assert here["same_gates"]
    assert skipped == {"what": "2 Ray workers", "skipped": "ray is missing"}
    assert "2 Ray workers: skipped, ray is missing" in capsys.readouterr().out
