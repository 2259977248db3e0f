"""Frozen weights of a bf16 checkpoint kept in bf16: not one bit of a run differs from fp32 storage. And which runs may do so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from surefoot import adapters
from surefoot.backends import hf
from surefoot.config import Config
from surefoot.ops import head
from surefoot.ops.fuse import fuse
from surefoot.plan import Plan, make_plan
from tests.conftest import H200, SMALL_MODEL, inputs, machine
from tests.test_adapters import adapter_plan, model_plan
from tests.test_fused_layers import IDS, trained_on


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model in bf16; its norms are no powers of two, so that rounding them would show."""
    folder = tmp_path_factory.mktemp("bf16")
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.bfloat16)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(SMALL_MODEL).save_pretrained(folder)
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    return folder


def loaded(checkpoint: Path, dtype: str, vocabulary: int = 0) -> Any:
    return hf.load_model(model_plan(path=str(checkpoint), frozen_dtype=dtype), vocabulary, None)


def adapted(checkpoint: Path, dtype: str, **changes: object) -> Any:
    return adapters.attach(loaded(checkpoint, dtype), adapter_plan(**changes), seed=3)


def differing(first: dict[str, Tensor], second: dict[str, Tensor]) -> list[str]:
    assert first.keys() == second.keys()
    return [name for name in first if first[name].dtype != second[name].dtype or not torch.equal(first[name], second[name])]


def by_peft(model: Any) -> None:
    """As attached."""


def by_fused_layers(model: Any) -> None:
    assert fuse(model).refused == {}


def by_fused_layers_and_loss(model: Any) -> None:
    by_fused_layers(model)
    head.use_head_loss(model, compiled=False)


MAKERS = [by_peft, by_fused_layers, by_fused_layers_and_loss]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])
@pytest.mark.parametrize("changes", [{"method": "dora"}, {"method": "lora"}, {"method": "dora", "lora_dropout": 0.1}], ids=str)
@pytest.mark.parametrize("prepare", MAKERS, ids=lambda maker: maker.__name__)
def test_losses_and_gradients_when_frozen_weights_are_bf16_then_are_those_of_fp32_storage_bit_by_bit(
    checkpoint: Path, prepare: Callable[[Any], None], changes: dict[str, Any], autocast: bool
) -> None:
    found = []
    for dtype in ("bf16", "fp32"):
        model = adapted(checkpoint, dtype, **changes)
        prepare(model)
        before = trained_on(model, autocast)
        optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
        optimizer.step()
        after = trained_on(model, autocast)
        found.append({f"{step}:{name}": value for step, values in enumerate((before, after)) for name, value in values.items()})
    assert differing(*found) == []
    assert not torch.equal(found[0]["0:loss"], found[0]["1:loss"])


@pytest.mark.parametrize("changes", [{"method": "dora"}, {"method": "lora", "init_lora_weights": "gaussian"}], ids=str)
def test_start_when_frozen_weights_are_bf16_then_is_that_of_fp32_storage_bit_by_bit(checkpoint: Path, changes: dict[str, Any]) -> None:
    small, wide = (adapted(checkpoint, dtype, **changes).eval() for dtype in ("bf16", "fp32"))
    starts = [{name: p.detach() for name, p in one.named_parameters() if p.requires_grad} for one in (small, wide)]
    assert differing(*starts) == []
    assert {tensor.dtype for tensor in starts[0].values()} == {torch.float32}
    with torch.no_grad():
        logits = [one(input_ids=IDS, use_cache=False).logits for one in (small, wide)]
    assert logits[0].dtype == torch.float32
    assert torch.equal(*logits)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "fp32"])
def test_residual_stream_when_frozen_weights_are_bf16_then_is_fp32(checkpoint: Path, autocast: bool) -> None:
    model = adapted(checkpoint, "bf16")
    decoder = model.get_base_model().get_decoder()
    seen: list[torch.dtype] = []
    for part in (decoder.embed_tokens, *decoder.layers, decoder.norm):
        part.register_forward_hook(lambda _, __, out: seen.append((out[0] if isinstance(out, tuple) else out).dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        model(input_ids=IDS)
    assert seen == [torch.float32] * 6


def test_storage_when_bf16_then_linear_layers_and_embeddings_alone_are_bf16(checkpoint: Path) -> None:
    small, wide = loaded(checkpoint, "bf16"), loaded(checkpoint, "fp32")
    kinds = {name: parameter.dtype for name, parameter in small.named_parameters()}
    assert {name for name, dtype in kinds.items() if dtype != torch.bfloat16} == {name for name in kinds if "norm" in name}
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert small.lm_head.weight is small.get_input_embeddings().weight
    assert differing(dict(small.named_buffers()), dict(wide.named_buffers())) == []
    assert all(torch.equal(one.float(), other) for one, other in zip(small.parameters(), wide.parameters(), strict=True))


def test_storage_when_the_vocabulary_grows_then_the_new_model_is_that_of_fp32_storage_in_its_old_rows(checkpoint: Path) -> None:
    rows = loaded(checkpoint, "bf16").get_input_embeddings().weight.shape[0]
    small, wide = (loaded(checkpoint, dtype, rows + 1).eval() for dtype in ("bf16", "fp32"))
    embedding = small.get_input_embeddings()
    assert (type(embedding), embedding.weight.dtype, embedding.weight.shape[0]) == (hf.FrozenEmbedding, torch.bfloat16, rows + 64)
    with torch.no_grad():
        first, second = (one(input_ids=IDS, use_cache=False).logits[..., :rows] for one in (small, wide))
    assert torch.equal(first, second)


BF16, F32, F16 = ("BF16",), ("F32",), ("F16",)
LLAMA = {"model_type": "llama", "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
GPU = machine(gpus=(H200,))


def plan(model: Any = LLAMA, stored: tuple[str, ...] = BF16, on: Any = GPU, **flags: object) -> Plan:
    config = Config.parse({"base_model": "org/model", "stage": 2, **flags})
    return make_plan(config, on, inputs(model_config=model, weights_dtypes=stored))


def engine(**changes: object) -> Any:
    return machine(gpus=(H200, H200), world_size=2, local_world_size=2, **changes)


CASES: dict[str, tuple[dict[str, Any], str, bool, bool]] = {  # what is planned: frozen_dtype, fused_adapters, fused_loss
    "bf16 checkpoint": ({}, "bf16", True, True),
    "bf16 named in the config": ({"stored": (), "model": {**LLAMA, "dtype": "bfloat16"}}, "bf16", True, True),
    "bf16 named as before": ({"stored": (), "model": {**LLAMA, "torch_dtype": "bfloat16"}}, "bf16", True, True),
    "fp32 checkpoint": ({"stored": F32}, "fp32", True, True),
    "fp32 weights, bf16 in the config": ({"stored": F32, "model": {**LLAMA, "dtype": "bfloat16"}}, "fp32", True, True),
    "mixed checkpoint": ({"stored": (*BF16, *F32)}, "fp32", True, True),
    "fp16 checkpoint": ({"stored": F16}, "fp32", True, True),
    "unknown dtype": ({"stored": ()}, "fp32", True, True),
    "fp16 precision": ({"fp16": True}, "fp32", True, True),
    "fp32 precision": ({"bf16": False}, "fp32", True, True),
    "pissa": ({"init_lora_weights": "pissa"}, "fp32", True, True),
    "pissa by iterations": ({"init_lora_weights": "pissa_niter_4"}, "fp32", True, True),
    "olora": ({"init_lora_weights": "olora"}, "fp32", True, True),
    "gaussian": ({"init_lora_weights": "gaussian"}, "bf16", True, True),
    "full": ({"adapter_name": "full"}, "fp32", False, False),
    "nf4": ({"load_4bit": True}, "fp32", True, True),
    "zero-3": ({"on": engine(engine="deepspeed", zero_stage=3)}, "bf16", True, True),
    "zero-2": ({"on": engine(engine="deepspeed", zero_stage=2)}, "bf16", True, True),
    "fsdp": ({"on": engine(engine="fsdp")}, "bf16", True, True),
    "gemma2": ({"model": {**LLAMA, "model_type": "gemma2"}}, "bf16", True, False),
    "no config": ({"model": None, "stored": ()}, "fp32", True, False),
    "switched off": ({"fused_adapters": False, "fused_loss": False}, "bf16", False, False),
}


@pytest.mark.parametrize(("given", "frozen_dtype", "adapters_fused", "loss_fused"), CASES.values(), ids=CASES)
def test_fast_paths_when_planned_then_follow_model_and_machine(
    given: dict[str, Any], frozen_dtype: str, adapters_fused: bool, loss_fused: bool
) -> None:
    made = plan(**given)
    assert (made.model.frozen_dtype, made.model.fused_adapters, made.model.fused_loss) == (frozen_dtype, adapters_fused, loss_fused)


def reasons(made: Plan) -> dict[str, str]:
    return {choice.name: choice.reason for choice in made.choices}


def test_fast_paths_when_not_taken_then_the_plan_says_why() -> None:
    assert reasons(plan(stored=F32))["frozen_dtype"] == "the checkpoint holds F32"
    assert reasons(plan(stored=()))["frozen_dtype"] == "the checkpoint's dtype is not known"
    assert reasons(plan(fp16=True))["frozen_dtype"] == "products are computed in fp16"
    assert "gemma2" in reasons(plan(model={**LLAMA, "model_type": "gemma2"}))["fused_loss"]


def test_fast_path_when_asked_for_but_impossible_then_a_note_says_so() -> None:
    gemma = {**LLAMA, "model_type": "gemma2"}
    assert not any("fused" in note for note in plan(model=gemma).notes)
    notes = plan(model=gemma, fused_loss=True).notes
    assert any(note.startswith("--fused_loss=True is not followed: model type gemma2") for note in notes)
