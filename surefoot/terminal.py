"""How wide a line may be, and a flag with its meaning as lines of that width."""

from __future__ import annotations

import os
import select
import shutil
import sys
import textwrap
from collections.abc import Callable

SIGPIPE = 141  # the exit code of a program whose reader has left, as shells have it
COLUMN = 34  # where the meanings begin
FULL = 100  # a written line of more goes on in the next one
COMMANDS = ("python ", "accelerate ")
APART = (*COMMANDS, " ", "-", "Exit codes")  # a line that begins so never continues another


def is_there() -> bool:
    """False where stdout is a file, a pipe or closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def width() -> int:
    """Characters of a line: the terminal's, COLUMNS, or 120 where there is neither; never under 60 nor over 140."""
    return max(60, min(shutil.get_terminal_size((120, 24)).columns, 140))


def wrapped(line: str, room: int, *, indent: str = "  ") -> list[str]:
    """The line cut between words, the rest indented. A path stays whole, however long: it is there to be copied."""
    if len(line) <= room:
        return [line]
    return textwrap.wrap(line, room, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def text(written: str) -> str:
    """Prose and commands as a docstring has them, for this width: prose is filled anew, a command is cut so that it can still be typed."""
    lines: list[str] = []
    before = ""
    for line in written.splitlines():
        goes_on = len(before) > FULL and line and not any(one.startswith(APART) for one in (before, line))
        lines[-1:] = [f"{lines[-1]} {line}"] if goes_on else [*lines[-1:], line]
        before = line
    return "\n".join(part for line in lines for part in _cut(line))


def _cut(line: str) -> list[str]:
    margin = len(line) - len(line.lstrip())
    return _command(line) if line.startswith(COMMANDS) else wrapped(line, width(), indent=" " * (margin + 2) if margin else "")


def _command(line: str) -> list[str]:
    """The command, where it does not fit with its comment above it and a backslash at each cut."""
    if len(line) <= width():
        return [line]
    words, _, comment = line.partition("  # ")
    *parts, last = wrapped(words.strip(), width() - 2, indent="    ")
    return [*([f"# {comment.strip()}"] if comment else []), *(f"{part} \\" for part in parts), last]


def flag(head: str, meaning: str, choices: tuple[str, ...] = ()) -> list[str]:
    """`--name=default` and what it means, with those of its choices that the meaning does not name."""
    unnamed = choices and not all(choice.split("_")[0] in meaning for choice in choices)
    first, *rest = wrapped(meaning + (f" ({', '.join(choices)})" if unnamed else ""), width() - COLUMN, indent="")
    margin = " " * COLUMN
    fits = len(head) + 2 < COLUMN
    return [f"  {head:<{COLUMN - 2}}{first}" if fits else f"  {head}\n{margin}{first}", *(margin + line for line in rest)]


def piped(main: Callable[[], int]) -> int:
    """main()'s exit code; SIGPIPE's, and no traceback, where whoever read stdout has left (`| head`)."""
    try:
        code = main()
        if sys.stdout is not None:  # closed by >&-
            sys.stdout.flush()
    except BrokenPipeError:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if not poll.poll(0):  # another pipe
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
        return SIGPIPE
    return code
