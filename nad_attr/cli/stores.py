"""``nad-attr inspect``, ``merge`` and ``export``: what is in files of gates."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any

import numpy as np
import typer

from nad_attr.cli import options as opt
from nad_attr.cli.messages import UsageError, check_size, counted, guarded, number, print_table, say
from nad_attr.cli.networks import check_network, write_network
from nad_attr.cli.opening import check_outputs, chosen_tasks, rebuilt
from nad_attr.gates.task_gates import TaskGates
from nad_attr.store import GateStore
from nad_attr.store import merge as merge_stores
from nad_attr.system.files import check_output, replacing, written
from nad_attr.system.safe_text import cell, members, shown

__all__ = ["export", "inspect", "merge"]

#: Rows of a table at most.
_MAX_ROWS = 20


def inspect(
    gates: opt.Store,
    tasks: opt.Tasks = None,
    json_file: Annotated[
        bool, typer.Option("--json", help="Print it as JSON, for other programs.")
    ] = False,
    debug: opt.Debug = False,
) -> None:
    """Show what is in a file of gates: where it comes from, its tasks and its sites.

    Examples:
      nad-attr inspect gates.h5
      nad-attr inspect gates.h5 --tasks cat,dog
      nad-attr inspect gates.h5 --json
    """
    with guarded(debug):
        with GateStore.open(gates) as store:
            if not len(store):
                typer.echo(f"{gates}: no task is finished yet.")
                return
            learned = store.read(chosen_tasks(store, tasks))
            facts = dict(store.provenance)
            results = {"results": list(store.results), "scores": list(store.score_methods)}
        archs = learned.sub_architectures()
        names = learned.task_names or tuple(map(str, learned.tasks))
        sizes = [arch.sizes for arch in archs]
        shares = {s.name: [size[s.name] for size in sizes] for s in learned.sites}
        if json_file:
            closed = "zero" if learned.means is None else "mean"
            closed = closed if learned.constants is None else "constants"
            content = {
                "file": str(gates),
                "provenance": facts,
                "recipe": None if learned.recipe is None else json.loads(learned.recipe.to_json()),
                "closed_channels": closed,
                "tasks": [
                    {"index": task, "name": name, "size": arch.size}
                    for task, name, arch in zip(learned.tasks, names, archs, strict=True)
                ],
                "sites": [
                    {
                        "name": site.name,
                        "n_channels": site.n_channels,
                        "channel_dim": site.channel_dim,
                        "mean_size": float(np.mean(shares[site.name])),
                    }
                    for site in learned.sites
                ],
                **results,
            }
            typer.echo(json.dumps(content, indent=1))
            return
        _print_facts(gates, learned, facts, results)
        rows = [
            [name, json.dumps(task), f"{arch.n_kept:,}", number(arch.size)]
            for task, name, arch in zip(learned.tasks, names, archs, strict=True)
        ]
        if len(rows) > _MAX_ROWS:
            rows = [*rows[:_MAX_ROWS], [f"... {len(rows) - _MAX_ROWS} more", "", "", ""]]
        print_table(["task", "class", "kept channels", "size"], rows)
        rows = []
        for site in learned.sites:
            share = shares[site.name]
            numbers = (float(np.mean(share)), min(share), max(share))
            rows.append([site.name, f"{site.n_channels:,}", *map(number, numbers)])
        print_table(["site", "channels", "mean size", "smallest", "largest"], rows)


def _print_facts(
    path: Path, gates: TaskGates, facts: dict[str, Any], results: dict[str, list[str]]
) -> None:
    images, said = facts.get("n_images"), facts.get("data")
    if said and isinstance(images, int):
        said = f"{said} ({images:,} images)"
    lines = [
        ("file", str(path)),
        ("model", facts.get("model")),
        ("weights", facts.get("weights")),
        ("weights hash", str(facts.get("model_hash") or "")[:16]),
        ("learned from", said),
        ("recipe", None if gates.recipe is None else repr(gates.recipe)),
        ("closed channels", gates.closed_at),
        ("seed", facts.get("seed")),
    ]
    environment = facts.get("environment")
    if isinstance(environment, dict):
        used = [f"{key} {environment[key]}" for key in ("nad_attr", "torch") if key in environment]
        lines.append(("with", ", ".join([*used, str(facts.get("device") or "")])))
    lines += [(name, ", ".join(values)) for name, values in results.items()]
    for name, value in lines:
        if value not in (None, ""):
            typer.echo(f"{name:16} {shown(value)}")


def merge(
    files: Annotated[list[Path], typer.Argument(metavar="GATES.h5...", help="Two files or more.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="File to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing file.")
    ] = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> None:
    """Put the tasks of several files into one; network, sites and recipe have to be the same.

    Examples:
      nad-attr merge first.h5 second.h5 --out gates.h5
    """
    with guarded(debug):
        if len(files) < 2:
            raise UsageError("merge takes two files or more.")
        if out.exists() and not overwrite:
            raise UsageError(f"{out} is there already; --overwrite replaces it.")
        check_outputs([(out, "HDF5")], files)
        merge_stores(files, out, overwrite=overwrite)
        with GateStore.open(out) as store:
            say(f"{out}: {counted(len(store), 'task')} of {len(files)} files", quiet)


def export(
    gates: opt.Store,
    csv_file: Annotated[
        Path | None,
        typer.Option("--csv", help="A row for each task, site and channel; - for standard output."),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", help="The kept channels of each task at each site; - likewise."),
    ] = None,
    npz_file: Annotated[
        Path | None,
        typer.Option("--npz", help="Arrays gate/SITE, logit/SITE, kept/SITE (tasks, channels)."),
    ] = None,
    network: Annotated[
        Path | None,
        typer.Option(
            help="Sub-architectures of one class, or of several, as a smaller network, and a .json "
            "beside it: .pt2 (torch.export), .onnx, or .safetensors (a state dict, and the .py "
            "file it is for)."
        ),
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            "--tasks",
            "--task",
            help="Class indices, ranges or names: 0-99,207 or cat,dog; default: all.",
        ),
    ] = None,
    size: Annotated[
        float | None, typer.Option(help="Keep this share of the channels; default: as learned.")
    ] = None,
    kept_only: Annotated[
        bool, typer.Option("--kept-only", help="Leave closed channels out of the CSV file.")
    ] = False,
    head: Annotated[
        str, typer.Option(help="Outputs of --network: the task's alone, or the whole network's.")
    ] = "task",
    merge_bn: Annotated[
        bool, typer.Option("--merge-bn", help="Merge BatchNorm layers into convolutions.")
    ] = False,
    side_by_side: Annotated[
        bool,
        typer.Option(
            "--side-by-side",
            help="For several classes: --network gives each class its own network; default: one "
            "network of all channels that any of them needs.",
        ),
    ] = False,
    pixels: Annotated[
        int | None,
        typer.Option(min=1, help="Side of --network's images, where no transform sets it: 224."),
    ] = None,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
    *,
    source: opt.NetworkOptions,
) -> None:
    """Write gates as CSV, JSON or NumPy arrays, or a class's network as a smaller one.

    Examples:
      nad-attr export gates.h5 --csv gates.csv
      nad-attr export gates.h5 --csv - --tasks cat --kept-only | head
      nad-attr export gates.h5 --json kept.json --size 0.2
      nad-attr export gates.h5 --task cat --network cat.onnx
      nad-attr export gates.h5 --task cat --task dog --network two.pt2
    """
    with guarded(debug):
        if csv_file is None and json_file is None and npz_file is None and network is None:
            raise UsageError(
                "say what to write: --csv, --json, --npz or --network, with a file name."
            )
        check_size(size)
        if network is not None:
            check_network(network, gates, tasks, head, (csv_file, json_file, npz_file))
        if npz_file is not None and npz_file.suffix != ".npz":
            npz_file = npz_file.with_name(f"{npz_file.name}.npz")
        texts = [path for path in (csv_file, json_file) if path is not None and str(path) != "-"]
        archives = [] if npz_file is None else [(npz_file, "archive")]
        check_outputs([*((path, "text") for path in texts), *archives], [gates])
        if network is not None:
            kind = "archive" if network.suffix == ".pt2" else "data"
            check_output(network, kind, [gates, source.weights])
        with GateStore.open(gates) as store:
            learned = store.read(chosen_tasks(store, tasks))
            provenance = dict(store.provenance)
        if network is not None and len(learned) > 1 and head == "whole":
            raise UsageError(
                f"--head whole writes the network of one class, and {len(learned)} are chosen; "
                "their network has one output for each."
            )
        if csv_file is not None:
            with _written(csv_file) as file:
                count = _csv(learned, size, kept_only, file)
            say(f"written: {csv_file} ({count:,} rows)", quiet or str(csv_file) == "-")
        if json_file is not None:
            with _written(json_file) as file:
                json.dump(_kept(learned, size), file, indent=1)
                file.write("\n")
            say(f"written: {json_file}", quiet or str(json_file) == "-")
        if npz_file is not None:
            with replacing(npz_file) as scratch, scratch.open("wb") as file:
                np.savez_compressed(file, **_arrays(learned, size))
            say(f"written: {npz_file}", quiet)
        if network is not None:
            opened = rebuilt(provenance, source, quiet=quiet)
            write_network(
                learned,
                opened,
                network,
                size=size,
                head=head,
                pixels=pixels,
                merge_bn=merge_bn,
                how="side by side" if side_by_side else "union",
                quiet=quiet,
            )


@contextmanager
def _written(path: Path) -> Iterator[IO[str]]:
    if str(path) == "-":
        yield sys.stdout
        sys.stdout.flush()
    else:
        with written(path) as file:
            yield file


def _csv(gates: TaskGates, size: float | None, kept_only: bool, file: IO[str]) -> int:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["task", "name", "site", "channel", "gate", "logit", "kept"])
    names = gates.task_names or tuple(map(str, gates.tasks))
    logits = gates.logits
    count = 0
    for row, (task, name) in enumerate(zip(gates.tasks, names, strict=True)):
        masks, own = gates.sub_architecture(task, size).masks, gates.gates_of(task)
        label = task if isinstance(task, int) else "+".join(map(str, task))
        texts = {site.name: (cell(name), cell(site.name)) for site in gates.sites}
        for site in gates.sites:
            values = own[site.name].tolist()
            ranks = [""] * len(values) if logits is None else logits[site.name][row].tolist()
            flags = masks[site.name].tolist()
            for channel, (gate, logit, kept) in enumerate(zip(values, ranks, flags, strict=True)):
                if kept or not kept_only:
                    rank = logit if logit == "" else f"{logit:.6g}"
                    writer.writerow(
                        [label, *texts[site.name], channel, f"{gate:.6g}", rank, int(kept)]
                    )
                    count += 1
    return count


def _kept(gates: TaskGates, size: float | None) -> dict[str, Any]:
    names = gates.task_names or tuple(map(str, gates.tasks))
    tasks = []
    for task, name, arch in zip(gates.tasks, names, gates.sub_architectures(size), strict=True):
        kept = {site: channels.tolist() for site, channels in arch.kept.items()}
        tasks.append({"index": task, "name": name, "size": arch.size, "kept": kept})
    return {"sites": {site.name: site.n_channels for site in gates.sites}, "tasks": tasks}


def _arrays(gates: TaskGates, size: float | None) -> dict[str, Any]:
    archs, logits = gates.sub_architectures(size), gates.logits
    arrays: dict[str, Any] = {
        "task": np.array([json.dumps(task) for task in gates.tasks]),
        "name": np.array(gates.task_names or tuple(map(str, gates.tasks))),
    }
    for site in gates.sites:
        arrays[f"gate/{site.name}"] = gates[site.name].numpy()
        arrays[f"kept/{site.name}"] = np.stack([arch[site.name].numpy() for arch in archs])
        if logits is not None:
            arrays[f"logit/{site.name}"] = logits[site.name].numpy()
    return members(arrays)
