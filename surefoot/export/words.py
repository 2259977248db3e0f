"""A script's words before Fire: each must be a parameter of its function, with a value of the parameter's type."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from surefoot.errors import UsageError, joined
from surefoot.flag_values import bool_word


def tidy(function: Callable[..., Any], argv: Sequence[str]) -> list[str]:
    """argv as Fire commands `--name=literal`. Bare Fire runs the function first and complains of an unknown flag afterwards.

    Raises:
        UsageError: every unknown flag, stray word and wrong value, together.
    """
    known = inspect.signature(function).parameters
    problems, commands, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        name, equals, text = word.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not word.startswith("--") or name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean --{close[0]}?" if close else f"there are --{', --'.join(known)}"
            problems.append(f"{word} is not a flag: {hint}" if word.startswith("--") else f"stray word {word!r}: flags begin with --")
            continue
        default = known[name].default
        if not equals and words and not words[0].startswith("--"):
            equals, text = "=", words.pop(0)
        value = True if isinstance(default, bool) and not equals else _read(text, default) if equals else None
        if value is None:
            kind = "True or False" if isinstance(default, bool) else "a number above 0" if isinstance(default, float) else "a value"
            problems.append(f"{word} needs {kind}")
        commands.append(f"--{name}={value!r}")
    if problems:
        raise UsageError(joined(problems))
    return commands


def _read(text: str, default: Any) -> Any:
    """The text as a value of the default's type; None when it is none."""
    if isinstance(default, bool):
        return bool_word(text)
    if not isinstance(default, float):
        return text or None
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0 < value < float("inf") else None
