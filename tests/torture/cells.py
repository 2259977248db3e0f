"""What is tortured: methods, processes, and the settings in which a resume goes wrong elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.runs import QUICK, SMALL_MODEL


class Cell(NamedTuple):
    name: str
    processes: int
    flags: dict[str, Any]


COMMON = {
    **QUICK, "base_model": SMALL_MODEL, "batch_size": 8, "per_device_train_batch_size": 2, "lora_dropout": 0.1, "max_steps": 10, "val_set_size": 8,
    "eval_step": 2, "save_step": 2, "warmup_steps": 2, "logging_steps": 1, "attn_implementation": "sdpa", "resume": True,
}  # fmt: skip
# 56 rows in steps of 8: an epoch ends at step 7, between two checkpoints
CELLS = (
    Cell("lora-single", 1, {"adapter_name": "lora", "dataloader_num_workers": 1, "save_total_limit": 1}),
    Cell("dora-single", 1, {"adapter_name": "dora", "bf16": True, "packing": True, "eval_step": 1, "save_step": 3, "load_best_model_at_end": False}),
    Cell("qlora-single", 1, {"adapter_name": "lora", "load_4bit": True, "bf16": True, "eval_strategy": "epoch", "save_strategy": "epoch"}),
    Cell("lora-ddp", 2, {"adapter_name": "lora", "bf16": True, "packing": True, "logging_steps": 3}),
    Cell("dora-ddp", 2, {"adapter_name": "dora", "group_by_length": True, "dataloader_num_workers": 1}),
    Cell("qlora-ddp", 2, {"adapter_name": "lora", "load_4bit": True, "save_step": 1, "eval_step": 1, "lora_dropout": 0.0}),
)  # fmt: skip
