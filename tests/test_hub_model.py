"""A base model named by its id: taken from the Hub's cache as a user without network has it, and its commit is kept."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SMALL_MODEL
from tests.runs import quick, words

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """The Hub's cache with one model, team/small, in two commits, of which main is the first."""
    model = tmp_path / "hub/models--team--small"
    for commit in (FIRST, SECOND):
        (model / "snapshots" / commit).mkdir(parents=True)
        for file in SMALL_MODEL.iterdir():
            (model / "snapshots" / commit / file.name).symlink_to(file)
    (model / "refs").mkdir()
    (model / "refs/main").write_text(FIRST)
    return model


def test_model_of_the_hub_when_its_main_branch_moves_then_the_run_goes_on_from_its_own_commit_only(
    cache: Path, rows: Path, tmp_path: Path, finetune: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    env = {"HF_HUB_CACHE": str(cache.parent)}
    flags = words({**quick(max_steps=4, save_step=2, eval_step=2), "base_model": "team/small", "data_path": rows, "output_dir": "run"})
    done = finetune(*flags, env=env)
    assert done.returncode == 0, done.stderr
    stamp = json.loads((tmp_path / "run/backend.json").read_text())
    assert (stamp["base_model"], stamp["revision"]) == ("team/small", FIRST)
    (cache / "refs/main").write_text(SECOND)
    again = [*flags, "--resume_from_checkpoint=run/checkpoint-2", "--output_dir=run2"]
    refused = finetune(*again, env=env)
    assert refused.returncode == 2
    assert f"revision {FIRST} -> {SECOND}" in refused.stderr
    assert f"run this command with --revision={FIRST}" in refused.stderr
    assert finetune(*again, f"--revision={FIRST}", env=env).returncode == 0
