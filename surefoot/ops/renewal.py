"""Norms: keeps the row norms of DoRA layers up to date, once per optimizer step, for the whole model or for one decoder layer."""

from __future__ import annotations

from typing import Any

import torch

from surefoot.ops.layers import ADAPTER
from surefoot.ops.norms import row_norms, squared_rows
from surefoot.ops.quantized import weight_of

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


class Norms:
    """The row norms of `layers`, which change with A and B, hence once per optimizer step.

    mark_stale() says that they may have changed; so does any change that torch counts (load_state_dict, in-place edits), but of tensors
    that an engine gathers anew for every pass (sees_changes False) the counts mean nothing.
    """

    def __init__(self, layers: list[Any], *, sees_changes: bool) -> None:
        self.layers = [layer for layer in layers if layer.row_norm is not None]
        self.sees_changes = sees_changes
        self.renewals = 0
        self._shapes: list[Shape] = []
        self._seen: tuple[int, tuple[float, ...]] = (-1, ())
        self._is_stale = True

    def mark_stale(self, *_: Any) -> None:
        self._is_stale = True

    def renew(self, *_: Any) -> None:
        """Renews the norms if anything they depend on has changed; the weights must be whole."""
        doras = [layer for layer in self.layers if ADAPTER in layer.lora_A]
        seen = self._changes(doras), tuple(layer.scaling[ADAPTER] for layer in doras)
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

    def _changes(self, layers: list[Any]) -> int:
        if not self.sees_changes:
            return 0
        return sum(layer.lora_A[ADAPTER].weight._version + layer.lora_B[ADAPTER].weight._version for layer in layers)
