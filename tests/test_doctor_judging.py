"""The doctor's verdicts on packages, known bad versions, stages, backends and the host, case by case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from surefoot.doctor import backends, fitness, host, known_bad, packages, report
from surefoot.doctor.check import Check
from surefoot.doctor.stack import Stack
from surefoot.verdicts import Verdict
from tests.conftest import machine
from tests.stacks import CPU, H200

SETUP = """
[options]
install_requires =
    torch>=2.6
    transformers>=5.17,<6
[options.extras_require]
bnb = bitsandbytes>=0.49
dev =
    pytest>=9
"""


def test_needs_when_read_from_setup_cfg_then_leave_out_the_tools() -> None:
    needs = packages.parse_needs(packages.from_setup_cfg(SETUP))
    assert [(need.name, str(need.requirement.specifier), need.extra) for need in needs] == [
        ("torch", ">=2.6", ""), ("transformers", "<6,>=5.17", ""), ("bitsandbytes", ">=0.49", "bnb"),
    ]  # fmt: skip


def test_needs_when_read_from_the_metadata_then_are_those_of_this_checkout() -> None:
    assert {need.name for need in packages.needs()} >= {"torch", "transformers", "peft", "bitsandbytes", "unsloth"}
    assert packages.tested()["transformers"] == "5.17.0"
    assert packages.parse_lock("# a set\nPyYAML==6.0.3\ntyping_extensions==4.16.0 # why\n\n") == {
        "pyyaml": "6.0.3",
        "typing-extensions": "4.16.0",
    }


@pytest.mark.parametrize(
    ("line", "version", "tested", "verdict", "words"),
    [
        ("peft>=0.21", "0.21.2", "0.21.2", "ok", "as tested"),
        ("peft>=0.21", "0.22.0", "0.21.2", "warn", "tested with 0.21.2"),
        ("peft>=0.21", "0.20.0", "0.21.2", "bad", "surefoot needs >=0.21"),
        ("peft>=0.21", None, "0.21.2", "bad", "not installed"),
        ("torch>=2.6", "2.13.0+cpu", "2.13.0", "ok", "as tested"),
        ("torch>=2.6", "2.5.0a0+872d972e41.nv24.08", None, "bad", "surefoot needs >=2.6"),
        ("torch>=2.6", "2.11.0a0+nv26.1", None, "ok", "within >=2.6"),
        ("trl>=1.14,<=1.15; extra == 'unsloth'", "1.16.0", None, "warn", "(for --backend unsloth)"),
        ("peft>=0.21", "main", None, "unknown", "no version"),
    ],
)
def test_judge_package_when_installed_then_weighs_range_and_tested_set(
    line: str, version: str | None, tested: str | None, verdict: str, words: str
) -> None:
    (need,) = packages.parse_needs([line])
    found = packages.judge(need, version, tested)
    assert found.verdict == verdict
    assert words in found.fact
    assert found.way_out.startswith("pip install") == (verdict in ("bad", "warn"))


HOPPER = {9}


@pytest.mark.parametrize(
    ("versions", "capabilities", "source", "verdict"),
    [
        ({"torch": "2.5.0+cu124"}, HOPPER, "huggingface/diffusers#9768", "warn"),
        ({"torch": "2.5.1+cu124"}, HOPPER, None, ""),
        ({"torch": "2.9.1", "cudnn": "9.10.2"}, HOPPER, "pytorch/pytorch#169849", "warn"),
        ({"torch": "2.11.0+cu130", "cudnn": "9.19.0"}, HOPPER, "pytorch/pytorch#196678", "warn"),
        ({"torch": "2.14.1+cu130", "cudnn": "9.24.0"}, HOPPER, "pytorch/pytorch#196678", "warn"),
        ({"torch": "2.11.0+cu130", "cudnn": "9.19.0"}, {8}, None, ""),
        ({"torch": "2.11.0+cu130"}, HOPPER, None, ""),
        ({"torch": "2.15.0", "cudnn": "9.26.0"}, HOPPER, "NVIDIA/cudnn-frontend#1072", "warn"),
        ({"torch": "2.8.0", "cudnn": "9.12.0"}, HOPPER, "NVIDIA/cudnn-frontend#160", "warn"),
        ({"torch": "2.6.0+cu124", "flash-attn": "2.8.2"}, HOPPER, "Dao-AILab/flash-attention#1783", "warn"),
        ({"torch": "2.6.0+cu124", "flash-attn": "2.7.4.post1"}, HOPPER, None, ""),
        ({"torch": "2.8.0", "deepspeed": "0.19.2"}, HOPPER, "deepspeedai/DeepSpeed#8072", "bad"),
        ({"torch": "2.13.0", "deepspeed": "0.19.8"}, HOPPER, "OpenRLHF/OpenRLHF#1225", "warn"),
        ({"transformers": "5.17.0"}, set(), "trainer.py", "warn"),
        ({"transformers": "5.17.0"}, HOPPER, None, ""),
        ({"trl": "1.15.0"}, set(), "trl/trainer/utils.py", "warn"),
        ({"unsloth": "2026.10.9", "transformers": "5.23.0"}, HOPPER, "unsloth 2026.10.9", "warn"),
        ({"unsloth": "2026.10.9", "transformers": "5.17.0"}, HOPPER, None, ""),
        ({"unsloth": "2026.10.9", "torch": "2.15.0"}, HOPPER, "unsloth 2026.10.9", "warn"),
        ({"torch": "unreleased"}, HOPPER, None, ""),
    ],
)
def test_known_bad_when_versions_are_given_then_names_the_thread_or_nothing(
    versions: dict[str, str], capabilities: set[int], source: str | None, verdict: str
) -> None:
    found = [check for check in known_bad.checks(versions, capabilities) if source is None or source in check.fact]
    assert len(found) >= 1
    assert found[0].verdict == (verdict or "ok")
    if source is None:
        assert found == [Check("known bad", "versions", "ok", f"none of the {len(known_bad.TABLE)} known cases")]


def test_known_bad_when_read_then_every_entry_has_a_source_and_a_way_out_or_is_spared() -> None:
    for entry in known_bad.TABLE:
        assert entry.versions
        assert all(str(SpecifierSet(specifier)) for specifier in entry.versions.values())
        assert "#" in entry.source or "requirements of" in entry.source or ".py" in entry.source
        assert entry.way_out or entry.spared


def row(backend: str, state: str, mask: str = "causal") -> Verdict:
    return Verdict(
        backend=backend, mask=mask, state=state, reason="12 non-finite values" if state == "fail" else "", error=1e-3, milliseconds=2.0
    )


RUNS = Check("backends", "torch.compile", "ok", "runs: gcc")
OFF = Check("backends", "torch.compile", "warn", "off: no compiler", "install one")


@pytest.mark.parametrize(
    ("found", "rows", "compiling", "stage", "words"),
    [
        (CPU, [], RUNS, 1, "it needs a CUDA GPU"),
        (H200, [], RUNS, 1, "the attention canary has not run; it was set up for CUDA 12.8, cuDNN 9.10 or newer, and here are CUDA 13.0, cuDNN 9.19.0"),
        (H200, [row("eager", "pass"), row("sdpa_flash", "pass"), row("sdpa_cudnn", "fail", "explicit")], RUNS, 3, "fit: sdpa_flash passed"),
        (H200, [row("eager", "pass"), row("sdpa_flash", "pass")], OFF, 2, "fit: sdpa_flash passed"),
        (H200, [row("eager", "pass"), row("sdpa_math", "pass"), row("sdpa_flash", "fail")], RUNS, 1, "no fused attention passed"),
        (H200, [row("eager", "fail"), row("sdpa_flash", "pass")], RUNS, 0, "fit: sdpa_flash passed"),
    ],
)  # fmt: skip
def test_stage_when_the_canary_has_spoken_then_follows_it_and_not_the_versions(
    found: Stack, rows: list[Verdict], compiling: Check, stage: int, words: str
) -> None:
    checks = (*fitness.attention_checks(rows), *fitness.stage_checks(found, rows, compiling))
    assert fitness.stage(checks) == stage
    assert words in next(check.fact for check in checks if check.name == "stage 2")


def test_report_when_something_is_bad_then_exit_code_and_summary_name_it() -> None:
    good = Check("stages", "stage 1", "ok", "fit on a CPU", usable=True)
    hf = Check("backends", "hf", "ok", "runs", usable=True)
    bad = Check("packages", "peft", "bad", "0.1", "pip install peft")
    fit = report.Report(machine=machine(), checks=(good, hf), attention=())
    unfit = report.Report(machine=machine(), checks=(good, hf, bad), attention=(row("eager", "pass"),))
    assert (fit.exit_code, unfit.exit_code) == (0, 5)
    assert report.summary(fit) == "fit for stage 1 on a CPU; runs: hf (0 warnings)"
    assert report.summary(unfit) == "not fit to train: peft (1 bad, 0 warnings)"
    assert json.loads(json.dumps(report.record(unfit)))["attention"][0]["backend"] == "eager"
    assert "  bad     peft     0.1\n                   > pip install peft\n" in report.text(unfit)


def test_backends_when_one_fails_or_is_absent_then_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        backends.Backend("hf", "every run", "packaging", "raise ImportError('operator torchvision::nms does not exist')"),
        backends.Backend("bnb", "--load_4bit", "packaging", "raise SystemExit(3)"),
        backends.Backend("deepspeed", "DeepSpeed profiles", "nothing-like-it", ""),
        backends.Backend("flash_attention_2", "stage 2", "packaging", "", (8, 0)),
    )
    monkeypatch.setattr(backends, "BACKENDS", table)
    found = list(backends.checks(CPU))
    assert [check.verdict for check in found] == ["bad", "warn", "ok", "ok"]
    assert "torchvision::nms does not exist" in found[0].fact
    assert "exit code 3" in found[1].fact
    assert found[2].way_out == "pip install 'nothing-like-it'"
    assert "needs a CUDA GPU of compute capability 8.0" in found[3].fact
    assert backends.runs(found) == {"hf": False, "bnb": False, "deepspeed": False, "flash_attention_2": False}


def test_compiling_when_no_compiler_is_found_then_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert backends.compiling(CPU, {}).fact == f"runs: {shutil.which('g++')}"
    assert "CC=no-such-cc" in backends.compiling(H200, {"CC": "no-such-cc"}).fact
    monkeypatch.setenv("PATH", str(tmp_path))
    assert backends.compiling(H200, {}).fact == "off: none of gcc, clang, cc is on PATH"


def test_disk_when_the_folder_cannot_hold_a_run_then_says_why(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert host.disk("--output_dir", file / "run", 1.0, "bad", "Choose another").verdict == "bad"
    full = host.disk("--output_dir", tmp_path / "a/b", 1e9, "bad", "Choose another")
    assert (full.verdict, full.way_out) == ("warn", "Make room there. Choose another")
    assert host.disk("--output_dir", tmp_path, 0.0, "bad", "").verdict == "ok"


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HF_HUB_CACHE": "/hub"}, "/hub"),
        ({"HF_HOME": "/hf"}, "/hf/hub"),
        ({"XDG_CACHE_HOME": "/xdg"}, "/xdg/huggingface/hub"),
        ({}, f"{Path.home()}/.cache/huggingface/hub"),
    ],
)
def test_hub_cache_when_variables_are_set_then_follows_huggingface_hub(environment: dict[str, str], folder: str) -> None:
    assert str(host.hub_cache(environment)) == folder


def test_parse_meminfo_when_given_proc_text_then_gib() -> None:
    assert host.parse_meminfo("MemTotal:       16777216 kB\nHugePages_Total:       0\nMemAvailable:    8388608 kB\n") == {
        "MemTotal": 16.0,
        "MemAvailable": 8.0,
    }
