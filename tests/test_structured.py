"""Rows of every shape as the chat rows that process_data.py writes."""

from __future__ import annotations

from typing import Any

import pytest

from surefoot.data.loading import SourceRow
from surefoot.data.structured import Structurer
from surefoot.errors import DataError


@pytest.mark.parametrize(
    ("columns", "user", "assistant"),
    [
        ({"instruction": "Sum up.", "input": "A text.", "output": "Text."}, "Sum up.\n\nA text.", "Text."),
        ({"question": "Who?", "context": "Ann came.", "answer": "Ann"}, "Who?\n\nAnn came.", "Ann"),
        ({"prompt": "Hi", "response": "Hello"}, "Hi", "Hello"),
        ({"input": "2 + 2", "target": "4"}, "2 + 2", "4"),
        ({" Question": "Who?", "ANSWER ": "Ann"}, "Who?", "Ann"),
        ({"query": "2 + 2", "answer": 4}, "2 + 2", "4"),
        ({"query": "2 = 2", "answer": True}, "2 = 2", "true"),
        ({"instruction": "a", "input": "", "output": "the correct answer is b", "answer": "b"}, "a", "the correct answer is b"),
        ({"instruction": "a", "output": None, "answer": "b"}, "a", "b"),
        ({"prompt": [{"role": "user", "content": "Hi"}], "completion": [{"role": "assistant", "content": "Hello"}]}, "Hi", "Hello"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "Hi", "Hello"),
    ],
)  # fmt: skip
def test_row_when_structured_then_keeps_question_context_and_answer(columns: dict[str, Any], user: str, assistant: str) -> None:
    assert Structurer(system_prompt="Be brief.")(SourceRow(columns, "f:1")) == {"system": "Be brief.", "user": user, "assistant": assistant}


def test_row_when_it_has_several_turns_or_plain_text_then_stays_that() -> None:
    turns = [{"role": role, "content": f"{role} says"} for role in ("system", "user", "assistant", "user", "assistant")]
    assert Structurer()(SourceRow({"messages": turns}, "f:1")) == {"messages": turns}
    assert Structurer()(SourceRow({"dialogue": turns[1:]}, "f:1")) == {"messages": turns[1:]}
    assert Structurer(system_prompt="system says")(SourceRow({"chat": turns[1:]}, "f:1")) == {"messages": turns}
    assert Structurer()(SourceRow({"text": "Once upon"}, "f:1")) == {"text": "Once upon"}


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"premise": "a", "label": "b"}, "f:1: no question and answer, turns or text among the columns premise, label"),
        ({"question": "a", "answer": {"text": ["b"]}}, "f:1: column answer holds an object (text), where text is needed"),
        ({"messages": "Hi"}, "f:1: column messages holds text (Hi), where a list of turns is needed"),
    ],
)
def test_row_when_it_is_no_chat_row_then_is_refused_with_its_place(columns: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError) as refused:
        Structurer()(SourceRow(columns, "f:1"))
    assert str(refused.value).startswith(says)
