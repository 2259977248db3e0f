"""finetune.py as its users start it: one process, two processes, a config file, resumed, overwritten; and what the run folder then holds."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune import train
from tests.conftest import ROOT, SMALL_MODEL
from tests.runs import logs, quick, tensors, words


@pytest.fixture(scope="session")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(data_path=rows, output_dir=tmp_path_factory.mktemp("trained") / "run", **quick())


def test_run_folder_when_done_then_holds_the_records(trained: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    stamp = json.loads((trained / "backend.json").read_text())
    assert record["status"] == "done"
    assert record["summary"]["steps"] == 6
    assert record["data"]["train_rows"] == 56
    assert record["plan"]["adapter"]["method"] == "dora"
    assert {"name": "lora_r", "value": 4, "source": "flag", "reason": ""} in record["plan"]["choices"]
    assert record["pad"]["token"] == "<|finetune_right_pad_id|>"
    assert stamp["backend"] == "hf"
    assert (stamp["dtype"], stamp["attn_impl"], stamp["quantization"]) == ("fp32", "eager", "none")
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]
    assert not list(trained.rglob("training_args.bin"))


def test_run_when_only_what_setup_cfg_requires_is_installed_then_learns(rows: Path, tmp_path: Path) -> None:
    newer = ("torch.nn.attention.varlen",)  # than the oldest torch that setup.cfg takes
    extras = ("bitsandbytes", "deepspeed", "gguf", "liger_kernel", "lm_eval", "rouge_score", "trl")
    start = f"import runpy, sys; sys.modules.update(dict.fromkeys({extras + newer})); runpy.run_path('finetune.py', run_name='__main__')"
    flags = words(quick(data_path=rows, output_dir=tmp_path / "run", max_steps=2, eval_strategy="no", save_strategy="no"))
    done = subprocess.run([sys.executable, "-c", start, *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(logs(tmp_path / "run", "loss")) == 2


def test_log_line_when_training_then_has_every_figure(trained: Path) -> None:
    first = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert {
        "step",
        "loss",
        "grad_norm",
        "learning_rate",
        "tokens_per_s",
        "peak_memory_gib",
        "seconds_left",
        "epoch",
        "time",
    } <= first.keys()
    assert len(logs(trained, "eval_loss")) == 2
    assert logs(trained, "loss")[-1] < logs(trained, "loss")[0]


def test_adapter_when_saved_then_is_small_fp32_and_loads_in_plain_peft(trained: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    saved = tensors(trained)
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert sum("magnitude" in name for name in saved) == 28
    assert not any("embed" in name for name in saved)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32), trained)
    ids = AutoTokenizer.from_pretrained(trained)("hello there", return_tensors="pt").input_ids
    with torch.no_grad():
        adapted = model(ids).logits
        with model.disable_adapter():
            assert not torch.allclose(adapted, model(ids).logits, atol=1e-3)


def test_resume_when_continued_then_ends_with_the_same_adapter(rows: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "checkpoint-6")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "running"}))
    train(data_path=rows, output_dir=folder, resume=True, **quick())
    assert all(torch.equal(tensor, tensors(trained)[name]) for name, tensor in tensors(folder).items())
    assert logs(folder, "loss")[-3:] == logs(trained, "loss")[-3:]


def test_audit_when_the_rows_pass_then_is_in_the_run_folder(trained: Path) -> None:
    found = json.loads((trained / "audit.json").read_text())
    assert len(found["rows"]["tokens"]) == 64
    assert found["trained_tokens"] == json.loads((trained / "run.json").read_text())["data"]["trained_tokens"]


def test_audit_when_too_many_answers_are_lost_then_exits_3_and_warn_goes_on(
    finetune: Callable[..., Any], rows: Path, tmp_path: Path
) -> None:
    flags = quick(data_path=rows, output_dir="run", cutoff_len=90, val_set_size=0, max_steps=2)
    refused = finetune(*words(flags))
    assert refused.returncode == 3
    assert "rows lose their answer to cutoff_len=90; at most 25 % may" in refused.stderr
    assert refused.stderr.count(" tokens  {") == 5
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["audit.json"]
    done = finetune(*words({**flags, "audit": "warn"}))
    assert done.returncode == 0, done.stderr
    assert "--audit=warn: the rows do not pass" in done.stdout


def test_rows_when_prepared_a_second_time_then_come_from_the_cache(finetune: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    env = {"SUREFOOT_CACHE": str(tmp_path / "cache")}
    said = [finetune(*words(quick(data_path=rows, output_dir=f"run{n}", max_steps=2)), env=env).stdout for n in range(2)]
    assert ["(from the cache)" in text for text in said] == [False, True]
    assert logs(tmp_path / "run0", "loss") == logs(tmp_path / "run1", "loss")


def test_resume_when_the_newest_checkpoint_is_damaged_then_goes_on_from_the_one_before(
    rows: Path, trained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((tmp_path / "run/run.json").read_text())
    (tmp_path / "run/run.json").write_text(json.dumps({**record, "status": "running"}))
    file = tmp_path / "run/checkpoint-6/optimizer.pt"
    file.write_bytes(file.read_bytes()[:-100])
    train(data_path=rows, output_dir=tmp_path / "run", resume=True, **quick())
    assert "run/checkpoint-6: optimizer.pt is cut off" in capfd.readouterr().out
    resumes = json.loads((tmp_path / "run/run.json").read_text())["resumes"]
    assert [Path(resume["from"]).name for resume in resumes] == ["checkpoint-3"]
    assert all(torch.equal(tensor, tensors(trained)[name]) for name, tensor in tensors(tmp_path / "run").items())


class Touch:
    """A pickle that would make a file where it is loaded without weights_only."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.path), "w")


def test_resume_when_the_optimizers_file_holds_code_then_is_refused_and_not_run(rows: Path, trained: Path, tmp_path: Path) -> None:
    import shutil

    from surefoot import checkpoint
    from surefoot.errors import BackendError

    evil = shutil.copytree(trained / "checkpoint-3", tmp_path / f"checkpoint-3{checkpoint.PARTIAL}")
    torch.save({"state": Touch(tmp_path / "made")}, evil / "optimizer.pt")
    checkpoint.publish(evil, tmp_path / "checkpoint-3", {"cursor": checkpoint.read_manifest(trained / "checkpoint-3")["cursor"]})
    with pytest.raises(BackendError, match="checkpoint-3: a file holds more than tensors and numbers"):
        train(data_path=rows, output_dir=tmp_path / "run", resume_from_checkpoint=str(tmp_path / "checkpoint-3"), **quick())
    assert not (tmp_path / "made").exists()


def test_resume_when_the_run_is_finished_then_does_nothing_and_exits_0(finetune: Callable[..., Any], rows: Path, trained: Path) -> None:
    before = (trained / "run.json").read_text()
    done = finetune(*words(quick(data_path=rows, output_dir=trained, resume=True)))
    assert (done.returncode, (trained / "run.json").read_text()) == (0, before), done.stderr
    assert "is finished: nothing is left to do" in done.stdout


@pytest.mark.parametrize("name", ["run.json", "backend.json"])
def test_run_when_a_record_is_damaged_then_names_it(
    finetune: Callable[..., Any], rows: Path, trained: Path, tmp_path: Path, name: str
) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / name).write_text((trained / name).read_text()[:-30])
    done = finetune(*words(quick(data_path=rows, output_dir="run", overwrite=True)))
    assert done.returncode == 2
    assert f"run/{name} is damaged" in done.stderr
    assert (tmp_path / "run/adapter_model.safetensors").exists()


def test_two_processes_when_launched_then_match_one(finetune: Callable[..., Any], rows: Path, trained: Path, tmp_path: Path) -> None:
    flags = words(quick(data_path=rows, output_dir=tmp_path / "ddp"))
    profile = ROOT / "profiles/cpu_2proc.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", profile, "--main_process_port", "29533"]
    done = subprocess.run([*map(str, launch), str(ROOT / "finetune.py"), *flags], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "ddp/run.json").read_text())
    assert (record["plan"]["machine"]["world_size"], record["plan"]["machine"]["engine"]) == (2, "ddp")
    assert record["plan"]["train"]["gradient_accumulation_steps"] == 1
    assert done.stdout.count("training ") == 1
    assert logs(tmp_path / "ddp", "loss") == pytest.approx(logs(trained, "loss"), abs=2e-4)


def test_overwrite_when_the_new_data_are_bad_then_the_old_run_stays(
    finetune: Callable[..., Any], rows: Path, trained: Path, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "bad.jsonl").write_text('{"a": 1}\n')
    refused = finetune(*words(quick(data_path=rows, output_dir="run")))
    assert refused.returncode == 2
    assert "holds a finished run" in refused.stderr
    failed = finetune(*words(quick(data_path="bad.jsonl", output_dir="run", overwrite=True)))
    assert failed.returncode == 3
    assert all(torch.equal(tensor, tensors(trained)[name]) for name, tensor in tensors(tmp_path / "run").items())


def test_config_file_when_grouped_as_in_sft_projects_then_trains(finetune: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"""
model: {{name: {SMALL_MODEL}, max_seq_len: 256, type: causal, trust_remote_code: false}}
tuning: {{mode: qlora, backend: bnb, lora: {{r: 4, alpha: 8, dropout: 0.0, target_modules: auto}}}}
train: {{epochs: 1, learning_rate: 2.0e-3, batch_size: 4, grad_accum: 2, evaluation_strategy: steps, eval_steps: 2, save_strategy: steps,
  save_steps: 2, bf16: false, fp16: false, optim: adamw_torch, warmup_ratio: 0.1, load_best_model_at_end: true, metric_for_best_model: eval_loss,
  greater_is_better: false, output_dir: run}}
data: {{format: chat, train_path: {rows}, test_path: nowhere.jsonl, split: {{train_ratio: 0.7}}}}
logging: {{backend: tensorboard, log_interval: 1}}
gen: {{max_new_tokens: 20}}
seed: 1
"""
    )
    done = finetune("--config", "run.yaml", "--max_steps", 4, "--val_set_size", 8, "--prompt_style", "alpaca")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record["plan"]["backend"] == "bnb"
    assert (record["plan"]["train"]["batch_size"], record["plan"]["train"]["per_device_train_batch_size"]) == (8, 4)
    sources = {choice["name"]: choice["source"] for choice in record["plan"]["choices"]}
    assert (sources["max_steps"], sources["lora_r"], sources["train_on_inputs"]) == ("flag", "file run.yaml", "default")
    assert list((tmp_path / "run/runs").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "flags",
    [
        {"adapter_name": "dora", "load_4bit": True}, {"adapter_name": "lora", "load_8bit": True}, {"adapter_name": "full", "learning_rate": 2e-4},
        {"adapter_name": "rslora", "bf16": True}, {"adapter_name": "lora", "use_gradient_checkpointing": True, "lora_dropout": 0.1},
        {"adapter_name": "dora", "init_lora_weights": "pissa", "attn_implementation": "sdpa"},
    ],
    ids=lambda flags: "-".join(f"{value}" for value in flags.values()),
)  # fmt: skip
def test_run_when_the_method_changes_then_learns_and_saves(rows: Path, tmp_path: Path, flags: dict[str, Any]) -> None:
    folder = train(data_path=rows, output_dir=tmp_path / "run", **quick(**flags))
    losses = logs(folder, "loss")
    assert losses[-1] < losses[0]
    assert json.loads((folder / "run.json").read_text())["status"] == "done"


def test_run_when_warm_up_keeps_the_rate_at_zero_then_exits_4(finetune: Callable[..., Any], rows: Path, tmp_path: Path) -> None:
    done = finetune(*words(quick(data_path=rows, output_dir="run", max_steps=1, warmup_steps=1)))
    assert done.returncode == 4
    assert "nothing was learned" in done.stderr
    assert json.loads((tmp_path / "run/run.json").read_text())["status"] == "failed"


def test_run_when_the_loss_overflows_then_exits_4_before_the_weights_are_spoilt(finetune: Callable[..., Any], rows: Path) -> None:
    done = finetune(*words(quick(data_path=rows, output_dir="run", adapter_name="full", learning_rate=1e30, max_grad_norm=0)))
    assert done.returncode == 4
    assert "the gradient norm is" in done.stderr


def test_recipe_when_run_by_sh_then_trains_with_the_given_model_and_data(rows: Path, tmp_path: Path) -> None:
    import os

    env = {**os.environ, "BASE_MODEL": str(SMALL_MODEL), "DATA_PATH": str(rows), "PYTHON": sys.executable}
    command = f"sh {ROOT}/examples/llama3_8B_DoRA.sh 8 16 {tmp_path}/r8 '' --num_epochs=1 --val_set_size=8 --warmup_steps=1"
    done = subprocess.run(shlex.split(command), env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "r8/run.json").read_text())
    assert record["plan"]["adapter"]["target_modules"] == ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
    assert (record["plan"]["adapter"]["lora_r"], record["plan"]["train"]["batch_size"]) == (8, 16)


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "examples").glob("*_DoRA.sh")))
def test_recipe_when_an_argument_is_missing_then_says_the_usage(recipe: str) -> None:
    done = subprocess.run(["sh", str(ROOT / "examples" / recipe), "8"], capture_output=True, text=True)
    assert (done.returncode, done.stderr.split()[:2]) == (2, ["usage:", recipe])
