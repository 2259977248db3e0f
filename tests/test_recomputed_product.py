"""Layers that recompute without down_proj: its products a pass, what is kept of them, and the gradients of layers that keep everything."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Olmo2Config, Qwen2Config, Qwen3Config, SmolLM3Config

from surefoot import adapters
from surefoot.ops import fuse as fusing
from surefoot.ops import mlp, quantized, recomputed, swiglu
from surefoot.ops.fuse import fuse, spare_down
from surefoot.training import bad_steps
from surefoot.training.guard import MicroBatch, random_state
from surefoot.training.recompute import recompute
from tests.test_adapters import adapter_plan
from tests.test_fused_layers import IDS, adapted, disturbed, furthest, trained_on

LAYERS = 4
TINY = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
PARTITIONED = "aot_eager_decomp_partition"  # torch.compile's graphs and what they keep, without its code


def counted_products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of W^T in every base product of the fused layers (not of their input gradients, whose W is not transposed)."""
    made: list[tuple[int, ...]] = []
    plain = torch.Tensor.addmm_

    def counting(into: Tensor, x: Tensor, weight: Tensor, **named: Any) -> Tensor:
        if not weight.is_contiguous():
            made.append(tuple(weight.shape))
        return plain(into, x, weight, **named)

    monkeypatch.setattr(torch.Tensor, "addmm_", counting)
    return made


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    return counted_products(monkeypatch)


def fused(method: str = "dora", backend: str | None = None, quantization: str = "none", dtype: torch.dtype = torch.float32) -> Any:
    torch._dynamo.reset()
    model = adapted(quantization, method=method)
    if quantization == "none":
        model.to(dtype)
    fuse(model)
    for layer in model.get_decoder().layers if backend else ():
        layer.compile(backend=backend)
    return model


def recomputing(*words: Any, count: int = -1, **named: Any) -> Any:
    model = fused(*words, **named)
    assert spare_down(model) == LAYERS
    recompute(model, count)
    return model


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    assert found.keys() == wanted.keys()
    return all(torch.equal(found[name], wanted[name]) for name in wanted)


WAYS = [(method, None, bf16) for method in ("lora", "dora") for bf16 in (False, True)] + [("dora", PARTITIONED, True)]
SLOW_WAYS = [("dora", PARTITIONED, False), ("lora", PARTITIONED, True)] + [
    (one, "inductor", b) for one in ("lora", "dora") for b in (True, False)
]


@pytest.mark.parametrize(("method", "backend", "bf16"), [*WAYS, *(pytest.param(*way, marks=pytest.mark.slow) for way in SLOW_WAYS)])
def test_down_when_layers_recompute_then_is_multiplied_once_and_no_gradient_changes(
    method: str, backend: str | None, bf16: bool, products: list[tuple[int, ...]]
) -> None:
    wanted = trained_on(fused(method, backend), bf16)
    assert (products.count((704, 256)), products.count((256, 704))) == (LAYERS, 2 * LAYERS)
    model = recomputing(method, backend)
    for _ in range(2):
        products.clear()
        assert same(trained_on(model, bf16), wanted)
        assert (products.count((704, 256)), products.count((256, 704))) == (LAYERS, 4 * LAYERS)


def test_swiglu_when_layers_recompute_then_is_computed_once_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []
    monkeypatch.setattr(mlp, "swiglu", lambda *words: calls.append(words[0]) or swiglu.swiglu(*words))
    trained_on(recomputing())
    assert len(calls) == LAYERS


@pytest.mark.parametrize("count", [1, 3])
def test_some_layers_when_they_recompute_then_no_gradient_changes(count: int, products: list[tuple[int, ...]]) -> None:
    wanted = trained_on(fused())
    products.clear()
    assert same(trained_on(recomputing(count=count)), wanted)
    assert products.count((704, 256)) == LAYERS


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_gradients_when_layers_recompute_then_are_those_of_fp64(method: str) -> None:
    truth = trained_on(fused(method, dtype=torch.float64))
    assert same(trained_on(recomputing(method, dtype=torch.float64)), truth)
    assert furthest(trained_on(recomputing(method)), truth) < 1e-4


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_nf4_weight_of_down_when_layers_recompute_then_is_unpacked_twice_and_not_three_times(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes: list[tuple[int, int]] = []
    plain = quantized._dequantized
    monkeypatch.setattr(quantized, "_dequantized", lambda parts, shape, dtype: shapes.append(shape) or plain(parts, shape, dtype))
    wanted = trained_on(fused(method, quantization="nf4"))
    model = recomputing(method, quantization="nf4")
    trained_on(model)  # DoRA's norms read every weight once
    shapes.clear()
    assert same(trained_on(model), wanted)
    assert (shapes.count((256, 704)), shapes.count((704, 256))) == (2 * LAYERS, 3 * 2 * LAYERS)


@pytest.mark.parametrize(("method", "expected"), [("lora", []), ("dora", [4, 3, 2, 1])])
@pytest.mark.parametrize("backend", [None, pytest.param(PARTITIONED, marks=pytest.mark.slow)])
def test_kept_products_when_the_backward_pass_goes_through_the_layers_then_there_is_one_a_layer_before_it(
    method: str, expected: list[int], backend: str | None
) -> None:
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def count() -> int:
        return sum(one() is not None for one in kept)

    def park(product: Tensor) -> Tensor:
        assert tuple(product.shape) == (IDS.numel(), 256)
        kept.append(weakref.ref(product))
        return product

    def bring_back(product: Tensor) -> Tensor:
        alive.append(count())
        return product

    model = fused(method, backend)
    spare_down(model)
    for layer in model.get_decoder().layers:
        layer.recompute_passes = lambda: recomputed.passes(park, bring_back)
    recompute(model, -1)
    loss = model.train()(input_ids=IDS, labels=IDS).loss
    assert count() == len(expected)
    loss.backward()
    assert alive == expected
    gc.collect()
    assert count() == 0


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_backward_when_it_comes_twice_then_the_gradients_are_twice_as_great(method: str) -> None:
    wanted = trained_on(fused(method))
    model = recomputing(method).train()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward(retain_graph=True)
    loss.backward()
    assert all(torch.equal(one.grad, 2 * wanted[name]) for name, one in model.named_parameters() if one.requires_grad)


def test_passes_when_two_are_under_way_then_each_keeps_its_own_products() -> None:
    wanted = trained_on(fused())
    model = recomputing().train()
    losses = [model(input_ids=IDS, labels=IDS).loss for _ in range(2)]
    for loss in losses:
        loss.backward()
    assert all(torch.equal(one.grad, 2 * wanted[name]) for name, one in model.named_parameters() if one.requires_grad)


def tiny(kind: Callable[..., Any], method: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**TINY), attn_implementation="eager", dtype=torch.float32)
    model.config.use_cache = False
    model = disturbed(adapters.attach(model, adapter_plan(method=method), seed=1))
    assert fuse(model).refused == {}
    return model


KINDS = [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config, SmolLM3Config, Olmo2Config]


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_decoders_when_layers_recompute_then_no_gradient_changes(
    kind: Callable[..., Any], method: str, products: list[tuple[int, ...]]
) -> None:
    wanted = trained_on(tiny(kind, method))
    model = tiny(kind, method)
    is_normed = kind is Olmo2Config  # whose layers send the output of down_proj through a norm, which needs it
    assert spare_down(model) == (0 if is_normed else 2)
    recompute(model, -1)
    products.clear()
    assert same(trained_on(model), wanted)
    assert products.count((80, 32)) == (4 if is_normed else 2)


def test_output_when_a_backward_pass_does_need_it_then_the_gradient_is_nan_and_not_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "ADDING_LAYERS", ("Olmo2DecoderLayer",))
    model = tiny(Olmo2Config, "lora")
    assert spare_down(model) == 2
    recompute(model, -1)
    assert any(bool(gradient.isnan().any()) for name, gradient in trained_on(model).items() if name != "loss")


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("backend", [None, PARTITIONED])
def test_bad_steps_rerun_when_layers_recompute_then_finds_nothing_in_a_healthy_model(method: str, backend: str | None) -> None:
    model = recomputing(method, backend)
    batch = MicroBatch({"input_ids": IDS, "labels": IDS}, torch.arange(2), torch.tensor(0.0), random_state())
    found = bad_steps.rerun(model, batch, nullcontext)
    assert found.culprit is None
    assert 0 < found.grad_norm < float("inf")


def test_layers_when_their_adapters_drop_inputs_then_recompute_as_before() -> None:
    wanted, model = adapted(lora_dropout=0.1), adapted(lora_dropout=0.1)
    for one in (wanted, model):
        fuse(one)
    spare_down(model)
    recompute(model, -1)
    assert same(trained_on(model), trained_on(wanted))
