"""SwiGLU and the head's loss in chunks against autograd of the plain formulas in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from surefoot.ops import loss, swiglu


@pytest.mark.parametrize("has_factors", [True, False], ids=["factors", "plain"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 4e-3)])
def test_swiglu_when_computed_then_output_and_gradients_are_autograds(has_factors: bool, dtype: torch.dtype, limit: float) -> None:
    torch.manual_seed(0)
    rounded = [torch.randn(33, 70, dtype=torch.float64).to(dtype) for _ in range(3)]
    gate, up, d_out = (one.to(torch.float64, copy=True) for one in rounded)
    factors = [torch.rand(70, dtype=torch.float64).add(0.5).to(torch.promote_types(dtype, torch.float32)) for _ in range(2)]
    leaves = [one.requires_grad_() for one in (gate, up, *(one.to(torch.float64, copy=True) for one in factors))]
    g, u = (gate * leaves[2], up * leaves[3]) if has_factors else (gate, up)
    truth = torch.nn.functional.silu(g) * u
    wanted = torch.autograd.grad(truth, leaves if has_factors else leaves[:2], d_out)
    given = factors if has_factors else [None, None]
    ours = swiglu.swiglu(rounded[0], rounded[1], *given)
    product = rounded[2].clone()
    gradients = swiglu.swiglu_backward(rounded[0], rounded[1], product, *given)
    assert ours.dtype == gradients[0].dtype == gradients[1].dtype == dtype
    assert [one.numel() for one in gradients[2:]] == ([70, 70] if has_factors else [0, 0])
    for mine, exact in zip((ours, product, *gradients[: len(wanted)]), (truth.detach(), truth.detach(), *wanted), strict=True):
        assert float((mine.double() - exact).norm() / exact.norm()) < limit


IGNORE_ROW = 2


def head_inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (4, 9))
    labels[0, :5], labels[1, 3], labels[IGNORE_ROW] = loss.IGNORED, loss.IGNORED, loss.IGNORED
    return torch.randn(4, 9, 16, dtype=dtype, requires_grad=True), torch.randn(50, 16, dtype=dtype), labels


@pytest.mark.parametrize("chunk", [2**28, 4 * 50 * 5, 4], ids=["one", "five_rows", "one_row"])
@pytest.mark.parametrize("scale", [None, 0.01, torch.tensor(0.02)], ids=["mean", "number", "tensor"])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
def test_head_loss_when_chunked_then_is_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, chunk: int, scale: Any, dtype: torch.dtype, limit: float
) -> None:
    monkeypatch.setattr(loss, "CHUNK", chunk)
    seen: list[int] = []
    kept = loss.loss_and_gradient
    monkeypatch.setattr(loss, "loss_and_gradient", lambda logits, targets: seen.append(len(targets)) or kept(logits, targets))
    hidden, head, labels = head_inputs(dtype)
    rows = (hidden.double() @ head.double().t())[:, :-1].reshape(-1, 50)
    targets = labels[:, 1:].reshape(-1)
    truth = torch.nn.functional.cross_entropy(rows, targets, ignore_index=loss.IGNORED, reduction="sum")
    truth = truth * (1 / int((targets != loss.IGNORED).sum()) if scale is None else scale)
    (wanted,) = torch.autograd.grad(truth, hidden)
    ours = loss.head_loss(hidden, head, labels, scale=scale)
    (gradient,) = torch.autograd.grad(3 * ours, hidden)
    assert sum(seen) == int((targets != loss.IGNORED).sum())
    assert max(seen) <= max(1, chunk // 200)
    assert float(abs(ours - truth) / truth) < limit
    assert float((gradient / 3 - wanted).norm() / wanted.norm()) < limit
    assert not gradient[IGNORE_ROW].any()
    assert not gradient[:, -1].any()


def test_head_loss_when_no_label_is_trained_then_is_zero_with_zero_gradient() -> None:
    hidden, head, labels = head_inputs(torch.float32)
    ours = loss.head_loss(hidden, head, torch.full_like(labels, loss.IGNORED))
    ours.backward()
    assert float(ours.detach()) == 0.0
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))  # type: ignore[arg-type]


def test_head_loss_when_in_bf16_then_its_gradient_is_rounded_once_and_its_scale_not() -> None:
    hidden, head, labels = head_inputs(torch.bfloat16)
    scale = torch.tensor(1 / 8191)  # 0.15 % off in bf16
    (whole,) = torch.autograd.grad(loss.head_loss(hidden, head, labels, scale=1.0), hidden)
    (scaled,) = torch.autograd.grad(loss.head_loss(hidden, head, labels, scale=scale), hidden)
    assert torch.equal(scaled, (whole.float() * scale).bfloat16())


def test_head_loss_when_under_bf16_autocast_then_is_as_near_to_fp64_as_torchs_own() -> None:
    hidden, head, labels = head_inputs(torch.float64)
    targets = labels[:, 1:].reshape(-1)

    def plain(h: Tensor, w: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(
            (h @ w.t())[:, :-1].reshape(-1, 50).to(torch.promote_types(h.dtype, torch.float32)), targets
        )

    (truth,) = torch.autograd.grad(plain(hidden, head), hidden)
    off = []
    for function in (plain, lambda h, w: loss.head_loss(h, w, labels)):
        leaf = hidden.detach().float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = function(leaf, head.float())
        value.backward()
        assert value.dtype == leaf.grad.dtype == torch.float32  # type: ignore[union-attr]
        off.append(float((leaf.grad.double() - truth).norm() / truth.norm()))  # type: ignore[union-attr]
    assert off[1] < 2e-2
    assert off[1] < 1.5 * off[0]
