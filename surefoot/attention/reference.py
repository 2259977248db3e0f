"""Attention in fp64, one group of query heads at a time, and the distance of a backend's results from it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from surefoot.attention.canary import Case, Tensors


def real(case: Case, device: torch.device) -> torch.Tensor:
    """bool [rows, length]: which positions hold a token."""
    place = torch.arange(case.length, device=device)
    if case.mask == "packed":
        return torch.ones(1, case.length, dtype=torch.bool, device=device)
    lens = torch.tensor(case.lens, device=device)[:, None]
    return place >= case.length - lens if case.is_left else place < lens


def allowed(case: Case, device: torch.device) -> torch.Tensor:
    """bool [rows, length, length]: which key each query may see. A padding query to the left sees nothing."""
    causal = torch.ones(case.length, case.length, dtype=torch.bool, device=device).tril()
    if case.mask == "packed":
        piece = torch.repeat_interleave(torch.arange(len(case.lens), device=device), torch.tensor(case.lens, device=device))
        return (causal & (piece[:, None] == piece[None, :]))[None]
    if case.mask == "causal":
        return causal.expand(len(case.lens), -1, -1)
    return causal & real(case, device)[:, None, :]


def worst_error(case: Case, given: Tensors, results: tuple[Any, ...]) -> float:
    """The largest relative error (Frobenius norm of a head) of output, query, key and value gradients, at real tokens."""
    keep = real(case, given.query.device)
    mask = allowed(case, given.query.device)
    group = given.query.shape[1] // given.key.shape[1]
    # the channel that makes the scores negative meets a sum that is zero in exact arithmetic: rounding is all it holds
    channels = slice(1, None) if case.is_negative else slice(None)
    worst = 0.0
    for head in range(given.key.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        exact = _exact(given, heads, head, mask)
        found = (results[0].transpose(1, 2)[:, heads], results[1][:, heads], results[2][:, head : head + 1], results[3][:, head : head + 1])
        for index, (true, got) in enumerate(zip(exact, found, strict=True)):
            part = channels if index in (1, 2) else slice(None)
            difference = ((got.double() - true) * keep[:, None, :, None])[..., part]
            norm = torch.linalg.vector_norm((true * keep[:, None, :, None])[..., part], dim=(0, 2, 3))
            worst = max(worst, float((torch.linalg.vector_norm(difference, dim=(0, 2, 3)) / norm.clamp_min(1e-12)).max()))
    return worst


def _exact(given: Tensors, heads: slice, head: int, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value = (
        tensor.double().requires_grad_()
        for tensor in (given.query[:, heads], given.key[:, head : head + 1], given.value[:, head : head + 1])
    )
    scores = (query @ key.transpose(-1, -2)) * given.query.shape[-1] ** -0.5
    seen = mask[:, None]
    weights = torch.softmax(scores.masked_fill(~seen, -1e300), dim=-1) * seen
    output = weights @ value
    gradients = torch.autograd.grad(output, (query, key, value), given.gradient.transpose(1, 2)[:, heads].double())
    return output.detach(), *gradients
