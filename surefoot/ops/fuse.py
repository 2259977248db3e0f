"""fuse(): puts the fused layers into a model, layer by layer, or says why not; and keeps DoRA's row norms up to date."""

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

from surefoot.ops import quantized
from surefoot.ops.layers import ADAPTER, FUSED_CLASSES, FusedMLP, Fusion, Siblings
from surefoot.ops.norms import row_norms, squared_rows
from surefoot.ops.quantized import weight_of

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one block that are given the same input
SWIGLU_BLOCKS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "Olmo2MLP")  # whose forward is down(act(gate(x)) * up(x))
LAYERS_AT_ONCE = 32  # whose row norms are renewed together: 0.3 GB of temporaries at 14,336 x 4,096


class Shape:
    """Up to LAYERS_AT_ONCE layers of one shape and scale, whose norms are renewed together."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.weights_squared = torch.stack([squared_rows(weight_of(layer.get_base_layer())) for layer in layers])

    def renew(self) -> None:
        a, b = [layer.lora_A[ADAPTER].weight for layer in self.layers], [layer.lora_B[ADAPTER].weight for layer in self.layers]
        weights = (weight_of(layer.get_base_layer()) for layer in self.layers)
        norms = row_norms(weights, a, b, self.layers[0].scaling[ADAPTER], self.weights_squared)
        torch._foreach_copy_([layer.row_norm for layer in self.layers], list(norms))


def _shapes(layers: list[Any]) -> list[Shape]:
    alike: dict[Any, list[Any]] = {}
    for layer in layers:
        a, b, weight = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.get_base_layer().weight
        alike.setdefault((a.shape, b.shape, a.device, weight.dtype, layer.scaling[ADAPTER]), []).append(layer)
    return [Shape(group[start : start + LAYERS_AT_ONCE]) for group in alike.values() for start in range(0, len(group), LAYERS_AT_ONCE)]


@dataclass
class Fused:
    """What fuse() did: the fused layers, and of the others the reason by name. Keeps DoRA's row norms up to date.

    The norms change with A and B, hence once per optimizer step: a hook of every torch optimizer marks them stale, and so does any change
    that torch counts (load_state_dict, in-place edits); the next forward of the whole model renews them, before its micro-batches,
    accumulation and recompute share them.
    """

    layers: list[Any]
    refused: dict[str, str]
    renewals: int = 0  # of the norms
    _shapes: list[Shape] = field(default_factory=list, repr=False)
    _seen: tuple[int, tuple[float, ...]] = field(default=(-1, ()), repr=False)
    _is_stale: bool = field(default=True, repr=False)

    def mark_stale(self, *_: Any) -> None:
        self._is_stale = True

    def renew(self, *_: Any) -> None:
        """Renews the norms if anything they depend on has changed."""
        doras = [layer for layer in self.layers if layer.row_norm is not None and ADAPTER in layer.lora_A]
        versions = sum(layer.lora_A[ADAPTER].weight._version + layer.lora_B[ADAPTER].weight._version for layer in doras)
        seen = versions, tuple(layer.scaling[ADAPTER] for layer in doras)
        if not doras or (not self._is_stale and seen == self._seen):
            return
        device = doras[0].lora_A[ADAPTER].weight.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            if not self._shapes or seen[1] != self._seen[1] or self._shapes[0].weights_squared.device != device:
                self._shapes = _shapes(doras)
            for shape in self._shapes:
                shape.renew()
        self._seen, self._is_stale = seen, False
        self.renewals += 1

    def line(self) -> str:
        """One line for the terminal."""
        text = f"fused adapters: {len(self.layers)} layers"
        if self.refused:
            name, why = next(iter(self.refused.items()))
            text += f"; {len(self.refused)} stay with PEFT, first {name}: {why}"
        return text


def fuse(model: Any) -> Fused:
    """Gives every LoRA or DoRA layer that it knows the fused forward, in place; the model stays a PeftModel."""
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
    fused = Fused(layers, refused)
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.register_forward_pre_hook(fused.renew)
    inner.register_load_state_dict_post_hook(fused.mark_stale)
    mark_stale = weakref.WeakMethod(fused.mark_stale)
    hook = register_optimizer_step_post_hook(lambda *_: (mark := mark_stale()) and mark())
    weakref.finalize(fused, hook.remove)
    return fused


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
