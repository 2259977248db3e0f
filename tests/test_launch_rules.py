"""Profile, processes, GPUs and flags that do not agree end the plan with one line and the command to type."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from surefoot.config import Config
from surefoot.errors import PlanError
from surefoot.machine import Machine, probe
from surefoot.plan import Plan, make_plan
from surefoot.rules.launch import PROFILES
from tests.conftest import H200, ROOT, inputs, machine

LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip


def group(gpus: int, local: int, **changes: object) -> Machine:
    """A machine with `gpus` GPUs and `local` processes of one launch."""
    values = {
        "engine": "ddp" if local > 1 else "single",
        "world_size": local,
        "local_world_size": local,
        "is_launched": True,
        "has_profile": True,
    }
    return machine(gpus=(H200,) * gpus, **{**values, **changes})


def plan(on: Machine, config: object = None, **flags: object) -> Plan:
    return make_plan(Config.parse({"base_model": "org/model", **flags}), on, inputs(model_config=config))


def refusal(on: Machine, config: object = None, **flags: object) -> str:
    with pytest.raises(PlanError) as caught:
        plan(on, config, **flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("on", "says"),
    [
        (group(2, 4), "2 of 4 processes have no GPU: 2 visible. Type: accelerate launch --config_file profiles/ddp.yaml --num_processes 2 finetune.py"),
        (group(1, 2), "1 of 2 processes have no GPU: 1 visible. Type: accelerate launch --config_file profiles/single.yaml finetune.py"),
        (group(4, 2, engine="deepspeed", zero_stage=2), "2 of 4 GPUs would be idle under 2 processes. Type: accelerate launch --config_file profiles/ds_zero2.yaml --num_processes 4"),
        (group(4, 2), "put CUDA_VISIBLE_DEVICES=0,1 before your command"),
        (group(4, 1, engine="fsdp"), "3 of 4 GPUs would be idle under 1 process. Type: accelerate launch --config_file profiles/fsdp2.yaml --num_processes 4"),
        (group(4, 1, is_launched=False), "--config_file profiles/ddp.yaml --num_processes 4"),
        (group(1, 1), "a profile for many processes was launched with one. Type: accelerate launch --config_file profiles/single.yaml finetune.py"),
        (group(1, 1, is_launched=False, is_cut_short=True), "asked for several processes and started one, as this profile makes it do. Type: accelerate launch --config_file profiles/single.yaml finetune.py"),
        (group(0, 1, is_launched=False, is_cut_short=True), "finetune.py ..., or with profiles/cpu_2proc.yaml for two processes"),
        (group(0, 1, engine="deepspeed", zero_stage=3), "launched with one. Type: accelerate launch --config_file profiles/cpu.yaml finetune.py"),
        (group(8, 4, world_size=8), "--num_processes 16 --num_machines 2 --machine_rank R --main_process_ip HOST finetune.py"),
    ],
)  # fmt: skip
def test_launch_when_processes_and_gpus_differ_then_names_the_command(on: Machine, says: str) -> None:
    assert says in refusal(on)


def test_launch_when_the_command_line_is_known_then_it_is_in_the_command_to_type() -> None:
    on = group(2, 1, command=("finetune.py", "--base_model", "org/a model"))
    assert "--num_processes 2 finetune.py --base_model 'org/a model'" in refusal(on)


@pytest.mark.parametrize(
    "on",
    [group(2, 2), group(4, 4, engine="fsdp"), group(0, 2, engine="deepspeed", zero_stage=3), group(1, 1, engine="deepspeed", zero_stage=3, offloads=True),
     group(1, 1, is_launched=False), group(0, 1, is_launched=False), group(8, 8, world_size=16, rank=9), machine(gpus=(H200, H200))],
)  # fmt: skip
def test_launch_when_processes_and_gpus_agree_then_plans(on: Machine) -> None:
    assert plan(on).machine is on


def test_plain_python_when_more_gpus_are_visible_then_says_how_to_use_them() -> None:
    (note,) = [note for note in plan(machine(gpus=(H200, H200))).notes if "GPUs" in note]
    assert note.startswith("1 process uses 1 of 2 GPUs. For all: accelerate launch --config_file profiles/ddp.yaml --num_processes 2")


ZERO = {"engine": "deepspeed", "zero_stage": 2}


@pytest.mark.parametrize(
    ("on", "flags", "says"),
    [
        (group(2, 2, **ZERO, launcher_accumulation=4), {"batch_size": 16, "per_device_train_batch_size": 4}, "gradient_accumulation_steps: 4, the flags come to 2"),
        (group(2, 2, **ZERO, launcher_clipping=0.5), {}, "gradient_clipping: 0.5, the flags say 1"),
        (group(2, 2, **ZERO, launcher_precision="bf16"), {}, "the launcher's profile says bf16: zero2 would cast the adapters too"),
        (group(2, 2, engine="fsdp"), {"fp16": True}, "--fp16=True needs a loss scaler, which fsdp2 has only with fp16 masters"),
        (group(2, 2, engine="deepspeed", zero_stage=1), {}, "asks for zero1, which is not supported. Type: accelerate launch --config_file profiles/ds_zero2.yaml"),
        (group(2, 2, engine="fsdp", fsdp_version=1), {}, "asks for fsdp1"),
        (group(4, 4), {"batch_size": 10, "per_device_train_batch_size": 1}, "--batch_size=10 cannot be split: per_device_train_batch_size=1 x 4 processes = 4. Use 8 or 12"),
    ],
)  # fmt: skip
def test_profile_when_it_contradicts_the_flags_then_names_both(on: Machine, flags: dict[str, object], says: str) -> None:
    assert says in refusal(on, **flags)


def test_offload_when_the_host_lacks_memory_then_says_how_much_is_needed() -> None:
    on = group(8, 8, engine="deepspeed", zero_stage=3, offloads=True, memory_gib=512.0)
    said = refusal(on, {**LLAMA_70B, "torch_dtype": "bfloat16"})
    assert said.startswith(
        "1,183 GiB of host memory are needed, 512 are there: each of 8 processes reads 131.4 GiB of weights, and one is kept"
    )
    assert plan(group(8, 8, engine="deepspeed", zero_stage=3, offloads=True, memory_gib=2000.0), {**LLAMA_70B, "torch_dtype": "bfloat16"})


@pytest.mark.parametrize("path", sorted((ROOT / "profiles").glob("*.yaml")), ids=lambda path: path.stem)
def test_profile_when_read_then_names_no_machine_and_leaves_the_flags_their_say(path: Path) -> None:
    said = yaml.safe_load(path.read_text())
    assert said["mixed_precision"] == "no"
    assert (said["num_machines"], said["num_processes"]) == (1, 2 if path.stem == "cpu_2proc" else 1)
    assert not {"main_process_ip", "main_process_port", "deepspeed_hostfile", "downcast_bf16"} & said.keys()
    assert said.get("deepspeed_config", {}).get("gradient_accumulation_steps", "auto") == "auto"
    assert path.stem in {*PROFILES.values(), "ds_zero3_offload", "cpu", "cpu_2proc"}


def test_weights_when_an_engine_cuts_them_then_are_read_onto_the_gpu_only_if_they_fit() -> None:
    small = {**LLAMA_70B, "num_hidden_layers": 8, "torch_dtype": "bfloat16"}
    zero3, fsdp2 = group(2, 2, engine="deepspeed", zero_stage=3, memory_gib=999.0), group(2, 2, engine="fsdp", memory_gib=999.0)
    assert [plan(on, small).model.loads_on_gpu for on in (zero3, fsdp2, group(2, 2))] == [True, True, True]
    big = {**LLAMA_70B, "torch_dtype": "bfloat16"}
    assert [plan(on, big).model.loads_on_gpu for on in (zero3, fsdp2, group(0, 2))] == [False, False, False]


def test_probe_when_accelerate_hands_a_profile_on_then_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    env = {
        "LOCAL_RANK": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_GRADIENT_CLIPPING": "auto",
        "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
        "ACCELERATE_MIXED_PRECISION": "no",
    }  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    here = probe()
    assert (here.rank, here.local_rank, here.world_size, here.local_world_size) == (5, 1, 8, 4)
    assert (here.strategy, here.cuts_weights, here.offloads, here.is_launched, here.has_profile) == ("zero3", True, True, True, True)
    assert (here.launcher_accumulation, here.launcher_clipping, here.launcher_precision) == (None, None, "no")


def test_probe_when_the_profile_names_a_deepspeed_json_then_reads_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "zero.json"
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    file.write_text(
        json.dumps({"zero_optimization": zero, "bf16": {"enabled": True}, "gradient_accumulation_steps": 4, "gradient_clipping": 0.5})
    )
    for name, value in {"LOCAL_RANK": "0", "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}.items():
        monkeypatch.setenv(name, value)
    here = probe()
    assert (here.strategy, here.offloads, here.launcher_precision) == ("zero2", True, "bf16")
    assert (here.launcher_accumulation, here.launcher_clipping) == (4, 0.5)


@pytest.mark.parametrize(("torch", "name"), [("2.8.0", "TORCH_NCCL_TRACE_BUFFER_SIZE"), ("2.11.0+cu130", "TORCH_FR_BUFFER_SIZE")])
def test_flight_recorder_when_several_gpus_work_then_is_on_by_the_names_that_this_torch_reads(torch: str, name: str) -> None:
    environment = plan(group(2, 2, versions={"torch": torch})).process.environment
    assert {one for one in environment if one.endswith("BUFFER_SIZE")} == {name}
    assert not [one for one in plan(group(1, 1, is_launched=False)).process.environment if one.startswith("TORCH_")]
