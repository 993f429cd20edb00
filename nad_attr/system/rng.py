"""Random numbers as a function of their purpose, without changes of global state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

__all__ = ["isolated_rng", "permutation", "random_states", "seed_all", "seed_of"]


def seed_of(*parts: object) -> int:
    """A 63-bit seed from anything with a stable ``repr``: equal on every machine and run."""
    digest = hashlib.sha256("/".join(map(repr, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def permutation(n: int, *parts: object) -> torch.Tensor:
    """The numbers from 0 to n - 1 in an order that :func:`seed_of` the parts draws: int64 (n,)."""
    generator = torch.Generator().manual_seed(seed_of(*parts))
    return torch.randperm(n, generator=generator, device="cpu")


def _generators() -> list[torch.Generator]:
    """Torch's global generators: the CPU's, and those of all accelerators that are in use."""
    found = [torch.default_generator]
    for module in (torch.cuda, getattr(torch, "xpu", None)):
        # False in a forked process too, which must not touch the device.
        if module is not None and module.is_initialized():
            found += module.default_generators
    if torch.backends.mps.is_available():
        found.append(torch.mps._get_default_mps_generator())
    return found


def seed_all(seed: int) -> None:
    """Seed Python's, NumPy's and torch's random states; to be called in :func:`isolated_rng`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    for generator in _generators():
        generator.manual_seed(seed)


@contextmanager
def isolated_rng(seed: int | None = None) -> Iterator[None]:
    """Seed Python's, NumPy's and torch's random states, and put them back afterwards.

    This covers all devices that torch has initialised; if one is initialised inside, its generators
    go back to their first state. ``seed`` None: the states are not seeded.
    """
    states = random.getstate(), np.random.get_state()  # noqa: NPY002
    generators = [(generator, generator.get_state()) for generator in _generators()]
    try:
        if seed is not None:
            seed_all(seed)
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        known = {id(generator) for generator, _ in generators}
        for generator in _generators():
            if id(generator) not in known:
                generator.manual_seed(generator.initial_seed())
        for generator, state in generators:
            generator.set_state(state)


def random_states() -> tuple[object, ...]:
    """The global random states, to check that nothing has drawn from them.

    Example:
        >>> before = random_states()
        >>> before == random_states()
        True
        >>> _ = torch.rand(1, device="cpu")
        >>> before == random_states()
        False
    """
    numpy_state = np.random.get_state()  # noqa: NPY002
    states = (generator.get_state().numpy().tobytes() for generator in _generators())
    return random.getstate(), str(numpy_state[2]), numpy_state[1].tobytes(), *states  # type: ignore[index]
