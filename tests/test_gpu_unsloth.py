"""Real Unsloth on one CUDA GPU through finetune.py: trains as hf does, resumes, loads in plain PEFT, falls back. Run with: pytest -m gpu

Needs `pip install 'surefoot[unsloth]'` beside a CUDA torch. Some four minutes, of which the first trial of each case takes half.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surefoot import detection, machine, support
from surefoot.detection import Case
from surefoot.support import Cell
from tests import stubs
from tests.conftest import SMALL_MODEL, TRAIN_ROWS
from tests.runs import logs, tensors

pytestmark = pytest.mark.gpu
Finetune = Callable[..., subprocess.CompletedProcess[str]]

# Unsloth keeps the residual stream and the norms in bf16, hf in fp32: per step the losses may differ by what bf16 rounds.
MEAN_BAND, STEP_BAND = 0.03, 0.15  # of the mean loss; of a step's own loss
UNSLOTH = "tests/test_gpu_unsloth.py::test_unsloth_when_on_a_gpu_then_trains_as_hf_does_and_says_what_ran"
CASES = support.cells_of(UNSLOTH)
COMMON = (
    f"--base_model={SMALL_MODEL} --data_path={TRAIN_ROWS} --bf16 --batch_size=16 --per_device_train_batch_size=8 --max_steps=20 "
    "--learning_rate=1e-3 --lora_dropout=0 --lora_r=16 --lora_alpha=2r --packing=False --logging_steps=1 --val_set_size=32 --eval_step=10 "
    "--save_step=10 --load_best_model_at_end=False --report_to=none --attn_implementation=sdpa"
)


def flags(case: Cell, backend: str, folder: str) -> list[str]:
    loading = f"--adapter_name={case.method} --load_4bit={case.quantization == 'nf4'}"
    return f"{COMMON} {loading} --backend={backend} --output_dir={folder}".split()


@pytest.fixture(params=CASES, ids=str)
def pair(request: pytest.FixtureRequest, finetune: Finetune, tmp_path: Path) -> tuple[Cell, str]:
    """A case, and what its Unsloth run printed; the folders unsloth/ and hf/ are in tmp_path."""
    case: Cell = request.param
    printed = {}
    for backend in ("unsloth", "hf" if case.quantization == "none" else "bnb"):
        done = finetune(*flags(case, backend, "unsloth" if backend == "unsloth" else "hf"), "--strict_backend", timeout_s=600)
        assert done.returncode == 0, done.stderr
        printed[backend] = done.stdout
    return case, printed["unsloth"]


def test_unsloth_when_on_a_gpu_then_trains_as_hf_does_and_says_what_ran(pair: tuple[Cell, str], tmp_path: Path) -> None:
    case, printed = pair
    ours, theirs = (torch.tensor(logs(tmp_path / name, "loss")) for name in ("hf", "unsloth"))
    assert len(theirs) == len(ours) == 20
    assert theirs[-1] < theirs[0] - 1.0
    assert float((theirs - ours).abs().mean() / ours.mean()) <= MEAN_BAND
    assert float(((theirs - ours).abs() / ours).max()) <= STEP_BAND
    stamp = json.loads((tmp_path / "unsloth/backend.json").read_text())
    assert (stamp["backend"], stamp["dtype"], stamp["attn_impl"]) == ("unsloth", "bf16", "sdpa")
    assert stamp["quantization"] == case.quantization
    assert stamp["kernels"][0].startswith("attention: sdpa (")
    assert ("DoRA: Unsloth's LoRA kernels off" in stamp["kernels"]) is (case.method == "dora")
    assert any(kernel.startswith("Unsloth's LoRA kernels: QKV 4 of 4") for kernel in stamp["kernels"]) is (case.method != "dora")
    assert "GPU memory: " in printed
    summary = json.loads((tmp_path / "unsloth/run.json").read_text())["summary"]
    assert 0 < summary["gpu_memory"]["reserved_before_gib"] <= summary["gpu_memory"]["peak_reserved_gib"]
    assert (summary["bad_steps"], summary["still_tensors"]) == ([], [])
    assert {tensor.dtype for tensor in tensors(tmp_path / "unsloth").values()} == {torch.float32}
    assert not (tmp_path / "unsloth_compiled_cache").exists()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unsloth_when_resumed_then_goes_on_as_the_whole_run_did(finetune: Finetune, tmp_path: Path, case: Cell) -> None:
    assert finetune(*flags(case, "unsloth", "whole"), timeout_s=600).returncode == 0
    done = finetune(*flags(case, "unsloth", "again"), "--resume_from_checkpoint=whole/checkpoint-10", timeout_s=600)
    assert done.returncode == 0, done.stderr
    whole, again = logs(tmp_path / "whole", "loss")[10:], logs(tmp_path / "again", "loss")
    assert again == pytest.approx(whole, rel=0.02)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unsloth_when_saved_then_plain_peft_gives_the_same_loss(finetune: Finetune, tmp_path: Path, case: Cell) -> None:
    """Within 5 %: plain PEFT computes in fp32, over fp32 or, for qlora, NF4 weights."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    done = finetune(*flags(case, "unsloth", "run"), timeout_s=600)
    assert done.returncode == 0, done.stderr
    four = (
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        if case.quantization == "nf4"
        else None
    )
    base = AutoModelForCausalLM.from_pretrained(SMALL_MODEL, dtype=torch.float32, quantization_config=four, device_map={"": 0})
    loaded = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    ids = torch.arange(20, 148, device="cuda")[None]
    other = finetune(*flags(case, "bnb" if four else "hf", "hf"), timeout_s=600)
    assert other.returncode == 0, other.stderr
    with torch.no_grad():
        mine = float(loaded(input_ids=ids, labels=ids).loss)
        loaded.load_adapter(str(tmp_path / "hf"), adapter_name="hf")
        loaded.set_adapter("hf")
        theirs = float(loaded(input_ids=ids, labels=ids).loss)
    assert mine == pytest.approx(theirs, rel=0.05)


def test_unsloth_when_forced_to_fail_then_falls_back_with_the_reason(finetune: Finetune, tmp_path: Path) -> None:
    early = stubs.unsloth(tmp_path / "early", "raise ImportError('xformers: no operator found for memory_efficient_attention_backward')")
    late = stubs.unsloth(tmp_path / "late", stubs.LATE_REFUSAL)
    for name, env, says in (("one", early, "memory_efficient_attention_backward"), ("two", late, "llama is not yet implemented")):
        done = finetune(*flags(Cell("dora", "none", "unsloth", False, False), "unsloth", name), env=env, timeout_s=600)
        assert done.returncode == 0, done.stderr
        assert "Falling back to transformers backend" in done.stdout
        stamp = json.loads((tmp_path / name / "backend.json").read_text())
        assert stamp["backend"] == "hf"
        assert says in stamp["reasons"]["backend"]


def test_trial_when_asked_twice_then_the_second_answer_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUREFOOT_CACHE", str(tmp_path))
    case = Case(model_type="llama", method="lora", quantization="none", dtype="bf16")
    first = detection.ask(machine.probe(), case)
    assert first.works, first.reason
    second = detection.ask(machine.probe(), case)
    assert second.reason == first.reason
    assert str(tmp_path) in second.origin
    assert os.listdir(tmp_path / "unsloth")
