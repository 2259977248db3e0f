"""speed_table.py: speed.py's numbers as README's tables and as a plot.

python benchmarks/speed_table.py             # README.md between the two comments, and benchmarks/results/speed_h200.svg
python benchmarks/speed_table.py --results=FILE.json --show     # prints the tables only
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

from speed_works import SEED_ROWS, SYSTEMS, Work

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/results/speed_h200.json"
BEGIN, END = "<!-- speed table: python benchmarks/speed_table.py -->", "<!-- end -->"
PACKAGES = ("torch", "transformers", "peft", "liger-kernel", "unsloth", "trl", "bitsandbytes")
COLOURS = {
    "ours3": "#0b6e4f", "ours2": "#3a9d7c", "ours1": "#8cc7b0", "peft": "#8a8fa3", "liger": "#c08a2e", "unsloth": "#b5493f",
    "unsloth_sft": "#7d5ba6", "seed": "#5b6470",
}  # fmt: skip
CONDITIONS = (
    "Adapters r=32 on all seven projections, dropout 0, random weights, steady state; padding is not counted. Stages are `finetune.py` "
    "with its Trainer and a log line every four steps; peers but SFTTrainer are bare loops, which take "
    f"{SEED_ROWS} commonsense rows a pass, padded, as the older recipes do. What is empty was not run."
)
STYLE = (
    "text{font:12px system-ui,DejaVu Sans,sans-serif;fill:#1f2328}.case{font-weight:600}.unit{fill:#59636e}line{stroke:#1f2328}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.unit{fill:#9198a1}line{stroke:#e6edf3}}"
)


def write(results: str = str(RESULTS), readme: str = str(ROOT / "README.md"), plot: str = "", show: bool = False) -> None:
    """Puts the tables between README's two comments and draws the plot, beside the results unless `plot` names a file."""
    if not Path(results).is_file():
        raise SystemExit(f"--results={results} does not exist. benchmarks/speed.py makes it")
    result = json.loads(Path(results).read_text())
    if show:
        print(markdown(result))
        return
    before, begin, rest = Path(readme).read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"--readme={Path(readme).name} lacks the lines {BEGIN} and {END}. Put both where the tables belong")
    Path(readme).write_text(f"{before}{BEGIN}\n{markdown(result)}\n{END}{after}")
    Path(plot or Path(results).with_suffix(".svg")).write_text(svg(result))


def markdown(result: dict[str, Any]) -> str:
    """A table of the works with rows of fixed length, one of those with rows as they come, what was measured, and every failure."""
    kinds = [[case for case, work in result["works"].items() if bool(work["length"]) == fixed] for fixed in (True, False)]
    tables = [_table(result, cases) for cases in kinds if cases]
    return "\n\n".join([*tables, _facts(result), *_failures(result)])


def _table(result: dict[str, Any], cases: list[str]) -> str:
    rows = {(row["case"], row["system"]): row for row in result["medians"]}
    systems = [system for system in SYSTEMS if any((case, system) in rows for case in cases)]
    lines = ["| " + " | ".join(["tokens/s (peak GiB)", *(SYSTEMS[system].label for system in systems), "ours / best peer"]) + " |"]
    lines.append("|---" * (len(systems) + 2) + "|")
    for case in cases:
        cells = [_cell(rows.get((case, system))) for system in systems]
        lines.append("| " + " | ".join([Work(**result["works"][case]).label(), *cells, _ratio(rows, case)]) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if not row["rounds"]:
        return "failed"
    failed = f", {len(row['errors'])} of {row['rounds'] + len(row['errors'])} failed" if row["errors"] else ""
    return f"{row['tokens_per_s']:,.0f} ({row['peak_memory_gib']:.1f}){failed}"


def _ratio(rows: dict[tuple[str, str], dict[str, Any]], case: str) -> str:
    """Our fastest stage over the fastest peer."""
    rates = {system: row["tokens_per_s"] for (of, system), row in rows.items() if of == case and row["rounds"]}
    ours = [rate for system, rate in rates.items() if SYSTEMS[system].stage is not None]
    peers = [rate for system, rate in rates.items() if SYSTEMS[system].stage is None]
    return f"{max(ours) / max(peers):.2f}" if ours and peers else ""


def _facts(result: dict[str, Any]) -> str:
    good = [row for row in result["medians"] if row["rounds"]]
    compiled = [row["compile_s"] for row in good if row["system"] == "ours3"]
    spread = max(((row["high"] - row["low"]) / row["tokens_per_s"] for row in good if row["rounds"] > 1), default=0.0)
    few, most = min((row["rounds"] for row in good), default=0), max((row["rounds"] for row in good), default=0)
    days = sorted({run["date"][:10] for run in result["runs"]})
    facts = [
        f"Medians of {few if few == most else f'{few} to {most}'} round{'s' * (most > 1)}, every run a process of its own",
        f"rounds of the same differ by at most {spread:.1%}",
        f"{_machine(result['environments'])}",
        " to ".join(dict.fromkeys((days[0], days[-1]))),
    ]
    if compiled:
        facts.insert(2, f"stage 3's first steps take {min(compiled):.0f} to {max(compiled):.0f} s longer (compilation)")
    return textwrap.fill("; ".join(facts) + f". {CONDITIONS}", width=140, break_on_hyphens=False)


def _machine(environments: list[dict[str, Any]]) -> str:
    names = {environment["gpus"][0]["name"] if environment["gpus"] else environment["cpu_name"] for environment in environments}
    found = {"driver": [one["driver"] for one in environments], "cuDNN": [one["cudnn"] for one in environments]}
    found |= {package: [one["versions"].get(package) for one in environments] for package in PACKAGES}
    parts = [f"{label} {' / '.join(sorted(set(filter(None, values))))}" for label, values in found.items() if any(values)]
    return f"one {' / '.join(sorted(names))} ({', '.join(parts)})"


def _failures(result: dict[str, Any]) -> list[str]:
    lines = [
        f"- {SYSTEMS[row['system']].label}, {Work(**result['works'][row['case']]).label()}: {error}"
        for row in result["medians"]
        for error in dict.fromkeys(row["errors"])
    ]
    return ["Failed:\n" + "\n".join(lines)] if lines else []


def svg(result: dict[str, Any]) -> str:
    """Bars of tokens/s, a group for each work, the least and the greatest round as a line on each bar."""
    good = [row for row in result["medians"] if row["rounds"]]
    scale = 430 / max((row["high"] for row in good), default=1.0)
    parts, y = [], 24
    for case, work in result["works"].items():
        mine = {row["system"]: row for row in good if row["case"] == case}
        parts.append(f'<text class="case" x="8" y="{y}">{Work(**work).label()}</text>')
        y += 8
        for system in (system for system in SYSTEMS if system in mine):
            parts.append(_bar(mine[system], y, scale))
            y += 18
        y += 24
    size = f'viewBox="0 0 840 {y}" width="840" height="{y}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="tokens per second">'
    return "\n".join([head, f"<style>{STYLE}</style>", *parts, "</svg>", ""])


def _bar(row: dict[str, Any], y: int, scale: float) -> str:
    low, high, width = (f"{row[name] * scale:.1f}" for name in ("low", "high", "tokens_per_s"))
    return (
        f'<text x="212" y="{y + 11}" text-anchor="end">{SYSTEMS[row["system"]].label}</text>'
        f'<rect x="220" y="{y + 1}" width="{width}" height="13" fill="{COLOURS[row["system"]]}"/>'
        f'<line x1="{220 + float(low):.1f}" x2="{220 + float(high):.1f}" y1="{y + 7}" y2="{y + 7}"/>'
        f'<text x="{228 + float(high):.1f}" y="{y + 11}">{row["tokens_per_s"]:,.0f} '
        f'<tspan class="unit">tokens/s, {row["peak_memory_gib"]:.1f} GiB</tspan></text>'
    )


def between(readme: str) -> str | None:
    """What stands between README's two comments; None where it has none."""
    found = re.search(re.escape(BEGIN) + r"\n(.*?)\n" + re.escape(END), readme, re.DOTALL)
    return found.group(1) if found else None


if __name__ == "__main__":
    import fire

    fire.Fire(write)
