"""make_plan(): pure, every rule with its way out, every choice with its reason."""

from __future__ import annotations

import json

import pytest

from surefoot import plan_text
from surefoot.config import Config
from surefoot.errors import BackendError, PlanError
from surefoot.inputs import RunFolder
from surefoot.plan import Plan, make_plan
from tests.conftest import H200, T4, VERSIONS, inputs, machine


def plan(*, on: object = None, where: object = None, **flags: object) -> Plan:
    config = Config.parse({"base_model": "org/model", **flags})
    return make_plan(config, on or machine(), where or inputs())  # type: ignore[arg-type]


def choice(made: Plan, name: str) -> tuple[object, str, str]:
    return next((c.value, c.source, c.reason) for c in made.choices if c.name == name)


@pytest.mark.parametrize(
    ("batch", "micro", "world", "accumulation"),
    [(128, 2, 1, 64), (128, 2, 8, 8), (16, 16, 1, 1), (16, 4, 4, 1), (96, 8, 4, 3)],
)
@pytest.mark.parametrize("engine", ["ddp", "deepspeed", "fsdp"])
def test_accumulation_when_split_then_divides_by_processes_under_every_engine(
    batch: int, micro: int, world: int, accumulation: int, engine: str
) -> None:
    made = plan(on=machine(world_size=world, engine=engine), batch_size=batch, per_device_train_batch_size=micro)
    assert made.train.gradient_accumulation_steps == accumulation


def test_batch_when_it_does_not_divide_then_names_the_nearest() -> None:
    with pytest.raises(PlanError) as caught:
        plan(on=machine(world_size=4), batch_size=100, per_device_train_batch_size=8)
    assert str(caught.value) == "--batch_size=100 cannot be split: per_device_train_batch_size=8 x 4 processes = 32. Use 96 or 128"


def test_batch_when_only_accumulation_is_given_then_follows() -> None:
    made = plan(on=machine(world_size=2), per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert (made.train.batch_size, made.train.gradient_accumulation_steps) == (16, 4)


def test_batch_when_default_micro_does_not_divide_then_shrinks_it_with_a_reason() -> None:
    made = plan(batch_size=6)
    assert (made.train.per_device_train_batch_size, made.train.gradient_accumulation_steps) == (3, 2)
    assert "divides batch_size" in choice(made, "per_device_train_batch_size")[2]


@pytest.mark.parametrize(
    ("flags", "gpus", "precision", "source"),
    [
        ({}, (), "fp32", "auto"), ({}, (H200,), "bf16", "auto"), ({}, (T4,), "fp16", "auto"), ({"bf16": True}, (), "bf16", "flag"),
        ({"bf16": False}, (H200,), "fp32", "flag"), ({"bf16": False, "fp16": True}, (H200,), "fp16", "flag"), ({"fp16": False}, (H200,), "fp32", "flag"),
    ],
)  # fmt: skip
def test_precision_when_chosen_then_fits_the_hardware(
    flags: dict[str, object], gpus: tuple[object, ...], precision: str, source: str
) -> None:
    made = plan(on=machine(gpus=gpus), **flags)
    assert choice(made, "precision")[:2] == (precision, source)


@pytest.mark.parametrize(
    ("flags", "on", "says"),
    [
        ({"bf16": True, "fp16": True}, machine(gpus=(H200,)), "exclude each other"),
        ({"fp16": True}, machine(), "no effect on a CPU"),
        ({"bf16": True}, machine(gpus=(T4,)), "compute capability 8.0; Tesla T4 has 7.5"),
        ({"fp16": True}, machine(gpus=(H200,), launcher_precision="bf16"), "mixed_precision: bf16, the flags say fp16"),
        ({"load_4bit": True, "load_8bit": True}, machine(), "exclude each other"),
        ({"load_4bit": True, "adapter_name": "full"}, machine(), "quantized weights cannot be trained"),
        ({"load_8bit": True, "adapter_name": "dora"}, machine(), "fails on a CPU"),
        ({"load_4bit": True}, machine(versions={}), "pip install 'surefoot[bnb]'"),
        ({"load_4bit": True, "init_lora_weights": "pissa"}, machine(), "needs the unquantized weights"),
        ({"init_lora_weights": "eva"}, machine(), "init_lora_weights=eva"),
        ({"init_lora_weights": "loftq"}, machine(), "init_lora_weights=loftq"),
        ({"attn_implementation": "flash_attention_2"}, machine(), "needs a CUDA GPU"),
        ({"attn_implementation": "flash_attention_2"}, machine(gpus=(H200,)), "is not installed"),
        ({"gradient_accumulation_steps": 3, "batch_size": 128}, machine(), "contradicts --batch_size=128"),
        ({"warmup_steps": 5, "warmup_ratio": 0.1}, machine(), "exclude each other"),
        ({"warmup_ratio": 5}, machine(), "must be below 1"),
        ({"optim": "adamw_8bit"}, machine(), "needs a GPU"),
        ({"max_steps": 0}, machine(), "nothing to train"),
        ({"num_epochs": 0}, machine(), "nothing to train"),
        ({"learning_rate": 0}, machine(), "would learn nothing"),
        ({"lora_dropout": 1}, machine(), "must be below 1"),
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, machine(), "use --save_strategy=steps"),
        ({"load_best_model_at_end": True, "eval_step": 30, "save_step": 80}, machine(), "use --save_step=60"),
        ({"load_best_model_at_end": True, "val_set_size": 0}, machine(), "no evaluation during training"),
        ({"report_to": "wandb"}, machine(), "pip install wandb"),
        ({"report_to": "none,wandb"}, machine(), "none stands alone"),
        ({"resume": True, "overwrite": True}, machine(), "exclude each other"),
    ],
)  # fmt: skip
def test_plan_when_flags_contradict_then_says_the_rule_and_the_way_out(flags: dict[str, object], on: object, says: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(on=on, **flags)
    assert says in str(caught.value)


def test_plan_when_several_rules_break_then_names_all() -> None:
    with pytest.raises(PlanError, match="3 problems"):
        plan(fp16=True, learning_rate=0, lora_dropout=1)


@pytest.mark.parametrize(
    ("folder", "flags", "says"),
    [
        (RunFolder(status="finished"), {}, "holds a finished run"),
        (RunFolder(status="finished"), {"resume": True}, "is finished"),
        (RunFolder(status="unfinished", checkpoints=("o/checkpoint-5",)), {}, "--resume continues it"),
        (RunFolder(status="foreign", clash="adapter_model.safetensors"), {}, "holds adapter_model.safetensors"),
        (RunFolder(status="foreign", clash="adapter_model.safetensors"), {"overwrite": True}, "no run of this program"),
    ],
)
def test_run_folder_when_something_would_be_lost_then_refuses(folder: RunFolder, flags: dict[str, object], says: str) -> None:
    with pytest.raises(PlanError) as caught:
        plan(where=inputs(run_folder=folder), **flags)
    assert says in str(caught.value)


def test_resume_when_a_checkpoint_is_there_then_takes_the_newest() -> None:
    folder = RunFolder(status="unfinished", checkpoints=("o/checkpoint-5", "o/checkpoint-10"))
    assert plan(where=inputs(run_folder=folder), resume=True).output.resume_from == "o/checkpoint-10"
    assert plan(resume=True).output.resume_from is None


def test_resume_when_the_settings_changed_then_names_them() -> None:
    folder = RunFolder(status="unfinished", checkpoints=("o/checkpoint-5",))
    stamp = plan().stamp() | {"quantization": "nf4", "world_size": 2}
    with pytest.raises(PlanError) as caught:
        plan(where=inputs(run_folder=folder, resume_stamp=stamp), resume=True)
    assert "quantization nf4 -> none" in str(caught.value)
    assert "world_size 2 -> 1" in str(caught.value)


@pytest.mark.parametrize(
    ("stage", "flags", "versions", "attention", "compiles"),
    [
        (1, {}, VERSIONS, ("eager", "stage 1"), False),
        (2, {}, VERSIONS, ("sdpa", "stage 2"), False),
        (2, {}, VERSIONS | {"flash-attn": "2.8.3"}, ("flash_attention_2", "stage 2"), False),
        (3, {}, VERSIONS, ("sdpa", "stage 3"), True),
        (3, {"attn_implementation": "eager", "enable_torch_compile": False}, VERSIONS, ("eager", "flag"), False),
    ],
)
def test_stage_when_given_then_sets_what_no_flag_sets(
    stage: int, flags: dict[str, object], versions: dict[str, str], attention: tuple[str, str], compiles: bool
) -> None:
    made = plan(on=machine(gpus=(H200,), versions=versions), stage=stage, **flags)
    assert choice(made, "attn_implementation")[:2] == attention
    assert made.model.enable_torch_compile is compiles


def test_sdpa_switches_when_attention_is_eager_then_say_they_have_no_effect() -> None:
    made = plan(on=machine(gpus=(H200,)), disable_cudnn_sdpa=False)
    assert choice(made, "disable_cudnn_sdpa") == (False, "flag", "no effect: only sdpa attention on a GPU reads it")


def test_backend_when_unsloth_is_asked_for_then_falls_back_loudly_or_fails_strictly() -> None:
    assert any("Falling back to transformers backend" in note for note in plan(backend="unsloth").notes)
    with pytest.raises(BackendError) as caught:
        plan(backend="unsloth", strict_backend=True)
    assert caught.value.exit_code == 5


def test_best_model_when_diagnostic_steps_do_not_coincide_then_is_off_with_a_reason() -> None:
    value, source, reason = choice(plan(eval_step=10, save_step=999999), "load_best_model_at_end")
    assert (value, source) == (False, "auto")
    assert "no multiple of eval_step=10" in reason


def test_plan_when_made_twice_then_is_the_same_and_prints_as_json() -> None:
    assert plan(lora_r=4) == plan(lora_r=4)
    record = json.loads(plan_text.as_json(plan(lora_r=4)))
    assert record["adapter"]["lora_r"] == 4
    assert {"name": "lora_r", "value": 4, "source": "flag", "reason": ""} in record["choices"]


def test_table_when_short_then_counts_what_it_leaves_out() -> None:
    made = plan()
    short, full = plan_text.table(made, all_rows=False), plan_text.table(made, all_rows=True)
    assert len(short.splitlines()) < len(full.splitlines())
    assert "more at their defaults" in short
    assert all(f"\n{c.name} " in full for c in made.choices)


def test_process_when_it_is_one_of_several_on_a_machine_then_has_its_own_gpu() -> None:
    here = machine(gpus=(H200, H200), world_size=2, local_world_size=2, rank=1, local_rank=1, engine="ddp")
    assert make_plan(Config.parse({"base_model": "org/model"}), here, inputs()).process.gpu == 1
    assert make_plan(Config.parse({"base_model": "org/model"}), machine(), inputs()).process.gpu is None
