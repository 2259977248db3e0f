"""Runs killed at random places end as if they had not been: `python -m tests.torture` in small (more kills: its --kills and --cells)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def tortured(*words: str, timeout_s: int) -> str:
    command = [sys.executable, "-m", "tests.torture", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert ", 0 mismatches" in done.stdout
    return done.stdout


def kills(said: str) -> int:
    found = re.search(r"cells, (\d+) kills", said)
    return int(found[1]) if found else 0


def test_runs_when_killed_at_random_places_then_end_bitwise_as_if_not(tmp_path: Path) -> None:
    assert kills(tortured("--kills=4", "--seed=0", f"--folder={tmp_path}", "--cells", "dora-ddp", timeout_s=200)) >= 4


@pytest.mark.slow
@pytest.mark.parametrize("words", [("--kills=20",), ("--kills=4", "--cells", "dora-single-bf16", "qlora-single-bf16", "lora-ddp-bf16")])
def test_every_cell_when_killed_at_random_places_then_ends_bitwise_as_if_not(tmp_path: Path, words: tuple[str, ...]) -> None:
    assert kills(tortured("--seed=1", f"--folder={tmp_path}", *words, timeout_s=900)) >= 4
