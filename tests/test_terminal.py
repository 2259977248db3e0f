"""What a terminal of 80 columns shows, a pipe whose reader leaves, and the first sign of life of a slow run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from surefoot import plan_text, terminal
from surefoot.config import Config
from surefoot.plan import make_plan
from surefoot.training import metrics
from tests.conftest import ROOT, TRAIN_ROWS, inputs, machine
from tests.runs import quick, words

PAGES = ["finetune.py", *sorted(f"scripts/{path.name}" for path in (ROOT / "scripts").glob("*.py"))]


def shown(*command: str, columns: int = 80) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("page", [f"{page} --help" for page in PAGES] + ["-m surefoot.launch --help"])
def test_help_when_the_terminal_has_80_columns_then_fits(page: str) -> None:
    done = shown(*page.split())
    assert (done.returncode, done.stderr) == (0, "")
    long = [line for line in done.stdout.splitlines() if len(line) > 80]
    assert [line for line in long if " " in line.strip()] == []  # a path alone may be longer: it is never cut


def test_text_when_a_command_is_too_long_then_can_still_be_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    command = "python scripts/evaluate.py --lora_weights=RUN --dataset boolq piqa --data_dir=dataset"
    lines = terminal.text(f"{command}  # the tasks").splitlines()
    assert lines[0] == "# the tasks"
    assert " ".join(" ".join(lines[1:]).replace("\\", "").split()) == command
    assert all(line.endswith(" \\") for line in lines[1:-1])


def test_plan_when_the_terminal_is_narrow_then_no_word_is_cut() -> None:
    path = "/a/long/road/to/the/rows/of/an/experiment/that/has/a/name/commonsense_170k.jsonl"
    modules = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj")
    config = Config.parse({"base_model": "m", "data_path": path, "target_modules": modules}, file_values={"lora_r": 4})
    text = plan_text.table(make_plan(config, machine(), inputs(), None, None), all_rows=True, width=80)
    assert path in text
    assert [line for line in text.splitlines() if len(line) > 80 and path not in line] == []
    assert all(word in text.split() for word in modules)


def test_pipe_when_its_reader_leaves_then_ends_without_a_traceback() -> None:
    flags = f"--base_model=examples/small_model --data_path={TRAIN_ROWS} --output_dir=/nowhere-yet/run --dry_run"
    for command in ("finetune.py --help", f"finetune.py {flags}", "scripts/evaluate.py --help"):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
        os.close(writer)
        assert (done.returncode, done.stderr) == (terminal.SIGPIPE, "")


def test_run_when_its_first_step_is_slow_then_says_how_far_it_is(
    tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import finetune

    monkeypatch.setattr(metrics, "PATIENCE_S", 0.0)
    flags = quick(data_path=rows, output_dir=tmp_path / "run", max_steps=2, warmup_steps=0, per_device_train_batch_size=2, val_set_size=0)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words(flags)])
    assert finetune.main() == 0
    assert "step 0/2, pass 1 of 4 of the next: 1 s so far" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words_", "says"),
    [
        ("--config_file nowhere.yaml finetune.py", "--config_file=nowhere.yaml does not exist"),
        ("--config_file profiles/single.yaml --num_processes 2 finetune.py", "--num_processes=2: profiles/single.yaml starts one process"),
        ("--config_file profiles/cpu.yaml --num_processes two finetune.py", "invalid int value: 'two'"),
    ],
)
def test_launcher_when_its_words_are_wrong_then_says_so_in_one_message(words_: str, says: str) -> None:
    done = shown("-m", "surefoot.launcher", *words_.split())
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) <= 2


@pytest.mark.parametrize("command", ["infer.py", "merge.py --adapter nowhere", "export.py --adapter nowhere --format gguf", "export.py"])
def test_script_when_its_flags_are_wrong_then_answers_before_torch(command: str) -> None:
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as left: print(left.code, 'torch' in sys.modules)"
    )
    done = shown("-c", code, *f"scripts/{command}".split())
    assert done.stdout == "2 False\n", done.stderr
