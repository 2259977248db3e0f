"""The training of finetune.train against a plain PEFT + PyTorch loop written here: the same losses, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from finetune import train
from surefoot import tokens
from surefoot.data.prepare import prepare
from surefoot.data.rows import Collator
from surefoot.plan import DataPlan
from tests.conftest import SMALL_MODEL, TRAIN_ROWS

STEPS, ROWS, RATE, DECAY = 20, 16, 1e-3, 0.1


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 rows, one full batch: no step depends on the order of the rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:ROWS]
    path.write_text("\n".join(lines) + "\n")
    return path


def reference_losses(rows: Path, adapter: str) -> list[float]:
    """20 full-batch steps of AdamW with clipping, cosine decay and 2 warm-up steps, fp32, no Trainer."""
    tokenizer = AutoTokenizer.from_pretrained(SMALL_MODEL)
    pad = tokens.settle(tokenizer)
    plan = DataPlan(
        data_path=(str(rows),), data_split="train", val_data_path=None, val_set_size=0, val_set_size_is_default=False, cutoff_len=512,
        overlong="drop", prompt_style="auto", text_field="text", train_on_inputs=False, audit="warn", cache_dir=None, seed=42,
    )  # fmt: skip
    data = prepare(plan, tokenizer).train
    batch = Collator(pad_token_id=pad.token_id)([data[index] for index in range(len(data))])
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32, attn_implementation="eager")
    if adapter != "full":
        torch.manual_seed(42)
        config = LoraConfig(
            r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", use_dora=adapter == "dora", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, config)
    model.train()
    kept = {name for name, _ in model.named_parameters() if "magnitude" in name or "norm" in name}
    groups = [
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n not in kept], "weight_decay": DECAY},
        {"params": [p for n, p in model.named_parameters() if p.requires_grad and n in kept], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    schedule = get_cosine_schedule_with_warmup(optimizer, 2, STEPS)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


@pytest.mark.parametrize(("adapter", "micro"), [("dora", 16), ("lora", 16), ("full", 16), ("dora", 4)])
def test_losses_when_trained_20_steps_then_equal_a_plain_loop(rows: Path, tmp_path: Path, adapter: str, micro: int) -> None:
    folder = train(
        base_model=SMALL_MODEL, data_path=rows, output_dir=tmp_path / "run", adapter_name=adapter, lora_r=8, lora_alpha=16, lora_dropout=0,
        cutoff_len=512, val_set_size=0, batch_size=ROWS, per_device_train_batch_size=micro, max_steps=STEPS, learning_rate=RATE,
        weight_decay=DECAY, warmup_steps=2, logging_steps=1, report_to="none", save_strategy="no",
    )  # fmt: skip
    logs = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    ours = [log["loss"] for log in logs if "loss" in log]
    assert len(ours) == STEPS
    assert ours == pytest.approx(reference_losses(rows, adapter), abs=1e-5)
    assert ours[-1] < ours[0] - 0.1
