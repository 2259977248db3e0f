"""fuse(): puts the fused layers into a model, layer by layer, or says why not."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.activations import SiLUActivation

from surefoot.ops import quantized, recomputed
from surefoot.ops.layers import ADAPTER, FUSED_CLASSES, FusedMLP, Fusion, Siblings
from surefoot.ops.renewal import Norms

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one block that are given the same input
SWIGLU_BLOCKS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "Olmo2MLP")  # whose forward is down(act(gate(x)) * up(x))
ADDING_LAYERS = (  # that add their MLP's output to the residual stream and end there; Olmo2's goes through a norm, which needs it
    "LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer", "SmolLM3DecoderLayer",
)  # fmt: skip


@dataclass
class Fused:
    """What fuse() did: the fused layers, of the others the reason by name, and who keeps DoRA's row norms up to date."""

    layers: list[Any]
    refused: dict[str, str]
    norms: list[Norms] = field(repr=False)

    @property
    def renewals(self) -> int:
        """How often the norms were renewed."""
        return max(norms.renewals for norms in self.norms)

    def mark_stale(self, *_: Any) -> None:
        for norms in self.norms:
            norms.mark_stale()

    def line(self) -> str:
        """One line for the terminal."""
        text = f"fused adapters: {len(self.layers)} layers"
        if self.refused:
            name, why = next(iter(self.refused.items()))
            text += f"; {len(self.refused)} stay with PEFT, first {name}: {why}"
        return text


def fuse(model: Any, *, in_pieces: bool = False) -> Fused:
    """Gives every LoRA or DoRA layer that it knows the fused forward, in place; the model stays a PeftModel.

    DoRA's norms are renewed after an optimizer step by the next forward pass of the whole model, before its micro-batches, accumulation
    and recompute share them.

    Args:
        in_pieces: an engine will gather the weights of a decoder layer for each of its passes (ZeRO-3, FSDP2): each layer then renews
            its own norms, when it has its weights.
    """
    refused: dict[str, str] = {}
    layers = []
    for name, layer in model.named_modules():
        if not isinstance(layer, lora.LoraLayer):
            continue
        obstacle = _obstacle(layer)
        if obstacle:
            refused[name] = obstacle
            continue
        layers.append(_swap(layer))
    for block in model.modules():
        for group in _groups(block):
            siblings = Siblings(group)
            for place, layer in enumerate(group):
                layer.siblings, layer.place = siblings, place
        if _is_swiglu(block):
            block.__class__ = FusedMLP
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    norms = _norms_by_layer(inner) if in_pieces else [Norms(layers, sees_changes=True)]
    if not in_pieces:
        inner.register_forward_pre_hook(norms[0].renew)
    fused = Fused(layers, refused, norms)
    inner.register_load_state_dict_post_hook(fused.mark_stale)
    mark_stale = weakref.WeakMethod(fused.mark_stale)
    hook = register_optimizer_step_post_hook(lambda *_: (mark := mark_stale()) and mark())
    weakref.finalize(fused, hook.remove)
    return fused


def spare_down(model: Any, count: int = -1) -> int:
    """Lets the first `count` decoder layers (-1: all), where they recompute, end with gate and up; returns how many will.

    Those whose MLP is one operation and whose output is the residual stream with the MLP's added: no backward pass needs it.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = [
        layer for layer in inner.modules() if type(layer).__name__ in ADDING_LAYERS and isinstance(getattr(layer, "mlp", None), FusedMLP)
    ]
    sparing = layers if count < 0 else layers[:count]
    for layer in sparing:
        layer.recompute_passes = recomputed.passes
    return len(sparing)


def _norms_by_layer(inner: Any) -> list[Norms]:
    """Of each decoder layer its norms, which it renews in its forward pass.

    The hooks are set at the model's first pass: they must run after the engine's, which gather the weights.
    """
    decoder_layers = list(inner.get_decoder().layers)
    every = [Norms([part for part in layer.modules() if isinstance(part, Fusion)], sees_changes=False) for layer in decoder_layers]

    def hook_layers(*_: Any) -> None:
        first.remove()
        for layer, norms in zip(decoder_layers, every, strict=True):
            layer.register_forward_pre_hook(norms.renew)

    first = inner.register_forward_pre_hook(hook_layers)
    return every


def _obstacle(layer: Any) -> str:
    """Why a layer keeps PEFT's forward, empty if it need not."""
    if type(layer) not in FUSED_CLASSES:
        return f"{type(layer).__name__} is not a plain linear layer"
    base = layer.get_base_layer()
    if type(layer) is not lora.Linear and (why := quantized.obstacle(base)):
        return why
    if type(layer) is lora.Linear and (not isinstance(base, torch.nn.Linear) or base.weight.ndim != 2):
        return f"its base is {type(base).__name__}"
    if list(layer.lora_A) != [ADAPTER]:
        return f"it has the adapters {', '.join(layer.lora_A)}"
    if getattr(layer, "fan_in_fan_out", False):
        return "its weight is stored transposed"
    if layer.lora_bias[ADAPTER]:
        return "its B has a bias"
    if base.weight.requires_grad:
        return "its base weight is trained"
    variant = layer.lora_variant.get(ADAPTER)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"it is a {type(variant).__name__}"
    return ""


def _swap(layer: Any) -> Any:
    layer.__class__ = FUSED_CLASSES[type(layer)]
    layer.siblings, layer.place = Siblings([layer]), 0
    norm = layer.lora_magnitude_vector[ADAPTER].weight.detach().clone() if layer.use_dora[ADAPTER] else None
    layer.register_buffer("row_norm", norm, persistent=False)
    return layer  # type: ignore[no-any-return]


def _is_swiglu(block: Any) -> bool:
    """True for down(silu(gate(x)) * up(x)) without biases, all three layers fused."""
    layers = [getattr(block, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    return (
        type(block).__name__ in SWIGLU_BLOCKS
        and all(isinstance(layer, Fusion) and layer.get_base_layer().bias is None for layer in layers)
        and isinstance(block.act_fn, (torch.nn.SiLU, SiLUActivation))
        and len({(layer.r[ADAPTER], layer.row_norm is None) for layer in layers}) == 1  # type: ignore[union-attr]
    )


def _groups(block: Any) -> Iterator[list[Any]]:
    for names in SIBLINGS:
        group = [child for name in names if isinstance(child := getattr(block, name, None), Fusion)]
        if len(group) > 1 and len({(layer.in_features, layer.r[ADAPTER]) for layer in group}) == 1:
            yield group
