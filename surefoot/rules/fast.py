"""Which fast paths a run takes: fused adapters, the loss in chunks, frozen weights stored in 16 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from surefoot.rules import backend
from surefoot.rules.desk import Choice, Desk

# model_type of those whose logits are the head's product and nothing else (no soft cap, no scale)
PLAIN_HEADS = frozenset(
    (
        "llama",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma",
        "phi3",
        "smollm3",
        "olmo2",
        "starcoder2",
        "stablelm",
    )
)


def fused(desk: Desk) -> Iterator[Choice]:
    yield _unless(desk, "fused_adapters", _adapters_obstacle(desk))
    yield _unless(desk, "fused_loss", _loss_obstacle(desk))


def _unless(desk: Desk, name: str, obstacle: str) -> Choice:
    if not obstacle or not getattr(desk.config, name):
        return desk.as_given(name)
    if desk.config.given(name):
        desk.notes.append(f"--{name}=True is not followed: {obstacle}")
    return Choice(name, False, "auto", obstacle)


def _adapters_obstacle(desk: Desk) -> str:
    if desk.config.adapter_name == "full":
        return "every weight is trained"
    return "Unsloth has its own" if backend.uses_unsloth(desk) else ""


def _loss_obstacle(desk: Desk) -> str:
    if desk.config.adapter_name == "full":
        return "the head is trained"
    if backend.uses_unsloth(desk):
        return "Unsloth has its own"
    found = desk.inputs.model_config
    if found is None:
        return "no config.json tells how the model makes its logits"
    kind = str(found.get("model_type"))
    return "" if kind in PLAIN_HEADS else f"model type {kind} is not known to make its logits by the head's product alone"


def frozen_dtype(desk: Desk, quantization: str, precision: str) -> Choice:
    """bf16 only where that changes no number: the checkpoint holds bf16, and autocast would round the weights to bf16 at every use."""
    c = desk.config
    stored = _stored_in(desk)
    init = c.init_lora_weights
    if backend.uses_unsloth(desk):
        return Choice("frozen_dtype", precision, "auto", "Unsloth stores the whole model so")
    if quantization != "none":
        return Choice("frozen_dtype", "fp32", "auto", "of what is not quantized")
    if c.adapter_name == "full":
        return Choice("frozen_dtype", "fp32", "auto", "nothing is frozen")
    if precision != "bf16":
        return Choice("frozen_dtype", "fp32", "auto", f"products are computed in {precision}")
    if isinstance(init, str) and init.startswith(("pissa", "olora")):
        return Choice("frozen_dtype", "fp32", "auto", f"{init} changes the base weights")
    if stored != "bf16":
        return Choice("frozen_dtype", "fp32", "auto", f"the checkpoint holds {stored}" if stored else "the checkpoint's dtype is not known")
    return Choice("frozen_dtype", "bf16", "auto", "the checkpoint holds bf16: the same numbers in half the memory")


def _stored_in(desk: Desk) -> str:
    found: dict[str, Any] = desk.inputs.model_config or {}
    if desk.inputs.weights_dtypes:
        return "bf16" if desk.inputs.weights_dtypes == ("BF16",) else ", ".join(desk.inputs.weights_dtypes)
    named = found.get("dtype") or found.get("torch_dtype") or ""
    return {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}.get(str(named), str(named))
