"""Files damaged at random are read or refused, and never more than that."""

from __future__ import annotations

import sys

import pytest

from benchmarks.fuzz_store import campaign


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_a_campaign_of_damaged_files() -> None:
    """The first few hundred of `python -m benchmarks.fuzz_store`."""
    found = campaign(250, seed=1)
    assert found["bad"] == []
    assert found["ends"]["success"] > 20
    assert found["ends"]["GateStoreError"] > 100
