"""Which stage the machine is fit for. The gate is the attention canary; the version floors are facts beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from surefoot.doctor.check import Check
from surefoot.doctor.stack import Stack
from surefoot.stages import STAGES
from surefoot.verdicts import Verdict

ATTENTION = "attention canary"
TOPIC = "stages"
FAST = ("flash_attention_2", "sdpa_cudnn", "sdpa_flash", "sdpa_efficient")


def attention_checks(rows: Sequence[Verdict]) -> Iterator[Check]:
    """The canary's table. Eager attention that fails leaves nothing to train with; another that fails is not used."""
    for row in rows:
        name = f"{row.backend}, {row.mask}"
        if row.state == "pass":
            speed = f", {row.milliseconds:.2f} ms" if row.milliseconds is not None else ""
            yield Check(ATTENTION, name, "ok", f"error {row.error or 0.0:.1e} against fp64{speed}")
        elif row.state == "fail":
            severe = row.backend == "eager" and row.mask == "causal"
            yield Check(ATTENTION, name, "bad" if severe else "warn", f"fails: {row.reason}", "" if severe else "The plan does not use it")
        else:
            yield Check(ATTENTION, name, "unknown", f"not available: {row.reason}")


def stage_checks(stack: Stack, rows: Sequence[Verdict], compiling: Check) -> tuple[Check, ...]:
    """One a stage, from the first on."""
    where = f"on {stack.gpus[0][0]}" if stack.gpus else "on a CPU"
    first = Check(TOPIC, "stage 1", "ok", f"fit {where}: {STAGES[1].attn_implementation} attention, no compile", usable=True)
    second = _second(stack, rows)
    return first, second, _third(second, compiling)


def _second(stack: Stack, rows: Sequence[Verdict]) -> Check:
    if not stack.gpus:
        return Check(TOPIC, "stage 2", "ok", "not for this machine: it needs a CUDA GPU", usable=False)
    floors = _floors(2, stack)
    if not rows:
        return Check(
            TOPIC, "stage 2", "unknown", f"the attention canary has not run; {floors}", "Run scripts/doctor.py on the training machine"
        )
    passed = [row.backend for row in rows if row.state == "pass" and row.mask == "causal" and row.backend in FAST]
    if not passed:
        return Check(TOPIC, "stage 2", "warn", f"not fit: no fused attention passed the canary; {floors}", "Stay at stage 1", usable=False)
    return Check(TOPIC, "stage 2", "ok", f"fit: {', '.join(passed)} passed the canary; {floors}", usable=True)


def _third(second: Check, compiling: Check) -> Check:
    if not second.usable:
        return Check(TOPIC, "stage 3", second.verdict, "not before stage 2", usable=False)
    if compiling.verdict != "ok":
        return Check(TOPIC, "stage 3", "warn", "not fit: torch.compile cannot run", compiling.way_out, usable=False)
    return Check(
        TOPIC, "stage 3", "ok", "fit", "Compare it with stage 2 on your data first: scripts/diagnose.py --compare_stages 2 3", usable=True
    )


def _floors(number: int, stack: Stack) -> str:
    stage, cudnn = STAGES[number], stack.library("cudnn")
    have = f"CUDA {stack.cuda}, cuDNN {(cudnn.version if cudnn else None) or 'not told'}"
    return f"it was set up for CUDA {stage.cuda_floor}, cuDNN {stage.cudnn_floor} or newer, and here are {have}"


def stage(checks: Sequence[Check]) -> int:
    """The highest stage that the machine is fit for; 0 when anything is bad."""
    if any(check.verdict == "bad" for check in checks):
        return 0
    fit = [int(check.name.split()[1]) for check in checks if check.topic == TOPIC and check.usable]
    return max(fit, default=0)
