"""Who may write into a run folder."""

from __future__ import annotations

import fcntl
import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

import finetune as program
from surefoot import artifacts
from surefoot.errors import BackendError, LostError
from surefoot.training import trainer
from tests.runs import quick, words


def test_output_dir_when_the_system_refuses_it_then_is_one_message(finetune: Callable[..., CompletedProcess[str]], rows: Path) -> None:
    done = finetune(*words(quick(data_path=rows, output_dir="/proc/surefoot-run")))
    assert done.returncode == 2
    assert done.stderr.startswith("finetune.py: --output_dir=/proc/surefoot-run cannot be written: ")
    assert "Traceback" not in done.stderr


def contents(folder: Path) -> dict[Path, bytes]:
    """Of every file but the report, which is made anew from the others."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "report.html"}


@pytest.mark.parametrize("how", ["--resume", "--overwrite"])
def test_output_dir_when_another_run_writes_there_then_is_left_alone(
    how: str, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    flags = words(quick(data_path=rows, output_dir=folder, max_steps=2, save_step=1, val_set_size=0))
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags])
    assert program.main() == 0
    record = (folder / "run.json").read_text().replace('"status": "done"', '"status": "running"')
    (folder / "run.json").write_text(record)
    before = contents(folder)
    monkeypatch.setattr(artifacts, "PATIENCE_S", 0.5)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *flags, how])
    with (folder / artifacts.LOCK).open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert program.main() == 2
    assert f"--output_dir={folder}: another run still writes there" in capsys.readouterr().err
    assert contents(folder) == before
    assert program.main() == 0


@pytest.mark.parametrize("error", [LostError("rank 0 lost another process at step 3"), BackendError("out of memory")])
def test_record_when_a_run_ends_with_5_then_says_whether_the_same_command_may_pass(
    error: BackendError, tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(*_: object) -> None:
        raise error

    monkeypatch.setattr(trainer, "train", ends)
    monkeypatch.setattr(sys, "argv", ["finetune.py", *words(quick(data_path=rows, output_dir=tmp_path / "run"))])
    assert program.main() == 5
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert (record["status"], record["reason"], record["may_pass"]) == ("failed", str(error), isinstance(error, LostError))
