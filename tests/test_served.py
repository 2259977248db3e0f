"""Adapters as they are served: the same numbers as PEFT's, with nothing of the weights computed again for a token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import dora
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config, Qwen2ForCausalLM

from surefoot import generate
from surefoot.generate import Sampling
from surefoot.ops.served import ServedLinear, adapters_off, serve
from tests.conftest import SMALL_MODEL

IDS = torch.arange(5, 45).reshape(2, 20)


def small(**named: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(SMALL_MODEL, **{"dtype": torch.float32, **named})


def with_biases() -> Any:
    """Qwen2's q, k and v have biases, which DoRA's factor must not touch."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_()
    return model


def adapted(model: Any, **changes: Any) -> PeftModel:
    torch.manual_seed(1)
    options = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False, **changes}
    peft_model = get_peft_model(model, LoraConfig(**options))
    for name, parameter in peft_model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1 + 0.2 * torch.rand_like(parameter))
    return peft_model.eval()  # type: ignore[no-any-return]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("changes", [{}, {"use_dora": True}, {"use_dora": True, "use_rslora": True}])
@pytest.mark.parametrize("make", [small, with_biases])
def test_served_when_fp32_then_gives_pefts_logits_and_switched_off_the_bases(make: Any, changes: dict[str, Any]) -> None:
    base = logits(make())
    model = adapted(make(), **changes)
    expected = logits(model)
    served, kept = serve(model, torch.float32)
    assert kept == {}
    assert (logits(served) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert (expected - base).abs().max() > 1e-2
    with adapters_off(served):
        assert torch.equal(logits(served), base)
    assert not torch.equal(logits(served), base)


def test_served_when_the_base_is_nf4_then_gives_pefts_logits() -> None:
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    model = adapted(small(quantization_config=config, device_map={"": "cpu"}), use_dora=True)
    expected = logits(model)
    served, kept = serve(model, torch.float32)
    assert kept == {}
    assert sum(isinstance(module, ServedLinear) for module in served.modules()) == 28
    assert (logits(served) - expected).abs().max() < 1e-4 * expected.abs().max()


def test_served_when_bf16_then_is_as_near_to_fp32_as_peft_is() -> None:
    exact = logits(adapted(small(), use_dora=True))
    model = adapted(small(dtype=torch.bfloat16), use_dora=True)
    theirs = (logits(model).float() - exact).abs().mean()
    ours = (logits(serve(model, torch.bfloat16)[0]).float() - exact).abs().mean()
    assert 0 < ours < 1.2 * theirs


def test_served_when_generating_then_takes_no_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(small(), use_dora=True)
    calls = []
    real = dora.DoraLinearLayer.get_weight_norm
    monkeypatch.setattr(dora.DoraLinearLayer, "get_weight_norm", lambda *given, **named: calls.append(1) or real(*given, **named))
    sampling, prompt = Sampling(max_new_tokens=3), [list(range(10, 30))]
    by_peft = generate.complete(model, prompt, sampling, [1])
    assert len(calls) == 3 * 28  # PEFT: once a layer and token
    calls.clear()
    assert generate.complete(serve(model, torch.float32)[0], prompt, sampling, [1]) == by_peft
    assert calls == []


def test_served_when_a_layer_is_not_linear_then_stays_with_peft_and_is_named(tmp_path: Path) -> None:
    model = adapted(small(), target_modules=["q_proj", "embed_tokens"])
    expected = logits(model)
    served, kept = serve(model, torch.float32)
    assert list(kept) == ["model.embed_tokens"]
    assert "not a plain linear layer" in kept["model.embed_tokens"]
    assert torch.allclose(logits(served), expected, atol=1e-4)
