"""FusedLinear: PEFT's LoRA or DoRA layer with surefoot's products; fuse() puts it into a model, layer by layer, or says why not.

Parameters, names and files stay PEFT's: only forward() is another. A layer asked for anything but plain training or inference with the one
adapter (merged, switched off, several adapters) answers with PEFT's own forward().
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers.activations import SiLUActivation

from surefoot.ops import quantized
from surefoot.ops.linear import adapted_linears, scaled_rows
from surefoot.ops.mlp import Factors, adapted_mlp
from surefoot.ops.norms import row_norms, squared_rows
from surefoot.ops.quantized import pieces, weight_of

ADAPTER = "default"
SWIGLU_BLOCKS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP", "SmolLM3MLP", "Olmo2MLP")  # whose forward is down(act(gate(x)) * up(x))
LAYERS_AT_ONCE = 32  # whose row norms are renewed together: 0.3 GB of temporaries at 14,336 x 4,096
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # layers of one block that are given the same input


class Siblings:
    """Layers that share their input: the first computes for all, so that the input is read once, and keeps what the others will ask for."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers
        self.input: Tensor | None = None
        self.waiting: dict[int, Tensor] = {}

    def raw(self, layer: Any, x: Tensor) -> Tensor:
        """[..., out]: x W^T + s x A^T B^T of `layer`."""
        if self.input is x and layer.place in self.waiting:
            found = self.waiting.pop(layer.place)
            if not self.waiting:
                self.input = None
            return found
        self.waiting.clear()
        self.input = None
        if layer.place != 0 or not _have_one_scale(self.layers):
            return layer.products(x, [layer])[0]
        first, *others = layer.products(x, self.layers)
        if others:
            self.waiting.update({index + 1: other for index, other in enumerate(others)})
            self.input = x
        return first


class Fusion:
    """What FusedLinear adds to a layer of PEFT."""

    is_fused = True  # False: PEFT's own forward, for whoever wants to compare
    siblings: Siblings
    place: int
    row_norm: Tensor | None

    def forward(self, x: Tensor, *args: Any, **named: Any) -> Tensor:
        if args or named or not self.is_plain():
            return super().forward(x, *args, **named)  # type: ignore[no-any-return]
        if self.drops():
            return self._with_dropout(x, self.lora_dropout[ADAPTER](x))
        return self.finished(self.siblings.raw(self, x))

    def is_plain(self) -> bool:
        """True where the layer does what it was made for: one adapter, not merged, not switched off."""
        return self.is_fused and not self.disable_adapters and not self.merged and self.active_adapters == [ADAPTER]

    def drops(self) -> bool:
        """True where dropout changes the adapter's input."""
        return self.training and not isinstance(self.lora_dropout[ADAPTER], torch.nn.Identity)

    def finished(self, raw: Tensor) -> Tensor:
        """The layer's output from its raw product: DoRA's factor and the bias."""
        if self.row_norm is not None:
            raw = scaled_rows(raw, self.lora_magnitude_vector[ADAPTER].weight, self.row_norm)
        bias = self.get_base_layer().bias
        return raw if bias is None else raw + bias.to(raw.dtype)

    def _with_dropout(self, x: Tensor, dropped: Tensor) -> Tensor:
        """PEFT's convention: y = W x + (g - 1) W d(x) + g s BA d(x), a second base product for DoRA."""
        base, a, b = self.get_base_layer(), self.lora_A[ADAPTER].weight, self.lora_B[ADAPTER].weight
        low_rank = torch.nn.functional.linear(torch.nn.functional.linear(dropped, a), self.scaling[ADAPTER] * b)
        if self.row_norm is None:
            return base(x) + low_rank  # type: ignore[no-any-return]
        plain = base(dropped) if base.bias is None else base(dropped) - base.bias
        factor = self.lora_magnitude_vector[ADAPTER].weight / self.row_norm
        y = base(x)
        return (y + (factor - 1) * plain + factor * low_rank).to(y.dtype)  # type: ignore[no-any-return]

    def products(self, x: Tensor, layers: list[Any]) -> tuple[Tensor, ...]:
        """raw of each of `layers`, which have the same input and scale."""
        weights = [piece for layer in layers for piece in pieces(layer.get_base_layer())]
        a, b = [layer.lora_A[ADAPTER].weight for layer in layers], [layer.lora_B[ADAPTER].weight for layer in layers]
        return adapted_linears(x, weights, a, b, self.scaling[ADAPTER])


class FusedLinear(Fusion, lora.Linear):  # type: ignore[misc]
    """Set by fuse() on a PEFT layer in place."""


def _fused_classes() -> dict[type, type]:
    """Of PEFT's layer classes the fused ones; bitsandbytes' only where it is installed."""
    classes: dict[type, type] = {lora.Linear: FusedLinear}
    if is_bnb_4bit_available():
        classes[lora.Linear4bit] = type("FusedLinear4bit", (Fusion, lora.Linear4bit), {})
    return classes


FUSED_CLASSES = _fused_classes()


class FusedMLP(torch.nn.Module):
    """Set by fuse() on a SwiGLU block of three fused layers in place."""

    def forward(self, x: Tensor) -> Tensor:
        layers = [self.gate_proj, self.up_proj, self.down_proj]
        if not all(isinstance(layer, Fusion) and layer.is_plain() and not layer.drops() for layer in layers) or not _have_one_scale(layers):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[operator, no-any-return]
        gate, up, down = layers
        factors = None
        if gate.row_norm is not None:
            magnitudes = [layer.lora_magnitude_vector[ADAPTER].weight for layer in (gate, up)]
            factors = Factors(*magnitudes, gate.row_norm, up.row_norm)
        weights = [piece for layer in layers for piece in pieces(layer.get_base_layer())]
        a, b = [layer.lora_A[ADAPTER].weight for layer in layers], [layer.lora_B[ADAPTER].weight for layer in layers]
        return down.finished(adapted_mlp(x, weights, a, b, gate.scaling[ADAPTER], factors))  # type: ignore[no-any-return]


def _have_one_scale(layers: list[Any]) -> bool:
    return len({layer.scaling[ADAPTER] for layer in layers}) == 1


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
