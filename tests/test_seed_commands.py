"""The commands of the BF16 migration guide, word for word, with the small model and small data in place of Llama and commonsense_170k."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL_MODEL, TRAIN_ROWS

BEFORE = """python finetune.py
    --base_model="meta-llama/Llama-3.1-8B"
    --adapter_name="dora"
    --lora_r=32
    --lora_alpha=64
    --bf16=True"""
AFTER = (
    BEFORE
    + """
    --attn_implementation="eager"
    --disable_cudnn_sdpa=True
    --enable_torch_compile=False"""
)
SINGLE_GPU = """python finetune.py
    --base_model="meta-llama/Llama-3.1-8B"
    --data_path="./commonsense_170k.json"
    --adapter_name="dora"
    --target_modules q_proj k_proj v_proj o_proj up_proj down_proj gate_proj
    --lora_r=32
    --lora_alpha=64
    --batch_size=128
    --per_device_train_batch_size=2
    --bf16=True"""
ACCELERATE = SINGLE_GPU.replace("python finetune.py", "accelerate launch --config_file accelerate_config.yaml finetune.py")
SHELL_SCRIPT = """accelerate launch finetune.py
    --base_model "meta-llama/Llama-3.1-8B"
    --data_path "./commonsense_170k.json"
    --output_dir "./output"
    --adapter_name "dora"
    --lora_r 32
    --lora_alpha 64
    --target_modules q_proj k_proj v_proj o_proj up_proj down_proj gate_proj
    --batch_size 128
    --per_device_train_batch_size 2
    --num_epochs 3
    --learning_rate 3e-5
    --bf16 True
    --attn_implementation "eager"
    --disable_cudnn_sdpa True
    --enable_torch_compile False
    --seed 42"""
DIAGNOSTIC = """python finetune.py
    --base_model="meta-llama/Llama-3.1-8B"
    --data_path="./commonsense_170k.json"
    --adapter_name="dora"
    --num_epochs=1
    --batch_size=16
    --per_device_train_batch_size=2
    --eval_step=10
    --save_step=999999
    --bf16=True"""
OPTIMISED = (
    SINGLE_GPU
    + """
    --attn_implementation="flash_attention_2"
    --disable_cudnn_sdpa=False
    --enable_torch_compile=True"""
)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder as the guide's reader has it: finetune.py, the data file, an accelerate configuration."""
    (tmp_path / "finetune.py").symlink_to(ROOT / "finetune.py")
    (tmp_path / "accelerate_config.yaml").symlink_to(ROOT / "profiles/cpu_2proc.yaml")
    rows = [json.loads(line) for line in sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:48]]
    (tmp_path / "commonsense_170k.json").write_text(json.dumps(rows))
    return tmp_path


def run(command: str, place: Path, extra: str = "") -> subprocess.CompletedProcess[str]:
    """The command by a shell, in `place`, with the model replaced; 48 rows make one step an epoch, so warm-up is switched off."""
    line = command.replace("meta-llama/Llama-3.1-8B", str(SMALL_MODEL)).replace("\n", " ") + " " + extra
    line = line.replace("python finetune.py", f"{sys.executable} finetune.py").replace(
        "accelerate launch", f"{sys.executable} -m accelerate.commands.launch --main_process_port 29541"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(["sh", "-c", line], cwd=place, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.parametrize("command", [BEFORE, AFTER], ids=["before", "after"])
def test_quick_start_when_only_planned_then_shows_the_safe_defaults(place: Path, command: str) -> None:
    done = run(command, place, "--dry_run")
    rows = {line.split()[0]: line.split()[1] for line in done.stdout.splitlines() if len(line.split()) > 2}
    assert done.returncode == 0, done.stderr
    assert (rows["attn_implementation"], rows["disable_cudnn_sdpa"], rows["enable_torch_compile"]) == ("eager", "True", "False")


@pytest.mark.slow
@pytest.mark.parametrize("command", [SINGLE_GPU, ACCELERATE, SHELL_SCRIPT], ids=["single", "accelerate", "shell"])
def test_training_command_when_run_literally_then_trains(place: Path, command: str) -> None:
    done = run(command, place, "--warmup_steps=0")
    assert done.returncode == 0, done.stderr
    record = json.loads((place / "output/run.json").read_text())
    processes = 2 if command is ACCELERATE else 1
    assert record["status"] == "done"
    assert record["plan"]["machine"]["world_size"] == processes
    assert record["plan"]["train"]["gradient_accumulation_steps"] == 64 // processes
    assert len(record["plan"]["adapter"]["target_modules"]) == 7


def test_diagnostic_when_run_literally_then_shows_a_falling_finite_loss(place: Path) -> None:
    done = run(DIAGNOSTIC, place, "--warmup_steps=0 --logging_steps=1")
    assert done.returncode == 0, done.stderr
    logs = [json.loads(line) for line in (place / "output/metrics.jsonl").read_text().splitlines()]
    losses = [log["loss"] for log in logs if "loss" in log]
    assert 0 < losses[-1] < losses[0]
    assert all(0.01 < log["grad_norm"] < 100 for log in logs if "grad_norm" in log)


@pytest.mark.parametrize(
    ("extra", "says"),
    [("--bf16=False --fp16=True", "--fp16=True has no effect on a CPU"), ("--attn_implementation=flash_attention_2", "needs a CUDA GPU")],
)
def test_troubleshooting_flag_when_there_is_no_gpu_then_is_refused(place: Path, extra: str, says: str) -> None:
    done = run(DIAGNOSTIC.replace("\n    --bf16=True", ""), place, extra)
    assert done.returncode == 2
    assert says in done.stderr
    assert not (place / "output").exists()


def test_optimised_command_when_there_is_no_gpu_then_is_refused(place: Path) -> None:
    done = run(OPTIMISED, place)
    assert (done.returncode, "--attn_implementation=flash_attention_2 needs a CUDA GPU" in done.stderr) == (2, True)


@pytest.mark.slow
def test_compile_when_switched_on_then_trains_to_the_same_losses(place: Path) -> None:
    losses = []
    for flag in ("False", "True"):
        extra = f"--enable_torch_compile={flag} --output_dir={flag} --warmup_steps=0 --logging_steps=1 --lora_dropout=0 --max_steps=2"
        done = run(DIAGNOSTIC.replace("--bf16=True", "--bf16=False"), place, extra)
        assert done.returncode == 0, done.stderr
        logs = [json.loads(line) for line in (place / flag / "metrics.jsonl").read_text().splitlines()]
        losses.append([log["loss"] for log in logs if "loss" in log])
        compiled = json.loads((place / flag / "run.json").read_text())["summary"]["compile"]
        assert (compiled is not None) is (flag == "True")
        assert compiled is None or f"torch.compile: {compiled['seconds']:.1f} s for {compiled['graphs']} graphs" in done.stdout
    assert losses[1] == pytest.approx(losses[0], abs=1e-3)


def test_python_call_when_made_as_in_the_guide_then_trains(place: Path) -> None:
    code = f"""
from finetune import train

train(
    base_model={str(SMALL_MODEL)!r},
    adapter_name="dora",
    lora_r=32,
    lora_alpha=64,
    bf16=True,
    # New parameters (optional, these are the defaults)
    attn_implementation="eager",
    disable_cudnn_sdpa=True,
    enable_torch_compile=False,
    data_path="commonsense_170k.json", batch_size=16, num_epochs=1, warmup_steps=0,
)
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=place, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads((place / "output/run.json").read_text())["status"] == "done"
