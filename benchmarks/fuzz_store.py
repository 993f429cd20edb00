"""Open thousands of damaged store files: each has to end in success or in ``GateStoreError``.

    python -m benchmarks.fuzz_store --n 10000

Files of gates, sub-architectures and results, and journals of unfinished runs, are mutated: bytes
and bits flipped, numbers replaced by extreme ones, pieces copied, cut out or zeroed, ends cut off;
and, with HDF5 itself so that every checksum is right again, groups and datasets deleted, linked
elsewhere, given other shapes, types, chunks and huge claims, groups of others by thousands and
nested deep, JSON of absurd numbers and of characters that command a terminal. Beside the file
stands something other than its journal. A third of the files are written to as well. A forked
process reads all that is left of each under a limit of time and memory; when it dies, that is
counted, and another one goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import torch

from nad_attr import GateSite, GateStoreError, Recipe, SubArchitecture, TaskGates
from nad_attr.gates.history import History
from nad_attr.store import GateStore, read_result, result_names, write_result

#: Most seconds of the processor, and most bytes beyond what the process had before, for a file.
SECONDS, BYTES = 1.0, 200 * 2**20
#: After so many seconds of the clock a file counts as one that hangs.
HANGS = 20

SITES = [GateSite("conv1", 16), GateSite("layer1.0", 24), GateSite("blocks.1", 40, -1)]


# -- whole files -----------------------------------------------------------------------------------


def make_gates(n: int = 12) -> TaskGates:
    """Gates with everything that a store can hold."""
    generator = torch.Generator().manual_seed(0)
    logits = {s.name: torch.randn(n, s.n_channels, generator=generator) for s in SITES}
    return TaskGates(
        {name: value.sigmoid() for name, value in logits.items()},
        SITES,
        [(0, 1), *range(2, n + 1)],
        logits=logits,
        means={s.name: torch.randn(s.n_channels, generator=generator) for s in SITES},
        recipe=Recipe(size=0.3),
        history=History({"loss": torch.rand(5, n, generator=generator).numpy()}),
        task_names=[f"class {i}" for i in range(n)],
        info={"seed": 3, "device": "cpu"},
    )


def make_files(folder: Path) -> list[Path]:
    """One of each kind of file."""
    gates = make_gates()
    gates.save(folder / "gates.h5")
    gates.sub_architecture(2).save(folder / "architecture.h5")
    write_result(
        folder / "results.h5",
        "evaluation/heldout",
        {"auc": np.linspace(0, 1, 50), "n": np.arange(50), "names": ["a", "b"]},
        {"seed": 1},
    )
    with GateStore.create(folder / "full.h5", SITES, provenance={"model": "net"}) as store:
        store.append(gates, sample_counts=dict.fromkeys(gates.tasks, 7))
        scores = {s.name: torch.rand(2, s.n_channels) for s in SITES}
        store.write_scores("taylor", scores, [2, 3], attributes={"images": 100})
        store.write_result("evaluation/heldout", {"auc": np.zeros((12, 12))}, {"seed": 2})
    # An unfinished run: most of it is in the journal.
    store = GateStore.create(folder / "begun.h5", SITES)
    for task in gates.tasks[:5]:
        store.append(gates.select([task]))
    shutil.copy(folder / "begun.h5", folder / "unfinished.h5")
    shutil.copy(folder / "begun.h5.journal", folder / "unfinished.h5.journal")
    store.close()
    (folder / "begun.h5").unlink()
    return sorted(folder.iterdir())


# -- damage ----------------------------------------------------------------------------------------

#: Clears the screen, writes to the clipboard, turns the direction, forges a line.
_TERMINAL = "\x1b[2J\x1b]52;c;aGk=\x07\u202e\x9b\u2028\nError: "
_WORDS = (0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**20, 2**63 - 1, 2**64 - 1, 2**40)


def mutated(content: bytes, dice: random.Random) -> bytes:
    """Content with a few of its bytes otherwise."""
    data = bytearray(content)
    if dice.random() < 0.12:
        return bytes(data[: dice.randrange(len(data))])
    # Where formats keep what matters most, more often than elsewhere.
    limit = len(data) if dice.random() < 0.7 else min(len(data), 4096)
    for _ in range(dice.choice((1, 1, 1, 2, 4, 16, 64))):
        at, which = dice.randrange(min(limit, len(data))), dice.random()
        if which < 0.35:
            data[at] = dice.randrange(256)
        elif which < 0.6:
            data[at] ^= 1 << dice.randrange(8)
        elif which < 0.75:
            data[at : at + 4] = struct.pack("<I", dice.choice(_WORDS) % 2**32)
        elif which < 0.87:
            data[at : at + 8] = struct.pack("<Q", dice.choice((*_WORDS, dice.randrange(len(data)))))
        elif which < 0.95:
            start, length = dice.randrange(len(data)), dice.randrange(1, 512)
            data[at : at + length] = data[start : start + length]
        elif which < 0.98:
            data[at : at + dice.randrange(1, 512)] = bytes(dice.randrange(1, 512))
        else:
            del data[at : at + dice.randrange(1, 64)]
        if not data:
            break
    return bytes(data)


def reshaped(path: Path, dice: random.Random) -> None:
    """Change a file by HDF5's own means: every checksum is right afterwards."""
    with h5py.File(path, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        for _ in range(dice.choice((1, 1, 2, 4))):
            name = dice.choice(names)
            if name not in file:
                continue
            item = file[name]
            if isinstance(item, h5py.Dataset) and dice.random() < 0.8:
                _replace(file, name, item, dice)
            elif dice.random() < 0.5 and len(item.attrs):
                _set_attribute(item, dice)
            else:
                del file[name]
                _link(file, name, dice)
        if dice.random() < 0.3:
            _set_attribute(file, dice)
        if dice.random() < 0.3:
            dice.choice((_nest, _say, _say, _say, _bomb))(file, dice)


def _link(file: h5py.File, name: str, dice: random.Random) -> None:
    which = dice.randrange(5)
    if which == 0:
        file[name] = h5py.SoftLink(dice.choice(("/site", f"/{name}", "/nowhere", "..", "/")))
    elif which == 1:
        file[name] = h5py.ExternalLink(dice.choice(("/etc/passwd", "/dev/zero", "x.h5")), "/site")
    elif which == 2:
        file[name] = file["/"]  # a circle
    elif which == 3:
        file.create_group(name)


def _replace(file: h5py.File, name: str, item: h5py.Dataset, dice: random.Random) -> None:
    shape, kind = list(item.shape), item.dtype
    del file[name]
    which = dice.randrange(10)
    if which < 3 and shape:
        axis = dice.randrange(len(shape))
        shape[axis] = dice.choice((0, 1, 2, 7, 1000, 2**20, 2**31, 2**40))
    elif which < 5:
        kind = np.dtype(
            dice.choice(("f2", "f8", ">f4", "i1", "u8", "c8", "S3", "V7", "b1", "M8[s]", "f4,i4"))
        )
        kind = h5py.opaque_dtype(kind) if kind.kind == "M" else kind
    elif which < 7:
        kind = dice.choice((h5py.string_dtype(), h5py.vlen_dtype("f4"), h5py.ref_dtype))
    elif which == 7:
        shape = [*shape, dice.choice((1, 2))]
    options: dict[str, object] = {}
    size = int(np.prod(shape, dtype=object))
    if size > 10**6 or dice.random() < 0.5:
        options["chunks"] = tuple(max(1, min(n, dice.choice((1, 64, 1024)))) for n in shape) or None
        if options["chunks"] and kind.kind != "O" and dice.random() < 0.7:
            options.update(compression=dice.choice(("gzip", "lzf")), shuffle=dice.random() < 0.5)
    if which == 8 and shape and kind.kind != "O":
        layout = h5py.VirtualLayout(tuple(shape), kind)
        layout[...] = h5py.VirtualSource("/etc/passwd", "x", tuple(shape))
        file.create_virtual_dataset(name, layout)
        return
    if which == 9 and kind.kind != "O":
        options = {"external": [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]}
    if "chunks" in options and (0 in shape or not shape):
        options = {}
    data = file.create_dataset(name, tuple(shape), kind, **options)
    if "external" not in options and kind.kind in "fiub" and 0 < size < 10**5:
        values = np.random.default_rng(dice.randrange(2**32)).normal(size=shape)
        if dice.random() < 0.2:
            values.flat[0] = np.nan
        with np.errstate(all="ignore"):
            data[...] = (values * dice.choice((0, 0.1, 1, 1e30))).astype(kind)


def _nest(file: h5py.File, dice: random.Random) -> None:
    """Groups of somebody else's: a few or thousands, side by side or each in the one before."""
    group, deep = h5py.h5g.create(file.id, b"theirs"), dice.random() < 0.5
    for i in range(dice.choice((3, 100, 12_000 if deep else 21_000))):
        made = h5py.h5g.create(group, b"%d" % i)
        group = made if deep else group


def _say(file: h5py.File, dice: random.Random) -> None:
    """JSON and numbers that are whole, and absurd."""
    value = dice.choice(
        ("9" * 400, "9" * 5000, "1e999", "-Infinity", "NaN", json.dumps(_TERMINAL), "[" * 40_000)
    )
    which = dice.randrange(4)
    if which == 0:
        file.attrs[dice.choice(("provenance", "info"))] = np.bytes_(f'{{"model": {value}}}')
    elif which == 1:
        file.attrs["revision"] = np.int64(dice.choice((2**63 - 1, 2**62, -1)))
    elif which == 2 and "task/index" in file:
        n = min(len(file["task/index"]), 99)
        del file["task/index"]
        texts = [str(i) for i in range(n - 1)] + [dice.choice((value, str(2**63), f"[{2**64}]"))]
        file["task"].create_dataset("index", data=np.array([t.encode() for t in texts], "S"))
    elif "task/name" in file:
        names = [f"{i}{_TERMINAL}".encode() for i in range(min(len(file["task/name"]), 99))]
        del file["task/name"]
        file["task"].create_dataset("name", data=np.array(names, "S"))


def _bomb(file: h5py.File, dice: random.Random) -> None:
    """Gates of one number, which compress a thousandfold."""
    if "task/index" not in file or "site/0/gate" not in file:
        return
    n, width = min(len(file["task/index"]), 99), dice.choice((10**4, 10**6))
    del file["site/0/gate"]
    data = (
        file["site/0"]
        .create_dataset("gate", (n, width), "f4", chunks=(1, width), compression="gzip")
        .id
    )
    chunk = zlib.compress(bytes(4 * width), 1)
    for i in range(n):
        data.write_direct_chunk((i, 0), chunk)
    index = json.loads(file["site"].attrs["index"])
    index[0][1] = width
    file["site"].attrs["index"] = np.bytes_(json.dumps(index))


def beside(journal: Path, others: list[Path], dice: random.Random) -> None:
    """Put something in the place of a journal that is none, or is another store's."""
    journal.unlink(missing_ok=True)
    which = dice.randrange(6)
    if which == 0:
        journal.symlink_to(dice.choice(("/dev/zero", "/etc/passwd", "nowhere")))
    elif which == 1:
        os.mkfifo(journal)
    elif which == 2:
        journal.write_bytes(b"a diary" * 9)
    elif which == 3:
        with journal.open("wb") as file:
            file.write(b"nad_attr journal 1\n")
            file.truncate(2**42)
    else:
        shutil.copy(dice.choice(others), journal)


def _set_attribute(item: h5py.HLObject, dice: random.Random) -> None:
    name = dice.choice(list(item.attrs) or ["kind"])
    value = dice.choice(
        (
            0,
            -1,
            2**40,
            0.5,
            "text",
            [1, 2, 3],
            np.bytes_(b"\xff\xfe"),
            np.bytes_(b"[" * 30_000),
            np.bytes_(b"{}"),
            np.bytes_(b'{"kind": "Recipe", "steps": 1e400}'),
            h5py.Empty("f4"),
            np.zeros(5000),
        )
    )
    item.attrs[name] = value


# -- reading ---------------------------------------------------------------------------------------


def read_everything(path: Path) -> None:
    """Whatever a file says that it is, read all of it."""
    for read in (_read_store, _read_architecture, _read_results):
        try:
            return read(path)
        except GateStoreError as error:
            if "holds '" not in str(error) or read is _read_results:
                raise


def _read_store(path: Path) -> None:
    with GateStore.open(path) as store:
        if not store.describe().replace("\n", "").isprintable():
            raise AssertionError("what is shown commands the terminal")
        if len(store):
            store.read(store.tasks[:1])
            store.read()
        for method in store.score_methods:
            store.scores(method)
            store.score_attributes(method)
        for name in store.results:
            store.result(name)


def write_something(path: Path) -> None:
    """Append to what may be a store; all of it is written anew then."""
    with GateStore.open(path, "a") as store:
        store.write_result("evaluation/new", {"auc": np.zeros(3)})


def _read_architecture(path: Path) -> None:
    SubArchitecture.load(path)


def _read_results(path: Path) -> None:
    for name in result_names(path):
        read_result(path, name)


# -- the campaign ----------------------------------------------------------------------------------


def damage(bases: list[Path], folder: Path, number: int, seed: int) -> Path:
    """Make the damaged file of a number; the same for the same seed."""
    dice = random.Random(f"{seed}/{number}")
    base = dice.choice(bases)
    path = folder / "damaged.h5"
    for left in folder.iterdir():
        left.unlink()
    journal = folder / "damaged.h5.journal"
    if base.suffix == ".journal":
        shutil.copy(base.with_suffix(""), path)
        journal.write_bytes(mutated(base.read_bytes(), dice))
        return path
    path.write_bytes(base.read_bytes())
    if base.with_name(base.name + ".journal").exists():
        shutil.copy(base.with_name(base.name + ".journal"), journal)
    if dice.random() < 0.08:
        beside(journal, [b for b in bases if b.suffix == ".journal"], dice)
        if dice.random() < 0.5:
            return path
    if dice.random() < 0.35:
        # What HDF5 does not do is left out; what it did before stays.
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RuntimeError):
            reshaped(path, dice)
    else:
        path.write_bytes(mutated(base.read_bytes(), dice))
    return path


def _memory(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


def _reset_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _reader(
    bases: list[Path], folder: Path, numbers: range, seed: int, tell: Callable[[object], None]
) -> None:
    warnings.simplefilter("ignore")  # journals of other stores are warned of
    used = _memory("VmSize")
    # Far more than allowed, so that a large allocation is seen and not only refused.
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in numbers:
        path = damage(bases, folder, number, seed)
        tell([number, "begin", 0, 0])
        signal.alarm(HANGS)
        _reset_peak()
        before = _memory("VmRSS")
        started = time.process_time()
        try:
            read_everything(path)
            if number % 3 == 0:
                write_something(path)
            end = "success"
        except GateStoreError as error:
            end = "GateStoreError" if str(error).isprintable() else "a message that commands"
        except BaseException as error:
            end = f"{type(error).__name__}: {error}"[:200]
        seconds = time.process_time() - started
        signal.alarm(0)
        tell([number, end, seconds, _memory("VmHWM") - before])


def campaign(n: int, seed: int = 0, *, show: bool = False) -> dict[str, object]:
    """Read ``n`` damaged files.

    Returns:
        How many ended how, the most seconds and bytes that one took, and the numbers of those that
        ended or took what they must not.
    """
    ends: Counter[str] = Counter()
    bad: list[list[object]] = []
    most_seconds, most_bytes, done = 0.0, 0, 0
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "bases").mkdir()
        (Path(name) / "damaged").mkdir()
        bases = make_files(Path(name) / "bases")
        while done < n:
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.close(reading)
                code = 1
                try:

                    def tell(message: object, file: int = writing) -> None:
                        os.write(file, (json.dumps(message) + "\n").encode())

                    _reader(bases, Path(name) / "damaged", range(done, n), seed, tell)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            os.close(writing)
            with os.fdopen(reading) as messages:
                for line in messages:
                    number, end, seconds, size = json.loads(line)
                    if end == "begin":
                        continue
                    done = number + 1
                    ends[end] += 1
                    most_seconds = max(most_seconds, seconds)
                    most_bytes = max(most_bytes, size)
                    known = end in ("success", "GateStoreError")
                    if not known or seconds > SECONDS or size > BYTES:
                        bad.append([number, end, round(seconds, 2), size])
                    if show and done % 500 == 0:
                        print(f"{done}/{n}: {dict(ends)}", file=sys.stderr, flush=True)
            status = os.waitpid(pid, 0)[1]
            if status:
                code = os.waitstatus_to_exitcode(status)
                end = "hangs" if code == -signal.SIGALRM else f"exit code {code}"
                ends[end] += 1
                bad.append([done, end, None, None])
                done += 1
    return {
        "files": n,
        "seed": seed,
        "ends": dict(ends),
        "most_seconds": round(most_seconds, 3),
        "most_megabytes": round(most_bytes / 1e6, 1),
        "bad": bad,
    }


def main() -> None:
    """Run the campaign and print what came of it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=10_000, help="damaged files")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = campaign(arguments.n, arguments.seed, show=True)
    print(json.dumps(found, indent=1))
    raise SystemExit(bool(found["bad"]))


if __name__ == "__main__":
    main()
