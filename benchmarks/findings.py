"""Tables and figures of what the benchmarks found, for docs/findings.md and docs/findings_rows.md.

    python -m benchmarks.findings            # rewrites the tables of both pages, and the figures
    python -m benchmarks.findings --print    # prints the tables

Reads ``benchmarks/results/{disentanglement,rivals}/*.jsonl``, ``constants_study.jsonl``,
``planted.json`` and ``questions/*.json`` beside them; measures nothing itself. A table stands in
its page between ``<!-- name -->`` and ``<!-- end -->``; the text around it is written by hand and
has to agree with it.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cifar import REPOSITORY
from benchmarks.constants_study import ONE_RUN, OUT, REPLICAS
from benchmarks.disentanglement import PER_TASK, RESULTS, read_rows, results_file
from benchmarks.networks import PAIRS, REAL, kind_of
from benchmarks.questions import RESULTS as QUESTIONS
from nad_attr.evaluation import bootstrap_interval

PLANTED = REPOSITORY / "benchmarks" / "results" / "planted.json"
PAGES = [REPOSITORY / "docs" / f"{name}.md" for name in ("findings", "findings_rows")]
IMAGES = REPOSITORY / "docs" / "images"
#: Rows of methods with best constants.
RIVALS = RESULTS.parent / "rivals"

#: {method: {size: (seeds, tasks)}} of one measure
Table = dict[str, dict[str, "np.ndarray[Any, Any]"]]


class Pair:
    """The rows of one network x data set."""

    def __init__(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.name = name
        self.rows = [row for row in rows if "sizes" in row]
        self.failed = {
            row["method"]: row["error"] for row in rows if "error" in row and row["seed"] == 0
        }

    @property
    def ablations(self) -> list[str]:
        """Those that were run."""
        return sorted({row["ablation"] for row in self.rows})

    def seeds(self, ablation: str) -> list[int]:
        """Seeds for which NAD was run."""
        return sorted(
            row["seed"]
            for row in self.rows
            if row["method"] == "nad" and row["ablation"] == ablation
        )

    def table(self, ablation: str, measure: str) -> Table:
        """Values by method and size, over the seeds that NAD has: NaN where a method has none."""
        wanted = self.seeds(ablation)
        result: Table = {}
        by_method: dict[str, dict[int, dict[str, Any]]] = {}
        for row in self.rows:
            if row["ablation"] == ablation and row["seed"] in wanted:
                by_method.setdefault(row["method"], {})[row["seed"]] = row["sizes"]
        for method, by_seed in by_method.items():
            for size in sorted({s for cells in by_seed.values() for s in cells}, key=float)[::-1]:
                cells = [by_seed.get(seed, {}).get(size, {measure: None}) for seed in wanted]
                listed = [_listed(cell[measure]) for cell in cells]
                n = max(map(len, listed))
                values = [v * n if v == [None] else v for v in listed]
                result.setdefault(method, {})[size] = np.array(values, dtype=float)
        return result

    def whole(self, measure: str) -> float:
        """Of the whole network, mean over seeds."""
        return float(np.mean([row["whole"][measure] for row in self.rows]))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def load(folder: Path = RESULTS, names: Sequence[str] = PAIRS) -> list[Pair]:
    """All pairs that have rows, in the benchmark's order."""
    pairs = [Pair(name, read_rows(results_file(folder, name))) for name in names]
    return [pair for pair in pairs if any(row["method"] == "nad" for row in pair.rows)]


def n_seeds(by_size: dict[str, np.ndarray[Any, Any]]) -> int:
    """Seeds with which a method was run, at one size at least."""
    return max(int((~np.isnan(values).all(1)).sum()) for values in by_size.values())


def best_rival(table: Table, size: str) -> tuple[str, np.ndarray[Any, Any]]:
    """The rival with the highest mean at a size."""
    means = {
        method: float(np.nanmean(values[size]))
        for method, values in table.items()
        if method != "nad" and size in values
    }
    name = max(means, key=lambda method: means[method])
    return name, table[name][size]


def comparisons(
    pairs: list[Pair], measure: str = "own_auc"
) -> Iterator[tuple[Pair, str, str, dict[str, Any]]]:
    """NAD against the best rival in every cell, with the interval of the paired difference."""
    for pair in pairs:
        for ablation in pair.ablations:
            table = pair.table(ablation, measure)
            chance = pair.table(ablation, "own_auc")
            for size, nad in table["nad"].items():
                if not any(size in table[method] for method in table if method != "nad"):
                    continue
                rival, values = best_rival(table, size)
                both = ~np.isnan(values).all(1)  # of the seeds
                low, high = bootstrap_interval(nad[both] - values[both])
                above = any(
                    bootstrap_interval(v[size])[0] > 0.5 for v in chance.values() if size in v
                )
                yield (
                    pair,
                    ablation,
                    size,
                    {
                        "nad": float(np.nanmean(nad[both])),
                        "rival": rival,
                        "value": float(np.nanmean(values)),
                        "low": low,
                        "high": high,
                        "above_chance": above,
                        "n_seeds": int(both.sum()),
                    },
                )


def _lines(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    rule = ["---"] * left + ["--:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def _f(value: float, digits: int = 3) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.{digits}f}"


def overview(pairs: list[Pair]) -> str:
    """Which cells were run."""
    rows = []
    for pair in pairs:
        methods = {row["method"] for row in pair.rows}
        n = {row["n_images"] for row in pair.rows}
        rows.append(
            [
                pair.name,
                kind_of(pair.name.partition("/")[0]),
                _f(pair.whole("own_auc")),
                ", ".join(f"{a}: {len(pair.seeds(a))}" for a in pair.ablations),
                str(len(methods)),
                "/".join(map(str, sorted(n))),
                "; ".join(sorted(pair.failed)) or "-",
            ]
        )
    head = ["network / data", "kind", "whole own AUC", "seeds", "methods", "images", "not possible"]
    return _lines(head, rows, 2)


def against_best(pairs: list[Pair], measure: str) -> str:
    """One row for each pair and ablation value: NAD, best rival, interval of the difference."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    sizes: list[str] = []
    for pair, ablation, size, found in comparisons(pairs, measure):
        sign = "**" if found["low"] > 0 else ""
        text = (
            f"{sign}{_f(found['nad'])}{sign} / {_f(found['value'])} {found['rival']} "
            f"[{found['low']:+.3f}, {found['high']:+.3f}]"
        )
        cells.setdefault((pair.name, ablation), {})[size] = (
            text if found["above_chance"] else "chance"
        )
        if size not in sizes:
            sizes.append(size)
    # The whole network's fidelity is 1, and its disentanglement 0.
    whole = {pair.name: [_f(pair.whole(measure))] for pair in pairs if measure == "own_auc"}
    rows = [
        [name, ab, *whole.get(name, []), *(row.get(s, "-") for s in sizes)]
        for (name, ab), row in cells.items()
    ]
    head = ["network / data", "closed", *(["whole"] if whole else [])]
    return _lines([*head, *(f"{float(s):.0%}" for s in sizes)], rows, 2)


def wins(pairs: list[Pair]) -> str:
    """How often NAD is best."""
    rows = []
    for measure in PER_TASK:
        found = [(a, s, c) for _, a, s, c in comparisons(pairs, measure) if c["above_chance"]]
        for ablation in ("mean", "zero", "best"):
            mine = [c for a, _, c in found if a == ablation]
            if mine:
                rows.append(
                    [
                        measure.replace("_", " "),
                        ablation,
                        str(len(mine)),
                        str(sum(c["nad"] > c["value"] for c in mine)),
                        str(sum(c["low"] > 0 for c in mine)),
                        str(sum(c["high"] < 0 for c in mine)),
                    ]
                )
    head = ["measure", "closed", "cells", "NAD highest", "interval above 0", "interval below 0"]
    return _lines(head, rows, 2)


def methods(pairs: list[Pair], measure: str = "own_auc") -> str:
    """Mean of every method over the ablation values, and over the pairs that it was run on."""
    sums: dict[str, dict[str, list[float]]] = {}
    runs: dict[str, int] = {}
    for pair in pairs:
        for ablation in pair.ablations:
            for method, by_size in pair.table(ablation, measure).items():
                runs[method] = runs.get(method, 0) + n_seeds(by_size)
                for size, values in by_size.items():
                    sums.setdefault(method, {}).setdefault(size, []).append(
                        float(np.nanmean(values))
                    )
    sizes = list(sums["nad"])
    most_run = [size for size in sizes if all(size in by for by in sums.values())]
    order = sorted(sums, key=lambda m: -np.mean([np.mean(sums[m][s]) for s in most_run]))
    counted = pairs[0].ablations == ["best"]  # there not all methods were run on all pairs
    rows = [
        [m, *([str(len(sums[m][sizes[0]])), str(runs[m])] if counted else [])]
        + [_f(float(np.mean(sums[m].get(s, np.nan)))) for s in sizes]
        for m in order
    ]
    head = ["method", *(["networks", "runs"] if counted else [])]
    return _lines([*head, *(f"{float(s):.0%}" for s in sizes)], rows)


def real(pairs: list[Pair]) -> str:
    """Own AUC and fidelity of every method on the large networks, means over tasks and seeds."""
    rows = []
    sizes = sorted({s for p in pairs for s in p.table("best", "own_auc")["nad"]}, key=float)[::-1]
    for pair in pairs:
        auc, fidelity = (pair.table("best", measure) for measure in ("own_auc", "fidelity"))
        for method in sorted(auc, key=lambda m: -np.mean([np.nanmean(v) for v in auc[m].values()])):
            n = n_seeds(auc[method])
            cells = [
                f"{_f(float(np.nanmean(auc[method][s])), 2)} / "
                f"{_f(float(np.nanmean(fidelity[method][s])), 2)}"
                if s in auc[method]
                else "-"
                for s in sizes
            ]
            rows.append([pair.name, method, str(n), *cells])
    return _lines(["network", "method", "seeds", *(f"{float(s):.0%}" for s in sizes)], rows, 2)


def agreement() -> str:
    """Own AUC, fidelity and kappa between two seeds at 40 %: one run, and guided by replicas."""
    cells: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for row in read_rows(OUT):  # the last row of a seed counts
        if row["variant"] in (ONE_RUN, REPLICAS):
            cells.setdefault(row["pair"], {}).setdefault(row["variant"], {})[row["seed"]] = row
    rows = []
    for pair, variants in cells.items():
        line = [pair]
        for found in (variants[name] for name in (ONE_RUN, REPLICAS)):
            cell = [row["sizes"]["0.4"] for row in found.values()]
            auc, fidelity = (np.mean([values[i] for values in cell]) for i in (0, 1))
            line += [f"{auc:.3f} / {fidelity:.2f}", f"{found[1]['kappa']['0.4']:.2f}"]
        rows.append(line)
    return _lines(["network / data", "`Recipe()`", "kappa", "`Recipe(replicas=8)`", "kappa"], rows)


def classifier(pairs: list[Pair]) -> str:
    """NAD as a detector and as a classifier, at 40 % and 10 %."""
    rows = []
    for pair in pairs:
        for ablation in pair.ablations:
            for size in ("0.4", "0.1"):
                cells = [pair.name, ablation, f"{float(size):.0%}"]
                for measure in (
                    *("own_auc", "other_auc", "disentanglement", "fidelity", "rank_fidelity"),
                    *("recall", "fpr", "ba", "other_accuracy"),
                ):
                    values = pair.table(ablation, measure)["nad"].get(size)
                    cells.append("-" if values is None else _f(float(np.nanmean(values)), 2))
                rows.append(cells)
    head = ["network / data", "closed", "size", "own AUC", "other AUC", "disent.", "fidelity"]
    return _lines([*head, "rank fid.", "recall", "FPR", "BA", "other acc."], rows, 3)


def _questions() -> dict[str, dict[str, Any]]:
    found = {}
    for name in PAIRS:
        path = QUESTIONS / f"{name.replace('/', '_')}.json"
        if path.is_file():
            found[name] = json.loads(path.read_text())
    return found


def stability(found: Mapping[str, dict[str, Any]]) -> str:
    """Kappa between seeds."""
    rows = []
    sizes: list[str] = []
    for name, parts in found.items():
        if "seeds" not in parts:
            continue
        for ablation in ("mean", "zero"):
            mine = {k.partition("/")[2]: v for k, v in parts["seeds"].items() if ablation in k}
            if not mine:
                continue
            sizes = sizes or list(mine)
            rows.append([name, ablation, *(_f(mine.get(s, np.nan), 2) for s in sizes)])
    return _lines(["network / data", "closed", *(f"{float(s):.0%}" for s in sizes)], rows, 2)


def convergence(found: Mapping[str, dict[str, Any]]) -> str:
    """Kappa between seeds with several recipes, and what these keep of the output."""
    rows = [
        [
            name,
            ", ".join(f"{field}={value:g}" for field, value in row["recipe"].items()),
            _f(row["kappa"], 2),
            _f(row["own_auc"], 2),
            _f(row["fidelity"], 2),
        ]
        for name, parts in found.items()
        for row in parts.get("convergence", {}).get("rows", [])
    ]
    return _lines(["network / data", "recipe", "kappa", "own AUC", "fidelity"], rows, 2)


def sanity(found: Mapping[str, dict[str, Any]]) -> str:
    """Own AUC beyond random channels where there is something to be found, and where not."""
    rows = []
    for name, parts in found.items():
        for control in parts.get("sanity", {}).get("controls", []):
            means, (low, high) = control["means"], control["gain_interval_95"]
            rows.append(
                [
                    name,
                    control["name"],
                    *(_f(means[m], 2) for m in ("whole_auc", "own_auc", "random_auc")),
                    f"{means['gain']:+.2f} [{low:+.2f}, {high:+.2f}]",
                    _f(means["fidelity"], 2),
                ]
            )
    head = ["network / data", "control", "whole", "own AUC", "random", "gain", "fidelity"]
    return _lines(head, rows, 2)


def deltas(found: Mapping[str, dict[str, Any]]) -> str:
    """Area between the keep and the ablate curve of own AUC, for each ablation value."""
    rows = []
    for name, parts in found.items():
        known = parts.get("curves", {})
        for ablation in dict.fromkeys(key.partition("/")[0] for key in known):
            cells = []
            for method in ("nad", "neuron_mct"):
                delta = known[f"{ablation}/{method}"]["delta"]["own_auc"]
                low, high = delta["interval_95"]
                cells.append(f"{delta['mean']:.2f} [{low:.2f}, {high:.2f}]")
            rows.append([name, ablation.replace("_", " "), *cells])
    head = ["network / data", "closed channels are", "NAD, learned at 40 %", "NeuronMCT"]
    return _lines(head, rows, 2)


def tables() -> dict[str, str]:
    """All of them by name."""
    pairs = load()
    found = _questions()
    result = {
        "overview": overview(pairs),
        "wins": wins(pairs),
        "own AUC against the best rival": against_best(pairs, "own_auc"),
        "fidelity against the best rival": against_best(pairs, "fidelity"),
        "disentanglement against the best rival": against_best(pairs, "disentanglement"),
        "methods": methods(pairs),
        "methods by fidelity": methods(pairs, "fidelity"),
        "classifier": classifier(pairs),
    }
    rivals, large = load(RIVALS), load(RIVALS, REAL)
    result["agreement"] = agreement()
    if large:
        result["real networks"] = real(large)
    if rivals:
        result |= {
            "rivals": methods(rivals), "rivals by fidelity": methods(rivals, "fidelity"),
            "rivals wins": wins(rivals),
        }  # fmt: skip
        for name, measure in (("own AUC", "own_auc"), ("fidelity", "fidelity")):
            table = against_best(rivals + large, measure)
            result[f"{name} against the best rival with constants"] = table
    if any("seeds" in parts for parts in found.values()):
        result["seeds"] = stability(found)
    for name, make in (
        ("where", where), ("how", how), ("why", why), ("convergence", convergence),
        ("sanity", sanity), ("curves", deltas),
    ):  # fmt: skip
        if found:
            result[name] = make(found)
    if PLANTED.is_file():
        result["planted"] = planted_table(json.loads(PLANTED.read_text()))
    return result


def where(found: Mapping[str, dict[str, Any]]) -> str:
    """Mosaics: share of the highest positions in the class's quadrant, above a quarter."""
    rows = []
    for name, parts in found.items():
        if "where" in parts:
            sites, excess = parts["where"]["sites"], parts["where"]["excess"]
            at = (0, len(sites) // 2, len(sites) - 1)
            ends = [f"[{excess['low'][i]:+.3f}, {excess['high'][i]:+.3f}]" for i in at]
            cells = [f"{excess['mean'][i]:+.3f} {end}" for i, end in zip(at, ends, strict=True)]
            rows.append([name, str(parts["where"]["n"]), *cells])
    return _lines(["network / data", "mosaics", "first site", "middle site", "last site"], rows)


def how(found: Mapping[str, dict[str, Any]]) -> str:
    """Sizes and overlaps corrected for chance, at the first, middle and last site."""
    rows = []
    for name, parts in found.items():
        for profile in parts.get("how", {}).values():
            n = len(profile["sites"])
            cells = [
                " / ".join(_f(profile[what]["mean"][i], 2) for i in (0, n // 2, n - 1))
                for what in ("size", "jaccard", "kappa")
            ]
            rows.append([name, *cells])
    return _lines(["network / data", "size", "overlap (Jaccard)", "kappa"], rows)


def why(found: Mapping[str, dict[str, Any]]) -> str:
    """Misclassifications: hit@3 and mean reciprocal rank with their permutation p-values."""
    rows = []
    for name, parts in found.items():
        if "why" not in parts:
            continue
        study = parts["why"]["kappa"]
        for similarity, found_here in study["statistics"].items():
            partial = study["partial"].get(similarity, {})
            rows.append(
                [
                    name,
                    similarity,
                    str(found_here["n_errors"]),
                    f"{found_here['hits']['3']:.2f} ({found_here['hit_null']['3']:.2f})",
                    _f(found_here["hit_p"]["3"]),
                    f"{found_here['mrr']:.2f} ({found_here['mrr_null']:.2f})",
                    _f(found_here["mrr_p"]),
                    f"{partial['value']:+.2f}, p {partial['p']:.2f}" if partial else "",
                ]
            )
        voting = study["voting"]
        rows.append(
            [
                name,
                f"voting: accuracy {voting['accuracy']:.2f}, whole network {voting['whole']:.2f}",
                *[""] * 6,
            ]
        )
    head = ["network / data", "similarity", "errors", "hit@3 (null)", "p", "MRR (null)", "p"]
    return _lines([*head, "sub-architectures beyond it"], rows, 2)


def planted_table(result: Mapping[str, Any]) -> str:
    """Recall of the planted channels at the circuits' own size (precision is the same number)."""
    kinds = list(result["settings"]["kinds"])
    found: dict[str, dict[str, list[float]]] = {}
    for row in result["rows"]:
        if row["size_factor"] == 1.0:
            name = row["method"] + ("" if row["ablation"] == "any" else f", {row['ablation']}")
            found.setdefault(name, {}).setdefault(row["kind"], []).append(row["recall"])
    rows = [
        [name, *(_f(float(np.mean(by_kind[k]))) if k in by_kind else "-" for k in kinds)]
        for name, by_kind in found.items()
    ]
    return _lines(["method", *kinds], rows)


def figure(pairs: list[Pair]) -> None:
    """Own AUC against size: NAD, the best rivals and random channels, one panel for each pair."""
    from nad_attr.plots.style import legend, line, line_styles, new_figure, size_axis, style

    names = ["nad", "centred_effect", "neuron_mct", "taylor", "nad_paper", "other_task", "random"]
    looks = line_styles(names, references=("random",))
    columns = 4
    rows = -(-len(pairs) // columns)
    for measure in ("own_auc", "fidelity"):
        drawing, axes = new_figure(rows, columns)
        for i, axis in enumerate(np.ravel(axes)):
            if i >= len(pairs):
                axis.set_visible(False)
                continue
            pair = pairs[i]
            table = pair.table("mean", measure)
            sizes = [float(s) for s in table["nad"]]
            for name in names:
                if name in table:
                    values = [table[name][s] for s in table["nad"]]
                    ends = [bootstrap_interval(v) for v in values]
                    line(
                        axis, sizes, [float(np.nanmean(v)) for v in values],
                        label=name.replace("_", " "), low=[e[0] for e in ends],
                        high=[e[1] for e in ends], **looks[name],
                    )  # fmt: skip
            style(axis, title=pair.name, y=measure.replace("_", " ") if i % columns == 0 else None)
            size_axis(axis, sizes, log=True)
            if measure == "fidelity":
                axis.set_ylim(-1.0, 1.05)
        legend(drawing, list(np.ravel(axes))[: len(pairs)])
        IMAGES.mkdir(exist_ok=True)
        drawing.savefig(IMAGES / f"findings_{measure}.png", dpi=110)


def fill(page: str, known: Mapping[str, str]) -> str:
    """The page with every table replaced.

    Raises:
        SystemExit: If the page asks for a table that there is not.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in known:
            raise SystemExit(f"a page asks for the table {name!r}; there are {list(known)}")
        return f"<!-- {name} -->\n\n{known[name]}\n\n<!-- end -->"

    return re.sub(r"<!-- (?!end)([^>]+?) -->.*?<!-- end -->", replace, page, flags=re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    """Writes tables and figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--print", action="store_true", help="print, write nothing")
    args = parser.parse_args(argv)
    known = tables()
    if args.print:
        print("\n\n".join(f"## {name}\n{text}" for name, text in known.items()))
        return
    for page in PAGES:
        page.write_text(fill(page.read_text(), known))
    figure(load())


if __name__ == "__main__":
    main()
