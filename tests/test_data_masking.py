"""Which tokens are trained, read back as text; BOS and EOS; what is cut from long rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from surefoot.data import masking, prompts
from surefoot.data.formats import Example, normalise
from surefoot.data.loading import SourceRow
from surefoot.data.masking import Encoded, cut_prompt, is_trainable, make_encoder
from surefoot.data.prompts import Rendered
from surefoot.errors import DataError
from tests.data_tokenizer import BOS, EOS, MARKED_CHAT, make_tokenizer

TWO = {
    "messages": [
        {"role": role, "content": text}
        for role, text in [("user", "the cat"), ("assistant", "one"), ("user", "the dog"), ("assistant", "two")]
    ]
}


def encode(tokenizer: Any, columns: dict[str, Any], style: str = "auto") -> Encoded:
    example = normalise(SourceRow(columns, "a:1"), "text")
    assert isinstance(example, Example)
    rendered = prompts.load(style, tokenizer).render(example)
    assert isinstance(rendered, Rendered)
    return make_encoder(tokenizer).encode([rendered])[0]


def trained_runs(tokenizer: Any, row: Encoded) -> list[str]:
    """The trained tokens as text, one string for each unbroken run."""
    borders = np.flatnonzero(np.diff(np.concatenate([[0], row.trained.astype(int), [0]])))
    return [tokenizer.decode(row.ids[start:end]) for start, end in borders.reshape(-1, 2)]


@pytest.mark.parametrize("trims", [False, True], ids=["offsets", "trimmed offsets"])
@pytest.mark.parametrize(
    ("columns", "style", "runs"),
    [
        ({"instruction": "the cat", "output": "the mat"}, "alpaca", ["the mat" + EOS]),
        ({"instruction": "the cat", "output": "  the mat \n"}, "alpaca", ["  the mat \n" + EOS]),
        ({"prompt": "the cat", "completion": " sat on"}, "auto", [" sat on" + EOS]),
        ({"prompt": "the c", "completion": "at"}, "auto", [" cat" + EOS]),
        ({"prompt": "é 猫", "completion": "\U0001f408‍⬛ é"}, "auto", ["\U0001f408‍⬛ é" + EOS]),
        ({"text": "the cat sat"}, "auto", ["the cat sat" + EOS]),
        (TWO, "auto", ["one<|eot_id|>", "two<|eot_id|>" + EOS]),
    ],
)
def test_tokens_when_in_a_trained_span_then_are_exactly_the_answer(
    columns: dict[str, Any], style: str, runs: list[str], trims: bool
) -> None:
    tokenizer = make_tokenizer(trims=trims)
    assert trained_runs(tokenizer, encode(tokenizer, columns, style)) == runs


def test_conversation_when_the_template_marks_its_answers_then_trains_them_with_end_tokens() -> None:
    tokenizer = make_tokenizer(chat_template=MARKED_CHAT, eos_token="<|eot_id|>")
    assert trained_runs(tokenizer, encode(tokenizer, TWO)) == ["one<|eot_id|>", "two<|eot_id|>"]


def test_boundary_when_prompt_and_answer_share_a_token_then_it_is_trained_and_ids_are_those_of_the_whole_text() -> None:
    """The 16th space of the indented prompt and the answer's first word are one token, which the prompt alone does not have."""
    tokenizer = make_tokenizer()
    row = encode(tokenizer, {"instruction": "one", "output": "the cat"}, "alpaca_indented")
    text = tokenizer.decode(row.ids, skip_special_tokens=True)
    assert row.ids.tolist() == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    assert trained_runs(tokenizer, row) == [" the cat" + EOS]
    prompt = tokenizer(text.removesuffix("the cat"))["input_ids"]
    assert row.ids.tolist()[: len(prompt)] != prompt


def test_boundary_when_a_token_runs_out_of_the_answer_then_it_is_not_trained() -> None:
    tokenizer = make_tokenizer()
    assert len(tokenizer(" sat", add_special_tokens=False)["input_ids"]) == 1
    row = make_encoder(tokenizer).encode([Rendered("the cat sat", ((4, 9),), "x")])[0]
    assert trained_runs(tokenizer, row) == [" cat"]


@pytest.mark.parametrize(("adds", "starts"), [("bos", 1), ("bos eos", 1), ("eos", 0), ("", 0)])
@pytest.mark.parametrize("columns", [{"instruction": "the cat", "output": "one"}, {"text": "the cat"}])
def test_specials_when_the_tokenizers_rule_adds_them_then_are_neither_missing_nor_doubled(
    adds: str, starts: int, columns: dict[str, str]
) -> None:
    tokenizer = make_tokenizer(adds=adds)
    ids = encode(tokenizer, columns).ids.tolist()
    assert ids.count(tokenizer.bos_token_id) == starts
    assert ids[0] == tokenizer.bos_token_id or not starts
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("columns", [TWO, {"text": BOS + "the cat"}])
def test_bos_when_the_text_begins_with_it_then_stands_once(columns: dict[str, Any]) -> None:
    tokenizer = make_tokenizer()
    row = encode(tokenizer, columns)
    assert row.ids.tolist().count(tokenizer.bos_token_id) == 1
    assert row.lead == 1


def test_conversation_when_the_template_writes_no_bos_then_has_none() -> None:
    tokenizer = make_tokenizer(chat_template=MARKED_CHAT.replace("{{ bos_token }}", ""))
    ids = encode(tokenizer, TWO).ids.tolist()
    assert tokenizer.bos_token_id not in ids
    assert ids[:-1] == tokenizer.apply_chat_template(TWO["messages"])["input_ids"]


def test_row_when_encoded_then_equals_the_tokenizers_own_ids() -> None:
    tokenizer = make_tokenizer()
    assert encode(tokenizer, {"text": "the cat sat"}).ids.tolist() == tokenizer("the cat sat" + EOS)["input_ids"]


def test_tokenizer_when_slow_then_is_refused() -> None:
    class Slow:
        is_fast = False
        eos_token = EOS

    with pytest.raises(DataError, match=r"the tokenizer \(Slow\) gives no character offsets.*tokenizer.json"):
        make_encoder(Slow())


def test_tokenizer_when_its_eos_is_not_one_token_then_is_refused() -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.encode_special_tokens = True
    tokenizer.split_special_tokens = True
    with pytest.raises(DataError, match="does not read its EOS"):
        make_encoder(tokenizer)


def row(prompt: int, answer: int, lead: int) -> Encoded:
    """Ids 0, 1, 2 ...: `lead` of BOS, then the prompt, then the answer."""
    size = lead + prompt + answer
    return Encoded(np.arange(size, dtype=np.int32), np.arange(size) >= lead + prompt, lead)


@pytest.mark.parametrize(
    ("prompt", "answer", "lead", "cutoff", "ids"),
    [
        (6, 3, 1, 8, [0, 3, 4, 5, 6, 7, 8, 9]),
        (6, 3, 1, 4, [0, 7, 8, 9]),
        (6, 3, 1, 3, None),
        (6, 3, 0, 8, [1, 2, 3, 4, 5, 6, 7, 8]),
        (6, 3, 0, 4, [5, 6, 7, 8]),
        (6, 3, 0, 3, None),
        (0, 9, 1, 8, None),
    ],
)
def test_prompt_when_cut_then_loses_its_left_and_keeps_bos_and_answer(
    prompt: int, answer: int, lead: int, cutoff: int, ids: list[int] | None
) -> None:
    cut = cut_prompt(row(prompt, answer, lead), cutoff)
    if ids is None:
        assert cut is None
    else:
        assert cut is not None
        assert cut.ids.tolist() == ids
        assert cut.trained.tolist() == [False] * (cutoff - answer) + [True] * answer


def test_row_when_only_its_first_token_is_trained_then_is_not_trainable() -> None:
    assert not is_trainable(row(0, 1, 0))
    assert not is_trainable(row(3, 0, 1))
    assert is_trainable(row(0, 2, 0))


def test_small_model_when_its_tokenizer_encodes_then_answers_are_exact() -> None:
    from tests.conftest import SMALL_MODEL

    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    encoded = encode(tokenizer, {"instruction": "Which? answer1 answer2", "output": "the correct answer is answer1"}, "alpaca_indented")
    assert trained_runs(tokenizer, encoded) == [" the correct answer is answer1" + tokenizer.eos_token]
    assert masking.make_encoder(tokenizer).prefix == (tokenizer.bos_token_id,)
