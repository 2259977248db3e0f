"""The plan for people (a table of choice, value, source, reason) and for programs (JSON)."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from surefoot import terminal
from surefoot.memory import GIB, Estimate
from surefoot.plan import Plan
from surefoot.rules.desk import Choice
from surefoot.verdicts import Verdicts

HEADINGS = Choice("choice", "value", "source", "reason")
VALUES = 14  # the column of values, with its gap; a longer value has its line to itself


def table(plan: Plan, *, all_rows: bool, width: int | None = None) -> str:
    """The plan as lines of `width` characters, by default the terminal's. In a file notes keep their line, however long: for grep.

    Without all_rows, values left at their default with nothing to say are counted, not printed.
    """
    room = width or terminal.width()
    shown = [choice for choice in plan.choices if all_rows or choice.source != "default" or choice.reason]
    files = dict.fromkeys(choice.source for choice in shown if choice.source.startswith("file "))
    names = max(len(choice.name) for choice in (*shown, HEADINGS)) + 2
    lines = [_machine_line(plan), *files]
    for choice in (HEADINGS, *shown):
        lines += _row(choice, names, room)
    if len(shown) < len(plan.choices):
        lines.append(f"{len(plan.choices) - len(shown)} more at their defaults: --dry_run prints them")
    lines += [_canary_line(plan.attention)] if plan.attention else []
    lines += _memory_lines(plan.memory, in_full=all_rows) if plan.memory else []
    lines += [f"note: {note}" for note in plan.notes]
    if width is None and not terminal.is_there():
        return "\n".join(lines)
    return "\n".join(part for line in lines for part in terminal.wrapped(line, room))


def as_json(plan: Plan) -> str:
    return json.dumps(as_record(plan), indent=2)


def as_record(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, for run.json."""
    parts = ("model", "adapter", "data", "train", "process", "output", "machine")
    return {
        "backend": plan.backend,
        **{part: dataclasses.asdict(getattr(plan, part)) for part in parts},
        "attention": plan.attention.as_record() if plan.attention else None,
        "memory": plan.memory.as_record() if plan.memory else None,
        "choices": [choice._asdict() for choice in plan.choices],
        "notes": list(plan.notes),
    }


def _machine_line(plan: Plan) -> str:
    m = plan.machine
    gpus = f"{len(m.gpus)} x {m.gpus[0].name} ({m.gpus[0].memory_gib:.0f} GiB)" if m.gpus else f"no GPU, {m.cpu_count} CPU cores"
    stack = ", ".join(f"{name} {m.versions[name]}" for name in ("torch", "transformers", "peft") if m.has(name))
    return f"{m.hostname}: {gpus}; {m.world_size} process{'es' if m.world_size > 1 else ''} ({m.strategy}); {stack}"


def _canary_line(verdicts: Verdicts) -> str:
    """What the attention canary found, one clause per backend and mask that it could try."""
    found = []
    for v in (verdict for verdict in verdicts.rows if verdict.state != "unavailable"):
        took = "" if v.milliseconds is None else f" in {v.milliseconds:.3g} ms"
        found.append(f"{v.backend} {v.mask} " + (f"{v.error:.1g}{took}" if v.state == "pass" else f"FAILED ({v.reason})"))
    return f"attention canary ({verdicts.origin}): error against fp64 and time of a layer: {'; '.join(found)}"


def _memory_lines(made: Estimate, *, in_full: bool) -> list[str]:
    """The estimate in one line, or with a line for each kind of memory."""
    j = made.job
    line = f"memory: {made.gib:.1f} GiB estimated at the peak of a step, for {j.rows} x {j.length:,} tokens a pass"
    if not in_full:
        return [f"{line}: " + ", ".join(f"{name} {size / GIB:.1f}" for name, size in made.parts.items() if size >= GIB / 20)]
    rows = [f"  {name:<16}{size / 2**20:12,.1f} MiB" for name, size in made.parts.items()]
    return [line, *rows, "  (of layer backward and head only the greater one counts)"]


def _text(choice: Choice) -> str:
    value = choice.value
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return " ".join(f"{key}={item}" for key, item in value.items()) or "-"
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value) or "none"
    return str(value)


def _row(choice: Choice, names: int, width: int) -> list[str]:
    """One choice: name, value, and `source: reason`, which goes behind or below a value that needs more than its column."""
    source = "file" if choice.source.startswith("file ") else choice.source
    said = f"{source}: {choice.reason}" if choice.reason else source
    values = terminal.wrapped(_text(choice), width - names, indent="")
    if len(values) == 1 and len(values[0]) <= VALUES - 2:
        first, *rest = terminal.wrapped(said, width - names - VALUES, indent="")
        cells = [f"{values[0]:<{VALUES}}{first}", *(" " * VALUES + line for line in rest)]
    elif len(values[-1]) + 2 + len(said) <= width - names:
        cells = [*values[:-1], f"{values[-1]}  {said}"]
    else:
        cells = [*values, *(" " * VALUES + line for line in terminal.wrapped(said, width - names - VALUES, indent=""))]
    return [f"{choice.name if index == 0 else '':<{names}}{cell}".rstrip() for index, cell in enumerate(cells)]
