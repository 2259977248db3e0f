"""What the doctor reads of a machine: loaded libraries, search paths, cards and drivers, and its verdicts on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from surefoot.doctor import gpus, libraries, stack
from surefoot.doctor.gpus import Card, Smi, User
from surefoot.doctor.stack import Library, Stack
from tests.stacks import CPU, H200

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
