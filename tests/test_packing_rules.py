"""Whether rows are packed: what the plan allows, what it refuses, and what the rows' lengths then decide."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surefoot import plan_text
from surefoot.data import packing
from surefoot.data.masking import Encoded
from surefoot.data.pipeline import Data
from surefoot.data.report import DataReport, from_record
from surefoot.data.rows import Places, flat
from surefoot.errors import PlanError
from surefoot.plan import Plan
from surefoot.verdicts import Verdicts
from tests.conftest import machine
from tests.test_attention_rules import GPU, LLAMA, MISTRAL, WITH_FLASH, plan, reason, verdicts

PACKED = {"varlen__packed": ("pass", 1.0), "flash_attention_2__packed": ("pass", 1.0), "sdpa_math__packed": ("pass", 30.0),
          "sdpa_cudnn__packed": ("fail", 0.0), "eager__packed": ("pass", 20.0)}  # fmt: skip
RIGHT: Verdicts = verdicts(**PACKED)  # type: ignore[arg-type]
NO_VARLEN: Verdicts = verdicts(**{**PACKED, "varlen__packed": ("unavailable", 0.0)})  # type: ignore[arg-type]
WRONG_FLASH: Verdicts = verdicts(**{**PACKED, "flash_attention_2__packed": ("fail", 0.0)})  # type: ignore[arg-type]
RECURRENT = {**LLAMA, "layer_types": ["full_attention", "linear_attention"]}
CHUNKED = {**LLAMA, "layer_types": ["chunked_attention", "full_attention"]}
DROPPED_OUT = {**LLAMA, "attention_dropout": 0.1}


@pytest.mark.parametrize(
    ("found", "changes", "value", "inside", "why"),
    [
        (RIGHT, {}, "auto", "varlen", "on where the rows are short"),
        (RIGHT, {"on": WITH_FLASH}, "auto", "flash_attention_2", "on where the rows are short"),
        (RIGHT, {"stage": 1}, "off", "eager", "eager attention makes C x C scores"),
        (None, {"on": machine(), "attn_implementation": "sdpa"}, "off", "sdpa", "packed only on a GPU, unless --packing=True"),
        (None, {}, "off", "sdpa", "nothing has checked varlen on this machine"),
        (None, {"on": WITH_FLASH}, "off", "flash_attention_2", "nothing has checked flash_attention_2 on packed rows"),
        (NO_VARLEN, {}, "off", "sdpa", "varlen packed: torch has no such kernel"),
        (WRONG_FLASH, {"on": WITH_FLASH}, "off", "flash_attention_2", "flash_attention_2 packed: 45,056 non-finite"),
        (RIGHT, {"model": MISTRAL}, "off", "sdpa", "the model has sliding windows shorter than a row"),
        (RIGHT, {"model": MISTRAL, "cutoff_len": 128}, "auto", "varlen", "on where the rows are short"),
        (RIGHT, {"model": RECURRENT}, "off", "varlen", "linear_attention layers would carry one row into the next"),
        (RIGHT, {"model": DROPPED_OUT}, "off", "sdpa", "varlen has no attention dropout"),
        (RIGHT, {"disable_flash_sdpa": True}, "off", "sdpa", "varlen is a flash kernel"),
        (RIGHT, {"group_by_length": True}, "off", "varlen", "group_by_length was asked for"),
        (RIGHT, {"packing": False}, "off", "varlen", ""),
        (RIGHT, {"packing": "auto"}, "auto", "varlen", "on where the rows are short"),
    ],
)  # fmt: skip
def test_packing_when_left_to_the_plan_then_is_allowed_only_where_it_is_safe_and_says_why(
    found: Verdicts | None, changes: dict[str, Any], value: str, inside: str, why: str
) -> None:
    made = plan(found, **changes)
    assert made.train.packing == value
    assert made.train.packed_attention == inside
    assert why in reason(made, "packing")
    assert bool(reason(made, "packing")) is ("packing" not in changes or changes["packing"] == "auto")


@pytest.mark.parametrize(
    ("found", "changes", "inside"),
    [
        (RIGHT, {}, "varlen"), (RIGHT, {"stage": 1}, "eager"), (None, {"on": machine(), "stage": 1}, "eager"),
        (None, {"on": machine(), "attn_implementation": "sdpa"}, "sdpa"), (RIGHT, {"on": WITH_FLASH}, "flash_attention_2"),
        (RIGHT, {"model": MISTRAL}, "sdpa"), (NO_VARLEN, {}, "sdpa"),
    ],
)  # fmt: skip
def test_packing_when_asked_for_then_is_on_under_every_attention(found: Verdicts | None, changes: dict[str, Any], inside: str) -> None:
    made = plan(found, packing=True, **changes)
    assert made.train.packing == "on"
    assert made.train.packed_attention == inside


def test_packing_when_a_mask_must_keep_rows_apart_then_kernels_that_fail_under_one_are_off() -> None:
    made = plan(NO_VARLEN, packing=True)
    assert "with a mask of C x C for C slots: varlen packed: torch has no such kernel" in reason(made, "packed_attention")
    assert made.process.sdpa_kernels == ("flash", "efficient", "math")
    assert "cudnn off: disable_cudnn_sdpa" in reason(made, "sdpa_kernels")
    assert "canary: packed: 45,056 non-finite" in reason(made, "disable_cudnn_sdpa")
    assert plan(RIGHT, packing=True).process.sdpa_kernels[0] == "cudnn"
    assert plan(WRONG_FLASH, packing=True, on=WITH_FLASH).model.attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("flags", "model", "message"),
    [
        ({"packing": True, "group_by_length": True}, LLAMA, "--packing=True and --group_by_length=True exclude each other"),
        ({"packing": True}, RECURRENT, "the model's linear_attention layers would carry one row into the next. Use --packing=False"),
        ({"packing": True}, CHUNKED, "the model's chunked_attention layers"),
        ({"packing": False, "pack_len": 512}, LLAMA, "--pack_len=512 contradicts --packing=False"),
        ({"packing": True, "pack_len": 128}, LLAMA, "--pack_len=128 is shorter than a row may be (--cutoff_len=256)"),
        ({"pack_len": 128}, LLAMA, "Use --pack_len=256 or more"),
    ],
)
def test_packing_when_it_contradicts_then_is_refused_with_the_way_out(flags: dict[str, Any], model: Any, message: str) -> None:
    with pytest.raises(PlanError) as refused:
        plan(RIGHT, model=model, **flags)
    assert message in str(refused.value)


def test_packing_when_it_sets_flags_aside_then_says_so() -> None:
    made = plan(None, on=machine(), stage=1, packing=True, gradient_accumulation_steps=32)
    assert any(note.startswith("--gradient_accumulation_steps=32 gives way to packing") for note in made.notes)
    assert any("C x C scores a head" in note for note in made.notes)
    assert "packed_attention" in plan_text.table(made, all_rows=True)


def data_of(lengths: list[int]) -> Data:
    encoded = [Encoded(np.full(n, 7, dtype=np.int32), np.ones(n, dtype=bool), 0) for n in lengths]
    count = len(lengths)
    rows = flat(encoded, Places(("rows.jsonl",), np.zeros(count, dtype=np.int32), np.arange(count, dtype=np.int32)))
    report = DataReport(
        rows_read=count, train_rows=count, eval_rows=0, split="none", formats={"text": count}, styles={}, system="", dropped={}, truncated=0,
        cut_turns=0, unused_columns={}, tokens=sum(lengths), trained_tokens=sum(lengths), mean_length=float(np.mean(lengths)),
        p95_length=max(lengths), max_length=max(lengths), advice="", files=(), fingerprint="f" * 64, reasons={"shared": 0}, verdict="passed",
    )  # fmt: skip
    return Data(train=rows, eval=None, audit=None, report=report)  # type: ignore[arg-type]


def commonsense(rows: int = 20_000) -> list[int]:
    lengths = np.random.default_rng(0).lognormal(np.log(136), 0.33, rows * 2).round().astype(int)
    return [int(length) for length in lengths if 24 <= length <= 256][:rows]


def settled(lengths: list[int], *, world: int = 1, **flags: object) -> tuple[Plan, Data]:
    on = dataclasses.replace(GPU, world_size=world)
    return packing.settle(plan(RIGHT, on=on, **flags), data_of(lengths))


def test_rows_when_short_then_are_packed_and_the_report_says_into_what() -> None:
    made, data = settled(commonsense(), pack_len=8192)
    assert data.packed is not None
    count = len(data.packed)
    filled = sum(commonsense()) / (count * 8192)
    assert made.train.packing == "on"
    assert (made.train.pack_len, made.train.per_device_train_batch_size, made.train.gradient_accumulation_steps) == (8192, 1, 2)
    assert filled > 0.97
    line = data.report.lines()[-1]
    assert line.startswith(f"packing: 20,000 rows in {count:,} packed rows of 8,192 slots ({min(99.9, filled * 100):.1f} % filled, ")
    assert f"; a step holds {20_000 / count * 2:.0f} rows on average (batch_size=128), 2 passes" in line
    record = json.loads(json.dumps(data.report.as_record()))
    assert record["packing"]["packed_rows"] == count
    assert record["packing"]["slots"] == 8192
    assert from_record(record) == data.report


@pytest.mark.parametrize("per_device", [2, 4, 8, 64])
def test_rows_when_packed_then_a_step_keeps_the_batch_within_the_slots_declared(per_device: int) -> None:
    made, data = settled(commonsense(), per_device_train_batch_size=per_device)
    assert made.train.pack_len is not None
    assert made.train.pack_len <= per_device * 256
    assert data.report.packing is not None
    assert data.report.packing["rows_per_step"] == pytest.approx(128, rel=0.04)


def test_rows_when_processes_share_them_then_the_batch_is_over_all_of_them() -> None:
    _, data = settled(commonsense(), world=8, batch_size=128)
    assert data.packed is not None
    assert data.report.packing is not None
    assert len(data.packed) % 8 == 0
    assert data.report.packing["rows_per_step"] == pytest.approx(128, rel=0.05)
    assert data.report.packing["repeated"] == 0


def test_rows_when_long_against_the_cutoff_then_stay_apart_unless_asked() -> None:
    lengths = [200] * 50
    made, data = settled(lengths)
    assert data.packed is None
    assert (made.train.packing, made.train.per_device_train_batch_size) == ("off", 4)
    assert data.report.lines()[-1] == "packing: off, the mean row has 78% of cutoff_len=256 tokens, over 60%"
    asked, packed = settled(lengths, packing=True)
    assert packed.packed is not None
    assert asked.train.packing == "on"
    untouched, same = settled(lengths, packing=False)
    assert same.report.lines() == data_of(lengths).report.lines()
    assert untouched.train.packing == "off"


def test_fingerprint_when_other_rows_lie_together_then_is_another() -> None:
    """By which a resumed run finds that its packing is not that of its first half."""
    prints = {
        settled(commonsense(500), **flags)[1].report.fingerprint for flags in ({}, {"seed": 7}, {"pack_len": 2048}, {"packing": False})
    }
    assert len(prints) == 4
    assert settled(commonsense(500))[1].report.fingerprint in prints


def test_epoch_when_its_last_step_is_smaller_or_rows_come_twice_then_the_report_says_so() -> None:
    _, data = settled([100] * 25, packing=True, batch_size=8, pack_len=256)
    assert data.report.lines()[-1].endswith("3 passes; the last step of an epoch takes 1 packed rows in place of 3")
    _, single = settled([250] * 5, world=2, packing=True, batch_size=2, per_device_train_batch_size=1)
    assert "1 packed rows come twice in an epoch" in single.report.lines()[-1]


def test_dry_run_when_packing_is_asked_for_then_prints_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from finetune import train
    from tests.conftest import SMALL_MODEL, TRAIN_ROWS

    train(base_model=SMALL_MODEL, data_path=TRAIN_ROWS, output_dir=tmp_path / "run", packing=True, pack_len=512, dry_run=True)
    said = capfd.readouterr().out
    assert [line.split()[1] for line in said.splitlines() if line.startswith(("packing ", "pack_len ", "packed_attention "))] == [
        "on", "512", "eager",
    ]  # fmt: skip
