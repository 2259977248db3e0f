"""The fused operations against plain formulas: fp64 to 1e-10, fp32 to 1e-5, bf16 no further from fp64 than plain bf16 code."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from surefoot.ops import linear, mlp, norms

ALONE, GQA, INTO_AND_OUT = (48,), (64, 16, 16), (96, 96, 64)
SCALES = {"alpha_2r": 2.0, "alpha_r_over_3": 1 / 3, "rslora": 16 / 8**0.5}


class Case(NamedTuple):
    """Layers as fp64 leaves: W, A, B, magnitude and bias of each."""

    x: Tensor
    weights: list[Tensor]
    a: list[Tensor]
    b: list[Tensor]
    magnitudes: list[Tensor]
    biases: list[Tensor]
    scaling: float


def case(widths: tuple[int, ...], scaling: float = 2.0, shape: tuple[int, ...] = (2, 7, 64), *, is_mlp: bool = False) -> Case:
    """Row 0 has the magnitude 1e-4; row 1 of W is zero and B's row tiny, as adapters.reset_magnitudes() leaves it."""
    draw = torch.Generator().manual_seed(0)

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    into = [shape[-1]] * len(widths)
    if is_mlp:
        into[-1] = widths[0]
    weights = [randn(out, d) / d**0.5 for out, d in zip(widths, into, strict=True)]
    a, b = [randn(8, d) / d**0.5 for d in into], [randn(out, 8) / 8 for out in widths]
    for weight, up in zip(weights, b, strict=True):
        weight[1], up[1] = 0.0, 1e-6
    magnitudes = [exact_norm(*layer, scaling) * (1 + 0.2 * randn(layer[0].shape[0])) for layer in zip(weights, a, b, strict=True)]
    for magnitude in magnitudes:
        magnitude[0] = 1e-4
    return Case(randn(*shape), weights, a, b, magnitudes, [randn(out) for out in widths], scaling)


def exact_norm(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    return torch.linalg.vector_norm(weight.double() + scaling * b.double() @ a.double(), dim=1)


def cast(c: Case, dtype: torch.dtype) -> Case:
    """Leaves in `dtype` that need gradients, W and bias excepted."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().to(dtype, copy=True).requires_grad_()

    trained = [[leaf(one) for one in group] for group in (c.a, c.b, c.magnitudes)]
    return Case(leaf(c.x), [one.to(dtype) for one in c.weights], *trained, [one.to(dtype) for one in c.biases], c.scaling)


def plain_layer(c: Case, k: int, x: Tensor, is_dora: bool, has_bias: bool) -> Tensor:
    y = x @ c.weights[k].t() + c.scaling * (x @ c.a[k].t()) @ c.b[k].t()
    if is_dora:
        y = (y * (c.magnitudes[k] / norm_of(c, k))).to(y.dtype)
    return y + c.biases[k].to(y.dtype) if has_bias else y


def norm_of(c: Case, k: int) -> Tensor:
    return exact_norm(c.weights[k], c.a[k].detach(), c.b[k].detach(), c.scaling).to(c.magnitudes[k].dtype)


def plain_linears(c: Case, is_dora: bool, has_bias: bool) -> list[Tensor]:
    return [plain_layer(c, k, c.x, is_dora, has_bias) for k in range(len(c.weights))]


def fused_linears(c: Case, is_dora: bool, has_bias: bool) -> list[Tensor]:
    outputs = []
    for k, raw in enumerate(linear.adapted_linears(c.x, c.weights, c.a, c.b, c.scaling)):
        y = linear.scaled_rows(raw, c.magnitudes[k], norm_of(c, k)) if is_dora else raw
        outputs.append(y + c.biases[k].to(y.dtype) if has_bias else y)
    return outputs


def plain_mlp(c: Case, is_dora: bool, _: bool) -> list[Tensor]:
    gate, up = (plain_layer(c, k, c.x, is_dora, False) for k in (0, 1))
    return [plain_layer(c, 2, torch.nn.functional.silu(gate) * up, is_dora, False)]


def fused_mlp(c: Case, is_dora: bool, _: bool) -> list[Tensor]:
    factors = mlp.Factors(*c.magnitudes[:2], norm_of(c, 0), norm_of(c, 1)) if is_dora else None
    raw = mlp.adapted_mlp(c.x, c.weights, c.a, c.b, c.scaling, factors)
    return [linear.scaled_rows(raw, c.magnitudes[2], norm_of(c, 2)) if is_dora else raw]


def found(forward: Callable[..., list[Tensor]], c: Case, *flags: bool, autocast: bool = False) -> dict[str, Tensor]:
    """Outputs and the gradients of a fixed random function of them, by name."""
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        outputs = forward(c, *flags)
    draw = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(y.shape, generator=draw, dtype=torch.float64).to(y.dtype) for y in outputs])
    leaves = {"x": [c.x], "A": c.a, "B": c.b, "m": c.magnitudes}
    gradients = {f"d{name}{k}": one.grad for name, group in leaves.items() for k, one in enumerate(group) if one.grad is not None}
    return {**{f"y{k}": y.detach() for k, y in enumerate(outputs)}, **gradients}


def errors(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """|ours - truth| / |truth| by name; the names must be the same."""
    assert ours.keys() == truth.keys()
    return {name: float((ours[name].double() - truth[name]).norm() / truth[name].norm()) for name in truth}


LINEARS: tuple[Any, ...] = (plain_linears, fused_linears)
MLP: tuple[Any, ...] = (plain_mlp, fused_mlp)
KINDS = [pytest.param(LINEARS, ALONE, id="one"), pytest.param(LINEARS, GQA, id="qkv"), pytest.param(MLP, INTO_AND_OUT, id="mlp")]
FLAGS = pytest.mark.parametrize(("is_dora", "has_bias"), [(False, False), (True, False), (True, True)], ids=["lora", "dora", "dora-bias"])


@pytest.mark.parametrize("scaling", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["fp64", "fp32"])
@pytest.mark.parametrize(("pair", "widths"), KINDS)
@FLAGS
def test_operation_when_computed_then_output_and_gradients_are_the_plain_formulas(
    pair: Any, widths: tuple[int, ...], is_dora: bool, has_bias: bool, dtype: torch.dtype, limit: float, scaling: float
) -> None:
    drawn = case(widths, scaling, is_mlp=pair is MLP)
    truth = found(pair[0], cast(drawn, torch.float64), is_dora, has_bias)
    off = errors(found(pair[1], cast(drawn, dtype), is_dora, has_bias), truth)
    assert sum(name.startswith("dm") for name in off) == (len(widths) if is_dora else 0)
    assert max(off.values()) < limit, off


@pytest.mark.parametrize(("pair", "widths"), KINDS)
@FLAGS
def test_operation_when_under_bf16_autocast_then_is_as_near_to_fp64_as_plain_code(
    pair: Any, widths: tuple[int, ...], is_dora: bool, has_bias: bool
) -> None:
    drawn = case(widths, shape=(2, 150, 64), is_mlp=pair is MLP)
    truth = found(pair[0], cast(drawn, torch.float64), is_dora, has_bias)
    plain = errors(found(pair[0], cast(drawn, torch.float32), is_dora, has_bias, autocast=True), truth)
    ours = found(pair[1], cast(drawn, torch.float32), is_dora, has_bias, autocast=True)
    assert {ours[name].dtype for name in ours if name[0] == "y"} == {torch.bfloat16}
    assert {ours[name].dtype for name in ours if name[0] == "d"} == {torch.float32}
    off = errors(ours, truth)
    assert all(off[name] < 2e-2 and off[name] < 1.5 * plain[name] for name in off), {name: (off[name], plain[name]) for name in off}


@pytest.mark.parametrize(("pair", "widths"), KINDS)
def test_operation_when_the_input_needs_no_gradient_then_the_others_are_unchanged(pair: Any, widths: tuple[int, ...]) -> None:
    drawn = case(widths, is_mlp=pair is MLP)
    truth = found(pair[1], cast(drawn, torch.float64), True, False)
    frozen = cast(drawn, torch.float64)
    frozen.x.requires_grad_(False)
    ours = found(pair[1], frozen, True, False)
    assert truth.keys() - ours.keys() == {"dx0"}
    assert all(torch.equal(ours[name], truth[name]) for name in ours)


@pytest.mark.parametrize(("pair", "widths"), KINDS)
def test_operation_when_the_input_is_not_contiguous_then_is_right(pair: Any, widths: tuple[int, ...]) -> None:
    drawn = case(widths, is_mlp=pair is MLP)
    truth = found(pair[0], cast(drawn, torch.float64), True, False)
    turned = drawn.x.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    assert max(errors(found(pair[1], cast(drawn, torch.float64)._replace(x=turned), True, False), truth).values()) < 1e-10


def test_linears_when_one_output_is_unused_then_its_gradients_are_zero() -> None:
    c = cast(case(GQA), torch.float64)
    linear.adapted_linears(c.x, c.weights, c.a, c.b, c.scaling)[1].sum().backward()
    assert float(c.b[1].grad.abs().sum()) > 0  # type: ignore[union-attr]
    assert c.b[0].grad is None or not c.b[0].grad.any()
    assert c.a[2].grad is None or not c.a[2].grad.any()


@pytest.mark.parametrize(
    ("weight_dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-6)], ids=["fp64", "fp32", "bf16"]
)
def test_row_norms_when_of_several_layers_then_are_the_fp64_norms(weight_dtype: torch.dtype, limit: float) -> None:
    wide = torch.promote_types(weight_dtype, torch.float32)
    drawn = case((32, 32, 32), 5.6)
    weights = [weight.to(weight_dtype) for weight in drawn.weights]
    a, b = [one.to(wide) for one in drawn.a], [one.to(wide) for one in drawn.b]
    squared = torch.stack([norms.squared_rows(weight) for weight in weights])
    truth = torch.stack([exact_norm(*layer, drawn.scaling) for layer in zip(weights, a, b, strict=True)])
    ours = norms.row_norms(weights, a, b, drawn.scaling, squared)
    assert squared.dtype == ours.dtype == wide
    assert torch.allclose(squared.double(), torch.stack([weight.double().square().sum(1) for weight in weights]), rtol=limit, atol=0)
    assert float(truth[:, 1].max()) < 1e-4 < float(truth[:, 2:].min())  # row 1 of each W is zero
    assert float((ours.double() / truth - 1).abs().max()) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("needs_dx", [True, False], ids=["dx", "no_dx"])
@pytest.mark.parametrize("op", ["linears", "linears_backward", "mlp", "mlp_backward"])
def test_custom_op_when_checked_by_torch_then_its_schema_and_shapes_are_true(op: str, needs_dx: bool, dtype: torch.dtype) -> None:
    drawn = case(INTO_AND_OUT, shape=(5, 64), is_mlp=True)
    x, weights, a, b = drawn.x.to(dtype), *([one.to(dtype) for one in group] for group in (drawn.weights, drawn.a, drawn.b))
    dy, factors = torch.ones(5, 64, dtype=dtype), [torch.full((96,), 0.9), torch.full((96,), 1.1)]
    into = torch.cat(a[:2])
    u, *raw = linear._forward(x, weights[:2], into, b[:2])
    kept = [x, *mlp._forward(x, weights, [into, a[2]], b, factors)[1:]]
    checked: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "linears": (linear._forward, (x, weights[:2], into, b[:2])),
        "linears_backward": (linear._backward, (raw, x, u, weights[:2], into, b[:2], needs_dx)),
        "mlp": (mlp._forward, (x, weights, [into, a[2]], b, factors if needs_dx else [])),
        "mlp_backward": (mlp._backward, (dy, kept, weights, [into, a[2]], b, factors, needs_dx)),
    }
    results = torch.library.opcheck(*checked[op], test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
    assert set(results.values()) == {"SUCCESS"}
