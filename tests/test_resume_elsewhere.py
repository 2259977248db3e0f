"""A checkpoint under another number of processes or another engine, or whose files hold code: refused by all processes alike."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from surefoot import checkpoint
from tests.conftest import ROOT
from tests.runs import quick, words
from tests.test_engines import NAMES, launch, why

MOVES = [
    ("ddp", "single"), ("single", "ddp"), ("zero2", "single"), ("single", "zero2"), ("zero3", "single"), ("fsdp2", "single"), ("single", "fsdp2"),
    ("ddp", "zero2"), ("zero2", "ddp"), ("zero2", "zero3"), ("fsdp2", "ddp"), ("ddp", "fsdp2"),
]  # fmt: skip
SLOW = [pytest.param(*move, marks=pytest.mark.slow) for move in MOVES[2:]]


def start(engine: str, flags: dict[str, object]) -> subprocess.CompletedProcess[str]:
    """finetune.py as one process, or two of an engine."""
    if engine != "single":
        return launch(NAMES.get(engine, engine), words(flags))
    line = [sys.executable, str(ROOT / "finetune.py"), *words(flags)]
    return subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="session")
def trained(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, object]]:
    """The flags of a run that an engine has made, once, with a checkpoint of step 1."""
    made: dict[str, dict[str, object]] = {}

    def of(engine: str) -> dict[str, object]:
        if engine not in made:
            flags = quick(
                data_path=rows, output_dir=tmp_path_factory.mktemp(engine) / "run", adapter_name="lora", max_steps=2, save_step=1,
                val_set_size=0, per_device_train_batch_size=2,
            )  # fmt: skip
            done = start(engine, flags)
            assert done.returncode == 0, why(done)
            made[engine] = flags
        return made[engine]

    return of


@pytest.mark.parametrize(("before", "now"), [*MOVES[:2], *SLOW])
def test_resume_when_processes_or_engine_changed_then_is_refused_with_the_launcher_that_fits(
    before: str, now: str, trained: Callable[[str], dict[str, object]]
) -> None:
    flags = trained(before)
    done = start(now, {**flags, "resume_from_checkpoint": f"{flags['output_dir']}/checkpoint-1"})
    codes = [str(done.returncode)] if now == "single" else re.findall(r"exitcode +: (-?\d+)", done.stderr)
    assert codes == ["2"] * (1 if now == "single" else 2), done.stderr[-3000:]
    assert done.stderr.count("cannot continue") == 1
    assert f"engine {before} -> {now}" in done.stderr
    right = "under python;" if before == "single" else f"profiles/{NAMES.get(before, before)}.yaml --num_processes 2"
    assert right in done.stderr


class Touch:
    """What a pickle that runs code looks like: opening it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_resume_when_an_engines_file_holds_code_then_is_refused_and_not_run(
    engine: str, trained: Callable[[str], dict[str, object]], tmp_path: Path
) -> None:
    flags = trained(engine)
    good = Path(str(flags["output_dir"])) / "checkpoint-1"
    evil = shutil.copytree(good, tmp_path / f"checkpoint-1{checkpoint.PARTIAL}")
    (file,) = evil.glob("optimizer.bin" if engine == "fsdp2" else "*/*rank_0_*optim_states.pt")
    torch.save({"state": Touch(tmp_path / "made")}, file)
    checkpoint.publish(evil, tmp_path / "checkpoint-1", {"cursor": checkpoint.read_manifest(good)["cursor"]})
    done = start(engine, {**flags, "output_dir": tmp_path / "run", "resume_from_checkpoint": tmp_path / "checkpoint-1"})
    assert not (tmp_path / "made").exists()
    assert re.findall(r"exitcode +: (-?\d+)", done.stderr) == ["5", "5"], done.stderr[-3000:]
    assert done.stderr.count("checkpoint-1: a file holds more than tensors and numbers") == 1
