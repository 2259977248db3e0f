"""The preview as one HTML page that needs nothing else. Every text of the data is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from surefoot.data.audit import Audit
from surefoot.data.preview import Piece, Shown
from surefoot.data.report import DataReport, percent

STYLE = """\
:root { color-scheme: light dark; --ground: #fff; --ink: #1a1a1a; --quiet: #6a6a6a; --line: #d8d8d8; --trained: #c9efd0; --bad: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #17181a; --ink: #e8e8e8; --quiet: #9a9a9a; --line: #3a3c40; --trained: #1f5130; --bad: #ff8a80; }
}
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 1rem .25rem 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.over td { color: var(--bad); font-weight: 600; }
h3 { font-size: .9rem; margin: 2rem 0 .3rem; overflow-wrap: anywhere; }
pre { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
div.row, pre.report { border: 1px solid var(--line); border-radius: 4px; padding: .6rem .8rem; }
.trained { background: var(--trained); border-radius: 2px; }
.special { font-weight: 700; }
.padding, .source { color: var(--quiet); font-style: italic; }
"""
LEGEND = (
    '<p><span class="trained">trained</span>, read only, <span class="special">&lt;special token&gt;</span>, '
    '<span class="padding">padding</span>; a dot is a space at the end of a line, \u21b5 a line break, \u2192 a tab.</p>'
)


def page(report: DataReport, audit: Audit, rows: Sequence[Shown]) -> str:
    """The audit's totals, the report, and the rows."""
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>Training rows</title>\n<style>\n{STYLE}</style></head>\n<body>\n<h1>Training rows</h1>",
        _table(audit),
        f'<h2>Report</h2>\n<pre class="report">{escape(chr(10).join(report.lines()))}</pre>',
        f"<h2>Rows</h2>\n{LEGEND}",
        *(f'<h3>{escape(row.title)}</h3>\n<div class="row"><pre>{"".join(map(_span, row.pieces))}</pre></div>' for row in rows),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts)


def _table(audit: Audit) -> str:
    lines = ["<table>\n<tr><th>reason</th><th>rows</th><th>of</th><th>share</th><th>at most</th><th>first</th></tr>"]
    for finding in audit.findings:
        numbers = (f"{finding.rows:,}", f"{finding.of:,}", percent(finding.rows, finding.of), f"{100 * finding.limit:g} %")
        cells = "".join(f'<td class="number">{number}</td>' for number in numbers)
        over = ' class="over"' if finding.exceeds else ""
        lines.append(f"<tr{over}><td>{finding.reason}</td>{cells}<td>{escape(finding.first)}</td></tr>")
    return "\n".join([*lines, "</table>"])


def _span(piece: Piece) -> str:
    special = " special" if piece.is_special else ""
    return f'<span class="{piece.kind}{special}">{escape(piece.text)}</span>'
