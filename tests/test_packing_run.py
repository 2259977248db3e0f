"""Packed training through finetune.py: the losses of the rows apart, on one process and two, resumed to the bit, bad steps named by row."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from finetune import train
from surefoot.errors import DataError
from tests.conftest import ROOT
from tests.runs import NanGradient, logs, quick, tensors, words

EPOCH_A_STEP: dict[str, Any] = {"batch_size": 32, "max_steps": 3, "eval_strategy": "epoch", "save_strategy": "no", "lr_scheduler_type": "constant",
                                "warmup_steps": "none", "learning_rate": 5e-3}  # fmt: skip


@pytest.fixture(scope="module")
def few(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """32 rows to train on, all of them a step, so that packed and separate steps hold the same; and 8 to evaluate on."""
    lines, folder = rows.read_text().splitlines(), tmp_path_factory.mktemp("few")
    (folder / "train.jsonl").write_text("\n".join(lines[:32]) + "\n")
    (folder / "eval.jsonl").write_text("\n".join(lines[32:40]) + "\n")
    return {"data_path": folder / "train.jsonl", "val_data_path": folder / "eval.jsonl"}


def of_an_epoch(few: dict[str, Path], **more: Any) -> dict[str, Any]:
    flags = quick(**few, **EPOCH_A_STEP, **more)
    return {name: value for name, value in flags.items() if name != "val_set_size"}


@pytest.fixture(scope="module")
def apart(few: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(train(output_dir=tmp_path_factory.mktemp("apart") / "run", packing=False, **of_an_epoch(few)))


@pytest.mark.parametrize("more", [{"attn_implementation": "eager"}, {"attn_implementation": "sdpa", "use_gradient_checkpointing": True}])
def test_run_when_packed_then_has_the_losses_of_the_rows_apart(
    few: dict[str, Path], apart: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], more: dict[str, Any]
) -> None:
    folder = train(output_dir=tmp_path / "run", packing=True, pack_len=1024, **of_an_epoch(few, **more))
    said = capfd.readouterr().out
    record = json.loads((folder / "run.json").read_text())
    made = record["data"]["packing"]
    assert made["packed_rows"] == made["passes"] == record["plan"]["train"]["gradient_accumulation_steps"] > 1
    assert record["plan"]["train"]["per_device_train_batch_size"] == 1
    assert record["plan"]["train"]["pack_len"] == made["slots"] == 1024
    assert f"packing: 32 rows in {made['packed_rows']} packed rows of 1,024 slots" in said
    assert "a step holds 32 rows on average (batch_size=32)" in said
    assert record["summary"]["packing"] == made | {"leak": 0.0}
    assert record["summary"]["tokens"] == 3 * record["data"]["tokens"]  # padding is not counted
    assert logs(folder, "loss") == pytest.approx(logs(apart, "loss"), rel=1e-5)
    assert logs(folder, "grad_norm") == pytest.approx(logs(apart, "grad_norm"), rel=1e-4)
    assert logs(folder, "eval_loss") == pytest.approx(logs(apart, "eval_loss"), rel=1e-4)
    assert logs(apart, "loss")[-1] < logs(apart, "loss")[0] - 1


def test_two_processes_when_rows_are_packed_then_match_the_rows_apart(few: dict[str, Path], apart: Path, tmp_path: Path) -> None:
    flags = words(of_an_epoch(few, output_dir=tmp_path / "ddp", packing=True, pack_len=2048, attn_implementation="sdpa"))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ROOT / "profiles/cpu_2proc.yaml")]
    command = [*launch, "--main_process_port=29561", str(ROOT / "finetune.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    made = json.loads((tmp_path / "ddp/run.json").read_text())["data"]["packing"]
    assert (made["packed_rows"], made["passes"], made["processes"]) == (2, 1, 2)
    assert logs(tmp_path / "ddp", "loss") == pytest.approx(logs(apart, "loss"), rel=1e-4)


def test_run_when_killed_after_a_checkpoint_then_resumes_to_the_same_adapter_and_refuses_another_packing(
    rows: Path, tmp_path: Path
) -> None:
    flags = quick(data_path=rows, packing=True, pack_len=256, max_steps=12, save_step=4, eval_strategy="no", lora_dropout=0.1)
    whole = train(output_dir=tmp_path / "whole", **flags)
    command = [sys.executable, str(ROOT / "finetune.py"), *words({**flags, "output_dir": tmp_path / "run"})]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    state = tmp_path / "run/checkpoint-4/trainer_state.json"
    began = time.monotonic()
    while not (state.is_file() and state.read_text().endswith("}\n")):
        assert running.poll() is None
        assert time.monotonic() - began < 240
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["status"] == "running"
    with pytest.raises(DataError, match="the training rows are not those this run began with"):
        train(output_dir=tmp_path / "run", resume=True, **{**flags, "pack_len": 320})
    resumed = train(output_dir=tmp_path / "run", resume=True, **flags)
    assert json.loads((resumed / "run.json").read_text())["data"]["packing"]["packed_rows"] > 12  # of an epoch that the run ends in
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(resumed).items())
    assert logs(resumed, "loss")[-8:] == logs(whole, "loss")[-8:]


@pytest.fixture
def sick_sdpa() -> Iterator[None]:
    """transformers' sdpa attention with NaN gradients for the second packed row that is trained on."""
    real, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], list[list[int]]()

    def sick(module: Any, query: torch.Tensor, *rest: Any, **named: Any) -> Any:
        borders = named["cu_seq_lens_q"].tolist() if "cu_seq_lens_q" in named else []
        if query.requires_grad and borders and borders not in seen:
            seen.append(borders)
        return real(module, NanGradient.apply(query) if borders in seen[1:2] else query, *rest, **named)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = sick
    yield
    ALL_ATTENTION_FUNCTIONS["sdpa"] = real


def test_bad_step_when_rows_are_packed_then_is_kept_with_its_rows_and_replayed_under_every_backend(
    sick_sdpa: None, rows: Path, tmp_path: Path
) -> None:
    flags = quick(data_path=rows, packing=True, pack_len=512, attn_implementation="sdpa", val_set_size=0, eval_strategy="no", max_steps=3)
    folder = train(output_dir=tmp_path / "run", **flags)
    record = json.loads((folder / "run.json").read_text())
    assert record["summary"]["bad_steps"] == [2]
    kept = json.loads((folder / "bad_steps/step-2/record.json").read_text())
    assert kept["culprit"]["phase"] == "backward"
    guilty = kept["ranks"][0]["rows"]
    assert len(guilty) == len(set(guilty)) > 3
    assert all(row.startswith(f"{rows}:") for row in guilty)
    import scripts.replay_batch as replay_batch

    results = {result.backend: result for result in replay_batch.run(replay_batch.read(folder / "bad_steps/step-2"), "")}
    assert results["eager"].state == "finite"
    assert results["sdpa_math"].state == "not finite"
    assert results["varlen"].state == "unavailable"  # without a GPU
    assert results["eager"].loss == pytest.approx(results["sdpa_math"].loss, rel=1e-4)
