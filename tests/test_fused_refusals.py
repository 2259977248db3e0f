"""What fuse() does not know stays PEFT's, by name and reason; what it fuses is saved as PEFT's, and a second adapter is PEFT's alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from surefoot.backends import hf
from surefoot.ops.fuse import fuse
from tests.test_adapters import logits, model_plan
from tests.test_fused_layers import LIMIT, adapted, disturbed, furthest, trained_on

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def with_config(**changes: Any) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(hf.load_model(model_plan(), 0, None), LoraConfig(**{"r": 4, "target_modules": EVERY, **changes}))
    return disturbed(model)


def with_two_adapters() -> Any:
    model = with_config()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False))
    return model


def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=200, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    adapter = LoraConfig(r=4, target_modules=["c_attn", "lm_head"], fan_in_fan_out=True)
    return disturbed(get_peft_model(GPT2LMHeadModel(config), adapter))


def with_trained_base() -> Any:
    model = with_config(use_dora=True)
    for name, parameter in model.named_parameters():
        if "o_proj.base_layer" in name:
            parameter.requires_grad_()
    return model


REFUSED = [
    pytest.param(lambda: with_config(lora_bias=True), "q_proj", 4, "its B has a bias", id="lora_bias"),
    pytest.param(lambda: with_config(target_modules=[*EVERY, "embed_tokens"]), "embed_tokens", 1, "Embedding is not a plain linear layer", id="embedding"),
    pytest.param(gpt2, "c_attn", 2, "its base is Conv1D", id="conv1d"),
    pytest.param(with_two_adapters, "v_proj", 4, "it has the adapters default, other", id="two"),
    pytest.param(with_trained_base, "o_proj", 4, "its base weight is trained", id="trained_base"),
]  # fmt: skip


@pytest.mark.parametrize(("make", "name", "count", "reason"), REFUSED)
def test_layer_when_unknown_then_is_named_with_its_reason_and_stays_pefts(make: Any, name: str, count: int, reason: str) -> None:
    model = make()
    truth = trained_on(model)
    fused = fuse(model)
    refused = {full: why for full, why in fused.refused.items() if full.endswith(name)}
    assert (len(refused), set(refused.values())) == (count, {reason})
    first, why = next(iter(fused.refused.items()))
    assert fused.line() == f"fused adapters: {len(fused.layers)} layers; {len(fused.refused)} stay with PEFT, first {first}: {why}"
    assert furthest(trained_on(model), truth) < LIMIT


@pytest.mark.parametrize(
    "changes",
    [
        {"rank_pattern": {"k_proj": 8, "up_proj": 8}, "alpha_pattern": {"k_proj": 16, "up_proj": 16}},
        {"rank_pattern": {"q_proj": 8, "gate_proj": 2, "down_proj": 2}},
        {"alpha_pattern": {"v_proj": 3, "up_proj": 5}},
    ],
    ids=["ranks-one-scale", "ranks", "alphas"],
)
@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_siblings_when_their_ranks_or_scales_differ_then_gradients_are_pefts(changes: dict[str, Any], use_dora: bool) -> None:
    model = with_config(lora_alpha=8, use_dora=use_dora, **changes)
    truth = trained_on(model)
    assert fuse(model).refused == {}
    assert furthest(trained_on(model), truth) < LIMIT


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapter_when_saved_from_a_fused_model_then_plain_peft_loads_it_and_back(tmp_path: Path, method: str) -> None:
    model = adapted(method=method)
    names = set(model.state_dict())
    fuse(model)
    assert set(model.state_dict()) == names
    model.save_pretrained(tmp_path / "fused", save_embedding_layers=False)
    plain = PeftModel.from_pretrained(hf.load_model(model_plan(), 0, None), tmp_path / "fused")
    assert torch.allclose(logits(plain), logits(model), atol=1e-4)
    plain.save_pretrained(tmp_path / "plain", save_embedding_layers=False)
    back = PeftModel.from_pretrained(hf.load_model(model_plan(), 0, None), tmp_path / "plain")
    assert fuse(back).refused == {}
    assert torch.equal(logits(back), logits(model))


def test_adapter_when_a_second_one_is_active_or_both_then_logits_are_pefts() -> None:
    model, plain = adapted(), adapted()
    fused = fuse(model)
    for one in (model, plain):
        torch.manual_seed(2)
        one.add_adapter("other", LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", init_lora_weights=False))
    seen = []
    for active in ("default", "other", ["default", "other"], "default"):
        for one in (model, plain):
            one.base_model.set_adapter(active)
        seen.append(logits(model))
        assert torch.allclose(seen[-1], logits(plain), atol=1e-4), active
    assert fused.renewals == 1
    assert not torch.allclose(seen[0], seen[1], atol=1e-2)
