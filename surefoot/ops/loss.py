"""The head's cross-entropy without the logits of the whole batch: chunk by chunk, for the trained tokens only, gradient included.

As in Liger-Kernel's fused linear cross-entropy (arXiv 2410.10989, section 3.2): the head is frozen, so the gradient of its input can be
made while a chunk's logits are there, and nothing of a chunk is kept. Products in autocast's dtype, softmax and sums in fp32.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from surefoot.ops.linear import compute_dtype, times

IGNORED = -100
CHUNK = 2**28  # logits held at once: 2,093 tokens of a vocabulary of 128k, 0.5 GB in bf16; a quarter where the softmax is not compiled


def head_loss(
    hidden: Tensor, head: Tensor, labels: Tensor, positions: Tensor | None = None, scale: Tensor | float | None = None, step: Any = None
) -> Tensor:
    """sum over trained tokens of -log softmax(h_t head^T)[label_t+1], times `scale` (default: one over their number).

    Args:
        hidden: [rows, length, d]; head: [vocabulary, d], frozen.
        labels: [rows, length] int64, IGNORED where not trained on; the label at t + 1 belongs to hidden at t.
        positions: trained_positions(labels), where it is known already.
        step: loss_and_gradient, or a compiled one.

    Returns:
        A scalar, fp32; its gradient reaches hidden.
    """
    if positions is None:
        positions = trained_positions(labels)
    targets = labels.reshape(-1)[positions + 1]
    flat = hidden.reshape(-1, hidden.shape[-1])[positions]
    if scale is None:
        scale = 1.0 / max(1, targets.numel())
    total: Tensor = _HeadLoss.apply(flat, head, targets, compute_dtype(hidden), step or loss_and_gradient)  # type: ignore[no-untyped-call]
    return total * scale


def trained_positions(labels: Tensor) -> Tensor:
    """Flat indices of the tokens whose successor is trained on."""
    trained = torch.zeros_like(labels, dtype=torch.bool)
    trained[:, :-1] = labels[:, 1:] != IGNORED
    return trained.reshape(-1).nonzero()[:, 0]


def loss_and_gradient(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk's summed loss (fp32 scalar) and d loss / d logits in the logits' dtype."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_sum = torch.logsumexp(wide, dim=1, keepdim=True)
    right = wide.gather(1, targets[:, None])
    gradient = torch.exp(wide - log_sum)
    gradient = torch.where(torch.arange(wide.shape[1], device=wide.device) == targets[:, None], gradient - 1.0, gradient)
    return (log_sum - right).sum(), gradient.to(logits.dtype)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        context: Any,
        flat: Tensor,
        head: Tensor,
        targets: Tensor,
        dtype: torch.dtype,
        step: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> Tensor:
        weight = head.to(dtype)
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=flat.device)
        gradient = torch.empty_like(flat) if context.needs_input_grad[0] else None
        limit = CHUNK // 4 if step is loss_and_gradient else CHUNK
        pieces = max(1, -(-flat.shape[0] * head.shape[0] // limit))
        bounds = [flat.shape[0] * piece // pieces for piece in range(pieces + 1)]
        for start, end in itertools.pairwise(bounds):
            loss, d_logits = step(flat[start:end].to(dtype) @ weight.t(), targets[start:end])
            total += loss
            if gradient is not None:
                gradient[start:end] = d_logits @ weight
        context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (gradient,) = context.saved_tensors
        return times(gradient, d_total.reshape(1)), None, None, None, None
