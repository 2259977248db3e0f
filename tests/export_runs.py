"""Short real runs to merge and export, made once a session, and PEFT's own reading of them as the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from finetune import train
from surefoot import runtime
from surefoot.export import source, story
from tests.conftest import SMALL_MODEL
from tests.runs import quick

METHODS = {
    "lora": {"adapter_name": "lora"},
    "dora": {"adapter_name": "dora"},
    "qdora": {"adapter_name": "dora", "load_4bit": True},
}
IDS = torch.arange(3, 3 + 7 * 64).reshape(7, 64) * 9 % 4000


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, rows: Path) -> Callable[[str], Path]:
    """The folder of a run by its name in METHODS, trained when first asked for."""

    @cache
    def of(method: str) -> Path:
        folder = tmp_path_factory.mktemp("runs") / method
        flags = quick(data_path=rows, output_dir=folder, learning_rate=2e-2, eval_strategy="no", save_strategy="no", **METHODS[method])
        train(**flags)
        return folder

    return of


def reference(adapter: Path, base: Path = SMALL_MODEL, *, is_4bit: bool = False) -> Any:
    """The adapter through PEFT in fp32, on the dequantized base where it was trained on NF4."""
    asked = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True) if is_4bit else None
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=asked)
    model = model.dequantize(torch.float32) if is_4bit else model
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.no_grad()
def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    if isinstance(model, Path):
        model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    found: torch.Tensor = model(input_ids=ids).logits
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, by the largest of `one`."""
    return float((one - other).abs().max() / one.abs().max())


def job(out: Path, dtype: str = "fp32", **changes: Any) -> story.Job:
    """Without a parity verdict, whose own tests ask for it."""
    return story.Job(out, dtype, overwrites=False, checks_parity=False, prompt_file="", shard_bytes=4 << 30)._replace(**changes)


def merge(adapter: Path, out: Path, dtype: str = "fp32", onto: str = "seen", **changes: Any) -> list[str]:
    """Merges and returns what was said."""
    said: list[str] = []
    story.merge_adapter(source.read(str(adapter), onto=onto), job(out, dtype, **changes), said.append)
    return said


def untrained_adapter(folder: Path, base: Path = SMALL_MODEL, **settings: Any) -> Path:
    """A PEFT adapter with random weights in `folder`, as another program would leave it."""
    runtime.quiet()
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **{"r": 4, "lora_alpha": 8, **settings}))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "lora_embedding" in name or "magnitude" in name or "modules_to_save" in name:
            parameter.data += 0.05 * parameter.abs().mean().clamp_min(1.0) * torch.randn_like(parameter)
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    AutoTokenizer.from_pretrained(SMALL_MODEL).save_pretrained(folder)
    return folder


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
