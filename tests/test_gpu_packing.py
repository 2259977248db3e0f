"""Packed rows on one CUDA GPU: torch's varlen kernel against the rows apart, compiled without recompiling, and through finetune.py.

Run with: CUDA_VISIBLE_DEVICES=0 pytest -m gpu -o addopts= tests/test_gpu_packing.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surefoot.attention import canary
from surefoot.attention import packed as packed_attention
from surefoot.data.packing import best_fit
from surefoot.data.rows import Collator
from surefoot.training import leak
from surefoot.verdicts import Shape
from tests.packed import LENGTHS, PAD, collated, commonsense_lengths, distance, rows_of, small_model, trained_on
from tests.runs import logs, words
from tests.test_packing_run import few, of_an_epoch  # noqa: F401

pytestmark = pytest.mark.gpu


def bf16() -> Any:
    return torch.autocast("cuda", dtype=torch.bfloat16)


def on_gpu(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value.cuda() if torch.is_tensor(value) else value for name, value in batch.items()}


def varlen_model(method: str = "dora") -> Any:
    model = small_model("sdpa", method=method).cuda()
    packed_attention.use_varlen(model)
    return model


def test_varlen_when_judged_by_the_canary_then_is_right_with_empty_stretches() -> None:
    shape = Shape(heads=32, kv_heads=8, head_dim=128, dtype="bf16", length=2048, rows=1)
    (verdict,) = canary.verdicts("varlen", shape, torch.device("cuda"))
    assert (verdict.state, verdict.mask) == ("pass", "packed"), verdict


def test_model_when_packed_through_varlen_in_bf16_then_is_as_near_to_fp32_as_the_rows_apart() -> None:
    rows = rows_of(*LENGTHS)
    packed, collator = collated(rows, [[0, 2, 3], [4, 1, 5, 6]], 256)
    together = [on_gpu(collator([packed[index]])) for index in range(2)]
    apart = [on_gpu(Collator(pad_token_id=PAD)([rows[index]])) for index in range(len(rows))]
    truth = trained_on(small_model("eager").cuda(), apart)
    with bf16():
        found, plain = trained_on(varlen_model(), together), trained_on(small_model("sdpa").cuda(), apart)
    assert distance(found[0], truth[0]) < max(2 * distance(plain[0], truth[0]), 1e-2)
    assert abs(found[1] - truth[1]) / truth[1] < max(2 * abs(plain[1] - truth[1]) / truth[1], 1e-3)
    off = {name: (distance(found[2][name], truth[2][name]), distance(plain[2][name], truth[2][name])) for name in truth[2]}
    assert all(ours < max(3 * theirs, 3e-2) for ours, theirs in off.values()), off


def test_leak_when_packed_through_varlen_then_is_none() -> None:
    assert leak.check(varlen_model(), rows_of(40)[0]["input_ids"], bf16) == 0.0


def test_layers_when_compiled_then_no_packed_row_recompiles_them(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = commonsense_lengths(120)
    packed, collator = collated(rows_of(*lengths), [piece.tolist() for piece in best_fit(lengths, 1024, 42)], 1024)
    batches = [on_gpu(collator([packed[index]])) for index in range(len(packed))]
    model = varlen_model("lora")
    with bf16():
        plain = trained_on(model, batches[:3])
        torch._dynamo.reset()
        for layer in model.get_base_model().get_decoder().layers:
            layer.compile()
        found = trained_on(model, batches[:3])
        monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
        for batch in batches:
            trained_on(model, [batch])
    assert len(batches) > 10
    assert len({int(np.count_nonzero(batch["cu_seq_lens_q"].cpu().diff())) for batch in batches}) > 1
    assert found[1] == pytest.approx(plain[1], rel=1e-2)


@pytest.mark.parametrize("stage", [2, 3])
def test_run_when_left_to_the_plan_then_is_packed_through_varlen_with_the_losses_of_the_rows_apart(
    finetune: Callable[..., Any],
    few: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    stage: int,
) -> None:
    flags = of_an_epoch(few, stage=stage, pack_len=1024)
    done = finetune(*words({**flags, "output_dir": "packed"}))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "packed/run.json").read_text())
    train = record["plan"]["train"]
    inside = "flash_attention_2" if record["plan"]["model"]["attn_implementation"] == "flash_attention_2" else "varlen"
    assert (train["packing"], train["packed_attention"]) == ("on", inside)
    assert record["summary"]["packing"]["leak"] == 0.0
    del flags["pack_len"]
    apart = finetune(*words({**flags, "output_dir": "apart", "packing": False}))
    assert apart.returncode == 0, apart.stderr
    assert logs(tmp_path / "packed", "loss") == pytest.approx(logs(tmp_path / "apart", "loss"), rel=2e-2)
    assert logs(tmp_path / "packed", "eval_loss") == pytest.approx(logs(tmp_path / "apart", "eval_loss"), rel=3e-2)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_run_when_packing_is_asked_for_with_a_mask_then_has_the_losses_of_the_rows_apart(
    finetune: Callable[..., Any],
    few: dict[str, Path],  # noqa: F811
    tmp_path: Path,
    attention: str,
) -> None:
    flags = of_an_epoch(few, attn_implementation=attention, disable_flash_sdpa=True)
    done = [
        finetune(*words({**flags, "output_dir": "packed", "packing": True, "pack_len": 1024})),
        finetune(*words({**flags, "output_dir": "apart", "packing": False})),
    ]
    assert [one.returncode for one in done] == [0, 0], done
    assert json.loads((tmp_path / "packed/run.json").read_text())["plan"]["train"]["packed_attention"] == attention
    assert logs(tmp_path / "packed", "loss") == pytest.approx(logs(tmp_path / "apart", "loss"), rel=2e-2)
