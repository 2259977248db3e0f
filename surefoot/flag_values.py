"""A flag's value: text or a Python value in, the flag's type out, checked against its choices and its lower bound."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from surefoot import compat
from surefoot.errors import UsageError

TRUE_WORDS, FALSE_WORDS = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def kinds(flag: dataclasses.Field[Any]) -> tuple[Any, ...]:
    """The types a flag takes, None left out: (bool,), (int, float), (tuple[str, ...],) ..."""
    if typing.get_origin(flag.type) in (typing.Union, types.UnionType):
        return tuple(kind for kind in typing.get_args(flag.type) if kind is not type(None))
    return (flag.type,)


def bool_word(raw: Any) -> bool | None:
    """True or False for a word that says so, else None."""
    if isinstance(raw, bool):
        return raw
    word = str(raw).strip().lower()
    return True if word in TRUE_WORDS else False if word in FALSE_WORDS else None


def convert(flag: dataclasses.Field[Any], raw: Any) -> Any:
    """One raw value to the flag's type, checked against its choices and its lower bound.

    Raises:
        UsageError: flag, value given, rule.
    """
    if type(None) in typing.get_args(flag.type) and _is_none(flag, raw):
        return None
    for kind in kinds(flag):
        value = _as(kind, raw)
        if value is not None:
            _check(flag, value)
            return value
    wanted = " or ".join(_KIND_WORDS.get(kind, "a list of words") for kind in kinds(flag))
    raise UsageError(f"--{flag.name}={raw} must be {wanted}")


def _is_none(flag: dataclasses.Field[Any], raw: Any) -> bool:
    """None, or a word for it that is not one of the flag's own choices (--report_to=none)."""
    word = raw.strip().lower() if isinstance(raw, str) else raw
    return raw is None or (word in ("", "none", "null") and word not in flag.metadata["choices"])


_KIND_WORDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text"}


def _as(kind: Any, raw: Any) -> Any:
    if kind is bool:
        return bool_word(raw)
    if kind is str:
        return raw if isinstance(raw, str) else str(raw) if isinstance(raw, Path) else None
    if kind in (int, float):
        return _as_number(kind, raw)
    return _as_words(raw)


def _as_number(kind: type, raw: Any) -> int | float | None:
    if isinstance(raw, bool) or not isinstance(raw, (int, float, str)):
        return None
    try:
        number = float(raw)
    except ValueError:
        return None
    if number != number or number in (float("inf"), float("-inf")):
        return None
    if kind is int:
        return int(number) if number.is_integer() else None
    return number


def _as_words(raw: Any) -> tuple[str, ...] | None:
    if isinstance(raw, Path):
        return (str(raw),)
    if isinstance(raw, str):
        text = raw.strip()
        if text.startswith(("[", "(")):
            try:
                return _as_words(ast.literal_eval(text))
            except (ValueError, SyntaxError):
                text = text.strip("[]()")
        words = [word.strip().strip("'\"") for word in text.split(",")]
        return tuple(words) if all(words) else None
    if isinstance(raw, (list, tuple)) and raw and all(isinstance(word, (str, Path)) and str(word) for word in raw):
        return tuple(str(word) for word in raw)
    return None


def _check(flag: dataclasses.Field[Any], value: Any) -> None:
    low, choices = flag.metadata["low"], flag.metadata["choices"]
    is_free = isinstance(value, (bool, float)) and type(value) in kinds(flag) and str in kinds(flag)  # choices are its words
    if low is not None and not isinstance(value, str) and value < low:
        raise UsageError(f"--{flag.name}={value} is too small: the least is {low:g}")
    if not choices or is_free:
        return
    for item in value if isinstance(value, tuple) else (value,):
        if flag.name == "adapter_name" and item in compat.RETIRED_ADAPTERS:
            raise UsageError(f"--adapter_name={item} is not supported: {compat.RETIRED_ADAPTERS[item]}")
        if flag.name == "init_lora_weights" and item.startswith("pissa_niter_") and item[12:].isdigit():
            continue
        if item not in choices:
            close = difflib.get_close_matches(str(item), [str(choice) for choice in choices], n=1)
            hint = f". Did you mean {close[0]}?" if close else ""
            raise UsageError(f"--{flag.name}={item} is not one of {', '.join(str(choice) for choice in choices)}{hint}")
