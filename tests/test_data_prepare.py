"""From files to rows and report: the split, the cut-off, what is counted and what is said."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surefoot.data import progress
from surefoot.data.prepare import Data, prepare
from surefoot.data.report import percent
from surefoot.errors import DataError
from surefoot.plan import DataPlan
from tests.data_tokenizer import make_tokenizer

TOKENIZER = make_tokenizer()
WORDS = "one two three four five six seven".split()


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(count: int) -> list[dict[str, str]]:
    return [{"text": f"row {index} {WORDS[index % 7]}"} for index in range(count)]


def alpaca(output: str, instruction: str = "the cat") -> dict[str, str]:
    return {"instruction": instruction, "output": output}


def plan(*paths: str, **changes: Any) -> DataPlan:
    values: dict[str, Any] = {
        "data_path": paths, "data_split": "train", "val_data_path": None, "val_set_size": 0, "val_set_size_is_default": False,
        "cutoff_len": 256, "overlong": "drop", "prompt_style": "auto", "text_field": "text", "train_on_inputs": False, "seed": 42,
        "audit": "warn", "cache_dir": None,
    }  # fmt: skip
    return DataPlan(**{**values, **changes})


def ready(tmp_path: Path, rows: Sequence[Any], **changes: Any) -> Data:
    return prepare(plan(write(tmp_path / "rows.jsonl", rows), **changes), TOKENIZER)


def read_back(rows: Any) -> list[str]:
    return [TOKENIZER.decode(row["input_ids"], skip_special_tokens=True) for row in rows]


def test_rows_when_prepared_twice_then_are_identical(tmp_path: Path) -> None:
    first, second = (ready(tmp_path, texts(50), val_set_size=10) for _ in range(2))
    assert first.report == second.report
    assert read_back(first.train) == read_back(second.train)
    assert first.eval is not None
    assert second.eval is not None
    assert read_back(first.eval) == read_back(second.eval)


def test_formats_when_mixed_in_a_file_then_are_all_rendered_and_counted(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, {"role": "user", "content": "And?"}]}
    rows = [alpaca("one"), chat, {"prompt": "a", "completion": "b"}, {"text": "c", "task": "t"}, alpaca(""), alpaca(" "), {"messages": []}]
    data = ready(tmp_path, rows)
    report = data.report
    assert report.formats == {"alpaca": 1, "messages": 1, "prompt_completion": 1, "text": 1}
    assert report.styles == {"alpaca": 1, "chat": 1, "verbatim": 1, "text": 1}
    assert {reason: drop.rows for reason, drop in report.dropped.items()} == {"an empty answer": 2, "no assistant turn": 1}
    assert report.dropped["an empty answer"].first.endswith("rows.jsonl:5")
    assert (report.rows_read, report.train_rows, report.cut_turns, report.unused_columns) == (7, 4, 1, {"task": 1})
    assert report.trained_tokens == int(data.train.trained.sum())


def test_report_when_printed_or_stored_then_holds_the_facts(tmp_path: Path) -> None:
    data = ready(
        tmp_path,
        [alpaca("one") | {"task": "t"}, *(alpaca("two", f"the dog {index}") for index in range(7)), alpaca("six " * 300), alpaca("")],
    )
    lines = data.report.lines()
    size = data.train.lengths
    assert lines[0] == "data: 10 rows from 1 file (0.0 MB); format alpaca 9; prompt alpaca 9"
    assert lines[1] == "split: 8 rows to train on, 0 to evaluate (val_set_size=0)"
    assert lines[2].startswith(f"tokens: {sum(size):,}, {percent(int(data.train.trained.sum()), sum(size))} of them trained on; a row has ")
    assert lines[2].endswith(f"{max(size)} at most")
    assert lines[3].startswith(f"dropped: 10.0 % (1) of the rows: more tokens than cutoff_len=256, first {tmp_path}/rows.jsonl:9 (")
    assert "tokens); --cutoff_len=" in lines[3]
    assert lines[4] == f"dropped: 10.0 % (1) of the rows: an empty answer, first {tmp_path}/rows.jsonl:10"
    assert lines[5].startswith("audit: passed; 10.0 % (1) of the rows have more tokens than cutoff_len=256; 10.0 % (1) of the rows lose")
    assert lines[6] == "columns not used: task"
    record = json.loads(json.dumps(data.report.as_record()))
    assert record["dropped"]["an empty answer"] == {"rows": 1, "first": f"{tmp_path}/rows.jsonl:10"}
    assert record["files"][0]["bytes"] == (tmp_path / "rows.jsonl").stat().st_size
    assert len(record["files"][0]["sha256"]) == len(record["fingerprint"]) == 64


def test_fingerprint_when_the_rows_or_their_labels_change_then_changes_but_not_with_the_place(tmp_path: Path) -> None:
    base = ready(tmp_path, texts(20)).report.fingerprint
    assert prepare(plan(write(tmp_path / "moved.jsonl", texts(20))), TOKENIZER).report.fingerprint == base
    changed: list[dict[str, Any]] = [
        {"rows": texts(21)},
        {"rows": texts(20), "val_set_size": 2},
        {"rows": [alpaca(row["text"]) for row in texts(20)]},
    ]
    others = {ready(tmp_path, **change).report.fingerprint for change in changed}
    assert len(others | {base}) == 4


def test_cutoff_advice_when_printed_then_keeps_what_it_says(tmp_path: Path) -> None:
    rows = [alpaca("one ", f"the dog {index} " + "the cat " * (index * 2)) for index in range(100)]
    report = ready(tmp_path, rows, cutoff_len=128).report
    flag, _, kept = report.advice.partition(" keeps ")
    again = ready(tmp_path, rows, cutoff_len=int(flag.removeprefix("--cutoff_len="))).report
    assert int(flag.removeprefix("--cutoff_len=")) % 32 == 0
    assert percent(again.train_rows, 100) == kept
    assert again.train_rows >= 99


LONG = [alpaca("one"), alpaca("the mat", "the cat " * 300), alpaca("two " * 300)]


@pytest.mark.parametrize(
    ("overlong", "kept", "truncated", "dropped"),
    [
        ("drop", 1, 0, {"more tokens than cutoff_len=128": 2}),
        ("truncate_prompt", 2, 1, {"an answer that does not fit into cutoff_len=128": 1}),
    ],
)
def test_overlong_rows_when_dropped_or_cut_then_are_counted_and_answers_stay_whole(
    tmp_path: Path, overlong: str, kept: int, truncated: int, dropped: dict[str, int]
) -> None:
    data = ready(tmp_path, LONG, overlong=overlong, cutoff_len=128)
    assert (len(data.train), data.report.truncated) == (kept, truncated)
    assert {reason: drop.rows for reason, drop in data.report.dropped.items()} == dropped
    answers = [TOKENIZER.decode([label for label in row["labels"] if label != -100]) for row in data.train]
    assert answers == ["one<|end_of_text|>", "the mat<|end_of_text|>"][:kept]
    if truncated:
        assert len(data.train[1]["input_ids"]) == 128
        assert data.train[1]["input_ids"][0] == TOKENIZER.bos_token_id
        assert any(
            line.startswith("cut: the prompts of 33.3 % (1) of the rows, from the left; answers are whole") for line in data.report.lines()
        )


def test_overlong_rows_when_an_error_then_names_row_tokens_cutoff_and_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        ready(tmp_path, LONG, overlong="error", cutoff_len=128)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/rows.jsonl:2 (")
    assert "tokens): over --cutoff_len=128, and --overlong=error. 2 of 3 rows are; the longest has" in message
    assert "--cutoff_len=" in message.partition("the longest")[2]
    assert "--overlong=drop or truncate_prompt goes on without" in message
    assert caught.value.exit_code == 3


def test_train_on_inputs_when_on_then_every_token_is_trained_and_prompts_are_still_cut(tmp_path: Path) -> None:
    data = ready(tmp_path, LONG, overlong="truncate_prompt", cutoff_len=128, train_on_inputs=True)
    assert data.train.trained.all()
    assert len(data.train) == 2


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([alpaca("")], "no row is left in {path}. Dropped of 1 rows: 1 with an empty answer (first {path}:1)"),
        ([alpaca("two " * 300)], "no row is left to train on. Dropped of 1 rows: 1 with more tokens than cutoff_len=256 (first {path}:1 ("),
        ([alpaca("two " * 300)], "--cutoff_len="),
        ([{"messages": [{"role": "user", "content": "hi"}]}], "1 with no assistant turn (first {path}:1)"),
    ],
)
def test_data_when_no_row_is_left_then_is_refused_with_reasons(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(DataError) as caught:
        ready(tmp_path, rows)
    assert says.format(path=tmp_path / "rows.jsonl") in str(caught.value)


def test_row_when_a_jinja_file_renders_no_answer_then_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "p.jinja").write_text("the cat{% generation %}{{ a }}{% endgeneration %} end<|end_of_text|>")
    data = ready(tmp_path, [{"a": ""}, {"a": " sat"}], prompt_style=str(tmp_path / "p.jinja"))
    assert (len(data.train), data.report.formats) == (1, {"columns": 2})
    assert data.report.dropped["an empty answer"].rows == 1
    assert data.report.unused_columns == {}


def test_jinja_style_when_rows_have_unknown_columns_then_needs_markers(tmp_path: Path) -> None:
    (tmp_path / "p.jinja").write_text("{{ question }}")
    with pytest.raises(DataError, match="columns question, answer"):
        ready(tmp_path, [{"question": "a", "answer": "b"}], prompt_style=str(tmp_path / "p.jinja"))


def test_progress_when_long_and_no_terminal_then_prints_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", -1.0)
    assert [list(batch) for batch in progress.batches(range(5), 2, shows_progress=True)] == [[0, 1], [2, 3], [4]]
    assert capsys.readouterr().out.splitlines() == [f"tokenised {done} of 5 rows" for done in (2, 4, 5)]
    list(progress.batches(range(5), 2, shows_progress=False))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("part", "whole", "text"), [(0, 9, "0 %"), (9, 9, "100 %"), (20366, 147580, "13.8 %"), (28, 52002, "0.05 %"), (1, 10**6, "0.01 %"), (9999, 10000, "99.9 %")])  # fmt: skip
def test_percent_when_nearly_all_or_none_then_does_not_say_all_or_none(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


def test_commonsense_sample_when_shipped_then_every_answer_is_trained() -> None:
    from tests.conftest import TRAIN_ROWS

    data = prepare(dataclasses.replace(plan(str(TRAIN_ROWS)), cutoff_len=4096), TOKENIZER)
    answers = [json.loads(line)["output"] for line in TRAIN_ROWS.read_text().splitlines()]
    trained = [TOKENIZER.decode([label for label in row["labels"] if label != -100]) for row in data.train]
    assert trained == [answer + TOKENIZER.eos_token for answer in answers]
    assert np.array_equal(np.diff(data.train.offsets), data.train.lengths)
