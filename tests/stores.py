"""Gates and sub-architectures that hold everything there is, for the tests of their files."""

from __future__ import annotations

import numpy as np
import torch

from nad_attr.gates.history import History
from nad_attr.gates.recipe import Recipe
from nad_attr.gates.sub_architecture import SubArchitecture
from nad_attr.gates.task_gates import TaskGates
from nad_attr.sites.site import GateSite

SITES = [GateSite("layer1.0", 3), GateSite("blocks.1", 2, -1), GateSite("head", 4, at_input=True)]


def make_gates(**changes: object) -> TaskGates:
    generator = torch.Generator().manual_seed(0)
    logits = {s.name: torch.randn(3, s.n_channels, generator=generator) for s in SITES}
    options = {
        "logits": logits,
        "means": {s.name: torch.randn(s.n_channels, generator=generator) for s in SITES},
        "recipe": Recipe(size=0.3, steps=7),
        "history": History(
            {"loss": [[1.0, 2.0, np.nan], [0.5, np.inf, np.nan]], "size": np.ones((2, 3))}
        ),
        "task_names": ["tabby", "großer Hund", "猫"],
        "info": {"seed": 3, "device": "cpu", "list": [1, None, True, 0.5], "inner": {"a": "b"}},
        **changes,
    }
    return TaskGates({n: v.sigmoid() for n, v in logits.items()}, SITES, [7, (1, 2), 0], **options)


def make_arch(**changes: object) -> SubArchitecture:
    masks = {s.name: torch.arange(s.n_channels) % 2 == 0 for s in SITES}
    means = {s.name: torch.arange(float(s.n_channels)) for s in SITES}
    return SubArchitecture(masks, SITES, **{"task": (1, 2), "means": means, **changes})


def assert_same(a: TaskGates, b: TaskGates) -> None:
    assert a == b
    assert (a.recipe, a.info, a.task_names) == (b.recipe, b.info, b.task_names)
    assert type(a.recipe) is type(b.recipe)
    for first, second in ((a.logits, b.logits), (a.means, b.means), (a.history, b.history)):
        assert (first is None) == (second is None)
        if first is not None:
            assert list(first) == list(second)
            for name in first:
                np.testing.assert_array_equal(np.asarray(first[name]), np.asarray(second[name]))
