"""A short real run: its flags, and what it leaves in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conftest import SMALL_MODEL

QUICK = {
    "lora_r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "batch_size": 8, "per_device_train_batch_size": 4, "learning_rate": 2e-3,
    "max_steps": 6, "warmup_steps": 1, "val_set_size": 8, "eval_step": 3, "save_step": 3, "logging_steps": 1, "report_to": "none",
}  # fmt: skip


def quick(**changes: object) -> dict[str, Any]:
    return {"base_model": SMALL_MODEL, "adapter_name": "dora", **QUICK, **changes}


def words(flags: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in flags.items()]


def logs(folder: Path, key: str) -> list[float]:
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry[key] for entry in entries if key in entry]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


class NanGradient(torch.autograd.Function):
    """Right forward, NaN backward: what cuDNN 9.19 does."""

    @staticmethod
    def forward(context: Any, query: torch.Tensor) -> torch.Tensor:
        return query.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return gradient * float("nan")
