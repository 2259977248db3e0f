"""SwiGLU with DoRA's row factors, forward and backward, as Triton kernels. Imported only where a GPU runs them.

One pass over memory each. Eight elements a thread keep the backward pass within the registers of a full multiprocessor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS, ROWS, WARPS = 512, 2, 8  # of a tile; the fastest of 44 on an H200 at 8,192 x 14,336
STRIP = 128  # rows a program of the backward pass goes through; its sums are added to the other strips' afterwards


@triton.jit
def swiglu_kernel(  # type: ignore[no-untyped-def]
    gate, up, gate_factor, up_factor, out, rows, columns, has_factors: tl.constexpr, n_rows: tl.constexpr, n_columns: tl.constexpr
):
    column = tl.program_id(0) * n_columns + tl.arange(0, n_columns)
    row = tl.arange(0, n_rows)
    first = tl.program_id(1).to(tl.int64) * n_rows
    offset = row[:, None] * columns + column[None, :]
    mask = (row[:, None] < rows - first) & (column[None, :] < columns)
    g = tl.load(gate + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(up + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
    if has_factors:
        g *= tl.load(gate_factor + column, mask=column < columns, other=0.0)[None, :]
        u *= tl.load(up_factor + column, mask=column < columns, other=0.0)[None, :]
    tl.store(out + first * columns + offset, (g * tl.sigmoid(g) * u).to(out.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_backward_kernel(  # type: ignore[no-untyped-def]
    gate, up, d_out, gate_factor, up_factor, d_gate, d_up, sums, rows, columns,
    has_factors: tl.constexpr, n_rows: tl.constexpr, n_columns: tl.constexpr, strip: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * n_columns + tl.arange(0, n_columns)
    row = tl.arange(0, n_rows)
    inside = column < columns
    offset = row[:, None] * columns + column[None, :]
    gf = tl.full([1, n_columns], 1.0, tl.float32)
    uf = gf
    if has_factors:
        gf = tl.load(gate_factor + column, mask=inside, other=0.0)[None, :]
        uf = tl.load(up_factor + column, mask=inside, other=0.0)[None, :]
    gate_sum = tl.zeros([n_rows, n_columns], tl.float32)
    up_sum = tl.zeros([n_rows, n_columns], tl.float32)
    for start in range(0, strip, n_rows):
        first = tl.program_id(1).to(tl.int64) * strip + start
        mask = (row[:, None] < rows - first) & inside[None, :]
        raw_g = tl.load(gate + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
        raw_u = tl.load(up + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(d_out + first * columns + offset, mask=mask, other=0.0).to(tl.float32)
        g = raw_g * gf
        u = raw_u * uf
        sigmoid = tl.sigmoid(g)
        silu = g * sigmoid
        du = d * silu
        dg = d * u * (sigmoid + silu - silu * sigmoid)
        if has_factors:
            gate_sum += dg * raw_g
            up_sum += du * raw_u
        tl.store(d_gate + first * columns + offset, (dg * gf).to(d_gate.dtype.element_ty), mask=mask)
        tl.store(d_up + first * columns + offset, (du * uf).to(d_up.dtype.element_ty), mask=mask)
        tl.store(d_out + first * columns + offset, (silu * u).to(d_out.dtype.element_ty), mask=mask)
    if has_factors:
        place = sums + tl.program_id(1).to(tl.int64) * 2 * columns + column
        tl.store(place, tl.sum(gate_sum, axis=0), mask=inside)
        tl.store(place + columns, tl.sum(up_sum, axis=0), mask=inside)


def swiglu(gate: Tensor, up: Tensor, gate_factor: Tensor | None, up_factor: Tensor | None) -> Tensor:
    """See ops.swiglu.swiglu()."""
    rows, columns = gate.shape
    out = torch.empty_like(gate)
    swiglu_kernel[triton.cdiv(columns, COLUMNS), triton.cdiv(rows, ROWS)](
        gate, up, gate_factor, up_factor, out, rows, columns, gate_factor is not None, ROWS, COLUMNS, num_warps=WARPS
    )
    return out


def swiglu_backward(
    gate: Tensor, up: Tensor, d_out: Tensor, gate_factor: Tensor | None, up_factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ops.swiglu.swiglu_backward()."""
    rows, columns = gate.shape
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    strips = triton.cdiv(rows, STRIP)
    sums = torch.empty(strips, 2, columns if gate_factor is not None else 0, dtype=torch.float32, device=gate.device)
    swiglu_backward_kernel[triton.cdiv(columns, COLUMNS), strips](
        gate, up, d_out, gate_factor, up_factor, d_gate, d_up, sums, rows, columns,
        gate_factor is not None, ROWS, COLUMNS, STRIP, num_warps=WARPS,
    )  # fmt: skip
    return d_gate, d_up, sums[:, 0].sum(dim=0), sums[:, 1].sum(dim=0)
