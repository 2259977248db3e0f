"""The attached adapter: fp32 masters, magnitudes from the fp32 norm, and files that plain PEFT reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from surefoot import adapters
from surefoot.backends import hf
from surefoot.errors import UsageError
from surefoot.plan import AdapterPlan, ModelPlan
from tests.conftest import SMALL_MODEL

PROMPT = torch.arange(20, 60).reshape(2, 20)


def model_plan(**changes: object) -> ModelPlan:
    values: dict[str, object] = {
        "path": str(SMALL_MODEL), "revision": None, "trust_remote_code": False, "attn_implementation": "eager", "quantization": "none",
        "compute_dtype": "fp32", "enable_torch_compile": False, "recompute_layers": 0, "offload_inputs": False, "cutoff_len": 256, "use_gradient_checkpointing": "auto",
        "frozen_dtype": "fp32", "loads_on_gpu": False, "fused_adapters": False, "fused_loss": False,
    }  # fmt: skip
    return ModelPlan(**{**values, **changes})  # type: ignore[arg-type]


def adapter_plan(**changes: object) -> AdapterPlan:
    values: dict[str, object] = {
        "method": "dora", "use_rslora": False, "lora_r": 4, "lora_alpha": 8.0, "lora_dropout": 0.0, "target_modules": None,
        "init_lora_weights": True,
    }  # fmt: skip
    return AdapterPlan(**{**values, **changes})  # type: ignore[arg-type]


def logits(model: object) -> torch.Tensor:
    model.eval()  # type: ignore[attr-defined]
    with torch.no_grad():
        return model(input_ids=PROMPT, use_cache=False).logits  # type: ignore[operator]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_magnitude_when_attached_then_is_the_fp32_norm_and_the_start_is_the_base(quantization: str) -> None:
    plan = model_plan(quantization=quantization)
    base = logits(hf.load_model(plan, 0, None))
    model = adapters.attach(hf.load_model(plan, 0, None), adapter_plan(), seed=1)
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    assert len(layers) > 7
    for layer in layers:
        magnitude = layer.lora_magnitude_vector["default"].weight
        weight = adapters.dequantize_module_weight(layer.get_base_layer())
        assert magnitude.dtype == torch.float32
        assert torch.allclose(magnitude.double(), torch.linalg.vector_norm(weight.double(), dim=1), rtol=1e-6)
    assert torch.allclose(logits(model), base, atol=1e-4 if quantization == "none" else 0.05)


def test_magnitude_when_the_base_is_bf16_then_peft_alone_is_off_and_ours_is_not() -> None:
    base = hf.load_model(model_plan(), 0, None).to(torch.bfloat16)
    model = adapters.attach(base, adapter_plan(), seed=1)
    layer = next(layer for layer in model.modules() if isinstance(layer, LoraLayer))
    exact = torch.linalg.vector_norm(layer.get_base_layer().weight.double(), dim=1)
    ours = layer.lora_magnitude_vector["default"].weight.double()
    rounded = exact.to(torch.bfloat16).double()
    assert (ours / exact - 1).abs().max() < 1e-6
    assert (rounded / exact - 1).abs().max() > 1e-4


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
def test_trainable_tensors_when_attached_then_are_fp32(method: str) -> None:
    base = hf.load_model(model_plan(), 0, None)
    model = adapters.attach(base, adapter_plan(method=method), seed=1)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
    assert any("magnitude" in name for name in trained) is (method == "dora")
    assert (len(trained) == len(list(model.parameters()))) is (method == "full")


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora"}, {"method": "dora"}, {"method": "dora", "use_rslora": True}, {"method": "lora", "init_lora_weights": "pissa"},
        {"method": "lora", "init_lora_weights": "olora"}, {"method": "lora", "init_lora_weights": "gaussian"},
        {"method": "lora", "init_lora_weights": "orthogonal"}, {"method": "dora", "init_lora_weights": "pissa"},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)  # fmt: skip
def test_saved_adapter_when_loaded_by_plain_peft_then_gives_equal_logits(tmp_path: Path, changes: dict[str, object]) -> None:
    model = adapters.attach(hf.load_model(model_plan(), 0, None), adapter_plan(**changes), seed=1)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():  # as if trained
        if parameter.requires_grad:
            parameter.data += 0.01 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(hf.load_model(model_plan(), 0, None), tmp_path)
    assert torch.allclose(logits(again), logits(model), atol=1e-4)


def test_target_modules_when_one_is_misspelt_then_is_refused_with_the_names() -> None:
    with pytest.raises(UsageError) as caught:
        hf.load_model(model_plan(), 0, ("q_proj", "k_prj"))
    assert "no linear layer k_prj" in str(caught.value)
    assert "down_proj, gate_proj, k_proj" in str(caught.value)


def test_attach_when_seed_is_the_same_then_draws_the_same_adapter() -> None:
    first, second = (adapters.attach(hf.load_model(model_plan(), 0, None), adapter_plan(), seed=7).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_embeddings_when_the_vocabulary_grew_then_have_a_multiple_of_64_rows() -> None:
    rows = hf.load_model(model_plan(), 0, None).get_input_embeddings().weight.shape[0]
    grown = hf.load_model(model_plan(), rows + 1, None)
    assert grown.get_input_embeddings().weight.shape[0] == -(-(rows + 1) // 64) * 64
