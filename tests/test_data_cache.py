"""The cache of tokenised rows: what it gives back, what its key holds, and what it does when it is damaged, shared or not to be had."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import surefoot
from surefoot.data import cache, pipeline, report
from surefoot.data.audit import AuditError
from surefoot.data.prepare import Data, prepare
from surefoot.plan import DataPlan
from tests.conftest import ROOT
from tests.data_tokenizer import EOS, MARKED_CHAT, make_tokenizer
from tests.test_data_prepare import TOKENIZER, alpaca, plan, texts, write

ROWS = [*texts(40), alpaca("one"), alpaca("one"), alpaca("")]


@pytest.fixture
def rows_plan(tmp_path: Path) -> DataPlan:
    return plan(write(tmp_path / "rows.jsonl", ROWS), cache_dir=str(tmp_path / "cache"), val_set_size=5)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one each time rows are made and not read."""
    calls: list[int] = []
    make = pipeline.make

    def counting(*values: Any, **named: Any) -> Data:
        calls.append(1)
        return make(*values, **named)

    monkeypatch.setattr(pipeline, "make", counting)
    return calls


def entries(plan: DataPlan) -> list[Path]:
    return [entry for entry in (Path(str(plan.cache_dir)) / "rows").iterdir() if entry.is_dir()]


def same(one: Data, other: Data) -> bool:
    """Equal in everything but where they came from."""
    assert one.eval is not None
    assert other.eval is not None
    arrays = [
        (getattr(left, name), getattr(right, name))
        for left, right in ((one.train, other.train), (one.eval, other.eval))
        for name in ("offsets", "ids", "trained")
    ]
    places = [[side.where(index) for index in range(len(side))] for data in (one, other) for side in (data.train, data.eval) if side]
    reports = [dataclasses.replace(data.report, from_cache=False, notes=()) for data in (one, other)]
    return (
        all(np.array_equal(left, right) and left.dtype == right.dtype for left, right in arrays)
        and places[:2] == places[2:]
        and reports[0] == reports[1]
        and one.audit.as_record() == other.audit.as_record()
        and one.audit.findings == other.audit.findings
    )


def test_rows_when_prepared_again_then_are_read_and_equal(rows_plan: DataPlan, made: list[int]) -> None:
    first, second = prepare(rows_plan, TOKENIZER), prepare(rows_plan, TOKENIZER)
    assert len(made) == 1
    assert same(first, second)
    assert (first.report.from_cache, second.report.from_cache) == (False, True)
    assert second.report.lines()[0] == first.report.lines()[0] + " (from the cache)"
    assert second.report.lines()[1:] == first.report.lines()[1:]
    assert json.loads(json.dumps(second.report.as_record()))["from_cache"] is True


def test_rows_when_none_is_held_out_then_come_back_without_eval(rows_plan: DataPlan, made: list[int]) -> None:
    whole = dataclasses.replace(rows_plan, val_set_size=0)
    assert [prepare(whole, TOKENIZER).eval for _ in range(2)] == [None, None]
    assert len(made) == 1


def test_cache_when_off_then_nothing_is_kept(rows_plan: DataPlan, made: list[int], tmp_path: Path) -> None:
    for _ in range(2):
        prepare(dataclasses.replace(rows_plan, cache_dir=None), TOKENIZER)
    assert len(made) == 2
    assert not (tmp_path / "cache").exists()


CHANGES: dict[str, Any] = {
    "data_split": "test", "val_set_size": 6, "val_set_size_is_default": True, "cutoff_len": 128, "overlong": "truncate_prompt",
    "prompt_style": "alpaca_indented", "text_field": "instruction", "train_on_inputs": True, "seed": 1,
}  # fmt: skip


def key(plan: DataPlan, tokenizer: Any = TOKENIZER) -> str | None:
    return cache.key(plan, tokenizer, report.source_files((*plan.data_path, *(plan.val_data_path or ()))))


def test_key_when_any_setting_of_the_rows_changes_then_changes(rows_plan: DataPlan, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", ROWS)
    changed = {name: key(dataclasses.replace(rows_plan, **{name: value})) for name, value in CHANGES.items()}
    changed |= {name: key(dataclasses.replace(rows_plan, **{name: (other,)})) for name in ("data_path", "val_data_path")}
    assert changed.keys() == {field.name for field in dataclasses.fields(DataPlan)} - {"audit", "cache_dir"}
    assert len({key(rows_plan), *changed.values()}) == len(changed) + 1
    assert key(rows_plan) == key(dataclasses.replace(rows_plan, audit="fail", cache_dir="/elsewhere"))


def test_key_when_the_files_content_changes_then_changes(rows_plan: DataPlan, tmp_path: Path) -> None:
    prompt = tmp_path / "p.jinja"
    with_prompt = dataclasses.replace(rows_plan, prompt_style=str(prompt))
    prompt.write_text("a {{ instruction }}")
    before = key(rows_plan), key(with_prompt)
    prompt.write_text("b {{ instruction }}")
    write(tmp_path / "rows.jsonl", ROWS[:-1])
    assert before[0] != key(rows_plan)
    assert len({*before, key(with_prompt)}) == 3


@pytest.mark.parametrize(
    "named",
    [
        {"adds": ""},
        {"adds": "bos eos"},
        {"chat_template": MARKED_CHAT},
        {"chat_template": None},
        {"eos_token": "<|eot_id|>"},
        {"trims": True},
    ],
)
def test_key_when_the_tokenizer_changes_then_changes(rows_plan: DataPlan, named: dict[str, Any]) -> None:
    assert key(rows_plan, make_tokenizer(**named)) != key(rows_plan, make_tokenizer())


def test_key_when_the_vocabulary_grows_then_changes(rows_plan: DataPlan) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["commonsense"])
    assert key(rows_plan, tokenizer) != key(rows_plan)


def test_key_when_only_truncation_or_padding_was_used_then_stays(rows_plan: DataPlan) -> None:
    tokenizer = make_tokenizer(pad_token=EOS)
    before = key(rows_plan, tokenizer)
    tokenizer("the cat", truncation=True, max_length=2, padding="max_length")
    assert tokenizer.backend_tokenizer.truncation is not None
    assert key(rows_plan, tokenizer) == before


@pytest.mark.parametrize(("module", "name", "value"), [(cache, "VERSION", 0), (surefoot, "__version__", "0.0.0")])
def test_key_when_the_program_changes_then_changes(
    rows_plan: DataPlan, monkeypatch: pytest.MonkeyPatch, module: Any, name: str, value: Any
) -> None:
    before = key(rows_plan)
    monkeypatch.setattr(module, name, value)
    assert key(rows_plan) != before


def test_hub_data_set_when_used_then_is_not_kept(rows_plan: DataPlan) -> None:
    assert key(dataclasses.replace(rows_plan, data_path=("yahma/alpaca-cleaned",))) is None


def flip(entry: Path) -> None:
    raw = bytearray((entry / cache.ARRAYS).read_bytes())
    raw[-100] ^= 1
    (entry / cache.ARRAYS).write_bytes(raw)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a flipped bit": (flip, "arrays.safetensors: not the bytes that were written"),
    "a short file": (lambda entry: os.truncate(entry / cache.ARRAYS, 50), "arrays.safetensors: not the bytes that were written"),
    "other records": (lambda entry: (entry / cache.RECORDS).write_text("{}"), "records.json: not the bytes that were written"),
    "no arrays": (lambda entry: (entry / cache.ARRAYS).unlink(), "No such file"),
    "no sums": (lambda entry: (entry / cache.SUMS).unlink(), "No such file"),
    "empty sums": (lambda entry: (entry / cache.SUMS).write_text(""), "Expecting value"),
    "a list of sums": (lambda entry: (entry / cache.SUMS).write_text("[]"), "arrays.safetensors and records.json: not the bytes"),
    "bytes": (lambda entry: (entry / cache.SUMS).write_bytes(b"\xff\xfe\x00"), "can't decode"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_entry_when_damaged_then_is_named_and_made_again(rows_plan: DataPlan, made: list[int], damage: str) -> None:
    harm, says = DAMAGES[damage]
    first = prepare(rows_plan, TOKENIZER)
    (entry,) = entries(rows_plan)
    harm(entry)
    again, third = prepare(rows_plan, TOKENIZER), prepare(rows_plan, TOKENIZER)
    assert same(first, again)
    (note,) = again.report.notes
    assert note.startswith(f"cache: {entry} is damaged (")
    assert note.endswith("), made again")
    assert says in note
    assert again.report.lines()[-1] == note
    assert third.report.from_cache
    assert third.report.notes == ()
    assert len(made) == 2
    assert entries(rows_plan) == [entry]


def test_folder_when_it_cannot_be_written_then_one_line_says_so_and_the_rows_are_there(rows_plan: DataPlan, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    data = prepare(dataclasses.replace(rows_plan, cache_dir=str(tmp_path / "file" / "cache")), TOKENIZER)
    (note,) = data.report.notes
    assert note.startswith(f"cache: the rows are not kept, for {tmp_path}/file/cache/rows cannot be written: ")
    assert same(data, prepare(rows_plan, TOKENIZER))


def test_entry_when_the_disk_is_full_then_one_line_says_so_and_nothing_is_left(
    rows_plan: DataPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, raw: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    data = prepare(rows_plan, TOKENIZER)
    assert data.report.notes == ("cache: the rows are not kept: [Errno 28] No space left on device",)
    assert entries(rows_plan) == []


def test_audit_when_it_refuses_kept_rows_then_is_judged_anew_by_each_run(rows_plan: DataPlan, made: list[int], tmp_path: Path) -> None:
    sick = dataclasses.replace(rows_plan, data_path=(write(tmp_path / "sick.jsonl", [*texts(9), *[alpaca("")] * 9]),))
    messages = []
    for _ in range(2):
        with pytest.raises(AuditError) as caught:
            prepare(dataclasses.replace(sick, audit="fail"), TOKENIZER)
        messages.append(str(caught.value))
        assert caught.value.audit.of("empty").rows == 9
    assert messages[0] == messages[1]
    assert prepare(sick, TOKENIZER).report.lines()[-1].startswith("--audit=warn: the rows do not pass")
    assert len(made) == 1


def test_entries_when_many_then_the_ones_used_last_stay(rows_plan: DataPlan, monkeypatch: pytest.MonkeyPatch, made: list[int]) -> None:
    monkeypatch.setattr(cache, "KEPT", 3)
    plans = [dataclasses.replace(rows_plan, seed=seed) for seed in range(5)]
    for age, each in enumerate(plans[:3]):
        prepare(each, TOKENIZER)
        os.utime(Path(str(each.cache_dir)) / "rows" / str(key(each)), (1000 + age, 1000 + age))
    prepare(plans[0], TOKENIZER)  # used again
    prepare(plans[3], TOKENIZER)
    assert {entry.name for entry in entries(rows_plan)} == {key(plans[index]) for index in (0, 2, 3)}
    assert len(made) == 4
    left = {path.stem for path in (Path(str(rows_plan.cache_dir)) / "rows").glob("*.lock")}
    assert key(plans[1]) not in left


def test_entry_when_its_writer_was_killed_then_what_it_left_is_neither_read_nor_kept(rows_plan: DataPlan, made: list[int]) -> None:
    folder = Path(str(rows_plan.cache_dir)) / "rows"
    left = folder / f".{key(rows_plan)}.999"
    left.mkdir(parents=True)
    (left / cache.ARRAYS).write_bytes(b"half")
    assert not prepare(rows_plan, TOKENIZER).report.from_cache
    assert prepare(rows_plan, TOKENIZER).report.from_cache
    assert not left.exists()


RANK = """
import sys, time
from surefoot.data import pipeline, progress
from surefoot.data.prepare import prepare
from tests.data_tokenizer import make_tokenizer
from tests.test_data_prepare import plan
progress.PATIENCE_S = 0.5
make = pipeline.make
def slowly(*values, **named):
    print("makes", flush=True)
    time.sleep(2)
    return make(*values, **named)
pipeline.make = slowly
data = prepare(plan(sys.argv[1], cache_dir=sys.argv[2], val_set_size=5), make_tokenizer(), shows_progress=True)
print(data.report.fingerprint, data.report.from_cache)
"""


def test_processes_when_they_start_together_then_one_makes_and_the_other_reads(rows_plan: DataPlan, tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, rows_plan.data_path[0], str(rows_plan.cache_dir)]
    ranks = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [rank.communicate(timeout=200)[0].split() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert sorted(words.count("makes") for words in said) == [0, 1]
    assert sorted("waiting" in words for words in said) == [False, True]
    assert sorted(words[-1] for words in said) == ["False", "True"]
    assert said[0][-2] == said[1][-2] == prepare(rows_plan, TOKENIZER).report.fingerprint
