"""scripts/diagnose.py as a user starts it, on the shipped model, and what it advises."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from surefoot.cli import parse
from surefoot.diagnosis.short_run import flags_of, words_of
from tests.conftest import ROOT, SMALL_MODEL, TRAIN_ROWS

COMMON = {
    "base_model": SMALL_MODEL, "adapter_name": "lora", "target_modules": "q_proj,v_proj", "lora_r": 4, "lora_dropout": 0.0, "batch_size": 8,
    "per_device_train_batch_size": 8, "learning_rate": 2e-3, "val_set_size": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 8 shortest shipped rows: every step of 8 rows sees the same batch."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:8]) + "\n")
    return path


@pytest.fixture
def start(rows: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python scripts/diagnose.py` in a real process, its temporary folders under tmp_path."""

    def start(*words: object, env: dict[str, str] | None = None, **flags: object) -> subprocess.CompletedProcess[str]:
        given = words_of({**COMMON, "data_path": rows, "output_dir": "untouched", **flags})
        command = [sys.executable, str(ROOT / "scripts/diagnose.py"), *given, *map(str, words)]
        environ = {**os.environ, "TMPDIR": str(tmp_path), **(env or {})}
        return subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)

    return start


def test_diagnose_when_the_run_is_healthy_then_passes_and_names_the_next_stage(start: Callable[..., Any], tmp_path: Path) -> None:
    done = start("--steps", 6, warmup_ratio=0.5)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "--max_steps=6" in lines[0]
    assert "--warmup_ratio=none" in lines[0]
    assert lines[1] == "ran: eager attention, compile off, fp32, CPU"
    assert [line.split()[0] for line in lines[4:10]] == list("123456")
    assert [tuple(line.split()[:2]) for line in lines[11:15]] == [("ok", name) for name in ("exit", "loss", "grad_norm", "falling")]
    following = next(line for line in lines if line.startswith("next: use --stage=2: python scripts/diagnose.py"))
    assert parse(flags_of(shlex.split(following.partition("diagnose.py ")[2]))).stage == 2
    assert not (tmp_path / "untouched").exists()
    assert list(tmp_path.glob("diagnose-*")) == []


def test_diagnose_when_the_learning_rate_is_absurd_then_exits_4_and_names_check_and_way_back(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    done = start("--steps=5", "--json", "--keep", "kept", learning_rate=1e30)
    assert done.returncode == 4
    found = json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    failed = [check for check in found["checks"] if check["status"] == "FAIL"]
    assert [check["name"] for check in failed] == ["exit", "loss", "grad_norm", "falling"]
    assert failed[1]["detail"].startswith("nan at step 2")
    assert found["runs"][0]["steps"][1]["loss"] == "nan"
    assert found["runs"][0]["message"] in failed[0]["detail"]
    assert "the loss is nan" in found["runs"][0]["message"]
    assert found["runs"][0]["setup"]["learning_rate"] == 1e30
    assert found["advice"] == ["--learning_rate=0.0003"]
    assert json.loads((tmp_path / "kept/run/run.json").read_text())["status"] == "failed"


def test_diagnose_when_the_loss_is_frozen_then_exits_4_naming_it(start: Callable[..., Any]) -> None:
    done = start("--steps=4", learning_rate=1e-9)
    assert done.returncode == 4
    assert "FAIL  falling" in done.stdout
    assert "ok    loss" in done.stdout
    assert "ways back, in this order:\n  1. --steps=20" in done.stdout


def test_compare_when_stages_1_and_2_run_in_fp32_then_agree(start: Callable[..., Any], tmp_path: Path) -> None:
    done = start("--compare_stages", 1, 2, "--steps", 6, "--band", 1e-4, "--json", "--keep", "kept", stage=3)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [run["setup"]["attn_implementation"] for run in found["runs"]] == ["eager", "sdpa"]
    assert [run["setup"]["stage"] for run in found["runs"]] == [1, 2]
    losses = [[step["loss"] for step in run["steps"]] for run in found["runs"]]
    assert found["agreement"]["differences"] == pytest.approx([abs(a - b) for a, b in zip(*losses, strict=True)])
    assert len(losses[0]) == 6
    assert found["agreement"]["largest"] < 1e-4
    assert found["agreement"]["speed"] > 0
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["stage1", "stage2"]


def test_diagnose_when_the_plan_refuses_then_shows_its_message_and_exit_code(start: Callable[..., Any]) -> None:
    done = start(batch_size=12)
    assert done.returncode == 2
    assert "ended with 2 after 0 of 10 steps: --batch_size=12 cannot be split" in done.stdout
    assert "FAIL  loss" not in done.stdout


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--learning_rat=1"], "Did you mean --learning_rate?"),
        (["--compare_stages=1,2", "--attn_implementation=sdpa"], "--attn_implementation=sdpa (flag) overrides what --compare_stages compares"),
        (["--compare_stages", "1", "2", "--disable_cudnn_sdpa"], "--disable_cudnn_sdpa=True (flag) overrides"),
        (["--compare_stages", "2", "3", "--torch_compile=False"], "--enable_torch_compile=False (flag) overrides"),
        (["--compare_stages=1"], "--compare_stages=1 must be two different stages"),
        (["--compare_stages", "2", "2"], "--compare_stages=2 2 must be two different stages"),
        (["--compare_stages=1,2,2"], "--compare_stages=1 2 2 must be two different stages"),
        (["--compare_stages", "1", "4"], "--compare_stages=4 is not one of 1, 2, 3"),
        (["--steps=1"], "--steps=1 is too small: the least is 2"),
        (["--steps", "half"], "--steps=half must be a whole number"),
        (["--band=0.1"], "--band has a meaning only with --compare_stages"),
        (["--compare_stages=1,2", "--band=nan"], "--band=nan must be a number"),
        (["--json", "stray"], "--json=stray must be True or False"),
        (["--keep"], "--keep needs a value"),
        (["--keep=untouched"], "is the command's own --output_dir"),
        (["--dry_run"], "--dry_run trains nothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_diagnose_when_a_flag_is_wrong_then_exits_2_and_names_it(
    start: Callable[..., Any], tmp_path: Path, words: list[str], complaint: str
) -> None:
    done = start(*words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_diagnose_when_keep_holds_files_then_refuses_it(start: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept/mine.txt").write_text("mine")
    done = start("--keep=kept")
    assert (done.returncode, "exists and is not empty" in done.stderr) == (2, True)


def test_diagnose_when_started_by_a_launcher_then_names_the_way_out(start: Callable[..., Any]) -> None:
    done = start(env={"WORLD_SIZE": "2"})
    assert done.returncode == 2
    assert "Start it as python scripts/diagnose.py" in done.stderr


def test_diagnose_when_it_parses_a_command_then_has_not_imported_torch() -> None:
    code = (
        "import sys, runpy; sys.argv = ['diagnose.py', '--base_model=x', '--dry_run']\n"
        "try: runpy.run_path('scripts/diagnose.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'datasets', 'peft'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
