"""Recompute only when needed: how many layers the plan chooses, that exactly those recompute, and that no number changes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

from finetune import train
from surefoot import adapters, plan_text
from surefoot.config import Config
from surefoot.machine import Gpu
from surefoot.plan import Plan, make_plan
from surefoot.training.recompute import recompute
from tests.conftest import H200, SMALL_MODEL, inputs, machine
from tests.runs import logs, quick, tensors, words
from tests.test_adapters import adapter_plan
from tests.test_memory import LLAMA_8B

ON_H200 = machine(gpus=(H200,))
ROOM = 0.92 * 139.8  # GiB
IN_BF16 = {**LLAMA_8B, "dtype": "bfloat16"}
L4 = machine(gpus=(Gpu(name="NVIDIA L4", memory_gib=22.0, capability=(8, 9)),))


def plan(*, on: Any = ON_H200, model: Any = LLAMA_8B, **flags: object) -> Plan:
    given = {"base_model": "org/model", "adapter_name": "dora", "lora_dropout": 0, "packing": False, "cutoff_len": 2048, **flags}
    return make_plan(Config.parse(given), on, inputs(model_config=model))


def reason(made: Plan, name: str = "recompute_layers") -> str:
    return next(choice.reason for choice in made.choices if choice.name == name)


def test_auto_when_everything_fits_then_recomputes_nothing_and_says_by_how_much() -> None:
    made = plan(cutoff_len=256)
    assert made.memory is not None
    assert made.model.recompute_layers == 0
    assert reason(made) == f"estimate {made.memory.gib:.1f} GiB without recompute, 139.8 GiB less 8%: none"


@pytest.mark.parametrize(
    ("gpu", "engine", "says"),
    [
        (H200, {"engine": "fsdp"}, "fsdp2 gathers every layer's weights twice a step, and this GPU has room for all of them (5"),
        (H200, {"engine": "deepspeed", "zero_stage": 3}, "zero3 gathers"),
        (H200, {"engine": "deepspeed", "zero_stage": 2}, ""),
        (Gpu(name="NVIDIA L4", memory_gib=22.0, capability=(8, 9)), {"engine": "fsdp"}, ""),
    ],
)
def test_weights_in_pieces_when_they_fit_as_a_whole_then_the_plan_names_the_faster_profile(
    gpu: Gpu, engine: dict[str, Any], says: str
) -> None:
    group = machine(gpus=(gpu, gpu), memory_gib=512.0, world_size=2, local_world_size=2, is_launched=True, has_profile=True, **engine)
    made = plan(on=group, model=IN_BF16, batch_size=8, per_device_train_batch_size=4, attn_implementation="sdpa")
    advice = [note for note in made.notes if "profiles/ddp.yaml was the faster one" in note]
    assert len(advice) == bool(says)
    assert all(note.startswith(says) for note in advice)


@pytest.mark.parametrize("rows", [4, 6, 8, 12])
def test_auto_when_not_everything_fits_then_recomputes_the_fewest_layers(rows: int) -> None:
    made = plan(per_device_train_batch_size=rows, batch_size=rows, fused_adapters=False, attn_implementation="sdpa")
    count, memory = made.model.recompute_layers, made.memory
    assert memory is not None
    assert 0 < count < 32
    assert memory.job.recompute_layers == count
    assert memory.gib <= ROOM < memory.at(recompute_layers=count - 1).gib
    assert reason(made).endswith(f"{memory.gib:.1f} with it, 139.8 GiB less 8%: {count} of 32")


PRODUCTS = 32 * 2 * 2048 * 4096 * 4  # bytes: bf16, 4 x 2,048 tokens


@pytest.mark.parametrize("asked", [True, "offload"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_down_when_every_layer_recomputes_then_is_spared_and_what_dora_keeps_is_counted(method: str, asked: object) -> None:
    made = plan(model=IN_BF16, adapter_name=method, use_gradient_checkpointing=asked, attn_implementation="sdpa")
    assert made.memory is not None
    assert made.model.spares_down
    repeated = made.memory.at(spares_down=False)
    in_host_memory = asked == "offload"
    low_rank = 32 * 2 * made.memory.job.lora_r * 2048 * 4
    kept = low_rank + (0 if method == "lora" else PRODUCTS * 3 // 32 if in_host_memory else PRODUCTS)
    assert made.memory.kept_products == kept
    assert made.memory.total - repeated.total == pytest.approx(kept, rel=0.01)
    assert made.memory.in_host_memory - repeated.in_host_memory == (PRODUCTS if method == "dora" and in_host_memory else 0)
    place = "in host memory" if in_host_memory else "2.0 GiB"
    wanted = f"down_proj's product is kept for the magnitude's gradient ({place})"
    assert reason(made, "spares_down") == (wanted if method == "dora" else "no backward pass needs down_proj's product")


def test_down_when_its_products_do_not_fit_then_is_made_again() -> None:
    fits = plan(model=IN_BF16, use_gradient_checkpointing=True).memory
    assert fits is not None
    gpu = Gpu(name="a GPU", memory_gib=(fits.gib - 1) / 0.92, capability=(9, 0))
    made = plan(on=machine(gpus=(gpu,)), model=IN_BF16, use_gradient_checkpointing=True)
    assert (made.model.recompute_layers, made.model.spares_down) == (32, False)
    assert made.memory == fits.at(spares_down=False)
    assert reason(made, "spares_down") == "the GPU has no room to keep down_proj's products"
    lora = plan(on=L4, adapter_name="lora", per_device_train_batch_size=32, batch_size=32, use_gradient_checkpointing=True)
    assert lora.model.spares_down  # it keeps nothing


@pytest.mark.parametrize(
    ("flags", "model", "says"),
    [
        ({"use_gradient_checkpointing": False}, LLAMA_8B, ""), ({"fused_adapters": False}, LLAMA_8B, "PEFT's own layers"),
        ({"adapter_name": "full"}, LLAMA_8B, "every weight is trained"), ({"lora_dropout": 0.05}, LLAMA_8B, "with dropout"),
        ({"target_modules": "q_proj,v_proj,down_proj"}, LLAMA_8B, "not all of gate_proj, up_proj, down_proj"),
        ({"load_8bit": True}, LLAMA_8B, "int8"), ({}, {**LLAMA_8B, "mlp_bias": True}, "biases"),
        ({}, {**LLAMA_8B, "hidden_act": "gelu"}, "no SwiGLU"), ({}, {**LLAMA_8B, "model_type": "olmo2"}, "model type olmo2 is not one"),
        ({}, None, "model type None is not one of"),
    ],
)  # fmt: skip
def test_down_when_the_layers_are_others_then_is_made_again_and_the_plan_says_why(flags: dict[str, Any], model: Any, says: str) -> None:
    made = plan(model=model, **{"use_gradient_checkpointing": True, **flags})
    assert not made.model.spares_down
    assert says in reason(made, "spares_down")


@pytest.mark.parametrize("engine", [{"engine": "deepspeed", "zero_stage": 3}, {"engine": "fsdp"}])
def test_down_when_nothing_is_estimated_then_is_spared_all_the_same(engine: dict[str, Any]) -> None:
    made = plan(on=machine(gpus=(H200, H200), world_size=2, **engine), use_gradient_checkpointing=True)
    assert made.memory is None
    assert made.model.spares_down
    assert reason(made, "spares_down") == "down_proj's product is kept for the magnitude's gradient (of each layer)"


RTX_4090 = machine(gpus=(Gpu(name="NVIDIA GeForce RTX 4090", memory_gib=23.6, capability=(8, 9)),), memory_gib=64.0)


def test_auto_when_every_layer_recomputes_and_it_does_not_fit_then_their_inputs_wait_in_host_memory() -> None:
    made = plan(on=RTX_4090, model=IN_BF16, attn_implementation="sdpa")
    assert made.memory is not None
    assert (made.model.recompute_layers, made.model.offload_inputs) == (32, True)
    assert made.memory.gib < 0.92 * 23.6 < made.memory.at(offload_inputs=False).gib
    assert made.model.spares_down
    assert made.memory.in_host_memory == 32 * 4 * 2048 * 4096 * 4 + PRODUCTS
    assert "do not fit; with their inputs in host memory" in reason(made, "offload_inputs")
    assert not [note for note in made.notes if "does not fit" in note]


def test_auto_when_the_host_has_too_little_memory_then_nothing_waits_there() -> None:
    made = plan(on=replace(RTX_4090, memory_gib=7.0), model=IN_BF16, attn_implementation="sdpa")
    assert (made.model.recompute_layers, made.model.offload_inputs) == (32, False)
    assert reason(made, "offload_inputs") == "the inputs of all layers, 4.0 GiB, are more than half of the host's memory"


@pytest.mark.parametrize(("asked", "on_gpu", "on_cpu"), [("offload", True, False), ("unsloth", True, False), (True, False, False)])
def test_offload_when_asked_for_then_is_done_where_there_is_a_gpu(asked: object, on_gpu: bool, on_cpu: bool) -> None:
    made = [plan(on=on, use_gradient_checkpointing=asked) for on in (ON_H200, machine())]
    assert [one.model.offload_inputs for one in made] == [on_gpu, on_cpu]


def test_auto_when_nothing_fits_then_recomputes_all_and_names_the_ways_out() -> None:
    made = plan(on=L4)
    assert made.model.recompute_layers == 32
    note = next(note for note in made.notes if "does not fit NVIDIA L4 (22 GiB less 8%)" in note)
    assert "--per_device_train_batch_size=2, --load_4bit=True, a --cutoff_len below 2048" in note


@pytest.mark.parametrize(
    ("flags", "changed", "count", "says"),
    [
        ({"use_gradient_checkpointing": False, "per_device_train_batch_size": 32}, {}, 0, ""),
        ({"use_gradient_checkpointing": True}, {}, 32, "every layer"), ({"use_gradient_checkpointing": "unsloth"}, {}, 32, "every layer"),
        ({"use_gradient_checkpointing": "offload"}, {}, 32, "every layer"),
        ({"use_gradient_checkpointing": "selective", "cutoff_len": 256}, {}, 1, ": 1 of 32"),
        ({}, {"on": machine()}, 0, "no GPU to fill: none"),
        ({"use_gradient_checkpointing": "selective"}, {"on": machine()}, 16, "no GPU to fill: half of 32"),
        ({}, {"model": None}, 0, "nothing was estimated: no config.json was found: none"),
        ({"use_gradient_checkpointing": True}, {"model": None}, -1, "every layer"),
        ({"use_gradient_checkpointing": True}, {"model": {"model_type": "mixtral", "num_hidden_layers": 16}}, 16, "every layer"),
        ({}, {"model": {**LLAMA_8B, "model_type": "mixtral"}}, 0, "nothing was estimated: model type mixtral is not one of"),
        ({"target_modules": "q_proj,lm_head"}, {}, 0, "nothing was estimated: target_modules names lm_head"),
        ({}, {"on": machine(gpus=(H200,), engine="deepspeed", zero_stage=2)}, 0, "nothing was estimated: DeepSpeed splits"),
    ],
)  # fmt: skip
def test_layers_when_the_flag_or_the_place_differs_then_follow_it(
    flags: dict[str, Any], changed: dict[str, Any], count: int, says: str
) -> None:
    made = plan(**changed, **flags)
    assert made.model.recompute_layers == count
    assert says in reason(made)
    assert any(note.startswith("memory was not estimated") for note in made.notes) is (made.memory is None and bool(made.machine.gpus))


def test_no_recompute_when_asked_for_but_too_much_then_is_followed_with_a_note() -> None:
    made = plan(use_gradient_checkpointing=False, per_device_train_batch_size=32)
    assert any("--use_gradient_checkpointing=auto" in note and "does not fit" in note for note in made.notes)


def test_estimate_when_ddp_then_counts_the_buckets_of_a_process() -> None:
    one, two = plan(), plan(on=machine(gpus=(H200, H200), world_size=2, engine="ddp"))
    assert one.memory is not None
    assert two.memory is not None
    assert two.memory.gradients == 2 * one.memory.gradients
    assert two.memory.frozen_weights == one.memory.frozen_weights


def test_estimate_when_rows_are_packed_then_is_of_one_packed_row() -> None:
    made = plan(packing=True, pack_len=8192, attn_implementation="sdpa")
    assert made.memory is not None
    assert (made.memory.job.rows, made.memory.job.length) == (1, 8192)


def test_plan_when_printed_then_has_the_estimate_in_a_line_and_in_full() -> None:
    made = plan()
    assert made.memory is not None
    line = f"memory: {made.memory.gib:.1f} GiB estimated at the peak of a step, for 4 x 2,048 tokens a pass"
    assert f"\n{line}: frozen weights " in plan_text.table(made, all_rows=False)
    full = plan_text.table(made, all_rows=True).splitlines()
    assert full[full.index(line) + 1].split() == ["frozen", "weights", f"{made.memory.frozen_weights / 2**20:,.1f}", "MiB"]
    assert plan_text.as_record(made)["memory"]["bytes"]["total"] == made.memory.total
    assert sum(made.memory.parts.values()) - min(made.memory.head, made.memory.layer_backward) == made.memory.total


def gradients(count: int, dropout: float) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32, attn_implementation="eager")
    model.config.use_cache = False
    model = adapters.attach(model, adapter_plan(lora_dropout=dropout), seed=1).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02, generator=torch.Generator().manual_seed(len(name)))
    recompute(model, count)
    ids = torch.randint(10, 4000, (2, 40), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(3)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_gradients_when_any_layers_recompute_then_are_the_same_bit_for_bit(dropout: float) -> None:
    plain = gradients(0, dropout)
    assert len(plain) == 4 * 7 * 3
    for count in (1, 3, 4, -1):
        again = gradients(count, dropout)
        assert again.keys() == plain.keys()
        assert all(torch.equal(again[name], gradient) for name, gradient in plain.items()), count


@pytest.mark.parametrize(("asked", "again"), [("auto", 0), ("selective", 2), (True, 4)])
def test_run_when_k_layers_recompute_then_those_run_twice_and_the_adapter_is_the_same(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: object, again: int
) -> None:
    calls: Counter[int] = Counter()
    plain_forward = LlamaAttention.forward

    def counting(self: Any, *args: Any, **named: Any) -> Any:
        calls[self.layer_idx] += self.training
        return plain_forward(self, *args, **named)

    monkeypatch.setattr(LlamaAttention, "forward", counting)
    folder = train(data_path=rows, output_dir=tmp_path / "run", **quick(use_gradient_checkpointing=asked))
    passes = 6 * 2  # steps x micro-batches
    assert [calls[index] for index in range(4)] == [passes * (2 if index < again else 1) for index in range(4)]
    record = json.loads((folder / "run.json").read_text())
    assert (record["plan"]["model"]["recompute_layers"], record["plan"]["model"]["spares_down"]) == (again, again > 0)
    active = json.loads((folder / "backend.json").read_text())["kernels"]
    assert (f"recompute without down_proj in {again} layers" in active) == (again > 0)
    memory = record["summary"]["memory"]
    assert memory["planned_gib"] == round(record["plan"]["memory"]["bytes"]["total"] / 2**30, 3)
    assert 0 < memory["estimated_gib"] <= memory["planned_gib"]
    assert memory["measured_peak_gib"] is None  # of a GPU only
    assert memory["widest"][0] == 4


def test_resume_when_recompute_changes_then_ends_with_the_same_adapter(rows: Path, tmp_path: Path) -> None:
    whole = train(data_path=rows, output_dir=tmp_path / "whole", **quick(use_gradient_checkpointing=False))
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoint-6")
    record = json.loads((whole / "run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "status": "running"}))
    folder = train(data_path=rows, output_dir=tmp_path / "run", resume=True, **quick(use_gradient_checkpointing="selective"))
    assert json.loads((folder / "run.json").read_text())["plan"]["model"]["recompute_layers"] == 2
    assert all(torch.equal(tensor, tensors(whole)[name]) for name, tensor in tensors(folder).items())
    assert logs(folder, "loss")[-3:] == logs(whole, "loss")[-3:]


def test_dry_run_when_started_by_a_user_then_prints_the_memory_table(finetune: Callable[..., Any], rows: Path) -> None:
    done = finetune(*words(quick(data_path=rows, output_dir="run")), "--dry_run", "--use_gradient_checkpointing=selective")
    assert done.returncode == 0, done.stderr
    assert "no GPU to fill: half of 4" in done.stdout
    assert "GiB estimated at the peak of a step, for 4 x 256 tokens a pass" in done.stdout
    assert "(of layer backward and head only the greater one counts)" in done.stdout
