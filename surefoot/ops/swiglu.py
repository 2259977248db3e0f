"""silu(g_1 a) g_2 b (SwiGLU, arXiv 2002.05202) with DoRA's factors g, and its gradients: plain torch, or one Triton kernel on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor, gate_factor: Tensor | None, up_factor: Tensor | None) -> Tensor:
    """silu(gate_factor gate) up_factor up, in fp32 with one rounding.

    Args:
        gate, up: [rows, columns]; the factors: [columns], fp32, both or none (1).
    """
    if gate.is_cuda and gate.dtype != torch.float64:
        from surefoot.ops import kernels

        return kernels.swiglu(gate, up, gate_factor, up_factor)
    g, u = _times(gate, gate_factor), _times(up, up_factor)
    return (torch.nn.functional.silu(g) * u).to(gate.dtype)


def swiglu_backward(
    gate: Tensor, up: Tensor, d_out: Tensor, gate_factor: Tensor | None, up_factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d gate and d up [rows, columns], d gate_factor and d up_factor (fp32 [columns]; [0] without factors).

    Args:
        d_out: [rows, columns], the gradient of swiglu()'s result, which takes its place: who needs one next needs the other.
    """
    if gate.is_cuda and gate.dtype != torch.float64:
        from surefoot.ops import kernels

        return kernels.swiglu_backward(gate, up, d_out, gate_factor, up_factor)
    g, u, d = _times(gate, gate_factor), _times(up, up_factor), _times(d_out, None)
    sigmoid = torch.sigmoid(g)
    silu = g * sigmoid
    dg, du = d * u * (sigmoid + silu * (1 - sigmoid)), d * silu
    d_out.copy_(silu * u)
    if gate_factor is None or up_factor is None:
        return dg.to(gate.dtype), du.to(up.dtype), g.new_empty(0), g.new_empty(0)
    sums = (dg * gate).sum(dim=0), (du * up).sum(dim=0)
    return (dg * gate_factor).to(gate.dtype), (du * up_factor).to(up.dtype), *sums


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide if factor is None else wide * factor
