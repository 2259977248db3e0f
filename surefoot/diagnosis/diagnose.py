"""The stability diagnostic: a few real steps of a training command in a process of its own, judged; or the same steps under two stages."""

from __future__ import annotations

import dataclasses
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from surefoot.config import FLAGS, Config, canonical
from surefoot.diagnosis import stability
from surefoot.diagnosis.short_run import Run, Setup, Trial, start, words_of
from surefoot.diagnosis.stability import Agreement, Check
from surefoot.errors import NumericsError, PlanError, UsageError, joined
from surefoot.stages import STAGES, Stage

COMPARED_STEPS = 100
STAGE_FLAGS = tuple(field.name for field in dataclasses.fields(Stage) if field.name in FLAGS)  # what --stage sets and a flag overrides


class Report(NamedTuple):
    """What the diagnostic found: one run, or two and their agreement. advice is what to do next, in order."""

    runs: tuple[Run, ...]
    checks: tuple[Check, ...]
    agreement: Agreement | None
    advice: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """The failed child's own, else 4 where a check failed."""
        codes = [run.exit_code for run in self.runs if run.exit_code]
        return codes[0] if codes else 0 if stability.passed(self.checks) else NumericsError.exit_code


def check_flags(config: Config, *, compares: bool, keep: Path | None) -> None:
    """Raises UsageError for flags of the command under which there is nothing to judge or to compare."""
    problems = []
    if config.dry_run:
        problems.append("--dry_run trains nothing, so there is nothing to judge. Drop it")
    if compares:
        problems += [
            f"--{name}={getattr(config, name)} ({config.source(name)}) overrides what --compare_stages compares. Drop it"
            for name in STAGE_FLAGS
            if config.given(name) and getattr(config, name) is not None
        ]
    if keep is not None and keep.exists() and (not keep.is_dir() or any(keep.iterdir())):
        problems.append(f"--keep={keep} exists and is not empty. Give another folder")
    if keep is not None and keep.resolve() == Path(config.output_dir).resolve():
        problems.append(f"--keep={keep} is the command's own --output_dir, which this test leaves alone. Give another folder")
    if problems:
        raise UsageError(joined(problems))


def judge(run: Run) -> tuple[Check, ...]:
    """The migration guide's checks: ended well, losses and gradient norms finite and in their bands, loss falling."""
    count = f"after {len(run.steps)} of {run.asked_steps} steps"
    is_good = run.exit_code == 0 and len(run.steps) == run.asked_steps
    message = f": {run.message}" if run.message else ""
    ended = Check("exit", "ok" if is_good else "FAIL", f"finetune.py ended with {run.exit_code} {count}{message}")
    if run.exit_code and not run.steps:
        return (ended,)
    scales = run.setup is not None and run.setup.precision == "fp16"
    losses = [step.loss for step in run.steps]
    return ended, stability.loss(run.steps), stability.grad_norm(run.steps, scales=scales), stability.falling(losses)


def diagnose(trial: Trial) -> Report:
    """Runs the command's steps once and judges them."""
    run = start(trial, "run")
    checks = judge(run)
    return Report((run,), checks, None, next_stage(trial, run) if stability.passed(checks) else ways_back(trial, run, checks))


def _setup(run: Run) -> Setup:
    """Of a run that ended with 0, which therefore opened its folder."""
    assert run.setup is not None
    return run.setup


def next_stage(trial: Trial, run: Run) -> tuple[str, ...]:
    """What a healthy run leads to: the stage after the one that really ran."""
    setup = _setup(run)
    wanted = trial.config.attn_implementation or STAGES[trial.config.stage].attn_implementation
    if setup.attn_implementation == "eager" != wanted:
        return (f"{wanted} was asked for and {setup} ran ({setup.reason}): there is no faster stage to test until that changes",)
    ran = setup.stage or 1
    if ran == 3:
        return ("nothing is left to test: stage 3 is the last one. Train with the flags as they are",)
    from_file = {name: "none" for name in STAGE_FLAGS if trial.config.given(name) and trial.config.source(name) != "flag"}
    bare = {name: value for name, value in trial.flags.items() if canonical(name) not in (*STAGE_FLAGS, "stage")} | from_file
    command = shlex.join(["python", "scripts/diagnose.py", *words_of(bare)])
    return (
        f"use --stage={ran + 1}: {command} --stage={ran + 1}",
        f"then hold it against stage {ran} over {COMPARED_STEPS} steps: {command} --compare_stages={ran},{ran + 1}",
    )


def ways_back(trial: Trial, run: Run, checks: Sequence[Check]) -> tuple[str, ...]:
    """What to try after a failed check, in the migration guide's order; empty where finetune.py's message names the way out itself."""
    s = run.setup
    if s is None or run.exit_code not in (0, NumericsError.exit_code):
        return ()
    losses = [step.loss for step in run.steps]
    if [check.name for check in checks if check.status == "FAIL"] == ["falling"] and not stability.is_rising(losses):
        return (f"--steps={5 * run.asked_steps}, to see more than the batches' noise", f"--learning_rate={10 * s.learning_rate:g}")
    ways = [] if s.stage == 1 else ["--stage=1 (eager attention, no compile), without the flags that override it"]
    ways += ["--disable_flash_sdpa=True"] if s.reads_sdpa_flags and "flash" in s.sdpa_kernels else []
    ways += ["--bf16=False --fp16=True"] if s.precision == "bf16" and s.gpu else []
    ways.append(f"--learning_rate={min(s.learning_rate / 10, Config.learning_rate):g}")
    if not trial.is_kept and not all(map(math.isfinite, losses)):
        ways.append("--keep=FOLDER for scripts/replay_batch.py: this run's folder was temporary, and its bad steps went with it")
    return tuple(ways)


def compare(trial: Trial, stages: tuple[int, int], band: float) -> Report:
    """Runs the same steps under both stages and holds the loss curves against each other; a stage that is not healthy ends it.

    Raises:
        PlanError: both stages came to the same settings, so that their agreement would say nothing.
    """
    runs: list[Run] = []
    checks: list[Check] = []
    packs = (
        trial.config.packing is True or trial.config.pack_len is not None
    )  # auto depends on the stage, and both must see the same batches
    for stage in stages:
        runs.append(start(trial, f"stage{stage}", stage=stage, packing=packs))
        found = [check for check in judge(runs[-1]) if check.name != "falling"]  # not asked here
        checks += [check._replace(name=f"stage {stage} {check.name}") for check in found]
        if not stability.passed(found):
            return Report(tuple(runs), tuple(checks), None, ways_back(trial, runs[-1], found))
    one, other = (_setup(run) for run in runs)
    if str(one) == str(other):
        why = f" ({other.reason})" if other.reason else ""
        raise PlanError(f"--compare_stages={stages[0]},{stages[1]} compares nothing here: both ran {other}{why}. Compare other stages")
    agreement = stability.agreement(runs[0].steps, runs[1].steps, band)
    checks.append(Check("agreement", "ok" if agreement.agrees else "FAIL", agreement.reason))
    return Report(tuple(runs), tuple(checks), agreement, verdict(stages, (one, other), agreement))


def verdict(stages: tuple[int, int], setups: tuple[Setup, Setup], found: Agreement) -> tuple[str, ...]:
    """Which of two compared stages to train with."""
    a, b = stages
    if found.agrees:
        pace = f"{found.speed:.2f} times as fast"
        if found.speed > 1:
            return (f"use --stage={b}: it agrees with stage {a} and is {pace}",)
        return (f"stay with --stage={a}: stage {b} agrees and is {pace}",)
    ways = [f"stay with --stage={min(stages)}"]
    if setups[0].enable_torch_compile != setups[1].enable_torch_compile and setups[0].lora_dropout > 0:
        ways.append("compare with --lora_dropout=0: compiled layers draw other dropout masks than plain ones, which is no fault of either")
    return tuple(ways)
