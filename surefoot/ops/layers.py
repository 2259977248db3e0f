"""FusedLinear and FusedMLP: PEFT's LoRA and DoRA layers, and the SwiGLU block of three of them, with surefoot's products.

Parameters, names and files stay PEFT's: only forward() is another. A layer asked for anything but plain training or inference with the one
adapter (merged, switched off, several adapters) answers with PEFT's own forward(). ops/fuse.py puts them into a model.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.import_utils import is_bnb_4bit_available
from peft.tuners import lora
from torch import Tensor

from surefoot.ops.linear import adapted_linears, scaled_rows
from surefoot.ops.mlp import Factors, adapted_mlp
from surefoot.ops.quantized import pieces

ADAPTER = "default"


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
        if layer.place != 0 or not have_one_scale(self.layers):
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
        if not all(isinstance(layer, Fusion) and layer.is_plain() and not layer.drops() for layer in layers) or not have_one_scale(layers):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[operator, no-any-return]
        gate, up, down = layers
        factors = None
        if gate.row_norm is not None:
            magnitudes = [layer.lora_magnitude_vector[ADAPTER].weight for layer in (gate, up)]
            factors = Factors(*magnitudes, gate.row_norm, up.row_norm)
        weights = [piece for layer in layers for piece in pieces(layer.get_base_layer())]
        a, b = [layer.lora_A[ADAPTER].weight for layer in layers], [layer.lora_B[ADAPTER].weight for layer in layers]
        return down.finished(adapted_mlp(x, weights, a, b, gate.scaling[ADAPTER], factors))  # type: ignore[no-any-return]


def have_one_scale(layers: list[Any]) -> bool:
    return len({layer.scaling[ADAPTER] for layer in layers}) == 1
