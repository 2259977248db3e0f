"""scripts/doctor.py as a user starts it, here and in an environment without torch, and the processes it asks."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import time
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import packaging
import pytest

from surefoot.doctor import child, gpus, libraries, report, stack
from surefoot.doctor.check import VERDICTS, Check
from surefoot.doctor.gpus import Smi
from surefoot.doctor.stack import Library
from tests.conftest import ROOT
from tests.stacks import CPU

Run = subprocess.CompletedProcess[str]
SMI = """#!/bin/sh
case "$1" in
  --query-gpu=*) echo "GPU-1, NVIDIA H200, 143771, 61444, 580.159.03"; echo "GPU-2, NVIDIA H200, 143771, 4, 580.159.03" ;;
  --query-compute-apps=*) echo "GPU-1, 4242, /usr/bin/python3, 61440" ;;
esac
"""
LIBCUDNN = "#include <stddef.h>\nsize_t cudnnGetVersion(void) { return 90100; }\n"


def doctor(*words: object, python: str | Path = sys.executable, cwd: Path = ROOT, **env: str) -> Run:
    command = [str(python), str(ROOT / "scripts/doctor.py"), *map(str, words)]
    return subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def shadow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a libcudnn.so.9 that is none."""
    folder = tmp_path_factory.mktemp("cuda-libs")
    (folder / "libcudnn.so.9").write_text("")
    return folder


@pytest.fixture(scope="module")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that holds packaging and nothing else."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, symlinks=True)
    site = next(folder.glob("lib/python*/site-packages"))
    (site / "packaging").symlink_to(Path(packaging.__file__).parent)
    return folder / "bin/python"


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Puts a script in the place of nvidia-smi and returns the PATH that finds it."""

    def install(text: str) -> str:
        (tmp_path / "nvidia-smi").write_text(text)
        (tmp_path / "nvidia-smi").chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        monkeypatch.setenv("PATH", path)
        return path

    return install


def test_doctor_when_run_here_with_a_shadowing_folder_then_json_says_fit_and_names_the_folder(shadow: Path, tmp_path: Path) -> None:
    done = doctor("--json", f"--output_dir={tmp_path}/run", LD_LIBRARY_PATH=f"/nowhere:{shadow}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert (record["fit"], record["stage"]) == (True, 1)
    assert "fit for stage 1 on a CPU" in record["summary"]
    assert {"hf": True, "bnb": True, "flash_attention_2": False}.items() <= record["backends"].items()
    checks = {(check["topic"], check["name"]): check for check in record["checks"]}
    torch = checks["torch and its libraries", "torch"]
    assert torch["verdict"] == "ok"
    assert torch["fact"].startswith(importlib.metadata.version("torch"))
    found = checks["torch and its libraries", "LD_LIBRARY_PATH, cuDNN"]
    assert found["verdict"] == "warn"
    assert f"{shadow} holds libcudnn.so.9: it shadows" in found["fact"]
    assert f"Take {shadow} out of LD_LIBRARY_PATH" in found["way_out"]
    assert f"free at {tmp_path}/run" in checks["memory and disk", "--output_dir"]["fact"]
    assert not (tmp_path / "run").exists()


def test_doctor_when_torch_is_missing_then_not_fit_with_the_pip_line(
    without_torch: Path, nvidia_smi: Callable[[str], str], shadow: Path
) -> None:
    done = doctor(python=without_torch, PATH=nvidia_smi(SMI), LD_LIBRARY_PATH=str(shadow))
    assert done.returncode == report.NOT_FIT, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "bad torch not installed: nothing can be trained" in lines
    assert lines[lines.index("bad torch not installed: nothing can be trained") + 1] == "> pip install 'torch>=2.6'"
    assert "ok GPU 1 NVIDIA H200, 140.4 GiB" in lines
    busy = "warn GPU 0 NVIDIA H200, 140.4 GiB; 60.0 GiB of it held by /usr/bin/python3 (pid 4242, 60.0 GiB)"
    assert busy in lines
    assert "ok driver 580.159.03" in lines
    assert any(line.startswith("bad hf off: transformers is not installed") for line in lines)
    assert any(line.startswith(f"warn LD_LIBRARY_PATH, cuDNN {shadow} holds libcudnn.so.9") for line in lines)
    assert lines[-1].startswith("not fit to train: torch, transformers, accelerate")


def test_doctor_when_torch_ends_its_process_then_not_fit_and_no_traceback(
    without_torch: Path, nvidia_smi: Callable[[str], str], tmp_path: Path
) -> None:
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "torch.py").write_text("raise OSError('libcudnn.so.9: undefined symbol: cudnnGetVersion')\n")
    done = doctor("--json", python=without_torch, PATH=nvidia_smi(SMI), PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == report.NOT_FIT, done.stderr
    assert done.stderr == ""
    record = json.loads(done.stdout)
    assert (record["fit"], record["stage"]) == (False, 0)
    torch = next(check for check in record["checks"] if check["name"] == "torch")
    assert torch["fact"] == "cannot be loaded: OSError: libcudnn.so.9: undefined symbol: cudnnGetVersion"
    assert "LD_LIBRARY_PATH" in torch["way_out"]


def test_doctor_when_packaging_is_missing_then_one_sentence(tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", symlinks=True)
    done = doctor(python=tmp_path / "empty/bin/python")
    assert done.returncode == report.NOT_FIT
    assert done.stderr.startswith("doctor.py: the package packaging is not installed")
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--jsn"], "--jsn is not a flag. Did you mean --json?"),
        (["--output-dirs=x"], "--output_dirs is not a flag. Did you mean --output_dir?"),
        (["--stage=2"], "--stage is not a flag. See --help"),
        (["--json=maybe"], "--json=maybe must be True or False"),
        (["--output_dir"], "--output_dir needs a value"),
        (["--output_dir", "--json"], "--output_dir needs a value"),
        (["here", "-v"], "2 problems:\n  - stray word 'here': flags begin with --"),
    ],
)
def test_doctor_when_a_flag_is_wrong_then_exits_2_with_the_way_out(words: list[str], complaint: str) -> None:
    done = doctor(*words)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stdout == ""


def test_doctor_when_asked_for_help_then_names_its_flags_and_exit_codes() -> None:
    done = doctor("--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("--output_dir", "--json", "5 not fit"))


def test_load_when_a_library_is_preloaded_then_tells_its_path_and_its_own_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cudnn.c").write_text(LIBCUDNN)
    library = tmp_path / "libcudnn.so.9"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, tmp_path / "cudnn.c"], check=True)
    monkeypatch.setenv("LD_PRELOAD", str(library))
    found = stack.load()
    assert found.problem == ""
    assert Library("cudnn", (str(library),), "9.1.0") in found.libraries
    preloaded = next(check for check in libraries.checks(found, os.environ, "") if check.name == "LD_PRELOAD, cuDNN")
    assert preloaded.fact.endswith("and is loaded")


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("#!/bin/sh\necho 'NVIDIA-SMI has failed because it could not communicate with the driver.'\nexit 9\n", "NVIDIA-SMI has failed"),
        ("#!/bin/sh\nsleep 60\n", "did not answer in time"),
        ("no script at all", "cannot be started"),
    ],
)
def test_ask_smi_when_nvidia_smi_fails_or_hangs_then_says_so_and_goes_on(
    script: str, problem: str, nvidia_smi: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpus, "TIMEOUT_S", 0.5)
    nvidia_smi(script)
    began = time.monotonic()
    found = gpus.ask_smi()
    assert time.monotonic() - began < 5
    assert problem in found.problem
    warning = next(gpus.checks(found, CPU, None, {}))
    assert (warning.verdict, warning.name) == ("warn", "nvidia-smi")


def test_ask_smi_when_there_is_none_then_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.ask_smi() == Smi()
    assert list(gpus.checks(Smi(), CPU, None, {})) == [Check("GPUs", "GPUs", "ok", "none: this machine trains on its CPU")]


def test_finish_when_the_process_dies_then_names_the_error_or_the_signal() -> None:
    assert child.finish(child.python("import nothing_like_it", 30)).problem == "ModuleNotFoundError: No module named 'nothing_like_it'"
    assert child.finish(child.python("import os; os.kill(os.getpid(), 11)", 30)).problem == "ended by signal 11"
    assert child.finish(child.python("import surefoot; print('here')", 30)) == ("here\n", "")


def test_python_when_the_current_folder_holds_a_torch_then_does_not_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise OSError('not this one')\n")
    monkeypatch.chdir(tmp_path)
    assert child.finish(child.python("import torch", 60)).problem == ""


def test_copies_when_the_environment_holds_libraries_then_lists_them_and_passes_over_the_rest(shadow: Path) -> None:
    environment = {"LD_LIBRARY_PATH": f"/nowhere:{shadow}:{shadow}", "LD_PRELOAD": "/x/libjemalloc.so.2 /x/libnccl.so.2"}
    assert stack.copies(environment) == [("LD_PRELOAD", "nccl", "/x/libnccl.so.2"), ("LD_LIBRARY_PATH", "cudnn", f"{shadow}/libcudnn.so.9")]
    assert stack.copies({}) == []


@pytest.mark.gpu
def test_doctor_when_run_on_a_gpu_then_libraries_are_the_wheels_and_the_canary_decides(tmp_path: Path) -> None:
    done = doctor("--json", f"--output_dir={tmp_path}")
    record: dict[str, Any] = json.loads(done.stdout)
    checks = {check["name"]: check for check in record["checks"]}
    assert all(check["verdict"] in VERDICTS for check in record["checks"])
    assert all(checks[name]["fact"][0].isdigit() for name in ("cuDNN", "cuBLAS", "CUDA runtime", "driver"))
    assert record["attention"]
    assert checks["stage 2"]["fact"].startswith("fit"), done.stdout
