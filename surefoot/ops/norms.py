"""DoRA's row norms of W + s BA from the factors, for all layers of one shape at once and without any product BA.

c^2 = |W|^2 + 2 s sum(B * (W A^T)) + s^2 sum((B A A^T) * B), sums over a row: one read of each W ("Scaling DoRA", arXiv 2603.22276).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from surefoot.ops.linear import has_wide_mm


def squared_rows(weight: Tensor) -> Tensor:
    """|W|^2 of each row: [out, in] to [out], fp32 (fp64 for fp64)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=1, dtype=wide).square_()


def row_norms(weights: Iterable[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scaling: float, weights_squared: Tensor) -> Tensor:
    """|W + s BA| of each row of n layers.

    Args:
        weights: n of [out, in], any float dtype, read one after the other; a: n of [r, in] and b: n of [out, r], fp32.
        weights_squared: [n, out], by squared_rows().

    Returns:
        [n, out], fp32. A 16-bit W meets A as the sum of two 16-bit numbers, so that tensor cores give W A^T to about 2^-17.
    """
    downs, ups = torch.stack(tuple(a)), torch.stack(tuple(b))
    w_a = _products(weights, downs)
    cross = (ups * w_a).sum(dim=2)
    square = ((ups @ (downs @ downs.mT)) * ups).sum(dim=2)
    return (weights_squared + 2 * scaling * cross + scaling**2 * square).clamp_min_(0).sqrt_()


def _products(weights: Iterable[Tensor], downs: Tensor) -> Tensor:
    """W A^T of each layer with fp32 sums, [n, out, r]."""
    rank, parts, products = downs.shape[1], None, []
    for place, weight in enumerate(weights):
        if not has_wide_mm(weight):
            products.append(weight.to(downs.dtype) @ downs[place].t())
            continue
        if parts is None:
            high = downs.to(weight.dtype)
            parts = torch.cat([high, (downs - high).to(weight.dtype)], dim=1)
        products.append(torch.mm(weight, parts[place].t(), out_dtype=torch.float32))
    stacked = torch.stack(products)
    return stacked if parts is None else stacked[..., :rank] + stacked[..., rank:]
