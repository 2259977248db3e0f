"""Adapters for inference: what depends on weights only is computed once, so that a DoRA layer costs LoRA's products and one scaling.

    y = g (W x + b) + (x A^T) (g s B)^T + (1 - g) b        g = m / |W + s BA| by row (DoRA), 1 (LoRA)
PEFT's DoRA layer forms BA and the norm again at each forward pass, hence for each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

KNOWN = ("Linear", "Linear4bit", "Linear8bitLt")  # PEFT's layers over a torch or bitsandbytes linear layer


class ServedLinear(torch.nn.Module):
    """A base layer with its adapter, for inference only. is_on=False: the base layer alone."""

    g: Tensor | None
    shift: Tensor | None

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        super().__init__()
        (name,) = layer.active_adapters
        self.base, self.is_on = layer.get_base_layer(), True
        a, b = layer.lora_A[name].weight.float(), layer.lora_B[name].weight.float() * layer.scaling[name]
        g = _factors(layer, name, b @ a)
        bias = self.base.bias
        self.register_buffer("g", g)
        self.register_buffer("shift", None if g is None or bias is None else ((1 - g) * bias.float()).to(dtype))
        self.register_buffer("a", a.to(dtype))
        self.register_buffer("b", (b if g is None else g[:, None] * b).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if not self.is_on:
            return y
        u = torch.nn.functional.linear(x.to(self.a.dtype), self.a)  # type: ignore[arg-type]
        if self.g is None:
            flat = torch.addmm(y.flatten(0, -2), u.flatten(0, -2), self.b.t())  # type: ignore[operator]
            return flat.view_as(y)
        low = torch.nn.functional.linear(u, self.b, self.shift)  # type: ignore[arg-type]
        return torch.addcmul(low, y, self.g, out=y)  # g stays fp32: one rounding


def _factors(layer: Any, name: str, product: Tensor) -> Tensor | None:
    """DoRA's g [out] in fp32; None for LoRA. product: s BA [out, in], fp32."""
    if name not in layer.lora_magnitude_vector:
        return None
    weight = dequantize_module_weight(layer.get_base_layer()).float()
    magnitude: Tensor = layer.lora_magnitude_vector[name].weight.float()
    norm: Tensor = torch.linalg.vector_norm(weight + product.to(weight.device), dim=1)
    return magnitude / norm


@torch.no_grad()
def serve(model: PeftModel, dtype: torch.dtype) -> tuple[Any, dict[str, str]]:
    """The base model with ServedLinear in place of each adapter layer that it knows, and of the others the reason by name.

    Args:
        dtype: of the activations; A and g s B are rounded to it once.
    """
    inner = model.get_base_model()
    kept: dict[str, str] = {}
    for name, layer in list(inner.named_modules()):
        if not isinstance(layer, lora.LoraLayer):
            continue
        if obstacle := _obstacle(layer):
            kept[name] = obstacle
            continue
        parent, _, leaf = name.rpartition(".")
        setattr(inner.get_submodule(parent), leaf, ServedLinear(layer, dtype))
    return inner, kept


def _obstacle(layer: Any) -> str:
    if type(layer).__name__ not in KNOWN or getattr(layer, "fan_in_fan_out", False):
        return f"{type(layer).__name__} is not a plain linear layer"
    if len(layer.active_adapters) != 1 or layer.merged:
        return "it has several adapters, or a merged one"
    (name,) = layer.active_adapters
    variant = layer.lora_variant.get(name)
    if layer.lora_bias[name] or (variant is not None and type(variant) is not DoraLinearVariant):
        return "its adapter is neither LoRA nor DoRA as the papers have them"
    return ""


@contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """The base model's own answers, inside the block."""
    layers = [module for module in model.modules() if isinstance(module, ServedLinear | BaseTunerLayer | ModulesToSaveWrapper)]

    def switch(is_on: bool) -> None:
        for layer in layers:
            if isinstance(layer, ServedLinear):
                layer.is_on = is_on
            else:  # PEFT's own layers, and modules_to_save
                layer.enable_adapters(is_on)

    switch(False)
    try:
        yield
    finally:
        switch(True)
