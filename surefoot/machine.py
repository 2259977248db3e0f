"""Machine and probe(): GPUs, memory, versions, processes and their engine. The only reader of hardware and environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surefoot.signals import STOP_FILE

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "datasets", "tokenizers", "safetensors", "bitsandbytes", "deepspeed",
    "flash-attn", "xformers", "liger-kernel", "triton", "unsloth", "unsloth_zoo", "trl", "tensorboard", "wandb", "trackio", "mlflow",
    "fire",
)  # fmt: skip
UNSLOTH_REFUSED = "SUREFOOT_UNSLOTH_REFUSED"  # set by a run for the one that takes its place


@dataclass(frozen=True, kw_only=True)
class Gpu:
    name: str
    memory_gib: float
    capability: tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this process can see. `engine` is single, ddp, deepspeed or fsdp, as the launcher's environment names it.

    local_world_size counts the processes of this host; is_launched: a launcher started this process as one of a group, if of one;
    has_profile: or accelerate started it alone; is_cut_short: alone, though it was asked for several; the launcher_* and offloads are
    what its profile says, None where it leaves them to the flags; command: how the program was started; stop_file: where a launcher
    leaves word that the run is to stop (SUREFOOT_STOP_FILE).
    """

    hostname: str
    python: str
    cpu_count: int
    memory_gib: float
    gpus: tuple[Gpu, ...]
    versions: dict[str, str]
    cuda: str | None = None
    cudnn: str | None = None
    world_size: int = 1
    rank: int = 0
    local_rank: int = 0
    local_world_size: int = 1
    is_launched: bool = False
    has_profile: bool = False
    is_cut_short: bool = False
    engine: str = "single"
    zero_stage: int | None = None
    fsdp_version: int = 2
    launcher_precision: str = "no"
    launcher_accumulation: int | None = None
    launcher_clipping: float | None = None
    offloads: bool = False
    command: tuple[str, ...] = ()
    cache_dir: str = ""
    cpu_name: str = ""
    driver: str | None = None
    stop_file: str | None = None
    unsloth_switches: tuple[str, ...] = ()  # environment variables meant for it, as NAME=value
    unsloth_refused: str | None = None  # why this run, when it was first started, could not go on with Unsloth

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def strategy(self) -> str:
        """single, ddp, zero2, zero3 or fsdp2; another number where the profile names another stage or version."""
        numbered = {"deepspeed": f"zero{2 if self.zero_stage is None else self.zero_stage}", "fsdp": f"fsdp{self.fsdp_version}"}
        return numbered.get(self.engine, self.engine)

    @property
    def cuts_weights(self) -> bool:
        """The engine keeps the weights in pieces and gathers a layer when it computes."""
        return self.strategy in ("zero3", "fsdp2")

    @property
    def gpu(self) -> Gpu | None:
        """The GPU of this process, None on a CPU."""
        return self.gpus[self.local_rank % len(self.gpus)] if self.gpus else None

    def has(self, package: str) -> bool:
        return package in self.versions


def probe() -> Machine:
    """Reads the machine. Imports torch only where a GPU may be, so that a CPU machine answers in milliseconds."""
    gpus, cuda, cudnn = _gpus() if _may_have_gpu() else ((), None, None)
    env = os.environ
    return Machine(
        hostname=socket.gethostname(),
        python=platform.python_version(),
        cpu_count=len(os.sched_getaffinity(0)),
        memory_gib=_memory_gib(),
        gpus=gpus,
        versions=_versions(),
        cuda=cuda,
        cudnn=cudnn,
        world_size=int(env.get("WORLD_SIZE", "1")),
        rank=int(env.get("RANK", "0")),
        local_rank=int(env.get("LOCAL_RANK", "0")),
        local_world_size=int(env.get("LOCAL_WORLD_SIZE", env.get("WORLD_SIZE", "1"))),
        is_launched="LOCAL_RANK" in env,
        has_profile="LOCAL_RANK" in env or "ACCELERATE_USE_CPU" in env,
        is_cut_short=_is_cut_short(),
        engine=_engine(),
        **_profile(),
        command=tuple(sys.argv) if Path(sys.argv[0]).name == "finetune.py" else (),
        cache_dir=str(_cache_dir()),
        cpu_name=_cpu_name(),
        driver=_driver(),
        stop_file=env.get(STOP_FILE) or None,
        unsloth_switches=tuple(sorted(f"{name}={value}" for name, value in env.items() if name.startswith(("UNSLOTH_", "XFORMERS_")))),
        unsloth_refused=env.get(UNSLOTH_REFUSED),
    )


def _may_have_gpu() -> bool:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "all").startswith("-1") or os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if hidden or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
        return False
    return Path("/dev/nvidia0").exists() or Path("/proc/driver/nvidia").exists() or shutil.which("nvidia-smi") is not None


def _gpus() -> tuple[tuple[Gpu, ...], str | None, str | None]:
    try:
        import torch
    except ImportError:
        return (), None, None
    if not torch.cuda.is_available():
        return (), torch.version.cuda, None
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    gpus = tuple(Gpu(name=p.name, memory_gib=round(p.total_memory / 2**30, 1), capability=(p.major, p.minor)) for p in found)
    number = torch.backends.cudnn.version() or 0  # type: ignore[no-untyped-call]
    return gpus, torch.version.cuda, f"{number // 10000}.{number % 10000 // 100}.{number % 100}"


def _engine() -> str:
    env = os.environ
    if env.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    if env.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        return "fsdp"
    return "ddp" if int(env.get("WORLD_SIZE", "1")) > 1 else "single"


def _is_cut_short() -> bool:
    """True where accelerate was asked for several processes, and its profile (distributed_type NO) made it start one without a word.

    Of the number it hands on only where they were to meet (prepare_simple_launcher_cmd_env of 1.15), which it had not been given itself.
    """
    env, parent = os.environ, Path(f"/proc/{os.getppid()}")
    if "LOCAL_RANK" in env or not {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= env.keys():
        return False
    try:
        line, given = (parent / "cmdline").read_bytes(), (parent / "environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"accelerate" in line and any(f"{name}={env[name]}".encode() not in given for name in ("MASTER_ADDR", "MASTER_PORT"))


def _profile() -> dict[str, Any]:
    """What accelerate's profile says, as its launcher hands it on: in the environment, or in a DeepSpeed JSON that it names."""
    env = os.environ
    file = _deepspeed_file(env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"))
    zero = file.get("zero_optimization", {})
    offload = [env.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE", "none") for what in ("OPTIMIZER", "PARAM")]
    offload += [zero.get(f"offload_{what}", {}).get("device", "none") for what in ("optimizer", "param")]
    precision = next((kind for kind in ("bf16", "fp16") if file.get(kind, {}).get("enabled") is True), "no")
    return {
        "zero_stage": zero.get("stage", _number(env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE"))),
        "fsdp_version": _number(env.get("FSDP_VERSION")) or 2,
        "launcher_precision": precision if precision != "no" else env.get("ACCELERATE_MIXED_PRECISION", "no"),
        "launcher_accumulation": _number(str(file.get("gradient_accumulation_steps", env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS")))),
        "launcher_clipping": _decimal(str(file.get("gradient_clipping", env.get("ACCELERATE_GRADIENT_CLIPPING")))),
        "offloads": any(device != "none" for device in offload) or env.get("FSDP_OFFLOAD_PARAMS") == "true",
    }


def _deepspeed_file(path: str | None) -> dict[str, Any]:
    """DeepSpeed's own JSON, {} where there is none; a broken one is DeepSpeed's to name."""
    try:
        content = json.loads(Path(path).read_text()) if path and path != "none" else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cache_dir() -> Path:
    """Where verdicts on this machine and tokenised rows are kept between runs."""
    env = os.environ
    return Path(env.get("SUREFOOT_CACHE") or Path(env.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "surefoot")


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    """Version of NVIDIA's kernel module."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return None


def _memory_gib() -> float:
    return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)


def _number(text: str | None) -> int | None:
    return int(text) if text and text.isdigit() else None


def _decimal(text: str | None) -> float | None:
    return float(text) if text and text.replace(".", "", 1).isdigit() else None
