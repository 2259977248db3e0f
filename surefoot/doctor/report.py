"""The doctor's report: all checks of this machine, for people and as JSON, and the exit code."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

from surefoot import machine
from surefoot.doctor import backends, fitness, gpus, host, known_bad, libraries, packages, stack
from surefoot.doctor.check import VERDICTS, Check
from surefoot.doctor.stack import Stack
from surefoot.machine import Machine
from surefoot.verdicts import Verdict

NOT_FIT = 5
Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    machine: Machine
    checks: tuple[Check, ...]
    attention: tuple[Verdict, ...]

    @property
    def stage(self) -> int:
        """The highest stage that the machine is fit for, 0: not fit to train."""
        return fitness.stage(self.checks)

    @property
    def exit_code(self) -> int:
        return 0 if self.stage else NOT_FIT


def examine(
    output_dir: str,
    attention_rows: Callable[[Machine, Stack, Say], Sequence[Verdict]] = lambda *_: (),
    say: Say = lambda _: None,
) -> Report:
    """Every check of this machine.

    Args:
        attention_rows: the attention canary's verdicts, asked only where torch sees a GPU.
        say: gets a line before what takes seconds.
    """
    environment = os.environ
    smi = gpus.ask_smi()  # first: the processes below hold GPU memory themselves
    say("loading torch and its libraries in a process of their own")
    found = stack.load()
    if found.problem:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # probe() would import the torch that ended its process
    here = machine.probe()
    say("asking each backend in a process of its own")
    can_run = list(backends.checks(found))
    compiling = backends.compiling(found, environment)
    rows = tuple(attention_rows(here, found, say)) if found.gpus else ()
    checks = [
        *gpus.checks(smi, found, gpus.driver_version(smi, here.driver), environment),
        *libraries.checks(found, environment, packages.pip_line("torch")),
        *packages.checks(),
        *known_bad.checks(_versions(here, found), {capability[0] for _, capability in found.gpus}),
        *can_run,
        compiling,
        *host.checks(output_dir, here.cache_dir, environment),
        *fitness.attention_checks(rows),
    ]
    checks += fitness.stage_checks(found, rows, compiling) if not found.problem else ()
    return Report(machine=here, checks=tuple(checks), attention=rows)


def _versions(here: Machine, found: Stack) -> dict[str, str]:
    """Installed packages, and cuDNN as loaded."""
    cudnn = found.library("cudnn")
    return {**here.versions, **({"cudnn": cudnn.version} if cudnn and cudnn.version else {})}


def text(report: Report) -> str:
    """The checks by topic, then the verdict in one line."""
    width = max(len(check.name) for check in report.checks)
    lines = [f"{report.machine.hostname}: Python {report.machine.python}, {report.machine.cpu_count} cores of {report.machine.cpu_name}"]
    for topic, group in groupby(report.checks, key=lambda check: check.topic):
        lines += ["", topic]
        for check in group:
            lines.append(f"  {check.verdict:<7} {check.name:<{width}}  {check.fact}")
            if check.way_out:
                lines.append(f"  {'':<7} {'':<{width}}  > {check.way_out}")
    return "\n".join([*lines, "", summary(report)])


def summary(report: Report) -> str:
    """Fit or not, at which stage, with which backends."""
    counts = {verdict: [check for check in report.checks if check.verdict == verdict] for verdict in VERDICTS}
    warnings = f"{len(counts['warn'])} warning{'' if len(counts['warn']) == 1 else 's'}"
    if counts["bad"]:
        names = ", ".join(dict.fromkeys(check.name for check in counts["bad"]))
        return f"not fit to train: {names} ({len(counts['bad'])} bad, {warnings})"
    can_run = [name for name, runs in backends.runs(report.checks).items() if runs]
    return f"fit for stage {report.stage} on a {'GPU' if report.machine.gpus else 'CPU'}; runs: {', '.join(can_run)} ({warnings})"


def record(report: Report) -> dict[str, Any]:
    """The report for programs."""
    return {
        "fit": report.exit_code == 0,
        "stage": report.stage,
        "summary": summary(report),
        "backends": backends.runs(report.checks),
        "checks": [check._asdict() for check in report.checks],
        "attention": [dataclasses.asdict(row) for row in report.attention],
        "machine": dataclasses.asdict(report.machine),
    }
