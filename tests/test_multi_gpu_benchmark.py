"""The multi-GPU benchmark on a tiny shape with two processes on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT


def bench(folder: Path, *words: str) -> tuple[str, dict[str, Any]]:
    """What it printed and wrote."""
    out = folder / "multi.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks/multi_gpu.py"),
        f"--out={out}",
        f"--work={folder / 'work'}",
        "--processes=2",
        "--tiny",
    ]
    said = subprocess.run(
        [*command, "--steps=4", "--warmup=1", "--stages=1", *words], capture_output=True, text=True, timeout=400, check=True
    )
    return said.stdout, json.loads(out.read_text())


@pytest.mark.slow
def test_multi_gpu_when_run_on_two_cpu_processes_then_compares_each_engine_with_one(tmp_path: Path) -> None:
    _, found = bench(tmp_path, "--layers=fused", "--engines=single,ddp,fsdp2")
    assert [run.get("error") for run in found["runs"]] == [None] * 3
    rows = {row["engine"]: row for row in found["medians"]}
    live = {run["engine"]: (run["engine_live"]["distributed_type"], run["engine_live"]["processes"]) for run in found["runs"]}
    assert live == {"single": ("NO", 1), "ddp": ("MULTI_CPU", 2), "fsdp2": ("FSDP", 2)}
    assert rows["single"]["ratio"] == 1
    assert len(found["runs"][0]["each_gpu"]) == 2
    for run in found["runs"]:
        together = 1 if run["engine"] == "single" else 2
        assert [(steps, tokens) for steps, tokens, _ in run["windows"]] == [(1, 256 * together), (3, 256 * together)], (
            "the same work for each process"
        )
        assert run["tokens_per_s_per_gpu"] == pytest.approx(run["tokens_per_s"] / 2, rel=1e-3)
        assert rows[run["engine"]]["ratio"] == pytest.approx(run["tokens_per_s_per_gpu"] / rows["single"]["tokens_per_s_per_gpu"], abs=1e-3)
    assert found["runs"][0]["losses"][0] == pytest.approx(found["runs"][1]["losses"][0], abs=0.1)
    assert {"torch", "accelerate"} <= found["environment"]["versions"].keys()
    assert str(tmp_path) not in json.dumps(found)
    said, again = bench(tmp_path, "--layers=fused,peft", "--engines=single,ddp,fsdp2", "--time_limit_s=1")
    assert "time limit" in said
    assert again["runs"] == found["runs"]
