"""What is tortured: methods, processes, and the settings in which a resume goes wrong elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.runs import QUICK, SMALL_MODEL


class Cell(NamedTuple):
    """profile: of profiles/, where the cell's processes belong to an engine; else they are what torchrun would make of them."""

    name: str
    processes: int
    flags: dict[str, Any]
    profile: str | None = None


COMMON = {
    **QUICK, "base_model": SMALL_MODEL, "batch_size": 4, "per_device_train_batch_size": 1, "lora_dropout": 0.1, "max_steps": 8, "val_set_size": 4,
    "eval_step": 2, "save_step": 2, "warmup_steps": 2, "logging_steps": 1, "attn_implementation": "sdpa", "resume": True,
}  # fmt: skip
ROWS = 24  # of which 20 are trained on in steps of 4: an epoch ends at step 5, between two checkpoints
CELLS = (
    Cell("lora-single", 1, {"adapter_name": "lora", "dataloader_num_workers": 1, "save_total_limit": 1}),
    Cell("dora-single", 1, {"adapter_name": "dora", "packing": True, "eval_step": 1, "save_step": 3, "load_best_model_at_end": False}),
    Cell("qlora-single", 1, {"adapter_name": "lora", "load_4bit": True, "eval_strategy": "epoch", "save_strategy": "epoch"}),
    Cell("lora-ddp", 2, {"adapter_name": "lora", "packing": True, "logging_steps": 3}),
    Cell("dora-ddp", 2, {"adapter_name": "dora", "group_by_length": True, "dataloader_num_workers": 1}),
    Cell("qlora-ddp", 2, {"adapter_name": "lora", "load_4bit": True, "save_step": 1, "eval_step": 1, "lora_dropout": 0.0}),
)  # fmt: skip
ENGINE_CELLS = (
    Cell("lora-zero2", 2, {"adapter_name": "lora", "dataloader_num_workers": 1}, "ds_zero2"),
    Cell("dora-zero2", 2, {"adapter_name": "dora", "packing": True, "eval_step": 1, "save_step": 3, "load_best_model_at_end": False}, "ds_zero2"),
    Cell("qlora-zero2", 2, {"adapter_name": "lora", "load_4bit": True}, "ds_zero2"),
    Cell("lora-zero3", 2, {"adapter_name": "lora", "packing": True}, "ds_zero3"),
    Cell("dora-zero3", 2, {"adapter_name": "dora", "group_by_length": True}, "ds_zero3"),
    Cell("qlora-zero3", 2, {"adapter_name": "lora", "load_4bit": True, "save_step": 1, "eval_step": 1}, "ds_zero3"),
    Cell("lora-fsdp2", 2, {"adapter_name": "lora", "packing": True, "logging_steps": 3}, "fsdp2"),
    Cell("dora-fsdp2", 2, {"adapter_name": "dora", "group_by_length": True, "dataloader_num_workers": 1}, "fsdp2"),
    Cell("qlora-fsdp2", 2, {"adapter_name": "lora", "load_4bit": True, "save_step": 1, "eval_step": 1}, "fsdp2"),
)  # fmt: skip
SHORT = {
    "bf16": True,
    "batch_size": 2,
    "max_steps": 4,
    "save_step": 1,
    "eval_strategy": "no",
}  # bf16 on a CPU runs at a tenth of fp32's speed
BF16_CELLS = (
    Cell("dora-single-bf16", 1, {"adapter_name": "dora", **SHORT}),
    Cell("qlora-single-bf16", 1, {"adapter_name": "lora", "load_4bit": True, **SHORT}),
    Cell("lora-ddp-bf16", 2, {"adapter_name": "lora", **SHORT}),
    Cell("lora-zero2-bf16", 2, {"adapter_name": "lora", **SHORT}, "ds_zero2"),
    Cell("dora-fsdp2-bf16", 2, {"adapter_name": "dora", **SHORT}, "fsdp2"),
)
EVERY_CELL = (*CELLS, *ENGINE_CELLS, *BF16_CELLS)
