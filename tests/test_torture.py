"""Runs killed at random places end as if they had not been: `python -m tests.torture` in small (more kills: its --kills and --cells)."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from surefoot import support
from tests.conftest import ROOT
from tests.torture.cells import BF16_CELLS, CELLS, ENGINE_CELLS, Cell

RESUMED = "tests/test_torture.py::test_cell_when_killed_at_random_places_then_goes_on_bitwise"


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
    assert kills(tortured("--kills=4", "--seed=0", f"--folder={tmp_path}", "--cells", "dora-ddp", timeout_s=600)) >= 4


def in_matrix(cell: Cell) -> support.Cell:
    """The tortured cell's place in the support matrix."""
    engine, flags = cell.name.partition("-")[2], cell.flags
    return support.Cell(flags["adapter_name"], "nf4" if "load_4bit" in flags else "none", engine, False, "packing" in flags)


@pytest.mark.slow
@pytest.mark.parametrize("cell", support.cells_of(RESUMED), ids=str)
def test_cell_when_killed_at_random_places_then_goes_on_bitwise(cell: support.Cell, tmp_path: Path) -> None:
    (name,) = [one.name for one in (*CELLS, *ENGINE_CELLS) if in_matrix(one) == cell]
    assert kills(tortured("--kills=3", "--seed=1", f"--folder={tmp_path}", "--cells", name, timeout_s=900)) >= 3


@pytest.mark.slow
def test_bf16_cells_when_killed_at_random_places_then_end_bitwise_as_if_not(tmp_path: Path) -> None:
    cells = [cell.name for cell in BF16_CELLS]
    assert kills(tortured("--seed=1", f"--folder={tmp_path}", f"--kills={len(cells)}", "--cells", *cells, timeout_s=2400)) >= len(cells)
