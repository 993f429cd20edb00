"""The largest batch that fits into memory, and batches that are cut into passes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from nad_attr import GateStore, Recipe, RunOptions, learn_gates, learn_to_store
from nad_attr.learning.engine import Network
from nad_attr.learning.runs import InProcess
from nad_attr.learning.session import Session
from nad_attr.system import memory
from nad_attr.system.memory import MAX_FILLED, available, largest_batch, parse_bytes, peak_memory
from tests.helpers import TinyCNN, TinyViT, assert_model_untouched, build, labelled_images

CPU = torch.device("cpu")


def test_peak_memory_counts_what_is_there_at_the_same_time() -> None:
    def work() -> None:
        a = torch.zeros(1000)  # 4,000 bytes
        b = a + 1  # 8,000
        del a
        c = torch.cat([b, b])  # 4,000 + 8,000
        c.add_(1)  # in place
        c.view(2, 1000)  # a view
        del b, c
        torch.zeros(2000)  # 8,000

    assert peak_memory(CPU, work) == 12_000


def test_peak_memory_sees_the_backward_pass() -> None:
    x = torch.zeros(1000, requires_grad=True)

    def work() -> None:
        y = x.exp()  # kept for the backward pass: 4,000
        torch.autograd.grad(y.sum(), x)  # the sum, its gradient of ones, and the result

    assert 8_000 <= peak_memory(CPU, work) <= 12_100


@pytest.mark.slow
@given(
    each=st.integers(1, 50), fixed=st.integers(0, 200), room=st.integers(1, 2000),
    beside=st.integers(0, 30), most=st.integers(1, 40),
)  # fmt: skip
def test_largest_batch_fills_and_never_overfills(
    each: int, fixed: int, room: int, beside: int, most: int
) -> None:
    unit = 1000  # bytes

    def run(n: int) -> None:
        torch.empty(n * each * unit + fixed * unit, dtype=torch.uint8)

    limit = round(room * unit / MAX_FILLED)

    def need(n: int) -> int:
        return (n * (each + beside) + fixed) * unit

    if need(1) > MAX_FILLED * limit:
        with pytest.raises(ValueError, match="memory_limit"):
            largest_batch(CPU, run, limit=limit, beside=beside * unit, most=most)
        return
    n = largest_batch(CPU, run, limit=limit, beside=beside * unit, most=most)
    assert 1 <= n <= most
    assert need(n) <= MAX_FILLED * limit
    assert n == most or need(n + 1) > MAX_FILLED * limit


KEPT = """
import resource
import torch
from nad_attr.memory import keep_freed_memory
torch.set_num_threads(1)

def faults():
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(10):
            torch.ones(4, 2**22)  # 64 MB: 16,384 pages, above glibc's largest threshold
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), keep_freed_memory(), faults())
"""


@pytest.mark.slow
def test_freed_memory_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second round of tensors causes no page faults any more."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}

    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert not memory.keep_freed_memory()  # the user's own setting stays
    result = subprocess.run(
        [sys.executable, "-c", KEPT], capture_output=True, text=True, check=True, env=own
    )
    plain, done, kept = result.stdout.split()
    if done != "True":
        pytest.skip("another C library")
    assert int(kept) < 1000 < int(plain)


def test_what_is_free() -> None:
    free = available(CPU)
    assert 10**6 < free < 10**15
    with pytest.raises(ValueError, match="memory_limit"):
        available(torch.device("meta"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8GB", 8e9), ("8 gb", 8e9), ("1.5M", 1.5e6), ("6GiB", 6 * 2**30), (123, 123), ("9b", 9)],
)
def test_bytes_are_read(text: str | int, expected: float) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", 0, True, "1e9", "8XB", "8 G B"])
def test_what_is_no_number_of_bytes_is_refused(text: str | int) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        parse_bytes(text)


@pytest.mark.slow
@pytest.mark.parametrize("maker", [TinyCNN, TinyViT])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_passes_are_cut_without_changing_gates(
    maker: Callable[[], nn.Module], batch_size: int
) -> None:
    """A step of 8 images in passes of no more than asked for, with the same gates."""
    model = build(maker)
    data = labelled_images(30)
    recipe = Recipe(size=0.4, steps=3, images_per_step=8)
    whole = learn_gates(model, data, [0, 1], recipe, batch_size=64)
    seen: list[int] = []
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        cut = learn_gates(model, data, [0, 1], recipe, batch_size=batch_size)
    finally:
        handle.remove()
    # The first pass looks for sites, and means take passes of 32 without a graph.
    passes = [n for n in seen if n not in (2, 30)]
    assert passes
    assert max(passes) == batch_size
    for site in whole.sites:
        torch.testing.assert_close(whole[site.name], cut[site.name], rtol=0, atol=1e-12)


def test_a_batch_is_cut_into_equal_parts() -> None:
    network = Network(build(TinyCNN), run=RunOptions(batch_size=10))
    assert [len(part) for part in network._passes(12)] == [6, 6]
    assert [len(part) for part in network._passes(10)] == [10]
    assert [len(part) for part in Network(build(TinyCNN))._passes(12)] == [12]


@pytest.mark.slow
def test_auto_finds_what_fits() -> None:
    model = build(TinyCNN)
    data = labelled_images(30)
    recipe = Recipe(size=0.5, steps=3, images_per_step=4)
    with assert_model_untouched(model):
        free = Session(model, data, [0, 1, 2], recipe, run=RunOptions(batch_size="auto"))
    assert free.batch_size == 12  # all tasks together: no more is ever needed
    sizes = [
        Session(
            model, data, [0, 1, 2], recipe, run=RunOptions(batch_size="auto", memory_limit=limit)
        ).batch_size
        for limit in (60_000, 120_000, 240_000, "1GB")
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1] == 12
    assert all(n < 4 or n % 4 == 0 for n in sizes)


@pytest.mark.slow
def test_auto_keeps_to_its_limit() -> None:
    """What learning takes in fact, beyond the data."""
    model = build(TinyCNN)
    data = labelled_images(40)
    recipe = Recipe(size=0.5, steps=12, images_per_step=4, memory=0.5)
    limit = 200_000
    session = Session(
        model, data, [0, 1, 2], recipe, run=RunOptions(batch_size="auto", memory_limit=limit)
    )
    assert session.batch_size < 12
    means = session.means()  # a pass of its own, of 32 images without a graph
    assert peak_memory(CPU, lambda: session.learn(means=means)) <= limit


@pytest.mark.slow
def test_auto_learns_the_same_gates() -> None:
    model = build(TinyCNN)
    data = labelled_images(30)
    recipe = Recipe(size=0.5, steps=4, images_per_step=4)
    plain = learn_gates(model, data, recipe=recipe, batch_size=64)
    auto = learn_gates(
        model, data, recipe=recipe, run=RunOptions(batch_size="auto", memory_limit=80_000)
    )
    assert auto.info["batch_size"] < plain.info["batch_size"]
    for site in plain.sites:
        assert torch.equal(plain[site.name] > 0.5, auto[site.name] > 0.5)


def test_auto_says_what_is_wrong() -> None:
    model = build(TinyCNN)
    data = labelled_images(20)
    recipe = Recipe(steps=2, images_per_step=4)
    with pytest.raises(ValueError, match=r"one image takes .* raise memory_limit"):
        learn_gates(
            model, data, recipe=recipe, run=RunOptions(batch_size="auto", memory_limit=1000)
        )
    with pytest.raises(ValueError, match="batch_size='auto'"):
        learn_gates(model, data, recipe=recipe, run=RunOptions(batch_size=8, memory_limit="1GB"))
    with pytest.raises(ValueError, match="'auto'"):
        learn_gates(model, data, recipe=recipe, batch_size="largest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="paper"):
        learn_gates(model, data, recipe=Recipe.paper(beta=0.1), batch_size="auto")


@pytest.mark.slow
def test_auto_goes_on_with_the_store_s_own_batch(tmp_path: Path) -> None:
    model = build(TinyCNN)
    data = labelled_images(30)
    recipe = Recipe(size=0.5, steps=2, images_per_step=4)
    path = tmp_path / "gates.h5"
    options = {"recipe": recipe, "batch_size": "auto"}
    learn_to_store(model, data, path, [0], run=RunOptions(memory_limit=80_000), **options)  # type: ignore[arg-type]
    with GateStore.open(path) as store:
        begun = store.provenance["batch_size"]
    assert isinstance(begun, int)
    learn_to_store(model, data, path, [0, 1], resume=True, **options)  # type: ignore[arg-type]
    with GateStore.open(path) as store:
        assert store.provenance["batch_size"] == begun
        assert list(store.tasks) == [0, 1]
    with pytest.raises(ValueError, match="executor"):
        learn_to_store(model, data, tmp_path / "b.h5", executor=InProcess(), **options)  # type: ignore[arg-type]


# -- what is free, from fake /proc and /sys trees --------------------------------------------------


def _tree(root: Path, files: dict[str, object]) -> None:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")


V2 = {
    "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB",
    "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0",
}
V1 = {
    "proc/meminfo": "MemAvailable: 8000 kB",
    "proc/self/cgroup": "5:cpu,cpuacct:/else\n4:memory:/slurm/uid_1/job_7\n1:name=systemd:/",
}
JOB2 = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
JOB1 = "sys/fs/cgroup/memory/slurm/uid_1/job_7"
TREES: dict[str, tuple[dict[str, object], int]] = {
    "no cgroup": ({"proc/meminfo": "MemAvailable: 8000 kB"}, 8000 * 1024),
    "version 2, no limit": (
        V2 | {f"{JOB2}/memory.max": "max", f"{JOB2}/memory.current": 5}, 8192000
    ),
    "version 2, the job's limit, above the step's": (
        V2
        | {
            f"{JOB2}/memory.max": 1000,
            f"{JOB2}/memory.current": 300,
            f"{JOB2}/step_0/memory.max": 2000,
            f"{JOB2}/step_0/memory.current": 200,
        },
        700,
    ),
    "version 2, page cache is no use": (
        V2
        | {
            f"{JOB2}/step_0/memory.max": 1000,
            f"{JOB2}/step_0/memory.current": 900,
            f"{JOB2}/step_0/memory.stat": "anon 250\ninactive_file 600\nslab_reclaimable 50",
        },
        750,
    ),
    "version 2, a container sees its own part only": (
        {
            **V2,
            "proc/self/cgroup": "0::/",
            "sys/fs/cgroup/memory.max": 500,
            "sys/fs/cgroup/memory.current": 100,
        },
        400,
    ),
    "version 1, nested": (
        V1
        | {
            "sys/fs/cgroup/memory/memory.limit_in_bytes": 2**63 - 4096,
            "sys/fs/cgroup/memory/memory.usage_in_bytes": 10**6,
            f"{JOB1}/memory.limit_in_bytes": 1000,
            f"{JOB1}/memory.usage_in_bytes": 950,
            f"{JOB1}/memory.stat": "cache 800\ninactive_file 5\ntotal_inactive_file 700",
        },
        750,
    ),
    "version 1, a container's mount, at another place": (
        {
            **V1,
            "proc/self/cgroup": "4:memory:/docker/abc/inner",
            "proc/self/mountinfo": "36 25 0:32 /docker/abc /cg/my\\040memory ro - cgroup c "
            "rw,memory\n37 25 0:33 / /cg/cpu ro - cgroup c rw,cpu",
            "cg/my memory/inner/memory.limit_in_bytes": 300,
            "cg/my memory/inner/memory.usage_in_bytes": 100,
        },
        200,
    ),
    "over the limit": (
        V2 | {f"{JOB2}/memory.max": 100, f"{JOB2}/memory.current": 300}, 0
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TREES)
def test_free_memory_is_that_of_the_tightest_cgroup(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, expected = TREES[case]
    _tree(tmp_path, files)
    monkeypatch.setattr(memory, "_ROOT", tmp_path)
    assert memory.available(torch.device("cpu")) == expected
