"""The plan and the attention canary: what fails is not used, the ladder is stepped down, and cuDNN runs where it is right."""

from __future__ import annotations

from typing import Any

import pytest

from surefoot import plan_text
from surefoot.config import Config
from surefoot.errors import PlanError
from surefoot.plan import Plan, attention_to_check, make_plan
from surefoot.verdicts import Shape, Verdict, Verdicts
from tests.conftest import H200, VERSIONS, inputs, machine

LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}
MISTRAL = {**LLAMA, "sliding_window": 128}
SHAPE = Shape(heads=32, kv_heads=8, head_dim=128, dtype="bf16", length=256, rows=4)
GPU = machine(gpus=(H200,))
WITH_FLASH = machine(gpus=(H200,), versions={**VERSIONS, "flash-attn": "2.8.3"})
NAN = "45,056 non-finite values in the query gradient (length 704, log-sum-exp -120)"


def verdicts(**changed: tuple[str, float | None]) -> Verdicts:
    """As measured on an H200 with torch 2.11 and cuDNN 9.19; `changed` sets state and milliseconds of BACKEND__MASK."""
    measured = {
        "eager__causal": ("pass", 13.8), "eager__explicit": ("pass", 13.9), "sdpa_cudnn__causal": ("pass", 1.2), "sdpa_cudnn__explicit": ("fail", 0.0),
        "sdpa_flash__causal": ("pass", 2.3), "sdpa_flash__explicit": ("unavailable", 0.0), "sdpa_math__causal": ("pass", 27.0),
        "sdpa_math__explicit": ("pass", 28.0), "sdpa_efficient__explicit": ("pass", 8.4), "sdpa_efficient__causal": ("unavailable", 0.0),
        "flash_attention_2__causal": ("pass", 2.0), "flash_attention_2__explicit": ("pass", 2.1),
    }  # fmt: skip
    rows = []
    for name, (state, milliseconds) in {**measured, **changed}.items():
        backend, mask = name.split("__")
        reason = NAN if state == "fail" else "torch has no such kernel for this case" if state == "unavailable" else ""
        rows.append(Verdict(backend=backend, mask=mask, state=state, reason=reason, error=0.003, milliseconds=milliseconds))
    return Verdicts(shape=SHAPE, rows=tuple(rows), origin="measured", seconds=15.0)


def plan(found: Verdicts | None, *, on: Any = GPU, model: Any = LLAMA, **flags: object) -> Plan:
    config = Config.parse({"base_model": "org/model", "stage": 2, **flags})
    return make_plan(config, on, inputs(model_config=model), found)


def reason(made: Plan, name: str) -> str:
    return next(choice.reason for choice in made.choices if choice.name == name)


def test_cudnn_when_right_without_a_mask_then_runs_although_it_fails_with_one() -> None:
    made = plan(verdicts())
    assert made.model.attn_implementation == "sdpa"
    assert made.process.sdpa_kernels == ("cudnn", "flash", "efficient", "math")
    assert reason(made, "disable_cudnn_sdpa").startswith("canary: right, and 1.92 times as fast as flash")


def test_cudnn_when_the_model_has_short_windows_then_meets_masks_and_stays_off() -> None:
    made = plan(verdicts(), model=MISTRAL)
    assert made.process.sdpa_kernels == ("flash", "efficient", "math")
    assert reason(made, "disable_cudnn_sdpa") == f"canary: explicit: {NAN}"


def test_cudnn_when_slower_than_flash_then_stays_off() -> None:
    made = plan(verdicts(sdpa_cudnn__causal=("pass", 4.6)))
    assert "cudnn" not in made.process.sdpa_kernels
    assert reason(made, "disable_cudnn_sdpa") == "canary: right, but takes 2.00 times flash's time"


@pytest.mark.parametrize(
    ("found", "kernels"), [(None, ("flash", "efficient", "math")), (verdicts(), ("cudnn", "flash", "efficient", "math"))]
)
def test_stage_2_when_checked_or_not_then_trusts_cudnn_only_when_checked(found: Verdicts | None, kernels: tuple[str, ...]) -> None:
    assert plan(found).process.sdpa_kernels == kernels


def test_cudnn_when_asked_for_but_failing_then_is_not_used_and_the_plan_says_why() -> None:
    made = plan(verdicts(sdpa_cudnn__causal=("fail", 0.0)), disable_cudnn_sdpa=False)
    assert "cudnn" not in made.process.sdpa_kernels
    assert any(note.startswith("--disable_cudnn_sdpa=False is not followed") and NAN in note for note in made.notes)


def test_flash_attention_2_when_failing_then_steps_down_to_sdpa_with_the_reason() -> None:
    made = plan(verdicts(flash_attention_2__causal=("fail", 0.0)), on=WITH_FLASH)
    assert made.model.attn_implementation == "sdpa"
    assert reason(made, "attn_implementation") == f"flash_attention_2 failed the canary (causal: {NAN})"
    asked = plan(verdicts(flash_attention_2__causal=("fail", 0.0)), on=WITH_FLASH, attn_implementation="flash_attention_2")
    assert asked.model.attn_implementation == "sdpa"
    assert any("--attn_implementation=flash_attention_2 is not used" in note for note in asked.notes)


def test_plan_when_printed_then_says_what_the_canary_found_and_keeps_it() -> None:
    made = plan(verdicts(sdpa_math__causal=("pass", None)))
    line = next(line for line in plan_text.table(made, all_rows=False).splitlines() if line.startswith("attention canary"))
    assert f"sdpa_cudnn causal 0.003 in 1.2 ms; sdpa_cudnn explicit FAILED ({NAN})" in line
    assert "sdpa_math causal 0.003;" in line
    assert plan_text.as_record(made)["attention"]["rows"][2]["backend"] == "sdpa_cudnn"


def test_flash_attention_2_when_passing_then_is_used() -> None:
    assert plan(verdicts(), on=WITH_FLASH).model.attn_implementation == "flash_attention_2"


def test_sdpa_when_one_kernel_fails_then_only_that_kernel_is_off() -> None:
    made = plan(verdicts(sdpa_flash__causal=("fail", 0.0)))
    assert made.model.attn_implementation == "sdpa"
    assert made.process.sdpa_kernels == ("cudnn", "efficient", "math")


def test_ladder_when_every_kernel_of_sdpa_fails_then_ends_at_eager_and_without_it_refuses() -> None:
    broken = {f"sdpa_{kernel}__causal": ("fail", 0.0) for kernel in ("cudnn", "flash", "efficient", "math")}
    assert plan(verdicts(**broken)).model.attn_implementation == "eager"
    with pytest.raises(PlanError, match="no attention gives right gradients on this machine"):
        plan(verdicts(**broken, eager__causal=("fail", 0.0)))


@pytest.mark.parametrize(
    ("on", "model", "flags", "asks"),
    [
        (GPU, LLAMA, {}, True), (GPU, LLAMA, {"stage": 1}, False), (GPU, LLAMA, {"stage": 1, "attn_implementation": "sdpa"}, True),
        (machine(), LLAMA, {}, False), (GPU, None, {}, False), (GPU, {"text_config": LLAMA}, {}, True),
    ],
)  # fmt: skip
def test_canary_when_only_eager_or_no_gpu_is_in_question_then_is_not_asked(on: Any, model: Any, flags: dict[str, Any], asks: bool) -> None:
    config = Config.parse({"base_model": "org/model", "stage": 2, **flags})
    shape = attention_to_check(config, on, inputs(model_config=model))
    assert (shape is not None) is asks
    assert shape in (None, SHAPE)
