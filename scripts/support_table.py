"""support_table.py: writes docs/support.md from surefoot/support.py and the versions of scripts/dev.lock.

python scripts/support_table.py [--out FILE]
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from surefoot import script, support  # noqa: E402
from surefoot.script import flag  # noqa: E402

DOC, LOCK = ROOT / "docs/support.md", ROOT / "scripts/dev.lock"
VERSIONED = ("torch", "transformers", "peft", "accelerate", "deepspeed", "bitsandbytes")
HEAD = """\
# What is supported

Written by `python scripts/support_table.py` from `surefoot/support.py`, from which the plan refuses too; do not edit. A number is the test
that ran the cell, a letter the reason why it is refused; a dot was never run: the plan says so and goes on. scripts/dev.lock has
{versions}.
"""


def versions() -> str:
    """Of the packages that decide, as the lock pins them."""
    pinned = dict(line.split("==") for line in LOCK.read_text().splitlines() if re.match(r"[\w-]+==", line))
    return ", ".join(f"{name} {pinned[name]}" for name in VERSIONED if name in pinned)


def document() -> str:
    """docs/support.md: a table for each engine, then the tests and the reasons."""
    lines = [HEAD.format(versions=versions())]
    for engine in support.ENGINES:
        lines += [f"## {engine}", "", f"| {' | '.join(('weights', 'compile', 'packing', *support.METHODS))} |", "|---" * 7 + "|"]
        for quantization in support.QUANTIZATIONS:
            for compiles in support.BOTH:
                for packs in support.BOTH:
                    marks = [_mark(support.Cell(method, quantization, engine, compiles, packs)) for method in support.METHODS]
                    lines.append(f"| {' | '.join((quantization, 'yes' if compiles else 'no', 'yes' if packs else 'no', *marks))} |")
        lines.append("")
    tests = (f"{number}. `{test.name}` ({test.ran or 'not run yet'})" for number, test in enumerate(support.TESTS, 1))
    lines += ["## Tests", "", *tests, "", "## Refused", ""]
    lines += [f"- **{_letter(one)}**{_where(one)}: {one.reason}. {one.way_out}.{_thread(one)}" for one in support.REFUSED]
    return "\n".join(lines) + "\n"


def _mark(cell: support.Cell) -> str:
    found = support.verdict(cell)
    numbers = [str(number) for number, test in enumerate(support.TESTS, 1) if test.name in found.tests]
    refused = next((one for one in support.REFUSED if cell in one.cells), None)
    return ", ".join([*numbers, *([_letter(refused)] if refused else [])]) or "."


def _letter(one: support.Refusal) -> str:
    return chr(ord("a") + support.REFUSED.index(one))


def _where(one: support.Refusal) -> str:
    return f" (on a {one.device.upper()})" if one.device else ""


def _thread(one: support.Refusal) -> str:
    return f" ({one.thread})" if one.thread else ""


@dataclass(frozen=True, kw_only=True)
class Flags:
    out: str = flag(str(DOC), "the file")


def run(flags: Flags) -> None:
    """Writes the page."""
    Path(flags.out).write_text(document())
    print(f"written: {flags.out}")


if __name__ == "__main__":
    sys.exit(script.main(Flags, __doc__, run))
