"""Attention inside the rows of a packed row through torch's varlen kernel; batches that are not packed take transformers' sdpa way."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from surefoot.errors import BackendError

try:
    from torch.nn.attention.varlen import varlen_attn
except ModuleNotFoundError:  # torch 2.6 and 2.8, of stages 1 and 2
    varlen_attn = None

NAME = "surefoot_varlen"
# torch 2.12; 2.11 wants as many key as query heads
KNOWS_GROUPS = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def use_varlen(model: Any) -> None:
    """Makes the model, adapted or not, attend through attention(). transformers then builds no mask and looks for no packed rows.

    Raises:
        BackendError: its code does not take its attention from transformers' table.
    """
    AttentionInterface.register(NAME, attention)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    base.set_attn_implementation(NAME)
    if base.config._attn_implementation != NAME:
        raise BackendError(f"--packing: {type(base).__name__} does not take another attention function. Use --packing=False")


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **named: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each stretch of a packed row, as transformers calls its attention functions.

    Args:
        query: [1, heads, slots, head_dim]; key and value: [1, kv_heads, slots, head_dim]. fp32 of an autocast region is cast, as sdpa does.
        named: cu_seq_lens_q (int32 [segments + 1]) and max_length_q (int) for a packed row.

    Returns:
        [1, slots, heads, head_dim], and no weights.

    Raises:
        NotImplementedError: attention dropout, which the kernel does not have; or torch has no such kernel.
    """
    if named.get("cu_seq_lens_q") is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **named)
    if varlen_attn is None:
        raise NotImplementedError(f"torch {torch.__version__} has no varlen attention")
    if dropout:
        raise NotImplementedError(f"varlen attention has no dropout, and the model asks for {dropout}")
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    query, key, value = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    grouped = {"enable_gqa": True} if KNOWS_GROUPS else {}
    if not KNOWS_GROUPS and query.shape[1] != key.shape[1]:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    ends, longest = named["cu_seq_lens_q"], named["max_length_q"]
    output = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling, window_size=(-1, 0), **grouped)
    return output[None], None
