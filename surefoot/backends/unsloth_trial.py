"""The trial that detection.ask() runs in a process of its own: imports Unsloth, loads, attaches, forward and backward on a tiny model."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from surefoot.errors import UnslothRefusedError
from surefoot.plan import ModelPlan

SIZES = {  # of config.json, by the names its families share
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 256,
}  # fmt: skip
TOKENS = 64


def main() -> None:
    """run() for the case on stdin."""
    run(json.load(sys.stdin))


def run(case: dict[str, Any]) -> None:
    """Prints a line for every step that is done; an error leaves as a traceback.

    Args:
        case: the fields of detection.Case.
    """
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
        os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", f"{folder}/compiled")
        from surefoot.backends import unsloth as backend  # before transformers

        print("step: imported", flush=True)
        _write_model(Path(folder), case["model_type"])
        try:
            model = backend.load(_plan(folder, case))
            print("step: loaded", flush=True)
            _train(model, case)
        except UnslothRefusedError as refused:
            raise SystemExit(refused.reason) from None
    print("step: trained", flush=True)


def _plan(folder: str, case: dict[str, Any]) -> ModelPlan:
    return ModelPlan(
        path=folder, revision=None, trust_remote_code=False, attn_implementation="sdpa", quantization=case["quantization"],
        compute_dtype=case["dtype"], frozen_dtype=case["dtype"], loads_on_gpu=True, cutoff_len=TOKENS, use_gradient_checkpointing="unsloth",
        enable_torch_compile=False, fused_adapters=False, fused_loss=False, recompute_layers=0, offload_inputs=False,
    )  # fmt: skip


def _write_model(folder: Path, model_type: str) -> None:
    """A checkpoint of this type with random weights and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(model_type, **SIZES)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    letters = {letter: number for number, letter in enumerate(("<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    wrapped.save_pretrained(folder)


def _train(model: Any, case: dict[str, Any]) -> None:
    """One forward and backward pass: the loss and the gradient of every B must be finite (A has none while B is zero)."""
    import torch
    from peft import LoraConfig

    from surefoot.backends import unsloth as backend

    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules="all-linear", use_dora=case["method"] == "dora")
    adapted = backend.attach(model, config, recompute="unsloth", seed=0)
    print("step: attached", flush=True)
    device = next(adapted.parameters()).device
    ids = torch.arange(TOKENS, device=device)[None] % SIZES["vocab_size"]
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case["dtype"])
    adapted.train()
    with torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        loss = adapted(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = [parameter.grad for name, parameter in adapted.named_parameters() if "lora_B" in name]
    if not bool(torch.isfinite(loss)) or not gradients or not all(g is not None and bool(torch.isfinite(g).all()) for g in gradients):
        raise SystemExit(f"the tiny model's loss is {float(loss)} or a gradient is missing or not finite")
