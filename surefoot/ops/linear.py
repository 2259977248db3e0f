"""LoRA and DoRA products of linear layers that share their input, with the backward pass that needs no second base product.

For layers k with frozen W_k [out_k, in], A_k [r, in], B_k [out_k, r] and scale s (LoRA, arXiv 2106.09685; DoRA, arXiv 2402.09353):
    u_k = x A_k^T        raw_k = x W_k^T + u_k (s B_k)^T        y_k = g_k raw_k        g = m / c (DoRA), 1 (LoRA)
    p_k = G_k (s B_k)    dx = sum_k G_k W_k + p_k A_k    dA_k = p_k^T x    dB_k = s G_k^T u_k    G = g dy
The low-rank part is written first and the base product is added onto it by the same GEMM, so that no pass over y is left over.
x W^T is computed once and in the compute dtype, sums in fp32; gradients of A and B leave the GEMM in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from surefoot.ops.quantized import dense


def adapted_linears(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], scaling: float) -> tuple[Tensor, ...]:
    """raw_k = x W_k^T + s x A_k^T B_k^T for each layer, without bias.

    Args:
        x: [..., in]; under autocast it is cast to autocast's dtype, as every linear layer's input.
        weights: pieces() of each layer's frozen weight, one after the other.
        a: [r, in] each, fp32 masters; b: [out_k, r] each, fp32 masters.

    Returns:
        [..., out_k] each, in the compute dtype. Gradients reach x, a and b.
    """
    dtype = compute_dtype(x)
    outputs = _AdaptedLinears.apply(x, scaling, dtype, len(a), *a, *b, *weights)  # type: ignore[no-untyped-call]
    return tuple(outputs)


def scaled_rows(raw: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """DoRA's y = raw m / c, the factor in fp32 and one rounding; c is a constant for autograd (DoRA, section 4.3).

    Args:
        raw: [..., out]; magnitude: [out], fp32, trained; norm: [out], fp32, the row norms c of W + s BA.

    Returns:
        [..., out] in raw's dtype.
    """
    if torch.compiler.is_compiling():  # which fuses it; and Dynamo of torch 2.11 gives the Function below zero gradients in fp32
        return (raw * (magnitude / norm)).to(raw.dtype)
    return _ScaledRows.apply(raw, magnitude, norm)  # type: ignore[no-untyped-call, no-any-return]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Autocast's dtype where it is on, else x's own."""
    return torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype


class _AdaptedLinears(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, scaling: float, dtype: torch.dtype, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        a, b, weights = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        u, *raw = _forward(rows, list(weights), stacked(a, dtype), [scaled(one, scaling, dtype) for one in b])
        context.save_for_backward(rows, u, *tensors)
        context.scaling, context.shape, context.x_dtype, context.count = scaling, x.shape, x.dtype, count
        return tuple(one.view(*x.shape[:-1], one.shape[-1]) for one in raw)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, u, *tensors = context.saved_tensors
        count, dtype = context.count, rows.dtype
        a, b, weights = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        flat = [gradient.reshape(-1, gradient.shape[-1]).to(dtype) for gradient in gradients]
        needs_dx = context.needs_input_grad[0]
        scaled_b = [scaled(one, context.scaling, dtype) for one in b]
        da, dx, *db = _backward(flat, rows, u, weights, stacked(a, dtype), scaled_b, needs_dx)
        return (
            dx.view(context.shape).to(context.x_dtype) if needs_dx else None,
            *(None,) * 3,
            *(part.to(master.dtype) for part, master in zip(da.chunk(count), a, strict=True)),
            *((context.scaling * part).to(master.dtype) for part, master in zip(db, b, strict=True)),
            *(None for _ in weights),
        )


def stacked(a: Any, dtype: torch.dtype) -> Tensor:
    """The A of several layers as one [n r, in] matrix in `dtype`."""
    return torch.cat([one.to(dtype) for one in a])


def scaled(b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    """s B in `dtype`, rounded once."""
    return (scaling * b).to(dtype)


# schemas are spelled out: torch 2.6 does not infer them from list[Tensor]
@torch.library.custom_op(
    "surefoot::adapted_linears", mutates_args=(), schema="(Tensor x, Tensor[] weights, Tensor a, Tensor[] b) -> Tensor[]"
)
def _forward(x: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor]) -> list[Tensor]:
    return products(x, dense(weights, b, x.shape[1]), a, b)


@_forward.register_fake
def _(x: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], a.shape[0]), *(x.new_empty(x.shape[0], up.shape[0]) for up in b)]


@torch.library.custom_op(
    "surefoot::adapted_linears_backward",
    mutates_args=(),
    schema="(Tensor[] gradients, Tensor x, Tensor u, Tensor[] weights, Tensor a, Tensor[] b, bool needs_dx) -> Tensor[]",
)
def _backward(
    gradients: list[Tensor], x: Tensor, u: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor], needs_dx: bool
) -> list[Tensor]:
    p, db = low_rank_gradients(gradients, u, b)
    return [wide_product(p.t(), x), input_gradient(gradients, dense(weights, b, x.shape[1]), p, a) if needs_dx else x.new_empty(0), *db]


@_backward.register_fake
def _(gradients: list[Tensor], x: Tensor, u: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor], needs_dx: bool) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dx = torch.empty_like(x) if needs_dx else x.new_empty(0)
    return [a.new_empty(a.shape, dtype=wide), dx, *(one.new_empty(one.shape, dtype=wide) for one in b)]


def products(x: Tensor, weights: list[Tensor], a: Tensor, b: list[Tensor]) -> list[Tensor]:
    """u = x A^T of all layers together, [rows, n r], then raw_k = x W_k^T + u_k B_k^T of each. B holds the scale."""
    u = x @ a.t()
    outputs = [u]
    for weight, up, part in zip(weights, b, u.chunk(len(weights), dim=1), strict=True):
        outputs.append((part @ up.t()).addmm_(x, weight.t()))
    return outputs


def low_rank_gradients(gradients: list[Tensor], u: Tensor, b: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """p = G_k B_k of all layers together, [rows, n r], and G_k^T u_k of each, fp32."""
    p = torch.empty_like(u)
    for gradient, up, part in zip(gradients, b, p.chunk(len(b), dim=1), strict=True):
        torch.mm(gradient, up, out=part)
    return p, [wide_product(gradient.t(), part) for gradient, part in zip(gradients, u.chunk(len(b), dim=1), strict=True)]


def input_gradient(gradients: list[Tensor], weights: list[Tensor], p: Tensor, a: Tensor) -> Tensor:
    """dx = p A + sum_k G_k W_k."""
    dx = p @ a
    for gradient, weight in zip(gradients, weights, strict=True):
        dx.addmm_(gradient, weight)
    return dx


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right with fp32 sums that stay fp32."""
    if has_wide_mm(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = torch.promote_types(left.dtype, torch.float32)
    return left.to(wide) @ right.to(wide)


def has_wide_mm(operand: Tensor) -> bool:
    """Whether torch.mm() keeps the fp32 sums of such 16-bit operands: on a GPU, from torch 2.8 on."""
    return operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16) and "dtype" in torch.ops.aten.mm.overloads()


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, raw: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:  # type: ignore[override]
        context.save_for_backward(raw, magnitude, norm)
        return times(raw, magnitude / norm)

    @staticmethod
    def backward(context: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        raw, magnitude, norm = context.saved_tensors
        wide = torch.promote_types(dy.dtype, torch.float32)
        dm = (dy * raw).reshape(-1, raw.shape[-1]).sum(dim=0, dtype=wide) / norm
        return times(dy, magnitude / norm), dm.to(magnitude.dtype), None


def times(wide: Tensor, factor: Tensor) -> Tensor:
    """wide * factor in the wider of both dtypes, rounded once to wide's."""
    return torch.mul(wide, factor, out=torch.empty_like(wide))
