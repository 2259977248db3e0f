"""What the tests share: the shipped model and rows, a machine made of numbers, and finetune.py as a user starts it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from surefoot.inputs import Inputs, RunFolder
from surefoot.machine import Gpu, Machine

ROOT = Path(__file__).parent.parent
SMALL_MODEL = ROOT / "examples/small_model"
TRAIN_ROWS = ROOT / "examples/data/commonsense_train.jsonl"
HELDOUT_ROWS = ROOT / "examples/data/commonsense_heldout.jsonl"

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub: a test that asks the Hub is wrong
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")  # CPU unless the gpu tests are asked for
CACHE = tempfile.TemporaryDirectory(prefix="surefoot-tests-")  # tests neither read nor fill the user's cache
os.environ["SUREFOOT_CACHE"] = CACHE.name

H200 = Gpu(name="NVIDIA H200", memory_gib=139.8, capability=(9, 0))
T4 = Gpu(name="Tesla T4", memory_gib=15.0, capability=(7, 5))
VERSIONS = {"torch": "2.13.0", "transformers": "5.17.0", "peft": "0.21.2", "bitsandbytes": "0.50.2", "tensorboard": "2.21.0"}


def machine(**changes: object) -> Machine:
    """A CPU machine of one process, with what a test changes."""
    values: dict[str, object] = {
        "hostname": "test", "python": "3.11", "cpu_count": 2, "memory_gib": 24.0, "gpus": (), "versions": VERSIONS,
    }  # fmt: skip
    return Machine(**{**values, **changes})  # type: ignore[arg-type]


def inputs(**changes: object) -> Inputs:
    """Paths that hold no surprise, with what a test changes."""
    values: dict[str, object] = {
        "model_path": "org/model", "model_config": None, "weights_dtypes": (), "run_folder": RunFolder(status="absent"), "resume_stamp": None, "problems": (),
    }  # fmt: skip
    return Inputs(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 64 shortest shipped rows."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(sorted(TRAIN_ROWS.read_text().splitlines(), key=len)[:64]) + "\n")
    return path


@pytest.fixture
def finetune(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python finetune.py` with the given words in a real process; `env` adds variables."""

    def start(*words: object, env: dict[str, str] | None = None, timeout_s: int = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "finetune.py"), *map(str, words)]
        return subprocess.run(command, cwd=tmp_path, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=timeout_s)

    return start


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VENV that counts as installed and runs this Python."""
    folder = tmp_path_factory.mktemp("venv")
    (folder / "bin").mkdir()
    python = folder / "bin/python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    (folder / ".installed").touch()
    return folder
