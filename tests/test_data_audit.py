"""The audit: every reason provoked on purpose, judged on what came out, and the limits that refuse a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from surefoot.data import masking
from surefoot.data.audit import EMPTY, REASONS, AuditError, write_audit
from surefoot.data.examine import end_tokens
from surefoot.data.masking import Encoded
from surefoot.data.prepare import Data, prepare
from tests.conftest import SMALL_MODEL
from tests.data_tokenizer import EOS, EOT, MARKED_CHAT, make_tokenizer
from tests.test_data_prepare import alpaca, plan, ready, texts, write

LONG = "the cat " * 300
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def met(data: Data) -> dict[str, int]:
    return {finding.reason: finding.rows for finding in data.audit.findings if finding.rows}


def columns(data: Data) -> dict[str, list[Any]]:
    record = json.loads(json.dumps(data.audit.as_record()))
    return dict(record["rows"])


@pytest.mark.parametrize(
    ("rows", "changes", "found", "first"),
    [
        (texts(9), {}, {}, 0),
        ([*texts(9), {"text": LONG}], {}, {"over_cutoff": 1, "answer_lost": 1}, 10),
        ([*texts(9), alpaca("one", LONG)], {}, {"over_cutoff": 1, "answer_lost": 1}, 10),
        ([*texts(9), alpaca("one", LONG)], {"overlong": "truncate_prompt"}, {"over_cutoff": 1}, 10),
        ([*texts(9), alpaca("one", LONG)], {"overlong": "truncate_prompt", "train_on_inputs": True}, {"over_cutoff": 1}, 10),
        ([*texts(9), alpaca(LONG)], {"overlong": "truncate_prompt"}, {"over_cutoff": 1, "answer_lost": 1}, 10),
        ([*texts(3), alpaca(" "), {"text": ""}, {"messages": []}], {}, {"empty": 3}, 4),
        ([*texts(3), *texts(2)], {}, {"duplicated": 2}, 4),
        ([alpaca("one"), alpaca("one") | {"task": "other"}], {}, {"duplicated": 1}, 2),
        ([{"text": "the cat sat"}, {"prompt": "the cat", "completion": " sat"}], {}, {}, 0),  # the same tokens under another mask
        ([*texts(4), CHAT], {}, {}, 0),
    ],
)
def test_rows_when_lost_or_sick_then_are_counted_by_reason(
    tmp_path: Path, rows: Sequence[Any], changes: dict[str, Any], found: dict[str, int], first: int
) -> None:
    data = ready(tmp_path, rows, **changes)
    assert met(data) == found
    assert data.report.reasons == {reason.name: found.get(reason.name, 0) for reason in REASONS}
    assert {data.audit.of(reason).first for reason in found} == ({f"{tmp_path}/rows.jsonl:{first}"} if found else set())


def test_validation_rows_when_also_trained_on_then_are_counted_and_repeats_among_them_are_not(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [*texts(2), {"text": "new"}, {"text": "new"}])
    data = ready(tmp_path, texts(30), val_data_path=(held,))
    assert met(data) == {"shared": 2}
    assert (data.audit.of("shared").of, data.audit.of("shared").first, data.audit.of("shared").exceeds) == (4, f"{held}:1", True)
    assert data.eval is not None
    assert [data.eval.where(index) for index in range(4)] == [f"{held}:{line}" for line in range(1, 5)]


def without_eos(encode: Any) -> Any:
    """An encoder that loses the last token of every second row, which is its EOS."""

    def broken(self: Any, batch: Any) -> list[Encoded]:
        rows = encode(self, batch)
        return [row if index % 2 else Encoded(row.ids[:-1], row.trained[:-1], row.lead) for index, row in enumerate(rows)]

    return broken


def with_eos_masked(encode: Any) -> Any:
    """An encoder that keeps every second row's EOS and does not train it."""

    def broken(self: Any, batch: Any) -> list[Encoded]:
        rows = encode(self, batch)
        for row in rows[::2]:
            row.trained[-1] = False
        return list(rows)

    return broken


def all_masked(encode: Any) -> Any:
    def broken(self: Any, batch: Any) -> list[Encoded]:
        return [
            row._replace(trained=np.zeros_like(row.trained)) if index % 2 == 0 else row for index, row in enumerate(encode(self, batch))
        ]

    return broken


@pytest.mark.parametrize(("harm", "reason"), [(without_eos, "no_end"), (with_eos_masked, "no_end"), (all_masked, "all_masked")])
@pytest.mark.parametrize("row", [{"text": "the cat"}, alpaca("one"), CHAT], ids=["text", "alpaca", "chat"])
def test_encoder_when_broken_then_the_audit_finds_it_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: Callable[[Any], Any], reason: str, row: dict[str, Any]
) -> None:
    monkeypatch.setattr(masking.Encoder, "encode", harm(masking.Encoder.encode))
    rows = [row | {"n": index} for index in range(10)]
    # Llama 3's <|eot_id|> still ends a conversation that loses the EOS behind it
    found = 0 if row is CHAT and reason == "no_end" else 5
    data = ready(tmp_path, rows)
    assert data.audit.of(reason).rows == found
    if found:
        with pytest.raises(AuditError, match=r"--audit=fail: the rows do not pass:\n  - 50.0 % \(5\) of 10 rows"):
            ready(tmp_path, rows, audit="fail")


def test_cut_when_it_takes_the_answer_then_the_audit_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def from_the_right(row: Encoded, cutoff_len: int) -> Encoded:
        return Encoded(row.ids[:cutoff_len], np.arange(len(row.ids))[:cutoff_len] >= cutoff_len - 2, row.lead)

    monkeypatch.setattr(masking, "cut_prompt", from_the_right)
    data = ready(tmp_path, [*texts(4), alpaca("the mat and the dog", LONG)], overlong="truncate_prompt")
    assert met(data) == {"over_cutoff": 1, "answer_lost": 1, "no_end": 1}


@pytest.mark.parametrize(
    ("template", "columns", "found"),
    [
        ("ask {{ a }}", {"instruction": "the cat", "output": "sat"}, 0),
        ("ask {% generation %}{{ a }}{% endgeneration %}", {}, 0),
        ("ask {% generation %}{{ a }}{% endgeneration %}<|end_of_text|>\n", {}, 0),
        ("ask {% generation %}{{ a }}<|eot_id|>{% endgeneration %}\n", {}, 0),
        ("ask {% generation %}{{ a }}{% endgeneration %}<|eot_id|>", {}, 10),  # answers, and never learns to write <|eot_id|>
        ("ask {% generation %}{{ a }}{% endgeneration %} end", {}, 10),
    ],
)
def test_jinja_prompt_when_it_leaves_the_answers_end_untrained_then_is_found(
    tmp_path: Path, template: str, columns: dict[str, str], found: int
) -> None:
    (tmp_path / "p.jinja").write_text(template)
    rows = [{"a": f"one {index}"} | columns for index in range(10)]
    data = ready(tmp_path, rows, prompt_style=str(tmp_path / "p.jinja"))
    assert data.audit.of("no_end").rows == found
    assert columns or data.audit.formats == ("columns",)


@pytest.mark.parametrize("named", [{}, {"eos_token": EOT}, {"chat_template": MARKED_CHAT}, {"chat_template": None}, {"pad_token": EOS}])
@pytest.mark.parametrize("trains_all", [False, True])
def test_ends_when_the_tokenizer_is_whole_then_none_is_missed(tmp_path: Path, named: dict[str, Any], trains_all: bool) -> None:
    rows = [*texts(3), alpaca("one\n"), {"prompt": "a", "completion": "b "}, *([CHAT] * (named.get("chat_template", "") is not None))]
    data = prepare(plan(write(tmp_path / "rows.jsonl", rows), train_on_inputs=trains_all), make_tokenizer(**named))
    assert met(data) == {}


def test_end_tokens_when_read_off_the_tokenizer_then_are_eos_and_the_templates_own() -> None:
    assert list(end_tokens(make_tokenizer()).values()) == [EOS, EOT]
    assert list(end_tokens(make_tokenizer(chat_template=None)).values()) == [EOS]
    assert list(end_tokens(make_tokenizer(chat_template="{{ raise_exception('no') }}")).values()) == [EOS]


def test_columns_when_recorded_then_tell_every_row(tmp_path: Path) -> None:
    rows = [alpaca("one"), alpaca("", "x"), CHAT, {"text": LONG}, alpaca("one"), alpaca("the mat", LONG)]
    data = ready(tmp_path, rows, overlong="truncate_prompt", cutoff_len=128)
    record, audit = columns(data), data.audit
    assert {len(column) for column in record.values()} == {6}
    assert record["line"] == [1, 2, 3, 4, 5, 6]
    assert [audit.files[code] for code in record["file"]] == [f"{tmp_path}/rows.jsonl"] * 6
    assert [audit.formats[code] for code in record["format"]] == ["alpaca", "alpaca", "messages", "text", "alpaca", "alpaca"]
    assert [audit.templates[code] for code in record["template"]] == ["alpaca", "", "chat", "text", "alpaca", "alpaca"]
    assert [audit.fates[code] for code in record["fate"]] == [
        "trained", "dropped: an empty answer", "trained", "dropped: an answer that does not fit into cutoff_len=128", "trained",
        "trained, prompt cut",
    ]  # fmt: skip
    lengths, trained = data.train.lengths, data.train.trained_tokens.tolist()
    assert [record["tokens"][index] for index in (0, 2, 4)] == lengths[:3]
    assert record["tokens"][1] == 0
    assert record["tokens"][5] > lengths[3] == 128
    assert record["trained"] == [trained[0], 0, trained[1], 0, trained[2], trained[3]]
    named = [{reason.name for bit, reason in enumerate(REASONS) if bits >> bit & 1} for bits in record["reasons"]]
    assert named == [set(), {"empty"}, set(), {"over_cutoff", "answer_lost"}, {"duplicated"}, {"over_cutoff"}]
    assert audit.tokens == sum(lengths)
    assert audit.trained_tokens == sum(trained)


def with_empty(count: int) -> list[dict[str, str]]:
    """100 rows, `count` of them empty."""
    return [*texts(100 - count), *(alpaca("", f"nothing {index} " + "\u202e" * 200) for index in range(count))]


def test_audit_when_at_its_limit_then_passes_and_one_row_more_is_refused(tmp_path: Path) -> None:
    limit = round(100 * EMPTY)
    assert ready(tmp_path, with_empty(limit), audit="fail").audit.of("empty").rows == limit
    with pytest.raises(AuditError) as caught:
        ready(tmp_path, with_empty(limit + 1), audit="fail")
    message, place = str(caught.value), f"{tmp_path}/rows.jsonl"
    assert caught.value.exit_code == 3
    lines = message.splitlines()
    assert lines[0] == "--audit=fail: the rows do not pass:"
    assert lines[1].startswith(f"  - {limit + 1}.0 % ({limit + 1}) of 100 rows hold no answer to train on; at most {limit} % may. Fill or ")
    assert [line.split("  ")[3] for line in lines[2:-1]] == [f"{place}:{line}" for line in range(90, 95)]
    assert "0 tokens" in lines[2]
    assert '{"instruction": "nothing 0 \\u202e' in lines[2]
    assert "\u202e" not in message
    assert lines[-1] == "Mend them, or go on as they are with --audit=warn"
    assert caught.value.audit.of("empty").exceeds


def test_audit_when_lowered_to_warn_then_says_the_same_in_the_report(tmp_path: Path) -> None:
    with pytest.raises(AuditError) as caught:
        ready(tmp_path, with_empty(50), audit="fail")
    lines = ready(tmp_path, with_empty(50), audit="warn").report.lines()
    assert lines[-1].splitlines()[1:] == str(caught.value).splitlines()[1:-1]
    assert lines[-1].startswith("--audit=warn: the rows do not pass:")
    assert "audit: not passed; 50.0 % (50) of the rows hold no answer to train on" in lines


def test_audit_when_too_many_answers_are_lost_then_names_the_cutoff_that_keeps_them(tmp_path: Path) -> None:
    rows = [*texts(70), *(alpaca("one", f"{index} " + "the cat " * 100) for index in range(30))]
    with pytest.raises(AuditError) as caught:
        ready(tmp_path, rows, audit="fail", cutoff_len=64)
    assert "30.0 % (30) of 100 rows lose their answer to cutoff_len=64; at most 25 % may. --cutoff_len=" in str(caught.value)
    assert ready(tmp_path, rows[:80], audit="fail", cutoff_len=64).report.verdict.startswith("passed; 12.5 % (10) of the rows have more")


def test_rows_when_every_one_is_masked_then_the_error_carries_the_audit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = masking.Encoder.encode
    monkeypatch.setattr(
        masking.Encoder, "encode", lambda self, batch: [row._replace(trained=row.trained & False) for row in encode(self, batch)]
    )
    with pytest.raises(AuditError, match=r"no row is left to train on\. Dropped of 3 rows: 3 with no token to train on") as caught:
        ready(tmp_path, texts(3))
    assert caught.value.audit.of("all_masked").rows == 3


def test_audit_when_written_then_is_one_json_file_of_plain_values(tmp_path: Path) -> None:
    data = ready(tmp_path, [*texts(5), alpaca("")])
    write_audit(data.audit, tmp_path)
    record = json.loads((tmp_path / "audit.json").read_text())
    assert record == json.loads(json.dumps(data.audit.as_record()))
    assert [finding["reason"] for finding in record["findings"]] == [reason.name for reason in REASONS]
    empty = record["findings"][4]
    assert (empty["rows"], empty["of"], empty["exceeds"], empty["share"]) == (1, 6, True, 0.166667)
    assert empty["worst"] == [
        {"source": 5, "where": f"{tmp_path}/rows.jsonl:6", "tokens": 0, "text": '{"instruction": "the cat", "output": ""}'}
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["audit.json", "rows.jsonl"]


def test_finetune_when_the_audit_refuses_then_exits_3_before_a_model_or_a_folder(
    tmp_path: Path, finetune: Callable[..., CompletedProcess[str]]
) -> None:
    path = write(tmp_path / "rows.jsonl", with_empty(20))
    done = finetune("--base_model", SMALL_MODEL, "--data_path", path, "--output_dir", tmp_path / "run", "--val_set_size", 0)
    assert done.returncode == 3
    assert "finetune.py: --audit=fail: the rows do not pass:\n  - 20.0 % (20) of 100 rows hold no answer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()
