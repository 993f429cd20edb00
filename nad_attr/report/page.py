"""Write the page: one file that needs no Internet."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Sequence
from functools import cache, partial
from html import escape as escaped_html
from importlib.resources import files
from pathlib import Path
from typing import Any

from nad_attr.certainty.verdict_result import QUESTIONS
from nad_attr.report.contents import BROKEN, Contents
from nad_attr.report.packing import script_json
from nad_attr.report.parts import SHOWN
from nad_attr.system.safe_text import shown

__all__ = ["page"]

#: The page's program, in the order in which it runs.
SCRIPTS = ("base", "architecture", "tasks", "charts", "sections", "flow", "start")

#: (measure, heading) of the table of means.
_COLUMNS = tuple(
    (name, SHOWN[name])
    for name in ("own_auc", "other_auc", "fidelity", "target_r2", "recall", "fpr", "ba")
)


@cache
def _asset(name: str) -> str:
    return files("nad_attr.report").joinpath("static", name).read_text(encoding="utf-8")


@cache
def _program() -> str:
    parts = "\n".join(_asset(f"{name}.js") for name in SCRIPTS)
    return f'(() => {{\n"use strict";\n{parts}\n}})();\n'


@cache
def _plotly() -> str:
    try:
        import plotly
    except ImportError as error:
        raise ImportError("the report needs plotly: pip install 'nad-attr[report]'") from error
    path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    # No text of the library may end its element.
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"


def escape(text: str) -> str:
    """A text of a file as HTML that shows it."""
    return escaped_html(shown(text))


def page(found: Contents) -> str:
    """The whole page.

    Scripts run only if their hash is in the page's content security policy, and no address can be
    asked for anything, so that no name in a file of gates can do harm.

    Raises:
        ImportError: If plotly is missing.
    """
    program, plotly = _program(), _plotly()
    pictures, body, data = _sections(found)
    tiles = _tiles(data["evaluation"])
    mosaics = data["mosaics"]  # their pictures are in the page itself
    mosaics = mosaics and {key: value for key, value in mosaics.items() if key != "examples"}
    policy = (
        f"default-src 'none'; script-src {_hash(program)} {_hash(plotly)}; "
        "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
    )
    parts = {
        "POLICY": escape(policy),
        "TITLE": escape(found.title),
        "STYLE": _asset("report.css"),
        "FIRST": "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(_sentence(text))}</dd></div>"
            for name, text in found.first.items()
        ),
        "QUESTIONS": _questions(found),
        "PICTURES": pictures,
        "TILES": tiles,
        "BODY": body,
        "DATA": script_json({**data, "mosaics": mosaics}),
        "GATES": "\n".join(found.gates),
        "PROGRAM": program,
        "PLOTLY": plotly,
    }
    # One pass: inserted text is not searched.
    pieces = _asset("page.html").split("@@")
    return "".join(parts[piece] if i % 2 else piece for i, piece in enumerate(pieces))


def _sentence(text: str) -> str:
    """With a capital, and no line that begins with a percent sign."""
    return (text[:1].upper() + text[1:]).replace(" %", "\u00a0%")


def _shown(value: Any) -> str:
    return "–" if value is None else f"{value:.2f}"


def _tiles(part: dict[str, Any] | None) -> str:
    """The most important numbers, each beside its baseline."""
    if part is None:
        return ""
    rows = {kind: [r for r in part["rows"] if r["kind"] == kind] for kind in _KINDS}

    def beside(measure: str) -> str:
        said = [
            f"{word}\u00a0{_shown(row['mean'].get(measure))}"  # a number stays with its word
            for word, of in (("random", rows["random"]), ("whole", rows["whole"]))
            for row in of[:1]
        ]
        rivals = [r for r in rows["rival"] if r["mean"].get(measure) is not None]
        if rivals and measure not in ("recall", "fpr"):
            best = max(rivals, key=lambda r: r["mean"][measure])
            said.insert(0, f"{best['name']} {_shown(best['mean'][measure])}")
        return " · ".join(said)

    own = rows["own"][0]
    size = own["mean"].get("size")
    tiles = [("size", "–" if size is None else f"{100 * size:.3g} %", "of the channels are kept")]
    for measure, heading in _COLUMNS:
        if measure in own["mean"] and measure != "other_auc":
            tiles.append((heading, _shown(own["mean"][measure]), beside(measure)))
    return "".join(
        f'<div class="tile"><dt>{escape(name)}</dt><dd><b>{escape(value)}</b>'
        f"<small>{escape(note)}</small></dd></div>"
        for name, value, note in tiles
    )


_KINDS = ("own", "rival", "random", "whole")


def _table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, label: str, left: Sequence[int] = (0,)
) -> str:
    """A table that scrolls if it is wide; columns that are not ``left`` hold numbers."""
    head = "".join(
        f'<th scope="col"{"" if i in left else " class=n"}>{escape(name)}</th>'
        for i, name in enumerate(header)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<th scope="row">{escape(cell)}</th>'
            if i == 0
            else f"<td{'' if i in left else ' class=n'}>{escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


#: Sentences of statistics that are shown at once.
_SENTENCES = 4
#: Names of sections in the row of links.
_SHORT = {
    "numbers": "Answers",
    "where": "Where",
    "measured": "Measures",
    "depth": "Depth",
    "overlap": "Overlap",
    "curves": "Curves",
    "flow": "Flow",
    "errors": "Errors",
    "channels": "Channels",
    "export": "Cost",
    "learning": "Learning",
    "provenance": "Source",
}


def _section(name: str, title: str, body: str, note: str = "") -> str:
    """A section; ``note`` and ``body`` are HTML."""
    said = f'<p class="note">{note}</p>' if note else ""
    return (
        f'<section id="{name}" data-short="{escape(_SHORT.get(name, title))}" '
        f'aria-labelledby="{name}-title"><h2 id="{name}-title">'
        f"{escape(title)}</h2>{said}{body}</section>"
    )


def _chart(name: str, label: str) -> str:
    about = f'role="group" aria-label="{escape(label)}"'
    return f'<figure class="chart" id="chart-{name}" {about}></figure>'


def _questions(found: Contents) -> str:
    """What a newcomer asks; a click opens the answer, which links to where it is shown."""
    items = []
    for name, question, answer, section in found.questions:
        link = f' <a href="#{section}">Show it</a>' if section else ""
        items.append(
            f'<details id="question-{name}"><summary>{escape(question)}</summary>'
            f"<p>{escape(answer)}{link}</p></details>"
        )
    return "".join(items)


def _numbers_section(found: Contents) -> str:
    """The verdict's answers as a table, and all numbers in sentences."""
    header = ["class", "kept channels", *(f"{question}?" for question in QUESTIONS)]
    table = _table(
        header, found.verdict, label="The verdict on each class", left=(0, 2, 3, 4, 5, 6)
    )
    said = "".join(f"<p>{escape(text)}</p>" for text in found.sentences)
    return _section(
        "numbers",
        "The answers in numbers",
        (table if found.verdict else "") + f'<div class="summary">{said}</div>',
        "Each answer is a test beside random choices of as many channels. Sufficient: with all "
        "else closed the output stays. Necessary: without them it breaks. Specific: other classes "
        "are spared. Minimal: hardly any is superfluous. Stable: other runs find them again."
        if found.verdict
        else "",
    )


def _where(part: Sequence[dict[str, Any]]) -> str:
    figures = []
    for row in part:
        name = escape(row["task"])
        images = "".join(
            f'<img src="{plain}" alt="An image of {name}">'
            f'<img src="{coloured}" alt="The same, coloured">'
            for plain, coloured in row["images"]
        )
        figures.append(
            f'<figure class="where"><figcaption>{name}</figcaption><div>{images}</div></figure>'
        )
    return _section(
        "where",
        "Where in the image",
        f'<div class="wheres">{"".join(figures)}</div>',
        "Images that the gates were not learned from, and the same with the places coloured where "
        "the kept channels speak for the class, to first order, at the last layer that has places "
        f"({escape(str(part[0]['site']))}).",
    )


def _sections(found: Contents) -> tuple[str, str, dict[str, Any]]:
    """Sections of pictures, all others, and the page's data without what could not be shown.

    A malformed result from a file is left out, with a note.
    """
    data, notes = dict(found.data), list(found.notes)
    parts: list[str] = []
    first: list[str] = []

    def add(what: str, build: Callable[[], str], *keys: str) -> None:
        try:
            parts.append(build())
        except BROKEN as error:
            notes.append(f"No {what}: it cannot be shown ({error!r:.200}).")
            data.update(dict.fromkeys(keys))

    if data["pictures"] is not None or data["units"] is not None:
        first.append(
            _section(
                "channels",
                "Kept channels",
                '<div id="channel-cards"></div>',
                "The channels that the class keeps, highest gates first, with the images that "
                "they respond to most and their best concept, as far as these are known.",
            )
        )
    if found.where:
        first.append(_where(found.where))
    if data["flow"] is not None:
        first.append(_flow(data["flow"]))
    parts.append(_numbers_section(found))
    if data["evaluation"] is not None:
        add("evaluation", lambda: _measured(data["evaluation"]), "evaluation")
    parts.append(
        _section(
            "depth",
            "Sizes along depth",
            _chart("depth", "Share of the channels that is kept, site by site"),
            "The share of its channels that each site keeps: the mean over all classes, the middle "
            "80 % of them, and the classes chosen above.",
        )
    )
    if data["overlaps"] is not None:
        parts.append(_overlaps(data["overlaps"]))
    if data["curves"]:
        add("curves", lambda: _curves(data["curves"]), "curves")
    if data["mosaics"]:
        add("mosaics", lambda: _mosaic_part(data["mosaics"]), "mosaics")
    if data["errors"]:
        add("errors", lambda: _errors(data["errors"]), "errors")
    if data["export"]:
        parts.append(_export(data["export"]))
    for number, (name, table) in enumerate(found.statistics.items()):
        add(f"statistics {name!r}", partial(_statistics, number, name, table))
    if data["history"]:
        parts.append(
            _section(
                "learning",
                "How learning went",
                '<div class="pair" id="learning-charts"></div>',
                "Mean over classes and the middle 80 % of them; the chosen classes by themselves.",
            )
        )
    parts.append(_provenance(found, notes))
    return "".join(first), "".join(parts), data


def _curves(curves: Sequence[dict[str, Any]]) -> str:
    """The section of the charts, if each curve is one."""
    for curve in curves:
        n = len(curve["sizes"])
        for key in ("keep", "ablate", "keep_low", "keep_high", "ablate_low", "ablate_high"):
            _numbers(curve[key], n)
        _numbers(curve["sizes"], n)
        for key in ("full", "empty"):
            _numbers([curve[key]], 1)
        if not isinstance(curve["name"], str) or not isinstance(curve["measure"], str):
            raise ValueError("a curve's name is not a text")
    return _section(
        "curves",
        "Keep and ablate curves",
        f'<div class="pair">{_chart("keep", "Top channels kept")}'
        f"{_chart('ablate', 'Top channels removed')}</div>",
        "The channels that a ranking puts first, kept alone (left) and removed (right). "
        "A good ranking is high on the left and low on the right, from small sizes on.",
    )


def _numbers(values: Any, n: int) -> None:
    """Refuse anything but n numbers, with None for unknown ones: a chart cannot draw it."""
    good = isinstance(values, list) and len(values) == n
    if not good or not all(v is None or type(v) in (int, float) for v in values):
        raise ValueError(f"{str(values)[:40]} in place of {n} numbers")


def _mosaic_part(part: dict[str, Any]) -> str:
    """The section of the chart, if it can be drawn, and the pictures."""
    share = f"{100 * float(part['top']):.3g} %"
    for values in (part["excess"], part["low"], part["high"], *part["tasks"]):
        _numbers(values, len(part["sites"]))
    if part["tasks"] and len(part["task_names"]) != len(part["tasks"]):
        raise ValueError(f"{len(part['task_names'])} names of {len(part['tasks'])} tasks")
    return _section(
        "mosaics",
        "Mosaics",
        _chart("mosaics", "Hits beyond chance, site by site")
        + _mosaics(part.get("examples") or []),
        "Four images of four classes in one: does a class's sub-architecture look at its "
        f"own? Shown is the share of the highest {escape(share)} of positions in the own "
        "quadrant, minus chance (a quarter).",
    )


def _flow(part: dict[str, Any]) -> str:
    share = [f"{100 * value:.0f}" for value in (min(part["drawn"]), max(part["drawn"]))]
    between = share[0] if share[0] == share[1] else f"{share[0]} to {share[1]}"
    images = max(part["n_images"])
    note = (
        "What each channel gives to the channels of the next site: its first-order effect on the "
        "class's output, as far as it passes them. All that leaves a channel adds up to its "
        "effect. "
        f"The links drawn carry {between} % of the flow between sites, of {images} image"
        f"{'s' * (images != 1)} of each class at most. Choose a channel to trace what feeds it."
    )
    body = (
        '<div class="between"><div class="row" id="flow-tasks"></div>'
        '<div class="legend" id="flow-legend"></div></div>'
        '<div class="flow-scroll" id="flow-scroll"></div>'
        '<p class="quiet" id="flow-more" hidden></p>'
        '<p class="quiet keys">In the picture: <kbd>↑</kbd> <kbd>↓</kbd> from channel to channel, '
        "<kbd>←</kbd> <kbd>→</kbd> from site to site, <kbd>Enter</kbd> traces, <kbd>Esc</kbd> "
        'shows everything</p><div id="flow-said" role="status" aria-live="polite"></div>'
    )
    return _section("flow", "Information flow", body, escape(note))


def _mosaics(examples: Sequence[dict[str, Any]]) -> str:
    """Mosaics plain and coloured by class, with each class's share in its quadrant."""
    if not examples:
        return ""
    figures = []
    for found in examples:
        names = "".join(
            f'<li><i class="q{q}"></i>{escape(name)} '
            f"<small>{'silent' if share is None else f'{share:.2f}'}</small></li>"
            for q, (name, share) in enumerate(zip(found["tasks"], found["shares"], strict=True))
        )
        said = "; ".join(found["tasks"])
        figures.append(
            f'<figure class="mosaic"><img src="{found["mosaic"]}" '
            f'alt="{escape(f"Mosaic of {said}")}"><img src="{found["coloured"]}" '
            f'alt="{escape("The same, coloured by class")}"><figcaption><ol>{names}</ol>'
            "</figcaption></figure>"
        )
    return (
        '<p class="note">Some of them, and the same coloured by the class whose kept channels have '
        "the most evidence at each place, mean over sites. Beside each class is the share of it "
        "that lies in its own quadrant; chance is 0.25.</p>"
        f'<div class="mosaics">{"".join(figures)}</div>'
    )


def _measured(part: dict[str, Any]) -> str:
    columns = [(m, h) for m, h in _COLUMNS if m in part["rows"][0]["mean"]]
    rows = []
    for row in part["rows"]:
        cells = []
        for measure, _ in columns:
            text = _shown(row["mean"].get(measure))
            ends = row["interval"].get(measure)
            if ends and None not in ends and row["kind"] == "own":
                text += f" ({ends[0]:.2f} to {ends[1]:.2f})"
            cells.append(text)
        rows.append([row["name"], *cells])
    note = (
        f"On {part['n_images']:,} images the gates have not seen; means over {part['n_tasks']:,} "
        "classes, with the 95 % interval over classes. Own AUC: does the class's output tell its "
        "images from others (0.5 is chance)? Fidelity: is it still the same number (R²)? Recall "
        "alone is easy to have: a network that always answers the class has recall 1, so read it "
        "with the false-positive rate (FPR) and balanced accuracy (BA)."
    )
    p = part["p"].get("own_auc")
    if p is not None:
        note += (
            f" Against random channels (draws: {part['n_random']}): own AUC p = {p:.3g}"
            f" (the least possible is {1 / (part['n_random'] + 1):.3g})."
        )
    header = ["mean over classes", *(heading for _, heading in columns)]
    charts = (
        f'<div class="pair">{_chart("auc", "Own AUC of each class")}'
        f"{_chart('fpr', 'Recall and false-positive rate of each class')}</div>"
    )
    table = _table(header, rows, label="Measures, beside random channels and rivals")
    return _section("measured", "Do they do the class's work?", table + charts, escape(note))


def _overlaps(part: dict[str, Any]) -> str:
    note = (
        "Kappa: what two classes' channels share beyond chance; 0 is what random channels of "
        "these sizes share, 1 is the same channels. Classes are ordered so that similar ones "
        f"stand together. Mean {part['mean']:.2f}, from {part['low']:.2f} to {part['high']:.2f}."
    )
    if part["step"] > 1:
        note += (
            f" Each cell is the mean over {part['step']} by {part['step']} neighbouring classes."
        )
    else:
        note += " A click compares the two in the architecture view."
    return _section(
        "overlap",
        "Which classes share channels",
        _chart("overlap", "Overlap of all pairs of classes") + '<div id="nearest"></div>',
        escape(note),
    )


def _errors(part: dict[str, Any]) -> str:
    hits = [k for k in part["rows"][0]["hits"]] if part["rows"] else []
    rows = []
    for row in part["rows"]:
        cells = []
        for k in hits:
            value, null = row["hits"].get(k), (row.get("null") or {}).get(k)
            p = (row.get("p") or {}).get(k)
            cells += [f"{_shown(value)} ({_shown(null)})", "–" if p is None else f"{p:.2g}"]
        rows.append([row["name"], *cells, _shown(row.get("mrr"))])
    header = ["ranked by"]
    for k in hits:
        header += [f"among the first {k} (chance)", "p"]
    header.append("mean reciprocal rank")
    note = (
        f"{part['n_errors']:,} of {part['n_images']:,} images are misclassified. Is the class that "
        "they are called among those whose sub-architectures are most similar to the right one's? "
        "The other rows rank the classes by something else, as controls."
    )
    return _section(
        "errors",
        "Errors, and why they were made",
        _table(header, rows, label="Where errors stand by similarity")
        + '<div id="examples" class="examples"></div>',
        escape(note),
    )


def _export(part: dict[str, Any]) -> str:
    whole = part["rows"][0]
    rows = [
        [
            str(row["name"]),
            f"{row['parameters']:,}",
            f"{100 * row['parameters'] / max(1, whole['parameters']):.1f} %",
            f"{row['multiply_adds']:,}",
            f"{100 * row['multiply_adds'] / max(1, whole['multiply_adds']):.1f} %",
            f"{1e3 * row['seconds']:.2f}",
            f"{whole['seconds'] / row['seconds']:.2f}",
        ]
        for row in part["rows"]
    ]
    header = ["network", "parameters", "", "multiply-adds", "", "ms for one image", "times as fast"]
    note = (
        "A class's sub-architecture as a network of its own, with the same outputs "
        "(SubArchitecture.export), its head cut to the class. Times were measured in turns, on the "
        "machine that the page was measured on."
    )
    if part["stays_whole"]:
        note += f" Not smaller, because no rule says how: {', '.join(part['stays_whole'][:5])}."
    table = _table(header, rows, label="Cost of classes' networks beside the whole one")
    return _section("export", "What a class's network alone costs", table, escape(note))


def _statistics(number: int, name: str, table: dict[str, Any]) -> str:
    columns, found = table["columns"], table["rows"]
    rows = [
        [
            "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
            for value in row
        ]
        for row in found
    ]
    texts = [all(isinstance(row[i], str) for row in found) for i in range(len(columns))]
    body = _table(columns, rows, label=name, left=[i for i, text in enumerate(texts) if text])
    said = [f"<li>{escape(text)}</li>" for text in table["sentences"]]
    more = ""
    if len(said) > _SENTENCES:
        more = (
            f"<details><summary>{len(said) - _SENTENCES} more sentences</summary>"
            f"<ul>{''.join(said[_SENTENCES:])}</ul></details>"
        )
    if said:
        body = f"<ul>{''.join(said[:_SENTENCES])}</ul>{more}{body}"
    note = ""
    if "q" in columns:
        note = "q: the p-value corrected for the number of tests (false discovery rate)."
    if table["n"] > len(rows):
        note += f" The {len(rows)} rows of {table['n']:,} with the smallest q; all are in frame()."
    return _section(f"statistics-{number}", name, body, escape(note))


def _provenance(found: Contents, notes: Sequence[str]) -> str:
    facts = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in found.facts
    )
    body = f'<dl class="facts">{facts}</dl>'
    if found.missing:
        items = "".join(
            f"<li>{escape(what)}: <code>{escape(how)}</code></li>" for what, how in found.missing
        )
        body += f'<h3 id="missing">Not in this report, and how to add it</h3><ul>{items}</ul>'
    if notes:
        items = "".join(f"<li>{escape(note)}</li>" for note in notes)
        body += f"<h3>What did not work</h3><ul>{items}</ul>"
    return _section("provenance", "Where this comes from", body)
