"""speed_works.py: what speed.py measures: the work of each case, the systems that do it, and the shapes of the models."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

TOKENS = 8192  # of a forward pass, and the length of a pack
CUTOFF = 512  # of commonsense rows; keeps all of them whole
SEED_ROWS = 2  # rows of a forward pass in the seeds' recipe, for systems that do not pack
RANK, ALPHA = 32, 64
EVERY = 4  # steps between two readings of the clock, for which the GPU must have ended its work; the first is read too
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SHRINK = 32  # the tiny shape has so many times fewer tokens
SHAPES: dict[str, dict[str, Any]] = {
    "llama8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    },
    "qwen7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "tie_word_embeddings": False,
    },
}  # fmt: skip


class System(NamedTuple):
    """Who trains. stage is finetune.py's, None for a peer."""

    label: str
    stage: int | None = None


SYSTEMS = {
    "ours3": System("surefoot, stage 3", 3),
    "ours2": System("surefoot, stage 2", 2),
    "ours1": System("surefoot, stage 1", 1),
    "peft": System("PEFT"),
    "liger": System("Liger + PEFT"),
    "unsloth": System("Unsloth"),
    "unsloth_sft": System("Unsloth + SFTTrainer, packed"),
    "seed": System("older recipes (fp32, eager)"),
}


@dataclass(frozen=True, kw_only=True)
class Work:
    """One forward and backward pass and an optimizer step of TOKENS tokens; length None: commonsense rows as they come."""

    shape: str = "llama8b"
    method: str  # lora or dora
    length: int | None = 2048
    recompute: bool = False
    quantization: str = "none"  # none or nf4
    tokens: int = TOKENS

    @property
    def rows(self) -> int:
        """Rows of a forward pass where they are not packed."""
        return self.tokens // self.length if self.length else SEED_ROWS

    def tiny(self) -> Work:
        """The same on a CPU in seconds."""
        length = self.length and self.length // SHRINK
        return dataclasses.replace(self, shape="tiny", length=length, tokens=max(self.tokens // SHRINK, CUTOFF if not length else 0))

    def label(self) -> str:
        method = {"none": "", "nf4": "Q"}[self.quantization] + {"lora": "LoRA", "dora": "DoRA"}[self.method]
        rows = f"{self.rows} x {self.length:,}" if self.length else "commonsense rows"
        shape = {"llama8b": "", "qwen7b": ", Qwen2.5-7B"}.get(self.shape, f", {self.shape}")
        return f"{method}, {rows}{shape}{', recompute' if self.recompute else ''}"


OURS = ("ours3", "ours2", "ours1")
FEW = ("ours3", "peft", "liger", "unsloth")
CASES: dict[str, tuple[Work, tuple[str, ...]]] = {
    "dora_2048": (Work(method="dora"), (*OURS, "peft", "liger", "unsloth")),
    "lora_2048": (Work(method="lora"), (*OURS, "peft", "liger", "unsloth")),
    "dora_2048_recompute": (Work(method="dora", recompute=True), (*OURS, "peft", "liger", "unsloth", "seed")),
    "lora_2048_recompute": (Work(method="lora", recompute=True), FEW),
    "qdora_2048_recompute": (Work(method="dora", recompute=True, quantization="nf4"), ("ours3", "ours2", "peft", "unsloth")),
    "commonsense_dora": (Work(method="dora", length=None), (*OURS, "unsloth_sft", "unsloth", "peft", "seed")),
    "commonsense_lora": (Work(method="lora", length=None), ("ours3", "unsloth_sft", "unsloth", "peft")),
    "commonsense_dora_recompute": (Work(method="dora", length=None, recompute=True), ("ours3", "unsloth_sft")),
    "dora_512": (Work(method="dora", length=512), FEW),
    "lora_512": (Work(method="lora", length=512), FEW),
    "dora_8192": (Work(method="dora", length=8192), FEW),
    "lora_8192": (Work(method="lora", length=8192), FEW),
    "qwen_dora_2048": (Work(method="dora", shape="qwen7b"), FEW),
    "qwen_lora_2048": (Work(method="lora", shape="qwen7b"), FEW),
}
