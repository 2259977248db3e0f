"""Layer inputs in host memory on one CUDA GPU: the same numbers, and no more than a few of them on the GPU at a time.

Run with: CUDA_VISIBLE_DEVICES=0 pytest -m gpu -o addopts= tests/test_gpu_offload.py
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from finetune import train
from surefoot.memory import ON_THE_WAY
from surefoot.training.offload import HostMemory
from tests.runs import logs, quick, tensors

pytestmark = pytest.mark.gpu

LAYERS, WIDTH = 16, 4096
INPUT = 4 * WIDTH * WIDTH  # bytes


def trained_on(layers: list[torch.nn.Linear], run: Callable[..., Any]) -> tuple[int, list[Tensor]]:
    """Peak bytes above what was there, and gradients, of two passes: pinned memory is used again in the second."""
    torch.manual_seed(0)
    x = torch.randn(WIDTH, WIDTH, device="cuda")
    for layer in layers:
        layer.weight.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        hidden = x
        for layer in layers:
            hidden = run(lambda one, layer=layer: torch.tanh(layer(one)), hidden, use_reentrant=False)
        hidden.square().mean().backward()
        del hidden
    return torch.cuda.max_memory_allocated() - before, [layer.weight.grad.clone() for layer in layers if layer.weight.grad is not None]


def test_inputs_when_they_wait_in_host_memory_then_few_are_on_the_gpu_and_gradients_are_the_same() -> None:
    layers = [torch.nn.Linear(WIDTH, WIDTH, bias=False, device="cuda") for _ in range(LAYERS)]
    here, truth = trained_on(layers, checkpoint)
    away, found = trained_on(layers, HostMemory().around(checkpoint))
    assert len(found) == LAYERS
    assert all(torch.equal(mine, wanted) for mine, wanted in zip(found, truth, strict=True))
    assert here - away >= (LAYERS - 1 - ON_THE_WAY) * INPUT


@pytest.mark.parametrize("flags", [{}, {"stage": 3}, {"load_4bit": True}], ids=["eager", "compiled", "nf4"])
def test_run_when_inputs_wait_in_host_memory_then_numbers_are_the_same(flags: dict[str, Any], rows: Path, tmp_path: Path) -> None:
    for name, way in (("here", True), ("away", "offload")):
        train(data_path=rows, output_dir=tmp_path / name, **quick(use_gradient_checkpointing=way, bf16=True, **flags))
    assert logs(tmp_path / "away", "loss") == logs(tmp_path / "here", "loss")
    here, away = tensors(tmp_path / "here"), tensors(tmp_path / "away")
    assert all(torch.equal(away[name], tensor) for name, tensor in here.items())
