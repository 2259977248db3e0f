"""The pieces that both pages are made of. Every text of a run is escaped."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from html import escape
from typing import Any

from surefoot.report.charts import Curve, chart
from surefoot.report.records import Run

STYLE = """\
:root { color-scheme: light dark;
  --ground: #fff; --ink: #1a1a1a; --quiet: #666; --line: #ddd; --bad: #b3261e; --good: #1b6e3c;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b5468f; --c4: #a87900; --c5: #3a8fc4; --c6: #7a5cc0; --c7: #707070; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #17181a; --ink: #e8e8e8; --quiet: #9a9a9a; --line: #3a3c40; --bad: #ff8a80; --good: #7fd6a2;
  --c0: #56b4e9; --c1: #ff8f4d; --c2: #2fc79b; --c3: #e393c6; --c4: #e6b422; --c5: #8fd0f5; --c6: #b09cf0; --c7: #a0a0a0; } }
* { box-sizing: border-box; }
body { background: var(--ground); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
body { max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.2rem 0 .5rem; font-size: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem 1rem .25rem 0; }
th, td { text-align: left; vertical-align: top; overflow-wrap: anywhere; }
th, td.plain, td.number { overflow-wrap: normal; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.text { white-space: pre-wrap; min-width: 9rem; }
.bad { color: var(--bad); fill: var(--bad); font-weight: 600; }
.good { color: var(--good); }
.quiet, small { color: var(--quiet); }
.charts { display: grid; gap: 1rem 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); }
figure { margin: 0; }
figcaption { font-weight: 600; }
figcaption small { font-weight: 400; margin-left: .6rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--quiet); }
svg .grid { stroke: var(--line); }
polyline { fill: none; stroke-width: 1.6; }
figcaption span::before { content: "\\25AC "; }
"""
STYLE += "\n".join(
    f"polyline.c{n} {{ stroke: var(--c{n}); }} circle.c{n} {{ fill: var(--c{n}); }} figcaption .c{n} {{ color: var(--c{n}); }}"
    for n in range(8)
)
HEAD = """\
<!DOCTYPE html>
<html lang="en">
<head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">"""


def page(title: str, *sections: str) -> str:
    """A whole page that needs nothing else."""
    body = "\n".join(part for part in sections if part)
    name = escape(title)
    return f"{HEAD}\n<title>{name}</title>\n<style>\n{STYLE}\n</style></head>\n<body>\n<h1>{name}</h1>\n{body}\n</body>\n</html>\n"


def section(title: str, *parts: str) -> str:
    """A heading over the parts, empty where all of them are."""
    inside = "\n".join(part for part in parts if part)
    return f"<h2>{escape(title)}</h2>\n{inside}" if inside else ""


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]], *, texts: bool = False) -> str:
    """Cells of text (or html(...)); columns of numbers alone are set to the right. Empty where there are no rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    of_numbers = [all(_is_number(cell) for cell in column) for column in zip(*rows, strict=True)]
    body = "\n".join(
        "<tr>" + "".join(_cell(cell, texts, right) for cell, right in zip(row, of_numbers, strict=True)) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'


def facts(rows: Sequence[tuple[str, Any]]) -> str:
    """What is told, and what it is; empty where there are no rows."""
    lines = [
        f'<tr><td class="plain">{escape(name)}</td><td>{value if isinstance(value, Html) else escape(plain(value))}</td></tr>'
        for name, value in rows
    ]
    return f'<div class="wide"><table>\n{chr(10).join(lines)}\n</table></div>' if rows else ""


def _is_number(cell: Any) -> bool:
    return cell is None or (isinstance(cell, (int, float)) and not isinstance(cell, bool))


def _cell(cell: Any, texts: bool, right: bool) -> str:
    if isinstance(cell, Html):
        return f"<td>{cell}</td>"
    if right:
        return f'<td class="number">{plain(cell)}</td>'
    return f'<td class="{"text" if texts else "plain"}">{escape(plain(cell))}</td>'


class Html(str):
    """Text that is markup already."""


def plain(value: Any) -> str:
    """A plan's or summary's value as a person writes it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, dict):
        return " ".join(f"{key}={plain(item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return " ".join(map(plain, value)) or "none"
    return str(value)


def verdict(text: str, *, is_good: bool) -> Html:
    return Html(f'<span class="{"good" if is_good else "bad"}">{escape(text)}</span>')


def status(run: Run) -> Html:
    """done, or what else became of the run and why."""
    state, reason = str(run.record.get("status", "unknown")), run.record.get("reason")
    return verdict(f"{state}: {reason}" if reason else state, is_good=state == "done")


def minutes(run: Run) -> str:
    """From started to ended, empty where it did not end."""
    times = [run.record.get(name) for name in ("started", "ended")]
    if not all(isinstance(time, str) for time in times):
        return ""
    began, ended = (datetime.datetime.fromisoformat(str(time)) for time in times)
    return f"{(ended - began).total_seconds() / 60:.1f} min"


def curves(runs: Sequence[Run]) -> str:
    """The charts of one run, or of several laid over each other."""

    def of(key: str) -> list[Curve]:
        return [Curve(run.name, run.curve(key)) for run in runs]

    loss = [Curve("training", runs[0].curve("loss")), Curve("evaluation", runs[0].curve("eval_loss"))] if len(runs) == 1 else of("loss")
    drawn = [
        chart("loss", loss, lambda y: f"{y:.4g}"),
        chart("evaluation loss", of("eval_loss"), lambda y: f"{y:.4g}") if len(runs) > 1 else "",
        chart("gradient norm", of("grad_norm"), lambda y: f"{y:.3g}"),
        chart("learning rate", of("learning_rate"), lambda y: f"{y:.2g}"),
        chart("tokens/s, padding left out", of("tokens_per_s"), lambda y: f"{y:,.0f}"),
        chart("peak memory, GiB", of("peak_memory_gib"), lambda y: f"{y:.3g}"),
    ]
    inside = "\n".join(one for one in drawn if one)
    return f'<div class="charts">\n{inside}\n</div>' if inside else ""
