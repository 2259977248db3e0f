"""100 steps of the fused layers against PEFT's own in fp32, on the shipped rows: the whole loss curve, not one step.

On a GPU: CUDA_VISIBLE_DEVICES=0 pytest -m gpu -o addopts= tests/test_loss_curves.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import train
from tests.conftest import TRAIN_ROWS
from tests.runs import logs, quick

STEPS = 100
FLAGS = quick(
    lora_r=16, lora_alpha=32, learning_rate=1e-3, max_steps=STEPS, warmup_steps=10, val_set_size=0, data_path=TRAIN_ROWS, save_strategy="no",
    packing=False,
)  # fmt: skip
PEFT = {"fused_adapters": False, "fused_loss": False, "bf16": False}
SAME = 1e-4  # of the mean loss: fp32 against fp32, where only the order of sums differs, after 100 steps
AS_NEAR = 1.5  # times as far from fp32 as PEFT's own bf16 curve, the mean over the steps, at most


def curve(folder: Path, **flags: Any) -> torch.Tensor:
    train(output_dir=folder, **{**FLAGS, **flags})
    losses = torch.tensor(logs(folder, "loss"), dtype=torch.float64)
    assert len(losses) == STEPS
    assert losses[-10:].mean() < losses[:10].mean() - 1.0
    return losses


def distance(ours: torch.Tensor, truth: torch.Tensor) -> tuple[float, float]:
    """Largest and mean difference of a step's loss, in mean losses."""
    apart = (ours - truth).abs() / truth.mean()
    return float(apart.max()), float(apart.mean())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_curve_when_fused_then_is_pefts(method: str, tmp_path: Path) -> None:
    truth = curve(tmp_path / "peft", adapter_name=method, **PEFT)
    assert distance(curve(tmp_path / "fused", adapter_name=method, bf16=False), truth)[0] < SAME


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_curve_when_fused_compiled_and_in_bf16_then_is_as_near_to_fp32_as_pefts(method: str, tmp_path: Path) -> None:
    truth = curve(tmp_path / "peft", adapter_name=method, **PEFT)
    assert distance(curve(tmp_path / "fp32", adapter_name=method, bf16=False), truth)[0] < SAME
    plain = distance(curve(tmp_path / "bf16", adapter_name=method, **PEFT | {"bf16": True}), truth)[1]
    assert distance(curve(tmp_path / "stage3", adapter_name=method, stage=3), truth)[1] < AS_NEAR * plain
