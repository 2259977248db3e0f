"""Decoder: the sizes in config.json, of models whose layers have two norms, seven linear layers and a gated MLP; Job: its training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # as config.json's model_type names them
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


class Linear(NamedTuple):
    name: str
    inputs: int
    outputs: int

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only model: layers, an embedding and a head."""

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    is_tied: bool
    biased: tuple[str, ...]  # the linear layers with a bias

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def linears(self) -> tuple[Linear, ...]:
        d, f, q, k = self.hidden, self.intermediate, self.query, self.key
        return (
            Linear("q_proj", d, q), Linear("k_proj", d, k), Linear("v_proj", d, k), Linear("o_proj", q, d),
            Linear("gate_proj", d, f), Linear("up_proj", d, f), Linear("down_proj", f, d),
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """What trains, and how, under the plan's names; `rows` x `length` tokens go through a forward pass."""

    rows: int
    length: int
    method: str
    lora_r: int
    lora_dropout: float
    target_modules: tuple[str, ...] | None
    precision: str
    quantization: str
    frozen_dtype: str
    optim: str
    attn_implementation: str
    enable_torch_compile: bool
    fused_adapters: bool
    fused_loss: bool
    is_ddp: bool
    recompute_layers: int = 0
    offload_inputs: bool = False
    spares_down: bool = False

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def is_cast(self) -> bool:
        """Under autocast, linear layers take and give 16-bit values and the residual stream stays fp32."""
        return self.precision != "fp32"

    @property
    def has_own_products(self) -> bool:
        """The adapters' products are ops/linear.py's; int8 layers stay with PEFT."""
        return self.fused_adapters and self.quantization != "int8"

    @property
    def is_fused(self) -> bool:
        """Its own products without dropout, which keep each input once."""
        return self.has_own_products and self.lora_dropout == 0

    @property
    def is_lean(self) -> bool:
        """Compiled, where that keeps less: of PEFT's DoRA, and of dropout, the compiler keeps as much as plain torch."""
        return self.enable_torch_compile and self.lora_dropout == 0 and (self.is_fused or self.method == "lora")

    def fuses_mlp(self, decoder: Decoder) -> bool:
        """gate, up and down as one operation, which keeps no product of both: ops/fuse.py."""
        adapted = {one.name for one in self.adapted(decoder)}
        return self.is_fused and decoder.family != "gemma" and adapted >= {*MLP} and not {*MLP} & {*decoder.biased}

    def adapted(self, decoder: Decoder) -> tuple[Linear, ...]:
        """The linear layers that have an adapter, or that train themselves (method full)."""
        named = None if self.method == "full" else self.target_modules
        return tuple(one for one in decoder.linears if named is None or one.name in named)


def decoder_of(config: Mapping[str, Any] | None) -> Decoder | None:
    """The decoder of a config.json; None without one, or for other models (experts, vision, other layers)."""
    if config is None or config.get("model_type") not in FAMILIES:
        return None
    named = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    if not all(isinstance(config.get(name), int) and config[name] > 0 for name in named):
        return None
    hidden, layers, heads, intermediate, vocabulary = (config[name] for name in named)
    return Decoder(
        family=config["model_type"],
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=intermediate,
        vocabulary=vocabulary,
        is_tied=bool(config.get("tie_word_embeddings", config["model_type"] == "gemma")),
        biased=_biased(config),
    )


def _biased(config: Mapping[str, Any]) -> tuple[str, ...]:
    if config["model_type"] == "qwen2":
        return ATTENTION[:3]
    return (ATTENTION if config.get("attention_bias") else ()) + (MLP if config.get("mlp_bias") else ())
