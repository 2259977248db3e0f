"""What a script shares with the next one: its flags as a frozen dataclass, its main(), and a sign of life over long work."""

from __future__ import annotations

import dataclasses
import difflib
import signal
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field
from pathlib import Path
from typing import Any, TypeVar

from surefoot import terminal
from surefoot.errors import SurefootError, UsageError, joined
from surefoot.flag_values import convert, kinds

T = TypeVar("T")
HELP = ("-h", "--help", "help")
PATIENCE_S = 10.0
REQUIRED = dataclasses.MISSING


def flag(default: Any, doc: str, *, choices: tuple[Any, ...] = (), low: float | None = None, is_bare: bool = False) -> Any:
    """A field of a script's flags; None stands for "not given", REQUIRED must be given. An is_bare flag's words also stand without it.

    Of a name that Python keeps for itself, the field ends in _: `in_` is the flag --in.
    """
    return field(default=default, metadata={"doc": doc, "choices": choices, "low": low, "is_bare": is_bare})


def main(kind: type[T], usage: str, run: Callable[..., int | None], *, passes_on: bool = False) -> int:
    """Reads argv, runs through Fire and returns the exit code, run()'s own or 0; a user's mistake is one message and no traceback.

    Args:
        passes_on: the words of flags that are not the script's own are another program's: run(flags, words).
    """
    return terminal.piped(lambda: _main(kind, usage, run, passes_on=passes_on))


def _main(kind: type[T], usage: str, run: Callable[..., int | None], *, passes_on: bool) -> int:
    argv = sys.argv[1:]
    if any(word in HELP for word in argv) or (passes_on and not argv):
        print(f"{terminal.text(usage.rstrip())}\n\n{help_text(kind)}")
        return 0
    import fire

    signal.signal(signal.SIGTERM, _leave)
    try:
        own, rest = parted(kind, argv) if passes_on else (argv, [])
        line = [f"--{name}={value!r}" for name, value in vars(parse(kind, own)).items()]  # literals, so that Fire guesses nothing
        more = [rest] if passes_on else []
        code = fire.Fire(lambda **given: run(kind(**given), *more), command=line, serialize=lambda _: None)
    except SurefootError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{Path(sys.argv[0]).name}: stopped by Ctrl-C", file=sys.stderr)
        return 128 + signal.SIGINT
    return code or 0


def _leave(number: int, _frame: object) -> None:
    """Ends on SIGTERM as on Ctrl-C, so that what is half written is taken away."""
    raise SystemExit(128 + number)


def parted(kind: type[Any], argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of the script's own flags, and those of all others."""
    flags, own, rest = _flags(kind), list[str](), list[str]()
    into = rest
    for word in argv:
        if word.startswith("--"):
            into = own if word[2:].partition("=")[0].replace("-", "_") in flags else rest
        into.append(word)
    return own, rest


def parse(kind: type[T], argv: Sequence[str]) -> T:
    """The flags in `argv`: --name=value, --name value, bare switches, lists as --name one two, and the words of the bare flag.

    Raises:
        UsageError: every wrong word together.
    """
    flags, values = _flags(kind), {}
    given, stray = _split(flags, argv)
    problems = [f"stray word {word!r}: flags begin with --, and values with spaces need quotes" for word in stray]
    for name, raw in given.items():
        if name not in flags:
            close = difflib.get_close_matches(name, flags, n=1)
            problems.append(f"--{name} is not a flag. " + (f"Did you mean --{close[0]}?" if close else "See --help"))
        elif raw is None:
            problems.append(f"--{name} needs a value")
        else:
            try:
                values[flags[name].name] = convert(flags[name], raw)
            except UsageError as error:
                problems.append(str(error))
    problems += [f"--{name} is missing" for name, f in flags.items() if f.default is REQUIRED and name not in given]
    if problems:
        raise UsageError(joined(problems))
    return kind(**values)


def _flags(kind: type[Any]) -> dict[str, dataclasses.Field[Any]]:
    """The fields by their flags, each with its type."""
    hints = typing.get_type_hints(kind)
    flags = {f.name.removesuffix("_"): f for f in dataclasses.fields(kind)}
    for f in flags.values():
        f.type = hints[f.name]
    return flags


def _split(flags: Mapping[str, dataclasses.Field[Any]], argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """What stands behind each flag, and the words that belong to none."""
    given: dict[str, Any] = {}
    stray: list[str] = []
    words = list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        if word.startswith("--") and name:
            given[name] = text if equals else _values(words, flags.get(name))
        else:
            stray.append(word)
    bare = next((name for name, f in flags.items() if f.metadata["is_bare"]), None)
    if stray and bare and bare not in given:
        given[bare], stray = (stray, []) if _is_list(flags[bare]) else (stray[0], stray[1:])
    return given, stray


def _is_list(known: dataclasses.Field[Any]) -> bool:
    return any(typing.get_origin(one) is tuple for one in kinds(known))


def _values(words: list[str], known: dataclasses.Field[Any] | None) -> Any:
    """Takes the flag's words off the front: all of a list flag, one of another, True for a bare switch, None when there is none."""
    taken: list[str] = []
    while words and not words[0].startswith("--") and (not taken or (known is not None and _is_list(known))):
        taken.append(words.pop(0))
    if taken:
        return taken if len(taken) > 1 else taken[0]
    return True if known is None or bool in kinds(known) else None


def help_text(kind: type[Any]) -> str:
    """Each flag with its default and meaning."""
    lines = []
    for name, f in _flags(kind).items():
        default = " ".join(f.default) if isinstance(f.default, tuple) else "" if f.default in (None, REQUIRED) else str(f.default)
        lines += terminal.flag(f"--{name}={default}", f.metadata["doc"], tuple(map(str, f.metadata["choices"])))
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


def told(items: Iterable[T], total: int, what: str, unit: str) -> Iterator[T]:
    """`items`, with progress() over them."""
    with progress(total, what, unit) as tick:
        for item in items:
            yield item
            tick(1)


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
