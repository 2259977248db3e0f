"""workflows/: the shell scripts as a user starts them, on the small model."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT, TRAIN_ROWS

QUICK = "--max_steps=2 --batch_size=8 --eval_strategy=no --save_strategy=no --val_set_size=0"


def batch(content: str, folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "batch.yaml"
    file.write_text(content)
    env = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(
        ["bash", str(ROOT / "workflows/batch_process.sh"), str(file)], env=env, capture_output=True, text=True, timeout=300
    )


@pytest.mark.slow
def test_batch_when_one_data_set_fails_then_the_others_run_and_the_table_has_all(tmp_path: Path, venv: Path) -> None:
    good, bad = tmp_path / "good.jsonl", tmp_path / "bad.jsonl"
    good.write_text("\n".join(sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:40]) + "\n")
    bad.write_text('{"premise": "a"}\n')
    out = tmp_path / "out"
    done = batch(
        f"datasets: {{bad: {bad}, good: {good}}}\nconfigs: [configs/quick_start.yaml]\nstyle: Short.\nflags: {QUICK}\noutput_dir: {out}\n",
        tmp_path, venv / "bin/python",
    )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith(("bad ", "good "))]
    assert [row[:3] for row in rows] == [["bad", "configs/quick_start.yaml", "3"], ["good", "configs/quick_start.yaml", "0"]]
    assert done.stdout.endswith("1 of 2 runs failed\n")
    assert "no question and answer, turns or text among the columns premise" in (out / "bad-quick_start.log").read_text()
    assert json.loads((out / "good-quick_start/run.json").read_text())["status"] == "done"
    assert json.loads((out / "good/processed_with_style/train.jsonl").read_text().splitlines()[0])["system"] == "Short."


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("datasets: {}\n", "must have datasets (name: file) and configs (a list)"),
        ("datasets: {a: b}\nconfigs: [c.yaml]\nstlye: x\n", "must have datasets"),
        ("datasets: {a: b}\nconfigs: [c.yaml, d/c.yaml]\n", "two configs have one file name"),
        ("datasets: [\n", "cannot be read"),
    ],
)
def test_batch_when_its_list_is_wrong_then_nothing_runs(tmp_path: Path, venv: Path, content: str, says: str) -> None:
    done = batch(content, tmp_path, venv / "bin/python")
    assert done.returncode == 1
    assert says in done.stderr
    assert done.stdout == ""


def test_shipped_list_when_read_then_names_what_exists() -> None:
    import yaml

    listed = yaml.safe_load((ROOT / "workflows/batch.yaml").read_text())
    assert all((ROOT / path).exists() for path in [*listed["datasets"].values(), *listed["configs"]])


@pytest.mark.parametrize(("words", "code"), [(["--help"], 0), (["--fast"], 2)])
def test_quick_start_when_asked_for_help_or_wrong_then_says_so(words: list[str], code: int) -> None:
    done = subprocess.run(["bash", str(ROOT / "workflows/quick_start.sh"), *words], capture_output=True, text=True, timeout=30)
    assert done.returncode == code
    assert "--yes" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("answers", [None, "examples/small_model\nBe brief.\nrendered\n"])
def test_quick_start_when_run_for_the_first_time_then_trains_and_answers(tmp_path: Path, venv: Path, answers: str | None) -> None:
    command = ["bash", str(ROOT / "workflows/quick_start.sh"), f"--folder={tmp_path}", *(["--yes"] if answers is None else [])]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"VENV": str(venv)}
    done = subprocess.run(command, env=env, input=answers, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "outputs/quick-start/run.json").read_text())
    assert record["status"] == "done"
    stage = "processed_with_style" if answers is None else "rendered"
    assert record["plan"]["data"]["data_path"] == [str(tmp_path / f"data/{stage}/train.jsonl")]
    assert (tmp_path / "outputs/quick-start-answers.jsonl").stat().st_size > 0
    assert shutil.which("make")


def typed(command: list[str], answers: dict[str, str], env: dict[str, str], timeout_s: float) -> tuple[int, str]:
    """Runs a command in a terminal and types each answer once its question stands there; the exit code and what the terminal showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, close_fds=True)
    os.close(theirs)
    shown, left, deadline = "", list(answers.items()), time.monotonic() + timeout_s
    while True:
        ready, _, _ = select.select([ours], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing in {timeout_s:.0f} s after {shown[-2000:]}"
        try:
            shown += os.read(ours, 65536).decode(errors="replace")
        except OSError:  # Linux's end of file of a terminal that nobody holds any more
            break
        if left and left[0][0] in shown:
            os.write(ours, f"{left.pop(0)[1]}\n".encode())
    os.close(ours)
    assert left == []
    return process.wait(), shown


def test_quick_start_when_answers_are_typed_then_takes_them_and_what_stands_in_brackets(tmp_path: Path, venv: Path) -> None:
    rows = sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:40]
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/own.jsonl").write_text("\n".join(rows) + "\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"VENV": str(venv)}
    questions = {
        "base model [examples/small_model] ": "",
        "style of the answers [Answer in one line.] ": "Be brief.",
        "train on processed, processed_with_style or rendered [processed_with_style] ": "rendered",
    }
    code, shown = typed(["bash", str(ROOT / "workflows/quick_start.sh"), f"--folder={tmp_path}"], questions, env, 300)
    assert code == 0, shown[-3000:]
    record = json.loads((tmp_path / "outputs/quick-start/run.json").read_text())
    assert record["status"] == "done"
    assert record["plan"]["model"]["path"] == "examples/small_model"
    assert record["plan"]["data"]["data_path"] == [str(tmp_path / "data/rendered/train.jsonl")]
    assert "Be brief." in (tmp_path / "data/rendered/train.jsonl").read_text()
    said = (tmp_path / "outputs/quick-start-answers.jsonl").read_text().splitlines()
    assert len(said) == len((tmp_path / "data/rendered/test.jsonl").read_text().splitlines())
    assert said[0] in shown


def test_quick_start_when_a_typed_answer_is_wrong_then_nothing_is_made(tmp_path: Path, venv: Path) -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")} | {"VENV": str(venv)}
    questions = {"base model [": "", "style of": "", "rendered [": "raw"}
    code, shown = typed(["bash", str(ROOT / "workflows/quick_start.sh"), f"--folder={tmp_path}"], questions, env, 60)
    assert code == 2
    assert "quick_start.sh: raw is none of processed, processed_with_style, rendered" in shown
    assert not (tmp_path / "data/processed").exists()
