"""Recognises the format of each row and brings it into one form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from surefoot.data.loading import SourceRow
from surefoot.errors import DataError

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
RENAMES = {
    "question": "instruction", "query": "instruction", "response": "output", "answer": "output", "reply": "output", "target": "output",
}  # fmt: skip
KNOWN = (
    "alpaca {instruction, input, output}, sharegpt {conversations}, messages {messages}, {system, user, assistant}, "
    "{prompt, completion}, {input, target}, {text}"
)


class Turn(NamedTuple):
    """One turn of a conversation; role is system, user or assistant."""

    role: str
    text: str

    @property
    def is_trained(self) -> bool:
        return self.role == "assistant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A row in one form: `turns`, the last an assistant's, or `text`, all of which is trained.

    context is alpaca's input; cut_turns counts turns after the last answer; a row of unknown columns has neither turns nor text and
    is left to a Jinja file.
    """

    format: str
    where: str
    columns: Mapping[str, Any]
    turns: tuple[Turn, ...] = ()
    context: str = ""
    text: str | None = None
    cut_turns: int = 0

    @property
    def is_single(self) -> bool:
        """True for one question and one answer without a system turn."""
        return [turn.role for turn in self.turns] == ["user", "assistant"]

    @property
    def system(self) -> str:
        return self.turns[0].text if self.turns and self.turns[0].role == "system" else ""


class Dropped(NamedTuple):
    """Why a row cannot be trained on though nothing is wrong with it."""

    reason: str


EMPTY = Dropped("an empty answer")


def normalise(row: SourceRow, text_field: str, *, allows_unknown: bool = False) -> Example | Dropped:
    """The row as an Example, or Dropped where its answer is empty.

    Args:
        allows_unknown: a row of no known format becomes an Example of its columns alone.

    Raises:
        DataError: no known format, or a value of the wrong type; it names row, columns and formats.
    """
    present = {name: value for name, value in row.columns.items() if value is not None}
    for name, columns, build in FORMATS:
        if all(column in present for column in columns):
            return build(name, row, present)
    if text_field in present:
        text = _string(present, text_field, row.where)
        return Example(format="text", where=row.where, columns=row.columns, text=text) if text.strip() else EMPTY
    if allows_unknown:
        return Example(format="columns", where=row.where, columns=row.columns)
    return _complain(row)


def used_columns(format_name: str, text_field: str) -> tuple[str, ...]:
    """The columns that a format reads."""
    optional = {"alpaca": ("input",), "system_user_assistant": ("system",), "text": (text_field,)}
    required = next((columns for name, columns, _ in FORMATS if name == format_name), ())
    return (*required, *optional.get(format_name, ()))


def _complain(row: SourceRow) -> Example:
    missing = [name for name, value in row.columns.items() if value is None]
    names = ", ".join(map(str, row.columns)) or "(none)"
    hint = f" ({', '.join(map(str, missing))} empty)" if missing else ""
    renames = [f"{name} to {RENAMES[name]}" for name in row.columns if name in RENAMES]
    way_out = f"Rename {' and '.join(renames)}" if renames else "Rename the columns, or write a Jinja file for --prompt_style"
    raise DataError(f"{row.where}: the row has columns {names}{hint}, which is none of the known formats: {KNOWN}. {way_out}")


def _string(values: Mapping[str, Any], column: str, where: str) -> str:
    value = values.get(column, "")
    if not isinstance(value, str):
        raise DataError(f"{where}: column {column} must be text, not {type(value).__name__}: {str(value)[:60]}")
    return value


def _alpaca(name: str, row: SourceRow, values: Mapping[str, Any]) -> Example | Dropped:
    asked, context, answer = (_string(values, column, row.where) for column in ("instruction", "input", "output"))
    return _single(name, row, asked, answer, context)


def _single(name: str, row: SourceRow, asked: str, answer: str, context: str = "") -> Example | Dropped:
    if not answer.strip():
        return EMPTY
    turns = (Turn("user", asked), Turn("assistant", answer))
    return Example(format=name, where=row.where, columns=row.columns, turns=turns, context=context)


def _prompt_completion(name: str, row: SourceRow, values: Mapping[str, Any]) -> Example | Dropped:
    prompt, completion = values["prompt"], values["completion"]
    if isinstance(prompt, list) != isinstance(completion, list):
        raise DataError(f"{row.where}: prompt and completion must both be text, or both lists of messages")
    if isinstance(prompt, list):
        return _conversation(name, row, [*prompt, *completion])
    return _single(name, row, _string(values, "prompt", row.where), _string(values, "completion", row.where))


def _input_target(name: str, row: SourceRow, values: Mapping[str, Any]) -> Example | Dropped:
    return _single(name, row, _string(values, "input", row.where), _string(values, "target", row.where))


def _system_user_assistant(name: str, row: SourceRow, values: Mapping[str, Any]) -> Example | Dropped:
    texts = {role: _string(values, role, row.where) for role in ("system", "user", "assistant")}
    messages = [{"role": role, "content": text} for role, text in texts.items() if text or role != "system"]
    return _conversation(name, row, messages)


def _listed(name: str, row: SourceRow, values: Mapping[str, Any]) -> Example | Dropped:
    column = "messages" if name == "messages" else "conversations"
    if not isinstance(values[column], list):
        raise DataError(f"{row.where}: {column} must be a list of turns, not {type(values[column]).__name__}")
    return _conversation(name, row, values[column])


def _conversation(name: str, row: SourceRow, messages: list[Any]) -> Example | Dropped:
    turns = [_turn(message, row.where) for message in messages]
    last = max((index for index, turn in enumerate(turns) if turn.role == "assistant"), default=None)
    if last is None:
        raise DataError(f"{row.where}: the conversation has no assistant turn to train on")
    if not turns[last].text.strip():
        return EMPTY
    kept = tuple(turns[: last + 1])
    return Example(format=name, where=row.where, columns=row.columns, turns=kept, cut_turns=len(turns) - len(kept))


def _turn(message: Any, where: str) -> Turn:
    if not isinstance(message, dict):
        raise DataError(f"{where}: a turn must be an object with role and content, not {type(message).__name__}")
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    if role not in ROLES:
        raise DataError(f"{where}: a turn of role {role!r}; known are {', '.join(ROLES)}. Tool calls are not supported")
    if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str):
        raise DataError(f"{where}: a turn's content must be text, not {type(content).__name__}")
    return Turn(ROLES[role], content)


# In order of precedence: a row with instruction and output is alpaca even where it has a text column too.
FORMATS: tuple[tuple[str, tuple[str, ...], Callable[[str, SourceRow, Mapping[str, Any]], Example | Dropped]], ...] = (
    ("messages", ("messages",), _listed),
    ("sharegpt", ("conversations",), _listed),
    ("alpaca", ("instruction", "output"), _alpaca),
    ("prompt_completion", ("prompt", "completion"), _prompt_completion),
    ("system_user_assistant", ("user", "assistant"), _system_user_assistant),
    ("input_target", ("input", "target"), _input_target),
)
