"""The attention backends behind one signature, each through the call that a training run makes."""

from __future__ import annotations

import importlib.util
import statistics
import time
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from surefoot.attention import reference

if TYPE_CHECKING:
    from surefoot.attention.canary import Case, Tensors
    from surefoot.verdicts import Shape

SDPA = {
    "sdpa_cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa_flash": SDPBackend.FLASH_ATTENTION,
    "sdpa_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa_math": SDPBackend.MATH,
}
MASKS = {
    "eager": ("causal", "explicit", "packed"),
    **dict.fromkeys(SDPA, ("causal", "explicit", "packed")),
    "flash_attention_2": ("causal", "explicit", "packed"),
    "varlen": ("packed",),
    "flex": ("causal", "packed"),
}
# What backends raise for cases they do not take; a CUDA error is none of these and ends the process.
REFUSALS = (RuntimeError, NotImplementedError, ImportError, ValueError, AttributeError, TypeError, AssertionError)


def run(backend: str, case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output [rows, length, heads, head_dim] of a backend; see canary.Tensors for the shapes."""
    if backend == "varlen":
        return _varlen(case, query, key, value)
    if backend == "flash_attention_2":
        return _flash_attention_2(case, query, key, value)
    if backend == "flex":
        return _flex(case, query, key, value)
    if backend == "eager":
        return _eager(case, query, key, value)
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = None if case.mask == "causal" else reference.allowed(case, query.device)[:, None]
    with sdpa_kernel([SDPA[backend]]):
        return sdpa_attention_forward(_module(query, key), query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0]


def _eager(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """With an additive mask that is finite, as transformers builds it; eager knows no causal flag."""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    seen = reference.allowed(case, query.device)[:, None]
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill(~seen, torch.finfo(query.dtype).min)
    output: torch.Tensor = eager_attention_forward(_module(query, key), query, key, value, mask, scaling=query.shape[-1] ** -0.5)[0]
    return output


def _flash_attention_2(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if importlib.util.find_spec("flash_attn") is None:
        raise ImportError("flash-attn is not installed")
    from transformers.integrations.flash_attention import flash_attention_forward

    mask = reference.real(case, query.device).long() if case.mask == "explicit" else None
    packed = _borders(case, query.device) if case.mask == "packed" else {}
    module = _module(query, key, attention="flash_attention_2")
    output: torch.Tensor = flash_attention_forward(module, query, key, value, mask, scaling=query.shape[-1] ** -0.5, **packed)[0]
    return output


def _borders(case: Case, device: torch.device) -> dict[str, Any]:
    """Where the rows begin, as a training batch has it: the end stands twice, since a packed row of few rows ends in empty ones."""
    ends = torch.tensor((0, *case.lens, 0), device=device).cumsum(0).to(torch.int32)
    longest = max(case.lens)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def _varlen(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from surefoot.attention import packed

    borders = _borders(case, query.device)
    return packed.attention(_module(query, key), query, key, value, None, scaling=query.shape[-1] ** -0.5, **borders)[0]


def _flex(case: Case, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention.flex_attention import create_block_mask
    from transformers.integrations.flex_attention import flex_attention_forward

    if query.device.type != "cuda":
        raise NotImplementedError("its gradients need a CUDA GPU")
    seen = reference.allowed(case, query.device)

    def may_see(row: Any, head: Any, q: Any, k: Any) -> Any:
        return seen[row, q, k]

    block = create_block_mask(may_see, seen.shape[0], None, case.length, case.length, device=query.device)
    output: torch.Tensor = flex_attention_forward(_module(query, key), query, key, value, block, scaling=query.shape[-1] ** -0.5)[0]
    return output


def _module(query: torch.Tensor, key: torch.Tensor, attention: str = "") -> Any:
    """What the attention functions read of the layer that calls them."""
    groups = query.shape[1] // key.shape[1]
    config = SimpleNamespace(_attn_implementation=attention)
    return SimpleNamespace(num_key_value_groups=groups, training=True, is_causal=True, config=config, layer_idx=0)


def milliseconds(backend: str, case: Case, shape: Shape, given: Tensors) -> float | None:
    """Median of 5 forward and backward passes over shape.rows rows of the case (one packed row counts as one); None: no memory for them."""
    copies = 1 if case.mask == "packed" else max(1, shape.rows)
    lens = case.lens if case.mask == "packed" else (case.length,) * copies
    case = type(case)(mask=case.mask, length=case.length, lens=lens)
    leaves = [tensor[:1].repeat(copies, 1, 1, 1).requires_grad_() for tensor in given[:3]]
    gradient = given.gradient[:1].repeat(copies, 1, 1, 1)
    times = []
    try:
        for _ in range(7):
            _wait(gradient.device)
            began = time.perf_counter()
            run(backend, case, *leaves).backward(gradient)
            _wait(gradient.device)
            times.append((time.perf_counter() - began) * 1e3)
    except torch.OutOfMemoryError:
        return None
    return round(statistics.median(times[2:]), 3)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def refusal(error: BaseException) -> str:
    """Why a backend does not take a case, in one line.

    Raises:
        the error itself, where it is the GPU's: nothing that this process computes afterwards can be trusted.
    """
    text = str(error).strip()
    if "CUDA error" in text:
        raise error
    if "No viable backend" in text or "No available kernel" in text:
        return "torch has no such kernel for this case"
    return text.splitlines()[0][:160] if text else type(error).__name__
