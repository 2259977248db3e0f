"""--backend=unsloth: the trial and each way it fails, with a stand-in package; the real one on a CPU, working and refusing."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from finetune import train
from surefoot import detection, machine, runtime
from surefoot.config import Config
from surefoot.detection import Answer, Case
from surefoot.errors import BackendError
from surefoot.plan import make_plan
from tests import stubs
from tests.conftest import ROOT, SMALL_MODEL, VERSIONS, inputs
from tests.conftest import machine as machine_with
from tests.runs import logs, quick, tensors, words

CASE = Case(model_type="llama", method="dora", quantization="none", dtype="fp32")
XFORMERS = "NotImplementedError: No operator found for `memory_efficient_attention_backward` with inputs: xformers BMGHK"


def ask(env: dict[str, str], case: Case = CASE) -> Answer:
    """detection.ask() in a process of its own with this environment, as the stand-in's metadata must be found before the real one's."""
    code = (
        "import dataclasses, json; from surefoot import detection, machine; "
        f"print(json.dumps(dataclasses.asdict(detection.ask(machine.probe(), detection.{case!r}))))"
    )
    path = f"{env['PYTHONPATH']}:{ROOT}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**machine.os.environ, **env, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return Answer(**json.loads(done.stdout))


FAILURES = {
    "broken_installation": ("raise ModuleNotFoundError(\"No module named 'unsloth'\")", (), "not installed", "No module named 'unsloth'"),
    "outside_its_pins": ("", ("transformers<=5.0.0",), "outside its pins", "unsloth 2026.10.9 takes transformers<=5.0.0, and"),
    "needs_what_is_absent": ("", ("trl>=99",), "outside its pins", "trl"),
    "no_gpu": ("raise NotImplementedError('Unsloth cannot find any torch accelerator? You need a GPU.')", (), "no GPU", "You need a GPU"),
    "xformers": (f"raise NotImplementedError({XFORMERS!r})", (), "attention conflict", "memory_efficient_attention_backward"),
    "flash_attn": ("raise ImportError('flash_attn_2_cuda.so: undefined symbol')", (), "attention conflict", "undefined symbol"),
    "architecture": (
        stubs.WORKS.replace("if model.config.vocab_size > 512:", "if True:").replace(
            "{refusal}", "raise NotImplementedError('Unsloth: llama is not yet implemented!')"
        ),
        (), "unknown architecture", "llama is not yet implemented",
    ),
    "crash": ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", (), "failed", "signal 11"),
    "other": ("raise RuntimeError('CUDA error: out of memory')", (), "failed", "out of memory"),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] if name == "architecture" else []) for name in FAILURES])
def test_trial_when_unsloth_fails_then_the_kind_and_the_exact_reason_are_kept(tmp_path: Path, name: str) -> None:
    code, requires, kind, says = FAILURES[name]
    env = stubs.unsloth(tmp_path, code, requires=requires)
    found = ask(env)
    assert (found.kind, found.works) == (kind, False)
    assert says in found.reason
    kept = list((tmp_path / "cache/unsloth").glob("*.json"))
    assert len(kept) == (kind in detection.KEPT)
    if kept:
        (tmp_path / "unsloth/__init__.py").write_text("raise SystemExit('was asked again')")
        assert ask(env) == Answer(kind=kind, reason=found.reason, origin=f"{found.origin}, kept in {kept[0]}")


def test_trial_when_a_version_changes_then_is_made_again(tmp_path: Path) -> None:
    first = stubs.unsloth(tmp_path / "one", "raise ImportError('no xformers')")
    assert ask(first).kind == "attention conflict"
    second = stubs.unsloth(tmp_path / "two", "raise ImportError('no accelerator')", version="2026.10.10")
    assert ask({**second, "SUREFOOT_CACHE": first["SUREFOOT_CACHE"]}).kind == "no GPU"


@pytest.mark.slow
def test_run_when_unsloth_refuses_the_real_model_then_starts_again_without_it(
    finetune: Callable[..., subprocess.CompletedProcess[str]], rows: Path, tmp_path: Path
) -> None:
    env = stubs.unsloth(tmp_path / "stub", stubs.LATE_REFUSAL)
    flags = words(quick(data_path=rows, output_dir="run", backend="unsloth", max_steps=2, val_set_size=0))
    done = finetune(*flags, env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Starting again without Unsloth") == 1
    assert "Falling back to transformers backend" in done.stdout
    stamp = json.loads((tmp_path / "run/backend.json").read_text())
    assert stamp["backend"] == "hf"
    assert "llama is not yet implemented" in stamp["reasons"]["backend"]
    strict = finetune(*flags, "--strict_backend", "--overwrite", env=env)
    assert strict.returncode == 5
    assert "llama is not yet implemented" in strict.stderr
    assert "Traceback" not in strict.stderr


def test_real_unsloth_when_it_may_not_use_the_cpu_then_the_strict_run_ends_with_its_reason(
    finetune: Callable[..., subprocess.CompletedProcess[str]], rows: Path
) -> None:
    flags = words(quick(data_path=rows, output_dir="run", backend="unsloth"))
    done = finetune(*flags, "--strict_backend", env={"UNSLOTH_DISABLE_CPU_FALLBACK": "1"})
    assert done.returncode == 5
    assert "(no GPU): NotImplementedError: Unsloth cannot find any torch accelerator" in done.stderr


def real_run(finetune: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path, rows: Path, **flags: object) -> Path:
    """Two runs on the same rows, through Unsloth and, in this process, through hf: their losses agree. Returns Unsloth's folder."""
    given = quick(data_path=rows, attn_implementation="sdpa", **flags)
    done = finetune(*words({**given, "output_dir": "unsloth", "backend": "unsloth"}))
    assert done.returncode == 0, done.stderr
    hf = train(**given, output_dir=tmp_path / "hf")
    ours, theirs = logs(hf, "loss"), logs(tmp_path / "unsloth", "loss")
    assert len(theirs) == 6
    assert theirs == pytest.approx(ours, rel=1e-3)
    return tmp_path / "unsloth"


def test_real_unsloth_when_on_a_cpu_then_trains_dora_as_hf_does_and_plain_peft_loads_it(
    finetune: Callable[..., subprocess.CompletedProcess[str]], rows: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = real_run(finetune, tmp_path, rows, adapter_name="dora")
    stamp = json.loads((folder / "backend.json").read_text())
    assert (stamp["backend"], stamp["attn_impl"], stamp["quantization"]) == ("unsloth", "sdpa", "none")
    assert stamp["versions"]["unsloth"] == importlib.metadata.version("unsloth")
    assert stamp["kernels"] == ["attention: sdpa", "Unsloth's CPU path: layers of transformers and PEFT", "loss: chunked"]
    assert "Unsloth backend will be used" in stamp["reasons"]["backend"]
    assert {tensor.dtype for tensor in tensors(folder).values()} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(base, folder)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad(), loaded.disable_adapter():
        before = loaded(input_ids=ids).logits
    with torch.no_grad():
        assert not torch.allclose(loaded(input_ids=ids).logits, before, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{"adapter_name": "lora"}, {"adapter_name": "lora", "load_4bit": True, "bf16": False}], ids=["lora", "qlora"]
)
def test_real_unsloth_when_on_a_cpu_then_trains_lora_as_hf_does(
    finetune: Callable[..., subprocess.CompletedProcess[str]], rows: Path, tmp_path: Path, flags: dict[str, object]
) -> None:
    real_run(finetune, tmp_path, rows, **flags)


@pytest.mark.slow
def test_real_unsloth_when_resumed_then_ends_where_the_whole_run_does(
    finetune: Callable[..., subprocess.CompletedProcess[str]], rows: Path, tmp_path: Path
) -> None:
    flags = quick(data_path=rows, backend="unsloth")
    assert finetune(*words(flags), "--output_dir=whole").returncode == 0
    again = finetune(*words(flags), "--output_dir=again", "--resume_from_checkpoint=whole/checkpoint-3")
    assert again.returncode == 0, again.stderr
    whole, resumed = tensors(tmp_path / "whole"), tensors(tmp_path / "again")
    assert max(float((whole[name] - resumed[name]).abs().max()) for name in whole) < 1e-6
    other = finetune(*words({**flags, "backend": "hf"}), "--output_dir=other", "--resume_from_checkpoint=whole/checkpoint-3")
    assert other.returncode == 2
    assert "--backend=unsloth" in other.stderr


def test_process_when_transformers_came_first_then_unsloth_is_refused_and_never_imported() -> None:
    import transformers

    answer = Answer(kind="works", reason="", origin="")
    here = machine_with(versions=VERSIONS | {"unsloth": "2026.10.9"})
    plan = make_plan(Config.parse({"base_model": "m", "backend": "unsloth"}), here, inputs(), None, answer)
    assert transformers.__name__ in sys.modules
    with pytest.raises(BackendError, match="before Unsloth, which patches them"):
        runtime.before_imports(plan)
    runtime.before_imports(make_plan(Config.parse({"base_model": "m"}), here, inputs()))
    assert "unsloth" not in sys.modules
