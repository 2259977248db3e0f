"""The Makefile's targets as make reads them, TensorBoard's two scripts, and the whole chain on the small model."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, TRAIN_ROWS

TARGETS = """help install demo setup-dirs download-model process style render full-pipeline train train-bnb train-unsloth train-tb
train-bnb-tb train-unsloth-tb train-with-tb tensorboard tb tb-stop eval eval-val eval-test eval-quick eval-full infer infer-batch
infer-interactive merge merge-bf16 merge-test schema test test-slow lint check clean""".split()


def make(venv: Path, *words: object, timeout_s: int = 60) -> subprocess.CompletedProcess[str]:
    # not the VENV or MAKEFLAGS of a make that runs these tests
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name != "VENV"}
    command = ["make", f"VENV={venv}", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)


def said(venv: Path, *words: object) -> list[list[str]]:
    """The commands that make would run, as a shell splits them."""
    done = make(venv, "-n", "CONFIG=configs/quick_start.yaml", *words)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines() if line.strip()]


@pytest.mark.parametrize("target", TARGETS)
def test_target_when_made_dry_then_is_known_and_runs_what_exists(venv: Path, target: str) -> None:
    for words in said(venv, target):
        for word in words:
            if word.startswith(("scripts/", "configs/")) or word == "finetune.py":
                assert (ROOT / word).exists()


def test_targets_when_listed_then_help_has_each(venv: Path) -> None:
    listed = {word for line in make(venv, "help").stdout.splitlines() for word in line[:23].split()}
    assert set(TARGETS) - listed == {"train-bnb-tb", "train-unsloth-tb"}
    assert [line for line in make(venv, "help").stdout.splitlines() if len(line) > 80] == []


def test_variables_when_given_then_reach_the_commands_whole(venv: Path) -> None:
    style = 'Don\'t say "$HOME"; 2 lines.'
    (command,) = said(venv, "style", f"STYLE={style}", "DATA=d")
    assert command[1:] == ["scripts/style_prompt.py", f"--style={style}", "--in=d/processed", "--out=d/processed_with_style"]
    (command,) = said(venv, "train", "MODEL=org/m", "TRAIN_ON=rendered", "FLAGS=--stage 2")
    assert command[1:] == [
        "finetune.py", "--config=configs/quick_start.yaml", "--base_model=org/m",
        "--data_path=data/rendered/train.jsonl", "--val_data_path=data/rendered/val.jsonl", "--stage", "2",
    ]  # fmt: skip
    assert said(venv, "train")[0][1:] == ["finetune.py", "--config=configs/quick_start.yaml"]
    assert "--lora_weights=outputs/quick-start" in said(venv, "eval-test")[0]
    assert "--verify=outputs/quick-start/merged-bf16" in said(venv, "merge-test")[0]
    assert said(venv, "download-model", "MODEL=org/m")[0][1:5] == ["download", "org/m", "--local-dir", "models/m"]
    assert said(venv, "tensorboard", "TB_PORT=7")[0][:3] == ["scripts/tensorboard.sh", "start", "7"]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_tensorboard_when_stopped_then_only_ours_ends(venv: Path, tmp_path: Path) -> None:
    port = free_port()
    words = ["bash", str(ROOT / "scripts/tensorboard.sh")]
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)  # tensorboard.main"])
    try:
        start = [*words, "start", str(port), str(tmp_path), str(venv / "bin/python")]
        first = subprocess.run(start, capture_output=True, text=True, timeout=90)
        assert first.returncode == 0, first.stderr
        pid = int((tmp_path / f".tensorboard-{port}.pid").read_text())
        again = subprocess.run(start, capture_output=True, text=True, timeout=90)
        assert f"already (process {pid})" in again.stdout
        other = subprocess.run([*start[:4], str(tmp_path / "other"), start[5]], capture_output=True, text=True, timeout=90)
        assert (other.returncode, other.stderr) == (2, f"tensorboard.sh: port {port} is taken by another program. Use TB_PORT={port + 1}\n")
        stop = subprocess.run([*words, "stop", str(port), str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert stop.stdout == f"ended TensorBoard at port {port} (process {pid})\n"
        for _ in range(100):
            if not Path(f"/proc/{pid}/cmdline").exists() or not Path(f"/proc/{pid}/cmdline").read_bytes():
                break
            time.sleep(0.1)
        else:
            pytest.fail("TensorBoard is still there")
        # a pid file whose process is another program's by now
        (tmp_path / f".tensorboard-{port}.pid").write_text(str(bystander.pid))
        stop = subprocess.run([*words, "stop", str(port), str(tmp_path)], capture_output=True, text=True, timeout=60)
        assert stop.stdout.startswith("no TensorBoard of ours runs")
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


@pytest.mark.slow
def test_chain_when_run_on_the_small_model_then_every_step_leaves_its_files(venv: Path, tmp_path: Path) -> None:
    data, run = tmp_path / "data", tmp_path / "run"
    (data / "raw").mkdir(parents=True)
    (data / "raw/rows.jsonl").write_text("\n".join(TRAIN_ROWS.read_text().splitlines()[:120]) + "\n")
    words = [
        "CONFIG=configs/quick_start.yaml",
        f"DATA={data}",
        "TRAIN_ON=processed_with_style",
        f"RUN={run}",
        f"OUTPUT={tmp_path}/answers.jsonl",
    ]
    for step in ("process", "style", "render", "train", "eval-quick", "infer-batch", "merge", "merge-test"):
        done = make(venv, step, *words, f"FLAGS=--output_dir={run} --max_steps=4", "STYLE=Answer in one line.", timeout_s=300)
        assert done.returncode == 0, f"{step}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert all((data / stage / "test.jsonl").is_file() for stage in ("processed", "processed_with_style", "rendered"))
    assert json.loads((run / "run.json").read_text())["status"] == "done"
    assert (run / "report.html").is_file()
    assert (run / "evaluation.json").is_file()
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 24
    assert list((run / "merged-bf16").glob("*.safetensors"))
