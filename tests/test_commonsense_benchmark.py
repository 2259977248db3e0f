"""benchmarks/commonsense_smollm2.py: its verdict, and a rehearsal on the small model."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HELDOUT_ROWS, ROOT, SMALL_MODEL, TRAIN_ROWS


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import commonsense_smollm2

    return commonsense_smollm2


def result(ours: list[int], peft: list[int], untrained: int) -> dict[str, Any]:
    """Rows right of 1000 in each of two sets."""

    def scores(correct: int) -> dict[str, Any]:
        return {
            scoring: {task: {"correct": correct, "rows": 1000} for task in ("boolq", "piqa")} for scoring in ("generate", "loglikelihood")
        }

    pairs = [("ours", value) for value in ours] + [("peft", value) for value in peft]
    runs = {f"{path}_{place}": {"path": path, "method": "dora", "scores": scores(value)} for place, (path, value) in enumerate(pairs)}
    return {"untrained": scores(untrained), "runs": runs}


def test_verdict_when_the_paths_differ_by_less_than_the_seeds_then_they_agree(benchmark: Any) -> None:
    found = benchmark.verdict(result([500, 520, 510], [505, 515, 520], 300))["dora generate"]
    assert found["agree"] is True
    assert found["beat_untrained"] is True
    assert found["low"] <= found["ours_minus_peft"] <= found["high"]


def test_verdict_when_one_path_is_worse_than_the_seeds_allow_then_says_so(benchmark: Any) -> None:
    found = benchmark.verdict(result([400, 402, 401], [505, 504, 506], 398))["dora generate"]
    assert found["agree"] is False
    assert found["beat_untrained"] is False
    assert found["ours_minus_peft"] == pytest.approx(-0.104)


@pytest.mark.slow
def test_benchmark_when_stopped_and_called_again_then_does_what_is_missing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for source, name, keep in ((TRAIN_ROWS, "commonsense_147k", 96), (HELDOUT_ROWS, "test_social_i_qa", 8)):
        rows = [row for row in source.read_text().splitlines() if "social_i_qa" in row][:keep]
        with gzip.open(data / f"{name}.jsonl.gz", "wt") as file:
            file.write("\n".join(rows) + "\n")

    work = tmp_path / "work"
    command = [
        sys.executable, str(ROOT / "benchmarks/commonsense_smollm2.py"), f"--model={SMALL_MODEL}", f"--data={data}",
        f"--out={tmp_path / 'out.json'}", f"--work={work}", "--at_once=1", "--batch_size=8", "--stage=1", "--rows=96",
        "--flags=--batch_size=32 --per_device_train_batch_size=16 --lora_r=4 --save_step=1", "--seeds=1", "--methods=dora",
    ]  # fmt: skip

    def start(*words: str) -> str:
        return subprocess.run([*command, *words], capture_output=True, text=True, check=True, timeout=500).stdout

    assert "2 of 2 runs are missing" in start("--time_limit_s=0")
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (work / "ours_dora_1/checkpoint-1").is_dir():
        assert killed.poll() is None
        time.sleep(0.05)
    os.killpg(killed.pid, signal.SIGKILL)  # as a machine that takes back its time does, trainings and all
    killed.wait()
    assert "nothing is missing" in start()
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["runs"]) == {"ours_dora_1", "peft_dora_1"}
    assert len(json.loads((work / "ours_dora_1/run.json").read_text())["resumes"]) == 1
    for run in found["runs"].values():
        assert run["scores"]["generate"]["social_i_qa"]["rows"] == 8
        assert run["summary"]["steps"] == 3
    assert set(found["verdict"]) == {"dora generate", "dora loglikelihood"}
