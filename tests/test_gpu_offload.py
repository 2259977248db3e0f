"""Recomputing layers on one CUDA GPU: inputs and kept products in host memory, few of them on the GPU at a time, down_proj's product once.

Run with: CUDA_VISIBLE_DEVICES=0 pytest -m gpu -o addopts= -s tests/test_gpu_offload.py     (-s: milliseconds and GiB of each way)
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune import train
from surefoot import adapters
from surefoot.memory import ON_THE_WAY
from surefoot.ops.fuse import fuse, spare_down
from surefoot.training.offload import HostMemory
from surefoot.training.recompute import recompute
from tests.runs import logs, quick, tensors
from tests.test_adapters import adapter_plan
from tests.test_fused_layers import disturbed
from tests.test_recomputed_product import counted_products

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


@pytest.mark.parametrize(
    "flags",
    [{}, {"stage": 3}, {"load_4bit": True}, {"adapter_name": "lora", "stage": 3}, {"load_4bit": True, "stage": 3}],
    ids=["eager", "compiled", "nf4", "lora-compiled", "nf4-compiled"],
)
def test_run_when_layers_recompute_and_inputs_wait_in_host_memory_then_numbers_are_the_same(
    flags: dict[str, Any], rows: Path, tmp_path: Path
) -> None:
    for name, way in (("kept", False), ("here", True), ("away", "offload")):
        train(data_path=rows, output_dir=tmp_path / name, **quick(use_gradient_checkpointing=way, bf16=True, **flags))
    wanted = tensors(tmp_path / "kept")
    for name in ("here", "away"):
        assert logs(tmp_path / name, "loss") == logs(tmp_path / "kept", "loss")
        found = tensors(tmp_path / name)
        assert all(torch.equal(found[key], tensor) for key, tensor in wanted.items())


WIDE = {
    "vocab_size": 1024, "hidden_size": 2048, "intermediate_size": 7168, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip
IDS = torch.arange(128 * 64).reshape(128, 64) % 1024  # 8,192 tokens in rows so short that attention's backward pass has one order
PRODUCT = 2 * 2048 * 8192  # bytes of a layer's bf16 output
LOW_RANK = 2 * 32 * 8192


def wide_model(method: str, *, compiled: bool) -> Any:
    """8 layers in Llama-3.1-8B's proportions, frozen weights in bf16, compiled as stage 3 does."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**WIDE), attn_implementation="sdpa", dtype=torch.float32).cuda()
    model.config.use_cache = False
    model = disturbed(adapters.attach(model, adapter_plan(method=method, lora_r=32), seed=1))
    fused = fuse(model)
    for layer in fused.layers:
        layer.get_base_layer().to(torch.bfloat16)
    if compiled:
        adapters.compile_layers(model)
    return model.train()


class Step(NamedTuple):
    peak: int  # bytes
    milliseconds: float
    downs: int  # products of down_proj
    gradients: list[Tensor]


def step_of(model: Any, products: list[tuple[int, ...]]) -> Step:
    """The last of four steps."""
    ids, began = IDS.cuda(), 0.0
    for _ in range(4):
        model.zero_grad(set_to_none=True)
        products.clear()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.cuda.synchronize()
    milliseconds, peak = 1e3 * (time.perf_counter() - began), torch.cuda.max_memory_allocated()
    gradients = [parameter.grad.cpu() for parameter in model.parameters() if parameter.grad is not None]
    return Step(peak, milliseconds, products.count((7168, 2048)), gradients)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_down_when_wide_layers_recompute_then_is_multiplied_once_and_what_is_kept_has_its_bound(
    method: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    products, model, steps = counted_products(monkeypatch), wide_model(method, compiled=compiled), {}
    steps["kept"] = step_of(model, products)
    for spares in (False, True):
        assert not spares or spare_down(model) == 8
        for place in ("here", "away"):
            recompute(model, -1, offload_inputs=place == "away")
            steps[place, spares] = step_of(model, products)
    for way, step in steps.items():
        print(
            f"{method} {'compiled' if compiled else 'eager'} {way}: {step.milliseconds:.1f} ms, {step.peak / 2**30:.3f} GiB, {step.downs}"
        )
        assert all(torch.equal(mine, wanted) for mine, wanted in zip(step.gradients, steps["kept"].gradients, strict=True)), way
    assert [step.downs for step in steps.values()] == [8, 16, 16, 8, 8]
    more = {place: steps[place, True].peak - steps[place, False].peak for place in ("here", "away")}
    product = PRODUCT if method == "dora" else 0
    assert more["here"] <= 8 * (product + LOW_RANK) + 2**20
    assert more["away"] <= ON_THE_WAY * product + 8 * LOW_RANK + 2**20
