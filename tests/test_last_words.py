"""What several processes of one launch say when they fail: one message, and one exit code."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surefoot import last_words
from surefoot.errors import DataError, PlanError
from tests.conftest import ROOT
from tests.runs import quick, words


def test_error_when_two_processes_meet_it_then_one_says_it_and_both_exit_alike(rows: Path, tmp_path: Path) -> None:
    flags = words(quick(data_path=rows, output_dir=tmp_path / "run", batch_size=7))
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        ROOT / "profiles/cpu_2proc.yaml",
        "--main_process_port",
        0,
    ]
    done = subprocess.run([*map(str, launch), str(ROOT / "finetune.py"), *flags], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert done.stderr.count("finetune.py: --batch_size=7 cannot be split") == 1
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) == ["2", "2"]
    assert "Signal" not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_error_when_processes_read_other_rows_then_both_end_and_one_says_so(rows: Path, tmp_path: Path) -> None:
    """torchrun gives each process its own rows here, as machines with their own copies of a file may."""
    (tmp_path / "other.jsonl").write_text("\n".join(rows.read_text().splitlines()[::-1]) + "\n")
    script = tmp_path / "finetune_apart.py"
    script.write_text(
        "import os, sys\nimport finetune\n"
        f"sys.argv.append('--data_path=' + [{str(rows)!r}, {str(tmp_path / 'other.jsonl')!r}][int(os.environ['RANK'])])\n"
        "sys.exit(finetune.main())\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", script]
    flags = words(quick(output_dir=tmp_path / "run"))
    done = subprocess.run(
        [*map(str, launch), *flags], capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.stderr.count("do not train the same: rows (fingerprint)") == 1
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) == ["5", "5"]


OTHER_PEFT = """
import importlib.metadata, os
version = importlib.metadata.version
if os.environ.get("RANK") == "1":
    importlib.metadata.version = lambda name: "0.0.1" if name == "peft" else version(name)
"""


@pytest.mark.slow
def test_error_when_a_process_has_other_versions_then_both_end_and_one_says_so(rows: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(OTHER_PEFT)
    launch = [sys.executable, "-m", "surefoot.launcher", "--config_file", ROOT / "profiles/cpu_2proc.yaml", "--main_process_port", 0]
    flags = words(quick(data_path=rows, output_dir=tmp_path / "run"))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    done = subprocess.run([*map(str, launch), str(ROOT / "finetune.py"), *flags], capture_output=True, text=True, timeout=200, env=env)
    assert done.returncode == 5, done.stderr[-3000:]
    assert len(re.findall(r"do not train the same: peft [\d.]+ and 0\.0\.1\. Give all machines", done.stderr)) == 1


def test_error_when_the_port_is_taken_then_names_it_and_the_way_out(finetune: Callable[..., Any], rows: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        env = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        done = finetune(*words(quick(data_path=rows, output_dir="run")), env=env)
    assert done.returncode == 5, done.stderr
    assert f"process 0 of 2 cannot meet the others at 127.0.0.1:{port}" in done.stderr
    assert "--main_process_port" in done.stderr
    assert "Traceback" not in done.stderr


def test_launcher_when_the_port_of_several_machines_is_taken_then_says_so_and_exits_5() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = ["--config_file", ROOT / "profiles/cpu_2proc.yaml", "--num_machines", 2, "--machine_rank", 0, "--num_processes", 4]
        words += ["--main_process_ip", "127.0.0.1", "--main_process_port", port, ROOT / "finetune.py"]
        command = [sys.executable, "-m", "surefoot.launcher", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 5, done.stderr
    assert f"surefoot.launcher: --main_process_port: Tried to launch distributed communication on port `{port}`" in done.stderr
    assert "Traceback" not in done.stderr


def test_say_when_processes_fail_differently_then_the_first_is_heard_and_gives_the_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(last_words, "PATIENCE_S", 0.05)
    codes = []
    for rank, error in enumerate([DataError("no rows"), PlanError("no GPU")]):
        (tmp_path / str(rank)).mkdir()
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / str(rank) / "error.json"))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        codes.append(last_words.say(error))
    assert codes == [3, 3]
    assert capsys.readouterr().err == "finetune.py: no rows\n"


def test_say_when_nothing_started_it_then_prints_and_returns_its_own_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert "TORCHELASTIC_ERROR_FILE" not in os.environ
    assert last_words.say(PlanError("no GPU")) == 2
    assert capsys.readouterr().err == "finetune.py: no GPU\n"
