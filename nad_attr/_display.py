"""How results show themselves in notebooks: small tables, escaped, in the notebook's colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape as escaped_html

from nad_attr.system.safe_text import shown

__all__ = ["MOST_ROWS", "bar", "html_table", "html_text"]

#: Rows of a table, at most.
MOST_ROWS = 24

#: Nothing is coloured but by the text's own colour, so that dark notebooks stay dark.
_LINE = "1px solid color-mix(in srgb, currentColor 25%, transparent)"
_TABLE = "border-collapse:collapse;margin:.3em 0;color:inherit;background:transparent"
_CELL = "padding:.15em .7em;text-align:{side};color:inherit;background:transparent"


def escape(text: str) -> str:
    """Escape a text from a file for HTML."""
    return escaped_html(shown(text, lines=True))


def bar(share: float) -> str:
    """A bar for a share in [0, 1], in a colour that shows on white and on black.

    Example:
        >>> bar(0.5).count("50.0%")
        1
    """
    width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
    return (
        '<span style="display:inline-block;width:7em;height:.65em;border-radius:2px;'
        'background:color-mix(in srgb, currentColor 14%, transparent)">'
        f'<span style="display:block;width:{width:.1f}%;height:100%;border-radius:2px;'
        'background:#0072B2"></span></span>'
    )


def html_table(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    bars: Sequence[float] | None = None,
    rule_before: int | None = None,
    note: str = "",
) -> str:
    """A table; all texts are escaped.

    Args:
        title: Above the table.
        header: Names of the columns.
        rows: Texts; the first column stands to the left, others to the right.
        bars: A share for each row, drawn in a column of its own.
        rule_before: Draw a line before this row.
        note: Below the table.

    Example:
        >>> text = html_table("sizes", ["site", "kept"], [["<conv>", "3"]], bars=[0.5])
        >>> "&lt;conv&gt;" in text, "<conv>" in text
        (True, False)
    """
    left, right = _CELL.format(side="left"), _CELL.format(side="right")
    head = "".join(
        f'<th scope="col" style="{right if i else left};border-bottom:{_LINE}">{escape(name)}</th>'
        for i, name in enumerate(header)
    )
    if bars is not None:
        head += f'<th style="{left};border-bottom:{_LINE}"></th>'
    body = []
    for n, row in enumerate(rows):
        top = f";border-top:{_LINE}" if n == rule_before else ""
        cells = "".join(
            f'<td style="{right if i else left}{top}">{escape(cell)}</td>'
            for i, cell in enumerate(row)
        )
        if bars is not None:
            drawn = bar(bars[n]) if n < len(bars) else ""
            cells += f'<td style="{left}{top}">{drawn}</td>'
        body.append(f'<tr style="background:transparent">{cells}</tr>')
    below = f'<div style="opacity:.75">{escape(note)}</div>' if note else ""
    return (
        f'<div class="nad-attr"><div><b>{escape(title)}</b></div>'
        f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table>{below}</div>"
    )


def html_text(text: str) -> str:
    """Plain text as it is, escaped.

    Example:
        >>> html_text("a < b")[-14:]
        'a &lt; b</pre>'
    """
    return (
        '<pre class="nad-attr" style="color:inherit;background:transparent;line-height:1.35">'
        f"{escape(text)}</pre>"
    )
