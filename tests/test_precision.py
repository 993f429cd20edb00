"""Every setting of torch's rounding works."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from nad_attr import Recipe, learn_gates
from nad_attr.evaluation.measures import _midranks, auc, fit_threshold
from nad_attr.running.forward import cumulative
from tests import helpers


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Deterministic algorithms, and a cumsum that has none for floats, as on a GPU."""
    cumsum = torch.Tensor.cumsum

    def refusing(self: torch.Tensor, *args: Any, dtype: Any = None, **kwargs: Any) -> torch.Tensor:
        if (dtype or self.dtype).is_floating_point:
            raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation")
        return cumsum(self, *args, dtype=dtype, **kwargs)

    monkeypatch.setattr(torch.Tensor, "cumsum", refusing)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("n", [0, 1, 2, 5, 8, 13])
def test_running_sums_under_deterministic_algorithms(n: int, deterministic: None) -> None:
    values = torch.rand(3, n, dtype=torch.float64)
    expected = torch.stack([values[:, : i + 1].sum(-1) for i in range(n)], -1) if n else values
    torch.testing.assert_close(cumulative(values), expected)


def test_learning_and_measures_under_deterministic_algorithms(deterministic: None) -> None:
    learn_gates(
        helpers.build(helpers.TinyCNN),
        helpers.labelled_images(24),
        recipe=Recipe(size=0.5, steps=3, images_per_step=6),
    )
    scores, positive = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([False, False, True])
    assert float(auc(scores, positive)) == 1
    assert float(fit_threshold(scores, positive)) == 2
    assert _midranks(scores, torch.tensor([1.0, 2.0, 4.0])).tolist() == [0.5, 2.0, 5.0]


SCRIPT = """
import json, os, sys, torch
from nad_attr.learning.ray_executor import _set_float32, _settings
read, write = os.pipe()
if os.fork() == 0:  # the driver, as nothing has been said here yet
    exec(sys.argv[1])
    os.write(write, json.dumps(_settings()["float32"]).encode())
    os._exit(0)
os.close(write)
here = open(read).read()
print(here)
_set_float32(json.loads(here))
print(json.dumps(_settings()["float32"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="torch < 2.9")
def test_a_worker_rounds_as_its_driver_does() -> None:
    """In whichever way that was said: torch refuses to be asked for the new one in the old."""
    command = [sys.executable, "-c", SCRIPT, 'torch.backends.fp32_precision = "tf32"']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    here, there = done.stdout.splitlines()
    assert json.loads(here)["cuda.matmul.fp32_precision"] == "tf32"
    assert "cuda.matmul.allow_tf32" not in json.loads(here)
    assert there == here
