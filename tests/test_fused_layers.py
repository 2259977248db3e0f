"""A PeftModel after fuse(): PEFT's loss and gradients, norms renewed when anything changes, PEFT's own forward where it must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from peft.helpers import rescale_adapter_scale
from torch import Tensor

from surefoot import adapters
from surefoot.backends import hf
from surefoot.ops import layers
from surefoot.ops.fuse import Fused, fuse
from surefoot.ops.layers import Fusion
from tests.test_adapters import adapter_plan, logits, model_plan

IDS = torch.arange(20, 100).reshape(2, 40)
LIMIT = 1e-5


def adapted(quantization: str = "none", compute_dtype: str = "fp32", **changes: object) -> Any:
    """The small model with an adapter that looks trained."""
    plan = model_plan(quantization=quantization, compute_dtype=compute_dtype)
    return disturbed(adapters.attach(hf.load_model(plan, 0, None), adapter_plan(**changes), seed=1))


def disturbed(model: Any, by: float = 0.02) -> Any:
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(by * torch.randn(parameter.shape, generator=draw).to(parameter.device))
    return model


def trained_on(model: Any, bf16: bool = False) -> dict[str, Tensor]:
    """Loss and gradients by name; dropout draws the same masks each time."""
    model.train()
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {"loss": loss.detach(), **gradients}


def furthest(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    assert ours.keys() == truth.keys()
    return max(float((ours[name] - truth[name]).norm() / truth[name].norm()) for name in truth)


@contextmanager
def by_peft(fused: Fused) -> Iterator[None]:
    """PEFT's own forward in every layer."""
    for layer in fused.layers:
        layer.is_fused = False
    yield
    for layer in fused.layers:
        layer.is_fused = True


def assert_logits_are_pefts(model: Any, fused: Fused) -> None:
    """The fused logits are PEFT's own."""
    with by_peft(fused):
        truth = logits(model)
    assert torch.allclose(logits(model), truth, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "lora"}, {"method": "dora"}, {"method": "lora", "use_rslora": True}, {"method": "dora", "use_rslora": True},
        {"method": "dora", "lora_alpha": 1.0}, {"method": "lora", "lora_dropout": 0.1}, {"method": "dora", "lora_dropout": 0.1},
        {"method": "lora", "quantization": "nf4"}, {"method": "dora", "quantization": "nf4"},
        {"method": "dora", "quantization": "nf4", "lora_dropout": 0.1}, {"method": "dora", "target_modules": ("q_proj", "up_proj")},
    ],
    ids=lambda changes: "-".join(str(value) for value in changes.values()),
)  # fmt: skip
@pytest.mark.parametrize("recomputed", [False, True], ids=["kept", "recomputed"])
def test_model_when_fused_then_loss_and_gradients_are_pefts(changes: dict[str, Any], recomputed: bool) -> None:
    model = adapted(**changes)
    truth = trained_on(model)
    fused = fuse(model)
    assert (len(fused.layers), fused.refused) == (8 if "target_modules" in changes else 28, {})
    if recomputed:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    assert furthest(trained_on(model), truth) < LIMIT
    assert fused.renewals == (changes["method"] == "dora")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_model_when_under_bf16_autocast_then_is_as_near_to_fp32_as_peft(method: str, quantization: str, dropout: float) -> None:
    truth = trained_on(adapted(quantization, method=method, lora_dropout=dropout))
    model = adapted(quantization, "bf16", method=method, lora_dropout=dropout)
    plain = furthest(trained_on(model, bf16=True), truth)
    fuse(model)
    ours = furthest(trained_on(model, bf16=True), truth)
    assert ours < 1.5 * plain, (ours, plain)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_layers_when_traced_by_dynamo_then_loss_and_gradients_are_the_same(method: str, bf16: bool) -> None:
    model = adapted(method=method)
    fuse(model)
    wanted = trained_on(model, bf16)
    for layer in model.get_decoder().layers:
        layer.compile(backend="eager")
    assert furthest(trained_on(model, bf16), wanted) < (0.02 if bf16 else 1e-5)


def test_layers_when_they_share_an_input_then_are_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("adapted_linears", "adapted_mlp"):
        kept = getattr(layers, name)
        monkeypatch.setattr(layers, name, lambda *words, kept=kept, name=name: calls.append((name, len(words[2]))) or kept(*words))
    model = adapted()
    fuse(model)
    logits(model)
    assert calls == [("adapted_linears", 3), ("adapted_linears", 1), ("adapted_mlp", 3)] * 4


def test_norms_when_gradients_accumulate_then_are_renewed_once_a_step() -> None:
    model = adapted()
    fused = fuse(model)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-2)
    for step in range(3):
        for _ in range(4):
            model(input_ids=IDS, labels=IDS).loss.backward()
        assert fused.renewals == step + 1
        optimizer.step()
        optimizer.zero_grad()
    assert_logits_are_pefts(model, fused)
    assert fused.renewals == 4


class DataOptimizer(torch.optim.Optimizer):
    """Writes through .data, which autograd's version counter does not see."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(0.1)


def trained_parameters(model: Any) -> list[Any]:
    return [parameter for name, parameter in model.named_parameters() if "lora_A" in name or "lora_B" in name]


def load(model: Any, other: Any) -> None:
    set_peft_model_state_dict(model, get_peft_model_state_dict(other))


def assign(model: Any, other: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in other.state_dict().items()}, assign=True)
    for parameter in trained_parameters(model):
        parameter.requires_grad_()


def step_by(model: Any, kind: Callable[..., Any]) -> None:
    optimizer = kind(trained_parameters(model), {"lr": 0.1}) if kind is DataOptimizer else kind(trained_parameters(model), lr=0.1)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "load_adapter": lambda model: load(model, disturbed(adapted(), 0.1)),
    "load_state_dict": lambda model: model.load_state_dict(disturbed(adapted(), 0.1).state_dict()),
    "assign": lambda model: assign(model, disturbed(adapted(), 0.1)),
    "in_place": lambda model: disturbed(model, 0.1),
    "sgd": lambda model: step_by(model, torch.optim.SGD),
    "adamw": lambda model: step_by(model, torch.optim.AdamW),
    "data_optimizer": lambda model: step_by(model, DataOptimizer),
    "scale": lambda model: [layer.set_scale("default", 3.0) for layer in model.modules() if isinstance(layer, Fusion)],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_norms_when_what_they_depend_on_changes_then_are_renewed(change: Callable[[Any], Any]) -> None:
    model = adapted()
    fused = fuse(model)
    assert_logits_are_pefts(model, fused)
    before = logits(model)
    assert fused.renewals == 1
    change(model)
    assert_logits_are_pefts(model, fused)
    assert fused.renewals == 2
    assert not torch.allclose(logits(model), before, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_scale_when_changed_for_one_layer_or_all_then_logits_are_pefts(method: str) -> None:
    model = adapted(method=method)
    fused = fuse(model)
    with rescale_adapter_scale(model, 0.25):
        assert_logits_are_pefts(model, fused)
    assert_logits_are_pefts(model, fused)
    for layer in fused.layers[::2]:
        layer.set_scale("default", 3.0)
    assert_logits_are_pefts(model, fused)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_generate_when_fused_then_gives_pefts_tokens(quantization: str) -> None:
    model = adapted(quantization).eval()
    wanted = model.generate(
        input_ids=IDS, max_new_tokens=8, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True
    )
    fuse(model)
    found = model.generate(
        input_ids=IDS, max_new_tokens=8, do_sample=False, use_cache=True, output_logits=True, return_dict_in_generate=True
    )
    assert torch.equal(found.sequences, wanted.sequences)
    assert torch.allclose(torch.stack(found.logits), torch.stack(wanted.logits), atol=1e-4)
    assert wanted.sequences.shape[1] > IDS.shape[1]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_model_when_its_adapter_is_off_or_merged_then_is_the_base_or_itself(method: str) -> None:
    base = logits(hf.load_model(model_plan(), 0, None))
    model = adapted(method=method)
    wanted = logits(model)
    fuse(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.merge_adapter()
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    model.unmerge_adapter()
    assert torch.allclose(logits(model), wanted, atol=1e-4)
    assert not torch.allclose(wanted, base, atol=1e-2)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_model_when_merged_and_unloaded_or_unloaded_then_still_computes(method: str) -> None:
    base = logits(hf.load_model(model_plan(), 0, None))
    first, second = adapted(method=method), adapted(method=method)
    wanted = logits(first)
    fuse(first)
    fuse(second)
    assert torch.allclose(logits(first.merge_and_unload()), wanted, atol=1e-4)
    assert torch.equal(logits(second.unload()), base)
