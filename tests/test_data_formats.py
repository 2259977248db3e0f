"""Rows of every format to one Example, what is dropped, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from surefoot.data.formats import Dropped, Example, Turn, normalise, used_columns
from surefoot.data.loading import SourceRow
from surefoot.errors import DataError

ASKED, SAID = Turn("user", "Hi", False), Turn("assistant", "Hello", True)
SYSTEM, CONTEXT = Turn("system", "Be kind", False), Turn("assistant", "Yes?", False)
LATER = (Turn("user", "And?", False), Turn("assistant", "Bye", True))
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def example(columns: dict[str, Any], text_field: str = "text") -> Example:
    found = normalise(SourceRow(columns, "train.json:17"), text_field)
    assert isinstance(found, Example)
    return found


@pytest.mark.parametrize(
    ("columns", "name", "turns"),
    [
        ({"instruction": "Hi", "output": "Hello"}, "alpaca", (ASKED, SAID)),
        ({"instruction": "Hi", "input": "", "output": "Hello", "answer": "x", "text": "whole"}, "alpaca", (ASKED, SAID)),
        ({"instruction": "Hi", "output": "Hello", "system": "Be kind"}, "alpaca", (SYSTEM, ASKED, SAID)),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "sharegpt", (ASKED, SAID)),
        (
            {"conversations": [{"from": "user", "value": "Hi"}, {"from": "model", "value": "Hello"}], "system": "Be kind"},
            "sharegpt",
            (SYSTEM, ASKED, SAID),
        ),
        ({"conversations": CHAT}, "sharegpt", (ASKED, SAID)),
        ({"messages": CHAT}, "messages", (ASKED, SAID)),
        ({"messages": [{"role": "system", "content": "Be kind"}, *CHAT], "system": "ignored"}, "messages", (SYSTEM, ASKED, SAID)),
        ({"messages": [{"role": "developer", "content": "Be kind"}, *CHAT]}, "messages", (SYSTEM, ASKED, SAID)),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, CHAT[1]]},
            "messages",
            (ASKED, SAID),
        ),
        (
            {"messages": [*CHAT, {"role": "user", "content": "And?"}, {"role": "assistant", "content": "Bye"}]},
            "messages",
            (ASKED, SAID, *LATER),
        ),
        ({"system": "Be kind", "user": "Hi", "assistant": "Hello"}, "user_assistant", (SYSTEM, ASKED, SAID)),
        ({"user": "Hi", "assistant": "Hello"}, "user_assistant", (ASKED, SAID)),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt_completion", (ASKED, SAID)),
        ({"prompt": [CHAT[0]], "completion": [CHAT[1]]}, "prompt_completion_chat", (ASKED, SAID)),
        (
            {
                "prompt": [CHAT[0], {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "And?"}],
                "completion": [{"role": "assistant", "content": "Bye"}],
            },
            "prompt_completion_chat",
            (ASKED, CONTEXT, *LATER),
        ),
        ({"input": "Hi", "target": "Hello"}, "input_target", (ASKED, SAID)),
        ({"messages": None, "instruction": "Hi", "output": "Hello"}, "alpaca", (ASKED, SAID)),
    ],
)
def test_row_when_of_a_known_format_then_has_its_turns(columns: dict[str, Any], name: str, turns: tuple[Turn, ...]) -> None:
    found = example(columns)
    assert (found.format, found.turns, found.text, found.where) == (name, turns, None, "train.json:17")


def test_alpaca_row_when_it_has_an_input_then_keeps_it_apart() -> None:
    found = example({"instruction": "Add", "input": "1 2", "output": "3"})
    assert (found.turns[0].text, found.context) == ("Add", "1 2")


@pytest.mark.parametrize(
    ("columns", "text_field"),
    [({"text": "All"}, "text"), ({"body": "All"}, "body"), ({"body": "All", "instruction": "Hi", "output": "Hello"}, "body")],
)
def test_text_row_when_its_column_is_named_then_is_plain_text(columns: dict[str, Any], text_field: str) -> None:
    found = example(columns, text_field)
    assert (found.format, found.text, found.turns) == ("text", "All", ())


def test_conversation_when_it_ends_with_the_user_then_loses_those_turns_and_counts_them() -> None:
    found = example({"messages": [*CHAT, {"role": "user", "content": "And?"}]})
    assert (found.turns, found.cut_turns) == ((ASKED, SAID), 1)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"instruction": "Hi", "output": ""}, "an empty answer"),
        ({"instruction": "Hi", "output": " \n"}, "an empty answer"),
        ({"instruction": "Hi", "output": None}, "an empty answer"),
        ({"text": " "}, "an empty text"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "an empty answer"),
        ({"messages": [CHAT[0]]}, "no assistant turn"),
        ({"messages": []}, "no assistant turn"),
        ({"prompt": CHAT, "completion": [{"role": "user", "content": "And?"}]}, "no assistant turn"),
        ({"messages": [CHAT[1]]}, "turns not in the order user, assistant, user, assistant"),
        ({"messages": [CHAT[0], *CHAT]}, "turns not in the order user, assistant, user, assistant"),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}, *CHAT]}, "turns not in the order user, assistant, user, assistant"),
    ],
)
def test_row_when_it_holds_nothing_to_train_on_then_is_dropped_with_the_reason(columns: dict[str, Any], reason: str) -> None:
    assert normalise(SourceRow(columns, "a:1"), "text") == Dropped(reason)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (
            {"question": "a", "answer": "b"},
            "train.json:17: the row has columns question, answer, which is none of the known formats (messages: messages; ",
        ),
        (
            {"question": "a", "answer": "b"},
            "Rename question to instruction and answer to output, name the column of plain text with --text_field",
        ),
        (
            {"instuction": "a", "context": "b", "response": "c"},
            "Rename instuction to instruction and context to input and response to output",
        ),
        ({"foo": "a"}, "Rename the columns, name"),
        ({}, "the row has columns (none)"),
        ({"instruction": 3, "output": "b"}, "train.json:17: column instruction holds a number (3), where text is needed. Write it as text"),
        ({"instruction": "a", "output": ["b"]}, "column output holds a list of 1"),
        ({"instruction": "a", "output": True}, "column output holds true or false (True)"),
        ({"messages": "hi"}, "column messages holds text (hi), where a list of turns is needed"),
        ({"messages": ["hi"]}, "messages[0] is text (hi), where a turn such as {role, content} or {from, value} is needed"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0] has role bot, which is none of system, developer, user"),
        ({"messages": [{"content": "x"}]}, "messages[0] has role None"),
        (
            {"messages": [CHAT[0], {"role": "tool", "content": "x"}]},
            "messages[1] is a tool call or a tool's answer (role tool), which is not supported",
        ),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "messages[1] is a tool call"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "conversations[0] is a tool call"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0] has a part of type image_url"),
        ({"messages": [{"role": "user", "content": 3}]}, "the content of messages[0] is a number (3), where text is needed"),
    ],
)
def test_row_when_it_cannot_be_understood_then_is_named_with_a_way_out(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as caught:
        normalise(SourceRow(columns, "train.json:17"), "text")
    assert says in str(caught.value)
    assert caught.value.exit_code == 3


def test_row_when_unknown_is_allowed_then_is_left_to_the_jinja_file() -> None:
    found = normalise(SourceRow({"question": "a"}, "a:1"), "text", allows_unknown=True)
    assert isinstance(found, Example)
    assert (found.format, found.turns, found.columns) == ("columns", (), {"question": "a"})


def test_used_columns_when_asked_then_are_those_the_format_reads() -> None:
    assert used_columns("alpaca", "text") == ("instruction", "output", "input", "system")
    assert used_columns("prompt_completion_chat", "text") == ("prompt", "completion")
    assert used_columns("text", "body") == ("body",)
