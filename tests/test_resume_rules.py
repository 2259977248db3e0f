"""Decisions about stopping and going on: which checkpoint, what is due at a step's end, what the launcher answers."""

from __future__ import annotations

import signal
from types import SimpleNamespace

import pytest

from surefoot.config import Config
from surefoot.errors import PlanError
from surefoot.inputs import RunFolder
from surefoot.launcher import exit_code
from surefoot.plan import Plan, make_plan
from surefoot.training.schedule import Schedule
from tests.conftest import inputs, machine


def plan(folder: RunFolder, **flags: object) -> Plan:
    return make_plan(Config.parse({"base_model": "org/model", **flags}), machine(), inputs(run_folder=folder))


def test_resume_when_newer_checkpoints_are_damaged_then_says_which_it_passes_over() -> None:
    folder = RunFolder(status="unfinished", checkpoints=("o/checkpoint-5",), skipped=("o/checkpoint-10: optimizer.pt is missing",))
    made = plan(folder, resume_from_checkpoint="auto")
    assert made.output.resume_from == "o/checkpoint-5"
    assert "passed over o/checkpoint-10: optimizer.pt is missing" in made.notes


def test_resume_when_no_checkpoint_is_whole_then_refuses_to_begin_anew() -> None:
    folder = RunFolder(status="unfinished", skipped=("o/checkpoint-10: optimizer.pt is missing",))
    with pytest.raises(PlanError, match=r"no checkpoint in \./output is whole .*optimizer\.pt is missing"):
        plan(folder, resume=True)


def test_resume_when_the_run_is_finished_then_has_nothing_to_do_unless_it_is_made_longer() -> None:
    folder = RunFolder(status="finished", checkpoints=("o/checkpoint-5",), length=(5, 3.0))
    assert plan(folder, resume=True, max_steps=5).output.is_finished
    with pytest.raises(PlanError, match="--resume_from_checkpoint=o/checkpoint-5"):
        plan(folder, resume=True, max_steps=9)


@pytest.mark.parametrize(
    ("codes", "was_asked", "says"),
    [
        ([75, 75], False, 75), ([-signal.SIGTERM, 75], False, 75), ([2], False, 2), ([-signal.SIGKILL, 5], False, 137), ([5, -9], False, 5),
        ([-signal.SIGKILL], True, 75), ([5], True, 5),
    ],
)  # fmt: skip
def test_launcher_when_processes_fail_then_answers_with_the_runs_own_code(codes: list[int], was_asked: bool, says: int) -> None:
    assert exit_code(codes, was_asked=was_asked) == says


@pytest.mark.parametrize(
    ("strategy", "every", "due"),
    [("steps", 3, [3, 6, 8]), ("epoch", 100, [5, 8]), ("no", 1, [])],
)
def test_save_when_steps_end_then_is_due_by_its_strategy_and_at_the_last(strategy: str, every: int, due: list[int]) -> None:
    """Five steps an epoch, eight in all."""
    found = []
    for step in range(1, 9):
        control = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False, should_training_stop=False)
        args = SimpleNamespace(logging_steps=4, eval_strategy="no", eval_steps=1, save_strategy=strategy, save_steps=every)
        Schedule().on_step_end(args, SimpleNamespace(global_step=step, max_steps=8, epoch=step / 5), control)
        found += [step] * control.should_save
        assert control.should_log is (step in (1, 4, 8))
        assert control.should_training_stop is (step == 8)
    assert found == due
