"""Every prompt style with its exact text, and the spans that are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from surefoot.data import prompts
from surefoot.data.formats import Example, normalise
from surefoot.data.loading import SourceRow
from surefoot.errors import DataError, UsageError
from tests.data_tokenizer import CHAT, MARKED_CHAT, make_tokenizer

EOS = "<|end_of_text|>"
ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Response:\n"
ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n"
)
INDENTED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    "                ### Instruction:\n                Add\n                \n                ### Response:\n                "
)
INDENTED_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request. \n\n"
    "                ### Instruction:\n                Add\n                \n                ### Input:\n                1 2\n"
    "                \n                ### Response:\n                "
)
HEAD = "<|begin_of_text|>"
USER = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
SYSTEM = "<|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|>"
ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n"

ADD = {"instruction": "Add", "output": "3"}
TWO = {
    "messages": [
        {"role": role, "content": text} for role, text in [("user", "Hi"), ("assistant", "Hello"), ("user", "And?"), ("assistant", "Bye")]
    ]
}


def example(columns: dict[str, Any]) -> Example:
    found = normalise(SourceRow(columns, "a.jsonl:7"), "text", allows_unknown=True)
    assert isinstance(found, Example)
    return found


def render(columns: dict[str, Any], style: str = "auto", **tokenizer: Any) -> prompts.Rendered:
    rendered = prompts.load(style, make_tokenizer(**tokenizer)).render(example(columns))
    assert isinstance(rendered, prompts.Rendered)
    return rendered


def trained(rendered: prompts.Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.trained]


@pytest.mark.parametrize(
    ("style", "columns", "prompt", "answer"),
    [
        ("alpaca", ADD, ALPACA, "3"),
        ("auto", ADD, ALPACA, "3"),
        ("alpaca", ADD | {"input": "1 2"}, ALPACA_INPUT, "3"),
        ("alpaca", {"user": "Add", "assistant": "3"}, ALPACA, "3"),
        ("alpaca", {"prompt": "Add", "completion": "3"}, ALPACA, "3"),
        ("alpaca_indented", ADD, INDENTED, "3"),
        ("alpaca_indented", ADD | {"input": "1 2"}, INDENTED_INPUT, "3"),
        ("auto", {"prompt": "Q: x\nA:", "completion": " y"}, "Q: x\nA:", " y"),
        ("auto", {"input": "Q: x\nA:", "target": " y"}, "Q: x\nA:", " y"),
        ("auto", {"text": "All of it"}, "", "All of it"),
        ("alpaca", {"text": "All of it"}, "", "All of it"),
        ("auto", {"input": "x", "target": f"y{EOS}"}, "x", "y"),
    ],
)  # fmt: skip
def test_row_when_rendered_then_is_prompt_and_answer_and_one_eos(style: str, columns: dict[str, Any], prompt: str, answer: str) -> None:
    rendered = render(columns, style)
    assert rendered.text == prompt + answer + EOS
    assert trained(rendered) == [answer + EOS]
    assert not rendered.is_whole


@pytest.mark.parametrize("template", [CHAT, MARKED_CHAT], ids=["prefixes", "markers"])
@pytest.mark.parametrize(
    ("style", "columns", "text", "answers"),
    [
        (
            "auto",
            TWO,
            HEAD + USER.format("Hi") + ASK + "Hello<|eot_id|>" + USER.format("And?") + ASK + "Bye<|eot_id|>",
            ["Hello<|eot_id|>", "Bye<|eot_id|>"],
        ),
        (
            "auto",
            {"system": "Be kind", "user": "Hi", "assistant": "Hello"},
            HEAD + SYSTEM + USER.format("Hi") + ASK + "Hello<|eot_id|>",
            ["Hello<|eot_id|>"],
        ),
        ("auto", ADD | {"system": "Be kind"}, HEAD + SYSTEM + USER.format("Add") + ASK + "3<|eot_id|>", ["3<|eot_id|>"]),
        ("chat", ADD | {"input": "1 2"}, HEAD + USER.format("Add\n\n1 2") + ASK + "3<|eot_id|>", ["3<|eot_id|>"]),
        (
            "auto",
            {"prompt": TWO["messages"][:3], "completion": TWO["messages"][3:]},
            HEAD + USER.format("Hi") + ASK + "Hello<|eot_id|>" + USER.format("And?") + ASK + "Bye<|eot_id|>",
            ["Bye<|eot_id|>"],
        ),
    ],
)
def test_conversation_when_rendered_then_trains_each_answer_and_its_end_token(
    template: str, style: str, columns: dict[str, Any], text: str, answers: list[str]
) -> None:
    rendered = render(columns, style, chat_template=template, eos_token="<|eot_id|>")
    assert rendered.text == text
    assert trained(rendered) == answers
    assert (rendered.style, rendered.is_whole) == ("chat", True)


def test_conversation_when_eos_is_not_the_end_token_then_gets_a_trained_eos() -> None:
    rendered = render(TWO)
    assert rendered.text.endswith("Bye<|eot_id|><|end_of_text|>")
    assert trained(rendered) == ["Hello<|eot_id|>", "Bye<|eot_id|><|end_of_text|>"]


def test_chat_template_when_it_writes_space_after_the_end_token_then_does_not_train_it() -> None:
    template = "{% for message in messages %}<|start_header_id|>{{ message['role'] }}\n{{ message['content'] }}<|eot_id|>\n{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant\n{% endif %}"
    rendered = render(TWO, chat_template=template, eos_token="<|eot_id|>")
    assert rendered.text.endswith("Bye<|eot_id|>\n")
    assert trained(rendered) == ["Hello<|eot_id|>", "Bye<|eot_id|>"]
    rendered = render(TWO, chat_template=template)
    assert rendered.text.endswith("Bye<|eot_id|><|end_of_text|>")


def test_chat_template_when_it_writes_no_end_token_then_the_last_answer_gets_eos() -> None:
    template = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    rendered = render(TWO, chat_template=template)
    assert trained(rendered) == ["Hello\n", "Bye\n<|end_of_text|>"]


def test_chat_template_when_it_writes_the_date_then_writes_the_same_every_day() -> None:
    template = "{{ strftime_now('%d %b %Y') }}\n" + CHAT
    assert render(TWO, chat_template=template).text.startswith("26 Jul 2024\n")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (
            "{% for message in messages %}{{ loop.length }}{{ message['content'] }}{% endfor %}",
            "writes a turn otherwise once more turns follow",
        ),
        ("{% for message in messages %}{{ message['content'] | upper }}{% endfor %}", "alters the answer ('Hello')"),
        ("{{ raise_exception('roles must alternate') }}", "the tokenizer's chat template refuses the row: roles must alternate"),
        (
            "{% for message in messages %}{{ message['content'] }}{% endfor %}{% generation %}x{% endgeneration %}",
            "do not hold the row's 2 answers",
        ),
    ],
)
def test_chat_template_when_answers_cannot_be_found_then_names_row_and_template(template: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        render(TWO, chat_template=template)
    assert str(caught.value).startswith("a.jsonl:7: ")
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "style", "says"),
    [
        (
            TWO,
            "auto",
            "a row of format messages is a conversation, and the tokenizer has no chat template. Give --prompt_style a Jinja file",
        ),
        ({"user": "Hi", "assistant": "Hello"}, "auto", "Give --prompt_style=alpaca, or a Jinja file"),
        (TWO, "alpaca", "a.jsonl:7: --prompt_style=alpaca has no place for 4 turns. Give --prompt_style=chat or a Jinja file"),
        (ADD | {"system": "Be kind"}, "alpaca", "has no place for a system turn"),
    ],
)
def test_row_when_the_style_cannot_hold_it_then_is_refused_with_a_way_out(columns: dict[str, Any], style: str, says: str) -> None:
    with pytest.raises(DataError) as caught:
        render(columns, style, chat_template=None)
    assert says in str(caught.value)


def test_chat_style_when_there_is_no_template_then_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--prompt_style=chat: the tokenizer has no chat template"):
        render(ADD, "chat", chat_template=None)


def test_tokenizer_when_it_has_no_eos_then_is_refused() -> None:
    with pytest.raises(DataError, match="has no EOS token"):
        render(ADD, eos_token=None)


@pytest.mark.parametrize(
    ("source", "columns", "text", "answers"),
    [
        ("Q: {{ instruction }}\n{% if input %}\nI: {{ input }}\n{% endif %}\nA: ", ADD, "Q: Add\nA: 3" + EOS, ["3" + EOS]),
        ("Q: {{ instruction }}{% if input %} ({{ input }}){% endif +%}\nA: ", ADD | {"input": "1 2"}, "Q: Add (1 2)\nA: 3" + EOS, ["3" + EOS]),
        ("{{ system }}|{{ prompt }}|{{ task }}\n", ADD | {"input": "1 2", "task": "sum", "system": "S"}, "S|Add\n\n1 2|sum\n3" + EOS, ["3" + EOS]),
        ("{{ messages | length }} {{ messages[-1].role }}\n", TWO, "4 assistant\nBye" + EOS, ["Bye" + EOS]),
        ("Q {{ question }} A{% generation %} {{ answer }}{% endgeneration %}", {"question": "a", "answer": "b"}, "Q a A b" + EOS, [" b" + EOS]),
        ("Q {{ question }} A{% generation %} {{ answer }}{% endgeneration %}\n", {"question": "a", "answer": "b"}, "Q a A b" + EOS, [" b" + EOS]),
        ("{{ text }}: {% generation %}{{ short }}{% endgeneration %}", {"text": "long", "short": "s"}, "long: s" + EOS, ["s" + EOS]),
        ("{% generation %}{{ output }}{% endgeneration %} end", ADD, "3 end" + EOS, ["3", EOS]),
        ("{% generation %}{{ output }}{% endgeneration %}<|end_of_text|>", ADD, "3" + EOS, ["3" + EOS]),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}.{% endgeneration %}{% else %}[{{ m.content }}]{% endif %}{% endfor %}",
            TWO, "[Hi]Hello.[And?]Bye." + EOS, ["Hello.", "Bye." + EOS],
        ),
    ],
)  # fmt: skip
def test_jinja_file_when_rendered_then_the_answer_or_its_blocks_are_trained(
    tmp_path: Path, source: str, columns: dict[str, Any], text: str, answers: list[str]
) -> None:
    (tmp_path / "p.jinja").write_text(source)
    rendered = render(columns, str(tmp_path / "p.jinja"))
    assert rendered.text == text
    assert trained(rendered) == answers


@pytest.mark.parametrize(
    ("source", "kind", "says"),
    [
        (
            "{{ question }}",
            DataError,
            "a.jsonl:7: --prompt_style=p.jinja: 'question' is undefined. The row has columns instruction, output",
        ),
        ("{% if input %}x", UsageError, "--prompt_style=p.jinja:1: not valid Jinja: "),
        ("{{ ''.__class__.__mro__ }}", DataError, "is unsafe"),
        ("{% if input %}{% generation %}x{% endgeneration %}{% endif %}", DataError, "no {% generation %} block was rendered"),
        ("{% generation %}{% generation %}x{% endgeneration %}{% endgeneration %}", DataError, "must not stand inside each other"),
    ],
)
def test_jinja_file_when_wrong_then_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, kind: type[Exception], says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.jinja").write_text(source)
    with pytest.raises(kind) as caught:
        render(ADD, "p.jinja")
    assert says in str(caught.value)


def test_jinja_file_when_it_has_no_markers_then_refuses_plain_text(tmp_path: Path) -> None:
    (tmp_path / "p.jinja").write_text("{{ text }}")
    with pytest.raises(DataError, match="a row of plain text has no answer to follow it"):
        render({"text": "long"}, str(tmp_path / "p.jinja"))


def test_jinja_file_when_missing_then_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match=r"--prompt_style=nowhere\.jinja is neither auto"):
        render(ADD, "nowhere.jinja")


def test_prompts_when_the_file_marks_its_answers_then_allow_unknown_columns(tmp_path: Path) -> None:
    (tmp_path / "p.jinja").write_text("{% generation %}{{ a }}{% endgeneration %}")
    (tmp_path / "q.jinja").write_text("{% macro m() %}{{ caller() }}{% endmacro %}{% call m() %}x{% endcall %}")
    allowed = [
        prompts.load(style, make_tokenizer()).allows_unknown for style in ("auto", str(tmp_path / "p.jinja"), str(tmp_path / "q.jinja"))
    ]
    assert allowed == [False, True, False]
