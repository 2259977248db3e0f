"""run(): a script's function as a command, through Fire, with exact text, checked flag names and our exit codes."""

from __future__ import annotations

import difflib
import inspect
import keyword
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surefoot.errors import SurefootError, UsageError, joined
from surefoot.flag_values import bool_word

HELP = ("-h", "--help", "help")
WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


def run(function: Callable[..., None], argv: Sequence[str] | None = None) -> int:
    """Calls `function` with the flags of the command line and returns the exit code; --help shows its docstring and flags.

    A parameter without a default is required, also as the first word; `in_` is the flag --in; `*words` takes words without a flag.
    Parameters are str, int, float or bool.
    """
    import fire

    words = list(sys.argv[1:] if argv is None else argv)
    name = Path(inspect.getfile(function)).name
    try:
        line = ["--help"] if any(word in HELP for word in words) else tidy(function, words)
        fire.Fire(function, command=line, name=name, serialize=lambda _: None)
    except SurefootError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def tidy(function: Callable[..., Any], words: Sequence[str]) -> list[str]:
    """The words as literals, so that Fire neither guesses a type nor drops a word.

    Raises:
        UsageError: every wrong flag, missing flag and stray word at once.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    flags = {name: flag for name, flag in parameters.items() if flag.kind is not flag.VAR_POSITIONAL}
    required = [name for name, flag in flags.items() if flag.default is flag.empty]
    given, stray = _pairs(flags, words)
    if stray and required and required[0] not in given:
        given[required[0]] = stray.pop(0)
    takes_words = len(flags) < len(parameters)
    problems = [] if takes_words else [f"stray word {word!r}: flags begin with --, and values with spaces need quotes" for word in stray]
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in flags:
            problems.append(_unknown(name, flags))
            continue
        kind = _kind(flags[name])
        values[name] = _value(kind, text)
        if values[name] is None:
            problems.append(f"--{_shown(name)} needs a value" if text is None else f"--{_shown(name)}={text} must be {WORDS[kind]}")
    problems += [f"--{_shown(name)} is missing" for name in required if name not in given]
    if problems:
        raise UsageError(joined(problems))
    return [repr(word) for word in stray] + [f"--{name}={value!r}" for name, value in values.items()]


def _pairs(flags: Mapping[str, inspect.Parameter], words: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """The text of each flag, None where it has none, and the words that belong to no flag."""
    given: dict[str, str | None] = {}
    stray: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            stray.append(word)
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        name += "_" * keyword.iskeyword(name)
        is_switch = name in flags and _kind(flags[name]) is bool
        follows = bool(rest) and not rest[0].startswith("--") and (not is_switch or bool_word(rest[0]) is not None)
        given[name] = text if equals else rest.pop(0) if follows else "True" if is_switch else None
    return given, stray


def _kind(parameter: inspect.Parameter) -> Any:
    """int for `int` and for `int | None`."""
    return next(kind for kind in typing.get_args(parameter.annotation) or (parameter.annotation,) if kind is not type(None))


def _value(kind: Any, text: str | None) -> Any:
    if text is None or kind is str:
        return text
    if kind is bool:
        return bool_word(text)
    try:
        return kind(text)
    except ValueError:
        return None


def _unknown(name: str, flags: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, list(flags), n=1)
    hint = f"Did you mean --{_shown(close[0])}?" if close else f"There are {', '.join('--' + _shown(flag) for flag in flags)}"
    return f"--{_shown(name)} is not a flag. {hint}"


def _shown(name: str) -> str:
    return name.removesuffix("_")
