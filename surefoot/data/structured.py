"""structured(): a raw row to a chat row ({system, user, assistant}, {messages} or {text}) under whatever names its columns have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import orjson

from surefoot.data import formats
from surefoot.data.formats import Dropped, Turn
from surefoot.data.jinja_file import asked_with_context
from surefoot.data.loading import SourceRow, kind
from surefoot.errors import DataError

# What data sets call the parts of a row, in order of precedence; case and outer blanks do not count.
TURNS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat")
ASKED = ("instruction", "user", "question", "query", "prompt", "problem", "input")
CONTEXT = ("input", "context")
ANSWERED = ("output", "assistant", "answer", "response", "completion", "target", "solution", "reply")
SYSTEM = ("system", "system_prompt")
TEXT = ("text", "content")


class Fields(NamedTuple):
    """Columns that the user names; empty: found by the lists above."""

    user: str = ""
    assistant: str = ""


FOUND = Fields()


class Layout(NamedTuple):
    """The column of each part, None where the row has none. turns and text exclude asked and answered."""

    turns: str | None
    asked: str | None
    context: str | None
    answered: str | None
    system: str | None
    text: str | None


class Structurer:
    """Rows to chat rows; the layout of each set of columns is found once."""

    def __init__(self, fields: Fields = FOUND, system_prompt: str = "") -> None:
        self.fields, self.system_prompt = fields, system_prompt
        self._layouts: dict[tuple[str, ...], Layout] = {}

    def __call__(self, row: SourceRow) -> dict[str, Any] | Dropped:
        """The chat row, or why the row is dropped: no question, no answer, turns out of order.

        Raises:
            DataError: no known names among the columns, or a part that is no text.
        """
        columns = row.columns
        names = tuple(columns) if None not in columns.values() else tuple(name for name, value in columns.items() if value is not None)
        layout = self._layouts.get(names)
        if layout is None:
            layout = self._layouts[names] = self._layout(row, names)
        if layout.asked is not None and layout.answered is not None:
            return self._pair(row, layout)
        if layout.turns is not None:
            return self._conversation(row, layout)
        text = _text(row, str(layout.text))
        return {"text": text} if text.strip() else Dropped("an empty text")

    def _pair(self, row: SourceRow, layout: Layout) -> dict[str, Any] | Dropped:
        columns = row.columns
        asked, answer = columns[layout.asked], columns[layout.answered]  # type: ignore[index]
        if isinstance(asked, list) or isinstance(answer, list):  # prompt and completion as lists of messages
            return self._conversation(row, layout)
        asked = asked if type(asked) is str else _text(row, str(layout.asked))
        answer = answer if type(answer) is str else _text(row, str(layout.answered))
        if layout.context is not None:
            asked = asked_with_context(asked, _text(row, layout.context))
        if not answer.strip():
            return Dropped("an empty answer")
        if not asked.strip():
            return Dropped("an empty question")
        return {"system": self._system(row, layout), "user": asked, "assistant": answer}

    def _conversation(self, row: SourceRow, layout: Layout) -> dict[str, Any] | Dropped:
        columns = {"messages": row.columns[layout.turns]} if layout.turns else dict(row.columns)
        example = formats.normalise(SourceRow(columns, row.where), "text")
        if isinstance(example, Dropped):
            return example
        turns = example.turns
        if turns[0].role != "system":
            turns = (Turn("system", self._system(row, layout), False), *turns)
        if len(turns) == 3:
            return {turn.role: turn.text for turn in turns}
        return {"messages": [{"role": turn.role, "content": turn.text} for turn in turns if turn.text or turn.role != "system"]}

    def _system(self, row: SourceRow, layout: Layout) -> str:
        return _text(row, layout.system) or self.system_prompt if layout.system is not None else self.system_prompt

    def _layout(self, row: SourceRow, names: tuple[str, ...]) -> Layout:
        folded = {name.strip().lower(): name for name in map(str, names)}
        for flag, name in self.fields._asdict().items():
            if name and name not in row.columns:
                raise DataError(
                    f"{row.where}: --{flag}_field={name} is no column of the row. Its columns: {', '.join(map(str, row.columns))}"
                )
        asked = self.fields.user or _first(folded, ASKED)
        answered = self.fields.assistant or _first({key: name for key, name in folded.items() if name != asked}, ANSWERED)
        context = _first({key: name for key, name in folded.items() if name not in (asked, answered)}, CONTEXT)
        turns = None if self.fields.user else _first(folded, TURNS)
        text = None if turns or (asked and answered) else _first(folded, TEXT)
        if not (turns or text or (asked and answered)):
            raise DataError(_unknown(row))
        if turns or text:
            asked = answered = context = None
        return Layout(turns, asked, context, answered, _first(folded, SYSTEM), text)


def _first(folded: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((folded[name] for name in names if name in folded), None)


def _text(row: SourceRow, column: str) -> str:
    """A column's text; a number or truth value is written as JSON writes it, null and NaN are empty."""
    value = row.columns.get(column)
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return ""
    if isinstance(value, (bool, int, float)):
        return orjson.dumps(value).decode()
    raise DataError(f"{row.where}: column {column} holds {kind(value)}, where text is needed. Write it as text")


def _unknown(row: SourceRow) -> str:
    return (
        f"{row.where}: no question and answer, turns or text among the columns {', '.join(map(str, row.columns)) or '(none)'}. "
        f"Name them with --user_field and --assistant_field; known are {', '.join(ASKED)} and {', '.join(ANSWERED)}, "
        f"or {', '.join(TURNS)}, or {', '.join(TEXT)}"
    )


def as_line(columns: Mapping[str, Any], where: str) -> bytes:
    """A chat row as a line of .jsonl. Raises DataError: a text that UTF-8 cannot hold."""
    try:
        return orjson.dumps(columns, option=orjson.OPT_APPEND_NEWLINE)
    except orjson.JSONEncodeError as error:
        raise DataError(f"{where}: a text that UTF-8 cannot hold ({error}). Remove the half character (\\ud800 to \\udfff)") from None
