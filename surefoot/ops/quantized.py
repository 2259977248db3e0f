"""Frozen weights as the operations take them: a list of tensors, one where the weight is dense, six where it is NF4 (QLoRA, 2305.14314)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

NF4_PIECES = 6
BLOCK, OUTER_BLOCK = 64, 256  # bitsandbytes' block sizes of the weights and of their scales


def pieces(base: Any) -> list[Tensor]:
    """The tensors of a frozen linear layer's weight: packed, scales, code, offset, outer scales, outer code for NF4."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return [base.weight]
    return [base.weight.data, state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]


def weight_of(base: Any) -> Tensor:
    """The dense weight [out, in] of a frozen linear layer: its own, or made from its pieces in the dtype of its products."""
    parts, state = pieces(base), getattr(base.weight, "quant_state", None)
    return parts[0] if state is None else _dequantized(parts, (state.shape[0], state.shape[1]), state.dtype)


def obstacle(base: Any) -> str:
    """Why the weight of a 4-bit layer cannot be read here, empty if it can."""
    state = getattr(base.weight, "quant_state", None)
    if state is None:
        return "its weight is not quantized yet"
    if state.quant_type != "nf4" or not state.nested or state.blocksize != BLOCK or state.state2.blocksize != OUTER_BLOCK:
        return f"its weight is {state.quant_type} in blocks of {state.blocksize}, not doubly quantized NF4"
    return ""


def dense(flat: Sequence[Tensor], b: Sequence[Tensor], in_features: int) -> list[Tensor]:
    """The weights [out_k, in] of the layers whose B are `b` [out_k, r], in b's dtype, from their pieces one after the other."""
    if len(flat) == len(b):
        return [weight.to(b[0].dtype) for weight in flat]
    starts = range(0, len(flat), NF4_PIECES)
    return [
        _dequantized(flat[start : start + NF4_PIECES], (up.shape[0], in_features), up.dtype) for start, up in zip(starts, b, strict=True)
    ]


def _dequantized(parts: Sequence[Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    from bitsandbytes.functional import QuantState, dequantize_4bit

    packed, scales, code, offset, outer_scales, outer_code = parts
    outer = QuantState(absmax=outer_scales, code=outer_code, blocksize=OUTER_BLOCK, dtype=torch.float32)
    state = QuantState(scales, torch.Size(shape), code, BLOCK, "nf4", dtype, offset, outer)
    return dequantize_4bit(packed, state)
