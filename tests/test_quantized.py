"""QLoRA and QDoRA through bitsandbytes on a CPU: what is fp32, what computes in bf16, and that an evaluation leaves training whole."""

from __future__ import annotations

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft.tuners.lora import LoraLayer

from surefoot import adapters, loftq
from surefoot.backends import hf
from tests.conftest import SMALL_MODEL
from tests.test_adapters import PROMPT, adapter_plan, logits, model_plan

IDS = {"input_ids": PROMPT, "labels": PROMPT}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantized_model_when_attached_then_only_fp32_adapters_train_over_frozen_nf4_that_computes_in_bf16(method: str) -> None:
    model = adapters.attach(
        hf.load_model(model_plan(quantization="nf4", compute_dtype="bf16"), 0, None), adapter_plan(method=method), seed=1
    )
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 28
    assert all(layer.compute_dtype == torch.bfloat16 and layer.weight.quant_type == "nf4" for layer in layers)
    assert all(layer.weight.quant_state.nested for layer in layers)
    trained = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if method == "dora" else set())
    assert {kind for kind in kinds if any(kind in name for name in trained)} == kinds
    assert all(any(kind in name for kind in kinds) for name in trained)
    assert set(trained.values()) == {torch.float32}
    rest = {parameter.dtype for name, parameter in model.named_parameters() if name not in trained and parameter.dtype != torch.uint8}
    assert rest == {torch.float32}  # norms and embeddings, hence the residual stream


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_quantized_model_when_trained_then_has_the_gradients_of_its_dequantized_weights(method: str) -> None:
    model = adapters.attach(
        hf.load_model(model_plan(quantization="nf4", compute_dtype="fp32"), 0, None), adapter_plan(method=method), seed=1
    )
    plain = hf.load_model(model_plan(), 0, None)
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name.removesuffix(".base_layer")).weight.data = weight.float()
    reference = adapters.attach(plain, adapter_plan(method=method), seed=1)
    found, expected = (_gradients(one) for one in (model, reference))
    assert found.keys() == expected.keys()
    worst = max(float((found[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-12)) for name in found)
    assert worst < 1e-3


def test_quantized_model_when_the_cpu_could_pack_its_weights_then_evaluation_leaves_them_trainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU with AVX512-BF16, where the first evaluation would pack them for a product without a gradient."""
    monkeypatch.setattr(bitsandbytes.nn.modules, "has_avx512bf16", lambda: True)
    assert Linear4bit(64, 64).support_avx512bf16_for_cpu
    model = adapters.attach(hf.load_model(model_plan(quantization="nf4"), 0, None), adapter_plan(), seed=1)
    before = _gradients(model)
    with torch.no_grad():
        model.eval()(**IDS)
    model.train().zero_grad()
    after = _gradients(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_loftq_when_started_then_the_adapter_is_the_best_of_its_rank_and_the_model_nearer_to_its_unquantized_weights(method: str) -> None:
    exact, plan = hf.load_model(model_plan(), 0, None), model_plan(quantization="nf4")
    plain = (logits(hf.load_model(plan, 0, None)) - logits(exact)).norm()
    model = adapters.attach(hf.load_model(plan, 0, None), adapter_plan(method=method, lora_r=16, init_lora_weights="loftq"), seed=1)
    assert loftq.start(model, str(SMALL_MODEL), None) == 28
    adapters.reset_magnitudes(model)
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LoraLayer):
            lost = exact.get_submodule(name).weight.float() - adapters.dequantize_module_weight(layer.get_base_layer()).float()
            given = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            assert (lost - given).norm() <= 1.02 * torch.linalg.svdvals(lost)[16:].norm()
    assert (logits(model) - logits(exact)).norm() < plain
    assert model.peft_config["default"].init_lora_weights is True  # plain PEFT loads the adapter as any other


def _gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    model(**IDS).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
