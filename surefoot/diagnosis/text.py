"""The diagnostic's report for people (tables, one line a check, what to do next) and for programs (JSON)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from surefoot.diagnosis import stability
from surefoot.diagnosis.diagnose import Report
from surefoot.diagnosis.short_run import Run, Trial, words_of
from surefoot.diagnosis.stability import Agreement, Step


def heading(trial: Trial, stages: Sequence[int]) -> str:
    """What will run, and which flags it sets over the command's own."""
    what = f"under stages {' and '.join(map(str, stages))}, each" if stages else "of this command"
    changed = " ".join(words_of(trial.changes()))
    return f"{trial.steps} steps {what} in a process of its own. Set for the test: {changed}; everything else as given"


def text(report: Report, stages: Sequence[int]) -> str:
    """The whole report."""
    names = [f"stage {stage}" for stage in stages] or ["ran"]
    lines = [f"{name}: {run.setup}" for name, run in zip(names, report.runs, strict=False) if run.setup]
    lines += _curves(report, stages) if report.agreement else [line for run in report.runs for line in _steps(run)]
    widest = max(len(check.name) for check in report.checks)
    lines += ["", *(f"{check.status:<4}  {check.name:<{widest}}  {check.detail}" for check in report.checks)]
    if report.agreement:
        lines += _facts(report, report.agreement, stages)
    return "\n".join([*lines, *_advice(report)])


def _steps(run: Run) -> list[str]:
    if not run.steps:
        return []
    head = f"\n{'step':>4}  {'loss':>9}  {'grad_norm':>9}  {'tokens/s':>9}  {'peak GiB':>8}"
    return [head, *(f"{s.step:>4}  {s.loss:>9.4f}  {s.grad_norm:>9.3g}  {_count(s)}  {s.peak_memory_gib:>8.1f}" for s in run.steps)]


def _count(step: Step) -> str:
    return f"{step.tokens_per_s:>9,.0f}"


def _curves(report: Report, stages: Sequence[int]) -> list[str]:
    assert report.agreement is not None
    a, b = stages
    columns = (f"loss {a}", f"loss {b}", "differ by", f"norm {a}", f"norm {b}", f"tok/s {a}", f"tok/s {b}")
    lines = ["\nstep  " + "  ".join(f"{column:>9}" for column in columns)]
    for one, other, by in zip(report.runs[0].steps, report.runs[1].steps, report.agreement.differences, strict=False):
        losses = f"{one.loss:>9.4f}  {other.loss:>9.4f}  {by:>9.2g}"
        lines.append(f"{one.step:>4}  {losses}  {one.grad_norm:>9.3g}  {other.grad_norm:>9.3g}  {_count(one)}  {_count(other)}")
    return lines


def _facts(report: Report, found: Agreement, stages: Sequence[int]) -> list[str]:
    early, late = found.halves
    rates = [stability.speed(run.steps) for run in report.runs]
    return [
        f"\nlosses differ by {found.mean:.2g} in the mean ({early:.2g} in the first half, {late:.2g} in the second), "
        f"by {found.largest:.2g} at most (step {found.largest_at})",
        f"gradient norms differ by a factor of {math.exp(found.grad_norm):.3g} at most",
        f"median tokens/s without the first step: {rates[0]:,.0f} and {rates[1]:,.0f}; "
        f"stage {stages[1]} is {found.speed:.2f} times as fast as stage {stages[0]} on the same batches",
    ]


def _advice(report: Report) -> list[str]:
    if report.exit_code == 0:
        return ["", *(f"next: {line}" if number == 0 else line for number, line in enumerate(report.advice))]
    if not report.advice:
        return []
    return ["", "ways back, in this order:", *(f"  {number}. {line}" for number, line in enumerate(report.advice, 1))]


def record(report: Report, trial: Trial, stages: Sequence[int]) -> dict[str, Any]:
    """The report as plain values; a number that is not finite becomes text (nan, inf), which JSON has no word for."""
    runs = [{**run._asdict(), "steps": [step._asdict() for step in run.steps]} for run in report.runs]
    for entry, run in zip(runs, report.runs, strict=True):
        entry["setup"] = {**run.setup._asdict(), "stage": run.setup.stage} if run.setup else None
    found: dict[str, Any] = {
        "exit_code": report.exit_code,
        "stages": list(stages) or None,
        "set_for_the_test": trial.changes(),
        "runs": runs,
        "checks": [check._asdict() for check in report.checks],
        "agreement": report.agreement._asdict() if report.agreement else None,
        "tokens_per_s": [stability.speed(run.steps) for run in report.runs],
        "advice": list(report.advice),
    }
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
