"""normalise(): a row of any known format to one Example, recognised row by row from its columns."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from surefoot.data.loading import SourceRow, kind
from surefoot.errors import DataError

ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "model": "assistant",
}  # fmt: skip
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")

# What other data sets call our columns; only used to suggest a renaming.
OTHER_NAMES = {
    "question": "instruction", "query": "instruction", "problem": "instruction", "prompt": "instruction",
    "answer": "output", "response": "output", "reply": "output", "solution": "output", "completion": "output", "target": "output",
    "context": "input", "conversation": "messages", "dialogue": "messages", "dialog": "messages", "chat": "messages",
}  # fmt: skip


class Turn(NamedTuple):
    """What one side says; role is system, user or assistant. is_trained is False for assistant turns that are only context."""

    role: str
    text: str
    is_trained: bool


class Dropped(NamedTuple):
    """A row that holds nothing to train on."""

    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A row, understood.

    turns end with the assistant turn to train on; they are empty for plain text (then `text` is set) and for a row of no known
    format that a Jinja file reads (then both are unset). `context` is alpaca's input column, which its prompt keeps apart.
    """

    format: str
    where: str
    columns: Mapping[str, Any]
    turns: tuple[Turn, ...] = ()
    context: str = ""
    text: str | None = None
    cut_turns: int = 0

    @property
    def system(self) -> str:
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else ""

    @property
    def is_single(self) -> bool:
        """One user turn and its answer, no system turn."""
        return len(self.turns) == 2 and self.turns[0].role == "user"


class Format(NamedTuple):
    """The columns a format must and may have, and its reader of turns."""

    needs: tuple[str, ...]
    takes: tuple[str, ...]
    read: Callable[[SourceRow], list[Turn]]


def normalise(row: SourceRow, text_field: str, *, allows_unknown: bool = False) -> Example | Dropped:
    """The row as an Example, or why it is dropped: an empty answer, no assistant turn, turns out of order.

    Raises:
        DataError: the columns fit no format (unless allows_unknown), or a column holds something else than text.
    """
    name = recognise(row.columns, text_field)
    if name is None:
        if allows_unknown:
            return Example(format="columns", where=row.where, columns=row.columns)
        raise DataError(_unknown(row, text_field))
    if name == "text":
        text = _text(row, text_field)
        return Example(format=name, where=row.where, columns=row.columns, text=text) if text.strip() else Dropped("an empty text")
    turns = _read_turns(row, name)
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    kept = tuple(turns[: last + 1])
    reason = _unusable(kept)
    if reason:
        return Dropped(reason)
    if name == "prompt_completion" and any(isinstance(row.columns[column], list) for column in FORMATS[name].needs):
        name = "prompt_completion_chat"
    context = _text(row, "input") if name == "alpaca" else ""
    return Example(format=name, where=row.where, columns=row.columns, turns=kept, context=context, cut_turns=len(turns) - len(kept))


def recognise(columns: Mapping[str, Any], text_field: str) -> str | None:
    """The format whose columns are all there and not null, else one whose columns are there; a text_field of the user's own goes first."""
    if text_field != "text" and columns.get(text_field) is not None:
        return "text"
    filled = {name for name, value in columns.items() if value is not None}
    for there in (filled, columns.keys()):
        for name, form in FORMATS.items():
            if all(column in there for column in form.needs):
                return name
        if text_field in there:
            return "text"
    return None


def used_columns(format_name: str, text_field: str) -> tuple[str, ...]:
    """The columns that a format reads."""
    form = FORMATS.get(format_name.removesuffix("_chat"))
    return form.needs + form.takes if form else (text_field,)


def _unusable(turns: tuple[Turn, ...]) -> str | None:
    if not turns:
        return "no assistant turn"
    said = turns[1:] if turns[0].role == "system" else turns
    if [turn.role for turn in said] != ["user", "assistant"] * (len(said) // 2):
        return "turns not in the order user, assistant, user, assistant"
    if not all(turn.text.strip() for turn in turns if turn.is_trained):
        return "an empty answer"
    return None if turns[-1].is_trained else "no assistant turn"


def _read_turns(row: SourceRow, name: str) -> list[Turn]:
    form = FORMATS[name]
    turns = form.read(row)
    system = _text(row, "system") if "system" in form.takes else ""
    if system and not (turns and turns[0].role == "system"):
        turns = [Turn("system", system, False), *turns]
    return turns


def _pair(row: SourceRow, asked: str, answered: str) -> list[Turn]:
    return [Turn("user", _text(row, asked), False), Turn("assistant", _text(row, answered), True)]


def _prompt_completion(row: SourceRow) -> list[Turn]:
    """Strings, or lists of messages as TRL has them; assistant turns inside the prompt are context."""
    prompt, completion = row.columns["prompt"], row.columns["completion"]
    asked = _messages(row, "prompt") if isinstance(prompt, list) else [Turn("user", _text(row, "prompt"), False)]
    answered = _messages(row, "completion") if isinstance(completion, list) else [Turn("assistant", _text(row, "completion"), True)]
    return [turn._replace(is_trained=False) for turn in asked] + answered


def _messages(row: SourceRow, column: str) -> list[Turn]:
    turns = row.columns[column]
    if not isinstance(turns, list):
        raise DataError(f"{row.where}: column {column} holds {kind(turns)}, where a list of turns is needed")
    return [_turn(row, turn, f"{column}[{index}]") for index, turn in enumerate(turns)]


def _turn(row: SourceRow, turn: Any, place: str) -> Turn:
    if not isinstance(turn, dict):
        raise DataError(f"{row.where}: {place} is {kind(turn)}, where a turn such as {{role, content}} or {{from, value}} is needed")
    said_by, content = (turn.get("role"), turn.get("content")) if "role" in turn else (turn.get("from"), turn.get("value"))
    if said_by in TOOL_ROLES or turn.get("tool_calls"):
        raise DataError(
            f"{row.where}: {place} is a tool call or a tool's answer (role {said_by}), which is not supported. "
            "Remove these rows, or write the call as text of the assistant"
        )
    role = ROLES.get(said_by) if isinstance(said_by, str) else None
    if role is None:
        raise DataError(f"{row.where}: {place} has role {said_by}, which is none of {', '.join(ROLES)}")
    return Turn(role, _content(row, content, place), role == "assistant")


def _content(row: SourceRow, content: Any, place: str) -> str:
    """Text, or a list of parts {"type": "text", "text": ...}."""
    if isinstance(content, str) or content is None:
        return content or ""
    if not isinstance(content, list):
        raise DataError(f"{row.where}: the content of {place} is {kind(content)}, where text is needed")
    for part in content:
        if not (isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)):
            what = part.get("type", "untyped") if isinstance(part, dict) else kind(part)
            raise DataError(f'{row.where}: {place} has a part of type {what}; only {{"type": "text", "text": ...}} is trained on here')
    return "".join(part["text"] for part in content)


def _text(row: SourceRow, column: str) -> str:
    """A column's text; missing and null are empty."""
    value = row.columns.get(column)
    if value is None or isinstance(value, str):
        return value or ""
    raise DataError(f"{row.where}: column {column} holds {kind(value)}, where text is needed. Write it as text")


# In order of precedence: a row with instruction and output is alpaca even where it has a text column too.
FORMATS = {
    "messages": Format(("messages",), ("system",), lambda row: _messages(row, "messages")),
    "sharegpt": Format(("conversations",), ("system",), lambda row: _messages(row, "conversations")),
    "alpaca": Format(("instruction", "output"), ("input", "system"), lambda row: _pair(row, "instruction", "output")),
    "prompt_completion": Format(("prompt", "completion"), (), _prompt_completion),
    "user_assistant": Format(("user", "assistant"), ("system",), lambda row: _pair(row, "user", "assistant")),
    "input_target": Format(("input", "target"), (), lambda row: _pair(row, "input", "target")),
}


def _unknown(row: SourceRow, text_field: str) -> str:
    known = "; ".join(f"{name}: {', '.join(form.needs)}" for name, form in FORMATS.items())
    return (
        f"{row.where}: the row has columns {', '.join(map(str, row.columns)) or '(none)'}, which is none of the known formats ({known}; "
        f"text: {text_field}). {_renaming(row.columns)}, name the column of plain text with --text_field, or give --prompt_style a Jinja "
        "file with {% generation %} around the answer"
    )


def _renaming(columns: Mapping[str, Any]) -> str:
    """The nearest format's columns as a renaming, where there is one."""
    names = [name for form in FORMATS.values() for name in form.needs]
    renamed: dict[str, str] = {}
    for column in map(str, columns):
        close = difflib.get_close_matches(column.lower(), names, n=1, cutoff=0.8)
        target = OTHER_NAMES.get(column.lower()) or (close[0] if close else None)
        if target and target not in renamed:
            renamed[target] = column
    for form in FORMATS.values():
        if all(name in renamed for name in form.needs):
            pairs = [f"{old} to {new}" for new, old in renamed.items() if new in form.needs + form.takes and new != old]
            return f"Rename {' and '.join(pairs)}"
    return "Rename the columns"
