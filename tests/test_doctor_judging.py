"""The doctor's parsers, tables and verdicts, case by case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from surefoot.doctor import backends, fitness, gpus, host, known_bad, libraries, packages, report, stack
from surefoot.doctor.check import Check
from surefoot.doctor.gpus import Card, Smi, User
from surefoot.doctor.stack import Library, Stack
from surefoot.verdicts import Verdict
from tests.conftest import machine

CPU = Stack(torch="2.13.0+cpu", folder="/site/torch")
H200 = Stack(
    torch="2.11.0+cu130",
    folder="/site/torch",
    cuda="13.0",
    cudnn_compiled="9.19.0",
    architectures=("sm_75", "sm_80", "sm_90", "compute_120"),
    gpus=(("NVIDIA H200", (9, 0)),),
    libraries=(Library("cudnn", ("/site/nvidia/cudnn/lib/libcudnn.so.9",), "9.19.0"),),
)
CARD = Card("GPU-1", "NVIDIA H200", 143771, 4, "580.159.03")


def test_loaded_when_given_maps_then_finds_each_family_and_no_look_alike() -> None:
    maps = "\n".join(
        f"7f{number:02d}-7f{number + 1:02d} r-xp 00000000 fe:00 1234    {path}"
        for number, path in enumerate(
            [
                "/site/nvidia/cudnn/lib/libcudnn.so.9", "/site/nvidia/cudnn/lib/libcudnn.so.9", "/opt/my libs/libcudnn_graph.so.9.20.0",
                "/site/torch/lib/libcudart-d0da41ae.so.11.0", "/site/nvidia/cu13/lib/libcublasLt.so.13 (deleted)", "/usr/lib/libnccl.so.2",
                "/site/torch/lib/libtorch_cuda.so", "/usr/lib/libnccl-net.conf", "/site/libmycudnn.so.9", "[heap]",
            ]
        )
    )  # fmt: skip
    assert stack.loaded(maps + "\n7fff-7fff rw-p 00000000 00:00 0 \n") == {
        "cudnn": ("/opt/my libs/libcudnn_graph.so.9.20.0", "/site/nvidia/cudnn/lib/libcudnn.so.9"),
        "nccl": ("/usr/lib/libnccl.so.2",),
        "cublas": ("/site/nvidia/cu13/lib/libcublasLt.so.13",),
        "cudart": ("/site/torch/lib/libcudart-d0da41ae.so.11.0",),
    }


@pytest.mark.parametrize(
    ("family", "number", "version"),
    [("cudnn", 91900, "9.19.0"), ("cudnn", 8907, "8.9.7"), ("nccl", 22809, "2.28.9"), ("cudart", 13000, "13.0"), ("cudart", 12080, "12.8")],
)
def test_readable_when_given_a_packed_version_then_unpacks_it(family: str, number: int, version: str) -> None:
    assert stack.readable(family, number) == version


@pytest.mark.parametrize(
    ("text", "folders"), [("", ()), ("/a:/b", ("/a", "/b")), ("/a::/b", ("/a", ".", "/b")), ("/a;/b:", ("/a", "/b", "."))]
)
def test_search_path_when_split_then_an_empty_entry_is_the_current_folder(text: str, folders: tuple[str, ...]) -> None:
    assert stack.search_path(text) == folders


def test_shadows_when_the_folder_is_the_wheels_own_then_says_nothing(tmp_path: Path) -> None:
    own = tmp_path / "nvidia/cudnn/lib"
    own.mkdir(parents=True)
    (own / "libcudnn.so.9").write_text("")
    found = Stack(torch="2.11.0+cu130", folder=str(tmp_path / "torch"), cuda="13.0")
    names = [check.name for check in libraries.checks(found, {"LD_LIBRARY_PATH": str(own)}, "")]
    assert names == ["torch"]


OWN = "/site/nvidia/cudnn/lib"


@pytest.mark.parametrize(
    ("paths", "version", "own", "wanted", "verdict", "words"),
    [
        ((f"{OWN}/libcudnn.so.9",), "9.19.0", [OWN], "9.19.0.56", "ok", "9.19.0, /site"),
        ((f"{OWN}/libcudnn.so.9",), "9.26.0", [OWN], "9.19.0.56", "warn", "torch was built for 9.19.0.56"),
        ((f"{OWN}/libcudnn.so.9",), "9.1.0", [OWN], "9.19.0.56", "bad", "torch was built for 9.19.0.56"),
        (("/usr/lib/cuda/libcudnn.so.9",), "9.1.0", [OWN], "9.19.0.56", "bad", "torch was built for 9.19.0.56"),
        (("/usr/lib/cuda/libcudnn.so.9",), "9.19.0", [OWN], "9.19.0.56", "warn", f"not the wheel's in {OWN}"),
        ((f"{OWN}/libcudnn.so.9", "/x/libcudnn_graph.so.9"), "9.19.0", [OWN], "9.19.0.56", "bad", "its parts come from 2 folders"),
        (("/conda/lib/libcudnn.so.9",), "9.19.0", [], None, "ok", "/conda/lib"),
        (("/conda/lib/libcudnn.so.9", "/x/libcudnn_graph.so.9"), "9.19.0", [], None, "warn", "its parts come from 2 folders"),
        ((f"{OWN}/libcudnn_graph.so.9",), None, [OWN], "9.19.0.56", "ok", "version not told"),
    ],
)
def test_judge_library_when_loaded_then_weighs_its_folder_and_version(
    paths: tuple[str, ...], version: str | None, own: list[str], wanted: str | None, verdict: str, words: str
) -> None:
    found = libraries.judge("cuDNN", Library("cudnn", paths, version), own, wanted)
    assert found.verdict == verdict
    assert words in found.fact
    assert bool(found.way_out) == (verdict != "ok")


def test_parse_pins_when_given_a_wheels_requirements_then_finds_cudnn_and_nccl() -> None:
    lines = [
        "nvidia-cudnn-cu13==9.20.0.48; platform_system == 'Linux'",
        "nvidia-nccl-cu12 (==2.27.5)",
        "nvidia-cublas==13.1",
        "sympy>=1.13.3",
    ]
    assert libraries.parse_pins(lines) == {"cudnn": "9.20.0.48", "nccl": "2.27.5"}


def test_from_record_when_the_child_wrote_it_then_is_the_stack() -> None:
    fields = {name: getattr(H200, name) for name in Stack.__dataclass_fields__ if name != "problem"}
    assert stack.from_record(json.loads(json.dumps(fields))) == H200


def test_parse_cards_when_values_are_missing_then_none_and_other_lines_are_passed_over() -> None:
    text = "GPU-1, NVIDIA H200, 143771, 4, 580.159.03\nGPU-2, NVIDIA A100 MIG, [N/A], [N/A], 535.54.03\n\nNo devices were found\n"
    assert gpus.parse_cards(text) == (CARD, Card("GPU-2", "NVIDIA A100 MIG", None, None, "535.54.03"))
    users = gpus.parse_users("GPU-1, 77, python, train.py, 1024\nGPU-1, 78, [Not Found], [N/A]\n")
    assert users == (User("GPU-1", "77", "python,train.py", 1024), User("GPU-1", "78", "[Not Found]", None))


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\nGCC version:  12.3.0", "535.183.01"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (a@b)\n", "580.65.06"),
        ("something else", None),
    ],
)
def test_parse_driver_when_given_proc_text_then_finds_the_version(text: str, version: str | None) -> None:
    assert gpus.parse_driver(text) == version


@pytest.mark.parametrize(
    ("driver", "cuda", "sees_gpu", "verdict", "words"),
    [
        ("580.159.03", "13.0", True, "ok", "needs 580 or newer"),
        ("535.183.01", "12.4", True, "ok", "needs 525 or newer"),
        ("535.183.01", "13.0", False, "bad", "CUDA 13.0 needs 580 or newer"),
        ("535.183.01", "13.0", True, "warn", "forward compatibility"),
        ("470.57.02", "12.8", False, "bad", "CUDA 12.8 needs 525 or newer"),
        ("470.57.02", None, False, "ok", "470.57.02"),
        ("[N/A]", "13.0", False, "unknown", "is no version"),
    ],
)
def test_driver_check_when_compared_with_torchs_cuda_then_takes_nvidias_least(
    driver: str, cuda: str | None, sees_gpu: bool, verdict: str, words: str
) -> None:
    found = gpus.driver_check(driver, cuda, sees_gpu=sees_gpu)
    assert found.verdict == verdict
    assert words in found.fact
    if verdict == "bad":
        assert f"CUDA {'12' if driver > '525' else '11'}.x" in found.way_out


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((9, 0), ("sm_80", "sm_90"), True),
        ((8, 9), ("sm_80",), True),
        ((7, 0), ("sm_75", "sm_80", "compute_120"), False),
        ((12, 1), ("sm_90", "compute_120"), True),
        ((10, 0), ("sm_90a",), False),
        ((9, 0), ("sm_90a",), True),
        ((9, 0), ("gfx942",), False),
    ],
)
def test_runs_on_when_torch_lists_architectures_then_follows_cubin_and_ptx(
    capability: tuple[int, int], built: tuple[str, ...], runs: bool
) -> None:
    assert gpus.runs_on(capability, built) is runs


@pytest.mark.parametrize(
    ("found", "environment", "name", "verdict", "words"),
    [
        (CPU, {}, "visible", "bad", "2.13.0+cpu is a CPU build"),
        (CPU, {"CUDA_VISIBLE_DEVICES": ""}, "visible", "warn", "CUDA_VISIBLE_DEVICES= leaves torch 0 of 1 GPUs"),
        (Stack(torch="2.11.0+cu130", cuda="13.0", cuda_problem="no driver"), {}, "visible", "bad", "cannot use the GPU: no driver"),
        (H200, {}, "GPU 0", "ok", "NVIDIA H200, 140.4 GiB, compute capability 9.0"),
    ],
)
def test_gpu_checks_when_nvidia_smi_lists_one_then_says_whether_torch_sees_it(
    found: Stack, environment: dict[str, str], name: str, verdict: str, words: str
) -> None:
    checks = {check.name: check for check in gpus.checks(Smi((CARD,)), found, "580.159.03", environment)}
    assert checks[name].verdict == verdict
    assert words in checks[name].fact
    assert ("visible" in checks) == (name == "visible")


def test_gpu_checks_when_torch_has_no_kernels_for_it_then_bad() -> None:
    volta = Stack(torch="2.13.0+cu130", cuda="13.0", architectures=("sm_75", "sm_90"), gpus=(("Tesla V100", (7, 0)),))
    checks = {check.name: check for check in gpus.checks(Smi(), volta, None, {})}
    assert checks["kernels"].verdict == "bad"
    assert "sm_70: it has sm_75, sm_90" in checks["kernels"].fact


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
