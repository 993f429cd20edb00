"""The code of docs/dissection.md runs as it stands, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch


@pytest.mark.slow
def test_the_code_of_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    page = Path(__file__).resolve().parent.parent / "docs" / "dissection.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 4
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with torch.random.fork_rng(devices=[]):
        for block in blocks:
            exec(block, names)  # the page's own code
    assert names["same"] == names["units"]
