"""What the diagnostic concludes from finished runs: exit code, next stage, way back, verdict; and how it rewrites a command's flags."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path

import pytest

from surefoot.cli import parse
from surefoot.diagnosis import diagnose, short_run, stability, text
from surefoot.diagnosis.short_run import Run, Setup, flags_of, replaced, words_of
from surefoot.errors import PlanError, UsageError
from tests.test_stability import steps

KERNELS = ("flash", "efficient", "math")
ON_CPU = Setup("eager", False, KERNELS, "fp32", 3e-4, 0.0, None, "")
ON_GPU = Setup("sdpa", False, KERNELS, "bf16", 3e-4, 0.0, "NVIDIA H200", "")


def run(losses: list[float], setup: Setup, exit_code: int = 0) -> Run:
    return Run(exit_code, "", len(losses), steps(losses), setup)


@pytest.mark.parametrize(
    ("setup", "ways"),
    [
        (ON_CPU, ["--learning_rate=3e-05"]),
        (ON_GPU, ["--stage=1 (", "--disable_flash_sdpa=True", "--bf16=False --fp16=True", "--learning_rate=3e-05"]),
        (ON_GPU._replace(attn_implementation="eager"), ["--bf16=False --fp16=True", "--learning_rate=3e-05"]),
        (ON_GPU._replace(sdpa_kernels=KERNELS[1:], precision="fp16"), ["--stage=1 (", "--learning_rate=3e-05"]),
        (ON_CPU._replace(learning_rate=0.5), ["--learning_rate=0.0003"]),
    ],
)  # fmt: skip
def test_ways_back_when_a_loss_is_nan_then_come_in_the_guides_order_and_only_where_they_have_an_effect(
    setup: Setup, ways: list[str]
) -> None:
    bad = run([2.0, math.nan], setup)
    found = diagnose.ways_back(trial(), bad, diagnose.judge(bad))
    assert len(found) == len(ways)
    assert all(way.startswith(begin) for way, begin in zip(found, ways, strict=True)), found
    lost = diagnose.ways_back(trial()._replace(is_kept=False), bad, diagnose.judge(bad))
    assert lost[:-1] == found
    assert lost[-1].startswith("--keep=FOLDER for scripts/replay_batch.py")


def trial(**flags: object) -> short_run.Trial:
    given = {"base_model": "x", **flags}
    return short_run.Trial(parse(given), given, 10, Path("nowhere"), True, print)


@pytest.mark.parametrize(
    ("setup", "flags", "words"),
    [
        (ON_CPU, {}, "use --stage=2: python scripts/diagnose.py --base_model=x --stage=2"),
        (ON_GPU, {"stage": "2"}, "use --stage=3: python scripts/diagnose.py --base_model=x --stage=3"),
        (ON_GPU, {"attn_implementation": "sdpa", "enable_torch_compile": "False"}, "diagnose.py --base_model=x --stage=3"),
        (ON_GPU._replace(enable_torch_compile=True), {"stage": "3"}, "nothing is left to test"),
        (
            ON_CPU._replace(reason="sdpa is sick"),
            {"stage": "2"},
            "flash_attention_2 was asked for and eager attention, compile off, fp32, CPU ran (sdpa is sick)",
        ),
    ],
)
def test_next_stage_when_the_run_was_healthy_then_follows_what_really_ran(setup: Setup, flags: dict[str, str], words: str) -> None:
    assert words in diagnose.next_stage(trial(**flags), run([2.0, 1.0], setup))[0]


def test_next_stage_when_a_run_file_overrides_the_stage_then_resets_it(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("attn_implementation: eager\n")
    found = diagnose.next_stage(trial(config=str(tmp_path / "run.yaml")), run([2.0, 1.0], ON_CPU))[0]
    following = parse(flags_of(shlex.split(found.partition("diagnose.py ")[2])))
    assert (following.stage, following.attn_implementation) == (2, None)


def test_check_flags_when_a_run_file_overrides_a_compared_stage_then_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("attn_implementation: eager\n")
    with pytest.raises(UsageError, match=r"--attn_implementation=eager \(file .*run.yaml\) overrides"):
        diagnose.check_flags(trial(config=str(tmp_path / "run.yaml")).config, compares=True, keep=None)


def test_judge_when_fp16_finds_its_scale_then_takes_the_first_infinite_norms_for_that() -> None:
    found = Run(0, "", 3, steps([3.0, 2.0, 1.0], [math.inf, math.inf, 1.0]), ON_GPU._replace(precision="fp16"))
    assert [check.status for check in diagnose.judge(found)] == ["ok"] * 4
    assert diagnose.judge(found._replace(setup=ON_GPU))[2].status == "FAIL"
    assert diagnose.judge(found._replace(asked_steps=4))[0].status == "FAIL"


def stand_in(monkeypatch: pytest.MonkeyPatch, *runs: Run) -> None:
    """finished runs in place of processes."""
    left = list(runs)
    monkeypatch.setattr(diagnose, "start", lambda *_, **__: left.pop(0))


def test_compare_when_the_curves_part_then_exits_4(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, run([2.0, 1.0, 0.5], ON_CPU), run([2.0, 1.1, 0.7], ON_GPU))
    report = diagnose.compare(trial(), (1, 2), band=5e-3)
    assert (report.exit_code, report.checks[-1].name, report.checks[-1].status) == (4, "agreement", "FAIL")
    assert report.agreement is not None
    assert (report.agreement.largest_at, report.advice) == (3, ("stay with --stage=1",))


def test_compare_when_the_second_stage_is_sick_then_exits_4_and_leads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, run([2.0, 1.0], ON_CPU), run([0.0, 0.0], ON_GPU))
    report = diagnose.compare(trial(), (1, 2), band=5e-3)
    assert (report.exit_code, report.agreement) == (4, None)
    assert [check.name for check in report.checks if check.status == "FAIL"] == ["stage 2 loss"]
    assert report.advice[0].startswith("--stage=1 (")
    assert "FAIL  stage 2 loss" in text.text(report, (1, 2))


def test_compare_when_both_stages_came_to_the_same_then_says_it_compared_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stepped_down = ON_CPU._replace(reason="sdpa failed the canary")
    stand_in(monkeypatch, run([2.0, 1.0], ON_CPU), run([2.0, 1.0], stepped_down))
    with pytest.raises(PlanError, match=r"compares nothing here: both ran eager attention.*\(sdpa failed the canary\)"):
        diagnose.compare(trial(), (1, 2), band=5e-3)


def test_compare_when_the_first_run_fails_then_stops_with_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, Run(5, "the GPU's memory ran out", 10, (), ON_GPU))
    report = diagnose.compare(trial(), (1, 2), band=5e-3)
    assert (report.exit_code, len(report.runs), report.advice) == (5, 1, ())


def test_verdict_when_the_stages_agree_then_names_the_faster_one_and_otherwise_the_safer() -> None:
    found = stability.agreement(steps([2.0, 1.0], rate=100.0), steps([2.0, 1.0], rate=150.0), band=1e-3)
    compiled = ON_GPU._replace(enable_torch_compile=True, lora_dropout=0.05)
    assert diagnose.verdict((1, 2), (ON_CPU, ON_GPU), found) == ("use --stage=2: it agrees with stage 1 and is 1.50 times as fast",)
    assert diagnose.verdict((2, 3), (ON_GPU, compiled), found._replace(speed=0.5)) == (
        "stay with --stage=2: stage 3 agrees and is 0.50 times as fast",
    )
    apart = diagnose.verdict((3, 2), (compiled, ON_GPU), found._replace(agrees=False))
    assert apart[0] == "stay with --stage=2"
    assert "--lora_dropout=0" in apart[1]


def test_flags_when_changed_then_replace_older_names_and_keep_lists_and_spaces() -> None:
    words = ["--target_modules", "q_proj", "k_proj", "--eval_steps=5", "--evaluation_strategy", "steps", "--run_name=a b", "--bf16"]
    flags = flags_of(["--base_model=x", *words])
    changed = replaced(flags, {"eval_strategy": "no", "eval_step": 7})
    assert changed == {
        "base_model": "x", "target_modules": ["q_proj", "k_proj"], "run_name": "a b", "bf16": True, "eval_strategy": "no", "eval_step": 7,
    }  # fmt: skip
    assert parse(flags_of(words_of(changed))) == parse(changed)


def test_trial_flags_when_reset_then_are_as_if_never_given() -> None:
    given = {"warmup_steps": "5", "warmup_ratio": "none", "resume_from_checkpoint": "c", "load_best_model_at_end": "True", "resume": "True"}
    config = parse(replaced(trial(**given).flags, trial(**given).changes()))
    plain = parse({"base_model": "x", **trial().changes()})
    assert {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.compare} == {
        field.name: getattr(plain, field.name) for field in dataclasses.fields(plain) if field.compare
    }
    assert config.report_to == ("none",)


def test_last_word_when_finetune_gave_a_message_then_is_that_and_else_the_last_line() -> None:
    assert short_run.last_word(["plan", "finetune.py: 2 problems:", "  - a", "  - b"]) == "2 problems:\n  - a\n  - b"
    assert short_run.last_word(["Traceback", "KeyError: 'x'", ""]) == "KeyError: 'x'"
    assert short_run.last_word([]) == "it wrote nothing"
