"""run(): a script's function as a command, through Fire, with exact text, checked flag names and our exit codes."""

from __future__ import annotations

import difflib
import inspect
import keyword
import sys
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from surefoot.errors import SurefootError, UsageError, joined
from surefoot.flag_values import bool_word

HELP = ("-h", "--help", "help")
WORDS = {int: "a whole number", float: "a number", bool: "True or False"}


def run(function: Callable[..., None], argv: Sequence[str] | None = None) -> int:
    """Calls `function` with the flags of the command line and returns the exit code; --help shows its docstring and flags.

    A parameter without a default is required, also as the first word; `in_` is the flag --in. Parameters are str, int, float or bool.
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
    """The words as `--name=literal`, so that Fire neither guesses a type nor drops a word.

    Raises:
        UsageError: every wrong flag, missing flag and stray word at once.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    given, problems = _pairs(parameters, words)
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in parameters:
            problems.append(_unknown(name, parameters))
            continue
        kind = _kind(parameters[name])
        value = _value(kind, text)
        values[name] = value
        if value is None:
            problems.append(f"--{_shown(name)}={text} must be {WORDS[kind]}" if text is not None else f"--{_shown(name)} needs a value")
    missing = [name for name, flag in parameters.items() if flag.default is flag.empty and name not in given]
    problems += [f"--{_shown(name)} is missing" for name in missing]
    if problems:
        raise UsageError(joined(problems))
    return [f"--{name}={value!r}" for name, value in values.items()]


def _pairs(parameters: Any, words: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    given: dict[str, str | None] = {}
    problems: list[str] = []
    rest = list(words)
    first = next((name for name, flag in parameters.items() if flag.default is flag.empty), None)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            if first is None or first in given:
                problems.append(f"stray word {word!r}: flags begin with --, and values with spaces need quotes in the shell")
            else:
                given[first] = word
            continue
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        name += "_" * keyword.iskeyword(name)
        is_switch = name in parameters and _kind(parameters[name]) is bool
        follows = bool(rest) and not rest[0].startswith("--") and (not is_switch or bool_word(rest[0]) is not None)
        given[name] = text if equals else rest.pop(0) if follows else "True" if is_switch else None
    return given, problems


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


def _unknown(name: str, parameters: Any) -> str:
    close = difflib.get_close_matches(name, list(parameters), n=1)
    hint = f"Did you mean --{_shown(close[0])}?" if close else f"There are {', '.join('--' + _shown(flag) for flag in parameters)}"
    return f"--{_shown(name)} is not a flag. {hint}"


def _shown(name: str) -> str:
    return name.removesuffix("_")
