"""What can run here: transformers, bitsandbytes, Unsloth, DeepSpeed, flash-attn, Liger, each asked in a process of its own; and compile."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from surefoot.config import FLAGS
from surefoot.doctor import child, packages
from surefoot.doctor.check import Check
from surefoot.doctor.stack import Stack

TOPIC = "backends"
TIMEOUT_S = 180.0
QUANTIZE = """
import torch, bitsandbytes.functional as functional
device = "cuda" if torch.cuda.is_available() else "cpu"
functional.dequantize_4bit(*functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4"))
"""

TRY_UNSLOTH = """
from surefoot.backends import unsloth_trial
unsloth_trial.run({"model_type": "llama", "method": "lora", "quantization": "none", "dtype": "bf16"})
"""


class Backend(NamedTuple):
    """A way to run. code must succeed; least_capability: of the GPU, where there is one or needs_gpu."""

    name: str
    reads: str
    package: str
    code: str
    least_capability: tuple[int, int] | None = None
    needs_gpu: bool = True


BACKENDS = (
    Backend("hf", "every run", "transformers", "import accelerate, peft\nfrom transformers import AutoModelForCausalLM, Trainer"),
    Backend("bnb", "--load_4bit and --load_8bit", "bitsandbytes", QUANTIZE),
    Backend("unsloth", "--backend unsloth", "unsloth", TRY_UNSLOTH, (7, 0), needs_gpu=False),
    Backend("deepspeed", "DeepSpeed profiles", "deepspeed", "import deepspeed"),
    Backend("flash_attention_2", "stage 2", "flash-attn", "import torch, flash_attn, flash_attn_2_cuda", (8, 0)),
    Backend("liger", "Liger kernels", "liger-kernel", "import liger_kernel.transformers", (7, 0)),
)


def checks(stack: Stack) -> Iterator[Check]:
    """One a backend; those that may run are asked at the same time."""
    obstacles = {backend.name: _obstacle(backend, stack) for backend in BACKENDS}
    asked = {backend.name: child.python(backend.code, TIMEOUT_S) for backend in BACKENDS if obstacles[backend.name] is None}
    for backend in BACKENDS:
        obstacle = obstacles[backend.name]
        yield obstacle if obstacle is not None else _judge(backend, child.finish(asked[backend.name]).problem)


def _obstacle(backend: Backend, stack: Stack) -> Check | None:
    """Why it need not be asked."""
    severe = "bad" if backend.name == "hf" else "ok"
    if not _is_driven(backend.name):
        return Check(TOPIC, backend.name, "ok", "off: this version of surefoot does not use it", usable=False)
    if packages.installed(backend.package) is None:
        pip = packages.pip_line(backend.package) if backend.package != "flash-attn" else "pip install flash-attn --no-build-isolation"
        return Check(
            TOPIC, backend.name, severe, f"off: {backend.package} is not installed; {backend.reads} would use it", pip, usable=False
        )
    if stack.problem:
        return Check(TOPIC, backend.name, "bad" if backend.name == "hf" else "warn", "off: torch cannot be loaded", usable=False)
    best = max((capability for _, capability in stack.gpus), default=None)
    if backend.least_capability and (backend.needs_gpu if best is None else best < backend.least_capability):
        least = ".".join(map(str, backend.least_capability))
        return Check(TOPIC, backend.name, "ok", f"off: needs a CUDA GPU of compute capability {least} or newer", usable=False)
    return None


def _is_driven(name: str) -> bool:
    """Whether this version of the program has code for it."""
    return name != "liger" or any("liger" in flag for flag in FLAGS)


def _judge(backend: Backend, problem: str) -> Check:
    version = packages.installed(backend.package)
    if not problem:
        return Check(TOPIC, backend.name, "ok", f"runs: {backend.package} {version} ({backend.reads})", usable=True)
    verdict = "bad" if backend.name == "hf" else "warn"
    way_out = f"Reinstall it for this torch: pip install --force-reinstall --no-deps {backend.package}=={version}"
    return Check(TOPIC, backend.name, verdict, f"off: {backend.package} {version} fails: {problem}", way_out, usable=False)


def runs(found: Sequence[Check]) -> dict[str, bool]:
    """Backend to whether it can run, from the checks of this file."""
    return {check.name: check.usable for check in found if check.topic == TOPIC and check.usable is not None}


def compiling(stack: Stack, environment: Mapping[str, str]) -> Check:
    """Whether torch.compile has what it needs: triton and a C compiler with Python's headers on a GPU, a C++ compiler on a CPU."""
    name = "torch.compile"
    variable, programs = ("CC", ("gcc", "clang", "cc")) if stack.gpus else ("CXX", ("g++", "clang++", "c++"))
    wanted = environment.get(variable)
    compiler = next((path for program in ([wanted] if wanted else programs) if (path := shutil.which(program))), None)
    if compiler is None:
        fact = (
            f"off: no {'C' if stack.gpus else 'C++'} compiler ({variable}={wanted})"
            if wanted
            else f"off: none of {', '.join(programs)} is on PATH"
        )
        return Check(TOPIC, name, "warn", fact, "apt-get install build-essential, or the image's -devel variant")
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.exists():
        return Check(TOPIC, name, "warn", f"off: {header} is missing, which triton's launchers include", "apt-get install python3-dev")
    triton = packages.installed("triton")
    if stack.gpus and triton is None:
        return Check(
            TOPIC, name, "warn", "off: triton is not installed", "Reinstall torch, which brings it: pip install --force-reinstall torch"
        )
    return Check(TOPIC, name, "ok", f"runs: {compiler}" + (f", triton {triton}" if stack.gpus else ""))
