"""Adapter health and sick weights, by breaking the thing on purpose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from finetune import train
from surefoot import adapters, weights
from surefoot.backends import hf
from surefoot.errors import BackendError, DataError, NumericsError
from surefoot.training import health, saved
from surefoot.training.health import Health, Movement, check_optimizer, without_gradient
from surefoot.training.loop import SurefootTrainer
from tests.conftest import SMALL_MODEL
from tests.runs import quick
from tests.test_adapters import adapter_plan, logits, model_plan

IDS = np.arange(20, 60, dtype=np.int32)


@pytest.fixture
def model() -> Any:
    return adapters.attach(hf.load_model(model_plan(), 0, None), adapter_plan(), seed=1)


def named(model: Any, part: str) -> tuple[str, torch.nn.Parameter]:
    return next((name, parameter) for name, parameter in model.named_parameters() if part in name)


def optimizer(model: Any) -> torch.optim.AdamW:
    trained = list(health.trainable(model))
    return torch.optim.AdamW(
        [
            {"params": [parameter for name, parameter in trained if health.is_decayed(name)], "weight_decay": 0.01},
            {"params": [parameter for name, parameter in trained if not health.is_decayed(name)], "weight_decay": 0.0},
        ]
    )


def test_masters_when_the_engine_cast_a_magnitude_then_stop_the_run(model: Any) -> None:
    health.check_masters(model)
    name, magnitude = named(model, "magnitude")
    magnitude.data = magnitude.data.to(torch.bfloat16)
    with pytest.raises(BackendError) as caught:
        health.check_masters(model)
    assert f"{name} (bfloat16)" in str(caught.value)


def test_optimizer_when_it_lost_a_group_then_names_the_first_tensor(model: Any) -> None:
    made = optimizer(model)
    check_optimizer(model, made)
    del made.param_groups[1]
    with pytest.raises(BackendError, match=r"28 trainable tensors are in no group of the optimizer .*magnitude"):
        check_optimizer(model, made)


def test_optimizer_when_it_decays_magnitudes_then_is_refused(model: Any) -> None:
    made = optimizer(model)
    made.param_groups[1]["weight_decay"] = 0.01
    with pytest.raises(BackendError, match="28 magnitudes, norms or biases are under weight decay"):
        check_optimizer(model, made)


def test_run_when_trainers_own_decay_groups_are_used_then_is_refused(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers decays lora_magnitude_vector."""
    monkeypatch.delattr(SurefootTrainer, "get_decay_parameter_names")
    with pytest.raises(BackendError, match="are under weight decay"):
        train(data_path=rows, output_dir=tmp_path / "run", **quick())


def test_gradient_when_missing_zero_or_not_finite_then_is_named(model: Any) -> None:
    for _, parameter in health.trainable(model):
        parameter.grad = torch.ones_like(parameter)
    assert without_gradient(model) == []
    (a, one), (b, two), (m, three) = (named(model, part) for part in ("lora_A", "lora_B", "magnitude"))
    one.grad, two.grad = None, torch.zeros_like(two)
    assert three.grad is not None
    three.grad[0] = float("nan")
    assert sorted(without_gradient(model)) == sorted([a, b, m])


def test_movement_when_less_than_the_last_place_then_is_still(model: Any) -> None:
    movement = Movement(model)
    assert movement.still(model).frozen_kinds == ("A", "B", "magnitude")
    name, magnitude = named(model, "magnitude")
    magnitude.data = torch.nextafter(magnitude.data, torch.tensor(float("inf")))
    assert name in movement.still(model).names
    magnitude.data *= 1 + 1e-5
    assert name not in movement.still(model).names
    assert movement.still(model).frozen_kinds == ("A", "B")


@pytest.mark.parametrize("part", ["magnitude", "lora_B"])
def test_run_when_a_kind_of_tensor_is_frozen_then_exits_4_after_20_steps(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """As in huggingface/trl#7268 and meta-pytorch/torchtune#2250: trainable, updated, and never changed."""
    drop = SurefootTrainer._get_grad_norm

    def frozen(self: Any, live: Any, **named: Any) -> Any:
        norm = drop(self, live, **named)
        for name, parameter in live.named_parameters():
            if part in name:
                parameter.grad = None
        return norm

    monkeypatch.setattr(SurefootTrainer, "_get_grad_norm", frozen)
    word = "magnitude" if part == "magnitude" else "B"
    with pytest.raises(NumericsError, match=f"nothing was learned by the {word} tensors: none of them moved .* after 20 steps"):
        train(data_path=rows, output_dir=tmp_path / "run", **quick(max_steps=30, eval_strategy="no", save_strategy="no", batch_size=4))
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


def test_health_when_the_warm_up_is_long_then_waits_before_it_judges(model: Any) -> None:
    class State:
        global_step = max_steps = 0

    rate = torch.optim.AdamW([{"params": [named(model, "magnitude")[1]], "lr": 1e-12}])
    checked, state = Health(checks_optimizer=False), State()
    checked.on_train_begin(None, state, None, model=model)
    for _ in range(40):
        state.global_step += 1
        checked.on_step_end(None, state, None, model=model, optimizer=rate)
    assert checked.due == 80
    rate.param_groups[0]["lr"] = 1e-3
    for _ in range(39):
        state.global_step += 1
        checked.on_step_end(None, state, None, model=model, optimizer=rate)
    state.global_step += 1
    with pytest.raises(NumericsError, match="after 80 steps"):
        checked.on_step_end(None, state, None, model=model, optimizer=rate)


def test_run_when_every_row_is_masked_then_is_refused_before_the_model(tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("\n".join(json.dumps({"instruction": "Say.", "output": " "}) for _ in range(8)))
    with pytest.raises(DataError):
        train(data_path=data, output_dir=tmp_path / "run", **quick())


def test_step_when_no_token_is_trained_then_is_skipped(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from surefoot.data.rows import Collator

    collate = Collator.__call__

    def masked(self: Any, batch: Any) -> Any:
        out = collate(self, batch)
        out["labels"].fill_(-100)
        return out

    monkeypatch.setattr(Collator, "__call__", masked)
    with pytest.raises(NumericsError, match="no token of the batch is trained, 3 steps in a row"):
        train(data_path=rows, output_dir=tmp_path / "run", **quick(eval_strategy="no"))


@pytest.fixture
def kept(model: Any, tmp_path: Path) -> Path:
    for _, parameter in health.trainable(model):
        parameter.data += 0.01
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    return tmp_path


def test_saved_adapter_when_whole_then_has_equal_tensors_and_logits(model: Any, kept: Path) -> None:
    before = logits(model)
    found = saved.check(model, kept, IDS)
    assert found["tensors"] == 84
    assert found["logits"].startswith("equal on 40 tokens")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model), before)


BREAKS: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], object], str]] = {
    "lost": (lambda tensors, name: tensors.pop(name), "is missing"),
    "added": (lambda tensors, name: tensors.update(extra=torch.ones(1)), "extra is in the file only"),
    "nan": (lambda tensors, name: tensors[name].view(-1)[:1].fill_(float("nan")), "is not finite"),
    "reshaped": (lambda tensors, name: tensors.update({name: torch.ones(3)}), "has shape (3,) instead of"),
    "rounded": (lambda tensors, name: tensors[name].copy_(tensors[name].to(torch.bfloat16)), "differs from the trained one"),
}


@pytest.mark.parametrize("how", BREAKS)
def test_saved_adapter_when_broken_then_is_named(model: Any, kept: Path, how: str) -> None:
    break_it, words = BREAKS[how]
    tensors = load_file(kept / "adapter_model.safetensors")
    break_it(tensors, next(iter(tensors)))
    save_file(tensors, kept / "adapter_model.safetensors")
    with pytest.raises(BackendError) as caught:
        saved.check(model, kept, IDS)
    assert words in str(caught.value)


@pytest.mark.parametrize("size", [0, 40], ids=["empty", "cut_off"])
def test_saved_adapter_when_empty_or_cut_off_then_is_refused(model: Any, kept: Path, size: int) -> None:
    """ZeRO-3 saved adapters of 40 bytes and the run succeeded (huggingface/trl#4416)."""
    file = kept / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(BackendError, match="cannot be read back"):
        saved.check(model, kept, IDS)


def test_saved_adapter_when_its_config_lies_then_gives_other_logits(model: Any, kept: Path) -> None:
    config = json.loads((kept / "adapter_config.json").read_text())
    (kept / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 80}))
    with pytest.raises(BackendError, match="loads back to other logits"):
        saved.check(model, kept, IDS)


def spoilt_base(folder: Path, name: str, value: float, rows: slice) -> Path:
    """The small model with rows of one weight set to a value."""
    shutil.copytree(SMALL_MODEL, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[name][rows] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


TARGET = "model.layers.1.self_attn.o_proj"


def test_dora_when_rows_of_the_base_are_zero_then_trains_without_nan_and_names_them(
    rows: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = spoilt_base(tmp_path / "base", f"{TARGET}.weight", 0.0, slice(3, 7))
    folder = train(**{**quick(), "base_model": base, "data_path": rows, "output_dir": tmp_path / "run"})
    assert f"zero rows: 4 in 1 target matrices: {TARGET} (4); DoRA starts them" in capfd.readouterr().out
    record = json.loads((folder / "run.json").read_text())
    assert record["zero_rows"] == {TARGET: 4}
    assert record["summary"]["bad_steps"] == []
    plain = PeftModel.from_pretrained(hf.load_model(model_plan(path=str(base)), 0, None), folder)
    assert torch.isfinite(logits(plain)).all()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_zero_rows_when_attached_then_the_model_still_starts_as_its_base(tmp_path: Path, quantization: str) -> None:
    plan = model_plan(path=str(spoilt_base(tmp_path / "base", f"{TARGET}.weight", 0.0, slice(3, 7))), quantization=quantization)
    base = hf.load_model(plan, 0, None)
    assert weights.zero_rows(base, None) == {TARGET: 4}
    assert weights.zero_rows(base, ("q_proj",)) == {}
    before = logits(base)
    assert torch.allclose(logits(adapters.attach(base, adapter_plan(), seed=1)), before, atol=1e-4 if quantization == "none" else 0.05)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("name", [f"{TARGET}.weight", "model.norm.weight"])
def test_base_when_a_weight_is_nan_then_is_refused_by_name(rows: Path, tmp_path: Path, method: str, name: str) -> None:
    base = spoilt_base(tmp_path / "base", name, float("nan"), slice(0, 2))
    with pytest.raises(BackendError) as caught:
        train(**{**quick(adapter_name=method), "base_model": base, "data_path": rows, "output_dir": tmp_path / "run"})
    assert f"weights are not finite: {name}" in str(caught.value)
    assert not (tmp_path / "run").exists()
