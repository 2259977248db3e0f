"""A SwiGLU block with LoRA or DoRA on its three layers as one operation, which keeps gate and up and nothing else of their width.

The backward pass makes silu(y_gate) y_up again where it needs gate and up anyway, and takes there the sums that give the gradients of
DoRA's magnitudes: dm_j = sum_t dy_tj raw_tj / c_j. A recompute ends with gate and up: recomputed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from surefoot.ops import recomputed
from surefoot.ops.linear import compute_dtype, input_gradient, low_rank_gradients, products, scaled, stacked, wide_product
from surefoot.ops.quantized import dense
from surefoot.ops.swiglu import swiglu, swiglu_backward


class Factors(NamedTuple):
    """DoRA's magnitudes m (trained) and norms c (constant) of gate and up, [width] fp32 each."""

    gate_magnitude: Tensor
    up_magnitude: Tensor
    gate_norm: Tensor
    up_norm: Tensor


def adapted_mlp(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], scaling: float, factors: Factors | None) -> Tensor:
    """down's raw product of silu(y_gate) y_up, its own magnitude and bias not applied.

    Args:
        x: [..., in]; weights (pieces), a and b of gate, up and down as adapted_linears() has them; factors: of gate and up under DoRA.

    Returns:
        [..., out] in the compute dtype. Gradients reach x, a, b and the magnitudes.
    """
    return _Mlp.apply(x, scaling, compute_dtype(x), factors is not None, *a, *b, *(factors or ()), *weights)  # type: ignore[no-untyped-call, no-any-return]


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, scaling: float, dtype: torch.dtype, has_factors: bool, *tensors: Tensor) -> Tensor:  # type: ignore[override]
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        raw, *kept = _forward(rows, *_operands(tensors, scaling, dtype, has_factors))
        context.save_for_backward(rows, *kept, *tensors)
        context.scaling, context.shape, context.x_dtype, context.has_factors = scaling, x.shape, x.dtype, has_factors
        return raw.view(*x.shape[:-1], raw.shape[-1])

    @staticmethod
    def backward(context: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows, gate, up, u, u_down, *tensors = context.saved_tensors
        flat = dy.reshape(-1, dy.shape[-1]).to(rows.dtype)
        operands = _operands(tensors, context.scaling, rows.dtype, context.has_factors)
        needs_dx = context.needs_input_grad[0]
        da, da_down, db_gate, db_up, db_down, d_gate, d_up, dx = _backward(flat, [rows, gate, up, u, u_down], *operands, needs_dx)
        masters = zip((*da.chunk(2), da_down, db_gate, db_up, db_down), tensors[:6], strict=True)
        gradients = [part.to(master.dtype) for part, master in masters]
        dm = [d_gate / tensors[8], d_up / tensors[9]] if context.has_factors else []
        return (
            dx.view(context.shape).to(context.x_dtype) if needs_dx else None,
            *(None,) * 3,
            *gradients[:3],
            *(context.scaling * gradient for gradient in gradients[3:]),
            *dm,
            *(None for _ in tensors[6 + len(dm) :]),
        )


def _operands(tensors: Any, scaling: float, dtype: torch.dtype, has_factors: bool) -> tuple[list[Tensor], ...]:
    """The weights' pieces, stacked A of gate and up with A of down, s B of each, and the row factors m / c."""
    a, b, rest = tensors[:3], tensors[3:6], tensors[6:]
    factors = [rest[0] / rest[2], rest[1] / rest[3]] if has_factors else []
    weights = list(rest[4:] if has_factors else rest)
    return weights, [stacked(a[:2], dtype), a[2].to(dtype)], [scaled(one, scaling, dtype) for one in b], factors


@torch.library.custom_op(
    "surefoot::adapted_mlp", mutates_args=(), schema="(Tensor x, Tensor[] weights, Tensor[] a, Tensor[] b, Tensor[] factors) -> Tensor[]"
)
def _forward(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    into, out = _dense(weights, a, b)
    u, gate, up = products(x, into(), a[0], b[:2])
    u_down, raw = recomputed.once(
        lambda: products(swiglu(gate, up, *(factors or (None, None))), out(), a[1], b[2:]),
        lambda: x.new_full((x.shape[0], b[2].shape[0]), float("nan")),  # not zeros: whoever used it would be told
        needs_raw=bool(factors),
    )
    return [raw, gate, up, u, u_down]


@_forward.register_fake
def _(x: Tensor, weights: list[Tensor], a: list[Tensor], b: list[Tensor], factors: list[Tensor]) -> list[Tensor]:
    widths = b[2].shape[0], b[0].shape[0], b[1].shape[0], a[0].shape[0], a[1].shape[0]
    return [x.new_empty(x.shape[0], width) for width in widths]


@torch.library.custom_op(
    "surefoot::adapted_mlp_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor[] kept, Tensor[] weights, Tensor[] a, Tensor[] b, Tensor[] factors, bool needs_dx) -> Tensor[]",
)
def _backward(
    dy: Tensor, kept: list[Tensor], weights: list[Tensor], a: list[Tensor], b: list[Tensor], factors: list[Tensor], needs_dx: bool
) -> list[Tensor]:
    x, gate, up, u, u_down = kept
    into, out = _dense(weights, a, b)
    p_down, (db_down,) = low_rank_gradients([dy], u_down, b[2:])
    product = input_gradient([dy], out(), p_down, a[1])  # the gradient of the product, until swiglu_backward() puts the product there
    d_gate, d_up, *d_factors = swiglu_backward(gate, up, product, *(factors or (None, None)))
    da_down = wide_product(p_down.t(), product)
    del product
    p, db = low_rank_gradients([d_gate, d_up], u, b[:2])
    dx = input_gradient([d_gate, d_up], into(), p, a[0]) if needs_dx else x.new_empty(0)
    return [wide_product(p.t(), x), da_down, *db, db_down, *d_factors, dx]


@_backward.register_fake
def _(
    dy: Tensor, kept: list[Tensor], weights: list[Tensor], a: list[Tensor], b: list[Tensor], factors: list[Tensor], needs_dx: bool
) -> list[Tensor]:
    x = kept[0]
    wide = torch.promote_types(x.dtype, torch.float32)
    masters = [one.new_empty(one.shape, dtype=wide) for one in (*a, *b)]
    sums = [x.new_empty(b[0].shape[0] if factors else 0, dtype=wide) for _ in range(2)]
    return [*masters, *sums, torch.empty_like(x) if needs_dx else x.new_empty(0)]


def _dense(weights: list[Tensor], a: list[Tensor], b: list[Tensor]) -> tuple[Callable[[], list[Tensor]], Callable[[], list[Tensor]]]:
    """Makers of the dense weights of gate and up, and of down: each called where its product is, so that only those in use exist."""
    border = len(weights) // 3 * 2
    return partial(dense, weights[:border], b[:2], a[0].shape[1]), partial(dense, weights[border:], b[2:], a[1].shape[1])
