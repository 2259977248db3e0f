"""finetune.py on one CUDA GPU: every precision, stage and quantization trains the small model. Run with: pytest -m gpu"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL_MODEL, TRAIN_ROWS

pytestmark = pytest.mark.gpu

CASES = {
    "auto_is_bf16": ("--adapter_name=dora", "bf16", "eager"),
    "seed_004_fp16": ("--adapter_name=dora --bf16=False --fp16=True", "fp16", "eager"),
    "fp32": ("--adapter_name=lora --bf16=False", "fp32", "eager"),
    "stage2": ("--adapter_name=dora --stage=2", "bf16", "sdpa"),
    "stage2_with_cudnn": ("--adapter_name=dora --stage=2 --disable_cudnn_sdpa=False", "bf16", "sdpa"),
    "stage3": ("--adapter_name=dora --stage=3", "bf16", "sdpa"),
    "qdora": ("--adapter_name=dora --load_4bit=True", "bf16", "eager"),
    "qlora_recompute": ("--adapter_name=lora --load_4bit=True --use_gradient_checkpointing", "bf16", "eager"),
    "int8_lora": ("--adapter_name=lora --load_8bit=True", "bf16", "eager"),
    "int8_dora": ("--adapter_name=dora --load_8bit=True", "bf16", "eager"),
    "adam_8bit": ("--adapter_name=dora --optim=adamw_8bit", "bf16", "eager"),
    "full": ("--adapter_name=full --learning_rate=2e-4", "bf16", "eager"),
    "debug": ("--adapter_name=dora --debug", "bf16", "eager"),
    "deterministic": ("--adapter_name=dora --deterministic", "bf16", "eager"),
}


@pytest.mark.parametrize("name", CASES)
def test_run_when_on_a_gpu_then_learns_in_the_asked_way(finetune: Callable[..., object], tmp_path: Path, name: str) -> None:
    flags, precision, attention = CASES[name]
    done = finetune(
        *f"--base_model={SMALL_MODEL} --data_path={TRAIN_ROWS} --output_dir=run --batch_size=16 --per_device_train_batch_size=8".split(),
        *"--max_steps=20 --learning_rate=1e-3 --lora_dropout=0 --logging_steps=1 --val_set_size=32 --eval_step=10 --save_step=20".split(),
        *flags.split(),
    )
    assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    record = json.loads((tmp_path / "run/run.json").read_text())
    losses = [json.loads(line).get("loss") for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss is not None]
    assert record["status"] == "done"
    assert record["plan"]["train"]["precision"] == precision
    assert record["plan"]["model"]["attn_implementation"] == attention
    assert losses[-1] < losses[0] - 1.0
    assert record["summary"]["peak_memory_gib"] > 0
