"""What the tests with real engines share: a short run of the small model on two CPU processes, what it leaves, and waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from tests.conftest import SMALL_MODEL, TRAIN_ROWS
from tests.runs import QUICK, logs, tensors, words

STEPS = 40


def flags(folder: Path, **changes: object) -> list[str]:
    """finetune.py's flags for STEPS steps into `folder`."""
    values = {**QUICK, "max_steps": STEPS, "eval_step": 1000, "save_step": 1000, "output_dir": folder, "adapter_name": "dora", **changes}
    return words({"base_model": SMALL_MODEL, "data_path": TRAIN_ROWS, **values})


def steps_done(folder: Path) -> int:
    return len(logs(folder, "loss")) if (folder / "metrics.jsonl").exists() else 0


def wait_for(what: Callable[[], object], why: str, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < end, f"not within {timeout_s:.0f} s: {why}"
        time.sleep(0.2)


def assert_same_run(resumed: Path, undisturbed: Path) -> None:
    """The run that was stopped and went on has the losses and the tensors of the one that was left alone, to the bit."""
    assert logs(resumed, "loss") == logs(undisturbed, "loss")
    ours, theirs = tensors(resumed), tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
