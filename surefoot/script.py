"""What a script shares with the next one: its flags as a frozen dataclass, its main(), and a sign of life over long work."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import textwrap
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from surefoot.errors import SurefootError, UsageError, joined
from surefoot.flag_values import convert, kinds

T = TypeVar("T")
PATIENCE_S = 10.0


def flag(default: Any, doc: str, *, choices: tuple[Any, ...] = (), low: float | None = None) -> Any:
    """A field of a script's flags; None stands for "not given"."""
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low})


def main(kind: type[T], usage: str, run: Callable[[T], object]) -> int:
    """Reads argv, runs and returns the exit code; a user's mistake is one message and no traceback."""
    argv = sys.argv[1:]
    if any(word in ("-h", "--help", "help") for word in argv):
        print(f"{usage}\n\n{help_text(kind)}")
        return 0
    try:
        run(parse(kind, argv))
    except SurefootError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def parse(kind: type[T], argv: Sequence[str]) -> T:
    """The flags in `argv`: --name=value, --name value, bare switches, and lists as --name one two.

    Raises:
        UsageError: every wrong word together.
    """
    flags, words, problems, values = _flags(kind), list(argv), [], {}
    while words:
        word = words.pop(0)
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or not name:
            problems.append(f"stray word {word!r}: flags begin with --")
            continue
        given: Any = text if equals else _values(words, flags.get(name))
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1)
            problems.append(f"--{name} is not a flag. " + (f"Did you mean --{close[0]}?" if close else "See --help"))
        elif given is None:
            problems.append(f"--{name} needs a value")
        else:
            try:
                values[name] = convert(flags[name], given)
            except UsageError as error:
                problems.append(str(error))
    if problems:
        raise UsageError(joined(problems))
    return kind(**values)


def _flags(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    hints = typing.get_type_hints(kind)
    flags = {f.name: f for f in dataclasses.fields(kind)}
    for name, f in flags.items():
        f.type = hints[name]
    return flags


def _values(words: list[str], known: dataclasses.Field[Any] | None) -> Any:
    """Takes the flag's words off the front: all of a list flag, one of another, True for a bare switch, None when there is none."""
    taken: list[str] = []
    is_list = known is not None and any(typing.get_origin(one) is tuple for one in kinds(known))
    while words and not words[0].startswith("--") and (is_list or not taken):
        taken.append(words.pop(0))
    if taken:
        return taken if len(taken) > 1 else taken[0]
    return True if known is None or bool in kinds(known) else None


def help_text(kind: type[Any]) -> str:
    """Each flag with its default and meaning."""
    lines = []
    for name, f in _flags(kind).items():
        default = " ".join(f.default) if isinstance(f.default, tuple) else "" if f.default is None else str(f.default)
        doc = str(f.metadata["doc"])
        choices = [str(choice) for choice in f.metadata["choices"]]
        if choices and not all(choice in doc for choice in choices):
            doc += f" ({', '.join(choices)})"
        first, *rest = textwrap.wrap(doc, 90)
        lines += [f"  {f'--{name}={default}':<28} {first}", *(f"{'':<31}{part}" for part in rest)]
    return "\n".join(lines)


@contextmanager
def progress(total: int, what: str, unit: str = "row") -> Iterator[Callable[[int], object]]:
    """Gives a function that is told how much more is done: a bar on a terminal, elsewhere a line every 10 s."""
    from tqdm import tqdm

    if sys.stderr.isatty():
        with tqdm(total=total, desc=what, unit=unit, delay=1) as bar:
            yield bar.update
        return
    done, last = 0, time.monotonic()

    def tick(more: int) -> None:
        nonlocal done, last
        done += more
        if time.monotonic() - last > PATIENCE_S:
            last = time.monotonic()
            print(f"{what}: {done:,} of {total:,} {unit}s", file=sys.stderr, flush=True)

    yield tick


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as aligned columns, the first to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if place == 0 else cell.rjust(width) for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def rounded(values: Mapping[str, Any], digits: int = 6) -> dict[str, Any]:
    """The mapping with its floats rounded, for JSON that people read."""
    return {name: round(value, digits) if isinstance(value, float) else value for name, value in values.items()}
